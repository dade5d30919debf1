"""What a state dict says beside its tensors, so that one is never loaded into a model that it is not of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter.config import SdctConfig
from ..adapter.folder import fields_of
from ..adapter.state import State, decode_state, encode_state
from ..adapter.training import Weights, check_class
from ..base.training import check_config, check_weights, class_name, model_config, record
from ..errors import AdapterFormatError, BaseMismatchError, ConfigError

_LABEL = Path("the state dict")


class Described(NamedTuple):
    """One adapter of a model: its settings, the shapes of what it adapts, and the hash of that with its dtype."""

    config: SdctConfig
    shapes: Mapping[str, tuple[int, int]]
    base_hash: str | None
    base_dtype: str | None


def describe(
    base: nn.Module,
    adapters: Mapping[str, Described],
    active: str | None,
    fresh: tuple[str, ...] | None,
    weights: Weights | None,
) -> Tensor:
    """uint8 `[bytes]`: what `adapter.state` reads.

    The training probe is that of the active adapter, with which `base` computes now; the others have none here.
    """
    now = record(base, fresh=fresh, weights=weights)
    plain = dataclasses.replace(now, probe=None)
    records = {name: now if name == active else plain for name in adapters}
    fields = {
        name: fields_of(own.config, own.shapes, own.base_hash, own.base_dtype, records[name])
        for name, own in adapters.items()
    }
    return torch.from_numpy(np.frombuffer(encode_state(State(active, fields, records)), np.uint8).copy())


def check_described(described: object, base: nn.Module, adapters: Mapping[str, Described], active: str | None) -> None:
    """Raise unless `described`, which `describe` gave for some model, fits this one; tensors are not looked at.

    Raises:
        AdapterFormatError: it is no description.
        BaseMismatchError: an adapter was trained on another class or other base weights.
        ConfigError: other adapters, another scaling, or another adapter is active, whose saved modules lie elsewhere.
    """
    if not isinstance(described, Tensor) or described.dtype != torch.uint8:
        raise AdapterFormatError(
            f"{_LABEL} has an extra state that is none of an sDCT model; load one of such a model"
        )
    state = decode_state(described.cpu().numpy().tobytes(), _LABEL)
    for name, fields in state.adapters.items():
        if name not in adapters:
            raise ConfigError(
                f"{_LABEL} holds an adapter {name!r}, the model has {', '.join(adapters)}; add it with add_adapter "
                "first, or give the model's that name"
            )
        own = adapters[name]
        if fields.get("scaling", 1.0) != own.config.scaling:
            raise ConfigError(
                f"{_LABEL} holds adapter {name!r} with scaling {fields.get('scaling', 1.0)}, in the model it has "
                f"{own.config.scaling}, so that the outputs would differ; build the model with that scaling"
            )
        trained = state.records[name]
        if trained is not None:
            label = f"adapter {name!r} of {_LABEL}"
            check_class(trained, class_name(base), label=label)
            check_config(trained, model_config(base), label=label)
            check_weights(trained, base, label=label)
        hashes = {own.base_hash, fields.get("base_model_hash")} - {None}
        if len(hashes) > 1 and own.base_dtype == fields.get("base_model_dtype"):  # two that can be compared
            raise BaseMismatchError(
                f"{_LABEL}: adapter {name!r} was trained on other base weights, or on other modules; use the base "
                f"and the target_modules it was trained with ({fields.get('base_model_name_or_path') or 'unknown'})"
            )
    if state.active != active and any(own.config.modules_to_save for own in adapters.values()):
        raise ConfigError(
            f"{_LABEL} is of a model whose active adapter is {state.active!r}, here it is {active!r}; activate that "
            "one first, for its saved modules stand in the base"
        )
