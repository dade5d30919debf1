"""Lengths of padded batches: which there are, what is padded and cut, and when padding is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tensorrt
import families
import numpy as np
import pytest
import sentences
import torch
from fake_tensorrt import write_engine
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_bundle import VOCABULARY, make_adapter, make_inputs, reference, write_bundle

from sdct_export import export_multi
from sdct_export.bundle.description import PROBE_FILE, Bundle
from sdct_export.bundle.probe import Probe
from sdct_export.engine.build import Profile
from sdct_export.runtime import MultiAdapterModel
from sdct_export.runtime.buckets import MASK, Buckets, bucket

ADAPTERS = {"a": make_adapter(1, labels=3), "b": make_adapter(2)}
PROFILE = Profile(batch=(1, 2, 8), sequence=(1, 8, 40), slots=(2, 4, 8))


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_tensorrt.install(monkeypatch)


@pytest.fixture
def write(tmp_path: Path, trt: Any) -> Callable[..., Path]:
    """Writes a bundle with a probe, and its engine."""

    def write(profile: Profile = PROFILE, tokens: int = 5, **how: Any) -> Path:
        path = write_bundle(tmp_path / "bundle", ADAPTERS, **how)
        write_probe(path, tokens)
        write_engine(path, trt, profile=profile)
        return path

    return write


def write_probe(path: Path, tokens: int) -> None:
    ids = np.random.default_rng(9).integers(0, VOCABULARY, (2, tokens))
    Probe({"input_ids": ids, MASK: np.ones_like(ids)}, (), {}, {}).write(path / PROBE_FILE)


def test_a_few_lengths_stand_for_all() -> None:
    lengths = [bucket(n) for n in range(1, 4097)]
    assert all(n <= length for n, length in enumerate(lengths, 1))
    assert all(4 * length <= 5 * n for n, length in enumerate(lengths, 1) if n >= 33)
    assert lengths == sorted(lengths)
    assert all(bucket(length) == length for length in lengths)
    assert list(dict.fromkeys(lengths))[:20] == [
        1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320
    ]  # fmt: skip
    assert len(set(lengths)) == 35


def test_lengths_share_what_is_prepared_and_no_answer_changes(write: Callable[..., Path], trt: Any) -> None:
    model = MultiAdapterModel(write(), backend="tensorrt")
    trial = len(trt.engine.lengths)
    assert trt.engine.lengths == [5, 16]  # as it is, and at twice its length or more
    rows = [{"a": 1.0}, {}, {"a": 0.5, "b": -2.0}]
    for seed, tokens in enumerate([5, 6, 7, 8, 9, 13, 16, 3, 33, 40, 39]):
        inputs = make_inputs(seed, 3, tokens)
        found = model.run(inputs, rows)
        for name, expected in reference(inputs, rows, ADAPTERS).items():
            assert found[name].shape == expected.shape
            assert found[name].flags["C_CONTIGUOUS"]
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4)
    assert trt.engine.lengths[trial:] == [8, 8, 8, 8, 16, 16, 16, 4, 40, 40, 40]
    calls = [call for call in trt.cuda.calls if call in ("execute", "launch")][trial:]
    assert calls.count("execute") == 4  # one for each length


def test_a_row_has_one_answer_whatever_the_length_of_its_batch(write: Callable[..., Path]) -> None:
    model = MultiAdapterModel(write(), backend="tensorrt")
    inputs = make_inputs(1, 2, 6)
    whole = model.run(inputs, "a")
    for more in (1, 2):  # within the bucket
        padded = {name: np.pad(array, ((0, 0), (0, more))) for name, array in inputs.items()}
        found = model.run(padded, "a")
        assert np.array_equal(found["hidden"][:, :6], whole["hidden"])
        assert np.array_equal(found["logits"], whole["logits"])


def refused(path: Path, trt: Any) -> MultiAdapterModel:
    """The model of a bundle whose lengths must stay as they are; they do."""
    model = MultiAdapterModel(path, backend="tensorrt")
    assert model._open()[0].buckets is None
    before = len(trt.engine.lengths)
    for tokens in (5, 6, 9):
        model.run(make_inputs(1, 2, tokens), "a")
    assert trt.engine.lengths[before:] == [5, 6, 9]
    return model


@pytest.mark.parametrize("pool", ["all", "last"])
def test_a_model_that_looks_at_masked_tokens_is_not_padded(write: Callable[..., Path], trt: Any, pool: str) -> None:
    refused(write(pool=pool), trt)
    assert trt.engine.lengths[:2] == [5, 16]  # a trial showed it


def test_without_a_trial_there_are_no_buckets(write: Callable[..., Path], trt: Any) -> None:
    path = write()
    (path / PROBE_FILE).write_bytes(b"damaged")
    refused(path, trt)
    (path / PROBE_FILE).unlink()
    refused(path, trt)
    write_probe(path, 21)  # twice that is more than the engine takes
    refused(path, trt)


def test_a_trial_fits_the_engine(write: Callable[..., Path], trt: Any) -> None:
    path = write(Profile(batch=(3, 4, 5), sequence=(4, 8, 40), slots=(3, 4, 8), blend=(2, 2, 2)))
    assert MultiAdapterModel(path, backend="tensorrt")._open()[0].buckets is not None  # two rows were recorded
    write_engine(path, trt, profile=Profile(batch=(1, 1, 1), sequence=(4, 8, 40), slots=(2, 4, 8)))
    assert MultiAdapterModel(path, backend="tensorrt")._open()[0].buckets is not None
    write_engine(path, trt, profile=Profile(batch=(1, 1, 1), sequence=(7, 8, 40), slots=(2, 4, 8)))
    assert MultiAdapterModel(path, backend="tensorrt")._open()[0].buckets is None  # it is shorter than any request


def test_a_classifier_that_looks_for_the_last_token_is_padded_with_what_it_skips(tmp_path: Path, trt: Any) -> None:
    """Causal classifiers take the last token that is not their padding token, whatever the mask says."""
    decoder = families._decoder("LlamaConfig", num_labels=4)
    family = families.Family("last", "SEQ_CLS", decoder, "LlamaForSequenceClassification", ("q_proj", "v_proj"), ())
    base = family.model()
    adapters = {"a": families.random_adapter(family, base, 1)}
    path = tmp_path / "bundle"
    bundle = export_multi(base, adapters, path, task_type=family.task)
    write_engine(path, trt, profile=PROFILE)
    ids = np.random.default_rng(3).integers(3, 99, (3, 6))
    inputs = {"input_ids": ids, MASK: np.ones_like(ids)}
    rows = [{"a": 1.0}, {}, {"a": -0.5}]
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    expected = families.torch_rows(base, tensors, rows, adapters)["logits"]
    model = MultiAdapterModel(bundle, backend="tensorrt")
    assert model._open()[0].buckets is not None
    np.testing.assert_allclose(model.run(inputs, rows)["logits"], expected, atol=2e-4 * np.abs(expected).max())
    assert trt.engine.lengths[-1] == 8
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"pad_token_id": 5}))  # not what the graph has
    model = MultiAdapterModel(bundle, backend="tensorrt")
    assert model._open()[0].buckets is None
    np.testing.assert_allclose(model.run(inputs, rows)["logits"], expected, atol=2e-4 * np.abs(expected).max())
    assert trt.engine.lengths[-1] == 6


def test_sentence_embeddings_do_not_change(tmp_path: Path, trt: Any) -> None:
    """The pooling of the last token finds it by the mask, in the graph as in the library."""
    folder = tmp_path / "st"
    sentences.sentence_folder(folder, [Pooling(sentences.WIDTH, "lasttoken")])
    sentences.train(folder, 0)[1].save_adapter(tmp_path / "one")
    bundle = export_multi(folder, {"one": tmp_path / "one"}, tmp_path / "bundle")
    write_engine(bundle.path, trt, profile=PROFILE)
    running = MultiAdapterModel(bundle, backend="tensorrt")
    model = SentenceTransformer(str(folder), device="cpu")
    tokens = model.preprocess(["a b c d", "h g f e"])
    given = {name: tokens[name].numpy() for name in ("input_ids", MASK)}
    expected = model.encode(["a b c d", "h g f e"])
    np.testing.assert_allclose(running.run(given)["sentence_embedding"], expected, atol=1e-4 * np.abs(expected).max())
    assert (given["input_ids"].shape[1], trt.engine.lengths[-1]) == (6, 8)


def change(path: Path, **fields: Any) -> Bundle:
    description = json.loads((path / "sdct_bundle.json").read_text())
    description.update(fields)
    (path / "sdct_bundle.json").write_text(json.dumps(description))
    return Bundle.load(path)


def test_what_cannot_be_padded(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle")
    bundle = Bundle.load(path)
    reads = ["input_ids", MASK]
    found = Buckets.of(bundle, reads, 40)
    assert found == Buckets({"input_ids": 0, MASK: 0}, {"hidden": (1,), "logits": ()}, 40)
    assert Buckets.of(bundle, ["input_ids"], 40) is None  # the engine has no use for the mask
    token = ["batch", "sequence"]
    ids = {"name": "input_ids", "dtype": "int64", "shape": token}
    mask = {"name": MASK, "dtype": "int64", "shape": token}
    for inputs in (
        [ids],
        [ids, {**mask, "shape": ["batch", 1, "sequence", "sequence"]}],
        [ids, mask, {"name": "bbox", "dtype": "int64", "shape": [*token, 4]}],
        [ids, mask, {"name": "labels", "dtype": "int64", "shape": token}],
    ):
        assert Buckets.of(change(path, inputs=inputs), reads, 40) is None
    plain = [ids, mask, {"name": "pixels", "dtype": "float32", "shape": ["batch", 3]}]
    attention = [{"name": "attention", "dtype": "float32", "shape": ["batch", 2, "sequence", "sequence"]}]
    found = Buckets.of(change(path, inputs=plain, outputs=attention), [*reads, "pixels"], 40)
    assert found is not None
    assert found.axes == {"attention": (2, 3)}
    whole = np.arange(2 * 2 * 8 * 8.0).reshape(2, 2, 8, 8)
    assert np.array_equal(found.cut({"attention": whole}, 5)["attention"], whole[:, :, :5, :5])
    other = [{"name": "windows", "dtype": "float32", "shape": ["batch", "sequence + 1"]}]
    assert Buckets.of(change(path, inputs=plain, outputs=other), [*reads, "pixels"], 40) is None


@pytest.mark.parametrize(
    ("config", "token"),
    [
        ({"pad_token_id": 7, "vocab_size": 11}, 7),
        ({"pad_token_id": 11, "vocab_size": 11}, 0),
        ({"pad_token_id": -1}, 0),
        ({"pad_token_id": None}, 0),
        ({"pad_token_id": True}, 0),
        ([], 0),
        (None, 0),
    ],
)
def test_tokens_are_padded_with_the_models_own(tmp_path: Path, config: Any, token: int) -> None:
    path = write_bundle(tmp_path / "bundle")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    found = Buckets.of(change(path, max_tokens=20), ["input_ids", MASK], 40)
    assert found is not None
    assert (found.padding, found.longest) == ({"input_ids": token, MASK: 0}, 20)
    padded = found.pad(make_inputs(1, 2, 17))
    assert padded["input_ids"].shape == padded[MASK].shape == (2, 20)  # the next bucket is beyond the base's positions
    assert (padded["input_ids"][:, 17:] == token).all()
    assert (padded[MASK][:, 17:] == 0).all()
    assert np.array_equal(padded["input_ids"][:, :17], make_inputs(1, 2, 17)["input_ids"])
