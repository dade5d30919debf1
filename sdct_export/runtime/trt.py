"""TensorRT as a backend: one engine, lanes that run requests, the adapter bank on the device. Never imports torch.

A request takes a lane: a stream, device memory for the largest inputs, outputs and activations of the engine, and
page-locked host memory, all allocated once. A lane keeps several shapes prepared. Each has an execution context of its
own (a graph holds only while its context is left alone), all in the lane's one block of activations. The first request
of a shape runs as it is and is captured into a CUDA graph at once, the later ones replay it. So that a few shapes
serve all lengths, these are rounded up to those of `buckets`, where the model reads a mask and masked tokens change
nothing in its results, which is tried out when it is loaded. What a model gives for masked tokens themselves is
undefined.

An adapter is written into its slot on one copy stream; requests wait for that stream's last event before they start,
on the device. `bank` never writes a slot that a running request uses, so no request waits for another one's adapter.
A bank that was outgrown is freed with the last request that runs in it.

Not yet run on a GPU: see docs/tensorrt.md.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .. import contract
from ..adapter.entries import Array
from ..bundle.description import Bundle, TensorSpec, file_sha256
from ..engine.build import ENGINE_FILE, PLUGIN, PLUGIN_EMBEDDED, PLUGIN_LIBRARY, EngineManifest, Log, load_plugin
from ..errors import AdapterFormatError, ConfigError, SdctError, UnsupportedError
from ..native import find_plugin
from .buckets import MASK, Buckets, probe_inputs
from .cuda import Cuda, DeviceMemory, DeviceTensor, Graph, HostMemory, Stream
from .guarded import Guarded
from .lanes import Key, Lane, Pool, Prepared, User
from .trt_steps import Memory, TrtSteps

MAX_LANES = 8  # requests on the device at a time; each lane holds the engine's activations once
MAX_SHAPES = 8  # prepared in a lane; each has an execution context and a graph
STAGING_BYTES = 64 << 20  # most page-locked memory for outputs; larger ones pass through it in pieces

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
        SdctError: the device has no room for the engine's largest sizes.
    """

    native = True  # an engine holds the plugin, there is no other way

    def __init__(self, bundle: Bundle, device: str = "cuda", engine: str | Path | None = None) -> None:
        match = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
        if match is None:
            raise ConfigError(f"backend 'tensorrt' runs on device 'cuda' or 'cuda:N', got {device!r}")
        try:
            import tensorrt as trt
        except ImportError:
            raise UnsupportedError(
                "backend 'tensorrt' needs the package tensorrt; pip install 'sdct_export[tensorrt]'"
            ) from None
        path = Path(engine) if engine is not None else bundle.path / ENGINE_FILE
        manifest = EngineManifest.load(path)
        if manifest.model_sha256 != bundle.model_sha256:
            raise AdapterFormatError(f"{path} was built from another model than {bundle.path}; build it again")
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
        self._trt = trt
        self._engine = self._load(trt, path)
        self.inputs: dict[str, tuple[int | str | None, ...]] = {n: s[2] for n, s in manifest.shapes.items()}
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {n: self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names}
        self._reads = [n for n in names if is_input[n]]  # TensorRT leaves out inputs that have no effect
        self.outputs: tuple[str, ...] = tuple(n for n in names if not is_input[n])
        self._cache = bundle.cache
        self._presents = () if bundle.cache is None else bundle.cache.presents
        self._pasts = () if bundle.cache is None else bundle.cache.pasts
        if (
            bundle.cache is not None
        ):  # as the bundle's own graph has it; `TrtSteps` knows what the engine takes instead
            del self.inputs[contract.KEPT]
            self.inputs[contract.ATTENTION_MASK] = self.inputs[contract.INPUT_IDS]
        self.graph: Mapping[str, TensorSpec] | None = None  # the manifest is compared instead
        self._dtypes = {n: self._dtype(n) for n in names}
        self._copies = Stream(self._cuda)
        self._copied = self._cuda("EventCreateWithFlags", self._cuda.api.cudaEventDisableTiming)
        self._creating = Guarded()  # execution contexts are created one at a time
        # without shared profiles an engine has one context, and so one shape at a time
        self._shapes = MAX_SHAPES if manifest.concurrent else 1
        self._pool = Pool(MAX_LANES if manifest.concurrent else 1)
        self._spare: list[Any] = []
        self._largest = self._largest_outputs()
        self.buckets: Buckets | None = None  # None where lengths are as they come
        self.buckets = self._find_buckets(bundle)

    @property
    def max_slots(self) -> int:
        """Most slots the engine's bank may have, 0 for a merged model."""
        return self._manifest.max_slots

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """A bank tensor of zeros on the device. Raises `MemoryError`."""
        tensor = DeviceTensor(self._cuda, shape, np.dtype(dtype))
        self._cuda("MemsetAsync", tensor.pointer, 0, tensor.nbytes, self._copies.handle)
        self._cuda("EventRecord", self._copied, self._copies.handle)
        return tensor

    def write(self, tensor: DeviceTensor, slot: int, row: Array) -> None:
        """`tensor[slot] = row` by one asynchronous copy; runs that start later see it."""
        self._cuda.use()
        row = np.ascontiguousarray(row, tensor.dtype)
        self._cuda.upload(tensor.pointer + slot * row.nbytes, row.ctypes.data, row.nbytes, self._copies.handle)
        self._cuda("EventRecord", self._copied, self._copies.handle)

    def read(self, tensor: DeviceTensor, slot: int) -> Array:
        """A copy of `tensor[slot]` in host memory."""
        self._cuda.use()
        row = np.empty(tensor.shape[1:], tensor.dtype)
        self._cuda.download(row.ctypes.data, tensor.pointer + slot * row.nbytes, row.nbytes, self._copies.handle)
        self._cuda("StreamSynchronize", self._copies.handle)
        return row

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        """Set the first slots of `target` to those of the smaller `source`."""
        self._cuda.use()
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._cuda("MemcpyAsync", target.pointer, source.pointer, source.nbytes, kind, self._copies.handle)
        self._cuda("StreamSynchronize", self._copies.handle)  # `source` may be freed next
        self._cuda("EventRecord", self._copied, self._copies.handle)

    def run(self, inputs: Mapping[str, Array], bank: Mapping[str, DeviceTensor]) -> dict[str, Array]:
        """All outputs as arrays in host memory.

        Raises:
            ConfigError: an input is smaller or larger than the engine was built for.
            SdctError: TensorRT or CUDA failed.
        """
        if self._cache is not None:
            raise ConfigError(
                "an engine with a key-value cache computes the logits of a row's last token alone; use generate, or "
                "run the bundle with ONNX Runtime"
            )
        self._check_sizes({n: a.shape for n, a in inputs.items()} | {n: t.shape for n, t in bank.items()})
        if self.buckets is None:
            return self._request(inputs, bank)
        return self.buckets.cut(self._request(self.buckets.pad(inputs), bank), inputs[MASK].shape[1])

    def steps(self, cache: contract.Cache, slots: int, max_length: int) -> TrtSteps:
        """An empty cache of so many slots, each for at most `max_length` tokens.

        Raises `ConfigError` where the engine was built for fewer, `MemoryError`.
        """
        self._cuda.use()
        return TrtSteps(self, self._manifest, cache, slots, max_length)

    def step(self, profile: int, inputs: Mapping[str, Array], bank: Memory, presents: Memory) -> dict[str, Array]:
        """As `run`, in an optimization profile, with the cache: pasts among `bank`, `presents` where they go."""
        self._check_sizes({n: a.shape for n, a in inputs.items()} | {n: t.shape for n, t in bank.items()}, profile)
        return self._request(inputs, bank, presents, profile)

    def move(self, source: int, pitch: int, target: int, other: int, nbytes: int, rows: int) -> None:
        """Copy `nbytes` of each of `rows`, which are `pitch` bytes apart at the source and `other` at the target.

        Requests that start later wait for it.
        """
        self._cuda.use()
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._cuda("Memcpy2DAsync", target, other, source, pitch, nbytes, rows, kind, self._copies.handle)
        self._cuda("EventRecord", self._copied, self._copies.handle)

    def clear(self, target: int, nbytes: int) -> None:
        """Set so many bytes to zero. Requests that start later wait for it."""
        self._cuda.use()
        self._cuda("MemsetAsync", target, 0, nbytes, self._copies.handle)
        self._cuda("EventRecord", self._copied, self._copies.handle)

    def _request(
        self,
        inputs: Mapping[str, Array],
        bank: Memory,
        presents: Memory | None = None,
        profile: int = 0,
    ) -> dict[str, Array]:
        """As `run`, with shapes as they are."""
        feeds = {n: inputs[n] for n in self._reads if n in inputs}
        used = {n: bank[n] for n in self._reads if n in bank}
        key: Key = (
            ("", (profile,), 0),
            *((n, a.shape, 0) for n, a in feeds.items()),
            *((n, t.shape, t.pointer) for n, t in (*used.items(), *(presents or {}).items())),
        )
        self._cuda.use()
        user = User()
        try:
            try:
                return self._run(user, key, feeds, used, presents or {})
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

    def _check_sizes(self, shapes: Mapping[str, tuple[int, ...]], profile: int = 0) -> None:
        limits = self._manifest.decode if profile else self._manifest.shapes
        for name, shape in shapes.items():
            low, _, high = limits[name]
            if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                raise ConfigError(
                    f"input {name!r} has shape {list(shape)}, the engine takes {list(low)} to {list(high)}; "
                    "split the batch, or build the engine for larger sizes"
                )

    def _find_buckets(self, bundle: Bundle) -> Buckets | None:
        """Buckets for lengths, where a trial shows that masked tokens change no result."""
        if bundle.cache is not None:
            return None
        inputs = probe_inputs(bundle)
        buckets = Buckets.of(bundle, self._reads, self._manifest.shapes[MASK][2][1]) if MASK in self._reads else None
        if buckets is None or inputs is None:
            return None
        shapes = self._manifest.shapes
        rows = min(max(len(inputs[MASK]), shapes[MASK][0][0]), shapes[MASK][2][0])
        inputs = {name: np.resize(array, (rows, *array.shape[1:])) for name, array in inputs.items()}
        bank = {n: self.zeros(low, self._dtypes[n]) for n, (low, _, _) in shapes.items() if n in self._bank_reads}
        for name in {contract.ADAPTER_IDS, contract.ADAPTER_SCALES} & shapes.keys():
            inputs[name] = np.zeros((rows, shapes[name][0][1]), np.int32 if "ids" in name else np.float32)
        try:
            self._check_sizes({n: a.shape for n, a in inputs.items()})
        except ConfigError:  # the engine was built for other sizes
            return None
        harmless = buckets.is_harmless(lambda given: self._request(given, bank), inputs, bundle.dtype)
        return buckets if harmless else None

    def _run(
        self,
        user: User,
        key: Key,
        feeds: Mapping[str, Array],
        bank: Memory,
        presents: Memory,
    ) -> dict[str, Array]:
        while True:
            lane = self._pool.take(key, user)
            try:
                self._clean(lane)  # what an exception may have left
                if lane.stream is None:
                    self._fill(lane)
                break
            except MemoryError as error:
                if not self._pool.do_without(lane):
                    raise SdctError(
                        f"no device memory for the largest sizes of this engine ({error}); build it for smaller ones"
                    ) from error
        try:
            return self._run_in(lane, key, feeds, bank, presents)
        except BaseException as error:
            self._clean(lane)  # whatever state it is in, the next request starts afresh
            if isinstance(error, MemoryError):
                raise SdctError(f"no device memory for another shape ({error}); build the engine for fewer") from error
            raise

    def _run_in(
        self,
        lane: Lane,
        key: Key,
        feeds: Mapping[str, Array],
        bank: Memory,
        presents: Memory,
    ) -> dict[str, Array]:
        assert lane.stream is not None
        cuda, stream = self._cuda, lane.stream.handle
        prepared = self._prepare(lane, key, feeds, bank, presents)
        for name, array in feeds.items():
            dtype = self._dtypes[name]
            nbytes = array.size * dtype.itemsize
            np.copyto(lane.sent[name].array[:nbytes].view(dtype).reshape(array.shape), array, casting="unsafe")
            cuda.upload(lane.inputs[name].pointer, lane.sent[name].pointer, nbytes, stream)
        cuda("StreamWaitEvent", stream, self._copied, 0)
        if prepared.graph is not None:
            cuda("GraphLaunch", prepared.graph.handle, stream)
        else:
            if not prepared.execution.execute_async_v3(int(stream)):
                raise SdctError(f"TensorRT could not run the engine: {self._log.reason()}")
            if prepared.runs == prepared.capture_at and not self._capture(lane, prepared):  # while the device works
                prepared.capture_at = 2 * prepared.runs + 1
            prepared.runs += 1
        results = self._receive(lane, prepared)
        lane.busy = None
        return results

    def _receive(self, lane: Lane, prepared: Prepared) -> dict[str, Array]:
        """The outputs, through page-locked memory; returns once the stream is done."""
        assert lane.stream is not None
        assert lane.received is not None
        cuda, stream, staging = self._cuda, lane.stream.handle, lane.received
        results = {n: np.empty(shape, self._dtypes[n]) for n, shape in prepared.outputs.items()}
        waiting: list[tuple[Array, int]] = []  # where bytes belong, and where in the staging memory they arrive
        filled = 0
        for name, result in results.items():
            flat = result.reshape(-1).view(np.uint8)
            done = 0
            while done < flat.size:
                if filled == staging.nbytes:
                    self._unload(staging, waiting, stream)
                    waiting, filled = [], 0
                size = min(flat.size - done, staging.nbytes - filled)
                cuda.download(staging.pointer + filled, lane.outputs[name].pointer + done, size, stream)
                waiting.append((flat[done : done + size], filled))
                done, filled = done + size, filled + size
        self._unload(staging, waiting, stream)
        return results

    def _unload(self, staging: HostMemory, waiting: Sequence[tuple[Array, int]], stream: Any) -> None:
        self._cuda("StreamSynchronize", stream)
        for target, start in waiting:
            target[:] = staging.array[start : start + target.size]

    def _prepare(
        self,
        lane: Lane,
        key: Key,
        feeds: Mapping[str, Array],
        bank: Memory,
        presents: Memory,
    ) -> Prepared:
        """The lane's execution context for `key`: one that has these shapes and addresses, or one that gets them."""
        prepared = next((one for one in lane.prepared if one.key == key), None)
        if prepared is None:
            prepared = self._place(lane, key[0][1][0])
            lane.busy = prepared
            execution = prepared.execution
            shapes = {n: a.shape for n, a in feeds.items()} | {n: t.shape for n, t in bank.items()}
            self._set_shapes(execution, shapes)
            prepared.outputs = {n: tuple(execution.get_tensor_shape(n)) for n in lane.outputs}
            for name, memory in (lane.inputs | lane.outputs | dict(bank) | dict(presents)).items():
                if not execution.set_tensor_address(name, memory.pointer):
                    raise SdctError(f"TensorRT refused the address of {name!r}: {self._log.reason()}")
            prepared.runs = prepared.capture_at = 0
            prepared.key = key
        lane.busy = prepared
        prepared.bank = tuple(weakref.ref(tensor.owner) for tensor in (*bank.values(), *presents.values()))
        prepared.used = 1 + max(one.used for one in lane.prepared)
        return prepared

    def _place(self, lane: Lane, profile: int) -> Prepared:
        """One that is of no use any more, a new one, or the one not used for longest; not ready for anything."""
        places = [one for one in lane.prepared if one.profile == profile]
        place = next((one for one in places if one.is_stale()), None)
        if place is None and len(places) >= self._shapes:
            place = min(places, key=lambda one: one.used)
        if place is None:
            place = Prepared(self._create(lane, profile), profile)
            lane.prepared += [place]
        place.key = None
        place.graph = None
        return place

    def _set_shapes(self, execution: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if not execution.set_input_shape(name, shape):
                raise SdctError(f"TensorRT refused input {name!r} of shape {list(shape)}: {self._log.reason()}")

    def _capture(self, lane: Lane, prepared: Prepared) -> bool:
        """Capture a run into a CUDA graph; False where that fails."""
        assert lane.stream is not None
        cuda, stream = self._cuda, lane.stream.handle
        lane.capturing = True
        cuda("StreamBeginCapture", stream, cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        done = prepared.execution.execute_async_v3(int(stream))
        status, captured = cuda.api.cudaStreamEndCapture(stream)
        lane.capturing = False
        if not done or status != cuda.api.cudaError_t.cudaSuccess:
            cuda.api.cudaGetLastError()
            return False
        prepared.graph = Graph(cuda, captured)
        return True

    def _largest_outputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output for the largest inputs."""
        execution = self._create(None)
        self._set_shapes(execution, {n: self._manifest.shapes[n][2] for n in self._reads})
        found = {n: tuple(execution.get_tensor_shape(n)) for n in self.outputs}
        self._spare = [execution]  # without shared profiles there is no other
        for name, shape in found.items():
            if any(extent < 0 for extent in shape):
                raise UnsupportedError(f"output {name!r} has extents {list(shape)} that depend on the data")
        return found

    def _create(self, lane: Lane | None, profile: int = 0) -> Any:
        """An execution context for an optimization profile that computes in the lane's activations."""
        execution = self._creating.atomically(self._new_execution)
        if execution is None:
            raise SdctError(f"TensorRT could not create an execution context: {self._log.reason()}")
        if lane is not None and lane.activations is not None and self._activation_bytes:
            if hasattr(execution, "set_device_memory"):  # from 10.1 on
                execution.set_device_memory(lane.activations.pointer, lane.activations.nbytes)
            else:
                execution.device_memory = lane.activations.pointer
        if lane is not None and lane.stream is not None and execution.active_optimization_profile != profile:
            # TensorRT chooses the first by itself, 8.6 for the first context only
            execution.set_optimization_profile_async(profile, int(lane.stream.handle))
        return execution

    def _new_execution(self) -> Any:
        if self._spare:
            return self._spare.pop()
        strategy = getattr(self._trt, "ExecutionContextAllocationStrategy", None)  # from 10 on
        if strategy is None:
            return self._engine.create_execution_context_without_device_memory()
        return self._engine.create_execution_context(strategy.USER_MANAGED)

    @property
    def _activation_bytes(self) -> int:
        newer = hasattr(self._engine, "device_memory_size_v2")  # from 10.1 on
        return int(self._engine.device_memory_size_v2 if newer else self._engine.device_memory_size)

    def _fill(self, lane: Lane) -> None:
        """Allocate everything for the largest sizes."""
        cuda = self._cuda
        own = [n for n in self._reads if n not in self._bank_reads and n not in self._pasts]
        sizes = {n: self._nbytes(n, self._manifest.shapes[n][2]) for n in own}
        results = {n: self._nbytes(n, shape) for n, shape in self._largest.items() if n not in self._presents}
        lane.activations = DeviceMemory(cuda, self._activation_bytes)
        lane.inputs = {n: DeviceMemory(cuda, size) for n, size in sizes.items()}
        lane.outputs = {n: DeviceMemory(cuda, size) for n, size in results.items()}
        lane.sent = {n: HostMemory(cuda, size) for n, size in sizes.items()}
        lane.received = HostMemory(cuda, min(sum(results.values()), STAGING_BYTES))
        lane.stream = Stream(cuda)

    def _nbytes(self, name: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self._dtypes[name].itemsize

    @property
    def _bank_reads(self) -> list[str]:
        return [name for name in self._reads if name.startswith("sdct.")]

    def _clean(self, lane: Lane) -> None:
        """Make a lane whose last run was cut off ready for the next; where it ended well, nothing."""
        if lane.busy is None:
            return
        lane.busy.key = None  # first: whatever is cut off below, nobody uses it as it is
        if lane.stream is not None:
            if lane.capturing:  # a stream left like that would run nothing any more
                self._cuda.api.cudaStreamEndCapture(lane.stream.handle)
                self._cuda.api.cudaGetLastError()  # it may not have begun, or have ended
                lane.capturing = False
            self._cuda.api.cudaStreamSynchronize(lane.stream.handle)
        lane.busy.graph = None
        lane.busy = None
