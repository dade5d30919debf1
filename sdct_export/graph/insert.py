"""The pass that turns an exported base graph into a multi-adapter graph (see `contract`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import onnx_ir as ir

from ..contract import (
    ADAPTER_IDS,
    ADAPTER_SCALES,
    BATCH,
    BLEND,
    DOMAIN,
    IR_VERSION,
    OP_TYPE,
    OP_VERSION,
    SLOTS,
    Group,
    Head,
    edge_dtype,
    group_name,
    head_names,
    indices_name,
    values_name,
)
from ..errors import UnsupportedError
from .function_body import Ops, functions_for, head_body, overload_of
from .match import Site, match_linears

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32
MIN_OPSET = 18  # ReduceMax with axes as an input, ScatterElements with a reduction


class InsertAdapters(ir.passes.InPlacePass):
    """Adds adapter inputs, one `SpectralDelta` node a group, and banked heads; everything else stays as it is.

    Args:
        shapes: adapted module -> `(d_out, d_in)`.
        capacity: adapted module -> coefficients of its largest adapter.
        heads: saved linear module -> `(d_out, d_in)`.
        match: finds the sites of modules in a graph, in its order; default: by the scopes that torch's exporter notes.

    After the call `groups` and `heads` describe what was inserted, in graph order.

    Raises:
        UnsupportedError: a module is not in the graph, or is called more than once, or the opset is too old.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        capacity: Mapping[str, int],
        heads: Mapping[str, tuple[int, int]],
        match: Callable[[ir.Graph, Collection[str]], dict[str, Site]] = match_linears,
    ) -> None:
        super().__init__()
        self._match = match
        self._shapes, self._capacity, self._head_shapes = dict(shapes), dict(capacity), dict(heads)
        self._sites: list[Site] = []
        self.groups: list[Group] = []
        self.heads: list[Head] = []

    def _check(self, model: ir.Model) -> None:
        # not in `requires`, whose errors the pass infrastructure would wrap into its own
        opset = model.graph.opset_imports.get("", 0)
        if opset < MIN_OPSET:
            raise UnsupportedError(f"the graph has opset {opset}; adapters need opset {MIN_OPSET} or newer")
        taken = {value.name for value in model.graph.inputs} & {ADAPTER_IDS, ADAPTER_SCALES}
        if taken:
            raise UnsupportedError(f"the model already has an input {taken.pop()!r}; rename that input of the model")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        self._check(model)
        graph = model.graph
        sites = self._match(graph, {*self._shapes, *self._head_shapes})
        self._sites = list(sites.values())
        shape = graph.inputs[0].shape
        batch = BATCH if shape is None else shape[0]
        ids = _input(graph, ADAPTER_IDS, INT32, [batch, BLEND])
        scales = _input(graph, ADAPTER_SCALES, FLOAT, [batch, BLEND])
        # heads first: an adapter that adapts a module which another one saves then adds to the head's output
        for module, site in sites.items():
            if module in self._head_shapes:
                self._insert_head(graph, site, ids, scales)
        by_input: dict[ir.Value, list[Site]] = {}
        for module, site in sites.items():
            if module in self._shapes:
                by_input.setdefault(site.x, []).append(site)
        for members in by_input.values():
            self._insert_group(model, members, ids, scales)
        graph.opset_imports[DOMAIN] = OP_VERSION
        model.ir_version = max(model.ir_version, IR_VERSION)
        graph.sort()
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Every adapted module sits in one group, every group in one node with a body."""
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
        assert sorted(m for g in self.groups for m in g.modules) == sorted(self._shapes)
        assert len(nodes) == len(self.groups)
        assert all(node.op_identifier() in model.functions for node in nodes)

    def _insert_group(self, model: ir.Model, sites: Sequence[Site], ids: ir.Value, scales: ir.Value) -> None:
        graph = model.graph
        modules = tuple(site.module for site in sites)
        d_in = self._shapes[modules[0]][1]
        d_out = tuple(self._shapes[m][0] for m in modules)
        capacity = tuple(self._capacity[m] for m in modules)
        group = Group(group_name(modules), modules, d_in, d_out, capacity)
        values = _input(graph, values_name(group.name), FLOAT, [SLOTS, sum(capacity)])
        indices = _input(graph, indices_name(group.name), INT32, [SLOTS, sum(capacity), 2])
        dtype = sites[0].sum.dtype
        assert dtype is not None
        for function in functions_for(group, dtype, graph.opset_imports[""]):
            model.functions.setdefault(function.identifier(), function)
        ys = [site.sum for site in sites]
        outputs = [
            ir.Value(name=f"sdct.{site.module}.output", type=y.type, shape=y.shape)
            for site, y in zip(sites, ys, strict=True)
        ]
        node = ir.node(
            OP_TYPE,
            [sites[0].x, ids, scales, values, indices, *ys],
            {"d_in": d_in, "d_out": d_out, "capacity": capacity},
            domain=DOMAIN,
            overload=overload_of(group, dtype),
            outputs=outputs,
            name=f"sdct.{group.name}",
        )
        self._splice(graph, ys, outputs, [node])
        self.groups.append(group)

    def _insert_head(self, graph: ir.Graph, site: Site, ids: ir.Value, scales: ir.Value) -> None:
        head = Head(site.module, *self._head_shapes[site.module])
        dtype = site.y.dtype
        assert dtype is not None
        weight_name, bias_name, present_name = head_names(head.module)
        banked = FLOAT if edge_dtype(dtype.numpy().name) == "float32" else dtype
        weight = _input(graph, weight_name, banked, [SLOTS, head.d_out, head.d_in])
        bias = _input(graph, bias_name, banked, [SLOTS, head.d_out])
        present = _input(graph, present_name, FLOAT, [SLOTS])
        ops = Ops(f"sdct.{head.module}")
        output = head_body(ops, head, dtype, site.x, ids, scales, weight, bias, present, site.y)
        output.type, output.shape = site.y.type, site.y.shape
        self._splice(graph, [site.y], [output], ops.nodes)
        site.y = site.sum = output
        self.heads.append(head)

    def _splice(
        self, graph: ir.Graph, olds: Sequence[ir.Value], news: Sequence[ir.Value], nodes: Sequence[ir.Node]
    ) -> None:
        """Let users of `olds` outside `nodes` use `news`, which `nodes` compute; graph outputs keep their names."""
        inside = {inner for node in nodes for inner in _with_subgraphs(node)}
        for old, new in zip(olds, news, strict=True):
            for user, index in list(old.uses()):
                if user not in inside:
                    user.replace_input_with(index, new)
            for position, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[position] = new
                    old.name, new.name = new.name, old.name
            for site in self._sites:
                if site.x is old:  # a layer that reads this layer's output as it is
                    site.x = new
        graph.extend(nodes)  # `call` sorts the graph at its end


def _input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int | str | ir.SymbolicDim]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def _with_subgraphs(node: ir.Node) -> list[ir.Node]:
    nodes = [node]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            nodes += [inner for child in attribute.as_graph() for inner in _with_subgraphs(child)]
    return nodes
