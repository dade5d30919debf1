"""One adapter from several of the same base: a weighted sum in weight space, exact on the union of their coefficients.

    dW = sum_i s_i dW_i     so     F[row, col] = sum_i s_i scaling_i F_i[row, col]

since all share one pair of orthonormal transforms. `|dW|^2 = sum F^2`, so the best `n` coefficients are the largest,
and what they keep of the energy is known exactly. With weights `m_i / sum m` this is the averaging step of federated
training (McMahan et al., arXiv 1602.05629). numpy only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..errors import BaseMismatchError, ConfigError
from .adapter import SdctAdapter
from .config import SdctConfig
from .entries import Array, SdctEntries
from .training import TrainingRecord, Weights, config_differences

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class CombinedModule:
    """What one module of a combined adapter holds.

    Attributes:
        n: coefficients.
        n_exact: coefficients of the exact sum, the union of those of the adapters.
        energy: `|dW|^2` of the exact sum, in the Frobenius norm.
        retained_energy: part of it that the `n` coefficients carry, 0 to 1.
    """

    n: int
    n_exact: int
    energy: float
    retained_energy: float


@dataclasses.dataclass(frozen=True)
class CombinationReport:
    """What a combined adapter holds.

    Attributes:
        weights: of each adapter, as given.
        saved_weights: of each adapter in the parameters saved in full, which are averaged: `weights` over their sum.
            None where nothing is saved.
        modules: module path -> figures.
        saved: parameters stored in full.
        energy: over all modules together.
        retained_energy: over all modules together.
    """

    weights: tuple[float, ...]
    saved_weights: tuple[float, ...] | None
    modules: Mapping[str, CombinedModule]
    saved: tuple[str, ...]
    energy: float
    retained_energy: float


class Combination(NamedTuple):
    """The adapter and the report; unpacks as `adapter, report = combine(...)`."""

    adapter: SdctAdapter
    report: CombinationReport


def combine_adapters(
    adapters: Mapping[str, SdctAdapter],
    weights: Sequence[float],
    *,
    n_coefficients: int | None = None,
    same_base: bool = False,
) -> Combination:
    """The adapter with `dW = sum_i weight_i dW_i`, or of each module its `n_coefficients` largest coefficients.

    Args:
        adapters: how messages call an adapter -> adapter.
        weights: one for each.
        n_coefficients: most coefficients per matrix; None keeps the union, which is exact.
        same_base: whether the caller has compared all adapters with one base itself.

    Raises:
        ConfigError: a weight is not finite, nothing is left of the sum, or saved parameters cannot be averaged.
        BaseMismatchError: the adapters were not trained on the same base, class or labels, or it cannot be known.
    """
    if n_coefficients is not None and (
        isinstance(n_coefficients, bool) or not isinstance(n_coefficients, int) or n_coefficients < 1
    ):
        raise ConfigError(f"n_coefficients must be an integer of at least 1, got {n_coefficients!r}")
    for name, weight in zip(adapters, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"the weight of {name} must be a finite number, got {weight!r}")
    hashed = _identity(adapters, same_base)
    task = _common("task_type", {name: a.config.task_type for name, a in adapters.items()})
    record = _record(adapters)
    modules: dict[str, SdctEntries] = {}
    figures: dict[str, CombinedModule] = {}
    for path in sorted({path for adapter in adapters.values() for path in adapter.modules}):
        modules[path], figures[path] = _sum(path, adapters, weights, n_coefficients)
    saved, saved_weights = _average(adapters, weights)
    energy = sum(module.energy for module in figures.values())
    if figures and (energy == 0.0 or not any(entries.values.any() for entries in modules.values())):
        raise ConfigError("the adapters cancel out under these weights, so nothing would be left to apply")
    parents = sorted({name.rpartition(".")[0] for name in saved})
    first = next(iter(adapters.values())).config
    config = SdctConfig(
        target_modules=list(modules) or parents,
        n_coefficients=max((entries.n for entries in modules.values()), default=1),
        selection="top",
        modules_to_save=parents or None,
        task_type=task,
        base_model_name_or_path=first.base_model_name_or_path,
    )
    report = CombinationReport(
        weights=tuple(float(weight) for weight in weights),
        saved_weights=saved_weights,
        modules=figures,
        saved=tuple(saved),
        energy=energy,
        retained_energy=sum(m.energy * m.retained_energy for m in figures.values()) / energy if energy else 1.0,
    )
    return Combination(SdctAdapter(config, modules, saved, *hashed, record), report)


def _sum(
    path: str, adapters: Mapping[str, SdctAdapter], weights: Sequence[float], n: int | None
) -> tuple[SdctEntries, CombinedModule]:
    """The summed coefficients of one module, float64 inside and rounded once."""
    parts = [
        (name, adapter.modules[path], weight * adapter.config.scaling)
        for (name, adapter), weight in zip(adapters.items(), weights, strict=True)
        if path in adapter.modules
    ]
    shapes = {entries.shape: name for name, entries, _ in parts if entries.shape is not None}
    if len(shapes) > 1:
        (one, first), (other, second), *_ = shapes.items()
        raise BaseMismatchError(
            f"module {path!r} is {one[0]} x {one[1]} in {first} and {other[0]} x {other[1]} in {second}; combine "
            "adapters of one base"
        )
    keys = np.concatenate([e.indices[:, 0].astype(np.int64) << 32 | e.indices[:, 1] for _, e, _ in parts])
    values = np.concatenate([e.values.astype(np.float64) * factor for _, e, factor in parts])
    places, where = np.unique(keys, return_inverse=True)
    summed = np.zeros(len(places))
    np.add.at(summed, where.reshape(-1), values)
    energy = float(np.sum(summed**2))
    kept = np.arange(len(places))
    if n is not None and n < len(places):
        kept = np.sort(np.argsort(-np.abs(summed), kind="stable")[:n])
    with np.errstate(over="ignore"):
        stored = summed[kept].astype(np.float32)
    if not np.isfinite(stored).all():
        raise ConfigError(f"the sum for module {path!r} is beyond the range of float32; use smaller weights")
    indices = np.stack([places[kept] >> 32, places[kept] & 0xFFFFFFFF], axis=1).astype(np.int32)
    share = float(np.sum(summed[kept] ** 2)) / energy if energy else 1.0
    entries = SdctEntries(stored, indices, next(iter(shapes), None))
    return entries, CombinedModule(len(kept), len(places), energy, min(1.0, share))


def _average(
    adapters: Mapping[str, SdctAdapter], weights: Sequence[float]
) -> tuple[dict[str, Array], tuple[float, ...] | None]:
    """The parameters saved in full, averaged: they stand in place of the base's and do not add to it."""
    shapes = {name: {key: array.shape for key, array in adapter.saved.items()} for name, adapter in adapters.items()}
    (first, expected), *others = shapes.items()
    for other, found in others:
        for key in sorted(set(expected) ^ set(found)):
            has, lacks = (first, other) if key in expected else (other, first)
            raise ConfigError(
                f"{has} saves {key!r} in full and {lacks} does not: a head cannot be averaged with none; combine "
                "adapters that save the same modules"
            )
        for key, shape in expected.items():
            if found[key] != shape:
                raise ConfigError(
                    f"{key!r} is {list(shape)} in {first} and {list(found[key])} in {other}: heads of different "
                    "sizes cannot be averaged; combine adapters of one task"
                )
    if not expected:
        return {}, None
    total = math.fsum(weights)
    if abs(total) <= 1e-6 * sum(map(abs, weights)):
        raise ConfigError(
            "the weights sum to 0, so the modules saved in full have no average; choose weights with another sum"
        )
    shares = tuple(weight / total for weight in weights)
    saved = {}
    for key in sorted(expected):
        arrays = [adapter.saved[key] for adapter in adapters.values()]
        mean = sum(share * array.astype(np.float64) for share, array in zip(shares, arrays, strict=True))
        with np.errstate(over="ignore"):
            saved[key] = np.asarray(mean).astype(
                arrays[0].dtype if len({a.dtype for a in arrays}) == 1 else np.float32
            )
    return saved, shares


def _identity(adapters: Mapping[str, SdctAdapter], same_base: bool) -> tuple[str | None, str | None]:
    """Hash of the base and its dtype, as all adapters record it; nothing where one of them does not know its base."""
    known = {name: a for name, a in adapters.items() if a.base_hash is not None}
    if same_base or not known:
        return None, None
    (first, one), *others = known.items()
    for other, two in others:
        if one.modules.keys() != two.modules.keys() or one.base_dtype != two.base_dtype:
            raise BaseMismatchError(
                f"{first} and {other} adapt different modules or were trained in different types, so their files "
                "alone cannot tell whether they have the same base; give the base (--model BASE, base=...)"
            )
        if one.base_hash != two.base_hash:
            raise BaseMismatchError(
                f"{first} and {other} were trained on different base weights ({str(one.base_hash)[:19]}... and "
                f"{str(two.base_hash)[:19]}...); combine adapters of one base"
            )
    everywhere = {path for adapter in adapters.values() for path in adapter.modules} == set(one.modules)
    return (one.base_hash, one.base_dtype) if len(known) == len(adapters) and everywhere else (None, None)


def _record(adapters: Mapping[str, SdctAdapter]) -> TrainingRecord | None:
    """What the adapters agree on; no probe, since the combination never ran."""
    records = {name: a.trained_on for name, a in adapters.items() if a.trained_on is not None}
    if not records:
        return None
    model_class = _common("model class", {name: record.model_class for name, record in records.items()})
    fresh = _common(
        "list of parameters that the checkpoint lacks", {n: r.fresh_parameters for n, r in records.items()}
    )
    labels = _common("list of labels", {name: record.id2label for name, record in records.items()})
    assert model_class is not None
    configs = {name: r.model_config for name, r in records.items() if r.model_config is not None}
    first = next(iter(configs), "")
    for name, config in configs.items():
        for field, (one, other) in config_differences(configs[first], config).items():
            raise BaseMismatchError(
                f"{first} and {name} were trained with another {field} in the model's configuration ({one!r} and "
                f"{other!r}); combine adapters of one model"
            )
    return TrainingRecord(model_class, fresh, labels, None, configs.get(first), _weights(records))


def _weights(records: Mapping[str, TrainingRecord]) -> Weights | None:
    """Checksums of what no adapter changes, which must be alike; None where they were taken in different types."""
    known = {name: record.weights for name, record in records.items() if record.weights is not None}
    first = next(iter(known), "")
    for name, weights in known.items():
        if weights.dtype != known[first].dtype:
            return None
        if known[first].differing(weights.sums):
            raise BaseMismatchError(
                f"{first} and {name} were trained on bases with other weights beside the adapted ones; combine "
                "adapters of one base"
            )
    if len(known) < len(records):
        return None
    common = set.intersection(*(set(weights.sums) for weights in known.values()))
    return Weights(known[first].dtype, {key: known[first].sums[key] for key in sorted(common)})


def _common(what: str, values: Mapping[str, _T | None]) -> _T | None:
    """The one value of all that are known. Raises `BaseMismatchError` where two differ."""
    known = {name: value for name, value in values.items() if value is not None}
    for name, value in known.items():
        first = next(iter(known))
        if value != known[first]:
            raise BaseMismatchError(
                f"{first} and {name} record another {what} ({known[first]} and {value}); combine adapters of one model"
            )
    return next(iter(known.values()), None)
