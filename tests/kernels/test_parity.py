"""Parity with `F.cross_entropy(label_smoothing=)` over 1,200 random settings a dtype: loss and gradient.

Left out are the exceptions that the package makes on purpose, each tested in test_softmax.py: nothing left (empty,
all ignored), half precision, and -inf logits."""
from collections import Counter
from itertools import product
import os, random

import pytest, torch
import torch.nn.functional as F

from fastai_smooth.kernels import smooth_cross_entropy
from reference import REDUCTIONS, distance, loss_and_grad, softmax_reference

pytestmark = pytest.mark.filterwarnings('ignore:.*weight')   # past the flip: has a test of its own
N_SETTINGS = int(os.environ.get('SMOOTH_TEST_SETTINGS', 1200))     # fewer on a GPU, where each is compiled (benchmarks/gpu.sh)
LAYOUTS = 'contiguous', 'channels_last', 'transposed', 'sliced', 'offset'


def lay_out(x, layout):
    "The values of x with other strides"
    if layout == 'channels_last': return x.movedim(1, -1).contiguous().movedim(-1, 1)     # any number of dimensions
    if layout == 'transposed': return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 'sliced':
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7.)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == 'offset':
        tall = x.new_full((x.shape[0] + 2, *x.shape[1:]), 7.)
        tall[1:-1] = x
        return tall[1:-1]
    return x.contiguous()


def draw_setting(seed):
    "One random setting as (input, target, eps, options, grad_output, tags), in float64"
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    ndim = rng.choice([2, 3, 4, 5])
    N, K = rng.randint(4, 8), rng.choice([2, 3, 5, 10, rng.randint(2, 60)])
    spatial = [rng.randint(1, 4) for _ in range(ndim - 2)]
    input = torch.randn(N, K, *spatial, generator=gen, dtype=torch.float64) * rng.choice([1., 1.5, 2.])
    eps = rng.choice([0., 1., .1, rng.random(), rng.random()])
    reduction, layout, kind = rng.choice(REDUCTIONS), rng.choice(LAYOUTS), rng.choice(['index', 'soft'])
    weight = torch.rand(K, generator=gen, dtype=torch.float64) + .1 if rng.random() < .5 else None
    if weight is not None and K > 2 and rng.random() < .2: weight[-1] = 0.
    options, ignored = dict(weight=weight, reduction=reduction), 'none'
    if kind == 'soft':
        target = lay_out(torch.rand(N, K, *spatial, generator=gen, dtype=torch.float64).softmax(1), layout)
    else:
        target = torch.randint(0, K, (N, *spatial), generator=gen)
        ignored = rng.choice(['none', 'default', 'negative', *(['a class', 'not hit'] if K > 2 else [])])
        ignore_index = dict(negative=-1).get(ignored, -100)
        if ignored in ('default', 'negative'): target[torch.rand(target.shape, generator=gen) < .3] = ignore_index
        if ignored in ('a class', 'not hit'): ignore_index = rng.randrange(K)
        if ignored == 'not hit': target[target == ignore_index] = (ignore_index + 1) % K
        target.view(-1)[0] = 0 if ignore_index != 0 else 1               # never nothing left
        target = lay_out(target, layout) if ndim > 2 else target
        options['ignore_index'] = ignore_index
    shape = () if reduction != 'none' else (N, *spatial)
    grad_output = torch.ones(shape, dtype=torch.float64)
    if rng.random() < .5: grad_output = torch.randn(shape, generator=gen, dtype=torch.float64)
    tags = [f'{ndim}-D', kind, reduction, layout, f'ignored {ignored}', f'weight {weight is not None}',
            'eps ' + (str(int(eps)) if eps in (0., 1.) else 'inside')]
    return lay_out(input, layout), target, eps, options, grad_output, tags


def parity_errors(dtype):
    "(worst distance, its seed, how often each tag came up) over all settings; the oracle always runs in float64"
    worst, seen = (0., None), Counter()
    for seed in range(N_SETTINGS):
        input, target, eps, options, grad_output, tags = draw_setting(seed)
        seen.update(['settings', *tags])
        cast = lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        input, target, grad_output, options = (cast(input), cast(target), cast(grad_output),
                                               {k: cast(v) for k, v in options.items()})
        up = lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        expected = loss_and_grad(F.cross_entropy, up(input), up(target), label_smoothing=eps,
                                 grad_output=grad_output, **{k: up(v) for k, v in options.items()})
        actual = loss_and_grad(smooth_cross_entropy, input, target, eps, grad_output=grad_output, **options)
        assert all(a.dtype == dtype for a in actual)
        worst = max(worst, (max(map(distance, actual, expected)), seed), key=lambda w: w[0])
    return *worst, seen


@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_pytorch_parity_random_settings(dtype, tolerance):
    "loss and gradient over 1,200 settings, every kind of them often"
    worst, seed, seen = parity_errors(dtype)
    assert seen['settings'] == N_SETTINGS
    if N_SETTINGS >= 1200: assert min(seen.values()) >= 50 and len(seen) == 1 + 4 + 2 + 3 + 5 + 5 + 2 + 3, seen
    assert worst < tolerance, f'{worst:.3g} in setting {seed}: {draw_setting(seed)[3:]}'


def test_pytorch_parity_of_the_reference():
    "the reference that the other tests trust is itself PyTorch's loss where the two overlap"
    for seed in range(60):
        input, target, eps, options, grad_output, _ = draw_setting(seed)
        options['grad_output'] = grad_output
        expected = loss_and_grad(F.cross_entropy, input, target, label_smoothing=eps, **options)
        actual = softmax_reference(input, target, eps, **options)
        assert max(map(distance, actual, expected)) < 1e-12, seed


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_pytorch_parity_any_integer_dtype(dtype):
    input, target = torch.randn(6, 4).double(), torch.tensor([0, 3, 1, 2, 3, 0])
    expected = loss_and_grad(F.cross_entropy, input, target, label_smoothing=.1, ignore_index=3)
    actual = loss_and_grad(smooth_cross_entropy, input, target.to(dtype), .1, ignore_index=3)
    assert max(map(distance, actual, expected)) < 1e-10


@pytest.mark.parametrize('axis', [-1, 2, -2, 1, 0])
def test_pytorch_parity_axis(axis):
    "axis says where the classes are, for class indices and for soft targets"
    input = torch.randn(3, 4, 5).double()
    K = input.shape[axis]
    moved = input.movedim(axis, 1)
    index, soft = torch.randint(0, K, (moved.shape[0], moved.shape[2])), torch.rand_like(moved).softmax(1)
    for reduction in REDUCTIONS:
        for target, ours in ((index, index), (soft, soft.movedim(1, axis))):
            loss, grad = loss_and_grad(F.cross_entropy, moved, target, label_smoothing=.2, reduction=reduction)
            actual = loss_and_grad(smooth_cross_entropy, input, ours, .2, axis=axis, reduction=reduction)
            assert max(map(distance, actual, (loss, grad.movedim(1, axis)))) < 1e-10


@pytest.mark.parametrize('weighted,reduction,eps', product([False, True], REDUCTIONS, [0., .3, 1.]))
def test_pytorch_parity_gradient_of_soft_targets(weighted, reduction, eps):
    "soft targets that require grad (learned or mixed ones) get theirs, as from F.cross_entropy"
    input, weight = torch.randn(3, 4, 2).double(), torch.rand(4).double() + .1 if weighted else None
    values = torch.rand(3, 4, 2).double().softmax(1)
    grads = []
    for loss_func, name in ((smooth_cross_entropy, 'eps'), (F.cross_entropy, 'label_smoothing')):
        x, y = input.clone().requires_grad_(), values.clone().requires_grad_()
        loss = loss_func(x, y, **{name: eps}, weight=weight, reduction=reduction)
        grads.append(torch.autograd.grad(loss.sin().sum(), [x, y]))
    assert max(map(distance, *grads)) < 1e-10


def test_pytorch_parity_zero_weight_denominator():
    "rows are left but their classes weigh nothing: 0/0, as PyTorch has it"
    input, target, weight = torch.randn(2, 3), torch.tensor([1, 1]), torch.tensor([1., 0., 2.])
    for eps in (0., .1, 1.):
        expected = F.cross_entropy(input, target, weight, label_smoothing=eps)
        assert expected.isnan() and smooth_cross_entropy(input, target, eps, weight=weight).isnan()
