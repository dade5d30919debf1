"""The TensorRT backend over stand-ins: buffers, slots, contexts, graphs. What a GPU does is tested in tests/gpu."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from fake_tensorrt import write_engine
from interrupts import in_time
from tiny_bundle import make_adapter, make_inputs, reference, write_bundle

from sdct_export.bundle.description import file_sha256
from sdct_export.engine.build import (
    ENGINE_FILE,
    PLUGIN_LIBRARY,
    EngineManifest,
    Profile,
)
from sdct_export.errors import AdapterFormatError, ConfigError, SdctError, UnsupportedError
from sdct_export.runtime import MultiAdapterModel
from sdct_export.runtime.trt import _User

ADAPTERS = {"a": make_adapter(1, labels=3), "b": make_adapter(2), "c": make_adapter(3, labels=2)}
ROWS = [{"a": 1.0}, {}, {"a": 0.5, "b": -2.0}]


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_tensorrt.install(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", {"a": ADAPTERS["a"]})


def close(found: dict[str, Any], inputs: dict[str, Any], rows: list[dict[str, float]]) -> None:
    for name, expected in reference(inputs, rows, ADAPTERS).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4)


def test_mixed_blended_and_base_rows_equal_the_reference(path: Path, trt: Any) -> None:
    write_engine(path, trt)
    model = MultiAdapterModel(path, backend="tensorrt")
    model.load_adapter("b", ADAPTERS["b"])
    inputs = make_inputs(5, 3)
    found = model.run(inputs, ROWS)
    close(found, inputs, ROWS)
    base = model.run(inputs)
    assert all((found[n][1] == base[n][1]).all() for n in base)
    assert not np.allclose(found["hidden"][0], base["hidden"][0])
    assert trt.host_code_allowed


def test_a_shape_is_captured_once_and_then_replayed_with_new_contents(path: Path, trt: Any) -> None:
    write_engine(path, trt)
    model = MultiAdapterModel(path, backend="tensorrt")
    for seed in range(4):
        inputs = make_inputs(seed, 2)
        rows = [{"a": 1.0}, {}] if seed % 2 else [{}, {"a": 2.0}]
        close(model.run(inputs, rows), inputs, rows)
    assert trt.cuda.calls == ["execute", "launch", "launch", "launch"]
    assert trt.engine.contexts == 1
    model.unload_adapter("a")
    model.load_adapter("a", ADAPTERS["a"])  # another adapter in the slot needs no new graph
    inputs = make_inputs(9, 2)
    close(model.run(inputs, "a"), inputs, [{"a": 1.0}] * 2)
    assert trt.cuda.calls[-1] == "launch"


def test_a_to_b_to_a_is_bit_exact(path: Path, trt: Any) -> None:
    write_engine(path, trt)
    model = MultiAdapterModel(path, backend="tensorrt")
    model.load_adapter("b", ADAPTERS["b"])
    inputs = make_inputs(5, 2)
    first, between, again = (model.run(inputs, name) for name in ("a", "b", "a"))
    assert all((first[n] == again[n]).all() for n in first)
    assert not np.array_equal(first["hidden"], between["hidden"])


def test_the_bank_grows_up_to_the_engines_limit_and_then_evicts(path: Path, trt: Any) -> None:
    write_engine(path, trt, profile=Profile(slots=(2, 4, 12)))
    model = MultiAdapterModel(path, backend="tensorrt")
    named = {f"n{i}": make_adapter(100 + i) for i in range(20)}
    inputs = make_inputs(5, 1)
    for name, adapter in named.items():
        model.load_adapter(name, adapter)
    for name, adapter in named.items():
        found = model.run(inputs, name)
        expected = reference(inputs, [{name: 1.0}], {name: adapter})
        np.testing.assert_allclose(found["hidden"], expected["hidden"], rtol=1e-4, atol=1e-4)
    assert sum(info.slot is not None for info in model.adapters.values()) == 11
    assert len(model.adapters) == 21


def test_many_shapes_and_threads_share_a_bounded_pool(path: Path, trt: Any) -> None:
    write_engine(path, trt)
    model = MultiAdapterModel(path, backend="tensorrt")
    model.load_adapter("b", ADAPTERS["b"])
    errors: list[BaseException] = []

    def client(seed: int) -> None:
        try:
            for i in range(6):
                batch = 1 + (seed + i) % 4
                inputs = make_inputs(seed * 10 + i, batch, sequence=3 + i % 3)
                rows = [ROWS[(seed + j) % 3] for j in range(batch)]
                close(model.run(inputs, rows), inputs, rows)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert 1 <= trt.engine.contexts <= 8


def test_a_context_given_back_twice_is_not_taken_from_the_request_that_has_it_now(path: Path, trt: Any) -> None:
    write_engine(path, trt, concurrent=False)
    model = MultiAdapterModel(path, backend="tensorrt")
    model.run(make_inputs(1, 1), "a")
    pool = model._open()[0]._pool
    first, second = _User(), _User()
    context = pool.take((), first)
    pool.give_back(first)
    assert pool.take((), second) is context
    pool.give_back(first)
    assert context.user() is second
    del second  # lost without giving it back
    assert in_time(lambda: pool.take((), first)) is context


def test_one_context_where_the_profile_cannot_be_shared(path: Path, trt: Any) -> None:
    write_engine(path, trt, concurrent=False)
    model = MultiAdapterModel(path, backend="tensorrt")
    threads = [threading.Thread(target=model.run, args=(make_inputs(i, 1 + i % 2), "a")) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trt.engine.contexts == 1


def test_sizes_outside_the_profile_are_refused_and_harm_nothing(path: Path, trt: Any) -> None:
    write_engine(path, trt, profile=Profile(batch=(1, 2, 2), sequence=(3, 5, 6), blend=(1, 1, 1)))
    model = MultiAdapterModel(path, backend="tensorrt")
    model.load_adapter("b", ADAPTERS["b"])
    for inputs, rows in [
        (make_inputs(0, 3), None),
        (make_inputs(0, 1, sequence=2), None),
        (make_inputs(0, 1, sequence=7), None),
        (make_inputs(0, 1), [{"a": 1.0, "b": 1.0}]),
    ]:
        with pytest.raises(ConfigError, match=r"the engine takes .* to .*; split the batch, or build the engine"):
            model.run(inputs, rows)
    inputs = make_inputs(1, 2)
    close(model.run(inputs, "a"), inputs, [{"a": 1.0}] * 2)


def test_device_memory_is_given_back_and_its_lack_is_told(path: Path, trt: Any) -> None:
    write_engine(path, trt)
    before = trt.cuda.free_bytes
    model = MultiAdapterModel(path, backend="tensorrt")
    inputs = make_inputs(1, 2)
    model.run(inputs)
    left, trt.cuda.free_bytes = trt.cuda.free_bytes, 8
    with pytest.raises(SdctError, match="no device memory for a request of this size"):
        model.run(make_inputs(1, 4))
    trt.cuda.free_bytes += left - 8
    close(model.run(inputs, "a"), inputs, [{"a": 1.0}] * 2)
    del model
    assert trt.cuda.free_bytes == before


def test_merged_bundles_run_too(tmp_path: Path, trt: Any) -> None:
    path = write_bundle(tmp_path / "merged", merged=True)
    write_engine(path, trt, plugin="none")
    inputs = make_inputs(5, 3)
    close(MultiAdapterModel(path, backend="tensorrt").run(inputs), inputs, [{}] * 3)
    assert not trt.host_code_allowed


def test_what_does_not_fit_is_refused(path: Path, trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = path / ENGINE_FILE
    for changes, message in [
        ({"tensorrt": "10.0.1"}, "was built by TensorRT 10.0.1, this is 10.16.0"),
        ({"model_sha256": "0" * 64}, "was built from another model"),
        ({"engine_sha256": "0" * 64}, "differs from its manifest"),
    ]:
        write_engine(path, trt, **changes)
        with pytest.raises(AdapterFormatError, match=message):
            MultiAdapterModel(path, backend="tensorrt")
    monkeypatch.setenv("SDCT_LIBRARY_PATH", str(path))
    write_engine(path, trt, plugin=PLUGIN_LIBRARY)
    with pytest.raises(UnsupportedError, match="needs the plugin library sdct_tensorrt"):
        MultiAdapterModel(path, backend="tensorrt")
    write_engine(path, trt)
    engine.write_bytes(b"something else")
    manifest = EngineManifest.load(engine)
    dataclasses.replace(manifest, engine_sha256=file_sha256(engine)).write(engine)
    with pytest.raises(AdapterFormatError, match=r"cannot load it here .magic tag does not match.; build the engine"):
        MultiAdapterModel(path, backend="tensorrt")
    with pytest.raises(UnsupportedError, match="no CUDA device 3"):
        MultiAdapterModel(path, backend="tensorrt", device="cuda:3")
