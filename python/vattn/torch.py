"""PyTorch over a cache's memory: tensors, what attention kernels ask for beside them, virtual tensors.

Nothing here copies tokens. Tables and lengths are made on the device that is named, without a loop over
pages. Raw tensors reach beyond what is backed: **touching tokens that no step has asked for is fatal**, a
segmentation fault on the host and an illegal access on a device.
"""

from __future__ import annotations

import math
import operator
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import vattn
from vattn.buffer import Buffer
from vattn.views import View

try:
    import torch
    import torch.utils.dlpack
except ImportError as missing:
    raise ImportError("vattn.torch needs PyTorch: pip install torch") from missing

Part = Literal["key", "value"]
Device: TypeAlias = "torch.device | str | int | None"

#: PyTorch's types by vattn's names for them.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {1: ("uint8", torch.uint8), 2: ("float16", torch.float16), 4: ("float32", torch.float32)}


# ---- tensors over a cache ----


def tensor(view: View) -> torch.Tensor:
    """A tensor over the memory of a view, of its shape, strides and type."""
    # What DLPack may have no name for goes as bits of the same width.
    name, bits = _BITS[view.element_bytes]
    # A tensor that is made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        made: torch.Tensor = torch.utils.dlpack.from_dlpack(
            View(
                view._pin,
                data_ptr=view.data_ptr,
                shape=view.shape,
                strides=view.strides,
                dtype=name,
                element_bytes=view.element_bytes,
                device=view.__dlpack_device__(),
                touchable=view._touchable,
            )
        )
        return made if DTYPES[view.dtype] == bits else made.view(DTYPES[view.dtype])


def kv(cache: vattn.KvCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values by slot, `[slot, token, head, dim]` each, `slot.index` first.

    Raw: tokens that no step has asked for must not be touched, not even by printing. They are made once; the
    same tensors come back every time, and their addresses never change while the cache lives.
    """
    return _once(cache, "raw", layer, "key"), _once(cache, "raw", layer, "value")


def kv_view(cache: vattn.KvCache, slot: vattn.Slot, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One request's keys and values of a layer, `[token, head, dim]` each, over its backed tokens alone.

    Safe: the memory stays as long as the tensors do, whatever becomes of the slot.
    """
    return tensor(cache.view(slot, layer, "key")), tensor(cache.view(slot, layer, "value"))


def paged_kv(cache: vattn.KvCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory of `kv` seen as pages, `[page, token of the page, head, dim]` each, without a copy.

    Page p of slot s is `s * layout.pages_per_slot + p`: what `identity_page_table` lists. Raw, as `kv` is.
    """
    return _once(cache, "pages", layer, "key"), _once(cache, "pages", layer, "value")


def _once(cache: vattn.KvCache, kind: str, layer: int, part: Part) -> torch.Tensor:
    made: torch.Tensor | None = cache._made.get((kind, layer, part))
    if made is None:
        made = tensor(getattr(cache, kind)(layer, part))
        if not cache.closed:
            cache._made[kind, layer, part] = made
    return made


# ---- what kernels ask for ----


def _integers(values: Any, device: Device) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.to(device=device, dtype=torch.int32, non_blocking=True)
    return torch.tensor([operator.index(value) for value in values], dtype=torch.int32, device=device)


def cache_batch_idx(slots: Iterable[vattn.Slot] | torch.Tensor, device: Device = None) -> torch.Tensor:
    """The slots' indices, int32 `[batch]`: FlashAttention's `cache_batch_idx`, which says where in `kv` each
    sequence of a batch is."""
    if isinstance(slots, torch.Tensor):
        return _integers(slots, device)
    chosen = list(slots)
    for slot in chosen:
        if not isinstance(slot, vattn.Slot):
            raise TypeError(f"slots has {slot!r}; give slots, or a tensor of their indices")
    return _integers([slot.index for slot in chosen], device)


def cache_seqlens(lengths: Iterable[int] | torch.Tensor, device: Device = None) -> torch.Tensor:
    """Tokens of each sequence, int32 `[batch]`: FlashAttention's `cache_seqlens`, `seqused_k` elsewhere."""
    return _integers(lengths, device)


def cu_seqlens(lengths: Iterable[int] | torch.Tensor, device: Device = None) -> torch.Tensor:
    """Where each sequence begins in a packed row, int32 `[batch + 1]`: 0, then the sums of the lengths."""
    counts = _integers(lengths, device)
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


@dataclass(frozen=True)
class PageTable:
    """FlashInfer's form of a page table, all int32: the pages of sequence i are
    `indices[indptr[i]:indptr[i + 1]]`, and its last page holds `last_page_len[i]` tokens."""

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor


def identity_page_table(
    cache: vattn.KvCache,
    slots: Iterable[vattn.Slot] | torch.Tensor,
    lengths: Iterable[int] | torch.Tensor | None = None,
    device: Device = None,
) -> torch.Tensor:
    """The pages of each slot, counting upward: int32 `[batch, most pages]` for FlashAttention's and vLLM's
    paged kernels over `paged_kv`.

    With lengths there are as many columns as the longest sequence has pages; without, as many as a slot has.
    Columns past a sequence's pages go on counting, and past a slot's last page stay there; kernels read
    none of them. Lengths on a device are waited for, since the number of columns depends on them.
    """
    each = _pages_per_slot(cache)
    index = cache_batch_idx(slots, device).long()
    columns = each
    if lengths is not None:
        counts = _integers(lengths, None)
        longest = int(counts.max()) if counts.numel() else 0
        _check(cache, index, counts, longest)
        columns = -(-longest // cache.layout.page_tokens)
    page = torch.arange(columns, device=index.device).clamp_(max=each - 1)
    return (index[:, None] * each + page).to(torch.int32)


def identity_page_csr(
    cache: vattn.KvCache,
    slots: Iterable[vattn.Slot] | torch.Tensor,
    lengths: Iterable[int] | torch.Tensor,
    device: Device = None,
) -> PageTable:
    """The same pages in FlashInfer's form. Lengths on a device are waited for."""
    tokens, each = cache.layout.page_tokens, _pages_per_slot(cache)
    index, counts = cache_batch_idx(slots, device).long(), _integers(lengths, device)
    pages = (counts + (tokens - 1)) // tokens
    indptr = cu_seqlens(pages)
    # Both in one wait for the device.
    longest, total = torch.stack([counts.max(), indptr[-1]]).tolist() if counts.numel() else (0, 0)
    _check(cache, index, counts, longest)
    # Entry j of sequence i is page j - indptr[i] of its slot.
    indices = torch.repeat_interleave(index * each - indptr[:-1], pages.long(), output_size=total)
    indices += torch.arange(indices.numel(), device=indices.device)
    return PageTable(indptr, indices.to(torch.int32), counts - (pages - 1).clamp(min=0) * tokens)


def _pages_per_slot(cache: vattn.KvCache) -> int:
    layout = cache.layout
    if (pages := layout.slots * layout.pages_per_slot) > 2**31:
        raise ValueError(
            f"the cache has {pages} pages, and int32 counts to 2^31: make it with a larger page_tokens than "
            f"{layout.page_tokens}, or with fewer slots or tokens"
        )
    return layout.pages_per_slot


def _check(cache: vattn.KvCache, index: torch.Tensor, counts: torch.Tensor, longest: int) -> None:
    if index.shape != counts.shape:
        raise ValueError(
            f"slots are {list(index.shape)} and lengths {list(counts.shape)}; give one length a slot"
        )
    if longest > cache.layout.max_tokens:
        raise ValueError(f"a length is {longest}, and a slot holds {cache.layout.max_tokens} tokens at most")


# ---- tensors with addresses and no memory ----

_virtual: dict[int, Buffer] = {}
_drivers: dict[tuple[int, torch.device], vattn.Driver] = {}

#: The unit of allocation on the processor, where nobody says otherwise.
HOST_GRANULE = "64KiB"


def driver_for(device: torch.device) -> vattn.Driver:
    """The driver of a device of PyTorch's, made once for a process: CUDA's, or the host's with all memory of
    the machine."""
    known = _drivers.get((os.getpid(), device))
    if known is None or known.closed:
        if device.type == "cpu":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            known = vattn.HostDriver(memory, granule=HOST_GRANULE)
        elif device.type != "cuda":
            raise TypeError(f"device is {device}; vattn has memory of cuda and cpu")
        elif not torch.cuda.is_available():
            raise RuntimeError(_without_cuda(device))
        else:
            known = vattn.CudaDriver(device.index)
        _drivers[os.getpid(), device] = known
    return known


def _without_cuda(device: torch.device) -> str:
    if torch.version.cuda is None:
        return (
            f"device is {device}, and this PyTorch, {torch.__version__}, is built without CUDA: install one that "
            "has it, with pip install torch --index-url and PyTorch's index for your CUDA"
        )
    return (
        f"device is {device}, and PyTorch {torch.__version__} finds no GPU: install NVIDIA's driver, and see that "
        "the process may use the GPU"
    )


def _device(device: Device) -> torch.device:
    known = torch.device("cpu" if device is None else device)
    if known.type == "cuda" and known.index is None and torch.cuda.is_available():
        known = torch.device("cuda", torch.cuda.current_device())
    return known


def empty_virtual(
    shape: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: Device = None,
    *,
    largest_extent: int | str | None = None,
) -> torch.Tensor:
    """A contiguous tensor with addresses and no memory. `commit` backs rows of it.

    **Touching rows that are not committed is fatal**, printing them too. The tensor and its views keep the
    addresses; memory goes with the last of them, after what the current stream has to do by then. Addresses
    cost nothing: a shape may be far larger than the device. `largest_extent` is `vattn.Buffer`'s.
    """
    if dtype not in DTYPE_NAMES:
        raise TypeError(f"dtype is {dtype}; it can be {', '.join(map(str, DTYPE_NAMES))}")
    try:
        lengths: tuple[int, ...] = (operator.index(shape),)  # type: ignore[arg-type]
    except TypeError:
        lengths = tuple(operator.index(length) for length in shape)  # type: ignore[union-attr]
    size = math.prod(lengths) * dtype.itemsize
    if not lengths or min(lengths) < 1:
        raise ValueError(f"shape is {list(lengths)}; it needs a dimension at least, and each of 1 or more")
    place = _device(device)
    buffer = Buffer(size, driver_for(place), largest_extent=largest_extent)
    made = tensor(buffer.array(DTYPE_NAMES[dtype], lengths))
    _virtual[buffer.data_ptr] = buffer
    weakref.finalize(made.untyped_storage(), _end, buffer, place, os.getpid()).atexit = False
    return made


def _end(buffer: Buffer, device: torch.device, process: int) -> None:
    """The last tensor over a buffer is gone. In a child of fork it is the parent's."""
    if os.getpid() != process:
        return
    _virtual.pop(buffer.data_ptr, None)
    if buffer.info().committed:
        buffer.decommit(0, buffer.size, *fences(device))
    buffer.close()


def commit(rows_of: torch.Tensor, start: int, stop: int) -> None:
    """Backs the rows from `start` to `stop` of dimension 0, whole or not at all. Rows that are committed stay
    as they are; new ones hold whatever was in the memory before.

    The tensor is one of `empty_virtual`, or a range of rows of it. Raises `OutOfDeviceMemory`; PyTorch's
    caching allocator may hold what is missing, and `torch.cuda.empty_cache()` has it give that back.
    """
    buffer, offset, size = _rows(rows_of, start, stop)
    if size:
        buffer.commit(offset, size)


def decommit(rows_of: torch.Tensor, start: int, stop: int, *fences_: Any) -> None:
    """Says that the rows from `start` to `stop` are not needed any more, once the fences have fired, which
    are waited for. On CUDA the current stream is the fence where none is given.

    Memory goes by whole extents of which no byte is committed. What was in the rows is lost.
    """
    buffer, offset, size = _rows(rows_of, start, stop)
    if size:
        buffer.decommit(offset, size, *(fences_ or fences(rows_of.device)))


def committed(tensor_of: torch.Tensor) -> int:
    """Bytes that are committed of the whole tensor that `empty_virtual` made."""
    return int(_buffer(tensor_of).info().committed)


def fences(device: torch.device) -> tuple[Any, ...]:
    """What says that the work submitted so far is done: the current stream's, or nothing on the processor."""
    return (torch.cuda.current_stream(device),) if device.type == "cuda" else (vattn.IDLE,)


def _buffer(tensor_of: torch.Tensor) -> Buffer:
    if not isinstance(tensor_of, torch.Tensor):
        raise TypeError(f"{tensor_of!r} is no tensor; give one that empty_virtual made")
    found = _virtual.get(tensor_of.untyped_storage().data_ptr())
    if found is None:
        raise ValueError(
            f"a tensor {list(tensor_of.shape)} on {tensor_of.device} has memory of PyTorch's own; give one "
            "that empty_virtual made, or rows of it"
        )
    return found


def _rows(tensor_of: torch.Tensor, start: int, stop: int) -> tuple[Buffer, int, int]:
    """The buffer, and which of its bytes the rows are."""
    buffer = _buffer(tensor_of)
    if tensor_of.dim() == 0 or not tensor_of.is_contiguous():
        raise ValueError(
            f"the view {list(tensor_of.shape)} with strides {list(tensor_of.stride())} is no range of rows; "
            "give the tensor that empty_virtual made, or tensor[i:j]"
        )
    start, stop = operator.index(start), operator.index(stop)
    if not 0 <= start <= stop <= tensor_of.shape[0]:
        raise ValueError(f"rows {start} to {stop} are not within the tensor's {tensor_of.shape[0]}")
    # The stride of a dimension of one element may be any number.
    row = tensor_of.numel() // max(tensor_of.shape[0], 1) * tensor_of.element_size()
    return buffer, tensor_of.data_ptr() - buffer.data_ptr + start * row, (stop - start) * row
