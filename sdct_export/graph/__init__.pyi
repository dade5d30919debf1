from .bfloat16 import FitBfloat16 as FitBfloat16
from .function_body import functions_for as functions_for
from .insert import InsertAdapters as InsertAdapters
from .match import Site as Site
from .match import match_linears as match_linears
from .quantization import QuantizeWeights as QuantizeWeights
