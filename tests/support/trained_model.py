"""A model as training leaves it."""

from __future__ import annotations

import torch

from sdct_export import SdctModel


def trained(model: SdctModel, seed: int = 0) -> SdctModel:
    """`model` with values and heads that are not what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.5
    return model
