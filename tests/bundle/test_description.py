"""The description of an exported folder: exact round trip, and no damaged or hostile file gets past it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_bundle import make_adapter, write_bundle

from sdct_export.bundle.description import Bundle, adapter_sha256, file_sha256
from sdct_export.contract import Cache
from sdct_export.errors import AdapterFormatError, VerificationError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(
        tmp_path_factory.mktemp("b") / "bundle", {"a": make_adapter(0, labels=3), "b": make_adapter(1)}
    )


def description(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "sdct_bundle.json").read_text())
    return raw


def read(tmp_path: Path, raw: object) -> Bundle:
    (tmp_path / "sdct_bundle.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return Bundle.load(tmp_path)


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    first = Bundle.load(folder)
    first.write(tmp_path)
    assert Bundle.load(tmp_path) == first
    assert (tmp_path / "sdct_bundle.json").read_bytes() == (folder / "sdct_bundle.json").read_bytes()
    assert first.model_path.is_file()
    assert first.adapter_path("a").is_dir()


def test_round_trip_of_a_cache(folder: Path, tmp_path: Path) -> None:
    bundle = read(tmp_path, description(folder) | {"cache": CACHE})
    assert bundle.cache == Cache("ort", 2, 2, 8, "float32", (4,))
    assert bundle.cache.pasts[1:3] == ("past_key_values.0.value", "past_key_values.1.key")
    assert bundle.cache.presents[:2] == ("present.0.key", "present.0.value")
    bundle.write(tmp_path)
    assert Bundle.load(tmp_path) == bundle


def test_adapter_hash_covers_both_files_and_their_border(folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(folder)
    bundle.check_adapter("a")
    for config, weights in ((b"ab", b"c"), (b"a", b"bc"), (b"ab", b"d")):
        (tmp_path / "adapter_config.json").write_bytes(config)
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        (tmp_path / f"{config!r}{weights!r}.hash").write_text(adapter_sha256(tmp_path))
    assert len({file_sha256(f) for f in tmp_path.glob("*.hash")}) == 3
    copied = write_bundle(tmp_path / "copy", {"a": make_adapter(2)})
    (copied / "sdct_bundle.json").write_bytes((folder / "sdct_bundle.json").read_bytes())
    with pytest.raises(VerificationError, match="'a' differs from what was exported"):
        Bundle.load(copied).check_adapter("a")
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json is missing"):
        Bundle.load(copied).check_adapter("b")


CACHE = {"target": "ort", "layers": 2, "kv_heads": 2, "head_size": 8, "dtype": "float32", "windows": [4]}
WRONG: dict[str, tuple[tuple[str | int, ...], object, str]] = {
    "kind": (("kind",), "both", "multi or merged"),
    "task": (("task",), 3, "task must be a string"),
    "dtype": (("dtype",), "int8", "dtype must be one of"),
    "dtype unhashable": (("dtype",), [], "dtype must be a string"),
    "hash": (("model_sha256",), None, "model_sha256 must be a string"),
    "input shape": (("inputs", 0, "shape", 0), 1.5, "integers and names"),
    "input dtype": (("inputs", 0, "dtype"), "x", "dtype must be one of"),
    "input dtype unhashable": (("inputs", 0, "dtype"), [], "dtype must be one of"),
    "input name": (("inputs", 0, "name"), 1, "name must be a string"),
    "d_in": (("groups", 0, "d_in"), 0, "positive integer"),
    "d_out": (("groups", 0, "d_out", 0), "8", "positive integer"),
    "d_out count": (("groups", 0, "d_out"), [8], "one d_out and one capacity"),
    "no module": (("groups", 1), {"name": "g", "modules": [], "d_in": 2, "d_out": [], "capacity": []}, "one d_out"),
    "capacity": (("groups", 0, "capacity", 0), -1, "positive integer"),
    "capacity beyond the matrix": (("groups", 0, "capacity", 0), 131, "exceeds the 10 x 13"),
    "capacity infinite": (("groups", 0, "capacity", 0), float("inf"), "positive integer"),
    "head": (("heads", 0, "d_out"), 2**40, "positive integer"),
    "adapter hash": (("adapters", "a", "sha256"), 5, "sha256 must be a string"),
    "adapter labels": (("adapters", "a", "labels"), 0, "labels must be a positive integer"),
    "adapter field": (("adapters", "a", "rank"), 8, "rank"),
    "adapter name": (("adapters", "../a"), {"sha256": "x", "labels": None}, "adapter name '../a' is not allowed"),
    "digest": (("module_digests", "float32", "block.q"), 1, "no float32 digest of module 'block.q'"),
    "unknown field": (("extra",), 1, "extra"),
    "cache": (("cache",), "ort", "damaged description"),
    "cache target": (("cache",), CACHE | {"target": "coreml"}, "target must be one of ort, standard"),
    "cache layers": (("cache",), CACHE | {"layers": 0}, "layers must be a positive integer"),
    "cache heads": (("cache",), CACHE | {"kv_heads": 1 << 20}, "kv_heads of a cache are at most 16384, got 1048576"),
    "cache head size": (("cache",), CACHE | {"head_size": True}, "head_size must be a positive integer"),
    "cache dtype": (("cache",), CACHE | {"dtype": "int8"}, "dtype of a cache must be one of"),
    "cache windows": (("cache",), CACHE | {"windows": [0]}, "window must be a positive integer"),
    "cache field": (("cache",), CACHE | {"extra": 1}, "extra"),
    "version": (("format_version",), 2, r"newer than this version reads \(1\)"),
    "version text": (("format_version",), "1", "positive integer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_descriptions(folder: Path, tmp_path: Path, case: str) -> None:
    path, value, message = WRONG[case]
    raw = description(folder)
    place: Any = raw
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(AdapterFormatError, match=message) as caught:
        read(tmp_path, raw)
    assert str(tmp_path / "sdct_bundle.json") in str(caught.value)


def test_every_field_is_needed(folder: Path, tmp_path: Path) -> None:
    raw = description(folder)
    # what older versions wrote lacks these
    later = {"training_sha256", "model_class", "model_config", "max_tokens", "pooling", "weights", "cache"}
    later |= {"quantization", "foreign"}
    assert later < set(raw)
    read(tmp_path, {key: value for key, value in raw.items() if key not in later})
    for name in set(raw) - later:
        with pytest.raises(AdapterFormatError, match=name):
            read(tmp_path, {key: value for key, value in raw.items() if key != name})


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"a": ' + "9" * 10_000 + "}"])
def test_text_that_is_no_description(tmp_path: Path, text: str) -> None:
    with pytest.raises(AdapterFormatError, match="export the bundle again"):
        read(tmp_path, text)
    with pytest.raises(AdapterFormatError, match="there is no folder"):
        Bundle.load(tmp_path / "nothing")


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from places(inner, (*path, step))


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
values = st.recursive(plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_descriptions(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = copy.deepcopy(description(folder))
    path = data.draw(st.sampled_from(list(places(raw))))
    place: Any = raw
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = data.draw(values)
    try:
        bundle = read(tmp_path, raw)
    except AdapterFormatError:
        return
    bundle.write(tmp_path)
    assert Bundle.load(tmp_path) == bundle
