"""ONNX Runtime on a CUDA device: portable function body and native operator, against the CPU, torch and scipy."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import operator_models
import pytest
from native_cases import DTYPES, check, make

from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.config import SdctConfig
from sdct_export.adapter.entries import Array, SdctEntries
from sdct_export.bundle.description import Bundle
from sdct_export.errors import UnsupportedError
from sdct_export.native import LIBRARY_PATH, find_library, has_cuda, register_operator
from sdct_export.runtime import MultiAdapterModel

pytestmark = pytest.mark.gpu
MANY = 2000
ROWS: list[dict[str, float]] = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.5, "b": -1.5}]
# of the largest output; TF32 is off, half types round every layer and bfloat16 the weights, too
TOLERANCE = {"float32": 2e-4, "float16": 3e-2, "bfloat16": 1e-1}

Load = Callable[..., MultiAdapterModel]


@pytest.fixture(scope="module")
def cuda_provider() -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip(
            f"onnxruntime {onnxruntime.__version__} has no CUDA provider; install onnxruntime-gpu in its place"
        )


@pytest.fixture(params=["function", "operator"])
def load(request: pytest.FixtureRequest, cuda_provider: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    """Opens a bundle on the GPU, with the function body or with the operator library."""
    if request.param == "function":
        monkeypatch.setenv(LIBRARY_PATH, str(tmp_path))
    else:
        library = find_library("sdct_onnxruntime")
        if library is None or not has_cuda(library):
            pytest.skip("the operator library was not built with GPU kernels: it needs nvcc")

    def open_bundle(path: Path, **options: Any) -> MultiAdapterModel:
        try:
            model = MultiAdapterModel(path, device="cuda", **options)
        except UnsupportedError as reason:
            pytest.skip(str(reason))
        assert model.native == (request.param == "operator")
        return model

    return open_bundle


@pytest.fixture
def agree(request: pytest.FixtureRequest, exported: dict[str, Any]) -> Callable[..., bool]:
    """Whether two results are the same: to the bit by the operator, to rounding by the function body.

    ONNX Runtime's scatter on CUDA adds with atomics, so that the function body's sums come in any order.
    """
    if request.node.callspec.params["load"] == "operator":
        return same

    def near(a: dict[str, Array], b: dict[str, Array], rows: Any = slice(None)) -> bool:
        limit = TOLERANCE[exported["dtype"]]
        return all(np.abs(a[n][rows] - b[n][rows]).max() <= limit * np.abs(a[n][rows]).max() for n in a)

    return near


CASES = [
    ("bert-classifier", "float32"), ("llama", "float32"), ("llama", "float16"), ("llama", "bfloat16"),
    ("bert-classifier", "bfloat16"),
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A bundle with the adapters a and b, one for the CPU, inputs, what torch computes for ROWS, a third adapter."""
    torch = pytest.importorskip("torch")
    from sdct_export import export_multi

    name, dtype = request.param
    family = families.FAMILIES[name]
    model = family.model()
    adapters = {
        key: families.random_adapter(family, model, seed, labels=3 if family.saved else None)
        for seed, key in enumerate(("a", "b", "hot"))
    }
    folder = tmp_path_factory.mktemp("bundle")
    path, cpu = folder / dtype, folder / (dtype if dtype != "bfloat16" else "float32")  # no CPU runs bfloat16
    for output in {path, cpu}:
        shipped = {key: adapters[key] for key in ("a", "b")}
        export_multi(model, shipped, output, task_type=family.task, dtype=output.name, cache=False)
    rng = np.random.default_rng(60)
    shape = (len(ROWS), 7)
    inputs = {"input_ids": rng.integers(3, 90, shape), "attention_mask": np.ones(shape, np.int64)}
    tensors = {key: torch.from_numpy(array) for key, array in inputs.items()}
    expected = families.torch_rows(model, tensors, ROWS, adapters)
    return {"path": path, "cpu": cpu, "dtype": dtype, "inputs": inputs, "expected": expected, "hot": adapters["hot"]}


def close(found: dict[str, Array], expected: dict[str, Array], dtype: str) -> None:
    compared = 0
    for name in found.keys() & expected.keys():
        shown = np.abs(expected[name]) < 1e4  # label columns an adapter does not have hold a huge negative number
        error = np.abs(found[name].astype(np.float64) - expected[name])[shown].max()
        assert error <= TOLERANCE[dtype] * np.abs(expected[name][shown]).max(), name
        compared += 1
    assert compared


def same(a: dict[str, Array], b: dict[str, Array], rows: Any = slice(None)) -> bool:
    return all(np.array_equal(a[name][rows], b[name][rows]) for name in a)


def small_adapter(bundle: Bundle, seed: int) -> SdctAdapter:
    rng = np.random.default_rng(seed)
    modules = {}
    for group in bundle.groups:
        for module, d_out in zip(group.modules, group.d_out, strict=True):
            indices = np.stack([rng.permutation(d_out)[:8], rng.permutation(group.d_in)[:8]], axis=1).astype(np.int32)
            values = rng.normal(size=8).astype(np.float32)
            modules[module] = SdctEntries(values, indices, (d_out, group.d_in))
    return SdctAdapter(SdctConfig(scaling=0.5), modules)


def test_parity_with_the_cpu_and_torch(exported: dict[str, Any], load: Load) -> None:
    model, inputs = load(exported["path"]), exported["inputs"]
    found = model.run(inputs, ROWS)
    close(found, exported["expected"], exported["dtype"])
    close(found, MultiAdapterModel(exported["cpu"]).run(inputs, ROWS), exported["dtype"])
    base = model.run(inputs)
    assert same(found, base, [1])
    assert not any(same(found, base, [row]) for row in (0, 2, 3))


def test_a_b_a_and_the_base_return_to_the_same_bits(
    exported: dict[str, Any], load: Load, agree: Callable[..., bool]
) -> None:
    model, inputs = load(exported["path"]), exported["inputs"]
    model.run(inputs, "b")  # the first run chooses algorithms
    base, a, b = model.run(inputs), model.run(inputs, "a"), model.run(inputs, "b")
    assert not same(a, b)
    assert not same(a, base)
    assert agree(model.run(inputs, "a"), a)
    assert same(model.run(inputs), base)
    mixed = model.run(inputs, ["a", None, "b", None])
    assert agree(mixed, a, [0])
    assert agree(mixed, b, [2])
    assert same(mixed, base, [1, 3])


def test_hot_load_while_requests_run(exported: dict[str, Any], load: Load, agree: Callable[..., bool]) -> None:
    model, inputs = load(exported["path"]), exported["inputs"]
    model.run(inputs, "a")
    a = model.run(inputs, "a")
    wrong: list[object] = []
    done = threading.Event()

    def client() -> None:
        try:
            while not done.is_set():
                if not agree(model.run(inputs, "a"), a):
                    wrong.append("another result")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            model.load_adapter("hot", exported["hot"])
            hot = model.run(inputs, "hot")
            model.unload_adapter("hot")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    cpu = MultiAdapterModel(exported["cpu"])
    cpu.load_adapter("hot", exported["hot"])
    close(hot, cpu.run(inputs, "hot"), exported["dtype"])
    assert not same(hot, a)


def test_2000_adapters(exported: dict[str, Any], load: Load, agree: Callable[..., bool]) -> None:
    model, inputs = load(exported["path"], max_slots=2048), exported["inputs"]
    base = model.run(inputs)
    for i in range(MANY):
        model.load_adapter(f"n{i}", small_adapter(model.bundle, i))
    assert sum(info.slot is not None for info in model.adapters.values()) >= MANY
    names = ["n0", f"n{MANY // 2}", f"n{MANY - 1}", "a"]
    together = model.run(inputs, names)
    for row, name in enumerate(names):
        assert agree(together, model.run(inputs, name), [row])
    close(together, _few(exported["cpu"], names, inputs), exported["dtype"])
    assert not same(together, base)
    assert same(model.run(inputs), base)


def _few(path: Path, names: list[str], inputs: dict[str, Array]) -> dict[str, Array]:
    cpu = MultiAdapterModel(path)
    for name in names:
        if name not in cpu.adapters:
            cpu.load_adapter(name, small_adapter(cpu.bundle, int(name[1:])))
    return cpu.run(inputs, names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_runs_on_the_gpu(cuda_provider: None, tmp_path: Path, dtype: np.dtype) -> None:
    """One node against scipy, and the profile says where it ran."""
    import onnxruntime

    if find_library("sdct_onnxruntime") is None:
        pytest.skip("the operator library was not built: ONNX Runtime's headers are missing (ONNXRUNTIME_INCLUDE_DIR)")
    onnxruntime.preload_dlls()
    rng = np.random.default_rng(61)
    case = make(rng, dtype, 768, [768, 256], rows=4, tokens_per_row=5, blends=2, capacity=[300, 200])
    case.ids[:] = [[1, 2], [0, 0], [3, 0], [2, 3]]
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    assert register_operator(options)
    session = onnxruntime.InferenceSession(
        operator_models.model_of(case), options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    if "CUDAExecutionProvider" not in session.get_providers():
        pytest.skip("ONNX Runtime could not start its CUDA provider; the CUDA or cuDNN libraries it wants are missing")
    assert check(case, operator_models.run(session, case))
    events = json.loads(Path(session.end_profiling()).read_text())
    providers = {
        event["args"]["provider"] for event in events if event.get("args", {}).get("op_name") == "SpectralDelta"
    }
    assert providers == {"CUDAExecutionProvider"}
