"""The command line, from a base model and trained adapters to a verified, running bundle."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from decoders import DECODERS
from families import FAMILIES, random_adapter
from make_adapters import golden
from safetensors.numpy import load_file, save_file
from tiny_bundle import make_adapter, make_inputs, reference, write_bundle, write_tokenizer

from sdct_export import SdctAdapter, SdctConfig, get_sdct_model
from sdct_export.bundle import Bundle
from sdct_export.cli import main
from sdct_export.cli.output import Main, print_json, print_table, printable
from sdct_export.engine import prepare_graph
from sdct_export.errors import UnsupportedError
from sdct_export.runtime import MultiAdapterModel

COMMANDS = ("project", "distill", "combine", "inspect", "verify", "build", "run", "generate", "doctor")


def invoke(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)  # an error is a message, no traceback
    return result


def invoke_json(*args: object, code: int = 0) -> Any:
    return json.loads(invoke(*args, "--json", code=code).stdout)


def fails(*args: object) -> str:
    """The message of a command that ends with exit code 1."""
    result = invoke(*args, code=1)
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""
    return result.stderr


def misused(*args: object) -> str:
    return invoke(*args, code=2).stderr


# help and usage


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help_with_an_example(command: str) -> None:
    text = invoke(*filter(None, [command]), "--help").stdout
    assert "Example" in text
    assert f"  sdct-export {command or '--merge'}" in text
    if command:
        assert all(o.help for o in main.commands[command].params if isinstance(o, click.Option) and o.name != "help")
    else:
        assert all(name in text for name in COMMANDS)


def test_version_and_bare_call() -> None:
    assert "0.1.0" in invoke("--version").stdout
    assert "Usage:" in invoke(code=2).output


def test_export_options_are_checked_before_any_work(tmp_path: Path) -> None:
    out = ["--output", tmp_path / "out"]
    assert "missing option --model" in misused("--adapter", "a", *out)
    assert "missing option --adapter" in misused("--model", "m", *out)
    assert "missing option --output" in misused("--model", "m", "--adapter", "a")
    base = ["--model", "m", "--adapter", "a", *out]
    assert "--merge takes one --adapter" in misused("--merge", "--adapter", "b", *base)
    assert "needs --merge" in misused("--format", "transformers", *base)
    assert "--dtype is for ONNX" in misused("--merge", "--format", "transformers", "--dtype", "float16", *base)
    assert "--target is for ONNX" in misused("--merge", "--format", "transformers", "--target", "ort", *base)
    assert "is that of --target tensorrt" in misused("--format", "tensorrt", "--target", "ort", *base)
    assert "'coreml' is not one of" in misused("--target", "coreml", *base)
    assert "do not go before 'verify'" in misused("--model", "m", "verify", "bundle")
    assert "do not go before 'run'" in misused("--no-cache", "run", "bundle")
    assert "two adapters are called 'a'" in misused("--adapter", "x/a", *base)
    assert "names no folder" in misused("--adapter", "b=", *base)
    assert "'gguf' is not one of" in misused("--format", "gguf", *base)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a/b", "a.b", " a", "", ".."])
def test_adapter_names_that_are_not_allowed(tmp_path: Path, name: str) -> None:
    out = ["--model", "m", "--output", tmp_path / "out"]
    assert "is not allowed; use 1 to 128 letters" in fails(*out, "--adapter", f"{name}=folder")


def test_a_folder_whose_name_is_not_allowed_asks_for_one(tmp_path: Path) -> None:
    golden().save(tmp_path / "v1.0")
    message = fails("--model", "m", "--output", tmp_path / "out", "--adapter", tmp_path / "v1.0")
    assert f"choose a name with --adapter NAME={tmp_path / 'v1.0'}" in message


@pytest.mark.parametrize(
    ("package", "args"),
    [
        ("torch", ("project", "--model", "BUNDLE", "--lora", "x", "--output", "OUT")),
        ("onnx_ir", ("--model", "BUNDLE", "--adapter", "BUNDLE/adapters/a", "--output", "OUT")),
        ("transformers", ("--model", "BUNDLE", "--adapter", "BUNDLE/adapters/a", "--output", "OUT", "--merge")),
        ("onnxruntime", ("--model", "BUNDLE", "--adapter", "BUNDLE/adapters/a", "--output", "OUT")),
        ("onnxruntime", ("run", "BUNDLE", "--input", "input_ids=x.npy")),
    ],
)
def test_a_package_that_is_not_installed(package: str, args: tuple[str, ...], bundle: Path, tmp_path: Path) -> None:
    """In a process of its own, which cannot import it; `plugins/tests/check_wheel.sh` tries real installations."""
    code = f"import sys\nsys.modules[{package!r}] = None\nfrom sdct_export.__main__ import main\nmain()"
    filled = [a.replace("BUNDLE", str(bundle)).replace("OUT", str(tmp_path / "out")) for a in args]
    done = subprocess.run([sys.executable, "-c", code, *filled], capture_output=True, text=True, timeout=120)
    extra = (
        "'sdct_export[cpu]', or sdct_export[gpu] for an NVIDIA GPU"
        if package == "onnxruntime"
        else "'sdct_export[torch]'"
    )
    line = f"error: this needs {package}, which is not installed: pip install {extra}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there(
    bundle: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever looks like a path is said to be missing, and never asked of a hub."""
    import huggingface_hub

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("asked a hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    monkeypatch.chdir(tmp_path)
    for base in ("nowhere/", "./nowhere", "~/nowhere", "a/b/c"):
        for args in (
            ("--adapter", adapter, "--output", "out"),
            ("--adapter", adapter, "--output", "out", "--merge", "--format", "transformers"),
        ):
            line = fails("--model", base, *args)
            assert base.rstrip("/").removeprefix("./") in line
            assert "there is no" in line
    assert "from nowhere/: there is no such folder; check the path" in fails("verify", bundle, "--model", "nowhere/")
    assert "there is no folder nowhere" in fails("project", "--model", "nowhere", "--lora", adapter, "--output", "out")
    for command in (("run", "nowhere/", "--text", "a"), ("verify", "nowhere/"), ("build", "nowhere/")):
        assert fails(*command) == "error: there is no folder nowhere; give the folder of an exported bundle\n"


def test_warnings_of_libraries_to_each_other_are_not_shown() -> None:
    @click.group(cls=Main)
    def group() -> None:
        pass

    @group.command()
    def warn() -> None:
        warnings.warn("of another library", FutureWarning, stacklevel=1)
        warnings.warn("of another library", DeprecationWarning, stacklevel=1)
        warnings.warn("for the person", stacklevel=1)

    assert CliRunner().invoke(group, ["warn"]).stderr == "warning: for the person\n"


# inspect


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    golden().save(tmp_path / "golden")
    return tmp_path / "golden"


def test_inspect_adapter(adapter: Path) -> None:
    lines = invoke("inspect", adapter).stdout.splitlines()
    assert "target_modules: query, value" in lines
    assert "parameters: 41" in lines
    table = [line.split("\t") for line in lines if "\t" in line]
    row = table[1]
    assert row[:3] == ["encoder.layer.0.attention.self.query", "12 x 8", "5"]
    assert float(row[3]) == pytest.approx(0.25 * (9 + 4 + 1 + 0 + 1) / 64, rel=1e-3)
    assert sum(map(int, row[4].split(" / "))) == pytest.approx(100, abs=1)
    assert float(row[5]) == pytest.approx(3 / 16, rel=1e-3)
    assert ["classifier.weight", "2 x 12", "float32"] in table


def test_inspect_adapter_as_json_with_a_picture(adapter: Path, tmp_path: Path) -> None:
    described = invoke_json("inspect", adapter, "--plot", tmp_path / "picture.png")
    assert described["config"]["n_coefficients"] == 5
    assert [m["n"] for m in described["modules"]] == [5, 6, 4]
    assert described["modules"][2]["shape"] is None
    assert all(sum(m["band_shares"]) == pytest.approx(1) for m in described["modules"])
    assert described["saved"]["classifier.weight"] == {"shape": [2, 12], "dtype": "float32"}
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_names_that_are_no_text_or_mathematics_in_a_picture(adapter: Path, tmp_path: Path) -> None:
    made = SdctAdapter.load(adapter)
    modules = {f"{path}.$\\nonsense{{$": entries for path, entries in made.modules.items()}
    config = dataclasses.replace(made.config, target_modules=["$\\nonsense{$"])
    strange = dataclasses.replace(made, config=config, modules=modules, base_hash=None, base_dtype=None)
    for name in ("$\\nonsense{$", os.fsdecode(b"a\xff")):
        strange.save(tmp_path / name)
        invoke("inspect", tmp_path / name, "--plot", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_an_output_that_onnxruntime_could_not_open(adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / os.fsdecode(b"a\xff")
    line = fails("--model", tmp_path, "--adapter", adapter, "--output", output)
    assert "ONNX Runtime opens no path that is not valid Unicode; choose another output" in line


def test_inspect_says_what_is_wrong(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not a folder" in fails("inspect", tmp_path / "nothing")
    assert "File name too long" in fails("inspect", "x" * 5000)
    assert "must end in .png" in fails("inspect", adapter, "--plot", tmp_path / "x.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'sdct_export[plot]'" in fails("inspect", adapter, "--plot", tmp_path / "x.png")
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    assert "truncated or not a safetensors file" in fails("inspect", adapter)


def test_text_from_files_cannot_control_the_terminal(tmp_path: Path) -> None:
    golden().save(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    raw = json.loads(config.read_text()) | {"base_model_name_or_path": "x\x1b[2J\ud800[bold]"}
    config.write_text(json.dumps(raw))
    text = invoke("inspect", tmp_path / "a").stdout
    assert "x\\x1b[2J\\ud800[bold]" in text
    assert "\x1b" not in text
    assert printable("tab\tline\nü") == "tab\\tline\\nü"


def test_json_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.5, math.inf, (-math.inf, math.nan, None, "NaN", True)]})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None, [None, None, None, "NaN", True]]}


def test_a_closed_standard_output_is_no_crash(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    print_table(["a"], [("b",)])


# run, on a hand-made bundle with a known answer


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = write_bundle(tmp_path / "bundle", {"a": make_adapter(0, labels=3), "b": make_adapter(1)})
    write_tokenizer(folder)
    return folder


ADAPTERS = {"a": make_adapter(0, labels=3), "b": make_adapter(1)}


def test_run_arrays_with_one_adapter_per_row(bundle: Path, tmp_path: Path) -> None:
    inputs = make_inputs(5, 4)
    for name, array in inputs.items():
        np.save(tmp_path / f"{name}.npy", array)
    rows = ["a", "none", "a=0.5+b=-1.5", "b"]
    result = invoke_json(
        "run", bundle, *(f"--input={name}={tmp_path / name}.npy" for name in inputs),
        *(f"--adapter={row}" for row in rows), "--output", tmp_path / "out.npz",
    )  # fmt: skip
    want = reference(inputs, [{"a": 1.0}, {}, {"a": 0.5, "b": -1.5}, {"b": 1.0}], ADAPTERS)
    assert [row["adapter"] for row in result["rows"]] == rows
    assert [row["label"] for row in result["rows"]] == want["logits"].argmax(axis=1).tolist()
    visible = want["logits"] > -1e30  # an adapter with fewer labels leaves the rest far below
    for outputs in (result["outputs"], np.load(tmp_path / "out.npz")):
        assert np.allclose(outputs["hidden"], want["hidden"], atol=1e-4)
        assert np.allclose(np.asarray(outputs["logits"])[visible], want["logits"][visible], atol=1e-4)
    plain = reference(inputs, [{}] * 4, {})
    assert np.abs(want["hidden"] - plain["hidden"]).max() > 0.1


def test_an_input_is_given_once(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["run", str(bundle), "--input", "x=a.npy", "--input", "x=b.npy"])
    assert result.exit_code == 2
    assert "give --input once for each name" in result.stderr


def test_run_text(bundle: Path) -> None:
    lines = invoke("run", bundle, "--text", "a b", "--text", "g", "--adapter", "b").stdout.splitlines()
    assert lines[0].split("\t") == ["row", "adapter", "label", "probability"]
    ids = {"input_ids": np.array([[2, 4, 5, 3], [2, 10, 3, 0]]), "attention_mask": np.array([[1] * 4, [1, 1, 1, 0]])}
    logits = reference(ids, [{"b": 1.0}] * 2, ADAPTERS)["logits"]
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for i, line in enumerate(lines[1:]):
        row, name, label, probability = line.split("\t")
        assert (row, name, int(label)) == (str(i), "b", chance[i].argmax())
        assert float(probability) == pytest.approx(chance[i].max(), abs=2e-4)


def test_run_says_what_is_wrong(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "there.npz").write_text("mine")
    assert "give either --text or --input" in misused("run", bundle)
    assert "give either --text or --input" in misused("run", bundle, "--text", "a", "--input", "x=y.npy")
    assert "must be NAME=FILE.npy" in misused("run", bundle, "--input", "x.npy")
    for bad in ("a=b", "", "a+", "a+a", "=1"):
        assert "Invalid value for --adapter" in misused("run", bundle, "--text", "a", "--adapter", bad)
    assert "has no adapter 'c'; it has" in fails("run", bundle, "--text", "a", "--adapter", "c=0.5+a=0.5")
    assert "finite" in fails("run", bundle, "--text", "a", "--adapter", "a=nan")
    assert "2 entries for a batch of 3" in fails("run", bundle, *["--text=a"] * 3, *["--adapter=a"] * 2)
    assert "x.npy is missing" in fails("run", bundle, "--input", f"input_ids={tmp_path / 'x.npy'}")
    assert "exists already" in fails("run", bundle, "--text", "a", "--output", tmp_path / "there.npz")
    assert (tmp_path / "there.npz").read_text() == "mine"
    assert "is no bundle" in fails("run", tmp_path, "--text", "a")
    assert "device" in fails("run", bundle, "--text", "a", "--device", "abacus")


def test_a_base_without_a_head_of_its_own_has_no_label(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MultiAdapterModel.run

    def without_head(model: MultiAdapterModel, *args: Any) -> dict[str, Any]:
        outputs = run(model, *args)
        outputs["logits"][1] = 0  # what such a bundle gives for a base row
        return outputs

    monkeypatch.setattr(MultiAdapterModel, "run", without_head)
    args = ("run", bundle, "--text", "a", "--text", "a", "--adapter", "a", "--adapter", "none")
    lines = [line.split("\t") for line in invoke(*args).stdout.splitlines()]
    assert lines[1][1] == "a"
    assert lines[1][2].isdecimal()
    assert lines[2] == ["1", "none", "the base has no head of its own", "-"]
    rows = invoke_json(*args)["rows"]
    assert rows[1] == {"adapter": "none", "label": None, "name": None, "probability": None}
    assert isinstance(rows[0]["label"], int)


def test_run_never_imports_torch(bundle: Path) -> None:
    code = (
        "import sys\nfrom sdct_export.cli import main\n"
        "try: main(sys.argv[1:], prog_name='sdct-export')\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "assert 'onnxruntime' in sys.modules\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "run", str(bundle), "--text", "a b", "--adapter", "a", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["adapter"] == "a"


def test_a_failing_command_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from sdct_export.cli import main; main()", "inspect", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_inspect_bundle(bundle: Path, tmp_path: Path) -> None:
    described = invoke_json("inspect", bundle)
    assert described["kind"] == "multi"
    assert [group["name"] for group in described["groups"]] == ["block.q+v", "block.o"]
    assert {name: record["state"] for name, record in described["adapters"].items()} == {"a": "intact", "b": "intact"}
    (bundle / "adapters" / "b" / "adapter_config.json").write_text("{}")
    shutil.rmtree(bundle / "adapters" / "a")
    lines = [line.split("\t") for line in invoke("inspect", bundle).stdout.splitlines()]
    assert [line[:2] for line in lines if line[0] in ("a", "b")] == [["a", "missing"], ["b", "changed"]]
    assert "give its folder" in misused("inspect", bundle, "--plot", tmp_path / "x.png")
    (bundle / "sdct_bundle.json").write_text("[]")
    assert "must hold a JSON object" in fails("inspect", bundle)


# end to end, with a real export


@pytest.fixture(scope="module")
def project_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and the adapters `legal` and `med` with heads."""
    folder = tmp_path_factory.mktemp("project")
    family = FAMILIES["bert-classifier"]
    family.model().save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for seed, name in enumerate(("legal", "med")):
        torch.manual_seed(seed)
        config = SdctConfig(
            target_modules=family.targets, n_coefficients=40 + seed, modules_to_save=family.saved, task_type="SEQ_CLS"
        )
        model = get_sdct_model(family.model(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        model.save_adapter(folder / name)
    return folder


@pytest.fixture(scope="module")
def exported(project_folder: Path) -> Path:
    out = project_folder / "exported"
    result = invoke_json(
        "--model", project_folder / "base", "--adapter", project_folder / "legal",
        "--adapter", f"medical={project_folder / 'med'}", "--output", out,
    )  # fmt: skip
    assert result["kind"] == "multi"
    assert result["adapters"] == ["legal", "medical"]
    assert result["bytes"] == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return out


def test_export_verifies(exported: Path, project_folder: Path) -> None:
    report = invoke_json("verify", exported, "--model", project_folder / "base")
    assert report["ok"]
    assert all(check["ok"] for check in report["checks"])
    assert {"recorded mixed", "recorded blend", "base rows", "torch legal"} <= {c["name"] for c in report["checks"]}
    lines = invoke("verify", exported).stdout.splitlines()
    assert lines[0].split("\t")[:2] == ["check", "result"]
    assert all(line.split("\t")[1] == "ok" for line in lines[1:])


def test_verify_fails_when_one_coefficient_changes(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    weights = copy / "adapters" / "medical" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(n for n in tensors if n.endswith(".sdct_values"))
    values = tensors[name].copy()
    values[0] += np.float32(1e-3)
    save_file(tensors | {name: values}, weights)
    report = invoke_json("verify", copy, code=1)
    assert not report["ok"]
    assert [check["name"] for check in report["checks"] if not check["ok"]] == ["files of adapter medical"]
    result = invoke("verify", copy, code=1)
    assert "FAILED" in result.stdout
    assert result.stderr.startswith("error: ")


def test_exported_bundle_runs_from_text(exported: Path) -> None:
    args = ("--text", "a b c", "--text", "a b c", "--text", "a b c", "--text", "g")
    rows = ("--adapter=legal", "--adapter=none", "--adapter=legal=0.5+medical=0.5", "--adapter=medical")
    result = invoke_json("run", exported, *args, *rows)
    logits = np.array(result["outputs"]["logits"])
    assert logits.shape == (4, 4)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
    alone = invoke_json("run", exported, "--text", "a b c", "--adapter", "legal")
    assert np.allclose(alone["outputs"]["logits"][0], logits[0], atol=1e-5)


def test_merged_exports_agree_with_the_bundle(exported: Path, project_folder: Path, tmp_path: Path) -> None:
    base, legal = project_folder / "base", project_folder / "legal"
    result = invoke_json("--merge", "--model", base, "--adapter", legal, "--output", tmp_path / "onnx")
    assert (result["kind"], result["adapters"]) == ("merged", [])
    assert invoke_json("verify", tmp_path / "onnx")["ok"]
    merged = invoke_json("run", tmp_path / "onnx", "--text", "a b c")
    multi = invoke_json("run", exported, "--text", "a b c", "--adapter", "legal")
    plain = invoke_json("run", exported, "--text", "a b c")
    assert merged["rows"][0]["adapter"] == "merged"
    assert np.allclose(merged["outputs"]["logits"], multi["outputs"]["logits"], atol=1e-4)
    assert not np.allclose(merged["outputs"]["logits"], plain["outputs"]["logits"], atol=1e-2)
    assert "is merged: its adapter is part of the weights, so leave --adapter out" in fails(
        "run", tmp_path / "onnx", "--text", "a", "--adapter", "legal"
    )

    from transformers import BertForSequenceClassification

    args = ("--merge", "--format", "transformers", "--model", base, "--adapter", legal)
    text = invoke(*args, "--output", tmp_path / "checkpoint").stdout
    assert text.startswith(f"wrote {tmp_path / 'checkpoint'} (")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint").eval()
    with torch.no_grad():
        logits = model(torch.tensor([[2, 4, 5, 6, 3]])).logits
    assert np.allclose(logits.numpy(), multi["outputs"]["logits"], atol=1e-4)


def test_export_refuses_what_does_not_fit(project_folder: Path, tmp_path: Path) -> None:
    base, legal = project_folder / "base", project_folder / "legal"
    (tmp_path / "there").mkdir()
    assert "exists already" in fails("--model", base, "--adapter", legal, "--output", tmp_path / "there")
    golden().save(tmp_path / "foreign")
    message = fails("--model", base, "--adapter", tmp_path / "foreign", "--output", tmp_path / "out")
    assert "module" in message
    assert "cannot load a base model" in fails("--model", legal, "--adapter", legal, "--output", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "there"]


def test_project_a_merged_checkpoint_gives_the_adapter_back(project_folder: Path, tmp_path: Path) -> None:
    base, legal = project_folder / "base", project_folder / "legal"
    invoke("--merge", "--format", "transformers", "--model", base, "--adapter", legal, "--output", tmp_path / "tuned")
    options = ("--tuned", tmp_path / "tuned", "--save", "classifier", "--output", tmp_path / "again")
    result = invoke_json("project", "--model", base, "--n", 40, *options)
    assert result["output"] == str(tmp_path / "again")
    assert result["retained_energy"] > 0.999
    again, first = SdctAdapter.load(tmp_path / "again"), SdctAdapter.load(legal)
    module = next(iter(first.modules))
    want = first.delta_weight(module)
    assert torch.allclose(again.delta_weight(module), want, atol=1e-3 * float(want.abs().max()))
    assert np.array_equal(again.saved["classifier.weight"], first.saved["classifier.weight"])
    assert result["enough"] is True
    few = invoke("project", "--model", base, "--n", 4, *options[:-1], tmp_path / "few")
    worst = re.search(r"energy kept (\S+) \(least: (\S+), (\S+)\)", few.stdout)
    assert worst is not None
    assert few.stderr.startswith(f"warning: the adapter keeps {worst[1]} of the energy of the change, {worst[3]} in ")
    assert "raise n_coefficients (--n)" in few.stderr  # a tuned checkpoint cannot be distilled
    assert "exists already" in fails("project", "--model", base, *options)
    for wrong in ([], ["--lora", legal, "--tuned", base]):
        assert "either --lora or --tuned" in misused("project", "--model", base, *wrong, "--output", tmp_path / "x")


def test_an_engine_without_tensorrt_is_refused_before_any_work(
    project_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("sdct_export.export.export_multi", lambda *_, **__: pytest.fail("worked for nothing"))
    message = fails("--model", project_folder, "--adapter", project_folder, "--output", tmp_path / "out", "--format",
                    "tensorrt")  # fmt: skip
    assert "needs the package tensorrt" in message
    assert list(tmp_path.iterdir()) == []


def test_a_language_model_gets_a_cache_unless_told_otherwise(tmp_path: Path) -> None:
    family = DECODERS["llama"]
    model = family.model()
    model.save_pretrained(tmp_path / "base")
    random_adapter(family, model, 1).save(tmp_path / "a")
    args = ["--model", tmp_path / "base", "--adapter", tmp_path / "a", "--output"]
    assert invoke_json(*args, tmp_path / "cached")["cache"] == "ort"
    assert "cache: 2 layers, 2 heads of 8 in float32, target ort" in invoke("inspect", tmp_path / "cached").stdout
    described = invoke_json("inspect", tmp_path / "cached")["cache"]
    assert described == json.loads((tmp_path / "cached" / "sdct_bundle.json").read_text())["cache"]
    assert invoke_json(*args, tmp_path / "plain", "--no-cache")["cache"] is None
    assert "cache:" not in invoke("inspect", tmp_path / "plain").stdout
    assert invoke_json(*args, tmp_path / "engine", "--target", "tensorrt")["cache"] == "tensorrt"
    assert "is about the cache" in fails(*args, tmp_path / "out", "--target", "standard", "--no-cache")
    with pytest.raises(UnsupportedError, match=r"cache for target 'ort'; export it .* --target tensorrt"):
        prepare_graph(Bundle.load(tmp_path / "cached"))
    assert not (tmp_path / "out").exists()
    np.save(tmp_path / "ids.npy", np.arange(3, 11).reshape(2, 4))
    np.save(tmp_path / "mask.npy", np.array([[1, 1, 1, 1], [0, 0, 1, 1]]))
    files = [f"--input=input_ids={tmp_path / 'ids.npy'}", f"--input=attention_mask={tmp_path / 'mask.npy'}"]
    one, other = (
        np.array(invoke_json("run", tmp_path / name, *files, "--adapter", "a")["outputs"]["logits"])
        for name in ("cached", "plain")
    )
    np.testing.assert_allclose(one[0], other[0], atol=1e-4)
