from .bank import AdapterInfo as AdapterInfo
from .generation import Generation as Generation
from .model import MultiAdapterModel as MultiAdapterModel
