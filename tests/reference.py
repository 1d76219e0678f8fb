"""The two losses in float64, row by row, straight from the formulas: slow, obvious, and independent of the package.

Everything here is written from SPEC sections 1 and 3 alone. No autograd: gradients are the closed formulas.
"""
import math

import torch

REDUCTIONS = ('mean', 'sum', 'none')


def smoothed_row(y, n_classes, eps, prior=None, spread='all', multi_hot=False, unmasked=None):
    """q of one row as a list of floats; y is a class index (int) or a list of n_classes values.

    `unmasked` says for each class whether its logit is above -inf: smoothing mass goes to those classes only."""
    K = n_classes
    if unmasked is None: unmasked = [True] * K
    n_unmasked = sum(unmasked)
    is_index = isinstance(y, int)
    if K == 1: return [1.]
    if isinstance(eps, torch.Tensor): eps = float(eps[y])
    hard = [1. if k == y else 0. for k in range(K)] if is_index else list(y)

    if multi_hot:
        positive = [v > 0 for v in hard]
        n = sum(positive)
        if n == 0: return [1 / n_unmasked if m else 0. for m in unmasked]
        if n == K: return [1 / K] * K
        hard = [1 / n if p else 0. for p in positive]

    if prior is not None:
        row = prior if prior.dim() == 1 else prior[y]
        mass = [float(v) if m else 0. for v, m in zip(row, unmasked)]
        return [(1 - eps) * h + eps * v / sum(mass) for h, v in zip(hard, mass)]

    if spread == 'all':
        return [(1 - eps) * h + (eps / n_unmasked if m else 0.) for h, m in zip(hard, unmasked)]

    if is_index or multi_hot:                      # 'others': eps is shared out among the classes that are not true
        other = [m and h == 0 for h, m in zip(hard, unmasked)]
        if not any(other): return hard
        return [(1 - eps) * h + (eps / sum(other) if o else 0.) for h, o in zip(hard, other)]
    if n_unmasked == 1: return [1. if m else 0. for m in unmasked]
    eps = eps * n_unmasked / (n_unmasked - 1)      # soft targets: 'all' with eps*K/(K-1)
    return [(1 - eps) * h + (eps / n_unmasked if m else 0.) for h, m in zip(hard, unmasked)]


def smoothed_targets(target, n_classes, eps=.1, *, prior=None, spread='all', multi_hot=False):
    "q of a batch, class axis last, float64"
    if target.dtype.is_floating_point or multi_hot:
        rows, shape = [list(map(float, r)) for r in target.reshape(-1, n_classes).tolist()], target.shape
    else: rows, shape = target.reshape(-1).tolist(), (*target.shape, n_classes)
    q = [smoothed_row(y, n_classes, eps, prior, spread, multi_hot) for y in rows]
    return torch.tensor(q, dtype=torch.float64).reshape(shape)


def softmax_reference(input, target, eps=.1, *, prior=None, spread='all', multi_hot=False, weight=None,
                      ignore_index=-100, reduction='mean', axis=1, grad_output=1.):
    "The softmax loss and its gradient w.r.t. `input`; `grad_output` is a number, or a tensor for reduction='none'"
    K = input.shape[axis]
    moved = input.detach().double().movedim(axis, -1)
    dense = target.dtype.is_floating_point or multi_hot
    x = moved.reshape(-1, K)
    y = [r.tolist() for r in target.double().movedim(axis, -1).reshape(-1, K)] if dense else target.reshape(-1).tolist()
    w = torch.ones(K, dtype=torch.float64) if weight is None else weight.double()
    losses, grads, denominator, n_left = [], [], 0., 0
    for row, yi in zip(x, y):
        if not dense and yi == ignore_index:
            losses.append(0.), grads.append(torch.zeros_like(row))
            continue
        n_left += 1
        denominator += 1. if dense else float(w[yi])
        unmasked = row > -math.inf
        if not unmasked.any():
            losses.append(math.nan), grads.append(torch.full_like(row, math.nan))
            continue
        t = w * torch.tensor(smoothed_row(yi, K, eps, prior, spread, multi_hot, unmasked.tolist()), dtype=torch.float64)
        log_p = row - torch.logsumexp(row, 0)
        losses.append(-(t * log_p)[t != 0].sum().item())                       # 0 * -inf is 0
        grads.append(torch.where(unmasked, t.sum() * log_p.exp() - t, 0.))
    losses = torch.tensor(losses, dtype=torch.float64)
    grads = torch.stack(grads) if grads else x.clone()

    rows_shape = moved.shape[:-1]
    scale = torch.as_tensor(grad_output, dtype=torch.float64)
    if reduction == 'none': loss = losses.reshape(rows_shape)
    elif reduction == 'sum': loss = losses.sum()
    elif n_left == 0: loss, scale = losses.sum(), scale * 0
    else: loss, scale = losses.sum() / (denominator or math.nan), scale / (denominator or math.nan)
    scale = scale.expand(rows_shape).reshape(-1, 1)
    return loss, (grads * scale).reshape(moved.shape).movedim(-1, axis)


def sigmoid_reference(input, target, eps=.05, *, prior=None, weight=None, pos_weight=None, reduction='mean',
                      grad_output=1.):
    """The sigmoid loss and its gradient w.r.t. `input`; weight and pos_weight as in PyTorch. `eps` may be a pair: what negatives gain and what
    positives lose. `prior` broadcasts to `input`, or is a pair of such: what negatives are smoothed to, and what positives are."""
    x, y = input.detach().double(), target.double()
    if isinstance(eps, tuple): q = eps[0] * (1 - y) + (1 - eps[1]) * y
    else:
        of_negatives, of_positives = (u.double() for u in (prior if isinstance(prior, tuple) else (torch.tensor(.5) if prior is None else prior,) * 2))
        q = (1 - 2 * eps) * y + 2 * eps * ((1 - y) * of_negatives + y * of_positives)
    w = torch.ones(()).double() if weight is None else weight.double()
    c = torch.ones(()).double() if pos_weight is None else pos_weight.double()
    softplus = lambda z: torch.logaddexp(z, torch.zeros_like(z))
    losses = w * (c * q * softplus(-x) + (1 - q) * softplus(x))
    grads = w * ((1 - q) * torch.sigmoid(x) - c * q * torch.sigmoid(-x))
    if reduction == 'none': return losses, grads * grad_output
    if reduction == 'sum': return losses.sum(), grads * grad_output
    if x.numel() == 0: return torch.tensor(0.).double(), grads
    return losses.mean(), grads * grad_output / x.numel()


def distance(actual, expected):
    "Normwise relative error, max|a-b| / max|b|; nan and inf must stand in the same places"
    actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).detach().double()
    assert actual.shape == expected.shape, f'{tuple(actual.shape)} is not {tuple(expected.shape)}'
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite): return math.inf
    odd_a, odd_e = actual[~finite], expected[~finite]
    if not torch.equal(odd_a.isnan(), odd_e.isnan()) or (odd_a != odd_e)[~odd_e.isnan()].any(): return math.inf
    actual, expected = actual[finite], expected[finite]
    if expected.numel() == 0: return 0.
    error = (actual - expected).abs().max().item()
    return error / (expected.abs().max().item() or 1.)


def rounded_once(grad, expected, slack=2e-7):
    "Is a half precision gradient the exact one but for its own rounding and float32's?"
    info = torch.finfo(grad.dtype)
    allowed = info.eps * expected.abs() + info.smallest_normal * info.eps + slack * expected.abs().max()
    return bool(((grad.double() - expected).abs() <= allowed).all())


def loss_and_grad(loss_func, input, target, *args, grad_output=None, **kwargs):
    "What a training step gets: the loss, and the gradient w.r.t. a copy of `input` that keeps its strides"
    leaf = input.detach().requires_grad_()
    loss = loss_func(leaf, target, *args, **kwargs)
    if grad_output is None: grad_output = torch.ones_like(loss)
    elif not isinstance(grad_output, torch.Tensor): grad_output = torch.full_like(loss, grad_output)
    grad, = torch.autograd.grad(loss, leaf, grad_output.to(loss.dtype))
    return loss.detach(), grad
