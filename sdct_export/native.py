"""Find and load the native libraries. Everything here works without them; they make it fast.

A library is looked for in the folders of the environment variable `SDCT_LIBRARY_PATH` (separated like `PATH`; a build
folder, or an empty one to go without), and where that is not set in the package's own `lib` folder, where an
installation with a compiler puts it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .contract import OP_VERSION
from .errors import UnsupportedError, missing_package
from .plugin_choice import choose_plugin, parse_version, plugin_libraries

LIBRARY_PATH = "SDCT_LIBRARY_PATH"
_SHOWN = 200  # characters of a setting that a message repeats


def onnxruntime() -> Any:
    """The package. Raises `UnsupportedError` where it is not installed."""
    try:
        return import_module("onnxruntime")
    except ModuleNotFoundError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        raise UnsupportedError(missing) from error


def operator_library() -> Path | None:
    """The ONNX Runtime operator library, None where there is none.

    Raises:
        UnsupportedError: it is there but cannot be loaded, or implements another version of the node.
    """
    path = find_library("sdct_onnxruntime")
    if path is not None:
        check_version(path)
    return path


def register_operator(options: Any, device: str = "cpu") -> bool:
    """Make sessions with `options` (an `onnxruntime.SessionOptions`) run `SpectralDelta` nodes natively on `device`.

    Returns whether there was a library for that device (`cpu` or `cuda`). A library without GPU kernels is left out on
    a GPU: its nodes would run on the CPU with copies there and back, while the function body stays on the GPU.
    The model stays as it is: ONNX Runtime prefers a registered operator to the model-local function of the same domain
    and name, whatever the node's overload (seen with 1.23 and 1.31).

    Raises:
        UnsupportedError: as `operator_library`, or ONNX Runtime refuses the library.
    """
    path = operator_library()
    if path is None or (device == "cuda" and not has_cuda(path)):
        return False
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise UnsupportedError(
            f"ONNX Runtime cannot use {path} ({str(error).strip()}); install the package again, "
            f"or set {LIBRARY_PATH} to an empty folder to run without it"
        ) from error
    return True


def has_cuda(path: Path) -> bool:
    """Whether the operator library at `path` was built with GPU kernels."""
    return bool(ctypes.CDLL(str(path)).sdct_cuda())


def instruction_set(path: Path) -> str:
    """What the operator library at `path` computes with on this CPU: `avx512`, `avx2` or `baseline`."""
    name = ctypes.CDLL(str(path)).sdct_cpu_isa
    name.restype = ctypes.c_char_p
    return str(name().decode())


def why_no_operator(device: str = "cpu") -> str:
    """Why bundles run through the portable body on this machine, and what to do about it: one sentence."""
    again = reinstall()
    folders = os.environ.get(LIBRARY_PATH)
    path = find_library("sdct_onnxruntime")
    if path is not None:
        fault = "was built without GPU kernels" if device.startswith("cuda") else "cannot be used"
        return f"{path} {fault}; install it again{' where nvcc is' if device.startswith('cuda') else ''}: {again}"
    if folders is not None:
        shown = repr(folders if len(folders) <= _SHOWN else f"{folders[:_SHOWN]}...")
        if any(os.path.isfile(place) for place in library_folders()):  # noqa: PTH113, as below
            return f"{LIBRARY_PATH}={shown} names a file; name the folder that the library is in"
        return f"{LIBRARY_PATH}={shown} leads to no operator library; unset it, or name the folder of one"
    if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++", "cl")):
        return f"the package was installed where no C++ compiler was found; there is one now, so run: {again}"
    return (
        f"there is no operator library and no C++ compiler to build it; install one (such as g++), then run: {again}"
    )


def reinstall() -> str:
    """The command that installs this package again: from where it came (PEP 610), by its name where that is gone."""
    source = "sdct_export"
    try:
        origin = json.loads(metadata.distribution("sdct_export").read_text("direct_url.json") or "{}")
        url = str(origin.get("url", ""))
        place = url2pathname(urlsplit(url).path)
        if "vcs_info" in origin:
            source = shlex.quote(f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}")
        elif url.startswith("file:") and os.path.exists(place):  # noqa: PTH110, as below
            source = ("-e " if origin.get("dir_info", {}).get("editable") else "") + shlex.quote(place)
    except (metadata.PackageNotFoundError, AttributeError, KeyError, TypeError, ValueError):
        pass  # not installed at all, or by something else than pip
    return f"pip install --force-reinstall --no-deps {source}"


def find_library(stem: str) -> Path | None:
    """The first library called `stem` on the search path, None where there is none."""
    name = {"win32": f"{stem}.dll", "darwin": f"lib{stem}.dylib"}.get(sys.platform, f"lib{stem}.so")
    for place in library_folders():
        if os.path.isfile(place / name):  # noqa: PTH113, since Path.is_file raises for a name that is too long
            return (place / name).resolve()
    return None


def find_plugin(tensorrt: str | None) -> Path | None:
    """The plugin library for TensorRT version `tensorrt`, None where there is none (see `plugin_choice`).

    Raises:
        UnsupportedError: there are libraries, but none for this version.
    """
    return choose_plugin(plugin_libraries(library_folders()), parse_version(tensorrt) if tensorrt else None)


def library_folders() -> list[Path]:
    """Where libraries are looked for, in this order."""
    folders = os.environ.get(LIBRARY_PATH)
    if folders is None:
        package = sys.modules[__package__]  # an editable installation has two folders: the sources and what was built
        return [Path(folder) / "lib" for folder in package.__path__]
    return [Path(folder) for folder in folders.split(os.pathsep) if folder]


def check_version(path: Path) -> None:
    """Load the library at `path` and compare its `sdct_version()` with the contract's.

    Raises:
        UnsupportedError: it cannot be loaded, or implements another version of the node.
    """
    again = f"build it again for this version and machine: {reinstall()}"
    try:
        library = ctypes.CDLL(str(path))
        version, _, _ = library.sdct_version, library.sdct_cuda, library.sdct_cpu_isa
    except (OSError, AttributeError) as error:
        raise UnsupportedError(f"cannot load the native library {path}: {error}; {again}") from error
    version.restype, version.argtypes = ctypes.c_int32, []
    found = int(version())
    if found != OP_VERSION:
        raise UnsupportedError(
            f"{path} implements version {found} of SpectralDelta, this package needs {OP_VERSION}; {again}"
        )
