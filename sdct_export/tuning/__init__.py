"""Training of sDCT adapters: `get_sdct_model` puts them on the linear layers of any torch model."""

from .model import SdctModel, get_sdct_model

__all__ = ["SdctModel", "get_sdct_model"]
