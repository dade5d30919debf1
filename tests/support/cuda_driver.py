"""What the CUDA driver knows of GPUs here, asked in a process of its own: looking for one touches no CUDA in a test.

The driver is asked, not the file system: a GPU is `/dev/nvidiactl` on a server, `/dev/dxg` in WSL2, and on a Jetson
`/dev/nvhost-gpu` or `/dev/nvgpu`, where there may be no `nvidia-smi` either.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys

_SCRIPT = """
import ctypes, json
def ask():
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"why": "the CUDA driver, libcuda.so.1, is not installed"}
    count, part = ctypes.c_int(), ctypes.c_int()
    for status in (cuda.cuInit(0), cuda.cuDeviceGetCount(ctypes.byref(count))):
        if status:
            return {"why": f"the CUDA driver answers with error {status}"}
    if not count.value:
        return {"why": "the CUDA driver knows no device"}
    numbers = []
    for attribute in (75, 76):  # compute capability, major and minor
        if status := cuda.cuDeviceGetAttribute(ctypes.byref(part), attribute, 0):
            return {"why": f"the CUDA driver answers with error {status}"}
        numbers.append(part.value)
    return {"capability": numbers}
print(json.dumps(ask()))
"""


@dataclasses.dataclass(frozen=True)
class Found:
    """`why` there is no GPU, empty where there is one; then `capability` is that of the first, e.g. (9, 0)."""

    why: str
    capability: tuple[int, int] = (0, 0)


@functools.cache
def gpu() -> Found:
    """The first GPU that CUDA can use here, or why there is none."""
    command = [sys.executable, "-I", "-S", "-c", _SCRIPT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        found = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        return Found(f"asking the CUDA driver failed ({type(error).__name__})")
    return Found(found["why"]) if "why" in found else Found("", tuple(found["capability"]))
