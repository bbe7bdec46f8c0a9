"""Layers that keep tokens of one shape at one place, and grow together.

Owns one `KvCache`, in which batch row i is slot i, and the tensors over it as the layers see them: which
tokens a forward pass writes, which it sees, and which a sliding window may forget. Knows nothing of
transformers.

    forgotten │ kept, seen by nobody │ window - 1 │ new │ backed, ahead │ addresses
              └──────── held ─────────────────────┴─────┘
"""

from __future__ import annotations

import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TypeAlias

import torch

from vattn import Batch, Geometry, KvCache, Layers, OutOfDeviceMemory
from vattn.torch import DTYPE_NAMES, fences, layer_blocks

#: Bytes that moving rows takes beside the cache, at most.
SCRATCH = 64 << 20
#: With how many tokens to go the memory of the next ones is mapped, in the background.
AHEAD = 16
#: What is mapped ahead is a share of what a row holds, so that mappings become fewer and waste stays small;
AHEAD_DIVISOR = 64
#: and so many tokens at least.
AHEAD_LEAST = 32
#: A window is moved to the front once a share of it has been forgotten, so that a token is moved so often.
MOVES = 4

Blocks: TypeAlias = "list[torch.Tensor]"
Views: TypeAlias = "Sequence[torch.Tensor]"
Turn: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]"


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

    def geometry(self, layers: int) -> Geometry:
        """A model of so many such layers."""
        return Geometry(
            [Layers(layers, kv_heads=self.heads, key_dim=self.key_dim, value_dim=self.value_dim)],
            dtype=DTYPE_NAMES[self.dtype],
        )


Open = Callable[[Shape, int, int], KvCache]


class LayerGroup:
    """`layers` layers of one shape: `rows` rows, of which each holds `held` tokens."""

    cache: KvCache

    def __init__(self, shape: Shape, layers: int, rows: int, open_cache: Open) -> None:
        self.shape = shape
        self.layers = layers
        self.open_cache = open_cache
        #: Which of the model's layers have a place, in order: for whoever gives them out.
        self.plan: list[int] = []
        self.rows = self.held = self.backed = self.ahead = 0
        #: Tokens seen before and after the forward pass that goes on.
        self.before = self.after = 0
        #: For each layer where the pass writes keys and values, and what of both it sees: None where nothing
        #: was there before.
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
        self.slots = max(8, 1 << (rows - 1).bit_length())
        self.cache = self.open_cache(self.shape, self.layers, self.slots)
        self.most = self.cache.layout.max_tokens
        self.budget = self.cache.bytes().budget
        self.ids = sorted((self.cache.acquire() for _ in range(self.slots)), key=lambda slot: slot.index)
        # [layer, slot, head, token, dim], a few tensors where the layout has several.
        self.all_keys = layer_blocks(self.cache, "key")
        self.all_values = layer_blocks(self.cache, "value")

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
        self.turn = list(zip(*self.window(held, kept), *seen, strict=False))

    def grow(self, tokens: int) -> None:
        """Every row holds that many tokens, with memory for all of them, or nothing is changed."""
        if tokens > self.backed:
            self._back(tokens)
        self.held = tokens

    def _back(self, tokens: int) -> None:
        batch, rows = self.batch, self.rows
        batch.tokens[:] = array("Q", (tokens,)) * rows
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
            batch.tokens[:] = array("Q", (self.ahead,)) * rows
            self.cache.prefetch(batch)

    def window(self, start: int, tokens: int) -> tuple[Views, Views]:
        """Keys and values of tokens from `start`, `[row, head, token, dim]` for each layer."""
        return _spread(self.keys, start, tokens), _spread(self.values, start, tokens)

    # ---- taking tokens away ----

    def crop(self, count: int) -> bool:
        """Takes the last tokens away; `False` where what would be seen then was forgotten."""
        after = self.after - count
        needed = after if self.shape.window is None else min(after, self.shape.window - 1)
        if self.held - count < needed:
            return False
        if count:
            self.shrink(self.held - count)
        self.before, self.after, self.cropped = after, after, True
        return True

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
            for slot in self.ids[: self.rows]:
                self.cache.truncate(slot, tokens, *done)
            self.backed, self.ahead = tokens, 0

    def _forget(self, reach: int) -> None:
        """Moves what will be seen to the front, once enough of what is before it never will be."""
        gone = self.held - reach
        step = max(AHEAD_LEAST, reach // MOVES)
        if gone < step:
            return
        for blocks in (self.keys, self.values):
            for block in blocks:
                for at in range(0, reach, gone):
                    count = min(gone, reach - at)
                    block.narrow(3, at, count).copy_(block.narrow(3, at + gone, count))
        if self.backed > 2 * (reach + step):
            # A long prompt came in parts: more than will ever be needed again.
            self.shrink(reach)
            self.cache.trim(0, *fences(self.shape.device))
        self.held = reach

    def set_budget(self, budget: int) -> None:
        """How many bytes it may hold."""
        self.cache.set_budget(budget)
        self.budget = budget

    # ---- rows ----

    def set_rows(self, rows: int) -> None:
        """So many rows from now on, of those there are slots for. Rows that go lose their tokens, rows that
        come have none."""
        done = fences(self.shape.device)
        for slot in self.ids[rows : self.rows]:
            self.cache.truncate(slot, 0, *done)
        self.rows, self.ahead = rows, 0
        self.batch = Batch(self.ids[:rows])
        self.keys: Blocks = [block[:, :rows] for block in self.all_keys]
        self.values: Blocks = [block[:, :rows] for block in self.all_values]

    def restart(self, rows: int) -> None:
        """So many rows without a token."""
        self.clear()
        if rows > self.slots:
            self._end()
            self._open(rows)
            self.rows = 0
        self.set_rows(rows)

    def widen(self, rows: int) -> None:
        """Has so many rows at least, with memory for what each holds, or changes nothing."""
        if rows > self.slots:
            self.move(range(self.layers), rows)
        if rows > self.rows:
            old = self.rows
            self.set_rows(rows)
            try:
                if self.backed:
                    self._back(self.backed)
            except BaseException:
                self.set_rows(old)
                raise

    def rearrange(self, sources: Sequence[int]) -> None:
        """Row i becomes what row `sources[i]` was, in place; rows may go, and come after `widen`."""
        self.turn = []
        moved = [(to, source) for to, source in enumerate(sources) if to != source]
        if moved and self.held:
            self._copy_rows([to for to, _ in moved], [source for _, source in moved])
        if len(sources) < self.rows:
            self.set_rows(len(sources))

    def _copy_rows(self, to: list[int], source: list[int]) -> None:
        device = self.shape.device
        into, outof = torch.tensor(to, device=device), torch.tensor(source, device=device)
        for blocks in (self.keys, self.values):
            for block in blocks:
                token = block.shape[0] * block.shape[2] * block.shape[4] * block.element_size() * len(to)
                step = max(1, SCRATCH // token)
                for at in range(0, self.held, step):
                    part = block.narrow(3, at, min(step, self.held - at)).permute(1, 3, 0, 2, 4)
                    part.index_copy_(0, into, part.index_select(0, outof))

    # ---- its life ----

    def copy_of(self, kept: Sequence[int], rows: int, open_cache: Open) -> LayerGroup:
        """A group of its own with the tokens of the kept layers, and slots for so many rows."""
        new = LayerGroup(self.shape, len(kept), max(rows, self.rows), open_cache)
        try:
            new.set_rows(self.rows)
            new.grow(self.held)
        except BaseException:
            new.close()
            raise
        new.before, new.after = self.before, self.after
        if self.held:
            for outof, into in zip(self.window(0, self.held), new.window(0, self.held), strict=True):
                for layer, place in zip(kept, into, strict=True):
                    place.copy_(outof[layer])
        return new

    def move(self, kept: Sequence[int], rows: int) -> None:
        """Moves into another cache, of the kept layers and with slots for so many rows."""
        new = self.copy_of(kept, rows, self.open_cache)
        self._end()
        self.__dict__.update(new.__dict__, plan=self.plan, cropped=self.cropped)

    def close(self) -> None:
        """Gives everything back once the device is done with it."""
        if not self.cache.closed:
            self._end()

    def _end(self) -> None:
        done = fences(self.shape.device)
        for slot in self.ids[: self.rows]:
            self.cache.retire(slot, *done)
        self.turn = []
        self.keys, self.values, self.all_keys, self.all_values = [], [], [], []
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


def _spread(blocks: Blocks, start: int, tokens: int) -> Views:
    if len(blocks) == 1:
        return blocks[0].narrow(3, start, tokens).unbind(0)
    return [view for block in blocks for view in block.narrow(3, start, tokens).unbind(0)]
