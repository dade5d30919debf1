"""The adapters of the rows of a batch: what a caller says of them, and the graph's inputs that say the same."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence

import numpy as np

from .. import contract
from ..adapter.entries import Array
from ..errors import ConfigError

Selection = str | None | Mapping[str, float]  # the adapters of one batch row

MERGED = "this bundle is merged: its adapter is part of the weights; pass adapters=None"
_MAX_SCALE = float(np.finfo(np.float32).max)


def check_adapters(adapters: Selection | Sequence[Selection], batch: int) -> list[dict[str, float]]:
    """One dict of name -> scale per batch row; entries of scale 0 have no effect and are dropped.

    Raises:
        ConfigError: there is not one entry a row, or one is no selection; names it.
    """
    if adapters is None or isinstance(adapters, str | Mapping):
        return [check_row(adapters, "adapters")] * batch
    if not isinstance(adapters, Sequence):
        raise ConfigError(f"adapters must be a list with one entry per batch row, got {type(adapters).__name__}")
    if len(adapters) != batch:
        raise ConfigError(f"adapters has {len(adapters)} entries for a batch of {batch}; give one per row")
    return [check_row(entry, f"adapters[{i}]") for i, entry in enumerate(adapters)]


def check_row(entry: Selection, where: str) -> dict[str, float]:
    """One row as a dict of name -> scale. Raises `ConfigError`, which says `where`."""
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {entry: 1.0}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} must be an adapter name, None, or a mapping of names to scales; got {entry!r}")
    row: dict[str, float] = {}
    for name, scale in entry.items():
        if not isinstance(name, str):
            raise ConfigError(f"{where} must map adapter names to scales; got the key {name!r}")
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not abs(scale) <= _MAX_SCALE:
            raise ConfigError(f"{where}: the scale of {name!r} must be a finite number, got {scale!r}")
        if scale != 0:
            row[name] = float(scale)
    return dict(sorted(row.items()))  # sums round by their order, which is not for the caller to choose


def selection_inputs(rows: Sequence[Sequence[tuple[int, float]]]) -> dict[str, Array]:
    """`adapter_ids` and `adapter_scales`, `[batch, k]` with `k` the most adapters of a row, of (slot, scale) pairs."""
    ids = np.zeros((len(rows), max(1, *map(len, rows))), np.int32)
    scales = np.zeros(ids.shape, np.float32)
    for i, row in enumerate(rows):
        for j, (slot, scale) in enumerate(row):
            ids[i, j], scales[i, j] = slot, scale
    return {contract.ADAPTER_IDS: ids, contract.ADAPTER_SCALES: scales}


def in_slots(row: Mapping[str, float], slots: Mapping[str, int]) -> list[tuple[int, float]]:
    """The bank slot and scale of each adapter of a row."""
    return [(slots[name], scale) for name, scale in row.items()]
