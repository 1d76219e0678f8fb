"""Label smoothing for fastai, single-label and multi-label: as a loss, a callback, or one Learner method

Modules:

- `fastai_smooth.kernels.sigmoid`: The sigmoid head in plain torch ops, with a hand-written gradient.
- `fastai_smooth.kernels.softmax`: The softmax head in plain torch ops, with a hand-written gradient.
- `fastai_smooth.kernels.targets`: What the smoothed target q is: the formula of both heads, in one place."""

__version__ = "0.0.1"
