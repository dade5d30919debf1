"""Lengths of padded batches: a few lengths stand for all, so that few shapes have to be prepared on a device.

A batch of `n` tokens runs as one of the next larger length of 1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112,
128, 160, 192, 224, 256, 320, ... (from 32 on four to an octave, so at most a quarter more): the tokens that are added
are masked, and what they give is cut off. Where a model reads no mask, has other inputs of that length, or gives
anything else with masked tokens than without, lengths stay as they are. `is_harmless` is that last check, on the model
itself: a pooling that does not look at the mask, or that takes the last token, is not to be seen from the outside.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from ..adapter.entries import Array
from ..adapter.training import TOLERANCES
from ..bundle.description import PROBE_FILE, Bundle
from ..bundle.probe import Probe
from ..contract import BATCH
from ..errors import AdapterFormatError
from ..files import read_json

SEQUENCE = "sequence"  # the symbolic dimension of tokens
MASK = "attention_mask"
_PADDING = {"input_ids": None, MASK: 0, "token_type_ids": 0, "position_ids": 0}  # None: the model's padding token
_LARGEST_JSON = 16 << 20

Run = Callable[[Mapping[str, Array]], dict[str, Array]]


def bucket(length: int) -> int:
    """The length that a batch of `length` tokens runs with, see above."""
    if length <= 8:
        return 1 << (length - 1).bit_length()
    step = max(8, 1 << ((length - 1).bit_length() - 3))
    return -(-length // step) * step


@dataclasses.dataclass(frozen=True)
class Buckets:
    """How the inputs of a model are padded, and where its outputs are cut.

    `padding` maps each input `[batch, sequence]` to what it is padded with; `axes` each output to its axes of tokens;
    `longest` is the most tokens a row may have.
    """

    padding: Mapping[str, int]
    axes: Mapping[str, tuple[int, ...]]
    longest: int

    @classmethod
    def of(cls, bundle: Bundle, reads: Collection[str], longest: int) -> Buckets | None:
        """For a bundle whose graph reads these inputs, None where its lengths cannot be padded.

        Args:
            bundle: says which inputs and outputs have tokens.
            reads: the inputs that have an effect.
            longest: most tokens the engine takes.
        """
        token = {spec.name: spec.shape for spec in bundle.inputs if SEQUENCE in spec.shape}
        padded = all(name in _PADDING and shape == (BATCH, SEQUENCE) for name, shape in token.items())
        outputs = {spec.name: spec.shape for spec in bundle.outputs}
        known = all(not isinstance(d, str) or d in (BATCH, SEQUENCE) for shape in outputs.values() for d in shape)
        if MASK not in token or MASK not in reads or not padded or not known:
            return None
        fill = _padding_token(bundle)
        return cls(
            {name: fill if (value := _PADDING[name]) is None else value for name in token},
            {name: tuple(i for i, d in enumerate(shape) if d == SEQUENCE) for name, shape in outputs.items()},
            min(longest, bundle.max_tokens or longest),
        )

    def pad(self, inputs: Mapping[str, Array], length: int | None = None) -> dict[str, Array]:
        """The inputs at the length of their bucket, or at `length`."""
        tokens = inputs[MASK].shape[1]
        more = (min(bucket(tokens), self.longest) if length is None else length) - tokens
        if more <= 0:
            return dict(inputs)
        return {
            name: np.pad(array, ((0, 0), (0, more)), constant_values=self.padding[name])
            if name in self.padding
            else array
            for name, array in inputs.items()
        }

    def cut(self, outputs: Mapping[str, Array], tokens: int) -> dict[str, Array]:
        """The outputs at their real length."""
        found = {}
        for name, array in outputs.items():
            real = tuple(slice(tokens if axis in self.axes[name] else None) for axis in range(array.ndim))
            found[name] = np.ascontiguousarray(array[real]) if self.axes[name] else array
        return found

    def is_harmless(self, run: Run, inputs: Mapping[str, Array], dtype: str) -> bool:
        """Whether masked tokens change nothing in what `run` gives for `inputs`, whose mask is taken to be all ones.

        The batch is run as it is and at twice its length or more: a change that one token more would hide within
        rounding shows there.
        """
        tokens = inputs[MASK].shape[1]
        longer = min(bucket(2 * tokens), self.longest)
        if longer < 2 * tokens:
            return False
        inputs = {**inputs, MASK: np.ones_like(inputs[MASK])}
        plain, padded = run(inputs), self.cut(run(self.pad(inputs, longer)), tokens)
        return all(_are_close(plain[name], padded[name], TOLERANCES[dtype]) for name in plain)


def probe_inputs(bundle: Bundle) -> Mapping[str, Array] | None:
    """What the bundle's probe ran on, None where it has none that can be read (`verify` says why)."""
    with contextlib.suppress(AdapterFormatError):
        inputs = Probe.read(bundle.path / PROBE_FILE).inputs
        if {spec.name for spec in bundle.inputs} <= inputs.keys():
            return {spec.name: inputs[spec.name] for spec in bundle.inputs}
    return None


def _padding_token(bundle: Bundle) -> int:
    """From `config.json`. 0 where it does not say: any token does unless the model looks for this one."""
    config: dict[str, Any] = {}
    with contextlib.suppress(AdapterFormatError):
        config = read_json(bundle.path / "config.json", _LARGEST_JSON, AdapterFormatError, "export again")
    token, known = config.get("pad_token_id"), config.get("vocab_size")
    known = known if isinstance(known, int) else 2**31
    return token if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < known else 0


def _are_close(a: Array, b: Array, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.astype(np.float64), b.astype(np.float64)
    return bool(np.abs(a - b).max(initial=0) <= tolerance * np.abs(a).max(initial=0))
