"""The softmax head in plain torch ops: one exp a logit, one tensor of their size.

That tensor is the gradient, made by chunks while their logits are in the cache, in the forward: the backward only scales it,
where it must. The formula and its derivation are in `formula.py`."""
from __future__ import annotations
import math
from itertools import repeat
from typing import NamedTuple
import torch
from torch import Tensor
from .backward import early_grad, plain_grad, scaled_grad
from .chunks import WHOLE, chunks, part
from .formula import Job, accumulator, masked_terms, plain_loss
from .targets import along, effective_eps

FEW = 2**14    # logits, up to which fewer ops weigh more than a second exp for each
SOME = 2**19   # and up to which they fit the cache as they are; half of it where the softmax is not to be the gradient
CHUNK_MB = 2   # of logits, and as much of their gradient: still in the cache from one op to the next
BLOCK_MB = 64  # of logits, whose rows are dealt with together

class IndexTerms(NamedTuple):
    """t for class indices where no class is masked, never made dense: t = a * onehot(y) + e * c with c = w * u.

    `y` has a class axis of size 1; so have `a`, `e` and `total`, where they are not numbers. `c` is a number, or a value a
    class along that axis, and `mass` is its sum. An ignored row has a = e = total = 0."""
    axis: int
    y: Tensor
    a: float | Tensor
    e: float | Tensor
    c: float | Tensor
    mass: float | Tensor
    total: float | Tensor

    @classmethod
    def of(cls, x: Tensor, job: Job):
        s, axis, size, w, y = job.smoothing, job.axis, x.shape[job.axis], job.weight, job.target.unsqueeze(job.axis)
        e = effective_eps(s.eps[y] if isinstance(s.eps, Tensor) else s.eps, s.spread, 1, size) if size > 1 else 0.
        a, c, mass = 1 - e, 1 / size if s.prior is None else s.prior, 1.
        if w is not None: a, c = a * w[y], c * w
        if isinstance(c, Tensor): c, mass = along(c, axis, x.dim()), c.sum().item()
        if job.ignored is not None:
            keep = (~job.ignored).unsqueeze(axis).to(accumulator(x))
            a, e = a * keep, e * keep
        return cls(axis, y, a, e, c, mass, a + e * mass)

    def each(self, cut) -> IndexTerms:
        "The same of a part of the rows, which `cut` takes from a tensor and leaves a number as it is."
        return self._replace(y=cut(self.y), a=cut(self.a), e=cut(self.e), total=cut(self.total))

    def numbers(self): return not any(isinstance(v, Tensor) for v in (self.a, self.e, self.c))

    def smooths(self): return isinstance(self.e, Tensor) or self.e > 0

    def shared(self, x: Tensor, out: Tensor | None = None):
        "sum_k c_k x_k of each row, but for the c where that is a number"
        if isinstance(self.c, Tensor): x = x * self.c  # no matrix product: autocast would do it in half precision
        return torch.sum(x, self.axis, keepdim=True, out=out)

    def with_c(self, shared): return shared if isinstance(self.c, Tensor) else self.c * shared

    def loss(self, log_p, x_y=None, shared=None):
        "The loss of a row by the log softmax and the logit of its class, and `shared`. With lse = x_y - log p_y."
        if x_y is None: return -self.total * log_p
        return self.e * (self.mass * x_y - self.with_c(shared)) - self.total * log_p

    def exact(self, loss, log_p, x_y=None, shared=None):
        "False where p_y was too small, where the smooth part is the difference of two much larger terms, or a class is masked."
        if not log_p.min().item() >= least_log(log_p.dtype): return False  # nan, too
        return x_y is None or bool((self.e * (self.mass * x_y.abs() + self.with_c(shared).abs()) - 4 * loss <= 0).all())  # nor for inf - inf

    def grad_terms(self, scale):
        "k, e and own of the gradient times `scale` (a number, or one a row): it is k * softmax + e * c + own * onehot(y)."
        own = self.a * -scale
        return self.total * scale, self.e * -scale, own.expand(self.y.shape) if isinstance(own, Tensor) else own

    def grad_(self, p: Tensor, scale):
        "Turns the softmax `p` into the gradient times `scale`."
        k, e, own = self.grad_terms(scale)
        to_grad_(p, k, e, self.c)
        add_own_(p, self.axis, self.y, own)

    def one_exp(self, x: Tensor, p: Tensor, scale):
        """log p_y of each row and, if it smooths, x_y and `shared`. Fills `p` with the softmax, or its gradient times `scale`, if any.

        What touches all logits goes by pieces of CHUNK_MB; what is left to do with rows is little, and done at once."""
        axis, smooths, n = self.axis, self.smooths(), len(x) if self.axis else 1  # axis 0: there is nothing but classes to cut
        stats = x.new_empty((3 if smooths else 1, *self.y.shape))
        size = min(n, (CHUNK_MB << 18) * len(x) // x.numel() or 1)
        at_once = x.dim() == 2  # rows are picked from all pieces in one op; of (N, K, inner) while a piece is in the cache
        def cut(v): return repeat(v) if not isinstance(v, Tensor) or not v.dim() or len(v) != n else (v,) if size == n else v.split(size)
        all_stats = stats.unbind() if smooths else (stats[0], None, None)
        terms = (None,) * 3 if scale is None else self.grad_terms(scale)
        for x_, p_, y, p_y, x_y, shared, *terms_ in zip(*map(cut, (x, p, self.y, *all_stats, *terms))):
            softmax(x_, axis, p_)
            torch.gather(p_, axis, y, out=p_y)
            if smooths: self.shared(x_, shared)
            if smooths and not at_once: torch.gather(x_, axis, y, out=x_y)
            if scale is not None: to_grad_(p_, *terms_[:2], self.c)
            if scale is not None and not at_once: add_own_(p_, axis, y, terms_[2])
        if smooths and at_once: torch.gather(x, axis, self.y, out=stats[1])
        if scale is not None and at_once: add_own_(p, axis, self.y, terms[2])
        stats[0].log_()
        return stats

    def two_exps(self, x: Tensor, p: Tensor):
        "The loss of each row, -sum_k t_k log p_k. Exact whatever the logits are, if none is -inf. Fills `p` with the softmax."
        log_p = torch.log_softmax(x, self.axis, out=p)
        loss = self.a * -log_p.gather(self.axis, self.y)
        if self.smooths(): loss -= self.e * self.with_c(self.shared(log_p))
        log_p.exp_()
        return loss

def softmax(x: Tensor, axis: int, out: Tensor | None = None):
    "torch's; but where classes are not next to each other it adds exponentials up one by one, which loses digits if there are many."
    if axis == x.dim() - 1 or x.shape[axis] <= 4096: return torch.softmax(x, axis, out=out)
    p = torch.sub(x, x.amax(axis, keepdim=True), out=out).exp_()
    return p.div_(p.sum(axis, keepdim=True))

def to_grad_(p: Tensor, k, e, c):
    "Turns the softmax `p` into k * p + e * c, in one pass where k is a number."
    b = e * c
    if isinstance(k, Tensor): p.mul_(k).add_(b)
    else: torch.add(b if isinstance(b, Tensor) else torch.scalar_tensor(b, dtype=p.dtype, device=p.device), p, alpha=k, out=p)

def add_own_(p: Tensor, axis, y, own):
    "Adds own * onehot(y) to `p`."
    if isinstance(own, Tensor): p.scatter_add_(axis, y, own)
    else: p.scatter_(axis, y, own, reduce='add')

def least_log(dtype):
    "The least log p_y that is exact: below it, the dtype holds only some of p_y's digits."
    return math.log(torch.finfo(dtype).tiny)

def blocks(x: Tensor, axis: int, out: Tensor | None):
    """Indices of blocks of `x`; and for each, logits in the accumulator's dtype and room for as many: in `out` where that is
    of the same dtype and as contiguous, so that all goes on in place. The room for one is that for the next."""
    acc = accumulator(x)
    in_place = out is not None and out.dtype == acc and x.is_contiguous()
    def room(t, shape): return t if t is not None and t.shape == shape else x.new_empty(shape, dtype=acc)
    z = p = None
    for at in chunks(x, axis, BLOCK_MB if in_place else 1, outer=in_place):
        x_ = part(x, at)
        z = x_ if x.dtype == acc else room(z, x_.shape).copy_(x_)
        p = part(out, at) if in_place else room(p, x_.shape)
        yield at, z, p
        if out is not None and not in_place: out[at] = p

def few_loss(x: Tensor, terms: IndexTerms, scale: float, out: Tensor | None):
    "`summed_loss` of few logits: another exp for each takes less than the ops that it saves."
    log_p = torch.log_softmax(x, terms.axis, out=out)
    loss = -terms.a * log_p.gather(terms.axis, terms.y).sum().item()
    if terms.smooths(): loss -= terms.e * terms.c * log_p.sum().item()
    if out is not None: terms.grad_(log_p.exp_(), scale)
    return loss if loss < math.inf else None  # nan, too

def some_loss(x: Tensor, terms: IndexTerms, scale: float, out: Tensor | None):
    "`summed_loss` of logits that fit the cache: sums over all of them need nothing a row but p_y and x_y."
    p = softmax(x, terms.axis, out)
    log_p, x_y = p.gather(terms.axis, terms.y).log_(), x.gather(terms.axis, terms.y)
    if not log_p.min().item() >= least_log(p.dtype): return None  # nan, too
    loss = terms.loss(log_p.sum().item(), x_y.sum().item(), x.sum().item()) if terms.smooths() else terms.loss(log_p.sum().item())
    if terms.smooths() and not terms.e * largest(x) * log_p.numel() < 4 * loss: return None
    if out is not None: terms.grad_(p, scale)
    return loss

def largest(x: Tensor):
    lo, hi = x.aminmax()
    return max(-lo.item(), hi.item())

def summed_loss(x: Tensor, terms: IndexTerms, scale: float, out: Tensor | None):
    """The sum of the rows' losses times `scale`, and in `out` its gradient, for terms that are numbers: in the fewest ops.

    None where `index_loss` has to look closer."""
    native = x.dtype == accumulator(x)
    if native and x.numel() <= FEW: loss = few_loss(x, terms, scale, out)
    elif native and x.numel() <= (SOME if out is not None else SOME // 2): loss = some_loss(x, terms, scale, out)
    else:
        loss = 0.
        for at, z, p in blocks(x, terms.axis, out):
            here = terms if at is WHOLE else terms.each(lambda v: part(v, at))
            stats = here.one_exp(z, p, None if out is None else scale).flatten(1)
            (least, *low), (_, *high) = (v.tolist() for v in stats.aminmax(dim=1))
            if not least >= least_log(z.dtype): return None  # nan, too
            of_rows = here.loss(*stats.sum(1).tolist())
            if low and not terms.e * max(-low[0], high[0], -terms.c * low[1], terms.c * high[1]) * stats.shape[1] < 4 * of_rows: return None
            loss += of_rows
    return None if loss is None else torch.scalar_tensor(loss * scale, dtype=accumulator(x), device=x.device)

def softmax_grad(x: Tensor, terms: IndexTerms, scale: float, out: Tensor):
    "The gradient alone, where the loss was found to need no closer look."
    for at, z, p in blocks(x, terms.axis, out):
        softmax(z, terms.axis, p)
        terms.each(lambda v: part(v, at)).grad_(p, scale)

def index_loss(x: Tensor, job: Job, terms: IndexTerms, scale=None, out: Tensor | None = None):
    "`loss_rows` with t = a * onehot(y) + e * c; where classes are masked, with t made dense."
    loss, axis = values_of_rows(x, job.axis), job.axis
    if x.numel() <= FEW and x.dtype == loss.dtype: return careful_loss(x, job, terms, scale, out)
    for at, z, p in blocks(x, axis, out):
        cut = lambda v: part(v, at)
        here, s = terms.each(cut), cut(scale)
        stats = here.one_exp(z, p, s)
        rows = here.loss(*stats)
        if not here.exact(rows, *stats):
            rows = careful_loss(z, job.at(at), here, s, p).unsqueeze(axis)
        loss.unsqueeze(axis)[at] = rows
    return loss

def careful_loss(x: Tensor, job: Job, terms: IndexTerms, scale, p: Tensor):
    "The same for logits whose losses were not exact; `p` gets their gradient, if there is a `scale`."
    loss, axis = values_of_rows(x, job.axis), job.axis
    for at in chunks(x, axis):
        cut = lambda v: part(v, at)
        here, x_, p_, s = terms.each(cut), cut(x), cut(p), cut(scale)
        rows = here.two_exps(x_, p_)
        if not rows.max().item() < math.inf: rows = dense_loss(x_, job.at(at), s, p_).unsqueeze(axis)  # nan, too
        elif s is not None: here.grad_(p_, s)
        loss.unsqueeze(axis)[at] = rows
    return loss

def dense_loss(x: Tensor, job: Job, scale=None, out: Tensor | None = None):
    "`loss_rows` with t made dense, a chunk at a time: for soft, multi-hot and class-conditional targets, and masked logits."
    loss, axis = values_of_rows(x, job.axis), job.axis
    for at in chunks(x, axis):
        here, z = job.at(at), part(x, at).to(loss.dtype)
        total, dot, t = masked_terms(z - z.amax(axis, keepdim=True), here)
        p = softmax(z, axis)
        rows = (total * -p.amax(axis).log() - dot).unsqueeze(axis)  # the lse of x - max x is -log max p
        gone = None if here.ignored is None else here.ignored.unsqueeze(axis)
        loss.unsqueeze(axis)[at] = rows if gone is None else rows.masked_fill(gone, 0)
        if scale is None: continue
        grad = p.mul_(total.unsqueeze(axis)).sub_(t).mul_(part(scale, at))
        out[at] = grad if gone is None else grad.masked_fill_(gone, 0)
    return loss

def values_of_rows(x: Tensor, axis: int):
    "Room for a value a row."
    return torch.empty(x.shape[:axis] + x.shape[axis+1:], dtype=accumulator(x), device=x.device)

def loss_rows(x: Tensor, job: Job, scale=None, out: Tensor | None = None) -> Tensor:
    "The loss of each row; `out`, if given, gets their gradient times `scale` (a number, or one a row with a class axis of size 1)."
    if not x.numel(): return values_of_rows(x, job.axis)
    return index_loss(x, job, IndexTerms.of(x, job), scale, out) if job.sparse(x) else dense_loss(x, job, scale, out)

def loss_and_grad(x: Tensor, job: Job, reduction: str, denominator, out: Tensor | None = None):
    """The reduced loss, and the terms if these alone gave it. `out`, if given, gets its gradient, or with reduction='none' that
    of their sum."""
    scale = 1 / denominator
    if reduction != 'none' and x.numel() and job.sparse(x):
        terms = IndexTerms.of(x, job)
        loss = summed_loss(x, terms, scale, out) if terms.numbers() else None
        if loss is not None: return loss, terms
    loss = loss_rows(x, job, None if out is None else scale, out)
    return loss if reduction == 'none' else loss.sum() * scale, None

class SoftmaxLoss(torch.autograd.Function):
    """The loss with its gradient by hand, which the forward makes and the first backward hands over.

    A later backward (retain_graph) makes it anew; so does the first one where the forward left it none (`early_grad`)."""

    @staticmethod
    def forward(ctx, x, job, reduction, denominator):
        ctx.save_for_backward(x, *job.tensors())
        ctx.grad = grad = early_grad(x, reduction)
        loss, terms = loss_and_grad(x, job, reduction, denominator, grad)
        ctx.rest = job, reduction, denominator, terms
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        x, *_ = ctx.saved_tensors
        job, reduction, denominator, terms = ctx.rest
        grad, ctx.grad = ctx.grad, None
        plain = plain_grad(x, grad_output, plain_loss, job, reduction)
        if plain is not None: return plain, None, None, None
        if grad_output.dim(): grad_output = grad_output.unsqueeze(job.axis)
        def make(scale, out):
            if x.dtype == accumulator(x): loss_and_grad(x, job, reduction, denominator, out)  # bit by bit as in the forward
            elif terms is not None: softmax_grad(x, terms, scale, out)
            else: loss_rows(x, job, scale, out)
        return scaled_grad(x, grad, grad_output, 1 / denominator, make), None, None, None

def as_it_lies(x: Tensor, axis: int):
    """The order of axes in which the logits lie in memory (NHWC for channels_last), and their shape as (N, K) or (N, K, inner)
    in that order. None where no order makes them contiguous."""
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d)) if not x.is_contiguous() else [*range(x.dim())]
    if not x.permute(order).is_contiguous(): return None
    at, sizes = order.index(axis), [x.shape[d] for d in order]
    outer, inner = math.prod(sizes[:at]), math.prod(sizes[at+1:])
    if x.dim() == 2 and inner > 1: return None  # torch.softmax copies a chunk, and adds up in lanes; as they lie, one by one
    return order, (outer, x.shape[axis]) if inner == 1 else (outer, x.shape[axis], inner)

def softmax_loss(x: Tensor, job: Job, reduction: str, plain: bool) -> Tensor:
    "The loss of logits `x`; `plain` where something else than `x` needs a gradient, or torch is tracing."
    if plain: return plain_loss(x, job, reduction)
    if not (x.dim() == 2 and job.axis == 1 and x.is_contiguous()):
        seen = as_it_lies(x, job.axis)
        if seen is not None: return seen_as(*seen, x, job, reduction)
    return contiguous_loss(x, job, reduction)

def seen_as(order, shape, x, job, reduction):
    "The loss of `x.permute(order).view(shape)`, with its rows back in the order of those of `x`."
    rows = [d - (d > job.axis) for d in order if d != job.axis]
    turned = job.turned(lambda v: v.permute(rows).reshape(shape[:1] + shape[2:]))
    if not job.is_index: turned = turned.replaced(target=job.target.permute(order).reshape(shape))
    loss = contiguous_loss(x.permute(order).view(shape), turned.replaced(axis=1), reduction)
    if reduction != 'none': return loss
    sizes = [x.shape[d] for d in order if d != job.axis]
    return loss.view(sizes).permute([rows.index(d) for d in range(len(rows))])

def contiguous_loss(x, job, reduction):
    denominator = job.denominator(x) if reduction == 'mean' else 1
    if x.is_cpu: denominator = float(denominator)
    if x.requires_grad and torch.is_grad_enabled(): return SoftmaxLoss.apply(x, job, reduction, denominator)
    return loss_and_grad(x, job, reduction, denominator)[0]
