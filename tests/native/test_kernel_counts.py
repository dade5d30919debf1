"""What the kernels cost, counted, stays within 5 percent of what benchmarks/results/kernel_counts.json says."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "benchmarks" / "results" / "kernel_counts.json"
COUNTS = ("instructions", "wavefronts", "ideal_wavefronts", "sectors", "barriers")


@pytest.fixture(scope="module")
def kernel_counts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_counts", ROOT / "benchmarks" / "kernel_counts.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["kernel_counts"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts_are_the_recorded_ones(kernel_counts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ.get("SDCT_PTX_BUILD", ROOT / "build" / "ptx")).resolve()
    if not (folder / "libsdct_ptx.so").is_file():
        pytest.skip(f"{folder} holds no libsdct_ptx.so: build it with cmake -S . -B build/ptx -DSDCT_PTX=ON")
    recorded = json.loads(RECORDED.read_text())
    if kernel_counts.version_of(folder) != recorded["nvcc"]:
        pytest.skip(f"the counts are of nvcc {recorded['nvcc']}, this is {kernel_counts.version_of(folder)}")
    for name in ("SDCT_PTX_RACES", "SDCT_PTX_SHARED", "SDCT_PTX_SMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what counting sets is undone afterwards
    got = {row["name"]: row for row in kernel_counts.cases(folder, with_registers=False)}
    want = {row["name"]: row for row in recorded["cases"]}
    assert got.keys() == want.keys()
    wrong = [
        f"{name}: {want[name][key]} {key} are recorded, {row[key]} counted"
        for name, row in got.items()
        for key in COUNTS
        if not math.isclose(row[key], want[name][key], rel_tol=0.05, abs_tol=1)
    ]
    assert not wrong, "record them anew with benchmarks/kernel_counts.py, if they are better:\n" + "\n".join(wrong)


def test_the_model_of_time(kernel_counts: ModuleType) -> None:
    """By hand: each resource in turn is the scarcest one of an H200, and a device holds as many blocks as fit."""
    h200 = kernel_counts.DEVICES["h200"]
    counted: dict[str, Any] = {"tokens": 16, "blocks": 1, "threads": 256, "shared_bytes": 50000, "barriers": 1}
    counted |= {"instructions": 0, "wavefronts": 0, "sectors": 0}

    def model(tokens: int = 13200, data: float = 0.0, **changes: int) -> float:
        return kernel_counts.model_us(h200, counted | changes, tokens, data) - kernel_counts.LAUNCH_US

    assert kernel_counts.resident(h200, 70, 256, 50000) == 3  # 72 x 32 x 8 = 18432 registers of 65536
    assert kernel_counts.resident(h200, 32, 256, 50000) == 4  # 51024 bytes of 233472
    assert kernel_counts.resident(h200, 32, 1024, 1000) == 2  # 2048 threads
    assert kernel_counts.resident(h200, 16, 32, 0) == 32  # blocks
    assert kernel_counts.resident(h200, 255, 512, 0) == 1  # never less
    # 100 tokens on each of 132 multiprocessors
    assert model(instructions=16 * 40000) == pytest.approx(100 * 40000 / 4 / 1755)
    assert model(wavefronts=16 * 30000, sectors=16 * 400) == pytest.approx(100 * (30000 + 100) / 1755)
    assert model(barriers=40) == pytest.approx(100 / 16 * 40 * 500 / 1755)
    assert model(sectors=16 * 100000) == pytest.approx(13200 * 100000 * 32 / 5.5e6)
    assert model(data=1e6) == pytest.approx(13200 * 1e6 / 4.8e6)
    assert model(tokens=13201, instructions=16 * 40000) == pytest.approx(101 * 40000 / 4 / 1755)  # one has one more
    # decode: each block has a multiprocessor
    decode = counted | {"tokens": 1, "blocks": 2}
    for changes, cycles in (({"barriers": 10}, 10 * 500), ({"instructions": 80000}, 40000 / 4)):
        us = kernel_counts.model_us(h200, decode | changes, 1, 0.0)
        assert us - kernel_counts.LAUNCH_US == pytest.approx(cycles / 1755)
