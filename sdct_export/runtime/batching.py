"""Continuous batching: requests for tokens come and go while others run. Never imports torch.

Requests share the slots of one key-value cache (`steps`). Those that make tokens are its first rows; a decode step
gives each of them one. A request that is admitted has its prompt computed straight into the slot behind them, in
chunks; one that ends leaves at once, and the last row takes its place. Its columns stay until somebody needs the slot:
a prompt that begins as one that is there, under the same adapters, is not computed again as far as they agree.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..adapter.entries import Array
from ..bundle.description import Bundle
from ..errors import ConfigError, SdctError, UnsupportedError
from .bank import Bank, Lease
from .generation import Sampling, check_count, check_ids, check_seed, check_stops, choose
from .guarded import Guarded, Latch
from .selection import MERGED, Selection, check_row, in_slots, selection_inputs
from .steps import Steps, cache_bytes
from .text import TextStream

DEFAULT_SLOTS = 8
DEFAULT_MAX_LENGTH = 2048
DEFAULT_CHUNK = 256
_WORTH = 16  # tokens in common; fewer are computed again with those of other prompts
_GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step brought a request: a token (its last one has a `finish`), or its end without one.

    `finish` is `stop` (the token is one of its stop tokens), `length` (it has as many as it asked for), `cancelled` or
    `error`, which `error` tells of. `logprob` is as in `Generation`, None unless asked for. `text` is what comes to
    the request's text, often nothing; None where nobody asked for its text.
    """

    request: int
    token: int | None = None
    logprob: float | None = None
    finish: str | None = None
    error: SdctError | None = None
    text: str | None = None


def vocabulary_of(bundle: Bundle) -> int | None:
    """How many tokens there are, None where the bundle does not say."""
    size = next((output.shape[-1] for output in bundle.outputs if output.name == "logits"), None)
    return size if isinstance(size, int) else None


@dataclasses.dataclass(eq=False)
class _Request:
    number: int
    row: Mapping[str, float]
    lease: Lease[Any] | None
    sampling: Sampling
    stops: Collection[int]
    random: np.random.Generator | None  # None where nothing is drawn
    logprobs: bool
    text: TextStream | None
    tokens: Array  # int64 `[prompt and most new ones]`, the first `count` of them are there
    prompt: int
    count: int
    done: int = 0  # tokens whose columns are in the cache
    key: tuple[tuple[int, float], ...] = ()  # version and scale of each adapter: whose columns these are
    chosen: Sequence[tuple[int, float]] = ()  # bank slot and scale of each adapter
    begun: bool = False  # it holds its adapters
    used: int = 0  # when it left its slot; larger than that of those that left before


class ContinuousBatcher:
    """Requests for tokens that run side by side, each with a prompt, adapters, sampling and length of its own.

    `MultiAdapterModel.batcher` makes one. `submit` and `cancel` may be called from any thread at any time; `step` and
    `close` too, but only one runs at a time, and whoever calls `step` gets the events. As long as there is work
    (`busy`), somebody must call `step`: a request that waits for a slot of the bank has its place in the queue
    there, and one that runs holds its slots.

    What a request makes depends on its prompt, adapters, sampling and seed alone, up to the rounding of sums in a
    batch. Its adapters stay as they were when its prompt began, whatever is loaded, replaced or unloaded meanwhile; an
    adapter that is unloaded while the request still waits ends it with an error.

    Args:
        bundle: of the model.
        steps: the cache.
        bank: the adapters; None for a merged bundle.
        chunk: most tokens of prompts that are computed between two decode steps.
    """

    def __init__(
        self,
        bundle: Bundle,
        steps: Steps[Any],
        bank: Bank[Any] | None,
        chunk: int = DEFAULT_CHUNK,
        *,
        noun: str = "request",
    ) -> None:
        assert bundle.cache is not None
        self.cache_bytes: int = getattr(steps, "nbytes", 0) or cache_bytes(bundle.cache, steps.slots, steps.max_length)
        self.slots = steps.slots  # most requests that run side by side
        self.max_length = steps.max_length  # most tokens of a request, prompt and new ones
        self._steps: Any = steps
        self._bank, self._chunk, self._noun = bank, chunk, noun
        self._vocabulary = vocabulary_of(bundle)
        self._queue = Guarded()  # of what `submit` and `cancel` change
        self._waiting: deque[_Request] = deque()
        self._live: dict[int, _Request] = {}
        self._cancelled: list[_Request] = []
        self._numbers = 0
        self._turn = Guarded()  # of what `step` changes
        self._slots: list[_Request | None] = [None] * steps.slots  # whose columns each slot has
        self._active = 0  # the first slots, whose requests make tokens
        self._filling: int | None = None  # the slot whose request has part of its prompt
        self._chosen: dict[str, Array] | None = None  # inputs of the active rows, None where these have changed
        self._tensors: Mapping[str, Any] = {}  # of the bank, as the lease entered last has them
        self._left = 0
        self._cut_off = False  # by an exception, in the middle of a step
        self._closed = False
        self._process = os.getpid()

    @property
    def waiting(self) -> int:
        """Requests whose prompts have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self._active + (self._filling is not None)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._live)

    def __enter__(self) -> ContinuousBatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prompt: Sequence[int] | Array,
        adapters: Selection = None,
        *,
        sampling: Sampling = _GREEDY,
        max_new_tokens: int = 64,
        stop_tokens: Collection[int] = (),
        seed: int | None = None,
        logprobs: bool = False,
        text: TextStream | None = None,
    ) -> int:
        """The number of a new request, whose events `step` will return.

        Args:
            prompt: token ids, at least one.
            adapters: a name, None for the base, or a mapping of names to scales.
            sampling: how its tokens are chosen; the most probable ones by default.
            max_new_tokens: most tokens that it gets.
            stop_tokens: ids that end it.
            seed: of its random numbers; None for numbers that nobody can repeat.
            logprobs: whether its events say how probable the tokens are.
            text: makes its text of its tokens, and ends it at a stop string; of this request alone.

        Raises:
            UnknownAdapterError: a name is not loaded.
            ConfigError: the prompt is empty, or too long together with `max_new_tokens`; a setting has no such value.
            SdctError: the batcher is closed.
        """
        self._check_usable()
        tokens = check_ids(prompt, "the prompt")
        if self._vocabulary is not None and int(tokens.max()) >= self._vocabulary:
            raise ConfigError(f"the prompt holds {tokens.max()}; token ids of this model are below {self._vocabulary}")
        check_count(max_new_tokens)
        check_seed(seed)
        stops = check_stops(stop_tokens, self._vocabulary)
        if not isinstance(sampling, Sampling):
            raise ConfigError(f"sampling must be a Sampling, got {sampling!r}")
        if text is not None and not isinstance(text, TextStream):
            raise ConfigError(f"text must be a TextStream or None, got {text!r}")
        if len(tokens) + max_new_tokens > self.max_length:
            raise ConfigError(
                f"a prompt of {len(tokens)} tokens and {max_new_tokens} new ones are "
                f"{len(tokens) + max_new_tokens} in all, a slot of this cache has {self.max_length}; ask for fewer, "
                "or cut the prompt"
            )
        if self._bank is None and adapters is not None:
            raise ConfigError(MERGED)
        row = check_row(adapters, "adapters")
        lease = None
        if self._bank is not None:
            lease = self._bank.lease(row)
            self._bank.check(row)
        buffer = np.zeros(len(tokens) + max_new_tokens, np.int64)
        buffer[: len(tokens)] = tokens
        request = _Request(
            number=-1,
            row=row,
            lease=lease,
            sampling=sampling,
            stops=stops,
            random=np.random.default_rng(seed) if sampling.temperature else None,
            logprobs=logprobs,
            text=text,
            tokens=buffer,
            prompt=len(tokens),
            count=len(tokens),
        )
        return self._queue.atomically(self._enqueue, request)

    def cancel(self, request: int) -> bool:
        """End a request: the next step says so. Whether it had not ended before.

        Raises `ConfigError` where `request` is no number.
        """
        if isinstance(request, bool) or not isinstance(request, int):
            raise ConfigError(f"a request is cancelled by the number that submit gave, got {request!r}")
        return self._queue.atomically(self._mark, request)

    def step(self, chunks: int = 1) -> list[Event]:
        """At most `chunks` chunks of waiting prompts, then one token for every request that makes some.

        Where all that it could do is wait for slots of the bank that others hold, it does so for a tenth of a second.

        Raises:
            ConfigError: `chunks` is no number from 0 on; nothing has happened.
            SdctError: the batcher is closed, or an exception cut an earlier step off. What goes wrong with a request
                is an event.
        """
        if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 0:
            raise ConfigError(f"chunks must be an integer from 0 on, got {chunks!r}")
        return self._turn.atomically(self._step, chunks)

    def close(self) -> None:
        """Give up all requests, without events, and free the cache. Closing again does nothing."""
        self._turn.atomically(self._queue.atomically, self._close)

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            raise UnsupportedError("this process was forked after the batcher was made; load the model in the child")
        if self._closed:
            raise SdctError("this batcher is closed; make another one")

    # What follows runs with the queue's lock.

    def _enqueue(self, request: _Request) -> int:
        self._check_usable()
        request.number = self._numbers
        self._numbers += 1
        self._waiting.append(request)
        self._live[request.number] = request
        return request.number

    def _mark(self, number: int) -> bool:
        request = self._live.get(number)
        if request is not None:
            self._cancelled.append(request)
        return request is not None

    def _take_cancelled(self) -> list[_Request]:
        gone = [request for request in dict.fromkeys(self._cancelled) if request.number in self._live]
        self._cancelled.clear()
        self._unqueue([request for request in gone if request in self._waiting])
        return gone

    def _unqueue(self, requests: Sequence[_Request]) -> None:
        for request in requests:
            self._waiting.remove(request)

    def _close(self) -> None:
        self._closed = True
        for request in self._live.values():
            if request.lease is not None:
                request.lease.release()
        self._live.clear()
        self._waiting.clear()
        self._slots, self._active, self._filling = [], 0, None
        self._tensors, self._steps = {}, None

    # What follows runs within `step`.

    def _step(self, chunks: int) -> list[Event]:
        self._check_usable()
        if self._cut_off:
            raise SdctError("a step was cut off by an exception, so its rows are lost; make another batcher")
        self._cut_off = True
        events: list[Event] = []
        self._drop_cancelled(events)
        latch = None
        for _ in range(chunks):
            more, latch = self._fill(events)
            if not more:
                break
        if self._active:
            self._decode(events)
        elif latch is not None and not events:
            latch.wait()
        self._cut_off = False
        return events

    def _drop_cancelled(self, events: list[Event]) -> None:
        gone = self._queue.atomically(self._take_cancelled)
        events += [self._end(request, "cancelled") for request in gone]
        if self._filling is not None and self._slots[self._filling] in gone:
            self._filling = None
        self._leave([slot for slot in range(self._active) if self._slots[slot] in gone])

    def _fill(self, events: list[Event]) -> tuple[bool, Latch | None]:
        """Compute one chunk of prompts: whether there was one, and what the first that cannot start waits for."""
        latch = None
        if self._filling is None:
            if self._active == self.slots:
                return False, None
            group, latch = self._admit(events)
            if not group:
                return False, latch
            first = self._active
        else:
            first, group = self._filling, self._requests(self._filling, self._filling + 1)
        past = group[0].done
        parts = [r.tokens[r.done : min(r.count, r.done + self._chunk)] for r in group]
        chosen = self._inputs(group)
        try:
            logits = self._steps.prefill(first, parts, past, chosen, self._tensors)
        except SdctError as error:
            for slot, request in enumerate(group, first):
                events.append(self._end(request, "error", error))
                self._slots[slot] = None
            self._filling = None
            return True, latch
        for request, part in zip(group, parts, strict=True):
            request.done += len(part)
        if group[-1].done < group[-1].count:
            self._filling = first
            return True, latch
        self._filling = None
        if first != self._active:  # a row has left meanwhile
            self._steps.copy(first, self._active, group[0].done)
            self._slots[self._active], self._slots[first] = group[0], None
            first = self._active
        self._active += len(group)
        self._chosen = None
        self._choose(first, group, logits, events)
        return True, latch

    def _decode(self, events: list[Event]) -> None:
        """One token more for each active row."""
        requests = self._requests(0, self._active)
        if self._chosen is None:
            self._chosen = self._inputs(requests)
        tokens = np.array([request.tokens[request.count - 1] for request in requests])
        lengths = np.array([request.done for request in requests])
        try:
            logits = self._steps.decode(tokens, lengths, self._chosen, self._tensors)
        except SdctError as error:
            events += [self._end(request, "error", error) for request in requests]
            self._leave(list(range(len(requests))))
            return
        for request in requests:
            request.done += 1
        self._choose(0, requests, logits, events)

    def _choose(self, first: int, requests: Sequence[_Request], logits: Array, events: list[Event]) -> None:
        """A token of each of these rows, which begin at slot `first`."""
        uniform = np.array([0.0 if r.random is None else r.random.random() for r in requests])
        seen = [request.tokens[: request.count] for request in requests]
        wanted = any(request.logprobs for request in requests)
        found = choose(logits, [request.sampling for request in requests], seen, uniform, logprobs=wanted)
        ended = []
        for i, request in enumerate(requests):
            if found.wrong[i]:
                failed = found.failed.get(i)
                why = (
                    f"the model gives NaN or infinite logits after {request.count - request.prompt} new tokens; check "
                    "its adapter and scales, or export in a wider type"
                    if failed is None
                    else f"no token can be chosen ({type(failed).__name__}: {failed})"
                )
                problem = SdctError(f"{self._noun} {request.number}: {why}")
                events.append(self._end(request, "error", problem))
                self._slots[first + i] = None  # nobody may go on from these columns
                ended.append(first + i)
                continue
            token = int(found.tokens[i])
            request.tokens[request.count] = token
            request.count += 1
            finish = "stop" if token in request.stops else None
            text = None
            if request.text is not None:
                try:
                    text = "" if finish else request.text.push(token)
                    if request.text.finished:
                        finish = "stop"
                    elif finish or request.count == len(request.tokens):
                        text += request.text.finish()
                except SdctError as problem:  # of a damaged tokenizer
                    events.append(self._end(request, "error", problem))
                    ended.append(first + i)
                    continue
            if finish is None and request.count == len(request.tokens):
                finish = "length"
            logprob = float(found.logprobs[i]) if request.logprobs and found.logprobs is not None else None
            if finish is not None:
                self._end(request, finish)
                ended.append(first + i)
            events.append(Event(request.number, token, logprob, finish, text=text))
        self._leave(ended)

    def _end(self, request: _Request, finish: str, error: SdctError | None = None) -> Event:
        """A request has ended: its adapters are free."""
        if request.lease is not None:
            request.lease.release()
        self._queue.atomically(self._live.pop, request.number, None)
        self._left += 1
        request.used = self._left
        return Event(request.number, finish=finish, error=error)

    def _leave(self, ended: Sequence[int]) -> None:
        """The rows in these slots are gone: the last ones take their places."""
        if not ended:
            return
        before, self._active, self._chosen = self._active, self._active - len(ended), None
        holes = [slot for slot in ended if slot < self._active]
        movers = [slot for slot in range(self._active, before) if slot not in ended]
        for hole, mover in zip(holes, movers, strict=True):
            if not self._waiting:
                self._keep(hole, [slot for slot in range(self._active, self.slots) if slot not in movers])
            request = self._slots[mover]
            assert request is not None
            self._steps.copy(mover, hole, request.done)
            self._slots[hole], self._slots[mover] = request, None

    def _keep(self, slot: int, others: Sequence[int]) -> None:
        """Put the columns of an ended request in `slot` into the one of `others` that is missed least."""
        request = self._slots[slot]
        free = [other for other in others if other != self._filling]
        if request is None or not free:
            return
        target = min(free, key=lambda other: (self._last_use(other), -other))
        if self._last_use(target) < request.used:
            self._steps.copy(slot, target, request.done)
            self._slots[target] = request

    def _last_use(self, slot: int) -> int:
        request = self._slots[slot]
        return 0 if request is None else request.used

    def _admit(self, events: list[Event]) -> tuple[list[_Request], Latch | None]:
        """Requests for the slots from `_active` on, whose prompts the next chunk computes or begins.

        One, or several short ones that no columns in the cache help.
        """
        group: list[_Request] = []
        ended: list[_Request] = []
        latch: Latch | None = None
        most = min(self.slots - self._active, self._steps.prefill_rows)
        candidates = self._queue.atomically(lambda: list(itertools.islice(self._waiting, self.slots)))
        for request in candidates:
            longest = max([request.count, *(one.count for one in group)])
            if len(group) == most or (group and (len(group) + 1) * longest > self._chunk):
                break
            blocked = self._begin(request, events)
            if blocked is not None:
                latch = latch or blocked
            if not request.begun:
                ended += [request] if blocked is None else []
                continue
            source, shared = self._resident(request)
            if shared and group:
                break  # it begins by itself, another time
            slot = self._active + len(group)
            others = [other for other in range(slot + 1, self.slots) if not shared or other != source]
            if not shared or source != slot:
                self._keep(slot, others)
            if shared and source != slot:
                self._steps.copy(source, slot, shared)
            request.done = shared
            self._slots[slot] = request
            group.append(request)
            if shared or request.count > self._chunk:
                break
        self._queue.atomically(self._unqueue, [*group, *ended])
        return group, latch

    def _begin(self, request: _Request, events: list[Event]) -> Latch | None:
        """A request gets its adapters; or what it waits for where others have their slots; or it ends."""
        if request.begun:
            return None
        lease, row = request.lease, request.row
        try:
            latch = None if lease is None else lease.attempt()
        except SdctError as error:
            events.append(self._end(request, "error", error))
            return None
        if latch is None:
            request.begun = True
        if lease is not None and latch is None:
            self._tensors = lease.tensors
            request.chosen = in_slots(row, lease.slots)
            request.key = tuple((lease.versions[name], scale) for name, scale in row.items())
        return latch

    def _resident(self, request: _Request) -> tuple[int, int]:
        """The slot whose columns the prompt can begin with, and how many of them; 0 for none."""
        best, most = 0, 0
        for slot, other in enumerate(self._slots):
            if other is None or other.key != request.key:
                continue
            length = min(other.done, request.count - 1)  # its last token must be computed
            if length > most:
                differ = np.flatnonzero(other.tokens[:length] != request.tokens[:length])
                length = int(differ[0]) if len(differ) else length
                if length > most:
                    best, most = slot, length
        return (best, most) if most >= _WORTH else (0, 0)

    def _requests(self, first: int, end: int) -> list[_Request]:
        return [request for request in self._slots[first:end] if request is not None]

    def _inputs(self, requests: Sequence[_Request]) -> dict[str, Array]:
        return {} if self._bank is None else selection_inputs([request.chosen for request in requests])
