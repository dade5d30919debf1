"""Inputs never hang; outputs are complete or absent: through power loss, races, killed writers, poor file systems."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from sdct_export import files
from sdct_export.errors import BaseMismatchError, OutputError, UnsupportedError
from sdct_export.files import new_file, new_folder, read_input, read_json

Writer = Callable[[Path], AbstractContextManager[Path]]


def folder_with_files(target: Path) -> None:
    with new_folder(target) as work:
        (work / "a").write_text("a")
        (work / "sub").mkdir()
        (work / "sub" / "b").write_text("b")


def one_file(target: Path) -> None:
    with new_file(target) as work:
        work.write_text("a")


def new_only(target: Path) -> AbstractContextManager[Path]:
    return new_file(target, overwrite=False)


# power loss


@pytest.mark.parametrize(("write", "before"), [(folder_with_files, {"a", "b", "sub", "WORK"}), (one_file, {"WORK"})])
def test_all_is_on_the_disk_before_the_move_and_the_move_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], before: set[str]
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    target = tmp_path / "link" / "deep" / "er" / "out"
    synced: list[tuple[str, bool]] = []
    sync = os.fsync

    def record(opened: int) -> None:
        path = Path(f"/proc/self/fd/{opened}").readlink()
        synced.append(("WORK" if path.suffix == ".tmp" else path.name, target.exists()))
        sync(opened)

    monkeypatch.setattr(os, "fsync", record)
    write(target)
    assert {name for name, moved in synced if not moved} == before
    assert [name for name, moved in synced if moved] == ["er", "deep", "real"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_synchronise_folders_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(opened: int) -> None:
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    folder_with_files(tmp_path / "out")
    one_file(tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize("write", [folder_with_files, one_file])
def test_a_disk_that_fails_to_synchronise_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    def fail(opened: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="Input/output error; nothing was left there"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# modes


def test_modes_are_those_of_the_umask_which_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to all threads"))
            folder_with_files(tmp_path / "out")
            one_file(tmp_path / "file")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "out/sub", "out/a", "file")}
    assert modes == {"out": 0o750, "out/sub": 0o750, "out/a": 0o640, "file": 0o640}


# inputs


@contextmanager
def soon() -> Iterator[None]:
    """Fail where the block waits for something that never comes."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(path: Path, limit: int = 1000) -> bytes:
    with soon():
        return read_input(path, limit, BaseMismatchError, "copy it again")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read(tmp_path / "file") == read(tmp_path / "link", limit=7) == b"content"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "endless", "folder"):
        with pytest.raises(BaseMismatchError, match=rf"{name} is not a regular file; copy it again"):
            read(tmp_path / name)
    with pytest.raises(BaseMismatchError, match="none is missing; copy it again"):
        read(tmp_path / "none")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(BaseMismatchError, match="circle cannot be read: Too many levels"):
        read(tmp_path / "circle")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for name in ("pipe", "folder"):
        with pytest.raises(BaseMismatchError):
            read(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_no_more_is_read_than_the_limit_and_the_size(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BaseMismatchError, match=rf"has {1 << 40} bytes, it may have up to 1000; copy it again"):
        read(tmp_path / "sparse")
    (tmp_path / "grows").symlink_to("/proc/self/status")  # a file of size 0 that has content
    with pytest.raises(BaseMismatchError, match="larger than its size says"):
        read(tmp_path / "grows")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"9" * 10_000, "not valid JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        (b'{"a": 1, "a": 2}', "repeated field 'a'"),
    ],
)
def test_json_of_strangers(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BaseMismatchError, match=rf"x\.json .*{message}.*; copy it again"):
        read_json(tmp_path / "x.json", 1 << 20, BaseMismatchError, "copy it again", unique=True)


def test_many_fields_of_which_one_is_repeated_take_no_time(tmp_path: Path) -> None:
    text = ",".join(f'"{n}":0' for n in range(100_000))
    (tmp_path / "x.json").write_text(f'{{{text},"99999":0}}')
    with soon(), pytest.raises(BaseMismatchError, match="repeated field '99999'"):
        read_json(tmp_path / "x.json", 4 << 20, BaseMismatchError, "", unique=True)


# links


def test_links_are_followed_within_a_folder_and_within_its_hub_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "1a2b"
    for folder in (snapshot / "sub", repository / "blobs", tmp_path / "models--owner--other" / "blobs"):
        folder.mkdir(parents=True)
    for file in (repository / "blobs" / "x", tmp_path / "models--owner--other" / "blobs" / "x", snapshot / "plain"):
        file.write_text(file.parent.name)
    links = {
        "good": "../../blobs/x", "sub/good": "../../../blobs/x", "own": "plain",
        "other": "../../../models--owner--other/blobs/x", "refs": "../../refs", "root": "/etc/passwd",
    }  # fmt: skip
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
    (tmp_path / "short").symlink_to(snapshot)
    for root in (snapshot, tmp_path / "short"):
        for name in ("plain", "own", "good", "sub/good"):
            files.copy_inside(root, root / name, tmp_path / "copy")
            assert (tmp_path / "copy").read_text() == ("blobs" if "good" in name else "1a2b")
        (tmp_path / "copy").unlink()
        for name in ("other", "refs", "root"):
            with pytest.raises(UnsupportedError, match=r"is a link to .* outside of"):
                files.copy_inside(root, root / name, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
    (tmp_path / "plain" / "blobs").mkdir(parents=True)
    (tmp_path / "plain" / "blobs" / "x").write_text("")
    (tmp_path / "plain" / "a" / "b").mkdir(parents=True)
    (tmp_path / "plain" / "a" / "b" / "x").symlink_to("../../blobs/x")  # no hub cache: there is no `snapshots`
    with pytest.raises(UnsupportedError, match="outside of"):
        files.copy_inside(tmp_path / "plain" / "a" / "b", tmp_path / "plain" / "a" / "b" / "x", tmp_path / "copy")


# races


def race(write: Writer, target: Path, writers: int = 8) -> list[str]:
    """Let several writers end at once; what each met, "won" for none."""
    barrier, results = threading.Barrier(writers, timeout=30), []

    def run() -> None:
        try:
            with write(target):
                barrier.wait()
            results.append("won")
        except OutputError as error:
            results.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def refuse(*args: object, **kwargs: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("write", [new_folder, new_only])
@pytest.mark.parametrize("plain", [False, True], ids=["native", "without-links"])
def test_of_several_writers_exactly_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Writer, plain: bool
) -> None:
    if plain:
        monkeypatch.setattr(files, "_rename_new", refuse)
        monkeypatch.setattr(os, "link", refuse)
    for attempt in range(10):
        results = race(write, tmp_path / f"out{attempt}")
        assert results.count("won") == 1
        assert all("exists already; choose another output" in text for text in results if text != "won")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"out{attempt}" for attempt in range(10))


@pytest.mark.parametrize("plain", [False, True], ids=["native", "without-links"])
def test_an_empty_folder_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    if plain:
        monkeypatch.setattr(files, "_rename_new", refuse)
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"), new_folder(target):
        target.mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert list(target.iterdir()) == []


def test_a_claim_is_given_back_where_the_move_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(files, "_rename_new", refuse)
    for write in (new_folder, new_only):
        with pytest.raises(OutputError, match="nothing was left there"), write(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []


# litter

WRITE = """
import sys, time
from pathlib import Path
from sdct_export import files
with getattr(files, sys.argv[1])(sys.argv[2]) as work:
    (work / "half" if work.is_dir() else work).write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def start(kind: str, target: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing `target`."""
    process = subprocess.Popen([sys.executable, "-c", WRITE, kind, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize(("kind", "name"), [("new_folder", "out"), ("new_file", "out.txt")])
def test_what_a_killed_writer_left_goes_when_the_output_is_begun_again(tmp_path: Path, kind: str, name: str) -> None:
    writers = [start(kind, tmp_path / target) for target in (name, f"other-{name}", name)]
    try:
        found = {p.name for p in tmp_path.iterdir()}
        assert len(found) == 3
        (tmp_path / f".{name}.0123.tmp").mkdir()  # no name of ours
        writers[2].send_signal(signal.SIGKILL)
        writers[2].wait()
        with getattr(files, kind)(tmp_path / name):
            now = {p.name for p in tmp_path.iterdir()}
        assert len(found & now) == 2  # those of the living writers, of this target and of another
        assert len(now) == 4
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    files._remove(tmp_path / name)
    for target in (name, f"other-{name}"):
        with getattr(files, kind)(tmp_path / target):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f".{name}.0123.tmp", f"other-{name}", name])


def test_a_folder_taken_for_abandoned_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []
    lock = files._lock

    def late(opened: int) -> bool | None:
        if not taken:
            taken.append(Path(f"/proc/self/fd/{opened}").readlink())
            taken[0].rmdir()
        return lock(opened)

    monkeypatch.setattr(files, "_lock", late)
    folder_with_files(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "sub"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_locks_outputs_are_written_and_nothing_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.0123456789abcdef.tmp").mkdir()
    for broken in (None, type("NoLocks", (), {"LOCK_EX": 2, "LOCK_NB": 4, "flock": staticmethod(refuse)})):
        monkeypatch.setattr(files, "fcntl", broken)
        one_file(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.0123456789abcdef.tmp", "out"]


def test_what_stands_in_the_way_of_an_output_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for target in ("file/x", "file/x/y", tmp_path / "file" / "x"):
        for write in (files.refuse_existing, lambda path: files.new_folder(path).__enter__()):
            with pytest.raises(OutputError, match=r"cannot write .*file.x.*: .*file is no folder"):
                write(target)
    files.refuse_existing("new/x")
    files.refuse_existing("x" * 5000)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match=r"cannot write new/x: \. may not be written to"):
        files.refuse_existing("new/x")


def test_a_folder_is_called_what_the_person_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v12").mkdir()
    (tmp_path / "latest").symlink_to("v12")
    monkeypatch.chdir(tmp_path / "v12")
    assert files.folder_name(tmp_path / "latest") == "latest"
    assert files.folder_name("../latest/") == "latest"
    assert files.folder_name(".") == "v12"
    assert files.folder_name("..") == tmp_path.name
