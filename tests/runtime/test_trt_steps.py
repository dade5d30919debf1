"""Language models on TensorRT over stand-ins: an engine's tokens equal ONNX Runtime's; buffers, widths, profiles."""

from __future__ import annotations

import dataclasses
import gc
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from decoders import DECODERS, random_rows, torch_logits
from fake_tensorrt import write_engine
from families import random_adapter

from sdct_export import SdctAdapter, export_merged, export_multi
from sdct_export.bundle.description import Bundle
from sdct_export.contract import Cache
from sdct_export.engine.build import EngineManifest, Profile
from sdct_export.errors import ConfigError
from sdct_export.plugin_choice import parse_version
from sdct_export.runtime import MultiAdapterModel, decoding
from sdct_export.runtime.cuda import DevicePart
from sdct_export.runtime.generation import Generation
from sdct_export.runtime.trt_steps import TrtSteps

VERSIONS = ["8.5.3.1", "8.6.1", "9.3.0", "10.0.1", "10.16.0", "11.1.0"]
ROWS: list[Any] = ["a", None, "b", {"a": 0.5, "b": -0.75}, None]
PROMPTS = [row.tolist() for row in random_rows((9, 6, 3, 30, 1), seed=31)]
PROFILE = Profile(batch=(1, 4, 6), sequence=(1, 8, 12), length=(1, 64, 64), slots=(2, 4, 8))


class Made:
    def __init__(self, name: str, folder: Path) -> None:
        family = DECODERS[name]
        self.model = family.model()
        self.adapters: dict[str, SdctAdapter] = {
            k: random_adapter(family, self.model, i) for i, k in enumerate("ab", 1)
        }
        self.ort = export_multi(self.model, self.adapters, folder / "ort", target="ort")
        self.bundle = export_multi(self.model, self.adapters, folder / "trt", target="tensorrt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made("gemma2", tmp_path_factory.mktemp("gemma2"))  # windows and soft caps


@pytest.fixture(scope="module")
def wanted(made: Made) -> list[Generation]:
    """What ONNX Runtime's own operator gives."""
    with MultiAdapterModel(made.ort) as model:
        return model.generate(PROMPTS, ROWS, max_new_tokens=30, stop_tokens=[], logprobs=True)


def same(found: Sequence[Generation], want: Sequence[Generation]) -> None:
    """Tokens equal, and their probabilities, which show more than tokens do."""
    assert None not in {one.logprobs for one in found}
    for one, other in zip(found, want, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.fixture
def engine(made: Made, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, MultiAdapterModel]]:
    def load(version: str = "10.16.0", profile: Profile = PROFILE, bundle: Bundle | None = None) -> Any:
        trt = fake_tensorrt.install(monkeypatch, version)
        path = (bundle or made.bundle).path
        write_engine(path, trt, profile=profile)
        return trt, MultiAdapterModel(path, backend="tensorrt")

    return load


def calls(trt: Any) -> list[str]:
    return [call for call in trt.cuda.calls if call in ("execute", "launch")]


@pytest.mark.parametrize("version", VERSIONS)
def test_greedy_tokens_equal_those_of_the_ort_target(version: str, engine: Any, wanted: list[Generation]) -> None:
    """Prompts longer than a step, widths that double; in place, with a second buffer, and with one context."""
    trt, model = engine(version)
    same(model.generate(PROMPTS, ROWS, max_new_tokens=30, stop_tokens=[], logprobs=True), wanted)
    profiles = 2 if parse_version(version) >= (9, 0) else 1
    assert len(trt.engine.profiles) == profiles
    assert trt.engine.ran == sorted(trt.engine.ran)  # 30 tokens in three steps, then one by one
    assert set(trt.engine.ran) == set(range(profiles))
    if version.startswith("8.5"):
        assert calls(trt) == ["execute"] * (3 + 29)
    else:  # of each width, and of both directions where there are two sets of buffers, one run is no replay
        assert calls(trt).count("execute") <= 3 + 2 * (1 if trt.engine.in_place else 2)
        assert len(calls(trt)) == 3 + 29


@pytest.mark.parametrize("version", ["10.0.1", "10.16.0"])
def test_rows_come_and_go(
    version: str, engine: Any, wanted: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time: the batcher moves rows between slots, and reads prompts beside rows that make tokens."""
    monkeypatch.setattr(decoding, "MOST_SLOTS", 3)
    _, model = engine(version)
    counts = [4, 9, 30, 12, 7]
    got = model.generate(PROMPTS, ROWS, max_new_tokens=counts, stop_tokens=[], logprobs=True)
    for one, whole, count in zip(got, wanted, counts, strict=True):
        assert one.logprobs is not None
        assert whole.logprobs is not None
        assert one.tokens == whole.tokens[:count]
        np.testing.assert_allclose(one.logprobs, whole.logprobs[:count], atol=1e-4)


def test_a_row_does_not_depend_on_the_rows_beside_it(engine: Any) -> None:
    _, model = engine()
    together = model.generate(PROMPTS, ROWS, max_new_tokens=12, stop_tokens=[], logprobs=True)
    for prompt, row, one in zip(PROMPTS, ROWS, together, strict=True):
        same(model.generate([prompt], [row], max_new_tokens=12, stop_tokens=[], logprobs=True), [one])


@pytest.mark.parametrize("version", ["8.5.3.1", "9.3.0", "10.0.1", "10.16.0"])
def test_steps_in_any_order_equal_torch(made: Made, engine: Any, version: str) -> None:
    """Prompts in pieces beside rows that go on, rows that leave and are copied, every adapter, crossing all widths."""
    _, model = engine(version)
    backend, bank = model._open()
    assert made.bundle.cache is not None
    rng = np.random.default_rng(6)
    steps: TrtSteps = backend.steps(made.bundle.cache, 5, 64)
    names = [None, "a", "b", None, "b"]
    held: list[Any] = [np.zeros(0, np.int64)] * 5  # tokens in each slot
    crossed = set()

    def check(slots: range, logits: Any) -> None:
        assert logits.shape == (len(slots), 99)
        rows = [{} if names[slot] is None else {names[slot]: 1.0} for slot in slots]
        want = torch_logits(made.model, [held[slot] for slot in slots], rows, made.adapters)
        for found, expected in zip(logits, want, strict=True):
            np.testing.assert_allclose(found, expected[-1], atol=1e-4, rtol=0)

    with bank.lease(["a", "b"]) as lease:

        def chosen(slots: range) -> dict[str, Any]:
            ids = [[lease.slots.get(names[slot], 0)] for slot in slots]
            return {"adapter_ids": np.array(ids, np.int32), "adapter_scales": np.ones((len(slots), 1), np.float32)}

        def prefill(slots: range, counts: list[int], past: int) -> None:
            new = [rng.integers(0, 99, count) for count in counts]
            for slot, tokens in zip(slots, new, strict=True):
                held[slot] = np.concatenate([held[slot][:past], tokens])
            check(slots, steps.prefill(slots[0], new, past, chosen(slots), lease.tensors))

        def decode(rows: int) -> None:
            slots, new = range(rows), rng.integers(0, 99, rows)
            lengths = np.array([len(held[slot]) for slot in slots])
            for slot in slots:
                held[slot] = np.append(held[slot], new[slot])
            check(slots, steps.decode(new, lengths, chosen(slots), lease.tensors))

        prefill(range(3), [3, 1, 17], 0)  # longer than a step of the engine
        for _ in range(3):
            decode(3)  # beside slot 3, which is free
        prefill(range(3, 4), [9], 0)
        decode(3)  # beside slot 3, which waits for the rest of its prompt
        prefill(range(3, 4), [14], 9)
        decode(4)
        steps.copy(3, 1, 20)
        names[1], held[1] = names[3], held[3][:20]
        decode(3)
        prefill(range(4, 5), [1], 0)
        for _ in range(6):
            crossed.add(steps._width)
            decode(5)
        prefill(range(2, 3), [20], len(held[2]))
        for _ in range(2):
            crossed.add(steps._width)
            decode(5)
        prefill(range(5), [2, 2, 5, 4, 3], 0)
        decode(5)
    assert crossed == {32, 64}


@pytest.mark.parametrize("version", ["10.0.1", "10.16.0"])
def test_a_row_that_ends_in_nan_leaves_nothing_behind(made: Made, engine: Any, version: str) -> None:
    """Nor where its columns were before the buffers became wider, nor in a slot that it is copied over."""
    _, model = engine(version)
    backend, bank = model._open()
    steps: TrtSteps = backend.steps(made.bundle.cache, 3, 64)
    bad, good, more = random_rows((30, 4, 40), seed=9)

    def check(logits: Any, tokens: Any) -> None:
        (want,) = torch_logits(made.model, [tokens], [{}], made.adapters)
        np.testing.assert_allclose(logits, want[-1], atol=1e-4, rtol=0)

    with bank.lease(["a"]) as lease:

        def chosen(*scales: float) -> dict[str, Any]:
            ids = np.full((len(scales), 1), lease.slots["a"], np.int32)
            return {"adapter_ids": ids, "adapter_scales": np.array(scales, np.float32)[:, None]}

        for slot in (0, 1, 2):
            assert np.isnan(steps.prefill(slot, [bad], 0, chosen(3e38), lease.tensors)).all()
        check(steps.prefill(0, [good], 0, chosen(0), lease.tensors)[0], good)
        steps.copy(0, 2, 4)
        check(steps.prefill(2, [more[:3]], 4, chosen(0), lease.tensors)[0], np.concatenate([good, more[:3]]))
        logits = steps.decode(np.array([5, 6, 7]), np.array([4, 30, 7]), chosen(0, 3e38, 0), lease.tensors)
        check(logits[0], np.append(good, 5))
        check(logits[2], np.concatenate([good, more[:3], [7]]))
        check(steps.prefill(2, [more], 0, chosen(0), lease.tensors)[0], more)  # wider
        logits = steps.decode(np.array([8, 6, 7]), np.array([5, 31, 40]), chosen(0, 3e38, 0), lease.tensors)
        check(logits[0], np.append(good, [5, 8]))
        check(logits[2], np.append(more, 7))
        assert np.isnan(logits[1]).all()


class Addresses:
    """An engine that only notes where pasts and presents lie."""

    def __init__(self) -> None:
        self.parts: list[DevicePart] = []

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return types.SimpleNamespace(shape=shape, pointer=1 << 20, nbytes=int(np.prod(shape)) * dtype.itemsize)

    def step(self, profile: int, inputs: Any, bank: Any, presents: Any) -> Any:
        self.parts += [*bank.values(), *presents.values()]
        return {"logits": np.zeros((len(inputs["input_ids"]), 1, 9))}

    def move(self, *_: int) -> None:
        """Nothing to move."""

    clear = move


@pytest.mark.parametrize(
    ("head_size", "length", "most", "widths"),
    [
        (8, 90, 100, {32, 64, 96}),
        (64, 70, 70, {32, 64, 70}),
        (5, 200, 300, {128, 256}),
        (5, 40, 64, 128),
        (8, 97, 97, 16),
    ],
)
def test_slots_begin_where_tensorrt_takes_them(head_size: int, length: int, most: int, widths: Any) -> None:
    """Addresses of inputs are multiples of 256 bytes, whatever the sizes."""
    cache = Cache("tensorrt", 1, 1, head_size, "float16")
    shapes: Any = dict.fromkeys(cache.pasts, ((1, 1, 1, head_size), (2, 1, 8, head_size), (4, 1, most, head_size)))
    shapes["input_ids"] = ((1, 1), (2, 2), (4, 8))
    manifest, engine = EngineManifest("", "", "", "none", True, shapes, shapes, True), Addresses()
    if isinstance(widths, int):
        with pytest.raises(ConfigError, match=f"need a width that is a multiple of {widths} here"):
            TrtSteps(engine, manifest, cache, 4, length)
        return
    steps = TrtSteps(engine, manifest, cache, 4, length)
    for count in (3, 40, length):
        for slot in range(4):
            steps.prefill(slot, [np.zeros(count, np.int64)], 0, {}, {})
    assert {part.shape[2] for part in engine.parts} == widths
    assert [part for part in engine.parts if part.pointer % 256] == []


def test_memory_comes_once_and_goes_with_the_cache(engine: Any) -> None:
    trt, model = engine()
    for version, sets in (("10.16.0", 1), ("10.0.1", 2)):
        trt, model = engine(version)
        model.generate(PROMPTS, ROWS, max_new_tokens=3, stop_tokens=[])  # the lane stays
        gc.collect()
        before = trt.cuda.free_bytes
        backend, _ = model._open()
        cache = model.bundle.cache
        steps = backend.steps(cache, 3, 40)
        buffer = 3 * cache.kv_heads * 64 * cache.head_size * 4
        assert before - trt.cuda.free_bytes == buffer * (sets * len(cache.pasts) + 1)  # one to move rows over
        assert steps.nbytes == before - trt.cuda.free_bytes
        del steps
        gc.collect()
        assert trt.cuda.free_bytes == before


def test_a_second_request_replays_the_graphs_of_the_first_where_its_buffers_lie_there(engine: Any) -> None:
    trt, model = engine()
    first = model.generate(PROMPTS, ROWS, max_new_tokens=8, stop_tokens=[], logprobs=True)
    contexts = trt.engine.contexts
    for _ in range(3):
        same(model.generate(PROMPTS, ROWS, max_new_tokens=8, stop_tokens=[], logprobs=True), first)
    assert trt.engine.contexts == contexts  # those of buffers that are gone are taken over


def test_merged_models_have_a_cache_on_an_engine_too(made: Made, engine: Any, tmp_path: Path) -> None:
    bundles = {t: export_merged(made.model, made.adapters["a"], tmp_path / t, target=t) for t in ("ort", "tensorrt")}
    _, model = engine(bundle=bundles["tensorrt"])
    with MultiAdapterModel(bundles["ort"]) as other:
        want = other.generate(PROMPTS, max_new_tokens=9, stop_tokens=[], logprobs=True)
    same(model.generate(PROMPTS, max_new_tokens=9, stop_tokens=[], logprobs=True), want)


def test_what_the_engine_was_not_built_for_is_refused(engine: Any) -> None:
    trt, model = engine()
    backend, _ = model._open()
    for slots, length in ((7, 4), (1, 65)):
        with pytest.raises(
            ConfigError, match=rf"{slots} rows of up to {length} tokens do not fit .* takes 6 rows of up to 64"
        ):
            backend.steps(model.bundle.cache, slots, length)
    with pytest.raises(ConfigError, match="logits of a row's last token alone; use generate"):
        model.run({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]})
    left, trt.cuda.free_bytes = trt.cuda.free_bytes, 8
    with pytest.raises(ConfigError, match="there is no memory for the cache of 1 rows of 5 tokens"):
        model.generate([[1]], max_new_tokens=4)
    trt.cuda.free_bytes += left - 8
    _, model = engine(profile=dataclasses.replace(PROFILE, batch=(2, 4, 6)))
    with pytest.raises(ConfigError, match=r"takes batches from 2 rows on, .* build it with --batch 1:OPT:MAX"):
        model.generate([[1]], max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DECODERS) - {"gemma2"}))
def test_greedy_tokens_of_every_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(name, tmp_path)
    with MultiAdapterModel(made.ort) as model:
        want = model.generate(PROMPTS, ROWS, max_new_tokens=30, stop_tokens=[], logprobs=True)
    for version in ("10.0.1", "10.16.0"):
        write_engine(made.bundle.path, fake_tensorrt.install(monkeypatch, version), profile=PROFILE)
        with MultiAdapterModel(made.bundle.path, backend="tensorrt") as model:
            same(model.generate(PROMPTS, ROWS, max_new_tokens=30, stop_tokens=[], logprobs=True), want)
