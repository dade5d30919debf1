"""`probe.safetensors`: what torch computed at export, so that `verify` needs neither torch nor the base model.

One file of tensors, no metadata:

    input.<name>                  the model's own inputs, `[batch, ...]`, shared by all cases
    cases                         uint8, a UTF-8 JSON list; item `c` is `{"name": str, "rows": [[[adapter, scale],
                                  ...], ...]}` with one list of (adapter, scale) a batch row; empty for a base row
    output.<c>.<name>             float32 `[m]`, m <= 4096: a strided sample of an output of case `c`, row-major
    index.<name>                  int64 `[m]`: the flat positions of that sample (the same in every case)
    shape.<name>                  int64: the output's full shape

Values were computed in float32 from the weights as exported: from float16 weights in a float16 bundle, and from those
that the products see in a quantized one. numpy only.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..adapter.entries import Array
from ..adapter.folder import encode_safetensors, read_safetensors
from ..contract import ATTENTION_MASK, edge_dtype
from ..errors import AdapterFormatError
from .description import Bundle

MAX_SAMPLE = 4096
Row = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """Adapters for each batch row, and the sampled outputs torch gave for them: name -> float32 `[m]`."""

    name: str
    rows: tuple[Row, ...]
    outputs: Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Probe:
    """Recorded inputs and cases; `indices` and `shapes` say where in an output the samples sit."""

    inputs: Mapping[str, Array]
    cases: tuple[Case, ...]
    indices: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, ...]]

    def sample(self, name: str, output: Array) -> Array:
        """The sampled elements of a full output, float32 `[m]`.

        Raises:
            ValueError: the output has another shape than the recorded one.
        """
        if tuple(output.shape) != self.shapes[name]:
            raise ValueError(
                f"output {name!r} has shape {tuple(output.shape)}, the probe was recorded with {self.shapes[name]}"
            )
        return output.reshape(-1)[self.indices[name]].astype(np.float32)

    def write(self, path: Path) -> None:
        """Write the file."""
        cases = [{"name": case.name, "rows": case.rows} for case in self.cases]
        tensors = {"cases": np.frombuffer(json.dumps(cases).encode(), dtype=np.uint8)}
        tensors |= {f"input.{name}": array for name, array in self.inputs.items()}
        tensors |= {f"index.{name}": array for name, array in self.indices.items()}
        tensors |= {f"shape.{name}": np.array(shape, dtype=np.int64) for name, shape in self.shapes.items()}
        for number, case in enumerate(self.cases):
            tensors |= {f"output.{number}.{name}": array for name, array in case.outputs.items()}
        path.write_bytes(encode_safetensors(tensors))

    @classmethod
    def read(cls, path: Path) -> Probe:
        """Read the file. Raises `AdapterFormatError` where it is missing or damaged."""
        tensors = read_safetensors(path)

        def below(prefix: str) -> dict[str, Array]:
            return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}

        try:
            cases = []
            for number, raw in enumerate(json.loads(tensors["cases"].tobytes())):
                rows = tuple(tuple((str(name), float(scale)) for name, scale in row) for row in raw["rows"])
                cases.append(Case(str(raw["name"]), rows, below(f"output.{number}.")))
            shapes = {name: tuple(map(int, shape)) for name, shape in below("shape.").items()}
            probe = cls(below("input."), tuple(cases), below("index."), shapes)
            if empty := [name for name, array in probe.inputs.items() if not array.size]:
                raise ValueError(f"input {empty[0]!r} is empty")
            for name, index in probe.indices.items():
                if index.dtype != np.int64 or index.min() < 0 or index.max() >= math.prod(shapes[name]):
                    raise ValueError(f"the index of output {name!r} does not fit its shape")
            for case in cases:
                for name, array in case.outputs.items():
                    if array.shape != probe.indices[name].shape:
                        raise ValueError(f"output {name!r} of case {case.name!r} does not fit its index")
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise AdapterFormatError(f"{path} is damaged ({error}); export the bundle again") from error
        return probe


def without_padding(inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs with 0 at padding, `[batch, tokens, ...]`: what a graph with a cache gives there, torch does not."""
    mask = inputs.get(ATTENTION_MASK)
    return {
        name: array if mask is None or array.shape[:2] != mask.shape else np.where(_at(mask != 0, array), array, 0)
        for name, array in outputs.items()
    }


def _at(rows: Array, array: Array) -> Array:
    return rows.reshape(*rows.shape, *(1,) * (array.ndim - rows.ndim))


def sample_indices(shape: tuple[int, ...]) -> Array:
    """Flat positions of an evenly strided sample of at most `MAX_SAMPLE` elements, int64 `[m]`."""
    size = math.prod(shape)
    return np.arange(0, size, max(1, math.ceil(size / MAX_SAMPLE)), dtype=np.int64)


def difference(got: Array, want: Array, *, padding: float = np.inf) -> float:
    """`max |got - want| / max(1, max |want|)`, infinite where shapes differ or `got` is not finite.

    Elements of `want` beyond `padding` in size are label columns a row's adapter does not have; there `got` must only
    be beyond `padding` with the same sign.
    """
    if got.shape != want.shape:
        return float("inf")
    got, want = got.astype(np.float64), want.astype(np.float64)
    padded = np.abs(want) > padding
    if (np.abs(got[padded]) <= padding).any() or (np.sign(got[padded]) != np.sign(want[padded])).any():
        return float("inf")
    got, want = got[~padded], want[~padded]
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max(initial=0.0) / np.abs(want).max(initial=1.0))


def label_padding(bundle: Bundle) -> float:
    """Size beyond which an output of `bundle` is a label column that a row's adapter does not have, see `contract`."""
    return float(np.finfo(edge_dtype(bundle.dtype)).max) / 64 if bundle.heads else float("inf")
