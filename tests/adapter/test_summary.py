"""The numbers and the picture of `sdct-export inspect`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from make_adapters import golden, random_adapter
from references import band_of, delta_weight

from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.config import SdctConfig
from sdct_export.adapter.entries import SdctEntries
from sdct_export.adapter.plot import plot_spectrum
from sdct_export.adapter.summary import natural_order, summarize
from sdct_export.errors import ConfigError, OutputError, UnsupportedError


@pytest.mark.parametrize("bands", [1, 3, 5])
def test_energy_is_the_squared_norm_of_the_weight_change(bands: int) -> None:
    adapter = random_adapter({"l.10.q": (31, 17), "l.9.v": (16, 48)}, 60)
    config = dataclasses.replace(adapter.config, scaling=-0.5, bands=bands)
    adapter = dataclasses.replace(adapter, config=config)
    summaries = summarize(adapter)
    assert [s.module for s in summaries] == ["l.9.v", "l.10.q"]
    for summary in summaries:
        entries = adapter.modules[summary.module]
        assert entries.shape is not None
        change = delta_weight(entries.values, entries.indices, entries.shape, -0.5)
        assert summary.energy == pytest.approx((change**2).sum(), rel=1e-9)
        assert summary.largest == pytest.approx(0.5 * np.abs(entries.values).max(), rel=1e-6)
        want = np.zeros(bands)
        for (row, col), value in zip(entries.indices.tolist(), entries.values.tolist(), strict=True):
            want[band_of(row, col, entries.shape, bands)] += (0.5 * value) ** 2
        assert summary.band_shares == pytest.approx(want / want.sum(), rel=1e-6)


def test_modules_without_a_recorded_shape_and_with_no_energy() -> None:
    zero = SdctEntries(np.zeros(2, np.float32), np.array([[0, 0], [3, 1]], np.int32))
    (summary,) = summarize(SdctAdapter(SdctConfig(), {"q": zero}))
    assert (summary.shape, summary.energy, summary.band_shares, summary.largest) == (None, 0.0, (0.0, 0.0, 0.0), 0.0)


def test_natural_order() -> None:
    assert natural_order(["h.10.a", "h.2.b", "h.2.a", "a"]) == ["a", "h.2.a", "h.2.b", "h.10.a"]


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def test_picture_shows_the_coefficients(tmp_path: Path) -> None:
    shapes = {f"layer.{i}.{p}": (48, 96) for i in range(3) for p in ("query", "value")}
    for name, adapter in (("a", random_adapter(shapes, 40)), ("b", random_adapter(shapes, 40, seed=1))):
        plot_spectrum(adapter, tmp_path / f"{name}.png", title="a title")
    first, second = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert min(first.shape[:2]) > 600
    assert np.abs(first - second).max() > 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_vector_pictures_of_odd_adapters(tmp_path: Path, suffix: str) -> None:
    plot_spectrum(golden(), tmp_path / f"a{suffix}")
    one = SdctEntries(np.zeros(1, np.float32), np.zeros((1, 2), np.int32))
    plot_spectrum(SdctAdapter(SdctConfig(bands=40), {"head": one}), tmp_path / f"b{suffix}")
    assert all((tmp_path / f"{name}{suffix}").stat().st_size > 5000 for name in "ab")


def test_pictures_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        plot_spectrum(golden(), tmp_path / "a.gif")
    with pytest.raises(ConfigError, match="no coefficients"):
        plot_spectrum(SdctAdapter(SdctConfig(), {}, {"c": np.ones(1, np.float32)}), tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        plot_spectrum(golden(), tmp_path / "file" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'sdct_export\[plot\]'"):
        plot_spectrum(golden(), tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
