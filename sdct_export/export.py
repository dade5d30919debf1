"""A base model and adapters as an ONNX bundle: merged into the weights, or banked so that every row picks its own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from . import native
from .adapter.adapter import SdctAdapter
from .adapter.entries import DTYPE_NAMES
from .adapter.folder import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE, write_training
from .base.model import check_base, find_linear, linear_shape, load_base, model_digests, model_hash
from .base.model import task_type as task_type_of
from .base.reference import most_tokens, rotary_limit
from .base.sentence import Tail, add_tail, body_folder, load_tail, refuse_whole, settings_files
from .base.training import (
    check_record,
    checksums,
    class_name,
    class_of,
    fresh_parameters,
    model_config,
    set_padding,
    weights_of,
)
from .bundle.description import (
    ADAPTERS_FOLDER,
    DATA_FILE,
    MODEL_FILE,
    AdapterRecord,
    Bundle,
    TensorSpec,
    adapter_sha256,
    file_sha256,
    training_sha256,
)
from .bundle.onnx_adapter import SUFFIX, write_onnx_adapter
from .bundle.recording import record_probe
from .contract import ATTENTION_MASK, BATCH, BITS, INPUT_IDS, Cache, Foreign, Group, Head, Quantization
from .errors import AdapterFormatError, BaseMismatchError, ConfigError, UnsupportedError, an
from .files import check_adapter_name, copy_inside, folder_name, new_folder
from .graph.bfloat16 import FitBfloat16
from .graph.insert import InsertAdapters
from .graph.quantization import QuantizeWeights, linear_layers
from .graph.trace import SEQUENCE, trace
from .tuning.layer import SdctLayer
from .tuning.model import SdctModel

AdapterLike = SdctAdapter | str | Path
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEAST_KEPT = 0.9  # of a merged change, by `Merged.kept`; below that a warning says so
_GENERATION = "generation_config.json"
# what serving needs of a base folder, beside its weights and config
_COPIED = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*",
    "preprocessor_config.json", "processor_config.json", _GENERATION,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Base:
    """The base as loaded: a private torch model, where it came from, and its identity before any cast.

    `tail` is what follows `model` in a SentenceTransformer; identity and training are those of `model` alone.
    """

    model: nn.Module
    tail: Tail | None
    source: str | Path | nn.Module
    task: str
    dtype: str
    shapes: Mapping[str, tuple[int, int]]
    hash: str
    digests: Mapping[str, Mapping[str, str]]
    weights: Mapping[str, Mapping[str, int]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A base with the adapters of a multi-adapter export, each checked against it.

    `sources` and `hashes` say where each of `named` was read; `heads` are saved linear layers and their shapes,
    `capacity` the coefficients of each adapted layer's largest adapter.
    """

    base: _Base
    sources: Mapping[str, AdapterLike]
    hashes: Mapping[str, str | None]
    named: Mapping[str, SdctAdapter]
    heads: Mapping[str, tuple[int, int]]
    capacity: Mapping[str, int]


def export_merged(
    model: str | Path | nn.Module,
    adapter: AdapterLike | None,
    output: str | Path,
    *,
    task_type: str | None = None,
    model_class: str | None = None,
    dtype: str | None = None,
    cache: bool | None = None,
    target: str | None = None,
    quantize: str | None = None,
    block_size: int | None = None,
    accuracy_level: int | None = None,
) -> Bundle:
    """Write a bundle whose `model.onnx` has `adapter` merged into its weights; it runs like any ONNX model.

    Args:
        model: checkpoint folder, or a transformers model or `SdctModel` (left as it is). Of a SentenceTransformer's
            folder the bundle has the pooling, too, and gives `sentence_embedding [batch, dim]`.
        adapter: an adapter or its folder; of an `SdctModel` also the name of one on it, or None for the active one.
        output: the new folder.
        task_type: chooses the model class of a checkpoint; default: the class the adapter was trained on, or else the
            task its config names.
        model_class: `MODULE:CLASS` of a checkpoint, needed where the adapter was trained on a class of one's own, and
            for the transformer of a SentenceTransformer without its pooling.
        dtype: `float32`, `float16` or `bfloat16` (for ONNX Runtime's CUDA provider and TensorRT 10 on); `base` for the
            base's own. Default: the base's own, but float32, with a warning, for a bfloat16 base.
        cache: whether the graph has a key-value cache (see `contract`); default: for a causal language model.
        target: who computes the attention of a graph with a cache (`contract.Cache`), `ort`, `standard` or `tensorrt`;
            default: `ort` where its operator takes the model.
        quantize: `int8` or `int4`: the linear layers, after the merge, by ONNX Runtime's quantizer; what `dtype` says
            is then the type of all else, float32 or float16. Heads stay as they are. For ONNX Runtime only.
        block_size: 16, 32, 64, 128 or 256: how many elements share a scale; default 32.
        accuracy_level: ONNX Runtime's number for how it multiplies: 4 rounds what is multiplied to 8 bits, too (the
            default, fast), 1 does not (slow on a CPU, with int8 very slow).

    Raises:
        ConfigError: a setting has no such value.
        AdapterFormatError, BaseMismatchError: the adapter is damaged, or does not fit the base.
        UnsupportedError: the model cannot be exported; names the module and the reason.
        OutputError: `output` exists, or cannot be written.
    """
    from .weights.merging import merge

    settings = _quantization(quantize, block_size, accuracy_level, target)
    if adapter is None and isinstance(model, SdctModel):
        adapter = model.active
    named = {name: _load(a) for name, a in _named(model, [adapter]).items()}
    base = _prepare(model, named, task_type, model_class)
    (merged,) = named.values()
    exported = _export_dtype(base, dtype, settings)
    cached = _is_cached(base, cache, target)
    change = merge(base.model.float(), merged)
    kept = change.kept(merged.modules, DTYPES[exported]) if exported != "float32" else 1.0
    if kept < LEAST_KEPT:
        warnings.warn(
            f"rounded to {exported} the merged weights keep {kept:.0%} of the adapter's change; merge in a wider type "
            "(--dtype float32), or export without --merge, which leaves the adapter as it is",
            stacklevel=2,
        )
    labels = None if merged.trained_on is None else merged.trained_on.id2label
    config: Any = getattr(base.model, "config", None)
    if labels is not None and config is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    _complete(base, exported)
    with new_folder(output) as folder:
        graph, layout = _trace(base, exported, cached, target)
        settings = _quantize(graph, base, {"": merged}, settings)
        if merged.trained_on is not None:
            write_training(folder, merged.trained_on)
        write_bundle(folder, "merged", base, exported, graph, len(graph.graph.inputs), layout, (), (), {}, settings)
        record_probe(base.model.float(), {}, folder)  # in place: the graph shared these weights
    return Bundle.load(output)


def export_multi(
    model: str | Path | nn.Module,
    adapters: Mapping[str, AdapterLike] | Sequence[AdapterLike] | None,
    output: str | Path,
    *,
    task_type: str | None = None,
    model_class: str | None = None,
    dtype: str | None = None,
    cache: bool | None = None,
    target: str | None = None,
    quantize: str | None = None,
    block_size: int | None = None,
    accuracy_level: int | None = None,
) -> Bundle:
    """Write a bundle in which every batch row picks its own adapters (see `contract`).

    Args:
        model: checkpoint folder, or a transformers model or `SdctModel` (left as it is). Of a SentenceTransformer's
            folder the bundle has the pooling, too, and gives `sentence_embedding [batch, dim]`.
        adapters: name -> adapter or its folder; or a list of folders, named as these are. Of an `SdctModel` also a
            list of names of adapters on it, or None for all of them. Capacities and the number of labels come from
            the largest; others that fit can be loaded when the bundle runs.
        output: the new folder.
        task_type: chooses the model class of a checkpoint; default: the class the adapters were trained on, or else
            the task their configs name.
        model_class: `MODULE:CLASS` of a checkpoint, needed where adapters were trained on a class of one's own, and
            for the transformer of a SentenceTransformer without its pooling.
        dtype: `float32`, `float16` or `bfloat16` (for ONNX Runtime's CUDA provider and TensorRT 10 on); `base` for the
            base's own. Default: the base's own, but float32, with a warning, for a bfloat16 base.
        cache: whether the graph has a key-value cache (see `contract`); default: for a causal language model.
        target: who computes the attention of a graph with a cache (`contract.Cache`), `ort`, `standard` or `tensorrt`;
            default: `ort` where its operator takes the model.
        quantize: `int8` or `int4`: the base's linear layers, by ONNX Runtime's quantizer; what `dtype` says is then
            the type of all else, float32 or float16. Adapters and heads stay as they are. For ONNX Runtime only.
        block_size: 16, 32, 64, 128 or 256: how many elements share a scale; default 32.
        accuracy_level: ONNX Runtime's number for how it multiplies: 4 rounds what is multiplied to 8 bits, too (the
            default, fast), 1 does not (slow on a CPU, with int8 very slow).

    Raises:
        ConfigError: no adapter, a name that is not allowed, adapters of different tasks, or a setting that has no such
            value.
        AdapterFormatError, BaseMismatchError: an adapter is damaged, or does not fit the base.
        UnsupportedError: the model or a saved module cannot be exported; names the module and the reason. Or ONNX
            Runtime is not installed.
        OutputError: `output` exists, or cannot be written.
    """
    native.onnxruntime()  # writes the `.onnx_adapter` files in the end
    settings = _quantization(quantize, block_size, accuracy_level, target)
    prepared = prepare_multi(model, adapters, task_type, model_class)
    base, named = prepared.base, prepared.named
    exported = _export_dtype(base, dtype, settings)
    cached = _is_cached(base, cache, target)
    _complete(base, exported)
    with new_folder(output) as folder:
        graph, layout = _trace(base, exported, cached, target)
        own_inputs = len(graph.graph.inputs)
        insertion = InsertAdapters(base.shapes, prepared.capacity, prepared.heads)
        insertion(graph)
        settings = _quantize(graph, base, named, settings)
        write_bundle(
            folder, "multi", base, exported, graph, own_inputs, layout, insertion.groups, insertion.heads,
            ship_adapters(folder, prepared), settings,
        )  # fmt: skip
        record_probe(base.model.float(), named, folder)  # in place: the graph shared these weights
        write_onnx_adapters(folder, named)
    return Bundle.load(output)


def prepare_multi(
    model: str | Path | nn.Module,
    adapters: Mapping[str, AdapterLike] | Sequence[AdapterLike] | None,
    task_type: str | None,
    model_class: str | None,
) -> Prepared:
    """Load base and adapters for a multi-adapter export; arguments and errors are those of `export_multi`."""
    sources = _named(model, adapters)
    if not sources:
        raise ConfigError("a multi-adapter export needs at least one adapter, to know which modules to prepare")
    hashes = {name: _hash(source) for name, source in sources.items()}
    named = {check_adapter_name(name): _load(adapter) for name, adapter in sources.items()}
    base = _prepare(model, named, task_type, model_class)
    capacity = {m: max(a.modules[m].n for a in named.values() if m in a.modules) for m in base.shapes}
    return Prepared(base, sources, hashes, named, _heads(base.model, named), capacity)


def ship_adapters(folder: Path, prepared: Prepared) -> dict[str, AdapterRecord]:
    """Put the adapters into the bundle `folder`, and give what its description says of them."""
    head = _label_head(prepared.base.model, prepared.named)
    return {
        name: _ship(folder, name, prepared.sources[name], prepared.hashes[name], adapter, head)
        for name, adapter in prepared.named.items()
    }


def write_onnx_adapters(folder: Path, named: Mapping[str, SdctAdapter]) -> None:
    """Put each adapter into the bundle `folder` for ONNX Runtime's own adapter API, too."""
    described = Bundle.load(folder)
    for name, adapter in named.items():
        file = folder / ADAPTERS_FOLDER / f"{name}{SUFFIX}"
        write_onnx_adapter(described, adapter, file, label=f"adapter {name!r}")


def _named(
    model: str | Path | nn.Module, adapters: Mapping[str, AdapterLike] | Sequence[AdapterLike | None] | None
) -> Mapping[str, AdapterLike]:
    """Name -> adapter or its folder, whatever form the caller chose."""
    if isinstance(adapters, Mapping):
        return adapters
    live = model if isinstance(model, SdctModel) else None
    if adapters is None:
        adapters = [] if live is None else live.adapters
    if isinstance(adapters, str | Path | SdctAdapter):
        adapters = [adapters]
    named: dict[str, AdapterLike] = {}
    for item in adapters:
        if item is None:
            raise ConfigError("no adapter was given, and none is active on the model; name one")
        if live is not None and isinstance(item, str) and item in live.configs:
            name, item = item, live.adapter(item)
        else:
            name = "adapter" if isinstance(item, SdctAdapter) else folder_name(item)
        if name in named:
            raise ConfigError(f"two adapters are called {name!r}; pass a mapping of names to adapters")
        named[name] = item
    return named


def _load(adapter: AdapterLike) -> SdctAdapter:
    return adapter if isinstance(adapter, SdctAdapter) else SdctAdapter.load(adapter)


def _prepare(
    source: str | Path | nn.Module, named: Mapping[str, SdctAdapter], task_type: str | None, model_class: str | None
) -> _Base:
    """Load or copy the base, size its head for the adapters, and check that every adapter was trained on it."""
    task = task_type or _common_task(named)
    fresh = tail = None
    if isinstance(source, nn.Module):
        refuse_whole(source)
        if not isinstance(source, SdctModel) and any(isinstance(module, SdctLayer) for module in source.modules()):
            raise ConfigError(f"this {type(source).__name__} carries adapters; pass its SdctModel")
        fresh = source.fresh_parameters if isinstance(source, SdctModel) else fresh_parameters(source)
        model = (source.plain_base() if isinstance(source, SdctModel) else copy.deepcopy(source)).eval()
    else:
        chosen = None if task_type and model_class is None else class_of(named, model_class)
        saved = set.intersection(*(set(adapter.saved) for adapter in named.values()))
        load = functools.partial(load_base, body_folder(source), task, model_class=chosen, saved=saved)
        model = load()
        head = _label_head(model, named)
        labels = max(_labels(adapter, head) or 0 for adapter in named.values())
        if labels and head and labels != model.get_parameter(f"{head}.weight").shape[0]:
            model = _with_labels(load, labels, model, head)
        set_padding(model, [adapter.trained_on for adapter in named.values()])
        if model_class is None and task_type_of(model) == "FEATURE_EXTRACTION":
            tail = load_tail(source, model)
    known = task_type_of(model)
    if task_type and known not in (task_type, None) and class_name(model).startswith("transformers:"):
        raise ConfigError(
            f"a {type(model).__name__} is for {known}, not for {task_type}; leave --task (task_type) out"
        )
    label_head = _label_head(model, named)
    sums = functools.cache(functools.partial(checksums, model))
    for name, adapter in named.items():
        check_base(adapter, model, label=f"adapter {name!r}")
        check_record(adapter, model, fresh, label=f"adapter {name!r}", sums=sums)
        _check_names(f"adapter {name!r}", adapter, label_head)
    shapes = _shapes(model, named)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if task is None:
        task = task_type_of(model) or "FEATURE_EXTRACTION"
    digests = model_digests(model, shapes)
    weights = {n: {str(key): total for key, total in weights_of(sums(n), n).sums.items()} for n in DTYPE_NAMES}
    return _Base(model, tail, source, task, dtype, shapes, model_hash(model, shapes, dtype), digests, weights)


def _complete(base: _Base, dtype: str) -> None:
    """Put what follows the model behind it, now that nothing is asked of the model alone, and cast both."""
    if base.tail is not None:
        add_tail(base.model, base.tail)
    base.model.to(DTYPES[dtype])


def _shapes(model: nn.Module, named: Mapping[str, SdctAdapter]) -> dict[str, tuple[int, int]]:
    """Adapted module -> `(d_out, d_in)`, over all adapters."""
    paths = sorted({path for adapter in named.values() for path in adapter.modules})
    found = {path: linear_shape(find_linear(model, path)) for path in paths}
    return {path: shape for path, shape in found.items() if shape is not None}


def _common_task(named: Mapping[str, SdctAdapter]) -> str | None:
    tasks = {adapter.config.task_type: name for name, adapter in named.items() if adapter.config.task_type}
    if len(tasks) > 1:
        listed = ", ".join(f"{name!r} is {task}" for task, name in tasks.items())
        raise ConfigError(
            f"the adapters are of different tasks ({listed}); export one bundle a task, or pass task_type"
        )
    return next(iter(tasks), None)


def _label_head(model: nn.Module, named: Mapping[str, SdctAdapter]) -> str | None:
    """The saved module that gives the labels: the last one of the model that an adapter saves."""
    saved = {name for adapter in named.values() for name in adapter.saved}
    paths = [path for path, module in model.named_modules() if f"{path}.weight" in saved and linear_shape(module)]
    return paths[-1] if paths else None


def _labels(adapter: SdctAdapter, head: str | None) -> int | None:
    weight = adapter.saved.get(f"{head}.weight")
    return None if weight is None else int(weight.shape[0])


def _check_names(label: str, adapter: SdctAdapter, head: str | None) -> None:
    names = None if adapter.trained_on is None else adapter.trained_on.id2label
    labels = _labels(adapter, head)
    if names is not None and labels is not None and len(names) != labels:
        raise AdapterFormatError(
            f"{label} names {len(names)} labels (id2label), but its head {head!r} has {labels}; save it again"
        )


def _with_labels(load: Callable[..., nn.Module], labels: int, model: nn.Module, head: str) -> nn.Module:
    """The base with a head of `labels`, or `model` itself where its trained head is larger than that."""
    weight = model.get_parameter(f"{head}.weight")
    return model if len(weight) > labels and weight.any() else load(num_labels=labels)


def _heads(model: nn.Module, named: Mapping[str, SdctAdapter]) -> dict[str, tuple[int, int]]:
    """Saved linear modules and their shapes in the order of the model; refuses what cannot be banked."""
    saved = {parameter for adapter in named.values() for parameter in adapter.saved}
    label_head = _label_head(model, named)
    heads: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(path, recurse=False) if name in saved]
        if not own:
            continue
        if not isinstance(module, nn.Linear):
            raise UnsupportedError(
                f"an adapter saves {own[0]!r}, a parameter of {an(type(module).__name__)}; only linear layers of "
                "saved modules can differ from row to row: merge this adapter instead (--merge)"
            )
        heads[path] = (module.out_features, module.in_features)
        for name, adapter in named.items():
            _check_head(f"adapter {name!r}", path, module, adapter, path == label_head)
    return heads


def _check_head(label: str, path: str, module: nn.Linear, adapter: SdctAdapter, is_label_head: bool) -> None:
    names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
    found = [name for name in names if name in adapter.saved]
    if found and len(found) != len(names):
        raise BaseMismatchError(
            f"{label} stores {found[0]!r} but not {(set(names) - set(found)).pop()!r}; save the whole module {path!r}"
        )
    for name in found:
        got, want = adapter.saved[name].shape, tuple(module.get_parameter(name.rpartition(".")[2]).shape)
        if got[1:] != want[1:] or got[0] > want[0] or (got[0] < want[0] and not is_label_head):
            raise BaseMismatchError(
                f"{label} stores {name!r} of shape {list(got)}, the base has {list(want)}; use a base whose module "
                f"{path!r} has the shape the adapter was trained with"
            )


def _quantization(
    quantize: str | None, block_size: int | None, accuracy_level: int | None, target: str | None
) -> Quantization | None:
    """The settings as one, None for an export in float."""
    if quantize is None:
        if block_size is not None or accuracy_level is not None:
            raise ConfigError("block_size and accuracy_level are for quantized exports; pass quantize='int8', too")
        return None
    if quantize not in BITS:
        raise ConfigError(f"quantize must be one of {', '.join(BITS)}; got {quantize!r}")
    if target == "tensorrt":
        raise UnsupportedError(
            "a quantized bundle runs in ONNX Runtime, whose operator MatMulNBits TensorRT does not have; leave target "
            "(--target) out, or export without --quantize"
        )
    native.onnxruntime()  # has the quantizer
    settings = Quantization(BITS[quantize])
    return dataclasses.replace(
        settings,
        block_size=settings.block_size if block_size is None else block_size,
        accuracy_level=settings.accuracy_level if accuracy_level is None else accuracy_level,
    )


def _quantize(
    graph: ir.Model, base: _Base, named: Mapping[str, SdctAdapter], settings: Quantization | None
) -> Quantization | None:
    """Quantize the linear layers of `graph`; the settings with the layers that were."""
    if settings is None:
        return None
    heads = {parameter.rpartition(".")[0] for adapter in named.values() for parameter in adapter.saved}
    quantization = QuantizeWeights(linear_layers(base.model, heads, base.task), settings)
    quantization(graph)
    return dataclasses.replace(settings, modules=tuple(quantization.modules))


def _export_dtype(base: _Base, dtype: str | None, settings: Quantization | None) -> str:
    own = base.dtype if base.dtype in DTYPES else "float32"
    if settings is not None and (own if dtype == "base" else dtype) == "bfloat16":
        raise UnsupportedError(
            "a quantized bundle is float32 or float16 in what is not quantized, not bfloat16; pass dtype='float32' "
            "(--dtype float32)"
        )
    if dtype is None and own == "bfloat16":
        warnings.warn(
            "the base is bfloat16, this bundle holds the same numbers in float32, which every runtime can run; "
            "--dtype bfloat16 (dtype='bfloat16') keeps half the size for ONNX Runtime's CUDA provider and TensorRT 10",
            stacklevel=3,
        )
        return "float32"
    chosen = own if dtype in (None, "base") else str(dtype)
    if chosen not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {chosen!r}")
    return chosen


def _is_cached(base: _Base, cache: bool | None, target: str | None) -> bool:
    """Whether the graph gets a cache; refuses to give one to what is no causal language model."""
    language = base.task == "CAUSAL_LM"
    if (cache or target is not None) and not language:
        raise ConfigError(
            f"a key-value cache is for causal language models, this {type(base.model).__name__} is for {base.task}; "
            "leave cache and target (--target) out"
        )
    if cache is False and target is not None:
        raise ConfigError(f"target {target!r} is about the cache; leave it out of an export without one (--no-cache)")
    return language if cache is None else cache


def _trace(base: _Base, dtype: str, cached: bool, target: str | None) -> tuple[ir.Model, Cache | None]:
    if cached:
        from .graph.cache import trace_decoder

        graph, cache = trace_decoder(base.model, target)
    else:
        graph, cache = trace(base.model), None
    if dtype == "bfloat16":
        FitBfloat16(() if cache is None else (*cache.pasts, *cache.presents))(graph)
    return graph, cache


def _hash(source: AdapterLike) -> str | None:
    """`adapter_sha256` of a folder that an adapter is read from, None where it is none of its own."""
    if isinstance(source, SdctAdapter) or not all(
        (Path(source) / file).exists() for file in (CONFIG_FILE, WEIGHTS_FILE)
    ):
        return None
    return adapter_sha256(Path(source))


def _ship(
    folder: Path, name: str, source: AdapterLike, sha256: str | None, adapter: SdctAdapter, head: str | None
) -> AdapterRecord:
    """Copy an adapter's files byte for byte, or save one that lives in memory or in a checkpoint."""
    target = folder / ADAPTERS_FOLDER / name
    if isinstance(source, SdctAdapter) or sha256 is None:
        adapter.save(target)
        return AdapterRecord(adapter_sha256(target), _labels(adapter, head))
    target.mkdir(parents=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE, *([TRAINING_FILE] if (Path(source) / TRAINING_FILE).exists() else [])):
        shutil.copyfile(Path(source) / file, target / file)
    if adapter_sha256(target) != sha256:  # what was checked and recorded is not what would be served
        raise AdapterFormatError(f"{source} changed while it was exported; export again")
    return AdapterRecord(sha256, _labels(adapter, head))


def write_bundle(
    folder: Path,
    kind: str,
    base: _Base,
    dtype: str,
    graph: ir.Model,
    own_inputs: int,
    cache: Cache | None,
    groups: Sequence[Group],
    heads: Sequence[Head],
    adapters: Mapping[str, AdapterRecord],
    quantization: Quantization | None,
    foreign: Foreign | None = None,
    most: int | None = None,
) -> None:
    """Write the graph with its weights beside it, the base's small files, and the description.

    `most` is how many tokens a row of this graph may have, None where nothing but the base limits them.
    """
    limits = [most, most_tokens(base.model)]
    if cache is not None and (limit := rotary_limit(base.model)) is not None:
        limits.append(limit)
        warnings.warn(
            f"the rotary positions of a row depend on its length beyond {limit} tokens, where keys in a cache would "
            f"not be right any more: the bundle takes at most {limit}; export with --no-cache (cache=False) for more",
            stacklevel=3,
        )
    ir.save(graph, folder / MODEL_FILE, external_data=DATA_FILE)
    config = getattr(base.model, "config", None)
    if config is not None:
        config.architectures = [type(base.model).__name__]
        config.save_pretrained(folder)
    source = Path(_name(base))  # of a model in memory, the folder it was loaded from
    for name, file in (settings_files(source) if base.tail is not None else {}).items():
        copy_inside(source, file, folder / name)
    source = Path(body_folder(source))
    if source.is_dir():
        for pattern in _COPIED:
            for file in filter(Path.is_file, sorted(source.glob(pattern))):
                copy_inside(source, file, folder / file.name)
    defaults = getattr(base.model, "generation_config", None)
    own = isinstance(base.source, nn.Module) or not (folder / _GENERATION).exists()
    if defaults is not None and base.task == "CAUSAL_LM" and own:  # they may be set in memory, or come of the config
        defaults.to_json_file(folder / _GENERATION)
    Bundle(
        kind=kind,
        task=base.task,
        dtype=dtype,
        base_name=_name(base),
        base_architecture=type(base.model).__name__,
        base_hash=base.hash,
        base_hash_dtype=base.dtype,
        inputs=_specs(graph.graph.inputs[:own_inputs], cache),
        outputs=_specs(graph.graph.outputs, cache),
        model_sha256=file_sha256(folder / MODEL_FILE),
        data_sha256=file_sha256(folder / DATA_FILE) if (folder / DATA_FILE).exists() else None,
        groups=tuple(groups),
        heads=tuple(heads),
        adapters=adapters,
        module_digests=base.digests,
        model_class=class_name(base.model),
        model_config=model_config(base.model),
        weights=base.weights,
        training_sha256=training_sha256(folder),
        max_tokens=min((limit for limit in limits if limit is not None), default=None),
        pooling=() if base.tail is None else base.tail.described,
        cache=cache,
        quantization=quantization,
        foreign=foreign,
    ).write(folder)


def _name(base: _Base) -> str:
    if isinstance(base.source, nn.Module):
        return getattr(getattr(base.model, "config", None), "name_or_path", "") or type(base.model).__name__
    return str(base.source)


def _specs(values: Sequence[ir.Value], cache: Cache | None) -> tuple[TensorSpec, ...]:
    """What a graph says of its inputs or outputs; of one with a cache those of a call without a past."""
    specs = []
    for value in values:
        assert value.name
        assert value.dtype is not None
        assert value.shape is not None
        shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
        if cache is not None:
            if value.name not in (INPUT_IDS, ATTENTION_MASK, "logits"):
                continue
            shape = (BATCH, SEQUENCE, *shape[2:])
        specs.append(TensorSpec(value.name, value.dtype.numpy().name, shape))
    return tuple(specs)
