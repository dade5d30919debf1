"""The native core's CPU path against scipy, in every instruction set found here; the GPU's: tests/gpu/test_kernels.py.

Runs `sdct_driver` (`cmake -S . -B build && cmake --build build`), best a build with SDCT_SANITIZE=address,undefined.
"""

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
from native_cases import CPU, DTYPES, Case, make, run

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


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def engine(request, monkeypatch, tmp_path):
    """A function that runs cases on one implementation; tests/gpu/test_kernels.py has one for the GPU."""
    driver = _driver()
    monkeypatch.setenv("SDCT_CPU_ISA", request.param)
    chosen = subprocess.run([str(driver), "--isa"], capture_output=True, text=True, check=True).stdout.strip()
    if chosen != request.param:
        pytest.skip(f"this machine has no {request.param}; it runs {chosen}")

    def execute(cases: list[Case]) -> list[list[native_cases.Array]]:
        for case in cases:
            case.path = CPU
        return run(driver, cases, tmp_path)

    return execute


def test_bad_problems_are_refused(tmp_path):
    rng = np.random.default_rng(29)
    case = make(rng, DTYPES[0], 8, [8], rows=3, tokens_per_row=2)
    case.x, case.y = case.x[:5], [case.y[0][:5]]  # five tokens of three rows
    with pytest.raises(AssertionError, match="status 2"):
        run(_driver(), [case], tmp_path)
