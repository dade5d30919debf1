"""What is exported is what was trained, or refused: class, parameters without a checkpoint, and the training probe."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from pooled_class import MeanPooled
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from trained_model import trained

from sdct_export import (
    SdctAdapter,
    SdctConfig,
    SdctModel,
    export_merged,
    export_multi,
    get_sdct_model,
    merge_checkpoint,
)
from sdct_export.adapter.folder import encode_safetensors, read_safetensors
from sdct_export.adapter.training import TrainingProbe, positions, scattered
from sdct_export.base.training import class_name, fresh_parameters
from sdct_export.bundle.description import adapter_sha256
from sdct_export.cli import main
from sdct_export.errors import AdapterFormatError, BaseMismatchError, ConfigError
from sdct_export.runtime import MultiAdapterModel
from sdct_export.verify import verify

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
IDS = {"vocab_size": 60, "max_position_embeddings": 32}


def bert(**more: Any) -> transformers.BertConfig:
    return transformers.BertConfig(**SIZES, **IDS, **more)


@pytest.fixture
def body(tmp_path: Path) -> Path:
    """A checkpoint of a BERT body with its pooler, without a head."""
    torch.manual_seed(0)
    transformers.BertModel(bert()).save_pretrained(tmp_path / "body")
    return tmp_path / "body"


@pytest.fixture
def distilbert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=40, **IDS)
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "distilbert")
    return tmp_path / "distilbert"


def config(targets: list[str], heads: list[str] | None = None, **more: Any) -> SdctConfig:
    return SdctConfig(targets, n_coefficients=40, modules_to_save=heads, task_type="SEQ_CLS", **more)


def logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> np.ndarray[Any, Any]:
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return np.asarray(model.eval()(input_ids=ids, attention_mask=mask).logits)


def feeds(seed: int = 3) -> tuple[torch.Tensor, dict[str, Any]]:
    ids = torch.randint(0, 60, (4, 9), generator=torch.Generator().manual_seed(seed))
    return ids, {"input_ids": ids.numpy(), "attention_mask": np.ones((4, 9), np.int64)}


def shell(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def failed(bundle: Path) -> list[str]:
    return [check.name for check in verify(bundle).checks if not check.ok]


# -- a class of one's own with the stock class's parameters -------------------------------------------


@pytest.fixture
def mean_pooled(body: Path, tmp_path: Path) -> tuple[SdctModel, Path]:
    model = trained(get_sdct_model(MeanPooled.from_pretrained(body, num_labels=3), config(["query", "value"])))
    model.save_adapter(tmp_path / "mine")
    return model, tmp_path / "mine"


def test_another_class_is_refused_everywhere(mean_pooled: tuple[SdctModel, Path], body: Path, tmp_path: Path) -> None:
    _, adapter = mean_pooled
    for merge in ([], ["--merge"], ["--merge", "--format", "transformers"]):
        ran = shell("--model", body, "--adapter", adapter, "--output", tmp_path / "out", *merge)
        assert ran.exit_code == 1
        assert "a class of your own; pass --model-class pooled_class:MeanPooled" in ran.stderr
        assert not (tmp_path / "out").exists()
    named = "transformers:BertForSequenceClassification"
    ran = shell("--model", body, "--adapter", adapter, "--output", tmp_path / "out", "--model-class", named)
    assert ran.exit_code == 1
    assert "was trained on MeanPooled of pooled_class, this base is a BertForSequenceClassification" in ran.stderr
    stock = transformers.BertForSequenceClassification.from_pretrained(body, num_labels=3)
    for use in (
        lambda: SdctModel.from_adapter(stock, adapter),
        lambda: export_multi(stock, {"mine": adapter}, tmp_path / "out"),
        lambda: export_merged(stock, adapter, tmp_path / "out"),
        lambda: export_merged(body, adapter, tmp_path / "out", task_type="SEQ_CLS"),
        lambda: merge_checkpoint(body, adapter, tmp_path / "out", model_class=named),
    ):
        with pytest.raises(BaseMismatchError, match="was trained on MeanPooled"):
            use()
    with pytest.raises(BaseMismatchError, match=f"^{re.escape(str(adapter))} was trained on MeanPooled"):
        merge_checkpoint(body, adapter, tmp_path / "out", model_class=named)
    assert not (tmp_path / "out").exists()


def test_the_class_by_its_name_exports_what_was_trained(
    mean_pooled: tuple[SdctModel, Path], body: Path, tmp_path: Path
) -> None:
    model, adapter = mean_pooled
    ids, arrays = feeds()
    want = logits(model, ids)
    own = ("--model-class", "pooled_class:MeanPooled")
    for name, merge in (("multi", []), ("merged", ["--merge"])):
        ran = shell("--model", body, "--adapter", adapter, "--output", tmp_path / name, *own, *merge)
        assert ran.exit_code == 0, ran.stderr
        got = MultiAdapterModel(tmp_path / name).run(arrays, None if merge else "mine")["logits"]
        assert np.abs(got - want).max() < 1e-5
        ran = shell("verify", tmp_path / name, "--model", body, *own, "--json")
        assert ran.exit_code == 0, ran.stdout
        assert [c["name"] for c in json.loads(ran.stdout)["checks"] if c["name"].startswith("trained")] == [
            "trained" if merge else "trained mine"
        ]
    ran = shell("--model", body, "--adapter", adapter, "--output", tmp_path / "ckpt", *own, "--merge", "--format",
                "transformers")  # fmt: skip
    assert ran.exit_code == 0, ran.stderr
    assert np.abs(logits(MeanPooled.from_pretrained(tmp_path / "ckpt"), ids) - want).max() < 1e-5


def test_verify_finds_a_bundle_of_another_class(
    mean_pooled: tuple[SdctModel, Path], body: Path, tmp_path: Path
) -> None:
    """Exported around every check, as an older version did: the file is sound, and not what was trained."""
    _, adapter = mean_pooled
    stock = transformers.BertForSequenceClassification.from_pretrained(body, num_labels=3)
    forgotten = dataclasses.replace(SdctAdapter.load(adapter), trained_on=None)
    export_multi(stock, {"mine": forgotten}, tmp_path / "out")
    assert failed(tmp_path / "out") == []
    shutil.rmtree(tmp_path / "out" / "adapters" / "mine")
    shutil.copytree(adapter, tmp_path / "out" / "adapters" / "mine")
    told = (
        tmp_path / "out" / "adapters" / "mine" / "adapter_config.json"
    )  # it names the stock class; its numbers do not
    told.write_text(told.read_text().replace("pooled_class:MeanPooled", "transformers:BertForSequenceClassification"))
    raw = json.loads((tmp_path / "out" / "sdct_bundle.json").read_text())
    raw["adapters"]["mine"]["sha256"] = adapter_sha256(told.parent)
    (tmp_path / "out" / "sdct_bundle.json").write_text(json.dumps(raw))
    assert failed(tmp_path / "out") == ["trained mine"]
    assert shell("verify", tmp_path / "out").exit_code == 1


# -- parameters that no checkpoint holds -------------------------------------------


def test_fresh_parameters_that_nothing_saves_are_refused_before_training(distilbert: Path) -> None:
    base = transformers.DistilBertForSequenceClassification.from_pretrained(distilbert, num_labels=2)
    with pytest.raises(ConfigError, match=r"'pre_classifier.bias', 'pre_classifier.weight': .*modules_to_save="):
        get_sdct_model(base, config(["q_lin", "v_lin"], ["classifier"]))


@pytest.mark.parametrize("heads", [None, ["classifier", "pre_classifier"]])
def test_fresh_heads_are_saved_and_exported(distilbert: Path, heads: list[str] | None, tmp_path: Path) -> None:
    base = transformers.DistilBertForSequenceClassification.from_pretrained(distilbert, num_labels=2)
    model = trained(get_sdct_model(base, config(["q_lin", "v_lin"], heads)))
    model.save_adapter(tmp_path / "mine")
    adapter = SdctAdapter.load(tmp_path / "mine")
    assert set(adapter.saved) == {f"{m}.{p}" for m in ("classifier", "pre_classifier") for p in ("weight", "bias")}
    assert adapter.trained_on is not None
    assert set(adapter.trained_on.fresh_parameters or ()) == set(adapter.saved)
    assert adapter.trained_on.model_class == "transformers:DistilBertForSequenceClassification"
    ids, arrays = feeds()
    want = logits(model, ids)
    export_multi(distilbert, {"mine": adapter}, tmp_path / "multi")
    export_merged(distilbert, adapter, tmp_path / "merged")
    for name, choice in (("multi", "mine"), ("merged", None)):
        assert np.abs(MultiAdapterModel(tmp_path / name).run(arrays, choice)["logits"] - want).max() < 1e-5
        assert failed(tmp_path / name) == []
    torch.manual_seed(77)  # another random head
    again = transformers.DistilBertForSequenceClassification.from_pretrained(distilbert, num_labels=2)
    assert np.abs(logits(SdctModel.from_adapter(again, adapter), ids) - want).max() < 1e-5


def test_a_body_without_its_pooler(body: Path, tmp_path: Path) -> None:
    weights = body / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "pooler" not in k}, weights, metadata={"format": "pt"})
    base = transformers.BertForSequenceClassification.from_pretrained(body, num_labels=2)
    with pytest.raises(ConfigError, match=r"'bert.pooler.dense.bias'.*random"):
        get_sdct_model(base, config(["query"], ["classifier"]))
    model = trained(get_sdct_model(base, config(["query"])))
    ids, arrays = feeds()
    want = logits(model, ids)
    export_merged(body, model.adapter(), tmp_path / "out")
    assert np.abs(MultiAdapterModel(tmp_path / "out").run(arrays)["logits"] - want).max() < 1e-5
    # as a body alone the random pooler has no place in it
    with pytest.raises(ConfigError, match="add_pooling_layer=False"):
        get_sdct_model(transformers.BertModel.from_pretrained(body), SdctConfig(["query"], n_coefficients=40))
    plain = transformers.BertModel.from_pretrained(body, add_pooling_layer=False)
    features = trained(get_sdct_model(plain, SdctConfig(["query"], n_coefficients=40)))
    exported = export_multi(body, {"a": features.adapter()}, tmp_path / "features")
    assert [spec.name for spec in exported.outputs] == ["last_hidden_state"]
    assert failed(tmp_path / "features") == []


def test_two_fresh_loads_are_told_apart(body: Path, tmp_path: Path) -> None:
    """An adapter from before records were kept, whose head nothing saved: refused by name, not random."""
    base = transformers.BertForSequenceClassification.from_pretrained(body, num_labels=2)
    old = trained(get_sdct_model(base, config(["query"]))).adapter()
    old = dataclasses.replace(
        old, saved={}, trained_on=None, config=dataclasses.replace(old.config, modules_to_save=None)
    )
    old.save(tmp_path / "old")
    other = transformers.BertForSequenceClassification.from_pretrained(body, num_labels=2)
    for use in (
        lambda: SdctModel.from_adapter(other, tmp_path / "old"),
        lambda: export_multi(other, {"old": old}, tmp_path / "out"),
        lambda: export_merged(body, old, tmp_path / "out"),
    ):
        with pytest.raises(BaseMismatchError, match=r"classifier\.bias"):
            use()


def test_an_adapter_cannot_be_made_without_what_no_checkpoint_holds(body: Path) -> None:
    base = transformers.BertForSequenceClassification.from_pretrained(body, num_labels=2)
    adapter = get_sdct_model(base, config(["query"])).adapter()
    with pytest.raises(AdapterFormatError, match=r"does not hold 'classifier.bias'.*would be lost; name 'classifier'"):
        dataclasses.replace(adapter, saved={})


def test_fresh_is_what_transformers_did_not_read(body: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(body, num_labels=2)
    assert fresh_parameters(model) == ("classifier.bias", "classifier.weight")
    assert fresh_parameters(model.to(torch.float16)) == ("classifier.bias", "classifier.weight")
    assert fresh_parameters(transformers.BertModel.from_pretrained(body)) == ()
    assert fresh_parameters(transformers.BertModel(bert())) is None
    torch.manual_seed(0)
    tied = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=16))
    tied.save_pretrained(body.parent / "gpt2")
    assert fresh_parameters(transformers.AutoModelForCausalLM.from_pretrained(body.parent / "gpt2")) == ()


# -- the training probe -------------------------------------------


def changed(folder: Path, change: Callable[[nn.Module], None], target: Path) -> Path:
    model = transformers.BertModel.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(target)
    return target


def test_a_base_that_differs_where_no_hash_looks_is_refused(body: Path, tmp_path: Path) -> None:
    base = transformers.BertForSequenceClassification.from_pretrained(body, num_labels=2)
    adapter = trained(get_sdct_model(base, config(["query"]))).adapter()
    other = changed(body, lambda m: m.embeddings.LayerNorm.bias.add_(torch.linspace(-1, 1, 32)), tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="gives other outputs on this base than when it was trained"):
        export_multi(other, {"a": adapter}, tmp_path / "out")
    model = transformers.BertForSequenceClassification.from_pretrained(other, num_labels=2)
    with pytest.raises(BaseMismatchError, match="gives other outputs"):
        SdctModel.from_adapter(model, adapter)
    assert list(SdctModel.from_adapter(_fresh(body), adapter).adapters) == ["default"]


def _fresh(body: Path) -> nn.Module:
    return transformers.BertForSequenceClassification.from_pretrained(body, num_labels=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_in_another_type_is_the_same_base(body: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    base = transformers.BertForSequenceClassification.from_pretrained(body, num_labels=2, dtype=dtype)
    model = trained(get_sdct_model(base, config(["query", "value"])))
    model.save_adapter(tmp_path / "a")
    export_multi(body, {"a": tmp_path / "a"}, tmp_path / "out")
    assert failed(tmp_path / "out") == []
    assert "trained a" in [check.name for check in verify(tmp_path / "out").checks]


def test_saving_leaves_the_model_as_it_was(body: Path) -> None:
    model = trained(get_sdct_model(_fresh(body), config(["query"])))
    model.add_adapter("second", config(["value"]))
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    first, second = model.adapter("default"), model.adapter("second")
    assert model.active == "default"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert first.trained_on is not None
    assert second.trained_on is not None
    assert first.trained_on.probe is not None
    assert second.trained_on.probe is not None
    assert not np.array_equal(first.trained_on.probe.outputs["logits"], second.trained_on.probe.outputs["logits"])
    # what is recorded is what the model computes on the documented inputs
    ids = torch.from_numpy((scattered(16) * 60 >> 32).reshape(2, 8))
    ids[0, 0], ids[1, 5:] = 59, 0  # the last of the vocabulary, and padding
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = first.trained_on.probe.inputs
    assert np.array_equal(inputs["input_ids"], ids)
    assert np.array_equal(inputs["attention_mask"], mask)
    assert np.abs(logits(model, ids, mask).reshape(-1) - first.trained_on.probe.outputs["logits"]).max() < 1e-5
    model.merge()
    merged = model.adapter("default")
    assert merged.trained_on is not None
    assert merged.trained_on.probe is not None
    assert merged.trained_on.probe.difference({"logits": logits(model, ids, mask)}) < 1e-5
    with pytest.raises(ConfigError, match="call unmerge before saving another adapter"):
        model.adapter("second")


def test_a_model_that_cannot_be_probed_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    model = get_sdct_model(transformers.T5ForConditionalGeneration(transformers.T5Config(**small)),
                           SdctConfig(["q", "v"], n_coefficients=20))  # fmt: skip
    with pytest.warns(UserWarning, match="no training probe was recorded: T5ForConditionalGeneration does not run"):
        model.save_adapter(tmp_path / "a")
    record = SdctAdapter.load(tmp_path / "a").trained_on
    assert record is not None
    assert record.probe is None
    with warnings.catch_warnings():  # a plain module has no exporter either: nothing to say
        warnings.simplefilter("error")
        plain = get_sdct_model(nn.Sequential(nn.Linear(8, 8)), SdctConfig(["0"], n_coefficients=5)).adapter()
    assert plain.trained_on is not None
    assert plain.trained_on.model_class == class_name(nn.Sequential())


def test_images_are_probed_by_formula(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = transformers.ViTConfig(**SIZES, image_size=20, patch_size=5, num_labels=3)
    transformers.ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit")
    model = trained(get_sdct_model(base, SdctConfig(["q_proj"], n_coefficients=30)))
    model.save_adapter(tmp_path / "a")
    assert (tmp_path / "a" / "training_probe.safetensors").stat().st_size < 1000
    export_merged(tmp_path / "vit", tmp_path / "a", tmp_path / "out")
    assert failed(tmp_path / "out") == []


def test_the_difference_is_relative_and_sees_what_is_missing() -> None:
    want = np.arange(6, dtype=np.float32) / 100
    probe = TrainingProbe("float32", {"x": np.zeros((2, 3), np.int64)}, {"y": want}, {"y": (2, 3)})
    same = want.reshape(2, 3)
    assert probe.difference({"y": same}) == 0
    assert probe.difference({"y": same + 0.005}) == pytest.approx(0.2, rel=1e-4)
    offset = TrainingProbe("float32", {"x": np.zeros((2, 3), np.int64)}, {"y": want + 1000}, {"y": (2, 3)})
    assert offset.difference({"y": 1000 - same}) > 0.05  # an offset hides nothing
    assert probe.difference({"y": np.pad(same, ((0, 0), (0, 2)), constant_values=-1e30)}) == 0  # labels it has not
    for wrong in ({}, {"y": same[:, :2]}, {"y": same[:1]}, {"y": same * np.nan}):
        assert probe.difference(wrong) == np.inf
    assert len(positions((7, 1000))) <= 256
    assert positions((7, 1000))[-1] < 7000


# -- the files -------------------------------------------


def test_records_survive_the_folder_and_label_names_travel(body: Path, tmp_path: Path) -> None:
    base = transformers.BertForSequenceClassification.from_pretrained(body, id2label={0: "no", 1: "yes", 2: "maybe"})
    adapter = trained(get_sdct_model(base, config(["query"]))).adapter()
    adapter.save(tmp_path / "a")
    again = SdctAdapter.load(tmp_path / "a")
    assert again.trained_on is not None
    assert adapter.trained_on is not None
    assert again.trained_on.to_dict() == adapter.trained_on.to_dict()
    assert again.trained_on.id2label == ("no", "yes", "maybe")
    assert again.trained_on.probe is not None
    again.save(tmp_path / "b")
    for file in ("adapter_config.json", "training_probe.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(trained_on=3), "trained_on must hold"),
        (lambda raw: raw["trained_on"].update(model_class="BertModel"), "must be MODULE:CLASS"),
        (lambda raw: raw["trained_on"].update(fresh_parameters=["x.y", "classifier.bias"]), "'x.y'.*would be lost"),
        (lambda raw: raw["trained_on"].update(fresh_parameters="classifier"), "list of names"),
        (lambda raw: raw["trained_on"].update(id2label={"1": "a"}), "id2label"),
        (lambda raw: raw["trained_on"].update(dtype=None), "do not belong together"),
        (lambda raw: raw["trained_on"].update(dtype="int8"), "has dtype 'int8'"),
        (lambda raw: raw["trained_on"].pop("dtype"), "trained_on must hold"),
        (lambda raw: raw.pop("trained_on"), "trained_on must hold"),
    ],
)
def test_damaged_records_are_refused(body: Path, tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    trained(get_sdct_model(_fresh(body), config(["query"]))).save_adapter(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(AdapterFormatError, match=message):
        SdctAdapter.load(tmp_path / "a")


# -- the live model -------------------------------------------


def test_the_live_model_exports_with_its_adapters(body: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = trained(get_sdct_model(MeanPooled.from_pretrained(body, num_labels=3), config(["query"]), "first"))
    model.add_adapter("second", config(["query", "value"]))
    model.set_adapter("second")
    trained(model, 1)
    ids, arrays = feeds()
    want = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        want[name] = logits(model, ids)
    assert not np.allclose(want["first"], want["second"])
    export_multi(model, None, tmp_path / "all")
    runner = MultiAdapterModel(tmp_path / "all")
    assert sorted(runner.adapters) == ["first", "second"]
    for name, expected in want.items():
        assert np.abs(runner.run(arrays, name)["logits"] - expected).max() < 1e-5
    assert model.active == "second"
    assert np.array_equal(logits(model, ids), want["second"])  # left as it was
    assert all(check.ok for check in verify(tmp_path / "all", model).checks)
    assert list(export_multi(model, ["first"], tmp_path / "one").adapters) == ["first"]
    export_merged(model, None, tmp_path / "merged")  # the active one
    assert np.abs(MultiAdapterModel(tmp_path / "merged").run(arrays)["logits"] - want["second"]).max() < 1e-5
    export_merged(model, "first", tmp_path / "merged-first")
    assert np.abs(MultiAdapterModel(tmp_path / "merged-first").run(arrays)["logits"] - want["first"]).max() < 1e-5


def test_a_list_of_folders_takes_their_names(body: Path, tmp_path: Path) -> None:
    model = trained(get_sdct_model(_fresh(body), config(["query"])))
    model.save_adapter(tmp_path / "legal")
    model.save_adapter(tmp_path / "elsewhere" / "legal")
    assert list(export_multi(body, [tmp_path / "legal"], tmp_path / "out").adapters) == ["legal"]
    assert list(export_multi(body, str(tmp_path / "legal"), tmp_path / "out2").adapters) == ["legal"]
    with pytest.raises(ConfigError, match="two adapters are called 'legal'"):
        export_multi(body, [tmp_path / "legal", tmp_path / "elsewhere" / "legal"], tmp_path / "out3")
    with pytest.raises(ConfigError, match="at least one adapter"):
        export_multi(body, None, tmp_path / "out3")
    with pytest.raises(ConfigError, match="none is active"):
        export_merged(body, None, tmp_path / "out3")


# -- what a request may say, and what its answer is called ------------------------------------------------------------


def test_token_types_are_an_input_that_may_be_left_out(body: Path, tmp_path: Path) -> None:
    model = trained(get_sdct_model(_fresh(body), config(["query", "value"])))
    export_multi(body, {"a": model.adapter()}, tmp_path / "out")
    runner = MultiAdapterModel(tmp_path / "out")
    assert [spec.name for spec in runner.bundle.inputs] == ["input_ids", "token_type_ids", "attention_mask"]
    ids, arrays = feeds()
    kinds = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = np.asarray(model.eval()(ids, token_type_ids=kinds).logits)
    got = runner.run(arrays | {"token_type_ids": kinds.numpy()}, "a")["logits"]
    assert np.abs(got - want).max() < 1e-5
    without = runner.run(arrays, "a")["logits"]
    assert np.abs(without - logits(model, ids)).max() < 1e-5
    assert np.abs(without - got).max() > 1e-3


def test_pairs_of_texts_and_names_of_labels(body: Path, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefg"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(body / "tokenizer.json"))
    names = {0: "no", 1: "yes"}
    base = transformers.BertForSequenceClassification.from_pretrained(body, id2label=names)
    model = trained(get_sdct_model(base, config(["query"])))
    model.save_adapter(tmp_path / "a")
    export_multi(body, [tmp_path / "a"], tmp_path / "multi")
    export_merged(body, tmp_path / "a", tmp_path / "merged")
    ids = torch.tensor([[2, 4, 5, 3, 6, 3], [2, 7, 3, 8, 9, 3]])
    kinds = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        want = np.asarray(model.eval()(ids, token_type_ids=kinds).logits)
    texts = ["--text", "a b", "--text-pair", "c", "--text", "d", "--text-pair", "e f", "--json"]
    for bundle, choice in ((tmp_path / "multi", ["--adapter", "a"]), (tmp_path / "merged", [])):
        ran = shell("run", bundle, *texts, *choice)
        assert ran.exit_code == 0, ran.stderr
        answer = json.loads(ran.stdout)
        assert np.abs(np.array(answer["outputs"]["logits"]) - want).max() < 1e-5
        assert [row["name"] for row in answer["rows"]] == [names[int(i)] for i in want.argmax(-1)]
    ran = shell("run", tmp_path / "multi", "--text", "a", "--text", "b", "--text-pair", "c")
    assert ran.exit_code == 2
    assert "one --text-pair for each --text" in ran.stderr


def test_a_running_bundle_takes_no_adapter_of_another_class(
    mean_pooled: tuple[SdctModel, Path], body: Path, tmp_path: Path
) -> None:
    stock = trained(get_sdct_model(_fresh(body), config(["query", "value"])))
    export_multi(body, {"stock": stock.adapter()}, tmp_path / "out")
    model = MultiAdapterModel(tmp_path / "out")
    with pytest.raises(BaseMismatchError, match="trained on MeanPooled of pooled_class, this base is a BertForSeq"):
        model.load_adapter("mine", mean_pooled[1])
    assert list(model.adapters) == ["stock"]
    model.load_adapter("again", stock.adapter())


# -- what an adversary tried -------------------------------------------


def test_a_copied_base_hides_no_random_head(body: Path, tmp_path: Path) -> None:
    """A copy has lost transformers' marks: nothing is known of its head, and a merged file would be filled anyhow."""
    base = copy.deepcopy(_fresh(body))
    with pytest.warns(UserWarning, match=r"cannot tell which parameters .* the marks that from_pretrained leaves"):
        adapter = trained(get_sdct_model(base, config(["query"]))).adapter()
    assert adapter.trained_on is not None
    assert adapter.trained_on.fresh_parameters is None
    with pytest.raises(BaseMismatchError, match="neither the base nor the adapter holds 'classifier"):
        merge_checkpoint(body, adapter, tmp_path / "out")
    with pytest.raises(BaseMismatchError, match="classifier"):
        export_multi(body, {"a": adapter}, tmp_path / "out")


def test_merged_results_carry_the_class_and_the_names_of_the_training(
    mean_pooled: tuple[SdctModel, Path], body: Path, tmp_path: Path
) -> None:
    named = transformers.BertForSequenceClassification.from_pretrained(body, id2label={0: "pos", 1: "neg"})
    named.save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", id2label={0: "neg", 1: "pos"})
    adapter = trained(get_sdct_model(base, config(["query"]))).adapter()
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "ckpt")
    export_merged(tmp_path / "base", adapter, tmp_path / "onnx")
    for folder in ("ckpt", "onnx"):
        raw = json.loads((tmp_path / folder / "config.json").read_text())
        assert raw["id2label"] == {"0": "neg", "1": "pos"}
        assert raw["label2id"] == {"neg": 0, "pos": 1}
    merge_checkpoint(body, mean_pooled[1], tmp_path / "own", model_class="pooled_class:MeanPooled")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["architectures"] == ["MeanPooled"]


def test_a_class_of_a_script_is_not_the_stock_class(body: Path, tmp_path: Path) -> None:
    adapter = trained(get_sdct_model(_fresh(body), config(["query"]))).adapter()
    assert adapter.trained_on is not None
    script = dataclasses.replace(adapter.trained_on, model_class="__main__:BertForSequenceClassification")
    script_adapter = dataclasses.replace(adapter, trained_on=script)
    with pytest.raises(BaseMismatchError, match="was trained on BertForSequenceClassification of __main__"):
        merge_checkpoint(
            body, script_adapter, tmp_path / "out", model_class="transformers:BertForSequenceClassification"
        )
    with pytest.raises(ConfigError, match="move it to a module"):
        export_multi(body, {"a": script_adapter}, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_probe_is_that_of_the_rounded_values(body: Path, dtype: str) -> None:
    settings = SdctConfig(
        ["query", "value", "dense"], n_coefficients=300, task_type="SEQ_CLS", modules_to_save=["classifier"]
    )
    model = get_sdct_model(_fresh(body), settings)
    trained(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapter = model.adapter(dtype=dtype)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    SdctModel.from_adapter(_fresh(body), adapter)  # is not refused by its own probe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"formula.x": np.array([1 << 14, 1 << 14], np.int64)}), "'x' of shape"),
        (lambda t: t.update({"formula.pixel_values": np.array([1 << 14, 1 << 14], np.int64)}), "none it can have"),
        (lambda t: t.update({"input.labels": t["input.input_ids"]}), "inputs must be"),
        (lambda t: t.update({"input.input_ids": t["input.input_ids"].astype(np.float32)}), "inputs must be"),
        (lambda t: t.update({"input.input_ids": t["input.input_ids"][0]}), "inputs must be"),
        (lambda t: t.update({"input.input_ids": t["input.input_ids"] - 60}), "inputs must be"),
    ],
)
def test_hostile_probes_are_refused(body: Path, tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    trained(get_sdct_model(_fresh(body), config(["query"]))).save_adapter(tmp_path / "a")
    path = tmp_path / "a" / "training_probe.safetensors"
    tensors = read_safetensors(path)
    change(tensors)
    path.write_bytes(encode_safetensors(tensors))
    with pytest.raises(AdapterFormatError, match=message):
        SdctAdapter.load(tmp_path / "a")
    ids = np.full((2, 8), 10**6)
    tensors = {k: v for k, v in tensors.items() if not k.startswith(("formula", "input.labels"))}
    tensors |= {"input.input_ids": ids, "input.attention_mask": np.ones_like(ids)}
    path.write_bytes(encode_safetensors(tensors))
    with pytest.raises(BaseMismatchError, match="does not run on what the adapter's model ran on"):
        SdctModel.from_adapter(_fresh(body), tmp_path / "a")


def test_a_class_of_ones_own_has_the_task_it_is_derived_from(body: Path, tmp_path: Path) -> None:
    """Four labels, no task said, the head fresh: it is saved by itself, and verify sizes the base like the export."""
    base = MeanPooled.from_pretrained(body, num_labels=4)
    adapter = trained(get_sdct_model(base, SdctConfig(["query"], n_coefficients=40))).adapter()
    assert adapter.config.task_type == "SEQ_CLS"
    assert set(adapter.saved) == {"classifier.weight", "classifier.bias"}
    own = "pooled_class:MeanPooled"
    for name, adapters in (("multi", {"mine": adapter}), ("merged", adapter)):
        export = export_multi if name == "multi" else export_merged
        assert export(body, adapters, tmp_path / name, model_class=own).task == "SEQ_CLS"
        report = verify(tmp_path / name, body, model_class=own)
        assert [check.name for check in report.checks if not check.ok] == []
        assert all(check.error is None or np.isfinite(check.error) for check in report.checks)
