"""Does an exported bundle compute what torch computes? What `sdct-export verify` compares, and the tolerances.

Without the base model the bundle is compared with what torch computed at export (`probe`); with it, also with torch
now. torch is imported only in the second case.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .adapter.adapter import SdctAdapter
from .adapter.entries import Array
from .adapter.folder import read_training
from .bundle.description import DATA_FILE, PROBE_FILE, Bundle, file_sha256, training_sha256
from .bundle.probe import Probe, Row, difference, label_padding, without_padding
from .contract import MARGIN
from .errors import BaseMismatchError, SdctError
from .runtime import MultiAdapterModel

if TYPE_CHECKING:
    from torch import nn

# largest `difference` from torch's float32 result on the weights as exported, by the dtype of the bundle
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
ROWS = 8  # batch rows of one comparison with torch


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: whether it holds, what was found, and where it measures a `difference`, that and its limit."""

    name: str
    ok: bool
    detail: str
    error: float | None = None
    limit: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """All checks of one bundle, in order."""

    bundle: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)


def verify(
    bundle: str | Path,
    model: str | Path | nn.Module | None = None,
    *,
    model_class: str | None = None,
    device: str = "cpu",
) -> Report:
    """Check an exported bundle.

    Always: the files have their recorded hashes; the outputs equal those torch gave at export, for base rows, each
    probed adapter, a mixed batch and a blend, and those that each adapter's model gave when it was saved after its
    training; base rows of a mixed batch equal a run without adapters bit for bit; every adapter changes the output.
    With `model`, the base it was exported from: its weights have the recorded hash, and every adapter, blends and base
    rows equal what torch computes now, on other inputs. What adapters recorded in training is compared with the
    transformer of a SentenceTransformer then, since a bundle gives only what follows it.

    Args:
        bundle: the exported folder.
        model: checkpoint folder of the base, or the torch model or `SdctModel` itself (left as it is).
        model_class: `MODULE:CLASS` of a checkpoint, needed where it was exported from a class of one's own.
        device: where the bundle runs, see `MultiAdapterModel`.

    Raises:
        AdapterFormatError: the folder is no bundle. BaseMismatchError: `model` cannot be loaded for the bundle's task.
        UnsupportedError: the device is not available.
    """
    described = Bundle.load(bundle)
    checks = list(_files(described))
    if all(check.ok for check in checks):  # numbers of changed files would say nothing more
        checks += _numbers(described, model, model_class, device)
    return Report(str(bundle), tuple(checks))


def _files(bundle: Bundle) -> Iterator[Check]:
    recorded = {bundle.model_path: bundle.model_sha256}
    if bundle.data_sha256 is not None:
        recorded[bundle.path / DATA_FILE] = bundle.data_sha256
    for path, sha256 in recorded.items():
        try:
            same = file_sha256(path) == sha256
            detail = (
                "sha256 as recorded" if same else "differs from what was exported (sha256); export the bundle again"
            )
            yield Check(f"file {path.name}", same, detail)
        except SdctError as error:
            yield Check(f"file {path.name}", False, str(error))
    if bundle.training_sha256 is not None:
        same = training_sha256(bundle.path) == bundle.training_sha256
        detail = "sha256 as recorded" if same else "missing or changed since the export (sha256); export it again"
        yield Check("training record", same, detail)
    for name in bundle.adapters:
        try:
            bundle.check_adapter(name)
            yield Check(f"files of adapter {name}", True, "sha256 as recorded")
        except SdctError as error:
            yield Check(f"files of adapter {name}", False, str(error))


def _numbers(
    bundle: Bundle, model: str | Path | nn.Module | None, model_class: str | None, device: str
) -> Iterator[Check]:
    try:
        probe = Probe.read(bundle.path / PROBE_FILE)
        runner = MultiAdapterModel(bundle, device=device)
        yield from _against_probe(bundle, runner, probe)
        yield from _against_training(bundle, runner)
        if bundle.kind == "multi":
            yield from _effects(bundle, runner, probe)
    except SdctError as error:
        yield Check("run", False, str(error))
        return
    if model is not None:
        yield from _against_torch(bundle, runner, model, model_class)


def _run(runner: MultiAdapterModel, inputs: Mapping[str, Array], rows: Sequence[Row]) -> dict[str, Array]:
    selections = None
    if runner.bundle.kind == "multi":  # the probe of a bundle with one adapter blends it with itself
        selections = [{n: sum(scale for other, scale in row if other == n) for n, _ in row} for row in rows]
    return _compared(runner.bundle, inputs, runner.run(inputs, selections))


def _compared(bundle: Bundle, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
    """What is compared of the outputs: all, but with a key-value cache nothing at padding."""
    return dict(outputs) if bundle.cache is None else without_padding(inputs, outputs)


def _measured(bundle: Bundle, name: str, error: float, what: str, rounding: float = 0.0) -> Check:
    """`error` against the limit of the bundle's type.

    Recorded outputs and torch have the weights that the products of a quantized or foreign bundle see. What is left
    between them is that it rounds what it multiplies, too: how far this moves the outputs in torch was recorded at
    export, or is `rounding` on other inputs; the limit is larger by `MARGIN` times that.
    """
    if bundle.loss is not None:
        rounding = max(rounding, bundle.loss.rounding)
    limit = TOLERANCES[bundle.dtype] + MARGIN * rounding
    return Check(name, error <= limit, what, error, limit)


def _worst(got: Mapping[str, Array], want: Mapping[str, Array], padding: float) -> float:
    """Largest `difference` of the outputs, infinite where their names differ."""
    if got.keys() != want.keys():
        return float("inf")
    return max(difference(got[name], want[name], padding=padding) for name in want)


def _against_probe(bundle: Bundle, runner: MultiAdapterModel, probe: Probe) -> Iterator[Check]:
    padding = label_padding(bundle)
    if not probe.cases:
        yield Check("recorded", False, f"{PROBE_FILE} holds no case; export the bundle again")
    for case in probe.cases:
        outputs = _run(runner, probe.inputs, case.rows)
        try:
            got = {name: probe.sample(name, array) for name, array in outputs.items()}
        except (KeyError, ValueError) as problem:
            yield Check(f"recorded {case.name}", False, f"{PROBE_FILE} is of another model: {problem}")
        else:
            error = _worst(got, case.outputs, padding)
            yield _measured(bundle, f"recorded {case.name}", error, "against torch at export")


def _against_training(bundle: Bundle, runner: MultiAdapterModel) -> Iterator[Check]:
    """What each adapter's model gave when it was saved after training, against what the bundle gives."""
    merged = bundle.kind == "merged"
    folders = {"": bundle.path} if merged else {name: bundle.adapter_path(name) for name in bundle.adapters}
    for name, folder in folders.items():
        check = f"trained {name}".strip()
        record = read_training(folder)
        if record is None or record.probe is None:
            continue  # projected from weights, or saved by an older version
        if bundle.pooling:  # what was recorded lies below the pooling: not among the outputs
            same = record.model_class.rpartition(":")[2] == bundle.base_architecture
            detail = f"{record.model_class}, the outputs of which were compared at export, below the pooling"
            wrong = f"trained on {record.model_class}, this is a {bundle.base_architecture}"
            yield Check(check, same, detail if same else wrong)
            continue
        inputs = {
            spec.name: record.probe.inputs[spec.name] for spec in bundle.inputs if spec.name in record.probe.inputs
        }
        error = bundle.comparable(record.probe).difference(runner.run(inputs, None if merged else name))
        limit = bundle.training_limit(record.probe.dtype)
        yield Check(check, error <= limit, f"against the model as trained, {record.model_class}", error, limit)


def _effects(bundle: Bundle, runner: MultiAdapterModel, probe: Probe) -> Iterator[Check]:
    """Base rows keep every bit beside rows with adapters, and every adapter changes its row."""
    inputs = {name: np.resize(array, (ROWS, *array.shape[1:])) for name, array in probe.inputs.items()}
    base = runner.run(inputs)
    names = list(bundle.adapters)
    exact = True
    for start in range(0, len(names), ROWS - 1):
        chosen = names[start : start + ROWS - 1]
        first = ROWS - len(chosen)
        outputs = runner.run(inputs, [*[None] * first, *chosen])
        same = [all(np.array_equal(outputs[name][i], base[name][i]) for name in base) for i in range(ROWS)]
        exact &= all(same[:first])
        for name, unchanged in zip(chosen, same[first:], strict=True):
            detail = "has no effect on the output" if unchanged else "changes the output"
            yield Check(f"effect of {name}", not unchanged, detail)
    detail = "bit for bit as without adapters" if exact else "change when other rows have adapters"
    yield Check("base rows", exact, detail)


def _against_torch(
    bundle: Bundle, runner: MultiAdapterModel, source: str | Path | nn.Module, model_class: str | None
) -> Iterator[Check]:
    import torch

    from .base.model import to_numpy
    from .base.reference import run_rows, sample_inputs
    from .foreign.file import read_graph
    from .foreign.seen import Seen, see
    from .graph.quantization import QuantizedLayers

    adapters = {name: SdctAdapter.load(bundle.adapter_path(name)) for name in bundle.adapters}
    base = bundle_base(bundle, source, model_class, adapters)
    if not has_recorded_weights(bundle, base):
        yield Check("base model", False, "has other weights than the base this bundle was exported from")
        return
    other = another_weight(bundle, base, adapters)
    if other is not None:
        yield Check("base model", False, f"has another {other!r} than the base this bundle was exported from")
        return
    whole = bundle.base_hash_dtype in bundle.weights  # a bundle that an older version wrote knows its layers alone
    yield Check("base model", True, f"weights{'' if whole else ' of the adapted layers'} as recorded")
    if bundle.pooling:
        yield from _below_pooling(bundle, base, source, adapters)
    sight: Seen | QuantizedLayers | None = None
    if bundle.foreign is not None:
        sight = see(read_graph(bundle.model_path).graph, base)
        missing = sight.match.missing
        lost = [module for group in bundle.groups for module in group.modules if module in missing]
        detail = "those of the base"
        if sight.uncompared:
            detail += f", but {len(sight.uncompared)} that are not there as they are ({sight.uncompared[0]})"
        if sight.altered:
            detail = f"{sight.altered[0]!r} has other numbers than the base"
        if lost:
            detail = f"{lost[0]!r} is another one: {missing[lost[0]]}"
        wrong = bool(lost or sight.altered)
        yield Check("weights of the graph", not wrong, detail)
        if wrong:
            return
    elif bundle.quantization is not None:
        sight = QuantizedLayers(bundle.quantization)
    base = base.to(getattr(torch, bundle.dtype)).float()
    if sight is not None:
        sight.apply(base, bundle.dtype)
    tensors = sample_inputs(base, batch=ROWS, sequence=11, seed=2)
    inputs = {name: to_numpy(tensor) for name, tensor in tensors.items()}
    padding = label_padding(bundle)
    errors: dict[str, float] = {}
    rounding = 0.0
    for rows in _plans(list(adapters)):
        got = _run(runner, inputs, rows)
        computed = run_rows(base, tensors, rows, adapters)
        want = _compared(bundle, inputs, {name: to_numpy(computed[name]) for name in got if name in computed})
        if sight is not None:
            with sight.rounding(base):
                computed = run_rows(base, tensors, rows, adapters)
            rounded = _compared(bundle, inputs, {name: to_numpy(computed[name]) for name in want})
            pairs = [(rounded[name], array) for name, array in want.items()]
            seen = (difference(a[i], b[i], padding=padding) for a, b in pairs for i in range(ROWS))
            rounding = max(rounding, *seen)
        for i, row in enumerate(rows):
            error = _worst({n: a[i] for n, a in got.items()}, {n: a[i] for n, a in want.items()}, padding)
            label = " + ".join(name if scale == 1 else f"{scale:g} {name}" for name, scale in row) or "base"
            errors[label] = max(error, errors.get(label, 0.0))
    if bundle.kind == "merged":  # its adapter is not at hand; that it does something is
        least = TOLERANCES[bundle.dtype] / 10 + rounding  # by which the base's own bundle would differ, too
        changed = least < errors["base"] < float("inf")  # infinite where shapes differ
        yield Check("effect of merging", changed, f"differs from the base by {errors['base']:.1e}", errors["base"])
        return
    for label, error in errors.items():
        yield _measured(bundle, f"torch {label}", error, "against torch now, beside other rows", rounding)


def _below_pooling(
    bundle: Bundle, base: nn.Module, source: str | Path | nn.Module, adapters: Mapping[str, SdctAdapter]
) -> Iterator[Check]:
    """Compare what was recorded in training, of the transformer alone; then put the pooling behind `base`."""
    from .base.sentence import add_tail, load_tail
    from .base.training import check_record

    for name, adapter in adapters.items():
        if adapter.trained_on is None or adapter.trained_on.probe is None:
            continue
        try:
            check_record(adapter, base)
        except BaseMismatchError as error:
            yield Check(f"trained {name} below pooling", False, str(error))
        else:
            yield Check(f"trained {name} below pooling", True, "torch now against the model as trained")
    tail = load_tail(source, base) if isinstance(source, str | Path) else None
    if tail is None:
        raise BaseMismatchError(
            f"the bundle has the pooling of a SentenceTransformer ({', '.join(bundle.pooling)}), this base has none; "
            "pass the SentenceTransformer's folder"
        )
    yield Check("pooling", tail.described == bundle.pooling, f"the base has {', '.join(tail.described)}")
    add_tail(base, tail)


def _plans(names: list[str]) -> Iterator[list[Row]]:
    """Batches of `ROWS` rows: base rows with every adapter once beside them, then blends."""
    yield [()] * ROWS
    for start in range(0, len(names), ROWS - 1):
        rows: list[Row] = [((name, 1.0),) for name in names[start : start + ROWS - 1]]
        yield [()] * (ROWS - len(rows)) + rows
    if len(names) > 1:
        first, last = names[0], names[-1]
        yield [((first, 0.5), (last, 0.5)), ((last, -0.25), (first, 1.5)), *[()] * (ROWS - 2)]


def bundle_base(
    bundle: Bundle, source: str | Path | nn.Module, model_class: str | None, adapters: Mapping[str, SdctAdapter]
) -> nn.Module:
    """A private copy of the base, of the class the bundle was exported from. Raises `BaseMismatchError`."""
    import copy

    from .base.model import load_base
    from .base.sentence import body_folder
    from .base.training import class_of, set_padding
    from .tuning.model import SdctModel

    if isinstance(source, str | Path):
        labels = [spec.shape[-1] for spec in bundle.outputs if spec.name == "logits" and bundle.task != "CAUSAL_LM"]
        size = labels[0] if labels and isinstance(labels[0], int) else None
        merged = read_training(bundle.path) if bundle.kind == "merged" else None
        if merged is not None and model_class is None and merged.model_class.startswith("transformers:"):
            model_class = merged.model_class
        saved = set(merged.fresh_parameters or ()) if merged else {n for a in adapters.values() for n in a.saved}
        base = load_base(
            body_folder(source), bundle.task, num_labels=size, model_class=class_of(adapters, model_class), saved=saved
        )
        set_padding(base, [merged, *(adapter.trained_on for adapter in adapters.values())])
    elif isinstance(source, SdctModel):
        base = source.plain_base().eval()
    else:
        base = copy.deepcopy(source).eval()
    if type(base).__name__ != bundle.base_architecture:
        raise BaseMismatchError(
            f"the bundle was exported from a {bundle.base_architecture}, this base is a {type(base).__name__}; "
            "pass the model the bundle was exported from, or its class (--model-class MODULE:CLASS)"
        )
    return base


def another_weight(bundle: Bundle, base: nn.Module, adapters: Mapping[str, SdctAdapter]) -> str | None:
    """The first tensor of `base` that is not what it was at the export, by its checksum; None where all are.

    Layers that adapters save for themselves are left out: their weights in the base may come from no checkpoint.
    """
    from .base.training import checksums, fresh_parameters

    recorded = bundle.weights.get(bundle.base_hash_dtype, {})
    saved = {
        f"{path}."
        for path in (*(head.module for head in bundle.heads), *(m for a in adapters.values() for m in a.saved))
    }
    fresh = set(fresh_parameters(base) or ())
    for name, (_, total) in (checksums(base, bundle.base_hash_dtype) if recorded else {}).items():
        if name in fresh or any(f"{name}.".startswith(path) for path in saved):
            continue
        if recorded.get(str(zlib.crc32(name.encode())), total) != total:
            return name
    return None


def has_recorded_weights(bundle: Bundle, base: nn.Module) -> bool:
    """Whether the adapted modules of `base` are those that `bundle` was exported from."""
    from .base.model import find_linear, linear_shape, model_hash

    shapes = {m: linear_shape(find_linear(base, m)) or (0, 0) for m in bundle.module_digests[bundle.base_hash_dtype]}
    return model_hash(base, shapes, bundle.base_hash_dtype) == bundle.base_hash
