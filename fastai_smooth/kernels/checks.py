"""Checks of options and targets: what is wrong, by name and value, before anything is computed."""
from __future__ import annotations
import functools, math, operator, sys, warnings
from numbers import Real
import torch
import torch.distributed as dist
from torch import Tensor
from .autograd import on_cpu
from .targets import Smoothing, SoftmaxTarget, along, coefficients, label_axis

SPREADS = 'all', 'others'
PAIR = 'a pair of numbers (of negatives, of positives)'  # what `eps` of labels may be
REDUCTIONS = 'mean', 'sum', 'none'

def warn(message, stacklevel=2):
    "A warning for the caller `stacklevel` calls up; of several processes the first one gives it."
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()): warnings.warn(message, stacklevel=stacklevel + 1)

def check_whole(name, v, low=-2**63, high=2**63 - 1):
    "`v` as an int that is in [low, high]."
    if type(v) is int and low <= v <= high: return v
    try: n = v if type(v) is int or isinstance(v, torch.SymInt) else operator.index(v)
    except (TypeError, RuntimeError): n = None
    if n is None or isinstance(v, bool) or not low <= n <= high:
        bounds = ('' if low < -1 else f' of {low} or more') + ('' if high >= 2**63 - 1 else f', {high} at most')
        raise (ValueError if isinstance(v, Real) else TypeError)(f"{name} must be a whole number{bounds}, got {v!r}")
    return n

def check_number(name, v, low=-math.inf, high=math.inf, strictly=False):
    "`v` is a number in [low, high], or in (low, high)."
    if isinstance(v, Tensor) and not v.dim() and not v.is_meta: v = v.item()
    if isinstance(v, bool) or not isinstance(v, Real): raise TypeError(f"{name} must be a number, got {v!r}")
    if not (low < v < high if strictly else low <= v <= high):
        raise ValueError(f"{name} must be in {'(' if strictly else '['}{low:g}, {high:g}{')' if strictly else ']'}, got {v}")

def check_dense(name, v):
    "`v` is a tensor of real numbers, in memory of its own kind."
    if not isinstance(v, Tensor): raise TypeError(f"{name} must be a tensor, got {type(v).__name__}; torch.tensor(...) makes one")
    if v.layout is not torch.strided or v.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if v.is_nested else v.layout}")
    if v.is_complex(): raise TypeError(f"{name} must be of real numbers, got {v.dtype}")

def is_sharded(x) -> bool:
    "Is `x` a DTensor? Whoever has one has imported them, which takes half a second."
    if type(x) is Tensor: return False
    tensors = sys.modules.get('torch.distributed.tensor')
    return hasattr(tensors, 'DTensor') and isinstance(x, tensors.DTensor)  # torch 2.4 has the module without it

def check_values(name, v, x=None):
    "A tensor of options has values, unless the logits `x` have none either."
    if isinstance(v, Tensor) and v.is_meta and not (x is not None and x.is_meta):
        raise ValueError(f"{name} is on meta, where it has no values")

def check_eps(eps, top=1., num_classes=None, values=True):
    "`eps` as a float in [0, top], or as a tensor [K] of such; raises a ValueError naming what is wrong. That of labels has a `top` of 1/2."
    if type(eps) is float and 0 <= eps <= top: return eps
    labels = top < 1
    if not isinstance(eps, Tensor) or not eps.dim():
        learnt = '' if labels else f", or to learn it eps.expand({num_classes or 'K'}), a value for each class"
        kinds = f'a number, or {PAIR}' if labels else 'a number or a Tensor[K] (a pair is for multi-label losses)'
        eps = number_of(eps, kinds, learnt)
        if not 0 <= eps <= top:
            why = " (labels: a positive becomes 1-eps, a negative eps, so that at .5 they are the same)" if labels else ""
            raise ValueError(f"eps must be in [0, {top:g}], got {eps}{why}")
        return eps
    if labels: raise ValueError(f"one eps a class is for the softmax loss, labels take a number, or {PAIR}; got shape {tuple(eps.shape)}")
    check_dense('eps', eps)
    if values: check_values('eps', eps)
    check_shape('eps', eps, num_classes, 1)
    if values and not bool(((eps >= 0) & (eps <= top)).all()):
        raise ValueError(f"every eps must be in [0, {top:g}], got {eps.tolist()}")
    return eps

def number_of(eps, kinds, learnt=''):
    "An eps that is a number, or a tensor of no dimensions, as a float."
    if isinstance(eps, Tensor) and not eps.dim():
        check_dense('eps', eps)
        check_values('eps', eps)
        if eps.requires_grad: raise ValueError(f"an eps of no dimensions gets no gradient: pass eps.detach(){learnt}")
        eps = eps.item()
    if isinstance(eps, bool) or not isinstance(eps, Real): raise TypeError(f"eps must be {kinds}, got {eps!r}")
    return float(eps)

def check_label_eps(eps, prior=None):
    """`eps` of labels as a float in [0, 1/2], or as two floats in [0, 1], of negatives and of positives, whose sum is 1 at most.

    Two of them say what negatives and positives become, as a `prior` does: they take none."""
    # Of numpy, which a schedule of pairs computes with. Dynamo refuses to ask a float that changes for its attributes
    if not isinstance(eps, (float, tuple, list, Tensor)) and hasattr(eps, 'tolist'): eps = eps.tolist()
    if not isinstance(eps, (tuple, list)): return check_eps(eps, .5)
    if len(eps) != 2: raise ValueError(f"eps of labels must be a number, or {PAIR}, got {eps!r}")
    e0, e1 = (number_of(e, PAIR) for e in eps)
    if not (0 <= e0 <= 1 and 0 <= e1 <= 1): raise ValueError(f"eps as {PAIR} must be in [0, 1], got {e0, e1}")
    if e0 + e1 > 1:
        raise ValueError(f"eps=({e0:g}, {e1:g}) makes a negative {e0:g} and a positive {1 - e1:g}, which is less: the sum is 1 at most")
    if prior is not None:
        raise ValueError(f"eps=({e0:g}, {e1:g}) takes no prior: to smooth negatives and positives of each label to others, take one eps "
                         "and a prior [2,K]")
    return e0, e1

def check_shape(name, v, num_classes, dims):
    "`v` has `dims` axes of size `num_classes` (of any one size when that is None)."
    check_dense(name, v)
    k = num_classes if num_classes is not None else v.shape[-1] if v.dim() else '?'
    if tuple(v.shape) != (k,) * dims:
        raise ValueError(f"{name} must have shape {(k,) * dims} for {k} classes, got {tuple(v.shape)}")

def check_prior(prior, num_classes=None, sigmoid=False, values=True):
    """`prior` is a distribution over the classes ([K], [K,K] by rows), or for the sigmoid loss a probability a label: [K], or [2,K] with
    one of its negatives and one of its positives."""
    check_dense('prior', prior)
    rows = prior.dim() == 2
    if not sigmoid: check_shape('prior', prior, num_classes, 2 if rows else 1)
    elif prior.dim() != 1 and not (rows and len(prior) == 2):
        raise ValueError(f"prior must be [K], or [2,K] with a row of negatives and one of positives, got shape {tuple(prior.shape)}")
    if not values: return
    check_values('prior', prior)
    if not bool((prior >= 0).all()): raise ValueError(f"prior must not be negative or nan, got {prior.min().item()}")
    if sigmoid:
        if not bool((prior <= 1).all()): raise ValueError(f"prior must be probabilities in [0, 1], got {prior.max().item()}")
        if rows and not bool((prior[0] <= prior[1]).all()):
            k = int((prior[0] > prior[1]).nonzero()[0])
            raise ValueError("prior [2,K] has negatives in its first row, and positives, to which it gives no less, in its second one: got "
                             f"{prior[0, k].item():g} and {prior[1, k].item():g} for label {k}")
    else:
        total = prior.double().sum(-1)
        # A prior of thousands of float16 or bfloat16 values carries their rounding
        tol = max(1e-4, torch.finfo(prior.dtype).eps if prior.is_floating_point() else 0)
        if not bool(((total - 1).abs() <= tol).all()):
            what = "every row of prior" if rows else "prior"
            worst = total.flatten()[(total - 1).abs().argmax()].item()
            raise ValueError(f"{what} must sum to 1, got {worst:g}; divide counts by their sum")

def label_prior(prior: Tensor | None, shape, axis=None):
    """A `prior` of the K labels that lie along `label_axis` of this shape, as `eps_pair` takes it: that of negatives and that of positives,
    shaped to broadcast to the labels. They are the rows of a prior [2,K]; one [K] is both. None as it is; a ValueError for another size."""
    if prior is None: return None
    check_dense('prior', prior)
    ndim, at = len(shape), label_axis(len(shape), axis)
    k = 1 if at is None else shape[at]
    both = prior.unbind() if prior.dim() == 2 and len(prior) == 2 else (prior, prior)
    size = both[0].shape
    if at is None and ndim == 1 and size == shape: return both  # (K,) is a single row
    if size == (k,): return tuple(v.view([1] * ndim) if at is None else along(v, at, ndim) for v in both)
    lie = "one label; axis= says where there are several" if at is None else f"labels along axis {at}"
    raise ValueError(f"prior must have shape {(k,)} or {(2, k)} for {tuple(shape)} ({lie}), got {tuple(prior.shape)}")

def check_factors(values=True, /, **factors):
    "Weights, of whatever shape, are finite and not negative; and the largest is of a size that sums and products of float32 can take."
    for name, v in factors.items():
        if v is None: continue
        check_dense(name, v)
        if not values: continue
        check_values(name, v)
        if not v.numel(): continue
        low, high = (o.item() for o in v.aminmax())
        if not (low >= 0 and high < math.inf):
            bad = v[~((v >= 0) & (v < math.inf))]
            raise ValueError(f"{name} must be finite and not negative, got {bad.flatten()[0].item():g}")
        if high and not 1e-30 < high < 1e30:
            raise ValueError(f"{name} must have its largest value between 1e-30 and 1e30 (or be 0), got {high:g}: scale it")

def check_smoothing(s: Smoothing, num_classes=None, weight=None, values=True) -> Smoothing:
    """`s` with its eps as a float or tensor, after all checks that need no targets.

    `values=False` looks at shapes only, for where reading a value would break a graph or wait for the GPU."""
    if s.spread not in SPREADS: raise ValueError(f"spread must be one of {SPREADS}, got {s.spread!r}")
    eps = check_eps(s.eps, 1., num_classes, values)
    if s.prior is not None:
        if s.multi_hot: raise ValueError("multi_hot targets share eps uniformly: they take no prior")
        if s.spread == 'others': raise ValueError("spread='others' is uniform over the other classes: it takes no prior")
        check_prior(s.prior, num_classes, values=values)
    if isinstance(eps, Tensor) and s.multi_hot: raise ValueError("one eps a class needs class indices, multi_hot has none")
    if weight is not None:
        check_shape('weight', weight, num_classes, 1)
        if values:
            check_factors(weight=weight)
            warn_past_the_flip(s, weight, eps)
    return s if eps is s.eps else Smoothing(eps, s.prior, s.spread, s.multi_hot)

def warn_past_the_flip(s, weight, eps):
    """Warns, once, where class weights make another class than the label the optimum's argmax.

    The optimum is proportional to w * q, so it flips where w_k q_k > w_y q_y: uniformly, past K(1-eps)/eps + 1."""
    k, w = len(weight), weight.double()
    if s.multi_hot or k < 2: return
    eps, mass = eps.double() if isinstance(eps, Tensor) else eps, None if s.prior is None else 1
    own, each, *_ = coefficients(eps, k, mass=mass, others=s.spread == 'others')
    u = torch.ones_like(w) if s.prior is None else s.prior.to(w)
    label = w * (own + each * (u.diagonal() if u.dim() == 2 else u))
    if bool(((w * u).amax(-1) * each > label * (1 + 1e-9)).any()): _warn_flip(k)

@functools.cache
def _warn_flip(num_classes):
    warn("these class weights outweigh the smoothing: for some class the loss is least where ANOTHER class is "
                  f"predicted (w_k / w_y > K (1 - eps) / eps + 1, K={num_classes}). Use a smaller eps, or milder weights.", stacklevel=5)

def is_index(target: Tensor) -> bool:
    "Is `target` of a dtype that class indices have?"
    return not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)

def check_indices(index: Tensor, num_classes: int, skip: Tensor | None = None):
    "Raises an IndexError that names the first class index outside [0, num_classes). Reads values: eager on CPU only."
    if index.numel() == 0: return
    lo, hi = index.aminmax()
    if lo >= 0 and hi < num_classes: return
    bad = (index < 0) | (index >= num_classes)
    if skip is not None: bad &= ~skip
    if not bool(bad.any()): return
    where = bad.nonzero()[0].tolist()
    row = where[0] if len(where) == 1 else tuple(where)
    value = index[bad][0].item()
    raise IndexError(f"class index {value} at row {row} is out of range for {num_classes} classes"
                     + (f"; ignore_index={value} leaves such rows out" if skip is not None and (value < 0 or value == 255) else ""))

def resolve_indices(target: SoftmaxTarget, x: Tensor, traced: bool = False) -> SoftmaxTarget:
    "The target with class indices that are safe to gather with, and where they are ignored and where invalid (None: nowhere)."
    if not target.is_index: return target
    labels, k, ignore = target.target.long(), x.shape[target.axis], target.ignore_index  # as int64: -100 of uint8 would be 156
    if torch.compiler.is_compiling(): labels = checked_indices(labels, k, ignore)
    index = labels
    if traced or not on_cpu(index):
        ignored, index = labels == ignore, labels.clamp(0, k - 1)
        return target._replace(target=index, ignored=ignored, invalid=(index != labels) & ~ignored)
    ignored = None
    if index.numel():
        low, high = index.aminmax()
        if low.item() <= ignore <= high.item():
            ignored = index == ignore
            index = index.masked_fill(ignored, 0)
            low, high = index.aminmax()
        if low.item() < 0 or high.item() >= k: check_indices(labels, k, labels == ignore)
    return target if index is target.target else target._replace(target=index, ignored=ignored)

@torch.library.custom_op('fastai_smooth::checked_indices', mutates_args=())
def checked_indices(index: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    "The check as an op, since reading values in a compiled graph would break it."
    if index.device.type == 'cpu': check_indices(index, num_classes, index == ignore_index)
    return index.clone()

@checked_indices.register_fake
def _(index, num_classes, ignore_index): return torch.empty_like(index)

def check_needs_no_index(s: Smoothing):
    "Soft and multi-hot targets have no one class whose eps or row of a prior could be looked up."
    if isinstance(s.eps, Tensor): raise ValueError("one eps a class needs class indices as targets, got soft targets")
    if s.prior is not None and s.prior.dim() == 2:
        raise ValueError("a prior of shape [K,K] needs class indices as targets, got soft targets")

OTHER_TARGETS = "multi_hot=True for several classes a row, or smooth_binary_cross_entropy_with_logits (LabelSmoothingBCEWithLogitsFlat)"

def check_soft_rows(target: Tensor, axis: int):
    """Rows of soft labels sum to 1 along the class `axis`; a ValueError names the first that does not. It reads values: on a GPU, it waits.

    Labels may have been rounded, to half precision or to two decimals, hence 5%: it is another kind of labels that is to be found,
    such as multi-hot ones."""
    total = target.detach().sum(axis, dtype=torch.float64 if target.dtype == torch.float64 else torch.float32)
    if not total.numel(): return
    low, high = total.aminmax()
    if low.item() >= .95 and high.item() <= 1.05: return
    bad = ~((total >= .95) & (total <= 1.05))  # nan, too
    where = bad.nonzero()[0].tolist()
    row = where[0] if len(where) == 1 else tuple(where)
    raise ValueError(f"soft targets must sum to 1 along axis {axis}, got {total[bad][0].item():g} at row {row}: use {OTHER_TARGETS}; "
                     "and for counts, the counts divided by their sum")

def check_device(x, target):
    if target.device != x.device: raise ValueError(f"target is on {target.device}, input on {x.device}: move one of them")

def check_linear(x, weight, bias):
    "`weight` and `bias` are those of a linear layer that takes `x`; that their dtypes go together, PyTorch checks."
    if not x.dim() == weight.dim() == 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"input must have shape (N, F) and linear_weight (K, F), got {tuple(x.shape)} and {tuple(weight.shape)}; "
                         "input.flatten(0, -2) and target.flatten() make rows of texts")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_bias must have shape {tuple(weight.shape[:1])}, a value a class, got {tuple(bias.shape)}")
    for v in (weight, bias):
        if v is not None and v.device != x.device: raise ValueError(f"the layer is on {v.device}, input on {x.device}: move one of them")

def check_reduction(reduction):
    if reduction not in REDUCTIONS: raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")

def class_axis(x, axis):
    axis = check_whole('axis', axis, -math.inf, math.inf)
    if x.dim() == 1 and axis == 1: return 0  # the default, of a single row
    if not -x.dim() <= axis < x.dim(): raise IndexError(f"axis {axis} is out of range for input of shape {tuple(x.shape)}")
    return axis % x.dim()

def check_labels(x, target):
    "`target` is shaped like the logits `x`; integer ones that look like class indices are told where to go."
    if target.is_complex(): raise TypeError(f"target must be of real numbers, got {target.dtype}")
    if target.shape == x.shape: return
    rows = [x.shape[:d] + x.shape[d+1:] for d in range(x.dim())]
    if is_index(target) and target.shape in rows:
        raise ValueError(f"target of shape {tuple(target.shape)} looks like class indices: those are for smooth_cross_entropy "
                         f"(LabelSmoothingCrossEntropyFlat); this loss takes labels shaped like input, {tuple(x.shape)}")
    raise ValueError(f"target must be shaped like input, {tuple(x.shape)}, got {tuple(target.shape)}")
