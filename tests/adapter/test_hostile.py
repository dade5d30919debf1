"""Damaged and malicious adapter folders: always `AdapterFormatError` with the file's name, never anything else."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.entries import SdctEntries
from sdct_export.errors import AdapterFormatError

GOLDEN = Path(__file__).parents[1] / "golden" / "adapter"
GOLDENS = {1: GOLDEN, 2: GOLDEN.with_name("adapter_v2")}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "encoder.layer.0.attention.self.query"
Tensors = dict[str, np.ndarray]


def tensors() -> Tensors:
    adapter = SdctAdapter.load(GOLDEN)
    found: Tensors = {name: array.copy() for name, array in adapter.saved.items()}
    entries = adapter.modules[Q]  # the half-precision modules only add their own dtypes
    return found | {f"{Q}.sdct_values": entries.values.copy(), f"{Q}.sdct_indices": entries.indices.copy()}


def config() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((GOLDEN / CONFIG).read_text())
    return raw | {"shapes": {Q: [12, 8]}}


def write(folder: Path, raw: object = None, data: Tensors | bytes | None = None) -> Path:
    folder.mkdir()
    text = raw if isinstance(raw, str) else json.dumps(config() if raw is None else raw)
    (folder / CONFIG).write_text(text)
    data = tensors() if data is None else data
    (folder / WEIGHTS).write_bytes(data if isinstance(data, bytes) else save(data))
    return folder


def file_of(header: object, body: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_the_untouched_folder_loads(tmp_path: Path) -> None:
    assert SdctAdapter.load(write(tmp_path / "a")).modules[Q].n == 5


def set_value(position: int, value: float) -> Callable[[Tensors], None]:
    def change(t: Tensors) -> None:
        t[f"{Q}.sdct_values"][position] = value

    return change


def set_index(position: int, row: int, col: int) -> Callable[[Tensors], None]:
    def change(t: Tensors) -> None:
        t[f"{Q}.sdct_indices"][position] = (row, col)

    return change


def put(name: str, array: np.ndarray) -> Callable[[Tensors], None]:
    return lambda t: t.update({name: array})


WRONG_TENSORS = {
    "nan": (set_value(2, np.nan), r"NaN or infinite numbers \(first at position 2\)"),
    "inf": (set_value(0, -np.inf), "NaN or infinite"),
    "row beyond the weight": (set_index(1, 12, 0), r"\(12, 0\) lies outside the 12 x 8"),
    "col beyond the weight": (set_index(1, 0, 8), r"\(0, 8\) lies outside"),
    "largest index": (set_index(1, 2**31 - 1, 0), "lies outside"),
    "negative": (set_index(1, -1, 3), "negative"),
    "repeated": (set_index(1, 0, 0), r"\(0, 0\) is repeated"),
    "int64 indices": (put(f"{Q}.sdct_indices", np.zeros((5, 2), np.int64)), "must be int32, got int64"),
    "float indices": (put(f"{Q}.sdct_indices", np.zeros((5, 2), np.float32)), "must be int32"),
    "float64 values": (put(f"{Q}.sdct_values", np.ones(5)), "got float64"),
    "integer values": (put(f"{Q}.sdct_values", np.ones(5, np.int32)), "got int32"),
    "scalar values": (put(f"{Q}.sdct_values", np.ones((), np.float32)), r"shape \[n\]"),
    "empty values": (put(f"{Q}.sdct_values", np.ones(0, np.float32)), "n >= 1"),
    "more values than indices": (put(f"{Q}.sdct_values", np.ones(6, np.float32)), r"shape \[6, 2\] to match"),
    "flat indices": (put(f"{Q}.sdct_indices", np.zeros(10, np.int32)), "to match"),
    "values alone": (lambda t: t.pop(f"{Q}.sdct_indices"), "has values but no"),
    "indices alone": (lambda t: t.pop(f"{Q}.sdct_values"), "no matching sdct_values"),
    "module missing": (
        lambda t: (t.pop(f"{Q}.sdct_values"), t.pop(f"{Q}.sdct_indices")),
        "lists module .* its tensors are missing",
    ),
    "foreign tensor": (put("base_model.model.q.lora_A.weight", np.ones((2, 2), np.float32)), "unknown tensor"),
    "integer head": (put("classifier.weight", np.ones((2, 2), np.int32)), "expected a float type"),
    "nan head": (put("classifier.bias", np.full(2, np.nan, np.float32)), "'classifier.bias' holds NaN"),
    "no module name": (
        lambda t: t.update({".sdct_values": np.ones(1, np.float32), ".sdct_indices": np.zeros((1, 2), np.int32)}),
        "names no module",
    ),
    "nothing": (lambda t: t.clear(), "tensors are missing"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors(tmp_path: Path, case: str) -> None:
    change, message = WRONG_TENSORS[case]
    changed = tensors()
    change(changed)
    folder = write(tmp_path / "a", data=changed)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        SdctAdapter.load(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


WRONG_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown field": (lambda c: c | {"rank": 8}, "unknown field 'rank'"),
    "future version": (lambda c: c | {"format_version": 3}, r"version 3 is newer than this version reads \(2\)"),
    "later version": (lambda c: c | {"format_version": 2}, r"unknown tensor '.*\.sdct_indices'"),
    "version 0": (lambda c: c | {"format_version": 0}, "positive integer"),
    "version true": (lambda c: c | {"format_version": True}, "positive integer"),
    "version text": (lambda c: c | {"format_version": "1"}, "positive integer"),
    "lora": (lambda c: c | {"peft_type": "LORA"}, "project --model BASE --lora .* --output ADAPTER`"),
    "prompt": (lambda c: c | {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "changes no weights"),
    "no peft_type": (lambda c: {k: v for k, v in c.items() if k != "peft_type"}, "peft_type is None"),
    "no targets": (lambda c: {k: v for k, v in c.items() if k != "target_modules"}, "target_modules is missing"),
    "zero scaling": (lambda c: c | {"scaling": 0}, "no effect"),
    "huge scaling": (lambda c: c | {"scaling": 10**400}, "finite number"),
    "nan scaling": (lambda c: c | {"scaling": float("nan")}, "finite number"),
    "deep targets": (lambda c: c | {"target_modules": "(" * 5000 + ")" * 5000}, "regular expression"),
    "shape not a pair": (lambda c: c | {"shapes": {Q: [12]}}, r"must be \[d_out, d_in\]"),
    "shape zero": (lambda c: c | {"shapes": {Q: [0, 8]}}, r"must be \[d_out, d_in\]"),
    "shape huge": (lambda c: c | {"shapes": {Q: [2**40, 8]}}, r"must be \[d_out, d_in\]"),
    "shapes a list": (lambda c: c | {"shapes": [[12, 8]]}, "must map module names"),
    "shape of nothing": (lambda c: c | {"shapes": {"other": [12, 8]}}, "'other', but its tensors are missing"),
    "hash without dtype": (lambda c: c | {"base_model_dtype": None}, "belong together"),
    "dtype without hash": (lambda c: c | {"base_model_hash": None}, "belong together"),
    "hash a number": (lambda c: c | {"base_model_hash": 7}, "belong together"),
    "dtype a list": (lambda c: c | {"base_model_dtype": ["float32"]}, "belong together"),
    "a list": (lambda c: [c], "must hold a JSON object, got list"),
    "a number": (lambda c: 3, "got int"),
    "empty": (lambda c: "", "not valid JSON"),
    "truncated": (lambda c: json.dumps(c)[:-20], "not valid JSON"),
    "repeated field": (lambda c: json.dumps(c)[:-1] + ', "scaling": 5}', "repeated field 'scaling'"),
    "repeated nested field": (
        lambda c: json.dumps(c | {"shapes": {}}).replace("{}", '{"a": [1, 1], "a": [2, 2]}'),
        "repeated field 'a'",
    ),
    "deep nesting": (lambda c: "[" * 200_000 + "]" * 200_000, "not valid JSON"),
    "deep object": (lambda c: '{"a":' * 100_000 + "1" + "}" * 100_000, "not valid JSON"),
    "endless number": (lambda c: '{"n_coefficients": ' + "9" * 10_000 + "}", "not valid JSON"),
    "too large": (lambda c: " " * (4 << 20) + json.dumps(c), "may have up to"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_configs(tmp_path: Path, case: str) -> None:
    change, message = WRONG_CONFIGS[case]
    folder = write(tmp_path / "a", raw=change(config()))
    with pytest.raises(AdapterFormatError, match=message) as caught:
        SdctAdapter.load(folder)
    assert str(folder) in str(caught.value)


def version_2() -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of the golden adapter of version 2, whose three modules have 5, 6 and 4 values."""
    adapter = SdctAdapter.load(GOLDENS[2])
    raw: dict[str, Any] = json.loads((GOLDENS[2] / CONFIG).read_text())
    found = {f"{module}.sdct_values": entries.values.copy() for module, entries in adapter.modules.items()}
    header, body = header_of(2)
    begin, end = header["sdct_positions"]["data_offsets"]
    found |= {name: array.copy() for name, array in adapter.saved.items()}
    return raw, found | {"sdct_positions": np.frombuffer(body[begin:end], np.uint8).copy()}


def set_positions(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda c, t: t.update(sdct_positions=change(t["sdct_positions"]))


WRONG_POSITIONS: dict[str, tuple[Callable[[dict[str, Any], Tensors], object], str]] = {
    "missing": (lambda c, t: t.pop("sdct_positions"), r"sdct_positions must be uint8 \[14\] .* and is missing"),
    "short": (set_positions(lambda p: p[:-1]), r"uint8 \[14\] .* is uint8 \[13\]"),
    "long": (set_positions(lambda p: np.append(p, p[:1])), r"uint8 \[14\] .* is uint8 \[15\]"),
    "of rank 2": (set_positions(lambda p: p.reshape(2, 7)), r"uint8 \[14\] .* is uint8 \[2, 7\]"),
    "int8": (set_positions(lambda p: p.view(np.int8)), r"uint8 \[14\] .* is int8"),
    "zeros": (set_positions(np.zeros_like), r"layer\.0\.attention\.self\.query': its positions are damaged"),
    "ones": (set_positions(lambda p: p | 255), "its positions are damaged"),
    "of another module": (set_positions(lambda p: np.roll(p, 5)), "its positions are damaged"),
    "another shape": (lambda c, t: c["shapes"].update({Q: [2, 3]}), r"sdct_positions must be uint8 \[11\]"),
    "no shapes": (lambda c, t: c.pop("shapes"), "lacks the shape of module"),
    "a shape missing": (lambda c, t: c["shapes"].pop(Q), f"lacks the shape of module '{Q}'"),
    "more values": (lambda c, t: t.update({f"{Q}.sdct_values": np.ones(97, np.float32)}), "more than its 12 x 8"),
    "no values": (lambda c, t: t.update({f"{Q}.sdct_values": np.ones(0, np.float32)}), "n >= 1"),
    "values of rank 0": (lambda c, t: t.update({f"{Q}.sdct_values": np.ones((), np.float32)}), r"shape \[n\]"),
    "a module too many": (
        lambda c, t: t.update({"x.sdct_values": np.ones(2, np.float32)}) or c["shapes"].update(x=[3, 3]),
        r"sdct_positions must be uint8 \[16\]",
    ),
    "indices too": (
        lambda c, t: t.update({f"{Q}.sdct_indices": np.zeros((5, 2), np.int32)}),
        "unknown tensor '.*sdct_indices'",
    ),
    "as version 1": (lambda c, t: c.update(format_version=1), r"has values but no .*\.sdct_indices"),
}


@pytest.mark.parametrize("case", WRONG_POSITIONS)
def test_wrong_positions(tmp_path: Path, case: str) -> None:
    change, message = WRONG_POSITIONS[case]
    raw, changed = version_2()
    assert SdctAdapter.load(write(tmp_path / "good", raw, changed)).modules[Q].n == 5
    change(raw, changed)
    folder = write(tmp_path / "a", raw, changed)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        SdctAdapter.load(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


def test_config_that_is_not_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / CONFIG).write_bytes(b"\xff\xfe{}")
    with pytest.raises(AdapterFormatError, match="not valid JSON"):
        SdctAdapter.load(folder)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WRONG_FILES = {
    "empty": b"",
    "short": b"\x01\x02",
    "zip": b"PK\x03\x04" + bytes(200),
    "pickle": b"\x80\x04\x95" + bytes(200),
    "header length beyond the file": struct.pack("<Q", 1 << 40) + b"{}",
    "largest header length": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header of 200 MB claimed": struct.pack("<Q", 200 << 20) + bytes(1000),
    "header not JSON": file_of(b"not json"),
    "header not UTF-8": file_of(b'{"\xff": 1}'),
    "header a list": file_of([1, 2]),
    "header deep": file_of(b"[" * 100_000),
    "unknown dtype": file_of({"a": ONE | {"dtype": "F31"}}, bytes(8)),
    "float8": file_of({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
    "offsets beyond the file": file_of({"a": ONE | {"data_offsets": [0, 800]}}, bytes(8)),
    "offsets reversed": file_of({"a": ONE | {"data_offsets": [8, 0]}}, bytes(8)),
    "shape larger than data": file_of({"a": ONE | {"shape": [3]}}, bytes(8)),
    "shape overflows": file_of({"a": ONE | {"shape": [2**62, 2**62]}}, bytes(8)),
    "negative shape": file_of({"a": ONE | {"shape": [-2]}}, bytes(8)),
    "overlap": file_of({"a": ONE, "b": ONE}, bytes(8)),
    "hole": file_of({"a": ONE, "b": ONE | {"data_offsets": [12, 20]}}, bytes(20)),
    "trailing bytes": file_of({"a": ONE}, bytes(9)),
    "missing field": file_of({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "metadata not text": file_of({"__metadata__": {"a": 1}, "a": ONE}, bytes(8)),
    "truncated": save(tensors())[:-1],
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_safetensors(tmp_path: Path, case: str) -> None:
    folder = write(tmp_path / "a", data=WRONG_FILES[case])
    with pytest.raises(AdapterFormatError) as caught:
        SdctAdapter.load(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


def test_a_sparse_file_beyond_the_cap_is_refused_unread(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate((8 << 30) + 1)
    with pytest.raises(AdapterFormatError, match="may have up to"):
        SdctAdapter.load(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_things_that_are_not_files(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "a")
    (folder / name).unlink()
    with pytest.raises(AdapterFormatError, match="is missing"):
        SdctAdapter.load(folder)
    (folder / name).mkdir()
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        SdctAdapter.load(folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)  # opening it would wait for a writer
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        SdctAdapter.load(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    with pytest.raises(AdapterFormatError, match="cannot be read"):
        SdctAdapter.load(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder, opened = write(tmp_path / "a"), os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AdapterFormatError, match=rf"{name} cannot be read: Permission denied"):
        SdctAdapter.load(folder)


def test_symlinked_files_as_caches_make_them_load(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    (tmp_path / "a").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "a" / name).symlink_to(store / name)
    assert SdctAdapter.load(tmp_path / "a").modules[Q].n == 5


@pytest.mark.parametrize("path", ["missing", "file", "x" * 5000, "nul\0"])
def test_path_that_is_no_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterFormatError, match="is not a folder"):
        SdctAdapter.load(tmp_path / path)


# fuzzing: whatever the bytes, the loader gives a valid adapter or AdapterFormatError

FUZZ = settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
BYTES = {(v, name): (folder / name).read_bytes() for v, folder in GOLDENS.items() for name in (CONFIG, WEIGHTS)}
VERSIONS = pytest.mark.parametrize("version", GOLDENS)


@pytest.fixture
def scratch(tmp_path: Path, version: int) -> Path:
    return Path(shutil.copytree(GOLDENS[version], tmp_path / "fuzzed"))


def load_or_refuse(folder: Path) -> None:
    try:
        adapter = SdctAdapter.load(folder)
    except AdapterFormatError:
        return
    copy = folder.parent / "copy"
    adapter.save(copy)  # what loads can be saved, and means the same again
    again = SdctAdapter.load(copy)
    shutil.rmtree(copy)
    assert again.config == adapter.config
    assert all(coefficients(e) == coefficients(adapter.modules[m]) for m, e in again.modules.items())
    assert again.modules.keys() == adapter.modules.keys()


def coefficients(entries: SdctEntries) -> set[tuple[int, int, bytes]]:
    """What the entries say, in whatever order."""
    return {(*index, value.tobytes()) for index, value in zip(entries.indices.tolist(), entries.values, strict=True)}


edits = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "cut"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=3,
)


@VERSIONS
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@FUZZ
@given(changes=edits)
def test_fuzzed_bytes(scratch: Path, version: int, name: str, changes: list[tuple[str, float, bytes]]) -> None:
    data = bytearray(BYTES[version, name])
    for kind, where, new in changes:
        at = int(where * len(data))
        if kind == "set":
            data[at : at + len(new)] = new
        elif kind == "insert":
            data[at:at] = new
        else:
            del data[at : at + len(new) ** 2]
    (scratch / CONFIG).write_bytes(BYTES[version, CONFIG])
    (scratch / WEIGHTS).write_bytes(BYTES[version, WEIGHTS])
    (scratch / name).write_bytes(data)
    load_or_refuse(scratch)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3))


@VERSIONS
@FUZZ
@given(changes=st.dictionaries(st.sampled_from(sorted(config())), values, min_size=1, max_size=3))
def test_fuzzed_config_fields(scratch: Path, version: int, changes: dict[str, object]) -> None:
    (scratch / CONFIG).write_text(json.dumps(json.loads(BYTES[version, CONFIG]) | changes))
    load_or_refuse(scratch)


def header_of(version: int) -> tuple[dict[str, Any], bytes]:
    """The header of a golden file, and the bytes after it."""
    data = BYTES[version, WEIGHTS]
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@VERSIONS
@FUZZ
@given(
    which=st.integers(0, 99),
    rename=st.none()
    | st.sampled_from(["", ".", "classifier", "classifier.", f"{Q}.sdct_values.x", "sdct_positions"])
    | st.text(max_size=9),
    changes=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), values, max_size=2),
    dtype=st.none() | st.sampled_from(["F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E5M2", "C64"]),
)
def test_fuzzed_tensor_headers(
    scratch: Path, version: int, which: int, rename: str | None, changes: dict[str, object], dtype: str | None
) -> None:
    header, body = header_of(version)
    name = sorted(header)[which % len(header)]
    tensor = header.pop(name) | changes | ({"dtype": dtype} if dtype else {})
    header[name if rename is None else rename] = tensor
    (scratch / WEIGHTS).write_bytes(file_of(header, body))
    load_or_refuse(scratch)
