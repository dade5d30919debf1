"""Run exported bundles: many adapters on one model, mixed within a batch. Never imports torch."""

from .bank import AdapterInfo
from .model import MultiAdapterModel

__all__ = ["AdapterInfo", "MultiAdapterModel"]
