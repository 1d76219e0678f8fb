"""Arguments of the softmax loss, checked, as the target that it is computed against."""
from __future__ import annotations
import torch
from torch import Tensor
from .autograd import accumulator
from .checks import (OTHER_TARGETS, check_device, check_eps, check_needs_no_index, check_smoothing, check_soft_rows, check_values,
                     check_whole, class_axis, is_index)
from .targets import Smoothing, SoftmaxTarget

def check_targets(x, target, axis, multi_hot) -> bool:
    "Are `target` class indices, rather than labels shaped like `x`? Raises where they are neither."
    rows, dense = x.shape[:axis] + x.shape[axis+1:], multi_hot or target.is_floating_point()
    if not dense and target.dtype == torch.int64 and target.shape == rows != x.shape: return True
    if dense and target.shape != x.shape:
        raise ValueError(f"{'multi-hot' if multi_hot else 'floating point'} targets must be shaped like input, {tuple(x.shape)}, got "
                         f"{tuple(target.shape)}" + ("; class indices are integers: target.long()" if target.shape == rows else ""))
    if dense: return False
    if target.shape == x.shape != rows:
        raise ValueError(f"{target.dtype} targets shaped like input, {tuple(x.shape)}: use float for soft labels, {OTHER_TARGETS}")
    if not is_index(target): raise TypeError(f"class indices must be integers, got {target.dtype}; target.long() makes them")
    if target.shape != rows:
        other = [d for d in range(x.dim()) if target.shape == x.shape[:d] + x.shape[d+1:]]
        if x.dim() == 2: other = []  # for (N, K), a wrong N is as likely
        raise ValueError(f"class indices must have shape {tuple(rows)} for input of shape {tuple(x.shape)} with classes along axis {axis}, "
                         f"got {tuple(target.shape)}" + (f": are classes along another axis? axis={other[0]} fits" if other else ""))
    return True

def prepare(x: Tensor, target: Tensor, s: Smoothing, weight: Tensor | None, ignore_index: int, axis: int,
            look: bool, checked: bool) -> SoftmaxTarget:
    """What the softmax loss of logits `x` is computed against, after all checks but that of class indices, which `resolve_indices` makes.

    Of weight and prior the shapes are looked at alone, their values when a module is built. `look`: values may be read, of soft labels and
    of one eps a class, if that has not been `checked`."""
    check_whole('ignore_index', ignore_index)
    if not x.dim(): raise ValueError(f"input needs an axis of classes, got the scalar {x}")
    axis = class_axis(x, axis)
    k = x.shape[axis]
    if not k: raise ValueError(f"input has no classes along axis {axis}: its shape is {tuple(x.shape)}")
    s = check_smoothing(s, k, weight, values=False)
    if k == 1 and not isinstance(s.eps, Tensor): s = s._replace(eps=0.)  # the one class has the label and all of the smoothing
    if s.prior is not None or weight is not None or isinstance(s.eps, Tensor):
        if look and not checked and isinstance(s.eps, Tensor): check_eps(s.eps)
        for name, v in (('eps', s.eps), ('prior', s.prior), ('weight', weight)): check_values(name, v, x)
        s = s.to(x, accumulator(x))
        if weight is not None: weight = weight.to(x.device, accumulator(x))
    is_index = check_targets(x, target, axis, s.multi_hot)
    check_device(x, target)
    if not is_index:
        check_needs_no_index(s)
        if look and not s.multi_hot: check_soft_rows(target, axis)
        if ignore_index >= 0: raise ValueError(f"ignore_index={ignore_index} needs class indices as targets, got soft ones")
    return SoftmaxTarget(target, is_index, s, axis, weight, ignore_index)
