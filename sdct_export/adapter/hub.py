"""Adapters on the Hugging Face Hub: the three files of an adapter's folder in a repository, and nothing else."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import AdapterFormatError, ConfigError, OutputError, SdctError
from .folder import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE, Contents, write_folder

FILES = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def is_repository(name: str) -> bool:
    """Whether `name` can be that of a repository, `user/name` or `name`."""
    return _REPOSITORY.fullmatch(name) is not None


def download(repository: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder in the hub's cache that holds the adapter of a repository, downloaded where it is not there yet.

    Where the hub is switched off (`HF_HUB_OFFLINE=1`) or out of reach, what the cache holds is taken.

    Raises:
        AdapterFormatError: there is no such repository or no adapter in it, or it can neither be reached nor found.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):  # type: ignore[misc]
        """No bar for three small files."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings | {"disable": True})

    with _one_line(f"cannot get adapter {repository!r} from the Hugging Face Hub", AdapterFormatError):
        folder = Path(
            snapshot_download(repository, revision=revision, token=token, allow_patterns=list(FILES), tqdm_class=Quiet)
        )
    if not (folder / CONFIG_FILE).exists():
        raise AdapterFormatError(
            f"repository {repository!r} of the Hugging Face Hub holds no adapter (no {CONFIG_FILE}); name another one"
        )
    return folder


def upload(
    contents: Contents,
    repository: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Write an adapter's files into a repository in one commit, made where there is none yet; the commit's URL.

    Other files of the repository stay; a probe of an adapter that was there before goes.

    Raises:
        ConfigError: `repository` cannot be the name of one.
        OutputError: it cannot be reached or written.
    """
    from huggingface_hub import HfApi

    if not is_repository(repository):
        raise ConfigError(f"{repository!r} cannot name a repository of the Hugging Face Hub; use 'user/name'")
    api = HfApi(token=token)
    with (
        tempfile.TemporaryDirectory() as scratch,
        _one_line(f"cannot upload the adapter to {repository!r} on the Hugging Face Hub", OutputError),
    ):
        write_folder(folder := Path(scratch) / "adapter", contents)
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=commit_message or "Upload an sDCT adapter",
            revision=revision,
            create_pr=create_pr,
            allow_patterns=list(FILES),
            delete_patterns=[TRAINING_FILE],
        )
        return str(commit.commit_url)


@contextmanager
def _one_line(what: str, error: type[SdctError]) -> Iterator[None]:
    """Raise the errors of `huggingface_hub` and of the network below it, which share no base class, as `error`."""
    from huggingface_hub import constants, errors

    try:
        yield
    except SdctError:
        raise
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository, or it needs a token (`hf auth login`, or token=...)"
    except errors.RevisionNotFoundError:
        reason = "it has no such revision"
    except errors.LocalTokenNotFoundError:
        reason = "it needs a token; `hf auth login`, or token=..."
    except Exception as problem:
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        if constants.HF_HUB_OFFLINE:
            reason = "the hub is switched off; unset HF_HUB_OFFLINE"
        elif isinstance(problem, errors.LocalEntryNotFoundError):
            reason = f"it is out of reach, and the cache does not hold the adapter ({first}); check the network"
        else:
            reason = first
    else:
        return
    raise error(f"{what}: {reason}")
