"""Stand-ins for `tensorrt` and `cuda.bindings.runtime`: device memory is host memory, engines run on ONNX Runtime.

They follow what the real ones do where the backend depends on it. Pointers may be used only while allocated. Work on a
stream waits until somebody waits for the stream: copies from and to page-locked memory see it as it is then, those
from pageable memory as it was when they were asked for, those to pageable memory wait themselves, and so does freeing.
A captured stream runs nothing until its graph is launched; a graph holds the addresses it was captured with, and
breaks when its execution context is changed. A context runs once with new shapes before it can be captured, needs
memory for its activations, and shares that with others only on one stream.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import json
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from sdct_export.bundle.description import Bundle, file_sha256
from sdct_export.engine import lower
from sdct_export.engine.build import ENGINE_FILE, PLUGIN_EMBEDDED, EngineManifest, Profile, engine_profiles
from sdct_export.engine.settings import writes_cache_in_place
from sdct_export.plugin_choice import parse_version

ENGINE = b"engine of "  # followed by the path of the ONNX file that says what it computes
IN_PLACE, APART = "in_place.engine.onnx", "apart.engine.onnx"  # where the graph of a cached bundle's engine lies
ALIGNMENT = 256  # of addresses that an execution context takes
ACTIVATIONS = 4096  # bytes an execution context needs


class Block:
    """Device memory, which begins where CUDA lets it; not of zeros: nobody may rely on that."""

    def __init__(self, nbytes: int) -> None:
        self._raw = (ctypes.c_char * (nbytes + ALIGNMENT))(*(b"\xa5" * min(nbytes, 64 + ALIGNMENT)))
        self._nbytes = nbytes
        self.address = -(-ctypes.addressof(self._raw) // ALIGNMENT) * ALIGNMENT

    def __len__(self) -> int:
        return self._nbytes


class Cuda(types.ModuleType):
    """`cuda.bindings.runtime`."""

    class cudaError_t(enum.IntEnum):
        cudaSuccess = 0
        cudaErrorMemoryAllocation = 2
        cudaErrorInvalidValue = 1
        cudaErrorIllegalState = 401
        cudaErrorStreamCaptureInvalidated = 901

    cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaHostAllocDefault = 0

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.memory: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.free_bytes = 1 << 30
        self.streams: dict[int, list[Callable[[], None]]] = {}  # what was asked for and has not run
        self.events: dict[int, Callable[[], None]] = {}  # runs what the event waits for
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.spoilt: set[int] = set()  # streams whose capture will fail
        self.failing_captures = 0
        self.graphs: dict[int, Any] = {}
        self.handles = 100
        self.calls: list[str] = []
        self._lock = threading.RLock()  # the device does one thing after the other

    def check(self, pointer: int, nbytes: int) -> None:
        blocks = list(self.memory.items())  # one operation: other threads allocate meanwhile
        assert any(p <= pointer and pointer + nbytes <= p + len(b) for p, b in blocks), "bad pointer"

    def _handle(self) -> int:
        self.handles += 1
        return self.handles

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Have `work` done after what the stream has to do."""
        assert stream not in self.capturing, "only kernels are captured here"
        with self._lock:
            self.streams[stream].append(work)

    def _run(self, stream: int) -> None:
        with self._lock:
            while self.streams[stream]:
                self.streams[stream].pop(0)()

    def _run_all(self) -> None:
        for stream in list(self.streams):
            self._run(stream)

    def _is_pinned(self, pointer: int, nbytes: int) -> bool:
        return any(p <= pointer and pointer + nbytes <= p + len(b) for p, b in list(self.pinned.items()))

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self.cudaError_t.cudaSuccess, 1

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self.cudaError_t.cudaSuccess, self.free_bytes, 1 << 30

    def cudaMalloc(self, nbytes: int) -> tuple[Any, ...]:
        assert nbytes > 0
        if nbytes > self.free_bytes:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        self.calls.append("malloc")
        self.free_bytes -= nbytes
        block = Block(nbytes)
        self.memory[block.address] = block
        return self.cudaError_t.cudaSuccess, block.address

    def cudaFree(self, pointer: int) -> tuple[Any, ...]:
        self.calls.append("free")
        self._run_all()
        self.free_bytes += len(self.memory.pop(pointer))
        return (self.cudaError_t.cudaSuccess,)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        assert nbytes > 0
        self.calls.append("malloc")
        buffer = (ctypes.c_char * nbytes)(*(b"\xa5" * min(nbytes, 64)))
        self.pinned[ctypes.addressof(buffer)] = buffer
        return self.cudaError_t.cudaSuccess, ctypes.addressof(buffer)

    def cudaFreeHost(self, pointer: int) -> tuple[Any, ...]:
        self.calls.append("free")
        self._run_all()
        del self.pinned[pointer]
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemsetAsync(self, pointer: int, value: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        self.check(pointer, nbytes)
        self.submit(stream, lambda: ctypes.memset(pointer, value, nbytes))
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[Any, ...]:
        def on_device(pointer: int) -> bool:
            return kind == 3 or (pointer == to) == (kind == 1)

        def copy() -> None:
            for pointer in (to, source):
                if on_device(pointer):
                    self.check(pointer, nbytes)
            ctypes.memmove(to, source, nbytes)

        host = None if kind == 3 else source if kind == 1 else to
        if host is None or self._is_pinned(host, nbytes):
            self.submit(stream, copy)
        elif kind == 1:
            before = ctypes.string_at(source, nbytes)
            self.check(to, nbytes)
            self.submit(stream, lambda: ctypes.memmove(to, before, nbytes) and None)
        else:
            self.submit(stream, copy)
            self._run(stream)
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemcpy2DAsync(
        self, to: int, pitch: int, source: int, other: int, width: int, rows: int, kind: int, stream: int
    ) -> tuple[Any, ...]:
        assert kind == 3
        assert width <= min(pitch, other)

        def copy() -> None:
            self.check(to, pitch * (rows - 1) + width)
            self.check(source, other * (rows - 1) + width)
            assert to + pitch * rows <= source or source + other * rows <= to, "copies overlap"
            for row in range(rows):
                ctypes.memmove(to + pitch * row, source + other * row, width)

        self.submit(stream, copy)
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        stream = self._handle()
        self.streams[stream] = []
        return self.cudaError_t.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self._run(stream)
        del self.streams[stream]
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        self._run(stream)
        return (self.cudaError_t.cudaSuccess,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        reached: list[bool] = []

        def run_up_to_here() -> None:
            with self._lock:
                while not reached:
                    self.streams[stream].pop(0)()

        self.submit(stream, lambda: reached.append(True))
        self.events[event] = run_up_to_here
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any, ...]:
        self.submit(stream, self.events.get(event, lambda: None))
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        self.capturing[stream] = []
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        if stream not in self.capturing:
            return self.cudaError_t.cudaErrorIllegalState, None
        captured = self.capturing.pop(stream)
        if stream in self.spoilt or self.failing_captures:
            self.spoilt.discard(stream)
            self.failing_captures = max(0, self.failing_captures - 1)
            self.calls.append("failed capture")
            return self.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        graph = self._handle()
        self.graphs[graph] = captured
        return self.cudaError_t.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        executable = self._handle()
        self.graphs[executable] = self.graphs[graph]
        return self.cudaError_t.cudaSuccess, executable

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        self.calls.append("launch")
        for work in self.graphs[graph]:
            self.submit(stream, work)
        return (self.cudaError_t.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (self.cudaError_t.cudaSuccess,)

    cudaGraphDestroy = cudaGraphExecDestroy

    def __getattr__(self, name: str) -> Any:
        if name == "cudaEventCreateWithFlags":
            return lambda flags: (self.cudaError_t.cudaSuccess, self._handle())
        if name in ("cudaSetDevice", "cudaGetLastError"):
            return lambda *arguments: (self.cudaError_t.cudaSuccess,)
        raise AttributeError(name)


class Context:
    """`IExecutionContext`, without memory of its own."""

    def __init__(self, engine: Engine, profile: int) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = 0
        self._changes = 0  # a graph breaks with the next one
        self._warm = False  # it ran with these shapes
        self.active_optimization_profile = profile

    def _use(self, pointer: int) -> None:
        self._engine.cuda.check(pointer, ACTIVATIONS)
        self._memory = pointer
        self._changes += 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self._engine.inputs
        assert self.active_optimization_profile >= 0, "no optimization profile was chosen"
        if self._engine.profiles:
            low, _, high = self._engine.profiles[self.active_optimization_profile][name]
            assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)), "outside of the profile"
        self._shapes[name] = tuple(shape)
        self._changes += 1
        self._warm = False
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        free = {
            dim: size
            for n, spec in self._engine.inputs.items()
            for dim, size in zip(spec.shape, self._shapes[n], strict=True)
        }
        return tuple(free.get(d, d) for d in self._engine.outputs[name].shape)

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert pointer % ALIGNMENT == 0, f"the address of {name} is not aligned"
        self._addresses[name] = pointer
        self._changes += 1
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda, changes = self._engine.cuda, self._changes
        shapes, addresses, memory = dict(self._shapes), dict(self._addresses), self._memory
        for past, present in self._engine.caches:
            assert (addresses[past] == addresses[present]) == self._engine.in_place, "presents are where they belong"
        self._engine.ran.append(self.active_optimization_profile)
        owner = self._engine.stream_of.setdefault(memory, stream)
        assert memory, "no memory for activations"
        assert owner == stream, "contexts that share memory run on two streams"

        def work() -> None:
            assert self._changes == changes, "the context of a graph was changed"
            cuda.check(memory, ACTIVATIONS)
            feeds = {}
            for name, spec in self._engine.inputs.items():
                dtype = self._engine.dtype(spec)
                nbytes = int(np.prod(shapes[name])) * dtype.itemsize
                cuda.check(addresses[name], nbytes)
                array = np.frombuffer(ctypes.string_at(addresses[name], nbytes), dtype).reshape(shapes[name])
                feeds[name] = array.astype(np.int64) if "int64" in spec.type else array
            self._engine.lengths += [shape[1] for name, shape in shapes.items() if name == "input_ids"]
            for name, array in zip(self._engine.outputs, self._engine.session.run(None, feeds), strict=True):
                cuda.check(addresses[name], array.nbytes)
                ctypes.memmove(addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)

        queue = cuda.capturing.get(stream)
        if queue is None:
            cuda.calls.append("execute")
            cuda.submit(stream, work)
            self._warm = True
        else:
            queue.append(work)
            if not self._warm:
                cuda.spoilt.add(stream)
        return True


class OldContext(Context):
    """Until TensorRT 10.0."""

    device_memory = property(None, Context._use)


class NewContext(Context):
    """From TensorRT 10.1 on."""

    def set_device_memory(self, pointer: int, nbytes: int) -> None:
        assert nbytes >= ACTIVATIONS
        self._use(pointer)


class Engine:
    """`ICudaEngine`; like TensorRT 8 it takes int32 where the model takes int64."""

    def __init__(self, cuda: Cuda, model: str, version: tuple[int, int]) -> None:
        self.cuda = cuda
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self.contexts = 0
        self.lengths: list[int] = []  # tokens of each run
        self.stream_of: dict[int, int] = {}  # by address of activations
        self.profiles: list[Any] = []  # of a language model with a cache
        self.ran: list[int] = []  # profile of each run, those that are captured included
        names = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.caches = [(name, name.replace("past_key_values", "present")) for name in names]
        self.in_place = model.endswith(IN_PLACE)
        self._version = version
        if version >= (10, 1):
            self.device_memory_size_v2 = ACTIVATIONS
        if version < (11, 0):
            self.device_memory_size = ACTIVATIONS
        if version >= (10, 0):
            self.create_execution_context = self._create
        else:
            self.create_execution_context_without_device_memory = self._create

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

    def _create(self, strategy: str = "user managed") -> Context:
        assert strategy == "user managed"  # activations are the lane's
        self.contexts += 1
        assert self._version >= (8, 6) or self.contexts == 1, "8.5 has one context a profile"
        profile = 0 if self.contexts == 1 or self._version >= (9, 0) else -1
        return (NewContext if self._version >= (10, 1) else OldContext)(self, profile)


def install(monkeypatch: pytest.MonkeyPatch, version: str = "10.16.0") -> Any:
    """Put both stand-ins in the place of the real packages; returns the one of tensorrt."""
    cuda = Cuda()
    number = int(version.split(".")[0]), int(version.split(".")[1])
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.cuda = cuda
    trt.TensorIOMode = types.SimpleNamespace(INPUT="input", OUTPUT="output")
    if number >= (10, 0):
        trt.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")

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
            model, _, profiles = data[len(ENGINE) :].decode().partition("\n")
            trt.engine = Engine(cuda, model, number)
            trt.engine.profiles = json.loads(profiles or "[]")
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
    """A fake engine and its manifest in the bundle at `path`.

    Of a language model with a cache it computes what the real one is built from, with bodies of `SpectralDelta`.
    """
    bundle = Bundle.load(path)
    engine = path / ENGINE_FILE
    version = parse_version(trt.__version__)
    profiles = engine_profiles(bundle, profile or Profile(), version)
    in_place, model = False, bundle.model_path
    if bundle.cache is not None:
        in_place = writes_cache_in_place(version)
        model = path / (IN_PLACE if in_place else APART)
        graph = onnx.load(bundle.model_path, load_external_data=False)
        onnx.save(lower.keep_in_buffers(graph, bundle.cache, in_place=in_place), model)
    told = json.dumps(profiles if bundle.cache is not None else [])
    engine.write_bytes(ENGINE + f"{model}\n{told}".encode())
    manifest = EngineManifest(
        bundle.model_sha256, file_sha256(engine), trt.__version__, PLUGIN_EMBEDDED, version >= (8, 6), profiles[0],
        profiles[1] if len(profiles) > 1 else {}, in_place,
    )  # fmt: skip
    dataclasses.replace(manifest, **changes).write(engine)
    return bundle
