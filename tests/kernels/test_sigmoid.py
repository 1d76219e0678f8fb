"The sigmoid loss: `F.binary_cross_entropy_with_logits` on smoothed targets, in random settings; then its own rules, and which way is taken."
import math, random

import pytest, torch
import torch.nn.functional as F

from fastai_smooth.kernels import sigmoid, smooth_binary_cross_entropy_with_logits as smooth_bce
from .cases import LAYOUTS, SETTINGS, as_on_a_gpu, cast, cast_all, lay_out, near, way
from reference import REDUCTIONS, distance, loss_and_grad, rounded_once, sigmoid_reference

HALF = torch.float16, torch.bfloat16

def torch_bce(input, target, eps=.05, prior=None, **options):
    "PyTorch's loss of smoothed targets."
    e0, e1 = eps if isinstance(eps, tuple) else (eps, eps)
    of_negatives, of_positives = prior if isinstance(prior, tuple) else (prior, prior)
    if prior is not None: e0, e1 = 2 * eps * of_negatives.double(), 2 * eps * (1 - of_positives.double())
    return F.binary_cross_entropy_with_logits(input, e0 + (1 - e0 - e1) * target.to(input.dtype), **options)

def setting(seed):
    "Logits, target, options and grad_output; and the prior shaped to broadcast to the logits, or a pair of such."
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(s, generator=gen, dtype=torch.float64)
    shape = [rng.randint(1, 5) for _ in range(rng.randint(0, 4))]
    dtype = rng.choice([torch.float64, torch.float32, *HALF])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = (rng.choice([1., 10., 60.]) * (rand(*shape) - .5)).to(dtype), rand(*shape)
    kind = rng.choice([torch.bool, torch.uint8, torch.int64, dtype, 'soft'])
    y = y.to(wide) if kind == 'soft' else (y < .4).to(kind)
    if shape: x, y = lay_out(x, rng.choice(LAYOUTS if len(shape) > 1 else LAYOUTS[2:])), lay_out(y, rng.choice(LAYOUTS[2:]))
    broadcast = lambda: rng.choice([shape, shape[-1:], [1] + shape[1:] if shape else [], shape[:-1] + [1] if shape else [], [1] if shape else []])
    options = dict(eps=rng.choice([0., .005, .05, .5, rng.random() / 2]), reduction=rng.choice(REDUCTIONS),
                   weight=(rand(*broadcast()) + .1).to(wide) if rng.random() < .4 else None,
                   pos_weight=(3 * rand(*broadcast()) + .1).to(wide) if rng.random() < .4 else None)
    prior = None
    if rng.random() < .3:   # one of negatives, one of positives
        e0, e1 = rng.choice([(0., .1), (.1, 0.), (.02, .3), (.7, .3), (1., 0.), (0., 0.), (rng.random(), 0.)])
        options['eps'] = e0, rng.random() * (1 - e0) if e1 else e1
    elif rng.random() < .5:   # along axis 1 of tables and images, along the one given; else of one label. (K,) is a row
        given = rng.choice([None, None, *range(-len(shape), len(shape))])
        at = given if given is not None else {1: 0, 2: 1, 4: 1}.get(len(shape))
        options |= dict(prior=rand(*rng.choice([(), (2,)]), 1 if at is None else shape[at]).to(wide), axis=given)
        along = lambda row: row.view([-1 if at is not None and d == at % len(shape) else 1 for d in range(len(shape))])
        prior = along(options['prior']) if options['prior'].dim() == 1 else tuple(map(along, options['prior']))
    return x, y, options, rand(*shape) - .5 if options['reduction'] == 'none' else rng.choice([1., 1.7]), prior

@pytest.mark.parametrize('part', range(2))
def test_random_settings(way, part):
    "0-D to 4-D, every kind of target and dtype, pairs of eps, weights that broadcast, priors along any axis, any strides: beside float64, and PyTorch."
    for seed in range(part, SETTINGS, 2):
        x, y, options, g, prior = setting(seed)
        tolerance = 1e-10 if x.dtype == torch.float64 else 3e-6
        loss, grad = loss_and_grad(smooth_bce, x, y, grad_output=g, **options)
        with torch.no_grad(): quiet = smooth_bce(x, y, **options)
        others = {k: v for k, v in options.items() if k != 'axis'} | dict(prior=prior)
        expected = sigmoid_reference(x, y, grad_output=g, **others)
        assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32) and grad.dtype == x.dtype
        assert near(loss, expected[0], tolerance, 1.) and near(quiet, expected[0], tolerance, 1.), (seed, options)   # (1 - q) x + ... cancels
        assert near(grad.double(), expected[1], tolerance) or x.dtype in HALF and rounded_once(grad, expected[1], 1e-6), (seed, options)
        if way != 'few': continue
        pytorchs = loss_and_grad(torch_bce, x.double(), cast(y, torch.float64), grad_output=g, **cast_all(others, torch.float64))
        assert all(near(a, e, 1e-10) for a, e in zip(pytorchs, expected)), seed

def test_by_hand():
    "A positive is 1-eps, a negative eps: at logits 0 and ln 3, p = 1/2 and 3/4."
    x, y = torch.tensor([[0, math.log(3)]], dtype=torch.float64), torch.tensor([[1, 0]])
    loss, grad = loss_and_grad(smooth_bce, x, y, .1, reduction='none')
    assert (loss - torch.tensor([[math.log(2), -.1 * math.log(.75) - .9 * math.log(.25)]])).abs().max() < 1e-7
    assert (grad - torch.tensor([[.5 - .9, .75 - .1]])).abs().max() < 1e-7

def test_one_side_by_hand():
    "eps=(.1, 0.): a negative is .1, a positive stays 1. Of a prior [2,K] each goes 2 eps of the way to its own row."
    x, y = torch.tensor([[0, math.log(3)]], dtype=torch.float64), torch.tensor([[1, 0]])
    loss, grad = loss_and_grad(smooth_bce, x, y, (.1, 0.), reduction='none')
    assert (loss - torch.tensor([[math.log(2), -.1 * math.log(.75) - .9 * math.log(.25)]])).abs().max() < 1e-7
    assert (grad - torch.tensor([[.5 - 1, .75 - .1]])).abs().max() < 1e-7
    grad = loss_and_grad(smooth_bce, x, y, .25, prior=torch.tensor([[.2, .4], [.6, .8]]), reduction='none')[1]
    assert (grad - torch.tensor([[.5 - (.5 + .5 * .6), .75 - .5 * .4]])).abs().max() < 1e-7

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_side_that_is_not_smoothed_stays(way, dtype):
    "Positives at 1 and negatives at 0, but for the rounding of their sum: where the logits are sure, no loss falls below 0."
    x = torch.linspace(20, 90, 64, dtype=dtype)
    for eps in torch.linspace(0, 1, 40).tolist():
        for label, pair in ((1, (eps, 0.)), (0, (0., eps))):
            loss = smooth_bce((2 * label - 1) * x, torch.full_like(x, label), pair, reduction='none')
            assert (loss >= 0).all() and (loss <= 1.01 * torch.exp(-x) + torch.finfo(dtype).eps * x).all()

def test_optimum():
    "The best logit of a positive is ln((1-eps)/eps), of a negative its opposite."
    best = torch.tensor([[1, -1]]).double() * math.log(.95 / .05)
    assert loss_and_grad(smooth_bce, best, torch.tensor([[1, 0]]))[1].abs().max() < 1e-12
    assert (loss_and_grad(smooth_bce, best + .1, torch.tensor([[1, 0]]))[1] > 1e-3).all()

def test_nothing_left():
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(smooth_bce, torch.randn(0, 3), torch.ones(0, 3), reduction=reduction)
        assert loss.shape == ((0, 3) if reduction == 'none' else ()) and not loss.any() and grad.shape == (0, 3)

def test_half_precision_large_sum():
    "256000 losses of ln 2 each: a float16 mean or sum would be off or inf."
    x, y = torch.zeros(256, 1000).half(), torch.ones(256, 1000)
    assert abs(smooth_bce(x, y, .1, reduction='sum').item() / (256000 * math.log(2)) - 1) < 1e-5
    assert abs(smooth_bce(x, y, .1).item() - math.log(2)) < 1e-6

@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_saturated_logits(way, dtype):
    "No overflow: the loss is eps*|x| on the side that is right, (1-eps)*|x| on the other."
    x, y = torch.tensor([[1e4, 1e4, -1e4, -1e4]]).to(dtype), torch.tensor([[1, 0, 1, 0]])
    loss, grad = loss_and_grad(smooth_bce, x, y, .125, reduction='none')
    assert distance(loss, torch.tensor([[1250., 8750., 8750., 1250.]])) < 1e-6 and distance(grad, torch.tensor([[.125, .875, -.875, -.125]])) < 1e-3

@pytest.mark.parametrize('value', [torch.inf, -torch.inf])
def test_infinite_logits(way, value):
    "As PyTorch has it: never a number, and never nan where PyTorch has none."
    for label in (0, 1):
        x, y = torch.zeros(4, 3), torch.zeros(4, 3)
        x[-1, -1], y[-1, -1] = value, label
        expected = F.binary_cross_entropy_with_logits(x, y * .9 + .05)
        assert torch.equal(smooth_bce(x, y), expected) or expected.isnan()
        y[0, 0] = math.nan   # an unknown label, which is nan alone
        assert smooth_bce(x, y, reduction='none').isnan().nonzero().tolist()[0] == [0, 0] and smooth_bce(x, y, reduction='none')[1:-1].isfinite().all()

def test_which_way(monkeypatch):
    "Few logits go to PyTorch; in the loop, losses that smoothing keeps from being small are made of the sigmoid that the gradient needs."
    seen = []
    def noted(name, f): return lambda *args: (res := f(*args), seen.append(name + ('?' if res is None else '')))[0]
    for name in ('pytorch', 'quick'):
        f = f'{name}_loss' + 'es' * (name == 'quick')
        monkeypatch.setattr(sigmoid, f, noted(name, getattr(sigmoid, f)))
    monkeypatch.setattr(sigmoid, 'FEW', 12)
    x, y, w = torch.randn(4, 4, requires_grad=True), torch.rand(4, 4) < .5, torch.rand(4)
    def way(rows=4, eps=.05, dtype=torch.float32, **options):
        seen.clear()
        smooth_bce(x[:rows].to(dtype), y[:rows], eps, **options)
        return ' '.join(seen)
    enough, quick, slow = sigmoid.ENOUGH_SMOOTHING, 'pytorch? quick', 'pytorch?'
    assert way(3) == way(3, pos_weight=w) == way(3, eps=0.) == way(3, eps=.5, reduction='none') == 'pytorch'
    assert way(3, eps=(.1, 0.)) == way(3, eps=(.7, .3)) == way(3, eps=(0., 1.)) == 'pytorch' and way(3, eps=(.1, 0)) == slow
    assert way(eps=(enough, .3)) == quick and way(eps=(.1, 0.)) == way(eps=(0., .1)) == slow
    assert way() == way(eps=enough) == way(reduction='none') == quick
    assert way(eps=math.nextafter(enough, 0)) == way(eps=0.) == way(weight=w) == way(pos_weight=w) == way(prior=w) == slow
    assert way(3, weight=w) == way(3, prior=w) == way(3, pos_weight=w[:, None][:3]) == slow and way(3, eps=torch.tensor(.05)) == quick
    assert way(3, dtype=torch.bfloat16) == quick and way(3, axis=-1) == 'quick'
    as_on_a_gpu(monkeypatch)
    assert way() == way(3) == slow   # more passes over memory than a log1p is worth
