"""Is attention over a cache's memory attention? Unmodified kernels against float32, in every layout.

Batches of random lengths with holes between their slots, over all layers in one tensor, a tensor for each
layer and four layers a tensor, keys and values apart and interleaved. All that a kernel is given comes from
`vattn.torch`: views of exactly a slot's tokens, the whole tensor with indices and lengths, or pages with an
identity table.

    decode    one new query a sequence, which sees all of its tokens
    prefill   as many new queries as a third of the tokens, causal

A kernel that is not installed is skipped, aloud; SDPA runs on the processor, too. Errors go to the folder
that is named, as JSON and Markdown; one above 1 % ends the program with 1.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vattn
import vattn.torch as vt

LAYOUTS: list[Any] = ["sliced", "per_layer", 4]
ORDERS: list[Any] = ["apart", "interleaved"]
LAYERS, KV_HEADS, HEADS, DIM = 8, 8, 32, 128
WORST = 0.01


@dataclass
class Batch:
    """Slots of one cache, their lengths, and a layer of it."""

    cache: vattn.KvCache
    slots: list[vattn.Slot]
    lengths: list[int]
    layer: int


Attend = Callable[[Batch, list[torch.Tensor], bool], list[torch.Tensor]]


class Missing(Exception):
    """The kernel is not installed, or not for this device."""


def heads_first(part: torch.Tensor) -> torch.Tensor:
    return part.transpose(0, 1)[None]


def lower_right(new: int, tokens: int, device: torch.device) -> torch.Tensor:
    """The causal mask in which the last query sees the last key."""
    at = torch.arange(tokens, device=device)
    return at <= at[tokens - new :, None]


def sdpa(batch: Batch, queries: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
    """PyTorch's SDPA over each slot's exact view."""
    outputs = []
    for slot, query in zip(batch.slots, queries, strict=True):
        keys, values = vt.kv_view(batch.cache, slot, batch.layer)
        tokens = batch.lengths[batch.slots.index(slot)]
        keys, values = keys[:tokens], values[:tokens]
        mask = lower_right(query.shape[0], tokens, query.device) if causal else None
        out = torch.nn.functional.scaled_dot_product_attention(
            heads_first(query), heads_first(keys), heads_first(values), attn_mask=mask, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return outputs


def fa3() -> Any:
    try:
        from fa3_fwd_interface import flash_attn_with_kvcache
    except (ImportError, OSError) as error:
        raise Missing(f"fa3-fwd: {error}") from error
    if not torch.cuda.is_available():
        raise Missing("fa3-fwd needs a GPU")
    return flash_attn_with_kvcache


def fa3_view(batch: Batch, queries: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
    """FlashAttention-3 over each slot's exact view."""
    attend, outputs = fa3(), []
    for slot, tokens, query in zip(batch.slots, batch.lengths, queries, strict=True):
        keys, values = vt.kv_view(batch.cache, slot, batch.layer)
        outputs.append(attend(query[None], keys[None, :tokens], values[None, :tokens], causal=causal)[0])
    return outputs


def fa3_batch(batch: Batch, queries: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
    """FlashAttention-3 over the whole tensor, with the slots' indices and lengths: whole tiles are read."""
    attend, (keys, values) = fa3(), vt.kv(batch.cache, batch.layer)
    out = attend(
        torch.stack(queries),
        keys,
        values,
        cache_seqlens=vt.cache_seqlens(batch.lengths, keys.device),
        cache_batch_idx=vt.cache_batch_idx(batch.slots, keys.device),
        causal=False,
    )
    return list(out.unbind(0))


def flashinfer() -> Any:
    try:
        import flashinfer as module
    except ImportError as error:
        raise Missing(f"flashinfer-python: {error}") from error
    if not torch.cuda.is_available():
        raise Missing("flashinfer-python needs a GPU")
    return module


_workspace: list[torch.Tensor] = []


def workspace() -> torch.Tensor:
    if not _workspace:
        _workspace.append(torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"))
    return _workspace[0]


def flashinfer_decode(batch: Batch, queries: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
    """FlashInfer's paged decode over the identity table."""
    wrapper = flashinfer().BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", use_tensor_cores=True)
    flat = torch.cat(queries)
    table = vt.identity_page_csr(batch.cache, batch.slots, batch.lengths, flat.device)
    wrapper.plan(
        table.indptr, table.indices, table.last_page_len, HEADS, KV_HEADS, DIM, batch.cache.layout.page_tokens,
        q_data_type=flat.dtype, kv_data_type=flat.dtype,
    )  # fmt: skip
    return list(
        wrapper.run(flat, vt.paged_kv(batch.cache, batch.layer)).split([query.shape[0] for query in queries])
    )


def flashinfer_prefill(backend: str) -> Attend:
    def attend(batch: Batch, queries: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
        wrapper = flashinfer().BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend=backend)
        flat, counts = torch.cat(queries), [query.shape[0] for query in queries]
        table = vt.identity_page_csr(batch.cache, batch.slots, batch.lengths, flat.device)
        wrapper.plan(
            vt.cu_seqlens(counts, flat.device), table.indptr, table.indices, table.last_page_len, HEADS, KV_HEADS, DIM,
            batch.cache.layout.page_tokens, causal=causal, q_data_type=flat.dtype, kv_data_type=flat.dtype,
        )  # fmt: skip
        return list(wrapper.run(flat, vt.paged_kv(batch.cache, batch.layer)).split(counts))

    return attend


KERNELS: dict[str, Attend] = {
    "SDPA, exact views": sdpa,
    "FlashAttention-3, exact views": fa3_view,
    "FlashAttention-3, batch": fa3_batch,
    "FlashInfer decode": flashinfer_decode,
    "FlashInfer prefill, FA2": flashinfer_prefill("fa2"),
    "FlashInfer prefill, FA3": flashinfer_prefill("fa3"),
}

#: Kernels whose queries are of one length.
DECODE_ALONE = {"FlashAttention-3, batch", "FlashInfer decode"}


def reference(batch: Batch, place: int, query: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention in float32."""
    tokens = batch.lengths[place]
    keys, values = (
        part[:tokens].float().repeat_interleave(HEADS // KV_HEADS, 1)
        for part in vt.kv_view(batch.cache, batch.slots[place], batch.layer)
    )
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) / math.sqrt(DIM)
    if causal:
        scores.masked_fill_(~lower_right(query.shape[0], tokens, query.device), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def make_batch(cache: vattn.KvCache, chance: random.Random, longest: int) -> Batch:
    """Slots with holes between them and random tokens; all that is backed beyond a length is zero."""
    slots = [cache.acquire() for _ in range(16)]
    for slot in chance.sample(slots, 6):
        slots.remove(slot)
        cache.retire(slot, vattn.IDLE)
    chance.shuffle(slots)
    lengths = [chance.choice([1, 15, 16, 17, chance.randint(2, longest), longest]) for _ in slots]
    cache.step(slots, lengths)
    tile, most = cache.layout.tile_tokens, cache.layout.max_tokens
    batch = Batch(cache, slots, lengths, chance.randrange(LAYERS))
    for slot, length in zip(slots, lengths, strict=True):
        for part in vt.kv(cache, batch.layer):
            row = part[slot.index, : min(-(-length // tile) * tile, most)]
            row.zero_()
            row[:length] = torch.randn(row[:length].shape, dtype=row.dtype, device=row.device)
    return batch


def errors_of(attend: Attend, batch: Batch, causal: bool) -> tuple[float, float]:
    device = vt.kv(batch.cache, batch.layer)[0].device
    counts = [max(1, length // 3) if causal else 1 for length in batch.lengths]
    queries = [torch.randn(count, HEADS, DIM, dtype=torch.bfloat16, device=device) for count in counts]
    outputs = attend(batch, queries, causal)
    expected = [reference(batch, place, query, causal) for place, query in enumerate(queries)]
    apart, whole = torch.cat([out.float() for out in outputs]) - torch.cat(expected), torch.cat(expected)
    return float(apart.norm() / whole.norm()), float(apart.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder for attention_errors.json and attention_errors.md")
    parser.add_argument("--batches", type=int, default=4, help="batches of each layout")
    parser.add_argument(
        "--longest", type=int, help="tokens of the longest sequence; 2,000, or 200 on the processor"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = options.longest or (2000 if device.type == "cuda" else 200)
    model = vattn.Geometry(
        [vattn.Layers(LAYERS, kv_heads=KV_HEADS, key_dim=DIM, value_dim=DIM)], dtype="bfloat16"
    )
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    skipped: set[str] = set()
    torch.manual_seed(0)
    for layout in LAYOUTS:
        for order in ORDERS:
            name = f"{layout if isinstance(layout, str) else f'{layout} layers a tensor'}, {order}"
            chance = random.Random(name)
            with vattn.KvCache(
                model, vt.driver_for(device), budget="8GiB", max_tokens=4096, max_slots=32, layout=layout,
                kv_order=order, tile_tokens=model.tile_tokens("fa3-decode"),
            ) as cache:  # fmt: skip
                for _ in range(options.batches):
                    batch = make_batch(cache, chance, longest)
                    for kernel, attend in KERNELS.items():
                        for causal in (False, True):
                            work = "prefill" if causal else "decode"
                            if kernel in skipped or (causal and kernel in DECODE_ALONE):
                                continue
                            try:
                                relative, most = errors_of(attend, batch, causal)
                            except Missing as error:
                                skipped.add(kernel)
                                print(f"SKIP: {kernel}: {error}", file=sys.stderr)
                                continue
                            row = rows.setdefault(
                                (f"{kernel}, {work}", name), {"relative": 0.0, "largest": 0.0, "batches": 0}
                            )
                            row["relative"] = max(row["relative"], relative)
                            row["largest"] = max(row["largest"], most)
                            row["batches"] += 1
                    for slot in batch.slots:
                        cache.retire(slot, *vt.fences(device))
    return write(options.out, rows, device)


def write(folder: Path, rows: dict[tuple[str, str], dict[str, Any]], device: torch.device) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"kernel": kernel, "layout": layout, **row} for (kernel, layout), row in rows.items()]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    report = {"device": where, "torch": torch.__version__, "vattn": vattn.__version__, "errors": records}
    (folder / "attention_errors.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    layouts = list(dict.fromkeys(layout for _, layout in rows))
    lines = [
        f"{where}, PyTorch {torch.__version__}; the largest relative error of a batch against float32.",
        "",
        f"| kernel | {' | '.join(layouts)} |",
        f"|---|{'---|' * len(layouts)}",
    ]
    for kernel in dict.fromkeys(kernel for kernel, _ in rows):
        lines.append(
            f"| {kernel} | {' | '.join(format(rows[kernel, layout]['relative'], '.4f') for layout in layouts)} |"
        )
    text = "\n".join(lines) + "\n"
    (folder / "attention_errors.md").write_text(text, encoding="utf-8")
    print(text)
    worst = max((row["relative"] for row in rows.values()), default=math.inf)
    print(f"{len(records)} kernels and layouts, worst relative error {worst:.4f}")
    return int(not worst < WORST)


if __name__ == "__main__":
    sys.exit(main())
