"""What fuzzing and a search by hand found, each case as it was found."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from make_adapters import golden, random_adapter
from safetensors.numpy import save_file
from targets import TARGETS
from tiny_bundle import make_adapter, write_bundle, write_tokenizer

from sdct_export import project
from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.folder import read_safetensors
from sdct_export.bundle.description import Bundle
from sdct_export.bundle.probe import Probe
from sdct_export.cli import main
from sdct_export.cli.output import message
from sdct_export.errors import AdapterFormatError, UnsupportedError
from sdct_export.runtime.request import encode_text


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", []), ("dtype", {}), ("id2label", 5), ("id2label", True), ("id2label", {"1": "x"})]
)
def test_a_training_record_of_odd_types(tmp_path: Path, field: str, value: object) -> None:
    record, probe = TARGETS["training"].seeds()[0]
    (tmp_path / "training_probe.safetensors").write_bytes(probe)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    golden().save(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trained_on": json.loads(record) | {field: value}}))
    (tmp_path / "a" / "training_probe.safetensors").write_bytes(probe)
    with pytest.raises(AdapterFormatError, match="id2label" if field == "id2label" else "dtype"):
        SdctAdapter.load(tmp_path / "a")


@pytest.mark.parametrize("change", ["index", "empty"])
def test_a_probe_whose_index_no_case_reads_or_whose_input_is_empty(tmp_path: Path, change: str) -> None:
    (tmp_path / "probe.safetensors").write_bytes(TARGETS["probe"].seeds()[0][0])
    tensors = read_safetensors(tmp_path / "probe.safetensors")
    Probe.read(tmp_path / "probe.safetensors")
    if change == "index":
        tensors["index.other"], tensors["shape.other"] = np.array([1 << 24]), np.array([2, 2])
    else:
        tensors["input.input_ids"] = np.zeros((2, 0), np.int64)
    save_file(tensors, tmp_path / "probe.safetensors")
    with pytest.raises(AdapterFormatError, match="does not fit its shape" if change == "index" else "is empty"):
        Probe.read(tmp_path / "probe.safetensors")


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("tokenizer.json", lambda raw: raw["model"].update(unk_token="[NONE]")),
        ("tokenizer_config.json", lambda raw: raw.update(pad_token="\ud800")),
    ],
)
def test_a_tokenizer_that_fails_only_when_it_is_used(tmp_path: Path, file: str, edit: Any) -> None:
    folder = write_bundle(tmp_path / "bundle")
    write_tokenizer(folder)
    encode_text(Bundle.load(folder), ["a zzz"])
    raw = json.loads((folder / file).read_text())
    edit(raw)
    (folder / file).write_text(json.dumps(raw))
    with pytest.raises(AdapterFormatError, match=r"tokenizer\.json cannot be read"):
        encode_text(Bundle.load(folder), ["a zzz"])


@pytest.mark.parametrize("part", ["\u00b2", "9" * 5000, "\u0663"])
def test_modules_whose_names_look_like_numbers_are_shown(tmp_path: Path, part: str) -> None:
    random_adapter({f"layer.{part}.q": (4, 4), "layer.10.q": (4, 4), "layer.2.q": (4, 4)}, 3).save(tmp_path / "a")
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "a")], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.index("layer.2.q\t") < done.output.index("layer.10.q\t")


def test_numbers_too_long_for_an_integer_are_a_usage_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["build", str(tmp_path), "--batch", "9" * 5000], catch_exceptions=False)
    assert done.exit_code == 2


def test_no_text_from_a_file_forges_a_line(tmp_path: Path) -> None:
    forged = "x\nparameters: 1\r\nbase_hash: \u202egood\u2028"
    adapter = golden()
    config = dataclasses.replace(
        adapter.config, base_model_name_or_path=forged, modules_to_save=["classifier", "a\nb"]
    )
    dataclasses.replace(adapter, config=config).save(tmp_path / "a")
    lines = CliRunner().invoke(main, ["inspect", str(tmp_path / "a")], catch_exceptions=False).output.split("\n")
    assert sum(line.startswith(("parameters:", "base_hash:")) for line in lines) == 2
    assert f"base_model_name_or_path: {forged.encode('unicode_escape').decode()}" in lines

    random_adapter({"q\nmodule\tforged": (4, 4)}, 3).save(tmp_path / "b")
    rows = CliRunner().invoke(main, ["inspect", str(tmp_path / "b")], catch_exceptions=False).output
    assert "q\\nmodule\\tforged\t4 x 4\t3" in rows


def test_errors_are_short_and_their_lines_indented(tmp_path: Path) -> None:
    assert message("a\nwrote out\x1b[2J") == "a\n  wrote out\\x1b[2J"
    golden().save(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shapes": {"q": ["x" * 1_000_000]}}))
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "a")], catch_exceptions=False)
    assert done.exit_code == 1
    assert "shape of module 'q' must be" in done.output
    assert len(done.output) < 5000


# --- LoRA adapters whose configuration would have PEFT import, fetch or allocate

STEM = "base_model.model.encoder.layer.0.attention.self.query"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    sizes = {"num_hidden_layers": 1, "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=31)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write_lora(folder: Path, **fields: object) -> Path:
    folder.mkdir()
    raw = {
        "peft_type": "LORA", "auto_mapping": {"base_model_class": "BertModel"}, "r": 2, "lora_alpha": 4,
        "target_modules": ["query"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(raw | fields))
    factors = {"A": np.ones((2, 12), np.float32), "B": np.ones((12, 2), np.float32)}
    tensors = {f"{STEM}.lora_{name}.weight": array for name, array in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_lora_cannot_name_a_module_to_import(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    lora = write_lora(tmp_path / "lora", megatron_config={"a": 1}, megatron_core="megatron.evil")
    with pytest.raises(UnsupportedError, match="megatron_config"):
        project(base, lora=lora)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["XLORA", "SHADOW", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "NEW"])
def test_kinds_that_name_other_models_or_a_tokenizer_never_reach_peft(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # an import of it would fail in another way
    lora = write_lora(tmp_path / "lora", peft_type=kind, shadow_model="a/b", tokenizer_kwargs={"trust_remote_code": 1})
    with pytest.raises(UnsupportedError, match=kind):
        project(base, lora=lora)


@pytest.mark.parametrize(
    "fields", [{"r": 10**9}, {"rank_pattern": {"query": 10**9}}, {"peft_type": "LOHA", "r": 10**9}]
)
def test_a_rank_that_no_factor_has_allocates_nothing(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    lora = write_lora(tmp_path / "lora", use_dora=True, **fields)
    with pytest.raises(AdapterFormatError, match="rank 1000000000"):
        project(base, lora=lora)


def test_factors_that_peft_would_make_up_are_missed(base: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", use_dora=True)  # without its magnitudes
    with pytest.raises(AdapterFormatError, match=r"incomplete.*missing adapter keys.*magnitude"):
        project(base, lora=lora)


def test_an_adapter_of_another_request_is_untouched_by_requests_that_fail(tmp_path: Path) -> None:
    from sdct_export.errors import SdctError
    from sdct_export.runtime import MultiAdapterModel

    model = MultiAdapterModel(write_bundle(tmp_path / "b", {"a": make_adapter(0, labels=3)}), device="cpu")
    good: dict[str, Any] = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}
    before = model.run(good, "a")
    odd: list[Any] = [
        {**good, "input_ids": [[10**30]]}, {**good, "input_ids": [["\ud800"]]}, {**good, "input_ids": [[1], [2, 3]]},
        {**good, "sdct.block.o.values": [[0.0]]}, {**good, "input_ids": [[99, 1]]}, {},
    ]  # fmt: skip
    for inputs in odd:
        with pytest.raises(SdctError):
            model.run(inputs, "a")
    after = model.run(good, "a")
    assert all((after[name] == before[name]).all() for name in before)


def test_an_adapter_cannot_name_a_class_to_import(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdct_export import export_merged
    from sdct_export.adapter.training import TrainingRecord
    from sdct_export.errors import ConfigError

    (tmp_path / "evil_model.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    adapter = random_adapter({"encoder.layer.0.attention.self.query": (12, 12)}, 3)
    dataclasses.replace(adapter, trained_on=TrainingRecord("evil_model:Model")).save(tmp_path / "a")
    with pytest.raises(ConfigError, match="class of your own"):
        export_merged(base, tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "out").exists()
