"""The native parts on a GPU: built for the GPU of this machine, and called through ctypes. Needs numpy, no torch.

`build()` gives the folder with the driver, the libraries and the C binding (plugins/tests/gpu_binding.cu), `Gpu` the
binding. Importing this touches no CUDA.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import cuda_driver
import numpy as np
from native_cases import DTYPES, Array, Case

ROOT = Path(__file__).parents[2]
BUILD = "SDCT_GPU_BUILD"  # a folder that was built before, elsewhere perhaps
MAX_PROJECTIONS = 8


class Missing(Exception):
    """Something this machine lacks; the message is the reason to skip."""


def build() -> Path:
    """Build everything for this machine's GPU into build/gpu, or take the folder that SDCT_GPU_BUILD names.

    The plugin needs TensorRT's headers (TENSORRT_INCLUDE_DIR); without them the rest is built.

    Raises:
        Missing: no compiler, or no GPU. RuntimeError: the build fails; the message has the end of its output.
    """
    named = os.environ.get(BUILD)
    if named:
        if not Path(named, "sdct_driver").is_file():
            raise Missing(f"{BUILD}={named} holds no sdct_driver")
        return Path(named).resolve()
    for tool in ("cmake", "nvcc"):
        if shutil.which(tool) is None:
            raise Missing(f"{tool} is not on the PATH, and {BUILD} names no folder built elsewhere")
    folder = ROOT / "build" / "gpu"
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DCMAKE_CUDA_ARCHITECTURES={_architecture()}"]
    command += ["-DSDCT_BENCHMARKS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    for step in (command, ["cmake", "--build", str(folder), "-j", str(os.cpu_count() or 1)]):
        done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(step)} failed:\n{done.stdout[-4000:]}")
    return folder


def is_stand_in(folder: Path) -> bool:
    """Whether a build folder's GPU is a CPU that executes PTX (plugins/tests/ptx)."""
    return (folder / "libsdct_ptx.so").is_file()


def _architecture() -> str:
    """What CMake calls the GPU of this machine."""
    found = cuda_driver.gpu()
    if found.why:
        raise Missing(f"no GPU here: {found.why}")
    return f"{10 * found.capability[0] + found.capability[1]}-real"


class _Shape(ctypes.Structure):
    _fields_ = (
        ("d_in", ctypes.c_int32),
        ("projections", ctypes.c_int32),
        ("d_out", ctypes.c_int32 * MAX_PROJECTIONS),
        ("capacity", ctypes.c_int32 * MAX_PROJECTIONS),
    )


class Problem(ctypes.Structure):
    """`sdct::Problem`; pointers into device memory."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("blends", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("token_row", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("y_in", ctypes.c_void_p * MAX_PROJECTIONS),
        ("y_out", ctypes.c_void_p * MAX_PROJECTIONS),
        ("y_in_stride", ctypes.c_int64 * MAX_PROJECTIONS),
        ("y_out_stride", ctypes.c_int64 * MAX_PROJECTIONS),
    )


class Memory:
    """A copy of an array on the device, freed with the object."""

    def __init__(self, gpu: Gpu, array: Array) -> None:
        self._gpu, self._like = gpu, np.ascontiguousarray(array)
        pointer = ctypes.c_void_p()
        gpu.call("alloc", ctypes.c_size_t(self._like.nbytes), ctypes.byref(pointer))
        self.pointer = pointer.value or 0
        self.write(self._like)

    def write(self, array: Array) -> None:
        array = np.ascontiguousarray(array, self._like.dtype)
        assert array.shape == self._like.shape
        self._copy(self.pointer, array.ctypes.data)

    def read(self) -> Array:
        out = np.empty_like(self._like)
        self._copy(out.ctypes.data, self.pointer)
        return out

    def _copy(self, target: int, source: int) -> None:
        self._gpu.call("copy", ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(self._like.nbytes))

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self._gpu.library.sdct_gpu_free(ctypes.c_void_p(self.pointer))


class OnDevice:
    """A case's tensors in device memory and the problem that names them; in place where the case says so."""

    def __init__(self, gpu: Gpu, case: Case) -> None:
        self.case = case
        arrays = [case.x, case.ids, case.scales, case.values, case.indices]
        arrays += [] if case.token_row is None else [case.token_row]
        self._inputs = [Memory(gpu, array) for array in arrays]
        self.y = [Memory(gpu, y) for y in case.y]
        poison = [np.full_like(y.view(np.uint8), 0xCD).view(y.dtype) for y in case.y]
        self.out = self.y if case.in_place else [Memory(gpu, array) for array in poison]
        pointers = [memory.pointer for memory in self._inputs]
        self.problem = Problem(
            type=DTYPES.index(case.dtype),
            rows=case.ids.shape[0],
            blends=case.ids.shape[1],
            slots=len(case.values),
            tokens=len(case.x),
            token_row=None if case.token_row is None else pointers[5],
            x=pointers[0],
            x_stride=case.x.shape[1],
            ids=pointers[1],
            scales=pointers[2],
            values=pointers[3],
            indices=pointers[4],
        )
        for j, y in enumerate(case.y):
            self.problem.y_in[j], self.problem.y_out[j] = self.y[j].pointer, self.out[j].pointer
            self.problem.y_in_stride[j] = self.problem.y_out_stride[j] = y.shape[1]

    def results(self) -> list[Array]:
        return [memory.read() for memory in self.out]


class Node:
    """A prepared node: `launch` and `run` compute problems of its shape, `time` measures them."""

    def __init__(self, gpu: Gpu, d_in: int, d_out: Sequence[int], capacity: Sequence[int]) -> None:
        self._gpu, self._handle = gpu, ctypes.c_void_p()
        shape = _Shape(d_in=d_in, projections=len(d_out))
        shape.d_out[: len(d_out)], shape.capacity[: len(capacity)] = d_out, capacity
        gpu.call("create", ctypes.byref(shape), ctypes.byref(self._handle))

    def launch(self, problem: Problem, stream: int) -> None:
        """Start on the caller's stream."""
        self._gpu.call("launch", self._handle, ctypes.byref(problem), ctypes.c_void_p(stream))

    def run(self, problem: Problem, *, captured: bool = False) -> None:
        """Compute on a stream of its own, through a CUDA graph where `captured`, and wait."""
        self._gpu.call("run", self._handle, ctypes.byref(problem), ctypes.c_int32(captured))

    def time(self, problems: Sequence[Problem], *, launches: int = 1, repeats: int = 50) -> float:
        """Median milliseconds of one launch, in a graph of `launches` that take turns over `problems`, L2 flushed."""
        return self._gpu.time_graph(self._handle, problems, launches, repeats)

    def __del__(self) -> None:
        self._gpu.library.sdct_gpu_destroy(self._handle)


class Gpu:
    """The C binding in a build folder. Raises `Missing` where it was not built or finds no GPU."""

    def __init__(self, folder: Path) -> None:
        path = folder / "libsdct_gpu.so"
        if not path.is_file():
            raise Missing(f"{folder} holds no {path.name}; build with -DSDCT_BENCHMARKS=ON and a CUDA compiler")
        self.library = ctypes.CDLL(str(path))
        self.library.sdct_gpu_error.restype = ctypes.c_char_p
        self.library.sdct_gpu_free.restype = self.library.sdct_gpu_destroy.restype = None
        sizes = (ctypes.c_size_t * 2)()
        self.library.sdct_gpu_sizes(ctypes.byref(sizes, 0), ctypes.byref(sizes, ctypes.sizeof(ctypes.c_size_t)))
        if list(sizes) != [ctypes.sizeof(_Shape), ctypes.sizeof(Problem)]:
            raise RuntimeError(f"{path} has other structures than sdct.h had when native_gpu.py was written")
        name, numbers = ctypes.create_string_buffer(256), (ctypes.c_int64 * 7)()
        try:
            self.call("info", name, ctypes.c_size_t(256), numbers)
        except RuntimeError as error:
            raise Missing(f"CUDA finds no GPU it can use: {error}") from error
        self.name = name.value.decode()
        self.cuda_driver, self.cuda_runtime, *rest = numbers
        self.capability = f"{rest[0]}.{rest[1]}"
        self.multiprocessors, self.l2_bytes, self.memory_bytes = rest[2:]

    def call(self, function: str, *arguments: object) -> None:
        """`sdct_gpu_<function>`; RuntimeError where it fails."""
        if getattr(self.library, f"sdct_gpu_{function}")(*arguments):
            raise RuntimeError(f"{function}: {self.library.sdct_gpu_error().decode()}")

    def node(self, case: Case) -> Node:
        return Node(self, case.x.shape[1], [y.shape[1] for y in case.y], case.capacity)

    def time_graph(
        self, node: ctypes.c_void_p | None, problems: Sequence[Problem], launches: int, repeats: int
    ) -> float:
        times = (ctypes.c_float * repeats)()
        array = (Problem * max(1, len(problems)))(*problems)
        sizes = [ctypes.c_int32(n) for n in (len(problems), launches, repeats)]
        self.call("time_run", node, array, *sizes, times)
        return float(np.median(times)) / launches

    def time_empty(self, *, launches: int = 1, repeats: int = 50) -> float:
        """Median milliseconds of launching a kernel that does nothing, measured like a node."""
        return self.time_graph(None, [], launches, repeats)

    def copy_bandwidth(self, nbytes: int = 1 << 30, repeats: int = 20) -> float:
        """Bytes read plus bytes written in a second, by the median of copies of `nbytes` within device memory."""
        times = (ctypes.c_float * repeats)()
        self.call("time_copy", ctypes.c_size_t(nbytes), ctypes.c_int32(repeats), times)
        return 2 * nbytes / (float(np.median(times)) / 1e3)
