"""Tests of the kernel core that every engine runs: a module imports them and brings its own fixture `engine`."""

import copy

import ml_dtypes
import native_cases
import numpy as np
import pytest
from native_cases import CUDA, DTYPES, Case, check, make

DESIGN_SIZES = [384, 768, 896, 1024, 1536, 2048, 3072, 4096, 4864, 5120, 8192, 11008, 14336, 18944]
# primes, prime powers, 2 x prime, 4 x prime, lengths that fit no vector, every register radix
ODD_SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 22, 26, 27, 30, 35, 44, 49, 60, 64, 77, 97, 100, 101]
ODD_SIZES += [118, 121, 127, 128, 130, 154, 192, 211, 242, 250, 262, 288, 343, 352, 402, 509, 514, 592, 688, 1018]


def _check_all(cases: list[Case], results: list[list[native_cases.Array]]) -> None:
    assert sum(check(case, got) for case, got in zip(cases, results, strict=True)) > len(cases) // 2


def test_random_shapes_types_and_maps(engine):
    rng = np.random.default_rng(20)
    cases = []
    for i in range(120):
        m = int(rng.integers(1, 4))
        case = make(
            rng,
            DTYPES[i % 3],
            int(rng.choice(ODD_SIZES)),
            [int(rng.choice(ODD_SIZES)) for _ in range(m)],
            rows=int(rng.integers(1, 5)),
            tokens_per_row=int(rng.integers(1, 20)),
            blends=int(rng.integers(1, 4)),
            ragged=bool(rng.integers(2)),
        )
        case.in_place = bool(rng.integers(2))
        case.gap = int(rng.integers(0, 4))
        case.threads = int(rng.choice([1, 2, 32]))
        cases.append(case)
    _check_all(cases, engine(cases))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_design_sizes(engine, dtype):
    rng = np.random.default_rng(21)
    cases = []
    for n in DESIGN_SIZES:
        case = make(rng, dtype, n, [n], rows=2, capacity=[700])
        case.ids[:] = [[1], [2]]
        case.threads = 2
        cases.append(case)
    _check_all(cases, engine(cases))


def test_every_small_length(engine):
    rng = np.random.default_rng(22)
    cases = [make(rng, DTYPES[0], n, [n], rows=1, capacity=[40]) for n in range(1, 150)]
    _check_all(cases, engine(cases))


def test_hostile_banks_and_ids_stay_inside(engine):
    """Out-of-range entries and ids count as nothing; a sanitizer build would stop at any access outside the arrays."""
    rng = np.random.default_rng(23)
    extremes = np.array([-(2**31), -(2**31) + 1, -1, 2**31 - 1, 2**30, 65536], np.int64)
    cases = []
    for d_in, d_out in [(64, 96), (33, 35), (768, 128), (22, 1024)]:
        case = make(rng, DTYPES[0], d_in, [d_out, d_out], rows=3, tokens_per_row=3, blends=2, capacity=[50, 1100])
        bad = rng.random(case.indices.shape) < 0.3
        limits = np.array([d_out, d_in, d_out + 1, d_in + 1])
        case.indices[bad] = rng.choice(np.concatenate([extremes, limits]), int(bad.sum())).astype(np.int32)
        case.values[:] = rng.standard_normal(case.values.shape)
        case.ids[:] = rng.choice([*extremes, 1, 2, 3, len(case.values)], case.ids.shape).astype(np.int32)
        case.ids[0] = [1, 2**31 - 1]
        case.token_row = rng.choice([*extremes, 0, 0, 0, 1, 2, 3], len(case.x)).astype(np.int32)
        case.token_row[0] = 0
        case.threads = 1  # unsorted rows: the order of the sums is unspecified, and a thread's at a time is in order
        case.ordered = False
        cases.append(case)
    results = engine(cases)
    if cases[0].path != CUDA:  # on a GPU the sums of a row that comes up twice may lose a part; inside they stay too
        _check_all(cases, results)


def test_empty_problems(engine):
    rng = np.random.default_rng(24)
    cases = [
        make(rng, DTYPES[0], 8, [8], rows=0),
        make(rng, DTYPES[0], 8, [8], rows=3, tokens_per_row=0),
        make(rng, DTYPES[0], 8, [8], rows=3, blends=0),
        make(rng, DTYPES[0], 8, [8], rows=3, slots=1),
        make(rng, DTYPES[0], 8, [8], rows=3, capacity=[0]),
    ]
    for case, outputs in zip(cases, engine(cases), strict=True):
        check(case, outputs)


def test_a_token_does_not_depend_on_the_others(engine):
    """Bit-equal alone, among other rows, among more tokens of its row, and on several threads."""
    rng = np.random.default_rng(25)
    cases, parts = [], []
    for n, dtype in [(2048, DTYPES[0]), (768, DTYPES[1]), (896, DTYPES[2]), (202, DTYPES[0]), (105, DTYPES[0])]:
        case = make(rng, dtype, n, [n, 96], rows=3, tokens_per_row=21, blends=2, capacity=[200, 80])
        case.ids[:] = [[1, 2], [3, 0], [2, 2]]
        alone = copy.copy(case)
        alone.ids, alone.scales = np.repeat(case.ids, 21, axis=0), np.repeat(case.scales, 21, axis=0)
        last = copy.copy(case)
        last.ids, last.scales, last.x = case.ids[2:], case.scales[2:], case.x[42:]
        last.y = [y[42:] for y in case.y]
        alone.threads, last.threads = 1, 2
        cases += [case, alone, last]
        parts.append((slice(0, None), slice(42, None)))
    results = engine(cases)
    for i, (everything, tail) in enumerate(parts):
        whole, alone_, last_ = results[3 * i : 3 * i + 3]
        for a, b, c in zip(whole, alone_, last_, strict=True):
            assert a.tobytes() == b[everything].tobytes()
            assert a[tail].tobytes() == c.tobytes()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_types_survive_every_value(engine, dtype):
    """An adapter whose values are all zero leaves every finite bit pattern of y as it is, subnormals included."""
    rng = np.random.default_rng(27)
    patterns = np.arange(65536, dtype=np.uint16).view(dtype)
    patterns = patterns[np.isfinite(patterns.astype(np.float32)) & (patterns.view(np.uint16) != 0x8000)]
    for n in (1024, 33):
        y = np.resize(patterns, (len(patterns) // n + 1, n))
        case = make(rng, dtype, 32, [n], rows=len(y), capacity=[4])
        case.y, case.values[:], case.ids[:] = [y], 0.0, 1
        (got,) = engine([case])[0]
        assert got.tobytes() == y.tobytes()


def test_half_types_round_once_to_nearest_even(engine):
    rng = np.random.default_rng(28)
    for dtype, ulp in [(np.dtype(np.float16), 2.0**-10), (np.dtype(ml_dtypes.bfloat16), 2.0**-7)]:
        # d = 1: x passes both transforms unchanged, so y + value * x is exact in float32 and rounded once
        case = make(rng, dtype, 1, [1], rows=3, slots=4, capacity=[1])
        case.x[:], case.ids[:], case.scales[:], case.indices[:] = 1.0, [[1], [2], [3]], 1.0, 0
        case.y[0][:, 0] = [1.0, 1.0 + ulp, 1.0]
        case.values[1:, 0] = [ulp / 2, ulp / 2, ulp * 0.51]
        (got,) = engine([case])[0]
        assert got[:, 0].astype(np.float64).tolist() == [1.0, 1.0 + 2 * ulp, 1.0 + ulp]
