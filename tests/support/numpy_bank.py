"""A bank on plain numpy memory, whose adapters hold one number each."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from sdct_export.runtime.bank import Bank, Lease

LAYOUT = {"values": (np.dtype(np.float32), (3,)), "present": (np.dtype(np.float32), ())}


class NumpyMemory:
    """Bank memory that can be told to fail."""

    def __init__(self) -> None:
        self.fail_zeros = self.fail_write = False
        self.writes: list[int] = []
        self.on_write: Callable[[], object] = lambda: None

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if self.fail_zeros:
            raise MemoryError
        return np.zeros(shape, dtype)

    def write(self, tensor: np.ndarray, slot: int, row: np.ndarray) -> None:
        if self.fail_write:
            raise RuntimeError("device lost")
        self.on_write()
        self.writes.append(slot)
        tensor[slot] = row

    def read(self, tensor: np.ndarray, slot: int) -> np.ndarray:
        return np.array(tensor[slot])

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        target[: len(source)] = source


def rows(value: float) -> dict[str, np.ndarray]:
    return {"values": np.full(3, value, np.float32), "present": np.float32(value)}


def make(max_slots: int, names: Iterable[str] = "") -> tuple[Bank, NumpyMemory]:
    """A bank with adapters of one letter, each holding its own code point."""
    memory = NumpyMemory()
    bank = Bank(LAYOUT, memory, max_slots)
    for name in names:
        bank.add(name, rows(ord(name)), 3, None)
    return bank, memory


def held(lease: Lease, name: str) -> float:
    """The value in the slot of `name`, the same in every place of it."""
    slot = lease.slots[name]
    found = {*lease.tensors["values"][slot].tolist(), float(lease.tensors["present"][slot])}
    assert len(found) == 1
    return found.pop()


def resident(bank: Bank) -> set[str]:
    return {name for name, info in bank.info().items() if info.slot is not None}
