"""Graphs as other tools make them, by hand with onnx alone, after the patterns of ONNX Runtime GenAI's builder.

Names are of no use to whoever looks for layers: they are numbers.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from torch import nn

from sdct_export.adapter.entries import Array

MICROSOFT = "com.microsoft"
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


class Graph:
    """Nodes and initializers one after another; `y = graph("MatMul", x, weight)`."""

    def __init__(self, opset: int = 21) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.opset = opset
        self._numbers = itertools.count()

    def name(self) -> str:
        return f"t{next(self._numbers)}"

    def __call__(self, op: str, *inputs: str | None, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(
            helper.make_node(op, [i or "" for i in inputs], names, name=self.name(), domain=domain, **attributes)
        )
        return names[0] if outputs == 1 else names

    def constant(self, array: Array) -> str:
        """An initializer."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), self.name()))
        return str(self.initializers[-1].name)

    def model(
        self, inputs: dict[str, tuple[str, list[Any]]], outputs: dict[str, tuple[str, str, list[Any]]]
    ) -> onnx.ModelProto:
        """The model; `outputs` are name -> (value, type, shape)."""
        for name, (value, _, _) in outputs.items():
            if not _rename(self.nodes, value, name):
                self.nodes.append(helper.make_node("Identity", [value], [name]))
        ends = [
            [helper.make_tensor_value_info(n, TYPES[kind], shape) for n, (kind, shape) in these.items()]
            for these in (inputs, {n: rest for n, (_, *rest) in outputs.items()})
        ]
        graph = helper.make_graph(self.nodes, "g", *ends, initializer=self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="another-tool")


def _rename(nodes: list[onnx.NodeProto], old: str, new: str) -> bool:
    """Call a value that no node reads by another name; whether it is one."""
    if any(old in node.input for node in nodes):
        return False
    for node in nodes:
        for place, name in enumerate(node.output):
            if name == old:
                node.output[place] = new
                return True
    return False


def nbits(
    graph: Graph, x: str, weight: Array, *, bits: int, block: int = 32, symmetric: bool = True, level: int = 4
) -> str:
    """`x W^T` by `MatMulNBits`, `weight [d_out, d_in]` quantized by ONNX Runtime's quantizer."""
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    parts = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight.T))
    names = [graph.constant(part) for part in parts[: 2 if symmetric else 3]]
    sizes = {"K": weight.shape[1], "N": weight.shape[0], "bits": bits, "block_size": block, "accuracy_level": level}
    return str(graph("MatMulNBits", x, *names, domain=MICROSOFT, **sizes))


def _numpy(model: nn.Module, name: str) -> Array | None:
    try:
        array: Array = model.get_parameter(name).detach().float().numpy()
    except AttributeError:
        return None
    return array


def genai_decoder(
    model: nn.Module,
    *,
    packed: bool = True,
    bits: int | None = None,
    order: str = "qkv",
    dtype: str = "float32",
    opset: int = 21,
) -> onnx.ModelProto:
    """A LLaMA or Qwen 2 as GenAI's builder writes it for the CPU: GroupQueryAttention with rotary and packed inputs.

    No `position_ids`; the cache's head size has a name. `order` is for packed weights that do not go to the attention
    as they are: other orders than its own are split and put together again.
    """
    config: Any = model.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    graph = Graph(opset)
    kind = np.dtype(dtype)

    def linear(x: str, paths: list[str]) -> str:
        weight = np.concatenate([_numpy(model, f"{path}.weight") for path in paths]).astype(kind)
        biases = [_numpy(model, f"{path}.bias") for path in paths]
        y = nbits(graph, x, weight, bits=bits) if bits else graph("MatMul", x, graph.constant(weight.T))
        return y if biases[0] is None else graph("Add", y, graph.constant(np.concatenate(biases).astype(kind)))

    def scale(path: str) -> str:
        found = _numpy(model, f"{path}.weight")
        assert found is not None
        return graph.constant(found.astype(kind))

    count = graph("ReduceSum", "attention_mask", graph.constant(np.array([1])), keepdims=0)
    count = graph("Cast", graph("Sub", count, graph.constant(np.array([1]))), to=TensorProto.INT32)
    total = graph("Gather", graph("Shape", "attention_mask"), graph.constant(np.array(1)), axis=0)
    total = graph("Cast", total, to=TensorProto.INT32)
    angles = np.outer(np.arange(config.max_position_embeddings), theta ** (-np.arange(0, size, 2) / size))
    cos, sin = graph.constant(np.cos(angles).astype(kind)), graph.constant(np.sin(angles).astype(kind))
    embedding = _numpy(model, "model.embed_tokens.weight")
    assert embedding is not None
    hidden = graph("Gather", graph.constant(embedding.astype(kind)), "input_ids")
    epsilon = config.rms_norm_eps
    x = graph(
        "SimplifiedLayerNormalization", hidden, scale("model.layers.0.input_layernorm"), axis=-1, epsilon=epsilon
    )
    inputs = {n: ("int64", ["batch_size", "sequence_length"]) for n in ("input_ids",)}
    inputs |= {"attention_mask": ("int64", ["batch_size", "total_sequence_length"])}
    outputs: dict[str, Any] = {}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        names = {part: f"{layer}.self_attn.{part}_proj" for part in "qkv"}
        widths = {"q": heads * size, "k": groups * size, "v": groups * size}
        if packed:
            y: Any = linear(x, [names[part] for part in order])
            if order != "qkv":
                lengths = graph.constant(np.array([widths[part] for part in order]))
                parts = dict(zip(order, graph("Split", y, lengths, outputs=3, axis=-1), strict=True))
                y = graph("Concat", *(parts[part] for part in "qkv"), axis=-1)
            query: list[str | None] = [y, None, None]
        else:
            query = [linear(x, [names[part]]) for part in "qkv"]
        pasts = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        attended, key, value = graph(
            "GroupQueryAttention", *query, *pasts, count, total, cos, sin, outputs=3, domain=MICROSOFT,
            num_heads=heads, kv_num_heads=groups, scale=size**-0.5, do_rotary=1, rotary_interleaved=0,
        )  # fmt: skip
        shape = ["batch_size", groups, "past_sequence_length", "kv_cache_dim"]
        inputs |= dict.fromkeys(pasts, (dtype, shape))
        total_shape = [*shape[:2], "total_sequence_length", shape[3]]
        outputs |= {f"present.{i}.key": (key, dtype, total_shape), f"present.{i}.value": (value, dtype, total_shape)}
        y = linear(attended, [f"{layer}.self_attn.o_proj"])
        norm = scale(f"{layer}.post_attention_layernorm")
        x, _, _, hidden = graph(
            "SkipSimplifiedLayerNormalization", hidden, y, norm, outputs=4, domain=MICROSOFT, epsilon=epsilon
        )
        gate, up = linear(x, [f"{layer}.mlp.gate_proj"]), linear(x, [f"{layer}.mlp.up_proj"])
        y = linear(graph("Mul", graph("Mul", gate, graph("Sigmoid", gate)), up), [f"{layer}.mlp.down_proj"])
        last = i + 1 == config.num_hidden_layers
        norm = scale("model.norm" if last else f"model.layers.{i + 1}.input_layernorm")
        x, _, _, hidden = graph(
            "SkipSimplifiedLayerNormalization", hidden, y, norm, outputs=4, domain=MICROSOFT, epsilon=epsilon
        )
    logits = linear(x, ["lm_head"])
    outputs["logits"] = (logits, dtype, ["batch_size", "sequence_length", config.vocab_size])
    return graph.model(inputs, outputs)


def save(model: onnx.ModelProto, folder: Path, *, external: bool = True) -> Path:
    """`model.onnx` in a new folder, weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        location="model.onnx.data",
        size_threshold=256,
        convert_attribute=False,
    )
    return path
