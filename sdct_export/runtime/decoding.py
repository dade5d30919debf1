"""What `generate` and `stream` are asked for, as requests of a batcher, and what comes of these.

Every option but the prompt may be one value for all rows, or one for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..adapter.entries import Array
from ..bundle.description import Bundle
from ..errors import ConfigError
from .batching import ContinuousBatcher, Event
from .generation import Generation, Sampling, check_count, check_seed, check_stops
from .prompts import encode_prompts, read_defaults
from .selection import Selection, check_adapters

MOST_SLOTS = 32  # rows that one call runs side by side; others wait until one of these has ended
CHUNK = 1024  # tokens of prompts computed at once where nobody waits for a token
OPTIONS: Mapping[str, Any] = {
    "max_new_tokens": 64, "temperature": None, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": None,
    "seed": None, "stop_tokens": None,
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

    @property
    def length(self) -> int:
        """Most tokens it can have, prompt and new ones."""
        return len(self.prompt) + self.most


def read_rows(
    bundle: Bundle,
    prompts: Sequence[str | Sequence[int]],
    adapters: Selection | Sequence[Selection],
    options: Mapping[str, Any],
) -> list[Row]:
    """The rows of a call; what an option leaves None is the base's way (`read_defaults`).

    Args:
        bundle: of the model.
        prompts: texts or token ids.
        adapters: one entry a row, or one for all.
        options: by name: `max_new_tokens`, `seed`, `stop_tokens`, and those of `Sampling`.

    Raises:
        ConfigError: a prompt has no token; an option is out of its range, or is not one a row; or a row is longer than
            the model can be.
        AdapterFormatError: a file of the bundle is damaged.
    """
    defaults = read_defaults(bundle)
    tokens = encode_prompts(bundle, prompts)
    batch = len(tokens)
    sampling = {name: _each(name, options[name], batch) for name in _SAMPLING}
    counts = _each("max_new_tokens", options["max_new_tokens"], batch)
    for count in counts:
        check_count(count)
    stops = _each_stops(options["stop_tokens"], batch)
    seeds = _each_seed(options["seed"], batch)
    selections = [row or None for row in check_adapters(adapters, batch)] if adapters is not None else [None] * batch
    rows = []
    for i, prompt in enumerate(tokens):
        given = {name: values[i] for name, values in sampling.items()}
        ends = stops[i]
        rows.append(
            Row(
                prompt,
                selections[i],
                defaults.sampling(given),
                counts[i],
                defaults.stops if ends is None else check_stops(ends),
                seeds[i],
            )
        )
    longest = max(rows, key=lambda row: row.length)
    if bundle.max_tokens is not None and longest.length > bundle.max_tokens:
        raise ConfigError(
            f"the longest prompt and {longest.most} new tokens are {longest.length} in all, this model takes at most "
            f"{bundle.max_tokens}; ask for fewer, or cut the prompt"
        )
    return rows


def generate(batcher: ContinuousBatcher, rows: Sequence[Row], *, logprobs: bool = False) -> list[Generation]:
    """All rows until each has ended, in their order. Closes the batcher.

    Raises:
        SdctError: a row could not be finished, as the model gives NaN, say; names it.
    """
    tokens: list[list[int]] = [[] for _ in rows]
    logs: list[list[float]] = [[] for _ in rows]
    finishes = [""] * len(rows)
    for event in _events(batcher, rows, logprobs=logprobs, chunks=len(rows) * batcher.max_length):
        i = event.request
        if event.token is not None:
            tokens[i].append(event.token)
        if event.logprob is not None:
            logs[i].append(event.logprob)
        if event.finish is not None:
            finishes[i] = event.finish
    return [
        Generation(tuple(own), tuple(log) if logprobs else None, finish)
        for own, log, finish in zip(tokens, logs, finishes, strict=True)
    ]


def stream(batcher: ContinuousBatcher, rows: Sequence[Row], *, logprobs: bool = False) -> Iterator[Event]:
    """Tokens as they come; `request` is the row. Closes the batcher at the end, or when it is closed itself.

    Raises:
        SdctError: as `generate`.
    """
    return _events(batcher, rows, logprobs=logprobs, chunks=1)


def _events(batcher: ContinuousBatcher, rows: Sequence[Row], *, logprobs: bool, chunks: int) -> Iterator[Event]:
    """With many `chunks` a step, rows that could begin do so before others go on: then most go on together."""
    with batcher:
        for row in rows:
            batcher.submit(
                row.prompt,
                row.adapters,
                sampling=row.sampling,
                max_new_tokens=row.most,
                stop_tokens=row.stops,
                seed=row.seed,
                logprobs=logprobs,
            )
        while batcher.busy:
            for event in batcher.step(chunks):
                if event.error is not None:
                    raise event.error
                yield event


def _each(name: str, value: Any, batch: int) -> list[Any]:
    """One value a row."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * batch
    if len(value) != batch:
        raise ConfigError(f"{name} has {len(value)} values for {batch} prompts; give one for all, or one for each")
    return list(value)


def _each_stops(value: Any, batch: int) -> list[Any]:
    """Ids for all rows, or for each; None for the base's."""
    listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if listed and all(own is None or (isinstance(own, Sequence) and not isinstance(own, str)) for own in value):
        return _each("stop_tokens", value, batch)
    return [value] * batch


def _each_seed(seed: Any, batch: int) -> list[int | None]:
    """The seeds given, or `seed + row`; None for numbers that nobody can repeat."""
    seeds: list[Any] = [None] * batch if seed is None else []
    if isinstance(seed, int) and not isinstance(seed, bool):
        seeds = [seed + i for i in range(batch)]
    elif isinstance(seed, Sequence) and not isinstance(seed, str):
        seeds = list(seed)
    if len(seeds) != batch:
        raise ConfigError(f"seed must be an integer from 0 on, or one for each of the {batch} rows; got {seed!r}")
    for own in seeds:
        check_seed(own)
    return seeds
