"""Language models on TensorRT over stand-ins: an engine's tokens equal ONNX Runtime's; buffers, widths, profiles."""

from __future__ import annotations

import gc
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
from sdct_export.engine.build import Profile
from sdct_export.errors import ConfigError, SdctError
from sdct_export.plugin_choice import parse_version
from sdct_export.runtime import MultiAdapterModel
from sdct_export.runtime.generation import Generation

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
        return model.generate(PROMPTS, ROWS, max_new_tokens=30, stop_tokens=[])


def same(found: Sequence[Generation], want: Sequence[Generation]) -> None:
    """Tokens equal, and their probabilities, which show more than tokens do."""
    assert len({one.logprobs for one in found}) == len(found)
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
    same(model.generate(PROMPTS, ROWS, max_new_tokens=30, stop_tokens=[]), wanted)
    profiles = 2 if parse_version(version) >= (9, 0) else 1
    assert len(trt.engine.profiles) == profiles
    assert trt.engine.ran == sorted(trt.engine.ran)  # 30 tokens in three steps, then one by one
    assert set(trt.engine.ran) == set(range(profiles))
    if version.startswith("8.5"):
        assert calls(trt) == ["execute"] * (3 + 29)
    else:  # of each width, and of both directions where there are two sets of buffers, one run is no replay
        assert calls(trt).count("execute") <= 3 + 2 * (1 if trt.engine.in_place else 2)
        assert len(calls(trt)) == 3 + 29


def test_a_row_does_not_depend_on_the_rows_beside_it(engine: Any) -> None:
    _, model = engine()
    together = model.generate(PROMPTS, ROWS, max_new_tokens=12, stop_tokens=[])
    for prompt, row, one in zip(PROMPTS, ROWS, together, strict=True):
        same(model.generate([prompt], [row], max_new_tokens=12, stop_tokens=[]), [one])


@pytest.mark.parametrize("version", ["10.0.1", "10.16.0"])
def test_each_step_equals_torch_wherever_the_padding_is(made: Made, engine: Any, version: str) -> None:
    """The steps alone: rows that rest and go on, prompts in pieces beside a past, padding in all places."""
    _, model = engine(version)
    backend, bank = model._open()
    assert made.bundle.cache is not None
    tokens = random_rows((40, 25), seed=32)
    want = torch_logits(made.model, tokens, [{}, {"b": 1.0}], made.adapters)
    steps = backend.steps(made.bundle.cache, 2, 41)
    done, mask = np.zeros(2, int), np.zeros((2, 0), np.int64)
    rng = np.random.default_rng(6)
    with bank.lease(["b"]) as lease:
        selection = {
            "adapter_ids": np.array([[0], [lease.slots["b"]]], np.int32),
            "adapter_scales": np.ones((2, 1), "f"),
        }
        while (done < (40, 25)).any():
            length = int(rng.choice([1, 1, 5, 15]))
            ids, part = np.full((2, length), 7), np.zeros((2, length), np.int64)
            for row, have in enumerate(done):
                count = min(int(rng.integers(0, length + 1)), len(tokens[row]) - have)
                places = np.sort(rng.choice(length, count, replace=False))
                ids[row, places], part[row, places] = tokens[row][have : have + count], 1
            mask = np.concatenate([mask, part], 1)
            logits = steps.run({"input_ids": ids, "attention_mask": mask, **selection}, lease.tensors)
            assert logits.shape == (2, 1, want[0].shape[1])
            done += part.sum(1)
            for row in range(2):
                if part[row].any():
                    np.testing.assert_allclose(logits[row, 0], want[row][done[row] - 1], atol=1e-4, rtol=0)
    with pytest.raises(SdctError, match=r"rows of \d+ tokens do not fit into a cache of 64"):
        steps.run({"input_ids": np.zeros((2, 30), int), "attention_mask": np.ones((2, 30), int), **selection}, {})


def test_memory_comes_once_and_goes_with_the_request(engine: Any) -> None:
    trt, model = engine()
    model.generate(PROMPTS, ROWS, max_new_tokens=3, stop_tokens=[])  # the lane stays
    gc.collect()
    before = trt.cuda.free_bytes
    backend, _ = model._open()
    steps = backend.steps(model.bundle.cache, 3, 40)
    cache = model.bundle.cache
    buffer = 3 * cache.kv_heads * 64 * cache.head_size * 4
    assert before - trt.cuda.free_bytes == buffer * (len(cache.pasts) + 1)  # one to move columns over
    del steps
    gc.collect()
    assert trt.cuda.free_bytes == before


def test_a_second_request_replays_the_graphs_of_the_first_where_its_buffers_lie_there(engine: Any) -> None:
    trt, model = engine()
    first = model.generate(PROMPTS, ROWS, max_new_tokens=8, stop_tokens=[])
    contexts = trt.engine.contexts
    for _ in range(3):
        same(model.generate(PROMPTS, ROWS, max_new_tokens=8, stop_tokens=[]), first)
    assert trt.engine.contexts == contexts  # those of buffers that are gone are taken over


def test_merged_models_have_a_cache_on_an_engine_too(made: Made, engine: Any, tmp_path: Path) -> None:
    bundles = {t: export_merged(made.model, made.adapters["a"], tmp_path / t, target=t) for t in ("ort", "tensorrt")}
    _, model = engine(bundle=bundles["tensorrt"])
    with MultiAdapterModel(bundles["ort"]) as other:
        want = other.generate(PROMPTS, max_new_tokens=9, stop_tokens=[])
    same(model.generate(PROMPTS, max_new_tokens=9, stop_tokens=[]), want)


def test_what_the_engine_was_not_built_for_is_refused(engine: Any) -> None:
    trt, model = engine()
    for prompts, count in (([[1]] * 7, 4), ([[1] * 60], 5)):
        with pytest.raises(ConfigError, match=r"does not fit this engine, which takes 1 to 6 rows of up to 64"):
            model.generate(prompts, max_new_tokens=count)
    with pytest.raises(ConfigError, match="logits of a row's last token alone; use generate"):
        model.run({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]})
    trt.cuda.free_bytes = 8
    with pytest.raises(ConfigError, match="there is no memory for the cache of 1 rows of 5 tokens"):
        model.generate([[1]], max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DECODERS) - {"gemma2"}))
def test_greedy_tokens_of_every_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(name, tmp_path)
    with MultiAdapterModel(made.ort) as model:
        want = model.generate(PROMPTS, ROWS, max_new_tokens=30, stop_tokens=[])
    for version in ("10.0.1", "10.16.0"):
        write_engine(made.bundle.path, fake_tensorrt.install(monkeypatch, version), profile=PROFILE)
        with MultiAdapterModel(made.bundle.path, backend="tensorrt") as model:
            same(model.generate(PROMPTS, ROWS, max_new_tokens=30, stop_tokens=[]), want)
