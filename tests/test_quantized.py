"""Bundles with a quantized base: against torch on the weights their files store, and against what they promise."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from families import FAMILIES, Family, edited, random_adapter, torch_rows
from onnx import numpy_helper
from quantized_file import products, with_stored_weights
from tiny_bundle import WORDS, write_tokenizer
from torch import nn
from trained_model import trained

from sdct_export import SdctAdapter, SdctConfig, export_merged, export_multi, get_sdct_model
from sdct_export.adapter.entries import Array
from sdct_export.adapter.training import TOLERANCES as TRAINING_TOLERANCES
from sdct_export.base.reference import sample_inputs
from sdct_export.bundle.description import BUNDLE_FILE, Bundle, file_sha256
from sdct_export.cli import main
from sdct_export.contract import MARGIN, Quantization
from sdct_export.engine.build import prepare_graph
from sdct_export.errors import AdapterFormatError, BaseMismatchError, ConfigError, UnsupportedError
from sdct_export.graph.quantization import QuantizeWeights, linear_layers
from sdct_export.graph.trace import trace
from sdct_export.quality import EXACT, MERGED, quality
from sdct_export.runtime import MultiAdapterModel
from sdct_export.verify import TOLERANCES, verify

ROWS = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {"a": -0.75}]
SLOW = pytest.mark.slow
SMALL = {"num_hidden_layers": 1}
TINY = "int4 moves this model's outputs"  # of models as small as these int4 moves the outputs by a third


@dataclasses.dataclass
class Exported:
    family: Family
    model: nn.Module  # float
    adapters: dict[str, SdctAdapter]
    bundle: Bundle


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    @functools.cache
    def make(name: str, quantize: str = "int8", **settings: Any) -> Exported:
        family = FAMILIES[name]
        model = family.model()
        labels = model.config.num_labels if family.saved else None
        adapters = {
            "a": random_adapter(family, model, 1, labels=labels),
            "b": random_adapter(family, model, 2, n=55, labels=labels and 2, scaling=0.3),
        }
        folder = tmp_path_factory.mktemp(name) / "bundle"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", TINY)
            bundle = export_multi(model, adapters, folder, quantize=quantize, **settings)
        return Exported(family, model, adapters, bundle)

    return make


def far(got: Array, want: Array) -> float:
    """Largest difference by the size of `want`; labels an adapter lacks are hidden in both."""
    shown = np.abs(want) < 1e30
    assert (np.abs(got[~shown].astype(np.float64)) > 1e3).all()
    return float(np.abs(got.astype(np.float64) - want)[shown].max() / max(1.0, np.abs(want[shown]).max()))


def run(model: MultiAdapterModel, inputs: Mapping[str, torch.Tensor], rows: Any) -> dict[str, Array]:
    return at_tokens(inputs, model.run({name: value.numpy() for name, value in inputs.items()}, rows))


def at_tokens(inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs with 0 at padding, where those of a graph with a cache mean nothing."""
    if "attention_mask" not in inputs:
        return dict(outputs)
    mask = inputs["attention_mask"].numpy()[:, :, None] != 0
    return {
        name: np.where(mask, array, np.float32(0)) if array.shape[:2] == mask.shape[:2] and array.ndim > 2 else array
        for name, array in outputs.items()
    }


QUICK = (("bert-classifier", "int8"), ("vit", "int4"), ("gpt2", "int8"))


@pytest.mark.parametrize(
    ("name", "quantize", "block_size"),
    [
        pytest.param(name, quantize, block_size, marks=() if (name, quantize) in QUICK else SLOW)
        for name in FAMILIES
        for quantize, block_size in (("int8", 32), ("int4", 16))
    ],
)
def test_in_float32_every_family_is_torch_on_the_stored_weights(
    exports: Callable[..., Exported], name: str, quantize: str, block_size: int
) -> None:
    made = exports(name, quantize, block_size=block_size, accuracy_level=1)
    inputs = sample_inputs(made.model, batch=len(ROWS), sequence=11, seed=3)
    model = with_stored_weights(made.model, made.bundle.model_path)
    want = at_tokens(inputs, torch_rows(model, inputs, ROWS, made.adapters))
    plain = at_tokens(inputs, torch_rows(made.model, inputs, ROWS, made.adapters))
    runner = MultiAdapterModel(made.bundle)
    got, base = run(runner, inputs, ROWS), run(runner, inputs, None)
    for output, value in got.items():
        assert far(value, want[output]) < 2e-5
        assert far(value, plain[output]) > 1e-3  # quantized it is
        for row, parts in enumerate(ROWS):
            same = np.array_equal(value[row], base[output][row])
            assert same == (not parts)
    assert made.bundle.quantization is not None
    assert made.bundle.quantization.rounding == 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("bert-classifier", "llama") else SLOW) for name in FAMILIES]
)
def test_rounded_inputs_stay_within_what_was_recorded(exports: Callable[..., Exported], name: str) -> None:
    made = exports(name)
    settings = made.bundle.quantization
    assert settings is not None
    assert (settings.bits, settings.block_size, settings.accuracy_level) == (8, 32, 4)
    assert set(settings.modules) == set(products(made.bundle.model_path))
    assert 1e-4 < settings.rounding < 0.1
    assert 1e-3 < settings.change < 0.2
    report = verify(made.bundle.path, made.model)
    assert report.ok, [check for check in report.checks if not check.ok]
    limits = {check.limit for check in report.checks if check.name.startswith("recorded")}
    assert limits == {TOLERANCES["float32"] + MARGIN * settings.rounding}
    assert all(check.error > 1e-4 for check in report.checks if check.name.startswith("recorded"))


@pytest.mark.parametrize(
    ("name", "quantize"),
    [("vit", "int8"), *(pytest.param("bert-classifier", q, marks=SLOW) for q in ("int8", "int4"))],
)
def test_float16_bundles_quantize_too(exports: Callable[..., Exported], name: str, quantize: str) -> None:
    made = exports(name, quantize, dtype="float16", accuracy_level=1)
    inputs = sample_inputs(made.model, batch=len(ROWS), sequence=11, seed=3)
    model = with_stored_weights(made.model, made.bundle.model_path, torch.float16)
    want = torch_rows(model, inputs, ROWS, made.adapters)
    got = run(MultiAdapterModel(made.bundle), inputs, ROWS)
    assert got["logits"].dtype == np.float16
    assert far(got["logits"], want["logits"]) < TOLERANCES["float16"]
    assert verify(made.bundle.path, made.model).ok


@pytest.mark.parametrize(
    ("name", "level"),
    [("bert-classifier", 4), ("gpt2", 1), *(pytest.param(n, i, marks=SLOW) for n, i in (("llama", 4), ("vit", 1)))],
)
def test_base_rows_are_the_quantized_base_alone_bit_for_bit(
    exports: Callable[..., Exported], name: str, level: int, tmp_path: Path
) -> None:
    settings = Quantization(8, 32, level)
    without = {"cache": False} if FAMILIES[name].task == "CAUSAL_LM" else {}
    made = exports(name, **without) if level == 4 else exports(name, "int8", accuracy_level=1, **without)
    graph = trace(made.model)
    heads = {parameter.rpartition(".")[0] for parameter in made.adapters["a"].saved}
    QuantizeWeights(linear_layers(made.model, heads, made.family.task), settings)(graph)
    ir.save(graph, tmp_path / "base.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "base.onnx"))
    inputs = sample_inputs(made.model, batch=len(ROWS), sequence=11, seed=3)
    found = session.run(["logits"], {key: value.numpy() for key, value in inputs.items()})
    alone = at_tokens(inputs, {"logits": found[0]})["logits"]
    mixed = run(MultiAdapterModel(made.bundle), inputs, ROWS)["logits"]
    assert not np.array_equal(mixed[0], alone[0])
    np.testing.assert_array_equal(mixed[1], alone[1])


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=SLOW)])
def test_a_tied_table_is_there_once_in_float_and_once_quantized(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model(tie_word_embeddings=True, **({} if name == "gpt2" else SMALL))
    model.tie_weights()
    bundle = export_multi(model, {"a": random_adapter(family, model, 1)}, tmp_path / "bundle", quantize="int8")
    table = model.get_input_embeddings().weight
    assert table is model.get_output_embeddings().weight
    arrays = {
        t.name: numpy_helper.to_array(t, str(bundle.path)) for t in onnx.load(bundle.model_path).graph.initializer
    }
    wide = [array for array in arrays.values() if array.dtype == np.float32 and array.size == table.numel()]
    assert len(wide) == 1
    np.testing.assert_array_equal(wide[0], table.detach().numpy())  # what is looked up
    assert arrays["lm_head.weight.packed"].dtype == np.uint8
    assert "lm_head" in (bundle.quantization or Quantization(8)).modules
    assert verify(bundle.path, model).ok


def test_heads_stay_float(exports: Callable[..., Exported]) -> None:
    made = exports("bert-classifier")
    assert made.bundle.quantization is not None
    assert not any(name.startswith("classifier") for name in made.bundle.quantization.modules)
    assert any(name == "bert.pooler.dense" for name in made.bundle.quantization.modules)
    assert "classifier" not in linear_layers(made.model, (), "SEQ_CLS")  # nor where no adapter saves it
    assert {"score", "lm_head"}.isdisjoint(linear_layers(FAMILIES["llama"].model(), (), "SEQ_CLS"))
    assert linear_layers(FAMILIES["llama"].model(), (), "CAUSAL_LM")[-1] == "lm_head"
    assert "lm_head" not in linear_layers(FAMILIES["llama"].model(), {"lm_head"}, "CAUSAL_LM")


def test_merged_first(exports: Callable[..., Exported], tmp_path: Path) -> None:
    made = exports("vit", "int4", block_size=16, accuracy_level=1)
    bundle = export_merged(made.model, made.adapters["a"], tmp_path / "m", quantize="int8", accuracy_level=1)
    merged = edited(made.model, {"a": 1.0}, made.adapters)
    inputs = sample_inputs(made.model, batch=3, sequence=9, seed=4)
    with torch.no_grad():
        want = with_stored_weights(merged, bundle.model_path)(**inputs).logits.numpy()
        plain = merged(**inputs).logits.numpy()
    got = run(MultiAdapterModel(bundle), inputs, None)["logits"]
    assert far(got, want) < 2e-5
    assert far(got, plain) > 1e-4
    assert verify(bundle.path, made.model).ok


def test_merging_nothing_is_noticed(tmp_path: Path) -> None:
    """Quantization alone is no effect of an adapter."""
    model = FAMILIES["vit"].model()
    nothing = random_adapter(FAMILIES["vit"], model, 1, scaling=1e-9)
    bundle = export_merged(model, nothing, tmp_path / "m", quantize="int8")
    report = verify(bundle.path, model)
    assert [check.name for check in report.checks if not check.ok] == ["effect of merging"]


def test_verify_finds_a_wrong_layer(exports: Callable[..., Exported], tmp_path: Path) -> None:
    """A layer with the scales of another one, and hashes that say it is right."""
    made = exports("llama")
    model = onnx.load(made.bundle.model_path)
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    one, other = (f"model.layers.{i}.mlp.down_proj.weight.packed" for i in (0, 1))
    arrays[one].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(arrays[other]), one))
    copied = tmp_path / "bundle"
    shutil.copytree(made.bundle.path, copied)
    (copied / "model.onnx.data").unlink()
    onnx.save(model, copied / "model.onnx")
    raw = json.loads((copied / BUNDLE_FILE).read_text())
    (copied / BUNDLE_FILE).write_text(
        json.dumps(raw | {"model_sha256": file_sha256(copied / "model.onnx"), "data_sha256": None})
    )
    failed = [check.name for check in verify(copied).checks if not check.ok]
    assert {"recorded base", "recorded a", "recorded mixed"} <= set(failed)


def tuned(folder: Path, seed: int) -> nn.Module:
    """A base, and in `folder` an adapter that records its training."""
    family = FAMILIES["bert-classifier"]
    base = family.model()
    config = SdctConfig(["query", "value"], n_coefficients=40, modules_to_save=["classifier"], task_type="SEQ_CLS")
    trained(get_sdct_model(copy.deepcopy(base), config), seed).save_adapter(folder)
    return base


def test_training_is_compared_within_what_quantization_changed(tmp_path: Path) -> None:
    base = tuned(tmp_path / "one", 0)
    tuned(tmp_path / "two", 1)
    bundle = export_multi(base, [tmp_path / "one"], tmp_path / "bundle", quantize="int8")
    assert bundle.quantization is not None
    limit = bundle.training_limit("float32")
    assert limit == TRAINING_TOLERANCES["float32"] + MARGIN * bundle.quantization.change
    assert TRAINING_TOLERANCES["float32"] < limit < 0.5
    report = verify(bundle.path, base)
    assert report.ok
    (check,) = (check for check in report.checks if check.name == "trained one")
    assert check.limit == limit
    model = MultiAdapterModel(bundle)
    model.load_adapter("two", tmp_path / "two")
    two = SdctAdapter.load(tmp_path / "two")
    assert two.trained_on is not None
    assert two.trained_on.probe is not None
    outputs = {name: value * np.float32(-1) for name, value in two.trained_on.probe.outputs.items()}
    probe = dataclasses.replace(two.trained_on.probe, outputs=outputs)
    wrong = dataclasses.replace(two, trained_on=dataclasses.replace(two.trained_on, probe=probe))
    with pytest.raises(BaseMismatchError, match="other outputs in this bundle than when it was trained"):
        model.load_adapter("three", wrong)


def test_a_check_that_finds_little_is_told(tmp_path: Path) -> None:
    family = FAMILIES["vit"]
    model = family.model()
    with pytest.warns(UserWarning, match=r"int4 moves this model's outputs by \d+% of their size"):
        export_multi(model, {"a": random_adapter(family, model, 1)}, tmp_path / "b", quantize="int4", block_size=256)


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model = family.model()
    adapters = {"a": random_adapter(family, model, 1)}
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "quantize must be one of int8, int4; got 'int2'", {"quantize": "int2"}),
        (
            ConfigError,
            "block_size must be one of 16, 32, 64, 128, 256, got 24",
            {"quantize": "int8", "block_size": 24},
        ),
        (ConfigError, "accuracy_level must be one of 1, 4, got 2", {"quantize": "int4", "accuracy_level": 2}),
        (ConfigError, "are for quantized exports", {"block_size": 32}),
        (UnsupportedError, "not bfloat16", {"quantize": "int8", "dtype": "bfloat16"}),
        (UnsupportedError, "MatMulNBits TensorRT does not have", {"quantize": "int8", "target": "tensorrt"}),
    ]
    for kind, words, settings in refused:
        with pytest.raises(kind, match=words):
            export_multi(model, adapters, tmp_path / "b", **settings)
        with pytest.raises(kind, match=words):
            export_merged(model, adapters["a"], tmp_path / "b", **settings)
    assert not list(tmp_path.iterdir())


def test_tensorrt_is_refused(exports: Callable[..., Exported]) -> None:
    with pytest.raises(UnsupportedError, match="MatMulNBits TensorRT does not have"):
        prepare_graph(exports("bert-classifier").bundle)


def test_descriptions_are_checked(exports: Callable[..., Exported], tmp_path: Path) -> None:
    raw = json.loads((exports("bert-classifier").bundle.path / BUNDLE_FILE).read_text())
    for field, value in (
        ("bits", 3), ("bits", True), ("block_size", 24), ("accuracy_level", "4"), ("change", -1.0), ("change", "x"),
        ("rounding", float("inf")), ("rounding", None), ("modules", [1]), ("modules", None), ("other", 1),
    ):  # fmt: skip
        changed = raw | {"quantization": raw["quantization"] | {field: value}}
        (tmp_path / BUNDLE_FILE).write_text(json.dumps(changed))
        with pytest.raises(AdapterFormatError, match="damaged description"):
            Bundle.load(tmp_path)
    old = {name: value for name, value in raw.items() if name != "quantization"}
    (tmp_path / BUNDLE_FILE).write_text(json.dumps(old))
    assert Bundle.load(tmp_path).quantization is None


TEXTS = [" ".join(WORDS[(i * 7 + j * (i + 3)) % len(WORDS)] for j in range(3 + i % 9)) for i in range(12)]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, SdctAdapter]:
    """A base checkpoint with a tokenizer, a quantized bundle of it, and its adapter."""
    work = tmp_path_factory.mktemp("language")
    family = FAMILIES["llama"]
    model = family.model(**SMALL)
    model.save_pretrained(work / "base")
    write_tokenizer(work / "base")
    adapter = random_adapter(family, model, 1)
    adapter.save(work / "a")
    arguments = ["--model", work / "base", "--adapter", work / "a", "--output", work / "bundle", "--quantize", "int8"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--block-size", "16", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quantization"] == "int8"
    return work / "base", work / "bundle", adapter


def test_quality_is_what_torch_says(language: tuple[Path, Path, SdctAdapter]) -> None:
    base, bundle, adapter = language
    report = quality(bundle, base, TEXTS, progress=False)
    assert [(row.adapter, row.method) for row in report.rows] == [("a", EXACT), ("a", MERGED)]
    assert (report.texts, report.quantization, report.block_size) == (len(set(TEXTS)), "int8", 16)
    tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    model = edited(transformers.AutoModelForCausalLM.from_pretrained(base).eval(), {"a": 1.0}, {"a": adapter})
    runner = MultiAdapterModel(bundle)
    wants, gots, nats, own = [], [], [], []
    for text in dict.fromkeys(TEXTS):
        ids = torch.tensor([tokenizer.encode(text).ids])
        feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            want = model(**feeds).logits[0]
        got = torch.from_numpy(run(runner, feeds, "a")["logits"][0])
        wants.append(want)
        gots.append(got)
        nats.append(nn.functional.cross_entropy(want[:-1].double(), ids[0, 1:], reduction="none"))
        own.append(nn.functional.cross_entropy(got[:-1].double(), ids[0, 1:], reduction="none"))
    want, got = torch.cat(wants).double(), torch.cat(gots).double()
    exact = report.rows[0]
    assert report.answers == len(want)
    assert exact.float_perplexity == pytest.approx(float(torch.cat(nats).mean().exp()), rel=1e-4)
    assert exact.perplexity == pytest.approx(float(torch.cat(own).mean().exp()), rel=1e-3)
    assert exact.error == pytest.approx(float((got - want).pow(2).mean().sqrt() / want.std()), rel=0.05)
    assert exact.largest == pytest.approx(float((got - want).abs().max() / want.std()), rel=0.2)
    assert exact.agreement == pytest.approx(float((got.argmax(-1) == want.argmax(-1)).double().mean()), abs=0.03)
    merged = report.rows[1]
    assert 0.3 < merged.error / exact.error < 3  # neither is better by far
    assert merged.error != exact.error


def test_bench_on_the_command_line(language: tuple[Path, Path, SdctAdapter], tmp_path: Path) -> None:
    base, bundle, _ = language
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    given = ["bench", str(bundle), "--quality", "--model", str(base), "--texts", str(texts)]
    result = CliRunner().invoke(main, [*given, "--json", "--max-tokens", "4"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["answers"] == sum(min(4, len(text.split()) + 2) for text in dict.fromkeys(TEXTS))
    assert [row["method"] for row in told["rows"]] == [EXACT, MERGED]
    assert all(0 < row["error"] < 0.2 for row in told["rows"])
    shown = CliRunner().invoke(main, given)
    assert shown.stdout.splitlines()[0].split("\t")[1] == "int8 model"
    assert len(shown.stdout.splitlines()) == 3
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    for arguments, words in (
        ([*given[:2], *given[3:]], "say what to measure"),
        (given[:5], "missing option --texts"),
        ([*given, "--adapter", "b"], "has no adapter 'b'; it has a"),
        ([*given[:-1], str(empty)], "there is no text"),
        ([*given[:-1], str(tmp_path / "none")], "none"),
    ):
        failed = CliRunner().invoke(main, arguments)
        assert failed.exit_code in (1, 2)
        assert words in failed.output
        assert failed.output.strip().splitlines()[-1].lower().startswith("error: ")


def test_bench_wants_a_quantized_bundle_of_this_base(language: tuple[Path, Path, SdctAdapter], tmp_path: Path) -> None:
    base, bundle, _ = language
    raw = json.loads((bundle / BUNDLE_FILE).read_text())
    for change, words in (({"quantization": None}, "is not quantized"), ({"kind": "merged"}, "is merged")):
        (tmp_path / BUNDLE_FILE).write_text(json.dumps(raw | change))
        with pytest.raises(ConfigError, match=f"{words}; export"):
            quality(tmp_path, base, TEXTS)
    other = FAMILIES["llama"].model(**SMALL)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight += 0.1
    with pytest.raises(BaseMismatchError, match="exported from another base"):
        quality(bundle, other, TEXTS)


def test_inspect_and_wrong_options(language: tuple[Path, Path, SdctAdapter], tmp_path: Path) -> None:
    base, bundle, _ = language
    shown = CliRunner().invoke(main, ["inspect", str(bundle)])
    assert "quantization: int8 in 8 linear layers, block_size 16, accuracy_level 4; at export it moved" in shown.output
    told = json.loads(CliRunner().invoke(main, ["inspect", str(bundle), "--json"]).stdout)
    assert told["quantization"]["bits"] == 8
    export = ["--model", str(base), "--adapter", f"{base.parent / 'a'}", "--output", str(tmp_path / "o")]
    for options, words in (
        (["--quantize", "int2"], "Invalid value for '--quantize': 'int2' is not one of 'int8', 'int4'."),
        (["--quantize", "int8", "--block-size", "24"], "Invalid value for '--block-size'"),
        (["--quantize", "int8", "--accuracy-level", "2"], "Invalid value for '--accuracy-level'"),
        (["--block-size", "32"], "--block-size and --accuracy-level are for --quantize"),
        (["--quantize", "int8", "--dtype", "bfloat16"], "not bfloat16"),
        (["--quantize", "int8", "--format", "tensorrt"], "--quantize is for ONNX Runtime"),
        (["--quantize", "int8", "--merge", "--format", "transformers"], "--quantize is for ONNX Runtime"),
    ):
        failed = CliRunner().invoke(main, [*export, *options])
        assert failed.exit_code in (1, 2), failed.output
        assert words in failed.output.splitlines()[-1]
    assert not (tmp_path / "o").exists()
