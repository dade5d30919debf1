from .adapter import SdctAdapter as SdctAdapter
from .adapter import SdctConfig as SdctConfig
from .adoption import export_onnx as export_onnx
from .errors import SdctError as SdctError
from .export import export_merged as export_merged
from .export import export_multi as export_multi
from .tuning import SdctModel as SdctModel
from .tuning import combine as combine
from .tuning import distill as distill
from .tuning import get_sdct_model as get_sdct_model
from .weights import merge as merge
from .weights import merge_checkpoint as merge_checkpoint
from .weights import project as project

__version__: str
