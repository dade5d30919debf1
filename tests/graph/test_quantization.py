"""Quantized products against numpy in float64 on the weights that the file stores."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphs import Scoped
from onnx import numpy_helper
from quantized_file import products, rounded
from references import delta_weight

from sdct_export.adapter.entries import Array
from sdct_export.contract import Quantization
from sdct_export.errors import UnsupportedError
from sdct_export.graph.insert import InsertAdapters
from sdct_export.graph.quantization import QuantizeWeights, quantize

SHAPES = [(100, 75), (33, 7), (16, 1), (257, 130), (64, 64)]  # d_in, d_out; rows that are no multiple of a block
EVERY = [Quantization(bits, block, level) for bits in (8, 4) for block in (16, 32, 128) for level in (1, 4)]


def one_layer(d_in: int, d_out: int, dtype: type = np.float32) -> tuple[ir.Model, Array]:
    """`x W^T + b` with `x [batch, tokens, d_in]`, and `W`."""
    g = Scoped(["batch", "tokens", d_in])
    y = g.linear("a", g.x, d_in, d_out)
    weights = list(g.graph.initializers.values())
    for value in [g.x, *weights, *(out for node in g.graph for out in node.outputs)]:
        value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
    for value in weights:
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().astype(dtype), name=value.name)
    assert weights[0].const_value is not None
    return g.model(y), weights[0].const_value.numpy().T


def save(model: ir.Model, folder: Path) -> Path:
    ir.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def run(path: Path, **inputs: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    result: Array = onnxruntime.InferenceSession(str(path), options).run(None, inputs)[0]
    return result


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("settings", EVERY, ids=lambda s: f"{s.name}-{s.block_size}-level{s.accuracy_level}")
def test_products_are_those_of_the_stored_weights(settings: Quantization, dtype: type, tmp_path: Path) -> None:
    for seed, (d_in, d_out) in enumerate(SHAPES):
        model, weight = one_layer(d_in, d_out, dtype)
        QuantizeWeights(["a"], settings)(model)
        path = save(model, tmp_path)
        onnx.checker.check_model(onnx.load(path))
        (stored,) = products(path).values()
        assert stored.weight.shape == weight.shape == (d_out, d_in)
        error = np.abs(stored.weight - weight.astype(np.float64))
        assert (error <= stored.scale * 1.01 + 1e-7).all()
        if error.size > 100:  # a quarter of a step where all is rounded to the nearest
            assert 0.2 < np.abs(error / stored.scale).mean() < 0.3
        x = np.random.default_rng(seed).standard_normal((3, 5, d_in)).astype(dtype)
        graph = onnx.load(path).graph
        bias = next(numpy_helper.to_array(t) for t in graph.initializer if t.name == "w1").astype(np.float64)
        seen = x.astype(np.float64) if settings.accuracy_level == 1 else rounded(x, settings.block_size)
        got, want = run(path, x=x), seen @ stored.weight.T + bias
        assert got.dtype == dtype
        near = 3e-6 if dtype is np.float32 else 2e-3
        assert np.abs(got - want).max() <= near * np.abs(want).max()
        exact = x.astype(np.float64) @ stored.weight.T + bias
        step = np.abs(x.astype(np.float64)).max() / 127
        bound = step / 2 * np.abs(stored.weight).sum(1) + near * np.abs(want).max()
        assert (np.abs(got - exact) <= bound).all()  # whatever the kernel


def test_int8_is_nearer_than_int4_and_small_blocks_nearer_than_large() -> None:
    weight = np.random.default_rng(0).standard_normal((96, 512)).astype(np.float32)
    errors = {
        (bits, block): float(np.abs(quantize(weight, Quantization(bits, block)).dequantized(bits, 512) - weight).max())
        for bits in (8, 4)
        for block in (16, 256)
    }
    assert errors[8, 16] < errors[8, 256] < errors[4, 16] < errors[4, 256]
    assert errors[8, 256] * 12 < errors[4, 256]


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_are_read_as_the_file_is(bits: int, tmp_path: Path) -> None:
    settings = Quantization(bits, 32)
    model, weight = one_layer(100, 33)
    QuantizeWeights(["a"], settings)(model)
    (stored,) = products(save(model, tmp_path)).values()
    np.testing.assert_allclose(quantize(weight, settings).dequantized(bits, 100), stored.weight, rtol=0, atol=1e-6)


def test_only_the_layers_that_are_named(tmp_path: Path) -> None:
    g = Scoped(["batch", "tokens", 6])
    g.out = g.linear("c", g.op("", "Relu", g.linear("a", g.linear("b", g.x, 6, 8), 8, 8)), 8, 4)
    model = g.model(g.out)
    passed = QuantizeWeights(["c", "a", "absent"], Quantization(8, 16))
    passed(model)
    assert passed.modules == ["a", "c"]
    assert [node.op_type for node in model.graph].count("MatMulNBits") == 2
    assert set(products(save(model, tmp_path))) == {"a", "c"}
    left = {name for name, value in model.graph.initializers.items() if value.const_value.dtype == ir.DataType.FLOAT}
    assert {"w0", "w1"} <= left  # those of b
    assert "w2" not in left


def test_gemm_in_both_layouts(tmp_path: Path) -> None:
    for transposed in (0, 1):
        g = Scoped(["batch", 40])
        weight = g.weight(*((9, 40) if transposed else (40, 9)))
        g.out = g.op("a", "Gemm", g.x, weight, g.weight(9), shape=["batch", 9], transB=transposed)
        array = weight.const_value.numpy()
        bias = g.graph.initializers["w1"].const_value.numpy()
        model = g.model(g.out)
        QuantizeWeights(["a"], Quantization(8, 16, 1))(model)
        path = save(model, tmp_path)
        (stored,) = products(path).values()
        assert np.abs(stored.weight - (array if transposed else array.T)).max() < 0.02
        x = np.random.default_rng(1).standard_normal((7, 40)).astype(np.float32)
        np.testing.assert_allclose(run(path, x=x), x @ stored.weight.T + bias, rtol=0, atol=3e-5)


def test_a_shared_weight_is_stored_once_and_a_table_stays_float(tmp_path: Path) -> None:
    g = Scoped(["batch", 40])
    table = g.weight(9, 40)
    looked_up = g.op("embedding", "Gather", table, g.const([0, 3]), shape=[2, 40])
    one = g.op("a", "Gemm", g.x, table, shape=["batch", 9], transB=1)
    two = g.op("b", "Gemm", looked_up, table, shape=[2, 9], transB=1)
    array = table.const_value.numpy()
    model = g.model(one, two, looked_up)
    QuantizeWeights(["a", "b"], Quantization(4, 16))(model)
    path = save(model, tmp_path)
    kept = {t.name: t for t in onnx.load(path).graph.initializer}
    assert sorted(kept) == ["a.weight.packed", "a.weight.scales", "a.weight.zeros", "w0"]
    np.testing.assert_array_equal(numpy_helper.to_array(kept["w0"]), array)
    session = onnxruntime.InferenceSession(str(path))
    got = session.run(["out_2"], {"x": np.zeros((1, 40), np.float32)})[0]
    np.testing.assert_array_equal(got, array[[0, 3]])


def test_a_transposed_initializer_goes_with_its_node() -> None:
    g = Scoped(["batch", "tokens", 40])
    turned = g.op("a", "Transpose", g.weight(9, 40), shape=[40, 9], perm=[1, 0])
    model = g.model(g.op("a", "MatMul", g.x, turned, shape=["batch", "tokens", 9]))
    QuantizeWeights(["a"], Quantization(8))(model)
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    assert "w0" not in model.graph.initializers


def test_twice_is_refused() -> None:
    model, _ = one_layer(32, 8)
    QuantizeWeights(["a"], Quantization(8))(model)
    with pytest.raises(UnsupportedError, match=r"quantized already .*MatMulNBits"):
        QuantizeWeights(["a"], Quantization(8))(model)


def test_what_is_no_product_by_a_matrix_is_refused() -> None:
    g = Scoped(["batch", 40])
    model = g.model(g.op("a", "Gemm", g.x, g.weight(40, 9), shape=["batch", 9], alpha=2.0))
    with pytest.raises(UnsupportedError, match=r"module .a..*cannot be quantized"):
        QuantizeWeights(["a"], Quantization(8))(model)


@pytest.mark.parametrize("first", ["quantize", "insert"])
def test_adapters_find_their_layers_before_and_after(first: str, tmp_path: Path) -> None:
    g = Scoped(["batch", "tokens", 24])
    g.out = g.linear("b", g.linear("a", g.x, 24, 20), 20, 9)
    model = g.model(g.out)
    shapes = {"a": (20, 24), "b": (9, 20)}
    insertion = InsertAdapters(shapes, {"a": 5, "b": 4}, {})
    steps = [QuantizeWeights(["a", "b"], Quantization(4, 16, 1)), insertion]
    for step in steps if first == "quantize" else steps[::-1]:
        step(model)
    onnx.checker.check_model(ir.to_proto(model))
    path = save(model, tmp_path)
    stored = products(path)
    assert [group.modules for group in insertion.groups] == [("a",), ("b",)]
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 3, 24)).astype(np.float32)
    feeds = {"x": x, "adapter_ids": np.array([[1], [0]], np.int32), "adapter_scales": np.ones((2, 1), np.float32)}
    want = x.astype(np.float64)
    inits = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for name, n in (("a", 5), ("b", 4)):
        d_out, d_in = shapes[name]
        values = np.zeros((2, n), np.float32)
        values[1] = rng.standard_normal(n)
        flat = np.sort(rng.choice(d_out * d_in, n, replace=False))
        indices = np.zeros((2, n, 2), np.int32)
        indices[1] = np.stack(np.divmod(flat, d_in), 1)
        feeds |= {f"sdct.{name}.values": values, f"sdct.{name}.indices": indices}
        delta = delta_weight(values[1], indices[1], (d_out, d_in), 1.0)
        bias = inits[{"a": "w1", "b": "w3"}[name]]
        want = np.stack([want[0] @ (stored[name].weight + delta).T, want[1] @ stored[name].weight.T]) + bias
    np.testing.assert_allclose(run(path, **feeds), want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_the_quantizer_leaves_logging_alone() -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    quantize(np.ones((2, 16), np.float32), Quantization(8))
    assert (root.level, list(root.handlers)) == before
