"""Everything a user needs. Import it after fastai's own star import, whose label smoothing losses it replaces:
`from fastai.vision.all import *`, then `from fastai_smooth.all import *`."""
from .kernels import *
from .losses import *
from .prior import *
from .callback import *
from .smoothed import *
from .online import OnlineLabelSmoothing
from .fused import FusedHead
from .learner import *
from .measures import nll, brier_score, calibration_error, classwise_calibration_error, smooth_calibration_error
from .intervals import if_calibrated, bootstrap_interval
from .ranking import risk_coverage, risk_at, coverage_at, aurc
from .metrics import NLL, Brier, ECE, ClasswiseECE, SmoothECE, AURC, NLLAfterT
from .scaling import best_temperature
from .interpret import CalibrationInterpretation
from .tune import EpsSuggestion
from .distributed import GlobalMean
from .examples import digits_folder
