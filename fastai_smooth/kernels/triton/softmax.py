"The softmax head on Triton: which kernels are launched, for which tiles; and the loss as an autograd Function and as custom ops."
from __future__ import annotations
import math
from functools import lru_cache, partial
from typing import NamedTuple
import torch
from torch import Tensor
from . import launch
from .softmax_kernels import denominator_kernel, gradient_kernel, softmax_kernel
from ..autograd import accumulator, transforming
from ..checks import check_indices, resolve_indices
from ..softmax import plain_loss
from ..targets import Smoothing, SoftmaxTarget

class Tile(NamedTuple):
    "What a program does at once."
    rows: int
    block: int  # classes: all of a row, if there are not more. Where there are, the first block stays, the others are read again
    warps: int
    ctas: int = 1

# (number of classes up to which, tile); the last is for all larger ones
TILES = {
    'classes next to each other': [
        (16, Tile(128, 16, 4)), (32, Tile(64, 32, 4)), (64, Tile(32, 64, 4)), (128, Tile(16, 128, 4)), (256, Tile(8, 256, 4)),
        (512, Tile(4, 512, 4)), (1024, Tile(2, 1024, 4)), (2048, Tile(1, 2048, 4)), (4096, Tile(1, 4096, 8)),
        (8192, Tile(1, 8192, 16)), (16384, Tile(1, 16384, 32)), (None, Tile(1, 8192, 32))],
    'rows next to each other': [  # images, (N, C, H, W)
        (16, Tile(128, 16, 4)), (32, Tile(64, 32, 4)), (64, Tile(64, 64, 8)), (128, Tile(32, 128, 8)), (256, Tile(32, 256, 16)),
        (None, Tile(32, 128, 8))],
}

def tile_for(num_classes: int, class_stride: int) -> Tile:
    table = TILES['classes next to each other' if class_stride == 1 or num_classes == 1 else 'rows next to each other']
    return next(tile for most, tile in table if most is None or num_classes <= most)

def spans_blocks(x: Tensor, axis: int) -> bool:
    "Are rows longer than a block? Then `gradient_kernel` makes the gradient, by what the forward keeps of each row."
    return x.shape[axis] > tile_for(x.shape[axis], x.stride(axis)).block

@lru_cache(1024)  # a training sees the same ones again and again
def make_plan(shape, axis, dtype, multi_hot, others, tile, x, y, grad):
    """How the kernels index the rows, and what they are compiled for; None where they cannot.

    `x`, `y` (None for class indices) and `grad` are the strides of logits, labels and gradient."""
    drop = lambda v: v[:axis] + v[axis+1:]
    axes = launch.coalesce(drop(shape), *(drop(v) for v in (x, grad, y or x)))
    if axes is None: return None
    XS, GS, YS = ((*strides, v[axis]) for strides, v in zip(axes.strides, (x, grad, y or x)))
    return axes, dict(C=shape[axis], SIZES=axes.sizes, XS=XS, YS=YS if y else (0, 0, 0, 0), GS=GS, INDEX=y is None, MULTI_HOT=multi_hot,
                      OTHERS=others, ROWS=tile.rows, BLOCK=tile.block, ACC=launch.TYPES[dtype], num_warps=tile.warps, num_ctas=tile.ctas)

def plan(x: Tensor, target: SoftmaxTarget, grad: Tensor | None = None):
    "`make_plan` for these tensors. The gradient is laid out as the logits are, if there is none yet."
    s, axis, strides = target.smoothing, target.axis, x.stride()
    return make_plan(tuple(x.shape), axis, accumulator(x), s.multi_hot, s.spread == 'others', tile_for(x.shape[axis], strides[axis]),
                     strides, None if target.is_index else target.target.stride(), strides if grad is None else grad.stride())

def supports(x: Tensor, target: SoftmaxTarget) -> bool:
    "Can the kernels compute this loss? A prior for each class would be another pass over a matrix; and there are layouts of too many axes."
    prior = target.smoothing.prior
    if x.dtype not in launch.FLOATS or prior is not None and prior.dim() == 2: return False
    return x.dim() <= 4 or not torch.compiler.is_compiling() and plan(x, target, torch.empty_like(x, device='meta')) is not None

def kernel_args(x: Tensor, target: SoftmaxTarget, reduction: str, axes: launch.Axes, options: dict) -> dict:
    "The arguments of `softmax_kernel` for a target."
    packed = lambda v: None if v is None else v.contiguous()
    y, eps = axes.permute(target.target).contiguous() if target.is_index else target.target, target.smoothing.eps
    if target.is_index and options['C'] == 1: y = y.long()  # Triton 3.6 fails to compile others
    by_tensor = isinstance(eps, Tensor)
    return dict(options, x=x, target=y, weight=packed(target.weight), prior=packed(target.smoothing.prior),
                eps=packed(eps) if by_tensor else None, eps_number=0. if by_tensor else eps, EPS_PER_CLASS=by_tensor and eps.dim() > 0,
                outer=axes.outer, tiles=-(-x.numel() // options['C'] // options['ROWS']), ignore_index=target.ignore_index,
                scale=options['C'] / x.numel() if reduction == 'mean' and not target.is_index else 1., REDUCED=reduction != 'none')

def forward(x: Tensor, target: SoftmaxTarget, reduction: str, grad: Tensor | None = None, keep_stats=False, ticket: Tensor | None = None):
    """The loss; what it is a mean over, where only the device knows, else None; with `keep_stats` what `gradient_kernel` needs, else None.

    `grad`, if given, gets the gradient."""
    if x.is_cpu and target.is_index: check_indices(target.target.long(), x.shape[target.axis], target.target.long() == target.ignore_index)
    axes, options = plan(x, target, grad)
    args, reduced, rows = kernel_args(x, target, reduction, axes, options), reduction != 'none', x.numel() // options['C']
    new = lambda *shape: torch.empty(shape, dtype=accumulator(x), device=x.device)
    denominator = new() if reduction == 'mean' and target.is_index else None
    loss, row_stats, n = new() if reduced else new(rows), new(4, rows) if keep_stats else None, launch.grid_size(args['tiles'])
    with torch.cuda.device_of(x):
        if reduced and ticket is None: ticket = launch.stream_ticket(x.device)
        if denominator is not None and grad is not None:
            tiles = -(-rows // 4096)
            shared = {name: args[name] for name in ('target', 'weight', 'ignore_index', 'C', 'ACC')}
            denominator_kernel[(launch.grid_size(tiles),)](**shared, denominator=denominator, partials=new(3 * launch.grid_size(tiles)),
                                                           ticket=ticket, n=rows, tiles=tiles, BLOCK=4096, num_warps=8)
        softmax_kernel[(n,)](**args, loss=loss, grad=grad, grad_output=None, denominator=denominator, row_stats=row_stats,
                             partials=new(3 * n) if reduced else None, ticket=ticket,
                             SUM_WEIGHTS=denominator is not None and grad is None, GRAD_READY=False)
    return loss if reduced else axes.restore(loss, x.shape[:target.axis] + x.shape[target.axis+1:]), denominator, row_stats

def backward(grad_output: Tensor, x: Tensor, target: SoftmaxTarget, reduction: str, denominator: Tensor | None,
             row_stats: Tensor | None = None, grad: Tensor | None = None) -> Tensor:
    "The gradient times `grad_output`, rounded once. `grad`, if given, is that for a `grad_output` of 1, and stays as it is where it is 1."
    out = torch.empty_like(x) if grad is None else grad
    axes, options = plan(x, target, out)
    if reduction == 'none': grad_output = axes.permute(grad_output).contiguous()
    args = dict(kernel_args(x, target, reduction, axes, options), grad=out, grad_output=grad_output.resolve_neg(), denominator=denominator,
                row_stats=row_stats, GRAD_READY=grad is not None)
    if row_stats is None: kernel, args = softmax_kernel, dict(args, loss=None, partials=None, ticket=None, SUM_WEIGHTS=False)
    else:
        kernel, args['tiles'] = gradient_kernel, args['tiles'] * -(-options['C'] // options['BLOCK'])
        for name in ('eps', 'eps_number', 'EPS_PER_CLASS', 'MULTI_HOT', 'OTHERS'): del args[name]  # row_stats has what they say
    with torch.cuda.device_of(x): kernel[(launch.grid_size(args['tiles']),)](**args)
    return out

def softmax_loss(x: Tensor, target: SoftmaxTarget, reduction: str) -> Tensor:
    """The loss of logits `x`, for a target that the kernels support.

    Many logits get their gradient with it, but not in float16, whose losses are mostly scaled."""
    keep_stats = spans_blocks(x, target.axis)
    if torch.compiler.is_compiling(): return softmax_forward(x, *op_args(x, target), reduction, keep_stats)[0]
    plain = lambda x, target, reduction: plain_loss(x, resolve_indices(target, x, transforming()), reduction)
    grad_early = x.dtype != torch.float16 and x.nbytes >= launch.EARLY_MB << 20
    return launch.fused_loss(x, target, reduction, launch.Head(partial(forward, keep_stats=keep_stats), backward, plain, grad_early))

# --- the same as custom ops, which torch.compile takes as they are ----------------------------------------------------

def op_args(x: Tensor, target: SoftmaxTarget):
    "A target as arguments of an op. eps is a tensor: as a number it would be compiled in."
    s = target.smoothing
    eps = s.eps if isinstance(s.eps, Tensor) else torch.ones((), dtype=accumulator(x), device=x.device) * s.eps
    return target.target, target.weight, s.prior, eps, target.is_index, s.multi_hot, s.spread, target.axis, target.ignore_index

def from_op_args(target, weight, prior, eps, is_index, multi_hot, spread, axis, ignore_index) -> SoftmaxTarget:
    return SoftmaxTarget(target, is_index, Smoothing(eps, prior, spread, multi_hot), axis, weight, ignore_index)

@torch.library.custom_op('fastai_smooth::softmax_forward', mutates_args=())
def softmax_forward(x: Tensor, target: Tensor, weight: Tensor | None, prior: Tensor | None, eps: Tensor,
                    is_index: bool, multi_hot: bool, spread: str, axis: int, ignore_index: int, reduction: str,
                    keep_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` gives, with empty tensors for None. `keep_stats` is an argument, so that the shapes follow from the arguments
    alone: a graph that inductor has on its disk may have been made with another table of tiles."""
    args = target, weight, prior, eps, is_index, multi_hot, spread, axis, ignore_index
    if not x.numel(): return _softmax_forward_fake(x, *args, reduction, keep_stats)
    loss, *rest = forward(x, from_op_args(*args), reduction, keep_stats=keep_stats, ticket=launch.new_ticket(x.device))
    return loss.contiguous(), *(loss.new_empty(0) if v is None else v for v in rest)

@softmax_forward.register_fake
def _softmax_forward_fake(x, target, weight, prior, eps, is_index, multi_hot, spread, axis, ignore_index, reduction, keep_stats):
    new = lambda *shape: x.new_zeros(shape, dtype=accumulator(x))
    rows = x.shape[:axis] + x.shape[axis+1:]
    denominator = new() if reduction == 'mean' and is_index and x.numel() else new(0)
    return new(*rows) if reduction == 'none' else new(), denominator, new(4, math.prod(rows)) if keep_stats else new(0)

@torch.library.custom_op('fastai_smooth::softmax_backward', mutates_args=())
def softmax_backward(grad_output: Tensor, denominator: Tensor, row_stats: Tensor, x: Tensor, target: Tensor, weight: Tensor | None,
                     prior: Tensor | None, eps: Tensor, is_index: bool, multi_hot: bool, spread: str, axis: int, ignore_index: int,
                     reduction: str) -> Tensor:
    "What `backward` gives."
    if not x.numel(): return torch.empty_like(x)
    target = from_op_args(target, weight, prior, eps, is_index, multi_hot, spread, axis, ignore_index)
    denominator, row_stats = (v if v.numel() else None for v in (denominator, row_stats))
    return backward(grad_output, x, target, reduction, denominator, row_stats)

@softmax_backward.register_fake
def _(grad_output, denominator, row_stats, x, *rest): return torch.empty_like(x)

def _setup_context(ctx, inputs, output):
    x, target, weight, prior, eps, *ctx.rest, _ = inputs
    ctx.save_for_backward(*output[1:], x, target, weight, prior, eps)
    ctx.mark_non_differentiable(*output[1:])

def _backward(ctx, grad_output, *_): return softmax_backward(grad_output, *ctx.saved_tensors, *ctx.rest), *[None] * 11

softmax_forward.register_autograd(_backward, setup_context=_setup_context)
