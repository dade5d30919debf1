from .build import EngineManifest as EngineManifest
from .build import Profile as Profile
from .build import build_engine as build_engine
from .build import prepare_graph as prepare_graph
