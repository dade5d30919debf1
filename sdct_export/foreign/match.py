"""Which rows of which product are which layer of the base, by their numbers alone.

A layer's weight is the rows of one product, some of the rows of a larger one (packed query, key and value), or lies in
several products (Phi-3's `gate_up_proj`, split by ONNX Runtime GenAI). So runs of equal rows are looked for: where the
first row of a layer occurs, how many rows on the two agree, and so on with the row behind the run. A float weight must
have the base's numbers, as they are or rounded to a 16-bit type on the way; in a quantized one every number must be
the one that the base's is rounded to. Where a row occurs is found by its first numbers, all layers and products at
once in a few matrix products; only what these leave is compared whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..adapter.entries import DTYPE_NAMES, Array
from .weights import Product

_LEADING = 64  # numbers of a row that are compared first
_MOST_PLACES = 64  # of one row; more are no place at all
_MOST_PIECES = 8
_CHUNK = 512  # rows compared at once
_WAYS = ("", "float16", "bfloat16")  # straight, or rounded to one of these on the way
_COARSE = 0.3  # of a weight's size (root of the sum of squares) quantization may change


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows `start ... stop` of a layer's weight are the rows from `first` on of `product`'s."""

    product: Product
    first: int
    start: int
    stop: int

    @property
    def last(self) -> int:
        """The row behind the last one in the product."""
        return self.first + self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Match:
    """The pieces of each layer that was found, and why the others were not."""

    pieces: Mapping[str, tuple[Piece, ...]]
    missing: Mapping[str, str]

    def seen(self, module: str) -> Array:
        """The weight of `module` that the graph's products see, float32 `[d_out, d_in]`."""
        parts = [p.product.weight.read(p.first, p.last, p.product.weight.shape[1])[0] for p in self.pieces[module]]
        return np.concatenate(parts)


def match_weights(products: Sequence[Product], weights: Mapping[str, Array]) -> Match:
    """Find each of `weights` (module path -> float `[d_out, d_in]`) in the products of a graph.

    A layer that occurs twice, or has the same weight as another one, is none that was found.
    """
    pieces: dict[str, tuple[Piece, ...]] = {}
    missing: dict[str, str] = {}
    for width in sorted({weight.shape[1] for weight in weights.values()}):
        these = [product for product in products if product.weight.shape[1] == width]
        finder = _Finder(these, {n: w for n, w in weights.items() if w.shape[1] == width})
        for module in finder.weights:
            found = finder.find(module)
            if isinstance(found, str):
                missing[module] = found
            else:
                pieces[module] = found
    for module, other in _shared(pieces):
        missing[module] = f"the graph has one weight for it and {other!r}, which are equal, and may compute either"
    return Match({m: p for m, p in pieces.items() if m not in missing}, missing)


def same_numbers(wanted: Array, found: Array) -> bool:
    """Whether two arrays of one shape are equal, `wanted` perhaps rounded to `found`'s type, or on the way to it."""
    ways = (rounded(wanted, found.dtype.name, way) for way in _WAYS)
    return any(other is not None and np.array_equal(other, found) for other in ways)


def rounded(weight: Array, dtype: str, way: str) -> Array | None:
    """`weight` in the type `dtype`, by way of the type `way` where that is one; None where it is no narrower one."""
    if way and (way == dtype or DTYPE_NAMES[way].itemsize > DTYPE_NAMES[dtype].itemsize):
        return None
    with np.errstate(over="ignore"):
        return weight.astype(DTYPE_NAMES[way or dtype]).astype(DTYPE_NAMES[dtype])


class _Finder:
    """Layers and products with one `d_in`; the leading numbers of all products' rows side by side."""

    def __init__(self, products: Sequence[Product], weights: Mapping[str, Array]) -> None:
        self.weights = weights
        self._products = products
        self._leading: list[tuple[Array, Array | None]] = []
        for product in products:
            rows, width = product.weight.shape
            self._leading.append(product.weight.read(0, rows, min(width, _LEADING)))
        self._near = dict.fromkeys(weights, np.inf)
        self._first = self._places({m: weight[0] for m, weight in weights.items()})

    def find(self, module: str) -> tuple[Piece, ...] | str:
        """The pieces of `module`, or why it was not found."""
        weight = self.weights[module]
        pieces: list[Piece] = []
        self._coarse = False
        start, places = 0, self._first[module]
        ways: tuple[str, ...] = _WAYS
        while start < len(weight):
            runs = [(self._run(weight, start, *place, way), way, place) for place in places for way in ways]
            longest = max((length for length, *_ in runs), default=0)
            if longest == 0:
                return self._why(module, pieces, start)
            best = {place: way for length, way, place in runs if length == longest}
            if len(best) > 1:
                listed = ", ".join(product.label for product, _ in list(best)[:3])
                return (
                    f"the graph has its weight {len(best)} times ({listed}): it is called more than once, or other "
                    "layers have equal weights"
                )
            (((product, first), way),) = best.items()
            ways = (way,)  # all of a layer went the same
            pieces.append(Piece(product, first, start, start + longest))
            start += longest
            if start < len(weight):
                if len(pieces) == _MOST_PIECES:
                    return f"its rows lie in more than {_MOST_PIECES} pieces, in an order of the tool's own"
                places = self._places({module: weight[start]})[module]
        return tuple(pieces)

    def _places(self, rows: Mapping[str, Array]) -> dict[str, list[tuple[Product, int]]]:
        """Module -> products and their rows that begin as its row does; all modules in one matrix product each."""
        places: dict[str, list[tuple[Product, int]]] = {module: [] for module in rows}
        made: dict[str, list[tuple[str, Array]]] = {}
        for product, (leading, reach) in zip(self._products, self._leading, strict=True):
            columns, kind = leading.shape[1], product.weight.dtype if reach is None else "codes"
            if kind not in made:
                made[kind] = [
                    (module, changed)
                    for module, row in rows.items()
                    for way in _WAYS
                    if (changed := _changed(row[None, :columns], way, product)) is not None
                ]
            ways = made[kind]
            heads = np.concatenate([changed for _, changed in ways])
            with np.errstate(over="ignore", invalid="ignore"):  # a stranger's numbers
                sizes = (leading**2).sum(1)[:, None] + (heads**2).sum(1)
                distances = sizes - 2 * leading @ heads.T
                slack = 1e-4 * sizes + (0 if reach is None else (reach**2).sum(1)[:, None])
                for (module, _), near, own in zip(ways, distances.T, sizes.T, strict=True):
                    nearest = float(np.nanmin(near / np.maximum(own, 1e-30), initial=np.inf))
                    self._near[module] = min(self._near[module], max(nearest, 0.0) ** 0.5)
                candidates = np.argwhere(distances.T <= slack.T)
            for number, row in candidates:
                module, changed = ways[number]
                place = (product, int(row))
                if place in places[module] or len(places[module]) >= _MOST_PLACES:
                    continue
                bound = None if reach is None else reach[row]
                if _agree(changed[0], leading[row], bound).all():
                    places[module].append(place)
        return places

    def _run(self, weight: Array, start: int, product: Product, first: int, way: str) -> int:
        """Rows from `start` of `weight` and `first` of the product on that agree."""
        most = min(len(weight) - start, product.weight.shape[0] - first)
        for done in range(0, most, _CHUNK):
            stop = min(done + _CHUNK, most)
            changed = _changed(weight[start + done : start + stop], way, product)
            if changed is None:
                return 0
            seen, reach = product.weight.read(first + done, first + stop, weight.shape[1])
            good = _agree(changed, seen, reach).all(1)
            if not good.all():
                return done + int(good.argmin())
            if reach is not None and _is_coarse(changed, seen):
                self._coarse = True
                return done
        return most

    def _why(self, module: str, pieces: Sequence[Piece], start: int) -> str:
        rows, width = self.weights[module].shape
        if self._coarse:
            return f"quantization changes its weight by more than {_COARSE:.0%} of its size: it may be any weight"
        if pieces:
            return f"{pieces[-1].product.label} has its first {start} rows, and no product those behind them"
        if not self._products:
            return f"no product reads {width} numbers"
        near = self._near[module]
        return f"no product has its weight [{rows}, {width}]" + (
            f"; one whose first row begins like its own is off by {near:.1%}" if near < 0.3 else ""
        )


def _changed(weight: Array, way: str, product: Product) -> Array | None:
    """What `weight` may have become before it was stored or quantized, float32; None where it cannot go `way`."""
    changed = rounded(weight, product.weight.dtype if product.weight.bits is None else "float32", way)
    return None if changed is None else changed.astype(np.float32)


def _is_coarse(wanted: Array, seen: Array) -> bool:
    with np.errstate(over="ignore"):
        change, size = (float(np.square(part).sum(dtype=np.float64)) for part in (seen - wanted, wanted))
    return not change <= _COARSE**2 * size


def _agree(wanted: Array, seen: Array, reach: Array | None) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        same: Array = wanted == seen if reach is None else np.abs(wanted - seen) <= reach
    return same


def _shared(pieces: Mapping[str, tuple[Piece, ...]]) -> Iterator[tuple[str, str]]:
    """Modules that claim a row which another one claims, too."""
    claims: dict[Product, list[tuple[int, int, str]]] = {}
    for module, own in pieces.items():
        for piece in own:
            claims.setdefault(piece.product, []).append((piece.first, piece.last, module))
    for ranges in claims.values():
        ranges.sort()
        for number, (_, stop, module) in enumerate(ranges):
            for first, _, other in ranges[number + 1 :]:
                if first >= stop:
                    break
                yield module, other
                yield other, module
