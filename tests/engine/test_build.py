"""Building engines as far as it goes without a GPU: prepared graph, profiles, manifest, and the calls to TensorRT."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from fake_builder import FakeTensorRT, plugin_of, trtexec
from graphs import without_plugin
from tiny_bundle import GROUPS, make_adapter, write_bundle

from sdct_export import contract, export_merged, export_multi
from sdct_export.bundle.description import Bundle
from sdct_export.cli import main
from sdct_export.engine import lower, settings
from sdct_export.engine.build import (
    GRAPH_FILE,
    OLD_GRAPH_FILE,
    OLDEST_GRAPH_FILE,
    EngineManifest,
    Profile,
    build_engine,
    default_profile,
    manifest_path,
    prepare_graph,
    profile_shapes,
)
from sdct_export.errors import AdapterFormatError, ConfigError, SdctError, UnsupportedError

NAMES = ("bert", "gpt2", "vit")  # LayerNormalization, Gelu, Split, and a head with an If

MERGED = ("bert",)
HALF = ("bert-classifier", "llama")  # exported in float16
OLD = {"8.5.3.1": OLDEST_GRAPH_FILE, "8.6.1": OLD_GRAPH_FILE, "9.3.0": OLD_GRAPH_FILE}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A multi-adapter bundle of some families, and a merged one of `MERGED` as `<name>-merged`."""
    root = tmp_path_factory.mktemp("bundles")
    found = {}
    for name in NAMES:
        family = families.FAMILIES[name]
        model = family.model()
        adapter = families.random_adapter(family, model, 1, labels=3 if family.saved else None)
        found[name] = export_multi(model, {"a": adapter}, root / name, task_type=family.task, cache=False)
        if name in MERGED:
            plain = families.random_adapter(family, model, 2)
            found[f"{name}-merged"] = export_merged(
                model, plain, root / f"{name}-merged", task_type=family.task, cache=False
            )
    return found


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A float16 bundle of each of `HALF`, and a merged one."""
    root = tmp_path_factory.mktemp("half")
    found = {}
    for name in HALF:
        family = families.FAMILIES[name]
        model = family.model()
        adapter = families.random_adapter(family, model, 1, labels=3 if family.saved else None)
        found[name] = export_multi(
            model, {"a": adapter}, root / name, task_type=family.task, dtype="float16", cache=False
        )
    plain = families.random_adapter(family, model, 2)
    found["merged"] = export_merged(model, plain, root / "merged", task_type=family.task, dtype="float16", cache=False)
    return found


@pytest.fixture
def tiny(tmp_path: Path) -> Bundle:
    return Bundle.load(write_bundle(tmp_path / "tiny", {"a": make_adapter(1, labels=2)}))


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


@pytest.mark.parametrize("version", [(8, 5), (8, 6), (9, 3)], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "bert-merged"])
def test_the_graph_for_old_versions_computes_the_same(
    bundles: dict[str, Bundle], name: str, version: tuple[int, int]
) -> None:
    bundle = bundles[name]
    old = prepare_graph(bundle, version=version)
    assert old == bundle.path / (OLD_GRAPH_FILE if version > (8, 5) else OLDEST_GRAPH_FILE)
    model = onnx.load(old, load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import}[""] == 17
    assert model.ir_version == 8
    kinds = {node.op_type for node in model.graph.node}
    assert not {"Gelu", "Split"} & kinds
    assert ("LayerNormalization" in kinds) == (version > (8, 5))  # whose parser makes one layer of it
    assert not any(node.name.startswith("float32") for node in model.graph.node)  # nothing is float16 here
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


def test_a_multi_adapter_engine_carries_the_plugin(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    library = plugin_of(tiny.path, 101600, monkeypatch)
    lines: list[str] = []
    manifest = build_engine(tiny, profile=Profile(slots=(2, 16, 100)), report=lines.append)
    assert trt.config.plugins_to_serialize == [str(library.resolve())]
    assert trt.said["preview"] == {"ALIASED_PLUGIN_IO_10_03": True}
    assert trt.said["graph"] == str(tiny.path / GRAPH_FILE)
    assert (manifest.plugin, manifest.max_slots) == ("embedded", 100)
    assert f"--dynamicPlugins={library.resolve()}" in lines[0]
    assert "--stronglyTyped" in lines[0]
    assert build_engine(tiny, embed_plugin=False).plugin == "library"
    plugin_of(tiny.path, 110100, monkeypatch)
    with pytest.raises(UnsupportedError, match=r"was built for TensorRT 11\.1, this is 10\.16\.0"):
        build_engine(tiny)


def test_the_plugin_writes_beside_its_inputs_where_that_is_asked_for(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT asks the plugin what it writes over only where the preview feature is on."""
    trt = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    plugin_of(tiny.path, 101600, monkeypatch)
    lines: list[str] = []
    build_engine(tiny, in_place=False, report=lines.append)
    assert trt.said["preview"] == {}
    assert "--preview" not in lines[0]
    result = CliRunner().invoke(main, ["build", str(tiny.path), "--no-in-place"])
    assert result.exit_code == 0, result.output
    assert trt.said["preview"] == {}
    CliRunner().invoke(main, ["build", str(tiny.path)])
    assert trt.said["preview"] == {"ALIASED_PLUGIN_IO_10_03": True}


@pytest.mark.parametrize("version", OLD)
def test_old_versions_get_their_own_graph_and_flags(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    trt = FakeTensorRT(version)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    bundle = bundles["bert"]
    number = [int(part) for part in version.split(".")[:3]]
    plugin_of(bundle.path, number[0] * 10000 + number[1] * 100 + number[2], monkeypatch)
    manifest = build_engine(bundle)
    assert trt.said["graph"] == str(bundle.path / OLD[version])
    assert trt.said["network"] == 1  # also for 9, which has strongly typed networks
    assert trt.said["set"] == []
    expected = ("library", False) if version.startswith("8.5") else ("embedded", True)
    assert (manifest.plugin, manifest.concurrent) == expected
    assert trt.said["preview"] == ({} if version.startswith("8.5") else {"PROFILE_SHARING_0806": True})


@pytest.mark.parametrize("version", OLD)
@pytest.mark.parametrize("name", HALF)
def test_what_is_float32_in_a_float16_graph_stays_float32(
    half: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, name: str, version: str
) -> None:
    """Before TensorRT 10 the builder chooses among the types it may use, unless a layer is told one and it obeys."""
    trt = FakeTensorRT(version)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    number = [int(part) for part in version.split(".")[:3]]
    plugin_of(half[name].path, number[0] * 10000 + number[1] * 100 + number[2], monkeypatch)
    build_engine(half[name])
    assert trt.said["set"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    types, reads = types_and_readers(Path(trt.said["graph"]))
    pins = trt.pins()
    checked = {"float32": 0, "float16": 0, "in": 0}
    for layer in trt.network.layers:
        results = {types[output.name] for output in layer.outputs if output.name}
        if layer.type in ("constant", "shape") or not results:
            continue
        if "float32" in results:
            assert pins[layer.name] == ("float32", {0: "float32"})
            checked["float32"] += 1
        elif "float16" in results and layer.type != "layernormalization":  # that one is float32 inside anyway
            assert layer.name not in pins
            checked["float16"] += 1
        elif "float32" in {types.get(value) for value in reads[layer.outputs[0].name]}:
            assert pins[layer.name] == ("float32", {})
            checked["in"] += 1
    assert checked["float32"] > 10
    assert checked["float16"] > 50
    assert checked["in"] > 0 or name != "bert-classifier"  # its head compares scales with 0
    helpers = [layer for layer in trt.network.layers if layer.name.startswith(("(Unnamed", "ONNXTRT_"))]
    pairs = zip(trt.network.layers, trt.network.layers[1:], strict=False)
    for helper in (first for first, second in pairs if first in helpers and second.name in pins):
        assert (helper.name in pins) == (helper.outputs[0].dtype in ("float32", "float16"))


def types_and_readers(graph: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Of a graph's values, its subgraphs' too: the type of each, and what the node that makes it reads."""
    names = {1: "float32", 10: "float16", 7: "int64", 6: "int32", 9: "bool"}
    types: dict[str, str] = {}
    reads: dict[str, list[str]] = {}
    model = onnx.shape_inference.infer_shapes(onnx.load(graph, load_external_data=False))
    waiting = [model.graph]
    while waiting:
        part = waiting.pop()
        for value in (*part.input, *part.value_info, *part.output):
            types[value.name] = names[value.type.tensor_type.elem_type]
        types |= {tensor.name: names[tensor.data_type] for tensor in part.initializer}
        for node in part.node:
            reads |= {output: list(node.input) for output in node.output}
            waiting += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return types, reads


@pytest.mark.parametrize("version", ["8.5.3.1", "8.6.1", "9.3.0", "10.0.1", "10.3.0", "10.16.0", "11.1.0"])
@pytest.mark.parametrize("bundle", ["bert-classifier", "merged", "float32"])
def test_the_printed_command_asks_for_what_the_build_asks_for(
    half: dict[str, Bundle], bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, bundle: str, version: str
) -> None:
    """`trtexec`, replayed as NVIDIA wrote it, tells the builder the same, whatever the version and the options."""
    loaded = bundles["bert"] if bundle == "float32" else half[bundle]
    number = [int(part) for part in version.split(".")[:3]]
    plugin_of(loaded.path, number[0] * 10000 + number[1] * 100 + number[2], monkeypatch)
    for options in [{}, {"embed_plugin": False, "in_place": False, "timing_cache": loaded.path / "timings.bin"}]:
        ours = FakeTensorRT(version)
        monkeypatch.setitem(sys.modules, "tensorrt", ours)
        lines: list[str] = []
        build_engine(loaded, loaded.path / "x.engine", report=lines.append, **options)
        theirs = trtexec(lines[0], version)
        for what in ("graph", "network", "set", "cleared", "preview", "profiles"):
            assert ours.said.get(what) == theirs.said.get(what), what
        assert ("cache" in ours.said) == ("cache" in theirs.said)
        dynamic = {name: three for name, three in ours.said["shapes"].items() if three[0] != three[2]}
        assert dynamic == theirs.said["shapes"]
        assert getattr(ours.config, "plugins_to_serialize", []) == getattr(theirs.config, "plugins_to_serialize", [])
        library = [str(loaded.path / "libsdct_tensorrt.so")] if loaded.groups else []
        assert theirs.said["loaded"] == library
        helpers = ("(Unnamed", "ONNXTRT_")  # what has no name of its own only the API can tell
        pins = {name: pin for name, pin in ours.pins().items() if not name.startswith(helpers)}
        assert pins == theirs.pins()
        assert bool(pins) == (number[0] < 10 and bundle != "float32")


def test_names_say_what_is_computed_in_float32() -> None:
    """Results that are float32 alone, comparisons and what has whole numbers beside; nothing else."""
    kinds = {"x": 1, "h": 10, "v": 1, "i": 7, "big": 9, "half": 10, "size": 7, "sum": 10}
    nodes = [
        onnx.helper.make_node("TopK", ["x", "k"], ["v", "i"], name="top"),
        onnx.helper.make_node("Greater", ["x", "v"], ["big"], name="greater"),
        onnx.helper.make_node("Cast", ["x"], ["half"], name="cast", to=10),
        onnx.helper.make_node("Shape", ["x"], ["size"], name="shape"),
        onnx.helper.make_node("Add", ["h", "half"], ["sum"], name="add"),
        onnx.helper.make_node("Neg", ["x"], ["n"], name="neg"),
    ]
    values = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in (kinds | {"n": 1}).items()]
    graph = onnx.helper.make_graph(nodes, "g", values[:2], [], value_info=values[2:])
    assert lower.name_float32(graph) == 3
    names = ["float32.in[0]", "float32.in[1]", "cast", "shape", "add", "float32[2]"]
    assert [node.name for node in graph.node] == names


def test_values_without_a_type_are_refused_where_float16_could_be_chosen() -> None:
    node = onnx.helper.make_node("Frobnicate", ["x"], ["y"], name="n", domain="elsewhere")
    graph = onnx.helper.make_graph([node], "g", [onnx.helper.make_tensor_value_info("x", 1, [2])], [])
    with pytest.raises(UnsupportedError, match=r"node 'n' .Frobnicate. gives a value of unknown type"):
        lower.name_float32(graph)


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


def test_trtexec_leaves_fixed_shapes_out() -> None:
    shapes = {"a": ((1, 2), (1, 2), (1, 2)), "b": ((1,), (2,), (3,))}
    told = settings.builder_settings(
        (10, 16), "float32", Path("g.onnx"), [shapes], library=None, embed=True, in_place=True
    )
    command = settings.command((10, 16), Path("g.onnx"), Path("e.engine"), told, None)
    assert "--minShapes=b:1 --optShapes=b:2 --maxShapes=b:3" in command
