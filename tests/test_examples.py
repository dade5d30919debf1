"""The examples' own parts, the demo end to end on a few texts, and the numbered examples, which assert parity."""

from __future__ import annotations

import ast
import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = sorted(path.name for path in EXAMPLES.glob("[0-9]*.py"))


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_tasks_are_disjoint_unambiguous_and_repeatable() -> None:
    from docstrings import load_tasks

    tasks = load_tasks()
    assert [len(task.labels) for task in tasks] == [32, 4, 2]
    for task in tasks:
        splits = [[text.lower() for text, _ in split] for split in (task.train, task.dev, task.test)]
        texts = [text for split in splits for text in split]
        assert len(texts) == len(set(texts)), "a text is in two splits, or twice in one"
        assert min(map(len, splits)) >= 500
        assert {label for _, label in task.train} == set(range(len(task.labels)))
    assert load_tasks() == tasks


def test_labels_are_read_from_the_source() -> None:
    from docstrings import _walk

    source = '''
"""A module."""
class Shape:
    """A shape."""
    def area(self):
        """Its area."""
        return 1
    def draw(self):
        """Draw it."""
        def helper():
            """Help."""
            return 2
        if helper():
            return
        return None
async def stream():
    """All shapes."""
    yield Shape()
'''
    found = {doc.text: (doc.kind, doc.returns) for doc in _walk(ast.parse(source), "pkg", inside_class=False)}
    assert found == {
        "A module.": ("module", None),
        "A shape.": ("class", None),
        "Its area.": ("method", "value"),
        "Draw it.": ("method", "nothing"),
        "Help.": ("function", "value"),
        "All shapes.": ("function", "value"),
    }


def test_batches_hold_every_row_once_and_pad_behind_the_mask() -> None:
    import finetuning

    data = [(list(range(1, 2 + i % 7)), i) for i in range(45)]
    seen: list[int] = []
    for inputs, labels in finetuning.batches(data, 4, seed=3):
        for row, mask, label in zip(inputs["input_ids"], inputs["attention_mask"], labels, strict=True):
            assert row[mask == 1].tolist() == data[int(label)][0]
            assert not row[mask == 0].any()
            seen.append(int(label))
    assert sorted(seen) == list(range(45))
    assert seen != list(range(45))


def test_demo_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """64 training texts a task: the numbers mean nothing, but every file, check and line of the table is there."""
    import demo
    from docstrings import load_tasks

    few = [dataclasses.replace(task, train=task.train[:64], test=task.test[:40]) for task in load_tasks()]
    monkeypatch.setattr(demo, "load_tasks", lambda: few)
    monkeypatch.setattr(demo, "EPOCHS", dict.fromkeys(demo.EPOCHS, 1))
    monkeypatch.setattr(demo, "CHECKED", 10)
    monkeypatch.setattr(demo, "OUT", tmp_path / "out")
    demo.main()  # exits with an error where a check fails
    printed = capsys.readouterr().out
    assert "the base row is bit for bit the base" in " ".join(printed.split())
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    frozen, lora, sdct = record["results"]
    assert (frozen["parameters"], lora["parameters"], sdct["parameters"]) == (0, 73_728, 8_400)
    assert set(sdct["accuracy"]) == {"package", "kind", "returns"}
    assert max(sdct["file_bytes"].values()) < min(lora["file_bytes"].values())
    assert 0 < record["mixed_batch"]["gap_to_merged"] < 1e-4
    assert (tmp_path / "out" / "demo.png").stat().st_size > 20_000
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapters", "bundle", "merged", "lora", "results.json", "demo.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n.startswith("04") else pytest.mark.slow) for n in SHORT]
)
def test_short_examples_run(name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each raises where its model does not compute what torch computes."""
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "largest difference" in capsys.readouterr().out


def test_examples_are_short() -> None:
    assert len(SHORT) >= 4
    for name in SHORT:
        lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 90, f"{name} has {len(lines)} lines; an example is read, not studied"
