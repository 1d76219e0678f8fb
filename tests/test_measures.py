"Measures of probabilities, beside the formulas row by row in float64, scikit-learn, and values known by hand."
import math, warnings
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import foldnorm
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

import fuzz
from helpers import *
from fastai_smooth.measures import *

NAN = math.nan
MEASURES = [nll, brier_score, calibration_error, classwise_calibration_error, smooth_calibration_error]
BINNED = MEASURES[2:4]
some = settings(max_examples=40, deadline=None, derandomize=True)
each_measure = pytest.mark.parametrize('measure', MEASURES, ids=lambda o: o.__name__)

def near(a, b, atol=1e-9): np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=0, atol=atol)
def as_tensors(probs, targs): return torch.tensor(probs, dtype=torch.float64), torch.tensor(targs)

def sample(n=400, k=None, slope=1.4, seed=0, labels=False):
    "Probabilities of which no two are alike, and outcomes; miscalibrated where `slope` is not 1"
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n if k is None else (n, k))*1.5
    if k is None or labels: return torch.tensor(1/(1+np.exp(-slope*z))), torch.tensor((rng.random(z.shape) < 1/(1+np.exp(-z))).astype(int))
    y = torch.multinomial(torch.tensor(z).softmax(1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return (slope*torch.tensor(z)).softmax(1), y

# ---------------------------------------------------------------- the formulas, row by row

def task_of(probs, targs): return 'event' if not isinstance(probs[0], list) else 'labels' if isinstance(targs[0], list) else 'classes'

def columns(probs, targs, classwise=False):
    "[(p,y) of each row] of each event"
    task = task_of(probs, targs)
    if task == 'event': return [list(zip(probs, targs))]
    if task == 'labels': return [[(p[k], y[k]) for p, y in zip(probs, targs)] for k in range(len(probs[0]))]
    if classwise: return [[(p[k], int(y == k)) for p, y in zip(probs, targs)] for k in range(len(probs[0]))]
    return [[(max(p), int(p.index(max(p)) == y)) for p, y in zip(probs, targs)]]

def minus_log(p): return 100. if p == 0 else min(100., -math.log(p))

def nll_reference(probs, targs):
    if task_of(probs, targs) == 'classes': return [np.mean([minus_log(p[y]) for p, y in zip(probs, targs)])]
    return [np.mean([minus_log(p if y else 1-p) for p, y in col]) for col in columns(probs, targs)]

def brier_reference(probs, targs):
    each = [np.mean([(p-y)**2 for p, y in col]) for col in columns(probs, targs, classwise=True)]
    return [sum(each)] if task_of(probs, targs) == 'classes' else each

def bins_of(ps, n_bins, binning):
    "Width: [i/n_bins,(i+1)/n_bins), the last closed. Mass: row r of n in order is in bin r*n_bins//n; equal ones go with the last of them."
    if binning == 'width': return [min(int(Fraction(p)*n_bins), n_bins-1) for p in ps]
    return [(sum(o <= p for o in ps) - 1)*n_bins//len(ps) for p in ps]

def binned(col, n_bins, binning):
    "The rows of each bin that has any, in order"
    bins = {}
    for o, b in zip(col, bins_of([p for p, _ in col], n_bins, binning)): bins.setdefault(b, []).append(o)
    return [bins[b] for b in sorted(bins)]

def error_reference(col, n_bins=15, binning='width', norm='l1', debias=False):
    "sum of share*|gap|, root of sum of share*gap^2, or the largest |gap|"
    N, l1, l2, mx, bias1, bias2 = len(col), 0., 0., 0., 0., 0.
    for rows in binned(col, n_bins, binning):
        n, acc, conf = len(rows), np.mean([y for _, y in rows]), np.mean([p for p, _ in rows])
        gap, var = abs(acc-conf), acc*(1-acc)
        l1, l2, mx = l1 + n/N*gap, l2 + n/N*gap**2, max(mx, gap)
        bias1 += n/N*(foldnorm.mean(gap/math.sqrt(var/n), scale=math.sqrt(var/n)) if var > 1e-12 else gap)  # E|gap + sd*Z|
        bias2 += n/N*(var/(n-1) if n > 1 else gap**2)                                                        # Kumar et al. 2019
    if debias: return max(0., 2*l1-bias1) if norm == 'l1' else math.sqrt(max(0., l2-bias2))
    return dict(l1=l1, l2=math.sqrt(l2), max=mx)[norm]

def smooth_reference(col, grid=500, steps=13):
    "The s where the integral of |sum of residual/N * Gaussian(s) reflected at 0 and 1| is s"
    p, y = np.array(col, dtype=float).T
    x, r = (np.arange(grid)+.5)/grid, (y-p)/len(p)
    images = np.stack([2*k + sign*p for k in range(-2, 4) for sign in (1, -1)])
    def size(s): return abs((np.exp(-((x[:, None, None]-images)/s)**2/2).sum(1) @ r)/(s*math.sqrt(2*math.pi))).mean()
    low, high = 0., abs(r).sum()
    for _ in range(steps if high else 0):
        mid = (low+high)/2
        low, high = (mid, high) if size(mid) > mid else (low, mid)
    return (low+high)/2

def averaged(values, average):
    return values[0] if average is None and len(values) == 1 else dict(macro=np.mean, worst=np.max).get(average, list)(values)

@st.composite
def cases(draw, max_n=25):
    "(probs, targs) as lists; probabilities k/64, so with ties, exact 0 and 1, and on the edges of some bins"
    task, n, k = draw(st.sampled_from(['event', 'classes', 'labels'])), draw(st.integers(1, max_n)), draw(st.integers(1, 4))
    def rows(one): return draw(st.lists(one, min_size=n, max_size=n))
    def several(one, k): return st.lists(one, min_size=k, max_size=k)
    share, outcome = st.integers(0, 64).map(lambda i: i/64), st.integers(0, 1)
    if task == 'event': return rows(share), rows(outcome)
    if task == 'labels': return rows(several(share, k)), rows(several(outcome, k))
    def shares(cuts): return [b-a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 1])]
    return rows(several(share, k-1).map(shares)), rows(st.integers(0, k-1))

averages = st.sampled_from(['macro', 'worst', None])
options = st.builds(lambda norm, debias, **kw: dict(norm=norm, debias=debias and norm != 'max', **kw),
                    norm=st.sampled_from(['l1', 'l2', 'max']), debias=st.booleans(),
                    n_bins=st.sampled_from([1, 2, 3, 4, 7, 10, 15, 16, 20, 64, 100]), binning=st.sampled_from(['width', 'mass']))

@given(cases(), averages)
@some
def test_proper_scores_are_the_formulas(case, average):
    near(nll(*as_tensors(*case), average=average), averaged(nll_reference(*case), average))
    near(brier_score(*as_tensors(*case), average=average), averaged(brier_reference(*case), average))

@given(cases(), averages, options)
@settings(some, max_examples=120)
def test_binned_errors_are_the_formulas(case, average, kw):
    for f, classwise in zip(BINNED, (False, True)):   # of a difference that should be 0 the root is far from it: 1e-7
        near(f(*as_tensors(*case), average=average, **kw), averaged([error_reference(o, **kw) for o in columns(*case, classwise)], average), 1e-7)

@given(cases(), averages)
@settings(some, max_examples=25)
def test_smooth_error_is_the_formula(case, average):
    near(smooth_calibration_error(*as_tensors(*case), average=average), averaged([smooth_reference(o) for o in columns(*case)], average), 2e-3)

@pytest.mark.parametrize('slope', [.5, 1., 3.])
def test_smooth_error_of_many_rows_is_the_formula(slope):
    p, y = sample(300, slope=slope)
    near(smooth_calibration_error(p, y), smooth_reference(list(zip(p.tolist(), y.tolist()))), 2e-3)

@given(st.lists(st.integers(0, 997), min_size=1, max_size=30), st.integers(0, 1))
@some
def test_smooth_error_is_the_mean_gap_where_all_residuals_have_one_sign(ps, y):
    p = [o/997 for o in ps]
    near(smooth_calibration_error(*as_tensors(p, [y]*len(p))), abs(y-np.mean(p)), 2e-6)

# ---------------------------------------------------------------- scikit-learn, and known values

def test_sklearn_agrees_on_proper_scores():
    p, y = sample()
    near([nll(p, y), brier_score(p, y)], [log_loss(y, p), brier_score_loss(y, p)])
    p, y = sample(k=5)
    near([nll(p, y), brier_score(p, y)], [log_loss(y, p), sum(brier_score_loss(y == k, p[:, k]) for k in range(5))])

@pytest.mark.parametrize('n_bins', [5, 15])
def test_sklearn_agrees_on_the_bins(n_bins):
    p, y = sample()
    acc, conf = calibration_curve(y, p, n_bins=n_bins)
    n = np.histogram(p, np.linspace(0, 1, n_bins+1))[0]
    near(calibration_error(p, y, n_bins), (n[n > 0]*abs(acc-conf)).sum()/len(p))
    near(calibration_error(p, y, n_bins, norm='max'), abs(acc-conf).max())

def test_edges():
    "A row at an edge is in the upper bin, 1 in the last one, also where float32 rounded it there"
    near(calibration_error(*as_tensors([.95, 1.], [1, 0]), 10), .475)
    near(calibration_error(tensor([0., 0., 1.]), tensor([1, 0, 1]), 10, norm='max'), .5)
    near(smooth_calibration_error(*as_tensors([1.]*10 + [.8]*10, [1]*10 + [1]*6 + [0]*4)), .1, 1e-6)
    near(smooth_calibration_error(tensor([0., 0.]), tensor([0, 1])), .5, 1e-6)
    one = torch.sigmoid(tensor([17., 20.]))
    assert (one == 1).all()
    for binning in ('width', 'mass'): near(calibration_error(one, tensor([1, 1]), binning=binning), 0)

def test_fastai_agrees_on_accuracy():
    "also where a probability is 1/2"
    p, y = sample(50, 3, labels=True)
    p[0] = .5
    near(measure_of(accuracy_multi)(p, y), accuracy_multi(p, y, sigmoid=False), 1e-6)
    p, y = sample(50, 3)
    near(measure_of(accuracy)(p, y), accuracy(p, y), 1e-6)

@pytest.mark.parametrize('k', [2, 10, 1000])
def test_uniform_predictions_have_an_nll_of_log_k(k):
    p, y = torch.full((7, k), 1/k, dtype=torch.float64), torch.arange(7) % k
    near(nll(p, y), math.log(k)), near(brier_score(p, y), 1-1/k)

@each_measure
def test_a_perfect_predictor_has_no_error(measure):
    y = tensor([0, 2, 1, 1])
    for p, t in (F.one_hot(y).double(), y), (F.one_hot(y).double(), F.one_hot(y)), (tensor([0., 1., 1.]), tensor([0, 1, 1])):
        near(measure(p, t, average='worst'), 0)

def test_nll_of_an_impossible_truth_is_100():
    near(nll(tensor([0., 1.]), tensor([1, 0])), F.binary_cross_entropy(tensor([0., 1.]), tensor([1., 0.])))
    near(nll(tensor([[0., 1.]]), tensor([0])), 100)
    near(nll(tensor([[0., 1.]]), tensor([[1, 1]]), average=None), [100, 0])

# ---------------------------------------------------------------- what comes in

@each_measure
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_probabilities_are_measured_in_float64(measure, dtype):
    "and rows need sum to 1 only but for the rounding: in bfloat16 thirds sum to 1.00195, sevenths to .9980"
    for p, y in sample(100, 7), sample(100, 3, labels=True), sample(100):
        res = measure(p.to(dtype), y)
        assert res.dtype == torch.float64
        near(res, measure(p, y), .03)
        if p.shape == y.shape: near(res, measure(p.to(dtype).double(), y), 1e-12)
    for k in (3, 7): assert measure(torch.full((6, k), 1/k).to(dtype), torch.arange(6) % 3).isfinite()

@each_measure
def test_rounding_beyond_0_and_1_is_clipped(measure):
    p, y = torch.tensor([1.0000000000000002, .5, -1e-17], dtype=torch.float64), tensor([1, 0, 0])
    assert p[0] > 1 > 0 > p[2]
    near(measure(p, y), measure(p.clamp(0, 1), y), 1e-12)
    rows = torch.stack([p, 1-p], 1)
    near(measure(rows, y), measure(rows.clamp(0, 1), y), 1e-12)

@each_measure
def test_tables_and_lists_are_taken(measure):
    p, y = sample(30, 4)
    index = range(100, 130)
    frame, series = pd.DataFrame(p.numpy(), index, columns=list('abcd')), pd.Series(y.numpy(), index)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for args in (frame, series), (p.tolist(), y.tolist()), (p.numpy(), y.numpy()): near(measure(*args), measure(p, y), 1e-6)
        near(measure(frame['a'], series == 2), measure(p[:, 0], y == 2), 1e-12)
    with pytest.raises(TypeError, match='probs must be'): measure(frame.assign(a='x'), series)

WITH_NAN = dict(event=(tensor([.1, NAN, .4]), tensor([0, 1, 1])), classes=(tensor([[.1, .9], [NAN, NAN]]), tensor([0, 1])),
                labels=(tensor([[.1, .9], [.3, NAN]]), tensor([[0, 1], [1, 1]])), one_row=(tensor([NAN]), tensor([0])))
NAN_OPTIONS = [{}, dict(binning='mass'), dict(norm='max'), dict(norm='l2'), dict(debias=True), dict(norm='l2', debias=True)]

@pytest.mark.parametrize('case', WITH_NAN.values(), ids=WITH_NAN)
def test_nan_gives_nan(case):
    "A training that diverged must not crash in its metric"
    for f in MEASURES:
        for kw in NAN_OPTIONS if f in BINNED else [{}]: assert f(*case, **kw).isnan()
    if case[1].ndim == 2: assert nll(*case, average=None).isnan().tolist() == [False, True]

P3, Y3 = tensor([[.2, .3, .5], [.1, .1, .8]]), tensor([2, 0])
MESSAGES = [
    (tensor([[2.5, -.3], [1., 1.]]), tensor([0, 1]), r'\[0,1\], got 2.5: apply softmax'), (tensor([.4, -.25]), tensor([0, 1]), 'got -0.25: apply sigmoid'),
    (tensor([1.01, .5]), tensor([1, 0]), 'got 1.01'), (tensor([[.2, .8], [.3, .9]]), tensor([0, 1]), 'row 1 sums to 1.2: for independent labels'),
    (P3, tensor([2, 3]), r'class indices in \[0,2\], got 3'), (P3, tensor([-100, 1]), 'got -100'), (P3, tensor([1.5, 0.]), 'got 1.5'),
    (tensor([.2, .3]), tensor([0, 2]), '0 or 1, got 2'), (P3, tensor([[.1, .2, .7], [0, 0, 1]]), '0 or 1, got 0.1'), (P3, tensor([0, 1, 2]), r'probs \(2, 3\), targs \(3,\)'),
    (P3[None], Y3[None], r'probs \(1, 2, 3\)'), (tensor([.5]), tensor([[1]]), r'targs \(1, 1\)'), (P3[:0], Y3[:0], 'no rows'), (tensor([0, 1]), tensor([0, 1]), 'floating point, got torch.int64')]

@pytest.mark.parametrize('probs, targs, message', MESSAGES, ids=range(len(MESSAGES)))
def test_what_is_wrong_is_named(probs, targs, message):
    with pytest.raises(ValueError, match=message): check_probs(probs, targs)

def test_the_largest_gap_has_no_debiasing():
    for f in BINNED:
        with pytest.raises(ValueError, match='debias'): f(P3, Y3, norm='max', debias=True)

@st.composite
def drawn(draw, tasks=('event', 'classes', 'labels'), **options):
    "Arguments of a measure, by name"
    task, n, k = draw(st.sampled_from(tasks)), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    z = (fuzz.rand(draw, *((n,) if task == 'event' else (n, k))) - .5)*8
    targs = fuzz.randint(draw, k if task == 'classes' else 2, *((n,) if task == 'classes' else z.shape))
    return dict(probs=z.softmax(1) if task == 'classes' else z.sigmoid(), targs=targs) | {name: draw(o) for name, o in options.items()}

def away(name, value): return lambda a: torch.full_like(a[name], value, dtype=torch.float64)
BAD_PROBS = {'probs': [*fuzz.NOT_TENSORS, *fuzz.no_values('probs'), away('probs', -.25), away('probs', math.inf), lambda a: a['probs']*100 + 3, lambda a: a['probs'][None, ..., None]],
             'targs': [*fuzz.NOT_TENSORS, *fuzz.no_values('targs'), away('targs', -1), away('targs', .5), away('targs', NAN), away('targs', 1e18), lambda a: torch.cat([a['targs']]*2)]}
BAD_BINS = dict(n_bins=fuzz.BAD_COUNT, binning=['Width', '', None, 0, ['mass']], norm=['L1', 'inf', '', None, 1, ['l1']])
some_bins = dict(n_bins=st.integers(1, 20), binning=st.sampled_from(['width', 'mass']), norm=st.sampled_from(['l1', 'l2', 'max']))
TABLE = {f.__name__: fuzz.Row(f, drawn(average=averages, **some_bins if f in BINNED else {}), BAD_PROBS | dict(average=fuzz.BAD_AVERAGE) | (BAD_BINS if f in BINNED else {}),
                              dict(probs=fuzz.FLOATS, targs=fuzz.INTEGERS)) for f in MEASURES}
test_refuses, test_takes = fuzz.both_tests(TABLE, subclasses=(TensorBase, TensorCategory))
