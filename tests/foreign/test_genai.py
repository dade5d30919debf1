"""ONNX Runtime GenAI itself: its builder's graphs get adapters, and it runs them with the bank as inputs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoders import DECODERS, random_rows
from families import random_adapter

from sdct_export import export_onnx, native
from sdct_export.adapter.entries import Array
from sdct_export.bundle.description import Bundle
from sdct_export.bundle.packing import bank_layout, pack
from sdct_export.runtime import MultiAdapterModel
from sdct_export.verify import verify

og: Any = pytest.importorskip("onnxruntime_genai", reason="the package onnxruntime-genai is not installed")
STEPS = 8


def built(name: str, folder: Path, precision: str) -> tuple[Any, dict[str, Any], Bundle]:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}
    if name == "phi3":  # the builder takes it for the long one where these lengths differ
        sizes |= {"max_position_embeddings": 4096, "sliding_window": None}
    model = DECODERS[name].model(**sizes)
    model.save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(99)}, unk_token="t3"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t0").save_pretrained(folder / "base")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder / "base")]
    command += ["-o", str(folder / "theirs"), "-p", precision, "-e", "cpu", "-c", str(folder / "cache")]
    subprocess.run([*command, "--extra_options", "windowed_kv_cache=false"], check=True, capture_output=True)
    adapters = {key: random_adapter(DECODERS[name], model, seed) for seed, key in enumerate(("a", "b"), 1)}
    bundle = export_onnx(folder / "theirs" / "model.onnx", folder / "base", adapters, folder / "bundle")
    return model, adapters, bundle


@pytest.mark.filterwarnings("ignore:the graph of onnxruntime-genai")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "gemma2"])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_graphs_of_the_builder(tmp_path: Path, name: str, precision: str) -> None:
    _, adapters, bundle = built(name, tmp_path, precision)
    assert verify(bundle.path, tmp_path / "base").ok
    prompt = random_rows([5], 3)[0]
    with MultiAdapterModel(bundle) as runner:
        made = runner.generate(
            [prompt] * 3,
            [None, "a", "b"],
            max_new_tokens=STEPS,
            stop_tokens=[],
            temperature=0.0,
            repetition_penalty=1.0,
        )
    rows = 3
    bank = {n: np.zeros((rows, *shape), dtype) for n, (dtype, shape) in bank_layout(bundle).items()}
    for slot, adapter in enumerate(adapters.values(), 1):
        for n, row in pack(bundle, adapter).items():
            bank[n][slot] = row
    ids, scales = np.arange(rows, dtype=np.int32)[:, None], np.ones((rows, 1), np.float32)
    found = continued(bundle, prompt, bank | {"adapter_ids": ids, "adapter_scales": scales})
    assert found == [cut(list(one.tokens)) for one in made]


def cut(tokens: list[int]) -> list[int]:
    """The tokens before the end of the text, which GenAI does not always give, and padding behind it."""
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


def continued(
    bundle: Bundle, prompt: Array, inputs: dict[str, Array], *, library: str = "", adapter: str = ""
) -> list[list[int]]:
    """What GenAI makes of `prompt` in each row of `inputs`, greedily."""
    config = og.Config(str(bundle.path))
    if library:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"custom_ops_library": library}}}}))
    model = og.Model(config)
    rows = len(inputs["adapter_ids"])
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + STEPS, batch_size=rows, do_sample=False)
    generator = og.Generator(model, parameters)
    adapters = og.Adapters(model)
    if adapter:
        adapters.load(str(bundle.path / "adapters" / f"{adapter}.onnx_adapter"), adapter)
        generator.set_active_adapter(adapters, adapter)
    for name, array in inputs.items():  # which it does not copy
        generator.set_model_input(name, array)
    generator.append_tokens(np.tile(prompt.astype(np.int32), (rows, 1)))
    while not generator.is_done():
        generator.generate_next_token()
    return [cut([int(t) for t in generator.get_sequence(i)[len(prompt) :]]) for i in range(rows)]


def test_its_own_adapters_and_the_native_operator(tmp_path: Path) -> None:
    _, _, bundle = built("llama", tmp_path, "fp32")
    prompt = random_rows([5], 4)[0]
    with MultiAdapterModel(bundle) as runner:
        made = runner.generate([prompt] * 2, [None, "a"], max_new_tokens=STEPS, stop_tokens=[], temperature=0.0)
    want = [cut(list(one.tokens)) for one in made]
    inputs = {"adapter_ids": np.array([[0], [1]], np.int32), "adapter_scales": np.ones((2, 1), np.float32)}
    assert continued(bundle, prompt, inputs, adapter="a") == want
    library = native.operator_library()
    if library is None:
        pytest.skip(f"no native operator: {native.why_no_operator()}")
    shutil.copy(library, bundle.path)  # it loads none from elsewhere
    assert continued(bundle, prompt, inputs, adapter="a", library=library.name) == want
