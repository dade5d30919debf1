"""Read and write adapter folders. The only parser of adapter files, which are untrusted input.

adapter_config.json        the fields of `SdctConfig`, `peft_type: "SDCT"`, `format_version`, and, for checks at load
                           time, `shapes` (module -> [d_out, d_in]), `base_model_hash`, `base_model_dtype`,
                           `trained_on` (see `training`)
adapter_model.safetensors  per module `<path>.sdct_values` float [n], and where the values belong (see below);
                           parameters of `modules_to_save` under their own names
training_probe.safetensors what the adapted model gave for fixed inputs, where it was trained (see `training`)

By `format_version` the values belong to the coefficients in

1  `<path>.sdct_indices` int32 [n, 2] (row, col) beside each `<path>.sdct_values`, in any order. A folder without the
   field is of this version, and so is one that is written where a module's shape is not known.
2  `sdct_positions` uint8 [bytes]: the code of `positions` of every module, one after the other in the order of the
   module paths (by code point); n is the length of the module's values, which stand in the order of their positions
   `row * d_in + col`, and `shapes`, which must name every module, gives d_out and d_in.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import AdapterFormatError, BaseMismatchError, ConfigError, OutputError
from ..files import new_folder, open_input, read_json
from .config import FORMAT_VERSION, PEFT_TYPE, SdctConfig
from .entries import BFLOAT16, DTYPE_NAMES, Array, SdctEntries, layout_problem
from .positions import code_bytes, decode, encode
from .training import TrainingRecord, parse_record

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TRAINING_FILE = "training_probe.safetensors"
TRAINED_ON_FILE = "trained_on.json"  # in a merged export, which holds no adapter folder
VALUES_SUFFIX = ".sdct_values"
INDICES_SUFFIX = ".sdct_indices"
POSITIONS = "sdct_positions"
MAX_CONFIG_BYTES = 4 << 20
MAX_HEADER_BYTES = 16 << 20  # room for 100,000 tensors; the format itself allows 100 MB, which takes GB to parse
MAX_DIMENSIONS = 32
MAX_WEIGHTS_BYTES = 8 << 30
MAX_PROBE_BYTES = 16 << 20

_AGAIN = "copy the whole adapter folder or save the adapter again"
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


class Stored(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return self.dtype.itemsize * math.prod(self.shape)


def read_folder(path: str | Path, *, max_bytes: int | None = None) -> Contents:
    """Read an adapter folder and validate its files and the entries of each module.

    Args:
        path: the folder.
        max_bytes: most bytes its tensors may have, where the caller has room for no more.

    Raises:
        AdapterFormatError: naming the file, the module and what to do.
        BaseMismatchError: its tensors have more than `max_bytes`; they are not read.
    """
    folder = Path(path)
    if not os.path.isdir(folder):  # noqa: PTH112, since Path.is_dir raises for a name that is too long
        raise AdapterFormatError(
            f"{folder} is not a folder; an sDCT adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    raw = _read_config(config)
    contents = parse_contents(
        raw, lambda check: read_safetensors(weights, check), config=config, weights=weights, max_bytes=max_bytes
    )
    return contents._replace(trained_on=_read_training(raw.get("trained_on"), folder))


def parse_contents(
    raw: dict[str, Any],
    read: Callable[[Callable[[Mapping[str, Stored]], None]], Mapping[str, Array]],
    *,
    config: Path,
    weights: Path,
    max_bytes: int | None = None,
) -> Contents:
    """The contents of an adapter, without its training record.

    Args:
        raw: the fields of `adapter_config.json`, as `check_fields` gives them.
        read: gives the tensors of `adapter_model.safetensors`, once the check it is handed has seen their header.
        config: what messages call the file of `raw`.
        weights: what they call the file of the tensors.
        max_bytes: see `read_folder`.

    Raises:
        AdapterFormatError: naming the file, the module and what to do.
        BaseMismatchError: its tensors have more than `max_bytes`; they are not read.
    """
    try:
        settings = SdctConfig(**{key: value for key, value in raw.items() if key in _CONFIG_FIELDS})
    except ConfigError as error:
        raise AdapterFormatError(f"{config}: {error}") from error
    shapes = _read_shapes(raw.get("shapes"), config)
    packed = raw.get("format_version", 1) >= 2
    tensors = read(
        lambda stored: _check_tensors(stored, settings, shapes, weights, packed=packed, max_bytes=max_bytes)
    )
    modules: dict[str, SdctEntries] = {}
    at = 0
    for name in sorted(tensors, key=lambda name: name.removesuffix(VALUES_SUFFIX)):
        module = name.removesuffix(VALUES_SUFFIX)
        if module != name:
            values, shape = tensors[name], shapes.get(module)
            try:
                if packed:
                    assert shape is not None  # `_check_tensors` saw to it
                    end = at + code_bytes(len(values), math.prod(shape))
                    indices = _unpack(tensors[POSITIONS][at:end], len(values), shape)
                    at = end
                else:
                    indices = tensors[module + INDICES_SUFFIX]
                modules[module] = SdctEntries(values, indices, shape)
            except AdapterFormatError as error:
                raise AdapterFormatError(f"{weights}: module {module!r}: {error}") from None
    saved = {n: a for n, a in tensors.items() if n != POSITIONS and not n.endswith((VALUES_SUFFIX, INDICES_SUFFIX))}
    hash_, dtype = raw.get("base_model_hash"), raw.get("base_model_dtype")
    if (hash_, dtype) != (None, None) and not (isinstance(hash_, str) and dtype in tuple(DTYPE_NAMES)):
        raise AdapterFormatError(
            f"{config}: base_model_hash and base_model_dtype belong together: a string and one of "
            f"{', '.join(DTYPE_NAMES)}; got {hash_!r} and {dtype!r}"
        )
    return Contents(settings, modules, saved, hash_, dtype, None)


def write_training(folder: Path, record: TrainingRecord) -> None:
    """Write a record by itself into `folder`, as a merged export holds it."""
    (folder / TRAINED_ON_FILE).write_text(json.dumps(record.to_dict(), indent=2, sort_keys=True) + "\n")
    if record.tensors():
        (folder / TRAINING_FILE).write_bytes(encode_safetensors(record.tensors()))


def read_training(folder: Path) -> TrainingRecord | None:
    """The record of an adapter folder, or what `write_training` wrote; None where nothing was recorded.

    Raises:
        AdapterFormatError: a file is damaged.
    """
    if (folder / CONFIG_FILE).exists():
        return _read_training(_read_config(folder / CONFIG_FILE).get("trained_on"), folder)
    alone = folder / TRAINED_ON_FILE
    if not os.path.lexists(alone):
        return None
    return _read_training(read_json(alone, MAX_CONFIG_BYTES, AdapterFormatError, _AGAIN, unique=True), folder)


def _read_training(raw: object, folder: Path) -> TrainingRecord | None:
    probe = folder / TRAINING_FILE
    tensors = read_safetensors(probe, limit=MAX_PROBE_BYTES) if os.path.lexists(probe) else None
    if raw is None and tensors is None:
        return None
    try:
        return parse_record(raw, tensors)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{folder}: {error}") from None


def _check_tensors(
    stored: Mapping[str, Stored],
    config: SdctConfig,
    shapes: Mapping[str, tuple[int, int]],
    weights: Path,
    *,
    packed: bool,
    max_bytes: int | None,
) -> None:
    """Refuse what the header of the weights file shows to be no adapter, before its tensors are read."""
    coded = 0
    for name in sorted(stored):
        dtype, shape = stored[name]
        if name.endswith(VALUES_SUFFIX):
            module = name.removesuffix(VALUES_SUFFIX)
            if not module:
                raise AdapterFormatError(f"{weights}: tensor {name!r} names no module; save the adapter again")
            indices = Stored(np.dtype(np.int32), (*shape, 2)) if packed else stored.get(module + INDICES_SUFFIX)
            if indices is None:
                raise AdapterFormatError(
                    f"{weights}: module {module!r} has values but no {module}{INDICES_SUFFIX}; save it again"
                )
            problem = layout_problem(dtype, shape, indices.dtype, indices.shape, shapes.get(module))
            if problem:
                raise AdapterFormatError(f"{weights}: module {module!r}: {problem}")
            if packed:
                if module not in shapes:
                    raise AdapterFormatError(
                        f"{weights}: {CONFIG_FILE} lacks the shape of module {module!r}; {_AGAIN}"
                    )
                coded += code_bytes(shape[0], math.prod(shapes[module]))
        elif packed and name == POSITIONS:
            continue
        elif name.endswith(INDICES_SUFFIX) and not packed:
            if name.removesuffix(INDICES_SUFFIX) + VALUES_SUFFIX not in stored:
                raise AdapterFormatError(
                    f"{weights}: {name} has no matching {VALUES_SUFFIX[1:]}; save the adapter again"
                )
        elif not _saves(config, name):
            raise AdapterFormatError(
                f"{weights}: unknown tensor {name!r}: not an sDCT entry and not part of modules_to_save "
                f"({list(config.modules_to_save or [])}) in {CONFIG_FILE}"
            )
        elif dtype not in DTYPE_NAMES.values():
            raise AdapterFormatError(f"{weights}: saved parameter {name!r} has dtype {dtype}; expected a float type")
    if packed and (coded or POSITIONS in stored):
        positions = stored.get(POSITIONS)
        if positions is None or positions != (np.dtype(np.uint8), (coded,)):
            found = "missing" if positions is None else f"{positions.dtype} {list(positions.shape)}"
            raise AdapterFormatError(
                f"{weights}: {POSITIONS} must be uint8 [{coded}] for the modules in it and is {found}; {_AGAIN}"
            )
    missing = sorted(module for module in shapes if module + VALUES_SUFFIX not in stored)
    if missing:
        raise AdapterFormatError(f"{weights}: {CONFIG_FILE} lists module {missing[0]!r}, but its tensors are missing")
    size = sum(tensor.nbytes for tensor in stored.values())
    if max_bytes is not None and size > max_bytes:
        raise BaseMismatchError(
            f"{weights} holds {size} bytes of tensors, far more than there is room for ({max_bytes}); export the "
            "bundle again together with this adapter"
        )


def write_folder(path: str | Path, adapter: Contents, *, overwrite: bool = False) -> None:
    """Write an adapter folder, complete or not at all. The same contents always give the same bytes.

    Raises:
        AdapterFormatError: its config does not name what it saves, so that the folder would not load.
        OutputError: `path` exists already and, with `overwrite`, is something else than an adapter; or writing failed.
    """
    tensors: dict[str, Array] = dict(adapter.saved)
    for name in tensors:
        if not _saves(adapter.config, name):
            raise AdapterFormatError(
                f"saved parameter {name!r} is not part of modules_to_save "
                f"({list(adapter.config.modules_to_save or [])}) in the adapter's config; name its module there"
            )
    version = 2 if all(entries.shape is not None for entries in adapter.modules.values()) else 1
    codes = []
    for module, entries in sorted(adapter.modules.items()):
        if version == 1:
            tensors[module + VALUES_SUFFIX] = entries.values
            tensors[module + INDICES_SUFFIX] = entries.indices
        else:
            assert entries.shape is not None
            flat = entries.indices.astype(np.int64) @ np.array([entries.shape[1], 1])
            order = np.argsort(flat)
            tensors[module + VALUES_SUFFIX] = entries.values[order]
            codes.append(encode(flat[order], math.prod(entries.shape)))
    if codes:
        tensors[POSITIONS] = np.concatenate(codes)
    shapes = {module: entries.shape for module, entries in adapter.modules.items() if entries.shape is not None}
    raw = fields_of(adapter.config, shapes, adapter.base_hash, adapter.base_dtype, adapter.trained_on, version)
    probe = {} if adapter.trained_on is None else adapter.trained_on.tensors()
    with new_folder(path, may_replace=_refuse_other if overwrite else None) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        (folder / WEIGHTS_FILE).write_bytes(encode_safetensors(tensors))
        if probe:
            (folder / TRAINING_FILE).write_bytes(encode_safetensors(probe))


def _refuse_other(target: Path) -> None:
    """Raise `OutputError` unless `target` is an adapter's folder with nothing else in it, or an empty one."""
    if target.is_symlink() or not target.is_dir():
        raise OutputError(f"{target} is no folder of an adapter and is not overwritten; choose another output")
    try:
        names = set(os.listdir(target))  # noqa: PTH208, as names are what is wanted
    except OSError as error:
        raise OutputError(f"cannot look into {target}: {error.strerror or error}; choose another output") from error
    other = sorted(names - {CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE})
    if other:
        raise OutputError(
            f"{target} holds {other[0]!r}, which is no file of an adapter and would be lost; choose another "
            "output, or move it away"
        )
    try:
        raw = read_json(target / CONFIG_FILE, MAX_CONFIG_BYTES, AdapterFormatError, _AGAIN) if names else None
    except AdapterFormatError as error:
        raise OutputError(f"{target} is no sDCT adapter and is not overwritten: {error}") from None
    if raw is not None and raw.get("peft_type") != PEFT_TYPE:
        raise OutputError(f"{target} is an adapter of another kind and is not overwritten; choose another output")


def fields_of(
    config: SdctConfig,
    shapes: Mapping[str, tuple[int, int]],
    base_hash: str | None,
    base_dtype: str | None,
    trained_on: TrainingRecord | None,
    version: int = FORMAT_VERSION,
) -> dict[str, Any]:
    """The fields of `adapter_config.json`, JSON-ready."""
    raw: dict[str, Any] = {"peft_type": PEFT_TYPE, "format_version": version} | config.to_dict()
    raw["shapes"] = {module: list(shape) for module, shape in shapes.items()}
    if base_hash is not None:
        raw["base_model_hash"], raw["base_model_dtype"] = base_hash, base_dtype
    if trained_on is not None:
        raw["trained_on"] = trained_on.to_dict()
    return raw


def _unpack(code: Array, n: int, shape: tuple[int, int]) -> Array:
    """The indices, int32 `[n, 2]`, that a module's part of `sdct_positions` stands for."""
    return np.stack(np.divmod(decode(code, n, math.prod(shape)), shape[1]), axis=1).astype(np.int32)


def _saves(config: SdctConfig, parameter: str) -> bool:
    """Whether `modules_to_save` names a module that `parameter` belongs to."""
    return any(config.saves(parameter.rsplit(".", depth)[0]) for depth in range(1, parameter.count(".") + 1))


def read_safetensors(
    path: Path,
    check: Callable[[Mapping[str, Stored]], None] | None = None,
    *,
    limit: int = MAX_WEIGHTS_BYTES,
) -> dict[str, Array]:
    """Tensors of a safetensors file as numpy arrays (bfloat16 through ml_dtypes), in the order of the file.

    The header is read and checked first: names, dtypes, shapes, and that the tensors fill the file without gap or
    overlap. `check` may refuse what it says; only then are the tensors read, one after the other.

    Raises:
        AdapterFormatError: the file is missing or damaged. And whatever `check` raises.
    """
    with open_input(path, AdapterFormatError, "copy the whole adapter folder") as (file, size):
        if size > limit:
            raise AdapterFormatError(f"{path} has {size} bytes; an adapter's may have up to {limit}")
        return _read_tensors(file, size, path, check)


def decode_safetensors(data: bytes, label: object) -> dict[str, Array]:
    """The tensors of a safetensors file in memory, which messages call `label`. Raises as `read_safetensors`."""
    return _read_tensors(io.BytesIO(data), len(data), label, None)


def _read_tensors(
    file: BinaryIO, size: int, label: object, check: Callable[[Mapping[str, Stored]], None] | None
) -> dict[str, Array]:
    try:
        stored = _read_header(file, size)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(
            f"{label} is truncated or not a safetensors file ({error}); copy or save it again"
        ) from None
    if check is not None:
        check(stored)
    tensors: dict[str, Array] = {}
    for name, tensor in stored.items():
        data = file.read(tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise AdapterFormatError(f"{label} was cut off while it was read; copy or save it again")
        tensors[name] = np.frombuffer(data, tensor.dtype).reshape(tensor.shape)
    return tensors


def _read_header(file: BinaryIO, size: int) -> dict[str, Stored]:
    """The header of a safetensors file of `size` bytes; `file` then stands before the first tensor."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError(f"{size} bytes")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, it may have up to {MAX_HEADER_BYTES}")
    header = json.loads(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no map of texts")
    found = sorted(((name, *_read_stored(name, raw)) for name, raw in header.items()), key=lambda item: item[2:])
    at = 0
    for name, _, begin, end in found:
        if begin != at:
            raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"{size - 8 - length} bytes of tensors where the header says {at}")
    return {name: tensor for name, tensor, _, _ in found}


def _read_stored(name: str, raw: object) -> tuple[Stored, int, int]:
    """A tensor's entry in a header, and where its bytes begin and end."""
    name.encode("utf-8")
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} needs dtype, shape and data_offsets")
    dtype = _NUMPY_OF.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {name!r} has unsupported dtype {raw['dtype']!r}")
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(filter(None, shape)) >= 2**62:
        raise ValueError(f"tensor {name!r} has an impossible shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has impossible data_offsets")
    tensor = Stored(dtype, tuple(shape))
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise ValueError(f"tensor {name!r} has {offsets[1] - offsets[0]} bytes, its shape {tensor.nbytes}")
    return tensor, offsets[0], offsets[1]


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def encode_safetensors(tensors: dict[str, Array]) -> bytes:
    """The bytes of a safetensors file with `tensors`, in sorted order, without metadata."""
    from safetensors.numpy import save

    for name, array in tensors.items():
        if array.dtype not in _NUMPY_OF.values():
            raise AdapterFormatError(f"tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold")
    return bytes(save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}))


def _read_config(path: Path) -> dict[str, Any]:
    return check_fields(read_json(path, MAX_CONFIG_BYTES, AdapterFormatError, _AGAIN, unique=True), path)


def check_fields(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """`raw` if it can be the content of `adapter_config.json`, which messages call `path`.

    Raises:
        AdapterFormatError: another kind of adapter, a newer version, a field that is unknown or missing.
    """
    if raw.get("peft_type") != PEFT_TYPE:
        found = f"{path}: peft_type is {raw.get('peft_type')!r}, expected {PEFT_TYPE!r}"
        if "peft_type" not in raw:
            raise AdapterFormatError(f"{found}; give the folder of an sDCT adapter")
        if "num_virtual_tokens" in raw:  # prompt learning
            raise AdapterFormatError(f"{found}; it changes no weights, so that no sDCT adapter can be made of it")
        raise AdapterFormatError(
            f"{found}; turn this PEFT adapter into one with `sdct-export project --model BASE --lora {path.parent} "
            "--output ADAPTER`"
        )
    version = raw.get("format_version", 1)
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
