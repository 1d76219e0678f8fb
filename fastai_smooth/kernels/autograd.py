"""What both losses need of autograd: what can be read, in which dtype sums are made, and how a gradient meets its factor."""
from __future__ import annotations
import torch
from torch import Tensor

def accumulator(x: Tensor) -> torch.dtype:
    "The dtype that losses and gradients of logits `x` are computed in: float32, or float64 for float64."
    return torch.float64 if x.dtype == torch.float64 else torch.float32

def on_cpu(x: Tensor) -> bool:
    "Can values be read without waiting? On a GPU, each look would stall the training step."
    return x.is_cpu

def transforming() -> bool:
    "Is a torch.func transform (grad, vmap, ...), forward-mode AD or `make_fx` at work? Then only plain ops are understood."
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0: return True
    return not torch.compiler.is_compiling() and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None

def tracing(*tensors) -> bool:
    "Can values not be read here: under torch.compile, torch.func, or for tensors with no values?"
    return torch.compiler.is_compiling() or has_no_storage(*tensors)

def eager_on_cpu(x, y) -> bool:
    """Are logits (contiguous, in float32 or float64) and targets plain tensors on the CPU, whose values can be read?

    Then PyTorch's own losses are as exact, and their gradient lies in memory as the logits do. It is asked in every call."""
    return (type(x) is Tensor and type(y) is Tensor and on_cpu(x) and x.dtype == accumulator(x) and not (x.is_nested or y.is_nested)
            and x.is_contiguous() and y.layout is torch.strided and not torch.compiler.is_compiling() and not transforming())

def has_no_storage(*tensors) -> bool:
    "Is there no memory to hand to a kernel: under torch.func, or for tensors with no values?"
    if transforming(): return True
    for t in tensors:
        if type(t) is not Tensor or t.is_meta: return True
    return False

def plain_grads(inputs, grad_output: Tensor, plain_loss, *args):
    """The gradients of `plain_loss(*inputs, *args)`, where they must be made by plain ops; else None.

    That is where they will be differentiated again, under torch.func, or for many a `grad_output` at once (`is_grads_batched`)."""
    again = torch.is_grad_enabled()
    if not (again or transforming() or torch._C._functorch.is_legacy_batchedtensor(grad_output)): return None
    with torch.enable_grad(): loss = plain_loss(*inputs, *args)
    wanted = [v is not None and v.requires_grad for v in inputs]
    grads = iter(torch.autograd.grad(loss, [v for v, wants in zip(inputs, wanted) if wants], grad_output, create_graph=again))
    return [next(grads) if wants else None for wants in wanted]

def empty_grad(x: Tensor):
    """Memory for a gradient that the forward makes, before it is known what it will be multiplied by; None where the backward makes it.

    Half precision is rounded once, after that: on a GPU, where launches cost more than memory, it is kept in float32 till then; on a CPU
    float16 waits for the backward, since it is multiplied by a loss scale, and bfloat16 is made anew where it is not multiplied by 1."""
    if x.dtype == accumulator(x) or on_cpu(x) and x.dtype == torch.bfloat16: return torch.empty_like(x)
    return None if on_cpu(x) else torch.empty_like(x, dtype=accumulator(x))

def scaled_grad(x: Tensor, grad: Tensor | None, grad_output: Tensor, make) -> Tensor:
    """`grad` times `grad_output`, in the dtype of `x`; where there is no `grad`, `make(factor, out)` writes the gradient times a factor.

    `grad_output` is a scalar, or has the shape of `x` but for axes of size 1."""
    whole = x.dtype == accumulator(x)
    if grad is not None and grad.dtype != x.dtype: return torch.mul(grad, grad_output, out=torch.empty_like(x))
    if on_cpu(grad_output) and grad_output.numel() and not any(grad_output.stride()):  # one number for all, as of loss.mean()
        grad_output = grad_output.flatten()[0].item()
    is_one = isinstance(grad_output, float) and grad_output == 1
    if grad is None or not (whole or is_one):
        grad = torch.empty_like(x) if grad is None else grad
        make(1. if whole else grad_output, grad)  # bit by bit as in the forward, where its factor can come later
        if not whole: return grad
    return grad if is_one else grad.mul_(grad_output)
