"""Where an adapter goes in a base model: its linear layers, the modules trained in full, and first coefficients."""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..adapter.config import ALL_LINEAR, SdctConfig
from ..base.model import checkpoint_vocabulary, linear_shape, linear_weight, model_hash, task_type, vocabulary
from ..base.training import label_names, unsaved
from ..errors import ConfigError, UnsupportedError, an
from ..spectral.selection import select_for_weight
from .layer import SdctEntry, SdctLayer


def find_targets(base: nn.Module, config: SdctConfig) -> dict[str, nn.Module]:
    """Path -> linear layer for every module that `config.target_modules` names.

    Raises:
        ConfigError: nothing matches, or a matrix has fewer entries than `n_coefficients`.
        UnsupportedError: a named module cannot be adapted.
    """
    if config.target_modules == ALL_LINEAR:
        targets = _all_linear(base, config)
    else:
        targets = {path: module for path, module in base.named_modules() if path and config.matches(path)}
    if not targets:
        linear = [path for path, module in base.named_modules() if linear_shape(module) is not None]
        named = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
        tails = ", ".join(sorted({path.rpartition(".")[2] for path in linear})[:12])
        example = f"; its linear layers are named {tails} (for example {linear[0]!r})" if linear else ""
        raise ConfigError(f"no module of {type(base).__name__} matches target_modules {named!r}{example}")
    for path, module in targets.items():
        check_linear(path, module)
        d_out, d_in = shape_of(module)
        if config.n_coefficients > d_out * d_in:
            raise ConfigError(
                f"n_coefficients is {config.n_coefficients}, but module {path!r} is {d_out} x {d_in} and has only "
                f"{d_out * d_in}; lower n_coefficients or take the module out of target_modules"
            )
    return targets


def _all_linear(base: nn.Module, config: SdctConfig) -> dict[str, nn.Module]:
    """Every linear layer but the output layer and what is saved in full, as PEFT reads "all-linear"."""
    output = getattr(base, "get_output_embeddings", lambda: None)()
    body = getattr(base, "base_model", base) if (config.task_type or task_type(base) or "").endswith("_CLS") else base
    inside = {id(module) for module in body.modules()} - {id(output)}
    return {
        path: module
        for path, module in base.named_modules()
        if id(module) in inside
        and linear_shape(module) is not None
        and not any(config.saves(path.rsplit(".", depth)[0]) for depth in range(path.count(".") + 1))
    }


def check_linear(path: str, module: nn.Module) -> None:
    """Raise `UnsupportedError` unless `module` is a linear layer with a float weight that its forward reads."""
    what = f"cannot adapt {path!r}, {an(type(module).__name__)}"
    if linear_shape(module) is None:
        raise UnsupportedError(f"{what}: only Linear and Conv1D layers can be adapted; name those in target_modules")
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or tuple(linear_weight(module).shape) != linear_shape(module):
        raise UnsupportedError(
            f"{what}: its weight is quantized or packed; load the base in float32, float16 or bfloat16 to adapt it"
        )
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise UnsupportedError(
            f"{what}: MultiheadAttention reads the weight of its output projection without calling it; "
            "leave it out of target_modules"
        )


def find_heads(base: nn.Module, config: SdctConfig, targets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Path -> module for every module that `config.modules_to_save` names (the outermost where they nest).

    Raises:
        ConfigError: a name matches nothing, or a target module lies inside.
        UnsupportedError: the module holds buffers, or a parameter that is tied to one outside.
    """
    named = {path: module for path, module in base.named_modules() if path and config.saves(path)}
    for name in config.modules_to_save or ():
        if not any(path == name or path.endswith(f".{name}") for path in named):
            raise ConfigError(f"modules_to_save names {name!r}, which {type(base).__name__} does not have")
    heads = {path: m for path, m in named.items() if not any(path.startswith(f"{outer}.") for outer in named)}
    for path, module in heads.items():
        inside = [target for target in targets if f"{target}.".startswith(f"{path}.")]
        if inside:
            raise ConfigError(
                f"target module {inside[0]!r} lies in {path!r}, which modules_to_save trains in full; "
                "take it out of one of the two"
            )
        _check_head(base, path, module)
    return heads


def check_source(base: nn.Module, config: SdctConfig, fresh: tuple[str, ...] | None) -> None:
    """Compare a transformers model with the checkpoint it names, as far as that lies on this machine.

    Warns where transformers' marks are lost (`copy.deepcopy` drops them), since parameters without a checkpoint can
    then no longer be found.

    Raises:
        ConfigError: the vocabulary was resized in memory, and nothing would save the new rows; or labels are numbered
            otherwise than from 0.
    """
    label_names(base)
    source = base_name(base)
    if source is None:
        return
    if fresh is None and not any(parameter.is_meta for parameter in base.parameters()):
        warnings.warn(
            f"cannot tell which parameters of this {type(base).__name__} the checkpoint {source} holds: the marks "
            "that from_pretrained leaves are gone, as on a copy; give get_sdct_model what from_pretrained returned",
            stacklevel=4,
        )
    now, before = vocabulary(getattr(base, "config", None)), checkpoint_vocabulary(source)
    if now is None or before in (now, None):
        return
    table: Any = getattr(base, "get_input_embeddings", lambda: None)()
    if not any(config.saves(path) for path, module in base.named_modules() if module is table):
        raise ConfigError(
            f"the vocabulary was resized to {now}, but the checkpoint {source} has {before} tokens: no file would "
            "hold the new rows; save the resized base (base.save_pretrained(folder)) and load it from there first"
        )


def with_fresh_heads(base: nn.Module, config: SdctConfig, fresh: tuple[str, ...] | None) -> SdctConfig:
    """`config` with the modules of `fresh`, parameters no checkpoint gave, in `modules_to_save` if it names none.

    That holds for classifiers, whose head is new by design; elsewhere nothing trains such a parameter by default.

    Raises:
        ConfigError: a fresh parameter would not be saved, so that the trained model could never be built again.
    """
    task = config.task_type or task_type(base) or ""
    if fresh and config.modules_to_save is None and task.endswith("_CLS"):
        config = dataclasses.replace(config, modules_to_save=sorted({name.rpartition(".")[0] for name in fresh}))
    lost = unsaved(fresh, config.saves)
    if lost:
        modules = sorted({name.rpartition(".")[0] for name in lost} | set(config.modules_to_save or ()))
        pooler = "; or load the base without it (add_pooling_layer=False)" if "pooler." in lost[0] else ""
        raise ConfigError(
            f"the checkpoint of this {type(base).__name__} does not hold {', '.join(map(repr, lost))}: the values are "
            "random, and an adapter that does not save them cannot be used again; pass "
            f"modules_to_save={modules!r}{pooler}"
        )
    return config


def _check_head(base: nn.Module, path: str, module: nn.Module) -> None:
    what = f"modules_to_save cannot hold {path!r}, {an(type(module).__name__)}"
    own = {id(parameter): name for name, parameter in module.named_parameters()}
    if not own:
        raise ConfigError(f"{what} without parameters; name the layers to train")
    if any(isinstance(child, SdctLayer) for child in module.modules()):
        raise ConfigError(f"{what}: another adapter has target modules inside it")
    kept = {name for name, _ in module.named_buffers()} & set(module.state_dict())
    if kept:
        raise UnsupportedError(f"{what}: adapter files do not store buffers such as {min(kept)!r}")
    for other, parameter in base.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not other.startswith(f"{path}."):
            raise UnsupportedError(
                f"{what}: its {own[id(parameter)]!r} is tied to {other!r}; adapt it through target_modules, or untie "
                "the weights (config.tie_word_embeddings = False)"
            )


def fresh_entry(path: str, linear: nn.Module, config: SdctConfig) -> SdctEntry:
    """Zero values at the positions that `config.selection` chooses for the pretrained weight; uncounted on `meta`."""
    weight = linear_weight(linear)
    n = config.n_coefficients
    if weight.is_meta:
        indices = torch.zeros(n, 2, dtype=torch.int32, device="meta")
    else:
        # the path salts the seed, so that layers of the same shape do not all draw the same random part
        seed = (config.seed, zlib.crc32(path.encode()))
        chosen = select_for_weight(weight, config.selection, n, delta=config.delta, bands=config.bands, seed=seed)
        indices = torch.from_numpy(chosen).to(weight.device)
    return SdctEntry(torch.zeros(n, dtype=torch.float32, device=weight.device), indices, config.scaling)


def identity(base: nn.Module, targets: Mapping[str, nn.Module]) -> tuple[str, str] | tuple[None, None]:
    """`(hash, dtype)` of the weights an adapter changes; nothing on the meta device or without target modules."""
    weights = [linear_weight(module) for module in targets.values()]
    if not weights or any(weight.is_meta for weight in weights):
        return None, None
    dtype = str(weights[0].dtype).removeprefix("torch.")
    return model_hash(base, {path: shape_of(module) for path, module in targets.items()}, dtype), dtype


def base_name(base: nn.Module) -> str | None:
    """Where transformers loaded the model from; None where unknown."""
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """`(d_out, d_in)` of a module known to be linear."""
    shape = linear_shape(linear)
    assert shape is not None
    return shape
