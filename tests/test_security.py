"""docs/security.md promises nothing without a test: every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:tests|plugins)/[^`]+)`", TEXT)))


@pytest.mark.parametrize("named", NAMED)
def test_it_exists(named: str) -> None:
    file, _, test = named.partition("::")
    assert (ROOT / file).is_file()
    if file.startswith("tests/"):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_one() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        assert any(f"`{named}`" in row for named in NAMED), row
