"""What is installed here, what works, and what to install for the rest. Imports nothing heavy but ONNX Runtime."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from . import __version__
from .contract import BITS
from .errors import SdctError, UnsupportedError
from .native import (
    find_plugin,
    has_cuda,
    instruction_set,
    library_folders,
    operator_library,
    register_operator,
    why_no_operator,
)
from .plugin_choice import library_version, plugin_libraries


@dataclasses.dataclass(frozen=True)
class Finding:
    """One part: `ok`, `missing` or `broken`, what was found, and what to do where it is not ok."""

    part: str
    state: str
    detail: str
    advice: str = ""


def examine() -> list[Finding]:
    """Every part the package can use, the ones it always needs first. Never raises."""
    torch, engines = "optional, to train, merge and export: ", "optional, to build and run engines: "
    findings = [
        Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("sdct_export", "ok", __version__),
        *(
            _package(name, f"needed: pip install {name}")
            for name in ("numpy", "safetensors", "ml_dtypes", "tokenizers", "jinja2")
        ),
        _guarded(
            "onnxruntime",
            _onnxruntime,
            "to run bundles: pip install 'sdct_export[cpu]', or 'sdct_export[gpu]' for an NVIDIA GPU",
        ),
        *(
            _package(name, f"{torch}pip install 'sdct_export[torch]'")
            for name in ("torch", "transformers", "onnx", "onnxscript")
        ),
        _guarded("quantizer", _quantizer, f"{torch[:-2]} with --quantize: install onnxruntime 1.23 or newer"),
        _guarded(
            "operator library", _operator, f"optional, makes adapters faster on ONNX Runtime: {why_no_operator()}"
        ),
        _guarded("CUDA driver", _driver, "optional, for a GPU: install NVIDIA's driver, then check with nvidia-smi"),
        *(_package(name, f"{engines}pip install 'sdct_export[tensorrt]'") for name in ("cuda-bindings", "tensorrt")),
        _guarded(
            "plugin library",
            _plugin,
            "optional, for multi-adapter engines: build it with CMake and TensorRT's headers (docs/tensorrt.md)",
        ),
    ]
    return findings


def _package(name: str, advice: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", advice)


def _guarded(part: str, look: Callable[[], str | None], advice: str) -> Finding:
    """What `look` finds; None says the part is missing, an error that it is broken."""
    try:
        detail = look()
    except SdctError as error:
        return Finding(part, "broken", str(error), advice)
    except Exception as error:  # a part of someone else, which may fail in any way when it is looked at
        return Finding(part, "broken", f"{type(error).__name__}: {error}", advice)
    return Finding(part, "missing", "not found", advice) if detail is None else Finding(part, "ok", detail)


def _onnxruntime() -> str | None:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name == "onnxruntime":
            return None
        raise
    if {"onnxruntime", "onnxruntime-gpu"} <= {str(d.name).lower() for d in metadata.distributions()}:
        raise UnsupportedError(
            "onnxruntime and onnxruntime-gpu are both installed, and each overwrites files of the other; "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them"
        )
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers())
    return f"{onnxruntime.__version__}, built with {providers}"


def _quantizer() -> str | None:
    """ONNX Runtime's own, which lies beside it; importing it would import onnx."""
    try:
        import onnxruntime
    except ImportError:
        return None
    file = Path(onnxruntime.__file__).parent / "quantization" / "matmul_nbits_quantizer.py"
    return f"onnxruntime's, for --quantize {' and '.join(BITS)}" if file.is_file() else None


def _operator() -> str | None:
    """Says "in use" only of a library that loads and that ONNX Runtime accepts."""
    path = operator_library()
    if path is None:
        return None
    try:
        import onnxruntime
    except ImportError:
        return f"waits for onnxruntime: {path}"
    register_operator(onnxruntime.SessionOptions())
    places = f"CPU ({instruction_set(path)})" + (" and CUDA" if has_cuda(path) else "")
    return f"in use on {places}: {path}"


def _plugin() -> str | None:
    libraries = plugin_libraries(library_folders())
    if not libraries:
        return None
    try:
        path = find_plugin(metadata.version("tensorrt"))
    except metadata.PackageNotFoundError:
        path = find_plugin(None)
    if path is None:
        known = sorted(v for library in libraries if (v := library_version(library)) is not None)
        versions = ", ".join(f"{major}.{minor}" for major, minor in known)
        return f"for TensorRT {versions}, whichever is installed: {libraries[0].parent}"
    named = library_version(path)  # loading one registers it, so that is done only where the name does not say it
    version = ctypes.CDLL(str(path)).sdct_tensorrt_version() if named is None else named[0] * 10000 + named[1] * 100
    return f"for TensorRT {version // 10000}.{version // 100 % 100}: {path}"


def _driver() -> str | None:
    """Version of the CUDA driver and the devices it knows."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    for status in (
        cuda.cuInit(0),
        cuda.cuDriverGetVersion(ctypes.byref(version)),
        cuda.cuDeviceGetCount(ctypes.byref(count)),
    ):
        if status:
            raise RuntimeError(f"the driver answers with error {status}")
    names = []
    for index in range(count.value):
        name, device = ctypes.create_string_buffer(256), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode(errors="replace"))
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}, {', '.join(names) or 'no device'}"
