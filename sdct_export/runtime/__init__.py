"""Run exported bundles: many adapters on one model, mixed within a batch. Never imports torch.

A backend (`ort`, `trt`) is a session and its memory; `bank` decides which adapter lies in which slot.
"""

from ..lazy import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
