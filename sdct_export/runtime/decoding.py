"""What `generate` and `stream` are asked for, as requests of a batcher, and what comes of these.

Every option but the prompt may be one value for all rows, or one for each.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..adapter.entries import Array
from ..bundle.description import Bundle
from ..errors import ConfigError
from .batching import ContinuousBatcher, Event, vocabulary_of
from .generation import Generation, Sampling, check_count, check_seed, check_stops
from .prompts import Prompt, encode_prompts, read_defaults
from .request import TOKENIZER, tokenizer_of
from .selection import Selection, check_adapters
from .text import TextStream, check_stop_strings, text_of

MOST_SLOTS = 32  # rows that one call runs side by side; others wait until one of these has ended
CHUNK = 512  # tokens of prompts computed at once where nobody waits for a token
OPTIONS: Mapping[str, Any] = {
    "max_new_tokens": None, "temperature": None, "top_k": None, "top_p": None, "min_p": None,
    "repetition_penalty": None, "seed": None, "stop": None, "stop_tokens": None,
}  # fmt: skip
_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt and what is to be made of it, see `ContinuousBatcher.submit`."""

    prompt: Array
    adapters: Selection
    sampling: Sampling
    most: int
    stops: frozenset[int]
    seed: int | None
    strings: tuple[str, ...] = ()  # stop strings

    @property
    def length(self) -> int:
        """Most tokens it can have, prompt and new ones."""
        return len(self.prompt) + self.most


def read_rows(
    bundle: Bundle,
    prompts: Sequence[Prompt],
    adapters: Selection | Sequence[Selection],
    options: Mapping[str, Any],
    max_length: int | None = None,
) -> list[Row]:
    """The rows of a call; what an option leaves None is the base's way (`read_defaults`).

    Args:
        bundle: of the model.
        prompts: texts, token ids or chats.
        adapters: one entry a row, or one for all.
        options: by name: `max_new_tokens`, `seed`, `stop`, `stop_tokens`, and those of `Sampling`.
        max_length: most tokens of a row, prompt and new ones; None for as many as the model can have.

    Raises:
        ConfigError: a prompt has no token; an option is out of its range, or is not one a row; or a row is longer than
            the model or `max_length` allows.
        AdapterFormatError: a file of the bundle is damaged.
    """
    defaults = read_defaults(bundle)
    tokens = encode_prompts(bundle, prompts)
    batch = len(tokens)
    sampling = {name: _each(name, options[name], batch) for name in _SAMPLING}
    counts = _each("max_new_tokens", options["max_new_tokens"], batch)
    most = bundle.max_tokens
    if max_length is not None:
        check_count(max_length, "max_length")
        most = min(max_length, most or max_length)
    known = [length for length in (most, defaults.trained) if length is not None]
    room = min(known, default=None)  # for what nobody asks for
    strings = check_stop_strings(options["stop"], batch)
    stops = _each_stops(options["stop_tokens"], batch)
    seeds = _each_seed(options["seed"], batch)
    selections = [row or None for row in check_adapters(adapters, batch)] if adapters is not None else [None] * batch
    vocabulary = vocabulary_of(bundle)
    known_stops = frozenset(i for i in defaults.stops if vocabulary is None or i < vocabulary)
    rows = []
    for i, prompt in enumerate(tokens):
        given = {name: values[i] for name, values in sampling.items()}
        ends, texts, count = stops[i], strings[i], counts[i]
        try:
            if vocabulary is not None and (largest := int(prompt.max())) >= vocabulary:
                raise ConfigError(f"the prompt holds {largest}; token ids of this model are below {vocabulary}")
            if count is None:
                count = defaults.most_new(len(prompt), room)
            check_count(count)
            rows.append(
                Row(
                    prompt,
                    selections[i],
                    defaults.sampling(given),
                    count,
                    known_stops if ends is None else check_stops(ends, vocabulary),
                    seeds[i],
                    defaults.strings if texts is None else texts,
                )
            )
        except ConfigError as error:
            if batch == 1:
                raise
            raise ConfigError(f"prompt {i}: {error}") from error
    longest = max(rows, key=lambda row: row.length)
    if most is not None and longest.length > most:
        whose = "this model takes" if most == bundle.max_tokens else "max_length allows"
        if len(longest.prompt) >= most:
            raise ConfigError(
                f"the longest prompt has {len(longest.prompt)} tokens, {whose} at most {most} with a new one; "
                "cut the prompt"
            )
        raise ConfigError(
            f"the longest prompt and {longest.most} new tokens are {longest.length} in all, {whose} at most {most}; "
            "ask for fewer, or cut the prompt"
        )
    if defaults.trained is not None and longest.length > defaults.trained:
        warnings.warn(
            f"the longest prompt and {longest.most} new tokens are {longest.length} in all, this model was made for "
            f"{defaults.trained} at most (max_position_embeddings): what it says beyond that may be nonsense",
            stacklevel=4,
        )
    return rows


def generate(
    bundle: Bundle, batcher: ContinuousBatcher, rows: Sequence[Row], *, logprobs: bool = False
) -> list[Generation]:
    """All rows until each has ended, in their order, with texts where the bundle has a tokenizer. Closes the batcher.

    Raises:
        ConfigError: a row has stop strings, and the bundle no tokenizer.
        SdctError: a row could not be finished, as the model gives NaN, say; names it.
    """
    with batcher:
        tokenizer = _tokenizer(bundle, rows)
        texts = [TextStream(tokenizer, row.strings) if row.strings else None for row in rows]
        events = _events(batcher, rows, texts, logprobs=logprobs, chunks=len(rows) * batcher.max_length)
        found = collect(events, len(rows), logprobs=logprobs)
    if tokenizer is None:
        return found
    for i, (row, one) in enumerate(zip(rows, found, strict=True)):
        if texts[i] is None:
            shown = one.tokens[:-1] if one.tokens[-1] in row.stops else one.tokens
            found[i] = dataclasses.replace(one, text=text_of(tokenizer, shown))
    return found


def stream(
    bundle: Bundle, batcher: ContinuousBatcher, rows: Sequence[Row], *, logprobs: bool = False
) -> Iterator[Event]:
    """Tokens and texts as they come; `request` is the row. Closes the batcher at the end, or when it is closed itself.

    Raises:
        ConfigError, SdctError: as `generate`.
    """
    try:
        tokenizer = _tokenizer(bundle, rows)
        texts = [None if tokenizer is None else TextStream(tokenizer, row.strings) for row in rows]
    except BaseException:
        batcher.close()
        raise
    return _events(batcher, rows, texts, logprobs=logprobs, chunks=1)


def collect(events: Iterable[Event], batch: int, *, logprobs: bool = False) -> list[Generation]:
    """What a stream of `batch` rows made, with their texts where its events have some."""
    tokens: list[list[int]] = [[] for _ in range(batch)]
    logs: list[list[float]] = [[] for _ in range(batch)]
    texts: list[list[str]] = [[] for _ in range(batch)]
    finishes = [""] * batch
    for event in events:
        i = event.request
        if event.token is not None:
            tokens[i].append(event.token)
        if event.logprob is not None:
            logs[i].append(event.logprob)
        if event.text is not None:
            texts[i].append(event.text)
        if event.finish is not None:
            finishes[i] = event.finish
    return [
        Generation(tuple(own), tuple(log) if logprobs else None, finish, "".join(text) if text else None)
        for own, log, finish, text in zip(tokens, logs, finishes, texts, strict=True)
    ]


def _tokenizer(bundle: Bundle, rows: Sequence[Row]) -> Any:
    """What makes texts of tokens, None where the bundle has none. Raises `ConfigError` where a row needs one."""
    if os.path.lexists(bundle.path / TOKENIZER):
        return tokenizer_of(bundle, ())
    if any(row.strings for row in rows):
        raise ConfigError(f"{bundle.path} has no {TOKENIZER}, which stop strings need; give stop tokens instead")
    return None


def _events(
    batcher: ContinuousBatcher,
    rows: Sequence[Row],
    texts: Sequence[TextStream | None],
    *,
    logprobs: bool,
    chunks: int,
) -> Iterator[Event]:
    """With many `chunks` a step, rows that could begin do so before others go on: then most go on together."""
    with batcher:
        for row, text in zip(rows, texts, strict=True):
            batcher.submit(
                row.prompt,
                row.adapters,
                sampling=row.sampling,
                max_new_tokens=row.most,
                stop_tokens=row.stops,
                seed=row.seed,
                logprobs=logprobs,
                text=text,
            )
        while batcher.busy:
            for event in batcher.step(chunks):
                if event.error is not None:
                    raise event.error
                yield event


def _each(name: str, value: Any, batch: int) -> list[Any]:
    """One value a row."""
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence):
        return [value] * batch
    if len(value) != batch:
        raise ConfigError(f"{name} has {len(value)} values for {batch} prompts; give one for all, or one for each")
    return list(value)


def _each_stops(value: Any, batch: int) -> list[Any]:
    """Ids for all rows, or for each; None for the base's."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray) and len(value) > 0
    if listed and all(own is None or (isinstance(own, Sequence) and not isinstance(own, str)) for own in value):
        return _each("stop_tokens", value, batch)
    return [value] * batch


def _each_seed(seed: Any, batch: int) -> list[int | None]:
    """The seeds given, or `seed + row`; None for numbers that nobody can repeat."""
    seeds: list[Any] = [None] * batch if seed is None else []
    if isinstance(seed, int) and not isinstance(seed, bool):
        seeds = [seed + i for i in range(batch)]
    elif isinstance(seed, Sequence) and not isinstance(seed, str | bytes | bytearray):
        seeds = list(seed)
    if len(seeds) != batch:
        raise ConfigError(f"seed must be an integer from 0 on, or one for each of the {batch} rows; got {seed!r}")
    for own in seeds:
        check_seed(own)
    return seeds
