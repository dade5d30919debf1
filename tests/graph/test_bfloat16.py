"""Float32 at the ends of a bfloat16 graph and where no kernel knows bfloat16, nothing else changed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from bfloat16_graphs import BFLOAT16, by_onnx, rounded, session
from onnx import TensorProto, helper

from sdct_export.adapter.entries import Array
from sdct_export.graph.bfloat16 import FitBfloat16


def fitted(
    nodes: list[onnx.NodeProto], outputs: list[str], types: dict[str, int] | None = None
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """`x [2, 3, 4, 4]` through `nodes`, all values bfloat16 but those of `types`, before and after the pass."""
    shape = [2, 3, 4, 4]
    kernel = helper.make_tensor("w", BFLOAT16, [3, 3, 1, 1], np.linspace(-1, 1, 9).astype(ml_dtypes.bfloat16))
    floor = helper.make_tensor("floor", BFLOAT16, [], np.array([0.3], ml_dtypes.bfloat16))
    made = {name for node in nodes for name in node.output} - set(outputs)
    values = {name: helper.make_tensor_value_info(name, (types or {}).get(name, BFLOAT16), None) for name in made}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", BFLOAT16, shape)],
        [helper.make_tensor_value_info(name, (types or {}).get(name, BFLOAT16), None) for name in outputs],
        [kernel, floor],
        value_info=list(values.values()),
    )
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    before = onnx.shape_inference.infer_shapes(before)
    model = ir.from_proto(before)
    FitBfloat16()(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    return before, onnx.shape_inference.infer_shapes(after)


def x(seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(2, 3, 4, 4)).astype(ml_dtypes.bfloat16)


def test_operators_without_a_kernel_compute_in_float32_and_round_once() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Clip", ["c", "floor"], ["d"], name="clip"),
        helper.make_node("Add", ["d", "x"], ["out"], name="add"),
    ]
    _, after = fitted(nodes, ["out"])
    kinds = {node.name: node for node in after.graph.node if node.op_type != "Cast"}
    types = {v.name: v.type.tensor_type.elem_type for v in (*after.graph.value_info, *after.graph.output)}
    assert {types[kinds[name].output[0]] for name in ("conv", "clip")} == {TensorProto.FLOAT}
    assert types[kinds["add"].output[0]] == BFLOAT16
    assert [(v.name, v.type.tensor_type.elem_type) for v in (*after.graph.input, *after.graph.output)] == [
        ("x", TensorProto.FLOAT),
        ("out", TensorProto.FLOAT),
    ]
    feed = x()
    half = ml_dtypes.bfloat16
    weight = np.linspace(-1, 1, 9).astype(half).reshape(3, 3).astype(np.float64)
    conv = np.einsum("oi,bihw->bohw", weight, feed.astype(np.float64)).astype(np.float32).astype(half)
    want = (np.maximum(conv, half(0.3)).astype(np.float32) + feed.astype(np.float32)).astype(half)
    (got,) = session(rounded(after)).run(None, {"x": feed.astype(np.float32)})
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_an_input_is_rounded_to_nearest_even_once() -> None:
    _, after = fitted([helper.make_node("Neg", ["x"], ["out"])], ["out"])
    rng = np.random.default_rng(1)
    feed = rng.normal(size=(2, 3, 4, 4)).astype(np.float32)
    feed.reshape(-1)[:4] = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3e38]  # two ties, one of them down, one up
    (got,) = session(rounded(after)).run(None, {"x": feed})
    np.testing.assert_array_equal(got, -feed.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert got.reshape(-1)[:3].tolist() == [-1, -(1 + 2**-6), 1]


@pytest.mark.parametrize(
    ("op_type", "kernel"),
    [("Gelu", TensorProto.FLOAT), ("Ceil", TensorProto.FLOAT), ("Softmax", BFLOAT16), ("Tanh", BFLOAT16)],
)
def test_an_operator_keeps_its_type_where_it_has_a_kernel(op_type: str, kernel: int) -> None:
    _, after = fitted([helper.make_node(op_type, ["x"], ["out"])], ["out"])
    (node,) = [node for node in after.graph.node if node.op_type == op_type]
    types = {v.name: v.type.tensor_type.elem_type for v in after.graph.value_info}
    assert types[node.input[0]] == types[node.output[0]] == kernel


def test_names_and_other_users_of_an_output_stay() -> None:
    """An output that is computed without a kernel and that nodes read; one that is an input; one of another type."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=1),
        helper.make_node("Sub", ["x", "most"], ["out"]),
        helper.make_node("Greater", ["out", "floor"], ["above"]),
    ]
    before, after = fitted(nodes, ["most", "out", "above"], types={"above": TensorProto.BOOL})
    assert [v.name for v in after.graph.output] == ["most", "out", "above"]
    want = by_onnx(before, {"x": x(3)})
    got = by_onnx(after, {"x": x(3).astype(np.float32)})
    for name, array in want.items():
        assert got[name].dtype == (bool if name == "above" else np.float32)
        np.testing.assert_array_equal(got[name], array.astype(got[name].dtype))


def test_a_branch_is_fitted_too() -> None:
    branch = helper.make_graph(
        [helper.make_node("ReduceMax", ["x"], ["most"], keepdims=1)],
        "b",
        [],
        [helper.make_tensor_value_info("most", BFLOAT16, None)],
    )
    nodes = [
        helper.make_node("Greater", ["one", "one"], ["never"]),
        helper.make_node("If", ["never"], ["out"], then_branch=branch, else_branch=branch),
    ]
    nodes.insert(0, helper.make_node("Constant", [], ["one"], value_float=1.0))
    before, after = fitted(nodes, ["out"], types={"never": TensorProto.BOOL, "one": TensorProto.FLOAT})
    inner = next(a.g for node in after.graph.node for a in node.attribute if a.name == "then_branch")
    assert [node.op_type for node in inner.node] == ["Cast", "ReduceMax", "Cast"]
    got = by_onnx(after, {"x": x(4).astype(np.float32)})["out"]
    np.testing.assert_array_equal(got, x(4).astype(np.float32).max(keepdims=True))
    np.testing.assert_array_equal(by_onnx(before, {"x": x(4)})["out"].astype(np.float32), got)
