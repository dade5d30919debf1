"""Prompts and generated tokens as texts, and what the base's `generation_config.json` says. Never imports torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..adapter.entries import Array
from ..bundle.description import Bundle
from ..errors import AdapterFormatError, ConfigError
from ..files import read_json
from .chat import ChatTemplate, Message, is_chat
from .generation import Generation, Sampling
from .request import TOKENIZER, tokenizer_of, tokenizing

Prompt = str | Sequence[int] | Sequence[Message]  # a text, token ids, or a chat

_LARGEST_JSON = 16 << 20
_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How the base wants to be sampled (name -> number), and the tokens that end a row."""

    numbers: Mapping[str, Any]
    stops: frozenset[int]

    def sampling(self, given: Mapping[str, Any]) -> Sampling:
        """The base's way where `given` is None; a top-k, top-p or min-p samples where it would not have.

        Raises `ConfigError` where a number is out of its range.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        if chosen.keys() & {"top_k", "top_p", "min_p"}:  # which say nothing where the most probable token is taken
            chosen = {"temperature": 1.0, **self.numbers} | chosen
        return Sampling(**{**self.numbers, **chosen})


def read_defaults(bundle: Bundle) -> Defaults:
    """What the bundle's `generation_config.json` says, and of the end of a row what its `config.json` says.

    Raises:
        AdapterFormatError: one of the files is damaged.
    """
    settings = _read(bundle, "generation_config.json")
    numbers = {name: settings[name] for name in _NAMES if settings.get(name) is not None}
    if settings.get("do_sample") is not True:
        numbers = {name: value for name, value in numbers.items() if name == "repetition_penalty"}
    else:
        numbers = {"temperature": 1.0, "top_k": 50} | numbers  # transformers' own where it samples
    ends = settings.get("eos_token_id", _read(bundle, "config.json").get("eos_token_id"))
    stops = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in stops):
        raise AdapterFormatError(
            f"{bundle.path}: eos_token_id must be token ids, got {ends!r}; export the bundle again"
        )
    try:
        Sampling(**numbers)
    except ConfigError as error:
        raise AdapterFormatError(
            f"{bundle.path / 'generation_config.json'}: {error}; export the bundle again"
        ) from error
    return Defaults(numbers, frozenset(stops))


def encode_prompts(bundle: Bundle, prompts: Sequence[Prompt]) -> list[Array]:
    """Token ids of each prompt, int64 `[tokens]`: of a text with the tokenizer's special tokens, of a chat without.

    Raises:
        ConfigError: there is no prompt, or one is none; the bundle has no tokenizer or chat template.
        AdapterFormatError: a file of the bundle is damaged.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ConfigError("prompts must be a list with a text, token ids or a chat for each row, at least one")
    chats = {row for row, prompt in enumerate(prompts) if is_chat(prompt)}
    template = ChatTemplate(bundle) if chats else None
    read: list[Any] = list(prompts)
    for row in chats:
        assert template is not None
        read[row] = template.render(read[row])
    texts = [prompt for prompt in read if isinstance(prompt, str)]
    tokenizer = tokenizer_of(bundle, texts) if texts else None
    encoded = []
    for row, prompt in enumerate(read):
        ids = prompt
        if tokenizer is not None and isinstance(prompt, str):
            with tokenizing(bundle.path / TOKENIZER):
                ids = tokenizer.encode(prompt, add_special_tokens=row not in chats).ids
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise ConfigError(f"prompt {row} has no token; give a text that has one, or a list of token ids")
        if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
            raise ConfigError(f"prompt {row} holds {array.min()}; token ids must not be negative")
        encoded.append(array.astype(np.int64))
    return encoded


def decode(bundle: Bundle, found: Sequence[Generation], stops: Sequence[frozenset[int]]) -> list[Generation]:
    """The same with their texts, where the bundle has a tokenizer; each has stop tokens of its own."""
    if not os.path.lexists(bundle.path / TOKENIZER):
        return list(found)
    tokenizer = tokenizer_of(bundle, ())
    results = []
    for one, ends in zip(found, stops, strict=True):
        shown = one.tokens[:-1] if one.finish == "stop" and one.tokens[-1] in ends else one.tokens
        with tokenizing(bundle.path / TOKENIZER):
            results.append(dataclasses.replace(one, text=tokenizer.decode(list(shown))))
    return results


def _read(bundle: Bundle, name: str) -> dict[str, Any]:
    if not os.path.lexists(bundle.path / name):
        return {}
    return read_json(bundle.path / name, _LARGEST_JSON, AdapterFormatError, "export the bundle again")
