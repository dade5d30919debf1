"""What do the GPU kernels cost, counted? Instructions, wavefronts and sectors of a token; no GPU is needed or used.

    cmake -S . -B build/ptx -DSDCT_PTX=ON -DSDCT_BENCHMARKS=ON && cmake --build build/ptx -j
    python benchmarks/kernel_counts.py [--json FILE] [--only TEXT] [--lines]

The kernels' PTX runs on the CPU (plugins/tests/ptx), which counts what each warp does, so that the figures are the
same on every machine; each run's output is checked against scipy. n = 700 coefficients a projection, bfloat16, one
adapter a row, the tokens of one multiprocessor of 132 that share 8192 (prefill), or one (decode). `--lines` names the
source lines that cost most.

Model: a launch takes as long as its scarcest resource, and a constant for launching. Of the busiest multiprocessor:
instructions at 4 a cycle; wavefronts and sectors / 4 at one a cycle (shared memory and first-level cache are one); a
chain of 500 cycles a barrier. Of the device: 32 bytes a sector from the second-level cache; the bytes of x and y (read
and written) from memory. It knows nothing of what overlaps badly: a lower bound. Registers are ptxas's; blocks of a
multiprocessor follow from registers, threads and memory.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "gpu")]
from native_cases import DTYPES, check, make  # noqa: E402
from native_gpu import Gpu, OnDevice  # noqa: E402

N, PREFILL, COUNTED = 700, 8192, 62  # coefficients; tokens of the model's prefill; of one multiprocessor of an H200
LAUNCH_US, BARRIER_CYCLES = 2.0, 500
MODELS = {  # hidden size, query, key and value, feed-forward
    "MiniLM": (384, 384, 384, 1536),
    "BERT base": (768, 768, 768, 3072),
    "Qwen2.5 0.5B": (896, 896, 128, 4864),
    "RoBERTa large": (1024, 1024, 1024, 4096),
    "Qwen2.5 1.5B": (1536, 1536, 256, 8960),
    "Llama 3.2 1B": (2048, 2048, 512, 8192),
    "Llama 3.2 3B": (3072, 3072, 1024, 8192),
    "Qwen2.5 7B": (3584, 3584, 512, 18944),
    "Llama 3.1 8B": (4096, 4096, 1024, 14336),
    "Llama 2 7B": (4096, 4096, 4096, 11008),
    "Llama 2 13B": (5120, 5120, 5120, 13824),
}


@dataclass(frozen=True)
class Device:
    """What the model needs; clocks under load and second-level bandwidths are rounded from public measurements."""

    architecture: int
    multiprocessors: int
    gigahertz: float
    shared_block: int  # bytes that one block may have
    shared: int  # bytes of a multiprocessor
    threads: int
    blocks: int
    l2_bytes: float  # a second
    memory_bytes: float  # a second


DEVICES = {
    "h100": Device(90, 132, 1.755, 232448, 233472, 2048, 32, 5.5e12, 3.35e12),
    "h200": Device(90, 132, 1.755, 232448, 233472, 2048, 32, 5.5e12, 4.8e12),
    "a100": Device(80, 108, 1.41, 166912, 167936, 2048, 32, 4.4e12, 2.04e12),
    "orin": Device(87, 16, 1.3, 166912, 167936, 1536, 16, 0.6e12, 0.205e12),
}


def groups() -> dict[str, tuple[int, list[int]]]:
    """Every group once: "q+v 4096->4096,1024" and its lengths."""
    found = {}
    for hidden, query, key, inner in MODELS.values():
        shapes = {"q+v": (hidden, [query, key]), "q+k+v": (hidden, [query, key, key])}
        shapes |= {"gate+up": (hidden, [inner, inner]), "down": (inner, [hidden])}
        for kind, (d_in, d_out) in shapes.items():
            found[f"{kind} {d_in}->{','.join(map(str, d_out))}"] = (d_in, d_out)
    found |= {
        f"square {n}->{n}": (n, [n]) for n in (16384, 18944)
    }  # a power of two beside a length with a prime of 37
    return found


class Counter:
    """The kernels over the stand-in in a build folder."""

    FIELDS = ("launches", "blocks", "threads", "shared_bytes", "barriers", "instructions", "wavefronts")
    FIELDS += ("ideal_wavefronts", "sectors")

    def __init__(self, folder: Path) -> None:
        if not (folder / "libsdct_ptx.so").is_file():
            raise SystemExit(f"{folder} holds no libsdct_ptx.so; build it as `kernel_counts.py --help` says")
        os.environ["SDCT_PTX_RACES"] = "0"  # the tests look for those
        self.library = ctypes.CDLL(str(folder / "libsdct_ptx.so"))
        self.library.sdct_ptx_totals.restype = ctypes.c_char_p
        self.gpu = Gpu(folder)

    def count(self, d_in: int, d_out: list[int], tokens: int, shared: int, multiprocessors: int) -> dict[str, Any]:
        """Totals of one launch, and the kernel's name. Raises AssertionError where the result is wrong."""
        os.environ["SDCT_PTX_SHARED"], os.environ["SDCT_PTX_SMS"] = str(shared), str(multiprocessors)
        rng = np.random.default_rng(70)
        case = make(rng, DTYPES[2], d_in, d_out, rows=tokens, slots=tokens + 1, capacity=[N] * len(d_out))
        case.ids[:, 0] = 1 + rng.permutation(tokens)
        case.values[1:] = rng.standard_normal(case.values[1:].shape)
        for slot in range(1, tokens + 1):  # N different places a projection, rows ascending
            for j, length in enumerate(d_out):
                flat = np.sort(rng.choice(length * d_in, N, replace=False))
                case.indices[slot, j * N : (j + 1) * N] = np.stack([flat // d_in, flat % d_in], 1)
        device, node = OnDevice(self.gpu, case), self.gpu.node(case)
        self.library.sdct_ptx_reset(1)
        node.run(device.problem)
        totals = (ctypes.c_int64 * len(self.FIELDS))()
        kernel = self.library.sdct_ptx_totals(totals).decode()
        assert check(case, device.results())
        return {**dict(zip(self.FIELDS, totals, strict=True)), "kernel": kernel}

    def lines(self) -> list[tuple[str, list[int]]]:
        """(source line, [instructions, wavefronts, ideal wavefronts, sectors]) of the last launch."""
        with tempfile.NamedTemporaryFile() as file:
            self.library.sdct_ptx_lines(file.name.encode())
            rows = [line.rsplit(" ", 4) for line in Path(file.name).read_text().splitlines()]
        return [(name, [int(n) for n in numbers]) for name, *numbers in rows]


def plain(kernel: str) -> str:
    """A kernel's name without what differs between two runs of nvcc."""
    return re.sub(r"\d+_GLOBAL__N__\w+?(?=14spectral_delta)", "", kernel)


def nvcc_of(folder: Path) -> str:
    found = re.search(r"^SDCT_NVCC:FILEPATH=(.*)$", Path(folder, "CMakeCache.txt").read_text(), re.M)
    assert found, f"{folder} is no build folder with SDCT_PTX=ON"
    return found[1]


def version_of(folder: Path) -> str:
    said = subprocess.run([nvcc_of(folder), "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V([0-9.]+)", said)[0]


def registers(folder: Path) -> dict[tuple[int, str], int]:
    """Registers of a thread by (architecture, kernel), by ptxas."""
    found = {}
    for architecture in sorted({device.architecture for device in DEVICES.values()}):
        command = [nvcc_of(folder), "-std=c++17", "-O3", f"-I{ROOT}/plugins/include", f"-arch=sm_{architecture}"]
        command += ["-cubin", "-Xptxas", "-v", "-o", os.devnull, str(ROOT / "plugins" / "core" / "cuda.cu")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for kernel, used in re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", said, re.S):
            found[architecture, plain(kernel)] = int(used)
    return found


def resident(device: Device, used: int, threads: int, shared: int) -> int:
    """Blocks that run on a multiprocessor at once."""
    warps = math.ceil(threads / 32)
    by_registers = 65536 // (warps * math.ceil(used * 32 / 256) * 256)
    by_memory = device.shared // (shared + 1024)
    return max(1, min(by_registers, by_memory, device.threads // (warps * 32), device.blocks))


def model_us(device: Device, counted: dict[str, Any], tokens: int, data_bytes: float) -> float:
    """Microseconds of a launch over `tokens` tokens, from what `counted["tokens"]` of them cost; see above."""
    scale = tokens / counted["tokens"]
    if counted["tokens"] > 1:  # all counted ones ran on one multiprocessor
        share = math.ceil(tokens / device.multiprocessors) / counted["tokens"]
    else:  # a block on a multiprocessor
        share = math.ceil(counted["blocks"] / device.multiprocessors) / counted["blocks"]
    cycles = max(
        counted["instructions"] * share / 4,
        (counted["wavefronts"] + counted["sectors"] / 4) * share,
        counted["barriers"] * BARRIER_CYCLES * (share if counted["tokens"] > 1 else 1),
    )
    seconds = max(
        cycles / device.gigahertz / 1e9,
        counted["sectors"] * 32 * scale / device.l2_bytes,
        data_bytes * tokens / device.memory_bytes,
    )
    return LAUNCH_US + seconds * 1e6


def case_of(
    counter: Counter, name: str, d_in: int, d_out: list[int], phase: str, used: dict[tuple[int, str], int]
) -> dict[str, Any]:
    """One line of the results; counts are those on an H100 or H200, and `model_us` is of every device."""
    decode = phase == "decode"
    tokens = 1 if decode else COUNTED
    # of a prefill nothing depends on the number of multiprocessors but how few tokens are enough of one
    launches = {
        shared: counter.count(d_in, d_out, tokens, shared, 132 if decode else 1) | {"tokens": tokens}
        for shared in sorted({device.shared_block for device in DEVICES.values()})
    }
    counted = launches[DEVICES["h200"].shared_block]
    data = 2 * (d_in + 2 * sum(d_out))  # bytes of a token: x read, every y read and written
    row = {"name": f"{name} {DTYPES[2]} {phase}"}
    row |= {
        key: round(counted[key] / tokens, 1) for key in ("instructions", "wavefronts", "ideal_wavefronts", "sectors")
    }
    row["ideal_sectors"] = round((data + 12 * N * len(d_out)) / 32, 1)
    row |= {key: counted[key] for key in ("barriers", "threads", "shared_bytes")}
    kernel = plain(counted["kernel"])
    if used:
        row["registers"] = used[DEVICES["h200"].architecture, kernel]
        for key, device in DEVICES.items():
            launch = launches[device.shared_block]
            threads = used[device.architecture, plain(launch["kernel"])]
            row[f"blocks_per_multiprocessor_{key}"] = resident(
                device, threads, launch["threads"], launch["shared_bytes"]
            )
            row[f"model_us_{key}"] = round(model_us(device, launch, 1 if decode else PREFILL, data), 1)
    return row


def cases(folder: Path, *, only: str = "", with_registers: bool = True) -> list[dict[str, Any]]:
    counter, used = Counter(folder), registers(folder) if with_registers else {}
    found = []
    for name, (d_in, d_out) in groups().items():
        for phase in ("prefill", "decode"):
            if only in f"{name} {DTYPES[2]} {phase}":
                found.append(case_of(counter, name, d_in, d_out, phase, used))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument(
        "--only", default="", help="cases whose name holds this, such as 'q+v 4096->4096,1024 bfloat16 prefill'"
    )
    parser.add_argument(
        "--lines", action="store_true", help="also the ten source lines that cost most, for the last case"
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "ptx", help="the build folder")
    options = parser.parse_args()
    found = cases(options.build, only=options.only)
    if not found:
        raise SystemExit(f"no case is called {options.only!r}")
    columns = {
        "instructions": "instructions",
        "wavefronts": "wavefronts",
        "sectors": "sectors",
        "barriers": "barriers",
    }
    columns |= {"registers": "registers", "blocks_per_multiprocessor_h200": "blocks"}
    columns |= {f"model_us_{key}": f"{key} us" for key in DEVICES}
    print("| case | " + " | ".join(columns.values()) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for row in found:
        cells = [
            f"{row[key]:.0f}" if key in ("instructions", "wavefronts", "sectors") else str(row[key]) for key in columns
        ]
        cells[1] += f" ({row['wavefronts'] / max(row['ideal_wavefronts'], 1):.1f} x ideal)"
        cells[2] += f" ({row['sectors'] / row['ideal_sectors']:.1f} x data)"
        print(f"| {row['name']} | " + " | ".join(cells) + " |")
    if options.lines:
        counter, name = Counter(options.build), found[-1]["name"]
        d_in, d_out = groups()[name.rsplit(" ", 2)[0]]
        tokens = 1 if name.endswith("decode") else COUNTED
        counter.count(d_in, d_out, tokens, DEVICES["h200"].shared_block, 132 if tokens == 1 else 1)
        print(f"\n{name}, a token: line, instructions, wavefronts, ideal wavefronts, sectors")
        for line, numbers in sorted(counter.lines(), key=lambda pair: -pair[1][1] - pair[1][0] // 4)[:10]:
            print(f"  {line:20}", *(f"{n / tokens:9.0f}" for n in numbers))
    if options.json:
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        about = {"date": date, "nvcc": version_of(options.build), "coefficients": N, "prefill_tokens": PREFILL}
        rows = ",\n".join(f"  {json.dumps(row)}" for row in found)  # a line each, so that a change of one shows
        options.json.write_text(json.dumps(about)[:-1] + f', "cases": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()
