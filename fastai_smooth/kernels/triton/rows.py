"""What the softmax kernels do with the logits of some rows: sum them up, and make their gradient.

The formula is that of `kernels/softmax.py`. With t_k = w_k * (own * y_k + each * u_k) and A = sum_k t_k, a row of logits x has

    loss = A * lse(x) - sum_k t_k x_k       gradient = A * softmax(x) - t

`targets.coefficients` gives own and each; u is 1, or the prior. Masked classes (-inf) get no share and no gradient.
One pass over the row finds what loss and gradient are made of: `RowSums`. nbs/00_kernels.ipynb derives it.

A block of classes is [lanes, classes of a lane]. A lane is what one thread has of a block, or some of it. Each sums its own classes from
block to block, and `join_lanes` adds up the lanes at the end, since threads wait for one another in each sum over all.

Rows are summed as if no class were masked, which takes a GPU half as many instructions: of these, half precision has none to spare. Only
if the sums tell that some class is, all is done again with care (MASKED)."""
from __future__ import annotations
from typing import NamedTuple
import triton
import triton.language as tl
from .launch import exp, in_kernels
from .. import targets

INF = tl.constexpr(float('inf'))  # a nan is written INF - INF: as a global it would not equal itself, which Triton checks at each launch
coefficients = in_kernels(targets.coefficients)

class Spec(NamedTuple):
    "What kernels are compiled for. Strides are those of the rows, on three axes (`launch.Axes`), and last that of the classes."
    classes: int
    sizes: tuple      # of the axes of rows, but the first
    x: tuple          # strides of the logits
    y: tuple          # of the labels, if they are no class indices
    grad: tuple       # of the gradient
    is_index: bool    # Are targets class indices?
    multi_hot: bool
    others: bool      # spread='others'
    by_class: bool    # Has the prior a row for each class?
    rows: int         # of a tile
    block: int        # classes of a tile
    lanes: int        # in which these lie
    lane_stride: int  # from the first class of a lane to that of the next; 1: a lane has every `lanes`-th class
    prefetch: bool    # Is the next block read while one is summed?
    blocks: int       # of a row
    whole: bool       # Has the last one as many classes as the others?
    acc: tl.dtype     # in which all is computed

class Rows(NamedTuple):
    "Some rows: pointers to where they begin, and what is known of each."
    x: tl.tensor         # logits
    y: tl.tensor | None  # labels, if they are no class indices
    prior: tl.tensor | None
    weight: tl.tensor | None
    label: tl.tensor     # 0 where targets are no class indices
    there: tl.tensor     # Is there such a row?
    counts: tl.tensor    # And is it not ignored?

class Weighted(NamedTuple):
    "Two sums over the classes that are not masked, for weights v_k."
    sum: tl.tensor  # of v_k
    dot: tl.tensor  # of v_k * (x_k - m)

class RowSums(NamedTuple):
    "What is known of the lanes of rows after some blocks of classes, [rows, lanes]; of rows, [rows], once they are joined."
    m: tl.tensor          # the maximum of the logits, but no less than `least`
    sum_exp: tl.tensor    # the sum of exp(x_k - m)
    left: tl.tensor       # how many classes are not masked
    mass: tl.tensor       # the sum of u_k over these, if u is a prior
    w: Weighted           # for weights w_k
    wu: Weighted          # for weights w_k * u_k, if u is a prior
    wy: Weighted          # for weights w_k * y_k, if targets are no class indices; so are those below
    positives: tl.tensor  # the sum of y_k
    y_masked: tl.tensor   # the sum of y_k over the masked classes
    wy_masked: tl.tensor  # the sum of w_k * y_k over the masked classes

class LastBlock(NamedTuple):
    "What stays in registers of the last block of classes."
    e: tl.tensor  # exp(x_k - m)
    m: tl.tensor  # the maximum of each lane in this block
    y: tl.tensor
    u: tl.tensor

class RowGrad(NamedTuple):
    "What the gradient of rows is made of: exp_factor * exp(x_k - m) - w_k * (own * y_k + each * u_k)."
    m: tl.tensor           # the maximum of the logits; nan where the gradient is
    exp_factor: tl.tensor  # A / sum_exp
    own: tl.tensor
    each: tl.tensor
    uniform: tl.tensor     # Is u uniform, since all of the prior's mass is on masked classes?

# --- reading and writing blocks ---------------------------------------------------------------------------------------

@triton.jit
def lanes_of_block(SPEC: tl.constexpr):
    "The first class of each lane in a block, [lanes,1], and what is to be added for the others, [1,classes of a lane]."
    lane, i = tl.arange(0, SPEC.lanes)[:, None], tl.arange(0, SPEC.block // SPEC.lanes)[None]
    if SPEC.lane_stride == 1: return lane, i * SPEC.lanes
    else: return lane * SPEC.lane_stride, i

@triton.jit
def each_class(v): return v[:, None, None]

@triton.jit
def load_block(rows, start, k, there, other, SPEC: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr):
    """Classes start + k of the rows that begin at these pointers, in their own dtype; `other` in rows that are not there, and past the
    last class unless the block is WHOLE."""
    i = k if SPEC.block * STRIDE < 2**31 else k.to(tl.int64)
    pointers = each_class(rows + tl.cast(start, tl.int64) * STRIDE) + (i * STRIDE)[None]
    mask = each_class(there)
    if not WHOLE: mask = mask & (start + k < SPEC.classes)[None]
    return tl.load(pointers, mask=mask, other=other)

@triton.jit
def load_logits(rows, start, k, exists, SPEC: tl.constexpr, WHOLE: tl.constexpr):
    "-inf in rows that do not count, and in blocks that do not exist. What is read is in its own dtype."
    if SPEC.x[3] == 1: return load_block(rows.x, start, k, rows.counts & exists, -INF, SPEC, 1, WHOLE)
    else:  # rows lie next to each other, and several are read at once
        x = load_block(rows.x, start, k, rows.there & exists, -INF, SPEC, SPEC.x[3], WHOLE).to(SPEC.acc)
        return tl.where(each_class(rows.counts), x, -INF)

@triton.jit
def load_labels(rows, start, k, SPEC: tl.constexpr, WHOLE: tl.constexpr):
    "0 where targets are class indices."
    if rows.y is None: return 0.
    else: return load_block(rows.y, start, k, rows.there, 0, SPEC, SPEC.y[3], WHOLE).to(SPEC.acc)

@triton.jit
def load_vector(v, k, SPEC: tl.constexpr): return tl.load(v + k, mask=k < SPEC.classes, other=0.)[None]

@triton.jit
def load_prior(rows, start, k, SPEC: tl.constexpr):
    "u_k: one for all rows, or that of each row's label. 0 where there is no prior."
    if rows.prior is None: return 0.
    elif SPEC.by_class: return load_block(rows.prior + rows.label * SPEC.classes, start, k, rows.counts, 0., SPEC, 1, False)
    else: return load_vector(rows.prior, start + k, SPEC)

@triton.jit
def store_block(g_rows, start, k, values, there, SPEC: tl.constexpr, WHOLE: tl.constexpr):
    i = k if SPEC.block * SPEC.grad[3] < 2**31 else k.to(tl.int64)
    mask = each_class(there)
    if not WHOLE: mask = mask & (start + k < SPEC.classes)[None]
    pointers = each_class(g_rows + tl.cast(start, tl.int64) * SPEC.grad[3]) + (i * SPEC.grad[3])[None]
    tl.store(pointers, values.to(g_rows.dtype.element_ty), mask=mask)

# --- the sums ---------------------------------------------------------------------------------------------------------

@triton.jit
def least(SPEC: tl.constexpr):
    "The least finite number. Maxima are no less, nor are differences of them, so that neither meets -inf - -inf or -inf * 0."
    if SPEC.acc == tl.float64: return -1.7976931348623157e308
    else: return -3.4028234663852886e38

@triton.jit
def no_sums(SPEC: tl.constexpr):
    ROWS: tl.constexpr = SPEC.rows
    LANES: tl.constexpr = SPEC.lanes
    zero = tl.zeros([ROWS, LANES], SPEC.acc)
    none = Weighted(zero, zero)
    return RowSums(m=zero + least(SPEC), sum_exp=zero, left=zero, mass=zero, w=none, wu=none, wy=none,
                   positives=zero, y_masked=zero, wy_masked=zero)

@triton.jit
def add_weighted(before, move, v, v_d):
    "The sums with a block's. `move` is the old maximum less the new one, from which each x_k - m is now counted."
    return Weighted(before.sum + tl.sum(v, 2), before.dot + move * before.sum + tl.sum(v_d, 2))

@triton.jit
def add_block(sums, k, count, x, y, u, rows, SPEC: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr):
    """The sums with those of a block, and its exp(x - m): classes k, `count` of them a lane, of logits x, labels y and prior u.

    This is the online softmax, whose sums move with the maximum. WHOLE: no k is past the last class. MASKED: some x may be -inf."""
    m = tl.maximum(sums.m, tl.max(x, 2))
    move, d = tl.maximum(sums.m - m, least(SPEC)), x - m[:, :, None]
    e = exp(d)
    if MASKED: keep = x != -INF
    elif not WHOLE: keep = (k < SPEC.classes)[None]
    if MASKED or not WHOLE: d = tl.where(keep, d, 0.)
    left, mass, w_k, w_d = sums.left + count, sums.mass, 1., d
    if MASKED:
        w_k = keep.to(x.dtype)
        left = sums.left + tl.sum(w_k, 2)
        if rows.prior is not None: mass += tl.sum(w_k * u, 2)
    positives, y_masked, wy_masked, wu, wy = sums.positives, sums.y_masked, sums.wy_masked, sums.wu, sums.wy
    if not SPEC.is_index:
        positives += tl.sum(y, 2)
        if MASKED: y_masked += tl.sum(tl.where(keep, 0., y), 2)
    if rows.weight is None:
        w = Weighted(left, sums.w.dot + move * sums.w.sum + tl.sum(d, 2))
        wy_masked = y_masked
    else:
        weight_k = load_vector(rows.weight, k, SPEC)
        w_k, w_d = w_k * weight_k, d * weight_k
        if MASKED and not SPEC.is_index: wy_masked += tl.sum(tl.where(keep, 0., y * weight_k), 2)
        w = add_weighted(sums.w, move, w_k, w_d)
    if rows.prior is not None: wu = add_weighted(wu, move, w_k * u, w_d * u)
    if not SPEC.is_index: wy = add_weighted(wy, move, w_k * y, w_d * y)
    return RowSums(m=m, sum_exp=sums.sum_exp * exp(move) + tl.sum(e, 2), left=left, mass=mass, w=w, wu=wu, wy=wy,
                   positives=positives, y_masked=y_masked, wy_masked=wy_masked), e

@triton.jit
def join_weighted(lanes, move): return Weighted(tl.sum(lanes.sum, 1), tl.sum(lanes.dot + move * lanes.sum, 1))

@triton.jit
def join_lanes(lanes, rows, SPEC: tl.constexpr, MASKED: tl.constexpr):
    "The sums of rows by those of their lanes, each of which has a maximum of its own."
    m = tl.max(lanes.m, 1)
    move = tl.maximum(lanes.m - m[:, None], least(SPEC))
    ROWS: tl.constexpr = SPEC.rows
    left, mass = tl.full([ROWS], SPEC.classes, SPEC.acc), tl.full([ROWS], 1., SPEC.acc)
    w = join_weighted(lanes.w, move)
    if MASKED: left, mass = tl.sum(lanes.left, 1), tl.sum(lanes.mass, 1)
    if rows.weight is None: w = Weighted(left, w.dot)
    return RowSums(m=m, sum_exp=tl.sum(lanes.sum_exp * exp(move), 1), left=left, mass=mass,
                   w=w, wu=join_weighted(lanes.wu, move), wy=join_weighted(lanes.wy, move),
                   positives=tl.sum(lanes.positives, 1), y_masked=tl.sum(lanes.y_masked, 1), wy_masked=tl.sum(lanes.wy_masked, 1))

@triton.jit
def sum_rows(rows, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """The sums of rows, and the `LastBlock`.

    The last block, which may not be whole, comes first. The others need not ask where the last class is. Where SPEC says so, the next
    one is on its way while one is summed. It is kept in its own dtype: converting it would be to wait for it."""
    first, within = lanes_of_block(SPEC)
    k, last = first + within, (SPEC.blocks - 1) * SPEC.block
    count = SPEC.block // SPEC.lanes
    if not SPEC.whole: count = tl.sum((last + k < SPEC.classes).to(SPEC.acc), 1)[None]
    x = load_logits(rows, last, k, True, SPEC, SPEC.whole).to(SPEC.acc)
    y, u = load_labels(rows, last, k, SPEC, SPEC.whole), load_prior(rows, last, k, SPEC)
    sums, e = add_block(no_sums(SPEC), last + k, count, x, y, u, rows, SPEC, SPEC.whole, MASKED)
    block = LastBlock(e=e, m=sums.m, y=y, u=u)
    if SPEC.prefetch: coming = load_logits(rows, 0, k, True, SPEC, True)
    for start in range(0, last, SPEC.block):
        if SPEC.prefetch: x_now, coming = coming, load_logits(rows, start + SPEC.block, k, start + SPEC.block < last, SPEC, True)
        else: x_now = load_logits(rows, start, k, True, SPEC, True)
        y_now, u_now = load_labels(rows, start, k, SPEC, True), load_prior(rows, start, k, SPEC)
        sums, e = add_block(sums, start + k, SPEC.block // SPEC.lanes, x_now.to(SPEC.acc), y_now, u_now, rows, SPEC, True, MASKED)
    return join_lanes(sums, rows, SPEC, MASKED), block

@triton.jit
def finish_rows(sums, rows, eps, label_x, label_w, SPEC: tl.constexpr):
    "The losses of rows, and what their gradient is made of. For class indices `label_x` and `label_w` are logit and weight of the label."
    m, wy, wu = sums.m, sums.wy, sums.w
    positives, mass = 1, None
    if SPEC.is_index:
        keep = label_x != -INF
        present = keep.to(m.dtype)
        wy = Weighted(label_w, tl.where(keep, label_w * (label_x - m), 0.))
    elif SPEC.multi_hot: positives, present = sums.positives, sums.positives - sums.y_masked
    else: present = (sums.y_masked == 0).to(m.dtype)
    if rows.prior is not None: mass = sums.mass
    own, each, own_masked, uniform = coefficients(eps, sums.left, positives, present, mass, SPEC.others)
    if rows.prior is not None: wu = Weighted(tl.where(uniform, wu.sum, sums.wu.sum), tl.where(uniform, wu.dot, sums.wu.dot))
    total = own * wy.sum + each * wu.sum                         # A = sum_k t_k
    if SPEC.is_index: t_masked = tl.where(keep, 0., own * wy.sum)  # of masked classes; the own of a masked label is own_masked
    else:
        t_masked = own_masked * sums.wy_masked
        total += t_masked
    dot = own * wy.dot + tl.where(each == 0, 0., each * wu.dot)  # sum_k t_k (x_k - m); wu.dot may be -inf, and 0 * -inf is nan
    losses = total * tl.log(sums.sum_exp) - dot
    losses = tl.where(t_masked != 0, INF, losses)
    dead = sums.sum_exp == 0                                     # all classes are masked
    row = RowGrad(m=tl.where(dead, INF - INF, m), exp_factor=total / sums.sum_exp, own=own, each=each, uniform=uniform)
    return tl.where(dead, INF - INF, losses), row

# --- the gradient -----------------------------------------------------------------------------------------------------

@triton.jit
def gradient(first, within, e, factor, x, y, u, rows, row, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """The gradient of classes first + within: factor * e - t, where factor * e is exp_factor * exp(x - m); 0 for masked ones, but nan
    where all are.

    The label is compared with `within`, which are numbers that the code is compiled with."""
    t = each_class(row.each)                                    # t_k = w_k * (own * y_k + each * u_k)
    if rows.prior is not None: t = t * tl.where(each_class(row.uniform), 1., u)
    if SPEC.is_index: t = tl.where(within[None] == each_class(rows.label.to(tl.int32)) - first[None], t + each_class(row.own), t)
    else: t = t + each_class(row.own) * y
    if rows.weight is not None: t = t * load_vector(rows.weight, first + within, SPEC)
    grad = factor * e - t
    if MASKED: grad = tl.where((x == -INF) & each_class(row.m == row.m), 0., grad)
    return grad

@triton.jit
def store_gradient(g_rows, rows, row, block, SPEC: tl.constexpr, MASKED: tl.constexpr):
    "Stores the gradient of rows, of whose last block `block` is known. The others are read again, backwards: they may be in the cache."
    first, within = lanes_of_block(SPEC)
    k, last = first + within, (SPEC.blocks - 1) * SPEC.block
    x = 0.
    if MASKED: x = load_logits(rows, last, k, True, SPEC, SPEC.whole).to(SPEC.acc)
    factor = (row.exp_factor[:, None] * exp(block.m - row.m[:, None]))[:, :, None]
    grad = gradient(last + first, within, block.e, factor, x, block.y, block.u, rows, row, SPEC, MASKED)
    store_block(g_rows, last, k, grad, rows.there, SPEC, SPEC.whole)
    if SPEC.prefetch: coming = load_logits(rows, last - SPEC.block, k, last > 0, SPEC, True)
    for done in range(0, last, SPEC.block):
        start = last - SPEC.block - done
        if SPEC.prefetch: x_now, coming = coming, load_logits(rows, start - SPEC.block, k, start > 0, SPEC, True)
        else: x_now = load_logits(rows, start, k, True, SPEC, True)
        y_now, u_now = load_labels(rows, start, k, SPEC, True), load_prior(rows, start, k, SPEC)
        x_now = x_now.to(SPEC.acc)
        e = exp(x_now - each_class(row.m))
        grad_now = gradient(start + first, within, e, each_class(row.exp_factor), x_now, y_now, u_now, rows, row, SPEC, MASKED)
        store_block(g_rows, start, k, grad_now, rows.there, SPEC, True)
