"""The cache: slots that grow in place, and the memory behind them."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from vattn._call import U32, Owned, allocate, check, choice, flag, keep, names, number, size, sized, string
from vattn._native import ffi, lib
from vattn.drivers import Driver, pointer, verb_number
from vattn.errors import Error
from vattn.fences import pack
from vattn.geometry import DTYPE_NAMES, Geometry
from vattn.slots import Slot, entries, integers
from vattn.stats import HEALTH, Bytes, CallStats, Layout, Stats, Tensor, read
from vattn.views import View

if TYPE_CHECKING:
    from typing_extensions import Unpack

PARTS = {"key": lib.VATTN_KEY, "value": lib.VATTN_VALUE}
Part = Literal["key", "value"]


class Options(TypedDict, total=False):
    """The options of a cache; what is left out, or None, has its default. Sizes are bytes or texts such as
    `64GiB`.

    - `budget`: bytes of physical memory that may be held. Default: what the driver says is free.
    - `max_tokens`: the most tokens that a slot can hold; costs addresses only. Default 131,072.
    - `max_slots`: how many requests can have a slot at a time, up to 2^20. Default 1,024.
    - `spare_slot`: one more slot, of which a page or a tile is always backed, for padded entries of a batch.
      Default False.
    - `tile_tokens`: what a step rounds the tokens it backs up to a multiple of. Default 1.
    - `page_tokens`: tokens of a page. Default 16.
    - `layout`: `sliced` (all layers in one tensor, the default), `per_layer`, or how many layers share one.
    - `kv_order`: `apart` (the default), or `interleaved`: a token's values follow its keys.
    - `slack_divisor`: a plan may round a need up by at most the need divided by this. Default 32.
    - `background`: `thread` (the default), `caller`, who then calls `tend`, or `off`.
    - `reclaim`: `deferred` (the default) or `eager`.
    - `look_ahead`: with how many tokens to go memory for growth is mapped; 0 turns it off. Default 32.
    - `look_ahead_budget`: bytes that may be mapped ahead at a time. Default an eighth of the budget.
    - `at_hand`: bytes that may be kept created and mapped nowhere. Default a sixty-fourth of the budget.
    - `commit`: `on_demand` (the default), `whole`, or pairs of granules (1, 2, 4 … 256) and a count.
    """

    budget: int | str | None
    max_tokens: int | None
    max_slots: int | None
    spare_slot: bool | None
    tile_tokens: int | None
    page_tokens: int | None
    layout: Literal["sliced", "per_layer"] | int | None
    kv_order: Literal["apart", "interleaved"] | None
    slack_divisor: int | None
    background: Literal["thread", "caller", "off"] | None
    reclaim: Literal["deferred", "eager"] | None
    look_ahead: int | None
    look_ahead_budget: int | str | None
    at_hand: int | str | None
    commit: Literal["on_demand", "whole"] | Iterable[tuple[int, int]] | None


SIZES = ("budget", "look_ahead_budget", "at_hand")
CHOICES = {
    name: names(f"vattn_{name}", f"VATTN_{name.upper()}_") for name in ("background", "reclaim", "commit")
}
CHOICES["kv_order"] = names("vattn_kv_order", "VATTN_KV_")
LAYOUTS = names("vattn_layout_kind", "VATTN_LAYOUT_")
DEFAULT_STREAM = object()


def _config(options: Options) -> tuple[Any, Any]:
    """A struct of options, and what it points to."""
    config = ffi.new("vattn_config *")
    check(lib.vattn_config_init(config, ffi.sizeof("vattn_config")))
    extents = ffi.NULL
    for name, value in options.items():
        if name not in Options.__annotations__:
            raise TypeError(f"{name} is no option of a cache; there are {', '.join(Options.__annotations__)}")
        if value is None:
            continue
        if name in SIZES:
            setattr(config, name, size(name, value))
        elif name == "spare_slot":
            config.spare_slot = flag(name, value)
        elif name == "layout" and not isinstance(value, str):
            config.layout, config.layers_per_tensor = lib.VATTN_LAYOUT_GROUPED, number(name, value, U32)
        elif name == "layout":
            config.layout = choice(name, value, {k: v for k, v in LAYOUTS.items() if k != "grouped"})
        elif name == "commit" and not isinstance(value, str):
            extents = _extents(value)
            config.commit = lib.VATTN_COMMIT_EXTENTS
            config.extents, config.extents_count = extents, len(extents)
        elif name == "commit":
            config.commit = choice(name, value, {k: v for k, v in CHOICES[name].items() if k != "extents"})
        elif name in CHOICES:
            setattr(config, name, choice(name, value, CHOICES[name]))
        else:
            limit = 2 ** (8 * ffi.sizeof(dict(ffi.typeof("vattn_config").fields)[name].type)) - 1
            setattr(config, name, number(name, value, limit))
    return config, extents


def _extents(value: Any) -> Any:
    try:
        pairs = [(granules, count) for granules, count in value]
    except (TypeError, ValueError):
        raise TypeError(
            f"commit is {value!r}; it can be 'on_demand', 'whole', or pairs of granules and a count"
        ) from None
    return ffi.new("vattn_extents[]", [[number("granules", g), number("count", c)] for g, c in pairs])


def _layout(struct: Any) -> Layout:
    layout = read(Layout, struct)
    if layout.spare_slot == lib.VATTN_NO_SLOT:
        object.__setattr__(layout, "spare_slot", None)
    return layout


def plan(geometry: Geometry, *, granule: int | str = "2MiB", **options: Unpack[Options]) -> Layout:
    """How the tensors of a cache with those options would lie, without a cache and without a device.

    `granule` is the driver's unit of allocation: 2 MiB on every NVIDIA GPU so far.
    """
    config, _kept = _config(options)
    out = sized("vattn_layout")
    check(lib.vattn_layout_plan(config, _geometry(geometry)._handle, size("granule", granule), out))
    return _layout(out)


def _geometry(value: Any) -> Geometry:
    if not isinstance(value, Geometry):
        raise TypeError(
            f"geometry is {value!r}; give a vattn.Geometry, such as Geometry.preset('llama-3-8b')"
        )
    return value


class KvCache(Owned):
    """A KV cache: tensors `[slot, token, head, dim]` of which a step backs what a request holds.

    Options are those of `vattn.Options`, as keywords. Any thread may call any method at any time; of two
    calls that name the same slot at once one may raise `SlotBusy`. A call that raises has changed nothing.

    Lengths are in tokens, and say how many a slot holds in all. Slots and lengths are given as a `Batch`, as
    pairs or a mapping, as two lists or integer buffers, or as one buffer of entries of 24 bytes (u32 index,
    u32 cache, u64 generation, u64 tokens).

    Whoever gives memory up says when the device is done with it: with one fence for each stream that touched
    it. `IDLE` says that nothing is running.
    """

    def __init__(self, geometry: Geometry, driver: Driver, **options: Unpack[Options]) -> None:
        if not isinstance(driver, Driver):
            raise TypeError(f"driver is {driver!r}; give a vattn driver, such as HostDriver()")
        config, _kept = _config(options)
        out = ffi.new("vattn_cache **")
        check(lib.vattn_cache_create(config, _geometry(geometry)._handle, driver._handle, out))
        self._own(out[0], lib.vattn_cache_destroy, "a vattn.KvCache")
        self._lock = threading.Lock()
        self._live: dict[int, Slot] = {}
        # Raw tensors that vattn.torch made once, by what they are of; they go when the cache is closed.
        self._made: dict[Any, Any] = {}
        self._driver_name = driver.name
        struct = sized("vattn_layout")
        check(lib.vattn_cache_layout(self._handle, struct))
        #: How the tensors lie.
        self.layout: Layout = _layout(struct)
        #: What the model keeps, as far as it is needed to tell shapes: the type of an element.
        self.dtype: str = geometry.dtype

    # ---- requests ----

    def acquire(self, hint: int = 0, *, stream: Any = DEFAULT_STREAM) -> Slot:
        """Gives a new request a slot, of no tokens yet.

        `hint` is how many tokens it will soon hold: of the parked slots the one is adopted whose memory suits
        that best. What an earlier owner of the memory left running is waited for here, or, with `stream` (its
        handle, or an object of PyTorch or CuPy), by that stream on the device.
        """
        out = ffi.new("vattn_slot *")
        tokens = number("hint", hint)
        if stream is DEFAULT_STREAM or stream is None:
            check(lib.vattn_cache_acquire(self._handle, tokens, out))
        else:
            check(lib.vattn_cache_acquire_on(self._handle, tokens, pointer(stream), out))
        slot = Slot(out.index, out.cache, out.generation)
        with self._lock:
            known = self._live.get(slot.index)
            if known is None or known.generation < slot.generation:
                self._live[slot.index] = slot
        return slot

    def step(self, slots: Any, lengths: Any = None) -> None:
        """One iteration of the server: these slots now hold this many tokens in all, and every one is backed
        in every layer. Slots that are not named are untouched. New memory holds whatever it held before.

        Raises `OutOfBudget` where `fits` would say so, and then nothing is changed.
        """
        array, count = entries(slots, lengths, self._live)
        if status := lib.vattn_cache_step(self._handle, array, count):
            check(status)

    def fits(self, slots: Any, lengths: Any = None) -> list[bool]:
        """Which of these would succeed now, each together with those before it that would."""
        array, count = entries(slots, lengths, self._live)
        out = allocate("bool[]", count)
        check(lib.vattn_cache_fits(self._handle, array, count, out))
        return list(out)

    def admits(self, prompts: Any) -> int:
        """How many of these new requests, in order, could each be given a slot and stepped to so many tokens
        now: a list or an integer buffer of tokens."""
        numbers = integers("prompts", prompts)
        out = ffi.new("size_t *")
        check(lib.vattn_cache_admits(self._handle, ffi.new("uint64_t[]", numbers), len(numbers), out))
        return int(out[0])

    def prefetch(self, slots: Any, lengths: Any = None) -> None:
        """Has memory mapped for tokens that these slots will soon hold. Others may take it first."""
        array, count = entries(slots, lengths, self._live)
        check(lib.vattn_cache_prefetch(self._handle, array, count))

    def truncate(self, slot: Slot, tokens: int, *fences: Any) -> None:
        """Takes tokens away: the slot now holds that many. Its memory stays mapped, as spare of the slot."""
        held = pack(fences)
        check(lib.vattn_cache_truncate(self._handle, _slot(slot), number("tokens", tokens), held, len(held)))

    def retire(self, slot: Slot, *fences: Any) -> None:
        """The request is done. Its memory stays mapped until another request adopts it or memory is short."""
        held = pack(fences)
        check(lib.vattn_cache_retire(self._handle, _slot(slot), held, len(held)))
        with self._lock:
            if self._live.get(slot.index) == slot:
                del self._live[slot.index]

    # ---- memory ----

    def reclaim(self, size: int | str, *fences: Any) -> int:
        """Unmaps memory that holds nobody's tokens until so many more bytes are free, or nothing is left to
        unmap. Returns at once, with the bytes that are free now; `flush` waits until it is done."""
        held, out = pack(fences), ffi.new("uint64_t *")
        check(lib.vattn_cache_reclaim(self._handle, _size("size", size), held, len(held), out))
        return int(out[0])

    def trim(self, keep: int | str, *fences: Any) -> int:
        """Gives memory back to the device until no more than `keep` bytes are held, as far as it holds
        nobody's tokens. Returns at once, with the bytes that are held now; `flush` waits until it is done."""
        held, out = pack(fences), ffi.new("uint64_t *")
        check(lib.vattn_cache_trim(self._handle, _size("keep", keep), held, len(held), out))
        return int(out[0])

    def set_budget(self, budget: int | str) -> None:
        """Changes how many bytes may be held. With a smaller one memory is given back before it returns."""
        check(lib.vattn_cache_set_budget(self._handle, size("budget", budget)))

    def tend(self) -> bool:
        """Does what the mapper would do by now, with `background="caller"`: once an iteration. Never waits.
        True where something is left for later."""
        out = ffi.new("bool *")
        check(lib.vattn_cache_tend(self._handle, out))
        return bool(out[0])

    def flush(self) -> None:
        """Waits until all is done that the mapper was asked for before, fences included."""
        check(lib.vattn_cache_flush(self._handle))

    # ---- what there is ----

    def bytes_for(self, tokens: int) -> int:
        """Bytes that a slot of so many tokens takes at the least, in whole granules: for schedulers."""
        out = ffi.new("uint64_t *")
        check(lib.vattn_cache_bytes_for(self._handle, number("tokens", tokens), out))
        return int(out[0])

    def tensor(self, index: int) -> Tensor:
        """One of the tensors, counted from 0 to `layout.tensors`."""
        struct = sized("vattn_tensor")
        check(lib.vattn_cache_tensor(self._handle, number("index", index, U32), struct))
        return read(Tensor, struct)

    def health(self) -> str:
        """`healthy`, `degraded`, or `failed`: then only views, statistics and closing still work."""
        out = ffi.new("int32_t *")
        check(lib.vattn_cache_health(self._handle, out))
        return HEALTH[out[0]]

    def bytes(self) -> Bytes:
        """How much memory is used for what. Waits for nobody."""
        struct = sized("vattn_bytes")
        check(lib.vattn_cache_bytes(self._handle, struct))
        return read(Bytes, struct)

    def stats(self) -> Stats:
        """What is counted, without waiting for anybody."""
        struct = sized("vattn_stats")
        check(lib.vattn_cache_stats(self._handle, struct))
        return read(Stats, struct)

    def stats_json(self) -> dict[str, Any]:
        """What `stats` has and more: calls of the driver by verb, extents by size, failures by kind."""
        return dict(json.loads(string(lambda out: lib.vattn_cache_stats_json(self._handle, out))))

    def calls(self, verb: str | None = None) -> CallStats:
        """Calls of the driver of one verb, such as `map`; None is all of them."""
        if verb is None:
            return self.stats().driver
        out = ffi.new("vattn_call_stats *")
        check(lib.vattn_cache_calls(self._handle, verb_number(verb), out))
        return read(CallStats, out)

    def report(self) -> dict[str, Any]:
        """Walks through all slots and extents, compares the books, and tells everything. Waits for operations
        under way."""
        return dict(json.loads(string(lambda out: lib.vattn_cache_report_json(self._handle, out))))

    # ---- memory seen as arrays ----

    def raw(self, layer: int, part: Part = "key") -> View:
        """A layer's keys or values by slot: `[slot, token, head, dim]`, with `slot.index` as the first index.

        It says where tokens are, not that they are backed: **touching what no step has asked for is fatal**,
        a segmentation fault on the host and an illegal access on a device. The addresses never change.
        """
        return self._view(lib.vattn_cache_view, layer, part)

    def pages(self, layer: int, part: Part = "key") -> View:
        """The same memory by page: `[page, token of the page, head, dim]`. Page p of slot s is
        `s * layout.pages_per_slot + p`, in every layer alike. What is said of `raw` holds here."""
        return self._view(lib.vattn_cache_paged_view, layer, part)

    def rows(self, layer: int, part: Part = "key") -> View:
        """The same memory as one row of tokens: `[1, token, head, dim]`. Token t of slot s is
        `s * layout.stride_tokens + t`, in every layer alike. What is said of `raw` holds here."""
        return self._view(lib.vattn_cache_token_view, layer, part)

    def view(self, slot: Slot, layer: int, part: Part = "key", *, tokens: int | None = None) -> View:
        """A slot's keys or values in a layer: `[token, head, dim]`, of the tokens that are backed now, which
        are those of the last step and what `tile_tokens` adds to them, or of the first `tokens` of them.

        It is safe: its memory stays where it is while the view lives, or anything that was made from it,
        through retire, truncate, trim and close. The contents are another matter: once the slot is retired,
        another request may write there. On a device, kernels over it have to be done when the last of these
        goes, unless a later fence covers them. A slot of no tokens has an empty view.
        """
        out, pin = self._struct(lib.vattn_cache_view, layer, part), self._pin(_slot(slot))
        info = sized("vattn_pin_info")
        check(lib.vattn_pin_describe(pin, info))
        shape, strides, first = tuple(out.shape), tuple(out.strides), slot.index * out.strides[0]
        length = info.tokens
        if tokens is not None:
            length = number("tokens", tokens)
            if length > info.tokens:
                raise ValueError(
                    f"tokens is {length}, and {info.tokens} of the slot are backed; step it first"
                )
        return self._array(out, pin, (length, *shape[2:]), strides[1:], first)

    def _view(self, ask: Any, layer: int, part: Part) -> View:
        out = self._struct(ask, layer, part)
        return self._array(out, self._pin(ffi.NULL), tuple(out.shape), tuple(out.strides), 0)

    def _struct(self, ask: Any, layer: int, part: Part) -> Any:
        out = ffi.new("vattn_view *")
        check(ask(self._handle, number("layer", layer, U32), choice("part", part, PARTS), out))
        return out

    def _pin(self, slot: Any) -> Any:
        """What keeps the memory of a slot in C's form, or, of NULL, the addresses alone."""
        out = ffi.new("vattn_pin **")
        which = slot if slot == ffi.NULL else ffi.new("vattn_slot *", slot)
        check(lib.vattn_pin_create(self._handle, which, out))
        return keep(out[0], lib.vattn_pin_destroy)

    def _array(
        self, out: Any, pin: Any, shape: tuple[int, ...], strides: tuple[int, ...], first: int
    ) -> View:
        return View(
            pin,
            data_ptr=int(ffi.cast("uintptr_t", out.data)) + first * out.element_bytes,
            shape=shape,
            strides=strides,
            dtype=DTYPE_NAMES[out.dtype],
            element_bytes=out.element_bytes,
            device=(out.device_type, out.device_id),
            touchable=self._driver_name != "ledger",
        )

    def close(self) -> None:
        """Ends the cache: waits for the calls under way and for the fences that were given, and gives
        everything back.

        What living views of slots cover stays, and the addresses of all tensors, until the last view and
        whatever was made from one is gone; a `ResourceWarning` says so. A raw view has addresses and no
        memory from then on.
        """
        self._made.clear()
        try:
            pins, pinned = self.stats().pins, self.bytes().pinned
        except Error:
            pins = pinned = 0
        if self._close() and pins:
            warnings.warn(
                f"a vattn.KvCache was closed while {pins} views and tensors of it live: its addresses and "
                f"{pinned} bytes of memory stay until they are gone, and there is no memory behind the raw "
                "ones",
                ResourceWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return (
            f"<vattn.KvCache {'closed' if self.closed else self._driver_name}, {self.layout.layers} layers>"
        )


_size = size


def _slot(slot: Any) -> Any:
    if not isinstance(slot, Slot):
        raise TypeError(f"{slot!r} is no slot; give what KvCache.acquire returned")
    out = ffi.new("vattn_slot *")
    out.index = number("slot.index", slot.index, U32)
    out.cache = number("slot.cache", slot.cache, U32)
    out.generation = number("slot.generation", slot.generation)
    return out[0]
