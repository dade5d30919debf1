"""What all commands share: how errors end a command, and how results are shown on a terminal and in a pipe."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from .. import signals
from ..errors import BaseMismatchError, SdctError, missing_package

# what libraries say in errors of their own where the memory does not suffice
_NO_MEMORY = ("allocate memory", "out of memory", "failed to allocate", "map segment", "bad_alloc", "start new thread")

_LONGEST = 4000  # characters of an error


class Main(click.Group):
    """A group whose commands end with one line `error: ...` on standard error.

    The exit code is 1 where the user can mend it, and 128 + its number where a signal ended the command.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line."""
        with signals.handled():
            try:
                return super().main(*args, **kwargs)
            except signals.Interrupted as stop:
                line, code = str(stop), 128 + stop.number
            except (Exception, SystemExit) as error:
                stopped = signals.received()  # on its way it may have become another error, or none
                found = str(stopped) if stopped else _line(error)
                if found is None:
                    raise
                line, code = found, 128 + stopped.number if stopped else 1
            # here the error and the frames it holds are gone, since memory may be short
            click.echo(f"error: {message(line)}", err=True)
            sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; warnings are lines, too."""
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):  # from one library to another, not to the person
                warnings.simplefilter("ignore", category)
            warnings.showwarning = lambda told, *_, **__: click.echo(f"warning: {message(str(told))}", err=True)
            return super().invoke(ctx)


class BasePath(click.Path):
    """A base model: a folder, or a name on the hub, which nothing with a slash at its end is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, which forgets the slash."""
        if str(value).endswith(("/", os.sep)) and not os.path.isdir(value):  # noqa: PTH112, raises nothing
            raise BaseMismatchError(f"cannot load a base model from {value}: there is no such folder; check the path")
        return super().convert(value, param, ctx)


def _line(error: BaseException) -> str | None:
    """What to say of an error that the user can mend, None for any other."""
    if isinstance(error, SystemExit):
        return None
    if isinstance(error, SdctError | OSError):
        return str(error)
    if (missing := missing_package(error)) is not None:
        return missing
    whole = str(error).strip() or type(error).__name__
    text = whole.splitlines()[0]
    if isinstance(error, MemoryError) or any(words in whole.lower() for words in _NO_MEMORY):
        return f"not enough memory ({text}); free some, or use a machine with more"
    if isinstance(error, UnicodeEncodeError):
        return f"a name or text is not valid Unicode ({text}); rename it"
    return None


def print_json(value: object) -> None:
    """`value` as one JSON document on standard output; NaN and infinite numbers, which JSON lacks, become null."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> None:
    """A table on a terminal, its columns `right` aligned right; tab-separated lines in a pipe."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if not (sys.stdout and sys.stdout.isatty()):  # None where the caller has closed it
        for row in [list(columns), *cells]:
            click.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))  # Text: a name with brackets is no markup
    Console().print(table)


def printable(text: str) -> str:
    """`text` from a file, safe to print in one line: control characters and lone surrogates are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def message(text: str) -> str:
    """The text of an error, safe to print: cut where a file made it long, and no line of it passes for another."""
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text)} characters)"
    return "\n  ".join(printable(line) for line in short.split("\n"))


@contextlib.contextmanager
def importable_here(model_class: str | None) -> Iterator[None]:
    """Inside the block a class that the person names is found in the current folder, too."""
    before = sys.path[:]
    if model_class is not None:
        sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Show a spinner on standard error while the block runs, on a terminal only."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield
