"""Every family against torch: multi-adapter rows, base rows to the last bit, merged models, float16, and bad input."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from families import FAMILIES, Family, edited, feeds, random_adapter, target_shapes, torch_rows
from torch import nn

import sdct_export.export as export_module
from sdct_export import SdctAdapter, export_merged, export_multi
from sdct_export.adapter.entries import Array, SdctEntries
from sdct_export.base.reference import run_rows, sample_inputs
from sdct_export.bundle.description import Bundle, file_sha256
from sdct_export.bundle.probe import Probe
from sdct_export.errors import AdapterFormatError, BaseMismatchError, ConfigError, OutputError, UnsupportedError
from sdct_export.native import find_library, register_operator

ROWS = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {"c": -0.75, "b": 0.5, "a": 0.25}]


@dataclasses.dataclass
class Exported:
    """A family's model, its adapters, and its base and multi-adapter graphs from one and the same trace."""

    family: Family
    model: nn.Module
    adapters: dict[str, SdctAdapter]
    bundle: Bundle
    base: onnxruntime.InferenceSession
    multi: onnxruntime.InferenceSession

    def run(self, inputs: Mapping[str, Any], rows: list[Any]) -> dict[str, Array]:
        arrays = {name: np.asarray(value) for name, value in inputs.items()} | feeds(self.bundle, rows, self.adapters)
        return named(self.multi, arrays)


# the operator joins where it is installed or built (SDCT_LIBRARY_PATH); test_native says so where it is not
BACKENDS = ["portable", *(["operator"] if find_library("sdct_onnxruntime") else [])]


def session(path: Path, backend: str = "portable") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if backend == "operator":
        assert register_operator(options)
    return onnxruntime.InferenceSession(str(path), options)


def named(runner: onnxruntime.InferenceSession, arrays: Mapping[str, Any]) -> dict[str, Array]:
    values = runner.run(None, {name: np.asarray(value) for name, value in arrays.items()})
    return {output.name: value for output, value in zip(runner.get_outputs(), values, strict=True)}


def make(family: Family, folder: Path, **overrides: Any) -> Exported:
    model = family.model(**overrides)
    labels = model.config.num_labels if family.saved else None
    # b has more coefficients and fewer labels, c adapts one module only and has no head
    first = next(iter(target_shapes(family, model)))
    adapters = {
        "a": random_adapter(family, model, 1, labels=labels),
        "b": random_adapter(family, model, 2, n=55, labels=labels and 2, scaling=0.3),
        "c": random_adapter(family, model, 3, n=7, modules=[first]),
    }
    trace = export_module.trace

    def traced(traced_model: nn.Module) -> ir.Model:
        graph = trace(traced_model)
        ir.save(graph, folder / "base.onnx")
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "trace", traced)
        bundle = export_multi(model, adapters, folder / "bundle", cache=False)  # with one: tests/graph/test_cache.py
    return Exported(family, model, adapters, bundle, session(folder / "base.onnx"), session(bundle.model_path))


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A family's exports by name, made once."""
    return functools.cache(lambda name: make(FAMILIES[name], tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session", params=[(name, backend) for name in FAMILIES for backend in BACKENDS], ids="-".join)
def exported(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    name, backend = request.param
    made = exports(name)
    return dataclasses.replace(made, multi=session(made.bundle.model_path, backend))


@pytest.fixture(scope="session")
def classifier(exports: Callable[[str], Exported]) -> Exported:
    return exports("bert-classifier")


def assert_close(actual: Array, want: Array, atol: float = 1e-4) -> None:
    """Within `atol`, labels an adapter lacks apart: those are far below all others in both."""
    masked = want < -1e30
    np.testing.assert_array_equal(actual < -1e30, masked)
    np.testing.assert_allclose(np.where(masked, 0, actual), np.where(masked, 0, want), atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [(5, 11), (5, 1)], ids=["tokens", "one token"])
def test_mixed_blended_and_base_rows_equal_torch(exported: Exported, shape: tuple[int, int]) -> None:
    inputs = sample_inputs(exported.model, batch=shape[0], sequence=shape[1], seed=3)
    got = exported.run(inputs, ROWS)
    want, base = torch_rows(exported.model, inputs, ROWS, exported.adapters), named(exported.base, inputs)
    assert set(got) == set(want) == {output.name for output in exported.bundle.outputs}
    for name, expected in want.items():
        assert_close(got[name], expected)
        for row, parts in enumerate(ROWS):
            if parts:
                assert np.abs(expected[row] - base[name][row]).max() > 0.02, "the adapters change too little to test"
            else:
                assert got[name][row].tobytes() == base[name][row].tobytes()


@pytest.mark.parametrize("scale", [-1.5, -0.01, 3.0])
def test_labels_an_adapter_lacks_are_never_picked(exports: Callable[[str], Exported], scale: float) -> None:
    exported = exports("bert-classifier")
    inputs = sample_inputs(exported.model, batch=3, sequence=6, seed=6)
    rows: list[dict[str, float]] = [{"b": scale}, {"a": 1.0, "b": scale}, {"a": scale}]
    got, want = exported.run(inputs, rows)["logits"], torch_rows(exported.model, inputs, rows, exported.adapters)
    assert (got[:2, 2:] == np.finfo(np.float32).min / 2).all()
    assert (got[:2].argmax(-1) < 2).all()
    np.testing.assert_allclose(got[:2, :2], want["logits"][:2, :2], atol=1e-4)
    np.testing.assert_allclose(got[2], want["logits"][2], atol=1e-4)
    ours = run_rows(exported.model, inputs, [list(row.items()) for row in rows], exported.adapters)
    np.testing.assert_allclose(ours["logits"].numpy(), got, atol=1e-4)


def test_weights_that_give_nan_are_refused(classifier: Exported, tmp_path: Path) -> None:
    model = copy.deepcopy(classifier.model)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(BaseMismatchError, match="NaN or infinite numbers in 'logits' of the base model"):
        export_multi(model, {"a": dataclasses.replace(classifier.adapters["a"], base_hash=None)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(1, 6), (4, 17)])
def test_a_base_batch_equals_the_base_export_bit_for_bit(exported: Exported, shape: tuple[int, int]) -> None:
    inputs = sample_inputs(exported.model, batch=shape[0], sequence=shape[1], seed=4)
    base = named(exported.base, inputs)
    for name, value in exported.run(inputs, [{}] * shape[0]).items():
        assert value.tobytes() == base[name].tobytes()


def test_a_row_does_not_depend_on_the_rows_beside_it(exported: Exported) -> None:
    inputs = sample_inputs(exported.model, batch=5, sequence=9, seed=5)
    together = exported.run(inputs, ROWS)
    for row in range(5):
        alone = exported.run({name: value[row : row + 1] for name, value in inputs.items()}, [ROWS[row]])
        for name, value in alone.items():
            assert_close(together[name][row], value[0], 1e-5)


def test_the_description_holds_what_the_graph_holds(exported: Exported) -> None:
    bundle = exported.bundle
    assert Bundle.load(bundle.path) == bundle
    assert (bundle.kind, bundle.task, bundle.dtype) == ("multi", exported.family.task, "float32")
    assert bundle.base_architecture == exported.family.architecture
    inputs = {i.name: tuple(i.shape) for i in exported.multi.get_inputs()}
    assert {spec.name: spec.shape for spec in bundle.inputs}.items() <= inputs.items()
    assert [(o.name, tuple(o.shape)) for o in exported.multi.get_outputs()] == [
        (spec.name, spec.shape) for spec in bundle.outputs
    ]
    assert sorted(m for g in bundle.groups for m in g.modules) == sorted(
        target_shapes(exported.family, exported.model)
    )
    for group in bundle.groups:
        assert inputs[f"sdct.{group.name}.values"] == ("slots", sum(group.capacity))
        assert set(group.capacity) == {55}
    assert tuple(head.module for head in bundle.heads) == exported.family.saved
    labels = exported.model.config.num_labels if exported.family.saved else None
    assert {n: r.labels for n, r in bundle.adapters.items()} == {"a": labels, "b": labels and 2, "c": None}
    assert bundle.model_sha256 == file_sha256(bundle.model_path)
    for name in bundle.adapters:
        bundle.check_adapter(name)
    onnx.checker.check_model(str(bundle.model_path), full_check=False)


def test_the_file_tells_nothing_of_the_machine_that_made_it(exported: Exported) -> None:
    data = exported.bundle.model_path.read_bytes()
    for trace in (b"site-packages", b".py", str(Path.home()).encode(), str(exported.bundle.path).encode()):
        assert trace not in data


def test_the_probe_records_what_torch_computes(exported: Exported) -> None:
    probe = Probe.read(exported.bundle.path / "probe.safetensors")
    assert [case.name for case in probe.cases] == ["base", "a", "b", "c", "mixed", "blend"]
    inputs = {name: torch.from_numpy(array.copy()) for name, array in probe.inputs.items()}
    for case in probe.cases:
        rows = [dict(row) for row in case.rows]
        for name, want in torch_rows(exported.model, inputs, rows, exported.adapters).items():
            assert_close(case.outputs[name], probe.sample(name, want), 1e-5)
    assert max(len(set(case.rows)) for case in probe.cases) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_the_merged_model_equals_torch(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.model()
    adapter = random_adapter(family, model, 1, labels=model.config.num_labels if family.saved else None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bundle = export_merged(model, adapter, tmp_path / "out", cache=False)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert (bundle.kind, bundle.groups, bundle.heads, dict(bundle.adapters)) == ("merged", (), (), {})
    inputs = sample_inputs(model, batch=3, sequence=7, seed=6)
    runner = session(bundle.model_path)
    assert {i.name for i in runner.get_inputs()} == set(inputs) == {spec.name for spec in bundle.inputs}
    want, base = (torch_rows(model, inputs, [row] * 3, {"a": adapter}) for row in ({"a": 1.0}, {}))
    for output, value in named(runner, inputs).items():
        assert_close(value, want[output])
        assert np.abs(value - base[output]).max() > 0.05


def test_float16_multi_and_merged_stay_near_float32(classifier: Exported, tmp_path: Path) -> None:
    adapters = classifier.adapters
    bundle = export_multi(classifier.model, adapters, tmp_path / "multi", dtype="float16")
    inputs = sample_inputs(classifier.model, batch=5, sequence=11, seed=3)
    want, base = (torch_rows(classifier.model, inputs, rows, adapters) for rows in (ROWS, [{}] * 5))
    got = named(session(bundle.model_path), inputs | feeds(bundle, ROWS, adapters))["logits"]
    assert got.dtype == np.float16
    assert bundle.outputs[0].dtype == bundle.dtype == "float16"
    masked = want["logits"] < -1e30
    np.testing.assert_array_equal(got < -4000, masked)
    np.testing.assert_allclose(got[~masked].astype(np.float32), want["logits"][~masked], atol=1e-2)
    assert np.abs(want["logits"] - base["logits"]).max(axis=1)[[0, 2, 3, 4]].min() > 0.1
    weights = onnx.load(bundle.model_path, load_external_data=False).graph.initializer
    assert not [w.name for w in weights if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) > 1]

    merged = export_merged(classifier.model, adapters["a"], tmp_path / "merged", dtype="float16")
    got = named(session(merged.model_path), inputs)["logits"]
    want = torch_rows(classifier.model, inputs, [{"a": 1.0}] * 5, adapters)
    np.testing.assert_allclose(got.astype(np.float32), want["logits"], atol=1e-2)


def test_images_in_float16_exported_silently_from_a_model_in_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    family = FAMILIES["vit"]
    model = family.model().train()
    adapters = {"a": random_adapter(family, model, 1, labels=5)}
    bundle = export_multi(model, adapters, tmp_path / "out", dtype="float16")
    assert capfd.readouterr() == ("", "")
    assert model.training
    model.eval()
    assert [(spec.name, spec.dtype, spec.shape) for spec in bundle.inputs] == [
        ("pixel_values", "float16", ("batch", 3, 12, 12))
    ]
    inputs = sample_inputs(model, batch=3, sequence=0, seed=3)
    rows = [{"a": 1.0}, {}, {"a": 0.5}]
    want = torch_rows(model, inputs, rows, adapters)["logits"]
    halves = {"pixel_values": inputs["pixel_values"].half().numpy()}
    got = named(session(bundle.model_path), halves | feeds(bundle, rows, adapters))["logits"]
    np.testing.assert_allclose(got.astype(np.float32), want, atol=2e-2)


def test_labels_an_adapter_lacks_are_never_picked_even_without_a_bias_in_the_base(tmp_path: Path) -> None:
    family = dataclasses.replace(
        FAMILIES["llama"], task="SEQ_CLS", architecture="LlamaForSequenceClassification", saved=("score",)
    )
    model = family.model(num_labels=4)
    assert model.score.bias is None
    adapters = {n: random_adapter(family, model, i, labels=k) for i, (n, k) in enumerate({"a": 4, "b": 2}.items())}
    for name, adapter in adapters.items():
        saved = {"score.weight": adapter.saved["score.weight"]}
        adapters[name] = dataclasses.replace(adapter, saved=saved)
    bundle = export_multi(model, adapters, tmp_path / "out")
    inputs = sample_inputs(model, batch=4, sequence=7, seed=8)
    rows = [{"b": 1.0}, {"a": 1.0}, {}, {"a": 0.5, "b": 0.5}]
    got = named(session(bundle.model_path), inputs | feeds(bundle, rows, adapters))["logits"]
    assert (got[0, 2:] < -1e38).all()
    assert (got[3, 2:] < -1e37).all()
    whole = edited(model, {"b": 1.0}, {"b": adapters["b"]})
    with torch.no_grad():
        want = whole(**{name: value[:1] for name, value in inputs.items()}).logits.numpy()
    np.testing.assert_allclose(got[0, :2], want[0, :2], atol=1e-4)
    recorded = {case.name: case.outputs["logits"] for case in Probe.read(bundle.path / "probe.safetensors").cases}
    assert (recorded["b"].reshape(-1, 4)[:, 2:] < -1e38).all()
    softmax = np.exp(got[0] - got[0].max()) / np.exp(got[0] - got[0].max()).sum()
    assert (softmax[2:] == 0).all()


def test_a_checkpoint_without_a_head_gets_one_for_the_most_labels(tmp_path: Path) -> None:
    family = FAMILIES["bert-classifier"]
    FAMILIES["bert"].model().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "secret.bin").write_bytes(b"weights of another format")
    model = family.model(num_labels=3)
    with torch.no_grad():
        model.bert.load_state_dict(FAMILIES["bert"].model().state_dict())
    for parameter in model.classifier.parameters():
        nn.init.zeros_(parameter)
    adapters = {
        "three": random_adapter(family, model, 1, labels=3),
        "two": random_adapter(family, model, 2, labels=2),
    }
    adapters["three"].save(tmp_path / "three")
    bundle = export_multi(
        tmp_path / "base", {"three": tmp_path / "three", "two": adapters["two"]}, tmp_path / "bundle"
    )
    assert bundle.task == "SEQ_CLS"
    assert [(head.module, head.d_out) for head in bundle.heads] == [("classifier", 3)]
    assert {name: record.labels for name, record in bundle.adapters.items()} == {"three": 3, "two": 2}
    assert json.loads((bundle.path / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    assert (bundle.path / "tokenizer.json").read_text() == "{}"
    assert not (bundle.path / "secret.bin").exists()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (bundle.adapter_path("three") / file).read_bytes() == (tmp_path / "three" / file).read_bytes()
    inputs = sample_inputs(model, batch=3, sequence=7, seed=9)
    rows = [{"three": 1.0}, {"two": 1.0}, {}]
    got = named(session(bundle.model_path), inputs | feeds(bundle, rows, adapters))["logits"]
    assert_close(got, torch_rows(model, inputs, rows, adapters)["logits"])
    assert (got[2] == 0).all()
    merged = export_merged(tmp_path / "base", adapters["two"], tmp_path / "merged")
    assert merged.outputs[0].shape == ("batch", 2)
    np.testing.assert_allclose(named(session(merged.model_path), inputs)["logits"][1], got[1, :2], atol=1e-4)


def test_weights_lie_beside_the_graph(classifier: Exported) -> None:
    size = sum(parameter.numel() * 4 for parameter in classifier.model.parameters())
    assert classifier.bundle.model_path.with_suffix(".onnx.data").stat().st_size > 0.9 * size
    model = onnx.load(classifier.bundle.model_path, load_external_data=False)
    inline = [w.name for w in model.graph.initializer if not w.external_data and np.prod(w.dims) > 128]
    assert inline == []


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    model = family.model(vocab_size=12_000_000)
    adapters = {"a": random_adapter(family, model, 1)}
    bundle = export_multi(model, adapters, tmp_path / "out")
    assert bundle.model_path.with_suffix(".onnx.data").stat().st_size > 2 << 30
    inputs = sample_inputs(model, batch=2, sequence=5)
    got = named(session(bundle.model_path), inputs | feeds(bundle, [{"a": 1.0}, {}], adapters))
    for name, want in torch_rows(model, inputs, [{"a": 1.0}, {}], adapters).items():
        assert_close(got[name], want)


@pytest.fixture
def small() -> tuple[Family, nn.Module, SdctAdapter]:
    family = FAMILIES["bert-classifier"]
    model = family.model()
    return family, model, random_adapter(family, model, 1, labels=4)


@pytest.fixture
def no_tracing(classifier: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier's graph from before, where a test needs some graph and not its tracing."""
    base = classifier.bundle.path.parent / "base.onnx"
    monkeypatch.setattr(export_module, "trace", lambda _: ir.load(base))


def refuses(error: type[Exception], match: str, model: Any, adapters: Any, output: Path, **options: Any) -> None:
    with pytest.raises(error, match=match):
        export_multi(model, adapters, output, **options)
    assert not output.exists()
    assert list(output.parent.glob(".*.tmp")) == []


def test_bad_requests_are_refused(small: Any, tmp_path: Path) -> None:
    _, model, adapter = small
    out = tmp_path / "out"
    refuses(ConfigError, "needs at least one adapter", model, {}, out)
    for name in ("a/b", "a.b", "a b", ""):
        refuses(ConfigError, "adapter name", model, {name: adapter}, out)
    refuses(ConfigError, "one of float32, float16, bfloat16; got 'int8'", model, {"a": adapter}, out, dtype="int8")
    other = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, task_type="TOKEN_CLS"))
    refuses(ConfigError, "'a' is SEQ_CLS, 'b' is TOKEN_CLS", model, {"a": adapter, "b": other}, out)
    out.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        export_multi(model, {"a": adapter}, out)


def test_adapters_of_another_base_are_refused(small: Any, tmp_path: Path) -> None:
    _, model, adapter = small
    out = tmp_path / "out"
    moved = dataclasses.replace(adapter, modules={"no.such.query": next(iter(adapter.modules.values()))})
    refuses(BaseMismatchError, r"has no module 'no\.such\.query'", model, {"good": adapter, "bad": moved}, out)
    path, entries = next(iter(adapter.modules.items()))
    larger = SdctEntries(entries.values, entries.indices, (99, 48))
    refuses(BaseMismatchError, "adapter 'bad': .*48 x 48 in the base", model, {"bad": dataclasses.replace(adapter, modules={path: larger})}, out)  # fmt: skip # noqa: E501
    with torch.no_grad():
        model.get_parameter(f"{path}.weight").view(-1)[0] += 1
    refuses(BaseMismatchError, "adapter 'bad' was trained on other base weights", model, {"bad": adapter}, out)


def test_heads_that_do_not_fit_are_refused(small: Any, tmp_path: Path) -> None:
    family, model, adapter = small
    out = tmp_path / "out"
    larger = random_adapter(family, model, 2, labels=5)
    refuses(BaseMismatchError, r"adapter 'big' stores 'classifier\.\w+' of shape \[5", model, {"big": larger}, out)
    half = {"classifier.weight": adapter.saved["classifier.weight"]}
    refuses(BaseMismatchError, "save the whole module 'classifier'", model, {"half": dataclasses.replace(adapter, saved=half)}, out)  # fmt: skip # noqa: E501
    norm = {"bert.embeddings.LayerNorm.weight": np.ones(48, np.float32)}
    refuses(UnsupportedError, "'bert.embeddings.LayerNorm.weight', a parameter of a LayerNorm", model, {"norm": dataclasses.replace(adapter, saved=norm)}, out)  # fmt: skip # noqa: E501
    model.save_pretrained(tmp_path / "base")  # with a trained head of 4 labels
    with pytest.warns(UserWarning, match="has a trained head of another size, which gives way"):
        assert export_multi(tmp_path / "base", {"big": larger}, out).adapters["big"].labels == 5


def test_an_adapter_that_changes_under_the_export_is_refused(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, model, adapter = small
    adapter.save(tmp_path / "a")
    whole = export_module.trace

    def replaced_meanwhile(base: nn.Module) -> Any:
        random_adapter(family, model, 7).save(tmp_path / "a", overwrite=True)
        return whole(base)

    monkeypatch.setattr(export_module, "trace", replaced_meanwhile)
    with pytest.raises(AdapterFormatError, match="changed while it was exported"):
        export_multi(model, {"a": tmp_path / "a"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Diverging(nn.Module):
    """What torch cannot trace: control flow on values."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else x[..., :1] * self.inner(x)


class Exotic(Diverging):
    """What torch traces but ONNX has no operator for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.inner(x))


@pytest.mark.parametrize(("kind", "reason"), [(Diverging, "data-dependent"), (Exotic, "bessel_j0")])
def test_a_model_that_cannot_be_exported_says_which_module_and_why(
    kind: type[Diverging], reason: str, small: Any, tmp_path: Path
) -> None:
    _, model, adapter = small
    layer = model.bert.encoder.layer[1]
    layer.intermediate = kind(layer.intermediate)
    refuses(UnsupportedError, rf"module 'bert\.encoder\.layer\.1\.intermediate' failed .*{reason}", model, {"a": adapter}, tmp_path / "out")  # fmt: skip # noqa: E501


def test_a_module_the_model_does_not_call_is_named(small: Any, no_tracing: None, tmp_path: Path) -> None:
    _, model, adapter = small
    model.bert.unused = copy.deepcopy(model.bert.pooler.dense)
    entries = {"bert.unused": next(iter(adapter.modules.values()))}
    spare = dataclasses.replace(adapter, modules=entries, base_hash=None, base_dtype=None)
    refuses(UnsupportedError, r"'bert\.unused' is in the model, but the exported graph has no node of it", model, {"a": spare}, tmp_path / "out")  # fmt: skip # noqa: E501


def test_a_full_disk_leaves_nothing(
    small: Any, no_tracing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, adapter = small

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module.ir, "save", full)
    refuses(OutputError, "No space left on device", model, {"a": adapter}, tmp_path / "out")


def test_the_tokenizer_travels_with_a_model_in_memory_too(classifier: Exported, tmp_path: Path) -> None:
    classifier.model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "vocab.txt").write_text("[PAD]\n")
    model = type(classifier.model).from_pretrained(tmp_path / "base").eval()
    export_multi(model, {"a": classifier.adapters["a"]}, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "[PAD]\n"


def test_links_out_of_the_base_do_not_travel(small: Any, no_tracing: None, tmp_path: Path) -> None:
    _, model, adapter = small
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "base" / "tokenizer_config.json").symlink_to("../secret")
    (tmp_path / "base" / "tokenizer").mkdir()
    loaded = type(model).from_pretrained(tmp_path / "base").eval()
    adapter = dataclasses.replace(adapter, base_hash=None, base_dtype=None)
    refuses(
        UnsupportedError, r"tokenizer_config\.json is a link to .*secret", loaded, {"a": adapter}, tmp_path / "out"
    )
