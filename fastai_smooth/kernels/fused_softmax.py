"""The softmax head as one Triton kernel.

With t = w * q and A = sum_k t_k, a row of logits x has the loss A * lse(x) - sum_k t_k x_k, and the gradient
A * softmax(x) - t. In the terms of a row (`targets.py` has the formula of q)

    t_k = w_k * (own * y_k + each * u_k)      own = 1 - e, shared out among the positives; each = e / sum of u

so one pass over the row gives all that loss and gradient need: the maximum, the sum of exponentials, and for the weightings
w * u and w * y the sums over the classes that are not masked (-inf), with and without the logit. nbs/00_kernels.ipynb derives it."""
from __future__ import annotations
import math
from functools import lru_cache
from typing import NamedTuple
import torch
import triton
import triton.language as tl
from torch import Tensor
from . import fused
from .backward import plain_grad, transforming
from .checks import check_indices
from .formula import Job, accumulator, plain_loss
from .fused import left, offsets, sum_up
from .indices import looked_up
from .targets import Smoothing

INF = tl.constexpr(float('inf'))

class Tile(NamedTuple):
    "What a program goes over at once."
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

def long(x: Tensor, axis: int) -> bool:
    "Are rows longer than a block? Then the gradient is made by `gradient_kernel`, of what the forward keeps of each row."
    return x.shape[axis] > tile_for(x.shape[axis], x.stride(axis)).block

# --- the kernels ------------------------------------------------------------------------------------------------------

@triton.jit
def block(rows, k, wanted, other, C: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr):
    "The values of classes k in rows that begin at these pointers; `other` where a row is not wanted, or there is no such class."
    at = k if C * STRIDE < 2**31 else k.to(tl.int64)
    return tl.load(rows[:, None] + (at * STRIDE)[None, :], mask=wanted[:, None] & (k < C)[None, :], other=other).to(ACC)

@triton.jit
def nothing(ROWS: tl.constexpr, ACC: tl.constexpr):
    "What `seen` starts from."
    o = tl.zeros([ROWS], ACC)
    return tl.full([ROWS], -INF, ACC), o, o, o, o, o, o, o, o, o, o, o, o

@triton.jit
def seen(state, k, x, y, weight, prior, C: tl.constexpr):
    """What is known of rows after another block: `state` is (the maximum m; the sum of exp(x - m); the sums over the classes that
    are not masked of 1, u, w u, w u (x - m), w, w (x - m), w y, w y (x - m); the sum of y; of y and w y where masked).

    The online softmax: when the maximum moves, what was summed moves with it."""
    m, s, size, mass, share, share_z, even, even_z, own, own_z, n, gone, lost = state
    top = tl.maximum(m, tl.max(x, 1))
    ref = tl.where(top == -INF, 0., top)
    moved = tl.where(m == -INF, 0., m - ref)  # nothing has been summed then
    keep = x != -INF
    z = tl.where(keep, x - ref[:, None], 0.)
    kept = keep.to(x.dtype)
    s = s * tl.exp(moved) + tl.sum(tl.exp(x - ref[:, None]), 1)
    size += tl.sum(kept, 1)
    w_kept, w_z = kept, z
    if weight is not None:
        w = tl.load(weight + k, mask=k < C, other=0.)[None, :]
        w_kept, w_z = kept * w, z * w
    share_z += moved * share
    if prior is None:
        share += tl.sum(w_kept, 1)
        share_z += tl.sum(w_z, 1)
    else:
        u = tl.load(prior + k, mask=k < C, other=0.)[None, :]
        mass += tl.sum(kept * u, 1)
        share += tl.sum(w_kept * u, 1)
        share_z += tl.sum(w_z * u, 1)
        even_z += moved * even + tl.sum(w_z, 1)
        even += tl.sum(w_kept, 1)
    if y is not None:
        wy = y
        if weight is not None: wy = w * y
        own_z += moved * own + tl.sum(z * wy, 1)
        own += tl.sum(kept * wy, 1)
        n += tl.sum(y, 1)
        gone += tl.sum(tl.where(keep, 0., y), 1)
        lost += tl.sum(tl.where(keep, 0., wy), 1)
    return top, s, size, mass, share, share_z, even, even_z, own, own_z, n, gone, lost

@triton.jit
def terms(state, eps, x_y, w_y, PRIOR: tl.constexpr, INDEX: tl.constexpr, MULTI_HOT: tl.constexpr, OTHERS: tl.constexpr):
    """Of rows: the loss; the maximum, the sum of exponentials, A, own and each, for the gradient; and where u, all of whose mass
    is masked, gives way to the uniform distribution. `x_y` and `w_y` are logit and weight of the class, for class indices."""
    m, s, size, mass, share, share_z, even, even_z, own_w, own_z, n, gone, lost = state
    e, alone = eps, mass == -1
    if OTHERS:  # as `targets.effective_eps`
        if INDEX: reached = (x_y != -INF).to(size.dtype)
        elif MULTI_HOT: reached = n - gone
        else: reached = (gone == 0).to(size.dtype)
        rest = size - reached
        e = tl.where(rest > 0, eps * size / tl.where(rest > 0, rest, 1.), 0.)
    own = 1 - e + tl.zeros_like(size)
    masked = own  # that of positives that are
    if MULTI_HOT:  # a row with no positive is all smoothing
        if OTHERS: masked = tl.where(rest > 0, 1 - eps, 1.)
        masked = tl.where(n == 0, 0., masked / tl.where(n == 0, 1., n))
        own = masked
        if OTHERS: own = tl.where(n == 0, 0., masked - e / size)  # the uniform part, which all that are not masked get, taken back
        e = tl.where(n == 0, 1., e)
    if PRIOR:
        alone = mass == 0
        share, share_z = tl.where(alone, even, share), tl.where(alone, even_z, share_z)
        each = e / tl.where(alone, size, mass)
    else: each = e / size
    if INDEX:
        here = x_y != -INF
        own_w, lost = w_y, tl.where(here, 0., w_y)
        own_z = tl.where(here, w_y * (x_y - m), 0.)
        total = own * own_w + each * share
    else: total = own * own_w + masked * lost + each * share
    loss = total * tl.log(s) - (own * own_z + tl.where(each == 0, 0., each * share_z))  # share_z may be -inf
    loss = tl.where(masked * lost != 0, INF, loss)
    dead = m == -INF  # all masked
    return tl.where(dead, INF - INF, loss), tl.where(dead, INF - INF, m), s, total, own, each, alone

@triton.jit
def gradient(k, x, y, weight, prior, label, m, s, total, own, each, alone, by, C: tl.constexpr):
    "by * (A softmax(x) - t), 0 for masked classes."
    t = (each * by)[:, None]
    if prior is not None: t = t * tl.where(alone[:, None], 1., tl.load(prior + k, mask=k < C, other=0.)[None, :])
    if y is None: t = t + tl.where(k[None, :] == label[:, None], (own * by)[:, None], 0.)
    else: t = t + (own * by)[:, None] * y
    if weight is not None: t = t * tl.load(weight + k, mask=k < C, other=0.)[None, :]
    g = (total / s * by)[:, None] * tl.exp(x - m[:, None]) - t
    return tl.where((x == -INF) & (m == m)[:, None], 0., g)

@triton.jit
def factor(grad_output, inverse, scale, rows, there, EACH: tl.constexpr, ACC: tl.constexpr):
    "What the gradient of each row is to be multiplied by."
    by = tl.full([rows.shape[0]], scale, ACC)
    if inverse is not None: by = by * tl.load(inverse)
    if grad_output is not None:
        if EACH: by = by * tl.load(grad_output + rows, mask=there, other=0.).to(ACC)
        else: by = by * tl.load(grad_output).to(ACC)
    return by

@triton.jit
def one_over(weight, count):
    "nan where the weights of all labels are 0, as in PyTorch; but where there is no row, 1, and so a mean of 0."
    return tl.where(count == 0, 1., tl.where(weight == 0, INF - INF, 1 / weight))

@triton.jit(do_not_specialize=['scale', 'eps', 'outer', 'tiles', 'ignore_index'])
def softmax_kernel(x, y, weight, prior, eps_at, loss, grad, grad_output, inverse, stats, sums, ticket,
                   scale: tl.float64, eps: tl.float64, outer, tiles, ignore_index,
                   C: tl.constexpr, SIZES: tl.constexpr, XS: tl.constexpr, YS: tl.constexpr, GS: tl.constexpr, INDEX: tl.constexpr,
                   MULTI_HOT: tl.constexpr, OTHERS: tl.constexpr, PER_CLASS: tl.constexpr, EACH: tl.constexpr, COUNT: tl.constexpr,
                   MADE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Loss, gradient or both: what there is a pointer for. `stats` gets what `gradient_kernel` will need of a row. COUNT: the loss is a
    mean over the rows' weights, and `inverse`, one over their sum, comes out of this; else it goes in. `eps_at`: one eps a class
    (PER_CLASS), or one that is added to `eps`. MADE: the gradient is there, for a `grad_output` of 1."""
    if MADE: tiles = left(tiles, grad_output)
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    sum_loss, sum_weight, count = tl.full((), 0., ACC), tl.full((), 0., ACC), tl.full((), 0., ACC)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = rows // (SIZES[0] * SIZES[1]) < outer
        used = there
        x_rows = x + offsets(rows, SIZES, XS)
        e = tl.full([ROWS], eps, ACC)
        if eps_at is not None and not PER_CLASS: e += tl.load(eps_at)
        label = None
        w_y = None
        x_y = None
        if INDEX:
            label = tl.load(y + rows, mask=there, other=0).to(tl.int64)
            used = there & (label != ignore_index)
            invalid = used & ((label < 0) | (label >= C))
            label = tl.where(used & (label >= 0) & (label < C), label, 0)
            x_y = tl.load(x_rows + label * XS[3], mask=used, other=0.).to(ACC)
            w_y = tl.full([ROWS], 1., ACC)
            if weight is not None: w_y = tl.load(weight + label)
            if PER_CLASS: e = tl.load(eps_at + label)
        else: y_rows = y + offsets(rows, SIZES, YS)
        # what is ignored is not read; but where rows are next to each other, they are read several at once
        wanted = used
        if XS[3] != 1: wanted = there

        k0 = tl.arange(0, BLOCK)
        x0 = block(x_rows, k0, wanted, -INF, C, XS[3], ACC)
        y0 = None
        if not INDEX: y0 = block(y_rows, k0, wanted, 0, C, YS[3], ACC)
        state = seen(nothing(ROWS, ACC), k0, x0, y0, weight, prior, C)
        for b in range(1, BLOCKS):
            k = b * BLOCK + k0
            xb = block(x_rows, k, wanted, -INF, C, XS[3], ACC)
            yb = None
            if not INDEX: yb = block(y_rows, k, wanted, 0, C, YS[3], ACC)
            state = seen(state, k, xb, yb, weight, prior, C)
        row_loss, m, s, total, own, each, alone = terms(state, e, x_y, w_y, prior is not None, INDEX, MULTI_HOT, OTHERS)
        if INDEX:
            total = tl.where(invalid, INF - INF, total)
            row_loss = tl.where(invalid, INF - INF, row_loss)

        if loss is not None:
            row_loss = tl.where(used, row_loss, 0.)
            if EACH: tl.store(loss + rows, row_loss, mask=there)
            else: sum_loss += tl.sum(row_loss, 0)
            if COUNT:
                sum_weight += tl.sum(tl.where(used, w_y, 0.), 0)
                count += tl.sum(used.to(ACC), 0)
        if stats is not None:
            n = tl.cast(outer, tl.int64) * (SIZES[0] * SIZES[1])
            tl.store(stats + rows, m, mask=there)
            tl.store(stats + n + rows, s, mask=there)
            tl.store(stats + 2 * n + rows, total, mask=there)
            tl.store(stats + 3 * n + rows, own, mask=there)
            tl.store(stats + 4 * n + rows, tl.where(alone, -each, each), mask=there)
        if grad is not None:
            by = factor(grad_output, inverse, scale, rows, there, EACH, ACC)
            g_rows = grad + offsets(rows, SIZES, GS)
            for i in range(1, BLOCKS):  # the last first: it is the one that a cache still has
                k = (BLOCKS - i) * BLOCK + k0
                xb = block(x_rows, k, wanted, -INF, C, XS[3], ACC)
                yb = None
                if not INDEX: yb = block(y_rows, k, wanted, 0, C, YS[3], ACC)
                g = gradient(k, xb, yb, weight, prior, label, m, s, total, own, each, alone, by, C)
                put(g_rows, k, g, there, used, C, GS[3])
            g = gradient(k0, x0, y0, weight, prior, label, m, s, total, own, each, alone, by, C)
            put(g_rows, k0, g, there, used, C, GS[3])

    if loss is not None and not EACH:
        sum_loss, sum_weight, count, last = sum_up(sums, ticket, sum_loss, sum_weight, count)
        if last:
            by = tl.full((), scale, ACC)
            if COUNT:
                by = by * one_over(sum_weight, count)
                tl.store(inverse, by)
            elif inverse is not None: by = by * tl.load(inverse)
            tl.store(loss, sum_loss * by)

@triton.jit
def put(g, k, values, there, used, C: tl.constexpr, GC: tl.constexpr):
    "Stores a block of the gradient; what is ignored gets 0."
    at = k if C * GC < 2**31 else k.to(tl.int64)
    values = tl.where(used[:, None], values, 0.).to(g.dtype.element_ty)
    tl.store(g[:, None] + (at * GC)[None, :], values, mask=there[:, None] & (k < C)[None, :])

@triton.jit(do_not_specialize=['scale', 'outer', 'tiles', 'ignore_index'])
def gradient_kernel(x, y, weight, prior, grad, grad_output, inverse, stats, scale: tl.float64, outer, tiles, ignore_index,
                    C: tl.constexpr, SIZES: tl.constexpr, XS: tl.constexpr, YS: tl.constexpr, GS: tl.constexpr, INDEX: tl.constexpr,
                    MULTI_HOT: tl.constexpr, OTHERS: tl.constexpr, EACH: tl.constexpr, MADE: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The gradient by the `stats` of the forward, where rows are longer than a block: blocks of rows are independent then. MADE: it
    is there, for a `grad_output` of 1."""
    if MADE: tiles = left(tiles, grad_output)
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    n = tl.cast(outer, tl.int64) * (SIZES[0] * SIZES[1])
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = tl.cast(tile // BLOCKS, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = rows // (SIZES[0] * SIZES[1]) < outer
        used = there
        k = (BLOCKS - 1 - tile % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        label = None
        yb = None
        if INDEX:
            label = tl.load(y + rows, mask=there, other=0).to(tl.int64)
            used = there & (label != ignore_index)
        else: yb = block(y + offsets(rows, SIZES, YS), k, there, 0, C, YS[3], ACC)
        wanted = used
        if XS[3] != 1: wanted = there
        xb = block(x + offsets(rows, SIZES, XS), k, wanted, -INF, C, XS[3], ACC)
        m, s = tl.load(stats + rows, mask=there, other=0.), tl.load(stats + n + rows, mask=there, other=1.)
        total, own = tl.load(stats + 2 * n + rows, mask=there, other=0.), tl.load(stats + 3 * n + rows, mask=there, other=0.)
        each = tl.load(stats + 4 * n + rows, mask=there, other=0.)
        by = factor(grad_output, inverse, scale, rows, there, EACH, ACC)
        g = gradient(k, xb, yb, weight, prior, label, m, s, total, own, tl.abs(each), each < 0, by, C)
        put(grad + offsets(rows, SIZES, GS), k, g, there, used, C, GS[3])

@triton.jit(do_not_specialize=['n', 'tiles', 'ignore_index'])
def count_kernel(y, weight, inverse, sums, ticket, n, tiles, ignore_index, C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    "One over the weights of all rows, for where the gradient is made with the loss and so has to know before."
    sum_weight, count = tl.full((), 0., ACC), tl.full((), 0., ACC)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        label = tl.load(y + rows, mask=rows < n, other=0).to(tl.int64)
        used = (rows < n) & (label != ignore_index)
        count += tl.sum(used.to(ACC), 0)
        if weight is not None:
            valid = used & (label >= 0) & (label < C)
            sum_weight += tl.sum(tl.load(weight + label, mask=valid, other=0.), 0)
    if weight is None: sum_weight = count
    sum_weight, count, _, last = sum_up(sums, ticket, sum_weight, count, count)
    if last: tl.store(inverse, one_over(sum_weight, count))

# --- launches ---------------------------------------------------------------------------------------------------------

class Plan(NamedTuple):
    "What the launches for logits, targets and gradients of some shape, strides and dtype have in common."
    walk: fused.Walk
    rows: int
    tiles: int      # of rows
    blocks: int     # of classes
    options: dict   # of the compilation

@lru_cache(1024)  # a training sees the same ones again and again
def plan(shape, axis, dtype, smoothing, tile, x, y, grad) -> Plan | None:
    "None where no kernel can go over it. `x`, `y` (None for class indices) and `grad` are strides."
    drop = lambda v: v[:axis] + v[axis+1:]
    walk = fused.walk(drop(shape), *(drop(v) for v in (x, grad, y or x)))
    if walk is None: return None
    multi_hot, others = smoothing
    XS, GS, YS = ((*at, v[axis]) for at, v in zip(walk.strides, (x, grad, y or x)))
    options = dict(C=shape[axis], SIZES=walk.sizes, XS=XS, YS=YS if y else None, GS=GS, INDEX=y is None, MULTI_HOT=multi_hot, OTHERS=others,
                   ROWS=tile.rows, BLOCK=tile.block, ACC=fused.TYPES[dtype], num_warps=tile.warps, num_ctas=tile.ctas)
    rows = math.prod(drop(shape))
    return Plan(walk, rows, -(-rows // tile.rows), -(-shape[axis] // tile.block), options)

def plan_for(x: Tensor, job: Job, grad: Tensor | None = None) -> Plan | None:
    "The gradient lies as the logits do, if there is none yet."
    s, axis, strides = job.smoothing, job.axis, x.stride()
    return plan(tuple(x.shape), axis, accumulator(x), (s.multi_hot, s.spread == 'others'), tile_for(x.shape[axis], strides[axis]), strides,
                None if job.is_index else job.target.stride(), strides if grad is None else grad.stride())

def takes(x: Tensor, job: Job) -> bool:
    "Can the kernel do it? One prior a class would be another pass over a matrix; and there are layouts of too many axes."
    prior = job.smoothing.prior
    if x.dtype not in fused.FLOATS or prior is not None and prior.dim() == 2: return False
    return x.dim() <= 4 or not torch.compiler.is_compiling() and plan_for(x, job, torch.empty_like(x, device='meta')) is not None

def inputs(p: Plan, job: Job):
    "y, weight, prior and eps_at as the kernels want them; and eps as a number, and whether there is one a class."
    packed = lambda v: None if v is None else v.contiguous()
    s, y = job.smoothing, p.walk.in_order(job.target).contiguous() if job.is_index else job.target
    if job.is_index and p.options['C'] == 1: y = y.long()  # Triton 3.6 fails to compile others
    eps_at, eps = (packed(s.eps), 0.) if isinstance(s.eps, Tensor) else (None, s.eps)
    return (y, packed(job.weight), packed(s.prior)), eps_at, eps, dict(PER_CLASS=eps_at is not None and eps_at.dim() > 0)

def scale_of(x, job, reduction):
    "What the host knows of the factor between the sum of the rows' losses and the loss."
    return x.shape[job.axis] / x.numel() if reduction == 'mean' and not job.is_index else 1.

def forward(x: Tensor, job: Job, reduction: str, grad: Tensor | None = None, keep: bool = False, ticket: Tensor | None = None):
    """The loss; one over what it is a mean of, where only the device knows; and, if wanted, to `keep` for the backward what
    `gradient_kernel` needs of each row. `grad`, if given, gets the gradient."""
    if x.is_cpu and job.is_index: check_indices(job.target.long(), x.shape[job.axis], job.target.long() == job.ignore_index)
    p, acc, each = plan_for(x, job, grad), accumulator(x), reduction == 'none'
    tensors, eps_at, eps, more = inputs(p, job)
    new = lambda *shape: torch.empty(shape, dtype=acc, device=x.device)
    inverse = new() if reduction == 'mean' and job.is_index else None
    stats = new(5, p.rows) if keep else None
    loss, n = new(p.rows) if each else new(), fused.programs(p.tiles)
    sums, count = None if each else new(3 * n), inverse is not None and grad is None
    with fused.on(x):
        if not each and ticket is None: ticket = fused.ticket(x.device)
        if inverse is not None and not count: count_rows(*tensors[:2], inverse, ticket, job.ignore_index, p.options)
        softmax_kernel[(n,)](x, *tensors, eps_at, loss, grad, None, inverse, stats, sums, ticket, scale_of(x, job, reduction), eps,
                             p.walk.outer, p.tiles, job.ignore_index, **p.options, **more, EACH=each, COUNT=count, MADE=False)
    return p.walk.out_of_order(loss, x.shape[:job.axis] + x.shape[job.axis+1:]) if each else loss, inverse, stats

def count_rows(y: Tensor, weight: Tensor | None, inverse: Tensor, ticket: Tensor, ignore_index: int, options: dict):
    tiles = -(-y.numel() // 4096)
    n = fused.programs(tiles)
    count_kernel[(n,)](y, weight, inverse, inverse.new_empty(3 * n), ticket, y.numel(), tiles, ignore_index,
                       C=options['C'], BLOCK=4096, ACC=options['ACC'], num_warps=8)

def backward(grad_output: Tensor, x: Tensor, job: Job, reduction: str, inverse: Tensor | None, stats: Tensor | None,
             made: Tensor | None = None):
    "The gradient times `grad_output`, rounded once. `made`, if given, is that for a `grad_output` of 1, and kept where it is 1."
    grad, each = torch.empty_like(x) if made is None else made, reduction == 'none'
    p = plan_for(x, job, grad)
    tensors, eps_at, eps, more = inputs(p, job)
    grad_output = p.walk.in_order(grad_output).contiguous() if each else grad_output
    grad_output = grad_output.resolve_neg()
    scale, tiles = scale_of(x, job, reduction), p.tiles * (1 if stats is None else p.blocks)
    where, how = (p.walk.outer, tiles, job.ignore_index), dict(p.options, EACH=each, MADE=made is not None)
    with fused.on(x):
        if stats is None: softmax_kernel[(fused.programs(tiles),)](x, *tensors, eps_at, None, grad, grad_output, inverse, None, None, None, scale, eps, *where,
                                                                   **how, **more, COUNT=False)
        else: gradient_kernel[(fused.programs(tiles),)](x, *tensors, grad, grad_output, inverse, stats, scale, *where, **how)
    return grad

class FusedSoftmaxLoss(torch.autograd.Function):
    "The loss with its gradient by the kernel: with the loss where the logits are many, else in the backward."

    @staticmethod
    def forward(ctx, x, job, reduction):
        ctx.grad = grad = torch.empty_like(x) if fused.early(x) and reduction != 'none' else None
        loss, inverse, stats = forward(x, job, reduction, grad, keep=long(x, job.axis))
        ctx.save_for_backward(x, *job.tensors())
        ctx.rest = job, reduction, inverse, stats, x.stride()
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        x, *_ = ctx.saved_tensors
        job, reduction, inverse, stats, strides = ctx.rest
        made, ctx.grad = ctx.grad, None
        if x.stride() != strides: made = stats = None  # a hook has laid it out anew: the rows have another order
        plain = plain_grad(x, grad_output, lambda x: plain_loss(x, looked_up(job, x, transforming()), reduction))
        return backward(grad_output, x, job, reduction, inverse, stats, made) if plain is None else plain, None, None

def softmax_loss(x: Tensor, job: Job, reduction: str) -> Tensor:
    "The loss of logits `x`, for a job that the kernel `takes`."
    if torch.compiler.is_compiling(): return softmax_forward(x, *flat(job, x), reduction, long(x, job.axis))[0]
    x, job = x.resolve_neg(), job.replaced(target=job.target.resolve_neg()) if job.target.is_neg() else job
    if not x.numel(): return x.sum(job.axis).to(accumulator(x)) if reduction == 'none' else x.sum().to(accumulator(x))
    if x.requires_grad and torch.is_grad_enabled(): return FusedSoftmaxLoss.apply(x, job, reduction)
    return forward(x, job, reduction)[0]

# --- the same as custom ops, which torch.compile takes as they are ----------------------------------------------------

def flat(job: Job, x: Tensor):
    "A job as arguments of an op. eps is a tensor: as a number it would be compiled in, once for each."
    s = job.smoothing
    eps = s.eps if isinstance(s.eps, Tensor) else torch.ones((), dtype=accumulator(x), device=x.device) * s.eps
    return job.target, job.weight, s.prior, eps, job.is_index, s.multi_hot, s.spread, job.axis, job.ignore_index

def job_of(target, weight, prior, eps, is_index, multi_hot, spread, axis, ignore_index):
    return Job(target, is_index, Smoothing(eps, prior, spread, multi_hot), axis, weight, ignore_index)

@torch.library.custom_op('fastai_smooth::softmax_forward', mutates_args=())
def softmax_forward(x: Tensor, target: Tensor, weight: Tensor | None, prior: Tensor | None, eps: Tensor,
                    is_index: bool, multi_hot: bool, spread: str, axis: int, ignore_index: int, reduction: str,
                    keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` gives, with empty tensors for what there isn't. `keep` is an argument, so that the shapes follow from the arguments
    alone: a graph that inductor has on its disk may have been made with another table."""
    job = job_of(target, weight, prior, eps, is_index, multi_hot, spread, axis, ignore_index)
    if not x.numel(): return _softmax_forward_fake(x, *flat(job, x), reduction, keep)
    loss, *rest = forward(x, job, reduction, keep=keep, ticket=fused.new_ticket(x.device))
    return loss.contiguous(), *(loss.new_empty(0) if v is None else v for v in rest)

@softmax_forward.register_fake
def _softmax_forward_fake(x, target, weight, prior, eps, is_index, multi_hot, spread, axis, ignore_index, reduction, keep):
    new = lambda *shape: x.new_zeros(shape, dtype=accumulator(x))
    rows = x.shape[:axis] + x.shape[axis+1:]
    inverse = new() if reduction == 'mean' and is_index and x.numel() else new(0)
    return new(*rows) if reduction == 'none' else new(), inverse, new(5, math.prod(rows)) if keep else new(0)

@torch.library.custom_op('fastai_smooth::softmax_backward', mutates_args=())
def softmax_backward(grad_output: Tensor, inverse: Tensor, stats: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, prior: Tensor | None,
                     eps: Tensor, is_index: bool, multi_hot: bool, spread: str, axis: int, ignore_index: int,
                     reduction: str) -> Tensor:
    "What `backward` gives."
    if not x.numel(): return torch.empty_like(x)
    job, some = job_of(target, weight, prior, eps, is_index, multi_hot, spread, axis, ignore_index), lambda v: v if v.numel() else None
    return backward(grad_output, x, job, reduction, some(inverse), some(stats))

@softmax_backward.register_fake
def _(grad_output, inverse, stats, x, *rest): return torch.empty_like(x)

def _keep(ctx, inputs, output):
    x, target, weight, prior, eps, *ctx.rest, _ = inputs
    ctx.save_for_backward(*output[1:], x, target, weight, prior, eps)
    ctx.mark_non_differentiable(*output[1:])

def _backward(ctx, grad_output, *_): return softmax_backward(grad_output, *ctx.saved_tensors, *ctx.rest), *[None] * 11

softmax_forward.register_autograd(_backward, setup_context=_keep)
