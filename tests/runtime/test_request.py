"""Text in, labels out: what `sdct-export run` does around a bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import make_adapter, write_bundle, write_tokenizer

from sdct_export.bundle.description import Bundle, TensorSpec
from sdct_export.errors import AdapterFormatError, ConfigError, OutputError
from sdct_export.runtime.request import encode_text, read_arrays, top_labels, write_arrays


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    adapters = {"with-head": make_adapter(0, labels=3), "plain": make_adapter(1)}
    folder = write_bundle(tmp_path / "bundle", adapters)
    write_tokenizer(folder)
    return Bundle.load(folder)


def test_texts_are_padded_and_masked(bundle: Bundle) -> None:
    feeds = encode_text(bundle, ["a b zebra", "", "g"])
    assert feeds["input_ids"].tolist() == [[2, 4, 5, 1, 3], [2, 3, 0, 0, 0], [2, 10, 3, 0, 0]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert all(array.dtype == np.int64 for array in feeds.values())
    assert list(feeds) == ["input_ids", "attention_mask"]


def test_settings_of_the_tokenizer_are_kept(bundle: Bundle) -> None:
    write_tokenizer(bundle.path, padding_side="left", pad_token={"content": "g"}, model_max_length=4)
    with pytest.warns(UserWarning, match="1 of 2 texts, the first of them row 0, have more tokens.*are cut to 4"):
        feeds = encode_text(bundle, ["a b c d", "e"])
    assert feeds["input_ids"].tolist() == [[2, 4, 5, 3], [10, 2, 8, 3]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    write_tokenizer(bundle.path, model_max_length=10**30)
    (bundle.path / "config.json").write_text('{"max_position_embeddings": 5}')
    with pytest.warns(UserWarning, match="are cut to 5"):
        assert encode_text(bundle, ["a b c d e f g"])["input_ids"].shape == (1, 5)
    for tokens, limit in ((3, None), (3, 4), (4, 1000)):  # the bundle knows best
        write_tokenizer(bundle.path, **({} if limit is None else {"model_max_length": limit}))
        with pytest.warns(UserWarning, match=f"are cut to {tokens}"):
            got = encode_text(dataclasses.replace(bundle, max_tokens=tokens), ["a b c d e f g"])
        assert got["input_ids"].shape == (1, tokens)


def test_the_length_that_a_tokenizer_was_saved_with_is_not_the_model_s(bundle: Bundle) -> None:
    """transformers cuts at `model_max_length`, whatever truncation stands in `tokenizer.json`."""
    write_tokenizer(bundle.path, model_max_length=6)
    raw = json.loads((bundle.path / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (bundle.path / "tokenizer.json").write_text(json.dumps(raw))
    assert encode_text(bundle, ["a b c d"])["input_ids"].tolist() == [[2, 4, 5, 6, 7, 3]]


def test_token_types_where_the_model_wants_them(bundle: Bundle) -> None:
    more = dataclasses.replace(bundle, inputs=(*bundle.inputs, TensorSpec("token_type_ids", "int64", ("batch", "s"))))
    assert encode_text(more, ["a b"])["token_type_ids"].tolist() == [[0, 0, 0, 0]]


def test_text_that_cannot_be_encoded(bundle: Bundle) -> None:
    image = dataclasses.replace(bundle, inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, 8, 8)),))
    with pytest.raises(ConfigError, match="takes pixel_values, not text"):
        encode_text(image, ["a"])
    unmasked = dataclasses.replace(bundle, inputs=bundle.inputs[:1])
    with pytest.raises(ConfigError, match="the same number of tokens"):
        encode_text(unmasked, ["a", "a b"])
    assert encode_text(unmasked, ["a", "b"])["input_ids"].shape == (2, 3)
    write_tokenizer(bundle.path, special=False)
    with pytest.raises(ConfigError, match="the text '' has no token"):
        encode_text(bundle, ["a", ""])
    (bundle.path / "tokenizer.json").write_text("{")
    with pytest.raises(AdapterFormatError, match=r"tokenizer\.json cannot be read"):
        encode_text(bundle, ["a"])
    (bundle.path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json; pass arrays"):
        encode_text(bundle, ["a"])


def test_top_labels_and_their_names(bundle: Bundle) -> None:
    smallest = float(np.finfo(np.float32).min) / 2
    logits = np.array([[0, 1, 3, -2], [5, 0, 0, smallest]], np.float32)
    rows = [["plain"], ["with-head"]]
    found = top_labels(bundle, {"logits": logits}, rows)
    assert found is not None
    want = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert [label.index for label in found] == [2, 0]
    assert found[0].probability == pytest.approx(want[2], rel=1e-6)
    assert found[1].probability == pytest.approx(np.exp(5) / (np.exp(5) + 2), rel=1e-6)
    assert [label.name for label in found] == [None, None]

    names = {"0": "ham", "1": "spam", "2": "eggs", "3": "LABEL_3"}
    (bundle.path / "config.json").write_text(json.dumps({"id2label": names}))
    for chosen, expected in (
        (rows, ["eggs", None]),  # the head of an adapter has labels of its own
        ([[], ["plain", "with-head"]], ["eggs", None]),
        ([["loaded-later"], []], [None, "ham"]),
        (None, ["eggs", "ham"]),
    ):
        assert [label.name for label in top_labels(bundle, {"logits": logits}, chosen) or []] == expected
    (bundle.path / "config.json").write_text(json.dumps({"id2label": {"0": "ham"}}))
    assert [label.name for label in top_labels(bundle, {"logits": logits}) or []] == [None, None]


def test_a_row_without_any_head_has_no_label(bundle: Bundle) -> None:
    assert bundle.heads
    logits = np.array([[0, 0, 0, 0], [0, 0, 0, -1], [0, 0, 0, 0]], np.float32)
    found = top_labels(bundle, {"logits": logits}, [[], ["with-head"], ["plain"]])
    assert found is not None
    assert [label and label.index for label in found] == [None, 0, None]
    own = top_labels(dataclasses.replace(bundle, heads=()), {"logits": logits})  # a head of the base's own
    assert own is not None
    assert None not in own


def test_outputs_that_are_no_class_have_no_top_label(bundle: Bundle) -> None:
    logits = np.zeros((2, 4), np.float32)
    assert top_labels(dataclasses.replace(bundle, task="CAUSAL_LM"), {"logits": logits}) is None
    assert top_labels(bundle, {"logits": logits[None]}) is None
    assert top_labels(bundle, {"hidden": logits}) is None


def test_arrays_in_and_out(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    np.save(tmp_path / "x.npy", array)
    assert np.array_equal(read_arrays({"x": tmp_path / "x.npy"})["x"], array)
    write_arrays(tmp_path / "out", {"y": array, "z.w": array + 1})  # no suffix is added to the name asked for
    with np.load(tmp_path / "out") as archive:
        assert sorted(archive) == ["y", "z.w"]
        assert np.array_equal(archive["z.w"], array + 1)
    with pytest.raises(OutputError, match="exists already"):
        write_arrays(tmp_path / "out", {"y": array})
    with pytest.raises(ConfigError, match=r"'x': .* is an archive"):
        read_arrays({"x": tmp_path / "out"})


def test_files_that_hold_no_array(tmp_path: Path) -> None:
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_text("1 2 3")
    with pytest.raises(ConfigError, match=r"missing\.npy is missing; input 'x' needs"):
        read_arrays({"x": tmp_path / "missing.npy"})
    for name in ("pickled.npy", "empty.npy", "text.npy"):
        with pytest.raises(ConfigError, match="'x': cannot read an array from"):
            read_arrays({"x": tmp_path / name})
