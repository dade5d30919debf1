from .bank import AdapterInfo as AdapterInfo
from .batching import ContinuousBatcher as ContinuousBatcher
from .batching import Event as Event
from .generation import Generation as Generation
from .generation import Sampling as Sampling
from .model import MultiAdapterModel as MultiAdapterModel
