"""Tokens of a row as text while they come, up to the first of its stop strings. Never imports torch.

What was given out never changes any more: bytes of a character that is not whole yet, and the possible beginning of a
stop string, wait until they are decided. (`DecodeStream` of tokenizers fails where byte tokens turn out to be no
character, and keeps what waits to itself at the end.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .request import TOKENIZER, tokenizing

_BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no character, or none yet
_UNDECIDED = 3  # most bytes of a character that is not whole; at least one of them each is shown as broken
_ENOUGH = 4  # tokens that come to a window before it moves on

Stops = str | Sequence[str | Sequence[str] | None]


class TextStream:
    """The text of one row, token by token, without special tokens.

    All that `push` and `finish` return is together `tokenizer.decode(tokens)`, up to where a stop string begins. One
    difference: byte tokens (such as `<0x0A>`) that are no character do not damage the characters before them.

    The row ends with the token that completes one of `stops`, wherever in the token that is. Of several that is the
    one whose last character comes first, and of these the longest, so that the text does not depend on how it is split
    into tokens. A stop string that is the text of a special token means that token.

    Args:
        tokenizer: of the library tokenizers.
        stops: the stop strings, none of them empty (see `check_stop_strings`).

    Raises:
        ConfigError: a stop string holds a special token beside other text, so that it would never be found.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        added = tokenizer.get_added_tokens_decoder().items() if stops else ()
        special = {str(token.content): i for i, token in added if token.special}
        self._tokenizer = tokenizer
        self._ends = frozenset(special[stop] for stop in stops if stop in special)
        self._stops = tuple(stop for stop in stops if stop not in special)
        for stop in self._stops:
            if (token := next((token for token in special if token in stop), None)) is not None:
                raise ConfigError(
                    f"the stop string {stop!r} holds the special token {token!r}, which is not part of texts; give "
                    "the token alone, or leave it out"
                )
        self._longest = max(map(len, self._stops), default=0)
        self._window: list[int] = []  # what is decoded together: the tokens before are needed, for a start is special
        self._context = 0  # how many of the window are there for that alone
        self._whole = 0  # how many of them gave `_told`
        self._told = ""  # the decided text of the window
        self._held = ""  # its end, where that may become a stop string
        self.finished = False  # by a stop string

    def push(self, token: int) -> str:
        """What comes to the text with `token`, often nothing. Then `finished` says whether the row ends here."""
        assert not self.finished
        if token in self._ends:
            rest = self.finish()
            self.finished = True
            return rest
        self._window.append(token)
        text = self._decode(self._window)
        if not text.startswith(self._told):  # byte tokens, of which the last ones are no character, or none yet
            text = self._decode(self._window[self._whole :])
            if text.endswith(_BROKEN) and len(self._window) - self._whole <= _UNDECIDED:
                return ""
            self._window, self._context, self._told = self._window[self._whole :], 0, ""
        broken = min(len(text) - len(text.rstrip(_BROKEN)), _UNDECIDED)
        decided = text[: len(text) - broken]
        new = decided[len(self._told) :]
        if new:
            self._told = decided
        if not broken:
            self._whole = len(self._window)
            self._move_on()
        return self._give(new)

    def finish(self) -> str:
        """The rest, which waited for more tokens; once there are no more."""
        if self.finished:
            return ""
        text = self._decode(self._window)
        if text.startswith(self._told):
            return self._give(text[len(self._told) :], last=True)
        return self._give(self._decode(self._window[self._whole :]), last=True)

    def _give(self, new: str, *, last: bool = False) -> str:
        """What of the held text and `new` can be given out."""
        text = self._held + new
        places = ((text.find(stop), stop) for stop in self._stops)
        found = min(((at + len(stop), at) for at, stop in places if at >= 0), default=None)
        if found is not None:
            self.finished, self._held = True, ""
            return text[: found[1]]
        held = 0 if last else min(len(text), self._longest - 1)
        while held > 0 and not any(stop.startswith(text[-held:]) for stop in self._stops):
            held -= 1
        shown = len(text) - max(held, 0)
        self._held = text[shown:]
        return text[:shown]

    def _move_on(self) -> None:
        """Begin the window later where the tokens to come still find a beginning in it."""
        if len(self._window) - self._context < _ENOUGH:
            return
        later = self._window[self._context :]
        if told := self._decode(later):  # else these are special tokens, and the next one would be read as a start
            self._window, self._context, self._whole, self._told = later, len(later), len(later), told

    def _decode(self, tokens: Sequence[int]) -> str:
        with tokenizing(Path(TOKENIZER)):
            return str(self._tokenizer.decode(tokens))


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """What a `TextStream` makes of all `tokens`, at once."""
    with tokenizing(Path(TOKENIZER)):
        text = str(tokenizer.decode(list(tokens)))
    if _BROKEN not in text:
        return text
    stream = TextStream(tokenizer)
    return "".join([*map(stream.push, tokens), stream.finish()])


def check_stop_strings(stop: Stops | None, batch: int) -> list[tuple[str, ...] | None]:
    """The stop strings of each row, None where nothing is said: a text, or texts, for all rows; or such for each.

    Raises:
        ConfigError: one is empty or no text, or there are not as many lists as rows.
    """
    if stop is None:
        return [None] * batch
    if isinstance(stop, str):
        return [_checked([stop])] * batch
    if not isinstance(stop, Sequence) or isinstance(stop, bytes):
        raise ConfigError(f"stop must be a text, texts, or such for each row; got {stop!r}")
    if all(isinstance(one, str) for one in stop):
        return [_checked(stop)] * batch
    if len(stop) != batch:
        raise ConfigError(f"stop has {len(stop)} entries for {batch} rows; give one for each, or texts for all")
    return [None if one is None else _checked([one] if isinstance(one, str) else one) for one in stop]


def _checked(stops: Any) -> tuple[str, ...]:
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ConfigError(f"stop must be texts of at least one character; got {stops!r}")
    return tuple(dict.fromkeys(stops))
