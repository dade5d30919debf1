from .combination import combine as combine
from .model import SdctModel as SdctModel
from .model import get_sdct_model as get_sdct_model
