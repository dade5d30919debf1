"""What does a quantized base cost in quality, and what does it save? int8 and int4 beside float32, exact adapters.

    python benchmarks/quantization.py [--json FILE]

Two models with trained adapters, made here: MiniLM with the demo's adapter for "which of 32 packages" (a classifier
on real weights), and a small LLaMA-style model (6 layers, hidden 256, tied embeddings) trained for some minutes on
docstrings, with an adapter trained on those of one half of the packages. `sdct_export.quality` compares, on texts of
neither training, the quantized base with the exact adapter and the adapter merged before quantizing, both with the
float model. Sizes are those of `model.onnx` and its data. Times are medians, in processor time, of calls that take
turns, in sessions of their own with one thread, all rows through the adapter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import docstrings
import finetuning as ft
import numpy as np
import torch
from operator_cpu import machine
from torch import nn

from sdct_export import SdctConfig, export_multi, get_sdct_model
from sdct_export.quality import quality
from sdct_export.runtime import MultiAdapterModel

TOKENS, ROUNDS, TEXTS = 48, 31, 300
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantize": "int8"},
    "int8 level 1": {"quantize": "int8", "accuracy_level": 1},
    "int4": {"quantize": "int4"},
    "int4 block 128": {"quantize": "int4", "block_size": 128},
}
SHAPES = ((1, 1), (1, 48), (8, 48))  # rows x tokens


def classifier(folder: Path) -> tuple[nn.Module, list[str]]:
    """MiniLM with the demo's adapter, saved in `folder`, and the task's test texts."""
    task = docstrings.load_tasks()[0]
    model = ft.new_sdct(len(task.labels))
    ft.fit(model, ft.encode(ft.load_tokenizer(), task.train), rate=4e-2, epochs=3)
    model.save_adapter(folder)
    return ft.load_classifier(len(task.labels)), [text for text, _ in task.test][:TEXTS]


def language_model(folder: Path, minutes: float) -> tuple[nn.Module, list[str]]:
    """A LLaMA trained on docstrings, an adapter of it in `folder`, and docstrings of neither training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = ft.load_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    docs = list(dict.fromkeys((doc.text, doc.package) for doc in docstrings.read_docstrings()))
    packages = sorted({package for _, package in docs})
    own = set(packages[::2])
    held, rest = docs[::20], [doc for i, doc in enumerate(docs) if i % 20]
    train_language(base, tokenizer, [text for text, _ in rest], rate=1e-3, seconds=60 * minutes)
    base.eval().requires_grad_(True)
    adapted = get_sdct_model(base, SdctConfig(["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    train_language(adapted, tokenizer, [t for t, p in rest if p in own], rate=2e-2, seconds=20 * minutes)
    adapted.eval().save_adapter(folder)
    return adapted.plain_base().eval(), [text for text, package in held if package in own][:TEXTS]


def train_language(model: nn.Module, tokenizer: Any, texts: list[str], *, rate: float, seconds: float) -> None:
    """AdamW on batches of 16 texts cut to `TOKENS` tokens until the time is over."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    generator, end = torch.Generator().manual_seed(0), time.monotonic() + seconds
    model.train()
    while time.monotonic() < end:
        chosen = [texts[i] for i in torch.randint(len(texts), (16,), generator=generator).tolist()]
        batch = tokenizer(chosen, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(f"last loss {loss.item():.3f}", file=sys.stderr)


def measured(model: nn.Module, adapter: Path, texts: list[str], folder: Path) -> dict[str, Any]:
    """Sizes, times and quality of every setting."""
    bundles = {}
    for name, settings in SETTINGS.items():
        bundles[name] = export_multi(model, {"a": adapter}, folder / name.replace(" ", "-"), **settings)
        for file in ft.minilm().glob("tokenizer*"):
            (bundles[name].path / file.name).write_bytes(file.read_bytes())
    runners = {name: MultiAdapterModel(bundle, threads=1) for name, bundle in bundles.items()}
    times: dict[str, dict[str, float]] = {name: {} for name in SETTINGS}
    for rows, tokens in SHAPES:
        ids = np.random.default_rng(0).integers(1000, 20000, (rows, tokens))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        seen: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(ROUNDS):
            for name, runner in runners.items():
                runner.run(feeds, "a")
                start = time.process_time()
                runner.run(feeds, "a")
                seen[name].append(time.process_time() - start)
        for name, values in seen.items():
            times[name][f"{rows} x {tokens}"] = statistics.median(values)
    result = {}
    for name, bundle in bundles.items():
        size = sum(file.stat().st_size for file in bundle.path.glob("model.onnx*"))
        result[name] = {"mb": size / 1e6, "seconds": times[name], "quality": []}
        if bundle.quantization is not None:
            report = quality(bundle.path, model, texts, progress=False)
            result[name]["change"] = bundle.quantization.change
            result[name]["quality"] = [vars(row) for row in report.rows]
            result[name]["answers"] = report.answers
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--minutes", type=float, default=6, help="training of the language model")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"machine": machine(), "date": datetime.date.today().isoformat(), "models": {}}
    with tempfile.TemporaryDirectory() as work:
        for name, make in (
            ("MiniLM classifier", lambda folder: classifier(folder)),
            ("small LLaMA", lambda folder: language_model(folder, options.minutes)),
        ):
            folder = Path(work) / name.split()[-1]
            folder.mkdir()
            model, texts = make(folder / "adapter")
            found["models"][name] = figures = measured(model, folder / "adapter", texts, folder)
            shapes = [f"{rows} x {tokens}" for rows, tokens in SHAPES]
            columns = ["base", "MB", *(f"{shape} ms" for shape in shapes), "method", "error", "largest", "same answer"]
            columns.append("perplexity (float)")
            print(f"\n## {name}, {len(texts)} texts\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
            for setting, row in figures.items():
                cells = [setting, f"{row['mb']:.1f}", *(f"{1e3 * row['seconds'][s]:.2f}" for s in shapes)]
                for line in row["quality"] or [None]:
                    told = ["-"] * 5
                    if line is not None:
                        told = [line["method"], f"{line['error']:.2%}", f"{line['largest']:.2g}"]
                        told.append(f"{line['agreement']:.2%}")
                        known = line["perplexity"] is not None
                        told.append(f"{line['perplexity']:.3f} ({line['float_perplexity']:.3f})" if known else "-")
                    print("| " + " | ".join([*cells, *told]) + " |")
                    cells = [""] * len(cells)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
