"The sigmoid loss: `F.binary_cross_entropy_with_logits` on smoothed targets, and its own rules."
from itertools import product
import math, os, random

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_targets
from fastai_smooth.kernels import sigmoid
from reference import REDUCTIONS, distance, loss_and_grad, rounded_once, sigmoid_reference

few = settings(max_examples=int(os.environ.get('SMOOTH_TEST_SETTINGS', 60)), deadline=None, derandomize=True, database=None)


def f64(*row): return torch.tensor([row], dtype=torch.float64)


def torch_bce(input, target, eps=.05, prior=.5, **options):
    q = (1 - 2 * eps) * target.to(input.dtype) + 2 * eps * prior
    return F.binary_cross_entropy_with_logits(input, q, **options)


def draw_setting(seed):
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(s, generator=gen, dtype=torch.float64)
    shape = [rng.randint(6, 9)] + [rng.randint(1, 5) for _ in range(rng.randint(0, 3))]
    x, y = 6 * rand(*shape) - 3, rand(*shape) < .4
    kind = rng.choice([torch.bool, torch.uint8, torch.int64, torch.float64, 'soft'])
    y = rand(*shape) if kind == 'soft' else y.to(kind)
    if rng.random() < .3: x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if rng.random() < .3: y = torch.stack([y, y], -1)[..., 0]
    broadcast = lambda: rng.choice([shape, shape[-1:], [1] + shape[1:], shape[:-1] + [1], [1]])
    weight = rand(*broadcast()) + .1 if rng.random() < .5 else None
    pos_weight = 3 * rand(*broadcast()) + .1 if rng.random() < .5 else None
    reduction = rng.choice(REDUCTIONS)
    grad_output = rand(*(shape if reduction == 'none' else ())) - .5
    options = dict(weight=weight, pos_weight=pos_weight, reduction=reduction)
    return x, y, rng.choice([0., .05, .5, rng.random() / 2]), options, grad_output


@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_pytorch_parity(dtype, tolerance):
    "500 settings: 1-D to 4-D, weights that broadcast, every kind of target, non-contiguous; loss and gradient"
    worst = (0., None)
    for seed in range(int(os.environ.get('SMOOTH_TEST_SETTINGS', 500))):
        x, y, eps, options, g = draw_setting(seed)
        cast = lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        up = lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        x, y, g, options = cast(x), cast(y), cast(g), {k: cast(v) for k, v in options.items()}
        expected = loss_and_grad(torch_bce, up(x), up(y), eps, grad_output=g, **{k: up(v) for k, v in options.items()})
        actual = loss_and_grad(smooth_bce, x, y, eps, grad_output=g, **options)
        assert all(a.dtype == dtype for a in actual)
        worst = max(worst, (max(map(distance, actual, expected)), seed), key=lambda w: w[0])
    assert worst[0] < tolerance, worst


def test_sigmoid_by_hand():
    "a positive is 1-eps, a negative eps: at logits 0 and ln 3, p = 1/2 and 3/4"
    x, y = f64(0., math.log(3)), torch.tensor([[1, 0]])
    loss, grad = loss_and_grad(smooth_bce, x, y, .1, reduction='none')
    assert distance(loss, f64(math.log(2), -.1 * math.log(.75) - .9 * math.log(.25))) < 1e-12
    assert distance(grad, f64(.5 - .9, .75 - .1)) < 1e-12


def test_sigmoid_optimum():
    "the best logit of a positive is ln((1-eps)/eps), of a negative its opposite"
    best = math.log(.95 / .05)
    _, grad = loss_and_grad(smooth_bce, f64(best, -best), torch.tensor([[1, 0]]))
    assert grad.abs().max() < 1e-12
    _, grad = loss_and_grad(smooth_bce, f64(best + .1, -best + .1), torch.tensor([[1, 0]]))
    assert (grad > 1e-3).all()


def test_eps_zero():
    x, y = torch.randn(4, 3).double(), torch.rand(4, 3) < .5
    actual = loss_and_grad(smooth_bce, x, y, 0.)
    assert max(map(distance, actual, loss_and_grad(F.binary_cross_entropy_with_logits, x, y.double()))) < 1e-12


def test_one_label():
    "one label is a task like any other on this head"
    x, y = torch.randn(4, 1).double(), torch.tensor([[1], [0], [1], [1]])
    assert max(map(distance, loss_and_grad(smooth_bce, x, y, .1), sigmoid_reference(x, y, .1))) < 1e-12


@few
@given(n=st.integers(1, 5), k=st.integers(1, 6), seed=st.integers(0, 2**20), eps=st.floats(0, .5),
       reduction=st.sampled_from(REDUCTIONS), weighted=st.booleans(), positive=st.booleans(), prior=st.booleans(),
       scale=st.sampled_from([1., 20., 500.]))
def test_against_the_reference(n, k, seed, eps, reduction, weighted, positive, prior, scale):
    "the class prior with everything else, and logits that saturate"
    gen = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(s, generator=gen, dtype=torch.float64)
    x, y = scale * (rand(n, k) - .5), rand(n, k) < .5
    options = dict(reduction=reduction, prior=rand(k) if prior else None, weight=rand(k) + .1 if weighted else None,
                   pos_weight=rand(k) + .1 if positive else None)
    actual = loss_and_grad(smooth_bce, x, y, eps, grad_output=1.7, **options)
    errors = list(map(distance, actual, sigmoid_reference(x, y, eps, grad_output=1.7, **options)))
    assert max(errors) < 1e-9


def test_sigmoid_prior():
    "any frequencies: a label's prior need not sum to one over labels; 1/2 is no prior"
    x, y, prior = torch.randn(4, 3).double(), torch.rand(4, 3).double(), torch.tensor([.9, .8, .1]).double()
    actual = loss_and_grad(smooth_bce, x, y, .1, prior=prior)
    assert max(map(distance, actual, loss_and_grad(torch_bce, x, y, .1, prior=prior))) < 1e-12
    assert distance(smooth_bce(x, y, .1, prior=torch.full((3,), .5)), smooth_bce(x, y, .1)) < 1e-6


@pytest.mark.parametrize('shape,axis,at', [((3, 4, 2, 5), None, 1), ((3, 4, 2, 2, 5), None, 1), ((3, 5, 4), -1, 2), ((3, 4, 5), 1, 1), ((4, 3), 0, 0), ((6, 4), None, 1), ((4,), None, 0)])
@pytest.mark.parametrize('layout', ['as it is', 'turned'])
def test_sigmoid_prior_lies_along_the_labels(shape, axis, at, layout):
    "the channels of images, the last axis of a table, or the `axis` that is given"
    x, y, prior = torch.randn(shape).double(), (torch.rand(shape) < .4).double(), torch.tensor([.9, .8, .1, .4]).double()
    if layout == 'turned': x, y = x.mT.contiguous().mT if len(shape) > 1 else x, y.flip(0)
    for reduction in REDUCTIONS:
        actual = loss_and_grad(smooth_bce, x, y, .1, prior=prior, axis=axis, reduction=reduction)
        q = smooth_targets(y.movedim(at, -1).reshape(-1, 4), eps=.1, prior=prior, sigmoid=True).view(y.movedim(at, -1).shape).movedim(-1, at)
        expected = loss_and_grad(F.binary_cross_entropy_with_logits, x, q, reduction=reduction)
        assert max(map(distance, actual, expected)) < 1e-12
        assert distance(smooth_targets(y, eps=.1, prior=prior, sigmoid=True, axis=axis), q) < 1e-12


@pytest.mark.parametrize('shape', [(), (5,), (3, 1), (3, 4, 5), (3, 1, 4, 5)])
def test_sigmoid_prior_of_one_label(shape):
    x, y, prior = torch.randn(shape).double(), (torch.rand(shape) < .4).double(), torch.tensor([.9]).double()
    assert max(map(distance, loss_and_grad(smooth_bce, x, y, .1, prior=prior), loss_and_grad(torch_bce, x, y, .1, prior=prior.view([1] * len(shape))))) < 1e-12


def test_nothing_left():
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(smooth_bce, torch.randn(0, 3), torch.ones(0, 3), reduction=reduction)
        assert loss.shape == ((0, 3) if reduction == 'none' else ()) and (loss == 0).all() and grad.shape == (0, 3)


@pytest.mark.parametrize('dtype,reduction', product([torch.float16, torch.bfloat16], REDUCTIONS))
def test_half_precision(dtype, reduction):
    "loss in float32, gradient in the logits' dtype"
    x = (4 * torch.randn(50, 400)).to(dtype)
    y = torch.rand(50, 400)
    w, c = torch.rand(400) + .1, torch.rand(400) + .5
    for target in (y < .3, (y < .3).to(torch.uint8), (y < .3).float(), (y < .3).to(dtype)):
        loss, grad = loss_and_grad(smooth_bce, x, target, weight=w, pos_weight=c, reduction=reduction)
        expected, expected_grad = sigmoid_reference(x, target, weight=w, pos_weight=c, reduction=reduction)
        assert loss.dtype == torch.float32 and grad.dtype == dtype and distance(loss, expected) < 2e-6
        assert rounded_once(grad, expected_grad)


def test_half_precision_large_sum():
    "65536 logits of loss ln 2 each: a float16 mean or sum would be off or inf"
    x, y = torch.zeros(256, 1000).half(), torch.ones(256, 1000)
    assert abs(smooth_bce(x, y, .1, reduction='sum').item() / (256000 * math.log(2)) - 1) < 1e-5
    assert abs(smooth_bce(x, y, .1).item() - math.log(2)) < 1e-6


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_saturated_logits(dtype):
    "no overflow: loss is eps*|x| on the side that is right, (1-eps)*|x| on the other"
    x, y = torch.tensor([[1e4, 1e4, -1e4, -1e4]]).to(dtype), torch.tensor([[1, 0, 1, 0]])
    loss, grad = loss_and_grad(smooth_bce, x, y, .125, reduction='none')
    size = float(x[0, 0])
    assert distance(loss, f64(.125 * size, .875 * size, .875 * size, .125 * size)) < 1e-6
    assert distance(grad, f64(.125, .875, -.875, -.125)) < 1e-3


def test_unknown_labels_are_nan():
    "nan in, nan out for that label alone"
    loss = smooth_bce(torch.randn(1, 2), torch.tensor([[1., math.nan]]), reduction='none')
    assert loss[0, 0].isfinite() and loss[0, 1].isnan()


@pytest.mark.parametrize('weighted,reduction,eps', product([False, True], REDUCTIONS, [0., .1]))
def test_gradient_of_soft_targets(weighted, reduction, eps):
    x, y0 = torch.randn(3, 4).double(), torch.rand(3, 4).double()
    options = dict(weight=torch.rand(4).double(), pos_weight=torch.rand(4).double() + .5) if weighted else {}
    grads = []
    for loss_func in (smooth_bce, torch_bce):
        a, b = x.clone().requires_grad_(), y0.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss_func(a, b, eps, reduction=reduction, **options).sin().sum(), [a, b]))
    assert max(map(distance, *grads)) < 1e-10


# ---------------------------------------------------------------- the ways: few logits, a loop, and how its losses are made

class Ways:
    "Which of the functions of the loop gave something, and which gave up (name?)"
    def __init__(self, monkeypatch):
        self.seen = []
        for name in ('pytorch_loss', 'quick_losses'): monkeypatch.setattr(sigmoid, name, self.noted(name, getattr(sigmoid, name)))
    def noted(self, name, f):
        def call(*args):
            res = f(*args)
            self.seen.append(name.split('_')[0] + ('?' if res is None else ''))
            return res
        return call
    def __call__(self):
        res, self.seen = ' '.join(self.seen), []
        return res


def test_which_way(monkeypatch):
    "few logits go to PyTorch; in the loop, losses that smoothing keeps from being small are made of the sigmoid that the gradient needs"
    ways = Ways(monkeypatch)
    monkeypatch.setattr(sigmoid, 'FEW', 12)
    x, y, w = torch.randn(4, 4, requires_grad=True), torch.rand(4, 4) < .5, torch.rand(4)
    def way(rows=4, eps=.05, **options):
        smooth_bce(x[:rows], y[:rows], eps, **options)
        return ways()
    enough, quick, slow = sigmoid.ENOUGH_SMOOTHING, 'pytorch? quick', 'pytorch? quick?'
    assert way(3) == way(3, pos_weight=w) == way(3, eps=0.) == way(3, eps=.5, reduction='none') == 'pytorch'
    assert way() == way(eps=enough) == way(reduction='none') == quick
    assert way(eps=math.nextafter(enough, 0)) == way(eps=0.) == way(weight=w) == way(pos_weight=w) == way(prior=w) == slow
    assert way(3, weight=w) == way(3, prior=w) == way(3, pos_weight=w[:, None][:3]) == slow and way(3, eps=torch.tensor(.05)) == quick
    smooth_bce(x[:3].bfloat16(), y[:3])
    assert ways() == quick
    assert way(3, axis=-1) == 'quick'


@pytest.mark.parametrize('layout', ['plain', 'turned', 'bool', 'float', 'bfloat16', 'float16', 'none'])
@pytest.mark.parametrize('eps', [0., .001, .01, .05, .5])
@pytest.mark.parametrize('shape,few', [((1, 1), True), ((5, 3), True), ((5, 3), False), ((311, 89), False), ((977, 501), False)])
@pytest.mark.parametrize('scale', [1, 20, 200])
def test_every_way(shape, few, eps, layout, scale, monkeypatch):
    "PyTorch's loss, the loop, several chunks, up to where float32 has no sigmoid left"
    monkeypatch.setattr(sigmoid, 'FEW', 100 if few else 0)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(shape, generator=g)*scale, (torch.rand(shape, generator=g) < .3).to(torch.uint8)
    if layout in ('bfloat16', 'float16'): x = x.to(getattr(torch, layout))
    if layout == 'turned': x = x.T.contiguous().T
    d = x.double().requires_grad_()
    expected = F.binary_cross_entropy_with_logits(d, y.double()*(1-2*eps) + eps)
    grad, = torch.autograd.grad(expected, d)
    x.requires_grad_()
    loss = smooth_bce(x, y.bool() if layout == 'bool' else y.float() if layout == 'float' else y, eps, reduction='none' if layout == 'none' else 'mean')
    by = 1024. if layout == 'float16' else 1.
    actual = torch.autograd.grad(loss.mean(), x, torch.tensor(by))[0].double() / by
    assert abs(loss.mean().item() - expected.item()) <= 2e-6 * expected.item()
    assert (actual - grad).norm() <= (1e-2 if layout in ('bfloat16', 'float16') else 1e-5) * grad.norm()


@pytest.mark.parametrize('options', [('prior',), ('weight',), ('pos_weight',), ('prior', 'weight', 'pos_weight')])
@pytest.mark.parametrize('shape', [(30, 40), (700, 500)])
@pytest.mark.parametrize('layout', ['plain', 'turned'])
def test_every_option_in_chunks(layout, shape, options, monkeypatch):
    "what has a value a label is cut as the logits are"
    monkeypatch.setattr(sigmoid, 'FEW', 0)
    x, y, options = torch.randn(shape), (torch.rand(shape) < .3).float(), {name: torch.rand(shape[1]) for name in options}
    if layout == 'turned': x = x.T.contiguous().T
    for reduction in REDUCTIONS:
        g = torch.rand(shape) if reduction == 'none' else 2.
        expected = sigmoid_reference(x, y, .05, reduction=reduction, grad_output=g, **options)
        assert max(map(distance, loss_and_grad(smooth_bce, x, y, .05, reduction=reduction, grad_output=g, **options), expected)) < 2e-6
        with torch.no_grad(): assert distance(smooth_bce(x, y, .05, reduction=reduction, **options), expected[0]) < 2e-6


@pytest.mark.parametrize('shape', [(4, 3), (300, 1000)])
@pytest.mark.parametrize('value', [torch.inf, -torch.inf])
@pytest.mark.parametrize('label', [0, 1])
def test_infinite_logits(shape, value, label):
    "inf as PyTorch has it: never a number, and never nan where PyTorch has none"
    x, y = torch.zeros(shape), torch.zeros(shape)
    x[-1, -1], y[-1, -1] = value, label
    expected = F.binary_cross_entropy_with_logits(x, y*.9 + .05)
    assert torch.equal(smooth_bce(x, y), expected) or expected.isnan()
