"""Markers, their reasons and settings every test shares, in one place. Nothing here imports torch or touches CUDA."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import cuda_driver
import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download something fails at once
os.environ.setdefault("MPLBACKEND", "Agg")

# shared machines stall for seconds; examples are reproducible so that a failure in CI is one here
settings.register_profile("sdct", deadline=None, derandomize=True)
settings.load_profile("sdct")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = any(item.get_closest_marker(marker) for item in items for marker in ("gpu", "kernels"))
    why = cuda_driver.gpu().why if asked else ""
    stand_in = Path(os.environ.get("SDCT_GPU_BUILD", os.devnull), "libsdct_ptx.so").is_file()
    missing = {
        "gpu": f"no GPU here: {why}" if why else None,
        "kernels": f"no GPU here: {why}, and SDCT_GPU_BUILD names no build with SDCT_PTX=ON"
        if why and not stand_in
        else None,
        "trt": None if importlib.util.find_spec("tensorrt") else "the package tensorrt is not installed",
        "slow": None if config.getoption("--slow") else "slow; pass --slow to run it",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
