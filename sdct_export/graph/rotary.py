"""Rotary positions as one operator of ONNX Runtime's, com.microsoft::RotaryEmbedding.

transformers has no registry for these: each family has a function `apply_rotary_pos_emb` beside its attention, most of
them the same one. `folded` puts another in its place while the model runs in torch or is traced. It never believes a
name: while `Attention.checking` it compares what the family's own function gives with `_turned`, and the operator is
put into the graph only where all of them agreed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention, active

_FUNCTION = "apply_rotary_pos_emb"
_AGREE = {torch.float32: 1e-5}  # largest difference, of the size of what is turned; 2e-2 in half types


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model's attention turns its queries and keys with `Attention.turned`."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    originals = {module: vars(module)[_FUNCTION] for module in modules if callable(vars(module).get(_FUNCTION))}
    try:
        for module, original in originals.items():
            vars(module)[_FUNCTION] = _turn_with(original)
        yield
    finally:
        for module, original in originals.items():
            vars(module)[_FUNCTION] = original


def _turn_with(original: Callable[..., Any]) -> Callable[..., Any]:
    def turn(*arguments: Any, **options: Any) -> Any:
        now = active[-1] if active else None
        if now is not None and now.turning and not now.checking:
            query, key, cos, sin, *_ = arguments
            return _operator(now, query, cos, sin), _operator(now, key, cos, sin)
        found = original(*arguments, **options)
        if now is not None and now.checking:
            now.turning = now.turning and _agree(arguments[:4], found)
        return found

    return turn


def _agree(arguments: tuple[Any, ...], found: Any) -> bool:
    """Whether `found` is what the operator would give for query, key, cos and sin."""
    if len(arguments) < 4 or not all(isinstance(argument, Tensor) for argument in arguments):
        return False
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    query, key, cos, sin = arguments
    for tensor, got in zip((query, key), found, strict=True):
        batch, _, length, size = tensor.shape
        turns = cos.shape[-1]
        if cos.shape != (batch, length, turns) or sin.shape != cos.shape or turns % 2 or turns > size:
            return False
        want = _turned(tensor, cos, sin)
        if got.shape != want.shape:
            return False
        gap = (got.float() - want.float()).abs().max()
        if not gap <= _AGREE.get(tensor.dtype, 2e-2) * float(want.abs().max().clamp(min=1.0)):
            return False
    return True


def _turned(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The operator's formula on `[batch, heads, sequence, size]`, with `h` half of the columns of `cos`.

    `(a cos - b sin, b cos + a sin, rest)` of `a = x[:h]`, `b = x[h : 2 h]`; cos and sin by their first `h` columns.
    """
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    a, b, rest = tensor[..., :half], tensor[..., half : 2 * half], tensor[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _operator(now: Attention, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`_turned` as a node. Its tables have a line for each token of the batch: any way to make them will do."""
    batch, heads, length, size = tensor.shape
    turns = cos.shape[-1]
    if id(cos) not in now.tables:
        lines = torch.arange(batch * length).reshape(batch, length)
        parts = [table[..., : turns // 2].reshape(batch * length, turns // 2) for table in (cos, sin)]
        now.tables[id(cos)] = (cos, [lines, *parts])  # `cos` is kept, so that nothing else gets its id
    flat = torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        [tensor.transpose(1, 2).reshape(batch, length, heads * size), *now.tables[id(cos)][1]],
        {"num_heads": heads, "rotary_embedding_dim": turns if turns < size else 0},
        dtype=tensor.dtype,
        shape=[batch, length, heads * size],
        version=1,
    )
    return flat.reshape(batch, length, heads, size).transpose(1, 2)
