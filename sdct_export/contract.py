"""The contract of a multi-adapter graph: names, shapes, layout; one truth for graph, operator, plugin and runtime.

A *group* is the set of adapted linear layers that read the same tensor `x`. One node per group:

    domain  sdct                 op_type SpectralDelta        (one `overload` per signature; a model-local function of
                                                               the same domain, name and overload is its portable body)
    inputs  x               [batch, ..., d_in]  or [batch * tokens, d_in], row-major   float16 | bfloat16 | float32
            adapter_ids     [batch, k]          int32    bank slots, 0 = none
            adapter_scales  [batch, k]          float32
            values          [slots, n]          float32  the adapter's scaling is folded in; slot 0 is all zero
            indices         [slots, n, 2]       int32    (row, col) of each value
            y_1 ... y_m     [..., d_out_j]      outputs of the base layers
    outputs y_1' ... y_m'   same shapes and dtypes
    attributes  d_in int, d_out [int] * m, capacity [int] * m

`n = sum(capacity)`: projection `j` owns the columns `offset_j ... offset_j + capacity_j` of a slot, `offset_j` the
sum of the capacities before it; its rows count from 0 within its own `d_out_j`. Within a projection entries are
sorted by row, then col; unused places follow at its end with value 0 and the indices of its last entry (0, 0 where
it has none), so rows never fall.

    y_j' = y_j + IDCT( sum_k scale_k * scatter_add_row( value * gather_col( DCT(x) ) ) )     in float32,
           rounded once to the dtype of y_j

A row whose ids are all 0 returns `y_j` unchanged, bit for bit. Ids outside `0 .. slots - 1` are refused before a run.

Saved linear modules (`modules_to_save`) are banked per module: `sdct.<module>.weight [slots, d_out, d_in]` and
`sdct.<module>.bias [slots, d_out]` in the `edge_dtype` of the model, applied linearly like every weight change:

    y' = (1 - sum_k s_k) y + sum_k s_k (W_k x + b_k),   k over the ids that are not 0 whose adapter saves the module

where `s_k = scale_k * present[id_k]` and `sdct.<module>.present [slots]` float32 is 1 where the slot's adapter saves
the module, else 0. Rows with every `s_k = 0` keep `y` bit for bit. An adapter with fewer labels than the bank's
`d_out` has weight 0 and bias `finfo(dtype).min / 2` in the columns beyond its own. A row with such an adapter
(`s_k != 0`, of any sign) gets `finfo(dtype).min / 2` there, so that neither argmax nor softmax ever picks them.

A causal language model with a key-value cache (see `Cache`) is one graph for prefill and decode:

    inputs  input_ids                [batch, sequence]  int64    the new tokens
            attention_mask           [batch, total]     int64    total = past + sequence; 0 is padding, on either side
            position_ids             [batch, sequence]  int64    of each new token in its own row, from 0
            past_key_values.<i>.key  [batch, kv_heads, past, head_size]  and .value; past = 0 in the first step
            last_logits              [1]                bool     optional: true gives the logits of a row's last token
    outputs logits                   [batch, sequence, vocabulary], or [batch, 1, vocabulary] with `last_logits`
            present.<i>.key, .value  [batch, kv_heads, total, head_size], the pasts of the next step

The mask of a step is that of the step before with the new tokens' columns behind it. Logits at padding mean nothing.
"""

from __future__ import annotations

import dataclasses
import os.path
from collections.abc import Sequence

from .errors import ConfigError

DOMAIN = "sdct"
OP_TYPE = "SpectralDelta"
OP_VERSION = 1
DCT_OP_TYPE = "Dct"  # helper functions of the portable body, overload = length
IDCT_OP_TYPE = "Idct"
PLACE_OP_TYPE = "DctPlace"
IR_VERSION = 10  # the first with function overloads

ADAPTER_IDS = "adapter_ids"
ADAPTER_SCALES = "adapter_scales"
OPTIONAL_INPUTS = ("token_type_ids",)  # zero where a request leaves them out, as in transformers
SENTENCE_EMBEDDING = "sentence_embedding"  # [batch, dim], the one output of a bundle with pooling
BATCH, BLEND, SLOTS = "batch", "blend", "slots"  # symbolic dimensions
INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
LAST_LOGITS = "last_logits"
TARGETS = ("ort", "standard", "tensorrt")  # who computes the attention of a cached graph, see `Cache`
KEPT = "kept"  # which new tokens get logits, int64 [batch, kept]: a value of a cached graph, an input of its engine


def edge_dtype(dtype: str) -> str:
    """Type of the float inputs, outputs and banked heads of a model whose weights are of `dtype`.

    Its own, but float32 around bfloat16, which numpy and ONNX Runtime's Python interface do not know.
    """
    return "float32" if dtype == "bfloat16" else dtype


@dataclasses.dataclass(frozen=True)
class Group:
    """Adapted modules that read one tensor; bank `sdct.<name>.values [slots, sum(capacity)]`."""

    name: str
    modules: tuple[str, ...]
    d_in: int
    d_out: tuple[int, ...]
    capacity: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Head:
    """A saved linear module with banked parameters, weight `[slots, d_out, d_in]`."""

    module: str
    d_out: int
    d_in: int


@dataclasses.dataclass(frozen=True)
class Cache:
    """The key-value cache of a causal language model's graph, the same in every layer.

    `dtype` is that of the keys and values in the graph's inputs and outputs. With target `ort` the attention is
    com.microsoft::GroupQueryAttention: the cache holds the tokens of a row side by side from its first column on,
    wherever the mask has them (of the past only their number counts), and the memory of a past may be that of its
    present. With target `standard` it is made of ONNX's own operators, and a token keeps its column. `tensorrt` is the
    same to whoever runs the graph; the values `KEPT` and those of `seen` have names in it, so that `engine.lower` can
    put others in their place. `windows` are the lengths of sliding windows in some of the layers.

    A graph that another tool made is `foreign`: it has no `last_logits`, and with target `ort` wants the padding of
    the first step on the right. It may count positions itself, and then has no `position_ids`.
    """

    target: str
    layers: int
    kv_heads: int
    head_size: int
    dtype: str
    windows: tuple[int, ...] = ()
    foreign: bool = False
    position_ids: bool = True

    @property
    def pasts(self) -> tuple[str, ...]:
        """Names of the inputs with the cache, key and value of each layer in turn."""
        return tuple(f"past_key_values.{i}.{part}" for i in range(self.layers) for part in ("key", "value"))

    @property
    def presents(self) -> tuple[str, ...]:
        """Names of the outputs with the cache, in the order of `pasts`."""
        return tuple(f"present.{i}.{part}" for i in range(self.layers) for part in ("key", "value"))

    @property
    def seen(self) -> dict[str, int | None]:
        """Values of a graph for TensorRT with their windows: the columns a token sees, `[batch, sequence, total]`.

        Not every graph has them all: a model may have a window in every layer.
        """
        return {f"sdct.seen.{'all' if window is None else window}": window for window in (None, *self.windows)}


BITS = {"int8": 8, "int4": 4}  # what weights can be quantized to, under the names of the command line
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (1, 4)  # ONNX Runtime's numbers of those that its CPU provider tells apart
MARGIN = 3.0  # times what quantization did to the outputs at export is what it may do on other inputs or adapters


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the base's linear layers are quantized: ONNX Runtime's `MatMulNBits`, blocks of `block_size` along `d_in`.

        y = x W^T,  W[n, k] = scale[n, b] * (q[n, k] - zero[n, b]),  b = k // block_size,  q of `bits` bits

    Args:
        bits: 8 or 4.
        block_size: elements of a row of `W` that share a scale and a zero point.
        accuracy_level: 1 multiplies in float32; 4 rounds `x` to 8 bits first, block by block, by its largest element.
        modules: the layers, by their paths.
        rounding: how far that rounding of `x` moved the outputs at export, in `probe.difference`'s measure.
        change: how far all of it moved them from the float model's, in the measure of training probes.
    """

    bits: int
    block_size: int = 32
    accuracy_level: int = 4
    modules: tuple[str, ...] = ()
    rounding: float = 0.0
    change: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("bits", self.bits, tuple(BITS.values())),
            ("block_size", self.block_size, BLOCK_SIZES),
            ("accuracy_level", self.accuracy_level, ACCURACY_LEVELS),
        ):
            if isinstance(value, bool) or value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")

    @property
    def name(self) -> str:
        """`int8` or `int4`."""
        return f"int{self.bits}"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """That another tool made the graph, and what its weights and products do to the base's numbers.

    Args:
        producer: the tool, as the ONNX file names it.
        rounding: as `Quantization.rounding`, of the products that round what they multiply.
        change: as `Quantization.change`.
    """

    producer: str
    rounding: float = 0.0
    change: float = 0.0

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"the graph of {self.producer or 'an unnamed tool'}"


def group_name(modules: Sequence[str]) -> str:
    """Name of the group of `modules`: their common parent and their last names joined by `+`.

    >>> group_name(["h.0.attn.q", "h.0.attn.v"])
    'h.0.attn.q+v'
    """
    if len(modules) == 1:
        return modules[0]
    parts = [m.split(".") for m in modules]
    common = os.path.commonprefix(parts)
    prefix = ".".join(common)
    tails = "+".join(".".join(p[len(common) :]) for p in parts)
    return f"{prefix}.{tails}" if prefix else tails


def values_name(group: str) -> str:
    """Graph input of a group's values, float32 `[slots, n]`."""
    return f"sdct.{group}.values"


def indices_name(group: str) -> str:
    """Graph input of a group's indices, int32 `[slots, n, 2]`."""
    return f"sdct.{group}.indices"


def head_names(module: str) -> tuple[str, str, str]:
    """Graph inputs of a banked module: weight `[slots, d_out, d_in]`, bias `[slots, d_out]`, present `[slots]`."""
    return f"sdct.{module}.weight", f"sdct.{module}.bias", f"sdct.{module}.present"
