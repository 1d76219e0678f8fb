"""Label smoothing on plain tensors: what the smoothed target is, and the two losses. Needs torch and nothing else."""
from .functional import *
from .functional import __all__
