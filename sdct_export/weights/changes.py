"""Where a weight change comes from: a PEFT adapter or a tuned checkpoint, as one spectrum per linear module.

A change is read lazily, one matrix at a time: LoRA factors straight from their file, other kinds by letting PEFT merge
one layer after the other, tuned checkpoints from two files side by side.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapter.config import PEFT_TYPE, TASK_TYPES
from ..adapter.entries import Array
from ..adapter.folder import read_safetensors
from ..base.checkpoint import CONFIG_FILE, FLOATS, Checkpoint, Structure, read_json, structure_for, tied_parameters
from ..base.model import find_linear, is_conv1d, linear_shape, linear_weight, load_base, task_of_class, to_numpy
from ..errors import AdapterFormatError, BaseMismatchError, UnsupportedError
from ..spectral.transform import dct

BAND, COLUMNS = 1 << 18, 64  # elements transformed at a time (they fit a cache), and at least so many columns
PATTERN_SECONDS = 10.0  # for all names of an adapter, each of which takes microseconds
_PREFIX = "base_model.model."
# PEFT settings under which `dW = scaling * B A` holds; where another one is set, PEFT itself does the merge
_PLAIN_LORA = {
    *(
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "task_type",
    ),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "eva_config"),
    *("megatron_core", "qalora_group_size", "runtime_config", "lora_bias", "ensure_weight_tying", "init_lora_weights"),
}
_PLAIN_INIT = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base's weights
# what PEFT itself may merge: kinds that change weights by what is in their folder. Others name models, adapters or a
# tokenizer with code of its own elsewhere, which PEFT would fetch and load
_MERGED_BY_PEFT = {
    *("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "VERA", "FOURIERFT", "HRA", "VBLORA", "RANDLORA"),
    *("BONE", "MISS", "SHIRA", "C3A", "WAVEFT", "ROAD", "DELORA"),
}
# megatron_config makes PEFT import the module that megatron_core names
_NOT_LINEAR = (
    "megatron_config",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
)


@dataclasses.dataclass(frozen=True)
class Change:
    """A weight change beside its base.

    Attributes:
        base: the base's structure, whose names the modules bear.
        task_type: of the changed model, see `SdctConfig.task_type`.
        origin: where the base came from.
        shapes: module path -> `(d_out, d_in)` of the linear modules that may have changed.
        spectrum: module path -> `C_out dW C_in^T` as float32 `[d_out, d_in]`; ask once for each.
        saved: parameters to store in full.
        ignored: changed parameters that are neither linear weights nor saved; complete once all spectra were read.
    """

    base: Structure
    task_type: str | None
    origin: str
    shapes: Mapping[str, tuple[int, int]]
    spectrum: Callable[[str], Tensor]
    saved: Mapping[str, Array]
    ignored: list[str]


def from_peft(
    base: Checkpoint, folder: Path, *, task_type: str | None = None, model_class: str | None = None
) -> Change:
    """The change a PEFT adapter makes to `base`. Parameters of its `modules_to_save` are saved.

    Args:
        base: the base's checkpoint.
        folder: of the PEFT adapter.
        task_type: in place of the one that the adapter names.
        model_class: `MODULE:CLASS` of the base, in place of the task's.

    Raises:
        AdapterFormatError: the folder is no PEFT adapter, or damaged.
        BaseMismatchError: the adapter belongs to another base.
        UnsupportedError: it changes something other than linear weights, which is named, or PEFT cannot merge it.
    """
    raw = _read_peft_config(folder)
    task = task_type or (
        raw["task_type"] if raw.get("task_type") in TASK_TYPES else task_of_class(str(raw["auto_mapping"]))
    )
    if not (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_model.bin").is_file():
        raise UnsupportedError(
            f"{folder} stores its weights as adapter_model.bin; load it with PEFT and save it again as safetensors"
        )
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    tensors = {name.removeprefix(_PREFIX): array for name, array in tensors.items()}
    saved = {
        name: array
        for name, array in tensors.items()
        if any(f".{module}." in f".{name}" for module in raw["modules_to_save"]) and ".lora_" not in name
    }
    structure = structure_for(base, task, {name: array.shape for name, array in saved.items()}, model_class)
    rest = {name: array for name, array in tensors.items() if name not in saved}
    saved = {structure.resolve(name): array for name, array in saved.items()}
    unknown = sorted(set(saved) - set(structure.model.state_dict()))
    if unknown:
        raise BaseMismatchError(
            f"{folder} saves {unknown[0]!r}, which {type(structure.model).__name__} lacks; use the base model and the "
            "task that the adapter was trained for"
        )
    plain = raw["peft_type"] == "LORA" and raw.get("init_lora_weights") in _PLAIN_INIT
    if plain and not any(raw[key] for key in set(raw) - _PLAIN_LORA):
        shapes, spectrum, ignored = _lora(folder, raw, rest, structure)
    else:
        shapes, spectrum, ignored = _merged_by_peft(base, folder, raw, rest, task, structure, model_class)
    return Change(
        structure, task, raw.get("base_model_name_or_path") or str(base.folder), shapes, spectrum, saved, ignored
    )


def from_tuned(base: Checkpoint, tuned: Checkpoint, saves: Callable[[str], bool]) -> Change:
    """The difference `tuned - base`. Saved are modules that the base lacks and those whose path `saves` accepts.

    Raises:
        BaseMismatchError: a checkpoint is damaged, or the two do not belong together.
    """
    names = read_json(tuned.folder / CONFIG_FILE).get("architectures")
    task = task_of_class(str(names[0])) if isinstance(names, list) and names else None
    new = Structure(tuned, task)
    labels = new.config.num_labels if task in ("SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS") else None
    old = Structure(base, task, num_labels=labels)
    parameters = dict(new.model.named_parameters(remove_duplicate=False))
    tied = {name for group in tied_parameters(new.model) for name in group}
    shapes: dict[str, tuple[int, int]] = {}
    keys: dict[str, tuple[str, str]] = {}
    saved: dict[str, Array] = {}
    ignored = []
    for name, key in new.keys.items():
        path, _, leaf = name.rpartition(".")
        base_name = old.resolve(name)
        base_key = old.keys.get(base_name)
        if path and name in parameters and (base_key is None or saves(path)):
            saved[base_name] = to_numpy(tuned.read(key))
            continue
        if base_key is None:
            ignored.append(name)
            continue
        if tuned.tensors[key].shape != base.tensors[base_key].shape:
            raise BaseMismatchError(
                f"parameter {name!r} has shape {list(tuned.tensors[key].shape)} in {tuned.folder} and "
                f"{list(base.tensors[base_key].shape)} in {base.folder}; name its module in modules_to_save, or "
                "use the base that was tuned"
            )
        shape = linear_shape(new.model.get_submodule(path)) if leaf == "weight" and name not in tied else None
        if shape is not None and tuned.tensors[key].dtype in FLOATS:
            shapes[base_name.removesuffix(".weight")] = shape
            keys[base_name.removesuffix(".weight")] = key, base_key
        elif not _equal(tuned, key, base, base_key):
            ignored.append(name)
    if not shapes:
        raise BaseMismatchError(
            f"{tuned.folder} and {base.folder} share no linear weight; use the base that was tuned"
        )

    def spectrum(path: str) -> Tensor:
        after, before = tuned.read(keys[path][0]), base.read(keys[path][1])
        if is_conv1d(find_linear(old.model, path)):
            after, before = after.T, before.T
        return weight_spectrum(after, before)

    return Change(old, task, str(base.folder), shapes, spectrum, saved, ignored)


def read_weight(checkpoint: Checkpoint, structure: Structure, path: str) -> Tensor:
    """The weight `[d_out, d_in]` of a linear module, read from its file."""
    stored = checkpoint.read(structure.key(f"{path}.weight"))
    return stored.T if is_conv1d(find_linear(structure.model, path)) else stored


def weight_spectrum(weight: Tensor, minus: Tensor | None = None) -> Tensor:
    """`C_out (W - minus) C_in^T` as float32 for `W [d_out, d_in]`, in float64 a band of rows or columns at a time."""
    d_out, d_in = weight.shape
    out = torch.empty(d_out, d_in, dtype=torch.float32)
    step = max(1, BAND // d_in)
    for at in range(0, d_out, step):
        band = weight[at : at + step].double()
        out[at : at + step] = dct(band if minus is None else band - minus[at : at + step].double())
    step = max(COLUMNS, BAND // d_out)
    for at in range(0, d_in, step):
        out[:, at : at + step] = dct(out[:, at : at + step].double(), dim=0)
    return out


def product_spectrum(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Spectrum of `scaling * left right` as float32, from the thin factors `left [d_out, r]` and `right [r, d_in]`."""
    rows, cols = dct(left.double(), dim=0) * scaling, dct(right.double(), dim=1)
    out = torch.empty(len(left), right.shape[1], dtype=torch.float32)
    step = max(1, BAND // right.shape[1])
    for at in range(0, len(left), step):
        out[at : at + step] = rows[at : at + step] @ cols
    return out


_Parts = tuple[dict[str, tuple[int, int]], Callable[[str], Tensor], list[str]]


def _lora(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Array], structure: Structure) -> _Parts:
    """`dW = lora_alpha / r * B A`, with `A [r, d_in]` and `B [d_out, r]` whatever the layout of the base weight."""
    shapes: dict[str, tuple[int, int]] = {}
    factors: dict[str, tuple[Array, Array, float]] = {}
    ignored = []
    until = time.monotonic() + PATTERN_SECONDS
    for name in sorted(tensors):
        stem, found, kind = name.rpartition(".lora_")
        if not found or kind == "B.bias":
            ignored.append(name.replace(".base_layer.", ".").replace(".lora_B.bias", ".bias"))
            continue
        if kind.startswith("embedding_"):
            raise UnsupportedError(f"{folder} adapts the embedding {stem!r}; only linear layers can be projected")
        if kind not in ("A.weight", "B.weight"):
            raise UnsupportedError(f"{folder}: tensor {name!r} is of a LoRA variant that this version does not know")
        if stem + (".lora_B.weight" if kind == "A.weight" else ".lora_A.weight") not in tensors:
            raise AdapterFormatError(f"{folder}: module {stem!r} has only one of its LoRA factors; save it again")
        if kind == "B.weight":
            continue
        a, b = tensors[name], tensors[f"{stem}.lora_B.weight"]
        path = structure.resolve(f"{stem}.weight").removesuffix(".weight")
        shape = linear_shape(find_linear(structure.model, path))
        assert shape is not None
        rank = _pattern(folder, raw["rank_pattern"], stem, raw["r"], until)
        if (b.shape, a.shape) != ((shape[0], rank), (rank, shape[1])):
            raise BaseMismatchError(
                f"{folder}: module {stem!r} has factors {list(b.shape)} and {list(a.shape)}, but the base weight is "
                f"{shape[0]} x {shape[1]} and the rank {rank}; use the base model the adapter was trained on"
            )
        alpha = _pattern(folder, raw["alpha_pattern"], stem, raw["lora_alpha"], until)
        shapes[path] = shape
        factors[path] = b, a, alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
    if not shapes:
        raise AdapterFormatError(f"{folder} holds no LoRA factors; save the adapter again")

    def spectrum(path: str) -> Tensor:
        b, a, scaling = factors[path]
        return product_spectrum(
            torch.from_numpy(b.astype(np.float64)), torch.from_numpy(a.astype(np.float64)), scaling
        )

    return shapes, spectrum, ignored


def _merged_by_peft(
    base: Checkpoint,
    folder: Path,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Array],
    task: str | None,
    structure: Structure,
    model_class: str | None,
) -> _Parts:
    """The difference that merging makes to each adapted layer, by PEFT itself on the base in float32."""
    if raw["peft_type"] not in _MERGED_BY_PEFT:
        raise UnsupportedError(
            f"{folder} is a {raw['peft_type']!r} adapter, which changes no weights (prompt learning) or is not known "
            "to this version; it cannot be projected"
        )
    longest = max((n for array in tensors.values() for n in array.shape), default=0)
    patterns = read_json(folder / "adapter_config.json", AdapterFormatError).get("rank_pattern")
    patterns = patterns.values() if isinstance(patterns, dict) else ()
    for rank in (raw.get("r"), raw.get("init_r"), *patterns):
        if isinstance(rank, int) and rank > longest:  # PEFT would first make matrices of that rank
            raise AdapterFormatError(
                f"{folder}: no stored factor has the rank {rank} that its config names; copy it again"
            )
    _refuse_slow_patterns(folder)
    try:
        import peft
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    except ImportError:
        raise UnsupportedError(
            f"{folder} is no plain LoRA, and merging it needs PEFT; install it with `pip install 'sdct_export[peft]'`"
        ) from None
    labels = structure.config.num_labels if structure.resized else None
    heads = raw["modules_to_save"]
    saved = {n for n, _ in structure.model.named_parameters() if any(f".{m}." in f".{n}" for m in heads)}
    model = load_base(base.folder, task, dtype=torch.float32, num_labels=labels, model_class=model_class, saved=saved)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            tuned = peft.PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # a foreign adapter makes PEFT raise errors of many kinds
        raise BaseMismatchError(f"PEFT cannot apply {folder} to {base.folder}: {error}") from error
    for warning in told:
        if "missing adapter keys" in str(warning.message):  # for which PEFT makes values up
            raise AdapterFormatError(f"{folder} is incomplete; copy the whole folder. {warning.message}")
        warnings.warn(warning.message, stacklevel=2)
    if not isinstance(tuned.base_model, BaseTuner):
        raise UnsupportedError(f"{folder} does not change weights (prompt learning); it cannot be projected")
    layers: dict[str, Any] = {
        path: layer for path, layer in tuned.base_model.model.named_modules() if isinstance(layer, BaseTunerLayer)
    }
    shapes: dict[str, tuple[int, int]] = {}
    for path in layers:
        shape = linear_shape(find_linear(structure.model, path))
        assert shape is not None
        shapes[path] = shape
    ignored: list[str] = []

    def spectrum(path: str) -> Tensor:
        layer = layers[path]
        bias = getattr(layer.get_base_layer(), "bias", None)
        before = None if bias is None else bias.detach().clone()
        try:
            layer.merge()
        except Exception as error:
            raise UnsupportedError(f"{folder}: PEFT cannot merge module {path!r}: {error}") from error
        merged = layer.get_base_layer()
        if before is not None and not torch.equal(merged.bias.detach(), before):
            ignored.append(f"{path}.bias")
        return weight_spectrum(linear_weight(merged).detach(), read_weight(base, structure, path))

    return shapes, spectrum, ignored


def _read_peft_config(folder: Path) -> dict[str, Any]:
    """The fields of a PEFT configuration, those used here checked and defaults filled in."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterFormatError(f"{folder} is no PEFT adapter: it has no adapter_config.json; copy the whole folder")
    raw = read_json(path, AdapterFormatError)
    if raw.get("peft_type") == PEFT_TYPE:
        raise AdapterFormatError(f"{folder} is an sDCT adapter already; use it as it is")
    if not isinstance(raw.get("peft_type"), str):
        raise AdapterFormatError(f"{path} names no peft_type; copy the whole folder")
    for field in _NOT_LINEAR:
        if raw.get(field):
            raise UnsupportedError(f"{folder} uses {field}, which is no fixed change of linear weights")
    mapping = raw.get("auto_mapping") or {}
    raw["auto_mapping"] = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    saves = raw.get("modules_to_save") or []
    if not isinstance(saves, list) or not all(isinstance(name, str) for name in saves):
        raise AdapterFormatError(f"{path}: modules_to_save must be a list of names, got {saves!r}")
    raw["modules_to_save"] = saves
    if raw["peft_type"] == "LORA":
        for field in ("rank_pattern", "alpha_pattern"):
            raw[field] = raw.get(field) or {}
            if not isinstance(raw[field], dict):
                raise AdapterFormatError(f"{path}: {field} must map names to numbers, got {raw[field]!r}")
        for value in (raw.get("r"), *raw["rank_pattern"].values()):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise AdapterFormatError(f"{path}: r and rank_pattern must hold positive integers, got {value!r}")
        for value in (raw.get("lora_alpha"), *raw["alpha_pattern"].values()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise AdapterFormatError(f"{path}: lora_alpha and alpha_pattern must hold numbers, got {value!r}")
        for field in ("rank_pattern", "alpha_pattern"):
            raw[field] = [(_compiled(path, key), value) for key, value in raw[field].items()]
    return raw


def _compiled(path: Path, key: str) -> Any:
    """PEFT's rule for a key of `rank_pattern` or `alpha_pattern`: it matches the end of a module path.

    `regex` understands what `re` does, and can be stopped: some patterns take it and `re` longer than anybody lives.
    """
    import regex

    try:
        return regex.compile(rf"(.*\.)?({key})$")
    except (regex.error, RecursionError, OverflowError) as error:
        raise AdapterFormatError(f"{path}: pattern {key[:99]!r} is no regular expression: {error}") from None


def _pattern(folder: Path, patterns: Sequence[tuple[Any, Any]], path: str, default: Any, until: float) -> Any:
    """The value of the first pattern that matches a module path, else `default`; refused after the time `until`."""
    for compiled, value in patterns:
        try:
            if compiled.match(path, timeout=max(until - time.monotonic(), 1e-3)):
                return value
        except (TimeoutError, RecursionError, MemoryError):
            raise AdapterFormatError(
                f"{folder}: rank_pattern or alpha_pattern holds a pattern that takes too long to match "
                f"({compiled.pattern[8:-2][:99]!r}); write the names of the modules instead"
            ) from None
    return default


def _refuse_slow_patterns(folder: Path) -> None:
    """Refuse patterns of a PEFT configuration that may take Python's `re`, which PEFT uses, more than polynomial time.

    Allowed are up to four repetitions, each of one character or class, and three groups, which are not repeated.
    """
    raw = read_json(folder / "adapter_config.json", AdapterFormatError)
    for field in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = raw.get(field)
        for pattern in (value,) if isinstance(value, str) else value if isinstance(value, list | dict) else ():
            if field in ("target_modules", "exclude_modules") and not isinstance(value, str):
                continue  # names, which are compared
            text = str(pattern)
            groups = text.count("(")
            repeats = len(re.findall(r"[*+?{]", text.replace("(?", "(")))
            if len(text) > 1000 or repeats > 4 or groups > 3 or re.search(r"\)[*+?{]", text):
                raise UnsupportedError(
                    f"{folder}: {field} holds the pattern {text[:99]!r}, which may take for ever to match; write the "
                    "names of the modules into adapter_config.json instead, as a list"
                )


def _equal(a: Checkpoint, key_a: str, b: Checkpoint, key_b: str) -> bool:
    if a.tensors[key_a].dtype != b.tensors[key_b].dtype:
        return torch.equal(a.read(key_a).double(), b.read(key_b).double())
    return all(x == y for x, y in zip(a.chunks(key_a), b.chunks(key_b), strict=True))
