"""Merge an adapter into the base weights: `W <- W + scaling * C_out^T F C_in`, in memory or from checkpoint to checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from torch import Tensor, nn

from .adapter import SdctAdapter


class Merged:
    """A model with an adapter merged into it; `unmerge`, or leaving a `with` block, restores the weights bit for bit."""

    def __init__(self, model: nn.Module, originals: dict[str, Tensor]) -> None:
        self.model = model
        self._originals = originals

    def unmerge(self) -> None:
        """Put the original weights back. Does nothing the second time."""
        raise NotImplementedError

    def __enter__(self) -> Merged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unmerge()


def merge(model: nn.Module, adapter: SdctAdapter, scale: float = 1.0) -> Merged:
    """Merge `adapter` into `model` in place."""
    raise NotImplementedError


def merge_checkpoint(
    base_path: str | Path, adapter: SdctAdapter | str | Path, output_path: str | Path, *, progress: bool | None = None
) -> None:
    """Write the checkpoint `base_path` with `adapter` merged into it to the new folder `output_path`."""
    raise NotImplementedError
