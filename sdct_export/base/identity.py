"""Which base model is it: hashes over the weights that an adapter touches. numpy only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np

from ..adapter.entries import DTYPE_NAMES, Array

HASHED_ELEMENTS = 65536


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
