"""Small seeded models of every supported family, random adapters for them, and what torch computes; for many tests.

Odd sizes on purpose; weights and biases are larger than an initialiser's, so that errors show. The reference here
edits weights with scipy's transforms and shares no code with the package.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from references import delta_weight
from torch import Tensor, nn

from sdct_export.adapter.adapter import SdctAdapter
from sdct_export.adapter.config import SdctConfig
from sdct_export.adapter.entries import Array, SdctEntries
from sdct_export.base.model import is_conv1d, linear_shape, model_hash
from sdct_export.bundle.description import Bundle
from sdct_export.contract import edge_dtype

Row = Mapping[str, float]  # adapter name -> scale; empty for the base


@dataclasses.dataclass(frozen=True)
class Family:
    """`model()` gives a fresh, seeded model in eval mode; `targets` and `saved` are what its adapters hold."""

    name: str
    task: str
    config: Callable[[], Any]
    architecture: str
    targets: tuple[str, ...]
    saved: tuple[str, ...] = ()

    def model(self, **overrides: Any) -> nn.Module:
        import transformers

        config = self.config()
        for name, value in overrides.items():
            setattr(config, name, value)
        torch.manual_seed(len(self.name))
        model = getattr(transformers, self.architecture)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.12 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
        return model


def _bert(**fields: Any) -> Callable[[], Any]:
    def config() -> Any:
        from transformers import BertConfig

        return BertConfig(
            vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=60,
            max_position_embeddings=64, **fields,
        )  # fmt: skip

    return config


def _roberta() -> Any:
    from transformers import RobertaConfig

    return RobertaConfig(
        vocab_size=99, hidden_size=60, num_hidden_layers=2, num_attention_heads=6, intermediate_size=72,
        max_position_embeddings=66, num_labels=4, type_vocab_size=1,
    )  # fmt: skip


def _vit() -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=60, image_size=12, patch_size=4,
        num_labels=5,
    )  # fmt: skip


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=99, n_embd=60, n_layer=2, n_head=6, n_positions=64, bos_token_id=1, eos_token_id=2)


def _decoder(name: str, **fields: Any) -> Callable[[], Any]:
    def config() -> Any:
        import transformers

        return getattr(transformers, name)(
            vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=90, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields,
        )  # fmt: skip

    return config


FAMILIES = {
    family.name: family
    for family in (
        Family("bert", "FEATURE_EXTRACTION", _bert(), "BertModel", ("query", "value")),
        Family(
            "bert-classifier", "SEQ_CLS", _bert(num_labels=4), "BertForSequenceClassification", ("query", "value"),
            ("classifier",),
        ),
        Family(
            "roberta-classifier", "SEQ_CLS", _roberta, "RobertaForSequenceClassification", ("query", "key", "value"),
            ("classifier.dense", "classifier.out_proj"),
        ),
        Family("vit", "IMAGE_CLS", _vit, "ViTForImageClassification", ("q_proj", "v_proj"), ("classifier",)),
        Family("gpt2", "CAUSAL_LM", _gpt2, "GPT2LMHeadModel", ("attn.c_attn", "mlp.c_proj")),
        Family("llama", "CAUSAL_LM", _decoder("LlamaConfig"), "LlamaForCausalLM", ("q_proj", "v_proj", "down_proj")),
        Family("qwen2", "CAUSAL_LM", _decoder("Qwen2Config"), "Qwen2ForCausalLM", ("q_proj", "v_proj")),
        Family("phi3", "CAUSAL_LM", _decoder("Phi3Config"), "Phi3ForCausalLM", ("qkv_proj", "gate_up_proj")),
    )
}  # fmt: skip


def target_shapes(family: Family, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Adapted module -> (d_out, d_in)."""
    shapes = {n: linear_shape(m) for n, m in model.named_modules() if n.endswith(family.targets)}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def with_fresh_head(folder: Path, task: str, labels: int, dtype: torch.dtype | str = "auto") -> nn.Module:
    """A checkpoint as a person loads it to train a classifier: transformers' own class, the head random."""
    import transformers

    kind = {
        "SEQ_CLS": "SequenceClassification",
        "TOKEN_CLS": "TokenClassification",
        "IMAGE_CLS": "ImageClassification",
    }
    torch.manual_seed(0)
    loader = getattr(transformers, f"AutoModelFor{kind[task]}")
    model: nn.Module = loader.from_pretrained(folder, num_labels=labels, dtype=dtype)
    return model.eval()


def random_adapter(
    family: Family,
    model: nn.Module,
    seed: int,
    *,
    n: int = 40,
    labels: int | None = None,
    scaling: float = 0.5,
    modules: Sequence[str] | None = None,
) -> SdctAdapter:
    """`n` coefficients in each target (or in `modules`), and, if the family has heads, heads of `labels`."""
    rng = np.random.default_rng(seed)
    shapes = target_shapes(family, model)
    entries = {}
    for name in modules if modules is not None else shapes:
        flat = rng.choice(shapes[name][0] * shapes[name][1], size=n, replace=False)
        indices = np.stack(np.unravel_index(flat, shapes[name]), axis=1).astype(np.int32)
        entries[name] = SdctEntries(rng.normal(scale=0.6, size=n).astype(np.float32), indices, shapes[name])
    saved: dict[str, Array] = {}
    for path in family.saved if labels is not None else ():
        d_out, d_in = model.get_parameter(f"{path}.weight").shape
        rows = labels if path == family.saved[-1] else d_out
        assert rows is not None
        saved[f"{path}.weight"] = rng.normal(scale=0.2, size=(rows, d_in)).astype(np.float32)
        saved[f"{path}.bias"] = rng.normal(scale=0.2, size=rows).astype(np.float32)
    config = SdctConfig(
        target_modules=family.targets,
        n_coefficients=n,
        scaling=scaling,
        modules_to_save=family.saved if saved else None,
        task_type=family.task,
    )
    used = {name: shapes[name] for name in entries}
    return SdctAdapter(config, entries, saved, model_hash(model, used, "float32") if used else None, "float32")


def torch_rows(
    model: nn.Module, inputs: Mapping[str, Tensor], rows: Sequence[Row], adapters: Mapping[str, SdctAdapter]
) -> dict[str, Array]:
    """Named outputs with row `i` computed by a copy of `model` that has the adapters `rows[i]` in its weights."""
    results: dict[str, list[Array]] = {}
    for index, row in enumerate(rows):
        one = {name: value[index : index + 1] for name, value in inputs.items()}
        with torch.no_grad():
            outputs = edited(model, row, adapters)(**one)
        for name, value in outputs.items():
            if isinstance(value, Tensor):
                results.setdefault(name, []).append(value.float().numpy())
    return {name: np.concatenate(parts) for name, parts in results.items()}


def edited(model: nn.Module, row: Row, adapters: Mapping[str, SdctAdapter]) -> nn.Module:
    """A copy of `model` with `W + sum_k s_k dW_k`, and `(1 - sum_k s_k) W + sum_k s_k W_k` for saved parameters."""
    copied = copy.deepcopy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    base = {name: parameter.detach().double().numpy() for name, parameter in parameters.items()}
    change = {name: np.zeros_like(value) for name, value in base.items()}
    for name, scale in row.items():
        adapter = adapters[name]
        for path, entries in adapter.modules.items():
            module = model.get_submodule(path)
            shape = linear_shape(module)
            assert shape is not None
            delta = delta_weight(entries.values, entries.indices, shape, adapter.config.scaling)
            change[f"{path}.weight"] += scale * (delta.T if is_conv1d(module) else delta)
        for parameter, saved in adapter.saved.items():
            own = np.zeros_like(base[parameter])
            if parameter.endswith(".bias"):
                own += np.finfo(np.float32).min / 2
            own[: len(saved)] = saved
            change[parameter] += scale * (own - base[parameter])
    for name, delta in change.items():
        if delta.any():  # a new parameter, so that a weight tied to it elsewhere stays
            path, _, leaf = name.rpartition(".")
            value = torch.from_numpy(base[name] + delta).to(parameters[name].dtype)
            setattr(copied.get_submodule(path), leaf, nn.Parameter(value))
    return copied


def feeds(
    bundle: Bundle, rows: Sequence[Row], adapters: Mapping[str, SdctAdapter], *, blend: int | None = None
) -> dict[str, Array]:
    """The adapter inputs of a bundle's graph: slot 0 the base, then `adapters` in order."""
    names = list(adapters)
    blend = blend or max(1, *map(len, rows))
    ids, scales = np.zeros((len(rows), blend), np.int32), np.zeros((len(rows), blend), np.float32)
    for i, row in enumerate(rows):
        for k, (name, scale) in enumerate(row.items()):
            ids[i, k], scales[i, k] = names.index(name) + 1, scale
    slots = len(names) + 1
    result: dict[str, Array] = {"adapter_ids": ids, "adapter_scales": scales}
    for group in bundle.groups:
        n = sum(group.capacity)
        values, indices = np.zeros((slots, n), np.float32), np.zeros((slots, n, 2), np.int32)
        for slot, name in enumerate(names, 1):
            start = 0
            for module, capacity in zip(group.modules, group.capacity, strict=True):
                if (entries := adapters[name].modules.get(module)) is not None:
                    order = np.lexsort((entries.indices[:, 1], entries.indices[:, 0]))
                    end = start + entries.n
                    values[slot, start:end] = entries.values[order] * np.float32(adapters[name].config.scaling)
                    indices[slot, start:end] = entries.indices[order]
                    indices[slot, end : start + capacity] = entries.indices[order[-1]]
                start += capacity
        result[f"sdct.{group.name}.values"], result[f"sdct.{group.name}.indices"] = values, indices
    for head in bundle.heads:
        dtype = np.dtype(edge_dtype(bundle.dtype))
        weight, bias = np.zeros((slots, head.d_out, head.d_in), dtype), np.zeros((slots, head.d_out), dtype)
        present = np.zeros(slots, np.float32)
        for slot, name in enumerate(names, 1):
            saved = adapters[name].saved
            if f"{head.module}.weight" in saved:
                labels = len(saved[f"{head.module}.weight"])
                weight[slot, :labels] = saved[f"{head.module}.weight"]
                bias[slot, labels:] = np.finfo(dtype).min / 2
                bias[slot, :labels] = saved.get(f"{head.module}.bias", np.zeros(labels))
                present[slot] = 1
        result |= {
            f"sdct.{head.module}.weight": weight,
            f"sdct.{head.module}.bias": bias,
            f"sdct.{head.module}.present": present,
        }
    return result
