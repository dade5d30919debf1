"""`sdct-export doctor`: it tells the truth about this machine, and survives whatever it finds."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sdct_export import doctor
from sdct_export.cli import main

PARTS = {
    "python", "sdct_export", "numpy", "torch", "onnx", "onnxruntime", "operator library", "CUDA driver", "tensorrt",
    "plugin library",
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


def test_libraries_that_do_not_load_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCT_LIBRARY_PATH", str(tmp_path))
    assert {f.state for f in doctor.examine() if f.part.endswith("library")} == {"missing"}
    for name in ("libsdct_onnxruntime.so", "libsdct_tensorrt.so"):
        (tmp_path / name).write_bytes(b"no library")
    broken = {f.part: f for f in doctor.examine() if f.part.endswith("library")}
    assert {f.state for f in broken.values()} == {"broken"}
    assert all(f.advice and f.detail for f in broken.values())
