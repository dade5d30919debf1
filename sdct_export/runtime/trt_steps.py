"""The key-value cache of several rows on a TensorRT engine, and the steps that go on from it (`steps.Steps`).

The engine reads and writes buffers `[slots, kv_heads, width, head_size]` whose first columns hold the tokens of a row
(`engine.lower.keep_in_buffers`). A step reads all columns, so buffers are no wider than they must be: the width is a
power of two and doubles when a row grows out of it. So a decode step has the same shapes and addresses for many
tokens, and runs as a captured graph. The memory is that of the full width from the start; doubling moves the rows
apart in it, and allocates nothing. So that few numbers of rows stand for all, a decode step is filled up to a power
of two with rows of other slots: they write into the last column, which is free.

Columns that no token sees are multiplied by 0, and 0 times what is no number is none. So they hold zeros, or what was
a token of that very slot: a slot that begins anew is cleared, for its last row may have ended in NaN.

TensorRT 10.15 and newer leave presents in the memory of the pasts. Before, there are two sets of buffers; a step reads
a slot in one set and leaves it in the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..adapter.entries import DTYPE_NAMES, Array
from ..contract import ADAPTER_IDS, ADAPTER_SCALES, INPUT_IDS, KEPT, POSITION_IDS, Cache
from ..engine.build import EngineManifest
from ..errors import ConfigError
from .buckets import bucket
from .cuda import DevicePart, DeviceTensor

_NARROWEST = 32  # columns
_ALIGNMENT = 256  # bytes, of the address of an input or output

Memory = Mapping[str, DeviceTensor | DevicePart]


class Engine(Protocol):
    """What runs a step: `trt.TrtBackend`."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """A tensor of zeros on the device."""

    def move(self, source: int, pitch: int, target: int, other: int, nbytes: int, rows: int) -> None:
        """Copy `nbytes` of each of `rows`, which are `pitch` bytes apart at the source and `other` at the target."""

    def clear(self, target: int, nbytes: int) -> None:
        """Set so many bytes to zero."""

    def step(self, profile: int, inputs: Mapping[str, Array], bank: Memory, presents: Memory) -> dict[str, Array]:
        """The outputs that are no presents."""


class TrtSteps:
    """An empty cache of so many slots, each for at most `max_length` tokens.

    Raises:
        ConfigError: the engine was built for other sizes.
        MemoryError: the device has no room.
    """

    def __init__(self, engine: Engine, manifest: EngineManifest, cache: Cache, slots: int, max_length: int) -> None:
        least, _, most = manifest.shapes[cache.pasts[0]]
        if least[0] > 1:
            raise ConfigError(
                f"this engine takes batches from {least[0]} rows on, and rows of a language model come and go one by "
                "one; build it with --batch 1:OPT:MAX"
            )
        if slots > most[0] or max_length > most[2]:
            raise ConfigError(
                f"{slots} rows of up to {max_length} tokens do not fit this engine, which takes {most[0]} rows of up "
                f"to {most[2]}; ask for fewer, or build another (--batch, --length)"
            )
        self.slots = self.prefill_rows = slots
        self.max_length = max_length
        self._engine, self._cache = engine, cache
        self._chunk, self._decode = manifest.shapes[INPUT_IDS][2][1], 1 if manifest.decode else 0
        dtype = DTYPE_NAMES[cache.dtype]
        self._column = cache.head_size * dtype.itemsize
        # widths at which every slot begins at an address that TensorRT takes
        unit = _ALIGNMENT // math.gcd(_ALIGNMENT, cache.kv_heads * self._column)
        self._least = max(_NARROWEST, 1 << (max(least[2], unit) - 1).bit_length())
        self._most = min(self._power(max_length), most[2] // unit * unit)
        if self._most < max_length:
            raise ConfigError(
                f"rows of {max_length} tokens need a width that is a multiple of {unit} here, and this engine takes "
                f"up to {most[2]}; build it for more (--length)"
            )
        shape = (slots, cache.kv_heads, self._most, cache.head_size)
        sets = 1 if manifest.in_place else 2
        self._sets = [[engine.zeros(shape, dtype) for _ in cache.pasts] for _ in range(sets)]
        self._spare = engine.zeros(shape, dtype)
        self.nbytes = (sets * len(cache.pasts) + 1) * self._spare.nbytes  # on the device
        self._home = np.zeros(slots, np.int64)  # the set that holds each slot
        self._used = np.zeros(slots, np.int64)  # columns of each slot that hold something
        self._width = min(self._least, self._most)

    def prefill(
        self, first: int, rows: Sequence[Array], past: int, chosen: Mapping[str, Array], bank: Memory
    ) -> Array:
        """See `Steps`."""
        if not past:
            self._clear(first, len(rows))
        counts = np.array([len(row) for row in rows])
        ids = np.zeros((len(rows), counts.max()), np.int64)
        for own, row in zip(ids, rows, strict=True):
            own[: len(row)] = row
        logits: Array | None = None
        for done in range(0, ids.shape[1], self._chunk):
            part = ids[:, done : done + self._chunk]
            new = np.clip(counts - done, 0, part.shape[1])
            # tokens behind those of a shorter row are written behind its own, where nobody sees them
            start = np.full(len(rows), past + done)
            length = min(bucket(part.shape[1]), self._chunk, self._most - past - done)
            part = np.pad(part, ((0, 0), (0, length - part.shape[1])))
            found = self._step(first, part, start, np.maximum(new - 1, 0), chosen, bank)
            logits = found if logits is None else np.where((new > 0)[:, None], found, logits)
        assert logits is not None
        self._used[first : first + len(rows)] = past + counts
        return logits

    def decode(self, tokens: Array, lengths: Array, chosen: Mapping[str, Array], bank: Memory) -> Array:
        """See `Steps`."""
        rows = len(tokens)
        self._widen(int(lengths.max()) + 1)
        more = min(1 << (rows - 1).bit_length(), self.slots) - rows
        if more and self._used[rows : rows + more].max() >= self._width:
            more = 0  # none of their columns is free
        start = np.concatenate([lengths, np.full(more, self._width - 1)])
        ids = np.pad(tokens, (0, more))[:, None]
        chosen = {name: np.pad(array, ((0, more), (0, 0))) for name, array in chosen.items()}
        logits = self._step(0, ids, start, np.zeros(rows + more, np.int64), chosen, bank)
        self._used[:rows] = lengths + 1
        return logits[:rows]

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Steps`."""
        home = self._home[target] = self._home[source]
        self._clear(target, 1)
        pitch = self._width * self._column
        for tensor in self._sets[home]:
            start, end = (self._part(tensor, slot, 1).pointer for slot in (source, target))
            self._engine.move(start, pitch, end, pitch, length * self._column, self._cache.kv_heads)
        self._used[target] = length

    def _step(
        self, first: int, ids: Array, start: Array, kept: Array, chosen: Mapping[str, Array], bank: Memory
    ) -> Array:
        """Logits `[rows, vocabulary]` of the tokens `kept` of `ids [rows, tokens]`, put in columns from `start` on."""
        rows, tokens = ids.shape
        self._widen(int(start.max()) + tokens)
        here = self._meet(first, rows)
        there = here if len(self._sets) == 1 else 1 - here
        feeds = {
            INPUT_IDS: ids,
            POSITION_IDS: start[:, None] + np.arange(tokens),
            KEPT: kept[:, None],
            **{name: chosen[name] for name in (ADAPTER_IDS, ADAPTER_SCALES) if name in chosen},
        }
        pasts, presents = (
            dict(zip(names, (self._part(tensor, first, rows) for tensor in self._sets[which]), strict=True))
            for names, which in ((self._cache.pasts, here), (self._cache.presents, there))
        )
        profile = self._decode if tokens == 1 else 0
        logits = self._engine.step(profile, feeds, {**bank, **pasts}, presents)["logits"]
        self._home[first : first + rows] = there
        return logits[:, 0]

    def _clear(self, first: int, rows: int) -> None:
        """Forget what these slots hold."""
        for slot in range(first, first + rows):
            for tensor in self._sets[self._home[slot]]:
                part = self._part(tensor, slot, 1)
                self._engine.clear(part.pointer, self._cache.kv_heads * self._width * self._column)

    def _part(self, tensor: DeviceTensor, first: int, rows: int) -> DevicePart:
        """Some slots of a buffer, at the present width."""
        _, heads, _, size = tensor.shape
        start = tensor.pointer + first * heads * self._width * self._column
        return DevicePart(tensor, (rows, heads, self._width, size), start)

    def _meet(self, first: int, rows: int) -> int:
        """Bring these slots into one set, that which holds most of them."""
        homes = self._home[first : first + rows]
        here = int(2 * homes.sum() > rows)
        nbytes = self._cache.kv_heads * self._width * self._column
        for slot in (first + np.flatnonzero(homes != here)).tolist():
            for source, target in zip(self._sets[1 - here], self._sets[here], strict=True):
                start, end = (self._part(tensor, slot, 1).pointer for tensor in (source, target))
                self._engine.move(start, nbytes, end, nbytes, nbytes, 1)
            self._home[slot] = here
        return here

    def _power(self, columns: int) -> int:
        return int(max(self._least, 1 << (columns - 1).bit_length()))

    def _widen(self, columns: int) -> None:
        """Give the buffers a width for so many columns, and move what they hold to where it then belongs."""
        width = min(self._power(columns), self._most)
        if width <= self._width:
            return
        rows = self.slots * self._cache.kv_heads
        narrow, wide = self._width * self._column, width * self._column
        for which in np.unique(self._home):
            for tensor in self._sets[which]:  # over the spare one, since the places overlap
                self._engine.move(tensor.pointer, narrow, self._spare.pointer, narrow, narrow, rows)
                self._engine.clear(tensor.pointer, rows * wide)
                self._engine.move(self._spare.pointer, narrow, tensor.pointer, wide, narrow, rows)
        self._width = width
