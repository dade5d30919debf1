"""The portable body of `SpectralDelta`: a model-local function in standard ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..contract import DCT_OP_TYPE, DOMAIN, IDCT_OP_TYPE, OP_TYPE, OP_VERSION, Group, Head

Array = npt.NDArray[Any]
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class Ops:
    """Builds nodes one after another, each value under a name of its own below `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value,
        outputs: int = 1,
        domain: str = "",
        overload: str = "",
        **attributes: Any,
    ) -> Any:
        stem = f"{self.prefix}.{len(self.nodes)}.{op_type}"
        values = [ir.Value(name=stem if outputs == 1 else f"{stem}.{i}") for i in range(outputs)]
        node = ir.node(op_type, inputs, attributes, domain=domain, overload=overload, outputs=values, name=stem)
        self.nodes.append(node)
        return values[0] if outputs == 1 else values

    def const(self, array: Any, dtype: Any = np.int64) -> ir.Value:
        return self("Constant", value=ir.tensor(np.asarray(array, dtype=dtype)))  # type: ignore[no-any-return]

    def graph(self, outputs: Sequence[ir.Value]) -> ir.Graph:
        return ir.Graph([], outputs, nodes=self.nodes, name=self.prefix)


def overload_of(group: Group, dtype: ir.DataType) -> str:
    """The overload of a group's signature, e.g. `float32.384.384x700.384x700`."""
    parts = [f"{d}x{n}" for d, n in zip(group.d_out, group.capacity, strict=True)]
    return ".".join([dtype.name.lower(), str(group.d_in), *parts])


def functions_for(group: Group, dtype: ir.DataType, opset: int) -> list[ir.Function]:
    """`SpectralDelta` for the signature of `group` and the transforms it calls."""
    lengths = sorted({group.d_in, *group.d_out})
    return [
        _spectral_delta(group, dtype, opset),
        _transform(group.d_in, opset, inverse=False),
        *(_transform(length, opset, inverse=True) for length in lengths if length in group.d_out),
    ]


def _dct_matrix(length: int) -> npt.NDArray[np.float64]:
    k = np.arange(length, dtype=np.int64)
    phase = ((2 * k[None, :] + 1) * k[:, None]) % (4 * length)
    matrix = np.cos(phase * (np.pi / (2 * length))) * np.sqrt(2 / length)
    matrix[0] = np.sqrt(1 / length)
    return matrix


def _transform(length: int, opset: int, *, inverse: bool) -> ir.Function:
    op = Ops("t")
    x = ir.Value(name="x")
    matrix = _dct_matrix(length)
    out = op("MatMul", op.const(matrix.T if inverse else matrix, np.float32), x)
    return _function(IDCT_OP_TYPE if inverse else DCT_OP_TYPE, str(length), [x], [out], op.nodes, opset)


def _spectral_delta(group: Group, dtype: ir.DataType, opset: int) -> ir.Function:
    names = ["x", "adapter_ids", "adapter_scales", "values", "indices"]
    inputs = [ir.Value(name=name) for name in [*names, *(f"y_{j + 1}" for j in range(len(group.modules)))]]
    x, ids, scales, values, indices, *ys = inputs
    op = Ops("f")
    any_active = op("Greater", op("ReduceMax", ids, keepdims=0), op.const(0, np.int32))
    base = Ops("base")
    same = [base("Identity", y) for y in ys]
    delta = Ops("delta")
    changed = _changed(delta, group, dtype, x, ids, scales, values, indices, ys)
    outputs = op(
        "If",
        any_active,
        outputs=len(ys),
        then_branch=delta.graph(changed),
        else_branch=base.graph(same),
    )
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return _function(
        OP_TYPE, overload_of(group, dtype), inputs, outputs, op.nodes, opset, ("d_in", "d_out", "capacity")
    )


def _changed(
    op: Ops,
    group: Group,
    dtype: ir.DataType,
    x: ir.Value,
    ids: ir.Value,
    scales: ir.Value,
    values: ir.Value,
    indices: ir.Value,
    ys: Sequence[ir.Value],
) -> list[ir.Value]:
    batch = op("Shape", ids, start=0, end=1)
    spectrum = op("Reshape", x, op("Concat", batch, op.const([-1, group.d_in]), axis=0))
    if dtype != FLOAT:
        spectrum = op("Cast", spectrum, to=FLOAT)
    spectrum = op("Transpose", spectrum, perm=[0, 2, 1])
    tokens = op("Shape", spectrum, start=2, end=3)
    spectrum = op(DCT_OP_TYPE, spectrum, domain=DOMAIN, overload=str(group.d_in))
    zero = op.const(0, np.int32)
    active = op("Greater", op("ReduceMax", ids, op.const([1]), keepdims=1), zero)
    active = op("Unsqueeze", active, op.const([2]))
    row_values = op("Mul", op("Gather", values, ids, axis=0), op("Unsqueeze", scales, op.const([2])))
    row_indices = op("Cast", op("Gather", indices, ids, axis=0), to=INT64)
    flat = op("Concat", batch, op.const([-1, 1]), axis=0)
    outputs = []
    offset = 0
    for y, d_out, capacity in zip(ys, group.d_out, group.capacity, strict=True):
        start, end = op.const([offset]), op.const([offset + capacity])
        offset += capacity
        value = op("Reshape", op("Slice", row_values, start, end, op.const([2])), flat)
        index = op("Slice", row_indices, start, end, op.const([2]))
        row, col = op("Split", index, outputs=2, axis=3, num_outputs=2)
        row, col = op("Reshape", row, flat), op("Reshape", col, flat)
        picked = op("Mul", op("GatherND", spectrum, col, batch_dims=1), value)
        zeros = op("ConstantOfShape", op("Concat", batch, op.const([d_out]), tokens, axis=0))
        where = op("Expand", row, op("Shape", picked))
        scattered = op("ScatterElements", zeros, where, picked, axis=1, reduction="add")
        change = op(IDCT_OP_TYPE, scattered, domain=DOMAIN, overload=str(d_out))
        change = op("Transpose", change, perm=[0, 2, 1])
        y3 = op("Reshape", y, op("Concat", batch, op.const([-1, d_out]), axis=0))
        if dtype == FLOAT:
            total = op("Add", y3, change)
        else:
            total = op("Cast", op("Add", op("Cast", y3, to=FLOAT), change), to=dtype)
        outputs.append(op("Reshape", op("Where", active, total, y3), op("Shape", y)))
    return outputs


def _function(
    name: str,
    overload: str,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    opset: int,
    attributes: Sequence[str] = (),
) -> ir.Function:
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, opset_imports={"": opset, DOMAIN: OP_VERSION}, name=f"{name}.{overload}"
    )
    declared = [ir.Attr(a, ir.AttributeType.UNDEFINED, None) for a in attributes]
    return ir.Function(DOMAIN, name, overload, graph=graph, attributes=declared)


def head_body(
    op: Ops,
    head: Head,
    dtype: ir.DataType,
    x: ir.Value,
    ids: ir.Value,
    scales: ir.Value,
    weight: ir.Value,
    bias: ir.Value,
    present: ir.Value,
    y: ir.Value,
) -> ir.Value:
    """Nodes of a banked head: `y' = (1 - sum_k s_k) y + sum_k s_k (W_k x + b_k)`; see `contract` for shapes.

    `sum_k s_k W_k` is formed per row first, so that `x` is multiplied once whatever the number of blended adapters.
    """
    strength = op("Mul", op("Gather", present, ids, axis=0), scales)  # [batch, k]
    active = op("ReduceMax", op("Abs", strength), op.const([1]), keepdims=1)
    active = op("Greater", active, op.const(0, np.float32))  # [batch, 1]
    base, own = Ops(f"{op.prefix}.base"), Ops(f"{op.prefix}.own")
    changed = _head_changed(own, head, dtype, x, ids, strength, active, weight, bias, y)
    any_active = op("ReduceMax", op("Cast", active, to=ir.DataType.INT32), keepdims=0)
    return op(  # type: ignore[no-any-return]
        "If",
        op("Cast", any_active, to=ir.DataType.BOOL),
        then_branch=own.graph([changed]),
        else_branch=base.graph([base("Identity", y)]),
    )


def _head_changed(
    op: Ops,
    head: Head,
    dtype: ir.DataType,
    x: ir.Value,
    ids: ir.Value,
    strength: ir.Value,
    active: ir.Value,
    weight: ir.Value,
    bias: ir.Value,
    y: ir.Value,
) -> ir.Value:
    def single(value: ir.Value) -> ir.Value:
        return value if dtype == FLOAT else op("Cast", value, to=FLOAT)  # type: ignore[no-any-return]

    batch = op("Shape", ids, start=0, end=1)
    blend = op("Shape", ids, start=1, end=2)
    parts = op("Unsqueeze", strength, op.const([1]))  # [batch, 1, k]

    def mixed(bank: ir.Value, shape: Sequence[int]) -> ir.Value:
        rows = op(
            "Reshape", single(op("Gather", bank, ids, axis=0)), op("Concat", batch, blend, op.const([-1]), axis=0)
        )
        return op("Reshape", op("MatMul", parts, rows), op("Concat", batch, op.const(shape), axis=0))  # type: ignore[no-any-return]

    own_weight = op("Transpose", mixed(weight, [head.d_out, head.d_in]), perm=[0, 2, 1])
    own_bias = mixed(bias, [1, head.d_out])
    x3 = single(op("Reshape", x, op("Concat", batch, op.const([-1, head.d_in]), axis=0)))
    y3 = op("Reshape", y, op("Concat", batch, op.const([-1, head.d_out]), axis=0))
    rest = op("Sub", op.const(1, np.float32), op("ReduceSum", strength, op.const([1]), keepdims=1))
    own = op("Add", op("MatMul", x3, own_weight), own_bias)
    total = op("Add", op("Mul", single(y3), op("Unsqueeze", rest, op.const([2]))), own)
    if dtype != FLOAT:
        total = op("Cast", total, to=dtype)
    return op("Reshape", op("Where", op("Unsqueeze", active, op.const([2])), total, y3), op("Shape", y))  # type: ignore[no-any-return]
