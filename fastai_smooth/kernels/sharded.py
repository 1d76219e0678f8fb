"""The softmax head for classes that are too many for one device: logits as a DTensor that is sharded along the class axis.

The softmax's denominator and sum_k t_k x_k are sums over classes. Each rank adds up its own classes, and two all-reduces make
them whole: a maximum (N numbers) and both sums (2 N), whatever K is. The backward moves nothing. The rule of a gradient for
masked classes (-inf) is that of `targets.py`; rows that have some take another sum (8 N)."""
import math, sys
from typing import Optional
import torch
import torch.distributed as dist
from torch import Tensor
from .formula import Job, accumulator
from .indices import looked_up
from .targets import along, effective_eps

def is_sharded(x) -> bool:
    "Is `x` a DTensor? Whoever has one has imported them, which takes half a second."
    tensors = sys.modules.get('torch.distributed.tensor')
    return hasattr(tensors, 'DTensor') and isinstance(x, tensors.DTensor)  # torch 2.4 has the module without it

def check_options(**options):
    "Options have a value for each class, the same on all ranks."
    for name, v in options.items():
        if is_sharded(v): raise ValueError(f"{name} must be whole on every rank, a plain tensor, got a DTensor: pass {name}.full_tensor()")
        if isinstance(v, Tensor) and v.requires_grad: raise ValueError(f"{name} gets no gradient where input is sharded along its classes: detach it")

def class_dim(x, axis: int) -> int:
    "The one mesh dimension along which `x` has its classes sharded; a ValueError for what is not a sharding of rows and classes."
    from torch.distributed.tensor import Shard
    over = [d for d, p in enumerate(x.placements) if p.is_shard(axis)]
    odd = [p for p in x.placements if not (p.is_replicate() or type(p) is Shard)]
    if odd or len(over) != 1:
        raise ValueError(f"input as a DTensor must have its classes (axis {axis}) sharded along exactly one mesh dimension, and be Shard(rows) or "
                         f"Replicate along the others, got {x.placements}: x.redistribute(placements=...) changes that, x.full_tensor() undoes all sharding")
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

def sharded_loss(x, job: Job, reduction: str) -> Tensor:
    "The loss of a DTensor of logits, as a plain tensor that is whole on every rank."
    if not job.is_index: raise ValueError("input is sharded along its classes: target must be class indices, got soft or multi-hot ones")
    dim, placements, mesh = class_dim(x, job.axis), row_placements(x, job.axis), x.device_mesh
    job = looked_up(Job(local_rows(job.target, mesh, placements), True, job.smoothing, job.axis, job.weight, job.ignore_index), x, torch.compiler.is_compiling())
    size = -(-x.shape[job.axis] // mesh.size(dim))  # of all shards but the last ones, as torch.chunk has it
    local, k, low = x.to_local(), x.shape[job.axis], size * mesh.get_local_rank(dim)
    if local.shape[job.axis] != max(0, min(size, k - low)):
        raise ValueError(f"input must have its {k} classes in shards of {size}, as torch.chunk makes them, got one of {local.shape[job.axis]}")
    rows, w = local_losses(local, job, k, low, mesh.get_group(dim).group_name)
    return assembled(rows, w, job, reduction, mesh, placements, x.shape[:job.axis] + x.shape[job.axis + 1:])

def local_losses(x: Tensor, job: Job, k: int, low: int, group: str):
    "The losses of this rank's rows and what they weigh, from its shard of the logits, whose first class is number `low` of `k`."
    s, y, here = job.smoothing, job.target, slice(low, low + x.shape[job.axis])
    e, u, v = s.eps, s.prior, job.weight
    mass = torch.ones((), device=x.device) if u is None and v is None else (1 / k if u is None else u) * (1 if v is None else v)
    mass = mass.sum(-1) if mass.dim() else mass  # sum_k w_k u_k, of each class for a prior [K,K]
    rows = torch.ones(y.shape, dtype=accumulator(x), device=x.device)
    e, w = rows * (e[y] if isinstance(e, Tensor) else e), rows if v is None else rows * v[y]
    if job.ignored is not None: e, w = e.masked_fill(job.ignored, 0), w.masked_fill(job.ignored, 0)
    if job.invalid is not None: w = w.masked_fill(job.invalid, math.nan)
    if u is not None: u = along(u[here], job.axis, x.dim()) if u.dim() == 1 else u[:, here][y].movedim(-1, job.axis)
    if v is not None: v = along(v[here], job.axis, x.dim())
    loss, _ = forward(x, y, e, w, rows * (mass[y] if mass.dim() else mass), u, v, job.axis, low, k, s.spread, group)
    return loss, w

def assembled(rows, w, job, reduction, mesh, placements, shape):
    "The reduced loss of the whole batch, of which other ranks may have other rows."
    from torch.distributed.tensor import DTensor, Partial
    split = [d for d, p in enumerate(placements) if p.is_shard()]
    if reduction == 'none':
        return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=rows.new_empty(shape, device='meta').stride()).full_tensor() if split else rows
    left = rows.new_full((), rows.numel()) if job.ignored is None else (~job.ignored).sum()
    sums = torch.stack([rows.sum(), w.sum(), left.to(rows.dtype)])
    if split:
        sums = DTensor.from_local(sums, mesh, [Partial() if d in split else p for d, p in enumerate(placements)], run_check=False).full_tensor()
    loss, weight, left = sums.unbind()
    return loss if reduction == 'sum' else loss / torch.where(left > 0, weight / (weight != 0), 1)

# --- custom ops: torch.compile takes them as they are, collectives and the look at masked classes included -------------

@torch.library.custom_op('fastai_smooth::sharded_forward', mutates_args=())
def forward(x: Tensor, y: Tensor, e: Tensor, w: Tensor, mass: Tensor, u: Optional[Tensor], v: Optional[Tensor], axis: int, low: int, k: int,
            spread: str, group: str) -> tuple[Tensor, Tensor]:
    """Losses of the rows, and what their gradient is made of: maximum, factor of exp(x - maximum), own, f and g, where t is
    own * onehot(y) + v * (f * u + g). `y` are the rows' classes, `e` their eps, `w` their weights; `u` and `v` the shard's prior and weights."""
    group, size = dist.distributed_c10d._resolve_process_group(group), x.shape[axis]
    def summed(*parts):
        out = torch.stack(parts)
        dist.all_reduce(out, group=group)
        return out.unbind()
    most = x.amax(axis).to(e.dtype) if size else torch.full_like(e, -math.inf)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    z, here, uniform = x.to(e.dtype) - most.unsqueeze(axis), (y >= low) & (y < low + size), 1 / k if u is None else u
    z_y = torch.where(here, z.gather(axis, (y - low).clamp(0, size - 1).unsqueeze(axis)).squeeze(axis), 0.) if size else torch.zeros_like(e)
    f = effective_eps(e, spread, 1, k)
    own = (1 - f) * w
    s, dot = summed(z.exp().sum(axis), times(own, z_y) + f * weighed(z * uniform, v, axis))
    terms = own + f * mass, dot, own, f, torch.zeros_like(f)
    odd = ~dot.isfinite() & (terms[0] != 0)
    if bool(odd.any()): terms = (torch.where(odd, a, b) for a, b in zip(masked_terms(z, z_y, here, e, w, uniform, v, axis, spread, summed), terms))
    total, dot, own, f, g = terms
    ignored = total == 0  # whatever is there
    return torch.where(ignored, 0., total * s.log() - dot), torch.stack([most, torch.where(ignored, 0., total / s), own, f, g])

def times(own, z): return torch.where(own == 0, 0., own * z)  # 0 * -inf is 0

def weighed(values, v, axis): return (values if v is None else values * v).sum(axis)

def masked_terms(z, z_y, here, e, w, u, v, axis, spread, summed):
    "sum_k t_k, sum_k t_k z_k, own, f and g where classes are masked, on whichever rank: they get nothing of eps, the others all of it."
    keep = z > -math.inf
    z, kept = z.masked_fill(~keep, 0), keep.to(e.dtype)
    there, z_y, n, each, each_z, given, prior, prior_z = summed(
        (here & z_y.isfinite()).to(e.dtype), z_y.masked_fill(~z_y.isfinite(), 0), kept.sum(axis), weighed(kept, v, axis), weighed(z, v, axis),
        (kept * u).sum(axis), weighed(kept * u, v, axis), weighed(z * u, v, axis))
    e = effective_eps(e, spread, there, n)
    # where the prior gave all of its mass to masked classes, uniform is what is left to say
    own, f, g = (1 - e) * w, torch.where(given > 0, e / given, 0.), torch.where(given > 0, 0., e / n)
    lost = times(own, torch.where(there > 0, z_y, -math.inf))
    return own + f * prior + g * each, lost + f * prior_z + g * each_z, own, f, g

@torch.library.custom_op('fastai_smooth::sharded_backward', mutates_args=())
def backward(grad_output: Tensor, x: Tensor, y: Tensor, stats: Tensor, u: Optional[Tensor], v: Optional[Tensor], axis: int, low: int, k: int) -> Tensor:
    "The gradient of this rank's logits, from what the forward left: no rank asks another."
    size, (most, factor, own, f, g) = x.shape[axis], stats.unsqueeze(axis + 1)
    if not size: return torch.empty_like(x)
    p = (x.to(stats.dtype) - most).exp_().mul_(factor)
    t = f / k if u is None else f * u
    p -= (t + g) * (1 if v is None else v)
    at = (y - low).unsqueeze(axis)
    p.scatter_add_(axis, at.clamp(0, size - 1), torch.where((at >= 0) & (at < size), -own, 0.))
    p.masked_fill_((x == -math.inf) & (most > -math.inf), 0)
    return p.masked_fill_(factor == 0, 0).mul_(grad_output.unsqueeze(axis)).to(x.dtype)

@forward.register_fake
def _(x, y, e, w, mass, u, v, axis, low, k, spread, group): return torch.empty_like(e), e.new_empty(5, *e.shape)

@backward.register_fake
def _(grad_output, x, y, stats, u, v, axis, low, k): return torch.empty_like(x)

def _keep(ctx, inputs, output):
    x, y, _, _, _, u, v, *rest = inputs
    ctx.save_for_backward(x, y, output[1], u, v)
    ctx.rest = rest[:3]

def _grads(ctx, grad_output, _): return backward(grad_output, *ctx.saved_tensors, *ctx.rest), *[None] * 11

forward.register_autograd(_grads, setup_context=_keep)
