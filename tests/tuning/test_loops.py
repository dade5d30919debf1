"""Training loops users have: transformers' Trainer, gradient checkpointing, bf16 autocast, `torch.compile`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from sdct_export import SdctConfig, SdctModel, get_sdct_model

IDS = torch.tensor([[5, 17, 40, 3, 22, 71, 9], [90, 2, 2, 61, 8, 33, 14]])
LABELS = torch.tensor([1, 3])


def started(**fields: Any) -> SdctModel:
    """A classifier whose adapter has taken a step, so that every gradient matters."""
    config = SdctConfig(["query", "value"], 30, modules_to_save=["classifier"], **fields)
    model = get_sdct_model(FAMILIES["bert-classifier"].model(), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".values"):
                parameter.normal_(generator=generator)
    return model


def loss_and_gradients(model: nn.Module, of: SdctModel) -> tuple[Tensor, list[Tensor]]:
    of.zero_grad()
    loss = model(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    gradients = [p.grad for p in of.parameters() if p.requires_grad]
    assert len(gradients) == 4 + 2
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    return loss.detach(), [g.clone() for g in gradients if g is not None]


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Sixteen texts with one of two labels and a column the model does not take."""

    column_names = ("input_ids", "labels", "text")

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": (torch.arange(7) * 5 + index % 2 * 40 + index) % 99, "labels": index % 2}


def trainer(model: SdctModel, folder: Path, **fields: Any) -> Any:
    import transformers

    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=2e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="steps", save_steps=6, logging_strategy="no", seed=0, **fields,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def test_trainer_trains_evaluates_checkpoints_and_resumes(tmp_path: Path) -> None:
    model = started()
    frozen = model.base.get_parameter("bert.encoder.layer.0.attention.self.query.weight").clone()
    loop = trainer(model, tmp_path)
    assert loop.label_names == ["labels"]
    before = loop.evaluate()["eval_loss"]
    loop.train()
    assert loop.evaluate()["eval_loss"] < 0.8 * before
    assert torch.equal(model.base.get_parameter("bert.encoder.layer.0.attention.self.query.weight"), frozen)
    checkpoint = tmp_path / "checkpoint-6" / "model.safetensors"
    base_bytes = 4 * sum(p.numel() for p in model.base.parameters())
    assert checkpoint.stat().st_size < base_bytes / 10  # the base is not in it
    resumed = started()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(checkpoint.parent))
    for one, other in zip(resumed.adapter().modules.values(), model.adapter().modules.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(one.values.copy()), torch.from_numpy(other.values.copy()))


def test_trainer_with_bf16_and_gradient_checkpointing(tmp_path: Path) -> None:
    model = started()
    loop = trainer(model, tmp_path, bf16=True, gradient_checkpointing=True)
    before = loop.evaluate()["eval_loss"]
    loop.train()
    assert loop.evaluate()["eval_loss"] < 0.8 * before
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_trainer_drops_columns_that_the_forward_does_not_take(tmp_path: Path) -> None:
    loop = trainer(started(), tmp_path)
    loop._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "labels"} <= set(loop._signature_columns)
    assert not {"text", "args", "kwargs"} & (set(loop._signature_columns) - {"kwargs"})


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = started()
    loss, gradients = loss_and_gradients(model, model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, recomputed = loss_and_gradients(model, model)
    torch.testing.assert_close(again, loss)
    for one, other in zip(recomputed, gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_bf16_autocast_stays_near_float32() -> None:
    model = started()
    loss, gradients = loss_and_gradients(model, model)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    query = model.base.get_submodule("bert.encoder.layer.1.attention.self.query")
    query.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        half, rounded = loss_and_gradients(model, model)
    assert seen[0][1] == torch.bfloat16
    torch.testing.assert_close(half.float(), loss, rtol=0.1, atol=0.1)
    for one, other in zip(rounded, gradients, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.25 * other.norm()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_gives_the_same_numbers_without_a_graph_break(backend: str) -> None:
    model = started()
    loss, gradients = loss_and_gradients(model, model)
    torch._dynamo.reset()
    compiled: nn.Module = torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[assignment]
    again, recomputed = loss_and_gradients(compiled, model)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
    for one, other in zip(recomputed, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with model.disable_adapter(), torch.no_grad():
        base = compiled(input_ids=IDS).logits
        assert (base - model(input_ids=IDS).logits).abs().max() < 1e-5
    with torch.no_grad():
        assert (base - compiled(input_ids=IDS).logits).abs().max() > 1e-3


def test_device_and_dtype_moves_take_the_adapter_along() -> None:
    model = started()
    want = model(input_ids=IDS).logits
    double = copy.deepcopy(model).double()
    torch.testing.assert_close(double(input_ids=IDS).logits.float(), want, rtol=1e-4, atol=1e-4)
    moved = model.to("cpu")
    assert moved is model
    assert {p.device.type for p in copy.deepcopy(model).to("meta").parameters()} == {"meta"}
    assert {b.device.type for b in copy.deepcopy(model).to("meta").buffers()} == {"meta"}
