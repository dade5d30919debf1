"""An ONNX file of a stranger as an onnx_ir model, after looking at everything that reading it later would believe."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ..errors import AdapterFormatError, UnsupportedError
from ..files import open_input, read_input
from ..graph.trace import quiet

_LARGEST = 2 << 30  # protobuf's own limit
_ADVICE = "export the graph again with the tool that made it"


def read_graph(path: str | Path) -> ir.Model:
    """The graph in the file `path`; tensors in files beside it stay there until they are asked for.

    Raises:
        AdapterFormatError: the file is missing, or no ONNX graph; or one of its tensors has another size than it says,
            or lies in a file that is missing, too short, or not in the folder of `path`.
        UnsupportedError: it has sparse tensors.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100, since Path.resolve follows links
    data = read_input(path, _LARGEST, AdapterFormatError, _ADVICE)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
        _check_names(proto)
        sparse = len(proto.graph.sparse_initializer)
        with quiet():
            model: ir.Model = ir.from_proto(proto)
    except Exception as error:  # protobuf and onnx_ir raise many kinds
        raise AdapterFormatError(f"{path} is no ONNX model ({_first_line(error)}); {_ADVICE}") from error
    if sparse:
        raise UnsupportedError(f"{path} has sparse weights, which cannot be compared; {_ADVICE} without them")
    if not model.graph.inputs or not len(model.graph):
        raise AdapterFormatError(f"{path} holds no graph; {_ADVICE}")
    sizes: dict[str, int] = {}
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = str(path.parent)
            _check_external(path, tensor, sizes)
        else:
            _check_inline(path, tensor, len(data))
    return model


def _check_names(message: Any) -> None:
    """Raise `ValueError` where a text is no UTF-8, which protobuf then gives as bytes."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            if not all(isinstance(text, str) for text in ((value,) if isinstance(value, bytes | str) else value)):
                raise ValueError(f"a text in the field {field.name!r} is no UTF-8")
        elif field.type == field.TYPE_MESSAGE:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                _check_names(inner)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every tensor of the graph, its branches and its functions."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and attribute.value is not None:
                    yield attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()
                elif attribute.type == ir.AttributeType.GRAPH:
                    yield from _initializers(attribute.as_graph())
    yield from _initializers(model.graph)


def _initializers(graph: ir.Graph) -> Iterator[ir.TensorProtocol]:
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value.const_value


def _check_external(path: Path, tensor: ir.ExternalTensor, sizes: dict[str, int]) -> None:
    where = f"{path}: the tensor {tensor.name!r}"
    location = os.fspath(tensor.location)
    folder, file = path.parent.resolve(), Path(path.parent, location)
    try:
        inside = file.resolve().is_relative_to(folder) and bool(location)
    except (OSError, ValueError, RuntimeError):  # a name that is too long or holds a NUL; a circle of links
        inside = False
    if not inside:
        raise AdapterFormatError(
            f"{where} lies in {location!r}, outside of the folder of the model, and is not read; put that file itself "
            "beside the model"
        )
    if location not in sizes:
        with open_input(file, AdapterFormatError, f"copy all files of the model, or {_ADVICE}") as (_, size):
            sizes[location] = size
    offset, needed = tensor.offset or 0, _bytes(path, tensor)
    if tensor.length not in (None, needed) or offset < 0 or offset + needed > sizes[location]:
        raise AdapterFormatError(
            f"{where} of shape {_shape(tensor)} takes {needed} bytes, its file {location!r} of {sizes[location]} has "
            f"{tensor.length} from {offset} on; {_ADVICE}"
        )


def _check_inline(path: Path, tensor: ir.TensorProtocol, most: int) -> None:
    needed = _bytes(path, tensor)
    if tensor.dtype == ir.DataType.STRING:
        return
    try:
        found = None if needed > 8 * most else tensor.numpy().shape
    except Exception:  # whatever numpy says of numbers that are not there
        found = None
    if found != tuple(tensor.shape):
        raise AdapterFormatError(
            f"{path}: the tensor {tensor.name!r} has shape {_shape(tensor)}, but not as many numbers; {_ADVICE}"
        )


def _bytes(path: Path, tensor: ir.TensorProtocol) -> int:
    shape = [extent for extent in tensor.shape if isinstance(extent, int)]
    if len(shape) != len(list(tensor.shape)) or min(shape, default=0) < 0:
        raise AdapterFormatError(f"{path}: the tensor {tensor.name!r} has the shape {_shape(tensor)}; {_ADVICE}")
    try:
        bits = 0 if tensor.dtype == ir.DataType.STRING else tensor.dtype.bitwidth
    except TypeError:
        raise AdapterFormatError(f"{path}: the tensor {tensor.name!r} has no type of numbers; {_ADVICE}") from None
    return -(-math.prod(shape) * bits // 8)


def _shape(tensor: ir.TensorProtocol) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
