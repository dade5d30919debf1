"""State that several threads change under one lock, and that an exception at any point leaves whole.

An exception can come between any two instructions: Ctrl-C, a signal handler's, a time limit that a server raises in
the thread of a request. So the lock is taken by `with` on the lock itself (a lock written in Python, such as
`Condition`, can be interrupted between taking it and saying so), and a step that was cut off is not undone piece by
piece: the state has a part that is true at every moment, and from it the next step rebuilds the rest.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

from ..errors import SdctError

RECHECK = 0.1  # seconds; a thread that waits looks again this often, so that no lost wake-up leaves it waiting

P = ParamSpec("P")
R = TypeVar("R")


class Guarded:
    """Base of classes whose state changes in steps; by itself, a lock that no exception can lose.

    A step sets `_changing` before its first change, if the change takes more than one operation.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # its release fails where this thread does not hold it, which `_let_go` needs
        self._inside = 0  # the thread that is in a step; of a step that an exception left, still that thread
        self._changing = False

    def _repair(self) -> None:
        """Make the state whole after a step that was cut off; may itself be cut off and then runs again.

        Here: nothing, for states whose every change is one operation.
        """

    def atomically(self, step: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of `step(…)`, run while no other thread is in a step.

        Raises:
            SdctError: called from within a step, which only a signal handler or a finalizer can do.
        """
        thread = threading.get_ident()
        if self._inside == thread and self._is_interrupted():
            raise SdctError(
                "the adapters were about to change when a signal handler or finalizer called the model; "
                "let it set a flag, and call the model from the program's own code"
            )
        try:
            with self._lock:
                self._inside = thread
                if self._changing:
                    self._repair()
                    self._changing = False
                result = step(*args, **kwargs)
                self._changing = False
                self._inside = 0
                return result
        except BaseException:
            self._let_go()
            raise

    def _is_interrupted(self) -> bool:
        """Whether this call came in the middle of a step of the same thread."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code is Guarded.atomically.__code__ and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False

    def _let_go(self) -> None:
        """Release the lock where this thread still has it: an exception can come on the last step out of `with`."""
        try:
            self._lock.release()
        except RuntimeError:  # not ours
            return


class Latch:
    """What one thread waits on until another wakes it, or until it is time to look again."""

    def __init__(self) -> None:
        self._closed = threading.Lock()
        self._closed.acquire()

    def wait(self) -> None:
        """Wait to be woken, at most `RECHECK` seconds."""
        self._closed.acquire(timeout=RECHECK)

    def wake(self) -> None:
        """Wake the thread that waits now, or the next one that does. Only one thread at a time may call it."""
        if self._closed.locked():
            self._closed.release()
