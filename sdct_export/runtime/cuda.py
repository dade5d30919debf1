"""As much of CUDA as the TensorRT backend needs: calls, and memory, streams and graphs that are freed when unused."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import numpy as np

from ..adapter.entries import Array
from ..errors import SdctError, UnsupportedError


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
            raise MemoryError("CUDA is out of memory")
        if status != self.api.cudaError_t.cudaSuccess:
            raise SdctError(f"CUDA call {function} failed with {status.name}; check the device with nvidia-smi")
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    def use(self) -> None:
        """Make the device the current one of this thread."""
        self("SetDevice", self.device)

    def upload(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Copy from host memory to the device, in order on `stream`.

        Pageable memory may be freed when the call returns, page-locked memory (`HostMemory`) once the stream is done.
        """
        self("MemcpyAsync", target, source, nbytes, self.api.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def download(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Copy from the device to host memory, complete once `stream` is."""
        self("MemcpyAsync", target, source, nbytes, self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)


class _Owned:
    """Something of CUDA's that is freed with the last reference to it."""

    _free = ""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self._cuda, self.handle = cuda, handle

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            getattr(self._cuda.api, self._free)(self.handle)  # at interpreter exit the device may be gone; no report


class Stream(_Owned):
    """A stream of its own, which the default stream does not wait for."""

    _free = "cudaStreamDestroy"

    def __init__(self, cuda: Cuda) -> None:
        super().__init__(cuda, cuda("StreamCreateWithFlags", cuda.api.cudaStreamNonBlocking))


class Graph(_Owned):
    """An executable CUDA graph."""

    _free = "cudaGraphExecDestroy"

    def __init__(self, cuda: Cuda, captured: Any) -> None:
        try:
            super().__init__(cuda, cuda("GraphInstantiate", captured, 0))
        finally:
            cuda.api.cudaGraphDestroy(captured)


class DeviceMemory(_Owned):
    """Bytes on the device; never empty."""

    _free = "cudaFree"

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        cuda.use()
        self.nbytes = max(1, nbytes)
        super().__init__(cuda, int(cuda("Malloc", self.nbytes)))

    @property
    def pointer(self) -> int:
        """The address."""
        return int(self.handle)


class DeviceTensor(DeviceMemory):
    """Device memory of a bank tensor."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        super().__init__(cuda, int(np.prod(shape)) * dtype.itemsize)

    @property
    def owner(self) -> DeviceTensor:
        """Whose memory it is."""
        return self


@dataclasses.dataclass(frozen=True)
class DevicePart:
    """A tensor that lies in the memory of another."""

    owner: DeviceTensor
    shape: tuple[int, ...]
    pointer: int


class HostMemory(_Owned):
    """Page-locked bytes on the host, which the device copies without the driver's help; never empty."""

    _free = "cudaFreeHost"

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        cuda.use()
        self.nbytes = max(1, nbytes)
        super().__init__(cuda, int(cuda("HostAlloc", self.nbytes, cuda.api.cudaHostAllocDefault)))
        self.array: Array = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.pointer))

    @property
    def pointer(self) -> int:
        """The address."""
        return int(self.handle)
