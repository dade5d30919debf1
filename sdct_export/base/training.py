"""Is this the model an adapter was trained on? What is recorded when it is saved, and compared at every later step."""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter.adapter import SdctAdapter
from ..adapter.entries import Array
from ..adapter.training import (
    TOLERANCES,
    TrainingProbe,
    TrainingRecord,
    Weights,
    check_class,
    config_differences,
    formula,
    positions,
    scattered,
)
from ..errors import BaseMismatchError, ConfigError
from .checkpoint import tied_parameters
from .model import CHILD, to_numpy
from .reference import run_adapted, run_model

BATCH, SEQUENCE, PADDED = 2, 8, 3  # rows and tokens of the probe, and how many of the last row are padding
Sums = Callable[[str], Mapping[str, tuple[torch.dtype, int]]]  # `checksums` of a model, by dtype
_CAST = 1 << 24  # elements cast at a time, so that no copy of a large table lies in memory
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def class_name(model: nn.Module) -> str:
    """`transformers:NAME` of a class that transformers hands out, else `MODULE:NAME`."""
    cls = type(model)
    if cls.__module__.split(".")[0] == "transformers":
        return f"transformers:{cls.__name__}"
    return f"{cls.__module__}:{cls.__qualname__}"


def fresh_parameters(model: nn.Module) -> tuple[str, ...] | None:
    """Parameters that no checkpoint gave `model`, in sorted order; None where that is not known.

    transformers marks every tensor it reads from a checkpoint. A model without a single mark was not loaded by it (or
    was copied since), and nothing can be said.
    """
    named = {n: p for n, p in model.named_parameters(remove_duplicate=False) if f".{CHILD}.entries." not in n}
    read = {name for name, parameter in named.items() if getattr(parameter, "_is_hf_initialized", False)}
    if not read:
        return None
    for group in tied_parameters(model):  # one of them was read, so all of them were
        if read & set(group):
            read |= set(group)
    return tuple(sorted(set(named) - read))


def unsaved(fresh: tuple[str, ...] | None, saves: Callable[[str], bool]) -> list[str]:
    """The parameters of `fresh` that lie in no module for which `saves(module path)` holds."""
    return [
        name
        for name in fresh or ()
        if not any(saves(name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1))
    ]


def record(
    model: nn.Module,
    *,
    of: nn.Module | None = None,
    fresh: tuple[str, ...] | None = None,
    weights: Weights | None = None,
) -> TrainingRecord:
    """What `model`, a base with one adapter applied, is and computes now.

    Args:
        model: what runs.
        of: the base whose class is recorded, where `model` only wraps it.
        fresh: the base's fresh parameters, as found before training.
        weights: checksums of the base beside what adapters change, as found before training.

    Raises:
        ConfigError: the configuration names its labels by other numbers than 0, 1, ...
    """
    base = of if of is not None else model
    names = label_names(base)
    return TrainingRecord(class_name(base), fresh, names, _probe(model, base), model_config(base), weights)


def label_names(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the labels in their order, None where they have none of their own.

    Raises:
        ConfigError: `config.id2label` has other keys than 0, 1, ... (as JSON gives them, texts of these are taken).
    """
    raw = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(raw, Mapping) or not raw:
        return None
    try:
        names = {int(key): str(name) for key, name in raw.items()}
    except (TypeError, ValueError):
        names = {}
    if sorted(names) != list(range(len(raw))):
        raise ConfigError(
            f"config.id2label must name labels 0 to {len(raw) - 1}, its keys are {list(raw)[:3]}...; count from 0"
        )
    ordered = tuple(names[i] for i in range(len(names)))
    return None if ordered == tuple(f"LABEL_{i}" for i in range(len(names))) else ordered


def model_config(model: nn.Module) -> dict[str, Any] | None:
    """The configuration of a transformers model as JSON holds it, None for any other model."""
    config: Any = getattr(model, "config", None)
    return json.loads(config.to_json_string(use_diff=False)) if hasattr(config, "to_json_string") else None


def set_padding(model: nn.Module, records: Iterable[TrainingRecord | None]) -> None:
    """Give a loaded base the padding token that all adapters were trained with, where its own configuration differs.

    A person who classifies with GPT-2 sets `model.config.pad_token_id` in memory; the checkpoint never hears of it.
    """
    found = {(record.model_config or {}).get("pad_token_id") for record in records if record is not None}
    config: Any = getattr(model, "config", None)
    if len(found) > 1 and hasattr(config, "pad_token_id"):
        listed = ", ".join(sorted(map(str, found)))
        raise BaseMismatchError(
            f"the adapters were trained with different pad_token_id ({listed}), a model has one; export each alone"
        )
    if len(found) == 1 and isinstance(token := found.pop(), int) and hasattr(config, "pad_token_id"):
        config.pad_token_id = token


def check_config(trained: TrainingRecord, config: Mapping[str, Any] | None, *, label: str = "the adapter") -> None:
    """Raise `BaseMismatchError` where a base has another configuration than the one an adapter was trained on."""
    differ = config_differences(trained.model_config, config) if trained.model_config and config else {}
    if differ:
        listed = ", ".join(f"{name} was {want!r}, is {got!r}" for name, (want, got) in list(differ.items())[:3])
        raise BaseMismatchError(
            f"{label} was trained on a model of another configuration ({listed}); a change in memory is not in the "
            "checkpoint: set it on the base, use the folder that save_pretrained of the trained model's base writes, "
            "or export the live model"
        )


def checksums(model: nn.Module, dtype: str | None = None) -> dict[str, tuple[torch.dtype, int]]:
    """Name -> own dtype and checksum of every floating-point tensor that a checkpoint of `model` would hold.

    The checksum is `sum_r (2 r + 1) sum_c bits[r, c]` modulo 2^64 over the rows of the tensor, cast to `dtype`
    (default: the model's), so that changed and exchanged weights show. One pass; nothing for a model that is spread
    over processes or lies on the meta device.
    """
    if _is_sharded(model) or not any(parameter.is_floating_point() for parameter in model.parameters()):
        return {}
    target = getattr(torch, dtype or float_dtype(model))
    kept = set(model.state_dict())
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    sums = {}
    for name, tensor in tensors:
        if f".{CHILD}.entries." in f".{name}" or name not in kept:
            continue
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            flat = tensor.detach().reshape(len(tensor) if tensor.ndim > 1 else tensor.numel(), -1)
            parts = (part.to(target).contiguous() for part in torch.split(flat, max(1, _CAST // flat.shape[1])))
            by_part = [part.view(_INTEGERS[part.element_size()]).sum(1, dtype=torch.int64) for part in parts]
            rows = torch.cat(by_part)
            odd = torch.arange(len(rows), device=rows.device, dtype=torch.int64) * 2 + 1
            sums[name] = (tensor.dtype, int((rows * odd).sum()))
    return sums


def weights_of(sums: Mapping[str, tuple[torch.dtype, int]], dtype: str) -> Weights:
    """`checksums` in `dtype` as they are recorded."""
    return Weights(dtype, {zlib.crc32(name.encode()): total for name, (_, total) in sums.items()})


def check_weights(
    trained: TrainingRecord, model: nn.Module, *, label: str = "the adapter", sums: Sums | None = None
) -> None:
    """Raise `BaseMismatchError` where a weight of `model` that an adapter leaves as it is is not what it was.

    A model in a type that holds less than the one the checksums were taken in cannot be compared. `sums` gives the
    model's `checksums` in a type, where somebody keeps them.
    """
    if trained.weights is None or any(parameter.is_meta for parameter in model.parameters()):
        return
    recorded = trained.weights.dtype
    if torch.promote_types(getattr(torch, recorded), getattr(torch, own := float_dtype(model))) != getattr(torch, own):
        return
    found = checksums(model, recorded) if sums is None else sums(recorded)
    keys = {zlib.crc32(name.encode()): name for name in found}
    differing = trained.weights.differing(weights_of(found, recorded).sums)
    if differing:
        raise BaseMismatchError(
            f"{label} was trained on a base with another {keys[differing[0]]!r} ({len(differing)} such tensors); use "
            "the base it was trained on, or, where weights were changed in memory, save that base (save_pretrained)"
        )


def check_record(
    adapter: SdctAdapter,
    model: nn.Module,
    fresh: tuple[str, ...] | None = None,
    *,
    label: str = "the adapter",
    sums: Sums | None = None,
) -> None:
    """Raise `BaseMismatchError` unless `model` is what `adapter` was trained on: its class, and what it computes.

    Of an adapter that records no training only this is known: that it must save the parameters in `fresh` (by default
    `fresh_parameters(model)`), which no checkpoint gave this model. On the meta device nothing is computed.
    """
    trained = adapter.trained_on
    if trained is not None:
        check_class(trained, class_name(model), label=label)
        check_config(trained, model_config(model), label=label)
    missing = sorted(set(fresh or fresh_parameters(model) or ()) - set(adapter.saved))
    if missing:
        raise BaseMismatchError(
            f"{label} does not save {missing[0]!r}, which the base's checkpoint lacks too ({len(missing)} such "
            f"parameters), so it has no trained value; use the base it was trained on "
            f"({adapter.config.base_model_name_or_path or 'unknown'})"
        )
    if trained is not None:
        check_probe(trained, model, adapter, label=label)
        check_weights(trained, model, label=label, sums=sums)


def check_probe(
    trained: TrainingRecord, model: nn.Module, adapter: SdctAdapter | None, *, label: str = "the adapter"
) -> None:
    """Raise `BaseMismatchError` unless `model` gives what was recorded, with `adapter` applied or merged in (None)."""
    if trained.probe is None or any(parameter.is_meta for parameter in model.parameters()):
        return
    inputs = {name: torch.from_numpy(np.array(array)) for name, array in trained.probe.inputs.items()}
    try:
        with _as_it_runs(model, inputs) as ready:
            outputs = run_model(model, ready) if adapter is None else run_adapted(model, ready, adapter)
    except Exception as problem:  # what a model raises on inputs that are none of its own
        raise BaseMismatchError(
            f"{label}: this base does not run on what the adapter's model ran on when it was saved "
            f"({type(problem).__name__}: {problem}); use the base it was trained on, with the same configuration"
        ) from problem
    error = trained.probe.difference({name: to_numpy(value.float()) for name, value in outputs.items()})
    limit = max(TOLERANCES[trained.probe.dtype], TOLERANCES[float_dtype(model)])
    if not error <= limit:
        raise BaseMismatchError(
            f"{label} gives other outputs on this base than when it was trained (off by {error:.1e} of their size, "
            f"limit {limit:.0e}): some weight of the base that the adapter does not change is another one; use the "
            "base it was trained on"
        )


def class_of(adapters: Mapping[str, SdctAdapter], model_class: str | None) -> str | None:
    """The class to load a base as: the one asked for, else the one `adapters` (name -> adapter) were trained on.

    None where no adapter says. A class of one's own is imported only where it is asked for by name.

    Raises:
        ConfigError: the adapters were trained on different classes, or on one that has to be named.
    """
    found = {a.trained_on.model_class: name for name, a in adapters.items() if a.trained_on is not None}
    if model_class is not None or not found:
        return model_class
    if len(found) > 1:
        listed = ", ".join(f"{name!r} on {cls}" for cls, name in found.items())
        raise ConfigError(f"the adapters were trained on different classes ({listed}); export one bundle a class")
    (trained, name), *_ = found.items()
    if trained.startswith("__main__:") or "<locals>" in trained:
        raise ConfigError(
            f"{name!r} was trained on {trained}, a class of a script; move it to a module and pass --model-class "
            "MODULE:CLASS (model_class=...), or export the live model"
        )
    if not trained.startswith("transformers:"):
        raise ConfigError(
            f"{name!r} was trained on {trained}, a class of your own; pass --model-class {trained} "
            f"(model_class={trained!r}) with its module on the Python path, or the live model"
        )
    return trained


def _probe(model: nn.Module, base: nn.Module) -> TrainingProbe | None:
    inputs = probe_inputs(base)
    if inputs is None or _is_sharded(model) or any(parameter.is_meta for parameter in model.parameters()):
        return None
    try:
        try:
            outputs = _outputs(model, inputs)
        except ValueError:  # GPT-2 without a padding token classifies one row at a time
            inputs = {name: array[:1] for name, array in inputs.items()}
            outputs = _outputs(model, inputs)
    except Exception as error:  # a class of one's own may raise anything; training it is no fault
        warnings.warn(
            f"no training probe was recorded: {type(base).__name__} does not run on {', '.join(inputs)} alone "
            f"({type(error).__name__}: {error}); later steps cannot be compared with it",
            stacklevel=2,
        )
        return None
    shapes = {name: array.shape for name, array in outputs.items()}
    samples = {name: array.reshape(-1)[positions(array.shape)] for name, array in outputs.items()}
    return TrainingProbe(float_dtype(model), inputs, samples, shapes)


def _outputs(model: nn.Module, inputs: Mapping[str, Array]) -> dict[str, Array]:
    with _as_it_runs(model, {name: torch.from_numpy(array) for name, array in inputs.items()}) as ready:
        return {name: to_numpy(value.float()) for name, value in run_model(model, ready).items()}


def probe_inputs(model: nn.Module) -> dict[str, Array] | None:
    """Small inputs that are the same everywhere, None for a model that reads neither text nor images.

    Of a text model the last id of the vocabulary is among them, and padding, as far as the model knows it.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main not in ("input_ids", "pixel_values"):
        return None
    if main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": formula((1, config.num_channels, height, width))}
    vocabulary = int(config.get_text_config().vocab_size)
    ids = (scattered(BATCH * SEQUENCE) * vocabulary >> 32).reshape(BATCH, SEQUENCE)
    ids[0, 0] = vocabulary - 1
    inputs = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        padding = config.get_text_config().pad_token_id
        inputs["attention_mask"] = np.ones_like(ids)
        inputs["attention_mask"][-1, -PADDED:] = 0
        if padding is not None and 0 <= padding < vocabulary:
            ids[-1, -PADDED:] = padding
    return inputs


@contextlib.contextmanager
def _as_it_runs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The inputs on the model's device and in its type; inside the block it is in eval mode and autocast is off."""
    first = next(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    dtype = getattr(torch, float_dtype(model))
    ready = {n: t.to(first.device, dtype if t.is_floating_point() else None) for n, t in inputs.items()}
    try:
        model.eval()
        with torch.autocast(first.device.type, enabled=False):
            yield ready
    finally:
        for module, training in modes:
            module.training = training


def _is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (FSDP, ZeRO): a forward on one would wait for the others."""
    return any(hasattr(p, "ds_id") or type(p.data).__name__ == "DTensor" for p in model.parameters())


def float_dtype(model: nn.Module) -> str:
    """Name of the type of the model's first floating-point parameter, `float32` where it has none."""
    found = (str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point())
    return next(found, "float32")
