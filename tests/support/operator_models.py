"""ONNX models of one `SpectralDelta` node for a case of `native_cases`, and how to run them with ONNX Runtime."""

import numpy as np
import onnxruntime
from native_cases import DTYPES, Array, Case
from onnx import TensorProto, helper

from sdct_export import contract

TYPES = {DTYPES[0]: TensorProto.FLOAT, DTYPES[1]: TensorProto.FLOAT16, DTYPES[2]: TensorProto.BFLOAT16}


def model_of(case: Case, functions=(), overload: str = "") -> bytes:
    m, d_in = len(case.y), case.x.shape[1]
    tensor = TYPES[case.dtype]
    names = [f"y{j}" for j in range(m)]
    node = helper.make_node(
        contract.OP_TYPE,
        ["x", "ids", "scales", "values", "indices", *names],
        [f"out{j}" for j in range(m)],
        domain=contract.DOMAIN,
        overload=overload,
        name="the_node",
        d_in=d_in,
        d_out=[y.shape[1] for y in case.y],
        capacity=case.capacity,
    )
    n = sum(case.capacity)
    inputs = [
        helper.make_tensor_value_info("x", tensor, ["tokens", d_in]),
        helper.make_tensor_value_info("ids", TensorProto.INT32, ["rows", "k"]),
        helper.make_tensor_value_info("scales", TensorProto.FLOAT, ["rows", "k"]),
        helper.make_tensor_value_info("values", TensorProto.FLOAT, ["slots", n]),
        helper.make_tensor_value_info("indices", TensorProto.INT32, ["slots", n, 2]),
        *(helper.make_tensor_value_info(f"y{j}", tensor, ["tokens", y.shape[1]]) for j, y in enumerate(case.y)),
    ]
    outputs = [helper.make_tensor_value_info(f"out{j}", tensor, ["tokens", y.shape[1]]) for j, y in enumerate(case.y)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(contract.DOMAIN, contract.OP_VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=contract.IR_VERSION)
    return model.SerializeToString()


def run(session: onnxruntime.InferenceSession, case: Case) -> list[Array]:
    feeds = {"x": case.x, "ids": case.ids, "scales": case.scales, "values": case.values, "indices": case.indices}
    feeds |= {f"y{j}": y for j, y in enumerate(case.y)}
    from_bits = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    binding = session.io_binding()
    for name, array in feeds.items():
        array = np.ascontiguousarray(array)
        if array.dtype == DTYPES[2]:
            value = from_bits(array.view(np.uint16), TensorProto.BFLOAT16)
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
    outputs = []
    for j, y in enumerate(case.y):
        out = np.empty_like(y)
        if y.dtype == DTYPES[2]:
            value = from_bits(out.view(np.uint16), TensorProto.BFLOAT16)
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(out)
        binding.bind_ortvalue_output(f"out{j}", value)
        outputs.append(out)
    session.run_with_iobinding(binding)
    return outputs
