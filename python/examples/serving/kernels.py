"""Attention kernels over a store: each has a `plan` on the host, once a step, and a `run`, once a layer.

Decode takes one new token a request, in batches of a fixed width, so that a whole step can be captured into a CUDA
graph: `plan` writes into buffers that stay where they are, `run` reads nothing else. Prefill takes some new tokens
of each request, and its work is another in each step: no step's graph has it.

Padded entries of a decode batch read one token of the spare row, slot or page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, partial

import numpy
import torch
from store import Pages, Slots, Store
from torch.nn import functional

WORKSPACE = 256 << 20
"""Bytes of scratch memory for FlashInfer; its authors recommend 128 MiB at the least."""

_workspaces: dict[torch.device, torch.Tensor] = {}


def workspace(device: torch.device) -> torch.Tensor:
    """Scratch memory that kernels share: those of one stream never run at the same time."""
    if device not in _workspaces:
        _workspaces[device] = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
    return _workspaces[device]


class Decode(ABC):
    """One new token a request."""

    @abstractmethod
    def plan(self, places: numpy.ndarray, totals: numpy.ndarray) -> None:
        """What follows is for the requests at these places, each with so many tokens in all, the new one among
        them."""

    @abstractmethod
    def run(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        """From `query`, `[width, heads, dim]`, to `out`, the same. What padded entries get means nothing."""


class Prefill(ABC):
    """Some new tokens a request."""

    @abstractmethod
    def plan(self, places: numpy.ndarray, new: numpy.ndarray, totals: numpy.ndarray) -> None:
        """What follows is for the requests at these places: how many tokens each has anew, and how many in all."""

    @abstractmethod
    def run(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        """From `query`, `[new tokens, heads, dim]`, one request's after another's, to `out`, the same."""


class ReferencePrefill(Prefill):
    """SDPA over rows that are gathered: for the processor, over any store."""

    def __init__(self, store: Store, heads: int) -> None:
        self.store = store

    def plan(self, places: numpy.ndarray, new: numpy.ndarray, totals: numpy.ndarray) -> None:
        device = self.store.shape.device
        self.new = new.tolist()
        self.rows = [
            torch.from_numpy(self.store.rows(place, numpy.arange(total))).to(device)
            for place, total in zip(places.tolist(), totals.tolist())
        ]

    def run(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        for part, into, rows in zip(query.split(self.new), out.split(self.new), self.rows):
            keys, values = (
                rows_of[layer][rows].transpose(0, 1)[None] for rows_of in (self.store.keys, self.store.values)
            )
            count, total = len(part), len(rows)
            seen = torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count)
            answer = functional.scaled_dot_product_attention(
                part.transpose(0, 1)[None], keys, values, attn_mask=seen, enable_gqa=True
            )
            into.copy_(answer[0].transpose(0, 1))


class ReferenceDecode(Decode):
    """The same, one token a request."""

    def __init__(self, store: Store, heads: int, width: int) -> None:
        self.inner = ReferencePrefill(store, heads)

    def plan(self, places: numpy.ndarray, totals: numpy.ndarray) -> None:
        self.inner.plan(places, numpy.ones_like(totals), totals)

    def run(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        count = len(self.inner.new)
        self.inner.run(layer, query[:count], out[:count])


@cache
def fa3() -> Callable[..., tuple[torch.Tensor, ...]]:
    """FlashAttention-3's operator, as `flash_attn_with_kvcache` calls it. That one is an operator in Python around it,
    which is called once a layer and prompt here."""
    import fa3_fwd._C  # noqa: F401  (registers it)

    attend: Callable[..., tuple[torch.Tensor, ...]] = torch.ops.fa3_fwd.fwd
    return attend


class Fa3Prefill(Prefill):
    """FlashAttention-3 over each request's exact view: no tile past its end is loaded."""

    def __init__(self, store: Slots, heads: int) -> None:
        self.store, self.attend = store, fa3()

    def plan(self, places: numpy.ndarray, new: numpy.ndarray, totals: numpy.ndarray) -> None:
        self.new = new.tolist()
        self.at = list(zip(places.tolist(), totals.tolist()))

    def run(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        keys, values = self.store.slot_keys[layer], self.store.slot_values[layer]
        for part, into, (slot, total) in zip(query.split(self.new), out.split(self.new), self.at):
            one = slice(slot, slot + 1)
            self.attend(part[None], keys[one, :total], values[one, :total], out=into[None], is_causal=True)


class Fa3Decode(Decode):
    """FlashAttention-3 over the whole tensor, with slots and lengths given. It loads whole tiles."""

    def __init__(self, store: Slots, heads: int, width: int) -> None:
        self.store, self.attend = store, fa3()
        self.spare = store.spare_row // store.stride
        self.host = torch.empty(2, width, dtype=torch.int32, pin_memory=True)
        self.both = torch.empty(2, width, dtype=torch.int32, device=store.shape.device)
        self.slots, self.lengths = self.both

    def plan(self, places: numpy.ndarray, totals: numpy.ndarray) -> None:
        count, (slots, lengths) = len(places), self.host.numpy()
        slots[:count], slots[count:] = places, self.spare
        lengths[:count], lengths[count:] = totals, 1
        self.both.copy_(self.host, non_blocking=True)

    def run(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        self.attend(
            query[:, None],
            self.store.slot_keys[layer],
            self.store.slot_values[layer],
            out=out[:, None],
            seqused_k=self.lengths,
            kv_batch_idx=self.slots,
            is_causal=True,
        )


class FlashInferPrefill(Prefill):
    """FlashInfer's paged prefill."""

    def __init__(self, store: Pages, heads: int, backend: str = "fa3") -> None:
        import flashinfer

        self.store, self.heads = store, heads
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace(store.shape.device), "NHD", backend=backend
        )
        #: What the device has to reach before the wrapper's memory on the host may be written anew.
        self.copied = torch.cuda.Event()

    def plan(self, places: numpy.ndarray, new: numpy.ndarray, totals: numpy.ndarray) -> None:
        store, shape = self.store, self.store.shape
        starts = numpy.zeros(len(new) + 1, numpy.int32)
        numpy.cumsum(new, out=starts[1:])
        self.copied.synchronize()
        # It wants them on the host, and takes them to the device itself; what is not pinned would wait for the device.
        self.wrapper.plan(
            torch.from_numpy(starts).pin_memory(),
            *(each.pin_memory() for each in store.listed(places, totals, len(places))),
            self.heads,
            shape.kv_heads,
            shape.head_dim,
            store.page_tokens,
            causal=True,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
        )
        self.copied.record()

    def run(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        self.wrapper.run(query, (self.store.page_keys[layer], self.store.page_values[layer]), out=out)


class FlashInferDecode(Decode):
    """FlashInfer's paged decode, its tables in buffers that a graph may read."""

    def __init__(self, store: Pages, heads: int, width: int) -> None:
        import flashinfer

        self.store, self.heads, self.width = store, heads, width
        device = store.shape.device

        def buffer(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace(device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=heads // store.shape.kv_heads >= 4,
            paged_kv_indptr_buffer=buffer(width + 1),
            paged_kv_indices_buffer=buffer(width * store.tables.shape[1]),
            paged_kv_last_page_len_buffer=buffer(width),
        )

    def plan(self, places: numpy.ndarray, totals: numpy.ndarray) -> None:
        store, shape = self.store, self.store.shape
        # From memory that is not pinned a copy would wait for the device.
        begins, pages, last = (each.pin_memory() for each in store.listed(places, totals, self.width))
        self.wrapper.plan(
            begins,
            pages.to(shape.device, non_blocking=True),
            last,
            self.heads,
            shape.kv_heads,
            shape.head_dim,
            store.page_tokens,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
        )

    def run(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        self.wrapper.run(query, (self.store.page_keys[layer], self.store.page_values[layer]), out=out)


class NoPrefill(Prefill):
    """Answers with the queries: how long would a run take if prefill's attention took a copy's time? All tokens are wrong,
    and as many as ever. (Nothing at all would leave zeros, which a GPU multiplies faster than other numbers.)"""

    def __init__(self, store: Store, heads: int) -> None:
        pass

    def plan(self, places: numpy.ndarray, new: numpy.ndarray, totals: numpy.ndarray) -> None:
        pass

    def run(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(query)


PREFILL: dict[str, Callable[..., Prefill]] = {
    "reference": ReferencePrefill,
    "fa3": Fa3Prefill,
    "flashinfer": FlashInferPrefill,
    "flashinfer-fa2": partial(FlashInferPrefill, backend="fa2"),
    "none": NoPrefill,
}
DECODE: dict[str, Callable[..., Decode]] = {
    "reference": ReferenceDecode,
    "fa3": Fa3Decode,
    "flashinfer": FlashInferDecode,
}


def names(store: Store, prefill: str | None = None, decode: str | None = None) -> tuple[str, str]:
    """The kernels of prefill and decode: those named, else the store's own, on the processor the reference."""
    on_card = store.shape.device.type == "cuda"
    own = (store.prefill, store.decode) if on_card else ("reference", "reference")
    return prefill or own[0], decode or own[1]
