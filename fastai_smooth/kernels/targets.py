"""What the smoothed target q is: the formula of both heads, in one place.

    softmax:  q = (1 - e) * y + e * u      u: uniform over the classes, or a prior
    sigmoid:  q = (1 - 2e) * y + 2e * u    u: 1/2, or a prior; a positive becomes 1 - e, a negative e

Szegedy et al. 2016 (arXiv:1512.00567) is the uniform softmax one, Keras' binary `label_smoothing` is 2e.
"""
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor

def soften(y, eps, u):
    "The smoothed target: `y` keeps `1 - eps` of its mass, `u` gets `eps`."
    return (1 - eps) * y + eps * u

def effective_eps(eps, spread, n, size):
    """The eps of `spread='all'` that leaves `1 - eps` on the `n` positives out of `size` classes.

    With 'others' the positives get nothing back from the uniform part, which is 'all' with eps * size / (size - n);
    where every class is positive there is nowhere to move mass to, and nothing is moved."""
    if spread == 'all': return eps
    rest = size - n
    if not isinstance(rest, Tensor): return eps * (size / rest if rest else 0.)
    return torch.where(rest > 0, eps * size / torch.where(rest > 0, rest, 1), 0.)

@dataclass(frozen=True)
class Smoothing:
    "How targets are smoothed on the softmax head. `prior` and a tensor `eps` are used in the dtype they have."
    eps: float | Tensor = .1     # In [0, 1]; or one value a class, of shape [K]
    prior: Tensor | None = None  # Where the mass goes: [K], or [K,K] with a row for each target class
    spread: str = 'all'          # 'all': every class gets a share; 'others': all but the positives do
    multi_hot: bool = False      # Targets are 0/1 vectors with any number of ones, to be shared out among the ones

    def to(self, like: Tensor, dtype: torch.dtype) -> Smoothing:
        "The same, with its tensors on the device of `like` and of `dtype`."
        if self.prior is None and not isinstance(self.eps, Tensor): return self
        move = lambda o: o.to(like.device, dtype) if isinstance(o, Tensor) else o
        return Smoothing(move(self.eps), move(self.prior), self.spread, self.multi_hot)

    def dense(self, y, axis, index=None, keep=None):
        """q for targets `y` (floating, classes along `axis`); `index` are the class indices that `y` came from.

        `keep` is False at classes that are masked out by a logit of -inf: they get no share, the others all of it."""
        size = y.shape[axis] if keep is None else keep.sum(axis, keepdim=True, dtype=y.dtype)
        eps, n = self.eps, y.sum(axis, keepdim=True) if self.multi_hot else 1
        if isinstance(eps, Tensor): eps = of_class(eps, index).unsqueeze(axis)
        if self.multi_hot and self.spread == 'others':  # not `effective_eps`: a masked positive has (1 - eps) / n, and is not among `size`
            other = y == 0 if keep is None else (y == 0) & keep
            rest = other.sum(axis, keepdim=True, dtype=y.dtype)
            u, eps = other / rest.clamp(min=1), eps * (rest > 0).to(y.dtype)
        else:
            reached = 1 if keep is None or self.spread == 'all' else ((y == 0) | keep).all(axis, keepdim=True).to(y.dtype)
            u, eps = self._shares(y, axis, index, size, keep), effective_eps(eps, self.spread, reached, size)
        if self.multi_hot:  # a row with no positive is all smoothing
            none = n == 0
            y, eps = y / torch.where(none, 1, n), eps + (1 - eps) * none.to(y.dtype)
        return soften(y, eps, u)

    def _shares(self, y, axis, index, size, keep):
        "u, broadcastable to `y`: uniform or the prior, over the classes that are kept."
        if self.prior is None: return 1 / size if keep is None else keep.to(y.dtype) / size
        if self.prior.dim() == 2: u = of_class(self.prior, index).movedim(-1, axis)
        else: u = along(self.prior, axis, y.dim())
        if keep is None: return u
        u = u * keep
        total = u.sum(axis, keepdim=True)
        # Where the prior gave all of its mass to masked classes, uniform is what is left to say
        return torch.where(total > 0, u / torch.where(total > 0, total, 1), keep.to(y.dtype) / size)

def of_class(v: Tensor, index: Tensor) -> Tensor:
    "`v[index]`, which would look at the value of a scalar index."
    return v[index] if index.dim() else v[index[None]][0]

def along(v: Tensor, axis: int, ndim: int) -> Tensor:
    "A vector shaped to broadcast along `axis` of a tensor with `ndim` dimensions."
    return v.view([-1 if d == axis else 1 for d in range(ndim)])

def one_hot(index: Tensor, num_classes: int, axis: int, dtype: torch.dtype) -> Tensor:
    "Class indices as 0/1 vectors along a new `axis`. By comparison: no scatter, so it fuses, vmaps and has a meta."
    classes = torch.arange(num_classes, device=index.device)
    return (index.unsqueeze(axis) == along(classes, axis, index.dim() + 1)).to(dtype)

def label_axis(ndim: int, axis: int | None = None):
    """The axis of the labels in logits of a sigmoid loss with `ndim` dimensions; None where all logits are of one label.

    It is `axis` where that is given. Else the last one of (N,K), and axis 1, the channels, of images (N,K,H,W) and volumes;
    masks (N,H,W) and events (N,) are of one label."""
    if axis is None: return 1 if ndim == 2 or ndim >= 4 else None
    if not -ndim <= axis < ndim: raise IndexError(f"axis {axis} is out of range for labels of {ndim} dimensions")
    return axis % ndim

def sigmoid_q(y, eps, prior=None):
    "q for 0/1 or soft labels `y`; `prior` broadcasts to them."
    return soften(y, 2 * eps, .5 if prior is None else prior)

def sigmoid_q_of(y: Tensor, eps: float, dtype: torch.dtype):
    "`sigmoid_q` of labels of any dtype, in one op for integers: (1 - 2e) y + e."
    return torch.add(torch.scalar_tensor(eps, dtype=dtype, device=y.device), y.to(dtype) if y.is_floating_point() else y, alpha=1 - 2 * eps)
