"""Arguments of the losses: as plain tensors, and those of the softmax loss, checked, as the target that it is computed against."""
from __future__ import annotations
import torch
import torch.nn.functional as F
from torch import Tensor
from .autograd import accumulator, has_no_storage
from .checks import (OTHER_TARGETS, check_dense, check_device, check_eps, check_linear, check_needs_no_index, check_smoothing,
                     check_soft_rows, check_values, check_whole, class_axis, is_index)
from .linear import LinearLogits
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

# --- as plain tensors -------------------------------------------------------------------------------------------------

def unwrapped(name, t):
    """A tensor without its subclass (fastai's TensorBase); those that carry their own dispatch (fake, distributed) stay.

    One from inference mode could not be saved for a backward: a copy of it can."""
    if type(t) is LinearLogits: return t
    if type(t) is not Tensor:
        if not isinstance(t, Tensor): check_dense(name, t)
        if type(t).__torch_dispatch__ == Tensor.__torch_dispatch__: t = t.as_subclass(Tensor)
    if t.layout is not torch.strided or t.is_nested: check_dense(name, t)
    if torch.compiler.is_compiling(): return t
    if t.is_neg(): t = t.resolve_neg()  # torch's copy_ of float16 to float32 would lose the sign
    return t.clone() if t.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled() else t

def unwrapped_logits(input):
    "The logits, unwrapped; a TypeError for what is not floating point."
    x = unwrapped('input', input)
    if not x.is_floating_point(): raise TypeError(f"input must be floating point logits, got {x.dtype}")
    return x

def tensor_of(name, v):
    "`v`, or a tensor of what is in its lists, array or DataFrame."
    try: return torch.as_tensor(v.to_numpy().copy() if hasattr(v, "to_numpy") else v)  # pandas' own array may be read-only
    except (TypeError, ValueError, RuntimeError) as e:
        raise TypeError(f"{name} must be a tensor, or numbers in lists or an array, got {type(v).__name__} ({e})") from None

def unwrapped_options(s):
    "A `Smoothing` whose tensors are."
    if s.prior is None and not isinstance(s.eps, Tensor): return s
    eps = unwrapped('eps', s.eps) if isinstance(s.eps, Tensor) else s.eps
    return Smoothing(eps, None if s.prior is None else unwrapped('prior', s.prior), s.spread, s.multi_hot)

def needs_grad(*others) -> bool:
    "Does anything else than the logits need a gradient?"
    if torch.is_grad_enabled():
        for o in others:
            if isinstance(o, Tensor) and o.requires_grad: return True
    return False

def broadcast(name, v, x):
    "A tensor in the accumulator's dtype, broadcast to the shape of `x` without a copy; None as it is."
    if v is None: return v
    v = unwrapped(name, v)
    check_dense(name, v)
    check_values(name, v, x)
    try: return v.to(x.device, accumulator(x)).expand(x.shape)
    except RuntimeError: raise ValueError(f"{name} must broadcast to input's shape {tuple(x.shape)}, got {tuple(v.shape)}") from None

def linear_logits(input, linear_weight, linear_bias=None, chunk_rows=None) -> Tensor:
    "What the losses take in place of `F.linear(input, linear_weight, linear_bias)`."
    if torch.compiler.is_compiling(): return F.linear(input, linear_weight, linear_bias)
    if chunk_rows is not None: check_whole('chunk_rows', chunk_rows, 1)
    x, weight = unwrapped_logits(input), unwrapped('linear_weight', linear_weight)
    bias = None if linear_bias is None else unwrapped('linear_bias', linear_bias)
    check_linear(x, weight, bias)
    if has_no_storage(x, weight): return F.linear(x, weight, bias)  # under torch.func, and of tensors that are fake or distributed
    return LinearLogits(x, weight, bias, chunk_rows)
