"""Files that come from strangers, and outputs that are complete or absent.

Inputs are opened by `open_input` and its relatives, which neither wait nor read without end: whatever stands there
must be a regular file, and no more is read of it than a limit allows.

Outputs are written under a temporary name beside their place, made durable, and moved there. What stands under the
temporary name, `.<name>.<16 hex digits>.tmp` and the suffix of a file, is locked while its writer lives. What a killed
writer left is removed when the same output is begun again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ConfigError, OutputError, SdctError, UnsupportedError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has no flock; there the folders of killed writers stay
    fcntl = None

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_LARGEST_TEXTS = 1 << 30  # bytes
# opening never waits for the other end of a pipe
_INPUT = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_READ = _INPUT | getattr(os, "O_NOFOLLOW", 0)
_WRITE = _READ if os.name != "nt" else os.O_RDWR  # Windows synchronises only what is open for writing
# what file systems answer that do not know a call; a folder that may not be read cannot be synchronised either
_REFUSED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_NO_REPLACE, _EXCHANGE = 1, 2  # RENAME_NOREPLACE and RENAME_EXCHANGE of renameat2
_NO_SYNC = _REFUSED | {errno.EBADF, errno.EACCES, errno.EISDIR}


def check_adapter_name(name: object) -> str:
    """`name` if it can name an adapter (letters, digits, `_`, `-`; at most 128; no dots, slashes or spaces)."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"adapter name {name!r} is not allowed; use 1 to 128 letters, digits, '_' or '-', "
            "starting with a letter or digit"
        )
    return name


def folder_name(path: str | Path) -> str:
    """What a person calls a folder: the last part of its path, of a link its own name and not that of its target."""
    return os.path.basename(os.path.abspath(path))  # noqa: PTH100, PTH119, since Path.resolve follows links


@contextlib.contextmanager
def new_folder(path: str | Path, *, may_replace: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path` and move it to `path` when the block ends without an error.

    It is on the disk, not only in memory, when the block has ended. Of several writers at once exactly one succeeds,
    or, where they may replace, the last one. A folder is replaced in one step where the system can swap two (Linux);
    elsewhere a crash between two steps leaves the old one whole as `.<name>.<16 hex digits>.old` beside it.

    Args:
        path: the folder to make.
        may_replace: called with `path` where something stands there; raises `OutputError` where that must stay.
            Without it nothing is ever replaced.

    Raises:
        OutputError: `path` exists already and may not be replaced, its parent cannot be made, or the disk refused a
            write.
    """
    target = Path(path)
    if may_replace is None:
        refuse_existing(target)
    elif os.path.lexists(target):
        may_replace(target)
    with _locked(target, folder=True) as work:
        yield work
        _sync_tree(work)
        if may_replace is not None and os.path.lexists(target):
            may_replace(target)  # again, for what happened meanwhile
            _swap(work, target)
        else:
            _move_new(work, target)


@contextlib.contextmanager
def new_file(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`, to write into, and move it to `path` when the block ends well.

    Its content is on the disk when the block has ended. Of several writers at once without `overwrite` exactly one
    succeeds.

    Raises:
        OutputError: the disk refused a write, or `path` exists and `overwrite` is false.
    """
    target = Path(path)
    if not overwrite:
        refuse_existing(target)
    with _locked(target, folder=False) as work:
        yield work
        _sync(work, _WRITE)
        if overwrite:
            os.replace(work, target)
        else:
            _move_new(work, target)


def refuse_existing(target: str | Path) -> None:
    """Raise `OutputError` where something stands at `target` or in its way, to fail before long work, not after it."""
    if os.path.lexists(target):
        raise OutputError(f"{target} exists already; choose another output or remove it first")
    above = next((parent for parent in Path(target).parents if os.path.lexists(parent)), Path())
    if not os.path.isdir(above):  # noqa: PTH112, since Path.is_dir raises for a name that is too long
        raise OutputError(f"cannot write {target}: {above} is no folder; choose another output")
    if not os.access(above, os.W_OK):
        raise OutputError(f"cannot write {target}: {above} may not be written to; choose another output")


def check_text(target: str | Path, reader: str) -> None:
    """Raise `OutputError` where the name of an output is no Unicode, so that `reader` could not open it."""
    try:
        str(Path(target).absolute()).encode()
    except UnicodeEncodeError:
        raise OutputError(
            f"cannot write {target}: {reader} opens no path that is not valid Unicode; choose another output"
        ) from None


@contextlib.contextmanager
def open_input(path: Path, error: type[SdctError], advice: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file of a stranger to read it: the open file and its size. Only what the descriptor says is believed.

    Args:
        path: the file, or a link to it.
        error: what to raise.
        advice: what the person can do, the end of the message.

    Raises:
        error: it is missing, no regular file (a pipe would block, a device never end), or opening or reading failed.
    """
    try:
        opened = os.open(path, _INPUT)
        try:
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path} is not a regular file; {advice}")
            with os.fdopen(opened, "rb", closefd=False) as file:
                yield file, status.st_size
        finally:
            os.close(opened)
    except FileNotFoundError:
        raise error(f"{path} is missing; {advice}") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from problem


def read_input(path: Path, limit: int, error: type[SdctError], advice: str) -> bytes:
    """The content of a file of a stranger, which may have up to `limit` bytes. Raises as `open_input`."""
    with open_input(path, error, advice) as (file, size):
        if size > limit:
            raise error(f"{path} has {size} bytes, it may have up to {limit}; {advice}")
        data = file.read(size + 1)
        if len(data) > size:
            raise error(f"{path} is larger than its size says; {advice}")
        return data


def read_texts(texts: Sequence[str] | str | Path) -> list[str]:
    """The texts, of a file its lines; without empty ones and repetitions.

    Raises:
        ConfigError: they are no strings, or the file cannot be read or is no UTF-8 text.
    """
    advice = "give a UTF-8 file with one text a line"
    if isinstance(texts, str | Path):
        data = read_input(Path(texts), _LARGEST_TEXTS, ConfigError, advice)
        try:
            whole = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{texts} is not UTF-8 text (byte {error.start}); {advice}") from None
        if "\0" in whole:
            raise ConfigError(f"{texts} is a binary file; {advice}")
        texts = whole.split("\n")
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError("texts must be a list of strings, or a file with one text a line")
    return list(dict.fromkeys(filter(None, map(str.strip, texts))))


def read_json(path: Path, limit: int, error: type[SdctError], advice: str, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in a file of a stranger. Raises as `read_input`, and where the file holds something else.

    With `unique`, no field may be repeated.
    """
    data = read_input(path, limit, error, advice)
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_fields if unique else None)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not valid JSON ({problem}); {advice}") from problem
    if not isinstance(raw, dict):
        raise error(f"{path} must hold a JSON object, got {type(raw).__name__}; {advice}")
    return raw


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"repeated field {name!r}")
        fields[name] = value
    return fields


def available_memory() -> int | None:
    """Bytes that this machine can give without swapping, None where it does not say (Linux does)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def copy_inside(root: Path, file: Path, target: Path) -> None:
    """Copy `file`, found below the folder `root` of a stranger, to `target`; a link must not lead out of `root`.

    Else a link to any file that this user can read would publish it. In a hub cache files are links into the `blobs`
    of the same repository, and those may be followed.

    Raises:
        UnsupportedError: the file is a link that leads elsewhere.
        OSError: it cannot be read, or `target` cannot be written.
    """
    real, home = file.resolve(), root.resolve()
    blobs = [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
    if not any(real.is_relative_to(place) for place in (home, *blobs)):
        raise UnsupportedError(
            f"{file} is a link to {real}, outside of {root}, and is not copied; put the file itself there, or remove "
            "the link"
        )
    with os.fdopen(os.open(real, _READ), "rb") as source, target.open("wb") as copied:
        shutil.copyfileobj(source, copied, 1 << 20)


@contextlib.contextmanager
def _locked(target: Path, *, folder: bool) -> Iterator[Path]:
    """A locked temporary folder or file beside `target`, gone afterwards; then the folders above are synchronised.

    It is made with the mode of a plain write, from which the kernel takes the umask: to ask for the umask is to change
    it for a moment, in all threads.
    """
    try:
        parents = _make_parents(target)
        _remove_abandoned(target)
        work, lock = _make_locked(target, folder)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield work
    except OSError as error:
        if isinstance(error, FileExistsError):
            refuse_existing(target)  # another writer was faster
        raise OutputError(f"writing {target} failed: {error.strerror or error}; nothing was left there") from error
    finally:
        _remove(work)
        if lock is not None:
            os.close(lock)
    try:
        for parent in parents:
            _sync(parent, os.O_RDONLY)  # which may be reached through a link
    except OSError as error:
        raise OutputError(
            f"{target} was written, but the disk does not confirm it ({error.strerror or error}); check the disk"
        ) from error


def _make_parents(target: Path) -> list[Path]:
    """Make the folders above `target`; those whose entries change, the nearest first."""
    changed = [target.parent]
    while not changed[-1].exists():
        changed.append(changed[-1].parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    return changed


def _make_locked(target: Path, folder: bool) -> tuple[Path, int | None]:
    """A new folder or file for `target`, and the descriptor that holds its lock, None where there are no locks."""
    while True:
        work = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp{'' if folder else target.suffix}"
        if folder:
            work.mkdir()
        else:
            work.touch(exist_ok=False)
        if fcntl is None:
            return work, None
        try:
            lock = os.open(work, _READ)
        except FileNotFoundError:
            continue  # as below
        if _lock(lock) is not False and work.exists():
            return work, lock
        os.close(lock)  # another writer took it for abandoned before it was locked


def _lock(opened: int) -> bool | None:
    """Whether a folder or file could be locked, None where its file system has no locks."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_abandoned(target: Path) -> None:
    """Remove what stands under temporary names for `target` and can be locked: its writer has died."""
    if fcntl is None:
        return
    name = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.tmp(" + re.escape(target.suffix) + ")?")
    for found in filter(name.fullmatch, os.listdir(target.parent)):  # noqa: PTH208, for its speed
        try:
            opened = os.open(target.parent / found, _READ)
        except OSError:
            continue
        try:
            if _lock(opened):
                _remove(target.parent / found)
        finally:
            os.close(opened)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    """Have the disk hold all files below `folder`, and the names of its folders."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(place, name)
            if not file.is_symlink():
                _sync(file, _WRITE)
        _sync(Path(place), _READ)


def _sync(path: Path, flags: int) -> None:
    try:
        opened = os.open(path, flags)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _move_new(work: Path, target: Path) -> None:
    """Move `work` to `target`, which must not exist. Raises `FileExistsError` where it does, an empty folder too."""
    folder = work.is_dir()
    try:
        if folder:
            _rename_new(work, target)
        else:
            os.link(work, target)
        return
    except OSError as error:
        if error.errno not in _REFUSED | {errno.EMLINK}:
            raise
    # first claim the name, which one writer can, then replace the claim
    if folder:
        target.mkdir()
    else:
        target.touch(exist_ok=False)
    try:
        os.replace(work, target)
    except OSError:
        with contextlib.suppress(OSError):
            (Path.rmdir if folder else Path.unlink)(target)
        raise


def _swap(work: Path, target: Path) -> None:
    """Put the folder `work` in the place of `target`, and what stood there in that of `work`."""
    try:
        _rename(work, target, _EXCHANGE)
        return
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    old = target.parent / f".{target.name}.{secrets.token_hex(8)}.old"  # which no writer takes for abandoned
    os.rename(target, old)
    try:
        os.rename(work, target)
    except OSError:
        os.rename(old, target)
        raise
    os.rename(old, work)


def _rename_new(work: Path, target: Path) -> None:
    """`os.rename` that never replaces anything, where POSIX replaces an empty folder. Raises `OSError`."""
    if os.name == "nt":
        os.rename(work, target)
    else:
        _rename(work, target, _NO_REPLACE)


def _rename(work: Path, target: Path, flag: int) -> None:
    """Linux' `renameat2`. Raises `OSError`, with one of `_REFUSED` where the system or the disk does not know it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # macOS has no such function, Windows no such library
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    here = -100  # AT_FDCWD
    if rename(here, os.fsencode(work), here, os.fsencode(target), flag) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
