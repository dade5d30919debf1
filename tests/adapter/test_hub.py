"""Adapters to and from a hub on 127.0.0.1, through `huggingface_hub` itself; only an adapter's files travel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from make_adapters import golden
from small_hub import Hub, small_hub

from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.errors import AdapterFormatError, ConfigError, OutputError

FILES = ("adapter_config.json", "adapter_model.safetensors")
PROBE = "training_probe.safetensors"
GIVEN = """
import dataclasses, json, os, sys
from make_adapters import golden
from sdct_export import SdctAdapter, SdctError
def attempt(call):
    try:
        return str(call())
    except SdctError as error:
        return f"{type(error).__name__}: {error}"
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with small_hub() as running:
        yield running


def run(hub: Hub | str, home: Path, code: str, **env: str) -> list[str]:
    """What `code` prints as JSON, in a process for which `hub` is the hub and its cache lies in `home`."""
    url = hub if isinstance(hub, str) else hub.url
    env = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | env
    path = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [sys.executable, "-c", GIVEN + code], capture_output=True, text=True, timeout=120,
        env=os.environ | env | {"PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1"}, cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Fetching" not in done.stderr
    printed: list[str] = json.loads(done.stdout)
    return printed


def test_what_is_pushed_is_what_is_pulled(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/news"] = {"README.md": b"mine", PROBE: b"of an adapter before", "model.safetensors": b"big"}
    code = """
done = [attempt(lambda: golden(2).push_to_hub("me/legal", private=True, token="hf_x"))]
done.append(attempt(lambda: golden(2).push_to_hub("me/news", token="hf_x", commit_message="second")))
for name in ("me/legal", "me/news"):
    SdctAdapter.from_pretrained(name, token="hf_x").save(name.replace("/", "-"))
print(json.dumps(done))
"""
    first, second = run(hub, tmp_path, code)
    assert first.startswith(f"{hub.url}/me/legal/commit/")
    assert second.startswith(f"{hub.url}/me/news/commit/")
    assert hub.private == {"me/legal": True}
    assert set(hub.repositories["me/legal"]) == {".gitattributes", *FILES}
    assert set(hub.repositories["me/news"]) == {"README.md", "model.safetensors", *FILES}  # its probe went
    golden(2).save(tmp_path / "want")
    for name in FILES:
        want = (tmp_path / "want" / name).read_bytes()
        assert hub.repositories["me/legal"][name] == want
        assert (tmp_path / "me-legal" / name).read_bytes() == want
    asked = [line.rpartition("/")[2] for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert set(asked) == set(FILES)  # neither README nor model.safetensors was downloaded


def test_refusals_are_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/model"] = {"config.json": b"{}", "model.safetensors": b"big"}
    hub.repositories["me/damaged"] = {FILES[0]: b"{", FILES[1]: b""}
    code = """
print(json.dumps([attempt(call) for call in (
    lambda: SdctAdapter.from_pretrained("me/nothing"),
    lambda: SdctAdapter.from_pretrained("me/model"),
    lambda: SdctAdapter.from_pretrained("me/damaged"),
    lambda: SdctAdapter.from_pretrained("./missing"),
    lambda: golden().push_to_hub("me/a/b"),
)]))
"""
    messages = run(hub, tmp_path, code)
    for message, want in zip(messages, (
        "AdapterFormatError: cannot get adapter 'me/nothing' .* no such repository, or it needs a token",
        r"AdapterFormatError: repository 'me/model' .* holds no adapter \(no adapter_config.json\)",
        "AdapterFormatError: .*adapter_config.json is not valid JSON",
        r"AdapterFormatError: missing is not a folder|AdapterFormatError: \./missing is not a folder",
        "ConfigError: 'me/a/b' cannot name a repository",
    ), strict=True):  # fmt: skip
        assert "\n" not in message
        with pytest.raises(ValueError, match=want):
            raise ValueError(message)


def test_offline_what_was_downloaded_is_used_and_the_rest_is_said(hub: Hub, tmp_path: Path) -> None:
    golden(2).save(tmp_path / "a")
    hub.repositories["me/kept"] = {name: (tmp_path / "a" / name).read_bytes() for name in FILES}
    get = """
names = ("me/kept", "me/other")
print(json.dumps([attempt(lambda: len(SdctAdapter.from_pretrained(name).modules)) for name in names]))
"""
    assert run(hub, tmp_path, get)[0] == "3"
    kept, other = run(hub, tmp_path, get, HF_HUB_OFFLINE="1")
    assert kept == "3"
    assert other == (
        "AdapterFormatError: cannot get adapter 'me/other' from the Hugging Face Hub: the hub is switched off; unset "
        "HF_HUB_OFFLINE"
    )
    kept, other = run("http://127.0.0.1:9", tmp_path, get)  # nobody listens there
    assert kept == "3"
    assert "out of reach, and the cache does not hold the adapter" in other
    push = 'print(json.dumps([attempt(lambda: golden().push_to_hub("me/b", token="hf_x"))]))'
    (offline,) = run(hub, tmp_path, push, HF_HUB_OFFLINE="1")
    assert offline.startswith(
        "OutputError: cannot upload the adapter to 'me/b' on the Hugging Face Hub: the hub is sw"
    )
    (nobody,) = run("http://127.0.0.1:9", tmp_path, push)
    assert nobody.startswith("OutputError: cannot upload the adapter to 'me/b'")
    assert "\n" not in nobody


def test_a_folder_comes_before_a_repository_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    golden(2).save("me/legal")
    loaded = SdctAdapter.from_pretrained("me/legal")
    assert np.array_equal(loaded.saved["classifier.bias"], golden().saved["classifier.bias"])
    with pytest.raises(AdapterFormatError, match="the hub is switched off"):  # as in all tests, by conftest.py
        SdctAdapter.from_pretrained("me/medical")
    with pytest.raises(OutputError, match="the hub is switched off"):
        loaded.push_to_hub("me/legal")
    with pytest.raises(ConfigError, match="cannot name a repository"):
        loaded.push_to_hub("../legal")
