from .checkpoint import Checkpoint as Checkpoint
from .identity import base_hash as base_hash
from .model import check_base as check_base
from .model import find_linear as find_linear
from .model import load_base as load_base
from .reference import run_rows as run_rows
