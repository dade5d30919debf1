"""`verify` accepts sound bundles and finds every kind of damage."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import FAMILIES, random_adapter, torch_rows
from onnx import TensorProto, helper
from tiny_bundle import make_adapter, make_inputs, reference, write_bundle
from torch import nn

from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.entries import SdctEntries
from sdct_export.bundle.description import BUNDLE_FILE, Bundle, adapter_sha256, file_sha256
from sdct_export.bundle.probe import Case, Probe, difference, sample_indices
from sdct_export.errors import AdapterFormatError, BaseMismatchError
from sdct_export.export import export_merged, export_multi
from sdct_export.runtime import MultiAdapterModel
from sdct_export.verify import TOLERANCES, Report, verify

ADAPTERS = {"one": make_adapter(1, labels=4), "two": make_adapter(2, labels=2), "three": make_adapter(3)}


def record(folder: Path, adapters: dict[str, SdctAdapter]) -> None:
    """The probe a torch model would leave, from the float64 reference."""
    inputs = make_inputs(4, 3)
    plans = {"base": [()] * 3} | {name: [((name, 1.0),)] * 3 for name in adapters}
    if "one" in adapters:
        plans |= {"mixed": [(("one", 1.0),), (), (("two", 1.0),)], "blend": [(("one", 0.5), ("two", 0.5)), (), ()]}
    cases, indices, shapes = [], {}, {}
    for name, rows in plans.items():
        outputs = reference(inputs, [dict(row) for row in rows], adapters)
        shapes = {key: array.shape for key, array in outputs.items()}
        indices = {key: sample_indices(shape) for key, shape in shapes.items()}
        sampled = {key: array.reshape(-1)[indices[key]].astype(np.float32) for key, array in outputs.items()}
        cases.append(Case(name, tuple(rows), sampled))
    Probe(inputs, tuple(cases), indices, shapes).write(folder / "probe.safetensors")


def tiny(folder: Path, adapters: dict[str, SdctAdapter] | None = None) -> Path:
    adapters = ADAPTERS if adapters is None else adapters
    write_bundle(folder, adapters)
    record(folder, adapters)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny(tmp_path / "bundle")


def failed(report: Report) -> list[str]:
    assert report.ok == all(check.ok for check in report.checks)
    return [check.name for check in report.checks if not check.ok]


def edit_description(folder: Path, edit: Callable[[dict], None]) -> None:
    raw = json.loads((folder / BUNDLE_FILE).read_text())
    edit(raw)
    (folder / BUNDLE_FILE).write_text(json.dumps(raw))


def change_one_coefficient(folder: Path, name: str = "two", module: str = "block.v") -> None:
    path = folder / "adapters" / name
    adapter = SdctAdapter.load(path)
    entries = adapter.modules[module]
    values = entries.values.copy()
    values[0] += 0.5
    changed = dict(adapter.modules) | {module: SdctEntries(values, entries.indices, entries.shape)}
    shutil.rmtree(path)
    dataclasses.replace(adapter, modules=changed).save(path)


def test_a_sound_bundle_passes_every_kind_of_check(folder: Path) -> None:
    report = verify(folder)
    assert failed(report) == []
    assert [check.name for check in report.checks] == [
        "file model.onnx",
        *[f"files of adapter {name}" for name in ("one", "three", "two")],
        *[f"recorded {name}" for name in ("base", "one", "two", "three", "mixed", "blend")],
        *[f"effect of {name}" for name in ("one", "three", "two")],
        "base rows",
    ]
    measured = [check for check in report.checks if check.error is not None]
    assert len(measured) == 6
    assert all(0 <= check.error <= check.limit == TOLERANCES["float32"] for check in measured)


def test_one_changed_coefficient_fails(folder: Path) -> None:
    change_one_coefficient(folder)
    report = verify(folder)
    assert failed(report) == ["files of adapter two"]
    assert "sha256 mismatch" in next(check.detail for check in report.checks if not check.ok)


def test_one_changed_coefficient_fails_even_with_its_hash_rewritten(folder: Path) -> None:
    change_one_coefficient(folder)
    digest = adapter_sha256(folder / "adapters" / "two")
    edit_description(folder, lambda raw: raw["adapters"]["two"].update(sha256=digest))
    assert failed(verify(folder)) == ["recorded two", "recorded mixed", "recorded blend"]


def test_a_changed_or_missing_model_fails(folder: Path) -> None:
    path = folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert failed(verify(folder)) == ["file model.onnx"]
    path.write_bytes(data[:500])
    edit_description(folder, lambda raw: raw.update(model_sha256=file_sha256(path)))
    report = verify(folder)
    assert failed(report) == ["run"]
    assert "cannot load it" in report.checks[-1].detail
    path.unlink()
    assert failed(verify(folder)) == ["file model.onnx"]


def test_a_missing_adapter_fails(folder: Path) -> None:
    (folder / "adapters" / "one" / "adapter_model.safetensors").unlink()
    assert failed(verify(folder)) == ["files of adapter one"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "indices", "cases", "name", "rows"])
def test_a_damaged_probe_fails(folder: Path, damage: str) -> None:
    path = folder / "probe.safetensors"
    probe = Probe.read(path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "foreign":
        shapes = dict(probe.shapes) | {"hidden": (3, 6, 9)}
        dataclasses.replace(probe, shapes=shapes).write(path)
    elif damage == "indices":
        dataclasses.replace(probe, indices={name: index - 1 for name, index in probe.indices.items()}).write(path)
    elif damage == "cases":
        dataclasses.replace(probe, cases=()).write(path)
    elif damage == "name":
        cases = (dataclasses.replace(probe.cases[1], rows=((("nobody", 1.0),),) * 3),)
        dataclasses.replace(probe, cases=cases).write(path)
    else:
        cases = (dataclasses.replace(probe.cases[1], rows=((("one", 1.0),),)),)
        dataclasses.replace(probe, cases=cases).write(path)
    report = verify(folder)
    assert not report.ok
    assert all(check.ok for check in report.checks[:4])  # the files themselves are sound


def test_a_probe_that_differs_fails(folder: Path) -> None:
    path = folder / "probe.safetensors"
    probe = Probe.read(path)
    outputs = {name: array.copy() for name, array in probe.cases[1].outputs.items()}
    outputs["hidden"][5] += 0.01
    cases = list(probe.cases)
    cases[1] = dataclasses.replace(cases[1], outputs=outputs)
    dataclasses.replace(probe, cases=tuple(cases)).write(path)
    assert failed(verify(folder)) == ["recorded one"]


def test_an_adapter_without_effect_fails(tmp_path: Path) -> None:
    silent = make_adapter(5)
    modules = {m: SdctEntries(np.zeros_like(e.values), e.indices, e.shape) for m, e in silent.modules.items()}
    folder = tiny(tmp_path / "bundle", ADAPTERS | {"silent": dataclasses.replace(silent, modules=modules)})
    assert failed(verify(folder)) == ["effect of silent"]


def test_base_rows_that_feel_their_neighbours_fail(folder: Path) -> None:
    """A leak of one part in a million is within every tolerance, but not bit for bit."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    (node,) = (n for n in model.graph.node if "hidden" in n.output)
    node.output[0] = "exact"
    for other in model.graph.node:
        other.input[:] = ["exact" if name == "hidden" else name for name in other.input]
    nodes = [
        helper.make_node("ReduceMax", ["adapter_ids"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["largest_float"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["tiny"], value_float=1e-6),
        helper.make_node("Mul", ["largest_float", "tiny"], ["leak"]),
        helper.make_node("Add", ["exact", "leak"], ["hidden"]),
    ]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    edit_description(folder, lambda raw: raw.update(model_sha256=file_sha256(path)))
    assert failed(verify(folder)) == ["base rows"]


def test_more_adapters_than_rows_in_a_batch(tmp_path: Path) -> None:
    many = {f"a{i}": make_adapter(20 + i) for i in range(17)}
    report = verify(tiny(tmp_path / "bundle", many))
    assert failed(report) == []
    assert sum(check.name.startswith("effect of") for check in report.checks) == 17


def test_a_probe_may_name_an_adapter_twice_in_a_row(folder: Path) -> None:
    path = folder / "probe.safetensors"
    probe = Probe.read(path)
    one = next(case for case in probe.cases if case.name == "one")
    twice = Case("blend", ((("one", 0.25), ("one", 0.75)),) * 3, one.outputs)
    path.unlink()
    Probe(probe.inputs, (*probe.cases, twice), probe.indices, probe.shapes).write(path)
    assert failed(verify(folder)) == []


def test_a_folder_that_is_no_bundle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="is no bundle"):
        verify(tmp_path)


def test_verifying_without_a_base_never_imports_torch(folder: Path) -> None:
    code = (
        f"import sys\nfrom sdct_export.verify import verify\nassert verify({str(folder)!r}).ok\n"
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_difference() -> None:
    want = np.array([[1.0, -4.0], [0.5, 2.0]])
    assert difference(want, want) == 0
    assert difference(want + np.array([[0.02, 0], [0, 0]]), want) == pytest.approx(0.005)  # over the largest, 4
    assert difference(want / 100 + 1e-3, want / 100) == pytest.approx(1e-3)  # never over less than 1
    assert difference(want[:1], want) == np.inf
    assert difference(want * [[np.nan, 1], [1, 1]], want) == np.inf
    assert difference(np.where(want > 1, np.inf, want), want) == np.inf
    padded = np.array([1.0, -1e38])
    assert difference(np.array([1.0, -5e37], np.float32), padded, padding=1e30) == 0
    assert difference(np.array([1.5, -np.inf]), padded, padding=1e30) == 0.5
    assert difference(np.array([1.0, 5.0]), padded, padding=1e30) == np.inf
    assert difference(np.array([1.0, 1e38]), padded, padding=1e30) == np.inf
    assert difference(np.array([-1e38, -1e38]), padded, padding=1e30) > 1e30


# ---- against torch, on really exported bundles


@dataclasses.dataclass(frozen=True)
class Exported:
    multi: Path
    merged: Path
    checkpoint: Path
    model: nn.Module
    adapters: dict[str, SdctAdapter]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    family = FAMILIES["bert-classifier"]
    model = family.model()
    root = tmp_path_factory.mktemp("exported")
    adapters = {
        "full": random_adapter(family, model, 1, labels=4),
        "short": random_adapter(family, model, 2, labels=2),
        "bare": random_adapter(family, model, 3),
    }
    model.save_pretrained(root / "checkpoint")
    export_multi(root / "checkpoint", adapters, root / "multi")
    export_merged(root / "checkpoint", adapters["full"], root / "merged")
    return Exported(root / "multi", root / "merged", root / "checkpoint", model, adapters)


def test_a_bundle_equals_its_base_from_a_folder_or_in_memory(exported: Exported) -> None:
    before = [parameter.clone() for parameter in exported.model.parameters()]
    for source in (exported.checkpoint, str(exported.checkpoint), exported.model):
        report = verify(exported.multi, source)
        assert failed(report) == []
        names = [check.name for check in report.checks if check.name.startswith("torch")]
        blends = ["torch 0.5 bare + 0.5 short", "torch -0.25 short + 1.5 bare"]
        assert names == ["torch base", "torch bare", "torch full", "torch short", *blends]
        assert "recorded mixed" in [check.name for check in report.checks]
    assert all((a == b).all() for a, b in zip(before, exported.model.parameters(), strict=True))


def test_a_float16_bundle_verifies(exported: Exported, tmp_path: Path) -> None:
    bundle = export_multi(exported.model, exported.adapters, tmp_path / "half", dtype="float16")
    assert bundle.dtype == "float16"
    report = verify(tmp_path / "half", exported.model)
    assert failed(report) == []
    errors = [check.error for check in report.checks if check.error is not None]
    assert {check.limit for check in report.checks} == {None, TOLERANCES["float16"]}
    assert 1e-6 < max(errors) < TOLERANCES["float16"] / 2  # it did round, and well within the limit


def test_a_merged_bundle_verifies(exported: Exported) -> None:
    assert failed(verify(exported.merged)) == []
    report = verify(exported.merged, exported.checkpoint)
    assert failed(report) == []
    assert [check.name for check in report.checks] == [
        "file model.onnx", "file model.onnx.data", "recorded base", "base model", "effect of merging",
    ]  # fmt: skip


def test_a_merged_bundle_that_equals_the_base_fails(exported: Exported, tmp_path: Path) -> None:
    family = FAMILIES["bert-classifier"]
    adapter = random_adapter(family, exported.model, 1)
    modules = {m: SdctEntries(np.zeros_like(e.values), e.indices, e.shape) for m, e in adapter.modules.items()}
    export_merged(exported.checkpoint, dataclasses.replace(adapter, modules=modules), tmp_path / "merged")
    assert failed(verify(tmp_path / "merged")) == []
    assert failed(verify(tmp_path / "merged", exported.checkpoint)) == ["effect of merging"]


def test_another_base_is_found(exported: Exported, tmp_path: Path) -> None:
    other = copy.deepcopy(exported.model)
    with torch.no_grad():
        other.bert.encoder.layer[1].attention.self.value.weight.mul_(1.001)
    assert failed(verify(exported.multi, other)) == ["base model"]
    other = copy.deepcopy(exported.model)
    with torch.no_grad():  # of a token that no row has
        other.get_parameter("bert.embeddings.word_embeddings.weight")[-1].zero_()
    (check,) = [check for check in verify(exported.multi, other).checks if not check.ok]
    assert "another 'bert.embeddings.word_embeddings.weight'" in check.detail
    with pytest.raises(BaseMismatchError, match="from a BertForSequenceClassification, this base is a BertModel"):
        verify(exported.multi, FAMILIES["bert"].model())
    with pytest.raises(BaseMismatchError, match="cannot load a base model from"):
        verify(exported.multi, tmp_path)


@pytest.mark.parametrize("where", ["value", "embeddings"])
def test_changed_weights_of_the_graph_are_found(exported: Exported, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(exported.multi, folder)
    model = onnx.load(folder / "model.onnx")
    name = {"value": "layer.0.attention.self.value.bias", "embeddings": "token_type_embeddings.weight"}[where]
    (tensor,) = (t for t in model.graph.initializer if t.name.endswith(name))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[..., 0] += 0.1
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    (folder / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, folder / "model.onnx")
    assert failed(verify(folder)) == ["file model.onnx", "file model.onnx.data"]
    digest = file_sha256(folder / "model.onnx")
    edit_description(folder, lambda raw: raw.update(model_sha256=digest, data_sha256=None))
    assert "recorded base" in failed(verify(folder))
    assert "torch base" in failed(verify(folder, exported.model))


def test_one_changed_bit_of_the_weights_file_is_found(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(exported.multi, folder)
    path = folder / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    assert failed(verify(folder)) == ["file model.onnx.data"]


def test_one_changed_coefficient_of_an_exported_bundle_fails(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(exported.multi, folder)
    module = next(iter(Bundle.load(folder).groups)).modules[0]
    change_one_coefficient(folder, "short", module)
    assert failed(verify(folder)) == ["files of adapter short"]
    digest = adapter_sha256(folder / "adapters" / "short")
    edit_description(folder, lambda raw: raw["adapters"]["short"].update(sha256=digest))
    assert "recorded short" in failed(verify(folder))


def test_running_equals_an_independent_reference(exported: Exported) -> None:
    """Adapters loaded later included; the reference edits weights with scipy and shares no code with the package."""
    model = MultiAdapterModel(exported.multi, threads=1)
    late = random_adapter(FAMILIES["bert-classifier"], exported.model, 9, n=17, labels=3)
    model.load_adapter("late", late)
    rows = [{"full": 1.0}, {}, {"late": 1.0}, {"short": 0.5, "late": 0.5}, {"bare": -2.0}]
    rng = np.random.default_rng(0)
    mask = np.ones((5, 9), np.int64)
    mask[2:, 6:] = 0
    inputs = {"input_ids": rng.integers(0, 99, size=(5, 9)), "attention_mask": mask}
    got = model.run(inputs, rows)["logits"]
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    want = torch_rows(exported.model, tensors, rows, exported.adapters | {"late": late})["logits"]
    for i in range(5):
        assert difference(got[i], want[i], padding=1e36) < TOLERANCES["float32"]
    base = model.run(inputs)["logits"]
    assert [np.array_equal(got[i], base[i]) for i in range(5)] == [False, True, False, False, False]


def test_onnx_runtime_activates_the_adapter_files_of_an_exported_bundle(exported: Exported) -> None:
    bundle = Bundle.load(exported.multi)
    files = sorted(path.name for path in (bundle.path / "adapters").glob("*.onnx_adapter"))
    assert files == ["bare.onnx_adapter", "full.onnx_adapter", "short.onnx_adapter"]
    session = onnxruntime.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(bundle.path / "adapters" / "short.onnx_adapter"))
    options.add_active_adapter(adapter)
    inputs = {"input_ids": np.array([[5, 6, 7], [8, 9, 1]]), "attention_mask": np.ones((2, 3), np.int64)}
    feeds = inputs | {"adapter_ids": np.array([[1], [0]], np.int32), "adapter_scales": np.ones((2, 1), np.float32)}
    feeds["token_type_ids"] = np.zeros((2, 3), np.int64)
    (got,) = session._sess.run(["logits"], feeds, options)
    want = MultiAdapterModel(bundle).run(inputs, ["short", None])["logits"]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert not np.array_equal(got[0], MultiAdapterModel(bundle).run(inputs)["logits"][0])
