"""When a gradient is made, by whom, and how it meets its scale: the same for both heads."""
from __future__ import annotations
import torch
from torch import Tensor

def transforming() -> bool:
    "Is a torch.func transform (grad, vmap, ...) or forward-mode AD at work? Then only plain ops are understood."
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0

def tracing(*tensors) -> bool:
    "Can values not be read here: under torch.compile, torch.func, or for tensors with no values?"
    return torch.compiler.is_compiling() or opaque(*tensors)

def opaque(*tensors) -> bool:
    "Is there no memory to hand to a kernel: under torch.func, or for tensors with no values?"
    if transforming(): return True
    for t in tensors:
        if type(t) is not Tensor or t.is_meta: return True
    return False

def early(x: Tensor):
    "Can the gradient be made before its scale is known? Not in float16, where that of a mean would underflow before."
    return x.dtype != torch.float16

def scaled_grad(x, grad, grad_output, scale, make):
    """`grad`, which has been made for `scale`, times `grad_output`; where it is None, `make(scale, out)` makes it.

    In float16 all scaling is done before it is rounded. On the CPU it is free to see that there is none to do."""
    late, by = not early(x), grad_output.item() if x.is_cpu and not grad_output.dim() else grad_output
    if grad is None:
        grad = torch.empty_like(x)
        make(by * scale if late else scale, grad)
    return grad if late or not isinstance(by, Tensor) and by == 1 else grad.mul_(by)
