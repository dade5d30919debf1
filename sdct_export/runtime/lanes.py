"""Lanes: what requests to a TensorRT engine run in, each one request at a time. `trt` fills and uses them."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

from .cuda import DeviceMemory, DeviceTensor, Graph, HostMemory, Stream
from .guarded import Guarded, Latch

Key = tuple[tuple[str, tuple[int, ...], int], ...]  # per input: name, shape, and address where it is a bank tensor


@dataclasses.dataclass(eq=False)
class Prepared:
    """An execution context with the shapes and addresses of `key`, and what it was captured into."""

    execution: Any
    profile: int = 0  # of optimization
    key: Key | None = None  # None while it is not ready
    outputs: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    bank: tuple[weakref.ref[DeviceTensor], ...] = ()  # whose addresses it has; not held: a request holds its own bank
    graph: Graph | None = None
    runs: int = 0
    capture_at: int = 0  # the run that tries, then later ones each twice as far: what failed once may work again
    used: int = 0

    def is_stale(self) -> bool:
        """Whether nothing can ask for it any more."""
        return self.key is None or any(tensor() is None for tensor in self.bank)


@dataclasses.dataclass(eq=False)
class Lane:
    """What one request at a time runs in: a stream, memory for the largest sizes, and the shapes that are prepared."""

    stream: Stream | None = None  # set last: where it is there, everything is
    activations: DeviceMemory | None = None
    inputs: dict[str, DeviceMemory] = dataclasses.field(default_factory=dict)
    outputs: dict[str, DeviceMemory] = dataclasses.field(default_factory=dict)
    sent: dict[str, HostMemory] = dataclasses.field(default_factory=dict)
    received: HostMemory | None = None
    prepared: list[Prepared] = dataclasses.field(default_factory=list)
    busy: Prepared | None = None  # from the beginning of a run until it has ended well
    capturing: bool = False  # from before the stream does until after
    user: weakref.ref[User] | None = None  # the request that has it
    used: int = 0  # larger than that of lanes not used since


class User:
    """A request that may have a lane."""


class Pool(Guarded):
    """At most `limit` lanes, each used by one request at a time; that of a request that is gone is idle.

    One attribute of a lane says whether it is idle, so an exception leaves nothing to repair.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._lanes: list[Lane] = []
        self._waiting: list[Latch] = []
        self._uses = 0

    def take(self, key: Key, user: User) -> Lane:
        """An idle lane, one prepared for `key` first, or else a new, empty one; waits where all are in use."""
        while isinstance(found := self.atomically(self._find, key, user), Latch):
            found.wait()
        return found

    def give_back(self, user: User) -> None:
        """What `user` has is idle again; may be called again, and where it has nothing."""
        self.atomically(self._give_back, user)

    def do_without(self, lane: Lane) -> bool:
        """Forget a lane for which there is no memory; whether there are others to wait for instead."""
        return self.atomically(self._do_without, lane)

    def _find(self, key: Key, user: User) -> Lane | Latch:
        idle = [lane for lane in self._lanes if lane.user is None or lane.user() is None]
        if idle:
            ready = [lane for lane in idle if any(prepared.key == key for prepared in lane.prepared)]
            lane = min(ready or idle, key=lambda lane: (len(lane.prepared), lane.used))
        elif len(self._lanes) < self._limit:
            lane = Lane()
            self._lanes += [lane]
        else:
            latch = Latch()
            self._waiting.append(latch)
            return latch
        lane.user = weakref.ref(user)
        return lane

    def _give_back(self, user: User) -> None:
        for lane in self._lanes:
            if lane.user is not None and lane.user() is user:
                self._uses += 1
                lane.used = self._uses
                lane.user = None
        while self._waiting:
            self._waiting[-1].wake()
            self._waiting.pop()

    def _do_without(self, lane: Lane) -> bool:
        others = [other for other in self._lanes if other is not lane]
        if others:
            self._limit = len(others)
        self._lanes = others
        return bool(others)
