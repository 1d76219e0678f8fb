"""The sigmoid head as one Triton kernel: reads a logit and its label, as they are, and writes the gradient.

The formula is that of `sigmoid.py`; here with e = exp(-|x|), which cannot overflow: sigmoid(x) is 1 / (1 + e) or e / (1 + e),
and softplus(-|x|) = log1p(e) = log(1 + e), plus what 1 + e lost by rounding."""
from __future__ import annotations
from dataclasses import replace
from functools import lru_cache
import torch
import triton
import triton.language as tl
from torch import Tensor
from . import fused
from .backward import plain_grad
from .formula import accumulator
from .fused import left, offsets, sum_up
from .sigmoid import Labels, plain_loss

BLOCK, WARPS = 4096, 8
STRIDES = 'XS', 'YS', 'US', 'WS', 'CS', 'GS', 'OS'  # of logits, labels, prior, weight, pos_weight, the gradient, and what it is multiplied by

@triton.jit
def logits_of(i, there, x, y, prior, weight, pos_weight, eps_at, loss, grad, grad_output, scale, eps, SIZES: tl.constexpr,
              XS: tl.constexpr, YS: tl.constexpr, US: tl.constexpr, WS: tl.constexpr, CS: tl.constexpr, GS: tl.constexpr, OS: tl.constexpr,
              EACH: tl.constexpr, ACC: tl.constexpr):
    "The losses of the logits number `i` (all, or those that are `there`), and into `grad` their gradient."
    z = tl.load(x + offsets(i, SIZES, XS), mask=there).to(ACC)
    label = tl.load(y + offsets(i, SIZES, YS), mask=there).to(ACC)
    smoothing = tl.full((), eps, ACC)
    if eps_at is not None: smoothing += tl.load(eps_at)
    if prior is None: q = (1 - 2 * smoothing) * label + smoothing
    else: q = (1 - 2 * smoothing) * label + 2 * smoothing * tl.load(prior + offsets(i, SIZES, US), mask=there)
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    positive, factor = q, None
    if pos_weight is not None:
        c = tl.load(pos_weight + offsets(i, SIZES, CS), mask=there)
        positive, factor = c * q, 1 + (c - 1) * q
    if weight is not None: w = tl.load(weight + offsets(i, SIZES, WS), mask=there)
    if grad is not None:
        g = tl.where(z >= 0, 1., e) / u
        if factor is not None: g = factor * g
        g -= positive
        if weight is not None: g *= w
        g *= tl.full((), scale, ACC)
        if grad_output is not None:
            if EACH: g *= tl.load(grad_output + offsets(i, SIZES, OS), mask=there).to(ACC)
            else: g *= tl.load(grad_output).to(ACC)
        tl.store(grad + offsets(i, SIZES, GS), g.to(grad.dtype.element_ty), mask=there)
    values = tl.log(u) + (e - (u - 1)) / u
    if factor is not None: values *= factor
    values += z * (tl.where(z > 0, 1 - q, -positive))
    if weight is not None: values *= w
    if loss is not None and EACH: tl.store(loss + offsets(i, SIZES, GS), values, mask=there)
    return values

@triton.jit(do_not_specialize=['scale', 'eps', 'tiles', 'tail'])
def sigmoid_kernel(x, y, prior, weight, pos_weight, eps_at, loss, grad, grad_output, sums, ticket, scale: tl.float64, eps: tl.float64, tiles, tail,
                   SIZES: tl.constexpr, XS: tl.constexpr, YS: tl.constexpr, US: tl.constexpr, WS: tl.constexpr, CS: tl.constexpr, GS: tl.constexpr, OS: tl.constexpr,
                   EACH: tl.constexpr, MADE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Loss, gradient or both: what there is a pointer for. `eps_at` is added to `eps`. There are so many whole `tiles`, which need no mask, and
    a `tail`. MADE: the gradient is there, for a `grad_output` of 1."""
    if MADE: tiles, tail = left(tiles, grad_output), left(tail, grad_output)
    pid, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros([BLOCK], ACC)
    for tile in range(pid, tiles, programs):
        i = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total += logits_of(i, None, x, y, prior, weight, pos_weight, eps_at, loss, grad, grad_output, scale, eps, SIZES,
                           XS, YS, US, WS, CS, GS, OS, EACH, ACC)
    if (tail > 0) & (pid == programs - 1):
        there = tl.arange(0, BLOCK) < tail
        i = tl.cast(tiles, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = logits_of(i, there, x, y, prior, weight, pos_weight, eps_at, loss, grad, grad_output, scale, eps, SIZES,
                           XS, YS, US, WS, CS, GS, OS, EACH, ACC)
        total += tl.where(there, values, 0.)
    if loss is not None and not EACH:
        sum_loss = tl.sum(total, 0)
        sum_loss, _, _, last = sum_up(sums, ticket, sum_loss, sum_loss, sum_loss)
        if last: tl.store(loss, sum_loss * tl.full((), scale, ACC))

# --- launches ---------------------------------------------------------------------------------------------------------

def walk_of(x: Tensor, labels: Labels, like: Tensor, grad_output: Tensor | None = None):
    "How to go over the logits and, in this order, labels, prior, weight, pos_weight, what is `like` the gradient, and its factors."
    there = lambda v: v if v is not None else x
    tensors = x, labels.target, there(labels.prior), there(labels.weight), there(labels.pos_weight), like, there(grad_output)
    return walk(tuple(x.shape), *(v.stride() for v in tensors))

walk = lru_cache(1024)(fused.walk)  # a training sees the same ones again and again

def takes(x: Tensor, labels: Labels) -> bool:
    "Can the kernel do it? There are layouts of too many axes."
    if torch.compiler.is_compiling(): return x.dtype in fused.FLOATS and x.dim() <= 3
    return x.dtype in fused.FLOATS and walk_of(x, labels, torch.empty_like(x, device='meta')) is not None

def launch(x: Tensor, labels: Labels, scale: float, loss: Tensor | None, grad: Tensor | None, grad_output: Tensor | None = None,
           ticket: Tensor | None = None, made: bool = False):
    each = loss.dim() > 0 if loss is not None else grad_output is not None and grad_output.dim() > 0
    like = grad if grad is not None else loss if each and loss is not None else x
    walk = walk_of(x, labels, like, grad_output if each else None)
    if walk is None:  # factors that lie across the logits
        grad_output = torch.empty_like(x, dtype=grad_output.dtype).copy_(grad_output)
        walk = walk_of(x, labels, like, grad_output)
    tiles, tail = divmod(x.numel(), BLOCK)
    n, summed = fused.programs(tiles + (tail > 0)), loss is not None and not each
    sums = loss.new_empty(3 * n) if summed else None
    eps_at, eps = (labels.eps, 0.) if isinstance(labels.eps, Tensor) else (None, labels.eps)
    with fused.on(x):
        if summed and ticket is None: ticket = fused.ticket(x.device)
        sigmoid_kernel[(n,)](x, *(labels.target, labels.prior, labels.weight, labels.pos_weight), eps_at, loss, grad, grad_output, sums, ticket,
                             scale, eps, tiles, tail, SIZES=walk.sizes, EACH=each, MADE=made, **dict(zip(STRIDES, walk.strides)),
                             BLOCK=BLOCK, ACC=fused.TYPES[accumulator(x)], num_warps=WARPS)

def forward(x: Tensor, labels: Labels, reduction: str, grad: Tensor | None = None, ticket: Tensor | None = None) -> Tensor:
    "The loss; `grad`, if given, gets its gradient."
    acc = accumulator(x)
    loss = torch.empty_like(x, dtype=acc) if reduction == 'none' and x.dim() else torch.empty((), dtype=acc, device=x.device)
    launch(x, labels, scale_of(x, reduction), loss, grad, ticket=ticket)
    return loss

def backward(grad_output: Tensor, x: Tensor, labels: Labels, reduction: str, made: Tensor | None = None) -> Tensor:
    "The gradient times `grad_output`, rounded once. `made`, if given, is that for a `grad_output` of 1, and kept where it is 1."
    grad = torch.empty_like(x) if made is None else made
    launch(x, labels, scale_of(x, reduction), None, grad, grad_output.resolve_neg(), made=made is not None)
    return grad

def scale_of(x, reduction): return 1 / x.numel() if reduction == 'mean' else 1.

class FusedSigmoidLoss(torch.autograd.Function):
    "The loss with its gradient by the kernel: both at once, but in float16, and where each logit's loss is asked for."

    @staticmethod
    def forward(ctx, x, labels, reduction):
        ctx.grad = grad = torch.empty_like(x) if x.dtype != torch.float16 and reduction != 'none' else None
        ctx.save_for_backward(x, *labels.tensors())
        ctx.rest = labels, reduction, x.stride()
        return forward(x, labels, reduction, grad)

    @staticmethod
    def backward(ctx, grad_output):
        x, *_ = ctx.saved_tensors
        labels, reduction, strides = ctx.rest
        made, ctx.grad = ctx.grad, None
        if x.stride() != strides: made = None  # a hook has laid it out anew
        plain = plain_grad(x, grad_output, plain_loss, labels, reduction)
        return backward(grad_output, x, labels, reduction, made) if plain is None else plain, None, None

def sigmoid_loss(x: Tensor, labels: Labels, reduction: str) -> Tensor:
    "The loss of logits `x`, for labels that the kernel `takes`."
    if torch.compiler.is_compiling(): return sigmoid_forward(x, *flat(labels, x), reduction)
    x, labels = x.resolve_neg(), replace(labels, target=labels.target.resolve_neg()) if labels.target.is_neg() else labels
    if not x.numel(): return x.to(accumulator(x)).clone() if reduction == 'none' else x.sum().to(accumulator(x))
    if x.requires_grad and torch.is_grad_enabled(): return FusedSigmoidLoss.apply(x, labels, reduction)
    return forward(x, labels, reduction)

# --- the same as custom ops, which torch.compile takes as they are ----------------------------------------------------

def flat(labels: Labels, x: Tensor):
    "Labels as arguments of an op. eps is a tensor: as a number it would be compiled in, once for each."
    return labels.target, labels.prior, labels.weight, labels.pos_weight, torch.ones((), dtype=accumulator(x), device=x.device) * labels.eps

def labels_of(target, prior, weight, pos_weight, eps): return Labels(target, eps, prior, weight, pos_weight)

@torch.library.custom_op('fastai_smooth::sigmoid_forward', mutates_args=())
def sigmoid_forward(x: Tensor, target: Tensor, prior: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None, eps: Tensor, reduction: str) -> Tensor:
    "What `forward` gives."
    if not x.numel(): return _sigmoid_forward_fake(x, target, prior, weight, pos_weight, eps, reduction)
    return forward(x, labels_of(target, prior, weight, pos_weight, eps), reduction, ticket=fused.new_ticket(x.device))

@sigmoid_forward.register_fake
def _sigmoid_forward_fake(x, target, prior, weight, pos_weight, eps, reduction):
    return torch.zeros_like(x, dtype=accumulator(x)) if reduction == 'none' else x.new_zeros((), dtype=accumulator(x))

@torch.library.custom_op('fastai_smooth::sigmoid_backward', mutates_args=())
def sigmoid_backward(grad_output: Tensor, x: Tensor, target: Tensor, prior: Tensor | None, weight: Tensor | None, pos_weight: Tensor | None, eps: Tensor,
                     reduction: str) -> Tensor:
    "What `backward` gives."
    return backward(grad_output, x, labels_of(target, prior, weight, pos_weight, eps), reduction) if x.numel() else torch.empty_like(x)

@sigmoid_backward.register_fake
def _(grad_output, x, *rest): return torch.empty_like(x)

def _keep(ctx, inputs, output):
    *tensors, ctx.reduction = inputs
    ctx.save_for_backward(*tensors)

def _backward(ctx, grad_output): return sigmoid_backward(grad_output, *ctx.saved_tensors, ctx.reduction), *[None] * 6

sigmoid_forward.register_autograd(_backward, setup_context=_keep)
