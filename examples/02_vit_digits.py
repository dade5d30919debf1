"""One vision transformer, three cameras: adapters for rotated and for mirrored digits beside the untouched base.

A small ViT learns scikit-learn's upright digits. Two sDCT adapters then teach it digits that lie on their side and
digits seen in a mirror. One ONNX bundle serves all three in one batch.

    python examples/02_vit_digits.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from sdct_export import SdctConfig, export_multi, get_sdct_model, merge
from sdct_export.runtime import MultiAdapterModel

VIEWS = {"upright": lambda x: x, "rotated": lambda x: x.rot90(1, (-2, -1)), "mirrored": lambda x: x.flip(-1)}


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, epochs=epochs, steps_per_epoch=-(-len(images) // 64)
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            nn.functional.cross_entropy(model(pixel_values=images[rows]).logits, labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target)
    fit, test = slice(0, 1300), slice(1300, None)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10))
    train(base, images[fit], labels[fit], epochs=20, rate=2e-3)
    base.eval()

    views = {name: turn(images).contiguous() for name, turn in VIEWS.items()}
    adapters = {}
    for name in ("rotated", "mirrored"):
        model = get_sdct_model(copy.deepcopy(base), SdctConfig(["q_proj", "v_proj", "fc1"], n_coefficients=700))
        train(model, views[name][fit], labels[fit], epochs=15, rate=2e-2)
        adapters[name] = model.adapter()

    with tempfile.TemporaryDirectory() as folder:
        export_multi(base, adapters, Path(folder) / "bundle")
        model = MultiAdapterModel(Path(folder) / "bundle")
    # one batch: every test digit from all three cameras, each row with the adapter of its camera
    pixels = torch.cat([views[name][test] for name in VIEWS]).numpy()
    names = np.repeat(list(VIEWS), len(labels[test]))
    plain = model.run({"pixel_values": pixels})["logits"]
    chosen = [None if name == "upright" else str(name) for name in names]
    logits = model.run({"pixel_values": pixels}, chosen)["logits"]
    truth = np.tile(labels[test].numpy(), 3)
    print(f"{len(pixels)} images in one batch; {adapters['rotated'].n_parameters:,} numbers an adapter")
    print("camera     base  with its adapter")
    for name in VIEWS:
        rows = names == name
        scores = [(answer[rows].argmax(-1) == truth[rows]).mean() for answer in (plain, logits)]
        print(f"{name:9} {scores[0]:.3f}  {scores[1]:.3f}")

    worst = 0.0
    for name, adapter in adapters.items():
        with merge(base, adapter), torch.no_grad():
            want = base(pixel_values=views[name][test]).logits.numpy()
        worst = max(worst, float(np.abs(logits[names == name] - want).max()))
        assert not np.allclose(logits[names == name], plain[names == name], atol=0.1), "an adapter has no effect"
    print(f"largest difference from torch {worst:.1e}")
    assert worst < 1e-4
    upright = names == "upright"
    assert np.array_equal(logits[upright], plain[upright]), "base rows must not change by one bit"


if __name__ == "__main__":
    main()
