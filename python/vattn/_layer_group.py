"""Layers that keep tokens of one shape at one place, and grow together.

Owns one `KvCache`, in which slot i is the group's layer i and a token is that of all rows side by side, and the
tensors over it as the layers see them: which tokens a forward pass writes, which it sees, and which a sliding
window may forget. Knows nothing of transformers.

    forgotten │ kept, seen by nobody │ window - 1 │ new │ backed, ahead │ addresses
              └──────── held ─────────────────────┴─────┘

The rows of a batch grow in step, so a layer's tokens need no gaps between the rows: what a pass writes lies
together, a layer's strides stay far below 2^31, beyond which PyTorch takes an array apart and launches a kernel for
each row, and the waste at the end is a layer's, not a row's.
"""

from __future__ import annotations

import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TypeAlias

import torch

from vattn import (
    Batch,
    Geometry,
    KvCache,
    Layers,
    OutOfAddressSpace,
    OutOfBudget,
    OutOfDeviceMemory,
    OutOfMappings,
)
from vattn.torch import DTYPE_NAMES, fences, tensor
from vattn.views import View

#: Bytes that moving rows takes beside the cache, at most.
SCRATCH = 64 << 20
#: With how many tokens to go the memory of the next ones is mapped, in the background.
AHEAD = 16
#: What is mapped ahead is a share of what a layer holds, so that mappings become fewer and waste stays small;
AHEAD_DIVISOR = 128
#: and so many tokens at least.
AHEAD_LEAST = 16
#: A window is moved to the front once a share of it has been forgotten, so that a token is moved so often.
MOVES = 4

Views: TypeAlias = "Sequence[torch.Tensor]"
Turn: TypeAlias = "tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]"


@dataclass(frozen=True)
class Shape:
    """What layers must have in common to share a cache. `window` parts those that forget from those that
    don't."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None

    def geometry(self, rows: int) -> Geometry:
        """What one layer keeps for a token of so many rows: the heads of all of them."""
        return Geometry(
            [Layers(1, kv_heads=rows * self.heads, key_dim=self.key_dim, value_dim=self.value_dim)],
            dtype=DTYPE_NAMES[self.dtype],
        )


Open: TypeAlias = Callable[[Shape, int, int], KvCache]


class LayerGroup:
    """`layers` layers of one shape: `rows` rows, of which each holds `held` tokens."""

    cache: KvCache

    def __init__(self, shape: Shape, layers: int, rows: int, open_cache: Open) -> None:
        self.shape = shape
        self.layers = layers
        self.open_cache = open_cache
        #: Which of the model's layers have a place, in order: for whoever gives them out.
        self.plan: list[int] = []
        self.held = self.backed = self.ahead = 0
        #: Tokens seen before and after the forward pass that goes on.
        self.before = self.after = 0
        #: For each layer where the pass writes keys and values, and what of both it sees: None where nothing was
        #: there before. Where one write takes both, it is the first, and the second None.
        self.turn: list[Turn] = []
        #: The shapes of keys and of values that each layer brings to it.
        self.keys_taken = self.values_taken = (0, 0, 0, 0)
        #: Tokens of the pass that no later one will see.
        self.skipped = 0
        #: Whether tokens were taken away since, so that a window need keep no more than it sees.
        self.cropped = False
        self._open(rows)
        self.set_rows(rows)

    def _open(self, rows: int) -> None:
        sweep()
        #: Whether it has no cache, because it gave one up and got no other.
        self.ended = True
        #: For how many rows a token has room.
        self.room = rows
        self.cache = self.open_cache(self.shape, self.layers, rows)
        self.most = self.cache.layout.max_tokens
        self.budget = self.cache.bytes().budget
        #: The layers' slots, by their indices in the cache's tensors.
        self.slots = sorted((self.cache.acquire() for _ in range(self.layers)), key=lambda slot: slot.index)
        self.batch = Batch(self.slots)
        keys, values = self.cache.raw(0, "key"), self.cache.raw(0, "value")
        both = self._keys_before_values(keys, values)
        # [slot, row, head, token, dim]
        self.all_keys = self._by_row(keys, rows)
        self.all_values = self._by_row(values, rows)
        # The rows' keys, then their values.
        self.all_both = None if both is None else self._by_row(both, 2 * rows)
        self.ended = False

    def _by_row(self, view: View, rows: int) -> torch.Tensor:
        return tensor(view).unflatten(2, (rows, self.shape.heads)).permute(0, 2, 3, 1, 4)

    def _keys_before_values(self, keys: View, values: View) -> View | None:
        """Both as one, keys of all rows and then values of all rows, where they lie so and are of one width."""
        slots, tokens, heads, width = keys.shape
        behind = keys.data_ptr + heads * width * keys.element_bytes
        if keys.strides != values.strides or values.data_ptr != behind:
            return None
        return View(
            keys._pin,
            data_ptr=keys.data_ptr,
            shape=(slots, tokens, 2 * heads, width),
            strides=keys.strides,
            dtype=keys.dtype,
            element_bytes=keys.element_bytes,
            device=keys.__dlpack_device__(),
            touchable=keys._touchable,
        )

    # ---- a forward pass ----

    def begin(self, count: int, keep_all: bool) -> None:
        """Makes room for `count` new tokens in every row, and says where they go and what is seen.

        With `keep_all` a window forgets nothing. Where memory is refused nothing is changed.
        """
        reach = None if self.shape.window is None else self.shape.window - 1
        if reach is not None and (self.cropped or not keep_all):
            self._forget(reach)
        held = self.held
        kept = count if held or reach is None or keep_all else min(count, reach)
        self.grow(held + kept)
        self.before, self.after, self.cropped = self.after, self.after + count, False
        self.skipped = count - kept
        self.keys_taken = (self.rows, self.shape.heads, count, self.shape.key_dim)
        self.values_taken = (self.rows, self.shape.heads, count, self.shape.value_dim)
        seen: tuple[Iterable[torch.Tensor | None], Iterable[torch.Tensor | None]] = repeat(None), repeat(None)
        if held:
            past = held if reach is None else min(held, reach)
            seen = self.window(held - past, past + count)
        into: tuple[Views, Iterable[torch.Tensor | None]]
        if count == kept == 1 and self.both is not None:
            # A launch less for each layer and token.
            into = self._spread(self.both, held, 1), repeat(None)
        else:
            into = self.window(held, kept)
        self.turn = list(zip(*into, *seen, strict=False))

    def grow(self, tokens: int) -> None:
        """Every row holds that many tokens, with memory for all of them, or nothing is changed."""
        if tokens > self.backed:
            self._back(tokens)
        self.held = tokens

    def _back(self, tokens: int) -> None:
        batch = self.batch
        batch.tokens[:] = array("Q", (tokens,)) * self.layers
        try:
            self.cache.step(batch)
        except OutOfDeviceMemory:
            if self.shape.device.type != "cuda":
                raise
            # What PyTorch keeps for its next tensors may be what is missing.
            torch.cuda.empty_cache()
            self.cache.step(batch)
        self.backed = tokens
        if tokens + AHEAD > self.ahead and self.ahead < self.most:
            part = max(AHEAD_LEAST, tokens // AHEAD_DIVISOR)
            self.ahead = min(-(-(tokens + AHEAD) // part) * part, self.most)
            batch.tokens[:] = array("Q", (self.ahead,)) * self.layers
            self.cache.prefetch(batch)

    def window(self, start: int, tokens: int) -> tuple[Views, Views]:
        """Keys and values of tokens from `start`, `[row, head, token, dim]` for each layer."""
        return self._spread(self.keys, start, tokens), self._spread(self.values, start, tokens)

    def _spread(self, tensors: torch.Tensor, start: int, tokens: int) -> Views:
        views = tensors.narrow(3, start, tokens).unbind(0)
        return views if len(views) == self.layers else [views[slot.index] for slot in self.slots]

    # ---- taking tokens away ----

    def can_crop(self, count: int) -> bool:
        """Whether the last tokens can be taken away: not where what would be seen then was forgotten."""
        after = self.after - count
        needed = after if self.shape.window is None else min(after, self.shape.window - 1)
        return not after or self.held - count >= needed

    def crop(self, count: int) -> None:
        """Takes the last tokens away, where it can."""
        after = self.after - count
        if count:
            self.shrink(self.held - count if after else 0)
        self.before, self.after, self.cropped = after, after, True

    def clear(self) -> None:
        """No row holds a token; memory stays for the next ones."""
        self.shrink(0)
        self.before = self.after = 0

    def shrink(self, tokens: int) -> None:
        """Every row holds that many tokens and no more; the others' memory stays mapped for the next ones."""
        self.held = tokens
        self.turn = []
        if tokens < self.backed:
            done = fences(self.shape.device)
            for slot in self.slots:
                self.cache.truncate(slot, tokens, *done)
            self.backed, self.ahead = tokens, 0

    def _forget(self, reach: int) -> None:
        """Moves what will be seen to the front, once enough of what is before it never will be."""
        gone = self.held - reach
        step = max(AHEAD_LEAST, reach // MOVES)
        if gone < step:
            return
        for views in self.window(0, self.held):
            for view in views:
                for at in range(0, reach, gone):
                    count = min(gone, reach - at)
                    view.narrow(2, at, count).copy_(view.narrow(2, at + gone, count))
        if self.backed > 2 * (reach + step):
            # A long prompt came in parts: more than will ever be needed again.
            self.shrink(reach)
            self.cache.trim(0, *fences(self.shape.device))
        self.held = reach

    def set_budget(self, budget: int) -> None:
        """How many bytes it may hold."""
        self.cache.set_budget(budget)
        self.budget = budget

    def needed(self) -> int:
        """Bytes below which its budget can't go."""
        layout, tokens_of = self.cache.layout, self.cache.bytes_for
        spare = 0 if layout.spare_slot is None else tokens_of(max(layout.page_tokens, layout.tile_tokens))
        return max(tokens_of(self.backed) * self.layers + spare, tokens_of(1))

    # ---- layers and rows ----

    def keep(self, places: Sequence[int]) -> None:
        """Gives up the layers at all other places."""
        kept = [self.slots[place] for place in places]
        done = fences(self.shape.device)
        for slot in set(self.slots).difference(kept):
            self.cache.retire(slot, *done)
        self.cache.trim(0, *done)
        self.slots, self.layers, self.turn, self.ahead = kept, len(kept), [], 0
        self.batch = Batch(kept)

    def set_rows(self, rows: int) -> None:
        """So many rows from now on, of those there is room for. Rows that come hold anything."""
        self.rows = rows
        self.keys, self.values = self.all_keys[:, :rows], self.all_values[:, :rows]
        self.both = self.all_both if rows == self.room else None

    def restart(self, rows: int) -> None:
        """So many rows without a token."""
        self.clear()
        if not self._suits(rows):
            budget = self.budget
            self._end()
            self._open(rows)
            self.set_rows(rows)
            self.set_budget(max(budget, self.needed()))
        self.set_rows(rows)

    def _suits(self, rows: int) -> bool:
        """Whether there is room for so many rows, and less than twice of what they need."""
        return rows <= self.room < 2 * rows

    def widen(self, rows: int) -> None:
        """Has so many rows at least, with memory for what each holds, or changes nothing."""
        if rows > self.room:
            self._move(rows)
        self.set_rows(max(rows, self.rows))

    def rearranging(self, sources: Sequence[int]) -> Callable[[], None]:
        """What makes row i what row `sources[i]` was, in place; rows may go, and come after `widen`. All memory that
        it takes it has already."""
        moved = [(to, source) for to, source in enumerate(sources) if to != source]
        copy = self._copying(*map(list, zip(*moved, strict=True))) if moved and self.held else None
        return partial(self._rearrange, len(sources), copy)

    def _rearrange(self, rows: int, copy: Callable[[], None] | None) -> None:
        self.turn = []
        if copy:
            copy()
        self.set_rows(rows)
        if not self._suits(self.rows):
            try:
                self._move(self.rows)
            except (OutOfBudget, OutOfDeviceMemory, OutOfMappings, OutOfAddressSpace):
                # It stays as wide as it was.
                pass

    def _copying(self, to: list[int], source: list[int]) -> Callable[[], None]:
        device = self.shape.device
        into, outof = torch.tensor(to, device=device), torch.tensor(source, device=device)
        token = len(to) * self.shape.heads * max(self.shape.key_dim, self.shape.value_dim)
        most = min(self.held, max(1, SCRATCH // (token * self.shape.dtype.itemsize)))
        # PyTorch has no such copy for floats of 8 bits everywhere.
        dtype = torch.uint8 if self.shape.dtype.itemsize == 1 else self.shape.dtype
        scratch = torch.empty(most * token, dtype=dtype, device=device)

        def copy() -> None:
            for views in self.window(0, self.held):
                for view in views:
                    for at in range(0, self.held, most):
                        part = view.view(dtype).narrow(2, at, min(most, self.held - at))
                        moved = scratch[: len(to) * part[0].numel()].view(len(to), *part.shape[1:])
                        torch.index_select(part, 0, outof, out=moved)
                        part.index_copy_(0, into, moved)

        return copy

    # ---- its life ----

    def copy_of(self, room: int, open_cache: Open) -> LayerGroup:
        """A group of its own with the same tokens, and room for so many rows."""
        new = LayerGroup(self.shape, self.layers, room, open_cache)
        try:
            new.set_rows(self.rows)
            new.set_budget(max(self.budget, new.needed()))
            new.grow(self.held)
        except BaseException:
            new.close()
            raise
        new.plan = list(self.plan)
        new.before, new.after, new.cropped = self.before, self.after, self.cropped
        if self.held:
            for outof, into in zip(self.window(0, self.held), new.window(0, self.held), strict=True):
                for view, place in zip(outof, into, strict=True):
                    place.copy_(view)
        return new

    def _move(self, room: int) -> None:
        """Moves into another cache, with room for so many rows."""
        new = self.copy_of(room, self.open_cache)
        self._end()
        self.__dict__.update(new.__dict__)

    def close(self) -> None:
        """Gives everything back once the device is done with it."""
        if not self.ended:
            self._end()

    def _end(self) -> None:
        done = fences(self.shape.device)
        for slot in self.slots:
            self.cache.retire(slot, *done)
        self.turn, self.backed, self.ahead = [], 0, 0
        del self.keys, self.values, self.both, self.all_keys, self.all_values, self.all_both
        self.ended = True
        _lingering.append(self.cache)
        sweep()
        if not self.cache.closed:
            warnings.warn(
                "a VattnCache ended while tensors that it returned live: its memory stays until they are gone and "
                "another one is opened or closed",
                ResourceWarning,
                stacklevel=2,
            )


# Caches that ended while somebody had tensors over their memory, which must not go from under them.
_lingering: list[KvCache] = []
# In a child of fork they are the parent's.
os.register_at_fork(after_in_child=_lingering.clear)


def sweep() -> None:
    """Closes caches whose last tensors are gone. Any thread may, at any time."""
    kept = []
    try:
        while _lingering:
            cache = _lingering.pop()
            if cache.stats().pins:
                kept.append(cache)
            else:
                cache.close()
    except IndexError:
        # Another thread took the last one.
        pass
    finally:
        _lingering.extend(kept)
