"""A base model that brings Python code of its own: it is never run, whatever stands on standard input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_adapters import golden
from transformers import BertConfig, BertModel

CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel
Path({marker!r}).write_text("ran")
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertModel):
    config_class = OwnConfig
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint whose `auto_map` names a file that leaves a marker when it is imported."""
    folder = tmp_path / "base"
    sizes = {"num_hidden_layers": 1, "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=31)).save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    return folder


def set_config(base: Path, **fields: object) -> None:
    file = base / "config.json"
    auto = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto} | fields))


def export(tmp_path: Path, base: Path, *options: str) -> subprocess.CompletedProcess[str]:
    golden().save(tmp_path / "adapter")
    files = ("--model", str(base), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"))
    return subprocess.run(
        [sys.executable, "-c", "from sdct_export.cli import main; main()", *options, *files],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub")},
    )


@pytest.mark.parametrize("options", [(), ("--merge", "--format", "transformers")])
def test_the_code_of_a_base_is_never_run(tmp_path: Path, base: Path, options: tuple[str, ...]) -> None:
    set_config(base, model_type="own")
    done = export(tmp_path, base, *options)
    assert not (tmp_path / "marker").exists()
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "custom code (auto_map in its config.json), which is never run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_class_that_transformers_has_itself_is_used_in_place_of_the_code(tmp_path: Path, base: Path) -> None:
    from sdct_export.base.checkpoint import Checkpoint, Structure
    from sdct_export.base.model import load_base

    set_config(base)
    assert type(load_base(base)) is BertModel
    assert type(load_base(base, "FEATURE_EXTRACTION")) is BertModel
    assert type(Structure(Checkpoint(base)).model) is BertModel
    assert not (tmp_path / "marker").exists()
