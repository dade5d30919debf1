"""From a torch model to a multi-adapter graph: trace it, match modules to nodes, insert the operator and its body.

Each pass is one file that says what it requires, ensures and leaves unchanged.
"""

from ..lazy import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
