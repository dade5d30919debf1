"""What an adapter holds, in numbers: coefficients and energy per module and distance band. numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..spectral.selection import bands_of
from .adapter import SdctAdapter


@dataclasses.dataclass(frozen=True)
class ModuleSummary:
    """One adapted module.

    `energy` is `|dW|_F^2 = sum (scaling * value)^2` (the transforms are orthonormal); `band_shares` are the parts of
    it in each distance band, low frequencies first; `largest` is the largest `|scaling * value|`. `shape` is the
    recorded `(d_out, d_in)`, None where the file does not say; bands are then taken in the smallest matrix that holds
    all indices.
    """

    module: str
    shape: tuple[int, int] | None
    n: int
    energy: float
    band_shares: tuple[float, ...]
    largest: float


def summarize(adapter: SdctAdapter) -> tuple[ModuleSummary, ...]:
    """A `ModuleSummary` per adapted module, in natural order of their paths (layer 2 before layer 10)."""
    summaries = []
    for module in natural_order(adapter.modules):
        entries = adapter.modules[module]
        squared = (entries.values.astype(np.float64) * adapter.config.scaling) ** 2
        extent = entries.shape or extent_of(entries.indices)
        bands = bands_of(entries.indices, extent, min(adapter.config.bands, 255))
        energy = float(squared.sum())
        per_band = np.bincount(bands, weights=squared, minlength=min(adapter.config.bands, 255))
        shares = tuple(float(e / energy) if energy else 0.0 for e in per_band)
        summaries.append(
            ModuleSummary(module, entries.shape, entries.n, energy, shares, float(np.sqrt(squared.max(initial=0.0))))
        )
    return tuple(summaries)


def extent_of(indices: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The smallest `(d_out, d_in)` that holds all `indices [n, 2]`."""
    rows, cols = indices.max(axis=0)
    return int(rows) + 1, int(cols) + 1


def natural_order(modules: Iterable[str]) -> list[str]:
    """Module paths sorted by their parts, numbers by value."""
    return sorted(modules, key=lambda path: [_part(part) for part in path.split(".")])


def _part(text: str) -> tuple[bool, int, str]:
    number = text.isascii() and text.isdecimal() and len(text) < 20  # `int` refuses other digits and very long numbers
    return number, int(text) if number else 0, text
