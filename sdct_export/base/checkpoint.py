"""Hugging Face checkpoint folders, read and written one tensor at a time, so that memory does not grow with the model.

`Checkpoint` finds the tensors of `model.safetensors` or of the shards named by its index; bytes are read with plain
file reads, not a memory map, whose touched pages would count as resident memory. `Structure` knows which checkpoint
key holds which parameter of the model class, from the architecture on the meta device and the rules by which
transformers itself renames keys when it loads a checkpoint. `write_safetensors` writes a file tensor by tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..errors import BaseMismatchError, SdctError, UnsupportedError
from .model import class_for, load_base, loading_error, named_class
from .sentence import body_folder

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHUNK_BYTES = 16 << 20
MAX_JSON_BYTES = 64 << 20
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_OF = {torch_dtype: name for name, torch_dtype in FLOATS.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies: file name, safetensors dtype name, shape, and its bytes `offset ... offset + nbytes`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """The tensors of a checkpoint folder, read on demand.

    Attributes:
        folder: the folder.
        tensors: key -> where it lies, in the order of the files.
        metadata: file name -> the safetensors metadata of that file.
        index: the parsed index of a sharded checkpoint, or None.

    Raises:
        BaseMismatchError: the folder is no checkpoint, or a file is missing, truncated or foreign.
        UnsupportedError: the weights are stored as `pytorch_model.bin`.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        if not self.folder.is_dir():
            raise BaseMismatchError(
                f"there is no folder {self.folder}; give the folder of a downloaded Hugging Face model"
            )
        if not (self.folder / CONFIG_FILE).is_file():
            body = Path(body_folder(self.folder))
            if body != self.folder:
                raise BaseMismatchError(f"{self.folder} keeps its transformer in {body}; give that folder")
            raise BaseMismatchError(
                f"{self.folder} is not a model checkpoint: it has no {CONFIG_FILE}; give the folder of a downloaded "
                "Hugging Face model"
            )
        self.index: dict[str, Any] | None = None
        if (self.folder / SINGLE_FILE).is_file():
            files = [SINGLE_FILE]
        elif (self.folder / INDEX_FILE).is_file():
            self.index = read_json(self.folder / INDEX_FILE)
            files = _shards(self.index, self.folder / INDEX_FILE)
        elif any(self.folder.glob("pytorch_model*.bin")):
            raise UnsupportedError(
                f"{self.folder} stores its weights as pytorch_model.bin; convert them once with "
                "`AutoModel.from_pretrained(folder).save_pretrained(new_folder)` and use the new folder"
            )
        else:
            raise BaseMismatchError(
                f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; copy the whole checkpoint"
            )
        self.tensors: dict[str, Stored] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file in files:
            self.metadata[file], tensors = _read_header(self.folder, file)
            repeated = sorted(set(tensors) & set(self.tensors))
            if repeated:
                raise BaseMismatchError(
                    f"{self.folder / file}: tensor {repeated[0]!r} is in two shards; copy it again"
                )
            self.tensors |= tensors
        if self.index is not None:
            for key, file in self.index["weight_map"].items():
                if key not in self.tensors or self.tensors[key].file != file:
                    raise BaseMismatchError(
                        f"{self.folder / INDEX_FILE} places {key!r} in {file}, which lacks it; copy it again"
                    )

    def chunks(self, key: str) -> Iterator[memoryview]:
        """The bytes of a tensor in pieces of at most 16 MiB; a piece is valid until the next one is asked for."""
        stored = self.tensors[key]
        path = self.folder / stored.file
        buffer = memoryview(bytearray(min(CHUNK_BYTES, stored.nbytes)))
        at, end = stored.offset, stored.offset + stored.nbytes
        while at < end:
            try:
                with path.open("rb", buffering=0) as file:
                    file.seek(at)
                    got = file.readinto(buffer[: min(end - at, len(buffer))])
            except OSError as error:
                raise BaseMismatchError(f"{path} cannot be read: {error.strerror or error}") from error
            if not got:
                raise BaseMismatchError(f"{path} ends within tensor {key!r}; copy the whole checkpoint")
            at += got
            yield buffer[:got]

    def read(self, key: str) -> Tensor:
        """One float tensor, in memory of its own."""
        stored = self.tensors[key]
        if stored.dtype not in FLOATS:
            raise UnsupportedError(
                f"{self.folder / stored.file}: tensor {key!r} has dtype {stored.dtype}; only {', '.join(FLOATS)} "
                "weights can be changed: use the unquantized checkpoint"
            )
        data = bytearray(stored.nbytes)
        at = 0
        for piece in self.chunks(key):
            data[at : at + len(piece)] = piece
            at += len(piece)
        if not data:
            return torch.empty(stored.shape, dtype=FLOATS[stored.dtype])
        return torch.frombuffer(data, dtype=FLOATS[stored.dtype]).reshape(stored.shape)


class Structure:
    """The architecture behind a checkpoint: a model on the meta device, and the checkpoint key of each parameter.

    Args:
        checkpoint: the checkpoint.
        task_type: chooses the model class, see `SdctConfig.task_type`; None takes the class the checkpoint names.
        num_labels: size of the classification head, where it differs from the checkpoint's.
        model_class: `MODULE:CLASS` instead of a task.

    Attributes:
        model: the model on the meta device: shapes and module classes, no memory.
        config: its transformers configuration.
        keys: parameter name -> checkpoint key.
        resized: whether `num_labels` changed the head.

    Raises:
        BaseMismatchError: transformers cannot build the model, or two keys claim one parameter.
        UnsupportedError: the model is quantized, or defined by code in its own folder, which is never run.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        task_type: str | None = None,
        *,
        num_labels: int | None = None,
        model_class: str | None = None,
    ) -> None:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        folder = checkpoint.folder
        try:
            self.config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self.resized = num_labels is not None and num_labels != self.config.num_labels
            if self.resized:
                self.config.num_labels = num_labels
            loader = named_class(model_class) if model_class else class_for(self.config, task_type)
            with torch.device("meta"):
                self.model: nn.Module = (
                    loader.from_config(self.config, trust_remote_code=False)
                    if hasattr(loader, "from_config")
                    else loader(self.config)
                )
        except SdctError:
            raise
        except Exception as error:  # a damaged configuration makes transformers raise errors of many kinds
            raise loading_error(f"cannot build the model of {folder / CONFIG_FILE}", error) from error
        if getattr(self.config, "quantization_config", None) is not None:
            raise UnsupportedError(f"{folder} is quantized; use the unquantized checkpoint")
        transforms = get_model_conversion_mapping(self.model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._state = self.model.state_dict()
        self.keys: dict[str, str] = {}
        self._converted: dict[str, str] = {}
        for key in checkpoint.tensors:
            name, converted = self._rename(key)
            if converted:
                self._converted[name] = key
            elif name in self.keys:
                raise BaseMismatchError(
                    f"{folder}: tensors {self.keys[name]!r} and {key!r} both belong to parameter {name!r}; keep one"
                )
            elif name in self._state:
                self.keys[name] = key

    def resolve(self, name: str) -> str:
        """The model's own name of a parameter named as in a checkpoint: older names, with or without the base prefix.

        A name the model does not know comes back unchanged.
        """
        found, converted = self._rename(name)
        return found if found in self._state and not converted else name

    def key(self, parameter: str) -> str:
        """The checkpoint key that holds `parameter`, of the parameters it is tied to the one that is stored.

        Raises:
            UnsupportedError: the checkpoint stores the parameter in another form (fused or split), which is converted
                only while loading.
            BaseMismatchError: the checkpoint does not hold it.
        """
        if parameter in self.keys:
            return self.keys[parameter]
        stem = parameter.rsplit(".", 1)[0]
        for name, key in self._converted.items():
            if name == parameter or name.rsplit(".", 2)[0] == stem.rsplit(".", 1)[0]:
                raise UnsupportedError(
                    f"parameter {parameter!r} is stored in another form (as {key!r}) and converted while loading; "
                    "save the model once with `save_pretrained` in its loaded form, or merge in memory"
                )
        raise BaseMismatchError(
            f"the checkpoint holds no tensor for parameter {parameter!r}; use a complete checkpoint"
        )

    def lacking(self) -> list[str]:
        """Parameters of the model that the checkpoint holds in no form."""
        lost = []
        for name, _ in self.model.named_parameters():
            tied = next((group for group in tied_parameters(self.model) if name in group), [name])
            try:
                if not any(other in self.keys for other in tied):
                    self.key(name)
            except UnsupportedError:
                continue  # there in another form
            except BaseMismatchError:
                lost.append(name)
        return lost

    def _rename(self, key: str) -> tuple[str, bool]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
        if name not in self._state and key in self._state:
            return key, False
        return name, pattern is not None


def structure_for(
    checkpoint: Checkpoint,
    task_type: str | None,
    saved: Mapping[str, tuple[int, ...]],
    model_class: str | None = None,
) -> Structure:
    """The structure for an adapter that saves parameters of the shapes in `saved`: the head as large as the adapter's.

    Raises:
        BaseMismatchError: a saved parameter has another shape, whatever the number of labels.
    """
    structure = Structure(checkpoint, task_type, model_class=model_class)
    state = structure.model.state_dict()
    own = {name: state.get(structure.resolve(name)) for name in saved}
    labels = {saved[name][:1] for name, tensor in own.items() if tensor is not None and tensor.shape != saved[name]}
    if len(labels) == 1 and (size := labels.pop()):
        structure = Structure(checkpoint, task_type, num_labels=size[0], model_class=model_class)
        state = structure.model.state_dict()
    for name, shape in saved.items():
        tensor = state.get(structure.resolve(name))
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BaseMismatchError(
                f"the adapter stores {name!r} with shape {list(shape)}, but the base has {list(tensor.shape)}; use "
                "the base model the adapter was trained on"
            )
    return structure


def load_sized(
    path: str | Path,
    task_type: str | None,
    saved: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype | str = "auto",
    model_class: str | None = None,
) -> nn.Module:
    """`load_base` with a head as large as the one of an adapter that saves parameters of the shapes in `saved`.

    Raises:
        BaseMismatchError: as `structure_for` and `load_base`.
    """
    structure = structure_for(Checkpoint(path), task_type, saved, model_class)
    labels = structure.config.num_labels if structure.resized else None
    names = {structure.resolve(name) for name in saved}
    return load_base(path, task_type, dtype=dtype, num_labels=labels, model_class=model_class, saved=names)


def tied_parameters(model: nn.Module) -> list[list[str]]:
    """Names of the parameters of a model that share one tensor, e.g. `lm_head.weight` with the embeddings."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr() or id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@contextlib.contextmanager
def progress_bar(
    label: str, total: int, show: bool | None, *, in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """A function to call with each amount done; draws on stderr, by default (`show` None) only on a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to write: name, safetensors dtype name, shape, size in bytes, and a function that makes its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    content: Callable[[], Iterable[memoryview]]


def write_safetensors(path: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file tensor by tensor: 8-byte header length, JSON header padded to 8 bytes, then the data.

    Tensors of larger elements come first, so that every tensor stays aligned; otherwise the order is kept.

    Raises:
        OSError: the disk refused a write.
    """
    ordered = sorted(tensors, key=lambda t: -(t.nbytes // max(1, math.prod(t.shape))))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in ordered:
            written = 0
            for piece in tensor.content():
                file.write(piece)
                written += len(piece)
            assert written == tensor.nbytes, tensor.name


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_json(path: Path, error_type: type[SdctError] = BaseMismatchError) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint. Raises `error_type` where it is none."""
    return files.read_json(path, MAX_JSON_BYTES, error_type, "copy the checkpoint again")


def _shards(index: Mapping[str, Any], path: Path) -> list[str]:
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise BaseMismatchError(f"{path} has no weight_map; copy the checkpoint again")
    if not isinstance(index.get("metadata") or {}, dict):
        raise BaseMismatchError(f"{path}: metadata must be an object; copy the checkpoint again")
    for key, file in placed.items():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
            raise BaseMismatchError(f"{path} places {key!r} in {file!r}, which is no safetensors file beside it")
    return sorted(set(placed.values()))


def _read_header(folder: Path, file: str) -> tuple[dict[str, str], dict[str, Stored]]:
    from safetensors import SafetensorError, safe_open

    path = folder / file
    if not path.is_file():
        raise BaseMismatchError(f"{path} is missing; copy the whole checkpoint")
    try:
        with safe_open(path, framework="np"):  # checks the header: offsets, overlaps, sizes, the file's length
            pass
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise BaseMismatchError(f"{path} is truncated or not a safetensors file ({error}); copy it again") from error
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: Stored(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }
    return metadata, tensors
