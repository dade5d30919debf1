"""Distillation: a few coefficients per layer, trained to do what a LoRA does, on texts without labels.

The LoRA model, run by PEFT, is the teacher. The coefficients are chosen and first set by what the LoRA's layers do on
the texts (`weights.fitting`), or by projection where that is nearer, then trained end to end to the teacher's outputs,
the saved modules (a task head) along with them. Some texts are held back, and tell how far the adapter is from the
LoRA model before and after.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter.adapter import SdctAdapter
from ..adapter.config import SdctConfig
from ..adapter.entries import Array, SdctEntries
from ..base.checkpoint import Checkpoint, load_sized, progress_bar
from ..errors import BaseMismatchError, ConfigError, UnsupportedError
from ..files import read_texts
from ..spectral.transform import dct
from ..weights.changes import Change, from_peft
from ..weights.fitting import fit_spectrum
from ..weights.projection import project_change
from .model import SdctModel

MIN_TEXTS = 10
HELD_BACK, MOST_HELD_BACK = 0.1, 500
BATCH, LANGUAGE_BATCH = 32, 4  # a language model's outputs are as wide as its vocabulary
HEAD_RATE = 0.1  # learning rate of saved modules over that of the coefficients
WARMUP, CLIP = 0.06, 1.0
_TASKS = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION")
_KEPT = 1 << 28  # bytes of the teacher's outputs that are kept rather than computed again in every epoch

_Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far a model is from the LoRA model on texts it was not trained on.

    Attributes:
        error: mean KL divergence of its probabilities from the LoRA model's in nats, per text or token; for outputs
            that are no probabilities the squared error over the variance of the LoRA model's outputs.
        agreement: share of texts or tokens for which both find the same label or token most likely; None for outputs
            that are no probabilities.
    """

    error: float
    agreement: float | None


@dataclasses.dataclass(frozen=True)
class DistillationReport:
    """What came of a distillation.

    Attributes:
        measure: what `error` is: `KL divergence` or `squared error`.
        texts: number of texts trained on.
        held_back: number of other texts, on which the distances are measured.
        projected: distance of what `project` makes with as many coefficients.
        start: distance of the coefficients that training starts from.
        distilled: distance of the adapter that came out.
        better: whether it is nearer than the projection.
        saved: parameters stored in full.
        ignored: parameters that the LoRA changes and the adapter cannot; training makes up for what it can.
    """

    measure: str
    texts: int
    held_back: int
    projected: Distance
    start: Distance
    distilled: Distance
    better: bool
    saved: tuple[str, ...]
    ignored: tuple[str, ...]


class Distillation(NamedTuple):
    """The adapter and the report; unpacks as `adapter, report = distill(...)`."""

    adapter: SdctAdapter
    report: DistillationReport


def distill(
    base: str | Path,
    lora: str | Path,
    texts: Sequence[str] | str | Path,
    *,
    n_coefficients: int = 700,
    epochs: int = 2,
    learning_rate: float = 2e-2,
    max_tokens: int = 256,
    seed: int = 0,
    task_type: str | None = None,
    model_class: str | None = None,
    progress: bool | None = None,
) -> Distillation:
    """Train `n_coefficients` per matrix to what a LoRA model gives for `texts`, which need no labels.

    A tenth of the texts (at most 500) is held back to measure by. The result depends on nothing but the arguments on
    one machine. Base and LoRA model are in memory in float32, one each.

    Args:
        base: checkpoint folder of the base model, with its tokenizer.
        lora: folder of a PEFT adapter of that base, LoRA or any other kind that merges.
        texts: texts like those the model is used on, or a UTF-8 file with one a line. Empty ones and repetitions are
            left out.
        n_coefficients: per matrix (at most its size).
        epochs: passes over the texts.
        learning_rate: of the coefficients, at its peak; saved modules train at a tenth of it.
        max_tokens: where longer texts are cut.
        seed: of the order of the texts.
        task_type: see `SdctConfig`; None takes the LoRA's.
        model_class: `MODULE:CLASS` the LoRA was trained on, where it is one of your own.
        progress: show a bar on stderr; None shows it on a terminal only.

    Returns:
        The adapter, which records what it was trained on like any trained one, and the report. Where training brought
        it no nearer to the LoRA model, the start is returned and a warning says so.

    Raises:
        ConfigError: a setting cannot work, the texts are too few or the file is no text.
        AdapterFormatError: the PEFT folder is damaged.
        BaseMismatchError: LoRA and base do not belong together, or one is damaged.
        UnsupportedError: PEFT is not installed, the model does not read texts, or the LoRA is of a kind that changes
            more than linear weights.
    """
    _check(n_coefficients=n_coefficients, epochs=epochs, max_tokens=max_tokens)
    if isinstance(learning_rate, bool) or not math.isfinite(learning_rate) or learning_rate <= 0:
        raise ConfigError(f"learning_rate must be a positive number, got {learning_rate!r}; 1e-2 to 4e-2 is usual")
    _check_task(task_type, "the task asked for")
    texts = _clean(texts)
    _require_peft()
    checkpoint = Checkpoint(base)
    change = _remembered(from_peft(checkpoint, Path(lora), task_type=task_type, model_class=model_class))
    task = task_type or change.task_type
    _check_task(task, f"the task of {lora}")
    settings = SdctConfig(target_modules=".*", n_coefficients=n_coefficients, selection="top", bands=1, seed=seed)
    projected, kept = project_change(checkpoint, change, settings, progress=progress)
    projected = dataclasses.replace(projected, config=dataclasses.replace(projected.config, task_type=task))
    shapes = {name: array.shape for name, array in change.saved.items()}
    new = functools.partial(load_sized, base, task, shapes, dtype=torch.float32, model_class=model_class)
    ids = _encode(checkpoint.folder, texts, max_tokens)
    held = max(1, min(MOST_HELD_BACK, round(HELD_BACK * len(ids))))
    order = np.random.default_rng(seed).permutation(len(ids))
    size = LANGUAGE_BATCH if task == "CAUSAL_LM" else BATCH
    checked = _batches([ids[i] for i in order[:held]], size)
    learned = _batches([ids[i] for i in order[held:]], size)

    teacher = _Teacher(_with_peft(new(), Path(lora)), [*checked, *learned])
    trained = range(len(checked), len(checked) + len(learned))
    with progress_bar("distilling", (epochs + 1) * len(learned), progress) as advance:
        moments = _moments(teacher, list(projected.modules), trained, advance)
        model = SdctModel.from_adapter(new(), projected)
        before = _distance(model, teacher, range(len(checked)))
        _set(model, _fitted(projected, change, moments))
        del moments
        start = _distance(model, teacher, range(len(checked)))
        if not start.error < before.error:  # layer by layer nearer is not always nearer in the end
            _set(model, projected.modules)
            start = before
        values = copy.deepcopy({name: p.data for name, p in model.named_parameters() if p.requires_grad})
        _train(model, teacher, trained, epochs, learning_rate, seed, advance)
    after = _distance(model, teacher, range(len(checked)))
    if not after.error < start.error:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
        if after.error != start.error:
            warnings.warn(
                f"training brought the adapter no nearer to {lora} on the {held} texts held back "
                f"({after.error:.3g}, was {start.error:.3g}), so it is as it was before training; use more texts or "
                "a lower learning rate",
                stacklevel=2,
            )
        after = start
    report = DistillationReport(
        measure=teacher.loss.measure,
        texts=len(ids) - held,
        held_back=held,
        projected=before,
        start=start,
        distilled=after,
        better=after.error < before.error,
        saved=kept.saved,
        ignored=kept.ignored,
    )
    return Distillation(model.adapter(), report)


def _check(**settings: object) -> None:
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")


def _check_task(task: str | None, what: str) -> None:
    if task is not None and task not in _TASKS:
        raise UnsupportedError(f"{what} is {task}; only models of {', '.join(_TASKS)} can be distilled, on texts")


def _clean(texts: Sequence[str] | str | Path) -> list[str]:
    cleaned = read_texts(texts)
    if len(cleaned) < MIN_TEXTS:
        where = str(texts) if isinstance(texts, str | Path) else "the texts"
        raise ConfigError(
            f"{where}: {len(cleaned)} different texts; distillation needs at least {MIN_TEXTS}, and some hundreds to "
            "be any good"
        )
    return cleaned


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "distillation runs the LoRA model with PEFT; install it with `pip install 'sdct_export[peft]'`"
        ) from None


def _remembered(change: Change) -> Change:
    """`change` with spectra that can be asked for again."""
    known: dict[str, Tensor] = {}

    def spectrum(path: str) -> Tensor:
        if path not in known:
            known[path] = change.spectrum(path)
        return known[path]

    return dataclasses.replace(change, spectrum=spectrum)


def _encode(folder: Path, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, with the tokenizer of the base."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what some classes make up where there is no file
            raise ValueError("it knows no words")
        limit = min(max_tokens, tokenizer.model_max_length)
        rows = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    except Exception as error:  # a folder without a tokenizer makes transformers raise errors of many kinds
        raise BaseMismatchError(
            f"{folder} has no tokenizer that works ({error}); copy the whole checkpoint, tokenizer included"
        ) from error
    rows = [list(row) for row in rows if len(row)]
    if len(rows) < MIN_TEXTS:
        raise ConfigError(f"only {len(rows)} of the texts hold a token; distillation needs at least {MIN_TEXTS}")
    return rows


def _batches(rows: Sequence[list[int]], size: int) -> list[_Batch]:
    """Batches of texts of similar length, padded on the right with 0, which the mask covers."""
    ordered = sorted(rows, key=len)
    batches = []
    for at in range(0, len(ordered), size):
        part = ordered[at : at + size]
        ids = torch.zeros(len(part), len(part[-1]), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _with_peft(model: nn.Module, folder: Path) -> nn.Module:
    """The LoRA model, as PEFT loads it."""
    import peft

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # of which PEFT only warns
            loaded: nn.Module = peft.PeftModel.from_pretrained(model, str(folder))
        return loaded.eval().requires_grad_(False)
    except Exception as error:  # a foreign adapter makes PEFT raise errors of many kinds
        raise BaseMismatchError(f"PEFT cannot apply {folder} to this base: {error}") from error


class _Loss:
    """What is compared: probabilities where the model gives logits of several labels or tokens, else numbers.

    `rows(output, mask)` are the `[rows, columns]` that count: one a text, or one a token that is no padding.
    """

    def __init__(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> None:
        self.name = "logits" if "logits" in outputs else "last_hidden_state"
        if self.name not in outputs:
            raise UnsupportedError(
                f"{type(model).__name__} gives {', '.join(outputs)}; a model to distill gives logits or "
                "last_hidden_state"
            )
        kind = getattr(getattr(model, "config", None), "problem_type", None)
        columns = outputs[self.name].shape[-1]
        several = kind not in ("regression", "multi_label_classification") and columns > 1
        self.probabilities = self.name == "logits" and several
        self.measure = "KL divergence" if self.probabilities else "squared error"

    def rows(self, output: Tensor, batch: _Batch) -> Tensor:
        return output[batch["attention_mask"].bool()] if output.ndim == 3 else output

    def sums(self, got: Tensor, want: Tensor) -> Tensor:
        """Sum over the rows of the KL divergence, or of the squared error."""
        if self.probabilities:
            return nn.functional.kl_div(got.log_softmax(-1), want.log_softmax(-1), reduction="sum", log_target=True)
        return (got - want).square().sum()

    def size(self, want: Tensor) -> float:
        """What `sums` is divided by: the number of rows, or the sum of squares around the mean."""
        if self.probabilities:
            return float(len(want))
        return float((want - want.mean(0)).square().sum())


class _Teacher:
    """The LoRA model and what it gives for each batch; small outputs are kept, others computed again."""

    def __init__(self, model: nn.Module, batches: Sequence[_Batch]) -> None:
        self.model = model
        self.batches = batches
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0
        try:
            with torch.no_grad():
                outputs = dict(model(**batches[0]))
        except Exception as error:  # what a model raises on inputs that are none of its own
            raise UnsupportedError(
                f"the LoRA model does not run on a batch of texts ({type(error).__name__}: {error}); a model for "
                "texts that needs nothing beside them is what can be distilled"
            ) from error
        self.base: nn.Module = model.get_base_model()  # type: ignore[operator]
        self.loss = _Loss(self.base, {name: value for name, value in outputs.items() if isinstance(value, Tensor)})

    def rows(self, i: int) -> Tensor:
        """The rows of batch `i` that count, `[rows, columns]`."""
        if i in self._kept:
            return self._kept[i]
        batch = self.batches[i]
        with torch.no_grad():
            rows = self.loss.rows(self.model(**batch)[self.loss.name], batch)
        if not torch.isfinite(rows).all():
            raise BaseMismatchError("the LoRA model gives NaN or infinite outputs for the texts; repair the LoRA")
        size = rows.numel() * rows.element_size()
        if self._bytes + size <= _KEPT:
            self._kept[i] = rows.clone()
            self._bytes += size
        return rows


def _moments(
    teacher: _Teacher, paths: Sequence[str], batches: Sequence[int], advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """Module path -> `sum g g^T  [d_in, d_in]` over the tokens, `g` the cosine transform of the layer's input.

    Modules that read one tensor share one matrix.
    """
    base = teacher.base
    found: dict[str, Tensor] = {}
    seen: dict[int, tuple[Tensor, str]] = {}  # of this forward: input -> the module that read it first
    leaders: dict[str, str] = {}
    mask = torch.empty(0)

    def read(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            first = seen.setdefault(id(x), (x, path))[1]
            if leaders.setdefault(path, first) == first != path:
                return
            rows = x[mask] if x.ndim == 3 and x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])
            spectrum = dct(rows.float())
            if path in found:
                found[path].addmm_(spectrum.T, spectrum)
            else:
                found[path] = spectrum.T @ spectrum

        return hook

    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.callback(base.get_submodule(path).register_forward_pre_hook(read(path)).remove)
        for i in batches:
            seen.clear()
            mask = teacher.batches[i]["attention_mask"].bool()
            teacher.rows(i)
            advance(1)
    return {path: found[leaders[path]] for path in paths if path in leaders}


def _fitted(projected: SdctAdapter, change: Change, moments: Mapping[str, Tensor]) -> dict[str, SdctEntries]:
    """Module path -> coefficients chosen and set by what the inputs of the layer are."""
    fitted = {}
    for path, entries in projected.modules.items():
        fitted[path] = entries
        if path in moments:
            places, values = fit_spectrum(change.spectrum(path), moments[path].double(), entries.n)
            if torch.isfinite(values).all():
                width = change.shapes[path][1]
                indices: Array = np.stack(np.divmod(places.numpy(), width), axis=1).astype(np.int32)
                fitted[path] = SdctEntries(values.numpy(), indices, entries.shape)
    return fitted


def _set(model: SdctModel, modules: Mapping[str, SdctEntries]) -> None:
    """Give the active adapter of `model` other coefficients."""
    assert model.active is not None
    for path, _, layer in model._layers():
        entry = layer.entry(model.active)
        with torch.no_grad():
            entry.values.copy_(torch.from_numpy(modules[path].values.copy()))
            entry.indices.copy_(torch.from_numpy(modules[path].indices.copy()))


def _distance(model: nn.Module, teacher: _Teacher, batches: Sequence[int]) -> Distance:
    loss = teacher.loss
    wants, total, same = [], 0.0, 0
    model.eval()
    with torch.no_grad():
        for i in batches:
            batch, want = teacher.batches[i], teacher.rows(i)
            got = loss.rows(model(**batch)[loss.name], batch)
            total += float(loss.sums(got.double(), want.double()))
            same += int((got.argmax(-1) == want.argmax(-1)).sum())
            wants.append(want)
    rows = sum(map(len, wants))
    size = float(rows) if loss.probabilities else loss.size(torch.cat(wants).double())
    return Distance(max(0.0, total / size) if size else math.nan, same / rows if loss.probabilities else None)


def _train(
    model: SdctModel,
    teacher: _Teacher,
    batches: Sequence[int],
    epochs: int,
    rate: float,
    seed: int,
    advance: Callable[[int], None],
) -> None:
    """AdamW with warm-up and linear decay. Dropout stays off: the base is frozen and the epochs are few."""
    loss = teacher.loss
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    values = [p for name, p in named if name.endswith(".values")]
    heads = [p for name, p in named if not name.endswith(".values")]
    groups = [{"params": values, "lr": rate}, {"params": heads, "lr": HEAD_RATE * rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    total = epochs * len(batches)
    warm = max(1, round(WARMUP * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (total - step) / (total - warm + 1))
    )
    rng = np.random.default_rng((seed, 1))
    typical = 1.0 if loss.probabilities else loss.size(torch.cat([teacher.rows(i) for i in batches[:8]]))
    per_row = typical / max(1, sum(len(teacher.rows(i)) for i in batches[:8])) or 1.0
    model.eval()
    for _ in range(epochs):
        for i in rng.permutation(np.asarray(batches)).tolist():
            batch, want = teacher.batches[i], teacher.rows(i)
            got = loss.rows(model(**batch)[loss.name], batch)
            scale = float(len(want)) if loss.probabilities else len(want) * per_row
            (loss.sums(got, want) / scale).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_([p for _, p in named], CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            advance(1)
