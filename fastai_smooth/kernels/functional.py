"""The functions users call: arguments in, checks, and the choice of who computes."""
from __future__ import annotations
import torch
from torch import Tensor
from . import sigmoid, softmax
from .backward import opaque, tracing
from .checks import (check_dense, check_device, check_eps, check_factors, check_indices, check_labels, check_needs_no_index, check_prior,
                     check_reduction, check_smoothing, check_targets, check_values, check_whole, class_axis, is_index)
from .formula import Job, accumulator
from .indices import looked_up
from .sharded import check_options, is_sharded, sharded_loss
from .targets import Smoothing, one_hot, sigmoid_q

__all__ = ['smooth_targets', 'smooth_cross_entropy', 'smooth_binary_cross_entropy_with_logits']

BACKENDS = 'torch', 'triton'

def check_backend(backend):
    "Raises where there is no such backend, or it is not installed."
    if backend == 'triton': fused_heads()
    elif backend != 'auto' and backend not in BACKENDS: raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")

def fused_heads():
    "The fused kernels' modules, softmax and sigmoid."
    try: from . import fused_sigmoid, fused_softmax
    except ImportError as e:
        raise ImportError(f"backend='triton' needs the package triton, which could not be imported ({e}): pip install triton, or take backend='auto'") from e
    return fused_softmax, fused_sigmoid

def fused_for(backend, x):
    """The fused heads, where they are asked for; else None: 'auto' is the torch implementation everywhere, until a GPU has been
    seen to pass the tests and win."""
    if backend == 'auto' or backend == 'torch': return None
    check_backend(backend)
    heads = fused_heads()
    if not (x.is_meta or heads[0].fused.runs_on(x)):
        raise ValueError(f"backend='triton' is for logits on a GPU, these are on {x.device}: move them there, or take backend='auto'")
    return heads

def smooth_targets(
    target,                     # Class indices of shape (...), any integer dtype; or labels of shape (...,K)
    num_classes: int = None,    # K; needed for class indices, checked against the last axis otherwise
    eps = None,                 # Smoothing, in [0,1] (default .1); with `sigmoid` in [0,.5] (default .05); or Tensor[K]
    *,
    prior: Tensor = None,       # Where the mass goes: [K], or [K,K] by target class; sigmoid: [K] label frequencies
    spread: str = 'all',        # 'all': true class 1-eps+eps/K, others eps/K; 'others': 1-eps and eps/(K-1)
    multi_hot: bool = False,    # Several ones a row, softmax: they share 1-eps
    sigmoid: bool = False,      # Labels are independent: positives become 1-eps, negatives eps
) -> Tensor: # q: like `target` when that is floating, else of the default dtype; indices get a new last axis of K
    """The smoothed target q itself, dense: `(1-eps)*y + eps*u`, and with `sigmoid` `(1-2*eps)*y + 2*eps*u`.

    Class indices of shape (...) give q of shape (...,K); labels of shape (...,K) keep it: floating ones (one-hot or
    soft), and with `multi_hot` or `sigmoid` bool and integer ones. Where there is no prior, u is 1/K, and with
    `sigmoid` 1/2.

    Raises ValueError for options that do not go together or are out of range, TypeError for what is no tensor of real
    numbers or of a dtype that the options do not go with, IndexError for a class index outside [0, K).

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7; kernels/targets.py has the formula.

    >>> smooth_targets([1., 0., 0.], eps=.1)
    tensor([0.9333, 0.0333, 0.0333])
    """
    target = tensor_of('target', target)
    values = not tracing(unwrapped('target', target))
    if target.is_complex(): raise TypeError(f"target must be of real numbers, got {target.dtype}")
    if sigmoid: return _smooth_labels(target, num_classes, .05 if eps is None else eps, prior, spread, multi_hot, values)
    index, s = None, unwrapped_options(Smoothing(.1 if eps is None else eps, prior, spread, multi_hot))
    if is_index(target) and not multi_hot:
        if num_classes is None: raise ValueError("class indices need num_classes; for one-hot integers use target.float(), "
                                                 "for multi-hot ones multi_hot=True or sigmoid=True")
        check_whole('num_classes', num_classes, 1)
        index, axis = target.long(), target.dim()
        if values: check_indices(index, num_classes)
        target = one_hot(index, num_classes, axis, torch.get_default_dtype())
    else:
        if target.dtype == torch.bool and not multi_hot:
            raise TypeError("bool targets are multi-hot: pass multi_hot=True or sigmoid=True, or class indices as integers")
        target = _as_labels(target, num_classes)
        axis = target.dim() - 1
    s = check_smoothing(s, target.shape[axis], values=values)
    if index is None: check_needs_no_index(s)
    return s.to(target, target.dtype).dense(target, axis, index)

def _as_labels(target, num_classes):
    "Dense labels as floating point, with their last axis checked."
    if target.dim() == 0: raise ValueError("target needs a last axis of classes, got a scalar")
    if num_classes not in (None, target.shape[-1]):
        raise ValueError(f"num_classes is {num_classes}, but the last axis of target has {target.shape[-1]} (shape {tuple(target.shape)})")
    return target if target.is_floating_point() else target.to(torch.get_default_dtype())

def _smooth_labels(target, num_classes, eps, prior, spread, multi_hot, values):
    if multi_hot or spread != 'all': raise ValueError(f"the sigmoid head smooths each label alone: it takes no multi_hot and no spread={spread!r}")
    target, eps = _as_labels(target, num_classes), check_eps(eps, .5)
    if prior is not None:
        prior = unwrapped('prior', prior)
        check_prior(prior, target.shape[-1], sigmoid=True, values=values)
    return sigmoid_q(target, eps, None if prior is None else prior.to(target))

def smooth_cross_entropy(
    input: Tensor,              # Logits, classes along `axis`: (N,K), (N,K,d1,...), or (K,) for a single row
    target: Tensor,             # Class indices shaped like `input` without `axis`, or soft labels shaped like `input`
    eps: float | Tensor = .1,   # Smoothing in [0,1]; Tensor[K]: each row takes that of its class
    *,
    prior: Tensor = None,       # Where the mass goes instead of to all classes alike: [K], or [K,K] by target class
    spread: str = 'all',        # 'all': true class 1-eps+eps/K, others eps/K; 'others': 1-eps and eps/(K-1)
    multi_hot: bool = False,    # `target` is 0/1 (any dtype) shaped like `input`; its ones share 1-eps
    weight: Tensor = None,      # [K]; weighs both terms, and the mean is over the rows' weights, as in PyTorch
    ignore_index: int = -100,   # Rows with this class index count for nothing
    reduction: str = 'mean',    # 'mean', 'sum' or 'none'
    axis: int = 1,              # Of the classes in `input`
    backend: str = 'auto',      # Who computes: 'torch', 'triton' (a fused kernel for CUDA), or 'auto', which is 'torch' so far
) -> Tensor: # In nats: a float32 scalar (float64 for float64 logits), or a value a row, shaped like class indices would be
    """Cross entropy of logits against smoothed targets: `F.cross_entropy(label_smoothing=eps)`, and its relatives.

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
    eps: float = .05,           # Smoothing in [0,1/2]: a positive becomes 1-eps, a negative eps
    *,
    prior: Tensor = None,       # [K] label frequencies along the last axis, to smooth to instead of 1/2
    weight: Tensor = None,      # As in `F.binary_cross_entropy_with_logits`: broadcasts to `input`
    pos_weight: Tensor = None,  # As there: the weight of positives, broadcasts to `input`
    reduction: str = 'mean',    # 'mean', 'sum' or 'none'
    backend: str = 'auto',      # Who computes: 'torch', 'triton' (a fused kernel for CUDA), or 'auto', which is 'torch' so far
) -> Tensor: # In nats: a float32 scalar (float64 for float64 logits), or a value a logit
    """Binary cross entropy of logits against smoothed labels, for multi-label targets. Keras' `label_smoothing` is 2 eps.

    Equals `F.binary_cross_entropy_with_logits(input, smooth_targets(target, eps=eps, sigmoid=True))`, in float32 for half
    precision and without the smoothed tensor; 0. for an empty batch.

    Raises ValueError for options out of range, and for targets of another shape than `input`; TypeError for what is no
    tensor of real numbers; ImportError for `backend='triton'` where that is not installed.

    Source: Szegedy et al. 2016, arXiv:1512.00567, for each label with its two classes; Keras' `BinaryCrossentropy`."""
    return binary_cross_entropy(input, target, eps, prior, weight, pos_weight, reduction, backend)

# --- what the modules call: `checked` options had their values looked at when the module was built --------------------

def cross_entropy(input, target, smoothing, weight, ignore_index, reduction, axis, backend, checked=False):
    "`smooth_cross_entropy` of a `Smoothing`."
    x, target = logits(input), unwrapped('target', target)
    fused = fused_for(backend, x)
    if weight is not None: weight = unwrapped('weight', weight)
    smoothing = unwrapped_options(smoothing)
    check_reduction(reduction)
    check_whole('ignore_index', ignore_index)
    if not x.dim(): raise ValueError(f"input needs an axis of classes, got the scalar {x}")
    axis = class_axis(x, axis)
    sharded = is_sharded(x)
    if sharded: check_options(eps=smoothing.eps, prior=smoothing.prior, weight=weight)
    k, traced = x.shape[axis], torch.compiler.is_compiling() if sharded else tracing(x, target)
    if not k: raise ValueError(f"input has no classes along axis {axis}: its shape is {tuple(x.shape)}")
    s = check_smoothing(smoothing, k, weight, values=not (checked or traced or x.device.type != 'cpu'))
    for name, v in (('eps', s.eps), ('prior', s.prior), ('weight', weight)): check_values(name, v, x)
    s = s.to(x, accumulator(x))
    if weight is not None: weight = weight.to(x.device, accumulator(x))
    index = check_targets(x, target, axis, s.multi_hot)
    check_device(x, target)
    if not index:
        check_needs_no_index(s)
        if ignore_index >= 0: raise ValueError(f"ignore_index={ignore_index} needs class indices as targets, got soft ones")
    if sharded: return sharded_loss(x, Job(target, index, s, axis, weight, ignore_index), reduction)
    job, others = Job(target, index, s, axis, weight, ignore_index), needs_grad(target, weight, s.prior, s.eps)
    if fused and not others and not opaque(x, target) and fused[0].takes(x, job): return fused[0].softmax_loss(x, job, reduction)
    return softmax.softmax_loss(x, looked_up(job, x, traced), reduction, traced or others)

def binary_cross_entropy(input, target, eps, prior, weight, pos_weight, reduction, backend, checked=False):
    x, target = logits(input), unwrapped('target', target)
    fused = fused_for(backend, x)
    check_reduction(reduction)
    check_labels(x, target)
    check_device(x, target)
    eps, traced = check_eps(eps, .5), tracing(x, target)
    if prior is weight is pos_weight is None: labels = sigmoid.Labels(target, eps)
    else:
        values = not (checked or traced or x.device.type != 'cpu')
        check_factors(values, weight=weight, pos_weight=pos_weight)
        if prior is not None: check_prior(prior, x.shape[-1] if x.dim() else None, sigmoid=True, values=values)
        spread = lambda name, v: None if v is None else expanded(name, unwrapped(name, v), x)
        labels = sigmoid.Labels(target, eps, spread('prior', prior), spread('weight', weight), spread('pos_weight', pos_weight))
    others = needs_grad(target, prior, weight, pos_weight)
    if fused and not others and not opaque(x, target) and fused[1].takes(x, labels): return fused[1].sigmoid_loss(x, labels, reduction)
    return sigmoid.sigmoid_loss(x, labels, reduction, traced or others)

def unwrapped(name, t):
    """A tensor without its subclass (fastai's TensorBase); those that carry their own dispatch (fake, distributed) stay.

    One from inference mode could not be saved for a backward: a copy of it can."""
    if type(t) is not Tensor:
        if not isinstance(t, Tensor): check_dense(name, t)
        if type(t).__torch_dispatch__ == Tensor.__torch_dispatch__: t = t.as_subclass(Tensor)
    if t.layout is not torch.strided or t.is_nested: check_dense(name, t)
    if torch.compiler.is_compiling(): return t
    if t.is_neg(): t = t.resolve_neg()  # torch's copy_ of float16 to float32 would lose the sign
    return t.clone() if t.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled() else t

def unwrapped_options(s):
    "A `Smoothing` whose tensors are."
    if s.prior is None and not isinstance(s.eps, Tensor): return s
    eps = unwrapped('eps', s.eps) if isinstance(s.eps, Tensor) else s.eps
    return Smoothing(eps, None if s.prior is None else unwrapped('prior', s.prior), s.spread, s.multi_hot)

def tensor_of(name, v):
    "`v`, or a tensor of what is in its lists, array or DataFrame."
    try: return torch.as_tensor(v.to_numpy().copy() if hasattr(v, "to_numpy") else v)  # pandas' own array may be read-only
    except (TypeError, ValueError, RuntimeError) as e: raise TypeError(f"{name} must be a tensor, or numbers in lists or an array, got {type(v).__name__} ({e})") from None

def logits(input):
    x = unwrapped('input', input)
    if not x.is_floating_point(): raise TypeError(f"input must be floating point logits, got {x.dtype}")
    return x

def needs_grad(*others) -> bool:
    if torch.is_grad_enabled():
        for o in others:
            if isinstance(o, Tensor) and o.requires_grad: return True
    return False

def expanded(name, v, x):
    "`v` broadcast to `x`, without a copy."
    check_values(name, v, x)
    try: return v.to(x.device, accumulator(x)).expand(x.shape)
    except RuntimeError: raise ValueError(f"{name} must broadcast to input's shape {tuple(x.shape)}, got {tuple(v.shape)}") from None
