"""What does a cache that grows in place cost a model of transformers, beside transformers' own caches?

A Llama-3-8B with random weights in bf16 answers through `model.generate()` with `disable_compile=True`, over

    vattn       VattnCache
    dynamic     DynamicCache, which copies everything to grow
    static      StaticCache with exactly the room that is needed
    static x4   StaticCache with room for four times the tokens

Asked for each shape, rows x (prompt + new tokens):

1. **Steps.** What is a decode step, at the end of an answer, when most is cached? Caches are filled
   with random states up to the last `--steps` tokens, and `generate` goes on from there. A step is the time from one
   token in the streamer's hands to the next, so with everything that `generate` does, the wait for the token
   included. All caches live side by side and take turns, of half a second, in all orders; after a turn its tokens are
   taken away again. Turns are short since a host's speed may change by a half from one ten seconds to the next. A
   turn's figure is the median of its steps; a ratio is to the fastest of transformers' caches in the same round; of
   the ratios the median is told. A first turn is not counted: cuDNN, which SDPA may choose, makes a plan for every
   length that it has not seen. `static x4`, which would leave no room for the others, comes after them.
2. **Bytes.** A whole answer from a random prompt through VattnCache, and through DynamicCache: the most bytes
   held while decoding against those of the live tokens.
3. **Tokens.** In the second of those answers each token is forced to be the first's, so that every position is
   compared: are the best tokens the same wherever the best two logits are further apart than bf16 can tell? What
   bf16 can tell is measured: DynamicCache answers the first 128 tokens once more through another of SDPA's
   kernels, and twice the largest difference between its best logits is the noise.

It runs on a GPU, `--tiny` on the processor too. Results go to the folder that is named, as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, StaticCache

import vattn
from vattn.transformers import VattnCache

SHAPES = [(8, 2048, 512), (32, 4096, 256), (1, 32768, 512)]
TINY_SHAPES = [(2, 40, 24), (1, 90, 12)]
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 4096,
}
#: The caches that take turns, and the one that comes after them.
KINDS = ("vattn", "dynamic", "static")
LARGE = "static x4"
#: Steps at the beginning of a round that are not counted.
WARM = 2
#: Tokens that are answered once more with another kernel.
CONTROL = 128


class Clock:
    """A streamer that keeps the time at which each token came."""

    def __init__(self, each: Callable[[], None] = lambda: None) -> None:
        self.times: list[float] = []
        self.each = each

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())
        self.each()

    def end(self) -> None:
        pass

    def steps(self) -> list[float]:
        """Milliseconds of each decode step. The first put is the prompt, the second the prefill's token."""
        times = self.times[2 + WARM :]
        return [1e3 * (after - before) for before, after in zip(times, times[1:], strict=False)]


class Best(LogitsProcessor):
    """Keeps the best two logits and tokens of each position, and forces tokens where it was given some."""

    def __init__(self, forced: torch.Tensor | None = None) -> None:
        self.forced = forced
        self.best: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        top = scores.topk(2, dim=-1)
        self.best.append((top.values, top.indices))
        if self.forced is not None:
            scores = torch.full_like(scores, -1e9)
            scores.scatter_(1, self.forced[:, len(self.best) - 1, None], 0.0)
        return scores


def make_model(tiny: bool, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **(TINY if tiny else LLAMA_3_8B), bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_cache(kind: str, model: Any, tokens: int) -> Any:
    if kind == "vattn":
        return VattnCache(model)
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=tokens * (4 if kind == "static x4" else 1))


def token_bytes(model: Any) -> int:
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize)


def settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def held(device: torch.device) -> int:
    """Bytes of the device that are not free, whoever has them."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def fill(cache: Any, model: Any, rows: int, tokens: int) -> None:
    """Random states for every layer, a part of the tokens at a time, as a prompt in parts would bring
    them."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    part = max(1, min(tokens, (1 << 28) // (rows * config.num_key_value_heads * width)))
    for at in range(0, tokens, part):
        shape = (rows, config.num_key_value_heads, min(part, tokens - at), width)
        keys = torch.randn(shape, dtype=model.dtype, device=model.device)
        values = torch.randn(shape, dtype=model.dtype, device=model.device)
        for layer in range(config.num_hidden_layers):
            cache.update(keys, values, layer)


class Contender:
    """A cache that is filled up to the last `steps` tokens of an answer, and has answered them once."""

    def __init__(
        self, kind: str, model: Any, shape: tuple[int, int, int], steps: int, compiled: bool = False
    ) -> None:
        rows, prompt, new = shape
        device, whole = model.device, prompt + new
        settle(device)
        start = held(device)
        self.kind, self.model, self.steps, self.compiled = kind, model, steps, compiled
        self.cache = make_cache(kind, model, whole)
        fill(self.cache, model, rows, whole - steps - 1)
        self.ids = torch.randint(3, model.config.vocab_size, (rows, whole - steps), device=device)
        self.first = self.turn() | {
            "live_bytes": rows * (whole - 1) * token_bytes(model),
            "device_bytes": held(device) - start,
            "cache_bytes": self.cache.bytes_held() if kind == "vattn" else None,
        }

    @torch.inference_mode()
    def turn(self) -> dict[str, Any]:
        """The last tokens, which are taken away again."""
        clock = Clock()
        self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            max_new_tokens=self.steps,
            do_sample=False,
            streamer=clock,
            disable_compile=not self.compiled,
        )
        if isinstance(self.cache, StaticCache):
            for layer in self.cache.layers:
                layer.cumulative_length.sub_(self.steps)
        else:
            self.cache.crop(-self.steps)
        assert int(self.cache.get_seq_length()) == self.ids.shape[1] - 1
        times = clock.steps()
        return {
            "step_ms": statistics.median(times),
            "p90_ms": statistics.quantiles(times, n=10)[-1] if len(times) > 1 else times[0],
            "steps": len(times),
        }

    def close(self) -> None:
        if self.kind == "vattn":
            self.cache.close()
        del self.cache


def time_steps(model: Any, shape: tuple[int, int, int], rounds: int, steps: int) -> dict[str, Any]:
    contenders = {kind: Contender(kind, model, shape, steps) for kind in KINDS}
    first = {kind: contender.first for kind, contender in contenders.items()}
    settle(model.device)
    orders = list(itertools.permutations(KINDS))
    results = []
    for turn in range(rounds):
        results.append({kind: contenders[kind].turn() for kind in orders[turn % len(orders)]})
    for contender in contenders.values():
        contender.close()
    del contender
    large = Contender(LARGE, model, shape, steps)
    first[LARGE], last = large.first, large.turn()
    large.close()
    step_ms = {kind: statistics.median(each[kind]["step_ms"] for each in results) for kind in KINDS}
    ratios = [
        each["vattn"]["step_ms"] / min(each[other]["step_ms"] for other in KINDS[1:]) for each in results
    ]
    return {
        "first": first,
        "rounds": results,
        "large": last,
        "step_ms": step_ms | {LARGE: last["step_ms"]},
        "ratios_to_fastest_of_others": ratios,
        "ratio_to_fastest_of_others": statistics.median(ratios),
    }


@torch.inference_mode()
def whole_answers(model: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    rows, prompt, new = shape
    device = model.device
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (rows, prompt), device=device, generator=generator)
    found: dict[str, Any] = {}
    forced = None
    answers: dict[str, Best] = {}
    for kind in ("dynamic", "vattn", "control"):
        settle(device)
        start, most, ratios = held(device), [0], [0.0]
        cache = make_cache("dynamic" if kind == "control" else kind, model, prompt + new)
        best = Best(forced)

        def look(
            cache: Any = cache, kind: str = kind, most: list[int] = most, ratios: list[float] = ratios
        ) -> None:
            if kind == "vattn" and cache.groups:
                most[0] = max(most[0], cache.bytes_held())
                ratios[0] = max(
                    ratios[0], cache.bytes_held() / (rows * cache.get_seq_length() * token_bytes(model))
                )

        clock = Clock(look)
        with other_kernel(device) if kind == "control" else nullcontext():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=min(new, CONTROL) if kind == "control" else new,
                do_sample=False,
                logits_processor=[best],
                streamer=clock,
                disable_compile=True,
            )
        answers[kind] = best
        if kind == "control":
            break
        live = rows * (prompt + new - 1) * token_bytes(model)
        found[kind] = {
            "live_bytes": live,
            "device_bytes_at_end": held(device) - start,
            "median_step_ms": statistics.median(clock.steps()),
        }
        forced = out[:, prompt:]
        if kind == "vattn":
            stats = cache.groups[0].cache.stats()
            found[kind] |= {
                "peak_cache_bytes": most[0],
                "peak_to_live": most[0] / live,
                "most_of_any_step_to_live": ratios[0],
                "failures": stats.failures,
                "mapped_ahead": stats.mapped_ahead,
            }
            cache.close()
        del cache, out
    control = compare(answers["dynamic"], answers["control"], 0.0)
    noise = 2 * control["largest_difference_of_best_logits"]
    return found | {"tokens": compare(answers["dynamic"], answers["vattn"], noise), "control": control}


def other_kernel(device: torch.device) -> Any:
    """Has SDPA use a kernel that it would not have chosen."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION if device.type == "cuda" else SDPBackend.MATH)


def compare(theirs: Best, ours: Best, noise: float) -> dict[str, Any]:
    """Of the positions that both have: where the best tokens differ, and by how much the best two logits of the
    first were apart there."""
    count = len(ours.best)
    values, tokens = (torch.stack([step[at] for step in theirs.best[:count]]) for at in (0, 1))
    our_values, our_tokens = (torch.stack([step[at] for step in ours.best]) for at in (0, 1))
    margin = (values[..., 0] - values[..., 1]).float()
    differ = tokens[..., 0] != our_tokens[..., 0]
    clear = margin > noise
    return {
        "positions": differ.numel(),
        "noise": noise,
        "clear_positions": int(clear.sum()),
        "differ": int(differ.sum()),
        "differ_where_clear": int((differ & clear).sum()),
        "largest_margin_of_those_that_differ": float(margin[differ].max()) if differ.any() else 0.0,
        "median_margin": float(margin.median()),
        "largest_difference_of_best_logits": float((values[..., 0] - our_values[..., 0]).abs().max()),
    }


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"{report['device']}, PyTorch {report['torch']}, transformers {report['transformers']}, vattn {report['vattn']}; "
        f"Llama-3-8B's shape, random weights, bf16, SDPA, eager; {report['rounds']} interleaved rounds of {report['steps']} tokens.",
        "",
        "| rows x (prompt + new) | vattn | dynamic | static | static x4 | vattn to the fastest other | at lengths never "
        "seen: vattn | dynamic |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in report["shapes"]:
        steps = shape["timing"]["step_ms"]
        cells = " | ".join(f"{steps[kind]:.2f} ms" for kind in (*KINDS, LARGE))
        first = " | ".join(
            f"{shape['timing']['first'][kind]['step_ms']:.2f} ms" for kind in ("vattn", "dynamic")
        )
        ratio = shape["timing"]["ratio_to_fastest_of_others"]
        lines.append(f"| {shape['name']} | {cells} | {ratio:.3f} | {first} |")
    if "compiled" in report:
        lines += ["", f"StaticCache compiled, {report['compiled']['name']}: {report['compiled']['text']}"]
    answered = [shape for shape in report["shapes"] if shape["answers"]]
    if not answered:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "| rows x (prompt + new) | live | vattn held, peak | of the live | the device at the end: vattn | dynamic | static | static x4 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in answered:
        answer, first = shape["answers"]["vattn"], shape["timing"]["first"]
        cells = " | ".join(f"{first[kind]['device_bytes'] / 1e9:.2f} GB" for kind in (*KINDS, LARGE))
        lines.append(
            f"| {shape['name']} | {answer['live_bytes'] / 1e9:.3f} GB | {answer['peak_cache_bytes'] / 1e9:.3f} GB | "
            f"{answer['peak_to_live']:.3f} | {cells} |"
        )
    lines += [
        "",
        "| rows x (prompt + new) | positions | noise | clear of it | best token differs | of those clear | largest "
        "margin where it differs | control: differs | largest margin |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in answered:
        tokens, control = shape["answers"]["tokens"], shape["answers"]["control"]
        lines.append(
            f"| {shape['name']} | {tokens['positions']} | {tokens['noise']:.3f} | {tokens['clear_positions']} | "
            f"{tokens['differ']} | {tokens['differ_where_clear']} | "
            f"{tokens['largest_margin_of_those_that_differ']:.4f} | "
            f"{control['differ']} of {control['positions']} | {control['largest_margin_of_those_that_differ']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder for hf_caches.json and hf_caches.md")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20, help="tokens of a turn")
    parser.add_argument("--shape", action="append", help="rows,prompt,new; several times for several")
    parser.add_argument(
        "--steps-only", action="store_true", help="no whole answers: neither bytes nor tokens"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="at the end, StaticCache compiled, for the first shape"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type != "cuda" and not options.tiny:
        parser.error("there is no GPU: use --tiny")
    shapes = [tuple(map(int, text.split(","))) for text in options.shape or ()]
    shapes = shapes or (TINY_SHAPES if options.tiny else SHAPES)
    steps = min([options.steps, *(new - 2 for _, _, new in shapes)])
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if options.tiny:
        torch.set_num_threads(1)
    model = make_model(options.tiny, device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "processor",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vattn": vattn.__version__,
        "rounds": options.rounds,
        "steps": steps,
        "shapes": [],
    }
    for shape in shapes:
        name = f"{shape[0]} x ({shape[1]:,} + {shape[2]:,})"
        timing = time_steps(model, shape, options.rounds, steps)
        answers = None if options.steps_only else whole_answers(model, shape)
        print(f"{name}: {json.dumps(answers)}  [{time.perf_counter() - began:.0f} s]", flush=True)
        print(
            f"{name}: {timing['step_ms']} {timing['ratio_to_fastest_of_others']}  [{time.perf_counter() - began:.0f} s]",
            flush=True,
        )
        report["shapes"].append({"name": name, "answers": answers, "timing": timing})
        write(options.out, report)
    if options.compiled:
        try:
            compiled = Contender("static", model, shapes[0], steps, compiled=True).turn()
            text = f"{compiled['step_ms']:.2f} ms a step"
        except Exception as error:  # whatever a compiler may fail with
            text = f"does not run: {type(error).__name__}: {str(error).splitlines()[0]}"
        report["compiled"] = {"name": report["shapes"][0]["name"], "text": text}
    report["seconds"] = time.perf_counter() - began
    write(options.out, report)
    print(markdown(report))


def write(folder: Path, report: dict[str, Any]) -> None:
    (folder / "hf_caches.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "hf_caches.md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
