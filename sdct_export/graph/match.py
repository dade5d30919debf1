"""Module path -> the values its linear layer reads and writes, found through the module scopes the exporter records.

torch's exporter stores on every node the stack of modules it came from, as a Python list literal in the metadata entry
`pkg.torch.onnx.name_scopes`: `['', 'encoder', 'encoder.layer.0', ..., 'encoder.layer.0.attention.self.query',
'linear']`, the last item being the operation itself. Tensor names are never looked at.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Collection

import onnx_ir as ir

from ..errors import UnsupportedError

SCOPES = "pkg.torch.onnx.name_scopes"
_PRODUCTS = ("MatMul", "Gemm", "MatMulNBits")
_PASSED_THROUGH = ("Reshape", "Cast", "Identity", "Flatten")  # may stand between a module's edge and its product


@dataclasses.dataclass
class Site:
    """A linear layer in the graph, `y = x W^T (+ b)`: `x [..., d_in]` enters the module, `y [..., d_out]` leaves it.

    `sum` is `x W^T` before a separate bias addition, else the same value as `y`. A weight change is best added there:
    the runtime then still fuses the bias with what follows (BiasGelu, SkipLayerNormalization) just as in the base
    graph, and only so do base rows keep their last bit.
    """

    module: str
    x: ir.Value
    y: ir.Value
    sum: ir.Value


def match_linears(graph: ir.Graph, modules: Collection[str]) -> dict[str, Site]:
    """The sites of `modules` in the order in which the graph computes them.

    Knows Gemm, MatMul, MatMulNBits, one of these + Add, and these on a 2-D view of a tensor of any rank (GPT-2's
    `Conv1D`).

    Raises:
        UnsupportedError: a module does not occur in the graph, or is called more than once.
    """
    members: dict[str, list[ir.Node]] = {module: [] for module in modules}
    for node in graph:
        for path in set(scopes_of(node)) & members.keys():
            members[path].append(node)
    order = {node: position for position, node in enumerate(graph)}
    products = {module: _product(module, nodes) for module, nodes in members.items()}
    return {
        module: _site(module, products[module], set(members[module]))
        for module in sorted(products, key=lambda module: order[products[module]])
    }


def scopes_of(node: ir.Node) -> list[str]:
    """Paths of the modules that `node` was traced in, the outermost first; none of a node that no module made."""
    text = node.metadata_props.get(SCOPES)
    return ast.literal_eval(text)[:-1] if text else []


def _product(module: str, nodes: list[ir.Node]) -> ir.Node:
    """The one matrix product of `module`, by a matrix that depends on weights only."""
    products = [n for n in nodes if n.op_type in _PRODUCTS and _is_constant(n.inputs[1])]
    if not products:
        found = sorted({n.op_type for n in nodes})
        raise UnsupportedError(
            f"module {module!r} is in the model, but "
            + (
                f"its exported nodes ({', '.join(found)}) hold no matrix product"
                if nodes
                else "the exported graph has no node of it"
            )
            + "; the model does not call it, or calls it only in another mode or task: adapt other modules"
        )
    if len(products) > 1:
        raise UnsupportedError(
            f"module {module!r} is called {len(products)} times in one forward; an adapter needs one that is called "
            "once: merge this adapter instead (--merge)"
        )
    return products[0]


def _site(module: str, product: ir.Node, members: set[ir.Node]) -> Site:
    x = product.inputs[0]
    assert x is not None
    while (producer := x.producer()) in members and producer.op_type in _PASSED_THROUGH:
        x = producer.inputs[0]
        assert x is not None
    y = total = product.outputs[0]
    while not y.is_graph_output():
        followers = {use.node for use in y.uses() if use.node in members and use.node.op_type != "Shape"}
        if len(followers) != 1:
            break
        follower = followers.pop()
        if not (follower.op_type in _PASSED_THROUGH or _adds_constant(follower)):
            break
        if total is y and not _adds_constant(follower):
            total = follower.outputs[0]
        y = follower.outputs[0]
    return Site(module, x, y, total)


def _adds_constant(node: ir.Node) -> bool:
    return node.op_type == "Add" and any(_is_constant(value) for value in node.inputs)


def _is_constant(value: ir.Value | None) -> bool:
    """Whether `value` is computed from initializers and constants alone."""
    if value is None:
        return True
    if value.is_initializer():
        return True
    producer = value.producer()
    if producer is None:
        return False
    return producer.op_type == "Constant" or (bool(producer.inputs) and all(map(_is_constant, producer.inputs)))
