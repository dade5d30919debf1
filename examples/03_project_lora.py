"""Turn a trained LoRA adapter into sDCT adapters: how many cosines keep how much of it?

A LoRA update is spread over all frequencies, so a few coefficients hold only part of its energy. The table shows what
is lost at each budget; training an sDCT adapter from the start (example 01) needs far fewer.

    python examples/03_project_lora.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import finetuning as ft
import numpy as np
from docstrings import load_tasks

from sdct_export import export_multi, project
from sdct_export.base.reference import run_rows
from sdct_export.runtime import MultiAdapterModel

BUDGETS = (700, 3_000, 12_000)


def main() -> None:
    tokenizer = ft.load_tokenizer()
    task = next(task for task in load_tasks() if task.name == "returns")
    train, test = ft.encode(tokenizer, task.train[:640]), ft.encode(tokenizer, task.test[:200])
    lora = ft.new_lora(len(task.labels))
    ft.fit(lora, train, rate=3e-3, epochs=2)
    score = ft.accuracy(lora, test)
    print(f"LoRA r=8: {ft.trainable(lora)[0]:,} numbers, {score:.3f} of {len(test)} test texts right")

    with tempfile.TemporaryDirectory() as folder:
        lora.save_pretrained(f"{folder}/lora")
        adapters = {}
        for n in BUDGETS:
            adapters[f"n{n}"], report = project(ft.minilm(), lora=f"{folder}/lora", n_coefficients=n, progress=False)
            print(
                f"n = {n:6,}: {report.retained_energy:6.1%} of the energy, relative error {report.relative_error:.3f}"
            )
        export_multi(ft.load_classifier(len(task.labels)), adapters, Path(folder) / "bundle")
        runner = MultiAdapterModel(Path(folder) / "bundle")

    scores = {}
    for name in adapters:
        right = 0
        for inputs, labels in ft.batches(test, 50):
            logits = runner.run({key: value.numpy() for key, value in inputs.items()}, name)["logits"]
            right += int((logits.argmax(-1) == labels.numpy()).sum())
        scores[name] = right / len(test)
        print(f"{name:7} through ONNX Runtime: {scores[name]:.3f} right ({scores[name] - score:+.3f} to the LoRA)")

    inputs, _ = next(ft.batches(test, 4))
    rows = [(), *(((name, 1.0),) for name in adapters)]
    want = run_rows(ft.load_classifier(len(task.labels)), inputs, rows, adapters)["logits"].numpy()
    got = runner.run({key: value.numpy() for key, value in inputs.items()}, [dict(row) for row in rows])["logits"]
    error = float(np.abs(got - want).max())
    print(f"largest difference between a mixed batch and torch: {error:.1e}")
    assert error < 1e-4
    assert max(scores.values()) > score - 0.05, "the largest budget must keep what the LoRA learned"


if __name__ == "__main__":
    main()
