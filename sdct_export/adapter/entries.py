"""`SdctEntries`: the sparse spectrum of one module, valid once it exists. numpy only."""

from __future__ import annotations

import dataclasses
from typing import Any

# numpy first: imported by ml_dtypes' C code it would print the traceback of a signal that comes meanwhile
import numpy as np  # isort: skip
import ml_dtypes
import numpy.typing as npt

from ..errors import AdapterFormatError, BaseMismatchError

Array = npt.NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
VALUE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
DTYPE_NAMES = {
    "float64": np.dtype(np.float64),
    "float32": VALUE_DTYPES[0],
    "float16": VALUE_DTYPES[1],
    "bfloat16": BFLOAT16,
}


@dataclasses.dataclass(frozen=True)
class SdctEntries:
    """The sparse spectrum `F` of one module.

    Args:
        values: float32, float16 or bfloat16 `[n]`, not yet multiplied by the adapter's `scaling`.
        indices: int32 `[n, 2]` of (row, col) in the layout of `torch.nn.Linear.weight`, distinct.
        shape: `(d_out, d_in)` of the weight, or None where the file does not say.

    Raises:
        AdapterFormatError: a dtype or shape is wrong, a value is not finite, an index is out of range or repeated.
    """

    values: Array
    indices: Array
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        problem = _entries_problem(self.values, self.indices, self.shape)
        if problem:
            raise AdapterFormatError(problem)
        for array in (self.values, self.indices):
            array.setflags(write=False)

    @property
    def n(self) -> int:
        """Number of coefficients."""
        return int(self.values.shape[0])

    def float32(self, scaling: float = 1.0) -> npt.NDArray[np.float32]:
        """`scaling * values` rounded once to float32, `[n]`."""
        return (self.values.astype(np.float64) * scaling).astype(np.float32)


def check_fit(module: str, entries: SdctEntries, shape: tuple[int, int]) -> None:
    """Raise `BaseMismatchError` unless `entries` fit a weight of `shape` `(d_out, d_in)`."""
    if entries.shape is not None and tuple(entries.shape) != tuple(shape):
        raise BaseMismatchError(
            f"module {module!r} is {shape[0]} x {shape[1]} in the base but the adapter was trained on "
            f"{entries.shape[0]} x {entries.shape[1]}; use the base model the adapter was trained on"
        )
    if entries.n and (entries.indices.max(axis=0) >= np.array(shape)).any():
        row, col = entries.indices.max(axis=0)
        raise BaseMismatchError(
            f"module {module!r} is {shape[0]} x {shape[1]} in the base but the adapter has indices up to "
            f"({row}, {col}); use the base model the adapter was trained on"
        )


def layout_problem(
    values_dtype: np.dtype[Any],
    values_shape: tuple[int, ...],
    indices_dtype: np.dtype[Any],
    indices_shape: tuple[int, ...],
    shape: tuple[int, int] | None,
) -> str | None:
    """What is wrong with the dtypes and shapes of a module's entries, None where nothing is; needs no data."""
    if values_dtype not in VALUE_DTYPES:
        return f"sdct_values must be float32, float16 or bfloat16, got {values_dtype}"
    if indices_dtype != np.int32:
        return f"sdct_indices must be int32, got {indices_dtype}"
    if len(values_shape) != 1 or values_shape[0] == 0:
        return f"sdct_values must have shape [n] with n >= 1, got {list(values_shape)}"
    n = values_shape[0]
    if indices_shape != (n, 2):
        return f"sdct_indices must have shape [{n}, 2] to match sdct_values, got {list(indices_shape)}"
    if shape is not None and n > shape[0] * shape[1]:
        return f"it has {n} entries, more than its {shape[0]} x {shape[1]} weight; the file is damaged"
    return None


def _entries_problem(values: Array, indices: Array, shape: tuple[int, int] | None) -> str | None:
    problem = layout_problem(values.dtype, values.shape, indices.dtype, indices.shape, shape)
    if problem:
        return problem
    if not np.isfinite(values.astype(np.float32, copy=False)).all():
        bad = int(np.flatnonzero(~np.isfinite(values.astype(np.float32)))[0])
        return f"sdct_values holds NaN or infinite numbers (first at position {bad}); retrain or repair the adapter"
    if (indices < 0).any():
        return f"sdct_indices holds negative indices (smallest {int(indices.min())}); the file is damaged"
    if shape is not None:
        over = np.flatnonzero((indices >= np.array(shape)).any(axis=1))
        if over.size:
            row, col = indices[over[0]]
            return f"index ({row}, {col}) lies outside the {shape[0]} x {shape[1]} weight; the file is damaged"
    keys = indices[:, 0].astype(np.int64)
    keys <<= 32
    keys |= indices[:, 1]
    keys.sort()
    repeated = np.flatnonzero(keys[1:] == keys[:-1])
    if repeated.size:
        key = int(keys[repeated[0]])
        return f"index ({key >> 32}, {key & 0xFFFFFFFF}) is repeated; add the values of such entries up into one"
    return None
