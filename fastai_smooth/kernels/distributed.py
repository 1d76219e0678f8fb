"""Means over the rows of all processes. DDP averages what each process has a gradient of: with class weights, or ignored rows, the
mean of their means is another one than the mean over all rows. Nothing here is called by the losses: a mean is local, as in PyTorch."""
from __future__ import annotations
import torch
import torch.distributed as dist
from torch import Tensor
from .checks import check_shape, is_index

__all__ = ['global_mean', 'mean_denominator']

def mean_denominator(
    target: Tensor,            # Class indices, of any shape
    weight: Tensor = None,     # [K], as in the loss
    ignore_index: int = -100,  # Rows with this class index count for nothing
) -> Tensor: # A float32 scalar (float64 for a float64 weight)
    """What `reduction='mean'` divides by: the number of rows that are not ignored, or the sum of the weights of their classes.

    Raises a ValueError for other targets than class indices: their mean is over all rows."""
    if not is_index(target): raise ValueError(f"target must be class indices, got {target.dtype}: the mean of other targets is over all rows")
    kept = target.flatten()[target.flatten() != ignore_index].long()
    if weight is None: return torch.tensor(float(len(kept)), device=target.device)
    check_shape('weight', weight, None, 1)
    return weight.detach().to(target.device).to(torch.promote_types(weight.dtype, torch.float32))[kept].sum()

def global_mean(
    loss_sum: Tensor,     # The sum of this process' losses: `reduction='sum'`
    denominator: Tensor,  # What this process' mean would be over, such as `mean_denominator(...)`
    group=None,           # The data-parallel process group (None: all processes)
) -> Tensor: # A scalar, whose mean over the processes is the mean over all rows; 0. where there are none
    """The loss to call `backward` on under DDP, so that its averaged gradients are those of the mean over the rows of all processes.

    One all-reduce of one number, so each process of the group has to call it. Without an initialised process group it is
    `loss_sum / denominator`.

    ```python
    loss = smooth_cross_entropy(logits, target, weight=w, reduction='sum')
    global_mean(loss, mean_denominator(target, w)).backward()
    ```"""
    total, n = torch.as_tensor(denominator, dtype=loss_sum.dtype, device=loss_sum.device).detach().clone(), 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, group=group)
        n = dist.get_world_size(group)
    return loss_sum * (n / torch.where(total == 0, 1, total))
