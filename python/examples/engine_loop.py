"""An engine's step loop in forty lines: requests are admitted, grow in one batch, are preempted where memory
is short, and retired. On the host, with a "model" that writes each new token's number; at the end of a
request all of its tokens are checked."""

import random
from collections import deque

import numpy as np

import vattn

random.seed(7)
model = vattn.Geometry([vattn.Layers(2, kv_heads=2, key_dim=64, value_dim=64)], dtype="float32")
queue = deque((number, random.randint(1, 400), random.randint(1, 60)) for number in range(60))
finished = preempted = steps = 0

with vattn.KvCache(model, vattn.HostDriver("1GiB", granule="64KiB"), budget="4MiB", max_slots=16) as cache:
    keys = cache.raw(layer=1, part="key").numpy()  # [slot, token, head, dim]: its addresses never change
    running: dict[vattn.Slot, list[int]] = {}  # number, tokens written, tokens to hold now, tokens at the end
    while queue or running:
        room = cache.layout.slots - len(running)
        for _ in range(cache.admits([prompt for _, prompt, _ in list(queue)[:room]])):
            number, prompt, answer = queue.popleft()
            running[cache.acquire(prompt)] = [number, 0, prompt, prompt + answer]

        wanted = [(slot, request[2]) for slot, request in running.items()]
        for (slot, tokens), fits in zip(wanted, cache.fits(wanted), strict=True):
            if not fits:  # it begins anew once there is memory
                number, _, _, end = running.pop(slot)
                queue.append((number, tokens, end - tokens))
                cache.retire(slot, vattn.IDLE)
                preempted += 1
        cache.step([(slot, request[2]) for slot, request in running.items()])

        for slot, request in list(running.items()):
            number, written, tokens, end = request
            keys[slot.index, written:tokens] = 1000 * number + np.arange(written, tokens)[:, None, None]
            request[1:3] = tokens, tokens + 1
            if tokens == end:
                assert (keys[slot.index, :end, 0, 0] == 1000 * number + np.arange(end)).all()
                cache.retire(slot, vattn.IDLE)  # with a GPU: the stream that the kernels run on
                del running[slot]
                finished += 1
        steps += 1
    del keys
    adopted = cache.stats().adopted
print(
    f"{finished} requests in {steps} steps, {preempted} preempted, {adopted} slots adopted with their memory"
)
