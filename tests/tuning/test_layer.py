"""The training operator against autograd through the dense weight change and through `sparse_apply`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import delta_weight, relative_error
from torch import Tensor

from sdct_export.spectral import transform as spectrum
from sdct_export.tuning import layer
from sdct_export.tuning.layer import add_delta

SHAPES = [(7, 5), (16, 24), (13, 13), (31, 8), (1, 6), (6, 1)]  # (d_out, d_in), primes among them


def case(d_out: int, d_in: int, dtype: torch.dtype, tokens: tuple[int, ...] = (2, 3)) -> tuple[Tensor, ...]:
    """`y, x, values` that require gradients, and int32 indices with rows and columns that repeat."""
    generator = torch.Generator().manual_seed(d_out * 100 + d_in)
    n = min(9, d_out * d_in)
    flat = torch.randperm(d_out * d_in, generator=generator)[:n]
    indices = torch.stack([flat // d_in, flat % d_in], dim=1).int()
    y = torch.randn(*tokens, d_out, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    x = torch.randn(*tokens, d_in, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    values = torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()
    return y, x, values, indices


@pytest.fixture(params=[1 << 18, 20], ids=["one chunk", "several chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(layer._CHUNK, "cpu", request.param)
    return int(request.param)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_output_and_gradients_equal_the_dense_weight_change(d_out: int, d_in: int, chunk: int) -> None:
    y, x, values, indices = case(d_out, d_in, torch.float64)
    got = add_delta(y, x, values, indices, 0.7)
    dense = 0.7 * spectrum.dct_matrix(d_out).T @ spectrum.dense_spectrum(values, indices, (d_out, d_in))
    want = y + x @ (dense @ spectrum.dct_matrix(d_in)).T
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((want * weight).sum(), (y, x, values))
    for one, other in zip(torch.autograd.grad((got * weight).sum(), (y, x, values)), wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("d_out", "d_in"), [(7, 5), (16, 24)])
def test_gradients_equal_finite_differences_and_sparse_apply(d_out: int, d_in: int, chunk: int) -> None:
    y, x, values, indices = case(d_out, d_in, torch.float64)
    assert torch.autograd.gradcheck(lambda *args: add_delta(*args, indices, 1.3), (y, x, values))
    reference = y + spectrum.sparse_apply(x, values, indices, d_out, 1.3)
    torch.testing.assert_close(add_delta(y, x, values, indices, 1.3), reference, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(reference.square().sum(), (x, values))
    got = torch.autograd.grad(add_delta(y, x, values, indices, 1.3).square().sum(), (x, values))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_a_gradient_nobody_needs_is_not_computed() -> None:
    y, x, values, indices = case(7, 5, torch.float64)
    for frozen in ((y, x), (y, values), (x, values)):
        for tensor in (y, x, values):
            tensor.requires_grad_(not any(tensor is other for other in frozen))
            tensor.grad = None
        add_delta(y, x, values, indices, 1.0).sum().backward()
        for tensor in (y, x, values):
            assert (tensor.grad is None) == (not tensor.requires_grad)


@pytest.mark.parametrize("shape", [(768, 384), (97, 211)])
def test_float32_against_scipy(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    flat = rng.choice(shape[0] * shape[1], size=300, replace=False)
    indices = np.stack(np.unravel_index(flat, shape), axis=1).astype(np.int32)
    values, x = rng.normal(size=300).astype(np.float32), rng.normal(size=(50, shape[1])).astype(np.float32)
    got = add_delta(
        torch.zeros(50, shape[0]), torch.from_numpy(x), torch.from_numpy(values), torch.from_numpy(indices), 2.0
    )
    want = x.astype(np.float64) @ delta_weight(values, indices, shape, 2.0).T
    assert relative_error(got.numpy(), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    y, x, values, indices = case(16, 24, dtype, tokens=(9,))
    values = values.detach().float().requires_grad_()
    got = add_delta(y, x, values, indices, 1.0)
    assert got.dtype == dtype
    exact = y.detach().double() + spectrum.sparse_apply(x.detach().double(), values.detach().double(), indices, 16)
    error = (got.detach().double() - exact).abs()
    # half a unit in the last place, and a little for float32
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()
    got.float().square().sum().backward()
    assert (x.grad.dtype, values.grad.dtype) == (dtype, torch.float32)


def test_no_tokens_and_strided_input() -> None:
    y, x, values, indices = case(7, 5, torch.float64)
    assert add_delta(y[:0], x[:0], values, indices, 1.0).shape == (0, 3, 7)
    turned = add_delta(y.transpose(0, 1), x.transpose(0, 1), values, indices, 1.0)
    torch.testing.assert_close(turned.transpose(0, 1), add_delta(y, x, values, indices, 1.0))


def test_the_operator_obeys_torchs_rules_for_custom_operators() -> None:
    y, x, values, indices = case(7, 5, torch.float32)
    values = values.detach().float().requires_grad_()
    torch.library.opcheck(add_delta, (y, x, values, indices, 0.5))
    assert (add_delta(y, x, values, indices, 0.5) - y).abs().max() > 0.1
