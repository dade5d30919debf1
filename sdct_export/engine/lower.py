"""What TensorRT's ONNX parser needs of a graph: `SpectralDelta` left to the plugin, opset 17 for old versions, and a
key-value cache that stays where it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx import TensorProto, helper, numpy_helper

from ..contract import ATTENTION_MASK, BATCH, DOMAIN, KEPT, LAST_LOGITS, POSITION_IDS, Cache
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

OLD_OPSET = 17
SCATTER_OPSET = 24  # the first with TensorScatter
NO_LAYER = {"Constant", "If", "Loop", "Scan"}  # what the parser makes of these has names of its own
NO_NUMBERS = {"Shape", "Size"}  # of what they read only the extents matter


def keep_in_buffers(model: onnx.ModelProto, cache: Cache, *, in_place: bool) -> onnx.ModelProto:
    """A graph of target `tensorrt` with its cache in buffers that are longer than what they hold. Changes `model`.

    Its inputs beside those of the adapters, and its outputs:

        input_ids, position_ids [batch, sequence]  int64   the new tokens of a row, side by side
        kept                    [batch, 1]         int64   which of them has its logits computed
        past_key_values.<i>.key [batch, kv_heads, length, head_size], .value   the first columns hold the tokens before
        logits                  [batch, 1, vocabulary]
        present.<i>.key, .value as the past, with the new tokens from column `position_ids[:, 0]` on

    A token sees the columns up to its own position, so no mask is needed: what lies in the columns behind is never
    seen, whatever finite numbers it is.

    Args:
        model: the graph of the bundle.
        cache: that of the bundle.
        in_place: write with TensorScatter (opset 24), whose present TensorRT has in the memory of the past; else with
            ScatterND, whose present is another buffer.

    Raises:
        UnsupportedError: the graph is not as `graph.cache` made it.
    """
    graph = model.graph
    nodes = {name: node for node in graph.node for name in node.output}
    new = _Nodes(graph, "sdct.buffers")
    zero, one, two, three = (new.constant([number], np.int64) for number in range(4))
    start = new("Slice", POSITION_IDS, zero, one, one)
    shape = new("Shape", cache.pasts[0])
    length = new("Squeeze", new("Slice", shape, two, three), zero)
    column = new("Range", new.constant(0, np.int64), length, new.constant(1, np.int64))
    column = new("Unsqueeze", column, new.constant([0, 1], np.int64))
    own = new("Unsqueeze", POSITION_IDS, two)
    found = 0
    for name, window in cache.seen.items():
        if name not in nodes:
            continue
        found += 1
        _rename(nodes[name], name)
        before = new("LessOrEqual", column, own, out=name if window is None else None)
        if window is not None:
            new("And", before, new("Less", new("Sub", own, column), new.constant(window, np.int64)), out=name)
    if not found or KEPT not in nodes:
        raise UnsupportedError(
            "this graph has no named values for what a token sees, as one for TensorRT has; export it again with "
            "--target tensorrt"
        )
    _rename(nodes[KEPT], KEPT)
    places = new("Squeeze", start, one) if in_place else _places(new, cache, shape, start)
    for past, present in zip(cache.pasts, cache.presents, strict=True):
        node = nodes.get(present)
        if node is None or node.op_type != "Concat" or len(node.input) != 2 or node.input[0] != past:
            raise UnsupportedError(f"{present!r} is not {past!r} and the new tokens; export the bundle again")
        update = node.input[1]
        del node.attribute[:]
        node.op_type = "TensorScatter" if in_place else "ScatterND"
        node.input[:] = [past, update, places] if in_place else [past, places, update]
        if in_place:
            node.attribute.append(helper.make_attribute("axis", -2))
    if in_place:
        for opset in (
            *model.opset_import,
            *(opset for function in model.functions for opset in function.opset_import),
        ):
            opset.version = max(opset.version, SCATTER_OPSET) if not opset.domain else opset.version
    for i, node in enumerate(new.nodes):
        graph.node.insert(i, node)
    for values in (graph.input, graph.initializer):
        for value in [value for value in values if value.name in (ATTENTION_MASK, LAST_LOGITS)]:
            values.remove(value)
    graph.input.append(helper.make_tensor_value_info(KEPT, TensorProto.INT64, [BATCH, 1]))
    _name_extents(graph, cache)
    _drop_unused(graph)
    return model


def _places(new: _Nodes, cache: Cache, shape: str, start: str) -> str:
    """Where ScatterND puts the new tokens, `[batch, kv_heads, sequence, 3]`: row, head and column of each."""
    zero, one, two = (new.constant([number], np.int64) for number in range(3))
    first, step = new.constant(0, np.int64), new.constant(1, np.int64)
    batch = new("Slice", shape, zero, one)
    length = new("Slice", new("Shape", POSITION_IDS), one, two)
    rows = new("Range", first, new("Squeeze", batch, zero), step)
    ahead = new("Range", first, new("Squeeze", length, zero), step)
    heads = new.constant(np.arange(cache.kv_heads)[None, :, None, None], np.int64)
    columns = new("Unsqueeze", new("Add", start, ahead), new.constant([1, 3], np.int64))
    parts = (new("Unsqueeze", rows, new.constant([1, 2, 3], np.int64)), heads, columns)
    whole = new("Concat", batch, new.constant([cache.kv_heads], np.int64), length, one, axis=0)
    return new("Concat", *(new("Expand", part, whole) for part in parts), axis=-1)


def _rename(node: onnx.NodeProto, name: str) -> None:
    """Let `node` give `name` no more."""
    node.output[:] = [f"{output}.unused" if output == name else output for output in node.output]


def _name_extents(graph: onnx.GraphProto, cache: Cache) -> None:
    """Extents as they are now: a cache has `length` columns, in and out, and there is one token with logits."""
    for value in (*graph.input, *graph.output):
        if value.name in cache.pasts or value.name in cache.presents:
            value.type.tensor_type.shape.dim[2].dim_param = "length"
        if value.name == "logits":
            value.type.tensor_type.shape.dim[1].dim_value = 1
    for value in graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param not in (BATCH, "sequence"):
                dim.ClearField("dim_param")


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes whose results nobody reads."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_reads(node))
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node if attribute.HasField("g") else ():
            yield from _reads(inner)
        if attribute.HasField("g"):
            yield from (value.name for value in attribute.g.output)


class _Nodes:
    """New nodes one after another, each value under a name of its own below `prefix`."""

    def __init__(self, graph: onnx.GraphProto, prefix: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._graph, self._prefix, self._names = graph, prefix, 0

    def __call__(self, op_type: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        name = self._name()
        self.nodes.append(
            helper.make_node(op_type, list(inputs), [out or name], name=f"{name}.{op_type}", **attributes)
        )
        return out or name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = self._name()
        self._graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def _name(self) -> str:
        self._names += 1
        return f"{self._prefix}.{self._names}"


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
    """Replace LayerNormalization, Gelu and Split by operators that exist, or convert to, in opset 17.

    So is Shape with bounds, of which the parsers before TensorRT 10 give the whole shape all the same.
    """
    values = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    replace: dict[str, Callable[[_Expansion], None]] = {
        "LayerNormalization": _layer_normalization,
        "Gelu": _gelu,
        "Split": _split,
        "Shape": _shape,
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _expand(attribute.g, layer_normalization, mixed)
        known = node.op_type == "LayerNormalization" and layer_normalization and not any(node.output[1:])
        if known and mixed:
            known = node.output[0] in values and values[node.output[0]].elem_type != TensorProto.FLOAT
        known = known or (node.op_type == "Shape" and not node.attribute)
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


def _shape(op: _Expansion) -> None:
    """The whole shape, and a Slice of it."""
    start, stop = op.given.get("start", 0), op.given.get("end", 2**31 - 1)
    bounds = (op.constant([v], np.int64) for v in (start, stop, 0))
    op("Slice", op("Shape", op.node.input[0]), *bounds, out=op.node.output[0])
