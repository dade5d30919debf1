"""`SdctConfig`: what an sDCT adapter is, as users set it for training and as `adapter_config.json` stores it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError

PEFT_TYPE = "SDCT"
ALL_LINEAR = "all-linear"
FORMAT_VERSION = 2  # the newest that is read; `folder` says what each one is
SELECTIONS = ("energy", "top", "random", "low")
TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION", "IMAGE_CLS")


@dataclasses.dataclass(frozen=True)
class SdctConfig:
    """Settings of one sDCT adapter.

    The weight update of an adapted linear layer is `dW = scaling * C_out^T F C_in` with orthonormal DCT-II matrices
    `C` and a sparse `F` of `n_coefficients` entries.

    Args:
        target_modules: names of the linear layers to adapt. A list matches a module whose path equals an item or ends
            with `"." + item`; a string is a regular expression that must match the whole path. `"all-linear"` means
            every linear layer but the output layer and those in `modules_to_save`.
        n_coefficients: trained coefficients per matrix (700 gives the counts published for MaCP, arXiv 2410.09103).
        scaling: factor on every coefficient. With orthonormal transforms only `scaling * learning rate` matters to an
            optimiser such as Adam; with the default of 1.0 use a learning rate near 1e-2.
        selection: how coefficients are chosen. `energy`: per distance band, a fraction `delta` where the 2-D DCT of
            the pretrained weight is largest, the rest at random; `top`: largest of a given weight change; `random`;
            `low`: lowest frequencies.
        delta: fraction of each band taken by magnitude (`energy` only), in [0, 1].
        bands: number of distance bands (`energy` and `top`), 3 in the paper.
        seed: seed of the random part. Files hold resolved indices, so a file never depends on it.
        modules_to_save: modules trained and stored in full beside the coefficients, e.g. `["classifier"]`.
        task_type: what the adapted model does: one of `SEQ_CLS`, `TOKEN_CLS`, `CAUSAL_LM`, `FEATURE_EXTRACTION`,
            `IMAGE_CLS`, or None. Export uses it to choose the model class.
        base_model_name_or_path: where the base model came from.

    Raises:
        ConfigError: a field has a value that cannot work.
    """

    target_modules: Sequence[str] | str = ("query", "value", "q_proj", "v_proj")
    n_coefficients: int = 700
    scaling: float = 1.0
    selection: str = "energy"
    delta: float = 0.7
    bands: int = 3
    seed: int = 0
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        targets = self.target_modules
        if isinstance(targets, str):
            if len(targets) > 10_000:  # which an adapter's file may hold, and which takes long to compile
                raise ConfigError(f"target_modules is a pattern of {len(targets)} characters; it may have 10000")
            try:
                re.compile(targets)
            except (re.error, OverflowError, RecursionError) as error:
                raise ConfigError(f"target_modules {targets!r} is not a valid regular expression: {error}") from error
            if not targets:
                raise ConfigError("target_modules is empty; name at least one linear layer, e.g. ['q_proj', 'v_proj']")
        else:
            object.__setattr__(self, "target_modules", _names("target_modules", targets))
            if not self.target_modules:
                raise ConfigError("target_modules is empty; name at least one linear layer, e.g. ['q_proj', 'v_proj']")
        if self.modules_to_save is not None:
            object.__setattr__(self, "modules_to_save", _names("modules_to_save", self.modules_to_save) or None)
        for field, low in (("n_coefficients", 1), ("bands", 1), ("seed", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{field} must be an integer of at least {low}, got {value!r}")
        for field in ("scaling", "delta"):
            object.__setattr__(self, field, _finite(field, getattr(self, field)))
        if self.scaling == 0.0:
            raise ConfigError("scaling is 0, so the adapter would have no effect; set it to 1.0")
        if not 0.0 <= self.delta <= 1.0:
            raise ConfigError(f"delta must lie in [0, 1], got {self.delta}")
        if self.selection not in SELECTIONS:
            raise ConfigError(f"selection must be one of {', '.join(SELECTIONS)}; got {self.selection!r}")
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ConfigError(f"task_type must be one of {', '.join(TASK_TYPES)} or null; got {self.task_type!r}")
        if self.base_model_name_or_path is not None and not isinstance(self.base_model_name_or_path, str):
            raise ConfigError(
                f"base_model_name_or_path must be a string or null, got {self.base_model_name_or_path!r}"
            )

    def matches(self, module_path: str) -> bool:
        """Whether `target_modules` selects the module at `module_path` (PEFT's rule)."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module_path) is not None
        return _ends_with(module_path, self.target_modules)

    def saves(self, module_path: str) -> bool:
        """Whether `modules_to_save` names the module at `module_path`."""
        return self.modules_to_save is not None and _ends_with(module_path, self.modules_to_save)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        fields = dataclasses.asdict(self)
        for name in ("target_modules", "modules_to_save"):
            if isinstance(fields[name], tuple):
                fields[name] = list(fields[name])
        return fields


def _ends_with(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def _finite(field: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond the range of float
            if math.isfinite(value):
                return float(value)
    raise ConfigError(f"{field} must be a finite number, got {value!r}")


def _names(field: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        raise ConfigError(f"{field} must be a list of module names, got {value!r}")
    names = sorted(value) if isinstance(value, set | frozenset) else list(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{field} must hold non-empty module names, got {name!r}")
    return tuple(names)
