#!/usr/bin/env python3
"""Compiles the CUDA core and both hosts with CUDA toolchains from a package index. Needs g++ and no GPU.

    plugins/tests/toolchains.py [VERSION...]     default: all it knows; an entry below each

    --tensorrt DIR           TensorRT headers, for the plugin's host code; may be given several times
    --architectures 75,90    in place of those that the build would choose; `ends`: the oldest and the newest of them
    --folder FOLDER          where wheels are installed (build/toolchains)

It fails where something does not compile, warns, or spills registers. What stands behind a line:

CUDA 13      the wheels hold nvcc: the core as it is built, for every architecture
CUDA 11, 12  the wheels hold headers and ptxas, and no nvcc. The kernels go through NVRTC of that version, which has
             the front end and the optimiser of its nvcc, and through that ptxas. The host's half of the core is
             compiled by g++ with that version's headers. So what nvcc itself does is not seen: splitting a file in
             two, and joining the halves.
before 11.7  there are no wheels. What is known to lack there is taken away from 11.7: __grid_constant__.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

PLUGINS = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")

# headers and compilers: version of the nvcc wheel, the runtime's, and NVRTC's or (CUDA 13) CCCL's
WHEELS = {
    "11.7": ("11.7.99", "11.7.99", "11.7.99"),
    "11.8": ("11.8.89", "11.8.89", "11.8.89"),
    "12.0": ("12.0.140", "12.0.146", "12.0.140"),
    "12.2": ("12.2.140", "12.2.140", "12.2.140"),
    "12.4": ("12.4.131", "12.4.127", "12.4.127"),
    "12.6": ("12.6.85", "12.6.77", "12.6.85"),
    "12.8": ("12.8.93", "12.8.90", "12.8.93"),
    "12.9": ("12.9.86", "12.9.79", "12.9.86"),
    "13.0": ("13.0.88", "13.0.96", "13.0.85"),
    "13.2": ("13.2.86", "13.2.86", "13.2.86"),
    "13.5": ("13.5.37", "13.5.37", "13.3.5.0.6"),
}

# What the core's headers take from the standard library, for NVRTC, which has none.
STANDARD = b"""
#ifndef SDCT_STANDARD
#define SDCT_STANDARD
typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned uint32_t; typedef long long int64_t; typedef unsigned long long uint64_t;
typedef unsigned long uintptr_t;
#define INT16_MAX 0x7fff
#define UINT16_MAX 0xffff
#define INT32_MAX 0x7fffffff
#define UINT32_MAX 0xffffffffu
#define INT64_MAX 0x7fffffffffffffffll
namespace std {
using ::size_t;
using ::memcpy;
template <class T> class vector {};
template <class T> class shared_ptr {};
}
#endif
"""
STANDARD_HEADERS = ("cstddef", "cstdint", "cstring", "memory", "vector")

# What nvcc gives the host's compiler, for g++, which only has to see that the host's half is right.
HOST = """
#include <cuda_runtime.h>
#include <device_launch_parameters.h>
#undef __launch_bounds__
#define __launch_bounds__(...)
template <class T, class... More> T __shfl_sync(unsigned, T, More...);
template <class T, class... More> T __shfl_up_sync(unsigned, T, More...);
template <class T, class... More> T __shfl_down_sync(unsigned, T, More...);
template <class T, class... More> T __shfl_xor_sync(unsigned, T, More...);
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
"""
# and for each other function that only a GPU has
GPU_FUNCTION = "int {0}();\ntemplate <class T, class... More> T {0}(T, More...);\n"
NO_GPU_FUNCTION = r"__(shfl\w*|launch_bounds__|align__|attribute__|builtin_\w*)"


class Failed(Exception):
    """The core or a host does not compile as it should."""


def install(version: str, folder: Path) -> Path | None:
    """The folder with the wheels of a version; None where they cannot be had."""
    nvcc, runtime, third = WHEELS[version]
    place = folder / version
    if (place / "complete").exists():
        return place
    major = version.split(".")[0]
    if major == "13":
        wheels = [f"nvidia-cuda-{part}=={nvcc}" for part in ("nvcc", "crt")]
        wheels += [f"nvidia-nvvm=={nvcc}", f"nvidia-cuda-runtime=={runtime}", f"nvidia-cuda-cccl=={third}"]
    else:
        names = (("nvcc", nvcc), ("runtime", runtime), ("nvrtc", third))
        wheels = [f"nvidia-cuda-{part}-cu{major}=={number}" for part, number in names]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--upgrade",
        "--target",
        str(place),
        *wheels,
    ]
    if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode:
        return None
    (place / "complete").touch()
    return place


def run(command: list[str | Path]) -> str:
    """What a command says. Raises Failed where it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    said = done.stdout + done.stderr
    if done.returncode or re.search(r"\bwarning\b", said):
        raise Failed(f"{Path(command[0]).name}: {said.strip()[:4000]}")
    return said


def chosen(known: Iterable[int], asked: str) -> list[int]:
    """The architectures to compile for: as the build chooses among `known`, or those `asked` for."""
    with tempfile.TemporaryDirectory() as name:
        nvcc, script = Path(name, "nvcc"), Path(name, "list.cmake")
        nvcc.write_text("#!/bin/sh\n" + "".join(f"echo sm_{number}\n" for number in known))
        nvcc.chmod(0o755)
        script.write_text(
            f"include({PLUGINS}/core/architectures.cmake)\nsdct_architectures({nvcc} found)\n"
            "message(STATUS ${found})\n"
        )
        said = run(["cmake", "-P", script])
    numbers = [int(number) for number in re.findall(r"(\d+)-real", said)]
    if asked == "ends":
        return [numbers[0], numbers[-1]]
    if asked:
        return [number for number in numbers if str(number) in asked.split(",")]
    return numbers


def no_spills(said: str, kernels: int) -> int:
    """The most registers that a kernel takes, from what ptxas -v said of this many. Raises Failed where some spill."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    if len(registers) < kernels or len(frames) < kernels:
        raise Failed(f"ptxas told of {len(registers)} kernels, expected {kernels}: {said[:2000]}")
    if any(frame != ("0", "0", "0") for frame in frames):
        lines = [
            line for line in said.splitlines() if re.search(r"Compiling entry|[1-9]\d* bytes (stack|spill)", line)
        ]
        listed = "\n".join(lines)
        raise Failed(f"a kernel spills registers, or has its arguments copied to its stack:\n{listed}")
    return max(registers)


def instantiated(source: str) -> list[str]:
    """The kernels that the host's half of the core launches, as C++ names them."""
    kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", source)
    host = source[source.rindex("#if !defined(__CUDACC_RTC__)") :]
    names = sorted({name for kernel in kernels for name in re.findall(rf"\b{kernel}<[^<>;()]+>", host)})
    if not names:
        raise Failed("no kernel was found in cuda.cu")
    return names


class Nvrtc:
    """NVRTC of one version."""

    def __init__(self, place: Path) -> None:
        folder = place / "nvidia/cuda_nvrtc/lib"
        for builtins in folder.glob("libnvrtc-builtins.so.*"):
            if ".alt." not in builtins.name:
                ctypes.CDLL(str(builtins))  # NVRTC looks for it by name alone
        self.library = ctypes.CDLL(
            str(next(path for path in folder.glob("libnvrtc.so.*") if ".alt." not in path.name))
        )
        self.include = place / "nvidia/cuda_runtime/include"

    def architectures(self) -> list[int]:
        """The numbers of the GPUs it compiles for."""
        count = ctypes.c_int()
        self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self.library.nvrtcGetSupportedArchs(numbers)
        return list(numbers)

    def ptx(self, source: str, kernels: list[str], architecture: int) -> bytes:
        """PTX of `kernels`. Raises Failed with the compiler's words, warnings too."""
        text = source + "\nusing namespace sdct;\n"  # the kernels' names are looked up at its end
        count = len(STANDARD_HEADERS)
        strings = ctypes.c_char_p * count
        program = ctypes.c_void_p()
        self._call(
            "CreateProgram",
            ctypes.byref(program),
            text.encode(),
            b"cuda.cu",
            count,
            strings(*[STANDARD] * count),
            strings(*[name.encode() for name in STANDARD_HEADERS]),
        )
        for kernel in kernels:
            self._call("AddNameExpression", program, kernel.encode())
        options = [f"--gpu-architecture=compute_{architecture}", "-std=c++17", "-default-device"]
        options += [f"-I{PLUGINS}/core", f"-I{PLUGINS}/include", f"-I{self.include}"]
        failed = self.library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        )
        log = self._text(program, "ProgramLog").decode(errors="replace").strip("\0\n ")
        if failed or re.search(r"\b(warning|error)\b", log):
            raise Failed(f"NVRTC for compute_{architecture}: {log[:4000]}")
        found = self._text(program, "PTX")
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        return found.rstrip(b"\0")

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, "nvrtc" + name)(*arguments)
        if code:
            raise Failed(f"nvrtc{name} fails with code {code}")

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw


def compile_hosts(include: list[Path], tensorrt: list[Path], work: Path, core: bool) -> str:
    """Both hosts, and the host's half of the core, with a version's headers."""
    flags: list[str | Path] = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-c",
        "-o",
        work / "host.o",
        "-DSDCT_WITH_CUDA",
    ]
    flags += [f"-I{PLUGINS}/include"] + [part for path in include for part in ("-isystem", path)]
    done = []
    if core:
        text = "".join((PLUGINS / "core" / name).read_text() for name in ("kernel.h", "cuda.cu"))
        names = {name for name in re.findall(r"\b(__\w+)\s*\(", text) if not re.fullmatch(NO_GPU_FUNCTION, name)}
        (work / "host.h").write_text(HOST + "".join(map(GPU_FUNCTION.format, sorted(names))))
        quiet = ["-Wno-attributes", "-Wno-unknown-pragmas", "-fsyntax-only"]  # it cannot assemble what is for the GPU
        run([CXX, *flags, *quiet, "-include", work / "host.h", "-x", "c++", PLUGINS / "core/cuda.cu"])
        done.append("the core's host half")
    run([CXX, *flags, PLUGINS / "onnxruntime/spectral_delta.cc"])
    done.append("ONNX Runtime's host")
    for directory in tensorrt:
        headers = directory if (directory / "NvInfer.h").exists() else directory / "include"
        for name in ("library", "node", "plugin_v2", "plugin_v3"):
            run([CXX, *flags, "-isystem", headers, PLUGINS / f"tensorrt/{name}.cpp"])
    if tensorrt:
        done.append(f"TensorRT's with {len(tensorrt)} sets of headers")
    return ", ".join(done)


def by_nvcc(place: Path, asked: str, work: Path) -> tuple[str, list[Path]]:
    """The core by nvcc, for each architecture; what was compiled, and where the headers are."""
    nvcc, include = place / "nvidia/cu13/bin/nvcc", place / "nvidia/cu13/include"
    numbers = chosen([int(number) for number in re.findall(r"sm_(\d+)\b", run([nvcc, "--list-gpu-code"]))], asked)
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-Wall,-Wextra", "-Xptxas", "-v", f"-I{PLUGINS}/include"]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    said = run([nvcc, *flags, "-c", PLUGINS / "core/cuda.cu", "-o", work / "cuda.o"])
    kernels = len(instantiated((PLUGINS / "core/cuda.cu").read_text()))
    registers = no_spills(said, kernels * len(numbers))
    listed = " ".join(map(str, numbers))
    return f"nvcc, {kernels} kernels for {listed}, at most {registers} registers, no spills", [include]


def by_nvrtc(place: Path, asked: str, work: Path, *, oldest: bool) -> tuple[str, list[Path]]:
    """The kernels by NVRTC and ptxas, for each architecture; what was compiled, and where the headers are."""
    nvrtc = Nvrtc(place)
    numbers = chosen(nvrtc.architectures(), asked)
    source = (PLUGINS / "core/cuda.cu").read_text()
    kernels = instantiated(source)
    registers = 0
    for number in numbers:
        for text in [source, "#undef __grid_constant__\n" + source] if oldest and number == numbers[0] else [source]:
            (work / "cuda.ptx").write_bytes(nvrtc.ptx(text, kernels, number))
            ptxas = place / "nvidia/cuda_nvcc/bin/ptxas"
            said = run([ptxas, f"-arch=sm_{number}", "-v", work / "cuda.ptx", "-o", work / "cuda.cubin"])
            registers = max(registers, no_spills(said, len(kernels)))
    listed = " ".join(map(str, numbers))
    what = f"NVRTC and ptxas, {len(kernels)} kernels for {listed}, at most {registers} registers, no spills"
    if oldest:
        what += ", the same without __grid_constant__"
    return what, [place / "nvidia/cuda_runtime/include", place / "nvidia/cuda_nvcc/include"]


def main() -> int:
    """Compile with each version asked for; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(WHEELS)}")
    parser.add_argument("--tensorrt", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--architectures", default="")
    parser.add_argument("--folder", type=Path, default=PLUGINS.parent / "build/toolchains")
    arguments = parser.parse_args()
    versions = arguments.versions or list(WHEELS)
    if unknown := [version for version in versions if version not in WHEELS]:
        parser.error(f"no wheels are known of CUDA {', '.join(unknown)}")
    if len(versions) > 1:  # a process each: they would share one NVRTC
        rest = [f"--architectures={arguments.architectures}", f"--folder={arguments.folder}"]
        rest += [f"--tensorrt={path}" for path in arguments.tensorrt]
        return max(
            subprocess.run([sys.executable, __file__, version, *rest], check=False).returncode for version in versions
        )

    version = versions[0]
    place = install(version, arguments.folder)
    if place is None:
        print(f"CUDA {version}: SKIPPED, its wheels cannot be had here", flush=True)
        return 0
    try:
        with tempfile.TemporaryDirectory() as name:
            if version.startswith("13"):
                what, include = by_nvcc(place, arguments.architectures, Path(name))
            else:
                what, include = by_nvrtc(
                    place, arguments.architectures, Path(name), oldest=version == next(iter(WHEELS))
                )
            hosts = compile_hosts(include, arguments.tensorrt, Path(name), core=not version.startswith("13"))
    except Failed as failure:
        print(f"CUDA {version}: FAILED, {failure}", flush=True)
        return 1
    print(f"CUDA {version}: {what}; g++, {hosts}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
