"""Coefficients fitted to real inputs: against dense least squares in numpy, and beside the largest ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdct_export.weights.fitting import fit_spectrum

SHAPE = (11, 17)


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A spectrum and the second moment of inputs that mostly lie in a few directions."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(200, 4)) @ rng.normal(size=(4, SHAPE[1])) + 0.1 * rng.normal(size=(200, SHAPE[1]))
    return torch.from_numpy(rng.normal(size=SHAPE)).float(), torch.from_numpy(inputs.T @ inputs)


def missed(change: torch.Tensor, moment: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> float:
    left = change.double().reshape(-1).clone()
    left[places] -= values.double()
    left = left.view(SHAPE)
    return float((left @ moment * left).sum())


@pytest.mark.parametrize("n", [1, 10, 60, 187])
def test_the_values_are_the_least_squares_solution_at_their_places(n: int) -> None:
    change, moment = problem(n)
    places, values = fit_spectrum(change, moment, n)
    assert len(set(places.tolist())) == n
    assert torch.equal(places, places.sort().values)
    root = np.linalg.cholesky(moment.numpy())
    for row in range(SHAPE[0]):
        own = (places // SHAPE[1]) == row
        cols = (places[own] % SHAPE[1]).numpy()
        want = np.linalg.lstsq(root.T[:, cols], root.T @ change[row].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(values[own].numpy(), want, rtol=5e-3, atol=5e-3)
    top = change.abs().reshape(-1).topk(n).indices
    plain = missed(change, moment, top, change.reshape(-1)[top])
    fitted = missed(change, moment, places, values)
    if n == change.numel():
        assert fitted < 1e-4 * float((change.double() @ moment * change).sum())
    else:
        assert fitted < 0.9 * plain


def test_inputs_of_equal_size_in_all_directions_give_the_largest_coefficients() -> None:
    change, _ = problem(0)
    places, values = fit_spectrum(change, torch.eye(SHAPE[1], dtype=torch.float64), 30)
    assert torch.equal(places, change.abs().reshape(-1).topk(30).indices.sort().values)
    torch.testing.assert_close(values, change.reshape(-1)[places], rtol=1e-5, atol=0)


def test_inputs_that_are_all_zero_give_no_nan() -> None:
    change, moment = problem(0)
    _, values = fit_spectrum(change, torch.zeros_like(moment), 5)
    assert torch.isfinite(values).all()
