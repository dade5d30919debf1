"""`MultiAdapterModel`: an exported bundle, ready to run, with adapters chosen per batch row.

A model is refused in a child that was forked after it was loaded: the threads of ONNX Runtime and the CUDA context
stay behind in the parent, so a run could wait for ever, and freeing a session there crashes the process.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np

from .. import contract, native
from ..adapter.adapter import SdctAdapter
from ..adapter.entries import DTYPE_NAMES, Array
from ..adapter.training import TrainingProbe
from ..bundle.description import Bundle, TensorSpec
from ..bundle.packing import Layout, bank_layout, label_count, most_bytes, pack
from ..errors import AdapterFormatError, BaseMismatchError, ConfigError, SdctError, UnsupportedError
from ..files import check_adapter_name
from . import decoding
from .bank import AdapterInfo, Bank, Memory
from .batching import DEFAULT_CHUNK, DEFAULT_MAX_LENGTH, DEFAULT_SLOTS, ContinuousBatcher, Event
from .generation import Generation
from .ort import OrtBackend, check_cache, check_dtype
from .prompts import Prompt
from .selection import MERGED, Selection, check_adapters, in_slots, selection_inputs
from .steps import Steps, cache_bytes
from .text import Stops

DEFAULT_MAX_SLOTS = 256
# A runtime keeps the memory of its largest batch: 60,000 rows left 1.4 GB behind. No machine gains from batches this
# large any more, and test sets of common size still pass in one call.
DEFAULT_MAX_BATCH = 1024

T = TypeVar("T")


class Backend(Memory[T], Protocol):
    """What runs a graph: its inputs and outputs, memory for a bank, and one call for a batch."""

    inputs: dict[str, tuple[int | str | None, ...]]
    outputs: tuple[str, ...]
    graph: Mapping[str, TensorSpec] | None  # inputs and outputs as the file says, None for an engine of one's own
    native: bool  # adapters run through the operator or plugin, not through the portable function in the file

    def run(self, inputs: Mapping[str, Array], bank: Mapping[str, T]) -> dict[str, Array]:
        """All outputs as arrays in host memory."""

    def steps(self, cache: contract.Cache, slots: int, max_length: int) -> Steps[T]:
        """An empty cache of so many slots, each for at most `max_length` tokens. Raises `MemoryError`."""


class MultiAdapterModel:
    """A bundle on a backend. Every method may be called from any thread, but not from signal handlers.

    `with MultiAdapterModel(…) as model:` closes it at the end. An exception at any point of a call (Ctrl-C, say)
    leaves the model as it was before or after the call. After a fork it must be loaded again in the child.

    Args:
        bundle: folder of an exported bundle, or the `Bundle` read from it. Its own adapters are checked against their
            recorded hashes and loaded.
        backend: `onnxruntime`, or `tensorrt` for an engine built from the bundle.
        device: `cpu`, `cuda` or `cuda:N`; default `cpu`, for TensorRT `cuda`.
        max_slots: most slots of the adapter bank, the base's slot 0 included. More adapters can be loaded; the least
            recently used ones give up their slots.
        max_batch: most rows of one request, None for no limit. A backend keeps the memory of the largest batch it ran.
        threads: threads within an operator, None for the backend's choice; ONNX Runtime only.
        engine: the engine file, default `model.engine` in the bundle; TensorRT only.

    Raises:
        AdapterFormatError: the bundle is damaged. VerificationError: its graph or one of its adapters was changed.
        ConfigError: an option has no such value. UnsupportedError: the backend or device is not available.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        backend: str = "onnxruntime",
        device: str | None = None,
        *,
        max_slots: int = DEFAULT_MAX_SLOTS,
        max_batch: int | None = DEFAULT_MAX_BATCH,
        threads: int | None = None,
        engine: str | Path | None = None,
    ) -> None:
        if backend not in ("onnxruntime", "tensorrt"):
            raise ConfigError(f"backend must be 'onnxruntime' or 'tensorrt', got {backend!r}")
        if max_batch is not None and (isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1):
            raise ConfigError(f"max_batch must be a positive integer or None, got {max_batch!r}")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        self._max_batch = max_batch
        layout = bank_layout(self.bundle)
        loaded: Backend[Any]
        if backend == "tensorrt":
            if threads is not None:
                raise ConfigError("threads is for backend='onnxruntime'; leave it out for TensorRT")
            from .trt import TrtBackend

            trt = TrtBackend(self.bundle, device or "cuda", engine)
            loaded = trt
            if isinstance(max_slots, int):
                max_slots = min(max_slots, trt.max_slots)  # the engine's own limit
        else:
            if engine is not None:
                raise ConfigError("engine is for backend='tensorrt'; leave it out for ONNX Runtime")
            check_dtype(self.bundle, device or "cpu")
            check_cache(self.bundle, device or "cpu")
            self.bundle.check_model()
            results = [spec.name for spec in self.bundle.outputs]
            loaded = OrtBackend(self.bundle.model_path, device or "cpu", threads, self.bundle.groups, results)
        self._check_graph(loaded, layout)
        self._gone = ""  # why the model cannot be used any more
        self._parts: tuple[Backend[Any], Bank[Any] | None] | None = (loaded, None)
        if self.bundle.kind == "multi":
            if self.bundle.groups and not loaded.native:
                _warn_of_the_portable_body(device or "cpu")
            self._parts = (loaded, Bank(layout, loaded, max_slots))
            for name in self.bundle.adapters:  # their training was compared when they were exported
                self.bundle.check_adapter(name)
                self._parts[1].add(name, *self._pack(name, self.bundle.adapter_path(name), is_own=True))
        _models.add(self)

    def __enter__(self) -> MultiAdapterModel:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the session and the bank, once the requests that run now have finished; does not wait for them.

        Later calls raise `SdctError`; closing again does nothing.
        """
        self._give_up(f"the model of {self.bundle.path} is closed; load the bundle again to use it")

    @property
    def native(self) -> bool:
        """Whether adapters run through the native operator (or TensorRT's plugin), not the slower portable body."""
        return self._open()[0].native

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """The loaded adapters by name: number of parameters, labels, and the slot each lies in now (a snapshot)."""
        bank = self._open()[1]
        return MappingProxyType(bank.info() if bank else {})

    def load_adapter(self, name: str, adapter: SdctAdapter | str | Path) -> None:
        """Make an adapter available as `name`, while other threads run. On failure nothing has changed.

        Raises:
            ConfigError: the name is not allowed or taken, or the model is merged.
            AdapterFormatError: the adapter folder is damaged.
            BaseMismatchError: the adapter does not fit this bundle, or the bundle gives other outputs with it than the
                model it was trained on.
        """
        bank = self._require_bank()
        check_adapter_name(name)
        bank.add(name, *self._pack(name, adapter))

    def reload_adapter(self, name: str, adapter: SdctAdapter | str | Path) -> None:
        """Put another adapter in the place of `name`, while other threads run: none of their requests is refused.

        Requests that hold the old adapter finish with it; those that start once this returns, and those that still
        wait for a slot, use the new one. No request mixes the two. On failure the old one stays.

        Raises:
            UnknownAdapterError: no such adapter is loaded.
            ConfigError: the model is merged, or there is no memory to grow the bank.
            AdapterFormatError: the adapter folder is damaged.
            BaseMismatchError: as `load_adapter`.
        """
        self._require_bank().replace(name, *self._pack(name, adapter))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter: new requests do not find it, running ones finish with it.

        Raises:
            UnknownAdapterError: no such adapter is loaded.
        """
        self._require_bank().remove(name)

    def run(
        self,
        inputs: Mapping[str, Array],
        adapters: Selection | Sequence[Selection] = None,
    ) -> dict[str, Array]:
        """Run one batch.

        Args:
            inputs: the model's own inputs, e.g. `input_ids [batch, sequence]`, as arrays or nested lists. Integers may
                be of any type that holds them, floats are rounded to the model's type. `token_type_ids` may be left
                out and are then zero.
            adapters: one entry per batch row: a name, None for the base, or a mapping of names to scales whose effects
                add up. A single name or mapping holds for every row; None runs the base.

        Returns:
            output name -> array. Of a language model with a key-value cache what it computes of these tokens alone:
            the cache starts empty and is not returned, and logits at padding mean nothing. Rows whose adapter has
            fewer labels than the bundle's largest head hold about `finfo(dtype).min / 2` in the columns beyond their
            own. Outputs of a bfloat16 bundle are float32.

        Raises:
            UnknownAdapterError: a name is not loaded.
            ConfigError: inputs or adapters are missing, unknown, or of the wrong number, shape or type.
            SdctError: the backend failed, or the model is closed. UnsupportedError: this is a fork of its process.
        """
        backend, bank = self._open()
        feeds, batch = _check_inputs(self.bundle.inputs, inputs, self.bundle.max_tokens)
        self._check_batch(batch)
        if self.bundle.cache is not None:
            if self.bundle.cache.foreign and _pads_before_a_token(feeds[contract.ATTENTION_MASK]):
                return _unpadded(feeds, lambda moved: self.run(moved, adapters))
            feeds |= _without_past(self.bundle.cache, feeds)
        if bank is None:
            if adapters is not None:
                raise ConfigError(MERGED)
            return backend.run(feeds, {})
        rows = check_adapters(adapters, batch)
        lease = bank.lease(name for row in rows for name in row)
        try:
            with lease:
                return backend.run(
                    feeds | selection_inputs([in_slots(row, lease.slots) for row in rows]), lease.tensors
                )
        finally:
            lease.release()  # again: an exception may come before the way out of `with`

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Selection | Sequence[Selection] = None,
        *,
        max_new_tokens: int | Sequence[int | None] | None = None,
        temperature: float | Sequence[float | None] | None = None,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        min_p: float | Sequence[float | None] | None = None,
        repetition_penalty: float | Sequence[float | None] | None = None,
        seed: int | Sequence[int | None] | None = None,
        stop: Stops | None = None,
        stop_tokens: Sequence[int] | Sequence[Sequence[int] | None] | None = None,
        logprobs: bool = False,
        slots: int | None = None,
        max_length: int | None = None,
    ) -> list[Generation]:
        """Go on from each prompt until each has ended; rows run side by side, some wait where they are many.

        What is None is what the base's `generation_config.json` says, greedy where that says nothing (see `Sampling`).
        Every option may be one value, or one for each row. A row's tokens depend on its prompt, adapters, options and
        seed alone, up to the rounding of sums in a batch.

        Args:
            prompts: texts, which the bundle's tokenizer encodes; token ids; or chats, lists of messages with a `role`
                and a `content`, which go through its chat template. Of any lengths.
            adapters: one entry per prompt, or one for all, as in `run`.
            max_new_tokens: most tokens that a row gets; 64 where the base does not say either.
            temperature: see `Sampling`, as for the four that follow.
            top_k: only the most probable tokens, so many.
            top_p: only the most probable tokens, of this probability together.
            min_p: only tokens this probable, measured by the most probable one.
            repetition_penalty: above 1 for fewer repetitions.
            seed: row `i` draws from `seed + i`; or one seed a row; None for numbers that nobody can repeat.
            stop: a text, or texts, that end a row where they begin; or such for each row.
            stop_tokens: ids that end a row; default: the end-of-sequence tokens of the base.
            logprobs: whether to say how probable the tokens were.
            slots: most rows that run side by side; default 32.
            max_length: most tokens of a row, prompt and new ones; None for what the longest one asks for.

        Raises:
            UnknownAdapterError: a name is not loaded.
            ConfigError: the bundle has no cache; a prompt is empty, refused by the chat template, or too long together
                with `max_new_tokens`; an option is out of its range.
            SdctError: the model gives NaN; names the row. Or the backend failed, or the model is closed.
        """
        options = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
            "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed, "stop": stop,
            "stop_tokens": stop_tokens,
        }  # fmt: skip
        batcher, rows = self._prepare(prompts, adapters, options, slots, max_length)
        return decoding.generate(self.bundle, batcher, rows, logprobs=logprobs)

    def stream(
        self,
        prompts: Sequence[Prompt],
        adapters: Selection | Sequence[Selection] = None,
        *,
        logprobs: bool = False,
        slots: int | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> Iterator[Event]:
        """As `generate`, with its options, but every token as soon as it is there: `request` is its row.

        `text` is what comes to the row's text with the token (nothing, while a character or stop string may be in the
        making), None where the bundle has no tokenizer. The last token of a row has a `finish`. Closing the iterator
        ends all rows.

        Raises:
            as `generate`; what goes wrong with a row comes out of the iterator.
        """
        unknown = sorted(set(options) - decoding.OPTIONS.keys())
        if unknown:
            raise TypeError(f"stream() got an unexpected keyword argument {unknown[0]!r}")
        batcher, rows = self._prepare(prompts, adapters, {**decoding.OPTIONS, **options}, slots, max_length)
        return decoding.stream(self.bundle, batcher, rows, logprobs=logprobs)

    def batcher(
        self, slots: int = DEFAULT_SLOTS, max_length: int = DEFAULT_MAX_LENGTH, chunk: int = DEFAULT_CHUNK
    ) -> ContinuousBatcher:
        """A cache of its own for requests that come and go while others run.

        Args:
            slots: most requests that run side by side.
            max_length: most tokens of a request, prompt and new ones; no more than the model can have.
            chunk: most tokens of prompts that are computed between two tokens of the requests that run.

        Raises:
            ConfigError: the bundle has no cache, a number is not positive, or there is no memory.
        """
        for name, value in (("slots", slots), ("max_length", max_length), ("chunk", chunk)):
            _check_positive(name, value)
        self._check_batch(slots)
        return self._batcher(slots, min(max_length, self.bundle.max_tokens or max_length), chunk)

    def _prepare(
        self,
        prompts: Sequence[Prompt],
        adapters: Selection | Sequence[Selection],
        options: Mapping[str, Any],
        slots: int | None,
        max_length: int | None,
    ) -> tuple[ContinuousBatcher, list[decoding.Row]]:
        _, bank = self._open()
        self._require_cache()
        slots = decoding.MOST_SLOTS if slots is None else slots
        _check_positive("slots", slots)
        rows = decoding.read_rows(self.bundle, prompts, adapters, options, max_length)
        self._check_batch(len(rows))
        if bank is None and adapters is not None:
            raise ConfigError(MERGED)
        return self._batcher(min(len(rows), slots), max(row.length for row in rows), decoding.CHUNK, noun="row"), rows

    def _batcher(self, slots: int, max_length: int, chunk: int, noun: str = "request") -> ContinuousBatcher:
        bank = self._open()[1]
        backend, cache = self._require_cache()
        size = cache_bytes(cache, slots, max_length)
        try:
            if size > sys.maxsize:  # which no array can have
                raise MemoryError
            steps = backend.steps(cache, slots, max_length)
        except MemoryError as error:
            raise ConfigError(
                f"there is no memory for the cache of {slots} rows of {max_length} tokens "
                f"({size >> 20} MiB); ask for fewer"
            ) from error
        return ContinuousBatcher(self.bundle, steps, bank, chunk, noun=noun)

    def _require_cache(self) -> tuple[Backend[Any], contract.Cache]:
        backend, cache = self._open()[0], self.bundle.cache
        if cache is None:
            raise ConfigError(
                "this bundle has no key-value cache, which generate needs; export a causal language model without "
                "--no-cache"
            )
        return backend, cache

    def _check_batch(self, batch: int) -> None:
        if self._max_batch is not None and batch > self._max_batch:
            raise ConfigError(
                f"the batch has {batch} rows, this model takes at most {self._max_batch}; "
                "split it, or load the model with a larger max_batch"
            )

    def _require_bank(self) -> Bank[Any]:
        bank = self._open()[1]
        if bank is None:
            raise ConfigError("this bundle is merged: it has no adapter bank; export without --merge to load adapters")
        return bank

    def _open(self) -> tuple[Backend[Any], Bank[Any] | None]:
        """Backend and bank, which a call keeps until it has finished, or the reason why there are none any more."""
        parts = self._parts
        if parts is None:
            raise UnsupportedError(self._gone) if self._gone == _FORKED else SdctError(self._gone)
        return parts

    def _give_up(self, reason: str) -> None:
        self._gone = self._gone or reason
        self._parts = None

    def _pack(
        self, name: str, adapter: SdctAdapter | str | Path, *, is_own: bool = False
    ) -> tuple[Mapping[str, Array], int, int | None]:
        """What the bank keeps of an adapter: its rows, and its numbers of parameters and labels."""
        if not isinstance(adapter, SdctAdapter):
            adapter = SdctAdapter.load(adapter, max_bytes=most_bytes(self.bundle))
        rows = pack(self.bundle, adapter, label=f"adapter {name!r}")
        probe = adapter.trained_on.probe if adapter.trained_on is not None and not is_own else None
        if probe is not None:
            self._check_trained(name, probe, rows)
        return rows, adapter.n_parameters, label_count(self.bundle, adapter)

    def _check_trained(self, name: str, probe: TrainingProbe, rows: Mapping[str, Array]) -> None:
        """Raise `BaseMismatchError` unless the graph gives what the adapter's model gave when it was trained.

        The adapter runs in a bank of its own, so that nothing waits for it. An engine of TensorRT, which has its own
        shapes, is left out, and a graph with a pooling, which does not give what was recorded.
        """
        backend, _ = self._open()
        if not isinstance(backend, OrtBackend) or self.bundle.pooling:
            return
        tensors = {}
        for tensor, row in rows.items():
            tensors[tensor] = backend.zeros((2, *row.shape), row.dtype)
            backend.write(tensors[tensor], 1, row)
        taken = {spec.name for spec in self.bundle.inputs}
        try:
            feeds, batch = _check_inputs(self.bundle.inputs, {n: a for n, a in probe.inputs.items() if n in taken})
            if self.bundle.cache is not None:
                feeds |= _without_past(self.bundle.cache, feeds)
            outputs = backend.run(feeds | selection_inputs([[(1, 1.0)]] * batch), tensors)
        except SdctError as problem:
            raise BaseMismatchError(
                f"adapter {name!r}: this bundle does not run on what the adapter's model ran on when it was saved "
                f"({problem}); export a bundle from the model it was trained on"
            ) from problem
        error, limit = self.bundle.comparable(probe).difference(outputs), self.bundle.training_limit(probe.dtype)
        if not error <= limit:
            raise BaseMismatchError(
                f"adapter {name!r} gives other outputs in this bundle than when it was trained (off by {error:.1e} of "
                f"their size, limit {limit:.0e}): some weight that it does not change is another one; export a bundle "
                "from the model it was trained on"
            )

    def _check_graph(self, backend: Backend[Any], layout: Layout) -> None:
        """Raise `AdapterFormatError` unless the graph has the inputs, outputs and bank that the description says."""
        inputs = {spec.name: spec for spec in self.bundle.inputs}
        if self.bundle.kind == "multi":
            blend = (contract.BATCH, contract.BLEND)
            inputs[contract.ADAPTER_IDS] = TensorSpec(contract.ADAPTER_IDS, "int32", blend)
            inputs[contract.ADAPTER_SCALES] = TensorSpec(contract.ADAPTER_SCALES, "float32", blend)
            inputs |= {n: TensorSpec(n, dtype.name, (contract.SLOTS, *shape)) for n, (dtype, shape) in layout.items()}
        outputs = {spec.name: spec for spec in self.bundle.outputs}
        if (cache := self.bundle.cache) is not None:
            token = (contract.BATCH, "sequence")
            if cache.position_ids:
                inputs[contract.POSITION_IDS] = TensorSpec(contract.POSITION_IDS, "int64", token)
            part = (contract.BATCH, cache.kv_heads, "past", cache.head_size)
            inputs |= {name: TensorSpec(name, cache.dtype, part) for name in cache.pasts}
            outputs |= {name: TensorSpec(name, cache.dtype, part) for name in cache.presents}
        differ = sorted(set(inputs) ^ set(backend.inputs)) + sorted(set(outputs) ^ set(backend.outputs))
        if differ:
            self._disagree(differ[0], "which only one of them has")
        for name, found in (backend.graph or {}).items():
            told = inputs.get(name) or outputs[name]
            if (found.dtype, _extents(found)) != (told.dtype, _extents(told)):
                self._disagree(name, f"{_format(told)} in the description, {_format(found)} in the model")

    def _disagree(self, name: str, how: str) -> NoReturn:
        raise AdapterFormatError(
            f"{self.bundle.path}: the model and its description disagree about {name!r}, {how}; "
            "export the bundle again"
        )


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")


def _extents(spec: TensorSpec) -> tuple[int | None, ...]:
    """The shape with symbolic dimensions as None, whatever their names."""
    return tuple(extent if isinstance(extent, int) else None for extent in spec.shape)


def _format(spec: TensorSpec) -> str:
    return f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"


_FORKED = (
    "this process was forked after the model was loaded, and neither ONNX Runtime's threads nor a CUDA context "
    "survive that; load the model in the child, or start workers with multiprocessing's 'spawn'"
)
_models: weakref.WeakSet[MultiAdapterModel] = weakref.WeakSet()
_inherited: list[object] = []  # what a forked child must not free


def _refuse_in_child() -> None:
    for model in list(_models):
        _inherited.append(model._parts)
        model._give_up(_FORKED)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_refuse_in_child)


@functools.cache  # once a process and device
def _warn_of_the_portable_body(device: str) -> None:
    warnings.warn(
        f"adapters run through the portable function in the ONNX file, which is right but slower: "
        f"{native.why_no_operator(device)}",
        stacklevel=3,
    )


def _without_past(cache: contract.Cache, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs of the first step beside the tokens and their mask: positions, and a cache without tokens."""
    places = np.maximum(np.cumsum(feeds[contract.ATTENTION_MASK] != 0, axis=1) - 1, 0)
    empty = np.zeros((len(places), cache.kv_heads, 0, cache.head_size), DTYPE_NAMES[cache.dtype])
    positions = {contract.POSITION_IDS: places.astype(np.int64)} if cache.position_ids else {}
    return positions | dict.fromkeys(cache.pasts, empty)


def _pads_before_a_token(mask: Array) -> bool:
    """Whether a row of `mask [batch, tokens]` has padding before one of its tokens."""
    return bool((np.diff((mask != 0).astype(np.int8), axis=1) > 0).any())


def _unpadded(feeds: Mapping[str, Array], run: Callable[[Mapping[str, Array]], dict[str, Array]]) -> dict[str, Array]:
    """What `run` gives for the same tokens with all padding behind them, each at the place its token had."""
    order = np.argsort(feeds[contract.ATTENTION_MASK] == 0, axis=1, kind="stable")
    outputs = run({name: np.take_along_axis(array, order, 1) for name, array in feeds.items()})
    back = np.argsort(order, axis=1)[:, :, None]
    return {
        name: np.take_along_axis(array, back, 1) if array.shape[:2] == order.shape else array
        for name, array in outputs.items()
    }


def _check_inputs(
    specs: Sequence[TensorSpec], inputs: Mapping[str, Array], max_tokens: int | None = None
) -> tuple[dict[str, Array], int]:
    """The inputs as arrays of the dtypes the model wants, and the batch size."""
    names = [spec.name for spec in specs]
    takes = ", ".join(f"{name} (optional)" if name in contract.OPTIONAL_INPUTS else name for name in names)
    for name in inputs:
        if name not in names:
            hint = "; choose adapters with run(..., adapters=...)" if name.startswith(("adapter_", "sdct.")) else ""
            raise ConfigError(f"unknown input {name!r}; this model takes {takes}{hint}")
    sizes: dict[str, tuple[int, str]] = {}
    feeds: dict[str, Array] = {}
    for spec in specs:
        if spec.name not in inputs and spec.name in contract.OPTIONAL_INPUTS and "input_ids" in inputs:
            inputs = {**inputs, spec.name: np.zeros(np.shape(inputs["input_ids"]), spec.dtype)}
        if spec.name not in inputs:
            raise ConfigError(f"input {spec.name!r} is missing; this model takes {takes}")
        array = _cast(spec, inputs[spec.name])
        shape = f"[{', '.join(map(str, spec.shape))}]"
        if array.ndim != len(spec.shape) or 0 in array.shape:
            raise ConfigError(
                f"input {spec.name!r} must have shape {shape} with no empty dimension; got {list(array.shape)}"
            )
        for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
            if isinstance(dim, int):
                wanted, source = dim, "the model"
            else:
                wanted, source = sizes.setdefault(dim, (size, f"input {spec.name!r}"))
            if size != wanted:
                raise ConfigError(
                    f"input {spec.name!r} has shape {list(array.shape)}, expected {shape}: dimension {axis} is "
                    f"{size}, but {source} has {wanted}"
                )
        if array.dtype.kind == "i" and (smallest := int(array.min())) < 0:  # ONNX counts from the end of a table
            raise ConfigError(f"input {spec.name!r} holds {smallest}; token ids and masks must not be negative")
        feeds[spec.name] = array
    if max_tokens is not None and "input_ids" in feeds and (tokens := feeds["input_ids"].shape[1]) > max_tokens:
        raise ConfigError(
            f"the rows have {tokens} tokens, this model takes at most {max_tokens}; cut or split the texts"
        )
    batch = sizes.get(contract.BATCH)
    return feeds, batch[0] if batch else feeds[names[0]].shape[0]


def _cast(spec: TensorSpec, value: object) -> Array:
    target = np.dtype(spec.dtype)
    try:
        array: Array = np.asarray(value)
    except (ValueError, TypeError):
        raise ConfigError(f"input {spec.name!r} is not a rectangular array of numbers") from None
    if array.dtype == target:
        return array
    whole = array.dtype.kind in "iu" and target.kind in "iu" and array.size > 0
    if whole and np.iinfo(target).min <= array.min() and array.max() <= np.iinfo(target).max:
        return array.astype(target)
    if np.can_cast(array.dtype, target, "safe") or (array.dtype.kind == "f" and target.kind == "f"):
        with np.errstate(over="ignore"):
            return array.astype(target)
    raise ConfigError(
        f"input {spec.name!r} must be {spec.dtype}; it is {array.dtype}, which does not convert without loss"
    )
