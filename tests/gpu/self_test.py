"""Does the bridge say where things are, and are exactly those bytes mapped? On the host, with NumPy.

Every address that it gives is computed again from the shape alone, memory is written through one view and
read through another, and a byte past the end is touched by a child that must not survive it.
"""

import os
import signal
import sys

import numpy

import attention_busy
import vattn_bridge as bridge

LAYOUTS = ("per-layer", "sliced", "sliced-interleaved", "grouped:2")
GRANULE = 64 << 10
LAYERS, HEADS, DIM, MOST = 4, 2, 64, 1024
NAN = 0xFFFF


def cache(layout, tile=1, slots=4, mapper=False):
    return bridge.Cache("host", layers=LAYERS, kv_heads=HEADS, key_dim=DIM, slots=slots, max_tokens=MOST,
                        layout=layout, tile_tokens=tile, mapper=mapper, granule=GRANULE, capacity=256 << 20)


def array(view, *selection):
    """The part of a view that is selected; only that much of it is an array."""
    addr, shape = view.addr, list(view.shape)
    for axis, (first, count) in enumerate(selection):
        addr += 2 * first * view.strides[axis]
        shape[axis] = count
    return bridge.numpy_array(addr, shape, view.strides)


def granule_tokens(layout):
    row = HEADS * DIM * 2 * {"per-layer": 1, "sliced": LAYERS, "sliced-interleaved": 2 * LAYERS, "grouped:2": 2}[layout]
    return GRANULE // row


def fill(held, past):
    for addr, size in held.mapped():
        bridge.numpy_array(addr, (size // 2,), (1,))[:] = past


def dies(addr):
    """Whether a child that reads a byte there is killed by a fault."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        bridge.numpy_array(addr, (1,), (1,)).sum()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)


def addresses_follow_from_shapes(layout):
    held = cache(layout)
    stride, per_slot = held.facts.stride_tokens, held.facts.pages_per_slot
    for layer in range(LAYERS):
        for part in (bridge.KEY, bridge.VALUE):
            slots, pages, row = (held.view(layer, part, kind) for kind in (0, 1, 2))
            assert slots.shape == (4, MOST, HEADS, DIM) and slots.strides[2:] == (DIM, 1)
            assert slots.strides[0] == stride * slots.strides[1]
            assert pages.shape == (4 * per_slot, 16, HEADS, DIM) and row.shape == (1, 4 * stride, HEADS, DIM)
            [tensor] = [tensor for tensor in held.tensors if tensor.addr <= slots.addr < tensor.addr + tensor.size]
            assert tensor.row == 2 * slots.strides[1] and tensor.slot_stride == 2 * slots.strides[0]
            for slot, token in ((0, 0), (1, 17), (3, MOST - 1)):
                at = slots.address(slot, token, 1, 5)
                page = held.pages(slot, token + 1)[token // 16]
                assert at == tensor.addr + slot * tensor.slot_stride + slots.addr - tensor.addr + (
                    token * tensor.row + 2 * (DIM + 5))
                assert at == pages.address(page, token % 16, 1, 5) == row.address(0, slot * stride + token, 1, 5)
    held.close()


def every_view_shows_the_same_memory(layout):
    held = cache(layout)
    held.step_exactly(dict.fromkeys(held.acquire_all(), 100))
    for layer in range(LAYERS):
        slots, pages = (held.view(layer, bridge.VALUE, kind) for kind in (0, 1))
        numbers = numpy.arange(100 * HEADS * DIM, dtype="<u2").reshape(100, HEADS, DIM)
        array(slots, (2, 1), (0, 100))[0] = numbers
        table = held.pages(2, 100)
        assert (array(pages, (table[0], 6)).reshape(-1, HEADS, DIM) == numbers[:96]).all()
        assert (array(pages, (table[6], 1), (0, 4))[0] == numbers[96:]).all()
    held.close()


def exactly_the_granules_of_the_tokens_are_mapped(layout):
    unit = granule_tokens(layout)
    for tile in (1, 48):
        held = cache(layout, tile)
        wanted = dict(zip(held.acquire_all(), (2 * unit, unit + 1, 1, MOST)))
        held.step_exactly(wanted)
        for slot, tokens in wanted.items():
            backed = min(MOST, -(-tokens // tile) * tile)
            for number, tensor in enumerate(held.tensors):
                size = held.backed_bytes(slot, number)
                assert size == -(-backed * tensor.row // GRANULE) * GRANULE, (slot, size)
                first = tensor.addr + slot * tensor.slot_stride
                assert not dies(first + size - 2)
                if first + size < tensor.addr + tensor.size and size < tensor.slot_stride:
                    assert dies(first + size), (layout, tile, slot, number)
            past = held.past_tokens(slot, tokens)
            assert (past == 0) == (tile == 1 and tokens % unit == 0 or tokens == MOST), (slot, past)
        held.close()


def what_lies_past_the_length_is_nan(layout):
    held = cache(layout)
    unit = granule_tokens(layout)
    wanted = dict(zip(held.acquire_all(), (unit, unit + 3, 5, 2 * unit - 1)))
    held.step_exactly(wanted)
    fill(held, NAN)
    view = held.view(LAYERS - 1, bridge.KEY)
    for slot, tokens in wanted.items():
        array(view, (slot, 1), (0, tokens))[:] = 1
    for slot, tokens in wanted.items():
        whole = array(view, (slot, 1), (0, tokens + held.past_tokens(slot, tokens)))[0]
        assert (whole[:tokens] == 1).all() and (whole[tokens:] == NAN).all()
    held.close()


def memory_that_nobody_needs_is_noticed(layout):
    held = cache(layout)
    slot = held.acquire()
    held.step({slot: MOST // 2})
    held.retire(slot)
    # The same slot again, with what the first request left in it.
    again = held.acquire(1)
    held.step({again: 1})
    try:
        held.backed_bytes(again, 0)
    except bridge.BridgeError as error:
        assert "set the budget" in str(error)
    else:
        raise AssertionError("parked memory was not told")
    held.close()


def errors_are_told(layout):
    held = cache(layout)
    for wrong in (lambda: held.step({3: 1}), lambda: held.view(LAYERS, 0), lambda: held.view(0, 2),
                  lambda: held.step({held.acquire(): MOST + 1}), lambda: cache("slices")):
        try:
            wrong()
        except bridge.BridgeError as error:
            assert str(error), wrong
        else:
            raise AssertionError("it was not refused")
    held.close()


def what_was_asked_for_is_mapped_before_its_step(layout):
    held = cache(layout, mapper=True)
    slot = held.acquire()
    held.prefetch({slot: 300})
    held.flush()
    mapped = held.snapshot()["background"]["map"]["calls"]
    held.step({slot: 300})
    counted = held.snapshot()
    assert mapped > 0 and counted["driver"]["map"]["calls"] == counted["background"]["map"]["calls"]
    held.retire(slot)
    held.reclaim()
    held.flush()
    bytes = held.snapshot()["bytes"]
    assert bytes["mapped"] == bytes["parked"] == 0 < bytes["free"]
    held.trim()
    held.flush()
    assert held.snapshot()["bytes"]["held"] == 0
    held.close()


def a_busy_mapper_maps_and_unmaps(layout):
    mapping = attention_busy.Mapping("host", layout != LAYOUTS[0], layers=2, tokens=128, granule=GRANULE,
                                     capacity=64 << 20)
    for _ in range(2):
        with mapping.busy():
            pass
    each = 2 * mapping.calls["map"]
    assert mapping.calls["map"] == mapping.calls["unmap"] >= 4 * 8 * 2 and 0 < mapping.share < 1
    assert (2 * mapping.calls["create"] == each) == mapping.creates, mapping.calls
    mapping.close()


def main():
    tests = (addresses_follow_from_shapes, every_view_shows_the_same_memory,
             exactly_the_granules_of_the_tokens_are_mapped, what_lies_past_the_length_is_nan,
             memory_that_nobody_needs_is_noticed, errors_are_told, what_was_asked_for_is_mapped_before_its_step,
             a_busy_mapper_maps_and_unmaps)
    for test in tests:
        for layout in LAYOUTS:
            test(layout)
        print(f"ok {test.__name__}", flush=True)
    print(f"{len(tests)} tests in {len(LAYOUTS)} layouts passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
