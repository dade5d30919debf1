"""`MultiAdapterModel` on ONNX Runtime against float64 numpy, alone and under traffic."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import cuda_driver
import numpy as np
import onnx
import pytest
from tiny_bundle import LABELS, WEIGHTS, make_adapter, make_inputs, reference, write_bundle

from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.bundle.description import Bundle, TensorSpec, file_sha256
from sdct_export.errors import (
    AdapterFormatError,
    BaseMismatchError,
    ConfigError,
    SdctError,
    UnknownAdapterError,
    UnsupportedError,
    VerificationError,
)
from sdct_export.runtime import AdapterInfo, MultiAdapterModel
from sdct_export.runtime import model as model_module
from sdct_export.runtime.ort import OrtBackend

SHIPPED = {"legal": make_adapter(1, labels=LABELS), "medical": make_adapter(2, labels=2), "plain": make_adapter(3)}
ALL = SHIPPED | {f"extra{i}": make_adapter(10 + i, labels=[None, 3][i % 2]) for i in range(12)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("runtime") / "bundle", SHIPPED)


@pytest.fixture
def model(folder: Path) -> MultiAdapterModel:
    return MultiAdapterModel(folder, threads=1)


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-4)


def row(selection: object) -> dict[str, float]:
    return {} if selection is None else {selection: 1.0} if isinstance(selection, str) else dict(selection)


SELECTIONS = [
    ["legal"],
    [None, None],
    ["legal", None, "medical", "plain"],
    [{"legal": 0.5, "medical": 0.5}, None, {"plain": -2.0}],
    [{}, {"legal": 0.25, "plain": 3.0}, {"medical": 0.0}],
    ["legal", "legal", {"legal": np.float32(2.5)}],
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_rows_equal_the_dense_reference(model: MultiAdapterModel, selection: list) -> None:
    inputs = make_inputs(len(selection), len(selection))
    got = model.run(inputs, selection)
    assert_close(got, reference(inputs, [row(s) for s in selection], SHIPPED))
    base = model.run(inputs)
    for i, entry in enumerate(selection):
        for name in got:
            same = np.array_equal(got[name][i], base[name][i])
            assert same == (not any(row(entry).values())), (
                f"row {i}, {name}: an adapter must change it, the base never"
            )


def test_a_row_does_not_depend_on_the_batch_it_shares(model: MultiAdapterModel) -> None:
    inputs = make_inputs(5, 4)
    mixed = model.run(inputs, ["legal", None, {"plain": 0.5}, "medical"])
    alone = model.run(inputs, ["legal", "medical", {"plain": 0.5}, None])
    for i in (0, 2):
        np.testing.assert_array_equal(mixed["hidden"][i], alone["hidden"][i])


def test_one_selection_holds_for_every_row(model: MultiAdapterModel) -> None:
    inputs = make_inputs(3, 3)
    for one in ("legal", {"legal": 0.5, "plain": 1}, None):
        got, want = model.run(inputs, one), model.run(inputs, [one] * 3)
        np.testing.assert_array_equal(got["logits"], want["logits"])


def test_padded_labels_are_never_picked(model: MultiAdapterModel) -> None:
    logits = model.run(make_inputs(4, 6), "medical")["logits"]
    assert logits.shape == (6, LABELS)
    assert (logits[:, 2:] < np.finfo(np.float32).min / 4).all()
    assert np.isfinite(logits).all()


def test_adapters_tells_what_is_loaded(model: MultiAdapterModel) -> None:
    assert list(model.adapters) == ["legal", "medical", "plain"]
    assert model.adapters["medical"] == AdapterInfo(SHIPPED["medical"].n_parameters, 2, 2)
    assert model.adapters["plain"].labels is None
    assert len({info.slot for info in model.adapters.values()} - {0, None}) == 3


def test_load_from_folder_or_memory_and_unload(model: MultiAdapterModel, tmp_path: Path) -> None:
    inputs = make_inputs(1, 2)
    ALL["extra1"].save(tmp_path / "extra1")
    model.load_adapter("extra1", tmp_path / "extra1")
    model.load_adapter("extra2", ALL["extra2"])
    got = model.run(inputs, ["extra1", "extra2"])
    assert_close(got, reference(inputs, [{"extra1": 1}, {"extra2": 1}], ALL))
    model.unload_adapter("extra1")
    with pytest.raises(
        UnknownAdapterError, match=r"no adapter named 'extra1' is loaded \(4 others are\); load it first"
    ):
        model.run(inputs, ["extra1", None])
    with pytest.raises(UnknownAdapterError, match="'extra1'"):
        model.unload_adapter("extra1")
    model.load_adapter("extra1", ALL["extra3"])
    assert_close(model.run(inputs, "extra1"), reference(inputs, [{"extra3": 1}] * 2, ALL))


def test_the_order_of_names_in_a_blend_changes_no_bit(model: MultiAdapterModel) -> None:
    names = [*SHIPPED, "extra1", "extra2", "extra3"]
    for name in names[3:]:
        model.load_adapter(name, ALL[name])
    inputs = make_inputs(3, 2)
    blend = {name: 0.1 + i / 7 for i, name in enumerate(names)}
    want = model.run(inputs, blend)
    for seed in range(20):
        shuffled = dict(random.Random(seed).sample(sorted(blend.items()), len(blend)))
        got = model.run(inputs, [shuffled, blend])
        for name in got:
            np.testing.assert_array_equal(got[name], want[name])


def test_reload_replaces_an_adapter(model: MultiAdapterModel, tmp_path: Path) -> None:
    inputs = make_inputs(1, 2)
    before = model.run(inputs, "legal")
    ALL["extra1"].save(tmp_path / "extra1")
    for adapter, name in [(tmp_path / "extra1", "extra1"), (ALL["extra2"], "extra2")]:
        model.reload_adapter("legal", adapter)
        assert_close(model.run(inputs, "legal"), reference(inputs, [{name: 1}] * 2, ALL))
        info = model.adapters["legal"]
        assert (info.n_parameters, info.labels) == (ALL[name].n_parameters, [None, 3][name == "extra1"])
    foreign = dataclasses.replace(make_adapter(5), base_hash="sha256:" + "0" * 64)
    known = model.adapters
    for name, adapter, error, message in [
        ("nobody", ALL["extra1"], UnknownAdapterError, r"no adapter named 'nobody' is loaded \(3 others are\)"),
        ("legal", foreign, BaseMismatchError, "adapter 'legal' was trained on other base weights"),
        ("legal", tmp_path, AdapterFormatError, "adapter_config.json is missing"),
    ]:
        with pytest.raises(error, match=message):
            model.reload_adapter(name, adapter)
    assert model.adapters == known
    assert_close(model.run(inputs, "legal"), reference(inputs, [{"extra2": 1}] * 2, ALL))
    model.reload_adapter("legal", SHIPPED["legal"])
    np.testing.assert_array_equal(model.run(inputs, "legal")["logits"], before["logits"])


@pytest.mark.parametrize("max_slots", [3, 64])
def test_no_request_is_refused_while_its_adapter_is_replaced(folder: Path, max_slots: int) -> None:
    """Each sees the old or the new adapter, whole; one that starts after the replacement sees the new one."""
    model = MultiAdapterModel(folder, max_slots=max_slots, threads=1)
    inputs = make_inputs(1, 2)
    versions = [ALL["extra1"], ALL["extra3"]]
    answers = []
    for adapter in versions:
        model.reload_adapter("legal", adapter)
        answers.append(model.run(inputs, "legal")["logits"])
    assert not np.array_equal(*answers)
    problems: list[str] = []
    stop = threading.Event()

    def use(other: str) -> None:
        try:
            while not stop.is_set():
                got = model.run(inputs, ["legal", other])["logits"][0]
                if not any(np.array_equal(got, answer[0]) for answer in answers):
                    problems.append("neither the old nor the new")
        except BaseException as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=use, args=(other,)) for other in ("medical", "plain", "medical")]
    for thread in threads:
        thread.start()
    for i in range(100):
        model.reload_adapter("legal", versions[i % 2])
        np.testing.assert_array_equal(model.run(inputs, "legal")["logits"], answers[i % 2])
    stop.set()
    for thread in threads:
        thread.join(30)
    assert problems == []


def test_a_failed_load_changes_nothing(model: MultiAdapterModel, tmp_path: Path) -> None:
    inputs = make_inputs(1, 3)
    selection = ["legal", "medical", None]
    before, known = model.run(inputs, selection), model.adapters
    foreign = dataclasses.replace(make_adapter(5), base_hash="sha256:" + "0" * 64)
    big = make_adapter(5, n={"block.q": 7})
    (tmp_path / "empty").mkdir()
    for name, adapter, error, message in [
        ("new", foreign, BaseMismatchError, "adapter 'new' was trained on other base weights"),
        ("new", big, BaseMismatchError, "7 coefficients"),
        ("new", tmp_path / "empty", AdapterFormatError, "adapter_config.json is missing"),
        ("legal", ALL["extra1"], ConfigError, "'legal' is loaded already; unload it first"),
        ("a/b", ALL["extra1"], ConfigError, "'a/b' is not allowed"),
        ("", ALL["extra1"], ConfigError, "is not allowed"),
        ("a b", ALL["extra1"], ConfigError, "is not allowed"),
        ("..", ALL["extra1"], ConfigError, "is not allowed"),
    ]:
        with pytest.raises(error, match=message):
            model.load_adapter(name, adapter)
    assert model.adapters == known
    after = model.run(inputs, selection)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_more_adapters_than_slots_take_turns(folder: Path) -> None:
    model = MultiAdapterModel(folder, max_slots=4, threads=1)
    for name in ALL.keys() - SHIPPED.keys():
        model.load_adapter(name, ALL[name])
    inputs = make_inputs(2, 3)
    rng = random.Random(0)
    for _ in range(20):
        names = rng.sample(sorted(ALL), 3)
        assert_close(model.run(inputs, names), reference(inputs, [{n: 1.0} for n in names], ALL))
        assert sum(info.slot is not None for info in model.adapters.values()) == 3
    with pytest.raises(ConfigError, match="needs 4 adapters at once, the bank holds at most 3"):
        model.run(inputs, [{"legal": 1, "medical": 1}, "plain", "extra1"])


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        (["legal"], ConfigError, "adapters has 1 entries for a batch of 2; give one per row"),
        (["legal"] * 3, ConfigError, "adapters has 3 entries for a batch of 2"),
        ([], ConfigError, "adapters has 0 entries"),
        (
            ["legal", "nobody"],
            UnknownAdapterError,
            r"no adapter named 'nobody' is loaded \(3 others are\); load it first",
        ),
        ([{"legal": 0.5, "nobody": 0.5}, None], UnknownAdapterError, "no adapter named 'nobody'"),
        ("nobody", UnknownAdapterError, "'nobody'"),
        ([{"legal": float("nan")}, None], ConfigError, r"adapters\[0\]: the scale of 'legal' must be a finite number"),
        ([None, {"legal": float("inf")}], ConfigError, r"adapters\[1\]: the scale of 'legal'"),
        ([None, {"legal": 1e39}], ConfigError, r"adapters\[1\]: the scale of 'legal'"),
        ([None, {"legal": "1"}], ConfigError, "must be a finite number, got '1'"),
        ([None, {"legal": True}], ConfigError, "must be a finite number, got True"),
        ([None, {3: 1.0}], ConfigError, "the key 3"),
        ([1, 2], ConfigError, r"adapters\[0\] must be an adapter name, None, or a mapping"),
        ([["legal"], None], ConfigError, r"adapters\[0\] must be an adapter name"),
        (5, ConfigError, "adapters must be a list with one entry per batch row, got int"),
    ],
)
def test_adapter_selections_are_checked(
    model: MultiAdapterModel, adapters: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.run(make_inputs(1, 2), adapters)  # type: ignore[arg-type]


def test_rows_that_are_longer_than_the_table_of_positions(tmp_path: Path) -> None:
    bundle = dataclasses.replace(Bundle.load(write_bundle(tmp_path / "bundle")), max_tokens=3)
    model = MultiAdapterModel(bundle)
    assert len(model.run({"input_ids": IDS, "attention_mask": MASK})["logits"]) == 1
    longer = np.ones((2, 4), np.int64)
    with pytest.raises(ConfigError, match="the rows have 4 tokens, this model takes at most 3; cut or split"):
        model.run({"input_ids": longer, "attention_mask": longer})


def test_inputs_that_may_be_left_out_are_told_so(tmp_path: Path) -> None:
    specs = (*Bundle.load(write_bundle(tmp_path / "bundle")).inputs, TensorSpec("token_type_ids", "int64", ("b", "s")))
    for inputs in ({}, {"x": IDS}):
        with pytest.raises(ConfigError, match=r"takes input_ids, attention_mask, token_type_ids \(optional\)"):
            model_module._check_inputs(specs, inputs)


IDS = np.array([[1, 2, 3]])
MASK = np.ones((1, 3), np.int64)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'input_ids' is missing; this model takes input_ids, attention_mask"),
        ({"input_ids": IDS}, "input 'attention_mask' is missing"),
        ({"input_ids": IDS, "attention_mask": MASK, "x": IDS}, "unknown input 'x'; this model takes input_ids"),
        ({"input_ids": IDS, "adapter_ids": IDS}, r"unknown input 'adapter_ids'.*choose adapters with run\("),
        ({"input_ids": IDS, "sdct.block.o.values": IDS}, "unknown input 'sdct.block.o.values'"),
        ({"input_ids": IDS[0], "attention_mask": MASK}, r"must have shape \[batch, sequence\].*got \[3\]"),
        ({"input_ids": IDS[:, :0], "attention_mask": MASK}, r"no empty dimension; got \[1, 0\]"),
        ({"input_ids": IDS[:0], "attention_mask": MASK}, r"no empty dimension; got \[0, 3\]"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, :2]},
            r"shape \[1, 2\], expected \[batch, sequence\]: dimension 1 is 2, but input 'input_ids' has 3",
        ),
        ({"input_ids": IDS, "attention_mask": np.ones((2, 3), int)}, "dimension 0 is 2, but input 'input_ids' has 1"),
        ({"input_ids": IDS * 1.0, "attention_mask": MASK}, "must be int64; it is float64"),
        ({"input_ids": [["a", "b"]], "attention_mask": MASK}, "must be int64; it is <U1"),
        ({"input_ids": IDS - 100, "attention_mask": MASK}, r"'input_ids' holds -\d+; .* not be negative"),
        ({"input_ids": [[1], [2, 3]], "attention_mask": MASK}, "not a rectangular array"),
        ({"input_ids": IDS + 2j, "attention_mask": MASK}, "must be int64; it is complex128"),
    ],
)
def test_inputs_are_checked(model: MultiAdapterModel, inputs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.run(inputs)


def test_inputs_convert_where_nothing_is_lost(model: MultiAdapterModel) -> None:
    want = model.run({"input_ids": IDS, "attention_mask": MASK})
    for ids in (IDS.tolist(), IDS.astype(np.int32), IDS.astype(np.uint64), IDS.T.copy().T, np.asfortranarray(IDS)):
        got = model.run({"input_ids": ids, "attention_mask": MASK.astype(bool)})
        np.testing.assert_array_equal(got["hidden"], want["hidden"])
    with pytest.raises(ConfigError, match="must be int64; it is uint64"):
        model.run({"input_ids": np.array([[2**63]], np.uint64), "attention_mask": MASK[:, :1]})


def test_an_error_of_the_model_itself_is_reported(model: MultiAdapterModel) -> None:
    with pytest.raises(SdctError, match=r"ONNX Runtime could not run the model on these inputs .*check token ids"):
        model.run({"input_ids": IDS + len(WEIGHTS["embed"]), "attention_mask": MASK})
    assert np.isfinite(model.run({"input_ids": IDS, "attention_mask": MASK})["hidden"]).all()


def test_merged_bundles_run_without_adapters(tmp_path: Path) -> None:
    merged = MultiAdapterModel(write_bundle(tmp_path / "merged", merged=True))
    inputs = make_inputs(1, 2)
    assert_close(merged.run(inputs), reference(inputs, [{}, {}], {}))
    assert merged.adapters == {}
    with pytest.raises(ConfigError, match="merged: its adapter is part of the weights; pass adapters=None"):
        merged.run(inputs, [None, None])
    for call in (lambda: merged.load_adapter("a", SHIPPED["legal"]), lambda: merged.unload_adapter("a")):
        with pytest.raises(ConfigError, match="merged: it has no adapter bank"):
            call()


def test_constructor_options(folder: Path) -> None:
    assert MultiAdapterModel(Bundle.load(folder), threads=2).adapters.keys() == SHIPPED.keys()
    for options, error, message in [
        (
            {"backend": "tensorrt"},
            (AdapterFormatError, UnsupportedError),
            "model.engine.json is missing; build the engine with|needs the package tensorrt",
        ),
        ({"backend": "tensorrt", "device": "cpu"}, ConfigError, "runs on device 'cuda' or 'cuda:N', got 'cpu'"),
        ({"backend": "tensorrt", "threads": 2}, ConfigError, "threads is for backend='onnxruntime'"),
        ({"engine": "x.engine"}, ConfigError, "engine is for backend='tensorrt'"),
        ({"backend": "torch"}, ConfigError, "backend must be 'onnxruntime' or 'tensorrt', got 'torch'"),
        ({"device": "gpu"}, ConfigError, "device must be 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        ({"device": "cuda:"}, ConfigError, "device must be"),
        ({"threads": 0}, ConfigError, "threads must be a positive integer"),
        ({"max_slots": 1}, ConfigError, "max_slots must be an integer of at least 2"),
    ]:
        with pytest.raises(error, match=message):
            MultiAdapterModel(folder, **options)
    double = dataclasses.replace(Bundle.load(folder), dtype="float64")
    with pytest.raises(UnsupportedError, match="cannot run a float64 bundle; export it in float32 or float16"):
        MultiAdapterModel(double)


def test_cuda_is_never_replaced_by_the_cpu(folder: Path) -> None:
    if not cuda_driver.gpu().why:
        pytest.skip("this machine has a GPU; tests/gpu runs on it")
    with pytest.raises(UnsupportedError, match=r"device 'cuda'.*(onnxruntime-gpu|CUDA provider)"):
        MultiAdapterModel(folder, device="cuda")


def test_a_changed_or_damaged_bundle_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "changed", SHIPPED)
    weights = folder / "adapters" / "medical" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(VerificationError, match="adapter 'medical' differs from what was exported"):
        MultiAdapterModel(folder)

    folder = write_bundle(tmp_path / "truncated")
    model = folder / "model.onnx"
    model.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(VerificationError, match=r"model\.onnx differs from what was exported"):
        MultiAdapterModel(folder)
    record_hash(folder)
    with pytest.raises(AdapterFormatError, match=r"model\.onnx: ONNX Runtime .* cannot load it"):
        MultiAdapterModel(folder)
    model.unlink()
    with pytest.raises(AdapterFormatError, match=r"model\.onnx is missing"):
        MultiAdapterModel(folder)

    folder = write_bundle(tmp_path / "foreign")
    other = write_bundle(tmp_path / "headless", head=False)
    (folder / "model.onnx").write_bytes((other / "model.onnx").read_bytes())
    record_hash(folder)
    with pytest.raises(AdapterFormatError, match=r"disagree about 'sdct\.classifier\.bias', which only one"):
        MultiAdapterModel(folder)


def record_hash(folder: Path) -> None:
    """Let the description of a bundle name the graph that is there now."""
    dataclasses.replace(Bundle.load(folder), model_sha256=file_sha256(folder / "model.onnx")).write(folder)


def test_bank_tensors_share_the_memory_onnx_runtime_reads(folder: Path) -> None:
    backend = OrtBackend(folder / "model.onnx", threads=1)
    tensor = backend.zeros((4, 3), np.dtype(np.float32))
    backend.write(tensor, 2, np.array([1, 2, 3], np.float32))
    assert tensor.value.numpy().tolist() == [[0, 0, 0], [0, 0, 0], [1, 2, 3], [0, 0, 0]]
    assert tensor.value.data_ptr() == tensor.host.ctypes.data


def test_running_a_bundle_never_imports_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom sdct_export.runtime import MultiAdapterModel\n"
        f"m = MultiAdapterModel({str(folder)!r})\n"
        "out = m.run({'input_ids': [[1, 2]], 'attention_mask': [[1, 1]]}, ['legal'])\n"
        "assert out['logits'].shape == (1, 4)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'scipy', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("max_slots", [5, 64])
def test_traffic(folder: Path, max_slots: int) -> None:
    """Threads run while others load and unload; every result equals one of a single thread, bit for bit."""
    model = MultiAdapterModel(folder, max_slots=max_slots, threads=1)
    quiet = MultiAdapterModel(folder, threads=1)
    extras = sorted(ALL.keys() - SHIPPED.keys())
    for name in extras:
        quiet.load_adapter(name, ALL[name])
    inputs = make_inputs(9, 2)
    rng = random.Random(1)
    requests = []
    for _ in range(60):
        first, second, third = rng.sample(sorted(ALL), 3)
        requests.append(rng.choice([[first, None], [first, {second: 0.5, third: -1.0}], [{first: 2.0}, second]]))
    answers = [quiet.run(inputs, request) for request in requests]
    for i, request in enumerate(requests):
        assert_close(answers[i], reference(inputs, [row(r) for r in request], ALL))
    stop = time.monotonic() + 3
    problems: list[str] = []
    done = [0]

    def use(seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < stop:
            i = choose.randrange(len(requests))
            try:
                got = model.run(inputs, requests[i])
            except UnknownAdapterError:
                continue
            if any(not np.array_equal(got[name], answers[i][name]) for name in got):
                problems.append(f"{requests[i]} gave another result")
            done[0] += 1

    def change(seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < stop:
            name = choose.choice(extras)
            try:
                if choose.random() < 0.7:
                    model.load_adapter(name, ALL[name])
                else:
                    model.unload_adapter(name)
            except (ConfigError, UnknownAdapterError):
                pass

    def guarded(work, seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=guarded, args=(use, i)) for i in range(4)]
    threads += [threading.Thread(target=guarded, args=(change, 50 + i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []
    assert done[0] > 50


def test_float16_inputs_round_to_the_type_of_the_model(tmp_path: Path) -> None:
    """A model with a float input takes float64 and float16 values."""
    folder = write_bundle(tmp_path / "floats", merged=True)
    spec = dataclasses.replace(Bundle.load(folder).inputs[1], dtype="float32")
    model = onnx.load(folder / "model.onnx")
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(model, folder / "model.onnx")
    record_hash(folder)
    bundle = Bundle.load(folder)
    runner = MultiAdapterModel(dataclasses.replace(bundle, inputs=(bundle.inputs[0], spec)))
    got = [runner.run({"input_ids": IDS, "attention_mask": MASK.astype(t)})["logits"] for t in ("f4", "f8", "f2")]
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[0], got[2])


def test_an_adapter_of_a_head_alone(model: MultiAdapterModel) -> None:
    saved = make_adapter(30, labels=3).saved
    head = SdctAdapter(make_adapter(30).config, {}, saved)
    model.load_adapter("head", head)
    inputs = make_inputs(1, 2)
    got = model.run(inputs, ["head", None])
    assert_close(got, reference(inputs, [{"head": 1.0}, {}], {"head": head}))
    np.testing.assert_array_equal(got["hidden"], model.run(inputs)["hidden"])
