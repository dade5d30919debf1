"""Read and write adapter folders. The only parser of adapter files, which are untrusted input.

adapter_config.json        the fields of `SdctConfig`, `peft_type: "SDCT"`, `format_version`, and, for checks at load
                           time, `shapes` (module -> [d_out, d_in]), `base_model_hash`, `base_model_dtype`,
                           `trained_on` (see `training`)
adapter_model.safetensors  per module `<path>.sdct_values` float [n] and `<path>.sdct_indices` int32 [n, 2] (row, col);
                           parameters of `modules_to_save` under their own names
training_probe.safetensors what the adapted model gave for fixed inputs, where it was trained (see `training`)
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import AdapterFormatError, ConfigError
from ..files import new_folder
from .config import FORMAT_VERSION, PEFT_TYPE, SdctConfig
from .entries import BFLOAT16, DTYPE_NAMES, Array, SdctEntries
from .training import TrainingRecord, parse_record

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TRAINING_FILE = "training_probe.safetensors"
TRAINED_ON_FILE = "trained_on.json"  # in a merged export, which holds no adapter folder
VALUES_SUFFIX = ".sdct_values"
INDICES_SUFFIX = ".sdct_indices"
MAX_CONFIG_BYTES = 4 << 20
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format itself
MAX_WEIGHTS_BYTES = 8 << 30
MAX_PROBE_BYTES = 16 << 20

_CONFIG_FIELDS = {field.name for field in dataclasses.fields(SdctConfig)}
_FILE_FIELDS = {"peft_type", "format_version", "shapes", "base_model_hash", "base_model_dtype", "trained_on"}
# written by PEFT into every adapter_config.json; they carry nothing that changes the result
_PEFT_FIELDS = {"auto_mapping", "peft_version", "revision", "inference_mode", "library_name"}
_NUMPY_OF = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
_NUMPY_OF |= {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8)}
_NUMPY_OF |= {"U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_)}


class Contents(NamedTuple):
    """What an adapter folder says: the fields of `SdctAdapter`, in its order."""

    config: SdctConfig
    modules: Mapping[str, SdctEntries]
    saved: Mapping[str, Array]
    base_hash: str | None
    base_dtype: str | None
    trained_on: TrainingRecord | None


def read_folder(path: str | Path) -> Contents:
    """Read an adapter folder and validate its files and the entries of each module.

    Raises:
        AdapterFormatError: naming the file, the module and what to do.
    """
    folder = Path(path)
    if not os.path.isdir(folder):  # noqa: PTH112, since Path.is_dir raises for a name that is too long
        raise AdapterFormatError(
            f"{folder} is not a folder; an sDCT adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    raw = _read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    try:
        config = SdctConfig(**{key: value for key, value in raw.items() if key in _CONFIG_FIELDS})
    except ConfigError as error:
        raise AdapterFormatError(f"{folder / CONFIG_FILE}: {error}") from error
    shapes = _read_shapes(raw.get("shapes"), folder / CONFIG_FILE)
    tensors = read_safetensors(weights)
    modules: dict[str, SdctEntries] = {}
    for name in sorted(tensors):
        if not name.endswith(VALUES_SUFFIX):
            continue
        module = name.removesuffix(VALUES_SUFFIX)
        if not module:
            raise AdapterFormatError(f"{weights}: tensor {name!r} names no module; save the adapter again")
        indices = tensors.get(module + INDICES_SUFFIX)
        if indices is None:
            raise AdapterFormatError(
                f"{weights}: module {module!r} has values but no {module}{INDICES_SUFFIX}; save it again"
            )
        try:
            modules[module] = SdctEntries(tensors[name], indices, shapes.get(module))
        except AdapterFormatError as error:
            raise AdapterFormatError(f"{weights}: module {module!r}: {error}") from None
    saved: dict[str, Array] = {}
    for name, array in tensors.items():
        if name.endswith(INDICES_SUFFIX) and name.removesuffix(INDICES_SUFFIX) not in modules:
            raise AdapterFormatError(f"{weights}: {name} has no matching {VALUES_SUFFIX[1:]}; save the adapter again")
        if name.endswith((VALUES_SUFFIX, INDICES_SUFFIX)):
            continue
        if not _saves(config, name):
            raise AdapterFormatError(
                f"{weights}: unknown tensor {name!r}: not an sDCT entry and not part of modules_to_save "
                f"({list(config.modules_to_save or [])}) in {CONFIG_FILE}"
            )
        if array.dtype not in DTYPE_NAMES.values():
            raise AdapterFormatError(
                f"{weights}: saved parameter {name!r} has dtype {array.dtype}; expected a float type"
            )
        saved[name] = array
    unknown = sorted(set(shapes) - set(modules))
    if unknown:
        raise AdapterFormatError(f"{weights}: {CONFIG_FILE} lists module {unknown[0]!r}, but its tensors are missing")
    hash_, dtype = raw.get("base_model_hash"), raw.get("base_model_dtype")
    if (hash_, dtype) != (None, None) and not (isinstance(hash_, str) and dtype in tuple(DTYPE_NAMES)):
        raise AdapterFormatError(
            f"{folder / CONFIG_FILE}: base_model_hash and base_model_dtype belong together: a string and one of "
            f"{', '.join(DTYPE_NAMES)}; got {hash_!r} and {dtype!r}"
        )
    return Contents(config, modules, saved, hash_, dtype, _read_training(raw.get("trained_on"), folder))


def write_training(folder: Path, record: TrainingRecord) -> None:
    """Write a record by itself into `folder`, as a merged export holds it."""
    (folder / TRAINED_ON_FILE).write_text(json.dumps(record.to_dict(), indent=2, sort_keys=True) + "\n")
    if record.probe is not None:
        (folder / TRAINING_FILE).write_bytes(encode_safetensors(record.tensors()))


def read_training(folder: Path) -> TrainingRecord | None:
    """The record of an adapter folder, or what `write_training` wrote; None where nothing was recorded.

    Raises:
        AdapterFormatError: a file is damaged.
    """
    if (folder / CONFIG_FILE).exists():
        return _read_training(_read_config(folder / CONFIG_FILE).get("trained_on"), folder)
    alone = folder / TRAINED_ON_FILE
    return _read_training(_read_object(alone), folder) if os.path.lexists(alone) else None


def _read_training(raw: object, folder: Path) -> TrainingRecord | None:
    probe = folder / TRAINING_FILE
    tensors = read_safetensors(probe, MAX_PROBE_BYTES) if os.path.lexists(probe) else None
    if raw is None and tensors is None:
        return None
    try:
        return parse_record(raw, tensors)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{folder}: {error}") from None


def write_folder(path: str | Path, adapter: Contents) -> None:
    """Write an adapter folder, complete or not at all. The same contents always give the same bytes.

    Raises:
        AdapterFormatError: its config does not name what it saves, so that the folder would not load.
        OutputError: `path` exists already, or writing failed.
    """
    tensors: dict[str, Array] = dict(adapter.saved)
    for name in tensors:
        if not _saves(adapter.config, name):
            raise AdapterFormatError(
                f"saved parameter {name!r} is not part of modules_to_save "
                f"({list(adapter.config.modules_to_save or [])}) in the adapter's config; name its module there"
            )
    for module, entries in adapter.modules.items():
        tensors[module + VALUES_SUFFIX] = entries.values
        tensors[module + INDICES_SUFFIX] = entries.indices
    raw: dict[str, Any] = {"peft_type": PEFT_TYPE, "format_version": FORMAT_VERSION} | adapter.config.to_dict()
    raw["shapes"] = {module: list(e.shape) for module, e in adapter.modules.items() if e.shape is not None}
    if adapter.base_hash is not None:
        raw["base_model_hash"], raw["base_model_dtype"] = adapter.base_hash, adapter.base_dtype
    probe = {} if adapter.trained_on is None else adapter.trained_on.tensors()
    if adapter.trained_on is not None:
        raw["trained_on"] = adapter.trained_on.to_dict()
    with new_folder(path) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        (folder / WEIGHTS_FILE).write_bytes(encode_safetensors(tensors))
        if probe:
            (folder / TRAINING_FILE).write_bytes(encode_safetensors(probe))


def _saves(config: SdctConfig, parameter: str) -> bool:
    """Whether `modules_to_save` names a module that `parameter` belongs to."""
    return any(config.saves(parameter.rsplit(".", depth)[0]) for depth in range(1, parameter.count(".") + 1))


def read_safetensors(path: Path, limit: int = MAX_WEIGHTS_BYTES) -> dict[str, Array]:
    """Tensors of a safetensors file as numpy arrays (bfloat16 through ml_dtypes), after checking its header.

    `safetensors.numpy` validates offsets and overlaps; dtypes numpy lacks are viewed from the raw bytes.
    """
    from safetensors import SafetensorError, deserialize

    data = _read(path, limit)
    if len(data) < 8 or struct.unpack("<Q", data[:8])[0] > min(len(data) - 8, MAX_HEADER_BYTES):
        raise AdapterFormatError(
            f"{path} is truncated or not a safetensors file ({len(data)} bytes); copy or save it again"
        )
    try:
        parsed = deserialize(data)  # type: ignore[no-untyped-call]
    except (SafetensorError, UnicodeDecodeError, ValueError) as error:
        raise AdapterFormatError(
            f"{path} is truncated or not a safetensors file ({error}); copy or save it again"
        ) from None
    tensors: dict[str, Array] = {}
    for name, view in parsed:
        dtype = _NUMPY_OF.get(view["dtype"])
        if dtype is None:
            raise AdapterFormatError(f"{path}: tensor {name!r} has unsupported dtype {view['dtype']}")
        tensors[name] = np.frombuffer(bytes(view["data"]), dtype=dtype).reshape(view["shape"])
    return tensors


def encode_safetensors(tensors: dict[str, Array]) -> bytes:
    """The bytes of a safetensors file with `tensors`, in sorted order, without metadata."""
    from safetensors.numpy import save

    for name, array in tensors.items():
        if array.dtype not in _NUMPY_OF.values():
            raise AdapterFormatError(f"tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold")
    return bytes(save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}))


def _read(path: Path, limit: int) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
            raise AdapterFormatError(f"{path} is not a regular file; copy the whole adapter folder")
        if status.st_size > limit:
            raise AdapterFormatError(f"{path} has {status.st_size} bytes; an adapter's may have up to {limit}")
        return path.read_bytes()
    except FileNotFoundError:
        raise AdapterFormatError(f"{path} is missing; copy the whole adapter folder") from None
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read: {error.strerror or error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"repeated field {next(n for n in names if names.count(n) > 1)!r}")
    return fields


def _read_object(path: Path) -> dict[str, Any]:
    data = _read(path, MAX_CONFIG_BYTES)
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path} is not valid JSON ({error}); copy or save the adapter again") from error
    if not isinstance(raw, dict):
        raise AdapterFormatError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def _read_config(path: Path) -> dict[str, Any]:
    raw = _read_object(path)
    if raw.get("peft_type") != PEFT_TYPE:
        raise AdapterFormatError(
            f"{path}: peft_type is {raw.get('peft_type')!r}, expected {PEFT_TYPE!r}; "
            "convert other PEFT adapters with `sdct-export project --lora`"
        )
    version = raw.get("format_version", FORMAT_VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise AdapterFormatError(f"{path}: format_version must be a positive integer, got {version!r}")
    if version > FORMAT_VERSION:
        raise AdapterFormatError(
            f"{path}: format_version {version} is newer than this version reads ({FORMAT_VERSION}); "
            "upgrade sdct_export"
        )
    unknown = sorted(set(raw) - _CONFIG_FIELDS - _FILE_FIELDS - _PEFT_FIELDS)
    if unknown:
        raise AdapterFormatError(
            f"{path}: unknown field {unknown[0]!r}; remove it, or upgrade sdct_export if a newer version wrote it"
        )
    if "target_modules" not in raw:
        raise AdapterFormatError(f"{path}: target_modules is missing; name the adapted modules")
    return raw


def _read_shapes(raw: object, path: Path) -> dict[str, tuple[int, int]]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise AdapterFormatError(f"{path}: shapes must map module names to [d_out, d_in], got {type(raw).__name__}")
    shapes: dict[str, tuple[int, int]] = {}
    for module, shape in raw.items():
        if (
            not isinstance(shape, list)
            or len(shape) != 2
            or not all(isinstance(d, int) and not isinstance(d, bool) and 0 < d < 2**31 for d in shape)
        ):
            raise AdapterFormatError(f"{path}: shape of module {module!r} must be [d_out, d_in], got {shape!r}")
        shapes[module] = (shape[0], shape[1])
    return shapes
