"""Take trained sDCT adapters to production: merge, export, and serve many from one model.

The names below load on first use, so that `import sdct_export` needs neither torch nor onnxruntime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import SdctAdapter
    from .config import SdctConfig
    from .errors import SdctError
    from .export import export_merged, export_multi
    from .merging import merge, merge_checkpoint
    from .projection import project
    from .tuning import SdctModel, get_sdct_model

__version__ = "0.1.0"
__all__ = [
    "SdctAdapter",
    "SdctConfig",
    "SdctError",
    "SdctModel",
    "export_merged",
    "export_multi",
    "get_sdct_model",
    "merge",
    "merge_checkpoint",
    "project",
]

_HOME = {
    "SdctAdapter": "adapter",
    "SdctConfig": "config",
    "SdctError": "errors",
    "SdctModel": "tuning",
    "export_merged": "export",
    "export_multi": "export",
    "get_sdct_model": "tuning",
    "merge": "merging",
    "merge_checkpoint": "merging",
    "project": "projection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
