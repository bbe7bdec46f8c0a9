"""What does creating memory cost on a card that is full, or whose free memory is scattered?

Asked because it decides whether smaller extents should be given up for a larger one while a request waits. Calls
the driver by ctypes and nothing else; needs PyTorch for the context alone. Takes most of the card for some
seconds.

    python3 creating.py
"""

import ctypes
import random
import time

import torch

MIB = 1 << 20
SIZES = (2, 8, 32, 64, 128, 512)
CUDA = ctypes.CDLL("libcuda.so.1")


class Prop(ctypes.Structure):
    """CUmemAllocationProp: pinned memory of device 0."""

    _fields_ = [("kind", ctypes.c_uint), ("handle_types", ctypes.c_uint), ("location", ctypes.c_uint),
                ("device", ctypes.c_uint), ("win32", ctypes.c_void_p), ("flags", ctypes.c_ubyte * 8)]


PROP = Prop(1, 0, 1, 0, None, (ctypes.c_ubyte * 8)())


def create(mib):
    """A handle, or none where there is no memory, and the microseconds that it took."""
    handle = ctypes.c_uint64()
    start = time.perf_counter()
    result = CUDA.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(mib * MIB), ctypes.byref(PROP), ctypes.c_uint64(0))
    microseconds = (time.perf_counter() - start) * 1e6
    return (handle.value if result == 0 else None), microseconds


def release(handle):
    start = time.perf_counter()
    result = CUDA.cuMemRelease(ctypes.c_uint64(handle))
    if result != 0:
        raise RuntimeError(f"cuMemRelease answers {result}")
    return (time.perf_counter() - start) * 1e6


def free():
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    CUDA.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return free.value


def spread(values):
    values = sorted(values)
    return f"median {values[len(values) // 2]:.0f}, from {values[0]:.0f} to {values[-1]:.0f}"


def by_size(label, count):
    """Creates `count` handles of each size, one after another, and releases them."""
    for mib in SIZES:
        made = [pair for pair in (create(mib) for _ in range(count)) if pair[0] is not None]
        released = [release(handle) for handle, _ in made]
        if made:
            print(f"{label}: {len(made)} of {mib} MiB: create {spread([us for _, us in made])}; "
                  f"release {spread(released)}", flush=True)
        time.sleep(0.05 + 0.005 * len(made) * mib / 1024)


def merged(label, handles):
    """Releases some handles of 2 MiB anywhere and creates one that is as large as they were together."""
    for count in (2, 4, 16, 64, 256):
        created, released = [], []
        for _ in range(12):
            released.append(sum(release(handles.pop()) for _ in range(count)))
            handle, microseconds = create(2 * count)
            if handle is None:
                print(f"{label}: {count} into one is refused")
                return
            created.append(microseconds)
            handles.insert(0, handle)
        print(f"{label}: {count} of 2 MiB into one: release them all {spread(released)}; create {spread(created)}",
              flush=True)


def main():
    torch.zeros(1, device="cuda")
    print(f"{torch.cuda.get_device_name()}, {free() / 2**30:.1f} GiB free; microseconds")
    by_size("an empty card", 20)
    handle, _ = create(64)
    for pause in (0, 2, 20, 100):
        taken = []
        for _ in range(15):
            release(handle)
            time.sleep(pause / 1000)
            handle, microseconds = create(64)
            taken.append(microseconds)
        print(f"an empty card: 64 MiB created {pause} ms after it was released: {spread(taken)}", flush=True)
    release(handle)

    handles = []
    while free() > 2 << 30:
        handles += [create(2)[0] for _ in range(256)]
    random.Random(1).shuffle(handles)
    merged(f"full of 2 MiB but for {free() / 2**30:.1f} GiB", handles)
    rest = []
    while (handle := create(2)[0]) is not None:
        rest.append(handle)
    merged("full to the brim", handles)

    for handle in handles[::2]:
        release(handle)
    time.sleep(1)
    by_size(f"scattered, {free() / 2**30:.1f} GiB free", 12)
    while free() > 7 << 30:
        rest.append(create(64)[0])
    by_size(f"scattered, {free() / 2**30:.1f} GiB free", 6)


if __name__ == "__main__":
    main()
