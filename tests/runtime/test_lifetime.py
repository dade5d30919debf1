"""What a model does at its end, in a forked child, with too large a batch, and when a signal handler interrupts it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from interrupts import in_time
from tiny_bundle import make_adapter, make_inputs, write_bundle

from sdct_export.errors import ConfigError, SdctError
from sdct_export.runtime import MultiAdapterModel
from sdct_export.runtime.model import DEFAULT_MAX_BATCH
from sdct_export.runtime.ort import OrtBackend

INPUTS = make_inputs(1, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", {"a": make_adapter(1, labels=3), "b": make_adapter(2)})


def test_a_closed_model_says_so(folder: Path) -> None:
    with MultiAdapterModel(folder, threads=1) as model:
        assert model.run(INPUTS, "a").keys() == {"hidden", "logits"}
    model.close()  # again
    for call in (
        lambda: model.run(INPUTS),
        lambda: model.load_adapter("c", make_adapter(3)),
        lambda: model.reload_adapter("a", make_adapter(3)),
        lambda: model.unload_adapter("a"),
        lambda: model.adapters,
        lambda: model.native,
        lambda: model.__enter__(),
    ):
        with pytest.raises(SdctError, match=r"the model of .* is closed; load the bundle again to use it"):
            call()


def test_closing_frees_session_and_bank_at_once(folder: Path) -> None:
    model = MultiAdapterModel(folder, threads=1)
    model.run(INPUTS, "a")
    backend, bank = model._open()
    assert bank is not None
    parts = [weakref.ref(part) for part in (backend, bank, next(iter(bank._tensors.by_name.values())))]
    parts.append(weakref.ref(backend._session))
    del backend, bank
    gc.disable()  # it must not take a search for cycles
    try:
        model.close()
        assert [ref() for ref in parts] == [None] * 4
    finally:
        gc.enable()


def test_requests_that_run_when_the_model_is_closed_finish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MultiAdapterModel(folder, threads=1)
    expected = model.run(INPUTS, "a")
    entered, closed = threading.Event(), threading.Event()
    run = OrtBackend.run

    def slow(*arguments):
        entered.set()
        assert closed.wait(30)
        return run(*arguments)

    monkeypatch.setattr(OrtBackend, "run", slow)

    def close() -> None:
        assert entered.wait(30)
        model.close()
        closed.set()

    thread = threading.Thread(target=close)
    thread.start()
    got = in_time(lambda: model.run(INPUTS, "a"))
    thread.join(30)
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("locked", [False, True], ids=["quiet", "in the middle of a change"])
def test_a_forked_child_is_refused_and_can_load_the_model_anew(folder: Path, locked: bool) -> None:
    """A lock that another thread holds at the fork stays locked in the child; a session freed there crashes it."""
    code = f"""
import os, signal, sys, threading, warnings
sys.path[:0] = {[str(Path(__file__).parents[1] / "support")]!r}
warnings.simplefilter("ignore")
import numpy as np
from tiny_bundle import make_adapter, make_inputs
from sdct_export.errors import UnsupportedError
from sdct_export.runtime import MultiAdapterModel

inputs = make_inputs(1, 2)
model = MultiAdapterModel({str(folder)!r}, threads=4)
expected = model.run(inputs, "a")
inside, done = threading.Event(), threading.Event()
def change():
    model._open()[1].atomically(lambda: (inside.set(), done.wait(60)))
thread = threading.Thread(target=change if {locked} else inside.set)
thread.start()
inside.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(60)
    status = 1
    try:
        for call in (lambda: model.run(inputs, "a"), lambda: model.adapters, lambda: model.unload_adapter("a")):
            try:
                call()
            except UnsupportedError as error:
                assert "forked after the model was loaded" in str(error), error
            else:
                raise AssertionError("not refused")
        model.close()
        model = MultiAdapterModel({str(folder)!r}, threads=1)  # the old one is dropped
        assert np.array_equal(model.run(inputs, "a")["logits"], expected["logits"])
        status = 0
    finally:
        os._exit(status)
_, status = os.waitpid(child, 0)
done.set()
thread.join()
assert np.array_equal(model.run(inputs, "a")["logits"], expected["logits"])
sys.exit(0 if status == 0 else f"the child ended with {{status}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_batch_has_a_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MultiAdapterModel(folder, threads=1, max_batch=3)
    assert len(model.run(make_inputs(1, 3), ["a", None, "b"])["logits"]) == 3
    with pytest.raises(ConfigError, match=r"the batch has 4 rows, this model takes at most 3; split it, or load the"):
        model.run(make_inputs(1, 4))
    assert len(MultiAdapterModel(folder, threads=1, max_batch=None).run(make_inputs(1, 2000))["logits"]) == 2000
    usual = MultiAdapterModel(folder, threads=1)
    monkeypatch.setattr(OrtBackend, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(ConfigError, match=f"takes at most {DEFAULT_MAX_BATCH};"):
        usual.run(make_inputs(1, DEFAULT_MAX_BATCH + 1))
    for wrong in (0, -1, True, 1.5, "8"):
        with pytest.raises(ConfigError, match="max_batch must be a positive integer or None"):
            MultiAdapterModel(folder, max_batch=wrong)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signal")
@pytest.mark.parametrize(
    "error",
    [TimeoutError("too long"), RuntimeError("stop"), KeyboardInterrupt(), MemoryError(), SystemExit(3)],
    ids=repr,
)
def test_what_a_signal_handler_raises_passes_through(folder: Path, error: BaseException) -> None:
    model = MultiAdapterModel(folder, threads=1)
    expected = model.run(INPUTS, "a")
    backend = model._open()[0]
    session = backend._session

    class Interrupted:
        def __getattr__(self, name: str) -> object:
            return getattr(session, name)

        def run_with_iobinding(self, binding: object) -> None:
            session.run_with_iobinding(binding)
            signal.raise_signal(signal.SIGUSR1)

    def handler(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGUSR1, handler)
    backend._session = Interrupted()
    try:
        with pytest.raises(type(error)) as caught:
            model.run(INPUTS, "a")
        assert caught.value is error
    finally:
        signal.signal(signal.SIGUSR1, before)
        backend._session = session
    assert all(np.array_equal(model.run(INPUTS, "a")[name], expected[name]) for name in expected)
