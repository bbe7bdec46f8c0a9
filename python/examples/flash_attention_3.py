"""FlashAttention-3 over a whole batch: the kernel takes the cache's tensors, the slots' indices and their
lengths.

    pip install fa3-fwd && python examples/flash_attention_3.py        # needs an H100 or H200

It loads whole tiles of tokens, past a sequence's length. So the cache is told its tile, and backs that far.
"""

import sys

import torch

import vattn
import vattn.torch as vt

try:
    from fa3_fwd_interface import flash_attn_with_kvcache
except (ImportError, OSError) as error:
    print(f"SKIP: FlashAttention-3 is not installed: {error}")
    sys.exit()
if not torch.cuda.is_available():
    print("SKIP: there is no GPU")
    sys.exit()

HEADS = 32
device = torch.device("cuda", torch.cuda.current_device())
model = vattn.Geometry.preset("llama-3-8b")
tile = model.tile_tokens("fa3-decode")

with vattn.KvCache(model, vt.driver_for(device), budget="8GiB", max_slots=64, tile_tokens=tile) as cache:
    slots = [cache.acquire() for _ in range(6)]
    cache.retire(slots.pop(2), vattn.IDLE)  # a hole in the batch
    lengths = [200, 1, 4097, 176, 3000]
    cache.step(slots, lengths)

    keys, values = vt.kv(cache, 31)  # [slot, token, head, dim]
    for slot, length in zip(slots, lengths, strict=True):
        for part in (keys, values):
            row = part[slot.index, : -(-length // tile) * tile]
            row.zero_()  # what the tile has beyond the length must be a number
            row[:length] = torch.randn_like(row[:length])

    queries = torch.randn(len(slots), 1, HEADS, 128, dtype=torch.bfloat16, device=device)
    out = flash_attn_with_kvcache(
        queries,
        keys,
        values,
        cache_seqlens=vt.cache_seqlens(lengths, device),
        cache_batch_idx=vt.cache_batch_idx(slots, device),
    )

    worst = 0.0
    for query, slot, length, seen in zip(queries[:, 0], slots, lengths, out[:, 0], strict=True):
        k, v = (part[slot.index, :length].float().repeat_interleave(4, 1) for part in (keys, values))
        weights = (torch.einsum("hd,thd->ht", query.float(), k) / 128**0.5).softmax(-1)
        expected = torch.einsum("ht,thd->hd", weights, v)
        worst = max(worst, float((seen - expected).norm() / expected.norm()))

    print(
        f"FlashAttention-3 over {len(slots)} slots of {lengths} tokens, indices {[slot.index for slot in slots]}"
    )
    print(
        f"tile of {tile} tokens; {cache.bytes().held / 2**20:.0f} MiB are held, {cache.layout.virtual_size / 2**40:.1f} TiB reserved"
    )
    print(f"against float32: relative error at most {worst:.4f}")
    assert worst < 0.01
    del keys, values, part, row  # tensors over a cache are dropped before it is closed
    for slot in slots:
        cache.retire(slot, *vt.fences(device))
