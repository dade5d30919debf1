"""Slots, growth, eviction and leases of `Bank`, on plain numpy memory."""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pytest
from interrupts import check_idle, steps
from numpy_bank import LAYOUT, NumpyMemory, held, make, resident, rows

from sdct_export.errors import ConfigError, UnknownAdapterError
from sdct_export.runtime import bank as bank_module
from sdct_export.runtime import guarded, turns
from sdct_export.runtime.bank import FIRST_SLOTS, Bank


def test_slot_zero_stays_zero_and_slots_are_distinct() -> None:
    bank, _ = make(64, "abcdefghijklmnopqrstuvwxyz")
    with bank.lease("abcdefghijklmnopqrstuvwxyz") as lease:
        assert len(set(lease.slots.values())) == 26
        assert 0 not in lease.slots.values()
        assert not lease.tensors["values"][0].any()
        assert all(held(lease, name) == ord(name) for name in lease.slots)


def test_it_grows_by_doubling_up_to_max_slots_and_keeps_contents() -> None:
    bank, _ = make(20)
    sizes = []
    for i in range(19):
        bank.add(str(i), rows(i + 1), 3, None)
        sizes.append(bank.slots)
    assert sizes == [8] * 7 + [16] * 8 + [20] * 4
    with bank.lease(map(str, range(19))) as lease:
        assert lease.tensors["values"].shape == (20, 3)
        assert [held(lease, str(i)) for i in range(19)] == [i + 1 for i in range(19)]


def test_a_small_bank_starts_at_max_slots() -> None:
    assert make(3)[0].slots == 3
    assert make(1000)[0].slots == FIRST_SLOTS


def test_growth_leaves_running_requests_their_tensors() -> None:
    bank, _ = make(64, "abcdefg")
    with bank.lease("a") as old:
        before = old.tensors["values"].copy()
        for name in "hijklmn":
            bank.add(name, rows(ord(name)), 3, None)
        with bank.lease("ah") as new:
            assert new.tensors["values"] is not old.tensors["values"]
            assert held(new, "h") == ord("h")
            assert held(new, "a") == held(old, "a") == ord("a")
        np.testing.assert_array_equal(old.tensors["values"], before)


def test_the_least_recently_used_adapter_gives_up_its_slot_and_comes_back() -> None:
    bank, _ = make(4, "abcde")
    assert resident(bank) == set("abc")  # loading does not push others out
    with bank.lease("a"):
        pass
    with bank.lease("d") as lease:  # b is the oldest now
        assert held(lease, "d") == ord("d")
    assert resident(bank) == set("acd")
    with bank.lease("be") as lease:
        assert (held(lease, "b"), held(lease, "e")) == (ord("b"), ord("e"))
    assert resident(bank) == set("bed")


def test_a_resident_adapter_is_not_written_again() -> None:
    bank, memory = make(8, "ab")
    count = len(memory.writes)
    for _ in range(3):
        with bank.lease("ab"):
            pass
    assert len(memory.writes) == count


def test_pinned_slots_are_never_taken() -> None:
    bank, _ = make(3, "abcd")
    with bank.lease("a") as first:
        for name in "bcdbcd":
            with bank.lease(name) as lease:
                assert held(lease, name) == ord(name)
                assert lease.slots[name] != first.slots["a"]
        assert held(first, "a") == ord("a")


def test_more_adapters_than_slots_in_one_request_is_an_error() -> None:
    bank, _ = make(3, "abcd")
    with (
        pytest.raises(ConfigError, match=r"needs 3 adapters at once, the bank holds at most 2 \(max_slots=3\); raise"),
        bank.lease("abc"),
    ):
        pass
    with bank.lease("aabbab"):
        pass  # two distinct ones


def test_a_request_waits_for_slots_that_others_hold() -> None:
    bank, _ = make(3, "abcd")
    got = []

    def other() -> None:
        with bank.lease("cd") as lease:
            got.append((held(lease, "c"), held(lease, "d")))

    thread = threading.Thread(target=other)
    with bank.lease("a"):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not got
    thread.join(10)
    assert got == [(ord("c"), ord("d"))]


def test_a_large_request_is_not_starved_by_a_stream_of_small_ones() -> None:
    bank, _ = make(4, "abcdef")
    stop = threading.Event()
    small = [0]

    def stream(name: str) -> None:
        while not stop.is_set():
            with bank.lease(name):
                time.sleep(0.002)
            small[0] += 1

    threads = [threading.Thread(target=stream, args=(name,)) for name in "abcabc"]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            got: list[float] = []

            def large(got: list[float] = got) -> None:
                with bank.lease("def") as lease:
                    got.extend(held(lease, name) for name in "def")

            thread = threading.Thread(target=large)
            thread.start()
            thread.join(10)
            assert got == [ord(name) for name in "def"]
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert small[0] > 0


def test_an_adapter_unloaded_while_a_request_waits_for_it_is_unknown() -> None:
    bank, _ = make(2, "ab")
    errors = []

    def other() -> None:
        try:
            with bank.lease("b"):
                pass
        except UnknownAdapterError as error:
            errors.append(str(error))

    thread = threading.Thread(target=other)
    with bank.lease("a"):
        thread.start()
        time.sleep(0.1)
        bank.remove("b")
        thread.join(10)
    assert errors == ["no adapter named 'b' is loaded (1 other is); load it first"]


def test_removal_hides_the_name_at_once_and_frees_the_slot_when_the_last_request_ends() -> None:
    bank, _ = make(2, "a")
    with bank.lease("a") as first, bank.lease("a"):
        bank.remove("a")
        assert bank.info() == {}
        with pytest.raises(UnknownAdapterError, match=r"'a' is loaded \(0 others are\)"), bank.lease("a"):
            pass
        bank.add("a", rows(7), 3, None)  # the same name again, while the old one still runs
        assert bank.info()["a"].slot is None
        assert held(first, "a") == ord("a")
    with bank.lease("a") as lease:
        assert held(lease, "a") == 7


def test_a_name_is_loaded_once() -> None:
    bank, _ = make(8, "a")
    with pytest.raises(
        ConfigError, match="named 'a' is loaded already; unload it first, replace it with reload_adapter, or"
    ):
        bank.add("a", rows(1), 3, None)
    with bank.lease("a") as lease:
        assert held(lease, "a") == ord("a")


def test_failed_growth_changes_nothing() -> None:
    bank, memory = make(64, "abcdefg")
    memory.fail_zeros = True
    with pytest.raises(
        ConfigError, match=r"no memory for an adapter bank of 16 slots of 0\.0 MiB each; lower max_slots"
    ):
        bank.add("h", rows(1), 3, None)
    assert set(bank.info()) == set("abcdefg")
    assert bank.slots == 8
    with bank.lease("abcdefg") as lease:
        assert all(held(lease, name) == ord(name) for name in "abcdefg")
    memory.fail_zeros = False
    bank.add("h", rows(8), 3, None)
    with bank.lease("ha") as lease:
        assert (held(lease, "h"), held(lease, "a")) == (8, ord("a"))


def test_a_failed_write_changes_nothing() -> None:
    bank, memory = make(4, "abcd")
    memory.fail_write = True
    with pytest.raises(RuntimeError, match="device lost"), bank.lease("d"):
        pass
    memory.fail_write = False
    for names in ("abc", "bcd", "da"):
        with bank.lease(names) as lease:
            assert all(held(lease, name) == ord(name) for name in names)


def test_an_error_inside_a_lease_releases_it() -> None:
    bank, _ = make(2, "ab")
    with pytest.raises(ZeroDivisionError), bank.lease("a"):
        raise ZeroDivisionError
    with bank.lease("b") as lease:
        assert held(lease, "b") == ord("b")


@pytest.mark.parametrize("max_slots", [1, 0, -3, 2.0, True, None])
def test_max_slots_must_leave_room_for_an_adapter(max_slots: object) -> None:
    with pytest.raises(ConfigError, match="max_slots must be an integer of at least 2"):
        Bank(LAYOUT, NumpyMemory(), max_slots)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_slots", [4, 9, 64])
def test_threads_never_see_a_slot_change_under_them(max_slots: int) -> None:
    """Some threads lease and look twice at their slots, others load, replace and unload; versions differ in value."""
    bank, _ = make(max_slots)
    names = [f"n{i}" for i in range(12)]
    valid: dict[str, set[float]] = {name: set() for name in names}
    version = iter(range(1, 10**9))
    publish = threading.Lock()
    problems: list[str] = []
    stop = time.monotonic() + 1.5
    checked = [0]

    def use(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < stop:
            wanted = rng.sample(names, rng.randint(1, 3))
            try:
                with bank.lease(wanted) as lease:
                    first = {name: held(lease, name) for name in wanted}
                    time.sleep(rng.random() * 1e-3)
                    if first != {name: held(lease, name) for name in wanted}:
                        problems.append(f"a leased slot changed: {first}")
                    if lease.tensors["values"][0].any():
                        problems.append("slot 0 was written")
                    with publish:
                        if any(first[name] not in valid[name] for name in wanted):
                            problems.append(f"a slot holds another adapter: {first}")
                    checked[0] += 1
            except UnknownAdapterError:
                pass

    def change(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < stop:
            name = rng.choice(names)
            try:
                if rng.random() < 0.7:
                    with publish:
                        value = float(next(version))
                        valid[name].add(value)
                    rng.choice([bank.add, bank.replace])(name, rows(value), 3, None)
                else:
                    bank.remove(name)
            except (ConfigError, UnknownAdapterError):
                pass

    def guarded(work, seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=guarded, args=(use, i)) for i in range(5)]
    threads += [threading.Thread(target=guarded, args=(change, 100 + i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a request waits for ever"
    assert problems == []
    assert checked[0] > 50
    check_idle(bank)  # once all is quiet


def test_an_unknown_name_is_told_without_the_names_of_others() -> None:
    bank, _ = make(4, "abc")
    for use in (
        bank.remove,
        lambda name: bank.replace(name, rows(1), 3, None),
        lambda name: bank.lease(name).__enter__(),
    ):
        with pytest.raises(UnknownAdapterError) as caught:
            use("x")
        assert str(caught.value) == "no adapter named 'x' is loaded (3 others are); load it first"


@pytest.mark.parametrize("names", ["a", "abcdefgh"])
def test_replacing_serves_the_old_one_to_those_who_hold_it_and_the_new_one_to_others(names: str) -> None:
    bank, _ = make(3, names)
    with bank.lease("a") as first:
        for value in (1, 2, 3):
            bank.replace("a", rows(value), 4, 2)
            with bank.lease("a") as then:
                assert held(then, "a") == value
            assert held(first, "a") == ord("a")
    assert (bank.info()["a"].n_parameters, bank.info()["a"].labels) == (4, 2)
    with bank.lease("a") as later:
        assert held(later, "a") == 3
    check_idle(bank)


def test_a_replacement_that_fails_leaves_the_old_one() -> None:
    bank, memory = make(64, "abcdefg")
    memory.fail_zeros = True
    with pytest.raises(ConfigError, match="no memory for an adapter bank of 16 slots"):
        bank.replace("a", rows(1), 3, None)
    memory.fail_zeros, memory.fail_write = False, True
    with pytest.raises(RuntimeError, match="device lost"):
        bank.replace("a", rows(1), 3, None)
    memory.fail_write = False
    with bank.lease("abcdefg") as lease:
        assert all(held(lease, name) == ord(name) for name in "abcdefg")
    check_idle(bank)


class NeverScanned(dict):
    """A dictionary that may be asked for a key, and may not be gone through."""

    def __iter__(self) -> Iterator:
        raise AssertionError("goes through all adapters")

    keys = values = items = __iter__  # type: ignore[assignment]


class CountedIdle(OrderedDict):
    visits = 0

    def __iter__(self) -> Iterator:
        for key in super().__iter__():
            self.visits += 1
            yield key


def work(count: int) -> dict[str, int]:
    """Lines run for each kind of step on a full bank of `count` adapters, none of which goes through them all."""
    bank, _ = make(16)
    for i in range(count):
        bank.add(f"n{i}", rows(i), 3, None)
    bank._entries = NeverScanned(bank._entries)
    idle = bank._idle = CountedIdle(bank._idle)

    def use(*names: str) -> None:
        with bank.lease(names) as lease:
            assert [held(lease, name) for name in names] == [float(name[1:]) for name in names]

    kinds = {
        "base": use,
        "hit": lambda: use("n3"),
        "hits": lambda: use(*(f"n{i}" for i in range(1, 15))),
        "miss": lambda: use("n16"),
        "misses": lambda: use(*(f"n{i}" for i in range(17, 32))),
        "add": lambda: bank.add("new", rows(1), 3, None),
        "replace": lambda: bank.replace("n20", rows(20), 3, None),
        "remove": lambda: bank.remove("n21"),
    }
    lines = {k: steps(step, (bank_module, guarded, turns), opcodes=False) for k, step in kinds.items()}
    assert idle.visits == 0
    return lines


def test_no_step_looks_at_all_adapters() -> None:
    assert work(40) == work(4000)


def test_an_attempt_does_not_wait_and_keeps_its_place() -> None:
    bank, _ = make(2, "abc")
    running, first, second = bank.lease("a"), bank.lease("b"), bank.lease("c")
    assert running.attempt() is None
    assert first.attempt() is not None
    assert second.attempt() is not None
    assert bank.waiting == 2
    assert bank.lease("").attempt() is None
    running.release()
    assert second.attempt() is not None  # it is not its turn
    latch = first.attempt()
    assert latch is None
    assert held(first, "b") == ord("b")
    bank.remove("c")
    with pytest.raises(UnknownAdapterError, match="no adapter named 'c' is loaded"):
        second.attempt()
    assert bank.waiting == 0
    first.release()
    check_idle(bank)


def test_the_tensors_of_the_last_lease_serve_those_before_it() -> None:
    bank, _ = make(64, "ab")
    old = bank.lease("ab")
    assert old.attempt() is None
    bank.replace("a", rows(1), 3, None)
    bank.remove("b")
    for name in "cdefghijkl":
        bank.add(name, rows(ord(name)), 3, None)
    new = bank.lease("ac")
    assert new.attempt() is None
    assert new.tensors["values"] is not old.tensors["values"]
    for name in "ab":
        assert new.tensors["values"][old.slots[name]].tolist() == [ord(name)] * 3
    assert held(new, "a") == 1
    old.release()
    new.release()
    check_idle(bank)


def test_versions_tell_what_a_name_stood_for() -> None:
    bank, _ = make(3, "abc")

    def version(name: str) -> int:
        with bank.lease(name) as lease:
            return lease.versions[name]

    first = version("a")
    assert len({first, version("b"), version("c")}) == 3
    assert version("a") == first  # it had lost its slot meanwhile
    bank.replace("a", rows(1), 3, None)
    second = version("a")
    bank.remove("a")
    bank.add("a", rows(ord("a")), 3, None)
    assert len({first, second, version("a")}) == 3


def test_names_are_checked_without_a_lease() -> None:
    bank, _ = make(3, "ab")
    bank.check("")
    bank.check("ba")
    with pytest.raises(UnknownAdapterError, match="no adapter named 'x' is loaded"):
        bank.check("ax")
    check_idle(bank)
