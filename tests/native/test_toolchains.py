"""Which GPUs a build is for, and that kernels which spill registers do not pass (plugins/tests/toolchains.py)."""

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

# what `nvcc --list-gpu-code` says (for 11 and 12: what NVRTC does, which knows the same), and what is then compiled
OLD = [50, 52, 53, 60, 61, 62, 70, 72]
KNOWN = {
    "11.4": ([35, 37, *OLD, 75, 80, 86, 87], "75-real 80-real 86-real 87-real 86-virtual"),
    "11.8": ([35, 37, *OLD, 75, 80, 86, 87, 89, 90], "75-real 80-real 86-real 87-real 89-real 90-real 90-virtual"),
    "12.6": ([*OLD, 75, 80, 86, 87, 89, 90], "75-real 80-real 86-real 87-real 89-real 90-real 90-virtual"),
    "12.9": (
        [*OLD, 75, 80, 86, 87, 89, 90, 100, 101, 103, 120, 121],
        "75-real 80-real 86-real 87-real 89-real 90-real 100-real 101-real 120-real 120-virtual",
    ),
    "13.5": (
        [75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121, 107],
        "75-real 80-real 86-real 87-real 89-real 90-real 100-real 110-real 120-real 120-virtual",
    ),
    "with names of its own": (["80", "90a", "100f", "120"], "80-real 120-real 120-virtual"),
    "that does not tell": ([], "75-real 80-real 80-virtual"),
}


@pytest.fixture(scope="module")
def toolchains() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toolchains", ROOT / "plugins/tests/toolchains.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", KNOWN)
def test_the_architectures_follow_the_compiler(version: str, tmp_path: Path) -> None:
    cmake = shutil.which("cmake") or pytest.skip("cmake is missing")
    known, wanted = KNOWN[version]
    nvcc, script = tmp_path / "nvcc", tmp_path / "list.cmake"
    lines = "\n".join(f"echo sm_{name}" for name in known) or "exit 1"
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-code ] || exit 2\n{lines}\n')
    nvcc.chmod(0o755)
    script.write_text(
        f"include({ROOT}/plugins/core/architectures.cmake)\nsdct_architectures({nvcc} found)\n"
        'string(REPLACE ";" " " found "${found}")\nmessage("found ${found}")\n'
    )
    said = subprocess.run([cmake, "-P", script], capture_output=True, text=True, check=True).stderr
    assert said.strip() == f"found {wanted}"


def ptxas(tmp_path: Path, *options: str) -> str:
    """What ptxas says of a kernel that holds 64 numbers at once."""
    nvcc = shutil.which("nvcc") or pytest.skip("nvcc is missing")
    source = tmp_path / "kernel.cu"
    source.write_text(
        "__global__ void many(volatile float* x) {\n  float a[64];\n"
        "#pragma unroll\n  for (int i = 0; i < 64; ++i) a[i] = x[i * 32];\n  __syncthreads();\n"
        "#pragma unroll\n  for (int i = 0; i < 64; ++i) x[i * 32] = a[63 - i];\n}\n"
    )
    command = [
        nvcc,
        "-arch=sm_80",
        "-Xptxas",
        "-v",
        "-cubin",
        *options,
        str(source),
        "-o",
        str(tmp_path / "kernel.cubin"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_registers_that_spill_are_refused(toolchains: ModuleType, tmp_path: Path) -> None:
    assert toolchains.no_spills(ptxas(tmp_path), 1) >= 64
    with pytest.raises(toolchains.Failed, match="spills"):
        toolchains.no_spills(ptxas(tmp_path, "-maxrregcount=32"), 1)
    with pytest.raises(toolchains.Failed, match="told of 1 kernels, expected 2"):
        toolchains.no_spills(ptxas(tmp_path), 2)


def test_the_kernels_that_are_launched_are_found(toolchains: ModuleType) -> None:
    names = toolchains.instantiated((ROOT / "plugins/core/cuda.cu").read_text())
    assert len(names) >= 6
    for kind in ("float", "Half", "BFloat16"):
        assert any(f"<{kind}" in name for name in names)
    with pytest.raises(toolchains.Failed, match="no kernel"):
        toolchains.instantiated("#if !defined(__CUDACC_RTC__)\n")
