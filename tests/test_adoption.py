"""Graphs of other tools with adapters put on them: numbers against torch with edited weights, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_graphs
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from decoders import DECODERS, padded, random_rows, torch_logits
from families import FAMILIES, Family, feeds, random_adapter, torch_rows
from foreign_graphs import genai_decoder
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sdct_export import SdctAdapter, SdctConfig, export_onnx, get_sdct_model
from sdct_export.adapter.entries import Array
from sdct_export.bundle.description import Bundle
from sdct_export.cli import main
from sdct_export.errors import (
    AdapterFormatError,
    BaseMismatchError,
    ConfigError,
    SdctError,
    UnsupportedError,
    VerificationError,
)
from sdct_export.foreign.match import match_weights
from sdct_export.foreign.weights import find_products
from sdct_export.graph.cache import trace_decoder
from sdct_export.graph.function_body import Ops
from sdct_export.graph.trace import trace
from sdct_export.runtime import MultiAdapterModel
from sdct_export.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:adapters run through the portable function")
ROWS: list[dict[str, float]] = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.5, "b": -0.75}]
LENGTHS = (9, 6, 3, 8)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@dataclasses.dataclass
class Adopted:
    """A decoder, its adapters, and the bundle around another tool's graph of it."""

    model: nn.Module
    adapters: dict[str, SdctAdapter]
    bundle: Bundle


def decoder(name: str = "llama") -> nn.Module:
    """With heads of 16 numbers: the operator rotates no others. Without windows."""
    windows = {"use_sliding_window": False, "layer_types": ["full_attention"] * 2} if name == "qwen2" else {}
    return DECODERS[name].model(hidden_size=64, head_dim=16, **windows)


def adopt(name: str, folder: Path, targets: tuple[str, ...], **options: Any) -> Adopted:
    model = decoder(name)
    family = dataclasses.replace(DECODERS[name], targets=targets)
    some = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(targets[:2])]
    adapters = {"a": random_adapter(family, model, 1), "b": random_adapter(family, model, 2, modules=some)}
    path = foreign_graphs.save(genai_decoder(model, **options), folder / "theirs")
    return Adopted(model, adapters, export_onnx(path, model, adapters, folder / "bundle"))


def generated(bundle: Bundle, prompts: list[Array], rows: list[dict[str, float]]) -> list[Any]:
    with MultiAdapterModel(bundle) as runner:
        return runner.generate(prompts, rows, max_new_tokens=6, stop_tokens=[], temperature=0.0, logprobs=True)  # type: ignore[arg-type]


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "packed": ("llama", ("q_proj", "v_proj", "down_proj"), {}),
    "packed, all layers": ("llama", ALL, {"order": "vqk"}),
    "apart": ("llama", ("q_proj", "v_proj"), {"packed": False}),
    "with biases": ("qwen2", ("k_proj", "v_proj", "lm_head"), {}),
}


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adopted]:
    made: dict[str, Adopted] = {}

    def get(case: str) -> Adopted:
        if case not in made:
            name, targets, options = CASES[case]
            made[case] = adopt(name, tmp_path_factory.mktemp("adopted"), targets, **options)
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_mixed_rows_equal_torch_with_edited_weights(adopted: Callable[[str], Adopted], case: str) -> None:
    one = adopted(case)
    tokens = random_rows(LENGTHS, 5)
    want = torch_logits(one.model, tokens, ROWS, one.adapters)
    plain = torch_logits(one.model, tokens, [{}] * len(ROWS), one.adapters)
    with MultiAdapterModel(one.bundle) as runner:
        for side in ("right", "left"):
            ids, mask = padded(tokens, side)
            logits = runner.run({"input_ids": ids, "attention_mask": mask}, ROWS)["logits"]
            for row, kept, expected, base, own in zip(logits, mask, want, plain, ROWS, strict=True):
                assert np.abs(row[kept != 0] - expected).max() <= 1e-5
                assert (np.abs(row[kept != 0] - base).max() > 1e-2) == bool(own)


@pytest.mark.parametrize("case", CASES)
def test_rows_are_continued_as_torch_does(adopted: Callable[[str], Adopted], case: str) -> None:
    check_continued(adopted(case))


def check_continued(one: Adopted) -> None:
    """Tokens and their probabilities in mixed rows of different lengths, against torch without a cache."""
    prompts = random_rows(LENGTHS, 6)
    for prompt, row, made in zip(prompts, ROWS, generated(one.bundle, prompts, ROWS), strict=True):
        whole = np.concatenate([prompt, made.tokens])
        (logits,) = torch_logits(one.model, [whole], [row], one.adapters)
        scores = torch.log_softmax(torch.from_numpy(logits).double(), -1)[len(prompt) - 1 : -1]
        assert tuple(scores.argmax(-1).tolist()) == made.tokens
        assert np.abs(scores.max(-1).values.numpy() - np.array(made.logprobs)).max() <= 1e-5


def test_the_graph_of_the_other_tool_keeps_its_bits(tmp_path: Path) -> None:
    one = adopt("llama", tmp_path, ("q_proj", "down_proj"))
    theirs = onnxruntime.InferenceSession(str(tmp_path / "theirs" / "model.onnx"))
    ids, mask = padded(random_rows((7, 7), 7), "right")
    cache = one.bundle.cache
    assert cache is not None
    empty = np.zeros((2, cache.kv_heads, 0, cache.head_size), np.float32)
    want = theirs.run(["logits"], {"input_ids": ids, "attention_mask": mask} | dict.fromkeys(cache.pasts, empty))[0]
    with MultiAdapterModel(one.bundle) as runner:
        mixed = runner.run({"input_ids": ids, "attention_mask": mask}, ["a", None])["logits"]
    assert np.array_equal(mixed[1], want[1])
    assert np.abs(mixed[0] - want[0]).max() > 1e-2


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.25), (8, 5e-2)])
def test_a_quantized_graph(tmp_path: Path, bits: int, limit: float) -> None:
    one = adopt("llama", tmp_path, ("q_proj", "v_proj", "down_proj"), bits=bits)
    assert one.bundle.foreign is not None
    assert 0 < one.bundle.foreign.rounding < limit
    assert one.bundle.foreign.change > one.bundle.foreign.rounding
    graph = ir.load(tmp_path / "theirs" / "model.onnx")
    weights = {
        name: module.weight.detach().numpy()
        for name, module in one.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    found = match_weights(find_products(graph.graph), weights)
    for name in weights:  # torch with the weights that the products see
        one.model.get_submodule(name).weight = nn.Parameter(torch.from_numpy(found.seen(name)))
    tokens = random_rows((9, 9), 5)
    rows = [{"a": 1.0}, {"b": 1.0}]
    want = torch_logits(one.model, tokens, rows, one.adapters)
    with MultiAdapterModel(one.bundle) as runner:
        ids, mask = padded(tokens, "right")
        got = runner.run({"input_ids": ids, "attention_mask": mask}, rows)["logits"]
    for row, expected in zip(got, want, strict=True):  # what is left is that products round what they multiply
        assert np.abs(row - expected).max() <= limit * np.abs(expected).max()
    report = verify(one.bundle.path, one.model)
    assert not report.ok  # another base by now: its weights were replaced


def test_verify_and_inspect(adopted: Callable[[str], Adopted]) -> None:
    one = adopted("packed")
    report = verify(one.bundle.path, one.model)
    assert report.ok, report
    names = {check.name for check in report.checks}
    assert {"weights of the graph", "base rows", "effect of a", "torch a", "recorded mixed"} <= names
    shown = CliRunner().invoke(main, ["inspect", str(one.bundle.path)])
    assert shown.exit_code == 0
    assert "graph made by: another-tool" in shown.output
    raw = json.loads(CliRunner().invoke(main, ["inspect", str(one.bundle.path), "--json"]).output)
    assert raw["foreign"]["producer"] == "another-tool"
    assert raw["cache"]["position_ids"] is False


def test_an_adapter_trained_later_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = decoder()
    trained = {}
    for name in ("first", "later"):
        tuned = get_sdct_model(base, SdctConfig(target_modules=["q_proj", "v_proj"], n_coefficients=20))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        tuned.save_adapter(tmp_path / name)
        trained[name] = tmp_path / name
        base = tuned.plain_base()
    path = foreign_graphs.save(genai_decoder(base, bits=8), tmp_path / "theirs")
    bundle = export_onnx(path, base, {"first": trained["first"]}, tmp_path / "bundle")
    assert any(check.name == "trained first" and check.ok for check in verify(bundle.path).checks)
    with MultiAdapterModel(bundle) as runner:
        runner.load_adapter("later", trained["later"])
        assert set(runner.adapters) == {"first", "later"}


def refused(graph: onnx.ModelProto, model: nn.Module, folder: Path, error: type[SdctError], message: str) -> None:
    """Exporting fails with that error and leaves nothing."""
    adapter = random_adapter(DECODERS["llama"], model, 1)
    path = foreign_graphs.save(graph, folder / "theirs", external=False)
    with pytest.raises(error, match=message):
        export_onnx(path, model, {"a": adapter}, folder / "bundle")
    assert sorted(p.name for p in folder.iterdir()) == ["theirs"]


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    model = decoder()
    graph = genai_decoder(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.v_proj.weight")[3, 5] += 1e-6
    message = r"1 of 6 layers .*'model.layers.1.self_attn.v_proj': .*has its first 3 rows"
    refused(graph, model, tmp_path, UnsupportedError, message)


def test_all_layers_that_lack_are_counted(tmp_path: Path) -> None:
    model = decoder()
    graph = genai_decoder(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    refused(graph, model, tmp_path, UnsupportedError, "6 of 6 layers .*no product has its weight")


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_base_that_differs_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    model = decoder()
    graph = genai_decoder(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.05)
    refused(graph, model, tmp_path, VerificationError, "something else than torch .recorded base")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_tensor_with_one_other_number_is_refused(tmp_path: Path, name: str) -> None:
    """Which no row that is compared may read."""
    model = decoder()
    graph = genai_decoder(model)
    with torch.no_grad():
        model.get_parameter(name)[-1].mul_(1.05)
    refused(graph, model, tmp_path, UnsupportedError, f"the graph has {name} with other numbers than this base")


def test_windows_that_the_graph_lacks_limit_its_rows(tmp_path: Path) -> None:
    family = DECODERS["mistral"]
    model = family.model(hidden_size=64, head_dim=16, sliding_window=24)
    graph = genai_decoder(model)
    for node in graph.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "local_window_size"]
        del node.attribute[:]
        node.attribute.extend(kept)
    path = foreign_graphs.save(graph, tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"windows of the base \(24 tokens\) are not those of the graph \(all\)"):
        bundle = export_onnx(path, model, {"a": random_adapter(family, model, 1)}, tmp_path / "bundle")
    assert bundle.max_tokens == 24
    prompt = np.arange(3, 21)
    with MultiAdapterModel(bundle) as runner:
        (one,) = runner.generate([prompt.tolist()], max_new_tokens=6, stop_tokens=[])
        with pytest.raises(ConfigError, match="24"):
            runner.generate([prompt.tolist()], max_new_tokens=7)
    logits = torch_logits(model, [np.array([*prompt, *one.tokens])], [{}], {})[0]
    assert logits[len(prompt) - 1 : -1].argmax(1).tolist() == list(one.tokens)


def test_rows_end_with_the_rotary_table(tmp_path: Path) -> None:
    model = decoder()
    path = foreign_graphs.save(genai_decoder(model), tmp_path / "theirs")
    bundle = export_onnx(path, model, {"a": random_adapter(DECODERS["llama"], model, 1)}, tmp_path / "bundle")
    assert bundle.max_tokens == 96


def test_another_rotation_is_refused(tmp_path: Path) -> None:
    model = decoder()
    other = decoder()
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    refused(genai_decoder(other), model, tmp_path, VerificationError, "something else than torch")


def test_what_could_not_be_compared_is_said(tmp_path: Path) -> None:
    model = decoder()
    graph = genai_decoder(model)
    folded = next(t for t in graph.graph.initializer if tuple(t.dims) == (99, 64))
    half = numpy_helper.from_array(numpy_helper.to_array(folded) / 3, folded.name)
    folded.CopyFrom(half)
    gather = next(n for n in graph.graph.node if n.op_type == "Gather" and n.input[0] == folded.name)
    third = numpy_helper.from_array(np.array(3, np.float32), "third")
    graph.graph.initializer.append(third)
    place = list(graph.graph.node).index(gather)
    output = gather.output[0]
    gather.output[0] = "thirds"
    graph.graph.node.insert(place + 1, helper.make_node("Mul", ["thirds", "third"], [output]))
    path = foreign_graphs.save(graph, tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"1 tensors of the base .*\(model.embed_tokens.weight\)"):
        export_onnx(path, model, {"a": random_adapter(DECODERS["llama"], model, 1)}, tmp_path / "bundle")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adopt("llama", tmp_path / "whole", ("q_proj",))


def edit(name: str) -> onnx.ModelProto:
    """The graph of a LLaMA with one thing that no bundle can have."""
    graph = genai_decoder(decoder())
    inner = graph.graph
    if name == "opset":
        graph.opset_import[0].version = 17
    elif name == "input":
        inner.input.append(helper.make_tensor_value_info("total_length", TensorProto.INT32, [1]))
    elif name == "output":
        inner.output.append(helper.make_tensor_value_info(inner.node[-3].output[0], TensorProto.FLOAT, ["b", "s", 64]))
    elif name == "batch":
        inner.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    elif name == "cache name":
        for node in inner.node:
            for place, value in enumerate(node.output):
                if value == "present.1.value":
                    node.output[place] = "value_1"
        next(v for v in inner.output if v.name == "present.1.value").name = "value_1"
    elif name == "cache size":
        next(v for v in inner.input if v.name.endswith("0.key")).type.tensor_type.shape.dim[1].dim_value = 3
    elif name == "windowed cache":
        node = next(n for n in inner.node if n.op_type == "GroupQueryAttention")
        node.attribute.append(helper.make_attribute("sliding_window_cache", 1))
    elif name == "int8 cache":
        for value in (*inner.input, *inner.output):
            if value.name.startswith(("past", "present")):
                value.type.tensor_type.elem_type = TensorProto.INT8
    elif name == "taken":
        inner.input.append(helper.make_tensor_value_info("adapter_ids", TensorProto.INT32, ["b", "k"]))
    return graph


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opset", "opset 17; adapters need opset 18"),
        ("input", "the graph takes total_length, which the runtime cannot give"),
        ("output", "LlamaForCausalLM gives logits"),
        ("batch", "a batch of 1"),
        ("cache name", "no present.1.value"),
        ("cache size", r"'past_key_values.0.key' is \[batch_size, 3, .*\[batch, 2, past, 16\]"),
        ("windowed cache", "windowed_kv_cache=false"),
        ("int8 cache", "cache of the graph is int8"),
        ("taken", "the graph takes adapter_ids"),
    ],
)
def test_graphs_that_no_bundle_can_have(tmp_path: Path, name: str, message: str) -> None:
    refused(edit(name), decoder(), tmp_path, UnsupportedError, message)


def unnamed(graph: ir.Model) -> onnx.ModelProto:
    """A graph without the module scopes and names that torch's exporter gives."""
    for number, node in enumerate(graph.graph):
        node.metadata_props.clear()
        node.name = f"n{number}"
        for place, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"v{number}.{place}"
    for number, value in enumerate(list(graph.graph.initializers.values())):
        value.name = f"w{number}"
    return ir.to_proto(graph)


@pytest.mark.parametrize("name", ["bert-classifier", "roberta-classifier", "vit", "gpt2", "phi3"])
def test_graphs_without_a_cache_or_names(tmp_path: Path, name: str) -> None:
    family: Family = FAMILIES[name]
    model = family.model()
    sizes = {"a": 2, "b": family.model().config.num_labels} if family.saved else {"a": None, "b": None}
    adapters = {n: random_adapter(family, model, i, labels=size) for i, (n, size) in enumerate(sizes.items(), 1)}
    path = foreign_graphs.save(unnamed(trace(model)), tmp_path / "theirs")
    bundle = export_onnx(path, model, adapters, tmp_path / "bundle")
    assert bundle.cache is None
    assert {head.module for head in bundle.heads} == {p.rpartition(".")[0] for p in adapters["a"].saved}
    from sdct_export.base.reference import sample_inputs

    inputs = sample_inputs(model, batch=4, sequence=7, seed=3)
    want = torch_rows(model, inputs, ROWS, adapters)
    session = onnxruntime.InferenceSession(str(bundle.model_path))
    arrays = {n: t.numpy() for n, t in inputs.items()} | feeds(bundle, ROWS, adapters)
    names = [spec.name for spec in bundle.outputs]
    for output, got in zip(names, session.run(names, arrays), strict=True):
        small = np.abs(want[output]) < 1e30
        assert np.abs(got - want[output])[small].max() <= 2e-5
    report = verify(bundle.path, model)
    assert report.ok, report


@pytest.mark.parametrize("positions", [True, False])
def test_a_graph_of_standard_operators_with_a_cache(tmp_path: Path, positions: bool) -> None:
    model = decoder()
    graph, _ = trace_decoder(model, "standard")
    inner = graph.graph
    inner.inputs.remove(next(value for value in inner.inputs if value.name == "last_logits"))
    if not positions:  # counted from the columns, as some tools do: wrong behind the padding of a shorter row
        given = next(value for value in inner.inputs if value.name == "position_ids")
        inner.inputs.remove(given)
        ops = Ops("columns")
        ids, mask = (next(v for v in inner.inputs if v.name == n) for n in ("input_ids", "attention_mask"))
        total, length = ops("Shape", mask, start=1, end=2), ops("Shape", ids, start=1, end=2)
        first = ops("Squeeze", ops("Sub", total, length))
        columns = ops("Range", first, ops("Squeeze", total), ops.const(1))
        places = ops("Expand", ops("Unsqueeze", columns, ops.const([0])), ops("Shape", ids))
        for user, index in list(given.uses()):
            user.replace_input_with(index, places)
        inner.extend(ops.nodes)
        inner.sort()
    path = foreign_graphs.save(unnamed(graph), tmp_path / "theirs")
    adapters = {n: random_adapter(DECODERS["llama"], model, seed) for seed, n in enumerate(("a", "b"), 1)}
    if not positions:
        with pytest.raises(VerificationError, match=r"key-value cache .* rows of different lengths"):
            export_onnx(path, model, adapters, tmp_path / "bundle")
        return
    one = Adopted(model, adapters, export_onnx(path, model, adapters, tmp_path / "bundle"))
    assert one.bundle.cache is not None
    assert (one.bundle.cache.target, one.bundle.cache.position_ids) == ("standard", True)
    check_continued(one)


def test_float16(tmp_path: Path) -> None:
    one = adopt("llama", tmp_path, ("q_proj", "v_proj"), dtype="float16")
    assert (one.bundle.dtype, one.bundle.cache and one.bundle.cache.dtype) == ("float16", "float16")
    assert verify(one.bundle.path, one.model).ok


def test_the_command_line(tmp_path: Path) -> None:
    model = decoder()
    model.save_pretrained(tmp_path / "base")
    random_adapter(DECODERS["llama"], model, 1).save(tmp_path / "a")
    path = foreign_graphs.save(genai_decoder(model), tmp_path / "theirs")
    (tmp_path / "theirs" / "genai_config.json").write_text('{"model": {}}')
    options = ["--onnx", str(path), "--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "a")]
    options += ["--output", str(tmp_path / "bundle")]
    for extra in (["--merge"], ["--dtype", "float16"], ["--target", "ort"], ["--quantize", "int8"], ["--no-cache"]):
        result = CliRunner().invoke(main, [*options, *extra])
        assert result.exit_code == 2
        assert f"{extra[0]} does not go with --onnx" in result.output
    result = CliRunner().invoke(main, [*options, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["producer"] == "another-tool"
    assert (tmp_path / "bundle" / "genai_config.json").read_text() == '{"model": {}}'
    result = CliRunner().invoke(main, [*options[:1], str(tmp_path / "none.onnx"), *options[2:-1], str(tmp_path / "x")])
    assert result.exit_code == 1
    assert "none.onnx is missing" in result.output
    with pytest.raises((AdapterFormatError, BaseMismatchError)):
        export_onnx(tmp_path / "base" / "config.json", model, {"a": tmp_path / "a"}, tmp_path / "y")
