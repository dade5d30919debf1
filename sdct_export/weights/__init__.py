"""Changes of weights: found in LoRA adapters and tuned checkpoints, projected onto cosines, merged into a base.

Both directions stream a checkpoint layer by layer.
"""

from ..lazy import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
