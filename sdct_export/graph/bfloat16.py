"""The pass that makes a traced bfloat16 graph one that runtimes run, and that users can feed.

**Ends.** numpy and ONNX Runtime's Python interface know no bfloat16, so the graph takes and gives float32: an input is
rounded once where it comes in, an output is widened, which is exact. A key-value cache stays as it is: nobody looks
into it, it is large, and a past and its present have one buffer.

**Operators.** ONNX Runtime's CUDA provider has bfloat16 kernels for most operators; the others (Conv, Gelu, Pow, Clip,
ReduceMean) compute in float32 here, between casts, and round once to bfloat16, as a kernel of their own would.
`KERNELS` are those that every supported version has from opset 18 on, after docs/OperatorKernels.md of ONNX Runtime
1.23; newer ones have more. TensorRT runs both.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

FLOAT, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16

KERNELS = frozenset({
    "Abs", "Add", "Cast", "Compress", "Concat", "Constant", "ConstantOfShape", "Div", "Dropout", "Erf", "Exp",
    "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gemm", "GroupQueryAttention", "Identity", "If",
    "IsNaN", "LayerNormalization", "Loop", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "RMSNormalization",
    "ReduceSum", "Relu", "Reshape", "RotaryEmbedding", "Scan", "ScatterElements", "ScatterND", "Shape", "Sigmoid",
    "Sign", "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose",
    "Trilu", "Unsqueeze", "Where",
})  # fmt: skip


class FitBfloat16(ir.passes.InPlacePass):
    """Float32 at the ends of the graph and in operators without a bfloat16 kernel; everything else stays as it is.

    Every value must have a type, as `trace` leaves them. Names of inputs and outputs stay.

    Args:
        cache: names of inputs and outputs that stay bfloat16.
    """

    def __init__(self, cache: Collection[str] = ()) -> None:
        super().__init__()
        self._cache = frozenset(cache)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        graph = model.graph
        for node in list(ir.traversal.RecursiveGraphIterator(graph)):
            if node.op_type not in KERNELS:
                _widen(node)
        for value in graph.inputs:
            if value.dtype == BFLOAT16 and value.name not in self._cache:
                _round_input(graph, value)
        for position, value in enumerate(graph.outputs):
            if value.dtype == BFLOAT16 and value.name not in self._cache:
                _widen_output(graph, position, value)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No bfloat16 at the ends, but in the cache."""
        ends = (*model.graph.inputs, *model.graph.outputs)
        assert {value.name for value in ends if value.dtype == BFLOAT16} <= self._cache


def _widen(node: ir.Node) -> None:
    """Let `node` compute in float32 what it computed in bfloat16."""
    graph = node.graph
    assert graph is not None
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == BFLOAT16:
            wide = ir.Value(
                name=f"{node.outputs[0].name}.{index}.float32", type=ir.TensorType(FLOAT), shape=value.shape
            )
            graph.insert_before(node, ir.node("Cast", [value], {"to": FLOAT}, outputs=[wide]))
            node.replace_input_with(index, wide)
    for value in node.outputs:
        if value.dtype == BFLOAT16:
            rounded = ir.Value(name=value.name, type=value.type, shape=value.shape)
            value.name, value.type = f"{value.name}.float32", ir.TensorType(FLOAT)
            _replace(graph, value, rounded)
            graph.insert_after(node, ir.node("Cast", [value], {"to": BFLOAT16}, outputs=[rounded]))


def _round_input(graph: ir.Graph, value: ir.Value) -> None:
    rounded = ir.Value(name=f"{value.name}.bfloat16", type=value.type, shape=value.shape)
    value.type = ir.TensorType(FLOAT)
    _replace(graph, value, rounded)
    graph.insert_before(graph[0], ir.node("Cast", [value], {"to": BFLOAT16}, outputs=[rounded]))


def _widen_output(graph: ir.Graph, position: int, value: ir.Value) -> None:
    wide = ir.Value(name=value.name, type=ir.TensorType(FLOAT), shape=value.shape)
    value.name = f"{value.name}.bfloat16"
    graph.outputs[position] = wide
    graph.append(ir.node("Cast", [value], {"to": FLOAT}, outputs=[wide]))


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let all that uses `old` use `new`."""
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)
    for position, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[position] = new
