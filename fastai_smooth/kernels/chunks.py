"""Cutting a tensor into pieces that fit the cache, so that temporaries cost neither memory nor bandwidth."""
from __future__ import annotations
from torch import Tensor

CHUNK_BYTES = 2**20

def chunks(x: Tensor, axis: int | None = None):
    """Index tuples that cut `x` into pieces of at most 1 MB in float32, leaving `axis` (the classes) whole.

    The axes of the largest strides are cut first, so a piece lies together in memory. Where the classes of one row
    alone are more than that, a piece is a row. On other devices than the CPU there is one piece: launches cost more."""
    whole = [slice(None)] * x.dim()
    limit = CHUNK_BYTES // 4
    if x.device.type != 'cpu' or x.numel() <= limit: return [tuple(whole)]
    order = sorted((d for d in range(x.dim()) if d != axis), key=lambda d: -x.stride(d))
    return list(_cut(whole, order, x.shape, x.numel(), limit))

def _cut(index, order, shape, numel, limit):
    if numel <= limit or not order: yield tuple(index); return
    d, *rest = order
    each = numel // shape[d]         # elements at one position of axis d
    step = max(1, limit // each)
    for i in range(0, shape[d], step):
        at = [*index]
        at[d] = slice(i, i + step)
        yield from _cut(at, rest, shape, each * min(step, shape[d] - i), limit)
