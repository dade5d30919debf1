"""What an ONNX file with `MatMulNBits` stores, read with onnx and numpy alone, after the operator's documentation."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from sdct_export.adapter.entries import Array
from sdct_export.base.model import is_conv1d


@dataclasses.dataclass
class Stored:
    """float64: the weight `[N, K]` that a product sees, and the size of a step at each of its elements."""

    weight: Array
    scale: Array


def products(path: Path) -> dict[str, Stored]:
    """Module -> its stored weight; the module is told by the names of the initializers."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        assert node.domain == "com.microsoft"
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        bits, block, rows, columns = numbers["bits"], numbers["block_size"], numbers["N"], numbers["K"]
        packed, scales, zeros = (arrays[name] for name in node.input[1:4])
        blocks = -(-columns // block)
        assert packed.shape == (rows, blocks, block * bits // 8)
        weight, scale = np.zeros((rows, blocks * block)), np.zeros((rows, blocks * block))
        for b in range(blocks):
            for k in range(block):
                byte = packed[:, b, k * bits // 8].astype(int)
                zero = zeros[:, b * bits // 8].astype(int)
                q = byte if bits == 8 else (byte >> 4 * (k % 2)) & 15
                zero = zero if bits == 8 else (zero >> 4 * (b % 2)) & 15
                scale[:, b * block + k] = np.abs(scales[:, b].astype(np.float64))
                weight[:, b * block + k] = (q - zero) * scales[:, b].astype(np.float64)
        found[node.input[1].removesuffix(".weight.packed")] = Stored(weight[:, :columns], scale[:, :columns])
    return found


def with_stored_weights(model: nn.Module, file: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of `model` with the weights that the products in `file` see, a tied table as it was."""
    copied = copy.deepcopy(model).to(dtype).float()
    for name, stored in products(file).items():
        module = copied.get_submodule(name)
        weight = torch.from_numpy(stored.weight.astype(np.float32))
        module.weight = nn.Parameter(weight.T.contiguous() if is_conv1d(module) else weight)
    return copied


def rounded(x: Array, block: int) -> Array:
    """`x` as level 4 multiplies it: each block of each row in 127 steps up to its largest element; float64."""
    result = x.astype(np.float64).copy()
    for start in range(0, x.shape[-1], block):
        part = result[..., start : start + block]
        step = np.abs(part).max(-1, keepdims=True) / 127
        result[..., start : start + block] = np.rint(part / np.where(step > 0, step, 1)) * step
    return result
