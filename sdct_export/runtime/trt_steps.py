"""The key-value cache of one batch on a TensorRT engine, and its next step. Never imports torch.

The engine reads and writes buffers `[batch, kv_heads, width, head_size]` whose first columns hold the tokens of a row
(`engine.lower.keep_in_buffers`). A step reads all columns, so buffers are no wider than they must be: the width is a
power of two and doubles when a row grows out of it. So a decode step has the same shapes and addresses for many
tokens, and runs as a captured graph. The memory is that of the full width from the start; doubling moves the rows
apart in it, and allocates nothing.

TensorRT 10.15 and newer leave presents in the memory of the pasts. Before, they are a second set of buffers, and the
two sets change places with each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from .. import contract
from ..adapter.entries import DTYPE_NAMES, Array
from ..contract import Cache
from ..engine.build import EngineManifest
from ..errors import ConfigError, SdctError
from .buckets import bucket
from .cuda import DeviceTensor

_NARROWEST = 32  # columns


class Engine(Protocol):
    """What runs a step: `trt.TrtBackend`."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """A tensor of zeros on the device."""

    def spread(self, source: DeviceTensor, target: DeviceTensor, narrow: int, wide: int) -> None:
        """Copy rows of `narrow` bytes in `source` to where those of `wide` bytes begin in `target`."""

    def step(
        self,
        profile: int,
        inputs: Mapping[str, Array],
        bank: Mapping[str, DeviceTensor],
        presents: Mapping[str, DeviceTensor],
    ) -> dict[str, Array]:
        """The outputs that are no presents."""


class TrtSteps:
    """An empty cache for `batch` rows of at most `tokens`.

    Raises:
        ConfigError: the engine was built for smaller sizes.
        MemoryError: the device has no room.
    """

    def __init__(self, engine: Engine, manifest: EngineManifest, cache: Cache, batch: int, tokens: int) -> None:
        self._engine, self._cache, self._batch = engine, cache, batch
        self._profiles = [profile for profile in (manifest.shapes, manifest.decode) if profile]
        self._chunk = manifest.shapes[contract.INPUT_IDS][2][1]
        least, _, most = manifest.shapes[cache.pasts[0]]
        if not least[0] <= batch <= most[0] or tokens > most[2]:
            raise ConfigError(
                f"a batch of {batch} rows of up to {tokens} tokens does not fit this engine, which takes "
                f"{least[0]} to {most[0]} rows of up to {most[2]}; ask for fewer, or build another (--batch, --length)"
            )
        self._least = max(_NARROWEST, least[2])
        self._most = min(self._wide(tokens), most[2])
        self._counts = np.zeros(batch, np.int64)  # tokens of each row in the cache
        dtype = DTYPE_NAMES[cache.dtype]
        shape = (batch, cache.kv_heads, self._most, cache.head_size)
        # of zeros, since columns that no token sees are multiplied by 0, and garbage may be no number
        self._pasts = [engine.zeros(shape, dtype) for _ in cache.pasts]
        self._others = [engine.zeros(shape, dtype) for _ in (cache.pasts[:1] if manifest.in_place else cache.pasts)]
        self._in_place = manifest.in_place
        self._width = 0
        self._widen(1)

    def run(self, inputs: Mapping[str, Array], bank: Mapping[str, DeviceTensor]) -> Array:
        """Logits `[batch, 1, vocabulary]` of each row's last new token; the cache then holds the tokens of `inputs`.

        Args:
            inputs: `input_ids [batch, sequence]`, `attention_mask [batch, past + sequence]` of which the last columns
                are those of the new tokens, and the selection of adapters. The rest is left alone: positions are
                counted here.
            bank: the adapters.

        Raises:
            SdctError: the tokens do not fit into the cache, or TensorRT or CUDA failed; the cache is as before then.
        """
        ids, mask = inputs[contract.INPUT_IDS], inputs[contract.ATTENTION_MASK]
        seen = mask[:, mask.shape[1] - ids.shape[1] :] != 0
        order = np.argsort(~seen, axis=1, kind="stable")  # tokens first, padding behind them
        ids, counts = np.take_along_axis(ids, order, 1), seen.sum(1)
        logits: Array | None = None
        longest = int(self._counts.max()) + ids.shape[1]
        if longest > self._most:
            raise SdctError(f"rows of {longest} tokens do not fit into a cache of {self._most}; ask for fewer")
        for first in range(0, ids.shape[1], self._chunk):
            part = ids[:, first : first + self._chunk]
            new = np.clip(counts - first, 0, part.shape[1])
            found = self._step(part, new, inputs, bank)
            logits = found if logits is None else np.where((new > 0)[:, None, None], found, logits)
        assert logits is not None
        return logits

    def _step(self, ids: Array, new: Array, inputs: Mapping[str, Array], bank: Mapping[str, DeviceTensor]) -> Array:
        """Run tokens of which row `i` has `new[i]`; others are written behind its own, where nobody sees them."""
        longest = ids.shape[1]
        start = int(self._counts.max())
        padded = min(bucket(longest), self._chunk, self._most - start)
        self._widen(start + padded)
        feeds = {
            contract.INPUT_IDS: np.pad(ids, ((0, 0), (0, padded - longest))),
            contract.POSITION_IDS: self._counts[:, None] + np.arange(padded),
            contract.KEPT: np.maximum(new - 1, 0)[:, None],
        }
        feeds |= {n: a for n, a in inputs.items() if n in (contract.ADAPTER_IDS, contract.ADAPTER_SCALES)}
        pasts = dict(zip(self._cache.pasts, self._pasts, strict=True))
        targets = self._pasts if self._in_place else self._others
        presents = dict(zip(self._cache.presents, targets, strict=True))
        profile = 1 if padded == 1 and len(self._profiles) > 1 else 0
        logits = self._engine.step(profile, feeds, {**bank, **pasts}, presents)["logits"]
        if not self._in_place:
            self._pasts, self._others = self._others, self._pasts
        self._counts = self._counts + new
        return logits

    def _wide(self, columns: int) -> int:
        return max(self._least, 1 << (columns - 1).bit_length())

    def _widen(self, columns: int) -> None:
        """Give the buffers a width for so many columns, and move what they hold to where it then belongs."""
        width = min(self._wide(columns), self._most)
        if width <= self._width:
            return
        batch, heads, _, size = self._pasts[0].shape
        narrow, wide = (n * size * self._pasts[0].dtype.itemsize for n in (self._width, width))
        shape = (batch, heads, width, size)
        for i, past in enumerate(self._pasts if self._width else ()):
            other = self._others[0 if self._in_place else i]
            if self._in_place:  # over the spare one and back
                other.shape = past.shape
                self._engine.spread(past, other, narrow, narrow)
                past.shape = shape
                self._engine.spread(other, past, narrow, wide)
            else:
                other.shape = shape
                self._engine.spread(past, other, narrow, wide)
        if self._width and not self._in_place:
            self._pasts, self._others = self._others, self._pasts
        for tensor in (*self._pasts, *self._others):
            tensor.shape = shape
        self._width = width
