"""Distillation of LoRAs that PEFT made, each against PEFT's own outputs; exports of the result; bad inputs."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from families import with_fresh_head
from safetensors.torch import load_file, save_file
from tiny_bundle import WORDS, write_tokenizer

from sdct_export import SdctAdapter, SdctModel, distill, export_multi, project
from sdct_export.base.model import load_base
from sdct_export.cli import main
from sdct_export.errors import AdapterFormatError, BaseMismatchError, ConfigError, SdctError, UnsupportedError
from sdct_export.verify import verify

N = 60
SETTINGS: dict[str, Any] = {"n_coefficients": N, "progress": False}
IDS = {"vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
pytestmark = [
    pytest.mark.filterwarnings("ignore:the adapter keeps"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def sentences(count: int = 160, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = [word for word in WORDS if word.isalpha()]
    return [" ".join(rng.choice(words, size=rng.integers(3, 9))) + f" {words[i % 3]}" * (i % 4) for i in range(count)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "base"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=36, intermediate_size=44, num_attention_heads=2, **IDS
    )
    spread(transformers.BertModel(config)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=36, n_head=2, n_positions=64, **IDS)
    spread(transformers.GPT2LMHeadModel(config)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def spread(model: Any) -> Any:
    """Weights so large that what layers do shows in the outputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def make_lora(base: Path, task: str, out: Path, labels: int = 5, **settings: Any) -> Path:
    """A LoRA with random weights, and a random head for tasks with labels."""
    head = task.endswith("_CLS")
    model = with_fresh_head(base, task, labels, torch.float32) if head else load_base(base, task, dtype=torch.float32)
    torch.manual_seed(7)
    defaults = {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": task}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**defaults | settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.35 * torch.randn_like(parameter))
                assert "original_module" not in name
    tuned.save_pretrained(out)
    return out


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SEQ_CLS": ("bert", "SEQ_CLS", {"modules_to_save": ["classifier", "pooler"]}),
    "TOKEN_CLS": ("bert", "TOKEN_CLS", {}),
    "FEATURE_EXTRACTION": ("bert", "FEATURE_EXTRACTION", {}),
    "CAUSAL_LM": ("gpt2", "CAUSAL_LM", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "dora": ("bert", "TOKEN_CLS", {"use_dora": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_comes_much_nearer_to_the_lora_model_than_a_projection(
    kind: str, bert: Path, gpt2: Path, tmp_path: Path
) -> None:
    base_name, task, settings = KINDS[kind]
    base = {"bert": bert, "gpt2": gpt2}[base_name]
    lora = make_lora(base, task, tmp_path / "lora", **settings)
    count, epochs = (60, 4) if task == "CAUSAL_LM" else (160, 8)
    adapter, report = distill(base, lora, sentences(count), epochs=epochs, **SETTINGS)
    assert report.better
    assert report.distilled.error < report.start.error <= report.projected.error
    assert report.distilled.error < 0.6 * report.projected.error
    assert all(entries.n == N for entries in adapter.modules.values())
    assert adapter.trained_on is not None
    assert adapter.trained_on.probe is not None

    # on texts that neither saw, PEFT's outputs against those of the files, in torch
    texts = sentences(40, seed=5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    fresh = functools.partial(load, base, task, adapter)
    teacher = peft.PeftModel.from_pretrained(fresh(), str(lora)).eval()
    projected, _ = project(base, lora=lora, n_coefficients=N)
    adapter.save(tmp_path / "adapter")
    far = distance(teacher, SdctModel.from_adapter(fresh(), projected), rows)
    near = distance(teacher, SdctModel.from_adapter(fresh(), tmp_path / "adapter"), rows)
    assert near < 0.7 * far
    if kind == "SEQ_CLS":  # with a record like any other adapter's, so the same for all
        export_multi(base, {"distilled": tmp_path / "adapter"}, tmp_path / "bundle")
        assert verify(tmp_path / "bundle", base).ok


def load(base: Path, task: str, adapter: SdctAdapter) -> torch.nn.Module:
    labels = len(adapter.saved["classifier.bias"]) if "classifier.bias" in adapter.saved else None
    return load_base(base, task, dtype=torch.float32, num_labels=labels, saved=set(adapter.saved))


def distance(teacher: Any, student: Any, rows: list[list[int]]) -> float:
    """Mean KL divergence per row of logits, or mean squared error of hidden states; one text at a time."""
    total = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            want, got = (dict(model(input_ids=ids)) for model in (teacher, student))
            if "logits" in want:
                p, q = want["logits"].double().softmax(-1), got["logits"].double().log_softmax(-1)
                total.append(float((p * (p.log() - q)).sum(-1).mean()))
            else:
                total.append(float((want["last_hidden_state"] - got["last_hidden_state"]).square().mean()))
    return float(np.mean(total))


def test_the_held_back_figures_are_those_of_peft_and_the_result_is_reproducible(bert: Path, tmp_path: Path) -> None:
    lora = make_lora(bert, "TOKEN_CLS", tmp_path / "lora")
    texts = sentences()
    first, report = distill(bert, lora, texts, epochs=2, **SETTINGS)
    again, same = distill(bert, lora, texts, epochs=2, **SETTINGS)
    assert report == same
    for path, entries in first.modules.items():
        assert np.array_equal(entries.values, again.modules[path].values)
        assert np.array_equal(entries.indices, again.modules[path].indices)
    assert not np.array_equal(
        distill(bert, lora, texts, epochs=2, seed=1, **SETTINGS).adapter.saved["classifier.weight"],
        first.saved["classifier.weight"],
    )
    # the held back texts, as documented: the first of a seeded order
    kept = list(dict.fromkeys(texts))
    held = [kept[i] for i in np.random.default_rng(0).permutation(len(kept))[: report.held_back]]
    assert report.held_back == round(len(kept) / 10)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    rows = [tokenizer(text)["input_ids"] for text in held]
    teacher = peft.PeftModel.from_pretrained(load(bert, "TOKEN_CLS", first), str(lora)).eval()
    student = SdctModel.from_adapter(load(bert, "TOKEN_CLS", first), first)
    total = agree = tokens = 0.0
    with torch.no_grad():
        for row in rows:
            want, got = (m(input_ids=torch.tensor([row])).logits.double() for m in (teacher, student))
            p = want.softmax(-1)
            total += float((p * (p.log() - got.log_softmax(-1))).sum())
            agree += int((want.argmax(-1) == got.argmax(-1)).sum())
            tokens += len(row)
    assert report.distilled.error == pytest.approx(total / tokens, rel=1e-3)
    assert report.distilled.agreement == pytest.approx(agree / tokens)
    assert report.measure == "KL divergence"


def test_training_that_does_not_help_is_undone_and_said(bert: Path, tmp_path: Path) -> None:
    lora = make_lora(bert, "TOKEN_CLS", tmp_path / "lora")
    with pytest.warns(UserWarning, match="no nearer"):
        adapter, report = distill(bert, lora, sentences(), epochs=1, learning_rate=50.0, **SETTINGS)
    assert report.distilled == report.start
    assert all(np.abs(entries.values).max() < 10 for entries in adapter.modules.values())


def test_texts_are_read_from_a_file_and_the_command_reports(bert: Path, tmp_path: Path) -> None:
    lora = make_lora(bert, "TOKEN_CLS", tmp_path / "lora")
    (tmp_path / "texts.txt").write_bytes(("\ufeff" + "\r\n\n".join(sentences())).encode())
    options = ["--model", bert, "--lora", lora, "--texts", tmp_path / "texts.txt", "--n-coefficients", N]
    report = json.loads(run(*options, "--output", tmp_path / "a", "--json").stdout)
    _, want = distill(bert, lora, sentences(), **SETTINGS)
    assert report["distilled"]["error"] == want.distilled.error
    assert report["projected"]["agreement"] == want.projected.agreement
    assert SdctAdapter.load(tmp_path / "a").config.task_type == "TOKEN_CLS"
    text = run(*options, "--output", tmp_path / "b", "--epochs", 1).stdout
    assert text.startswith("projected: KL divergence ")
    assert f"{want.held_back} texts held back: KL divergence " in text
    assert "exists already" in run(*options, "--output", tmp_path / "a", code=1).stderr


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(main, ["distill", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def lora(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(bert, "TOKEN_CLS", tmp_path_factory.mktemp("lora") / "lora")


TEXTS: dict[str, tuple[Any, str]] = {
    "none": ([], "0 different texts"),
    "one": (["the cat"], "1 different texts"),
    "one many times": (["the cat", " the cat "] * 50, "1 different texts"),
    "no strings": ([1] * 50, "must be a list of strings"),
    "no file": (Path("missing.txt"), "missing.txt is missing"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_cannot_work(case: str, bert: Path, lora: Path) -> None:
    texts, message = TEXTS[case]
    with pytest.raises(ConfigError, match=message):
        distill(bert, lora, texts, **SETTINGS)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\x80abc\n" * 50, "is not UTF-8 text"), (b"ab\0\n" * 50, "is a binary file"), (b"\n \n", "0 different texts")],
)
def test_files_that_hold_no_texts(data: bytes, message: str, bert: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(data)
    options = ["--model", bert, "--lora", lora, "--texts", tmp_path / "texts", "--output", tmp_path / "out"]
    result = run(*options, code=1)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "setting", [{"n_coefficients": 0}, {"epochs": 0}, {"max_tokens": 0}, {"learning_rate": 0.0}, {"epochs": True}]
)
def test_settings_that_cannot_work(setting: dict[str, Any], bert: Path, lora: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        distill(bert, lora, sentences(), **SETTINGS | setting)


def test_what_does_not_belong_together(bert: Path, gpt2: Path, lora: Path, tmp_path: Path) -> None:
    def refused(kind: type[SdctError], message: str, base: Path, adapter: Path, **settings: Any) -> None:
        with pytest.raises(kind, match=message):
            distill(base, adapter, sentences(), **SETTINGS | settings)

    refused(BaseMismatchError, "GPT2ForTokenClassification", gpt2, lora)
    refused(AdapterFormatError, "no PEFT adapter", bert, bert)
    refused(UnsupportedError, "the task asked for is IMAGE_CLS", bert, lora, task_type="IMAGE_CLS")
    prompt = tmp_path / "prompt"
    peft.get_peft_model(
        load_base(gpt2, "CAUSAL_LM"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).save_pretrained(prompt)
    refused(UnsupportedError, "changes no weights", gpt2, prompt)
    damaged = tmp_path / "damaged"
    shutil.copytree(lora, damaged)
    tensors = load_file(damaged / "adapter_model.safetensors")
    broken = {name: tensor * float("nan") if ".lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(broken, damaged / "adapter_model.safetensors")
    refused(BaseMismatchError, "NaN or infinite", bert, damaged)
    bare = tmp_path / "bare"
    shutil.copytree(bert, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused(BaseMismatchError, "has no tokenizer that works", bare, lora)


def test_without_peft(bert: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'sdct_export\[peft\]'"):
        distill(bert, lora, sentences(), **SETTINGS)
