"""Label smoothing on plain tensors: the smoothed target, the two losses, and means over several processes. Needs torch and nothing else."""
from . import distributed, functional
from .distributed import *
from .functional import *

__all__ = functional.__all__ + distributed.__all__
