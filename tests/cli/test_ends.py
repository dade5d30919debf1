"""However a command ends, it ends with one line and the right exit code, and leaves nothing half done."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tiny_bundle import make_adapter, write_bundle, write_tokenizer

from sdct_export import signals
from sdct_export.cli import main
from sdct_export.cli.output import Main

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
START = "import os, signal, sys\nfrom sdct_export.__main__ import main\nnumber = int(sys.argv.pop(1))\n"
WRITING = """
import click
from sdct_export.cli.output import Main
import sdct_export.cli as cli
@click.group(cls=Main)
def group(): pass
@group.command()
@click.argument("output")
def write(output):
    from sdct_export.files import new_folder
    with new_folder(output) as work:
        (work / "half").write_text("half")
        {body}
cli.main = group
main()
"""
KILL = "os.kill(os.getpid(), number)"
BODIES = {
    "writing": KILL,
    "turned into another error": f"""
        try: {KILL}
        except BaseException as error: raise ImportError("a library says") from error""",
    "swallowed": f"""
        try: {KILL}
        except BaseException: pass""",
}


def run(code: str, number: int, *args: object, preexec: Callable[[], None] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", code, str(int(number)), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=preexec,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("case", BODIES)
def test_a_signal_while_writing(tmp_path: Path, case: str, number: signal.Signals) -> None:
    code = START + WRITING.format(body=BODIES[case])
    assert run(code, number, "write", tmp_path / "out") == (128 + number, f"error: stopped by {number.name}\n")
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if case == "swallowed" else [])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_importing(number: signal.Signals) -> None:
    code = START + (
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'click': {KILL}\n"
        "sys.meta_path.insert(0, Finder())\n"
        "main()\n"
    )
    assert run(code, number, "--version") == (128 + number, f"error: stopped by {number.name}\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_interpreter_ends(number: signal.Signals) -> None:
    code = START + f"import atexit\natexit.register(lambda: {KILL})\nmain()\n"
    assert run(code, number, "--version") == (128 + number, f"error: stopped by {number.name}\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_where_python_drops_exceptions(tmp_path: Path, number: signal.Signals) -> None:
    body = f"""
        class Falls:
            def __del__(self): {KILL}
        Falls()"""
    code = START + WRITING.format(body=body)
    assert run(code, number, "write", tmp_path / "out") == (128 + number, f"error: stopped by {number.name}\n")
    assert not (tmp_path / "out").exists()


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    body = f"""
        try: {KILL}
        finally: {KILL}; print("too late", file=sys.stderr)"""
    code = START + WRITING.format(body=body)
    assert run(code, signal.SIGTERM, "write", tmp_path / "out") == (143, "error: stopped by SIGTERM\n")
    assert not (tmp_path / "out").exists()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    code = START + WRITING.format(body=KILL)
    assert run(code, signal.SIGHUP, "write", tmp_path / "out", preexec=ignore) == (0, "")
    assert (tmp_path / "out" / "half").is_file()


def test_a_command_run_as_a_function_leaves_the_handlers_as_they_were() -> None:
    before = [signal.getsignal(number) for number in SIGNALS], sys.unraisablehook
    assert CliRunner().invoke(main, ["--version"]).exit_code == 0
    assert ([signal.getsignal(number) for number in SIGNALS], sys.unraisablehook) == before
    assert signals.received() is None


def test_signals_at_any_time(tmp_path: Path) -> None:
    """Each of these ends with nothing to say, or with one line."""
    bundle = write_bundle(tmp_path / "bundle", {"a": make_adapter(0, labels=3)})
    write_tokenizer(bundle)
    code = (
        "from sdct_export import signals\nsignals.install()\nprint('ready', flush=True)\n"
        "from sdct_export.__main__ import main\nmain()\n"
    )
    command = [sys.executable, "-c", code, "run", bundle, "--text", "a", "--output"]
    start = time.monotonic()
    subprocess.run([*command, tmp_path / "first.npz"], capture_output=True, check=True)
    whole = time.monotonic() - start
    choose = random.Random(0)
    for attempt in range(12):
        number, output = choose.choice(SIGNALS), tmp_path / f"out{attempt}.npz"
        process = subprocess.Popen([*command, output], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(choose.random() * whole)
        process.send_signal(number)
        _, text = process.communicate(timeout=60)
        text = "".join(line for line in text.splitlines(keepends=True) if "warning: " not in line)
        ends = [(128 + number, f"error: stopped by {number.name}\n")]
        if output.exists():  # and in the very end of the interpreter the system's own way
            ends += [(0, ""), (-number, "")]
        assert (process.returncode, text) in ends
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# errors


def fails_with(error: Exception) -> str:
    @click.group(cls=Main)
    def group() -> None:
        pass

    @group.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_memory_that_does_not_suffice() -> None:
    for error in (
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: ...\nx"
        ),
        ImportError("libx.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        ImportError(
            "IMPORTANT: PLEASE READ THIS\n\nOriginal error was: libx.so: failed to map segment from shared object"
        ),
    ):
        assert "not enough memory (" in fails_with(error)
    result = CliRunner().invoke(click.Group("g", commands={"x": click.Command("x", callback=lambda: 1 / 0)}), ["x"])
    assert isinstance(result.exception, ZeroDivisionError)  # a fault of ours keeps its traceback


def test_a_command_that_the_memory_does_not_suffice_for(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    with (tmp_path / "x.npy").open("wb") as file:
        header = "{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1073741824), }\n"
        file.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
        file.truncate(10 + len(header) + (8 << 30))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    inputs = ("--input", f"input_ids={tmp_path / 'x.npy'}", "--input", f"attention_mask={tmp_path / 'x.npy'}")
    code, text = run(START + "main()", 0, "run", bundle, *inputs, preexec=limit)
    assert code == 1
    assert [line.split(" (")[0] for line in text.splitlines() if "warning: " not in line] == [
        "error: not enough memory"
    ]


NO_TEXT = os.fsdecode(b"a\xff")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_no_text(tmp_path: Path, encoding: str) -> None:
    bundle = write_bundle(tmp_path / "text", {"a": make_adapter(0, labels=3)})
    write_tokenizer(bundle)
    elsewhere = Path(shutil.copytree(bundle, tmp_path / NO_TEXT))
    output = tmp_path / f"{NO_TEXT}.npz"
    command = [sys.executable, "-m", "sdct_export"]
    for args, code in (
        (["run", bundle, "--text", "a", "--output", output], 0),
        (["run", bundle, "--text", NO_TEXT], 1),
        (["run", bundle, "--text", "a", "--adapter", NO_TEXT], 1),
        (["run", bundle, "--input", f"{NO_TEXT}={output}"], 1),
        (["run", elsewhere, "--text", "a"], 1),  # ONNX Runtime takes no such path
        (["inspect", elsewhere], 0),
        (["inspect", tmp_path / f"none{NO_TEXT}"], 1),
        (["--model", NO_TEXT, "--adapter", f"{NO_TEXT}=x", "--output", tmp_path / "x"], 1),
        ([NO_TEXT], 2),
    ):
        done = subprocess.run(
            [*command, *args], capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": encoding}
        )
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
        if code == 1:
            assert [line.split(b": ")[0] for line in done.stderr.splitlines() if b"warning: " not in line] == [
                b"error"
            ]
