"""What the smoothed target is. Both losses and all implementations take it from here.

    softmax:  t_k = w_k * (own * y_k + each * u_k)    u: 1 for each class, or a prior; `coefficients` gives own and each
    sigmoid:  q   = e0 + (1 - e0 - e1) * y            a negative becomes e0, a positive 1 - e1; `eps_pair` gives e0 and e1

Szegedy et al. 2016 (arXiv:1512.00567) is the softmax one with own = 1 - eps and each = eps / K. Keras' binary `label_smoothing` is e0 + e1.
"""
from __future__ import annotations
import math
from typing import NamedTuple
import torch
from torch import Tensor
from .autograd import accumulator, on_cpu

class Coefficients(NamedTuple):
    "What `coefficients` gives: numbers, or tensors with a value a row."
    own: float | Tensor             # of the target y
    each: float | Tensor            # of u
    own_masked: float | Tensor      # of y, at a class that is masked (a logit of -inf)
    uniform: bool | Tensor          # Is u uniform, since all of the prior's mass is on masked classes?

def coefficients(eps, left, positives=1, present=1, mass=None, others=False) -> Coefficients:
    """The smoothed target of a row, `own * y + each * u`: own and each.

    `left` is the number of classes that are not masked, `positives` of the classes that share the target and `present` of those
    among them that are not masked, `mass` what the classes that are not masked have of the prior; `others` is spread='others'.

    It is plain arithmetic, whose ifs ask what is known before, never for values: Triton compiles this very function for the GPU."""
    none = positives == 0
    eps = eps + (1 - eps) * none                         # a row without a positive has the uniform target
    rest = left - present if others else left            # the classes that get a share
    eps = eps * (rest > 0)                               # there are none: nothing is moved
    own_masked = (1 - eps) / (positives + none)
    uniform, share = False, rest
    if mass is not None:
        uniform = mass == 0
        share = mass + left * uniform
    each = eps / (share + (share <= 0))                  # where no class has a share, eps is 0 by now: 0/1
    own = own_masked - each * (present > 0) if others else own_masked  # u gives each class a share, positives too: taken back
    return Coefficients(own, each, own_masked, uniform)

def mean_over(weight, rows):
    """What a mean is over: the `weight` of all rows that count, of which there are so many.

    Without a row it is 1, and the mean 0; where there are rows, whose weights are all 0, it is nan, as in PyTorch."""
    total = weight + (rows == 0)
    return total / (total != 0)                          # 0/0 is nan

# --- the softmax loss -------------------------------------------------------------------------------------------------

class Shares(NamedTuple):
    "The smoothed target of rows, own * y + each * u. Tensors have the axes of the logits, or broadcast to them."
    own: float | Tensor
    each: float | Tensor
    u: Tensor | None     # None: 1 for each class
    mass: float | Tensor # sum_k u_k, of the classes that are not masked

class Smoothing(NamedTuple):
    "How targets are smoothed for the softmax loss. `prior` and a tensor `eps` are used in the dtype they have."
    eps: float | Tensor = .1     # Share that is smoothed, in [0, 1]; or one value a class, of shape [K]
    prior: Tensor | None = None  # Distribution to which eps is moved (None: uniform): [K], or [K,K] by target class
    spread: str = 'all'          # 'all': every class gets a share; 'others': all but the positives do
    multi_hot: bool = False      # Targets are 0/1 vectors with any number of ones, which share what smoothing leaves

    def to(self, like: Tensor, dtype: torch.dtype) -> Smoothing:
        "The same, with its tensors on the device of `like` and of `dtype`."
        eps, prior, *rest = self
        if isinstance(eps, Tensor): eps = eps.to(like.device, dtype)
        if prior is not None: prior = prior.to(like.device, dtype)
        return Smoothing(eps, prior, *rest)

    def shares(self, like: Tensor, axis: int, index: Tensor | None, y: Tensor | None = None, keep: Tensor | None = None) -> Shares:
        """What each row has of its target and of u, for class indices, or else labels `y`; `like` has the shape of the logits.

        `keep` is False at classes that are masked by a logit of -inf: they get no share, the others all of it."""
        eps, others = self.eps, self.spread == 'others'
        if isinstance(eps, Tensor): eps = of_class(eps, index).unsqueeze(axis)
        elif keep is not None or self.multi_hot: eps = like.new_ones(()) * eps  # makes bools that dtype; `torch.full` would compile eps in
        left = like.shape[axis] if keep is None else keep.sum(axis, keepdim=True, dtype=like.dtype)
        positives = present = y.sum(axis, keepdim=True) if self.multi_hot else 1
        if keep is not None and others: present = self.present(axis, index, y, keep).to(like.dtype)  # which 'all' does not ask for
        u, mass = self.prior_of(index, axis, like.dim()), None
        if u is not None: mass = 1 if keep is None else (u * keep).sum(axis, keepdim=True)
        c = coefficients(eps, left, positives, present, mass, others)
        own = c.own
        if keep is not None and others and self.multi_hot: own = torch.where(keep, c.own, c.own_masked)  # some positives may be masked
        if u is None: return Shares(own, c.each, None, left)
        if keep is None: return Shares(own, c.each, u, u.sum(axis, keepdim=True))
        # where all of the prior is on masked classes, the others share alike
        return Shares(own, c.each, torch.where(c.uniform, 1., u), mass + left * c.uniform)

    def prior_of(self, index: Tensor | None, axis: int, ndim: int) -> Tensor | None:
        "The prior of each row, along the axis of the classes."
        if self.prior is None: return None
        return of_class(self.prior, index).movedim(-1, axis) if self.prior.dim() == 2 else along(self.prior, axis, ndim)

    def present(self, axis: int, index: Tensor | None, y: Tensor | None, keep: Tensor) -> Tensor:
        "How many positives are not masked; of class indices and soft labels, whether all of the label is."
        if index is not None: return keep.gather(axis, index.unsqueeze(axis))
        return (y * keep).sum(axis, keepdim=True) if self.multi_hot else ((y == 0) | keep).all(axis, keepdim=True)

    def dense(self, y: Tensor, axis: int, index: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        "q for targets `y` (floating, classes along `axis`); `index` are the class indices that `y` came from, `keep` as in `shares`."
        s = self.shares(y, axis, index, y, keep)
        own, share = s.own, s.each if s.u is None else s.each * s.u
        if keep is not None: share = share * keep
        if torch.compiler.is_compiling(): return own * y + share  # `alpha` would be a constant of what is compiled
        share = share if isinstance(share, Tensor) else torch.full((), share, dtype=y.dtype, device=y.device)
        return torch.addcmul(share, y, own) if isinstance(own, Tensor) else torch.add(share, y, alpha=own)  # in one pass

class SoftmaxTarget(NamedTuple):
    "What the softmax loss is computed against: all but the logits, checked and on their device."
    target: Tensor                 # [rows] class indices (by `resolve_indices` int64 and in range), or labels shaped like the logits
    is_index: bool                 # Which of the two
    smoothing: Smoothing
    axis: int                      # Of the classes in the logits
    weight: Tensor | None = None   # [K]
    ignore_index: int = -100       # What `ignored` is made of
    ignored: Tensor | None = None  # [rows], True where a row is left out; None where there is no such row
    invalid: Tensor | None = None  # [rows], True where an index was out of range and could not be reported: nan

    def tensors(self):
        "Those that the gradient is computed from: saved, so that autograd sees when one was changed in place."
        return [v for v in (self.target, self.weight, self.smoothing.prior, self.smoothing.eps) if isinstance(v, Tensor)]

    def chunk(self, chunk) -> SoftmaxTarget:
        "The target of this chunk of the logits."
        if chunk is ...: return self
        rows = tuple(s for d, s in enumerate(chunk) if d != self.axis)
        cut = lambda v: None if v is None else v[rows]
        return self._replace(target=self.target[rows if self.is_index else chunk], ignored=cut(self.ignored), invalid=cut(self.invalid))

    def dense(self, z: Tensor, keep: Tensor | None = None) -> Tensor:
        "t = w * q for logits like `z`, of which only those in `keep` are not masked (None: all)."
        index = self.target if self.is_index else None
        y = one_hot(index, z.shape[self.axis], self.axis, z.dtype) if self.is_index else self.target.to(z.dtype)
        t = self.smoothing.dense(y, self.axis, index, keep)
        if self.weight is not None: t = t * along(self.weight, self.axis, z.dim())
        return t if self.invalid is None else t.masked_fill(self.invalid.unsqueeze(self.axis), math.nan)

    def denominator(self, x: Tensor):
        "What `reduction='mean'` is over: the weights of the rows that count where targets are class indices, else the rows."
        rows = x.numel() // x.shape[self.axis]
        if self.is_index and self.ignored is not None: rows = rows - self.ignored.sum(dtype=accumulator(x))
        if not self.is_index or self.weight is None: return rows.clamp(min=1) if isinstance(rows, Tensor) else max(1, rows)
        w = of_class(self.weight, self.target)
        return mean_over((w if self.ignored is None else w.masked_fill(self.ignored, 0)).sum(), rows)

    def scale(self, x: Tensor, reduction: str):
        "What the sum of losses is multiplied by; on a CPU a number."
        scale = 1 / self.denominator(x) if reduction == 'mean' else 1.
        return scale.item() if isinstance(scale, Tensor) and on_cpu(x) else scale

def of_class(v: Tensor, index: Tensor) -> Tensor:
    "`v[index]`, in a third of the time, and without a look at the value of a scalar index."
    return v.index_select(0, index.flatten()).view(index.shape + v.shape[1:])

def along(v: Tensor, axis: int, ndim: int) -> Tensor:
    "A vector shaped to broadcast along `axis` of a tensor with `ndim` dimensions."
    return v.view([-1 if d == axis else 1 for d in range(ndim)])

def one_hot(index: Tensor, num_classes: int, axis: int, dtype: torch.dtype) -> Tensor:
    "Class indices as 0/1 vectors along a new `axis`. By comparison, which fuses, vmaps and has a meta, where a scatter doesn't."
    classes = torch.arange(num_classes, device=index.device)
    return (index.unsqueeze(axis) == along(classes, axis, index.dim() + 1)).to(dtype)

# --- the sigmoid loss -------------------------------------------------------------------------------------------------

def label_axis(ndim: int, axis: int | None = None):
    """The axis of the labels in logits of a sigmoid loss with `ndim` dimensions; None where all logits are of one label.

    It is `axis` where that is given. Else the last one of (N,K), and axis 1, the channels, of images (N,K,H,W) and volumes;
    masks (N,H,W) and events (N,) are of one label."""
    if axis is None: return 1 if ndim == 2 or ndim >= 4 else None
    if not -ndim <= axis < ndim: raise IndexError(f"axis {axis} is out of range for labels of {ndim} dimensions")
    return axis % ndim

def eps_pair(eps, prior=None):
    """e0 and e1, the smoothing of negatives and of positives: `eps` is both, or the pair of them.

    A `prior` is a pair itself, of negatives and of positives: each label goes 2 * eps of the way to that of its kind."""
    if prior is None: return eps if isinstance(eps, tuple) else (eps, eps)
    of_negatives, of_positives = prior
    return 2 * eps * of_negatives, 2 * eps * (1 - of_positives)

def smooth_labels(y, e0, e1):
    "q of 0/1 or soft labels `y` of floating point; e0 and e1 are numbers, or broadcast to them. Triton compiles this, too."
    return e0 + (1 - (e0 + e1)) * y

class SigmoidTarget(NamedTuple):
    "What the sigmoid loss is computed against: all but the logits. Tensors are expanded to the shape of the logits."
    target: Tensor
    e0: float | Tensor
    e1: float | Tensor
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    ignored = None  # as a `SoftmaxTarget` has: there are no such labels

    def tensors(self):
        "Those that the gradient is computed from: saved, so that autograd sees when one was changed in place."
        return [v for v in self if isinstance(v, Tensor)]

    def scale(self, x: Tensor, reduction: str):
        "What the sum of losses is multiplied by."
        return 1 / max(1, x.numel()) if reduction == 'mean' else 1.

    def chunk(self, chunk) -> SigmoidTarget:
        "The target of this chunk of the logits."
        return self if chunk is ... else SigmoidTarget(*(v[chunk] if isinstance(v, Tensor) else v for v in self))
