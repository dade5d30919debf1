"""Build and run real engines on a GPU: `python engine_check.py CASES [RESULT]`, with make_engine_cases.py's cases.

Needs numpy, ml_dtypes, safetensors, cuda-python and tensorrt (8.5 on; Python 3.10 is enough), and SDCT_LIBRARY_PATH
with the plugin library. No torch, no pytest. Prints one line a check, writes them to the JSON file RESULT, exits 1
where one fails.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.config import SdctConfig
from sdct_export.adapter.entries import SdctEntries
from sdct_export.bundle.description import Bundle
from sdct_export.engine.build import Profile, build_engine
from sdct_export.engine.settings import is_strongly_typed
from sdct_export.errors import SdctError
from sdct_export.plugin_choice import parse_version
from sdct_export.runtime import MultiAdapterModel
from sdct_export.runtime.selection import in_slots, selection_inputs

PLANS = {
    "base": [None, None, None],
    "a": ["a", "a", "a"],
    "mixed": ["a", None, "b"],
    "blend": [{"a": 0.5, "b": 0.5}, {"b": -1.5}, None],
    "hot": ["hot", "a", None],
}
# of the largest output; TF32 is off. Half types round every layer, each runtime in its own places; what is expected of
# bfloat16 comes from float32
TOLERANCE = {"float32": 2e-4, "float16": 3e-2, "bfloat16": 1e-1}
MANY = 2000
LOADS = 50
PROFILE = Profile(batch=(1, 3, 32), sequence=(1, 6, 32), slots=(2, 256, 2048))
ROWS = [{"a": 1.0}, {}, {"a": 0.5, "b": -0.5}, {"b": 1.0}, {}]  # of language models
DECODER_PROFILE = Profile(batch=(1, 4, 8), sequence=(1, 8, 16), length=(1, 64, 64), slots=(2, 64, 256))
checks: list[dict[str, object]] = []
figures: dict[str, float] = {}


def check(what: str, passed: bool, detail: str = "") -> None:
    checks.append({"what": what, "passed": bool(passed), "detail": detail})
    print("ok  " if passed else "FAIL", what, detail, flush=True)


def same(a: dict, b: dict, rows: object = slice(None)) -> bool:
    return all(np.array_equal(a[name][rows], b[name][rows]) for name in a)


def compare(case: str, plan: str, found: dict, expected: dict, dtype: str) -> None:
    worst = 0.0
    for name, array in found.items():
        want = expected[f"{plan}.{name}"].astype(np.float64)
        shown = np.abs(want) < 1e4  # label columns an adapter does not have hold a huge negative number
        worst = max(worst, float(np.abs(array - want)[shown].max() / np.abs(want[shown]).max()))
    check(f"{case} {plan} equals ONNX Runtime", worst <= TOLERANCE[dtype], f"error {worst:.1e} of the largest output")


def random_adapter(bundle: Bundle, seed: int) -> SdctAdapter:
    rng = np.random.default_rng(seed)
    modules = {}
    for group in bundle.groups:
        for module, d_out, capacity in zip(group.modules, group.d_out, group.capacity, strict=True):
            flat = rng.choice(d_out * group.d_in, size=capacity, replace=False)
            indices = np.stack(np.unravel_index(flat, (d_out, group.d_in)), axis=1).astype(np.int32)
            modules[module] = SdctEntries(rng.normal(size=capacity).astype(np.float32), indices, (d_out, group.d_in))
    return SdctAdapter(SdctConfig(scaling=0.5), modules)


def run_case(folder: Path) -> None:
    case = folder.name
    bundle = Bundle.load(folder / "bundle")
    start = time.perf_counter()
    build_engine(
        bundle,
        profile=PROFILE,
        timing_cache=folder.parent / "timings.bin",
    )
    figures[f"{case} built in s"] = time.perf_counter() - start
    model = MultiAdapterModel(bundle, backend="tensorrt", max_slots=2048)
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    inputs = {name.removeprefix("input."): a for name, a in expected.items() if name.startswith("input.")}
    if bundle.kind == "merged":
        for _ in range(3):  # as it is, captured, replayed
            compare(case, "merged", model.run(inputs), expected, bundle.dtype)
        return
    base = model.run(inputs)
    a = model.run(inputs, "a")
    check(f"{case} the adapter changes the result", not same(a, base))
    model.load_adapter("hot", folder / "hot")
    for plan, rows in PLANS.items():
        compare(case, plan, model.run(inputs, rows), expected, bundle.dtype)
    mixed = model.run(inputs, PLANS["mixed"])
    check(f"{case} base rows of a mixed batch are the base's, bit for bit", same(mixed, base, [1]))
    check(f"{case} rows do not depend on the rows beside them", same(mixed, a, [0]))
    model.run(inputs, "b")
    check(f"{case} a, b, a returns to the same bits", same(model.run(inputs, "a"), a))
    check(f"{case} and to the base's", same(model.run(inputs), base))
    check_shapes(case, bundle, model, inputs)
    if case == "bert-float32":
        check_beside(case, bundle, folder / "beside.engine", model, inputs)
    check_traffic(case, bundle, model, inputs, a)
    check_many(case, bundle, model, inputs, base)


def run_decoder(folder: Path) -> None:
    """A language model with its cache: logits of a prompt and of each token after it, mixed rows, generation."""
    case = folder.name
    bundle = Bundle.load(folder / "bundle")
    start = time.perf_counter()
    build_engine(bundle, profile=DECODER_PROFILE, timing_cache=folder.parent / "timings.bin")
    figures[f"{case} built in s"] = time.perf_counter() - start
    model = MultiAdapterModel(bundle, backend="tensorrt")
    backend = model._open()[0]
    with np.load(folder / "decoder.npz") as file:
        expected = dict(file)
    tokens, lengths, want = [expected[f"row.{i}"] for i in range(len(ROWS))], expected["lengths"], expected["logits"]
    found = forced(model, tokens, lengths, ROWS)
    worst = float(np.abs(found.astype(np.float64) - want).max() / np.abs(want).max())
    check(f"{case} logits of every step equal ONNX Runtime", worst <= TOLERANCE[bundle.dtype], f"error {worst:.1e}")
    base = forced(model, tokens, lengths, [{}] * len(ROWS))
    plain = [i for i, row in enumerate(ROWS) if not row]
    check(
        f"{case} base rows of a mixed batch are the base's, bit for bit",
        same({"": found}, {"": base}, np.s_[:, plain]),
    )
    check(
        f"{case} the adapters change the result", all(not np.array_equal(found[:, i], base[:, i]) for i in (0, 2, 3))
    )
    check(f"{case} the same bits again", np.array_equal(forced(model, tokens, lengths, ROWS), found))
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    options = {"max_new_tokens": expected["made"].shape[1], "stop_tokens": []}
    rows = [row or None for row in ROWS]
    made = np.array([one.tokens for one in model.generate(prompts, rows, **options)])
    if bundle.dtype == "float32":
        check(f"{case} generates ONNX Runtime's tokens", np.array_equal(made, expected["made"]))
    alone = [model.generate([prompt], [row], **options)[0].tokens for prompt, row in zip(prompts, rows, strict=True)]
    if bundle.dtype == "float32":  # half types round otherwise in another shape, and a near tie may fall
        check(f"{case} rows make the same tokens alone", np.array_equal(made, np.array(alone)))
    prepared = [one for lane in backend._pool._lanes for one in lane.prepared if one.key is not None]
    captured = sum(one.graph is not None for one in prepared)
    check(f"{case} steps are captured", backend._manifest.concurrent is False or captured > 0, f"{captured} graphs")
    if hasattr(backend._engine, "get_aliased_input_tensor"):
        pairs = zip(bundle.cache.pasts, bundle.cache.presents, strict=True)
        aliased = [backend._engine.get_aliased_input_tensor(present) == past for past, present in pairs]
        check(f"{case} TensorRT writes the cache where we have it", set(aliased) == {backend._manifest.in_place})


def forced(model: MultiAdapterModel, tokens: list, lengths: np.ndarray, rows: list) -> np.ndarray:
    """Logits `[1 + steps, rows, vocabulary]` of the prompts `tokens[i][: lengths[i]]` and each token after them."""
    backend, bank = model._open()
    count = len(tokens[0]) - lengths[0]
    steps = backend.steps(model.bundle.cache, len(rows), int(lengths.max() + count))
    with bank.lease(["a", "b"]) as lease:
        chosen = selection_inputs([in_slots(row, lease.slots) for row in rows])
        prompts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        logits = [np.array(steps.prefill(0, prompts, 0, chosen, lease.tensors))]
        for step in range(count):
            new = np.array([row[length + step] for row, length in zip(tokens, lengths, strict=True)])
            logits.append(np.array(steps.decode(new, lengths + step, chosen, lease.tensors)))
    return np.stack(logits)


def check_shapes(case: str, bundle: Bundle, model: MultiAdapterModel, inputs: dict) -> None:
    """Batches and lengths in turn, more than a lane keeps prepared: each gives what the shape as it is gives."""
    backend = model._open()[0]
    text = "input_ids" in inputs
    sizes = [(rows, tokens) for rows in (1, 2, 3) for tokens in ((1, 2, 3, 5, 6) if text else (0,))]
    parts = {
        (rows, tokens): {name: a[:rows, :tokens] if text else a[:rows] for name, a in inputs.items()}
        for rows, tokens in sizes
    }
    plans = {rows: ["a", None, {"a": 0.5, "b": -1.0}][:rows] for rows in (1, 2, 3)}
    check(f"{case} lengths are padded", (backend.buckets is not None) == ("attention_mask" in inputs))
    first = {size: model.run(part, plans[size[0]]) for size, part in parts.items()}
    free = backend._cuda("MemGetInfo")[0]
    again = {size: model.run(part, plans[size[0]]) for size, part in parts.items()}
    figures[f"{case} device memory that the same shapes took again, MB"] = (
        free - backend._cuda("MemGetInfo")[0]
    ) / 1e6
    check(f"{case} every shape gives the same bits again", all(same(first[size], again[size]) for size in sizes))
    buckets, backend.buckets = backend.buckets, None
    worst = 0.0
    for size, part in parts.items():
        for name, want in model.run(part, plans[size[0]]).items():
            shown = np.abs(want.astype(np.float64)) < 1e4
            error = np.abs(want.astype(np.float64) - first[size][name])[shown].max()
            worst = max(worst, float(error / np.abs(want[shown]).max()))
    backend.buckets = buckets
    check(f"{case} padded lengths equal real ones", worst <= TOLERANCE[bundle.dtype], f"error {worst:.1e}")
    prepared = [one for lane in backend._pool._lanes for one in lane.prepared]
    captured = sum(one.graph is not None for one in prepared)
    figures[f"{case} shapes prepared"], figures[f"{case} of them in a graph"] = len(prepared), captured
    if not bundle.heads:  # a head is behind a condition, which TensorRT cannot capture
        check(f"{case} shapes are captured", 0 < captured == len(prepared))


def check_beside(case: str, bundle: Bundle, engine: Path, model: MultiAdapterModel, inputs: dict) -> None:
    """An engine whose plugin writes beside its inputs instead of over them computes the same."""
    build_engine(bundle, engine, profile=PROFILE, timing_cache=engine.parent.parent / "timings.bin", in_place=False)
    other = MultiAdapterModel(bundle, backend="tensorrt", engine=engine)
    found, want = other.run(inputs, PLANS["mixed"]), model.run(inputs, PLANS["mixed"])
    error = max(float(np.abs(found[n] - want[n]).max() / np.abs(want[n]).max()) for n in want)
    check(f"{case} in place and beside agree", error <= TOLERANCE[bundle.dtype], f"error {error:.1e}")


def check_traffic(case: str, bundle: Bundle, model: MultiAdapterModel, inputs: dict, a: dict) -> None:
    """Adapters come and go while four threads run another one."""
    wrong: list[object] = []
    done = threading.Event()

    def client() -> None:
        try:
            while not done.is_set():
                if not same(model.run(inputs, "a"), a):
                    wrong.append("another result")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    times = []
    for i in range(LOADS):
        adapter = random_adapter(bundle, i)
        start = time.perf_counter()
        model.load_adapter("passing", adapter)
        times.append(time.perf_counter() - start)
        model.run(inputs, "passing")
        model.unload_adapter("passing")
    done.set()
    for thread in threads:
        thread.join()
    check(f"{case} loading under traffic changes no running request", not wrong, str(wrong[:1]))
    figures[f"{case} loading an adapter under traffic, ms"] = 1e3 * float(np.median(times))


def check_many(case: str, bundle: Bundle, model: MultiAdapterModel, inputs: dict, base: dict) -> None:
    """2000 adapters in the bank; a row gives the same bits whoever shares its batch."""
    for i in range(MANY):
        model.load_adapter(f"n{i}", random_adapter(bundle, 1000 + i))
    resident = sum(info.slot is not None for info in model.adapters.values())
    check(f"{case} {MANY} adapters are resident", resident >= MANY)
    for i in (0, MANY // 2, MANY - 3):
        names = [f"n{i + j}" for j in range(3)]
        together = model.run(inputs, names)
        alone = [model.run(inputs, name) for name in names]
        check(f"{case} {names} together equal each alone", all(same(together, alone[j], [j]) for j in range(3)))
    check(f"{case} the base is still the base", same(model.run(inputs), base))


def main(folder: Path, result: Path | None = None) -> int:
    import tensorrt

    typed = is_strongly_typed(parse_version(tensorrt.__version__))
    cases = [*folder.glob("*/expected.npz"), *folder.glob("*/decoder.npz")]
    for case in sorted(path.parent for path in cases):
        if Bundle.load(case / "bundle").dtype == "bfloat16" and not typed:
            print("skip", case.name, f"needs TensorRT 10, this is {tensorrt.__version__}")
            continue
        try:
            (run_case if (case / "expected.npz").exists() else run_decoder)(case)
        except (SdctError, AssertionError) as error:
            traceback.print_exc()
            check(f"{case.name} runs", False, str(error))
        if result is not None:
            report = {"tensorrt": tensorrt.__version__, "checks": checks, "figures": figures}
            result.write_text(json.dumps(report, indent=1) + "\n")
    for what, value in figures.items():
        print(f"     {what}: {value:.2f}")
    failed = sum(not one["passed"] for one in checks)
    print(f"{len(checks)} checks, {failed} failed")
    return 1 if failed or not checks else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
