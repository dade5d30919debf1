"""Combining adapters of one base into one: averages, sums and differences, exact or the best few coefficients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter.adapter import SdctAdapter
from ..adapter.combination import Combination, combine_adapters
from ..errors import ConfigError

if TYPE_CHECKING:  # without a base numpy suffices
    from torch import nn


def combine(
    adapters: Sequence[SdctAdapter | str | Path],
    weights: Sequence[float] | None = None,
    *,
    n_coefficients: int | None = None,
    base: nn.Module | str | Path | None = None,
    model_class: str | None = None,
) -> Combination:
    """One adapter with `dW = sum_i weight_i dW_i` from several of the same base.

    The sum is exact on the union of the coefficients, whatever their numbers, modules and `scaling`; with
    `n_coefficients` each matrix keeps the largest of it. Modules saved in full (heads) stand in place of the base's
    and are averaged, with `weight_i / sum of weights`. With `weights` that sum to 1 this is federated averaging.

    Args:
        adapters: adapters or their folders.
        weights: one for each; None is 1 for each, the plain sum.
        n_coefficients: most coefficients per matrix; None keeps all of the union.
        base: the base (in memory, or its checkpoint folder). With it the adapters are compared with it, and the
            combination records what it computes on it (a training probe). Without it no probe is recorded, and
            adapters whose files cannot show that they have one base (they adapt different modules) are refused.
        model_class: `MODULE:CLASS` of the base, where it is a folder and the class one of your own.

    Returns:
        The adapter, with `scaling` 1 and float32 values, and the report.

    Raises:
        AdapterFormatError: a folder is damaged.
        BaseMismatchError: base weights, class, labels or task of two adapters differ, or of an adapter and `base`.
        ConfigError: weights that cannot work, adapters that cancel out, or heads that cannot be averaged.
    """
    if isinstance(adapters, SdctAdapter | str | Path) or not adapters:
        raise ConfigError("give a list of adapters to combine, at least one")
    if weights is None:
        weights = [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights; give one weight for each adapter")
    named = {}
    for i, adapter in enumerate(adapters):
        name = f"adapter {i + 1}" if isinstance(adapter, SdctAdapter) else str(adapter)
        named[name if name not in named else f"{name} ({i + 1})"] = (
            adapter if isinstance(adapter, SdctAdapter) else SdctAdapter.load(adapter)
        )
    if base is None:
        return combine_adapters(named, weights, n_coefficients=n_coefficients)
    return _on_base(named, weights, n_coefficients, base, model_class)


def _on_base(
    named: dict[str, SdctAdapter],
    weights: Sequence[float],
    n_coefficients: int | None,
    base: nn.Module | str | Path,
    model_class: str | None,
) -> Combination:
    """The combination, each adapter compared with the base, and what it computes there recorded."""
    from torch import nn

    from ..base.checkpoint import load_sized
    from ..base.model import check_base
    from ..base.training import check_record, class_of
    from .model import SdctModel

    combined, report = combine_adapters(named, weights, n_coefficients=n_coefficients, same_base=True)
    if not isinstance(base, nn.Module):
        shapes = {name: array.shape for name, array in combined.saved.items()}
        base = load_sized(base, combined.config.task_type, shapes, model_class=class_of(named, model_class))
    for name, adapter in named.items():
        check_base(adapter, base, label=name)
        check_record(adapter, base, label=name)
    recorded = SdctModel.from_adapter(base, combined).adapter()
    return Combination(dataclasses.replace(recorded, config=combined.config), report)
