"""The spectrum picture of an adapter: where its coefficients lie, the bands, and how the energy spreads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, UnsupportedError
from ..files import new_file
from .adapter import SdctAdapter
from .summary import extent_of, natural_order, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT, _BAR = "#222222", "#8a8a8a", "#3b6ea5"
_STYLE: Any = {
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "svg.hashsalt": "sdct",
}


def plot_spectrum(adapter: SdctAdapter, path: str | Path, *, title: str | None = None) -> None:
    """Draw `adapter` to `path` (format by suffix: png, svg or pdf).

    Left: every coefficient of the modules that share the most common shape, at (col, row), coloured by
    `|scaling * value|`, with the edges of the distance bands as arcs. Right: energy by distance over all modules, each
    relative to its own largest distance, and energy by module.

    Raises:
        UnsupportedError: matplotlib is not installed.
        ConfigError: the suffix names no picture format, or the adapter has no coefficients.
        OutputError: the file cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("a picture needs matplotlib; install it: pip install 'sdct_export[plot]'") from None
    target = Path(path)
    if target.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"cannot draw to {target}: the name must end in .png, .svg or .pdf")
    if not adapter.modules:
        raise ConfigError("the adapter has no coefficients to draw, only saved modules")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.8, 4.9), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.12, 1), hspace=0.1)
        if title:
            figure.suptitle(title, parse_math=False, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
        _draw_positions(adapter, figure.add_subplot(grid[:, 0]))
        _draw_distances(adapter, figure.add_subplot(grid[0, 1]))
        _draw_modules(adapter, figure.add_subplot(grid[1, 1]))
        with new_file(target) as work:
            figure.savefig(work, dpi=160, metadata={"Date": None} if target.suffix == ".svg" else None)


def _draw_positions(adapter: SdctAdapter, axes: Axes) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    sizes: Counter[tuple[int, int]] = Counter()
    for entries in adapter.modules.values():
        sizes[entries.shape or extent_of(entries.indices)] += entries.n
    shape, n = sizes.most_common(1)[0]
    chosen = [e for e in adapter.modules.values() if (e.shape or extent_of(e.indices)) == shape]
    indices = np.concatenate([e.indices for e in chosen])
    size = np.abs(np.concatenate([e.float32(adapter.config.scaling) for e in chosen]))
    order = np.argsort(size)  # the largest on top
    indices, size = indices[order], size[order]
    largest = float(size[-1]) or 1.0
    drawn = axes.scatter(
        indices[:, 1],
        indices[:, 0],
        c=np.maximum(size, largest * 1e-2),
        norm=LogNorm(largest * 1e-2, largest),
        cmap=LinearSegmentedColormap.from_list("magnitude", ["#dde3ea", "#86b3d8", "#2b66a5", "#4a1a5c"]),
        s=max(2.5, min(14.0, 24000 / n)),
        linewidths=0,
        rasterized=True,
    )
    _draw_arcs(adapter.config.bands, shape, axes)
    axes.set(
        xlim=(-0.01 * shape[1], 1.01 * shape[1]),
        ylim=(1.01 * shape[0], -0.01 * shape[0]),
        aspect="equal" if max(shape) <= 3 * min(shape) else "auto",
        xlabel="column frequency (input)",
        ylabel="row frequency (output)",
    )
    of = "" if len(chosen) == len(adapter.modules) else f" of {len(adapter.modules)}"
    noun = "module" if len(adapter.modules) == 1 else "modules"
    axes.set_title(f"{n} coefficients, {len(chosen)}{of} {noun} of {shape[0]} x {shape[1]}")
    bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.5, anchor=(0, 1), aspect=28, pad=0.02, extend="min")
    bar.set_label("magnitude")
    bar.outline.set_visible(False)


def _draw_arcs(bands: int, shape: tuple[int, int], axes: Axes) -> None:
    """The band edges `j d_max / bands`, clipped to the matrix."""
    furthest = float(np.hypot(shape[0] - 1, shape[1] - 1))
    angle = np.linspace(0, np.pi / 2, 361)
    for j in range(1, bands if bands <= 12 else 1):
        x, y = (furthest * j / bands * f(angle) for f in (np.cos, np.sin))
        inside = (x <= shape[1] - 1) & (y <= shape[0] - 1)
        axes.plot(x[inside], y[inside], color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))


def _draw_distances(adapter: SdctAdapter, axes: Axes) -> None:
    distances, squared = [], []
    for entries in adapter.modules.values():
        shape = entries.shape or extent_of(entries.indices)
        furthest = np.hypot(shape[0] - 1, shape[1] - 1) or 1.0
        distances.append(np.hypot(entries.indices[:, 0], entries.indices[:, 1]) / furthest)
        squared.append((entries.values.astype(np.float64) * adapter.config.scaling) ** 2)
    distance, energy = np.concatenate(distances), np.concatenate(squared)
    bands = adapter.config.bands
    per_band = max(1, 36 // bands) if bands <= 12 else 1  # bins end at band edges
    edges = np.linspace(0, 1, (bands if bands <= 12 else 36) * per_band + 1)
    total = energy.sum() or 1.0
    share = np.histogram(distance, edges, weights=energy)[0] / total * 100
    axes.bar(edges[:-1], share, width=np.diff(edges), align="edge", color=_BAR, edgecolor="white", linewidth=0.5)
    top = max(float(share.max()), 1e-9) * 1.4
    for j in range(bands if bands <= 12 else 0):
        low, high = j / bands, (j + 1) / bands
        inside = (distance >= low) & ((distance < high) if j + 1 < bands else True)
        label = f"band {j + 1}\n{energy[inside].sum() / total:.0%}"
        axes.text((low + high) / 2, top * 0.97, label, ha="center", va="top", color=_INK)
        if j:
            axes.axvline(low, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, 1), ylim=(0, top), xlabel="distance from zero frequency / largest distance", ylabel="energy, %")
    axes.set_title("Energy by distance")


def _draw_modules(adapter: SdctAdapter, axes: Axes) -> None:
    summaries = summarize(adapter)
    total = sum(s.energy for s in summaries) or 1.0
    share = [100 * s.energy / total for s in summaries]
    tails = [_tail(s.module) for s in summaries]
    kinds = natural_order(set(tails)) if len(set(tails)) <= 6 else []
    axes.bar(range(len(share)), share, width=0.85, color=[_color(kinds.index(t)) if kinds else _BAR for t in tails])
    if len(kinds) > 1:
        handles = [axes.bar([0], [0], color=_color(i)) for i in range(len(kinds))]
        names = [kind.replace("$", r"\$") for kind in kinds]  # what stands between two would be read as mathematics
        axes.legend(handles, names, frameon=False, ncols=min(3, len(kinds)), loc="upper right", handlelength=1)
        axes.set_ylim(0, max(max(share), 1e-9) * 1.3)
    axes.set(xlim=(-0.7, len(share) - 0.3), xlabel="module, first to last", ylabel="energy, %")
    _label_layers([s.module for s in summaries], axes)
    axes.set_title("Energy by module")


def _label_layers(modules: Sequence[str], axes: Axes) -> None:
    """Mark where each layer begins, by the first number in the paths, where there is one in all of them."""
    layers = [next((part for part in m.split(".") if part.isdigit()), None) for m in modules]
    if None in layers:
        axes.set_xticks([])
        return
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1]]
    starts = starts[:: max(1, -(-len(starts) // 16))]
    ends = [next((i for i in range(s, len(layers)) if layers[i] != layers[s]), len(layers)) for s in starts]
    axes.set_xticks([(s + e - 1) / 2 for s, e in zip(starts, ends, strict=True)], [str(layers[s]) for s in starts])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("layer")


def _tail(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _color(i: int) -> Any:
    return ("#3b6ea5", "#d1803a", "#4f9a63", "#a85f8f", "#7a7a7a", "#b8a13a")[i]
