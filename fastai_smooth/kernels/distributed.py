"""Means over the rows of all processes. DDP averages what each process has a gradient of: with class weights, or ignored rows, the
mean of their means is another one than the mean over all rows. Nothing here is called by the losses: a mean is local, as in PyTorch."""
from __future__ import annotations
import torch
import torch.distributed as dist
from torch import Tensor
from .autograd import tracing
from .checks import check_dense, check_indices, check_number, check_shape, check_whole, is_index

__all__ = ['global_mean', 'mean_denominator']

def mean_denominator(
    target: Tensor,            # Class indices, of any shape
    weight: Tensor = None,     # [K], as in the loss
    ignore_index: int = -100,  # Rows with this class index count for nothing
) -> Tensor: # A float32 scalar (float64 for a float64 weight)
    """What `reduction='mean'` divides by: the number of rows that are not ignored, or the sum of the weights of their classes.

    Raises a ValueError for other targets than class indices, whose mean is over all rows, and for weights of another shape; a
    TypeError for what is no tensor of real numbers; and an IndexError for a class index out of range on the CPU (on CUDA the
    loss will be nan)."""
    check_dense('target', target)
    check_whole('ignore_index', ignore_index)
    if not is_index(target):
        raise ValueError(f"target must be class indices, got {target.dtype}: the mean of other targets is over all rows")
    kept = target != ignore_index
    if weight is None: return kept.sum(dtype=torch.float32)
    check_shape('weight', weight, None, 1)
    if target.device.type == 'cpu' and not tracing(target): check_indices(target, len(weight), ~kept)
    of_rows = weight.detach().to(target.device, torch.promote_types(weight.dtype, torch.float32))[target.long().clamp(0, len(weight) - 1)]
    return of_rows.masked_fill(~kept, 0).sum()

def global_mean(
    loss_sum: Tensor,     # The sum of this process' losses, a scalar: `reduction='sum'`
    denominator: Tensor,  # What this process' mean would be over, a scalar or number such as `mean_denominator(...)`
    group=None,           # The data-parallel process group (None: all processes)
) -> Tensor: # A scalar, whose mean over the processes is the mean over all rows; 0. where there are none
    """The loss to call `backward` on under DDP, so that its averaged gradients are those of the mean over the rows of all processes.

    `loss_sum` is a sum, and no mean that is multiplied: a mean of rows that all weigh 0 is nan. One all-reduce of one
    number, so each process of the group has to call it. Without an initialised process group it is
    `loss_sum / denominator`. Raises a ValueError for what is no scalar, a TypeError for what is no tensor or number.

    ```python
    loss = smooth_cross_entropy(logits, target, weight=w, reduction='sum')
    global_mean(loss, mean_denominator(target, w)).backward()
    ```"""
    check_dense('loss_sum', loss_sum)
    check_number('denominator', denominator) if not isinstance(denominator, Tensor) else check_dense('denominator', denominator)
    total = torch.as_tensor(denominator, dtype=torch.promote_types(loss_sum.dtype, torch.float32), device=loss_sum.device).detach().clone()
    for name, v in (('loss_sum', loss_sum), ('denominator', total)):
        if v.dim(): raise ValueError(f"{name} must be a scalar, got shape {tuple(v.shape)}: sum it up")
    n = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, group=group)
        n = dist.get_world_size(group)
    return loss_sum * (n / torch.where(total == 0, 1, total))
