"""`VattnCache`: a cache for `model.generate()` that grows in place.

    from vattn.transformers import VattnCache

    with VattnCache(model) as cache:
        model.generate(**inputs, past_key_values=cache)

Keys and values of a token are written once and stay where they are: growing maps memory behind what is there,
where `DynamicCache` copies everything and `StaticCache` pays for the longest answer in advance. Models and
attention back ends are as they are. A layer gets views `[batch, head, token, dim]` of exactly the tokens
there are, with gaps between one token and the next, which SDPA, FlashAttention and eager attention take.

Inference only, as `generate` is. Not for several threads at once, as all caches of transformers.
"""

from __future__ import annotations

import copy
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

NEEDED = "vattn.transformers needs transformers 5 and PyTorch"
INSTALL = "pip install 'transformers>=5' torch"
try:
    import torch
    import transformers
    from transformers import cache_utils
except ImportError as missing:
    raise ImportError(f"{NEEDED}: {INSTALL}") from missing
if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"{NEEDED}, and this is transformers {transformers.__version__}: {INSTALL}")

import vattn
from vattn._layer_group import LayerGroup, Shape
from vattn._opener import DriverChoice, Opener, explained
from vattn.torch import DTYPE_NAMES

REFUSALS = (
    vattn.OutOfBudget,
    vattn.OutOfDeviceMemory,
    vattn.OutOfMappings,
    vattn.OutOfAddressSpace,
    vattn.TooManyTokens,
)
States: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"


def _never_compiled(function: Any) -> Any:
    reason = (
        "a VattnCache asks a driver for memory, which a compiled graph can't: compile without fullgraph=True, or "
        "use a StaticCache"
    )
    try:
        return torch.compiler.disable(function, reason=reason)
    except TypeError:
        # PyTorch before 2.7 takes no reason.
        return torch.compiler.disable(function)


class VattnLayer(cache_utils.CacheLayerMixin):
    """A layer that keeps every token, in a group of layers that grow together."""

    is_sliding = False
    is_croppable = True
    window: int | None = None
    record_past = False

    def __init__(self, cache: VattnCache, index: int) -> None:
        self.cache, self.index = weakref.proxy(cache), index
        self.group: LayerGroup | None = None
        #: Which of the group's layers it is.
        self.at = 0
        #: Tokens that it has seen.
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> States:
        """Takes new tokens, `[batch, head, token, dim]`, and returns all that attention is to see."""
        states: States = self.cache.update(key_states, value_states, self.index)
        return states

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Gives it a place among layers of its shape; the tokens are not taken."""
        if self.group is None:
            self.cache._place(self, key_states, value_states)

    @property
    def is_initialized(self) -> bool:
        """Whether it has a place among layers of its shape."""
        return self.group is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """What is kept, `[batch, head, token, dim]`, in place: to be looked at until the cache changes."""
        return self._kept("keys")

    @property
    def values(self) -> torch.Tensor | None:
        """What is kept, `[batch, head, token, dim]`, in place: to be looked at until the cache changes."""
        return self._kept("values")

    def _kept(self, part: str) -> torch.Tensor | None:
        group = self.group
        if group is None or not group.held:
            return None
        keys, values = group.window(0, group.held)
        return (keys if part == "keys" else values)[self.at]

    def get_seq_length(self) -> int:
        """Tokens that it has seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens attention will see with so many new ones, and the position of the first."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit but `max_tokens`, which generation need not plan with: -1."""
        return -1

    get_max_cache_shape = get_max_length

    def _only_whole(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "layers that grow together change together: call the method of the VattnCache"
        )

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _only_whole

    def offload(self) -> None:
        """Refused: the point of the cache is that its memory stays where it is."""
        raise NotImplementedError(
            "a VattnCache can't be offloaded; use DynamicCache(offloading=True) for that"
        )

    prefetch = offload


class VattnWindowLayer(VattnLayer):
    """A layer with a sliding window, or with chunks, that forgets what no later token will see."""

    is_sliding = True

    def __init__(self, cache: VattnCache, index: int, window: int) -> None:
        super().__init__(cache, index)
        self.window = window
        #: Whether all tokens since the last crop are to be kept, so that it can take them away again.
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keeps what a crop may need, from now on."""
        self.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens attention will see with so many new ones, and the position of the first."""
        past = min(self.length, int(self.window or 1) - 1)
        return past + query_length, self.length - past

    def get_max_length(self) -> int:
        """The window."""
        return int(self.window or -1)

    get_max_cache_shape = get_max_length


def _close_all(groups: list[LayerGroup], process: int | None = None) -> None:
    if process not in (None, os.getpid()):
        # In a child of fork they are the parent's.
        return
    while groups:
        groups.pop().close()


class VattnCache(cache_utils.Cache):
    """A cache for a decoder of transformers whose tokens stay where they are.

    `model` is the model, or its configuration. Where a model lies on several devices give the model: then it
    is known beforehand which layers share one. Everything else has a default that serves:

    - `budget`: bytes that may be held on a device, a number or `"16GiB"`. Default: all that the device has.
    - `max_tokens`: the longest row, prompt and answer together. Costs addresses alone. Default: the model's
      `max_position_embeddings`, at least 131,072.
    - `driver`: a `vattn.Driver`, or a function from a `torch.device` to one. Default: CUDA's or the host's,
      by where the model's states are.
    - further options are `vattn.KvCache`'s.

    Memory is taken when tokens come, and stays with the cache for the next ones after `crop` and `reset`;
    `close()`, leaving `with`, or dropping the cache gives it back, once the current stream is done with it.
    PyTorch's caching allocator keeps what it once had: where that is most of the device, a step that gets no
    memory empties it and tries again. What `update` returned, and `layers[i].keys`, are views that end with
    that.

    Layers of different shape or device get a cache each. Layers without keys and values (linear attention,
    mamba), and those of kinds that this class does not know, are transformers' own.
    """

    is_compileable = False

    def __init__(
        self,
        model: Any,
        *,
        budget: int | str | None = None,
        max_tokens: int | None = None,
        driver: DriverChoice = None,
        **options: Any,
    ) -> None:
        config = getattr(model, "config", model)
        if not isinstance(config, transformers.PreTrainedConfig):
            raise TypeError(f"model is {model!r}; give a model of transformers, or its config")
        config = config.get_text_config(decoder=True)
        # Nothing is kept at hand and growth is asked for by name: what is held stays close to what is needed. Keys
        # beside values end in one granule, not in two.
        defaults = {"kv_order": "interleaved", "slack_divisor": 64, "look_ahead": 0, "at_hand": 0}
        self._opener = Opener(config, budget, max_tokens, driver, {**defaults, **options})
        self._hints = _hints(model, config)
        self._watch([])
        super().__init__(layers=_layers(self, config))
        self._fast = [layer if isinstance(layer, VattnLayer) else None for layer in self.layers]
        # As they are before the first token.
        self._unused = {index: copy.deepcopy(self.layers[index]) for index in self._others()}

    def _watch(self, groups: list[LayerGroup]) -> None:
        #: The groups of layers there are, in order of their first layers.
        self.groups = groups
        # It holds the groups, so that they are closed with their fences, whoever forgets this.
        weakref.finalize(self, _close_all, groups, os.getpid()).atexit = False

    # ---- what a model calls ----

    @_never_compiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        """Takes a layer's new tokens, `[batch, head, token, dim]`, and returns all that attention is to
        see."""
        layer = self._fast[layer_idx]
        if layer is None:
            states: States = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return states
        if key_states.requires_grad or value_states.requires_grad:
            raise RuntimeError(
                "a VattnCache keeps no gradients: call the model under torch.no_grad() or torch.inference_mode()"
            )
        group = layer.group
        if group is None or layer.length == group.after:
            group = self._begin(layer, key_states, value_states)
        elif layer.length != group.before:
            raise RuntimeError(
                f"layer {layer_idx} holds {layer.length} tokens and others of its forward pass {group.before}: an "
                "earlier pass ended half way; call crop() or reset()"
            )
        if not group.turn:
            raise RuntimeError(
                f"layer {layer_idx} comes to a cache whose rows changed in the midst of its forward pass: call crop() "
                "or reset()"
            )
        into_keys, into_values, seen_keys, seen_values = group.turn[layer.at]
        if key_states.shape != group.keys_taken or value_states.shape != group.values_taken:
            raise ValueError(
                f"layer {layer_idx} came with keys {list(key_states.shape)} and values {list(value_states.shape)}, and "
                f"its forward pass has {list(group.keys_taken)} and {list(group.values_taken)}"
            )
        if into_values is None:
            torch.cat((key_states, value_states), out=into_keys)
        elif group.skipped:
            into_keys.copy_(key_states[:, :, group.skipped :])
            into_values.copy_(value_states[:, :, group.skipped :])
        else:
            into_keys.copy_(key_states)
            into_values.copy_(value_states)
        layer.length = group.after
        if seen_keys is None or seen_values is None:
            # Nothing was there: attention may as well read what was given.
            return key_states, value_states
        return seen_keys, seen_values

    def _begin(self, layer: VattnLayer, keys: torch.Tensor, values: torch.Tensor) -> LayerGroup:
        """The group of a layer that is the first of it in a forward pass, with room for all of them; or,
        where the layer is new and the pass goes on already, just the group."""
        shape = self._shape(layer, keys, values)
        rows, count, group = keys.shape[0], keys.shape[2], layer.group
        if group is not None and shape != group.shape:
            raise ValueError(
                f"layer {layer.index} came with {_said(shape)}; it had {_said(group.shape)} so far: call close() first"
            )
        try:
            group = group or self._place(layer, keys, values)
            if layer.length != group.after:
                return group
            self._settle(group)
            if rows != group.rows and group.after:
                raise ValueError(
                    f"a batch of {rows} came to a cache that holds {group.rows} rows of {group.after} tokens; call "
                    "reset(), batch_repeat_interleave() or batch_select_indices() first"
                )
            if rows != group.rows:
                self._restart(group, rows)
            self._afford(group, partial(group.begin, count, layer.record_past))
        except REFUSALS as error:
            raise explained(error, rows, layer.length + count) from error
        return group

    def _restart(self, group: LayerGroup, rows: int) -> None:
        try:
            group.restart(rows)
        except vattn.Error:
            if group.ended:
                # Without the cache that it had and without another: its layers find a place anew.
                self.groups.remove(group)
                for layer in self._own():
                    if layer.group is group:
                        layer.group = None
            raise

    def _afford(self, group: LayerGroup, grow: Callable[[], None]) -> None:
        """Has a group grow; where its part of the budget does not suffice, with another part."""
        try:
            grow()
        except vattn.OutOfBudget:
            if self._opener.budget is None:
                raise
            self._share(group)
            try:
                grow()
            except vattn.OutOfBudget:
                self._share(group, rest_for_it=True)
                grow()

    def _share(self, one: LayerGroup, rest_for_it: bool = False) -> None:
        """Deals the budget out anew among the groups on one's device: to each what it needs, and the rest to
        that one, or to all alike."""
        groups = [group for group in self.groups if group.shape.device == one.shape.device]
        needed = [group.needed() for group in groups]
        budget = self._opener.budget or 0
        rest = budget - sum(needed)
        if rest < 0:
            raise vattn.OutOfBudget(
                f"of {budget} bytes that may be held, {sum(needed)} are needed at the least"
            )
        wanted = [
            need + (rest // len(groups) if not rest_for_it else rest if group is one else 0)
            for group, need in zip(groups, needed, strict=True)
        ]
        # Those that give come first.
        for group, budget in sorted(
            zip(groups, wanted, strict=True), key=lambda pair: pair[1] - pair[0].budget
        ):
            group.set_budget(budget)

    # ---- groups ----

    def _place(self, layer: VattnLayer, keys: torch.Tensor, values: torch.Tensor) -> LayerGroup:
        """Gives a layer its place among layers of its shape."""
        shape = self._shape(layer, keys, values)
        if missed := max((group.before for group in self.groups), default=0):
            raise RuntimeError(
                f"layer {layer.index} comes for the first time, and others hold {missed} tokens of passes before: one "
                "of these ended half way; call reset()"
            )
        for group in self.groups:
            if group.shape == shape and layer.index in group.plan:
                break
        else:
            plan = [
                other.index
                for other in self.layers
                if isinstance(other, VattnLayer)
                and (other is layer or (other.group is None and self._alike(other, layer)))
            ]
            group = LayerGroup(shape, len(plan), keys.shape[0], self._opener)
            group.plan = plan
            self.groups.append(group)
            try:
                if self._opener.budget is not None:
                    self._share(group)
            except BaseException:
                self.groups.remove(group)
                group.close()
                raise
        layer.group, layer.at = group, group.plan.index(layer.index)
        return group

    def _alike(self, one: VattnLayer, other: VattnLayer) -> bool:
        """Whether two layers will have one shape and one place, as far as the model's configuration says."""
        hint = self._hints[one.index]
        return hint is not None and one.window == other.window and hint == self._hints[other.index]

    def _shape(self, layer: VattnLayer, keys: torch.Tensor, values: torch.Tensor) -> Shape:
        if keys.dtype not in DTYPE_NAMES:
            kinds = ", ".join(DTYPE_NAMES.values())
            raise TypeError(
                f"layer {layer.index} has states of {keys.dtype}; a VattnCache keeps {kinds}: load the model in one "
                "of them"
            )
        if keys.dim() != 4 or values.shape[:3] != keys.shape[:3] or values.dtype != keys.dtype:
            raise TypeError(
                f"layer {layer.index} has keys {list(keys.shape)} of {keys.dtype} and values {list(values.shape)} "
                f"of {values.dtype}; both have to be [batch, head, token, dim], alike but for dim: use a DynamicCache"
            )
        if not keys.shape[0]:
            raise ValueError(f"layer {layer.index} has states of no rows; give a batch of one at least")
        return Shape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device, layer.window)

    def _settle(self, group: LayerGroup) -> None:
        """After its first pass: gives up places of layers that turned out to be elsewhere, or nowhere."""
        joined = [layer for layer in self._own() if layer.group is group]
        if len(joined) == len(group.plan) or not group.after:
            return
        group.keep([layer.at for layer in joined])
        group.plan = [layer.index for layer in joined]
        for at, layer in enumerate(joined):
            layer.at = at

    # ---- what generation calls ----

    def _own(self) -> Iterator[VattnLayer]:
        return (layer for layer in self.layers if isinstance(layer, VattnLayer))

    def _others(self) -> list[int]:
        return [index for index, layer in enumerate(self.layers) if not isinstance(layer, VattnLayer)]

    def _renew(self) -> None:
        """Layers of transformers' own as they were before the first token: their own `reset` keeps the shape of
        the batch, and can't be called outside of inference mode after a pass within."""
        for index, unused in self._unused.items():
            fresh: Any = copy.deepcopy(unused)
            if getattr(self.layers[index], "record_past", False):
                fresh.activate_past_recording()
            self.layers[index] = fresh

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens of every row away: `-n` takes n. A number above 0 is how many stay, as in
        older releases of transformers. Their memory stays mapped for the next ones.

        After a forward pass that ended half way all tokens of that pass have to go."""
        lengths = [layer.length for layer in self._own() if layer.group is not None] or [0]
        longest = max(lengths)
        end = max(longest + tokens_to_remove, 0) if tokens_to_remove <= 0 else min(tokens_to_remove, longest)
        if end > min(lengths):
            raise RuntimeError(
                f"layers hold from {min(lengths)} to {longest} tokens, since a forward pass ended half way: take "
                f"{longest - min(lengths)} away at least, or call reset()"
            )
        counts = [max(group.after - end, 0) for group in self.groups]
        for group, count in zip(self.groups, counts, strict=True):
            if not group.can_crop(count):
                raise RuntimeError(
                    f"{count} tokens can't be taken from a window of {group.shape.window} that has forgotten what "
                    "was before them: call activate_past_recording() before the forward pass that adds them"
                )
        for index in self._others():
            other: Any = self.layers[index]
            other.crop(tokens_to_remove)
        for group, count in zip(self.groups, counts, strict=True):
            group.crop(count)
        for layer in self._own():
            layer.length = 0 if layer.group is None else layer.group.after

    def reset(self) -> None:
        """Forgets all tokens. Memory stays for the next ones; `close` gives it back."""
        self._renew()
        for group in self.groups:
            group.clear()
        for layer in self._own():
            layer.length = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was, in place: rows that stay are not touched."""
        self._rearrange(lambda rows: beam_idx.tolist(), lambda layer: layer.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes `repeats` rows beside each other."""
        self._rearrange(
            lambda rows: [row for row in range(rows) for _ in range(repeats)],
            lambda layer: layer.batch_repeat_interleave(repeats),
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows, in this order: indices, or a truth for each row. The others' memory is kept for
        rows that come, until half of all rows have gone."""
        self._rearrange(
            lambda rows: torch.arange(rows, device=indices.device)[indices].tolist(),
            lambda layer: layer.batch_select_indices(indices),
        )

    def _rearrange(self, choose: Callable[[int], Sequence[int]], change: Callable[[Any], Any]) -> None:
        """Has every layer's rows become those chosen of so many. Where memory is refused nothing is changed.
        Without tokens there are no rows yet."""
        plans = [(group, group.rows, choose(group.rows)) for group in self.groups if group.after]
        for group, rows, sources in plans:
            if not sources:
                raise ValueError("no row would be left: call reset() instead")
            if any(not 0 <= source < rows for source in sources):
                raise IndexError(f"rows {list(sources)} are asked for, and there are {rows}")
        try:
            for group, _, sources in plans:
                self._afford(group, partial(group.widen, len(sources)))
            # Here it is, so that memory that PyTorch has not got is missed before anything changes.
            moves = [group.rearranging(sources) for group, _, sources in plans]
            for index in self._others():
                change(self.layers[index])
        except BaseException as error:
            for group, rows, sources in plans:
                group.set_rows(rows)
            if isinstance(error, REFUSALS):
                raise explained(error, len(sources), self.get_seq_length()) from error
            raise
        for move in moves:
            move()

    def bytes_held(self) -> int:
        """Bytes of physical memory that it holds now, on all devices."""
        return sum(group.cache.bytes().held for group in self.groups)

    # ---- its life ----

    def close(self) -> None:
        """Gives all memory back, once the current stream is done with it, and forgets all tokens. Used again,
        it begins anew."""
        self.reset()
        for layer in self._own():
            layer.group = None
        _close_all(self.groups)

    def __enter__(self) -> VattnCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> VattnCache:
        """A cache of its own with the same tokens, as for a prompt that is used many times."""
        new = VattnCache.__new__(VattnCache)
        new.__dict__.update(self.__dict__)
        memo[id(self)] = new
        new._watch([])
        try:
            for group in self.groups:
                new.groups.append(group.copy_of(group.room, group.open_cache))
        except REFUSALS as error:
            _close_all(new.groups)
            raise explained(error, group.rows, group.after) from error
        new.layers = []
        for layer in self.layers:
            if isinstance(layer, VattnLayer):
                twin = copy.copy(layer)
                twin.cache = weakref.proxy(new)
                twin.group = None if layer.group is None else new.groups[self.groups.index(layer.group)]
                new.layers.append(twin)
            else:
                new.layers.append(copy.deepcopy(layer, memo))
        new._fast = [layer if isinstance(layer, VattnLayer) else None for layer in new.layers]
        return new

    def __reduce__(self) -> Any:
        raise TypeError(
            "a VattnCache belongs to its process and can't be pickled; copy.deepcopy makes another one"
        )


def _said(shape: Shape) -> str:
    return f"{shape.heads} heads of {shape.key_dim} and {shape.value_dim}, {shape.dtype} on {shape.device}"


def _layers(cache: VattnCache, config: Any) -> list[Any]:
    """The layers that transformers would make, with those that keep every token or a window of them
    replaced."""
    layers: list[Any] = []
    for index, layer in enumerate(cache_utils.DynamicCache(config=config).layers):
        if type(layer) is cache_utils.DynamicLayer:
            layers.append(VattnLayer(cache, index))
        elif type(layer) is cache_utils.DynamicSlidingWindowLayer:
            layers.append(VattnWindowLayer(cache, index, layer.sliding_window))
        else:
            layers.append(layer)
    return layers


def _hints(model: Any, config: Any) -> list[Any]:
    """For each layer what says which others it is like: heads, width and device. None for one without tokens
    of its own."""
    count = config.num_hidden_layers
    each = getattr(config, "per_layer_config", None) or [config] * count
    own = count - int(getattr(config, "num_kv_shared_layers", 0) or 0)
    places: dict[int, Any] = {}
    for name, device in (getattr(model, "hf_device_map", None) or {}).items():
        if found := re.search(r"\.(\d+)$", name):
            places[int(found[1])] = device
    return [
        (getattr(layer, "num_key_value_heads", None), getattr(layer, "head_dim", None), places.get(index))
        if index < own
        else None
        for index, layer in enumerate(each)
    ]
