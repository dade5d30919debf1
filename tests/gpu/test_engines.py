"""TensorRT engines on a GPU: parity, blends, hot loading, bit-exact return, 2000 adapters (see engine_check.py)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdct_export.native import library_folders
from sdct_export.plugin_choice import plugin_libraries

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.gpu
def test_engines(tmp_path: Path) -> None:
    python = os.environ.get("SDCT_TRT_PYTHON")
    if python is None:
        if importlib.util.find_spec("tensorrt") is None:
            pytest.skip("tensorrt is not installed here, and SDCT_TRT_PYTHON names no interpreter that has it")
        python = sys.executable
    if not plugin_libraries(library_folders()):
        pytest.skip("the plugin library is not built (set SDCT_LIBRARY_PATH to its folder)")
    cases = os.environ.get("SDCT_ENGINE_CASES")  # made before by make_engine_cases.py
    if cases is None:
        cases = str(tmp_path)
        subprocess.run([sys.executable, str(HERE / "make_engine_cases.py"), cases], check=True, timeout=1800)
    result = ROOT / "build" / "gpu" / "engine_checks.json"  # benchmarks/gpu/run.py takes it into its report
    result.parent.mkdir(parents=True, exist_ok=True)
    command = [python, str(HERE / "engine_check.py"), cases, str(result)]
    done = subprocess.run(command, text=True, timeout=3600, check=False)
    assert done.returncode == 0
