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
from .autograd import accumulator, plain_grads
from .chunks import part

class LinearLogits(Tensor):
    """`F.linear(input, weight, bias)`, (N,K), by its parts: the losses of this package take it in place of logits.

    It has the shape, dtype and device of the logits, and none of their values: an op that needs these raises a RuntimeError."""
    def __new__(cls, input: Tensor, weight: Tensor, bias: Tensor | None = None, chunk_rows: int | None = None):
        with torch.no_grad(): like = F.linear(input[:0], weight[:1], bias if bias is None else bias[:1])  # checks, and heeds autocast
        self = like.new_empty(()).expand(len(input), len(weight)).as_subclass(cls)
        # 16 MB in float32; but so many rows that a product takes longer than to read weight, and to read and write its gradient
        self.chunk_rows = chunk_rows or max(256 if input.is_cpu else 1024, (16 << 18) // max(1, len(weight)))
        self.parts = input, weight, bias
        return self.requires_grad_(any(v is not None and v.requires_grad for v in self.parts))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__
        if name == 'float': return args[0]  # mixed precision asks for it; losses are made in float32 in any case
        if name in ('__get__', '__len__', 'size', 'dim', 'numel', 'is_floating_point', 'requires_grad_'):  # '__get__': shape, dtype, ...
            answer = super().__torch_function__(func, types, args, kwargs or {})
            if type(answer) is not cls or answer is args[0]: return answer
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
    head: object            # softmax.py or sigmoid.py, or what stands for it on Triton
    reduction: str
    scale: float | Tensor   # Of the sum of losses: 1 over what a mean is over, or 1
    chunk_rows: int
    dtype: torch.dtype      # Of the logits

def cast(dtype, *tensors): return [None if v is None else v.to(dtype) for v in tensors]

def plain_loss(x, weight, bias, target, run: Run):
    "The loss from all logits, in ops that torch can differentiate and compile."
    return run.head.plain_loss(F.linear(*cast(run.dtype, x, weight, bias)), target, run.reduction)

def by_chunks(x, weight, bias, target, run: Run, needs=(False,) * 3, factor=1.):
    "The loss; and its gradients of x, weight and bias, None where not in `needs`, times `factor` (a number, or one a loss)."
    h, w, b = cast(run.dtype, x, weight, bias)
    logits, reduction = h.new_empty(min(run.chunk_rows, len(h)), len(w)), 'none' if run.reduction == 'none' else 'sum'
    grad, acc = torch.empty_like(logits) if any(needs) else None, accumulator(logits)
    dx, dw, db = grads = [v.new_zeros(v.shape, dtype=acc) if need else None for v, need in zip((x, weight, bias), needs)]
    losses = []
    for i in range(0, len(h), run.chunk_rows):
        chunk = slice(i, i + run.chunk_rows)
        rows = h[chunk]
        z, g = (None if v is None else v[:len(rows)] for v in (logits, grad))
        torch.mm(rows, w.T, out=z) if b is None else torch.addmm(b, rows, w.T, out=z)
        loss = run.head.loss_and_grad(z, target.chunk((chunk, slice(None))), reduction, run.scale, g, part(factor, chunk))
        losses.append(loss if loss.dim() else loss[None])
        if dx is not None: dx[chunk] = g @ w
        if dw is not None: dw.addmm_(g.T, rows) if g.dtype == acc else dw.add_(g.T @ rows)
        if db is not None: db += g.sum(0)
    losses = torch.cat(losses)
    return losses if reduction == 'none' else losses.sum(), grads

class LinearLoss(torch.autograd.Function):
    """The loss with its gradients, which the forward makes and the first backward hands over. A later one makes them anew.

    So does the first one, in float16, which is rounded after the loss scale, and where each loss has its own factor."""

    @staticmethod
    def forward(ctx, x, weight, bias, target, run):
        ctx.save_for_backward(x, weight, bias, *target.tensors())
        ctx.rest = target, run
        early = run.reduction != 'none' and run.dtype != torch.float16
        loss, grads = by_chunks(x, weight, bias, target, run, *[ctx.needs_input_grad[:3]] * early)
        ctx.grads = grads if early else None
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        parts, (target, run), grads = ctx.saved_tensors[:3], ctx.rest, ctx.grads
        ctx.grads = None
        plain = plain_grads(parts, grad_output, plain_loss, target, run)
        if plain is not None: return *plain, None, None
        if target.ignored is not None and grad_output.dim(): grad_output = grad_output.masked_fill(target.ignored, 0)  # 0 * inf is nan
        if grad_output.dim() == 1: grad_output = grad_output[:, None]
        factor = grad_output.item() if grad_output.is_cpu and not grad_output.dim() else grad_output
        if grads is None: _, grads = by_chunks(*parts, target, run, ctx.needs_input_grad[:3], factor)
        elif not (isinstance(factor, float) and factor == 1): grads = [None if g is None else g.mul_(factor) for g in grads]
        return *(None if g is None else g.to(v.dtype) for g, v in zip(grads, parts)), None, None

def linear_loss(x: LinearLogits, target, reduction: str, scale, head, plain: bool) -> Tensor:
    "The loss of logits `x`; `plain` where something else than their parts needs a gradient, or torch is tracing."
    args = *x.parts, target, Run(head, reduction, scale, x.chunk_rows, x.dtype)
    # the dtype of the products is that which autocast chose for the layer, where that was called
    with torch.autocast(x.device.type, enabled=False) if amp.is_autocast_available(x.device.type) else nullcontext():
        if plain or not x.numel(): return plain_loss(*args)
        return LinearLoss.apply(*args) if x.requires_grad and torch.is_grad_enabled() else by_chunks(*args)[0]
