"""The softmax loss in torch ops: a formula that torch can differentiate and compile, and a loop that computes it in the cache.

With t = w * q (`targets.py`) and A = sum_k t_k, for each row of logits x:

    loss = -sum_k t_k log softmax(x)_k          d loss / d x = A * softmax(x) - t

The loop goes over chunks of rows. It makes the gradient with the loss, in the one tensor of the logits' size that there is; the
backward only scales it, where it must."""
from __future__ import annotations
import math
from typing import NamedTuple
import torch
import torch.nn.functional as F
from torch import Tensor
from .autograd import accumulator, eager_on_cpu, empty_grad, on_cpu, plain_grads, scaled_grad
from .checks import REDUCTIONS, check_soft_rows
from .chunks import chunks, part
from .targets import Smoothing, SoftmaxTarget, along, of_class

CHUNK_MB = 4  # of logits: what is made of a chunk stays in the cache from one op to the next
FEW = 2**18   # logits of class indices, up to which PyTorch's own loss takes less time than a loop and the Python around it
NARROW = 64   # classes next to each other, up to which torch's softmax takes less time along another axis than along the last one
MANY = 4096   # classes, from where on it matters how their exponentials are added up
FAR = 64.     # from 0 is a logit of a label with which sums over the logits as they are would lose digits
TINY = -64.   # exp(TINY) is nothing beside a sum of 1; exp of much less is a number that processors are 20 times as slow with

# --- what a target makes of rows --------------------------------------------------------------------------------------

class Terms(NamedTuple):
    """t of rows: own * onehot(y) + each * u for class indices, each * u for other targets.

    Tensors have the axes of the logits, or broadcast to them."""
    total: float | Tensor       # A = sum_k t_k, of the classes that are not masked
    own: float | Tensor | None
    each: float | Tensor
    u: float | Tensor           # With the class weights in it
    lost: Tensor | None = None  # Rows whose own target is of a class that is masked

def index_terms(target: SoftmaxTarget, like: Tensor, keep: Tensor | None = None) -> Terms:
    """The terms of class indices; `keep` is False where a class is masked (None: nowhere).

    Where it is None, nothing of the logits' size is made, but for a prior [K,K]."""
    axis, w = target.axis, target.weight
    own, each, u, mass = target.smoothing.shares(like, axis, target.target, keep=keep)
    if w is not None:
        own, w = own * of_class(w, target.target).unsqueeze(axis), along(w, axis, like.dim())
        u = w if u is None else u * w
        mass = (u if keep is None else u * keep).sum(axis, keepdim=True)
    if target.invalid is not None: own = torch.where(target.invalid.unsqueeze(axis), math.nan, own)
    lost = None if keep is None else ~keep.gather(axis, target.target.unsqueeze(axis)) & (own > 0)  # not of nan
    return Terms(own + each * mass, own, each, 1. if u is None else u, lost)

def dense_terms(target: SoftmaxTarget, like: Tensor, keep: Tensor | None = None) -> Terms:
    "The terms of labels shaped like the logits."
    t, axis = target.dense(like, keep), target.axis
    lost = None if keep is None else (~keep & (t > 0)).any(axis, keepdim=True)
    return Terms(t.sum(axis, keepdim=True), None, 1., t, lost)

def terms_of(target: SoftmaxTarget, like: Tensor, keep: Tensor | None = None) -> Terms:
    "The terms of any target."
    return (index_terms if target.is_index else dense_terms)(target, like, keep)

def shared_sum(terms: Terms, x: Tensor, axis: int, scratch: Tensor | None = None) -> Tensor:
    "sum_k each * u_k x_k of each row; `scratch`, if given, is overwritten: new memory takes longer than the product."
    products = x if isinstance(terms.u, float) else torch.mul(x, terms.u, out=scratch)
    shared, each = products.sum(axis, keepdim=True).mul_(terms.each), terms.each
    # Hugging Face masks by the least number: the sum of these is -inf, and 0 times that is nan
    return shared.masked_fill_(each == 0, 0) if isinstance(each, Tensor) else shared

# --- the loop ---------------------------------------------------------------------------------------------------------

def softmax(x: Tensor, axis: int, out: Tensor, torch_softmax=torch.softmax) -> Tensor:
    """`torch.softmax(x, axis, out=out)`, or `torch.log_softmax`, where torch is quick and exact.

    Classes next to each other, as those of channels_last, have to be on the last axis, else torch copies the logits. Where they are not,
    it adds their exponentials up one by one, and loses digits if there are many."""
    if x.stride(axis) == 1 and x.shape[axis] > NARROW: torch_softmax(x.movedim(axis, -1), -1, out=out.movedim(axis, -1))
    elif axis == x.dim() - 1 or x.shape[axis] <= MANY: torch_softmax(x, axis, out=out)
    else:
        torch.sub(x, x.amax(axis, keepdim=True), out=out)
        if torch_softmax is torch.softmax: out.div_(out.exp_().sum(axis, keepdim=True))
        else: out.sub_(out.exp().sum(axis, keepdim=True).log_())
    return out

def quick_losses(x: Tensor, target: SoftmaxTarget, terms: Terms, p: Tensor):
    """The losses of rows of class indices, and their softmax into `p`, in one exp; None where a loss might be inexact.

    With p_y of the label, log(sum_k exp x_k) is x_y - log p_y. A times that, less sum_k t_k x_k, is the loss:
    -A log p_y + (A - own) x_y - sum_k each u_k x_k."""
    axis, y = target.axis, target.target.unsqueeze(target.axis)
    smoothed = not (isinstance(terms.each, float) and terms.each == 0)
    if smoothed:
        x_y = x.gather(axis, y)
        low, high = x_y.aminmax()
        if not (-FAR < low.item() and high.item() < FAR): return None
        rest = x_y.mul_(terms.total - terms.own).sub_(shared_sum(terms, x, axis, scratch=p))
    log_p = softmax(x, axis, p).gather(axis, y).log_()
    if not log_p.amin().item() > TINY: return None  # p_y has lost digits, or is nan
    losses = log_p.mul_(-terms.total)
    if not smoothed: return losses
    losses += rest
    return losses if losses.amax().item() < math.inf else None  # a class is masked

def losses_of(log_p: Tensor, target: SoftmaxTarget, terms: Terms) -> Tensor:
    "The losses of rows where no class is masked; where one is, inf or nan."
    losses = -shared_sum(terms, log_p, target.axis)
    return losses if terms.own is None else losses.sub_(log_p.gather(target.axis, target.target.unsqueeze(target.axis)) * terms.own)

def masked_losses(log_p: Tensor, target: SoftmaxTarget):
    """The losses of rows, their terms, and which classes are masked, without a look at any value. It overwrites `log_p`.

    Masked classes (-inf) get no smoothing and count 0 * -inf = 0, unless the target itself wants them: then the loss is inf. They get no
    gradient. All of a row that is ignored is masked here: whatever is there."""
    masked = log_p == -math.inf
    if target.ignored is not None: masked |= target.ignored.unsqueeze(target.axis)
    terms = terms_of(target, log_p, ~masked)
    losses = losses_of(log_p.masked_fill_(masked, 0), target, terms)
    return losses.masked_fill_(terms.lost, math.inf), terms, masked

def chunk_losses(x: Tensor, target: SoftmaxTarget, grad: Tensor | None, factor) -> Tensor:
    """The losses of rows, with a class axis of size 1. `grad`, if given, gets the gradient of their sum times `factor`.

    `factor` is a number, or one a row, with a class axis of size 1."""
    x = x.to(accumulator(x))
    p = grad if grad is not None and grad.dtype == x.dtype else torch.empty_like(x)
    losses = terms = masked = None
    if on_cpu(x):  # as if no class were masked, and a look at the losses tells; elsewhere the look would have to wait for them
        terms = terms_of(target, x)
        if target.is_index and grad is not None: losses = quick_losses(x, target, terms, p)
    if losses is None:
        log_p, x = softmax(x, target.axis, p, torch.log_softmax), None  # of half precision, that was a copy: its memory is free now
        if terms is not None: losses = losses_of(log_p, target, terms)
        if losses is None or not losses.amax().item() < math.inf: losses, terms, masked = masked_losses(log_p, target)
        if grad is not None and on_cpu(p): p.clamp_(min=TINY)
        if grad is not None: p.exp_()
    if target.ignored is not None: losses.masked_fill_(target.ignored.unsqueeze(target.axis), 0)
    if grad is not None: to_grad_(p, target, terms, masked, factor)
    if grad is not None and p is not grad: grad.copy_(p)
    return losses

def to_grad_(p: Tensor, target: SoftmaxTarget, terms: Terms, masked: Tensor | None, factor):
    "Turns the softmax `p` into (A * p - t) * factor, and into 0 where classes are `masked` and rows are ignored."
    total, each, u = terms.total * factor, terms.each * factor, terms.u
    if not isinstance(total, Tensor):  # A and each are numbers, the same for all rows: p * A - each * u is one pass
        minus = u * -each if isinstance(u, Tensor) else p.new_full((), -each)
        torch.add(minus, p, alpha=total, out=p)
    elif not isinstance(each, Tensor): p.mul_(total).sub_(u, alpha=each)
    elif isinstance(u, Tensor): p.mul_(total).addcmul_(each, u, value=-1)
    elif on_cpu(p): p.mul_(total).sub_(each * u)
    else: torch.addcmul(each * -u, p, total, out=p)  # one pass; with two values a row, a CPU takes five times as long
    if terms.own is not None:
        y, own = target.target.unsqueeze(target.axis), terms.own * -factor
        p.scatter_add_(target.axis, y, (own if isinstance(own, Tensor) else p.new_full((), own)).expand(y.shape))
    if masked is not None: p.masked_fill_(masked, 0)
    # all is finite here, and a product takes less time than to fill
    elif target.ignored is not None: p.mul_(~target.ignored.unsqueeze(target.axis))

def loss_and_grad(x: Tensor, target: SoftmaxTarget, reduction: str, scale, grad: Tensor | None = None, factor=1.) -> Tensor:
    """The loss, where `scale` is 1 over what a mean is over, else 1; made in half a dozen passes over each chunk.

    `grad`, if given, gets its gradient times `factor` (a number, or one a row, with a class axis of size 1)."""
    axis, factor = target.axis, factor * scale
    losses = x.new_empty(x.shape[:axis] + (1,) + x.shape[axis+1:], dtype=accumulator(x))
    for chunk in chunks(x, axis, CHUNK_MB) if x.numel() else ():
        rows = chunk_losses(part(x, chunk), target.chunk(chunk), part(grad, chunk), part(factor, chunk))
        if chunk is ...: losses = rows
        else: losses[chunk] = rows
    return losses.squeeze(axis) if reduction == 'none' else losses.sum() * scale

class SoftmaxLoss(torch.autograd.Function):
    """The loss with its gradient by hand, which the forward makes and the first backward hands over.

    A later backward (retain_graph) makes it anew; so does the first one where the forward left it none (`empty_grad`)."""

    @staticmethod
    def forward(ctx, x, target, reduction, scale):
        ctx.save_for_backward(x, *target.tensors())
        ctx.grad = grad = empty_grad(x)
        ctx.rest = target, reduction, scale
        return loss_and_grad(x, target, reduction, scale, grad)

    @staticmethod
    def backward(ctx, grad_output):
        x, *_ = ctx.saved_tensors
        target, reduction, scale = ctx.rest
        grad, ctx.grad = ctx.grad, None
        plain = plain_grads([x], grad_output, plain_loss, target, reduction)
        if plain is not None: return *plain, None, None, None
        if grad_output.dim():
            if target.ignored is not None: grad_output = grad_output.masked_fill(target.ignored, 0)  # 0 times inf would be nan
            grad_output = grad_output.unsqueeze(target.axis)
        make = lambda factor, out: loss_and_grad(x, target, 'sum', scale, out, factor)
        return scaled_grad(x, grad, grad_output, make), None, None, None

def plain_loss(x: Tensor, target: SoftmaxTarget, reduction: str) -> Tensor:
    "The loss, accumulated in float32 (float64 for float64), in ops that torch can differentiate and compile."
    x, ignored = x.to(accumulator(x)), target.ignored
    if ignored is not None: x = x.masked_fill(ignored.unsqueeze(target.axis), 0)  # whatever is there, it gets no gradient
    z = x - x.detach().amax(target.axis, keepdim=True)
    masked = z == -math.inf
    terms, lse = dense_terms(target, z, ~masked), z.exp().sum(target.axis, keepdim=True).log()
    losses = terms.total * lse - (terms.u * z.masked_fill(masked, 0)).sum(target.axis, keepdim=True)
    # inf is added, not filled in: the gradient of the other classes goes through the sum
    losses = (losses + torch.zeros_like(losses).masked_fill(terms.lost, math.inf)).squeeze(target.axis)
    if ignored is not None: losses = losses.masked_fill(ignored, 0)
    return losses if reduction == 'none' else losses.sum() if reduction == 'sum' else losses.sum() / target.denominator(x)

def softmax_loss(x: Tensor, target: SoftmaxTarget, reduction: str, plain: bool) -> Tensor:
    "The loss of logits `x`; `plain` where something else than `x` needs a gradient, or torch is tracing."
    if plain: return plain_loss(x, target, reduction)
    scale = target.scale(x, reduction)
    if x.requires_grad and torch.is_grad_enabled(): return SoftmaxLoss.apply(x, target, reduction, scale)
    return loss_and_grad(x, target, reduction, scale)

def pytorch_loss(x, y, smoothing: Smoothing, weight, ignore_index, reduction, axis):
    """PyTorch's own loss, where the Python around a loop would take longer than the loop. None for what it lacks, where it raises (then
    the checks say why), or where it is not finite, since classes are masked or no row is left."""
    eps, prior, spread, multi_hot = smoothing
    if type(eps) is not float or not 0 <= eps <= 1 or prior is not None or multi_hot or spread != 'all': return None
    if not eager_on_cpu(x, y) or type(ignore_index) is not int or type(axis) is not int: return None
    if type(reduction) is not str or reduction not in REDUCTIONS: return None
    if not (axis == 1 or axis == -1 and x.dim() == 2): return None
    if weight is not None and not (type(weight) is Tensor and weight.dtype == x.dtype): return None
    # a loop gains from making loss and gradient of class indices at once; for others it is as quick as PyTorch, and saves memory
    at_once = x.requires_grad and y.dtype == torch.int64 and torch.is_grad_enabled()
    if x.numel() > (FEW if at_once else CHUNK_MB << 18): return None
    try:
        if y.dtype == torch.int64:
            low, high = y.aminmax()
            if low.item() <= ignore_index <= high.item() and not math.isfinite(x.sum().item()): return None  # junk in a row that is ignored
        elif y.dtype == x.dtype: check_soft_rows(y, axis)
        else: return None
        loss = F.cross_entropy(x, y, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=eps)
    except (RuntimeError, IndexError, TypeError, ValueError): return None
    return loss if math.isfinite((loss.sum() if reduction == 'none' else loss).item()) else None
