"""The portable body under ONNX Runtime, against scipy in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import scipy.fft
from bfloat16_graphs import by_onnx, rounded, typed
from bfloat16_graphs import session as rounded_session
from references import delta_weight, relative_error

from sdct_export.adapter.entries import Array
from sdct_export.contract import DCT_OP_TYPE, DOMAIN, IDCT_OP_TYPE, OP_TYPE, OP_VERSION, PLACE_OP_TYPE, Group
from sdct_export.graph import function_body
from sdct_export.graph.bfloat16 import FitBfloat16
from sdct_export.graph.function_body import factor_length, factors, functions_for, overload_of

FLOAT, FLOAT16, INT32 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT32
LENGTHS = [1, 2, 3, 5, 13, 48, 97, 100, 128, 135, 384, 768, 769, 896, 1024, 1536, 2048, 3072, 4096, 4864]


def model_of(
    inputs: Mapping[str, tuple[ir.DataType, list[Any]]], node: ir.Node, functions: list[ir.Function]
) -> ir.Model:
    graph = ir.Graph(node.inputs, node.outputs, nodes=[node], opset_imports={"": 20, DOMAIN: OP_VERSION}, name="test")
    for value, (dtype, shape) in zip(node.inputs, inputs.values(), strict=True):
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    return ir.Model(graph, ir_version=10, functions={f.identifier(): f for f in functions}.values())


def session(model: ir.Model, level: str = "ORT_ENABLE_ALL", threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def call(op_type: str, length: int, function: ir.Function, feed: Array) -> Array:
    """The output of one helper function."""
    value = ir.Value(name="x")
    dtype = ir.DataType.from_numpy(feed.dtype)
    out = ir.Value(name="out", type=ir.TensorType(dtype))
    node = ir.node(op_type, [value], domain=DOMAIN, overload=str(length), outputs=[out])
    (result,) = session(model_of({"x": (dtype, list(feed.shape))}, node, [function])).run(None, {"x": feed})
    return result


@pytest.mark.parametrize("length", LENGTHS)
def test_transforms_equal_scipy(length: int) -> None:
    rng = np.random.default_rng(length)
    x = rng.standard_normal((length, 3)).astype(np.float32)
    places = call(PLACE_OP_TYPE, length, function_body._place(length, 20), np.arange(length, dtype=np.int32))
    assert len(set(places.tolist())) == length
    spectrum = call(DCT_OP_TYPE, length, function_body._dct(length, 20), x)
    assert relative_error(spectrum[places], scipy.fft.dct(x.astype(np.float64), axis=0, norm="ortho")) < 1e-5
    scattered = np.zeros_like(spectrum)
    scattered[places] = x
    inverse = call(IDCT_OP_TYPE, length, function_body._idct(length, 20), scattered)
    assert relative_error(inverse, scipy.fft.idct(x.astype(np.float64), axis=0, norm="ortho")) < 1e-5


@pytest.mark.parametrize(
    ("length", "n1"), [(6, 2), (6, 3), (45, 5), (45, 9), (60, 12), (13, 13), (384, 128), (768, 3)]
)
def test_every_factorisation_is_exact(length: int, n1: int) -> None:
    found = factors(length, n1)
    x = np.random.default_rng(length).standard_normal((length, 2))
    out = found.first @ x[found.order].reshape(n1, -1)
    out = (found.second @ out.reshape(*found.second.shape[:2], 2)).reshape(-1, 2)
    np.testing.assert_allclose(out[found.place], scipy.fft.dct(x, axis=0, norm="ortho"), atol=1e-13)


def test_long_lengths_are_factorised_and_primes_are_not() -> None:
    for length in (384, 768, 896, 1024, 1536, 2048, 3072, 4096, 4864, 5120, 8192, 11008, 14336, 18944):
        n1 = factor_length(length)
        assert length % n1 == 0
        assert function_body._cost(n1, length // n1) < length / 5
    assert [factor_length(length) for length in (1, 2, 13, 48, 97, 769)] == [1] * 6


@dataclasses.dataclass
class Case:
    """Inputs of one node, in the order of the contract."""

    group: Group
    feeds: dict[str, Array]

    def model(self, dtype: ir.DataType = FLOAT) -> ir.Model:
        shapes = {
            name: (ir.DataType.from_numpy(a.dtype), [f"{name}_{i}" for i in range(a.ndim)])
            for name, a in self.feeds.items()
        }
        shape = ir.Shape([f"out_{i}" for i in range(self.feeds["y_1"].ndim)])
        outputs = [
            ir.Value(name=f"out_{j}", type=ir.TensorType(dtype), shape=shape) for j in range(len(self.group.d_out))
        ]
        attributes = {"d_in": self.group.d_in, "d_out": self.group.d_out, "capacity": self.group.capacity}
        node = ir.node(
            OP_TYPE, [ir.Value(name=name) for name in self.feeds], attributes, domain=DOMAIN,
            overload=overload_of(self.group, dtype), outputs=outputs,
        )  # fmt: skip
        return model_of(shapes, node, functions_for(self.group, dtype, 20))

    def expected(self) -> list[Array]:
        """float64, the definition: `y + sum_k s_k x dW_k^T` for every row with an id."""
        ids, scales = self.feeds["adapter_ids"], self.feeds["adapter_scales"]
        results = []
        start = 0
        for j, (d_out, capacity) in enumerate(zip(self.group.d_out, self.group.capacity, strict=True)):
            y = self.feeds[f"y_{j + 1}"].astype(np.float64).reshape(len(ids), -1, d_out).copy()
            x = self.feeds["x"].astype(np.float64).reshape(len(ids), -1, self.group.d_in)
            part = slice(start, start + capacity)
            start += capacity
            for row in range(len(ids)):
                for slot, scale in zip(ids[row], scales[row], strict=True):
                    values, indices = self.feeds["values"][slot, part], self.feeds["indices"][slot, part]
                    y[row] += x[row] @ delta_weight(values, indices, (d_out, self.group.d_in), float(scale)).T
            results.append(y.reshape(self.feeds[f"y_{j + 1}"].shape))
        return results


def make_case(
    d_in: int,
    d_out: tuple[int, ...],
    capacity: tuple[int, ...],
    shape: tuple[int, ...],
    ids: list[list[int]],
    seed: int = 0,
    dtype: Any = np.float32,
) -> Case:
    """Random entries with repeated rows, sorted by row as the contract asks; scales other than 1."""
    rng = np.random.default_rng(seed)
    slots = 5
    values = np.zeros((slots, sum(capacity)), np.float32)
    indices = np.zeros((slots, sum(capacity), 2), np.int32)
    for slot in range(1, slots):
        start = 0
        for rows, n in zip(d_out, capacity, strict=True):
            flat = np.sort(rng.choice(max(1, rows // 3) * d_in, size=n, replace=False))
            indices[slot, start : start + n] = np.stack(np.unravel_index(flat, (rows, d_in)), axis=1)
            values[slot, start : start + n] = rng.standard_normal(n)
            start += n
    feeds = {
        "x": rng.standard_normal((*shape, d_in)).astype(dtype),
        "adapter_ids": np.array(ids, np.int32),
        "adapter_scales": rng.uniform(0.25, 1.5, np.shape(ids)).astype(np.float32),
        "values": values,
        "indices": indices,
    }
    feeds |= {f"y_{j + 1}": rng.standard_normal((*shape, d)).astype(dtype) for j, d in enumerate(d_out)}
    group = Group("g", tuple(f"m{j}" for j in range(len(d_out))), d_in, d_out, capacity)
    return Case(group, feeds)


CASES = {
    "tokens": make_case(48, (48, 60), (30, 21), (4, 7), [[1], [0], [2], [4]]),
    "one projection, no token axis": make_case(60, (97,), (50,), (3,), [[1], [2], [0]], 1),
    "rows of a 2-D view": make_case(45, (45, 13, 45), (9, 1, 40), (3 * 5,), [[3], [0], [1]], 2),
    "image patches": make_case(36, (20,), (11,), (2, 3, 4), [[4], [2]], 3),
    "blends": make_case(128, (135, 128), (64, 70), (3, 5), [[1, 2, 3], [0, 0, 0], [0, 4, 4]], 4),
    "factorised": make_case(384, (384, 128), (300, 90), (3, 6), [[1], [2], [0]], 5),
    "one token": make_case(200, (256,), (100,), (5, 1), [[1], [2], [0], [4], [1]], 6),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name: str) -> None:
    case = CASES[name]
    got = session(case.model(), threads=2).run(None, case.feeds)
    active = (case.feeds["adapter_ids"] != 0).any(axis=1)
    for j, (actual, want) in enumerate(zip(got, case.expected(), strict=True)):
        y = case.feeds[f"y_{j + 1}"]
        assert actual.shape == y.shape
        assert actual.dtype == y.dtype
        assert relative_error(actual - y.astype(np.float64), want - y) < 1e-5
        assert relative_error(actual, y) > 0.05
        rows, base = actual.reshape(len(active), -1), y.reshape(len(active), -1)
        assert rows[~active].tobytes() == base[~active].tobytes()


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_every_optimisation_level_agrees(level: str) -> None:
    case = CASES["blends"]
    for actual, want in zip(session(case.model(), level).run(None, case.feeds), case.expected(), strict=True):
        assert relative_error(actual, want) < 1e-5


def test_base_rows_keep_every_bit_even_of_numbers_that_arithmetic_would_change() -> None:
    case = CASES["tokens"]
    odd = np.array([-0.0, np.nan, np.inf, -np.inf, 1e-45], np.float32)
    feeds = {name: array.copy() for name, array in case.feeds.items()}
    for name in ("x", "y_1", "y_2"):
        feeds[name][1, :, :5] = odd
    runner = session(case.model())
    mixed = runner.run(None, feeds)
    feeds["adapter_ids"] = np.zeros_like(feeds["adapter_ids"])
    alone = runner.run(None, feeds)
    for j in range(2):
        assert mixed[j][1].tobytes() == feeds[f"y_{j + 1}"][1].tobytes()
        assert alone[j].tobytes() == feeds[f"y_{j + 1}"].tobytes()
        # a row of NaN harms no other row
        np.testing.assert_array_equal(mixed[j][[0, 2, 3]], runner.run(None, case.feeds)[j][[0, 2, 3]])


def test_padding_at_the_end_of_a_projection_has_no_effect() -> None:
    case = CASES["tokens"]
    padded = Case(dataclasses.replace(case.group, capacity=(33, 21)), dict(case.feeds))
    last = case.feeds["indices"][:, 29:30].repeat(3, axis=1)
    padded.feeds["values"] = np.insert(case.feeds["values"], [30], np.zeros((5, 3), np.float32), axis=1)
    padded.feeds["indices"] = np.concatenate(
        [case.feeds["indices"][:, :30], last, case.feeds["indices"][:, 30:]], axis=1
    )
    for actual, want in zip(
        session(padded.model()).run(None, padded.feeds), session(case.model()).run(None, case.feeds), strict=True
    ):
        np.testing.assert_array_equal(actual, want)


def test_repeated_rows_add_up_whatever_the_number_of_threads() -> None:
    ids = [[1, 2], [3, 4], [2, 3]]
    case = make_case(384, (48,), (5000,), (3, 16), ids, 7)
    assert len(np.unique(case.feeds["indices"][1, :, 0])) < 20
    single = session(case.model(), threads=1).run(None, case.feeds)[0]
    assert relative_error(single, case.expected()[0]) < 1e-5
    for _ in range(10):
        np.testing.assert_array_equal(session(case.model(), threads=4).run(None, case.feeds)[0], single)


def test_float16_rounds_once() -> None:
    case = make_case(128, (48, 60), (30, 21), (4, 7), [[1, 2], [0, 0], [2, 3], [4, 0]], 8, np.float16)
    for j, (actual, want) in enumerate(
        zip(session(case.model(FLOAT16)).run(None, case.feeds), case.expected(), strict=True)
    ):
        assert actual.dtype == np.float16
        # half a unit in the last place, and what float32 arithmetic adds
        assert (np.abs(actual - want) <= np.spacing(np.abs(want).astype(np.float16)) * 0.5 + 1e-4).all()
        assert relative_error(actual, case.feeds[f"y_{j + 1}"]) > 0.05
        assert actual[1].tobytes() == case.feeds[f"y_{j + 1}"][1].tobytes()


@pytest.mark.parametrize("evaluator", ["each node rounded", "by onnx"])
def test_bfloat16_rounds_once(evaluator: str) -> None:
    case = make_case(128, (48, 60), (30, 21), (4, 7), [[1, 2], [0, 0], [2, 3], [4, 0]], 8, ml_dtypes.bfloat16)
    model = typed(ir.to_proto(case.model(ir.DataType.BFLOAT16)))
    if evaluator == "by onnx":
        results = list(by_onnx(model, case.feeds).values())
    else:  # Python's interface of ONNX Runtime takes no bfloat16: widen at the ends
        feeds = {n: a.astype(np.float32) if a.dtype == ml_dtypes.bfloat16 else a for n, a in case.feeds.items()}
        fitted = ir.from_proto(model)
        FitBfloat16()(fitted)
        results = rounded_session(rounded(typed(ir.to_proto(fitted)))).run(None, feeds)
    for j, (actual, want) in enumerate(zip(results, case.expected(), strict=True)):
        assert actual.dtype == (np.float32 if evaluator == "each node rounded" else ml_dtypes.bfloat16)
        found, y = actual.astype(np.float64), case.feeds[f"y_{j + 1}"]
        ulp = 2.0 ** (np.floor(np.log2(np.abs(want))) - 7)
        assert (np.abs(found - want) <= 0.5 * ulp + 1e-4).all()
        assert relative_error(found, y.astype(np.float64)) > 0.05
        np.testing.assert_array_equal(found[1], y[1].astype(np.float64))


def test_the_model_passes_the_checker_and_stores_each_matrix_once() -> None:
    case = CASES["factorised"]
    model = ir.to_proto(case.model())
    onnx.checker.check_model(model, full_check=True)
    names = [(f.name, f.overload) for f in model.functions]
    assert sorted(names) == sorted(set(names))
    large = [
        (function.name, function.overload, node.attribute[0].t.dims)
        for function in model.functions
        for node in _nodes(function.node)
        if node.op_type == "Constant" and np.prod(node.attribute[0].t.dims) > 64
    ]
    assert {name for name, _, _ in large} == {DCT_OP_TYPE, IDCT_OP_TYPE, PLACE_OP_TYPE}
    assert len(large) == 3 + 2 * 3 + 2


def _nodes(nodes: Any) -> Any:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g.node)
