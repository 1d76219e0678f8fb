"Both losses in autograd: gradients of every order, several backwards, half precision, what is kept and what was changed."
from functools import partial
from itertools import product
import os

import pytest, torch
import torch.nn.functional as F
from torch.autograd import forward_ad, grad

from fastai_smooth.kernels import sigmoid, smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy, softmax
from fastai_smooth.kernels.autograd import accumulator, empty_grad, scaled_grad
from .cases import HOT, INDEX, ON_TRITON, SOFT, SOFTMAX, W, by_reduction, every_option, gradients_check, logits, plain_loss, some_options
from reference import distance, loss_and_grad

pytestmark = pytest.mark.filterwarnings('ignore:.*weight')  # past the flip: test_checks.py has it
BOTH = pytest.mark.parametrize('loss_func,target', [(smooth_cross_entropy, INDEX), (smooth_bce, HOT)])

@pytest.fixture
def loop(monkeypatch):
    "Few logits, too, go through the loss that is written here; PyTorch's own is not what is tested."
    for module in (softmax, sigmoid): monkeypatch.setattr(module, 'pytorch_loss', lambda *args: None)

@every_option
@by_reduction
def test_backwards(loop, loss_func, target, options, reduction):
    "The first, another with another grad_output, one with create_graph, its gradient, and one after that: those of the plain formula."
    x, results = logits().requires_grad_(), []
    for f in (loss_func, partial(plain_loss, loss_func)):
        loss = f(x, target, reduction=reduction, **options)
        one, g = torch.ones_like(loss), torch.linspace(-1, 2, loss.numel()).double().view_as(loss) + .1
        first, = grad(loss, x, one, retain_graph=True)
        kept = first.clone()
        second, = grad(loss, x, -3 * one, retain_graph=True)
        graphed, = grad(loss, x, g, create_graph=True)
        penalty, = grad((graphed ** 2).sum() + loss.sum(), x, retain_graph=True)
        again, = grad(loss, x, g)
        assert torch.equal(first, kept), 'a gradient handed out was overwritten by the next backward'
        results.append([first, second, graphed, penalty, again])
    assert max(map(distance, *results)) < 1e-6

@every_option
def test_gradgradcheck(loop, loss_func, target, options):
    f = lambda x: loss_func(x, target, reduction='none', **options)
    assert gradients_check(f, logits().requires_grad_())

def test_gradgradcheck_of_images(loop):
    x, y = logits(2, 3, 2, 2).requires_grad_(), torch.randint(0, 3, (2, 2, 2)).index_fill(0, torch.tensor(1), -100)
    for f in (lambda x: smooth_cross_entropy(x, y, reduction='none'), lambda x: smooth_bce(x, torch.ones(x.shape))):
        assert gradients_check(f, x)

@pytest.mark.parametrize('name', ['index', 'weight, prior', 'weight, matrix', 'others', 'soft', 'multi-hot, others'])
def test_gradgradcheck_of_masked_logits(loop, name):
    "Class 4 of 5 is masked and has no mass."
    target, options = SOFTMAX[name]
    if target.dim() == 2: target = F.pad(target, (0, 1))
    grow = dict(weight=lambda w: F.pad(w, (0, 1), value=1.), prior=lambda p: F.pad(p, (0, 1) * p.dim()))
    options = {k: grow[k](v) if k in grow else v for k, v in options.items()}
    if name == 'weight, matrix': options['prior'][4, 4] = 1.
    f = lambda x: smooth_cross_entropy(torch.cat([x, torch.full((4, 1), -torch.inf)], 1), target, **options)
    assert gradients_check(f, logits().requires_grad_())

@pytest.mark.parametrize('loss_func,options', [(smooth_cross_entropy, {}), (smooth_cross_entropy, dict(weight=W)), (smooth_bce, dict(pos_weight=W))])
def test_gradgradcheck_of_soft_targets(loss_func, options):
    "W.r.t. logits and targets together, as F.cross_entropy allows."
    f = lambda x, y: loss_func(x, y, **options)
    inputs = logits().requires_grad_(), SOFT.clone().requires_grad_()
    assert gradients_check(f, inputs)

@pytest.mark.parametrize('learned', ['weight', 'prior', 'prior of both', 'eps', 'target'])
@pytest.mark.parametrize('few', [True, False])
def test_what_is_learned_gets_its_gradient(few, learned, monkeypatch):
    "Weights, priors, an eps a class, soft targets: by plain ops, or by PyTorch where that has one, never a part of it."
    for module in (softmax, sigmoid): monkeypatch.setattr(module, 'FEW', 10**4 if few else 0)
    x = logits()
    def weighed(loss_func, x, target, weight=None, **options):   # PyTorch's sigmoid loss gives a weight no gradient
        if loss_func is smooth_cross_entropy or weight is None: return plain_loss(loss_func, x, target, weight=weight, **options)
        return (plain_loss(loss_func, x, target, reduction='none', **options) * weight).mean()
    for loss_func, eps in product((smooth_cross_entropy, smooth_bce), (0., .2)):
        if learned == 'eps' and loss_func is smooth_bce or learned == 'prior of both' and loss_func is smooth_cross_entropy: continue
        v = (SOFT if learned == 'target' else W).clone().requires_grad_()
        options = dict(eps=eps) | {'weight': dict(weight=v), 'prior': dict(prior=v.softmax(0)), 'eps': dict(eps=v / 2), 'target': {},
                                   'prior of both': dict(prior=torch.stack([v / 4, v / 2]))}[learned]
        target = v if learned == 'target' else INDEX if loss_func is smooth_cross_entropy else SOFT
        grads = [grad(f(x, target, **options), v, retain_graph=True)[0] for f in (loss_func, partial(weighed, loss_func))]
        assert distance(*(g + 1 for g in grads)) < 1e-6   # eps 0 has none for a prior

@BOTH
def test_retain_graph_accumulates(loop, loss_func, target):
    "Backward twice: twice the gradient; a third without retain_graph ends it. Several losses of the same logits add up, too."
    x = logits().requires_grad_()
    once, = grad(loss_func(x, target), x)
    loss = loss_func(x, target)
    loss.backward(retain_graph=True)
    assert distance(x.grad, once) < 1e-12
    loss.backward()
    assert distance(x.grad, 2 * once) < 1e-12
    together, = grad(loss_func(x, target) + 3 * loss_func(x, SOFT, .3), x)
    assert distance(together, once + 3 * grad(loss_func(x, SOFT, .3), x)[0]) < 1e-12

@pytest.mark.parametrize('changed', ['input', 'target', 'weight', 'prior'])
@pytest.mark.parametrize('rows', [4, 100_000])
def test_changed_in_place_before_backward(rows, changed):
    "As in PyTorch: an error; or, where what was made of it is kept, the gradient of the loss that was computed. Never that of another loss."
    for f in (smooth_cross_entropy, smooth_bce):
        leaf, y = torch.randn(rows, 3, requires_grad=True), torch.rand(rows, 3).softmax(1)
        options = {changed: torch.rand(3).softmax(0)} if changed in ('weight', 'prior') else {}
        expected, = grad(f(leaf, y, **options), leaf)
        x = leaf * 1
        loss = f(x, y, **options)
        dict(options, input=x.detach(), target=y)[changed].mul_(2)
        try: actual, = grad(loss, leaf)
        except RuntimeError as e: assert 'modified by an inplace operation' in str(e)
        else: assert torch.equal(actual, expected)

@every_option
def test_no_grad(loop, loss_func, target, options):
    "The same number, and nothing to backpropagate."
    x = logits().requires_grad_()
    expected = loss_func(x, target, **options)
    assert expected.requires_grad and expected.dim() == 0
    with torch.no_grad(): quiet = loss_func(x, target, **options)
    with torch.inference_mode(): inferred = loss_func(x.detach(), target, **options)
    for loss in (quiet, inferred, loss_func(x.detach(), target, **options)): assert not loss.requires_grad and distance(loss, expected) < 1e-12

# ---------------------------------------------------------------- several gradients at once, and forward mode

def batched(f, x, **options):
    loss = f(x)
    return grad(loss, x, torch.linspace(-1, 2, 5 * loss.numel(), dtype=loss.dtype).view(5, *loss.shape), is_grads_batched=True, **options)[0]

BATCHED = dict(grads=batched, grads_of_grads=lambda f, x: grad(batched(f, x, create_graph=True).pow(2).sum(), x)[0],
               jacobian=partial(torch.autograd.functional.jacobian, vectorize=True),
               jacobian_forward=partial(torch.autograd.functional.jacobian, vectorize=True, strategy='forward-mode'),
               hessian=lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x, vectorize=True))

@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')
@some_options('softmax index', 'softmax weight, ignored', 'softmax weight, matrix', 'softmax multi-hot, others', 'softmax soft', 'sigmoid bool', 'sigmoid everything')
@pytest.mark.parametrize('how', BATCHED)
def test_batched_gradients(loop, how, loss_func, target, options):
    "As of plain ops."
    x = logits().requires_grad_()
    for reduction in ('none', 'mean'):
        if reduction == 'mean' and 'jacobian' in how: continue
        actual, expected = (BATCHED[how](lambda x: f(x, target, reduction=reduction, **options), x) for f in (loss_func, partial(plain_loss, loss_func)))
        assert distance(actual, expected) < 1e-6

@BOTH
def test_forward_mode_without_torch_func(loop, loss_func, target):
    x, along = logits(), logits()
    loss, gradient = loss_and_grad(loss_func, x, target)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(loss_func(forward_ad.make_dual(x, along), target))
        assert distance(out.primal, loss) < 1e-6 and distance(out.tangent, (gradient * along).sum()) < 1e-6

# ---------------------------------------------------------------- half precision, and how a gradient meets its factor

def rounded(v, dtype):
    "As numbers are when they are stored; Triton's interpreter cuts the digits of a bfloat16 off."
    cut = dtype == torch.bfloat16 and os.environ.get('TRITON_INTERPRET') == '1' and ON_TRITON
    return (v.float().view(torch.int32) >> 16 << 16).view(torch.float32).to(dtype) if cut else v.to(dtype)

@pytest.mark.parametrize('by', [1., 1 / 3, 3., 'a row'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('head', ['index', 'soft', 'sigmoid'])
def test_half_precision_gradient_is_rounded_once(head, dtype, by):
    "Whatever it is multiplied by: weights of rows, a share of accumulated batches. Rounded before that and after, a quarter is an ulp off."
    x, options = torch.randn(64, 1000).to(dtype), dict(reduction='none') if by == 'a row' else {}
    target = {'index': torch.randint(1000, (64,)), 'soft': torch.rand(64, 1000).softmax(1), 'sigmoid': torch.rand(64, 1000) < .1}[head]
    loss_func = smooth_bce if head == 'sigmoid' else smooth_cross_entropy
    if by == 'a row': by = torch.rand(64, 1000) if head == 'sigmoid' else torch.rand(64)
    exact = loss_and_grad(loss_func, x.double(), target, .1, grad_output=by, **options)[1]
    leaf = x.requires_grad_()
    loss = loss_func(leaf, target, .1, **options)
    for _ in range(2):   # a later backward, too
        actual, = grad(loss, leaf, torch.as_tensor(by).to(loss.dtype), retain_graph=True)
        assert (actual != rounded(exact, dtype)).double().mean() < .005

def test_half_precision_gradient_kept_in_float32(monkeypatch):
    "As on a GPU, where launches cost more than memory: so it is rounded once, and not made twice."
    for dtype in (torch.float16, torch.bfloat16, torch.float32): assert empty_grad(torch.zeros(2, 3, dtype=dtype, device='meta')).dtype == torch.float32
    for module in (softmax, sigmoid): monkeypatch.setattr(module, 'empty_grad', lambda x: torch.empty_like(x, dtype=torch.float32))
    for dtype in (torch.bfloat16, torch.float16): test_half_precision_gradient_is_rounded_once('soft', dtype, 3.)
    for head in ('index', 'sigmoid'): test_half_precision_gradient_is_rounded_once(head, torch.bfloat16, 'a row')

def made(x, kept, grad_output):
    "What `scaled_grad` gives for a gradient that is 2 where it is made, and the factors that it was made with."
    factors = []
    def make(factor, out):
        factors.append(factor)
        out.copy_(torch.full_like(x, 2.) * factor)
    return scaled_grad(x, kept, grad_output, make), factors

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_scaled_grad(dtype):
    "What the forward made is handed over, multiplied where it is not by 1; a later backward makes it as it was, and multiplies then."
    x, rows = torch.zeros(3, 4, dtype=dtype), torch.tensor([[1.], [2.], [0.]], dtype=dtype)
    assert accumulator(x) == dtype and empty_grad(x).shape == x.shape and empty_grad(x).dtype == dtype
    kept = torch.full_like(x, 2.)
    assert made(x, kept, torch.tensor(1., dtype=dtype)) == (kept, [])
    for g in (torch.tensor(3., dtype=dtype), torch.tensor(3., dtype=dtype).expand(3, 1), rows):   # one number, of loss.mean() and of losses.sum()
        res, factors = made(x, torch.full_like(x, 2.), g)
        assert torch.equal(res, (2 * g).expand(3, 4)) and factors == []
        res, factors = made(x, None, g)
        assert torch.equal(res, (2 * g).expand(3, 4)) and factors == [1.] and res.dtype == dtype

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_scaled_grad_in_half_precision(dtype):
    "Is made with its factor, so that it is rounded once; or it was kept in float32 till now."
    x, rows = torch.zeros(3, 4, dtype=dtype), torch.tensor([[1.], [2.], [0.]])
    for g, factor in ((torch.tensor(3.), 3.), (torch.tensor(1.), 1.), (rows, rows)):
        res, factors = made(x, None, g)
        assert res.dtype == dtype and len(factors) == 1 and (factors[0] is rows if g is rows else factors[0] == factor)
        assert torch.equal(res, (2 * g).expand(3, 4).to(dtype))
        kept, factors = made(x, torch.full((3, 4), 2.), g)
        assert torch.equal(kept, res) and kept.dtype == dtype and factors == []
    if (empty := empty_grad(x)) is not None:   # made in the forward, for a factor of 1
        assert empty.dtype == dtype
        first = torch.full_like(x, 2.)
        assert made(x, first, torch.tensor(1.)) == (first, [])
        res, factors = made(x, first, torch.tensor(3.))
        assert (res == 6).all() and factors == [3.]

@BOTH
def test_a_gradient_is_made_once(loss_func, target, monkeypatch):
    "In the forward; the first backward takes it; those after it make it anew, and get the same."
    calls = []
    for module in (softmax, sigmoid):
        monkeypatch.setattr(module, 'loss_and_grad', lambda *args, f=module.loss_and_grad, **kwargs: calls.append(1) or f(*args, **kwargs))
        monkeypatch.setattr(module, 'FEW', 0)
    x = logits().float().requires_grad_()
    loss = loss_func(x, target, .3)
    first, = grad(loss, x, retain_graph=True)
    assert len(calls) == 1
    second, = grad(loss, x, retain_graph=True)
    assert len(calls) == 2 and torch.equal(first, second) and first.data_ptr() != second.data_ptr()
