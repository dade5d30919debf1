"""`sdct_bundle.json`: what an exported folder holds. json and numpy only: running a bundle needs no torch, no onnx.

model.onnx (+ model.onnx.data)   the graph; sdct_bundle.json describes it
adapters/<name>/                 adapter folders exported along with it; a merged export has none
adapters/<name>.onnx_adapter     the same for ONNX Runtime's own adapter API
probe.safetensors                torch outputs on fixed inputs, recorded at export, for `sdct-export verify`
tokenizer and config files       of the base, so that the folder can be served by itself; of a SentenceTransformer
                                 also how it prepares texts
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter.entries import DTYPE_NAMES
from ..adapter.folder import CONFIG_FILE, TRAINED_ON_FILE, TRAINING_FILE, WEIGHTS_FILE
from ..adapter.training import TOLERANCES, TrainingProbe
from ..contract import MARGIN, TARGETS, Cache, Foreign, Group, Head, Quantization
from ..errors import AdapterFormatError, ConfigError, VerificationError
from ..files import check_adapter_name, open_input, read_json

BUNDLE_FILE = "sdct_bundle.json"
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
ADAPTERS_FOLDER = "adapters"
PROBE_FILE = "probe.safetensors"
BUNDLE_VERSION = 1
MAX_BUNDLE_BYTES = 16 << 20
MAX_CACHE = 1 << 14  # layers of a cache, its heads, or the size of one
_AGAIN = "export the bundle again"
TENSOR_DTYPES = (*DTYPE_NAMES, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: name, numpy dtype name, shape of ints and symbolic names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class AdapterRecord:
    """An adapter shipped in the bundle: `adapter_sha256` of its folder, and its label count where it has a head."""

    sha256: str
    labels: int | None = None


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The description of an exported folder.

    `kind` is `multi` or `merged`; `base_hash` is `adapter.base_hash` over all modules of `groups` (multi) with weights
    cast to `base_hash_dtype`; `module_digests` (dtype name -> module -> digest, from `base.model_digests`) lets an
    adapter's own base hash be compared when it is loaded later; `inputs` are the model's own, without the adapter
    inputs; `model_sha256` is of `model.onnx` itself, `data_sha256` of the weights in `model.onnx.data`,
    `training_sha256` of what a merged bundle holds of its adapter's training; `model_class` (`MODULE:CLASS`) and
    `model_config` are those of the base, None in a bundle that an older version wrote; `weights` (dtype name ->
    CRC-32 of a name -> checksum) lets an adapter's training record be compared; `max_tokens` is how many tokens
    a row may have where the base looks their positions up in a table; `pooling` says what a SentenceTransformer does
    behind the base, which alone adapters and hashes are about; `cache` describes the key-value cache of a language
    model, None for a graph without one. Its inputs and outputs, `position_ids` and `last_logits` (see `contract`) come
    to those of the graph; `inputs` and `outputs` are what one call without a past takes and gives. `quantization` is
    how the linear layers of the base are quantized, None where they are not; hashes and digests are those of the float
    base all the same. `foreign` is set where another tool made the graph, which may be quantized in its own way, and
    of the base's outputs may give only some.
    """

    kind: str
    task: str
    dtype: str
    base_name: str
    base_architecture: str
    base_hash: str
    base_hash_dtype: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    model_sha256: str
    groups: tuple[Group, ...] = ()
    heads: tuple[Head, ...] = ()
    adapters: Mapping[str, AdapterRecord] = dataclasses.field(default_factory=dict)
    module_digests: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    data_sha256: str | None = None
    training_sha256: str | None = None
    model_class: str | None = None
    model_config: Mapping[str, Any] | None = None
    weights: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    max_tokens: int | None = None
    pooling: tuple[str, ...] = ()
    cache: Cache | None = None
    quantization: Quantization | None = None
    foreign: Foreign | None = None
    path: Path = dataclasses.field(default=Path(), compare=False)

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read and validate `path/sdct_bundle.json`.

        Raises `AdapterFormatError` naming the file, the field and what to do.
        """
        folder = Path(path)
        if not os.path.isdir(folder):  # noqa: PTH112, since Path.is_dir raises for a name that is too long
            raise AdapterFormatError(f"there is no folder {folder}; give the folder of an exported bundle")
        file = folder / BUNDLE_FILE
        if not os.path.lexists(file):
            raise AdapterFormatError(f"{folder} is no bundle: {BUNDLE_FILE} is missing; export one with sdct-export")
        raw = read_json(file, MAX_BUNDLE_BYTES, AdapterFormatError, _AGAIN, unique=True)
        version = raw.pop("format_version", None)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise AdapterFormatError(f"{file}: format_version must be a positive integer, got {version!r}")
        if version > BUNDLE_VERSION:
            raise AdapterFormatError(
                f"{file}: format_version {version} is newer than this version reads ({BUNDLE_VERSION}); "
                "upgrade sdct_export"
            )
        try:
            return cls(**_parse(raw), path=folder)
        except (TypeError, KeyError, ValueError, AttributeError, ConfigError) as error:
            raise AdapterFormatError(f"{file}: damaged description ({error}); export the bundle again") from error

    def write(self, folder: Path) -> None:
        """Write `sdct_bundle.json` into `folder`."""
        raw = {"format_version": BUNDLE_VERSION} | dataclasses.asdict(self)
        del raw["path"]
        (folder / BUNDLE_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL_FILE

    def adapter_path(self, name: str) -> Path:
        """Folder of a shipped adapter."""
        return self.path / ADAPTERS_FOLDER / name

    def training_limit(self, dtype: str) -> float:
        """How far the outputs may be from those that a model in `dtype` gave in training, in `training.gap`'s measure.

        What two types may differ by, and for a quantized bundle `MARGIN` times what quantization changed at export.
        """
        changed = 0.0 if self.loss is None else MARGIN * self.loss.change
        return max(TOLERANCES[dtype], TOLERANCES[self.dtype]) + changed

    @property
    def loss(self) -> Quantization | Foreign | None:
        """What says how much the graph's numbers change the base's outputs, None where they are the base's own."""
        return self.foreign if self.quantization is None else self.quantization

    def comparable(self, probe: TrainingProbe) -> TrainingProbe:
        """`probe` with those of its outputs that the graph gives: another tool may have left some out."""
        if self.foreign is None:
            return probe
        given = {spec.name for spec in self.outputs} & probe.outputs.keys()
        outputs = {name: probe.outputs[name] for name in given}
        return dataclasses.replace(probe, outputs=outputs, shapes={name: probe.shapes[name] for name in given})

    def check_model(self) -> None:
        """Refuse a model that is not the one described, and anything in the folder that reading would wait for.

        Only the graph is hashed, not the weights in `model.onnx.data`, which `verify` does.

        Raises:
            AdapterFormatError: `model.onnx` is missing, or something in the folder is neither a file nor a folder.
            VerificationError: `model.onnx` has another hash than the recorded one.
        """
        for place, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(OSError):
                    if not stat.S_ISREG(os.stat(os.path.join(place, name)).st_mode):  # noqa: PTH116, PTH118, for speed
                        raise AdapterFormatError(
                            f"{Path(place, name)} is neither a file nor a folder; {_AGAIN}, or remove it"
                        )
        if file_sha256(self.model_path) != self.model_sha256:
            raise VerificationError(
                f"{self.model_path} differs from what was exported (sha256 mismatch); copy it again or {_AGAIN}"
            )

    def check_adapter(self, name: str) -> None:
        """Raise `VerificationError` unless the files of a shipped adapter still have their recorded hash."""
        if adapter_sha256(self.adapter_path(name)) != self.adapters[name].sha256:
            raise VerificationError(
                f"{self.adapter_path(name)}: adapter {name!r} differs from what was exported (sha256 mismatch); "
                "export the bundle again, or load the changed adapter by its own path"
            )


def adapter_sha256(folder: Path) -> str:
    """sha256 over an adapter folder's files, each preceded by its length."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE, *([TRAINING_FILE] if os.path.lexists(folder / TRAINING_FILE) else [])):
        _hash_file(digest, folder / name, with_length=True)
    return digest.hexdigest()


def training_sha256(folder: Path) -> str | None:
    """sha256 over the training record that a merged bundle holds, None where it holds none."""
    if not os.path.lexists(folder / TRAINED_ON_FILE):
        return None
    digest = hashlib.sha256()
    for name in (TRAINED_ON_FILE, *([TRAINING_FILE] if os.path.lexists(folder / TRAINING_FILE) else [])):
        _hash_file(digest, folder / name, with_length=True)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces. Raises `AdapterFormatError` where it cannot be read."""
    digest = hashlib.sha256()
    _hash_file(digest, path)
    return digest.hexdigest()


def _hash_file(digest: Any, path: Path, *, with_length: bool = False) -> None:
    with open_input(path, AdapterFormatError, f"copy the whole bundle, or {_AGAIN}") as (file, size):
        if with_length:
            digest.update(size.to_bytes(8, "little"))
        while size > 0 and (piece := file.read(min(size, 1 << 22))):
            digest.update(piece)
            size -= len(piece)


def _parse(raw: dict[str, Any]) -> dict[str, Any]:
    fields = dict(raw)
    for name in ("kind", "task", "dtype", "base_architecture", "base_hash", "base_hash_dtype"):
        _text(raw[name], name)
    if not isinstance(raw["base_name"], str):  # a path may hold what is no text
        raise ValueError(f"base_name must be a string, got {raw['base_name']!r}")
    _text(raw["model_sha256"], "model_sha256")
    for name in ("data_sha256", "training_sha256", "model_class"):
        if (raw[name] if name == "data_sha256" else raw.get(name)) is not None:
            _text(raw[name], name)
    for sums in raw.get("weights", {}).values():
        if not all(key.isdecimal() and len(key) < 11 and isinstance(value, int) for key, value in sums.items()):
            raise ValueError("weights must map numbers of names to checksums")
    if not isinstance(raw.get("model_config"), dict | None):
        raise ValueError("model_config must be an object or null")
    if raw.get("max_tokens") is not None:
        _size(raw["max_tokens"], "max_tokens")
    if raw["kind"] not in ("multi", "merged"):
        raise ValueError(f"kind must be multi or merged, got {raw['kind']!r}")
    for name in ("dtype", "base_hash_dtype"):
        if raw[name] not in DTYPE_NAMES:
            raise ValueError(f"{name} must be one of {', '.join(DTYPE_NAMES)}, got {raw[name]!r}")
    for name in ("inputs", "outputs"):
        fields[name] = tuple(_tensor(s) for s in raw[name])
    fields["pooling"] = tuple(_text(step, "pooling") for step in raw.get("pooling", ()))
    fields["cache"] = None if raw.get("cache") is None else _cache(raw["cache"])
    fields["quantization"] = _quantization(raw.get("quantization"))
    fields["foreign"] = _foreign(raw.get("foreign"))
    fields["groups"] = tuple(_group(g) for g in raw["groups"])
    fields["heads"] = tuple(
        Head(_text(h["module"], "head"), _size(h["d_out"], "d_out"), _size(h["d_in"], "d_in")) for h in raw["heads"]
    )
    fields["adapters"] = {check_adapter_name(n): _adapter(record) for n, record in raw["adapters"].items()}
    for dtype in DTYPE_NAMES if fields["groups"] else ():
        for module in (m for group in fields["groups"] for m in group.modules):
            if not isinstance(digest := raw["module_digests"][dtype][module], str) or not digest.isascii():
                raise ValueError(f"module_digests has no {dtype} digest of module {module!r}")
    return fields


def _quantization(raw: dict[str, Any] | None) -> Quantization | None:
    if raw is None:
        return None
    found = Quantization(**{**raw, "modules": tuple(_text(module, "module") for module in raw["modules"])})
    _check_loss(found)
    return found


def _foreign(raw: dict[str, Any] | None) -> Foreign | None:
    if raw is None:
        return None
    found = Foreign(**raw)
    _text(found.producer, "producer")
    _check_loss(found)
    return found


def _check_loss(found: Quantization | Foreign) -> None:
    for name in ("rounding", "change"):
        value = getattr(found, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{type(found).__name__.lower()}: {name} must be a number from 0 on, got {value!r}")


def _tensor(raw: dict[str, Any]) -> TensorSpec:
    for extent in raw["shape"]:
        if isinstance(extent, bool) or not isinstance(extent, int | str):
            raise ValueError(f"a shape holds integers and names, got {extent!r}")
    if raw["dtype"] not in TENSOR_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(TENSOR_DTYPES)}, got {raw['dtype']!r}")
    return TensorSpec(_text(raw["name"], "name"), raw["dtype"], tuple(raw["shape"]))


def _cache(raw: dict[str, Any]) -> Cache:
    cache = Cache(**raw | {"windows": tuple(_size(window, "window") for window in raw["windows"])})
    for name in ("layers", "kv_heads", "head_size"):
        if _size(getattr(cache, name), name) > MAX_CACHE:
            raise ValueError(f"the {name} of a cache are at most {MAX_CACHE}, got {getattr(cache, name)}")
    if cache.target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {cache.target!r}")
    if not isinstance(cache.foreign, bool) or not isinstance(cache.position_ids, bool):
        raise ValueError("foreign and position_ids of a cache must be true or false")
    if cache.dtype not in DTYPE_NAMES:
        raise ValueError(f"the dtype of a cache must be one of {', '.join(DTYPE_NAMES)}, got {cache.dtype!r}")
    return cache


def _group(raw: dict[str, Any]) -> Group:
    group = Group(
        _text(raw["name"], "group"),
        tuple(_text(module, "module") for module in raw["modules"]),
        _size(raw["d_in"], "d_in"),
        tuple(_size(d, "d_out") for d in raw["d_out"]),
        tuple(_size(c, "capacity") for c in raw["capacity"]),
    )
    if not group.modules or not len(group.modules) == len(group.d_out) == len(group.capacity):
        raise ValueError(f"group {group.name!r} needs one d_out and one capacity for each of its modules")
    for module, d_out, capacity in zip(group.modules, group.d_out, group.capacity, strict=True):
        if capacity > d_out * group.d_in:
            raise ValueError(f"capacity {capacity} exceeds the {d_out} x {group.d_in} of module {module!r}")
    return group


def _adapter(raw: dict[str, Any]) -> AdapterRecord:
    record = AdapterRecord(**raw)
    _text(record.sha256, "sha256")
    if record.labels is not None:
        _size(record.labels, "labels")
    return record


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, got {value!r}")
    value.encode("utf-8")  # lone surrogates raise a ValueError here rather than where the name is hashed
    return value


def _size(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ValueError(f"{what} must be a positive integer below 2^31, got {value!r}")
    return value
