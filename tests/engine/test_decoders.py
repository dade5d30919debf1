"""Engines of language models with a key-value cache: what the parser is given, profiles, the printed command."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from decoders import DECODERS
from fake_builder import FakeTensorRT, plugin_of, trtexec
from families import random_adapter
from graphs import without_plugin
from parser_tables import TABLES, VERSIONS, Version, objections

from sdct_export import contract, export_merged, export_multi
from sdct_export.bundle.description import Bundle
from sdct_export.cli import main
from sdct_export.engine import lower
from sdct_export.engine.build import (
    GRAPH_FILE,
    OLD_GRAPH_FILE,
    OLDEST_GRAPH_FILE,
    SCATTER_GRAPH_FILE,
    EngineManifest,
    Profile,
    build_engine,
    default_profile,
    engine_profiles,
    prepare_graph,
)
from sdct_export.errors import AdapterFormatError, ConfigError, UnsupportedError

QUICK = ("gemma2", "gpt2")  # windows, soft caps, RMS norms, Gelu; Conv1D layers, LayerNormalization, learned positions
FILES = {
    "8.5.3": OLDEST_GRAPH_FILE, "8.6.1": OLD_GRAPH_FILE, "9.3.0": OLD_GRAPH_FILE, "10.0.1": GRAPH_FILE,
    "10.14.1": GRAPH_FILE, "10.15.1": SCATTER_GRAPH_FILE, "10.16.0": SCATTER_GRAPH_FILE, "11.1.0": SCATTER_GRAPH_FILE,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A family's bundle for TensorRT, made once."""

    def make(name: str, dtype: str = "float32", target: str = "tensorrt", merged: bool = False) -> Bundle:
        family = DECODERS[name]
        model = family.model()
        adapter = random_adapter(family, model, 1)
        if merged:
            return export_merged(model, adapter, tmp_path_factory.mktemp(name) / "out", target=target, dtype=dtype)
        return export_multi(model, {"a": adapter}, tmp_path_factory.mktemp(name) / "out", target=target, dtype=dtype)

    return functools.cache(make)


CASES = [
    *((name, "float32") for name in DECODERS),
    ("gemma2", "float16"), ("gemma2", "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(*case, marks=[] if case[0] in QUICK else pytest.mark.slow, id="-".join(case)) for case in CASES],
)
def test_every_node_is_in_the_parsers_table(bundles: Any, name: str, dtype: str, version: Version) -> None:
    bundle = bundles(name, dtype)
    if dtype == "bfloat16" and version < (10, 0):
        with pytest.raises(UnsupportedError, match=r"TensorRT 8\.5 is too old for bfloat16"):
            prepare_graph(bundle, version=version)
        return
    model = onnx.load(prepare_graph(bundle, version=version), load_external_data=False)
    assert objections(model, version) == []
    assert {node.op_type for node in model.graph.node if node.domain} == {contract.OP_TYPE}
    written = {node.op_type for node in model.graph.node} & {"ScatterND", "TensorScatter"}
    assert written == {"TensorScatter" if version >= (10, 15) else "ScatterND"}


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_the_bundles_own_graph_is_not_what_parsers_take(bundles: Any, version: Version) -> None:
    """The tables find what the pass is for: int64 CumSum, a default input; before 10 also Shape with bounds."""
    found = " ".join(objections(onnx.load(bundles("gemma2").model_path, load_external_data=False), version))
    assert "CumSum" in found
    assert "inputs with a default: ['last_logits']" in found
    assert ("bounds are ignored" in found) == (version < (10, 0))
    assert not set(TABLES[version]) & {"Attention", "RotaryEmbedding", "RMSNormalization"}  # not in all of them


@pytest.mark.parametrize("version", [(8, 5), (10, 0), (10, 16)], ids=str)
@pytest.mark.parametrize("name", QUICK)
def test_shapes_of_both_profiles_go_through_the_graph(bundles: Any, name: str, version: Version) -> None:
    bundle = bundles(name)
    cache = bundle.cache
    profile = Profile(batch=(1, 3, 7), sequence=(1, 5, 11), length=(13, 17, 19), slots=(2, 3, 5), blend=(1, 2, 3))
    profiles = engine_profiles(bundle, profile, version)
    assert len(profiles) == (2 if version >= (9, 0) else 1)
    graph = without_plugin(prepare_graph(bundle, version=version), bundle.path / "shapes.tmp.onnx")
    model = onnx.load(graph, load_external_data=False)
    assert {value.name for value in model.graph.input} == set(profiles[0])
    for shapes in profiles:
        for i in range(3):
            given = onnx.ModelProto()
            given.CopyFrom(model)
            for value in given.graph.input:
                for dim, extent in zip(value.type.tensor_type.shape.dim, shapes[value.name][i], strict=True):
                    dim.dim_value = extent
            inferred = onnx.shape_inference.infer_shapes(given, check_type=True, strict_mode=True, data_prop=True)
            found = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.output}
            batch = shapes[contract.INPUT_IDS][i][0]
            assert found["logits"][:2] == [batch, 1]
            for past, present in zip(cache.pasts, cache.presents, strict=True):
                assert tuple(found[present]) == shapes[past][i]
                assert shapes[past][i] == (batch, cache.kv_heads, (13, 17, 19)[i], cache.head_size)
    assert [shapes[contract.INPUT_IDS] for shapes in profiles] == (
        [((1, 1), (3, 5), (7, 11)), ((1, 1), (3, 1), (7, 1))]
        if version >= (9, 0)
        else [((1, 1), (3, 1), (7, 11))]  # one for both, tuned for a token
    )


@pytest.mark.parametrize("name", QUICK)
def test_each_versions_graph_computes_the_same(bundles: Any, name: str) -> None:
    """A prompt, then a token, into buffers of numbers that nobody may see."""
    bundle = bundles(name)
    cache, rng = bundle.cache, np.random.default_rng(4)
    start = np.array([[2], [0], [5]])
    feeds: dict[str, Any] = {
        "input_ids": rng.integers(0, 99, (3, 4)),
        "position_ids": start + np.arange(4),
        "kept": np.array([[3], [1], [0]]),
        "adapter_ids": np.zeros((3, 1), np.int32),
        "adapter_scales": np.zeros((3, 1), np.float32),
    }
    pasts = rng.normal(size=(len(cache.pasts), 3, cache.kv_heads, 12, cache.head_size)).astype(np.float32)
    results = []
    for version, noise in (((10, 16), 0.0), ((10, 16), 50.0), ((10, 0), 50.0), ((8, 6), 50.0), ((8, 5), 50.0)):
        graph = without_plugin(prepare_graph(bundle, version=version), bundle.path / "same.tmp.onnx")
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        hidden = np.arange(12) >= start + 4
        own = np.where(hidden[None, :, None, :, None], pasts + np.float32(noise), pasts)
        given = feeds | dict(zip(cache.pasts, own, strict=True))
        for value in session.get_inputs():
            if value.name.startswith("sdct."):
                shape = [2 if isinstance(extent, str) else extent for extent in value.shape]
                given[value.name] = np.zeros(shape, np.int32 if "int32" in value.type else np.float32)
        logits, *presents = session.run(["logits", *cache.presents], given)
        assert logits.shape == (3, 1, 99)
        for past, present in zip(own, presents, strict=True):
            new = (np.arange(12) >= start) & ~hidden
            np.testing.assert_array_equal(np.where(new[:, None, :, None], 0, present - past), 0)
            assert (np.abs(present - past).max((1, 3))[new] > 0).all()
        results.append(logits)
    assert np.abs(results[0]).max() > 0.1
    assert np.array_equal(results[0], results[1])
    for other in results[2:]:
        np.testing.assert_allclose(other, results[0], atol=2e-5)


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("merged", [False, True], ids=["multi", "merged"])
def test_the_printed_command_asks_for_what_the_build_asks_for(
    bundles: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, merged: bool
) -> None:
    bundle = bundles("gpt2", merged=merged)
    number = [int(part) for part in version.split(".")]
    plugin_of(bundle.path, number[0] * 10000 + number[1] * 100 + number[2], monkeypatch)
    ours = FakeTensorRT(version)
    monkeypatch.setitem(sys.modules, "tensorrt", ours)
    lines: list[str] = []
    profile = dataclasses.replace(default_profile(bundle), sequence=(1, 16, 32))
    manifest = build_engine(bundle, tmp_path / "x.engine", profile=profile, report=lines.append)
    assert ours.said["graph"] == str(bundle.path / FILES[version])
    theirs = trtexec(lines[0], version)
    for what in ("graph", "network", "set", "cleared", "preview", "profiles"):
        assert ours.said.get(what) == theirs.said.get(what), what
    several = number[0] >= 9
    assert ours.said["profiles"] == 1 + several
    assert ("--profile=1" in lines[0]) == several
    shapes = [manifest.shapes, manifest.decode] if several else [manifest.shapes]
    for told, meant, replayed in zip(ours.said["profile shapes"], shapes, theirs.said["profile shapes"], strict=True):
        assert told == meant
        fixed = {name for name in told if name not in replayed}
        assert {name: told[name] for name in replayed} == replayed
        assert all(len({extents for profile in shapes for extents in profile[name]}) == 1 for name in fixed)
    assert EngineManifest.load(tmp_path / "x.engine") == manifest
    assert manifest.in_place == (FILES[version] == SCATTER_GRAPH_FILE)
    assert bool(manifest.decode) == several
    assert manifest.shapes["input_ids"][2] == (32, 32)
    assert manifest.shapes["past_key_values.1.value"] == ((1, 6, 1, 8), (8, 6, 96, 8), (32, 6, 96, 8))


def test_bundles_and_sizes_that_cannot_be_are_refused(bundles: Any, tmp_path: Path) -> None:
    for target in ("ort", "standard"):
        with pytest.raises(UnsupportedError, match=f"cache for target '{target}'; export it .* --target tensorrt, or"):
            prepare_graph(bundles("gpt2", target=target))
    bundle = bundles("gpt2")
    with pytest.raises(ConfigError, match=r"a step of 65 tokens \(--sequence\) does not fit into a cache of 64"):
        engine_profiles(bundle, Profile(sequence=(1, 8, 65), length=(1, 64, 64)), (10, 0))
    assert default_profile(bundle).length == (1, 96, 96)
    standard = onnx.load(bundles("gpt2", target="standard").model_path, load_external_data=False)
    with pytest.raises(UnsupportedError, match="no named values for what a token sees"):
        lower.keep_in_buffers(standard, bundle.cache, in_place=True)
    other = onnx.load(bundle.model_path, load_external_data=False)
    next(node for node in other.graph.node if "present.1.key" in node.output).op_type = "Identity"
    with pytest.raises(
        UnsupportedError, match=r"'present\.1\.key' is not 'past_key_values\.1\.key' and the new tokens"
    ):
        lower.keep_in_buffers(other, bundle.cache, in_place=True)


@pytest.mark.parametrize(
    "damage", [{"decode": {"x": [[1], [1], [1]]}}, {"decode": []}, {"in_place": 1}, {"decode": {"x": 3}}]
)
def test_damaged_manifests(tmp_path: Path, damage: dict[str, Any]) -> None:
    raw = {"format_version": 1, "model_sha256": "a", "engine_sha256": "b", "tensorrt": "10.0", "plugin": "none"}
    raw |= {"concurrent": True, "shapes": {"x": [[1, 2], [1, 2], [1, 2]]}}
    file = tmp_path / "x.engine.json"
    file.write_text(json.dumps(raw))
    assert not EngineManifest.load(tmp_path / "x.engine").decode  # as older versions wrote it
    file.write_text(json.dumps(raw | damage))
    with pytest.raises(AdapterFormatError, match="is damaged"):
        EngineManifest.load(tmp_path / "x.engine")


def test_the_command_line_builds_one(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles("gpt2")
    trt = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    plugin_of(bundle.path, 101600, monkeypatch)
    arguments = ["build", str(bundle.path), "--length", "8:16:32", "--sequence", "1:4:8", "--batch", "2", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["decode"]["past_key_values.0.key"] == [[2, 6, 8, 8], [2, 6, 16, 8], [2, 6, 32, 8]]
    assert found["decode"]["input_ids"] == [[2, 1]] * 3
    assert found["in_place"]
