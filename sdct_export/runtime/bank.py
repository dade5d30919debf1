"""The adapter bank: which adapter lies in which slot, safely while other threads run. Its memory is the backend's.

Slot 0 is all zero and means "no adapter". Every other slot holds the rows of one adapter (`packing.pack`). The bank
starts small and doubles up to `max_slots`; then the least recently used adapter gives up its slot, waits in host
memory and comes back when a request names it. A request holds a *lease* while it runs: the tensors it started with,
and a pin on each slot it uses. Nothing ever writes to a pinned slot, growth makes new tensors and leaves the old ones
to the requests that hold them, and the slot of an adapter that was removed is free again when the last request that
uses it has finished. Requests that need slots which others hold wait in the order in which they came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

import numpy as np

from ..adapter.entries import Array
from ..bundle.packing import Layout
from ..errors import ConfigError, UnknownAdapterError

FIRST_SLOTS = 8

T = TypeVar("T")


class Memory(Protocol[T]):
    """Where a backend keeps the bank."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> T:
        """A new tensor of zeros. Raises `MemoryError` where there is no room."""

    def write(self, tensor: T, slot: int, row: Array) -> None:
        """Set `tensor[slot] = row`; visible to runs that start after the call returns."""

    def read(self, tensor: T, slot: int) -> Array:
        """A copy of `tensor[slot]` in host memory."""

    def copy(self, source: T, target: T) -> None:
        """Set the first slots of `target` to those of the smaller `source`."""


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: trained numbers, labels of its head (None without one), its slot (None while not resident)."""

    n_parameters: int
    labels: int | None
    slot: int | None


@dataclasses.dataclass(frozen=True)
class Lease(Generic[T]):
    """What one request runs with: the bank's tensors by graph input name, and the slot of each adapter it named."""

    tensors: Mapping[str, T]
    slots: Mapping[str, int]


@dataclasses.dataclass(eq=False)
class _Entry:
    rows: Mapping[str, Array]  # while resident they lie in the slot and this is empty
    n_parameters: int
    labels: int | None
    slot: int | None = None
    pins: int = 0


class Bank(Generic[T]):
    """Adapters by name in a growing set of slots.

    Args:
        layout: graph input name -> (dtype, shape of one slot), see `packing.bank_layout`.
        memory: allocates and writes the tensors.
        max_slots: most slots, slot 0 included; at most `max_slots - 1` adapters can take part in one request.

    Raises:
        ConfigError: `max_slots` is below 2.
    """

    def __init__(self, layout: Layout, memory: Memory[T], max_slots: int) -> None:
        if isinstance(max_slots, bool) or not isinstance(max_slots, int) or max_slots < 2:
            raise ConfigError(f"max_slots must be an integer of at least 2 (slot 0 is the base), got {max_slots!r}")
        self._layout = layout
        self._memory = memory
        self._max_slots = max_slots
        self._changed = threading.Condition()  # guards everything below
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._slots = min(FIRST_SLOTS, max_slots)
        self._free = list(range(self._slots - 1, 0, -1))
        self._queue: deque[object] = deque()  # requests that have no lease yet
        self._tensors = self._allocate(self._slots)

    @property
    def slots(self) -> int:
        """Slots allocated now, slot 0 included."""
        return self._slots

    def info(self) -> dict[str, AdapterInfo]:
        """A snapshot of the loaded adapters, by name in sorted order."""
        with self._changed:
            return {n: AdapterInfo(e.n_parameters, e.labels, e.slot) for n, e in sorted(self._entries.items())}

    def add(self, name: str, rows: Mapping[str, Array], n_parameters: int, labels: int | None) -> None:
        """Make an adapter available to requests that start from now on; on failure nothing has changed.

        Raises:
            ConfigError: the name is taken, or there is no memory to grow the bank.
        """
        with self._changed:
            if name in self._entries:
                raise ConfigError(
                    f"an adapter named {name!r} is loaded already; unload it first or choose another name"
                )
            entry = _Entry(rows, n_parameters, labels)
            if self._free or self._slots < self._max_slots:
                self._place(entry)
            self._entries[name] = entry
            self._changed.notify_all()

    def remove(self, name: str) -> None:
        """Forget an adapter: new requests do not find it, running ones finish with it.

        Raises:
            UnknownAdapterError: no such adapter is loaded.
        """
        with self._changed:
            entry = self._find(name)
            del self._entries[name]
            if not entry.pins:
                self._release(entry)
            self._changed.notify_all()

    @contextlib.contextmanager
    def lease(self, names: Iterable[str]) -> Iterator[Lease[T]]:
        """Hold `names` in their slots while the block runs; waits while other requests occupy the slots it needs.

        Raises:
            UnknownAdapterError: a name is not loaded (or was unloaded while waiting).
            ConfigError: more adapters than `max_slots - 1`, or no memory to grow the bank.
        """
        wanted = list(dict.fromkeys(names))
        if len(wanted) > self._max_slots - 1:
            raise ConfigError(
                f"this batch needs {len(wanted)} adapters at once, the bank holds at most {self._max_slots - 1} "
                f"(max_slots={self._max_slots}); raise max_slots or split the batch"
            )
        with self._changed:
            entries = self._wait_for_slots(wanted)
            for name in entries:
                self._entries.move_to_end(name)  # so that placing one never evicts another of them
            for entry in entries.values():
                if entry.slot is None:
                    self._place(entry)
            for entry in entries.values():
                entry.pins += 1
            lease = Lease(
                self._tensors, {name: entry.slot for name, entry in entries.items() if entry.slot is not None}
            )
        try:
            yield lease
        finally:
            with self._changed:
                for name, entry in entries.items():
                    entry.pins -= 1
                    if not entry.pins and self._entries.get(name) is not entry:
                        self._release(entry)
                self._changed.notify_all()

    def _find(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(sorted(self._entries)) or "none"
            raise UnknownAdapterError(f"no adapter named {name!r} is loaded; loaded: {known}") from None

    def _wait_for_slots(self, names: Iterable[str]) -> dict[str, _Entry]:
        """The entries of `names`, once it is this request's turn and there is room for those that are not resident."""
        ticket = object()
        self._queue.append(ticket)
        try:
            while True:
                entries = {name: self._find(name) for name in names}
                if self._queue[0] is ticket and self._can_place(entries):
                    return entries
                self._changed.wait()
        finally:
            self._queue.remove(ticket)
            self._changed.notify_all()

    def _can_place(self, entries: Mapping[str, _Entry]) -> bool:
        missing = sum(entry.slot is None for entry in entries.values())
        idle = sum(e.slot is not None and not e.pins and n not in entries for n, e in self._entries.items())
        return missing <= len(self._free) + self._max_slots - self._slots + idle

    def _place(self, entry: _Entry) -> None:
        """Give `entry` a slot: a free one, a new one, or that of the idle adapter least recently used."""
        if not self._free and self._slots < self._max_slots:
            self._grow()
        if not self._free:
            oldest = next(e for e in self._entries.values() if e.slot is not None and not e.pins)
            oldest.rows = {n: self._memory.read(t, oldest.slot or 0) for n, t in self._tensors.items()}
            self._release(oldest)
        slot = self._free[-1]
        for name, row in entry.rows.items():  # where this fails the slot stays free
            self._memory.write(self._tensors[name], slot, row)
        self._free.pop()
        entry.slot, entry.rows = slot, {}

    def _release(self, entry: _Entry) -> None:
        if entry.slot is not None:
            self._free.append(entry.slot)
            entry.slot = None

    def _grow(self) -> None:
        slots = min(2 * self._slots, self._max_slots)
        tensors = self._allocate(slots)
        for name, tensor in tensors.items():
            self._memory.copy(self._tensors[name], tensor)
        self._free = list(range(slots - 1, self._slots - 1, -1))
        self._tensors, self._slots = tensors, slots

    def _allocate(self, slots: int) -> dict[str, T]:
        try:
            return {n: self._memory.zeros((slots, *shape), dtype) for n, (dtype, shape) in self._layout.items()}
        except MemoryError:
            size = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self._layout.values())
            raise ConfigError(
                f"no memory for an adapter bank of {slots} slots of {size / 2**20:.1f} MiB each; lower max_slots"
            ) from None
