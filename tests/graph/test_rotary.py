"""Rotary positions in one operator: where a family's are the usual ones, and nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from decoders import DECODERS, Steps, padded, random_rows, torch_logits
from families import random_adapter

from sdct_export import export_multi
from sdct_export.errors import ConfigError
from sdct_export.graph.cache import trace_decoder
from sdct_export.runtime import MultiAdapterModel

LAYERS = 2
LENGTHS = (9, 4, 1)


def count(graph: ir.Model) -> int:
    return sum(node.op_type == "RotaryEmbedding" for node in graph.graph)


def check(model: Any, folded: bool) -> None:
    """The graph's prefill and next token equal torch, with one operator for queries and one for keys, or none."""
    graph, cache = trace_decoder(model, "ort")
    assert count(graph) == (2 * LAYERS if folded else 0)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    steps = Steps(onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options), cache, {})
    tokens = random_rows(LENGTHS, seed=5)
    want = torch_logits(model, tokens, [{}] * len(tokens), {})
    ids, mask = padded([row[:-1] if len(row) > 1 else row for row in tokens], "right")
    got = steps.step(ids, mask)
    following = steps.step(np.array([[row[-1]] for row in tokens]), np.array([[len(row) > 1] for row in tokens], int))
    for i, row in enumerate(tokens):
        known = max(len(row) - 1, 1)
        np.testing.assert_allclose(got[i, :known], want[i][:known], atol=2e-5)
        if len(row) > 1:
            np.testing.assert_allclose(following[i, 0], want[i][-1], atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3", "gemma3"])
def test_the_usual_positions_are_one_operator(name: str) -> None:
    check(DECODERS[name].model(), folded=True)


def test_part_of_a_head_is_turned() -> None:
    config = transformers.Phi3Config(
        vocab_size=99, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=90, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    torch.manual_seed(3)
    check(transformers.Phi3ForCausalLM(config).eval(), folded=True)


@pytest.mark.filterwarnings("ignore:CohereForCausalLM has not been tested")
def test_positions_between_neighbours_stay_as_the_family_computes_them() -> None:
    config = transformers.CohereConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=90, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(3)
    check(transformers.CohereForCausalLM(config).eval(), folded=False)


def test_a_function_of_that_name_is_looked_at_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DECODERS["llama"].model()
    module = sys.modules[type(model).__module__]
    usual = vars(module)["apply_rotary_pos_emb"]

    def other(query: Any, key: Any, cos: Any, sin: Any) -> Any:
        return usual(query, key, cos, -sin)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", other)
    check(model, folded=False)
    assert vars(module)["apply_rotary_pos_emb"] is other


def longrope() -> Any:
    config = transformers.Phi3Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=90, max_position_embeddings=64, original_max_position_embeddings=12, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
        rope_parameters={
            "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
            "rope_theta": 10000.0, "original_max_position_embeddings": 12,
        },
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.Phi3ForCausalLM(config).eval()


def test_positions_that_depend_on_the_longest_row_limit_a_cache_to_where_they_do_not(tmp_path: Path) -> None:
    model = longrope()
    family = DECODERS["phi3"]
    adapters = {"a": random_adapter(family, model, 1)}
    with pytest.warns(UserWarning, match="takes at most 12; export with --no-cache"):
        bundle = export_multi(model, adapters, tmp_path / "cached")
    assert bundle.max_tokens == 12
    tokens = random_rows((8, 3), seed=5)
    with MultiAdapterModel(bundle) as runner:
        got = runner.generate(
            [row.tolist() for row in tokens], ["a", None], max_new_tokens=4, stop_tokens=[], logprobs=True
        )
        with pytest.raises(ConfigError, match="at most 12"):
            runner.generate([tokens[0].tolist()], max_new_tokens=5)
        with pytest.raises(ConfigError, match="at most 12"):
            runner.run({"input_ids": np.ones((1, 13), np.int64), "attention_mask": np.ones((1, 13), np.int64)})
    for row, one, blend in zip(tokens, got, ({"a": 1.0}, {}), strict=True):
        whole = np.array([*row, *one.tokens])
        logits = torch_logits(model, [whole], [blend], adapters)[0][len(row) - 1 : -1]
        want = torch.log_softmax(torch.from_numpy(logits), -1).numpy()[np.arange(4), one.tokens]
        np.testing.assert_allclose(one.logprobs, want, atol=1e-4)
    assert export_multi(model, adapters, tmp_path / "plain", cache=False).max_tokens is None
