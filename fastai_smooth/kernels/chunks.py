"""Cutting a tensor into pieces that fit the cache, so that temporaries cost neither memory nor bandwidth."""
from __future__ import annotations
from torch import Tensor

WHOLE = ...  # the index of a chunk that is all there is

def chunks(x: Tensor, axis: int | None = None, megabytes: int = 1, outer: bool = False):
    """Indices that cut `x` into pieces of at most so many MB in float32, leaving `axis` (the classes) whole.

    The axes of the largest strides are cut first, so a piece lies together in memory; with `outer` only the axes before
    `axis`, so that a piece of a contiguous tensor is contiguous. Where the classes of one row alone are more than that, a
    piece is a row. On other devices than the CPU there is one piece: launches cost more."""
    limit = megabytes << 18
    if not x.is_cpu or x.numel() <= limit: return [WHOLE]
    axes = range(axis if outer else x.dim())
    order = sorted((d for d in axes if d != axis), key=lambda d: -x.stride(d))
    return list(_cut([slice(None)] * x.dim(), order, x.shape, x.numel(), limit))

def _cut(index, order, shape, numel, limit):
    if numel <= limit or not order: yield tuple(index); return
    d, *rest = order
    each = numel // shape[d]         # elements at one position of axis d
    step = max(1, limit // each)
    for i in range(0, shape[d], step):
        at = [*index]
        at[d] = slice(i, i + step)
        yield from _cut(at, rest, shape, each * min(step, shape[d] - i), limit)

def part(v, at):
    "The chunk `at` of a tensor; of a number, or None, itself."
    return v[at] if isinstance(v, Tensor) and at is not WHOLE else v
