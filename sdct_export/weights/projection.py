"""Project any weight change into the cosine space: LoRA, another PEFT adapter or a tuned checkpoint becomes sDCT.

The transforms are orthonormal, so the best sparse spectrum of a weight change `dW` is its own spectrum
`F = C_out dW C_in^T` at the chosen places: an adapter keeps `sum F_kept^2 / sum F^2` of the energy `|dW|^2`, and the
largest coefficients keep the most. One matrix is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..adapter.adapter import SdctAdapter
from ..adapter.config import SdctConfig
from ..adapter.entries import DTYPE_NAMES, VALUE_DTYPES, Array, SdctEntries
from ..base.checkpoint import FLOATS, Checkpoint, progress_bar
from ..base.identity import base_hash
from ..base.model import to_numpy
from ..errors import BaseMismatchError, ConfigError
from ..spectral.selection import select
from .changes import Change, from_peft, from_tuned, read_weight, weight_spectrum

SEARCHED = 4 << 20  # coefficients searched at a time for the largest
ENOUGH = 0.8  # share of the energy below which a projection is warned of; docs/training.md has the figures behind it


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """How much of one module's weight change an adapter keeps.

    Attributes:
        n: coefficients kept.
        shape: `(d_out, d_in)`.
        energy: `|dW|^2` in the Frobenius norm.
        retained_energy: part of it that the kept coefficients carry, 0 to 1.
        relative_error: `|dW - dW'| / |dW|` with the values as stored.
    """

    n: int
    shape: tuple[int, int]
    energy: float
    retained_energy: float
    relative_error: float


@dataclasses.dataclass(frozen=True)
class ProjectionReport:
    """How much of a weight change an adapter keeps.

    Attributes:
        modules: module path -> figures.
        saved: parameters stored in full.
        ignored: parameters that changed and that the adapter does not carry: biases, norms, embeddings, weights
            outside `target_modules`.
        retained_energy: over all modules together.
        relative_error: over all modules together.
        worst: the module that keeps the smallest part of its energy, None where no linear module changed.
    """

    modules: Mapping[str, ModuleReport]
    saved: tuple[str, ...]
    ignored: tuple[str, ...]
    retained_energy: float
    relative_error: float
    worst: str | None

    @property
    def enough(self) -> bool:
        """Whether the adapter keeps so much of the change that it can be expected to do what the change did."""
        return not self.modules or self.retained_energy >= ENOUGH


class Projection(NamedTuple):
    """The adapter and the report; unpacks as `adapter, report = project(...)`."""

    adapter: SdctAdapter
    report: ProjectionReport


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Places (flat, row-major, ascending) and float32 values kept of a spectrum, and the energy of all of it."""

    flat: Array
    values: Array
    energy: float


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
    """Turn a weight change into an sDCT adapter: `dW ~ C_out^T F C_in` with chosen coefficients of `dW` in `F`.

    Args:
        base: checkpoint folder of the base model.
        lora: folder of a PEFT adapter of that base: LoRA, or any other kind that PEFT can merge. LoRA is read
            directly; for other kinds (DoRA too) PEFT loads the base in float32.
        tuned: checkpoint folder of a tuned model, instead of `lora`.
        n_coefficients: coefficients per matrix (at most its size).
        total: coefficients over all matrices instead: the largest of all, at least one for each changed matrix.
        selection: `top` keeps the largest coefficients of the change; `energy`, `random` and `low` are those of
            `SdctConfig`, for comparison.
        bands: distance bands over which `top` and `energy` share the budget; 1 retains the most energy.
        seed: of the random part.
        target_modules: linear modules to project, as in `SdctConfig`; None takes all that changed.
        modules_to_save: modules of `tuned` to store in full. Modules that the base lacks (a task head) and those that
            a PEFT adapter saves are always stored.
        dtype: of the stored values: `float32`, `float16` or `bfloat16`.
        progress: show a bar on stderr; None shows it on a terminal only.

    Returns:
        The adapter, with `scaling` 1, and the report. Where it keeps less than 80 % of the energy a warning says so: a
        LoRA is spread over all frequencies, and training the coefficients (`sdct_export.distill`) needs far fewer.

    Raises:
        ConfigError: a setting has a value that cannot work, or no targeted weight changed.
        AdapterFormatError: the PEFT folder is damaged.
        BaseMismatchError: the base or tuned checkpoint is damaged, or they do not belong together.
        UnsupportedError: the change is of a kind that dW on linear layers cannot express; the module is named.
    """
    if (lora is None) == (tuned is None):
        raise ConfigError("give either a PEFT adapter folder (lora) or a tuned checkpoint (tuned)")
    if lora is not None and modules_to_save is not None:
        raise ConfigError("modules_to_save goes with a tuned checkpoint; a PEFT adapter names its own saved modules")
    if DTYPE_NAMES.get(dtype) not in VALUE_DTYPES:
        raise ConfigError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total < 1):
        raise ConfigError(f"total must be an integer of at least 1, got {total!r}")
    if total is not None and (selection != "top" or bands != 1):
        raise ConfigError("a total budget keeps the largest coefficients of all; use selection 'top' with 1 band")
    settings = SdctConfig(
        target_modules=".*" if target_modules is None else target_modules,
        n_coefficients=n_coefficients,
        selection=selection,
        bands=bands,
        seed=seed,
        modules_to_save=modules_to_save,
    )
    checkpoint = Checkpoint(base)
    if lora is not None:
        change = from_peft(checkpoint, Path(lora))
    else:
        change = from_tuned(checkpoint, Checkpoint(str(tuned)), settings.saves)
    projection = project_change(checkpoint, change, settings, total=total, dtype=dtype, progress=progress)
    report = projection.report
    if not report.enough:
        way = "train the coefficients on texts of yours with `sdct-export distill` (sdct_export.distill)"
        least = report.modules[str(report.worst)].retained_energy
        warnings.warn(
            f"the adapter keeps {report.retained_energy:.1%} of the energy of the change, "
            f"{least:.1%} in {report.worst!r}: do not expect it to do what "
            f"{lora or tuned} does; " + (way if lora is not None else "raise n_coefficients (--n)"),
            stacklevel=2,
        )
    return projection


def project_change(
    checkpoint: Checkpoint,
    change: Change,
    settings: SdctConfig,
    *,
    total: int | None = None,
    dtype: str = "float32",
    progress: bool | None = None,
) -> Projection:
    """The adapter that keeps the coefficients of `change` which `settings` choose; `project` has the arguments.

    Raises:
        ConfigError: no targeted weight changed, or a value is beyond the range of `dtype`.
        BaseMismatchError: a change is not finite.
    """
    stored = {name.removesuffix(".weight") for name in change.saved}
    targets = [path for path in change.shapes if path not in stored and settings.matches(path)]
    others = [path for path in change.shapes if path not in stored and path not in targets]
    with progress_bar("projecting", len(targets) + len(others), progress) as advance:
        spectra = _spectra(change, targets, advance)
        kept = _per_matrix(spectra, checkpoint, change, settings) if total is None else _of_all(spectra, total)
        outside = [f"{path}.weight" for path, _, _ in _spectra(change, others, advance)]
    if not kept and not change.saved:
        raise ConfigError(f"no targeted linear weight of {checkpoint.folder} changes; there is nothing to project")

    modules = {}
    reports = {}
    for path, k in kept.items():
        shape = change.shapes[path]
        with np.errstate(over="ignore"):
            values = k.values.astype(DTYPE_NAMES[dtype])
        if not np.isfinite(values.astype(np.float32)).all():
            raise ConfigError(f"coefficients of {path!r} are beyond the range of {dtype}; store them as float32")
        modules[path] = SdctEntries(values, np.stack(np.divmod(k.flat, shape[1]), axis=1).astype(np.int32), shape)
        reports[path] = _report(shape, k, values)
    parents = sorted({name.rpartition(".")[0] for name in change.saved})
    config = dataclasses.replace(
        settings,
        target_modules=list(modules) or parents,
        n_coefficients=settings.n_coefficients
        if total is None
        else max((k.flat.size for k in kept.values()), default=1),
        modules_to_save=parents or None,
        task_type=change.task_type,
        base_model_name_or_path=change.origin,
    )
    hashed = _hash(checkpoint, change, list(modules))
    energy = sum(r.energy for r in reports.values()) or 1.0
    report = ProjectionReport(
        modules=reports,
        saved=tuple(sorted(change.saved)),
        ignored=tuple(sorted([*change.ignored, *outside])),
        retained_energy=sum(r.energy * r.retained_energy for r in reports.values()) / energy,
        relative_error=math.sqrt(sum(r.energy * r.relative_error**2 for r in reports.values()) / energy),
        worst=min(reports, key=lambda path: reports[path].retained_energy, default=None),
    )
    return Projection(SdctAdapter(config, modules, change.saved, *hashed), report)


def _spectra(
    change: Change, paths: Sequence[str], advance: Callable[[int], None]
) -> Iterator[tuple[str, Tensor, float]]:
    """Path, spectrum and energy of every module that changed at all."""
    for path in paths:
        spectrum = change.spectrum(path)
        energy = float(torch.linalg.vector_norm(spectrum, dtype=torch.float64)) ** 2
        if not math.isfinite(energy):
            raise BaseMismatchError(f"the change of module {path!r} holds NaN or infinite values; repair its source")
        if energy > 0.0:
            yield path, spectrum, energy
        advance(1)


def _per_matrix(
    spectra: Iterator[tuple[str, Tensor, float]], base: Checkpoint, change: Change, settings: SdctConfig
) -> dict[str, _Kept]:
    """`n_coefficients` of every matrix."""
    kept: dict[str, _Kept] = {}
    for path, spectrum, energy in spectra:
        shape = change.shapes[path]
        n = min(settings.n_coefficients, shape[0] * shape[1])
        if settings.selection == "top" and settings.bands == 1:
            flat = _largest(spectrum, n)
        else:
            reads_base = settings.selection == "energy"
            chosen = select(
                settings.selection,
                n,
                shape,
                spectrum=weight_spectrum(read_weight(base, change.base, path)) if reads_base else spectrum,
                delta=settings.delta,
                bands=settings.bands,
                seed=(settings.seed, len(kept)),
            )
            flat = chosen[:, 0].astype(np.int64) * shape[1] + chosen[:, 1]
        kept[path] = _Kept(flat, spectrum.reshape(-1)[torch.from_numpy(flat)].numpy(), energy)
    return kept


def _of_all(spectra: Iterator[tuple[str, Tensor, float]], total: int) -> dict[str, _Kept]:
    """The `total` largest coefficients of all matrices, at least one of each; one pass, memory of order `total`."""
    energies: dict[str, float] = {}
    pool = np.empty(0, [("module", np.int64), ("flat", np.int64), ("value", np.float32), ("first", np.bool_)])
    for path, spectrum, energy in spectra:
        places = _largest(spectrum, min(total, spectrum.numel()))
        found = np.zeros(len(places), pool.dtype)
        found["module"], found["flat"] = len(energies), places
        found["value"] = spectrum.reshape(-1)[torch.from_numpy(places)].numpy()
        found["first"][np.argmax(np.abs(found["value"]))] = True  # the largest of its matrix stays whatever its size
        energies[path] = energy
        if len(energies) > total:
            raise ConfigError(f"a total of {total} is less than one coefficient per changed matrix; raise it")
        pool = np.concatenate([pool, found])
        pool = pool[np.lexsort((-np.abs(pool["value"]), ~pool["first"]))[:total]]
    pool.sort(order=["module", "flat"])
    return {
        path: _Kept(own["flat"].copy(), own["value"].copy(), energy)
        for i, (path, energy) in enumerate(energies.items())
        for own in [pool[pool["module"] == i]]
    }


def _largest(spectrum: Tensor, n: int) -> Array:
    """Flat places of the `n` largest magnitudes, ascending; a band at a time."""
    flat = spectrum.reshape(-1)
    places = torch.empty(0, dtype=torch.int64)
    for at in range(0, flat.numel(), SEARCHED):
        part = flat[at : at + SEARCHED].abs()
        places = torch.cat([places, torch.topk(part, min(n, part.numel()), sorted=False).indices + at])
        places = places[torch.topk(flat[places].abs(), min(n, places.numel()), sorted=False).indices]
    return places.sort().values.numpy()


def _report(shape: tuple[int, int], kept: _Kept, stored: Array) -> ModuleReport:
    values = kept.values.astype(np.float64)
    inside = min(kept.energy, float(np.sum(values**2)))
    rounding = float(np.sum((values - stored.astype(np.float64)) ** 2))
    return ModuleReport(
        n=int(kept.flat.size),
        shape=shape,
        energy=kept.energy,
        retained_energy=inside / kept.energy,
        relative_error=math.sqrt((kept.energy - inside + rounding) / kept.energy),
    )


def _hash(base: Checkpoint, change: Change, paths: Sequence[str]) -> tuple[str | None, str | None]:
    """Hash of the base over `paths`, and the dtype it is taken in: the checkpoint's own."""
    if not paths:
        return None, None
    stored = base.tensors[change.base.key(f"{paths[0]}.weight")]
    dtype = str(FLOATS[stored.dtype]).removeprefix("torch.")
    shapes = {path: change.shapes[path] for path in paths}
    return base_hash(lambda path: to_numpy(read_weight(base, change.base, path)), shapes, dtype), dtype
