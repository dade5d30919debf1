"""The stand-in for a GPU (plugins/tests/ptx): its instructions against Python, and what it must stop.

Needs a build with SDCT_PTX=ON (cmake -S . -B build/ptx -DSDCT_PTX=ON); SDCT_PTX_BUILD names another folder.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from native_cases import CUDA, DTYPES, check, make, run

ROOT = Path(__file__).parents[2]
BITS = {"h": 16, "w": 32, "d": 64, "p": 1}
LANES = 32


@pytest.fixture(scope="module")
def build() -> Path:
    folder = Path(os.environ.get("SDCT_PTX_BUILD", ROOT / "build" / "ptx")).resolve()
    if not (folder / "libsdct_ptx.so").is_file():
        pytest.skip(f"{folder} holds no libsdct_ptx.so: build it with cmake -S . -B build/ptx -DSDCT_PTX=ON")
    return folder


class Machine:
    """Runs PTX text; device memory is written and read around each run."""

    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(str(folder / "libsdct_ptx.so"))
        for name in ("sdct_ptx_run", "sdct_ptx_instructions"):
            getattr(self.library, name).restype = ctypes.c_char_p

    def run(self, text: str, data: np.ndarray, *, blocks: int = 1, threads: int = 32, shared: int = 0) -> str:
        """`data`, bytes that the kernel's one parameter points to, is changed in place. Gives what was wrong."""
        pointer = ctypes.c_void_p()
        size = ctypes.c_size_t(data.nbytes)
        assert self.library.cudaMalloc(ctypes.byref(pointer), size) == 0
        assert self.library.cudaMemcpy(pointer, ctypes.c_void_p(data.ctypes.data), size, 1) == 0
        parameter = ctypes.c_uint64(pointer.value or 0)
        arguments = (ctypes.c_uint32(blocks), ctypes.c_uint32(threads), ctypes.c_size_t(shared))
        said = self.library.sdct_ptx_run(text.encode(), *arguments, ctypes.byref(parameter), ctypes.c_size_t(8))
        assert self.library.cudaMemcpy(ctypes.c_void_p(data.ctypes.data), pointer, size, 2) == 0
        assert self.library.cudaFree(pointer) == 0
        return said.decode()

    def instructions(self) -> dict[str, str]:
        lines = self.library.sdct_ptx_instructions().decode().splitlines()
        return {name: signature for name, _, signature in (line.partition(" ") for line in lines)}


@pytest.fixture(scope="module")
def machine(build: Path) -> Machine:
    return Machine(build)


def kernel(body: str, head: str = "") -> str:
    """A kernel whose parameter is in %rd0 and whose thread is in %r0, with its 8 bytes of data at %rd1."""
    return f"""
.version 8.0
.target sm_90
.address_size 64
{head}
.visible .entry test(.param .u64 test_param_0)
{{
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b32 %w<9>; .reg .b64 %rd<9>; .reg .b64 %d<9>;
ld.param.u64 %rd0, [test_param_0];
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd1, %r0, 8;
add.s64 %rd1, %rd0, %rd1;
{body}
ret;
}}
"""


# --- every instruction -----------------------------------------------------------------------------------------------


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def as_float(value: int) -> np.float32:
    return np.uint32(value & 0xFFFFFFFF).view(np.float32)


def raw(value: object) -> int:
    return int(np.float32(value).view(np.uint32))


def exact_float(value: Fraction) -> np.float32:
    """The nearest float32 of an exact number, ties to even."""
    if abs(value) >= Fraction(2) ** 128 - Fraction(2) ** 103:
        return np.float32(np.inf if value > 0 else -np.inf)
    with np.errstate(over="ignore"):
        guess = np.clip(np.float32(float(value)), np.finfo(np.float32).min, np.finfo(np.float32).max)
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    near = [x for x in near if np.isfinite(x)]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - value), raw(x) & 1))


def typed(value: int, kind: str) -> int | np.float32:
    if kind == "f32":
        return as_float(value)
    bits = int(kind[1:])
    return signed(value, bits) if kind[0] == "s" else value & ((1 << bits) - 1)


def compare(condition: str, kind: str, a: int, b: int) -> bool:
    x, y = typed(a, kind), typed(b, kind)
    unordered = kind == "f32" and bool(np.isnan(x) or np.isnan(y))
    if condition in ("num", "nan"):
        return unordered == (condition == "nan")
    if kind == "f32" and condition.endswith("u"):
        if unordered:
            return True
        condition = condition[:-1]
    condition = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(condition, condition)
    results = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    return bool(results[condition]) and not unordered


def convert(to: str, of: str, value: int, rounding: str) -> int:
    if of == "f16":
        return raw(np.uint16(value).view(np.float16).astype(np.float32))
    if of == "bf16":
        return raw(np.uint16(value).view(ml_dtypes.bfloat16).astype(np.float32))
    if of == "f32":
        x = as_float(value)
        if to in ("f16", "bf16"):
            return int(x.astype(np.float16 if to == "f16" else ml_dtypes.bfloat16).view(np.uint16))
        if np.isnan(x):
            return 0
        limits = np.iinfo({"s32": np.int32, "u32": np.uint32}[to])
        y = float(np.trunc(x) if rounding == "rzi" else np.rint(x))
        return int(min(max(y, limits.min), limits.max))
    return raw(exact_float(Fraction(typed(value, of)))) if to == "f32" else typed(typed(value, of), to)


def arithmetic(operation: str, kind: str, *values: int) -> int:
    a, b, c = [*(typed(v, kind) for v in values), 0, 0][:3]
    if kind == "f32":
        if operation in ("fma", "mad"):
            double = np.float64(a) * np.float64(b) + np.float64(c)
            if not np.isfinite([a, b, c]).all() or double == 0:
                return raw(double)
            return raw(exact_float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))))
        if operation in ("min", "max"):
            return raw({"min": np.fmin, "max": np.fmax}[operation](a, b))
        results = {
            "add": a + b,
            "sub": a - b,
            "mul": a * b,
            "div": np.divide(a, np.float32(b)),
            "neg": -a,
            "abs": abs(a),
        }
        results |= {"sqrt": np.sqrt(a), "rcp": np.divide(np.float32(1), a)}
        return raw(results[operation])
    quotient = abs(a) // abs(b or 1) * (1 if (a < 0) == (b < 0) else -1)
    results = {
        "add": a + b,
        "sub": a - b,
        "mul": a * b,
        "mad": a * b + c,
        "min": min(a, b),
        "max": max(a, b),
        "neg": -a,
    }
    results |= {
        "abs": abs(a),
        "div": quotient,
        "rem": a - quotient * b,
        "and": a & b,
        "or": a | b,
        "xor": a ^ b,
        "not": ~a,
    }
    return int(results[operation])


@np.errstate(all="ignore")
def expected(name: str, values: list[int]) -> list[int] | None:
    """The results of one lane, cut to their widths by the caller; None for what needs other lanes."""
    parts = name.partition(":")[0].split(".")
    operation, kind = parts[0], parts[-1]
    if operation in ("shfl", "vote", "activemask", "bar", "ld", "st"):
        return None
    a, b, c = [*values, 0, 0, 0][:3]
    if name.endswith(":pack"):
        return [a | b << (16 if kind.startswith("b32") else 32)]
    if name.endswith(":unpack"):
        bits = 16 if kind.startswith("b32") else 32
        return [a & ((1 << bits) - 1), a >> bits]
    if operation == "cvt" and "x2" in parts[-2]:
        high, low = (convert(parts[-2].removesuffix("x2"), kind, x, parts[1]) for x in (a, b))
        return [high << 16 | low]
    if operation == "cvt":
        return [convert(parts[-2], kind, a, parts[1])]
    if operation == "setp":
        return [int(compare(parts[1], kind.replace("b", "u"), a, b))]
    if operation in ("mov", "selp"):
        return [a if operation == "mov" or c else b]
    if operation == "cvta":
        return [a + (0x7D << 56) * (("shared" in parts) * (-1 if "to" in parts else 1))]
    if operation in ("shl", "shr"):
        bits = int(kind[1:])
        return [0 if b >= bits else a << b] if operation == "shl" else [typed(a, kind.replace("b", "u")) >> min(b, 64)]
    if kind == "pred":
        return [{"and": a & b, "or": a | b, "xor": a ^ b, "not": 1 - a}[operation]]
    if operation in ("mul", "mad") and parts[1] in ("hi", "wide"):
        product = typed(a, kind) * typed(b, kind)
        return [product >> 32 if parts[1] == "hi" else product + (c if operation == "mad" else 0)]
    if operation == "prmt":
        both, out = b << 32 | a, 0
        for k in range(4):
            choice = c >> 4 * k & 15
            byte = both >> 8 * (choice & 7) & 255
            out |= (255 * (byte >> 7) if choice & 8 else byte) << 8 * k
        return [out]
    if operation == "popc":
        return [a.bit_count()]
    if operation == "lop3":
        return [sum((values[3] >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)) & 1) << k for k in range(32))]
    return [arithmetic(operation, kind.replace("b", "u"), *values)]


def inputs(rng: np.random.Generator, letter: str, floats: bool, count: int) -> list[int]:
    if letter == "p":
        return [int(x) for x in rng.integers(0, 2, count)]
    bits = BITS[letter]
    special = [0, 1, 2, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 31, 32, 63, 64]
    if floats and bits == 32:
        numbers = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-40, 3e38, 65504.0, 65520.0, 2.5, 1e10, -3e9]
        special += [raw(x) for x in numbers]
        ordinary = [raw(x) for x in rng.standard_normal(count) * 10.0 ** rng.integers(-6, 6, count)]
    else:
        ordinary = [int.from_bytes(rng.bytes(bits // 8), "little") for _ in range(count)]
    chosen = rng.random(count) < 0.3
    return [
        int(rng.choice(np.array(special, np.uint64))) if pick else x for pick, x in zip(chosen, ordinary, strict=True)
    ]


def test_every_instruction(machine: Machine) -> None:
    """Each that the machine knows, with special and random numbers; what is not checked here fails the test."""
    rng = np.random.default_rng(60)
    count, checked = 256, 0
    for name, signature in machine.instructions().items():
        if expected(name, [1] * 5) is None:
            continue
        results, _, sources = signature.partition("=")
        floats = "f32" in name or "f16" in name
        values = [inputs(rng, letter, floats, count) for letter in sources]
        operation = name.split(".")[0]
        if operation in ("div", "rem") and "f32" not in name:
            values[1] = [v or 3 for v in values[1]]
        if operation in ("shl", "shr"):
            values[1] = [int(v) for v in rng.integers(0, 70, count)]
        if operation == "lop3":
            values[3] = [0xCA] * count
        body = ""
        for k, letter in enumerate(sources):
            body += (
                f"ld.global.u{max(BITS[letter], 8)} %{'h' if letter == 'p' else letter}{k}, [%rd1+{8 * count * k}];\n"
            )
            body += f"setp.ne.u16 %p{k}, %h{k}, 0;\n" if letter == "p" else ""
        outs, ins = (
            [f"%{letter}{k + 5}" for k, letter in enumerate(results)],
            [f"%{x}{k}" for k, x in enumerate(sources)],
        )
        if operation == "lop3":
            ins[3] = "202"
        opcode = name.partition(":")[0]
        if opcode.endswith("f32") and operation in ("div", "sqrt", "rcp"):
            opcode = opcode.replace(".f32", ".rn.f32")
        if name.endswith("pack"):
            pack = "{" + ", ".join(outs if name.endswith("unpack") else ins) + "}"
            body += f"{opcode} {pack}, {ins[0]};\n" if name.endswith("unpack") else f"{opcode} {outs[0]}, {pack};\n"
        else:
            body += f"{opcode} {', '.join(outs + ins)};\n"
        for k, letter in enumerate(results):
            body += f"selp.u16 %h{k + 5}, 1, 0, %p{k + 5};\n" if letter == "p" else ""
            width = "h" if letter == "p" else letter
            body += f"st.global.u{BITS[width]} [%rd1+{8 * count * (5 + k)}], %{width}{k + 5};\n"
        data = np.zeros((7, count), np.uint64)
        for k, column in enumerate(values):
            data[k] = column
        assert machine.run(kernel(body), data, threads=count) == "", name
        for lane in range(count):
            wanted = expected(name, [column[lane] for column in values])
            assert wanted is not None
            for k, letter in enumerate(results):
                want, got = wanted[k] & ((1 << BITS[letter]) - 1), int(data[5 + k, lane])
                pairs = [(want >> 16, got >> 16), (want & 0xFFFF, got & 0xFFFF)] if "x2" in name else [(want, got)]
                for x, y in pairs:
                    nan = letter in "wh" and _is_nan(name, x) and _is_nan(name, y)
                    assert x == y or nan, (name, [hex(column[lane]) for column in values], hex(want), hex(got))
        checked += 1
    assert checked > 300


def _is_nan(name: str, bits: int) -> bool:
    if name.startswith("cvt.rn.f16"):
        return bool(np.isnan(np.uint16(bits).view(np.float16)))
    if name.startswith("cvt.rn.bf16"):
        return bool(np.isnan(np.uint16(bits).view(ml_dtypes.bfloat16).astype(np.float32)))
    return "f32" in name and bool(np.isnan(as_float(bits)))


def test_loads_and_stores_of_every_width(machine: Machine) -> None:
    rng = np.random.default_rng(61)
    for name in machine.instructions():
        operation, _, register = name.partition(":")
        parts = operation.split(".")
        if parts[0] not in ("ld", "st"):
            continue
        count, kind = int(parts[2][1:]) if len(parts) == 3 else 1, parts[1]
        bits = int(kind[1:])
        if (parts[0] == "st" and bits == 8) or bits * count > 128:
            continue  # refused, see below
        names = [f"%{register}{k}" for k in range(count)]
        operand = "{" + ", ".join(names) + "}" if count > 1 else names[0]
        vector = f".v{count}" if count > 1 else ""
        data = rng.integers(0, 2**64, (40, 8), np.uint64)
        before = data.copy()
        body = "shl.b32 %r1, %r0, 6; cvt.u64.u32 %rd2, %r1; add.s64 %rd2, %rd0, %rd2;\n"
        if parts[0] == "ld":
            body += f"ld.global.nc{vector}.{kind} {operand}, [%rd2];\n"
            body += "".join(f"st.global.u{BITS[register]} [%rd2+{16 + 8 * k}], {n};\n" for k, n in enumerate(names))
        else:
            body += "".join(f"ld.global.u{BITS[register]} {n}, [%rd2+{16 + 8 * k}];\n" for k, n in enumerate(names))
            body += f"st.global{vector}.{kind} [%rd2], {operand};\n"
        assert machine.run(kernel(body), data) == "", name
        size = bits // 8
        for lane in range(LANES):
            memory, registers = before[lane].tobytes()[:16], before[lane, 2 : 2 + count]
            for k in range(count):
                if parts[0] == "ld":
                    element = int.from_bytes(memory[size * k : size * k + size], "little", signed=kind[0] == "s")
                    mask = (1 << BITS[register]) - 1
                    assert int(data[lane, 2 + k]) & mask == element & mask, name
                else:
                    got = data[lane].tobytes()[size * k : size * k + size]
                    assert got == (int(registers[k]) & ((1 << bits) - 1)).to_bytes(size, "little"), name


def test_lanes_exchange(machine: Machine) -> None:
    """Shuffles, votes and the mask of active lanes, with all lanes and in the two ways of a branch."""
    body = """
shr.u32 %w0, %r0, 4; setp.eq.u32 %p0, %w0, 0;
shfl.sync.bfly.b32 %w1, %r0, 5, 0x1f, -1;
shfl.sync.up.b32 %w2|%p1, %r0, 3, 0, -1;
shfl.sync.down.b32 %w3, %r0, 2, 0x181f, -1;
shfl.sync.idx.b32 %w4, %r0, 7, 0x1f, -1;
selp.b32 %w5, 1, 0, %p1; shl.b32 %w2, %w2, 1; or.b32 %w2, %w2, %w5;
st.global.u32 [%rd1], %w1; st.global.u32 [%rd1+4], %w2;
st.global.u32 [%rd1+256], %w3; st.global.u32 [%rd1+260], %w4;
@%p0 bra LOW;
shfl.sync.bfly.b32 %w1, %r0, 1, 0x1f, 0xffff0000;
activemask.b32 %w2;
bra.uni END;
LOW:
setp.lt.u32 %p2, %r0, 3;
vote.sync.ballot.b32 %w1, %p2, 0xffff;
vote.sync.any.pred %p3, %p2, 0xffff; vote.sync.all.pred %p4, %p2, 0xffff;
selp.b32 %w2, 1, 0, %p3; selp.b32 %w3, 2, 0, %p4; or.b32 %w2, %w2, %w3;
END:
st.global.u32 [%rd1+512], %w1; st.global.u32 [%rd1+516], %w2;
"""
    data = np.zeros((3, 32), np.uint64)
    assert machine.run(kernel(body), data) == ""
    words = data.view(np.uint32).reshape(3, 32, 2)
    lanes = np.arange(32)
    assert words[0, :, 0].tolist() == (lanes ^ 5).tolist()
    assert words[0, :, 1].tolist() == [2 * (k - 3) + 1 if k >= 3 else 2 * k for k in range(32)]
    assert words[1, :, 0].tolist() == [k + 2 if k % 8 + 2 < 8 else k for k in range(32)]
    assert words[1, :, 1].tolist() == [7] * 32
    assert words[2, :16].tolist() == [[7, 1]] * 16
    assert words[2, 16:].tolist() == [[k ^ 1, 0xFFFF0000] for k in range(16, 32)]


def test_special_registers_loops_and_scopes(machine: Machine) -> None:
    """Lanes that leave a loop at different times meet again behind it; a scope has registers of its own."""
    body = """
mov.u32 %w0, %ntid.x; mov.u32 %w1, %ctaid.x; mov.u32 %w2, %nctaid.x; mov.u32 %w3, %laneid; mov.u32 %w4, %warpid;
mad.lo.s32 %w5, %w1, %w0, %r0; mul.wide.u32 %rd2, %w5, 8; add.s64 %rd2, %rd0, %rd2;
mov.b32 %w6, 0; mov.b32 %w7, 0;
LOOP:
add.s32 %w6, %w6, %w7; add.s32 %w7, %w7, 1; setp.le.u32 %p0, %w7, %w3;
@%p0 bra LOOP;
activemask.b32 %w7;
{ .reg .b32 %w7; mov.b32 %w7, 5; add.s32 %w6, %w6, %w7; }
setp.eq.s32 %p1, %w7, -1; selp.b32 %w7, 1000, 0, %p1; add.s32 %w6, %w6, %w7;
mad.lo.s32 %w6, %w4, 100000, %w6; mad.lo.s32 %w6, %w2, 10000000, %w6;
st.global.u32 [%rd2], %w6;
"""
    data = np.zeros(2 * 64, np.uint64)
    assert machine.run(kernel(body), data, blocks=2, threads=64) == ""
    want = [20_000_000 + 100_000 * (t % 64 // 32) + 1005 + (t % 32) * (t % 32 + 1) // 2 for t in range(128)]
    assert data.view(np.uint32)[::2].tolist() == want


def test_parameters_of_any_layout(machine: Machine) -> None:
    """Each at a multiple of its size or alignment, as C lays a structure out; an index into an array of them, too."""
    head = """
.version 8.0
.target sm_90
.address_size 64
.entry test(.param .u8 a, .param .align 8 .b8 b[20], .param .u64 .ptr .align 1 c, .param .f32 d,
 .param .u64 .ptr .global .align 16 e, .param .u16 f)
{
.reg .b16 %h<3>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
ld.param.u8 %h0, [a]; ld.param.v2.u32 {%r1, %r2}, [b+8]; ld.param.u64 %rd0, [c];
ld.param.f32 %r3, [d]; ld.param.u16 %h1, [f];
mov.u32 %r4, %tid.x; mul.wide.u32 %rd1, %r4, 4; mov.b64 %rd2, b; add.s64 %rd1, %rd1, %rd2; ld.param.u32 %r5, [%rd1+-0];
ld.param.u64 %rd3, [e]; mad.wide.u32 %rd4, %r4, 32, %rd0;
cvt.u32.u16 %r6, %h0; cvt.u32.u16 %r7, %h1;
st.global.v4.u32 [%rd4], {%r6, %r1, %r2, %r3}; st.global.v2.u32 [%rd4+16], {%r5, %r7}; st.global.u64 [%rd4+24], %rd3;
ret;
}
"""

    class Layout(ctypes.Structure):
        _fields_ = (
            ("a", ctypes.c_uint8),
            ("_align", ctypes.c_uint64 * 0),
            ("b", ctypes.c_uint32 * 5),
            ("c", ctypes.c_uint64),
            ("d", ctypes.c_float),
            ("e", ctypes.c_uint64),
            ("f", ctypes.c_uint16),
        )

    pointer, data = ctypes.c_void_p(), np.zeros((5, 8), np.uint32)
    assert machine.library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(data.nbytes)) == 0
    given = Layout(a=200, b=(1, 2, 3, 4, 5), c=pointer.value or 0, d=1.5, e=2**40 + 7, f=65000)
    counts = (ctypes.c_uint32(1), ctypes.c_uint32(5), ctypes.c_size_t(0))
    said = machine.library.sdct_ptx_run(
        head.encode(), *counts, ctypes.byref(given), ctypes.c_size_t(Layout.f.offset + 2)
    )
    assert said.decode() == ""
    assert machine.library.cudaMemcpy(ctypes.c_void_p(data.ctypes.data), pointer, ctypes.c_size_t(data.nbytes), 2) == 0
    assert machine.library.cudaFree(pointer) == 0
    assert data.tolist() == [[200, 3, 4, raw(1.5), k + 1, 65000, 7, 2**8] for k in range(5)]


# --- what a kernel must not do ---------------------------------------------------------------------------------------

SHARED = ".extern .shared .align 16 .b8 buffer[];"
ADDRESS = "mov.u32 %w0, buffer; shl.b32 %w1, %r0, 2; add.s32 %w0, %w0, %w1;\n"
NEIGHBOUR = "xor.b32 %w2, %w1, 128; mov.u32 %w3, buffer; add.s32 %w3, %w3, %w2;\n"  # in another warp
TWIN = "xor.b32 %w2, %w1, 4; mov.u32 %w3, buffer; add.s32 %w3, %w3, %w2;\n"  # in the same warp


WRITE, READ, READ_OTHER = "st.shared.u32 [%w0], %r0;", "ld.shared.u32 %w4, [%w0];", "ld.shared.u32 %w4, [%w3];"
WARP_OF = "shr.u32 %w5, %r0, 5; add.s32 %w5, %w5, 1;"  # 1 and 2
BARRIER, WARP = "bar.sync 0;", "bar.warp.sync -1;"
HALF = "setp.lt.u32 %p0, %r0, 32;"  # the first warp
FAULTS = [
    ("ld.global.u64 %d0, [%rd1+8];", "read of 8 bytes outside of device memory at .* thread 63"),
    ("st.global.u32 [%rd1+-4], %r0;", "write of 4 bytes outside of device memory at .* thread 0"),
    ("mov.u64 %d0, 0; ld.global.u32 %w0, [%d0];", "outside of device memory at 0x0"),
    ("ld.global.u64 %d0, [%rd0+4];", "misaligned access of 8 bytes"),
    (ADDRESS + "st.shared.u32 [%w0+4], %r0;", "write outside of the block's 256 bytes of shared memory at 0x100"),
    (ADDRESS + "ld.shared.u32 %w1, [%w0+-4];", "read outside of the block's"),
    (ADDRESS + READ, "shared memory is read before anything wrote it"),
    (
        ADDRESS + WRITE + "cvt.u64.u32 %d0, %w0; cvta.shared.u64 %d0, %d0; ld.u32 %w4, [%d0]; ld.u32 %w4, [%d0+256];",
        "read outside of the block's",
    ),
    (ADDRESS + NEIGHBOUR + WRITE + READ_OTHER, "read before anything"),
    (ADDRESS + NEIGHBOUR + WRITE + BARRIER + READ_OTHER + WRITE, "thread 0 of block 0 wrote what this one reads"),
    (
        ADDRESS + NEIGHBOUR + WRITE + BARRIER + HALF + "@%p0 " + READ_OTHER + "@!%p0 " + WRITE,
        "race: thread 0 of block 0 read what this one writes",
    ),
    (ADDRESS + TWIN + WRITE + READ_OTHER, "race: thread 1 of block 0 wrote"),
    (ADDRESS + "mov.u32 %w0, buffer;" + WRITE, "race: thread 0 of block 0 wrote what this one writes"),
    ("st.global.u32 [%rd0], %r0;", "race: thread 0 of block 0 wrote what this one writes"),
    ("setp.eq.u32 %p0, %r0, 3; @%p0 ret; bar.sync 0;", "barrier: 63 threads wait here and 1 have left"),
    (HALF + "@%p0 bra A; bar.sync 0; ret;\nA:\nbar.sync 0;", "barrier: threads wait here and at"),
    ("setp.lt.u32 %p0, %r0, 16; @%p0 bra A; bar.sync 0; ret;\nA:\nbar.sync 0;", "wait at different barriers"),
    ("setp.lt.u32 %p0, %r0, 9; @%p0 bra A; shfl.sync.bfly.b32 %w0, %r0, 1, 31, -1;\nA:\n", "are to meet here"),
    ("mov.u32 %w0, 0; div.u32 %w1, %r0, %w0;", "division by zero"),
    ("st.global.u8 [%rd1], %h0;", "stores of single bytes"),
    ("mov.u64 %d0, test_param_0; ld.param.u64 %d1, [%d0+8];", "access beyond the kernel's parameters"),
    ("sin.approx.f32 %w0, %w1;", "PTX line [0-9]+: instruction sin.approx.f32 is not supported"),
    ("div.full.f32 %w0, %w1, %w2;", "instruction div.full.f32 is not supported"),
    ("atom.global.add.u32 %w0, [%rd0], 1;", "instruction atom.global.add.u32 is not supported"),
    ("mov.u32 %w0, %clock;", "operand %clock is not supported"),
    ("bar.sync 1, 96;", "barrier: 64 of 96 threads wait here and 0 have left"),
    (HALF + "@%p0 ret; bar.sync 1, 64;", "barrier: 32 of 64 threads wait here and 32 have left"),
    ("bar.sync 1, 32;", "barrier: 64 threads wait for 32"),
    ("bar.sync 1, 48;", "a barrier is for whole warps"),
    ("bar.sync 16, 32;", "a block has 16 barriers"),
    ("bar.sync %r0, 32;", "lanes disagree about a barrier"),
    (WARP_OF + "add.s32 %w4, %w5, 1; mul.lo.u32 %w4, %w4, 32; bar.sync 1, %w4;", "different numbers of others"),
    # each warp has a barrier of its own, which orders nothing between them
    (ADDRESS + NEIGHBOUR + WARP_OF + WRITE + "bar.sync %w5, 32;" + READ_OTHER, "race: thread 32 of block 0 wrote"),
    (
        ADDRESS + NEIGHBOUR + WARP_OF + WRITE + BARRIER + READ_OTHER + "bar.sync %w5, 32;" + WRITE,
        "read what this one writes",
    ),
    ("bra NOWHERE;", "no label NOWHERE"),
    ("add.s32 %w0, %d0, 1;", "another width"),
    (".local .b32 slow;", ".local is not supported"),
]


@pytest.mark.parametrize(("body", "what"), FAULTS)
def test_faults_are_named(machine: Machine, body: str, what: str) -> None:
    said = machine.run(kernel(body, SHARED), np.zeros(64, np.uint64), threads=64, shared=256)
    assert re.search(what, said), said


@pytest.mark.parametrize(
    "body",
    [
        ADDRESS + NEIGHBOUR + WRITE + BARRIER + READ_OTHER + BARRIER + WRITE,
        ADDRESS + NEIGHBOUR + WRITE + "bar.sync 3, 64;" + READ_OTHER + "bar.sync 4, 64;" + WRITE,
        ADDRESS + TWIN + WARP_OF + WRITE + "bar.sync %w5, 32;" + READ_OTHER + "bar.sync %w5, 32;" + WRITE,
        ADDRESS + TWIN + WRITE + WARP + READ_OTHER,
        ADDRESS + TWIN + WRITE + WARP + READ_OTHER + WARP + WRITE,
        "mul.wide.u32 %d0, %r0, 2; add.s64 %d0, %d0, %rd0; mov.b16 %h0, 1; st.global.u16 [%d0], %h0;",
        "ld.global.u32 %w0, [%rd0]; ld.global.u32 %w0, [%rd0];",
    ],
)
def test_what_is_in_order_passes(machine: Machine, body: str) -> None:
    assert machine.run(kernel(body, SHARED), np.zeros(64, np.uint64), threads=64, shared=256) == ""


def test_blocks_race_with_each_other(machine: Machine) -> None:
    """Even where each of them has a barrier; and what an earlier launch did is done."""
    body = "setp.eq.u32 %p0, %r0, 0; bar.sync 0; @%p0 st.global.u32 [%rd0], %r0; bar.sync 0;"
    data = np.zeros(64, np.uint64)
    assert "race: thread 0 of block 0 wrote" in machine.run(kernel(body), data, blocks=2)
    for _ in range(130):  # the numbers of launches come round
        assert machine.run(kernel(body), data) == ""


# --- deliberate mistakes in the real kernels -------------------------------------------------------------------------

OUT_OF_TURN = "race|read before anything wrote"
SYNC = 'asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");'
FIRST_STORES = "      for (int j = 0; j < 16; ++j) at[j * pitch] = u[j];\n"
MISTAKES = {  # file, what stands there, what shall, what is said
    "no barrier": ("kernel.h", SYNC, "", OUT_OF_TURN),
    "one barrier is missing": (
        "kernel.h",
        FIRST_STORES + "    }\n  }\n  team.sync();\n",
        FIRST_STORES + "    }\n  }\n",
        OUT_OF_TURN,
    ),
    "a barrier for too many": ("kernel.h", '"r"(blockDim.x)', '"r"(blockDim.x + 32)', "of 96 threads wait here"),
    "reads one quad too far": (
        "kernel.h",
        "quad[j * stride];",
        "quad[j * stride + 1];",
        "outside of device memory|x the bound",
    ),
    "writes one place too far": ("kernel.h", FIRST_STORES, FIRST_STORES.replace("pitch]", "pitch + 1]"), OUT_OF_TURN),
    "too little shared memory": (
        "cuda.cu",
        "size_t(plan.shared_bytes(blocks))",
        "size_t(plan.shared_bytes(blocks)) - 16",
        "outside of the block's",
    ),
    "too many threads": (
        "cuda.cu",
        "unsigned(plan.team_threads)",
        "unsigned(plan.team_threads) + 512",
        "invalid configuration",
    ),
    "tables still under way": ("cuda.cu", "failed(cudaStreamSynchronize(stream))", "false", "x the bound|race|status"),
    "too few blocks": ("cuda.cu", "unsigned(split), 1}", "1, 1}", "x the bound"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_kernels_is_found(build: Path, tmp_path: Path, mistake: str) -> None:
    file, before, after, what = MISTAKES[mistake]
    shutil.copytree(ROOT / "plugins", tmp_path / "plugins")
    path = tmp_path / "plugins" / "core" / file
    text = path.read_text()
    assert before in text, "the kernels have changed: name a place in them again"
    path.write_text(text.replace(before, after, 1))
    cuda = path.parent / "cuda.cu"  # the case below is float32: the others need not be compiled
    cuda.write_text(re.sub("spectral_delta<(Half|BFloat16),", "spectral_delta<float,", cuda.read_text()))
    said = Path(build, "CMakeCache.txt").read_text()
    nvcc = re.search(r"^SDCT_NVCC:FILEPATH=(.*)$", said, re.M)
    assert nvcc
    plugins, objects = tmp_path / "plugins", tmp_path / "cuda.o"
    include = [f"-I{plugins}/include", "-std=c++17"]
    compile_ = [nvcc[1], *include, "-O3", "-lineinfo", "-gencode=arch=compute_90,code=compute_90", "--no-compress"]
    compile_ += ["-cudart=none", "-Xcompiler=-fPIC", "-c", str(cuda), "-o", str(objects)]
    link = [
        *map(str, build.glob("CMakeFiles/sdct_driver.dir/**/*.o")),
        str(objects),
        str(build / "libsdct_core.a"),
        f"-L{build}",
        "-lsdct_ptx",
        "-lpthread",
    ]
    driver = tmp_path / "driver"
    for command in (compile_, ["g++", *link, f"-Wl,-rpath,{build}", "-o", str(driver)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    rng = np.random.default_rng(62)
    # the second projection has no entries
    case = make(rng, DTYPES[0], 1024, [768, 96], rows=3, blends=2, capacity=[300, 0])
    case.values[1:] = rng.standard_normal(case.values[1:].shape)
    case.indices[1:] = np.arange(300)[:, None]
    case.ids[:], case.path = [[1, 2], [0, 3], [3, 1]], CUDA
    with pytest.raises(AssertionError, match=what):
        check(case, run(driver, [case], tmp_path)[0])
