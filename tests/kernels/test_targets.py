"What q is, convention by convention: numbers worked by hand, then random ones against the float64 reference."
from itertools import product
import math

import pytest, torch
from hypothesis import given, settings, strategies as st

from fastai_smooth.kernels import smooth_targets
from fastai_smooth.kernels.targets import SigmoidTarget, Smoothing, SoftmaxTarget, coefficients, eps_pair, label_axis, mean_over, smooth_labels
from reference import distance, smoothed_row, smoothed_targets

PRIOR, S = torch.tensor([.5, .3, .2]), torch.tensor([[.6, .4, 0.], [.1, .8, .1], [0., .5, .5]])
HOT = [[1, 0, 1, 0, 0]]

def close(q, expected): return distance(q, torch.as_tensor(expected)) < 1e-6

@pytest.mark.parametrize('target,options,expected', [
    ([0., 1.], dict(eps=.2), [.1, .9]), ([1., 0., 0.], dict(eps=.1), [.93333333, .03333333, .03333333]),                  # SPEC's
    ([0], dict(num_classes=2), [[.95, .05]]), ([1., 0.], dict(sigmoid=True), [.95, .05]),                                 # eps None is .1, and .05
    ([1], dict(num_classes=4, eps=.2), [[.05, .85, .05, .05]]),                                                           # 1-eps+eps/K and eps/K
    ([1], dict(num_classes=5, eps=.2, spread='others'), [[.05, .8, .05, .05, .05]]),                                      # 1-eps and eps/(K-1)
    ([0], dict(num_classes=3, eps=1., spread='others'), [[0., .5, .5]]), ([0], dict(num_classes=3, eps=0., spread='others'), [[1., 0., 0.]]),
    ([1, 0], dict(num_classes=3, eps=.2, prior=PRIOR), [[.1, .86, .04], [.9, .06, .04]]),                                 # (1-eps) y + eps prior
    ([.5, .5, 0.], dict(eps=.2, prior=PRIOR), [.5, .46, .04]),
    ([0, 2], dict(num_classes=3, eps=.5, prior=S), [[.8, .2, 0.], [0., .25, .75]]),                                       # row y of the matrix
    ([0], dict(num_classes=2, eps=.5, prior=torch.tensor([0, 1])), [[.5, .5]]),                                           # of integers
    ([0, 1, 2], dict(num_classes=3, eps=torch.tensor([0., .3, 1.])), [[1., 0., 0.], [.1, .8, .1], [1/3, 1/3, 1/3]]),      # eps of the target's class
    (HOT, dict(eps=.1, multi_hot=True), [[.47, .02, .47, .02, .02]]),                                                     # (1-eps)/n + eps/K and eps/K
    (HOT, dict(eps=.15, multi_hot=True, spread='others'), [[.425, .05, .425, .05, .05]]),                                 # (1-eps)/n and eps/(K-n)
    ([[1., 0., .5, .7]], dict(eps=.1, sigmoid=True), [[.9, .1, .5, .66]]),                                                # y (1-2eps) + eps
    ([[True, False]], dict(eps=.5, sigmoid=True), [[.5, .5]]), ([[1., math.nan]], dict(eps=.1, sigmoid=True), [[.9, math.nan]]),   # unknown stays nan
    ([[1., 0., 0.]], dict(eps=.1, sigmoid=True, prior=torch.tensor([.9, .5, .1])), [[.98, .1, .02]]),                     # y (1-2eps) + 2 eps prior
    ([[1, 0]], dict(eps=(.1, 0.), sigmoid=True), [[1., .1]]), ([[1., 0., .5, math.nan]], dict(eps=[.2, .1], sigmoid=True), [[.9, .2, .55, math.nan]]),   # e0, 1-e1
    ([[True, False]], dict(eps=(1, 0), sigmoid=True), [[1., 1.]]), ([[1, 0]], dict(eps=(.25, .75), sigmoid=True), [[.25, .25]]),
    ([[1., 0.], [0., 1.], [.5, .5]], dict(eps=.25, sigmoid=True, prior=torch.tensor([[.2, .4], [.6, .8]])), [[.8, .2], [.1, .9], [.45, .55]]),   # of negatives, of positives
    ([1, 0], dict(eps=.25, sigmoid=True, prior=torch.tensor([[.2, .4], [.6, .8]])), [.8, .2]),
    ([[1, 0]], dict(eps=.5, sigmoid=True, prior=torch.tensor([[0, 0], [1, 1]])), [[1., 0.]])])                            # of integers
def test_by_hand(target, options, expected): assert close(smooth_targets(torch.tensor(target), **options), expected)

@pytest.mark.parametrize('K,eps', [(2, .1), (2, .5), (3, .2), (10, .9), (1000, .1)])
def test_spread_others_is_all_with_a_larger_eps(K, eps):
    y = torch.arange(K)
    assert distance(smooth_targets(y, K, eps, spread='others'), smooth_targets(y, K, eps * K / (K - 1))) < 1e-6

@pytest.mark.parametrize('spread', ['all', 'others'])
@pytest.mark.parametrize('eps', [0., .3, 1.])
def test_edge_rows(spread, eps):
    "No positive: uniform; all positive: 1/K everywhere; one class: 1."
    assert close(smooth_targets([[0, 0, 0, 0], [1, 1, 1, 1]], 4, eps, multi_hot=True, spread=spread), [[.25] * 4] * 2)
    assert close(smooth_targets([0, 0], 1, eps, spread=spread), [[1.], [1.]])
    for hot in (0, 1): assert close(smooth_targets([[hot]], 1, eps, spread=spread, multi_hot=True), [[1.]])

@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64])
def test_any_dtype(dtype):
    "Class indices and labels of integers get the default dtype, floating labels keep theirs; and the input is left as it was."
    hot, index = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]).to(dtype), torch.tensor([1, 0]).to(dtype)
    q = smooth_targets(hot, 4, .2, multi_hot=True)
    assert q.dtype == (dtype if dtype.is_floating_point else torch.float32) and distance(q, torch.tensor([[.45, .05, .05, .45], [.05, .85, .05, .05]])) < 1e-3
    if not dtype.is_floating_point and dtype != torch.bool: assert close(smooth_targets(index, 2, .2), [[.1, .9], [.9, .1]])
    assert hot._version == index._version == 0

@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data(), K=st.integers(1, 7), seed=st.integers(0, 2**20), eps=st.floats(0, 1),
       option=st.sampled_from(['all', 'others', 'prior', 'matrix', 'per-class', 'multi_hot', 'multi_hot others', 'soft']))
def test_against_the_reference(data, K, seed, eps, option):
    "Every convention, any shape; rows sum to one."
    gen = torch.Generator().manual_seed(seed)
    shape = tuple(data.draw(st.lists(st.integers(1, 3), max_size=3)))
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

def test_sigmoid_prior_lies_along_the_labels():
    "Along the channels of images, and along `axis`; masks and events have one label. A prior of 1/2 is no prior."
    def q(shape, prior, **kw): return smooth_targets(torch.zeros(shape), eps=.5, prior=torch.tensor(prior), sigmoid=True, **kw)
    two = torch.tensor([.2, .6])
    assert torch.equal(q((3, 2, 4, 4), [.2, .6], num_classes=2), two.view(2, 1, 1).expand(3, 2, 4, 4))
    assert torch.equal(q((3, 4, 4), [.2], num_classes=1), two[:1].expand(3, 4, 4))
    assert torch.equal(q((3, 4, 2), [.2, .6], axis=-1, num_classes=2), two.expand(3, 4, 2))
    assert torch.equal(q((3, 2, 4), [.2, .6], axis=1), two.view(2, 1).expand(3, 2, 4))
    assert torch.equal(q((2,), [.2, .6], num_classes=2), two) and torch.equal(q((5,), [.2]), two[:1].expand(5))
    for shape, prior, axis in (((3, 2, 4, 4), [.2] * 4, None), ((3, 4, 2), [.2, .6], None), ((3, 4, 2), [.2], -1), ((5,), [.2, .6], None)):
        with pytest.raises(ValueError, match='prior must have shape .* for .*axis'): q(shape, prior, axis=axis)
    with pytest.raises(ValueError, match='num_classes is 4, but target has 2 along axis 1'): q((3, 2, 4, 4), [.2, .6], num_classes=4)
    assert distance(q((3, 2), [.5, .5]), smooth_targets(torch.zeros(3, 2), eps=.5, sigmoid=True)) < 1e-6
    for shape, rows, kw in (((3, 2, 4, 4), [[.2, .6], [.7, .9]], {}), ((3, 4, 2), [[.2, .6], [.7, .9]], dict(axis=-1)), ((3, 4, 4), [[.2], [.7]], {}), ((5,), [[.2], [.7]], {})):
        assert torch.equal(q(shape, rows, **kw), q(shape, rows[0], **kw))   # a row of negatives and one of positives lie as one does
        assert torch.equal(smooth_targets(torch.ones(shape), eps=.5, prior=torch.tensor(rows), sigmoid=True, **kw), q(shape, rows[1], **kw))

def test_axis():
    "Of the classes in q: the last one, unless it is given."
    y, soft, prior = torch.randint(3, (2, 3, 5)), torch.randn(2, 3, 5, 3).softmax(-1), PRIOR
    for axis, at in ((0, 0), (1, 1), (-1, 3)):
        assert torch.equal(smooth_targets(y, 3, axis=axis), smooth_targets(y, 3).movedim(-1, at))
        assert torch.equal(smooth_targets(soft.movedim(-1, at), 3, prior=prior, axis=axis), smooth_targets(soft, prior=prior).movedim(-1, at))
    for axis in (4, -5):
        with pytest.raises(IndexError, match=f'axis {axis} '): smooth_targets(y, 3, axis=axis)

def test_label_axis():
    "One rule for where the labels of a sigmoid loss are."
    assert [label_axis(n) for n in (1, 2, 3, 4, 5)] == [None, 1, None, 1, 1]
    assert label_axis(3, -1) == label_axis(3, 2) == 2 and label_axis(4, -1) == 3 and label_axis(1, 0) == 0
    for axis in (2, -3):
        with pytest.raises(IndexError, match=f'axis {axis} '): label_axis(2, axis)

# ---------------------------------------------------------------- coefficients: the one formula of q

def rows_of_classes(K):
    "(the positives, the classes that are not masked, the prior) of a row, as lists: all of them for so few classes."
    for hot, unmasked in product(product([0, 1], repeat=K), product([False, True], repeat=K)):
        if not any(unmasked): continue
        yield hot, unmasked, None
        if sum(hot) == 1: yield hot, unmasked, [(k + 1.) / sum(range(1, K + 1)) for k in range(K)]

def arguments(hot, unmasked, prior):
    "What `coefficients` is called with for this row, but for eps."
    mass = None if prior is None else sum(p for p, m in zip(prior, unmasked) if m)
    return float(sum(unmasked)), float(sum(hot)), float(sum(h and m for h, m in zip(hot, unmasked))), mass

@pytest.mark.parametrize('others', [False, True])
@pytest.mark.parametrize('eps', [0., 1e-8, .1, 1.])
def test_coefficients(eps, others):
    "own * y + each * u is the q of the reference, with any positives, any classes masked, and any prior."
    for K in (1, 2, 3, 4):
        for hot, unmasked, prior in rows_of_classes(K):
            if others and prior or 0 < sum(hot) == K > 1 and not all(unmasked): continue   # all positive, some of those masked: the loss is inf
            own, each, own_masked, uniform = coefficients(eps, *arguments(hot, unmasked, prior), others)
            assert prior or uniform is False
            q = [own * h + each * (1 if prior is None or uniform else p) if m else own_masked * h for h, m, p in zip(hot, unmasked, prior or hot)]
            expected = smoothed_row([*map(float, hot)], K, eps, None if prior is None else torch.tensor(prior).double(), 'others' if others else 'all',
                                    prior is None, unmasked) if K > 1 or not sum(hot) else [1.]
            assert q == pytest.approx(expected, abs=1e-6 if prior else 1e-12), (hot, unmasked, prior, eps)

@pytest.mark.parametrize('prior,others', [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-15), (torch.float32, 3e-7)])
def test_coefficients_of_tensors(dtype, tolerance, prior, others):
    "Numbers, scalars and a value a row give the same: one formula serves them all."
    cases = [(eps, *arguments(*row)) for eps in (0., .1, 1.) for row in rows_of_classes(3) if bool(row[2]) == prior]
    tensors = lambda values: [None if v[0] is None else torch.tensor(v, dtype=dtype) for v in values]
    expected = torch.tensor([[*map(float, coefficients(*case, others))] for case in cases], dtype=torch.float64)
    rows = coefficients(*tensors([*zip(*cases)]), others)
    scalars = [coefficients(*(None if v is None else torch.tensor(v, dtype=dtype) for v in case), others) for case in cases]
    for i, name in enumerate(['own', 'each', 'own_masked', 'uniform'][:4 if prior else 3]):
        for actual in (getattr(rows, name), torch.stack([getattr(o, name) for o in scalars])):
            assert actual.dtype == (torch.bool if name == 'uniform' else dtype) and (actual.double() - expected[:, i]).abs().max() <= tolerance

def test_coefficients_at_the_ends():
    "No positive: uniform; all positive, one class: nothing is moved; the prior's mass all masked: uniform over what is left."
    assert coefficients(.1, 4, 0, 0)[:3] == (0, .25, 0) and coefficients(.1, 4, 0, 0, others=True)[:3] == (0, .25, 0)
    assert coefficients(.4, 4, 4, 4, others=True)[:3] == (.25, 0, .25)
    assert coefficients(.4, 1, others=True)[:3] == (1, 0, 1) and sum(coefficients(.4, 1)[:2]) == 1
    assert coefficients(.4, 2, mass=0.) == (.6, .2, .6, True) and coefficients(.4, 2, mass=.5) == (.6, .8, .6, False)

def test_mean_over():
    "The weights of the rows; 1 where there is no row, nan where the rows weigh nothing."
    assert mean_over(6, 6) == 6 and mean_over(0, 0) == 1
    for weight, rows, expected in ((4.5, 3, 4.5), (0., 0, 1.), (-2., 2, -2.)):
        assert mean_over(torch.tensor(weight), rows) == mean_over(torch.tensor(weight), torch.tensor(rows)) == expected
    assert mean_over(torch.tensor(0.), 3).isnan() and mean_over(torch.tensor(0.), torch.tensor(3)).isnan()

def test_what_a_mean_is_over():
    "Rows of dense targets; of class indices those that are not ignored, by the weights of their classes."
    x, y, w = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]]), torch.tensor([1., 2., 4.])
    ignored = torch.arange(8).view(2, 4) == 0
    over = lambda target, is_index=True, **kw: float(SoftmaxTarget(target, is_index, Smoothing(), 1, **kw).denominator(x))
    assert over(y) == 8 and over(y, ignored=ignored) == 7 and over(y, weight=w) == 17 and over(y, weight=w, ignored=ignored) == 16
    assert over(x, False, weight=w) == 8 and over(y, weight=w, ignored=torch.ones_like(ignored)) == over(y, ignored=torch.ones_like(ignored)) == 1
    assert math.isnan(over(y, weight=torch.zeros(3)))

def test_a_chunk_of_a_target():
    "Has what is a value a row, or a value a logit, cut alike; options stay whole."
    index, dense, w = torch.arange(12).view(3, 4), torch.arange(24.).view(3, 2, 4), torch.tensor([1., 2.])
    chunk = slice(1, 3), slice(None), slice(0, 2)
    t = SoftmaxTarget(index, True, Smoothing(), 1, w, ignored=index > 5).chunk(chunk)
    assert torch.equal(t.target, index[1:3, :2]) and torch.equal(t.ignored, t.target > 5) and t.weight is w and t.invalid is None
    assert torch.equal(SoftmaxTarget(dense, False, Smoothing(), 1).chunk(chunk).target, dense[1:3, :, :2])
    s = SigmoidTarget(dense, .1, dense + 1, weight=dense + 2).chunk(chunk)
    assert torch.equal(s.target, dense[1:3, :, :2]) and s.e0 == .1 and torch.equal(s.e1, s.target + 1)
    assert torch.equal(s.weight, s.target + 2) and s.pos_weight is None
    for whole in (t, s): assert whole.chunk(...) is whole

def test_eps_pair():
    "q = e0 + (1 - e0 - e1) y: a negative becomes e0, a positive 1 - e1; a prior, one of negatives and one of positives, is gone to by twice eps."
    assert eps_pair(.1) == (.1, .1) and eps_pair((.1, .2)) == (.1, .2) and eps_pair(.125, (.25, .75)) == (.0625, .0625)
    assert smooth_labels(torch.tensor([0., 1., .5]), .125, .25).tolist() == [.125, .75, .4375]
