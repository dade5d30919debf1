"""Merge an adapter into the base weights: `W <- W + scaling * C_out^T F C_in`, in memory or checkpoint to checkpoint.

The sum is formed in float64 and rounded once to the weight's dtype, a band of columns at a time, so that a merge needs
little memory beside the one weight it works on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter.adapter import SdctAdapter
from ..adapter.entries import Array, SdctEntries
from ..adapter.training import TrainingRecord, check_class
from ..base.checkpoint import (
    CONFIG_FILE,
    DTYPE_OF,
    FLOATS,
    INDEX_FILE,
    Checkpoint,
    NewTensor,
    Structure,
    progress_bar,
    read_json,
    structure_for,
    tensor_bytes,
    tied_parameters,
    write_safetensors,
)
from ..base.model import (
    check_base,
    check_hash,
    find_linear,
    is_conv1d,
    linear_shape,
    linear_weight,
    load_base,
    to_numpy,
    to_torch,
)
from ..base.sentence import module_folders
from ..base.training import (
    check_config,
    check_probe,
    check_record,
    check_weights,
    class_name,
    class_of,
    model_config,
    set_padding,
)
from ..errors import BaseMismatchError, ConfigError, UnsupportedError
from ..files import available_memory, copy_inside, new_folder
from ..spectral.transform import idct

BAND, COLUMNS = 1 << 18, 64  # elements of dW formed at a time (they fit a cache), and at least so many columns
# weights of the unmerged base in other formats, which must not travel beside the merged ones
_OTHER_WEIGHTS = {".bin", ".ckpt", ".data", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors"}


class Merged:
    """A model with an adapter merged into it. `unmerge`, or leaving a `with` block, restores every bit.

    Several adapters can be merged one after the other; unmerge them in reverse order.
    """

    def __init__(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        self.model = model
        self._originals = dict(originals)

    def unmerge(self) -> None:
        """Put the original weights back. Does nothing the second time."""
        _restore(self.model, self._originals)
        self._originals.clear()

    def kept(self, modules: Iterable[str], dtype: torch.dtype) -> float:
        """How much of the change of `modules` is left once their weights are rounded to `dtype`.

        `sum <r(W + dW) - r(W), dW> / sum <dW, dW>` with the rounding `r`: 1 where rounding only adds noise, 0 where
        every step is too small to leave the number that was there.
        """
        left = whole = 0.0
        for module in modules:
            before = self._originals[f"{module}.weight"]
            after = self.model.get_parameter(f"{module}.weight").detach().to("cpu", before.dtype)
            change = after.double() - before.double()
            left += float(torch.sum((after.to(dtype).double() - before.to(dtype).double()) * change))
            whole += float(torch.sum(change * change))
        return left / whole if whole else 1.0

    def __enter__(self) -> Merged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unmerge()


def merge(model: nn.Module, adapter: SdctAdapter, scale: float = 1.0) -> Merged:
    """Merge `adapter` into `model` in place: `W + scale * dW` per module, saved modules replaced.

    Args:
        model: holds every module of the adapter as `Linear` or `Conv1D`, in float64, float32, float16 or bfloat16 on
            any device.
        adapter: what to merge.
        scale: factor on the adapter. A saved parameter `P_a` becomes `P + scale * (P_a - P)`, exactly `P_a` at 1.

    Returns:
        The handle that undoes the merge. It holds copies of the replaced weights on the CPU.

    Raises:
        BaseMismatchError: the adapter does not fit the model, or a weight of the model is not finite.
        UnsupportedError: a weight is shared with another module, is quantized, or cannot hold the merged values.
        ConfigError: `scale` is not finite.
        After an error the model is as it was.
    """
    if not np.isfinite(scale):
        raise ConfigError(f"scale must be a finite number, got {scale!r}")
    _refuse_tied(model, adapter)
    check_base(adapter, model)
    check_record(adapter, model)
    parameters = dict(model.named_parameters())
    for name, array in adapter.saved.items():
        if tuple(parameters[name].shape) != array.shape:
            raise BaseMismatchError(
                f"the adapter stores {name!r} with shape {list(array.shape)}, but the base has "
                f"{list(parameters[name].shape)}; load the base with a head of the adapter's size (num_labels)"
            )
    originals: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for path, entries in adapter.modules.items():
                module = find_linear(model, path)
                name = f"{path}.weight"
                _check_dtype(name, parameters[name])
                originals[name] = parameters[name].detach().to("cpu", copy=True)
                add_delta(linear_weight(module), entries, adapter.config.scaling * scale, label=f"module {path!r}")
            for name, array in adapter.saved.items():
                _check_dtype(name, parameters[name])
                originals[name] = parameters[name].detach().to("cpu", copy=True)
                parameters[name].copy_(_replaced(name, originals[name], array, scale))
    except BaseException:
        _restore(model, originals)
        raise
    return Merged(model, originals)


def add_delta(weight: Tensor, entries: SdctEntries, scaling: float, *, label: str) -> None:
    """`weight [d_out, d_in] += scaling * C_out^T F C_in` in place, formed in float64 and rounded once to its dtype.

    Memory beside the weight: one row of `d_in` float64 per distinct row of `F`, and a few bands of columns.

    Raises:
        BaseMismatchError: the weight holds NaN or infinite values.
        UnsupportedError: the sum is beyond the range of the dtype.
        In both cases part of the weight may have changed.
    """
    d_out, d_in = weight.shape
    rows, row_of = np.unique(entries.indices[:, 0], return_inverse=True)
    half = torch.zeros(len(rows), d_in, dtype=torch.float64)
    half[torch.from_numpy(row_of.reshape(-1)), torch.from_numpy(entries.indices[:, 1].astype(np.int64))] = (
        torch.from_numpy(entries.values.astype(np.float64) * scaling)
    )
    step = max(1, BAND // d_in)
    for at in range(0, len(rows), step):
        half[at : at + step] = idct(half[at : at + step])
    places = torch.from_numpy(rows.astype(np.int64))
    step = max(COLUMNS, BAND // d_out)
    for at in range(0, d_in, step):
        band = weight[:, at : at + step]
        spectrum = torch.zeros(band.shape[1], d_out, dtype=torch.float64)
        spectrum[:, places] = half[:, at : at + step].T
        total = idct(spectrum).T.add_(band.to("cpu", torch.float64))
        merged = round_once(total, weight.dtype)
        if not _finite(merged) and not _finite(total):
            raise BaseMismatchError(f"the base weight of {label} holds NaN or infinite values; use an intact base")
        _check_range(merged, label)
        band.copy_(merged)


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 tensor in `dtype`, rounded to nearest even once.

    torch converts float64 to half types through float32, which rounds twice. That goes wrong only where float32 lands
    halfway between two halves; there the step through float32 truncates and keeps a sticky last bit (round to odd).
    """
    near = x.to(dtype if dtype not in (torch.float16, torch.bfloat16) else torch.float32)
    if near.dtype == dtype:
        return near
    bits = near.view(torch.int32)
    low = 0xFFF if dtype == torch.float16 else 0x7FFF  # bits below the halfway bit; higher ones vary for subnormals
    halfway = torch.nonzero((bits & low) == 0, as_tuple=True)
    exact, rounded, odd = x[halfway], near[halfway].double(), bits[halfway]
    odd -= (rounded.abs() > exact.abs()).int()  # nearest went away from zero: one step back, whatever the sign
    bits[halfway] = odd | (rounded != exact).int()
    return near.to(dtype)


def merge_checkpoint(
    base_path: str | Path,
    adapter: SdctAdapter | str | Path,
    output_path: str | Path,
    *,
    model_class: str | None = None,
    progress: bool | None = None,
) -> None:
    """Write the checkpoint `base_path` with `adapter` merged into it to the new folder `output_path`.

    Tensors stream from file to file: those the adapter does not touch are copied byte for byte, adapted weights are
    merged one at a time as in `merge` and keep their dtype and their shard. Saved modules replace the base's or, where
    it lacks them (a task head), are added, and `config.json` then names the task's class and number of labels.
    Tokenizer and other files are copied; weights in other formats are not, since they would still be unmerged. The
    class, the configuration, the parameters the checkpoint lacks and the adapted weights are compared with those the
    adapter was trained on before a byte is written; then the merged model is loaded once and compared with the
    adapter's training probe. Where the memory does not hold it, that is left out with a warning.

    Args:
        base_path: checkpoint folder with `config.json` and `model.safetensors` or its shards.
        adapter: an adapter or its folder.
        output_path: folder to make.
        model_class: `MODULE:CLASS` of the model, needed where the adapter was trained on a class of one's own.
        progress: show a bar on stderr; None shows it on a terminal only.

    Raises:
        BaseMismatchError: the adapter does not fit the base, or the base is damaged.
        AdapterFormatError: the adapter folder is damaged.
        UnsupportedError: the base is stored in a form that cannot be merged, or a file to copy is a link that leads
            out of it, see the message.
        OutputError: `output_path` exists, or the disk refused a write; nothing is left there.
    """
    label = "the adapter"
    if not isinstance(adapter, SdctAdapter):
        label, adapter = str(adapter), SdctAdapter.load(adapter)
    base = Checkpoint(base_path)
    shapes = {name: array.shape for name, array in adapter.saved.items()}
    chosen = class_of({label: adapter}, model_class)
    structure = structure_for(base, adapter.config.task_type, shapes, chosen)
    original, adapter = adapter, _renamed(adapter, structure)
    _check_training(adapter, structure, label)
    _refuse_tied(structure.model, adapter)
    check_base(adapter, structure.model, label=label)
    _check_base_hash(original, base, structure, label)
    plan = _plan(base, structure, adapter)
    size = sum(t.nbytes for tensors in plan.values() for t in tensors)
    with new_folder(output_path) as folder, progress_bar("merging", size, progress, in_bytes=True) as advance:
        _copy_other_files(base.folder, folder)
        _write_config(base.folder / CONFIG_FILE, folder / CONFIG_FILE, base, structure, plan, adapter.trained_on)
        for file, tensors in plan.items():
            write_safetensors(folder / file, [_counted(t, advance) for t in tensors], base.metadata[file])
        if base.index is not None:
            _write_index(folder / INDEX_FILE, base.index, plan)
        if adapter.trained_on is not None:
            _compare(folder, size, adapter.trained_on, adapter.config.task_type, chosen)


def _renamed(adapter: SdctAdapter, structure: Structure) -> SdctAdapter:
    """The adapter with the names the model uses now; older names, or names without the base prefix, are translated."""
    modules = {structure.resolve(f"{path}.weight").removesuffix(".weight"): e for path, e in adapter.modules.items()}
    saved = {structure.resolve(name): array for name, array in adapter.saved.items()}
    if len(modules) != len(adapter.modules) or len(saved) != len(adapter.saved):
        raise BaseMismatchError("two modules of the adapter name the same module of the base; repair the adapter")
    return dataclasses.replace(adapter, modules=modules, saved=saved)


def _check_training(adapter: SdctAdapter, structure: Structure, label: str) -> None:
    if adapter.trained_on is None:
        return
    check_class(adapter.trained_on, class_name(structure.model), label=label)
    set_padding(structure.model, [adapter.trained_on])
    check_config(adapter.trained_on, model_config(structure.model), label=label)
    lost = [name for name in structure.lacking() if name not in adapter.saved and not name.startswith("pooler.")]
    if lost:
        raise BaseMismatchError(
            f"neither the base nor {label} holds {lost[0]!r} ({len(lost)} such parameters), without which the "
            "trained model cannot be built; copy the whole checkpoint, or train with these modules in modules_to_save"
        )


def _compare(folder: Path, size: int, trained: TrainingRecord, task_type: str | None, model_class: str | None) -> None:
    """Refuse a merged checkpoint whose model does not give what the adapter's model gave when it was trained."""
    free = available_memory()
    if free is not None and free < size * 3 // 2:
        warnings.warn(
            f"the merged model was not compared with the adapter's training: loading its {size / 2**30:.1f} GiB takes "
            f"more memory than is free ({free / 2**30:.1f} GiB)",
            stacklevel=3,
        )
    else:
        model = load_base(folder, task_type, model_class=model_class)
        check_probe(trained, model, None, label="the merged model")
        check_weights(trained, model, label="the merged model")


def _check_base_hash(adapter: SdctAdapter, base: Checkpoint, structure: Structure, label: str) -> None:
    def parameter(path: str) -> str:
        return structure.resolve(f"{path}.weight")

    def module(path: str) -> nn.Module:
        return find_linear(structure.model, parameter(path).removesuffix(".weight"))

    def weight(path: str) -> Array:
        stored = base.read(structure.key(parameter(path)))
        return to_numpy(stored.T if is_conv1d(module(path)) else stored)

    check_hash(adapter, weight, {path: linear_shape(module(path)) or (0, 0) for path in adapter.modules}, label=label)


def _plan(base: Checkpoint, structure: Structure, adapter: SdctAdapter) -> dict[str, list[NewTensor]]:
    """File -> the tensors to write there. What can be known to be wrong is refused here, before a byte is written."""
    content: dict[str, Callable[[], Iterable[memoryview]]] = {}
    for path, entries in adapter.modules.items():
        key = structure.key(f"{path}.weight")
        own = structure.model.get_parameter(f"{path}.weight")
        if base.tensors[key].shape != tuple(own.shape):
            raise BaseMismatchError(
                f"{base.folder}: tensor {key!r} has shape {list(base.tensors[key].shape)}, but {CONFIG_FILE} makes it "
                f"{list(own.shape)}; copy the checkpoint again"
            )
        if base.tensors[key].dtype not in FLOATS:
            raise UnsupportedError(
                f"{base.folder}: tensor {key!r} has dtype {base.tensors[key].dtype}; use the unquantized checkpoint"
            )
        transposed = is_conv1d(find_linear(structure.model, path))
        content[key] = _merging(base, key, entries, adapter.config.scaling, transposed)
    replaced: dict[str, NewTensor] = {}
    floats = [t.dtype for t in base.tensors.values() if t.dtype in FLOATS]
    for name, array in adapter.saved.items():
        key = structure.keys.get(name, name)
        if structure.resolve(key) != name:
            raise UnsupportedError(f"saved parameter {name!r} cannot be stored in this checkpoint; merge in memory")
        dtype = base.tensors[key].dtype if key in base.tensors else max(set(floats), key=floats.count, default="F32")
        if dtype not in FLOATS:
            raise UnsupportedError(f"{base.folder}: tensor {key!r} has dtype {dtype}; use the unquantized checkpoint")
        like = torch.empty(array.shape, dtype=FLOATS[dtype])
        tensor = _replaced(name, like, array, 1.0)
        replaced[key] = _ready(key, tensor)
    plan: dict[str, list[NewTensor]] = {file: [] for file in base.metadata}
    for key, stored in base.tensors.items():
        make = content.get(key) or _copying(base, key)
        plain = NewTensor(key, stored.dtype, stored.shape, stored.nbytes, make)
        plan[stored.file].append(replaced.pop(key, plain))
    plan[list(plan)[-1]].extend(replaced.values())
    return plan


def _copying(base: Checkpoint, key: str) -> Callable[[], Iterable[memoryview]]:
    return lambda: base.chunks(key)


def _merging(
    base: Checkpoint, key: str, entries: SdctEntries, scaling: float, transposed: bool
) -> Callable[[], Iterable[memoryview]]:
    def make() -> Iterator[memoryview]:
        stored = base.read(key)
        add_delta(stored.T if transposed else stored, entries, scaling, label=f"tensor {key!r}")
        yield tensor_bytes(stored)

    return make


def _ready(key: str, tensor: Tensor) -> NewTensor:
    data = tensor_bytes(tensor)
    return NewTensor(key, DTYPE_OF[tensor.dtype], tuple(tensor.shape), len(data), lambda: [data])


def _counted(tensor: NewTensor, advance: Callable[[int], None]) -> NewTensor:
    def make() -> Iterator[memoryview]:
        for piece in tensor.content():
            yield piece
            advance(len(piece))

    return dataclasses.replace(tensor, content=make)


def _copy_other_files(source: Path, target: Path) -> None:
    skipped = {CONFIG_FILE, INDEX_FILE}
    parts = module_folders(source)  # of a SentenceTransformer: no adapter changes what follows the transformer
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        stale = path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json")
        stale = stale and relative.parts[0] not in parts
        if not path.is_file() or hidden or stale or str(relative) in skipped:
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        copy_inside(source, path, target / relative)


def _write_config(
    source: Path,
    target: Path,
    base: Checkpoint,
    structure: Structure,
    plan: Mapping[str, list[NewTensor]],
    trained: TrainingRecord | None,
) -> None:
    raw = read_json(source)
    head_added = any(t.name not in base.tensors for tensors in plan.values() for t in tensors)
    renamed = trained is not None and raw.get("architectures") != [type(structure.model).__name__]
    if head_added or renamed:
        raw["architectures"] = [type(structure.model).__name__]
    if structure.resized:
        raw.pop("num_labels", None)
        raw["id2label"] = {str(i): label for i, label in structure.config.id2label.items()}
        raw["label2id"] = dict(structure.config.label2id)
    padding = getattr(structure.config, "pad_token_id", None)
    padded = padding != raw.get("pad_token_id", getattr(type(structure.config), "pad_token_id", None))
    if padded:
        raw["pad_token_id"] = padding
    labels = None if trained is None else trained.id2label
    if labels is not None:
        raw |= {"id2label": {str(i): label for i, label in enumerate(labels)}}
        raw |= {"label2id": {label: i for i, label in enumerate(labels)}}
    if head_added or renamed or structure.resized or padded or labels is not None:
        target.write_text(json.dumps(raw, indent=2) + "\n")
    else:
        copy_inside(base.folder, source, target)


def _write_index(target: Path, index: Mapping[str, Any], plan: Mapping[str, list[NewTensor]]) -> None:
    tensors = [(file, t) for file, ts in plan.items() for t in ts]
    metadata = dict(index.get("metadata") or {}) | {"total_size": sum(t.nbytes for _, t in tensors)}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(int(np.prod(t.shape)) for _, t in tensors)
    placed = {t.name: file for file, t in sorted(tensors, key=lambda item: item[1].name)}
    target.write_text(json.dumps(dict(index) | {"metadata": metadata, "weight_map": placed}, indent=2) + "\n")


def _replaced(name: str, parameter: Tensor, array: Array, scale: float) -> Tensor:
    """`P + scale * (P_a - P)` in the dtype of `parameter`, exactly `P_a` at 1."""
    saved = to_torch(array).double()
    if scale != 1.0:
        saved = parameter.double() + scale * (saved - parameter.double())
    merged = round_once(saved, parameter.dtype)
    _check_range(merged, f"parameter {name!r}")
    return merged


def _check_range(merged: Tensor, label: str) -> None:
    if not _finite(merged):
        raise UnsupportedError(
            f"merging into {label} gives values beyond the range of {str(merged.dtype).removeprefix('torch.')}; "
            "use a bfloat16 or float32 copy of the base"
        )


def _finite(x: Tensor) -> bool:
    """Whether all of `x` is finite, in one pass: NaN and infinities survive a sum, and no sum of weights overflows."""
    return math.isfinite(float(x.sum(dtype=torch.float64)))


def _check_dtype(name: str, parameter: Tensor) -> None:
    if parameter.dtype not in DTYPE_OF or parameter.is_meta:
        what = "lies on the meta device" if parameter.is_meta else f"has dtype {parameter.dtype}"
        raise UnsupportedError(f"parameter {name!r} {what}; merge into an unquantized base loaded with its weights")


def _refuse_tied(model: nn.Module, adapter: SdctAdapter) -> None:
    """A weight shared by two modules would change in both, which is not what the adapter was trained to do."""
    changed = {f"{path}.weight" for path in adapter.modules} | set(adapter.saved)
    for group in tied_parameters(model):
        touched = sorted(changed & set(group))
        if touched:
            others = sorted(set(group) - {touched[0]})
            raise UnsupportedError(
                f"{touched[0]!r} is tied to {others[0]!r}: merging would change both; untie them first "
                "(tie_word_embeddings=False and a checkpoint that stores both) or adapt other modules"
            )


def _restore(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, original in originals.items():
            model.get_parameter(name).copy_(original)
