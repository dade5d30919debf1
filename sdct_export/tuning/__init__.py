"""Training of sDCT adapters: `get_sdct_model` puts them on the linear layers of any torch model; `distill`, `combine`.

`layer` is the mathematics, `inject` finds where it goes, `model` is what a training loop holds.
"""

from ..lazy import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
