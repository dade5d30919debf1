"""The native core against scipy: the GPU kernel run on the CPU, and the CPU path in every instruction set found here.

Runs `sdct_driver` (`cmake -S . -B build && cmake --build build`), best a build with SDCT_SANITIZE=address,undefined.
"""

import copy
import os
import subprocess
from pathlib import Path

import native_cases
import numpy as np
import pytest
from kernel_suite import (
    test_a_token_does_not_depend_on_the_others,
    test_design_sizes,
    test_empty_problems,
    test_every_small_length,
    test_half_types_round_once_to_nearest_even,
    test_half_types_survive_every_value,
    test_hostile_banks_and_ids_stay_inside,
    test_random_shapes_types_and_maps,
)
from native_cases import CPU, DTYPES, EMULATED, Case, check, make, run

ROOT = Path(__file__).parents[2]
__all__ = [  # run here, by the fixture `engine` below
    "test_a_token_does_not_depend_on_the_others",
    "test_design_sizes",
    "test_empty_problems",
    "test_every_small_length",
    "test_half_types_round_once_to_nearest_even",
    "test_half_types_survive_every_value",
    "test_hostile_banks_and_ids_stay_inside",
    "test_random_shapes_types_and_maps",
]


def _driver() -> Path:
    named = os.environ.get("SDCT_DRIVER")
    if named:
        return Path(named)
    found = sorted([*ROOT.glob("build/sdct_driver"), *ROOT.glob("build/*/sdct_driver")])
    if not found:
        pytest.skip("no sdct_driver: build it with cmake -S . -B build && cmake --build build, or set SDCT_DRIVER")
    return found[0]


@pytest.fixture(params=["kernel", "avx512", "avx2", "baseline"])
def engine(request, monkeypatch, tmp_path):
    """A function that runs cases on one implementation; tests/gpu/test_kernels.py has one for the GPU."""
    driver, path = _driver(), EMULATED
    if request.param != "kernel":
        path = CPU
        monkeypatch.setenv("SDCT_CPU_ISA", request.param)
        chosen = subprocess.run([str(driver), "--isa"], capture_output=True, text=True, check=True).stdout.strip()
        if chosen != request.param:
            pytest.skip(f"this machine has no {request.param}; it runs {chosen}")

    def execute(cases: list[Case]) -> list[list[native_cases.Array]]:
        for case in cases:
            case.path = path
        return run(driver, cases, tmp_path)

    return execute


def test_kernel_threads_are_independent(tmp_path):
    """Other thread orders, block sizes and splits give the same bits: no thread reads what another one writes."""
    rng = np.random.default_rng(26)
    cases = []
    for n in [2048, 768, 4864, 11008, 37 * 22, 101, 1]:
        case = make(rng, DTYPES[0], n, [n, 512], rows=2, blends=2, capacity=[1100, 90])
        case.ids[:] = [[1, 2], [3, 3]]
        case.threads = 128
        for seed, threads, split in [(0, 128, False), (1, 128, False), (2, 128, True), (3, 1, False), (4, 96, True)]:
            other = copy.copy(case)
            other.seed, other.threads, other.split = seed, threads, split
            cases.append(other)
    results = run(_driver(), cases, tmp_path)
    for i in range(0, len(cases), 5):
        assert check(cases[i], results[i])
        for other in results[i + 1 : i + 5]:
            assert [y.tobytes() for y in other] == [y.tobytes() for y in results[i]]


def test_bad_problems_are_refused(tmp_path):
    rng = np.random.default_rng(29)
    case = make(rng, DTYPES[0], 8, [8], rows=3, tokens_per_row=2)
    case.x, case.y = case.x[:5], [case.y[0][:5]]  # five tokens of three rows
    for path in (EMULATED, CPU):
        case.path = path
        with pytest.raises(AssertionError, match="status 2"):
            run(_driver(), [case], tmp_path)
