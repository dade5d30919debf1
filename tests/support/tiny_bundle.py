"""A hand-made bundle that honours the graph contract, and what it computes in float64 numpy: for tests of the runtime.

h = embed[input_ids]; q = h Wq^T + bq; v = h Wv^T; o = tanh([q, v]) Wo^T    group block.q+v, group block.o
logits = (mean of o over the unmasked tokens) Wc^T + bc                     banked head classifier
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import scipy.fft
from onnx import TensorProto, helper, numpy_helper
from references import delta_weight
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sdct_export import contract
from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.config import SdctConfig
from sdct_export.adapter.entries import DTYPE_NAMES, Array, SdctEntries
from sdct_export.base.identity import base_hash, module_digest
from sdct_export.bundle.description import AdapterRecord, Bundle, TensorSpec, adapter_sha256, file_sha256
from sdct_export.contract import Group, Head

VOCABULARY, D, Q, V, OUT, LABELS = 11, 13, 10, 7, 9, 4
SHAPES = {"block.q": (Q, D), "block.v": (V, D), "block.o": (OUT, Q + V)}
CAPACITY = {"block.q": 6, "block.v": 5, "block.o": 8}
GROUPS = (
    Group("block.q+v", ("block.q", "block.v"), D, (Q, V), (CAPACITY["block.q"], CAPACITY["block.v"])),
    Group("block.o", ("block.o",), Q + V, (OUT,), (CAPACITY["block.o"],)),
)
_rng = np.random.default_rng(7)
WEIGHTS: dict[str, Array] = {
    name: _rng.normal(size=shape).astype(np.float32)
    for name, shape in {
        "embed": (VOCABULARY, D), "block.q": (Q, D), "block.q.bias": (Q,), "block.v": (V, D), "block.o": (OUT, Q + V),
        "classifier": (LABELS, OUT), "classifier.bias": (LABELS,),
    }.items()
}  # fmt: skip
ROW = Mapping[str, float]


def make_adapter(
    seed: int, *, labels: int | None = None, scaling: float = 0.5, n: Mapping[str, int] | None = None
) -> SdctAdapter:
    """Random entries for every module (or the counts in `n`), a head of `labels`, and the right base hash."""
    rng = np.random.default_rng(seed)
    counts = {m: int(rng.integers(1, c + 1)) for m, c in CAPACITY.items()} if n is None else n
    modules = {}
    for module, count in counts.items():
        flat = rng.choice(SHAPES[module][0] * SHAPES[module][1], size=count, replace=False)
        indices = np.stack(np.unravel_index(flat, SHAPES[module]), axis=1).astype(np.int32)
        modules[module] = SdctEntries(rng.normal(size=count).astype(np.float32), indices, SHAPES[module])
    saved = {}
    if labels is not None:
        saved["classifier.weight"] = rng.normal(size=(labels, OUT)).astype(np.float32)
        saved["classifier.bias"] = rng.normal(size=labels).astype(np.float32)
    digest = base_hash(WEIGHTS.__getitem__, {m: SHAPES[m] for m in modules}, "float32") if modules else None
    config = SdctConfig(scaling=scaling, modules_to_save=["classifier"])
    return SdctAdapter(config, modules, saved, digest, "float32" if modules else None)


def reference(
    inputs: Mapping[str, Array], rows: Sequence[ROW], adapters: Mapping[str, SdctAdapter]
) -> dict[str, Array]:
    """The outputs in float64, row by row, from dense weight changes."""
    outputs: dict[str, list[Array]] = {"hidden": [], "logits": []}
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], rows, strict=True):
        weights = {name: array.astype(np.float64) for name, array in WEIGHTS.items()}
        for name, scale in row.items():
            adapter = adapters[name]
            for module, entries in adapter.modules.items():
                change = delta_weight(entries.values, entries.indices, SHAPES[module], adapter.config.scaling)
                weights[module] = weights[module] + scale * change
            if "classifier.weight" in adapter.saved:
                labels = adapter.saved["classifier.weight"].shape[0]
                weight, bias = np.zeros((LABELS, OUT)), np.full(LABELS, float(np.finfo(np.float32).min) / 2)
                weight[:labels], bias[:labels] = adapter.saved["classifier.weight"], adapter.saved["classifier.bias"]
                weights["classifier"] = weights["classifier"] + scale * (weight - WEIGHTS["classifier"])
                weights["classifier.bias"] = weights["classifier.bias"] + scale * (bias - WEIGHTS["classifier.bias"])
        h = weights["embed"][ids]
        qv = np.concatenate([h @ weights["block.q"].T + weights["block.q.bias"], h @ weights["block.v"].T], axis=-1)
        hidden = np.tanh(qv) @ weights["block.o"].T
        pooled = (hidden * mask[:, None]).sum(axis=0) / mask.sum()
        outputs["hidden"].append(hidden)
        outputs["logits"].append(pooled @ weights["classifier"].T + weights["classifier.bias"])
    return {name: np.stack(parts) for name, parts in outputs.items()}


def make_inputs(seed: int, batch: int, sequence: int = 5) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, sequence), np.int64)
    mask[:, sequence - 1] = rng.integers(0, 2, size=batch)
    return {"input_ids": rng.integers(0, VOCABULARY, size=(batch, sequence)), "attention_mask": mask}


def write_bundle(
    folder: Path,
    adapters: Mapping[str, SdctAdapter] | None = None,
    *,
    merged: bool = False,
    head: bool = True,
    pool: str = "masked",
) -> Path:
    """Write a bundle; `merged` leaves out the adapter inputs.

    `pool` is the mean over the tokens that are not masked, that over `all` of them, or the `last` token.
    """
    folder.mkdir(parents=True)
    records = {}
    for name, adapter in (adapters or {}).items():
        adapter.save(folder / "adapters" / name)
        labels = adapter.saved.get("classifier.weight")
        records[name] = AdapterRecord(
            adapter_sha256(folder / "adapters" / name), None if labels is None else labels.shape[0]
        )
    onnx.save(_Graph(merged, head, pool).model(), folder / "model.onnx")
    token = ("batch", "sequence")
    digests = {
        dtype: {m: module_digest(m, WEIGHTS[m], shape, dtype) for m, shape in SHAPES.items()} for dtype in DTYPE_NAMES
    }
    Bundle(
        kind="merged" if merged else "multi",
        task="SEQ_CLS",
        dtype="float32",
        base_name="tiny",
        base_architecture="Tiny",
        base_hash=base_hash(WEIGHTS.__getitem__, SHAPES, "float32"),
        base_hash_dtype="float32",
        inputs=(TensorSpec("input_ids", "int64", token), TensorSpec("attention_mask", "int64", token)),
        outputs=(TensorSpec("hidden", "float32", (*token, OUT)), TensorSpec("logits", "float32", ("batch", LABELS))),
        model_sha256=file_sha256(folder / "model.onnx"),
        groups=() if merged else GROUPS,
        heads=(Head("classifier", LABELS, OUT),) if head and not merged else (),
        adapters=records,
        module_digests=digests,
    ).write(folder)
    return folder


class _Graph:
    def __init__(self, merged: bool, head: bool, pool: str) -> None:
        self.merged, self.head, self.pool = merged, head, pool
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: Array) -> str:
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def delta(self, group: Group, x: str, ys: list[str]) -> list[str]:
        """`SpectralDelta` with a dense `dW` per row."""
        if self.merged:
            return ys
        values = self.op("Gather", contract.values_name(group.name), contract.ADAPTER_IDS)
        values = self.op("Mul", values, self.op("Unsqueeze", contract.ADAPTER_SCALES, self.ints(-1)))
        indices = self.op("Gather", contract.indices_name(group.name), contract.ADAPTER_IDS)
        batch = self.op("Shape", x, end=1)
        last = self.op("Range", *(self.op("Squeeze", t) for t in (self.ints(0), batch, self.ints(1))))
        any_id = self.op("ReduceMax", contract.ADAPTER_IDS, self.ints(1), keepdims=0)
        some = self.op("Unsqueeze", self.op("Cast", any_id, to=TensorProto.BOOL), self.ints(1, 2))
        c_in = self.constant(scipy.fft.dct(np.eye(group.d_in), axis=0, norm="ortho").astype(np.float32))
        out, start = [], 0
        for y, d_out, capacity in zip(ys, group.d_out, group.capacity, strict=True):
            stop = start + capacity
            part = self.op("Slice", values, self.ints(start), self.ints(stop), self.ints(2))
            place = self.op("Slice", indices, self.ints(start), self.ints(stop), self.ints(2))
            place = self.op("Cast", place, to=TensorProto.INT64)
            rows = self.op("Reshape", last, self.ints(-1, 1, 1, 1))
            zero = self.op("Mul", self.op("Slice", place, self.ints(0), self.ints(1), self.ints(3)), self.ints(0))
            place = self.op("Concat", self.op("Add", rows, zero), place, axis=3)
            size = self.op("Concat", batch, self.ints(d_out, group.d_in), axis=0)
            dense = self.op("ConstantOfShape", size)
            dense = self.op("ScatterND", dense, place, part, reduction="add")
            c_out = self.constant(scipy.fft.dct(np.eye(d_out), axis=0, norm="ortho").T.astype(np.float32))
            dense = self.op("MatMul", self.op("MatMul", c_out, dense), c_in)
            change = self.op("MatMul", x, self.op("Transpose", dense, perm=[0, 2, 1]))
            out.append(self.op("Where", some, self.op("Add", y, change), y))
            start = stop
        return out

    def classifier(self, x: str, y: str) -> str:
        if self.merged or not self.head:
            return self.op("Identity", y, out="logits")
        weight, bias, present = (
            self.op("Gather", name, contract.ADAPTER_IDS) for name in contract.head_names("classifier")
        )
        scale = self.op("Mul", present, contract.ADAPTER_SCALES)
        own = self.op("Add", self.op("Einsum", x, weight, equation="bd,bkod->bko"), bias)
        own = self.op(
            "ReduceSum", self.op("Mul", own, self.op("Unsqueeze", scale, self.ints(-1))), self.ints(1), keepdims=0
        )
        total = self.op("ReduceSum", scale, self.ints(1))
        kept = self.op("Mul", y, self.op("Sub", self.constant(np.ones((), np.float32)), total))
        some = self.op("Cast", self.op("ReduceMax", self.op("Abs", scale), self.ints(1)), to=TensorProto.BOOL)
        return self.op("Where", some, self.op("Add", kept, own), y, out="logits")

    def model(self) -> onnx.ModelProto:
        w = {
            name: self.constant(array.T if array.ndim == 2 and name != "embed" else array)
            for name, array in WEIGHTS.items()
        }
        h = self.op("Gather", w["embed"], "input_ids")
        q = self.op("Add", self.op("MatMul", h, w["block.q"]), w["block.q.bias"])
        qv = self.delta(GROUPS[0], h, [q, self.op("MatMul", h, w["block.v"])])
        z = self.op("Tanh", self.op("Concat", *qv, axis=2))
        (o,) = self.delta(GROUPS[1], z, [self.op("MatMul", z, w["block.o"])])
        hidden = self.op("Identity", o, out="hidden")
        mask = self.op("Cast", self.op("Unsqueeze", "attention_mask", self.ints(2)), to=TensorProto.FLOAT)
        total = self.op("ReduceSum", self.op("Mul", hidden, mask), self.ints(1), keepdims=0)
        pooled = self.op("Div", total, self.op("ReduceSum", mask, self.ints(1), keepdims=0))
        if self.pool == "all":
            pooled = self.op("ReduceMean", hidden, self.ints(1), keepdims=0)
        if self.pool == "last":
            pooled = self.op("Gather", hidden, self.constant(np.array(-1, np.int64)), axis=1)
        self.classifier(pooled, self.op("Add", self.op("MatMul", pooled, w["classifier"]), w["classifier.bias"]))
        floats, ints, longs = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
        inputs = {"input_ids": (longs, ["batch", "sequence"]), "attention_mask": (longs, ["batch", "sequence"])}
        if not self.merged:
            inputs |= {
                contract.ADAPTER_IDS: (ints, ["batch", "blend"]),
                contract.ADAPTER_SCALES: (floats, ["batch", "blend"]),
            }
            for group in GROUPS:
                inputs[contract.values_name(group.name)] = (floats, ["slots", sum(group.capacity)])
                inputs[contract.indices_name(group.name)] = (ints, ["slots", sum(group.capacity), 2])
        if self.head and not self.merged:
            shapes = (["slots", LABELS, OUT], ["slots", LABELS], ["slots"])
            inputs |= {n: (floats, s) for n, s in zip(contract.head_names("classifier"), shapes, strict=True)}
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
            [
                helper.make_tensor_value_info("hidden", floats, ["batch", "sequence", OUT]),
                helper.make_tensor_value_info("logits", floats, ["batch", LABELS]),
            ],
            self.constants,
        )
        model = helper.make_model(graph, ir_version=contract.IR_VERSION, opset_imports=[helper.make_opsetid("", 18)])
        onnx.checker.check_model(model)
        return model


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f", "g"]


def write_tokenizer(folder: Path, *, special: bool = True, **settings: object) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"} | settings))
