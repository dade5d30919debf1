"""What do adapters cost on this GPU? Everything is checked first, then timed; one JSON holds both.

    python benchmarks/gpu/run.py [--json FILE]

kernel, resident   measure.py; needs cmake and nvcc, or a folder built before (SDCT_GPU_BUILD); no torch
layer              measure.py; needs torch
engine             engines.py: TensorRT, multi-adapter over merged, switching beside refitting; needs TensorRT, or an
                   interpreter that has it in SDCT_TRT_PYTHON, and the plugin library

A section whose dependency is missing is skipped, and the reason printed and recorded. The JSON also takes in what
`pytest tests/gpu --junitxml=build/gpu/tests.xml` found before. It is written after every section.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "gpu"))
import engines
import measure
import native_gpu
from native_gpu import Gpu, Missing

from sdct_export.native import LIBRARY_PATH

ROOT = Path(__file__).parents[2]


def measure_engines(report: measure.Report, folder: Path) -> None:
    """In an interpreter with TensorRT: engines.py measures what this one prepares."""
    python = engines.interpreter()
    try:
        engines.prepare(folder)
    except ImportError as error:
        raise Missing(f"preparing the bundles needs torch, transformers and onnx ({error})") from error
    command = [python, str(Path(engines.__file__)), str(folder), str(folder / "engines.json")]
    done = subprocess.run(command, check=False, timeout=900)
    report.check("engines.py ends well", done.returncode == 0, f"exit {done.returncode}")
    if (folder / "engines.json").is_file():
        found = json.loads((folder / "engines.json").read_text())
        report.checks += found["checks"]
        for row in found["rows"]:
            report.row(section="engine", **row)


def tests() -> dict[str, Any]:
    """What `pytest tests/gpu --junitxml=build/gpu/tests.xml` and the engine checks left, where they ran before."""
    found: dict[str, Any] = {}
    file = ROOT / "build" / "gpu" / "tests.xml"
    if file.is_file():
        suite = next(ElementTree.parse(file).iter("testsuite"))
        found |= {key: suite.get(key) for key in ("timestamp", "tests", "failures", "errors", "skipped", "time")}
        found["cases"] = []
        for case in suite.iter("testcase"):
            child = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
            outcome = {"name": f"{case.get('classname')}.{case.get('name')}", "outcome": "passed"}
            if child is not None:
                outcome |= {"outcome": child.tag, "detail": str(child.get("message"))[:500]}
            found["cases"].append(outcome)
    engines = ROOT / "build" / "gpu" / "engine_checks.json"
    if engines.is_file():
        found["engines"] = json.loads(engines.read_text())
    return found


def versions() -> dict[str, str]:
    """Of the packages that take part, as installed for this interpreter."""
    found = {"python": platform.python_version()}
    for name in ("numpy", "torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "cuda-bindings"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _says(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
    return " ".join(done.stdout.split())


def machine(gpu: Gpu) -> dict[str, Any]:
    """The GPU, its driver and CUDA."""
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "multiprocessors": gpu.multiprocessors,
        "l2_bytes": gpu.l2_bytes,
        "driver": _says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "driver_cuda": f"{gpu.cuda_driver // 1000}.{gpu.cuda_driver % 1000 // 10}",
        "runtime_cuda": f"{gpu.cuda_runtime // 1000}.{gpu.cuda_runtime % 1000 // 10}",
        "versions": versions(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="the report; default benchmarks/results/gpu_NAME_DATE.json")
    arguments = parser.parse_args()
    try:
        folder = native_gpu.build()
        gpu = Gpu(folder)
    except Missing as reason:
        print(f"SKIPPED the GPU benchmarks: {reason}")
        return 0
    os.environ[LIBRARY_PATH] = os.pathsep.join(filter(None, [os.environ.get(LIBRARY_PATH), str(folder)]))
    report, where, found = measure.Report(), machine(gpu), tests()
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    target = arguments.json or ROOT / "benchmarks" / "results" / f"gpu_{slug}_{date}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for name, body in (
            ("kernel", lambda: measure.measure_kernel(gpu, report)),
            ("resident", lambda: measure.measure_resident(gpu, report)),
            ("layer", lambda: measure.measure_layers(gpu, report)),
            ("engine", lambda: measure_engines(report, Path(work))),
        ):
            report.section(name, body)
            head = {"date": date, "command": " ".join(["python", *sys.argv]), "machine": where, "tests": found}
            target.write_text(json.dumps(head | vars(report), indent=1) + "\n")

    print("\ntargets")
    for row in (row for row in report.rows if "bound" in row):
        parts = (row.get(key, "") for key in ("section", "kind", "variant", "case", "dtype", "n", "adapters"))
        label = " ".join(str(part) for part in parts if part != "")
        print(f"{label:<55}{row['ratio']:>8.3f} <= {row['bound']:<6}{'met' if row['met'] else 'MISSED'}")
    failed = [one["what"] for one in report.checks if not one["passed"]]
    print(f"{target}: {len(report.checks)} checks, {len(failed)} failed; {len(report.skipped)} sections skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
