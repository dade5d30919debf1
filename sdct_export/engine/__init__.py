"""From a bundle to a TensorRT engine: lower the graph to the plugin, build, record what was built.

TensorRT is imported only where an engine is really built or described.
"""

from ..lazy import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
