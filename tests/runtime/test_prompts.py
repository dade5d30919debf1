"""What a base's `generation_config.json` says against what transformers makes of the same file."""

from __future__ import annotations

import json
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sdct_export.errors import AdapterFormatError, ConfigError
from sdct_export.runtime.prompts import Defaults, read_defaults


def written(folder: Path, **settings: Any) -> Any:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return types.SimpleNamespace(path=folder)


@pytest.fixture(scope="module")
def model() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=9, **sizes)
    return transformers.LlamaForCausalLM(config)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    {"do_sample": True, "top_k": 0, "min_p": 0.05},
    {"do_sample": True, "top_k": None, "top_p": None, "temperature": None},
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0.6, "top_k": 3},
    {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.05},
]


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_sampling_is_what_transformers_does_by_default(settings: dict[str, Any], model: Any, tmp_path: Path) -> None:
    """Compared with the processors that its `generate` puts together from the same file."""
    bundle = written(tmp_path, **settings)
    model.generation_config = transformers.GenerationConfig.from_pretrained(tmp_path)
    config, _ = model._prepare_generation_config(None)
    steps = model._get_logits_processor(config, input_ids_seq_length=1)
    want: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    for step in steps:
        if isinstance(step, TemperatureLogitsWarper):
            want["temperature"] = step.temperature
        elif isinstance(step, TopKLogitsWarper):
            want["top_k"] = step.top_k
        elif isinstance(step, TopPLogitsWarper):
            want["top_p"] = step.top_p
        elif isinstance(step, MinPLogitsWarper):
            want["min_p"] = step.min_p
        elif isinstance(step, RepetitionPenaltyLogitsProcessor):
            want["repetition_penalty"] = step.penalty
        else:
            raise AssertionError(step)
    if not config.do_sample:
        want["temperature"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read_defaults(bundle).sampling({})
    assert {name: getattr(got, name) for name in want} == want


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4}, {"no_repeat_ngram_size": 3}, {"bad_words_ids": [[1]]}, {"penalty_alpha": 0.6},
        {"guidance_scale": 1.5}, {"suppress_tokens": [3]}, {"begin_suppress_tokens": [3]}, {"forced_eos_token_id": 2},
        {"forced_bos_token_id": 2}, {"min_length": 5}, {"min_new_tokens": 5}, {"sequence_bias": [[[1], 2.0]]},
        {"exponential_decay_length_penalty": [3, 1.5]}, {"do_sample": True, "typical_p": 0.9},
        {"do_sample": True, "epsilon_cutoff": 3e-4}, {"do_sample": True, "eta_cutoff": 3e-4},
        {"do_sample": True, "top_h": 0.4}, {"num_return_sequences": 2, "do_sample": True}, {"max_time": 3.0},
        {"encoder_repetition_penalty": 1.2}, {"encoder_no_repeat_ngram_size": 2},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_done_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    name = next(name for name in settings if name != "do_sample")
    with pytest.warns(UserWarning, match=rf"generation_config\.json asks for {name}, which this version does not do"):
        read_defaults(written(tmp_path, **settings))


def test_what_changes_nothing_is_not_named(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "num_beams": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0,
        "min_length": 0, "length_penalty": 1.0, "early_stopping": False, "repetition_penalty": 1.0, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "transformers_version": "5.0.0",
        "guidance_scale": None, "bad_words_ids": None, "remove_invalid_values": False, "renormalize_logits": True,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_defaults(written(tmp_path, **settings))
        read_defaults(written(tmp_path, typical_p=0.9, epsilon_cutoff=0.1))  # of draws, which there are none of


def test_what_ends_a_row(tmp_path: Path) -> None:
    bundle = written(tmp_path, eos_token_id=[2, 5], stop_strings=["\n\n", "User:"], max_new_tokens=7, max_length=9)
    defaults = read_defaults(bundle)
    assert (defaults.stops, defaults.strings) == (frozenset({2, 5}), ("\n\n", "User:"))
    assert read_defaults(written(tmp_path, stop_strings="x")).strings == ("x",)
    assert defaults.most_new(5, None) == 7  # as transformers: max_length means nothing beside max_new_tokens
    assert defaults.most_new(5, 9) == 4
    assert read_defaults(written(tmp_path, max_length=9)).most_new(5, None) == 4
    with pytest.raises(ConfigError, match="a prompt has 9 tokens, and"):
        read_defaults(written(tmp_path, max_length=9)).most_new(9, None)
    assert Defaults({}, frozenset()).most_new(1000, None) == 64
    assert Defaults({}, frozenset()).most_new(1000, 1020) == 20
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert read_defaults(written(tmp_path)).stops == frozenset({3})
    assert read_defaults(written(tmp_path, eos_token_id=None)).stops == frozenset()
    (tmp_path / "generation_config.json").unlink()
    assert read_defaults(bundle).stops == frozenset({3})


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": "x"}, {"eos_token_id": [-1]}, {"eos_token_id": [True]}, {"stop_strings": [""]},
        {"stop_strings": 3}, {"max_new_tokens": 0}, {"max_length": "9"}, {"do_sample": True, "top_p": 7},
        {"repetition_penalty": -1},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"generation_config.json: .*; export the bundle again"):
        read_defaults(written(tmp_path, **settings))
