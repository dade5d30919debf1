from .bank import AdapterInfo as AdapterInfo
from .model import MultiAdapterModel as MultiAdapterModel
