"""What torch computes for rows with adapters: the reference every exported graph is compared with.

A row with adapters `k` at scales `s_k` sees, in each adapted module, `W + sum_k s_k dW_k`, and in each saved linear
module `(1 - sum_k s_k) W + sum_k s_k W_k` (and the same for its bias), summed over the adapters that have the module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .adapter import SdctAdapter
from .base import find_linear, is_conv1d, linear_shape, to_torch

Parts = Sequence[tuple[SdctAdapter, float]]


@contextlib.contextmanager
def adapted(model: nn.Module, parts: Parts) -> Iterator[nn.Module]:
    """`model` with `parts` (adapter, scale) in the weights of the modules they name; its own parameters come back.

    A weight tied to another module's stays as it is there.
    """
    changes: dict[str, Tensor] = {}
    for path in {path for adapter, _ in parts for path in adapter.modules}:
        changes[f"{path}.weight"] = _change_of_module(model, path, parts)
    for name in {name for adapter, _ in parts for name in adapter.saved}:
        changes[name] = changes.get(name, 0) + _change_of_saved(model.get_parameter(name), name, parts)
    replaced: list[tuple[nn.Module, str, nn.Parameter | None]] = []

    def replace(name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        replaced.append((module, leaf, getattr(module, leaf)))
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    try:
        for name, change in changes.items():
            before = model.get_parameter(name)
            replace(name, (before.detach().double() + change).to(before.dtype))
            path = name.removesuffix(".weight")
            if path != name and getattr(model.get_submodule(path), "bias", None) is None:
                replace(f"{path}.bias", _missing_bias(before, name, parts))
        yield model
    finally:
        for module, leaf, parameter in replaced:
            setattr(module, leaf, parameter)


def run_rows(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    rows: Sequence[Sequence[tuple[str, float]]],
    adapters: Mapping[str, SdctAdapter],
) -> dict[str, Tensor]:
    """Named outputs where batch row `i` goes through the adapters `rows[i]` (name, scale)."""
    from .graph.trace import run_model

    results: dict[str, list[Tensor]] = {}
    for index, row in enumerate(rows):
        with adapted(model, [(adapters[name], scale) for name, scale in row]):
            one = {name: value[index : index + 1] for name, value in inputs.items()}
            for name, value in run_model(model, one).items():
                results.setdefault(name, []).append(value)
    return {name: torch.cat(parts) for name, parts in results.items()}


def _change_of_module(model: nn.Module, path: str, parts: Parts) -> Tensor:
    module = find_linear(model, path)
    shape = linear_shape(module)
    assert shape is not None
    total = torch.zeros(shape, dtype=torch.float64)
    for adapter, scale in parts:
        if path in adapter.modules:
            total += scale * adapter.delta_weight(path, shape)
    return total.T if is_conv1d(module) else total


def _change_of_saved(parameter: Tensor, name: str, parts: Parts) -> Tensor:
    base = parameter.detach().double()
    total = torch.zeros_like(base)
    for adapter, scale in parts:
        if name in adapter.saved:
            own = torch.full_like(base, _fill(parameter.dtype) if name.endswith(".bias") else 0.0)
            saved = to_torch(adapter.saved[name])
            own[: saved.shape[0]] = saved
            total += scale * (own - base)
    return total


def _missing_bias(weight: Tensor, name: str, parts: Parts) -> Tensor:
    """What keeps the labels an adapter lacks from being picked, where the module has no bias to hold it."""
    total = torch.zeros(weight.shape[0], dtype=weight.dtype)
    for adapter, scale in parts:
        if name in adapter.saved:
            total[adapter.saved[name].shape[0] :] += scale * _fill(weight.dtype)
    return total


def _fill(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).min / 2)
