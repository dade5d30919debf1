"""Every error a user can meet. Each message says what was wrong, where, and what to do about it."""

from __future__ import annotations


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
