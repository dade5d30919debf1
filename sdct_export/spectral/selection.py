"""Which coefficients an adapter holds: distance bands and the ways to choose within them.

With `d = sqrt(row^2 + col^2)` the distance of a coefficient from the zero frequency and
`d_max = sqrt((d_out-1)^2 + (d_in-1)^2)` the largest distance in the matrix (its far corner), band `j` of `b` holds
`j d_max / b <= d < (j+1) d_max / b`; the far corner belongs to the last band (MaCP, arXiv 2410.09103, with its three
bands made a parameter).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError

if TYPE_CHECKING:  # numpy alone suffices for everything but `select_for_weight`
    from torch import Tensor

Indices = npt.NDArray[np.int32]


def band_map(shape: tuple[int, int], bands: int) -> npt.NDArray[np.uint8]:
    """Band number of every coefficient, `[d_out, d_in]` uint8, 0 the lowest frequencies."""
    return _band_numbers(_squared_distance(shape), shape, bands)


def bands_of(indices: npt.NDArray[Any], shape: tuple[int, int], bands: int) -> npt.NDArray[np.uint8]:
    """Band number of the coefficients at `indices [n, 2]` (row, col), `[n]` uint8."""
    return _band_numbers((indices.astype(np.int64) ** 2).sum(axis=1), shape, bands)


def band_quotas(n: int, sizes: list[int]) -> list[int]:
    """Split `n` over bands of the given sizes as equally as they allow; what small bands cannot hold the others share.

    The remainder of an uneven division goes to the lowest bands with room.
    """
    if n > sum(sizes):
        raise ConfigError(f"{n} coefficients asked of a matrix that has only {sum(sizes)}; lower n_coefficients")
    quotas = [0] * len(sizes)
    while (left := n - sum(quotas)) > 0:
        room = [j for j, size in enumerate(sizes) if quotas[j] < size]  # all of them stand at the same level
        step = min(left // len(room), min(sizes[j] - quotas[j] for j in room))
        for j in room if step else room[:left]:
            quotas[j] += step or 1
    return quotas


def select(
    selection: str,
    n: int,
    shape: tuple[int, int],
    *,
    spectrum: Tensor | None = None,
    delta: float = 0.7,
    bands: int = 3,
    seed: int | tuple[int, ...] = 0,
) -> Indices:
    """Choose `n` distinct coefficients of a `[d_out, d_in]` matrix.

    Args:
        selection: `energy`, `top`, `random` or `low` (see `SdctConfig`).
        n: how many; at most `d_out * d_in`.
        shape: `(d_out, d_in)`.
        spectrum: `[d_out, d_in]` 2-D DCT of the pretrained weight (`energy`) or of the weight change (`top`).
        delta: fraction of each band's quota taken by magnitude, for `energy`.
        bands: number of distance bands, for `energy` and `top`.
        seed: seed of the random part.

    Returns:
        int32 `[n, 2]` of (row, col), sorted by row, then column.

    Raises:
        ConfigError: unknown selection, too many coefficients, or a missing or misshapen spectrum.
    """
    if n < 1 or n > shape[0] * shape[1]:
        raise ConfigError(
            f"cannot choose {n} coefficients of a {shape[0]} x {shape[1]} matrix; "
            f"set n_coefficients between 1 and {shape[0] * shape[1]}"
        )
    rng = np.random.default_rng(seed)
    if selection == "random":
        flat = rng.choice(shape[0] * shape[1], size=n, replace=False)
    elif selection == "low":
        flat = np.argsort(_squared_distance(shape), axis=None, kind="stable")[:n]
    elif selection in ("energy", "top"):
        if spectrum is None or tuple(spectrum.shape) != tuple(shape):
            got = None if spectrum is None else tuple(spectrum.shape)
            raise ConfigError(f"selection {selection!r} needs a spectrum of shape {tuple(shape)}, got {got}")
        magnitude = spectrum.detach().abs().float().cpu().numpy().ravel()
        flat = _by_band(magnitude, n, shape, bands, 1.0 if selection == "top" else delta, rng)
    else:
        raise ConfigError(f"unknown selection {selection!r}; choose energy, top, random or low")
    flat = np.sort(flat)
    return np.stack([flat // shape[1], flat % shape[1]], axis=1).astype(np.int32)


def select_for_weight(
    weight: Tensor, selection: str, n: int, *, delta: float = 0.7, bands: int = 3, seed: int | tuple[int, ...] = 0
) -> Indices:
    """`select` on the 2-D DCT of `weight [d_out, d_in]` (computed only where the selection reads it)."""
    from .transform import dct2

    shape = (int(weight.shape[0]), int(weight.shape[1]))
    spectrum = dct2(weight.detach().float()) if selection in ("energy", "top") else None
    return select(selection, n, shape, spectrum=spectrum, delta=delta, bands=bands, seed=seed)


def _by_band(
    magnitude: npt.NDArray[np.float32],
    n: int,
    shape: tuple[int, int],
    bands: int,
    fraction: float,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    band_of = band_map(shape, bands).ravel()
    members = [np.flatnonzero(band_of == j) for j in range(bands)]
    chosen = []
    for inside, quota in zip(members, band_quotas(n, [len(m) for m in members]), strict=True):
        by_magnitude = round(fraction * quota)
        order = (
            np.argpartition(magnitude[inside], len(inside) - by_magnitude) if by_magnitude else np.arange(len(inside))
        )
        cut = len(inside) - by_magnitude
        chosen.append(inside[order[cut:]])
        chosen.append(inside[rng.choice(order[:cut], size=quota - by_magnitude, replace=False)])
    return np.concatenate(chosen)


def _band_numbers(squared: npt.NDArray[np.int64], shape: tuple[int, int], bands: int) -> npt.NDArray[np.uint8]:
    if not 1 <= bands <= 255:
        raise ConfigError(f"bands must lie in 1..255, got {bands}")
    largest = float((shape[0] - 1) ** 2 + (shape[1] - 1) ** 2)
    edges = np.array([largest * (j / bands) ** 2 for j in range(1, bands)])
    return np.searchsorted(edges, squared.ravel(), side="right").astype(np.uint8).reshape(squared.shape)


def _squared_distance(shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    rows = np.arange(shape[0], dtype=np.int64)[:, None]
    cols = np.arange(shape[1], dtype=np.int64)[None, :]
    return rows * rows + cols * cols
