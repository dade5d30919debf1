"""The spectral mathematics: orthonormal DCT-II/DCT-III of any length, and sparse inverse transforms.

Convention (the same everywhere in this project, equal to `scipy.fft.dct(type=2, norm="ortho")`):

    C[k, i] = s_k cos(pi (2 i + 1) k / (2 N)),   s_0 = sqrt(1 / N),   s_k = sqrt(2 / N)

`C` is orthogonal, so the inverse is its transpose (DCT-III). An adapter is a sparse `F [d_out, d_in]` and stands for

    dW = scaling * C_out^T F C_in        [d_out, d_in], the layout of `torch.nn.Linear.weight`
    y  = x dW^T = IDCT_out( scatter_add_row( scaling * value * gather_col( DCT_in(x) ) ) )

Transforms run through one real FFT of the same length (Makhoul, "A fast cosine transform in one and two dimensions",
IEEE Trans. ASSP 28, 1980), so every length works, primes too. Half-precision input is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


def dct_matrix(length: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """The matrix `C [length, length]`: `C @ x` is the DCT-II of `x`, `C.T @ X` its inverse."""
    if length < 1:
        raise ConfigError(f"a DCT needs a length of at least 1, got {length}")
    k = torch.arange(length, dtype=torch.int64, device=device)
    # (2 i + 1) k mod 4 N is exact in integers, which keeps the cosine's argument small and its error at one ulp
    phase = ((2 * k[None, :] + 1) * k[:, None]) % (4 * length)
    matrix = torch.cos(phase.to(torch.float64) * (math.pi / (2 * length))) * math.sqrt(2 / length)
    matrix[0] = math.sqrt(1 / length)
    return matrix.to(dtype)


@lru_cache(maxsize=64)
def _plan(length: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Permutation `[N]` (even samples rising, odd falling), its inverse, and scaled twiddles `[N // 2 + 1]`."""
    order = torch.cat([torch.arange(0, length, 2), torch.arange(1, length, 2).flip(0)])
    k = torch.arange(length // 2 + 1, dtype=torch.float64)
    scale = torch.full_like(k, math.sqrt(2 / length))
    scale[0] = math.sqrt(1 / length)
    twiddle = torch.polar(scale, -math.pi * k / (2 * length))
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    return order.to(device), torch.argsort(order).to(device), twiddle.to(complex_dtype).to(device)


def _forward(x: Tensor) -> Tensor:
    n = x.shape[-1]
    order, _, twiddle = _plan(n, x.dtype, str(x.device))
    z = torch.fft.rfft(x.index_select(-1, order)) * twiddle
    # X[k] = Re z_k for k <= N/2 and X[N - k] = -Im z_k for 0 < k < N/2
    return torch.cat([z.real, -z.imag[..., 1 : (n + 1) // 2].flip(-1)], dim=-1)


def _inverse(spectrum: Tensor) -> Tensor:
    n = spectrum.shape[-1]
    _, restore, twiddle = _plan(n, spectrum.dtype, str(spectrum.device))
    half = n // 2 + 1
    real = spectrum[..., :half]
    imag = torch.zeros_like(real)
    imag[..., 1 : (n + 1) // 2] = -spectrum[..., half:].flip(-1)
    if n % 2 == 0:
        imag[..., n // 2] = -spectrum[..., n // 2]
    # with s_k the scale inside the twiddle t_k:
    # V_k = (X_k - i X_{N-k}) / (s_k e^{-i pi k / 2N}) = (X_k - i X_{N-k}) conj(t_k) / s_k^2
    weight = torch.full((half,), n / 2, dtype=real.dtype, device=real.device)
    weight[0] = n
    # conj_physical, not the lazy conj: compiled graphs run with the dispatch key of lazy conjugation switched off
    v: Tensor = torch.fft.irfft(torch.complex(real, imag) * (twiddle.conj_physical() * weight), n=n)
    return v.index_select(-1, restore)


class _Orthonormal(torch.autograd.Function):
    """An orthonormal transform, whose gradient is the inverse transform: nothing needs to be kept for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, inverse: bool) -> Tensor:
        return _inverse(x) if inverse else _forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.inverse = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _orthonormal(grads[0], not ctx.inverse), None


def _orthonormal(x: Tensor, inverse: bool) -> Tensor:
    return _Orthonormal.apply(x, inverse)  # type: ignore[no-any-return, no-untyped-call]


def _transform(x: Tensor, dim: int, inverse: bool) -> Tensor:
    if not x.is_floating_point():
        raise ConfigError(f"a DCT needs a floating-point tensor, got {x.dtype}")
    if x.ndim == 0 or x.shape[dim] == 0:
        raise ConfigError(f"a DCT needs at least one element along dim {dim}, got shape {tuple(x.shape)}")
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return _orthonormal(work.transpose(dim, -1), inverse).transpose(dim, -1).to(x.dtype)


def dct(x: Tensor, dim: int = -1) -> Tensor:
    """Orthonormal DCT-II along `dim`: `X[k] = s_k sum_i x[i] cos(pi (2i+1) k / (2N))`. Same shape and dtype as `x`."""
    return _transform(x, dim, inverse=False)


def idct(spectrum: Tensor, dim: int = -1) -> Tensor:
    """Orthonormal DCT-III along `dim`, the inverse of `dct`. Same shape and dtype as the input."""
    return _transform(spectrum, dim, inverse=True)


def dct2(weight: Tensor) -> Tensor:
    """2-D DCT `C_out W C_in^T` of `weight [d_out, d_in]`."""
    return dct(dct(weight, dim=-1), dim=-2)


def idct2(spectrum: Tensor) -> Tensor:
    """Inverse 2-D DCT `C_out^T F C_in` of `spectrum [d_out, d_in]`."""
    return idct(idct(spectrum, dim=-1), dim=-2)


def dense_spectrum(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """`F [d_out, d_in]` with `values [n]` at `indices [n, 2]` (row, col); repeated positions add up."""
    rows, cols = indices[:, 0].long(), indices[:, 1].long()
    flat = torch.zeros(shape[0] * shape[1], dtype=values.dtype, device=values.device)
    return flat.index_add(0, rows * shape[1] + cols, values).view(shape)


def delta_weight(values: Tensor, indices: Tensor, shape: tuple[int, int], scaling: float = 1.0) -> Tensor:
    """`dW = scaling * C_out^T F C_in  [d_out, d_in]`, in float32 (float64 for float64 values).

    Args:
        values: `[n]`, any float dtype.
        indices: integer `[n, 2]` of (row, col) with `0 <= row < d_out`, `0 <= col < d_in`.
        shape: `(d_out, d_in)`.
        scaling: factor on the result.
    """
    work = values if values.dtype == torch.float64 else values.float()
    return idct2(dense_spectrum(work * scaling, indices, shape))


def sparse_apply(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    d_out: int,
    scaling: float = 1.0,
    *,
    transform: Callable[[Tensor], Tensor] = dct,
) -> Tensor:
    """`x dW^T  [..., d_out]` for `x [..., d_in]` without forming `dW`; differentiable in `x` and `values`.

    Pass `transform=lambda x: x` when `x` already is `dct(x)`, to share one forward transform between projections.
    Computed in float32 (float64 for float64 `x`), returned in the dtype of `x`.
    """
    work = x if x.dtype == torch.float64 else x.float()
    rows, cols = indices[:, 0].long(), indices[:, 1].long()
    picked = transform(work).index_select(-1, cols) * (values.to(work.dtype) * scaling)
    scattered = torch.zeros(*x.shape[:-1], d_out, dtype=work.dtype, device=x.device).index_add(-1, rows, picked)
    return idct(scattered).to(x.dtype)
