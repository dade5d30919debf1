from .adapter import SdctAdapter as SdctAdapter
from .config import SdctConfig as SdctConfig
from .entries import SdctEntries as SdctEntries
from .plot import plot_spectrum as plot_spectrum
from .summary import ModuleSummary as ModuleSummary
from .summary import summarize as summarize
