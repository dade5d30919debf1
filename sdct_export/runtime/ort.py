"""ONNX Runtime as a backend: one session, and bank tensors that stay on its device between calls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import native
from ..adapter.entries import DTYPE_NAMES, Array
from ..bundle.description import DATA_FILE, Bundle, TensorSpec
from ..contract import Cache, Group
from ..errors import AdapterFormatError, ConfigError, SdctError, UnsupportedError
from ..plugin_choice import parse_version
from .steps import GrowingSteps, Session, SharedSteps

_NUMPY_NAMES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names of element types where they differ
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_EXACT_WINDOWS = (1, 24)  # the first ONNX Runtime whose sliding windows are as long as asked for
_MOST_THREADS = 1024  # no operator gains from more, and ONNX Runtime would try to start them
_BODY_NODES = 32 << 10  # bytes of the nodes of one projection in the portable body; seen: 25 to 31 KiB
_BASE_NODES = 64 << 20  # what a base model may expand by itself
_BYTES_PER_FILE_BYTE = 16


@dataclasses.dataclass(frozen=True)
class OrtTensor:
    """A bank tensor: its value on the device, and its contents on the host (the very same memory on the CPU)."""

    value: Any
    host: Array


class OrtBackend:
    """An ONNX Runtime session on the CPU or a CUDA device; allocates and writes bank tensors (`bank.Memory`).

    Args:
        model: the ONNX file.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: threads within an operator, None for ONNX Runtime's choice.
        groups: those of the bundle, whose portable bodies the model may expand to (see `expansion_limit`).
        results: names of the outputs that `run` returns, None for all.

    `graph` holds what the file says of the inputs and outputs. `native` says whether adapters run through the native
    operator; else it is the portable function in the file.

    Raises:
        ConfigError: `device` or `threads` has no such value.
        UnsupportedError: ONNX Runtime is not installed, or the device not available; the CPU never steps in silently.
        AdapterFormatError: the file is missing or ONNX Runtime cannot load it.
    """

    def __init__(
        self,
        model: Path,
        device: str = "cpu",
        threads: int | None = None,
        groups: Sequence[Group] = (),
        results: Sequence[str] | None = None,
    ) -> None:
        onnxruntime = native.onnxruntime()
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ConfigError(f"threads must be a positive integer or None, got {threads!r}")
        if threads is not None and threads > _MOST_THREADS:
            raise ConfigError(f"threads must be at most {_MOST_THREADS}, got {threads}")
        self._ort = onnxruntime
        self._device, self._device_id = _parse_device(device)
        if not model.is_file():
            raise AdapterFormatError(f"{model} is missing; copy the whole bundle or export it again")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors reach the user as exceptions, not as log lines beside them
        options.add_session_config_entry("session.function_expansion_byte_limit", str(expansion_limit(model, groups)))
        self.native = native.register_operator(options, self._device)
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = self._providers(device)
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no base class
            self._refuse_missing_kernel(model, str(error))
            raise AdapterFormatError(
                f"{model}: ONNX Runtime {onnxruntime.__version__} cannot load it ({_first_line(error)}); "
                "copy the whole bundle or export it again"
            ) from error
        self._session.disable_fallback()
        if self._device == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise UnsupportedError(
                f"device {device!r}: ONNX Runtime could not start its CUDA provider; check the driver "
                "(nvidia-smi) and install the CUDA and cuDNN libraries it was built for: "
                "pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.graph: Mapping[str, TensorSpec] | None = {value.name: _spec(value) for value in (*inputs, *outputs)}
        self.inputs: dict[str, tuple[int | str | None, ...]] = {i.name: tuple(i.shape) for i in inputs}
        self.outputs: tuple[str, ...] = tuple(o.name for o in outputs)
        self._results = [name for name in self.outputs if results is None or name in results]

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> OrtTensor:
        """A bank tensor of zeros on the device. Raises `MemoryError`."""
        host = np.zeros(shape, dtype)
        if self._device == "cpu":
            return OrtTensor(self._ort.OrtValue.ortvalue_from_numpy(host), host)  # shares the memory of `host`
        try:
            return OrtTensor(self._ort.OrtValue.ortvalue_from_numpy(host, self._device, self._device_id), host)
        except Exception as error:
            raise MemoryError(_first_line(error)) from error

    def write(self, tensor: OrtTensor, slot: int, row: Array) -> None:
        """`tensor[slot] = row`; on a CUDA device complete when the call returns."""
        tensor.host[slot] = row
        if self._device == "cuda":
            _copy_slot(tensor, slot)

    def read(self, tensor: OrtTensor, slot: int) -> Array:
        """A copy of `tensor[slot]` in host memory."""
        return np.array(tensor.host[slot])

    def copy(self, source: OrtTensor, target: OrtTensor) -> None:
        """Set the first slots of `target` to those of the smaller `source`."""
        target.host[: len(source.host)] = source.host
        if self._device == "cuda":
            target.value.update_inplace(target.host)

    def run(self, inputs: Mapping[str, Array], bank: Mapping[str, OrtTensor]) -> dict[str, Array]:
        """The results as arrays in host memory. Raises `SdctError` where ONNX Runtime fails on these inputs."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            if array.dtype == DTYPE_NAMES["bfloat16"]:  # which its interface does not know from numpy
                value = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, tensor in bank.items():
            binding.bind_ortvalue_input(name, tensor.value)
        for name in self._results:
            binding.bind_output(name, "cpu")
        self._run(binding)
        return dict(zip(self._results, binding.copy_outputs_to_cpu(), strict=True))

    def _run(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            if not _is_own(error):  # a signal handler's, say
                raise
            raise SdctError(
                f"ONNX Runtime could not run the model on these inputs ({_first_line(error)}); "
                "check token ids and lengths against the base model's limits"
            ) from error

    def steps(self, cache: Cache, slots: int, max_length: int) -> SharedSteps | GrowingSteps:
        """An empty cache of so many slots, each for at most `max_length` tokens. Raises `MemoryError`."""
        session = Session(self._ort, self._session, (self._device, self._device_id), self._run)
        kind = SharedSteps if cache.target == "ort" else GrowingSteps
        return kind(session, cache, slots, max_length)

    def _refuse_missing_kernel(self, model: Path, problem: str) -> None:
        """Raise `UnsupportedError` where `problem` is that no provider here computes some node in its types."""
        found = re.search(r"Could not find an implementation for (\w+)\((\d+)\) node with name '(.*)'", problem)
        if found is not None:
            provider = f"{'CUDA' if self._device == 'cuda' else 'CPU'}ExecutionProvider"
            raise UnsupportedError(
                f"{model}: {provider} of ONNX Runtime {self._ort.__version__} has no kernel for {found[1]} (opset "
                f"{found[2]}, node {found[3]!r}) in this model's types; install a newer ONNX Runtime, or export with "
                "--dtype float32 or float16"
            )

    def _providers(self, device: str) -> Sequence[str | tuple[str, dict[str, str]]]:
        if self._device == "cpu":
            return ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" not in self._ort.get_available_providers():
            raise UnsupportedError(
                f"device {device!r} needs ONNX Runtime with its CUDA provider; this one has "
                f"{', '.join(self._ort.get_available_providers())}. Install onnxruntime-gpu in place of onnxruntime"
            )
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
            self._ort.preload_dlls()
        # TF32 would round float32 products to 10 bits
        return [
            ("CUDAExecutionProvider", {"device_id": str(self._device_id), "use_tf32": "0"}),
            "CPUExecutionProvider",
        ]


def check_dtype(bundle: Bundle, device: str) -> None:
    """Raise `UnsupportedError` where no ONNX Runtime runs bundles of this type on `device`, before it reads the model.

    On a CUDA device the graph decides: `OrtBackend` names an operator without a kernel.
    """
    if bundle.dtype == "bfloat16" and device == "cpu":
        raise UnsupportedError(
            f"{bundle.path}: a bfloat16 bundle cannot run on the CPU: ONNX Runtime's CPUExecutionProvider has no "
            "bfloat16 kernel for MatMul, Add, Mul and most others; use device='cuda' (--device cuda) or a TensorRT "
            "engine, or export with --dtype float32 or float16"
        )
    if bundle.dtype not in ("float32", "float16", "bfloat16"):
        raise UnsupportedError(
            f"{bundle.path}: ONNX Runtime cannot run a {bundle.dtype} bundle; export it in float32 or float16"
        )


def check_cache(bundle: Bundle, device: str) -> None:
    """Raise `UnsupportedError` where this ONNX Runtime computes the attention of a cached bundle otherwise, or not.

    Its 1.23 counts a token's sliding window without the token itself, later ones with it, as everybody else.
    """
    cache = bundle.cache
    if cache is None or cache.target != "ort":
        return
    version = str(native.onnxruntime().__version__)
    if cache.windows and parse_version(version) < _EXACT_WINDOWS:
        raise UnsupportedError(
            f"{bundle.path}: sliding windows are one token too long in GroupQueryAttention of ONNX Runtime {version}; "
            f"install {'.'.join(map(str, _EXACT_WINDOWS))} or newer, or export with --target standard"
        )
    if device != "cpu" and bundle.dtype == "float32":
        raise UnsupportedError(
            f"{bundle.path}: GroupQueryAttention of ONNX Runtime's CUDAExecutionProvider computes in float16 and "
            "bfloat16 only; export with --dtype float16, with --target standard or with --no-cache"
        )


def expansion_limit(model: Path, groups: Sequence[Group]) -> int:
    """Most bytes that ONNX Runtime may expand the functions in `model` to: twice what its groups need, and some.

    Its own limit of 1 GiB is too low for adapters on all layers of a large model, since every node gets the tables of
    its transforms to itself; with no limit, a file of 1 MB can fill the memory. Tables and adapted weights are of one
    size within a small factor, so 16 times the size of the files is enough whatever a description claims.
    """
    files = (model, model.with_name(DATA_FILE))
    most = _BYTES_PER_FILE_BYTE * sum(file.stat().st_size for file in files if file.is_file())
    needed = 0
    for length in (length for group in groups for length in (group.d_in, *group.d_out)):
        needed += 2 * (table_bytes(length) + _BODY_NODES)
        if needed > most:
            return _BASE_NODES + most
    return _BASE_NODES + needed


def table_bytes(length: int) -> int:
    """At most so many bytes are the tables of one transform in `graph.function_body`, at least a third of that.

    float32 matrices of `length` times the multiplications an element takes (those of the cheapest factorisation
    `N1 N2`, and 64 more where that is not worth it), and three numbers an element to order them.
    """
    cheapest = length
    for n in (n for n in range(2, math.isqrt(length) + 1) if length % n == 0):
        for n1, n2 in ((n, length // n), (length // n, n)):
            products = n1 // 2 + 1
            cheapest = min(cheapest, 2 * products + math.ceil(4 * products * n2 / n1) + 64)
    return 4 * length * cheapest + 12 * length


def _spec(value: Any) -> TensorSpec:
    """What a session says of an input or output, unnamed dimensions as an empty name."""
    kind = re.sub(r"^tensor\((.*)\)$", r"\1", value.type)
    return TensorSpec(value.name, _NUMPY_NAMES.get(kind, kind), tuple(d if d is not None else "" for d in value.shape))


def _parse_device(device: str) -> tuple[str, int]:
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if match is None:
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    return ("cpu", 0) if device == "cpu" else ("cuda", int(match[1] or 0))


def _copy_slot(tensor: OrtTensor, slot: int) -> None:
    """Copy one slot from host to device: just its bytes where cuda-python is at hand, else the whole tensor.

    Copying more than the slot is safe, only slower: all other bytes are rewritten with what they hold.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        tensor.value.update_inplace(tensor.host)
        return
    row = tensor.host[slot : slot + 1]
    target = tensor.value.data_ptr() + slot * row.nbytes
    (status,) = runtime.cudaMemcpy(target, row.ctypes.data, row.nbytes, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)
    if status == runtime.cudaError_t.cudaSuccess:
        (status,) = runtime.cudaStreamSynchronize(0)  # a copy from pageable memory may still be under way
    if status != runtime.cudaError_t.cudaSuccess:
        raise SdctError(
            f"copying an adapter to the CUDA device failed ({status.name}); check the device with nvidia-smi"
        )


def _is_own(error: Exception) -> bool:
    """Whether ONNX Runtime raised it, which reports a failed run as one of its classes or as this `RuntimeError`."""
    named = type(error) is RuntimeError and str(error).startswith("Error in execution: ")
    return named or type(error).__module__.startswith("onnxruntime.")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
