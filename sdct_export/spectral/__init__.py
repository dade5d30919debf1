"""The mathematics: cosine transforms of any length, and which coefficients an adapter holds.

Nothing here knows of models, files or graphs.
"""

from ..lazy import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
