"""What the ONNX parsers of four TensorRT versions take, of the operators that graphs of language models are made of.

From docs/operators.md of onnx-tensorrt at the commits that NVIDIA/TensorRT releases 8.5 (fd119fec), 10.0 (eb43908b),
10.16 (6bde6596) and 11.1 (7c51a63a) name as their parser. Types: 8.5 casts int64 down to its int32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
from onnx import TensorProto

Version = tuple[int, int]
VERSIONS: tuple[Version, ...] = ((8, 5), (10, 0), (10, 16), (11, 1))
OPSETS = {(8, 5): 17, (10, 0): 20, (10, 16): 24, (11, 1): 24}
_OLD = {"float": ("FP32", "FP16"), "int": ("INT32",), "bool": ("BOOL",)}
_NEW = {"float": ("FP32", "FP16", "BF16"), "int": ("INT32", "INT64"), "bool": ("BOOL",)}
_FLOAT, _NUMBER, _ANY, _BOOL = ("float",), ("float", "int"), ("float", "int", "bool"), ("bool",)
_EVERYWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Cos", "CumSum", "Erf", "Exp", "Gemm", "MatMul", "Reciprocal", "Sigmoid", "Sin"), _FLOAT),
    **dict.fromkeys(("Softmax", "Sqrt", "Tanh"), _FLOAT),
    **dict.fromkeys(("Add", "Div", "Equal", "Less", "LessOrEqual", "Max", "Min", "Mul", "Neg", "Range"), _NUMBER),
    **dict.fromkeys(("ScatterND", "Sub"), _NUMBER),
    **dict.fromkeys(("Cast", "Concat", "Constant", "Expand", "Gather", "GatherElements", "GatherND", "Reshape"), _ANY),
    **dict.fromkeys(("Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"), _ANY),
    **dict.fromkeys(("And", "Not"), _BOOL),
}
_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceSum")
TABLES: dict[Version, dict[str, tuple[str, ...]]] = {
    (8, 5): {**_EVERYWHERE, **dict.fromkeys((*_REDUCTIONS, "Pow", "TopK"), _FLOAT)},
    (10, 0): {
        **_EVERYWHERE, **dict.fromkeys((*_REDUCTIONS, "Gelu", "TopK"), _NUMBER), "LayerNormalization": _FLOAT,
        "Pow": _FLOAT,
    },
}  # fmt: skip
TABLES[10, 16] = TABLES[11, 1] = {**TABLES[10, 0], "Pow": _NUMBER, "TensorScatter": _NUMBER}
# inputs that the types are about, where that is not all of them
_DATA = dict.fromkeys(
    ("CumSum", "Expand", "Gather", "GatherElements", "GatherND", "Reshape", "Slice", "Split", "Squeeze", "Tile",
     "TopK", "Unsqueeze", *_REDUCTIONS), (0,),
) | {"ScatterND": (0, 2), "TensorScatter": (0, 1), "Where": (1, 2)}  # fmt: skip
# inputs that must be known when the engine is built
_CONSTANT = {"CumSum": 1, "Slice": 3, "Squeeze": 1, "Unsqueeze": 1, "TopK": 1} | dict.fromkeys(_REDUCTIONS, 1)
_NAMES = {
    TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16", TensorProto.BFLOAT16: "BF16", TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64", TensorProto.BOOL: "BOOL",
}  # fmt: skip


def objections(model: onnx.ModelProto, version: Version) -> list[str]:
    """What the parser of `version` does not take, each as a line. The plugin's own operator is left out."""
    opset = {o.domain: o.version for o in model.opset_import}[""]
    found = [f"opset {opset}"] if opset > OPSETS[version] else []
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=False).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {weight.name: weight.data_type for weight in graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    constants = {weight.name for weight in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    if graph_inputs := constants & {value.name for value in graph.input}:
        found.append(f"inputs with a default: {sorted(graph_inputs)}")  # the parser takes them for constants
    for node in graph.node:
        if not node.domain:
            found += [f"{node.op_type} {node.name!r}: {why}" for why in _about(node, version, types, ranks, constants)]
    return found


def _about(
    node: onnx.NodeProto, version: Version, types: Mapping[str, int], ranks: Mapping[str, int], constants: set[str]
) -> Iterable[str]:
    kinds = TABLES[version].get(node.op_type)
    if kinds is None:
        yield "no such operator"
        return
    names = _OLD if version < (9, 0) else _NEW
    taken = {name for kind in kinds for name in names[kind]}
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    for i in _DATA.get(node.op_type, range(len(node.input))):
        kind = _NAMES.get(types.get(node.input[i], 0), "unknown") if node.input[i : i + 1] and node.input[i] else ""
        if kind == "INT64" and version < (9, 0):
            kind = "INT32"
        if kind and kind not in taken:
            yield f"input {i} is {kind}"
    at = _CONSTANT.get(node.op_type)
    if at is not None and len(node.input) > at and node.input[at] and node.input[at] not in constants:
        yield f"input {at} is no constant"
    if node.op_type == "Shape" and given and version < (10, 0):
        yield "bounds are ignored"
    if node.op_type == "ScatterND" and given.get("reduction", b"none") != b"none":
        yield "a reduction"
    if node.op_type == "LayerNormalization" and any(node.output[1:]):
        yield "more than one output"
    if node.op_type == "TensorScatter" and (given.get("axis") != -2 or ranks.get(node.input[1], 4) != 4):
        yield "another axis than the last but one of four"
