"The softmax loss: random settings beside the float64 reference and PyTorch, then its rules one by one, and which way is taken when."
from functools import cache
from types import SimpleNamespace
import math, random

import pytest, torch
import torch.nn.functional as F

from fastai_smooth.kernels import smooth_cross_entropy, softmax
from .cases import LAYOUTS, ON_TRITON, SETTINGS, cast_all, lay_out, near, way
from reference import REDUCTIONS, distance, loss_and_grad, rounded_once, softmax_reference

INF, NAN = math.inf, math.nan
HALF = torch.float16, torch.bfloat16
OPTIONS = 'all', 'all', 'others', 'prior', 'matrix', 'per-class', 'multi_hot', 'multi_hot others', 'soft', 'soft others', 'soft prior'
pytestmark = pytest.mark.filterwarnings('ignore:.*weight')   # past the flip: test_checks.py has it

# ---------------------------------------------------------------- random settings

@cache
def setting(seed):
    "Logits with classes along axis 1, target, options and grad_output in the dtypes they come in; the layout, and where the classes go."
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(s, generator=g, dtype=torch.float64)
    option, dtype, reduction = rng.choice(OPTIONS), rng.choice([torch.float64, torch.float32, *HALF]), rng.choice(REDUCTIONS)
    N, K, spatial = rng.randint(1, 5), rng.choice([1, 2, 3, 5, 10, 70]), [rng.randint(1, 3) for _ in range(rng.choice([0, 0, 1, 2, 3]))]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (rng.choice([1, 10, 100]) * (rand(N, K, *spatial) - .5) + rng.choice([0, 0, 60, 1000])).to(dtype)
    options = dict(eps=rng.choice([0., 1., rng.random(), rng.random()]), reduction=reduction, weight=(rand(K) + .1).to(wide) if rng.random() < .4 else None)
    if option.endswith('prior'): options['prior'] = (3 * rand(K)).softmax(0).to(wide)
    if option == 'matrix': options['prior'] = (3 * rand(K, K)).softmax(1).to(wide)
    if option == 'per-class': options['eps'] = rand(K).to(wide)
    if 'others' in option: options['spread'] = 'others'
    dense = 'multi_hot' in option or 'soft' in option
    if 'multi_hot' in option: y, options['multi_hot'] = (rand(*x.shape) < .4).to(rng.choice([torch.bool, torch.uint8, dtype])), True
    elif dense: y = (3 * rand(*x.shape)).softmax(1).to(rng.choice([dtype, torch.float32, torch.bfloat16]))
    else: y = torch.randint(K, (N, *spatial), generator=g)
    masked, ignored = torch.zeros_like(x, dtype=torch.bool), torch.zeros(N, *spatial, dtype=torch.bool)
    if option != 'soft others' and rng.random() < .3:   # some classes of each row; where the target wants one of those, the loss is inf
        masked = (rand(*x.shape) < .3).index_fill_(1, torch.tensor(rng.randrange(K)), False)
        if not dense and rng.random() < .7: masked.scatter_(1, y.unsqueeze(1), False)
        x[masked] = -INF
    if not dense:
        options['ignore_index'] = rng.choice([-100, -1, 255, rng.randrange(K)])
        if rng.random() < .5: y[rand(*y.shape) < .3] = options['ignore_index']
        ignored = y == options['ignore_index']
        if options['weight'] is not None and (~ignored & (y != 0)).any() and rng.random() < .3: options['weight'][0] = 0
        if rng.random() < .5: x[ignored.unsqueeze(1) & (rand(*x.shape) < rng.choice([.3, 1]))] = rng.choice([NAN, INF, -INF])
        if y.numel() and 0 <= y.min() and rng.random() < .3: y = y.to(rng.choice([torch.uint8, torch.int16, torch.int32]))
    grad_output = rand(N, *spatial) - .5 if reduction == 'none' else rng.choice([1., 2.5])
    # PyTorch has no other options, takes masks and what is ignored for numbers, and has nan where nothing is left
    of_pytorch = option in ('all', 'soft') and not masked.any() and x.isfinite().all() and not ignored.all()
    return SimpleNamespace(x=x, y=y, dense=dense, options=options, grad_output=grad_output, masked=masked, ignored=ignored, of_pytorch=of_pytorch, option=option,
                           layout=rng.choice(LAYOUTS), last=rng.random() < .2, expected=softmax_reference(x, y, grad_output=grad_output, **options))

def moved(v, last): return v.movedim(1, -1) if last else v
def moved_back(v, last): return v.movedim(-1, 1) if last else v

def close(s, loss, grad):
    "Are both right to float32's or float64's digits, but for one rounding to half precision?"
    tolerance = 1e-10 if s.x.dtype == torch.float64 else 3e-6
    return near(loss, s.expected[0], tolerance) and (near(grad.double(), s.expected[1], tolerance) or s.x.dtype in HALF and rounded_once(grad, s.expected[1], 1e-6))

@pytest.mark.parametrize('part', range(4))
def test_random_settings(way, part):
    "Every option in every dtype and layout, with masked classes and rows that are ignored, whatever is in those: loss, gradients, without one."
    for seed in range(part, SETTINGS, 4):
        s = setting(seed)
        x, y = (moved(lay_out(v, s.layout), s.last) for v in (s.x, s.y)) if s.dense else (moved(lay_out(s.x, s.layout), s.last), s.y)
        options = dict(s.options, axis=-1 if s.last else 1)
        x.requires_grad_()
        loss = smooth_cross_entropy(x, y, **options)
        g = torch.as_tensor(s.grad_output).to(loss.dtype)
        if g.dim() > 1: g = lay_out(g, s.layout)
        grads = [moved_back(torch.autograd.grad(loss, x, g, retain_graph=True)[0], s.last) for _ in range(2)]   # the second is made anew
        with torch.no_grad(): quiet = smooth_cross_entropy(x, y, **options)
        assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32) and grads[0].dtype == x.dtype
        for v, grad in zip((loss.detach(), quiet), grads): assert close(s, v, grad), (seed, s.option, s.options)
        assert ON_TRITON or torch.equal(*grads) or way == 'on a GPU' and x.itemsize == 2, seed   # rounded after or before the factor
        for grad in grads: assert not grad[s.masked].any() and not grad.movedim(1, -1)[s.ignored].any(), seed

def test_the_reference_is_pytorch():
    "Where both have an option: so the settings above are parity with `F.cross_entropy(label_smoothing=)`, too."
    n = 0
    for s in map(setting, range(SETTINGS)):
        if not s.of_pytorch: continue
        eps, options = s.options['eps'], cast_all({k: v for k, v in s.options.items() if k != 'eps'}, torch.float64)
        y = s.y.double() if s.dense else s.y.long()
        expected = loss_and_grad(F.cross_entropy, s.x.double(), y, label_smoothing=eps, grad_output=s.grad_output, **options)
        assert all(near(a, e, 1e-12) for a, e in zip(s.expected, expected)), (s.option, s.options)
        n += 1
    assert n > SETTINGS / 10

# ---------------------------------------------------------------- values worked by hand

def test_seed_example():
    logits = torch.tensor([[0, .2, .7, .1, 0], [0, .9, .2, .2, 1], [1, .2, .7, .9, 1]])
    assert abs(smooth_cross_entropy(logits, torch.tensor([2, 1, 0]), .5).item() - 1.4670) < 5e-5

@pytest.mark.parametrize('K,gap,smallest', [(2, 2.944, .1985), (3, 3.3322, None), (10, 4.511, .5003), (100, None, .7778), (1000, 9.105, 1.0148)])
def test_optimum_and_smallest_possible_loss(K, gap, smallest):
    "The loss is least where the true logit is ln(K(1-eps)/eps + 1) above the others: to this value, and no lower."
    best = math.log(K * .9 / .1 + 1)
    x = torch.zeros(1, K, dtype=torch.float64)
    x[0, 0] = best
    loss, grad = loss_and_grad(smooth_cross_entropy, x, torch.tensor([0]), .1)
    assert grad.abs().max() < 1e-12 and abs(best - (gap or best)) < 6e-4 and abs(loss - (smallest or loss)) < 6e-5
    for _ in range(10): assert smooth_cross_entropy(x + .1 * torch.randn(1, K), torch.tensor([0]), .1) > loss

@pytest.mark.parametrize('spread', ['all', 'others'])
@pytest.mark.parametrize('eps', [0., .1, 1.])
def test_uniform_logits_and_one_class(eps, spread):
    "ln K for every eps; and exactly 0 where there is one class, as is the gradient."
    for K in (2, 3, 10):
        loss = smooth_cross_entropy(torch.full((4, K), 1.3).double(), torch.arange(4) % K, eps, spread=spread)
        assert abs(loss.item() - math.log(K)) < 1e-12
    for y, options in [(torch.zeros(3).long(), {}), (torch.tensor([[1], [0], [1]]), dict(multi_hot=True)), (torch.zeros(3).long(), dict(weight=torch.tensor([2.])))]:
        for reduction in REDUCTIONS:
            assert not any(v.any() for v in loss_and_grad(smooth_cross_entropy, torch.randn(3, 1), y, eps, spread=spread, reduction=reduction, **options))

def test_axis_of_a_single_row():
    "(K,) logits have one axis; 1, the default, is taken for it, and no other."
    x, y = torch.randn(3), torch.tensor(1)
    for axis in (0, 1, -1): assert torch.equal(smooth_cross_entropy(x, y, axis=axis), smooth_cross_entropy(x[None], y[None]))
    for axis in (7, 2, -2):
        with pytest.raises(IndexError, match=f'axis {axis} is out of range'): smooth_cross_entropy(x, y, axis=axis)

# ---------------------------------------------------------------- weights, and rows that do not count

@pytest.mark.parametrize('shape', [(5, 3), (700, 1000), (2, 3, 4, 4)])
def test_weights_that_pytorch_takes(shape):
    "Negative ones too: the functions take what `F.cross_entropy` does."
    x, y, w = torch.randn(shape).double(), torch.randint(shape[1], shape[:1] + shape[2:]), torch.randn(shape[1]).double()
    for reduction in REDUCTIONS:
        expected = loss_and_grad(F.cross_entropy, x, y, label_smoothing=.1, weight=w, reduction=reduction)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
            assert max(map(distance, loss_and_grad(smooth_cross_entropy, x.to(dtype), y, .1, weight=w, reduction=reduction), expected)) < tolerance

@pytest.mark.parametrize('ignored', [False, True])
def test_weights_of_zero_sum(way, ignored):
    "The mean is 0/0, as PyTorch has it; the sum, and each row, are numbers."
    x, y, w = torch.randn(16, 8), torch.ones(16).long(), torch.rand(8)
    w[1] = 0
    if ignored: y[2] = -100
    loss, grad = loss_and_grad(smooth_cross_entropy, x, y, .2, weight=w)
    assert loss.isnan() and grad[0].isnan().all() and smooth_cross_entropy(x, y, 0., weight=w).isnan()
    for reduction in ('sum', 'none'):
        actual = loss_and_grad(smooth_cross_entropy, x, y, .2, weight=w, reduction=reduction)
        assert max(map(distance, actual, loss_and_grad(F.cross_entropy, x.double(), y, weight=w.double(), label_smoothing=.2, reduction=reduction))) < 2e-6

@pytest.mark.parametrize('shape', [(0, 3), (0, 3, 4), (2, 3, 0), (2, 3), (2, 3, 4)])
def test_nothing_left(shape):
    "An empty batch, or every row ignored: the mean is 0 with zero gradient, not nan."
    x, y = torch.randn(shape), torch.full((shape[0], *shape[2:]), -100)
    cases = [(y, {}), (y, dict(weight=torch.tensor([1., 2., 3.])))] + [(torch.ones(shape), dict(multi_hot=True)), (torch.ones(shape), {})] * (x.numel() == 0)
    for (target, options), reduction in ((c, r) for c in cases for r in REDUCTIONS):
        loss, grad = loss_and_grad(smooth_cross_entropy, x, target, reduction=reduction, **options)
        assert loss.shape == (y.shape if reduction == 'none' else ()) and not loss.any()
        assert grad.shape == x.shape and not grad.any()

@pytest.mark.parametrize('options', [{}, dict(prior=torch.tensor([.5, .2, .3])), dict(weight=torch.tensor([.5, 2., 1.]))])
def test_ignored_rows_get_no_gradient_whatever_comes_in(options):
    "As in PyTorch: also where it is inf, as of the square root of a loss of 0."
    x, y = torch.tensor([[1., 2, 3], [3, 1, 0], [0, 1, 0]], requires_grad=True), torch.tensor([0, -100, 2])
    grad, = torch.autograd.grad(smooth_cross_entropy(x, y, reduction='none', **options).sqrt().sum(), x)
    assert grad.isfinite().all() and not grad[1].any() and grad[::2].all()

# ---------------------------------------------------------------- half precision

@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('K', [5000, 32000])
def test_half_precision_of_many_classes(K, dtype):
    "Everything in float32: F.cross_entropy gives inf in float16."
    x, w = (3 * torch.randn(3, K)).to(dtype), torch.rand(K) + .1
    for y in (torch.tensor([0, K - 1, K // 2]), torch.rand(3, K).softmax(1)):
        for reduction in REDUCTIONS:
            loss, grad = loss_and_grad(smooth_cross_entropy, x, y, weight=w, reduction=reduction)
            expected, truth = loss_and_grad(F.cross_entropy, x.double(), cast_all({'y': y}, torch.float64)['y'], w.double(), label_smoothing=.1, reduction=reduction)
            assert loss.dtype == torch.float32 and distance(loss, expected) < 2e-6 and rounded_once(grad, truth)

def test_half_precision_of_many_rows():
    "A sum beyond 65504, float16's largest number, and a mean over more rows than float16 counts exactly."
    x, y = (3 * torch.randn(20000, 40)).half(), torch.arange(20000) % 40
    plain = F.cross_entropy(x.double(), y, label_smoothing=.1, reduction='none')
    assert plain.sum() > 65504
    for reduction, expected in (('sum', plain.sum()), ('mean', plain.mean())): assert distance(smooth_cross_entropy(x, y, reduction=reduction), expected) < 2e-6

# ---------------------------------------------------------------- masked classes: logits of -inf

ROW, LOG_P = [1., -INF, 2.], torch.tensor([1., 2.]).double().log_softmax(0)   # of which the second is masked

@pytest.mark.parametrize('row,target,eps,options,expected', [
    (ROW, [.25, 0., .75], 0., {}, -(.25 * LOG_P[0] + .75 * LOG_P[1])), (ROW, [.25, 0., .75], .2, {}, -(.3 * LOG_P[0] + .7 * LOG_P[1])),   # 0 * -inf is 0
    (ROW, 0, .2, {}, -(.9 * LOG_P[0] + .1 * LOG_P[1])), (ROW, 0, .2, dict(spread='others'), -(.8 * LOG_P[0] + .2 * LOG_P[1])),
    (ROW, 0, .2, dict(prior=torch.tensor([.2, .5, .3], dtype=torch.float64)), -(.88 * LOG_P[0] + .12 * LOG_P[1])),                  # renormalised
    (ROW, 0, .2, dict(prior=torch.tensor([0., 1., 0.])), -(.9 * LOG_P[0] + .1 * LOG_P[1])),                    # or else uniform
    ([-INF, 3., -INF], 1, .2, {}, 0.), ([-INF, 3., -INF], 1, 1., dict(spread='others'), 0.),                            # one class is left
    (ROW, 1, .2, {}, INF), (ROW, 1, 0., {}, INF), (ROW, [.5, .5, 0.], .2, {}, INF), (ROW, [1, 1, 0], .2, dict(multi_hot=True), INF),   # the target wants it
    (ROW, [1, 1, 0], .75, dict(multi_hot=True, spread='others'), INF), (ROW, 1, 1., {}, -LOG_P.mean()), ([-INF] * 3, 1, .2, {}, NAN)])
def test_masked_by_hand(way, row, target, eps, options, expected):
    "In a batch, with a row beside it that is as ever; a masked class gets a gradient of exactly 0, and those of a row add up to 0."
    x, y = torch.tensor([row, [1., 2., 0.]]).double(), torch.tensor([target, [1, 0, 0] if isinstance(target, list) else 0])
    loss, grad = loss_and_grad(smooth_cross_entropy, x, y, eps, reduction='none', **options)
    assert distance(loss[0], expected) < 1e-12 and distance(smooth_cross_entropy(x, y, eps, **options), (loss[0] + loss[1]) / 2) < 1e-12
    alone = loss_and_grad(smooth_cross_entropy, x[1:], y[1:], eps, reduction='none', **options)
    assert max(map(distance, (loss[1:], grad[1:]), alone)) < 1e-12
    if -INF in row[1:2]: assert grad[0, 1] == 0 and grad.isfinite().all() or NAN is expected
    if loss[0].isfinite(): assert abs(grad[0].sum()) < 1e-12

@pytest.mark.parametrize('x,dtype', [
    ([1e32, 2., 1e32], torch.float32), ([1e32, -INF, 1e32], torch.float32), ([0., -1e30, 5.], torch.float64), ([-1e39, -1.5e39, -1e39], torch.float64),
    ([torch.finfo(torch.float64).min] * 3, torch.float64), ([torch.finfo(torch.float32).min] * 3, torch.float32)])
def test_the_largest_and_the_least_logits(way, x, dtype):
    "Are not taken for masked ones, nor do they overflow where the loss does not."
    x, y = torch.tensor([x, [1., 2., 3.]], dtype=dtype), torch.tensor([0, 2])
    loss, grad = loss_and_grad(smooth_cross_entropy, x, y, 0., reduction='none')
    expected, truth = loss_and_grad(F.cross_entropy, x.double(), y, reduction='none')
    assert torch.allclose(loss.double(), expected) and torch.allclose(grad.double(), truth, atol=1e-7)

def test_masked_by_the_least_number(way):
    "As Hugging Face does: their sum is -inf, which must not meet a smoothing of 0. Smoothed, the loss is inf, as PyTorch's; the gradient is right."
    least, v = torch.finfo(torch.float32).min, torch.tensor([0, .5, 0, 0, .5])
    x, y = torch.tensor([[1., 2., least, least, .5], [least, least, 3., least, 0.]]), torch.tensor([1, 2])
    hot = F.one_hot(y, 5)
    expected, truth = loss_and_grad(F.cross_entropy, x.double(), y)
    for target, eps, options in ((y, 0., {}), (y, 0 * v, {}), (hot.float(), 0., {}), (hot, 0., dict(multi_hot=True))):
        loss, grad = loss_and_grad(smooth_cross_entropy, x, target, eps, **options)
        assert distance(loss, expected) < 1e-6 and distance(grad, truth) < 1e-6
    loss, grad = loss_and_grad(smooth_cross_entropy, x, y)
    expected, truth = loss_and_grad(F.cross_entropy, x, y, label_smoothing=.1)
    assert loss == expected == INF and distance(grad, truth) < 1e-6
    loss, grad = loss_and_grad(smooth_cross_entropy, x[:1], y[:1], .1, prior=v)
    expected, truth = loss_and_grad(F.cross_entropy, x[:1].double(), torch.tensor([[0, .95, 0, 0, .05]]).double())
    assert distance(loss, expected) < 1e-6 and distance(grad, truth) < 1e-6

@pytest.mark.parametrize('value', [NAN, INF])
def test_a_row_that_is_not_finite(way, value):
    "Is nan, as in PyTorch; the others are right, loss and gradient."
    x, y, kept = torch.randn(16, 8), torch.randint(8, (16,)), torch.arange(16) != 3
    x[3, 2] = value
    for eps in (0., .1):
        loss, grad = loss_and_grad(smooth_cross_entropy, x, y, eps, reduction='none')
        expected, truth = loss_and_grad(F.cross_entropy, x.double(), y, label_smoothing=eps, reduction='none')
        assert loss[3].isnan() and grad[3].isnan().any() and smooth_cross_entropy(x, y, eps).isnan()
        assert distance(loss[kept], expected[kept]) < 1e-6 and distance(grad[kept], truth[kept]) < 1e-5

# ---------------------------------------------------------------- which way is taken

@pytest.fixture
def ways(monkeypatch):
    "The loss, where none is few logits: of its functions, which gave something, and which gave up (name?)."
    seen = []
    def noted(name, f): return lambda *args: (res := f(*args), seen.append(name.split('_')[0] + '?' * (res is None)))[0]
    for name in ('pytorch_loss', 'quick_losses', 'losses_of', 'masked_losses'): monkeypatch.setattr(softmax, name, noted(name, getattr(softmax, name)))
    monkeypatch.setattr(softmax, 'FEW', 0)
    def call(*args, **options):
        seen.clear()
        smooth_cross_entropy(*args, **options)
        return ' '.join(seen)
    return call

QUICK, SLOW, MASKED = 'pytorch? quick', 'pytorch? quick? losses', 'pytorch? quick? losses losses masked'

@pytest.mark.parametrize('value,eps,way', [
    (None, .1, QUICK), (None, 0., QUICK), (softmax.FAR - .5, .1, QUICK), (softmax.FAR + 1, .1, SLOW), (softmax.FAR + 1, 0., QUICK), (-INF, .1, MASKED), (-INF, 0., QUICK)])
def test_which_way(value, eps, way, ways):
    "One exp where that is exact; else log softmax; and where a class is masked, the rules of masked classes."
    x, y = torch.randn(20, 50), torch.randint(3, 50, (20,))
    if value == -INF: x[:, 1] = value
    elif value: x[-1, y[-1]] = value
    assert ways(x.requires_grad_(), y, eps) == way
    if value is None:
        for far in (1000., -softmax.FAR - 5): assert ways((x + far).detach().requires_grad_(), y, .1) == SLOW   # sums of the logits as they are
        sure = x.detach().clone()
        sure[-1], sure[-1, 0] = -300., 0.   # of another class than the label
        assert ways(sure.requires_grad_(), y, eps) == SLOW

def test_which_way_without_a_gradient(ways, monkeypatch):
    "There is no softmax to share, so log softmax; soft labels likewise."
    monkeypatch.setattr(softmax, 'CHUNK_MB', 0)
    x, y = torch.randn(1, 50, requires_grad=True), torch.tensor([3])
    with torch.no_grad(): assert ways(x, y) == 'pytorch? losses'
    assert ways(x, x.detach().softmax(1)) == 'pytorch? losses'
    for options in (dict(prior=torch.full((50,), .02)), dict(spread='others'), dict(eps=torch.full((50,), .1)), dict(weight=torch.ones(50))):
        assert ways(x, y, **options) == QUICK

def test_what_goes_to_pytorch(ways, monkeypatch):
    "Class indices up to FEW logits, and up to a chunk where there is no gradient to make, or labels are soft: in its dtypes, with its options."
    monkeypatch.setattr(softmax, 'FEW', 20), monkeypatch.setattr(softmax, 'CHUNK_MB', 1)
    x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, 2, 1])
    soft, w, more = torch.rand(4, 5).softmax(1), torch.rand(5), torch.randn(2**18 // 5 + 1, 5)
    taken = [(x, y, {}), (x, soft, {}), (x, y, dict(weight=w)), (x, soft, dict(weight=w)), (x, y, dict(reduction='none')), (x, y, dict(reduction='sum')),
             (x, torch.tensor([0, -100, 2, 1]), {}), (x, y, dict(ignore_index=2)), (x, y, dict(axis=-1)), (x, y, dict(eps=1.)), (x.double(), y, {}),
             (torch.randn(5, 5), y.new_zeros(5), {}), (torch.randn(5, 5, requires_grad=True), torch.full((5, 5), .2), {}),
             (x[None].movedim(1, 2).contiguous(), y[None], {}), (more[:-1], torch.zeros(len(more) - 1).long(), {})]
    left = [(torch.randn(5, 5, requires_grad=True), y.new_zeros(5), {}), (more, torch.zeros(len(more)).long(), {}), (more, torch.full(more.shape, .2), {}),
            (x, y, dict(prior=w / w.sum())), (x, y, dict(spread='others')), (x, soft > .2, dict(multi_hot=True)), (x, y, dict(eps=w)), (x, y.int(), {}),
            (x, soft.double(), {}), (x.bfloat16(), y, {}), (x[None], y[None], dict(axis=-1)), (x, y, dict(eps=torch.tensor(.1))), (x.T, y, dict(axis=0)),
            (x, torch.full((4,), -100), {}), (x.detach().masked_fill(x > 1, -INF), y, dict(reduction='sum'))]
    for cases, expected in ((taken, 'pytorch'), (left, 'pytorch?')):
        for x, y, options in cases: assert ways(x, y, **options).split()[0] == expected, (x.shape, y, options)

@pytest.mark.parametrize('shape', [(40, 30000), (3, 20000, 5)])
def test_many_classes_that_are_not_next_to_each_other(shape):
    "No more error than when they are: exponentials are not added up one by one."
    x, y = 3 * torch.randn(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    if x.dim() == 2: x = x.T.contiguous().T
    loss, grad = loss_and_grad(smooth_cross_entropy, x, y)
    expected, truth = loss_and_grad(F.cross_entropy, x.double(), y, label_smoothing=.1)
    assert abs(loss / expected - 1) <= 3e-7 and (grad.double() - truth).norm() <= 1e-6 * truth.norm()
    if x.numel() > 2**20: assert abs(smooth_cross_entropy(x, y) / expected - 1) <= 3e-7   # fewer go to PyTorch where there is no gradient
