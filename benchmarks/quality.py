"""How much quality does an sDCT adapter retain beside LoRA, and with which settings? The search behind the demo.

    python benchmarks/quality.py [--output benchmarks/results/quality]

Each run trains MiniLM on a docstring task of `examples/docstrings.py` with the demo's loop; accuracy is on the dev
split, which the demo's table never sees. First the learning rate of each method (the head's is the same for all),
then, at the best one, the number of coefficients, scaling and selection, one at a time. About 25 minutes of CPU time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import finetuning as ft  # noqa: E402
from docstrings import Task, load_tasks  # noqa: E402

EPOCHS = {"package": 3, "kind": 2, "returns": 2}  # as in the demo
RATES = {"lora": (1e-3, 3e-3, 1e-2), "sdct": (1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1)}
VARIANTS = (
    {"n_coefficients": 350},
    {"n_coefficients": 1400},
    {"scaling": 4.0},
    {"selection": "low"},
    {"selection": "random"},
)


def run(task: Task, tokenizer: Any, method: str, rate: float, **settings: Any) -> dict[str, Any]:
    """Train once; one row of the table."""
    model = (ft.new_lora if method == "lora" else ft.new_sdct)(len(task.labels), **settings)
    began = time.process_time()
    ft.fit(model, ft.encode(tokenizer, task.train), rate=rate, epochs=EPOCHS[task.name])
    row = {"task": task.name, "method": method, "rate": rate, "settings": settings}
    row |= {"parameters": ft.trainable(model)[0], "dev_accuracy": ft.accuracy(model, ft.encode(tokenizer, task.dev))}
    row["cpu_seconds"] = round(time.process_time() - began)
    print(row, flush=True)
    return row


def best_rate(rows: list[dict[str, Any]], method: str) -> float:
    """The rate with the highest mean accuracy over the tasks."""
    means = {
        rate: sum(r["dev_accuracy"] for r in rows if r["method"] == method and r["rate"] == rate)
        for rate in RATES[method]
    }
    return max(means, key=lambda rate: means[rate])


def search() -> list[dict[str, Any]]:
    tokenizer = ft.load_tokenizer()
    tasks = {task.name: task for task in load_tasks()}
    rows = []
    for method, rates in RATES.items():
        for rate in rates:
            rows += [run(tasks[name], tokenizer, method, rate) for name in ("kind", "returns")]
    chosen = {method: best_rate(rows, method) for method in RATES}
    rows += [run(tasks["package"], tokenizer, method, rate) for method, rate in chosen.items()]
    for settings in VARIANTS:
        # Adam moves every value by about the rate, so the product with the scaling is what changes the weights
        rate = chosen["sdct"] / settings.get("scaling", 1.0)
        rows.append(run(tasks["kind"], tokenizer, "sdct", rate, **settings))
    return rows


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = ["# Retained quality", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [
        "| task | method | settings | learning rate | trained parameters | dev accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        settings = ", ".join(
            f"{key} {value:g}" if isinstance(value, int | float) else f"{key} {value}"
            for key, value in row["settings"].items()
        )
        cells = [row["task"], row["method"], settings or "default", f"{row['rate']:g}", f"{row['parameters']:,}"]
        lines.append(f"| {' | '.join(cells)} | {row['dev_accuracy']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write OUTPUT.md and OUTPUT.json")
    arguments = parser.parse_args()
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    rows = search()
    text = markdown(rows, about)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".md").write_text(text)
        arguments.output.with_suffix(".json").write_text(json.dumps({"about": about, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
