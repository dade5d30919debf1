"""What TensorRT's ONNX parser needs of a graph: `SpectralDelta` left to the plugin, and opset 17 for old versions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx import TensorProto, helper, numpy_helper

from ..contract import DOMAIN
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OLD_OPSET = 17
NO_LAYER = {"Constant", "If", "Loop", "Scan"}  # what the parser makes of these has names of its own
NO_NUMBERS = {"Shape", "Size"}  # of what they read only the extents matter


def for_plugin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without the function bodies of `SpectralDelta`; other functions are inlined.

    The parser prefers a function inside the file to a plugin of the same name, and knows no `overload`. Names, order,
    weights and their external files stay. Changes `model`.
    """
    kept = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    for node in model.graph.node:
        if node.domain == DOMAIN:
            node.overload = ""
    return onnx.inliner.inline_local_functions(model) if kept else model


def to_opset_17(model: onnx.ModelProto, *, layer_normalization: bool = False, mixed: bool = False) -> onnx.ModelProto:
    """The same graph in opset 17, what TensorRT 8 and 9 read; without the operators they lack. Changes `model`.

    Args:
        model: the graph, with the types of its values.
        layer_normalization: keep LayerNormalization, as TensorRT 8.6 and 9 know it; they compute it in float32.
        mixed: the graph is built for float16, so name what is float32 in it (`name_float32`). A LayerNormalization of
            float32 is then replaced all the same: the parser gives its layer no name.

    Raises:
        UnsupportedError: an operator does not convert, or a value has no type.
    """
    _expand(model.graph, layer_normalization, mixed)
    try:
        lowered: onnx.ModelProto = onnx.version_converter.convert_version(model, OLD_OPSET)
    except Exception as error:  # onnx raises several kinds, RuntimeError among them
        raise UnsupportedError(
            f"TensorRT 8 and 9 read ONNX up to opset {OLD_OPSET}, and this graph does not convert to it ({error}); "
            "use TensorRT 10 or newer"
        ) from error
    for node in lowered.graph.node:  # the converter leaves an attribute behind that came with opset 18
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    lowered.ir_version = 8
    if mixed:
        lowered = onnx.shape_inference.infer_shapes(lowered)  # of the nodes that are new
        name_float32(lowered.graph)
    return lowered


def name_float32(graph: onnx.GraphProto, count: int = 0, around: Mapping[str, int] | None = None) -> int:
    """Name nodes by what the builder must not round to float16. Changes `graph`; returns how many have names so far.

    `float32[7]` gives float32 alone, `float32.in[7]` computes in it and gives something else (a comparison, say). The
    parser names its layers after nodes, so that the names say it to the builder. `around` are the types of values
    outside of a subgraph.

    Raises:
        UnsupportedError: a value has no type.
    """
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    types = dict(around or {})
    types |= {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    types |= {t.name: t.data_type for t in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                count = name_float32(attribute.g, count, types)
        if node.op_type in NO_LAYER:
            continue
        given = [types.get(name, TensorProto.UNDEFINED) for name in node.output if name]
        if TensorProto.UNDEFINED in given:
            raise UnsupportedError(
                f"node {node.name!r} ({node.op_type}) gives a value of unknown type, so what is float32 cannot be "
                "kept from float16; use TensorRT 10 or newer, or export in float32"
            )
        reads = any(types.get(name) == TensorProto.FLOAT for name in node.input)
        if {*given} == {TensorProto.FLOAT}:
            node.name = f"float32[{count}]"
            count += 1
        elif TensorProto.FLOAT in given or (reads and not floats & {*given} and node.op_type not in NO_NUMBERS):
            node.name = f"float32.in[{count}]"
            count += 1
    return count


def _expand(graph: onnx.GraphProto, layer_normalization: bool, mixed: bool) -> None:
    """Replace LayerNormalization, Gelu and Split by operators that exist, or convert to, in opset 17."""
    values = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    replace: dict[str, Callable[[_Expansion], None]] = {
        "LayerNormalization": _layer_normalization,
        "Gelu": _gelu,
        "Split": _split,
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        known = node.op_type == "LayerNormalization" and layer_normalization and not any(node.output[1:])
        if known and mixed:
            known = node.output[0] in values and values[node.output[0]].elem_type != TensorProto.FLOAT
        if node.op_type in replace and not node.domain and not known:
            expansion = _Expansion(graph, node, values)
            replace[node.op_type](expansion)
            nodes += expansion.nodes
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


class _Expansion:
    """The nodes that replace `node`, with names of their own; floats are computed in float32 as the node would."""

    def __init__(self, graph: onnx.GraphProto, node: onnx.NodeProto, values: dict[str, Any]) -> None:
        self.node = node
        self.given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.nodes: list[onnx.NodeProto] = []
        self.values = values
        self._graph = graph
        self._names = 0

    def __call__(self, op_type: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        name = out or self._name()
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=f"{name}.{op_type}", **attributes))
        return name

    def refuse(self) -> UnsupportedError:
        return UnsupportedError(
            f"node {self.node.name!r} ({self.node.op_type}) has a form that does not convert to opset {OLD_OPSET}, "
            "which TensorRT 8 and 9 read; use TensorRT 10 or newer"
        )

    def single(self) -> tuple[str, int]:
        """The first input in float32, and its own type."""
        tensor = self.values.get(self.node.input[0])
        if tensor is None or tensor.elem_type == TensorProto.UNDEFINED:
            raise self.refuse()
        x = self.node.input[0]
        return (
            x if tensor.elem_type == TensorProto.FLOAT else self("Cast", x, to=TensorProto.FLOAT)
        ), tensor.elem_type

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = self._name()
        self._graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def _name(self) -> str:
        self._names += 1
        return f"{self.node.output[0]}.{self._names}"


def _layer_normalization(op: _Expansion) -> None:
    """`(x - mean) / sqrt(var + epsilon) * scale + bias` over the last axis."""
    if any(op.node.output[1:]) or op.given.get("axis", -1) != -1:
        raise op.refuse()
    x, dtype = op.single()
    last = op.constant([-1], np.int64)
    centred = op("Sub", x, op("ReduceMean", x, last, keepdims=1))
    variance = op("ReduceMean", op("Mul", centred, centred), last, keepdims=1)
    deviation = op("Sqrt", op("Add", variance, op.constant(op.given.get("epsilon", 1e-5))))
    y = op("Div", centred, deviation)
    if dtype != TensorProto.FLOAT:
        y = op("Cast", y, to=dtype)
    bias = op.node.input[2] if len(op.node.input) > 2 else ""
    out = op.node.output[0]
    if bias:
        op("Add", op("Mul", y, op.node.input[1]), bias, out=out)
    else:
        op("Mul", y, op.node.input[1], out=out)


def _gelu(op: _Expansion) -> None:
    """`x / 2 (1 + erf(x / sqrt 2))`, or `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`."""
    x, dtype = op.single()
    if op.given.get("approximate", b"none") == b"tanh":
        cube = op("Mul", op("Mul", x, x), x)
        inner = op("Add", x, op("Mul", cube, op.constant(0.044715)))
        bend = op("Tanh", op("Mul", inner, op.constant(math.sqrt(2 / math.pi))))
    else:
        bend = op("Erf", op("Mul", x, op.constant(math.sqrt(0.5))))
    y = op("Mul", op("Mul", x, op.constant(0.5)), op("Add", bend, op.constant(1)))
    op("Cast", y, to=dtype, out=op.node.output[0])


def _split(op: _Expansion) -> None:
    """One Slice an output."""
    axis = op.given.get("axis", 0)
    start = 0
    for out in op.node.output:
        tensor = op.values.get(out)
        dims = tensor.shape.dim if tensor is not None else []
        if not -len(dims) <= axis < len(dims) or not dims[axis].dim_value:
            raise op.refuse()
        stop = start + dims[axis].dim_value
        bounds = (op.constant([v], np.int64) for v in (start, stop, axis))
        op("Slice", op.node.input[0], *bounds, out=out)
        start = stop
