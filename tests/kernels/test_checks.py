"What is wrong is said by name and value, before anything is computed: each check by its words, then all arguments of the functions, bad and odd."
from functools import partial
from itertools import product
import warnings

import numpy as np, pytest, torch
from hypothesis import strategies as st

import fuzz
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy, smooth_targets
from fastai_smooth.kernels.checks import _warn_flip, check_factors, check_number, check_prior, check_whole
from fastai_smooth.losses import LabelSmoothingBCEWithLogits, LabelSmoothingCrossEntropy
from fuzz import BAD_BACKEND, BAD_EPS, BAD_LABEL_EPS, BAD_REDUCTION, BAD_SPREAD, FLOATS, HALF, INTEGERS, LABELS, NAN, NOT_TENSORS, Row, no_values
from .cases import lay_out
from reference import distance, loss_and_grad

X, Y, HALVES = torch.zeros(2, 3), torch.tensor([0, 2]), torch.full((5,), .5)
XY, XL = dict(input=X, target=Y), dict(input=X, target=torch.ones(2, 3))

@pytest.mark.parametrize('f,args,error,match', [
    (smooth_cross_entropy, XY | dict(eps=1.25), ValueError, r'eps must be in \[0, 1\], got 1.25$'),
    (smooth_cross_entropy, XY | dict(eps=(.1, 0.)), TypeError, r'a Tensor\[K\] \(a pair is for multi-label losses\), got \(0.1, 0.0\)'),
    (smooth_cross_entropy, XY | dict(eps=torch.tensor([.1, 1.25, .2])), ValueError, r'every eps must be in \[0, 1\], got \[0.1.*, 1.25, '),
    (smooth_bce, XL | dict(eps=.625), ValueError, r'eps must be in \[0, 0.5\], got 0.625 \(labels: .* at .5 they are the same'),
    (smooth_bce, XL | dict(eps=HALVES), ValueError, r'one eps a class is for the softmax loss'),
    (smooth_bce, XL | dict(eps=(.7, .5)), ValueError, r'eps=\(0.7, 0.5\) makes a negative 0.7 and a positive 0.5, which is less: the sum is 1 at most'),
    (smooth_bce, XL | dict(eps=(.1, -.25)), ValueError, r'eps as a pair .* must be in \[0, 1\], got \(0.1, -0.25\)'),
    (smooth_bce, XL | dict(eps=(.1, .2, .3)), ValueError, r'eps .* a number, or a pair of numbers \(of negatives, of positives\), got \(0.1, 0.2, 0.3\)'),
    (smooth_bce, XL | dict(eps=(.1, '.2')), TypeError, r"eps must be a pair of numbers \(of negatives, of positives\), got '.2'"),
    (smooth_bce, XL | dict(eps=(.1, 0.), prior=torch.ones(3)), ValueError, r'eps=\(0.1, 0\) takes no prior: .* take one eps and a prior \[2,K\]'),
    (smooth_targets, dict(target=torch.ones(2, 3), sigmoid=True, eps=(.7, .5)), ValueError, 'the sum is 1 at most'),
    (smooth_bce, XL | dict(prior=torch.ones(3, 3)), ValueError, r'prior must have shape \(3,\) or \(2, 3\) for \(2, 3\) .*, got \(3, 3\)'),
    (smooth_cross_entropy, XY | dict(eps=torch.full((5,), .1)), ValueError, r'eps must have shape \(3,\) for 3 classes, got \(5,\)'),
    (smooth_cross_entropy, XY | dict(prior=torch.full((5, 3), 1 / 3)), ValueError, r'prior must have shape \(3, 3\) for 3 classes, got \(5, 3\)'),
    (smooth_cross_entropy, XY | dict(weight=torch.ones(1, 3)), ValueError, r'weight must have shape \(3,\) for 3 classes, got \(1, 3\)'),
    (smooth_cross_entropy, XY | dict(target=torch.tensor([0, -100]), ignore_index=255), IndexError, r'class index -100 at row 1 is out of range for 3 classes; ignore'),
    (smooth_cross_entropy, XY | dict(target=torch.tensor([0, 255])), IndexError, r'class index 255 at row 1 .*; ignore_index=255 leaves such rows out'),
    (smooth_cross_entropy, dict(input=X[None], target=torch.tensor([[0, 1, 7]])), IndexError, r'class index 7 at row \(0, 2\) is out of range for 2 classes$'),
    (smooth_targets, dict(target=torch.tensor([0, 1, -7]), num_classes=5), IndexError, 'class index -7 at row 2 is out of range for 5 classes'),
    (smooth_cross_entropy, XY | dict(target=torch.ones(2, 3).long()), ValueError, 'multi_hot=True .*smooth_binary_cross_entropy_with_logits'),
    (smooth_bce, XY, ValueError, r'looks like class indices: those are for smooth_cross_entropy'),
    (smooth_bce, dict(input=torch.zeros(2, 3, 4, 4), target=torch.zeros(2, 4, 4).long()), ValueError, 'those are for smooth_cross_entropy'),
    (smooth_bce, XL | dict(target=torch.rand(2, 1)), ValueError, r'target must be shaped like input, \(2, 3\), got \(2, 1\)'),
    (smooth_bce, XL | dict(prior=HALVES), ValueError, r'prior must have shape \(3,\) or \(2, 3\) for \(2, 3\) \(labels along axis 1\), got \(5,\)'),
    (smooth_bce, dict(input=torch.zeros(2, 4, 5), target=torch.ones(2, 4, 5), prior=HALVES), ValueError, r'\(1,\) or \(2, 1\) for \(2, 4, 5\) \(one label; axis= says where'),
    (smooth_bce, XL | dict(axis=-3), IndexError, 'axis -3 is out of range'),
    (smooth_bce, XL | dict(weight=HALVES), ValueError, r"weight must broadcast to input's shape \(2, 3\), got \(5,\)"),
    (smooth_cross_entropy, dict(input=torch.zeros(3, 4, 5), target=torch.zeros(3, 4).long()), ValueError, r'got \(3, 4\): are classes along another axis\? axis=2 fits'),
    (smooth_cross_entropy, XY | dict(target=Y.float()), ValueError, r'floating point targets must be shaped like input.*class indices are integers: target.long\(\)'),
    (smooth_targets, dict(target=torch.tensor([0]), num_classes=2, prior=torch.tensor([1, 1])), ValueError, '^prior must sum to 1, got 2; divide counts by their sum'),
    (smooth_targets, dict(target=torch.tensor([0]), num_classes=2, prior=torch.tensor([[.5, .5], [1, 1]])), ValueError, '^every row of prior must sum to 1, got 2'),
    (smooth_targets, dict(target=torch.ones(2, 3), sigmoid=True, spread='others'), ValueError, 'sigmoid=True smooths each label alone'),
    (smooth_targets, dict(target=torch.tensor([True])), TypeError, 'bool targets are multi-hot: pass multi_hot=True or sigmoid=True'),
    (smooth_targets, dict(target=torch.tensor([1])), ValueError, 'class indices need num_classes'),
    (partial(check_whole, 'n', low=1, high=4), dict(v=5), ValueError, 'n must be a whole number of 1 or more, 4 at most, got 5'),
    (partial(check_number, 'x', low=0, high=1, strictly=True), dict(v=1), ValueError, r'x must be in \(0, 1\), got 1'),
    (check_prior, dict(prior=torch.tensor([.5, 1.5]), sigmoid=True), ValueError, r'prior must be probabilities in \[0, 1\], got 1.5'),
    *[(check_prior, dict(prior=torch.ones(shape), sigmoid=True), ValueError, r'prior must be \[K\], or \[2,K\] with a row') for shape in ((), (2, 2, 2))],
    (check_prior, dict(prior=torch.ones(3, 4), sigmoid=True), ValueError, r'prior must be \[K\], or \[2,K\] with a row of negatives and one of positives, got .*\(3, 4\)'),
    (check_prior, dict(prior=torch.tensor([[0., .5], [1., .25]]), sigmoid=True), ValueError, r'prior \[2,K\] has negatives in its first row.* got 0.5 and 0.25 for label 1'),
    (check_prior, dict(prior=torch.tensor([.5, .75, -.25])), ValueError, 'prior must not be negative or nan, got -0.25'),
    (check_factors, dict(weight=torch.tensor([1., NAN])), ValueError, 'weight must be finite and not negative, got nan'),
    (check_factors, dict(weight=torch.tensor([1e-31])), ValueError, r'weight must have its largest value between 1e-30 and 1e30 \(or be 0\), got 1e-31: scale it')])
def test_says_what_is_wrong(f, args, error, match):
    with pytest.raises(error, match=match): f(**args)

def test_ends_of_ranges_are_taken():
    assert check_whole('n', 4, 1, 4) == 4 and check_whole('n', 1, 1, 4) == 1 and check_number('x', 1, 0, 1) is None
    check_factors(weight=torch.zeros(2), pos_weight=None), check_prior(torch.tensor([0., 1.])), check_prior(torch.tensor([0., 1., 1.]), sigmoid=True)
    assert smooth_targets(torch.tensor([0, 1]), 2, torch.tensor([1., 0.])).tolist() == [[.5, .5], [0, 1]]
    for eps in (0, 1, torch.tensor(1.)): smooth_cross_entropy(X, Y, eps)
    for eps in (0, .5, (0, 0), (1, 0), (0., 1.), [.1, .9], (torch.tensor(.75), .25), np.array([.75, .25]), np.array(.5)): smooth_bce(X, X, eps)
    check_prior(torch.tensor([[0., .5, 1.], [0., 1., 1.]]), sigmoid=True)

@pytest.mark.parametrize('f,together', [*product([smooth_cross_entropy, smooth_targets], ['others prior', 'others matrix', 'hot prior', 'hot matrix', 'soft eps', 'soft matrix'])])
def test_options_that_do_not_go_together(f, together):
    with_x = dict(input=X) if f is smooth_cross_entropy else dict(num_classes=3)
    kind, option = together.split()
    value = {'prior': torch.full((3,), 1 / 3), 'matrix': torch.eye(3), 'eps': torch.full((3,), .1)}[option]
    target = Y if kind == 'others' else torch.tensor([[1., 0, 0], [0, 1, 0]])
    options = dict(others=dict(spread='others'), hot=dict(multi_hot=True), soft={})[kind] | {'prior' if option == 'matrix' else option: value}
    with pytest.raises(ValueError, match='prior' if option != 'eps' else 'eps'): f(target=target, **with_x, **options)

@pytest.mark.parametrize('dtype', FLOATS + HALF, ids=str)
def test_soft_rows_that_do_not_sum_to_1(dtype):
    "Multi-hot ones, or counts: the error names what is for them. What was rounded, or made by MixUp, is a distribution all the same."
    for target, came in (([[1., 0., 1.], [0., 0., 1.]], '2 at row 0'), ([[.5, .5], [.25, .25]], '0.5 at row 1'), ([[.5, .5], [NAN, 1.]], 'nan at row 1'),
                         ([[[.3, .7]], [[9., 3.]]], r'12 at row \(1, 0\)')):
        target = torch.tensor(target, dtype=dtype)
        for f in (smooth_targets, lambda y: smooth_cross_entropy(torch.zeros(y.shape), y, axis=-1)):
            with pytest.raises(ValueError, match=f'sum to 1 along axis .*got {came}: use multi_hot=True .*LabelSmoothingBCEWithLogitsFlat'): f(target)
    with pytest.raises(ValueError, match='along axis 1, got 2 at row'): smooth_targets(torch.ones(3, 2, 4), axis=1)
    for K in (4, 1000, 60000):
        for soft in (torch.randn(4, K).softmax(1), torch.full((2, K), 1 / K), .3 * torch.eye(4, K) + .7 * torch.eye(4, K).flip(0)): smooth_targets(soft.to(dtype))
    smooth_targets(torch.tensor([[.33, .33, .33], [.67, .17, .17]], dtype=dtype)), smooth_targets(torch.zeros(0, 3, dtype=dtype))

def test_an_eps_of_no_dimensions_gets_no_gradient():
    "So it is refused, with what does get one: a value a class."
    eps, x, y = torch.tensor(.1, requires_grad=True), torch.randn(6, 3), torch.randint(3, (6,))
    for f in (lambda: smooth_cross_entropy(x, y, eps), lambda: smooth_targets(torch.eye(3), eps=eps)):
        with pytest.raises(ValueError, match=r'no gradient: pass eps.detach\(\), or to learn it eps.expand\(3\)'): f()
    with pytest.raises(ValueError, match=r'or to learn it eps.expand\(K\)'): LabelSmoothingCrossEntropy(eps)
    for f in (lambda: smooth_bce(x, x > 0, eps), lambda: smooth_bce(x, x > 0, (eps, .1)), lambda: smooth_targets(torch.eye(3), eps=eps, sigmoid=True)):
        with pytest.raises(ValueError, match=r'no gradient: pass eps.detach\(\)$'): f()
    with pytest.raises(ValueError, match=r'no gradient'): torch.func.grad(lambda e: smooth_cross_entropy(x, y, e))(eps.detach())
    assert distance(smooth_cross_entropy(x, y, eps.detach()), smooth_cross_entropy(x, y, eps.item())) < 1e-12

@pytest.mark.parametrize('name,value,came', [('weight', [1., -2.5, 1.], '-2.5'), ('prior', [.5, .75, -.25], '-0.25'), ('prior', [.5, .5, .5], '1.5'),
                                             ('prior', [[1., 0., 0.], [0., 1., 0.], [.5, .5, .5]], '1.5')])
def test_values_are_looked_at_where_a_module_is_built(name, value, came):
    "A call does not pay for it: it weighs by what it gets, as PyTorch does."
    with pytest.raises(ValueError, match=f'(?s){name}.*{came}'): LabelSmoothingCrossEntropy(.1, **{name: torch.tensor(value)})
    smooth_cross_entropy(X, Y, **{name: torch.tensor(value)})
    if name == 'weight' or '0.25' in came:
        with pytest.raises(ValueError, match=f'{name}.*{came}'): LabelSmoothingBCEWithLogits(**{name: torch.tensor(value)})
        smooth_bce(*XL.values(), **{name: torch.tensor(value)})

# ---------------------------------------------------------------- class weights that flip the optimum

@pytest.mark.parametrize('eps,weight,times', [(.1, 18.9, 0), (.1, 19.1, 1), (.5, 2.9, 0), (.5, 3.1, 1), (0., 1e6, 0)])
def test_weights_past_the_flip_warn(eps, weight, times):
    "K=2: the ratio is 19 at eps .1, 3 at .5; once however often such a loss is built, nothing below the ratio. With a prior it is that of its shares."
    for prior, e in ((None, eps), (torch.full((2,), .5), eps), (torch.full((2, 2), .5), eps), (None, torch.full((2,), eps))):
        _warn_flip.cache_clear()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            for _ in range(3): LabelSmoothingCrossEntropy(e, prior=prior, weight=torch.tensor([1., weight]))
        assert len(seen) == times and all('class weights outweigh' in str(w.message) for w in seen)

# ---------------------------------------------------------------- bad and odd arguments (tests/fuzz.py)

def vector(draw, k): return fuzz.rand(draw, k) + .1
def maybe(draw, make): return make() if draw(st.booleans()) else None
def with_class(v): return lambda a: torch.cat([a['target'].flatten()[1:], torch.tensor([v])]).view(a['target'].shape)

@st.composite
def indices(draw):
    "Logits of three to five dimensions, in any layout; class indices, some of which are ignored."
    k, shape, at = draw(st.integers(2, 5)), draw(st.sampled_from([[3], [2, 3], [2, 3, 2]])), draw(st.integers(0, 1))
    x, y = lay_out(6 * fuzz.rand(draw, shape[0], k, *shape[1:]) - 3, draw(st.sampled_from(['contiguous', 'channels_last']))), fuzz.randint(draw, k, *shape)
    if at: x = x.movedim(1, -1)
    y.view(-1)[0] = draw(st.sampled_from([0, -100]))
    prior = maybe(draw, lambda: fuzz.rand(draw, *[k] * draw(st.integers(1, 2))).softmax(-1))
    return dict(input=x, target=y, eps=draw(st.sampled_from([.1, 0, 1., 5e-324])) if draw(st.booleans()) else vector(draw, k) / 2, prior=prior, axis=-at or 1,
                weight=maybe(draw, lambda: vector(draw, k)), reduction=draw(st.sampled_from(['mean', 'sum', 'none'])), backend=draw(st.sampled_from(['auto', 'torch'])))

@st.composite
def soft(draw):
    x = 6 * fuzz.rand(draw, 4, 3) - 3
    return dict(input=x, target=fuzz.rand(draw, 4, 3).softmax(1), prior=maybe(draw, lambda: vector(draw, 3).softmax(0)), weight=maybe(draw, lambda: vector(draw, 3)))

@st.composite
def labels(draw):
    shape = draw(st.sampled_from([(4, 3), (2, 3, 4, 5)]))
    each = lambda: vector(draw, 3).view(3, *[1] * (len(shape) - 2))
    both = draw(st.sampled_from([dict(eps=(.1, 0.)), dict(eps=[.3, .7]), dict(eps=.05), dict(eps=0, prior=fuzz.rand(draw, 3)), dict(eps=.5, prior=fuzz.rand(draw, 2, 3))]))
    return dict(prior=None) | both | dict(input=6 * fuzz.rand(draw, *shape) - 3, target=(fuzz.rand(draw, *shape) < .4).float(), weight=maybe(draw, each), pos_weight=maybe(draw, each), reduction=draw(st.sampled_from(['mean', 'none'])))

@st.composite
def classes(draw):
    k = draw(st.integers(2, 5))
    return dict(target=fuzz.randint(draw, k, 3, 2), num_classes=k, eps=draw(st.sampled_from([.1, .5])), prior=maybe(draw, lambda: vector(draw, k).softmax(0)), axis=-1)

def wrong_vectors(name, default=.2):
    "Of another number of classes, or no vectors at all."
    k = lambda a: a['input'].shape[a.get('axis', 1)] if 'input' in a else a['num_classes']
    return [*(v for v in NOT_TENSORS if v is not None), lambda a: torch.full((k(a) + 1,), default), lambda a: torch.full((1, 1, k(a)), default), lambda a: torch.zeros(0),
            *(lambda a, make=make: make(dict(v=torch.full((k(a),), 1 / k(a))) )for make in no_values('v'))]

NO_LOGITS = [*NOT_TENSORS, lambda a: a['input'].long(), lambda a: a['input'] > 0, torch.tensor(1.), *no_values('input')]
WRONG_EPS = [*BAD_EPS, torch.full((7,), .1), lambda a: a['input'].new_full((a['input'].shape[a.get('axis', 1)],), 1.5)]
BAD_AXIS = [9, -9, 2**70, 1.5, NAN, '1', None, [1]]
LOSS = dict(reduction=BAD_REDUCTION, backend=BAD_BACKEND)
TABLE = {
    'smooth_cross_entropy': Row(smooth_cross_entropy, indices(), LOSS | {
        'input or target': NO_LOGITS, 'target or input': [*NOT_TENSORS, lambda a: a['target'].float(), lambda a: a['target'] > 0, lambda a: a['target'][None], *no_values('target')],
        'class index': [lambda a, v=v: dict(target=with_class(v)(a)) for v in (7, -1, -2**62, 2**40)], 'axis': BAD_AXIS,
        'ignore_index or class index': [1.5, NAN, '-100', None, [-100], 2**70, torch.tensor([1, 2])], 'eps': WRONG_EPS, 'prior or eps or weight': wrong_vectors('prior'),
        'weight or eps or prior': wrong_vectors('weight'), 'spread or prior': [lambda a, v=v: dict(spread=v, prior=None) for v in BAD_SPREAD]},
        dict(input=FLOATS + HALF, target=INTEGERS[:-1], eps=FLOATS, prior=(*FLOATS, torch.int64), weight=(*FLOATS, *HALF, torch.int64))),
    'smooth_cross_entropy of soft targets': Row(smooth_cross_entropy, soft(), {
        'target': [lambda a: a['target'] > .3, lambda a: a['target'] * 2, lambda a: a['target'] * NAN, lambda a: a['target'][:, :2]], 'ignore_index': [0, 2]},
        dict(input=FLOATS + HALF, target=FLOATS + HALF, prior=(*FLOATS, torch.int64), weight=(*FLOATS, *HALF, torch.int64))),
    'smooth_binary_cross_entropy_with_logits': Row(smooth_bce, labels(), LOSS | {
        'input or target': NO_LOGITS[:-2] + no_values('input'), 'target or input': [*NOT_TENSORS, lambda a: a['target'][:1, :2], lambda a: a['target'][:, 0].long(), *no_values('target')],
        'eps': BAD_LABEL_EPS, 'eps or prior': [lambda a: dict(eps=(.1, 0.), prior=torch.full((3,), .5))],
        'axis': [o for o in BAD_AXIS if o is not None], 'prior': wrong_vectors('prior') + [torch.full((3, 3), .5), torch.full((2, 4), .5), torch.full((1, 3), .5)],
        'weight': [*NOT_TENSORS[1:], torch.ones(7), torch.ones(2, 1, 1, 1, 1, 1), torch.ones(3, device='meta')], 'pos_weight': ['abc', 3.5, torch.ones(7)]},
        dict(input=FLOATS + HALF, target=LABELS, prior=(*FLOATS, torch.int64), weight=(*FLOATS, *HALF, torch.int64), pos_weight=FLOATS + HALF)),
    'smooth_targets': Row(smooth_targets, classes(), {
        'target': [None, 'abc', object(), [[1, 2], [3]], {}, *no_values('target')[:1]], 'class index': [lambda a, v=v: dict(target=with_class(v)(a)) for v in (7, -1, 2**40)],
        'num_classes': [None, 'x', -1, 0, 1.5, NAN, [3], True], 'axis': [9, -9, 1.5, '1', [1]], 'eps': [o for o in BAD_EPS if o is not None], 'prior': wrong_vectors('prior'),
        'spread or prior': [lambda a, v=v: dict(spread=v, prior=None) for v in BAD_SPREAD]}, dict(target=INTEGERS, prior=FLOATS))}
test_refuses, test_takes = fuzz.both_tests(TABLE)
