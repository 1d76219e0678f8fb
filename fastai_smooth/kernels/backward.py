"""When a gradient is made, by whom, and how it meets its scale: the same for both heads."""
from __future__ import annotations
import math
import torch
from torch import Tensor
from .formula import accumulator

def transforming() -> bool:
    "Is a torch.func transform (grad, vmap, ...), forward-mode AD or `make_fx` at work? Then only plain ops are understood."
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0: return True
    return not torch.compiler.is_compiling() and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None

def tracing(*tensors) -> bool:
    "Can values not be read here: under torch.compile, torch.func, or for tensors with no values?"
    return torch.compiler.is_compiling() or opaque(*tensors)

def opaque(*tensors) -> bool:
    "Is there no memory to hand to a kernel: under torch.func, or for tensors with no values?"
    if transforming(): return True
    for t in tensors:
        if type(t) is not Tensor or t.is_meta: return True
    return False

def plain_grad(x: Tensor, grad_output: Tensor, plain_loss, *args):
    """The gradient of `plain_loss(x, *args)`, where it must be made by plain ops; else None.

    That is where it will be differentiated again, is transformed, or is asked for many a `grad_output` at once (`is_grads_batched`)."""
    again = torch.is_grad_enabled()
    if not (again or transforming() or torch._C._functorch.is_legacy_batchedtensor(grad_output)): return None
    with torch.enable_grad(): loss = plain_loss(x, *args)
    return torch.autograd.grad(loss, x, grad_output, create_graph=again)[0]

def early_grad(x: Tensor, reduction: str):
    """Room for a gradient that the forward makes, before it is known what it will be multiplied by. None: it waits for the backward.

    Half precision is to be rounded once, after that. On a GPU, where launches cost more than memory, the gradient is kept in float32
    till then. On the CPU float16 waits: it has no digits left for the small gradients of a mean. bfloat16 has; and for one loss the
    factor is 1 as a rule."""
    whole = x.dtype == accumulator(x)
    if not (whole or x.is_cpu): return torch.empty_like(x, dtype=accumulator(x))
    return torch.empty_like(x) if whole or x.dtype == torch.bfloat16 and reduction != 'none' else None

def scaled_grad(x, grad, grad_output, scale, make):
    """`grad`, which has been made for `scale`, times `grad_output`. `make(scale, out)` makes it where there is none; and anew where it has
    been rounded to half precision and would be again. On the CPU it is free to look at `grad_output`."""
    by, whole = grad_output.item() if x.is_cpu and not grad_output.dim() else grad_output, x.dtype == accumulator(x)
    if grad is not None and grad.dtype != x.dtype: return torch.mul(grad, by, out=torch.empty_like(x))
    if grad is None or not (whole or power_of_two(by)):
        if grad is None: grad = torch.empty_like(x)
        make(scale if whole else by * scale, grad)
        if not whole: return grad
    return grad if not isinstance(by, Tensor) and by == 1 else grad.mul_(by)

def power_of_two(v: float):
    "Then a product with it is exact."
    return abs(math.frexp(v)[0]) == .5
