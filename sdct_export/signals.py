"""How a signal ends a command: one line, exit code 128 + its number, and unfinished outputs removed on the way.

SIGINT, SIGTERM and SIGHUP raise `Interrupted` in the main thread. It is no `KeyboardInterrupt`, which libraries catch
and print tracebacks for. A second signal, or one that Python would drop, ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_received: int | None = None
_before: dict[int, Any] = {}
_hook = sys.unraisablehook


class Interrupted(BaseException):
    """The process was asked to end by signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def install() -> None:
    """Handle the signals from now on, but for those that are ignored, as under nohup. Only the main thread can."""
    global _hook
    if _before or threading.current_thread() is not threading.main_thread():
        return
    for number in _NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            _before[number] = signal.signal(number, _raise)
    if _before:
        _hook, sys.unraisablehook = sys.unraisablehook, _unraisable


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle the signals while the block runs; does nothing where `install` was called before."""
    global _received
    if _before:
        yield
        return
    install()
    try:
        yield
    finally:
        for number, handler in _before.items():
            signal.signal(number, handler)
        if _before:
            sys.unraisablehook = _hook
        _before.clear()
        _received = None


def received() -> Interrupted | None:
    """The signal that came, which something may have swallowed or turned into another error."""
    return None if _received is None else Interrupted(_received)


def leave() -> None:
    """From now on, with the work done and the interpreter about to end, a signal ends the process at once."""
    for number in _before:
        signal.signal(number, _end)


def _raise(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        _end(number, frame)
    _received = number
    raise Interrupted(number)


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Called where an exception cannot be raised, as in `__del__`, and would be printed and dropped."""
    if isinstance(unraisable.exc_value, Interrupted):
        _end(unraisable.exc_value.number, None)
    _hook(unraisable)


def _end(number: int, _: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"error: {Interrupted(number)}\n".encode())
    os._exit(128 + number)
