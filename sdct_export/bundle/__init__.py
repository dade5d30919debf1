"""What an exported folder holds: its description, the layout of its adapter bank, and the recorded probe.

JSON and numpy only: running a bundle needs neither torch nor onnx.
"""

from ..lazy import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
