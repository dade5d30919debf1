"""Finding linear layers in a base model, and refusing adapters of another base."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from families import FAMILIES
from make_adapters import random_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, OPTConfig, OPTModel
from transformers.pytorch_utils import Conv1D

from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.base.identity import base_hash
from sdct_export.base.model import (
    check_base,
    find_linear,
    linear_shape,
    linear_weight,
    load_base,
    model_digests,
    model_hash,
    to_numpy,
    to_torch,
)
from sdct_export.base.reference import most_tokens
from sdct_export.errors import BaseMismatchError, ConfigError, UnsupportedError

SHAPES = {"q": (6, 4), "block.v": (3, 6)}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Module()
    net.q, net.block, net.norm, net.classifier = nn.Linear(4, 6), nn.Module(), nn.LayerNorm(6), nn.Linear(6, 2)
    net.block.v = Conv1D(3, 6)
    nn.init.normal_(net.block.v.weight)
    return net


def adapter(base: nn.Module | None = None, dtype: str = "float32") -> SdctAdapter:
    made = random_adapter(SHAPES, 5)
    if base is None:
        return made
    return dataclasses.replace(made, base_hash=model_hash(base, SHAPES, dtype), base_dtype=dtype)


def test_linear_layers_in_both_layouts() -> None:
    net = model()
    assert linear_shape(net.q) == (6, 4)
    assert linear_shape(net.block.v) == (3, 6)
    assert linear_shape(net.norm) is None
    assert linear_weight(net.block.v).shape == (3, 6)
    x = torch.randn(2, 6)
    assert torch.allclose(net.block.v(x), x @ linear_weight(net.block.v).T + net.block.v.bias, atol=1e-6)
    with torch.no_grad():
        linear_weight(net.block.v)[2, 1] = 9.0  # a view: writes reach the module
    assert net.block.v.weight[1, 2] == 9.0


def test_find_linear_says_what_is_there() -> None:
    net = model()
    assert find_linear(net, "block.v") is net.block.v
    with pytest.raises(BaseMismatchError, match=r"no module 'block\.w'"):
        find_linear(net, "block.w")
    with pytest.raises(UnsupportedError, match="'norm' is a LayerNorm"):
        find_linear(net, "norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_cross_to_numpy_and_back_unchanged(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype).T
    array = to_numpy(tensor)
    assert array.shape == (3, 5)
    assert (array.dtype == ml_dtypes.bfloat16) == (dtype == torch.bfloat16)
    assert array.astype(np.float64).tolist() == tensor.double().tolist()
    back = to_torch(array)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    back[0, 0] += 1
    assert not torch.equal(to_torch(array), back)


def test_a_fitting_adapter_passes_whatever_dtype_the_base_is_loaded_in() -> None:
    base = model().bfloat16()
    recorded = adapter(base, "bfloat16")
    check_base(recorded, base)
    check_base(recorded, base.float())
    check_base(adapter(), base)  # an adapter without a hash is checked by names and shapes


def test_adapters_of_another_base_are_refused() -> None:
    with pytest.raises(BaseMismatchError, match=r"legal was trained on other base weights \(hash sha256:"):
        check_base(adapter(model(1)), model(), label="legal")
    missing = random_adapter(SHAPES | {"block.w": (3, 6)}, 5)
    with pytest.raises(BaseMismatchError, match=r"no module 'block\.w'"):
        check_base(missing, model())
    with pytest.raises(BaseMismatchError, match=r"module 'q' is 6 x 4 in the base .* trained on 4 x 6"):
        check_base(random_adapter({"q": (4, 6)}, 5), model())
    unsized = random_adapter({"q": (60, 40)}, 5)
    unsized = dataclasses.replace(unsized, modules={"q": dataclasses.replace(unsized.modules["q"], shape=None)})
    with pytest.raises(BaseMismatchError, match="indices up to"):
        check_base(unsized, model())
    with pytest.raises(UnsupportedError, match="only Linear and Conv1D"):
        check_base(random_adapter({"norm": (6, 6)}, 5), model())
    head = {"score.weight": np.ones((2, 6), np.float32)}
    with pytest.raises(BaseMismatchError, match=r"stores 'score\.weight', which the base model"):
        check_base(dataclasses.replace(adapter(), saved=head), model())


def test_model_hash_reads_conv1d_in_the_layout_of_linear() -> None:
    net = model()
    weights = {"q": net.q.weight.detach().numpy(), "block.v": net.block.v.weight.detach().numpy().T}
    want = base_hash(weights.__getitem__, SHAPES, "float32")
    assert model_hash(net, SHAPES, "float32") == want
    digests = model_digests(net, SHAPES)
    assert set(digests["float32"]) == set(SHAPES)
    assert digests["float32"] != digests["bfloat16"]
    assert model_digests(model(1), SHAPES)["float32"]["q"] != digests["float32"]["q"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bert") / "base"
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=2
    )
    BertModel(config).save_pretrained(path)
    return path


HEAD = ("classifier.weight", "classifier.bias")


def test_load_base_makes_no_parameter_up(checkpoint: Path) -> None:
    with pytest.raises(BaseMismatchError, match=r"lacks 2 parameters .*'classifier.bias'.* no adapter saves them"):
        load_base(checkpoint, "SEQ_CLS", num_labels=5)
    with pytest.raises(BaseMismatchError, match=r"lacks 1 parameters .*'classifier.bias'"):
        load_base(checkpoint, "SEQ_CLS", num_labels=5, saved=["classifier.weight"])


def test_load_base_leaves_room_for_a_head_that_adapters_bring(checkpoint: Path) -> None:
    first, second = (load_base(checkpoint, "SEQ_CLS", num_labels=5, saved=HEAD) for _ in range(2))
    assert isinstance(first, BertForSequenceClassification)
    assert not first.training
    for (name, one), (_, two) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert first.classifier.weight.shape == (5, 16)
    assert first.classifier.weight.abs().max() == 0
    assert first.bert.encoder.layer[0].attention.self.query.weight.abs().max() > 0
    assert isinstance(load_base(checkpoint), BertModel)
    assert next(load_base(checkpoint, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_load_base_says_why_it_cannot(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseMismatchError, match="cannot load a base model from"):
        load_base(tmp_path)
    load_base(checkpoint, "SEQ_CLS", num_labels=3, saved=HEAD).save_pretrained(tmp_path / "tuned")
    with pytest.raises(BaseMismatchError, match="trained tensor of another size"):
        load_base(tmp_path / "tuned", "SEQ_CLS", num_labels=4)


def test_load_base_refuses_an_incomplete_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "part")
    weights = tmp_path / "part" / "model.safetensors"
    tensors = load_file(weights)
    for task in (None, "SEQ_CLS"):
        save_file({k: v for k, v in tensors.items() if "intermediate" not in k}, weights, metadata={"format": "pt"})
        with pytest.raises(BaseMismatchError, match=r"lacks 2 parameters .*intermediate\.dense.*copy the whole"):
            load_base(tmp_path / "part", task, saved=HEAD)
    # a pooler, which pretraining does not always leave behind, is no part of a body; a classifier reads it
    save_file({k: v for k, v in tensors.items() if "pooler" not in k}, weights, metadata={"format": "pt"})
    assert load_base(tmp_path / "part").pooler is None
    with pytest.raises(BaseMismatchError, match=r"lacks 2 parameters .*pooler\.dense"):
        load_base(tmp_path / "part", "SEQ_CLS", saved=HEAD)


def test_a_class_of_ones_own(checkpoint: Path) -> None:
    found = load_base(checkpoint, model_class="transformers:BertForSequenceClassification", saved=HEAD)
    assert type(found) is BertForSequenceClassification
    cases = {"transformers": "cannot be imported", "no.such:Class": "cannot be imported"}
    cases |= {"transformers:NoSuch": "cannot be imported", "json:dumps": "no from_pretrained"}
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            load_base(checkpoint, model_class=name)


def test_load_base_refuses_a_damaged_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    load_base(checkpoint).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BaseMismatchError, match="cannot load a base model from"):
        load_base(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text("{")
    with pytest.raises(BaseMismatchError, match="cannot load a base model from"):
        load_base(tmp_path / "cut")


@pytest.mark.parametrize(
    "path", ["no/such/folder", "./mistyped", "/nowhere/bert", "nowhere/", "~/bert", "...", "x" * 5000, __file__]
)
def test_a_path_that_is_no_folder_is_not_looked_up_on_a_hub(path: str) -> None:
    with pytest.raises(BaseMismatchError, match="no such folder"):
        load_base(path)


def test_a_hub_that_does_not_answer(checkpoint: Path, tmp_path: Path) -> None:
    """Said at once where nothing is in the cache; what is in it loads. Nothing listens at this address."""
    code = (
        "import sys\nfrom sdct_export.base import load_base\nfrom sdct_export.errors import BaseMismatchError\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(type(load_base(name)).__name__)\n"
        "    except BaseMismatchError as error: print(error)\n"
    )
    cache = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(checkpoint, cache / "snapshots" / "1")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1")
    for offline in ("0", "1"):
        env = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline}
        command = [sys.executable, "-c", code, "me/tiny", "me/other", "mistyped"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=True)
        loaded, *missing = done.stdout.splitlines()
        assert loaded == type(load_base(checkpoint)).__name__
        assert len(missing) == 2
        for line, name in zip(missing, command[4:], strict=True):
            assert f"from {name}: there is no such folder, and the hub cannot be reached (" in line


@pytest.mark.parametrize("name", ["bert", "roberta-classifier", "gpt2"])
def test_the_longest_row_that_a_table_of_positions_takes(name: str) -> None:
    """One token more and torch refuses."""
    base = FAMILIES[name].model()
    longest = most_tokens(base)
    assert longest is not None
    ids = torch.full((1, longest + 1), 5)
    with torch.no_grad():
        base(input_ids=ids[:, :longest])
        with pytest.raises((IndexError, RuntimeError)):
            base(input_ids=ids)


def test_positions_that_are_computed_have_no_limit() -> None:
    for name in ("llama", "qwen2", "vit"):
        assert most_tokens(FAMILIES[name].model()) is None
    config = OPTConfig(
        vocab_size=9, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=7
    )
    assert most_tokens(OPTModel(config)) == 7  # its table has two rows more
