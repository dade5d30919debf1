"""Merging: against a dense float64 reference, in memory and from checkpoint to checkpoint; bad bases lose nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from families import with_fresh_head
from references import delta_weight
from safetensors.torch import load_file, save_file

from sdct_export import SdctAdapter, SdctConfig
from sdct_export.adapter.entries import SdctEntries
from sdct_export.base.checkpoint import Checkpoint
from sdct_export.base.model import find_linear, linear_shape, linear_weight, load_base, model_hash, to_numpy
from sdct_export.errors import BaseMismatchError, ConfigError, OutputError, SdctError, UnsupportedError
from sdct_export.weights.merging import merge, merge_checkpoint, round_once

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 2}
IDS = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, tuple[Any, str, str]] = {
    "bert": (transformers.BertConfig(**SIZES, **IDS), "SEQ_CLS", r".*(query|output\.dense)"),
    "roberta": (transformers.RobertaConfig(**SIZES, **IDS), "SEQ_CLS", r".*\.(query|value)"),
    "vit": (
        transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3),
        "IMAGE_CLS",
        r".*(q_proj|fc1|o_proj)",
    ),
    "gpt2": (
        transformers.GPT2Config(n_layer=2, n_embd=36, n_head=2, n_positions=16, **IDS),
        "CAUSAL_LM",
        r".*(c_attn|c_proj)",
    ),
    "llama": (
        transformers.LlamaConfig(**SIZES, **IDS, num_key_value_heads=1, tie_word_embeddings=True),
        "CAUSAL_LM",
        r".*(q_proj|v_proj|down_proj)",
    ),
    "qwen2": (
        transformers.Qwen2Config(**SIZES, **IDS, num_key_value_heads=1, tie_word_embeddings=False),
        "CAUSAL_LM",
        r".*(k_proj|lm_head)",
    ),
    "phi3": (
        transformers.Phi3Config(**SIZES, **IDS, num_key_value_heads=1),
        "CAUSAL_LM",
        r".*(qkv_proj|gate_up_proj)",
    ),
}


def make_model(family: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, str]:
    config, task, _ = FAMILIES[family]
    torch.manual_seed(3)
    loader = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "IMAGE_CLS": transformers.AutoModelForImageClassification,
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
    }[task]
    return loader.from_config(config).to(dtype).eval(), task


def make_adapter(
    model: torch.nn.Module, targets: str, task: str | None = None, *, n: int = 40, saved: Any = None, seed: int = 0
) -> SdctAdapter:
    """A random adapter on all linear modules that match `targets`, large enough to change every weight."""
    import re

    rng = np.random.default_rng(seed)
    modules = {}
    for path, module in model.named_modules():
        if not re.fullmatch(targets, path) or (shape := linear_shape(module)) is None:
            continue
        flat = rng.choice(shape[0] * shape[1], n, replace=False)
        indices = np.stack([flat // shape[1], flat % shape[1]], 1).astype(np.int32)
        modules[path] = SdctEntries(rng.standard_normal(n).astype(np.float32), indices, shape)
    assert modules
    heads = sorted({name.rsplit(".", 1)[0] for name in saved or {}}) or None
    config = SdctConfig(target_modules=list(modules), scaling=0.3, task_type=task, modules_to_save=heads)
    return SdctAdapter(config, modules, saved or {})


def reference(model: torch.nn.Module, adapter: SdctAdapter, path: str, scale: float = 1.0) -> Any:
    """`W + scale * dW` in float64 by scipy, in the layout of `Linear`."""
    weight = linear_weight(find_linear(model, path)).detach().double().numpy()
    e = adapter.modules[path]
    return weight + scale * delta_weight(e.values, e.indices, weight.shape, adapter.config.scaling)


def exact(x: Any, dtype: torch.dtype) -> torch.Tensor:
    """float64 rounded to nearest even once, by numpy: to bfloat16 by integer arithmetic on the float64 bits."""
    if dtype == torch.float16:
        return torch.from_numpy(x.astype(np.float16))
    if dtype == torch.bfloat16:  # 52 - 7 = 45 bits of the mantissa go
        bits = np.ascontiguousarray(x).view(np.uint64)
        bits = bits + np.uint64((1 << 44) - 1) + ((bits >> np.uint64(45)) & np.uint64(1))
        rounded = (bits & ~np.uint64((1 << 45) - 1)).view(np.float64)
        return torch.from_numpy(rounded).to(torch.bfloat16)
    return torch.from_numpy(x).to(dtype)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# -- in memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_equals_the_dense_reference_and_unmerge_restores_every_bit(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdct_export.weights.merging.BAND", 100)  # many bands in each of these small matrices
    monkeypatch.setattr("sdct_export.weights.merging.COLUMNS", 5)
    model, task = make_model(family)
    adapter = make_adapter(model, FAMILIES[family][2], task)
    before = state(model)
    want = {path: reference(model, adapter, path) for path in adapter.modules}
    merged = merge(model, adapter)
    for path in adapter.modules:
        got = linear_weight(find_linear(model, path)).detach().numpy()
        np.testing.assert_allclose(got, want[path], rtol=2e-7, atol=1e-9)
        assert not torch.equal(find_linear(model, path).weight, before[f"{path}.weight"])
    untouched = [name for name in before if name.removesuffix(".weight") not in adapter.modules]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in untouched)
    merged.unmerge()
    assert same_bits(state(model), before)
    merged.unmerge()
    assert same_bits(state(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_weight_is_rounded_once(dtype: torch.dtype) -> None:
    model, _ = make_model("llama", dtype)
    adapter = make_adapter(model, r".*(q_proj|up_proj)", n=300)
    want = {path: exact(reference(model, adapter, path), dtype) for path in adapter.modules}
    merge(model, adapter)
    for path, w in want.items():
        if dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(find_linear(model, path).weight, w)
        # scipy's float64 transform and ours differ in the last bits, which may turn a rounding to float32
        np.testing.assert_allclose(
            find_linear(model, path).weight.detach().double(), w.double(), rtol=1.2e-7, atol=1e-9
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_once_is_exact_where_two_roundings_are_not(dtype: torch.dtype) -> None:
    bits = 11 if dtype == torch.float16 else 8
    rng = np.random.default_rng(0)
    ties = 1 + rng.integers(0, 2 ** (bits - 1), 500) * 2.0 ** (1 - bits) + 2.0**-bits  # halfway between two values
    x = np.concatenate(
        [ties, ties + 2.0**-45, ties - 2.0**-45, rng.standard_normal(500), rng.standard_normal(500) * 1e-6]
    )
    x = np.concatenate([x, -x, [0.0, -0.0, 1e-60]])
    got = round_once(torch.from_numpy(x), dtype)
    want = exact(x, dtype)
    if dtype == torch.float16:
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    else:
        assert torch.equal(got, want)
    assert (torch.from_numpy(x).to(dtype) != want).any()  # torch itself rounds twice here


def test_scale_and_nesting() -> None:
    model, _ = make_model("bert")
    first, second = make_adapter(model, r".*query", seed=1), make_adapter(model, r".*query", seed=2)
    path = next(iter(first.modules))
    before = state(model)
    with merge(model, first, scale=0.5) as outer:
        half = linear_weight(find_linear(model, path)).detach().double().numpy()
        assert outer.model is model
        with merge(model, second, scale=-2.0):
            both = linear_weight(find_linear(model, path)).detach().double().numpy()
        assert np.array_equal(linear_weight(find_linear(model, path)).detach().double().numpy(), half)
    assert same_bits(state(model), before)
    np.testing.assert_allclose(half, reference(model, first, path, 0.5), rtol=2e-7, atol=1e-8)
    want = reference(model, first, path, 0.5) - 2 * (reference(model, second, path) - before[f"{path}.weight"].numpy())
    np.testing.assert_allclose(both, want, rtol=4e-7, atol=1e-7)
    with pytest.raises(ConfigError, match="finite"):
        merge(model, first, scale=float("nan"))


def test_saved_modules_are_replaced_and_blend_with_scale() -> None:
    model, _ = make_model("bert")
    head = {"classifier.weight": np.full((2, 36), 0.5, np.float32), "classifier.bias": np.array([1, -1], np.float32)}
    adapter = make_adapter(model, r".*query", saved=head)
    before = state(model)
    with merge(model, adapter):
        assert torch.equal(model.classifier.weight, torch.full((2, 36), 0.5))
        assert model.classifier.bias.tolist() == [1, -1]
    with merge(model, adapter, scale=0.25):
        want = 0.75 * before["classifier.weight"].double() + 0.25 * 0.5
        torch.testing.assert_close(model.classifier.weight.double(), want, rtol=2e-7, atol=1e-9)
    assert same_bits(state(model), before)


def test_an_error_changes_nothing() -> None:
    model, _ = make_model("llama", torch.float16)
    adapter = make_adapter(model, r".*(q_proj|v_proj)")
    last = list(adapter.modules)[-1]
    entries = dataclasses.replace(adapter.modules[last], values=np.full(40, 1e7, np.float32))
    before = state(model)
    with pytest.raises(UnsupportedError, match=rf"{last}.*float16.*bfloat16"):
        merge(model, dataclasses.replace(adapter, modules={**adapter.modules, last: entries}))
    assert same_bits(state(model), before)
    find_linear(model, last).weight.data[3, 2] = torch.nan
    before = state(model)
    with pytest.raises(BaseMismatchError, match=rf"{last}.*NaN"):
        merge(model, adapter)
    first = next(iter(adapter.modules))
    assert torch.equal(find_linear(model, first).weight, before[f"{first}.weight"])


def test_weights_that_cannot_be_merged_are_named() -> None:
    tied, _ = make_model("llama")
    with pytest.raises(UnsupportedError, match=r"'lm_head.weight' is tied to 'model.embed_tokens.weight'"):
        merge(tied, make_adapter(tied, "lm_head"))
    head = {"lm_head.weight": np.zeros((61, 36), np.float32)}
    with pytest.raises(UnsupportedError, match="tied"):
        merge(tied, make_adapter(tied, r".*q_proj", saved=head))
    model, _ = make_model("bert")
    with pytest.raises(BaseMismatchError, match="q_proj"):
        merge(model, make_adapter(tied, r".*q_proj"))
    wide = make_adapter(model, r".*query", saved={"classifier.weight": np.zeros((5, 36), np.float32)})
    with pytest.raises(BaseMismatchError, match=r"\[5, 36\].*\[2, 36\].*num_labels"):
        merge(model, wide)
    with torch.device("meta"):
        meta = type(model)(model.config)
    with pytest.raises(UnsupportedError, match="meta"):
        merge(meta, make_adapter(model, r".*query"))
    other = dataclasses.replace(make_adapter(model, r".*query"), base_hash="sha256:0", base_dtype="float32")
    before = state(model)
    with pytest.raises(BaseMismatchError, match="other base weights"):
        merge(model, other)
    assert same_bits(state(model), before)


# -- checkpoint to checkpoint ---------------------------------------------------------------------------------------


def hashed(adapter: SdctAdapter, model: torch.nn.Module, dtype: str = "float32") -> SdctAdapter:
    shapes = {path: e.shape for path, e in adapter.modules.items() if e.shape}
    return dataclasses.replace(adapter, base_hash=model_hash(model, shapes, dtype), base_dtype=dtype)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_checkpoint_equals_the_merge_in_memory(family: str, sharded: bool, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if family in ("llama", "phi3") else torch.float16 if family == "qwen2" else torch.float32
    model, task = make_model(family, dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="12KB" if sharded else "5GB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    adapter = hashed(make_adapter(model, FAMILIES[family][2], task), model, str(dtype).removeprefix("torch."))
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", progress=False)
    with merge(model, adapter):
        want = state(model)
    got = state(load_base(tmp_path / "out", task))
    assert same_bits(got, want)
    assert not same_bits(got, state(model))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "base").iterdir()
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > (1 if sharded else 0)
    for path in (tmp_path / "base").glob("*.json"):  # configuration and index are what they were
        assert json.loads(path.read_text()) == json.loads((tmp_path / "out" / path.name).read_text())
    base, out = Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "out")
    assert out.tensors == base.tensors
    assert out.metadata == base.metadata
    changed = {k for k in base.tensors if b"".join(base.chunks(k)) != b"".join(out.chunks(k))}
    assert len(changed) == len(adapter.modules)


def test_merging_nothing_new_writes_the_bytes_safetensors_writes(tmp_path: Path) -> None:
    model, task = make_model("bert", torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", make_adapter(model, r".*query", task), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file(tensors, tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_is_added_to_a_base_without_one_and_without_the_prefix(sharded: bool, tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES, **IDS)
    torch.manual_seed(1)
    base = transformers.BertModel(config)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB" if sharded else "5GB")
    model = with_fresh_head(tmp_path / "base", "SEQ_CLS", 5)
    rng = np.random.default_rng(0)
    head = {
        "classifier.weight": rng.standard_normal((5, 36)).astype(np.float32),
        "classifier.bias": rng.standard_normal(5).astype(np.float32),
    }
    adapter = hashed(make_adapter(model, r".*(query|value)", "SEQ_CLS", saved=head), model)
    assert all(path.startswith("bert.encoder") for path in adapter.modules)
    adapter.save(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_base(tmp_path / "out")  # the class the configuration now names
    assert type(merged).__name__ == "BertForSequenceClassification"
    assert merged.config.num_labels == 5
    merge(model, adapter)
    assert same_bits(state(merged), state(model))
    if sharded:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        stored = Checkpoint(tmp_path / "out").tensors
        assert index["weight_map"].keys() == stored.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
        assert index["metadata"]["total_parameters"] == sum(np.prod(t.shape, dtype=int) for t in stored.values())


@pytest.mark.parametrize(
    ("family", "base_class", "task", "heads"),
    [
        ("roberta", "RobertaModel", "SEQ_CLS", ["classifier.dense", "classifier.out_proj"]),
        ("vit", "ViTModel", "IMAGE_CLS", ["classifier"]),
        ("llama", "LlamaForCausalLM", "SEQ_CLS", ["score"]),
        ("qwen2", "Qwen2ForCausalLM", "TOKEN_CLS", ["score"]),
        ("gpt2", "GPT2LMHeadModel", "SEQ_CLS", ["score"]),
    ],
)
def test_heads_of_every_family_are_added(
    family: str, base_class: str, task: str, heads: list[str], tmp_path: Path
) -> None:
    config = FAMILIES[family][0]
    torch.manual_seed(1)
    getattr(transformers, base_class)(config).save_pretrained(tmp_path / "base")
    model = with_fresh_head(tmp_path / "base", task, 4)
    rng = np.random.default_rng(0)
    saved = {
        name: rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
        for name, parameter in model.named_parameters()
        if name.rsplit(".", 1)[0] in heads
    }
    adapter = make_adapter(model, FAMILIES[family][2].replace("|lm_head", ""), task, saved=saved)
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    merge(model, adapter)
    merged = load_base(tmp_path / "out")
    assert type(merged) is type(model)
    assert merged.config.num_labels == 4
    assert same_bits(state(merged), state(model))


def test_a_trained_head_of_another_size_is_replaced(tmp_path: Path) -> None:
    model, _ = make_model("bert", torch.float16)
    model.save_pretrained(tmp_path / "base")
    head = {"classifier.weight": np.ones((7, 36), np.float32), "classifier.bias": np.arange(7, dtype=np.float32)}
    merge_checkpoint(tmp_path / "base", make_adapter(model, r".*query", "SEQ_CLS", saved=head), tmp_path / "out")
    merged = load_base(tmp_path / "out")
    assert merged.config.num_labels == 7
    assert merged.classifier.bias.dtype == torch.float16
    assert merged.classifier.bias.tolist() == list(range(7))
    odd = {"classifier.weight": np.ones((7, 37), np.float32)}
    with pytest.raises(BaseMismatchError, match=r"\[7, 37\].*\[7, 36\]"):
        merge_checkpoint(tmp_path / "base", make_adapter(model, r".*query", "SEQ_CLS", saved=odd), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_paths_with_and_without_the_base_prefix_and_older_names_are_understood(tmp_path: Path) -> None:
    gpt2, _ = make_model("gpt2")
    gpt2.transformer.save_pretrained(tmp_path / "bare")  # keys `h.0...`
    assert "h.0.attn.c_attn.weight" in Checkpoint(tmp_path / "bare").tensors
    adapter = make_adapter(gpt2, r".*c_attn")  # paths `transformer.h.0...`, no task
    merge_checkpoint(tmp_path / "bare", adapter, tmp_path / "out")
    merge(gpt2, adapter)
    assert same_bits(state(load_base(tmp_path / "out")), state(gpt2.transformer))

    vit, task = make_model("vit")
    vit.save_pretrained(tmp_path / "vit")
    key = "vit.encoder.layer.0.attention.attention.query.weight"
    assert key in Checkpoint(tmp_path / "vit").tensors
    new = make_adapter(vit, r".*q_proj", task)
    old = dataclasses.replace(
        new,
        modules={
            p.replace("vit.layers.", "vit.encoder.layer.").replace("q_proj", "attention.query"): e
            for p, e in new.modules.items()
        },
    )
    assert f"{next(iter(old.modules))}.weight" == key
    merge_checkpoint(tmp_path / "vit", old, tmp_path / "vit_out")
    merge(vit, new)
    assert same_bits(state(load_base(tmp_path / "vit_out")), state(vit))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model, task = make_model("gpt2")
    model.save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "base").tensors
    merge_checkpoint(tmp_path / "base", make_adapter(model, r".*c_attn", task), tmp_path / "out")
    merged = load_base(tmp_path / "out")
    assert merged.lm_head.weight is merged.transformer.wte.weight
    with pytest.raises(UnsupportedError, match=r"'lm_head.weight' is tied to 'transformer.wte.weight'"):
        merge_checkpoint(tmp_path / "base", make_adapter(model, "lm_head", task), tmp_path / "out2")


def test_weights_in_other_formats_are_left_behind(tmp_path: Path) -> None:
    model, task = make_model("bert")
    model.save_pretrained(tmp_path / "base")
    for name in ("pytorch_model.bin", "onnx/model.onnx", "1_Pooling/config.json", ".cache/x.json", "vocab.txt"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text("{}")
    merge_checkpoint(tmp_path / "base", make_adapter(model, r".*query", task), tmp_path / "out")
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {"config.json", "model.safetensors", "1_Pooling/config.json", "vocab.txt"}


def test_links_out_of_the_base_are_not_copied(tmp_path: Path) -> None:
    model, task = make_model("bert")
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapter = make_adapter(model, r".*query", task)
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "secret").chmod(0o600)
    (base / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsupportedError, match=r"tokenizer_config\.json is a link to .*secret, outside of .*base"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    (base / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    (base / "config.json").unlink()
    (base / "config.json").symlink_to("../config.json")
    with pytest.raises(UnsupportedError, match=r"config\.json is a link to"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_bar_only_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, task = make_model("bert")
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(model, r".*query", task)
    capsys.readouterr()
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "shown", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "merging" in shown.err


# -- bad input and failing disks ------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, SdctAdapter]:
    model, task = make_model("bert")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base", hashed(make_adapter(model, r".*query", task), model)


def load_files(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def damage(folder: Path, how: str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    key = next(k for k in raw["weight_map"] if raw["weight_map"][k] == shard.name)
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "foreign":
        shard.write_bytes(b"PK\x03\x04" * 100)
    elif how == "huge header":
        shard.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    elif how == "shard missing":
        shard.unlink()
    elif how == "index without map":
        index.write_text("{}")
    elif how == "index not json":
        index.write_text("{")
    elif how == "index with other metadata":
        index.write_text(json.dumps(raw | {"metadata": "x"}))
    elif how == "index escapes":
        raw["weight_map"][key] = "../../etc/passwd.safetensors"
        index.write_text(json.dumps(raw))
    elif how == "index wrong":
        raw["weight_map"]["no.such.weight"] = shard.name
        index.write_text(json.dumps(raw))
    elif how == "two shards":
        save_file(load_file(shard), folder / "zz.safetensors")
        raw["weight_map"][key] = "zz.safetensors"
        index.write_text(json.dumps(raw))
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config not json":
        (folder / "config.json").write_text("not json")
    elif how == "no weights":
        for path in [*folder.glob("*.safetensors"), index]:
            path.unlink()
    else:
        raise AssertionError(how)


DAMAGES = {
    "truncated": "truncated",
    "foreign": "not a safetensors file",
    "huge header": "not a safetensors file",
    "shard missing": "missing",
    "index without map": "weight_map",
    "index not json": "JSON",
    "index with other metadata": "metadata must be an object",
    "index escapes": "beside it",
    "index wrong": "no.such.weight",
    "two shards": "two shards",
    "no config": "config.json",
    "config not json": "config.json",
    "no weights": "neither",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_base_is_refused_and_nothing_is_written(how: str, base: tuple[Path, SdctAdapter]) -> None:
    folder, adapter = base
    damage(folder, how)
    with pytest.raises(BaseMismatchError, match=DAMAGES[how]):
        merge_checkpoint(folder, adapter, folder.parent / "out")
    assert [p.name for p in folder.parent.iterdir()] == ["base"]


def test_bases_that_cannot_be_merged_say_why(base: tuple[Path, SdctAdapter], tmp_path: Path) -> None:
    folder, adapter = base
    out = tmp_path / "out"
    with pytest.raises(BaseMismatchError, match="other base weights"):
        merge_checkpoint(folder, dataclasses.replace(adapter, base_hash="sha256:00"), out)
    llama, _ = make_model("llama")
    with pytest.raises(BaseMismatchError, match="q_proj"):
        merge_checkpoint(folder, make_adapter(llama, r".*q_proj"), out)
    headed = dataclasses.replace(
        adapter,
        config=dataclasses.replace(adapter.config, modules_to_save=["score"]),
        saved={"score.weight": np.zeros((2, 36), np.float32)},
    )
    with pytest.raises(BaseMismatchError, match=r"score.weight"):
        merge_checkpoint(folder, headed, out)
    with pytest.raises(BaseMismatchError, match="no_folder"):
        merge_checkpoint(tmp_path / "no_folder", adapter, out)
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    config = json.loads((torn / "config.json").read_text())
    (torn / "config.json").write_text(json.dumps(config | {"hidden_size": 34, "num_attention_heads": 2}))
    with pytest.raises(BaseMismatchError, match="34"):
        merge_checkpoint(torn, adapter, out)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copyfile(folder / "config.json", pickled / "config.json")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"pytorch_model.bin.*convert"):
        merge_checkpoint(pickled, adapter, out)
    quantized = tmp_path / "quantized"
    model, task = make_model("bert")
    model.save_pretrained(quantized)
    tensors = load_file(quantized / "model.safetensors")
    name = f"{next(iter(adapter.modules))}.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, quantized / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"I8.*unquantized"):
        merge_checkpoint(quantized, dataclasses.replace(adapter, base_hash=None), out)
    assert not out.exists()
    assert task == "SEQ_CLS"


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "abc"},
        {"num_attention_heads": 5},
        {"model_type": "nope"},
        {"model_type": "t5"},
        {"num_hidden_layers": 1},
        {"id2label": [1]},
        {"dtype": "weird"},
        {"vocab_size": None},
    ],
)
def test_damaged_configurations(fields: dict[str, Any], base: tuple[Path, SdctAdapter]) -> None:
    folder, adapter = base
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(BaseMismatchError):
        merge_checkpoint(folder, adapter, folder.parent / "out")
    assert [p.name for p in folder.parent.iterdir()] == ["base"]


@pytest.mark.parametrize("names", [5, [], ["os"], ["pipeline"], ["NoSuchModel"]])
def test_an_unusable_class_name_falls_back_to_the_plain_model(names: Any, base: tuple[Path, SdctAdapter]) -> None:
    folder, adapter = base
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": names}))
    adapter = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, task_type=None))
    merge_checkpoint(folder, adapter, folder.parent / "out")
    before, after = load_files(folder), load_files(folder.parent / "out")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        f"{p}.weight" for p in adapter.modules
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_results_leave_no_output(value: float, base: tuple[Path, SdctAdapter], tmp_path: Path) -> None:
    folder, adapter = base
    name = f"{list(adapter.modules)[-1]}.weight"
    file = folder / Checkpoint(folder).tensors[name].file
    tensors = load_file(file)
    tensors[name][0, 0] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SdctError, match=rf"{name}.*NaN or infinite"):
        merge_checkpoint(folder, dataclasses.replace(adapter, base_hash=None), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_full_disk_and_existing_output_lose_nothing(
    base: tuple[Path, SdctAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sdct_export.weights.merging as module

    folder, adapter = base
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists"):
        merge_checkpoint(folder, adapter, tmp_path / "taken")
    assert (tmp_path / "taken" / "mine.txt").read_text() == "keep"

    written = []

    def full(path: Path, tensors: Any, metadata: Any) -> None:
        if written:
            path.write_bytes(b"part of a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(path, tensors, metadata)

    real = module.write_safetensors
    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.raises(OutputError, match="No space left"):
        merge_checkpoint(folder, adapter, tmp_path / "out")
    assert written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "taken"]


def test_bfloat16_saved_values_and_half_values_merge(tmp_path: Path) -> None:
    model, task = make_model("bert", torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    head = {"classifier.bias": np.array([0.5, 1.0 + 2**-7], ml_dtypes.bfloat16)}
    adapter = make_adapter(model, r".*query", task, saved=head)
    modules = {
        p: dataclasses.replace(e, values=e.values.astype(ml_dtypes.bfloat16)) for p, e in adapter.modules.items()
    }
    adapter = dataclasses.replace(adapter, modules=modules)
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    merge(model, adapter)
    merged = load_base(tmp_path / "out")
    assert same_bits(state(merged), state(model))
    assert np.array_equal(to_numpy(merged.classifier.bias), head["classifier.bias"])
