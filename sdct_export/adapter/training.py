"""What an adapter was trained on: class, parameters without a checkpoint, and outputs that every later step must give.

`adapter_config.json` holds it as `trained_on`; the numbers lie beside it in `training_probe.safetensors`:

    input.<name>     an input of the probe, integers `[batch, ...]`
    formula.<name>   int64: the shape of a float input, which is `formula(shape)` and needs no file
    output.<name>    float32 `[m]`, m <= 256: what the adapted model gave, at `positions(shape)` of the flat output
    shape.<name>     int64: the output's full shape
    weights.<dtype>  int64 `[k, 2]`: CRC-32 of a name and checksum of the tensor of that name, in `dtype`, for what the
                     base holds and the adapter leaves as it is

numpy only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import AdapterFormatError, BaseMismatchError
from .entries import DTYPE_NAMES, Array

MAX_SAMPLE = 256
MAX_ELEMENTS = 1 << 22  # of an input; an image of 3 x 1024 x 1024 has 3 << 20
TEXT_INPUTS, FLOAT_INPUTS = ("input_ids", "attention_mask"), ("pixel_values",)
_FIELDS = {"model_class", "fresh_parameters", "id2label", "dtype"}
_LATER_FIELDS = {"model_config"}  # absent from what older versions wrote
# fields of a configuration that do not change what a model computes in eval mode, or are compared otherwise
_NO_MATTER = {
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "finetuning_task", "gradient_checkpointing",
    "id2label", "initializer_factor", "initializer_range", "label2id", "num_labels", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "task_specific_params", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers_version", "use_cache",
}  # fmt: skip
# largest |got - want| over half the spread of what was recorded, by the type in which it was computed: a head that was
# not trained, or another base, is off by the size of the output; another device or order of sums is not
TOLERANCES = {"float64": 5e-3, "float32": 5e-3, "float16": 2e-2, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Checksums of weights that an adapter leaves as they are, CRC-32 of the name -> checksum, taken in `dtype`."""

    dtype: str
    sums: Mapping[int, int]

    def __post_init__(self) -> None:
        if self.dtype not in TOLERANCES:
            raise AdapterFormatError(f"the training record has weights in {self.dtype!r}, not one of {[*TOLERANCES]}")

    def differing(self, sums: Mapping[int, int]) -> list[int]:
        """Keys of what both hold, and differently. What only one has (a pooler that was left out) says nothing."""
        return [key for key, value in self.sums.items() if sums.get(key, value) != value]


@dataclasses.dataclass(frozen=True)
class TrainingProbe:
    """Inputs of the adapted model, and a sample of the outputs it gave for them in `dtype`."""

    dtype: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in TOLERANCES:
            raise AdapterFormatError(f"the training probe has dtype {self.dtype!r}, not one of {[*TOLERANCES]}")
        if not self.inputs or not self.outputs or self.outputs.keys() != self.shapes.keys():
            raise AdapterFormatError("the training probe lacks inputs, outputs or shapes; save the adapter again")
        for name, values in self.outputs.items():
            shape = self.shapes[name]
            if values.dtype != np.float32 or values.shape != positions(shape).shape:
                raise AdapterFormatError(f"the training probe's output {name!r} does not fit its shape {list(shape)}")
            if not np.isfinite(values).all():
                raise AdapterFormatError(f"the training probe's output {name!r} holds NaN or infinite numbers")

    def difference(self, outputs: Mapping[str, Array]) -> float:
        """Largest `max |got - want|` over half the spread of `want`, of all outputs; infinite where one is missing.

        An output may have more columns than the recorded one: a bundle of several adapters has those of the largest.
        What is given at padding does not count: a graph with a key-value cache has other numbers there than torch.
        """
        worst, mask = 0.0, self.inputs.get("attention_mask")
        for name, want in self.outputs.items():
            shape, got = self.shapes[name], outputs.get(name)
            if got is None or got.ndim != len(shape) or got.shape[:-1] != shape[:-1] or got.shape[-1] < shape[-1]:
                return math.inf
            sample = got[..., : shape[-1]].reshape(-1)[positions(shape)].astype(np.float64)
            if mask is not None and len(shape) > 2 and shape[:2] == mask.shape:
                token = positions(shape) // math.prod(shape[2:])
                sample, want = sample[mask.reshape(-1)[token] != 0], want[mask.reshape(-1)[token] != 0]
                if not want.size:
                    continue
            worst = max(worst, gap(sample, want))
        return worst


def gap(got: Array, want: Array) -> float:
    """`max |got - want|` over half the spread of `want`, infinite where `got` is not finite."""
    largest = float(np.abs(got - want).max())
    # half the spread is the size of numbers around 0; of those around an offset it is what they say
    size = max(float(np.ptp(want)) / 2, 1e-3 * float(np.abs(want).max()), 1e-3)
    return largest / size if math.isfinite(largest) else math.inf


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """What an adapter was trained on.

    Args:
        model_class: `transformers:NAME`, or `MODULE:NAME` of a class of one's own.
        fresh_parameters: parameters that the base's checkpoint did not hold, None where that is not known. The adapter
            saves all of them: nobody else has them.
        id2label: names of the labels in their order, None where they have none.
        model_config: the model's configuration as it was when the adapter was saved, None where it has none.
        weights: checksums of the base's weights beside those of the adapter, None where they are not known.
        probe: what the adapted model computed, None where it could not be run.
    """

    model_class: str
    fresh_parameters: tuple[str, ...] | None = None
    id2label: tuple[str, ...] | None = None
    probe: TrainingProbe | None = None
    model_config: Mapping[str, Any] | None = None
    weights: Weights | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields of `trained_on`, JSON-ready, without the probe's numbers."""
        labels = self.id2label
        fields: dict[str, Any] = {
            "model_class": self.model_class,
            "fresh_parameters": None if self.fresh_parameters is None else list(self.fresh_parameters),
            "id2label": None if labels is None else {str(i): label for i, label in enumerate(labels)},
            "dtype": None if self.probe is None else self.probe.dtype,
        }
        return fields if self.model_config is None else fields | {"model_config": dict(self.model_config)}

    def tensors(self) -> dict[str, Array]:
        """The tensors of `training_probe.safetensors`; none without a probe and weights."""
        tensors: dict[str, Array] = {}
        if self.weights is not None:
            pairs = sorted(self.weights.sums.items())
            tensors[f"weights.{self.weights.dtype}"] = np.array(pairs, np.int64).reshape(-1, 2)
        if self.probe is None:
            return tensors
        for name, array in self.probe.inputs.items():
            if array.dtype.kind == "f":
                tensors[f"formula.{name}"] = np.array(array.shape, np.int64)
            else:
                tensors[f"input.{name}"] = array
        tensors |= {f"output.{name}": array for name, array in self.probe.outputs.items()}
        tensors |= {f"shape.{name}": np.array(shape, np.int64) for name, shape in self.probe.shapes.items()}
        return tensors


def parse_record(raw: object, tensors: Mapping[str, Array] | None) -> TrainingRecord:
    """The record from its JSON fields and the tensors of the probe, None where there is no such file.

    Raises:
        AdapterFormatError: without the file's name, which the caller knows.
    """
    if not isinstance(raw, dict) or set(raw) - _LATER_FIELDS != _FIELDS:
        raise AdapterFormatError(f"trained_on must hold {', '.join(sorted(_FIELDS))}; save the adapter again")
    name, fresh, labels, dtype = raw["model_class"], raw["fresh_parameters"], raw["id2label"], raw["dtype"]
    if not isinstance(name, str) or not all(part and part.isprintable() for part in name.partition(":")):
        raise AdapterFormatError(f"trained_on: model_class must be MODULE:CLASS, got {name!r}")
    if fresh is not None and not (isinstance(fresh, list) and all(isinstance(p, str) for p in fresh)):
        raise AdapterFormatError(f"trained_on: fresh_parameters must be a list of names or null, got {fresh!r}")
    if labels is not None:
        keys = [str(i) for i in range(len(labels))] if isinstance(labels, dict) else None
        if not keys or sorted(labels) != sorted(keys) or not all(map(_is_text, labels.values())):
            raise AdapterFormatError('trained_on: id2label must map "0", "1", ... to names, or be null')
        labels = tuple(labels[key] for key in keys)
    config = raw.get("model_config")
    if config is not None and not (isinstance(config, dict) and _is_shallow(config, 8)):
        raise AdapterFormatError("trained_on: model_config must be the object that transformers writes, or null")
    tensors, weights = _split_weights(tensors or {})
    if (dtype is None) == bool(tensors):
        raise AdapterFormatError("trained_on and the training probe do not belong together; copy the whole folder")
    probe = _parse_probe(dtype, tensors) if tensors else None
    return TrainingRecord(name, None if fresh is None else tuple(fresh), labels, probe, config, weights)


def _split_weights(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], Weights | None]:
    """The tensors of the probe, and the weights beside them."""
    rest = {name: array for name, array in tensors.items() if not name.startswith("weights.")}
    found = [(name.partition(".")[2], array) for name, array in tensors.items() if name not in rest]
    if not found:
        return rest, None
    dtype, pairs = found[0]
    if len(found) > 1 or pairs.dtype != np.int64 or pairs.ndim != 2 or pairs.shape[1] != 2:
        raise AdapterFormatError("the training record holds weights that are no int64 [k, 2]; save the adapter again")
    return rest, Weights(dtype, dict(pairs.tolist()))


def config_differences(want: Mapping[str, Any], got: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields in which two configurations of a model differ so that it may compute something else: name -> both values.

    Configurations that different versions of transformers wrote are compared in the fields that both have.
    """
    same_version = want.get("transformers_version") == got.get("transformers_version")
    names = sorted(set(want) | set(got) if same_version else set(want) & set(got))
    found: dict[str, tuple[Any, Any]] = {}
    for name in names:
        if name in _NO_MATTER or name.startswith("_") or "drop" in name:  # dropout, pdrop, layerdrop, drop_path_rate
            continue
        one, other = want.get(name), got.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= {f"{name}.{inner}": pair for inner, pair in config_differences(one, other).items()}
        elif one != other:
            found[name] = (one, other)
    return found


def check_class(trained: TrainingRecord, found: str, *, label: str = "the adapter") -> None:
    """Raise `BaseMismatchError` where an adapter was trained on another class than `found`, a `class_name`."""
    module, _, name = trained.model_class.partition(":")
    other, _, got = found.partition(":")
    # a script run as __main__ is a module of another name elsewhere
    renamed = "__main__" in (module, other) and "transformers" not in (module, other)
    if name != got or not (module == other or renamed):
        own = module != "transformers"
        way = f"pass --model-class {trained.model_class} (model_class={trained.model_class!r}) or the live model"
        raise BaseMismatchError(
            f"{label} was trained on {name} of {module}, this base is a {got}; "
            + (way if own else f"load the base as {name}")
        )


def _parse_probe(dtype: str, tensors: Mapping[str, Array]) -> TrainingProbe:
    parts: dict[str, dict[str, Array]] = {"input": {}, "formula": {}, "output": {}, "shape": {}}
    for name, array in tensors.items():
        kind, dot, rest = name.partition(".")
        if kind not in parts or not dot or not rest:
            raise AdapterFormatError(f"the training probe holds an unknown tensor {name!r}")
        parts[kind][rest] = array
    shapes = {name: _shape(name, array) for name, array in parts["shape"].items()}
    inputs = dict(parts["input"])
    sizes = {array.shape for array in inputs.values()}
    good = all(array.dtype == np.int64 and array.ndim == 2 and (array >= 0).all() for array in inputs.values())
    good = good and len(sizes) <= 1 and all(0 < math.prod(size) <= MAX_SAMPLE for size in sizes)
    if not good or not set(inputs) <= set(TEXT_INPUTS):
        raise AdapterFormatError(
            f"the training probe's inputs must be {' and '.join(TEXT_INPUTS)}, int64 [batch, tokens]"
        )
    for name, array in parts["formula"].items():
        shape = _shape(name, array)
        if name not in FLOAT_INPUTS or math.prod(shape) > MAX_ELEMENTS:
            raise AdapterFormatError(f"the training probe's input {name!r} of shape {list(shape)} is none it can have")
        inputs[name] = formula(shape)
    return TrainingProbe(dtype, inputs, parts["output"], shapes)


def formula(shape: tuple[int, ...]) -> Array:
    """Numbers in [-1, 1) that are the same everywhere: `(i * 2654435761 mod 2^32) / 2^31 - 1`, i from 1, float32."""
    return (scattered(math.prod(shape)) / 2.0**31 - 1).astype(np.float32).reshape(shape)


def scattered(count: int) -> Array:
    """`i * 2654435761 mod 2^32` (the golden ratio's multiplicative hash) for i from 1 to `count`, int64."""
    return (np.arange(1, count + 1, dtype=np.int64) * 2654435761) % 2**32


def positions(shape: tuple[int, ...]) -> Array:
    """Flat positions of an evenly strided sample of at most `MAX_SAMPLE` elements, int64 `[m]`."""
    size = math.prod(shape)
    return np.arange(0, size, max(1, math.ceil(size / MAX_SAMPLE)), dtype=np.int64)


def _shape(name: str, array: Array) -> tuple[int, ...]:
    good = array.dtype == np.int64 and array.ndim == 1 and 1 <= array.size <= 8 and (array > 0).all()
    if not good or math.prod(map(int, array)) > 1 << 28:
        raise AdapterFormatError(f"the training probe's shape of {name!r} is none; save the adapter again")
    return tuple(map(int, array))


def _is_shallow(value: object, levels: int) -> bool:
    """Whether JSON is nested at most so deep, so that comparing it cannot exhaust the stack."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


assert set(TOLERANCES) == set(DTYPE_NAMES)
