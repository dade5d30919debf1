"""Adapters in memory and on disk: exact round trips, fixed bytes, and the weight change they stand for."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from make_adapters import golden, random_adapter
from references import delta_weight as reference_delta_weight
from references import relative_error
from safetensors.numpy import save

from sdct_export import files
from sdct_export.adapter import folder
from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.config import SdctConfig
from sdct_export.adapter.entries import SdctEntries, check_fit
from sdct_export.base.identity import base_hash
from sdct_export.errors import AdapterFormatError, BaseMismatchError, ConfigError, OutputError
from sdct_export.files import check_adapter_name, new_file, new_folder

GOLDEN = {1: Path(__file__).parents[1] / "golden" / "adapter", 2: Path(__file__).parents[1] / "golden" / "adapter_v2"}
FILES = ("adapter_config.json", "adapter_model.safetensors")
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def assert_identical(first: SdctAdapter, second: SdctAdapter) -> None:
    assert first.config == second.config
    assert (first.base_hash, first.base_dtype) == (second.base_hash, second.base_dtype)
    assert list(first.modules) == list(second.modules)
    assert list(first.saved) == list(second.saved)
    for name, entries in first.modules.items():
        other = second.modules[name]
        assert entries.shape == other.shape
        for one, two in ((entries.values, other.values), (entries.indices, other.indices)):
            assert one.dtype == two.dtype
            assert one.tobytes() == two.tobytes()
    for name, array in first.saved.items():
        assert array.dtype == second.saved[name].dtype
        assert array.shape == second.saved[name].shape
        assert array.tobytes() == second.saved[name].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: type) -> None:
    # every finite bit pattern of a half type, and float32 values that no shorter decimal text holds
    if dtype is np.float32:
        values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * np.float32(1e-30)
    else:
        values = np.arange(65536, dtype=np.uint16).view(dtype)
        values = values[np.isfinite(values.astype(np.float32))]
    indices = np.stack([np.arange(values.size) // 300, np.arange(values.size) % 300], axis=1).astype(np.int32)
    saved = {"classifier.weight": values[:12].reshape(3, 4).copy(), "classifier.bias": values[5:8].copy()}
    config = SdctConfig(target_modules=["q"], n_coefficients=values.size, modules_to_save=["classifier"], scaling=0.1)
    adapter = SdctAdapter(config, {"a.q": SdctEntries(values, indices, (400, 300))}, saved)
    adapter.save(tmp_path / "out")
    assert_identical(SdctAdapter.load(tmp_path / "out"), adapter)


@pytest.mark.parametrize("version", GOLDEN)
def test_golden_file_loads_to_known_numbers(version: int) -> None:
    assert_identical(SdctAdapter.load(GOLDEN[version]), golden(version))


@pytest.mark.parametrize("version", GOLDEN)
def test_saving_gives_the_golden_bytes(tmp_path: Path, version: int) -> None:
    golden(version).save(tmp_path / "built")
    SdctAdapter.load(GOLDEN[version]).save(tmp_path / "copied")
    for name in FILES:
        want = (GOLDEN[version] / name).read_bytes()
        assert (tmp_path / "built" / name).read_bytes() == want
        assert (tmp_path / "copied" / name).read_bytes() == want
    assert sorted(p.name for p in (tmp_path / "built").iterdir()) == sorted(FILES)


def test_a_config_without_optional_fields_and_with_pefts_own_fields_loads(tmp_path: Path) -> None:
    golden().save(tmp_path / "a")
    raw = json.loads((tmp_path / "a" / FILES[0]).read_text())
    kept = {k: raw[k] for k in ("peft_type", "target_modules", "modules_to_save", "scaling")}
    peft = {"auto_mapping": None, "peft_version": "0.21.2", "revision": None, "inference_mode": True}
    (tmp_path / "a" / FILES[0]).write_text(json.dumps(kept | peft))
    adapter = SdctAdapter.load(tmp_path / "a")
    assert adapter.base_hash is None
    assert all(entries.shape is None for entries in adapter.modules.values())
    assert adapter.modules.keys() == golden().modules.keys()


def test_entries_of_version_1_in_any_order_are_sorted_when_they_are_saved(tmp_path: Path) -> None:
    sorted_ = random_adapter({"a.q": (48, 96), "b.q": (31, 17)}, 50)
    mixed, order = {}, np.random.default_rng(1).permutation(50)
    for name, entries in sorted_.modules.items():
        mixed[name] = SdctEntries(entries.values[order], entries.indices[order], entries.shape)
    adapter = SdctAdapter(sorted_.config, mixed)
    adapter.save(tmp_path / "a")
    assert_identical(SdctAdapter.load(tmp_path / "a"), sorted_)
    # as version 1 has it, which an older release wrote in the order of the entries
    raw = json.loads((tmp_path / "a" / FILES[0]).read_text()) | {"format_version": 1}
    (tmp_path / "a" / FILES[0]).write_text(json.dumps(raw))
    tensors = {f"{name}.sdct_values": e.values for name, e in mixed.items()}
    tensors |= {f"{name}.sdct_indices": e.indices for name, e in mixed.items()}
    (tmp_path / "a" / FILES[1]).write_bytes(save(tensors))
    assert_identical(SdctAdapter.load(tmp_path / "a"), adapter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (31, 17), (96, 384)])
def test_delta_weight_equals_scipy(dtype: type, shape: tuple[int, int]) -> None:
    adapter = random_adapter({"q": shape}, min(60, shape[0] * shape[1]), dtype=dtype)
    adapter = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, scaling=-2.5))
    entries = adapter.modules["q"]
    want = reference_delta_weight(entries.values, entries.indices, shape, -2.5)
    got = adapter.delta_weight("q")
    assert got.numpy().dtype == np.float32
    assert np.abs(want).max() > 0
    assert relative_error(got, want) <= 1e-6


def test_delta_weight_needs_a_shape_that_fits() -> None:
    adapter = golden()
    module = "encoder.layer.1.attention.self.query"
    with pytest.raises(BaseMismatchError, match="pass shape"):
        adapter.delta_weight(module)
    assert adapter.delta_weight(module, (12, 8)).shape == (12, 8)
    with pytest.raises(BaseMismatchError, match="indices up to"):
        adapter.delta_weight(module, (2, 8))
    with pytest.raises(BaseMismatchError, match="trained on 12 x 8"):
        adapter.delta_weight("encoder.layer.0.attention.self.query", (12, 9))
    with pytest.raises(BaseMismatchError, match=r"no module 'nothing'"):
        adapter.delta_weight("nothing", (12, 8))


def test_an_adapter_is_frozen() -> None:
    adapter = golden()
    entries = adapter.modules["encoder.layer.0.attention.self.query"]
    with pytest.raises(ValueError, match="read-only"):
        entries.values[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        adapter.saved["classifier.bias"][0] = 1
    with pytest.raises(TypeError):
        adapter.modules["x"] = entries  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.config = SdctConfig()  # type: ignore[misc]
    assert adapter.n_parameters == 5 + 6 + 4 + 24 + 2


def test_scaling_is_folded_in_with_one_rounding() -> None:
    values = np.array([1 / 3, -7e-8, 65504], dtype=np.float16)
    entries = SdctEntries(values, np.array([[0, 0], [0, 1], [1, 0]], dtype=np.int32))
    want = (values.astype(np.float64) * 0.1).astype(np.float32)
    assert entries.float32(0.1).tolist() == want.tolist()


def entries_with(**changes: object) -> SdctEntries:
    fields = {"values": np.ones(2, dtype=np.float32), "indices": np.array([[0, 0], [1, 1]], dtype=np.int32)}
    return SdctEntries(**(fields | {"shape": (2, 2)} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.ones(2)}, "float32, float16 or bfloat16, got float64"),
        ({"values": np.ones((2, 1), dtype=np.float32)}, r"must have shape \[n\]"),
        ({"values": np.ones(0, dtype=np.float32)}, "n >= 1"),
        ({"values": np.array([1, np.nan], dtype=np.float32)}, "NaN or infinite numbers .first at position 1"),
        ({"values": np.array([np.inf, 1], dtype=ml_dtypes.bfloat16)}, "first at position 0"),
        ({"indices": np.zeros((2, 2), dtype=np.int64)}, "must be int32"),
        ({"indices": np.zeros((3, 2), dtype=np.int32)}, r"shape \[2, 2\] to match"),
        ({"indices": np.zeros(4, dtype=np.int32)}, r"shape \[2, 2\] to match"),
        ({"indices": np.array([[0, 0], [0, -1]], dtype=np.int32)}, "negative"),
        ({"indices": np.array([[0, 0], [2, 1]], dtype=np.int32)}, r"\(2, 1\) lies outside the 2 x 2"),
        ({"indices": np.array([[1, 0], [1, 0]], dtype=np.int32)}, r"\(1, 0\) is repeated"),
    ],
)
def test_entries_refuse_what_cannot_be_right(changes: dict[str, object], message: str) -> None:
    assert entries_with().n == 2
    with pytest.raises(AdapterFormatError, match=message):
        entries_with(**changes)


def test_an_adapter_needs_something_to_apply_and_finite_heads() -> None:
    with pytest.raises(AdapterFormatError, match="nothing to apply"):
        SdctAdapter(SdctConfig(), {})
    with pytest.raises(AdapterFormatError, match=r"'classifier\.bias' holds NaN"):
        SdctAdapter(SdctConfig(), {}, {"classifier.bias": np.array([np.nan], dtype=np.float32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"target_modules": "("}, "not a valid regular expression"),
        ({"target_modules": "a{99999999999999999999}"}, "not a valid regular expression"),
        ({"target_modules": "a" * 10_001}, "10001 characters"),
        ({"target_modules": [1]}, "non-empty module names"),
        ({"target_modules": {"a": 1}}, "must be a list"),
        ({"modules_to_save": "classifier"}, "must be a list"),
        ({"n_coefficients": 0}, "at least 1"),
        ({"n_coefficients": True}, "at least 1"),
        ({"n_coefficients": 7.0}, "at least 1"),
        ({"bands": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
        ({"scaling": 0}, "no effect"),
        ({"scaling": float("nan")}, "finite number"),
        ({"scaling": 10**400}, "finite number"),
        ({"scaling": "1"}, "finite number"),
        ({"delta": 1.5}, r"\[0, 1\]"),
        ({"selection": "best"}, "energy, top, random, low"),
        ({"selection": ["energy"]}, "energy, top, random, low"),
        ({"task_type": "CHAT"}, "SEQ_CLS"),
        ({"base_model_name_or_path": 3}, "must be a string"),
    ],
)
def test_config_refuses_what_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SdctConfig(**changes)  # type: ignore[arg-type]


def test_config_matching_follows_peft() -> None:
    config = SdctConfig(target_modules=["query", "self.value"], modules_to_save={"classifier"})
    assert [config.matches(p) for p in ("query", "a.query", "a.xquery", "b.self.value", "value")] == [
        True,
        True,
        False,
        True,
        False,
    ]
    assert config.saves("model.classifier")
    assert not config.saves("classifier2")
    pattern = SdctConfig(target_modules=r"h\.\d+\.attn")
    assert pattern.matches("h.11.attn")
    assert not pattern.matches("h.11.attn.c")
    assert not SdctConfig().saves("classifier")
    assert pickle.loads(pickle.dumps(config)) == config


def test_base_hash_depends_on_names_shapes_and_weights_but_not_on_how_they_are_held() -> None:
    weight = np.random.default_rng(0).normal(size=(300, 400)).astype(ml_dtypes.bfloat16)
    shape = {"q": (300, 400)}
    want = base_hash({"q": weight}.__getitem__, shape, "bfloat16")
    assert want.startswith("sha256:")
    assert base_hash({"q": weight.astype(np.float32)}.__getitem__, shape, "bfloat16") == want
    assert base_hash({"q": np.asfortranarray(weight)}.__getitem__, shape, "bfloat16") == want
    assert base_hash({"q": weight.astype(np.float32)}.__getitem__, shape, "float32") != want
    assert base_hash({"k": weight}.__getitem__, {"k": (300, 400)}, "bfloat16") != want
    assert base_hash({"q": weight.reshape(400, 300)}.__getitem__, {"q": (400, 300)}, "bfloat16") != want
    changed = weight.copy()
    changed[0, 0] += 1
    assert base_hash({"q": changed}.__getitem__, shape, "bfloat16") != want
    other = np.random.default_rng(1).normal(size=(300, 400)).astype(ml_dtypes.bfloat16)
    two = {"q": weight, "k": other}
    shapes = {"q": (300, 400), "k": (300, 400)}
    assert base_hash(two.__getitem__, shapes, "float32") == base_hash(
        two.__getitem__, dict(reversed(shapes.items())), "float32"
    )


def test_check_fit_names_both_shapes() -> None:
    entries = entries_with()
    check_fit("q", entries, (2, 2))
    with pytest.raises(BaseMismatchError, match=r"module 'q' is 3 x 2 in the base .* trained on 2 x 2"):
        check_fit("q", entries, (3, 2))


# outputs are complete or absent


def test_an_adapter_that_would_not_load_again_is_not_saved(tmp_path: Path) -> None:
    adapter = dataclasses.replace(golden(), config=SdctConfig(["query"], modules_to_save=["score"]))
    with pytest.raises(AdapterFormatError, match=r"'classifier\.bias' is not part of modules_to_save \(\['score'\]\)"):
        adapter.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("keep")
    with pytest.raises(OutputError, match=r"out exists already; choose another output"):
        golden().save(target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target / "mine").read_text() == "keep"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists already"):
        golden().save(tmp_path / "dangling")


# overwriting: the old or the new one, whole


def variant(value: float) -> SdctAdapter:
    return SdctAdapter(
        SdctConfig(["q"], 1), {"q": SdctEntries(np.full(1, value, np.float32), np.zeros((1, 2), np.int32), (4, 4))}
    )


def value_of(folder: Path) -> float:
    return float(SdctAdapter.load(folder).modules["q"].values[0])


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:  # as on a system that cannot swap two folders in one step

        def refuse(work: Path, target: Path, flag: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(files, "_rename", refuse)
    golden().save(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / FILES[0]).exists()
    for value in (1.0, 2.0):
        variant(value).save(tmp_path / "a", overwrite=True)
        assert value_of(tmp_path / "a") == value
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
    SdctAdapter.load(tmp_path / "a").save(tmp_path / "a", overwrite=True)  # its own source
    assert value_of(tmp_path / "a") == 2.0
    with pytest.raises(OutputError, match="exists already"):
        variant(3.0).save(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    variant(4.0).save(tmp_path / "empty", overwrite=True)
    assert value_of(tmp_path / "empty") == 4.0


def test_overwriting_never_replaces_anything_else(tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        before = sorted((p, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*"))
        with pytest.raises(OutputError, match=message):
            variant(1.0).save(tmp_path / name, overwrite=True)
        assert sorted((p, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")) == before

    golden().save(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    refused("a", "holds 'notes.txt', which is no file of an adapter")
    (tmp_path / "file").write_text("mine")
    refused("file", "is no folder of an adapter")
    golden().save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    refused("link", "is no folder of an adapter")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / FILES[1]).write_text("weights of something")
    refused("half", "no sDCT adapter and is not overwritten: .*adapter_config.json is missing")
    (tmp_path / "half" / FILES[0]).write_text('{"peft_type": "LORA"}')
    refused("half", "an adapter of another kind")


@pytest.mark.parametrize("at", ["work", "first", "second"])
def test_a_failure_while_overwriting_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    variant(1.0).save(tmp_path / "a")
    renamed, calls = os.rename, []

    def no_swap(work: Path, target: Path, flag: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    def fail(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == {"first": 1, "second": 2}[at]:
            raise OSError(errno.EIO, "Input/output error")
        renamed(source, target)

    def full(self: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "work":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(files, "_rename", no_swap)
        monkeypatch.setattr(files.os, "rename", fail)
    with pytest.raises(OutputError, match="failed"):
        variant(2.0).save(tmp_path / "a", overwrite=True)
    assert value_of(tmp_path / "a") == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("times", [1, 2, 99])
def test_what_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Between its two files another adapter takes its place: scaling of one with values of the other is neither."""

    def save(i: int) -> None:
        adapter = variant(float(i))
        adapter = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, scaling=float(i)))
        adapter.save(tmp_path / "a", overwrite=True)

    save(1)
    read, count = folder.read_safetensors, 0

    def replaced(*arguments: object, **settings: object) -> object:
        nonlocal count
        if count < times:
            count += 1
            time.sleep(0.02)  # a clock of file systems is that coarse
            save(count + 1)
        return read(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(folder, "read_safetensors", replaced)
    if times == 99:
        with pytest.raises(AdapterFormatError, match="replaced faster than it can be read"):
            SdctAdapter.load(tmp_path / "a")
        return
    loaded = SdctAdapter.load(tmp_path / "a")
    assert loaded.config.scaling == times + 1
    assert loaded.modules["q"].values.tolist() == [times + 1]


def test_a_killed_overwriting_leaves_the_old_or_the_new_adapter(tmp_path: Path) -> None:
    """A writer that replaces in a loop is killed at random moments; a reader finds one of its adapters each time."""
    script = (
        "import sys, itertools; sys.path[:0] = sys.argv[2:]\n"
        "from test_adapter import variant\n"
        "for i in itertools.count(): variant(float(i % 1000)).save(sys.argv[1], overwrite=True); print(i, flush=True)"
    )
    variant(0.0).save(tmp_path / "a")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    for k in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "a", *paths], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            for _ in range(3 + k):
                writer.stdout.readline()
            time.sleep(0.0007 * k)
            writer.kill()
        assert value_of(tmp_path / "a") >= 0
    variant(5.0).save(tmp_path / "a", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]  # what killed writers left is gone


@pytest.mark.parametrize("failing", ["write_text", "write_bytes"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, failing, full)
    with pytest.raises(OutputError, match=r"No space left on device; nothing was left there"):
        golden().save(tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        golden().save(tmp_path / "file" / "out")


def test_new_folder_and_new_file_disappear_on_any_error(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")

    def fail(work: Path) -> None:
        work.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), new_folder(tmp_path / "folder") as work:
        fail(work / "part")
    with pytest.raises(RuntimeError), new_file(tmp_path / "old") as work:
        fail(work)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"
    with new_file(tmp_path / "old") as work:
        work.write_text("new")
    assert (tmp_path / "old").read_text() == "new"
    with pytest.raises(OutputError, match="exists already"), new_file(tmp_path / "old", overwrite=False):
        pass


def test_outputs_have_the_permissions_a_plain_write_would_give(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.txt").write_text("")
    with new_folder(tmp_path / "ours"):
        pass
    with new_file(tmp_path / "ours.txt"):
        pass
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "ours.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


@pytest.mark.parametrize("name", ["a", "legal-2", "A_b", "0", "x" * 128])
def test_adapter_names(name: str) -> None:
    assert check_adapter_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "a/b", "../a", ".", "..", "a.b", "a\\b", "-a", "_a", "a\n", "ä", "a\0", "x" * 129, None, 3],
)
def test_adapter_names_that_could_leave_a_folder_or_confuse_a_tool_are_refused(name: object) -> None:
    with pytest.raises(ConfigError, match=r"adapter name .* is not allowed"):
        check_adapter_name(name)
