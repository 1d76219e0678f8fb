"A target and options of each kind for both losses, and the losses as formulas that autograd can do the rest of."
import pytest, torch
import torch.nn.functional as F

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy, smooth_targets
from reference import REDUCTIONS

gen = torch.Generator().manual_seed(5)


def rand(*shape): return torch.rand(shape, generator=gen, dtype=torch.float64)


INDEX, SOFT, HOT = torch.tensor([0, 3, 1, 2]), rand(4, 4).softmax(1), rand(4, 4) < .5
W, S = rand(4) + .2, (2 * rand(4, 4)).softmax(1)
IGNORED = torch.tensor([0, -100, 1, 2])

# name: (target, options) for logits of shape (4,4)
SOFTMAX = {
    'index': (INDEX, {}), 'eps 0': (INDEX, dict(eps=0.)), 'eps 1': (INDEX, dict(eps=1.)),
    'others': (INDEX, dict(spread='others')), 'prior': (INDEX, dict(prior=S[0])), 'matrix': (INDEX, dict(prior=S)),
    'per-class eps': (INDEX, dict(eps=W / 2)), 'weight': (INDEX, dict(weight=W)), 'ignored': (IGNORED, {}),
    'weight, ignored': (IGNORED, dict(weight=W)), 'weight, prior': (INDEX, dict(weight=W, prior=S[0])),
    'weight, matrix': (INDEX, dict(weight=W, prior=S)), 'weight, others': (INDEX, dict(weight=W, spread='others')),
    'weight, per-class eps': (INDEX, dict(weight=W, eps=W / 2)),
    'soft': (SOFT, {}), 'soft, weight': (SOFT, dict(weight=W)), 'soft, others': (SOFT, dict(spread='others')),
    'soft, prior': (SOFT, dict(prior=S[0])), 'multi-hot': (HOT, dict(multi_hot=True)),
    'multi-hot, weight': (HOT, dict(multi_hot=True, weight=W)),
    'multi-hot, others': (HOT, dict(multi_hot=True, spread='others')), 'nothing left': (torch.full((4,), -100), {})}
SIGMOID = {
    'bool': (HOT, {}), 'integer': (HOT.long(), {}), 'float': (SOFT, {}), 'eps 0': (HOT, dict(eps=0.)),
    'eps .5': (HOT, dict(eps=.5)), 'prior': (HOT, dict(prior=S[0])), 'weight': (HOT, dict(weight=W)),
    'weight of an item': (HOT, dict(weight=W[:, None])), 'pos_weight': (HOT, dict(pos_weight=W)),
    'everything': (SOFT, dict(eps=.2, prior=S[0], weight=W, pos_weight=2 * W))}
LOSSES = ([pytest.param(smooth_cross_entropy, *v, id=f'softmax {k}') for k, v in SOFTMAX.items()] +
          [pytest.param(smooth_bce, *v, id=f'sigmoid {k}') for k, v in SIGMOID.items()])
every_option = pytest.mark.parametrize('loss_func,target,options', LOSSES)
by_reduction = pytest.mark.parametrize('reduction', REDUCTIONS)


def logits(*shape): return 3 * torch.randn(*(shape or (4, 4)), dtype=torch.float64)


def plain_loss(loss_func, x, target, eps=None, *, prior=None, spread='all', multi_hot=False, weight=None,
               pos_weight=None, reduction='mean'):
    "The same loss as a formula of differentiable torch ops, for logits of shape (N,K): autograd does the rest"
    sigmoid, K = loss_func is smooth_bce, x.shape[1]
    if sigmoid:
        q = smooth_targets(target, K, eps, prior=prior, sigmoid=True).double()
        return F.binary_cross_entropy_with_logits(x, q, weight, pos_weight=pos_weight, reduction=reduction)
    index = not target.is_floating_point() and not multi_hot
    kept = target != -100 if index else torch.ones(len(x), dtype=torch.bool)
    y = target.clamp(min=0) if index else target
    q = smooth_targets(y, K, eps, prior=prior, spread=spread, multi_hot=multi_hot)
    w = torch.ones(K).double() if weight is None else weight
    each = torch.where(kept, -(w * q * x.log_softmax(1)).sum(1), 0.)
    denominator = (w[y] if index else kept.double())[kept].sum()
    if reduction == 'mean': return each.sum() / denominator if kept.any() else each.sum()
    return each if reduction == 'none' else each.sum()


SHAPES = {'tall': (10000, 512), 'wide': (256, 20000), 'image': (4, 21, 256, 256), 'channels_last': (4, 21, 256, 256),
          'transposed': (256, 20000), 'sliced': (256, 20000), 'volume': (2, 40, 8, 64, 128)}


def big_case(kind, option='index', dtype=torch.float32):
    "(logits of about 20 MB, target, options)"
    shape = SHAPES[kind]
    K = shape[1]
    x = torch.randn(shape).to(dtype)
    if kind == 'channels_last': x = x.to(memory_format=torch.channels_last)
    if kind == 'transposed': x = x.T.contiguous().T
    if kind == 'sliced': x = torch.randn(shape[0], 2 * K).to(dtype)[:, ::2]
    y, options = torch.randint(0, K, (shape[0], *shape[2:])), {}
    if 'ignored' in option: y[torch.rand(y.shape) < .3] = -100
    if 'soft' in option: y = torch.rand(shape).softmax(1)
    if 'multi-hot' in option: y, options = torch.rand(shape) < 2 / K, dict(multi_hot=True)
    if 'others' in option: options['spread'] = 'others'
    if 'weight' in option: options['weight'] = torch.rand(K) + .5
    if 'prior' in option: options['prior'] = torch.full((K,), 1 / K)
    if option == 'matrix': options['prior'] = torch.rand(K, K).softmax(1)
    if option == 'per-class eps': options['eps'] = torch.rand(K) / 2
    if option == 'masked': x[:, 1:3] = -torch.inf; y[(y == 1) | (y == 2)] = 0
    if kind == 'channels_last' and y.dim() == 4: y = y.to(memory_format=torch.channels_last)
    return x, y, options
