"""ONNX files of strangers: each that is damaged, or reaches for other files, gives one clear error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import foreign_graphs
import numpy as np
import onnx
import pytest
from foreign_graphs import Graph
from onnx import TensorProto, helper, numpy_helper

from sdct_export.errors import AdapterFormatError, UnsupportedError
from sdct_export.foreign.file import read_graph
from sdct_export.foreign.weights import find_products, opaque_operators

W = np.random.default_rng(0).normal(size=(24, 36)).astype(np.float32)


def small() -> onnx.ModelProto:
    graph = Graph()
    y = graph("MatMul", "x", graph.constant(W.T))
    return graph.model({"x": ("float32", ["n", 36])}, {"y": (y, "float32", ["n", 24])})


def written(
    folder: Path, change: Callable[[onnx.ModelProto], None] = lambda _: None, *, external: bool = True
) -> Path:
    """The file after `change` of what it says, the data beside it as they were."""
    path = foreign_graphs.save(small(), folder, external=external)
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def entry(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        data = model.graph.initializer[0].external_data
        found = [item for item in data if item.key == key] or [data.add(key=key)]
        found[0].value = value

    return change


def dims(*sizes: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = sizes

    return change


@pytest.mark.parametrize("external", [True, False])
def test_a_whole_file(tmp_path: Path, external: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "m", external=external)
    monkeypatch.chdir(tmp_path / "m")
    for name in (path, Path("model.onnx")):
        (product,) = find_products(read_graph(name).graph)
        assert np.array_equal(product.weight.read(0, 24, 36)[0], W)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry("location", "../secret"), r"lies in '../secret', outside of the folder"),
        (entry("location", "/etc/hostname"), r"'/etc/hostname', outside of the folder"),
        (entry("location", "link"), r"'link', outside of the folder"),
        (entry("location", ""), "outside of the folder"),
        (entry("location", "a" * 5000), "outside of the folder|is missing|cannot be read"),
        (entry("location", "nothing.data"), "nothing.data is missing; copy all files"),
        (entry("location", "pipe"), "pipe is not a regular file"),
        (entry("location", "."), "is not a regular file|cannot be read"),
        (entry("offset", "4"), r"\[36, 24\] takes 3456 bytes, its file 'model.onnx.data' of 3456 has 3456 from 4 on"),
        (entry("length", "3452"), "takes 3456 bytes, .* has 3452 from 0 on"),
        (dims(1 << 40, 1 << 20), r"\[1099511627776, 1048576\] takes"),
        (dims(-1, 24), r"has the shape \[-1, 24\]"),
    ],
)
def test_data_that_are_not_there(tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(3456))
    path = written(tmp_path / "m", change)
    (tmp_path / "m" / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "m" / "pipe")
    with pytest.raises(AdapterFormatError, match=message):
        read_graph(path)


@pytest.mark.parametrize("shape", [(24, 37), (0, 24), (1 << 40, 1 << 20), (-3, 8)])
def test_shapes_without_their_numbers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterFormatError, match=r"but not as many numbers|has the shape"):
        read_graph(written(tmp_path, dims(*shape), external=False))


def test_constants_of_nodes_and_branches_are_looked_at_too(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(W, "w")
    tensor.dims[:] = [1 << 40]
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)])
    deep = helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch)
    function = helper.make_function("f", "F", ["a"], ["c"], [constant], [helper.make_opsetid("", 21)])
    for node in (constant, deep):
        model = small()
        model.graph.node.append(node)
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(AdapterFormatError, match="not as many numbers"):
            read_graph(tmp_path / "model.onnx")
    model = small()
    model.functions.append(function)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(AdapterFormatError, match="not as many numbers"):
        read_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"hello", b"\x08" * 100, os.urandom(200)])
def test_what_is_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(AdapterFormatError, match=r"is no ONNX model|holds no graph"):
        read_graph(tmp_path / "model.onnx")
    with pytest.raises(AdapterFormatError, match="is missing"):
        read_graph(tmp_path / "other.onnx")
    with pytest.raises(AdapterFormatError, match=r"regular file|cannot be read"):
        read_graph(tmp_path)


def test_sparse_weights_are_refused(tmp_path: Path) -> None:
    model = small()
    sparse = onnx.SparseTensorProto(values=numpy_helper.from_array(np.ones(1, np.float32), "s"), dims=[2, 2])
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "i"))
    model.graph.sparse_initializer.append(sparse)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match="sparse weights"):
        read_graph(tmp_path / "model.onnx")


def test_operators_that_are_not_looked_into_are_named(tmp_path: Path) -> None:
    model = small()
    names = [("MatMulIntegerToFloat", foreign_graphs.MICROSOFT), ("MatMulInteger", ""), ("F", "f")]
    model.graph.node.extend(helper.make_node(op, ["x"], [f"o{op}"], domain=domain) for op, domain in names)
    function = helper.make_function(
        "f", "F", ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("f", 1))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    found = opaque_operators(read_graph(tmp_path / "model.onnx"))
    assert found == ["MatMulInteger", "MatMulIntegerToFloat", "the function F"]
