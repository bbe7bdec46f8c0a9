"""PyTorch's SDPA over a cache: each request attends over a view of exactly its tokens, and nothing is copied.

python examples/sdpa_torch.py           # on a GPU where there is one, else on the processor
"""

import torch

import vattn
import vattn.torch as vt

LAYERS, KV_HEADS, HEADS, DIM = 4, 2, 8, 64

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = vattn.Geometry(
    [vattn.Layers(LAYERS, kv_heads=KV_HEADS, key_dim=DIM, value_dim=DIM)], dtype="bfloat16"
)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One new query `[head, dim]` over `[token, head, dim]`."""
    return torch.nn.functional.scaled_dot_product_attention(
        query[None, :, None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], enable_gqa=True
    )[0, :, 0]


with vattn.KvCache(model, vt.driver_for(device), budget="256MiB", max_slots=16, max_tokens=32768) as cache:
    requests = {cache.acquire(): tokens for tokens in (100, 1000, 3000)}
    copies = {}
    cache.step(requests)
    for slot, tokens in requests.items():
        for layer in range(LAYERS):
            keys, values = vt.kv(cache, layer)  # [slot, token, head, dim], the same tensors every time
            states = torch.randn(2, tokens, KV_HEADS, DIM, dtype=torch.bfloat16, device=device)
            keys[slot.index, :tokens], values[slot.index, :tokens] = states
            copies[slot, layer] = states

    worst = 0.0
    for slot, layer in copies:
        query = torch.randn(HEADS, DIM, dtype=torch.bfloat16, device=device)
        out = attend(query, *vt.kv_view(cache, slot, layer))
        expected = attend(query.float(), *copies[slot, layer].float())
        worst = max(worst, float((out - expected).norm() / expected.norm()))

    held, tokens = cache.bytes().held, sum(requests.values())
    print(f"{len(requests)} requests of {', '.join(map(str, requests.values()))} tokens on {device}")
    print(
        f"addresses for {cache.layout.slots * cache.layout.max_tokens:,} tokens, memory for {tokens:,}: {held / 2**20:.1f} MiB"
    )
    print(f"attention in {LAYERS} layers against float32: relative error at most {worst:.4f}")
    assert worst < 0.01
    del keys, values  # tensors over a cache are dropped before it is closed
    for slot in requests:
        cache.retire(slot, *vt.fences(device))
