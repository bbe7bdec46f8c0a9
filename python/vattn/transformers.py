"""`VattnCache`: a cache for `model.generate()` that grows in place.

    from vattn.transformers import VattnCache

    with VattnCache(model) as cache:
        model.generate(**inputs, past_key_values=cache)

Keys and values of a token are written once and stay where they are: growing maps memory behind what is there,
where `DynamicCache` copies everything and `StaticCache` pays for the longest answer in advance. Models and
attention back ends are as they are. A layer gets views `[batch, head, token, dim]` of exactly the tokens there are,
with gaps between one token and the next, which SDPA, FlashAttention and eager attention take.

Inference only, as `generate` is. Not for several threads at once, as all caches of transformers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

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
from vattn.torch import DTYPE_NAMES

#: Addresses that the rows of one group of layers may take, of the 64 TiB and more that a process has.
ADDRESSES = 16 << 40
#: Tokens for which a row has addresses at the least, whatever a model's configuration says.
LEAST_TOKENS = 131_072

States = tuple[torch.Tensor, torch.Tensor]
DriverChoice = vattn.Driver | Callable[[torch.device], vattn.Driver] | None


class VattnLayer(cache_utils.CacheLayerMixin):  # type: ignore[misc]
    """A layer that keeps every token, in a group of layers that grow together."""

    is_sliding = False
    is_croppable = True
    window: int | None = None
    record_past = False

    def __init__(self, cache: VattnCache, index: int) -> None:
        self.cache, self.index = cache, index
        self.group: LayerGroup | None = None
        #: Which of the group's layers it is.
        self.at = 0
        #: Tokens that it has seen.
        self.length = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> States:
        """Takes new tokens, `[batch, head, token, dim]`, and returns all that attention is to see."""
        group = self.group
        if group is None or self.length == group.after:
            group = self.cache._begin(self, key_states, value_states)
        elif self.length != group.before:
            raise RuntimeError(
                f"layer {self.index} holds {self.length} tokens and others of its forward pass {group.before}: an "
                "earlier pass ended half way; call crop() or reset()"
            )
        at = self.at
        self.length = group.after
        if group.passes:
            # Nothing was there: attention may as well read what was given.
            group.into_keys[at].copy_(key_states[:, :, group.skipped :])
            group.into_values[at].copy_(value_states[:, :, group.skipped :])
            return key_states, value_states
        group.into_keys[at].copy_(key_states)
        group.into_values[at].copy_(value_states)
        return group.seen_keys[at], group.seen_values[at]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Gives it a place among layers of its shape; the tokens are not taken."""
        if self.group is None:
            self.cache._place(self, key_states, value_states)

    @property
    def is_initialized(self) -> bool:
        """Whether it has a place in a group."""
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
        raise NotImplementedError("layers that grow together change together: call the method of the VattnCache")

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _only_whole

    def offload(self) -> None:
        """Refused: the point of the cache is that its memory stays where it is."""
        raise NotImplementedError("a VattnCache can't be offloaded; use DynamicCache(offloading=True) for that")

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


class VattnCache(cache_utils.Cache):  # type: ignore[misc]
    """A cache for a decoder of transformers whose tokens stay where they are.

    `model` is the model, or its configuration. Where a model lies on several devices give the model: then it is
    known beforehand which layers share one. Everything else has a default that serves:

    - `budget`: bytes that may be held on a device, a number or `"16GiB"`. Default: all that the device has.
    - `max_tokens`: the longest row, prompt and answer together. Costs addresses alone. Default: the model's
      `max_position_embeddings`, at least 131,072.
    - `driver`: a `vattn.Driver`, or a function from a `torch.device` to one. Default: CUDA's or the host's, by
      where the model's states are.
    - `layout`, `kv_order`: how tensors lie, as for `vattn.KvCache`. Default: `"sliced"`, `"apart"`.
    - further options are `vattn.KvCache`'s.

    Memory is taken when tokens come, and stays with the cache for the next ones after `crop` and `reset`;
    `close()`, leaving `with`, or dropping the cache gives it back, once the current stream is done with it. PyTorch's
    caching allocator keeps what it once had: where that is most of the device, a step that gets no memory empties it
    and tries again. What `update` returned, and `layers[i].keys`, are views that end with that.

    Layers of different shape or device get a cache each. Layers without keys and values (linear attention, mamba), and
    those of kinds that this class does not know, are transformers' own.
    """

    is_compileable = False

    def __init__(
        self,
        model: Any,
        *,
        budget: int | str | None = None,
        max_tokens: int | None = None,
        driver: DriverChoice = None,
        layout: Any = "sliced",
        kv_order: Any = "apart",
        **options: Any,
    ) -> None:
        config = getattr(model, "config", model)
        if not isinstance(config, transformers.PreTrainedConfig):
            raise TypeError(f"model is {model!r}; give a model of transformers, or its config")
        config = config.get_text_config(decoder=True)
        self.config = config
        self.budget = budget
        self.max_tokens = max_tokens
        self.driver = driver
        # Nothing is kept at hand and growth is asked for by name: what is held stays close to what is needed.
        defaults: dict[str, Any] = {"slack_divisor": 64, "look_ahead": 0, "at_hand": 0}
        self.options: dict[str, Any] = {"layout": layout, "kv_order": kv_order, **defaults, **options}
        #: The groups there are, in order of their first layers.
        self.groups: list[LayerGroup] = []
        self._plans: dict[int, list[int]] = {}
        self._drivers: dict[torch.device, vattn.Driver] = {}
        self._hints = _hints(model, config)
        super().__init__(layers=_layers(self, config))

    # ---- what a model calls ----

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        """Takes a layer's new tokens, `[batch, head, token, dim]`, and returns all that attention is to see."""
        states: States = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return states

    update = _never_compiled(update)
