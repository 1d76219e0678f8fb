"What the tests of the kernels share: options with their targets, the losses as formulas that autograd can do the rest of, layouts, ways."
import os, sys

import pytest, torch
import torch.nn.functional as F

from fastai_smooth.kernels import sigmoid, smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy, smooth_targets, softmax
from reference import REDUCTIONS, distance

ON_TRITON = os.environ.get('SMOOTH_TEST_BACKEND') == 'triton'   # triton/on_triton.py
SETTINGS = int(os.environ.get('SMOOTH_TEST_SETTINGS', 400))     # random ones; fewer on a GPU, where each is compiled (benchmarks/gpu.sh)
gen = torch.Generator().manual_seed(5)

def rand(*shape): return torch.rand(shape, generator=gen, dtype=torch.float64)
def logits(*shape): return 3 * torch.randn(*(shape or (4, 4)), dtype=torch.float64)

INDEX, SOFT, HOT = torch.tensor([0, 3, 1, 2]), rand(4, 4).softmax(1), rand(4, 4) < .5
W, S = rand(4) + .2, (2 * rand(4, 4)).softmax(1)
IGNORED = torch.tensor([0, -100, 1, 2])

# name: (target, options) for logits of shape (4,4)
SOFTMAX = {
    'index': (INDEX, {}), 'eps 0': (INDEX, dict(eps=0.)), 'others': (INDEX, dict(spread='others')), 'prior': (INDEX, dict(prior=S[0])),
    'per-class eps': (INDEX, dict(eps=W / 2)), 'ignored': (IGNORED, {}), 'weight, ignored': (IGNORED, dict(weight=W)),
    'weight, prior': (INDEX, dict(weight=W, prior=S[0])), 'weight, matrix': (INDEX, dict(weight=W, prior=S)),
    'soft': (SOFT, {}), 'soft, weight': (SOFT, dict(weight=W)), 'soft, others': (SOFT, dict(spread='others')), 'soft, prior': (SOFT, dict(prior=S[0])),
    'multi-hot, weight': (HOT, dict(multi_hot=True, weight=W)), 'multi-hot, others': (HOT, dict(multi_hot=True, spread='others')),
    'nothing left': (torch.full((4,), -100), {})}
SIGMOID = {
    'bool': (HOT, {}), 'integer': (HOT.long(), {}), 'eps 0': (HOT, dict(eps=0.)), 'eps .5': (HOT, dict(eps=.5)),
    'weight of an item': (HOT, dict(weight=W[:, None])), 'pos_weight': (HOT, dict(pos_weight=W)),
    'everything': (SOFT, dict(eps=.2, prior=S[0], weight=W, pos_weight=2 * W)),
    'pair': (SOFT, dict(eps=(.3, .1))), 'one side': (HOT, dict(eps=(.1, 0.), weight=W, pos_weight=2 * W)),
    'prior of both': (SOFT, dict(eps=.2, prior=torch.stack([S[0] / 2, (1 + S[1]) / 2]), pos_weight=W))}
LOSSES = ([pytest.param(smooth_cross_entropy, *v, id=f'softmax {k}') for k, v in SOFTMAX.items()] +
          [pytest.param(smooth_bce, *v, id=f'sigmoid {k}') for k, v in SIGMOID.items()])
every_option = pytest.mark.parametrize('loss_func,target,options', LOSSES)
by_reduction = pytest.mark.parametrize('reduction', REDUCTIONS)

def some_options(*names): return pytest.mark.parametrize('loss_func,target,options', [p for p in LOSSES if p.id in names])

def plain_loss(loss_func, x, target, eps=None, *, prior=None, spread='all', multi_hot=False, weight=None, pos_weight=None, reduction='mean'):
    "The same loss as a formula of differentiable torch ops, for logits of shape (N,K): autograd does the rest."
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

LAYOUTS = 'contiguous', 'channels_last', 'transposed', 'sliced', 'offset'

def lay_out(x, layout):
    "The values of `x` with other strides."
    if layout == 'channels_last': return x.movedim(1, -1).contiguous().movedim(-1, 1)     # any number of dimensions
    if layout == 'transposed': return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 'sliced': return torch.stack([x, x], -1)[..., 0]
    if layout == 'offset': return torch.cat([x[:1], x])[1:]
    return x.contiguous()

def gradients_check(f, inputs):
    "Torch's checks of the first and second derivative. On Triton a gradient made anew adds up in another order: on_triton.py cuts the work anew."
    tolerance = dict(nondet_tol=1e-12 if ON_TRITON else 0.)
    return torch.autograd.gradcheck(f, inputs, **tolerance) and torch.autograd.gradgradcheck(f, inputs, **tolerance)

def near(actual, expected, tolerance, shift=.1): return distance(shift + actual, shift + expected) < tolerance   # a loss of 1e-9 has no digits
def cast(v, dtype): return v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
def cast_all(options, dtype): return {k: cast(v, dtype) for k, v in options.items()}

# 'few' logits go to PyTorch's own loss; others through a 'loop', in one chunk or in 'chunks', or as 'on a GPU', where no value may be looked
# at. On Triton, on_triton.py cuts the work
WAYS = ('few',) if ON_TRITON else ('few', 'loop', 'chunks', 'on a GPU')

def as_on_a_gpu(monkeypatch):
    "Makes the torch implementation take tensors of the CPU for those of a GPU."
    for name, module in list(sys.modules.items()):
        if name.startswith('fastai_smooth.kernels.') and hasattr(module, 'on_cpu'): monkeypatch.setattr(module, 'on_cpu', lambda x: False)

@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    "Each way to compute a loss, for small tensors too: a chunk is a row."
    if request.param == 'few': return 'few'
    if request.param == 'on a GPU': as_on_a_gpu(monkeypatch)
    else:
        for module in (softmax, sigmoid): monkeypatch.setattr(module, 'pytorch_loss', lambda *args: None)
    if request.param == 'chunks':
        monkeypatch.setattr(softmax, 'CHUNK_MB', 0)
        monkeypatch.setattr(sigmoid, 'chunks', lambda x, *_, **__: [(slice(i, i + 1), ...) for i in range(len(x))] if x.dim() else [...])
    return request.param
