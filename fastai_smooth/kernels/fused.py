"""What the two fused Triton kernels share: how tensors are walked over, how a sum over all programs is made, and launches.

No launch waits for the GPU, looks at a value, or is compiled again for another batch size, eps or ignore_index."""
from __future__ import annotations
import os
from contextlib import nullcontext
from typing import NamedTuple
import torch
import triton
import triton.language as tl
from torch import Tensor

if tuple(map(int, triton.__version__.split('.')[:2])) < (3, 6): raise ImportError(f'3.6 is the oldest that is known to do, this is {triton.__version__}')

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # kernels run on CPU tensors, slowly: for tests
EARLY_MB = 25        # of logits, from where on the gradient is made in the forward: they no longer stay in the L2 cache till the backward
MAX_PROGRAMS = 2048  # each of which goes over several tiles where there are more: the sum of their sums is short, and always the same

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64

# --- in the kernels ---------------------------------------------------------------------------------------------------

@triton.jit
def offsets(i, SIZES: tl.constexpr, STRIDES: tl.constexpr):
    "Where the elements number `i` lie in a tensor whose last two of three axes have SIZES."
    return (i // (SIZES[0] * SIZES[1])) * STRIDES[0] + (i // SIZES[1] % SIZES[0]) * STRIDES[1] + (i % SIZES[1]) * STRIDES[2]

@triton.jit
def sum_up(sums, ticket, a, b, c):
    """Adds a, b and c up over all programs: gives the three sums and True in the program that ends last, else False.

    Each leaves its own in `sums`, then draws a ticket; the number drawn tells who is last, and by then all are there
    (release and acquire). They are added in the order of the programs, whoever adds them: the result is always the same.
    The ticket is 0 again afterwards."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(sums + pid, a)
    tl.store(sums + programs + pid, b)
    tl.store(sums + 2 * programs + pid, c)
    last = tl.atomic_add(ticket, 1, sem='acq_rel', scope='gpu') == programs - 1
    if last:
        at = tl.arange(0, 1024)
        a_ = tl.zeros([1024], sums.dtype.element_ty)
        b_, c_ = a_, a_
        for start in range(0, programs, 1024):
            there = start + at < programs
            a_ += tl.load(sums + start + at, mask=there, other=0.)
            b_ += tl.load(sums + programs + start + at, mask=there, other=0.)
            c_ += tl.load(sums + 2 * programs + start + at, mask=there, other=0.)
        a, b, c = tl.sum(a_, 0), tl.sum(b_, 0), tl.sum(c_, 0)
        tl.store(ticket, 0)
    return a, b, c, last

@triton.jit
def left(tiles, grad_output):
    "How many of the tiles are left to do, where their gradient has been made for a `grad_output` of 1: none, if it is 1, as it mostly is."
    return tl.where(tl.load(grad_output) == 1, 0, tiles)

# --- around them ------------------------------------------------------------------------------------------------------

class Walk(NamedTuple):
    "How to go over the elements of some tensors of one shape: as three axes, with a stride of each tensor along each."
    outer: int      # the size of the first axis: the only one that may change without another compilation
    sizes: tuple    # of the other two
    strides: tuple  # of each tensor, three
    order: tuple    # in which the axes of the tensors are gone over

    def in_order(self, v: Tensor) -> Tensor:
        "A tensor of the same shape with its axes in the order of the walk."
        return v if self.order == tuple(range(v.dim())) else v.permute(self.order)

    def out_of_order(self, v: Tensor, shape) -> Tensor:
        "The elements `v`, one after another as the walk meets them, in that shape."
        return v.view([shape[d] for d in self.order]).permute([self.order.index(d) for d in range(len(shape))])

def walk(shape, *strides) -> Walk | None:
    """The fewest axes to go over `shape` for tensors of these `strides`, in the order in which the first one lies in memory.

    None where more than three are left."""
    order = tuple(sorted(range(len(shape)), key=lambda d: -strides[0][d]))
    merged = []  # [size, stride of each tensor], outermost first
    for d in order:
        if shape[d] == 1 and d: continue  # but a batch of one is gone over as others are
        here = [s[d] for s in strides]
        if merged and all(o == h * shape[d] for o, h in zip(merged[-1][1], here)): merged[-1] = merged[-1][0] * shape[d], here
        else: merged.append((shape[d], here))
    if len(merged) > 3: merged = [m for m in merged if m[0] > 1]
    if len(merged) > 3: return None
    # one axis: it is the outer one, so that its size may change; (N, inner): the outer one is N
    filled = merged[:1] + [(1, [0] * len(strides))] * (3 - len(merged)) + merged[1:] if merged else [(1, [0] * len(strides))] * 3
    (outer, a), (s1, b), (s2, c) = filled
    return Walk(outer, (s1, s2), tuple(zip(a, b, c)), order)

_tickets = {}

def new_ticket(device: torch.device) -> Tensor: return torch.zeros((), dtype=torch.int32, device=device)

def ticket(device: torch.device) -> Tensor:
    """A zero on the current device that kernels of one stream may count with, one after another, each leaving it at zero.

    Kernels that may run at once must not share one: so there is one a stream, and a CUDA graph gets its own."""
    if device.type == 'cuda':
        if torch.cuda.is_current_stream_capturing(): return new_ticket(device)
        key = device.index, torch.cuda.current_stream(device).cuda_stream
    else: key = device.type
    if key not in _tickets: _tickets[key] = new_ticket(device)
    return _tickets[key]

def programs(tiles: int) -> int: return max(1, min(tiles, MAX_PROGRAMS))

def on(x: Tensor): return torch.cuda.device_of(x) if x.is_cuda else nullcontext()

def early(x: Tensor) -> bool:
    "Is the gradient to be made in the forward, for a `grad_output` of 1? Not in float16, which is scaled by others as a rule."
    return x.dtype != torch.float16 and x.nbytes >= EARLY_MB << 20

def runs_on(x: Tensor) -> bool: return x.is_cuda or INTERPRETED and x.is_cpu
