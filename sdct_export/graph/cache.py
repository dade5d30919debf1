"""A causal language model as one graph for prefill and decode, with its key-value cache as inputs and outputs.

What a family's attention must be for that, causal, perhaps within a sliding window, with a scale and a soft cap, is
not believed but looked at: each mask is compared with that (`attention.mask`), and `_compare` runs the model in torch,
prefill and two steps, and compares it with the model without a cache.
"""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..base.reference import run_model
from ..contract import ATTENTION_MASK, BATCH, INPUT_IDS, KEPT, LAST_LOGITS, POSITION_IDS, TARGETS, Cache
from ..errors import ConfigError, UnsupportedError, an
from .attention import NAME, Attention, Handover, active
from .function_body import Ops
from .match import SCOPES
from .rotary import folded
from .trace import SEQUENCE, converted, quiet

_PAST, _TOTAL = "past", "total"  # symbolic dimensions
_HEAD_SIZES = 8  # GroupQueryAttention takes multiples of it
_AGREE = {torch.float32: 1e-3}  # largest difference in `_compare`, of the size of the logits; 5e-2 in half types
# model types whose export with a cache is compared with transformers in tests/graph/test_cache.py
_TESTED = frozenset({"gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3"})
_LAYERS = {"full_attention", "sliding_attention"}
_WITHOUT = "export it without a cache (--no-cache, cache=False)"


class _Decoder(nn.Module):
    """A model whose attention goes through `attend`, as a function of its cache; only the tokens `kept` get logits.

    GroupQueryAttention reads the tokens of a row from its first column on. So they are moved there, in their order,
    and `kept [batch, kept]` counts them; else it counts columns. For TensorRT, what a token sees is an input, for each
    of `windows`: bool `[batch, sequence, total]`.
    """

    def __init__(
        self,
        model: nn.Module,
        target: str,
        *,
        checking: bool = False,
        turning: bool = False,
        windows: Sequence[int | None] = (),
    ) -> None:
        super().__init__()
        self.model, self._target, self._checking, self.turning = model, target, checking, turning
        self._windows = windows

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        kept: Tensor,
        pasts: list[Tensor] | None,
        visible: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        (batch, length), seen = input_ids.shape, attention_mask != 0
        if self._target == "ort":
            columns = torch.arange(length)
            padding = ~seen[:, columns + (seen.shape[1] - length)]
            order = torch.argsort(columns + length * padding.to(torch.int64), dim=1)
            input_ids, position_ids = input_ids.gather(1, order), position_ids.gather(1, order)
        pairs = None if pasts is None else list(zip(pasts[::2], pasts[1::2], strict=True))
        self.attention = attention = Attention(self._target, pairs, seen, length, self._checking)
        attention.turning = self.turning
        for window, columns in zip(self._windows, visible, strict=True):
            dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
            attention.biases[window] = torch.where(columns, 0.0, torch.finfo(dtype).min / 2).to(dtype)[:, None]

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return args[0][torch.arange(batch)[:, None], kept], *args[1:]

        model: Any = self.model
        hook = model.get_output_embeddings().register_forward_pre_hook(keep)
        active.append(attention)
        try:
            logits = model(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=Handover(attention),
                use_cache=True,
            ).logits
        finally:
            active.pop()
            hook.remove()
        self.turning = attention.turning
        return logits, *(part for layer in sorted(attention.presents) for part in attention.presents[layer])


def trace_decoder(model: nn.Module, target: str | None = None) -> tuple[ir.Model, Cache]:
    """Export a causal language model (eval mode) with its cache to a graph that shares its weights; see `contract`.

    Args:
        model: a transformers model whose attention goes through the registry of transformers.
        target: `ort`, `standard`, `tensorrt`, or None for `ort` where its operator takes the model's head size.

    Returns:
        the graph, and its cache. Inputs are those of `contract`, `last_logits` with a default.

    Raises:
        ConfigError: there is no such target.
        UnsupportedError: this family cannot have a cache here, or torch cannot trace or convert the model; names the
            family or the module, and the reason.
    """
    if target not in (None, *TARGETS):
        raise ConfigError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    with quiet(), _through_us(model), folded(model):
        shapes, windows, turning = _compare(model)
        cache = _cache_of(model, target, shapes, windows)
        graph = _convert(model, cache, turning and cache.target == "ort")
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind not in _TESTED:
        warnings.warn(
            f"{type(model).__name__} has not been tested with a key-value cache; its first tokens were compared with "
            f"the model without one and agree (tested: {', '.join(sorted(_TESTED))})",
            stacklevel=4,
        )
    _unwrap(graph)
    _keep_by_default(graph, cache.target)
    if cache.target == "tensorrt":
        _see_by_default(graph, cache)
    return graph, cache


@contextlib.contextmanager
def _through_us(model: nn.Module) -> Iterator[None]:
    """The model's attention goes through `attend` inside the block, for those that ask the registry."""
    tunable: Any = model
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if before is None or not hasattr(model, "get_output_embeddings") or tunable.get_output_embeddings() is None:
        _refuse(model, "it is no language model of transformers")
    if getattr(tunable.config, "is_encoder_decoder", False):
        _refuse(model, "it is an encoder and a decoder")
    kinds = set(getattr(tunable.config.get_text_config(), "layer_types", None) or ()) - _LAYERS
    if kinds:
        _refuse(model, f"it has layers of the kind {min(kinds)}")
    try:
        yield
    finally:
        if tunable.config._attn_implementation == NAME:
            tunable.set_attn_implementation(before)


def layer_windows(model: nn.Module) -> list[int | None]:
    """How many tokens each layer of a language model sees, None for all before it; its masks are looked at.

    Raises:
        UnsupportedError: it does not ask transformers' registry for its attention.
    """
    with quiet(), _through_us(model):
        return [*_compare(model)[1].values()]


def _compare(model: nn.Module) -> tuple[set[tuple[int, ...]], dict[int, int | None], bool]:
    """Shapes of a layer's keys without the tokens, the window of each, and whether it turns as `rotary` does.

    Refuses what is none of this file's attention.

    The model runs without a cache as it came, then with one through `attend`: a prefill of six tokens, of the second
    row two are padding on the left, then two steps of one.
    """
    tunable: Any = model
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, tunable.config.get_text_config().vocab_size, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    decoder = _Decoder(model, "standard", checking=True, turning=True)
    want, logits, pasts, reason = [], [], None, ""
    try:
        want = [run_model(model, {INPUT_IDS: ids[:1]}), run_model(model, {INPUT_IDS: ids[1:, 2:]})]
        tunable.set_attn_implementation(NAME)
        with torch.no_grad():
            for step in (slice(0, 6), slice(6, 7), slice(7, 8)):
                kept = torch.arange(step.stop - step.start).expand(2, -1)
                got, *pasts = decoder(ids[:, step], mask[:, : step.stop], places[:, step], kept, pasts or None)
                logits.append(got)
    except UnsupportedError as error:
        reason = str(error)
    except Exception as error:  # a family may do anything with a cache that is none
        reason = f"{type(error).__name__}: {error}"
    if want and (tunable.config._attn_implementation != NAME or pasts == []):
        reason = "its attention does not go through transformers' AttentionInterface"
    if reason or pasts is None:
        _refuse(model, reason)
    whole = torch.cat(logits, 1).float()
    for row, (found, start) in enumerate(zip(want, (0, 2), strict=True)):
        expected = found["logits"][0].float()
        gap = (whole[row, start:] - expected).abs().max()
        limit = _AGREE.get(logits[0].dtype, 5e-2) * float(expected.abs().max().clamp(min=1.0))
        if not gap <= limit:
            _refuse(model, f"with a cache its logits are off by {float(gap):.1e}")
    layers = sorted(decoder.attention.presents)
    if layers != list(range(len(layers))):
        _refuse(model, f"only its layers {', '.join(map(str, layers))} have keys of their own")
    windows = {layer: decoder.attention.windows[layer] for layer in layers}
    return {(len(layers), *past.shape[1::2]) for past in pasts}, windows, decoder.turning


def _refuse(model: nn.Module, reason: str) -> NoReturn:
    raise UnsupportedError(f"{an(type(model).__name__)} cannot have a key-value cache here ({reason}); {_WITHOUT}")


def _cache_of(
    model: nn.Module, target: str | None, shapes: set[tuple[int, ...]], windows: Mapping[int, int | None]
) -> Cache:
    if len(shapes) > 1:
        _refuse(model, "its layers have keys of different sizes")
    ((layers, heads, size),) = shapes
    if target is None:
        target = "standard" if size % _HEAD_SIZES else "ort"
    if target == "ort" and size % _HEAD_SIZES:
        raise UnsupportedError(
            f"GroupQueryAttention of ONNX Runtime takes head sizes that are a multiple of {_HEAD_SIZES}, this "
            f"{type(model).__name__} has {size}; use --target standard, or leave --target out"
        )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Cache(target, layers, heads, size, dtype, tuple(sorted({w for w in windows.values() if w is not None})))


def _convert(model: nn.Module, cache: Cache, turning: bool) -> ir.Model:
    """The graph with `kept [batch, kept]` as an input: which tokens get logits."""
    batch, past, length, kept = 2, 5, 3, 4  # all different, or torch takes two dimensions for one
    ids = torch.zeros(batch, length, dtype=torch.int64)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    pasts = [torch.zeros(batch, cache.kv_heads, past, cache.head_size, dtype=dtype) for _ in cache.pasts]
    mask = torch.ones(batch, past + length, dtype=torch.int64)
    arguments: tuple[object, ...] = (
        ids,
        mask,
        ids + torch.arange(past, past + length),
        torch.zeros(batch, kept, dtype=torch.int64),
        pasts,
    )
    dim = torch.export.Dim
    rows, tokens = dim(BATCH), dim(SEQUENCE)
    total = dim(_TOTAL) if cache.target == "ort" else dim.AUTO  # the sum of two others where keys meet the mask
    sizes = ({0: rows, 1: tokens}, {0: rows, 1: total}, {0: rows, 1: tokens}, {0: rows, 1: dim(KEPT)})
    names = [INPUT_IDS, ATTENTION_MASK, POSITION_IDS, KEPT, *cache.pasts]
    shapes: tuple[object, ...] = (*sizes, [{0: rows, 2: dim(_PAST)}] * len(pasts))
    windows: list[int | None] = []
    if cache.target == "tensorrt":
        windows = list(cache.seen.values())
        arguments = (
            *arguments,
            [mask[:, None].expand(-1, length, -1) != 0 for _ in windows],
        )  # one tensor is one input
        shapes = (*shapes, [{0: rows, 1: tokens, 2: dim.AUTO}] * len(windows))
        names += cache.seen

    def convert() -> torch.onnx.ONNXProgram | None:
        with torch.no_grad():
            return torch.onnx.export(
                _Decoder(model, cache.target, turning=turning, windows=windows),
                arguments,
                input_names=names,
                output_names=["logits", *cache.presents],
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )

    return converted(model, convert)


def _unwrap(graph: ir.Model) -> None:
    """Take `_Decoder` off the scopes of nodes and the names of weights, so that both are those of the model."""
    prefix = "model."
    for node in graph.graph:
        if (text := node.metadata_props.get(SCOPES)) is not None:
            *paths, operation = ast.literal_eval(text)
            paths = [path.removeprefix(prefix) for path in paths if path != prefix[:-1]]
            node.metadata_props[SCOPES] = repr([*paths, operation])
    weights = graph.graph.initializers
    for name in list(weights):
        if name.startswith(prefix) and name.removeprefix(prefix) not in weights:
            weights[name].name = name.removeprefix(prefix)


def _keep_by_default(graph: ir.Model, target: str) -> None:
    """Compute the input `kept` from a flag: all tokens, or with `last_logits` the last one of each row.

    At padding it names the last token before it (the first one, where none is), so that it has logits of some token.
    """
    inner = graph.graph
    inputs = {value.name: value for value in inner.inputs}
    kept, mask, ids = inputs[KEPT], inputs[ATTENTION_MASK], inputs[INPUT_IDS]
    flag = ir.Value(name=LAST_LOGITS, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    flag.const_value = ir.tensor([False], dtype=ir.DataType.BOOL, name=LAST_LOGITS)
    ops = Ops("sdct.kept")
    zero, one, axis, end = ops.const([0]), ops.const([1]), ops.const(1), ops.const([2**62])
    length = ops("Shape", ids, start=1, end=2)
    seen = ops("Cast", ops("Cast", mask, to=ir.DataType.BOOL), to=ir.DataType.INT64)
    seen = ops("Slice", seen, ops("Neg", length), end, one)
    if target == "ort":  # the count of a token in its row
        every = ops("Max", ops("Sub", ops("CumSum", seen, axis), one), zero)
        last = ops("ReduceMax", every, one, keepdims=1)
    else:  # columns
        columns = ops("Range", ops.const(0), ops("Squeeze", length, zero), axis)
        every = ops("Add", ops("Mul", seen, zero), columns)
        last = ops("ReduceMax", ops("Mul", seen, columns), one, keepdims=1)
    count = ops("Where", flag, one, length)
    chosen = ops("Slice", ops("Where", flag, last, every), zero, count, one)
    chosen.name, chosen.type, chosen.shape = KEPT, kept.type, kept.shape
    for user, index in list(kept.uses()):
        user.replace_input_with(index, chosen)
    inner.inputs.remove(kept)
    inner.inputs.append(flag)
    inner.register_initializer(flag)
    for node in reversed(ops.nodes):
        inner.insert_before(inner[0], node)
    mask.shape = ir.Shape([BATCH, _TOTAL])


def _see_by_default(graph: ir.Model, cache: Cache) -> None:
    """Compute what a token sees from the mask and the positions: the tokens of its row up to itself, within a window.

    Counted in tokens, not in columns: padding between the tokens of a row does not use up its window.
    """
    inner = graph.graph
    inputs = {value.name: value for value in inner.inputs}
    mask, own = inputs[ATTENTION_MASK], inputs[POSITION_IDS]
    ops = Ops("sdct.seen")
    one, two = ops.const([1]), ops.const([2])
    token = ops("Cast", mask, to=ir.DataType.BOOL)
    count = ops("CumSum", ops("Cast", token, to=ir.DataType.INT64), ops.const(1))
    place, own = ops("Unsqueeze", ops("Sub", count, one), one), ops("Unsqueeze", own, two)
    before = ops("And", ops("Unsqueeze", token, one), ops("LessOrEqual", place, own))
    for name, window in cache.seen.items():
        given = inputs[name]
        inner.inputs.remove(given)
        if not given.uses():
            continue
        near = ops("Less", ops("Sub", own, place), ops.const(2**62 if window is None else window))
        chosen = ops("And", before, near)
        given.name, chosen.name, chosen.type, chosen.shape = None, name, given.type, given.shape
        for user, index in list(given.uses()):
            user.replace_input_with(index, chosen)
    for node in reversed(ops.nodes):
        inner.insert_before(inner[0], node)
