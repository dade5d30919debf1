"""`Tidy` against the graph it came from, run by ONNX Runtime without any optimisation of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from sdct_export.adapter.entries import Array
from sdct_export.graph.function_body import Ops
from sdct_export.graph.tidy import Tidy

FLOAT = ir.DataType.FLOAT


def start(shape: list[int | str]) -> ir.Value:
    return ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(shape))


def model_of(x: ir.Value, ops: Ops, result: ir.Value) -> ir.Model:
    result.type = ir.TensorType(FLOAT)
    return ir.Model(ir.Graph([x], [result], nodes=ops.nodes, opset_imports={"": 20}, name="test"), ir_version=10)


def outputs(model: ir.Model, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    result: Array = onnxruntime.InferenceSession(data, options).run(None, {"x": x})[0]
    return result


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


@pytest.mark.parametrize("seed", range(60))
def test_random_chains_of_shapes_give_what_they_gave(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = [2, 3, 4, 2]
    x, ops = start(list(shape)), Ops("t")
    value, now = x, list(shape)
    for _ in range(rng.integers(1, 7)):
        if rng.random() < 0.5:
            order = [0, 2, 1, 3] if len(now) == 4 and rng.random() < 0.7 else rng.permutation(len(now)).tolist()
            value, now = ops("Transpose", value, perm=order), [now[i] for i in order]
        else:
            choices = [[2, 3, 4, 2], [2, 4, 3, 2], [6, 8], [2, 3, 8], [2, 12, 2], [48]]
            now = choices[rng.integers(len(choices))]
            value = ops("Reshape", value, ops.const(now))
        value.type, value.shape = ir.TensorType(FLOAT), ir.Shape(now)
    model = model_of(x, ops, ops("Neg", value))
    data = rng.standard_normal(shape).astype(np.float32)
    before, count = outputs(model, data), len(kinds(model))
    Tidy()(model)
    np.testing.assert_array_equal(outputs(model, data), before)
    assert len(kinds(model)) <= count


def shaped(ops: Ops, kind: str, value: ir.Value, more: Any, shape: list[int | str]) -> ir.Value:
    result = ops(kind, value, perm=more) if kind == "Transpose" else ops(kind, value, more)
    result.type, result.shape = ir.TensorType(FLOAT), ir.Shape(shape)
    return result


def there_and_back(last: str) -> ir.Model:
    """Heads made of columns and put together again, around two swaps; the last dimension has the name `last`."""
    x, ops = start(["batch", "sequence", 6]), Ops("t")
    heads = shaped(ops, "Reshape", x, ops.const([0, 0, 3, 2]), ["batch", "sequence", 3, 2])
    swapped = shaped(ops, "Transpose", heads, [0, 2, 1, 3], ["batch", 3, "sequence", 2])
    again = shaped(ops, "Transpose", swapped, [0, 2, 1, 3], ["batch", "sequence", 3, 2])
    flat = shaped(ops, "Reshape", again, ops.const([0, 0, 6]), ["batch", last, 6])
    return model_of(x, ops, ops("Neg", flat))


def test_heads_there_and_back_leave_nothing_where_the_shapes_are_known_to_be_equal() -> None:
    for last, left in (("sequence", ["Neg"]), ("other", ["Reshape", "Transpose", "Transpose", "Reshape", "Neg"])):
        model = there_and_back(last)
        Tidy()(model)
        assert kinds(model) == left


def test_an_output_of_the_graph_keeps_its_name() -> None:
    x, ops = start([2, 6]), Ops("t")
    same = shaped(ops, "Reshape", x, ops.const([2, 6]), [2, 6])
    model = model_of(x, ops, same)
    Tidy()(model)
    data = np.arange(12, dtype=np.float32).reshape(2, 6)
    np.testing.assert_array_equal(outputs(model, data), data)
    assert model.graph.outputs[0].name == same.name


@pytest.mark.parametrize("first", [True, False])
def test_a_product_with_the_reciprocal_of_a_root_becomes_a_division(first: bool) -> None:
    x, ops = start([3, 5]), Ops("t")
    squares = ops("Add", ops("ReduceMean", ops("Mul", x, x), ops.const([1])), ops.const([1e-6], np.float32))
    inverse = ops("Reciprocal", ops("Sqrt", squares))
    model = model_of(x, ops, ops("Neg", ops("Mul", x, inverse) if first else ops("Mul", inverse, x)))
    data = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    want = -data / np.sqrt((data.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6)
    Tidy()(model)
    assert kinds(model) == ["Mul", "ReduceMean", "Add", "Sqrt", "Div", "Neg"]
    np.testing.assert_allclose(outputs(model, data), want, rtol=1e-6)


def test_other_users_of_the_reciprocal_keep_it() -> None:
    x, ops = start([4]), Ops("t")
    root = ops("Sqrt", ops("Abs", x))
    inverse = ops("Reciprocal", root)
    both = ops("Add", ops("Mul", x, inverse), ops("Mul", inverse, inverse))
    model = model_of(x, ops, ops("Neg", both))
    data = np.array([1.0, 4.0, 9.0, 0.25], np.float32)
    Tidy()(model)
    assert sorted(kinds(model)) == sorted(["Abs", "Sqrt", "Reciprocal", "Div", "Mul", "Add", "Neg"])
    np.testing.assert_allclose(outputs(model, data), -(data / np.sqrt(data) + 1 / data), rtol=1e-6)
