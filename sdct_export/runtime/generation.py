"""Text from a language model's bundle with a key-value cache: prompts in, tokens out. Never imports torch.

Every row of a batch has a prompt, an adapter choice and random numbers of its own. Logits of all rows become tokens at
once, in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import contract
from ..adapter.entries import Array
from ..errors import ConfigError, SdctError

_MOST_TOKENS = 1 << 20
Step = Callable[[Mapping[str, Array]], Array]  # inputs of a step -> logits `[batch, 1, vocabulary]`


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How logits become a token.

    Args:
        temperature: divides the logits; 0 takes the most probable token, and then nothing below matters.
        top_k: only the `k` most probable tokens, and those as probable as the last of them; 0 for all.
        top_p: only the most probable tokens that make up this probability together, at least one.
        min_p: only tokens at least this probable, measured by the most probable one.
        repetition_penalty: logits of tokens in the row so far are divided by it where positive, else multiplied.

    Raises:
        ConfigError: a number is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigError(f"top_k must be an integer from 0 on, got {self.top_k!r}")

    def choose(self, logits: Array, seen: Array, uniform: Array) -> Array:
        """A token of each row, int64 `[batch]`.

        Args:
            logits: float `[batch, vocabulary]`, finite.
            seen: bool `[batch, vocabulary]`, the tokens of the row so far.
            uniform: float `[batch]` in `[0, 1)`, the row's random number.
        """
        scores = logits.astype(np.float64)
        if self.repetition_penalty != 1.0:
            penalized = np.where(scores > 0, scores / self.repetition_penalty, scores * self.repetition_penalty)
            scores = np.where(seen, penalized, scores)
        if self.temperature == 0.0:
            return np.asarray(scores.argmax(1))
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[1]:
            least = np.partition(scores, -self.top_k, axis=1)[:, -self.top_k, None]
            scores = np.where(scores < least, -np.inf, scores)
        if self.top_p < 1.0:
            order = np.argsort(-scores, axis=1, kind="stable")
            before = np.cumsum(_softmax(np.take_along_axis(scores, order, 1)), axis=1)
            before = np.concatenate([np.zeros_like(before[:, :1]), before[:, :-1]], axis=1)
            kept = np.zeros(scores.shape, bool)
            np.put_along_axis(kept, order, before < self.top_p, 1)
            scores = np.where(kept, scores, -np.inf)
        if self.min_p > 0.0:
            least = scores.max(1, keepdims=True) + math.log(self.min_p)
            scores = np.where(scores < least, -np.inf, scores)
        sums = np.cumsum(_softmax(scores), axis=1)
        chosen = (sums <= (uniform * sums[:, -1])[:, None]).sum(1)
        # rounding may leave the last sum behind; the last token of any probability is then meant
        last = scores.shape[1] - 1 - (scores[:, ::-1] > -np.inf).argmax(1)
        return np.asarray(np.minimum(chosen, last))


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was made of a prompt: token ids, their natural logarithms of probability in the model (before sampling
    changes any), `stop` or `length` as the reason of its end, and the text where the bundle has a tokenizer.

    A token that ended it is among the tokens, not in the text.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    text: str | None = None


def generate(
    step: Step,
    prompts: Sequence[Array],
    sampling: Sampling,
    max_new_tokens: int,
    stops: frozenset[int],
    seeds: Sequence[int | None],
) -> list[Generation]:
    """Rows that start with `prompts` (int64 `[tokens]` each, at least one), one token a step until each has ended.

    Raises:
        SdctError: the model gives NaN or infinite logits; names the row.
    """
    batch, longest = len(prompts), max(map(len, prompts))
    counts = np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((batch, longest), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    mask = (np.arange(longest) < counts[:, None]).astype(np.int64)
    places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    randoms = [np.random.default_rng(seed) for seed in seeds]
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    active, seen = np.ones(batch, bool), np.zeros((0, 0), bool)
    for number in range(max_new_tokens):
        feeds = {contract.INPUT_IDS: ids, contract.ATTENTION_MASK: mask, contract.POSITION_IDS: places}
        logits = step(feeds | {contract.LAST_LOGITS: np.array([True])})[:, -1].astype(np.float64)
        wrong = active & ~np.isfinite(logits).all(1)
        if wrong.any():
            raise SdctError(
                f"row {int(wrong.argmax())}: the model gives NaN or infinite logits after {number} new tokens; check "
                "its adapter and scales, or export in a wider type"
            )
        logits = np.where(active[:, None], logits, 0.0)
        if not number:
            seen = np.zeros(logits.shape, bool)
            for row, prompt in zip(seen, prompts, strict=True):
                row[prompt] = True
        uniform = np.array([random.random() if own else 0.0 for random, own in zip(randoms, active, strict=True)])
        chosen = sampling.choose(logits, seen, uniform)
        seen[np.arange(batch), chosen] = True
        probable = np.log(_softmax(logits)[np.arange(batch), chosen])
        for i in np.flatnonzero(active):
            tokens[i].append(int(chosen[i]))
            logprobs[i].append(float(probable[i]))
            active[i] = tokens[i][-1] not in stops
        if not active.any():
            break
        ids, places = np.where(active, chosen, 0)[:, None], (counts + number)[:, None]
        mask = np.concatenate([mask, active[:, None].astype(np.int64)], 1)  # a row that has ended rests
    return [
        Generation(tuple(own), tuple(probabilities), "length" if going else "stop")
        for own, probabilities, going in zip(tokens, logprobs, active, strict=True)
    ]


def check_count(max_new_tokens: int) -> None:
    """Raise `ConfigError` unless `max_new_tokens` is a positive integer of sensible size."""
    whole = isinstance(max_new_tokens, int) and not isinstance(max_new_tokens, bool)
    if not whole or not 0 < max_new_tokens <= _MOST_TOKENS:
        raise ConfigError(f"max_new_tokens must be an integer from 1 to {_MOST_TOKENS}, got {max_new_tokens!r}")


def check_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int | None]:
    """One seed a row: those given, or `seed + row`; None for numbers that nobody can repeat."""
    if seed is None:
        return [None] * batch
    seeds: list[Any] = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise ConfigError(f"seed must be an integer from 0 on, or one for each of the {batch} rows; got {seed!r}")
    return seeds


def check_stops(stop_tokens: Sequence[int]) -> frozenset[int]:
    """The ids as a set. Raises `ConfigError` where one is none."""
    if isinstance(stop_tokens, str) or any(
        isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in stop_tokens
    ):
        raise ConfigError(f"stop_tokens must be token ids, got {stop_tokens!r}")
    return frozenset(stop_tokens)


def _number(name: str, value: object, least: float, most: float, *, above: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not good or not math.isfinite(float(value)) or (above and value == least):  # type: ignore[arg-type]
        upper = f" to {most:g}" if math.isfinite(most) else " on"
        raise ConfigError(f"{name} must be a number {'above' if above else 'from'} {least:g}{upper}, got {value!r}")


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))
