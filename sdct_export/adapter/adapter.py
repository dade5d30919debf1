"""`SdctAdapter`: one trained adapter in memory, frozen and valid once it exists. numpy only; torch on demand."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .config import SdctConfig
from .errors import AdapterFormatError, BaseMismatchError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
VALUE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
DTYPE_NAMES = {
    "float64": np.dtype(np.float64),
    "float32": VALUE_DTYPES[0],
    "float16": VALUE_DTYPES[1],
    "bfloat16": BFLOAT16,
}
HASHED_ELEMENTS = 65536


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


@dataclasses.dataclass(frozen=True)
class SdctAdapter:
    """A trained sDCT adapter.

    Args:
        config: its settings.
        modules: module path in the base model -> entries.
        saved: parameters of `modules_to_save` stored in full, under their own names (e.g. `classifier.weight`).
        base_hash: `base_hash` of the model it was trained on, or None where unknown.
        base_dtype: dtype name in which the base's weights are hashed.
    """

    config: SdctConfig
    modules: Mapping[str, SdctEntries]
    saved: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    base_hash: str | None = None
    base_dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.modules and not self.saved:
            raise AdapterFormatError(
                "the adapter holds no adapted module and no saved module; there is nothing to apply"
            )
        for name, array in self.saved.items():
            if not np.isfinite(array.astype(np.float32)).all():
                raise AdapterFormatError(
                    f"saved parameter {name!r} holds NaN or infinite values; retrain or repair it"
                )
            array.setflags(write=False)
        for field in ("modules", "saved"):
            object.__setattr__(self, field, MappingProxyType(dict(sorted(getattr(self, field).items()))))

    @classmethod
    def load(cls, path: str | Path) -> SdctAdapter:
        """Read and validate an adapter folder. Raises `AdapterFormatError` naming file, module and remedy."""
        from .adapter_io import load_adapter

        return load_adapter(path)

    def save(self, path: str | Path) -> None:
        """Write the adapter folder `path`, complete or not at all.

        Raises `OutputError` where it exists or cannot be written.
        """
        from .adapter_io import save_adapter

        save_adapter(self, path)

    @property
    def n_parameters(self) -> int:
        """Trained numbers: coefficients plus saved parameters."""
        return sum(e.n for e in self.modules.values()) + sum(int(a.size) for a in self.saved.values())

    def entries(self, module: str) -> SdctEntries:
        """The entries of one module. Raises `BaseMismatchError` where the adapter does not adapt it."""
        try:
            return self.modules[module]
        except KeyError:
            known = ", ".join(list(self.modules)[:3])
            raise BaseMismatchError(
                f"the adapter has no module {module!r}; it adapts {len(self.modules)} modules ({known}, ...)"
            ) from None

    def delta_weight(self, module: str, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """`dW = scaling * C_out^T F C_in` of one module as a float32 torch tensor `[d_out, d_in]`.

        Args:
            module: module path, e.g. `model.layers.0.self_attn.q_proj`.
            shape: `(d_out, d_in)`; needed only where the adapter's file does not record it.
        """
        import torch

        from .spectrum import delta_weight

        entries = self.entries(module)
        shape = shape or entries.shape
        if shape is None:
            raise BaseMismatchError(f"the adapter does not record the shape of {module!r}; pass shape=(d_out, d_in)")
        check_fit(module, entries, shape)
        values = torch.from_numpy(entries.float32(self.config.scaling).astype(np.float64))
        return delta_weight(values, torch.from_numpy(entries.indices.astype(np.int64)), shape).float()


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


def base_hash(weight: Callable[[str], Array], modules: Mapping[str, tuple[int, int]], dtype: str) -> str:
    """Identity of a base model as seen by the modules an adapter touches: `sha256:<hex>`.

    A hash over the `module_digest` of each module, so that whoever keeps the digests of all modules can form the hash
    that any adapter recorded over its own.

    Args:
        weight: module path -> weight `[d_out, d_in]` in the layout of `torch.nn.Linear` (numpy or ml_dtypes).
        modules: module path -> `(d_out, d_in)`.
        dtype: `float64`, `float32`, `float16` or `bfloat16`.
    """
    return combine_digests({name: module_digest(name, weight(name), shape, dtype) for name, shape in modules.items()})


def module_digest(name: str, weight: Array, shape: tuple[int, int], dtype: str) -> str:
    """sha256 of a module's path, shape and an evenly strided sample of at most 65536 elements of its weight.

    The sample is cast to `dtype`, so that a bfloat16 checkpoint loaded as float32 for training still hashes the same.
    """
    flat = weight.reshape(-1)
    with np.errstate(over="ignore"):  # a weight beyond float16's range hashes as infinite, alike everywhere
        sample = flat[:: max(1, math.ceil(flat.size / HASHED_ELEMENTS))].astype(DTYPE_NAMES[dtype])
    digest = hashlib.sha256(f"{name}\0{shape[0]}x{shape[1]}\0".encode())
    digest.update(np.ascontiguousarray(sample).tobytes())
    return digest.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
    """`base_hash` of the modules in `digests` (module path -> `module_digest`), in sorted order."""
    return f"sha256:{hashlib.sha256(''.join(digests[name] for name in sorted(digests)).encode()).hexdigest()}"


def _entries_problem(values: Array, indices: Array, shape: tuple[int, int] | None) -> str | None:
    if values.dtype not in VALUE_DTYPES:
        return f"sdct_values must be float32, float16 or bfloat16, got {values.dtype}"
    if indices.dtype != np.int32:
        return f"sdct_indices must be int32, got {indices.dtype}"
    if values.ndim != 1 or values.size == 0:
        return f"sdct_values must have shape [n] with n >= 1, got {list(values.shape)}"
    if indices.shape != (values.shape[0], 2):
        return f"sdct_indices must have shape [{values.shape[0]}, 2] to match sdct_values, got {list(indices.shape)}"
    if not np.isfinite(values.astype(np.float32)).all():
        bad = int(np.flatnonzero(~np.isfinite(values.astype(np.float32)))[0])
        return f"sdct_values holds NaN or infinite numbers (first at position {bad}); retrain or repair the adapter"
    if (indices < 0).any():
        return f"sdct_indices holds negative indices (smallest {int(indices.min())}); the file is damaged"
    if shape is not None:
        over = np.flatnonzero((indices >= np.array(shape)).any(axis=1))
        if over.size:
            row, col = indices[over[0]]
            return f"index ({row}, {col}) lies outside the {shape[0]} x {shape[1]} weight; the file is damaged"
    keys = (indices[:, 0].astype(np.int64) << 32) | indices[:, 1]
    unique, counts = np.unique(keys, return_counts=True)
    if unique.size != keys.size:
        key = int(unique[counts > 1][0])
        return f"index ({key >> 32}, {key & 0xFFFFFFFF}) is repeated; add the values of such entries up into one"
    return None
