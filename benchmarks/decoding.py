"""Is decoding as fast as in ONNX Runtime GenAI, and what do adapters cost there?

    pip install onnxruntime-genai --no-deps          # optional: without it, its columns stay empty
    SDCT_LIBRARY_PATH=build python benchmarks/decoding.py [--json FILE] [--rounds 15] [--only step,generate,...]

A LLaMA of 125 million seeded parameters (hidden 768, 12 layers, 12 query and 4 key-value heads, MLP 2048, vocabulary
32000), float32, two threads on the CPU; query and value projections adapted with n = 1000 each. Whatever is compared
takes turns in one process, in sessions whose waiting threads sleep; a ratio is the median over the rounds of one
call over the other's call of the same round, by the wall clock and by the processor time of all threads.

step      one token a row beside a past of 512 and 2048 tokens, batch 1 and 8: the merged graph over that of GenAI's
          builder; the native operator with 8 adapters mixed, resident but unused, and with 2000 resident, over the
          merged graph; and the same over a base in int4.
prefill   512 tokens, logits of the last position alone, over GenAI's graph.
generate  64 new tokens after 64, batch 1 and 8, over og.Generator on GenAI's graph.
jobs      64 jobs of mixed lengths over 9 adapters and the base: tokens a second in the continuous batcher, against
          GenAI grouped by adapter (a merged graph for each adapter would be needed: one stands for all), our batches
          of 8 in which all wait for the longest, and one by one.
peft      reported beside: PEFT's `adapter_names` over its base, in torch.
memory    the most memory that a process takes to run the bundle, without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from model_cpu import make_adapter
from operator_cpu import THREADS, N, machine
from torch import nn

from sdct_export import contract, export_merged, export_multi, native
from sdct_export.bundle.description import Bundle
from sdct_export.bundle.packing import bank_layout, pack
from sdct_export.runtime import MultiAdapterModel

Array = np.ndarray[Any, Any]
Call = Callable[[], object]
ROWS, MANY, LAYERS, VOCABULARY, HEADS, HEAD_SIZE = 8, 2000, 12, 32000, 4, 64
PASTS = (512, 2048)
QUIET = "session.intra_op.allow_spinning"  # waiting threads sleep: one session's do not disturb another's


def llama() -> nn.Module:
    """The model of all figures."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, num_hidden_layers=LAYERS, num_attention_heads=12,
        num_key_value_heads=HEADS, intermediate_size=2048, max_position_embeddings=4096, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Made:
    """Everything that is measured, made in `folder` where it is asked for first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, llama()
        self.adapters = {f"a{i}": make_adapter(self.model, ["q_proj", "v_proj"], i) for i in range(9)}
        self.base = folder / "base"
        self.model.save_pretrained(self.base)
        _write_tokenizer(self.base)

    @functools.cached_property
    def merged(self) -> Bundle:
        """The base with one adapter in its weights."""
        return export_merged(self.base, self.adapters["a0"], self.folder / "merged")

    @functools.cached_property
    def multi(self) -> Bundle:
        """The base with nine adapters beside it."""
        return export_multi(self.base, self.adapters, self.folder / "multi")

    @functools.cached_property
    def merged_int4(self) -> Bundle:
        """As `merged`, then quantized."""
        return export_merged(self.base, self.adapters["a0"], self.folder / "merged4", quantize="int4")

    @functools.cached_property
    def multi_int4(self) -> Bundle:
        """As `multi`, over a quantized base."""
        return export_multi(self.base, self.adapters, self.folder / "multi4", quantize="int4")

    @functools.cached_property
    def genai(self) -> Path | None:
        """The folder of GenAI's builder, None where it is not installed."""
        if importlib.util.find_spec("onnxruntime_genai") is None:
            return None
        output = self.folder / "genai"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", self.base, "-o", output]
        command += ["-p", "fp32", "-e", "cpu", "-c", self.folder / "cache"]
        subprocess.run(command, check=True, capture_output=True)
        settings = json.loads((output / "genai_config.json").read_text())
        settings["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": THREADS, QUIET: "0"}
        (output / "genai_config.json").write_text(json.dumps(settings))
        return output


def _write_tokenizer(folder: Path) -> None:
    """Words that stand for ids: GenAI's builder wants a tokenizer, no figure reads a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<1>", eos_token="<2>", pad_token="<0>")
    tokenizer.save_pretrained(folder)


# --- one call of a graph ---------------------------------------------------------------------------------------------


def graph(path: Path, batch: int, past: int, new: int, more: Mapping[str, Array], *, operator: bool = False) -> Call:
    """A function that computes `new` tokens a row beside a past, all bound once; past and present are one buffer."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 4
    options.add_session_config_entry(QUIET, "0")
    if operator and not native.register_operator(options):
        raise SystemExit("no operator library")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {
        contract.INPUT_IDS: rng.integers(3, VOCABULARY, (batch, new)),
        contract.ATTENTION_MASK: np.ones((batch, past + new), np.int64),
        contract.POSITION_IDS: np.tile(np.arange(past, past + new), (batch, 1)),
        contract.LAST_LOGITS: np.array([True]),
        **more,
    }
    taken = {i.name for i in (*session.get_inputs(), *session.get_overridable_initializers())}
    binding = session.io_binding()
    wrap = onnxruntime.OrtValue.ortvalue_from_numpy
    kept = [wrap(array) for array in feeds.values()]
    for name, value in zip(feeds, kept, strict=True):
        if name in taken:
            binding.bind_ortvalue_input(name, value)
    for name in (name for name in taken if name.startswith("past_key_values.")):
        buffer = wrap(rng.standard_normal((batch, HEADS, past + new, HEAD_SIZE), np.float32))
        kept.append(buffer)
        binding.bind_ortvalue_input(name, buffer)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
    binding.bind_output("logits", "cpu")

    def call() -> object:
        session.run_with_iobinding(binding)
        return kept  # which live as long as this function

    return call


def banks(bundle: Bundle, made: Made, ids: Sequence[int], slots: int) -> dict[str, Array]:
    """The adapter inputs of a batch whose rows take the slots `ids`, of a bank with `slots` adapters."""
    packed = [pack(bundle, adapter) for adapter in made.adapters.values()]
    feeds: dict[str, Array] = {}
    for name, (dtype, shape) in bank_layout(bundle).items():
        feeds[name] = np.zeros((slots + 1, *shape), dtype)
        for slot in range(1, slots + 1):
            feeds[name][slot] = packed[(slot - 1) % len(packed)][name]
    chosen = np.array(ids, np.int32)[:, None]
    return feeds | {contract.ADAPTER_IDS: chosen, contract.ADAPTER_SCALES: np.ones(chosen.shape, np.float32)}


# --- turns -----------------------------------------------------------------------------------------------------------


def turns(calls: Mapping[str, Call], rounds: int, *, long: bool = False) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of one call of each, round by round; each round begins with another.

    Each is called once right before, so that it finds its caches warm, and there is a round that does not count; not
    so where a call is `long`.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(int(long), rounds + 1):
        ways = [*calls.items()]
        for name, call in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            if not long:
                call()
            wall, processor = time.perf_counter(), time.process_time()
            call()
            if turn:
                times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return times


def figure(
    title: str, calls: Mapping[str, Call], under: str, rounds: int, bounds: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """One row for each call but `under`: its ratio to that one, by both clocks."""
    if len(calls) < 2:
        return
    times = turns(calls, rounds)
    base = times[under]
    for name in (name for name in calls if name != under):
        row: dict[str, Any] = {"figure": title, "way": name, "over": under, "rounds": rounds}
        for at, clock in enumerate(("wall", "processor")):
            ratios = [a[at] / b[at] for a, b in zip(times[name], base, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row[clock] = {
                "ms": round(1000 * statistics.median(a[at] for a in times[name]), 2),
                "over_ms": round(1000 * statistics.median(b[at] for b in base), 2),
                "ratio": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
            }
        if name in bounds:
            row["bound"] = bounds[name]
            row["met"] = all(row[clock]["ratio"] <= bounds[name] for clock in ("wall", "processor"))
        yield row


def steps(made: Made, rounds: int) -> Iterator[dict[str, Any]]:
    for batch in (1, ROWS):
        for past in PASTS:
            title = f"decode step, batch {batch}, past {past}"
            calls = {"merged graph": graph(made.merged.model_path, batch, past, 1, {})}
            if made.genai is not None:
                calls["GenAI's graph"] = graph(made.genai / "model.onnx", batch, past, 1, {})
                yield from figure(title, calls, "GenAI's graph", rounds, {"merged graph": 1.0})
    kinds = {"float32": (made.merged, made.multi, 1.03), "int4": (made.merged_int4, made.multi_int4, 1.07)}
    for kind, (merged, multi, bound) in kinds.items():
        for past in PASTS:
            mixed = range(1, ROWS + 1)
            with_ = functools.partial(graph, multi.model_path, ROWS, past, 1, operator=True)
            calls = {
                "merged": graph(merged.model_path, ROWS, past, 1, {}),
                "8 adapters mixed": with_(banks(multi, made, mixed, ROWS)),
                "resident, unused": with_(banks(multi, made, [0] * ROWS, ROWS)),
            }
            bounds = {"8 adapters mixed": bound, "resident, unused": 1.01}
            if kind == "float32":
                calls["2000 resident"] = with_(banks(multi, made, mixed, MANY))
            yield from figure(f"adapters over {kind}, batch {ROWS}, past {past}", calls, "merged", rounds, bounds)
            if kind == "float32":
                pair = {
                    "1 resident": with_(banks(multi, made, [1] * ROWS, 1)),
                    "2000 resident": calls["2000 resident"],
                }
                one = with_(banks(multi, made, [1] * ROWS, MANY))
                pair = {"1 resident": pair["1 resident"], "2000 resident": one}
                title = f"one adapter used, batch {ROWS}, past {past}"
                yield from figure(title, pair, "1 resident", rounds, {"2000 resident": 1.02})


def prefill(made: Made, rounds: int) -> Iterator[dict[str, Any]]:
    if made.genai is None:
        return
    calls = {
        "GenAI's graph": graph(made.genai / "model.onnx", 1, 0, 512, {}),
        "merged graph": graph(made.merged.model_path, 1, 0, 512, {}),
    }
    yield from figure("prefill of 512 tokens", calls, "GenAI's graph", rounds, {"merged graph": 0.85})


# --- whole generations -----------------------------------------------------------------------------------------------


def prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in lengths]


def by_genai(model: Any, rows: Sequence[Sequence[int]], count: int, adapter: tuple[Any, str] | None = None) -> Array:
    """Greedy tokens of rows of one length, `count` each."""
    import onnxruntime_genai as og

    options = og.GeneratorParams(model)
    length = len(rows[0]) + count
    options.set_search_options(max_length=length, min_length=length, batch_size=len(rows), do_sample=False)
    generator = og.Generator(model, options)
    if adapter is not None:
        generator.set_active_adapter(*adapter)
    generator.append_tokens(np.array(rows, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return np.stack([np.array(generator.get_sequence(i))[len(rows[0]) :] for i in range(len(rows))])


def generations(made: Made, rounds: int) -> Iterator[dict[str, Any]]:
    if made.genai is None:
        return
    import onnxruntime_genai as og

    theirs = og.Model(str(made.genai))
    with quiet_model(made.merged) as ours:
        for batch in (1, ROWS):
            rows = prompts([64] * batch, seed=1)
            calls: dict[str, Call] = {
                "og.Generator": functools.partial(by_genai, theirs, rows, 64),
                "generate": lambda rows=rows: ours.generate(rows, max_new_tokens=64, stop_tokens=[]),
            }
            title = f"generate 64 after 64, batch {batch}"
            yield from figure(title, calls, "og.Generator", rounds, {"generate": 1.0})


@contextlib.contextmanager
def quiet_model(bundle: Bundle) -> Iterator[MultiAdapterModel]:
    """The bundle in a session whose waiting threads sleep, as GenAI's is told to."""
    made = onnxruntime.SessionOptions

    def options() -> Any:
        found = made()
        found.add_session_config_entry(QUIET, "0")
        return found

    onnxruntime.SessionOptions = options
    try:
        model = MultiAdapterModel(bundle, threads=THREADS)
    finally:
        onnxruntime.SessionOptions = made
    with model:
        yield model


def jobs(made: Made, rounds: int) -> Iterator[dict[str, Any]]:
    """Tokens a second; a ratio above 1 says that the batcher is faster."""
    rng = np.random.default_rng(5)
    names = [*made.adapters, None]
    work = [
        (prompts([int(rng.integers(16, 129))], seed=i)[0], names[i % len(names)], int(rng.integers(8, 65)))
        for i in range(64)
    ]
    count = sum(new for _, _, new in work)
    longest = max(len(prompt) + new for prompt, _, new in work)
    with quiet_model(made.multi) as model:

        def continuous() -> None:
            with model.batcher(slots=ROWS, max_length=longest) as batcher:
                for prompt, adapter, new in work:
                    batcher.submit(prompt, adapter, max_new_tokens=new)
                while batcher.busy:
                    batcher.step()

        def together() -> None:
            for start in range(0, len(work), ROWS):
                rows, adapters, new = zip(*work[start : start + ROWS], strict=True)
                model.generate(rows, list(adapters), max_new_tokens=max(new), stop_tokens=[])

        def one_by_one() -> None:
            for prompt, adapter, new in work:
                model.generate([prompt], adapter, max_new_tokens=new, stop_tokens=[])

        calls: dict[str, Call] = {"continuous": continuous, "batches of 8": together, "one by one": one_by_one}
        if made.genai is not None:
            import onnxruntime_genai as og

            theirs = og.Model(str(made.genai))
            calls["GenAI grouped"] = functools.partial(_grouped, theirs, work)
        times = turns(calls, min(rounds, 3), long=True)
    bounds = {"batches of 8": 1.2, "one by one": 3.0, "GenAI grouped": 2.2}
    for name, own in times.items():
        row: dict[str, Any] = {"figure": "64 jobs, 9 adapters and the base", "way": "continuous", "over": name}
        row["rounds"] = len(own)
        for at, clock in enumerate(("wall", "processor")):
            ratios = [b[at] / a[at] for a, b in zip(times["continuous"], own, strict=True)]
            row[clock] = {
                "tokens_per_second": round(count / statistics.median(b[at] for b in own), 1),
                "ratio": round(statistics.median(ratios), 3),
            }
        if name in bounds:
            row["bound_at_least"] = bounds[name]
            row["met"] = all(row[clock]["ratio"] >= bounds[name] for clock in ("wall", "processor"))
        yield row


def _grouped(model: Any, work: Sequence[tuple[list[int], str | None, int]]) -> None:
    """The jobs of each adapter in batches; GenAI wants one length a batch: shorter prompts are padded on the left."""
    for name in dict.fromkeys(adapter for _, adapter, _ in work):
        own = [job for job in work if job[1] == name]
        for start in range(0, len(own), ROWS):
            group = own[start : start + ROWS]
            longest = max(len(prompt) for prompt, _, _ in group)
            rows = [[0] * (longest - len(prompt)) + prompt for prompt, _, _ in group]
            by_genai(model, rows, max(new for _, _, new in group))


def peft(made: Made, rounds: int) -> Iterator[dict[str, Any]]:
    """Reported beside: what 8 LoRAs (r = 16, query and value) mixed in a batch cost PEFT, in torch."""
    from peft import LoraConfig, get_peft_model

    names = [f"a{i}" for i in range(ROWS)]
    config = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = get_peft_model(llama(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    rows = torch.tensor(prompts([64] * ROWS, seed=1))
    torch.set_num_threads(THREADS)

    def generate(model: Any, **options: Any) -> None:
        with torch.no_grad():
            model.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=32,
                min_new_tokens=32, pad_token_id=0, **options,
            )  # fmt: skip

    calls: dict[str, Call] = {
        "base": functools.partial(generate, made.model),
        "adapter_names": functools.partial(generate, model, adapter_names=names),
    }
    yield from figure("PEFT, 32 tokens after 64, batch 8", calls, "base", min(rounds, 5), {})


_MEMORY = """
import sys
from pathlib import Path
from sdct_export.runtime import MultiAdapterModel
with MultiAdapterModel(sys.argv[1], threads=2) as model:
    with model.batcher(slots=8, max_length=1024) as batcher:
        for start in range(3, 11):
            batcher.submit([start] * 64, max_new_tokens=16)
        while batcher.busy:
            batcher.step()
        assert "torch" not in sys.modules
        lines = Path("/proc/self/status").read_text().splitlines()  # getrusage counts what its parent had, too
        print(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")), batcher.cache_bytes)
"""


def memory(made: Made, rounds: int) -> Iterator[dict[str, Any]]:
    """The most memory that a process took to load the bundle and to generate with 8 slots of 1024 tokens."""
    del rounds
    for kind, bundle in (("merged", made.merged), ("multi", made.multi)):
        found = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(bundle.path)], check=True, capture_output=True, text=True
        )
        most, cache = map(int, found.stdout.split())
        weights = sum(file.stat().st_size for file in bundle.path.glob("model.onnx*"))
        limit = weights + (150 << 20) + cache
        yield {
            "figure": "memory without torch",
            "way": kind,
            "MiB": most >> 20,
            "weights_MiB": weights >> 20,
            "cache_MiB": cache >> 20,
            "bound_MiB": limit >> 20,
            "met": most <= limit,
        }


FIGURES: dict[str, Callable[[Made, int], Iterator[dict[str, Any]]]] = {
    "step": steps, "prefill": prefill, "generate": generations, "jobs": jobs, "peft": peft, "memory": memory,
}  # fmt: skip


def line(row: Mapping[str, Any]) -> str:
    """A row of the report for people."""
    text = f"{row['figure']:44} {row['way']:18}"
    if "MiB" in row:
        return text + f" {row['MiB']} MiB, bound {row['bound_MiB']}"
    text += f" over {row['over']:14}"
    for clock in ("wall", "processor"):
        own = row[clock]
        value = f"{own['ms']:.1f} ms" if "ms" in own else f"{own['tokens_per_second']:.0f} tokens/s of the other"
        text += f" {own['ratio']:.3f} {clock} ({value})"
    for name in ("bound", "bound_at_least"):
        if name in row:
            text += f", {name.replace('_', ' ')} {row[name]}: {'met' if row['met'] else 'missed'}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each pair")
    parser.add_argument("--only", default=",".join(FIGURES), help=f"some of {','.join(FIGURES)}")
    arguments = parser.parse_args()
    if native.operator_library() is None:
        print("no operator library: build it (see CMakeLists.txt) and set SDCT_LIBRARY_PATH to its folder")
        return
    where = machine()
    print(f"a LLaMA of 125 million parameters, query and value adapted, n = {N}")
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="decoding.") as folder:
        made = Made(Path(folder))
        if made.genai is None:
            print("onnxruntime-genai is not installed, so it is not compared")
        else:
            import onnxruntime_genai

            where["onnxruntime-genai"] = onnxruntime_genai.__version__
        for name in arguments.only.split(","):
            for row in FIGURES[name](made, arguments.rounds):
                results.append(row)
                print(line(row), flush=True)
    if arguments.json:
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        head = {"date": date, "machine": where, "n": N, "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps(head | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
