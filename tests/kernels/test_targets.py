"What q is, convention by convention: numbers worked by hand, then random ones against the float64 reference."
from itertools import product
import math

import pytest, torch
from hypothesis import given, settings, strategies as st

from fastai_smooth.kernels import smooth_cross_entropy, smooth_targets
from fastai_smooth.kernels.targets import SigmoidTarget, Smoothing, SoftmaxTarget, coefficients, eps_pair, label_axis, mean_over, smooth_labels
from reference import distance, smoothed_row, smoothed_targets

PRIOR4 = torch.tensor([.1, .2, .3, .4])
OPTIONS = 'all', 'others', 'prior', 'matrix', 'per-class', 'multi_hot', 'multi_hot others', 'soft'
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def close(q, expected): return distance(q, torch.tensor(expected)) < 1e-6


def test_smoothed_labels():
    assert close(smooth_targets(torch.tensor([0., 1.]), eps=.2), [.1, .9])
    assert close(smooth_targets(torch.tensor([1., 0., 0.]), eps=.1), [.93333333, .03333333, .03333333])
    assert close(smooth_targets(torch.tensor([1, 0]), 2, .2), [[.1, .9], [.9, .1]])
    assert close(smooth_targets(torch.tensor([0]), 3, .1), [[.93333333, .03333333, .03333333]])


def test_default_eps():
    "eps None is .1 on the softmax head, .05 on the sigmoid head"
    assert close(smooth_targets(torch.tensor([0]), 2), [[.95, .05]])
    assert close(smooth_targets(torch.tensor([1., 0.]), sigmoid=True), [.95, .05])


def test_spread_all():
    "1-eps+eps/K on the true class, eps/K on each other class"
    assert close(smooth_targets(torch.tensor([1]), 4, .2), [[.05, .85, .05, .05]])


def test_spread_others():
    "1-eps on the true class, eps/(K-1) on each other class"
    assert close(smooth_targets(torch.tensor([1]), 5, .2, spread='others'), [[.05, .8, .05, .05, .05]])


@pytest.mark.parametrize('K,eps', [(2, .1), (2, .5), (3, .2), (10, .1), (10, .9), (1000, .1)])
def test_spread_others_is_all_with_a_larger_eps(K, eps):
    "the same numbers as spread='all' with eps*K/(K-1)"
    y = torch.arange(K)
    assert distance(smooth_targets(y, K, eps, spread='others'), smooth_targets(y, K, eps * K / (K - 1))) < 1e-6


@pytest.mark.parametrize('eps,expected', [(0., [1., 0., 0.]), (.5, [.5, .25, .25]), (1., [0., .5, .5])])
def test_spread_others_over_all_of_its_range(eps, expected):
    "eps=1 leaves nothing on the true class, although eps*K/(K-1) is then above 1"
    assert close(smooth_targets(torch.tensor([0]), 3, eps, spread='others'), [expected])


def test_class_prior():
    "(1-eps)+eps*prior_y on the true class, eps*prior_k on each other class"
    assert close(smooth_targets(torch.tensor([1, 0]), 3, .2, prior=torch.tensor([.5, .3, .2])),
                 [[.1, .86, .04], [.9, .06, .04]])


def test_class_prior_soft_target():
    assert close(smooth_targets(torch.tensor([.5, .5, 0.]), eps=.2, prior=torch.tensor([.5, .3, .2])), [.5, .46, .04])


def test_class_conditional_prior():
    "row y of the matrix is what eps of the mass of class y goes to"
    S = torch.tensor([[.6, .4, 0.], [.1, .8, .1], [0., .5, .5]])
    assert close(smooth_targets(torch.tensor([0, 2]), 3, .5, prior=S), [[.8, .2, 0.], [0., .25, .75]])


def test_per_class_eps():
    "each target is smoothed by the eps of its own class"
    eps = torch.tensor([0., .3, .6])
    assert close(smooth_targets(torch.tensor([0, 1, 2]), 3, eps), [[1., 0., 0.], [.1, .8, .1], [.2, .2, .6]])


def test_multi_hot():
    "softmax targets that sum to one: (1-eps)/n + eps/K on the n positives, eps/K elsewhere"
    q = smooth_targets(torch.tensor([[1, 0, 1, 0, 0]]), 5, .1, multi_hot=True)
    assert close(q, [[.47, .02, .47, .02, .02]])


def test_multi_hot_others():
    "(1-eps)/n on the n positives, eps/(K-n) on the rest"
    q = smooth_targets(torch.tensor([[1, 0, 1, 0, 0]]), 5, .15, multi_hot=True, spread='others')
    assert close(q, [[.425, .05, .425, .05, .05]])


@pytest.mark.parametrize('spread', ['all', 'others'])
@pytest.mark.parametrize('eps', [0., .3, 1.])
def test_multi_hot_edge_rows(spread, eps):
    "no positive: uniform; all positive: 1/K everywhere; in both conventions"
    y = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    assert close(smooth_targets(y, 4, eps, multi_hot=True, spread=spread), [[.25] * 4] * 2)


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_multi_hot_any_dtype(dtype):
    y = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    assert close(smooth_targets(y.to(dtype), 4, .2, multi_hot=True), [[.45, .05, .05, .45], [.05, .85, .05, .05]])


@pytest.mark.parametrize('spread', ['all', 'others'])
@pytest.mark.parametrize('eps', [0., .1, 1.])
def test_one_class(spread, eps):
    "K=1 gives q=1"
    assert close(smooth_targets(torch.tensor([0, 0]), 1, eps, spread=spread), [[1.], [1.]])
    for hot in (0, 1):
        assert close(smooth_targets(torch.tensor([[hot]]), 1, eps, spread=spread, multi_hot=True), [[1.]])


def test_sigmoid_targets():
    "a positive is 1-eps, a negative eps, a soft y in between y*(1-2eps)+eps"
    y = torch.tensor([[1., 0., .5, .7]])
    assert close(smooth_targets(y, eps=.1, sigmoid=True), [[.9, .1, .5, .66]])
    assert close(smooth_targets(torch.tensor([[True, False]]), eps=.1, sigmoid=True), [[.9, .1]])


def test_sigmoid_prior():
    "y*(1-2eps)+2*eps*prior_k; a prior of 1/2 is no prior"
    y = torch.tensor([[1., 0., 0.], [0., 1., 1.]])
    q = smooth_targets(y, eps=.1, prior=torch.tensor([.9, .5, .1]), sigmoid=True)
    assert close(q, [[.98, .1, .02], [.18, .9, .82]])
    half = smooth_targets(y, eps=.1, prior=torch.full((3,), .5), sigmoid=True)
    assert distance(half, smooth_targets(y, eps=.1, sigmoid=True)) < 1e-6


def test_sigmoid_prior_of_images():
    "lies along the channels of images, and along `axis`; masks and events have one label"
    def q(shape, prior, **kw): return smooth_targets(torch.zeros(shape), eps=.5, prior=torch.tensor(prior), sigmoid=True, **kw)
    two = torch.tensor([.2, .6])
    assert torch.equal(q((3, 2, 4, 4), [.2, .6], num_classes=2), two.view(2, 1, 1).expand(3, 2, 4, 4))
    assert torch.equal(q((3, 4, 4), [.2], num_classes=1), two[:1].expand(3, 4, 4))
    assert torch.equal(q((3, 4, 2), [.2, .6], axis=-1, num_classes=2), two.expand(3, 4, 2))
    assert torch.equal(q((3, 2, 4), [.2, .6], axis=1), two.view(2, 1).expand(3, 2, 4))
    assert torch.equal(q((2,), [.2, .6], num_classes=2), two) and torch.equal(q((5,), [.2]), two[:1].expand(5))
    for shape, prior, axis in (((3, 2, 4, 4), [.2] * 4, None), ((3, 4, 2), [.2, .6], None), ((3, 4, 2), [.2], -1), ((5,), [.2, .6], None), ((3, 2), [.2], None)):
        with pytest.raises(ValueError, match='prior must have shape .* for .*axis'): q(shape, prior, axis=axis)
    with pytest.raises(ValueError, match='num_classes is 4, but target has 2 along axis 1'): q((3, 2, 4, 4), [.2, .6], num_classes=4)


@pytest.mark.parametrize('eps', [0., .5])
def test_sigmoid_eps_limits(eps):
    y = torch.tensor([[1., 0.]])
    assert close(smooth_targets(y, eps=eps, sigmoid=True), [[1 - eps, eps]])


def test_sigmoid_unknown_labels_stay_nan():
    q = smooth_targets(torch.tensor([[1., float('nan')]]), eps=.1, sigmoid=True)
    assert q[0, 1].isnan() and abs(q[0, 0] - .9) < 1e-6


def test_index_targets_get_a_new_last_axis():
    y = torch.randint(0, 5, (2, 3, 4))
    q = smooth_targets(y, 5, .2)
    assert q.shape == (2, 3, 4, 5) and q.dtype.is_floating_point
    assert distance(q, smoothed_targets(y, 5, .2)) < 1e-6


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_index_targets_of_any_integer_dtype(dtype):
    assert close(smooth_targets(torch.tensor([1, 0], dtype=dtype), 2, .2), [[.1, .9], [.9, .1]])


@few
@given(data=st.data(), K=st.integers(1, 7), seed=st.integers(0, 2**20), eps=st.floats(0, 1),
       option=st.sampled_from(OPTIONS))
def test_against_the_reference(data, K, seed, eps, option):
    "every convention, any shape; rows sum to one"
    gen = torch.Generator().manual_seed(seed)
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    rand = lambda *s: torch.rand(s, generator=gen, dtype=torch.float64)
    y, options = torch.randint(0, K, shape, generator=gen), {}
    if option == 'prior': options['prior'] = (3 * rand(K)).softmax(0)
    if option == 'matrix': options['prior'] = (3 * rand(K, K)).softmax(1)
    if option == 'per-class': eps = rand(K)
    if 'others' in option: options['spread'] = 'others'
    if 'multi_hot' in option: y, options['multi_hot'] = rand(*shape, K) < .4, True
    if option == 'soft': y = rand(*shape, K).softmax(-1)
    q = smooth_targets(y, K, eps, **options)
    assert q.shape == (*shape, K)
    assert distance(q, smoothed_targets(y, K, eps, **options)) < 1e-6
    assert distance(q.sum(-1), torch.ones(shape)) < 1e-6


def test_the_loss_is_the_cross_entropy_of_these_targets():
    "one q in the package: minus the sum of q times log-softmax is the loss, for every convention"
    x = torch.randn(6, 4).double()
    index, hot = torch.tensor([0, 1, 2, 3, 0, 1]), torch.rand(6, 4) < .5
    S = torch.rand(4, 4).double().softmax(1)
    for y, options in [(index, {}), (index, dict(spread='others')), (index, dict(prior=S[0])), (index, dict(prior=S)),
                       (hot, dict(multi_hot=True)), (hot, dict(multi_hot=True, spread='others')), (S[index], {})]:
        q = smooth_targets(y, 4, .3, **options).double()
        expected = -(q * x.log_softmax(1)).sum(1)
        assert distance(smooth_cross_entropy(x, y, .3, reduction='none', **options), expected) < 1e-6


@pytest.mark.parametrize('eps,sigmoid', [(-.1, False), (1.5, False), (float('nan'), False), (.6, True), (-.25, True)])
def test_eps_out_of_range(eps, sigmoid):
    with pytest.raises(ValueError, match=str(eps)): smooth_targets(torch.tensor([[1., 0.]]), eps=eps, sigmoid=sigmoid)


@pytest.mark.parametrize('sigmoid', [False, True])
def test_scalar_eps_that_needs_a_gradient(sigmoid):
    "would get none: refused, with what does get one"
    eps = torch.tensor(.1, requires_grad=True)
    with pytest.raises(ValueError, match=r'no gradient: pass eps.detach\(\)' + ('$' if sigmoid else r', or to learn it eps.expand\(3\)')):
        smooth_targets(torch.eye(3), eps=eps, sigmoid=sigmoid)
    assert torch.equal(smooth_targets(torch.eye(3), eps=eps.detach(), sigmoid=sigmoid), smooth_targets(torch.eye(3), eps=.1, sigmoid=sigmoid))


@pytest.mark.parametrize('index', [77, -7])
def test_class_index_out_of_range(index):
    with pytest.raises(IndexError, match=str(index)): smooth_targets(torch.tensor([0, 1, index]), 5, .1)


@pytest.mark.parametrize('options', [dict(spread='others', prior=torch.full((3,), 1 / 3)),
                                     dict(multi_hot=True, prior=torch.full((3,), 1 / 3)),
                                     dict(eps=torch.full((3,), .1)),
                                     dict(sigmoid=True, spread='others'), dict(sigmoid=True, multi_hot=True)])
def test_combinations_not_in_the_table(options):
    with pytest.raises(ValueError): smooth_targets(torch.tensor([[1., 0., 0.]]), 3, **options)


def test_unknown_spread():
    with pytest.raises(ValueError, match='uniform'): smooth_targets(torch.tensor([0]), 3, .1, spread='uniform')


@pytest.mark.parametrize('prior', [torch.full((4,), .25), torch.full((4, 4), .25), torch.full((3, 2), .5),
                                   torch.tensor([.5, .3, .3]), torch.tensor([1.2, -.1, -.1]),
                                   torch.tensor([[1., 0., 0.], [0., 1., 0.], [0., 0., .5]])])
def test_prior_shapes_and_values(prior):
    with pytest.raises(ValueError): smooth_targets(torch.tensor([0, 1]), 3, .1, prior=prior)


def test_soft_rows_that_do_not_sum_to_1():
    "are multi-hot ones, or counts: the error names what is for them"
    for target, came in (([[1., 0., 1.], [0., 0., 1.]], '2 at row 0'), ([[.5, .5], [.25, .25]], '0.5 at row 1'), ([[.5, .5], [math.nan, 1.]], 'nan at row 1'),
                         ([[0., 0.]], '0 at row 0'), ([[[.3, .7]], [[9., 3.]]], r'12 at row \(1, 0\)')):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            with pytest.raises(ValueError, match=f'sum to 1 along axis .*got {came}: use multi_hot=True .*LabelSmoothingBCEWithLogitsFlat'):
                smooth_targets(torch.tensor(target, dtype=dtype), eps=.05)
    with pytest.raises(ValueError, match='along axis 1, got 2 at row'): smooth_targets(torch.ones(3, 2, 4), axis=1)
    smooth_targets(torch.zeros(0, 3))
    smooth_targets(torch.ones(2, 3, device='meta'))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('K', [4, 10, 1000, 60000])
def test_soft_rows_that_were_rounded(K, dtype):
    "to half precision, by MixUp, to two decimals, or all alike: they are a distribution all the same"
    rows = torch.randn(4, K).softmax(1), torch.full((2, K), 1 / K), .3 * torch.eye(4, K) + .7 * torch.eye(4, K).flip(0)
    for soft in rows: smooth_targets(soft.to(dtype))
    smooth_targets(torch.tensor([[.33, .33, .33], [.67, .17, .17]], dtype=dtype))


def test_axis():
    "of the classes in q: the last one, unless it is given"
    y, soft = torch.randint(4, (2, 3, 5)), torch.randn(2, 3, 5, 4).softmax(-1)
    for axis, at in ((0, 0), (1, 1), (-1, 3)):
        assert torch.equal(smooth_targets(y, 4, axis=axis), smooth_targets(y, 4).movedim(-1, at))
        assert torch.equal(smooth_targets(soft.movedim(-1, at), 4, prior=PRIOR4, axis=axis), smooth_targets(soft, prior=PRIOR4).movedim(-1, at))
    for axis in (4, -5):
        with pytest.raises(IndexError, match=f'axis {axis} '): smooth_targets(y, 4, axis=axis)


def test_inputs_never_modified():
    y, eps, prior = torch.tensor([[1., 0., 1.]]), torch.tensor([.1, .2, .3]), torch.tensor([.2, .3, .5])
    for target, e, options in [(y / 2, .1, {}), (y, .1, dict(multi_hot=True)), (y, .1, dict(sigmoid=True)),
                               (torch.tensor([0, 2]), .1, dict(prior=prior)), (torch.tensor([0, 2]), eps, {})]:
        kept = [t.clone() for t in (target, eps, prior)]
        smooth_targets(target, 3, e, **options)
        assert all(torch.equal(a, b) and a._version == 0 for a, b in zip((target, eps, prior), kept))


def test_meta_tensors_have_a_shape_and_no_values():
    q = smooth_targets(torch.zeros(4, dtype=torch.long, device='meta'), 3)
    assert q.shape == (4, 3) and q.device.type == 'meta'


def test_label_axis():
    "One rule for where the labels of a sigmoid loss are"
    assert [label_axis(n) for n in (1, 2, 3, 4, 5)] == [None, 1, None, 1, 1]
    assert label_axis(3, -1) == label_axis(3, 2) == 2 and label_axis(4, -1) == 3 and label_axis(1, 0) == 0
    for axis in (2, -3):
        with pytest.raises(IndexError, match=f'axis {axis} '): label_axis(2, axis)


def test_one_eps_a_class_may_be_1():
    "and 0: both ends of the range are in it"
    q = smooth_targets(torch.tensor([0, 1]), 2, torch.tensor([1., 0.]))
    assert q.tolist() == [[.5, .5], [0, 1]]


# ---------------------------------------------------------------- coefficients: the one formula of q

EPS = 0., 1e-8, .1, .5, 1.


def rows_of_classes(K):
    "(the positives, the classes that are not masked, the prior) of a row, as lists: all of them for so few classes"
    for hot, unmasked in product(product([0, 1], repeat=K), product([False, True], repeat=K)):
        if not any(unmasked): continue
        yield hot, unmasked, None
        if sum(hot) == 1: yield hot, unmasked, [(k + 1.) / sum(range(1, K + 1)) for k in range(K)]


def coefficients_of(hot, unmasked, prior, eps, others, kind=float):
    "What they are called with for this row."
    present, left = sum(h and m for h, m in zip(hot, unmasked)), sum(unmasked)
    mass = None if prior is None else sum(p for p, m in zip(prior, unmasked) if m)
    return coefficients(kind(eps), kind(left), kind(sum(hot)), kind(present), None if mass is None else kind(mass), others)


@pytest.mark.parametrize('others', [False, True])
@pytest.mark.parametrize('K', [1, 2, 3, 4])
def test_coefficients(K, others):
    "own * y + each * u is the q of the reference, with any positives, any classes masked, and any prior"
    for eps, (hot, unmasked, prior) in product(EPS, rows_of_classes(K)):
        if others and prior: continue
        own, each, own_masked, uniform = coefficients_of(hot, unmasked, prior, eps, others)
        assert prior or uniform is False
        q = [own * h + each * (1 if prior is None or uniform else p) if m else own_masked * h for h, m, p in zip(hot, unmasked, prior or hot)]
        if K > 1 or not sum(hot): expected = smoothed_row(list(map(float, hot)), K, eps, None if prior is None else torch.tensor(prior).double(), 'others' if others else 'all',
                                                          prior is None, unmasked)
        else: expected = [1.]
        if 0 < sum(hot) == K > 1 and not all(unmasked): continue  # all of them positive, some of those masked: the loss is inf
        assert q == pytest.approx(expected, abs=1e-6 if prior else 1e-12), (hot, unmasked, prior, eps)


@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-15), (torch.float32, 3e-7)])
def test_coefficients_of_tensors(dtype, tolerance):
    "numbers, scalars and a value a row give the same: one formula serves them all"
    for others in (False, True):
        cases = [(eps, *row) for eps in EPS for row in rows_of_classes(3) if not (others and row[2])]
        for prior in (False, True):
            some = [c for c in cases if bool(c[3]) == prior]
            if not some: continue
            expected = [coefficients_of(*c[1:], c[0], others) for c in some]
            for case, numbers in zip(some, expected):
                scalars = coefficients_of(*case[1:], case[0], others, lambda v: torch.tensor(v, dtype=dtype))
                assert all(isinstance(v, torch.Tensor) and v.dtype == dtype for v in scalars[:3])
                assert [float(v) for v in scalars[:3]] == pytest.approx([float(v) for v in numbers[:3]], abs=tolerance)
            column = lambda f: torch.tensor([float(f(c)) for c in some], dtype=dtype)
            mass = column(lambda c: sum(p for p, m in zip(c[3], c[2]) if m)) if prior else None
            rows = coefficients(column(lambda c: c[0]), column(lambda c: sum(c[2])), column(lambda c: sum(c[1])), column(lambda c: sum(h and m for h, m in zip(c[1], c[2]))), mass, others)
            for name in ('own', 'each', 'own_masked'):
                assert getattr(rows, name).tolist() == pytest.approx([float(getattr(e, name)) for e in expected], abs=tolerance), name
            if prior: assert rows.uniform.tolist() == [bool(e.uniform) for e in expected]


def test_coefficients_at_the_ends():
    "no positive: uniform; all positive, one class: nothing is moved; the prior's mass all masked: uniform over what is left"
    assert coefficients(.1, 4, 0, 0)[:3] == (0, .25, 0) and coefficients(.1, 4, 0, 0, others=True)[:3] == (0, .25, 0)
    assert coefficients(.4, 4, 4, 4, others=True)[:3] == (.25, 0, .25)
    assert coefficients(.4, 1, others=True)[:3] == (1, 0, 1) and sum(coefficients(.4, 1)[:2]) == 1
    own, each, _, uniform = coefficients(.4, 2, mass=0.)
    assert uniform and own == .6 and each == .2
    own, each, _, uniform = coefficients(.4, 2, mass=.5)
    assert not uniform and own == .6 and each == .8


def test_mean_over():
    "the weights of the rows; 1 where there is no row, nan where the rows weigh nothing"
    assert mean_over(6, 6) == 6 and mean_over(0, 0) == 1
    for weight, rows, expected in ((4.5, 3, 4.5), (0., 0, 1.), (-2., 2, -2.)):
        assert mean_over(torch.tensor(weight), rows) == mean_over(torch.tensor(weight), torch.tensor(rows)) == expected
    assert mean_over(torch.tensor(0.), 3).isnan() and mean_over(torch.tensor(0.), torch.tensor(3)).isnan()


def test_what_a_mean_is_over():
    "rows of dense targets; of class indices those that are not ignored, by the weights of their classes"
    x, y, w, ignored = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]]), torch.tensor([1., 2., 4.]), torch.tensor([[True] + [False] * 3, [False] * 4])
    over = lambda target, is_index=True, **kw: float(SoftmaxTarget(target, is_index, Smoothing(), 1, **kw).denominator(x))
    assert over(y) == 8 and over(y, ignored=ignored) == 7 and over(y, weight=w) == 17 and over(y, weight=w, ignored=ignored) == 16
    assert over(x, False, weight=w) == 8 and over(y, weight=w, ignored=torch.ones_like(ignored)) == over(y, ignored=torch.ones_like(ignored)) == 1
    assert math.isnan(over(y, weight=torch.zeros(3)))


def test_a_chunk_of_a_target():
    "has what is a value a row, or a value a logit, cut alike; options stay whole"
    index, dense, ignored = torch.arange(12).view(3, 4), torch.arange(24.).view(3, 2, 4), torch.arange(12).view(3, 4) > 5
    chunk = slice(1, 3), slice(None), slice(0, 2)
    w = torch.tensor([1., 2.])
    t = SoftmaxTarget(index, True, Smoothing(), 1, w, ignored=ignored).chunk(chunk)
    assert torch.equal(t.target, index[1:3, :2]) and torch.equal(t.ignored, ignored[1:3, :2]) and t.weight is w and t.invalid is None
    assert torch.equal(SoftmaxTarget(dense, False, Smoothing(), 1).chunk(chunk).target, dense[1:3, :, :2])
    s = SigmoidTarget(dense, .1, dense + 1, weight=dense + 2).chunk(chunk)
    assert torch.equal(s.target, dense[1:3, :, :2]) and s.e0 == .1 and torch.equal(s.e1, s.target + 1) and torch.equal(s.weight, s.target + 2) and s.pos_weight is None
    for whole in (t, s): assert whole.chunk(...) is whole


def test_eps_pair():
    "q = e0 + (1 - e0 - e1) y: a negative becomes e0, a positive 1 - e1; a prior shares out twice eps"
    assert eps_pair(.1) == (.1, .1) and eps_pair(.125, .25) == (.0625, .1875)
    assert smooth_labels(torch.tensor([0., 1., .5]), .125, .25).tolist() == [.125, .75, .4375]
