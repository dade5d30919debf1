"""An adapter as the rows of one bank slot, laid out as `contract` says, after checking that it fits. numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .. import contract
from ..adapter.adapter import SdctAdapter
from ..adapter.entries import DTYPE_NAMES, Array, check_fit
from ..adapter.training import check_class, config_differences
from ..base.identity import combine_digests
from ..contract import Head
from ..errors import BaseMismatchError
from .description import Bundle

Layout = dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]


def bank_layout(bundle: Bundle) -> Layout:
    """Every bank input of the graph: name -> (dtype, shape of one slot)."""
    layout: Layout = {}
    for group in bundle.groups:
        n = sum(group.capacity)
        layout[contract.values_name(group.name)] = (np.dtype(np.float32), (n,))
        layout[contract.indices_name(group.name)] = (np.dtype(np.int32), (n, 2))
    for head in bundle.heads:
        weight, bias, present = contract.head_names(head.module)
        dtype = DTYPE_NAMES[contract.edge_dtype(bundle.dtype)]
        layout[weight] = (dtype, (head.d_out, head.d_in))
        layout[bias] = (dtype, (head.d_out,))
        layout[present] = (np.dtype(np.float32), ())
    return layout


def most_bytes(bundle: Bundle) -> int:
    """Bytes of tensors beyond which no adapter's files can fit a slot: 4 times its rows, and never less than 64 MiB.

    Files may hold wider types than a slot. Below that an adapter is read, and `pack` says what does not fit.
    """
    row = sum(dtype.itemsize * math.prod(shape) for dtype, shape in bank_layout(bundle).values())
    return max(4 * row, 64 << 20)


def pack(bundle: Bundle, adapter: SdctAdapter, *, label: str = "the adapter") -> dict[str, Array]:
    """The contents of one slot for `adapter`: every name of `bank_layout(bundle)` -> array of that dtype and shape.

    Args:
        bundle: a multi-adapter bundle.
        adapter: the adapter; modules it does not adapt and heads it does not save get empty rows (no effect).
        label: how error messages call the adapter.

    Raises:
        BaseMismatchError: the adapter touches a module the bundle has no bank for, differs in shape, has more
            coefficients or labels than the bank holds, or was trained on another class or other base weights.
    """
    record = adapter.trained_on
    if record is not None and record.model_config is not None and bundle.model_config is not None:
        differ = config_differences(record.model_config, bundle.model_config)
        if differ:
            (field, (want, got)), *_ = differ.items()
            raise BaseMismatchError(
                f"{label} was trained on a model with {field}={want!r}, this bundle was exported from one with "
                f"{got!r}; export a bundle together with this adapter"
            )
    if record is not None and bundle.model_class is not None:
        check_class(record, bundle.model_class, label=label)
    if record is not None and record.weights is not None and record.weights.dtype in bundle.weights:
        sums = {int(key): value for key, value in bundle.weights[record.weights.dtype].items()}
        count = len(record.weights.differing(sums))
        if count:
            raise BaseMismatchError(
                f"{label} was trained on a base with {count} other tensors than this bundle was exported from; export "
                "a bundle from the base it was trained on"
            )
    _check_modules(bundle, adapter, label)
    layout = bank_layout(bundle)
    rows = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout.items()}
    for group in bundle.groups:
        values, indices = rows[contract.values_name(group.name)], rows[contract.indices_name(group.name)]
        start = 0
        for module, d_out, capacity in zip(group.modules, group.d_out, group.capacity, strict=True):
            entries = adapter.modules.get(module)
            if entries is not None:
                try:
                    check_fit(module, entries, (d_out, group.d_in))
                except BaseMismatchError as error:
                    raise BaseMismatchError(f"{label}: {error}") from None
                if entries.n > capacity:
                    raise BaseMismatchError(
                        f"{label} has {entries.n} coefficients in module {module!r}, the bundle holds at most "
                        f"{capacity}; export the bundle again together with this adapter"
                    )
                order = np.lexsort((entries.indices[:, 1], entries.indices[:, 0]))
                with np.errstate(over="ignore"):
                    scaled = entries.float32(adapter.config.scaling)[order]
                if not np.isfinite(scaled).all():
                    raise BaseMismatchError(
                        f"{label}: the coefficients of module {module!r} times scaling {adapter.config.scaling} "
                        "overflow float32; lower scaling"
                    )
                values[start : start + entries.n] = scaled
                indices[start : start + entries.n] = entries.indices[order]
                indices[start + entries.n : start + capacity] = entries.indices[order[-1]]
            start += capacity
    for head in bundle.heads:
        _pack_head(head, adapter.saved, rows, label)
    return rows


def label_count(bundle: Bundle, adapter: SdctAdapter) -> int | None:
    """Labels of the adapter's own head (rows of the last banked module it saves), None where it saves none."""
    sizes = [
        adapter.saved[f"{h.module}.weight"].shape[0] for h in bundle.heads if f"{h.module}.weight" in adapter.saved
    ]
    return int(sizes[-1]) if sizes else None


def _check_modules(bundle: Bundle, adapter: SdctAdapter, label: str) -> None:
    known = {module for group in bundle.groups for module in group.modules}
    for module in adapter.modules:
        if module not in known:
            raise BaseMismatchError(
                f"{label} adapts module {module!r}, for which the bundle has no bank (it has {len(known)} modules, "
                f"e.g. {', '.join(sorted(known)[:2])}); use a bundle of the adapter's base, or export it "
                "again together with this adapter"
            )
    heads = {head.module for head in bundle.heads}
    for name in adapter.saved:
        module, _, kind = name.rpartition(".")
        if module not in heads or kind not in ("weight", "bias"):
            raise BaseMismatchError(
                f"{label} stores {name!r}, for which the bundle has no bank (its heads: "
                f"{', '.join(sorted(heads)) or 'none'}); export the bundle again together with this adapter"
            )
    if adapter.base_hash is not None and adapter.modules:
        digests = bundle.module_digests[adapter.base_dtype or "float32"]
        found = combine_digests({module: digests[module] for module in adapter.modules})
        if found != adapter.base_hash:
            raise BaseMismatchError(
                f"{label} was trained on other base weights (hash differs: {adapter.base_hash[:19]}..., this bundle's "
                f"base {bundle.base_name!r} has {found[:19]}...); export a bundle from the base it was trained on "
                f"({adapter.config.base_model_name_or_path or 'unknown'})"
            )


def _pack_head(head: Head, saved: Mapping[str, Array], rows: dict[str, Array], label: str) -> None:
    weight, bias = saved.get(f"{head.module}.weight"), saved.get(f"{head.module}.bias")
    if weight is None and bias is None:
        return
    if weight is None:
        raise BaseMismatchError(
            f"{label} stores the bias of {head.module!r} but not its weight; save the adapter again"
        )
    if weight.ndim != 2 or weight.shape[1] != head.d_in or (bias is not None and bias.shape != weight.shape[:1]):
        raise BaseMismatchError(
            f"{label}: saved module {head.module!r} has weight {list(weight.shape)} and bias "
            f"{None if bias is None else list(bias.shape)}; the bundle expects [labels, {head.d_in}] and [labels]; "
            "use a bundle of the base the adapter was trained on"
        )
    labels = weight.shape[0]
    if labels > head.d_out:
        raise BaseMismatchError(
            f"{label} has {labels} labels in {head.module!r}, the bundle holds at most {head.d_out}; "
            "export the bundle again together with this adapter"
        )
    weight_row, bias_row, present = (rows[name] for name in contract.head_names(head.module))
    with np.errstate(over="ignore"):
        weight_row[:labels] = weight.astype(weight_row.dtype)
        bias_row[:labels] = 0 if bias is None else bias.astype(bias_row.dtype)
    if not (np.isfinite(weight_row.astype(np.float32)).all() and np.isfinite(bias_row.astype(np.float32)).all()):
        raise BaseMismatchError(
            f"{label}: saved module {head.module!r} overflows {weight_row.dtype}, the dtype of the bundle; export the "
            "bundle in float32"
        )
    bias_row[labels:] = padding_bias(weight_row.dtype)
    present[...] = 1.0


def padding_bias(dtype: np.dtype[np.generic]) -> float:
    """Bias of the label columns an adapter does not have: `finfo(dtype).min / 2`."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).min) / 2
