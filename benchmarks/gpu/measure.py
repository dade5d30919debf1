"""What run.py measures of the kernels: alone, with many adapters resident, and behind the products of a layer.

LLaMA-3.1-8B shapes. Every number is checked against float64 before it is timed.

kernel     against its floor: the bytes it must move at the bandwidth of a copy, and an empty kernel. `cold` is one
           launch with the L2 cache flushed, `in_graph` one of several launches in a CUDA graph
resident   the same with 1 to 2000 adapters in the bank
alone      the update of q and v by one of the variants below, in a CUDA graph
layer      the products of a layer and the update, over the products: `q+v`, the two adapted products alone, or
           `layer`, all seven. `base`: products only; `sdct`: our kernel; `base rows`: it with every id 0; `lora`:
           r = 16, the factors of each row gathered from a bank and multiplied in batches; `cufft`: the mathematics of
           `sdct` in torch's operators, with cuFFT for the transforms

A layer's graph goes through four copies of the weights, so that they come from memory as in a model. The graphs take
turns, and a ratio is the median of graph over base beside it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from native_cases import DTYPES, Array, Case, check
from native_gpu import Gpu, Missing, OnDevice, Problem

D_IN, D_OUT = 4096, (4096, 1024)
BATCH = 32
# rows, tokens of a row
CASES = {"decode 1": (1, 1), "decode 8": (8, 1), "decode 32": (32, 1), "prefill 8192": (32, 256)}
COEFFICIENTS = (700, 1000)
HALF_TYPES = (DTYPES[2], DTYPES[1])  # bfloat16, float16
RESIDENT = (1, 32, 256, 2000)
LAUNCHES = 20  # in one graph
HIDDEN, RANK, COPIES, ROUNDS = 14336, 16, 4, 25
PRODUCTS = {  # d_out, d_in
    "q": (D_OUT[0], D_IN),
    "v": (D_OUT[1], D_IN),
    "k": (D_OUT[1], D_IN),
    "o": (D_IN, D_OUT[0]),
    "gate": (HIDDEN, D_IN),
    "up": (HIDDEN, D_IN),
    "down": (D_IN, HIDDEN),
}

# row of the report -> largest value of its `ratio`
TARGETS: list[tuple[dict[str, Any], float]] = [
    ({"section": "layer", "kind": "layer", "variant": "sdct", "case": "decode 32"}, 1.05),
    ({"section": "layer", "kind": "layer", "variant": "sdct", "case": "prefill 8192"}, 1.05),
    ({"section": "layer", "kind": "layer", "variant": "base rows"}, 1.01),
    ({"section": "resident"}, 1.02),
    ({"section": "resident layer"}, 1.02),
    ({"section": "engine", "kind": "multi over merged"}, 1.05),
]

Rows = list[dict[str, Any]]
Tensor = Any
Update = Callable[..., None]  # x [tokens, 4096], q, v; changes q and v in place


class Report:
    """Rows of figures, checks and skipped sections, printed as they come."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self.checks: Rows = []
        self.skipped: Rows = []

    def check(self, what: str, passed: bool, detail: str = "") -> bool:
        """Note a check; whether it passed."""
        self.checks.append({"what": what, "passed": bool(passed), "detail": detail})
        print("ok  " if passed else "FAIL", what, detail, flush=True)
        return bool(passed)

    def row(self, **row: Any) -> None:
        """Note figures; `ratio` is held against TARGETS."""
        for wanted, bound in TARGETS:
            if "ratio" in row and wanted.items() <= row.items():
                row |= {"bound": bound, "met": row["ratio"] <= bound}
        self.rows.append(row)
        shown = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        print("  ".join(f"{k} {v}" for k, v in shown.items() if k not in ("bound", "met")), flush=True)

    def section(self, name: str, body: Callable[[], None]) -> None:
        """Run one section; a dependency that is missing skips it."""
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            body()
        except Missing as reason:
            self.skipped.append({"section": name, "reason": str(reason)})
            print(f"SKIPPED {name}: {reason}", flush=True)
        except Exception as error:  # the other sections still count; the report says that this one failed
            self.check(f"section {name} runs", False, f"{type(error).__name__}: {error}")
        print(f"   {time.perf_counter() - start:.1f} s", flush=True)


def make_case(
    rng: np.random.Generator, dtype: np.dtype[Any], n: int, rows: int, tokens: int, adapters: int = BATCH
) -> Case:
    """`rows` rows of `tokens` tokens, each with an adapter of its own where there are enough, y updated in place."""
    values = rng.standard_normal((adapters + 1, n * len(D_OUT))).astype(np.float32)
    indices = np.zeros((adapters + 1, n * len(D_OUT), 2), np.int32)
    for j, d_out in enumerate(D_OUT):
        flat = np.sort(rng.integers(0, d_out * D_IN, (adapters + 1, n)), axis=1)
        indices[:, j * n : (j + 1) * n] = np.stack([flat // D_IN, flat % D_IN], axis=2)
    values[0], indices[0] = 0, 0
    ids = (1 + rng.permutation(adapters)[np.arange(rows) % adapters]).astype(np.int32)[:, None]
    return Case(
        dtype=dtype,
        x=rng.standard_normal((rows * tokens, D_IN), np.float32).astype(dtype),
        ids=ids,
        scales=rng.uniform(0.5, 1.5, ids.shape).astype(np.float32),
        values=values,
        indices=indices,
        y=[rng.standard_normal((rows * tokens, d), np.float32).astype(dtype) for d in D_OUT],
        capacity=[n] * len(D_OUT),
        in_place=True,
    )


def equals_float64(case: Case, found: list[Array], rng: np.random.Generator, tolerance: float = 1e-5) -> str:
    """Why the results of `case` are not y + delta in float64, on up to 96 of its tokens; empty where they are."""
    chosen = np.sort(rng.permutation(len(case.x))[:96])
    part = Case(
        case.dtype,
        case.x[chosen],
        case.ids,
        case.scales,
        case.values,
        case.indices,
        [y[chosen] for y in case.y],
        case.capacity,
        token_row=case.rows_of_tokens[chosen].astype(np.int32),
    )
    try:
        changed = check(part, [y[chosen] for y in found], tolerance)
    except AssertionError as error:
        return str(error)
    return "" if changed else "the adapters changed nothing"


def least_bytes(case: Case) -> int:
    """Reading x and every y once, writing every y, and reading the entries of the rows' adapters."""
    size, tokens = case.dtype.itemsize, len(case.x)
    used = len(np.unique(case.ids[case.ids > 0]))
    return tokens * size * (D_IN + 2 * sum(D_OUT)) + used * 12 * sum(case.capacity)


def measure_kernel(gpu: Gpu, report: Report) -> None:
    rng = np.random.default_rng(70)
    bandwidth = gpu.copy_bandwidth()
    empty, empty_graph = gpu.time_empty(), gpu.time_empty(launches=LAUNCHES)
    report.row(section="machine", copy_GBps=bandwidth / 1e9, empty_ms=empty, empty_in_graph_ms=empty_graph)
    for dtype in HALF_TYPES:
        for n in COEFFICIENTS:
            for name, (rows, tokens) in CASES.items():
                sets = [make_case(rng, dtype, n, rows, tokens) for _ in range(1 if tokens > 1 else 4)]
                on_device = [OnDevice(gpu, case) for case in sets]
                node = gpu.node(sets[0])
                node.run(on_device[0].problem)
                reason = equals_float64(sets[0], on_device[0].results(), rng)
                if not report.check(f"kernel {dtype} n {n} {name} equals float64", not reason, reason):
                    continue
                problems = [one.problem for one in on_device]
                cold = node.time(problems[:1])
                warm = node.time(problems, launches=LAUNCHES, repeats=20)
                moving = 1e3 * least_bytes(sets[0]) / bandwidth
                report.row(
                    section="kernel",
                    case=name,
                    dtype=str(dtype),
                    n=n,
                    cold_ms=cold,
                    in_graph_ms=warm,
                    bytes_ms=moving,
                    floor_ms=max(moving, empty_graph),
                    over_floor=warm / max(moving, empty_graph),
                )


def measure_resident(gpu: Gpu, report: Report) -> None:
    """Adapters in the bank; every launch of a graph draws other ones. The ratio is to one adapter."""
    rng, first = np.random.default_rng(71), 0.0
    for adapters in RESIDENT:
        sets = [make_case(rng, DTYPES[2], 700, BATCH, 1, adapters) for _ in range(4)]
        on_device = [OnDevice(gpu, case) for case in sets]
        node = gpu.node(sets[0])
        node.run(on_device[0].problem)
        reason = equals_float64(sets[0], on_device[0].results(), rng)
        if report.check(f"kernel with {adapters} adapters resident equals float64", not reason, reason):
            problems = [one.problem for one in on_device]
            took = node.time(problems, launches=LAUNCHES, repeats=50)
            first = first or took
            report.row(section="resident", adapters=adapters, in_graph_ms=took, ratio=took / first)


def measure_layers(gpu: Gpu, report: Report) -> None:
    try:
        import torch
    except ImportError as error:
        raise Missing(f"torch is not installed ({error})") from error
    if not torch.cuda.is_available():
        raise Missing(f"torch {torch.__version__} finds no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    rng = np.random.default_rng(72)
    for dtype in HALF_TYPES:
        weights = [_weights(dtype, seed) for seed in range(COPIES)]
        for n in COEFFICIENTS:
            for name, (rows, tokens) in CASES.items():
                case = make_case(rng, dtype, n, rows, tokens)
                updates = _updates(gpu, case, rng)
                if _checked(case, updates, weights[0], f"{dtype} n {n} {name}", report, rng):
                    _compare(case, updates, weights, report, case=name, dtype=str(dtype), n=n)
    _resident(gpu, report, rng)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    import torch

    if array.dtype == DTYPES[2]:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()  # type: ignore[no-any-return]


def _dtype(dtype: np.dtype[Any]) -> Any:
    import torch

    return torch.bfloat16 if dtype == DTYPES[2] else torch.float16


def _weights(dtype: np.dtype[Any], seed: int) -> dict[str, Tensor]:
    import torch

    made = torch.Generator("cuda").manual_seed(seed)
    return {
        name: torch.randn(shape, generator=made, device="cuda", dtype=_dtype(dtype)) / math.sqrt(shape[1])
        for name, shape in PRODUCTS.items()
    }


class Bank:
    """A case's bank and ids on the device."""

    def __init__(self, case: Case) -> None:
        import torch

        self.values, self.indices = _tensor(case.values), _tensor(case.indices)
        self.ids, self.scales = _tensor(case.ids), _tensor(case.scales)
        self.none = torch.zeros_like(self.ids)
        self.rows, self.slots, self.n = len(case.ids), len(case.values), case.capacity[0]


def _updates(gpu: Gpu, case: Case, rng: np.random.Generator) -> dict[str, Update]:
    bank = Bank(case)
    return {
        "sdct": _sdct(gpu, case, bank, bank.ids),
        "base rows": _sdct(gpu, case, bank, bank.none),
        "lora": _lora(case, bank),
        "cufft": _cufft(bank),
    }


def _sdct(gpu: Gpu, case: Case, bank: Bank, ids: Tensor) -> Update:
    import torch

    node, kind = gpu.node(case), DTYPES.index(case.dtype)

    def update(x: Tensor, *outputs: Tensor) -> None:
        problem = Problem(
            type=kind,
            rows=bank.rows,
            blends=1,
            slots=bank.slots,
            tokens=len(x),
            x=x.data_ptr(),
            x_stride=x.stride(0),
            ids=ids.data_ptr(),
            scales=bank.scales.data_ptr(),
            values=bank.values.data_ptr(),
            indices=bank.indices.data_ptr(),
        )
        for j, y in enumerate(outputs):
            problem.y_in[j] = problem.y_out[j] = y.data_ptr()
            problem.y_in_stride[j] = problem.y_out_stride[j] = y.stride(0)
        node.launch(problem, torch.cuda.current_stream().cuda_stream)

    return update


def _lora(case: Case, bank: Bank) -> Update:
    import torch

    made = torch.Generator("cuda").manual_seed(73)

    def factors(*shape: int) -> Tensor:
        factor = torch.randn(shape, generator=made, device="cuda", dtype=_dtype(case.dtype))
        return factor / math.sqrt(shape[1])

    banks = [(factors(bank.slots, D_IN, RANK), factors(bank.slots, RANK, d_out)) for d_out in D_OUT]
    ids = bank.ids[:, 0].long()

    def update(x: Tensor, *outputs: Tensor) -> None:
        x3 = x.view(bank.rows, -1, D_IN)
        for (down, up), y in zip(banks, outputs, strict=True):
            y.view(bank.rows, -1, y.shape[1]).baddbmm_(torch.bmm(x3, down[ids]), up[ids])

    return update


def _cufft(bank: Bank) -> Update:
    """Adds IDCT(scatter(scale value gather(DCT(x)))), by rfft, irfft and Makhoul's permutation, in float32."""
    import torch

    def twiddle(length: int) -> Tensor:  # [length / 2 + 1] of DCT_k = Re(t_k FFT(v)_k), DCT_{N-k} = -Im(t_k FFT(v)_k)
        k = torch.arange(length // 2 + 1, device="cuda", dtype=torch.float64)
        t = torch.polar(torch.full_like(k, math.sqrt(2 / length)), -math.pi * k / (2 * length))
        t[0] /= math.sqrt(2)
        return t.to(torch.complex64)

    forward, backward = twiddle(D_IN), {d: twiddle(d) for d in D_OUT}

    def dct(x: Tensor) -> Tensor:
        v = torch.cat([x[:, ::2], x[:, 1::2].flip(1)], dim=1)
        bins = torch.fft.rfft(v) * forward
        return torch.cat([bins.real, -bins.imag[:, 1:-1].flip(1)], dim=1)

    def idct(spectrum: Tensor) -> Tensor:
        length = spectrum.shape[1]
        t = backward[length]
        zero = torch.zeros_like(spectrum[:, :1])
        mirrored = torch.cat([zero, spectrum[:, length // 2 :].flip(1)], dim=1)  # X_{N-k}, 0 for k = 0
        v = torch.fft.irfft(torch.complex(spectrum[:, : length // 2 + 1], -mirrored) / t, n=length)
        half = (length + 1) // 2
        out = torch.empty_like(v)
        out[:, ::2], out[:, 1::2] = v[:, :half], v[:, half:].flip(1)
        return out

    def update(x: Tensor, *outputs: Tensor) -> None:
        tokens = len(x) // bank.rows
        slots = bank.ids[:, 0].long()
        places = bank.indices[slots].long()
        values = bank.values[slots] * bank.scales
        spectrum = dct(x.float()).view(bank.rows, tokens, D_IN)
        for j, y in enumerate(outputs):
            part = slice(j * bank.n, (j + 1) * bank.n)
            shape = (bank.rows, tokens, bank.n)
            chosen = spectrum.gather(2, places[:, None, part, 1].expand(shape)) * values[:, None, part]
            total = torch.zeros(bank.rows, tokens, y.shape[1], device="cuda")
            total.scatter_add_(2, places[:, None, part, 0].expand(shape), chosen)
            y += idct(total.view(len(x), -1))

    return update


def _checked(
    case: Case, updates: dict[str, Update], weights: dict[str, Tensor], what: str, report: Report, rng: Any
) -> bool:
    """Whether the variants, behind a product, equal float64."""
    import torch

    x = _tensor(case.x)
    base = [torch.nn.functional.linear(x, weights[name]) for name in ("q", "v")]
    behind = Case(
        case.dtype, case.x, case.ids, case.scales, case.values, case.indices, [_array(y) for y in base], case.capacity
    )
    good = True
    for variant, update in updates.items():
        outputs = [y.clone() for y in base]
        update(x, *outputs)
        torch.cuda.synchronize()
        if variant == "base rows":
            same = all(torch.equal(a, b) for a, b in zip(outputs, base, strict=True))
            good &= report.check(f"layer {what}: rows without adapter are the base's, bit for bit", same)
        elif variant == "lora":
            changed = not any(torch.equal(a, b) for a, b in zip(outputs, base, strict=True))
            good &= report.check(f"layer {what}: lora changes the result", changed)
        else:
            reason = equals_float64(behind, [_array(y) for y in outputs], rng, 1e-5 if variant == "sdct" else 1e-4)
            good &= report.check(f"layer {what}: {variant} equals float64", not reason, reason)
    return good


def _products(kind: str, x: Tensor, weights: list[dict[str, Tensor]], update: Update | None) -> Callable[[], None]:
    from torch.nn.functional import linear

    def body() -> None:
        for w in weights:
            q, v = linear(x, w["q"]), linear(x, w["v"])
            if update is not None:
                update(x, q, v)
            if kind == "layer":
                linear(x, w["k"])
                out = linear(q, w["o"])
                linear(out, w["gate"])
                linear(linear(out, w["up"]), w["down"])

    return body


def _alone(x: Tensor, outputs: list[list[Tensor]], update: Update) -> Callable[[], None]:
    def body() -> None:
        for q, v in outputs:
            update(x, q, v)

    return body


def _graph(body: Callable[[], None]) -> Any:
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def _time(graphs: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds of every replay, the graphs taking turns."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in graphs}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for turn in range(-2, ROUNDS):
        for name, graph in graphs.items():
            graph.replay()  # what the graph before it left in the caches does not count
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 0:
                times[name].append(begin.elapsed_time(end))
    return times


def _compare(
    case: Case, updates: dict[str, Update], weights: list[dict[str, Tensor]], report: Report, **labels: Any
) -> None:
    import torch

    x = _tensor(case.x)
    outputs = [[torch.nn.functional.linear(x, w[name]) for name in ("q", "v")] for w in weights]
    times = _time({name: _graph(_alone(x, outputs, update)) for name, update in updates.items()})
    for variant, took in times.items():
        report.row(section="alone", variant=variant, **labels, ms=statistics.median(took) / COPIES)
    for kind in ("q+v", "layer"):
        graphs = {"base": _graph(_products(kind, x, weights, None))}
        graphs |= {name: _graph(_products(kind, x, weights, update)) for name, update in updates.items()}
        times = _time(graphs)
        for variant, took in times.items():
            ratio = statistics.median(a / b for a, b in zip(took, times["base"], strict=True))
            ms = statistics.median(took) / COPIES
            report.row(section="layer", kind=kind, variant=variant, **labels, ms=ms, ratio=ratio)
        del graphs
        torch.cuda.empty_cache()


def _resident(gpu: Gpu, report: Report, rng: np.random.Generator) -> None:
    """A layer at decode with 1 to 2000 adapters in the bank; the ratio is to one."""
    weights = [_weights(DTYPES[2], seed) for seed in range(COPIES)]
    graphs, keep = {}, []
    for adapters in RESIDENT:
        case = make_case(rng, DTYPES[2], 700, BATCH, 1, adapters)
        bank, x = Bank(case), _tensor(case.x)
        keep.append((bank, x))  # the graphs hold their addresses only
        graphs[str(adapters)] = _graph(_products("layer", x, weights, _sdct(gpu, case, bank, bank.ids)))
    times = _time(graphs)
    for name, took in times.items():
        ratio = statistics.median(a / b for a, b in zip(took, times["1"], strict=True))
        report.row(section="resident layer", adapters=int(name), ms=statistics.median(took) / COPIES, ratio=ratio)
