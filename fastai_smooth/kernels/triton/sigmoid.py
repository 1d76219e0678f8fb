"""The sigmoid loss as one Triton kernel, which reads each logit and its label as they are, and writes loss and gradient.

The formula is that of `kernels/sigmoid.py`. For each logit x, with q = e0 + (1 - e0 - e1) * y and l = 1 + (pos_weight - 1) * q:

    loss = weight * ((1 - q) * x + l * softplus(-x))       gradient = weight * (l * sigmoid(x) - pos_weight * q)

It is computed with e = exp(-|x|), which cannot overflow: softplus(-x) is log(1 + e) for positive x, else log(1 + e) - x, and
sigmoid(x) is 1 / (1 + e) for positive x, else e / (1 + e)."""
from __future__ import annotations
from functools import lru_cache
from typing import NamedTuple
import torch
import triton
import triton.language as tl
from torch import Tensor
from . import launch
from .launch import Sums, add_partials, divide, exp, offsets, store_sums, unless_one
from ..autograd import accumulator
from ..sigmoid import plain_loss
from ..targets import SigmoidTarget, smooth_labels

BLOCK, WARPS, PROGRAMS = 1024, 4, 16

q_of = launch.in_kernels(smooth_labels)

class Tensors(NamedTuple):
    "What the kernel reads and writes: pointers, None where there is none; and under the same names the strides of each."
    x: Tensor
    target: Tensor
    e0: Tensor | None                  # None where it is a number
    e1: Tensor | None
    weight: Tensor | None
    pos_weight: Tensor | None
    loss: Tensor | None = None         # a scalar, or with reduction='none' like x
    grad: Tensor | None = None
    grad_output: Tensor | None = None  # of the shape of the loss

@triton.jit
def load(pointer, i, mask, SIZES: tl.constexpr, STRIDES: tl.constexpr, ACC: tl.constexpr):
    "The elements number `i`, or the one number that is all of them."
    if STRIDES == (0, 0, 0): return tl.load(pointer).to(ACC)
    else: return tl.load(pointer + offsets(i, SIZES, STRIDES), mask=mask).to(ACC)

@triton.jit
def inverse_and_log1p(e):
    """1 / (1 + e) and log(1 + e) for e in [0, 1].

    `tl.log` of float32 is off by up to 2e-7, which is more than some losses. With z = e / (2 + e) it is log((1 + z) / (1 - z)), whose
    series in z, of at most 1/3, has all digits. One division does for both."""
    one_e, two_e = 1 + e, 2 + e
    if e.dtype == tl.float64: return 1 / one_e, tl.log(one_e) + (e - (one_e - 1)) / one_e  # with what the sum has lost by rounding
    else:
        both = divide(1., one_e * two_e)
        z = e * one_e * both
        s = z * z
        series = 1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13))))))
        return two_e * both, 2 * z * series

@triton.jit
def sigmoid_tile(i, mask, ptr, e0, e1, scale, SIZES: tl.constexpr, STRIDES: tl.constexpr, REDUCED: tl.constexpr, ACC: tl.constexpr):
    "The losses of logits number `i` where `mask` is true (None: all). Their gradient is stored, and the losses unless they are REDUCED."
    x = load(ptr.x, i, mask, SIZES, tl.constexpr(STRIDES.x), ACC)
    y = load(ptr.target, i, mask, SIZES, tl.constexpr(STRIDES.target), ACC)
    if ptr.e0 is not None: e0 = load(ptr.e0, i, mask, SIZES, tl.constexpr(STRIDES.e0), ACC)
    if ptr.e1 is not None: e1 = load(ptr.e1, i, mask, SIZES, tl.constexpr(STRIDES.e1), ACC)
    q = q_of(y, e0, e1)
    e = exp(-tl.abs(x))
    inverse, log1p_e = inverse_and_log1p(e)
    pos_weight_q = q
    if ptr.pos_weight is not None:
        pos_weight = load(ptr.pos_weight, i, mask, SIZES, tl.constexpr(STRIDES.pos_weight), ACC)
        pos_weight_q = pos_weight * q
        l = 1 + (pos_weight - 1) * q
    if ptr.weight is not None: weight = load(ptr.weight, i, mask, SIZES, tl.constexpr(STRIDES.weight), ACC)
    if ptr.grad is not None:
        grad = tl.where(x >= 0, 1., e) * inverse  # sigmoid(x)
        if ptr.pos_weight is not None: grad = l * grad
        grad -= pos_weight_q
        if ptr.weight is not None: grad *= weight
        grad *= scale
        if ptr.grad_output is not None: grad *= load(ptr.grad_output, i, mask, SIZES, tl.constexpr(STRIDES.grad_output), ACC)
        tl.store(ptr.grad + offsets(i, SIZES, tl.constexpr(STRIDES.grad)), grad.to(ptr.grad.dtype.element_ty), mask=mask)
    losses = log1p_e
    if ptr.pos_weight is not None: losses *= l
    losses += x * tl.where(x > 0, 1 - q, -pos_weight_q)  # for negative x: (1 - q) * x - l * x = -pos_weight * q * x
    if ptr.weight is not None: losses *= weight
    if ptr.loss is not None and not REDUCED: tl.store(ptr.loss + offsets(i, SIZES, tl.constexpr(STRIDES.loss)), losses, mask=mask)
    return losses

@triton.jit(do_not_specialize=['e0_number', 'e1_number', 'scale', 'tiles', 'tail'])
def sigmoid_kernel(x, target, e0, e1, weight, pos_weight, loss, grad, grad_output, partials, ticket,
                   e0_number: tl.float64, e1_number: tl.float64, scale: tl.float64, tiles, tail, SIZES: tl.constexpr, STRIDES: tl.constexpr,
                   REDUCED: tl.constexpr, GRAD_READY: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Loss, gradient or both: what there is a pointer for. There are so many whole `tiles`, which need no mask, and a `tail` of logits.
    GRAD_READY: `grad` has the gradient for a `grad_output` of 1."""
    if GRAD_READY: tiles, tail = unless_one(tiles, grad_output), unless_one(tail, grad_output)
    ptr = Tensors(x, target, e0, e1, weight, pos_weight, loss, grad, grad_output)
    e0_acc, e1_acc, scale_acc = tl.full((), e0_number, ACC), tl.full((), e1_number, ACC), tl.full((), scale, ACC)
    pid, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros([BLOCK], ACC)
    for tile in range(pid, tiles, programs):
        i = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total += sigmoid_tile(i, None, ptr, e0_acc, e1_acc, scale_acc, SIZES, STRIDES, REDUCED, ACC)
    if (tail > 0) & (pid == programs - 1):
        mask = tl.arange(0, BLOCK) < tail
        i = tl.cast(tiles, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total += tl.where(mask, sigmoid_tile(i, mask, ptr, e0_acc, e1_acc, scale_acc, SIZES, STRIDES, REDUCED, ACC), 0.)
    if loss is not None and REDUCED:
        if store_sums(Sums(loss=tl.sum(total, 0), weight=0., rows=0.), partials, ticket):
            tl.store(loss, add_partials(partials, ticket).loss * scale_acc)

# --- launches ---------------------------------------------------------------------------------------------------------

@lru_cache(1024)  # a training sees the same ones again and again
def coalesce(shape, *strides) -> tuple[tuple, Tensors] | None:
    "The kernel's SIZES and STRIDES, for the strides of each of its tensors; None where there are too many axes."
    axes = launch.coalesce(shape, *strides)
    return None if axes is None else (axes.sizes, Tensors(*axes.strides))

def axes_for(tensors: Tensors) -> tuple[tuple, Tensors] | None:
    "`coalesce` of these tensors. What is one number for all logits, or not there, has strides of 0."
    shape = tuple(tensors.x.shape)
    zeros = (0,) * len(shape)
    return coalesce(shape, *[zeros if v is None or not v.dim() else v.stride() for v in tensors])

def tensors_for(x: Tensor, target: SigmoidTarget, **rest) -> Tensors:
    "The kernel's tensors: `rest` are those of loss, grad and grad_output that there are."
    return Tensors(x, *(v if isinstance(v, Tensor) else None for v in target), **rest)

def supports(x: Tensor, target: SigmoidTarget) -> bool:
    "Can the kernel compute this loss? There are layouts of too many axes."
    if x.dtype not in launch.FLOATS: return False
    if x.dim() <= 3 or torch.compiler.is_compiling(): return x.dim() <= 3
    return axes_for(tensors_for(x, target, grad=torch.empty_like(x, device='meta'))) is not None

def run(tensors: Tensors, target: SigmoidTarget, reduction: str, ticket: Tensor | None = None, grad_ready: bool = False):
    "Launches the kernel. `grad_ready`: the gradient is there for a `grad_output` of 1."
    x, loss, axes, reduced = tensors.x, tensors.loss, axes_for(tensors), reduction != 'none'
    if axes is None:  # grad_output has a layout of its own
        tensors = tensors._replace(grad_output=torch.empty_like(x, dtype=tensors.grad_output.dtype).copy_(tensors.grad_output))
        axes = axes_for(tensors)
    tiles, tail = divmod(x.numel(), BLOCK)
    n, partials = launch.grid_size(tiles + (tail > 0), x.device, PROGRAMS), None
    sizes, strides = axes
    with launch.on_device(x):
        if loss is not None and reduced:
            partials = loss.new_empty(3 * n)
            if ticket is None: ticket = launch.stream_ticket(x.device)
        launch.run(sigmoid_kernel, n, dict(
            tensors._asdict(), partials=partials, ticket=ticket, tiles=tiles, tail=tail, scale=1 / x.numel() if reduction == 'mean' else 1.,
            e0_number=target.e0 if tensors.e0 is None else 0., e1_number=target.e1 if tensors.e1 is None else 0.,
            SIZES=sizes, STRIDES=strides, REDUCED=reduced, GRAD_READY=grad_ready, BLOCK=BLOCK, ACC=launch.TYPES[accumulator(x)]),
            num_warps=WARPS)

def forward(x: Tensor, target: SigmoidTarget, reduction: str, grad: Tensor | None = None, ticket: Tensor | None = None) -> tuple[Tensor]:
    "The loss; `grad`, if given, gets its gradient."
    loss = torch.empty_like(x, dtype=accumulator(x)) if reduction == 'none' else x.new_empty((), dtype=accumulator(x))
    run(tensors_for(x, target, loss=loss, grad=grad), target, reduction, ticket)
    return loss,

def backward(grad_output: Tensor, x: Tensor, target: SigmoidTarget, reduction: str, grad: Tensor | None = None,
             out: Tensor | None = None) -> Tensor:
    "The gradient times `grad_output`, rounded once, in `out`. `grad`, if given, is that for a `grad_output` of 1, and becomes it."
    if grad is not None and x.dtype == accumulator(x) and x.nbytes < launch.EARLY_MB << 20:
        return grad.mul_(grad_output)  # few logits wait for the CPU, which is done with torch's product in a third of the time
    out = grad if grad is not None else torch.empty_like(x) if out is None else out
    run(tensors_for(x, target, grad=out, grad_output=grad_output.resolve_neg()), target, reduction, grad_ready=grad is not None)
    return out

GRAD_LATE = launch.Kernels(forward, backward, plain_loss, grad_early=False)

def sigmoid_loss(x: Tensor, target: SigmoidTarget, reduction: str) -> Tensor:
    """The loss of logits `x`, for a target that the kernel supports.

    They get their gradient with it, but not in float16, whose losses are mostly scaled."""
    if torch.compiler.is_compiling(): return sigmoid_forward(x, *op_args(x, target), reduction)
    return launch.fused_loss(x, target, reduction, GRAD_LATE._replace(grad_early=x.dtype != torch.float16))

# --- the same as custom ops, which torch.compile takes as they are ----------------------------------------------------

def op_args(x: Tensor, target: SigmoidTarget):
    "A target as arguments of an op. e0 and e1 are tensors: as numbers they would be compiled in."
    as_tensor = lambda v: v if isinstance(v, Tensor) else torch.ones((), dtype=accumulator(x), device=x.device) * v
    return target.target, as_tensor(target.e0), as_tensor(target.e1), target.weight, target.pos_weight

@torch.library.custom_op('fastai_smooth::sigmoid_forward', mutates_args=())
def sigmoid_forward(x: Tensor, target: Tensor, e0: Tensor, e1: Tensor, weight: Tensor | None, pos_weight: Tensor | None,
                    reduction: str) -> Tensor:
    "What `forward` gives."
    if not x.numel(): return _sigmoid_forward_fake(x, target, e0, e1, weight, pos_weight, reduction)
    return forward(x, SigmoidTarget(target, e0, e1, weight, pos_weight), reduction, ticket=launch.new_ticket(x.device))[0]

@sigmoid_forward.register_fake
def _sigmoid_forward_fake(x, target, e0, e1, weight, pos_weight, reduction):
    return torch.zeros_like(x, dtype=accumulator(x)) if reduction == 'none' else x.new_zeros((), dtype=accumulator(x))

@torch.library.custom_op('fastai_smooth::sigmoid_backward', mutates_args=())
def sigmoid_backward(grad_output: Tensor, x: Tensor, target: Tensor, e0: Tensor, e1: Tensor, weight: Tensor | None,
                     pos_weight: Tensor | None, reduction: str) -> Tensor:
    "What `backward` gives."
    return backward(grad_output, x, SigmoidTarget(target, e0, e1, weight, pos_weight), reduction) if x.numel() else torch.empty_like(x)

@sigmoid_backward.register_fake
def _(grad_output, x, *rest): return torch.empty_like(x)

def _setup_context(ctx, inputs, output):
    *tensors, ctx.reduction = inputs
    ctx.save_for_backward(*tensors)

def _backward(ctx, grad_output): return sigmoid_backward(grad_output, *ctx.saved_tensors, ctx.reduction), *[None] * 6

sigmoid_forward.register_autograd(_backward, setup_context=_setup_context)
