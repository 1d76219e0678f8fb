"""The softmax head in plain torch ops, with a hand-written gradient.

With t = w * q and A = sum_k t_k, for each row of logits x:

    loss = A * lse(x) - sum_k t_k x_k          d loss / d x = A * softmax(x) - t

`plain_loss` is that formula in differentiable ops, for torch.compile, torch.func, double backward and targets that need
a gradient. `SoftmaxLoss` is the same by chunks: one exp per logit, and one tensor of the logits' size, which the backward
turns into the gradient in place."""
from __future__ import annotations
import math
from dataclasses import dataclass, replace
import torch
from torch import Tensor
from .chunks import chunks
from .targets import Smoothing, along, effective_eps, one_hot

@dataclass(frozen=True)
class Job:
    "What the loss is computed against: all but the logits, checked and on their device."
    target: Tensor                 # [rows] class indices (int64, in range), or labels shaped like the logits
    is_index: bool                 # Which of the two
    smoothing: Smoothing
    axis: int                      # Of the classes in the logits
    weight: Tensor | None = None   # [K]
    ignored: Tensor | None = None  # [rows], True where a row counts for nothing; None when there is no such row
    invalid: Tensor | None = None  # [rows], True where an index was out of range and could not be reported: nan

    def tensors(self):
        "Those that the gradient is computed from: saved, so that autograd sees when one was changed in place."
        return [v for v in (self.target, self.weight, self.smoothing.prior, self.smoothing.eps) if isinstance(v, Tensor)]

    def rows_index(self, at): return tuple(s for d, s in enumerate(at) if d != self.axis)

    def rows(self, v, at):
        "The part of `v`, None or a number or a value a row, that belongs to the chunk `at` of the logits."
        return v[self.rows_index(at)] if isinstance(v, Tensor) and v.dim() else v

    def each(self, v):
        "`v`, a number or a value a row, shaped to broadcast over the classes."
        return v.unsqueeze(self.axis) if isinstance(v, Tensor) and v.dim() else v

    def at(self, at) -> Job:
        "The job of the chunk `at`."
        return replace(self, target=self.rows(self.target, at) if self.is_index else self.target[at],
                       ignored=self.rows(self.ignored, at), invalid=self.rows(self.invalid, at))

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
        w = self.weight[self.target]
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
    if job.ignored is not None: x = x.masked_fill(job.each(job.ignored), 0)  # whatever is there, it gets no gradient
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

@dataclass(frozen=True)
class IndexTerms:
    """t for class indices where no class is masked, never made dense: t = a * onehot(y) + e * c with c = w * u.

    `a`, `e` and `total` are numbers or a value a row; `c` is a number or a value a class."""
    job: Job
    a: float | Tensor
    e: float | Tensor
    c: float | Tensor
    total: float | Tensor

    @classmethod
    def of(cls, job: Job, num_classes: int):
        s, y, w = job.smoothing, job.target, job.weight
        e = effective_eps(s.eps[y] if isinstance(s.eps, Tensor) else s.eps, s.spread, 1, num_classes)
        c = 1 / num_classes if s.prior is None else s.prior
        a = (1 - e) if w is None else (1 - e) * w[y]
        if w is not None: c = c * w
        return cls(job, a, e, c, a + e * (c.sum() if isinstance(c, Tensor) else 1.))

    def at(self, at) -> IndexTerms:
        rows = lambda v: self.job.rows(v, at)
        return replace(self, job=self.job.at(at), a=rows(self.a), e=rows(self.e), total=rows(self.total))

    def loss(self, z, lse):
        axis = self.job.axis
        dot = self.a * z.gather(axis, self.job.target.unsqueeze(axis)).squeeze(axis)
        if isinstance(self.e, Tensor) or self.e > 0:
            # no matrix product for a vector c: autocast would do it in half precision
            shared = (z * along(self.c, axis, z.dim())).sum(axis) if isinstance(self.c, Tensor) else z.sum(axis) * self.c
            dot = dot + self.e * shared
        return self.total * lse - dot

    def grad_(self, p, scale, x):
        each, axis, y = self.job.each, self.job.axis, self.job.target
        c = along(self.c, axis, p.dim()) if isinstance(self.c, Tensor) else self.c
        p.mul_(each(self.total * scale)).sub_(each(self.e * scale) * c)
        return p.scatter_add_(axis, y.unsqueeze(axis), (-self.a * scale).expand(y.shape).unsqueeze(axis))

@dataclass(frozen=True)
class DenseTerms:
    "t made dense, a chunk at a time: for soft, multi-hot and class-conditional targets, and where logits are masked."
    job: Job

    def at(self, at) -> DenseTerms: return DenseTerms(self.job.at(at))

    def loss(self, z, lse):
        total, dot, _ = masked_terms(z, self.job)
        return total * lse - dot

    def grad_(self, p, scale, x):
        t = self.job.t(p, x != -math.inf)
        p.mul_(self.job.each(t.sum(self.job.axis) * scale))
        return p.sub_(t.masked_fill_(x == -math.inf, 0).mul_(self.job.each(scale)))

def exponentials(x, axis):
    "x less its row's maximum, exp of that, and its sum: the softmax is exp / sum, and lse is the maximum + log sum."
    z = x - x.amax(axis, keepdim=True)
    exp = z.exp()
    return z, exp, exp.sum(axis, keepdim=True)

def terms_of(job: Job, x: Tensor):
    "How to compute t for this job. Only on the CPU is it free to see, from the loss, that no class was masked."
    s = job.smoothing
    sparse = job.is_index and x.device.type == 'cpu' and (s.prior is None or s.prior.dim() == 1)
    return IndexTerms.of(job, x.shape[job.axis]) if sparse else DenseTerms(job)

def forward_rows(x: Tensor, job: Job, probs: Tensor | None = None):
    "The loss of each row, by chunks, with the terms used for each chunk; fills `probs` with the softmax if given."
    axis, acc, terms, used = job.axis, accumulator(x), terms_of(job, x), []
    loss = torch.empty(x.shape[:axis] + x.shape[axis+1:], dtype=acc, device=x.device)
    for at in chunks(x, axis):
        here = terms.at(at)
        z, exp, total = exponentials(x[at].to(acc), axis)
        lse = total.log().squeeze(axis)
        rows = here.loss(z, lse)
        if isinstance(here, IndexTerms) and not bool(rows.isfinite().all()):
            here = DenseTerms(here.job)   # a masked class, or a true infinity or nan: the general formula tells
            rows = here.loss(z, lse)
        loss[job.rows_index(at)] = rows
        if probs is not None: torch.div(exp, total, out=probs[at])
        used.append((at, here))
    return (loss if job.ignored is None else loss.masked_fill_(job.ignored, 0)), used

class SoftmaxLoss(torch.autograd.Function):
    """The loss with its gradient by hand. The first backward turns the kept probabilities into the gradient in place;
    a later one (retain_graph), and half precision, where float32 ones would outweigh the logits, take them anew."""

    @staticmethod
    def forward(ctx, x, job, reduction):
        ctx.probs = torch.empty_like(x) if x.dtype == accumulator(x) else None
        loss, ctx.used = forward_rows(x, job, ctx.probs)
        ctx.save_for_backward(x, *job.tensors())
        ctx.job, ctx.reduction, ctx.denominator = job, reduction, job.denominator(x) if reduction == 'mean' else 1
        return loss if reduction == 'none' else loss.sum() / ctx.denominator

    @staticmethod
    def backward(ctx, grad):
        x, *_ = ctx.saved_tensors
        if torch.is_grad_enabled() or transforming():
            with torch.enable_grad(): loss = plain_loss(x, ctx.job, ctx.reduction)
            return torch.autograd.grad(loss, x, grad, create_graph=torch.is_grad_enabled())[0], None, None
        probs, ctx.probs = ctx.probs, None
        return gradient(x, ctx.job, ctx.used, grad / ctx.denominator, probs), None, None

def gradient(x, job, used, scale, probs=None):
    "d loss / d x for row losses scaled by `scale` (a number or one a row), written into `probs` if given."
    out, acc = torch.empty_like(x) if probs is None else probs, accumulator(x)
    for at, terms in used:
        part = x[at]
        if probs is None:
            _, exp, total = exponentials(part.to(acc), job.axis)
            p = exp.div_(total)
        else: p = probs[at]
        terms.grad_(p, job.rows(scale, at), part)
        if job.ignored is not None: p.masked_fill_(job.each(job.rows(job.ignored, at)), 0)
        if probs is None: out[at] = p
    return out

def transforming() -> bool:
    "Is a torch.func transform (grad, vmap, ...) or forward-mode AD at work? Then only plain ops are understood."
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0

def softmax_loss(x: Tensor, job: Job, reduction: str, plain: bool) -> Tensor:
    "The loss of logits `x`; `plain` where something else than `x` needs a gradient, or torch is tracing."
    if plain: return plain_loss(x, job, reduction)
    if x.requires_grad and torch.is_grad_enabled(): return SoftmaxLoss.apply(x, job, reduction)
    return reduced(forward_rows(x, job)[0], x, job, reduction)
