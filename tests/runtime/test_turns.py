"""Who starts and who waits: the rule of `turns`, alone and in a bank whose slots are all in use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from interrupts import PATIENCE as DEADLINE
from interrupts import check_idle, in_time
from numpy_bank import held, make

from sdct_export.runtime import guarded
from sdct_export.runtime.bank import Bank
from sdct_export.runtime.turns import PATIENCE, Turns


def until(condition: Callable[[], bool]) -> None:
    stop = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < stop, "did not happen"
        time.sleep(0.001)


class Request:
    """A request in a thread of its own that holds its lease until told to stop."""

    def __init__(self, bank: Bank, names: str) -> None:
        self.started, self._stop = threading.Event(), threading.Event()
        self._bank, self._names = bank, names
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._bank.lease(self._names) as lease:
                assert all(held(lease, name) == ord(name) for name in self._names)
                self.started.set()
                self._stop.wait(DEADLINE)
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        assert self.error is None


def use(bank: Bank, names: str) -> None:
    with bank.lease(names):
        pass


def test_the_rule() -> None:
    turns = Turns()
    assert turns.may_start("a", misses=True, fits=True)
    assert not turns.may_start("a", misses=True, fits=False)
    turns.wait("a")
    assert not turns.may_start("b", misses=True, fits=True), "in order"
    turns.wait("b")
    assert turns.wait("b") is turns.wait("b"), "queued once"
    for i in range(PATIENCE):
        assert turns.may_start(i, misses=False, fits=True)
        turns.started(i)
    assert not turns.may_start("late", misses=False, fits=True), "the first has been overtaken often enough"
    turns.wait("late")
    assert turns.may_start("a", misses=True, fits=True)
    turns.started("a")
    assert turns.may_start("late", misses=False, fits=True), "the next has its own patience"
    turns.started("late")
    assert (len(turns), turns.overtaken) == (1, 1)
    turns.leave("b")
    turns.leave("b")
    assert (len(turns), turns.overtaken) == (0, 0)


def test_requests_that_need_no_slot_pass_those_that_wait_for_one() -> None:
    bank, _ = make(3, "abcd")
    running = Request(bank, "a")
    assert running.started.wait(DEADLINE)
    waiting = Request(bank, "cd")
    until(lambda: bank.waiting == 1)
    for names in ("", "a", "b", "ab", ""):
        in_time(lambda names=names: use(bank, names))
    assert not waiting.started.is_set()
    running.end()
    assert waiting.started.wait(DEADLINE)
    waiting.end()
    check_idle(bank)


def test_a_waiting_request_is_overtaken_a_limited_number_of_times() -> None:
    bank, _ = make(3, "abcd")
    running = Request(bank, "a")
    assert running.started.wait(DEADLINE)
    waiting = Request(bank, "cd")
    until(lambda: bank.waiting == 1)
    for _ in range(PATIENCE):
        in_time(lambda: use(bank, "a"))
    late = [Request(bank, "a") for _ in range(3)]
    until(lambda: bank.waiting == 4)
    for _ in range(2 * PATIENCE):
        in_time(lambda: use(bank, ""))  # the base takes nothing from anybody
    assert not any(request.started.is_set() for request in late)
    running.end()
    assert waiting.started.wait(DEADLINE)
    waiting.end()
    for request in late:
        assert request.started.wait(DEADLINE)
        request.end()
    check_idle(bank)


def test_requests_that_need_slots_start_in_order() -> None:
    bank, _ = make(2, "abcde")
    running = Request(bank, "a")
    assert running.started.wait(DEADLINE)
    waiting = []
    for name in "bcde":
        waiting.append(Request(bank, name))
        until(lambda: bank.waiting == len(waiting))
    running.end()
    for i, request in enumerate(waiting):
        assert request.started.wait(DEADLINE)
        assert not any(later.started.is_set() for later in waiting[i + 1 :])
        request.end()
    check_idle(bank)


def test_a_lost_wake_up_costs_a_moment_and_not_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded.Latch, "wake", lambda self: None)
    bank, _ = make(2, "ab")
    running = Request(bank, "a")
    assert running.started.wait(DEADLINE)
    waiting = Request(bank, "b")
    until(lambda: bank.waiting == 1)
    running.end()
    assert waiting.started.wait(DEADLINE)
    waiting.end()
    check_idle(bank)
