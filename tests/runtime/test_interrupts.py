"""An exception at any point of a call leaves bank and model whole: at every instruction, and from other threads."""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from interrupts import INSTRUCTIONS, check_idle, in_time, interrupt, steps
from numpy_bank import NumpyMemory, held, make, rows
from tiny_bundle import make_adapter, make_inputs, write_bundle

from sdct_export.bundle.description import TensorSpec
from sdct_export.contract import Cache
from sdct_export.errors import ConfigError, SdctError, UnknownAdapterError
from sdct_export.runtime import ContinuousBatcher, MultiAdapterModel, bank, batching, guarded, turns
from sdct_export.runtime import model as model_module
from sdct_export.runtime.bank import Bank, _Key

MODULES = (bank, guarded, turns)


@contextlib.contextmanager
def use_of(bank: Bank, names: str) -> Iterator[None]:
    """As `MultiAdapterModel.run` holds a lease."""
    lease = bank.lease(names)
    try:
        with lease:
            assert all(held(lease, name) == ord(name) for name in names)
            yield
    finally:
        lease.release()


def use(bank: Bank, names: str) -> None:
    with use_of(bank, names):
        pass


def fail_to_use(bank: Bank, memory: NumpyMemory, names: str, error: type[Exception]) -> None:
    memory.fail_write = True
    with pytest.raises(error):
        use(bank, names)
    memory.fail_write = False


def load_twice(bank: Bank) -> None:
    with pytest.raises(ConfigError):
        bank.add("a", rows(ord("a")), 3, None)


def replace_held(bank: Bank) -> None:
    with use_of(bank, "a"):
        bank.replace("a", rows(ord("a")), 3, None)


def remove_held(bank: Bank) -> None:
    with use_of(bank, "a"):
        bank.remove("a")


def attempt(bank: Bank, names: str, *, starts: bool = True) -> None:
    """As a batcher holds a lease, which it releases when a request ends, and when it is closed itself."""
    lease = bank.lease(names)
    try:
        assert (lease.attempt() is None) == starts
        lease.release()
    finally:
        lease.release()


def attempt_in_vain(bank: Bank) -> None:
    with use_of(bank, "a"):
        attempt(bank, "b", starts=False)


CALLS: dict[str, tuple[int, str, Callable[[Bank, NumpyMemory], object]]] = {
    "hit": (5, "abcd", lambda b, m: use(b, "ab")),
    "base": (5, "abcd", lambda b, m: use(b, "")),
    "miss": (3, "abcd", lambda b, m: use(b, "cd")),
    "free slot": (5, "abcd", lambda b, m: (b.remove("a"), use(b, "b"))),
    "unknown": (5, "abcd", lambda b, m: fail_to_use(b, m, "x", UnknownAdapterError)),
    "device lost": (3, "abcd", lambda b, m: fail_to_use(b, m, "cd", RuntimeError)),
    "add": (5, "ab", lambda b, m: b.add("c", rows(ord("c")), 3, None)),
    "add to a full bank": (3, "abcd", lambda b, m: b.add("e", rows(ord("e")), 3, None)),
    "add again": (5, "abcd", lambda b, m: load_twice(b)),
    "grow": (20, "abcdefg", lambda b, m: b.add("h", rows(ord("h")), 3, None)),
    "replace": (5, "abc", lambda b, m: b.replace("a", rows(ord("a")), 3, None)),
    "replace in a full bank": (3, "abcd", lambda b, m: b.replace("a", rows(ord("a")), 3, None)),
    "replace while held": (3, "abcd", lambda b, m: replace_held(b)),
    "remove while held": (3, "abcd", lambda b, m: remove_held(b)),
    "attempt": (3, "abcd", lambda b, m: attempt(b, "bc")),
    "attempt in vain": (2, "ab", lambda b, m: attempt_in_vain(b)),
    "check": (3, "abcd", lambda b, m: b.check("dab")),
    "look": (3, "abcd", lambda b, m: b.info()),
}


@pytest.mark.parametrize(
    "opcodes", [True, False] if INSTRUCTIONS else [False], ids=lambda o: ["line", "instruction"][o]
)
@pytest.mark.parametrize("what", CALLS)
def test_an_exception_anywhere_in_a_call_leaves_the_bank_whole(what: str, opcodes: bool) -> None:
    max_slots, names, call = CALLS[what]
    bank, memory = make(max_slots, names)
    total = steps(lambda: call(bank, memory), MODULES, opcodes=opcodes)
    assert total > 50 or not opcodes
    for at in range(total):
        bank, memory = make(max_slots, names)
        raised = interrupt(lambda: call(bank, memory), at, MODULES, opcodes=opcodes)  # noqa: B023 - called here
        memory.fail_write = False
        try:
            check_idle(bank)
            loaded = "".join(bank.info())
            assert set(names) - {"a"} <= set(loaded)
            for name in loaded:
                in_time(lambda name=name: use(bank, name))  # noqa: B023
            check_idle(bank)
        except BaseException as error:
            raise AssertionError(f"after an exception at step {at} of {what!r}") from error
        del raised  # kept until here: it holds all frames it went through


class CountingSteps:
    """A cache without a model: the next token is the last one and one more."""

    slots, max_length, prefill_rows = 2, 9, 2

    def prefill(self, first: int, prompts: list[Any], past: int, *_: Any) -> np.ndarray:
        return np.eye(9)[[prompt[-1] + 1 for prompt in prompts]]

    def decode(self, tokens: np.ndarray, lengths: np.ndarray, *_: Any) -> np.ndarray:
        return np.eye(9)[tokens + 1]

    def copy(self, source: int, target: int, length: int) -> None:
        pass


def test_an_exception_anywhere_in_a_batcher_leaves_the_bank_whole_once_it_is_closed() -> None:
    cache = Cache("ort", 1, 1, 8, "float32")
    bundle: Any = SimpleNamespace(cache=cache, outputs=[TensorSpec("logits", "float32", ("batch", "sequence", 9))])
    batchers: list[ContinuousBatcher] = []

    def go(bank: Bank) -> list[int]:
        with ContinuousBatcher(bundle, CountingSteps(), bank, 3) as batcher:
            batchers.append(batcher)
            for prompt, name, count in (([3, 1], "a", 1), ([4, 0, 0, 3], "b", 3), ([5], None, 2), ([2], "a", 3)):
                batcher.submit(prompt, name, max_new_tokens=count)
            batcher.cancel(3)
            found = []
            while batcher.busy:
                found += [event.token for event in batcher.step() if event.token is not None and event.request == 1]
        return found

    assert go(make(2, "ab")[0]) == [4, 5, 6]
    total = steps(lambda: go(make(2, "ab")[0]), [batching], opcodes=False)
    assert total > 300
    for at in range(total):
        bank, _ = make(2, "ab")
        raised = interrupt(lambda: go(bank), at, [batching], opcodes=False)  # noqa: B023 - called here
        in_time(batchers[-1].close)
        check_idle(bank)
        del raised


def test_an_exception_while_waiting_gives_the_place_in_the_queue_back() -> None:
    """The waiting request is interrupted at every instruction until it waits, and while it waits."""
    at, queued = 0, 0
    while queued < 20:
        bank, _ = make(2, "abc")
        holder = bank.lease("a").__enter__()
        done = threading.Event()

        def wait(at: int = at, bank: Bank = bank, done: threading.Event = done) -> None:
            interrupt(lambda: use(bank, "b"), at, MODULES)
            done.set()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        while not done.is_set() and not bank.waiting:
            pass
        queued += bank.waiting
        holder.release()
        thread.join(30)
        assert not thread.is_alive(), f"hangs after an exception at instruction {at}"
        check_idle(bank)
        at += 1


def test_a_lease_that_was_lost_is_given_back() -> None:
    bank, _ = make(2, "ab")
    lease = bank.lease("a")
    lease.__enter__()
    del lease
    in_time(lambda: use(bank, "b"))
    lease = bank.lease("a")
    lease.key = _Key(lease, bank._dropped.append)
    bank._turns.wait(lease.key)
    del lease
    in_time(lambda: use(bank, "a"))
    check_idle(bank)


def test_a_call_from_a_signal_handler_in_the_middle_of_a_change_is_refused() -> None:
    bank, memory = make(3, "abcd")
    for call in (lambda: use(bank, "a"), lambda: bank.remove("a"), bank.info):
        memory.on_write = call
        with pytest.raises(SdctError, match="signal handler or finalizer called the model"):
            use(bank, "cd")
        memory.on_write = lambda: None
        for names in ("cd", "ab"):
            use(bank, names)
    check_idle(bank)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", {name: make_adapter(ord(name), labels=3) for name in "abcd"})


def check_model(model: MultiAdapterModel, answers: dict[str, Any]) -> None:
    for name, answer in answers.items():
        got = in_time(lambda name=name: model.run(make_inputs(1, 2), name))
        assert all(np.array_equal(got[output], answer[output]) for output in answer), name


def test_an_exception_anywhere_in_a_request_leaves_the_model_right(folder: Path) -> None:
    model = MultiAdapterModel(folder, max_slots=3, threads=1)
    inputs = make_inputs(1, 2)
    answers = {name: model.run(inputs, name) for name in "abcd"}
    modules = (*MODULES, model_module)
    requests = [["a", "b"], ["c", {"d": 0.5}]]  # so that every one needs slots that the other has
    total = max(steps(lambda names=names: model.run(inputs, names), modules) for names in 2 * requests)
    assert total > (500 if INSTRUCTIONS else 100)
    for at in range(total):
        for names in requests:
            raised = interrupt(lambda names=names: model.run(inputs, names), at, modules)
            bank = model._open()[1]
            assert bank is not None
            check_idle(bank)
            del raised
        if at % 50 == 0:
            check_model(model, answers)
    check_model(model, answers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_exceptions_from_other_threads_leave_the_model_right(folder: Path) -> None:
    """Requests that compete for two slots are interrupted wherever they are; those of another thread go on."""
    model = MultiAdapterModel(folder, max_slots=3, threads=1)
    inputs = make_inputs(1, 2)
    answers = {name: model.run(inputs, name) for name in "abcd"}
    stop = threading.Event()
    problems: list[object] = []

    def go_on() -> None:
        rng = random.Random(1)
        try:
            while not stop.is_set():
                names = rng.sample("abcd", 2)
                got = model.run(inputs, names)["logits"]
                if any(not np.array_equal(got[i], answers[name]["logits"][i]) for i, name in enumerate(names)):
                    problems.append(names)
        except BaseException as error:
            problems.append(error)

    other = threading.Thread(target=go_on, daemon=True)
    other.start()
    rng = random.Random(2)
    for _ in range(150):
        begun = threading.Event()

        def request(begun: threading.Event = begun) -> None:
            begun.set()
            for names in ("ab", "cd", "bc"):
                model.run(inputs, list(names))

        thread = threading.Thread(target=request, daemon=True)
        thread.start()
        begun.wait(30)
        for _ in range(rng.randrange(300)):
            pass
        ident = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))
        thread.join(30)
        assert not thread.is_alive(), "a request hangs"
    stop.set()
    other.join(30)
    assert not other.is_alive(), "a request that nobody interrupted hangs"
    assert problems == []
    bank = model._open()[1]
    assert bank is not None
    check_idle(bank)
    check_model(model, answers)


def test_an_exception_anywhere_leaves_the_pool_of_contexts_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One context is all there is: if a request lost it, the next would wait for ever."""
    trt = fake_tensorrt.install(monkeypatch)
    fake_tensorrt.write_engine(folder, trt, concurrent=False)
    from sdct_export.runtime import cuda, lanes
    from sdct_export.runtime import trt as trt_module

    model = MultiAdapterModel(folder, backend="tensorrt")
    answers = {name: model.run(make_inputs(1, 2), name) for name in "ab"}
    modules = (guarded, trt_module, lanes, cuda)
    at, fired = 0, True
    while fired:
        prepared = interrupt(lambda: model.run(make_inputs(1, 3), "a"), at, modules, opcodes=False)
        in_time(lambda: model.run(make_inputs(1, 3), "a"))
        in_time(lambda: model.run(make_inputs(1, 1), "a"))
        captured = interrupt(lambda: model.run(make_inputs(1, 1), "a"), at, modules, opcodes=False)
        try:
            assert trt.cuda.capturing == {}
            in_time(lambda: model.run(make_inputs(1, 1), "a"))
            check_model(model, answers)
        except BaseException as error:
            raise AssertionError(f"after an exception at line {at}") from error
        fired = prepared is not None or captured is not None
        at += 1
    assert at > 60
