"""Class indices made safe to gather with, where no kernel sees to that itself."""
import torch
from torch import Tensor
from .checks import check_indices
from .formula import Job

def looked_up(job: Job, x: Tensor, traced: bool = False) -> Job:
    "The job with indices that are safe to gather with, and where they are ignored and where invalid (None: nowhere)."
    if not job.is_index: return job
    index, k = job.target.long(), x.shape[job.axis]
    if torch.compiler.is_compiling(): index = checked_indices(index, k, job.ignore_index)
    if not traced and index.is_cpu and index.numel():
        lo, hi = index.aminmax()
        lo, hi = lo.item(), hi.item()
        if 0 <= lo and hi < k and not lo <= job.ignore_index <= hi:  # the usual case, in one op
            return job if index is job.target else job.replaced(target=index)
    ignored = index == job.ignore_index
    if traced or index.device.type != 'cpu':
        invalid = ((index < 0) | (index >= k)) & ~ignored
        return job.replaced(target=index.masked_fill(ignored | invalid, 0), ignored=ignored, invalid=invalid)
    check_indices(index, k, ignored)
    return job.replaced(target=index.masked_fill(ignored, 0), ignored=ignored) if bool(ignored.any()) else job.replaced(target=index)

@torch.library.custom_op('fastai_smooth::checked_indices', mutates_args=())
def checked_indices(index: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    "The check as an op, since reading values in a compiled graph would break it."
    if index.device.type == 'cpu': check_indices(index, num_classes, index == ignore_index)
    return index.clone()

@checked_indices.register_fake
def _(index, num_classes, ignore_index): return torch.empty_like(index)

