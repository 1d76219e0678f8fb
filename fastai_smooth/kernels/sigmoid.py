"""The sigmoid head in plain torch ops, with a hand-written gradient.

For each logit x, with its smoothed label q and l = 1 + (pos_weight - 1) q:

    loss = weight * ((1 - q) x + l * softplus(-x))         d loss / d x = weight * (l * sigmoid(x) - pos_weight * q)

which without pos_weight is softplus(x) - q x, with the gradient sigmoid(x) - q."""
from __future__ import annotations
import math
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import Tensor
from .backward import early_grad, plain_grad, scaled_grad, transforming
from .chunks import WHOLE, chunks, part
from .formula import accumulator
from .targets import sigmoid_q, sigmoid_q_of

FEW = 2**14  # logits, up to which torch's own op is quicker, for all of its log1p
SUMS_EPS = .01  # from where on the loss is large enough for logs of products

@dataclass(frozen=True)
class Labels:
    "What the loss is computed against: all but the logits. Tensors are expanded to the shape of the logits."
    target: Tensor
    eps: float
    prior: Tensor | None = None
    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    def at(self, at) -> Labels:
        if at is WHOLE: return self
        target, prior, weight, pos_weight = (part(v, at) for v in (self.target, self.prior, self.weight, self.pos_weight))
        return Labels(target, self.eps, prior, weight, pos_weight)

    def tensors(self):
        "Those that the gradient is computed from: saved, so that autograd sees when one was changed in place."
        return [v for v in (self.target, self.prior, self.weight, self.pos_weight) if v is not None]

    def q(self, dtype: torch.dtype):
        "The smoothed labels."
        y = self.target
        if torch.compiler.is_compiling(): return sigmoid_q(y.to(dtype), self.eps, self.prior)  # the other's alpha would be compiled in
        if y.dtype == torch.bool and not transforming(): y = y.view(torch.uint8)  # which torch converts eight times as fast
        return sigmoid_q_of(y, self.eps, dtype) if self.prior is None else sigmoid_q(y.to(dtype), self.eps, self.prior)

    def loss(self, x, q, log_p):
        "The loss of each logit, by log sigmoid(x)."
        if self.pos_weight is not None: log_p = (1 + (self.pos_weight - 1) * q) * log_p
        loss = (1 - q) * x - log_p
        return loss if self.weight is None else loss * self.weight

    def grad(self, p, q):
        "d loss / d x of each logit, by p = sigmoid(x), which it may overwrite."
        grad = p.sub_(q) if self.pos_weight is None else (1 + (self.pos_weight - 1) * q) * p - self.pos_weight * q
        return grad if self.weight is None else grad * self.weight

    def sums_do(self):
        "May the losses be summed by `summed_loss`?"
        return self.eps >= SUMS_EPS and self.prior is self.weight is self.pos_weight is None

def log_sigmoid(x: Tensor):
    """log sigmoid(x) = min(x, 0) + log(1 - s), s = sigmoid(-|x|): as exact as `F.logsigmoid`, whose log1p is the slowest op of all.

    With p the rounded 1 - s, log(1 - s) is log(p) - (s - (1 - p)), to within a rounding: 1 - p is exact."""
    s = x.abs().neg_().sigmoid_()
    p = 1 - s
    log_p = p.log().sub_(s.sub_(p.neg_().add_(1)))
    return log_p.add_(torch.clamp(x, max=0, out=s))

def summed_loss(x: Tensor, q: Tensor, p: Tensor):
    """The sum of relu(x) - q x - log max(p, 1 - p), which is that of softplus(x) - q x, for p = sigmoid(x).

    The logs of products of 16, each factor at least a half, are a sixteenth of the work. What they lose, 6e-8 a logit at most,
    is nothing beside the loss of smoothed labels."""
    room = x.relu()
    loss = room.addcmul_(q, x, value=-1).sum()
    factors = torch.maximum(torch.sub(1, p, out=room), p, out=room).flatten()
    n = factors.numel() // 16 * 16
    loss = loss - factors[:n].view(16, -1).prod(0).log_().sum()
    return loss if n == factors.numel() else loss - factors[n:].log_().sum()

def plain_loss(x: Tensor, labels: Labels, reduction: str) -> Tensor:
    "The loss, accumulated in float32 (float64 for float64), in differentiable ops."
    x = x.to(accumulator(x))
    loss = labels.loss(x, labels.q(x.dtype), F.logsigmoid(x))
    if reduction == 'none': return loss
    return loss.sum() if reduction == 'sum' else loss.sum() / max(1, x.numel())

def loss_and_grad(x: Tensor, labels: Labels, reduction: str, scale=1., out: Tensor | None = None) -> Tensor:
    """The reduced loss, by chunks: nothing of the logits' size is made, but for reduction='none'. `out`, if given, gets the
    gradient of their sum, times `scale` (a number, or one a logit)."""
    acc = accumulator(x)
    each = torch.empty_like(x, dtype=acc) if reduction == 'none' else None
    sums = []
    in_place = out is not None and out.dtype == acc and out.is_contiguous()
    for at in chunks(x):
        here, z = labels.at(at), part(x, at).to(acc)
        q, p, quick = here.q(acc), None, each is None and labels.sums_do()
        if quick or out is not None: p = torch.sigmoid(z, out=part(out, at) if in_place else None)
        total = summed_loss(z, q, p) if quick else None
        if total is None or x.is_cpu and not total.item() < math.inf:  # nan, too
            loss = here.loss(z, q, log_sigmoid(z))
            total = loss.sum() if each is None else None
        if each is None: sums.append(total)
        else: each[at] = loss
        if out is not None: torch.mul(here.grad(p, q), part(scale, at), out=part(out, at))
    if each is not None: return each
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return total if reduction == 'sum' else total / max(1, x.numel())

class SigmoidLoss(torch.autograd.Function):
    "The loss with its gradient by hand: made in the forward or, as in `SoftmaxLoss` and for its reasons, in the backward."

    @staticmethod
    def forward(ctx, x, labels, reduction):
        ctx.save_for_backward(x, *labels.tensors())
        ctx.labels, ctx.reduction, ctx.scale = labels, reduction, 1 / max(1, x.numel()) if reduction == 'mean' else 1
        ctx.grad = grad = early_grad(x, reduction)
        return loss_and_grad(x, labels, reduction, ctx.scale, grad)

    @staticmethod
    def backward(ctx, grad_output):
        x, *_ = ctx.saved_tensors
        grad, ctx.grad = ctx.grad, None
        plain = plain_grad(x, grad_output, plain_loss, ctx.labels, ctx.reduction)
        if plain is not None: return plain, None, None
        return scaled_grad(x, grad, grad_output, ctx.scale, lambda s, out: loss_and_grad(x, ctx.labels, 'sum', s, out)), None, None

def sigmoid_loss(x: Tensor, labels: Labels, reduction: str, plain: bool) -> Tensor:
    "The loss of logits `x`; `plain` where something else than `x` needs a gradient, or torch is tracing."
    if plain: return plain_loss(x, labels, reduction)
    if 0 < x.numel() <= FEW and x.is_cpu and x.dtype == accumulator(x):
        how = 0 if reduction == 'none' else 1 if reduction == 'mean' else 2
        return torch.binary_cross_entropy_with_logits(x, labels.q(x.dtype), labels.weight, labels.pos_weight, how)
    if x.requires_grad and torch.is_grad_enabled(): return SigmoidLoss.apply(x, labels, reduction)
    return loss_and_grad(x, labels, reduction)
