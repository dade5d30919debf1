from __future__ import annotations

import onnx_ir as ir
import pytest
from graphs import Scoped

from sdct_export.errors import UnsupportedError
from sdct_export.graph.match import match_linears


def test_finds_what_enters_and_leaves_each_kind_of_linear_layer() -> None:
    g = Scoped(["batch", "tokens", 6])
    with_bias = g.linear("a.q", g.x, 6, 8)
    without_bias = g.linear("a.k", g.x, 6, 8, bias=False)
    added = g.op("a", "Add", with_bias, without_bias, shape=["batch", "tokens", 8])
    first = g.op("a", "Gather", added, g.const([0]), axis=1, shape=["batch", 8])
    gemm = g.op("pool.dense", "Gemm", first, g.weight(5, 8), g.weight(5), transB=1, shape=["batch", 5])
    # GPT-2's Conv1D: a product of a 2-D view, reshaped back
    flat = g.op("c.fc", "Reshape", added, g.const([-1, 8]), shape=["rows", 8])
    product = g.op("c.fc", "Gemm", flat, g.weight(8, 3), g.weight(3), shape=["rows", 3])
    conv1d = g.op("c.fc", "Reshape", product, g.const([0, 0, 3]), shape=["batch", "tokens", 3])
    # a weight the exporter left to be transposed, and casts around
    cast = g.op("h", "Cast", conv1d, to=1, shape=["batch", "tokens", 3])
    transposed = g.op("h", "Transpose", g.weight(4, 3), perm=[1, 0])
    head = g.op("h", "MatMul", cast, transposed, shape=["batch", "tokens", 4])
    model = g.model(gemm, head)
    found = match_linears(model.graph, ["h", "c.fc", "pool.dense", "a.k", "a.q"])
    assert list(found) == ["a.q", "a.k", "pool.dense", "c.fc", "h"]
    assert found["a.q"].x is g.x
    assert found["a.k"].x is g.x
    assert found["a.q"].y is with_bias
    assert found["a.q"].sum is with_bias.producer().inputs[0]
    assert found["a.k"].y is found["a.k"].sum is without_bias
    assert (found["pool.dense"].x, found["pool.dense"].y) == (first, gemm)
    assert (found["c.fc"].x, found["c.fc"].y, found["c.fc"].sum) == (added, conv1d, conv1d)
    assert (found["h"].x, found["h"].y) == (conv1d, head)


def test_tensor_names_do_not_matter() -> None:
    g = Scoped(["batch", 6])
    q, k = g.linear("layer.1.q", g.x, 6, 4), g.linear("layer.11.q", g.x, 6, 4)
    model = g.model(g.op("", "Add", q, k, shape=["batch", 4]))
    for number, node in enumerate(model.graph):
        node.outputs[0].name = f"layer.{(number * 7) % 11}.q"
    found = match_linears(model.graph, ["layer.1.q", "layer.11.q"])
    assert (found["layer.1.q"].y, found["layer.11.q"].y) == (q, k)


def test_a_module_that_is_absent_is_named() -> None:
    g = Scoped(["batch", 6])
    model = g.model(g.op("a", "Relu", g.linear("a.q", g.x, 6, 4), shape=["batch", 4]))
    with pytest.raises(UnsupportedError, match=r"'a\.v' .*has no node of it"):
        match_linears(model.graph, ["a.q", "a.v"])
    g.op("b", "Relu", g.x)
    with pytest.raises(UnsupportedError, match=r"'b' is in the model, but its exported nodes \(Relu\) hold no matrix"):
        match_linears(model.graph, ["b"])


def test_a_module_called_twice_is_named() -> None:
    g = Scoped(["batch", 6])
    model = g.model(g.linear("shared", g.linear("shared", g.x, 6, 6), 6, 6))
    with pytest.raises(UnsupportedError, match=r"module 'shared' is called 2 times"):
        match_linears(model.graph, ["shared"])


def test_a_product_of_two_activations_is_no_linear_layer() -> None:
    g = Scoped(["batch", 6])
    model = g.model(g.op("a", "MatMul", g.x, g.op("a", "Transpose", g.x)))
    with pytest.raises(UnsupportedError, match="hold no matrix product"):
        match_linears(model.graph, ["a"])


def test_a_graph_output_inside_a_module_ends_it() -> None:
    g = Scoped(["batch", 6])
    product = g.linear("a", g.x, 6, 4, bias=False)
    biased = g.op("a", "Add", product, g.weight(4), shape=["batch", 4])
    model = g.model(product, biased)
    assert match_linears(model.graph, ["a"])["a"].y is product
    assert isinstance(model, ir.Model)
