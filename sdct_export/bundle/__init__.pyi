from .description import AdapterRecord as AdapterRecord
from .description import Bundle as Bundle
from .description import TensorSpec as TensorSpec
from .onnx_adapter import write_onnx_adapter as write_onnx_adapter
from .packing import bank_layout as bank_layout
from .packing import pack as pack
from .probe import Probe as Probe
