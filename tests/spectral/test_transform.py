"""The reference maths against scipy in float64, at every size that matters and at awkward ones."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
from references import delta_weight as reference_delta_weight
from references import relative_error

from sdct_export.errors import ConfigError
from sdct_export.spectral.transform import (
    dct,
    dct2,
    dct_matrix,
    delta_weight,
    dense_spectrum,
    idct,
    idct2,
    sparse_apply,
)

DESIGN = [384, 768, 896, 1024, 1536, 2048, 3072, 4096, 4864, 5120, 8192, 11008, 14336, 18944]
SMALL = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 27, 30]
PRIMES = [11, 127, 769, 4093, 11027]


def entries(shape: tuple[int, int], n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    flat = rng.choice(shape[0] * shape[1], size=n, replace=False)
    indices = np.stack([flat // shape[1], flat % shape[1]], axis=1).astype(np.int32)
    return torch.from_numpy(rng.normal(size=n)), torch.from_numpy(indices)


@pytest.mark.parametrize("length", SMALL + PRIMES + DESIGN)
def test_transforms_equal_scipy(length: int) -> None:
    x = np.random.default_rng(length).normal(size=(3, length)).astype(np.float32)
    forward, inverse = (f(x.astype(np.float64), type=2, norm="ortho") for f in (scipy.fft.dct, scipy.fft.idct))
    assert relative_error(dct(torch.from_numpy(x)), forward) <= 1e-6
    assert relative_error(idct(torch.from_numpy(x)), inverse) <= 1e-6
    double = torch.from_numpy(x.astype(np.float64))
    assert relative_error(dct(double), forward) <= 1e-14
    assert relative_error(idct(double), inverse) <= 1e-14


@pytest.mark.parametrize("length", [*SMALL, 127, 384, 769])
def test_matrix_is_the_transform_and_orthogonal(length: int) -> None:
    matrix = dct_matrix(length)
    assert matrix.dtype == torch.float64
    assert relative_error(matrix, scipy.fft.dct(np.eye(length), axis=0, norm="ortho")) <= 1e-14
    assert torch.allclose(matrix @ matrix.T, torch.eye(length, dtype=torch.float64), atol=1e-13)
    assert dct_matrix(length, dtype=torch.float32).dtype == torch.float32


def test_matrix_stays_exact_where_the_phase_is_large() -> None:
    # cos(pi (2i+1) k / 2N) evaluated in floating point loses digits as i k grows; compare the far corner with scipy's
    length = 4093
    unit = np.zeros(length)
    unit[-1] = 1.0
    assert np.abs(dct_matrix(length)[:, -1].numpy() - scipy.fft.dct(unit, norm="ortho")).max() <= 1e-15


@pytest.mark.parametrize("dim", [0, 1, -1, -3])
def test_dim_and_non_contiguous_input(dim: int) -> None:
    x = torch.randn(6, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    for ours, scipys in ((dct, scipy.fft.dct), (idct, scipy.fft.idct)):
        got = ours(x, dim=dim)
        assert got.shape == x.shape
        assert relative_error(got, scipys(x.numpy(), axis=dim, norm="ortho")) <= 1e-14


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (12, 8), (31, 17)])
def test_two_dimensional_transforms(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).normal(size=shape)
    assert relative_error(dct2(torch.from_numpy(weight)), scipy.fft.dctn(weight, norm="ortho")) <= 1e-14
    assert relative_error(idct2(torch.from_numpy(weight)), scipy.fft.idctn(weight, norm="ortho")) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(4, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ours in (dct, idct):
        got = ours(x)
        assert got.dtype == dtype
        assert torch.equal(got, ours(x.float()).to(dtype))


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_gradients(length: int) -> None:
    x = torch.randn(2, length, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dct, x)
    assert torch.autograd.gradcheck(idct, x)
    assert torch.autograd.gradgradcheck(dct, x)


def test_gradient_under_vmap_and_forward_shapes() -> None:
    x = torch.randn(5, 9, dtype=torch.float64)
    per_row = torch.func.vmap(torch.func.grad(lambda row: (dct(row) ** 3).sum()))(x)
    leaf = x.clone().requires_grad_()
    (dct(leaf) ** 3).sum().backward()
    assert torch.allclose(per_row, leaf.grad, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.ones(3, dtype=torch.int64), torch.ones(()), torch.ones(2, 0)])
def test_transform_refuses_what_it_cannot_transform(bad: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="a DCT needs"):
        dct(bad)


def test_matrix_refuses_an_empty_length() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        dct_matrix(0)


@pytest.mark.parametrize(
    ("shape", "n"), [((1, 1), 1), ((5, 3), 15), ((127, 31), 40), ((384, 1536), 700), ((4096, 4096), 700)]
)
def test_delta_weight_equals_scipy(shape: tuple[int, int], n: int) -> None:
    values, indices = entries(shape, n)
    want = reference_delta_weight(values.numpy(), indices.numpy(), shape, -1.7)
    assert np.abs(want).max() > 0
    got = delta_weight(values.float(), indices, shape, -1.7)
    assert got.dtype == torch.float32
    assert relative_error(got, want) <= 1e-6
    assert relative_error(delta_weight(values, indices, shape, -1.7), want) <= 1e-13


def test_repeated_positions_add_up() -> None:
    indices = torch.tensor([[1, 2], [1, 2], [0, 0]])
    dense = dense_spectrum(torch.tensor([1.0, 2.0, 5.0]), indices, (2, 3))
    assert dense.tolist() == [[5.0, 0.0, 0.0], [0.0, 0.0, 3.0]]


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (384, 384), (127, 1536), (768, 31)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 4)])
def test_sparse_apply_equals_the_dense_product(shape: tuple[int, int], lead: tuple[int, ...]) -> None:
    values, indices = entries(shape, min(50, shape[0] * shape[1]))
    x = torch.randn(*lead, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = x.numpy() @ reference_delta_weight(values.numpy(), indices.numpy(), shape, 0.5).T
    assert np.abs(want).max() > 0
    got = sparse_apply(x.float(), values.float(), indices, shape[0], 0.5)
    assert got.shape == (*lead, shape[0])
    assert got.dtype == torch.float32
    assert relative_error(got, want) <= 2e-6  # 1e-6 per transform
    shared = sparse_apply(dct(x), values, indices, shape[0], 0.5, transform=lambda spectrum: spectrum)
    assert relative_error(shared, want) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_apply_on_half_types_rounds_once(dtype: torch.dtype) -> None:
    values, indices = entries((96, 64), 40)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = sparse_apply(x, values.float(), indices, 96)
    assert got.dtype == dtype
    assert torch.equal(got, sparse_apply(x.float(), values.float(), indices, 96).to(dtype))


def test_sparse_apply_gradients() -> None:
    values, indices = entries((6, 5), 8)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: sparse_apply(x, v, indices, 6, 1.5), (x, values.requires_grad_()))
