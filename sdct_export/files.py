"""Outputs that are complete or absent: written under a temporary name beside their place, then moved there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import ConfigError, OutputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def check_adapter_name(name: object) -> str:
    """`name` if it can name an adapter (letters, digits, `_`, `-`; at most 128; no dots, slashes or spaces)."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"adapter name {name!r} is not allowed; use 1 to 128 letters, digits, '_' or '-', "
            "starting with a letter or digit"
        )
    return name


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` and move it to `path` when the block ends without an error.

    Raises:
        OutputError: `path` exists already, its parent cannot be made, or the disk refused a write.
    """
    target = Path(path)
    refuse_existing(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield work
        refuse_existing(target)
        work.chmod(0o777 & ~_umask())
        os.rename(work, target)
    except OSError as error:
        raise OutputError(f"writing {target} failed: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary file name beside `path` and move it to `path` when the block ends without an error.

    Raises:
        OutputError: the disk refused a write, or `path` exists and `overwrite` is false.
    """
    target = Path(path)
    if not overwrite:
        refuse_existing(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    work = Path(name)
    try:
        yield work
        work.chmod(0o666 & ~_umask())
        os.replace(work, target)
    except OSError as error:
        raise OutputError(f"writing {target} failed: {error.strerror or error}; nothing was left there") from error
    finally:
        work.unlink(missing_ok=True)


def refuse_existing(target: str | Path) -> None:
    """Raise `OutputError` where something stands at `target`, to fail before long work rather than after it."""
    if os.path.lexists(target):
        raise OutputError(f"{target} exists already; choose another output or remove it first")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
