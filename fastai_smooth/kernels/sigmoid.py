"""The sigmoid loss in torch ops, with a hand-written gradient.

For each logit x, with its smoothed label q = e0 + (1 - e0 - e1) * y and l = 1 + (pos_weight - 1) * q:

    loss = weight * ((1 - q) x + l * softplus(-x))         d loss / d x = weight * (l * sigmoid(x) - pos_weight * q)

which without pos_weight is softplus(x) - q x, with the gradient sigmoid(x) - q."""
from __future__ import annotations
import torch
import torch.nn.functional as F
from torch import Tensor
from .autograd import accumulator, eager_on_cpu, empty_grad, on_cpu, plain_grads, scaled_grad
from .checks import REDUCTIONS
from .chunks import chunks, part
from .targets import SigmoidTarget, smooth_labels

FEW = 2**16             # logits, up to which PyTorch's own loss takes less time than a loop and the Python around it
ENOUGH_SMOOTHING = .01  # of e0 and e1, from where on no loss is so small that it needs log1p, the slowest of all ops

def smoothed_labels(target: SigmoidTarget, dtype: torch.dtype) -> Tensor:
    "q, by the fewest ops."
    y, e0, e1 = target[:3]
    if isinstance(e0, Tensor): return smooth_labels(y.to(dtype), e0, e1)
    if y.dtype == torch.bool: y = y.view(torch.uint8)  # which torch converts eight times as fast
    y = y.to(dtype) if y.is_floating_point() else y
    return torch.add(torch.scalar_tensor(e0, dtype=dtype, device=y.device), y, alpha=1 - (e0 + e1))

def is_quick(x: Tensor, target: SigmoidTarget) -> bool:
    "Is a pass over memory nothing beside a log1p, as on a CPU, and do neither weights nor small losses need one?"
    e0, e1, w, c = target[1:]
    return on_cpu(x) and w is None and c is None and not isinstance(e0, Tensor) and min(e0, e1) >= ENOUGH_SMOOTHING

def quick_losses(x: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """The losses of logits by p = sigmoid(x).

    softplus(x) - q x is (x > 0) * x - log(max(p, 1 - p)) - q x. A p next to 1 has lost up to 6e-8, which is nothing beside the loss of a
    label that is smoothed."""
    larger = 1 - p
    torch.maximum(larger, p, out=larger).log_()
    return p.round().sub_(q).mul_(x).sub_(larger)

def chunk_losses(x: Tensor, target: SigmoidTarget, grad: Tensor | None, factor) -> Tensor:
    "The losses of logits. `grad`, if given, gets the gradient of their sum times `factor` (a number, or one a logit)."
    acc, w, c = accumulator(x), target.weight, target.pos_weight
    x, q = x.to(acc), smoothed_labels(target, acc)
    quick, out = is_quick(x, target), grad if grad is not None and grad.dtype == acc and grad.is_contiguous() else None
    if quick or grad is not None: p = torch.sigmoid(x, out=out)
    losses = quick_losses(x, q, p) if quick else torch.binary_cross_entropy_with_logits(x, q, w, c, 0)
    if grad is None: return losses
    if c is None: p.sub_(q)
    else: p.mul_(torch.lerp(torch.ones((), dtype=acc, device=x.device), c, q)).addcmul_(c, q, value=-1)
    if w is not None: p.mul_(w)
    torch.mul(p, factor, out=grad)
    return losses

def loss_and_grad(x: Tensor, target: SigmoidTarget, reduction: str, scale: float, grad: Tensor | None = None, factor=1.) -> Tensor:
    """The loss, where `scale` is 1 over the number of logits for a mean, else 1; by chunks.

    `grad`, if given, gets its gradient times `factor` (a number, or one a logit)."""
    total, losses = 0., torch.empty_like(x, dtype=accumulator(x)) if reduction == 'none' else None
    for chunk in chunks(x, None, megabytes=1):
        args = part(x, chunk), target.chunk(chunk), part(grad, chunk), part(factor * scale, chunk)
        if losses is None: total = total + chunk_losses(*args).sum()  # kept in no variable, where the next chunk would find them
        else: losses[chunk] = chunk_losses(*args)
    return total * scale if losses is None else losses

class SigmoidLoss(torch.autograd.Function):
    "The loss with its gradient by hand: made in the forward or, as in `SoftmaxLoss` and for its reasons, in the backward."

    @staticmethod
    def forward(ctx, x, target, reduction, scale):
        ctx.save_for_backward(x, *target.tensors())
        ctx.rest = target, reduction, scale
        ctx.grad = grad = empty_grad(x)
        return loss_and_grad(x, target, reduction, scale, grad)

    @staticmethod
    def backward(ctx, grad_output):
        x, *_ = ctx.saved_tensors
        target, reduction, scale = ctx.rest
        grad, ctx.grad = ctx.grad, None
        plain = plain_grads([x], grad_output, plain_loss, target, reduction)
        if plain is not None: return *plain, None, None, None
        make = lambda factor, out: loss_and_grad(x, target, 'sum', scale, out, factor)
        return scaled_grad(x, grad, grad_output, make), None, None, None

def plain_loss(x: Tensor, target: SigmoidTarget, reduction: str) -> Tensor:
    "The loss, accumulated in float32 (float64 for float64), in ops that torch can differentiate and compile."
    x = x.to(accumulator(x))
    q, log_p = smooth_labels(target.target.to(x.dtype), target.e0, target.e1), F.logsigmoid(x)
    if target.pos_weight is not None: log_p = (1 + (target.pos_weight - 1) * q) * log_p
    losses = (1 - q) * x - log_p
    if target.weight is not None: losses = losses * target.weight
    return losses if reduction == 'none' else losses.sum() if reduction == 'sum' else losses.sum() / max(1, x.numel())

def sigmoid_loss(x: Tensor, target: SigmoidTarget, reduction: str, plain: bool) -> Tensor:
    "The loss of logits `x`; `plain` where something else than `x` needs a gradient, or torch is tracing."
    if plain: return plain_loss(x, target, reduction)
    scale = target.scale(x, reduction)
    if x.requires_grad and torch.is_grad_enabled(): return SigmoidLoss.apply(x, target, reduction, scale)
    return loss_and_grad(x, target, reduction, scale)

def pytorch_loss(x, y, eps, prior, weight, pos_weight, reduction):
    "PyTorch's own loss of few logits; None for other options than a pos_weight a label, and where the checks have to say what is wrong."
    if prior is not None or weight is not None: return None
    e0, e1 = eps if type(eps) is tuple and len(eps) == 2 else (eps, eps)
    if not (type(e0) is type(e1) is float and e0 >= 0 and e1 >= 0 and e0 + e1 <= 1): return None
    if type(reduction) is not str or reduction not in REDUCTIONS: return None
    if not eager_on_cpu(x, y) or not 0 < x.numel() <= FEW or y.shape != x.shape or y.is_complex(): return None
    c = pos_weight
    if c is not None and not (type(c) is Tensor and c.shape == x.shape[-1:] and c.dtype == x.dtype and not c.requires_grad): return None
    try:
        q = smoothed_labels(SigmoidTarget(y, e0, e1), x.dtype)
        return F.binary_cross_entropy_with_logits(x, q, pos_weight=c, reduction=reduction)
    except RuntimeError: return None
