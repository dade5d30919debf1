"""State dicts of an `SdctModel`, such as the checkpoints of `transformers.Trainer`, and what they say of themselves.

Trainer writes the state dict of a model that is no `PreTrainedModel` into `<checkpoint>/model.safetensors`:

    base.<path>.sdct.entries.<adapter>.values, .indices    the coefficients, float [n] and int32 [n, 2] (row, col)
    base.<path of a parameter>                             a saved parameter of the active adapter
    parked.<adapter>.<path, slashes for dots>.<name>       a saved parameter of another one
    _extra_state                                           uint8: what the tensors do not say, as a safetensors file

The last holds `state`, uint8, a JSON object of `active` (an adapter's name or null) and `adapters` (name -> the fields
of `adapter_config.json`), and of each training probe the tensors under `<adapter>/<name>`. It is untrusted input.
numpy only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import AdapterFormatError, BaseMismatchError
from .entries import Array
from .folder import (
    CONFIG_FILE,
    INDICES_SUFFIX,
    MAX_CONFIG_BYTES,
    MAX_PROBE_BYTES,
    VALUES_SUFFIX,
    Contents,
    Stored,
    check_fields,
    decode_safetensors,
    encode_safetensors,
    parse_contents,
    read_safetensors,
)
from .training import TrainingRecord, parse_record

STATE_FILE = "model.safetensors"
EXTRA = "_extra_state"
ENTRIES = ".sdct.entries."  # between the path of a linear layer and the name of an adapter
_STATE = "state"


class State(NamedTuple):
    """What a state dict says of its adapters: the active one, and of each the fields and the training record."""

    active: str | None
    adapters: Mapping[str, dict[str, Any]]
    records: Mapping[str, TrainingRecord | None]


def encode_state(state: State) -> bytes:
    """The bytes of `_extra_state`; the same state always gives the same."""
    text = json.dumps({"active": state.active, "adapters": state.adapters}, sort_keys=True).encode()
    tensors: dict[str, Array] = {_STATE: np.frombuffer(text, np.uint8)}
    for name, record in state.records.items():
        tensors |= {
            f"{name}/{tensor}": array for tensor, array in ({} if record is None else record.tensors()).items()
        }
    return encode_safetensors(tensors)


def decode_state(data: bytes, label: Path) -> State:
    """What `encode_state` wrote. Raises `AdapterFormatError`, with `label` in front."""
    if len(data) > MAX_CONFIG_BYTES + MAX_PROBE_BYTES:
        raise AdapterFormatError(
            f"{label}: {EXTRA} has {len(data)} bytes, more than it may; save the checkpoint again"
        )
    tensors = decode_safetensors(data, f"{label}: {EXTRA}")
    text = tensors.pop(_STATE, np.zeros(0))
    try:
        raw = json.loads(text.tobytes().decode("utf-8"))
        active, adapters = raw["active"], raw["adapters"]
        if set(raw) != {"active", "adapters"} or not isinstance(adapters, dict) or not adapters:
            raise ValueError("it holds no adapters")
        if not all(isinstance(fields, dict) for fields in adapters.values()) or active not in (None, *adapters):
            raise ValueError("its adapters are not described")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterFormatError(f"{label}: {EXTRA} is damaged ({error}); save the checkpoint again") from None
    records: dict[str, TrainingRecord | None] = {}
    for name, fields in adapters.items():
        check_fields(fields, label)
        probe = {t.removeprefix(f"{name}/"): a for t, a in tensors.items() if t.startswith(f"{name}/")}
        try:
            trained = fields.get("trained_on")
            records[name] = None if trained is None and not probe else parse_record(trained, probe or None)
        except AdapterFormatError as error:
            raise AdapterFormatError(f"{label}: {error}") from None
    return State(active, adapters, records)


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` may be a checkpoint of Trainer and is no adapter folder."""
    return os.path.lexists(folder / STATE_FILE) and not os.path.lexists(folder / CONFIG_FILE)


def read_checkpoint(path: str | Path, *, max_bytes: int | None = None) -> Contents:
    """The active adapter of a checkpoint, or its only one.

    Raises:
        AdapterFormatError: it is damaged, the checkpoint of another model, or has several adapters and none active.
        BaseMismatchError: its tensors have more than `max_bytes`; they are not read.
    """
    file = Path(path) / STATE_FILE

    def check(stored: Mapping[str, Stored]) -> None:
        extra = stored.get(EXTRA)
        if extra is None or extra.dtype != np.uint8 or len(extra.shape) != 1:
            raise AdapterFormatError(
                f"{file} is no checkpoint of a model with sDCT adapters, or one of an older version; give the folder "
                "of an adapter"
            )
        size = sum(tensor.nbytes for tensor in stored.values())
        if max_bytes is not None and size > max_bytes:
            raise BaseMismatchError(
                f"{file} holds {size} bytes of tensors, far more than there is room for ({max_bytes}); save one "
                "adapter of it by itself"
            )

    tensors = read_safetensors(file, check)
    state = decode_state(tensors.pop(EXTRA).tobytes(), file)
    if state.active is None and len(state.adapters) > 1:
        raise AdapterFormatError(
            f"{file} holds {len(state.adapters)} adapters and none was active; save one by itself (save_adapter)"
        )
    name = state.active if state.active is not None else next(iter(state.adapters))
    own = _tensors_of(name, tensors, active=name == state.active)

    def read(check: Callable[[Mapping[str, Stored]], None]) -> Mapping[str, Array]:
        check({key: Stored(array.dtype, array.shape) for key, array in own.items()})
        return own

    raw = state.adapters[name] | {"format_version": 1}  # its indices are stored as they are there
    return parse_contents(raw, read, config=file, weights=file)._replace(trained_on=state.records[name])


def _tensors_of(name: str, tensors: Mapping[str, Array], *, active: bool) -> dict[str, Array]:
    """The tensors of one adapter under the names they have in its folder."""
    found = {}
    for key, array in tensors.items():
        path, entries, rest = key.removeprefix("base.").rpartition(ENTRIES)
        if entries:
            adapter, _, kind = rest.partition(".")
            if adapter == name:
                found[path + {"values": VALUES_SUFFIX, "indices": INDICES_SUFFIX}.get(kind, f".{kind}")] = array
        elif key.startswith("base.") and active:
            found[key.removeprefix("base.")] = array
        elif key.startswith(f"parked.{name}."):
            found[key.removeprefix(f"parked.{name}.").replace("/", ".")] = array
        elif not key.startswith(("base.", "parked.")):
            found[key] = array  # none it can have, which is refused by its name
    return found
