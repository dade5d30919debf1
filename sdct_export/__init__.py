"""Take trained sDCT adapters to production: merge them, export them, and serve many from one model.

The public names (see `__init__.pyi`) load on first use: `import sdct_export` needs neither torch nor onnxruntime.
"""

from .lazy import hand_on

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = hand_on(__name__, __file__)
