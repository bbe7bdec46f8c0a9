"""Are PyTorch's tensors over a cache where they should be, and virtual tensors backed where they were
committed?

Skipped, aloud, where PyTorch is missing.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest

import vattn

torch = pytest.importorskip("torch", reason="SKIP: PyTorch is not installed")

import vattn.torch as vt  # noqa: E402

torch.set_num_threads(1)

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
LAYOUTS = [
    ("sliced", "apart"),
    ("sliced", "interleaved"),
    ("per_layer", "apart"),
    (2, "apart"),
    (2, "interleaved"),
]


def open_cache(driver: vattn.Driver, dtype: str = "float32", **options: Any) -> vattn.KvCache:
    model = vattn.Geometry([vattn.Layers(3, kv_heads=2, key_dim=32, value_dim=16)], dtype=dtype)
    return vattn.KvCache(model, driver, **{"budget": "16MiB", "max_slots": 8, "max_tokens": 4096, **options})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "order"), LAYOUTS)
def test_a_slot_is_what_was_written_there(driver: vattn.Driver, dtype: str, layout: Any, order: Any) -> None:
    with open_cache(driver, dtype, layout=layout, kv_order=order) as cache:
        slots = [cache.acquire() for _ in range(3)]
        cache.step([(slot, 40 * (slot.index + 1)) for slot in slots])
        for layer in range(3):
            keys, values = vt.kv(cache, layer)
            assert keys.dtype == getattr(torch, dtype)
            assert (keys.shape, values.shape) == ((8, 4096, 2, 32), (8, 4096, 2, 16))
            for slot in slots:
                keys[slot.index, : 40 * (slot.index + 1)] = float(layer + 1)
                values[slot.index, : 40 * (slot.index + 1)] = float(slot.index + 4)
        for layer in range(3):
            for slot in slots:
                keys, values = vt.kv_view(cache, slot, layer)
                assert keys.shape == (40 * (slot.index + 1), 2, 32)
                assert (keys.float() == layer + 1).all()
                assert (values.float() == slot.index + 4).all()
        assert vt.kv(cache, 1)[0] is vt.kv(cache, 1)[0]
        del keys, values


def test_pages_of_the_identity_table_are_the_slots_tokens(driver: vattn.Driver) -> None:
    with open_cache(driver, page_tokens=16) as cache:
        slots = [cache.acquire() for _ in range(4)]
        cache.retire(slots.pop(1), vattn.IDLE)
        lengths = [33, 16, 1]
        cache.step(slots, lengths)
        for slot, length in zip(slots, lengths, strict=True):
            keys, _ = vt.kv(cache, 2)
            keys[slot.index, :length] = (
                torch.arange(length, dtype=torch.float32)[:, None, None] + 100 * slot.index
            )
        pages, _ = vt.paged_kv(cache, 2)
        table = vt.identity_page_table(cache, slots, lengths)
        assert table.dtype == torch.int32
        assert table.shape == (3, 3)
        csr = vt.identity_page_csr(cache, slots, lengths)
        assert csr.indptr.tolist() == [0, 3, 4, 5]
        assert csr.last_page_len.tolist() == [1, 16, 1]
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            used = table[row, : -(-length // 16)]
            assert torch.equal(used, csr.indices[csr.indptr[row] : csr.indptr[row + 1]])
            # Only backed tokens may be touched: page by page, up to the length.
            seen = torch.cat([pages[page][: length - 16 * at] for at, page in enumerate(used.tolist())])
            assert torch.equal(seen[:, 0, 0], torch.arange(length, dtype=torch.float32) + 100 * slot.index)
        whole = vt.identity_page_table(cache, slots)
        assert whole.shape == (3, cache.layout.pages_per_slot)
        assert int(whole[2, -1]) == (slots[2].index + 1) * cache.layout.pages_per_slot - 1
        empty = vt.identity_page_csr(cache, slots, [0, 0, 5])
        assert empty.indptr.tolist() == [0, 0, 0, 1]
        assert empty.last_page_len.tolist() == [0, 0, 5]
        del keys, pages, _


def test_tables_refuse_what_would_be_another_slots_pages(driver: vattn.Driver) -> None:
    with open_cache(driver, page_tokens=16) as cache:
        slots = [cache.acquire() for _ in range(2)]
        most = cache.layout.max_tokens
        for table in (vt.identity_page_table, vt.identity_page_csr):
            with pytest.raises(ValueError, match=f"a length is {most + 1}, and a slot holds {most}"):
                table(cache, slots, [1, most + 1])
            with pytest.raises(ValueError, match="give one length a slot"):
                table(cache, slots[:1], [5, 6])
            with pytest.raises(TypeError, match="slots has 0; give slots"):
                table(cache, [0, 1], [5, 6])
            with pytest.raises(TypeError, match="float"):
                table(cache, slots, [1.5, 2])
    tiny = vattn.Geometry([vattn.Layers(1, 1, 8, 8)], dtype="int8")
    with vattn.KvCache(tiny, vattn.LedgerDriver("1GiB"), max_slots=1 << 20) as cache:
        with pytest.raises(ValueError, match="int32 counts to .* larger page_tokens than 16"):
            vt.identity_page_table(cache, [cache.acquire()])


def test_a_driver_that_was_closed_is_made_anew() -> None:
    with vt.driver_for(torch.device("cpu")):
        pass
    assert vt.committed(vt.empty_virtual(5)) == 0


def test_a_child_of_fork_may_drop_its_parents_tensors(capfd: pytest.CaptureFixture[str]) -> None:
    virtual = vt.empty_virtual((100, 10))
    vt.commit(virtual, 0, 5)
    child = os.fork()
    if child == 0:
        del virtual
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert capfd.readouterr().err == ""
    assert vt.committed(virtual) == 200


def test_lengths_and_indices_are_int32(driver: vattn.Driver) -> None:
    with open_cache(driver) as cache:
        slots = [cache.acquire() for _ in range(3)]
        assert vt.cache_batch_idx(slots[::-1]).tolist() == [2, 1, 0]
        assert vt.cache_seqlens([3, 4]).dtype == torch.int32
        assert vt.cu_seqlens(torch.tensor([3, 0, 4])).tolist() == [0, 3, 3, 7]
        assert vt.cu_seqlens([]).tolist() == [0]
        assert vt.cu_seqlens([1]).dtype == torch.int32


def test_sdpa_over_exact_views_is_attention(driver: vattn.Driver) -> None:
    torch.manual_seed(0)
    model = vattn.Geometry([vattn.Layers(3, kv_heads=2, key_dim=32, value_dim=32)], dtype="float32")
    with vattn.KvCache(model, driver, budget="16MiB", max_slots=8, max_tokens=4096) as cache:
        slot = cache.acquire()
        cache.step([(slot, 77)])
        keys, values = vt.kv_view(cache, slot, 1)
        query = torch.randn(1, 4, 1, 32)
        keys.copy_(torch.randn(77, 2, 32))
        values.copy_(torch.randn(77, 2, 32))
        seen = [part.transpose(0, 1)[None] for part in (keys, values)]
        out = torch.nn.functional.scaled_dot_product_attention(query, *seen, enable_gqa=True)
        weights = (query[0, :, 0] / 32**0.5)[:, None] @ keys.transpose(0, 1).repeat_interleave(2, 0).mT
        expected = weights.softmax(-1) @ values.transpose(0, 1).repeat_interleave(2, 0)
        torch.testing.assert_close(out[0], expected)
        del keys, values, seen


def test_tensors_may_be_written_in_and_out_of_inference_mode(driver: vattn.Driver) -> None:
    with open_cache(driver) as cache:
        slot = cache.acquire()
        cache.step([(slot, 4)])
        with torch.inference_mode():
            vt.kv(cache, 0)[0][slot.index, :4] = 1.0
        vt.kv(cache, 0)[0][slot.index, :4] += 1.0
        assert vt.kv_view(cache, slot, 0)[0].sum() == 2 * 4 * 2 * 32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_virtual_tensor_has_memory_where_it_was_committed(dtype: str) -> None:
    virtual = vt.empty_virtual((1 << 24, 1000), getattr(torch, dtype))
    row = 1000 * virtual.element_size()
    assert vt.committed(virtual) == 0
    vt.commit(virtual, 1000, 1100)
    vt.commit(virtual[5:10], 1, 2)
    assert vt.committed(virtual) == 101 * row
    virtual[1000:1100] = 1.0
    virtual[6] = 2.0
    vt.commit(virtual, 900, 1050)
    assert (virtual[1000:1100].float() == 1).all()
    vt.decommit(virtual, 900, 1050)
    assert vt.committed(virtual) == 51 * row
    assert (virtual[1050:1100].float() == 1).all()
    assert (virtual[6].float() == 2).all()
    vt.commit(virtual, 3, 3)


def test_memory_goes_with_the_last_view() -> None:
    before = len(vt._virtual)
    virtual = vt.empty_virtual((100, 1000))
    buffer = vt._buffer(virtual)
    vt.commit(virtual, 0, 100)
    part = virtual[50:60].fill_(3)
    del virtual
    gc.collect()
    assert part.sum() == 30_000
    vt.decommit(part, 0, 5, vattn.IDLE)
    assert vt.committed(part) == 95 * 4000
    del part
    gc.collect()
    assert buffer.closed
    assert len(vt._virtual) == before


def test_a_virtual_tensor_refuses_what_it_can_not_do() -> None:
    virtual = vt.empty_virtual((10, 4, 4))
    for wrong, text in (
        (lambda: vt.commit(torch.ones(3), 0, 1), "memory of PyTorch's own"),
        (lambda: vt.commit(virtual, 0, 11), "rows 0 to 11 are not within the tensor's 10"),
        (lambda: vt.commit(virtual, -1, 2), "rows -1 to 2"),
        (lambda: vt.commit(virtual.transpose(0, 1), 0, 1), "is no range of rows"),
        (lambda: vt.empty_virtual(()), "needs a dimension"),
        (lambda: vt.empty_virtual((3, 0)), "each of 1 or more"),
    ):
        with pytest.raises(ValueError, match=text):
            wrong()
    for shape in ((2.5,), "3", 1.5):
        with pytest.raises(TypeError):
            vt.empty_virtual(shape)
    column = vt.empty_virtual((100, 1))
    vt.commit(column.T, 0, 1)
    assert vt.committed(column) == 400
    with pytest.raises(TypeError, match="it can be torch.float32"):
        vt.empty_virtual((3,), torch.complex64)
    with pytest.raises(TypeError, match="is no tensor"):
        vt.commit("rows", 0, 1)
    with pytest.raises(TypeError, match="memory of cuda and cpu"):
        vt.empty_virtual((3,), device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device is cuda, and .* install"):
            vt.empty_virtual((3,), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SKIP: there is no GPU")
def test_on_a_gpu_it_is_the_same() -> None:
    virtual = vt.empty_virtual((1 << 20, 1 << 16), torch.bfloat16, "cuda")
    vt.commit(virtual, 100, 200)
    virtual[100:200] = 1.0
    vt.decommit(virtual, 100, 150)
    assert vt.committed(virtual) == 50 << 17
    assert virtual[150:200].sum(dtype=torch.float32) == 50 << 16
    del virtual
    with open_cache(vt.driver_for(torch.device("cuda", 0)), "bfloat16", budget="1GiB") as cache:
        slots = [cache.acquire() for _ in range(3)]
        cache.step(slots, [100, 17, 4096])
        for slot in slots:
            for part in vt.kv_view(cache, slot, 2):
                part.fill_(slot.index + 1)
        seen = vt.kv(cache, 2)[0][slots[2].index].sum(dtype=torch.float32)
        assert seen == 4096 * 2 * 32 * 3
        table = vt.identity_page_csr(cache, slots, [100, 17, 4096], "cuda")
        assert table.indptr.tolist() == [0, 7, 9, 265]
        assert table.indices.is_cuda and vt.identity_page_table(cache, slots, [100, 17, 4096], "cuda").is_cuda
        del part
        for slot in slots:
            cache.retire(slot, *vt.fences(torch.device("cuda", 0)))
