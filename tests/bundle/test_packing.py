"""`pack` against a plain loop, and its refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import CAPACITY, GROUPS, LABELS, OUT, SHAPES, WEIGHTS, D, V, make_adapter, write_bundle

from sdct_export import contract
from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.config import SdctConfig
from sdct_export.adapter.entries import SdctEntries
from sdct_export.base.identity import base_hash
from sdct_export.bundle.description import Bundle
from sdct_export.bundle.packing import bank_layout, label_count, pack
from sdct_export.errors import BaseMismatchError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(write_bundle(tmp_path_factory.mktemp("packing") / "bundle"))


@pytest.mark.parametrize("seed", range(8))
def test_rows_follow_the_contract(bundle: Bundle, seed: int) -> None:
    adapter = make_adapter(seed, labels=[None, 1, 3, LABELS][seed % 4], scaling=0.3 + seed)
    rows = pack(bundle, adapter)
    assert {n: (a.dtype, a.shape) for n, a in rows.items()} == bank_layout(bundle)
    for group in GROUPS:
        values, indices = rows[contract.values_name(group.name)], rows[contract.indices_name(group.name)]
        want_values, want_indices = [], []
        for module in group.modules:
            entries = adapter.modules[module]
            cells = sorted(zip(entries.indices.tolist(), entries.values.tolist(), strict=True))
            pad = CAPACITY[module] - len(cells)
            want_values += [np.float32(v * adapter.config.scaling) for _, v in cells] + [np.float32(0)] * pad
            want_indices += [c for c, _ in cells] + [cells[-1][0]] * pad
        assert values.tolist() == [float(v) for v in want_values]
        assert indices.tolist() == want_indices
    weight, bias, present = (rows[name] for name in contract.head_names("classifier"))
    labels = label_count(bundle, adapter)
    if labels is None:
        assert not weight.any()
        assert not bias.any()
        assert present == 0
    else:
        np.testing.assert_array_equal(weight[:labels], adapter.saved["classifier.weight"])
        np.testing.assert_array_equal(bias[:labels], adapter.saved["classifier.bias"])
        assert not weight[labels:].any()
        assert (bias[labels:] == np.finfo(np.float32).min / 2).all()
        assert present == 1


def test_modules_an_adapter_does_not_touch_get_empty_rows(bundle: Bundle) -> None:
    rows = pack(bundle, make_adapter(1, n={"block.v": 2}))
    start = CAPACITY["block.q"]
    values, indices = rows["sdct.block.q+v.values"], rows["sdct.block.q+v.indices"]
    assert not values[:start].any()
    assert not indices[:start].any()
    assert values[start : start + 2].all()
    assert not rows["sdct.block.o.values"].any()


def test_a_full_module_has_no_padding(bundle: Bundle) -> None:
    rows = pack(bundle, make_adapter(1, n=CAPACITY))
    assert all(rows[contract.values_name(g.name)].all() for g in GROUPS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_base_hash_compares_over_any_subset_and_dtype(bundle: Bundle, dtype: str) -> None:
    for modules in (["block.q"], ["block.v", "block.o"], list(SHAPES)):
        adapter = make_adapter(1, n=dict.fromkeys(modules, 2))
        shapes = {m: SHAPES[m] for m in modules}
        right = base_hash(WEIGHTS.__getitem__, shapes, dtype)
        pack(bundle, dataclasses.replace(adapter, base_hash=right, base_dtype=dtype))
        wrong = base_hash(lambda m: WEIGHTS[m] * np.float32(1.01), shapes, dtype)
        with pytest.raises(BaseMismatchError, match=r"adapter 'x' was trained on other base weights \(hash differs"):
            pack(bundle, dataclasses.replace(adapter, base_hash=wrong, base_dtype=dtype), label="adapter 'x'")
        pack(bundle, dataclasses.replace(adapter, base_hash=None))


def entries(n: int, shape: tuple[int, int] | None, offset: int = 0) -> SdctEntries:
    indices = np.stack([np.arange(n) + offset, np.zeros(n)], axis=1).astype(np.int32)
    return SdctEntries(np.ones(n, np.float32), indices, shape)


HEAD = {"classifier.weight": np.ones((2, OUT), np.float32), "classifier.bias": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("modules", "saved", "scaling", "message"),
    [
        (
            {"block.q": entries(7, SHAPES["block.q"])},
            {},
            1.0,
            r"7 coefficients in module 'block.q'.*at most 6; export",
        ),
        ({"block.k": entries(2, (V, D))}, {}, 1.0, r"module 'block.k', for which the bundle has no bank.*block\.o"),
        ({"block.v": entries(2, (8, D))}, {}, 1.0, r"'block.v' is 7 x 13 in the base but .* trained on 8 x 13"),
        ({"block.v": entries(2, None, offset=6)}, {}, 1.0, r"'block.v' is 7 x 13 in the base but .* up to \(7, 0\)"),
        ({"block.v": entries(2, SHAPES["block.v"])}, {}, 1e39, r"'block.v' times scaling 1e\+39 overflow float32"),
        ({}, {"pooler.weight": np.ones((2, OUT), np.float32)}, 1.0, r"'pooler.weight'.*heads: classifier"),
        (
            {},
            {"classifier.scale": np.ones(2, np.float32)},
            1.0,
            r"'classifier.scale', for which the bundle has no bank",
        ),
        ({}, {"classifier.bias": HEAD["classifier.bias"]}, 1.0, r"bias of 'classifier' but not its weight"),
        (
            {},
            {"classifier.weight": np.ones((5, OUT), np.float32)},
            1.0,
            r"5 labels in 'classifier'.*at most 4",
        ),
        ({}, {"classifier.weight": np.ones((2, 3), np.float32)}, 1.0, r"weight \[2, 3\].*expects \[labels, 9\]"),
        ({}, HEAD | {"classifier.bias": np.ones(3, np.float32)}, 1.0, r"bias \[3\].*expects \[labels, 9\]"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    bundle: Bundle, modules: dict[str, SdctEntries], saved: dict[str, np.ndarray], scaling: float, message: str
) -> None:
    adapter = SdctAdapter(SdctConfig(scaling=scaling, modules_to_save=["classifier", "pooler"]), modules, saved)
    with pytest.raises(BaseMismatchError, match=rf"^adapter 'x'.*{message}"):
        pack(bundle, adapter, label="adapter 'x'")


def test_a_bundle_without_heads_refuses_a_saved_module(tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "bundle", head=False))
    with pytest.raises(BaseMismatchError, match=r"heads: none\); export the bundle again"):
        pack(bundle, make_adapter(1, labels=2))


def test_heads_are_stored_in_the_dtype_of_the_model(bundle: Bundle) -> None:
    half = dataclasses.replace(bundle, dtype="float16")
    adapter = make_adapter(1, labels=2)
    weight, bias, present = (pack(half, adapter)[name] for name in contract.head_names("classifier"))
    assert (weight.dtype, bias.dtype, present.dtype) == (np.float16, np.float16, np.float32)
    np.testing.assert_array_equal(weight[:2], adapter.saved["classifier.weight"].astype(np.float16))
    assert (bias[2:] == np.finfo(np.float16).min / 2).all()
    huge = SdctAdapter(adapter.config, {}, {"classifier.weight": np.full((2, OUT), 1e5, np.float32)})
    with pytest.raises(BaseMismatchError, match=r"'classifier' overflows float16.*float32"):
        pack(half, huge)
