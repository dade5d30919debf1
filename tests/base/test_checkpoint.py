"""Checkpoint folders: the streaming writer against safetensors, reads in pieces, and names of older checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save

from sdct_export.base.checkpoint import (
    DTYPE_OF,
    Checkpoint,
    NewTensor,
    Structure,
    structure_for,
    tensor_bytes,
    tied_parameters,
    write_safetensors,
)
from sdct_export.errors import BaseMismatchError, UnsupportedError

SIZES = {"num_hidden_layers": 1, "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}


def new(name: str, tensor: torch.Tensor, pieces: int = 1) -> NewTensor:
    data = tensor_bytes(tensor)
    step = -(-len(data) // pieces) or 1
    dtype = DTYPE_OF.get(tensor.dtype, "I8")
    cut = [data[at : at + step] for at in range(0, len(data), step)]
    return NewTensor(name, dtype, tuple(tensor.shape), len(data), lambda: cut)


def test_the_writer_writes_what_safetensors_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(()),
        "c": torch.empty(0, 4),
        'ü"\n': torch.randn(7).bfloat16(),
        "y": torch.arange(3, dtype=torch.int8),
    }
    mixed = [tensors[name] for name in ("y", 'ü"\n', "a", "b", "c")]  # elements grow: the writer sorts them
    names = ["y", 'ü"\n', "a", "b", "c"]
    written = [new(name, tensor, pieces=3) for name, tensor in zip(names, mixed, strict=True)]
    write_safetensors(tmp_path / "x.safetensors", written, {"format": "pt"})
    got = load_file(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    header = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0
    plain = {name: tensors[name] for name in ("a", "b")}  # of one dtype, in order: the very bytes
    write_safetensors(tmp_path / "y.safetensors", [new(n, t) for n, t in plain.items()], {"format": "pt"})
    assert (tmp_path / "y.safetensors").read_bytes() == save(plain, {"format": "pt"})


def test_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdct_export.base.checkpoint.CHUNK_BYTES", 37)
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=31)).half()
    model.save_pretrained(tmp_path / "base")
    base = Checkpoint(tmp_path / "base")
    for key, tensor in model.state_dict().items():
        assert torch.equal(base.read(key), tensor)
        sizes = [len(piece) for piece in base.chunks(key)]
        assert max(sizes) <= 37
        assert sum(sizes) == tensor.numel() * 2
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])  # cut after it was opened
    last = max(base.tensors, key=lambda key: base.tensors[key].offset)
    with pytest.raises(BaseMismatchError, match=f"ends within tensor {last!r}"):
        base.read(last)
    file.unlink()
    with pytest.raises(BaseMismatchError, match="cannot be read"):
        base.read(last)


def test_names_are_resolved_as_transformers_does(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES, vocab_size=31)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    base = Checkpoint(tmp_path / "base")
    classifier = Structure(base, "SEQ_CLS")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert classifier.resolve(name) == classifier.resolve(name.removeprefix("bert.")) == name
    assert classifier.key(name) == name.removeprefix("bert.")
    assert classifier.resolve("no.such.weight") == "no.such.weight"
    plain = Structure(base)
    assert plain.resolve(name) == name.removeprefix("bert.")
    assert all(parameter.is_meta for parameter in plain.model.parameters())
    with pytest.raises(BaseMismatchError, match=r"no tensor for parameter 'classifier\.weight'"):
        classifier.key("classifier.weight")
    grown = structure_for(base, "SEQ_CLS", {"classifier.weight": (9, 12), "classifier.bias": (9,)})
    assert grown.config.num_labels == 9
    with pytest.raises(BaseMismatchError, match=r"'classifier\.weight' with shape \[9, 12\]"):
        structure_for(base, "SEQ_CLS", {"classifier.weight": (9, 12), "classifier.bias": (8,)})


def test_two_tensors_for_one_parameter_are_refused(tmp_path: Path) -> None:
    model = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=31))
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    double = {"bert.pooler.dense.bias": tensors["pooler.dense.bias"].clone()}
    file.write_bytes(save(tensors | double, {"format": "pt"}))
    with pytest.raises(BaseMismatchError, match=r"both belong to parameter 'pooler\.dense\.bias'"):
        Structure(Checkpoint(tmp_path / "base"))


def test_weights_converted_while_loading_are_refused(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(
        num_hidden_layers=1, hidden_size=12, num_attention_heads=2, image_size=8, patch_size=4, use_swiglu_ffn=True
    )
    model = transformers.Dinov2Model(config)
    model.save_pretrained(tmp_path / "base")
    base = Checkpoint(tmp_path / "base")
    assert any("weights_in" in key for key in base.tensors)  # gate and up projection in one tensor
    structure = Structure(base)
    gate = next(name for name, _ in model.named_parameters() if name.endswith("up_proj.weight"))
    with pytest.raises(UnsupportedError, match=r"up_proj.*weights_in.*another form|another form.*weights_in"):
        structure.key(gate)
    query = next(name for name, _ in model.named_parameters() if name.endswith("q_proj.weight"))
    assert structure.key(query).endswith("attention.attention.query.weight")


def test_tied_parameters_are_found_on_every_device() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=12, n_head=2, vocab_size=31, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        meta = transformers.GPT2LMHeadModel(config)
    for model in (meta, transformers.GPT2LMHeadModel(config)):
        assert tied_parameters(model) == [["transformer.wte.weight", "lm_head.weight"]]
    assert tied_parameters(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))) == []
