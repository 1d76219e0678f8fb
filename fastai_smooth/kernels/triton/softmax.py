"The softmax loss on Triton: which kernels are launched, for which tiles; and the loss as an autograd Function and as custom ops."
from __future__ import annotations
import math
from functools import lru_cache
from typing import NamedTuple
import torch
import triton
from torch import Tensor
from . import launch
from .rows import Spec
from .softmax_kernels import denominator_kernel, gradient_kernel, softmax_kernel
from ..autograd import accumulator, transforming
from ..checks import check_indices, resolve_indices
from .. import softmax as on_torch
from ..targets import Smoothing, SoftmaxTarget

class Tile(NamedTuple):
    "What a program does at once."
    rows: int
    block: int              # classes: all of a row, or some. Then the last ones stay in registers, the others are read twice
    warps: int
    prefetch: bool = False  # Is the next block of a row read while one is summed, if threads read 16 bytes at once?
    programs: int = 16      # the most on a multiprocessor

# (number of classes up to which, tile) for classes next to each other; the last is for all larger ones. Measured: benchmarks/gpu.md
TILES = [(32, Tile(16, 32, 4)), (64, Tile(8, 64, 2)), (128, Tile(4, 128, 1)), (256, Tile(2, 256, 1)), (512, Tile(1, 512, 1)),
         (1024, Tile(1, 1024, 1)), (4096, Tile(1, 1024, 4)), (8192, Tile(1, 2048, 4, True)), (32768, Tile(1, 4096, 8, True)),
         (None, Tile(1, 8192, 16, True, 2))]

def tile_for(num_classes: int, class_stride: int, itemsize: int) -> Tile:
    """Of the table; but where rows lie next to each other, as in images, each thread has as many of them as it reads at once, so that no
    sum is over threads, and 32 logits in all, so that these stay in registers."""
    if class_stride != 1:
        at_once = 16 // itemsize
        return Tile(32 * at_once, min(32 // at_once, triton.next_power_of_2(num_classes)), 1)
    for most, tile in TILES:
        if most is None or num_classes <= most: return tile

def spans_blocks(x: Tensor, axis: int) -> bool:
    "Are rows longer than a block? Then `gradient_kernel` makes the gradient, by what the forward keeps of each row."
    return x.shape[axis] > tile_for(x.shape[axis], x.stride(axis), x.itemsize).block

def lanes_for(strides, itemsize: int, tile: Tile):
    """How many lanes a block of classes has, and how far they are apart: a lane is what one thread has of it, or some of that.

    `strides` are those of the logits, the last of the classes. A thread reads up to 16 bytes at once: of classes, if rows begin at a
    multiple of that, which are a lane then. Else it has every so many-th class; where rows lie next to each other, of as many rows as it
    reads at once."""
    *rows, classes = strides
    at_once = math.gcd(16, *(stride * itemsize for stride in rows)) // itemsize if classes == 1 else 16 // itemsize
    if classes == 1 and at_once * itemsize == 16: return max(1, tile.block // at_once), min(tile.block, at_once)
    return min(tile.block, max(1, 32 * tile.warps * max(1, at_once) // tile.rows)), 1

@lru_cache(1024)  # a training sees the same ones again and again
def make_plan(shape, axis, dtype, itemsize, multi_hot, others, by_class, tile, x, y, grad):
    """How the kernels index the rows, what they are compiled for, and the tile; None where they cannot.

    `x`, `y` (None for class indices) and `grad` are the strides of logits, labels and gradient."""
    drop = lambda v: v[:axis] + v[axis+1:]
    axes = launch.coalesce(drop(shape), *(drop(v) for v in (x, grad, y or x)))
    if axes is None: return None
    classes, block = shape[axis], tile.block
    x, grad, labels = ((*strides, v[axis]) for strides, v in zip(axes.strides, (x, grad, y or x)))
    lanes, lane_stride = lanes_for(x, itemsize, tile)
    spec = Spec(classes=classes, sizes=axes.sizes, x=x, y=labels if y else (0, 0, 0, 0), grad=grad, is_index=y is None,
                multi_hot=multi_hot, others=others, by_class=by_class, rows=tile.rows, block=block, lanes=lanes, lane_stride=lane_stride,
                prefetch=tile.prefetch and classes > block and lane_stride > 1, blocks=-(-classes // block), whole=classes % block == 0,
                acc=launch.TYPES[dtype])
    return axes, spec, tile

def plan(x: Tensor, target: SoftmaxTarget, grad: Tensor | None = None):
    "`make_plan` for these tensors. The gradient is laid out as the logits are, if there is none yet."
    s, axis, strides = target.smoothing, target.axis, x.stride()
    by_class = s.prior is not None and s.prior.dim() == 2
    return make_plan(tuple(x.shape), axis, accumulator(x), x.itemsize, s.multi_hot, s.spread == 'others', by_class,
                     tile_for(x.shape[axis], strides[axis], x.itemsize), strides, None if target.is_index else target.target.stride(),
                     strides if grad is None else grad.stride())

def supports(x: Tensor, target: SoftmaxTarget) -> bool:
    "Can the kernels compute this loss? There are layouts of too many axes."
    if x.dtype not in launch.FLOATS: return False
    return x.dim() <= 4 or not torch.compiler.is_compiling() and plan(x, target, torch.empty_like(x, device='meta')) is not None

def kernel_args(x: Tensor, target: SoftmaxTarget, reduction: str, axes: launch.Axes, spec: Spec) -> dict:
    "The arguments of `softmax_kernel` for a target, but for `x` and what it writes."
    packed = lambda v: None if v is None else v.contiguous()
    y, eps = axes.permute(target.target).contiguous() if target.is_index else target.target, target.smoothing.eps
    if target.is_index and spec.classes == 1: y = y.long()  # Triton 3.6 fails to compile others
    by_tensor = isinstance(eps, Tensor)
    return dict(SPEC=spec, target=y, weight=packed(target.weight), prior=packed(target.smoothing.prior),
                eps=packed(eps) if by_tensor else None, eps_number=0. if by_tensor else eps, EPS_PER_CLASS=by_tensor and eps.dim() > 0,
                outer=axes.outer, tiles=-(-x.numel() // spec.classes // spec.rows), ignore_index=target.ignore_index,
                scale=spec.classes / x.numel() if reduction == 'mean' and not target.is_index else 1., REDUCED=reduction != 'none')

def forward(x: Tensor, target: SoftmaxTarget, reduction: str, grad: Tensor | None = None, keep_stats: bool | None = None,
            ticket: Tensor | None = None):
    """The loss; and for the backward: what it is a mean over, where only the device knows, else None; with `keep_stats` (None: where rows
    are longer than a block) what `gradient_kernel` needs, else None; and the arguments that all kernels share, with axes and tile.

    `grad`, if given, gets the gradient."""
    if launch.INTERPRETED and x.is_cpu and target.is_index:  # looking takes no waiting here
        check_indices(target.target.long(), x.shape[target.axis], target.target.long() == target.ignore_index)
    axes, spec, tile = plan(x, target, grad)
    args, reduced = kernel_args(x, target, reduction, axes, spec), reduction != 'none'
    rows, acc = x.numel() // spec.classes, accumulator(x)
    if keep_stats is None: keep_stats = spec.blocks > 1
    denominator = x.new_empty((), dtype=acc) if reduction == 'mean' and target.is_index else None
    row_stats, n = x.new_empty((4, rows), dtype=acc) if keep_stats else None, launch.grid_size(args['tiles'], x.device, tile.programs)
    loss, partials = x.new_empty(() if reduced else rows, dtype=acc), x.new_empty(3 * n, dtype=acc) if reduced else None
    with launch.on_device(x):
        if reduced and ticket is None: ticket = launch.stream_ticket(x.device)
        if denominator is not None and grad is not None:
            tiles = -(-rows // 4096)
            programs = launch.grid_size(tiles, x.device)
            launch.run(denominator_kernel, programs, dict(args, denominator=denominator, partials=x.new_empty(3 * programs, dtype=acc),
                                                          ticket=ticket, n=rows, tiles=tiles, CLASSES=spec.classes, BLOCK=4096,
                                                          ACC=spec.acc), num_warps=8)
        launch.run(softmax_kernel, n, dict(args, x=x, loss=loss, grad=grad, grad_output=None, denominator=denominator, row_stats=row_stats,
                                           partials=partials, ticket=ticket, SUM_WEIGHTS=denominator is not None and grad is None,
                                           GRAD_READY=False), num_warps=tile.warps)
    if not reduced: loss = axes.restore(loss, x.shape[:target.axis] + x.shape[target.axis+1:])
    return loss, denominator, row_stats, (args, axes, tile)

def backward(grad_output: Tensor, x: Tensor, target: SoftmaxTarget, reduction: str, denominator: Tensor | None,
             row_stats: Tensor | None = None, shared: tuple | None = None, grad: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The gradient times `grad_output`, rounded once, in `out`. `grad`, if given, is that for a `grad_output` of 1, and becomes it.

    `shared` are the arguments that the forward has made, None where they are not at hand."""
    out = grad if grad is not None else torch.empty_like(x) if out is None else out
    if shared is None or grad is None and out.stride() != x.stride():  # the gradient does not lie as the forward took for granted
        axes, spec, tile = plan(x, target, out)
        shared = kernel_args(x, target, reduction, axes, spec), axes, tile
    args, axes, tile = shared
    if reduction == 'none': grad_output = axes.permute(grad_output).contiguous()
    args = dict(args, x=x, loss=None, grad=out, grad_output=grad_output.resolve_neg(), denominator=denominator, row_stats=row_stats,
                partials=None, ticket=None, SUM_WEIGHTS=False, GRAD_READY=grad is not None)
    if row_stats is None: kernel = softmax_kernel
    else: kernel, args['tiles'] = gradient_kernel, args['tiles'] * args['SPEC'].blocks
    with launch.on_device(x): launch.run(kernel, launch.grid_size(args['tiles'], x.device, tile.programs), args, num_warps=tile.warps)
    return out

def plain_loss(x: Tensor, target: SoftmaxTarget, reduction: str) -> Tensor:
    "The loss in ops that torch can differentiate."
    return on_torch.plain_loss(x, resolve_indices(target, x, transforming()), reduction)

GRAD_LATE = launch.Kernels(forward, backward, plain_loss, grad_early=False)

def softmax_loss(x: Tensor, target: SoftmaxTarget, reduction: str) -> Tensor:
    """The loss of logits `x`, for a target that the kernels support.

    Many logits get their gradient with it, but not in float16, whose losses are mostly scaled."""
    if torch.compiler.is_compiling(): return softmax_forward(x, *op_args(x, target), reduction, spans_blocks(x, target.axis))[0]
    grad_early = x.dtype != torch.float16 and x.nbytes >= launch.EARLY_MB << 20
    return launch.fused_loss(x, target, reduction, GRAD_LATE._replace(grad_early=grad_early))

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
    loss, *rest, _ = forward(x, from_op_args(*args), reduction, keep_stats=keep_stats, ticket=launch.new_ticket(x.device))
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
