"""Two evaluators of bfloat16 graphs on the CPU, where ONNX Runtime has hardly a kernel for them.

`rounded` is what a GPU's kernels do: every node computes in float32 from bfloat16 numbers and rounds its result once.
`by_onnx` is ONNX's own evaluator, in numpy and ml_dtypes, which rounds inside of nodes (Gelu, Softmax), too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.reference
import onnxruntime
from onnx import TensorProto, helper

from sdct_export.adapter.entries import Array
from sdct_export.contract import DOMAIN, OP_TYPE

BFLOAT16 = TensorProto.BFLOAT16
_AS_THEY_ARE = ("Cast", "Constant", "If", OP_TYPE)


def loaded(path: Path, *, native: bool = False) -> onnx.ModelProto:
    """The model of a bundle as `typed` leaves it; with `native` the operator's nodes stay."""
    model = onnx.load(path)
    if native:
        del model.functions[:]
        for node in model.graph.node:
            if node.domain == DOMAIN:
                node.overload = ""
    return typed(model)


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its functions inlined and a type for every value."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return onnx.shape_inference.infer_shapes(model)


def types_of(graph: onnx.GraphProto, outer: Mapping[str, int] | None = None) -> dict[str, int]:
    """Element type of every value that `graph` sees."""
    types = dict(outer or {}) | {tensor.name: tensor.data_type for tensor in graph.initializer}
    return types | {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers from operators in float32 alone, each result rounded once to bfloat16. Changes `model`."""
    _round(model.graph, {})
    return model


def _round(graph: onnx.GraphProto, outer: Mapping[str, int]) -> None:
    types = types_of(graph, outer)
    nodes = []
    for node in graph.node:
        assert all(types.get(name, 0) for name in (*node.input, *node.output) if name), (
            f"a value of {node} has no type"
        )
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _round(attribute.g, types)
        nodes.append(node)
        if node.op_type in _AS_THEY_ARE:
            continue
        for index, name in enumerate(node.input):
            if types.get(name) == BFLOAT16:
                wide = f"{node.output[0]}.in.{index}"
                nodes.insert(-1, helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT))
                node.input[index] = wide
        for index, name in enumerate(node.output):
            if types.get(name) == BFLOAT16:
                node.output[index] = f"{name}.wide"
                nodes.append(helper.make_node("Cast", [node.output[index]], [name], to=BFLOAT16))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]


def session(model: onnx.ModelProto, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    """A session in which no cast is optimized away."""
    options = options or onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def by_onnx(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs by ONNX's evaluator."""
    names = [value.name for value in model.graph.output]
    with np.errstate(invalid="ignore"):
        outputs = onnx.reference.ReferenceEvaluator(model).run(names, dict(feeds))
    return dict(zip(names, outputs, strict=True))
