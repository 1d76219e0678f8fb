"""Everything a user needs. Import it after fastai's own star import, whose label smoothing losses it replaces:
`from fastai.vision.all import *`, then `from fastai_smooth.all import *`."""
from .kernels import smooth_targets, smooth_cross_entropy, smooth_binary_cross_entropy_with_logits
from .losses import *
from .prior import *
from .callback import *
from .learner import *
