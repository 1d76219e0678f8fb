"The softmax loss, rule by rule; parity with PyTorch is in test_parity.py, autograd in test_torch_features.py."
from itertools import product
import math, os, re, subprocess, sys

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits, smooth_cross_entropy, smooth_targets
from fastai_smooth.losses import LabelSmoothingCrossEntropy
from reference import REDUCTIONS, distance, loss_and_grad, rounded_once, softmax_reference

INF = math.inf
pytestmark = pytest.mark.filterwarnings('ignore:.*weight')   # past the flip: has a test of its own
OPTIONS = 'all', 'others', 'prior', 'matrix', 'per-class', 'multi_hot', 'multi_hot others', 'soft'
few = settings(max_examples=int(os.environ.get('SMOOTH_TEST_SETTINGS', 100)), deadline=None, derandomize=True, database=None)


def rows(n, k, dtype=torch.float64): return torch.randn(n, k, dtype=dtype), torch.randint(0, k, (n,))


def same_as_reference(input, target, eps=.1, tolerance=1e-10, grad_output=1., **options):
    "loss and gradient against float64"
    actual = loss_and_grad(smooth_cross_entropy, input, target, eps, grad_output=grad_output, **options)
    expected = softmax_reference(input, target, eps, grad_output=grad_output, **options)
    errors = list(map(distance, actual, expected))
    assert max(errors) < tolerance, f'loss off by {errors[0]:.3g}, gradient by {errors[1]:.3g}'


# ---------------------------------------------------------------- values worked by hand

def test_seed_example():
    logits = torch.tensor([[0, .2, .7, .1, 0], [0, .9, .2, .2, 1], [1, .2, .7, .9, 1]])
    assert abs(smooth_cross_entropy(logits, torch.tensor([2, 1, 0]), .5).item() - 1.4670) < 5e-5


@pytest.mark.parametrize('K,gap', [(2, 2.944), (3, 3.3322), (10, 4.511), (1000, 9.105)])
def test_optimum(K, gap):
    "the gap between the true logit and the others that minimises the loss: ln(K(1-eps)/eps + 1)"
    low, high = 0., 20.
    for _ in range(60):                                             # bisect on the sign of the slope
        mid = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        logits = torch.cat([mid[None], torch.zeros(K - 1).double()])[None]
        slope, = torch.autograd.grad(smooth_cross_entropy(logits, torch.tensor([0]), .1), mid)
        low, high = (mid.item(), high) if slope < 0 else (low, mid.item())
    assert abs(low - gap) < 6e-4
    assert abs(low - math.log(K * .9 / .1 + 1)) < 1e-9


@pytest.mark.parametrize('K,floor', [(2, .1985), (10, .5003), (100, .7778), (1000, 1.0148)])
def test_floor(K, floor):
    "the loss that no logits go below, at eps .1"
    logits = torch.zeros(1, K).double()
    logits[0, 0] = math.log(K * .9 / .1 + 1)
    target = torch.tensor([0])
    best = smooth_cross_entropy(logits, target, .1).item()
    assert abs(best - floor) < 6e-5
    for _ in range(20): assert smooth_cross_entropy(logits + .1 * torch.randn(1, K), target, .1).item() > best


def test_eps_zero():
    "plain cross entropy"
    x, y = rows(7, 5)
    for reduction in REDUCTIONS:
        actual = loss_and_grad(smooth_cross_entropy, x, y, 0., reduction=reduction)
        assert max(map(distance, actual, loss_and_grad(F.cross_entropy, x, y, reduction=reduction))) < 1e-12


@pytest.mark.parametrize('eps,spread', product([0., .1, .5, 1.], ['all', 'others']))
def test_uniform_logits(eps, spread):
    "ln K for every eps"
    for K in (2, 3, 10):
        loss = smooth_cross_entropy(torch.full((4, K), 1.3).double(), torch.arange(4) % K, eps, spread=spread)
        assert abs(loss.item() - math.log(K)) < 1e-12


@pytest.mark.parametrize('eps,spread,reduction', product([0., .1, 1.], ['all', 'others'], REDUCTIONS))
def test_one_class(eps, spread, reduction):
    "K=1 gives loss 0 and no gradient"
    x = torch.randn(3, 1)
    for y, options in [(torch.zeros(3).long(), {}), (torch.tensor([[1], [0], [1]]), dict(multi_hot=True)),
                       (torch.zeros(3).long(), dict(weight=torch.tensor([2.])))]:
        loss, grad = loss_and_grad(smooth_cross_entropy, x, y, eps, spread=spread, reduction=reduction, **options)
        assert (loss == 0).all() and (grad == 0).all()


def test_multi_hot_by_hand():
    "logits ln 1, 2, 3, 4 have p = .1, .2, .3, .4; labels 0 and 2 with eps .2 in both conventions"
    x, y = torch.tensor([[1., 2., 3., 4.]]).double().log(), torch.tensor([[1, 0, 1, 0]])
    p1, p2, p3, p4 = (-math.log(p) for p in (.1, .2, .3, .4))
    everywhere = smooth_cross_entropy(x, y, .2, multi_hot=True).item()                   # .8/2 + .2/4, .2/4
    assert abs(everywhere - (.45 * p1 + .05 * p2 + .45 * p3 + .05 * p4)) < 1e-12
    others = smooth_cross_entropy(x, y, .2, multi_hot=True, spread='others').item()      # .8/2, .2/2
    assert abs(others - (.4 * p1 + .1 * p2 + .4 * p3 + .1 * p4)) < 1e-12


# ---------------------------------------------------------------- every option against float64

@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('option', ['all', 'others', 'prior', 'matrix', 'per-class', 'multi_hot', 'multi_hot others',
                                    'soft', 'soft others', 'soft prior'])
def test_every_convention(option, reduction, dtype, tolerance):
    "2-D to 4-D, with and without class weights"
    gen = torch.Generator().manual_seed(1)
    for shape, weighted in product([(6, 5), (5, 5, 3), (2, 7, 3, 4)], [False, True]):
        K, eps = shape[1], .3
        rand = lambda *s: torch.rand(s, generator=gen, dtype=torch.float64)
        x, y = 4 * rand(*shape) - 2, torch.randint(0, K, (shape[0], *shape[2:]), generator=gen)
        options = dict(reduction=reduction, weight=(rand(K) + .3).to(dtype) if weighted else None)
        if option.endswith('prior'): options['prior'] = (3 * rand(K)).softmax(0).to(dtype)
        if option == 'matrix': options['prior'] = (3 * rand(K, K)).softmax(1).to(dtype)
        if option == 'per-class': eps = rand(K).to(dtype)
        if 'others' in option: options['spread'] = 'others'
        if 'multi_hot' in option: y, options['multi_hot'] = (rand(*shape) < .4).long(), True
        if option.startswith('soft'): y = rand(*shape).softmax(1).to(dtype)
        same_as_reference(x.to(dtype), y, eps, tolerance, **options)


@few
@given(data=st.data(), seed=st.integers(0, 2**20), eps=st.floats(0, 1), reduction=st.sampled_from(REDUCTIONS),
       option=st.sampled_from(OPTIONS),
       weighted=st.booleans(), masked=st.booleans(), last=st.booleans())
def test_against_the_reference(data, seed, eps, reduction, option, weighted, masked, last):
    "any shape, class axis 1 or last, some rows ignored, some classes masked"
    gen = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(s, generator=gen, dtype=torch.float64)
    n, k, *spatial = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 7), *[st.integers(1, 3)] *
                                         data.draw(st.integers(0, 2))))
    scale = data.draw(st.sampled_from([1., 10., 100.]))
    x, y = scale * (rand(n, k, *spatial) - .5), torch.randint(0, k, (n, *spatial), generator=gen)
    options = dict(reduction=reduction, weight=rand(k) + .3 if weighted else None)
    if option == 'prior': options['prior'] = (3 * rand(k)).softmax(0)
    if option == 'matrix': options['prior'] = (3 * rand(k, k)).softmax(1)
    if option == 'per-class': eps = rand(k)
    if 'others' in option: options['spread'] = 'others'
    if 'multi_hot' in option: y, options['multi_hot'] = rand(*x.shape) < .4, True
    if option == 'soft': y = rand(*x.shape).softmax(1)
    dense = option == 'soft' or 'multi_hot' in option
    if masked:                                                  # never a true class: its rule has a test of its own
        true = y.bool() if dense else F.one_hot(y, k).movedim(-1, 1).bool()
        if option == 'soft': true = torch.zeros_like(x).bool(); true[:, 0] = True
        mask = (rand(*x.shape) < .4) & ~true
        mask &= ~mask.all(1, keepdim=True)
        x = x.masked_fill(mask, -INF)
        if option == 'soft': y = torch.where(mask, 0., y); y = y / y.sum(1, keepdim=True)
    if not dense: y[rand(*y.shape) < .2] = -100
    if last and x.dim() > 2: x, y, options['axis'] = x.movedim(1, -1), y.movedim(1, -1) if dense else y, -1
    grad_output = rand(n, *spatial) - .5 if reduction == 'none' else 2.5
    same_as_reference(x, y, eps, 1e-9, grad_output, **options)


def test_soft_target_with_a_matrix_prior():
    "not in the table: the mixture of the rows, or refused; never anything else"
    x, y, S = torch.randn(4, 3).double(), torch.rand(4, 3).double().softmax(1), torch.rand(3, 3).double().softmax(1)
    try: loss = smooth_cross_entropy(x, y, .2, prior=S)
    except ValueError: return
    assert distance(loss, F.cross_entropy(x, .8 * y + .2 * y @ S)) < 1e-10


@pytest.mark.parametrize('options', [dict(spread='others'), dict(prior=torch.tensor([.5, .25, .25]).double())])
def test_per_class_eps_with_another_convention(options):
    "not in the table: both at once, or refused"
    x, y = rows(5, 3)
    eps = torch.tensor([0., .125, .5]).double()
    try: same_as_reference(x, y, eps, **options)
    except ValueError: pass


# ---------------------------------------------------------------- weights and ignored rows

def test_class_weights():
    "PyTorch's meaning: both terms weighted, mean over the weights of the targets"
    x, y = torch.tensor([[1., 2., 3.], [1., 0., 0.]]).double(), torch.tensor([2, 1])
    w = torch.tensor([1., 2., 4.]).double()
    log_p, q = x.log_softmax(1), [[.1, .1, .8], [.1, .8, .1]]
    terms = [-sum(w[k] * q[i][k] * log_p[i, k] for k in range(3)) for i in range(2)]
    expected = (terms[0] + terms[1]) / (4 + 2)
    assert abs(smooth_cross_entropy(x, y, .3, weight=w) - expected) < 1e-12
    assert distance(smooth_cross_entropy(x, y, .3, weight=w, reduction='none'), torch.stack(terms)) < 1e-12


def test_class_weights_of_dense_targets():
    "dense targets have no one class, so the mean is over the rows"
    x, w = torch.randn(4, 3).double(), torch.tensor([1., 2., 4.]).double()
    for y, options in [(torch.rand(4, 3).double().softmax(1), {}), (torch.eye(4, 3).long(), dict(multi_hot=True))]:
        each = smooth_cross_entropy(x, y, .3, weight=w, reduction='none', **options)
        assert distance(smooth_cross_entropy(x, y, .3, weight=w, **options), each.sum() / 4) < 1e-12


@pytest.mark.parametrize('reduction,weighted,ignore_index', product(REDUCTIONS, [False, True], [-100, 255, 2]))
def test_ignored_rows(reduction, weighted, ignore_index):
    "two rows with one ignored equal the other row alone"
    x, weight = torch.randn(2, 4).double(), torch.tensor([1., 2., 3., 4.]).double() if weighted else None
    options = dict(weight=weight, ignore_index=ignore_index, reduction=reduction)
    loss, grad = loss_and_grad(smooth_cross_entropy, x, torch.tensor([1, ignore_index]), .2, **options)
    alone, alone_grad = loss_and_grad(smooth_cross_entropy, x[:1], torch.tensor([1]), .2, **options)
    assert distance(grad[:1], alone_grad) < 1e-12 and (grad[1] == 0).all()
    if reduction == 'none': assert loss[1] == 0
    assert distance(loss[:1] if reduction == 'none' else loss, alone) < 1e-12


@pytest.mark.parametrize('junk', [math.nan, INF, -INF])
def test_ignored_rows_of_junk(junk):
    "padding may hold anything: it reaches neither the loss nor any gradient"
    x = torch.randn(3, 4).double()
    x[1] = junk
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(smooth_cross_entropy, x, torch.tensor([1, -100, 0]), .2, reduction=reduction)
        alone, alone_grad = loss_and_grad(smooth_cross_entropy, x[[0, 2]], torch.tensor([1, 0]), .2,
                                          reduction=reduction)
        assert distance(loss[[0, 2]] if reduction == 'none' else loss, alone) < 1e-12
        assert distance(grad[[0, 2]], alone_grad) < 1e-12 and (grad[1] == 0).all()


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('shape', [(0, 3), (0, 3, 4), (2, 3, 0), (2, 3), (2, 3, 4)])
def test_nothing_left(shape, weighted):
    "an empty batch, or every row ignored: mean is 0 with zero gradient, not nan"
    x, y = torch.randn(shape), torch.full((shape[0], *shape[2:]), -100)
    weight = torch.tensor([1., 2., 3.]) if weighted else None
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(smooth_cross_entropy, x, y, weight=weight, reduction=reduction)
        assert loss.shape == (y.shape if reduction == 'none' else ()) and (loss == 0).all()
        assert grad.shape == x.shape and (grad == 0).all()


@pytest.mark.parametrize('options', [{}, dict(multi_hot=True)])
def test_nothing_left_dense(options):
    for reduction in REDUCTIONS:
        x, y = torch.randn(0, 3), torch.ones(0, 3)
        loss, grad = loss_and_grad(smooth_cross_entropy, x, y, reduction=reduction, **options)
        assert loss.shape == ((0,) if reduction == 'none' else ()) and (loss == 0).all() and grad.shape == (0, 3)


# ---------------------------------------------------------------- half precision

def half_logits(shape, dtype): return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(2))).to(dtype)


def assert_half_matches(x, target, eps=.1, **options):
    "loss float32 and right to float32's precision; gradient in x's dtype, right to one unit in its last place"
    loss, grad = loss_and_grad(smooth_cross_entropy, x, target, eps, **options)
    expected, expected_grad = softmax_reference(x, target, eps, **options)
    assert loss.dtype == torch.float32 and grad.dtype == x.dtype
    assert distance(loss, expected) < 2e-6
    assert rounded_once(grad, expected_grad)


@pytest.mark.parametrize('dtype,K,reduction', product([torch.float16, torch.bfloat16], [5, 5000, 32000], REDUCTIONS))
def test_half_precision(dtype, K, reduction):
    "everything in float32: F.cross_entropy gives inf in float16 at K=5000"
    assert_half_matches(half_logits((3, K), dtype), torch.tensor([0, K - 1, K // 2]), reduction=reduction)


@pytest.mark.parametrize('dtype,reduction', product([torch.float16, torch.bfloat16], REDUCTIONS))
def test_half_precision_of_every_option(dtype, reduction):
    K, gen = 5000, torch.Generator().manual_seed(3)
    x, y, weight = half_logits((3, K), dtype), torch.tensor([1, -100, 4999]), torch.rand(K, generator=gen) + .1
    soft = torch.rand(3, K, generator=gen).softmax(1)
    assert_half_matches(x, y, weight=weight, reduction=reduction)
    assert_half_matches(x, y, spread='others', reduction=reduction)
    assert_half_matches(x, y, prior=weight / weight.sum(), reduction=reduction)
    assert_half_matches(x, y, weight, reduction=reduction) if weight.max() <= 1 else None
    assert_half_matches(x, soft, reduction=reduction)
    assert_half_matches(x, soft > 2e-4, multi_hot=True, reduction=reduction)
    image = half_logits((2, 40, 5, 6), dtype)
    assert_half_matches(image, torch.randint(0, 40, (2, 5, 6), generator=gen), reduction=reduction)


def test_half_precision_of_many_rows():
    "a sum beyond 65504, float16's largest number, and a mean over more rows than float16 counts exactly"
    x, y = half_logits((20000, 40), torch.float16), torch.arange(20000) % 40
    plain = F.cross_entropy(x.double(), y, label_smoothing=.1, reduction='none')
    assert plain.sum() > 65504
    for reduction, expected in (('sum', plain.sum()), ('mean', plain.mean())):
        assert distance(smooth_cross_entropy(x, y, reduction=reduction), expected) < 2e-6


def test_half_precision_soft_targets_in_half():
    x, y = half_logits((3, 50), torch.bfloat16), torch.rand(3, 50).softmax(1).to(torch.bfloat16)
    assert_half_matches(x, y)


# ---------------------------------------------------------------- masked (-inf) logits

def masked_case(dtype=torch.float64):
    "6 classes of which 1 and 4 are masked, the true ones are not"
    x = torch.randn(3, 6, dtype=dtype)
    x[:, [1, 4]] = -INF
    return x, torch.tensor([0, 2, 5]), [0, 2, 3, 5]


@pytest.mark.parametrize('spread,reduction', product(['all', 'others'], REDUCTIONS))
def test_masked_logits_smooth_over_the_unmasked_classes(spread, reduction):
    "as if the masked classes did not exist; gradient exactly 0 on them"
    x, y, kept = masked_case()
    loss, grad = loss_and_grad(smooth_cross_entropy, x, y, .3, spread=spread, reduction=reduction)
    small, small_grad = loss_and_grad(smooth_cross_entropy, x[:, kept], torch.tensor([0, 1, 3]), .3,
                                      spread=spread, reduction=reduction)
    assert loss.isfinite().all() and distance(loss, small) < 1e-12
    assert distance(grad[:, kept], small_grad) < 1e-12 and (grad[:, [1, 4]] == 0).all()


def test_masked_logits_renormalise_the_prior():
    x, y, kept = masked_case()
    prior, S = torch.tensor([.1, .2, .1, .3, .1, .2]).double(), torch.rand(6, 6).double().softmax(1)
    for p in (prior, S):
        small = p[kept] if p.dim() == 1 else p[kept][:, kept]
        small = small / small.sum(-1, keepdim=True)
        actual = loss_and_grad(smooth_cross_entropy, x, y, .3, prior=p)
        loss, grad = loss_and_grad(smooth_cross_entropy, x[:, kept], torch.tensor([0, 1, 3]), .3, prior=small)
        assert distance(actual[0], loss) < 1e-12
        assert distance(actual[1][:, kept], grad) < 1e-12 and (actual[1][:, [1, 4]] == 0).all()


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_masked_logits_of_every_option(reduction):
    "weights, per-class eps, multi-hot, soft, images; each row with a mask of its own"
    x, y, _ = masked_case()
    x[0, 3] = x[1, 5] = -INF
    hot = F.one_hot(y, 6)
    w, e = torch.rand(6).double() + .1, torch.rand(6).double()
    same_as_reference(x, y, .3, weight=w, reduction=reduction)
    same_as_reference(x, y, e, reduction=reduction)
    same_as_reference(x, hot, .3, multi_hot=True, reduction=reduction)
    same_as_reference(x, hot, .3, multi_hot=True, spread='others', weight=w, reduction=reduction)
    same_as_reference(x, torch.zeros_like(hot), .3, multi_hot=True, reduction=reduction)
    same_as_reference(x, hot.double(), .3, reduction=reduction)
    same_as_reference(x, hot.double(), .3, prior=w / w.sum(), weight=w, reduction=reduction)
    same_as_reference(x.T[None].expand(2, -1, -1), y.expand(2, -1), .3, weight=w, reduction=reduction)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_masked_logits_in_low_precision(dtype):
    x, y, _ = masked_case(torch.float32)
    loss, grad = loss_and_grad(smooth_cross_entropy, x.to(dtype), y, .3)
    expected, expected_grad = softmax_reference(x.to(dtype), y, .3)
    assert distance(loss, expected) < 2e-6 and (grad[:, [1, 4]] == 0).all()
    assert distance(grad, expected_grad) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize('eps', [0., .2])
def test_masked_logits_zero_times_inf(eps):
    "a soft target with nothing on the masked class is finite: 0 * -inf is 0"
    x, y = torch.tensor([[1., -INF, 2.]]).double(), torch.tensor([[.25, 0., .75]]).double()
    log_p = torch.tensor([1., 2.]).double().log_softmax(0)
    expected = -((1 - eps) * torch.tensor([.25, .75]).double() + eps / 2) @ log_p
    loss, grad = loss_and_grad(smooth_cross_entropy, x, y, eps)
    assert abs(loss - expected) < 1e-12 and grad[0, 1] == 0 and grad.isfinite().all()


@pytest.mark.parametrize('eps', [0., .2, 1.])
def test_masked_logits_only_the_true_class_left(eps):
    "one class left: q=1, loss 0"
    x = torch.tensor([[-INF, 3., -INF]])
    for spread in ('all', 'others'):
        loss, grad = loss_and_grad(smooth_cross_entropy, x, torch.tensor([1]), eps, spread=spread)
        assert abs(loss) < 1e-6 and grad.abs().max() < 1e-6


@pytest.mark.parametrize('kind', ['index', 'soft', 'multi_hot'])
def test_masked_logits_true_class_masked(kind):
    "+inf, with gradient 0 on the masked class and nan nowhere"
    x, y, options = torch.tensor([[1., -INF, 2.], [1., 2., 0.]]).double(), torch.tensor([1, 0]), {}
    if kind == 'soft': y = torch.tensor([[.5, .5, 0.], [1., 0., 0.]]).double()
    if kind == 'multi_hot': y, options = torch.tensor([[1, 1, 0], [1, 0, 0]]), dict(multi_hot=True)
    for eps in (0., .2):
        loss, grad = loss_and_grad(smooth_cross_entropy, x, y, eps, reduction='none', **options)
        assert loss[0] == INF and loss[1].isfinite() and grad[0, 1] == 0 and grad.isfinite().all()
        assert distance(grad[1:], softmax_reference(x[1:], y[1:], eps, reduction='none', **options)[1]) < 1e-12
        assert smooth_cross_entropy(x, y, eps, **options) == INF


def test_masked_logits_true_class_masked_without_mass():
    "eps=1 leaves nothing on the true class, so nothing is infinite"
    x = torch.tensor([[1., -INF, 2.]]).double()
    expected = -torch.tensor([1., 2.]).double().log_softmax(0).mean()
    assert abs(smooth_cross_entropy(x, torch.tensor([1]), 1.) - expected) < 1e-12


@pytest.mark.parametrize('eps', [.2, .75, 1.])
def test_masked_logits_some_of_several_positives_masked(eps):
    "with spread='others' too a positive has (1-eps)/n, masked or not: +inf but for eps=1. At .75 'all' with eps*K/(K-n) has 0 there"
    x, y = torch.tensor([[1., -INF, 2., 0., -1.], [.5, 1., -1., 2., 0.]]).double(), torch.tensor([[0, 1, 1, 0, 0], [1, 0, 1, 0, 0]])
    same_as_reference(x, y, eps, reduction='none', spread='others', multi_hot=True)
    w = torch.tensor([.5, 3., 1., 2., .25]).double()
    same_as_reference(x, y, eps, reduction='none', spread='others', multi_hot=True, weight=w)


def test_masked_logits_row_all_masked():
    "nan, as PyTorch; the other rows are not touched"
    x = torch.tensor([[-INF, -INF], [1., 2.]]).double()
    loss = smooth_cross_entropy(x, torch.tensor([0, 1]), .2, reduction='none')
    other = smooth_cross_entropy(x[1:], torch.tensor([1]), .2, reduction='none')
    assert loss[0].isnan() and distance(loss[1:], other) < 1e-12
    assert smooth_cross_entropy(x, torch.tensor([0, 1]), .2).isnan()


def test_masked_logits_of_large_magnitude():
    "-1e30, and rows far from zero, are no masks: finite and right"
    x = torch.tensor([[0., -1e30, 5.], [1e4, 1e4 + 1, 1e4 + 2], [-1e4, -1e4 + 1, -1e4]]).double()
    same_as_reference(x, torch.tensor([2, 0, 1]), .1)
    same_as_reference(x.float()[1:], torch.tensor([0, 1]), .1, 1e-5)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize('eps', [-.25, 1.25, math.nan, INF])
def test_eps_out_of_range(eps):
    x, y = rows(2, 3)
    with pytest.raises(ValueError, match=str(eps)): smooth_cross_entropy(x, y, eps)


@pytest.mark.parametrize('value', [-.25, 1.25, math.nan])
def test_per_class_eps_out_of_range(value):
    x, y = rows(2, 3)
    with pytest.raises(ValueError, match=str(value)): smooth_cross_entropy(x, y, torch.tensor([.1, value, .2]))


def test_per_class_eps_of_a_wrong_shape():
    x, y = rows(2, 3)
    with pytest.raises(ValueError, match='5'): smooth_cross_entropy(x, y, torch.full((5,), .1))


@pytest.mark.parametrize('index,ndim', product([77, -7], [2, 3]))
def test_class_index_out_of_range(index, ndim):
    "IndexError naming the index, the row and K"
    x, y = torch.randn(50, 36), torch.zeros(50).long()
    y[42] = index
    if ndim == 3: x, y = x.view(50, 36, 1), y.view(50, 1)
    with pytest.raises(IndexError) as e: smooth_cross_entropy(x, y, .1)
    numbers = re.findall(r'-?\d+', str(e.value))
    assert {str(index), '42', '36'} <= set(numbers), e.value


def test_class_index_out_of_range_is_not_ignored():
    "the default ignore_index is an index like any other when another one is asked for"
    x = torch.randn(2, 3)
    with pytest.raises(IndexError, match='-100'): smooth_cross_entropy(x, torch.tensor([0, -100]), .1, ignore_index=255)
    with pytest.raises(IndexError, match='255'): smooth_cross_entropy(x, torch.tensor([0, 255]), .1)


@pytest.mark.parametrize('name,value,came', [
    ('prior', torch.full((5,), .2), '5'), ('prior', torch.full((5, 3), 1 / 3), '5'),
    ('prior', torch.full((3, 5), .2), '5'),
    ('weight', torch.ones(5), '5'), ('weight', torch.ones(1, 3, 5), '5')])
def test_prior_weight_shapes(name, value, came):
    "ValueError naming what was expected (K=3) and what came"
    x, y = rows(2, 3)
    with pytest.raises(ValueError) as e: smooth_cross_entropy(x, y, .1, **{name: value})
    assert name in str(e.value) and '3' in str(e.value) and came in str(e.value)


@pytest.mark.parametrize('name,value,came', [
    ('weight', [1., -2.5, 1.], '-2.5'), ('prior', [.5, .75, -.25], '-0.25'), ('prior', [.5, .5, .5], '1.5'),
    ('prior', [[1., 0., 0.], [0., 1., 0.], [.5, .5, .5]], '1.5'),
    ('prior', [[1., 0., 0.], [0., 1., 0.], [.5, .75, -.25]], '-0.25')])
def test_prior_weight_values(name, value, came):
    "negative ones, and priors that don't sum to 1: looked at where a module is built, not in each call"
    with pytest.raises(ValueError) as e: LabelSmoothingCrossEntropy(.1, **{name: torch.tensor(value)})
    assert name in str(e.value) and came in str(e.value)


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('shape', [(5, 3), (700, 1000), (2, 3, 4, 4)])
def test_weights_that_pytorch_takes(shape, reduction):
    "negative ones too: the functions take what `F.cross_entropy` does"
    x, y = torch.randn(shape).double(), torch.randint(shape[1], shape[:1] + shape[2:])
    w = torch.randn(shape[1]).double()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        actual = loss_and_grad(smooth_cross_entropy, x.to(dtype), y, .1, weight=w, reduction=reduction)
        assert max(map(distance, actual, loss_and_grad(F.cross_entropy, x, y, label_smoothing=.1, weight=w, reduction=reduction))) < tolerance


def test_soft_rows_that_do_not_sum_to_1():
    "multi-hot ones: the error names what is for them. As index targets of images: whatever the axis"
    for shape, axis in (((4, 3), 1), ((2, 3, 5), 1), ((2, 5, 3), -1), ((3,), 1)):
        y = torch.full(shape, .5 if len(shape) == 2 else 1.)
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ValueError, match='soft targets must sum to 1 along axis .* at row .*: use multi_hot=True .*LabelSmoothingBCEWithLogitsFlat'):
                smooth_cross_entropy(torch.randn(shape), y.to(dtype), .1, axis=axis)
        smooth_cross_entropy(torch.randn(shape), y, .1, axis=axis, multi_hot=True)
    half = torch.randn(4, 1000).softmax(1)
    for dtype in (torch.float16, torch.bfloat16): smooth_cross_entropy(torch.randn(4, 1000), half.to(dtype))
    smooth_cross_entropy(torch.randn(0, 3), torch.zeros(0, 3))
    smooth_cross_entropy(torch.randn(2, 3, device='meta'), torch.ones(2, 3, device='meta'))  # no values
    with pytest.raises(ValueError, match='sum to 1'): smooth_cross_entropy(torch.randn(2, 2), torch.ones(2, 2, requires_grad=True))


def test_scalar_eps_that_needs_a_gradient():
    "would get none: refused. A value a class gets one"
    eps, x, y = torch.tensor(.1, requires_grad=True), *rows(6, 3)
    with pytest.raises(ValueError, match=r'no gradient: pass eps.detach\(\), or to learn it eps.expand\(3\)'): smooth_cross_entropy(x, y, eps)
    with pytest.raises(ValueError, match=r'or to learn it eps.expand\(K\)'): LabelSmoothingCrossEntropy(eps)
    with pytest.raises(ValueError, match=r'no gradient'): smooth_binary_cross_entropy_with_logits(x, x > 0, eps)
    with pytest.raises(ValueError, match=r'no gradient'): torch.func.grad(lambda e: smooth_cross_entropy(x, y, e))(eps.detach())
    grad, = torch.autograd.grad(smooth_cross_entropy(x, y, eps.expand(3)), eps)
    step = (smooth_cross_entropy(x.double(), y, .11) - smooth_cross_entropy(x.double(), y, .09)) / .02
    assert abs(grad.item() - step.item()) < 1e-5
    assert torch.equal(smooth_cross_entropy(x, y, eps.detach()), smooth_cross_entropy(x, y, eps.item()))


def test_axis_of_a_single_row():
    "(K,) logits have one axis; 1, the default, is taken for it, and no other"
    x, y = torch.randn(3), torch.tensor(1)
    for axis in (0, 1, -1): assert torch.equal(smooth_cross_entropy(x, y, axis=axis), smooth_cross_entropy(x[None], y[None]))
    for axis in (7, 2, -2):
        with pytest.raises(IndexError, match=f'axis {axis} is out of range'): smooth_cross_entropy(x, y, axis=axis)


def test_integer_targets_shaped_like_the_input():
    "multi-hot labels without multi_hot=True: ValueError that points to the sigmoid loss"
    x = torch.randn(4, 3)
    for dtype in (torch.int64, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match='(?i)bce|binary_cross_entropy'):
            smooth_cross_entropy(x, torch.ones(4, 3).to(dtype), .1)


@pytest.mark.parametrize('target', [torch.zeros(5).long(), torch.zeros(2, 3).long(), torch.rand(4, 2), torch.rand(4),
                                    torch.tensor(0)])
def test_target_of_a_wrong_shape(target):
    with pytest.raises(ValueError, match=r'\d'): smooth_cross_entropy(torch.randn(4, 3), target, .1)


@pytest.mark.parametrize('name,value', [('spread', 'uniform'), ('reduction', 'average'), ('backend', 'fpga')])
def test_unknown_option(name, value):
    x, y = rows(2, 3)
    with pytest.raises(ValueError, match=value): smooth_cross_entropy(x, y, .1, **{name: value})


PRIOR = torch.tensor([.5, .3, .2])


@pytest.mark.parametrize('dense,options', [(False, dict(spread='others', prior=PRIOR)),
                                           (False, dict(spread='others', prior=torch.eye(3))),
                                           (True, dict(multi_hot=True, prior=PRIOR)),
                                           (True, dict(multi_hot=True, prior=torch.eye(3))),
                                           (True, dict(eps=PRIOR))])
def test_combinations_not_in_the_table(dense, options):
    x, y = torch.randn(2, 3), torch.tensor([[1., 0., 0.], [0., 1., 0.]]) if dense else torch.tensor([0, 1])
    with pytest.raises(ValueError): smooth_cross_entropy(x, y, **options)


# ---------------------------------------------------------------- class weights that flip the optimum

FLIP = """
import torch
from fastai_smooth.losses import LabelSmoothingCrossEntropy
for _ in range(3): LabelSmoothingCrossEntropy({eps}, weight=torch.tensor([1., {weight}]))
"""


@pytest.mark.parametrize('eps,weight,times', [(.1, 18.9, 0), (.1, 19.1, 1), (.5, 2.9, 0), (.5, 3.1, 1), (0., 1e6, 0)])
def test_weights_past_the_flip_warn(eps, weight, times):
    "K=2: the ratio is 19 at eps .1, 3 at .5; once however often such a loss is built, nothing below the ratio"
    code = FLIP.format(eps=eps, weight=weight)
    ended = subprocess.run([sys.executable, '-W', 'always', '-c', code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    warned = [line for line in ended.stderr.splitlines() if 'Warning' in line and 'weight' in line]
    assert len(warned) == times, ended.stderr


def test_weights_past_the_flip_move_the_argmax():
    "what the warning is about: just past the ratio the best logits no longer choose the label"
    for ratio, label_wins in ((18., True), (20., False)):
        w, q = torch.tensor([1., ratio]).double(), smooth_targets(torch.tensor([0]), 2, .1).double()[0]
        best = (w * q).log()[None]                              # argmin of the loss: softmax = t / sum(t)
        _, grad = loss_and_grad(smooth_cross_entropy, best, torch.tensor([0]), .1, weight=w)
        assert grad.abs().max() < 1e-6 and (best.argmax() == 0) == label_wins
