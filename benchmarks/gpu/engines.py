"""TensorRT: what does a multi-adapter engine cost over a merged one, and switching over refitting? Called by run.py.

`prepare` exports a four-layer LLaMA-style decoder (hidden 2048, float16) with torch. `python engines.py FOLDER RESULT`
measures it where TensorRT is; that needs numpy, ml_dtypes, safetensors, cuda-python and tensorrt, and no torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "gpu"))
from engine_check import random_adapter

from sdct_export.bundle.description import Bundle
from sdct_export.engine import build, settings
from sdct_export.native import library_folders
from sdct_export.plugin_choice import parse_version, plugin_libraries
from sdct_export.runtime import MultiAdapterModel

CASES = {"decode 1": (1, 1), "decode 8": (8, 1), "decode 32": (32, 1), "prefill 8 x 128": (8, 128)}  # batch, sequence
ROUNDS, LOADS, REFITS = 60, 50, 5
VOCABULARY = 1024


def interpreter() -> str:
    """The Python that has TensorRT. Raises `native_gpu.Missing`."""
    from native_gpu import Missing

    python = os.environ.get("SDCT_TRT_PYTHON")
    if python is None:
        if importlib.util.find_spec("tensorrt") is None:
            raise Missing("tensorrt is not installed here, and SDCT_TRT_PYTHON names no interpreter that has it")
        python = sys.executable
    if not plugin_libraries(library_folders()):
        raise Missing("the plugin library was not built: TensorRT's headers are missing (TENSORRT_INCLUDE_DIR)")
    return python


def prepare(folder: Path) -> None:
    """Export `multi` with 32 adapters' room and `merged` with one of them, and the weights that refitting sets."""
    import families
    import onnx
    import torch
    from transformers import LlamaConfig

    from sdct_export import export_merged, export_multi

    def config() -> Any:
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=2048,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=4,
            intermediate_size=5632,
            max_position_embeddings=512,
        )

    family = families.Family("speed", "CAUSAL_LM", config, "LlamaForCausalLM", ("q_proj", "v_proj"))
    model = family.model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2)
    adapter = families.random_adapter(family, model, 1, n=700)
    export_multi(model, {"a": adapter}, folder / "multi", task_type=family.task, dtype="float16", cache=False)
    export_merged(model, adapter, folder / "merged", task_type=family.task, dtype="float16", cache=False)
    for name in ("multi", "merged"):
        for version in ((8, 5), (8, 6), (10, 0)):  # one graph each
            build.prepare_graph(Bundle.load(folder / name), version=version)
    graphs = [onnx.load(folder / name / "model.onnx").graph for name in ("multi", "merged")]
    base, merged = ({t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer} for graph in graphs)
    changed = {n: a for n, a in merged.items() if n in base and not np.array_equal(a, base[n])}
    assert len(changed) == 2 * model.config.num_hidden_layers, sorted(changed)
    np.savez(folder / "refit.npz", **changed)


class Measurement:
    """The engines in a folder that `prepare` made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.checks = folder, [], []  # type: ignore[var-annotated]
        profile = build.Profile(batch=(1, 8, 32), sequence=(1, 1, 128), slots=(2, 64, 2048))
        models = {}
        for name in ("merged", "multi"):
            bundle = Bundle.load(folder / name)
            start = time.perf_counter()
            build.build_engine(bundle, profile=profile, timing_cache=folder / "timings.bin")
            self.rows.append({"kind": "build", "case": name, "seconds": time.perf_counter() - start})
            models[name] = MultiAdapterModel(bundle, backend="tensorrt", max_slots=2048)
        self.merged, self.multi = models["merged"], models["multi"]
        for i in range(32):
            self.multi.load_adapter(f"n{i}", random_adapter(self.multi.bundle, i))

    def check(self, what: str, passed: bool, detail: str = "") -> None:
        """Note a check."""
        print("ok  " if passed else "FAIL", what, detail, flush=True)
        self.checks.append({"what": what, "passed": bool(passed), "detail": detail})

    def inputs(self, batch: int, sequence: int) -> dict[str, Any]:
        """What both bundles read, for a batch of this size."""
        ids = np.random.default_rng(batch).integers(0, VOCABULARY, (batch, sequence))
        whole = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.indices(ids.shape)[1]}
        whole["token_type_ids"] = np.zeros_like(ids)
        return {spec.name: whole[spec.name] for spec in self.multi.bundle.inputs}

    def correct(self) -> None:
        """The two engines agree, and the adapter shows."""
        inputs = self.inputs(8, 16)
        merged, multi, base = self.merged.run(inputs), self.multi.run(inputs, "a"), self.multi.run(inputs)
        for name, want in merged.items():
            most = np.abs(want.astype(np.float64)).max()
            error = np.abs(multi[name].astype(np.float64) - want).max() / most
            self.check(f"engine multi with a equals merged with a: {name}", error <= 3e-2, f"error {error:.1e}")
            change = np.abs(base[name].astype(np.float64) - want).max() / most
            self.check(f"engine the adapter changes {name}", change > 1e-3, f"by {change:.1e}")

    def compare(self) -> None:
        """Whole requests, host to host: what a program sees."""
        for case, (batch, sequence) in CASES.items():
            inputs = self.inputs(batch, sequence)
            calls = {
                "merged": lambda i=inputs: self.merged.run(i),
                "multi": lambda i=inputs, b=batch: self.multi.run(i, [f"n{row}" for row in range(b)]),
                "base rows": lambda i=inputs: self.multi.run(i),
            }
            times: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(-3, ROUNDS):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call()
                    if turn >= 0:
                        times[name].append(1e3 * (time.perf_counter() - start))
            row: dict[str, Any] = {"kind": "multi over merged", "case": case}
            row |= {f"{name}_ms": statistics.median(took) for name, took in times.items()}
            pairs = zip(times["multi"], times["merged"], strict=True)
            self.rows.append(row | {"ratio": statistics.median(a / b for a, b in pairs)})

    def switch(self) -> None:
        """Loading an adapter into a slot, until a request has used it, beside refitting the merged engine."""
        inputs, loads, whole = self.inputs(1, 1), [], []
        for i in range(LOADS):
            adapter = random_adapter(self.multi.bundle, 100 + i)
            start = time.perf_counter()
            self.multi.load_adapter("new", adapter)
            loads.append(1e3 * (time.perf_counter() - start))
            self.multi.run(inputs, "new")
            whole.append(1e3 * (time.perf_counter() - start))
            self.multi.unload_adapter("new")
        row: dict[str, Any] = {"kind": "switch", "load_ms": statistics.median(loads)}
        row |= {"load_and_run_ms": statistics.median(whole)}
        try:
            row["refit_ms"] = self._refit()
        except Exception as error:  # a figure to compare with; without it ours still stands
            row["refit_ms"] = f"not measured: {type(error).__name__}: {error}"
        self.rows.append(row)

    def _refit(self) -> float:
        import tensorrt as trt

        version, log, bundle = parse_version(trt.__version__), build.Log(trt), self.merged.bundle
        graph = build.prepare_graph(bundle, version=version)
        builder = trt.Builder(log.logger)
        network = builder.create_network(settings.network_flags(trt, version))
        parser = trt.OnnxParser(network, log.logger)
        if not parser.parse_from_file(str(graph)):
            raise RuntimeError(log.reason())
        config = builder.create_builder_config()
        config.set_flag(trt.BuilderFlag.REFIT)
        shapes = build.profile_shapes(bundle, build.Profile(batch=(1, 8, 32), sequence=(1, 1, 128)))
        told = settings.builder_settings(
            version, bundle.dtype, graph, shapes, library=None, embed=False, in_place=False
        )
        for setting in told:
            setting.apply(settings.Builder(trt, builder, config, network))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError(log.reason())
        engine = trt.Runtime(log.logger).deserialize_cuda_engine(plan)
        with np.load(self.folder / "refit.npz") as file:
            weights = {name: np.ascontiguousarray(file[name]) for name in file.files}
        times = []
        for _ in range(REFITS):
            refitter = trt.Refitter(engine, log.logger)
            known = set(refitter.get_all_weights())
            start = time.perf_counter()
            given = [
                n for n, array in weights.items() if n in known and refitter.set_named_weights(n, trt.Weights(array))
            ]
            if not given or not refitter.refit_cuda_engine():
                raise RuntimeError(f"{len(given)} of {len(weights)} weights taken; {log.reason()}")
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)


def main(folder: Path, result: Path) -> int:
    import tensorrt as trt

    measurement = Measurement(folder)
    measurement.correct()
    for step in (measurement.compare, measurement.switch):
        step()
        rows = [{"tensorrt": trt.__version__} | row for row in measurement.rows]
        result.write_text(json.dumps({"rows": rows, "checks": measurement.checks}))
    return int(not all(one["passed"] for one in measurement.checks))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
