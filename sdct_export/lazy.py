"""Public names that load on first use: the `__init__.pyi` beside a package's `__init__.py` says which, and from where.

    __getattr__, __dir__, __all__ = hand_on(__name__, __file__)

The stub is what type checkers read too, so each name stands in one place: `from .module import name as name`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import missing_package


def hand_on(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` for the package whose `__init__.py` is `file` (PEP 562)."""
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    home = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}

    def getattr_(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f".{home[name]}", package), name)
        except ModuleNotFoundError as error:
            missing = missing_package(error)
            if missing is None:
                raise
            raise ModuleNotFoundError(f"{package}.{name}: {missing}", name=error.name) from None

    def dir_() -> list[str]:
        return sorted({*vars(import_module(package)), *home})

    return getattr_, dir_, sorted(home)
