"""A graph that another tool made, with adapters put on it: found by the base's weights, and compared with torch."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from . import native
from .adapter.adapter import SdctAdapter
from .base.reference import run_model, run_rows, sample_inputs
from .bundle.description import Bundle
from .bundle.recording import record_probe
from .contract import ATTENTION_MASK, BATCH, INPUT_IDS, MARGIN, POSITION_IDS, Cache, Foreign
from .errors import UnsupportedError, VerificationError, an
from .export import AdapterLike, Prepared, prepare_multi, ship_adapters, write_bundle, write_onnx_adapters
from .files import copy_inside, new_folder
from .foreign.file import read_graph
from .foreign.place import place_sites
from .foreign.seen import Seen, see
from .foreign.weights import opaque_operators
from .graph.cache import layer_windows
from .graph.insert import InsertAdapters
from .graph.trace import SEQUENCE
from .runtime import MultiAdapterModel
from .verify import TOLERANCES, verify

GENAI_CONFIG = "genai_config.json"  # beside a graph of ONNX Runtime GenAI's builder
_LISTED = 4  # modules in a message
_STEPS = 4  # tokens that each row of the comparison with torch is continued by
_INPUTS = (INPUT_IDS, ATTENTION_MASK, "token_type_ids", "pixel_values")


def export_onnx(
    onnx: str | Path,
    model: str | Path | nn.Module,
    adapters: Mapping[str, AdapterLike] | Sequence[AdapterLike] | None,
    output: str | Path,
    *,
    task_type: str | None = None,
    model_class: str | None = None,
) -> Bundle:
    """Write a bundle like `export_multi`'s around a graph that another tool exported from the same base.

    Each layer that an adapter changes is found by its weight, whatever it is called and however it is stored: as it
    is, transposed, packed with others, rounded to 16 bits, quantized by rounding to 8 or 4. Nothing else of the graph
    changes. The result is compared with torch before it is moved to `output`: base, adapters, mixed and blended rows,
    and of a language model with a cache some tokens of rows of different lengths.

    Args:
        onnx: the ONNX file; data files beside it are read, too.
        model: the base it was exported from, as for `export_multi`.
        adapters: as for `export_multi`.
        output: the new folder. A `genai_config.json` beside `onnx` comes along.
        task_type: as for `export_multi`.
        model_class: as for `export_multi`.

    Raises:
        ConfigError: as `export_multi`.
        AdapterFormatError, BaseMismatchError: an adapter is damaged, or does not fit the base; or `onnx` is damaged.
        UnsupportedError: a layer is not in the graph with the base's weight; or the graph takes or gives what no
            bundle has. Names all of it.
        VerificationError: with adapters the graph computes something else than torch.
        OutputError: `output` exists, or cannot be written.
    """
    native.onnxruntime()
    prepared = prepare_multi(model, adapters, task_type, model_class)
    base = prepared.base
    if base.tail is not None:  # adapters are about the model alone, and so are graphs of it
        base = dataclasses.replace(base, tail=None)
        prepared = dataclasses.replace(prepared, base=base)
    graph = read_graph(onnx)
    cache = _check_ends(graph.graph, base.model, base.task)
    most = None if cache is None else _most_tokens(graph.graph, base.model)
    found = see(graph.graph, base.model)
    modules = [*base.shapes, *(head for head in prepared.heads if head not in base.shapes)]
    _refuse_missing(graph, found, modules)
    if found.altered:
        raise UnsupportedError(
            f"the graph has {_some(found.altered)} with other numbers than this base; use the base that it was "
            "exported from"
        )
    with new_folder(output) as folder:
        own_inputs = len(graph.graph.inputs)
        insertion = InsertAdapters(
            base.shapes, prepared.capacity, prepared.heads, lambda g, wanted: place_sites(g, found.match, wanted)
        )
        insertion(graph)
        dtype = _dtype(found, modules)
        write_bundle(
            folder, "multi", base, dtype, graph, own_inputs, cache, insertion.groups, insertion.heads,
            ship_adapters(folder, prepared), None, Foreign(_producer(graph)), most,
        )  # fmt: skip
        beside = Path(onnx).with_name(GENAI_CONFIG)
        if beside.is_file():
            copy_inside(beside.parent, beside, folder / GENAI_CONFIG)
        record_probe(base.model.float(), prepared.named, folder, found)
        write_onnx_adapters(folder, prepared.named)
        _compare(folder, prepared, found)
    if found.uncompared:
        warnings.warn(
            f"{len(found.uncompared)} tensors of the base are not in the graph as they are "
            f"({_some(found.uncompared)}); they could only be compared by what the graph computes for a few rows: "
            "make sure that it was exported from this base",
            stacklevel=2,
        )
    return Bundle.load(output)


def _check_ends(graph: ir.Graph, model: nn.Module, task: str) -> Cache | None:
    """Refuse inputs and outputs that no bundle has; the cache of a language model's graph that has one."""
    cache = _cache(graph, model) if task == "CAUSAL_LM" else None
    pasts = () if cache is None else cache.pasts
    presents = () if cache is None else cache.presents
    sample = sample_inputs(model, batch=2, sequence=4)
    known = {*sample, *pasts, *([POSITION_IDS] if cache is not None else [])}
    other = [value.name for value in graph.inputs if value.name not in known or value.name in graph.initializers]
    if other:
        raise UnsupportedError(
            f"the graph takes {_some(map(str, other))}, which the runtime cannot give; it gives {', '.join(_INPUTS)}, "
            f"and of a language model {POSITION_IDS}, past_key_values.<i>.key and .value: export it with these"
        )
    given = run_model(model, sample)
    other = [str(value.name) for value in graph.outputs if value.name not in {*given, *presents}]
    if other or not any(value.name in given for value in graph.outputs):
        raise UnsupportedError(
            f"the graph gives {_some(str(value.name) for value in graph.outputs)}; {an(type(model).__name__)} gives "
            f"{', '.join(given)}, and nothing else can be compared: export it with outputs of these names"
        )
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype is None or value.shape is None:
            raise UnsupportedError(f"the graph does not say type and shape of {value.name!r}; infer them first")
        if not isinstance(value.shape[0], ir.SymbolicDim):
            raise UnsupportedError(
                f"{value.name!r} has a batch of {value.shape[0]} in the graph; export it with a dynamic batch"
            )
        shape = list(value.shape)
        shape[0] = ir.SymbolicDim(BATCH)
        if value.name in (*pasts, *presents):
            assert cache is not None
            shape[1], shape[3] = cache.kv_heads, cache.head_size
        for axis, extent in enumerate(shape):
            if isinstance(extent, ir.SymbolicDim) and extent.value is None:
                shape[axis] = ir.SymbolicDim(f"{value.name}.{axis}")
        if value.name in given and isinstance(
            shape[-1], ir.SymbolicDim
        ):  # of what is computed from the base's weights
            shape[-1] = given[str(value.name)].shape[-1]
        if value.name in sample and len(shape) == 2:
            total = value.name == ATTENTION_MASK and cache is not None
            shape[1] = ir.SymbolicDim("total" if total else SEQUENCE)
        value.shape = ir.Shape(shape)
    return cache


def _cache(graph: ir.Graph, model: nn.Module) -> Cache | None:
    """What inputs and outputs of the graph are the key-value cache of `model`; None where it has none."""
    inputs = {str(value.name): value for value in graph.inputs}
    if not any(name.startswith("past_key_values.") for name in inputs):
        return None
    tunable: Any = model
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        held = tunable(input_ids=ids, use_cache=True).past_key_values
    sizes = {(layer.keys.shape[1], layer.keys.shape[3]) for layer in held.layers}
    if len(sizes) > 1:
        raise UnsupportedError("the layers of the base have keys of different sizes, which the runtime cannot hold")
    ((heads, size),) = sizes
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    windows = {a.as_int() for node in attention if (a := node.attributes.get("local_window_size")) is not None}
    if any(a.as_int() for node in attention if (a := node.attributes.get("sliding_window_cache")) is not None):
        raise UnsupportedError(
            "the key-value cache of the graph's sliding windows is shorter than a row, which the runtime cannot hold; "
            "export one of full length (GenAI's builder: --extra_options windowed_kv_cache=false)"
        )
    cache = Cache(
        "ort" if attention else "standard", len(held.layers), heads, size, "float32",
        tuple(sorted(window for window in windows if window > 0)), True, POSITION_IDS in inputs,
    )  # fmt: skip
    outputs = {str(value.name): value for value in graph.outputs}
    lacking = [n for n in (*cache.pasts, INPUT_IDS, ATTENTION_MASK) if n not in inputs]
    lacking += [n for n in (*cache.presents, "logits") if n not in outputs]
    if lacking:
        raise UnsupportedError(
            f"the graph has a key-value cache, but no {_some(lacking)}; export it with past_key_values.<i>.key and "
            f".value in, present.<i>.key and .value out, for {cache.layers} layers"
        )
    ends = [inputs[name] for name in cache.pasts] + [outputs[name] for name in cache.presents]
    types = {value.dtype.numpy().name if value.dtype is not None else "no type" for value in ends}
    if len(types) > 1 or not types <= {"float32", "float16", "bfloat16"}:
        raise UnsupportedError(f"the key-value cache of the graph is {' and '.join(sorted(types))}; it must be float")
    for value in ends:
        shape = [] if value.shape is None else list(value.shape)
        wanted = (None, heads, None, size)
        if len(shape) != 4 or any(isinstance(e, int) and e != w for e, w in zip(shape, wanted, strict=True)):
            raise UnsupportedError(
                f"{value.name!r} is [{', '.join(map(str, shape))}] in the graph; the runtime holds [batch, {heads}, "
                f"past, {size}]"
            )
    wrong = [
        n for n in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS) if n in inputs and inputs[n].dtype != ir.DataType.INT64
    ]
    if wrong:
        raise UnsupportedError(f"the graph takes {wrong[0]!r} in another type than int64; export it with that type")
    return dataclasses.replace(cache, dtype=types.pop())


def _most_tokens(graph: ir.Graph, model: nn.Module) -> int | None:
    """How many tokens a row may have for what `_compare` has seen to hold for it: None for any number.

    As many as its rotary tables have; and where the windows of its layers are not those of the base, or cannot be
    read, as many as every window holds, within which none of them says anything. Warns of that.
    """
    places = {"GroupQueryAttention": 7, "RotaryEmbedding": 2}  # of the table of cosines
    limits = []
    for node in graph:
        place = places.get(node.op_type)
        table = node.inputs[place] if place is not None and len(node.inputs) > place else None
        rows = None if table is None or table.shape is None or not len(table.shape) else table.shape[0]
        if isinstance(rows, int):
            limits.append(rows)
    try:
        wanted = layer_windows(model)
    except UnsupportedError:  # it keeps its masks to itself; its configuration may tell
        config: Any = getattr(model, "config", None)
        window = getattr(config, "sliding_window", None)
        wanted = [window] if isinstance(window, int) else []
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    found = [a.as_int() if (a := n.attributes.get("local_window_size")) is not None else -1 for n in attention]
    has: list[int | None] = [window if window > 0 else None for window in found]
    windows = [window for window in (*wanted, *has) if window is not None]
    if windows and has != wanted:
        warnings.warn(
            f"the sliding windows of the base ({_windows(wanted)} tokens) are not those of the graph "
            f"({_windows(has) if attention else 'which cannot be read'}), so the bundle takes rows of at most "
            f"{min(windows)} tokens; export the graph with the base's windows for more",
            stacklevel=3,
        )
        limits.append(min(windows))
    return min(limits, default=None)


def _windows(windows: Iterable[int | None]) -> str:
    return ", ".join(sorted({"all" if window is None else str(window) for window in windows})) or "no"


def _refuse_missing(graph: ir.Model, found: Seen, modules: Sequence[str]) -> None:
    missing = {module: found.match.missing[module] for module in modules if module in found.match.missing}
    if not missing:
        return
    listed = "; ".join(f"{module!r}: {why}" for module, why in list(missing.items())[:_LISTED])
    opaque = opaque_operators(graph)
    raise UnsupportedError(
        f"{len(missing)} of {len(modules)} layers that the adapters change are not in the graph with the base's "
        f"weights ({listed}{'; ...' if len(missing) > _LISTED else ''}). Use the base that the graph was exported from"
        + (
            f", and no operators whose weights are not looked into (the graph has {', '.join(opaque)})"
            if opaque
            else "; GPTQ and AWQ change weights beyond rounding"
        )
    )


def _dtype(found: Seen, modules: Sequence[str]) -> str:
    """The type in which the graph computes the layers `modules`."""
    types = {piece.product.weight.dtype for module in modules for piece in found.match.pieces[module]}
    if len(types) > 1 or not types <= {"float32", "float16", "bfloat16"}:
        raise UnsupportedError(f"the graph computes the adapted layers in {' and '.join(sorted(types))}; use one type")
    return types.pop()


def _producer(graph: ir.Model) -> str:
    name = " ".join(part for part in (graph.producer_name, graph.producer_version) if part)
    return "".join(c for c in name if c.isprintable())[:100]


def _compare(folder: Path, prepared: Prepared, found: Seen) -> None:
    """Raise `VerificationError` unless the bundle in `folder` computes what torch does."""
    report = verify(folder)
    failed = [check for check in report.checks if not check.ok]
    if failed:
        first = failed[0]
        raise VerificationError(
            f"with adapters the graph computes something else than torch ({first.name}: {first.detail}"
            + (
                f", off by {first.error:.1e}, limit {first.limit:.0e}"
                if first.error is not None and first.limit
                else ""
            )
            + "); its layers have the base's weights, so something between them is another one: another base, "
            "configuration or order of inputs"
        )
    described = Bundle.load(folder)
    if described.cache is not None:
        _compare_steps(described, prepared.base.model, prepared.named, found)


def _compare_steps(described: Bundle, model: nn.Module, named: Mapping[str, SdctAdapter], found: Seen) -> None:
    """Continue rows of different lengths, and compare the probability of every new token with torch's."""
    name = next(iter(named))
    rows: list[tuple[tuple[str, float], ...]] = [(), ((name, 1.0),), (), ((name, 0.5),)]
    ids = sample_inputs(model, batch=4, sequence=9, seed=4)[INPUT_IDS].numpy()
    longest = min(9, (described.max_tokens or 9 + _STEPS) - _STEPS)
    prompts = [ids[i, : max(1, longest - 2 * i)] for i in range(4)]
    with MultiAdapterModel(described) as runner:
        made = runner.generate(
            [p.tolist() for p in prompts], [dict(row) for row in rows], max_new_tokens=_STEPS, temperature=0.0,
            repetition_penalty=1.0, stop_tokens=[], logprobs=True,
        )  # fmt: skip
    worst = 0.0
    for prompt, row, one in zip(prompts, rows, made, strict=True):
        tokens = torch.tensor([[*prompt.tolist(), *one.tokens]])
        logits = run_rows(model, {INPUT_IDS: tokens}, [row], named)["logits"][0, len(prompt) - 1 : -1].double()
        scale = max(1.0, float(logits.abs().max()))
        want = torch.log_softmax(logits, -1)[torch.arange(_STEPS), tokens[0, len(prompt) :]]
        worst = max(worst, float((torch.tensor(one.logprobs, dtype=torch.float64) - want).abs().max()) / scale)
    loss = 0.0 if described.foreign is None else described.foreign.rounding
    limit = 2 * (TOLERANCES[described.dtype] + MARGIN * loss)
    if not worst <= limit:
        raise VerificationError(
            f"with its key-value cache the graph computes something else than torch (off by {worst:.1e}, limit "
            f"{limit:.0e}) for rows of different lengths that are continued; export a graph that counts positions by "
            f"its attention_mask or takes {POSITION_IDS}"
        )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_LISTED]) + (", ..." if len(listed) > _LISTED else "")
