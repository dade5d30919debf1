"""What quantizing a base costs in quality, on a person's own texts: `sdct-export bench --quality`.

Three models answer the same texts with the same adapter: the float model in torch, the bundle (quantized base, exact
adapter), and a bundle made the other way round, by merging the adapter and quantizing what came out, with the same
settings. The first is the measure of the other two.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from .adapter.adapter import SdctAdapter
from .adapter.entries import Array
from .base.checkpoint import progress_bar
from .base.model import to_numpy, to_torch
from .base.reference import run_adapted
from .base.sentence import add_tail, load_tail
from .bundle.description import Bundle
from .errors import BaseMismatchError, ConfigError, UnknownAdapterError
from .export import export_merged
from .files import read_texts
from .runtime import MultiAdapterModel
from .runtime.request import encode_text
from .verify import bundle_base, has_recorded_weights

EXACT, MERGED = "quantized base, exact adapter", "merged, then quantized"
BATCH, LANGUAGE_BATCH = 16, 2  # texts at once; a language model's outputs are as wide as its vocabulary

Answer = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclasses.dataclass(frozen=True)
class Quality:
    """How far one quantized model is from the float model with the same adapter.

    Attributes:
        adapter: its name.
        method: `EXACT` or `MERGED`.
        error: root of the mean squared difference of the outputs, over the standard deviation of the float model's.
        largest: the largest difference of one number, over the same.
        agreement: share of texts (of tokens where each has an answer) for which both find the same label or next
            token most likely; None for outputs that are no choice.
        perplexity: of the texts, for language models.
        float_perplexity: the float model's.
    """

    adapter: str
    method: str
    error: float
    largest: float
    agreement: float | None
    perplexity: float | None
    float_perplexity: float | None


@dataclasses.dataclass(frozen=True)
class QualityReport:
    """What was compared: texts and answers (texts, or tokens where each has one), the settings, one row a model."""

    texts: int
    answers: int
    quantization: str
    block_size: int
    accuracy_level: int
    rows: tuple[Quality, ...]


def quality(
    bundle: str | Path,
    model: str | Path | nn.Module,
    texts: Sequence[str] | str | Path,
    *,
    adapters: Sequence[str] | None = None,
    max_tokens: int = 256,
    model_class: str | None = None,
    device: str = "cpu",
    progress: bool | None = None,
) -> QualityReport:
    """Compare a quantized multi-adapter bundle with its float model, and with merging before quantizing.

    Args:
        bundle: the exported folder.
        model: the base it was exported from: a checkpoint folder, or the torch model or `SdctModel` (left as it is).
        texts: texts like those the model is used on, or a UTF-8 file with one a line. Empty ones and repetitions are
            left out.
        adapters: names in the bundle; default all.
        max_tokens: where longer texts are cut, if the model does not read less.
        model_class: `MODULE:CLASS` of a checkpoint, needed where it was exported from a class of one's own.
        device: where the quantized models run, see `MultiAdapterModel`.
        progress: show a bar on stderr; None shows it on a terminal only.

    Raises:
        ConfigError: the bundle is not quantized or is merged, a setting cannot work, there is no text, or the bundle
            reads no texts. UnknownAdapterError: an adapter is not in the bundle.
        AdapterFormatError: the folder is no bundle. BaseMismatchError: `model` is not the base.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 2:
        raise ConfigError(f"max_tokens must be an integer of 2 or more, got {max_tokens!r}")
    described = Bundle.load(bundle)
    settings = described.quantization
    if settings is None or described.kind != "multi":
        what = "merged" if settings is not None else "not quantized"
        raise ConfigError(f"{bundle} is {what}; export a multi-adapter bundle with --quantize int8 and compare that")
    chosen = list(described.adapters) if adapters is None else list(adapters)
    for name in chosen:
        if name not in described.adapters:
            raise UnknownAdapterError(f"{bundle} has no adapter {name!r}; it has {', '.join(described.adapters)}")
    cleaned = read_texts(texts)
    if not cleaned:
        raise ConfigError("there is no text to compare the models on; give a UTF-8 file with one text a line")
    loaded = {name: SdctAdapter.load(described.adapter_path(name)) for name in described.adapters}
    base = bundle_base(described, model, model_class, loaded)
    if not has_recorded_weights(described, base):
        raise BaseMismatchError(f"{bundle} was exported from another base than this one; give that base")
    tail = load_tail(model, base) if described.pooling and isinstance(model, str | Path) else None
    if tail is not None:
        add_tail(base, tail)
    base = base.float()
    batches = list(_batches(described, cleaned, max_tokens))
    rows, answers = [], 0
    with (
        tempfile.TemporaryDirectory() as folder,
        MultiAdapterModel(described, device=device) as exact,
        progress_bar("comparing", len(chosen) * len(batches), progress) as advance,
    ):
        for name in chosen:
            export_merged(
                model,
                loaded[name],
                Path(folder) / name,
                model_class=model_class,
                dtype=described.dtype,
                cache=described.cache is not None,
                target=None if described.cache is None else described.cache.target,
                quantize=settings.name,
                block_size=settings.block_size,
                accuracy_level=settings.accuracy_level,
            )
            with MultiAdapterModel(Path(folder) / name, device=device) as merged:
                sums = {EXACT: _Sums(described.task), MERGED: _Sums(described.task)}
                for feeds in batches:
                    want = _in_torch(base, loaded[name], feeds)
                    sums[EXACT].add(exact.run(feeds, name), want, feeds)
                    sums[MERGED].add(merged.run(feeds), want, feeds)
                    advance(1)
            rows += [total.report(name, method) for method, total in sums.items()]
            answers = sums[EXACT].answers
    return QualityReport(
        len(cleaned), answers, settings.name, settings.block_size, settings.accuracy_level, tuple(rows)
    )


def _in_torch(base: nn.Module, adapter: SdctAdapter, feeds: Mapping[str, Array]) -> dict[str, Array]:
    inputs = {name: to_torch(array) for name, array in feeds.items()}
    return {name: to_numpy(value) for name, value in run_adapted(base, inputs, adapter).items()}


def _batches(bundle: Bundle, texts: Sequence[str], max_tokens: int) -> Iterator[dict[str, Array]]:
    """The texts in batches of similar length; longer ones lose what is on the side of the padding."""
    ordered = sorted(texts, key=len)
    size = LANGUAGE_BATCH if bundle.task == "CAUSAL_LM" else BATCH
    for at in range(0, len(ordered), size):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".* have more tokens than the model reads"
            )  # cut they are anyway
            feeds = encode_text(bundle, ordered[at : at + size])
        left = "attention_mask" in feeds and not feeds["attention_mask"][:, 0].all()
        part = slice(-max_tokens, None) if left else slice(max_tokens)
        yield {name: array[:, part] for name, array in feeds.items()}


class _Sums:
    """Adds up, batch by batch, what `Quality` says."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._numbers = self._squares = self._total = self._wanted = self._largest = 0.0
        self._same = self.answers = self._tokens = self._choices = 0
        self._nats = {"got": 0.0, "want": 0.0}

    def add(self, got: Mapping[str, Array], want: Mapping[str, Array], feeds: Mapping[str, Array]) -> None:
        """Compare one batch: the logits where there are some, else the first output."""
        name = "logits" if "logits" in want else next(iter(want))
        mask = feeds.get("attention_mask", np.ones_like(feeds["input_ids"])).astype(bool)
        wide = want[name].astype(np.float64)
        near = got[name][..., : wide.shape[-1]].astype(np.float64)  # the adapter's own labels
        by_token = wide.ndim == 3
        a, b = (near[mask], wide[mask]) if by_token else (near, wide)
        self._numbers += b.size
        self._squares += float(((a - b) ** 2).sum())
        self._total += float(b.sum())
        self._wanted += float((b**2).sum())
        self._largest = max(self._largest, float(np.abs(a - b).max()))
        self.answers += len(b)
        self._choices = b.shape[-1]
        self._same += int((a.argmax(-1) == b.argmax(-1)).sum())
        if self._task == "CAUSAL_LM":
            targets, both = feeds["input_ids"][:, 1:], mask[:, 1:] & mask[:, :-1]
            self._tokens += int(both.sum())
            for key, logits in (("got", near), ("want", wide)):
                self._nats[key] += float(_nats(logits[:, :-1][both], targets[both]).sum())

    def report(self, adapter: str, method: str) -> Quality:
        """What was added up."""
        variance = self._wanted / self._numbers - (self._total / self._numbers) ** 2
        spread = max(variance, 1e-30) ** 0.5
        chooses = self._task in ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM") and self._choices > 1  # one is a regression
        perplexities = {key: float(np.exp(nats / self._tokens)) for key, nats in self._nats.items() if self._tokens}
        return Quality(
            adapter,
            method,
            (self._squares / self._numbers) ** 0.5 / spread,
            self._largest / spread,
            self._same / self.answers if chooses else None,
            perplexities.get("got"),
            perplexities.get("want"),
        )


def _nats(logits: Array, targets: Array) -> Array:
    """`-log p` of each target, `logits [n, vocabulary]` -> `[n]`."""
    top = logits.max(-1)
    own = np.take_along_axis(logits, targets[:, None], -1)[:, 0]
    nats: Array = np.log(np.exp(logits - top[:, None]).sum(-1)) + top - own
    return nats
