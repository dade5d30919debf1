"""What does the operator cost on the CPU? `MatMul + SpectralDelta` over `MatMul` in ONNX Runtime, LoRA beside it.

    SDCT_LIBRARY_PATH=build python benchmarks/operator_cpu.py [--json FILE] [--seconds 2] [--rounds 25]

One linear layer d x d with a Relu behind it (so that it is no graph output and may be changed in place, as in a
model), float32, n = 1000, the rows of a batch spread over the resident adapters. LoRA is what an exported graph would
do: r = 16, the two factors of each row gathered from a bank. All models hold the same base weight and take turns in
short blocks, so that whatever else loads the machine loads all alike; a block counts with its fastest call, a ratio
is the median over the rounds of a model's block over the block of MatMul alone beside it. The columns "cpu" are the
same ratios in processor time of all threads, per call and with waiting threads asleep: other load disturbs it least.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from sdct_export import contract, native

THREADS, N, RANK = 2, 1000, 16
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32
# d, rows, tokens of a row, resident adapters, share of rows with an adapter, bound to reach
CASES = [
    (2048, 1, 1, 8, True, 1.10),
    (2048, 8, 1, 8, True, 1.10),
    (2048, 32, 1, 8, True, 1.10),
    (4096, 1, 1, 8, True, 1.10),
    (4096, 8, 1, 8, True, 1.10),
    (4096, 32, 1, 8, True, 1.10),
    (2048, 8, 64, 8, True, 1.15),
    (768, 1, 1, 8, True, 1.25),
    (768, 8, 1, 8, True, 1.25),
    (768, 32, 1, 8, True, 1.25),
    (768, 8, 64, 8, True, 1.25),
    (2048, 1, 1, 8, False, 1.01),
    (2048, 32, 1, 8, False, 1.01),
    (2048, 8, 64, 8, False, 1.01),
]
MANY = [(2048, 1, 1), (2048, 32, 1), (4096, 32, 1), (2048, 8, 64)]  # 2000 resident adapters over 8
MANY_BOUND = 1.02


def model(kind: str, d: int, weight: np.ndarray[Any, Any]) -> bytes:
    """`matmul`, `sdct` or `lora` as an ONNX model; inputs x, adapter_ids, adapter_scales and the kind's bank."""
    x = helper.make_tensor_value_info("x", FLOAT, ["rows", "tokens", d])
    ids = helper.make_tensor_value_info("adapter_ids", INT32, ["rows", "k"])
    scales = helper.make_tensor_value_info("adapter_scales", FLOAT, ["rows", "k"])
    matmul = helper.make_node("MatMul", ["x", "weight"], ["layer" if kind == "matmul" else "y"])
    nodes, inputs, constants = [matmul], [x], [numpy_helper.from_array(weight, "weight")]
    if kind == "sdct":
        names = ["x", "adapter_ids", "adapter_scales", "values", "indices", "y"]
        attributes = {"d_in": d, "d_out": [d], "capacity": [N]}
        nodes.append(helper.make_node(contract.OP_TYPE, names, ["layer"], domain=contract.DOMAIN, **attributes))
        inputs += [ids, scales, helper.make_tensor_value_info("values", FLOAT, ["slots", N])]
        inputs += [helper.make_tensor_value_info("indices", INT32, ["slots", N, 2])]
    if kind == "lora":
        constants += [numpy_helper.from_array(np.array([1], np.int64), "axis")]
        nodes += [
            helper.make_node("Squeeze", ["adapter_ids", "axis"], ["id"]),
            helper.make_node("Gather", ["a", "id"], ["a_rows"], axis=0),
            helper.make_node("Gather", ["b", "id"], ["b_rows"], axis=0),
            helper.make_node("MatMul", ["x", "a_rows"], ["low"]),
            helper.make_node("MatMul", ["low", "b_rows"], ["delta"]),
            helper.make_node("Add", ["y", "delta"], ["layer"]),
        ]
        inputs += [ids, helper.make_tensor_value_info("a", FLOAT, ["slots", d, RANK])]
        inputs += [helper.make_tensor_value_info("b", FLOAT, ["slots", RANK, d])]
    nodes.append(helper.make_node("Relu", ["layer"], ["out"]))
    out = helper.make_tensor_value_info("out", FLOAT, ["rows", "tokens", d])
    graph = helper.make_graph(nodes, kind, inputs, [out], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(contract.DOMAIN, contract.OP_VERSION)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=contract.IR_VERSION)
    return proto.SerializeToString()  # type: ignore[no-any-return]


class Runner:
    """A session with its inputs bound; a call runs it once with the next set of adapter ids."""

    def __init__(
        self,
        proto: bytes,
        feeds: dict[str, np.ndarray[Any, Any]],
        ids: list[np.ndarray[Any, Any]],
        processor_time: bool = False,
    ) -> None:
        self.processor_time = processor_time
        options = onnxruntime.SessionOptions()
        if processor_time:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 4
        native.register_operator(options)
        self.session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in self.session.get_inputs()}
        self.bindings = []
        out = np.empty_like(feeds["x"])
        for one in ids:
            binding = self.session.io_binding()
            for name, array in {**feeds, "adapter_ids": one}.items():
                if name in wanted:
                    binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
            binding.bind_ortvalue_output("out", onnxruntime.OrtValue.ortvalue_from_numpy(out))
            self.bindings.append(binding)
        self.out, self.next = out, 0

    def block(self, seconds: float) -> float:
        """Seconds of the fastest call in a block of about `seconds`, or processor seconds of a call on average."""
        best, end, calls = float("inf"), time.perf_counter() + seconds, 0
        self._call()  # wakes the threads and fills the caches
        processor = time.process_time()
        while calls < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            self._call()
            best = min(best, time.perf_counter() - start)
            calls += 1
        if self.processor_time:
            return (time.process_time() - processor) / calls
        time.sleep(0.002)  # let this session's threads stop spinning before the next one starts
        return best

    def _call(self) -> None:
        binding = self.bindings[self.next % len(self.bindings)]
        self.next += 1
        self.session.run_with_iobinding(binding)


def bank(rng: np.random.Generator, d: int, adapters: int) -> dict[str, np.ndarray[Any, Any]]:
    """An sDCT bank of `adapters` adapters, rows sorted as the contract asks."""
    flat = np.sort(rng.integers(0, d * d, (adapters + 1, N)), axis=1)
    indices = np.stack([flat // d, flat % d], axis=2).astype(np.int32)
    values = rng.standard_normal((adapters + 1, N)).astype(np.float32)
    values[0], indices[0] = 0, 0
    return {"values": values, "indices": indices}


def measure(
    runners: dict[str, Runner], seconds: float, rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Milliseconds of every runner's best call, and its ratios to the first one, round by round."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            times[name].append(runner.block(seconds / rounds))
    first = times[next(iter(runners))]
    ratios = {name: [t / b for t, b in zip(values, first, strict=True)] for name, values in times.items()}
    return {name: 1000 * min(values) for name, values in times.items()}, ratios


def id_sets(rng: np.random.Generator, rows: int, adapters: int, active: bool) -> list[np.ndarray[Any, Any]]:
    """Sets of adapter ids for successive calls: mixed, all different where there are enough adapters."""
    if not active:
        return [np.zeros((rows, 1), np.int32)]
    return [
        (1 + rng.permutation(adapters)[np.arange(rows) % adapters]).astype(np.int32)[:, None]
        for _ in range(32 if adapters > 8 else 4)
    ]


def run(seconds: float, rounds: int) -> list[dict[str, Any]]:
    rng, report = np.random.default_rng(0), []
    for d, rows, tokens, adapters, active, bound in CASES:
        weight = rng.standard_normal((d, d)).astype(np.float32)
        feeds = {"x": rng.standard_normal((rows, tokens, d)).astype(np.float32)} | bank(rng, d, adapters)
        feeds["adapter_scales"] = np.ones((rows, 1), np.float32)
        feeds["a"] = rng.standard_normal((adapters + 1, d, RANK)).astype(np.float32)
        feeds["b"] = rng.standard_normal((adapters + 1, RANK, d)).astype(np.float32)
        ids = id_sets(rng, rows, adapters, active)
        row: dict[str, Any] = {"d": d, "rows": rows, "tokens": tokens, "adapters": adapters if active else 0}
        for processor in (False, True):
            runners = {
                kind: Runner(model(kind, d, weight), feeds, ids, processor) for kind in ("matmul", "sdct", "lora")
            }
            times, ratios = measure(runners, seconds, rounds)
            changed = not np.array_equal(runners["matmul"].out, runners["sdct"].out)
            assert changed == active, "the operator must change the output exactly where there are adapters"
            what = "cpu_" if processor else ""
            row |= {f"{kind}_{what}ms": round(t, 4) for kind, t in times.items()}
            row |= {f"{what}ratio": round(statistics.median(ratios["sdct"]), 3)}
            row |= {f"lora_{what}ratio": round(statistics.median(ratios["lora"]), 3)}
        row["bound"] = bound
        report.append(row)
        print_row(row)
    for d, rows, tokens in MANY:
        weight = rng.standard_normal((d, d)).astype(np.float32)
        x = rng.standard_normal((rows, tokens, d)).astype(np.float32)
        banks = {adapters: bank(rng, d, adapters) for adapters in (8, 2000)}
        row = {"d": d, "rows": rows, "tokens": tokens, "adapters": "2000 over 8"}
        for processor in (False, True):
            runners = {}
            for adapters, arrays in banks.items():
                feeds = {"x": x, "adapter_scales": np.ones((rows, 1), np.float32)} | arrays
                ids = id_sets(rng, rows, adapters, True)
                runners[f"sdct_{adapters}"] = Runner(model("sdct", d, weight), feeds, ids, processor)
            times, ratios = measure(runners, seconds, rounds)
            what = "cpu_" if processor else ""
            row |= {f"{kind}_{what}ms": round(t, 4) for kind, t in times.items()}
            row |= {f"{what}ratio": round(statistics.median(ratios["sdct_2000"]), 3)}
        row["bound"] = MANY_BOUND
        report.append(row)
        print_row(row)
    return report


def print_row(row: dict[str, Any]) -> None:
    base = row.get("matmul_ms", row.get("sdct_8_ms", 0.0))
    shape = f"{row['rows']} x {row['tokens']}"
    line = f"{row['d']:>6}{shape:>9}{row['adapters']!s:>13}{base:>11.3f}{row['ratio']:>9.3f}{row['cpu_ratio']:>9.3f}"
    line += f"{row['bound']:>8}"
    if "lora_ratio" in row:
        line += f"{row['lora_ratio']:>9.3f}{row['lora_cpu_ratio']:>9.3f}"
    print(line, flush=True)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    versions = {"onnxruntime": onnxruntime.__version__}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": THREADS, "load": round(os.getloadavg()[0], 1)} | versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each model of each case")
    parser.add_argument("--rounds", type=int, default=25, help="turns each model takes")
    arguments = parser.parse_args()
    if native.operator_library() is None:
        print("no operator library: build it (see CMakeLists.txt) and set SDCT_LIBRARY_PATH to its folder")
        return
    where = machine()
    print(f"MatMul + SpectralDelta over MatMul, float32, n = {N}; LoRA r = {RANK} gathered per row")
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{'d':>6}{'rows x t':>9}{'adapters':>13}{'base ms':>11}", end="")
    print(f"{'ratio':>9}{'cpu':>9}{'bound':>8}{'LoRA':>9}{'cpu':>9}")
    results = run(arguments.seconds, arguments.rounds)
    if arguments.json:
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        report = {"date": date, "machine": where, "n": N, "lora_rank": RANK, "results": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
