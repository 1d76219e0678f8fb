"Both losses as citizens of PyTorch: autograd, memory, layout, TensorBase, torch.compile, torch.func, fake tensors."
from functools import partial
from itertools import product
import os, subprocess, sys

import pytest, torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fastai_smooth.kernels import (smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy,
                                   smooth_targets)
from fastai_smooth.kernels import sigmoid, softmax
from reference import REDUCTIONS, distance, loss_and_grad

pytestmark = pytest.mark.filterwarnings('ignore:.*weight')      # past the flip: tested in test_softmax.py
MB = 2**20
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
    sigmoid = loss_func is smooth_bce
    if sigmoid:
        q = smooth_targets(target, 4, eps, prior=prior, sigmoid=True).double()
        return F.binary_cross_entropy_with_logits(x, q, weight, pos_weight=pos_weight, reduction=reduction)
    index = not target.is_floating_point() and not multi_hot
    kept = target != -100 if index else torch.ones(4, dtype=torch.bool)
    y = target.clamp(min=0) if index else target
    q = smooth_targets(y, 4, eps, prior=prior, spread=spread, multi_hot=multi_hot)
    w = torch.ones(4).double() if weight is None else weight
    each = torch.where(kept, -(w * q * x.log_softmax(1)).sum(1), 0.)
    denominator = (w[y] if index else kept.double())[kept].sum()
    if reduction == 'mean': return each.sum() / denominator if kept.any() else each.sum()
    return each if reduction == 'none' else each.sum()


def test_kernels_import_torch_alone():
    "no fastai, no triton, nor anything else that torch has not brought along"
    code = ("import sys, torch; before = set(sys.modules); import fastai_smooth.kernels\n"
            "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
            "assert not new & {'fastai', 'fastcore', 'triton', 'torchvision', 'pandas', 'matplotlib', 'sklearn'}, new\n"
            "assert 'fastai' not in sys.modules and 'triton' not in sys.modules")
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


# ---------------------------------------------------------------- autograd

@every_option
@by_reduction
def test_gradcheck(loss_func, target, options, reduction):
    f = lambda x: loss_func(x, target, reduction=reduction, **options)
    assert torch.autograd.gradcheck(f, logits().requires_grad_())


@every_option
@by_reduction
def test_gradgradcheck(loss_func, target, options, reduction):
    f = lambda x: loss_func(x, target, reduction=reduction, **options)
    assert torch.autograd.gradgradcheck(f, logits().requires_grad_())


@pytest.mark.parametrize('shape,axis', [((2, 3, 2), 1), ((2, 3, 2), -1), ((2, 3, 2, 2), 1), ((1, 2, 2, 2, 2), 1)])
def test_gradcheck_and_gradgradcheck_of_images(shape, axis):
    x = logits(*shape).requires_grad_()
    rows = x.movedim(axis, -1).shape[:-1]
    y = torch.randint(0, x.shape[axis], rows)
    y.view(-1)[0] = -100
    for f in (lambda x: smooth_cross_entropy(x, y, axis=axis, reduction='none'),
              lambda x: smooth_cross_entropy(x, torch.ones(shape) / shape[axis], axis=axis),
              lambda x: smooth_bce(x, torch.ones(shape))):
        assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize('name', ['index', 'prior', 'matrix', 'weight', 'others', 'soft', 'multi-hot',
                                  'multi-hot, others'])
def test_gradcheck_and_gradgradcheck_of_masked_logits(name):
    "class 4 of 5 is masked and has no mass"
    target, options = SOFTMAX[name]
    if target.dim() == 2: target = F.pad(target, (0, 1))
    grow = dict(weight=lambda w: F.pad(w, (0, 1), value=1.), prior=lambda p: F.pad(p, (0, 1) * p.dim()))
    options = {k: grow[k](v) if k in grow else v for k, v in options.items()}
    if name == 'matrix': options['prior'][4, 4] = 1.
    mask = torch.full((4, 1), -torch.inf, dtype=torch.float64)
    f = lambda x: smooth_cross_entropy(torch.cat([x, mask], 1), target, **options)
    x = logits().requires_grad_()
    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize('loss_func,options', [(smooth_cross_entropy, {}), (smooth_cross_entropy, dict(weight=W)),
                                               (smooth_bce, dict(pos_weight=W))])
def test_gradcheck_and_gradgradcheck_of_soft_targets(loss_func, options):
    "w.r.t. logits and targets together, as F.cross_entropy allows"
    f = lambda x, y: loss_func(x, y, **options)
    inputs = logits().requires_grad_(), SOFT.clone().requires_grad_()
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


@every_option
@by_reduction
def test_several_backwards(loss_func, target, options, reduction):
    "retain_graph: the first, second and third backward give the same gradient, with any grad_output"
    x = logits().requires_grad_()
    loss = loss_func(x, target, reduction=reduction, **options)
    expected = plain_loss(loss_func, x, target, reduction=reduction, **options)
    for scale in (1., 1., -3.):
        g = torch.full_like(loss, scale)
        grad, = torch.autograd.grad(loss, x, g, retain_graph=True)
        assert distance(grad, torch.autograd.grad(expected, x, g, retain_graph=True)[0]) < 1e-6
    kept = grad.clone()
    torch.autograd.grad(loss, x, torch.ones_like(loss), retain_graph=True)
    assert torch.equal(grad, kept), 'a gradient handed out was overwritten by the next backward'


def test_retain_graph_accumulates():
    "backward twice: twice the gradient; a third without retain_graph ends it"
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        x = logits().requires_grad_()
        once, = torch.autograd.grad(loss_func(x, target), x)
        loss = loss_func(x, target)
        loss.backward(retain_graph=True)
        assert distance(x.grad, once) < 1e-12
        loss.backward()
        assert distance(x.grad, 2 * once) < 1e-12
        try: loss.backward()
        except RuntimeError: continue                             # "a second time", as PyTorch has it
        assert distance(x.grad, 3 * once) < 1e-12


def test_several_losses_of_the_same_logits():
    x = logits().requires_grad_()
    a, b = smooth_cross_entropy(x, INDEX), smooth_cross_entropy(x, SOFT, .3)
    c = smooth_bce(x, HOT)
    apart = [torch.autograd.grad(l, x, retain_graph=True)[0] for l in (a, b, c)]
    together, = torch.autograd.grad(a + 2 * b + 3 * c, x)
    assert distance(together, apart[0] + 2 * apart[1] + 3 * apart[2]) < 1e-12


@every_option
@by_reduction
def test_create_graph(loss_func, target, options, reduction):
    "a gradient penalty: its own gradient, and afterwards the first one again"
    x = logits().requires_grad_()
    results = []
    for f in (loss_func, lambda *args, **kw: plain_loss(loss_func, *args, **kw)):
        loss = f(x, target, reduction=reduction, **options)
        g = torch.linspace(-1, 2, loss.numel()).double().view_as(loss) + .1
        grad, = torch.autograd.grad(loss, x, g, create_graph=True)
        penalty, = torch.autograd.grad((grad ** 2).sum() + loss.sum(), x, retain_graph=True)
        again, = torch.autograd.grad(loss, x, g)
        results.append([grad, penalty, again])
    assert max(map(distance, *results)) < 1e-6


def test_create_graph_after_a_backward():
    "the first backward drops what it kept; the second, with create_graph, starts from the logits"
    x = logits().requires_grad_()
    loss, plain = smooth_cross_entropy(x, INDEX), plain_loss(smooth_cross_entropy, x, INDEX)
    torch.autograd.grad(loss, x, retain_graph=True)
    grads = [torch.autograd.grad(l, x, create_graph=True)[0] for l in (loss, plain)]
    assert distance(*grads) < 1e-6
    assert distance(*(torch.autograd.grad(g.pow(3).sum(), x)[0] for g in grads)) < 1e-6


def test_hessian():
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        hessians = [torch.autograd.functional.hessian(lambda x: f(x, target), logits().mul(0).add(SOFT))
                    for f in (loss_func, lambda x, y: plain_loss(loss_func, x, y))]
        assert distance(*hessians) < 1e-6


def test_grad_output_of_any_strides():
    "expanded (a sum's), transposed, and zero for some rows"
    x, y = logits(4, 4, 3), torch.randint(0, 4, (4, 3))
    for g in (torch.full((1, 1), 2.).double().expand(4, 3), rand(3, 4).T, torch.eye(4, 1).double().expand(4, 3)):
        ours = loss_and_grad(smooth_cross_entropy, x, y, .1, reduction='none', grad_output=g)
        theirs = loss_and_grad(F.cross_entropy, x, y, label_smoothing=.1, reduction='none', grad_output=g)
        assert max(map(distance, ours, theirs)) < 1e-10


def test_logits_changed_in_place_after_the_loss():
    "an error from autograd, or the gradient of the loss that was computed; never another number"
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        leaf = logits().requires_grad_()
        expected, = torch.autograd.grad(loss_func(leaf * 1, target), leaf)
        x = leaf * 1
        loss = loss_func(x, target)
        x.detach().mul_(0)
        try: grad, = torch.autograd.grad(loss, leaf)
        except RuntimeError as e: assert 'inplace' in str(e)
        else: assert distance(grad, expected) < 1e-12


def test_checkpoint():
    "activation checkpointing runs the loss again inside backward"
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        x = logits().requires_grad_()
        grads = [torch.autograd.grad(loss, x)[0] for loss in
                 (loss_func(x * 2, target), checkpoint(lambda x: loss_func(x * 2, target), x, use_reentrant=False))]
        assert distance(*grads) < 1e-12


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_several_backwards_in_half_precision(dtype):
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        x = logits().to(dtype).requires_grad_()
        loss = loss_func(x, target)
        first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        graphed, = torch.autograd.grad(loss, x, create_graph=True)
        assert first.dtype == second.dtype == graphed.dtype == dtype
        assert max(distance(second, first), distance(graphed, first)) < 2 * torch.finfo(dtype).eps


def rounded(v, dtype):
    "as numbers are when they are stored; Triton's interpreter cuts the digits of a bfloat16 off"
    cut = dtype == torch.bfloat16 and os.environ.get('TRITON_INTERPRET') == '1' and os.environ.get('SMOOTH_TEST_BACKEND') == 'triton'
    return (v.float().view(torch.int32) >> 16 << 16).view(torch.float32).to(dtype) if cut else v.to(dtype)


def off_by_rounding(loss_func, x, target, by, **options):
    "The share of a half-precision gradient that is not the float64 one, rounded"
    exact = loss_and_grad(loss_func, x.double(), target, .1, grad_output=by, **options)[1]
    return (loss_and_grad(loss_func, x, target, .1, grad_output=by, **options)[1] != rounded(exact, x.dtype)).double().mean().item()


@pytest.mark.parametrize('by', [1., .25, 1 / 3, 3., 'a row'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('head', ['index', 'soft', 'sigmoid'])
def test_half_precision_gradient_is_rounded_once(head, dtype, by):
    "whatever it is multiplied by: weights of rows, a share of accumulated batches. Rounded before that and after, a quarter is an ulp off"
    x, options = torch.randn(64, 1000).to(dtype), dict(reduction='none') if by == 'a row' else {}
    target = {'index': torch.randint(1000, (64,)), 'soft': torch.rand(64, 1000).softmax(1), 'sigmoid': torch.rand(64, 1000) < .1}[head]
    if by == 'a row': by = torch.rand(64, 1000) if head == 'sigmoid' else torch.rand(64)
    assert off_by_rounding(smooth_bce if head == 'sigmoid' else smooth_cross_entropy, x, target, by, **options) < .005


def test_half_precision_gradient_kept_in_float32(monkeypatch):
    "as on a GPU, where it is not made twice"
    for module in (softmax, sigmoid): monkeypatch.setattr(module, 'early_grad', lambda x, reduction: torch.empty_like(x, dtype=torch.float32))
    for dtype in (torch.bfloat16, torch.float16): test_half_precision_gradient_is_rounded_once('soft', dtype, 3.)
    for head in ('index', 'soft', 'sigmoid'): test_half_precision_gradient_is_rounded_once(head, torch.bfloat16, 'a row')


@every_option
def test_no_grad(loss_func, target, options):
    "the same number, and nothing to backpropagate"
    x = logits().requires_grad_()
    expected = loss_func(x, target, **options)
    assert expected.requires_grad and expected.dim() == 0
    with torch.no_grad(): quiet = loss_func(x, target, **options)
    with torch.inference_mode(): inferred = loss_func(x.detach(), target, **options)
    constant = loss_func(x.detach(), target, **options)
    for loss in (quiet, inferred, constant):
        assert not loss.requires_grad and distance(loss, expected) < 1e-12


# ---------------------------------------------------------------- memory and layout

def allocations(f):
    "(sizes of all allocations in bytes, the most that was live at once) while f() runs; the result is kept to the end"
    f()                                                            # warm-up: caches, lazy imports
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: kept = f()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]')
    live = peak = 0
    for _, size in events: live += size; peak = max(peak, live)
    del kept
    return [size for _, size in events if size > 0], peak


def test_allocations_are_seen():
    "the measure itself: F.cross_entropy keeps a tensor of the logits' size, and copies strided ones"
    x, y = torch.randn(256, 10000), torch.zeros(256).long()
    with torch.no_grad(): sizes, peak = allocations(lambda: F.cross_entropy(x, y, label_smoothing=.1))
    assert max(sizes) == x.nbytes and peak >= x.nbytes
    sizes, _ = allocations(lambda: x.T.contiguous().T.softmax(1))
    assert sizes.count(x.nbytes) >= 2


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
    if option == 'soft': y = torch.rand(shape).softmax(1)
    if 'multi-hot' in option: y, options = torch.rand(shape) < 2 / K, dict(multi_hot=True)
    if 'others' in option: options['spread'] = 'others'
    if 'weight' in option: options['weight'] = torch.rand(K) + .5
    if 'prior' in option: options['prior'] = torch.full((K,), 1 / K)
    if option == 'matrix': options['prior'] = torch.rand(K, K).softmax(1)
    if option == 'per-class eps': options['eps'] = torch.rand(K) / 2
    if option == 'masked': x[:, 1:3] = -torch.inf; y[(y == 1) | (y == 2)] = 0
    if kind == 'channels_last' and y.dim() == 4: y = y.to(memory_format=torch.channels_last)
    return x, y, options


BIG = ([('wide', o) for o in ('index', 'ignored', 'soft', 'multi-hot', 'multi-hot, others', 'weight', 'prior', 'weight, prior', 'weight, ignored',
                              'per-class eps', 'masked', 'soft, weight')] +
       [('tall', o) for o in ('index', 'matrix', 'soft')] +
       [('image', o) for o in ('index', 'weight', 'soft', 'multi-hot', 'masked', 'ignored')] +
       [(k, o) for k in ('channels_last', 'transposed') for o in ('index', 'soft')] +
       [('sliced', 'index'), ('volume', 'index')])


@pytest.mark.parametrize('kind,option,dtype', [(*b, torch.float32) for b in BIG] +
                         [(k, 'index', d) for k in ('wide', 'image') for d in (torch.float16, torch.bfloat16)])
def test_no_grad_memory(kind, option, dtype):
    "under no_grad only chunks of 1 MB are allocated, few at a time; one value a row, and the prior's own size, aside"
    x, y, options = big_case(kind, option, dtype)
    row_values, prior = 8 * x.numel() // x.shape[1], 8 * options['prior'].numel() if 'prior' in options else 0
    x.requires_grad_()
    for reduction in ('mean', 'none'):
        with torch.no_grad():
            sizes, peak = allocations(lambda: smooth_cross_entropy(x, y, reduction=reduction, **options))
        assert max(sizes) <= max(MB, row_values, prior), f'{max(sizes):,} bytes at once'
        assert peak <= 10 * MB + 4 * row_values < x.numel() * 4, f'{peak:,} bytes live'


@pytest.mark.parametrize('kind,option,dtype', [(*b, torch.float32) for b in BIG] +
                         [(k, 'index', d) for k in ('wide', 'image') for d in (torch.float16, torch.bfloat16)])
def test_forward_memory(kind, option, dtype):
    "with grad the forward allocates at most one tensor of the logits' size: what backward turns into the gradient"
    x, y, options = big_case(kind, option, dtype)
    row_values = 8 * x.numel() // x.shape[1]
    x.requires_grad_()
    sizes, peak = allocations(lambda: smooth_cross_entropy(x, y, **options))
    full = x.numel() * 4
    assert sum(size > full / 4 for size in sizes) <= 1, [f'{s:,}' for s in sizes if s > full / 4]
    assert peak <= full + 10 * MB + 4 * row_values, f'{peak:,} bytes live'


@pytest.mark.parametrize('kind', ['image', 'channels_last', 'transposed', 'sliced'])
def test_layout_no_transpose_copy(kind):
    "class axis 1 or strided: forward and backward hold one tensor of the logits' size, and the numbers are PyTorch's"
    x, y, _ = big_case(kind)
    x.requires_grad_()
    sizes, peak = allocations(lambda: torch.autograd.grad(smooth_cross_entropy(x, y), x))
    assert sum(size > x.numel() for size in sizes) <= 1 and peak <= x.numel() * 4 + 20 * MB
    actual = loss_and_grad(smooth_cross_entropy, x, y)
    assert max(map(distance, actual, loss_and_grad(F.cross_entropy, x.double(), y, label_smoothing=.1))) < 1e-5


def test_gradient_memory_is_released():
    "after backward nothing of the logits' size hangs on the loss but the gradient"
    x, y, _ = big_case('wide')
    x.requires_grad_()
    def step():
        loss = smooth_cross_entropy(x, y)
        return loss, torch.autograd.grad(loss, x)
    sizes, peak = allocations(step)
    assert sum(size > x.numel() for size in sizes) <= 1 and peak <= x.nbytes + 8 * MB


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('target_dtype', [torch.bool, torch.uint8, torch.float32])
def test_sigmoid_no_grad_memory(dtype, target_dtype):
    "the mean of 5 million losses with no tensor of them; reduction='none' allocates its result"
    x, y = torch.randn(256, 20000).to(dtype).requires_grad_(), (torch.rand(256, 20000) < .1).to(target_dtype)
    for options in ({}, dict(weight=torch.rand(20000), pos_weight=torch.rand(20000) + .5)):
        with torch.no_grad(): sizes, peak = allocations(lambda: smooth_bce(x, y, **options))  # Python 3.10 holds what a call was given till it returns
        assert max(sizes) <= MB and peak <= 7 * MB, f'{max(sizes):,} bytes at once, {peak:,} live'
    with torch.no_grad():
        sizes, peak = allocations(lambda: smooth_bce(x, y, reduction='none'))
    assert sum(s > MB for s in sizes) <= 1 and peak <= x.numel() * 4 + 6 * MB


@pytest.mark.parametrize('target_dtype', [torch.bool, torch.float32])
def test_sigmoid_forward_memory(target_dtype):
    x, y = torch.randn(256, 20000).requires_grad_(), (torch.rand(256, 20000) < .1).to(target_dtype)
    sizes, peak = allocations(lambda: smooth_bce(x, y))
    assert sum(s > x.nbytes / 4 for s in sizes) <= 1 and peak <= x.nbytes + 6 * MB


@pytest.mark.parametrize('shape,axis', [((3, 5, 4, 2), 1), ((3, 5, 4, 2), -1), ((3, 5, 4, 2), 2), ((3, 5, 4, 2, 2), 1)])
def test_layout_numbers(shape, axis):
    "every stride order of the logits gives the same loss and gradient"
    x = logits(*shape)
    y = torch.randint(0, shape[axis], x.movedim(axis, -1).shape[:-1])
    expected = loss_and_grad(smooth_cross_entropy, x, y, axis=axis, reduction='none')
    for order in ([3, 0, 2, 1], [1, 2, 3, 0], [0, 2, 3, 1], [2, 1, 0, 3]):
        order = order + list(range(4, len(shape)))
        inverse = torch.tensor(order).argsort().tolist()
        strided = x.permute(order).contiguous().permute(inverse)
        actual = loss_and_grad(smooth_cross_entropy, strided, y, axis=axis, reduction='none')
        assert max(map(distance, actual, expected)) < 1e-12
    wide = x.expand(2, *shape).reshape(2, *shape)[0, ..., ::1]
    assert distance(smooth_cross_entropy(x[:1].expand(3, *shape[1:]), y[:1].expand(3, *y.shape[1:]), axis=axis),
                    smooth_cross_entropy(wide[:1], y[:1], axis=axis)) < 1e-12


# ---------------------------------------------------------------- inputs

@every_option
@by_reduction
def test_inputs_never_modified(loss_func, target, options, reduction):
    "nor anything of theirs written to, through forward, backward and double backward"
    x = logits().requires_grad_()
    tensors = [x, target, *(v for v in options.values() if isinstance(v, torch.Tensor))]
    before = [(t.detach().clone(), t._version) for t in tensors]
    loss = loss_func(x, target, reduction=reduction, **options)
    grad, = torch.autograd.grad(loss, x, torch.ones_like(loss), create_graph=True)
    torch.autograd.grad(grad.sum(), x, allow_unused=True)
    loss_func(x, target, reduction=reduction, **options).sum().backward()
    for t, (values, version) in zip(tensors, before):
        assert torch.equal(t, values) and t._version == version


def test_inputs_never_modified_when_masked_or_large():
    "the branches with chunks and masks too"
    for kind, option in (('wide', 'masked'), ('wide', 'index'), ('channels_last', 'index'), ('sliced', 'soft')):
        x, y, _ = big_case(kind, option)
        kept = x.clone(), y.clone()
        loss_and_grad(smooth_cross_entropy, x, y)
        with torch.no_grad(): smooth_cross_entropy(x, y)
        assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


def test_target_views_and_mixed_dtypes():
    "soft targets, weights and priors of another float dtype than the logits"
    x, y = torch.randn(4, 4), SOFT
    expected = F.cross_entropy(x.double(), SOFT, W, label_smoothing=.1)
    with_prior = smooth_cross_entropy(x.double(), INDEX, prior=S[0])
    for dtype in (torch.float32, torch.float64):
        assert distance(smooth_cross_entropy(x, y.to(dtype), .1, weight=W.to(dtype)), expected) < 1e-6
        assert distance(smooth_cross_entropy(x, INDEX, prior=S[0].to(dtype)), with_prior) < 1e-6


def test_tensor_base():
    "fastai's subclasses are accepted and unwrapped; the result is a plain Tensor, the gradient reaches the subclass"
    from fastai.torch_core import TensorBase, TensorCategory, TensorImage, TensorMultiCategory
    x = logits()
    cases = [(smooth_cross_entropy, INDEX, TensorCategory), (smooth_cross_entropy, SOFT, TensorBase),
             (smooth_bce, HOT.float(), TensorMultiCategory)]
    for (loss_func, target, kind), wrap in product(cases, (TensorBase, TensorImage)):
        expected = loss_and_grad(loss_func, x, target)
        leaf = x.clone().as_subclass(wrap).requires_grad_()     # wrap(x) would make it float32
        for reduction in REDUCTIONS:
            assert type(loss_func(leaf, target.as_subclass(kind), reduction=reduction)) is torch.Tensor
            assert type(loss_func(x, target.as_subclass(kind), reduction=reduction)) is torch.Tensor
        loss = loss_func(leaf, target.as_subclass(kind))
        loss.backward()
        assert max(map(distance, (loss, leaf.grad.as_subclass(torch.Tensor)), expected)) < 1e-12
    for name, value in (('weight', W), ('prior', S[0]), ('prior', S), ('eps', W / 2)):
        loss = smooth_cross_entropy(x, INDEX, **{name: value.as_subclass(TensorBase)})
        assert type(loss) is torch.Tensor and distance(loss, smooth_cross_entropy(x, INDEX, **{name: value})) < 1e-12
    for name, value in (('weight', W), ('prior', S[0]), ('pos_weight', W)):
        loss = smooth_bce(x, HOT, **{name: value.as_subclass(TensorBase)})
        assert type(loss) is torch.Tensor and distance(loss, smooth_bce(x, HOT, **{name: value})) < 1e-12
    assert distance(smooth_targets(INDEX.as_subclass(TensorCategory), 4), smooth_targets(INDEX, 4)) == 0


# ---------------------------------------------------------------- torch.compile

COMPILED = [p for p in LOSSES if p.id in ('softmax weight, ignored', 'softmax matrix', 'softmax soft, weight',
                                          'softmax multi-hot, others', 'softmax per-class eps', 'softmax nothing left',
                                          'sigmoid everything', 'sigmoid bool')]


def compiled_loss_and_grad(loss_func, x, target, backend, **options):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: loss_func(x, y, **options), fullgraph=True, backend=backend)
    return loss_and_grad(compiled, x, target)


@pytest.mark.parametrize('loss_func,target,options', COMPILED)
def test_compile_fullgraph(loss_func, target, options):
    "no graph break; forward and one backward with eager's numbers"
    x = logits()
    for reduction in ('mean', 'none'):
        actual = compiled_loss_and_grad(loss_func, x, target, 'aot_eager', reduction=reduction, **options)
        assert max(map(distance, actual, loss_and_grad(loss_func, x, target, reduction=reduction, **options))) < 1e-6


def test_compile_fullgraph_inductor():
    "a whole training step's loss, compiled for real"
    model, x, y = torch.nn.Linear(6, 4), torch.randn(8, 6), torch.tensor([0, 1, 2, 3, -100, 1, 0, 2])
    def step(x, y): return smooth_cross_entropy(model(x), y, .2, weight=W.float())
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    results = [(loss, *torch.autograd.grad(loss, list(model.parameters()))) for loss in (compiled(x, y), step(x, y))]
    assert max(map(distance, *results)) < 1e-5
    wrong = y.clone()
    wrong[3] = 44
    with pytest.raises((IndexError, RuntimeError), match='44'): compiled(x, wrong)      # its check survives inductor


def test_compile_masked_logits():
    x, y = logits(), INDEX.clone()
    x[:, 2], y[3] = -torch.inf, 0
    actual = compiled_loss_and_grad(smooth_cross_entropy, x, y, 'aot_eager')
    assert max(map(distance, actual, loss_and_grad(smooth_cross_entropy, x, y))) < 1e-6 and (actual[1][:, 2] == 0).all()


def test_compile_index_error():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: smooth_cross_entropy(x, y), fullgraph=True, backend='aot_eager')
    compiled(logits(), INDEX)
    with pytest.raises((IndexError, RuntimeError), match='44'): compiled(logits(), torch.tensor([0, 44, 1, 2]))


def test_compile_dynamic_batch():
    "the last, smaller batch"
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: smooth_cross_entropy(x, y), fullgraph=True, backend='aot_eager', dynamic=True)
    for n in (4, 3, 2):
        assert max(map(distance, loss_and_grad(compiled, logits()[:n] * 0 + SOFT[:n], INDEX[:n]),
                       loss_and_grad(smooth_cross_entropy, SOFT[:n], INDEX[:n]))) < 1e-6


def test_compile_half_precision():
    x = logits().half()
    loss, grad = compiled_loss_and_grad(smooth_cross_entropy, x, INDEX, 'aot_eager')
    expected = loss_and_grad(smooth_cross_entropy, x, INDEX)
    assert loss.dtype == torch.float32 and grad.dtype == torch.half
    assert distance(loss, expected[0]) < 1e-6 and distance(grad, expected[1]) < 2e-3


def test_compile_opcheck():
    "whatever custom ops stand in the graph are well-behaved ones"
    calls = []
    class Record(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if str(target).startswith('fastai_smooth'): calls.append((target, args, kwargs))
            return super().call_function(target, args, kwargs)
    def backend(gm, example_inputs): return lambda *inputs: Record(gm).run(*inputs)
    torch._dynamo.reset()
    torch.compile(lambda x, y: smooth_cross_entropy(x, y), fullgraph=True, backend=backend)(logits(), INDEX)
    for op, args, kwargs in calls: torch.library.opcheck(op, args, kwargs)


# ---------------------------------------------------------------- torch.func, fake and meta tensors

@pytest.mark.parametrize('loss_func,target,options', [p for p in LOSSES if p.id != 'softmax nothing left'])
def test_torch_func_grad(loss_func, target, options):
    x = logits()
    grad, loss = torch.func.grad_and_value(lambda x: loss_func(x, target, **options))(x)
    assert max(map(distance, (loss, grad), loss_and_grad(loss_func, x, target, **options))) < 1e-6


def test_torch_func_vmap():
    "over a batch of batches; per-sample gradients; a Hessian; forward mode"
    x = logits(3, 4, 4)
    cases = [(smooth_cross_entropy, y) for y in (INDEX, SOFT, IGNORED)] + [(smooth_bce, HOT)]
    for loss_func, target in cases:
        targets = torch.stack([target, target.flip(0), target])
        one_by_one = [loss_and_grad(loss_func, a, b) for a, b in zip(x, targets)]
        assert distance(torch.func.vmap(loss_func)(x, targets), torch.stack([l for l, _ in one_by_one])) < 1e-6
        grads = torch.func.vmap(torch.func.grad(loss_func))(x, targets)
        assert distance(grads, torch.stack([g for _, g in one_by_one])) < 1e-6
        hessian = torch.func.hessian(loss_func)(x[0], target)
        expected = torch.autograd.functional.hessian(lambda x: plain_loss(loss_func, x, target), x[0])
        assert distance(hessian, expected) < 1e-6


def test_torch_func_masked_logits():
    x, y = logits(), INDEX.clone()
    x[:, 2], y[3] = -torch.inf, 0
    grad, loss = torch.func.grad_and_value(smooth_cross_entropy)(x, y)
    assert max(map(distance, (loss, grad), loss_and_grad(smooth_cross_entropy, x, y))) < 1e-6


def batched_grads(f, x):
    "with five grad_outputs at once"
    loss = f(x)
    return torch.autograd.grad(loss, x, torch.linspace(-1, 2, 5 * loss.numel(), dtype=loss.dtype).view(5, *loss.shape), is_grads_batched=True)[0]


def batched_grads_of_grads(f, x):
    loss = f(x)
    grads, = torch.autograd.grad(loss, x, torch.linspace(-1, 2, 5 * loss.numel(), dtype=loss.dtype).view(5, *loss.shape), is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(grads.pow(2).sum(), x)[0]


BATCHED = dict(grads=batched_grads, grads_of_grads=batched_grads_of_grads, jacobian=partial(torch.autograd.functional.jacobian, vectorize=True),
               jacobian_forward=partial(torch.autograd.functional.jacobian, vectorize=True, strategy='forward-mode'),
               hessian=lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x, vectorize=True))


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')
@every_option
@pytest.mark.parametrize('how,reduction', [('grads', 'mean'), *product(BATCHED, ['none'])])
def test_batched_gradients(how, reduction, loss_func, target, options):
    "several gradients at once: as of plain ops"
    x = logits().requires_grad_()
    actual, expected = (BATCHED[how](lambda x: f(x, target, reduction=reduction, **options), x) for f in (loss_func, partial(plain_loss, loss_func)))
    assert distance(actual, expected) < 1e-6


@every_option
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_make_fx(reduction, loss_func, target, options):
    "a step becomes a graph of plain ops, which gives the same for other logits"
    from torch.fx.experimental.proxy_tensor import make_fx
    def step(x):
        loss = loss_func(x, target, reduction=reduction, **options)
        return loss, torch.autograd.grad(loss, x, torch.full_like(loss, .3))[0]
    x, z = logits().requires_grad_(), logits().requires_grad_()
    assert max(map(distance, make_fx(step)(x)(z), step(z))) < 1e-6


@every_option
@by_reduction
def test_fake_and_meta(loss_func, target, options, reduction):
    "shapes and dtypes without data: the checks of values are skipped"
    from torch._subclasses.fake_tensor import FakeTensorMode
    expected = loss_func(logits(), target, reduction=reduction, **options)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
        x = fake(logits()).requires_grad_()
        loss = loss_func(x, fake(target), reduction=reduction, **{k: fake(v) for k, v in options.items()})
        assert loss.shape == expected.shape and loss.dtype == expected.dtype
        loss.sum().backward()
        assert x.grad.shape == (4, 4)
    meta = lambda t: t.to('meta') if isinstance(t, torch.Tensor) else t
    loss = loss_func(meta(logits()), meta(target), reduction=reduction, **{k: meta(v) for k, v in options.items()})
    assert loss.device.type == 'meta' and loss.shape == expected.shape


@every_option
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast(loss_func, target, options, dtype):
    "autocast lowers the model's matrix products, not the loss: the same numbers inside as outside"
    x = logits().to(dtype)
    expected = loss_and_grad(loss_func, x, target, **options)
    with torch.autocast('cpu', torch.bfloat16): actual = loss_and_grad(loss_func, x, target, **options)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    assert distance(actual[0], expected[0]) < 1e-6 and distance(actual[1], expected[1]) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_class_index_out_of_range_on_cuda():
    "a nan loss for that row, no error, and no wait for the GPU: not for any option"
    x = logits().float().cuda().requires_grad_()
    bad = torch.tensor([0, 44, -100, 2]).cuda()
    moved = [(loss_func, target.cuda(), {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()})
             for loss_func, target, options in (p.values for p in LOSSES)]
    torch.cuda.set_sync_debug_mode('error')
    try:
        each, mean = smooth_cross_entropy(x, bad, reduction='none'), smooth_cross_entropy(x, bad)
        for loss_func, target, options in moved: loss_func(x, target, **options).backward()
    finally: torch.cuda.set_sync_debug_mode('default')
    assert each.isnan().tolist() == [False, True, False, False] and mean.isnan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@every_option
def test_cuda_has_the_numbers_of_the_cpu(loss_func, target, options):
    x, move = logits(), lambda v: v.cuda() if isinstance(v, torch.Tensor) else v
    actual = loss_and_grad(loss_func, x.cuda(), target.cuda(), **{k: move(v) for k, v in options.items()})
    expected = loss_and_grad(loss_func, x, target, **options)
    assert max(distance(a.cpu(), e) for a, e in zip(actual, expected)) < 1e-10


def test_backend_torch():
    "backend='torch' by name is what 'auto' means on a CPU"
    x = logits()
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        assert torch.equal(loss_func(x, target, backend='torch'), loss_func(x, target, backend='auto'))


@pytest.mark.parametrize('changed', ['target', 'weight', 'prior'])
def test_changed_in_place_before_backward(changed):
    "As in PyTorch: an error, not the gradient of another loss"
    for f, shape in ((smooth_cross_entropy, (4, 3)), (smooth_bce, (8000, 3))):
        x, y = torch.randn(shape, requires_grad=True), torch.rand(shape).softmax(1)
        kwargs = dict(weight=torch.rand(3)+.5) if changed == 'weight' else dict(prior=torch.rand(3).softmax(0))
        loss = f(x, y, **kwargs)
        (y if changed == 'target' else kwargs[changed]).mul_(2)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()


@pytest.mark.parametrize('changed', ['target', 'prior'])
def test_changed_in_place_few_logits(changed):
    "The smoothed labels of few logits are kept, not the labels: the gradient is that of the loss that was computed"
    x, y, prior = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3), torch.rand(3)
    expected, = torch.autograd.grad(smooth_bce(x, y, prior=prior), x)
    loss = smooth_bce(x, y, prior=prior)
    (y if changed == 'target' else prior).mul_(2)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def grads_of_all_paths(x, y, **kwargs):
    "The gradient by hand, and those of the plain formula: torch.func, create_graph, compiled"
    f = lambda x: smooth_cross_entropy(x, y, reduction='sum', **kwargs)
    leaf = x.clone().requires_grad_()
    yield torch.autograd.grad(f(leaf), leaf)[0]
    yield torch.autograd.grad(f(leaf), leaf, create_graph=True)[0].detach()
    yield torch.func.grad(f)(x)
    yield torch.autograd.grad(torch.compile(f, fullgraph=True, backend='aot_eager')(leaf), leaf)[0]


@pytest.mark.parametrize('junk', [-torch.inf, torch.nan, torch.inf])
def test_ignored_rows_of_junk_on_every_path(junk):
    x = torch.randn(3, 4)
    x[1] = junk
    for g in grads_of_all_paths(x, torch.tensor([0, -100, 2])):
        assert (g[1] == 0).all() and g.isfinite().all() and (g[0] != 0).all()


@pytest.mark.parametrize('spread', ['all', 'others'])
def test_masked_logits_true_class_masked_on_every_path(spread):
    "A p - t on the classes that are left, 0 on the masked one"
    x = torch.tensor([[-torch.inf, 1., 2.]])
    by_hand, *others = grads_of_all_paths(x, torch.tensor([0]), eps=.3, spread=spread)
    p = torch.tensor([1., 2.]).softmax(0)
    torch.testing.assert_close(by_hand, torch.cat([torch.zeros(1), p-.15])[None])
    for g in others: torch.testing.assert_close(g, by_hand)
