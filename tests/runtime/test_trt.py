"""The TensorRT backend over stand-ins: buffers, slots, contexts, graphs. What a GPU does is tested in tests/gpu."""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading
import weakref
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
from sdct_export.runtime import trt as trt_module
from sdct_export.runtime.lanes import User
from sdct_export.runtime.trt import MAX_LANES, MAX_SHAPES

ADAPTERS = {"a": make_adapter(1, labels=3), "b": make_adapter(2), "c": make_adapter(3, labels=2)}
ROWS = [{"a": 1.0}, {}, {"a": 0.5, "b": -2.0}]


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_tensorrt.install(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", {"a": ADAPTERS["a"]})


def runs(trt: Any) -> list[str]:
    """What ran on the device, in order."""
    return [call for call in trt.cuda.calls if call in ("execute", "launch", "failed capture")]


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
    assert runs(trt) == ["execute", "launch", "launch", "launch"]
    assert trt.engine.contexts == 1
    model.unload_adapter("a")
    model.load_adapter("a", ADAPTERS["a"])  # another adapter in the slot needs no new graph
    inputs = make_inputs(9, 2)
    close(model.run(inputs, "a"), inputs, [{"a": 1.0}] * 2)
    assert runs(trt)[-1] == "launch"


def test_a_lane_allocates_once_for_every_shape(path: Path, trt: Any) -> None:
    write_engine(path, trt, profile=Profile(batch=(1, 2, 6), sequence=(1, 4, 20), slots=(2, 8, 8)))
    model = MultiAdapterModel(path, backend="tensorrt")
    model.run(make_inputs(0, 1))
    trt.cuda.calls.clear()
    for seed in range(30):
        inputs = make_inputs(seed, 1 + seed % 6, sequence=2 + seed * 7 % 19)
        close(model.run(inputs, "a"), inputs, [{"a": 1.0}] * (1 + seed % 6))
    assert not {"malloc", "free"} & {*trt.cuda.calls}


def test_several_shapes_stay_captured(path: Path, trt: Any) -> None:
    write_engine(path, trt)
    model = MultiAdapterModel(path, backend="tensorrt")
    sizes = [(1 + i, 3 + i) for i in range(MAX_SHAPES)]
    for seed, (batch, sequence) in enumerate([*sizes, *sizes, *reversed(sizes)]):
        inputs = make_inputs(seed, batch, sequence)
        close(model.run(inputs, "a"), inputs, [{"a": 1.0}] * batch)
    assert runs(trt) == ["execute"] * MAX_SHAPES + ["launch"] * 2 * MAX_SHAPES
    model.run(make_inputs(0, 1, 20))  # one more: the shape used longest ago, which is the last of `sizes`, gives way
    assert (trt.engine.contexts, len(trt.cuda.graphs)) == (MAX_SHAPES, MAX_SHAPES)
    for batch, sequence in sizes[:-1]:
        model.run(make_inputs(1, batch, sequence))
    assert runs(trt)[-MAX_SHAPES:] == ["execute"] + ["launch"] * (MAX_SHAPES - 1)
    inputs = make_inputs(2, *sizes[-1])
    close(model.run(inputs), inputs, [{}] * sizes[-1][0])
    assert runs(trt)[-1] == "execute"


def test_a_failed_capture_is_tried_again_and_less_and_less_often(path: Path, trt: Any) -> None:
    write_engine(path, trt)
    model = MultiAdapterModel(path, backend="tensorrt")
    trt.cuda.failing_captures = 1
    inputs = make_inputs(1, 2)
    for _ in range(3):
        close(model.run(inputs, "a"), inputs, [{"a": 1.0}] * 2)
    assert runs(trt) == ["execute", "failed capture", "execute", "launch"]
    trt.cuda.failing_captures = 100
    other = make_inputs(2, 3)
    for _ in range(20):
        close(model.run(other, "a"), other, [{"a": 1.0}] * 3)
    assert runs(trt).count("failed capture") == 1 + 5  # before runs 1, 2, 4, 8 and 16
    trt.cuda.failing_captures = 0
    for seed in range(2):  # another shape is not concerned
        more = make_inputs(seed, 4)
        close(model.run(more, "a"), more, [{"a": 1.0}] * 4)
    assert runs(trt)[-2:] == ["execute", "launch"]


def test_an_outgrown_bank_is_freed_and_its_graphs_give_way(path: Path, trt: Any) -> None:
    write_engine(path, trt)
    model = MultiAdapterModel(path, backend="tensorrt")
    inputs = make_inputs(1, 2)
    for sequence in range(3, 3 + MAX_SHAPES):
        model.run(make_inputs(1, 2, sequence), "a")
    backend, bank = model._open()
    assert bank is not None
    old = [weakref.ref(tensor) for tensor in bank._tensors.by_name.values()]
    lease = bank.lease(["a"]).__enter__()  # a request that started before
    for i in range(10):
        model.load_adapter(f"n{i}", make_adapter(100 + i))
    gc.collect()
    assert all(tensor() is not None for tensor in old)  # it may still run
    found = backend.run({**inputs, "adapter_ids": np.full((2, 1), lease.slots["a"], np.int32),
                         "adapter_scales": np.ones((2, 1), np.float32)}, lease.tensors)  # fmt: skip
    close(found, inputs, [{"a": 1.0}] * 2)
    lease.release()
    del lease
    gc.collect()
    assert all(tensor() is None for tensor in old)
    for sequence in range(3, 3 + MAX_SHAPES):
        close(model.run(make_inputs(1, 2, sequence), "a"), make_inputs(1, 2, sequence), [{"a": 1.0}] * 2)
    assert trt.engine.contexts == MAX_SHAPES


@pytest.mark.parametrize("version", ["8.5.3.1", "8.6.1", "9.3.0", "10.0.1", "10.16.0", "11.1.0"])
def test_every_version_gets_contexts_as_it_makes_them(
    path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    trt = fake_tensorrt.install(monkeypatch, version)
    shared = not version.startswith("8.5")
    write_engine(path, trt, concurrent=shared)
    model = MultiAdapterModel(path, backend="tensorrt")
    for seed, batch in enumerate([1, 2, 1, 2, 1]):
        inputs = make_inputs(seed, batch)
        close(model.run(inputs, "a"), inputs, [{"a": 1.0}] * batch)
    assert trt.engine.contexts == 1 + shared
    assert runs(trt).count("execute") == (2 if shared else 5)


def test_outputs_larger_than_the_page_locked_memory_arrive_in_pieces(
    path: Path, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_module, "STAGING_BYTES", 100)  # less than one row of `hidden`, and no multiple of it
    write_engine(path, trt)
    model = MultiAdapterModel(path, backend="tensorrt")
    for seed in range(3):
        inputs = make_inputs(seed, 3)
        close(model.run(inputs, "a"), inputs, [{"a": 1.0}] * 3)


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
    lanes = model._open()[0]._pool._lanes
    assert 1 <= len(lanes) <= MAX_LANES
    assert all(len(lane.prepared) <= MAX_SHAPES for lane in lanes)


def test_a_context_given_back_twice_is_not_taken_from_the_request_that_has_it_now(path: Path, trt: Any) -> None:
    write_engine(path, trt, concurrent=False)
    model = MultiAdapterModel(path, backend="tensorrt")
    model.run(make_inputs(1, 1), "a")
    pool = model._open()[0]._pool
    first, second = User(), User()
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
    left, trt.cuda.free_bytes = trt.cuda.free_bytes, 8
    with pytest.raises(SdctError, match=r"no device memory for the largest sizes of this engine .*; build it"):
        model.run(inputs)
    trt.cuda.free_bytes += left - 8
    close(model.run(inputs, "a"), inputs, [{"a": 1.0}] * 2)
    del model
    gc.collect()
    assert trt.cuda.free_bytes == before
    assert not trt.cuda.pinned
    assert not trt.cuda.graphs
    assert not trt.cuda.streams


def test_without_memory_for_another_lane_requests_wait_for_those_there_are(path: Path, trt: Any) -> None:
    write_engine(path, trt)
    model = MultiAdapterModel(path, backend="tensorrt")
    inputs = make_inputs(1, 2)
    model.run(inputs)
    pool, user = model._open()[0]._pool, User()
    lane = pool.take((), user)
    trt.cuda.free_bytes = 8
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(model.run(inputs, "a")))
    thread.start()
    thread.join(0.3)
    assert not results  # it waits
    pool.give_back(user)
    thread.join(30)
    close(results[0], inputs, [{"a": 1.0}] * 2)
    assert pool._lanes == [lane]


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


def test_a_package_that_is_not_there_is_no_missing_engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnsupportedError, match="backend 'tensorrt' needs the package tensorrt; pip install"):
        MultiAdapterModel(path, backend="tensorrt")
