"""The sigmoid head in plain torch ops, with a hand-written gradient.

For each logit x, with its smoothed label q and l = 1 + (pos_weight - 1) q:

    loss = weight * ((1 - q) x + l * softplus(-x))         d loss / d x = weight * (l * sigmoid(x) - pos_weight * q)

which without pos_weight is softplus(x) - q x, with the gradient sigmoid(x) - q."""
from __future__ import annotations
from dataclasses import dataclass, replace
import torch
import torch.nn.functional as F
from torch import Tensor
from .chunks import chunks
from .softmax import accumulator, transforming
from .targets import sigmoid_q

@dataclass(frozen=True)
class Labels:
    "What the loss is computed against: all but the logits. Tensors are expanded to the shape of the logits."
    target: Tensor
    eps: float
    prior: Tensor | None = None
    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    def at(self, at) -> Labels:
        cut = lambda v: None if v is None else v[at]
        return replace(self, target=self.target[at], prior=cut(self.prior), weight=cut(self.weight), pos_weight=cut(self.pos_weight))

    def tensors(self):
        "Those that the gradient is computed from: saved, so that autograd sees when one was changed in place."
        return [v for v in (self.target, self.prior, self.weight, self.pos_weight) if v is not None]

    def loss(self, x):
        "The loss of each logit, differentiable."
        q = sigmoid_q(self.target.to(x.dtype), self.eps, self.prior)
        log_p = F.logsigmoid(x)
        loss = (1 - q) * x - (log_p if self.pos_weight is None else (1 + (self.pos_weight - 1) * q) * log_p)
        return loss if self.weight is None else loss * self.weight

    def grad(self, x):
        "d loss / d x of each logit."
        q, p = sigmoid_q(self.target.to(x.dtype), self.eps, self.prior), x.sigmoid()
        grad = p - q if self.pos_weight is None else (1 + (self.pos_weight - 1) * q) * p - self.pos_weight * q
        return grad if self.weight is None else grad * self.weight

def plain_loss(x: Tensor, labels: Labels, reduction: str) -> Tensor:
    "The loss, accumulated in float32 (float64 for float64), in differentiable ops."
    loss = labels.loss(x.to(accumulator(x)))
    if reduction == 'none': return loss
    return loss.sum() if reduction == 'sum' else loss.sum() / max(1, x.numel())

def chunked_loss(x: Tensor, labels: Labels, reduction: str) -> Tensor:
    "The same by chunks: nothing of the logits' size is made, but for reduction='none'."
    acc = accumulator(x)
    if reduction == 'none':
        loss = torch.empty_like(x, dtype=acc)
        for at in chunks(x): loss[at] = labels.at(at).loss(x[at].to(acc))
        return loss
    parts = [labels.at(at).loss(x[at].to(acc)).sum() for at in chunks(x)]
    total = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
    return total if reduction == 'sum' else total / max(1, x.numel())

class SigmoidLoss(torch.autograd.Function):
    "The loss with its gradient by hand, taken from the logits in the backward: nothing is kept in between."

    @staticmethod
    def forward(ctx, x, labels, reduction):
        ctx.save_for_backward(x, *labels.tensors())
        ctx.labels, ctx.reduction = labels, reduction
        return chunked_loss(x, labels, reduction)

    @staticmethod
    def backward(ctx, grad):
        x, *_ = ctx.saved_tensors
        if torch.is_grad_enabled() or transforming():
            with torch.enable_grad(): loss = plain_loss(x, ctx.labels, ctx.reduction)
            return torch.autograd.grad(loss, x, grad, create_graph=torch.is_grad_enabled())[0], None, None
        scale = grad / max(1, x.numel()) if ctx.reduction == 'mean' else grad
        out, acc = torch.empty_like(x), accumulator(x)
        for at in chunks(x):
            out[at] = ctx.labels.at(at).grad(x[at].to(acc)).mul_(scale[at] if scale.dim() else scale)
        return out, None, None

def sigmoid_loss(x: Tensor, labels: Labels, reduction: str, plain: bool) -> Tensor:
    "The loss of logits `x`; `plain` where something else than `x` needs a gradient, or torch is tracing."
    if plain: return plain_loss(x, labels, reduction)
    if x.requires_grad and torch.is_grad_enabled(): return SigmoidLoss.apply(x, labels, reduction)
    return chunked_loss(x, labels, reduction)
