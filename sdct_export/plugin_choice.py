"""Which of several TensorRT plugin libraries fits the TensorRT at hand. Looks at file names, loads nothing.

An installation may hold a library for each of several TensorRT versions, `libsdct_tensorrt_<major>_<minor>.so`, and
one that was built by hand for this machine, `libsdct_tensorrt.so`. A library registers itself with TensorRT as it is
loaded, so the choice is made before:

1. a library without a version in its name, which somebody put there on purpose; `load_plugin` checks its version;
2. else the newest of the same major version that is not newer than the TensorRT found: within a major version TensorRT
   keeps what was compiled against an older minor one working, not the other way round.

The first folder on the search path that holds any library decides, as for every other library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import UnsupportedError

Version = tuple[int, int]

_NAME = re.compile(r"(?:lib)?sdct_tensorrt(?:_(\d+)_(\d+))?\.(?:so|dll|dylib)")


def plugin_libraries(folders: Iterable[Path]) -> list[Path]:
    """The plugin libraries in the first of `folders` that holds any, by name; empty where none does."""
    for folder in folders:
        if not os.path.isdir(folder):  # noqa: PTH112, since Path.glob raises for a name that is too long
            continue
        found = [
            path for path in sorted(folder.glob("*sdct_tensorrt*")) if _NAME.fullmatch(path.name) and path.is_file()
        ]
        if found:
            return found
    return []


def library_version(path: Path) -> Version | None:
    """The TensorRT version in the name of a library, None for one that was built by hand."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match and match[1] else None


def parse_version(text: str) -> Version:
    """`(10, 16)` of "10.16.1.11".

    Raises:
        UnsupportedError: the text does not start with two numbers.
    """
    match = re.match(r"(\d+)\.(\d+)(?!\d)", text)
    if match is None:
        raise UnsupportedError(f"TensorRT calls its version {text!r}; expected something like '10.16.1.11'")
    return int(match[1]), int(match[2])


def choose_plugin(libraries: Sequence[Path], tensorrt: Version | None) -> Path | None:
    """The library to load into TensorRT `tensorrt` (major, minor), by the rule above.

    Args:
        libraries: candidates, as `plugin_libraries` gives them.
        tensorrt: what was found, None where there is no TensorRT here; then only a library without version fits.

    Returns:
        One of `libraries`; None where there are none, or none can be chosen without a TensorRT.

    Raises:
        UnsupportedError: there are libraries, but none for this TensorRT; names what there is and what to do.
    """
    versions = {path: library_version(path) for path in libraries}
    by_hand = next((path for path, version in versions.items() if version is None), None)
    if by_hand is not None or tensorrt is None or not versions:
        return by_hand
    fitting = {v: path for path, v in versions.items() if v is not None and v[0] == tensorrt[0] and v <= tensorrt}
    if fitting:
        return fitting[max(fitting)]
    have = ", ".join(f"{major}.{minor}" for major, minor in sorted(v for v in versions.values() if v is not None))
    raise UnsupportedError(
        f"no plugin library for TensorRT {tensorrt[0]}.{tensorrt[1]}: {libraries[0].parent} has those for {have}, and "
        "one must be of the same major version and not newer. Install a TensorRT that fits, or build the library "
        "against the headers of this one (docs/tensorrt.md)"
    )
