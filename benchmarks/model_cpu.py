"""What do adapters cost a whole model on the CPU? Multi-adapter bundle over merged bundle in ONNX Runtime.

    SDCT_LIBRARY_PATH=build python benchmarks/model_cpu.py [--json FILE] [--seconds 180]

Two models with seeded random weights, float32, query and value projections adapted with n = 1000 each:
BERT-base size on 8 x 128 tokens, and a LLaMA-style model with the shapes of Qwen2-0.5B (24 layers, hidden 896, 14
query and 2 key-value heads, MLP 4864; vocabulary 32000 instead of 151936 to spare memory) on 8 rows of one token
without a key-value cache. Each row has another of 8 adapters. Beside the merged bundle run: the multi-adapter bundle
with the native operator and with the portable body, both also with base rows only and the native one with 2000
resident adapters; and the base graph with LoRA r = 16, the two factors of each row and projection gathered from a
bank. "merged_again" is a control: a second session of the very same merged file, opened last; its ratio says how far
from 1 two sessions of one graph come to lie. Before anything is timed, rows of the first adapter must equal the merged
bundle and base rows the base graph.

All take turns, each with one call to warm up and one that counts; a ratio is the median over the rounds of a call over
the merged bundle's call of the same round. "cpu" is the same in processor time of all threads, in sessions of its own
whose waiting threads sleep: other load on the machine disturbs it least. Last, the time until an adapter lies in a
slot: out of host memory in exchange for the one that has the slot, from an `SdctAdapter`, and from its folder.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from operator_cpu import RANK, THREADS, N, machine
from torch import nn

from sdct_export import SdctAdapter, SdctConfig, contract, export_merged, export_multi, native
from sdct_export.adapter.entries import SdctEntries
from sdct_export.base.model import find_linear, linear_shape
from sdct_export.bundle.description import Bundle
from sdct_export.bundle.packing import bank_layout, label_count, pack
from sdct_export.graph.function_body import Ops
from sdct_export.graph.match import match_linears
from sdct_export.runtime.bank import Bank
from sdct_export.runtime.ort import OrtBackend

Array = np.ndarray[Any, Any]
ADAPTERS, MANY, ROWS = 8, 2000, 8
BOUNDS = {"native": 1.03, "native_base": 1.0, "2000_over_8": 1.02}
SLOT_BOUND_MS = 1.0
LOADS = 51  # timed loads of each kind


def bert() -> tuple[nn.Module, int]:
    """A BERT-base-sized encoder, and the tokens of a row."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig()).eval(), 128


def llama() -> tuple[nn.Module, int]:
    """A decoder with the shapes of Qwen2-0.5B, and the tokens of a row."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), 1


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, int]], list[str]]] = {
    "BERT-base": (bert, ["query", "value"]),
    "LLaMA-style 0.5B": (llama, ["q_proj", "v_proj"]),
}


def make_adapter(model: nn.Module, targets: list[str], seed: int) -> SdctAdapter:
    """Random coefficients at random places in every targeted module."""
    rng, modules = np.random.default_rng(seed), {}
    for path in (name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets):
        shape = linear_shape(find_linear(model, path))
        assert shape is not None
        flat = rng.choice(shape[0] * shape[1], N, replace=False)
        indices = np.stack(np.divmod(flat, shape[1]), axis=1).astype(np.int32)
        modules[path] = SdctEntries(0.1 * rng.standard_normal(N).astype(np.float32), indices, shape)
    return SdctAdapter(SdctConfig(target_modules=targets, n_coefficients=N), modules)


def lora_model(base: Path, modules: Mapping[str, tuple[int, int]]) -> tuple[Path, dict[str, Array]]:
    """`base` with `y += (x A[id]) B[id]` on each module, written beside it over the same weights; and the banks."""
    model = ir.load(base)
    graph, ops, rng, bank = model.graph, Ops("lora"), np.random.default_rng(0), {}
    ids = ir.Value(name=contract.ADAPTER_IDS, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([ROWS, 1]))
    graph.inputs.append(ids)
    row_ids = ops("Squeeze", ids, ops.const([1]))
    for module, site in match_linears(graph, modules).items():
        d_out, d_in = modules[module]
        gathered = []
        for name, shape in (("a", (d_in, RANK)), ("b", (RANK, d_out))):
            array = (0.02 * rng.standard_normal((ADAPTERS + 1, *shape))).astype(np.float32)
            value = ir.Value(name=f"lora.{module}.{name}", type=ir.TensorType(ir.DataType.FLOAT))
            value.shape = ir.Shape(array.shape)
            graph.inputs.append(value)
            bank[f"lora.{module}.{name}"] = array
            gathered.append(ops("Gather", value, row_ids, axis=0))
        users = list(site.sum.uses())
        total = ops("Add", site.sum, ops("MatMul", ops("MatMul", site.x, gathered[0]), gathered[1]))
        for user, index in users:
            user.replace_input_with(index, total)
    graph.extend(ops.nodes)
    graph.sort()
    path = base.with_name("lora.onnx")
    ir.save(model, path)
    return path, bank


class Session:
    """An ONNX Runtime session that holds its outputs' memory; `feeds` are bound once per way to run it."""

    def __init__(self, path: Path, operator: bool, spinning: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.function_expansion_byte_limit", str(1 << 40))
        if operator:
            native.register_operator(options)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs: dict[str, Array] = {}

    def outputs(self, feeds: Mapping[str, Array]) -> Array:
        """A copy of the first output."""
        return np.array(self._session.run(None, {i.name: feeds[i.name] for i in self._session.get_inputs()})[0])

    def call(self, feeds: Mapping[str, Array]) -> Callable[[], None]:
        """A function that runs the model once on these inputs; banks are bound where they lie, not copied."""
        binding = self._session.io_binding()
        for name in (i.name for i in self._session.get_inputs()):
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(feeds[name]))
        if not self._outputs:
            results = self._session.run(None, {i.name: feeds[i.name] for i in self._session.get_inputs()})
            self._outputs = {o.name: r for o, r in zip(self._session.get_outputs(), results, strict=True)}
        for name, array in self._outputs.items():
            binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        return lambda: self._session.run_with_iobinding(binding)


class Case:
    """The exported forms of one model in `folder`, and the inputs each way to run it takes."""

    def __init__(self, name: str, folder: Path) -> None:
        make, targets = MODELS[name]
        model, self.tokens = make()
        self.adapters = {f"a{i}": make_adapter(model, targets, i) for i in range(ADAPTERS)}
        first = self.adapters["a0"]
        shapes = {m: e.shape for m, e in first.modules.items() if e.shape is not None}
        self.merged = export_merged(model, first, folder / "merged", cache=False).model_path
        self.bundle = export_multi(model, self.adapters, folder / "multi", cache=False)
        self.lora, lora_bank = lora_model(self.merged, shapes)
        rng = np.random.default_rng(1)
        config: Any = model.config
        inputs: dict[str, Array] = {
            "input_ids": rng.integers(0, config.vocab_size, (ROWS, self.tokens)),
            "attention_mask": np.ones((ROWS, self.tokens), np.int64),
            "token_type_ids": np.zeros((ROWS, self.tokens), np.int64),  # of a BERT; the other has no such input
            contract.ADAPTER_SCALES: np.ones((ROWS, 1), np.float32),
        }
        packed = [pack(self.bundle, adapter) for adapter in self.adapters.values()]
        eight = {n: np.stack([np.zeros_like(r), *(rows[n] for rows in packed)]) for n, r in packed[0].items()}
        order = np.arange(MANY) % ADAPTERS  # 2000 slots of their own in memory
        many = {n: np.concatenate([a[:1], a[1:][order]]) for n, a in eight.items()}
        spread = 1 + np.random.default_rng(2).permutation(MANY)[:ROWS]
        mixed = {**inputs, **eight, contract.ADAPTER_IDS: column(1 + np.arange(ROWS) % ADAPTERS)}
        base = {**inputs, **eight, contract.ADAPTER_IDS: column(np.zeros(ROWS))}
        self.feeds: dict[str, dict[str, Array]] = {
            "merged": inputs,
            "merged_again": inputs,
            "native": mixed,
            "portable": mixed,
            "native_2000": {**inputs, **many, contract.ADAPTER_IDS: column(spread)},
            "lora": {**inputs, **lora_bank, contract.ADAPTER_IDS: mixed[contract.ADAPTER_IDS]},
            "native_base": base,
            "portable_base": base,
        }

    def sessions(self, spinning: bool) -> dict[str, Session]:
        """The session of each way to run; some share one."""
        merged, lora = (Session(path, False, spinning) for path in (self.merged, self.lora))
        fast, portable = (Session(self.bundle.model_path, operator, spinning) for operator in (True, False))
        again = Session(self.merged, False, spinning)
        found = {"merged": merged, "merged_again": again, "native": fast, "native_2000": fast, "native_base": fast}
        return found | {"portable": portable, "portable_base": portable, "lora": lora}

    def check(self, sessions: Mapping[str, Session]) -> None:
        """Every way computes what it should, and its adapters change the output."""
        got = {name: session.outputs(self.feeds[name]) for name, session in sessions.items()}
        size = np.abs(got["merged"]).max()

        def near(a: Array, b: Array) -> bool:
            return bool(np.abs(a - b).max() <= 1e-4 * size)

        assert near(got["native"][0], got["merged"][0]), "row 0 has the adapter that the merged bundle holds"
        assert near(got["native"], got["portable"])
        assert near(got["native_base"], got["portable_base"])
        for name, base in (("native", "native_base"), ("portable", "portable_base"), ("native_2000", "native_base")):
            assert all(not near(a, b) for a, b in zip(got[name], got[base], strict=True)), f"{name}: no effect"
        assert all(not near(a, b) for a, b in zip(got["lora"], got["merged"], strict=True)), "LoRA: no effect"


def column(ids: Array) -> Array:
    return np.ascontiguousarray(ids.astype(np.int32)[:, None])


def turns(
    calls: Mapping[str, Callable[[], None]], seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of one call of each, round by round: as many rounds as fit into `seconds`, between 5 and 200."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(-1, 200):
        if turn >= 5 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            call()  # sessions that serve several ways run more often; now all find their caches warm
            start = clock()
            call()
            if turn >= 0:  # the round before is warm-up
                times[name].append(clock() - start)
            time.sleep(0.002)  # let this session's threads stop spinning before the next one starts
    return times


def compare(case: Case, seconds: float) -> dict[str, dict[str, Any]]:
    """Per way to run: milliseconds of the fastest call, median ratio to merged and its quartiles, by both clocks."""
    report: dict[str, dict[str, Any]] = {name: {} for name in [*case.feeds, "2000_over_8"]}
    for prefix, clock in (("", time.perf_counter), ("cpu_", time.process_time)):
        sessions = case.sessions(spinning=not prefix)
        if not prefix:
            case.check(sessions)
        times = turns({name: sessions[name].call(feeds) for name, feeds in case.feeds.items()}, seconds, clock)
        for name, row in report.items():
            over, under = ("native_2000", "native") if name == "2000_over_8" else (name, "merged")
            if name == over:
                row |= {f"{prefix}ms": round(1000 * min(times[name]), 2), f"{prefix}rounds": len(times[name])}
            ratios = [a / b for a, b in zip(times[over], times[under], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row |= {f"{prefix}ratio": round(middle, 3), f"{prefix}ratio_quartiles": [round(low, 3), round(high, 3)]}
        del sessions
        gc.collect()
    for name, bound in BOUNDS.items():
        report[name]["bound"] = bound
    return report


def loading(bundle: Bundle, adapters: Mapping[str, SdctAdapter]) -> dict[str, float]:
    """Median milliseconds until an adapter is ready for requests, wall and processor time."""
    first, second = [*adapters][:2]
    bank = Bank(bank_layout(bundle), OrtBackend(bundle.model_path, threads=THREADS), max_slots=2)

    def load(name: str, adapter: SdctAdapter) -> None:
        bank.add(name, pack(bundle, adapter), adapter.n_parameters, label_count(bundle, adapter))

    def lease(turn: int) -> None:
        with bank.lease([(first, second)[turn % 2]]):  # one slot, so each takes it from the other
            pass

    load(first, adapters[first])
    load(second, adapters[second])
    kinds: dict[str, Callable[[int], None]] = {"slot": lease}
    found = timed(kinds)
    bank.remove(first)
    bank.remove(second)

    def from_memory(turn: int) -> None:
        load("new", adapters[second])

    def from_folder(turn: int) -> None:
        load("new", SdctAdapter.load(bundle.adapter_path(second)))

    return found | timed({"adapter": from_memory, "folder": from_folder}, lambda: bank.remove("new"))


def timed(kinds: Mapping[str, Callable[[int], None]], undo: Callable[[], None] | None = None) -> dict[str, float]:
    """Median milliseconds of each, in turn, by both clocks."""
    times: dict[str, list[float]] = {f"{kind}_{what}ms": [] for kind in kinds for what in ("", "cpu_")}
    for turn in range(LOADS):
        for kind, act in kinds.items():
            start, processor = time.perf_counter(), time.process_time()
            act(turn)
            times[f"{kind}_cpu_ms"].append(time.process_time() - processor)
            times[f"{kind}_ms"].append(time.perf_counter() - start)
            if undo is not None:
                undo()
    return {name: round(1000 * statistics.median(values), 3) for name, values in times.items()}


def run(seconds: float) -> list[dict[str, Any]]:
    report = []
    for name in MODELS:
        with tempfile.TemporaryDirectory(prefix="model_cpu.") as folder:
            case = Case(name, Path(folder))
            print(f"\n{name}, {ROWS} x {case.tokens} tokens")
            columns = f"{'ratio':>8}{'quartiles':>15}"
            print(f"{'':16}{'ms':>10}{columns}{'cpu ms':>10}{columns}{'bound':>7}")
            ways = compare(case, seconds)
            for way, row in ways.items():
                print(line(way, row), flush=True)
            loads = loading(case.bundle, case.adapters)
            print(", ".join(f"{key} {value}" for key, value in loads.items()), f"(slot: bound {SLOT_BOUND_MS:g} ms)")
            report.append({"model": name, "rows": ROWS, "tokens": case.tokens, "ways": ways, "loading": loads})
    return report


def line(way: str, row: Mapping[str, Any]) -> str:
    text = f"{way:16}"
    for prefix in ("", "cpu_"):
        ms = f"{row[f'{prefix}ms']:.1f}" if f"{prefix}ms" in row else ""
        low, high = row[f"{prefix}ratio_quartiles"]
        text += f"{ms:>10}{row[f'{prefix}ratio']:>8.3f}{f'{low:.3f}-{high:.3f}':>15}"
    return text + f"{row.get('bound', ''):>7}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--seconds", type=float, default=180.0, help="time for each model and clock")
    arguments = parser.parse_args()
    if native.operator_library() is None:
        print("no operator library: build it (see CMakeLists.txt) and set SDCT_LIBRARY_PATH to its folder")
        return
    where = machine()
    print(f"whole models, query and value adapted, float32, n = {N}, {ADAPTERS} adapters; LoRA r = {RANK} gathered")
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    results = run(arguments.seconds)
    if arguments.json:
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        head = {"date": date, "machine": where, "n": N, "lora_rank": RANK, "slot_bound_ms": SLOT_BOUND_MS}
        arguments.json.write_text(json.dumps(head | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
