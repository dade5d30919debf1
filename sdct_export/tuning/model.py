"""`SdctModel`: a frozen base model with named, trainable sDCT adapters on its linear layers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import DTYPE_NAMES, VALUE_DTYPES, Array, SdctAdapter, SdctEntries
from ..base import check_base, linear_shape, linear_weight, model_hash, to_numpy, to_torch
from ..config import SdctConfig
from ..errors import BaseMismatchError, ConfigError, UnknownAdapterError, UnsupportedError
from ..files import check_adapter_name
from ..selection import select_for_weight
from .layer import CHILD, SdctEntry, SdctLayer

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForImageClassification": "IMAGE_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "Model": "FEATURE_EXTRACTION",
}
_BASE = "__base__"  # no adapter can have this name


def get_sdct_model(base: nn.Module, config: SdctConfig, adapter_name: str = "default") -> SdctModel:
    """Freeze `base` (in place) and put a trainable adapter on every linear layer that `config.target_modules` names.

    The values start at zero, so the model computes what the base computes until the first optimiser step. Everything of the
    base stays reachable through the returned model (`model.config`, `model.generate`, ...); `model.base` is the base itself.

    Raises:
        ConfigError: nothing matches, `n_coefficients` exceeds a matrix, or the settings contradict each other.
        UnsupportedError: a named module is no `Linear` or `Conv1D` with float weights.
    """
    model = _new(base)
    model.add_adapter(adapter_name, config)
    model.set_adapter(adapter_name)
    return model


class SdctModel(nn.Module):
    """A frozen base with sDCT adapters; made by `get_sdct_model` or `SdctModel.from_adapter`.

    `state_dict` holds the adapters only (coefficients and saved modules), so the checkpoints of a training loop stay small;
    `load_state_dict` accepts the same.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if any(isinstance(module, SdctLayer | SdctModel) for module in base.modules()):
            raise ConfigError(
                "the base carries sDCT adapters already; call add_adapter or load_adapter on its SdctModel"
            )
        self.base = base.requires_grad_(False)
        self.configs: dict[str, SdctConfig] = {}
        self.active: str | None = None
        # saved modules that are not in the base at the moment: adapter name -> path (dots as slashes) -> module
        self.inactive = nn.ModuleDict({_BASE: nn.ModuleDict()})
        self._hashes: dict[str, tuple[str, str] | None] = {}
        self._merged: Any = None
        self.register_state_dict_post_hook(_drop_base)
        self.register_load_state_dict_post_hook(_allow_missing_base)

    @staticmethod
    def from_adapter(base: nn.Module, adapter: SdctAdapter | str | Path, adapter_name: str = "default") -> SdctModel:
        """Freeze `base`, put a trained adapter on it and activate it. Raises as `load_adapter`."""
        model = _new(base)
        model.load_adapter(adapter, adapter_name)
        model.set_adapter(adapter_name)
        return model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base returns, with the active adapter applied."""
        return self.base(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self.base),), self.__dict__

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
                "selection 'top' picks the largest coefficients of a known weight change, which training does not have yet; "
                "use `energy` here, or turn a trained LoRA or checkpoint into an adapter with `sdct-export project`"
            )
        targets = self._targets(config)
        for path, module in targets.items():
            d_out, d_in = _shape(module)
            if config.n_coefficients > d_out * d_in:
                raise ConfigError(
                    f"n_coefficients is {config.n_coefficients}, but module {path!r} is {d_out} x {d_in} and has only "
                    f"{d_out * d_in}; lower n_coefficients or take the module out of target_modules"
                )
        heads = self._heads(config, targets)
        entries = {path: _fresh_entry(path, module, config) for path, module in targets.items()}
        self._add(name, config, targets, entries, heads)

    def load_adapter(self, adapter: SdctAdapter | str | Path, adapter_name: str) -> None:
        """Add a trained adapter from a folder or from memory; `set_adapter(adapter_name)` activates it.

        Raises:
            AdapterFormatError: the folder is damaged.
            BaseMismatchError: the adapter was trained on another base.
        """
        self._check_new(adapter_name)
        label = f"adapter {adapter_name!r}" if isinstance(adapter, SdctAdapter) else f"adapter {str(adapter)!r}"
        if not isinstance(adapter, SdctAdapter):
            adapter = SdctAdapter.load(adapter)
        with self.disable_adapter():
            check_base(adapter, self.base, label=label)
        config = adapter.config
        targets = {path: self.base.get_submodule(path) for path in adapter.modules}
        for path, module in targets.items():
            _check_linear(path, module)
        entries = {}
        for path, stored in adapter.modules.items():
            device = targets[path].get_parameter("weight").device
            values = torch.from_numpy(stored.float32()).to(device)
            entries[path] = SdctEntry(values, to_torch(stored.indices).to(device), config.scaling)
        heads = self._heads(config, targets)
        expected = {f"{path}.{name}": p for path, head in heads.items() for name, p in head.named_parameters()}
        if set(expected) != set(adapter.saved):
            odd = sorted(set(expected) ^ set(adapter.saved))[0]
            where = "stores no" if odd in expected else "stores a stray"
            raise BaseMismatchError(f"{label} {where} {odd!r} for its modules_to_save; save the adapter again")
        with torch.no_grad():
            for parameter_name, parameter in expected.items():
                stored_parameter = to_torch(adapter.saved[parameter_name])
                if stored_parameter.shape != parameter.shape:
                    raise BaseMismatchError(
                        f"{label}: {parameter_name!r} has shape {list(stored_parameter.shape)}, but the base expects "
                        f"{list(parameter.shape)}; load the base with the number of labels the adapter was trained for"
                    )
                parameter.copy_(stored_parameter)
        self._add(adapter_name, config, targets, entries, heads)

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

    def adapter(self, name: str = "default", *, dtype: str | None = None) -> SdctAdapter:
        """A frozen copy of adapter `name`.

        Args:
            name: which adapter.
            dtype: `float32`, `float16` or `bfloat16` for the values; None keeps float32.

        Raises:
            AdapterFormatError: training diverged and left NaN or infinite values.
        """
        self._check_known(name)
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
            values = to_numpy(entry.values.float()).copy().astype(value_dtype)
            modules[path] = SdctEntries(values, to_numpy(entry.indices).copy(), _shape(linear))
        saved: dict[str, Array] = {}
        for path, head in self._heads_of(name).items():
            for parameter_name, parameter in head.named_parameters():
                saved[f"{path}.{parameter_name}"] = to_numpy(parameter).copy()
        hashed = self._hashes[name]
        return SdctAdapter(self.configs[name], modules, saved, *(hashed or (None, None)))

    def save_adapter(self, path: str | Path, adapter_name: str = "default", *, dtype: str | None = None) -> None:
        """Write adapter `adapter_name` as the new folder `path`; arguments and errors as `adapter`, and `OutputError`."""
        self.adapter(adapter_name, dtype=dtype).save(path)

    def merge(self) -> None:
        """Add the active adapter into the base's weights and heads, so that the forward costs what the base costs."""
        from ..merge import merge

        self._refuse_merged("merging again")
        if self.active is None:
            raise ConfigError("no adapter is active, so there is nothing to merge; call set_adapter first")
        name = self.active
        adapter = self.adapter(name)
        self._activate(None)
        try:
            self._merged = (name, merge(self.base, adapter))
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

    def count_parameters(self) -> tuple[int, int]:
        """`(trainable, all)` numbers, each shared parameter counted once."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers train, and their share."""
        trainable, total = self.count_parameters()
        print(f"trainable: {trainable:,} of {total:,} ({100 * trainable / total:.4f} %)")

    # -- private -------------------------------------------------------------------------------------------------

    def _layers(self) -> list[tuple[str, nn.Module, SdctLayer]]:
        """Path, linear layer and adapters of every adapted layer."""
        found = []
        for path, module in self.base.named_modules():
            layer = module._modules.get(CHILD)
            if isinstance(layer, SdctLayer):
                found.append((path, module, layer))
        return found

    def _targets(self, config: SdctConfig) -> dict[str, nn.Module]:
        targets = {}
        linear = []
        for path, module in self.base.named_modules():
            if linear_shape(module) is not None:
                linear.append(path)
            if config.matches(path):
                _check_linear(path, module)
                targets[path] = module
        if not targets:
            named = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
            tails = sorted({path.rpartition(".")[2] for path in linear})
            raise ConfigError(
                f"no module of {type(self.base).__name__} matches target_modules {named!r}; its linear layers are named "
                f"{', '.join(tails[:12]) or '(it has none)'} (for example {linear[0] if linear else '-'!r})"
            )
        return targets

    def _heads(self, config: SdctConfig, targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Trainable copies of the base's own `modules_to_save`."""
        if config.modules_to_save is None:
            return {}
        with self.disable_adapter():
            found = {path: module for path, module in self.base.named_modules() if path and config.saves(path)}
            found = {p: m for p, m in found.items() if not any(p.startswith(f"{outer}.") for outer in found)}
            for name in config.modules_to_save:
                if not any(path == name or path.endswith(f".{name}") for path in found):
                    raise ConfigError(
                        f"modules_to_save names {name!r}, which {type(self.base).__name__} does not have"
                    )
            for path, module in found.items():
                inside = [t for t in targets if t == path or t.startswith(f"{path}.")]
                if inside:
                    raise ConfigError(
                        f"target module {inside[0]!r} lies in {path!r}, which modules_to_save trains in full; "
                        "take it out of one of the two"
                    )
                self._check_head(path, module)
            return {path: copy.deepcopy(module).requires_grad_(False) for path, module in found.items()}

    def _check_head(self, path: str, module: nn.Module) -> None:
        own = dict(module.named_parameters())
        if not own:
            raise ConfigError(f"modules_to_save names {path!r}, a {type(module).__name__} without parameters")
        if any(isinstance(m, SdctLayer) for m in module.modules()):
            raise ConfigError(f"modules_to_save names {path!r}, in which another adapter has target modules")
        kept = {name for name, _ in module.named_buffers()} & set(module.state_dict())
        if kept:
            raise UnsupportedError(
                f"module {path!r} cannot be in modules_to_save: its buffer {min(kept)!r} would not be stored; "
                "save the linear layers inside it instead"
            )
        ids = {id(p): name for name, p in own.items()}
        for other, parameter in self.base.named_parameters(remove_duplicate=False):
            if id(parameter) in ids and not other.startswith(f"{path}."):
                raise UnsupportedError(
                    f"module {path!r} cannot be in modules_to_save: its {ids[id(parameter)]!r} is tied to {other!r}; "
                    "adapt it through target_modules, or untie the weights (config.tie_word_embeddings = False)"
                )

    def _add(
        self,
        name: str,
        config: SdctConfig,
        targets: dict[str, nn.Module],
        entries: dict[str, SdctEntry],
        heads: dict[str, nn.Module],
    ) -> None:
        self._hashes[name] = _hash(self.base, targets)
        self.configs[name] = dataclasses.replace(
            config,
            task_type=config.task_type or _task_type(self.base),
            base_model_name_or_path=config.base_model_name_or_path or _base_name(self.base),
        )
        for path, linear in targets.items():
            layer = linear._modules.get(CHILD)
            if not isinstance(layer, SdctLayer):
                layer = SdctLayer(linear, _shape(linear)[0])
            layer.entries[name] = entries[path].requires_grad_(False)
        self.inactive[name] = nn.ModuleDict({path.replace(".", "/"): head for path, head in heads.items()})

    def _activate(self, name: str | None) -> None:
        """Apply and train `name` alone; None for the bare base. Moves saved modules in and out of the base."""
        if self.active is not None:
            self._swap(self.active, _BASE)
        if name is not None:
            self._swap(_BASE, name)
        self.active = name
        for _, _, layer in self._layers():
            layer.active = name
            for key, entry in layer.entries.items():
                entry.requires_grad_(key == name)

    def _swap(self, leaving: str, entering: str) -> None:
        """Put the saved modules of `entering` where those of `leaving` are; one of the two is the base."""
        adapter = entering if leaving == _BASE else leaving
        incoming, outgoing = self.inactive[entering], self.inactive[leaving]
        assert isinstance(incoming, nn.ModuleDict) and isinstance(outgoing, nn.ModuleDict)
        for path in self._head_paths(adapter):
            key = path.replace(".", "/")
            parent, _, attribute = path.rpartition(".")
            holder = self.base.get_submodule(parent)
            old, new = holder._modules[attribute], incoming.pop(key)
            assert old is not None
            outgoing[key] = old.requires_grad_(False)
            holder._modules[attribute] = new.requires_grad_(entering != _BASE).train(old.training)

    def _head_paths(self, name: str) -> list[str]:
        config = self.configs[name]
        stored = self.inactive[_BASE] if name == self.active else self.inactive[name]
        assert isinstance(stored, nn.ModuleDict)
        return [path for path in (key.replace("/", ".") for key in stored) if config.saves(path)]

    def _heads_of(self, name: str) -> dict[str, nn.Module]:
        if name == self.active:
            return {path: self.base.get_submodule(path) for path in self._head_paths(name)}
        stored = self.inactive[name]
        assert isinstance(stored, nn.ModuleDict)
        return {key.replace("/", "."): head for key, head in stored.items()}

    def _check_new(self, name: str) -> None:
        check_adapter_name(name)
        self._refuse_merged("adding an adapter")
        if name in self.configs:
            raise ConfigError(
                f"an adapter named {name!r} exists already ({', '.join(self.configs)}); choose another name"
            )

    def _check_known(self, name: str) -> None:
        if name not in self.configs:
            raise UnknownAdapterError(
                f"no adapter is named {name!r}; this model has {', '.join(self.configs) or 'none'}"
            )

    def _refuse_merged(self, what: str) -> None:
        if self._merged is not None:
            raise ConfigError(f"adapter {self._merged[0]!r} is merged into the base; call unmerge before {what}")


def _new(base: nn.Module) -> SdctModel:
    model: SdctModel = _class_for(type(base))(base)
    return model


@functools.lru_cache(maxsize=None)
def _class_for(base: type[nn.Module]) -> type[SdctModel]:
    """`SdctModel` whose `forward` shows the signature of `base.forward`: transformers' Trainer reads it from class and object."""

    def forward(self: SdctModel, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    forward.__doc__ = SdctModel.forward.__doc__
    return type(f"Sdct{base.__name__}", (SdctModel,), {"forward": forward, "__module__": __name__})


def _rebuild(base: type[nn.Module]) -> SdctModel:
    cls = _class_for(base)
    return cls.__new__(cls)


def _drop_base(model: SdctModel, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """State-dict hook: keep what adapters own, drop the frozen base."""
    for key in _base_keys(model):
        state.pop(prefix + key, None)


def _allow_missing_base(model: SdctModel, incompatible: Any) -> None:
    """Load hook: a state dict without the base is complete."""
    frozen = tuple(_base_keys(model))
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(frozen)]


def _base_keys(model: SdctModel) -> list[str]:
    heads = [] if model.active is None else [f"base.{path}." for path in model._head_paths(model.active)]
    keys = []
    for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if name.startswith(f"inactive.{_BASE}."):
            keys.append(name)
        elif name.startswith("base.") and f".{CHILD}.entries." not in name and not name.startswith(tuple(heads)):
            keys.append(name)
    return keys


def _check_linear(path: str, module: nn.Module) -> None:
    if linear_shape(module) is None:
        raise UnsupportedError(
            f"target_modules selects {path!r}, a {type(module).__name__}; only Linear and Conv1D layers can be adapted, "
            "so name those"
        )
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or tuple(linear_weight(module).shape) != linear_shape(module):
        raise UnsupportedError(
            f"target_modules selects {path!r}, a {type(module).__name__} whose weight is quantized or packed; "
            "load the base in float32, float16 or bfloat16 to adapt it"
        )
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise UnsupportedError(
            f"target_modules selects {path!r}, the output projection of a torch MultiheadAttention, which reads its weight "
            "without calling it; leave it out of target_modules"
        )


def _shape(linear: nn.Module) -> tuple[int, int]:
    shape = linear_shape(linear)
    assert shape is not None
    return shape


def _fresh_entry(path: str, linear: nn.Module, config: SdctConfig) -> SdctEntry:
    weight = linear_weight(linear)
    if weight.is_meta:
        indices = torch.zeros(config.n_coefficients, 2, dtype=torch.int32, device="meta")
    else:
        # the path salts the seed, so that layers of the same shape do not all draw the same random part
        chosen = select_for_weight(
            weight,
            config.selection,
            config.n_coefficients,
            delta=config.delta,
            bands=config.bands,
            seed=(config.seed, zlib.crc32(path.encode())),
        )
        indices = torch.from_numpy(chosen).to(weight.device)
    values = torch.zeros(config.n_coefficients, dtype=torch.float32, device=weight.device)
    return SdctEntry(values, indices, config.scaling)


def _hash(base: nn.Module, targets: dict[str, nn.Module]) -> tuple[str, str] | None:
    """`(hash, dtype)` of the weights the adapter changes, None on the meta device."""
    weights = [linear_weight(module) for module in targets.values()]
    if not weights or any(weight.is_meta for weight in weights):
        return None
    dtype = str(weights[0].dtype).removeprefix("torch.")
    return model_hash(base, {path: _shape(module) for path, module in targets.items()}, dtype), dtype


def _task_type(base: nn.Module) -> str | None:
    if not hasattr(base, "config"):
        return None
    name = type(base).__name__
    return next((task for suffix, task in _TASKS.items() if name.endswith(suffix)), None)


def _base_name(base: nn.Module) -> str | None:
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None
