"""`.onnx_adapter` files, activated through ONNX Runtime's own adapter API."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_bundle import LABELS, make_adapter, make_inputs, reference, write_bundle

from sdct_export.bundle.description import Bundle
from sdct_export.bundle.onnx_adapter import write_onnx_adapter
from sdct_export.bundle.packing import bank_layout
from sdct_export.errors import BaseMismatchError, OutputError
from sdct_export.runtime import MultiAdapterModel

ADAPTERS = {"one": make_adapter(1, labels=LABELS), "two": make_adapter(2, labels=2)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(write_bundle(tmp_path_factory.mktemp("onnx_adapter") / "bundle", ADAPTERS))


@pytest.mark.parametrize("name", ["one", "two"])
def test_both_ways_of_using_a_file_equal_the_model(bundle: Bundle, tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.onnx_adapter"
    write_onnx_adapter(bundle, ADAPTERS[name], file)
    inputs = make_inputs(3, 3)
    rows = [name, None, {name: 0.5}]
    want = MultiAdapterModel(bundle).run(inputs, rows)
    feeds = inputs | {
        "adapter_ids": np.array([[1], [0], [1]], np.int32),
        "adapter_scales": np.array([[1], [0], [0.5]], np.float32),
    }
    session = onnxruntime.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])

    parameters = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
    values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(array) for key, array in feeds.items()} | parameters
    fed = [value.numpy() for value in session.run_with_ort_values(None, values)]

    # what the C, C++, C# and Java interfaces do; Python's `session.run` first insists on every input of the graph
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(file))
    options.add_active_adapter(adapter)
    outputs = [output.name for output in session.get_outputs()]
    active = session._sess.run(outputs, feeds, options)

    for got in (fed, active):
        for output, array in zip(outputs, got, strict=True):
            np.testing.assert_array_equal(array, want[output])
    dense = reference(inputs, [{name: 1.0}, {}, {name: 0.5}], ADAPTERS)
    np.testing.assert_allclose(fed[0], dense["hidden"], rtol=1e-4, atol=1e-4)
    assert not np.array_equal(fed[0], session.run_with_ort_values(None, values | _zero_ids(feeds))[0].numpy())


def _zero_ids(feeds: dict[str, np.ndarray]) -> dict[str, onnxruntime.OrtValue]:
    return {"adapter_ids": onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(feeds["adapter_ids"]))}


def test_the_file_holds_two_slots_of_every_bank_input(bundle: Bundle, tmp_path: Path) -> None:
    write_onnx_adapter(bundle, ADAPTERS["one"], tmp_path / "a.onnx_adapter")
    parameters = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter")).get_parameters()
    layout = bank_layout(bundle)
    assert parameters.keys() == layout.keys()
    for name, (dtype, shape) in layout.items():
        array = parameters[name].numpy()
        assert (array.dtype, array.shape) == (dtype, (2, *shape))
        assert not array[0].any()
        assert array[1].any()


def test_refusals_leave_no_file(bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "a.onnx_adapter"
    with pytest.raises(BaseMismatchError, match="adapter 'x' has 7 coefficients"):
        write_onnx_adapter(bundle, make_adapter(1, n={"block.q": 7}), target, label="adapter 'x'")
    assert list(tmp_path.iterdir()) == []
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_onnx_adapter(bundle, ADAPTERS["one"], target)
    assert target.read_text() == "mine"
    with pytest.raises(OutputError, match="cannot write"):
        write_onnx_adapter(bundle, ADAPTERS["one"], target / "below" / "a.onnx_adapter")
