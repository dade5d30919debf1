"""Exceptions raised into running code at every point of it, and the checks that hold for a bank afterwards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection
from types import FrameType, ModuleType
from typing import Any

from sdct_export.runtime.bank import Bank

PATIENCE = 30  # seconds after which something that should end at once counts as hung
INSTRUCTIONS = sys.version_info < (3, 13)  # later ones lose most of these events; lines are all they give


def interrupt(
    call: Callable[[], Any], at: int, modules: Collection[ModuleType], *, opcodes: bool = True
) -> BaseException | None:
    """Run `call` and raise KeyboardInterrupt before its instruction (or line) number `at` within `modules`.

    Returns the exception where it came to that. Whoever keeps it keeps all frames it went through, and what they hold.
    """
    files = {module.__file__ for module in modules}
    event = "opcode" if opcodes else "line"
    seen = 0
    fired: BaseException | None = None

    def local(frame: FrameType, what: str, _: Any) -> Any:
        nonlocal seen, fired
        if what == event and fired is None:
            if seen == at:
                fired = KeyboardInterrupt()
                raise fired
            seen += 1
        return local

    def enter(frame: FrameType, what: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files or frame.f_code.co_name == "__del__":  # Python drops what those raise
            return None
        frame.f_trace_opcodes = opcodes
        return local

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = opcodes  # Python 3.12 looks when tracing begins
    sys.settrace(enter)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return fired


def steps(call: Callable[[], Any], modules: Collection[ModuleType], *, opcodes: bool = INSTRUCTIONS) -> int:
    """How many instructions (or lines) of `modules` run in `call`."""
    files = {module.__file__ for module in modules}
    event = "opcode" if opcodes else "line"
    seen = 0

    def local(frame: FrameType, what: str, _: Any) -> Any:
        nonlocal seen
        seen += what == event
        return local

    def enter(frame: FrameType, what: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files or frame.f_code.co_name == "__del__":
            return None
        frame.f_trace_opcodes = opcodes
        return local

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = opcodes
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen


def in_time(call: Callable[[], Any]) -> Any:
    """The result of `call` in another thread; fails where it hangs, so that a test run ends."""
    result: list[Any] = []
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            result.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]
    return result[0]


def check_idle(bank: Bank[Any]) -> None:
    """What holds for a bank that nobody uses: nothing is pinned, held or queued, and every slot is accounted for."""

    def look() -> None:
        for name in list(bank._entries)[:1]:
            with bank.lease([name]):  # the next request makes good what an interrupted one left
                pass
        bank.info()
        entries = list(bank._entries.values())
        assert not bank._held
        assert not bank._dropped
        assert bank.waiting == 0
        assert [entry.pins for entry in entries] == [0] * len(entries)
        assert all(entry.slot is not None or entry.rows for entry in entries)
        assert sorted(bank._idle, key=id) == sorted((e for e in entries if e.slot is not None), key=id)
        assert sorted([entry.slot for entry in bank._idle] + bank._free) == list(range(1, bank.slots))

    in_time(look)  # from another thread, so that a lock left locked shows
