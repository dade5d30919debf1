"""Projection: against dense numpy on the weights that PEFT merges; the report's figures; damaged inputs."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import scipy.fft
import torch
import transformers
from families import with_fresh_head
from references import relative_error
from safetensors.torch import load_file, save_file

from sdct_export import SdctAdapter, merge, merge_checkpoint, project
from sdct_export.base.model import find_linear, linear_weight, load_base
from sdct_export.errors import AdapterFormatError, BaseMismatchError, ConfigError, SdctError, UnsupportedError

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 2}
Tensors = dict[str, torch.Tensor]
IDS = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
warnings.filterwarnings("ignore", module="peft")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "base"
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES, **IDS))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=36, n_head=2, n_positions=16, **IDS)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def load(folder: Path, task: str, labels: int | None = None) -> torch.nn.Module:
    if task.endswith("_CLS"):
        return with_fresh_head(folder, task, labels or 2, torch.float32)
    return load_base(folder, task, dtype=torch.float32)


def tune(
    base: Path, task: str, config: peft.PeftConfig, out: Path, *, labels: int | None = None
) -> tuple[Path, torch.nn.Module, dict[str, Any]]:
    """A PEFT adapter with random weights: its folder, the model merged by PEFT, and each linear weight's change."""
    before = load(base, task, labels)
    torch.manual_seed(7)
    model = peft.get_peft_model(load(base, task, labels), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                assert "original_module" not in name
    model.save_pretrained(out)
    merged = model.merge_and_unload()
    changes = {}
    for path, module in before.named_modules():
        try:
            old, new = linear_weight(find_linear(before, path)), linear_weight(find_linear(merged, path))
        except SdctError:
            continue
        delta = new.detach().double().numpy() - old.detach().double().numpy()
        if np.abs(delta).max() > 0:
            changes[path] = delta
        assert module is not None
    return out, merged, changes


LORA: dict[str, Callable[[], peft.PeftConfig]] = {
    "plain": lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query", "value"], task_type="SEQ_CLS"),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=5, use_rslora=True, target_modules="all-linear", task_type="SEQ_CLS"
    ),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=8,
        rank_pattern={"layer.1.attention.self.query": 2},
        alpha_pattern={"layer.0.attention.self.(query|key)": 3, "value": 5},
        target_modules=r".*self\.(query|key|value)",
        task_type="SEQ_CLS",
    ),
    "no task": lambda: peft.LoraConfig(r=3, target_modules=["intermediate.dense"], modules_to_save=["classifier"]),
    "dora": lambda: peft.LoraConfig(r=3, use_dora=True, target_modules=["query"], task_type="SEQ_CLS"),
    "pissa": lambda: peft.LoraConfig(
        r=3, init_lora_weights="pissa", target_modules=["query", "value"], task_type="SEQ_CLS"
    ),
    "loha": lambda: peft.LoHaConfig(
        r=3, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"]
    ),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=["value"], task_type="SEQ_CLS"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["query", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"
    ),
}


@pytest.mark.parametrize("kind", LORA)
def test_all_coefficients_reproduce_the_merge_of_peft(
    kind: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdct_export.weights.changes.BAND", 100)  # many bands in each of these small matrices
    monkeypatch.setattr("sdct_export.weights.changes.COLUMNS", 5)
    folder, merged, changes = tune(bert, "SEQ_CLS", LORA[kind](), tmp_path / "peft", labels=3)
    adapter, report = project(bert, lora=folder, n_coefficients=44 * 36)
    assert set(adapter.modules) == set(changes) - {"classifier"}
    assert adapter.config.task_type == "SEQ_CLS"
    assert adapter.config.scaling == 1.0
    for path, entries in adapter.modules.items():
        assert entries.n == changes[path].size
        # PEFT merges in float32: its own rounding of W + dW is what remains
        assert relative_error(adapter.delta_weight(path).numpy(), changes[path]) < 2e-5
        assert report.modules[path].retained_energy == pytest.approx(1, abs=1e-6)
        assert report.modules[path].relative_error < 1e-3
    assert set(adapter.saved) == {"classifier.weight", "classifier.bias"}
    assert np.array_equal(adapter.saved["classifier.weight"], merged.classifier.weight.detach().numpy())

    adapter.save(tmp_path / "sdct")  # and it is an adapter like any other
    model = load(bert, "SEQ_CLS", 3)
    ids = torch.arange(12).reshape(2, 6)
    untouched = model(ids).logits
    with merge(model, SdctAdapter.load(tmp_path / "sdct")):
        got = model(ids).logits
    if kind == "ia3":  # which scales biases too
        assert any(name.endswith("query.bias") for name in report.ignored)
    else:
        assert report.ignored == ()
        torch.testing.assert_close(got, merged.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, untouched, atol=1e-3)


def test_trained_biases_are_reported(bert: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["query"], bias="lora_only", task_type="SEQ_CLS")
    folder, _, _ = tune(bert, "SEQ_CLS", config, tmp_path / "peft")
    _, report = project(bert, lora=folder)
    assert report.ignored == tuple(f"bert.encoder.layer.{i}.attention.self.query.bias" for i in range(2))


def test_conv1d_and_other_layouts(gpt2: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    folder, merged, changes = tune(gpt2, "CAUSAL_LM", config, tmp_path / "peft")
    adapter, _ = project(gpt2, lora=folder, n_coefficients=10**6)
    assert adapter.modules["transformer.h.0.attn.c_attn"].shape == (108, 36)
    for path in adapter.modules:
        assert relative_error(adapter.delta_weight(path).numpy(), changes[path]) < 2e-5
    merge_checkpoint(gpt2, adapter, tmp_path / "out")
    got = load(tmp_path / "out", "CAUSAL_LM").state_dict()
    for name, want in merged.state_dict().items():
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_coefficients_and_the_report(dtype: str, bert: Path, tmp_path: Path) -> None:
    folder, _, changes = tune(bert, "SEQ_CLS", LORA["plain"](), tmp_path / "peft")
    adapter, report = project(bert, lora=folder, n_coefficients=50, dtype=dtype)
    kept_energy = energy = error = 0.0
    for path, delta in changes.items():
        if path == "classifier":
            continue
        entries = adapter.modules[path]
        spectrum = scipy.fft.dctn(delta, norm="ortho")
        order = np.sort(np.argsort(-np.abs(spectrum), axis=None)[:50])
        assert np.array_equal(entries.indices, np.stack(np.unravel_index(order, delta.shape), 1))
        tolerance = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
        want = spectrum.ravel()[order]
        np.testing.assert_allclose(entries.values.astype(float), want, rtol=tolerance)
        assert entries.values.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
        figures = report.modules[path]
        assert figures.n == 50
        assert figures.retained_energy == pytest.approx(np.sum(want**2) / np.sum(delta**2), rel=1e-5)
        assert 0.1 < figures.retained_energy < 0.9
        off = np.linalg.norm(delta - adapter.delta_weight(path).numpy())
        assert figures.relative_error == pytest.approx(off / np.linalg.norm(delta), rel=1e-5)
        kept_energy, energy, error = kept_energy + np.sum(want**2), energy + np.sum(delta**2), error + off**2
    assert report.retained_energy == pytest.approx(kept_energy / energy, rel=1e-5)
    assert report.relative_error == pytest.approx(np.sqrt(error / energy), rel=1e-5)


@pytest.mark.parametrize("n", [1296, 40])
def test_a_projection_that_keeps_little_says_so(n: int, bert: Path, tmp_path: Path) -> None:
    folder, _, _ = tune(bert, "SEQ_CLS", LORA["plain"](), tmp_path / "peft")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _, report = project(bert, lora=folder, n_coefficients=n)
    said = [str(w.message) for w in seen if "energy of the change" in str(w.message)]
    assert report.worst == min(report.modules, key=lambda path: report.modules[path].retained_energy)
    assert report.enough == (n == 1296) == (not said)
    for message in said:
        assert f"{report.retained_energy:.1%} of the energy" in message
        assert f"{report.modules[report.worst].retained_energy:.1%} in {report.worst!r}" in message
        assert "sdct-export distill" in message


def test_a_total_budget_keeps_the_largest_of_all(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdct_export.weights.projection.SEARCHED", 100)  # many bands in each of these small matrices
    folder, _, changes = tune(bert, "SEQ_CLS", LORA["rslora"](), tmp_path / "peft")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    faint = "bert.encoder.layer.0.attention.self.key"
    save_file(tensors | {(k := f"base_model.model.{faint}.lora_B.weight"): tensors[k] * 1e-4}, file)
    changes[faint] = changes[faint] * 1e-4
    adapter, report = project(bert, lora=folder, total=600)
    spectra = {p: scipy.fft.dctn(d, norm="ortho") for p, d in changes.items() if p in adapter.modules}
    assert sum(e.n for e in adapter.modules.values()) == 600
    assert adapter.modules[faint].n == 1  # at least one, its largest
    assert adapter.config.n_coefficients == max(e.n for e in adapter.modules.values())
    row, col = adapter.modules[faint].indices[0]
    assert abs(spectra[faint][row, col]) == np.abs(spectra[faint]).max()
    others = np.concatenate([np.abs(s).ravel() for p, s in spectra.items() if p != faint])
    threshold = np.sort(others)[-599]
    for path, entries in adapter.modules.items():
        if path != faint:
            want = np.argwhere(np.abs(spectra[path]) >= threshold * (1 - 1e-9))
            assert abs(len(want) - entries.n) <= 1
            assert np.abs(entries.values).min() >= threshold * (1 - 1e-4)
    _, equal = project(bert, lora=folder, n_coefficients=600 // len(adapter.modules))
    assert report.retained_energy > equal.retained_energy
    with pytest.raises(ConfigError, match="raise it"):
        project(bert, lora=folder, total=3)


def test_one_band_retains_more_than_three_and_chosen_by_base_or_chance_less(bert: Path, tmp_path: Path) -> None:
    folder, _, _ = tune(bert, "SEQ_CLS", LORA["plain"](), tmp_path / "peft")
    energy = {
        (selection, bands): project(bert, lora=folder, n_coefficients=100, selection=selection, bands=bands)
        for selection, bands in [("top", 1), ("top", 3), ("energy", 3), ("random", 1), ("low", 1)]
    }
    kept = {key: result.report.retained_energy for key, result in energy.items()}
    assert kept["top", 1] > kept["top", 3] > max(kept["energy", 3], kept["random", 1], kept["low", 1])
    base = load(bert, "SEQ_CLS")
    adapter = energy["energy", 3].adapter
    for path, entries in adapter.modules.items():  # values are those of the change, whatever chose the places
        spectrum = scipy.fft.dctn(linear_weight(find_linear(base, path)).detach().numpy(), norm="ortho")
        chosen = np.abs(spectrum[entries.indices[:, 0], entries.indices[:, 1]])
        assert (chosen > np.quantile(np.abs(spectrum), 0.9)).sum() > 40
    assert adapter.config.selection == "energy"
    low = energy["low", 1].adapter.entries(next(iter(adapter.modules)))
    assert np.hypot(low.indices[:, 0], low.indices[:, 1]).max() < 13


# -- tuned checkpoints ------------------------------------------------------------------------------------------------


def test_a_sparse_change_of_a_checkpoint_comes_back_exactly(gpt2: Path, tmp_path: Path) -> None:
    model = load(gpt2, "CAUSAL_LM")
    rng = np.random.default_rng(0)
    planted = {}
    for path in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        weight = linear_weight(find_linear(model, path))
        spectrum = np.zeros(weight.shape)
        places = rng.choice(weight.numel(), 25, replace=False)
        spectrum.flat[places] = rng.choice([-1, 1], 25) * rng.uniform(1, 2, 25)
        planted[path] = spectrum
        with torch.no_grad():
            weight.add_(torch.from_numpy(scipy.fft.idctn(spectrum, norm="ortho")))
    model.save_pretrained(tmp_path / "tuned", max_shard_size="30KB")
    adapter, report = project(gpt2, tuned=tmp_path / "tuned", n_coefficients=25)
    assert set(adapter.modules) == set(planted)
    for path, spectrum in planted.items():
        entries = adapter.modules[path]
        assert np.array_equal(entries.indices, np.argwhere(spectrum))
        np.testing.assert_allclose(entries.values, spectrum[spectrum != 0], rtol=2e-6)
        assert report.modules[path].retained_energy == pytest.approx(1, abs=1e-9)
        assert report.modules[path].relative_error < 1e-5
    merge_checkpoint(gpt2, adapter, tmp_path / "merged")
    merged, want = load(tmp_path / "merged", "CAUSAL_LM").state_dict(), model.state_dict()
    for name in want:
        torch.testing.assert_close(merged[name], want[name], rtol=0, atol=3e-7)


def test_what_a_tuned_checkpoint_changes_beside_linear_weights(bert: Path, tmp_path: Path) -> None:
    model = load(bert, "SEQ_CLS", 4)
    torch.manual_seed(1)
    with torch.no_grad():
        model.classifier.weight.normal_()
        model.bert.encoder.layer[0].attention.self.query.weight.add_(0.01 * torch.randn(36, 36))
        model.bert.encoder.layer[1].intermediate.dense.weight.add_(0.01 * torch.randn(44, 36))
        model.bert.encoder.layer[1].intermediate.dense.bias.add_(1)
        model.bert.embeddings.word_embeddings.weight[3] += 1
        model.bert.encoder.layer[0].output.LayerNorm.weight.mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    adapter, report = project(bert, tuned=tmp_path / "tuned", target_modules=["query", "key"], n_coefficients=2000)
    assert list(adapter.modules) == ["bert.encoder.layer.0.attention.self.query"]
    assert adapter.modules["bert.encoder.layer.0.attention.self.query"].n == 36 * 36
    assert report.ignored == (
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.output.LayerNorm.weight",
        "bert.encoder.layer.1.intermediate.dense.bias",
        "bert.encoder.layer.1.intermediate.dense.weight",
    )
    assert report.saved == ("classifier.bias", "classifier.weight")
    assert adapter.config.task_type == "SEQ_CLS"
    assert list(adapter.config.modules_to_save or ()) == ["classifier"]
    whole, report = project(
        bert,
        tuned=tmp_path / "tuned",
        n_coefficients=2000,
        modules_to_save=["intermediate.dense", "LayerNorm", "word_embeddings"],
    )
    assert report.ignored == ()
    whole.save(tmp_path / "sdct")
    merge_checkpoint(bert, tmp_path / "sdct", tmp_path / "merged")
    ids = torch.arange(12).reshape(2, 6)
    got = load_base(tmp_path / "merged")(ids).logits
    assert got.shape == (2, 4)
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_half_precision_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **IDS, num_key_value_heads=1, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "base")
    before = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.1)
        model.lm_head.weight.mul_(1.1)  # tied to the embeddings, so no linear weight of its own
    model.save_pretrained(tmp_path / "tuned")
    adapter, report = project(tmp_path / "base", tuned=tmp_path / "tuned", n_coefficients=10**6)
    path = "model.layers.1.self_attn.q_proj"
    assert list(adapter.modules) == [path]
    assert report.ignored == ("model.embed_tokens.weight",)
    assert adapter.base_dtype == "bfloat16"
    delta = (model.model.layers[1].self_attn.q_proj.weight.double() - before.double()).detach().numpy()
    assert relative_error(adapter.delta_weight(path).numpy(), delta) < 1e-6
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")  # the hash of the bfloat16 base fits
    merged = load_base(tmp_path / "merged")
    assert torch.equal(merged.model.layers[1].self_attn.q_proj.weight, model.model.layers[1].self_attn.q_proj.weight)


# -- what cannot be projected -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(bert, "SEQ_CLS", LORA["plain"](), tmp_path_factory.mktemp("lora") / "peft")[0]


def edited(source: Path, target: Path, fields: dict[str, Any] | None = None, tensors: Any = None) -> Path:
    shutil.copytree(source, target)
    if fields:
        raw = json.loads((target / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(raw | fields))
    if tensors:
        file = target / "adapter_model.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors(load_file(file)).items()}, file)
    return target


A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"peft_type": "SDCT"}, AdapterFormatError, "already"),
        ({"peft_type": None}, AdapterFormatError, "peft_type"),
        ({"r": 0}, AdapterFormatError, "positive integers"),
        ({"r": 5}, BaseMismatchError, "rank 5"),
        ({"lora_alpha": "8"}, AdapterFormatError, "numbers"),
        ({"rank_pattern": {"query": "x"}}, AdapterFormatError, "positive integers"),
        ({"alpha_pattern": {"(": 1}}, AdapterFormatError, "regular expression"),
        ({"alpha_pattern": [1]}, AdapterFormatError, "alpha_pattern"),
        ({"modules_to_save": "classifier"}, AdapterFormatError, "list"),
        ({"layer_replication": [[0, 1], [0, 1]]}, UnsupportedError, "layer_replication"),
        ({"trainable_token_indices": [1]}, UnsupportedError, "trainable_token_indices"),
    ],
)
def test_odd_lora_configurations(
    fields: dict[str, Any], error: type[SdctError], match: str, bert: Path, lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        project(bert, lora=edited(lora, tmp_path / "peft", fields))


def test_patterns_that_would_take_for_ever(
    bert: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's `re` needs more than a minute for the first two."""
    hopeless = {"rank_pattern": {r"(\w+\.?)+!": 9}, "alpha_pattern": {r"([a-z]+\.?)+!": 9.0}}
    want = project(bert, lora=lora).adapter
    got = project(bert, lora=edited(lora, tmp_path / "a", hopeless)).adapter  # they match nothing
    for module, entries in want.modules.items():
        assert np.array_equal(got.modules[module].values, entries.values)
    monkeypatch.setattr("sdct_export.weights.changes.PATTERN_SECONDS", 0.2)
    with pytest.raises(AdapterFormatError, match=r"takes too long to match \('\(\?:\(\.\+\?\).*names of the modules"):
        project(bert, lora=edited(lora, tmp_path / "b", {"rank_pattern": {r"(?:(.+?)(.*?))*\d\d": 9}}))
    with pytest.raises(AdapterFormatError, match="no regular expression"):
        project(bert, lora=edited(lora, tmp_path / "c", {"rank_pattern": {"(?:" * 2000 + "a" + ")*" * 2000: 9}}))
    # where PEFT merges, it matches by `re`, which nobody can stop
    slow = {"use_dora": True, "target_modules": r"(\w+\.?)+!"}
    with pytest.raises(UnsupportedError, match=r"target_modules holds the pattern .*may take for ever"):
        project(bert, lora=edited(lora, tmp_path / "d", slow))
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(UnsupportedError, match=rf"{field} holds the pattern"):
            project(bert, lora=edited(lora, tmp_path / field, {"use_dora": True, field: {"a?" * 5: 3}}))


def without(t: Tensors, part: str) -> Tensors:
    return {name: tensor for name, tensor in t.items() if part not in name}


def unchanged(t: Tensors) -> Tensors:
    return {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in without(t, "classifier").items()}


def renamed(t: Tensors) -> Tensors:
    return {name.replace("layer.0.attention.self.query", "layer.0.qqq"): tensor for name, tensor in t.items()}


EMBEDDING = "base_model.model.bert.embeddings.word_embeddings.lora_embedding_A"
HEAD = "base_model.model.classifier.weight"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: without(t, A), AdapterFormatError, "only one of its LoRA factors"),
        (lambda t: without(t, "lora_"), AdapterFormatError, "no LoRA factors"),
        (lambda t: t | {A: t[A] * torch.nan}, BaseMismatchError, "query.*NaN"),
        (lambda t: t | {A: t[A][:, :-1]}, BaseMismatchError, r"\[3, 35\]"),
        (renamed, BaseMismatchError, "qqq"),
        (lambda t: t | {A.replace("lora_A.weight", "lora_C"): t[A]}, UnsupportedError, "variant"),
        (lambda t: t | {EMBEDDING: t[A]}, UnsupportedError, "word_embeddings"),
        (lambda t: t | {HEAD: torch.zeros(2, 35)}, BaseMismatchError, r"\[2, 35\]"),
        (lambda t: t | {HEAD: t[HEAD] * torch.inf}, AdapterFormatError, "classifier.*infinite"),
        (lambda t: t | {HEAD.replace("classifier", "score"): t[HEAD]}, BaseMismatchError, "score"),
        (unchanged, ConfigError, "no targeted"),
    ],
)
def test_odd_lora_weights(
    change: Any, error: type[SdctError], match: str, bert: Path, lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        project(bert, lora=edited(lora, tmp_path / "peft", tensors=change))


def test_damaged_and_foreign_folders(bert: Path, gpt2: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"no adapter_config\.json"):
        project(bert, lora=bert)
    with pytest.raises(BaseMismatchError, match="there is no folder"):
        project(tmp_path / "nowhere", lora=lora)
    truncated = edited(lora, tmp_path / "truncated")
    file = truncated / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(AdapterFormatError, match="truncated"):
        project(bert, lora=truncated)
    (truncated / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterFormatError, match="object"):
        project(bert, lora=truncated)
    pickled = edited(lora, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match=r"adapter_model\.bin"):
        project(bert, lora=pickled)
    with pytest.raises(BaseMismatchError, match="GPT2ForSequenceClassification lacks"):
        project(gpt2, lora=lora)
    with pytest.raises(BaseMismatchError, match="share no linear weight"):
        project(gpt2, tuned=bert)
    with pytest.raises(ConfigError, match="nothing to project"):
        project(bert, tuned=bert)
    model = load(bert, "FEATURE_EXTRACTION")
    model.encoder.layer[0].attention.self.key.weight.data[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "inf")
    with pytest.raises(BaseMismatchError, match=r"key.*NaN or infinite"):
        project(bert, tuned=tmp_path / "inf")
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "grown")
    with pytest.raises(BaseMismatchError, match=r"\[70, 36\].*\[61, 36\]"):
        project(bert, tuned=tmp_path / "grown")


def test_prompts_and_embeddings_are_refused(gpt2: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(
        load(gpt2, "CAUSAL_LM"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    model.save_pretrained(tmp_path / "prompt")
    with pytest.raises(UnsupportedError, match="prompt"):
        project(gpt2, lora=tmp_path / "prompt")
    config = peft.LoraConfig(r=2, target_modules=["wte"], task_type="CAUSAL_LM")
    peft.get_peft_model(load(gpt2, "CAUSAL_LM"), config).save_pretrained(tmp_path / "wte", save_embedding_layers=False)
    with pytest.raises(UnsupportedError, match=r"transformer\.wte"):
        project(gpt2, lora=tmp_path / "wte")


def test_settings_that_cannot_work(bert: Path, lora: Path) -> None:
    for settings, match in [
        ({}, "either"),
        ({"lora": lora, "tuned": bert}, "either"),
        ({"lora": lora, "n_coefficients": 0}, "n_coefficients"),
        ({"lora": lora, "total": 0}, "total"),
        ({"lora": lora, "total": 900, "bands": 3}, "1 band"),
        ({"lora": lora, "dtype": "int8"}, "dtype"),
        ({"lora": lora, "selection": "best"}, "selection"),
        ({"lora": lora, "modules_to_save": ["classifier"]}, "modules_to_save"),
    ]:
        with pytest.raises(ConfigError, match=match):
            project(bert, **settings)  # type: ignore[arg-type]
