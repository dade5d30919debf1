"""Continuous batching: tokens as alone and as in transformers, whatever comes and goes meanwhile; refusals; memory."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import DECODERS, VOCABULARY
from families import edited, random_adapter
from interrupts import check_idle, in_time
from torch import nn

from sdct_export import export_multi
from sdct_export.adapter.entries import Array
from sdct_export.errors import ConfigError, SdctError, UnknownAdapterError
from sdct_export.runtime import ContinuousBatcher, Event, MultiAdapterModel, Sampling, generation
from sdct_export.runtime.batching import _WORTH
from sdct_export.runtime.steps import SharedSteps

MARGIN = 1e-4  # two tokens this close are one as good as the other
SELECTIONS: list[Any] = [None, "a", "b", {"a": 0.5, "b": -0.75}]
GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2)


class Made:
    """A Gemma 2, which has sliding windows in every other layer, and soft caps."""

    def __init__(self, target: str, folder: Path) -> None:
        family = DECODERS["gemma2"]
        self.model: nn.Module = family.model()
        self.adapters = {k: random_adapter(family, self.model, i) for i, k in enumerate("abc", 1)}
        own = {name: self.adapters[name] for name in "ab"}
        self.bundle = export_multi(self.model, own, folder / "bundle", target=target)

    @functools.cache  # noqa: B019 - as long as the test module
    def merged(self, row: tuple[tuple[str, float], ...]) -> Any:
        return edited(self.model, dict(row), self.adapters)


@pytest.fixture(scope="module", params=["ort", "standard"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp("gemma2"))


@pytest.fixture
def model(made: Made) -> Iterator[MultiAdapterModel]:
    with MultiAdapterModel(made.bundle) as loaded:
        yield loaded
        bank = loaded._open()[1]
        assert bank is not None
        check_idle(bank)  # nothing holds an adapter any more


@dataclasses.dataclass
class Asked:
    """What a request asks for, and what came of it."""

    prompt: Sequence[int]
    adapters: Any = None
    sampling: Sampling = GREEDY
    count: int = 10
    stops: Sequence[int] = ()
    seed: int | None = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish: str | None = None
    error: SdctError | None = None

    def submit(self, batcher: ContinuousBatcher) -> int:
        return batcher.submit(
            self.prompt, self.adapters, sampling=self.sampling, max_new_tokens=self.count, stop_tokens=self.stops,
            seed=self.seed,
        )  # fmt: skip

    def take(self, event: Event) -> None:
        assert self.finish is None, "an event after the end"
        assert (event.token is None) == (event.finish in ("cancelled", "error"))
        if event.token is not None:
            self.tokens.append(event.token)
        self.finish, self.error = event.finish, event.error


def run(batcher: ContinuousBatcher, asked: Sequence[Asked]) -> list[Asked]:
    """All of them submitted, and stepped until they have ended."""
    numbers = {one.submit(batcher): one for one in asked}
    while batcher.busy:
        for event in batcher.step():
            numbers[event.request].take(event)
    return list(asked)


def alone(model: MultiAdapterModel, one: Asked) -> Asked:
    with model.batcher(1, 64) as batcher:
        return run(batcher, [dataclasses.replace(one, tokens=[], finish=None)])[0]


@dataclasses.dataclass
class Computed:
    """The tokens that each prefill computes, and the pasts they stand behind."""

    pasts: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)


def watch(batcher: ContinuousBatcher) -> Computed:
    found, prefill = Computed(), batcher._steps.prefill

    def counted(first: int, rows: Sequence[Array], past: int, *more: Any) -> Array:
        found.pasts.append(past)
        found.tokens += [len(row) for row in rows]
        return prefill(first, rows, past, *more)

    batcher._steps.prefill = counted
    return found


def ids(count: int, seed: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(5, VOCABULARY, count).tolist()
    return drawn


def row_of(adapters: Any) -> tuple[tuple[str, float], ...]:
    return tuple(adapters.items()) if isinstance(adapters, Mapping) else ((adapters, 1.0),) if adapters else ()


def agrees(made: Made, one: Asked) -> bool:
    """Whether tokens are those of transformers; those after a choice between two that are as good do not count."""
    whole = torch.tensor([[*one.prompt, *one.tokens]])
    with torch.no_grad():
        logits = made.merged(row_of(one.adapters))(input_ids=whole, use_cache=False).logits[
            0, len(one.prompt) - 1 : -1
        ]
    best, _ = logits.max(-1)
    got = logits[torch.arange(len(one.tokens)), torch.tensor(one.tokens)]
    differ = torch.nonzero(got < best)[:, 0]
    if not len(differ):
        return True
    assert best[differ[0]] - got[differ[0]] < MARGIN, f"token {int(differ[0])} of {one}"
    return False


def random_requests(rng: np.random.Generator, count: int) -> list[Asked]:
    stem = rng.integers(0, VOCABULARY, 30)
    asked = []
    for seed in range(count):
        length = int(rng.integers(1, 30))
        prompt = stem[:length] if rng.random() < 0.6 else rng.integers(0, VOCABULARY, length)
        if rng.random() < 0.5:
            prompt = np.append(prompt, rng.integers(0, VOCABULARY, 3))
        asked.append(
            Asked(
                prompt.tolist(), SELECTIONS[rng.integers(4)], SAMPLED if rng.random() < 0.4 else GREEDY,
                int(rng.integers(1, 30)), [3, 4], seed,
            )
        )  # fmt: skip
    return asked


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_alone_and_of_transformers_in_any_schedule(
    made: Made, model: MultiAdapterModel, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    asked = random_requests(rng, 20)
    batcher = model.batcher(int(rng.integers(2, 6)), 64, int(rng.integers(2, 40)))
    computed, numbers, left, cancelled = watch(batcher), {}, list(asked), []
    with batcher:
        while left or batcher.busy:
            while left and rng.random() < 0.4:
                numbers[left[0].submit(batcher)] = left[0]
                left.pop(0)
            if numbers and rng.random() < 0.03:
                number = int(rng.choice(list(numbers)))
                if batcher.cancel(number):
                    cancelled.append(numbers[number])
            for event in batcher.step(int(rng.integers(1, 4))):
                numbers[event.request].take(event)
    exact, greedy = 0, 0
    for one in asked:
        want = alone(model, one)
        if one in cancelled:
            assert one.finish == "cancelled"
            assert one.tokens == want.tokens[: len(one.tokens)]
        else:
            assert (one.tokens, one.finish) == (want.tokens, want.finish), one
        if one.sampling == GREEDY and one.tokens:
            greedy += 1
            exact += agrees(made, one)
    assert greedy > 5
    assert exact >= greedy - 1
    assert sum(computed.pasts) > 0  # prompts in chunks, and columns used again


def test_a_seed_decides_whatever_runs_beside_it(model: MultiAdapterModel) -> None:
    prompt, others = ids(7, 1), [Asked(ids(5 + i, i), "b", SAMPLED, 6 + i, (), i) for i in range(5)]

    def mine(seed: int | None) -> Asked:
        return Asked(prompt, "a", Sampling(temperature=1.5), 20, (), seed)

    with model.batcher(3, 64) as batcher:
        first, _, second, *_, other = run(batcher, [mine(1), others[0], mine(1), *others[1:], mine(2)])
        assert first.tokens == second.tokens == alone(model, mine(1)).tokens
        assert other.tokens == alone(model, mine(2)).tokens != first.tokens
        free = [one.tokens for one in run(batcher, [mine(None), mine(None)])]
        assert free[0] != free[1]


def test_a_prompt_goes_on_from_columns_under_the_same_adapters_alone(model: MultiAdapterModel) -> None:
    stem = ids(20, 3)
    with model.batcher(4, 64) as batcher:
        computed = watch(batcher)

        def tokens_of(adapters: Any, prompt: Sequence[int] = stem) -> tuple[list[int], int]:
            """What was made, and how many tokens of the prompt were computed for that."""
            computed.tokens.clear()
            (one,) = run(batcher, [Asked(prompt, adapters, count=6)])
            assert one.tokens == alone(model, one).tokens
            return one.tokens, sum(computed.tokens)

        assert tokens_of("a")[1] == 20
        made, count = tokens_of("a")
        assert count == 1  # the last token of a prompt is computed always
        assert tokens_of("a", [*stem, *made[:5], 9, 9])[1] == 2  # what was made is there as well
        assert tokens_of("a", stem[:18])[1] == 1
        assert tokens_of("a", [*stem[:17], 9, 9, 9])[1] == 3
        assert tokens_of("a", [*stem[: _WORTH - 1], 9, 9])[1] == _WORTH + 1  # too little in common
        for other in (None, "b", {"a": 0.5}, {"a": 1.0, "b": 1.0}):
            assert tokens_of(other)[1] == 20
        assert tokens_of({"a": 1, "b": 1.0})[1] == 1


def test_columns_of_rows_that_run_are_copied_and_those_of_ended_ones_last(model: MultiAdapterModel) -> None:
    stem, other = ids(20, 4), ids(20, 5)
    with model.batcher(3, 64) as batcher:
        computed = watch(batcher)
        first = Asked(stem, "a", count=30)
        number = first.submit(batcher)
        for event in batcher.step():
            first.take(event)
        asked = [Asked([*stem, 7], "a", count=3), Asked(other, "b", count=2), Asked([*other, 8], "b", count=9)]
        numbers = {number: first} | {one.submit(batcher): one for one in asked}
        while batcher.busy:
            for event in batcher.step():
                numbers[event.request].take(event)
        assert computed.tokens == [20, 1, 20, 1]
        for one in numbers.values():
            assert one.tokens == alone(model, one).tokens
        computed.tokens.clear()
        for one in (Asked([*stem, 7, 6], "a"), Asked([*other, 8, 6], "b")):  # in three slots there was room for both
            assert run(batcher, [one])[0].tokens == alone(model, one).tokens
        assert sum(computed.tokens) <= 6


def test_columns_of_an_adapter_that_was_loaded_again_are_not_used(made: Made, model: MultiAdapterModel) -> None:
    prompt = ids(20, 6)
    with model.batcher(2, 64) as batcher:
        computed = watch(batcher)
        (old,) = run(batcher, [Asked(prompt, "a")])
        model.reload_adapter("a", made.adapters["c"])
        (new,) = run(batcher, [Asked(prompt, "a")])
        assert computed.tokens == [20, 20]
        assert new.tokens == alone(model, new).tokens != old.tokens
        assert agrees(made, dataclasses.replace(new, adapters="c"))
        model.unload_adapter("a")
        model.load_adapter("a", made.adapters["c"])
        (again,) = run(batcher, [Asked(prompt, "a")])
        assert computed.tokens == [20, 20, 20]
        assert again.tokens == new.tokens


def test_a_running_row_keeps_its_adapter_and_a_waiting_one_learns_that_it_is_gone(
    made: Made, model: MultiAdapterModel
) -> None:
    want = [alone(model, Asked(ids(9, 7), "a", count=20)), alone(model, Asked(ids(9, 8), "b", count=20))]
    with model.batcher(2, 64) as batcher:
        asked = [Asked(ids(9, 7), "a", count=20), Asked(ids(9, 8), "b", count=20), Asked([5, 6], "a")]
        numbers = {one.submit(batcher): one for one in asked}
        for _ in range(3):
            for event in batcher.step():
                numbers[event.request].take(event)
        model.unload_adapter("a")
        model.reload_adapter("b", made.adapters["c"])
        for i in range(20):  # the bank grows under them, and what is free is overwritten
            model.load_adapter(f"more{i}", made.adapters["c"])
        numbers |= {(one := Asked([5], f"more{i}")).submit(batcher): one for i in range(5)}
        while batcher.busy:
            for event in batcher.step():
                numbers[event.request].take(event)
        assert [one.tokens for one in asked[:2]] == [one.tokens for one in want]
        assert (asked[2].tokens, asked[2].finish) == ([], "error")
        assert isinstance(asked[2].error, UnknownAdapterError)
        assert all(one.finish == "length" for number, one in numbers.items() if number > 2)


def test_requests_wait_for_slots_of_the_bank_in_their_turn(made: Made) -> None:
    with MultiAdapterModel(made.bundle, max_slots=2) as model:  # one adapter at a time
        with model.batcher(4, 64) as batcher:
            asked = [Asked(ids(4 + i, i), ["a", "b", None][i % 3], count=4 + i) for i in range(7)]
            in_time(lambda: run(batcher, asked))
            lease = model._open()[1].lease(["a"]).__enter__()  # type: ignore[union-attr]
            waiting = Asked([7, 8], "b").submit(batcher)
            assert batcher.step() == []  # it waits a little, and says nothing
            lease.release()
            assert in_time(lambda: [event for _ in range(2) for event in batcher.step()])[0].request == waiting
            with pytest.raises(ConfigError, match="needs 2 adapters at once, the bank holds at most 1"):
                batcher.submit([1], {"a": 1.0, "b": 1.0}, max_new_tokens=4)
        for one in asked:
            assert one.tokens == alone(model, one).tokens


def test_cancelling_ends_a_request_wherever_it_is(model: MultiAdapterModel) -> None:
    with model.batcher(2, 64, 4) as batcher:
        asked = [Asked(ids(3, 1), "a", count=30), Asked(ids(30, 2), "b", count=5), Asked(ids(5, 3), None)]
        numbers = [one.submit(batcher) for one in asked]
        for _ in range(4):  # the first makes tokens, the second is half computed, the third waits
            for event in batcher.step():
                asked[event.request].take(event)
        assert (batcher.running, batcher.waiting) == (2, 1)
        assert [batcher.cancel(number) for number in (*numbers[1:], 99)] == [True, True, False]
        events = batcher.step()
        assert {(e.request, e.finish) for e in events if e.finish} == {(1, "cancelled"), (2, "cancelled")}
        assert (batcher.running, batcher.waiting) == (1, 0)
        for event in events:
            asked[event.request].take(event)
        assert batcher.cancel(0)
        assert batcher.step() == [Event(0, finish="cancelled")]
        assert not batcher.cancel(0)
        assert not batcher.busy
        assert asked[0].tokens == alone(model, asked[0]).tokens[: len(asked[0].tokens)]
        for late in run(batcher, [Asked(ids(30, 2), "b", count=5), Asked(ids(3, 1), "a")]):
            assert late.tokens == alone(model, late).tokens


def damaged(batcher: ContinuousBatcher, change: Callable[[int, Array], None]) -> None:
    """The logits of the batcher's decode steps, counted from 0, pass through `change`."""
    decode, calls = batcher._steps.decode, []

    def changed(*arguments: Any) -> Array:
        logits = decode(*arguments).copy()
        calls.append(None)
        change(len(calls) - 1, logits)
        return np.asarray(logits)

    batcher._steps.decode = changed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_with_nan_ends_alone_and_leaves_nothing_behind(model: MultiAdapterModel, value: float) -> None:
    asked = [Asked(ids(18, i), "a", [GREEDY, SAMPLED][i % 2]) for i in range(3)]
    with model.batcher(3, 64) as batcher:
        computed = watch(batcher)

        def change(call: int, logits: Array) -> None:
            if call == 3:
                logits[1, 40] = value

        damaged(batcher, change)
        run(batcher, asked)
        assert [one.finish for one in asked] == ["length", "error", "length"]
        assert len(asked[1].tokens) >= 1
        with pytest.raises(SdctError, match=r"request 1: the model gives NaN or infinite logits after \d+ new tokens"):
            raise asked[1].error or AssertionError
        computed.tokens.clear()
        (again,) = run(batcher, [Asked(asked[1].prompt, "a", SAMPLED)])
        assert computed.tokens == [18]
        for one in (asked[0], asked[2], again):
            assert one.tokens == alone(model, one).tokens


def test_a_backend_that_fails_ends_the_requests_it_ran(model: MultiAdapterModel) -> None:
    with model.batcher(2, 64) as batcher:

        def fail(call: int, logits: Array) -> None:
            if call == 1:
                raise SdctError("the device is gone")

        damaged(batcher, fail)
        asked = run(batcher, [Asked(ids(3, i), "a") for i in range(3)])
        assert [one.finish for one in asked] == ["error", "error", "length"]
        assert str(asked[0].error) == "the device is gone"
        assert asked[2].tokens == alone(model, asked[2]).tokens


def test_an_exception_in_a_step_is_not_hidden_and_frees_the_adapters_at_the_end(model: MultiAdapterModel) -> None:
    with model.batcher(2, 64) as batcher:

        def interrupt(call: int, logits: Array) -> None:
            raise KeyboardInterrupt

        damaged(batcher, interrupt)
        Asked([5, 6, 7], "a").submit(batcher)
        with pytest.raises(KeyboardInterrupt):
            batcher.step()
        with pytest.raises(SdctError, match="cut off by an exception"):
            batcher.step()
    with pytest.raises(SdctError, match="this batcher is closed"):
        batcher.step()
    with pytest.raises(SdctError, match="this batcher is closed"):
        batcher.submit([5])
    assert not batcher.cancel(0)
    batcher.close()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompt": []}, "the prompt has no token"),
        ({"prompt": [[1]]}, "the prompt must be token ids, a list of integers"),
        ({"prompt": [[1], [2, 3]]}, "the prompt must be token ids"),
        ({"prompt": [3.7]}, "the prompt must be token ids"),
        ({"prompt": "What colour"}, "the prompt must be token ids, a list of integers, not a text"),
        ({"prompt": [3, -1]}, "the prompt holds -1"),
        ({"prompt": [VOCABULARY]}, f"the prompt holds {VOCABULARY}; token ids of this model are below {VOCABULARY}"),
        ({"prompt": [5] * 20, "max_new_tokens": 13}, "20 tokens and 13 new ones are 33 in all, .* cache has 32"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer from 1"),
        ({"seed": -1}, "seed must be an integer from 0 on"),
        ({"stop_tokens": ["x"]}, "stop_tokens must be token ids"),
        ({"stop_tokens": None}, "stop_tokens must be token ids"),
        ({"stop_tokens": 5}, "stop_tokens must be token ids"),
        ({"stop_tokens": float("nan")}, "stop_tokens must be token ids"),
        ({"stop_tokens": b"ab"}, "stop_tokens must be token ids"),
        ({"stop_tokens": [3, VOCABULARY]}, f"stop_tokens holds {VOCABULARY}; .* of this model are below {VOCABULARY}"),
        ({"sampling": None}, "sampling must be a Sampling, got None"),
        ({"sampling": {}}, "sampling must be a Sampling"),
        ({"sampling": 0.5}, "sampling must be a Sampling"),
        ({"text": "x"}, "text must be a TextStream or None, got 'x'"),
        ({"adapters": {"a": float("inf")}}, "the scale of 'a' must be a finite number"),
        ({"adapters": "nobody"}, "no adapter named 'nobody'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_once(model: MultiAdapterModel, arguments: dict[str, Any], match: str) -> None:
    with model.batcher(2, 32) as batcher:
        error = UnknownAdapterError if arguments.get("adapters") == "nobody" else ConfigError
        with pytest.raises(error, match=match):
            batcher.submit(**{"prompt": [1, 2], "max_new_tokens": 4, **arguments})
        assert not batcher.busy
        (full,) = run(batcher, [Asked([5] * 20, "a", count=12)])
        assert (len(full.tokens), full.finish) == (12, "length")


@pytest.mark.parametrize("arguments", [{"slots": 0}, {"slots": True}, {"max_length": -1}, {"chunk": 1.5}], ids=str)
def test_sizes_of_a_batcher_are_checked(model: MultiAdapterModel, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be a positive integer"):
        model.batcher(**arguments)


def test_a_cache_that_no_machine_has_is_refused(model: MultiAdapterModel) -> None:
    with pytest.raises(ConfigError, match=f"no memory for the cache of 1024 rows of {2**62} tokens"):
        model.batcher(1024, 2**62)


def test_arguments_of_a_call_that_are_refused_cost_no_row(model: MultiAdapterModel) -> None:
    one = Asked(ids(5, 0), "a")
    with model.batcher(2, 64) as batcher:
        number = one.submit(batcher)
        for chunks in ("a", None, [1], 1.5, -1):
            with pytest.raises(ConfigError, match="chunks must be an integer from 0 on"):
                batcher.step(chunks)  # type: ignore[arg-type]
        for request in ([1], {}, "a", None):
            with pytest.raises(ConfigError, match="cancelled by the number that submit gave"):
                batcher.cancel(request)  # type: ignore[arg-type]
        while batcher.busy:
            for event in batcher.step():
                assert event.request == number
                one.take(event)
    assert (one.tokens, one.finish) == (alone(model, one).tokens, "length")


def test_a_row_whose_token_cannot_be_chosen_ends_alone(
    model: MultiAdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [Asked(ids(5, 0), "a"), Asked(ids(5, 1), "b", SAMPLED), Asked(ids(5, 2), None, Sampling(temperature=0.7))]
    want = [alone(model, one).tokens for one in asked]
    honest = generation._choose_one

    def fail(scores: Array, sampling: Sampling, seen: Array, uniform: float) -> int:
        if sampling == SAMPLED and len(seen) == 8:
            raise IndexError("index -1 is out of bounds")
        return honest(scores, sampling, seen, uniform)

    monkeypatch.setattr(generation, "_choose_one", fail)
    with model.batcher(3, 64) as batcher:
        run(batcher, asked)
    assert [one.finish for one in asked] == ["length", "error", "length"]
    assert [one.tokens for one in asked] == [want[0], want[1][:3], want[2]]
    assert str(asked[1].error) == "request 1: no token can be chosen (IndexError: index -1 is out of bounds)"


def test_the_cache_is_as_large_as_it_says(made: Made, model: MultiAdapterModel) -> None:
    cache = made.bundle.cache
    assert cache is not None
    with model.batcher(3, 40) as batcher:
        assert (batcher.slots, batcher.max_length) == (3, 40)
        slots = 3 * 40 * 2 * cache.layers * cache.kv_heads * cache.head_size * 4
        assert batcher.cache_bytes == slots * (1 if cache.target == "ort" else 3)
        steps = batcher._steps
        arrays = [b._host for b in steps._buffers] if isinstance(steps, SharedSteps) else steps._home
        assert sum(array.nbytes for array in arrays) == slots


def test_no_step_reads_columns_behind_those_of_a_row(model: MultiAdapterModel) -> None:
    """The whole cache is NaN before its first use."""
    with model.batcher(3, 64, 8) as batcher:
        steps = batcher._steps
        arrays = [b._host for b in steps._buffers] if isinstance(steps, SharedSteps) else steps._home
        for array in arrays:
            array.fill(np.nan)
        for one in run(batcher, [Asked(ids(3 * i + 1, i), SELECTIONS[i % 4], count=3 + 2 * i) for i in range(8)]):
            assert one.tokens == alone(model, one).tokens


def test_requests_from_several_threads(model: MultiAdapterModel) -> None:
    asked = [Asked(ids(3 + i, i), SELECTIONS[i % 4], count=5) for i in range(24)]
    with model.batcher(3, 64) as batcher:
        numbers: dict[int, Asked] = {}

        def submit(part: Sequence[Asked]) -> None:
            for one in part:
                numbers[one.submit(batcher)] = one

        threads = [threading.Thread(target=submit, args=(asked[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        events: list[Event] = []
        while any(thread.is_alive() for thread in threads) or batcher.busy:
            events += batcher.step()
        for event in events:
            numbers[event.request].take(event)
    assert sorted(numbers) == list(range(24))
    for one in asked:
        assert one.tokens == alone(model, one).tokens


def test_a_stream_gives_the_tokens_of_generate_one_by_one(model: MultiAdapterModel) -> None:
    prompts, rows = [ids(4, 1), ids(20, 2), ids(2, 3)], ["a", None, {"b": 0.5}]
    options: dict[str, Any] = {
        "max_new_tokens": [5, 1, 8],
        "temperature": [0.0, 0.7, 1.0],
        "seed": 3,
        "logprobs": True,
    }
    want = model.generate(prompts, rows, stop_tokens=[], **options)
    assert [len(one.tokens) for one in want] == [5, 1, 8]
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for event in model.stream(prompts, rows, stop_tokens=[], **options):
        assert event.token is not None
        assert event.logprob is not None
        tokens[event.request].append(event.token)
        logprobs[event.request].append(event.logprob)
        assert event.finish == ("length" if len(tokens[event.request]) == len(want[event.request].tokens) else None)
    assert tokens == [list(one.tokens) for one in want]
    for one, got in zip(want, logprobs, strict=True):
        np.testing.assert_allclose(got, one.logprobs, atol=1e-4)
    begun = model.stream(prompts, "a", max_new_tokens=5)
    next(begun)
    begun.close()
    with pytest.raises(ConfigError, match="temperature must be a number"):
        model.stream(prompts, temperature=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'slot'"):
        model.stream(prompts, slot=3)


def test_options_of_each_row(model: MultiAdapterModel) -> None:
    prompts = [ids(4, 1), ids(9, 2), ids(2, 3)]
    options: dict[str, list[Any]] = {
        "max_new_tokens": [4, 9, 7], "temperature": [1.2, None, 0.8], "top_k": [None, None, 7], "seed": [5, 6, None],
        "repetition_penalty": [1.3, 1.1, None], "stop_tokens": [[], [7, 8], []],
    }  # fmt: skip
    together = model.generate(prompts, SELECTIONS[1:], **options)
    for i in range(2):
        own = {name: [values[i]] for name, values in options.items()}
        assert model.generate([prompts[i]], SELECTIONS[1 + i], **own)[0].tokens == together[i].tokens
    assert [len(one.tokens) for one in together][::2] == [4, 7]
    with pytest.raises(ConfigError, match="top_k has 2 values for 3 prompts"):
        model.generate(prompts, top_k=[1, 2])
    with pytest.raises(ConfigError, match="stop_tokens has 1 values for 3 prompts"):
        model.generate(prompts, stop_tokens=[[1]])


def test_more_prompts_than_run_side_by_side(model: MultiAdapterModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdct_export.runtime import decoding

    prompts = [ids(2 + i, i) for i in range(7)]
    rows = [SELECTIONS[i % 4] for i in range(7)]
    want = model.generate(prompts, rows, max_new_tokens=6, stop_tokens=[])
    monkeypatch.setattr(decoding, "MOST_SLOTS", 2)
    assert model.generate(prompts, rows, max_new_tokens=6, stop_tokens=[]) == want
    assert model.generate(prompts, rows, max_new_tokens=6, stop_tokens=[], slots=3) == want
