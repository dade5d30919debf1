"""What a person changes in memory is in the adapter, or is refused: configuration, vocabulary, weights, statistics."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from trained_model import trained

from sdct_export import (
    SdctConfig,
    SdctModel,
    export_merged,
    export_multi,
    get_sdct_model,
    merge_checkpoint,
)
from sdct_export.adapter.training import config_differences, parse_record
from sdct_export.errors import AdapterFormatError, BaseMismatchError, ConfigError
from sdct_export.runtime import MultiAdapterModel
from sdct_export.verify import verify
from sdct_export.weights import merging

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
PAD = 58


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, vocab_size=60, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    transformers.GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def classifier(folder: Path, pad: int | None = None, labels: int = 2) -> nn.Module:
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    if pad is not None:
        base.config.pad_token_id = pad
    return base  # type: ignore[no-any-return]


def query(**more: Any) -> SdctConfig:
    return SdctConfig(["query"], n_coefficients=40, task_type="SEQ_CLS", **more)


def changed(folder: Path, target: Path) -> Path:
    """The checkpoint with another LayerNorm, which no hash of adapted weights looks at."""
    model = transformers.BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.LayerNorm.bias.add_(torch.linspace(-1, 1, 32))
    model.save_pretrained(target)
    return target


# -- configuration --------------------------------------------------------------------------------------------------


def test_a_padding_token_set_in_memory_is_served(gpt2: Path, tmp_path: Path) -> None:
    model = trained(get_sdct_model(classifier(gpt2, PAD), SdctConfig(["c_attn"], n_coefficients=40)))
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in (1, 2):
        ids[row, -2 * row :], mask[row, -2 * row :] = PAD, 0
    with torch.no_grad():
        want = model.eval()(input_ids=ids, attention_mask=mask).logits.numpy()
    model.save_adapter(tmp_path / "a")
    arrays = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    export_multi(gpt2, {"a": tmp_path / "a"}, tmp_path / "multi")
    export_merged(gpt2, tmp_path / "a", tmp_path / "merged")
    merge_checkpoint(gpt2, tmp_path / "a", tmp_path / "checkpoint")
    for bundle, choice in (("multi", "a"), ("merged", None)):
        assert np.abs(MultiAdapterModel(tmp_path / bundle).run(arrays, choice)["logits"] - want).max() < 1e-5
        assert verify(tmp_path / bundle, gpt2).ok
        assert json.loads((tmp_path / bundle / "config.json").read_text())["pad_token_id"] == PAD
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint").eval()
    with torch.no_grad():
        assert np.abs(merged(input_ids=ids, attention_mask=mask).logits.numpy() - want).max() < 1e-5
    for pad, told in ((None, "None"), (7, "7")):
        with pytest.raises(BaseMismatchError, match=f"pad_token_id was {PAD}, is {told}"):
            SdctModel.from_adapter(classifier(gpt2, pad), tmp_path / "a")
    other = trained(get_sdct_model(classifier(gpt2, 7), SdctConfig(["c_attn"], n_coefficients=40))).adapter()
    with pytest.raises(BaseMismatchError, match=f"trained on a model with pad_token_id=7, this bundle .* {PAD}"):
        MultiAdapterModel(tmp_path / "multi").load_adapter("other", other)
    with pytest.raises(BaseMismatchError, match="pad_token_id"):
        export_multi(gpt2, {"a": tmp_path / "a", "other": other}, tmp_path / "both")


def test_without_a_padding_token_one_row_is_compared(gpt2: Path, tmp_path: Path) -> None:
    model = trained(get_sdct_model(classifier(gpt2), SdctConfig(["c_attn"], n_coefficients=40)))
    record = model.adapter().trained_on
    assert record is not None
    assert record.probe is not None
    assert record.probe.inputs["input_ids"].shape == (1, 8)
    with pytest.raises(Exception, match="padding token"):  # transformers cannot classify a batch without one
        export_multi(gpt2, {"a": model.adapter()}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_window_changed_in_memory_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=1, vocab_size=60, sliding_window=64)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mistral")
    base.config.sliding_window = 4
    trained(get_sdct_model(base, SdctConfig(["q_proj"], n_coefficients=40))).save_adapter(tmp_path / "a")
    for use in (
        lambda: export_multi(tmp_path / "mistral", [tmp_path / "a"], tmp_path / "out"),
        lambda: export_merged(tmp_path / "mistral", tmp_path / "a", tmp_path / "out"),
        lambda: merge_checkpoint(tmp_path / "mistral", tmp_path / "a", tmp_path / "out"),
    ):
        with pytest.raises(BaseMismatchError, match="sliding_window was 4, is 64"):
            use()
        assert not (tmp_path / "out").exists()


def test_configurations_are_compared_where_it_matters() -> None:
    one = {"transformers_version": "5", "hidden_act": "gelu", "rope": {"theta": 1.0}, "x_dropout": 0.1, "_name": "a"}
    assert config_differences(one, dict(one, x_dropout=0.5, _name="b", num_labels=7, use_cache=False)) == {}
    assert config_differences(one, dict(one, hidden_act="relu")) == {"hidden_act": ("gelu", "relu")}
    assert config_differences(one, dict(one, rope={"theta": 2.0})) == {"rope.theta": (1.0, 2.0)}
    assert config_differences(one, dict(one, window=4)) == {"window": (None, 4)}
    newer = {"transformers_version": "6", "hidden_act": "gelu", "window": 4}
    assert config_differences(one, newer) == {}  # a field that one of two versions does not know says nothing
    assert config_differences(one, dict(newer, hidden_act="relu")) == {"hidden_act": ("gelu", "relu")}


def test_a_hostile_configuration_is_refused() -> None:
    nested: Any = {}
    for _ in range(500):
        nested = {"a": nested}
    raw = {"model_class": "a:B", "fresh_parameters": None, "id2label": None, "dtype": None}
    for bad in (nested, 3, [1]):
        with pytest.raises(AdapterFormatError, match="model_config"):
            parse_record(raw | {"model_config": bad}, None)
    assert parse_record(raw, None).model_config is None  # what older versions wrote


def test_task_and_class_may_not_contradict(bert: Path, tmp_path: Path) -> None:
    adapter = trained(get_sdct_model(classifier(bert), query())).adapter()
    named = "transformers:BertForSequenceClassification"
    with pytest.raises(ConfigError, match="BertForSequenceClassification is for SEQ_CLS, not for TOKEN_CLS"):
        export_multi(bert, {"a": adapter}, tmp_path / "out", task_type="TOKEN_CLS", model_class=named)
    assert export_multi(bert, {"a": adapter}, tmp_path / "out", model_class=named).task == "SEQ_CLS"


def test_names_of_labels_keep_their_numbers(bert: Path) -> None:
    base = classifier(bert, labels=12)
    base.config.id2label = {str(i): f"n{i}" for i in range(12)}  # as json.load gives it; texts sort otherwise
    record = trained(get_sdct_model(base, query())).adapter().trained_on
    assert record is not None
    assert record.id2label == tuple(f"n{i}" for i in range(12))
    base = classifier(bert, labels=12)
    base.config.id2label = {i + 1: f"n{i}" for i in range(12)}
    with pytest.raises(ConfigError, match=r"must name labels 0 to 11, its keys are \[1, 2, 3\]"):
        get_sdct_model(base, query())


def test_a_state_of_another_configuration_or_base_is_refused(gpt2: Path) -> None:
    config = SdctConfig(["c_attn"], n_coefficients=40)
    state = trained(get_sdct_model(classifier(gpt2, PAD), config)).state_dict()
    get_sdct_model(classifier(gpt2, PAD), config).load_state_dict(state)
    with pytest.raises(BaseMismatchError, match=f"pad_token_id was {PAD}, is 1"):
        get_sdct_model(classifier(gpt2, 1), config).load_state_dict(state)
    other = classifier(gpt2, PAD)
    with torch.no_grad():
        other.get_parameter("transformer.wte.weight")[50:].neg_()
    with pytest.raises(BaseMismatchError, match=r"another 'transformer\.wte\.weight'"):
        get_sdct_model(other, config).load_state_dict(state)


# -- vocabulary and heads -------------------------------------------------------------------------------------------


def test_rows_of_a_resized_vocabulary_are_not_lost(bert: Path, tmp_path: Path) -> None:
    base = classifier(bert)
    base.resize_token_embeddings(64)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"resized to 64, but the checkpoint .* has 60 tokens"):
        get_sdct_model(base, query())
    heads = ["classifier", "word_embeddings"]
    adapter = trained(get_sdct_model(base, query(modules_to_save=heads))).adapter()
    with pytest.raises(BaseMismatchError, match="vocab_size was 64, is 60"):
        export_merged(bert, adapter, tmp_path / "out")
    base.save_pretrained(tmp_path / "resized")  # type: ignore[operator]
    again = transformers.BertModel.from_pretrained(tmp_path / "resized", add_pooling_layer=False)
    get_sdct_model(again, SdctConfig(["query"], n_coefficients=40))


def test_a_trained_head_of_another_size_gives_way_to_the_saved_one(bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier(bert, labels=3).save_pretrained(tmp_path / "three")  # type: ignore[operator]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "three", num_labels=5, ignore_mismatched_sizes=True
    )
    model = trained(get_sdct_model(base, query()))
    adapter = model.adapter()
    assert adapter.saved["classifier.weight"].shape == (5, 32)
    ids = torch.randint(0, 60, (4, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model.eval()(input_ids=ids).logits.numpy()
    with pytest.warns(UserWarning, match="rows without an adapter have no head"):
        export_multi(tmp_path / "three", {"a": adapter}, tmp_path / "out")
    arrays = {"input_ids": ids.numpy(), "attention_mask": np.ones((4, 9), np.int64)}
    assert np.abs(MultiAdapterModel(tmp_path / "out").run(arrays, "a")["logits"] - want).max() < 1e-5
    assert adapter.trained_on is not None
    named = dataclasses.replace(adapter, trained_on=dataclasses.replace(adapter.trained_on, id2label=("a", "b", "c")))
    with (
        pytest.warns(UserWarning, match="head"),
        pytest.raises(AdapterFormatError, match=r"names 3 labels .* 'classifier' has 5"),
    ):
        export_multi(tmp_path / "three", {"a": named}, tmp_path / "out2")


# -- weights of the base --------------------------------------------------------------------------------------------


def test_a_base_that_trains_along_is_refused(bert: Path, tmp_path: Path) -> None:
    model = trained(get_sdct_model(classifier(bert), query()))
    norm = model.base.get_parameter("bert.encoder.layer.1.output.LayerNorm.weight")
    norm.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"'bert.encoder.layer.1.output.LayerNorm.weight' .* requires gradients"):
        model.save_adapter(tmp_path / "a")
    assert any(name.endswith("layer.1.output.LayerNorm.weight") for name in model.state_dict())  # a loop can resume
    with torch.no_grad():
        norm += 0.25
    norm.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"LayerNorm.weight' of the base is not what it was .*merge_and_unload"):
        model.save_adapter(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    ids = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model.eval()(input_ids=ids).logits
        assert torch.allclose(model.merge_and_unload()(input_ids=ids).logits, want, atol=1e-5)


def test_merging_and_switching_are_no_change_of_the_base(bert: Path) -> None:
    model = trained(get_sdct_model(classifier(bert), query()))
    model.add_adapter("other", SdctConfig(["value"], n_coefficients=30, modules_to_save=["classifier"]))
    before = model.adapter("default").saved["classifier.weight"]
    model.merge()
    model.adapter("default")
    model.unmerge()
    model.set_adapter("other")
    trained(model, 2)
    model.adapter("other")
    model.to(torch.float64)
    assert np.array_equal(model.adapter("default").saved["classifier.weight"], before)


@pytest.mark.parametrize(
    ("tensor", "rows"),
    [
        ("word_embeddings", [57]),  # a spare token
        ("position_embeddings", [20, 25]),  # beyond the probe
        ("token_type_embeddings", [1]),
    ],
)
def test_a_change_that_no_probe_reads_is_refused(tensor: str, rows: list[int], bert: Path, tmp_path: Path) -> None:
    base = classifier(bert)
    with torch.no_grad():  # before the adapter is put on it
        base.get_parameter(f"bert.embeddings.{tensor}.weight")[rows] += 0.5
    model = trained(get_sdct_model(base, query()))
    adapter = model.adapter()
    adapter.save(tmp_path / "a")
    for use in (
        lambda: export_multi(bert, [tmp_path / "a"], tmp_path / "out"),
        lambda: export_merged(bert, adapter, tmp_path / "out"),
        lambda: merge_checkpoint(bert, adapter, tmp_path / "out"),
        lambda: SdctModel.from_adapter(classifier(bert), adapter),
    ):
        with pytest.raises(BaseMismatchError, match=rf"a base with another 'bert\.embeddings\.{tensor}\.weight'"):
            use()
        assert not (tmp_path / "out").exists()
    own = trained(get_sdct_model(classifier(bert), query()), 3).adapter()
    export_multi(bert, {"own": own}, tmp_path / "out")
    with pytest.raises(BaseMismatchError, match="a base with 1 other tensors than this bundle"):
        MultiAdapterModel(tmp_path / "out").load_adapter("a", tmp_path / "a")
    with pytest.raises(ConfigError, match="carries adapters; pass its SdctModel"):
        export_multi(model.base, {"a": adapter}, tmp_path / "live")
    export_multi(model, {"a": adapter}, tmp_path / "live")  # the base it was trained on


@pytest.mark.parametrize("how", ["half", "bfloat16", "merge"])
def test_a_change_hidden_by_a_cast_or_a_merge_is_refused(how: str, bert: Path) -> None:
    model = trained(get_sdct_model(classifier(bert), query()))
    model.adapter()
    table = model.base.get_parameter("bert.embeddings.word_embeddings.weight")
    if how == "merge":
        model.merge()
        model.adapter()
    with torch.no_grad():
        table[[1, 2]] = table[[2, 1]].clone()  # the sum of all bits stays
    if how != "merge":
        model.to(torch.float16 if how == "half" else torch.bfloat16)
    with pytest.raises(ConfigError, match=r"word_embeddings\.weight' of the base is not what it was"):
        model.adapter()


def test_a_cast_is_no_change(bert: Path) -> None:
    model = trained(get_sdct_model(classifier(bert), query()))
    before = model.adapter()
    model.half()
    assert before.trained_on is not None
    for adapter in (model.adapter(), model.float().adapter()):
        assert adapter.trained_on is not None
        assert adapter.trained_on.weights == before.trained_on.weights  # those of the checkpoint


def test_values_below_the_range_of_half_are_not_lost(bert: Path, tmp_path: Path) -> None:
    model = get_sdct_model(classifier(bert), query(scaling=1e8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".values"):
                parameter.copy_(torch.linspace(-1e-9, 1e-9, 40))
    with pytest.raises(ConfigError, match=r"below the range of float16: 100 % would be lost"):
        model.save_adapter(tmp_path / "a", dtype="float16")
    model.save_adapter(tmp_path / "a", dtype="bfloat16")


@pytest.mark.parametrize("name", ["train", "values", "keys", "pop", "forward"])
def test_adapters_may_be_called_like_anything(name: str, bert: Path) -> None:
    model = trained(get_sdct_model(classifier(bert), query(), name))
    model.add_adapter("other", SdctConfig(["value"], n_coefficients=30, modules_to_save=["classifier"]))
    again = SdctModel.from_adapter(classifier(bert), model.adapter(name), name)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    model.set_adapter("other")
    model.set_adapter(name)
    again.load_state_dict(trained(again, 5).state_dict())


def test_compiled_bases(bert: Path) -> None:
    adapter = trained(get_sdct_model(classifier(bert), query())).adapter()
    base = classifier(bert)
    base.compile()
    SdctModel.from_adapter(base, adapter)  # compared without compiling
    with pytest.raises(ConfigError, match=r"what torch.compile returned"):
        get_sdct_model(torch.compile(classifier(bert)), query())  # type: ignore[arg-type]


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))  # type: ignore[no-any-return]


def test_statistics_of_the_base_stand_still() -> None:
    torch.manual_seed(0)
    model = get_sdct_model(_Normed(), SdctConfig(["linear"], n_coefficients=8)).train()
    assert model.training
    assert model.base.get_submodule("linear").training
    before = model.base.get_buffer("norm.running_mean").clone()
    model(torch.randn(16, 8) + 3).sum().backward()
    assert torch.equal(model.base.get_buffer("norm.running_mean"), before)
    model.adapter()
    model.base.get_buffer("norm.running_mean").add_(1)
    with pytest.raises(ConfigError, match=r"'norm\.running_mean' of the base is not what it was"):
        model.adapter()


def test_a_merged_checkpoint_is_compared_with_the_training(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained(get_sdct_model(classifier(bert), query())).adapter()
    other = changed(bert, tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="the merged model gives other outputs"):
        merge_checkpoint(other, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_checkpoint(bert, adapter, tmp_path / "out")
    assert "classifier.weight" in load_file(tmp_path / "out" / "model.safetensors")
    monkeypatch.setattr(merging, "available_memory", lambda: 1 << 10)
    with pytest.warns(UserWarning, match="was not compared with the adapter's training"):
        merge_checkpoint(other, adapter, tmp_path / "large")


def test_a_running_bundle_compares_what_it_loads(bert: Path, tmp_path: Path) -> None:
    adapter = trained(get_sdct_model(classifier(bert), query())).adapter()
    other = changed(bert, tmp_path / "other")
    own = trained(get_sdct_model(classifier(other), query()), 3).adapter()
    export_multi(other, {"own": own}, tmp_path / "out")
    model = MultiAdapterModel(tmp_path / "out")
    arrays = {"input_ids": np.arange(12).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int64)}
    before = model.run(arrays, "own")["logits"]
    assert adapter.trained_on is not None
    with pytest.raises(BaseMismatchError, match="a base with 1 other tensors"):
        model.load_adapter("new", adapter)
    adapter = dataclasses.replace(adapter, trained_on=dataclasses.replace(adapter.trained_on, weights=None))
    for load in (model.load_adapter, model.reload_adapter):
        with pytest.raises(BaseMismatchError, match="gives other outputs in this bundle than when it was trained"):
            load("own" if load == model.reload_adapter else "new", adapter)
    assert sorted(model.adapters) == ["own"]
    assert np.array_equal(model.run(arrays, "own")["logits"], before)
    model.load_adapter("again", own)
    assert np.array_equal(model.run(arrays, "again")["logits"], before)


def test_the_record_of_a_merged_bundle_cannot_be_swapped(bert: Path, tmp_path: Path) -> None:
    adapter = trained(get_sdct_model(classifier(bert), query())).adapter()
    export_merged(bert, adapter, tmp_path / "out")
    assert verify(tmp_path / "out").ok
    record = tmp_path / "out" / "trained_on.json"
    text = record.read_text()
    record.write_text(text.replace("null", "null "))
    assert [c.name for c in verify(tmp_path / "out").checks if not c.ok] == ["training record"]
    record.unlink()
    assert [c.name for c in verify(tmp_path / "out").checks if not c.ok] == ["training record"]


def test_a_model_without_a_checkpoint_warns_of_nothing() -> None:
    config = transformers.BertConfig(**SIZES, vocab_size=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_sdct_model(transformers.BertModel(config), SdctConfig(["query"], n_coefficients=40)).adapter()
