"Calibration measures, their intervals and floors, and the metrics: SPEC section 6."
import math, pickle, warnings
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binom, foldnorm
from torch.utils._python_dispatch import TorchDispatchMode
from helpers import *
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.learner import load_learner
from fastai.tabular.all import tabular_learner
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

import fastai.losses as fastai_losses
from fastai_smooth.all import LabelSmoothingBCEWithLogitsFlat, LabelSmoothingCrossEntropyFlat
from fastai_smooth.calibration import *
from processes import fastai_on_cpu, in_processes, needs_distributed

NAN = float('nan')
MEASURES = [nll, brier_score, calibration_error, classwise_calibration_error, smooth_calibration_error]
some = settings(max_examples=40, deadline=None, derandomize=True)
measured = pytest.mark.parametrize('measure', MEASURES, ids=lambda o: o.__name__)


def near(a, b, atol=1e-9): np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=0, atol=atol)


def as_tensors(probs, targs): return torch.tensor(probs, dtype=torch.float64), torch.tensor(targs)


# ---------------------------------------------------------------- the formulas, row by row

def task_of(probs, targs):
    return 'event' if not isinstance(probs[0], list) else 'labels' if isinstance(targs[0], list) else 'classes'


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


def error_reference(col, n_bins=15, binning='width', norm='l1', debias=False):
    "sum of share*|gap|, root of sum of share*gap^2, or the largest |gap|"
    bins = {}
    for o, b in zip(col, bins_of([p for p, _ in col], n_bins, binning)): bins.setdefault(b, []).append(o)
    N, l1, l2, mx, bias1, bias2 = len(col), 0., 0., 0., 0., 0.
    for rows in bins.values():
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
    if high == 0: return 0.
    for _ in range(steps):
        mid = (low+high)/2
        low, high = (mid, high) if size(mid) > mid else (low, mid)
    return (low+high)/2


def averaged(values, average):
    return values[0] if average is None and len(values) == 1 else dict(macro=np.mean, worst=np.max).get(average, list)(values)


@st.composite
def cases(draw, max_n=25):
    "(probs, targs) as lists; probabilities k/64, so with ties, exact 0 and 1, and on the edges of some bins"
    task, n = draw(st.sampled_from(['event', 'classes', 'labels'])), draw(st.integers(1, max_n))
    if task == 'event':
        return draw(st.lists(st.integers(0, 64).map(lambda i: i/64), min_size=n, max_size=n)), draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    k = draw(st.integers(1, 4))
    def rows(one): return draw(st.lists(one, min_size=n, max_size=n))
    if task == 'labels':
        return (rows(st.lists(st.integers(0, 64).map(lambda i: i/64), min_size=k, max_size=k)),
                rows(st.lists(st.integers(0, 1), min_size=k, max_size=k)))
    def shares(cuts): return [(b-a)/64 for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 64])]
    return rows(st.lists(st.integers(0, 64), min_size=k-1, max_size=k-1).map(shares)), rows(st.integers(0, k-1))


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
@settings(some, max_examples=150)
def test_binned_errors_are_the_formulas(case, average, kw):
    # the root of a difference that should be 0 is of the size of the root of float64's precision
    for f, classwise in (calibration_error, False), (classwise_calibration_error, True):
        near(f(*as_tensors(*case), average=average, **kw), averaged([error_reference(o, **kw) for o in columns(*case, classwise)], average), atol=1e-7)


@given(cases(), averages)
@some
def test_smooth_error_is_the_formula(case, average):
    near(smooth_calibration_error(*as_tensors(*case), average=average), averaged([smooth_reference(o) for o in columns(*case)], average), atol=2e-3)


def test_smooth_error_of_many_rows_is_the_formula():
    rng = np.random.default_rng(0)
    for slope in (.5, .9, 1., 1.3, 3.):
        z = rng.normal(size=300)*2
        p, y = 1/(1+np.exp(-z*slope)), (rng.random(300) < 1/(1+np.exp(-z))).astype(int)
        near(smooth_calibration_error(*as_tensors(p, y)), smooth_reference(list(zip(p, y))), atol=2e-3)


@given(st.lists(st.integers(0, 997), min_size=1, max_size=30), st.integers(0, 1))
@some
def test_smooth_error_is_the_mean_gap_where_all_residuals_have_one_sign(ps, y):
    p = [o/997 for o in ps]
    near(smooth_calibration_error(*as_tensors(p, [y]*len(p))), abs(y-np.mean(p)), atol=2e-6)


def test_smooth_error_of_half_right_at_one():
    "EVIDENCE: half at 1 all right, half at .8 with 60% right: .100"
    near(smooth_calibration_error(*as_tensors([1.]*10 + [.8]*10, [1]*10 + [1]*6 + [0]*4)), .1, atol=1e-6)


@given(cases(max_n=12), st.randoms(use_true_random=False), options)
@some
def test_order_of_the_rows_is_nothing(case, rng, kw):
    at = list(range(len(case[0])))
    rng.shuffle(at)
    probs, targs = as_tensors(*case)
    for f in MEASURES:
        kw_ = kw if 'n_bins' in inspect.signature(f).parameters else {}
        near(f(probs[at], targs[at], average=None, **kw_), f(probs, targs, average=None, **kw_), atol=1e-7)


# ---------------------------------------------------------------- other libraries

def sample(n=400, k=None, slope=1.4, seed=0, labels=False):
    "Probabilities away from the bins' edges and outcomes, miscalibrated where `slope` is not 1, as tensors"
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n if k is None else (n, k))*1.5
    if k is None or labels: return torch.tensor(1/(1+np.exp(-slope*z))), torch.tensor((rng.random(z.shape) < 1/(1+np.exp(-z))).astype(int))
    y = torch.multinomial(torch.tensor(z).softmax(1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return (slope*torch.tensor(z)).softmax(1), y


def test_sklearn_agrees_on_proper_scores():
    p, y = sample()
    near(nll(p, y), log_loss(y, p))
    near(brier_score(p, y), brier_score_loss(y, p))
    p, y = sample(k=5)
    near(nll(p, y), log_loss(y, p))
    near(brier_score(p, y), sum(brier_score_loss(y == k, p[:, k]) for k in range(5)))
    p, y = sample(k=3, labels=True)
    near(nll(p, y, average=None), [log_loss(y[:, k], p[:, k]) for k in range(3)])
    near(brier_score(p, y, average='worst'), max(brier_score_loss(y[:, k], p[:, k]) for k in range(3)))


@pytest.mark.parametrize('n_bins', [5, 10, 15])
def test_sklearn_agrees_on_the_bins(n_bins):
    p, y = sample()
    acc, conf = calibration_curve(y, p, n_bins=n_bins)
    n = np.histogram(p, np.linspace(0, 1, n_bins+1))[0]
    n = n[n > 0]
    near(calibration_error(p, y, n_bins), (n*abs(acc-conf)).sum()/len(p))
    near(calibration_error(p, y, n_bins, norm='max'), abs(acc-conf).max())
    df = reliability(p, y, n_bins)
    near(df.confidence, conf), near(df.accuracy, acc), near(df.n, n)


@pytest.mark.parametrize('norm', ['l1', 'l2', 'max'])
def test_torchmetrics_agrees_away_from_the_edges(norm):
    tm = pytest.importorskip('torchmetrics.classification')
    p, y = sample()
    near(calibration_error(p, y, 10, norm=norm), tm.BinaryCalibrationError(n_bins=10, norm=norm)(p, y), atol=1e-6)
    p, y = sample(k=6)
    near(calibration_error(p, y, norm=norm), tm.MulticlassCalibrationError(6, n_bins=15, norm=norm)(p, y), atol=1e-6)
    near(classwise_calibration_error(p, y, norm=norm, average=None),
         [tm.BinaryCalibrationError(n_bins=15, norm=norm)(p[:, k], (y == k).long()) for k in range(6)], atol=1e-6)


@pytest.mark.parametrize('slope', [1., 1.2, 2.])
def test_uncertainty_calibration_agrees_on_debiased_errors(slope):
    "Its l1 is by 1,000 random draws"
    u = pytest.importorskip('calibration.utils')
    p, y = sample(1500, slope=slope)
    data = u.bin(list(zip(p.numpy(), y.numpy())), u.get_equal_prob_bins(p.numpy(), 10))
    near(calibration_error(p, y, 10, norm='l2', debias=True), u.unbiased_l2_ce(data))
    np.random.seed(0)
    near(calibration_error(p, y, 10, debias=True), max(0, np.mean([u.normal_debiased_ce(data) for _ in range(20)])), atol=5e-4)
    data = u.equal_bin(list(zip(p.numpy(), y.numpy())), 10)   # equal mass
    near(calibration_error(p, y, 10, 'mass', norm='l2', debias=True), u.unbiased_l2_ce(data))
    near(calibration_error(p, y, 10, 'mass', norm='l2'), u.plugin_ce(data))


def test_netcal_agrees():
    metrics = pytest.importorskip('netcal.metrics')
    p, y = sample()
    near(calibration_error(p, y, 10), metrics.ECE(10).measure(p.numpy(), y.numpy()), atol=1e-6)
    near(calibration_error(p, y, 10, norm='max'), metrics.MCE(10).measure(p.numpy(), y.numpy()), atol=1e-6)
    p, y = sample(k=6)
    near(calibration_error(p, y, 10), metrics.ECE(10).measure(p.numpy(), y.numpy()), atol=1e-6)


@pytest.mark.parametrize('slope', [.6, 1., 2.])
def test_relplot_agrees_away_from_the_ends(slope):
    "To the step of its search (2^-10) and of its grid"
    relplot = pytest.importorskip('relplot')
    p, y = sample(600, slope=slope)
    inside = (p > .02) & (p < .98)
    p, y = p[inside], y[inside]
    near(smooth_calibration_error(p, y), relplot.smECE(p.numpy(), y.numpy()), atol=3e-3)


# ---------------------------------------------------------------- known values

def test_edge_values():
    "EVIDENCE: [.95,1.0] with [1,0] is .475; 0 and an exact 1 of float32 are in the end bins"
    near(calibration_error(*as_tensors([.95, 1.], [1, 0]), 10), .475)
    near(calibration_error(tensor([0., 0.]), tensor([0, 1]), 10), .5)
    near(calibration_error(tensor([0., 0., 1.]), tensor([1, 0, 1]), 10, norm='max'), .5)
    one = torch.sigmoid(tensor([17., 20.]))
    assert (one == 1).all()
    for binning in ('width', 'mass'): near(calibration_error(one, tensor([1, 1]), binning=binning), 0)
    near(smooth_calibration_error(one, tensor([1, 1])), 0)
    near(smooth_calibration_error(tensor([0., 0.]), tensor([0, 1])), .5, atol=1e-6)
    near(nll(one, tensor([1, 0])), 50)


@pytest.mark.parametrize('k', [2, 3, 10, 1000])
def test_uniform_predictions(k):
    "NLL log K, Brier 1-1/K"
    p, y = torch.full((7, k), 1/k, dtype=torch.float64), torch.arange(7) % k
    near(nll(p, y), math.log(k)), near(brier_score(p, y), 1-1/k)


@measured
def test_a_perfect_predictor_has_no_error(measure):
    y = tensor([0, 2, 1, 1])
    for p, t in (F.one_hot(y).double(), y), (F.one_hot(y).double(), F.one_hot(y)), (tensor([0., 1., 1.]), tensor([0, 1, 1])):
        near(measure(p, t), 0)
        near(measure(p, t, average='worst'), 0)


def test_nll_of_an_impossible_truth_is_100():
    "As F.binary_cross_entropy clamps the logarithm"
    near(nll(tensor([0., 1.]), tensor([1, 0])), 100)
    near(nll(tensor([0., 1.]), tensor([1, 0])), F.binary_cross_entropy(tensor([0., 1.]), tensor([1., 0.])))
    near(nll(tensor([[0., 1.]]), tensor([0])), 100)
    near(nll(tensor([[0., 1.]]), tensor([[1, 1]]), average=None), [100, 0])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@measured
def test_half_precision(measure, dtype):
    "The value is that of the rounded probabilities, in float64; rows then sum to 1 but for their rounding"
    for p, y in sample(100, 7), sample(100, 3, labels=True), sample(100):
        res = measure(p.to(dtype), y)
        assert res.dtype == torch.float64
        near(res, measure(p, y), atol=.03)
        if p.shape == y.shape: near(res, measure(p.to(dtype).double(), y), atol=1e-12)
    for p in (torch.full((6, 3), 1/3).to(dtype), torch.full((6, 7), 1/7).to(dtype)):   # bfloat16: rows of 1.00195 and .9980
        assert measure(p, torch.arange(6) % 3).isfinite()
        assert all(map(math.isfinite, bootstrap_interval(measure, p, torch.arange(6) % 3)))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@measured
def test_null_floor_takes_half_precision(measure, dtype):
    for p in (torch.full((6, 3), 1/3).to(dtype), torch.full((6, 7), 1/7).to(dtype)):
        assert all(o.isfinite() for o in null_floor(measure, p, torch.arange(6) % 3, n_draws=100))


@measured
def test_rounding_beyond_0_and_1_is_clipped(measure):
    p, y = torch.tensor([1.0000000000000002, .5, -1e-17], dtype=torch.float64), tensor([1, 0, 0])
    assert p[0] > 1 > 0 > p[2]
    near(measure(p, y), measure(p.clamp(0, 1), y), 1e-12)
    rows = torch.stack([p, 1-p], 1)
    near(measure(rows, y), measure(rows.clamp(0, 1), y), 1e-12)
    with pytest.raises(ValueError, match='got 1.01'): measure(tensor([1.01, .5]), tensor([1, 0]))


@measured
def test_tables_of_pandas_are_taken(measure):
    p, y = sample(30, 4)
    index = range(100, 130)
    frame, series = pd.DataFrame(p.numpy(), index, columns=list('abcd')), pd.Series(y.numpy(), index)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        near(measure(frame, series), measure(p, y), 1e-12)
        near(measure(frame['a'], series == 2), measure(p[:, 0], y == 2), 1e-12)
        near(measure(frame, pd.DataFrame(F.one_hot(y).numpy(), index)), measure(p, F.one_hot(y)), 1e-12)
    with pytest.raises(TypeError, match='probs must be'): measure(frame.assign(a='x'), series)


def test_subclasses_and_gradients():
    p, y = sample(20, 4)
    for f in MEASURES: assert type(f(TensorBase(p).requires_grad_(), TensorCategory(y))) is Tensor
    p, y = sample(20, 4, labels=True)
    near(nll(p, TensorMultiCategory(y.float())), nll(p, y))


# ---------------------------------------------------------------- what is wrong is named

P3, Y3 = tensor([[.2, .3, .5], [.1, .1, .8]]), tensor([2, 0])


@measured
@pytest.mark.parametrize('probs, targs, message', [
    (tensor([[2.5, -.3], [1., 1.]]), tensor([0, 1]), r'\[0,1\], got 2.5: apply softmax'),
    (tensor([.4, -.25]), tensor([0, 1]), r'\[0,1\], got -0.25'),
    (tensor([float('inf'), .5]), tensor([0, 1]), r'\[0,1\], got inf'),
    (tensor([[.2, .8], [.3, .9]]), tensor([0, 1]), 'row 1 sums to 1.2'),
    (P3, tensor([2, 3]), r'class indices in \[0,2\], got 3'), (P3, tensor([2, -1]), 'got -1'), (P3, tensor([-100, 1]), 'got -100'),
    (P3, tensor([1.5, 0.]), 'got 1.5'), (tensor([.2, .3]), tensor([0, 2]), '0 or 1, got 2'),
    (P3, tensor([[.1, .2, .7], [0, 0, 1]]), '0 or 1, got 0.1'),
    (P3, tensor([0, 1, 2]), r'probs \(2, 3\), targs \(3,\)'), (P3, P3[:, :2], r'targs \(2, 2\)'), (P3[None], Y3[None], r'probs \(1, 2, 3\)'),
    (tensor(.5), tensor(1), r'probs \(\), targs \(\)'), (tensor([.5]), tensor([[1]]), r'targs \(1, 1\)'),
    (P3[:0], Y3[:0], 'no rows'), (P3[:0, 0], Y3[:0], 'no rows'), (tensor([0, 1]), tensor([0, 1]), 'floating point, got torch.int64'),
    ], ids=range(18))
def test_bad_input_is_named(measure, probs, targs, message):
    for f in (measure, partial(bootstrap_interval, measure), partial(null_floor, measure)):
        with pytest.raises(ValueError, match=message): f(probs, targs)


def test_reliability_names_bad_input():
    with pytest.raises(ValueError, match='got 2.5'): reliability(tensor([2.5]), tensor([1]))
    with pytest.raises(ValueError, match='3 labels'): reliability(P3, F.one_hot(Y3))


@pytest.mark.parametrize('f', [calibration_error, classwise_calibration_error, partial(bootstrap_interval, calibration_error),
                               partial(null_floor, classwise_calibration_error), lambda p, y, **kw: ECE(**kw), lambda p, y, **kw: ClasswiseECE(**kw)])
def test_unknown_options_are_named(f):
    with pytest.raises(ValueError, match="binning .*'depth'"): f(P3, Y3, binning='depth')
    with pytest.raises(ValueError, match="norm .*'l3'"): f(P3, Y3, norm='l3')
    with pytest.raises(ValueError, match='average .*micro'): f(P3, Y3, average='micro')
    for n in (0, -3, 2.5):
        with pytest.raises(ValueError, match=f'n_bins .*{n}'): f(P3, Y3, n_bins=n)


def test_debias_of_the_largest_gap_is_refused():
    for f in (calibration_error, classwise_calibration_error, partial(null_floor, calibration_error)):
        with pytest.raises(ValueError, match='debias'): f(P3, Y3, norm='max', debias=True)
    with pytest.raises(ValueError, match='debias'): ECE(norm='max', debias=True)


@pytest.mark.parametrize('f', [null_floor, bootstrap_interval])
def test_unknown_measures_are_named(f):
    with pytest.raises(TypeError, match='error_rate.*nll'): f(error_rate, P3, Y3)


def test_a_metric_is_one_number():
    for f in (NLL, Brier, ECE, ClasswiseECE, SmoothECE):
        with pytest.raises(ValueError, match='average'): f(average=None)
        with pytest.raises(ValueError, match='average.*micro'): f(average='micro')


WITH_NAN = [(tensor([.1, NAN, .4]), tensor([0, 1, 1])), (tensor([[.1, .9], [NAN, NAN]]), tensor([0, 1])),
            (tensor([[.1, .9], [.3, NAN]]), tensor([[0, 1], [1, 1]])), (tensor([NAN]), tensor([0]))]


@measured
@pytest.mark.parametrize('case', WITH_NAN, ids=['event', 'classes', 'labels', 'one row'])
def test_nan_gives_nan(measure, case):
    "A training that diverged must not crash in its metric"

    p, y = case
    assert measure(p, y).isnan()
    for o in bootstrap_interval(measure, p, y): assert math.isnan(o)
    if y.ndim == 2: assert measure(p, y, average=None).isnan().tolist() == [False, True]


@pytest.mark.parametrize('kw', [dict(binning='mass'), dict(norm='max'), dict(norm='l2'), dict(debias=True), dict(norm='l2', debias=True)], ids=str)
@pytest.mark.parametrize('case', WITH_NAN, ids=['event', 'classes', 'labels', 'one row'])
def test_nan_gives_nan_with_every_option(kw, case):
    for f in (calibration_error, classwise_calibration_error): assert f(*case, **kw).isnan()


@measured
def test_null_floor_of_nan_is_nan(measure):
    for p, y in WITH_NAN: assert all(o.isnan() for o in null_floor(measure, p, y, n_draws=100))


# ---------------------------------------------------------------- null_floor

def test_null_floor_of_ten_classes():
    "EVIDENCE, K=10: n=500 .035 and .049, n=1500 .021 and .030, n=4000 .012 and .018"
    for n, mean, upper in (500, .035, .049), (1500, .021, .030), (4000, .012, .018):
        p = (SCALE*torch.randn(n, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).softmax(1)
        got = null_floor(calibration_error, p, torch.zeros(n, dtype=torch.long), n_draws=500)
        np.testing.assert_allclose(torch.stack(got), [mean, upper], rtol=.12)


SCALE = 6.
FLOORS = [(nll, {}), (brier_score, {}), (calibration_error, dict(binning='mass', n_bins=8)), (calibration_error, dict(norm='l2', debias=True)),
          (calibration_error, dict(norm='max', n_bins=4)), (classwise_calibration_error, {}), (smooth_calibration_error, {})]


@pytest.mark.parametrize('measure, kw', FLOORS, ids=lambda o: getattr(o, '__name__', str(o)))
@pytest.mark.parametrize('task', ['event', 'classes', 'labels'])
def test_null_floor_is_what_a_simulation_gives(measure, kw, task):
    "Labels drawn from the model's own probabilities: mean and upper quantile to the error of 300 draws (a share of .9 has one of .024)"
    p, q = world(task, 150, 1., np.random.default_rng(0))
    rng, p = np.random.default_rng(1), torch.tensor(p)
    seen = np.array([measure(p, torch.tensor(outcomes(q, task, rng)), average='worst', **kw).item() for _ in range(300)])
    y = torch.zeros(p.shape if task == 'labels' else len(p), dtype=torch.long)
    mean, upper = (o.item() for o in null_floor(measure, p, y, level=.9, n_draws=300, average='worst', **kw))
    assert abs(mean-seen.mean()) < 5*seen.std()*math.sqrt(2/300)
    assert (seen <= upper+1e-9).mean() > .82 and (seen < upper-1e-9).mean() < .98
    assert mean < upper


def test_null_floor_is_seeded_and_grows_with_level():
    p, y = sample(100, 4)
    a, b, c = (null_floor(calibration_error, p, y, n_draws=100, seed=s) for s in (3, 3, 4))
    assert a == b and a != c
    uppers = [null_floor(calibration_error, p, y, level=level, n_draws=100)[1] for level in (.5, .8, .95, .99)]
    assert uppers == sorted(uppers) and len(set(uppers)) == 4
    assert null_floor(calibration_error, p, torch.zeros_like(y), n_draws=100) == null_floor(calibration_error, p, y, n_draws=100)
    p, y = sample(50, 3, labels=True)
    assert [o.shape for o in null_floor(calibration_error, p, y, average=None, n_draws=100)] == [(3,), (3,)]


# ---------------------------------------------------------------- bootstrap_interval

def sigmoid(z): return 1/(1+np.exp(-z))


def softmax(z):
    z = np.exp(z-z.max(1, keepdims=True))
    return z/z.sum(1, keepdims=True)


def world(task, n, slope, rng):
    "Probabilities of a model, and what the truth has: the same where `slope` is 1, overconfident above"
    if task == 'classes':
        z = rng.normal(size=(n, 10))*2
        return softmax(slope*z), softmax(z)
    z = rng.normal(size=(n, 3) if task == 'labels' else n)*2 - 1
    return sigmoid(slope*z), sigmoid(z)


def outcomes(q, task, rng):
    if task == 'classes': return (q.cumsum(1) < rng.random((len(q), 1))).sum(1).clip(max=q.shape[1]-1)
    return (rng.random(q.shape) < q).astype(int)


def binned_truth(p, r, n_bins=15): return abs(np.bincount(np.minimum((p*n_bins).astype(int), n_bins-1), r, n_bins)).sum()/len(p)


def smooth_truth(p, r, grid=1000):
    "As `smooth_reference`, of residuals that are summed on a grid first"
    r = np.bincount(np.minimum((p*grid).astype(int), grid-1), r, grid)/len(p)
    x = (np.arange(grid)+.5)/grid
    d = [x[:, None]-2*k-sign*x for k in (-1, 0, 1) for sign in (1, -1)]
    low, high = 0., abs(r).sum()
    for _ in range(12):
        s = (low+high)/2
        at_s = abs(sum(np.exp(-(o/s)**2/2) for o in d) @ r).sum()/(s*math.sqrt(2*math.pi)*grid)
        low, high = (s, high) if at_s > s else (low, s)
    return (low+high)/2


def truth(measure, task, slope, n=2_000_000):
    "What `measure` is on all rows: over 2e6 of them, the outcome replaced by its probability"
    p, q = world(task, n, slope, np.random.default_rng(99))
    if measure is nll: return -(q*np.log(p) + (0 if task == 'classes' else (1-q)*np.log(1-p))).sum()/(n if task == 'classes' else p.size)
    if measure is brier_score: return (p**2 - 2*p*q + q).sum()/(n if task == 'classes' else p.size)
    if task == 'classes' and measure is not classwise_calibration_error:
        at = p.argmax(1)[:, None]
        p, q = np.take_along_axis(p, at, 1), np.take_along_axis(q, at, 1)
    f = smooth_truth if measure is smooth_calibration_error else binned_truth
    p, q = p.reshape(n, -1), q.reshape(n, -1)
    return np.mean([f(p[:, k], q[:, k]-p[:, k]) for k in range(p.shape[1])])


def intervals(measure, task, slope, n, draws):
    rng, res = np.random.default_rng(7), []
    for i in range(draws):
        p, q = world(task, n, slope, rng)
        res.append(bootstrap_interval(measure, torch.tensor(p), torch.tensor(outcomes(q, task, rng)), n_boot=200, seed=i))
    return np.array(res).T


COVERAGE = [(nll, 'event', 1.5, 500, 1000), (nll, 'classes', 1.5, 1500, 1000), (brier_score, 'classes', 1.5, 500, 1000),
            (nll, 'labels', 1.15, 500, 1000), (smooth_calibration_error, 'event', 1.5, 1500, 400), (smooth_calibration_error, 'labels', 1.5, 500, 200)]
# of binned errors, most of all those that hardly stand out from luck or are means over many labels, the interval is wider than it need be
WIDE = [(calibration_error, 'event', 1.5, 500, 1000), (calibration_error, 'classes', 1.5, 500, 1000), (calibration_error, 'classes', 1.15, 500, 1000),
        (calibration_error, 'event', 1.15, 500, 1000), (calibration_error, 'labels', 1.5, 500, 1000), (classwise_calibration_error, 'classes', 1.5, 500, 1000)]


def covered(measure, task, slope, n, draws):
    low, high = intervals(measure, task, slope, n, draws)
    t = truth(measure, task, slope)
    return ((low <= t) & (t <= high)).mean()


@pytest.mark.slow
@pytest.mark.parametrize('case', COVERAGE, ids=lambda o: f'{o[0].__name__}-{o[1]}-{o[2]}')
def test_interval_holds_the_truth_as_often_as_it_says(case): assert .93 <= covered(*case) <= .97


@pytest.mark.slow
@pytest.mark.parametrize('case', WIDE, ids=lambda o: f'{o[0].__name__}-{o[1]}-{o[2]}')
def test_interval_holds_the_truth_at_least_as_often(case): assert .95 <= covered(*case)


@pytest.mark.slow
@pytest.mark.parametrize('measure, task, n, draws', [(calibration_error, 'event', 500, 1000), (calibration_error, 'classes', 500, 1000)],
                         ids=lambda o: getattr(o, '__name__', str(o)))
def test_interval_of_a_perfect_model_begins_at_0(measure, task, n, draws):
    assert (intervals(measure, task, 1., n, draws)[0] == 0).mean() >= .93


@pytest.mark.parametrize('measure, kw', [*FLOORS, (accuracy, {}), (calibration_error, dict(debias=True))],
                         ids=lambda o: getattr(o, '__name__', str(o)))
@pytest.mark.parametrize('slope', [1., 1.2, 3.])
def test_interval_is_seeded_widens_and_holds_the_value(measure, kw, slope):
    p, y = sample(150, 4, slope)
    interval = partial(bootstrap_interval, measure, p, y, n_boot=200, **kw)
    value = (p.argmax(1) == y).double().mean() if measure is accuracy else measure(p, y, **{k: v for k, v in kw.items() if k != 'debias'})
    assert interval(seed=3) == interval(seed=3)
    before = (value, value)
    for level in (.5, .8, .95, .99):
        low, high = interval(level=level)
        assert isinstance(low, float) and isinstance(high, float)
        assert low <= before[0]+1e-12 and high >= before[1]-1e-12
        before = low, high
    assert low < high
    assert interval(seed=4, level=.99) != before or low == 0 or measure is accuracy # whose interval has a formula


@pytest.mark.parametrize('confidence, accuracy, n', [(.9999, .99, 100), (.999, .98, 100), (.999, .975, 100), (1., .97, 40), (1., .92, 40), (.5, .98, 100),
                                                      (.95, .9, 20), (.98, .95, 50)])
@pytest.mark.parametrize('measure', [nll, brier_score, calibration_error])
def test_interval_of_one_confidence_holds_the_truth(measure, confidence, accuracy, n):
    "Exactly: over all numbers of right answers that there may be, each with its probability"
    p, q = torch.tensor([confidence], dtype=torch.double), accuracy
    right, wrong = (measure(p, tensor([o])).item() for o in (1, 0))
    true, held = abs(confidence-q) if measure is calibration_error else q*right + (1-q)*wrong, 0
    for k in range(n+1):
        low, high = bootstrap_interval(measure, p.expand(n), (torch.arange(n) < k).long()) if binom.pmf(k, n, q) > 1e-3 else (2, 2)
        held += binom.pmf(k, n, q)*(low <= true <= high)
    assert held >= .93


@pytest.mark.parametrize('measure', [calibration_error, smooth_calibration_error, classwise_calibration_error])
def test_interval_knows_of_what_did_not_happen(measure):
    "40 of 40 certain answers are right, or wrong: Clopper and Pearson's bound is .088"
    p = torch.ones(40, 1, dtype=torch.double)
    low, high = bootstrap_interval(measure, p, torch.ones(40, 1, dtype=torch.long))
    assert low == 0 and .04 < high < .09
    low, high = bootstrap_interval(measure, p, torch.zeros(40, 1, dtype=torch.long))
    assert .91 < low < .96 and 1-1e-6 < high <= 1


@pytest.mark.parametrize('groups', [None, torch.arange(40)//4])
def test_accuracy_of_labels_that_are_all_right_may_be_below_1(groups):
    low, high = bootstrap_interval(accuracy_multi, torch.full((40, 3), .9), torch.ones(40, 3, dtype=torch.long), groups=groups)
    assert (.91 if groups is None else .69) < low < (.99 if groups is None else .95) and high == 1 # Clopper and Pearson's bounds for one label


@pytest.mark.parametrize('measure, true', [(nll, .05635), (brier_score, .01229)])
def test_interval_of_rare_labels_holds_the_truth(measure, true):
    "The row that adds what was not seen doesn't raise the low end. `true` is over 3e6 rows, the labels replaced by their probability"
    held, g = 0, torch.Generator().manual_seed(1)
    for i in range(150):
        z = torch.randn(200, 5, generator=g)*2 - 6
        low, high = bootstrap_interval(measure, (1.3*z).sigmoid(), (torch.rand(200, 5, generator=g) < z.sigmoid()).long(), n_boot=200)
        held += low <= true <= high
    assert held >= .93*150


class Largest(TorchDispatchMode):
    "Numbers in the largest tensor that an operation gives"
    most = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if isinstance(res, torch.Tensor): self.most = max(self.most, res.untyped_storage().nbytes()//8)
        return res


def test_interval_of_many_classes_bounds_its_memory():
    p = torch.randn(60, 8000).softmax(1)
    with Largest() as largest: low, high = bootstrap_interval(classwise_calibration_error, p, torch.randint(8000, (60,)), n_boot=20)
    assert 0 <= low < high and largest.most <= 2**24


def test_labels_in_parts_have_the_interval_of_all():
    "600 labels are taken in parts, 40 at once: alike in all, the mean is that of each"
    p, y = sample(60, 4, 2., labels=True)
    few, many = (bootstrap_interval(calibration_error, p.repeat(1, k), y.repeat(1, k)) for k in (10, 150))
    near(few, many, atol=.01)


def test_interval_of_each_label():
    p, y = sample(80, 3, labels=True)
    for measure in MEASURES:
        res = bootstrap_interval(measure, p, y, average=None, n_boot=200)
        value = measure(p, y, average=None)
        assert len(res) == 3 and all(low <= v <= high for (low, high), v in zip(res, value))
        for k in range(3): assert res[k] == bootstrap_interval(measure, p[:, k], y[:, k], n_boot=200)
        low, high = bootstrap_interval(measure, p, y, average='worst', n_boot=200)
        assert low <= value.max() <= high
        assert len(bootstrap_interval(measure, p[:, 0], y[:, 0], average=None, n_boot=200)) == 2


def test_interval_of_one_row_and_of_no_error():
    for measure in MEASURES:
        low, high = bootstrap_interval(measure, tensor([.7]), tensor([1]), n_boot=200)
        assert low <= measure(tensor([.7]), tensor([1])) <= high
        assert bootstrap_interval(measure, torch.ones(20), torch.ones(20), n_boot=200)[0] == 0


def test_accuracy_has_an_interval_and_a_floor():
    "A perfect model's accuracy is its mean confidence"
    p, y = sample(400, 5)
    assert abs(null_floor(accuracy, p, y)[0] - p.max(1).values.mean()) < .005
    low, high = bootstrap_interval(accuracy, p, y)
    acc = (p.argmax(1) == y).double().mean()
    near([low, high], acc + torch.tensor([-1, 1])*1.96*(acc*(1-acc)/400).sqrt(), atol=.01)
    p, y = sample(400, 3, labels=True)
    low, high = bootstrap_interval(accuracy_multi, p, y)
    assert low < accuracy_multi(p, y, sigmoid=False) < high


@measured
@pytest.mark.parametrize('average', ['macro', 'worst'])
def test_rows_seen_twice_tell_nothing_more(measure, average):
    "Grouped, copies of the rows give the interval and the floor of the rows; ungrouped, a narrower one"
    p, y = sample(60, 4, 2., labels=True)
    twice, groups = (p.repeat(3, 1), y.repeat(3, 1)), torch.arange(60).repeat(3)
    once = bootstrap_interval(measure, p, y, average=average)
    near(bootstrap_interval(measure, *twice, average=average, groups=groups), once, atol=1e-3)
    low, high = bootstrap_interval(measure, *twice, average=average)
    assert high-low < .8*(once[1]-once[0])
    near(null_floor(measure, *twice, n_draws=50, average=average, groups=groups), null_floor(measure, p, y, n_draws=50, average=average), atol=1e-3)


def test_floor_of_classes_in_groups():
    p, y = sample(80, 5)
    near(null_floor(calibration_error, p.repeat(4, 1), y.repeat(4), n_draws=50, groups=torch.arange(80).repeat(4)),
         null_floor(calibration_error, p, y, n_draws=50), atol=1e-9)
    with pytest.raises(ValueError, match='each of the 80 rows'): null_floor(nll, p, y, groups=torch.arange(79))


def test_intervals_of_pixels_are_as_wide_as_those_of_images():
    "30 images, whose 200 pixels share their luck: perfectly calibrated, and the interval says that it may be"
    p = torch.full((30, 200), .7)
    y = (torch.rand(30, 1) < .7).long().expand(30, 200)
    images = torch.arange(30)[:, None].expand(30, 200)
    assert bootstrap_interval(calibration_error, p.flatten(), y.flatten(), groups=images.flatten())[0] == 0


@measured
def test_interval_of_the_worst_label_is_its_own(measure):
    p, y = sample(100, 4, labels=True)
    worst = measure(p, y, average=None).argmax()
    assert bootstrap_interval(measure, p, y, average='worst') == bootstrap_interval(measure, p[:, worst], y[:, worst])


def test_the_worst_accuracy_is_the_smallest():
    p, y = tensor([[.9, .9]]*4), tensor([[1, 0], [1, 0], [1, 1], [1, 0]])
    low, high = bootstrap_interval(accuracy_multi, p, y, average='worst')
    near((low, high), wilson(1, 4), atol=1e-12)


def test_accuracy_has_wilsons_interval():
    p, y = sample(40, 3)
    near(bootstrap_interval(accuracy, p, y), wilson((p.argmax(1) == y).sum().item(), 40), atol=1e-12)


@pytest.mark.parametrize('level', [0, 1, 95])
def test_levels_are_shares(level):
    for f in (bootstrap_interval, null_floor):
        with pytest.raises(ValueError, match=rf'level must be in \(0, 1\), got {level}'): f(nll, P3, Y3, level=level)


def test_names_of_metrics_tell_them_apart():
    assert [o.name for o in (ECE(), ECE(30), ECE(average='worst'), ClasswiseECE(10), NLL())] == [
        'calibration_error', 'calibration_error30', 'calibration_error_worst', 'classwise_calibration_error10', 'nll_loss']


def test_torch_s_losses_have_the_classes_of_images_along_axis_1():
    pred, targ = torch.randn(2, 4, 3, 4), torch.randint(4, (2, 3, 4))
    x, y, keep = prediction_rows(pred, targ, torch.nn.CrossEntropyLoss())
    near(F.cross_entropy(x, y), F.cross_entropy(pred, targ))
    soft = F.one_hot(targ, 4).movedim(-1, 1).float()
    near(F.cross_entropy(*prediction_rows(pred, soft, torch.nn.CrossEntropyLoss())[:2]), F.cross_entropy(pred, targ))
    with pytest.raises(TypeError, match='one tensor .* got a tuple'): prediction_rows((pred,), targ)


def with_axis(loss, axis):
    loss.axis = axis
    return loss


@pytest.mark.parametrize('shape, loss, axis', [
    ((5, 3), BCEWithLogitsLossFlat(), 1), ((5, 3, 2, 2), BCEWithLogitsLossFlat(), 1), ((5, 3, 2, 2, 2), F.binary_cross_entropy_with_logits, 1),
    ((5, 3, 2), BCEWithLogitsLossFlat(), None), ((5, 3, 2), nn.BCEWithLogitsLoss(), None), ((5, 3, 2, 2), BCEWithLogitsLossFlat(axis=2), 2),
    ((5, 3, 2), with_axis(LabelSmoothingBCEWithLogitsFlat(), -1), 2), ((5, 3, 2), with_axis(LabelSmoothingBCEWithLogitsFlat(), None), None),
    ((5, 3, 2, 2), with_axis(LabelSmoothingBCEWithLogitsFlat(), None), 1)], ids=lambda o: getattr(o, '__name__', str(o)))
@pytest.mark.parametrize('dtype', [torch.float32, torch.int64])
def test_where_labels_are(shape, loss, axis, dtype):
    "axis 1 of (N,K) and of images and volumes, one label in masks, and otherwise where a loss was told so; -1 is fastai's default"
    pred = torch.randn(shape)
    targ = (torch.rand(shape) < .5).to(dtype)
    x, y, keep = prediction_rows(pred, targ, loss)
    k = 1 if axis is None else shape[axis]
    for rows, o in (x, pred), (y, targ):
        assert rows.shape == (pred.numel()//k, k)
        if axis is None: assert torch.equal(rows.flatten(), o.flatten())
        else: assert all(torch.equal(rows[:, i], o.select(axis, i).flatten()) for i in range(k))
    assert keep.all() and keep.shape == x.shape[:1]


@pytest.mark.parametrize('x_shape, y_shape', [((4, 1, 3, 2), (4, 3, 2)), ((4, 3, 2), (4, 1, 3, 2)), ((4, 1), (4,)), ((4,), (4, 1))], ids=str)
def test_as_many_targets_as_predictions_are_labels(x_shape, y_shape):
    "Both fastai's and our sigmoid losses take them"
    pred, targ = torch.randn(x_shape), (torch.rand(y_shape) < .5).long()
    x, y, _ = prediction_rows(pred, targ, BCEWithLogitsLossFlat())
    assert x.shape == y.shape == ((4,) if x_shape == (4,) else (pred.numel(), 1))
    assert torch.equal(x.flatten(), pred.flatten()) and torch.equal(y.flatten(), targ.flatten())


class OneParameter(nn.Module):
    "Gives its input"
    def __init__(self): super().__init__(); self.one = nn.Parameter(torch.ones(()))
    def forward(self, x): return x*self.one


def as_is(x, y, loss, n_valid=None): return tensor_learner(tensor_dls(x, y, 10, n_valid), OneParameter(), loss)


@pytest.mark.parametrize('y_shape', [(30, 1, 16, 16), (30, 16, 16)], ids=str)
def test_columns_of_an_image_are_no_labels(y_shape):
    "Perfectly calibrated masks of one label: the error is that of all pixels, not the mean of 16 columns'"
    torch.manual_seed(0)
    x = torch.randn(30, 1, 16, 16)*2
    y = torch.bernoulli(x.sigmoid())
    learn = as_is(torch.cat([x, x]), torch.cat([y, y]).reshape(60, *y_shape[1:]), BCEWithLogitsLossFlat(), 30)
    learn.metrics = [NLL(), ECE()]
    loss, value, error = learn.validate()
    near(value, loss, 1e-6)
    near(error, calibration_error(x.sigmoid().flatten(), y.flatten()), 1e-6)
    assert error < .02


@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat(.1), fastai_losses.FocalLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy], ids=lambda o: getattr(o, '__name__', str(o)))
def test_a_softmax_over_one_class_is_always_right(loss):
    y_shape = (20,) if loss is F.cross_entropy or isinstance(loss, nn.Module) else (20, 1)
    learn = as_is(rows_of(20, 1), torch.zeros(y_shape, dtype=torch.long), loss, 10)
    learn.metrics = [m(act=partial(F.softmax, dim=-1)) for m in (NLL, Brier, ECE, ClasswiseECE, SmoothECE)]
    near(learn.validate(), [0]*6)


# ---------------------------------------------------------------- reliability

def wilson(k, n, z=1.959963984540054):
    mid, half = (k + z*z/2)/(n + z*z), z/(n + z*z)*math.sqrt(k*(n-k)/n + z*z/4)
    return max(0, mid-half), min(1, mid+half)


def test_binomial_interval_is_wilsons():
    for k, n in (0, 1), (1, 1), (0, 20), (3, 7), (500, 1000), (20, 20): near(binomial_interval(k, n), wilson(k, n), atol=1e-12)
    near(binomial_interval(3, 7, .9), wilson(3, 7, 1.6448536269514722), atol=1e-12)
    assert binomial_interval(0, 5)[0] == 0 and binomial_interval(5, 5)[1] == 1
    for k, n in (0, 0), (8, 7), (-1, 3):
        with pytest.raises(ValueError): binomial_interval(k, n)


def test_band_of_rows_seen_thrice_is_that_of_the_rows():
    p, y = sample(300, 4)
    once = reliability(p, y, min_n=20)
    thrice = reliability(p.repeat(3, 1), y.repeat(3), min_n=60, groups=torch.arange(300).repeat(3))
    near(thrice[['confidence', 'accuracy']], once[['confidence', 'accuracy']])
    wider = (thrice.high-thrice.low) / (once.high-once.low)
    assert (wider >= 1-1e-9).all() and (wider < 1.1).all()
    near(reliability(p, y, min_n=20, groups=torch.randperm(300)), once, atol=1e-12)


def shared_runs(rng):
    "300 images, as 3 models see them"
    z = rng.normal(size=(300, 1)) + .1*rng.normal(size=(300, 3)) + 1
    return sigmoid(z), np.broadcast_to(rng.random((300, 1)) < sigmoid(z.mean(1, keepdims=True)), (300, 3))


def pixels(rng):
    "20 images of 200 pixels, all of which are right or wrong as their image has luck"
    z = rng.normal(size=(20, 1)) + .7*rng.normal(size=(20, 200)) + 1
    return sigmoid(z), rng.random((20, 1)) < sigmoid(z)


@pytest.mark.parametrize('data, alone', [(shared_runs, .82), (pixels, .35)], ids=lambda o: getattr(o, '__name__', ''))
def test_band_of_dependent_rows_holds_the_truth(data, alone):
    "Of calibrated models, in 93% of the bins or more; taken for independent, the rows hold it in fewer than `alone`"
    rng, held = np.random.default_rng(3), ([], [])
    for _ in range(100):
        p, y = data(rng)
        images = torch.arange(len(p)).repeat_interleave(p.shape[1])
        for groups, o in zip((images, None), held):
            df = reliability(torch.tensor(p).flatten(), torch.tensor(y).flatten().long(), min_n=20, groups=groups)
            o += [*((df.low <= df.confidence) & (df.confidence <= df.high))]
    grouped, independent = map(np.mean, held)
    assert grouped >= .93 and independent < alone


def test_band_of_one_image_says_nothing_of_others():
    df = reliability(torch.full((50,), .9), torch.ones(50, dtype=torch.long), groups=torch.zeros(50))
    near(df[['low', 'high']], [[0, 1]], atol=1e-6)
    with pytest.raises(ValueError, match='each of the 50 rows'): reliability(torch.full((50,), .9), torch.ones(50, dtype=torch.long), groups=torch.arange(49))


@given(cases(), st.sampled_from([1, 4, 10, 16]), st.sampled_from(['width', 'mass']), st.integers(0, 30))
@some
def test_reliability_is_a_row_a_bin(case, n_bins, binning, min_n):
    "In order; merged from below until a bin has `min_n`, what is left over with the bin before"
    if task_of(*case) == 'labels': case = [o[0] for o in case[0]], [o[0] for o in case[1]]
    col, = columns(*case)
    bins = {}
    for o, b in zip(col, bins_of([p for p, _ in col], n_bins, binning)): bins.setdefault(b, []).append(o)
    merged, left = [], []
    for b in sorted(bins):
        left = left + bins[b]
        if len(left) >= min_n: merged, left = merged + [left], []
    if left: merged = [*merged[:-1], merged[-1] + left] if merged else [left]
    df = reliability(*as_tensors(*case), n_bins, binning, min_n)
    assert list(df.columns) == ['confidence', 'accuracy', 'low', 'high', 'n']
    assert list(df.n) == [len(o) for o in merged] and df.n.sum() == len(col)
    near(df.confidence, [np.mean([p for p, _ in o]) for o in merged])
    near(df.accuracy, [np.mean([y for _, y in o]) for o in merged])
    near(df[['low', 'high']], [wilson(sum(y for _, y in o), len(o)) for o in merged])
    assert ((df.low <= df.accuracy + 1e-12) & (df.accuracy <= df.high + 1e-12)).all()
    assert df.confidence.is_monotonic_increasing and (len(df) == 1 or df.n.min() >= min_n)


def test_reliability_leaves_out_nan_rows():
    df = reliability(*as_tensors([[.2, .8], [NAN, NAN], [.4, .6]], [1, 0, 0]))
    near(df[['confidence', 'accuracy', 'n']], [[.6, 0, 1], [.8, 1, 1]])
    for binning in ('width', 'mass'): assert reliability(tensor([.3, NAN, .9]), tensor([0, 1, 1]), binning=binning).n.sum() == 2


@pytest.mark.parametrize('binning', ['width', 'mass'])
def test_reliability_of_nan_alone_is_empty(binning):
    assert len(reliability(tensor([NAN, NAN]), tensor([0, 1]), binning=binning)) == 0


# ---------------------------------------------------------------- metrics

def metrics(average='macro', act=None):
    "Each metric with the function that it is"
    kw = dict(average=average, act=act)
    return [(NLL(**kw), nll), (Brier(**kw), brier_score), (ECE(**kw), calibration_error),
            (ECE(10, norm='l2', **kw), partial(calibration_error, n_bins=10, norm='l2')),
            (ECE(7, binning='mass', debias=True, **kw), partial(calibration_error, n_bins=7, binning='mass', debias=True)),
            (ClasswiseECE(**kw), classwise_calibration_error), (ClasswiseECE(5, norm='max', binning='mass', **kw),
             partial(classwise_calibration_error, n_bins=5, norm='max', binning='mass')), (SmoothECE(**kw), smooth_calibration_error)]


def is_what_the_functions_give(learn, average='macro', rows=lambda p, y: (p, y), act=None, inside=None):
    "`learn.validate()` and the functions on `get_preds`, brought into (N,K) and (N,) by `rows`"
    ms = metrics(average, act)
    learn.metrics = [m for m, _ in ms]
    got = learn.validate()[1:]
    p, y = rows(*learn.get_preds(act=inside))
    expected = [f(p, y, average=average) for _, f in ms]
    assert all(type(o) is float for o in got)
    near(got, expected, atol=2e-6)
    near(learn.validate()[1:], got, atol=1e-12)   # usable again
    return got


def rows_of(n, *shape, seed=0): return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def single(loss=None, n_valid=23, model=None, bs=8):
    "Several batches, the last one of 7"
    x, w = rows_of(60, 6), rows_of(6, 4, seed=1)
    return tensor_learner(tensor_dls(x, (x@w + rows_of(60, 4, seed=2)).argmax(1), bs, n_valid), ifnone(model, mlp(k=4)), ifnone(loss, CrossEntropyLossFlat()))


def multi(k=5, loss=None, dtype=torch.float32):
    y = (torch.rand(60, k, generator=torch.Generator().manual_seed(1)) < .4).to(dtype)
    return tensor_learner(tensor_dls(rows_of(60, 6), y, 8, 23), mlp(k=k), ifnone(loss, BCEWithLogitsLossFlat()))


@pytest.mark.parametrize('average', ['macro', 'worst'])
def test_metrics_of_one_label(average):
    values = is_what_the_functions_give(single(), average)
    assert len(set(values)) == len(values)


@pytest.mark.parametrize('loss', [fastai_losses.LabelSmoothingCrossEntropyFlat(eps=.3), LabelSmoothingCrossEntropyFlat(.3),
                                  CrossEntropyLossFlat(label_smoothing=.3)], ids=['fastai', 'ours', 'torch'])
def test_smoothing_losses_are_measured_on_hard_labels(loss):
    near(is_what_the_functions_give(single(loss)), is_what_the_functions_give(single()), atol=1e-12)


@pytest.mark.parametrize('average', ['macro', 'worst'])
@pytest.mark.parametrize('k', [1, 5])
def test_metrics_of_labels(average, k): is_what_the_functions_give(multi(k), average)


@pytest.mark.parametrize('y_shape', [(60,), (60, 1)], ids=str)
def test_metrics_of_one_logit(y_shape):
    "A sigmoid over one logit a row: the event, whatever the shape of the targets"
    y = (torch.rand(60, generator=torch.Generator().manual_seed(1)) < .4).float().reshape(y_shape)
    for model in (mlp(k=1), nn.Sequential(mlp(k=1), nn.Flatten(0))):
        learn = tensor_learner(tensor_dls(rows_of(60, 6), y, 8, 23), model, BCEWithLogitsLossFlat())
        is_what_the_functions_give(learn, rows=lambda p, y: (p.reshape(-1), y.reshape(-1)))


@pytest.mark.parametrize('ignore', [-100, 255])
def test_metrics_of_pixels(ignore):
    "(N,K,H,W): a row a pixel, without those that the loss ignores"
    y = torch.randint(3, (20, 4, 5), generator=torch.Generator().manual_seed(1))
    y[:, 0, :2] = ignore
    torch.manual_seed(0)
    learn = tensor_learner(tensor_dls(rows_of(20, 2, 4, 5), y, 3, 8), nn.Conv2d(2, 3, 1), CrossEntropyLossFlat(axis=1, ignore_index=ignore))
    def rows(p, y):
        p, y = p.movedim(1, -1).reshape(-1, 3), y.reshape(-1)
        assert (y == ignore).sum() == 16
        return p[y != ignore], y[y != ignore]
    is_what_the_functions_give(learn, rows=rows)


def test_metrics_where_nothing_is_left_are_None():
    y = torch.full((20, 4, 5), 255)
    learn = tensor_learner(tensor_dls(rows_of(20, 2, 4, 5), y, 3, 8), nn.Conv2d(2, 3, 1), CrossEntropyLossFlat(axis=1, ignore_index=255))
    learn.metrics = [m for m, _ in metrics()]
    assert list(learn.validate()[1:]) == [None]*len(learn.metrics)


def test_metrics_of_pixels_with_labels():
    "(N,K,H,W) with a target alike"
    y = (torch.rand(20, 3, 4, 5, generator=torch.Generator().manual_seed(1)) < .4).float()
    torch.manual_seed(0)
    learn = tensor_learner(tensor_dls(rows_of(20, 2, 4, 5), y, 3, 8), nn.Conv2d(2, 3, 1), BCEWithLogitsLossFlat(axis=1))
    is_what_the_functions_give(learn, rows=lambda p, y: [o.movedim(1, -1).reshape(-1, 3) for o in (p, y)])


def test_metrics_of_a_language_model():
    "(bs,seq,V): a row a token"
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 5, 3, generator=g), torch.randint(7, (40, 5), generator=g)
    torch.manual_seed(0)
    learn = tensor_learner(tensor_dls(x, y, 4, 14), nn.Linear(3, 7), CrossEntropyLossFlat())
    is_what_the_functions_give(learn, rows=lambda p, y: (p.reshape(-1, 7), y.reshape(-1)))


class To(nn.Module):
    def __init__(self, dtype): super().__init__(); self.dtype = dtype
    def forward(self, x): return x.to(self.dtype)


@pytest.mark.parametrize('m, f', metrics()[4:7:2], ids=['ece', 'classwise'])
def test_mass_bins_of_the_metric_keep_ties_together(m, f):
    "Rows with one probability are in one bin, whatever their outcome"

    x, y = torch.linspace(-3, 3, 10).repeat(40)[:, None], (torch.arange(400)[:, None] % 3 == 0).float()
    model = nn.Linear(1, 1)
    model.weight.data.fill_(1), model.bias.data.zero_()
    learn = tensor_learner(tensor_dls(x, y, 64, 200), model, BCEWithLogitsLossFlat())
    learn.metrics = m
    near(learn.validate()[1], f(x[200:].double().sigmoid(), y[200:]), atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_metrics_of_half_precision_logits(dtype):
    "Their softmax is taken in float64: rounding it would add an error of its own"
    learn = single(lambda p, y: F.cross_entropy(p.float(), y), model=nn.Sequential(mlp(k=4), To(dtype)))
    learn.loss_func.activation = partial(F.softmax, dim=-1)
    is_what_the_functions_give(learn, inside=noop, rows=lambda p, y: (p.double().softmax(-1), y))


def test_act_makes_the_probabilities():
    learn = single(F.cross_entropy)
    near(is_what_the_functions_give(learn, act=partial(F.softmax, dim=-1), inside=partial(F.softmax, dim=-1)), is_what_the_functions_give(single()), atol=1e-12)


@pytest.mark.parametrize('m', [NLL, Brier, ECE, ClasswiseECE, SmoothECE])
def test_a_loss_without_activation_is_named(m):
    learn = single(F.cross_entropy)
    learn.metrics = m()
    with pytest.raises(ValueError, match=rf'metric {m().name}: probs .*cross_entropy has no activation: pass act='), learn.no_bar(): learn.validate()


def test_targets_that_do_not_fit_are_named():
    learn = single()
    learn.metrics = NLL(act=lambda x: x.softmax(-1)[:, :2])
    with pytest.raises(ValueError, match='metric nll_loss'): learn.validate()


def test_names():
    learn = single()
    learn.metrics = [NLL(), Brier(), ECE(), ClasswiseECE(), SmoothECE()]
    learn.fit(1)
    assert learn.recorder.metric_names[3:8] == ['nll_loss', 'brier_loss', 'calibration_error', 'classwise_calibration_error', 'smooth_calibration_error']
    assert len(learn.recorder.values[0]) == 7 and all(map(math.isfinite, learn.recorder.values[0]))


ALL = [NLL, Brier, ECE, ClasswiseECE, SmoothECE]


@pytest.mark.parametrize('m', ALL)
def test_trackers_keep_the_lowest_value(m, tmp_path):
    "The first of three epochs, after which the model diverges; early stopping and the learning rate go by it too"
    def worse(learn):
        with torch.no_grad(): learn.model[-1].weight.mul_(-3)
    learn = single()
    learn.metrics, learn.path = m(), tmp_path
    name = m().name
    save, stop, plateau = SaveModelCallback(monitor=name), EarlyStoppingCallback(monitor=name, patience=3), ReduceLROnPlateau(monitor=name, patience=2)
    learn.fit(5, 1e-9, cbs=[Spy(worse, 'before_epoch'), save, stop, plateau])
    values = [o[2] for o in learn.recorder.values]
    assert len(values) == 4 and values[0] == min(values) < values[-1]
    assert learn.opt.hypers[-1]['lr'] == 1e-10
    near(learn.validate()[1], values[0])


@pytest.mark.parametrize('m', ALL)
def test_a_metric_without_parentheses(m):
    learn = single()
    learn.metrics = [accuracy, m]
    named = single()
    named.metrics = [accuracy, m()]
    near(learn.validate(), named.validate())
    assert learn.metrics[1].name == m().name


@pytest.mark.parametrize('bad', [NAN, math.inf, -math.inf])
@pytest.mark.parametrize('kw', [{}, dict(binning='mass')], ids=str)
@pytest.mark.parametrize('m', ALL)
def test_ignored_rows_may_hold_anything(m, kw, bad):
    "In p=randn(4,3), p[1]=nan, t=[0,-100,1,2] the others count"
    if kw and m not in (ECE, ClasswiseECE): return
    x, y = rows_of(4, 3), tensor([0, -100, 1, 2])
    others, x[1] = [0, 2, 3], bad
    learn = as_is(torch.cat([x, x]), torch.cat([y, y]), CrossEntropyLossFlat(), 4)
    learn.metrics = m(**kw)
    expected = dict(metrics_by_name)[type(learn.metrics[0])]
    loss, value = learn.validate()
    near(value, expected(x[others].double().softmax(1), y[others], **kw), 1e-9)
    if m is NLL: near(value, loss, 1e-6)


metrics_by_name = list(zip(ALL, MEASURES))


@pytest.mark.parametrize('loss, y, act', [(nn.BCEWithLogitsLoss(), (rows_of(60, 4) > 0).float(), 'torch.sigmoid'), (F.cross_entropy, torch.arange(60) % 4, r'partial\(F.softmax, dim=1\)')], ids=['labels', 'classes'])
def test_the_advice_for_logits_is_of_their_task(loss, y, act):
    learn = as_is(3*rows_of(60, 4), y, loss, 20)
    learn.metrics = NLL()
    word = act.removeprefix('torch.') if 'sigmoid' in act else 'softmax'
    with pytest.raises(ValueError, match=rf'apply {word} to logits first .* has no activation: pass act={act}\)'), learn.no_bar(): learn.validate()
    learn.metrics = NLL(act=torch.sigmoid if word == 'sigmoid' else partial(F.softmax, dim=1))
    near(*learn.validate(), atol=1e-6)


def held(m): return len(pickle.dumps(m))


@pytest.mark.parametrize('m', [NLL(), Brier(), ECE(), ClasswiseECE(norm='max'), SmoothECE()], ids=lambda o: o.name)
def test_state_does_not_grow(m):
    "With the number of batches or rows: sums alone are kept"
    sizes = []
    for n in (8, 200):
        learn = single()
        learn.metrics = m
        x = rows_of(n, 6)
        learn.validate(dl=tensor_dls(torch.cat([x, x]), torch.zeros(2*n, dtype=torch.long), 4, n).valid)
        sizes.append(held(m))
    assert abs(sizes[0]-sizes[1]) < 100


def test_nothing_seen_is_None():
    for m, _ in metrics():
        m.reset()
        assert m.value is None


def test_reset_forgets():
    learn = single()
    for m, _ in metrics():
        learn.metrics = m
        once = learn.validate()[1]
        m.reset()
        assert m.value is None
        near(learn.validate()[1], once, atol=1e-12)


@pytest.mark.parametrize('mixed', [False, True])
def test_train_metrics(mixed):
    "Under MixUp the hard labels of the batch are measured, as they are"
    learn = single(bs=10)
    learn.metrics = [NLL(), ECE(binning='mass'), SmoothECE()]
    learn.recorder.train_metrics = True
    learn.fit(2, cbs=MixUp() if mixed else None)
    assert len(learn.recorder.values) == 2
    for o in learn.recorder.values: assert len(o) == 8 and all(map(math.isfinite, o))
    learn.recorder.train_metrics = False
    is_what_the_functions_give(learn)   # and MixUp has gone


def test_a_diverged_model_gives_nan():
    for learn in (single(), multi()):
        for p in learn.model.parameters(): p.data.fill_(NAN)
        learn.metrics = [NLL(), Brier(), ECE(), ECE(binning='mass'), ClasswiseECE(), SmoothECE()]
        assert all(map(math.isnan, learn.validate()[1:]))


def test_metrics_pickle(tmp_path):
    learn = quiet(tabular_learner(tabular_dls(tabular_frame()), layers=[4], metrics=[m for m, _ in metrics()], path=tmp_path))
    with learn.no_logging(): learn.fit(1)
    learn.export('m.pkl')
    loaded = load_learner(tmp_path/'m.pkl')
    assert [m.name for m in loaded.metrics] == [m.name for m in learn.metrics]
    near(quiet(loaded).validate(dl=learn.dls.valid)[1:], learn.validate()[1:], atol=1e-6)


# ---------------------------------------------------------------- two processes

def shared_learner():
    "157 validation rows: the ranks get 79 and 78 of them, and one twice; some are ignored, and nan"
    x, w = rows_of(189, 6), rows_of(6, 4, seed=1)
    y = (x@w + 2*rows_of(189, 4, seed=2)).argmax(1)
    x[40::7], y[40::7] = NAN, -100
    learn = quiet(Learner(tensor_dls(x, y, 16, 157), mlp(k=4), loss_func=CrossEntropyLossFlat(), opt_func=SGD))
    learn.metrics = [m for m, _ in metrics()]
    return learn


def ranked():
    fastai_on_cpu()
    learn = shared_learner()
    with learn.distrib_ctx(sync_bn=False): learn.fit(1, lr=0.)
    return [*learn.recorder.values[-1][2:]]


@needs_distributed
def test_two_processes_measure_what_one_does():
    "Exactly, with rows that do not come out even"
    pytest.importorskip('accelerate')
    from fastai import distributed   # noqa: F401  before the fork
    one = shared_learner().validate()[1:]
    assert all(map(math.isfinite, one))
    for values in in_processes(2, ranked): near(values, one, atol=1e-6)


def test_null_floor_checks_groups_also_where_training_diverged():
    with pytest.raises(ValueError, match='groups must'): null_floor(nll, torch.tensor([math.nan]), torch.tensor([0]), groups=torch.tensor([]))
