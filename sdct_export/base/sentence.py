"""SentenceTransformer folders: a transformer, and what the library sentence-transformers does with its output.

`modules.json` lists the parts. The transformer is loaded like any base. Pooling, dense layers and normalisation are
the library's own modules, put behind the transformer as a forward hook, so that its module paths stay those with
which adapters were trained. No class is imported because a file names it: four are known, any other is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor, nn

from ..contract import SENTENCE_EMBEDDING
from ..errors import BaseMismatchError, ConfigError, UnsupportedError
from ..files import read_input, read_json

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"  # prompts, whatever else encode() reads
TRANSFORMER_FILE = "sentence_bert_config.json"  # longest text, lower case; older folders name the architecture in it
_LIBRARY = "sentence_transformers"
_KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")
_LARGEST_JSON = 16 << 20
_AGAIN = "copy the whole SentenceTransformer folder"
_HIDDEN = "token_embeddings"
# settings of the transformer that are as if they were not there, and those that change no number of its output
_NEUTRAL: Mapping[str, Any] = {
    "transformer_task": "feature-extraction",
    "module_output_name": _HIDDEN,
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
}
_ELSEWHERE = {"max_seq_length", "do_lower_case", "unpad_inputs"}
_SAME_NUMBERS = {"add_pooling_layer", "attn_implementation", "torch_dtype", "dtype", "trust_remote_code"}


class Tail(nn.Module):
    """What follows the transformer in a SentenceTransformer; `described` names the steps, for people."""

    def __init__(self, steps: Iterable[nn.Module], described: Iterable[str], dimensions: int | None = None) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.described = tuple(described)
        self.dimensions = dimensions

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """`[batch, dim]` from `token_embeddings [batch, tokens, hidden]` and the transformer's inputs beside it."""
        for step in self.steps:
            features = step(features)
        return features[SENTENCE_EMBEDDING][:, : self.dimensions]


def body_folder(source: str | Path) -> str | Path:
    """The folder of the transformer in a SentenceTransformer folder (`0_Transformer`), any other `source` as it is."""
    folder = Path(source)
    if not os.path.lexists(folder / MODULES_FILE) or (folder / "config.json").exists():
        return source
    return folder / _listed(folder)[0][1]


def module_folders(folder: Path) -> set[str]:
    """Names of the folders that hold the parts behind the transformer; none in a folder of another kind."""
    if not os.path.lexists(folder / MODULES_FILE):
        return set()
    return {PurePosixPath(path).parts[0] for _, path in _listed(folder)[1:] if PurePosixPath(path).parts}


def load_tail(source: str | Path, body: nn.Module) -> Tail | None:
    """What follows the transformer `body` of the folder `source`; None where it is no SentenceTransformer's.

    Raises:
        BaseMismatchError: the folder is damaged.
        UnsupportedError: it holds a part or a setting that cannot be exported, or sentence-transformers is missing.
    """
    folder = Path(source)
    plain = f"for the transformer alone pass --model-class transformers:{type(body).__name__}"
    if not folder.is_dir():
        _refuse_hub(source, plain)
        return None
    file = folder / MODULES_FILE
    if not os.path.lexists(file):
        return None
    listed = _listed(folder)
    kinds = []
    for name, _ in listed:
        kind = name.rpartition(".")[2]
        if name.partition(".")[0] != _LIBRARY or kind not in _KNOWN:
            raise UnsupportedError(
                f"{file} names {name!r}; only {', '.join(_KNOWN)} of {_LIBRARY} can be exported; {plain}"
            )
        kinds.append(kind)
    if kinds[0] != "Transformer" or kinds.count("Transformer") != 1 or "Pooling" not in kinds:
        raise UnsupportedError(
            f"{file} must list one Transformer, first, and a Pooling, got {', '.join(kinds)}; {plain}"
        )
    _check_transformer(folder / listed[0][1], plain)
    settings = _read(folder / SETTINGS_FILE)
    model_type, dimensions = settings.get("model_type", "SentenceTransformer"), settings.get("truncate_dim")
    if model_type != "SentenceTransformer":
        raise UnsupportedError(f"{folder / SETTINGS_FILE}: a {model_type} cannot be exported; {plain}")
    if dimensions is not None and (isinstance(dimensions, bool) or not isinstance(dimensions, int) or dimensions < 1):
        raise BaseMismatchError(f"{folder / SETTINGS_FILE}: truncate_dim is {dimensions!r}; {_AGAIN}")
    steps = [_load(kind, folder, path, plain) for kind, (_, path) in zip(kinds[1:], listed[1:], strict=True)]
    described = [_describe(kind, step) for kind, step in zip(kinds[1:], steps, strict=True)]
    if dimensions is not None:
        described.append(f"first {dimensions} dimensions")
    return Tail(steps, described, dimensions).eval()


def add_tail(body: nn.Module, tail: Tail) -> None:
    """From now on `body` returns `sentence_embedding [batch, dim]` in place of its own outputs."""

    def hook(model: nn.Module, _: object, inputs: dict[str, Tensor], output: Any) -> dict[str, Tensor]:
        features = {**inputs, _HIDDEN: output["last_hidden_state"]}
        return {SENTENCE_EMBEDDING: model.get_submodule("sentence")(features)}

    body.add_module("sentence", tail)
    body.register_forward_hook(hook, with_kwargs=True)


def refuse_whole(model: nn.Module) -> None:
    """Raise `ConfigError` for a live SentenceTransformer, whose module paths depend on the library's version."""
    if any(cls.__module__.partition(".")[0] == _LIBRARY for cls in type(model).__mro__):
        raise ConfigError(
            f"a {type(model).__name__} of {_LIBRARY} cannot be used as a whole; train on the transformer inside it, "
            "get_sdct_model(st[0].auto_model, config), which changes what st.encode gives, and export from the "
            "SentenceTransformer's folder"
        )


def settings_files(source: str | Path) -> dict[str, Path]:
    """Name in a bundle -> file of the folder `source`, of what is to be known of texts before they are tokens."""
    folder = Path(source)
    found = {TRANSFORMER_FILE: _transformer_file(Path(body_folder(source))), SETTINGS_FILE: folder / SETTINGS_FILE}
    return {name: file for name, file in found.items() if file.exists()}


def _listed(folder: Path) -> list[tuple[str, str]]:
    """Class name and folder of every part that `modules.json` lists, in order."""
    file = folder / MODULES_FILE
    try:
        raw = json.loads(read_input(file, _LARGEST_JSON, BaseMismatchError, _AGAIN).decode())
        parts = [(item["type"], item["path"]) for item in raw]
        good = parts and all(isinstance(text, str) for part in parts for text in part)
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise BaseMismatchError(f"{file} is damaged ({problem}); {_AGAIN}") from problem
    inside = good and not any(PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts for _, p in parts)
    if not inside:
        raise BaseMismatchError(f"{file} must list parts, each with its class and a folder inside; {_AGAIN}")
    return parts


def _refuse_hub(source: str | Path, plain: str) -> None:
    from transformers.utils import cached_file

    found = cached_file(
        str(source), MODULES_FILE, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    if found is not None:
        raise UnsupportedError(
            f"{source} is a SentenceTransformer; download it, huggingface_hub.snapshot_download({str(source)!r}), and "
            f"give the folder; {plain}"
        )


def _check_transformer(folder: Path, plain: str) -> None:
    """Refuse settings with which the library computes something else than the transformer's last hidden state."""
    file = _transformer_file(folder)
    for name, value in _read(file).items():
        if name in ("model_args", "model_kwargs") and isinstance(value, dict):
            odd = sorted(set(value) - _SAME_NUMBERS)
        else:
            neutral = name in _ELSEWHERE or not value or value == _NEUTRAL.get(name)
            odd = [] if neutral else [str(value)]
        if odd:
            raise UnsupportedError(f"{file}: {name} ({', '.join(odd)}) cannot be exported; {plain}")


def _transformer_file(folder: Path) -> Path:
    others = [f for f in sorted(folder.glob("sentence_*_config.json")) if not (folder / TRANSFORMER_FILE).exists()]
    return others[0] if others else folder / TRANSFORMER_FILE


def _load(kind: str, folder: Path, path: str, plain: str) -> nn.Module:
    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError as error:
        raise UnsupportedError(
            f"{folder} is a SentenceTransformer, which takes the library: pip install 'sdct_export[sentence]'; {plain}"
        ) from error
    file = folder / path / "config.json"
    config = _read(file)
    activation = config.get("activation_function", "torch.nn.modules.")
    if kind == "Dense" and not str(activation).startswith("torch.nn.modules."):
        raise UnsupportedError(f"{file}: activation_function {activation!r} is none of torch.nn; {plain}")
    if kind == "Pooling" and config.get("include_prompt", True) is not True:
        raise UnsupportedError(f"{file}: the pooling leaves out prompts, whose length no graph knows; {plain}")
    try:
        step: nn.Module = getattr(modules, kind).load(str(folder), subfolder=path, local_files_only=True)
    except Exception as error:  # a damaged folder makes the library raise errors of many kinds
        raise BaseMismatchError(f"cannot load the {kind} in {folder / path} ({error}); {_AGAIN}") from error
    return step


def _describe(kind: str, step: Any) -> str:
    if kind == "Pooling":
        modes = step.pooling_mode
        return f"Pooling ({modes if isinstance(modes, str) else ', '.join(modes)})"
    return f"Dense ({step.in_features} to {step.out_features})" if kind == "Dense" else kind


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, _LARGEST_JSON, BaseMismatchError, _AGAIN) if os.path.lexists(file) else {}
