"""The pass that makes a traced bfloat16 graph one that runtimes run, and that users can feed.

**Ends.** numpy and ONNX Runtime's Python interface know no bfloat16, so the graph takes and gives float32: an input is
rounded once where it comes in, an output is widened, which is exact.

**Operators.** ONNX Runtime's CUDA provider has bfloat16 kernels for most operators; the others (Conv up to opset 21,
ReduceMean, Clip) compute in float32 here, between casts, and round once to bfloat16, as a kernel of their own would.
`KERNELS` says from which opset on there is one, after ONNX Runtime's docs/OperatorKernels.md. TensorRT runs both.
"""

from __future__ import annotations

import onnx_ir as ir

FLOAT, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16

KERNELS = {
    "Abs": 13, "Add": 14, "Attention": 23, "AveragePool": 22, "Cast": 13, "Compress": 9, "Concat": 4, "Constant": 1,
    "ConstantOfShape": 9, "Conv": 22, "Div": 14, "Dropout": 13, "Erf": 13, "Exp": 13, "Expand": 8, "Flatten": 1,
    "Gather": 1, "GatherElements": 11, "GatherND": 13, "Gelu": 20, "Gemm": 13, "HardSigmoid": 22, "HardSwish": 22,
    "Identity": 1, "If": 1, "IsInf": 20, "IsNaN": 13, "LayerNormalization": 1, "Loop": 1, "MatMul": 13, "Max": 6,
    "Min": 6, "Mod": 13, "Mul": 14, "Neg": 13, "Pow": 15, "RMSNormalization": 23, "ReduceSum": 13, "Relu": 14,
    "Reshape": 1, "RotaryEmbedding": 23, "Scan": 9, "ScatterElements": 11, "ScatterND": 11, "Shape": 1, "Sigmoid": 13,
    "Sign": 13, "Size": 1, "Slice": 1, "Softmax": 13, "Split": 2, "Sqrt": 13, "Squeeze": 1, "Sub": 14, "Sum": 6,
    "Tanh": 13, "Tile": 13, "Transpose": 1, "Trilu": 14, "Unsqueeze": 1, "Where": 16,
}  # fmt: skip


class FitBfloat16(ir.passes.InPlacePass):
    """Float32 at the ends of the graph and in operators without a bfloat16 kernel; everything else stays as it is.

    Every value must have a type, as `trace` leaves them. Names of inputs and outputs stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        graph = model.graph
        opset = graph.opset_imports[""]
        for node in list(ir.traversal.RecursiveGraphIterator(graph)):
            if KERNELS.get(node.op_type, opset + 1) > opset:
                _widen(node)
        for value in graph.inputs:
            if value.dtype == BFLOAT16:
                _round_input(graph, value)
        for position, value in enumerate(graph.outputs):
            if value.dtype == BFLOAT16:
                _widen_output(graph, position, value)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No bfloat16 at the ends."""
        assert not [v.name for v in (*model.graph.inputs, *model.graph.outputs) if v.dtype == BFLOAT16]


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
