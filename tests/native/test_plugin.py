"""The TensorRT plugin library: compiled against the versions at hand, loaded into a real registry. No GPU.

SDCT_TRT_HEADERS       folders of TensorRT headers, separated by ':'
SDCT_LIBRARY_PATH      the folder of the built plugin library
SDCT_TRT_PYTHON        an interpreter with the TensorRT it was built for (the full package, or the lean runtime)
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sdct_export.native import find_plugin

ROOT = Path(__file__).parents[2]


def setting(name: str, what: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"{name} is not set to {what}")
    return value


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_compiles_without_warnings_and_behaves_against_every_version() -> None:
    headers = setting("SDCT_TRT_HEADERS", "folders of TensorRT headers").split(":")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    out = run(str(ROOT / "plugins/tests/compile_matrix.sh"), *headers)
    results = [line for line in out.splitlines() if line.startswith("TensorRT ")]
    assert len(results) == len(headers)
    assert all(line.endswith(", 0 failed") for line in results)


def test_real_registry_creates_clones_serializes_and_refuses() -> None:
    python = setting("SDCT_TRT_PYTHON", "an interpreter with TensorRT")
    library = find_plugin("8.5.3.1")
    if library is None:
        pytest.skip("the plugin library is not built (set SDCT_LIBRARY_PATH to its folder)")
    out = run(python, str(ROOT / "tests/native/trt_registry_check.py"), str(library))
    assert out.rstrip().endswith("0 failed")
    assert sum(line.startswith("ok ") for line in out.splitlines()) > 25
