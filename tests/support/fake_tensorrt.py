"""Stand-ins for `tensorrt` and `cuda.bindings.runtime`: device memory is host memory, engines run on ONNX Runtime.

They follow what the real ones do where the backend depends on it: pointers may be used only while allocated, a context
keeps addresses and shapes, a captured stream runs nothing until its graph is launched, and a graph holds the addresses
it was captured with.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sdct_export.bundle.description import Bundle, file_sha256
from sdct_export.engine.build import ENGINE_FILE, PLUGIN_EMBEDDED, EngineManifest, Profile, profile_shapes

ENGINE = b"engine of "  # followed by the path of the ONNX file that says what it computes


class Cuda(types.ModuleType):
    """`cuda.bindings.runtime`."""

    class cudaError_t(enum.IntEnum):
        cudaSuccess = 0
        cudaErrorMemoryAllocation = 2
        cudaErrorInvalidValue = 1
        cudaErrorIllegalState = 401

    cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.memory: dict[int, Any] = {}
        self.free_bytes = 1 << 30
        self.capturing: dict[int, list[Any]] = {}
        self.graphs: dict[int, Any] = {}
        self.handles = 100
        self.calls: list[str] = []

    def check(self, pointer: int, nbytes: int) -> None:
        blocks = list(self.memory.items())  # one operation: other threads allocate meanwhile
        assert any(p <= pointer and pointer + nbytes <= p + len(b) for p, b in blocks), "bad pointer"

    def _handle(self) -> int:
        self.handles += 1
        return self.handles

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self.cudaError_t.cudaSuccess, 1

    def cudaMalloc(self, nbytes: int) -> tuple[Any, ...]:
        if nbytes > self.free_bytes:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        self.free_bytes -= nbytes
        buffer = (ctypes.c_char * nbytes)(*(b"\xa5" * min(nbytes, 64)))  # not zero: nobody may rely on that
        self.memory[ctypes.addressof(buffer)] = buffer
        return self.cudaError_t.cudaSuccess, ctypes.addressof(buffer)

    def cudaFree(self, pointer: int) -> tuple[Any, ...]:
        self.free_bytes += len(self.memory.pop(pointer))
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemsetAsync(self, pointer: int, value: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        self.check(pointer, nbytes)
        ctypes.memset(pointer, value, nbytes)
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[Any, ...]:
        assert stream not in self.capturing
        for pointer, on_device in ((to, kind in (1, 3)), (source, kind in (2, 3))):
            if on_device:
                self.check(pointer, nbytes)
        ctypes.memmove(to, source, nbytes)
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        self.capturing[stream] = []
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        if stream not in self.capturing:
            return self.cudaError_t.cudaErrorIllegalState, None
        graph = self._handle()
        self.graphs[graph] = self.capturing.pop(stream)
        return self.cudaError_t.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        executable = self._handle()
        self.graphs[executable] = self.graphs[graph]
        return self.cudaError_t.cudaSuccess, executable

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        self.calls.append("launch")
        for work in self.graphs[graph]:
            work()
        return (self.cudaError_t.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (self.cudaError_t.cudaSuccess,)

    cudaGraphDestroy = cudaGraphExecDestroy

    def __getattr__(self, name: str) -> Any:
        if name in ("cudaStreamCreateWithFlags", "cudaEventCreateWithFlags"):
            return lambda flags: (self.cudaError_t.cudaSuccess, self._handle())
        if name in (
            "cudaSetDevice",
            "cudaEventRecord",
            "cudaStreamWaitEvent",
            "cudaStreamSynchronize",
            "cudaGetLastError",
        ):
            return lambda *arguments: (self.cudaError_t.cudaSuccess,)
        raise AttributeError(name)


class Context:
    """`IExecutionContext`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self._engine.inputs
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        free = {
            dim: size
            for n, spec in self._engine.inputs.items()
            for dim, size in zip(spec.shape, self._shapes[n], strict=True)
        }
        return tuple(free.get(d, d) for d in self._engine.outputs[name].shape)

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self._addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses = dict(self._shapes), dict(self._addresses)

        def work() -> None:
            feeds = {}
            for name, spec in self._engine.inputs.items():
                dtype = self._engine.dtype(spec)
                nbytes = int(np.prod(shapes[name])) * dtype.itemsize
                self._engine.cuda.check(addresses[name], nbytes)
                array = np.frombuffer(ctypes.string_at(addresses[name], nbytes), dtype).reshape(shapes[name])
                feeds[name] = array.astype(np.int64) if "int64" in spec.type else array
            for name, array in zip(self._engine.outputs, self._engine.session.run(None, feeds), strict=True):
                self._engine.cuda.check(addresses[name], array.nbytes)
                ctypes.memmove(addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)

        queue = self._engine.cuda.capturing.get(stream)
        if queue is None:
            self._engine.cuda.calls.append("execute")
            work()
        else:
            queue.append(work)
        return True


class Engine:
    """`ICudaEngine`; like TensorRT 8 it takes int32 where the model takes int64."""

    def __init__(self, cuda: Cuda, model: str) -> None:
        self.cuda = cuda
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self.contexts = 0

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        spec = self.inputs.get(name) or self.outputs[name]
        kinds = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32"}
        return types.SimpleNamespace(name=kinds[self.dtype(spec).name])

    @staticmethod
    def dtype(spec: Any) -> np.dtype[Any]:
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return np.dtype(kinds.get(spec.type, np.int32))

    def create_execution_context(self) -> Context:
        self.contexts += 1
        return Context(self)


def install(monkeypatch: pytest.MonkeyPatch, version: str = "10.16.0") -> Any:
    """Put both stand-ins in the place of the real packages; returns the one of tensorrt."""
    cuda = Cuda()
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.cuda = cuda
    trt.TensorIOMode = types.SimpleNamespace(INPUT="input", OUTPUT="output")

    class ILogger:
        Severity = types.SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            if not data.startswith(ENGINE):
                self._logger.log(ILogger.Severity.ERROR, "magic tag does not match")
                return None
            trt.engine = Engine(cuda, data[len(ENGINE) :].decode())
            trt.host_code_allowed = self.engine_host_code_allowed
            return trt.engine

    trt.ILogger, trt.Runtime = ILogger, Runtime
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = cuda  # type: ignore[attr-defined]
    for name, module in (("tensorrt", trt), ("cuda", types.ModuleType("cuda")), ("cuda.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    return trt


def write_engine(path: Path, trt: Any, *, profile: Profile | None = None, **changes: Any) -> Bundle:
    """A fake engine and its manifest in the bundle at `path`."""
    bundle = Bundle.load(path)
    engine = path / ENGINE_FILE
    engine.write_bytes(ENGINE + str(bundle.model_path).encode())
    shapes = profile_shapes(bundle, profile or Profile())
    manifest = EngineManifest(bundle.model_sha256, file_sha256(engine), trt.__version__, PLUGIN_EMBEDDED, True, shapes)
    dataclasses.replace(manifest, **changes).write(engine)
    return bundle
