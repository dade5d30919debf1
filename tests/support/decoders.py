"""Small seeded language models of every family that is tested with a key-value cache, and the steps of their graphs.

Head sizes are multiples of 8, as ONNX Runtime's operator wants them; windows are shorter than the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from families import Family, Row, edited
from torch import nn

from sdct_export import SdctAdapter
from sdct_export.adapter.entries import Array
from sdct_export.contract import Cache

VOCABULARY = 99
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 90, "max_position_embeddings": 96, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
}  # fmt: skip


def _sized(name: str, **fields: Any) -> Callable[[], Any]:
    def config() -> Any:
        import transformers

        return getattr(transformers, name)(**_SIZES | fields)

    return config


def _phi3() -> Any:  # its head size is no option
    return _sized("Phi3Config", hidden_size=32, sliding_window=6)()


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=6, n_positions=96, bos_token_id=1, eos_token_id=2
    )


_QKV = ("q_proj", "v_proj")
_SOFT = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 13}
_MIXED = ["sliding_attention", "full_attention"]
DECODERS = {
    family.name: family
    for family in (
        Family("llama", "CAUSAL_LM", _sized("LlamaConfig"), "LlamaForCausalLM", (*_QKV, "down_proj")),
        Family(
            "qwen2", "CAUSAL_LM",
            _sized("Qwen2Config", hidden_size=32, use_sliding_window=True, sliding_window=5, layer_types=_MIXED),
            "Qwen2ForCausalLM", _QKV,
        ),
        Family("qwen3", "CAUSAL_LM", _sized("Qwen3Config"), "Qwen3ForCausalLM", _QKV),
        Family("mistral", "CAUSAL_LM", _sized("MistralConfig", sliding_window=4), "MistralForCausalLM", _QKV),
        Family("phi3", "CAUSAL_LM", _phi3, "Phi3ForCausalLM", ("qkv_proj", "gate_up_proj")),
        Family("gemma", "CAUSAL_LM", _sized("GemmaConfig"), "GemmaForCausalLM", _QKV),
        Family("gemma2", "CAUSAL_LM", _sized("Gemma2Config", sliding_window=4, **_SOFT), "Gemma2ForCausalLM", _QKV),
        Family(
            "gemma3", "CAUSAL_LM",
            _sized("Gemma3TextConfig", sliding_window=4, layer_types=_MIXED, query_pre_attn_scalar=13),
            "Gemma3ForCausalLM", _QKV,
        ),
        Family("gpt2", "CAUSAL_LM", _gpt2, "GPT2LMHeadModel", ("attn.c_attn", "mlp.c_proj")),
    )
}  # fmt: skip


def random_rows(lengths: Sequence[int], seed: int) -> list[Array]:
    """Token ids of rows of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length) for length in lengths]


def torch_logits(
    model: nn.Module, tokens: Sequence[Array], rows: Sequence[Row], adapters: Mapping[str, SdctAdapter]
) -> list[Array]:
    """float32 `[tokens, vocabulary]` of each row by itself, without padding or cache, adapters in the weights."""
    results = []
    for ids, row in zip(tokens, rows, strict=True):
        with torch.no_grad():
            logits = edited(model, row, adapters)(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits
        results.append(logits[0].float().numpy())
    return results


@dataclasses.dataclass
class Steps:
    """A graph with a cache, fed as its contract says: the outputs of a step are the pasts of the next."""

    session: onnxruntime.InferenceSession
    cache: Cache
    more: Mapping[str, Array]  # the adapter inputs
    pasts: dict[str, Any] = dataclasses.field(default_factory=dict)
    mask: Array | None = None

    def step(self, ids: Array, mask: Array, *, last: bool = False) -> Array:
        """Logits of the new tokens `ids [batch, sequence]`, of which `mask` says which are some."""
        before = np.zeros((len(ids), 0), np.int64) if self.mask is None else self.mask
        if not self.pasts:
            shape = (len(ids), self.cache.kv_heads, 0, self.cache.head_size)
            self.pasts = dict.fromkeys(self.cache.pasts, _empty(shape, self.cache.dtype))
        self.mask = np.concatenate([before, mask], 1)
        places = np.maximum(self.mask.cumsum(1) - 1, 0)[:, before.shape[1] :]
        arrays = {"input_ids": ids, "attention_mask": self.mask, "position_ids": places} | dict(self.more)
        if last:
            arrays["last_logits"] = np.array([True])
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        names = ["logits", *self.cache.presents]
        logits, *presents = self.session.run_with_ort_values(names, values | self.pasts)
        self.pasts = dict(zip(self.cache.pasts, presents, strict=True))
        return np.asarray(logits.numpy())


def _empty(shape: tuple[int, ...], dtype: str) -> onnxruntime.OrtValue:
    if dtype == "bfloat16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, np.uint16), 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))


def padded(tokens: Sequence[Array], side: str) -> tuple[Array, Array]:
    """`ids` and `mask`, `[batch, longest]`; padding holds a token of the vocabulary, so that reading it would show."""
    longest = max(map(len, tokens))
    ids, mask = np.full((len(tokens), longest), 7), np.zeros((len(tokens), longest), np.int64)
    for i, row in enumerate(tokens):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask
