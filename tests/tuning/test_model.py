"""`get_sdct_model` on every kind of base: numbers against edited weights, several adapters, files, and refusals."""

from __future__ import annotations

import copy
import inspect
import pickle
import shutil
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, edited, random_adapter
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig

from sdct_export import SdctAdapter, SdctConfig, SdctModel, get_sdct_model
from sdct_export.errors import (
    AdapterFormatError,
    BaseMismatchError,
    ConfigError,
    OutputError,
    UnknownAdapterError,
    UnsupportedError,
)
from sdct_export.spectral.transform import dct2

IDS = torch.tensor([[5, 17, 40, 3, 22, 71, 9], [90, 2, 2, 61, 8, 33, 14]])


def inputs(family: str) -> dict[str, Tensor]:
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS}


def output(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs(family))[0]
    return out


def classifier(**overrides: Any) -> nn.Module:
    return FAMILIES["bert-classifier"].model(**overrides)


def config(**fields: Any) -> SdctConfig:
    return SdctConfig(
        **{"target_modules": ["query", "value"], "n_coefficients": 30, "modules_to_save": ["classifier"]} | fields
    )


def train(model: SdctModel, steps: int = 4) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=torch.tensor([1, 3])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_starts_as_the_base_and_equals_edited_weights(name: str) -> None:
    family = FAMILIES[name]
    base = family.model()
    reference = copy.deepcopy(base)
    before = output(base, name)
    keys = set(base.state_dict())
    model = get_sdct_model(base, SdctConfig(target_modules=family.targets, n_coefficients=40, seed=3)).eval()
    assert torch.equal(output(model, name), before)  # values start at zero
    assert keys <= set(base.state_dict())
    adapter = random_adapter(family, reference, seed=1, labels=4 if family.saved and name != "vit" else None)
    model.load_adapter(adapter, "trained")
    model.set_adapter("trained")
    want = output(edited(reference, {"trained": 1.0}, {"trained": adapter}), name)
    got = output(model, name)
    assert (want - before).abs().max() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output(model, name), before)
    assert torch.equal(output(model, name), got)


@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3"])
def test_merge_equals_the_forward_and_unmerge_restores_every_bit(name: str) -> None:
    family = FAMILIES[name]
    base = family.model()
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    before = output(base, name)
    model = SdctModel.from_adapter(base, random_adapter(family, base, seed=2)).eval()
    want = output(model, name)
    model.merge()
    torch.testing.assert_close(output(model, name), want, rtol=1e-4, atol=1e-4)
    assert (output(base, name) - before).abs().max() > 1e-2
    for refused in (model.merge, lambda: model.set_adapter("default"), lambda: model.add_adapter("b", config())):
        with pytest.raises(ConfigError, match="call unmerge before"):
            refused()
    model.unmerge()
    assert torch.equal(output(model, name), want)
    for key, value in weights.items():
        assert torch.equal(base.state_dict()[key], value), key
    with pytest.raises(ConfigError, match="nothing is merged"):
        model.unmerge()


def test_merge_takes_the_heads_along_and_gives_them_back() -> None:
    base = classifier()
    own = base.get_parameter("classifier.weight")
    before = own.detach().clone()
    model = get_sdct_model(base, config()).eval()
    train(model)
    want = model(input_ids=IDS).logits
    model.merge()
    torch.testing.assert_close(base(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)
    model.unmerge()
    assert torch.equal(model(input_ids=IDS).logits, want)
    with model.disable_adapter():
        assert base.get_parameter("classifier.weight") is own
        assert torch.equal(own, before)
        with pytest.raises(ConfigError, match="no adapter is active"):
            model.merge()


def test_training_moves_only_the_active_adapter() -> None:
    base = classifier()
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_sdct_model(base, config(), "first").eval()
    model.add_adapter("second", config(n_coefficients=12, seed=9, modules_to_save=None))
    assert model.adapters == ["first", "second"]
    assert model.count_parameters()[0] == 4 * 30 + 4 * 48 + 4
    losses = train(model)
    assert losses[-1] < losses[0]
    first, second = model.adapter("first"), model.adapter("second")
    assert all((e.values != 0).any() for e in first.modules.values())
    assert all((e.values == 0).all() for e in second.modules.values())
    after_first = model(input_ids=IDS).logits
    model.set_adapter("second")
    assert model.count_parameters()[0] == 4 * 12
    train(model)
    assert all((e.values != 0).any() for e in model.adapter("second").modules.values())
    model.set_adapter("first")
    assert torch.equal(model(input_ids=IDS).logits, after_first)
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
        for key, value in frozen.items():
            assert torch.equal(base.state_dict()[key], value), key
    model.set_adapter("first")  # twice the same: nothing is lost
    assert torch.equal(model(input_ids=IDS).logits, after_first)


def test_energy_selection_reads_the_pretrained_weight_and_salts_the_seed() -> None:
    base = classifier()
    layer = "bert.encoder.layer.{}.attention.self.query"
    spectrum = dct2(base.get_parameter(layer.format(0) + ".weight").detach()).abs()
    model = get_sdct_model(base, config(n_coefficients=300, delta=1.0))
    indices = torch.from_numpy(model.adapter().entries(layer.format(0)).indices.copy()).long()
    chosen = spectrum[indices[:, 0], indices[:, 1]]
    assert chosen.mean() > 1.5 * spectrum.mean()
    random = get_sdct_model(classifier(), config(selection="random")).adapter()
    assert not np.array_equal(random.entries(layer.format(0)).indices, random.entries(layer.format(1)).indices)
    again = get_sdct_model(classifier(), config(selection="random")).adapter()
    other = get_sdct_model(classifier(), config(selection="random", seed=1)).adapter()
    for path, entries in random.modules.items():
        assert np.array_equal(entries.indices, again.entries(path).indices)
        assert not np.array_equal(entries.indices, other.entries(path).indices)


def test_published_counts_on_the_meta_device() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, RobertaConfig

    roberta = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    llama3 = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=128256,
    )  # fmt: skip
    llama2 = LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824)
    for kind, settings, targets, published in (
        (AutoModelForSequenceClassification, roberta, ["query", "value"], 33_600),
        (AutoModelForCausalLM, llama3, ["q_proj", "v_proj"], 44_800),
        (AutoModelForCausalLM, llama2, ["q_proj", "v_proj"], 56_000),
    ):
        with torch.device("meta"):
            base = kind.from_config(settings)
        start = time.perf_counter()
        model = get_sdct_model(base, SdctConfig(target_modules=targets))
        assert time.perf_counter() - start < 30  # no selection runs; a selection of these sizes takes minutes
        assert model.count_parameters()[0] == published
        with pytest.raises(ConfigError, match="meta device"):
            model.adapter()


def test_files_hold_what_was_trained(tmp_path: Path) -> None:
    model = get_sdct_model(classifier(), config(base_model_name_or_path="some/base")).eval()
    train(model)
    model.save_adapter(tmp_path / "a")
    adapter = SdctAdapter.load(tmp_path / "a")
    assert (adapter.config.task_type, adapter.config.base_model_name_or_path) == ("SEQ_CLS", "some/base")
    assert adapter.base_hash is not None
    assert adapter.base_dtype == "float32"
    assert set(adapter.saved) == {"classifier.weight", "classifier.bias"}
    assert adapter.entries("bert.encoder.layer.1.attention.self.value").shape == (48, 48)
    fresh = SdctModel.from_adapter(classifier(), tmp_path / "a", "loaded").eval()
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    for dtype in ("float16", "bfloat16"):
        model.save_adapter(tmp_path / dtype, dtype=dtype)
        half = SdctModel.from_adapter(classifier(), tmp_path / dtype).eval()
        assert (
            str(SdctAdapter.load(tmp_path / dtype).entries("bert.encoder.layer.0.attention.self.query").values.dtype)
            == dtype
        )
        torch.testing.assert_close(half(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0.05, atol=0.05)
    with pytest.raises(ConfigError, match="float32, float16 or bfloat16"):
        model.save_adapter(tmp_path / "b", dtype="float64")
    assert losses_fall_further(fresh)


def losses_fall_further(model: SdctModel) -> bool:
    losses = train(model)
    return losses[-1] < losses[0]


def test_task_types_come_from_the_class() -> None:
    found = {
        name: get_sdct_model(f.model(), SdctConfig(f.targets, 5)).configs["default"].task_type
        for name, f in FAMILIES.items()
    }
    assert found == {name: family.task for name, family in FAMILIES.items()}
    plain = get_sdct_model(nn.Sequential(nn.Linear(5, 7)), SdctConfig(["0"], 5))
    assert plain.adapter().config.task_type is None


def test_a_base_of_half_precision_keeps_float32_values_and_its_hash() -> None:
    base = FAMILIES["bert"].model().bfloat16()
    before = output(base, "bert")
    model = get_sdct_model(base, config(modules_to_save=None)).eval()
    assert torch.equal(output(model, "bert"), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    adapter = model.adapter()
    assert adapter.base_dtype == "bfloat16"
    as_float32 = FAMILIES["bert"].model().bfloat16().float()  # the same checkpoint loaded in another dtype
    SdctModel.from_adapter(as_float32, adapter)


def test_another_base_is_refused() -> None:
    model = get_sdct_model(classifier(), config())
    train(model, 1)
    adapter = model.adapter()
    with pytest.raises(BaseMismatchError, match="no module 'bert"):
        SdctModel.from_adapter(FAMILIES["gpt2"].model(), adapter)
    changed = classifier()
    with torch.no_grad():
        changed.get_parameter("bert.encoder.layer.1.attention.self.value.weight")[0, 0] += 1
    with pytest.raises(BaseMismatchError, match="other base weights"):
        SdctModel.from_adapter(changed, adapter)
    more_labels = classifier(num_labels=7)
    more_labels.get_submodule("bert").load_state_dict(classifier().get_submodule("bert").state_dict())
    with pytest.raises(BaseMismatchError, match=r"\[4, 48\].*\[7, 48\].*number of labels"):
        SdctModel.from_adapter(more_labels, adapter)
    part = SdctAdapter(adapter.config, adapter.modules, {"classifier.weight": adapter.saved["classifier.weight"]})
    with pytest.raises(BaseMismatchError, match=r"'classifier\.bias' is missing"):
        SdctModel.from_adapter(classifier(), part)


def test_a_diverged_training_is_not_saved(tmp_path: Path) -> None:
    model = get_sdct_model(classifier(), config())
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0] = float("nan")
    with pytest.raises(AdapterFormatError, match="NaN"):
        model.save_adapter(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["q_proj"]}, ConfigError, r"target_modules \['q_proj'\].*named classifier, dense, key"),
        ({"target_modules": ["word_embeddings"]}, UnsupportedError, "word_embeddings', an Embedding"),
        ({"target_modules": ["attention"]}, UnsupportedError, "attention', a BertAttention"),
        ({"n_coefficients": 48 * 48 + 1}, ConfigError, "layer.0.attention.self.query' is 48 x 48 and has only 2304"),
        ({"selection": "top"}, ConfigError, "sdct-export project"),
        ({"modules_to_save": ["score"]}, ConfigError, "names 'score'"),
        ({"target_modules": ["classifier"]}, ConfigError, "target module 'classifier' lies in 'classifier'"),
        ({"modules_to_save": ["encoder"]}, ConfigError, "query' lies in 'bert.encoder'"),
        ({"modules_to_save": ["dropout"]}, ConfigError, "without parameters"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    base = classifier()
    with pytest.raises(error, match=message):
        get_sdct_model(base, config(**fields))
    get_sdct_model(base, config())  # nothing was left behind


def test_modules_that_cannot_be_saved_or_adapted() -> None:
    gpt2 = FAMILIES["gpt2"].model()
    with pytest.raises(UnsupportedError, match=r"tied to 'transformer\.wte\.weight'"):
        get_sdct_model(gpt2, SdctConfig(["c_attn"], 5, modules_to_save=["lm_head"]))
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(UnsupportedError, match="buffers such as 'num_batches_tracked'"):
        get_sdct_model(norm, SdctConfig(["0"], 5, modules_to_save=["1"]))
    with pytest.raises(UnsupportedError, match="without calling it"):
        get_sdct_model(nn.MultiheadAttention(8, 2), SdctConfig(["out_proj"], 5))
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"'0'.*quantized"):
        get_sdct_model(nn.Sequential(packed), SdctConfig(["0"], 5))


def test_names_of_adapters() -> None:
    model = get_sdct_model(classifier(), config())
    with pytest.raises(ConfigError, match="'default' exists already"):
        model.add_adapter("default", config())
    with pytest.raises(ConfigError, match="'default' exists already"):
        model.load_adapter(model.adapter(), "default")
    for name in ("", "a.b", "a/b", "a b", "__base__"):
        with pytest.raises(ConfigError, match="adapter name"):
            model.add_adapter(name, config())
    for unknown in (model.set_adapter, model.adapter):
        with pytest.raises(UnknownAdapterError, match="no adapter is named 'other'; this model has: default"):
            unknown("other")
    with pytest.raises(ConfigError, match="carries sDCT adapters already"):
        get_sdct_model(model.base, config())
    with pytest.raises(ConfigError, match="carries sDCT adapters already"):
        get_sdct_model(model, config())
    with pytest.raises(ConfigError, match="lies in 'classifier', which adapter 'default' trains in full"):
        model.add_adapter("head", config(target_modules=["classifier"], modules_to_save=None))


def test_the_adapter_that_is_meant_is_the_active_or_the_only_one(tmp_path: Path) -> None:
    model = get_sdct_model(classifier(), config(), "legal").eval()
    train(model, 1)
    model.save_adapter(tmp_path / "a")
    want = model.adapter("legal").modules
    assert any(e.values.any() for e in want.values())

    def same(adapter: SdctAdapter) -> bool:
        return all(np.array_equal(e.values, want[m].values) for m, e in adapter.modules.items())

    assert same(SdctAdapter.load(tmp_path / "a"))
    with model.disable_adapter():
        assert same(model.adapter())  # the only one
    model.add_adapter("medical", config(seed=1))
    assert same(model.adapter())
    assert not same(model.adapter("medical"))
    model.merge()
    assert same(model.adapter())
    model.unmerge()
    model.set_adapter("medical")
    assert not same(model.adapter())
    with (
        model.disable_adapter(),
        pytest.raises(ConfigError, match=r"2 adapters \(legal, medical\) and none is active"),
    ):
        model.save_adapter(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_model_looks_like_its_base() -> None:
    base = FAMILIES["llama"].model()
    model = get_sdct_model(base, SdctConfig(["q_proj", "v_proj"], 20))
    assert isinstance(model, SdctModel)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert "labels" in inspect.signature(type(model).forward).parameters
    assert model.config is base.config
    want = base.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), want)
    for name in ("save_to_hub", "save_checkpoint", "push_somewhere", "_upload_modified_files", "_save_pretrained"):
        setattr(type(base), name, lambda self: None)
        try:
            assert not hasattr(model, name)
            with pytest.raises(AttributeError, match="would write the base with the adapter's tensors in it"):
                getattr(model, name)
        finally:
            delattr(type(base), name)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_hugging_face_names_write_and_publish_the_adapter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    model = get_sdct_model(classifier(), config(), "legal").eval()
    want = model(input_ids=IDS).logits
    files = ["adapter_config.json", "adapter_model.safetensors", "training_probe.safetensors"]
    for _ in range(2):  # as others do, it replaces what it wrote before
        model.save_pretrained(tmp_path / "a")
        assert sorted(p.name for p in (tmp_path / "a").iterdir()) == files
        train(model, 1)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    with pytest.raises(OutputError, match=r"holds 'tokenizer\.json'"):
        model.save_pretrained(tmp_path / "a")
    sent: dict[str, Any] = {}

    class Api:
        """What `HfApi` would be asked."""

        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **settings: Any) -> Any:
            sent["repository"] = repo_id, settings
            return types.SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, folder_path: Path, **settings: Any) -> Any:
            shutil.copytree(folder_path, tmp_path / "sent")
            sent["upload"] = settings
            return types.SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model.eval()
    assert model.push_to_hub("me/legal", dtype="float16", private=True, token="hf_x") == "https://hub/commit/1"
    assert sorted(p.name for p in (tmp_path / "sent").iterdir()) == files
    assert sent["token"] == "hf_x"
    assert sent["repository"] == ("me/legal", {"private": True, "exist_ok": True})
    assert sent["upload"]["allow_patterns"] == [files[0], files[1], files[2]]
    assert sum(p.stat().st_size for p in (tmp_path / "sent").iterdir()) < 40_000  # no weight of the base

    def snapshot(repository: str, **settings: Any) -> str:
        assert (repository, settings["revision"]) == ("me/legal", "v1")
        assert sorted(settings["allow_patterns"]) == files
        return str(tmp_path / "sent")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    again = SdctModel.from_pretrained(classifier(), "me/legal", "mine", revision="v1").eval()
    assert again.adapters == ["mine"]
    now = model(input_ids=IDS).logits
    torch.testing.assert_close(again(input_ids=IDS).logits, now, rtol=2e-2, atol=2e-2)
    assert (now - want).abs().max() > 5e-2
    folder = SdctModel.from_pretrained(classifier(), tmp_path / "sent").eval()
    assert torch.equal(folder(input_ids=IDS).logits, again(input_ids=IDS).logits)
    with pytest.raises(ConfigError, match="takes the base model first"):
        SdctModel.from_pretrained("me/legal", classifier())  # type: ignore[arg-type]


def test_only_scaling_times_learning_rate_matters_to_adam() -> None:
    """docs/training.md claims it: a power of two moves from one to the other without changing a single step."""
    results = []
    for scaling, rate in ((1.0, 3e-2), (16.0, 3e-2 / 16), (16.0, 3e-2)):
        model = get_sdct_model(classifier(), config(scaling=scaling, modules_to_save=None)).eval()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate, eps=0.0)
        for _ in range(5):
            model(input_ids=IDS, labels=torch.tensor([1, 3])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model(input_ids=IDS).logits.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert (results[2] - results[0]).abs().max() > 0.1


def test_copies_and_pickles_are_independent_and_equal() -> None:
    model = get_sdct_model(classifier(), config()).eval()
    train(model)
    want = model(input_ids=IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(twin(input_ids=IDS).logits, want)
        train(twin)
        assert not torch.equal(twin(input_ids=IDS).logits, want)
        assert torch.equal(model(input_ids=IDS).logits, want)


def test_a_state_dict_holds_the_adapters_alone() -> None:
    model = get_sdct_model(classifier(), config()).eval()
    model.add_adapter("second", config(seed=5))
    train(model)
    state = model.state_dict()
    assert sum(t.numel() for t in state.values() if t.dtype != torch.uint8) == 2 * (4 * 30 * 3 + 4 * 48 + 4)
    assert [key for key, t in state.items() if t.dtype == torch.uint8] == ["_extra_state"]
    fresh = get_sdct_model(classifier(), config(seed=7)).eval()
    fresh.add_adapter("second", config())
    assert not torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    fresh.load_state_dict(state)
    for name in ("default", "second"):
        model.set_adapter(name)
        fresh.set_adapter(name)
        assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict(dict(list(state.items())[1:]))
    outer = nn.ModuleDict({"inner": model})
    assert len(outer.state_dict()) == len(state)
    outer.load_state_dict(outer.state_dict())


def test_a_state_dict_of_another_model_is_refused_before_anything_is_loaded() -> None:
    model = get_sdct_model(classifier(), config(scaling=2.0)).eval()
    train(model)
    state, want = model.state_dict(), model(input_ids=IDS).logits

    def refused(other: SdctModel, error: type[Exception], message: str) -> None:
        before = other.state_dict()
        for strict in (True, False):  # transformers' Trainer loads with strict=False
            with pytest.raises(error, match=message):
                other.load_state_dict(state, strict=strict)
        assert all(torch.equal(t, before[key]) for key, t in other.state_dict().items())

    refused(get_sdct_model(classifier(), config()), ConfigError, "'default' with scaling 2.0, in the model it has 1.0")
    refused(get_sdct_model(classifier(), config(scaling=2.0), "legal"), ConfigError, "'default', the model has legal;")
    changed = classifier()
    with torch.no_grad():
        changed.get_parameter("bert.encoder.layer.1.attention.self.value.weight")[0, 0] += 1
    refused(get_sdct_model(changed, config(scaling=2.0)), BaseMismatchError, "other base weights")
    both = get_sdct_model(classifier(), config(scaling=2.0))
    both.add_adapter("second", config())
    both.set_adapter("second")
    refused(both, ConfigError, "active adapter is 'default', here it is 'second'")
    derived = type("Pooled", (type(classifier()),), {})
    other = classifier()
    other.__class__ = derived
    refused(get_sdct_model(other, config(scaling=2.0)), BaseMismatchError, "was trained on BertForSequence")
    fresh = get_sdct_model(classifier(), config(scaling=2.0, seed=4)).eval()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(input_ids=IDS).logits, want)
    without = {key: t for key, t in state.items() if key != "_extra_state"}
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        fresh.load_state_dict(without)
    with pytest.raises(AdapterFormatError, match="none of an sDCT model"):
        fresh.load_state_dict(state | {"_extra_state": torch.zeros(3)})
    with pytest.raises(AdapterFormatError, match="truncated"):
        fresh.load_state_dict(state | {"_extra_state": state["_extra_state"][:-1]})


def test_peft_still_refuses_methods_of_others() -> None:
    """docs/training.md says why this package is no PEFT tuner; when this fails, PEFT opened up and we can be one."""
    peft_types = pytest.importorskip("peft.utils.peft_types")
    with pytest.raises(ValueError, match="Unknown PEFT type SDCT"):
        peft_types.register_peft_method(name="sdct", config_cls=object, model_cls=object)


def _bert() -> Any:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    return BertModel(config).eval()


def test_merge_and_unload_leaves_a_plain_model() -> None:
    base, ids = _bert(), torch.randint(0, 50, (2, 6))
    model = get_sdct_model(base, SdctConfig(["query", "value"], n_coefficients=20))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        want, before = model.eval()(ids).last_hidden_state, set(_bert().state_dict())
        plain = model.merge_and_unload()
        got = plain(ids).last_hidden_state
    assert plain is base
    assert set(plain.state_dict()) == before
    assert not any(module._forward_hooks for module in plain.modules())
    assert (got - want).abs().max() < 1e-5
    assert model.get_nb_trainable_parameters() == model.count_parameters()


def test_all_linear_is_every_linear_layer_but_the_output() -> None:
    from transformers import BertForSequenceClassification, LlamaForCausalLM

    found = get_sdct_model(_bert(), SdctConfig("all-linear", n_coefficients=5)).adapter().modules
    assert {path.rpartition(".")[2] for path in found} == {"query", "key", "value", "dense"}
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    classifier = BertForSequenceClassification(config)
    settings = SdctConfig("all-linear", n_coefficients=5, modules_to_save=["bert.pooler"], task_type="SEQ_CLS")
    found = get_sdct_model(classifier, settings).adapter().modules
    assert not any("classifier" in path or "pooler" in path for path in found)
    assert len(found) == 6
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=2, intermediate_size=24))  # fmt: skip
    found = get_sdct_model(llama, SdctConfig("all-linear", n_coefficients=5)).adapter().modules
    names = {path.rpartition(".")[2] for path in found}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
