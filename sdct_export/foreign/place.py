"""Where `graph.insert` puts adapters in a graph whose layers were found by their weights.

A layer that is one whole product has its place already. Where it is some rows of a product, that one's output is split
into the layers' columns and put together again behind them; where several products make it up, their outputs are put
together for it and split again. Neither changes a bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from ..errors import UnsupportedError
from ..graph.match import Site
from .match import Match, Piece
from .weights import Product, numbers_of


def place_sites(graph: ir.Graph, match: Match, modules: Collection[str]) -> dict[str, Site]:
    """The sites of `modules`, each among `match.pieces`, in graph order; splits outputs that several layers share.

    Raises:
        UnsupportedError: the parts of a layer read different tensors.
    """
    order = {node: position for position, node in enumerate(graph)}
    chosen = sorted(modules, key=lambda m: (order[match.pieces[m][0].product.node], match.pieces[m][0].first))
    for module in chosen:
        xs = {piece.product.x for piece in match.pieces[module]}
        if len(xs) > 1:
            raise UnsupportedError(f"module {module!r}: its parts read different tensors in this graph")
        for piece in match.pieces[module]:
            _set_type(piece.product)
    placed = _Splits(graph, {m: match.pieces[m] for m in chosen})
    return {module: placed.site(module) for module in chosen}


class _Splits:
    def __init__(self, graph: ir.Graph, pieces: dict[str, tuple[Piece, ...]]) -> None:
        self._graph, self._pieces = graph, pieces
        self._parts: dict[Piece, ir.Value] = {}
        cut: dict[Product, list[Piece]] = {}
        for own in pieces.values():
            for piece in own:
                cut.setdefault(piece.product, []).append(piece)
        for product, own_pieces in cut.items():
            self._split(product, sorted(own_pieces, key=lambda piece: piece.first))

    def site(self, module: str) -> Site:
        """The one of `module`, whose parts are put together where there are several."""
        own = self._pieces[module]
        x, parts = own[0].product.x, [self._parts[piece] for piece in own]
        if len(parts) > 1:
            return Site(module, x, *[self._join(module, parts)] * 2)
        part = parts[0]
        return Site(module, x, _behind_bias(part) if part is own[0].product.y else part, part)

    def _split(self, product: Product, pieces: Sequence[Piece]) -> None:
        """Give each of `pieces` a value of its own, the product's output where it is the whole."""
        rows, y = product.weight.shape[0], product.y
        if len(pieces) == 1 and (pieces[0].first, pieces[0].last) == (0, rows):
            self._parts[pieces[0]] = y
            return
        edges = sorted({0, rows, *(edge for piece in pieces for edge in (piece.first, piece.last))})
        users = list(y.uses())
        parts = self._divide(y, [b - a for a, b in itertools.pairwise(edges)])
        whole = ir.Value(name=f"sdct.{y.name}", type=y.type, shape=y.shape)
        self._graph.append(ir.node("Concat", parts, {"axis": -1}, outputs=[whole]))
        self._replace(y, whole, users)
        for piece in pieces:
            self._parts[piece] = parts[edges.index(piece.first)]

    def _join(self, module: str, parts: Sequence[ir.Value]) -> ir.Value:
        """One value of `parts`, behind which each of them is taken from it again."""
        users = [list(part.uses()) for part in parts]
        whole = ir.Value(name=f"sdct.{module}.joined", type=parts[0].type)
        self._graph.append(ir.node("Concat", parts, {"axis": -1}, outputs=[whole]))
        sizes = [piece.stop - piece.start for piece in self._pieces[module]]
        again = self._divide(whole, sizes)
        for part, new, uses in zip(parts, again, users, strict=True):
            self._replace(part, new, uses)
        return whole

    def _divide(self, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        """Columns of `value`, so many each."""
        lengths = ir.tensor(np.array(sizes, np.int64), name=f"sdct.{value.name}.columns")
        split = ir.val(lengths.name, const_value=lengths)
        self._graph.register_initializer(split)
        parts = [ir.Value(name=f"sdct.{value.name}.{i}", type=value.type) for i in range(len(sizes))]
        for part, size in zip(parts, sizes, strict=True):
            if value.shape is not None:
                part.shape = ir.Shape([*value.shape[:-1], size])
        self._graph.append(ir.node("Split", [value, split], {"axis": -1}, outputs=parts))
        return parts

    def _replace(self, old: ir.Value, new: ir.Value, users: Sequence[tuple[ir.Node, int]]) -> None:
        for user, index in users:
            user.replace_input_with(index, new)
        for position, output in enumerate(self._graph.outputs):
            if output is old:
                self._graph.outputs[position] = new
                old.name, new.name = new.name, old.name


def _set_type(product: Product) -> None:
    """A graph need not say the types of values between its nodes; a product has that of its weight."""
    dtype = ir.DataType.from_numpy(np.dtype(product.weight.dtype)) if product.weight.dtype != "bfloat16" else None
    if product.y.dtype is None:
        product.y.type = ir.TensorType(dtype or ir.DataType.BFLOAT16)


def _behind_bias(y: ir.Value) -> ir.Value:
    """What the layer gives: `y`, or the sum of it and a constant behind it."""
    users = {use.node for use in y.uses()}
    if len(users) == 1 and not y.is_graph_output():
        user = users.pop()
        if user.op_type == "Add" and any(numbers_of(value) is not None for value in user.inputs):
            return user.outputs[0]
    return y
