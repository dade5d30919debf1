"""The model an adapter belongs to: loading it, finding its linear layers, telling it from others.

`reference` is what torch computes for rows with adapters; every export is compared with it.
"""

from ..lazy import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
