"""Small adapters for tests; `golden(version)` are those committed in tests/golden."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.config import SdctConfig
from sdct_export.adapter.entries import SdctEntries


def golden(version: int = 1) -> SdctAdapter:
    """Every value dtype and a saved head; all numbers exact in every dtype.

    The one of version 1 has a module without a recorded shape, without which it would not be written as that any more.
    """

    def entries(n: int, dtype: object, shape: tuple[int, int], recorded: bool = True) -> SdctEntries:
        flat = np.arange(n) * 7 % (shape[0] * shape[1])
        indices = np.stack([flat // shape[1], flat % shape[1]], axis=1).astype(np.int32)
        return SdctEntries(((np.arange(n) - 3) / 8).astype(dtype), indices, shape if recorded else None)

    return SdctAdapter(
        SdctConfig(
            target_modules=["query", "value"],
            n_coefficients=5,
            scaling=0.5,
            modules_to_save=["classifier"],
            task_type="SEQ_CLS",
            base_model_name_or_path="a/base",
        ),
        {
            "encoder.layer.0.attention.self.query": entries(5, np.float32, (12, 8)),
            "encoder.layer.0.attention.self.value": entries(6, np.float16, (12, 8)),
            "encoder.layer.1.attention.self.query": entries(4, ml_dtypes.bfloat16, (12, 8), recorded=version > 1),
        },
        {
            "classifier.bias": np.array([0.5, -0.25], dtype=np.float32),
            "classifier.weight": np.arange(24, dtype=np.float32).reshape(2, 12) / 16,
        },
        base_hash="sha256:" + "0123456789abcdef" * 4,
        base_dtype="float32",
    )


def random_adapter(
    shapes: dict[str, tuple[int, int]], n: int, *, seed: int = 0, dtype: object = np.float32
) -> SdctAdapter:
    """An adapter of `n` standard normal coefficients for each of the modules in `shapes`."""
    rng = np.random.default_rng(seed)
    modules = {}
    for name, shape in shapes.items():
        flat = np.sort(rng.choice(shape[0] * shape[1], size=n, replace=False))
        indices = np.stack([flat // shape[1], flat % shape[1]], axis=1).astype(np.int32)
        modules[name] = SdctEntries(rng.normal(size=n).astype(dtype), indices, shape)
    return SdctAdapter(SdctConfig(target_modules=list(shapes), n_coefficients=n), modules)
