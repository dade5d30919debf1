"""Prepare what engine_check.py runs on a GPU: `python make_engine_cases.py FOLDER`. Needs torch and onnx, no GPU.

FOLDER/<case>/bundle/         a bundle, with the graphs for old and new TensorRT beside its model
FOLDER/<case>/hot/            an adapter that is loaded while requests run
FOLDER/<case>/expected.npz    inputs, and what ONNX Runtime computes on the CPU for CASES (of bfloat16: in float32)
FOLDER/<case>/decoder.npz     of a language model with a key-value cache instead: prompts, the tokens that follow,
                              logits of each for ROWS, and the tokens that generate makes
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import decoders
import families

from sdct_export import export_merged, export_multi
from sdct_export.bundle.description import Bundle
from sdct_export.engine.build import prepare_graph
from sdct_export.runtime import MultiAdapterModel
from sdct_export.runtime.selection import in_slots, selection_inputs

DECODERS = ("gemma2", "llama")
ROWS = [{"a": 1.0}, {}, {"a": 0.5, "b": -0.5}, {"b": 1.0}, {}]
LENGTHS, STEPS = (30, 6, 3, 8, 1), 12  # a prompt longer than a step of the engine; the width doubles at 32 columns
FAMILIES = ("bert", "llama", "vit")
DTYPES = ("float32", "float16", "bfloat16")
BATCH, SEQUENCE = 3, 6
CASES = {
    "base": [None, None, None],
    "a": ["a", "a", "a"],
    "mixed": ["a", None, "b"],
    "blend": [{"a": 0.5, "b": 0.5}, {"b": -1.5}, None],
    "hot": ["hot", "a", None],
}


def make(folder: Path) -> None:
    """Write every case."""
    for name in FAMILIES:
        family = families.FAMILIES[name]
        model = family.model()
        adapters = {
            key: families.random_adapter(family, model, seed, labels=3 if family.saved else None)
            for seed, key in enumerate(("a", "b", "hot"))
        }
        for dtype in DTYPES:
            case = folder / f"{name}-{dtype}"
            shipped = {key: adapters[key] for key in ("a", "b")}
            export_multi(model, shipped, case / "bundle", task_type=family.task, dtype=dtype, cache=False)
            adapters["hot"].save(case / "hot")
            finish(case, CASES, folder / f"{name}-float32" if dtype == "bfloat16" else case)
        plain = families.random_adapter(family, model, 7)
        export_merged(
            model, plain, folder / f"{name}-merged" / "bundle", task_type=family.task, dtype="float32", cache=False
        )
        merged = folder / f"{name}-merged"
        finish(merged, {"merged": None}, merged)
    for name in DECODERS:
        family = decoders.DECODERS[name]
        model = family.model()
        adapters = {key: families.random_adapter(family, model, seed) for seed, key in enumerate("ab", 1)}
        for dtype in DTYPES:
            case = folder / f"{name}-cache-{dtype}"
            export_multi(model, adapters, case / "bundle", dtype=dtype, target="tensorrt")
            finish_decoder(case, folder / f"{name}-cache-float32" if dtype == "bfloat16" else case)


def prepare(bundle: Bundle) -> None:
    """Write the graph of every TensorRT."""
    for version in ((8, 5), (8, 6), (10, 0), (10, 15)):
        if bundle.dtype != "bfloat16" or version >= (10, 0):
            prepare_graph(bundle, version=version)


def finish_decoder(case: Path, computed: Path) -> None:
    """Prepare the graphs and record what ONNX Runtime computes for the case in `computed`, token by token."""
    prepare(Bundle.load(case / "bundle"))
    tokens = decoders.random_rows([length + STEPS for length in LENGTHS], seed=13)
    with MultiAdapterModel(computed / "bundle") as model:
        backend, bank = model._open()
        steps = backend.steps(model.bundle.cache, len(ROWS), max(LENGTHS) + STEPS)
        with bank.lease(["a", "b"]) as lease:
            chosen = selection_inputs([in_slots(row, lease.slots) for row in ROWS])
            prompts = [row[:length] for row, length in zip(tokens, LENGTHS, strict=True)]
            logits = [np.array(steps.prefill(0, prompts, 0, chosen, lease.tensors))]
            for step in range(STEPS):
                new = np.array([row[length + step] for row, length in zip(tokens, LENGTHS, strict=True)])
                logits.append(np.array(steps.decode(new, np.array(LENGTHS) + step, chosen, lease.tensors)))
        rows = [row or None for row in ROWS]
        made = model.generate([row.tolist() for row in prompts], rows, max_new_tokens=STEPS, stop_tokens=[])
    np.savez(
        case / "decoder.npz",
        logits=np.stack(logits),
        made=np.array([one.tokens for one in made]),
        lengths=np.array(LENGTHS),
        **{f"row.{i}": row for i, row in enumerate(tokens)},
    )


def finish(case: Path, plans: dict[str, object], computed: Path) -> None:
    """Prepare the graphs and record what ONNX Runtime computes for the case in `computed`."""
    bundle = Bundle.load(case / "bundle")
    prepare(bundle)
    model = MultiAdapterModel(computed / "bundle")
    if bundle.kind == "multi":
        model.load_adapter("hot", case / "hot")
    rng = np.random.default_rng(11)
    sizes = {"batch": BATCH, "sequence": SEQUENCE}
    inputs = {}
    for spec in bundle.inputs:
        shape = [d if isinstance(d, int) else sizes[d] for d in spec.shape]
        if "mask" in spec.name:
            array = np.ones(shape)
        elif np.dtype(spec.dtype).kind == "i":
            array = rng.integers(0, 2 if spec.name == "token_type_ids" else 20, shape)
        else:
            array = rng.normal(size=shape)
        inputs[spec.name] = array.astype(spec.dtype)
    arrays = {f"input.{name}": array for name, array in inputs.items()}
    for plan, rows in plans.items():
        for name, array in model.run(inputs, rows).items():
            arrays[f"{plan}.{name}"] = array
    np.savez(case / "expected.npz", **arrays)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
