"""`sdct-export doctor`: it tells the truth about this machine, and survives whatever it finds."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
from click.testing import CliRunner

from sdct_export import doctor, native
from sdct_export.cli import main

PARTS = {
    "python", "sdct_export", "numpy", "torch", "onnx", "onnxruntime", "operator library", "CUDA driver", "tensorrt",
    "plugin library", "quantizer",
}  # fmt: skip


def test_reports_every_part_as_json_and_as_a_table() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = {finding["part"]: finding for finding in json.loads(result.output)}
    assert set(found) >= PARTS
    assert found["python"]["detail"].startswith(sys.version.split()[0])
    assert found["numpy"]["detail"] == np.__version__
    assert "CPU" in found["onnxruntime"]["detail"]
    assert all(f["state"] == "ok" or f["advice"] for f in found.values())
    table = CliRunner().invoke(main, ["doctor"])
    assert table.exit_code == 0
    assert len(table.output.splitlines()) == len(found) + 1


def test_a_package_that_is_missing_comes_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "tensorrt":
            raise metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(metadata, "version", version)
    found = {f.part: f for f in doctor.examine()}
    assert (found["tensorrt"].state, found["torch"].detail) == ("missing", "1.2.3")
    assert "pip install" in found["tensorrt"].advice


def test_every_extra_that_is_named_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    extras = metadata.metadata("sdct_export").get_all("Provides-Extra")
    named = set()
    for finding in doctor.examine():
        assert finding.state == "ok" or finding.advice
        named |= set(re.findall(r"'sdct_export\[(\w+)\]'", finding.advice))
    assert named == {"torch", "cpu", "gpu", "tensorrt"} <= set(extras or ())


def test_onnxruntime_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [SimpleNamespace(name="onnxruntime"), SimpleNamespace(name="onnxruntime-gpu")]
    monkeypatch.setattr(metadata, "distributions", lambda: both)
    found = next(f for f in doctor.examine() if f.part == "onnxruntime")
    assert found.state == "broken"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in found.detail


@pytest.mark.parametrize(
    ("direct_url", "source"),
    [
        (None, "sdct_export"),
        ("no json", "sdct_export"),
        ('["a list"]', "sdct_export"),
        ('{"url": "file:///nowhere/a.whl", "archive_info": {}}', "sdct_export"),
        ('{"url": "file://HERE", "dir_info": {}}', "'HERE'"),
        ('{"url": "file://HERE", "dir_info": {"editable": true}}', "-e 'HERE'"),
        ('{"url": "https://a.b/c", "vcs_info": {"vcs": "git", "commit_id": "12"}}', "git+https://a.b/c@12"),
    ],
)
def test_the_package_is_installed_again_from_where_it_came(
    direct_url: str | None, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "a b"
    here.mkdir()
    text = direct_url and direct_url.replace("HERE", quote(str(here)))
    monkeypatch.setattr(metadata, "distribution", lambda _: SimpleNamespace(read_text=lambda _: text))
    wanted = source.replace("HERE", str(here))
    assert native.reinstall() == f"pip install --force-reinstall --no-deps {wanted}"


def test_library_paths_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "libsdct_onnxruntime.txt"
    file.touch()
    for value, said in (
        (str(file), f"='{file}' names a file; name the folder"),
        (str(tmp_path), f"='{tmp_path}' leads to no operator library"),
        ("x" * 5000, f"='{'x' * 200}...' leads to no operator library"),
        ("", "='' leads to no operator library"),
    ):
        monkeypatch.setenv("SDCT_LIBRARY_PATH", value)
        found = {f.part: f for f in doctor.examine() if f.part.endswith("library")}
        assert {f.state for f in found.values()} == {"missing"}
        assert f"SDCT_LIBRARY_PATH{said}" in found["operator library"].advice


def test_libraries_that_do_not_load_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCT_LIBRARY_PATH", str(tmp_path))
    assert {f.state for f in doctor.examine() if f.part.endswith("library")} == {"missing"}
    for name in ("libsdct_onnxruntime.so", "libsdct_tensorrt.so"):
        (tmp_path / name).write_bytes(b"no library")
    broken = {f.part: f for f in doctor.examine() if f.part.endswith("library")}
    assert {f.state for f in broken.values()} == {"broken"}
    assert all(f.advice and f.detail for f in broken.values())
