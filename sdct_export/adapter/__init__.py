"""What a person trained: one adapter in memory, its settings and its folder.

`folder` is the one parser of adapter files, which are untrusted input. numpy only.
"""

from ..lazy import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
