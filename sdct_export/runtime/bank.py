"""The adapter bank: which adapter lies in which slot, safely while other threads run. Its memory is the backend's.

Slot 0 is all zero and means "no adapter". Every other slot holds the rows of one adapter (`packing.pack`). The bank
starts small and doubles up to `max_slots`; then the least recently used adapter gives up its slot, waits in host
memory and comes back when a request names it. A request holds a *lease* while it runs: the tensors it started with,
and a pin on each slot it uses. Nothing ever writes to a pinned slot, growth makes new tensors and leaves the old ones
to the requests that hold them, and the slot of an adapter that was removed or replaced is free again when the last
request that uses it has finished. `turns` says which requests wait for slots and which may pass.

No step looks at all adapters: what it costs grows with the names in a request, not with the adapters loaded. True at
every moment are the entries by name, each entry's slot and rows, and which entries each running request holds; free
slots, pins and idle entries follow from these and are rebuilt after a step that an exception cut off (`guarded`).
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ..adapter.entries import Array
from ..bundle.packing import Layout
from ..errors import ConfigError, UnknownAdapterError
from .guarded import Guarded, Latch
from .turns import Turns

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


@dataclasses.dataclass(eq=False)
class _Entry:
    name: str
    rows: Mapping[str, Array]  # while resident they lie in the slot and this is empty
    n_parameters: int
    labels: int | None
    slot: int | None = None  # set only once the slot holds the rows
    pins: int = 0  # how many running requests hold it
    version: int = dataclasses.field(default_factory=itertools.count(1).__next__)  # no two entries have the same


@dataclasses.dataclass(frozen=True)
class _Tensors(Generic[T]):
    slots: int
    by_name: Mapping[str, T]


class Lease(Generic[T]):
    """What one request runs with: the bank's tensors by graph input name, and the slot of each adapter it named.

    It holds nothing until it is entered (`with lease:`), which waits while other requests occupy the slots it needs.
    An exception can come between the end of a `with` block and the way out, so whoever expects any calls `release`
    once more afterwards. A lease that nobody refers to any more has released itself.

    The tensors of the lease that was entered last serve all leases that are held: what these pin has the same slots
    there. `versions` tell what a name stood for: another number where it was loaded again.
    """

    def __init__(self, bank: Bank[T], names: tuple[str, ...]) -> None:
        self.names = names
        self.tensors: Mapping[str, T] = {}
        self.slots: Mapping[str, int] = {}
        self.versions: Mapping[str, int] = {}
        self.key: _Key | None = None  # while it waits or holds
        self._bank = bank

    def __enter__(self) -> Lease[T]:
        try:
            self._bank.start(self)
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def attempt(self) -> Latch | None:
        """Enter without waiting: None where that was possible, else what to wait on before the next attempt.

        Until then it has its place in the queue, and others may wait behind it.
        """
        try:
            return self._bank.attempt(self)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the slots back, or the place in the queue; may be called again."""
        if self.key is not None:
            self._bank.stop(self.key)
            self.key = None


class _Key(weakref.ref[Lease[Any]]):
    """Stands for a lease without keeping it alive; the same key, before and after, though the lease is gone."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Bank(Guarded, Generic[T]):
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
        super().__init__()
        self._layout = layout
        self._memory = memory
        self._max_slots = max_slots
        self._entries: dict[str, _Entry] = {}
        self._held: dict[_Key, tuple[_Entry, ...]] = {}  # by running requests
        self._dropped: deque[_Key] = deque()  # leases that are gone and were not released
        self._turns = Turns()
        self._tensors = self._allocate(min(FIRST_SLOTS, max_slots))
        self._free = list(range(self.slots - 1, 0, -1))
        self._idle: OrderedDict[_Entry, None] = OrderedDict()  # resident, not pinned; least recently used first

    @property
    def slots(self) -> int:
        """Slots allocated now, slot 0 included."""
        return self._tensors.slots

    @property
    def waiting(self) -> int:
        """Requests that cannot start yet."""
        return len(self._turns)

    def info(self) -> dict[str, AdapterInfo]:
        """A snapshot of the loaded adapters, by name in sorted order."""
        found = self.atomically(lambda: [(entry, entry.slot) for entry in self._entries.values()])
        found.sort(key=lambda pair: pair[0].name)
        return {e.name: AdapterInfo(e.n_parameters, e.labels, slot) for e, slot in found}

    def add(self, name: str, rows: Mapping[str, Array], n_parameters: int, labels: int | None) -> None:
        """Make an adapter available to requests that start from now on; on failure nothing has changed.

        Raises:
            ConfigError: the name is taken, or there is no memory to grow the bank.
        """
        self.atomically(self._add, _Entry(name, rows, n_parameters, labels))

    def replace(self, name: str, rows: Mapping[str, Array], n_parameters: int, labels: int | None) -> None:
        """Put an adapter in the place of one that is loaded: running requests finish with the old one, those that
        start from now on use the new one. On failure the old one stays.

        Raises:
            UnknownAdapterError: no such adapter is loaded.
            ConfigError: there is no memory to grow the bank.
        """
        self.atomically(self._replace, _Entry(name, rows, n_parameters, labels))

    def remove(self, name: str) -> None:
        """Forget an adapter: new requests do not find it, running ones finish with it.

        Raises:
            UnknownAdapterError: no such adapter is loaded.
        """
        self.atomically(self._remove, name)

    def check(self, names: Iterable[str]) -> None:
        """Raise `UnknownAdapterError` where one of them is not loaded."""
        self.atomically(lambda: [self._find(name) for name in names])

    def lease(self, names: Iterable[str]) -> Lease[T]:
        """What a request with these adapters runs with, once entered.

        Entering raises `UnknownAdapterError` where a name is not loaded (or was unloaded while waiting), and
        `ConfigError` where there is no memory to grow the bank.

        Raises:
            ConfigError: more adapters than `max_slots - 1`.
        """
        wanted = tuple(dict.fromkeys(names))
        if len(wanted) > self._max_slots - 1:
            raise ConfigError(
                f"this batch needs {len(wanted)} adapters at once, the bank holds at most {self._max_slots - 1} "
                f"(max_slots={self._max_slots}); raise max_slots or split the batch"
            )
        return Lease(self, wanted)

    def start(self, lease: Lease[T]) -> None:
        """Fill in `lease` and hold its slots; `Lease` calls it."""
        while (latch := self.attempt(lease)) is not None:
            latch.wait()

    def attempt(self, lease: Lease[T]) -> Latch | None:
        """Fill in `lease` and hold its slots, or return what to wait on; `Lease` calls it."""
        if not lease.names:
            lease.tensors = self._tensors.by_name
            return None
        if lease.key is None:
            lease.key = _Key(lease, self._dropped.append)
        return self.atomically(self._try_to_start, lease, lease.key)

    def stop(self, key: _Key) -> None:
        """Give back what the lease of `key` holds, if anything; `Lease` calls it."""
        self.atomically(self._stop, key)

    # What follows runs as one step, under the lock.

    def _add(self, entry: _Entry) -> None:
        if entry.name in self._entries:
            raise ConfigError(
                f"an adapter named {entry.name!r} is loaded already; unload it first, replace it with reload_adapter, "
                "or choose another name"
            )
        self._changing = True
        self._place_where_nothing_moves(entry)
        self._entries[entry.name] = entry
        self._settle(entry)

    def _replace(self, entry: _Entry) -> None:
        old = self._find(entry.name)
        self._changing = True
        self._place_where_nothing_moves(entry)
        self._entries[entry.name] = entry
        self._settle(old)
        self._settle(entry)
        self._turns.wake_first()

    def _remove(self, name: str) -> None:
        entry = self._find(name)
        self._changing = True
        del self._entries[name]
        self._settle(entry)
        self._turns.wake_all()

    def _find(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:  # other names are none of this request's business
            count = len(self._entries)
            raise UnknownAdapterError(
                f"no adapter named {name!r} is loaded ({count} other{' is' if count == 1 else 's are'}); load it first"
            ) from None

    def _try_to_start(self, lease: Lease[T], key: _Key) -> Latch | None:
        """Fill in `lease`, or return what to wait on before the next try."""
        while self._dropped:
            self._stop(self._dropped[0])
            self._dropped.popleft()
        entries = tuple(self._find(name) for name in lease.names)
        missing = sum(entry.slot is None for entry in entries)
        room = len(self._free) + self._max_slots - self.slots + len(self._idle)
        room -= sum(entry in self._idle for entry in entries)
        if not self._turns.may_start(key, misses=missing > 0, fits=missing <= room):
            return self._turns.wait(key)
        self._changing = True
        self._held[key] = entries
        for entry in entries:
            entry.pins += 1
            self._idle.pop(entry, None)
        for entry in entries:
            if entry.slot is None:
                self._place(entry)
        lease.tensors = self._tensors.by_name
        lease.slots = {entry.name: entry.slot for entry in entries if entry.slot is not None}
        lease.versions = {entry.name: entry.version for entry in entries}
        self._turns.started(key)
        return None

    def _stop(self, key: _Key) -> None:
        self._turns.leave(key)
        if key in self._held:
            self._changing = True
            for entry in self._held.pop(key):
                entry.pins -= 1
                self._settle(entry)
            self._turns.wake_first()

    def _settle(self, entry: _Entry) -> None:
        """Put an entry that nobody uses among the idle ones, or free its slot where its name is no longer its own."""
        if entry.pins or entry.slot is None:
            return
        if self._entries.get(entry.name) is entry:
            self._idle[entry] = None
        else:
            self._idle.pop(entry, None)
            self._vacate(entry, entry.slot)

    def _vacate(self, entry: _Entry, slot: int) -> None:
        entry.slot = None
        self._free.append(slot)

    def _place_where_nothing_moves(self, entry: _Entry) -> None:
        if self._free or self.slots < self._max_slots:
            self._place(entry)

    def _place(self, entry: _Entry) -> None:
        """Give `entry` a slot: a free one, a new one, or that of the idle adapter least recently used."""
        if not self._free:
            if self.slots < self._max_slots:
                self._grow()
            else:
                self._evict()
        slot = self._free[-1]
        for name, row in entry.rows.items():  # where this fails the slot stays free
            self._memory.write(self._tensors.by_name[name], slot, row)
        self._free.pop()
        entry.slot = slot
        entry.rows = {}

    def _evict(self) -> None:
        oldest, _ = self._idle.popitem(last=False)
        slot = oldest.slot
        assert slot is not None, "idle adapters are resident"
        oldest.rows = {name: self._memory.read(tensor, slot) for name, tensor in self._tensors.by_name.items()}
        self._vacate(oldest, slot)

    def _grow(self) -> None:
        slots = self.slots
        tensors = self._allocate(min(2 * slots, self._max_slots))
        for name, tensor in tensors.by_name.items():
            self._memory.copy(self._tensors.by_name[name], tensor)
        self._tensors = tensors
        self._free = list(range(tensors.slots - 1, slots - 1, -1))

    def _allocate(self, slots: int) -> _Tensors[T]:
        try:
            return _Tensors(
                slots, {n: self._memory.zeros((slots, *shape), dtype) for n, (dtype, shape) in self._layout.items()}
            )
        except MemoryError:
            size = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self._layout.values())
            raise ConfigError(
                f"no memory for an adapter bank of {slots} slots of {size / 2**20:.1f} MiB each; lower max_slots"
            ) from None

    def _repair(self) -> None:
        """Pins from the running requests, free slots and idle entries from the slots that entries have."""
        entries = dict.fromkeys([*self._entries.values(), *(e for held in self._held.values() for e in held)])
        for entry in entries:
            entry.pins = 0
        for held in self._held.values():
            for entry in held:
                entry.pins += 1
        used = {entry.slot for entry in entries}
        self._free = [slot for slot in range(self.slots - 1, 0, -1) if slot not in used]
        in_order = dict.fromkeys([*self._idle, *entries])  # those that were idle, least recently used first
        self._idle = OrderedDict((e, None) for e in in_order if e in entries and e.slot is not None and not e.pins)
        self._turns.wake_all()
