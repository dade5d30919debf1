"""Which of the two runs, operator or portable body, and that the person is told where it is the slower one."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundle import make_adapter, make_inputs, write_bundle

from sdct_export import native
from sdct_export.cli import main
from sdct_export.doctor import examine
from sdct_export.runtime import MultiAdapterModel
from sdct_export.runtime import model as model_module

WARNING = "portable function in the ONNX file, which is right but slower: "


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("use") / "bundle", {"a": make_adapter(0)})


@pytest.fixture
def library() -> Path:
    path = native.operator_library()
    if path is None:
        pytest.skip("no operator library: there was no C++ compiler when the package was installed")
    return path


@pytest.fixture(autouse=True)
def _once_more() -> None:
    model_module._warn_of_the_portable_body.cache_clear()


def test_the_operator_is_used_in_silence_and_agrees_with_the_body(
    bundle: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = MultiAdapterModel(bundle)
    assert operator.native
    inputs = make_inputs(0, 3)
    got = operator.run(inputs, ["a", None, {"a": -0.5}])["logits"]
    assert not np.array_equal(got, operator.run(inputs)["logits"])
    monkeypatch.setenv(native.LIBRARY_PATH, "")
    with pytest.warns(UserWarning, match=WARNING):
        portable = MultiAdapterModel(bundle)
    assert not portable.native
    body = portable.run(inputs, ["a", None, {"a": -0.5}])["logits"]
    assert np.abs(got - body).max() < 1e-5


def test_the_portable_body_is_named_once(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.LIBRARY_PATH, str(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            MultiAdapterModel(bundle)
    assert [w.category for w in caught] == [UserWarning]
    assert caught[0].filename == __file__  # it points at the caller
    assert f"{native.LIBRARY_PATH}={str(tmp_path)!r} leads to no operator library" in str(caught[0].message)


def test_the_reason_depends_on_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.LIBRARY_PATH, raising=False)
    monkeypatch.setattr(native, "find_library", lambda stem: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    assert "there is one now" in native.why_no_operator()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C++ compiler to build it" in native.why_no_operator()
    monkeypatch.setattr(native, "find_library", lambda stem: tmp_path / "lib.so")
    assert "built without GPU kernels" in native.why_no_operator("cuda:1")
    assert "cannot be used" in native.why_no_operator()


def test_doctor_and_inspect_say_what_is_in_use(bundle: Path, library: Path) -> None:
    found = {finding.part: finding for finding in examine()}["operator library"]
    assert (found.state, found.detail.split(" on ")[0]) == ("ok", "in use")
    assert str(library) in found.detail
    assert f"CPU ({native.instruction_set(library)})" in found.detail
    assert native.instruction_set(library) in ("avx512", "avx2", "baseline")
    assert ("and CUDA" in found.detail) == native.has_cuda(library)
    described = json.loads(CliRunner().invoke(main, ["inspect", str(bundle), "--json"]).stdout)
    assert described["operator"] == {"native": True, "detail": f"the native operator, {library}"}


def test_doctor_inspect_and_run_say_what_is_missing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.LIBRARY_PATH, str(tmp_path))
    found = {finding.part: finding for finding in examine()}["operator library"]
    assert found.state == "missing"
    assert native.LIBRARY_PATH in found.advice
    described = json.loads(CliRunner().invoke(main, ["inspect", str(bundle), "--json"]).stdout)
    assert described["operator"]["native"] is False
    assert "the slower way" in described["operator"]["detail"]
    assert "adapters run through: the portable body" in CliRunner().invoke(main, ["inspect", str(bundle)]).stdout
    for name, array in make_inputs(0, 2).items():
        np.save(tmp_path / f"{name}.npy", array)
    inputs = [f"--input={name}={tmp_path / name}.npy" for name in make_inputs(0, 2)]
    ran = CliRunner().invoke(main, ["run", str(bundle), *inputs, "--adapter", "a", "--json"])
    assert ran.exit_code == 0
    assert ran.stderr.startswith("warning: adapters run through")
    assert ran.stderr.count("\n") == 1
    json.loads(ran.stdout)


def test_a_library_without_gpu_kernels_is_left_out_on_a_gpu(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda in (False, True):
        registered: list[str] = []
        options = SimpleNamespace(register_custom_ops_library=registered.append)
        monkeypatch.setattr(native, "has_cuda", lambda path, cuda=cuda: cuda)
        assert native.register_operator(options, "cuda") == cuda
        assert registered == [str(library)] * cuda
        assert native.register_operator(options, "cpu")
