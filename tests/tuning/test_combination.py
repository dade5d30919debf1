"""Combining: weight changes against their weighted sum in torch, heads against numpy, and what must be refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import FAMILIES
from make_adapters import golden, random_adapter
from references import delta_weight, relative_error

from sdct_export import SdctAdapter, SdctConfig, SdctModel, combine, export_multi, get_sdct_model
from sdct_export.adapter.entries import SdctEntries
from sdct_export.cli import main
from sdct_export.errors import BaseMismatchError, ConfigError, SdctError
from sdct_export.verify import verify

SHAPES = {"a.q": (13, 7), "a.v": (9, 16)}
FAMILY = FAMILIES["bert-classifier"]
IDS = torch.tensor([[5, 17, 40, 3, 22, 71, 9], [90, 2, 2, 61, 8, 33, 14]])


def scaled(adapter: SdctAdapter, scaling: float) -> SdctAdapter:
    return dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, scaling=scaling))


def three() -> list[SdctAdapter]:
    """Other numbers of coefficients, modules, scalings and types."""
    return [
        scaled(random_adapter(SHAPES, 20, seed=0), 0.5),
        scaled(random_adapter({"a.q": (13, 7), "b.o": (5, 4)}, 11, seed=1, dtype=np.float16), -3.0),
        random_adapter({"a.q": (13, 7), "a.v": (9, 16)}, 33, seed=2, dtype=ml_dtypes.bfloat16),
    ]


def change(adapter: SdctAdapter, path: str, shape: tuple[int, int]) -> Any:
    entries = adapter.modules.get(path)
    if entries is None:
        return np.zeros(shape)
    return delta_weight(entries.values, entries.indices, shape, adapter.config.scaling)


def test_the_sum_is_the_weighted_sum_of_the_weight_changes() -> None:
    adapters, weights = three(), [0.25, 2.0, -1.5]
    combined, report = combine(adapters, weights)
    assert combined.config.scaling == 1.0
    assert set(combined.modules) == {"a.q", "a.v", "b.o"}
    for path, entries in combined.modules.items():
        assert entries.shape is not None
        want = sum(w * change(a, path, entries.shape) for a, w in zip(adapters, weights, strict=True))
        assert relative_error(combined.delta_weight(path).numpy(), want) < 1e-6
        assert report.modules[path].energy == pytest.approx(float((want**2).sum()), rel=1e-9)
        places = {tuple(p) for a in adapters if path in a.modules for p in a.modules[path].indices.tolist()}
        assert report.modules[path].n == report.modules[path].n_exact == entries.n == len(places)
    assert report.retained_energy == pytest.approx(1.0)


@pytest.mark.parametrize("n", [1, 7, 25])
def test_the_best_coefficients_are_those_that_leave_the_smallest_error(n: int) -> None:
    adapters = three()
    exact, _ = combine(adapters)
    best, report = combine(adapters, n_coefficients=n)
    total = left = 0.0
    for path, entries in best.modules.items():
        want = exact.delta_weight(path).double().numpy()
        figures = report.modules[path]
        magnitudes = np.sort(np.abs(exact.modules[path].values.astype(np.float64)))
        error = float(((best.delta_weight(path).numpy() - want) ** 2).sum())
        assert error == pytest.approx(float((magnitudes[: max(0, len(magnitudes) - n)] ** 2).sum()), abs=1e-4)
        assert figures.retained_energy == pytest.approx(1 - error / figures.energy, abs=1e-5)
        assert entries.n == figures.n == min(n, figures.n_exact)
        total, left = total + figures.energy, left + error
    assert report.energy == pytest.approx(total)
    assert report.retained_energy == pytest.approx(1 - left / total, abs=1e-5)


def test_one_adapter_is_scaled_and_two_equal_ones_average_to_themselves() -> None:
    adapter = random_adapter(SHAPES, 20)
    third = combine([adapter], [1 / 3]).adapter
    same = combine([adapter, adapter], [0.5, 0.5]).adapter
    for path, entries in adapter.modules.items():
        assert np.array_equal(third.modules[path].values, (entries.values.astype(np.float64) / 3).astype(np.float32))
        assert np.array_equal(same.modules[path].values, entries.values)
        assert np.array_equal(same.modules[path].indices, entries.indices)


def test_heads_are_averaged_whatever_the_weights_sum_to() -> None:
    one = golden()
    other = dataclasses.replace(one, saved={name: array * -3 + 1 for name, array in one.saved.items()})
    combined, report = combine([one, other], [3.0, 1.0])
    assert report.saved_weights == (0.75, 0.25)
    for name, array in one.saved.items():
        assert np.allclose(combined.saved[name], 0.75 * array + 0.25 * (array * -3 + 1), atol=1e-7)
    query = "encoder.layer.0.attention.self.query"
    assert relative_error(combined.delta_weight(query).numpy(), 4 * one.delta_weight(query).numpy()) < 1e-6
    assert combined.base_hash == one.base_hash
    assert combined.config.modules_to_save == ("classifier",)


def replaced(adapter: SdctAdapter, **fields: Any) -> SdctAdapter:
    return dataclasses.replace(adapter, **fields)


REFUSED: dict[str, tuple[Any, type[SdctError], str]] = {
    "no adapters": (lambda g: ([], None), ConfigError, "at least one"),
    "a folder": (lambda g: (g, None), ConfigError, "give a list"),
    "weights of another number": (lambda g: ([g, g], [1.0]), ConfigError, "2 adapters and 1 weights"),
    "a weight that is no number": (lambda g: ([g, g], [1.0, float("nan")]), ConfigError, "must be a finite number"),
    "weights too large": (lambda g: ([g], [1e40]), ConfigError, "beyond the range of float32"),
    "other base weights": (
        lambda g: ([g, replaced(g, base_hash="sha256:" + "f" * 64)], None),
        BaseMismatchError,
        "different base weights",
    ),
    "a hash in another type": (
        lambda g: ([g, replaced(g, base_dtype="bfloat16")], None),
        BaseMismatchError,
        "cannot tell whether they have the same base; give the base",
    ),
    "other modules": (
        lambda g: ([g, replaced(g, modules=dict([*g.modules.items()][:1]))], None),
        BaseMismatchError,
        "cannot tell whether they have the same base; give the base",
    ),
    "another task": (
        lambda g: ([g, replaced(g, config=dataclasses.replace(g.config, task_type="TOKEN_CLS"))], None),
        BaseMismatchError,
        "another task_type",
    ),
    "no head": (lambda g: ([g, replaced(g, saved={})], None), ConfigError, "adapter 1 saves 'classifier.bias'"),
    "a head of another size": (
        lambda g: ([g, replaced(g, saved={n: np.concatenate([a, a]) for n, a in g.saved.items()})], None),
        ConfigError,
        "heads of different sizes",
    ),
    "weights that sum to 0": (lambda g: ([g, g], [1.0, -1.0]), ConfigError, "sum to 0"),
    "nothing left": (
        lambda g: ([replaced(g, saved={}), replaced(g, saved={})], [1.0, -1.0]),
        ConfigError,
        "cancel out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined(case: str) -> None:
    make, kind, message = REFUSED[case]
    adapters, weights = make(golden())
    with pytest.raises(kind, match=message):
        combine(adapters, weights)


def test_a_module_of_another_shape() -> None:
    with pytest.raises(BaseMismatchError, match=r"'a\.q' is 13 x 7 in adapter 1 and 13 x 8 in adapter 2"):
        combine([random_adapter({"a.q": (13, 7)}, 5), random_adapter({"a.q": (13, 8)}, 5)])


# with a base


def trained(seed: int, labels: dict[int, str] | None = None, targets: list[str] | None = None) -> SdctAdapter:
    torch.manual_seed(seed)
    base = FAMILY.model()
    if labels is not None:
        base.config.id2label = labels
    config = SdctConfig(
        target_modules=targets or FAMILY.targets,
        n_coefficients=40 + seed,
        modules_to_save=FAMILY.saved,
        scaling=0.5 + seed,
    )
    model = get_sdct_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model.adapter()


def test_the_record_keeps_class_and_labels_and_has_no_probe_without_a_base() -> None:
    one, other = trained(0), trained(1)
    assert one.trained_on is not None
    combined = combine([one, other], [0.5, 0.5]).adapter
    assert combined.trained_on == dataclasses.replace(one.trained_on, probe=None)
    assert combined.base_hash == one.base_hash
    labels = {i: f"label {i}" for i in range(len(one.saved["classifier.bias"]))}
    named = trained(2, labels)
    assert combine([one, named]).adapter.trained_on.id2label == tuple(labels.values())  # type: ignore[union-attr]
    with pytest.raises(BaseMismatchError, match="another list of labels"):
        combine([named, trained(3, {i: f"other {i}" for i in labels})])
    record = dataclasses.replace(one.trained_on, model_class="transformers:Other")
    with pytest.raises(BaseMismatchError, match="another model class"):
        combine([other, replaced(one, trained_on=record)])
    assert one.trained_on.model_config is not None
    record = dataclasses.replace(
        one.trained_on, model_config=dict(one.trained_on.model_config) | {"num_attention_heads": 2}
    )
    with pytest.raises(BaseMismatchError, match="another num_attention_heads"):
        combine([other, replaced(one, trained_on=record)])
    assert one.trained_on.weights is not None
    sums = dict(one.trained_on.weights.sums)
    sums[next(iter(sums))] += 1
    record = dataclasses.replace(one.trained_on, weights=dataclasses.replace(one.trained_on.weights, sums=sums))
    with pytest.raises(BaseMismatchError, match="bases with other weights beside the adapted ones"):
        combine([other, replaced(one, trained_on=record)])
    half = dataclasses.replace(one.trained_on.weights, dtype="float16")
    record = dataclasses.replace(one.trained_on, weights=half)
    assert combine([other, replaced(one, trained_on=record)]).adapter.trained_on.weights is None  # type: ignore[union-attr]


def test_on_a_base_the_combination_is_recorded_and_exports(tmp_path: Path) -> None:
    FAMILY.model().save_pretrained(tmp_path / "base")
    query = trained(1, targets=["query"])
    adapters = [trained(0), query]
    with pytest.raises(BaseMismatchError, match="give the base"):
        combine(adapters)
    combined, report = combine(adapters, [0.5, 0.5], base=tmp_path / "base")
    assert combined.trained_on is not None
    assert combined.trained_on.probe is not None
    # in torch: the mean of weights and heads
    base = FAMILY.model()
    mean = FAMILY.model()
    with torch.no_grad():
        for path in combined.modules:
            for adapter in adapters:
                if path in adapter.modules:
                    mean.get_submodule(path).weight.add_(0.5 * adapter.delta_weight(path))
        for name in combined.saved:
            mean.get_parameter(name).copy_(sum(0.5 * torch.from_numpy(a.saved[name].copy()) for a in adapters))
        want, before = mean(input_ids=IDS).logits, base(input_ids=IDS).logits
        got = SdctModel.from_adapter(base, combined)(input_ids=IDS).logits
    assert relative_error(got.numpy(), want.numpy()) < 1e-5
    assert relative_error(got.numpy(), before.numpy()) > 0.1
    assert report.modules[next(iter(query.modules))].n_exact > 41
    combined.save(tmp_path / "mean")
    export_multi(tmp_path / "base", {"mean": tmp_path / "mean"}, tmp_path / "bundle")
    assert verify(tmp_path / "bundle", tmp_path / "base").ok

    other = FAMILY.model()
    with torch.no_grad():
        other.get_submodule(next(iter(query.modules))).weight.add_(0.1)
    with pytest.raises(BaseMismatchError, match="adapter 1 was trained on other base weights"):
        combine(adapters, base=other)


# the shell


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(main, ["combine", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_command(tmp_path: Path) -> None:
    adapters = [trained(0), trained(1)]
    names = [tmp_path / "one:2=3", tmp_path / "two"]  # a folder may have either sign in its name
    for adapter, name in zip(adapters, names, strict=True):
        adapter.save(name)
    report = json.loads(run(names[0], f"{names[1]}:-0.25", "--output", tmp_path / "sum", "--json").stdout)
    assert report["weights"] == [1.0, -0.25]
    assert report["retained_energy"] == 1.0
    assert report["probe"] is False
    want, _ = combine(adapters, [1.0, -0.25])
    got = SdctAdapter.load(tmp_path / "sum")
    assert [*got.modules] == [*want.modules]
    for path, entries in want.modules.items():
        assert np.array_equal(got.modules[path].values, entries.values)

    FAMILY.model().save_pretrained(tmp_path / "base")
    out = ["--output", tmp_path / "few", "--model", tmp_path / "base"]
    text = run(f"{names[0]}=0.5", f"{names[1]}=0.5", "--n-coefficients", 20, *out).stdout
    assert "averaged with weights 0.5, 0.5: classifier.bias, classifier.weight" in text
    few, figures = combine(adapters, [0.5, 0.5], n_coefficients=20)
    assert f"energy {figures.energy:.4g}, kept {figures.retained_energy:.1%}" in text
    assert figures.retained_energy < 0.9
    assert "no probe" not in text
    assert SdctAdapter.load(tmp_path / "few").trained_on.probe is not None  # type: ignore[union-attr]
    assert all(entries.n == 20 for entries in few.modules.values())


def test_the_command_refuses(tmp_path: Path) -> None:
    golden().save(tmp_path / "a")
    out = ["--output", tmp_path / "out"]
    assert "must be a finite number" in run(f"{tmp_path / 'a'}:nan", *out, code=1).stderr
    assert "must be a finite number" in run(f"{tmp_path / 'a'}=inf", *out, code=1).stderr
    assert "b=x is not a folder" in run(tmp_path / "a", tmp_path / "b=x", *out, code=1).stderr
    assert "b:x is not a folder" in run(tmp_path / "a", tmp_path / "b:x", *out, code=1).stderr
    assert "exists" in run(tmp_path / "a", "--output", tmp_path / "a", code=1).stderr
    assert "give the base with --model" in run(tmp_path / "a", *out, "--model-class", "m:C", code=2).stderr
    assert not (tmp_path / "out").exists()


def test_without_a_base_no_torch_is_loaded(tmp_path: Path) -> None:
    golden().save(tmp_path / "a")
    use = f"import sys, sdct_export\nsdct_export.combine([{str(tmp_path / 'a')!r}] * 2)\n"
    code = use + "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_entries_without_a_shape_take_the_one_that_is_known() -> None:
    known = random_adapter({"a.q": (13, 7)}, 5)
    entries = known.modules["a.q"]
    unknown = replaced(known, modules={"a.q": SdctEntries(entries.values, entries.indices)})
    assert combine([unknown, known]).adapter.modules["a.q"].shape == (13, 7)
    assert combine([unknown]).adapter.modules["a.q"].shape is None
