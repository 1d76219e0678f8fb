"""The softmax head's kernels, which `softmax.py` launches.

The formula is that of `kernels/softmax.py`. With t_k = w_k * (own * y_k + each * u_k) and A = sum_k t_k, a row of logits x has

    loss = A * lse(x) - sum_k t_k x_k       gradient = A * softmax(x) - t

`targets.coefficients` gives own and each; u is 1, or the prior. Masked classes (-inf) get no share and no gradient.
One pass over the row finds what loss and gradient are made of: `RowSums`. nbs/00_kernels.ipynb derives it."""
from __future__ import annotations
from typing import NamedTuple
import triton
import triton.language as tl
from .launch import Sums, add_partials, in_kernels, offsets, store_sums, unless_one
from .. import targets

INF = tl.constexpr(float('inf'))  # a nan is written INF - INF: as a global it would not equal itself, which Triton checks at each launch
coefficients, mean_over = in_kernels(targets.coefficients), in_kernels(targets.mean_over)

class Weighted(NamedTuple):
    "Two sums over the classes that are not masked, for weights v_k."
    sum: tl.tensor  # of v_k
    dot: tl.tensor  # of v_k * (x_k - m)

class RowSums(NamedTuple):
    "What is known of rows after some blocks of classes."
    m: tl.tensor          # the maximum of the logits
    sum_exp: tl.tensor    # the sum of exp(x_k - m)
    left: tl.tensor       # how many classes are not masked
    mass: tl.tensor       # the sum of u_k over these, if u is a prior
    w: Weighted           # for weights w_k
    wu: Weighted          # for weights w_k * u_k, if u is a prior
    wy: Weighted          # for weights w_k * y_k, if targets are no class indices; so are those below
    positives: tl.tensor  # the sum of y_k
    y_masked: tl.tensor   # the sum of y_k over the masked classes
    wy_masked: tl.tensor  # the sum of w_k * y_k over the masked classes

class RowGrad(NamedTuple):
    "What the gradient of rows is made of: exp_factor * exp(x_k - m) - w_k * (own * y_k + each * u_k)."
    m: tl.tensor           # the maximum of the logits
    exp_factor: tl.tensor  # A / sum_exp
    own: tl.tensor
    each: tl.tensor
    uniform: tl.tensor     # Is u uniform, since all of the prior's mass is on masked classes?

@triton.jit
def load_block(rows, k, mask, other, C: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr):
    "Classes k of the rows that begin at these pointers; `other` in rows out of `mask` and past the last class. 0 where `rows` is None."
    if rows is None: return 0.
    else:
        i = k if C * STRIDE < 2**31 else k.to(tl.int64)
        return tl.load(rows[:, None] + (i * STRIDE)[None, :], mask=mask[:, None] & (k < C)[None, :], other=other).to(ACC)

@triton.jit
def store_block(rows, k, values, mask, counts, C: tl.constexpr, STRIDE: tl.constexpr):
    "Stores classes k of the rows in `mask`: 0 in those that do not count."
    i = k if C * STRIDE < 2**31 else k.to(tl.int64)
    values = tl.where(counts[:, None], values, 0.).to(rows.dtype.element_ty)
    tl.store(rows[:, None] + (i * STRIDE)[None, :], values, mask=mask[:, None] & (k < C)[None, :])

@triton.jit
def no_sums(ROWS: tl.constexpr, ACC: tl.constexpr):
    zero = tl.zeros([ROWS], ACC)
    none = Weighted(zero, zero)
    return RowSums(m=zero - INF, sum_exp=zero, left=zero, mass=zero, w=none, wu=none, wy=none,
                   positives=zero, y_masked=zero, wy_masked=zero)

@triton.jit
def add_weighted(before, move, v, v_x):
    "The sums with a block's. `move` is the old maximum less the new one, from which each x_k - m is now counted."
    return Weighted(before.sum + tl.sum(v, 1), before.dot + move * before.sum + tl.sum(v_x, 1))

@triton.jit
def add_block(sums, k, x, y, weight, prior, C: tl.constexpr, INDEX: tl.constexpr):
    "The sums with those of a block: classes k, of logits x and labels y. This is the online softmax, whose sums move with the maximum."
    m = tl.maximum(sums.m, tl.max(x, 1))
    top = tl.where(m == -INF, 0., m)                                # all classes so far are masked, and -inf - -inf would be nan
    move = tl.where(sums.m == -INF, 0., sums.m - top)               # all before this block are masked: their sums are 0 and stay so
    keep = x != -INF
    w_k = keep.to(x.dtype)                                          # w_k of classes that are not masked,
    w_x_k = tl.where(keep, x - top[:, None], 0.)                    # w_k * (x_k - m) of these,
    wy_masked_k = tl.where(keep, 0., y)                             # and w_k * y_k of the masked ones: for w = 1 so far
    sum_exp = sums.sum_exp * tl.exp(move) + tl.sum(tl.exp(x - top[:, None]), 1)
    left = sums.left + tl.sum(w_k, 1)
    mass, wu, wy = sums.mass, sums.wu, sums.wy
    positives, y_masked, wy_masked = sums.positives, sums.y_masked, sums.wy_masked
    # the order of what follows spills the fewest registers
    if not INDEX:
        positives += tl.sum(y, 1)
        y_masked += tl.sum(wy_masked_k, 1)
    if weight is not None:
        weight_k = tl.load(weight + k, mask=k < C, other=0.)[None, :]
        w_x_k, wy_masked_k = w_x_k * weight_k, wy_masked_k * weight_k
    if not INDEX: wy_masked += tl.sum(wy_masked_k, 1)
    if prior is not None:
        u_k = tl.load(prior + k, mask=k < C, other=0.)[None, :]
        mass += tl.sum(w_k * u_k, 1)
    if weight is not None: w_k *= weight_k
    w = add_weighted(sums.w, move, w_k, w_x_k)
    if prior is not None: wu = add_weighted(wu, move, w_k * u_k, w_x_k * u_k)
    if not INDEX: wy = add_weighted(wy, move, w_k * y, w_x_k * y)
    return RowSums(m=m, sum_exp=sum_exp, left=left, mass=mass, w=w, wu=wu, wy=wy,
                   positives=positives, y_masked=y_masked, wy_masked=wy_masked)

@triton.jit
def finish_rows(sums, eps, label_x, label_w, PRIOR: tl.constexpr, INDEX: tl.constexpr, MULTI_HOT: tl.constexpr, OTHERS: tl.constexpr):
    "The losses of rows, and what their gradient is made of. For class indices `label_x` and `label_w` are logit and weight of the label."
    m, wy, wu = sums.m, sums.wy, sums.w
    positives, mass = 1, None
    if INDEX:
        keep = label_x != -INF
        present = keep.to(m.dtype)
        wy = Weighted(label_w, tl.where(keep, label_w * (label_x - m), 0.))
    elif MULTI_HOT: positives, present = sums.positives, sums.positives - sums.y_masked
    else: present = (sums.y_masked == 0).to(m.dtype)
    if PRIOR: mass = sums.mass
    own, each, own_masked, uniform = coefficients(eps, sums.left, positives, present, mass, OTHERS)
    if PRIOR: wu = Weighted(tl.where(uniform, wu.sum, sums.wu.sum), tl.where(uniform, wu.dot, sums.wu.dot))
    total = own * wy.sum + each * wu.sum                         # A = sum_k t_k
    if INDEX: t_masked = tl.where(keep, 0., own * wy.sum)        # the part of masked classes; the own of a masked label is own_masked
    else:
        t_masked = own_masked * sums.wy_masked
        total += t_masked
    dot = own * wy.dot + tl.where(each == 0, 0., each * wu.dot)  # sum_k t_k (x_k - m); wu.dot may be -inf, and 0 * -inf is nan
    losses = total * tl.log(sums.sum_exp) - dot
    losses = tl.where(t_masked != 0, INF, losses)
    dead = m == -INF                                             # all classes are masked
    row = RowGrad(m=tl.where(dead, INF - INF, m), exp_factor=total / sums.sum_exp, own=own, each=each, uniform=uniform)
    return tl.where(dead, INF - INF, losses), row

@triton.jit
def gradient(k, x, y, weight, prior, label, row, C: tl.constexpr, INDEX: tl.constexpr):
    "The gradient of classes k, exp_factor * exp(x - m) - t, and 0 for masked ones."
    t = row.each[:, None]                                                # t_k = w_k * (own * y_k + each * u_k)
    if prior is not None: t = t * tl.where(row.uniform[:, None], 1., tl.load(prior + k, mask=k < C, other=0.)[None, :])
    if INDEX: t = t + tl.where(k[None, :] == label[:, None], row.own[:, None], 0.)
    else: t = t + row.own[:, None] * y
    if weight is not None: t = t * tl.load(weight + k, mask=k < C, other=0.)[None, :]
    grad = row.exp_factor[:, None] * tl.exp(x - row.m[:, None]) - t
    return tl.where((x == -INF) & (row.m == row.m)[:, None], 0., grad)   # nan where all are masked

@triton.jit
def times_grad_output(row, grad_output, denominator, scale, rows, mask, REDUCED: tl.constexpr, ACC: tl.constexpr):
    "The gradient, which is linear in three of its parts, times scale / denominator * grad_output."
    factor = tl.full((), scale, ACC)
    if denominator is not None: factor /= tl.load(denominator)
    if grad_output is not None:
        if REDUCED: factor *= tl.load(grad_output).to(ACC)
        else: factor *= tl.load(grad_output + rows, mask=mask, other=0.).to(ACC)
    return RowGrad(m=row.m, exp_factor=row.exp_factor * factor, own=row.own * factor, each=row.each * factor, uniform=row.uniform)

@triton.jit(do_not_specialize=['scale', 'eps_number', 'outer', 'tiles', 'ignore_index'])
def softmax_kernel(x, target, weight, prior, eps, loss, grad, grad_output, denominator, row_stats, partials, ticket,
                   scale: tl.float64, eps_number: tl.float64, outer, tiles, ignore_index,
                   C: tl.constexpr, SIZES: tl.constexpr, XS: tl.constexpr, YS: tl.constexpr, GS: tl.constexpr,
                   INDEX: tl.constexpr, MULTI_HOT: tl.constexpr, OTHERS: tl.constexpr, EPS_PER_CLASS: tl.constexpr, REDUCED: tl.constexpr,
                   SUM_WEIGHTS: tl.constexpr, GRAD_READY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Loss, gradient or both: what there is a pointer for.

    XS, YS and GS are the strides of logits, labels (unless they are class INDEX) and gradient; the last of each is that of the classes.
    `eps` points to one value a class, or to one for all; where it is None, `eps_number` is it. SUM_WEIGHTS: the loss is a mean over the
    rows' weights, whose sum goes to `denominator`; else that is read, if there is one. `row_stats` gets what `gradient_kernel` needs
    of each row. GRAD_READY: `grad` has the gradient for a `grad_output` of 1."""
    if GRAD_READY: tiles = unless_one(tiles, grad_output)
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    sum_loss, sum_weight, count = tl.full((), 0., ACC), tl.full((), 0., ACC), tl.full((), 0., ACC)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = rows // (SIZES[0] * SIZES[1]) < outer    # is there such a row?
        counts = mask                                   # and is it not ignored?
        x_rows, y_rows, label, label_x, label_w = x + offsets(rows, SIZES, XS), None, None, None, None
        row_eps = tl.full([ROWS], eps_number, ACC)
        if eps is not None and not EPS_PER_CLASS: row_eps += tl.load(eps)
        if INDEX:
            label = tl.load(target + rows, mask=mask, other=0).to(tl.int64)
            counts = mask & (label != ignore_index)
            in_range = (label >= 0) & (label < C)
            invalid = counts & ~in_range
            label = tl.where(counts & in_range, label, 0)
            label_x, label_w = tl.load(x_rows + label * XS[3], mask=counts, other=0.).to(ACC), tl.full([ROWS], 1., ACC)
            if weight is not None: label_w = tl.load(weight + label)
            if EPS_PER_CLASS: row_eps = tl.load(eps + label)
        else: y_rows = target + offsets(rows, SIZES, YS)
        read = counts                                   # ignored rows are not read,
        if XS[3] != 1: read = mask                      # unless rows lie next to each other: several are read at once then

        k0 = tl.arange(0, BLOCK)
        x0 = load_block(x_rows, k0, read, -INF, C, XS[3], ACC)
        y0 = load_block(y_rows, k0, read, 0, C, YS[3], ACC)
        sums = add_block(no_sums(ROWS, ACC), k0, x0, y0, weight, prior, C, INDEX)
        for block in range(1, BLOCKS):
            k = block * BLOCK + k0
            xb = load_block(x_rows, k, read, -INF, C, XS[3], ACC)
            yb = load_block(y_rows, k, read, 0, C, YS[3], ACC)
            sums = add_block(sums, k, xb, yb, weight, prior, C, INDEX)
        losses, row = finish_rows(sums, row_eps, label_x, label_w, prior is not None, INDEX, MULTI_HOT, OTHERS)
        if INDEX:
            losses = tl.where(invalid, INF - INF, losses)
            row = RowGrad(m=tl.where(invalid, INF - INF, row.m), exp_factor=row.exp_factor, own=row.own, each=row.each, uniform=row.uniform)

        if loss is not None:
            losses = tl.where(counts, losses, 0.)
            if REDUCED: sum_loss += tl.sum(losses, 0)
            else: tl.store(loss + rows, losses, mask=mask)
            if SUM_WEIGHTS:
                sum_weight += tl.sum(tl.where(counts, label_w, 0.), 0)
                count += tl.sum(counts.to(ACC), 0)
        if row_stats is not None:
            n = tl.cast(outer, tl.int64) * (SIZES[0] * SIZES[1])
            tl.store(row_stats + rows, row.m, mask=mask)
            tl.store(row_stats + n + rows, row.exp_factor, mask=mask)
            tl.store(row_stats + 2 * n + rows, row.own, mask=mask)
            tl.store(row_stats + 3 * n + rows, tl.where(row.uniform, -row.each, row.each), mask=mask)  # the sign says whether u is uniform
        if grad is not None:
            g_rows = grad + offsets(rows, SIZES, GS)
            row = times_grad_output(row, grad_output, denominator, scale, rows, mask, REDUCED, ACC)
            for block in range(1, BLOCKS):              # the last block first: it is still in the cache
                k = (BLOCKS - block) * BLOCK + k0
                xb = load_block(x_rows, k, read, -INF, C, XS[3], ACC)
                yb = load_block(y_rows, k, read, 0, C, YS[3], ACC)
                store_block(g_rows, k, gradient(k, xb, yb, weight, prior, label, row, C, INDEX), mask, counts, C, GS[3])
            store_block(g_rows, k0, gradient(k0, x0, y0, weight, prior, label, row, C, INDEX), mask, counts, C, GS[3])

    if loss is not None and REDUCED:
        if store_sums(Sums(loss=sum_loss, weight=sum_weight, rows=count), partials, ticket):
            sums = add_partials(partials, ticket)
            factor = tl.full((), scale, ACC)
            if SUM_WEIGHTS:
                over = mean_over(sums.weight, sums.rows)
                tl.store(denominator, over)
                factor /= over
            elif denominator is not None: factor /= tl.load(denominator)
            tl.store(loss, sums.loss * factor)

@triton.jit(do_not_specialize=['scale', 'outer', 'tiles', 'ignore_index'])
def gradient_kernel(x, target, weight, prior, grad, grad_output, denominator, row_stats, scale: tl.float64, outer, tiles, ignore_index,
                    C: tl.constexpr, SIZES: tl.constexpr, XS: tl.constexpr, YS: tl.constexpr, GS: tl.constexpr, INDEX: tl.constexpr,
                    REDUCED: tl.constexpr, GRAD_READY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    "The gradient by the forward's `row_stats`, where rows are longer than a block: each program does blocks of rows, in any order."
    if GRAD_READY: tiles = unless_one(tiles, grad_output)
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    n = tl.cast(outer, tl.int64) * (SIZES[0] * SIZES[1])
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = tl.cast(tile // BLOCKS, tl.int64) * ROWS + tl.arange(0, ROWS)
        k = (BLOCKS - 1 - tile % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        mask = rows // (SIZES[0] * SIZES[1]) < outer
        counts, label, y_rows = mask, None, None
        if INDEX:
            label = tl.load(target + rows, mask=mask, other=0).to(tl.int64)
            counts = mask & (label != ignore_index)
        else: y_rows = target + offsets(rows, SIZES, YS)
        read = counts
        if XS[3] != 1: read = mask
        x_block = load_block(x + offsets(rows, SIZES, XS), k, read, -INF, C, XS[3], ACC)
        y_block = load_block(y_rows, k, read, 0, C, YS[3], ACC)
        m, exp_factor = tl.load(row_stats + rows, mask=mask, other=0.), tl.load(row_stats + n + rows, mask=mask, other=0.)
        own, each = tl.load(row_stats + 2 * n + rows, mask=mask, other=0.), tl.load(row_stats + 3 * n + rows, mask=mask, other=0.)
        row = RowGrad(m=m, exp_factor=exp_factor, own=own, each=tl.abs(each), uniform=each < 0)  # as the forward has stored it
        row = times_grad_output(row, grad_output, denominator, scale, rows, mask, REDUCED, ACC)
        grads = gradient(k, x_block, y_block, weight, prior, label, row, C, INDEX)
        store_block(grad + offsets(rows, SIZES, GS), k, grads, mask, counts, C, GS[3])

@triton.jit(do_not_specialize=['n', 'tiles', 'ignore_index'])
def denominator_kernel(target, weight, denominator, partials, ticket, n, tiles, ignore_index,
                       C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    "What a mean over class indices is over, for a forward that makes the gradient and so has to know it before."
    sum_weight, count = tl.full((), 0., ACC), tl.full((), 0., ACC)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        label = tl.load(target + rows, mask=rows < n, other=0).to(tl.int64)
        counts = (rows < n) & (label != ignore_index)
        count += tl.sum(counts.to(ACC), 0)
        if weight is not None: sum_weight += tl.sum(tl.load(weight + label, mask=counts & (label >= 0) & (label < C), other=0.), 0)
    if weight is None: sum_weight = count
    if store_sums(Sums(loss=0., weight=sum_weight, rows=count), partials, ticket):
        sums = add_partials(partials, ticket)
        tl.store(denominator, mean_over(sums.weight, sums.rows))
