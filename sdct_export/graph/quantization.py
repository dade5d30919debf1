"""The pass that quantizes the base's linear layers, and what torch computes with weights so quantized.

**Operator.** A layer's product becomes one `MatMulNBits` of domain `com.microsoft`, which ONNX Runtime's CPU and CUDA
providers have for 4 and 8 bits (see `contract.Quantization` for its formula); its weights come from ONNX Runtime's own
quantizer, asymmetric. Others were not taken: `MatMulInteger` behind `DynamicQuantizeLinear` rounds all rows of a batch
by one scale, so a row's numbers would depend on its neighbours; `DequantizeLinear` before a float product is not
faster than the float product.

**Level.** At `accuracy_level` 4 the CPU provider multiplies whole numbers, with a scale for each block of each row of
`x`. At level 1 it has a kernel for 4 bits only, and widens 8-bit weights at every call.

Adapters need nothing of this: `SpectralDelta` adds to the product in float, and the order of the two passes is free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..adapter.entries import Array
from ..base.model import find_linear, is_conv1d, linear_shape, linear_weight, to_numpy
from ..contract import Quantization
from ..errors import UnsupportedError
from .match import SCOPES, scopes_of

DOMAIN, OP_TYPE = "com.microsoft", "MatMulNBits"
_QUANTIZED = (OP_TYPE, "DequantizeLinear", "MatMulInteger", "QLinearMatMul")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A quantized weight as `MatMulNBits` takes it, of `d_out` rows in `blocks` blocks each.

    packed uint8 `[d_out, blocks, block_size * bits / 8]`, of 4 bits the first of two in the low half; scales in the
    weight's own type `[d_out, blocks]`; zeros uint8 `[d_out, ceil(blocks * bits / 8)]`, packed likewise.
    """

    packed: Array
    scales: Array
    zeros: Array

    def dequantized(self, bits: int, d_in: int) -> Array:
        """The weight that a product with it sees, float32 `[d_out, d_in]`."""
        rows, blocks, _ = self.packed.shape
        q = _unpacked(self.packed, bits).reshape(rows, blocks, -1)
        zeros = _unpacked(self.zeros, bits)[:, :blocks, None]
        wide = (q.astype(np.float32) - zeros) * self.scales.astype(np.float32)[:, :, None]
        weight: Array = wide.reshape(rows, -1)[:, :d_in]
        return weight


def quantize(weight: Array, settings: Quantization) -> Blocks:
    """`weight [d_out, d_in]`, float32 or float16, by ONNX Runtime's quantizer; rows are padded to whole blocks."""
    with _without_logging():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    config = DefaultWeightOnlyQuantConfig(block_size=settings.block_size, is_symmetric=False, bits=settings.bits)
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight.T))
    rows = len(weight)  # older versions give scales and zeros flat
    return Blocks(packed, scales.reshape(rows, -1), zeros.reshape(rows, -1))


class QuantizeWeights(ir.passes.InPlacePass):
    """Puts `MatMulNBits` in the place of the products of linear layers; everything else stays as it is.

    A weight that is also read otherwise (the table of a tied embedding) stays for those, in float; one that several
    layers share is quantized once.

    Args:
        modules: paths of the layers. Those that the graph does not compute are passed over.
        settings: bits, block size and accuracy level.

    After the call `modules` are the layers that were quantized, in graph order.

    Raises:
        UnsupportedError: the graph is quantized already, or the product of a layer is none that can be.
    """

    def __init__(self, modules: Collection[str], settings: Quantization) -> None:
        super().__init__()
        self._wanted, self._settings = frozenset(modules), settings
        self._made: dict[tuple[ir.Value, bool], list[ir.Value]] = {}
        self.modules: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        graph = model.graph
        for node in graph:
            if node.op_type in _QUANTIZED:
                raise UnsupportedError(
                    f"the graph is quantized already (node {node.name!r}, {node.op_type}); quantize the float model"
                )
        for node in list(graph):
            scopes = scopes_of(node)
            if scopes and scopes[-1] in self._wanted and node.op_type in ("MatMul", "Gemm"):
                self._replace(graph, node, scopes[-1])
                if scopes[-1] not in self.modules:
                    self.modules.append(scopes[-1])
        for names in self._made:
            _drop(graph, names[0])
        if self.modules:
            graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=bool(self.modules))

    def ensures(self, model: ir.Model) -> None:
        """No layer computes a float product any more."""
        left = [n for n in model.graph if n.op_type in ("MatMul", "Gemm") and {*scopes_of(n)[-1:]} & self._wanted]
        assert not left

    def _replace(self, graph: ir.Graph, node: ir.Node, module: str) -> None:
        x, weight, *rest = node.inputs
        bias, y = rest[0] if rest else None, node.outputs[0]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        plain = attributes.get("transA", 0) == 0 and attributes.get("alpha", 1) == attributes.get("beta", 1) == 1
        transposed = bool(attributes.get("transB", 0))
        array = None if weight is None or not plain else _array(weight)
        if array is None or array.ndim != 2 or array.dtype not in (np.float32, np.float16):
            raise UnsupportedError(
                f"module {module!r}: its product ({node.op_type}) is by no float32 or float16 matrix that the graph "
                "holds, so it cannot be quantized; export without --quantize"
            )
        assert weight is not None
        if (weight, transposed) not in self._made:
            self._made[weight, transposed] = self._initializers(graph, module, array if transposed else array.T)
        d_out, d_in = array.shape if transposed else array.shape[::-1]
        settings, name = self._settings, node.name or module
        new = ir.Value(name=y.name)
        product = new if bias is None else ir.Value(name=f"{y.name}.product", type=y.type, shape=y.shape)
        attributes = {
            "K": d_in,
            "N": d_out,
            "bits": settings.bits,
            "block_size": settings.block_size,
            "accuracy_level": settings.accuracy_level,
        }
        inputs = [x, *self._made[weight, transposed]]
        nodes = [ir.node(OP_TYPE, inputs, attributes, domain=DOMAIN, outputs=[product], name=name)]
        if bias is not None:
            nodes.append(ir.node("Add", [product, bias], outputs=[new], name=f"{name}.bias"))
        for made in nodes:
            made.metadata_props[SCOPES] = node.metadata_props[SCOPES]
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [y], [new])

    def _initializers(self, graph: ir.Graph, module: str, weight: Array) -> list[ir.Value]:
        blocks = quantize(weight, self._settings)
        values = []
        for part, array in vars(blocks).items():
            value = ir.val(f"{module}.weight.{part}", const_value=ir.tensor(array, name=f"{module}.weight.{part}"))
            graph.register_initializer(value)
            values.append(value)
        return values


def linear_layers(model: nn.Module, heads: Collection[str], task: str) -> list[str]:
    """Paths of the linear layers of `model` to quantize: all but its heads.

    Heads are what adapters save in full, and the layers behind the transformer itself (a classifier), which are small
    and decide most. A language model's output layer, as large as its vocabulary, is none.
    """
    prefix = getattr(model, "base_model_prefix", "")
    inside = prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""
    output = getattr(model, "get_output_embeddings", lambda: None)() if task == "CAUSAL_LM" else None
    return [
        path
        for path, module in model.named_modules()
        if linear_shape(module) is not None
        and path not in heads
        and (not inside or path.startswith(f"{inside}.") or module is output)
    ]


def quantize_model(model: nn.Module, settings: Quantization, dtype: str) -> None:
    """Give the layers `settings.modules` of `model`, in place, the weights that the graph's products see, in float32.

    Args:
        model: float32, its numbers those of the exported weights.
        settings: see `contract.Quantization`.
        dtype: of the exported weights and so of the scales.
    """
    for path in settings.modules:
        module = find_linear(model, path)
        weight = to_numpy(linear_weight(module).detach()).astype(dtype)
        wide = quantize(weight, settings).dequantized(settings.bits, weight.shape[1])
        tensor = torch.from_numpy(np.ascontiguousarray(wide.T if is_conv1d(module) else wide))
        module.weight = nn.Parameter(tensor, requires_grad=False)  # a tied table keeps its own


@contextlib.contextmanager
def rounded_inputs(model: nn.Module, settings: Quantization) -> Iterator[None]:
    """Inside the block the layers `settings.modules` round what they multiply as ONNX Runtime does at level 4.

    Each block of a row is divided by its largest element's size over 127 and rounded. Hooks see the input as it was.
    """
    layers = [find_linear(model, path) for path in settings.modules] if settings.accuracy_level == 4 else []
    with rounding_layers(dict.fromkeys(layers, settings.block_size)):
        yield


@contextlib.contextmanager
def rounding_layers(blocks: Mapping[nn.Module, int]) -> Iterator[None]:
    """Inside the block each layer rounds what it multiplies, in blocks of so many numbers; see `rounded_inputs`."""
    for layer, block_size in blocks.items():
        layer.forward = _rounding(layer, block_size)
    try:
        yield
    finally:
        for layer in blocks:
            del layer.forward


@dataclasses.dataclass(frozen=True)
class QuantizedLayers:
    """`quantize_model` and `rounded_inputs` of one bundle; `foreign.Seen` does the same for another tool's graph."""

    settings: Quantization

    def apply(self, model: nn.Module, dtype: str) -> None:
        """See `quantize_model`."""
        quantize_model(model, self.settings, dtype)

    def rounding(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """See `rounded_inputs`."""
        return rounded_inputs(model, self.settings)


def _rounding(layer: nn.Module, block_size: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        width = x.shape[-1]
        padded = nn.functional.pad(x, (0, -width % block_size))
        padded = padded.reshape(*padded.shape[:-1], -1, block_size)
        scale = padded.abs().amax(-1, keepdim=True) / 127
        rounded = torch.where(scale > 0, (padded / scale).round() * scale, 0.0)
        result: Tensor = type(layer).forward(layer, rounded.flatten(-2)[..., :width])
        return result

    return forward


def _unpacked(array: Array, bits: int) -> Array:
    """uint8 `[..., n]` -> uint8 `[..., n * 8 / bits]`."""
    if bits == 8:
        return array
    halves: Array = np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:-1], -1)
    return halves


def _array(weight: ir.Value) -> Array | None:
    """The numbers of an initializer or its transpose, None of anything else."""
    if weight.const_value is not None:
        array: Array = weight.const_value.numpy()
        return array
    producer = weight.producer()
    if producer is None or producer.op_type != "Transpose" or producer.inputs[0] is None:
        return None
    source = _array(producer.inputs[0])
    return None if source is None or source.ndim != 2 else source.T


def _drop(graph: ir.Graph, weight: ir.Value) -> None:
    """Remove what computes or holds `weight`, where nothing reads it any more."""
    if weight.uses() or weight.is_graph_output():
        return
    producer = weight.producer()
    if producer is None:
        if weight.is_initializer():
            assert weight.name is not None
            del graph.initializers[weight.name]
        return
    sources = [value for value in producer.inputs if value is not None]
    graph.remove(producer, safe=True)
    for source in sources:
        _drop(graph, source)


@contextlib.contextmanager
def _without_logging() -> Iterator[None]:
    """ONNX Runtime's quantizer sets the whole process's logging up when it is imported; not inside this block."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)  # with one at hand `logging.basicConfig` does nothing
    try:
        yield
    finally:
        root.removeHandler(handler)
