"""The examples' own parts, the demo end to end on a few texts, and the numbered examples, which assert parity."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sdct_export.cli import main
from sdct_export.runtime import MultiAdapterModel

EXAMPLES = Path(__file__).parent.parent / "examples"
README = EXAMPLES.parent / "README.md"
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


@pytest.fixture(scope="module")
def few_tasks() -> Any:
    """64 training texts a task: the numbers mean little, but they are those of what was trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from docstrings import load_tasks

        return [dataclasses.replace(task, train=task.train[:64], test=task.test[:40]) for task in load_tasks()]


@pytest.fixture(scope="module")
def demo_out(few_tasks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the demo writes and prints; it exits with an error where a check fails."""
    out = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(str(EXAMPLES))
        import demo

        patch.setattr(demo, "load_tasks", lambda: few_tasks)
        patch.setattr(demo, "EPOCHS", dict.fromkeys(demo.EPOCHS, 1))
        patch.setattr(demo, "CHECKED", 10)
        patch.setattr(demo, "OUT", out)
        demo.main()
    return out, printed.getvalue()


def test_demo_runs_end_to_end(demo_out: tuple[Path, str]) -> None:
    """Every file, check and line of the table is there."""
    out, printed = demo_out
    assert "the base row is bit for bit as without adapters" in " ".join(printed.split())
    record = json.loads((out / "results.json").read_text())
    frozen, lora, sdct = record["results"]
    assert (frozen["parameters"], lora["parameters"], sdct["parameters"]) == (0, 73_728, 8_400)
    assert set(sdct["accuracy"]) == {"package", "kind", "returns"}
    assert max(sdct["file_bytes"].values()) < min(lora["file_bytes"].values())
    assert 0 < record["mixed_batch"]["gap_to_merged"] < 1e-4
    assert (out / "demo.png").stat().st_size > 20_000
    assert {path.name for path in out.iterdir()} == {
        "adapters", "bundle", "merged", "lora", "results.json", "demo.png",
    }  # fmt: skip


def readme_commands() -> list[list[str]]:
    """The shell lines of the README, and the option that it adds to those which load the demo's class."""
    text = README.read_text(encoding="utf-8")
    found = [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("sdct-export ")]
    (model_class,) = re.findall(r"`--model-class (finetuning:\w+)`", text)
    for command in found:
        if "--model" in command:
            command += ["--model-class", model_class]
    return found


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the example of a language model writes and prints; it asserts what it says."""
    out = tmp_path_factory.mktemp("language_model")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(sys, "argv", ["05_language_model.py", str(out)])
        runpy.run_path(str(EXAMPLES / "05_language_model.py"), run_name="__main__")
    return out, printed.getvalue()


def test_the_language_model_answers_as_its_adapters_say(language_model: tuple[Path, str]) -> None:
    """From the shell, in one batch; each row as its adapter was trained."""
    out, printed = language_model
    assert "largest difference from torch" in printed
    question = "What colour is the sea?"
    told = ["--chat", *(part for name in ("none", "french", "loud") for part in ("--adapter", name))]
    result = CliRunner().invoke(main, ["generate", str(out / "bundle"), *[question] * 3, *told, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["text"] for row in rows] == ["The sea is blue.", "La mer est bleue.", "THE SEA IS BLUE!"]
    assert [row["finish"] for row in rows] == ["stop"] * 3


def test_the_lines_of_the_readme_give_the_accuracies_of_the_demo(
    demo_out: tuple[Path, str],
    language_model: tuple[Path, str],
    few_tasks: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One after the other in one folder, where its names stand for what the demo wrote."""
    import finetuning

    out, _ = demo_out
    names = {"bert": finetuning.minilm(), "legal": out / "adapters" / "kind", "medical": out / "adapters" / "returns"}
    made = {"lora": out / "lora" / "package", "lm": language_model[0]}
    for name, folder in (names | made).items():
        (tmp_path / name).symlink_to(folder.resolve())
    package = next(task for task in few_tasks if task.name == "package")
    (tmp_path / "mine.txt").write_text("\n".join(" ".join(text.split()) for text, _ in package.train))
    monkeypatch.chdir(tmp_path)
    commands = readme_commands()
    assert [command[0] for command in commands] == ["--model", "distill", "inspect", "verify", "run", "generate"]
    printed = {}
    for command in commands:
        result = CliRunner().invoke(main, command)
        printed[command[0]] = result.stdout
        assert result.exit_code == 0, (command, result.output, result.exception)
        barely_trained = command[0] == "distill" and "training brought the adapter no nearer" in result.stderr
        assert result.stderr == "" or barely_trained, (command, result.stderr)
    assert (tmp_path / "spectrum.png").stat().st_size > 20_000
    assert "legal" in printed["run"].splitlines()[1].split("\t")
    assert printed["generate"] == "Le ciel est bleu.\n"

    tasks = {
        name: next(t for t in few_tasks if t.name == folder.name) for name, folder in names.items() if name != "bert"
    }
    trained = json.loads((out / "results.json").read_text())["results"][2]["accuracy"]
    tokenizer, model = finetuning.load_tokenizer(), MultiAdapterModel("bundle")
    for name, task in tasks.items():
        encoded = finetuning.encode(tokenizer, task.test)
        inputs = {key: tensor.numpy() for key, tensor in finetuning.pad([ids for ids, _ in encoded]).items()}
        answers = model.run(inputs, name)["logits"].argmax(-1)
        assert (answers == [label for _, label in encoded]).mean() == trained[task.name]

        # from the shell, of the texts that the demo does not cut
        rows = [i for i, (ids, _) in enumerate(encoded) if len(ids) < finetuning.MAX_TOKENS]
        assert len(rows) > len(encoded) / 2
        texts = [part for i in rows for part in ("--text", task.test[i][0])]
        result = CliRunner().invoke(main, ["run", "bundle", *texts, "--adapter", name, "--json"])
        assert [row["label"] for row in json.loads(result.stdout)["rows"]] == answers[rows].tolist()
        base = model.run(inputs)["logits"].argmax(-1)
        assert (base != answers).any()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n.startswith("04") else pytest.mark.slow) for n in SHORT if n[:2] != "05"]
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
