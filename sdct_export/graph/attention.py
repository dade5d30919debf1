"""The attention of a language model while its graph with a key-value cache is made.

transformers hands the attention of a model to a function in a registry, and its mask to another one. `attend` and
`mask` stand there under `NAME`, beside those of transformers: a model that is set to that name reads its pasts from
the `Attention` at the end of `active`, and leaves its presents there. Nothing is matched by its shape or name.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache

from ..errors import UnsupportedError

NAME = "sdct_cache"  # ours, in the registries of transformers
# what a model may hand its attention beside the tensors: these say nothing that the graph does not know
_KNOWN = frozenset({
    "cache_position", "dropout", "is_causal", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "use_cache",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Causal:
    """In place of a mask: a token sees itself and those before it, with a window the last `window` of these."""

    window: int | None


@dataclasses.dataclass
class Attention:
    """What the attention of one forward reads and leaves: the pasts, the presents, and which tokens see each other.

    `seen [batch, past + sequence]` bool says which columns hold a token, the last `length` of them are the new ones.
    `checking` is true outside of a trace.
    """

    target: str
    pasts: list[tuple[Tensor, Tensor]] | None
    seen: Tensor
    length: int
    checking: bool = False
    presents: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    windows: dict[int, int | None] = dataclasses.field(default_factory=dict)  # of each layer
    biases: dict[int | None, Tensor] = dataclasses.field(default_factory=dict)
    tiles: dict[tuple[int | None, int], Tensor] = dataclasses.field(default_factory=dict)
    layer: int | None = None  # the one that has just handed over its keys
    turning: bool = False  # rotary positions are those of `rotary`; while checking, as far as seen
    tables: dict[int, Any] = dataclasses.field(default_factory=dict)  # of `rotary`

    @functools.cached_property
    def counts(self) -> tuple[Tensor, Tensor]:
        """What GroupQueryAttention wants of the tokens: those of each row less one, int32 `[batch]`, and the columns.

        New tokens that are padding count as well: they lie behind all others of their row, which do not see them, and
        the next step puts its own in their place.
        """
        columns = self.seen.shape[1]
        past = self.seen & (torch.arange(columns) < columns - self.length)
        counts = (past.sum(1) + (self.length - 1)).to(torch.int32)
        return counts, torch.scalar_tensor(columns, dtype=torch.int32)

    def past(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the steps before, none at the start."""
        if self.pasts is None:
            empty = key[:, :, :0]
            return empty, empty
        return self.pasts[layer]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where a new token sees a column, else far below any score; `[batch, 1, 1, sequence, past + sequence]`.

        Counted in tokens, not in columns: padding between the tokens of a row does not use up its window. Half of the
        least number, so that no sum of it and a score is infinite, and a row of padding no 0 / 0.
        """
        if window not in self.biases:
            position = torch.cumsum(self.seen.to(torch.int64), 1) - 1
            own = position[:, torch.arange(self.length) + (self.seen.shape[1] - self.length)][:, :, None]
            visible = self.seen[:, None] & (position[:, None] <= own)
            if window is not None:
                visible = visible & (own - position[:, None] < window)
            least = torch.finfo(dtype).min / 2
            self.biases[window] = torch.where(visible, 0.0, least).to(dtype)[:, None, None]
        return self.biases[window]

    def tiled(self, window: int | None, count: int) -> Tensor:
        """The bias of target `tensorrt` (given, `[batch, 1, sequence, total]`), `count` times below each other."""
        if (window, count) not in self.tiles:
            self.tiles[window, count] = self.biases[window].repeat(1, 1, count, 1)
        return self.tiles[window, count]


active: list[Attention] = []  # of the forward that runs now; a registry hands nothing else on


class Handover(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """The cache a model thinks it has: gives the attention the new keys alone, and tells it whose they are."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = attention

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """The new keys and values alone: the attention has the pasts."""
        self._attention.layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """None, for all that a model may know: positions are an input, and so are pasts."""
        return 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        """As `get_seq_length`."""
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        """Columns and their offset, for a mask that is never made."""
        return query_length, 0


def mask(*, mask_function: Any, local_size: int | None = None, **_: Any) -> Causal:
    """What transformers asks for in place of its own mask functions."""
    if active[-1].checking:
        _refuse_other_masks(mask_function, local_size)
    return Causal(local_size)


def _refuse_other_masks(mask_function: Any, window: int | None) -> None:
    """Raise `UnsupportedError` unless a token sees itself and those before it (the last `window` of them)."""
    edge = 8 if window is None else window
    places = sorted({p for p in (0, 1, 2, edge - 1, edge, edge + 1, 2 * edge, 2 * edge + 3) if p >= 0})
    for query in places:
        for key in places:
            want = key <= query and (window is None or query - key < window)
            arguments = [torch.tensor(i) for i in (0, 0, query, key)]
            if bool(mask_function(*arguments)) != want:
                where = f"{query - key} before it" if key <= query else f"{key - query} after it"
                raise UnsupportedError(f"a token {'does not see' if want else 'sees'} the one {where}")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over the past and the new keys: query `[batch, heads, sequence, head_size]`, fewer heads in the keys.

    `attention_mask` is what `mask` gave, whose window counts: `sliding_window` says the same, where a model says it.
    """
    del sliding_window
    now = active[-1]
    unknown = sorted(n for n, value in others.items() if value is not None and value is not False and n not in _KNOWN)
    if unknown or others.get("is_causal") is False:
        raise UnsupportedError(f"its attention takes {unknown[0] if unknown else 'is_causal=False'!r}")
    if not isinstance(attention_mask, Causal):
        raise UnsupportedError("its attention has a mask of its own")
    if now.layer is None:
        raise UnsupportedError("its attention reads keys that another layer made")
    layer, now.layer = now.layer, None
    if query.shape[-1] != key.shape[-1] or key.shape != value.shape:
        raise UnsupportedError("its keys, values and queries are not of one size")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = attention_mask.window
    now.windows[layer] = window
    compute = {"ort": _group_query, "standard": _standard, "tensorrt": _fusable}[now.target]
    output, *present = compute(now, layer, query, key, value, scale, softcap, window)
    now.presents[layer] = (present[0], present[1])
    return output, None


def _scored(
    now: Attention, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with their pasts, and `cap(scale q k^T)` of query heads that share keys, below each other."""
    past_key, past_value = now.past(layer, key)
    key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    (batch, heads, length, size), groups = query.shape, key.shape[1]
    scores = (query * scale).reshape(batch, groups, heads // groups * length, size) @ key.transpose(2, 3)
    return key, value, scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _standard(
    now: Attention,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax(cap(scale q k^T) + bias) v`; the query heads that share keys stand in rows below each other."""
    key, value, scores = _scored(now, layer, query, key, value, scale, softcap)
    (batch, heads, length, size), groups = query.shape, key.shape[1]
    scores = scores.reshape(batch, groups, heads // groups, length, key.shape[2]) + now.bias(window, query.dtype)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    output = weights.reshape(batch, groups, heads // groups * length, key.shape[2]) @ value
    return output.reshape(batch, heads, length, size).transpose(1, 2), key, value


def _fusable(
    now: Attention,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_standard`, with four dimensions from the first product to the last.

    That is the pattern of which TensorRT makes one kernel, where it has one for type and sizes, and else computes as
    it is. Its parser knows ONNX's Attention from 10.14 on only, refuses soft caps, and makes a layer of it that does
    not build where no such kernel fits.
    """
    key, value, scores = _scored(now, layer, query, key, value, scale, softcap)
    (batch, heads, length, size), groups = query.shape, key.shape[1]
    scores = scores + now.tiled(window, heads // groups)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).reshape(batch, heads, length, size).transpose(1, 2), key, value


def _group_query(
    now: Attention,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """com.microsoft::GroupQueryAttention, which takes and gives `[batch, sequence, heads * head_size]`."""
    (batch, heads, length, size), groups = query.shape, key.shape[1]
    flat = [t.transpose(1, 2).reshape(batch, length, t.shape[1] * size) for t in (query, key, value)]
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": groups, "scale": scale}
    if window is not None:
        attributes["local_window_size"] = window
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    present = [batch, groups, now.seen.shape[1], size]
    output, new_key, new_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [*flat, *now.past(layer, key), *now.counts],
        attributes,
        dtypes=(query.dtype,) * 3,
        shapes=([batch, length, heads * size], present, present),
        version=1,
    )
    return output.reshape(batch, length, heads, size), new_key, new_value


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
