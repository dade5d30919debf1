"""The trainable part of one linear layer, and the autograd function that applies it without forming `dW`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..spectrum import dct, idct

CHILD = "sdct"  # name under which an adapted linear layer holds its `SdctLayer`


class SpectralDelta(torch.autograd.Function):
    """`scaling * IDCT_out( scatter_add_row( value * gather_col( DCT_in(x) ) ) )  [..., d_out]`, in float32 or float64.

    With `G = DCT_in(x)` and `H = DCT_out(grad)` (both transforms are orthonormal, so each one's gradient is the other):

        grad_value_k = scaling * sum_t G[t, col_k] H[t, row_k]
        grad_x       = scaling * IDCT_in( scatter_add_col( value * gather_row(H) ) )

    Only `x`, which the base layer's input keeps alive anyway, and the `n` values are saved; `G` is computed again.
    """

    @staticmethod
    def forward(x: Tensor, values: Tensor, indices: Tensor, d_out: int, scaling: float) -> Tensor:
        """`x [..., d_in]` float, `values [n]` float, `indices [n, 2]` int32 of (row, col)."""
        work = _work(x)
        return idct(_move(dct(work), values, indices[:, 1], indices[:, 0], d_out, scaling))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, float], output: Tensor) -> None:
        x, values, indices, _, ctx.scaling = inputs
        ctx.save_for_backward(x, values, indices)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, values, indices = ctx.saved_tensors
        rows, cols = indices[:, 0], indices[:, 1]
        spectrum = dct(grads[0])
        grad_x = grad_values = None
        if ctx.needs_input_grad[1]:
            picked = dct(_work(x)).index_select(-1, cols).flatten(0, -2)
            products = picked.mul_(spectrum.index_select(-1, rows).flatten(0, -2))
            grad_values = (products.sum(0) * ctx.scaling).to(values.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = idct(_move(spectrum, values, rows, cols, x.shape[-1], ctx.scaling)).to(x.dtype)
        return grad_x, grad_values, None, None, None


def _work(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _move(spectrum: Tensor, values: Tensor, source: Tensor, target: Tensor, size: int, scaling: float) -> Tensor:
    """`out[..., target_k] += scaling * values_k * spectrum[..., source_k]`, out `[..., size]`."""
    picked = spectrum.index_select(-1, source).mul_(values.to(spectrum.dtype) * scaling)
    out = torch.zeros(*spectrum.shape[:-1], size, dtype=spectrum.dtype, device=spectrum.device)
    return out.index_add_(-1, target, picked)


class SdctEntry(nn.Module):
    """One adapter's coefficients on one layer: `values [n]` trainable float32, `indices [n, 2]` int32 of (row, col)."""

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

    def __init__(self, linear: nn.Module, d_out: int) -> None:
        super().__init__()
        self.d_out = d_out
        self.active: str | None = None
        self.entries = nn.ModuleDict()
        linear.add_module(CHILD, self)
        linear.register_forward_hook(_add_delta)

    def entry(self, name: str) -> SdctEntry:
        """The coefficients of adapter `name`."""
        entry = self.entries[name]
        assert isinstance(entry, SdctEntry)
        return entry

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` plus the active adapter's update, rounded once to the dtype of `y`."""
        if self.active is None or self.active not in self.entries:
            return y
        entry = self.entry(self.active)
        with torch.autocast(x.device.type, enabled=False):
            delta: Tensor = SpectralDelta.apply(x, entry.values, entry.indices, self.d_out, entry.scaling)
            return (y + delta).to(y.dtype)


def _add_delta(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    layer = linear.get_submodule(CHILD)
    result: Tensor = layer(args[0], output)
    return result
