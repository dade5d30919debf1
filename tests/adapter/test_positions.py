"""The code of positions against one written bit by bit, at every density; what it costs; and damaged codes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdct_export.adapter import positions
from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.config import SdctConfig
from sdct_export.adapter.entries import SdctEntries
from sdct_export.adapter.positions import code_bytes, decode, encode
from sdct_export.errors import AdapterFormatError
from sdct_export.spectral.selection import select_for_weight


def spelled(places: list[int], size: int) -> bytes:
    """The code as `positions` describes it, in whole numbers of any length."""
    n, width = len(places), 0
    while n << (width + 1) <= size:
        width += 1
    low = sum((p % (1 << width)) << (i * width) for i, p in enumerate(places))
    high = sum(1 << ((p >> width) + i) for i, p in enumerate(places))
    return low.to_bytes(-(-n * width // 8), "little") + high.to_bytes(
        math.ceil((n + ((size - 1) >> width)) / 8), "little"
    )


def chosen(n: int, size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.sort(
        rng.choice(size, n, replace=False)
        if size < 1 << 24
        else rng.integers(0, size // n, n) + np.arange(n) * (size // n)
    )


@pytest.mark.parametrize(
    ("n", "size"),
    [(1, 1), (1, 2), (7, 7), (8, 9), (9, 16), (1, 31 * 17), (526, 31 * 17), (31 * 17, 31 * 17), (700, 384 * 384),
     (700, 11008 * 4096), (1, 2**62 - 1), (5, (2**31 - 1) ** 2), (3000, 4096)],
)  # fmt: skip
def test_the_code_is_the_one_described(n: int, size: int) -> None:
    for places in (chosen(n, size), np.arange(n), np.arange(size - n, size)):
        places = places.astype(np.int64)
        code = encode(places, size)
        assert code.dtype == np.uint8
        assert code.tobytes() == spelled(places.tolist(), size)
        assert len(code) == code_bytes(n, size)
        again = decode(code, n, size)
        assert again.dtype == np.int64
        assert np.array_equal(again, places)


def test_more_positions_than_are_spread_out_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "_AT_A_TIME", 16)
    for n, size in ((1, 40), (15, 999), (16, 999), (17, 999), (500, 999), (64, 1 << 20)):
        code = encode(chosen(n, size), size)
        assert code.tobytes() == spelled(chosen(n, size).tolist(), size)
        assert np.array_equal(decode(code, n, size), chosen(n, size))


@given(data=st.data(), size=st.integers(1, 2000))
def test_any_bytes_are_a_set_or_refused(data: st.DataObject, size: int) -> None:
    n = data.draw(st.integers(1, size))
    length = code_bytes(n, size)
    code = np.frombuffer(data.draw(st.binary(min_size=length, max_size=length)), np.uint8)
    try:
        found = decode(code, n, size)
    except AdapterFormatError:
        return
    assert encode(found, size).tobytes() == code.tobytes()  # one set has one code


@given(places=st.sets(st.integers(0, 999), min_size=1), where=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_another_set_or_refused(places: set[int], where: int, bit: int) -> None:
    code = encode(np.array(sorted(places)), 1000).copy()
    code[where % len(code)] ^= 1 << bit
    try:
        found = decode(code, len(places), 1000)
    except AdapterFormatError:
        return
    assert set(found.tolist()) != places
    assert len(found) == len(places)
    assert found.max() < 1000


def test_damage_is_named() -> None:
    good = encode(np.array([3, 4, 900]), 1000)  # 8 low bits each, then 6 high bits
    assert good.tolist() == [3, 4, 900 & 255, 0b100011]

    def refused(message: str, *code: int, n: int = 3, size: int = 1000) -> None:
        with pytest.raises(AdapterFormatError, match=message):
            decode(np.array(code, np.uint8), n, size)

    refused("not as many", 3, 4, 132, 0b000011)
    refused("not as many", 3, 4, 132, 0b110011)
    refused("not as many", 3, 4, 132, 0b1000011)  # as many, the last beyond the end
    refused("repeated", 4, 4, 132, 0b100011)
    refused("repeated", 4, 3, 132, 0b100011)
    refused("outside", 3, 4, 255, 0b100011)  # 1023
    refused("unused bits", 0b1000, 0b1, n=1, size=8)
    largest = 2**62 - 1
    refused("not as many", *[255] * 8, 0b10000000, n=1, size=largest)  # its high part times 2^61 overflows int64


SHAPES = {"MiniLM": (384, 384), "BERT": (768, 768), "v of 8B": (1024, 4096), "GQA": (4096, 1024)}
WIDE = {"q of 8B": (4096, 4096), "up of 7B": (11008, 4096)}


@pytest.mark.parametrize("name", [*SHAPES, *WIDE])
def test_bytes_a_coefficient_with_all_headers(tmp_path: Path, name: str) -> None:
    """At n = 700: at most 6 in float32 and 4 in float16, and half a byte more for the largest matrices.

    A set of 700 positions without structure in 4096 x 4096 takes log2(e size / n) = 16 bits, so that 6 and 4 without
    headers is what it would take at best.
    """
    shape, n = (SHAPES | WIDE)[name], 700
    generator = torch.Generator().manual_seed(0)
    indices = select_for_weight(torch.randn(shape, generator=generator), "energy", n)
    for dtype, most in ((np.float32, 6.0), (np.float16, 4.0)):
        values = np.random.default_rng(0).normal(size=n).astype(dtype)
        modules = {f"model.layers.{i}.self_attn.q_proj": SdctEntries(values, indices, shape) for i in range(24)}
        SdctAdapter(SdctConfig(["q_proj"]), modules).save(tmp_path / str(most))
        found = (tmp_path / str(most) / "adapter_model.safetensors").stat().st_size / (24 * n)
        print(f"{name} {shape} {np.dtype(dtype)}: {found:.3f} bytes a coefficient")
        assert found <= most + (0.5 if name in WIDE else 0)
        loaded = SdctAdapter.load(tmp_path / str(most)).modules["model.layers.3.self_attn.q_proj"]
        assert loaded.indices.tobytes() == indices.tobytes()
        assert loaded.values.tobytes() == values.tobytes()
