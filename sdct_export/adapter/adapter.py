"""`SdctAdapter`: one trained adapter in memory, frozen and valid once it exists. numpy only; torch on demand."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ..errors import AdapterFormatError, BaseMismatchError, SdctError
from .config import SdctConfig
from .entries import Array, SdctEntries, check_fit
from .folder import WEIGHTS_FILE, Contents, read_folder, write_folder
from .hub import download, is_repository, upload
from .state import STATE_FILE, is_checkpoint, read_checkpoint
from .training import TrainingRecord

if TYPE_CHECKING:
    import torch


_READINGS = 20  # of a folder that another process replaces all the time


@dataclasses.dataclass(frozen=True)
class SdctAdapter:
    """A trained sDCT adapter.

    Args:
        config: its settings.
        modules: module path in the base model -> entries.
        saved: parameters of `modules_to_save` stored in full, under their own names (e.g. `classifier.weight`).
        base_hash: `base_hash` of the model it was trained on, or None where unknown.
        base_dtype: dtype name in which the base's weights are hashed.
        trained_on: what it was trained on, None where unknown (projected from weights, or saved by an older version).

    Raises:
        AdapterFormatError: it is empty, a saved parameter is not finite, or one that no checkpoint holds is not saved.
    """

    config: SdctConfig
    modules: Mapping[str, SdctEntries]
    saved: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    base_hash: str | None = None
    base_dtype: str | None = None
    trained_on: TrainingRecord | None = None

    def __post_init__(self) -> None:
        if not self.modules and not self.saved:
            raise AdapterFormatError(
                "the adapter holds no adapted module and no saved module; there is nothing to apply"
            )
        for name, array in self.saved.items():
            if not np.isfinite(array.astype(np.float32, copy=False)).all():
                raise AdapterFormatError(
                    f"saved parameter {name!r} holds NaN or infinite values; retrain or repair it"
                )
            array.setflags(write=False)
        fresh = () if self.trained_on is None else self.trained_on.fresh_parameters or ()
        lost = sorted(set(fresh) - set(self.saved))
        if lost:
            raise AdapterFormatError(
                f"the base's checkpoint does not hold {lost[0]!r} ({len(lost)} such parameters) and the adapter does "
                f"not save it, so its value would be lost; name {lost[0].rpartition('.')[0]!r} in modules_to_save"
            )
        for field in ("modules", "saved"):
            object.__setattr__(self, field, MappingProxyType(dict(sorted(getattr(self, field).items()))))

    @classmethod
    def load(cls, path: str | Path, *, max_bytes: int | None = None) -> SdctAdapter:
        """Read and validate an adapter folder, or a checkpoint of `transformers.Trainer` (its active adapter).

        Args:
            path: the folder. One that is replaced meanwhile (`save(overwrite=True)`) is read again, so that its files
                are of one adapter.
            max_bytes: most bytes its tensors may have, where the caller has room for no more.

        Raises:
            AdapterFormatError: naming file, module and remedy.
            BaseMismatchError: its tensors have more than `max_bytes`; they are not read.
        """
        for _ in range(_READINGS):
            before = _stamp(path)
            try:
                adapter = cls._read(Path(path), max_bytes)
            except SdctError:
                if _stamp(path) == before:
                    raise
            else:
                if _stamp(path) == before:
                    return adapter
        raise AdapterFormatError(f"{path} is replaced faster than it can be read; load it when its writers are done")

    @classmethod
    def _read(cls, path: Path, max_bytes: int | None) -> SdctAdapter:
        checkpoint = is_checkpoint(path)
        contents = (read_checkpoint if checkpoint else read_folder)(path, max_bytes=max_bytes)
        try:
            return cls(*contents)
        except AdapterFormatError as error:
            raise AdapterFormatError(f"{path / (STATE_FILE if checkpoint else WEIGHTS_FILE)}: {error}") from None

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> SdctAdapter:
        """`load` a folder, or the adapter in a repository of the Hugging Face Hub (`user/name`).

        Args:
            name_or_path: a folder; what is none, a repository.
            revision: branch, tag or commit of the repository.
            token: for a private repository; None for the one that `hf auth login` has stored.

        Raises:
            AdapterFormatError: there is no such folder or repository, it is out of reach, or damaged.
        """
        if os.path.isdir(name_or_path) or not is_repository(str(name_or_path)):  # noqa: PTH112, as in `read_folder`
            return cls.load(name_or_path)
        return cls.load(download(str(name_or_path), revision=revision, token=token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Write the adapter's files, and nothing of the base, into a repository of the Hugging Face Hub.

        Args:
            repo_id: `user/name`; made where it does not exist.
            commit_message: of the one commit.
            private: whether a repository that is made now is private.
            token: None for the one that `hf auth login` has stored.
            revision: the branch to write to, made where it does not exist; the default one otherwise.
            create_pr: open a pull request instead of writing to the branch.

        Returns:
            The commit's URL.

        Raises:
            AdapterFormatError: its config does not name what it saves.
            ConfigError: `repo_id` cannot name a repository.
            OutputError: the repository cannot be reached or written.
        """
        return upload(
            self._contents(),
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the adapter folder `path`, complete or not at all. The same adapter always gives the same bytes.

        With `overwrite` an adapter that stands there is replaced: at any moment the old or the new one is whole.

        Raises:
            AdapterFormatError: its config does not name what it saves, so that the folder would not load.
            OutputError: `path` exists already and, with `overwrite`, is or holds something else than an adapter; or
                writing failed.
        """
        write_folder(path, self._contents(), overwrite=overwrite)

    def _contents(self) -> Contents:
        return Contents(self.config, self.modules, self.saved, self.base_hash, self.base_dtype, self.trained_on)

    @property
    def n_parameters(self) -> int:
        """Trained numbers: coefficients plus saved parameters."""
        return sum(e.n for e in self.modules.values()) + sum(int(a.size) for a in self.saved.values())

    def entries(self, module: str) -> SdctEntries:
        """The entries of one module. Raises `BaseMismatchError` where the adapter does not adapt it."""
        try:
            return self.modules[module]
        except KeyError:
            known = ", ".join(list(self.modules)[:3])
            raise BaseMismatchError(
                f"the adapter has no module {module!r}; it adapts {len(self.modules)} modules ({known}, ...)"
            ) from None

    def delta_weight(self, module: str, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """`dW = scaling * C_out^T F C_in` of one module as a float32 torch tensor `[d_out, d_in]`.

        Args:
            module: module path, e.g. `model.layers.0.self_attn.q_proj`.
            shape: `(d_out, d_in)`; needed only where the adapter's file does not record it.
        """
        import torch

        from ..spectral.transform import delta_weight

        entries = self.entries(module)
        shape = shape or entries.shape
        if shape is None:
            raise BaseMismatchError(f"the adapter does not record the shape of {module!r}; pass shape=(d_out, d_in)")
        check_fit(module, entries, shape)
        values = torch.from_numpy(entries.float32(self.config.scaling).astype(np.float64))
        return delta_weight(values, torch.from_numpy(entries.indices.astype(np.int64)), shape).float()


def _stamp(path: str | Path) -> tuple[int, ...] | None:
    """What another folder at `path` would not have, None where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116, since a path may be no path at all
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
