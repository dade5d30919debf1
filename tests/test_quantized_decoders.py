"""Language models with a key-value cache on a quantized base: against torch on the stored weights, and uncached."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from decoders import DECODERS, Steps, padded, random_rows, torch_logits
from families import feeds, random_adapter
from quantized_file import products, with_stored_weights
from tiny_bundle import WORDS, write_tokenizer
from torch import nn

import sdct_export.graph.cache as cache_module
from sdct_export import SdctAdapter, export_merged, export_multi
from sdct_export.bundle.description import Bundle
from sdct_export.contract import Quantization
from sdct_export.graph.quantization import QuantizeWeights, linear_layers
from sdct_export.quality import quality
from sdct_export.runtime import MultiAdapterModel
from sdct_export.verify import verify

ROWS: list[dict[str, float]] = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.5, "b": -0.75}]
LENGTHS, STEPS = (9, 6, 3, 8), 4
SLOW = pytest.mark.slow
TINY = "int4 moves this model's outputs"  # of models as small as these int4 moves the outputs by a third


@dataclasses.dataclass
class Exported:
    model: nn.Module  # float
    adapters: dict[str, SdctAdapter]
    bundle: Bundle
    base: Path  # the same trace without adapters, quantized

    def steps(self, rows: list[dict[str, float]]) -> Steps:
        assert self.bundle.cache is not None
        return Steps(session(self.bundle.model_path), self.bundle.cache, feeds(self.bundle, rows, self.adapters))


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options)


def make(name: str, target: str, quantize: str, level: int, folder: Path) -> Exported:
    family = DECODERS[name]
    model = family.model()
    adapters = {"a": random_adapter(family, model, 1), "b": random_adapter(family, model, 2, n=55, scaling=0.3)}
    trace = cache_module.trace_decoder

    def traced(*arguments: Any) -> Any:
        graph, cache = trace(*arguments)
        ir.save(graph, folder / "float.onnx")
        return graph, cache

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", TINY)
        patch.setattr(cache_module, "trace_decoder", traced)
        bundle = export_multi(
            model, adapters, folder / "bundle", target=target, quantize=quantize, accuracy_level=level
        )
    base = ir.load(folder / "float.onnx")
    settings = Quantization({"int8": 8, "int4": 4}[quantize], 32, level)
    QuantizeWeights(linear_layers(model, (), "CAUSAL_LM"), settings)(base)
    ir.save(base, folder / "base.onnx")
    return Exported(model, adapters, bundle, folder / "base.onnx")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str, int], Exported]:
    return functools.cache(lambda *chosen: make(*chosen, tmp_path_factory.mktemp("export")))


# level 1 multiplies in float32, so that nothing but the weights is rounded
QUICK = {("llama", "ort", "int4"), ("gemma2", "ort", "int8"), ("gpt2", "standard", "int4")}
EXACT = [
    pytest.param(name, target, quantize, marks=() if (name, target, quantize) in QUICK else SLOW)
    for name in ("llama", "qwen3", "gemma2", "phi3", "gpt2")
    for target in ("ort", "standard")
    for quantize in ("int8", "int4")
]


@pytest.mark.parametrize(("name", "target", "quantize"), EXACT)
def test_prefill_and_decode_are_torch_on_the_stored_weights(
    exports: Callable[[str, str, str, int], Exported], name: str, target: str, quantize: str
) -> None:
    made = exports(name, target, quantize, 1)
    tokens = random_rows([length + STEPS for length in LENGTHS], seed=3)
    stored = with_stored_weights(made.model, made.bundle.model_path)
    want = torch_logits(stored, tokens, ROWS, made.adapters)
    plain = torch_logits(made.model, tokens, ROWS, made.adapters)
    assert made.bundle.cache is not None
    steps, alone = made.steps(ROWS), Steps(session(made.base), made.bundle.cache, {})
    ids, mask = padded([row[:length] for row, length in zip(tokens, LENGTHS, strict=True)], "left")
    logits, base = steps.step(ids, mask), alone.step(ids, mask)
    for i, length in enumerate(LENGTHS):
        real = mask[i] != 0
        np.testing.assert_allclose(logits[i, real], want[i][:length], atol=1e-4, rtol=0)
        assert np.abs(want[i] - plain[i]).max() > 1e-3, "quantized it is"
        assert (logits[i].tobytes() == base[i].tobytes()) == (not ROWS[i])
    for step in range(STEPS):
        new = np.array([[row[length + step]] for row, length in zip(tokens, LENGTHS, strict=True)])
        logits, base = steps.step(new, np.ones_like(new)), alone.step(new, np.ones_like(new))
        for i, length in enumerate(LENGTHS):
            np.testing.assert_allclose(logits[i, 0], want[i][length + step], atol=1e-4, rtol=0)
            assert (logits[i].tobytes() == base[i].tobytes()) == (not ROWS[i])


ROUNDED = [
    pytest.param(name, target, quantize, marks=() if name == "llama" else SLOW)
    for name, target, quantize in (
        ("llama", "ort", "int8"), ("qwen3", "standard", "int4"), ("gemma2", "ort", "int4"), ("phi3", "ort", "int8"),
        ("gpt2", "ort", "int8"),
    )
]  # fmt: skip


@pytest.mark.parametrize(("name", "target", "quantize"), ROUNDED)
def test_with_rounded_inputs_steps_are_one_run_without_a_cache(
    exports: Callable[[str, str, str, int], Exported], name: str, target: str, quantize: str, tmp_path: Path
) -> None:
    made = exports(name, target, quantize, 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TINY)
        uncached = export_multi(made.model, made.adapters, tmp_path / "b", quantize=quantize, cache=False)
    settings = made.bundle.quantization
    assert settings is not None
    assert uncached.quantization is not None
    assert set(settings.modules) == set(uncached.quantization.modules)
    tokens = random_rows([length + STEPS for length in LENGTHS], seed=4)
    ids, mask = padded(tokens, "right")
    whole = MultiAdapterModel(uncached).run({"input_ids": ids, "attention_mask": mask}, [row or None for row in ROWS])
    want = [logits[real != 0] for logits, real in zip(whole["logits"], mask, strict=True)]
    steps = made.steps(ROWS)
    ids, mask = padded([row[:length] for row, length in zip(tokens, LENGTHS, strict=True)], "right")
    logits = steps.step(ids, mask)
    got = [[logits[i, :length]] for i, length in enumerate(LENGTHS)]
    for step in range(STEPS):
        new = np.array([[row[length + step]] for row, length in zip(tokens, LENGTHS, strict=True)])
        for parts, row in zip(got, steps.step(new, np.ones_like(new)), strict=True):
            parts.append(row)
    errors = np.concatenate([np.abs(np.concatenate(a) - b).max(-1) for a, b in zip(got, want, strict=True)])
    # float32's last bits decide to which of two steps a number between them is rounded: a few are, to the other one
    assert np.mean(errors > 1e-4) < 0.2
    assert errors.max() < settings.rounding * max(1.0, *(np.abs(row).max() for row in want))


def test_adapters_add_to_the_product_in_float(exports: Callable[[str, str, str, int], Exported]) -> None:
    """They read what the product reads, before it is rounded, and add to what comes out of it."""
    for name, target in (("llama", "ort"), ("gpt2", "standard")):
        made = exports(name, target, "int4", 1)
        graph = ir.load(made.bundle.model_path).graph
        nodes = [node for node in graph if node.op_type == "SpectralDelta"]
        assert len(nodes) == len(made.bundle.groups)
        for node, group in zip(nodes, made.bundle.groups, strict=True):
            x, sums = node.inputs[0], node.inputs[5:]
            assert len(sums) == len(group.modules)
            for y in sums:
                product = source(y, "MatMulNBits")
                assert source(product.inputs[0], None) is source(x, None)


def source(value: ir.Value | None, wanted: str | None) -> Any:
    """The node that gives `value` below reshapes and a bias, of type `wanted`; or what these start from."""
    assert value is not None
    node = value.producer()
    if node is not None and node.op_type in ("Reshape", *(("Add",) if wanted else ())):
        return source(node.inputs[0], wanted)
    if wanted is None:
        return value
    assert node is not None
    assert node.op_type == wanted
    return node


@pytest.mark.parametrize(
    ("name", "target", "quantize"),
    [("gemma2", "ort", "int8"), pytest.param("llama", "ort", "int4", marks=SLOW),
     pytest.param("gpt2", "standard", "int4", marks=SLOW)],
)  # fmt: skip
def test_generate_takes_the_tokens_of_torch_on_the_stored_weights(
    exports: Callable[[str, str, str, int], Exported], name: str, target: str, quantize: str
) -> None:
    made = exports(name, target, quantize, 1)
    stored = with_stored_weights(made.model, made.bundle.model_path)
    prompts = random_rows(LENGTHS, seed=5)
    rows = [row or None for row in ROWS]
    with MultiAdapterModel(made.bundle) as model:
        found = model.generate([row.tolist() for row in prompts], rows, max_new_tokens=8, stop_tokens=[])
    for prompt, row, generated in zip(prompts, ROWS, found, strict=True):
        assert len(generated.tokens) == 8
        (logits,) = torch_logits(stored, [np.append(prompt, generated.tokens)], [row], made.adapters)
        for taken, scores in zip(generated.tokens, logits[len(prompt) - 1 : -1], strict=True):
            assert scores[taken] > scores.max() - 1e-4


def test_verify_takes_its_limit_from_the_pass(exports: Callable[[str, str, str, int], Exported]) -> None:
    for level in (1, 4):
        made = exports("llama", "ort", "int8", level)
        settings = made.bundle.quantization
        assert settings is not None
        assert (settings.rounding == 0) == (level == 1)
        report = verify(made.bundle.path, made.model)
        assert report.ok, [check for check in report.checks if not check.ok]
        limits = {check.limit for check in report.checks if check.name.startswith("recorded")}
        assert limits == {1e-4 + 3 * settings.rounding}
        assert {"base model", "base rows", "torch 0.5 a + 0.5 b"} <= {check.name for check in report.checks}


def test_a_tied_output_layer_is_quantized_and_its_table_is_not(
    exports: Callable[[str, str, str, int], Exported],
) -> None:
    made = exports("gemma2", "ort", "int8", 1)
    graph = onnx.load(made.bundle.model_path).graph
    table = made.model.get_input_embeddings().weight.detach().numpy()
    wide = [tensor for tensor in graph.initializer if list(tensor.dims) == list(table.shape)]
    assert [onnx.numpy_helper.to_array(tensor).tobytes() for tensor in wide] == [table.tobytes()]
    readers = [node.op_type for node in graph.node if wide[0].name in node.input]
    assert readers == ["Gather"]
    assert "lm_head" in products(made.bundle.model_path)


def test_quality_compares_models_with_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = DECODERS["llama"]
    model = family.model()
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    adapters = {"a": random_adapter(family, model, 1)}
    bundle = export_multi(tmp_path / "base", adapters, tmp_path / "bundle", quantize="int8")
    assert bundle.cache is not None
    assert bundle.cache.target == "ort"
    made = []

    def merged(*arguments: Any, **settings: Any) -> Bundle:
        made.append(export_merged(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr("sdct_export.quality.export_merged", merged)
    report = quality(bundle.path, tmp_path / "base", [" ".join(WORDS[i : i + 9]) for i in range(6)], progress=False)
    assert [other.cache for other in made] == [bundle.cache]
    settings = [found.quantization for found in (*made, bundle)]
    assert settings[0] is not None
    assert settings[1] is not None
    assert set(settings[0].modules) == set(settings[1].modules)
    for row in report.rows:
        assert 1e-3 < row.error < 0.1
        assert row.perplexity == pytest.approx(row.float_perplexity, rel=0.05)
        assert row.perplexity != row.float_perplexity


def test_float16_goes_with_a_cache_too(tmp_path: Path) -> None:
    family = DECODERS["llama"]
    model = family.model()
    adapters = {"a": random_adapter(family, model, 1)}
    bundle = export_multi(model, adapters, tmp_path / "b", quantize="int8", accuracy_level=1, dtype="float16")
    assert bundle.cache is not None
    assert (bundle.dtype, bundle.cache.dtype, bundle.cache.target) == ("float16", "float16", "ort")
    rows: list[dict[str, float]] = [{"a": 1.0}, {}]
    tokens = random_rows([9, 7], seed=6)
    stored = with_stored_weights(model, bundle.model_path, torch.float16)
    want = torch_logits(stored, tokens, rows, adapters)
    steps = Steps(session(bundle.model_path), bundle.cache, feeds(bundle, rows, adapters))
    ids, mask = padded([row[:-1] for row in tokens], "left")
    logits = steps.step(ids, mask)
    assert logits.dtype == np.float16
    for i, expected in enumerate(want):
        np.testing.assert_allclose(logits[i, mask[i] != 0], expected[:-1], atol=1e-2)
    logits = steps.step(np.array([row[-1:] for row in tokens]), np.ones((2, 1), np.int64))
    for i, expected in enumerate(want):
        np.testing.assert_allclose(logits[i, 0], expected[-1], atol=1e-2)
    assert verify(bundle.path, model).ok


def test_a_row_keeps_every_bit_beside_other_rows(exports: Callable[[str, str, str, int], Exported]) -> None:
    made = exports("llama", "ort", "int8", 4)
    assert made.bundle.cache is not None
    tokens = np.stack(random_rows([7] * 4, seed=7))
    runner = session(made.base)
    together = Steps(runner, made.bundle.cache, {})
    alone = [Steps(runner, made.bundle.cache, {}) for _ in tokens]
    for part in (slice(0, 5), slice(5, 6), slice(6, 7)):
        new = tokens[:, part]
        logits = together.step(new, np.ones_like(new))
        for i, steps in enumerate(alone):
            assert steps.step(new[i : i + 1], np.ones_like(new[:1])).tobytes() == logits[i : i + 1].tobytes()
