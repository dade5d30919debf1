"""Three text classification tasks that are at hand wherever Python is: the docstrings of its standard library.

The sources are read as text and parsed; nothing of them is imported or run. Files, texts and labels are sorted before
a seeded shuffle, so the same Python version always gives the same tasks.
"""

from __future__ import annotations

import ast
import dataclasses
import random
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
PACKAGES = 32  # the packages with most docstrings
TEST_SIZE = 1000
DEV_SIZE = 500

Example = tuple[str, int]  # text, label


class Docstring(NamedTuple):
    """One documented object."""

    text: str
    package: str
    kind: str  # module, class, function or method
    returns: str | None  # "value" or "nothing" for functions and methods, None for the rest


@dataclasses.dataclass(frozen=True)
class Task:
    """A labelled question about docstrings. No text is in two of the three splits, and no text has two labels."""

    name: str
    question: str
    labels: tuple[str, ...]
    train: list[Example]
    dev: list[Example]  # for the search of learning rates
    test: list[Example]


def load_tasks() -> list[Task]:
    """`package`: which of 32 packages; `kind`: module, class, function or method; `returns`: a value or nothing."""
    docs = list(read_docstrings())
    return [
        _task("package", "which package is it from?", docs, train=2000),
        _task("kind", "what kind of object is it?", docs, train=1600, most_per_label=900),
        _task("returns", "does the function return a value?", docs, train=1600, most_per_label=1700),
    ]


def read_docstrings() -> Iterator[Docstring]:
    """Every docstring of the standard library's own sources."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # lib2to3 and others keep broken files on purpose
                continue
            yield from _walk(tree, parts[0].removesuffix(".py"), inside_class=False)


def _walk(node: ast.AST, package: str, *, inside_class: bool) -> Iterator[Docstring]:
    is_class = isinstance(node, ast.ClassDef)
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = " ".join((ast.get_docstring(node) or "").split())
        if text:
            function = "method" if inside_class else "function"
            kind = function if is_function else "class" if is_class else "module"
            yield Docstring(text, package, kind, _returns(node) if is_function else None)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, inside_class=is_class or (inside_class and not is_function))


def _returns(function: ast.AST) -> str:
    """Whether a function's own body yields, or returns anything but None."""
    nodes = list(ast.iter_child_nodes(function))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return "value"
        if isinstance(node, ast.Return) and not _is_none(node.value):
            return "value"
        nodes.extend(ast.iter_child_nodes(node))
    return "nothing"


def _is_none(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def _task(name: str, question: str, docs: list[Docstring], *, train: int, most_per_label: int | None = None) -> Task:
    """Texts with one label only (up to case), the most frequent labels, at most `most_per_label` texts each, split."""
    answers: dict[str, set[str]] = defaultdict(set)
    texts: dict[str, str] = {}
    for doc in docs:
        answer = getattr(doc, name)
        if answer is not None:
            answers[doc.text.lower()].add(answer)
            texts.setdefault(doc.text.lower(), doc.text)
    pairs = [(texts[key], *found) for key, found in sorted(answers.items()) if len(found) == 1]
    random.Random(0).shuffle(pairs)
    counts = Counter(label for _, label in pairs)
    labels = tuple(sorted(counts, key=lambda label: (-counts[label], label))[:PACKAGES])
    seen: Counter[str] = Counter()
    examples: list[Example] = []
    for text, label in pairs:
        if label in labels and (most_per_label is None or seen[label] < most_per_label):
            seen[label] += 1
            examples.append((text, labels.index(label)))
    random.Random(1).shuffle(examples)
    start = TEST_SIZE + DEV_SIZE
    return Task(
        name,
        question,
        labels,
        train=examples[start : start + train],
        dev=examples[TEST_SIZE:start],
        test=examples[:TEST_SIZE],
    )
