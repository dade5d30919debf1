"""Training loops users have: transformers' Trainer, gradient checkpointing, bf16 autocast, `torch.compile`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from sdct_export import SdctAdapter, SdctConfig, SdctModel, get_sdct_model
from sdct_export.errors import AdapterFormatError, BaseMismatchError, ConfigError

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


def test_checkpoints_of_trainer_are_adapters_that_load(tmp_path: Path) -> None:
    """Twelve steps, and the second checkpoint after the last: each is the model as it was then."""
    model = started(scaling=0.5)
    loop = trainer(model, tmp_path / "out")
    loop.train()
    model.eval()
    want = model(input_ids=IDS).logits
    adapter = SdctAdapter.load(tmp_path / "out" / "checkpoint-12")
    saved = model.adapter()
    assert adapter.config == saved.config
    assert (adapter.base_hash, adapter.base_dtype) == (saved.base_hash, saved.base_dtype)
    assert adapter.trained_on is not None
    assert saved.trained_on is not None
    assert adapter.trained_on.to_dict() == saved.trained_on.to_dict()
    assert adapter.trained_on.probe is not None
    assert saved.trained_on.probe is not None
    for name, values in saved.trained_on.probe.outputs.items():
        np.testing.assert_allclose(adapter.trained_on.probe.outputs[name], values, rtol=1e-5, atol=1e-6)
    for name, entries in saved.modules.items():
        assert adapter.modules[name].values.tobytes() == entries.values.tobytes()
        assert adapter.modules[name].indices.tobytes() == entries.indices.tobytes()
        assert adapter.modules[name].shape == entries.shape
    assert {n: a.tobytes() for n, a in adapter.saved.items()} == {n: a.tobytes() for n, a in saved.saved.items()}
    again = SdctModel.from_adapter(FAMILIES["bert-classifier"].model(), tmp_path / "out" / "checkpoint-12").eval()
    assert torch.equal(again(input_ids=IDS).logits, want)
    half = SdctModel.from_adapter(FAMILIES["bert-classifier"].model(), tmp_path / "out" / "checkpoint-6").eval()
    assert (half(input_ids=IDS).logits - want).abs().max() > 1e-2
    adapter.save(tmp_path / "saved")  # and it is an adapter like any other
    assert SdctAdapter.load(tmp_path / "saved").trained_on is not None
    resumed = started(scaling=0.5)
    trainer(resumed, tmp_path / "out").train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    torch.testing.assert_close(resumed.eval()(input_ids=IDS).logits, want)
    with pytest.raises(ConfigError, match=r"with scaling 0\.5, in the model it has 1\.0"):
        trainer(started(), tmp_path / "out").train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    other = FAMILIES["bert-classifier"].model()
    with torch.no_grad():  # a weight that no adapter touches: only the probe can tell
        other.get_parameter("bert.embeddings.word_embeddings.weight").mul_(1.5)
    with pytest.raises(BaseMismatchError, match="other outputs"):
        SdctModel.from_adapter(other, adapter)


def test_the_shell_exports_a_checkpoint(tmp_path: Path) -> None:
    from click.testing import CliRunner
    from transformers import AutoModelForSequenceClassification

    from sdct_export.cli import main
    from sdct_export.runtime import MultiAdapterModel

    FAMILIES["bert-classifier"].model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_sdct_model(base, SdctConfig(["query", "value"], 30, modules_to_save=["classifier"]))
    trainer(model, tmp_path / "out").train()
    model.eval()
    arguments = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "out" / "checkpoint-12")]
    done = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "bundle")])
    assert done.exit_code == 0, done.output
    with MultiAdapterModel(tmp_path / "bundle", device="cpu") as bundle:
        feeds = {"input_ids": IDS.numpy(), "attention_mask": np.ones((2, 7), np.int64)}
        got = bundle.run(feeds, adapters=["checkpoint-12", None])["logits"]
    want = model(input_ids=IDS).logits.detach()
    with model.disable_adapter():
        base_row = model(input_ids=IDS).logits.detach()
    torch.testing.assert_close(torch.from_numpy(got[0]), want[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(got[1]), base_row[1], rtol=1e-4, atol=1e-4)
    assert (want - base_row).abs().max() > 1e-2


def test_several_adapters_in_one_checkpoint(tmp_path: Path) -> None:
    """Trainer's file, written as Trainer writes it: the active adapter is the one that loads, with its own head."""
    from safetensors.torch import save_file

    model = started()
    model.add_adapter("second", SdctConfig(["key"], 20, modules_to_save=["classifier"]))

    def saved(name: str) -> SdctAdapter:
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return SdctAdapter.load(tmp_path / name)

    first = saved("a")
    assert {n.rpartition(".")[2] for n in first.modules} == {"query", "value"}
    assert first.trained_on is not None
    assert first.trained_on.probe is not None
    model.set_adapter("second")
    with torch.no_grad():
        model.base.get_parameter("classifier.weight").add_(1)
    second = saved("b")
    assert {n.rpartition(".")[2] for n in second.modules} == {"key"}
    np.testing.assert_allclose(second.saved["classifier.weight"], first.saved["classifier.weight"] + 1, rtol=1e-6)
    with model.disable_adapter(), pytest.raises(AdapterFormatError, match="holds 2 adapters and none was active"):
        saved("c")
    model = started()
    with model.disable_adapter():
        only = saved("d")
    assert only.saved.keys() == first.saved.keys()
    assert only.trained_on is not None
    assert only.trained_on.probe is None


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
