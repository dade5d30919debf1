"""Thirteen adapters in one batch of a LLaMA-style model: next-token logits of the ONNX bundle against torch.

The model is tiny and random, so that the example runs anywhere; a real checkpoint takes the same calls.

    python examples/04_llama_style.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdct_export import SdctAdapter, SdctConfig, export_multi, get_sdct_model
from sdct_export.runtime import MultiAdapterModel

SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=500, num_hidden_layers=3, **SIZES)).eval()


def random_adapter(seed: int) -> SdctAdapter:
    """Stands in for a trained one: query and value projections, 200 coefficients each."""
    model = get_sdct_model(base_model(), SdctConfig(["q_proj", "v_proj"], n_coefficients=200, seed=seed))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model.adapter()


def torch_logits(base: LlamaForCausalLM, ids: np.ndarray, parts: list[tuple[SdctAdapter, float]]) -> np.ndarray:
    """The next token's logits of one row, with every update added to a copy of the weights."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for adapter, scale in parts:
            for module in adapter.modules:
                model.get_submodule(module).weight += scale * adapter.delta_weight(module)
        return model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()


def main() -> None:
    base = base_model()
    adapters = {f"tenant-{i}": random_adapter(i) for i in range(12)}
    # one batch: the base, a blend, and every tenant
    rows = [{}, {"tenant-0": 0.5, "tenant-7": 0.5}, *({name: 1.0} for name in adapters)]
    ids = np.random.default_rng(0).integers(0, 500, (len(rows), 16))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with tempfile.TemporaryDirectory() as folder:
        export_multi(base, adapters, Path(folder) / "bundle")
        model = MultiAdapterModel(Path(folder) / "bundle")
        late = random_adapter(99)
        model.load_adapter("late", late)  # while the bundle is running
        rows[2] = {"late": 1.0}
        logits = model.run(inputs, rows)["logits"][:, -1]
        alone = model.run(inputs)["logits"][:, -1]

    adapters["late"] = late
    worst = 0.0
    for row, row_ids, got in zip(rows, ids, logits, strict=True):
        want = torch_logits(base, row_ids, [(adapters[name], scale) for name, scale in row.items()])
        worst = max(worst, float(np.abs(got - want).max()))
    effect = float(np.abs(logits[1:] - alone[1:]).max(axis=-1).min())
    print(f"{len(rows)} rows, {len(adapters)} adapters resident, {adapters['late'].n_parameters:,} numbers each")
    print(f"next tokens: {logits.argmax(-1).tolist()}")
    print(f"largest difference from torch {worst:.1e}; every adapter moved its logits by at least {effect:.2f}")
    assert worst < 1e-4
    assert effect > 1e-2
    assert np.array_equal(logits[0], alone[0]), "the base row must not change by one bit"


if __name__ == "__main__":
    main()
