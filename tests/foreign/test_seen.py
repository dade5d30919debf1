"""Which tensors of a base a graph holds: as they are, with other numbers in them, or not at all."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from sdct_export.adapter.entries import Array
from sdct_export.foreign.seen import see


class Norms(nn.Module):
    def __init__(self, **tensors: Array) -> None:
        super().__init__()
        for name, array in tensors.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(array.copy())))


def graph_of(*arrays: Array) -> ir.Graph:
    values = []
    for i, array in enumerate(arrays):
        value = ir.Value(name=f"w{i}", const_value=ir.tensor(array, name=f"w{i}"))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.FLOAT
        values.append(value)
    return ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20}, name="test")


def near_one(seed: int, *shape: int) -> Array:
    return (1 + 1e-3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def test_a_tensor_with_other_numbers_in_it_is_told_from_one_that_is_not_there() -> None:
    norm, table = near_one(0, 40), near_one(1, 12, 7) - 1
    changed, row = norm.copy(), table.copy()
    changed[:3] += 0.5
    row[4] = 0
    found = see(graph_of(norm, table), Norms(norm=norm, table=table))
    assert (found.altered, found.uncompared) == ((), ())
    found = see(graph_of(changed, row), Norms(norm=norm, table=table))
    assert (found.altered, found.uncompared) == (("norm", "table"), ())
    found = see(graph_of(), Norms(norm=norm, table=table))
    assert (found.altered, found.uncompared) == ((), ("norm", "table"))


def test_a_tensor_that_is_not_there_is_not_taken_for_another_one_of_the_base() -> None:
    """All norms of a young model are near 1."""
    first, second = near_one(2, 40), near_one(3, 40)
    found = see(graph_of(first), Norms(first=first, second=second))
    assert (found.altered, found.uncompared) == ((), ("second",))
    found = see(graph_of(first), Norms(second=second, first=first))  # whichever comes first
    assert (found.altered, found.uncompared) == ((), ("second",))
