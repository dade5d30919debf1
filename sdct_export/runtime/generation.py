"""How logits become tokens, and what a request for tokens may say. Never imports torch.

Every row has a way of sampling and random numbers of its own.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..adapter.entries import Array
from ..errors import ConfigError

_MOST_TOKENS = 1 << 20
_SMALLEST = 1e-30  # temperature that float32 has, and quotients by it
_LARGEST = 1e38  # of a score; what a penalty of 1e-300 makes of one is not infinite
_BLOCKS = 64  # scores that are compared first of all, when the largest are looked for


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


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A token of each row, int64 `[rows]`; which rows have none, bool `[rows]`; logarithms of probability if asked.

    `failed` has the exceptions of rows whose token could not be chosen; these are `wrong`, too.
    """

    tokens: Array
    wrong: Array
    logprobs: Array | None
    failed: Mapping[int, Exception]


def choose(
    logits: Array, samplings: Sequence[Sampling], seen: Sequence[Array], uniform: Array, *, logprobs: bool = False
) -> Chosen:
    """A token of each row, in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.

    A row with NaN or infinite logits is `wrong`, and has no token that means anything; nor has one whose choice
    raised an exception, which other rows do not pay for. `logprobs` are those of the model, before sampling changes
    any: `logits[token] - log(sum(exp(logits)))`.

    Rows that take the most probable token cost two passes over their logits and no copy; only a row with a top-p
    sorts, and that no more than the tokens that can be part of it.

    Args:
        logits: float `[rows, vocabulary]`; they stay as they are.
        samplings: one a row.
        seen: the tokens of each row so far, int64 `[tokens]`; read where there is a repetition penalty.
        uniform: float `[rows]` in `[0, 1)`, the random number of each row.
        logprobs: whether they are wanted.
    """
    if logits.dtype == np.float16:  # numpy compares half numbers one by one
        logits = logits.astype(np.float32)
    rows = np.arange(len(logits))
    tokens = logits.argmax(1)  # of the first NaN where there is one
    top = logits[rows, tokens]
    wrong = ~(np.isfinite(top) & np.isfinite(logits.min(1)))
    failed: dict[int, Exception] = {}
    for i, sampling in enumerate(samplings):
        if (sampling.temperature or sampling.repetition_penalty != 1.0) and not wrong[i]:
            try:
                with np.errstate(over="ignore", under="ignore"):
                    tokens[i] = _choose_one(logits[i], sampling, seen[i], float(uniform[i]))
            except Exception as error:  # whatever it is
                failed[i], wrong[i] = error, True
    if not logprobs:
        return Chosen(tokens, wrong, None, failed)
    with np.errstate(invalid="ignore"):  # in rows that are wrong
        sums = np.exp(logits - top[:, None]).sum(1)
        return Chosen(tokens, wrong, (logits[rows, tokens] - top) - np.log(sums), failed)


def _choose_one(scores: Array, sampling: Sampling, seen: Array, uniform: float) -> int:
    """A token by the logits `scores [vocabulary]` of a row, in their type; sums are in float64."""
    if sampling.repetition_penalty != 1.0:
        own = scores[seen].astype(np.float64)
        own = np.where(own > 0, own / sampling.repetition_penalty, own * sampling.repetition_penalty)
        scores = scores.copy()
        scores[seen] = np.clip(own, -_LARGEST, _LARGEST)
    if sampling.temperature == 0.0:
        return int(scores.argmax())
    kept: Array | None = None  # the tokens that are left, in their order; None for all
    if 0 < sampling.top_k < len(scores):
        kept = _most_probable(scores, sampling.top_k)
        scores = scores[kept]
    powers = scores - scores.max()
    if sampling.temperature < _SMALLEST:  # which would be 0 in float32
        powers = powers.astype(np.float64)
    powers /= sampling.temperature
    np.exp(powers, out=powers)
    if sampling.top_p < 1.0:
        total = powers.sum(dtype=np.float64)
        enough = sampling.top_p * total
        # all tokens less probable than this are together less than 1 - top_p: none of them is needed
        near = powers[powers >= (1.0 - sampling.top_p) * total / len(powers)]
        near = np.sort(near)[::-1]
        count = int(np.searchsorted(np.cumsum(near, dtype=np.float64), enough))
        part = np.flatnonzero(powers >= near[min(count, len(near) - 1)])
        powers, kept = powers[part], part if kept is None else kept[part]
    if sampling.min_p > 0.0:
        part = np.flatnonzero(powers >= sampling.min_p * powers.max())
        powers, kept = powers[part], part if kept is None else kept[part]
    sums = np.cumsum(powers, dtype=np.float64)
    index = np.searchsorted(sums, uniform * sums[-1], side="right")
    if index == len(sums):  # by rounding; the last token of any probability is then meant
        index = np.searchsorted(sums, sums[-1])
    return int(index if kept is None else kept[index])


def _most_probable(scores: Array, count: int) -> Array:
    """Indices of the `count` largest, and of those as large as the last of them, in their order."""
    near: Array | None = None
    width = len(scores) // _BLOCKS
    if count <= width // 4:  # so many columns have a score of at least the least of their best ones
        best = scores[: _BLOCKS * width].reshape(_BLOCKS, width).max(0)
        near = np.flatnonzero(scores >= np.partition(best, width - count)[width - count])
        scores = scores[near]
    found = np.flatnonzero(scores >= np.partition(scores, len(scores) - count)[len(scores) - count])
    return found if near is None else near[found]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was made of a prompt: token ids, their natural logarithms of probability in the model (before sampling
    changes any) where asked, `stop` or `length` as the reason of its end, and the text where the bundle has a
    tokenizer.

    A token that ended it is among the tokens, not in the text; nor is a stop string, and what its last token says
    behind it.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: str
    text: str | None = None


def check_count(count: object, name: str = "max_new_tokens") -> None:
    """Raise `ConfigError` unless `count` is a positive integer of sensible size."""
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= _MOST_TOKENS:
        raise ConfigError(f"{name} must be an integer from 1 to {_MOST_TOKENS}, got {count!r}")


def check_seed(seed: int | None) -> None:
    """Raise `ConfigError` unless `seed` is None or an integer from 0 on."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ConfigError(f"seed must be an integer from 0 on, got {seed!r}")


def check_stops(stop_tokens: object, vocabulary: int | None = None) -> frozenset[int]:
    """The ids as a set. Raises `ConfigError` where one is none, or none of a model of so many tokens."""
    listed = isinstance(stop_tokens, Collection) and not isinstance(stop_tokens, str | bytes | bytearray | Mapping)
    if not listed or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in stop_tokens):  # type: ignore[attr-defined]
        raise ConfigError(f"stop_tokens must be token ids, got {stop_tokens!r}")
    stops: frozenset[int] = frozenset(stop_tokens)  # type: ignore[call-overload]
    if vocabulary is not None and max(stops, default=0) >= vocabulary:
        raise ConfigError(f"stop_tokens holds {max(stops)}; token ids of this model are below {vocabulary}")
    return stops


def check_ids(prompt: object, name: str) -> Array:
    """Token ids as int64 `[tokens]`. Raises `ConfigError` where these are none, or there is none; it says `name`."""
    try:
        array: Array | None = np.asarray(prompt)
    except (ValueError, TypeError, OverflowError):  # lists of several lengths, say
        array = None
    if array is not None and array.ndim == 1 and array.size == 0:
        raise ConfigError(f"{name} has no token; it needs at least one")
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu":
        told = ", not a text" if isinstance(prompt, str) else ""
        raise ConfigError(f"{name} must be token ids, a list of integers{told}")
    if int(array.min()) < 0:
        raise ConfigError(f"{name} holds {array.min()}; token ids must not be negative")
    if int(array.max()) > np.iinfo(np.int64).max:
        raise ConfigError(f"{name} holds {array.max()}; no token has such an id")
    return array.astype(np.int64)


def _number(name: str, value: object, least: float, most: float, *, above: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not least <= value <= min(most, sys.float_info.max) or (above and value == least):  # type: ignore[operator]
        upper = f" to {most:g}" if math.isfinite(most) else " on"
        raise ConfigError(f"{name} must be a number {'above' if above else 'from'} {least:g}{upper}, got {value!r}")
