"""Ten lines with NumPy, on any Linux machine: a request's keys are written, read, and its memory given
back."""

import vattn

model = vattn.Geometry([vattn.Layers(4, kv_heads=8, key_dim=64, value_dim=64)], dtype="float32")
with vattn.KvCache(model, vattn.HostDriver("1GiB"), max_slots=64, max_tokens=131072) as cache:
    slot = cache.acquire(1000)
    cache.step([(slot, 1000)])  # 1,000 tokens are backed, in every layer
    keys = cache.view(slot, layer=0, part="key").numpy()  # [token, head, dim]
    keys[:] = 1.5
    print(f"{keys.shape} of {keys.dtype}, sum {keys.sum():.0f}")
    print(f"addresses {cache.layout.virtual_size >> 30} GiB, memory {cache.bytes().held >> 20} MiB")
    del keys  # an array keeps the memory that it shows
    cache.retire(slot, vattn.IDLE)
    cache.trim(0, vattn.IDLE)
    cache.flush()
    print(f"given back, {cache.bytes().held} bytes are left")
