"The softmax loss, rule by rule, and way by way; parity with PyTorch is in test_parity.py."
from functools import partial
from itertools import product
import math, os

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from fastai_smooth.kernels import smooth_cross_entropy, smooth_targets, softmax
from .cases import plain_loss
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


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('shape', [(5, 3), (700, 1000), (2, 3, 4, 4)])
def test_weights_that_pytorch_takes(shape, reduction):
    "negative ones too: the functions take what `F.cross_entropy` does"
    x, y = torch.randn(shape).double(), torch.randint(shape[1], shape[:1] + shape[2:])
    w = torch.randn(shape[1]).double()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        actual = loss_and_grad(smooth_cross_entropy, x.to(dtype), y, .1, weight=w, reduction=reduction)
        assert max(map(distance, actual, loss_and_grad(F.cross_entropy, x, y, label_smoothing=.1, weight=w, reduction=reduction))) < tolerance


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


# ---------------------------------------------------------------- the ways: how much there is to compute, and what, decides how

class Ways:
    "Which of the functions of the loop gave something, and which gave up (name?)"
    def __init__(self, monkeypatch):
        self.seen = []
        for name in ('pytorch_loss', 'quick_losses', 'losses_of', 'masked_losses'): monkeypatch.setattr(softmax, name, self.noted(name, getattr(softmax, name)))
    def noted(self, name, f):
        def call(*args, **kwargs):
            res = f(*args, **kwargs)
            self.seen.append(name.split('_')[0] + ('?' if res is None else ''))
            return res
        return call
    def __call__(self):
        res, self.seen = ' '.join(self.seen), []
        return res


QUICK, SLOW, MASKED = 'pytorch? quick', 'pytorch? quick? losses', 'pytorch? quick? losses masked'
SIZES = {'few': (16, 8), 'few images': (2, 5, 8, 8)}
if os.environ.get('SMOOTH_TEST_BACKEND') != 'triton':   # whose kernels are cut otherwise, and which an interpreter runs
    SIZES |= {'loop': (100, 1000), 'chunks': (700, 1000), 'images': (3, 21, 80, 80), 'one image': (1, 21, 190, 190)}


def by_size(*names): return pytest.mark.parametrize('size', [name for name in names if name in SIZES])


@pytest.fixture
def sized(request, monkeypatch):
    "Chunks of a megabyte, so that a small tensor has several; few logits go to PyTorch, and no others"
    size = request.getfixturevalue('size')
    monkeypatch.setattr(softmax, 'FEW', 10**4 if 'few' in size else 0)
    if 'few' not in size: monkeypatch.setattr(softmax, 'CHUNK_MB', 1)


def inputs(shape, kind, dtype=torch.float32):
    "Logits and class indices; what a quick way does not do is in the last row, and the others have to come out of it right, too"
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(shape, generator=g), torch.randint(3, shape[1], shape[:1] + shape[2:], generator=g)
    row = x[-1, :, -1, -1] if x.dim() == 4 else x[-1]
    label = y.view(-1)[-1]
    if kind == 'sure of another class': row[:] = -300.; row[0] = 0.; y.view(-1)[-1] = 3
    if kind == 'label near FAR': row[label] = softmax.FAR - .5
    if kind == 'label past FAR': row[label] = softmax.FAR + 1
    if kind == 'label past -FAR': row -= softmax.FAR + 5
    if kind == 'far from 0': x += 1000.
    if kind == 'very far from 0': x = (x * 8).round() / 8 + 1e6   # as float32 has them there
    if kind == 'one row far from 0': row += 3000.
    if kind == 'masked': x[:, 1:3] = -torch.inf
    if kind == 'masked by a number': x[:, 1:3] = -1e4
    if kind == 'ignored': y.view(-1)[-1] = -100; y.view(-1)[0] = -100; row[:] = torch.nan
    return x.to(dtype).requires_grad_(), y


def truth(x, y, kind, eps):
    "PyTorch in float64; of masked classes, which get no smoothing, of the others alone; of junk that is ignored, without it"
    d, target = x.detach().double(), y
    kept = torch.arange(x.shape[1]) if kind != 'masked' else torch.tensor([i for i in range(x.shape[1]) if i not in (1, 2)])
    d = d.index_select(1, kept).nan_to_num_(0, neginf=-torch.inf).requires_grad_()
    if kind == 'masked': target = y - 2
    loss = F.cross_entropy(d, target, label_smoothing=eps)
    grad = torch.zeros(x.shape, dtype=torch.double).index_copy_(1, kept, torch.autograd.grad(loss, d)[0])
    return loss.item(), grad


KINDS = ['plain', 'sure of another class', 'label near FAR', 'label past FAR', 'label past -FAR', 'far from 0', 'very far from 0', 'one row far from 0', 'masked',
         'masked by a number', 'ignored']


@pytest.mark.parametrize('eps', [0., .1])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', SIZES)
def test_every_way(size, kind, eps, sized):
    "few logits, a loop, several chunks: with a gradient, with it made anew, and without"
    x, y = inputs(SIZES[size], kind)
    loss = smooth_cross_entropy(x, y, eps)
    expected, grad = truth(x, y, kind, eps)
    assert abs(loss.item() - expected) <= 2e-6 * expected
    actual, = torch.autograd.grad(loss, x, retain_graph=True)
    again, = torch.autograd.grad(loss, x, torch.tensor(2.))  # which makes it anew
    assert (actual.double() - grad).norm() <= 1e-5 * grad.norm()
    if os.environ.get('SMOOTH_TEST_BACKEND') == 'triton': assert (again - actual*2).norm() <= 1e-6 * grad.norm()  # by another kernel
    else: assert torch.equal(again, actual*2)
    with torch.no_grad(): assert abs(smooth_cross_entropy(x, y, eps).item() - expected) <= 2e-6 * expected


@pytest.mark.parametrize('options', [{}, dict(prior=torch.tensor([.5, .2, .3])), dict(weight=torch.tensor([.5, 2., 1.]))])
def test_ignored_rows_get_no_gradient_whatever_comes_in(options):
    "as in PyTorch: also where it is inf, as of the square root of a loss of 0"
    x, y = torch.tensor([[1., 2, 3], [3, 1, 0], [0, 1, 0]], requires_grad=True), torch.tensor([0, -100, 2])
    grad, = torch.autograd.grad(smooth_cross_entropy(x, y, reduction='none', **options).sqrt().sum(), x)
    assert grad.isfinite().all() and not grad[1].any() and grad[::2].all()


@pytest.mark.parametrize('x,dtype', [([1e32, 2., 1e32], torch.float32), ([1e32, -torch.inf, 1e32], torch.float32), ([-1e39, -1.5e39, -1e39], torch.float64),
                                     ([torch.finfo(torch.float64).min] * 3, torch.float64), ([torch.finfo(torch.float32).min] * 3, torch.float32)])
def test_the_largest_and_the_least_logits(x, dtype):
    "are not taken for masked ones, nor do they overflow where the loss does not"
    x, y = torch.tensor([x, [1., 2., 3.]], dtype=dtype, requires_grad=True), torch.tensor([0, 2])
    loss = smooth_cross_entropy(x, y, reduction='none', eps=0.)
    d = x.detach().double().requires_grad_()
    expected = F.cross_entropy(d, y, reduction='none')
    assert torch.allclose(loss.double(), expected)
    grad, truth = torch.autograd.grad(loss.sum(), x)[0], torch.autograd.grad(expected.sum(), d)[0]
    assert torch.allclose(grad.double(), truth, atol=1e-7)


@pytest.mark.parametrize('kind', KINDS)
@by_size('few', 'chunks', 'images')
@pytest.mark.parametrize('layout', ['none', 'turned', 'sliced', 'bfloat16', 'float16', 'float16, prior', 'weight', 'prior', 'classes last'])
def test_every_way_otherwise(size, kind, layout, sized):
    "one value a row, other layouts, half precision, a weight of ones: the same loss and gradient"
    if 'float16' in layout[:7] and kind in ('one row far from 0', 'very far from 0'): pytest.skip('1 apart is 2 apart there, and 1e6 is inf')
    dtype = getattr(torch, layout[:8].strip(',')) if 'float16' in layout else torch.float32
    x, y = inputs(SIZES[size], kind, dtype)
    expected, grad = truth(x, y, kind, .1)
    options, v, w = {}, x, y
    if layout == 'turned': v = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    if layout == 'sliced': v = torch.stack([x.detach()]*2, -1).requires_grad_()
    if layout == 'classes last': v, options = x.detach().movedim(1, -1).contiguous().requires_grad_(), dict(axis=-1)
    if layout == 'weight': options = dict(weight=torch.ones(x.shape[1]))
    if 'prior' in layout: options = dict(prior=torch.full(x.shape[1:2], 1/x.shape[1]))
    if layout == 'none': options = dict(reduction='none')
    loss = smooth_cross_entropy(v[..., 0] if layout == 'sliced' else v, w, .1, **options)
    if layout == 'none': loss = loss.sum() / (y != -100).sum()
    scale = 1024. if dtype == torch.float16 else 1.
    actual = torch.autograd.grad(loss, v, torch.tensor(scale))[0].double() / scale
    if layout == 'sliced': actual = actual[..., 0]
    if layout == 'classes last': actual = actual.movedim(-1, 1)
    assert abs(loss.item() - expected) <= 2e-6 * expected
    bfloat16 = 8e-3 if os.environ.get('TRITON_INTERPRET') == '1' else 4e-3  # Triton's interpreter cuts digits off, rather than rounding
    assert (actual - grad).norm() <= {torch.float32: 1e-5, torch.bfloat16: bfloat16, torch.float16: 1e-3}[dtype] * grad.norm()
    with torch.no_grad(): again = smooth_cross_entropy(v[..., 0] if layout == 'sliced' else v, w, .1, **options)
    assert abs((again.sum() / (y != -100).sum() if layout == 'none' else again).item() - expected) <= 2e-6 * expected


@pytest.mark.parametrize('kind,eps,way', [
    ('plain', .1, QUICK), ('plain', 0., QUICK), ('ignored', .1, SLOW), ('label near FAR', .1, QUICK), ('label past FAR', .1, SLOW), ('label past FAR', 0., QUICK),
    ('label past -FAR', .1, SLOW), ('sure of another class', .1, SLOW), ('sure of another class', 0., SLOW), ('far from 0', .1, SLOW), ('far from 0', 0., QUICK),
    ('masked', .1, MASKED), ('masked', 0., QUICK), ('masked by a number', .1, QUICK)])
def test_which_way(kind, eps, way, monkeypatch):
    "one exp where that is exact; else log softmax; and where a class is masked, the rules of masked classes"
    ways = Ways(monkeypatch)
    monkeypatch.setattr(softmax, 'FEW', 0)
    x, y = inputs((20, 50), kind)
    smooth_cross_entropy(x, y, eps)
    seen = ways()
    if kind == 'ignored': assert seen.startswith(SLOW)  # nan may be a masked class
    else: assert seen == way


def test_which_way_without_a_gradient(monkeypatch):
    "there is no softmax to share, so log softmax; soft labels likewise"
    ways = Ways(monkeypatch)
    monkeypatch.setattr(softmax, 'FEW', 0), monkeypatch.setattr(softmax, 'CHUNK_MB', 0)
    x, y = inputs((1, 50), 'plain')
    with torch.no_grad(): smooth_cross_entropy(x, y)
    assert ways() == 'pytorch? losses'
    smooth_cross_entropy(x, x.detach().softmax(1))
    assert ways() == 'pytorch? losses'
    for options in (dict(prior=torch.full((50,), .02)), dict(spread='others'), dict(eps=torch.full((50,), .1)), dict(weight=torch.ones(50))):
        smooth_cross_entropy(x, y, **options)
        assert ways() == QUICK


def test_what_goes_to_pytorch(monkeypatch):
    "class indices up to FEW logits, and up to a chunk where there is no gradient to make, or labels are soft: in its dtypes, with its options"
    ways = Ways(monkeypatch)
    monkeypatch.setattr(softmax, 'FEW', 20), monkeypatch.setattr(softmax, 'CHUNK_MB', 1)
    def way(x, y, **options):
        smooth_cross_entropy(x, y, **options)
        return ways().split()[0]
    x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, 2, 1])
    soft, w, more = torch.rand(4, 5).softmax(1), torch.rand(5), torch.randn(2**18 // 5 + 1, 5)
    taken = [(x, y, {}), (x, soft, {}), (x, y, dict(weight=w)), (x, soft, dict(weight=w)), (x, y, dict(reduction='none')), (x, y, dict(reduction='sum')),
             (x, torch.tensor([0, -100, 2, 1]), {}), (x, y, dict(ignore_index=2)), (x, y, dict(axis=-1)), (x, y, dict(eps=1.)), (x.double(), y, {}),
             (torch.randn(5, 5), y.new_zeros(5), {}), (torch.randn(5, 5, requires_grad=True), torch.full((5, 5), .2), {}),
             (more[:-1], torch.zeros(len(more) - 1).long(), {})]
    left = [(torch.randn(5, 5, requires_grad=True), y.new_zeros(5), {}), (more, torch.zeros(len(more)).long(), {}), (more, torch.full(more.shape, .2), {}),
            (x, y, dict(prior=w / w.sum())), (x, y, dict(spread='others')), (x, soft > .2, dict(multi_hot=True)), (x, y, dict(eps=w)), (x, y.int(), {}), (x, soft.double(), {}),
            (x.bfloat16(), y, {}), (x[None].movedim(1, 2), y[None], dict(axis=1)), (x[None], y[None], dict(axis=-1)), (x, y, dict(eps=torch.tensor(.1))),
            (x, torch.full((4,), -100), {}), (x.detach().masked_fill(x > 1, -INF), y, dict(reduction='sum'))]
    left.pop(10)   # that one it takes
    for case in taken: assert way(*case[:2], **case[2]) == 'pytorch', case
    for case in left: assert way(*case[:2], **case[2]) == 'pytorch?', case


@by_size('few', 'loop')
@pytest.mark.parametrize('value', [math.nan, INF])
@pytest.mark.parametrize('eps', [0., .1])
def test_a_row_that_is_not_finite(eps, value, size, sized):
    "is nan, as in PyTorch; the others are right, loss and gradient"
    x, y = inputs(SIZES[size], 'plain')
    x.data[3, 2] = value
    loss = smooth_cross_entropy(x, y, eps, reduction='none')
    grad, = torch.autograd.grad(loss.sum(), x)
    d = x.detach().double().requires_grad_()
    expected = F.cross_entropy(d, y, label_smoothing=eps, reduction='none')
    kept = torch.arange(len(x)) != 3
    assert loss[3].isnan() and distance(loss[kept], expected[kept]) < 1e-6
    assert grad[3].isnan().any() and distance(grad[kept], torch.autograd.grad(expected[kept].sum(), d)[0][kept]) < 1e-5
    assert smooth_cross_entropy(x, y, eps).isnan()


JUNK_OPTIONS = {'index': {}, 'eps 0': dict(eps=0.), 'others': dict(spread='others'), 'prior': dict(prior=1), 'matrix': dict(prior=2), 'per-class eps': dict(eps=1), 'weight': dict(weight=1),
                'weight, prior': dict(weight=1, prior=1), 'weight, matrix, per-class eps': dict(weight=1, prior=2, eps=1), 'negative weights': dict(weight=-1)}


@by_size('few', 'loop', 'chunks')
@pytest.mark.parametrize('junk', [math.nan, INF, -INF])
@pytest.mark.parametrize('option', JUNK_OPTIONS)
def test_ignored_junk_beside_every_option(option, junk, size, sized):
    "rows that are ignored are as if they were not there, whatever is in them, and however the others are computed"
    n, k = SIZES[size]
    x, y, options = torch.randn(n, k), torch.randint(k, (n,)), dict(JUNK_OPTIONS[option])
    if 'prior' in options: options['prior'] = torch.rand((k,) * options['prior']).softmax(-1)
    if isinstance(options.get('eps'), int): options['eps'] = torch.rand(k)
    if 'weight' in options: options['weight'] = torch.rand(k) + .5 if options['weight'] > 0 else torch.randn(k)
    y[::3] = -100
    x[::6] = junk
    x[3::6, 1] = junk
    kept = y != -100
    to64 = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    for reduction in REDUCTIONS:
        actual = loss_and_grad(smooth_cross_entropy, x, y, reduction=reduction, **options)
        loss, grad = loss_and_grad(partial(plain_loss, smooth_cross_entropy), x[kept].double(), y[kept], reduction=reduction, **{'eps': .1, **to64})
        with torch.no_grad(): again = smooth_cross_entropy(x, y, reduction=reduction, **options)
        tolerance = 2e-4 if 'negative' in option else 2e-6  # a sum that cancels
        for v in (actual[0], again): assert distance(v[kept] if reduction == 'none' else v, loss) < tolerance
        assert distance(actual[1][kept], grad) < tolerance and (actual[1][~kept] == 0).all()
        if reduction == 'none': assert (actual[0][~kept] == 0).all()


@pytest.mark.parametrize('shape', [(40, 30), (900, 300), (2, 300, 30, 30)][:None if 'loop' in SIZES else 1])
@pytest.mark.parametrize('weighted', [False, True])
def test_a_prior_of_rows_is_its_dense_targets(shape, weighted, monkeypatch):
    "the loop looks rows of a prior [K,K] up; written out they are soft labels"
    monkeypatch.setattr(softmax, 'CHUNK_MB', 1)
    k = shape[1]
    x, y, prior, weight = torch.randn(shape), torch.randint(k, shape[:1] + shape[2:]), (3 * torch.rand(k, k)).softmax(1), torch.rand(k) + .5 if weighted else None
    q = smooth_targets(y, k, .3, prior=prior.double(), axis=1).double()
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(lambda x, q: -(q * x.log_softmax(1) * (1 if weight is None else weight.double().view(-1, *[1] * (x.dim() - 2)))).sum(1), x.double(), q)
        over = 1 if reduction != 'mean' else y.numel() if weight is None else weight.double()[y].sum()
        actual = loss_and_grad(smooth_cross_entropy, x, y, .3, prior=prior, weight=weight, reduction=reduction)
        assert distance(actual[0], loss if reduction == 'none' else loss.sum() / over) < 2e-6 and distance(actual[1], grad / over) < 2e-6


@by_size('few', 'loop')
@pytest.mark.parametrize('ignored', [False, True])
def test_weights_of_zero_sum(ignored, size, sized):
    "0/0, as PyTorch has it; the sum, and each row, are numbers"
    n, k = SIZES[size]
    x, y, w = torch.randn(n, k), torch.ones(n).long(), torch.rand(k)
    w[1] = 0
    if ignored: y[2] = -100
    loss, grad = loss_and_grad(smooth_cross_entropy, x, y, .2, weight=w)
    assert loss.isnan() and grad[0].isnan().all()
    for reduction in ('sum', 'none'):
        actual = loss_and_grad(smooth_cross_entropy, x, y, .2, weight=w, reduction=reduction)
        assert max(map(distance, actual, loss_and_grad(F.cross_entropy, x.double(), y, weight=w.double(), label_smoothing=.2, reduction=reduction))) < 2e-6


@pytest.mark.parametrize('shape', [(40, 30000), (3, 20000, 5)])
def test_many_classes_that_are_not_next_to_each_other(shape):
    "no more error than when they are: exponentials are not added up one by one"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3)
    x = (x.T.contiguous().T if x.dim() == 2 else x).requires_grad_()
    y = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    expected, grad = truth(x, y, 'plain', .1)
    loss = smooth_cross_entropy(x, y)
    assert abs(loss.item() - expected) <= 3e-7 * expected
    assert (torch.autograd.grad(loss, x)[0].double() - grad).norm() <= 1e-6 * grad.norm()


def test_one_row_larger_than_a_chunk(monkeypatch):
    monkeypatch.setattr(softmax, 'CHUNK_MB', 1)
    x, y = torch.randn(2, 300_000), torch.tensor([7, 299_999])
    for options in ({}, dict(weight=torch.rand(300_000))):
        expected = loss_and_grad(F.cross_entropy, x.double(), y, label_smoothing=.1, **{name: v.double() for name, v in options.items()})
        assert max(map(distance, loss_and_grad(smooth_cross_entropy, x, y, **options), expected)) < 2e-6


@pytest.mark.parametrize('target', ['index', 'ignored', 'soft', 'masked'])
@pytest.mark.parametrize('shape', [(2, 70, 3, 4), (3, 70, 5)])
def test_classes_that_lie_together(shape, target):
    "in memory, but are not the last axis, as of channels_last: every target and a factor a row, without and with chunks"
    x, y = torch.randn(shape).movedim(1, -1).contiguous().movedim(-1, 1), torch.randint(70, shape[:1] + shape[2:])
    if target == 'ignored': y.view(-1)[::4] = -100
    if target == 'masked': x[:, :3] = -INF; y.clamp_(min=3)
    if target == 'soft': y = torch.rand(shape).softmax(1)
    assert x.stride(1) == 1
    for reduction in REDUCTIONS:
        g = torch.rand(shape[:1] + shape[2:]) if reduction == 'none' else 2.
        same_as_reference(x, y, .1, 2e-6, g, prior=torch.rand(70).softmax(0), reduction=reduction)
        same_as_reference(x, y, .1, 2e-6, g, weight=torch.rand(70), spread='others', reduction=reduction) if target != 'soft' else None
