"""Positions of coefficients in few bytes: the Elias-Fano code of a sorted set, as format version 2 stores it.

Of `n` distinct flat positions `p_i = row * d_in + col` below `size = d_out * d_in`, ascending, with
`l = floor(log2(size / n))`:

    low    ceil(n l / 8) bytes                        the `l` lowest bits of each position, one after the other
    high   ceil((n + ((size - 1) >> l)) / 8) bytes    bit `(p_i >> l) + i` is set for `i = 0 ... n - 1`

Bit `b` of a part is bit `b % 8` of its byte `b // 8`, bit 0 the least significant one; numbers have their least
significant bit first. Unused bits are zero, so that one set has one code. Its length follows from `n` and `size`, and
is about half a bit a position above `log2(e size / n)`, the least for a set without structure. numpy only.

Source: P. Elias, Efficient storage and retrieval by content and address of static files, J. ACM 21, 1974.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import AdapterFormatError

Positions = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
_AT_A_TIME = 1 << 16  # positions whose bits are spread out at once, a multiple of 8


def code_bytes(n: int, size: int) -> int:
    """Length of the code of `n` positions below `size`, `1 <= n <= size`."""
    return sum(_parts(n, size))


def encode(positions: Positions, size: int) -> Bytes:
    """The code of `positions`, int64 `[n]`, ascending and distinct in `[0, size)`: uint8 `[code_bytes(n, size)]`."""
    n, width = len(positions), _width(len(positions), size)
    places = np.arange(width)
    parts = [
        np.packbits((positions[at : at + _AT_A_TIME, None] >> places & 1).astype(np.uint8), bitorder="little")
        for at in range(0, n, _AT_A_TIME)
    ]
    marks = np.zeros(8 * _parts(n, size)[1], np.uint8)
    marks[(positions >> width) + np.arange(n)] = 1
    return np.concatenate([*parts, np.packbits(marks, bitorder="little")])


def decode(code: Bytes, n: int, size: int) -> Positions:
    """The positions, int64 `[n]`, that `code`, uint8 `[code_bytes(n, size)]`, stands for. `size` is below 2^62.

    Raises:
        AdapterFormatError: it is the code of no set of `n` positions below `size`.
    """
    width, low = _width(n, size), _parts(n, size)[0]
    marks = np.flatnonzero(np.unpackbits(code[low:], bitorder="little"))
    if len(marks) != n or marks[-1] >= n + (size - 1 >> width):
        raise AdapterFormatError(
            "its positions are damaged: they are not as many as its values; copy or save it again"
        )
    positions = (marks - np.arange(n)).astype(np.int64) << width
    for at in range(0, n, _AT_A_TIME):
        some = positions[at : at + _AT_A_TIME]
        bits = np.unpackbits(code[:low][at * width // 8 :][: -(-len(some) * width // 8)], bitorder="little")
        if bits[len(some) * width :].any():
            raise AdapterFormatError("its positions are damaged: unused bits are set; copy or save it again")
        for bit in range(width):
            some |= bits[bit : len(some) * width : width].astype(np.int64) << bit
    if positions[-1] >= size or (positions[1:] <= positions[:-1]).any():
        raise AdapterFormatError("its positions are damaged: repeated or outside the weight; copy or save it again")
    return positions


def _width(n: int, size: int) -> int:
    return (size // n).bit_length() - 1


def _parts(n: int, size: int) -> tuple[int, int]:
    """Bytes of the low and of the high part."""
    width = _width(n, size)
    return -(-n * width // 8), -(-(n + (size - 1 >> width)) // 8)
