"""Label smoothing for fastai, single-label and multi-label: as a loss, a callback, or one Learner method

Modules:

- `fastai_smooth.kernels.formula`: The softmax head's formula, and what it is computed against, in ops that torch can differentiate and compile.
- `fastai_smooth.kernels.fused_sigmoid`: The sigmoid head as one Triton kernel: reads a logit and its label, as they are, and writes the gradient.
- `fastai_smooth.kernels.fused_softmax`: The softmax head as one Triton kernel.
- `fastai_smooth.kernels.sharded`: The softmax head for classes that are too many for one device: logits as a DTensor that is sharded along the class axis.
- `fastai_smooth.kernels.sigmoid`: The sigmoid head in plain torch ops, with a hand-written gradient.
- `fastai_smooth.kernels.softmax`: The softmax head in plain torch ops: one exp a logit, one tensor of their size.
- `fastai_smooth.kernels.targets`: What the smoothed target q is: the formula of both heads, in one place."""

__version__ = "0.0.1"
