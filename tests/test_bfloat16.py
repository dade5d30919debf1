"""bfloat16 bundles on the CPU by stand-in, since no provider there has the kernels (`support/bfloat16_graphs.py`).

The reference is torch in float32 on the weights as rounded; the measure is how far torch in bfloat16 is from it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import bfloat16_graphs
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from families import FAMILIES, Family, edited, feeds, random_adapter, torch_rows
from onnx import TensorProto, helper
from references import delta_weight
from torch import Tensor, nn
from trained_model import trained

from sdct_export import SdctAdapter, SdctConfig, export_merged, export_multi, get_sdct_model
from sdct_export.adapter.entries import Array
from sdct_export.base.reference import sample_inputs
from sdct_export.bundle.description import BUNDLE_FILE, Bundle, file_sha256
from sdct_export.cli import main
from sdct_export.engine.build import build_engine, prepare_graph
from sdct_export.errors import UnsupportedError
from sdct_export.graph.bfloat16 import KERNELS
from sdct_export.native import find_library, register_operator
from sdct_export.runtime import MultiAdapterModel, ort
from sdct_export.runtime import model as model_module
from sdct_export.verify import TOLERANCES, verify

ROWS = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {"a": -0.75}] * 3
QUICK = ("bert-classifier", "vit", "gpt2", "llama")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
BF16 = TensorProto.BFLOAT16


@dataclasses.dataclass
class Exported:
    family: Family
    model: nn.Module  # float32, its weights rounded to bfloat16
    adapters: dict[str, SdctAdapter]
    bundle: Bundle


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    @functools.cache
    def make(name: str) -> Exported:
        family = FAMILIES[name]
        model = family.model()
        labels = model.config.num_labels if family.saved else None
        adapters = {
            "a": random_adapter(family, model, 1, labels=labels),
            "b": random_adapter(family, model, 2, n=55, labels=labels and 2, scaling=0.3),
        }
        bundle = export_multi(model, adapters, tmp_path_factory.mktemp(name) / "bundle", dtype="bfloat16", cache=False)
        return Exported(family, model.bfloat16().float(), adapters, bundle)

    return make


@pytest.fixture
def exported(exports: Callable[[str], Exported]) -> Exported:
    return exports("bert-classifier")


def halved(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    return copy.deepcopy(model).bfloat16(), inputs


def far(got: Array, want: Array) -> float:
    """Largest difference by the size of `want`; labels an adapter lacks are hidden in both."""
    shown = np.abs(want) < 1e30
    np.testing.assert_array_equal(np.abs(got.astype(np.float64)) < 1e30, shown)
    return float(np.abs(got.astype(np.float64) - want)[shown].max() / max(1.0, np.abs(want[shown]).max()))


def spread(got: Array, want: Array) -> float:
    """Root of the mean squared difference: of few numbers the largest says more of luck than of a method."""
    shown = np.abs(want) < 1e30
    return float(np.sqrt(np.mean((got.astype(np.float64) - want)[shown] ** 2)))


def named(session: onnxruntime.InferenceSession, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(arrays)), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_every_family_is_as_near_as_torch_in_bfloat16(exports: Callable[[str], Exported], name: str) -> None:
    made = exports(name)
    inputs = sample_inputs(made.model, batch=len(ROWS), sequence=11, seed=3)
    want, base = (torch_rows(made.model, inputs, rows, made.adapters) for rows in (ROWS, [{}] * len(ROWS)))
    halves = torch_rows(*halved(made.model, inputs), ROWS, made.adapters)
    arrays = {key: value.numpy() for key, value in inputs.items()} | feeds(made.bundle, ROWS, made.adapters)
    graph = bfloat16_graphs.loaded(made.bundle.model_path)
    if name != "roberta-classifier":  # whose CumSum ONNX's evaluator does not compute
        for output, value in bfloat16_graphs.by_onnx(graph, arrays).items():
            assert value.dtype == np.float32
            assert far(value, want[output]) < TOLERANCES["bfloat16"]  # which rounds within operators, too
    session = bfloat16_graphs.session(bfloat16_graphs.rounded(graph))
    got = named(session, arrays)
    alone = named(session, arrays | feeds(made.bundle, [{}] * len(ROWS), made.adapters))
    assert got.keys() == want.keys() == {spec.name for spec in made.bundle.outputs}
    for output, value in got.items():
        assert value.dtype == np.float32
        assert np.array_equal(value, value.astype(ml_dtypes.bfloat16).astype(np.float32))
        assert far(value, want[output]) < TOLERANCES["bfloat16"] / 2
        assert 1e-4 < spread(value, want[output]) < 2 * spread(halves[output], want[output])
        for row, parts in enumerate(ROWS):
            if parts:
                assert np.abs(want[output][row] - base[output][row]).max() > 0.02
                assert np.abs(value[row] - alone[output][row]).max() > 0.02
            else:
                np.testing.assert_array_equal(value[row], alone[output][row])


@pytest.mark.parametrize("name", ALL)
def test_weights_are_bfloat16_and_the_ends_are_not(exports: Callable[[str], Exported], name: str) -> None:
    bundle = exports(name).bundle
    onnx.checker.check_model(str(bundle.model_path), full_check=True)
    graph = onnx.load(bundle.model_path, load_external_data=False).graph
    assert bundle.dtype == "bfloat16"
    ends = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert BF16 not in ends.values()
    assert ends["adapter_scales"] == TensorProto.FLOAT
    assert {ends[f"sdct.{head.module}.weight"] for head in bundle.heads} <= {TensorProto.FLOAT}
    for spec in (*bundle.inputs, *bundle.outputs):
        assert spec.dtype == ("int64" if ends[spec.name] == TensorProto.INT64 else "float32")
    weights = [w for w in graph.initializer if len(w.dims) > 1 and w.data_type in (TensorProto.FLOAT, BF16)]
    assert weights
    assert {w.data_type for w in weights} == {BF16}
    types = bfloat16_graphs.types_of(graph)
    for node in graph.node:
        if node.domain == "sdct":  # x and y are bfloat16, the bank is not
            bank = [TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32]
            assert [types[n] for n in node.input] == [BF16, *bank, *[BF16] * (len(node.input) - 5)]
            assert {types[n] for n in node.output} == {BF16}


@pytest.mark.parametrize("name", ALL)
def test_bodies_and_heads_too_use_only_operators_with_a_kernel(exports: Callable[[str], Exported], name: str) -> None:
    """They come into the graph after the pass that sees to it for the base."""

    def used(graph: onnx.GraphProto, outer: Mapping[str, int]) -> Iterator[str]:
        types = bfloat16_graphs.types_of(graph, outer)
        for node in graph.node:
            if BF16 in [types.get(value) for value in (*node.input, *node.output)]:
                yield node.op_type
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield from used(attribute.g, types)

    found = set(used(bfloat16_graphs.loaded(exports(name).bundle.model_path).graph, {}))
    assert {"MatMul", "Cast", "If", "Where", "Reshape"} <= found <= KERNELS


def test_the_native_operator_in_a_bfloat16_model(exported: Exported) -> None:
    if find_library("sdct_onnxruntime") is None:
        pytest.skip("no operator library: there was no C++ compiler when the package was installed")
    inputs = sample_inputs(exported.model, batch=len(ROWS), sequence=11, seed=5)
    arrays = {n: v.numpy() for n, v in inputs.items()} | feeds(exported.bundle, ROWS, exported.adapters)
    options = onnxruntime.SessionOptions()
    assert register_operator(options)
    graph = bfloat16_graphs.rounded(bfloat16_graphs.loaded(exported.bundle.model_path, native=True))
    assert [n for n in graph.graph.node if n.domain == "sdct"]
    got = named(bfloat16_graphs.session(graph, options), arrays)["logits"]
    want = torch_rows(exported.model, inputs, ROWS, exported.adapters)["logits"]
    halves = torch_rows(*halved(exported.model, inputs), ROWS, exported.adapters)["logits"]
    assert far(got, want) < TOLERANCES["bfloat16"] / 2
    assert 1e-4 < spread(got, want) < 2 * spread(halves, want)


def test_merged_weights_are_rounded_once(exported: Exported, tmp_path: Path) -> None:
    base = exported.family.model()
    bundle = export_merged(base, exported.adapters["a"], tmp_path / "merged", dtype="bfloat16")
    whole = edited(base, {"a": 1.0}, exported.adapters).bfloat16()
    inputs = sample_inputs(base, batch=4, sequence=9, seed=6)
    with torch.no_grad():
        halves = whole(**inputs).logits.float().numpy()
        want = whole.float()(**inputs).logits.numpy()
        without = exported.model(**inputs).logits.numpy()
    graph = bfloat16_graphs.loaded(bundle.model_path)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    got = named(bfloat16_graphs.session(bfloat16_graphs.rounded(graph)), arrays)["logits"]
    assert far(got, want) < TOLERANCES["bfloat16"] / 2
    assert 1e-4 < spread(got, want) < 2 * spread(halves, want)
    assert far(got, without) > 0.05
    merged = {n: p.detach() for n, p in whole.named_parameters()}
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    stored = [onnx.numpy_helper.to_array(w) for w in graph.graph.initializer if w.data_type == BF16]
    asked = merged[weight].T.numpy()
    assert any(w.shape == asked.shape and np.array_equal(w.astype(np.float32), asked) for w in stored)


@pytest.mark.parametrize(("scaling", "told"), [(0.5, False), (2e-3, True)])
def test_a_change_that_rounding_swallows_is_told(scaling: float, told: bool, tmp_path: Path) -> None:
    family = FAMILIES["gpt2"]
    base = family.model().bfloat16()
    adapter = random_adapter(family, base.float(), 1, scaling=scaling)
    left = whole = 0.0
    for path, entries in adapter.modules.items():
        before = base.get_submodule(path).weight.detach().double().numpy().T  # GPT-2's is [d_in, d_out]
        change = delta_weight(entries.values, entries.indices, before.shape, scaling)
        after = (before + change).astype(ml_dtypes.bfloat16).astype(np.float64)
        left, whole = left + ((after - before) * change).sum(), whole + (change**2).sum()
    assert (left / whole < 0.9) == told
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        export_merged(base, adapter, tmp_path / "out", dtype="bfloat16")
    words = [str(w.message) for w in found if "keep" in str(w.message)]
    start = f"rounded to bfloat16 the merged weights keep {left / whole:.0%} of the adapter's change; "
    assert [w.startswith(start) for w in words] == [True] * told


# --- as on a GPU


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Makes a bundle's model compute on the CPU what a GPU's kernels would, and lets it run there."""
    monkeypatch.setattr(model_module, "check_dtype", lambda *_: None)

    def rewrite(folder: Path) -> Path:
        file = folder / "model.onnx"
        graph = bfloat16_graphs.rounded(bfloat16_graphs.loaded(file))
        (folder / "model.onnx.data").unlink(missing_ok=True)
        onnx.save(graph, file)
        raw = json.loads((folder / BUNDLE_FILE).read_text()) | {
            "model_sha256": file_sha256(file),
            "data_sha256": None,
        }
        (folder / BUNDLE_FILE).write_text(json.dumps(raw))
        return folder

    return rewrite


def test_a_bundle_runs_and_verifies(like_a_gpu: Callable[[Path], Path], tmp_path: Path) -> None:
    """With adapters that were trained on a bfloat16 base, one of them loaded later."""
    base = FAMILIES["bert-classifier"].model().bfloat16()
    for seed, name in enumerate(("a", "b", "later")):
        config = SdctConfig(["query", "value"], n_coefficients=60, modules_to_save=["classifier"], seed=seed)
        trained(get_sdct_model(copy.deepcopy(base), config), seed).save_adapter(tmp_path / name)
    export_multi(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "multi", dtype="base")
    like_a_gpu(tmp_path / "multi")
    report = verify(tmp_path / "multi", base)
    assert [check for check in report.checks if not check.ok] == []
    errors = {check.name: check.error for check in report.checks if check.error is not None}
    assert {"recorded mixed", "recorded blend", "trained a", "torch 0.5 a + 0.5 b"} <= errors.keys()
    assert 1e-4 < max(errors.values()) < TOLERANCES["bfloat16"] / 2
    limits = {check.limit for check in report.checks if check.name.startswith(("recorded", "torch"))}
    assert limits == {TOLERANCES["bfloat16"]}
    with MultiAdapterModel(tmp_path / "multi") as running:
        running.load_adapter("later", tmp_path / "later")
        inputs = sample_inputs(base, batch=3, sequence=8, seed=7)
        got = running.run({n: v.numpy() for n, v in inputs.items()}, ["later", None, "a"])["logits"]
    assert got.dtype == np.float32
    adapters = {name: SdctAdapter.load(tmp_path / name) for name in ("a", "later")}
    want = torch_rows(copy.deepcopy(base).float(), inputs, [{"later": 1.0}, {}, {"a": 1.0}], adapters)["logits"]
    assert far(got, want) < TOLERANCES["bfloat16"] / 2

    damaged = json.loads((tmp_path / "multi" / BUNDLE_FILE).read_text())
    graph = onnx.load(tmp_path / "multi" / "model.onnx")
    weight = max(graph.graph.initializer, key=lambda w: len(w.raw_data))
    weight.raw_data = bytes(len(weight.raw_data))
    onnx.save(graph, tmp_path / "multi" / "model.onnx")
    damaged["model_sha256"] = file_sha256(tmp_path / "multi" / "model.onnx")
    (tmp_path / "multi" / BUNDLE_FILE).write_text(json.dumps(damaged))
    assert "recorded base" in [check.name for check in verify(tmp_path / "multi").checks if not check.ok]


def test_sentences_and_their_cosines(like_a_gpu: Callable[[Path], Path], tmp_path: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentences import TEXTS, WIDTH, sentence_folder, train

    from sdct_export.runtime.request import encode_text

    modes = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    tail = [modules.Pooling(WIDTH, modes), modules.Dense(6 * WIDTH, 7), modules.Normalize()]
    torch.manual_seed(2)
    base = sentence_folder(tmp_path / "st", tail)
    whole, model = train(base, 0)
    model.save_adapter(tmp_path / "one")
    bundle = export_multi(base, [tmp_path / "one"], tmp_path / "out", dtype="bfloat16")
    assert [(spec.name, spec.dtype) for spec in bundle.outputs] == [("sentence_embedding", "float32")]
    like_a_gpu(tmp_path / "out")
    with MultiAdapterModel(tmp_path / "out") as running:
        got = running.run(encode_text(running.bundle, TEXTS), "one")["sentence_embedding"]
    want = whole.encode(TEXTS)
    assert far(got, want) < TOLERANCES["bfloat16"] / 2
    assert np.abs(np.linalg.norm(got, axis=1) - 1).max() < 2**-7
    assert [check for check in verify(tmp_path / "out", base).checks if not check.ok] == []


# --- what is chosen, told and refused


def test_a_bfloat16_base_is_widened_with_a_word(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    base = family.model().bfloat16()
    adapter = random_adapter(family, base, 1)
    adapter = dataclasses.replace(adapter, base_hash=None, base_dtype=None)
    with pytest.warns(UserWarning, match=r"the base is bfloat16, .* in float32.*--dtype bfloat16") as told:
        bundle = export_multi(base, {"a": adapter}, tmp_path / "wide")
    assert len([w for w in told if "the base is bfloat16" in str(w.message)]) == 1
    assert (bundle.dtype, bundle.base_hash_dtype) == ("float32", "bfloat16")
    with MultiAdapterModel(bundle) as running:
        inputs = sample_inputs(base, batch=2, sequence=5, seed=1)
        got = running.run({n: v.numpy() for n, v in inputs.items()}, "a")
    want = torch_rows(copy.deepcopy(base).float(), inputs, [{"a": 1.0}] * 2, {"a": adapter})
    assert all(far(value, want[name]) < 1e-4 for name, value in got.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for dtype, found in (("base", "bfloat16"), ("float32", "float32")):
            assert export_merged(base, adapter, tmp_path / f"{dtype}-as", dtype=dtype).dtype == found
    assert next(base.parameters()).dtype == torch.bfloat16


def test_the_shell_exports_tells_and_inspects(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    base = family.model().bfloat16()
    base.save_pretrained(tmp_path / "base")
    trained(get_sdct_model(base, SdctConfig(["query"], n_coefficients=20))).save_adapter(tmp_path / "a")

    def shell(*arguments: object, code: int = 0) -> Any:
        ran = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert ran.exit_code == code, ran.output
        return ran

    options = ["--model", tmp_path / "base", "--adapter", tmp_path / "a"]
    told = shell(*options, "--output", tmp_path / "wide").stderr
    assert "warning: the base is bfloat16" in told
    ran = shell(*options, "--dtype", "bfloat16", "--output", tmp_path / "half", "--json")
    assert ran.stderr == ""
    assert json.loads(ran.stdout)["dtype"] == "bfloat16"
    sizes = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("wide", "half")]
    assert 1.8 < sizes[0] / sizes[1] < 2.05
    assert json.loads(shell("inspect", tmp_path / "half", "--json").stdout)["dtype"] == "bfloat16"
    for command in (("run", "--input", "input_ids=x.npy"), ("verify",)):
        np.save(tmp_path / "x.npy", np.ones((1, 3), np.int64))
        line = [command[0], tmp_path / "half", *(o.replace("x.npy", str(tmp_path / "x.npy")) for o in command[1:])]
        ran = shell(*line, code=1)
        assert "bfloat16 bundle cannot run on the CPU" in ran.output
        assert "--dtype float32 or float16" in ran.output


def test_the_cpu_is_refused_by_name_before_anything_is_read(exported: Exported) -> None:
    with pytest.raises(UnsupportedError, match=r"CPUExecutionProvider has no bfloat16 kernel for MatMul, Add, Mul"):
        MultiAdapterModel(exported.bundle)


@pytest.mark.parametrize("op_type", ["MatMul", "Add", "Mul"])
def test_the_operators_named_are_indeed_missing(op_type: str, tmp_path: Path) -> None:
    """Once this fails ONNX Runtime has learned it: let the CPU run bfloat16 bundles then."""
    values = [onnx.helper.make_tensor_value_info(name, BF16, [2, 2]) for name in ("x", "y", "z")]
    node = onnx.helper.make_node(op_type, ["x", "y"], ["z"], name="the node")
    graph = onnx.helper.make_graph([node], "g", values[:2], values[2:])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "m.onnx",
    )
    message = (
        rf"CPUExecutionProvider of ONNX Runtime [\d.]+ has no kernel for {op_type} \(opset 1\d, node 'the node'\)"
    )
    with pytest.raises(UnsupportedError, match=message):
        ort.OrtBackend(tmp_path / "m.onnx")


def test_a_missing_kernel_is_named_on_any_device(exported: Exported) -> None:
    with pytest.raises(UnsupportedError, match=r"has no kernel for \w+ \(opset \d+, node '.*'\).*--dtype float32"):
        ort.OrtBackend(exported.bundle.model_path, groups=exported.bundle.groups)


@pytest.mark.parametrize("version", ["8.5.3.1", "9.3.0"])
def test_tensorrt_before_10_is_refused(
    exported: Exported, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = types.ModuleType("tensorrt")
    old.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    short = version[:3]
    message = rf"TensorRT {short} is too old for bfloat16 bundles; install TensorRT 10 or newer, .*--dtype float16"
    with pytest.raises(UnsupportedError, match=message):
        build_engine(exported.bundle, tmp_path / "e.engine")
    with pytest.raises(UnsupportedError, match=r"TensorRT 8.6 is too old for bfloat16"):
        prepare_graph(exported.bundle, version=(8, 6))
    monkeypatch.setattr("sdct_export.export.export_multi", lambda *_, **__: pytest.fail("worked for nothing"))
    ran = CliRunner().invoke(
        main, ["--model", str(tmp_path), "--adapter", f"a={tmp_path}", "--output", str(tmp_path / "out"),
               "--format", "tensorrt", "--dtype", "bfloat16"],
    )  # fmt: skip
    assert ran.exit_code == 1
    assert f"TensorRT {short} is too old for bfloat16 bundles" in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("version", "dtype"), [("10.0.1", "base"), ("11.1.0", "base"), ("8.5.3.1", None)])
def test_a_base_keeps_its_type_where_tensorrt_runs_it(
    version: str, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    asked: list[Any] = []

    def export(*_: Any, **options: Any) -> None:
        asked.append(options["dtype"])
        raise UnsupportedError("far enough")

    monkeypatch.setattr("sdct_export.export.export_multi", export)
    line = ["--model", str(tmp_path), "--adapter", f"a={tmp_path}", "--output", str(tmp_path / "out")]
    for more in ([], ["--dtype", "float16"]):
        assert CliRunner().invoke(main, [*line, "--format", "tensorrt", *more]).exit_code == 1
    assert asked == [dtype, "float16"]


def test_the_graph_for_tensorrt_10_keeps_its_types(exported: Exported) -> None:
    graph = onnx.load(prepare_graph(exported.bundle), load_external_data=False).graph
    types = bfloat16_graphs.types_of(graph)
    nodes = [node for node in graph.node if node.domain == "sdct"]
    assert nodes
    assert {types[node.input[0]] for node in nodes} == {BF16}


def test_arrays_of_bfloat16_reach_a_session(tmp_path: Path) -> None:
    """A key-value cache is one: ONNX Runtime's interface does not know them from numpy."""
    x, y = (helper.make_tensor_value_info(n, t, ["batch", 3]) for n, t in (("x", BF16), ("y", TensorProto.FLOAT)))
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx"
    )
    backend = ort.OrtBackend(tmp_path / "m.onnx")
    for rows in (2, 0):
        values = np.linspace(-3, 3, 3 * rows).reshape(rows, 3).astype(ml_dtypes.bfloat16)
        got = backend.run({"x": values}, {})["y"]
        np.testing.assert_array_equal(got, values.astype(np.float32))
