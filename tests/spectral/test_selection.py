"""Bands and selections against a coefficient-by-coefficient implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import band_of

from sdct_export.errors import ConfigError
from sdct_export.spectral.selection import band_map, band_quotas, bands_of, select, select_for_weight
from sdct_export.spectral.transform import dct2

SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (12, 12), (17, 40), (64, 31)]


def magnitudes(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A spectrum whose magnitudes are all different, so that 'the largest' has one answer."""
    rng = np.random.default_rng(seed)
    size = shape[0] * shape[1]
    values = rng.permutation(size).astype(np.float32) + 1.0
    return torch.from_numpy((values * rng.choice([-1.0, 1.0], size=size)).reshape(shape).astype(np.float32))


def members(shape: tuple[int, int], bands: int) -> list[list[tuple[int, int]]]:
    found: list[list[tuple[int, int]]] = [[] for _ in range(bands)]
    for row in range(shape[0]):
        for col in range(shape[1]):
            found[band_of(row, col, shape, bands)].append((row, col))
    return found


def pairs(indices: np.ndarray) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in indices.tolist()]


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7])
def test_band_map_equals_exact_integer_arithmetic(shape: tuple[int, int], bands: int) -> None:
    got = band_map(shape, bands)
    want = [[band_of(row, col, shape, bands) for col in range(shape[1])] for row in range(shape[0])]
    assert got.tolist() == want
    indices = np.argwhere(np.ones(shape)).astype(np.int32)
    assert bands_of(indices, shape, bands).tolist() == got.ravel().tolist()
    assert got[0, 0] == 0
    assert got[-1, -1] == bands - 1


def test_band_edges_lie_at_thirds_of_the_largest_distance() -> None:
    got = band_map((301, 401), 3)  # d_max = hypot(300, 400) = 500
    assert [int(got[0, col]) for col in (0, 166, 167, 333, 334)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("bands", [0, 256, -1])
def test_band_map_refuses_bad_counts(bands: int) -> None:
    with pytest.raises(ConfigError, match=r"1\.\.255"):
        band_map((4, 4), bands)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.data())
def test_quotas_are_as_equal_as_the_bands_allow(sizes: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(0, sum(sizes)))
    quotas = band_quotas(n, sizes)
    assert sum(quotas) == n
    assert all(0 <= q <= size for q, size in zip(quotas, sizes, strict=True))
    # a band that is not full never holds fewer than another one by more than the remainder of the division
    for q, size in zip(quotas, sizes, strict=True):
        if q < size:
            assert q >= max(quotas) - 1


def test_quotas_give_the_remainder_to_the_lowest_bands_and_overflow_to_the_rest() -> None:
    assert band_quotas(700, [5000, 9000, 4000]) == [234, 233, 233]
    assert band_quotas(10, [2, 100, 100]) == [2, 4, 4]
    with pytest.raises(ConfigError, match="lower n_coefficients"):
        band_quotas(11, [5, 5])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("selection", ["energy", "top", "random", "low"])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_selections_are_distinct_sorted_in_range_and_repeatable(
    shape: tuple[int, int], selection: str, share: float
) -> None:
    n = max(1, round(share * shape[0] * shape[1]))
    spectrum = magnitudes(shape)
    got = select(selection, n, shape, spectrum=spectrum, seed=3)
    assert got.dtype == np.int32
    assert got.shape == (n, 2)
    assert pairs(got) == sorted(set(pairs(got)))
    assert (got >= 0).all()
    assert (got < np.array(shape)).all()
    assert np.array_equal(got, select(selection, n, shape, spectrum=spectrum, seed=3))


@pytest.mark.parametrize("shape", SHAPES[3:])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_top_takes_the_largest_of_each_band(shape: tuple[int, int], bands: int) -> None:
    spectrum = magnitudes(shape)
    n = shape[0] * shape[1] // 3 + 1
    groups = members(shape, bands)
    want = set()
    for group, quota in zip(groups, band_quotas(n, [len(g) for g in groups]), strict=True):
        want |= set(sorted(group, key=lambda p: -abs(float(spectrum[p])))[:quota])
    assert set(pairs(select("top", n, shape, spectrum=spectrum, bands=bands))) == want


@pytest.mark.parametrize("delta", [0.0, 0.25, 0.7, 1.0])
def test_energy_takes_delta_by_magnitude_and_the_rest_at_random(delta: float) -> None:
    shape, n, bands = (40, 30), 90, 3
    spectrum = magnitudes(shape)
    groups = members(shape, bands)
    chosen = set(pairs(select("energy", n, shape, spectrum=spectrum, delta=delta, bands=bands, seed=0)))
    others = set(pairs(select("energy", n, shape, spectrum=spectrum, delta=delta, bands=bands, seed=1)))
    assert (chosen == others) == (delta == 1.0)
    for group in groups:
        by_magnitude = round(delta * 30)
        largest = set(sorted(group, key=lambda p: -abs(float(spectrum[p])))[:by_magnitude])
        assert len(chosen & set(group)) == 30
        assert largest <= chosen & others


def test_random_part_is_uniform_over_what_is_left() -> None:
    # each of the 20 coefficients outside the magnitude part is drawn about equally often
    shape, counts = (5, 6), np.zeros((5, 6))
    spectrum = magnitudes(shape)
    for seed in range(400):
        got = select("energy", 20, shape, spectrum=spectrum, delta=0.5, bands=1, seed=seed)
        counts[got[:, 0], got[:, 1]] += 1
    always = counts == 400
    assert always.sum() == 10
    assert np.abs(counts[~always] / 400 - 0.5).max() < 0.12


def test_low_takes_the_nearest_to_zero_frequency() -> None:
    got = select("low", 20, (17, 40))
    distances = sorted(row * row + col * col for row in range(17) for col in range(40))
    assert sorted((got.astype(int) ** 2).sum(axis=1).tolist()) == distances[:20]


def test_seed_changes_random_choices_only() -> None:
    spectrum = magnitudes((30, 30))
    for selection, differs in (("random", True), ("energy", True), ("top", False), ("low", False)):
        first, second = (select(selection, 50, (30, 30), spectrum=spectrum, seed=s) for s in (0, 1))
        assert np.array_equal(first, second) != differs
    assert not np.array_equal(select("random", 50, (30, 30), seed=(0, 1)), select("random", 50, (30, 30), seed=(0, 2)))


def test_select_for_weight_reads_the_spectrum_of_the_weight() -> None:
    weight = torch.randn(24, 18, generator=torch.Generator().manual_seed(0))
    for selection in ("energy", "top", "random", "low"):
        got = select_for_weight(weight, selection, 60, seed=5)
        assert np.array_equal(got, select(selection, 60, (24, 18), spectrum=dct2(weight), seed=5))
    assert np.array_equal(
        select_for_weight(weight.bfloat16(), "top", 60), select_for_weight(weight.bfloat16().float(), "top", 60)
    )


def test_errors() -> None:
    for n in (0, 13):
        with pytest.raises(ConfigError, match="between 1 and 12"):
            select("random", n, (3, 4))
    with pytest.raises(ConfigError, match="unknown selection 'best'"):
        select("best", 2, (3, 4))
    with pytest.raises(ConfigError, match="needs a spectrum of shape"):
        select("top", 2, (3, 4))
    with pytest.raises(ConfigError, match=r"got \(4, 3\)"):
        select("energy", 2, (3, 4), spectrum=torch.zeros(4, 3))
