"""`SdctModel`: a frozen base model with named, trainable sDCT adapters on its linear layers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter.adapter import SdctAdapter
from ..adapter.config import SdctConfig
from ..adapter.entries import DTYPE_NAMES, VALUE_DTYPES, Array, SdctEntries
from ..adapter.training import Weights
from ..base.model import CHILD, check_base, task_type, to_numpy, to_torch
from ..base.sentence import refuse_whole
from ..base.training import check_record, checksums, float_dtype, fresh_parameters, record, weights_of
from ..errors import BaseMismatchError, ConfigError, UnknownAdapterError
from ..files import check_adapter_name
from .inject import (
    base_name,
    check_linear,
    check_source,
    find_heads,
    find_targets,
    fresh_entry,
    identity,
    shape_of,
    with_fresh_heads,
)
from .layer import SdctEntry, SdctLayer, add_active
from .state import Described, check_described, describe

_WRITING = ("save", "push", "upload", "_save_pre", "_push", "_upload")  # names of the base that are not handed on
_OWN = "__base__"  # stands for the base's own heads; no adapter can have this name


def get_sdct_model(base: nn.Module, config: SdctConfig, adapter_name: str = "default") -> SdctModel:
    """Freeze `base` (in place) and put a trainable adapter on every linear layer that `config.target_modules` names.

    The values start at zero, so the model computes what the base computes until the first optimiser step. Everything
    of the base stays reachable through the returned model (`model.config`, `model.generate`, ...); `model.base` is the
    base itself.

    Raises:
        ConfigError: nothing matches, `n_coefficients` exceeds a matrix, or the settings contradict each other.
        UnsupportedError: a named module is no `Linear` or `Conv1D` with float weights.
    """
    if not isinstance(base, nn.Module) or not isinstance(config, SdctConfig):
        raise ConfigError(
            f"get_sdct_model takes a model and an SdctConfig, got {type(base).__name__} and {type(config).__name__}"
        )
    model = _new(base)
    model.add_adapter(adapter_name, config)
    model.set_adapter(adapter_name)
    return model


class SdctModel(nn.Module):
    """A frozen base with sDCT adapters; made by `get_sdct_model` or `SdctModel.from_adapter`.

    `state_dict` holds the adapters only (coefficients and saved modules), so that the checkpoints of a training loop
    stay small, and what they are (`state`), for which the model runs once on a small input. `load_state_dict` accepts
    the same, and refuses a state of another scaling, class or base.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        refuse_whole(base)
        if any(isinstance(module, SdctLayer | SdctModel) for module in base.modules()):
            raise ConfigError(
                "the base carries sDCT adapters already; call add_adapter or load_adapter of its SdctModel"
            )
        if isinstance(getattr(base, "_orig_mod", None), nn.Module):
            raise ConfigError("the base is what torch.compile returned; add adapters to the model, then compile that")
        self.base = base.requires_grad_(False)
        self.configs: dict[str, SdctConfig] = {}
        self.active: str | None = None
        # modules of modules_to_save that are not in the base now: adapter name -> path (dots as slashes) -> module
        self.parked = nn.ModuleDict({_OWN: nn.ModuleDict()})
        self._identities: dict[str, tuple[str, str] | tuple[None, None]] = {}
        self._merged: Any = None
        self._fresh = fresh_parameters(base)
        self._sums = self._now = checksums(base)  # as it was given, and as it has to be now
        self._sums_dtype = float_dtype(base)
        self._moved: list[str] = []  # what had changed before a cast, after which it could not be seen
        self.register_state_dict_post_hook(_drop_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_allow_missing_base)  # type: ignore[no-untyped-call]

    @staticmethod
    def from_adapter(base: nn.Module, adapter: SdctAdapter | str | Path, adapter_name: str = "default") -> SdctModel:
        """Freeze `base` (in place), put a trained adapter on it and activate it. Raises as `load_adapter`."""
        model = _new(base)
        model.load_adapter(adapter, adapter_name)
        model.set_adapter(adapter_name)
        return model

    @staticmethod
    def from_pretrained(
        base: nn.Module,
        name_or_path: str | Path,
        adapter_name: str = "default",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> SdctModel:
        """`from_adapter` of a folder, or of a repository of the Hugging Face Hub; base first, as PEFT has it.

        Raises as `SdctAdapter.from_pretrained` and `from_adapter`.
        """
        if not isinstance(base, nn.Module):
            raise ConfigError(
                f"from_pretrained takes the base model first and the adapter second, got {type(base).__name__!r}"
            )
        adapter = SdctAdapter.from_pretrained(name_or_path, revision=revision, token=token)
        return SdctModel.from_adapter(base, adapter, adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base returns, with the active adapter applied."""
        return self.base(*args, **kwargs)

    def train(self, mode: bool = True) -> SdctModel:
        """Training mode, or eval mode; running statistics of the base (batch normalisation) stand still in both.

        No adapter holds them: what trains has to see what will be served.
        """
        super().train(mode)
        for module in self.base.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                module.eval()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            if name.startswith(_WRITING):
                raise AttributeError(
                    f"{name} of the base would write the base with the adapter's tensors in it; save_adapter(path) or "
                    "push_to_hub(repository) write the adapter, merge_and_unload() gives a plain model"
                ) from None
            return getattr(super().__getattr__("base"), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self.base),), self.__dict__

    def get_extra_state(self) -> Tensor:
        """What `state_dict` says of the adapters beside their tensors, uint8 `[bytes]`."""
        return describe(self.base, self._described(), self.active, self._fresh, self._weights())

    def set_extra_state(self, state: object) -> None:
        """Raise `ConfigError` or `BaseMismatchError` unless a state dict that says this is one of such a model."""
        check_described(state, self.base, self._described(), self.active)

    # -- adapters ------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters on this model."""
        return list(self.configs)

    def add_adapter(self, name: str, config: SdctConfig) -> None:
        """Add an untrained adapter; `set_adapter(name)` activates it. Raises as `get_sdct_model`."""
        self._check_new(name)
        if config.selection == "top":
            raise ConfigError(
                "selection 'top' picks the largest coefficients of a known weight change, which training does not "
                "have yet; use 'energy' here, or turn a LoRA or a tuned checkpoint into an adapter with "
                "`sdct-export project`"
            )
        check_source(self.base, config, self._fresh)
        config = with_fresh_heads(self.base, config, self._fresh)
        with self.disable_adapter():
            targets = find_targets(self.base, config)
            heads = find_heads(self.base, config, targets)
            entries = {path: fresh_entry(path, module, config) for path, module in targets.items()}
            self._add(name, config, targets, entries, {path: _copy(head) for path, head in heads.items()})

    def load_adapter(self, adapter: SdctAdapter | str | Path, adapter_name: str) -> None:
        """Add a trained adapter from a folder or from memory; `set_adapter(adapter_name)` activates it.

        Raises:
            AdapterFormatError: the folder is damaged.
            BaseMismatchError: the adapter was trained on another base.
        """
        self._check_new(adapter_name)
        label = "the adapter" if isinstance(adapter, SdctAdapter) else str(adapter)
        if not isinstance(adapter, SdctAdapter):
            adapter = SdctAdapter.load(adapter)
        with self.disable_adapter():
            check_base(adapter, self.base, label=label)
            check_record(adapter, self.base, label=label)
            targets = {path: self.base.get_submodule(path) for path in adapter.modules}
            for path, module in targets.items():
                check_linear(path, module)
            heads = {path: _copy(head) for path, head in find_heads(self.base, adapter.config, targets).items()}
            _fill(heads, adapter, label)
            entries = {}
            for path, stored in adapter.modules.items():
                entry = SdctEntry(torch.from_numpy(stored.float32()), to_torch(stored.indices), adapter.config.scaling)
                entries[path] = entry.to(targets[path].get_parameter("weight").device)
            self._add(adapter_name, adapter.config, targets, entries, heads)

    def set_adapter(self, name: str) -> None:
        """Make `name` the one adapter that is applied and trained."""
        self._check_known(name)
        self._refuse_merged("switching adapters")
        self._activate(name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base, with the base's own heads."""
        self._refuse_merged("disabling the adapter")
        before = self.active
        self._activate(None)
        try:
            yield
        finally:
            self._activate(before)

    # -- results -------------------------------------------------------------------------------------------------

    def adapter(self, name: str | None = None, *, dtype: str | None = None) -> SdctAdapter:
        """A frozen copy of adapter `name`.

        Args:
            name: which adapter; None for the one that is active or merged, or the only one.
            dtype: `float32`, `float16` or `bfloat16` for the values; None keeps float32.

        Raises:
            AdapterFormatError: training diverged and left NaN or infinite values.
            ConfigError: `name` is None, and there are several adapters, none of them active; or the base changed since
                the adapters were put on it, which no adapter could bring along.
            UnknownAdapterError: there is no such adapter.
        """
        name = self._meant(name)
        self._check_base_as_it_was()
        return self._adapter(name, dtype)

    def _adapter(self, name: str, dtype: str | None = None) -> SdctAdapter:
        value_dtype = DTYPE_NAMES.get(dtype or "float32")
        if value_dtype not in VALUE_DTYPES:
            raise ConfigError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
        modules: dict[str, SdctEntries] = {}
        for path, linear, layer in self._layers():
            if name not in layer.entries:
                continue
            entry = layer.entry(name)
            if entry.values.is_meta:
                raise ConfigError("a model on the meta device has no values to save; load it with its weights")
            exact = to_numpy(entry.values.float())
            with np.errstate(over="ignore"):
                values = exact.astype(value_dtype)
            _check_rounding(path, exact, values)
            modules[path] = SdctEntries(values, to_numpy(entry.indices).copy(), shape_of(linear))
        saved: dict[str, Array] = {}
        for path, head in self._heads_of(name).items():
            for parameter_name, parameter in head.named_parameters():
                saved[f"{path}.{parameter_name}"] = to_numpy(parameter).copy()
        with self._applied(name), self._rounded(name, value_dtype):
            trained_on = record(self.base, fresh=self._fresh, weights=self._weights())
        base_hash, base_dtype = self._identities[name]
        return SdctAdapter(self.configs[name], modules, saved, base_hash, base_dtype, trained_on)

    def plain_base(self) -> nn.Module:
        """A copy of the base as it was given, without adapters or their hooks."""
        with self.disable_adapter():
            return _unwrap(copy.deepcopy(self.base))

    @property
    def fresh_parameters(self) -> tuple[str, ...] | None:
        """Parameters of the base that its checkpoint did not hold, None where that is not known."""
        return self._fresh

    def save_adapter(
        self, path: str | Path, adapter_name: str | None = None, *, dtype: str | None = None, overwrite: bool = False
    ) -> None:
        """Write adapter `adapter_name` as the folder `path`, which is new or, with `overwrite`, an adapter's.

        Raises as `adapter`, and as `SdctAdapter.save`.
        """
        self.adapter(adapter_name, dtype=dtype).save(path, overwrite=overwrite)

    def save_pretrained(
        self, save_directory: str | Path, adapter_name: str | None = None, *, dtype: str | None = None
    ) -> None:
        """`save_adapter` under the name Hugging Face gives it: an adapter that stands there is replaced.

        As PEFT's, it writes the adapter and nothing of the base (for that: `merge_and_unload().save_pretrained`).
        """
        self.save_adapter(save_directory, adapter_name, dtype=dtype, overwrite=True)

    def push_to_hub(
        self, repo_id: str, adapter_name: str | None = None, *, dtype: str | None = None, **settings: Any
    ) -> str:
        """Publish one adapter, and nothing of the base: `SdctAdapter.push_to_hub`, which says what else it takes."""
        return self.adapter(adapter_name, dtype=dtype).push_to_hub(repo_id, **settings)

    def merge(self) -> None:
        """Add the active adapter into the base's weights and heads, so that the forward costs what the base costs."""
        from ..weights.merging import merge

        self._refuse_merged("merging again")
        if self.active is None:
            raise ConfigError("no adapter is active, so there is nothing to merge; call set_adapter first")
        name = self.active
        adapter = self._adapter(name)
        self._activate(None)
        try:
            self._merged = (name, merge(self.base, dataclasses.replace(adapter, trained_on=None)))  # on its own base
        except BaseException:
            self._activate(name)
            raise

    def unmerge(self) -> None:
        """Restore the base's weights bit for bit and apply the adapter in the forward again."""
        if self._merged is None:
            raise ConfigError("nothing is merged; call merge first")
        name, merged = self._merged
        merged.unmerge()
        self._merged = None
        self._activate(name)

    def merge_and_unload(self) -> nn.Module:
        """Merge the active adapter for good and give the base back, a plain model without adapters or hooks."""
        self.merge()
        self._merged = None
        return _unwrap(self.base)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """`count_parameters`, under the name PEFT gives it."""
        return self.count_parameters()

    def count_parameters(self) -> tuple[int, int]:
        """`(trainable, all)` numbers, each shared parameter counted once."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers train, and their share."""
        trainable, total = self.count_parameters()
        print(f"trainable: {trainable:,} of {total:,} ({100 * trainable / total:.4f} %)")

    @contextlib.contextmanager
    def _rounded(self, name: str, dtype: Any) -> Iterator[None]:
        """Within the block the coefficients of `name` are those that a file in `dtype` holds."""
        values = [layer.entry(name).values for _, _, layer in self._layers() if name in layer.entries]
        kept = [value.detach().clone() for value in values]
        target = to_torch(np.zeros(0, dtype)).dtype
        try:
            with torch.no_grad():
                for value in values:
                    value.copy_(value.to(target))
            yield
        finally:
            with torch.no_grad():
                for value, before in zip(values, kept, strict=True):
                    value.copy_(before)

    @contextlib.contextmanager
    def _applied(self, name: str) -> Iterator[None]:
        """Within the block the model computes with adapter `name`, merged or not."""
        before = self.active
        if self._merged is not None and self._merged[0] == name:
            yield
            return
        self._refuse_merged("saving another adapter")
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    # -- private -------------------------------------------------------------------------------------------------

    def _layers(self) -> Iterator[tuple[str, nn.Module, SdctLayer]]:
        """Path, linear layer and adapters of every adapted layer."""
        for path, module in self.base.named_modules():
            layer = module._modules.get(CHILD)
            if isinstance(layer, SdctLayer):
                yield path, module, layer

    def _described(self) -> dict[str, Described]:
        shapes: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in self.configs}
        for path, linear, layer in self._layers():
            for name in layer.entries:
                shapes[name][path] = shape_of(linear)
        return {
            name: Described(config, shapes[name], *self._identities[name]) for name, config in self.configs.items()
        }

    def _add(
        self,
        name: str,
        config: SdctConfig,
        targets: Mapping[str, nn.Module],
        entries: Mapping[str, SdctEntry],
        heads: Mapping[str, nn.Module],
    ) -> None:
        for other in self.configs:
            for head in self._heads_of(other):
                inside = [path for path in targets if f"{path}.".startswith(f"{head}.")]
                if inside:
                    raise ConfigError(
                        f"target module {inside[0]!r} lies in {head!r}, which adapter {other!r} trains in full"
                    )
        self._identities[name] = identity(self.base, targets)
        self.configs[name] = dataclasses.replace(
            config,
            task_type=config.task_type or task_type(self.base),
            base_model_name_or_path=config.base_model_name_or_path or base_name(self.base),
        )
        # not by `self.parked[name]`: ModuleDict refuses names such as `train`
        self.parked._modules[name] = nn.ModuleDict({path.replace(".", "/"): head for path, head in heads.items()})
        for path, linear in targets.items():
            layer = linear._modules.get(CHILD)
            if not isinstance(layer, SdctLayer):
                layer = SdctLayer(linear)
            layer.entries._modules[name] = entries[path].requires_grad_(False)

    def _activate(self, name: str | None) -> None:
        """Apply and train `name` alone; None for the bare base. Moves saved modules in and out of the base."""
        if self.active is not None:
            self._swap(_OWN, self.active)
            self.active = None
        if name is not None:
            self._swap(name, _OWN)
            self.active = name
        for _, _, layer in self._layers():
            layer.active = name
            for key, entry in layer.entries.items():
                entry.requires_grad_(key == name)

    def _swap(self, entering: str, leaving: str) -> None:
        """Put every parked module of `entering` in its place in the base, and park what was there under `leaving`."""
        parked = self._parked(entering)
        for key in list(parked):
            parent, _, attribute = key.replace("/", ".").rpartition(".")
            holder = self.base.get_submodule(parent)
            old, new = holder.get_submodule(attribute), parked.pop(key)
            holder._modules[attribute] = new.requires_grad_(entering != _OWN).train(old.training)
            self._parked(leaving)[key] = old.requires_grad_(False)

    def _parked(self, name: str) -> nn.ModuleDict:
        parked = self.parked[name]
        assert isinstance(parked, nn.ModuleDict)
        return parked

    def _heads_of(self, name: str) -> dict[str, nn.Module]:
        """Path -> saved module of adapter `name`, wherever it is now."""
        if name == self.active:  # its place in the base is where the base's own head was taken from
            paths = [key.replace("/", ".") for key in self._parked(_OWN)]
            return {path: self.base.get_submodule(path) for path in paths}
        return {key.replace("/", "."): head for key, head in self._parked(name).items()}

    def _check_base_as_it_was(self) -> None:
        """Refuse a base that trained along: nothing of it is in an adapter, which would stand for another model."""
        own = {f"base.{path}." for path in self._heads_of(self.active)} if self.active is not None else set()
        trains = [
            name.removeprefix("base.")
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and f".{CHILD}.entries." not in name and not name.startswith(tuple(own))
        ]
        changed = [*self._moved, *self._changed()]
        for names, what in ((trains, "requires gradients"), (changed, "is not what it was when adapters were added")):
            if names:
                raise ConfigError(
                    f"{names[0]!r} of the base {what} ({len(names)} such tensors), and an adapter holds coefficients "
                    "and modules_to_save only: freeze it, name its module in modules_to_save, or keep all of it with "
                    "merge_and_unload() and save_pretrained"
                )

    def _changed(self) -> list[str]:
        """Names of the base's tensors beside what adapters change that are not what they have to be now."""
        with contextlib.nullcontext() if self._merged is not None else self.disable_adapter():
            found = checksums(self.base, self._sums_dtype)
        own = self._own() if self._merged is not None else ()  # its weights hold the adapter
        return [
            name
            for name, (dtype, total) in self._now.items()
            if name in found and found[name][0] == dtype and found[name][1] != total and not name.startswith(own)
        ]

    def _own(self) -> tuple[str, ...]:
        """How the names of those tensors of the base begin that adapters change or replace."""
        heads = {f"{path}." for name in self.configs for path in self._heads_of(name)}
        return (*sorted(heads), *(f"{path}.weight" for path, _, _ in self._layers()))

    def _weights(self) -> Weights | None:
        own = self._own()
        fresh = set(self._fresh or ())
        kept = {n: total for n, total in self._sums.items() if not n.startswith(own) and n not in fresh}
        return weights_of(kept, self._sums_dtype) if kept else None

    def _apply(self, fn: Any, recurse: bool = True) -> SdctModel:
        """As `nn.Module` casts and moves; what changed before a cast is found out now."""
        first = next((p for p in self.base.parameters() if p.is_floating_point() and not p.is_meta), None)
        casts = bool(self._now) and first is not None and fn(first.detach().new_empty(0)).dtype != first.dtype
        if casts:
            self._moved += [name for name in self._changed() if name not in self._moved]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if casts:
            with contextlib.nullcontext() if self._merged is not None else self.disable_adapter():
                self._now = checksums(self.base, self._sums_dtype)
        return self

    def _check_new(self, name: str) -> None:
        check_adapter_name(name)
        self._refuse_merged("adding an adapter")
        if name in self.configs:
            raise ConfigError(f"an adapter named {name!r} exists already; choose another name")

    def _meant(self, name: str | None) -> str:
        """`name`, which must be known, or the adapter that a caller who names none must mean."""
        if name is None:
            name = self._merged[0] if self._merged is not None else self.active
        if name is None and len(self.configs) > 1:
            raise ConfigError(
                f"this model has {len(self.configs)} adapters ({', '.join(self.configs)}) and none is active; name one"
            )
        name = next(iter(self.configs), "default") if name is None else name
        self._check_known(name)
        return name

    def _check_known(self, name: str) -> None:
        if name not in self.configs:
            known = ", ".join(self.configs) or "none"
            raise UnknownAdapterError(f"no adapter is named {name!r}; this model has: {known}")

    def _refuse_merged(self, what: str) -> None:
        if self._merged is not None:
            raise ConfigError(f"adapter {self._merged[0]!r} is merged into the base; call unmerge before {what}")


def _check_rounding(path: str, exact: Array, values: Array) -> None:
    """Refuse to lose a module's coefficients below the range of a half type, as a large `scaling` has them lie.

    Rounding alone costs at most 2^-9 of each; values beyond the range are infinite, which `SdctEntries` refuses.
    """
    size, lost = np.linalg.norm(exact), np.linalg.norm(exact - values.astype(np.float32))
    if np.isfinite(values.astype(np.float32)).all() and lost > 0.01 * size:
        raise ConfigError(
            f"the coefficients of {path!r} (largest {np.abs(exact).max():.1e}) lie below the range of {values.dtype}: "
            f"{100 * lost / size:.0f} % would be lost; save them in float32 or bfloat16"
        )


def _unwrap(base: nn.Module) -> nn.Module:
    """`base` itself, without the adapters on its layers."""
    for module in base.modules():
        if isinstance(module._modules.get(CHILD), SdctLayer):
            del module._modules[CHILD]
            for key in [key for key, hook in module._forward_hooks.items() if hook is add_active]:
                del module._forward_hooks[key]
    return base


def _new(base: nn.Module) -> SdctModel:
    return _class_for(type(base))(base)  # type: ignore[arg-type]


@functools.cache
def _class_for(base: type[nn.Module]) -> type[SdctModel]:
    """`SdctModel` whose `forward` shows the signature of `base.forward`, which transformers' Trainer inspects."""

    def forward(self: SdctModel, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    forward.__doc__ = SdctModel.forward.__doc__
    return type(f"Sdct{base.__name__}", (SdctModel,), {"forward": forward, "__module__": __name__})


def _rebuild(base: type[nn.Module]) -> SdctModel:
    cls = _class_for(base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _copy(head: nn.Module) -> nn.Module:
    return copy.deepcopy(head).requires_grad_(False)


def _fill(heads: Mapping[str, nn.Module], adapter: SdctAdapter, label: str) -> None:
    """Write the saved parameters of `adapter` into `heads`, after checking that names and shapes agree."""
    expected = {f"{path}.{name}": p for path, head in heads.items() for name, p in head.named_parameters()}
    for name in sorted(set(expected) ^ set(adapter.saved)):
        state = "is missing from" if name in expected else "is not part of the modules_to_save of"
        raise BaseMismatchError(f"{label}: {name!r} {state} the adapter; save it again on the base it was trained on")
    for name, parameter in expected.items():
        stored = to_torch(adapter.saved[name])
        if stored.shape != parameter.shape:
            raise BaseMismatchError(
                f"{label}: {name!r} has shape {list(stored.shape)}, but {list(parameter.shape)} in the base; load the "
                "base with the number of labels the adapter was trained for"
            )
        with torch.no_grad():
            parameter.copy_(stored)


def _drop_base(model: SdctModel, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """State-dict hook: keep what adapters own, and what else a person lets train; drop the frozen base."""
    for key in _base_keys(model):
        state.pop(prefix + key, None)


def _allow_missing_base(model: SdctModel, incompatible: Any) -> None:
    """Load hook: a state dict without the base is complete."""
    frozen = tuple(_base_keys(model))
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(frozen)]


def _base_keys(model: SdctModel) -> list[str]:
    heads = () if model.active is None else tuple(f"base.{path}." for path in model._heads_of(model.active))
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    keys = []
    for name, tensor in tensors:
        if tensor.requires_grad:
            continue
        in_base = name.startswith("base.") and f".{CHILD}.entries." not in name and not name.startswith(heads)
        if in_base or name.startswith(f"parked.{_OWN}."):
            keys.append(name)
    return keys
