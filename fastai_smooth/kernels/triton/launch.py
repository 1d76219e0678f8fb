"""What the kernels of both losses share: indexing tensors of any strides, summing over all programs, and when the gradient is made.

No launch waits for the GPU, looks at a value, or is compiled again for another batch size, eps or ignore_index. (With axis=0 the batch size
is a stride, and is compiled in.)"""
from __future__ import annotations
import os
from contextlib import nullcontext
from functools import lru_cache
from typing import Callable, NamedTuple
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from torch import Tensor
from ..autograd import plain_grads

if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 6):
    raise ImportError(f'3.6 is the oldest that is known to work, this is {triton.__version__}')

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # kernels run on CPU tensors, slowly: for tests
EARLY_MB = 25    # of logits, from where on the forward makes the gradient: they no longer stay in the L2 cache until the backward

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64

# --- in the kernels ---------------------------------------------------------------------------------------------------

def in_kernels(function):
    "A function of plain arithmetic, so that kernels can call it. The interpreter calls it as it is."
    return function if INTERPRETED else triton.jit(function)

@triton.jit
def exp(x):
    "e^x in float32 without the results below 1e-38, for which `tl.exp` takes three more instructions; and as it is in float64."
    if x.dtype == tl.float64: return tl.exp(x)
    else: return tl.exp2(x * 1.4426950408889634)

if INTERPRETED: divide = in_kernels(lambda a, b: a / b)
else:
    @triton.jit
    def divide(a, b):
        "a / b in float32, of b from 1e-38 to 1e38. In full, a division takes six more instructions to find out that it is."
        return libdevice.fast_dividef(a, b)

@triton.jit
def offsets(i, SIZES: tl.constexpr, STRIDES: tl.constexpr):
    "Where the elements number `i` lie in a tensor of three axes, the last two of which have SIZES."
    return (i // (SIZES[0] * SIZES[1])) * STRIDES[0] + (i // SIZES[1] % SIZES[0]) * STRIDES[1] + (i % SIZES[1]) * STRIDES[2]

class Sums(NamedTuple):
    "Sums over rows: those of one program, or of all."
    loss: tl.tensor    # of the losses
    weight: tl.tensor  # of the weights of the rows that count
    rows: tl.tensor    # how many rows count

@triton.jit
def store_sums(sums, partials, ticket):
    """Stores the sums of this program in `partials`; True in the program that does so last, else False.

    Each draws a ticket afterwards. The number drawn tells who is last, and all sums are there by then (release and acquire)."""
    pid, n = tl.program_id(0), tl.num_programs(0)
    tl.store(partials + pid, sums.loss)
    tl.store(partials + n + pid, sums.weight)
    tl.store(partials + 2 * n + pid, sums.rows)
    return tl.atomic_add(ticket, 1, sem='acq_rel', scope='gpu') == n - 1

@triton.jit
def add_partials(partials, ticket):
    """The sums over all programs. They are added in the order of the programs, whoever adds them: the result is always the same.

    The ticket is 0 again afterwards."""
    n, i = tl.num_programs(0), tl.arange(0, 256)  # 1024 at once, on a single warp, would take more registers than all the rest
    loss = tl.zeros([256], partials.dtype.element_ty)
    weight, rows = loss, loss
    for start in range(0, n, 256):
        mask = start + i < n
        loss += tl.load(partials + start + i, mask=mask, other=0.)
        weight += tl.load(partials + n + start + i, mask=mask, other=0.)
        rows += tl.load(partials + 2 * n + start + i, mask=mask, other=0.)
    tl.store(ticket, 0)
    return Sums(loss=tl.sum(loss, 0), weight=tl.sum(weight, 0), rows=tl.sum(rows, 0))

@triton.jit
def unless_one(tiles, grad_output):
    "How many tiles a backward does whose gradient has been made for a `grad_output` of 1: none if it is 1, as it mostly is."
    return tl.where(tl.load(grad_output) == 1, 0, tiles)

# --- around them ------------------------------------------------------------------------------------------------------

class Axes(NamedTuple):
    "The fewest axes by which some tensors of one shape are indexed: three, with a stride of each tensor along each."
    outer: int      # the size of the first axis: the only one that may change without another compilation
    sizes: tuple    # of the other two
    strides: tuple  # of each tensor, three
    order: tuple    # of the tensors' own axes, outermost first

    def permute(self, v: Tensor) -> Tensor:
        "A tensor of the same shape with its axes in this order."
        return v if self.order == tuple(range(v.dim())) else v.permute(self.order)

    def restore(self, v: Tensor, shape) -> Tensor:
        "The elements `v`, one after another in this order, as a tensor of that shape."
        return v.view([shape[d] for d in self.order]).permute([self.order.index(d) for d in range(len(shape))])

def coalesce(shape, *strides) -> Axes | None:
    """The axes of `shape` for tensors of these `strides`, in the order in which they lie in the first tensor. Neighbours that are like one
    axis in all tensors become one. None where more than three are left."""
    order = tuple(sorted(range(len(shape)), key=lambda d: -strides[0][d]))
    merged = []  # (size, stride of each tensor), outermost first
    for d in order:
        if shape[d] == 1 and d: continue  # but the batch stays: a batch of one is indexed as others are
        inner = [s[d] for s in strides]
        if merged and all(o == i * shape[d] for o, i in zip(merged[-1][1], inner)): merged[-1] = merged[-1][0] * shape[d], inner
        else: merged.append((shape[d], inner))
    if len(merged) > 3: merged = [m for m in merged if m[0] > 1]
    if len(merged) > 3: return None
    # a single axis is the outer one, so that its size may change; of two the first is: (N, inner)
    one = 1, [0] * len(strides)
    (outer, a), (size1, b), (size2, c) = (merged[:1] or [one]) + [one] * (3 - max(1, len(merged))) + merged[1:]
    return Axes(outer, (size1, size2), tuple(zip(a, b, c)), order)

_tickets = {}

def new_ticket(device: torch.device) -> Tensor: return torch.zeros((), dtype=torch.int32, device=device)

def stream_ticket(device: torch.device) -> Tensor:
    """A zero for the kernels of the current stream to count with: one after another, each leaves it at zero.

    Kernels that may run at once must not share one: so each stream has its own, and so has a CUDA graph."""
    if device.type == 'cuda':
        if torch.cuda.is_current_stream_capturing(): return new_ticket(device)
        key = device.index, triton.runtime.driver.active.get_current_stream(device.index)  # a number: torch.cuda makes an object of it
    else: key = device.type
    if key not in _tickets: _tickets[key] = new_ticket(device)
    return _tickets[key]

@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 128

def grid_size(tiles: int, device: torch.device, programs: int = 16) -> int:
    "How many programs are launched for so many tiles: at most `programs` a multiprocessor, each of which then does several tiles."
    return max(1, min(tiles, programs * multiprocessors(device)))

HERE = nullcontext()

def on_device(x: Tensor):
    "A context in which launches go to the device of `x`. Mostly it is the current one: then there is nothing to switch, and back."
    return HERE if not x.is_cuda or x.get_device() == torch.cuda.current_device() else torch.cuda.device_of(x)

def run(kernel, programs: int, args: dict, **options):
    """Launches a kernel with its arguments out of `args`, by their names.

    They are handed on in the kernel's order: Triton takes longer to bind names, and few logits wait for that alone."""
    kernel[(programs,)](*map(args.__getitem__, kernel.arg_names), **options)

def runs_on(x: Tensor) -> bool: return x.is_cuda or INTERPRETED and x.is_cpu

class Kernels(NamedTuple):
    "Those of a loss, and what they leave to torch."
    forward: Callable     # (x, target, reduction, grad) -> the loss, *kept for the backward; and into `grad` the gradient
    backward: Callable    # (grad_output, x, target, reduction, *kept, grad, out) -> the gradient; `grad` is that for a factor of 1, or None
    plain_loss: Callable  # (x, target, reduction) -> the loss in ops that torch can differentiate
    grad_early: bool      # Does the forward make the gradient, for a `grad_output` of 1?

    def loss_and_grad(self, x, target, reduction, scale, grad=None, factor=1.):
        "As that of the torch implementation, of logits (N,K). `factor` is a number, or a tensor with one for each loss."
        loss, *kept = self.forward(x, target, reduction, None)
        if grad is not None:
            factor = (loss.new_ones(()) * (factor * scale)).reshape(loss.shape)  # made on the GPU: a copy of a number would wait for it
            self.backward(factor, x, target, reduction, *kept, out=grad)
        return loss * scale

class FusedLoss(torch.autograd.Function):
    "The loss of `Kernels` with its gradient: made in the forward or in the backward."

    @staticmethod
    def forward(ctx, x, target, reduction, kernels):
        ctx.grad = grad = torch.empty_like(x) if kernels.grad_early and reduction != 'none' else None
        loss, *ctx.kept = kernels.forward(x, target, reduction, grad)
        ctx.save_for_backward(x, *target.tensors())
        ctx.args, ctx.strides = (target, reduction, kernels), x.stride()
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        x, *_ = ctx.saved_tensors
        (target, reduction, kernels), kept = ctx.args, ctx.kept
        grad, ctx.grad = ctx.grad, None
        if x.stride() != ctx.strides: grad, kept = None, kept[:1]  # a hook of saved tensors has changed the layout: rows have another order
        plain = plain_grads([x], grad_output, kernels.plain_loss, target, reduction)
        if plain is not None: return *plain, None, None, None
        return kernels.backward(grad_output, x, target, reduction, *kept, grad=grad), None, None, None

def fused_loss(x: Tensor, target, reduction: str, kernels: Kernels) -> Tensor:
    "The loss of logits `x`; of none by plain ops, since there is nothing to launch."
    if not x.numel(): return kernels.plain_loss(x, target, reduction)
    if x.requires_grad and torch.is_grad_enabled(): return FusedLoss.apply(x, target, reduction, kernels)
    return kernels.forward(x, target, reduction)[0]
