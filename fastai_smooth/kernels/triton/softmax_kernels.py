"The softmax loss's kernels, which `softmax.py` launches. What they do with a few rows is in `rows.py`."
from __future__ import annotations
import triton
import triton.language as tl
from .launch import Sums, add_partials, exp, in_kernels, offsets, store_sums, unless_one
from .rows import (INF, RowGrad, Rows, each_class, finish_rows, gradient, lanes_of_block, load_labels, load_logits, load_prior, store_block,
                   store_gradient, sum_rows)
from .. import targets

mean_over = in_kernels(targets.mean_over)

@triton.jit
def find_labels(i, target, outer, ignore_index, SPEC: tl.constexpr):
    """Of rows number i: Is there such a row? Does it count, since it isn't ignored? Is its label, which counts, no class? And the label.

    It is 0 where it is ignored, is no class, or is no class index."""
    there = i // (SPEC.sizes[0] * SPEC.sizes[1]) < outer
    ROWS: tl.constexpr = SPEC.rows
    label, counts, invalid = tl.zeros([ROWS], tl.int64), there, tl.zeros([ROWS], tl.int1)
    if SPEC.is_index:
        label = tl.load(target + i, mask=there, other=0).to(tl.int64)
        counts = there & (label != ignore_index)
        is_class = (label >= 0) & (label < SPEC.classes)
        invalid = counts & (is_class == 0)
        label = tl.where(counts & is_class, label, 0)
    return there, counts, invalid, label

@triton.jit
def times_grad_output(row, grad_output, denominator, scale, i, counts, SPEC: tl.constexpr, REDUCED: tl.constexpr):
    "The gradient, linear in three of its parts, times scale / denominator * grad_output. 0 in rows that do not count, whatever that is."
    factor = tl.full((), scale, SPEC.acc)
    if denominator is not None: factor /= tl.load(denominator)
    if grad_output is not None:
        if REDUCED: factor *= tl.load(grad_output).to(SPEC.acc)
        else: factor *= tl.load(grad_output + i, mask=counts, other=0.).to(SPEC.acc)
    factor = tl.where(counts, factor, 0.)
    return RowGrad(m=row.m, exp_factor=row.exp_factor * factor, own=row.own * factor, each=row.each * factor, uniform=row.uniform)

@triton.jit
def store_stats(row_stats, row, i, n, there):
    "Keeps what the gradient of rows number i, of n, is made of."
    tl.store(row_stats + i, row.m, mask=there)
    tl.store(row_stats + n + i, row.exp_factor, mask=there)
    tl.store(row_stats + 2 * n + i, row.own, mask=there)
    tl.store(row_stats + 3 * n + i, tl.where(row.uniform, -row.each, row.each), mask=there)  # the sign says whether u is uniform

@triton.jit
def load_stats(row_stats, i, n, there):
    "What `store_stats` has kept."
    m, exp_factor = tl.load(row_stats + i, mask=there, other=0.), tl.load(row_stats + n + i, mask=there, other=0.)
    own, each = tl.load(row_stats + 2 * n + i, mask=there, other=0.), tl.load(row_stats + 3 * n + i, mask=there, other=0.)
    return RowGrad(m=m, exp_factor=exp_factor, own=own, each=tl.abs(each), uniform=each < 0)

@triton.jit
def without_lost_rows(row, counts, invalid):
    "The gradient of rows that do not count is 0, and nan where the label is no class."
    m = tl.where(invalid, INF - INF, tl.where(counts, row.m, 0.))
    exp_factor, own, each = tl.where(counts, row.exp_factor, 0.), tl.where(counts, row.own, 0.), tl.where(counts, row.each, 0.)
    return RowGrad(m=m, exp_factor=exp_factor, own=own, each=each, uniform=row.uniform)

@triton.jit(do_not_specialize=['scale', 'eps_number', 'outer', 'tiles', 'ignore_index'])
def softmax_kernel(x, target, weight, prior, eps, loss, grad, grad_output, denominator, row_stats, partials, ticket,
                   scale: tl.float64, eps_number: tl.float64, outer, tiles, ignore_index, SPEC: tl.constexpr, EPS_PER_CLASS: tl.constexpr,
                   REDUCED: tl.constexpr, SUM_WEIGHTS: tl.constexpr, GRAD_READY: tl.constexpr):
    """Loss, gradient or both: what there is a pointer for.

    `eps` points to one value a class, or to one for all; where it is None, `eps_number` is it. SUM_WEIGHTS: the loss is a mean over the
    rows' weights, whose sum goes to `denominator`; else that is read, if there is one. `row_stats` gets what `gradient_kernel` needs
    of each row. GRAD_READY: `grad` has the gradient for a `grad_output` of 1."""
    if GRAD_READY: tiles = unless_one(tiles, grad_output)
    ROWS: tl.constexpr = SPEC.rows
    sum_loss, sum_weight, count = tl.full((), 0., SPEC.acc), tl.full((), 0., SPEC.acc), tl.full((), 0., SPEC.acc)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tl.cast(tile, tl.int64) * SPEC.rows + tl.arange(0, SPEC.rows)
        there, counts, invalid, label = find_labels(i, target, outer, ignore_index, SPEC)
        x_rows, y_rows, label_x, label_w = x + offsets(i, tl.constexpr(SPEC.sizes), tl.constexpr(SPEC.x)), None, None, None
        if not SPEC.is_index: y_rows = target + offsets(i, tl.constexpr(SPEC.sizes), tl.constexpr(SPEC.y))
        rows = Rows(x=x_rows, y=y_rows, prior=prior, weight=weight, label=label, there=there, counts=counts)
        row_eps = tl.full([ROWS], eps_number, SPEC.acc)
        if eps is not None and not EPS_PER_CLASS: row_eps += tl.load(eps)
        if SPEC.is_index:
            label_x = tl.load(x_rows + label * SPEC.x[3], mask=counts, other=0.).to(SPEC.acc)
            label_w = tl.full([ROWS], 1., SPEC.acc)
            if weight is not None: label_w = tl.load(weight + label)
            if EPS_PER_CLASS: row_eps = tl.load(eps + label)
        sums, block = sum_rows(rows, SPEC, False)
        # Is some class of some row masked? Then the sum is infinite, or nan where that met a 0.
        masked = tl.max((counts & ((tl.abs(sums.w.dot) < INF) == 0)).to(tl.int32), 0) > 0
        if masked: sums, _ = sum_rows(rows, SPEC, True)
        losses, row = finish_rows(sums, rows, row_eps, label_x, label_w, SPEC)
        if SPEC.is_index:
            losses = tl.where(invalid, INF - INF, losses)
            row = without_lost_rows(row, counts, invalid)

        if loss is not None:
            losses = tl.where(counts, losses, 0.)
            if REDUCED: sum_loss += tl.sum(losses, 0)
            else: tl.store(loss + i, losses, mask=there)
            if SUM_WEIGHTS:
                sum_weight += tl.sum(tl.where(counts & (invalid == 0), label_w, 0.), 0)
                count += tl.sum(counts.to(SPEC.acc), 0)
        if row_stats is not None:
            store_stats(row_stats, row, i, tl.cast(outer, tl.int64) * (SPEC.sizes[0] * SPEC.sizes[1]), there)
        if grad is not None:
            g_rows = grad + offsets(i, tl.constexpr(SPEC.sizes), tl.constexpr(SPEC.grad))
            row = times_grad_output(row, grad_output, denominator, scale, i, counts, SPEC, REDUCED)
            if masked: store_gradient(g_rows, rows, row, block, SPEC, True)
            else: store_gradient(g_rows, rows, row, block, SPEC, False)

    if loss is not None and REDUCED:
        if store_sums(Sums(loss=sum_loss, weight=sum_weight, rows=count), partials, ticket):
            sums = add_partials(partials, ticket)
            factor = tl.full((), scale, SPEC.acc)
            if SUM_WEIGHTS:
                over = mean_over(sums.weight, sums.rows)
                tl.store(denominator, over)
                factor /= over
            elif denominator is not None: factor /= tl.load(denominator)
            tl.store(loss, sums.loss * factor)

@triton.jit(do_not_specialize=['scale', 'outer', 'tiles', 'ignore_index'])
def gradient_kernel(x, target, weight, prior, grad, grad_output, denominator, row_stats, scale: tl.float64, outer, tiles, ignore_index,
                    SPEC: tl.constexpr, REDUCED: tl.constexpr, GRAD_READY: tl.constexpr):
    "The gradient by the forward's `row_stats`, where rows are longer than a block: each program does blocks of rows, in any order."
    if GRAD_READY: tiles = unless_one(tiles, grad_output)
    n = tl.cast(outer, tl.int64) * (SPEC.sizes[0] * SPEC.sizes[1])
    first, within = lanes_of_block(SPEC)
    k = first + within
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tl.cast(tile // SPEC.blocks, tl.int64) * SPEC.rows + tl.arange(0, SPEC.rows)
        start = (SPEC.blocks - 1 - tile % SPEC.blocks) * SPEC.block
        there, counts, invalid, label = find_labels(i, target, outer, ignore_index, SPEC)
        x_rows, y_rows = x + offsets(i, tl.constexpr(SPEC.sizes), tl.constexpr(SPEC.x)), None
        if not SPEC.is_index: y_rows = target + offsets(i, tl.constexpr(SPEC.sizes), tl.constexpr(SPEC.y))
        rows = Rows(x=x_rows, y=y_rows, prior=prior, weight=weight, label=label, there=there, counts=counts)
        row = times_grad_output(load_stats(row_stats, i, n, there), grad_output, denominator, scale, i, counts, SPEC, REDUCED)
        logits = load_logits(rows, start, k, True, SPEC, False).to(SPEC.acc)
        y, u = load_labels(rows, start, k, SPEC, False), load_prior(rows, start, k, SPEC)
        e = exp(logits - each_class(row.m))
        grads = gradient(start + first, within, e, each_class(row.exp_factor), logits, y, u, rows, row, SPEC, True)
        store_block(grad + offsets(i, tl.constexpr(SPEC.sizes), tl.constexpr(SPEC.grad)), start, k, grads, there, SPEC, False)

@triton.jit(do_not_specialize=['n', 'tiles', 'ignore_index'])
def denominator_kernel(target, weight, denominator, partials, ticket, n, tiles, ignore_index, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
                       ACC: tl.constexpr):
    "What a mean over class indices is over, for a forward that makes the gradient and so has to know it before."
    sum_weight, count = tl.full((), 0., ACC), tl.full((), 0., ACC)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        label = tl.load(target + i, mask=i < n, other=0).to(tl.int64)
        counts = (i < n) & (label != ignore_index)
        count += tl.sum(counts.to(ACC), 0)
        in_range = counts & (label >= 0) & (label < CLASSES)
        if weight is not None: sum_weight += tl.sum(tl.load(weight + label, mask=in_range, other=0.), 0)
    if weight is None: sum_weight = count
    if store_sums(Sums(loss=0., weight=sum_weight, rows=count), partials, ticket):
        sums = add_partials(partials, ticket)
        tl.store(denominator, mean_over(sums.weight, sums.rows))
