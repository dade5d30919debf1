"""What does training cost? Memory and step time of sDCT, PEFT LoRA and PEFT FourierFT on one BERT-base-sized model.

    python benchmarks/training.py [--json FILE] [--rounds 7]

Time: all methods live in one process and take turns step by step, so that whatever else loads the machine loads all
alike. The table shows the median and the minimum of the elapsed time, and the median processor time of all threads,
which other processes disturb least (waiting threads sleep, so that it holds no idle spinning). Memory: each method
runs in a process of its own, and the figure is how far the resident set rises at its peak within three steps above
where it was before them (Linux: VmHWM, reset, against VmRSS), with model, adapter and batch built; so it is what
training itself needs: activations, gradients, optimiser state and temporaries.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is first imported, below
METHODS = ("sDCT n=700", "LoRA r=8", "FourierFT n=1000")
BATCH, TOKENS, THREADS = 8, 128, 2


def build(method: str) -> tuple[Callable[[], float], int]:
    """A function that does one optimiser step and returns the loss, and the number of trained parameters."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from sdct_export import SdctConfig, get_sdct_model

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(num_labels=4)).requires_grad_(False)
    ids = torch.randint(0, 30522, (BATCH, TOKENS))
    labels = torch.randint(0, 4, (BATCH,))
    if method.startswith("sDCT"):
        model: torch.nn.Module = get_sdct_model(
            base, SdctConfig(target_modules=["query", "value"], n_coefficients=700)
        )
    else:
        import peft

        if method.startswith("LoRA"):
            config = peft.LoraConfig(target_modules=["query", "value"], r=8, lora_alpha=16)
        else:
            config = peft.FourierFTConfig(target_modules=["query", "value"], n_frequency=1000, scaling=150.0)
        model = peft.get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3)
    model.train()

    def step() -> float:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, sum(p.numel() for p in trained)


def peak_growth(method: str) -> float:
    """MiB by which the resident set of this process rises within three steps."""
    step, _ = build(method)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of one memory figure of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Figures per method."""
    memory = {}
    for method in METHODS:
        command = [sys.executable, __file__, "--memory-of", method]
        memory[method] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    steps = {method: build(method) for method in METHODS}
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for turn in range(rounds + 1):
        for method, (step, _) in steps.items():
            start = time.perf_counter(), time.process_time()
            step()
            if turn:  # the first is warm-up
                times[method].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {
        method: {
            "trained": steps[method][1],
            "peak_mib": round(memory[method], 1),
            "step_ms_median": round(1000 * statistics.median(wall for wall, _ in times[method]), 1),
            "step_ms_min": round(1000 * min(wall for wall, _ in times[method]), 1),
            "processor_ms_median": round(1000 * statistics.median(cpu for _, cpu in times[method]), 1),
        }
        for method in METHODS
    }


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    load = round(os.getloadavg()[0], 1)
    return {"cpu": cpu, "cores": os.cpu_count() or 0, "threads": THREADS, "load": str(load)} | versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps per method")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(peak_growth(arguments.memory_of))
        return
    where, results = machine(), measure(arguments.rounds)
    ours = results[METHODS[0]]
    print(f"BERT-base-sized classifier, query and value adapted, batch {BATCH} x {TOKENS} tokens, float32, Adam")
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    columns = {
        "peak_mib": "peak MiB",
        "step_ms_median": "step ms",
        "step_ms_min": "min ms",
        "processor_ms_median": "cpu ms",
    }
    print(f"{'method':18}{'trained':>9}" + "".join(f"{title:>10}{'ratio':>7}" for title in columns.values()))
    for method, figures in results.items():
        line = f"{method:18}{figures['trained']:>9,.0f}"
        for name in columns:
            line += f"{figures[name]:>10.1f}{figures[name] / ours[name]:>7.2f}"
        print(line)
    if arguments.json:
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        report = {"date": date, "machine": where, "batch": BATCH, "tokens": TOKENS, "results": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
