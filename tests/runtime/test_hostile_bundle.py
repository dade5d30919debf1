"""Bundles made to harm: none hangs, none fills the memory, none runs another graph than the one that is described."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from tiny_bundle import make_adapter, write_bundle, write_tokenizer

from sdct_export import SdctAdapter
from sdct_export.base.checkpoint import Checkpoint, read_json
from sdct_export.bundle.description import Bundle, file_sha256
from sdct_export.bundle.probe import Probe
from sdct_export.contract import Group
from sdct_export.engine.build import EngineManifest
from sdct_export.errors import AdapterFormatError, BaseMismatchError, ConfigError, SdctError, VerificationError
from sdct_export.graph import function_body
from sdct_export.runtime import MultiAdapterModel
from sdct_export.runtime.ort import OrtBackend, expansion_limit, table_bytes
from sdct_export.runtime.request import encode_text, read_arrays, top_labels
from sdct_export.verify import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_bundle(tmp_path / "bundle", {"a": make_adapter(0, labels=3)})
    write_tokenizer(made)
    return made


@pytest.fixture
def no_hanging() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


READERS: dict[str, Callable[[Path], Any]] = {
    "sdct_bundle.json": Bundle.load,
    "probe.safetensors": lambda folder: Probe.read(folder / "probe.safetensors"),
    "model.onnx": MultiAdapterModel,
    "model.onnx.data": MultiAdapterModel,
    "adapters/a/adapter_config.json": MultiAdapterModel,
    "adapters/a/adapter_model.safetensors": lambda folder: Bundle.load(folder).check_adapter("a"),
    "tokenizer.json": lambda folder: encode_text(Bundle.load(folder), ["a"]),
    "model.engine.json": lambda folder: EngineManifest.load(folder / "model.engine"),
    "x.npy": lambda folder: read_arrays({"x": folder / "x.npy"}),
    "index.json": lambda folder: read_json(folder / "index.json"),
}


@pytest.mark.parametrize("place", [pipe, endless])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_unread(
    folder: Path, no_hanging: None, name: str, place: Callable[[Path], None]
) -> None:
    place(folder / name)
    with pytest.raises(SdctError, match=r"is not a regular file|is neither a file nor a folder"):
        READERS[name](folder)


@pytest.mark.parametrize("place", [pipe, endless])
def test_files_that_only_refine_are_left_out_where_they_are_no_files(
    folder: Path, no_hanging: None, place: Callable[[Path], None]
) -> None:
    for name in ("tokenizer_config.json", "config.json"):
        place(folder / name)
    bundle = Bundle.load(folder)
    assert encode_text(bundle, ["a b"])["input_ids"].tolist() == [[2, 4, 5, 3]]
    assert top_labels(bundle, {"logits": np.zeros((1, 4), np.float32)}) is not None


def test_verify_says_that_the_graph_is_no_file(folder: Path, no_hanging: None) -> None:
    pipe(folder / "model.onnx")
    (check, *_) = verify(folder).checks
    assert not check.ok
    assert "is not a regular file" in check.detail


def test_a_checkpoint_of_pipes(tmp_path: Path, no_hanging: None) -> None:
    (tmp_path / "config.json").write_text("{}")
    pipe(tmp_path / "model.safetensors")
    pipe(tmp_path / "model.safetensors.index.json")
    with pytest.raises(BaseMismatchError):
        Checkpoint(tmp_path)


# the graph is the one that is described


def change(folder: Path, edit: Callable[[onnx.ModelProto], None], *, record: bool = True) -> None:
    model = onnx.load(folder / "model.onnx")
    edit(model)
    onnx.save(model, folder / "model.onnx")
    if record:
        bundle = Bundle.load(folder)
        dataclasses.replace(bundle, model_sha256=file_sha256(folder / "model.onnx")).write(folder)


def described(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads((folder / "sdct_bundle.json").read_text())
    edit(raw)
    (folder / "sdct_bundle.json").write_text(json.dumps(raw))


def double_a_weight(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))


def test_a_changed_graph_is_refused_before_it_runs(folder: Path) -> None:
    MultiAdapterModel(folder)
    change(folder, double_a_weight, record=False)
    with pytest.raises(VerificationError, match=r"model\.onnx differs from what was exported \(sha256 mismatch\)"):
        MultiAdapterModel(folder)


def set_dim(place: int, axis: int, size: int) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.input[place].type.tensor_type.shape.dim[axis].dim_value = size

    return edit


def raise_capacity(raw: dict[str, Any]) -> None:
    raw["groups"][0]["capacity"][0] += 1


def larger_head(raw: dict[str, Any]) -> None:
    raw["heads"][0]["d_out"] += 1


def one_capacity_for_another(raw: dict[str, Any]) -> None:
    raw["inputs"][0]["dtype"] = "int32"


def other_rank(raw: dict[str, Any]) -> None:
    raw["inputs"][0]["shape"] = ["batch"]


def other_output(raw: dict[str, Any]) -> None:
    raw["outputs"][1]["shape"] = ["batch", 9]


def fixed_batch(raw: dict[str, Any]) -> None:
    raw["inputs"][0]["shape"][0] = 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            raise_capacity,
            r"'sdct\.block\.q\+v\.values', float32 \[slots, \d+\] in the description, float32 \[slots, \d+\]",
        ),
        (larger_head, r"'sdct\.classifier\.weight'"),
        (one_capacity_for_another, r"'input_ids', int32 \[batch, sequence\] in the description, int64 \["),
        (other_rank, "'input_ids'"),
        (other_output, r"'logits', float32 \[batch, 9\] in the description"),
        (fixed_batch, "'input_ids'"),
    ],
)
def test_description_and_graph_must_agree(folder: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    described(folder, edit)
    with pytest.raises(AdapterFormatError, match=f"disagree about {message}"):
        MultiAdapterModel(folder)


def test_a_graph_of_other_adapter_inputs_is_refused(folder: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        ids = next(i for i, value in enumerate(model.graph.input) if value.name == "adapter_ids")
        set_dim(ids, 1, 7)(model)

    change(folder, edit)
    with pytest.raises(
        AdapterFormatError, match=r"'adapter_ids', int32 \[batch, blend\] in the description, int32 \["
    ):
        MultiAdapterModel(folder)


# functions that expand without end


def bomb(path: Path, depth: int, table: int) -> None:
    """A graph of functions that each call the next one twice; the last holds a table of float32."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y"))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("bomb", 1)]
    last = [
        helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(np.ones(table, np.float32))),
        helper.make_node("ReduceSum", ["t"], ["s"]),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    functions = [helper.make_function("bomb", "f0", ["x"], ["y"], last, opsets[:1])]
    for i in range(1, depth):
        calls = [
            helper.make_node(f"f{i - 1}", ["x"], ["m"], domain="bomb"),
            helper.make_node(f"f{i - 1}", ["m"], ["y"], domain="bomb"),
        ]
        functions.append(helper.make_function("bomb", f"f{i}", ["x"], ["y"], calls, opsets))
    node = helper.make_node(f"f{depth - 1}", ["x"], ["y"], domain="bomb")
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10), path)


@pytest.mark.parametrize("claimed", [(), (Group("g", ("m",), 10**6, (10**6,), (1,)),) * 9])
def test_functions_do_not_expand_beyond_what_the_groups_need(tmp_path: Path, claimed: tuple[Group, ...]) -> None:
    bomb(tmp_path / "model.onnx", depth=10, table=250_000)  # 1 MB that would become 512 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterFormatError, match="expansion limit"):
        OrtBackend(tmp_path / "model.onnx", groups=claimed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


LENGTHS = [
    1,
    2,
    3,
    5,
    13,
    48,
    97,
    135,
    384,
    768,
    769,
    896,
    997,
    1024,
    1536,
    2048,
    3072,
    4096,
    4864,
    5120,
    11008,
    18944,
]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_tables_of_a_length_are_not_underestimated(length: int) -> None:
    found = function_body._factors(length)
    tables = 4 * length**2 if found is None else 4 * (found.first.size + found.second.size + length) + 8 * length
    assert tables <= table_bytes(length) <= 3 * tables + 300 * length


def test_the_limit_grows_with_the_groups_up_to_what_the_files_are_worth(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(bytes(1000))
    group = Group("g", ("q", "v"), 4096, (4096, 1024), (700, 700))
    small = expansion_limit(model, [group])
    assert small == (64 << 20) + 16_000
    with (tmp_path / "model.onnx.data").open("wb") as data:
        data.truncate(16 << 30)
    limits = [expansion_limit(model, [group] * n) for n in (0, 1, 32)]
    tables = 2 * (2 * table_bytes(4096) + table_bytes(1024))
    assert limits[0] == 64 << 20
    assert limits[1] == pytest.approx((64 << 20) + tables, rel=0.01)
    assert limits[2] - limits[0] == 32 * (limits[1] - limits[0])
    assert expansion_limit(model, [Group("g", ("m",), 2**31 - 1, (2**31 - 1,), (1,))] * 10**5) == (
        (64 << 20) + 16 * (1000 + (16 << 30))
    )


# adapters that are larger than they look

LOAD = """
import resource, sys
from sdct_export import SdctAdapter
from sdct_export.errors import SdctError
from sdct_export.runtime import MultiAdapterModel
model = MultiAdapterModel(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    model.load_adapter("big", sys.argv[2])
except SdctError as error:
    print(type(error).__name__, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def sparse_adapter(folder: Path, size: int, shape: tuple[int, int] | None = None) -> Path:
    """An adapter folder of `size` bytes that the disk does not store."""
    n = size // 12
    make_adapter(0).save(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["shapes"] = {} if shape is None else {"block.q": shape}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q"], "format_version": 1}))
    header = json.dumps(
        {
            "block.q.sdct_values": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]},
            "block.q.sdct_indices": {"dtype": "I32", "shape": [n, 2], "data_offsets": [4 * n, 12 * n]},
        }
    ).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 12 * n)
    return folder


def test_a_sparse_adapter_is_refused_by_what_the_bundle_can_hold(folder: Path, tmp_path: Path) -> None:
    big = sparse_adapter(tmp_path / "big", 500 << 20)
    done = subprocess.run([sys.executable, "-c", LOAD, folder, big], capture_output=True, text=True, timeout=120)
    kind, kilobytes, message = done.stdout.split(" ", 2)
    assert kind == "BaseMismatchError", done.stderr
    assert int(kilobytes) < 50_000
    assert "far more than there is room for" in message


def test_an_adapter_with_more_entries_than_its_weight_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = sparse_adapter(tmp_path / "big", 500 << 20, (100, 100))
    monkeypatch.setattr(np, "frombuffer", lambda *_: pytest.fail("it was read"))
    with pytest.raises(AdapterFormatError, match=r"'block\.q': it has \d+ entries, more than its 100 x 100 weight"):
        SdctAdapter.load(big)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("other.weight", np.zeros(5, np.float32), "unknown tensor 'other.weight'"),
        ("classifier.weight", np.zeros(5, np.int32), "expected a float type"),
        ("m.sdct_values", np.zeros(5, np.float32), "lacks the shape of module 'm'"),
    ],
)
def test_names_and_dtypes_are_checked_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, array: np.ndarray, message: str
) -> None:
    make_adapter(0, labels=3).save(tmp_path / "a")
    save_file({name: array}, tmp_path / "a" / "adapter_model.safetensors")
    monkeypatch.setattr(np, "frombuffer", lambda *_: pytest.fail("it was read"))
    with pytest.raises(AdapterFormatError, match=message):
        SdctAdapter.load(tmp_path / "a")


# arrays


def npy(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + header.encode("latin1") + body


F4 = "{'descr': '<f4', 'fortran_order': False, 'shape': "
ARRAYS = {
    "huge shape": npy(F4 + "(1099511627776, 1099511627776), }\n", bytes(8)),
    "huge but for a zero": npy(f"{F4}({2**80}, 0), }}\n"),
    "negative shape": npy(F4 + "(-1,), }\n", bytes(8)),
    "shape too small": npy(F4 + "(1,), }\n", bytes(8)),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", bytes(8)),
    "no size": npy("{'descr': '|V0', 'fortran_order': False, 'shape': (5,), }\n"),
    "no dtype": npy("{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,), }\n", bytes(8)),
    "dtype a list": npy("{'descr': [('a', [[]])], 'fortran_order': False, 'shape': (1,), }\n", bytes(8)),
    "no dict": npy("[]\n"),
    "not Python": npy("{'descr': }\n"),
    "deep": npy("(" * 9000 + "\n"),
    "shape of text": npy(F4 + "('a',), }\n"),
    "open quote": npy("{'descr': '\n"),
    "nul": npy("\0\0\0"),
    "cut": npy(F4 + "(9,), }\n", bytes(8)),
    "version 9": npy("{}", version=b"\x09\x00"),
    "long header": npy(F4 + "(1,), }" + " " * 30_000, version=b"\x02\x00"),
    "header beyond the file": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAYS)
def test_hostile_arrays_are_one_error(tmp_path: Path, case: str) -> None:
    (tmp_path / "x.npy").write_bytes(ARRAYS[case])
    with pytest.raises(ConfigError, match=r"input 'x': cannot read an array from .*x\.npy: ."):
        read_arrays({"x": tmp_path / "x.npy"})


@pytest.mark.parametrize(
    "array", [np.zeros((0, 3)), np.array(5), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros(3, ">i2")]
)
def test_every_plain_array_is_read(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    got = read_arrays({"x": tmp_path / "x.npy"})["x"]
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)


def test_text_that_is_no_utf8_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'a \\udcff' holds bytes that are no UTF-8"):
        encode_text(Bundle.load(folder), ["a \udcff"])


def test_a_description_with_a_lone_surrogate_is_refused(folder: Path) -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw["groups"][0]["modules"][0] = "\ud800"

    described(folder, edit)
    with pytest.raises(AdapterFormatError, match="damaged description"):
        Bundle.load(folder)
