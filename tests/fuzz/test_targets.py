"""The fuzzing targets without the fuzzer: valid files are taken, so that fuzzing begins behind the first check."""

from __future__ import annotations

import random

import pytest
from fuzz import PLANTED, change_file, pack, unpack
from targets import TARGETS, planted


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_taken_and_changed_ones_end_in_our_errors(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    assert seeds
    for files in seeds:
        assert target(files)
    rng = random.Random(7)
    refused = 0
    for _ in range(60):
        files = list(rng.choice(seeds))
        at = rng.randrange(len(files))
        files[at] = change_file(files[at], rng, lambda content, most: rng.randbytes(1) + content[1:])
        refused += not target(files)
    if name != "command":  # which parses what a person types, and has no file to refuse
        assert refused


def test_files_are_packed_without_loss_and_any_bytes_are_files() -> None:
    files = [b"", b"{}", bytes(300)]
    assert unpack(pack(files)) == files
    assert unpack(b"\xff\xff\xff\xffab") == [b"ab"]
    assert unpack(b"ab") == []


def test_the_planted_fault_is_one() -> None:
    assert PLANTED not in TARGETS
    planted([b'{"a": 1}'])
    with pytest.raises(ValueError, match="planted"):
        planted([b'{"a": [-1]}'])
