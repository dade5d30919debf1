"""Graphs that another tool made: read the file of a stranger, find the base's layers in it by their weights.

Nothing is found by its name. What is found here, `graph/` puts adapters on.
"""

from ..lazy import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
