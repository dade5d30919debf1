from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphs import Scoped
from references import delta_weight

from sdct_export.contract import DOMAIN, OP_TYPE, Group, Head
from sdct_export.errors import UnsupportedError
from sdct_export.graph.insert import InsertAdapters

SHAPES = {"a.q": (8, 6), "a.k": (8, 6), "b": (4, 8)}


def small() -> Scoped:
    """`out_0 = b(relu(q(x)) + k(x))`, q's user coming before k."""
    g = Scoped(["batch", "tokens", 6])
    q = g.op("a", "Relu", g.linear("a.q", g.x, 6, 8), shape=["batch", "tokens", 8])
    k = g.linear("a.k", g.x, 6, 8, bias=False)
    g.out = g.linear("b", g.op("a", "Add", q, k, shape=["batch", "tokens", 8]), 8, 4)
    return g


def insert(model: ir.Model, modules: list[str], heads: list[str] = []) -> InsertAdapters:  # noqa: B006
    insertion = InsertAdapters(
        {m: SHAPES[m] for m in modules}, {m: 3 + i for i, m in enumerate(modules)}, {m: SHAPES[m] for m in heads}
    )
    insertion(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return insertion


def test_modules_that_read_one_tensor_share_a_node() -> None:
    g = small()
    model = g.model(g.out)
    found = insert(model, ["a.q", "b", "a.k"])
    assert found.groups == [
        Group("a.q+k", ("a.q", "a.k"), 6, (8, 8), (3, 5)),
        Group("b", ("b",), 8, (4,), (4,)),
    ]
    nodes = [node for node in model.graph if node.op_type == OP_TYPE]
    assert [node.domain for node in nodes] == [DOMAIN] * 2
    assert [list(node.attributes["d_out"].as_ints()) for node in nodes] == [[8, 8], [4]]
    assert [list(node.attributes["capacity"].as_ints()) for node in nodes] == [[3, 5], [4]]
    inputs = {value.name: (value.dtype, [str(d) for d in value.shape]) for value in model.graph.inputs}
    assert inputs == {
        "x": (ir.DataType.FLOAT, ["batch", "tokens", "6"]),
        "adapter_ids": (ir.DataType.INT32, ["batch", "blend"]),
        "adapter_scales": (ir.DataType.FLOAT, ["batch", "blend"]),
        "sdct.a.q+k.values": (ir.DataType.FLOAT, ["slots", "8"]),
        "sdct.a.q+k.indices": (ir.DataType.INT32, ["slots", "8", "2"]),
        "sdct.b.values": (ir.DataType.FLOAT, ["slots", "4"]),
        "sdct.b.indices": (ir.DataType.INT32, ["slots", "4", "2"]),
    }
    assert [output.name for output in model.graph.outputs] == ["out_0"]
    assert model.ir_version == 10


def test_values_keep_their_type_and_shape() -> None:
    g = small()
    model = g.model(g.out)
    before = {v.name: (v.dtype, v.shape) for n in model.graph for v in n.outputs if v.shape is not None}
    insert(model, ["a.q", "a.k", "b"], ["b"])
    for node in model.graph:
        for value in node.outputs:
            if value.name in before:
                assert (value.dtype, value.shape) == before[value.name]
    changed = next(node for node in model.graph if node.op_type == OP_TYPE).outputs
    assert [list(map(str, value.shape)) for value in changed] == [["batch", "tokens", "8"]] * 2


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]


def test_a_head_is_replaced_per_row_and_a_change_of_the_same_module_adds_to_it() -> None:
    g, plain = small(), small()
    base = plain.model(plain.out)
    model = g.model(g.out)
    found = insert(model, ["b"], ["b"])
    assert found.heads == [Head("b", 4, 8)]
    assert [output.name for output in model.graph.outputs] == ["out_0"]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, 6)).astype(np.float32)
    weight, bias = rng.standard_normal((3, 4, 8)).astype(np.float32), rng.standard_normal((3, 4)).astype(np.float32)
    values = np.array([[0, 0, 0], [0, 0, 0], [2, 1, -3]], np.float32)
    indices = np.array([[[0, 0]] * 3, [[0, 0]] * 3, [[0, 1], [2, 0], [3, 7]]], np.int32)
    feeds = {
        "adapter_ids": np.array([[1, 0], [0, 0], [2, 0], [1, 2]], np.int32),
        "adapter_scales": np.array([[1, 1], [1, 1], [1, 1], [0.25, 0.5]], np.float32),
        "sdct.b.values": values,
        "sdct.b.indices": indices,
        "sdct.b.weight": weight,
        "sdct.b.bias": bias,
        "sdct.b.present": np.array([0, 1, 0], np.float32),
    }
    got = run(model, {"x": x} | feeds)
    want = run(base, {"x": x})
    w = [w.const_value.numpy() for w in plain.graph.initializers.values()]
    hidden = np.maximum(x @ w[0] + w[1], 0) + x @ w[2]
    delta = hidden @ delta_weight(values[2], indices[2], (4, 8), 1.0).T
    own = hidden @ weight[1].T + bias[1]
    assert got[1].tobytes() == want[1].tobytes()
    np.testing.assert_allclose(got[0], own[0], atol=1e-5)
    np.testing.assert_allclose(got[2], want[2] + delta[2], atol=1e-5)
    np.testing.assert_allclose(got[3], 0.75 * want[3] + 0.25 * own[3] + 0.5 * delta[3], atol=1e-5)
    assert np.abs(got[[0, 2, 3]] - want[[0, 2, 3]]).max(axis=(1, 2)).min() > 0.1
    present_nowhere = run(model, {"x": x} | feeds | {"adapter_ids": np.zeros((4, 2), np.int32)})
    assert present_nowhere.tobytes() == want.tobytes()


def test_a_layer_that_reads_another_ones_output_reads_the_changed_one() -> None:
    g = Scoped(["batch", 6])
    model = g.model(g.linear("b", g.linear("a.q", g.x, 6, 8, bias=False), 8, 4, bias=False))
    insert(model, ["b", "a.q"], ["b"])
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 6)).astype(np.float32)
    weights = [w.const_value.numpy() for w in model.graph.initializers.values()]
    indices = np.array([[[0, 0]] * 4, [[0, 1], [3, 2], [5, 0], [7, 5]]], np.int32)
    values = np.array([[0] * 4, [1, -2, 3, 1]], np.float32)
    feeds = {"sdct.a.q.values": values, "sdct.a.q.indices": indices}
    feeds |= {"sdct.b.values": values[:, :3], "sdct.b.indices": indices[:, :3] // 2}
    feeds |= {
        "sdct.b.weight": np.zeros((2, 4, 8), np.float32),
        "sdct.b.bias": np.zeros((2, 4), np.float32),
        "sdct.b.present": np.zeros(2, np.float32),
        "adapter_ids": np.array([[1], [0]], np.int32),
        "adapter_scales": np.ones((2, 1), np.float32),
    }
    hidden = x[0] @ (weights[0] + delta_weight(values[1], indices[1], (8, 6), 1.0).T)
    want = hidden @ (weights[1] + delta_weight(values[1, :3], indices[1, :3] // 2, (4, 8), 1.0).T)
    got = run(model, {"x": x} | feeds)
    np.testing.assert_allclose(got[0], want, atol=1e-5)
    np.testing.assert_allclose(got[1], x[1] @ weights[0] @ weights[1], atol=1e-5)


def test_only_heads() -> None:
    g = small()
    model = g.model(g.out)
    found = insert(model, [], ["a.q", "b"])
    assert [head.module for head in found.heads] == ["a.q", "b"]
    assert found.groups == []


def test_what_cannot_be_rewritten_is_refused() -> None:
    g = Scoped(["batch", 6], opset=17)
    with pytest.raises(UnsupportedError, match="opset 17; adapters need opset 18"):
        insert(g.model(g.linear("b", g.x, 6, 8)), ["b"])
    g = small()
    g.x.name = "adapter_ids"
    with pytest.raises(UnsupportedError, match="already has an input 'adapter_ids'"):
        insert(g.model(g.out), ["b"])
