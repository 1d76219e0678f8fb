"""The softmax head's formula, and what it is computed against, in ops that torch can differentiate and compile.

With t = w * q and A = sum_k t_k, for each row of logits x:

    loss = A * lse(x) - sum_k t_k x_k          d loss / d x = A * softmax(x) - t

This is what torch.compile, torch.func, double backward and targets that need a gradient get, and what `softmax.py`
computes faster."""
from __future__ import annotations
import math
from dataclasses import dataclass
import torch
from torch import Tensor
from .chunks import WHOLE
from .targets import Smoothing, along, of_class, one_hot

@dataclass(frozen=True)
class Job:
    "What the loss is computed against: all but the logits, checked and on their device."
    target: Tensor                 # [rows] class indices (as they came, or by `looked_up` int64 and in range), or labels shaped like the logits
    is_index: bool                 # Which of the two
    smoothing: Smoothing
    axis: int                      # Of the classes in the logits
    weight: Tensor | None = None   # [K]
    ignore_index: int = -100       # What `ignored` is made of
    ignored: Tensor | None = None  # [rows], True where a row counts for nothing; None when there is no such row
    invalid: Tensor | None = None  # [rows], True where an index was out of range and could not be reported: nan

    def replaced(self, **changes) -> Job:
        "`dataclasses.replace`, in words that torch.compile understands (torch 2.4)"
        return Job(**{n: changes.get(n, getattr(self, n)) for n in Job.__match_args__})

    def tensors(self):
        "Those that the gradient is computed from: saved, so that autograd sees when one was changed in place."
        return [v for v in (self.target, self.weight, self.smoothing.prior, self.smoothing.eps) if isinstance(v, Tensor)]

    def at(self, at) -> Job:
        "The job of the chunk `at` of the logits."
        if at is WHOLE: return self
        rows = tuple(s for d, s in enumerate(at) if d != self.axis)
        job = self.turned(lambda v: v[rows])
        return job if self.is_index else job.replaced(target=self.target[at])

    def turned(self, turn) -> Job:
        "The same with its rows turned (permuted, or viewed in another shape) by `turn`."
        turned = lambda v: None if v is None else turn(v)
        return self.replaced(target=turn(self.target) if self.is_index else self.target, ignored=turned(self.ignored), invalid=turned(self.invalid))

    def sparse(self, x: Tensor):
        "Is t a number or a vector plus one value a row? Seen only on the CPU, where it is free to look whether that went well."
        prior = self.smoothing.prior
        return self.is_index and x.is_cpu and (prior is None or prior.dim() == 1)

    def t(self, z: Tensor, keep: Tensor):
        "w * q, dense, for logits of the shape and dtype of `z`, of which only those in `keep` are not masked."
        index = self.target if self.is_index else None
        y = one_hot(index, z.shape[self.axis], self.axis, z.dtype) if self.is_index else self.target.to(z.dtype)
        t = self.smoothing.dense(y, self.axis, index, keep)
        if self.weight is not None: t = t * along(self.weight, self.axis, z.dim())
        return t if self.invalid is None else t.masked_fill(self.invalid.unsqueeze(self.axis), math.nan)

    def denominator(self, x: Tensor):
        "What the mean is over: the rows' weights where targets are class indices, else the rows; 1 when there is none."
        rows = x.numel() // x.shape[self.axis]
        if rows == 0 or not self.is_index: return max(1, rows)
        if self.weight is None: return rows if self.ignored is None else (rows - self.ignored.sum()).clamp(min=1)
        w = of_class(self.weight, self.target)
        total = w.sum() if self.ignored is None else w.masked_fill(self.ignored, 0).sum()
        total = total / (total != 0)  # labels whose weights are all 0: nan, as in PyTorch
        return total if self.ignored is None else torch.where(self.ignored.all(), 1, total)

def accumulator(x: Tensor) -> torch.dtype: return torch.float64 if x.dtype == torch.float64 else torch.float32

def masked_terms(z: Tensor, job: Job):
    """A, sum_k t_k z_k and t, for logits less their row's maximum.

    Masked classes (-inf) get no smoothing and count 0 * -inf = 0, unless the target itself wants them: then inf."""
    keep = z != -math.inf
    t = job.t(z, keep)
    lost = (~keep & (t != 0)).any(job.axis)
    total, t = t.sum(job.axis), t.masked_fill(~keep, 0)
    dot = (t * z.masked_fill(~keep, 0)).sum(job.axis)
    # subtracted, not filled in: the gradient of the other classes goes through dot
    return total, dot - torch.zeros_like(dot).masked_fill(lost, math.inf), t

def row_losses(x: Tensor, job: Job) -> Tensor:
    "The loss of each row of logits `x`, in ops that torch can differentiate and compile."
    if job.ignored is not None: x = x.masked_fill(job.ignored.unsqueeze(job.axis), 0)  # whatever is there, it gets no gradient
    z = x - x.detach().amax(job.axis, keepdim=True)
    total, dot, _ = masked_terms(z, job)
    loss = total * z.exp().sum(job.axis).log() - dot
    return loss if job.ignored is None else loss.masked_fill(job.ignored, 0)

def plain_loss(x: Tensor, job: Job, reduction: str) -> Tensor:
    "The loss, accumulated in float32 (float64 for float64), in differentiable ops."
    x = x.to(accumulator(x))
    return reduced(row_losses(x, job), x, job, reduction)

def reduced(loss: Tensor, x: Tensor, job: Job, reduction: str) -> Tensor:
    if reduction == 'none': return loss
    return loss.sum() if reduction == 'sum' else loss.sum() / job.denominator(x)
