"""The functions users call: they check their arguments, and choose the implementation."""
from __future__ import annotations
import torch
from torch import Tensor
from . import sigmoid, softmax
from .arguments import broadcast, linear_logits, needs_grad, prepare, tensor_of, unwrapped, unwrapped_logits, unwrapped_options
from .autograd import accumulator, has_no_storage, on_cpu, tracing
from .checks import (check_dense, check_device, check_indices, check_label_eps, check_labels, check_needs_no_index, check_prior,
                     check_reduction, check_smoothing, check_soft_rows, check_values, check_whole, is_index, is_sharded, label_prior,
                     resolve_indices)
from .linear import LinearLogits, linear_loss
from .targets import SigmoidTarget, Smoothing, eps_pair, label_axis, one_hot, smooth_labels

__all__ = ['smooth_targets', 'smooth_cross_entropy', 'smooth_binary_cross_entropy_with_logits', 'smooth_linear_cross_entropy',
           'smooth_linear_binary_cross_entropy_with_logits']

BACKENDS = 'torch', 'triton'

def check_backend(backend):
    "Raises where there is no such backend, or it is not installed."
    if backend == 'triton': triton_losses()
    elif backend != 'auto' and backend not in BACKENDS: raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")

def triton_losses():
    "The package of the fused kernels: `softmax` and `sigmoid`."
    try: from . import triton
    except ImportError as e:
        raise ImportError(f"backend='triton' needs the package triton, which could not be imported ({e}): "
                          "pip install triton, or take backend='auto'") from e
    return triton

def select_backend(backend, x):
    """The fused kernels, where they are asked for; else None: 'auto' is the torch implementation everywhere, until the whole test suite
    has run on a GPU."""
    if backend != 'triton': return check_backend(backend)
    fused = triton_losses()
    if not (x.is_meta or fused.runs_on(x)):
        raise ValueError(f"backend='triton' is for logits on a GPU, these are on {x.device}: move them there, or take backend='auto'")
    return fused

def smooth_targets(
    target,                     # Class indices of shape (...), any integer dtype; or labels of shape (...,K)
    num_classes: int = None,    # K; needed for class indices, checked against `axis` otherwise
    eps = None,                 # Share that is smoothed, in [0,1] (.1), or Tensor[K]; with sigmoid in [0,.5] (.05), or (e0,e1)
    *,
    prior: Tensor = None,       # To which eps is moved, instead of uniform: [K], or [K,K] by target class; with sigmoid [K] or [2,K]
    spread: str = 'all',        # 'all': true class 1-eps+eps/K, others eps/K; 'others': 1-eps and eps/(K-1)
    multi_hot: bool = False,    # Several ones a row, softmax: they share 1-eps
    sigmoid: bool = False,      # Labels are independent: positives become 1-eps, negatives eps
    axis: int = None,           # Of the classes in q: the last one; with sigmoid that of `smooth_binary_cross_entropy_with_logits`
) -> Tensor: # q: like `target` when that is floating, else of the default dtype; indices get a new axis of K
    """The smoothed target q itself, dense: `(1-eps)*y + eps*u`, and with sigmoid `(1-2*eps)*y + 2*eps*u`, or `e0 + (1-e0-e1)*y`.

    Class indices of shape (...) give q of shape (...,K); labels of shape (...,K) keep it: floating ones (one-hot or
    soft, whose rows sum to 1), and with multi_hot or sigmoid bool and integer ones. Where there is no prior, u is
    1/K, and with sigmoid 1/2. Of a prior [2,K] negatives have the first row as their u, positives the second.

    Raises ValueError for options that do not go together or are out of range, and for rows of soft labels that do not
    sum to 1; TypeError for what is no tensor of real numbers or of a dtype that the options do not go with; IndexError
    for `axis`, and for a class index outside [0, K).

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7; kernels/targets.py has the formula.

    >>> smooth_targets([1., 0., 0.], eps=.1)
    tensor([0.9333, 0.0333, 0.0333])
    """
    target = tensor_of('target', target)
    values = not tracing(unwrapped('target', target))
    if target.is_complex(): raise TypeError(f"target must be of real numbers, got {target.dtype}")
    if axis is not None: axis = check_whole('axis', axis)
    if sigmoid:
        if multi_hot or spread != 'all':
            raise ValueError(f"sigmoid=True smooths each label alone: it takes no multi_hot and no spread={spread!r}")
        return _smooth_labels(target, num_classes, .05 if eps is None else eps, prior, axis, values)
    if axis is None: axis = -1
    index, s = None, unwrapped_options(Smoothing(.1 if eps is None else eps, prior, spread, multi_hot))
    if is_index(target) and not multi_hot:
        if num_classes is None: raise ValueError("class indices need num_classes; for one-hot integers use target.float(), "
                                                 "for multi-hot ones multi_hot=True or sigmoid=True")
        check_whole('num_classes', num_classes, 1)
        index, axis = target.long(), label_axis(target.dim() + 1, axis)
        if values: check_indices(index, num_classes)
        target = one_hot(index, num_classes, axis, torch.get_default_dtype())
    else:
        if target.dtype == torch.bool and not multi_hot:
            raise TypeError("bool targets are multi-hot: pass multi_hot=True or sigmoid=True, or class indices as integers")
        target, axis = _as_labels(target, num_classes, axis)
        if values and not multi_hot: check_soft_rows(target, axis)
    s = check_smoothing(s, target.shape[axis], values=values)
    if index is None: check_needs_no_index(s)
    return s.to(target, target.dtype).dense(target, axis, index)

def _as_labels(target, num_classes, axis):
    "Dense labels as floating point, and the axis of their classes, of which there are `num_classes` if that is given."
    if target.dim() == 0: raise ValueError("target needs an axis of classes, got a scalar")
    axis = label_axis(target.dim(), axis)
    if num_classes not in (None, 1 if axis is None else target.shape[axis]):
        raise ValueError(f"num_classes is {num_classes}, but target has {1 if axis is None else target.shape[axis]} "
                         + ('(one label)' if axis is None else f"along axis {axis}") + f", its shape is {tuple(target.shape)}")
    return target if target.is_floating_point() else target.to(torch.get_default_dtype()), axis

def _smooth_labels(target, num_classes, eps, prior, axis, values):
    row = target.dim() == 1 and axis is None and num_classes != 1  # (K,), a single row
    (target, _), eps = _as_labels(target, num_classes, 0 if row else axis), check_label_eps(eps, prior)
    if prior is not None:
        prior = unwrapped('prior', prior)
        check_prior(prior, sigmoid=True, values=values)
        prior = prior.to(target)
    return smooth_labels(target, *eps_pair(eps, label_prior(prior, target.shape, axis)))

def smooth_cross_entropy(
    input: Tensor,              # Logits, classes along `axis`: (N,K), (N,K,d1,...), or (K,) for a single row
    target: Tensor,             # Class indices shaped like `input` without `axis`, or soft labels shaped like `input`
    eps: float | Tensor = .1,   # Share of the target that is smoothed, in [0,1]; Tensor[K]: each row takes that of its class
    *,
    prior: Tensor = None,       # Distribution to which eps is moved, instead of uniform: [K], or [K,K] by target class
    spread: str = 'all',        # 'all': true class 1-eps+eps/K, others eps/K; 'others': 1-eps and eps/(K-1)
    multi_hot: bool = False,    # `target` is 0/1 (any dtype) shaped like `input`; its ones share 1-eps
    weight: Tensor = None,      # [K]; weighs both terms, and the mean is over the rows' weights, as in PyTorch
    ignore_index: int = -100,   # Rows with this class index are left out, of the loss and of its mean
    reduction: str = 'mean',    # 'mean', 'sum' or 'none'
    axis: int = 1,              # Of the classes in `input`
    backend: str = 'auto',      # Implementation: 'torch', 'triton' (a fused kernel for CUDA), or 'auto', which is 'torch' so far
) -> Tensor: # In nats: a float32 scalar (float64 for float64 logits), or a value a row, shaped like class indices would be
    """Cross entropy of logits against smoothed targets: `F.cross_entropy(label_smoothing=eps)`, with more options.

    Equals PyTorch's wherever that is finite. Beyond it: a prior, `spread`, `multi_hot` and per-class eps; float32
    accumulation and result for half precision; 0. where no row is left (PyTorch: nan); masked logits (-inf) get no
    smoothing and no gradient. Neither transposes nor copies logits, whatever their layout, and changes no input.

    Logits may be a DTensor with its classes sharded along one mesh dimension: then `target` is of class indices, `weight` and `prior`
    have all classes, the loss is a plain tensor, the same on all ranks, and 3 numbers a row are moved (11 where classes
    are masked). It has no second derivative. (Torch 2.5 or later.)

    Raises ValueError for options out of range or that do not go together, and for targets of another shape; TypeError
    for what is no tensor, or of a dtype that can't be logits, targets or options; IndexError for `axis`, and for a class
    index out of range on the CPU (on CUDA the loss is nan: looking would stall the GPU); ImportError for
    `backend='triton'` where that is not installed.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7; `spread='others'`: Müller et al. 2019, arXiv:1906.02629."""
    return cross_entropy(input, target, Smoothing(eps, prior, spread, multi_hot), weight, ignore_index, reduction, axis, backend)

def smooth_binary_cross_entropy_with_logits(
    input: Tensor,              # Logits, any shape
    target: Tensor,             # Labels in [0,1] shaped like `input`: bool, integer or floating
    eps: float | tuple = .05,   # In [0,1/2]: a positive becomes 1-eps, a negative eps; or (e0,e1): they become 1-e1 and e0
    *,
    prior: Tensor = None,       # [K] label frequencies, to smooth to instead of 1/2; or [2,K], of negatives and of positives
    weight: Tensor = None,      # As in `F.binary_cross_entropy_with_logits`: broadcasts to `input`
    pos_weight: Tensor = None,  # As there: the weight of positives, broadcasts to `input`
    reduction: str = 'mean',    # 'mean', 'sum' or 'none'
    axis: int = None,           # Of the labels that `prior` is of. None: the last of (N,K), 1 of images (N,K,H,W); (N,H,W) are of one label
    backend: str = 'auto',      # Implementation: 'torch', 'triton' (a fused kernel for CUDA), or 'auto', which is 'torch' so far
) -> Tensor: # In nats: a float32 scalar (float64 for float64 logits), or a value a logit
    """Binary cross entropy of logits against smoothed labels, for multi-label targets. Keras' `label_smoothing` is 2 eps.

    A pair smooths one side only, or one more than the other: (.1, 0.) where some positives are missing. With a `prior` u the label becomes
    `(1-2*eps)*y + 2*eps*u`; of a prior [2,K] negatives have the first row as their u, positives the second. A pair takes no prior.

    Equals `F.binary_cross_entropy_with_logits(input, smooth_targets(target, eps=eps, sigmoid=True))`, in float32 for half
    precision and without the smoothed tensor; 0. for an empty batch.

    Raises ValueError for options out of range or of a wrong shape, and for targets of another shape than `input`; TypeError
    for what is no tensor of real numbers; IndexError for `axis`; ImportError for `backend='triton'` where that is not installed.

    Source: Szegedy et al. 2016, arXiv:1512.00567, for each label with its two classes; Keras' `BinaryCrossentropy`."""
    return binary_cross_entropy(input, target, eps, prior, weight, pos_weight, reduction, axis, backend)

def smooth_linear_cross_entropy(
    input: Tensor,              # What the linear layer takes, (N,F)
    linear_weight: Tensor,      # Its weight, (K,F)
    target: Tensor,             # As of `smooth_cross_entropy`: class indices (N,), or soft labels (N,K)
    eps: float | Tensor = .1,   # As there
    *,
    linear_bias: Tensor = None, # Of the layer, (K,)
    chunk_rows: int = None,     # How many rows of logits there are at a time (None: 16 MB of them, but at least 256, on a GPU 1024)
    **kwargs                    # Of `smooth_cross_entropy`, all but `axis`
) -> Tensor: # In nats, as of `smooth_cross_entropy`
    """`smooth_cross_entropy(F.linear(input, linear_weight, linear_bias), target, eps, **kwargs)`, in memory for a few rows of the logits.

    Logits are made twice, the second time in the backward, for reduction='none' and in float16. Under autocast the products are in its
    dtype, the loss in float32. Named as PyTorch's `F.linear_cross_entropy`, which has all logits where it smooths. So has this one where a
    prior, a weight, eps or target needs a gradient, where the gradient is to be differentiated, and under torch.compile and torch.func."""
    return smooth_cross_entropy(linear_logits(input, linear_weight, linear_bias, chunk_rows), target, eps, axis=1, **kwargs)

def smooth_linear_binary_cross_entropy_with_logits(
    input: Tensor,              # What the linear layer takes, (N,F)
    linear_weight: Tensor,      # Its weight, (K,F)
    target: Tensor,             # As of `smooth_binary_cross_entropy_with_logits`: labels (N,K)
    eps: float | tuple = .05,   # As there
    *,
    linear_bias: Tensor = None, # Of the layer, (K,)
    chunk_rows: int = None,     # How many rows of logits there are at a time (None: 16 MB of them, but at least 256, on a GPU 1024)
    **kwargs                    # Of `smooth_binary_cross_entropy_with_logits`, all but `axis`
) -> Tensor: # In nats, as of `smooth_binary_cross_entropy_with_logits`
    "`smooth_binary_cross_entropy_with_logits` of a linear layer's logits: see `smooth_linear_cross_entropy`."
    logits = linear_logits(input, linear_weight, linear_bias, chunk_rows)
    return smooth_binary_cross_entropy_with_logits(logits, target, eps, axis=None, **kwargs)

# --- what the modules call --------------------------------------------------------------------------------------------

def cross_entropy(input, target, smoothing, weight, ignore_index, reduction, axis, backend, checked=False):
    "`smooth_cross_entropy` of a `Smoothing`, whose eps has been `checked` if it is a module's."
    if backend == 'auto' or backend == 'torch':
        loss = softmax.pytorch_loss(input, target, smoothing, weight, ignore_index, reduction, axis)
        if loss is not None: return loss
    x, y = unwrapped_logits(input), unwrapped('target', target)
    fused = select_backend(backend, x)
    if weight is not None: weight = unwrapped('weight', weight)
    smoothing = unwrapped_options(smoothing)
    check_reduction(reduction)
    if is_sharded(x): return sharded_cross_entropy(x, y, smoothing, weight, ignore_index, reduction, axis, checked)
    linear = type(x) is LinearLogits
    traced = tracing(x.parts[0] if linear else x, y)
    target = prepare(x, y, smoothing, weight, ignore_index, axis, look=on_cpu(x) and not traced, checked=checked)
    others = needs_grad(y, weight, smoothing.prior, smoothing.eps)
    if linear:
        if target.axis != 1: raise ValueError(f"the logits of a linear layer have their classes along axis 1, got axis={axis}")
        resolved, plain = resolve_indices(target, x, traced), traced or others
        scale = None if plain else resolved.scale(x, reduction)
        # the fused kernel looks for ignored rows by itself
        if fused and not plain: return linear_loss(x, target, reduction, scale, fused.softmax.GRAD_LATE, plain)
        return linear_loss(x, resolved, reduction, scale, softmax, plain)
    if fused and not others and not (traced and has_no_storage(x, y)) and fused.softmax.supports(x, target):
        return fused.softmax.softmax_loss(x, target, reduction)
    return softmax.softmax_loss(x, resolve_indices(target, x, traced), reduction, traced or others)

def sharded_cross_entropy(x, y, smoothing, weight, ignore_index, reduction, axis, checked):
    from .sharded import check_options, sharded_loss
    check_options(eps=smoothing.eps, prior=smoothing.prior, weight=weight)
    look = x.device.type == 'cpu' and not torch.compiler.is_compiling()
    return sharded_loss(x, prepare(x, y, smoothing, weight, ignore_index, axis, look, checked), reduction)

def binary_cross_entropy(input, target, eps, prior, weight, pos_weight, reduction, axis, backend):
    "`smooth_binary_cross_entropy_with_logits`."
    if (backend == 'auto' or backend == 'torch') and axis is None:
        loss = sigmoid.pytorch_loss(input, target, eps, prior, weight, pos_weight, reduction)
        if loss is not None: return loss
    x, y = unwrapped_logits(input), unwrapped('target', target)
    fused = select_backend(backend, x)
    check_reduction(reduction)
    check_labels(x, y)
    check_device(x, y)
    if axis is not None: label_axis(x.dim(), check_whole('axis', axis))  # is there one?
    eps = check_label_eps(eps, prior)
    if prior is not None:
        prior = unwrapped('prior', prior)
        check_dense('prior', prior)
        check_values('prior', prior, x)
        prior = prior.to(x.device, accumulator(x))
    e0, e1 = (e if isinstance(e, float) else broadcast('prior', e, x) for e in eps_pair(eps, label_prior(prior, x.shape, axis)))
    target = SigmoidTarget(y, e0, e1, broadcast('weight', weight, x), broadcast('pos_weight', pos_weight, x))
    linear = type(x) is LinearLogits
    traced, others = tracing(x.parts[0] if linear else x, y), needs_grad(y, prior, weight, pos_weight)
    if linear:
        by = fused.sigmoid.GRAD_LATE if fused and not (traced or others) else sigmoid
        return linear_loss(x, target, reduction, target.scale(x, reduction), by, traced or others)
    if fused and not others and not (traced and has_no_storage(x, y)) and fused.sigmoid.supports(x, target):
        return fused.sigmoid.sigmoid_loss(x, target, reduction)
    return sigmoid.sigmoid_loss(x, target, reduction, traced or others)
