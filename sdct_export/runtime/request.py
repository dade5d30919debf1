"""One request to a bundle from the outside: text or array files in, labels or array files out. Never imports torch."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ..adapter.entries import Array
from ..adapter.folder import read_training
from ..bundle.description import Bundle
from ..contract import SENTENCE_EMBEDDING
from ..errors import AdapterFormatError, ConfigError
from ..files import new_file, open_input, read_input, read_json

_CLASSIFIERS = ("SEQ_CLS", "IMAGE_CLS")
_LARGEST_HEADER = 20_000  # of a .npy file; numpy's own limit is 10,000
_MOST_DIMENSIONS = 32
_LARGEST_JSON = 16 << 20
TOKENIZER = "tokenizer.json"
_LARGEST_TOKENIZER = 256 << 20
_LARGEST_LENGTH = 1 << 20  # tokenizers without a limit record an astronomical one


@dataclasses.dataclass(frozen=True)
class Label:
    """The most probable label of a row: its number, its probability, and its name where the bundle knows one."""

    index: int
    probability: float
    name: str | None


def encode_text(bundle: Bundle, texts: Sequence[str], pairs: Sequence[str] | None = None) -> dict[str, Array]:
    """`texts` as the bundle's inputs, int64 `[len(texts), tokens]`, by its own `tokenizer.json`, padded.

    Texts that are too long for the model are cut, with a warning that says so.

    For a bundle with a SentenceTransformer's pooling as its `encode` does it: the default prompt in front, lower case
    and the longest text as its settings say.

    Args:
        bundle: what will run.
        texts: one for each row.
        pairs: the second text of each row, for models that read two.

    Raises:
        ConfigError: the bundle has no tokenizer, takes other inputs than text, a text is no UTF-8 or has no token, or
            there are not as many pairs as texts.
        AdapterFormatError: `tokenizer.json` is damaged.
    """
    from tokenizers import Tokenizer

    if pairs is not None and len(pairs) != len(texts):
        raise ConfigError(f"there are {len(texts)} texts but {len(pairs)} second texts; give one for each")
    file = bundle.path / TOKENIZER
    told = "pass arrays instead, e.g. --input input_ids=ids.npy"
    data = _read_tokenizer(bundle, [*texts, *(pairs or ())], told)
    settings = _read_json(bundle.path / "tokenizer_config.json")
    limit = settings.get("model_max_length")
    if not isinstance(limit, int) or not 0 < limit < _LARGEST_LENGTH:
        limit = _read_json(bundle.path / "config.json").get("max_position_embeddings")
    if bundle.max_tokens is not None:
        limit = min(limit, bundle.max_tokens) if isinstance(limit, int) and limit > 0 else bundle.max_tokens
    token = settings.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    with tokenizing(file):
        tokenizer = Tokenizer.from_buffer(data)
        if bundle.pooling:
            texts = _prepare_sentences(bundle, tokenizer, texts, settings)
        elif isinstance(limit, int) and limit > 0:  # the model's, whatever length the file was saved with
            side = "left" if settings.get("truncation_side") == "left" else "right"
            tokenizer.enable_truncation(limit, direction=side)
        tokenizer.enable_padding(
            direction="left" if settings.get("padding_side") == "left" else "right",
            pad_id=(tokenizer.token_to_id(token) if isinstance(token, str) else None) or 0,
            pad_token=token if isinstance(token, str) else "",
        )
        encoded = tokenizer.encode_batch(list(texts) if pairs is None else list(zip(texts, pairs, strict=True)))
    cut = [i for i, e in enumerate(encoded) if e.overflowing]
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(texts)} texts, the first of them row {cut[0]}, have more tokens than the model "
            f"reads: they are cut to {len(encoded[cut[0]].ids)}",
            stacklevel=2,
        )
    known = {
        "input_ids": [e.ids for e in encoded],
        "attention_mask": [e.attention_mask for e in encoded],
        "token_type_ids": [e.type_ids for e in encoded],
    }
    empty = next((t for t, e in zip(texts, encoded, strict=True) if not any(e.attention_mask)), None)
    if empty is not None:
        raise ConfigError(f"the text {empty!r} has no token; give a longer one")
    names = [spec.name for spec in bundle.inputs]
    other = [name for name in names if name not in known]
    if other or "input_ids" not in names:
        raise ConfigError(
            f"this bundle takes {', '.join(names)}, not text alone; pass arrays with --input NAME=FILE.npy"
        )
    if "attention_mask" not in names and not all(all(e.attention_mask) for e in encoded):
        raise ConfigError("this bundle takes no attention_mask, so all texts need the same number of tokens")
    return {name: np.asarray(known[name], dtype=np.int64) for name in names}


def tokenizer_of(bundle: Bundle, texts: Sequence[str]) -> Any:
    """The bundle's tokenizer for prompts: nothing is cut or padded.

    Raises:
        ConfigError: the bundle has none, or one of `texts` is no UTF-8.
        AdapterFormatError: `tokenizer.json` is damaged.
    """
    from tokenizers import Tokenizer

    data = _read_tokenizer(bundle, texts, "pass token ids instead")
    with tokenizing(bundle.path / TOKENIZER):
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def _read_tokenizer(bundle: Bundle, texts: Sequence[str], instead: str) -> bytes:
    file = bundle.path / TOKENIZER
    if not os.path.lexists(file):
        raise ConfigError(f"{bundle.path} has no {TOKENIZER}; {instead}")
    data = read_input(file, _LARGEST_TOKENIZER, AdapterFormatError, "export the bundle again")
    for text in texts:
        if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
            raise ConfigError(f"the text {text!r} holds bytes that are no UTF-8; give it in UTF-8")
    return data


def _prepare_sentences(bundle: Bundle, tokenizer: Any, texts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """The texts with the default prompt; `tokenizer` cuts and lower-cases as the SentenceTransformer's does.

    That has a length of its own, or else the smaller one of tokenizer and model, whatever `tokenizer.json` says.
    """
    from tokenizers import normalizers

    own = _read_json(bundle.path / "sentence_bert_config.json")
    limit: Any = own.get("max_seq_length")
    if not _is_length(limit):
        model = _read_json(bundle.path / "config.json")
        known: list[Any] = [settings.get("model_max_length"), model.get("max_position_embeddings")]
        limit = min((length for length in known if _is_length(length)), default=None)
    tokenizer.no_truncation()
    if limit is not None:
        side = "left" if settings.get("truncation_side") == "left" else "right"
        tokenizer.enable_truncation(limit, direction=side)
    if own.get("do_lower_case") is True:
        before = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    more = _read_json(bundle.path / "config_sentence_transformers.json")
    name, prompts = more.get("default_prompt_name"), more.get("prompts")
    prompt = prompts.get(name) if isinstance(name, str) and isinstance(prompts, dict) else None
    return [f"{prompt}{text}" for text in texts] if isinstance(prompt, str) else list(texts)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST_LENGTH


def cosines(outputs: Mapping[str, Array]) -> tuple[Array, Array] | None:
    """Norm of each row's sentence embedding `[batch]` and the cosines between them `[batch, batch]`, in float64.

    None where the bundle gives no sentence embeddings.
    """
    embeddings = outputs.get(SENTENCE_EMBEDDING)
    if embeddings is None or embeddings.ndim != 2:
        return None
    wide = embeddings.astype(np.float64)
    norms: Array = np.linalg.norm(wide, axis=1)
    unit = wide / np.maximum(norms, np.finfo(np.float64).tiny)[:, None]
    return norms, unit @ unit.T


@contextlib.contextmanager
def tokenizing(file: Path) -> Iterator[None]:
    """Whatever tokenizers raises on a damaged `file` becomes an `AdapterFormatError`."""
    try:
        yield
    except BaseException as error:
        # nothing more specific than Exception, and where its code panics something that is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise AdapterFormatError(f"{file} cannot be read ({error}); export the bundle again") from error


def top_labels(
    bundle: Bundle, outputs: Mapping[str, Array], rows: Sequence[Sequence[str]] | None = None
) -> list[Label | None] | None:
    """The most probable label of each row of a classifier, None where the bundle is none.

    A row without any head, whose logits are all 0, has no label: the base of such a bundle has no trained head of its
    own, and no adapter of the row brings one.

    Args:
        bundle: what was run.
        outputs: what it returned.
        rows: the adapters of each row. A row whose adapter brings its own head has the names it was trained with,
            where the bundle holds that adapter; other rows those of `id2label` in the bundle's `config.json`.
    """
    logits = outputs.get("logits")
    if bundle.task not in _CLASSIFIERS or logits is None or logits.ndim != 2:
        return None
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    merged = _trained_names(bundle, bundle.path) if bundle.kind == "merged" else {}
    names = merged or _label_names(bundle, logits.shape[1])
    found: list[Label | None] = []
    for i, row in enumerate(probabilities):
        if bundle.heads and not logits[i].any():
            found.append(None)
            continue
        index = int(row.argmax())
        heads = [name for name in (rows[i] if rows is not None else ()) if _has_head(bundle, name)]
        own = [_trained_names(bundle, bundle.adapter_path(name), name) for name in heads]
        known = names if not heads else own[0] if all(other == own[0] for other in own) else {}
        found.append(Label(index, float(row[index]), known.get(index)))
    return found


def read_arrays(files: Mapping[str, str | Path]) -> dict[str, Array]:
    """Arrays from `.npy` files by input name. Raises `ConfigError` where a file holds no array."""
    return {name: _read_array(name, Path(file)) for name, file in files.items()}


def _read_array(name: str, path: Path) -> Array:
    with open_input(path, ConfigError, f"input {name!r} needs a .npy file") as (file, size):
        if file.read(2) == b"PK":
            raise ConfigError(f"input {name!r}: {path} is an archive; give one .npy file per input")
        file.seek(0)
        head = io.BytesIO(file.read(_LARGEST_HEADER))
        try:
            shape, fortran, dtype = _read_header(head)
            wanted, there = dtype.itemsize * math.prod(shape), size - head.tell()
            if dtype.hasobject or not dtype.itemsize:
                raise ValueError(f"{dtype} is no type of numbers")
            if len(shape) > _MOST_DIMENSIONS or min(shape, default=0) < 0 or math.prod(filter(None, shape)) >= 2**62:
                raise ValueError("its shape is impossible")
            if wanted != there:
                raise ValueError(f"its header promises {wanted} bytes, {there} follow")
        except Exception as error:  # a hostile header makes numpy raise errors of many kinds
            reason = str(error) or type(error).__name__
            raise ConfigError(f"input {name!r}: cannot read an array from {path}: {reason}") from error
        file.seek(head.tell())
        flat: Array = np.frombuffer(file.read(wanted), dtype)
        return flat.reshape(shape, order="F" if fortran else "C")


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype. Raises whatever numpy raises."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version} is not one of numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def write_arrays(path: str | Path, arrays: Mapping[str, Array]) -> None:
    """Write `arrays` to a new `.npz` file. Raises `OutputError` where it exists or cannot be written."""
    with new_file(path, overwrite=False) as work, work.open("wb") as file:
        np.savez(file, **cast("dict[str, Any]", arrays))


def _has_head(bundle: Bundle, adapter: str) -> bool:
    record = bundle.adapters.get(adapter)
    return record is None or record.labels is not None


def _trained_names(bundle: Bundle, folder: Path, adapter: str | None = None) -> dict[int, str]:
    """Names of the labels in the order in which an adapter of the bundle was trained, empty where it records none."""
    record = read_training(folder) if adapter is None or adapter in bundle.adapters else None
    return dict(enumerate((record.id2label if record is not None else None) or ()))


def _label_names(bundle: Bundle, count: int) -> dict[int, str]:
    names = _read_json(bundle.path / "config.json").get("id2label")
    if not isinstance(names, dict) or len(names) != count:
        return {}
    return {i: n for i in range(count) if isinstance(n := names.get(str(i)), str) and n != f"LABEL_{i}"}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file, _LARGEST_JSON, AdapterFormatError, "export the bundle again")
    except AdapterFormatError:  # these files only refine; without them defaults hold
        return {}
