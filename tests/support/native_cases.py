"""Cases for the native core: made from a seed, written for `sdct_driver`, and their float64 reference by scipy."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
from scipy.fft import dct, idct

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
EPSILON = {DTYPES[0]: 2.0**-24, DTYPES[1]: 2.0**-11, DTYPES[2]: 2.0**-8}  # half a unit in the last place of 1.0
CPU, CUDA = 0, 1

Array = npt.NDArray[np.generic]


@dataclass
class Case:
    dtype: np.dtype[np.generic]
    x: Array  # [tokens, d_in]
    ids: Array  # int32 [rows, k]
    scales: Array  # float32 [rows, k]
    values: Array  # float32 [slots, n]
    indices: Array  # int32 [slots, n, 2]
    y: list[Array]  # [tokens, d_out_j]
    capacity: list[int]
    token_row: Array | None = None  # int32 [tokens]
    in_place: bool = False
    gap: int = 0  # elements between the tokens of every tensor
    threads: int = 4
    path: int = CPU
    ordered: bool = True  # false: rows are out of order, against the contract, so that threads add to the same sums
    expected: list[npt.NDArray[np.float64]] = field(default_factory=list)

    @property
    def rows_of_tokens(self) -> Array:
        rows, tokens = len(self.ids), len(self.x)
        if self.token_row is not None:
            return self.token_row
        return np.arange(tokens) // max(tokens // max(rows, 1), 1)


def entries(rng: np.random.Generator, d_out: int, d_in: int, n: int, capacity: int) -> tuple[Array, Array]:
    """One projection's part of a bank slot, as the contract has it: `values [capacity]`, `indices [capacity, 2]`."""
    n = min(n, capacity, d_out * d_in)
    flat = np.sort(rng.choice(d_out * d_in, n, replace=False)) if d_out * d_in < 10**7 else None
    if flat is None:
        flat = np.unique(rng.integers(0, d_out * d_in, n))
        n = len(flat)
    indices = np.zeros((capacity, 2), np.int32)
    indices[:n, 0], indices[:n, 1] = flat // d_in, flat % d_in
    if n:
        indices[n:] = indices[n - 1]
    values = np.zeros(capacity, np.float32)
    values[:n] = rng.standard_normal(n)
    return values, indices


def make(
    rng: np.random.Generator,
    dtype: np.dtype[np.generic],
    d_in: int,
    d_out: list[int],
    *,
    rows: int = 2,
    tokens_per_row: int = 1,
    blends: int = 1,
    slots: int = 4,
    capacity: list[int] | None = None,
    ragged: bool = False,
) -> Case:
    capacity = [int(rng.integers(0, 60)) for _ in d_out] if capacity is None else capacity
    values = np.zeros((slots, sum(capacity)), np.float32)
    indices = np.zeros((slots, sum(capacity), 2), np.int32)
    for slot in range(1, slots):
        at = 0
        for d, c in zip(d_out, capacity, strict=True):
            n = int(rng.integers(0, c + 1))
            values[slot, at : at + c], indices[slot, at : at + c] = entries(rng, d, d_in, n, c)
            at += c
    tokens = rows * tokens_per_row
    token_row = rng.integers(-1, rows + 1, tokens).astype(np.int32) if ragged else None
    ids = rng.integers(0, slots, (rows, blends)).astype(np.int32)
    if rows and blends and slots > 1:
        ids[-1, 0] = slots - 1
    return Case(
        dtype=dtype,
        x=rng.standard_normal((tokens, d_in)).astype(np.float32).astype(dtype),
        ids=ids,
        scales=rng.uniform(-1.5, 1.5, (rows, blends)).astype(np.float32),
        values=values,
        indices=indices,
        y=[rng.standard_normal((tokens, d)).astype(np.float32).astype(dtype) for d in d_out],
        capacity=capacity,
        token_row=token_row,
    )


def sorted_hostile(rng: np.random.Generator, dtype: np.dtype, d_in: int, d_out: list[int], n: int) -> Case:
    """Indices and ids out of range, rows ascending as the contract asks: every sum is defined."""
    case = make(rng, dtype, d_in, d_out, rows=3, tokens_per_row=4, blends=2, capacity=[n] * len(d_out))
    extremes = np.array([-(2**31), -1, 2**31 - 1, 2**30, d_in, max(d_out)], np.int64)
    case.values[1:] = rng.standard_normal(case.values[1:].shape)
    for slot in case.indices[1:]:
        bad = rng.random(slot.shape) < 0.3
        slot[bad] = rng.choice(extremes, int(bad.sum())).astype(np.int32)
        for at in range(0, n * len(d_out), n):
            part = slot[at : at + n]
            part[:] = part[np.argsort(part[:, 0], kind="stable")]
    case.ids[:] = [[1, 2**31 - 1], [-(2**31), -1], [len(case.values), 2]]
    case.token_row = rng.choice([-(2**31), -1, 0, 1, 2, 3, 2**31 - 1], len(case.x)).astype(np.int32)
    case.token_row[:2] = [0, 2]
    return case


def deltas(case: Case) -> list[npt.NDArray[np.float64]]:
    """What is added to y, float64 by scipy; entries and ids out of range count as nothing."""
    spectrum = dct(case.x.astype(np.float64), type=2, norm="ortho", axis=1)
    out, at = [], 0
    for y, capacity in zip(case.y, case.capacity, strict=True):
        acc = np.zeros(y.shape, np.float64)
        for t, row in enumerate(case.rows_of_tokens):
            if not 0 <= row < len(case.ids):
                continue
            for slot, scale in zip(case.ids[row], case.scales[row], strict=True):
                if not 0 < slot < len(case.values):
                    continue
                r, c = case.indices[slot, at : at + capacity].astype(np.int64).T
                v = case.values[slot, at : at + capacity].astype(np.float64)
                good = (r >= 0) & (r < y.shape[1]) & (c >= 0) & (c < spectrum.shape[1])
                np.add.at(acc[t], r[good], float(scale) * v[good] * spectrum[t, c[good]])
        out.append(idct(acc, type=2, norm="ortho", axis=1))
        at += capacity
    return out


def _strided(array: Array, gap: int) -> bytes:
    wide = np.zeros((len(array), array.shape[1] + gap), array.dtype)
    wide[:, : array.shape[1]] = array
    flat = wide.reshape(-1)
    return flat[: max(flat.size - gap, 0)].tobytes()


def run(driver: Path, cases: list[Case], folder: Path) -> list[list[Array]]:
    """The outputs of every case, by the driver; AssertionError where it reports an error or a sanitizer stops it."""
    source, target = folder / "cases.bin", folder / "results.bin"
    with source.open("wb") as file:
        for c in cases:
            head = [c.path, DTYPES.index(c.dtype), len(c.ids), c.ids.shape[1], len(c.values), len(c.x)]
            head += [int(c.token_row is not None), int(c.in_place), c.x.shape[1], c.x.shape[1] + c.gap]
            head += [c.threads, len(c.y)]
            for y, capacity in zip(c.y, c.capacity, strict=True):
                head += [y.shape[1], capacity, y.shape[1] + c.gap, y.shape[1] + c.gap]
            file.write(np.array(head, np.int64).tobytes())
            if c.token_row is not None:
                file.write(c.token_row.tobytes())
            file.write(_strided(c.x, c.gap))
            for array in (c.ids, c.scales, c.values, c.indices):
                file.write(array.tobytes())
            for y in c.y:
                file.write(_strided(y, c.gap))
    environment = {**os.environ, "SDCT_PTX_RACES": str(int(all(c.ordered for c in cases)))}
    command = [str(driver), str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"sdct_driver exited with {done.returncode}:\n{done.stderr[-4000:]}"
    data, at, results = target.read_bytes(), 0, []
    for c in cases:
        status = int(np.frombuffer(data, np.int64, 1, at)[0])
        assert status == 0, f"status {status}\n{done.stderr[-4000:]}"
        at += 8
        outputs = []
        for y in c.y:
            width, tokens = y.shape[1] + c.gap, len(y)
            count = max(tokens * width - c.gap, 0) if tokens else 0
            flat = np.frombuffer(data, c.dtype, count, at)
            at += count * c.dtype.itemsize
            full = np.zeros(tokens * width, c.dtype)
            full[:count] = flat
            outputs.append(full.reshape(tokens, width)[:, : y.shape[1]])
            if c.gap and tokens > 1 and not c.in_place:
                padding = full.reshape(tokens, width)[:-1, y.shape[1] :].tobytes()
                assert padding == b"\xcd" * len(padding), "wrote between the tokens"
        results.append(outputs)
    assert at == len(data)
    return results


def check(case: Case, outputs: list[Array], tolerance: float = 1e-5) -> bool:
    """Assert that outputs are y + delta, and bit-equal to y where a token has no adapter. Whether any delta was seen.

    The bound is `tolerance` times the delta's size (element and root mean square of the token), plus half a unit in
    the last place of the dtype.
    """
    changed = False
    for y, got, delta in zip(case.y, outputs, deltas(case), strict=True):
        base = y.astype(np.float64)
        want = base + delta
        norm = np.linalg.norm(delta, axis=1, keepdims=True) / np.sqrt(max(delta.shape[1], 1))
        error = np.abs(got.astype(np.float64) - want)
        bound = tolerance * (norm + np.abs(delta)) + EPSILON[case.dtype] * 1.001 * np.maximum(np.abs(want), 2.0**-13)
        worst = np.max(error / np.maximum(bound, 1e-30), initial=0.0)
        assert worst <= 1.0, f"error {worst:.2f} x the bound: d_in {case.x.shape[1]}, d_out {y.shape[1]}, {case.dtype}"
        rows = case.rows_of_tokens
        for t, row in enumerate(rows):
            active = 0 <= row < len(case.ids) and any(0 < i < len(case.values) for i in case.ids[row])
            if not active:
                assert got[t].tobytes() == y[t].tobytes(), "a token without adapter changed"
        changed = changed or bool(np.abs(delta).max(initial=0.0) > 1e-3)
    return changed
