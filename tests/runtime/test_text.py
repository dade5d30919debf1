"""Texts from tokens as they come, against whole decodes; stop strings against a search in the whole text."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers_of_texts import KINDS, SPECIAL, TEXTS, byte_fallback, byte_level

from sdct_export.errors import ConfigError
from sdct_export.runtime.text import TextStream, check_stop_strings

BROKEN = "\ufffd"


def streamed(tokenizer: Tokenizer, tokens: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """Deltas and the number of tokens taken."""
    stream, deltas = TextStream(tokenizer, stops), []
    for count, token in enumerate(tokens, 1):
        deltas.append(stream.push(token))
        if stream.finished:
            assert stream.finish() == ""
            return deltas, count
    return [*deltas, stream.finish()], len(tokens)


def ending(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the stop string begins whose last character comes first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_are_together_the_whole_decode_and_never_taken_back(kind: str) -> None:
    tokenizer = KINDS[kind]()
    rng = random.Random(1)
    size = tokenizer.get_vocab_size()
    rows = [tokenizer.encode(text).ids for text in TEXTS[:4]]
    rows += [row[: rng.randrange(len(row))] for row in rows for _ in range(5)]
    rows += [[rng.randrange(size) for _ in range(rng.randrange(60))] for _ in range(150)]
    damaged = 0
    for row in rows:
        whole = tokenizer.decode(row)
        deltas, _ = streamed(tokenizer, row)
        text = "".join(deltas)
        if kind == "byte_fallback" and BROKEN in whole:  # which breaks whole characters before the broken one, too
            damaged += 1
            assert text.count(BROKEN) <= whole.count(BROKEN)
            assert whole.replace(BROKEN, "") in text.replace(BROKEN, "") or len(text) <= len(whole)
        else:
            assert text == whole, row
        held = "".join(deltas[:-1])
        assert not held.endswith(BROKEN * 4) or BROKEN in whole
    assert (damaged > 0) == (kind == "byte_fallback")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_character_comes_once_it_is_whole(make: Any) -> None:
    """Cut anywhere, what came so far is the beginning of the text; only the end of the row shows what is broken."""
    tokenizer = make()
    text = "a\n😀é東\n\n👩‍👩‍👧b"
    row = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(row) > len(text)  # characters of several tokens
    assert tokenizer.decode(row) == text
    for count in range(len(row) + 1):
        stream = TextStream(tokenizer)
        before = "".join(map(stream.push, row[:count]))
        rest = stream.finish()
        assert text.startswith(before)
        assert rest.strip(BROKEN) == ""
        assert len(before) >= len(tokenizer.decode(row[:count]).split(BROKEN)[0])
    lines = TextStream(tokenizer)
    assert [lines.push(token) for token in row].count("\n") == 3  # at once, not with what follows


def test_bytes_that_are_no_character_damage_nothing_else() -> None:
    tokenizer = byte_fallback()
    ids = {token: tokenizer.token_to_id(token) for token in ("<0x0A>", "<0xE6>", "<0xF0>", "▁", "s")}
    row = [ids[t] for t in ("s", "<0x0A>", "<0xE6>", "▁", "s", "<0x0A>", "<0xF0>", "s", "<0xE6>", "<0x0A>")]
    assert tokenizer.decode(row) == f"s{BROKEN * 2} s{BROKEN * 2}s{BROKEN * 2}"
    deltas, _ = streamed(tokenizer, row)
    assert "".join(deltas) == f"s\n{BROKEN} s\n{BROKEN}s{BROKEN * 2}"
    many = [ids["<0x0A>"], *[ids["<0xF0>"]] * 50]
    before = "".join(streamed(tokenizer, many)[0][:-1])
    assert before == "\n" + BROKEN * (len(before) - 1)
    assert len(before) >= 47  # nothing waits without end


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_against_a_search_in_the_whole_text(kind: str) -> None:
    """Random rows, stop strings from anywhere in their texts, from within tokens and over several of them."""
    tokenizer = KINDS[kind]()
    rng = random.Random(2)
    ended = overlong = 0
    for _ in range(400):
        row = tokenizer.encode(rng.choice(TEXTS)).ids
        start = rng.randrange(len(row))
        row = row[start : start + rng.randrange(2, 40)]
        whole = tokenizer.decode(row)
        if not whole or BROKEN in whole:
            continue
        stops = []
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(whole))
            stops.append(whole[at : at + rng.randrange(1, 9)] + ("#" if rng.random() < 0.2 else ""))
        at = ending(whole, tuple(stops))
        deltas, count = streamed(tokenizer, row, tuple(stops))
        assert "".join(deltas) == (whole if at is None else whole[:at]), (row, stops)
        # the first token after which the text, without what may still change, has one
        texts = [tokenizer.decode(row[:n]).rstrip(BROKEN) for n in range(1, len(row) + 1)]
        want = next((n for n, text in enumerate(texts, 1) if any(stop in text for stop in stops)), len(row))
        assert count == want, (row, stops)
        ended += at is not None
        overlong += any(len(stop) > len(tokenizer.decode([row[count - 1]])) for stop in stops)
    assert ended > 200
    assert overlong > 50


def test_the_text_does_not_depend_on_how_it_is_split_into_tokens() -> None:
    rng = random.Random(3)
    tokenizer = byte_level()
    single = {c: tokenizer.token_to_id(c) for c in "abc"}
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    pieces = ["ab", "ba", "abc", "cab", "aab", "bcb", "aa"]
    tokenizer.add_tokens(pieces)
    for _ in range(500):
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(1, 14)))
        stops = tuple("".join(rng.choice("abc") for _ in range(rng.randrange(1, 5))) for _ in range(2))
        row, rest = [], text
        while rest:
            piece = rng.choice([p for p in [rest[0], *pieces] if rest.startswith(p)])
            row.append(tokenizer.token_to_id(piece) if len(piece) > 1 else single[piece])
            rest = rest[len(piece) :]
        at = ending(text, stops)
        got, _ = streamed(tokenizer, row, stops)
        alone, _ = streamed(tokenizer, [single[c] for c in text], stops)
        assert "".join(got) == "".join(alone) == (text if at is None else text[:at]), (text, stops)


def test_what_may_become_a_stop_string_waits() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.token_to_id(c) for c in "abxabc"]
    stream = TextStream(tokenizer, ["abc"])
    assert [stream.push(i) for i in ids] == ["", "", "abx", "", "", ""]
    assert stream.finished
    stream = TextStream(tokenizer, ["abc"])
    assert [stream.push(i) for i in ids[:-1]] == ["", "", "abx", "", ""]
    assert stream.finish() == "ab"
    assert not stream.finished


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_rows_end_where_those_of_transformers_end(make: Any) -> None:
    tokenizer = make()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()))
    rng = random.Random(4)
    ended = 0
    for _ in range(60):
        text = " ".join(rng.choice(TEXTS[0].split()) for _ in range(9))
        row = tokenizer.encode(text, add_special_tokens=False).ids
        at = rng.randrange(2, len(text))
        # transformers looks at the tokens' own texts, the first of which has a space that decoding leaves out
        stops = (text[at : at + rng.randrange(1, 7)].lstrip(), "topp")
        if not stops[0]:
            continue
        criteria = transformers.StopStringCriteria(wrapped, list(stops))
        found = [bool(criteria(torch.tensor([row[:n]]), None)[0]) for n in range(1, len(row) + 1)]
        want = found.index(True) + 1 if any(found) else len(row)
        deltas, count = streamed(tokenizer, row, stops)
        assert count == want, (text, stops)
        assert not any(stop in "".join(deltas) for stop in stops)
        ended += any(found)
    assert ended > 40


def test_a_special_token_as_stop_string() -> None:
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<|end|>")
    ids = [tokenizer.token_to_id(c) for c in "ab"]
    stream = TextStream(tokenizer, ["<|end|>", "bc"])
    assert stream.push(tokenizer.token_to_id("<s>")) == ""
    assert [stream.push(i) for i in ids] == ["a", ""]
    assert (stream.push(end), stream.finished) == ("b", True)
    assert SPECIAL[2] == "<|end|>"
    with pytest.raises(ConfigError, match=r"holds the special token '<\|end\|>', which is not part of texts"):
        TextStream(tokenizer, ["\n<|end|>"])


def test_stop_strings_for_all_rows_or_each() -> None:
    assert check_stop_strings(None, 2) == [None, None]
    assert check_stop_strings("a", 2) == [("a",), ("a",)]
    assert check_stop_strings(["a", "b", "a"], 2) == [("a", "b"), ("a", "b")]
    assert check_stop_strings([["a"], None, "b", []], 4) == [("a",), None, ("b",), ()]
    assert check_stop_strings([], 3) == [(), (), ()]


@pytest.mark.parametrize(
    "stop", ["", ["a", ""], [["a"], [""]], [None, 3], [["a", 1], None], 5, {"a"}, b"a", [b"a", "b"]]
)
def test_stop_strings_that_are_none(stop: Any) -> None:
    with pytest.raises(ConfigError, match="stop must be"):
        check_stop_strings(stop, 2)


def test_stop_strings_for_other_rows() -> None:
    with pytest.raises(ConfigError, match="stop has 2 entries for 3 rows"):
        check_stop_strings([["a"], None], 3)
