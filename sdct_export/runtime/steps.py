"""The key-value cache of several rows in one ONNX Runtime session, and the steps that go on from it.

A cache has *slots*: a slot holds the keys and values of one row's tokens, side by side from its first column on, and
whoever uses it knows how many. A decode step computes the rows in the first slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from ..adapter.entries import DTYPE_NAMES, Array
from ..contract import ATTENTION_MASK, INPUT_IDS, LAST_LOGITS, POSITION_IDS, Cache
from ..errors import SdctError

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16

T_contra = TypeVar("T_contra", contravariant=True)


class Steps(Protocol[T_contra]):
    """A cache and its steps. One thread at a time may use it.

    What `prefill` and `decode` take of adapters is `chosen`, the inputs `adapter_ids` and `adapter_scales` of these
    rows, and `bank`, the bank tensors by input name; both are empty for a merged bundle. The mapping of a call may be
    that of an earlier one only if its arrays are, too. Logits hold until the next call. A step that raises has changed
    nothing but columns behind those in use.
    """

    slots: int
    max_length: int
    prefill_rows: int  # most rows of one `prefill`

    def prefill(
        self, first: int, rows: Sequence[Array], past: int, chosen: Mapping[str, Array], bank: Mapping[str, T_contra]
    ) -> Array:
        """Put the tokens of `rows` (int64 `[tokens]` each) behind the first `past` ones of the slots from `first` on.

        With a past there is one row.

        Returns:
            float `[rows, vocabulary]`, logits of the last token of each row.

        Raises:
            SdctError: the backend failed.
        """

    def decode(
        self, tokens: Array, lengths: Array, chosen: Mapping[str, Array], bank: Mapping[str, T_contra]
    ) -> Array:
        """Put one token behind the first `lengths[i]` ones of each slot `i`; both int64 `[rows]`.

        Returns and raises as `prefill`.
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of slot `target` those of slot `source`."""


def cache_bytes(cache: Cache, slots: int, max_length: int) -> int:
    """Bytes of the cache of so many slots, before any is made.

    With target `standard` three of them: that of the slots, and a past and a present of all rows at most.
    """
    row = 2 * cache.layers * cache.kv_heads * max_length * cache.head_size * DTYPE_NAMES[cache.dtype].itemsize
    return int(slots * row * (1 if cache.target == "ort" else 3))


@dataclasses.dataclass(frozen=True)
class Session:
    """What steps need of an `OrtBackend`: its session, where that runs, `run(binding)`, which raises `SdctError`."""

    ort: Any
    session: Any
    device: tuple[str, int]
    run: Callable[[Any], None]

    @property
    def on_cpu(self) -> bool:
        """Whether arrays of numpy are where it runs."""
        return self.device[0] == "cpu"

    @functools.cached_property
    def takes(self) -> frozenset[str]:
        """Names of the graph's inputs, those with a default as well."""
        values = (*self.session.get_inputs(), *self.session.get_overridable_initializers())
        return frozenset(value.name for value in values)

    def last(self, logits: Array, lengths: Sequence[int]) -> Array:
        """The logits of the last token of rows of these lengths, padded on the right, however many the graph gave."""
        last = np.array(lengths) - 1 if LAST_LOGITS not in self.takes else -1
        found: Array = logits[np.arange(len(logits)), last]
        return found

    def binding(self, chosen: Mapping[str, Array], bank: Mapping[str, Any]) -> Any:
        """A binding with the adapters, which gives logits of last tokens."""
        binding = self.session.io_binding()
        if LAST_LOGITS in self.takes:  # `bind_cpu_input` does not find an input that has a default
            binding.bind_ortvalue_input(LAST_LOGITS, self.ort.OrtValue.ortvalue_from_numpy(np.array([True])))
        for name, array in chosen.items():
            binding.bind_cpu_input(name, array)
        for name, tensor in bank.items():
            binding.bind_ortvalue_input(name, tensor.value)
        return binding


@dataclasses.dataclass(frozen=True)
class _Decode:
    """The binding of a decode step of so many rows, where all but the mask has its place."""

    binding: Any
    ids: Array
    places: Array
    logits: Array
    chosen: Mapping[str, Array]
    bank: Mapping[str, Any]


class SharedSteps:
    """Target `ort`: past and present of a layer are one buffer `[slots, kv_heads, max_length, head_size]`.

    A step binds the part of it that holds its rows, by address. ONNX Runtime's GroupQueryAttention neither reads a
    row's columns behind its tokens nor writes any but the new ones.

    Raises:
        MemoryError: there is no room.
    """

    def __init__(self, session: Session, cache: Cache, slots: int, max_length: int) -> None:
        self.slots, self.max_length, self.prefill_rows = slots, max_length, slots
        self._session, self._cache = session, cache
        self._dtype = np.dtype(np.uint16) if cache.dtype == "bfloat16" else np.dtype(cache.dtype)
        self._kind: Any = _BFLOAT16 if cache.dtype == "bfloat16" else self._dtype.type
        self._shape = (slots, cache.kv_heads, max_length, cache.head_size)
        self._row = self._dtype.itemsize * int(np.prod(self._shape[1:]))
        self._buffers = [_Buffer(session, self._shape, self._dtype) for _ in cache.pasts]
        self._bound: dict[int, _Decode] = {}

    def prefill(
        self, first: int, rows: Sequence[Array], past: int, chosen: Mapping[str, Array], bank: Mapping[str, Any]
    ) -> Array:
        """See `Steps`."""
        binding = self._session.binding(chosen, bank)
        self._bind_cache(binding, first, len(rows))
        for name, array in prefill_inputs(rows, past).items():
            if name in self._session.takes:
                binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu")
        self._session.run(binding)
        return self._session.last(binding.get_outputs()[-1].numpy(), [len(row) for row in rows])

    def decode(self, tokens: Array, lengths: Array, chosen: Mapping[str, Array], bank: Mapping[str, Any]) -> Array:
        """See `Steps`."""
        rows = len(tokens)
        bound = self._bound.get(rows)
        if bound is None or bound.bank is not bank:
            bound = self._bound[rows] = self._prepare(rows, chosen, bank)
        elif bound.chosen is not chosen:
            for name, array in chosen.items():
                bound.binding.bind_cpu_input(name, array)
            bound = self._bound[rows] = dataclasses.replace(bound, chosen=chosen)
        bound.ids[:, 0], bound.places[:, 0] = tokens, lengths
        mask = np.ones((rows, int(lengths.max()) + 1), np.int64)  # the last column is that of the new token
        np.less(np.arange(mask.shape[1] - 1), lengths[:, None], out=mask[:, :-1], casting="unsafe")
        self._bind(bound.binding, ATTENTION_MASK, mask)
        if not self._session.on_cpu:  # where binding copies
            self._bind(bound.binding, INPUT_IDS, bound.ids)
            self._bind(bound.binding, POSITION_IDS, bound.places)
        self._session.run(bound.binding)
        return bound.logits[:, 0]

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Steps`."""
        for buffer in self._buffers:
            buffer.copy(source, target, length)

    def _prepare(self, rows: int, chosen: Mapping[str, Array], bank: Mapping[str, Any]) -> _Decode:
        binding = self._session.binding(chosen, bank)
        self._bind_cache(binding, 0, rows)
        ids, places = np.zeros((rows, 1), np.int64), np.zeros((rows, 1), np.int64)
        self._bind(binding, INPUT_IDS, ids)
        self._bind(binding, POSITION_IDS, places)
        spec = next(output for output in self._session.session.get_outputs() if output.name == "logits")
        dtype = np.dtype({"tensor(float)": np.float32, "tensor(float16)": np.float16}[spec.type])
        logits = np.empty((rows, 1, spec.shape[-1]), dtype)
        binding.bind_output("logits", "cpu", 0, dtype.type, logits.shape, logits.ctypes.data)
        return _Decode(binding, ids, places, logits, chosen, bank)

    def _bind(self, binding: Any, name: str, array: Array) -> None:
        """Bind the array itself on the CPU, a copy elsewhere; `bind_cpu_input` copies everywhere."""
        if name not in self._session.takes:  # a graph of another tool's may count positions itself
            return
        binding.bind_ortvalue_input(name, self._session.ort.OrtValue.ortvalue_from_numpy(array))

    def _bind_cache(self, binding: Any, first: int, rows: int) -> None:
        shape = [rows, *self._shape[1:]]
        for past, present, buffer in zip(self._cache.pasts, self._cache.presents, self._buffers, strict=True):
            place = (*self._session.device, self._kind, shape, buffer.address + first * self._row)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)


class _Buffer:
    """Keys or values of a layer, `[slots, kv_heads, max_length, head_size]`, on the session's device."""

    def __init__(self, session: Session, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._shape, self._dtype = shape, dtype
        self._host: Array | None = None
        if session.on_cpu:
            self._host = np.zeros(shape, dtype)
            self.address = int(self._host.ctypes.data)
            return
        try:
            self._value = session.ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, *session.device)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise MemoryError(str(error)) from error
        self.address = int(self._value.data_ptr())

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` columns of a slot, into another."""
        if self._host is not None:
            self._host[target, :, :length] = self._host[source, :, :length]
            return
        try:
            from cuda.bindings import runtime
        except ImportError:
            host = self._value.numpy()
            host[target, :, :length] = host[source, :, :length]
            self._value.update_inplace(host)
            return
        _, heads, most, size = self._shape
        column = size * self._dtype.itemsize
        pitch, row = most * column, heads * most * column
        (status,) = runtime.cudaMemcpy2D(
            self.address + target * row, pitch, self.address + source * row, pitch, length * column, heads,
            runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
        )  # fmt: skip
        if status == runtime.cudaError_t.cudaSuccess:
            (status,) = runtime.cudaStreamSynchronize(0)
        if status != runtime.cudaError_t.cudaSuccess:
            raise SdctError(
                f"copying part of the key-value cache failed ({status.name}); check the device with nvidia-smi"
            )


def prefill_inputs(rows: Sequence[Array], past: int) -> dict[str, Array]:
    """Ids, mask and positions of `rows` behind a `past`, shorter rows padded on the right."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), past + longest), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : past + len(row)] = 1
    places = np.broadcast_to(np.arange(past, past + longest), ids.shape)
    return {INPUT_IDS: ids, ATTENTION_MASK: mask, POSITION_IDS: np.ascontiguousarray(places)}


class GrowingSteps:
    """Target `standard`: a step takes a past of all its rows, of one length, and gives a present of one column more.

    The slots lie in host memory. As long as the same rows go on, the present of a step is the past of the next, with
    padding between the tokens of shorter rows; new columns come into the slots when other rows do.

    Raises:
        MemoryError: there is no room.
    """

    def __init__(self, session: Session, cache: Cache, slots: int, max_length: int) -> None:
        self.slots, self.max_length, self.prefill_rows = slots, max_length, slots
        self._session, self._cache, self._dtype = session, cache, DTYPE_NAMES[cache.dtype]
        self._home = [np.zeros((slots, cache.kv_heads, max_length, cache.head_size), self._dtype) for _ in cache.pasts]
        self._going: _Going | None = None

    def prefill(
        self, first: int, rows: Sequence[Array], past: int, chosen: Mapping[str, Array], bank: Mapping[str, Any]
    ) -> Array:
        """See `Steps`."""
        self._bring_home()
        self._forget(first)
        pasts = [self._value(np.ascontiguousarray(h[first : first + len(rows), :, :past])) for h in self._home]
        found, presents = self._run(prefill_inputs(rows, past), pasts, chosen, bank)
        logits = self._session.last(found, [len(row) for row in rows])
        for home, present in zip(self._home, presents, strict=True):
            new = self._array(present)[:, :, past:]
            home[first : first + len(rows), :, past : past + new.shape[2]] = new
        return logits

    def decode(self, tokens: Array, lengths: Array, chosen: Mapping[str, Array], bank: Mapping[str, Any]) -> Array:
        """See `Steps`."""
        going = self._going
        if going is None or not np.array_equal(going.starts + going.added, lengths):
            going = self._gather(lengths)
        mask = np.ones((len(tokens), going.mask.shape[1] + 1), np.int64)
        mask[:, :-1] = going.mask
        feeds = {INPUT_IDS: tokens[:, None], ATTENTION_MASK: mask, POSITION_IDS: lengths[:, None]}
        logits, presents = self._run(feeds, going.values, chosen, bank)
        self._going = dataclasses.replace(going, values=presents, mask=mask, added=going.added + 1)
        return logits[:, -1]

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Steps`."""
        self._bring_home()
        self._forget(target)
        for home in self._home:
            home[target, :, :length] = home[source, :, :length]

    def _gather(self, lengths: Array) -> _Going:
        """A past of the first slots, with padding behind the tokens of shorter rows."""
        self._bring_home()
        rows, columns = len(lengths), int(lengths.max())
        values = []
        for home in self._home:
            past = np.zeros((rows, home.shape[1], columns, home.shape[3]), self._dtype)
            for i, length in enumerate(lengths):
                past[i, :, :length] = home[i, :, :length]
            values.append(self._value(past))
        mask = (np.arange(columns) < lengths[:, None]).astype(np.int64)
        return _Going(values, mask, lengths.copy(), 0, 0)

    def _bring_home(self) -> None:
        """Columns that the rows got since they were gathered, into their slots."""
        going = self._going
        if going is None or going.home == going.added:
            return
        first = going.mask.shape[1] - going.added
        for home, value in zip(self._home, going.values, strict=True):
            present = self._array(value)
            for i, start in enumerate(going.starts):
                home[i, :, start + going.home : start + going.added] = present[i, :, first + going.home :]
        self._going = dataclasses.replace(going, home=going.added)

    def _forget(self, slot: int) -> None:
        """The rows are gathered again where one of them was in `slot`."""
        if self._going is not None and slot < len(self._going.starts):
            self._going = None

    def _run(
        self, feeds: Mapping[str, Array], pasts: list[Any], chosen: Mapping[str, Array], bank: Mapping[str, Any]
    ) -> tuple[Array, list[Any]]:
        binding = self._session.binding(chosen, bank)
        for name, array in feeds.items():
            if name in self._session.takes:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", "cpu")
        presents: list[Any] = []
        half = self._cache.dtype == "bfloat16"  # which numpy does not get out of ONNX Runtime under its own name
        for past, present, value in zip(self._cache.pasts, self._cache.presents, pasts, strict=True):
            if half:
                shape = value.shape()
                binding.bind_input(past, *self._session.device, _BFLOAT16, shape, value.data_ptr())
                shape[2] = feeds[ATTENTION_MASK].shape[1]
                presents.append(self._session.ort.OrtValue.ortvalue_from_shape_and_type(
                    shape, np.uint16, *self._session.device
                ))  # fmt: skip
                address = presents[-1].data_ptr()
                binding.bind_output(present, *self._session.device, _BFLOAT16, shape, address)
            else:
                binding.bind_ortvalue_input(past, value)
                binding.bind_output(present, *self._session.device)
        self._session.run(binding)
        logits, *made = binding.get_outputs()
        return logits.numpy(), presents or made

    def _value(self, array: Array) -> Any:
        device = () if self._session.on_cpu else self._session.device
        plain = array.view(np.uint16) if self._cache.dtype == "bfloat16" else array
        return self._session.ort.OrtValue.ortvalue_from_numpy(plain, *device)

    def _array(self, value: Any) -> Array:
        result: Array = value.numpy().view(self._dtype)
        return result


@dataclasses.dataclass(frozen=True)
class _Going:
    """Rows that go on together.

    Their pasts, the mask of these, the length of each when they were gathered, how many columns they got since, and
    how many of these lie in their slots.
    """

    values: list[Any]
    mask: Array
    starts: Array
    added: int
    home: int
