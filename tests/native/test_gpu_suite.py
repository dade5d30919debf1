"""What decides whether the GPU suite (tests/gpu) runs, and that it says why where it does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cuda_driver
import engine_check
import fake_tensorrt
import make_engine_cases
import native_gpu
import pytest

from sdct_export.bundle.description import Bundle
from sdct_export.engine.build import ENGINE_FILE, Profile, manifest_path

ROOT = Path(__file__).parents[2]
DRIVER = """
#include <stdlib.h>
static int number(char const* name) { char const* text = getenv(name); return text ? atoi(text) : 0; }
int cuInit(unsigned flags) { return number("FAKE_STATUS"); }
int cuDeviceGetCount(int* count) { *count = number("FAKE_COUNT"); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : -1;
  return device ? 101 : 0;
}
"""


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., cuda_driver.Found]]:
    """What is found beside a driver that says what the arguments are; without arguments there is no driver."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler, to make a driver from")

    def found(**says: int) -> cuda_driver.Found:
        library = tmp_path / "libcuda.so.1"
        library.unlink(missing_ok=True)
        if says:
            (tmp_path / "driver.c").write_text(DRIVER)
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        for name in ("status", "count"):
            monkeypatch.setenv(f"FAKE_{name.upper()}", str(says.get(name, 0)))
        cuda_driver.gpu.cache_clear()
        return cuda_driver.gpu()

    yield found
    cuda_driver.gpu.cache_clear()


def test_a_gpu_is_where_the_driver_knows_one(ask: Callable[..., cuda_driver.Found]) -> None:
    """Whatever the devices are called: in WSL2 there is `/dev/dxg`, on a Jetson `/dev/nvgpu` or `/dev/nvhost-gpu`."""
    assert ask(count=1) == cuda_driver.Found("", (8, 7))
    assert native_gpu._architecture() == "87-real"  # where there is no nvidia-smi
    assert ask(count=0).why == "the CUDA driver knows no device"  # CUDA_VISIBLE_DEVICES is empty
    assert ask(status=100, count=1).why == "the CUDA driver answers with error 100"
    with pytest.raises(native_gpu.Missing, match="no GPU here: the CUDA driver answers with error 100"):
        native_gpu._architecture()


@pytest.mark.skipif(not cuda_driver.gpu().why, reason="this machine has a GPU")
def test_without_a_driver_it_says_so(ask: Callable[..., cuda_driver.Found]) -> None:
    assert ask().why in (
        "the CUDA driver, libcuda.so.1, is not installed",
        "the CUDA driver knows no device",
        "the CUDA driver answers with error 100",
    )


@pytest.mark.skipif(not cuda_driver.gpu().why, reason="this machine has a GPU, on which it takes long")
def test_the_benchmarks_say_why_they_are_skipped() -> None:
    """`make gpu` ends well where there is nothing to run on, and every module of the benchmarks can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != native_gpu.BUILD}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu" / "run.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"SKIPPED the GPU benchmarks: (no GPU here: .*|(cmake|nvcc) is not on the PATH.*)\n", done.stdout
    )


@pytest.mark.parametrize(
    "file", [*ROOT.glob("tests/gpu/*.py"), *ROOT.glob("benchmarks/gpu/*.py")], ids=lambda f: f.name
)
def test_what_the_suite_names_in_this_repository_is_there(file: Path) -> None:
    for named in re.findall(r"\b((?:plugins|tests|benchmarks|docs|sdct_export)/[\w./-]*\w)", file.read_text()):
        assert (ROOT / named).exists() or named.startswith("benchmarks/results/"), named


@pytest.mark.parametrize("name", ["bert-float32", "vit-float32"])
def test_the_engine_checks_hold_over_the_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """engine_check.py and its cases, with an engine that ONNX Runtime computes: only TensorRT is new on a GPU."""
    monkeypatch.setattr(make_engine_cases, "DECODERS", ())
    monkeypatch.setattr(make_engine_cases, "FAMILIES", (name.split("-")[0],))
    monkeypatch.setattr(make_engine_cases, "DTYPES", ("float32",))
    make_engine_cases.make(tmp_path)
    trt = fake_tensorrt.install(monkeypatch)

    def build(bundle: Bundle, output: Path | None = None, *, profile: Profile, **_: object) -> None:
        fake_tensorrt.write_engine(bundle.path, trt, profile=profile)
        if output is not None:
            shutil.copy(bundle.path / ENGINE_FILE, output)
            shutil.copy(manifest_path(bundle.path / ENGINE_FILE), manifest_path(output))

    monkeypatch.setattr(engine_check, "build_engine", build)
    monkeypatch.setattr(engine_check, "MANY", 12)
    monkeypatch.setattr(engine_check, "LOADS", 3)
    monkeypatch.setattr(engine_check, "checks", [])
    engine_check.run_case(tmp_path / name)
    engine_check.run_case(tmp_path / name.replace("float32", "merged"))
    assert len(engine_check.checks) > 12
    assert [check for check in engine_check.checks if not check["passed"]] == []


@pytest.mark.parametrize("version", ["10.0.1", "10.16.0"])
def test_the_checks_of_language_models_hold_over_the_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """As above, with a key-value cache: in place, and from one buffer into another."""
    monkeypatch.setattr(make_engine_cases, "DECODERS", ("llama",))
    monkeypatch.setattr(make_engine_cases, "FAMILIES", ())
    monkeypatch.setattr(make_engine_cases, "DTYPES", ("float32",))
    make_engine_cases.make(tmp_path)
    trt = fake_tensorrt.install(monkeypatch, version)
    monkeypatch.setattr(
        engine_check,
        "build_engine",
        lambda bundle, *, profile, **_: fake_tensorrt.write_engine(bundle.path, trt, profile=profile),
    )
    monkeypatch.setattr(engine_check, "checks", [])
    engine_check.run_decoder(tmp_path / "llama-cache-float32")
    assert len(engine_check.checks) >= 7
    assert [check for check in engine_check.checks if not check["passed"]] == []
