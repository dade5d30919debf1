"""Prompts as tokens, and what the base's `generation_config.json` says. Never imports torch."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapter.entries import Array
from ..bundle.description import Bundle
from ..errors import AdapterFormatError, ConfigError
from ..files import read_json
from .chat import ChatTemplate, Message, is_chat
from .generation import Sampling, check_count, check_ids
from .request import TOKENIZER, tokenizer_of, tokenizing
from .text import check_stop_strings

Prompt = str | Sequence[int] | Sequence[Message]  # a text, token ids, or a chat

_LARGEST_JSON = 16 << 20
_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_MOST_NEW = 64  # tokens, where neither the caller nor the base says
# What transformers would do and nobody here does: name -> the values that change nothing. Beams and penalties always,
_OTHERS: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "guidance_scale": (1,), "dola_layers": (),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],), "force_words_ids": ([],), "constraints": ([],), "sequence_bias": ([], {}),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "min_length": (0,), "min_new_tokens": (0,), "max_time": (),
    "watermarking_config": (), "token_healing": (False,), "num_return_sequences": (1,),
}  # fmt: skip
# and these where tokens are drawn.
_OTHER_DRAWS = {"typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": (1,)}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How the base wants to be sampled (name -> number), and what ends a row: tokens, strings, its length."""

    numbers: Mapping[str, Any]
    stops: frozenset[int]
    strings: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None  # of prompt and answer together
    trained: int | None = None  # most tokens that the base was made for, where nothing keeps it from going on

    def sampling(self, given: Mapping[str, Any]) -> Sampling:
        """The base's way where `given` is None; a top-k, top-p or min-p samples where it would not have.

        Raises `ConfigError` where a number is out of its range.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        if chosen.keys() & {"top_k", "top_p", "min_p"}:  # which say nothing where the most probable token is taken
            chosen = {"temperature": 1.0, **self.numbers} | chosen
        return Sampling(**{**self.numbers, **chosen})

    def most_new(self, prompt: int, room: int | None) -> int:
        """Tokens that an answer to `prompt` tokens gets where the caller does not say.

        Args:
            prompt: its length.
            room: what the model has for both together, None where it has no limit.

        Raises:
            ConfigError: the prompt alone is as long as the base wants both to be.
        """
        wanted = self.max_new_tokens or _MOST_NEW
        if self.max_new_tokens is None and self.max_length is not None:
            wanted = self.max_length - prompt
            if wanted < 1:
                raise ConfigError(
                    f"a prompt has {prompt} tokens, and generation_config.json says that it and its answer have "
                    f"{self.max_length} together; give max_new_tokens (--max-new-tokens)"
                )
        return wanted if room is None else max(min(wanted, room - prompt), 1)


def read_defaults(bundle: Bundle) -> Defaults:
    """What the bundle's `generation_config.json` says, and of the end of a row what its `config.json` says.

    Warns of what it asks for beyond that, which transformers would do, by name.

    Raises:
        AdapterFormatError: one of the files is damaged.
    """
    file = bundle.path / "generation_config.json"
    settings = _read(bundle, file.name)
    numbers = {name: settings[name] for name in _NAMES if settings.get(name) is not None}
    draws = settings.get("do_sample") is True
    if not draws:
        numbers = {name: value for name, value in numbers.items() if name == "repetition_penalty"}
    else:
        numbers = {"temperature": 1.0, "top_k": 50} | numbers  # transformers' own where it samples
    _warn_of_others(file, settings, draws)
    config = _read(bundle, "config.json")
    trained = config.get("max_position_embeddings")
    ends = settings.get("eos_token_id", config.get("eos_token_id"))
    stops = ends if isinstance(ends, list) else [] if ends is None else [ends]
    try:
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in stops):
            raise ConfigError(f"eos_token_id must be token ids, got {ends!r}")
        (strings,) = check_stop_strings(settings.get("stop_strings"), 1)
        lengths = {name: settings.get(name) for name in ("max_new_tokens", "max_length")}
        for name, value in lengths.items():
            if value is not None:
                check_count(value, name)
        Sampling(**numbers)
    except ConfigError as error:
        raise AdapterFormatError(f"{file}: {error}; export the bundle again") from error
    known = isinstance(trained, int) and not isinstance(trained, bool) and trained > 0
    return Defaults(numbers, frozenset(stops), strings or (), **lengths, trained=trained if known else None)


def _warn_of_others(file: Path, settings: Mapping[str, Any], draws: bool) -> None:
    unchanged = {**_OTHERS, **(_OTHER_DRAWS if draws else {})}
    found = [name for name, same in unchanged.items() if settings.get(name) is not None and settings[name] not in same]
    if found:
        warnings.warn(
            f"{file} asks for {', '.join(found)}, which this version does not do: answers differ from those of "
            "transformers",
            stacklevel=4,
        )


def encode_prompts(bundle: Bundle, prompts: Sequence[Prompt]) -> list[Array]:
    """Token ids of each prompt, int64 `[tokens]`: of a text with the tokenizer's special tokens, of a chat without.

    Raises:
        ConfigError: there is no prompt, or one is none; the bundle has no tokenizer or chat template.
        AdapterFormatError: a file of the bundle is damaged.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ConfigError("prompts must be a list with a text, token ids or a chat for each row, at least one")
    if any(isinstance(prompt, Mapping) for prompt in prompts):
        raise ConfigError("a prompt is no message; a chat is a list of messages of its own: prompts=[[...]]")
    empty = next((row for row, prompt in enumerate(prompts) if isinstance(prompt, str) and not prompt), None)
    if empty is not None:
        raise ConfigError(f"prompt {empty} is empty; give a text, or the ids of tokens to begin with")
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
        encoded.append(check_ids(ids, f"prompt {row}"))
    return encoded


def _read(bundle: Bundle, name: str) -> dict[str, Any]:
    if not os.path.lexists(bundle.path / name):
        return {}
    return read_json(bundle.path / name, _LARGEST_JSON, AdapterFormatError, "export the bundle again")
