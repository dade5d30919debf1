"""The native build that every GPU test uses. It is made when the first test runs; collecting does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import native_gpu
import pytest

from sdct_export.native import LIBRARY_PATH


@pytest.fixture(scope="session", autouse=True)
def built() -> Iterator[Path | str]:
    """The build folder, or why there is none; SDCT_LIBRARY_PATH leads there for this process and those it starts."""
    try:
        folder = native_gpu.build()
    except native_gpu.Missing as reason:
        yield str(reason)
        return
    with pytest.MonkeyPatch.context() as patch:
        before = os.environ.get(LIBRARY_PATH)
        patch.setenv(LIBRARY_PATH, os.pathsep.join(filter(None, [before, str(folder)])))
        yield folder


@pytest.fixture(scope="session")
def native(built: Path | str) -> Path:
    """The build folder; skips where this machine cannot build and has none."""
    if isinstance(built, str):
        pytest.skip(built)
    return built


@pytest.fixture(scope="session")
def gpu(native: Path) -> native_gpu.Gpu:
    """The kernel core through its C binding."""
    try:
        return native_gpu.Gpu(native)
    except native_gpu.Missing as reason:
        pytest.skip(str(reason))
