"""What torch computes for an exported graph, written as the bundle's probe. Only exports need it, and torch.

**Quantized bundles** are compared with torch on the weights that their products see, so that what is left is rounding:
none but that of float32 at `accuracy_level` 1, and that of the products' inputs at level 4. How far the latter moves
the outputs is computed here, and so is how far all of it moves them from the float model's, on these inputs and on
those of training probes. `verify` and the check of adapters at load take their limits from these numbers, times
`contract.MARGIN`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..adapter.adapter import SdctAdapter
from ..adapter.entries import Array
from ..adapter.training import gap
from ..base.model import to_numpy
from ..base.reference import run_adapted, run_model, run_rows, sample_inputs
from ..base.training import probe_inputs
from ..contract import ATTENTION_MASK, MARGIN, Foreign, Quantization
from ..errors import BaseMismatchError
from ..foreign.seen import Seen
from ..graph.quantization import QuantizedLayers
from .description import PROBE_FILE, Bundle
from .probe import Case, Probe, Row, difference, label_padding, sample_indices, without_padding

PROBED_ADAPTERS = 8
BLUNT = 0.5  # a limit beyond which the check at load finds little: another head or base is off by about 1

Outputs = Mapping[str, Array]


def record_probe(model: nn.Module, named: Mapping[str, SdctAdapter], folder: Path, seen: Seen | None = None) -> None:
    """Write what torch computes in float32 for base rows, each adapter, a mixed batch and a blend.

    Of a bundle that is quantized or of another tool's graph the description gets `rounding` and `change` (see
    `contract.Quantization`).

    Args:
        model: what was exported, float32; a quantized bundle's changes it.
        named: the adapters of the bundle, of which the first 8 are recorded.
        folder: where graph and description were written.
        seen: what was found in another tool's graph.

    Raises:
        BaseMismatchError: torch computes NaN or infinite numbers.
    """
    named = dict(list(named.items())[:PROBED_ADAPTERS])
    inputs = sample_inputs(model, batch=3, sequence=16, seed=1)
    plans = _plans(list(named), len(next(iter(inputs.values()))))

    described = Bundle.load(folder)
    given = {name: to_numpy(value) for name, value in inputs.items()}

    names = {spec.name for spec in described.outputs}

    def computed() -> dict[str, Outputs]:
        found: dict[str, Outputs] = {}
        for case, rows in plans.items():
            outputs = run_rows(model, inputs, rows, named)
            arrays = {name: to_numpy(value.float()) for name, value in outputs.items() if name in names}
            found[case] = arrays if described.cache is None else without_padding(given, arrays)
        return found

    outputs = computed()
    for case, arrays in outputs.items():
        for output, array in arrays.items():
            if not np.isfinite(array).all():
                raise BaseMismatchError(
                    f"torch computes NaN or infinite numbers in {output!r} "
                    + ("of the base model" if case == "base" else f"with adapters ({case})")
                    + "; repair the weights before exporting them"
                )
    settings = described.loss
    if settings is not None:
        padding = label_padding(described)
        floats, trained = outputs, _on_training_inputs(model, named)
        sight = QuantizedLayers(settings) if isinstance(settings, Quantization) else seen
        assert sight is not None
        sight.apply(model, described.dtype)
        outputs = computed()
        with sight.rounding(model):
            rounded, changed = computed(), _on_training_inputs(model, named)
        mask = given.get(ATTENTION_MASK)
        moved = [(_seen(got, mask), _seen(want, mask)) for got, want in _pairs(rounded, floats)]
        moved += zip(changed, trained, strict=True)
        shown = ((got[np.abs(want) < padding], want[np.abs(want) < padding]) for got, want in moved)
        settings = dataclasses.replace(
            settings,
            rounding=max(difference(got, want, padding=padding) for got, want in _pairs(rounded, outputs)),
            change=max(gap(got, want) for got, want in shown),
        )
        _warn_where_blunt(settings)
        if isinstance(settings, Quantization):
            described = dataclasses.replace(described, quantization=settings)
        else:
            described = dataclasses.replace(described, foreign=settings)
        described.write(folder)
    shapes = {name: array.shape for name, array in outputs["base"].items()}
    indices = {name: sample_indices(shape) for name, shape in shapes.items()}
    cases = [
        Case(case, rows, {name: array.reshape(-1)[indices[name]] for name, array in outputs[case].items()})
        for case, rows in plans.items()
    ]
    Probe(given, tuple(cases), indices, shapes).write(folder / PROBE_FILE)


def _plans(names: list[str], batch: int) -> dict[str, tuple[Row, ...]]:
    singles: list[Row] = [(), *(((name, 1.0),) for name in names)]
    plans = {"base": [singles[0]] * batch} | {name: [((name, 1.0),)] * batch for name in names}
    if names:
        plans["mixed"] = [singles[(i + 1) % len(singles)] for i in range(batch)]
        pair = dict.fromkeys((names[0], names[-1]))  # one where there is one adapter only
        plans["blend"] = [tuple((name, 0.5) for name in pair), ((names[-1], 0.25),), ()]
    return {case: tuple(rows) for case, rows in plans.items()}


def _pairs(got: Mapping[str, Outputs], want: Mapping[str, Outputs]) -> list[tuple[Array, Array]]:
    """The outputs of all cases side by side."""
    return [(got[case][name], array) for case, arrays in want.items() for name, array in arrays.items()]


def _on_training_inputs(model: nn.Module, named: Mapping[str, SdctAdapter]) -> list[Array]:
    """All outputs of the base and of each adapter on the inputs of training probes."""
    arrays = probe_inputs(model)
    assert arrays is not None  # `sample_inputs` refuses what they do not know
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    runs = [run_model(model, inputs), *(run_adapted(model, inputs, adapter) for adapter in named.values())]
    return [_seen(to_numpy(value.float()), arrays.get(ATTENTION_MASK)) for run in runs for value in run.values()]


def _seen(array: Array, mask: Array | None) -> Array:
    """What the check at load compares of an output: all but padding."""
    return array if mask is None or array.ndim < 3 or array.shape[:2] != mask.shape else array[mask != 0]


def _warn_where_blunt(settings: Quantization | Foreign) -> None:
    if MARGIN * settings.change > BLUNT:
        warnings.warn(
            f"{settings.name} moves this model's outputs by {settings.change:.0%} of their size, so that loading an "
            "adapter hardly notices a base or head that is not the one it was trained on; "
            + (
                "measure on texts of yours with `sdct-export bench --quality`, or export with int8 or in float"
                if isinstance(settings, Quantization)
                else "use one in int8 or in float"
            ),
            stacklevel=4,
        )
