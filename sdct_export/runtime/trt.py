"""TensorRT as a backend: one engine, pooled execution contexts, the adapter bank on the device. Never imports torch.

A request takes an execution context with its own stream and buffers. A context keeps the shapes it last ran with: it
runs once as it is, is then captured into a CUDA graph, and replays that for every later request of the same shapes. An
adapter is written into its slot on one copy stream; requests wait for that stream's last event before they start, on
the device. `bank` never writes a slot that a running request uses, so no request waits for another one's adapter.

Not yet run on a GPU: see docs/tensorrt.md.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..adapter.entries import Array
from ..bundle.description import Bundle, TensorSpec, file_sha256
from ..engine.build import ENGINE_FILE, PLUGIN, PLUGIN_EMBEDDED, PLUGIN_LIBRARY, EngineManifest, Log, load_plugin
from ..errors import AdapterFormatError, ConfigError, SdctError, UnsupportedError
from ..native import find_plugin
from .guarded import Guarded, Latch

MAX_CONTEXTS = 8  # each holds the engine's activations once

_DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

Key = tuple[tuple[str, tuple[int, ...], int], ...]  # per input: name, shape, and address where it is a bank tensor


class Cuda:
    """The few CUDA calls the backend makes, on one device; failures raise."""

    def __init__(self, device: int) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise UnsupportedError(
                "backend 'tensorrt' needs the package cuda-python; pip install 'sdct_export[tensorrt]'"
            ) from None
        self.api, self.device = runtime, device
        status, count = runtime.cudaGetDeviceCount()
        if status != runtime.cudaError_t.cudaSuccess or device >= count:
            found = count if status == runtime.cudaError_t.cudaSuccess else f"none ({status.name})"
            raise UnsupportedError(f"no CUDA device {device}; found: {found}. Check the driver with nvidia-smi")

    def __call__(self, function: str, *arguments: Any) -> Any:
        """The results of `cuda<function>`: None, one value, or a tuple."""
        status, *results = getattr(self.api, f"cuda{function}")(*arguments)
        if status == self.api.cudaError_t.cudaErrorMemoryAllocation:
            raise MemoryError("the CUDA device is out of memory")
        if status != self.api.cudaError_t.cudaSuccess:
            raise SdctError(f"CUDA call {function} failed with {status.name}; check the device with nvidia-smi")
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    def use(self) -> None:
        """Make the device the current one of this thread."""
        self("SetDevice", self.device)

    def upload(self, target: int, array: Array, stream: Any) -> None:
        """Copy a contiguous array; it may be freed when the call returns, the copy is ordered on `stream`."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self("MemcpyAsync", target, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, array: Array, source: int, stream: Any) -> None:
        """Copy into a contiguous array, complete once `stream` is."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self("MemcpyAsync", array.ctypes.data, source, array.nbytes, kind, stream)


class DeviceTensor:
    """Device memory of a bank tensor, freed with the last reference to it. Never empty."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._cuda = cuda
        self.shape, self.dtype = shape, dtype
        self.nbytes = max(1, int(np.prod(shape)) * dtype.itemsize)
        cuda.use()
        self.pointer = int(cuda("Malloc", self.nbytes))

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self._cuda.api.cudaFree(self.pointer)  # at interpreter exit the device may be gone; nothing to report


@dataclasses.dataclass(eq=False)
class _Context:
    """An execution context, its stream and buffers, for the shapes it last ran with."""

    execution: Any = None
    stream: Any = None
    key: Key | None = None
    buffers: dict[str, DeviceTensor] = dataclasses.field(default_factory=dict)
    outputs: dict[str, DeviceTensor] = dataclasses.field(default_factory=dict)
    held: tuple[DeviceTensor, ...] = ()  # bank tensors whose addresses a captured graph has
    graph: Any = None
    capturable: bool = True
    capturing: bool = False  # from before the stream does until after
    user: weakref.ref[_User] | None = None  # the request that has it
    used: int = 0  # larger than that of contexts not used since


class _User:
    """A request that may have a context."""


class _Pool(Guarded):
    """At most `limit` contexts, each used by one request at a time; that of a request that is gone is idle.

    One attribute of a context says whether it is idle, so an exception leaves nothing to repair.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._contexts: list[_Context] = []
        self._waiting: list[Latch] = []
        self._uses = 0

    def take(self, key: Key, user: _User) -> _Context:
        """An idle context, one prepared for `key` first, or a new, empty one; waits where all are in use."""
        while isinstance(found := self.atomically(self._find, key, user), Latch):
            found.wait()
        return found

    def give_back(self, user: _User) -> None:
        """What `user` has is idle again; may be called again, and where it has nothing."""
        self.atomically(self._give_back, user)

    def _find(self, key: Key, user: _User) -> _Context | Latch:
        idle = [c for c in self._contexts if c.user is None or c.user() is None]
        found = [c for c in idle if c.key == key]
        if not found and len(self._contexts) < self._limit:
            found = [_Context()]
            self._contexts += found
        if not found and not idle:
            latch = Latch()
            self._waiting.append(latch)
            return latch
        context = found[0] if found else min(idle, key=lambda c: c.used)
        context.user = weakref.ref(user)
        return context

    def _give_back(self, user: _User) -> None:
        for context in self._contexts:
            if context.user is not None and context.user() is user:
                self._uses += 1
                context.used = self._uses
                context.user = None
        while self._waiting:
            self._waiting[-1].wake()
            self._waiting.pop()


class TrtBackend:
    """An engine on a CUDA device; allocates and writes bank tensors (`bank.Memory`).

    Args:
        bundle: the bundle the engine was built from.
        device: `cuda` or `cuda:N`.
        engine: the engine file, default `model.engine` in the bundle.

    Raises:
        ConfigError: `device` has no such value.
        UnsupportedError: TensorRT, cuda-python, the plugin library or the device is missing.
        AdapterFormatError: the engine is missing, damaged, or of another bundle or TensorRT version.
    """

    native = True  # an engine holds the plugin, there is no other way

    def __init__(self, bundle: Bundle, device: str = "cuda", engine: str | Path | None = None) -> None:
        match = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
        if match is None:
            raise ConfigError(f"backend 'tensorrt' runs on device 'cuda' or 'cuda:N', got {device!r}")
        path = Path(engine) if engine is not None else bundle.path / ENGINE_FILE
        manifest = EngineManifest.load(path)
        if manifest.model_sha256 != bundle.model_sha256:
            raise AdapterFormatError(f"{path} was built from another model than {bundle.path}; build it again")
        try:
            import tensorrt as trt
        except ImportError:
            raise UnsupportedError(
                "backend 'tensorrt' needs the package tensorrt; pip install 'sdct_export[tensorrt]'"
            ) from None
        if str(trt.__version__) != manifest.tensorrt:
            raise AdapterFormatError(
                f"{path} was built by TensorRT {manifest.tensorrt}, this is {trt.__version__}; build the engine again"
            )
        if not path.is_file() or file_sha256(path) != manifest.engine_sha256:
            raise AdapterFormatError(f"{path} is missing or differs from its manifest; build the engine again")
        self._cuda = Cuda(int(match[1] or 0))
        self._cuda.use()
        self._manifest = manifest
        self._log = Log(trt)
        self._engine = self._load(trt, path)
        self.inputs: dict[str, tuple[int | str | None, ...]] = {n: s[2] for n, s in manifest.shapes.items()}
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {n: self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names}
        self._reads = [n for n in names if is_input[n]]  # TensorRT leaves out inputs that have no effect
        self.outputs: tuple[str, ...] = tuple(n for n in names if not is_input[n])
        self.graph: Mapping[str, TensorSpec] | None = None  # the manifest is compared instead
        self._dtypes = {n: self._dtype(n) for n in names}
        self._copies = self._cuda("StreamCreateWithFlags", self._cuda.api.cudaStreamNonBlocking)
        self._copied = self._cuda("EventCreateWithFlags", self._cuda.api.cudaEventDisableTiming)
        self._creating = Guarded()  # contexts are created one at a time
        self._pool = _Pool(MAX_CONTEXTS if manifest.concurrent else 1)

    @property
    def max_slots(self) -> int:
        """Most slots the engine's bank may have, 0 for a merged model."""
        return self._manifest.max_slots

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """A bank tensor of zeros on the device. Raises `MemoryError`."""
        tensor = DeviceTensor(self._cuda, shape, np.dtype(dtype))
        self._cuda("MemsetAsync", tensor.pointer, 0, tensor.nbytes, self._copies)
        self._cuda("EventRecord", self._copied, self._copies)
        return tensor

    def write(self, tensor: DeviceTensor, slot: int, row: Array) -> None:
        """`tensor[slot] = row` by one asynchronous copy; runs that start later see it."""
        self._cuda.use()
        row = np.ascontiguousarray(row, tensor.dtype)
        self._cuda.upload(tensor.pointer + slot * row.nbytes, row, self._copies)
        self._cuda("EventRecord", self._copied, self._copies)

    def read(self, tensor: DeviceTensor, slot: int) -> Array:
        """A copy of `tensor[slot]` in host memory."""
        self._cuda.use()
        row = np.empty(tensor.shape[1:], tensor.dtype)
        self._cuda.download(row, tensor.pointer + slot * row.nbytes, self._copies)
        self._cuda("StreamSynchronize", self._copies)
        return row

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        """Set the first slots of `target` to those of the smaller `source`."""
        self._cuda.use()
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._cuda("MemcpyAsync", target.pointer, source.pointer, source.nbytes, kind, self._copies)
        self._cuda("StreamSynchronize", self._copies)  # `source` may be freed next
        self._cuda("EventRecord", self._copied, self._copies)

    def run(self, inputs: Mapping[str, Array], bank: Mapping[str, DeviceTensor]) -> dict[str, Array]:
        """All outputs as arrays in host memory.

        Raises:
            ConfigError: an input is smaller or larger than the engine was built for.
            SdctError: TensorRT or CUDA failed.
        """
        self._check_sizes({n: a.shape for n, a in inputs.items()} | {n: t.shape for n, t in bank.items()})
        feeds = {n: np.ascontiguousarray(inputs[n], self._dtypes[n]) for n in self._reads if n in inputs}
        used = {n: bank[n] for n in self._reads if n in bank}
        key: Key = (
            *((n, a.shape, 0) for n, a in feeds.items()),
            *((n, t.shape, t.pointer) for n, t in used.items()),
        )
        self._cuda.use()
        user = _User()
        try:
            try:
                return self._run(user, key, feeds, used)
            finally:
                self._pool.give_back(user)
        finally:  # again: an exception may have cut the first off
            self._pool.give_back(user)

    def _load(self, trt: Any, path: Path) -> Any:
        if self._manifest.plugin == PLUGIN_LIBRARY:
            library = find_plugin(str(trt.__version__))
            if library is None:
                raise UnsupportedError(f"{path} needs the plugin library {PLUGIN}; see docs/tensorrt.md")
            load_plugin(trt, library)
        try:
            self._runtime = trt.Runtime(self._log.logger)
        except TypeError:  # how the bindings report a null pointer
            raise UnsupportedError(f"TensorRT {trt.__version__} cannot start: {self._log.reason()}") from None
        if self._manifest.plugin == PLUGIN_EMBEDDED:
            self._runtime.engine_host_code_allowed = True  # the plugin library inside the engine
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise AdapterFormatError(
                f"{path}: TensorRT {trt.__version__} cannot load it here ({self._log.reason()}); "
                "build the engine again on this GPU"
            )
        return engine

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise UnsupportedError(f"the engine's tensor {name!r} has type {kind}, which has no numpy counterpart")
        return _DTYPES[kind]

    def _check_sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            low, _, high = self._manifest.shapes[name]
            if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                raise ConfigError(
                    f"input {name!r} has shape {list(shape)}, the engine takes {list(low)} to {list(high)}; "
                    "split the batch, or build the engine for larger sizes"
                )

    def _run(
        self, user: _User, key: Key, feeds: Mapping[str, Array], bank: Mapping[str, DeviceTensor]
    ) -> dict[str, Array]:
        context = self._pool.take(key, user)
        try:
            return self._run_in(context, key, feeds, bank)
        except BaseException as error:
            self._reset(context)  # whatever state it is in, the next request starts afresh
            if isinstance(error, MemoryError):
                raise SdctError(
                    f"no device memory for a request of this size ({error}); use smaller batches"
                ) from error
            raise

    def _run_in(
        self, context: _Context, key: Key, feeds: Mapping[str, Array], bank: Mapping[str, DeviceTensor]
    ) -> dict[str, Array]:
        cuda = self._cuda
        if context.stream is None:
            self._fill(context)
        first = context.key != key
        if first:
            self._prepare(context, key, feeds, bank)
        for name, array in feeds.items():
            cuda.upload(context.buffers[name].pointer, array, context.stream)
        cuda("StreamWaitEvent", context.stream, self._copied, 0)
        if context.graph is not None or (not first and context.capturable and self._capture(context)):
            cuda("GraphLaunch", context.graph, context.stream)
        else:
            self._enqueue(context)
        results = {n: np.empty(t.shape, t.dtype) for n, t in context.outputs.items()}
        for name, array in results.items():
            if array.nbytes:
                cuda.download(array, context.outputs[name].pointer, context.stream)
        cuda("StreamSynchronize", context.stream)
        return results

    def _prepare(
        self, context: _Context, key: Key, feeds: Mapping[str, Array], bank: Mapping[str, DeviceTensor]
    ) -> None:
        """Give `context` the shapes, addresses and buffers of `key`."""
        self._reset(context)
        execution = context.execution
        context.buffers = {n: DeviceTensor(self._cuda, a.shape, a.dtype) for n, a in feeds.items()}
        tensors = context.buffers | dict(bank)
        for name, tensor in tensors.items():
            if not execution.set_input_shape(name, tensor.shape):
                raise SdctError(f"TensorRT refused input {name!r} of shape {list(tensor.shape)}: {self._log.reason()}")
        shapes = {n: tuple(execution.get_tensor_shape(n)) for n in self.outputs}
        context.outputs = {n: DeviceTensor(self._cuda, s, self._dtypes[n]) for n, s in shapes.items()}
        for name, tensor in (tensors | context.outputs).items():
            execution.set_tensor_address(name, tensor.pointer)
        context.held = tuple(bank.values())
        context.key = key

    def _capture(self, context: _Context) -> bool:
        """Capture one run into a CUDA graph; False where this engine cannot be captured."""
        cuda = self._cuda
        context.capturing = True
        cuda("StreamBeginCapture", context.stream, cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        done = context.execution.execute_async_v3(int(context.stream))
        status, graph = cuda.api.cudaStreamEndCapture(context.stream)
        context.capturing = False
        if not done or status != cuda.api.cudaError_t.cudaSuccess:
            cuda.api.cudaGetLastError()
            context.capturable = False
            return False
        context.graph = cuda("GraphInstantiate", graph, 0)
        cuda("GraphDestroy", graph)
        return True

    def _enqueue(self, context: _Context) -> None:
        if not context.execution.execute_async_v3(int(context.stream)):
            raise SdctError(f"TensorRT could not run the engine: {self._log.reason()}")

    def _fill(self, context: _Context) -> None:
        execution = self._creating.atomically(self._engine.create_execution_context)
        if execution is None:
            raise SdctError(f"TensorRT could not create an execution context: {self._log.reason()}")
        context.execution = execution
        context.stream = self._cuda("StreamCreateWithFlags", self._cuda.api.cudaStreamNonBlocking)

    def _reset(self, context: _Context) -> None:
        context.key = None  # first, so that whatever is cut off below, the next request comes here again
        if context.capturing:  # a stream left like that would run nothing any more
            self._cuda.api.cudaStreamEndCapture(context.stream)
            self._cuda.api.cudaGetLastError()  # it may not have begun, or have ended
            context.capturing = False
        if context.stream is not None:
            self._cuda.api.cudaStreamSynchronize(context.stream)
        graph, context.graph = context.graph, None
        if graph is not None:
            self._cuda.api.cudaGraphExecDestroy(graph)
        context.buffers, context.outputs, context.held = {}, {}, ()
