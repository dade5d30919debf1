"""What does the portable body cost in ONNX Runtime, with dense and with factorised transforms?

    python benchmarks/function_body.py [--json FILE] [--seconds 4]

One `SpectralDelta` node for a query and a value projection d x d, n = 700 each, every batch row with an adapter of its
own; beside it one DCT, and as the yardstick `x W` with one d x d matrix. All sessions of a case take turns, so that
whatever else loads the machine loads all alike. `wall` is the fastest call with 2 threads, `processor` the least
processor time of a call with 1 thread, which other work on the machine hardly touches. The memory and time to load the
model are measured once for 12 such nodes: ONNX Runtime copies the matrices of a length into every node it inlines.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from sdct_export.contract import DCT_OP_TYPE, DOMAIN, IR_VERSION, OP_TYPE, OP_VERSION, Group
from sdct_export.graph import function_body

Array = np.ndarray[Any, Any]
N, SLOTS = 700, 9
WIDTHS = (384, 768, 2048, 4096)
SHAPES = ((1, 8), (8, 64), (8, 128))
LOADED_NODES = 12
FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def serialized(
    inputs: list[ir.Value], nodes: list[ir.Node], outputs: list[ir.Value], functions: list[ir.Function]
) -> bytes:
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 20, DOMAIN: OP_VERSION}, name="benchmark")
    known = {function.identifier(): function for function in functions}
    return ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=known.values())).SerializeToString()  # type: ignore[no-any-return]


def matmul(d: int) -> bytes:
    op, x = function_body.Ops("matmul"), value("x", FLOAT, "rows", "tokens", d)
    out = op("MatMul", x, op.const(np.random.default_rng(0).standard_normal((d, d)), np.float32))
    out.type = ir.TensorType(FLOAT)
    return serialized([x], op.nodes, [out], [])


def transform(d: int) -> bytes:
    x, out = value("columns", FLOAT, d, "all"), value("out", FLOAT, "places", "all")
    node = ir.node(DCT_OP_TYPE, [x], domain=DOMAIN, overload=str(d), outputs=[out])
    return serialized([x], [node], [out], function_body.functions_for(group(d), FLOAT, 20))


def group(d: int) -> Group:
    return Group("query+value", ("query", "value"), d, (d, d), (N, N))


def delta(d: int, count: int = 1) -> bytes:
    ids, scales = value("adapter_ids", INT32, "rows", 1), value("adapter_scales", FLOAT, "rows", 1)
    values, indices = value("values", FLOAT, "slots", 2 * N), value("indices", INT32, "slots", 2 * N, 2)
    x = value("x", FLOAT, "rows", "tokens", d)
    ys = [value(name, FLOAT, "rows", "tokens", d) for name in ("y_1", "y_2")]
    inputs, nodes = [x, ids, scales, values, indices, *ys], []
    for number in range(count):
        outputs = [value(f"out_{number}_{j}", FLOAT, "rows", "tokens", d) for j in range(2)]
        attributes = {"d_in": d, "d_out": (d, d), "capacity": (N, N)}
        overload = function_body.overload_of(group(d), FLOAT)
        node_inputs = [x, ids, scales, values, indices, *ys]
        nodes.append(ir.node(OP_TYPE, node_inputs, attributes, domain=DOMAIN, overload=overload, outputs=outputs))
        ys = outputs
    return serialized(inputs, nodes, ys, function_body.functions_for(group(d), FLOAT, 20))


def feeds(d: int, rows: int, tokens: int) -> dict[str, Array]:
    rng = np.random.default_rng(d)
    flat = np.sort(rng.integers(0, d * d, (SLOTS, 2, N)), axis=2).reshape(SLOTS, 2 * N)
    values = rng.standard_normal((SLOTS, 2 * N)).astype(np.float32)
    values[0] = 0
    y = rng.standard_normal((2, rows, tokens, d)).astype(np.float32)
    x = rng.standard_normal((rows, tokens, d)).astype(np.float32)
    return {
        "x": x,
        "columns": np.ascontiguousarray(x.reshape(-1, d).T),
        "adapter_ids": 1 + np.arange(rows, dtype=np.int32)[:, None] % (SLOTS - 1),
        "adapter_scales": np.ones((rows, 1), np.float32),
        "values": values,
        "indices": np.stack([flat // d, flat % d], axis=2).astype(np.int32),
        "y_1": y[0],
        "y_2": y[1],
    }


class Runner:
    """A session with inputs and outputs bound once."""

    def __init__(self, model: bytes, arrays: dict[str, Array], threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        wanted = {i.name: arrays[i.name] for i in self.session.get_inputs()}
        for name, array in wanted.items():
            self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for output, array in zip(self.session.get_outputs(), self.session.run(None, wanted), strict=True):
            self.binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))

    def run(self, clock: Callable[[], float]) -> float:
        """Milliseconds of one call."""
        start = clock()
        self.session.run_with_iobinding(self.binding)
        return 1000 * (clock() - start)


def measure(models: dict[str, tuple[bytes, dict[str, Array]]], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of the best call of each model, by both clocks."""
    result: dict[str, dict[str, float]] = {name: {} for name in models}
    for label, threads, clock in (("wall", 2, time.perf_counter), ("processor", 1, time.process_time)):
        runners = {name: Runner(model, arrays, threads) for name, (model, arrays) in models.items()}
        best, end = dict.fromkeys(models, float("inf")), time.perf_counter() + seconds / 2
        while time.perf_counter() < end:
            for name, runner in runners.items():
                best[name] = min(best[name], *(runner.run(clock) for _ in range(3)))
        for name, milliseconds in best.items():
            result[name][label] = round(milliseconds, 4)
    return result


def dense_bodies(make: Callable[[int], bytes], d: int) -> bytes:
    """`make(d)` with every transform a dense matrix."""
    factor_cost, function_body.FACTOR_COST = function_body.FACTOR_COST, 1 << 30
    function_body._factors.cache_clear()
    try:
        return make(d)
    finally:
        function_body.FACTOR_COST = factor_cost
        function_body._factors.cache_clear()


def loading(d: int, dense: bool) -> dict[str, Any]:
    """Size of a file with `LOADED_NODES` nodes, and what a fresh process needs to load it, or why it cannot."""
    command = [sys.executable, __file__, "--load", str(d), *(["--dense"] if dense else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"fails": done.stderr.strip().splitlines()[-1].rpartition(" : ")[2]}
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def load(d: int, dense: bool) -> None:
    def make(d: int) -> bytes:
        return delta(d, LOADED_NODES)

    model = dense_bodies(make, d) if dense else make(d)
    before, start = resident(), time.process_time()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    took, after = time.process_time() - start, resident()
    del session
    found = {"file_mib": len(model) / 2**20, "load_s": took, "resident_mib": (after - before) / 2**20}
    print(json.dumps({name: round(number, 2) for name, number in found.items()}))


def resident() -> float:
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(seconds: float) -> dict[str, Any]:
    rows = []
    print("milliseconds with 2 threads / processor milliseconds with 1; in brackets: times x W by processor time")
    print(f"{'d':>5} {'batch':>7} {'x W':>15} {'DCT dense':>15} {'DCT factorised':>22} {'body dense':>22}", end="")
    print(f" {'body factorised':>22} {'base rows only':>22}")
    for d in WIDTHS:
        for batch, tokens in SHAPES:
            arrays = feeds(d, batch, tokens)
            base = arrays | {"adapter_ids": np.zeros((batch, 1), np.int32)}
            result = measure(
                {
                    "matmul": (matmul(d), arrays),
                    "dct_dense": (dense_bodies(transform, d), arrays),
                    "dct_factorised": (transform(d), arrays),
                    "body_dense": (dense_bodies(delta, d), arrays),
                    "body_factorised": (delta(d), arrays),
                    "body_base": (delta(d), base),
                },
                seconds,
            )
            yardstick = result["matmul"]["processor"]
            line = f"{d:>5} {f'{batch}x{tokens}':>7}"
            for name, times in result.items():
                text = f"{times['wall']:.3f}/{times['processor']:.3f}"
                ratio = "" if name in ("matmul", "dct_dense") else f" ({times['processor'] / yardstick:.2f})"
                line += f" {text + ratio:>{15 if not ratio else 22}}"
            print(line, flush=True)
            rows.append({"d": d, "rows": batch, "tokens": tokens, **result})
    memory = []
    for d in WIDTHS:
        kinds = {"dense": loading(d, True), "factorised": loading(d, False)}
        memory.append({"d": d, **kinds})
        texts = (f"{kind} {', '.join(f'{k} {v}' for k, v in found.items())}" for kind, found in kinds.items())
        print(f"{LOADED_NODES} nodes of d = {d}: {'; '.join(texts)}", flush=True)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "onnxruntime": onnxruntime.__version__,
        "n": N,
        "cases": rows,
        "loading": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each case (default 4)")
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load, arguments.dense)
        return
    report = run(arguments.seconds)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
