"""Trainer's checkpoints as untrusted files: an adapter, or `AdapterFormatError` with the file's name."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_adapters import golden
from safetensors.numpy import save

from sdct_export.adapter import state
from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.folder import encode_safetensors, fields_of
from sdct_export.adapter.state import EXTRA, STATE_FILE, State, encode_state
from sdct_export.errors import AdapterFormatError, BaseMismatchError

Tensors = dict[str, np.ndarray]
Q = "encoder.layer.0.attention.self.query"


def fields() -> dict[str, Any]:
    adapter = golden(2)
    shapes = {m: e.shape for m, e in adapter.modules.items() if e.shape is not None}
    return fields_of(adapter.config, shapes, adapter.base_hash, adapter.base_dtype, None)


def tensors(raw: object = None, active: str | None = "legal") -> Tensors:
    """What the state dict of a model with the golden adapter `legal` and a small one, `other`, holds."""
    adapter = golden(2)
    found: Tensors = {}
    for module, entries in adapter.modules.items():
        found[f"base.{module}.sdct.entries.legal.values"] = entries.values.copy()
        found[f"base.{module}.sdct.entries.legal.indices"] = entries.indices.copy()
    found[f"base.{Q}.sdct.entries.other.values"] = np.ones(1, np.float32)
    found[f"base.{Q}.sdct.entries.other.indices"] = np.zeros((1, 2), np.int32)
    for name, array in adapter.saved.items():
        found[f"base.{name}" if active == "legal" else f"parked.legal.{name}"] = array.copy()
        found[f"parked.other.{name}" if active == "legal" else f"base.{name}"] = array + 1
    raw = fields() if raw is None else raw
    own = {"legal": raw, "other": fields() | {"shapes": {Q: [12, 8]}}}
    found[EXTRA] = np.frombuffer(encode_state(State(active, own, {})), np.uint8)  # type: ignore[arg-type]
    return found


def write(folder: Path, found: Tensors) -> Path:
    folder.mkdir()
    (folder / STATE_FILE).write_bytes(encode_safetensors(found))
    return folder


@pytest.mark.parametrize("active", ["legal", "other"])
def test_the_active_adapter_is_read(tmp_path: Path, active: str) -> None:
    adapter = SdctAdapter.load(write(tmp_path / "a", tensors(active=active)))
    want = golden(2)
    if active == "other":
        assert list(adapter.modules) == [Q]
        assert adapter.modules[Q].values.tolist() == [1.0]
        assert np.array_equal(adapter.saved["classifier.bias"], want.saved["classifier.bias"] + 1)
        return
    assert adapter.config == want.config
    assert adapter.base_hash == want.base_hash
    for module, entries in want.modules.items():
        assert adapter.modules[module].values.tobytes() == entries.values.tobytes()
        assert adapter.modules[module].indices.tobytes() == entries.indices.tobytes()
        assert adapter.modules[module].shape == (12, 8)
    assert np.array_equal(adapter.saved["classifier.weight"], want.saved["classifier.weight"])


def test_an_adapter_folder_comes_before_a_checkpoint_in_the_same_place(tmp_path: Path) -> None:
    golden().save(tmp_path / "a")
    (tmp_path / "a" / STATE_FILE).write_bytes(b"not read")
    assert len(SdctAdapter.load(tmp_path / "a").modules) == 3


def test_a_module_of_many_parts_is_found_where_it_is_parked(tmp_path: Path) -> None:
    found = tensors(active="other")
    for name in [name for name in found if name.startswith("parked.legal.")]:
        found[name.replace("classifier", "model/head/dense")] = found.pop(name)
    own = {"legal": fields() | {"modules_to_save": ["head.dense"]}}
    found[EXTRA] = np.frombuffer(encode_state(State(None, own, {})), np.uint8)
    adapter = SdctAdapter.load(write(tmp_path / "a", found))
    assert set(adapter.saved) == {"model.head.dense.weight", "model.head.dense.bias"}


def extra(**changes: object) -> Callable[[Tensors], object]:
    return lambda t: t.update({EXTRA: tensors(fields() | changes)[EXTRA]})


def described(text: object) -> Callable[[Tensors], object]:
    data = text if isinstance(text, bytes) else json.dumps(text).encode()
    return lambda t: t.update(
        {EXTRA: np.frombuffer(encode_safetensors({"state": np.frombuffer(data, np.uint8)}), np.uint8)}
    )


WRONG: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a plain model": (lambda t: t.pop(EXTRA), "is no checkpoint of a model with sDCT adapters"),
    "extra of floats": (lambda t: t.update({EXTRA: np.zeros(4, np.float32)}), "is no checkpoint of a model"),
    "extra empty": (lambda t: t.update({EXTRA: np.zeros(0, np.uint8)}), "_extra_state is truncated"),
    "extra cut": (lambda t: t.update({EXTRA: t[EXTRA][:-1]}), "_extra_state is truncated"),
    "extra huge": (lambda t: t.update({EXTRA: np.zeros(21 << 20, np.uint8)}), "more than it may"),
    "no state": (
        lambda t: t.update({EXTRA: np.frombuffer(save({"a": np.zeros(1, np.uint8)}), np.uint8)}),
        "_extra_state is damaged",
    ),
    "not JSON": (described(b"{"), "is damaged"),
    "not text": (described(b"\xff"), "is damaged"),
    "deep": (described(b"[" * 100_000), "is damaged"),
    "a list": (described([1]), "is damaged"),
    "no adapters": (described({"active": None, "adapters": {}}), "it holds no adapters"),
    "adapters a list": (described({"active": None, "adapters": [1]}), "it holds no adapters"),
    "adapters of numbers": (described({"active": None, "adapters": {"a": 1}}), "not described"),
    "active unknown": (described({"active": "b", "adapters": {"a": {}}}), "not described"),
    "active a list": (described({"active": ["a"], "adapters": {"a": {}}}), "not described"),
    "more said": (described({"active": "a", "adapters": {"a": {}}, "x": 1}), "it holds no adapters"),
    "another method": (extra(peft_type="LORA"), "peft_type is 'LORA'"),
    "a later version": (extra(format_version=3), "version 3 is newer"),
    "unknown field": (extra(rank=8), "unknown field 'rank'"),
    "scaling": (extra(scaling=0), "no effect"),
    "shape": (extra(shapes={Q: [2, 2]}), "outside the 2 x 2|more than its 2 x 2"),
    "a record without its probe": (
        extra(trained_on={"model_class": "a:B", "fresh_parameters": None, "id2label": None, "dtype": "float32"}),
        "do not belong together|trained_on must hold",
    ),
    "values alone": (lambda t: t.pop(f"base.{Q}.sdct.entries.legal.indices"), "has values but no"),
    "indices alone": (lambda t: t.pop(f"base.{Q}.sdct.entries.legal.values"), "no matching"),
    "nan": (lambda t: t[f"base.{Q}.sdct.entries.legal.values"].fill(np.nan), "NaN"),
    "another kind": (lambda t: t.update({f"base.{Q}.sdct.entries.legal.x": np.ones(1, np.float32)}), "unknown tensor"),
    "an unknown parameter": (lambda t: t.update({"base.pooler.weight": np.ones(1, np.float32)}), "unknown tensor"),
    "a foreign tensor": (lambda t: t.update({"x": np.ones(1, np.float32)}), "unknown tensor 'x'"),
    "nothing": (lambda t: [t.pop(name) for name in list(t) if name != EXTRA], "tensors are missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checkpoints(tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    found = tensors()
    change(found)
    folder = write(tmp_path / "a", found)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        SdctAdapter.load(folder)
    assert str(folder / STATE_FILE) in str(caught.value)


def test_a_checkpoint_beyond_the_room_there_is_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", tensors())
    with pytest.raises(BaseMismatchError, match=r"far more than there is room for \(100\)"):
        SdctAdapter.load(folder, max_bytes=100)


edits = st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=3)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits, inner=st.booleans())
def test_fuzzed_bytes(tmp_path: Path, changes: list[tuple[bool, float, bytes]], inner: bool) -> None:
    found = tensors()
    data = bytearray(found[EXTRA].tobytes() if inner else encode_safetensors(found))
    for insert, where, new in changes:
        at = int(where * len(data))
        data[at : at if insert else at + len(new)] = new
    if inner:
        data = bytearray(encode_safetensors(found | {EXTRA: np.frombuffer(bytes(data), np.uint8)}))
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / STATE_FILE).write_bytes(data)
    with contextlib.suppress(AdapterFormatError):  # whatever the bytes, an adapter or this
        assert SdctAdapter.load(tmp_path / "a").n_parameters > 0


def test_names_are_those_of_the_model() -> None:
    from sdct_export.base.model import CHILD

    assert f".{CHILD}.entries." == state.ENTRIES
