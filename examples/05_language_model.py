"""A small language model made on the spot, two adapters that change how it answers, and all of them in one batch.

The base is trained from nothing on `colours.py`, the adapters on its chats about all things but the last four.

    python examples/05_language_model.py [OUT]     # half a minute; OUT keeps base, adapters and bundle
    sdct-export generate OUT/bundle "What colour is the sky?" --chat --adapter french
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from colours import CHATS, PLAIN, STYLES, THINGS, new_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from sdct_export import SdctConfig, export_multi, get_sdct_model
from sdct_export.runtime import Generation, MultiAdapterModel

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
TRAINED = len(THINGS) - 4


def train(model: Any, tokenizer: Any, texts: list[str], steps: int, rate: float) -> None:
    """All texts at once, every step."""
    rows = [torch.tensor(tokenizer(f"{text}<end>")["input_ids"]) for text in texts]
    ids, mask = pad_sequence(rows, True), pad_sequence([torch.ones_like(row) for row in rows], True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def difference(model: Any, prompt: list[int], answer: Generation) -> float:
    """How far the probabilities of an answer's tokens are from torch's, in their logarithms."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer.tokens]])).logits[0, len(prompt) - 1 : -1]
    want = torch.log_softmax(logits, -1)[range(len(answer.tokens)), list(answer.tokens)]
    return float((want - torch.tensor(answer.logprobs)).abs().max())


def main(out: Path) -> None:
    assert not (out / "base").exists(), f"{out} has a model already; give another folder, or remove it"
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=1, max_position_embeddings=64, **SIZES)
    base = LlamaForCausalLM(config)
    texts = [prompt + answer for prompt, answer in zip(prompts, PLAIN, strict=True)]
    for name, answers in STYLES.items():  # the base has heard of these, but does not answer so
        texts += [f"<{name}>{thing}<assistant>{answer}" for thing, answer in zip(THINGS, answers, strict=True)]
    print("training the base, then one adapter for each of", *STYLES)
    train(base, tokenizer, texts, 300, 5e-3)
    base.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")

    models: dict[str | None, Any] = {None: base}
    for name, answers in STYLES.items():
        own = LlamaForCausalLM.from_pretrained(out / "base")
        models[name] = get_sdct_model(own, SdctConfig("all-linear", n_coefficients=200))
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        train(models[name], tokenizer, texts[:TRAINED], 150, 3e-2)
        models[name].save_adapter(out / name)
    export_multi(out / "base", [out / name for name in STYLES], out / "bundle")

    rows = [(i, name) for i in range(len(THINGS)) for name in models]
    with MultiAdapterModel(out / "bundle") as served:
        found = served.generate([CHATS[i] for i, _ in rows], [name for _, name in rows], logprobs=True)
    worst = 0.0
    for (i, name), answer in zip(rows, found, strict=True):
        print(f"{answer.text:28}", end="\n" if name == "loud" else "")
        worst = max(worst, difference(models[name], tokenizer(prompts[i])["input_ids"], answer))
        assert i >= TRAINED or answer.text == (PLAIN if name is None else STYLES[name])[i]
    print(f"largest difference from torch {worst:.1e}, in the logarithm of a token's probability")
    assert worst < 1e-4


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else folder))
