"""One trial: a kernel over a cache in which exactly the bytes of its tokens are mapped.

Everything that is mapped is NaN first, other layers and what lies past each length included. The layer
looked at is the last of its row, so that with a length that ends on a granule the byte behind its last one
is not mapped. Then the same with the largest finite number in place of NaN, where NaN came through.
"""

import traceback
from dataclasses import dataclass

import torch

import kernel_calls
import vattn_bridge as bridge

KV_HEADS, GROUP = 8, 4
GRANULE = 2 << 20
PAGE = 16
NEW_TOKENS = 64
NAN, LARGEST = -1, 0x7F7F
TOLERANCE = 0.01
FAULTS = ("illegal memory access", "unspecified launch failure", "CUDA_ERROR_ILLEGAL_ADDRESS")
# New tokens (none: all of them), and whether a token sees no later one.
MODES = {"decode": (1, False), "extend": (NEW_TOKENS, True), "extend, not causal": (NEW_TOKENS, False),
         "prefill": (None, True)}
VARIANTS = {"fa3-batch": ("fa3-batch", "fa3-batch-1", "fa3-batch-4")}
SLOW_PER_LENGTH = ("sdpa-cudnn",)


@dataclass(frozen=True)
class Case:
    """What is called, over which memory, and how far a step rounds up."""

    kernel: str
    layout: str
    key_dim: int
    value_dim: int
    mode: str
    tile: int = 1
    quick: bool = False  # the kernel alone, without its variants

    @property
    def dims(self):
        return str(self.key_dim) if self.key_dim == self.value_dim else f"{self.key_dim}/{self.value_dim}"


def layers(case):
    """Rows of 128 KiB where the head dim allows: 16 tokens a granule, so that tiles are probed finely."""
    if case.layout == "per-layer":
        return 2
    whole = max(1, (128 << 10) // (KV_HEADS * 2 * min(case.key_dim, case.value_dim)))
    return whole // 2 if case.layout.endswith("interleaved") else whole


def lengths(case):
    """Ends of granules, and places in the middle of one, and the slot's most tokens at the end."""
    if case.layout == "per-layer":
        unit = GRANULE // (KV_HEADS * case.key_dim * 2)
        most = 4 * unit
        chosen = [unit, 2 * unit, 3 * unit, 1, 77, 1000, unit + 500]
    else:
        most = 2048
        chosen = [*range(16, 545, 16), 1056, 1, 7, 100, 333, 1000, 1055]
        if case.kernel in SLOW_PER_LENGTH:
            chosen = [16, 48, 80, 112, 128, 144, 176, 192, 272, 528, 1056, 7, 100, 333, 1000]
    if case.kernel == "sdpa-cudnn":
        chosen = [length for length in chosen if length > 1]  # PyTorch gives it no single key
    new = MODES[case.mode][0] or 1
    return [length for length in chosen if length >= new] + [most - 8], most


class Stage:
    """A cache whose slots hold the case's lengths, and nothing more mapped."""

    def __init__(self, case):
        self.case = case
        self.lengths, most = lengths(case)
        self.layer = layers(case) - 1
        self.cache = bridge.Cache(
            "cuda", layers=layers(case), kv_heads=KV_HEADS, key_dim=case.key_dim, value_dim=case.value_dim,
            slots=len(self.lengths), max_tokens=most, layout=case.layout, tile_tokens=case.tile, page_tokens=PAGE)
        slots = self.cache.acquire_all()
        self.cache.step_exactly(dict(zip(slots, self.lengths)))
        self.past = [self.cache.past_tokens(slot, length) for slot, length in enumerate(self.lengths)]

    def close(self):
        torch.cuda.synchronize()
        self.cache.close()

    def view(self, part, kind=bridge.BY_SLOT):
        return bridge.torch_view(self.cache.view(self.layer, part, kind))

    def batch(self):
        facts = self.cache.facts
        views = {kind: (self.view(bridge.KEY, kind), self.view(bridge.VALUE, kind))
                 for kind in (bridge.BY_SLOT, bridge.BY_PAGE, bridge.BY_TOKEN)}
        return kernel_calls.Batch(*views[bridge.BY_SLOT], *views[bridge.BY_PAGE],
                                  *(row[0] for row in views[bridge.BY_TOKEN]), facts.stride_tokens,
                                  facts.pages_per_slot, self.lengths)

    def fill(self, past):
        """`past` in all that is mapped, then random keys and values for the live tokens."""
        bridge.fill_mapped(self.cache, past)
        generator = torch.Generator("cuda").manual_seed(1)
        for part in (bridge.KEY, bridge.VALUE):
            view = self.view(part)
            for slot, length in enumerate(self.lengths):
                live = view[slot, :length]
                live.copy_(torch.randn(live.shape, generator=generator, device="cuda"))

    def queries(self):
        new = MODES[self.case.mode][0]
        generator = torch.Generator("cuda").manual_seed(2)
        return [torch.randn(new or length, KV_HEADS * GROUP, self.case.key_dim, generator=generator,
                            device="cuda").bfloat16() for length in self.lengths]


def compare(stage, queries, call):
    """For each slot the relative error against float32; NaN if any number is none."""
    causal = MODES[stage.case.mode][1]
    batch = stage.batch()
    run = kernel_calls.CALLS[call](batch, queries, causal)
    outputs = kernel_calls.split(run(), queries)
    torch.cuda.synchronize()
    errors = []
    for slot, (query, length) in enumerate(zip(queries, stage.lengths)):
        right = kernel_calls.reference(query, batch.keys[slot, :length], batch.values[slot, :length], causal)
        errors.append(torch.linalg.norm(outputs[slot].float() - right) / torch.linalg.norm(right))
    return torch.stack(errors).tolist()


def right(errors):
    return all(error < TOLERANCE for error in errors)


def attempt(stage):
    case = stage.case
    if case.kernel == "control":
        length = max(length for length, past in zip(stage.lengths, stage.past) if past == 0)
        slot = stage.lengths.index(length)
        stage.view(bridge.KEY)[slot, length:length + 1].float().sum().item()
        return {"outcome": "pass"}
    calls = (case.kernel,) if case.quick else VARIANTS.get(case.kernel, (case.kernel,))
    queries = stage.queries()
    stage.fill(NAN)
    errors = [error for call in calls for error in compare(stage, queries, call)]
    answer = {"nan_ignored": right(errors), "slots_with_past": sum(map(bool, stage.past)),
              "exact_ends": stage.past.count(0), "most_past": max(stage.past)}
    if not right([error for error, past in zip(errors, stage.past * len(calls)) if past == 0]):
        return {**answer, "outcome": "wrong", "error": worst(errors)}
    if not right(errors):
        stage.fill(LARGEST)
        errors = [error for call in calls for error in compare(stage, queries, call)]
    outcome = "pass" if right(errors) else "wrong"
    return {**answer, "outcome": outcome, "finite_ignored": right(errors), "error": worst(errors)}


def worst(errors):
    """The largest that is a number, as JSON has no NaN; none if there is none."""
    numbers = [error for error in errors if error == error]
    return max(numbers, default=None)


def run_cases(cases):
    """An answer for each case, in order; nothing after a fault, as the context is gone."""
    torch.zeros(1, device="cuda")
    answers = []
    for case in cases:
        stage = None
        try:
            stage = Stage(case)
            answers.append(attempt(stage))
        except kernel_calls.Missing as error:
            answers.append({"outcome": "missing", "detail": str(error)})
        except kernel_calls.Refused as error:
            answers.append({"outcome": "refused", "detail": str(error)})
        except Exception as error:
            text = str(error)
            if any(word in text for word in FAULTS):
                answers.append({"outcome": "fault", "detail": text.splitlines()[0]})
                return answers
            outcome = "missing" if "Could not find nvcc" in text else "error"
            answers.append({"outcome": outcome, "detail": traceback.format_exc()[-1500:]})
        if stage is not None:
            stage.close()
        torch.cuda.empty_cache()
    return answers


def environment(_task):
    """What the trials ran on; an error where there is no device."""
    torch.zeros(1, device="cuda")
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
             "cudnn": torch.backends.cudnn.version()}
    from importlib import metadata
    for name in ("triton", "fa3-fwd", "flashinfer-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
