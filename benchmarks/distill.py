"""Does a LoRA survive as 700 coefficients a matrix? Accuracy of the LoRA, its projection and its distillation.

    python benchmarks/distill.py [--json FILE] [--loras FOLDER]

The three docstring tasks of the demo on MiniLM, with its data, head and schedule. For each a LoRA is trained with
labels; then the same texts, without their labels, distil it. Accuracy is on the demo's 1,000 test texts, which neither
sees; "same answer" is the share of them for which adapter and LoRA answer alike. Times are elapsed and processor
seconds of training the LoRA, of projecting and of distilling it, everything included. `--loras` keeps the trained
LoRAs in a folder and uses those that are there, whose times are then not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="the adapter keeps")  # that is what this script measures

import finetuning as ft  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from demo import EPOCHS, LORA_RATE  # noqa: E402
from docstrings import Task, load_tasks  # noqa: E402

from sdct_export import SdctAdapter, SdctModel, distill, project  # noqa: E402

CLASS = "finetuning:MeanPooled"
N = 700


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and the elapsed and processor seconds it took."""
    wall, processor = time.monotonic(), time.process_time()
    result = work()
    return result, {
        "seconds": round(time.monotonic() - wall, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
    }


def answers(model: torch.nn.Module, data: list[tuple[list[int], int]]) -> torch.Tensor:
    """The label `model` finds most likely for each test text, in the order of `ft.batches`."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(**inputs).logits.argmax(-1) for inputs, _ in ft.batches(data, 64)])


def measure(task: Task, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The row of one task."""
    train, test = ft.encode(tokenizer, task.train), ft.encode(tokenizer, task.test)
    labels = torch.cat([y for _, y in ft.batches(test, 64)])
    row: dict[str, Any] = {"task": task.name, "labels": len(task.labels), "texts": len(task.train)}
    if not folder.exists():
        lora = ft.new_lora(len(task.labels))
        _, row["lora"] = timed(lambda: ft.fit(lora, train, rate=LORA_RATE[task.name], epochs=EPOCHS[task.name]))
        lora.save_pretrained(folder)
    lora = peft.PeftModel.from_pretrained(ft.load_classifier(len(task.labels)), folder)
    found = answers(lora, test)
    row["lora"] = row.get("lora", {}) | {"accuracy": float((found == labels).float().mean())}

    def score(name: str, adapter: SdctAdapter, times: dict[str, float]) -> None:
        given = answers(SdctModel.from_adapter(ft.load_classifier(len(task.labels)), adapter), test)
        row[name] = times | {
            "accuracy": float((given == labels).float().mean()),
            "same_answer": float((given == found).float().mean()),
        }

    (projected, kept), times = timed(lambda: project(ft.minilm(), lora=folder, n_coefficients=N))
    score("projected", projected, times | {"retained_energy": kept.retained_energy})
    texts = [text for text, _ in task.train]
    (distilled, report), times = timed(
        lambda: distill(ft.minilm(), folder, texts, n_coefficients=N, max_tokens=ft.MAX_TOKENS, model_class=CLASS)
    )
    distances = {name: vars(getattr(report, name)) for name in ("projected", "start", "distilled")}
    score("distilled", distilled, times | {"held_back": report.held_back, "distances": distances})
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--loras", type=Path, help="keep the LoRAs here, and use those that are there")
    parser.add_argument("--tasks", nargs="+", default=[*EPOCHS], choices=[*EPOCHS], help="[default: all three]")
    arguments = parser.parse_args()
    where = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
    }
    tokenizer = ft.load_tokenizer()
    print(f"MiniLM, query and value, LoRA r=8 against n={N}; " + ", ".join(f"{k} {v}" for k, v in where.items()))
    print(f"{'task':9}{'method':11}{'accuracy':>9}{'as LoRA':>9}{'seconds':>9}{'processor':>10}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for task in load_tasks():
            if task.name not in arguments.tasks:
                continue
            rows.append(measure(task, tokenizer, (arguments.loras or Path(temporary)) / task.name))
            for method in ("lora", "projected", "distilled"):
                figures = rows[-1][method]
                same = f"{figures['same_answer']:.3f}" if "same_answer" in figures else "-"
                times = [f"{figures[key]:.1f}" if key in figures else "-" for key in ("seconds", "processor_seconds")]
                print(
                    f"{task.name:9}{method:11}{figures['accuracy']:>9.3f}{same:>9}{times[0]:>9}{times[1]:>10}",
                    flush=True,
                )
    if arguments.json:
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        report = {"date": date, "machine": where, "n_coefficients": N, "results": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
