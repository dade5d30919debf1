"""The ONNX Runtime operator library, run by ONNX Runtime itself, against scipy and the model-local function."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from native_cases import DTYPES, Case, check, make
from onnx import TensorProto, helper
from operator_models import model_of, run

from sdct_export import contract, native
from sdct_export.errors import UnsupportedError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def library(monkeypatch):
    if native.operator_library() is None:
        found = sorted([*ROOT.glob("build/libsdct_*runtime.so"), *ROOT.glob("build/native/libsdct_*runtime.so")])
        if not found:
            pytest.skip(
                "no operator library: there was no C++ compiler when the package was installed; or build it with "
                "cmake -S . -B build && cmake --build build"
            )
        monkeypatch.setenv(native.LIBRARY_PATH, str(found[0].parent))
    return native.operator_library()


def _session(model: bytes, *, with_library: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    if with_library:
        assert native.register_operator(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_equals_scipy(dtype):
    rng = np.random.default_rng(30)
    changed = 0
    shapes = [(384, [384, 384], 7), (768, [768, 256, 256], 20), (2048, [512], 1), (101, [77, 130], 3)]
    for d_in, d_out, tokens in shapes:
        case = make(rng, dtype, d_in, d_out, rows=4, tokens_per_row=tokens, blends=2, capacity=[120] * len(d_out))
        case.ids[0] = 0
        changed += check(case, run(_session(model_of(case)), case))
    assert changed == 4


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_operator_is_preferred_to_the_function_and_agrees_with_it(dtype):
    import onnx_ir as ir

    from sdct_export.graph import function_body

    rng = np.random.default_rng(31)
    case = make(rng, dtype, 96, [64, 130], rows=3, tokens_per_row=5, blends=2, capacity=[40, 30])
    case.ids[:] = [[1, 2], [0, 0], [0, 3]]
    group = contract.Group("q+v", ("q", "v"), 96, (64, 130), (40, 30))
    data_type = ir.DataType.FLOAT if dtype == DTYPES[0] else ir.DataType.FLOAT16
    functions = [ir.to_proto(f) for f in function_body.functions_for(group, data_type, 20)]
    model = model_of(case, functions, function_body.overload_of(group, data_type))
    fallback = run(_session(model, with_library=False), case)
    operator = run(_session(model), case)
    assert check(case, fallback)
    assert check(case, operator)

    # a wrong function shows which of the two ran
    wrong = helper.make_function(
        contract.DOMAIN,
        contract.OP_TYPE,
        ["x", "ids", "scales", "values", "indices", "y0", "y1"],
        ["out0", "out1"],
        [helper.make_node("Neg", ["y0"], ["out0"]), helper.make_node("Neg", ["y1"], ["out1"])],
        [helper.make_opsetid("", 20)],
        attributes=["d_in", "d_out", "capacity"],
        overload="any",
    )
    model = model_of(case, [wrong], "any")
    assert run(_session(model, with_library=False), case)[0].tobytes() == (-case.y[0]).tobytes()
    assert run(_session(model), case)[0].tobytes() == operator[0].tobytes()


def test_rows_do_not_depend_on_the_batch_they_share():
    rng = np.random.default_rng(32)
    case = make(rng, DTYPES[0], 768, [768], rows=5, tokens_per_row=9, capacity=[300])
    case.ids[:, 0] = [1, 0, 2, 3, 1]
    session = _session(model_of(case))
    (whole,) = run(session, case)
    assert not np.array_equal(whole[:9], case.y[0][:9])
    assert whole[9:18].tobytes() == case.y[0][9:18].tobytes()
    for row in range(5):
        part = slice(9 * row, 9 * row + 9)
        alone = Case(
            case.dtype,
            case.x[part],
            case.ids[row : row + 1],
            case.scales[row : row + 1],
            case.values,
            case.indices,
            [case.y[0][part]],
            case.capacity,
        )
        assert run(session, alone)[0].tobytes() == whole[part].tobytes()


def test_behind_a_matmul_whose_memory_it_may_take():
    rng = np.random.default_rng(33)
    d = 256
    weight = rng.standard_normal((d, d)).astype(np.float32) / 16
    case = make(rng, DTYPES[0], d, [d], rows=2, tokens_per_row=3, capacity=[50])
    case.ids[:] = [[0], [2]]
    proto = onnx.load_from_string(model_of(case))
    proto.graph.node.insert(0, helper.make_node("MatMul", ["x", "w"], ["y0"]))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    del proto.graph.input[5]
    session = _session(proto.SerializeToString())
    feeds = {"x": case.x, "ids": case.ids, "scales": case.scales, "values": case.values, "indices": case.indices}
    (got,) = session.run(None, feeds)
    (base,) = session.run(None, {**feeds, "ids": np.zeros_like(case.ids)})
    assert np.allclose(base, case.x @ weight, atol=1e-5)
    assert got[:3].tobytes() == base[:3].tobytes()
    case.y = [base]
    assert check(case, [got])


def test_leading_dimensions_of_x():
    """x [batch, sequence, d_in] and x [batch * tokens, d_in] are the same to the node."""
    rng = np.random.default_rng(34)
    case = make(rng, DTYPES[0], 64, [96], rows=2, tokens_per_row=4, capacity=[30])
    case.ids[:] = 1
    (flat,) = run(_session(model_of(case)), case)
    proto = onnx.load_from_string(model_of(case))
    for info in (proto.graph.input[0], proto.graph.input[5], proto.graph.output[0]):
        width = info.type.tensor_type.shape.dim[1].dim_value
        info.CopyFrom(helper.make_tensor_value_info(info.name, TensorProto.FLOAT, ["batch", "sequence", width]))
    session = _session(proto.SerializeToString())
    feeds = {"x": case.x.reshape(2, 4, 64), "ids": case.ids, "scales": case.scales, "values": case.values}
    feeds |= {"indices": case.indices, "y0": case.y[0].reshape(2, 4, 96)}
    assert session.run(None, feeds)[0].tobytes() == flat.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.array([[0], [4]], np.int32)}, "adapter_ids holds 4; the bank has slots 0 to 3"),
        ({"ids": np.array([[0], [-1]], np.int32)}, "adapter_ids holds -1"),
        ({"ids": np.ones((3, 1), np.int32), "scales": np.zeros((3, 1), np.float32)}, "no multiple of the 3 rows"),
        ({"scales": np.zeros((2, 2), np.float32)}, "adapter_scales has shape"),
        ({"indices": np.zeros((3, 10, 2), np.int32)}, "indices has shape"),
        ({"y0": np.zeros((3, 8), np.float32)}, "y_1 has shape"),
    ],
)
def test_bad_inputs_are_refused_by_name(change, message):
    case = make(np.random.default_rng(35), DTYPES[0], 8, [8], rows=2, tokens_per_row=2, capacity=[10])
    feeds = {"x": case.x, "ids": case.ids, "scales": case.scales, "values": case.values, "indices": case.indices}
    feeds |= {"y0": case.y[0]}
    session = _session(model_of(case))
    session.run(None, feeds)
    with pytest.raises(Exception, match=f"SpectralDelta node 'the_node': .*{message}"):
        session.run(None, feeds | change)


def test_bad_attributes_are_refused():
    case = make(np.random.default_rng(36), DTYPES[0], 8, [8], rows=2, capacity=[10])
    proto = onnx.load_from_string(model_of(case))
    attribute = next(a for a in proto.graph.node[0].attribute if a.name == "capacity")
    attribute.ints.append(3)
    with pytest.raises(Exception, match="d_out and capacity need one value for each y"):
        _session(proto.SerializeToString())


def test_library_path(library, monkeypatch, tmp_path):
    monkeypatch.setenv(native.LIBRARY_PATH, str(tmp_path))
    assert native.operator_library() is None
    assert native.register_operator(onnxruntime.SessionOptions()) is False
    (tmp_path / library.name).write_bytes(b"no library")
    with pytest.raises(UnsupportedError, match="cannot load the native library"):
        native.operator_library()
    shutil.copy(library, tmp_path)
    assert native.operator_library() == (tmp_path / library.name).resolve()


def test_another_version_is_refused(library, monkeypatch):
    monkeypatch.setattr(native, "OP_VERSION", 99)
    with pytest.raises(UnsupportedError, match="implements version 1 of SpectralDelta, this package needs 99"):
        native.operator_library()
