"""Building engines as far as it goes without a GPU: prepared graph, profiles, manifest, and the calls to TensorRT."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from tiny_bundle import GROUPS, make_adapter, write_bundle

from sdct_export import contract, export_merged, export_multi
from sdct_export.bundle.description import Bundle
from sdct_export.cli import main
from sdct_export.engine.build import (
    GRAPH_FILE,
    OLD_GRAPH_FILE,
    EngineManifest,
    Profile,
    build_engine,
    default_profile,
    manifest_path,
    prepare_graph,
    profile_shapes,
    trtexec_command,
)
from sdct_export.errors import AdapterFormatError, ConfigError, SdctError, UnsupportedError

NAMES = ("bert", "gpt2", "vit")  # LayerNormalization, Gelu, Split, and a head with an If

MERGED = ("bert",)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A multi-adapter bundle of some families, and a merged one of `MERGED` as `<name>-merged`."""
    root = tmp_path_factory.mktemp("bundles")
    found = {}
    for name in NAMES:
        family = families.FAMILIES[name]
        model = family.model()
        adapter = families.random_adapter(family, model, 1, labels=3 if family.saved else None)
        found[name] = export_multi(model, {"a": adapter}, root / name, task_type=family.task)
        if name in MERGED:
            plain = families.random_adapter(family, model, 2)
            found[f"{name}-merged"] = export_merged(model, plain, root / f"{name}-merged", task_type=family.task)
    return found


@pytest.fixture
def tiny(tmp_path: Path) -> Bundle:
    return Bundle.load(write_bundle(tmp_path / "tiny", {"a": make_adapter(1, labels=2)}))


def without_plugin(graph: Path, to: Path) -> Path:
    """The graph with every `SpectralDelta` passing its y through, so that ONNX Runtime runs it without the plugin."""
    model = onnx.load(graph, load_external_data=False)
    nodes = []
    for node in model.graph.node:
        if node.op_type != contract.OP_TYPE:
            nodes.append(node)
            continue
        for y, out in zip(node.input[5:], node.output, strict=True):
            nodes.append(onnx.helper.make_node("Identity", [y], [out]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.functions[:]
    onnx.save(model, to)
    return to


def outputs_of(graph: Path, feeds: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


def random_feeds(graph: Path, bundle: Bundle) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    sizes = {"batch": 2, "sequence": 6, "slots": 4, "blend": 2}
    feeds: dict[str, Any] = {}
    for spec in onnx.load(graph, load_external_data=False).graph.input:
        tensor = spec.type.tensor_type
        shape = [d.dim_value or sizes[d.dim_param] for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype.kind == "f":
            feeds[spec.name] = rng.normal(size=shape).astype(dtype)
        else:
            feeds[spec.name] = rng.integers(1 if spec.name == "attention_mask" else 0, 2, size=shape).astype(dtype)
    return feeds


@pytest.mark.parametrize("name", NAMES)
def test_prepared_graph_leaves_only_the_plugin_nodes(bundles: dict[str, Bundle], name: str) -> None:
    bundle = bundles[name]
    graph = prepare_graph(bundle)
    assert graph == bundle.path / GRAPH_FILE
    model, before = onnx.load(graph, load_external_data=False), onnx.load(bundle.model_path, load_external_data=False)
    onnx.checker.check_model(str(graph))
    assert not model.functions
    assert before.functions
    nodes = [node for node in model.graph.node if node.domain]
    assert [node.op_type for node in nodes] == [contract.OP_TYPE] * len(bundle.groups)
    assert not any(node.overload for node in nodes)
    for node, group in zip(
        sorted(nodes, key=lambda n: n.name), sorted(bundle.groups, key=lambda g: g.name), strict=True
    ):
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert given == {"d_in": group.d_in, "d_out": list(group.d_out), "capacity": list(group.capacity)}
    assert [i.name for i in model.graph.input] == [i.name for i in before.graph.input]
    assert model.graph.initializer == before.graph.initializer  # the same weights, still in the same external file
    assert len(model.graph.node) == len(before.graph.node)


@pytest.mark.parametrize("name", [*NAMES, "bert-merged"])
def test_the_graph_for_old_versions_computes_the_same(bundles: dict[str, Bundle], name: str, tmp_path: Path) -> None:
    bundle = bundles[name]
    old = prepare_graph(bundle, old=True)
    assert old == bundle.path / OLD_GRAPH_FILE
    model = onnx.load(old, load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import}[""] == 17
    assert model.ir_version == 8
    assert not {"LayerNormalization", "Gelu", "Split"} & {node.op_type for node in model.graph.node}
    assert sum(node.op_type == contract.OP_TYPE for node in model.graph.node) == len(bundle.groups)
    feeds = random_feeds(old, bundle)
    new = prepare_graph(bundle)
    beside = bundle.path  # external data is looked up beside the file
    try:
        expected = outputs_of(without_plugin(new, beside / "new.tmp.onnx"), feeds)
        found = outputs_of(without_plugin(old, beside / "old.tmp.onnx"), feeds)
    finally:
        for file in beside.glob("*.tmp.onnx"):
            file.unlink()
    for a, b in zip(expected, found, strict=True):
        assert np.abs(a).max() > 0.01
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5)


def test_a_merged_graph_is_used_as_it_is(bundles: dict[str, Bundle]) -> None:
    assert prepare_graph(bundles["bert-merged"]) == bundles["bert-merged"].model_path


def test_a_prepared_graph_serves_where_onnx_is_missing(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match=r"needs the package onnx, or model\.tensorrt\.onnx in the bundle"):
        prepare_graph(tiny)
    (tiny.path / GRAPH_FILE).write_bytes(b"prepared elsewhere")
    assert prepare_graph(tiny) == tiny.path / GRAPH_FILE


def test_a_damaged_model_is_refused(tiny: Bundle) -> None:
    tiny.model_path.write_bytes(b"\xff" * 100)
    with pytest.raises(AdapterFormatError, match=r"is no ONNX file .*; export the bundle again"):
        prepare_graph(tiny)
    assert not (tiny.path / GRAPH_FILE).exists()


# --- profiles


def test_every_input_has_a_range(tiny: Bundle) -> None:
    shapes = profile_shapes(tiny, Profile(batch=(1, 2, 3), sequence=(4, 5, 6), slots=(7, 8, 9), blend=(1, 2, 4)))
    assert shapes["input_ids"] == ((1, 4), (2, 5), (3, 6))
    assert shapes["adapter_scales"] == ((1, 1), (2, 2), (3, 4))
    n = sum(GROUPS[0].capacity)
    assert shapes[contract.indices_name(GROUPS[0].name)] == ((7, n, 2), (8, n, 2), (9, n, 2))
    assert shapes["sdct.classifier.present"] == ((7,), (8,), (9,))
    names = {i.name for i in onnx.load(tiny.model_path).graph.input}
    assert set(shapes) == names


@pytest.mark.parametrize(
    "bad", [(0, 1, 2), (2, 1, 3), (1, 3, 2), (1, 2), (1, True, 2), (1, 2, 2**31), (1.0, 2.0, 3.0)]
)
def test_ranges_that_cannot_work(bad: Any) -> None:
    with pytest.raises(ConfigError, match="sequence must be three ascending positive numbers"):
        Profile(sequence=bad)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({}, 512),
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": 0}, 512),
        ({"max_position_embeddings": "many"}, 512),
        ({"max_position_embeddings": 100_000}, 512),
    ],
)
def test_the_default_sequence_fits_the_base(tiny: Bundle, config: dict[str, Any], longest: int) -> None:
    (tiny.path / "config.json").write_text(json.dumps(config))
    low, usual, high = default_profile(tiny).sequence
    assert (low, usual, high) == (1, min(128, longest), longest)
    assert default_profile(dataclasses.replace(tiny, max_tokens=40)).sequence == (1, 40, 40)


def test_an_unknown_symbolic_dimension_is_refused(tiny: Bundle) -> None:
    description = json.loads((tiny.path / "sdct_bundle.json").read_text())
    description["inputs"][1]["shape"] = ["batch", "past"]
    (tiny.path / "sdct_bundle.json").write_text(json.dumps(description))
    with pytest.raises(UnsupportedError, match="'attention_mask' has the symbolic dimension 'past'"):
        profile_shapes(Bundle.load(tiny.path), Profile())


# --- the build


class FakeTensorRT(types.ModuleType):
    """Records what the builder is asked for; `version` decides which parts exist."""

    def __init__(self, version: str = "10.16.0", *, problem: str = "") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.problem = problem
        self.said: dict[str, Any] = {"preview": [], "set": [], "cleared": [], "shapes": {}}
        new = not version.startswith("8.5")
        fake = self

        class ILogger:
            Severity = types.SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)

        class Builder:
            def __init__(self, logger: Any) -> None:
                if problem == "no GPU":
                    logger.log(1, "CUDA initialization failure with error: 35")
                    raise TypeError("factory function returned nullptr")
                self.logger = logger

            def create_network(self, flags: int) -> Any:
                fake.said["network"] = flags
                return types.SimpleNamespace()

            def create_builder_config(self) -> Any:
                fake.config = Config()
                return fake.config

            def create_optimization_profile(self) -> Any:
                def set_shape(name: str, *three: Any) -> None:
                    fake.said["shapes"][name] = three

                return types.SimpleNamespace(set_shape=set_shape)

            def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
                if problem == "no tactic":
                    self.logger.log(1, "could not find any implementation")
                    return None
                if new and getattr(config, "progress_monitor", None) is not None:
                    config.progress_monitor.phase_start("tactics", None, 2)
                    assert config.progress_monitor.step_complete("tactics", 0)
                    config.progress_monitor.phase_finish("tactics")
                return b"a plan"

        class Config:
            def __init__(self) -> None:
                if new:
                    self.plugins_to_serialize: list[str] = []
                    self.progress_monitor: Any = None

            def clear_flag(self, flag: str) -> None:
                fake.said["cleared"].append(flag)

            def set_flag(self, flag: str) -> None:
                fake.said["set"].append(flag)

            def set_preview_feature(self, feature: str, on: bool) -> None:
                fake.said["preview"].append(feature)

            def add_optimization_profile(self, profile: Any) -> None:
                fake.said["profiles"] = fake.said.get("profiles", 0) + 1

            def create_timing_cache(self, data: bytes) -> Any:
                fake.said["cache"] = data
                return types.SimpleNamespace(serialize=lambda: data + b"+")

            def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
                assert ignore_mismatch is False

        class OnnxParser:
            num_errors = 1

            def __init__(self, network: Any, logger: Any) -> None:
                self.network = network

            def parse_from_file(self, path: str) -> bool:
                fake.said["graph"] = path
                names = [i.name for i in onnx.load(path, load_external_data=False).graph.input]
                self.network.num_inputs = len(names)
                self.network.get_input = lambda i: types.SimpleNamespace(name=names[i])
                return problem != "unreadable"

            def get_error(self, index: int) -> Any:
                return types.SimpleNamespace(desc=lambda: "no importer\nfor Frobnicate")

        self.ILogger, self.Builder, self.OnnxParser = ILogger, Builder, OnnxParser
        self.BuilderFlag = types.SimpleNamespace(TF32="TF32", FP16="FP16")
        flags: dict[str, int] = {"EXPLICIT_BATCH": 0}
        if new:
            flags["STRONGLY_TYPED"] = 1
            self.PreviewFeature = types.SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliased")
            self.IProgressMonitor = type("IProgressMonitor", (), {})
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(**flags)


@pytest.fixture
def merged(tmp_path: Path) -> Bundle:
    return Bundle.load(write_bundle(tmp_path / "merged", merged=True))


def test_a_merged_engine_with_cache_and_progress(merged: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    cache = merged.path / "timings.bin"
    steps: list[tuple[str, int, int]] = []
    lines: list[str] = []
    engine = merged.path / "out" / "x.engine"
    manifest = build_engine(
        merged, engine, timing_cache=cache, progress=lambda *step: steps.append(step), report=lines.append
    )
    assert engine.read_bytes() == b"a plan"
    assert cache.read_bytes() == b"+"
    assert EngineManifest.load(engine) == manifest
    assert (manifest.plugin, manifest.tensorrt, manifest.concurrent, manifest.max_slots) == (
        "none",
        "10.16.0",
        True,
        0,
    )
    assert steps == [("tactics", 0, 2), ("tactics", 1, 2), ("tactics", 2, 2)]
    assert trt.said["network"] == 1 << 1
    assert trt.said["cleared"] == ["TF32"]
    assert trt.said["shapes"]["input_ids"] == ((1, 1), (8, 128), (32, 512))
    assert trt.config.plugins_to_serialize == []
    assert len(lines) == 1
    assert lines[0].startswith(f"trtexec --onnx={merged.model_path} --saveEngine={engine} --minShapes=input_ids:1x1,")
    build_engine(merged, engine, timing_cache=cache)
    assert trt.said["cache"] == b"+"


def plugin_of(folder: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that says it was built for `version`, compiled by nobody: ctypes is replaced."""
    library = folder / "libsdct_tensorrt.so"
    library.write_bytes(b"")
    functions = types.SimpleNamespace(sdct_tensorrt_version=lambda: version, sdct_tensorrt_register=lambda: 1)
    monkeypatch.setattr("ctypes.CDLL", lambda path: functions)
    monkeypatch.setenv("SDCT_LIBRARY_PATH", str(folder))
    return library


def test_a_multi_adapter_engine_carries_the_plugin(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    library = plugin_of(tiny.path, 101600, monkeypatch)
    lines: list[str] = []
    manifest = build_engine(tiny, profile=Profile(slots=(2, 16, 100)), report=lines.append)
    assert trt.config.plugins_to_serialize == [str(library.resolve())]
    assert trt.said["preview"] == ["aliased"]
    assert trt.said["graph"] == str(tiny.path / GRAPH_FILE)
    assert (manifest.plugin, manifest.max_slots) == ("embedded", 100)
    assert f"--dynamicPlugins={library.resolve()}" in lines[0]
    assert "--stronglyTyped" in lines[0]
    assert build_engine(tiny, embed_plugin=False).plugin == "library"
    plugin_of(tiny.path, 110100, monkeypatch)
    with pytest.raises(UnsupportedError, match=r"was built for TensorRT 11\.1, this is 10\.16\.0"):
        build_engine(tiny)


def test_tensorrt_8_gets_its_own_graph_and_flags(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    trt = FakeTensorRT("8.5.3.1")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    bundle = bundles["bert"]
    plugin_of(bundle.path, 80503, monkeypatch)
    lines: list[str] = []
    manifest = build_engine(bundle, report=lines.append)
    assert trt.said["graph"] == str(bundle.path / OLD_GRAPH_FILE)
    assert trt.said["network"] == 1
    assert (manifest.plugin, manifest.concurrent) == ("library", False)
    assert " --plugins=" in lines[0]
    assert "--stronglyTyped" not in lines[0]


@pytest.mark.parametrize(
    ("problem", "kind", "message"),
    [
        (
            "no GPU",
            UnsupportedError,
            "found no GPU it can use .CUDA initialization failure with error: 35.*nvidia-smi",
        ),
        ("unreadable", UnsupportedError, "TensorRT 10.16.0 cannot read .*: no importer for Frobnicate"),
        ("no tactic", SdctError, "could not build the engine: could not find any implementation"),
    ],
)
def test_what_tensorrt_refuses(
    merged: Bundle, monkeypatch: pytest.MonkeyPatch, problem: str, kind: type[SdctError], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(problem=problem))
    with pytest.raises(kind, match=message):
        build_engine(merged)
    assert not list(merged.path.glob("*.engine*"))


def test_without_tensorrt_or_plugin_it_says_what_to_do(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setenv("SDCT_LIBRARY_PATH", "")
    result = CliRunner().invoke(main, ["build", str(tiny.path), "--batch", "1:4:8"])
    assert result.exit_code == 1
    assert "trtexec --onnx=" in result.output
    assert "--maxShapes=input_ids:8x512," in result.output
    assert "error: the package tensorrt is not installed" in result.output
    assert (tiny.path / GRAPH_FILE).is_file()  # ready for trtexec elsewhere
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())
    with pytest.raises(UnsupportedError, match="the plugin library sdct_tensorrt is missing"):
        build_engine(tiny)


def test_the_command_reports_json(merged: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())
    engine = merged.path / "model.engine"
    result = CliRunner().invoke(main, ["build", str(merged.path), "--sequence", "4", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["output"] == str(engine)
    assert found["shapes"]["input_ids"] == [[1, 4], [8, 4], [32, 4]]
    for bad in ("1:2", "x", "3:2:1"):
        assert CliRunner().invoke(main, ["build", str(merged.path), "--batch", bad]).exit_code != 0


def manifest_json(**changed: object) -> str:
    fields: dict[str, object] = {"model_sha256": "a", "engine_sha256": "b", "tensorrt": "10.0", "plugin": "none"}
    fields |= {"format_version": 1, "concurrent": True, "shapes": {"sdct.g.values": [[2, 3], [4, 3], [8, 3]]}}
    return json.dumps(fields | changed)


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "{}",
        '{"format_version": 9}',
        manifest_json(shapes={"sdct.g.values": [[], [], []]}),
        manifest_json(shapes={"x": [[1, 2], [1], [1, 2]]}),
        manifest_json(tensorrt=1e308),
        manifest_json(engine_sha256=[]),
        manifest_json(concurrent=2),
    ],
)
def test_damaged_manifests(tmp_path: Path, damage: str) -> None:
    engine = tmp_path / "x.engine"
    with pytest.raises(AdapterFormatError, match="is missing; build the engine with"):
        EngineManifest.load(engine)
    manifest_path(engine).write_text(manifest_json())
    assert EngineManifest.load(engine).max_slots == 8
    manifest_path(engine).write_text(damage)
    with pytest.raises(AdapterFormatError, match=r"is damaged|is not valid JSON|must hold a JSON object"):
        EngineManifest.load(engine)


def test_trtexec_leaves_fixed_shapes_out(tiny: Bundle) -> None:
    shapes = {"a": ((1, 2), (1, 2), (1, 2)), "b": ((1,), (2,), (3,))}
    command = trtexec_command(tiny, Path("g.onnx"), Path("e.engine"), shapes)
    assert "--minShapes=b:1 --optShapes=b:2 --maxShapes=b:3" in command
