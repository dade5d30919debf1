"""Every error a user can meet. Each message says what was wrong, where, and what to do about it."""

from __future__ import annotations

# what the base installation lacks, by the extra that brings it
_EXTRAS = {
    "sdct_export[torch]": ("torch", "transformers", "onnx", "onnx_ir", "onnxscript"),
    "sdct_export[cpu]": ("onnxruntime",),
}


class SdctError(Exception):
    """Base of all errors raised on purpose by this package; the command line prints its message and exits 1."""


class AdapterFormatError(SdctError):
    """An adapter or bundle folder is damaged, foreign, or of a format this version cannot read."""


class BaseMismatchError(SdctError):
    """An adapter does not fit the base model it is used with (module, shape or weights differ)."""


class ConfigError(SdctError):
    """A setting has a value that cannot work."""


class UnsupportedError(SdctError):
    """The input is well formed, but this version cannot handle it; the message names the part and the reason."""


class UnknownAdapterError(SdctError, KeyError):
    """A request names an adapter that is not loaded, or a slot beyond the bank."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0]) if self.args else ""


class OutputError(SdctError):
    """An output could not be written; whatever stood at its place before is untouched."""


class VerificationError(SdctError):
    """Two backends, or a file and its recorded hash, disagree."""


def missing_package(error: BaseException) -> str | None:
    """What to install where `error` says that an optional package is not there, None where it says anything else."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = error.name.partition(".")[0]
    for extra, packages in _EXTRAS.items():
        if package in packages:
            gpu = ", or sdct_export[gpu] for an NVIDIA GPU" if package == "onnxruntime" else ""
            return f"this needs {package}, which is not installed: pip install '{extra}'{gpu}"
    return None


def an(noun: str) -> str:
    """`noun`, such as the name of a class, behind its article."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
