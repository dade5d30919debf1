"""The kernels on a GPU, or their PTX on its stand-in, against scipy: kernel_suite.py, real sizes, graphs, streams."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import native_cases
import numpy as np
import pytest
from kernel_suite import (
    DESIGN_SIZES,
    test_a_token_does_not_depend_on_the_others,
    test_design_sizes,
    test_empty_problems,
    test_every_small_length,
    test_half_types_round_once_to_nearest_even,
    test_half_types_survive_every_value,
    test_hostile_banks_and_ids_stay_inside,
    test_random_shapes_types_and_maps,
)
from native_cases import CUDA, DTYPES, Array, Case, check, make, run, sorted_hostile
from native_gpu import Gpu, OnDevice, is_stand_in

__all__ = [  # run here on the GPU, by the fixture `engine` below
    "test_a_token_does_not_depend_on_the_others",
    "test_design_sizes",
    "test_empty_problems",
    "test_every_small_length",
    "test_half_types_round_once_to_nearest_even",
    "test_half_types_survive_every_value",
    "test_hostile_banks_and_ids_stay_inside",
    "test_random_shapes_types_and_maps",
]
pytestmark = pytest.mark.kernels


@pytest.fixture
def engine(native: Path, tmp_path: Path) -> Callable[[list[Case]], list[list[Array]]]:
    """Runs cases on the GPU."""

    def execute(cases: list[Case]) -> list[list[native_cases.Array]]:
        for case in cases:
            case.path = CUDA
        return run(native / "sdct_driver", cases, tmp_path)

    return execute


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hostile_entries_count_as_nothing(engine, dtype):
    rng = np.random.default_rng(40)
    cases = [sorted_hostile(rng, dtype, d, [e, 96], n) for d, e, n in [(64, 96, 50), (33, 35, 60), (1024, 768, 1100)]]
    assert all(check(case, got) for case, got in zip(cases, engine(cases), strict=True))


def test_zeros_inside_of_a_row_hide_nothing(engine):
    """Warps share a row's entries by 32 at a time: wherever some of them are 0, the others count."""
    rng = np.random.default_rng(31)
    cases = []
    for first, end in [(0, 0), (10, 42), (64, 96), (320, 352), (319, 353), (352, 384), (0, 352), (300, 650), (0, 699)]:
        for rows in (1, 2):  # all entries in one row, or the second half in another one
            case = make(rng, DTYPES[0], 1024, [1024], rows=1, slots=2, capacity=[700])
            case.ids[:], case.scales[:] = 1, 1
            case.indices[1, :, 0] = np.arange(700) * rows // 700 + 3
            case.indices[1, :, 1] = rng.permutation(1024)[:700]
            case.values[1] = rng.standard_normal(700)
            case.values[1, first:end] = 0
            cases.append(case)
    assert all(check(case, got) for case, got in zip(cases, engine(cases), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_real_models(engine, dtype):
    """q, k, v and gate, up of real sizes: many tokens, ragged rows, blends, in place."""
    rng = np.random.default_rng(41)
    cases = []
    for d_in, d_out in [(4096, [4096, 1024, 1024]), (896, [896, 128]), (3072, [8192, 8192]), (2048, [11008])]:
        for ragged in (False, True):
            case = make(
                rng,
                dtype,
                d_in,
                d_out,
                rows=9,
                tokens_per_row=5,
                blends=2,
                capacity=[1000] * len(d_out),
                ragged=ragged,
            )
            # no adapter twice in a row: scales that cancel would leave rounding alone to be compared
            case.ids[:] = [[1, 2], [0, 3], [0, 0], [3, 1], [2, 0], [1, 3], [2, 3], [3, 2], [1, 0]]
            case.in_place = ragged
            cases.append(case)
    assert all(check(case, got) for case, got in zip(cases, engine(cases), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_beyond_shared_memory(engine, native, dtype, monkeypatch):
    """These run in global memory: long powers of two, a long prime, and one long side."""
    rng = np.random.default_rng(42)
    shapes = [(65536, [64]), (64, [65536]), (20011, [33]), (40009, [40000])]
    if is_stand_in(native):  # a prime costs its square: shorter ones, and a device with little shared memory
        monkeypatch.setenv("SDCT_PTX_SHARED", "8192")
        shapes = [(65536, [64]), (64, [65536]), (2003, [33]), (4007, [4000])]
    cases = [make(rng, dtype, d_in, d_out, rows=2, tokens_per_row=2, capacity=[300]) for d_in, d_out in shapes]
    # sums of 40009 terms, as direct sums of a prime radix: the rounding grows with the root of the length
    results = zip(cases, engine(cases), strict=True)
    assert all(check(case, got, tolerance=1e-4 if case.x.shape[1] % 2 else 1e-5) for case, got in results)


def test_every_way_of_launching_gives_the_same_bits(engine, native, monkeypatch):
    """Projections in blocks of their own or together, tokens in turn, in shared and in global memory."""
    if not is_stand_in(native):
        pytest.skip("the device's size is that of this GPU")
    rng = np.random.default_rng(26)
    cases = []
    for n in [2048, 768, 4864, 37 * 22, 101, 1]:
        case = make(rng, DTYPES[0], n, [n, 512], rows=2, tokens_per_row=2, blends=2, capacity=[1100, 90])
        case.ids[:] = [[1, 2], [3, 3]]
        cases.append(case)
    results = []
    for multiprocessors, shared in [("132", "232448"), ("1", "232448"), ("132", "1024"), ("1", "1024")]:
        monkeypatch.setenv("SDCT_PTX_SMS", multiprocessors)
        monkeypatch.setenv("SDCT_PTX_SHARED", shared)
        results.append([[y.tobytes() for y in outputs] for outputs in engine(cases)])
    assert all(check(case, outputs) for case, outputs in zip(cases, engine(cases), strict=True))
    assert results[1:] == results[:1] * 3


@pytest.mark.parametrize("n", [*DESIGN_SIZES, 101, 65536])
def test_graphs_and_streams_give_the_same_bits(gpu: Gpu, native: Path, n: int) -> None:
    """Captured, and from four threads at once on streams of their own."""
    rng = np.random.default_rng(43)
    case = make(rng, DTYPES[1], n, [n], rows=4, tokens_per_row=3, blends=2, capacity=[700])
    case.ids[:] = [[1, 2], [0, 0], [3, 3], [2, 0]]
    node, plain, captured = gpu.node(case), OnDevice(gpu, case), OnDevice(gpu, case)
    node.run(plain.problem)
    (expected,) = plain.results()
    assert check(case, [expected])
    node.run(captured.problem, captured=True)
    assert captured.results()[0].tobytes() == expected.tobytes()

    copies, failures = [OnDevice(gpu, case) for _ in range(4)], []

    def client(own: OnDevice) -> None:
        try:
            for _ in range(2 if is_stand_in(native) else 10):
                node.run(own.problem)
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(own,)) for own in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(own.results()[0].tobytes() == expected.tobytes() for own in copies)


def test_many_tokens_and_many_adapters(gpu: Gpu) -> None:
    """8192 tokens of 64 rows with 2000 adapters resident; a row's numbers do not depend on the size of the call."""
    rng = np.random.default_rng(44)
    case = make(rng, DTYPES[2], 512, [512, 128], rows=64, tokens_per_row=128, slots=2001, capacity=[100, 100])
    case.ids[:, 0] = 1 + rng.permutation(2000)[:64]
    large = OnDevice(gpu, case)
    gpu.node(case).run(large.problem)
    results = large.results()
    assert check(case, results)
    part = copy.copy(case)
    part.ids, part.scales, part.x = case.ids[63:], case.scales[63:], case.x[-128:]
    part.y = [y[-128:] for y in case.y]
    small = OnDevice(gpu, part)
    gpu.node(part).run(small.problem)
    for a, b in zip(results, small.results(), strict=True):
        assert a[-128:].tobytes() == b.tobytes()
