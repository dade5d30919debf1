"""The portable body of `SpectralDelta`: model-local functions in standard ONNX operators only.

`SpectralDelta` (one overload a signature) calls `Dct`, `Idct` and `DctPlace` (one overload a length), which alone hold
the transform matrices, so that a file stores each matrix once however many layers use it. ONNX Runtime inlines all
functions when it loads a model; in memory every node then has matrices of its own, small for being factorised
(about 4 MB a node for query and value projections 4096 x 4096). It stops at 1 GiB, which adapters on all layers of a
model beyond 8B can need; raise the session option `session.function_expansion_byte_limit` then, as `runtime` does.

**Transform.** With `v` = even samples of `x` rising, odd samples falling, `X[k] = s_k Re(e^{-i pi k / 2N} DFT(v)[k])`
and `X[N-k] = -s_k Im(...)` (Makhoul, IEEE Trans. ASSP 28, 1980). For `N = N1 N2`, `n = N2 n1 + n2`, `k = k1 + N1 k2`
the DFT is two matrix products, and because `v` is real only `k1 <= N1 / 2` are needed:

    A[k1, n2]  = sum_n1  e^{-2 pi i n1 k1 / N1} v[n1, n2]                    a [2 K1, N1] matrix, K1 = N1 // 2 + 1
    X[k1, ...] = sum_n2  Re/Im( s_k e^{-i pi k (4 n2 + 1) / 2N} A[k1, n2] )  K1 matrices [2 N2, 2 N2] with all phases

That is about `N (N1 + 2 N2)` multiplications instead of `N^2`; the inverse is the same two matrices transposed. The
spectrum stays in the order in which the second product leaves it; `DctPlace` maps a frequency to its place.

**Layout.** All is `[frequency, batch, tokens]`, so that a gathered or scattered coefficient is a run of `tokens`
contiguous numbers and a transform is few large products whatever the batch. The scatter is `ScatterElements`: ONNX
Runtime's CPU `ScatterND` with a reduction splits the updates between threads and loses additions to repeated rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..contract import DCT_OP_TYPE, DOMAIN, IDCT_OP_TYPE, OP_TYPE, OP_VERSION, PLACE_OP_TYPE, Group, Head

Floats = npt.NDArray[np.float64]
FLOAT, INT32, BOOL = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.BOOL
# multiplications a factorised transform must save to be worth its extra passes over memory, by measurement
# (benchmarks/function_body.py)
FACTOR_COST = 64


@dataclasses.dataclass(frozen=True)
class Factors:
    """Two-stage factorisation of the DCT of length `n1 * n2`; see the module's docstring.

    first `[2 K1, n1]`, second `[K1, 2 n2, 2 n2]`, order `[N]` (`v = x[order]`), place `[N]` (frequency -> row of the
    result).
    """

    first: Floats
    second: Floats
    order: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]


def factor_length(length: int) -> int:
    """The `N1` of the cheapest factorisation of `length`, or 1 where the dense matrix is as cheap."""
    costs = {n1: _cost(n1, length // n1) for n1 in range(2, length) if length % n1 == 0}
    best = min(costs, key=lambda n1: costs[n1], default=1)
    return best if best > 1 and costs[best] + FACTOR_COST < length else 1


def _cost(n1: int, n2: int) -> float:
    """Multiplications per element."""
    products = n1 // 2 + 1
    return 2 * products + products * 4 * n2 / n1


def factors(length: int, n1: int) -> Factors:
    """The factorisation `length = n1 * n2` in float64; phases are reduced in integers, so exact to one ulp."""
    n2, products = length // n1, n1 // 2 + 1
    angle = 2 * np.pi / n1 * (np.outer(np.arange(products), np.arange(n1)) % n1)
    first = np.stack([np.cos(angle), -np.sin(angle)], axis=1).reshape(2 * products, n1)
    second = np.zeros((products, 2, n2, 2, n2))  # [k1, (k, N - k), k2, (re, im), n2]
    place = np.zeros(length, dtype=np.int64)
    for k1 in range(products):
        k = k1 + n1 * np.arange(n2)
        phase = np.pi / (2 * length) * (np.outer(k, 4 * np.arange(n2) + 1) % (4 * length))
        scale = np.sqrt(np.where(k == 0, 1, 2) / length).reshape(n2, 1)
        cos, sin = scale * np.cos(phase), scale * np.sin(phase)
        second[k1, 0, :, 0], second[k1, 0, :, 1] = cos, sin
        place[k] = 2 * k1 * n2 + np.arange(n2)
        if 0 < 2 * k1 < n1:  # else N - k runs over the same frequencies again
            second[k1, 1, :, 0], second[k1, 1, :, 1] = sin, -cos
            place[length - k] = (2 * k1 + 1) * n2 + np.arange(n2)
    order = np.concatenate([np.arange(0, length, 2), np.arange(1, length, 2)[::-1]])
    return Factors(first, second.reshape(products, 2 * n2, 2 * n2), order, place)


def dct_matrix(length: int) -> Floats:
    """The orthonormal DCT-II matrix `C [length, length]`."""
    k = np.arange(length, dtype=np.int64)
    phase = np.pi / (2 * length) * (np.outer(k, 2 * k + 1) % (4 * length))
    matrix: Floats = np.cos(phase) * np.sqrt(2 / length)
    matrix[0] = np.sqrt(1 / length)
    return matrix


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
        """Append a node and return its output, or its outputs where there are more."""
        stem = f"{self.prefix}.{len(self.nodes)}.{op_type}"
        values = [ir.Value(name=stem if outputs == 1 else f"{stem}.{i}") for i in range(outputs)]
        node = ir.node(op_type, inputs, attributes, domain=domain, overload=overload, outputs=values, name=stem)
        self.nodes.append(node)
        return values[0] if outputs == 1 else values

    def const(self, array: Any, dtype: Any = np.int64) -> Any:
        """A constant."""
        return self("Constant", value=ir.tensor(np.array(array, dtype=dtype, order="C")))

    def shape(self, *parts: Any) -> Any:
        """A shape of integers and 1-D shape values, e.g. `shape(batch, -1, 384)`."""
        if all(isinstance(part, int) for part in parts):
            return self.const(parts)
        return self("Concat", *(self.const([p]) if isinstance(p, int) else p for p in parts), axis=0)

    def graph(self, *outputs: ir.Value) -> ir.Graph:
        """The nodes as a branch without inputs of its own."""
        return ir.Graph([], outputs, nodes=self.nodes, name=self.prefix)


def overload_of(group: Group, dtype: ir.DataType) -> str:
    """The overload of a group's signature, e.g. `float.384.384x700.384x700`."""
    parts = [f"{d}x{n}" for d, n in zip(group.d_out, group.capacity, strict=True)]
    return ".".join([dtype.name.lower(), str(group.d_in), *parts])


def functions_for(group: Group, dtype: ir.DataType, opset: int) -> list[ir.Function]:
    """`SpectralDelta` for the signature of `group`, and the functions of the lengths it uses."""
    functions = [_spectral_delta(group, dtype, opset), _dct(group.d_in, opset)]
    functions += [_idct(length, opset) for length in sorted(set(group.d_out))]
    functions += [_place(length, opset) for length in sorted({group.d_in, *group.d_out})]
    return functions


@lru_cache(maxsize=8)
def _factors(length: int) -> Factors | None:
    n1 = factor_length(length)
    return None if n1 == 1 else factors(length, n1)


def _spectrum_rows(length: int) -> int:
    found = _factors(length)
    return length if found is None else found.second.shape[0] * found.second.shape[1]


def _dct(length: int, opset: int) -> ir.Function:
    """`x [length, columns]` -> spectrum `[_spectrum_rows, columns]` in the order of `DctPlace`."""
    op, x = Ops("dct"), ir.Value(name="x")
    found = _factors(length)
    if found is None:
        out = op("MatMul", op.const(dct_matrix(length), np.float32), x)
    else:
        products, width, _ = found.second.shape
        out = op("Reshape", op("Gather", x, op.const(found.order), axis=0), op.shape(found.first.shape[1], -1))
        out = op("MatMul", op.const(found.first, np.float32), out)
        out = op("MatMul", op.const(found.second, np.float32), op("Reshape", out, op.shape(products, width, -1)))
        out = op("Reshape", out, op.shape(products * width, -1))
    return _function(DCT_OP_TYPE, str(length), [x], [out], op.nodes, opset)


def _idct(length: int, opset: int) -> ir.Function:
    """The inverse: spectrum `[_spectrum_rows, columns]` in the order of `DctPlace` -> `[length, columns]`."""
    op, x = Ops("idct"), ir.Value(name="x")
    found = _factors(length)
    if found is None:
        out = op("MatMul", op.const(dct_matrix(length).T, np.float32), x)
    else:
        products, width, _ = found.second.shape
        out = op("Reshape", x, op.shape(products, width, -1))
        out = op("MatMul", op.const(found.second.transpose(0, 2, 1), np.float32), out)
        out = op("MatMul", op.const(found.first.T, np.float32), op("Reshape", out, op.shape(2 * products, -1)))
        out = op("Gather", op("Reshape", out, op.shape(length, -1)), op.const(np.argsort(found.order)), axis=0)
    return _function(IDCT_OP_TYPE, str(length), [x], [out], op.nodes, opset)


def _place(length: int, opset: int) -> ir.Function:
    """int32 frequencies, any shape -> int32 rows of the spectrum."""
    op, x = Ops("place"), ir.Value(name="x")
    found = _factors(length)
    out = op("Identity", x) if found is None else op("Gather", op.const(found.place, np.int32), x, axis=0)
    return _function(PLACE_OP_TYPE, str(length), [x], [out], op.nodes, opset)


def _spectral_delta(group: Group, dtype: ir.DataType, opset: int) -> ir.Function:
    names = ["x", "adapter_ids", "adapter_scales", "values", "indices"]
    inputs = [ir.Value(name=name) for name in [*names, *(f"y_{j + 1}" for j in range(len(group.modules)))]]
    op, changed, base = Ops("delta"), Ops("changed"), Ops("base")
    x, ids, scales, values, indices, *ys = inputs
    any_active = op("Greater", op("ReduceMax", ids, keepdims=0), op.const(0, np.int32))
    outputs = op(
        "If",
        any_active,
        outputs=len(ys),
        then_branch=changed.graph(*_changed(changed, group, dtype, x, ids, scales, values, indices, ys)),
        else_branch=base.graph(*(base("Identity", y) for y in ys)),
    )
    outputs = outputs if isinstance(outputs, list) else [outputs]
    attributes = ("d_in", "d_out", "capacity")
    return _function(OP_TYPE, overload_of(group, dtype), inputs, outputs, op.nodes, opset, attributes)


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
    """The outputs of a batch in which some row has an adapter."""
    batch = op("Shape", ids, start=0, end=1)
    x3 = _as_float(op, op("Reshape", x, op.shape(batch, -1, group.d_in)), dtype)
    tokens = op("Shape", x3, start=1, end=2)
    columns = op("Reshape", op("Transpose", x3, perm=[2, 0, 1]), op.shape(group.d_in, -1))
    spectrum = op(DCT_OP_TYPE, columns, domain=DOMAIN, overload=str(group.d_in))
    spectrum = op("Reshape", spectrum, op.shape(-1, tokens))  # [frequency * batch, tokens]
    batch32, tokens32, size = op("Cast", batch, to=INT32), op("Cast", tokens, to=INT32), op("Mul", batch, tokens)
    zero, one = op.const(0, np.int32), op.const(1, np.int32)
    row_of_batch = op("Reshape", op("Range", zero, op("Squeeze", batch32), one), op.shape(-1, 1, 1))
    token = op("Range", zero, op("Squeeze", tokens32), one)
    value = op("Mul", op("Gather", values, ids, axis=0), op("Unsqueeze", scales, op.const([2])))  # [batch, k, n]
    index = op("Gather", indices, ids, axis=0)  # [batch, k, n, 2]
    row, col = op("Gather", index, op.const(0), axis=3), op("Gather", index, op.const(1), axis=3)
    active = op("Greater", op("ReduceMax", ids, op.const([1]), keepdims=1), zero)
    active = op("Unsqueeze", active, op.const([2]))

    def row_in(frequency: ir.Value, length: int) -> Any:
        """Row of a frequency in `[frequency * batch, tokens]`, for each entry of each batch row."""
        place = op(PLACE_OP_TYPE, frequency, domain=DOMAIN, overload=str(length))
        return op("Add", op("Mul", place, batch32), row_of_batch)

    def split(entries: ir.Value) -> Any:
        """`[batch, k, n]` -> `[batch, k, capacity_j]` of each projection."""
        if len(ys) == 1:
            return [entries]
        return op("Split", entries, op.const(group.capacity), outputs=len(ys), axis=2)

    source = row_in(col, group.d_in)
    if len(set(group.d_out)) == 1:
        targets = split(row_in(row, group.d_out[0]))
    else:
        targets = [row_in(own, d_out) for own, d_out in zip(split(row), group.d_out, strict=True)]
    outputs = []
    for y, d_out, own_value, own_source, target in zip(
        ys, group.d_out, split(value), split(source), targets, strict=True
    ):
        update = op("Mul", op("Gather", spectrum, own_source, axis=0), op("Unsqueeze", own_value, op.const([3])))
        element = op("Add", op("Unsqueeze", op("Mul", target, tokens32), op.const([3])), token)
        rows = _spectrum_rows(d_out)
        zeros = op("ConstantOfShape", op("Mul", size, op.const([rows])))
        flattened = op("Reshape", element, op.shape(-1)), op("Reshape", update, op.shape(-1))
        change = op("ScatterElements", zeros, *flattened, axis=0, reduction="add")
        change = op(IDCT_OP_TYPE, op("Reshape", change, op.shape(rows, -1)), domain=DOMAIN, overload=str(d_out))
        change = op("Transpose", op("Reshape", change, op.shape(d_out, batch, tokens)), perm=[1, 2, 0])
        y3 = op("Reshape", y, op.shape(batch, -1, d_out))
        total = _from_float(op, op("Add", _as_float(op, y3, dtype), change), dtype)
        outputs.append(op("Reshape", op("Where", active, total, y3), op("Shape", y)))
    return outputs


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
) -> Any:
    """Nodes of a banked head: `y' = (1 - sum_k s_k) y + sum_k s_k (W_k x + b_k)`; see `contract` for shapes.

    `sum_k s_k W_k` is formed per row first, so that `x` is multiplied once whatever the number of blended adapters.
    """
    strength = op("Mul", op("Gather", present, ids, axis=0), scales)  # [batch, k]
    active = op("ReduceMax", op("Abs", strength), op.const([1]), keepdims=1)  # [batch, 1]
    active = op("Greater", active, op.const(0, np.float32))
    any_active = op("Cast", op("ReduceMax", op("Cast", active, to=INT32), keepdims=0), to=BOOL)
    changed, base = Ops(f"{op.prefix}.changed"), Ops(f"{op.prefix}.base")
    return op(
        "If",
        any_active,
        then_branch=changed.graph(_head_changed(changed, head, dtype, x, ids, strength, active, weight, bias, y)),
        else_branch=base.graph(base("Identity", y)),
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
) -> Any:
    batch, blend = op("Shape", ids, start=0, end=1), op("Shape", ids, start=1, end=2)
    parts = op("Unsqueeze", strength, op.const([1]))  # [batch, 1, k]

    def rows_of(bank: ir.Value) -> Any:
        rows = op("Reshape", op("Gather", bank, ids, axis=0), op.shape(batch, blend, -1))
        return _as_float(op, rows, dtype if bank.dtype is None else bank.dtype)

    def mixed(rows: ir.Value, *shape: int) -> Any:
        return op("Reshape", op("MatMul", parts, rows), op.shape(batch, *shape))

    own_weight = op("Transpose", mixed(rows_of(weight), head.d_out, head.d_in), perm=[0, 2, 1])
    # labels an adapter lacks are marked by their bias; they count as 0 in the sum and are never picked at any scale
    lowest = float(ml_dtypes.finfo(dtype.numpy()).min) / 2
    biases = rows_of(bias)  # [batch, k, d_out]
    lacking = op("Less", biases, op.const(lowest / 2, np.float32))
    used = op("Not", op("Equal", op("Unsqueeze", strength, op.const([2])), op.const(0, np.float32)))  # [batch, k, 1]
    never = op("Cast", op("And", lacking, used), to=INT32)
    never = op("Cast", op("ReduceMax", never, op.const([1]), keepdims=1), to=BOOL)  # [batch, 1, d_out]
    biases = op("Where", lacking, op.const(0, np.float32), biases)
    x3 = _as_float(op, op("Reshape", x, op.shape(batch, -1, head.d_in)), dtype)
    own = op("Add", op("MatMul", x3, own_weight), mixed(biases, 1, head.d_out))
    y3 = op("Reshape", y, op.shape(batch, -1, head.d_out))
    rest = op("Sub", op.const(1, np.float32), op("ReduceSum", parts, op.const([2]), keepdims=1))  # [batch, 1, 1]
    total = op("Add", op("Mul", _as_float(op, y3, dtype), rest), own)
    total = _from_float(op, op("Where", never, op.const(lowest, np.float32), total), dtype)
    return op("Reshape", op("Where", op("Unsqueeze", active, op.const([2])), total, y3), op("Shape", y))


def _as_float(op: Ops, value: ir.Value, dtype: ir.DataType) -> Any:
    return value if dtype == FLOAT else op("Cast", value, to=FLOAT)


def _from_float(op: Ops, value: ir.Value, dtype: ir.DataType) -> Any:
    return value if dtype == FLOAT else op("Cast", value, to=dtype)


def _function(
    name: str,
    overload: str,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    opset: int,
    attributes: Sequence[str] = (),
) -> ir.Function:
    imports = {"": opset, DOMAIN: OP_VERSION}
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=imports, name=f"{name}.{overload}")
    declared = [ir.Attr(attribute, ir.AttributeType.UNDEFINED, None) for attribute in attributes]
    return ir.Function(DOMAIN, name, overload, graph=graph, attributes=declared)
