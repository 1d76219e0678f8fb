"""Cutting a tensor into chunks that fit the cache, so that what is made of them costs neither memory nor bandwidth."""
from __future__ import annotations
from torch import Tensor
from .autograd import on_cpu

def chunks(x: Tensor, axis: int | None, megabytes: int):
    """Indices that cut `x` into chunks of at most so many MB in float32, leaving `axis` (the classes) whole; `...` for the whole of it.

    The axes of the largest strides are cut first, so that a chunk lies together in memory. Where the classes of one row alone
    are more than that, a chunk is a row. On other devices than the CPU there is one chunk: launches cost more."""
    limit = megabytes << 18
    if not on_cpu(x) or x.numel() <= limit: return [...]
    order = sorted((d for d in range(x.dim()) if d != axis), key=lambda d: -x.stride(d))
    return list(_cut([slice(None)] * x.dim(), order, x.shape, x.numel(), limit))

def _cut(index, order, shape, numel, limit):
    if numel <= limit or not order: yield tuple(index); return
    d, *rest = order
    size = numel // shape[d]         # of one position along axis d
    step = max(1, limit // size)
    for i in range(0, shape[d], step):
        chunk = [*index]
        chunk[d] = slice(i, i + step)
        yield from _cut(chunk, rest, shape, size * min(step, shape[d] - i), limit)

def part(v, chunk):
    "The chunk of a tensor; of a number, of None, or of a tensor with a single value, itself."
    return v[chunk] if isinstance(v, Tensor) and v.dim() and chunk is not ... else v
