"""compute-sanitizer on a short run of the kernels: accesses outside of arrays, and races in shared memory."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from native_cases import CUDA, DTYPES, check, make, run, sorted_hostile

pytestmark = pytest.mark.gpu
CLEAN = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards displayed"}


@pytest.mark.parametrize("tool", CLEAN)
def test_sanitizer_finds_nothing(native: Path, tmp_path: Path, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    rng = np.random.default_rng(50)
    cases = []
    # register radices, odd lengths, a prime radix with scratch memory, one length that runs in global memory
    for i, (d_in, d_out) in enumerate([(64, [96, 33]), (105, [77]), (130, [768]), (2048, [512]), (20011, [8])]):
        case = make(rng, DTYPES[i % 3], d_in, d_out, rows=2, tokens_per_row=2, blends=2, capacity=[1100] * len(d_out))
        case.in_place, case.gap = bool(i % 2), i % 3
        if i % 2:
            case.token_row = np.array([1, -1, 0, 2], np.int32)
        cases.append(case)
    cases += [sorted_hostile(rng, dtype, 64, [96, 96], 50) for dtype in DTYPES]
    for case in cases:
        case.path = CUDA
    log, script = tmp_path / "log", tmp_path / "driver"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--log-file", str(log), str(native / "sdct_driver")]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    script.chmod(0o755)
    try:
        results = run(script, cases, tmp_path)
    except AssertionError:
        said = log.read_text() if log.exists() else ""
        if "not supported" in said:
            pytest.skip(f"compute-sanitizer does not support this device: {said.strip().splitlines()[-1]}")
        raise AssertionError(f"compute-sanitizer {tool}:\n{said[-4000:]}") from None
    assert CLEAN[tool] in log.read_text()
    assert all(check(case, got, 1e-4) for case, got in zip(cases, results, strict=True))
