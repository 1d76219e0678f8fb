"""The softmax loss for classes that are too many for one device: logits as a DTensor that is sharded along the class axis.

The softmax's denominator and sum_k t_k x_k are sums over classes. Each rank adds up its own classes, and two all-reduces make
them whole: a maximum (N numbers) and both sums (2 N), whatever K is. The backward moves nothing. The rule of a gradient for
masked classes (-inf) is that of `targets.py`; rows that have some take another sum (8 N)."""
import math
from typing import Optional
import torch
import torch.distributed as dist
from torch import Tensor
from .autograd import accumulator
from .checks import is_sharded, resolve_indices
from .targets import SoftmaxTarget, along, coefficients, mean_over

def check_options(**options):
    "Options have a value for each class, the same on all ranks."
    for name, v in options.items():
        if is_sharded(v): raise ValueError(f"{name} must be whole on every rank, a plain tensor, got a DTensor: pass {name}.full_tensor()")
        if isinstance(v, Tensor) and v.requires_grad:
            raise ValueError(f"{name} gets no gradient where input is sharded along its classes: detach it")

def class_dim(x, axis: int) -> int:
    "The one mesh dimension along which `x` has its classes sharded; a ValueError for what is not a sharding of rows and classes."
    from torch.distributed.tensor import Shard
    over = [d for d, p in enumerate(x.placements) if p.is_shard(axis)]
    odd = [p for p in x.placements if not (p.is_replicate() or type(p) is Shard)]
    if odd or len(over) != 1:
        raise ValueError(f"input as a DTensor must have its classes (axis {axis}) sharded along exactly one mesh dimension, and be "
                         f"Shard(rows) or Replicate along the others, got {x.placements}: x.redistribute(placements=...) changes that, "
                         "x.full_tensor() undoes all sharding")
    return over[0]

def row_placements(x, axis: int) -> tuple:
    "How what has a value a row lies on the mesh."
    from torch.distributed.tensor import Replicate, Shard
    lies = lambda p: next((Shard(i) for i, d in enumerate(d for d in range(x.dim()) if d != axis) if p.is_shard(d)), Replicate())
    return tuple(lies(p) for p in x.placements)

def local_rows(target, mesh, placements):
    "This rank's part of the targets, which come whole (a plain tensor, the same on all ranks) or lie as the rows do."
    from torch.distributed.tensor import DTensor, Replicate
    if not is_sharded(target):
        if all(p.is_replicate() for p in placements): return target
        target = DTensor.from_local(target, mesh, [Replicate()] * mesh.ndim, run_check=False)
    elif target.device_mesh != mesh: raise ValueError(f"target is on {target.device_mesh}, input on {mesh}: redistribute one of them")
    if tuple(target.placements) not in (placements, (Replicate(),) * mesh.ndim):
        raise ValueError(f"target as a DTensor must be replicated, or lie as the rows of input do, {placements}, got {target.placements}")
    return target.redistribute(placements=placements).to_local()

def sharded_loss(x, target: SoftmaxTarget, reduction: str) -> Tensor:
    "The loss of a DTensor of logits, as a plain tensor that is whole on every rank."
    if not target.is_index: raise ValueError("input is sharded along its classes: target must be class indices, got soft or multi-hot ones")
    axis, mesh, k = target.axis, x.device_mesh, x.shape[target.axis]
    dim, placements = class_dim(x, axis), row_placements(x, axis)
    target = resolve_indices(target._replace(target=local_rows(target.target, mesh, placements)), x, torch.compiler.is_compiling())
    size = -(-k // mesh.size(dim))  # of all shards but the last ones, as torch.chunk has it
    local, low = x.to_local(), size * mesh.get_local_rank(dim)
    if local.shape[axis] != max(0, min(size, k - low)):
        raise ValueError(f"input must have its {k} classes in shards of {size}, as torch.chunk makes them, got one of {local.shape[axis]}")
    losses, weights = local_losses(local, target, k, low, mesh.get_group(dim).group_name)
    return assembled(losses, weights, target, reduction, mesh, placements, x.shape[:axis] + x.shape[axis + 1:])

def local_losses(x: Tensor, target: SoftmaxTarget, k: int, low: int, group: str):
    "The losses of this rank's rows and what they weigh, from its shard of the logits, whose first class is number `low` of `k`."
    s, y, axis, here = target.smoothing, target.target, target.axis, slice(low, low + x.shape[target.axis])
    u, v = s.prior, target.weight
    mass = torch.full((), k, device=x.device) if u is None and v is None else ((1 if u is None else u) * (1 if v is None else v)).sum(-1)
    rows = torch.ones(y.shape, dtype=accumulator(x), device=x.device)
    e, w = rows * (s.eps[y] if isinstance(s.eps, Tensor) else s.eps), rows if v is None else rows * v[y]
    if target.ignored is not None: w = w.masked_fill(target.ignored, 0)
    if target.invalid is not None: w = w.masked_fill(target.invalid, math.nan)
    counts = rows if target.ignored is None else (~target.ignored).to(rows.dtype)
    if u is not None: u = along(u[here], axis, x.dim()) if u.dim() == 1 else u[:, here][y].movedim(-1, axis)
    if v is not None: v = along(v[here], axis, x.dim())
    losses, _ = forward(x, y, e, w, counts, rows * (mass[y] if mass.dim() else mass), u, v, axis, low, k, s.spread, group)
    return losses, w

def assembled(rows, w, target, reduction, mesh, placements, shape):
    "The reduced loss of the whole batch, of which other ranks may have other rows."
    from torch.distributed.tensor import DTensor, Partial
    split = [d for d, p in enumerate(placements) if p.is_shard()]
    if reduction == 'none':
        if not split: return rows
        stride = rows.new_empty(shape, device='meta').stride()
        return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()
    left = rows.new_full((), rows.numel()) if target.ignored is None else (~target.ignored).sum(dtype=rows.dtype)
    sums = torch.stack([rows.sum(), w.sum(), left])
    if split:
        parts = [Partial() if d in split else p for d, p in enumerate(placements)]
        sums = DTensor.from_local(sums, mesh, parts, run_check=False).full_tensor()
    loss, weight, left = sums.unbind()
    return loss if reduction == 'sum' else loss / mean_over(weight, left)

# --- custom ops: torch.compile takes them as they are, collectives and the look at masked classes included -------------

@torch.library.custom_op('fastai_smooth::sharded_forward', mutates_args=())
def forward(x: Tensor, y: Tensor, e: Tensor, w: Tensor, counts: Tensor, mass: Tensor, u: Optional[Tensor], v: Optional[Tensor],
            axis: int, low: int, k: int, spread: str, group: str) -> tuple[Tensor, Tensor]:
    """Losses of the rows, and what their gradient is made of: the maximum, the factor of exp(x - maximum), own, each and plain, where t is
    own * onehot(y) + v * (each * u + plain). `y` are the rows' classes, `e` their eps, `w` their weights, 0 in `counts` ignores a row;
    `mass` is sum_k v_k u_k over all classes, `u` and `v` are the shard's prior and weights."""
    group, size = dist.distributed_c10d._resolve_process_group(group), x.shape[axis]
    def summed(*parts):
        out = torch.stack(parts)
        dist.all_reduce(out, group=group)
        return out.unbind()
    top = x.amax(axis).to(e.dtype) if size else torch.full_like(e, -math.inf)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    z, here = x.to(e.dtype) - top.unsqueeze(axis), (y >= low) & (y < low + size)
    z_y = torch.where(here, z.gather(axis, (y - low).clamp(0, size - 1).unsqueeze(axis)).squeeze(axis), 0.) if size else torch.zeros_like(e)
    own, each, *_ = coefficients(e, k, mass=None if u is None else 1, others=spread == 'others')
    own, each = own * w, each * counts
    s, dot = summed(z.exp().sum(axis), times(own, z_y) + each * weighed(z if u is None else z * u, v, axis))
    terms = own + each * mass, dot, own, each, torch.zeros_like(each)
    odd = ~dot.isfinite() & (terms[0] != 0)
    if bool(odd.any()):
        masked = masked_terms(z, z_y, here, e, w, u, v, axis, spread, summed)
        terms = (torch.where(odd, a, b) for a, b in zip(masked, terms))
    total, dot, own, each, plain = terms
    ignored = total == 0  # whatever is there
    return torch.where(ignored, 0., total * s.log() - dot), torch.stack([top, torch.where(ignored, 0., total / s), own, each, plain])

def times(own, z): return torch.where(own == 0, 0., own * z)  # 0 * -inf is 0

def weighed(values, v, axis): return (values if v is None else values * v).sum(axis)

def masked_terms(z, z_y, here, e, w, u, v, axis, spread, summed):
    "A, sum_k t_k z_k, own, each and plain where classes are masked, on whichever rank: they get nothing of eps, the others all of it."
    keep = z > -math.inf
    z, kept = z.masked_fill(~keep, 0), keep.to(e.dtype)
    prior = 1 if u is None else u
    present, z_y, left, plain, plain_z, mass, given, given_z = summed(
        (here & z_y.isfinite()).to(e.dtype), z_y.masked_fill(~z_y.isfinite(), 0),
        kept.sum(axis), weighed(kept, v, axis), weighed(z, v, axis),
        (kept * prior).sum(axis), weighed(kept * prior, v, axis), weighed(z * prior, v, axis))
    own, each, own_masked, uniform = coefficients(e, left, 1, present, None if u is None else mass, spread == 'others')
    uniform = torch.zeros_like(each) if u is None else uniform.to(each.dtype)
    own, each, plain_each = torch.where(present > 0, own, own_masked) * w, each * (1 - uniform), each * uniform
    own_z = times(own, torch.where(present > 0, z_y, -math.inf))
    return own + each * given + plain_each * plain, own_z + each * given_z + plain_each * plain_z, own, each, plain_each

@torch.library.custom_op('fastai_smooth::sharded_backward', mutates_args=())
def backward(grad_output: Tensor, x: Tensor, y: Tensor, stats: Tensor, u: Optional[Tensor], v: Optional[Tensor],
             axis: int, low: int) -> Tensor:
    "The gradient of this rank's logits, from what the forward left: no rank asks another."
    size, (top, factor, own, each, plain) = x.shape[axis], stats.unsqueeze(axis + 1)
    if not size: return torch.empty_like(x)
    p = (x.to(stats.dtype) - top).exp_().mul_(factor)
    p -= ((each if u is None else each * u) + plain) * (1 if v is None else v)
    index = (y - low).unsqueeze(axis)
    p.scatter_add_(axis, index.clamp(0, size - 1), torch.where((index >= 0) & (index < size), -own, 0.))
    p.masked_fill_((x == -math.inf) & (top > -math.inf), 0)
    return p.masked_fill_(factor == 0, 0).mul_(grad_output.unsqueeze(axis)).to(x.dtype)

@forward.register_fake
def _(x, y, e, w, counts, mass, u, v, axis, low, k, spread, group): return torch.empty_like(e), e.new_empty(5, *e.shape)

@backward.register_fake
def _(grad_output, x, y, stats, u, v, axis, low): return torch.empty_like(x)

def _keep(ctx, inputs, output):
    x, y, *_, u, v, axis, low, _, _, _ = inputs
    ctx.save_for_backward(x, y, output[1], u, v)
    ctx.axis, ctx.low = axis, low

def _grads(ctx, grad_output, _): return backward(grad_output, *ctx.saved_tensors, ctx.axis, ctx.low), *[None] * 12

forward.register_autograd(_grads, setup_context=_keep)
