"""The matrices that a graph's products see, as torch's `Linear` has them, however the file holds them.

A product is `y = x W^T (+ b)` by a constant `W [d_out, d_in]`: `MatMul`, `Gemm`, ONNX Runtime's `FusedMatMul` and
`MatMulNBits`. `W` may be an initializer or a constant, transposed, cast, and behind a `DequantizeLinear`. Of a
quantized one `W` is what the product sees, with the distance from it within which a number is rounded to it: half a
step, and one and a half where rounding met the end of the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ..adapter.entries import DTYPE_NAMES, Array
from ..errors import UnsupportedError

_MICROSOFT = "com.microsoft"
_TYPES = {
    ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}  # fmt: skip
# operators with weights that are not looked into; one of these where a layer is not found is why
OPAQUE = frozenset({
    "Attention", "Conv", "DynamicQuantizeMatMul", "FusedGemm", "FusedMatMulActivation", "GemmFloat8", "LSTM", "MoE",
    "MatMulBlockQuantizedFp8Weight", "MatMulBlockQuantizedNvFp4Weight", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger",
    "MatMulIntegerToFloat", "MultiHeadAttention", "QAttention", "QGemm", "QLinearMatMul", "QMoE",
    "SparseToDenseMatMul",
})  # fmt: skip
_DEEP = 8  # nodes between a weight and its product; a graph of a stranger may go in circles
# steps that a number may lie from the last code: who chooses scales for the least error (k_quant) clips up to 1.33
_CLIPPED = np.float32(1.5)
_SLACK = 2e-3  # of a step: quantizers divide, multiply and round in other orders


@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix `[d_out, d_in]` in the type `dtype`, quantized to `bits` bits where that is not None.

    `read(start, stop, columns)` gives rows and their first columns in float32, and how far a number may be from them
    that was rounded to them, None for not at all.
    """

    shape: tuple[int, int]
    dtype: str
    read: Callable[[int, int, int], tuple[Array, Array | None]]
    bits: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A node, the tensor `x [..., d_in]` it reads, `y [..., d_out]` it makes, and its weight.

    `rounded` is the length of the blocks of `x` that the node rounds to 8 bits before it multiplies, None where it
    does not.
    """

    node: ir.Node
    x: ir.Value
    y: ir.Value
    weight: Weight
    rounded: int | None = None

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.node.op_type} {self.node.name or self.y.name!r}"


def find_products(graph: ir.Graph) -> list[Product]:
    """All products of `graph` by constant matrices, in its order; those of branches and functions are not looked at.

    Raises:
        UnsupportedError: the parts of a quantized weight do not fit together.
    """
    found = []
    for node in graph:
        product = _product(node)
        if product is not None:
            found.append(product)
    return found


def opaque_operators(model: ir.Model) -> list[str]:
    """What the graph holds in which layers may lie that nobody looks into."""
    kinds = {node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type in OPAQUE}
    functions = {node.op_identifier() for node in model.graph} & model.functions.keys()
    branches = {n.op_type for n in model.graph if any(a.type == ir.AttributeType.GRAPH for a in n.attributes.values())}
    return sorted(kinds | branches | {f"the function {name}" for _, name, _ in functions})


def table(node: ir.Node) -> Weight | None:
    """The table `[rows, columns]` that `GatherBlockQuantized` looks numbers up in, None of any other node."""
    if (node.domain, node.op_type) != (_MICROSOFT, "GatherBlockQuantized"):
        return None
    numbers = _integers(node)
    data, _, scales, zeros = (_constant(value) for value in [*node.inputs, None, None, None, None][:4])
    block, bits = numbers.get("block_size", 128), numbers.get("bits", 4)
    plain = numbers.get("gather_axis", 0) == 0 and numbers.get("quantize_axis", 1) in (1, -1)
    if data is None or scales is None or data.ndim != 2 or data.dtype != np.uint8 or not plain or bits not in (4, 8):
        return None
    rows, columns = len(data), data.shape[1] * 8 // bits
    if scales.size != rows * -(-columns // block):
        return None
    codes = data.reshape(rows, -1)
    return _blocks(codes, scales, zeros, (rows, columns), block, bits, _name(scales))


def numbers_of(value: ir.Value | None) -> Array | None:
    """The floats of an initializer or a constant, None of anything else."""
    array = _constant(value)
    return None if array is None or _name(array) not in DTYPE_NAMES else array


def _product(node: ir.Node) -> Product | None:
    kind = (node.domain if node.domain != "ai.onnx" else "", node.op_type)
    if not node.outputs:
        return None
    if kind == (_MICROSOFT, "MatMulNBits"):
        return _nbits(node)
    if kind not in (("", "MatMul"), ("", "Gemm"), (_MICROSOFT, "FusedMatMul")) or len(node.inputs) < 2:
        return None
    x, right = node.inputs[0], node.inputs[1]
    if x is None or right is None:
        return None
    stored = _matrix(right)
    if stored is None:
        return None
    numbers = _integers(node)
    plain = numbers.get("transA", 0) == 0 and not any(numbers.get(f"transBatch{side}", 0) for side in "AB")
    if not plain or _float(node, "alpha") != 1.0 or _float(node, "beta") != 1.0:
        return None
    weight = stored if numbers.get("transB", 0) else _transposed(stored)
    return Product(node, x, node.outputs[0], _whole(weight))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A matrix as stored: numbers, or codes with scales and zeros of blocks `[rows, columns]` long."""

    numbers: Array
    dtype: str
    scales: Array | None = None  # [blocks of rows, blocks of columns]
    zeros: Array | None = None
    block: tuple[int, int] = (1, 1)
    ends: tuple[int, int] = (0, 0)


def _transposed(stored: _Stored) -> _Stored:
    def flip(array: Array | None) -> Array | None:
        return None if array is None else array.T

    numbers = flip(stored.numbers)
    assert numbers is not None
    return dataclasses.replace(
        stored, numbers=numbers, scales=flip(stored.scales), zeros=flip(stored.zeros), block=stored.block[::-1]
    )


def _whole(stored: _Stored) -> Weight:
    rows, width = stored.numbers.shape
    scales, zeros, ends = stored.scales, stored.zeros, stored.ends

    def read(start: int, stop: int, columns: int) -> tuple[Array, Array | None]:
        numbers = stored.numbers[start:stop, :columns].astype(np.float32)
        if scales is None:
            return numbers, None
        where = np.ix_(np.arange(start, stop) // stored.block[0], np.arange(columns) // stored.block[1])
        step = scales[where].astype(np.float32)
        zero = np.float32(0) if zeros is None else zeros[where].astype(np.float32)
        return _dequantized(numbers, step, zero, ends, _name(scales))

    bits = None if scales is None else int(np.ceil(np.log2(ends[1] - ends[0] + 1)))
    return Weight((rows, width), stored.dtype, read, bits)


def _dequantized(
    codes: Array, step: Array, zero: Array, ends: tuple[int, int], scale_type: str
) -> tuple[Array, Array]:
    """`(codes - zero) * step` and the distance within which a number is rounded to it."""
    # a scale of a 16-bit type was rounded after the codes were chosen
    wide = np.float32(2**-20 if scale_type == "float32" else 2**-7 if scale_type == "bfloat16" else 2**-10)
    reach = np.where((codes <= ends[0]) | (codes >= ends[1]), _CLIPPED, np.float32(0.5)) + np.float32(_SLACK)
    with np.errstate(over="ignore", invalid="ignore"):  # a stranger's numbers
        seen: Array = (codes - zero) * step
        return seen, reach * np.abs(step) + wide * np.abs(seen)


def _matrix(value: ir.Value, depth: int = 0) -> _Stored | None:
    """What a constant matrix is made of, None of what is no constant matrix."""
    array = _constant(value)
    if array is not None:
        name = _name(array)
        return _Stored(array, name) if array.ndim == 2 and name in DTYPE_NAMES else None
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return None
    if depth == _DEEP:
        return None
    if node.op_type == "DequantizeLinear":
        return _dequantize(node)
    if node.op_type not in ("Transpose", "Identity", "Cast"):
        return None
    stored = _matrix(node.inputs[0], depth + 1)
    if stored is None or node.op_type == "Identity":
        return stored
    if node.op_type == "Cast":
        to = _TYPES.get(ir.DataType(_integers(node).get("to", 0)))
        wider = to is not None and np.result_type(DTYPE_NAMES[to], DTYPE_NAMES[stored.dtype]) == DTYPE_NAMES[to]
        if to is None or (not wider and stored.scales is not None):
            return None
        numbers = stored.numbers if stored.scales is not None else stored.numbers.astype(DTYPE_NAMES[to])
        return dataclasses.replace(stored, numbers=numbers, dtype=to)
    turned = node.attributes.get("perm")
    return _transposed(stored) if turned is None or list(turned.as_ints()) == [1, 0] else stored


def _dequantize(node: ir.Node) -> _Stored | None:
    inputs = [*node.inputs, None, None]
    codes, scales, zeros = (_constant(value) for value in inputs[:3])
    if codes is None or codes.ndim != 2 or scales is None or _name(scales) not in DTYPE_NAMES:
        return None
    ends = _ends(_name(codes))
    if ends is None or (zeros is None and inputs[2] is not None):
        return None
    numbers = _integers(node)
    axis, length = numbers.get("axis", 1) % 2, numbers.get("block_size", 0)
    block = list(codes.shape)  # one for the whole
    if scales.size == 1:
        scales = scales.reshape(1, 1)
    elif length:
        block = [1, 1]
        block[axis] = length
    else:
        block[axis] = 1
        scales = scales.reshape((-1, 1) if axis == 0 else (1, -1))
    if zeros is not None and zeros.size == scales.size:
        zeros = zeros.reshape(scales.shape)
    wanted = tuple(-(-extent // part) for extent, part in zip(codes.shape, block, strict=True))
    if scales.shape != wanted or (zeros is not None and zeros.shape != wanted):
        _refuse(node, f"has scales {list(scales.shape)}, its weight {list(codes.shape)} needs {list(wanted)}")
    return _Stored(codes, _name(scales), scales, zeros, (block[0], block[1]), ends)


def _nbits(node: ir.Node) -> Product:
    """MatMulNBits: `W[n, k] = scale[n, b] (q[n, k] - zero[n, b])`, `b = k // block_size`."""
    inputs = [*node.inputs, *[None] * (6 - len(node.inputs))]
    numbers = _integers(node)
    width, rows = numbers.get("K", 0), numbers.get("N", 0)
    block, bits = numbers.get("block_size", 0), numbers.get("bits", 4)
    x, packed, scales = inputs[0], _constant(inputs[1]), _constant(inputs[2])
    zeros = None if inputs[3] is None else _constant(inputs[3])
    if inputs[4] is not None:
        _refuse(node, "orders its columns (g_idx), as GPTQ does")
    if bits not in (4, 8):
        _refuse(node, f"has weights of {bits} bits; 4 and 8 are known")
    if x is None or packed is None or scales is None or (zeros is None and inputs[3] is not None):
        _refuse(node, "has a weight that is no constant")
    assert x is not None
    assert packed is not None
    assert scales is not None
    if min(width, rows, block) < 1 or block % 8:
        _refuse(node, f"says K={width}, N={rows}, block_size={block}")
    blocks = -(-width // block)
    sizes = {"weight": (packed.size, rows * blocks * block * bits // 8), "scales": (scales.size, rows * blocks)}
    if zeros is not None:
        size = rows * (blocks if _name(zeros) in DTYPE_NAMES else -(-blocks * bits // 8))
        sizes["zero points"] = (zeros.size, size)
    for part, (got, want) in sizes.items():
        if got != want:
            _refuse(node, f"has {got} numbers as {part}, K={width}, N={rows} and block_size={block} need {want}")
    weight = _blocks(packed.reshape(rows, -1), scales, zeros, (rows, width), block, bits, _name(scales))
    return Product(node, x, node.outputs[0], weight, block if numbers.get("accuracy_level", 0) == 4 else None)


def _blocks(
    packed: Array, scales: Array, zeros: Array | None, shape: tuple[int, int], block: int, bits: int, dtype: str
) -> Weight:
    """uint8 `packed [d_out, bytes]`, of 4 bits the first of two in the low half; without `zeros` it is the middle."""
    rows, width = shape
    blocks = -(-width // block)
    scales = scales.reshape(rows, blocks)
    if zeros is not None and _name(zeros) not in DTYPE_NAMES:
        zeros = _unpacked(zeros.reshape(rows, -1), bits)[:, :blocks]
    elif zeros is not None:
        zeros = zeros.reshape(rows, blocks)

    def read(start: int, stop: int, columns: int) -> tuple[Array, Array | None]:
        few = -(-columns // block)
        codes = _unpacked(packed[start:stop, : few * block * bits // 8], bits)[:, :columns].astype(np.float32)
        step = np.repeat(scales[start:stop, :few].astype(np.float32), block, axis=1)[:, :columns]
        zero: Array = np.float32(1 << (bits - 1))
        if zeros is not None:
            zero = np.repeat(zeros[start:stop, :few].astype(np.float32), block, axis=1)[:, :columns]
        return _dequantized(codes, step, zero, (0, (1 << bits) - 1), dtype)

    return Weight(shape, dtype, read, bits)


def _unpacked(array: Array, bits: int) -> Array:
    """uint8 `[rows, n]` -> uint8 `[rows, n * 8 / bits]`."""
    if bits == 8:
        return array
    halves: Array = np.stack([array & 15, array >> 4], axis=-1).reshape(len(array), -1)
    return halves


def _constant(value: ir.Value | None, depth: int = 0) -> Array | None:
    """The numbers of an initializer or a `Constant`, reshaped or not; None of anything else.

    Of a file the memory is mapped, not read. An initializer that is also an input may be overridden, and is none.
    """
    if value is None:
        return None
    if value.is_initializer() and not value.is_graph_input():
        return None if value.const_value is None or not value.dtype else np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or depth == _DEEP:
        return None
    if node.op_type == "Constant" and "value" in node.attributes:
        return np.asarray(node.attributes["value"].as_tensor().numpy())
    if node.op_type == "Reshape" and len(node.inputs) > 1:
        source, shape = (_constant(inner, depth + 1) for inner in node.inputs[:2])
        if source is None or shape is None or shape.ndim != 1 or (shape < 1).any() or shape.prod() != source.size:
            return None
        return source.reshape([int(extent) for extent in shape])
    return None


def _ends(name: str) -> tuple[int, int] | None:
    """The smallest and the largest code of an integer type of up to 8 bits."""
    for bits in (4, 8):
        if name == f"uint{bits}":
            return 0, (1 << bits) - 1
        if name == f"int{bits}":
            return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return None


def _name(array: Array) -> str:
    return str(array.dtype.name)


def _integers(node: ir.Node) -> dict[str, int]:
    return {n: a.as_int() for n, a in node.attributes.items() if a.type == ir.AttributeType.INT}


def _float(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None or attribute.type != ir.AttributeType.FLOAT else attribute.as_float()


def _refuse(node: ir.Node, what: str) -> None:
    raise UnsupportedError(
        f"{node.op_type} {node.name!r} {what}; build the graph with weights in other blocks or types"
    )
