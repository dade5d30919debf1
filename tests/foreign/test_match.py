"""Layers found in graphs by their weights, however these are stored; and what must not be found."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from foreign_graphs import MICROSOFT, Graph, nbits
from onnx import TensorProto

from sdct_export.adapter.entries import Array
from sdct_export.errors import UnsupportedError
from sdct_export.foreign.match import Match, match_weights
from sdct_export.foreign.weights import find_products

D_IN, D_OUT = 70, 45  # 70 is no multiple of a block


def weight(seed: int, d_out: int = D_OUT, d_in: int = D_IN) -> Array:
    return np.random.default_rng(seed).normal(size=(d_out, d_in)).astype(np.float32)


def model_of(build: Callable[[Graph], str], d_out: int, dtype: str = "float32") -> onnx.ModelProto:
    graph = Graph()
    y = build(graph)
    return graph.model({"x": (dtype, ["n", D_IN])}, {"y": (y, dtype, ["n", d_out])})


def ran(model: onnx.ModelProto) -> Array:
    """The weight as ONNX Runtime multiplies by it: the output for the identity, `[d_out, d_in]`."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    kind = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
    (y,) = session.run(["y"], {"x": np.eye(D_IN, dtype=kind)})
    return np.asarray(y, dtype=np.float64).T


def matched(model: onnx.ModelProto, weights: dict[str, Array]) -> Match:
    return match_weights(find_products(ir.from_proto(model).graph), weights)


def matmul(w: Array) -> Callable[[Graph], str]:
    return lambda g: g("MatMul", "x", g.constant(w.T))


def codes(w: Array, axis: int | None, low: int, high: int) -> tuple[Array, Array]:
    """int8 codes of `w` and their scales, one for the whole or one for each index of `axis`."""
    other = None if axis is None else 1 - axis
    scale = np.abs(w).max(axis=other, keepdims=axis is not None) / high
    return np.clip(np.rint(w / scale), low, high).astype(np.int8), np.asarray(scale, np.float32).reshape(-1)


def dequantized(w: Array, axis: int | None) -> Callable[[Graph], str]:
    def build(g: Graph) -> str:
        q, scale = codes(w.T, axis, -127, 127)
        scale = scale if axis is not None else scale.reshape(())
        options = {} if axis is None else {"axis": axis}
        return str(g("MatMul", "x", g("DequantizeLinear", g.constant(q), g.constant(scale), **options)))

    return build


def blocked(w: Array, block: int) -> Callable[[Graph], str]:
    """int4 in blocks along d_in, as GenAI's `use_qdq` writes it."""

    def build(g: Graph) -> str:
        turned = np.zeros((-(-D_IN // block) * block, D_OUT), np.float32)
        turned[:D_IN] = w.T
        parts = turned.reshape(-1, block, D_OUT)
        scale = (np.abs(parts).max(1) / 7).astype(np.float32)
        q = np.clip(np.rint(parts / scale[:, None]), -8, 7).reshape(-1, D_OUT)[:D_IN].astype(ml_dtypes.int4)
        linear = g("DequantizeLinear", g.constant(q), g.constant(scale), axis=0, block_size=block)
        return str(g("MatMul", "x", linear))

    return build


def cast(w: Array) -> Callable[[Graph], str]:
    return lambda g: g("MatMul", "x", g("Cast", g.constant(w.T.astype(np.float16)), to=TensorProto.FLOAT))


W = weight(0)
STORED: dict[str, Callable[[Graph], str]] = {
    "as it is": matmul(W),
    "transposed": lambda g: g("MatMul", "x", g("Transpose", g.constant(W), perm=[1, 0])),
    "transposed by default": lambda g: g("MatMul", "x", g("Transpose", g.constant(W))),
    "Gemm": lambda g: g("Gemm", "x", g.constant(W.T)),
    "Gemm transB": lambda g: g("Gemm", "x", g.constant(W), transB=1),
    "FusedMatMul": lambda g: g("FusedMatMul", "x", g.constant(W), transB=1, alpha=1.0, domain=MICROSOFT),
    "Constant": lambda g: g("MatMul", "x", g("Constant", value=onnx.numpy_helper.from_array(W.T.copy()))),
    "Identity": lambda g: g("MatMul", "x", g("Identity", g.constant(W.T))),
    "float16": cast(W),
    "bfloat16 in float32": matmul(W.astype(ml_dtypes.bfloat16).astype(np.float32)),
    "int8 per tensor": dequantized(W, None),
    "int8 per channel": dequantized(W, 1),
    "int8 along d_in": dequantized(W, 0),
    "int4 blocks": blocked(W, 32),
    **{
        f"MatMulNBits {bits} {block} {'' if symmetric else 'a'}symmetric": (
            lambda g, bits=bits, block=block, symmetric=symmetric: nbits(
                g, "x", W, bits=bits, block=block, symmetric=symmetric, level=1
            )
        )
        for bits in (4, 8)
        for block in (16, 32, 128)
        for symmetric in (True, False)
    },
}


@pytest.mark.parametrize("kind", STORED)
def test_the_weight_a_product_sees(kind: str) -> None:
    model = model_of(STORED[kind], D_OUT)
    (product,) = find_products(ir.from_proto(model).graph)
    seen, reach = product.weight.read(0, D_OUT, D_IN)
    want = ran(model)
    assert product.weight.shape == (D_OUT, D_IN)
    assert np.abs(seen - want).max() <= 1e-6
    if reach is not None:  # what it says of rounding holds
        assert (np.abs(W - want) <= reach).all()
    part, _ = product.weight.read(7, 19, 33)
    assert np.array_equal(part, seen[7:19, :33])


@pytest.mark.parametrize("kind", STORED)
def test_a_layer_is_found_however_its_weight_is_stored(kind: str) -> None:
    model = model_of(STORED[kind], D_OUT)
    found = matched(model, {"layer": W, "other": weight(1)})
    (piece,) = found.pieces["layer"]
    assert (piece.first, piece.start, piece.stop) == (0, 0, D_OUT)
    assert "no product has its weight [45, 70]" in found.missing["other"]
    assert np.abs(found.seen("layer") - ran(model)).max() <= 1e-6


@pytest.mark.parametrize("kind", STORED)
def test_a_weight_that_differs_a_little_is_not_found(kind: str) -> None:
    model = model_of(STORED[kind], D_OUT)
    (product,) = find_products(ir.from_proto(model).graph)
    seen, reach = product.weight.read(0, D_OUT, D_IN)
    other = W.copy()
    # one number of 3150, in the last row, by a thousandth of its size, or to just beyond what rounds to the code
    other[-1, -1] = other[-1, -1] * 1.01 if reach is None else seen[-1, -1] + 1.02 * reach[-1, -1]
    found = matched(model, {"layer": other})
    assert not found.pieces
    assert "has its first 44 rows" in found.missing["layer"]


def test_packed_layers_in_any_order() -> None:
    parts = {"q": weight(1, 30), "k": weight(2, 10), "v": weight(3, 10)}
    for order in ("qkv", "vkq", "kqv"):
        w = np.concatenate([parts[name] for name in order])
        for build in (matmul(w), lambda g, w=w: nbits(g, "x", w, bits=4)):
            found = matched(model_of(build, 50), parts)
            starts = dict(zip(order, np.cumsum([0, *(len(parts[n]) for n in order)]), strict=False))
            assert {n: own[0].first for n, own in found.pieces.items()} == starts
            assert not found.missing


def test_a_layer_in_several_products() -> None:
    w = weight(4, 40)

    def build(g: Graph) -> str:
        parts = [g("MatMul", "x", g.constant(half.T)) for half in (w[25:], weight(5, 7), w[:25])]
        return str(g("Concat", *parts, axis=-1))

    found = matched(model_of(build, 47), {"gate_up": w})
    assert [(p.start, p.stop, p.product.weight.shape[0]) for p in found.pieces["gate_up"]] == [
        (0, 25, 25),
        (25, 40, 15),
    ]


def test_rows_in_an_order_of_their_own() -> None:
    w = weight(6, 40)
    found = matched(model_of(matmul(w[::-1].copy()), 40), {"layer": w})
    assert "more than 8 pieces" in found.missing["layer"]


def test_equal_weights_are_told_apart_or_refused() -> None:
    w, other = weight(7), weight(8)
    zero = np.zeros_like(w)
    twice = matched(model_of(lambda g: g("Add", matmul(w)(g), matmul(w)(g)), D_OUT), {"a": w, "o": other})
    assert "the graph has its weight 2 times" in twice.missing["a"]
    shared = matched(model_of(matmul(w), D_OUT), {"a": w, "b": w, "o": other})
    assert "'b', which are equal" in shared.missing["a"]
    assert "'a', which are equal" in shared.missing["b"]
    both = model_of(lambda g: g("Add", matmul(zero)(g), matmul(zero)(g)), D_OUT)
    assert "2 times" in matched(both, {"a": zero, "b": zero}).missing["a"]
    inside = model_of(matmul(np.concatenate([zero, zero])), 2 * D_OUT)
    assert "a" in matched(inside, {"a": zero, "b": zero}).missing
    one = matched(model_of(matmul(zero), D_OUT), {"a": zero, "o": other})
    assert one.pieces["a"][0].first == 0
    # equal first rows, and then not
    half = np.concatenate([w[:20], other[20:]])
    alike = matched(model_of(lambda g: g("Add", matmul(w)(g), matmul(half)(g)), D_OUT), {"a": w, "h": half})
    assert not alike.missing
    assert alike.pieces["a"][0].product is not alike.pieces["h"][0].product


def test_coarse_scales_match_nothing() -> None:
    q = np.zeros((D_IN, D_OUT), np.int8)
    build = lambda g: g("MatMul", "x", g("DequantizeLinear", g.constant(q), g.constant(np.float32(1e6))))  # noqa: E731
    found = matched(model_of(build, D_OUT), {"layer": W})
    assert "it may be any weight" in found.missing["layer"]


@pytest.mark.parametrize(
    "build",
    [
        lambda g: g("Gemm", "x", g.constant(W.T), alpha=0.5),
        lambda g: g("FusedMatMul", "x", g.constant(W.T), alpha=2.0, domain=MICROSOFT),
        lambda g: g("MatMul", "x", g("Relu", g.constant(W.T))),
        lambda g: g("MatMul", "x", g("Mul", g.constant(W.T), g.constant(np.float32(2)))),
    ],
)
def test_products_of_another_matrix_are_none(build: Callable[[Graph], str]) -> None:
    assert find_products(ir.from_proto(model_of(build, D_OUT)).graph) == []


def test_an_initializer_that_may_be_overridden_is_no_weight() -> None:
    model = model_of(matmul(W), D_OUT)
    assert len(find_products(ir.from_proto(model).graph)) == 1
    name = model.graph.initializer[0].name
    model.graph.input.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, W.T.shape))
    assert find_products(ir.from_proto(model).graph) == []


def wrong_nbits(change: Callable[[onnx.NodeProto], None]) -> onnx.ModelProto:
    model = model_of(lambda g: nbits(g, "x", W, bits=4), D_OUT)
    change(next(node for node in model.graph.node if node.op_type == "MatMulNBits"))
    return model


def set_number(name: str, value: int) -> Callable[[onnx.NodeProto], None]:
    def change(node: onnx.NodeProto) -> None:
        next(a for a in node.attribute if a.name == name).i = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_number("N", 44), "numbers as weight"),
        (set_number("K", 1 << 40), "numbers as weight"),
        (set_number("K", -1), "says K=-1"),
        (set_number("block_size", 0), "block_size=0"),
        (set_number("bits", 2), "weights of 2 bits"),
        (lambda node: node.input.extend(["", node.input[1]]), "g_idx"),
        (lambda node: node.input.__setitem__(1, "x"), "no constant"),
    ],
)
def test_quantized_weights_whose_parts_do_not_fit(change: Callable[[onnx.NodeProto], None], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        find_products(ir.from_proto(wrong_nbits(change)).graph)
