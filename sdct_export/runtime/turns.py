"""Whose turn it is: requests that wait for slots, and those that may pass them.

* A request without adapters needs nothing that others wait for and never comes here.
* A request that needs a slot for one of its adapters starts where nobody waits and there is room; else it queues, and
  the queue goes in order.
* A request whose adapters all lie in slots starts at once, past all that wait. Each such request counts against the
  patience of the first in the queue: once that was overtaken `PATIENCE` times, those with adapters queue, too, until
  it has started. So it waits at most for the requests that hold slots already and `PATIENCE` more.

Every method is called with the bank's lock held. An exception between two lines costs no more than a wake-up, which
`Latch` makes good, or a count of `overtaken`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from .guarded import Latch

PATIENCE = 64  # requests; 8 busy threads run them in the time of 8


class Turns:
    """The queue of requests that cannot start yet."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, Latch] = OrderedDict()
        self.overtaken = 0  # how often the first in the queue was passed

    def __len__(self) -> int:
        return len(self._waiting)

    def may_start(self, request: Hashable, *, misses: bool, fits: bool) -> bool:
        """Whether `request` may start now: it `misses` where an adapter of it is in no slot."""
        if next(iter(self._waiting), request) is request:
            return fits
        return not misses and self.overtaken < PATIENCE

    def wait(self, request: Hashable) -> Latch:
        """Put `request` at the end of the queue, unless it is in it, and return what it waits on."""
        if request not in self._waiting:
            self._waiting[request] = Latch()
        return self._waiting[request]

    def started(self, request: Hashable) -> None:
        """`request` starts: it leaves the queue, or has overtaken the first."""
        if next(iter(self._waiting), request) is not request:
            self.overtaken += 1
        self.leave(request)

    def leave(self, request: Hashable) -> None:
        """Take `request` out of the queue where it is in it; the others look whether it is their turn."""
        if request in self._waiting:
            if next(iter(self._waiting)) is request:
                self.overtaken = 0
            del self._waiting[request]
            self.wake_all()

    def wake_first(self) -> None:
        """The first in the queue looks again: there may be room."""
        for latch in self._waiting.values():
            latch.wake()
            break

    def wake_all(self) -> None:
        """All in the queue look again: there is another first, or an adapter is gone."""
        for latch in self._waiting.values():
            latch.wake()
