"""The losses of a linear layer, of whose logits only a chunk of rows is there at a time.

    logits = input @ weight.T + bias        G = d loss / d logits, as softmax.py and sigmoid.py make it
    d loss / d input = G @ weight           d loss / d weight = G.T @ input           d loss / d bias = G.sum(0)

A row of logits is needed for its loss and its row of G, and that for the three products. These made, the next chunk takes its memory."""
from __future__ import annotations
from contextlib import nullcontext
from typing import NamedTuple
import torch
import torch.nn.functional as F
from torch import Tensor, amp
from .autograd import accumulator, on_cpu, plain_grads
from .chunks import part

class LinearLogits(Tensor):
    """`F.linear(input, weight, bias)`, (N,K), by its parts: the losses of this package take it in place of logits.

    It has the shape, dtype and device of the logits, and none of their values: an op that needs these raises a RuntimeError."""
    def __new__(cls, input: Tensor, weight: Tensor, bias: Tensor | None = None, chunk_rows: int | None = None):
        with torch.no_grad(): like = F.linear(input[:0], weight[:1], bias if bias is None else bias[:1])  # checks, and heeds autocast
        self = like.new_empty(()).expand(len(input), len(weight)).as_subclass(cls)
        # 16 MB in float32; but so many rows that a product takes longer than to read weight, and to read and write its gradient
        self.chunk_rows = chunk_rows or max(256 if on_cpu(input) else 1024, (16 << 18) // max(1, len(weight)))
        self.parts = input, weight, bias
        return self.requires_grad_(any(v is not None and v.requires_grad for v in self.parts))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__
        if name == 'float': return args[0]  # mixed precision asks for it; losses are made in float32 in any case
        if name in ('__get__', '__len__', 'size', 'dim', 'numel', 'is_floating_point', 'requires_grad_'):  # '__get__': shape, dtype, ...
            res = super().__torch_function__(func, types, args, kwargs or {})
            if type(res) is not cls or res is args[0]: return res
        if name == '__get__': name = getattr(func.__self__, '__name__', name)  # of the attribute
        # no TypeError, which torch's operators take for NotImplemented: x == y would be False
        raise RuntimeError(f"{name} needs logits that are not there: in training the loss makes them from this linear layer's input, some "
                           "rows at a time (smooth_linear_cross_entropy, FusedHead). No layer may come after it, and no hook or callback "
                           "read them. If the predictions come from another layer, name it: FusedHead(learn.model.that_layer)")

    def __reduce_ex__(self, protocol): return type(self), (*self.parts, self.chunk_rows)  # a Learner that was stopped keeps its last one

    def __repr__(self): return f'LinearLogits(shape={tuple(self.shape)}, dtype={self.dtype})'

    def by_rows(self, *others: Tensor):
        "The logits, without a gradient, of some rows at a time, and the same rows of `others`."
        x, weight, bias = self.parts
        for rows, *rest in zip(*(v.split(self.chunk_rows) for v in (x, *others))): yield F.linear(rows, weight, bias).detach(), *rest

class Run(NamedTuple):
    "How the loss of a linear layer's logits is computed."
    module: object          # softmax.py or sigmoid.py, or what stands for it on Triton
    reduction: str
    scale: float | Tensor   # Of the sum of losses: 1 over what a mean is over, or 1
    chunk_rows: int
    dtype: torch.dtype      # Of the logits

def cast(dtype, *tensors): return [None if v is None else v.to(dtype) for v in tensors]

def plain_loss(x, weight, bias, target, run: Run):
    "The loss from all logits, in ops that torch can differentiate and compile."
    return run.module.plain_loss(F.linear(*cast(run.dtype, x, weight, bias)), target, run.reduction)

def by_chunks(input, weight, bias, target, run: Run, wanted=(False, False, False), factor=1.):
    """The loss, and a list of its gradients of input, weight and bias, times `factor` (a number, or one a loss).

    `wanted` says of each of the three whether it is made; else it is None."""
    x, w, b = cast(run.dtype, input, weight, bias)
    memory = x.new_empty(min(run.chunk_rows, len(x)), len(w))             # for the logits of one chunk after the other,
    memory_of_G = torch.empty_like(memory) if any(wanted) else None       # and for their gradient
    acc = accumulator(memory)
    grads = [v.new_zeros(v.shape, dtype=acc) if wants else None for v, wants in zip((input, weight, bias), wanted)]
    of_input, of_weight, of_bias = grads
    reduction = 'none' if run.reduction == 'none' else 'sum'              # run.scale makes a mean of the sum
    losses = []
    for start in range(0, len(x), run.chunk_rows):
        chunk = slice(start, start + run.chunk_rows)
        rows = x[chunk]
        logits, G = memory[:len(rows)], None if memory_of_G is None else memory_of_G[:len(rows)]
        if b is None: torch.mm(rows, w.T, out=logits)
        else: torch.addmm(b, rows, w.T, out=logits)
        targets = target.chunk((chunk, slice(None)))
        loss = run.module.loss_and_grad(logits, targets, reduction, run.scale, G, part(factor, chunk))  # and the gradient of logits, in G
        losses.append(loss if loss.dim() else loss[None])
        if of_input is not None: of_input[chunk] = G @ w
        if of_weight is not None and G.dtype == acc: of_weight.addmm_(G.T, rows)
        elif of_weight is not None: of_weight += G.T @ rows               # of half precision, the sum over chunks is in float32
        if of_bias is not None: of_bias += G.sum(0)
    losses = torch.cat(losses)
    return losses if reduction == 'none' else losses.sum(), grads

class LinearLoss(torch.autograd.Function):
    """The loss with its gradients, which the forward makes and the first backward hands over. A later one makes them anew.

    So does the first one, in float16, which is rounded after the loss scale, and where each loss has its own factor."""

    @staticmethod
    def forward(ctx, input, weight, bias, target, run):
        ctx.save_for_backward(input, weight, bias, *target.tensors())
        ctx.rest, ctx.grads = (target, run), None
        if run.reduction == 'none' or run.dtype == torch.float16: return by_chunks(input, weight, bias, target, run)[0]
        loss, ctx.grads = by_chunks(input, weight, bias, target, run, ctx.needs_input_grad[:3])
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        parts, (target, run) = ctx.saved_tensors[:3], ctx.rest
        grads, ctx.grads = ctx.grads, None
        plain = plain_grads(parts, grad_output, plain_loss, target, run)
        if plain is not None: return *plain, None, None
        factor = grad_output
        if factor.dim():   # one a loss: reduction='none'
            if target.ignored is not None: factor = factor.masked_fill(target.ignored, 0)  # 0 times inf would be nan
            if factor.dim() == 1: factor = factor[:, None]
        elif on_cpu(factor): factor = factor.item()
        if grads is None: _, grads = by_chunks(*parts, target, run, ctx.needs_input_grad[:3], factor)
        elif not (isinstance(factor, float) and factor == 1):
            for g in grads:
                if g is not None: g.mul_(factor)
        return *(None if g is None else g.to(v.dtype) for g, v in zip(grads, parts)), None, None

def linear_loss(x: LinearLogits, target, reduction: str, scale, module, plain: bool) -> Tensor:
    "The loss of logits `x`; `plain` where something else than their parts needs a gradient, or torch is tracing."
    args = *x.parts, target, Run(module, reduction, scale, x.chunk_rows, x.dtype)
    # the dtype of the products is that which autocast chose for the layer, where that was called
    with torch.autocast(x.device.type, enabled=False) if amp.is_autocast_available(x.device.type) else nullcontext():
        if plain or not x.numel(): return plain_loss(*args)
        return LinearLoss.apply(*args) if x.requires_grad and torch.is_grad_enabled() else by_chunks(*args)[0]
