"""FlashInfer's paged decode over contiguous memory: a page table that counts upward, and no copy.

    pip install flashinfer-python && python examples/flashinfer_identity.py        # needs a GPU

Prefill is fastest over contiguous tokens and decode over pages. Here both run over the same memory: page p of
slot s is `s * layout.pages_per_slot + p`, so the table that a paged kernel asks for can be computed.
"""

import sys

import torch

import vattn
import vattn.torch as vt

try:
    import flashinfer
except (ImportError, OSError) as error:
    print(f"SKIP: FlashInfer is not installed: {error}")
    sys.exit()
if not torch.cuda.is_available():
    print("SKIP: there is no GPU")
    sys.exit()

HEADS, KV_HEADS, DIM = 32, 8, 128
device = torch.device("cuda", torch.cuda.current_device())
model = vattn.Geometry.preset("llama-3-8b")

with vattn.KvCache(model, vt.driver_for(device), budget="8GiB", max_slots=64, page_tokens=16) as cache:
    slots = [cache.acquire() for _ in range(4)]
    lengths = [200, 1, 4097, 3000]
    cache.step(slots, lengths)
    for slot in slots:
        for part in vt.kv_view(cache, slot, 31):  # exactly the slot's tokens
            part.copy_(torch.randn(part.shape, dtype=part.dtype, device=device))

    table = vt.identity_page_csr(cache, slots, lengths, device)
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    decode.plan(
        table.indptr, table.indices, table.last_page_len, HEADS, KV_HEADS, DIM, cache.layout.page_tokens,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    queries = torch.randn(len(slots), HEADS, DIM, dtype=torch.bfloat16, device=device)
    out = decode.run(queries, vt.paged_kv(cache, 31))

    worst = 0.0
    for query, slot, seen in zip(queries, slots, out, strict=True):
        k, v = (part.float().repeat_interleave(HEADS // KV_HEADS, 1) for part in vt.kv_view(cache, slot, 31))
        weights = (torch.einsum("hd,thd->ht", query.float(), k) / DIM**0.5).softmax(-1)
        expected = torch.einsum("ht,thd->hd", weights, v)
        worst = max(worst, float((seen - expected).norm() / expected.norm()))

    first = table.indices[: int(table.indptr[1])].tolist()
    print(f"FlashInfer's paged decode over {len(slots)} slots of {lengths} tokens")
    print(
        f"slot {slots[0].index} has pages {first[0]} to {first[-1]}; slot {slots[1].index} begins at {int(table.indices[len(first)])}"
    )
    print(f"against float32: relative error at most {worst:.4f}")
    assert worst < 0.01
    del part  # tensors over a cache are dropped before it is closed
    for slot in slots:
        cache.retire(slot, *vt.fences(device))
