"""What torch computes for rows with adapters: the reference every exported graph is compared with.

A row with adapters `k` at scales `s_k` gets from each adapted linear module `y + sum_k s_k x dW_k^T`, and from each
saved one first `(1 - sum_k s_k) y + sum_k s_k (x W_k^T + b_k)`, summed over the adapters that have the module. The
modules are hooked, so the model's weights are neither touched nor copied, and no `dW` is formed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter.adapter import SdctAdapter
from ..errors import UnsupportedError
from ..spectral.transform import sparse_apply
from .model import find_linear, linear_shape, to_torch

_POSITIONS = re.compile(r"position_embeddings?|embed_positions|wpe")
Rows = Sequence[Sequence[tuple[str, float]]]


def sample_inputs(model: nn.Module, *, batch: int, sequence: int, seed: int = 0) -> dict[str, Tensor]:
    """Seeded random inputs a model takes: `input_ids`, `attention_mask` and `token_type_ids`, or `pixel_values`.

    Row `i` of a text batch is padded on the right by up to `i` tokens, at most half of it.

    Raises:
        UnsupportedError: the model reads neither text nor images.
    """
    generator = torch.Generator().manual_seed(seed)
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if main == "pixel_values" and config is not None:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator).to(_float_dtype(model))}
    if main == "input_ids" and config is not None:
        ids = torch.randint(0, config.get_text_config().vocab_size, (batch, sequence), generator=generator)
        inputs = {"input_ids": ids}
        taken = inspect.signature(model.forward).parameters
        kinds = getattr(config, "type_vocab_size", None) or 0  # GPT-2 has no table of them: there they are word ids
        if "token_type_ids" in taken and kinds > 1:
            inputs["token_type_ids"] = torch.randint(0, kinds, (batch, sequence), generator=generator)
        if "attention_mask" in taken:
            mask = torch.ones_like(ids)
            for row in range(batch):
                mask[row, sequence - min(row, sequence // 2) :] = 0
            inputs["attention_mask"] = mask
        return inputs
    raise UnsupportedError(
        f"{type(model).__name__} reads {main!r}; only transformers models that read input_ids or pixel_values can be "
        "exported"
    )


def most_tokens(model: nn.Module) -> int | None:
    """Tokens that a row may have where the model looks positions up in a table, None where nothing limits them."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    limits = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(path.rpartition(".")[2]):
            # the first row that is used: OPT and BART shift the table, RoBERTa counts from behind its padding index
            first = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            limits.append(module.num_embeddings - int(first))
    return min(limits, default=None)


def rotary_limit(model: nn.Module) -> int | None:
    """Tokens up to which the rotary positions of a row are the same however long it gets, None where they always are.

    With `longrope` and `dynamic` the frequencies of all tokens depend on the length of the longest row: keys that lie
    in a cache would have to be computed again, and rows side by side would change each other.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    config = config.get_text_config()
    told = getattr(config, "rope_parameters", None) or {}
    limits = []
    for kind in [told, *(part for part in told.values() if isinstance(part, dict))]:
        name = kind.get("rope_type", "default")
        if name == "longrope":
            limits.append(kind.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        elif "dynamic" in str(name):
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def run_model(
    model: nn.Module, inputs: Mapping[str, Tensor], replaced: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The named output tensors of one forward, without gradients or cache; `replaced` parameters stand in by name."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # hooks in numpy cannot be compiled
        result = torch.func.functional_call(model, dict(replaced or {}), kwargs=dict(inputs))
    named = {name: value for name, value in dict(result).items() if isinstance(value, Tensor)}
    if not named:
        raise UnsupportedError(f"{type(model).__name__} returns no tensor; only transformers models can be exported")
    return named


def run_adapted(model: nn.Module, inputs: Mapping[str, Tensor], adapter: SdctAdapter) -> dict[str, Tensor]:
    """Named outputs with `adapter` in every row: its coefficients, and in place of the base's all it saves in full.

    Unlike in `run_rows` a saved module may be of any kind. The model is left as it is.
    """
    rows = [[("", 1.0)]] * len(next(iter(inputs.values())))
    hooks = []
    try:
        for path in sorted(adapter.modules):
            module = find_linear(model, path)
            shape = linear_shape(module)
            assert shape is not None
            hooks.append(module.register_forward_hook(_delta(path, shape[0], rows, {"": adapter})))
        own = dict(model.named_parameters())
        saved = {name: to_torch(array).to(own[name].device, own[name].dtype) for name, array in adapter.saved.items()}
        return run_model(model, inputs, saved)
    finally:
        for hook in hooks:
            hook.remove()


def run_rows(
    model: nn.Module, inputs: Mapping[str, Tensor], rows: Rows, adapters: Mapping[str, SdctAdapter]
) -> dict[str, Tensor]:
    """Named outputs where batch row `i` goes through the adapters `rows[i]` (name, scale).

    Args:
        model: a float32 model in eval mode, which every adapter fits.
        inputs: the model's inputs, `[batch, ...]`.
        rows: one list of (adapter name, scale) for each batch row, empty for the base.
        adapters: name -> adapter.
    """
    used = [adapters[name] for name in {name for row in rows for name, _ in row}]
    hooks = []
    try:
        saved = {name.rpartition(".")[0] for adapter in used for name in adapter.saved}
        for path in sorted(saved):
            hooks.append(find_linear(model, path).register_forward_hook(_head(path, rows, adapters)))
        for path in sorted({path for adapter in used for path in adapter.modules}):
            module = find_linear(model, path)
            shape = linear_shape(module)
            assert shape is not None
            hooks.append(module.register_forward_hook(_delta(path, shape[0], rows, adapters)))
        return run_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()


Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


def _delta(path: str, d_out: int, rows: Rows, adapters: Mapping[str, SdctAdapter]) -> Hook:
    def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        parts = []
        for x, own, row in zip(args[0], y, rows, strict=True):
            for name, scale in row:
                entries = adapters[name].modules.get(path)
                if entries is not None:
                    values = torch.from_numpy(entries.float32(adapters[name].config.scaling))
                    indices = torch.from_numpy(entries.indices.astype(np.int64))
                    own = own + sparse_apply(x, values, indices, d_out, scale)
            parts.append(own)
        return torch.stack(parts)

    return hook


def _head(path: str, rows: Rows, adapters: Mapping[str, SdctAdapter]) -> Hook:
    def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        parts = []
        for x, base, row in zip(args[0], y, rows, strict=True):
            own, labels = base, base.shape[-1]
            for name, scale in row:
                weight = adapters[name].saved.get(f"{path}.weight")
                if weight is not None:
                    bias = adapters[name].saved.get(f"{path}.bias", np.zeros(len(weight), np.float32))
                    changed = base.clone()
                    changed[..., : len(weight)] = nn.functional.linear(
                        x, to_torch(weight).to(x.dtype), to_torch(bias).to(x.dtype)
                    )
                    own = own + scale * (changed - base)
                    labels = min(labels, len(weight)) if scale else labels
            own = own.clone()
            own[..., labels:] = torch.finfo(own.dtype).min / 2  # labels one of the adapters lacks can never be picked
            parts.append(own)
        return torch.stack(parts)

    return hook


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
