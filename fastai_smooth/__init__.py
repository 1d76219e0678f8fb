"""Label smoothing for fastai, single-label and multi-label: as a loss, a callback, or one Learner method

Modules:

- `fastai_smooth.kernels.linear`: The losses of a linear layer, of whose logits only a chunk of rows is there at a time.
- `fastai_smooth.kernels.sharded`: The softmax loss for classes that are too many for one device: logits as a DTensor that is sharded along the class axis.
- `fastai_smooth.kernels.sigmoid`: The sigmoid loss in torch ops, with a hand-written gradient.
- `fastai_smooth.kernels.softmax`: The softmax loss in torch ops: a formula that torch can differentiate and compile, and a loop that computes it in the cache.
- `fastai_smooth.kernels.targets`: What the smoothed target is. Both losses and all implementations take it from here.
- `fastai_smooth.kernels.triton.launch`: What the kernels of both losses share: indexing tensors of any strides, summing over all programs, and when the gradient is made.
- `fastai_smooth.kernels.triton.rows`: What the softmax kernels do with the logits of some rows: sum them up, and make their gradient.
- `fastai_smooth.kernels.triton.sigmoid`: The sigmoid loss as one Triton kernel, which reads each logit and its label as they are, and writes loss and gradient."""

__version__ = "0.0.1"
