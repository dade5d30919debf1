"""Independent float64 references, from scipy and plain Python; they share no code with the package."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

Floats = npt.NDArray[np.float64]


def delta_weight(
    values: npt.NDArray[Any], indices: npt.NDArray[Any], shape: tuple[int, int], scaling: float
) -> Floats:
    """`scaling * C_out^T F C_in` by scipy."""
    spectrum = np.zeros(shape)
    for (row, col), value in zip(indices.tolist(), values.astype(np.float64).tolist(), strict=True):
        spectrum[row, col] += value
    return scaling * scipy.fft.idctn(spectrum, norm="ortho")


def band_of(row: int, col: int, shape: tuple[int, int], bands: int) -> int:
    """Band of one coefficient, by exact integer arithmetic: the largest `j` with `(j / bands)^2 d_max^2 <= d^2`."""
    squared, largest = row * row + col * col, (shape[0] - 1) ** 2 + (shape[1] - 1) ** 2
    if largest == 0:
        return bands - 1
    return min(bands - 1, math.isqrt(bands * bands * squared // largest))


def relative_error(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """`|got - want| / |want|` in the 2-norm, computed in float64."""
    want = np.asarray(want, dtype=np.float64)
    return float(np.linalg.norm(np.asarray(got, dtype=np.float64) - want) / np.linalg.norm(want))
