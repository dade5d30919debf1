"""The trainable part of one linear layer, and the operator that applies it without forming `dW`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..base.model import CHILD
from ..spectral.transform import dct, idct

# numbers transformed at a time: small enough that the temporaries of an FFT stay in a CPU's cache, where it is several
# times faster than on a whole batch; large enough on an accelerator to fill it and bound the temporaries all the same
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 24


@torch.library.custom_op("sdct::add_delta", mutates_args=())
def add_delta(y: Tensor, x: Tensor, values: Tensor, indices: Tensor, scaling: float) -> Tensor:
    """`y + scaling * IDCT_out( scatter_add_row( value * gather_col( DCT_in(x) ) ) )`.

    Differentiable in `y`, `x` and `values`.     With `G = DCT_in(x)` and `H = DCT_out(grad)` (the transforms are
    orthonormal, so the gradient of one is the other):

        grad_value_k = scaling * sum_t G[t, col_k] H[t, row_k]
        grad_x       = scaling * IDCT_in( scatter_add_col( value * gather_row(H) ) )

    Computed in float32 (float64 for float64 `x`) and rounded once to the dtype of `y`. For backward only `x` and the
    `n` values are kept; `G` is computed again. One opaque operator, so that `torch.compile` runs the same arithmetic.

    Args:
        y: `[..., d_out]`, output of the base layer.
        x: `[..., d_in]`, its input, with the same leading sizes.
        values: float `[n]`.
        indices: int32 `[n, 2]` of (row, col).
        scaling: factor on every value.
    """
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    out = torch.empty_like(flat_y, memory_format=torch.contiguous_format)
    rows, cols = indices[:, 0], indices[:, 1]
    for part in _chunks(flat_x, flat_y):
        spectrum = _move(_dct(flat_x[part]), values, cols, rows, y.shape[-1], scaling)
        torch.add(flat_y[part], idct(spectrum), out=out[part])
    return out.view(y.shape)


@torch.library.custom_op("sdct::add_delta_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, values: Tensor, indices: Tensor, scaling: float, need_x: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    """`grad_x [..., d_in]` and `grad_values [n]`; an empty tensor for one that is not needed."""
    flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    rows, cols = indices[:, 0], indices[:, 1]
    grad_x = torch.empty_like(flat_x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    sums = torch.zeros(values.shape[0] if need_values else 0, dtype=_work_dtype(x), device=x.device)
    for part in _chunks(flat_x, flat_grad):
        spectrum = _dct(flat_grad[part].to(sums.dtype))
        if need_values:
            picked = _dct(flat_x[part]).index_select(-1, cols)
            sums += picked.mul_(spectrum.index_select(-1, rows)).sum(0)
        if need_x:
            grad_x[part] = idct(_move(spectrum, values, rows, cols, x.shape[-1], scaling))
    return grad_x.view(x.shape) if need_x else grad_x, (sums * scaling).to(values.dtype)


@add_delta.register_fake
def _(y: Tensor, x: Tensor, values: Tensor, indices: Tensor, scaling: float) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, values: Tensor, indices: Tensor, scaling: float, need_x: bool, need_values: bool
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    return grad_x, values.new_empty(values.shape[0] if need_values else 0)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    _, x, values, indices, ctx.scaling = inputs
    ctx.save_for_backward(x, values, indices)


def _derive(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    x, values, indices = ctx.saved_tensors
    need_y, need_x, need_values = ctx.needs_input_grad[:3]
    grad_x, grad_values = _backward(grad, x, values, indices, ctx.scaling, need_x, need_values)
    return grad if need_y else None, grad_x if need_x else None, grad_values if need_values else None, None, None


add_delta.register_autograd(_derive, setup_context=_setup)


def _chunks(a: Tensor, b: Tensor) -> list[slice]:
    size = _CHUNK.get(a.device.type, _CHUNK_ELSEWHERE)
    step = max(1, size // max(a.shape[-1], b.shape[-1]))
    return [slice(start, start + step) for start in range(0, a.shape[0], step)]


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dct(x: Tensor) -> Tensor:
    return dct(x.to(_work_dtype(x)))


def _move(spectrum: Tensor, values: Tensor, source: Tensor, target: Tensor, size: int, scaling: float) -> Tensor:
    """`out[t, target_k] += scaling * values_k * spectrum[t, source_k]`, out `[tokens, size]`."""
    picked = spectrum.index_select(-1, source).mul_(values.to(spectrum.dtype) * scaling)
    out = torch.zeros(spectrum.shape[0], size, dtype=spectrum.dtype, device=spectrum.device)
    return out.index_add_(-1, target, picked)


class SdctEntry(nn.Module):
    """One adapter's coefficients on one layer: `values [n]` float32, trainable; `indices [n, 2]` int32 (row, col)."""

    indices: Tensor

    def __init__(self, values: Tensor, indices: Tensor, scaling: float) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("indices", indices)
        self.scaling = scaling


class SdctLayer(nn.Module):
    """The adapters of one linear layer, held as its child `sdct`; a forward hook of the layer adds the active one.

    A hook, and no wrapper around the layer, leaves every path, type and state-dict key of the base model as it was.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.active: str | None = None
        self.entries = nn.ModuleDict()
        linear.add_module(CHILD, self)
        linear.register_forward_hook(add_active)

    def entry(self, name: str) -> SdctEntry:
        """The coefficients of adapter `name`."""
        entry = self.entries[name]
        assert isinstance(entry, SdctEntry)
        return entry

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y [..., d_out]` of the base layer plus the active adapter's update for `x [..., d_in]`."""
        if self.active is None or self.active not in self.entries:
            return y
        entry = self.entry(self.active)
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = add_delta(y, x, entry.values, entry.indices, entry.scaling)
            return result


def add_active(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook of an adapted layer."""
    layer = linear.get_submodule(CHILD)
    result: Tensor = layer(args[0], output)
    return result
