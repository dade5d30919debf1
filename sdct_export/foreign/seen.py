"""The base as a graph's products see it: its weights as they are stored there, for torch to compute with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ..adapter.entries import Array
from ..base.model import find_linear, is_conv1d, linear_shape, linear_weight, to_numpy
from ..graph.quantization import rounding_layers
from .match import Match, match_weights, same_numbers
from .weights import find_products, numbers_of, table


@dataclasses.dataclass(frozen=True)
class Seen:
    """What `see` found.

    `match` has the linear layers. `tables` are embeddings that the graph holds quantized, parameter -> float32.
    `altered` are the base's tensors that the graph holds with other numbers in them: of one shape, half of them equal.
    `uncompared` are those that were found nowhere: the tool may have folded them into others.
    """

    match: Match
    tables: Mapping[str, Array]
    altered: tuple[str, ...]
    uncompared: tuple[str, ...]

    def apply(self, model: nn.Module, dtype: str) -> None:
        """Give `model` (float32) in place the weights that the graph computes with in `dtype`, exact in float32."""
        model.to(getattr(torch, dtype)).float()
        for module in self.match.pieces:
            layer, seen = find_linear(model, module), self.match.seen(module)
            if not np.array_equal(seen, to_numpy(linear_weight(layer))):
                layer.weight = _parameter(seen.T if is_conv1d(layer) else seen)  # a tied table keeps its own
        for name, array in self.tables.items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, _parameter(array))

    @contextlib.contextmanager
    def rounding(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the layers round what they multiply as their products do."""
        blocks = {m: pieces[0].product.rounded for m, pieces in self.match.pieces.items()}
        with rounding_layers({find_linear(model, m): block for m, block in blocks.items() if block is not None}):
            yield


def see(graph: ir.Graph, model: nn.Module) -> Seen:
    """Compare all weights of `model` with those of `graph`."""
    linear = {path: module for path, module in model.named_modules() if linear_shape(module) is not None}
    match = match_weights(
        find_products(graph), {path: to_numpy(linear_weight(module)) for path, module in linear.items()}
    )
    known = {f"{path}.weight" for path in match.pieces}
    arrays = _Arrays(graph)
    tables: dict[str, Array] = {}
    lacking: dict[str, Array] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in known or not tensor.is_floating_point() or not tensor.numel():
            continue
        array = to_numpy(tensor)
        if arrays.has(array):
            continue
        found = arrays.table(array)
        if found is not None:
            tables[name] = found
        else:
            lacking[name] = array
    altered = [name for name, array in lacking.items() if arrays.resembles(array)]
    return Seen(match, tables, tuple(altered), tuple(name for name in lacking if name not in altered))


class _Arrays:
    """What a graph holds beside the matrices of its products."""

    def __init__(self, graph: ir.Graph) -> None:
        constants = [node.outputs[0] for node in graph if node.op_type == "Constant"]
        values = [*graph.initializers.values(), *constants]
        self._by_rank: dict[int, list[Array]] = {}
        for value in values:
            array = numbers_of(value)
            if array is not None:
                self._by_rank.setdefault(array.ndim, []).append(array)
        self._known: set[int] = set()  # those that `has` found to be one of the base's
        self._tables = [found for node in graph if (found := table(node)) is not None]

    def has(self, wanted: Array) -> bool:
        """Whether the numbers of `wanted` are here: as they are, transposed, among others of one dimension, plus 1."""
        if wanted.ndim == 1:
            plain = wanted.astype(np.float32)
            ways = ((own, array) for own in (wanted, plain + 1) for array in self._by_rank.get(1, ()))
            found = next((array for own, array in ways if _contains(array, own)), None)
            if found is not None and found.shape == wanted.shape:
                self._known.add(id(found))
            return found is not None
        turned = wanted.T if wanted.ndim == 2 else wanted
        for array in self._by_rank.get(wanted.ndim, ()):
            for own in (wanted, turned):
                first = (0,) * (own.ndim - 1)
                if own.shape == array.shape and same_numbers(own[first], array[first]) and same_numbers(own, array):
                    self._known.add(id(array))
                    return True
        return False

    def table(self, wanted: Array) -> Array | None:
        """The quantized table of `wanted`, float32; None where there is none."""
        for found in self._tables:
            if found.shape == wanted.shape:
                seen, reach = found.read(0, *found.shape)
                assert reach is not None
                if (np.abs(wanted.astype(np.float32) - seen) <= reach).all():
                    self._known.add(id(found))
                    return seen
        return None

    def resembles(self, wanted: Array) -> bool:
        """Whether something here of the shape of `wanted`, no other tensor of the base's, has half of its numbers."""
        wide = wanted.astype(np.float32)
        for array in self._by_rank.get(wanted.ndim, ()):
            if id(array) in self._known:
                continue
            for own in (wide, wide.T) if wanted.ndim == 2 else (wide, wide + 1):
                if own.shape == array.shape and _near(array, own).mean() >= 0.5:
                    return True
        for found in self._tables:
            if found.shape == wanted.shape and id(found) not in self._known:
                seen, reach = found.read(0, *found.shape)
                assert reach is not None
                if (np.abs(wide - seen) <= reach).mean() >= 0.5:
                    return True
        return False


def _contains(array: Array, wanted: Array) -> bool:
    """Whether `wanted [n]` lies in `array [m]` in one piece."""
    for start in np.flatnonzero(_near(array, wanted[0])):
        part = array[start : start + len(wanted)]
        if len(part) == len(wanted) and same_numbers(wanted, part):
            return True
    return False


def _near(array: Array, wanted: Array | np.generic) -> Array:
    """Where `array` may have the number (or numbers) `wanted`, rounded to any type."""
    wide, value = array.astype(np.float32), np.asarray(wanted, np.float32)
    near: Array = np.abs(wide - value) <= 2**-6 * np.abs(value)
    return near


def _parameter(array: Array) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.ascontiguousarray(array)), requires_grad=False)
