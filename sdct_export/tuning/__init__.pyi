from .combination import combine as combine
from .distillation import distill as distill
from .model import SdctModel as SdctModel
from .model import get_sdct_model as get_sdct_model
