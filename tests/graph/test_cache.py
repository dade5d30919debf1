"""Language models with a key-value cache against transformers: prefill and decode, padding, windows, refusals."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bfloat16_graphs
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from decoders import DECODERS, Steps, padded, random_rows, torch_logits
from families import FAMILIES, Family, feeds, random_adapter
from torch import nn

import sdct_export.graph.cache as cache_module
from sdct_export import SdctAdapter, SdctConfig, export_merged, export_multi, get_sdct_model
from sdct_export.bundle.description import Bundle
from sdct_export.contract import Cache
from sdct_export.errors import BaseMismatchError, ConfigError, UnsupportedError
from sdct_export.graph.attention import NAME
from sdct_export.graph.cache import trace_decoder
from sdct_export.runtime import MultiAdapterModel
from sdct_export.verify import verify

ROWS: list[dict[str, float]] = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.5, "b": -0.75}, {}]
LENGTHS, STEPS = (9, 6, 3, 8, 1), 5  # windows are 4 to 6: crossed in prefill, and by short rows in decode
# quick: each target, windows and soft caps, a family of Conv1D layers; the others go the same way
QUICK = {
    ("llama", "ort"), ("gemma2", "ort"), ("gpt2", "standard"), ("mistral", "standard"), ("gemma3", "tensorrt"),
}  # fmt: skip


@dataclasses.dataclass
class Exported:
    """A family's bundle, and its base graph of the same trace."""

    model: nn.Module
    adapters: dict[str, SdctAdapter]
    bundle: Bundle
    base: onnxruntime.InferenceSession
    multi: onnxruntime.InferenceSession

    def steps(self, rows: list[dict[str, float]]) -> Steps:
        assert self.bundle.cache is not None
        return Steps(self.multi, self.bundle.cache, feeds(self.bundle, rows, self.adapters))

    def base_steps(self) -> Steps:
        assert self.bundle.cache is not None
        return Steps(self.base, self.bundle.cache, {})


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options)


def adapters_of(family: Family, model: nn.Module) -> dict[str, SdctAdapter]:
    return {"a": random_adapter(family, model, 1), "b": random_adapter(family, model, 2, n=55, scaling=0.3)}


def make(family: Family, target: str, folder: Path, dtype: str = "float32") -> Exported:
    model = family.model()
    adapters = adapters_of(family, model)
    trace = cache_module.trace_decoder

    def traced(*arguments: Any) -> Any:
        graph, cache = trace(*arguments)
        ir.save(graph, folder / "base.onnx")
        return graph, cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "trace_decoder", traced)
        bundle = export_multi(model, adapters, folder / "bundle", target=target, dtype=dtype)
    return Exported(model, adapters, bundle, session(folder / "base.onnx"), session(bundle.model_path))


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Exported]:
    """A family's export by name and target, made once."""
    return functools.cache(lambda name, target: make(DECODERS[name], target, tmp_path_factory.mktemp(name)))


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(
            (name, target), marks=[] if (name, target) in QUICK else [pytest.mark.slow], id=f"{name}-{target}"
        )
        for name in DECODERS
        for target in ("ort", "standard", "tensorrt")
    ],
)
def exported(request: pytest.FixtureRequest, exports: Callable[[str, str], Exported]) -> Exported:
    return exports(*request.param)


@pytest.fixture(scope="session")
def llama(exports: Callable[[str, str], Exported]) -> Exported:
    return exports("llama", "ort")


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_and_decode_equal_torch(exported: Exported, side: str) -> None:
    tokens = random_rows([length + STEPS for length in LENGTHS], seed=3)
    want = torch_logits(exported.model, tokens, ROWS, exported.adapters)
    base = torch_logits(exported.model, tokens, [{}] * len(ROWS), exported.adapters)
    ids, mask = padded([row[:length] for row, length in zip(tokens, LENGTHS, strict=True)], side)
    steps, alone, prefill = exported.steps(ROWS), exported.base_steps(), exported.steps(ROWS)
    last = prefill.step(ids, mask, last=True)
    assert last.shape == (len(ROWS), 1, want[0].shape[-1])
    logits, plain = steps.step(ids, mask), alone.step(ids, mask)
    for i, length in enumerate(LENGTHS):
        real = mask[i] != 0
        np.testing.assert_allclose(logits[i, real], want[i][:length], atol=1e-4, rtol=0)
        np.testing.assert_allclose(last[i, 0], want[i][length - 1], atol=1e-4, rtol=0)
        assert np.isfinite(logits[i]).all()
        if ROWS[i]:
            assert np.abs(want[i] - base[i]).max() > 0.02, "the adapters change too little to test"
        else:
            assert logits[i].tobytes() == plain[i].tobytes()
    for step in range(STEPS):
        new = np.array([[row[length + step]] for row, length in zip(tokens, LENGTHS, strict=True)])
        logits, plain = steps.step(new, np.ones_like(new)), alone.step(new, np.ones_like(new))
        assert logits.shape == (len(ROWS), 1, want[0].shape[-1])
        for i, length in enumerate(LENGTHS):
            np.testing.assert_allclose(logits[i, 0], want[i][length + step], atol=1e-4, rtol=0)
            if not ROWS[i]:
                assert logits[i].tobytes() == plain[i].tobytes()


def test_a_prompt_in_chunks_with_padding_equals_one_in_a_piece(exported: Exported) -> None:
    (tokens,) = random_rows([11], seed=4)
    want = torch_logits(exported.model, [tokens], [{"b": 1.0}], exported.adapters)[0]
    steps = exported.steps([{"b": 1.0}])
    got = []
    for start, end, left, right in ((0, 4, 2, 0), (4, 7, 0, 3), (7, 9, 1, 1), (9, 10, 0, 0), (10, 11, 0, 0)):
        mask = np.pad(np.ones((1, end - start), np.int64), ((0, 0), (left, right)))
        ids = np.pad(tokens[None, start:end], ((0, 0), (left, right)), constant_values=5)
        got.append(steps.step(ids, mask)[0, mask[0] != 0])
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-4, rtol=0)


def test_a_finished_row_rests_while_others_go_on(exported: Exported) -> None:
    """Its new column is padding; what it gets does not touch its cache, so that it can go on later."""
    tokens = random_rows([8, 8], seed=5)
    want = torch_logits(exported.model, tokens, [{}, {"a": 1.0}], exported.adapters)
    steps = exported.steps([{}, {"a": 1.0}])
    steps.step(*padded([row[:4] for row in tokens], "right"))
    for own, other in ((None, 4), (None, 5), (4, 6), (5, 7)):
        new = np.array([[9 if own is None else tokens[0][own]], [tokens[1][other]]])
        logits = steps.step(new, np.array([[int(own is not None)], [1]]))
        np.testing.assert_allclose(logits[1, 0], want[1][other], atol=1e-4, rtol=0)
        if own is not None:
            np.testing.assert_allclose(logits[0, 0], want[0][own], atol=1e-4, rtol=0)


def test_past_and_present_may_share_a_buffer(llama: Exported) -> None:
    assert llama.bundle.cache is not None
    cache, tokens = llama.bundle.cache, random_rows([7, 4], seed=6)
    rows: list[dict[str, float]] = [{"a": 1.0}, {}]
    want = torch_logits(llama.model, tokens, rows, llama.adapters)
    shape = (2, cache.kv_heads, 16, cache.head_size)
    buffers = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, np.nan, "f")) for name in cache.pasts}
    mask = np.zeros((2, 0), np.int64)
    for start, end in ((0, 2), (2, 3), (3, 4)):
        mask = np.concatenate([mask, np.ones((2, end - start), np.int64)], 1)
        binding = llama.multi.io_binding()
        arrays = {
            "input_ids": np.stack([row[start:end] for row in tokens]),
            "attention_mask": mask,
            "position_ids": np.tile(np.arange(start, end), (2, 1)),
        }
        for name, array in (arrays | feeds(llama.bundle, rows, llama.adapters)).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", "cpu")
        for past, present in zip(cache.pasts, cache.presents, strict=True):
            binding.bind_ortvalue_input(past, buffers[past])
            binding.bind_ortvalue_output(present, buffers[past])
        llama.multi.run_with_iobinding(binding)
        logits = binding.get_outputs()[0].numpy()
        for i in range(2):
            np.testing.assert_allclose(logits[i], want[i][start:end], atol=1e-4, rtol=0)


def test_the_description_says_what_the_graph_has(exported: Exported) -> None:
    bundle, graph = exported.bundle, onnx.load(exported.bundle.model_path, load_external_data=False).graph
    assert bundle.cache is not None
    assert Bundle.load(bundle.path) == bundle
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    own = ["input_ids", "attention_mask", "position_ids", *bundle.cache.pasts, "last_logits"]
    assert list(inputs)[: len(own)] == own
    for name in bundle.cache.pasts:
        dims = [dim.dim_param or dim.dim_value for dim in inputs[name].shape.dim]
        assert dims == ["batch", bundle.cache.kv_heads, "past", bundle.cache.head_size]
    assert [value.name for value in graph.output] == ["logits", *bundle.cache.presents]
    assert [spec.shape for spec in bundle.inputs] == [("batch", "sequence")] * 2
    assert not [weight.name for weight in graph.initializer if weight.name.startswith("model.model.")]
    attention = {node.op_type for node in graph.node if node.domain == "com.microsoft"}
    want = {"GroupQueryAttention"} if bundle.cache.target == "ort" else set()
    assert attention == want | (attention & {"RotaryEmbedding"} if want else set())
    assert exported.model.config._attn_implementation != NAME


def test_one_shot_runs_and_verify_hold(exported: Exported) -> None:
    tokens = random_rows(LENGTHS, seed=8)
    want = torch_logits(exported.model, tokens, ROWS, exported.adapters)
    with MultiAdapterModel(exported.bundle) as model:
        for side in ("left", "right"):
            ids, mask = padded(tokens, side)
            got = model.run({"input_ids": ids, "attention_mask": mask}, [row or None for row in ROWS])
            assert set(got) == {"logits"}
            for i, logits in enumerate(want):
                np.testing.assert_allclose(got["logits"][i, mask[i] != 0], logits, atol=1e-4, rtol=0)
    report = verify(exported.bundle.path, exported.model)
    assert report.ok, [check for check in report.checks if not check.ok]
    assert {"recorded mixed", "base rows", "torch 0.5 a + 0.5 b"} <= {check.name for check in report.checks}


def test_a_trained_adapter_is_held_against_its_training_beside_padding(llama: Exported, tmp_path: Path) -> None:
    tuned = get_sdct_model(DECODERS["llama"].model(), SdctConfig(["q_proj"], n_coefficients=30, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    tuned.save_adapter(tmp_path / "trained")
    trained = SdctAdapter.load(tmp_path / "trained")
    assert trained.trained_on is not None
    assert trained.trained_on.probe is not None
    assert not trained.trained_on.probe.inputs["attention_mask"].all()
    probe = trained.trained_on.probe
    wrong = probe.outputs["logits"].copy()
    wrong[0] += 1  # of the first token of the first row
    record = dataclasses.replace(trained.trained_on, probe=dataclasses.replace(probe, outputs={"logits": wrong}))
    with MultiAdapterModel(llama.bundle) as model:
        model.load_adapter("trained", tmp_path / "trained")
        with pytest.raises(BaseMismatchError, match="gives other outputs in this bundle than when it was trained"):
            model.load_adapter("other", dataclasses.replace(trained, trained_on=record))
        assert "trained" in model.adapters
    bundle = export_multi(DECODERS["llama"].model(), {"t": tmp_path / "trained"}, tmp_path / "bundle")
    checks = {check.name: check.ok for check in verify(bundle.path).checks}
    assert checks["trained t"]
    assert all(checks.values())


def test_merged_models_have_a_cache_too(tmp_path: Path) -> None:
    family = DECODERS["gpt2"]
    model = family.model()
    adapters = adapters_of(family, model)
    merged = export_merged(model, adapters["a"], tmp_path / "merged")
    assert merged.cache == Cache("ort", layers=2, kv_heads=6, head_size=8, dtype="float32")
    (tokens,) = random_rows([9], seed=9)
    want = torch_logits(model, [tokens], [{"a": 1.0}], adapters)[0]
    steps = Steps(session(merged.model_path), merged.cache, {})
    got = [steps.step(tokens[None, part], np.ones((1, n), np.int64))[0] for part, n in ((slice(0, 8), 8), ([8], 1))]
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="is about the cache"):
        export_merged(model, adapters["a"], tmp_path / "out", cache=False, target="ort")


def test_adapters_on_every_linear_layer_and_an_output_layer_of_their_own(tmp_path: Path) -> None:
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    family = dataclasses.replace(DECODERS["llama"], targets=layers, saved=("lm_head",))
    model = family.model()
    adapters = adapters_of(family, model)
    head = np.random.default_rng(1).normal(scale=0.2, size=model.lm_head.weight.shape).astype(np.float32)
    adapters["b"] = dataclasses.replace(
        adapters["b"],
        saved={"lm_head.weight": head},
        config=dataclasses.replace(adapters["b"].config, modules_to_save=("lm_head",)),
    )
    bundle = export_multi(model, adapters, tmp_path / "out")
    assert len(bundle.groups) == 2 * 4
    assert [head.module for head in bundle.heads] == ["lm_head"]
    tokens = random_rows([length + 1 for length in LENGTHS], seed=12)
    want = torch_logits(model, tokens, ROWS, adapters)
    assert bundle.cache is not None
    steps = Steps(session(bundle.model_path), bundle.cache, feeds(bundle, ROWS, adapters))
    logits = steps.step(*padded([row[:-1] for row in tokens], "left"), last=True)
    for i, expected in enumerate(want):
        np.testing.assert_allclose(logits[i, 0], expected[-2], atol=1e-4, rtol=0)
    logits = steps.step(np.array([[row[-1]] for row in tokens]), np.ones((len(ROWS), 1), np.int64))
    for i, expected in enumerate(want):
        np.testing.assert_allclose(logits[i, 0], expected[-1], atol=1e-4, rtol=0)
    report = verify(bundle.path, model)
    assert report.ok, [check for check in report.checks if not check.ok]


def test_float16_stays_near_float32(tmp_path: Path) -> None:
    exported = make(DECODERS["llama"], "ort", tmp_path, dtype="float16")
    assert exported.bundle.cache is not None
    assert exported.bundle.cache.dtype == "float16"
    tokens = random_rows([10, 7], seed=10)
    rows: list[dict[str, float]] = [{"a": 1.0}, {}]
    want = torch_logits(exported.model, tokens, rows, exported.adapters)
    steps = exported.steps(rows)
    ids, mask = padded([tokens[0][:8], tokens[1][:5]], "left")
    logits = steps.step(ids, mask)
    for i, length in enumerate((8, 5)):
        np.testing.assert_allclose(logits[i, mask[i] != 0], want[i][:length], atol=1e-2)
    for step in range(2):
        logits = steps.step(np.array([[tokens[0][8 + step]], [tokens[1][5 + step]]]), np.ones((2, 1), np.int64))
        assert logits.dtype == np.float16
        np.testing.assert_allclose(logits[0, 0], want[0][8 + step], atol=1e-2)
        np.testing.assert_allclose(logits[1, 0], want[1][5 + step], atol=1e-2)
    with MultiAdapterModel(exported.bundle) as model:
        assert model.run({"input_ids": ids, "attention_mask": mask})["logits"].dtype == np.float16


@pytest.mark.parametrize(
    "target", ["ort", *(pytest.param(name, marks=pytest.mark.slow) for name in ("standard", "tensorrt"))]
)
def test_bfloat16_has_its_cache_and_attention_in_bfloat16(target: str, tmp_path: Path) -> None:
    """No CPU runs it: the same graph in float32 with its values rounded after each operator stands in."""
    family = DECODERS["llama"]
    model = family.model()
    adapters = adapters_of(family, model)
    bundle = export_multi(model, adapters, tmp_path / "out", target=target, dtype="bfloat16")
    assert bundle.cache is not None
    assert (bundle.dtype, bundle.cache.dtype) == ("bfloat16", "bfloat16")
    graph = bfloat16_graphs.loaded(bundle.model_path)
    types = bfloat16_graphs.types_of(graph.graph)
    for node in graph.graph.node:
        if node.op_type == "GroupQueryAttention":
            assert {types[name] for name in node.input[:5]} == {onnx.TensorProto.BFLOAT16}
    ends = {value.name: value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)}
    assert {ends[name] for name in (*bundle.cache.pasts, *bundle.cache.presents)} == {onnx.TensorProto.BFLOAT16}
    assert ends["logits"] == onnx.TensorProto.FLOAT
    tokens = random_rows([9, 6], seed=11)
    rows: list[dict[str, float]] = [{"a": 1.0}, {}]
    want = torch_logits(model.bfloat16().float(), tokens, rows, adapters)
    options = onnxruntime.SessionOptions()
    options.enable_mem_reuse = False  # the operator takes a rounded past for a buffer that it may write to
    options.log_severity_level = 3
    runner = bfloat16_graphs.session(bfloat16_graphs.rounded(graph), options)
    steps = Steps(runner, bundle.cache, feeds(bundle, rows, adapters))
    ids, mask = padded([row[:-2] for row in tokens], "right")
    got = [steps.step(ids, mask)[0]]
    for step in (-2, -1):
        new = np.array([[row[step]] for row in tokens])
        got.append(steps.step(new, np.ones_like(new))[0])
    np.testing.assert_allclose(np.concatenate(got), want[0], atol=0.15)


def gptj() -> nn.Module:
    config = transformers.GPTJConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=4, rotary_dim=8, n_positions=64)
    return transformers.GPTJForCausalLM(config).eval()


def gemma3(**fields: Any) -> nn.Module:
    return DECODERS["gemma3"].model(**fields)


def chunked(model: nn.Module) -> nn.Module:
    model.config.layer_types = ["full_attention", "chunked_attention"]
    return model


def sunk(model: nn.Module) -> nn.Module:
    """An attention that is handed something beside keys and values, as gpt-oss hands its sinks."""
    for layer in model.model.layers:
        before = layer.self_attn.forward
        layer.self_attn.forward = functools.partial(before, s_aux=torch.zeros(4))
    return model


def rotated_twice(model: nn.Module) -> nn.Module:
    """Whose keys are changed by where they stand in the batch, so that a cache of them means something else."""
    rotary = model.model.rotary_emb
    before = rotary.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return before(x, torch.arange(x.shape[1])[None].expand(x.shape[0], -1))

    rotary.forward = forward
    return model


REFUSED: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "no registry": (
        gptj,
        r"a GPTJForCausalLM cannot .*does not go through transformers' AttentionInterface.*no-cache",
    ),
    "both directions": (lambda: gemma3(use_bidirectional_attention=True), "a token sees the one 1 after it"),
    "sinks": (lambda: sunk(DECODERS["llama"].model()), "its attention takes 's_aux'"),
    "positions of its own": (lambda: rotated_twice(DECODERS["llama"].model()), "its logits are off by"),
    "other layers": (lambda: chunked(DECODERS["llama"].model()), "layers of the kind chunked_attention"),
    "no language model": (lambda: nn.Linear(2, 2), "a Linear cannot .*no language model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_have_a_cache_is_refused_by_name(name: str) -> None:
    build, reason = REFUSED[name]
    model = build()
    with pytest.raises(UnsupportedError, match=reason):
        trace_decoder(model)
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) != NAME


def test_targets_and_tasks_that_cannot_be_are_refused(llama: Exported, tmp_path: Path) -> None:
    model, adapters = llama.model, {"a": llama.adapters["a"]}
    for target, error, match in (
        ("coreml", ConfigError, "target must be one of ort, standard, tensorrt, got 'coreml'"),
    ):
        with pytest.raises(error, match=match):
            export_multi(model, adapters, tmp_path / "out", target=target)
    odd = FAMILIES["gpt2"].model()
    with pytest.raises(UnsupportedError, match="head sizes that are a multiple of 8, this GPT2LMHeadModel has 10"):
        trace_decoder(odd, "ort")
    family = FAMILIES["bert"]
    bert = family.model()
    for options in ({"cache": True}, {"target": "ort"}):
        with pytest.raises(ConfigError, match="for causal language models, this BertModel is for FEATURE_EXTRACTION"):
            export_multi(bert, {"a": random_adapter(family, bert, 1)}, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_windows_need_an_onnxruntime_that_counts_them_right(
    exports: Callable[[str, str], Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    windowed, plain = exports("gemma2", "ort").bundle, exports("llama", "ort").bundle
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with pytest.raises(UnsupportedError, match=r"one token too long in .* ONNX Runtime 1\.23\.2; install 1\.24"):
        MultiAdapterModel(windowed)
    MultiAdapterModel(plain).close()
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.0")
    MultiAdapterModel(windowed).close()


def test_float32_on_cuda_is_refused_where_the_operator_has_no_kernel(llama: Exported) -> None:
    with pytest.raises(UnsupportedError, match="computes in float16 and bfloat16 only; export with --dtype float16"):
        MultiAdapterModel(llama.bundle, device="cuda")
