"""The demo's picture: what an adapter is, what it reaches, what it weighs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import finetuning as ft
import numpy as np

from sdct_export import SdctAdapter
from sdct_export.base.model import find_linear, linear_weight
from sdct_export.spectral.transform import dct2

LAYER = "bert.encoder.layer.5.attention.self.value"
COLORS = ("#9aa3ad", "#3b6ea5", "#d1603a")  # frozen, LoRA, sDCT
INK = "#22272e"


def draw(adapter: SdctAdapter, results: list[Any], path: Path) -> None:
    """Write the picture of `adapter` and of the demo's `results` to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 10, "axes.edgecolor": "#8a929b", "text.color": INK, "axes.labelcolor": INK}
    style |= {"axes.titleweight": "bold", "axes.titlesize": 11, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(12.6, 4.3), width_ratios=(1.05, 1.25, 0.9), layout="constrained"
        )
        _spectrum(adapter, left)
        _accuracy(results, middle)
        _sizes(results, right)
        figure.savefig(path, dpi=110, facecolor="white")
        plt.close(figure)


def _spectrum(adapter: SdctAdapter, axes: Any) -> None:
    weight = linear_weight(find_linear(ft.load_classifier(2), LAYER))
    spectrum = dct2(weight.detach().float()).abs().numpy()
    axes.imshow(np.log10(spectrum + 1e-4), cmap="Greys", vmin=-2.2, vmax=0.9, origin="upper", interpolation="nearest")
    entries = adapter.entries(LAYER)
    size = np.abs(entries.values.astype(np.float64))
    rows, cols = entries.indices.T
    axes.scatter(cols, rows, s=2 + 26 * size / size.max(), color=COLORS[2], alpha=0.9, linewidths=0)
    d_out, d_in = spectrum.shape
    angle = np.linspace(0, np.pi / 2, 200)
    for share in (1 / 3, 2 / 3):
        radius = share * np.hypot(d_out - 1, d_in - 1)
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        inside = (x < d_in) & (y < d_out)
        axes.plot(x[inside], y[inside], color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
    axes.set(xlim=(-0.5, d_in - 0.5), ylim=(d_out - 0.5, -0.5), xlabel="input frequency", ylabel="output frequency")
    axes.set_xticks([])
    axes.set_yticks([])
    share = entries.n / (d_out * d_in)
    axes.set_title(f"One layer's update: {entries.n} cosines\nof {d_out * d_in:,} ({share:.1%}), in three bands")


def _accuracy(results: list[Any], axes: Any) -> None:
    tasks = list(results[0].accuracy)
    width = 0.26
    for i, (result, color) in enumerate(zip(results, COLORS, strict=True)):
        x = np.arange(len(tasks)) + (i - 1) * width
        values = [100 * result.accuracy[task] for task in tasks]
        axes.bar(x, values, width * 0.92, color=color, label=result.method)
        for at, value in zip(x, values, strict=True):
            axes.text(at, value + 1, f"{value:.1f}", ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.tick_params(axis="x", length=0)
    axes.set(ylim=(0, 118), ylabel="test accuracy, %")
    axes.set_yticks(range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", ncols=3, columnspacing=1.0, handlelength=0.9, fontsize=8.5)
    axes.set_title("Three tasks on docstrings,\none MiniLM, one ONNX file")


def _sizes(results: list[Any], axes: Any) -> None:
    lora, sdct = results[1:]
    task = min(lora.file_bytes, key=lambda name: lora.file_bytes[name])
    rows = [
        ("trained numbers\n(without head), thousands", lora.parameters / 1e3, sdct.parameters / 1e3),
        (f"adapter file with head\n({task}), KB", lora.file_bytes[task] / 1e3, sdct.file_bytes[task] / 1e3),
    ]
    for i, (_, a, b) in enumerate(rows):
        largest = max(a, b)
        for offset, value, color in ((-0.19, a, COLORS[1]), (0.19, b, COLORS[2])):
            axes.barh(i + offset, value / largest, 0.34, color=color)
            axes.text(
                value / largest + 0.02, i + offset, f"{value:,.1f}" if value < 100 else f"{value:,.0f}", va="center"
            )
        axes.text(0, i - 0.43, rows[i][0].replace("\n", " "), va="bottom", fontsize=9)
    axes.set(xlim=(0, 1.2), ylim=(1.55, -0.75))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title("Weight of one adapter\n(LoRA r=8 above, sDCT below)")
