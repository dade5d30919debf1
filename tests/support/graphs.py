"""Hand-made graphs with the module scopes that torch's exporter records, and prepared graphs without the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sdct_export import contract
from sdct_export.graph.match import SCOPES


class Scoped:
    """A graph of float32 values under construction, each node inside the module given by its path."""

    def __init__(self, shape: Sequence[int | str], opset: int = 20) -> None:
        self.rng = np.random.default_rng(0)
        self.x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": opset}, name="main")

    def weight(self, *shape: int) -> ir.Value:
        tensor = ir.tensor(self.rng.standard_normal(shape).astype(np.float32), name=f"w{len(self.graph.initializers)}")
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(ir.DataType.FLOAT), shape=tensor.shape, const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def const(self, values: Sequence[int]) -> ir.Value:
        return self.op("", "Constant", value=ir.tensor(np.array(values, np.int64)))

    def op(
        self, path: str, op_type: str, *inputs: ir.Value, shape: Sequence[int | str] = (), **attributes: Any
    ) -> ir.Value:
        parts = path.split(".") if path else []
        scopes = ["", *(".".join(parts[: i + 1]) for i in range(len(parts))), f"{op_type.lower()}_{len(self.graph)}"]
        out = ir.Value(
            name=f"v{len(self.graph)}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape) if shape else None
        )
        node = ir.node(op_type, inputs, attributes, outputs=[out], metadata_props={SCOPES: repr(scopes)})
        self.graph.append(node)
        return out

    def linear(self, path: str, x: ir.Value, d_in: int, d_out: int, *, bias: bool = True) -> ir.Value:
        shape = [*(x.shape or [])[:-1], d_out]
        product = self.op(path, "MatMul", x, self.weight(d_in, d_out), shape=shape)
        return self.op(path, "Add", product, self.weight(d_out), shape=shape) if bias else product

    def model(self, *outputs: ir.Value) -> ir.Model:
        for number, output in enumerate(outputs):
            output.name = f"out_{number}"
        self.graph.outputs.extend(outputs)
        return ir.Model(self.graph, ir_version=9)


def without_plugin(graph: Path, to: Path) -> Path:
    """The graph with every `SpectralDelta` passing its y through, so that ONNX Runtime runs it without the plugin."""
    model = onnx.load(graph, load_external_data=False)
    nodes = []
    for node in model.graph.node:
        if node.op_type != contract.OP_TYPE:
            nodes.append(node)
            continue
        for y, out in zip(node.input[5:], node.output, strict=True):
            nodes.append(onnx.helper.make_node("Identity", [y], [out]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.functions[:]
    onnx.save(model, to)
    return to
