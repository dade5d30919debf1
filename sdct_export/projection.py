"""Project any weight change into the cosine space: LoRA and other PEFT adapters, or a tuned checkpoint, become sDCT adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .adapter import SdctAdapter


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """How much of one module's weight change survives."""

    n: int
    shape: tuple[int, int]
    retained_energy: float
    relative_error: float


@dataclasses.dataclass(frozen=True)
class ProjectionReport:
    """How much of a weight change an adapter keeps."""

    modules: Mapping[str, ModuleReport]
    saved: tuple[str, ...]
    ignored: tuple[str, ...]
    retained_energy: float
    relative_error: float


class Projection(NamedTuple):
    """The adapter and the report; unpacks as `adapter, report = project(...)`."""

    adapter: SdctAdapter
    report: ProjectionReport


def project(
    base: str | Path,
    *,
    lora: str | Path | None = None,
    tuned: str | Path | None = None,
    n_coefficients: int = 700,
    total: int | None = None,
    selection: str = "top",
    bands: int = 1,
    seed: int = 0,
    target_modules: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] | None = None,
    dtype: str = "float32",
    progress: bool | None = None,
) -> Projection:
    """Turn a weight change into an sDCT adapter."""
    raise NotImplementedError
