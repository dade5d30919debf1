"""Makes small models with SpectralDelta nodes, and runs them in the ONNX Runtime at hand. See ort_versions.sh.

ort_versions.py make FOLDER             numpy, scipy, onnx: models, inputs, and what they give in float64
ort_versions.py run FOLDER LIBRARY      numpy, onnxruntime
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

# no model-local function and an old IR version, which the oldest runtimes read
OPSET, IR = 17, 8
EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11}  # half a unit in the last place of 1.0

# name, dtype, d_in, d_out, rows, tokens of a row, adapters of a row, what else is special
CASES: list[tuple[str, str, int, list[int], int, int, int, str]] = [
    ("float32, blended", "float32", 96, [64, 130], 3, 5, 2, ""),
    ("float16", "float16", 768, [768], 2, 4, 1, ""),
    ("one token", "float32", 101, [77, 384, 12], 1, 1, 1, ""),
    ("behind a MatMul", "float32", 64, [64], 2, 3, 1, "matmul"),
    ("no adapter", "float32", 64, [96, 32], 2, 3, 2, "zero"),
    ("no adapter, behind a MatMul", "float32", 64, [64], 2, 3, 1, "matmul zero"),
    ("no rows", "float32", 64, [96], 0, 0, 1, ""),
    ("no tokens", "float32", 64, [96], 2, 0, 1, "zero"),
    ("an id beyond the bank", "float32", 16, [8], 2, 1, 1, "refused id"),
    ("capacities that overflow", "float32", 16, [8, 8], 2, 1, 1, "refused capacity"),
    ("a lacking capacity", "float32", 16, [8, 8], 2, 1, 1, "refused count"),
]


def make(folder: Path) -> None:
    """Write `<i>.onnx` and `<i>.npz` (inputs, `base_j` and `want_j`) for each case."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from scipy.fft import dct, idct

    folder.mkdir(parents=True)
    for i, (_, dtype, d_in, d_out, rows, tokens, blends, special) in enumerate(CASES):
        rng = np.random.default_rng(i)
        capacity, slots = [20] * len(d_out), 4
        n, total = sum(capacity), rows * tokens
        x = rng.standard_normal((total, d_in)).astype(dtype)
        ids = rng.integers(1, slots, (rows, blends)).astype(np.int32)
        if rows:
            ids[0] = 0
        if "zero" in special:
            ids[:] = 0
        scales = rng.uniform(0.5, 1.5, (rows, blends)).astype(np.float32)
        values = rng.standard_normal((slots, n)).astype(np.float32)
        values[0] = 0
        parts = [np.sort(rng.integers(0, d, (slots, c)), axis=1) for d, c in zip(d_out, capacity, strict=True)]
        indices = np.stack([np.concatenate(parts, axis=1), rng.integers(0, d_in, (slots, n))], axis=2).astype(np.int32)
        feeds = {"x": x, "ids": ids, "scales": scales, "values": values, "indices": indices}
        nodes, constants, results, at = [], [], {}, 0
        spectrum = dct(x.astype(np.float64), norm="ortho", axis=1) if total else np.zeros((0, d_in))
        for j, (d, c) in enumerate(zip(d_out, capacity, strict=True)):
            if "matmul" in special:
                weight = (rng.standard_normal((d_in, d)) / np.sqrt(d_in)).astype(dtype)
                constants.append(numpy_helper.from_array(weight, f"w{j}"))
                nodes.append(helper.make_node("MatMul", ["x", f"w{j}"], [f"y{j}"]))
                y = x.astype(np.float64) @ weight.astype(np.float64)
            else:
                feeds[f"y{j}"] = rng.standard_normal((total, d)).astype(dtype)
                y = feeds[f"y{j}"].astype(np.float64)
            sums = np.zeros((total, d))
            for t in range(total):
                for slot, scale in zip(ids[t // tokens], scales[t // tokens], strict=True):
                    r, k = indices[slot, at : at + c].T
                    np.add.at(sums[t], r, float(scale) * values[slot, at : at + c].astype(np.float64) * spectrum[t, k])
            results[f"base_{j}"] = y
            results[f"want_{j}"] = y + (idct(sums, norm="ortho", axis=1) if total else 0.0)
            at += c
        if special == "refused id":
            ids[-1, 0] = slots
        elif special == "refused capacity":
            capacity = [2**63 - 1] * len(d_out)
        elif special == "refused count":
            capacity = capacity[1:]
        names = [f"y{j}" for j in range(len(d_out))]
        nodes.append(
            helper.make_node(
                "SpectralDelta",
                ["x", "ids", "scales", "values", "indices", *names],
                [f"out{j}" for j in range(len(d_out))],
                domain="sdct",
                name="the_node",
                d_in=d_in,
                d_out=d_out,
                capacity=capacity,
            )
        )
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
            for name, array in feeds.items()
        ]
        kind = TensorProto.FLOAT if dtype == "float32" else TensorProto.FLOAT16
        outputs = [helper.make_tensor_value_info(f"out{j}", kind, [None, d]) for j, d in enumerate(d_out)]
        graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("sdct", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=IR), folder / f"{i}.onnx")
        np.savez(folder / f"{i}.npz", **{f"in_{k}": v for k, v in feeds.items()}, **results)


def run(folder: Path, library: Path) -> int:
    """Run every case and print one line for this runtime; the number of cases that failed."""
    import onnxruntime

    worst, problems = 0.0, []
    for i, (name, dtype, _, d_out, *_, special) in enumerate(CASES):
        with np.load(folder / f"{i}.npz") as archive:
            stored = {key: archive[key] for key in archive.files}
        feeds = {key[3:]: array for key, array in stored.items() if key.startswith("in_")}
        try:
            results = session(onnxruntime, folder / f"{i}.onnx", library).run(None, feeds)
        except Exception as error:  # the runtime's errors share no base class
            if "refused" not in special or "SpectralDelta node 'the_node'" not in str(error):
                problems.append(f"{name}: {error}")
            continue
        if "refused" in special:
            problems.append(f"{name}: was not refused")
            continue
        for j in range(len(d_out)):
            base, want, got = stored[f"base_{j}"], stored[f"want_{j}"], results[j].astype(np.float64)
            change = np.abs(want - base)
            if not got.size:
                good = got.shape == want.shape
            elif "matmul" in special:  # the runtime's own MatMul is in float32
                error = np.abs(got - want).max()
                good = bool(error < 1e-5) and ("zero" in special or bool(np.abs(got - base).max() > 1e-2))
            else:
                norm = np.sqrt((change**2).mean(axis=1, keepdims=True))
                bound = 1e-5 * (norm + change) + EPSILON[dtype] * 1.001 * np.maximum(np.abs(want), 2.0**-13)
                worst = max(worst, float((np.abs(got - want) / bound).max()))
                still = feeds["ids"].max(axis=1).repeat(len(got) // len(feeds["ids"])) == 0
                good = bool((np.abs(got - want) <= bound).all()) and bool((got[still] == base[still]).all())
                good = good and bool((np.abs(got - base)[~still].max(axis=1, initial=0) > 1e-2).all())
            if not good:
                problems.append(f"{name}: output {j} is wrong")
    good_cases = len(CASES) - len({p.split(":")[0] for p in problems})
    for problem in problems:
        print(f"  {problem}")
    print(
        f"onnxruntime {onnxruntime.__version__} (numpy {np.__version__}): "
        f"{good_cases} of {len(CASES)} cases agree, worst error {worst:.2f} of the bound"
    )
    return len(CASES) - good_cases


def session(onnxruntime: Any, model: Path, library: Path) -> Any:
    """A session of `model` with the operator from `library`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(library.resolve()))
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", target]:
            make(Path(target))
        case ["run", source, path]:
            sys.exit(min(run(Path(source), Path(path)), 1))
        case _:
            sys.exit(__doc__)
