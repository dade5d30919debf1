from .changes import Change as Change
from .changes import from_peft as from_peft
from .changes import from_tuned as from_tuned
from .merging import merge as merge
from .merging import merge_checkpoint as merge_checkpoint
from .projection import project as project
