"""The pass that takes out of a traced graph what only its exporter wanted; runtimes then find what they fuse.

* `x * (1 / sqrt(v))`, which torch's `rsqrt` becomes, is written `x / sqrt(v)`: by that ONNX Runtime and TensorRT know
  the norms of language models.
* Reshape and Transpose that together give a tensor its own shape back, with every element in its place, are left out.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


class Tidy(ir.passes.InPlacePass):
    """Fewer nodes for the same results; division may round otherwise than a product with the reciprocal.

    Names of inputs and outputs stay, and so do the outputs of nodes that modules are matched by (MatMul, Gemm, Add).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        graph = model.graph
        for node in list(graph):
            if node.op_type == "Reciprocal":
                _divide(graph, node)
        ends = {id(value) for value in graph.outputs}
        for node in list(graph):
            if node.op_type == "Reshape" and id(node.outputs[0]) not in ends:
                source = _source(node)
                if source is not None:
                    for user, index in list(node.outputs[0].uses()):
                        user.replace_input_with(index, source)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)


def _divide(graph: ir.Graph, node: ir.Node) -> None:
    """Write products with the reciprocal of a square root as divisions by the root."""
    root = node.inputs[0]
    assert root is not None
    producer = root.producer()
    if producer is None or producer.op_type != "Sqrt":
        return
    ends = {id(value) for value in graph.outputs}
    for user, index in list(node.outputs[0].uses()):
        if user.op_type != "Mul" or user.inputs[0] is user.inputs[1] or id(user.outputs[0]) in ends:
            continue
        product = user.outputs[0]
        division = ir.node("Div", [user.inputs[1 - index], root], metadata_props=dict(user.metadata_props))
        quotient = division.outputs[0]
        quotient.name, quotient.type, quotient.shape = f"{product.name}.div", product.type, product.shape
        graph.insert_before(user, division)
        for other, position in list(product.uses()):
            other.replace_input_with(position, quotient)
        graph.remove(user, safe=True)


def _source(node: ir.Node) -> ir.Value | None:
    """The value that `node` gives back, where nothing but Reshape and Transpose lies between, and none moves anything.

    Going up from `node`, transposes must undo each other before a reshape comes: those between two reshapes are one
    permutation, which must be none.
    """
    order: list[int] | None = None
    value, best = node.inputs[0], None
    wanted = node.outputs[0].shape
    while value is not None:
        if (order is None or order == sorted(order)) and _same(wanted, value.shape):
            best = value
        producer = value.producer()
        if producer is None:
            break
        if producer.op_type == "Transpose":
            permutation = list(producer.attributes["perm"].as_ints())
            # output axis i is the input's axis permutation[i]
            order = permutation if order is None else [permutation[axis] for axis in order]
        elif producer.op_type == "Reshape" and (order is None or order == sorted(order)):
            order = None
        else:
            break
        value = producer.inputs[0]
    return best


def _same(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Whether both are known to be equal, symbol by symbol."""
    if one is None or other is None or len(one) != len(other):
        return False
    return all(a == b and (isinstance(a, int) or a.value is not None) for a, b in zip(one, other, strict=True))
