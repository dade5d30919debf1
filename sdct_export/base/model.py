"""Base models: load one for a task, find its linear layers, and check that an adapter fits it."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter.adapter import SdctAdapter
from ..adapter.entries import DTYPE_NAMES, Array, check_fit
from ..errors import BaseMismatchError, ConfigError, SdctError, UnsupportedError, an
from .identity import base_hash, module_digest

CHILD = "sdct"  # name under which a linear layer holds the adapters that `tuning` puts on it
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # `name` or `owner/name`
_HUB_SECONDS = 10.0
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "IMAGE_CLS": "AutoModelForImageClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}
_TASK_OF_CLASS = {  # how the name of a class ends
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForImageClassification": "IMAGE_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "Model": "FEATURE_EXTRACTION",
}


def load_base(
    path: str | Path,
    task_type: str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    num_labels: int | None = None,
    model_class: str | None = None,
    saved: Collection[str] = (),
) -> nn.Module:
    """Load a Hugging Face model in eval mode on the CPU.

    Args:
        path: checkpoint folder (or hub name).
        task_type: chooses the model class, see `SdctConfig.task_type`; None takes the class the checkpoint names.
        dtype: a torch dtype, or `auto` for the checkpoint's own.
        num_labels: size of the classification head. A trained head of another size is given up for it, where `saved`
            holds all of its parameters.
        model_class: `MODULE:CLASS`, for example `transformers:BertForSequenceClassification`, instead of a task.
        saved: parameters that adapters bring along, such as a task head. Only these may be missing from the
            checkpoint or have another size there, and start at zero: the base has no such head. A pooler that it lacks
            is left out of a body.

    Raises:
        BaseMismatchError: the folder is no model checkpoint, lacks other parameters than `saved`, or its head has
            another size than asked for.
        ConfigError: there is no such class.
        UnsupportedError: the model is defined by code in its own folder, which is never run.
    """
    place = _place(str(path))
    import transformers

    logging = transformers.utils.logging
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing and mismatched tensors are dealt with below, not in a table of its own
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **place)
        loader = named_class(model_class) if model_class else class_for(config, task_type)
        if num_labels is not None and num_labels != config.num_labels:
            config.num_labels = num_labels
        options: dict[str, Any] = {
            "dtype": dtype,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
            "trust_remote_code": False,
        } | place
        model, info = loader.from_pretrained(path, config=config, **options)
        lacking = set(info["missing_keys"]) - set(saved)
        if lacking and all(key.startswith("pooler.") for key in lacking):  # no checkpoint has it, so nothing reads it
            model, info = loader.from_pretrained(path, config=config, add_pooling_layer=False, **options)
    except SdctError:
        raise
    except Exception as error:  # a damaged folder makes transformers raise errors of many kinds
        raise loading_error(f"cannot load a base model from {path}", error) from error
    finally:
        logging.set_verbosity(verbosity)
    resized = {key for key, *_ in info["mismatched_keys"]}
    if not resized <= set(saved):
        raise BaseMismatchError(
            f"the checkpoint {path} has a trained tensor of another size than needed: {min(resized - set(saved))!r}; "
            f"adapters with heads of {num_labels} labels need a base without a trained head of another size"
        )
    lost = sorted(set(info["missing_keys"]) - set(saved))
    if lost:
        raise BaseMismatchError(
            f"the checkpoint {path} lacks {len(lost)} parameters of {type(model).__name__} (e.g. {lost[0]!r}), and no "
            "adapter saves them, so their values would be made up; copy the whole checkpoint, or train with these "
            "modules in modules_to_save"
        )
    if resized:
        warnings.warn(
            f"the checkpoint {path} has a trained head of another size, which gives way to that of the adapters: rows "
            "without an adapter have no head",
            stacklevel=2,
        )
    with torch.no_grad():
        for key in resized | set(info["missing_keys"]):
            model.get_parameter(key).zero_()
    return model.eval()  # type: ignore[no-any-return]


def checkpoint_vocabulary(source: str) -> int | None:
    """Tokens in the vocabulary of a checkpoint folder or of a hub name in the cache, None where that is not known."""
    import transformers

    try:
        return vocabulary(
            transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        )
    except (OSError, ValueError, TypeError):  # moved since, or no checkpoint of transformers
        return None


def vocabulary(config: Any) -> int | None:
    """Tokens in the vocabulary of a model with this configuration, None for a model without one."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def _place(path: str) -> dict[str, Any]:
    """How `from_pretrained` finds `path`. What is neither a folder nor on the hub is refused before it tries.

    It would for half a minute. Where the hub does not answer, a model that was loaded before comes from the cache.
    """
    if os.path.isdir(path):  # noqa: PTH112, since Path.is_dir raises for a name that is too long
        return {}
    if os.path.lexists(path) or not _HUB_NAME.fullmatch(path):
        raise BaseMismatchError(f"cannot load a base model from {path}: there is no such folder; check the path")
    import huggingface_hub

    missing = f"cannot load a base model from {path}: there is no such folder, and "
    try:
        huggingface_hub.HfApi().model_info(path, timeout=_HUB_SECONDS)
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError) as error:
        raise BaseMismatchError(f"{missing}the hub has no model of this name; check the path") from error
    except Exception as error:  # of the HTTP library, or the hub's own
        try:
            cached = huggingface_hub.try_to_load_from_cache(path, "config.json")
        except ValueError:
            cached = None
        if isinstance(cached, str):
            return {"local_files_only": True}
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseMismatchError(f"{missing}the hub cannot be reached ({reason}); check the path") from error
    return {}


def named_class(name: str) -> Any:
    """The class `MODULE:CLASS`, imported. Raises `ConfigError` where there is none that loads checkpoints."""
    module, colon, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model class {name!r} cannot be imported ({error}); give MODULE:CLASS of a module on the Python path"
        ) from error
    if not colon or not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ConfigError(f"model class {name!r} has no from_pretrained; give the class of a transformers model")
    return found


def class_for(config: Any, task_type: str | None) -> Any:
    """The transformers class for a task (an `Auto` class), or without a task the one that `config` names."""
    import transformers

    if task_type is not None:
        return getattr(transformers, _AUTO_CLASSES[task_type])
    names = getattr(config, "architectures", None)
    found = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModel


def task_of_class(name: str) -> str | None:
    """The task of a class with this name, None where the name does not say."""
    return next((task for end, task in _TASK_OF_CLASS.items() if name.endswith(end)), None)


def task_type(model: nn.Module) -> str | None:
    """The task of a transformers model, from the name of its class or one it is derived from; None for any other."""
    if not hasattr(model, "config"):
        return None
    names = [cls.__name__ for cls in type(model).__mro__ if cls.__name__ != "PreTrainedModel"]
    return next(filter(None, map(task_of_class, names)), None)


def loading_error(what: str, error: Exception) -> SdctError:
    """What to raise where transformers raised `error`: `UnsupportedError` where it lacks code that the base brings.

    Every call passes `trust_remote_code=False`: without it transformers asks on standard input whether to run the code
    that `auto_map` in a base's `config.json` names, and a "y" in a pipe would run it.
    """
    if "trust_remote_code" in str(error):
        return UnsupportedError(
            f"{what}: it needs custom code (auto_map in its config.json), which is never run; use a base model that "
            "transformers itself has a class for"
        )
    return BaseMismatchError(f"{what}: {str(error) or type(error).__name__}")


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(d_out, d_in)` of a `Linear` or a GPT-2 `Conv1D`, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if is_conv1d(module):
        d_in, d_out = module.get_parameter("weight").shape
        return int(d_out), int(d_in)
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, a linear layer that stores its weight as `[d_in, d_out]`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear module as a `[d_out, d_in]` view (writes reach the module)."""
    weight = module.get_parameter("weight")
    return weight.T if is_conv1d(module) else weight


def find_linear(model: nn.Module, path: str) -> nn.Module:
    """The linear module at `path`.

    Raises:
        BaseMismatchError: the model has no such module.
        UnsupportedError: the module is not linear.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise BaseMismatchError(
            f"the base model {type(model).__name__} has no module {path!r}; use the base model (and the task class) "
            "the adapter was trained on"
        ) from None
    if linear_shape(module) is None:
        raise UnsupportedError(
            f"module {path!r} is {an(type(module).__name__)}; only Linear and Conv1D layers can be adapted"
        )
    return module


def to_numpy(tensor: Tensor) -> Array:
    """A tensor as a numpy array of the same dtype, bfloat16 through ml_dtypes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPE_NAMES["bfloat16"])
    return tensor.numpy()


def to_torch(array: Array) -> Tensor:
    """A numpy array as a tensor of the same dtype that owns its memory, bfloat16 from ml_dtypes."""
    if array.dtype == DTYPE_NAMES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def model_hash(model: nn.Module, modules: Mapping[str, tuple[int, int]], dtype: str) -> str:
    """`base_hash` of a torch model over `modules` (path -> shape), weights cast to `dtype`."""
    return base_hash(lambda name: to_numpy(linear_weight(find_linear(model, name))), modules, dtype)


def model_digests(model: nn.Module, modules: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, str]]:
    """Dtype name -> module path -> `module_digest`, what a bundle records of its base (`Bundle.module_digests`).

    Take them from the base as loaded, before any cast for export: then an adapter's hash compares whatever dtype it
    was trained in.
    """
    weights = {name: to_numpy(linear_weight(find_linear(model, name))) for name in modules}
    return {
        dtype: {name: module_digest(name, weights[name], shape, dtype) for name, shape in modules.items()}
        for dtype in DTYPE_NAMES
    }


def check_base(adapter: SdctAdapter, model: nn.Module, *, label: str = "the adapter") -> None:
    """Raise `BaseMismatchError` unless `model` has all modules of `adapter`, in their shapes and weights."""
    shapes: dict[str, tuple[int, int]] = {}
    for path, entries in adapter.modules.items():
        shape = linear_shape(find_linear(model, path))
        assert shape is not None
        try:
            check_fit(path, entries, shape)
        except BaseMismatchError as error:
            raise BaseMismatchError(f"{label}: {error}") from None
        shapes[path] = shape
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name in adapter.saved:
        if name not in parameters:
            raise BaseMismatchError(
                f"{label} stores {name!r}, which the base model {type(model).__name__} lacks; load the base with the "
                "task it was trained for (task_type)"
            )
    if not any(
        p.is_meta for p in model.parameters()
    ):  # a model on the meta device has shapes but no weights to compare
        check_hash(adapter, lambda name: to_numpy(linear_weight(find_linear(model, name))), shapes, label=label)


def check_hash(
    adapter: SdctAdapter,
    weight: Callable[[str], Array],
    shapes: Mapping[str, tuple[int, int]],
    *,
    label: str = "the adapter",
) -> None:
    """Raise `BaseMismatchError` where the adapter records a base hash and `weight` (see `base_hash`) has another."""
    if adapter.base_hash is None or not shapes:
        return
    found = base_hash(weight, shapes, adapter.base_dtype or "float32")
    if found != adapter.base_hash:
        raise BaseMismatchError(
            f"{label} was trained on other base weights (hash {adapter.base_hash[:19]}..., this base "
            f"{found[:19]}...); use the base it was trained on "
            f"({adapter.config.base_model_name_or_path or 'unknown'})"
        )
