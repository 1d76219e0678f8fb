"What measures would be if perfectly calibrated, and intervals: beside simulations in which the truth is known, and exact coverage."
import math

import pytest
from hypothesis import given, strategies as st
from scipy.stats import binom
from torch.utils._python_dispatch import TorchDispatchMode

import fuzz
from helpers import *
from test_measures import (BAD_BINS, BAD_PROBS, MEASURES, MESSAGES, NAN, WITH_NAN, as_tensors, averages, binned, cases, columns, drawn, each_measure,
                           near, sample, some, task_of)
from fastai_smooth.intervals import *
from fastai_smooth.measures import *

EXPECTED = [(nll, {}), (brier_score, {}), (calibration_error, dict(binning='mass', n_bins=8)), (calibration_error, dict(norm='l2', debias=True)),
          (calibration_error, dict(norm='max', n_bins=4)), (classwise_calibration_error, {}), (smooth_calibration_error, {})]
SHAPES = dict(event={}, classes=dict(k=10), labels=dict(k=3, labels=True))
each_expected = pytest.mark.parametrize('measure, kw', EXPECTED, ids=lambda o: getattr(o, '__name__', str(o)))

def drawn_from(p, task):
    "Outcomes of a perfectly calibrated model"
    return torch.multinomial(p, 1)[:, 0] if task == 'classes' else torch.bernoulli(p).long()

def wilson(k, n, z=1.959963984540054):
    mid, half = (k + z*z/2)/(n + z*z), z/(n + z*z)*math.sqrt(k*(n-k)/n + z*z/4)
    return max(0, mid-half), min(1, mid+half)

# ---------------------------------------------------------------- if_calibrated

@each_expected
@pytest.mark.parametrize('task', SHAPES)
def test_if_calibrated_is_what_a_simulation_gives(measure, kw, task):
    "Labels drawn from the model's own probabilities: mean and upper quantile to the error of 100 draws"
    if measure is smooth_calibration_error and task != 'event': return   # is slow, and no other there
    p, y = sample(80, **SHAPES[task])
    seen = np.array([measure(p, drawn_from(p, task), average='worst', **kw).item() for _ in range(100)])
    mean, upper = (o.item() for o in if_calibrated(measure, p, torch.zeros_like(y), level=.9, n_draws=100, average='worst', **kw))
    assert abs(mean-seen.mean()) < 4*seen.std()*math.sqrt(2/100)
    assert (seen <= upper+1e-9).mean() > .77 and (seen < upper-1e-9).mean() < .99 and mean < upper

def test_if_calibrated_is_seeded_and_grows_with_level():
    p, y = sample(100, 4)
    a, b, c = (if_calibrated(calibration_error, p, y, n_draws=100, seed=s) for s in (3, 3, 4))
    assert a == b != c and if_calibrated(calibration_error, p, torch.zeros_like(y), n_draws=100, seed=3) == a
    uppers = [if_calibrated(calibration_error, p, y, level=level, n_draws=100)[1] for level in (.5, .8, .95, .99)]
    assert uppers == sorted(uppers) and len(set(uppers)) == 4
    assert [o.shape for o in if_calibrated(calibration_error, *sample(50, 3, labels=True), average=None, n_draws=20)] == [(3,), (3,)]

def test_a_perfect_model_s_accuracy_is_its_mean_confidence():
    "and rows that are drawn together have the value of one of them"
    p, y = sample(400, 5)
    assert abs(if_calibrated(accuracy, p, y)[0] - p.max(1).values.mean()) < .005
    near(if_calibrated(accuracy, p.repeat(2, 1), y.repeat(2), n_draws=50, groups=torch.arange(400).repeat(2)), if_calibrated(accuracy, p, y, n_draws=50), 1e-9)

@each_measure
def test_nan_gives_nan(measure):
    for p, y in WITH_NAN.values(): assert all(math.isnan(o) for o in (*if_calibrated(measure, p, y, n_draws=20), *bootstrap_interval(measure, p, y, n_boot=20)))

@each_measure
def test_half_precision_is_taken(measure):
    for p in (torch.full((6, k), 1/k).to(dtype) for k in (3, 7) for dtype in (torch.float16, torch.bfloat16)):
        assert all(map(math.isfinite, (*if_calibrated(measure, p, torch.arange(6) % 3, n_draws=20), *bootstrap_interval(measure, p, torch.arange(6) % 3, n_boot=20))))

# ---------------------------------------------------------------- bootstrap_interval: how often it holds the truth

# (task, slope) of `sample` -> measure: what it is on all rows, as seen on 3 million of them whose outcomes are replaced by their probability
TRUTH = {('event', 1.15): {calibration_error: .02122}, ('event', 1.5): {nll: .54874, calibration_error: .06114, smooth_calibration_error: .06053},
         ('labels', 1.15): {nll: .52961}, ('labels', 1.5): {calibration_error: .06114, smooth_calibration_error: .06053}, ('classes', 1.15): {calibration_error: .04557},
         ('classes', 1.5): {nll: 1.70010, brier_score: .73176, calibration_error: .13372, classwise_calibration_error: .02943}}
CASES = [(measure, task, slope) for (task, slope), o in TRUTH.items() for measure in o]
each_case = pytest.mark.parametrize('measure, task, slope', CASES, ids=[f'{f.__name__}-{task}-{slope}' for f, task, slope in CASES])

def intervals(measure, task, slope, n, draws):
    return np.array([bootstrap_interval(measure, *sample(n, slope=slope, seed=i, **SHAPES[task]), n_boot=200, seed=i) for i in range(draws)]).T

def covered(measure, task, slope, n, draws):
    (low, high), t = intervals(measure, task, slope, n, draws), TRUTH[task, slope][measure]
    return ((low <= t) & (t <= high)).mean()

@pytest.mark.long
@each_case
def test_interval_holds_the_truth_as_often_as_it_says(measure, task, slope):
    "Of binned errors, most of all those that hardly stand out from sampling error, and of errors that are means over labels, it is wider than it need be"
    smooth = measure is smooth_calibration_error
    wide = measure in MEASURES[2:4] or smooth and task == 'labels'
    assert .93 <= covered(measure, task, slope, 500, 300 if smooth else 1000) <= (1 if wide else .97)

@each_case
def test_interval_holds_the_truth(measure, task, slope):
    "in 95% of draws: 33 or fewer of 40 has a probability of .003"
    if measure is not smooth_calibration_error: assert covered(measure, task, slope, 300, 40) > 33/40

def test_interval_of_a_perfect_model_begins_at_0(): assert (intervals(calibration_error, 'classes', 1., 300, 60)[0] == 0).mean() >= .86

@pytest.mark.parametrize('confidence, accuracy, n', [(.9999, .99, 100), (.999, .975, 100), (1., .92, 40), (.5, .98, 100), (.95, .9, 20), (.98, .95, 50)])
@pytest.mark.parametrize('measure', [nll, brier_score, calibration_error])
def test_interval_of_one_confidence_holds_the_truth(measure, confidence, accuracy, n):
    "Exactly: over all numbers of right answers that there may be, each with its probability"
    p, q = torch.tensor([confidence], dtype=torch.double), accuracy
    right, wrong = (measure(p, tensor([o])).item() for o in (1, 0))
    true, held = abs(confidence-q) if measure is calibration_error else q*right + (1-q)*wrong, 0
    for k in (k for k in range(n+1) if binom.pmf(k, n, q) > 1e-3):
        low, high = bootstrap_interval(measure, p.expand(n), (torch.arange(n) < k).long())
        held += binom.pmf(k, n, q)*(low <= true <= high)
    assert held >= .93

@pytest.mark.parametrize('measure', MEASURES[2:])
def test_interval_knows_of_what_did_not_happen(measure):
    "40 of 40 certain answers are right, or wrong: Clopper and Pearson's bound is .088"
    p = torch.ones(40, 1, dtype=torch.double)
    low, high = bootstrap_interval(measure, p, torch.ones(40, 1, dtype=torch.long))
    assert low == 0 and .08 < high < .09
    low, high = bootstrap_interval(measure, p, torch.zeros(40, 1, dtype=torch.long))
    assert .91 < low < .96 and 1-1e-6 < high <= 1

@pytest.mark.parametrize('groups', [None, torch.arange(40)//4])
def test_accuracy_of_labels_that_are_all_right_may_be_below_1(groups):
    "Clopper and Pearson's bounds for one label are .91 for 40, .69 for 10"
    low, high = bootstrap_interval(accuracy_multi, torch.full((40, 3), .9), torch.ones(40, 3, dtype=torch.long), groups=groups)
    assert (.91 if groups is None else .69) < low < (.99 if groups is None else .95) and high == 1

def test_interval_of_rare_labels_holds_the_truth():
    "The row that adds what was not seen doesn't raise the low end. The truth is over 3e6 rows, the labels replaced by their probability"
    held, g = 0, torch.Generator().manual_seed(1)
    for i in range(60):
        z = torch.randn(200, 5, generator=g)*2 - 6
        low, high = bootstrap_interval(nll, (1.3*z).sigmoid(), (torch.rand(200, 5, generator=g) < z.sigmoid()).long(), n_boot=200)
        held += low <= .05635 <= high
    assert held >= 52

# ---------------------------------------------------------------- bootstrap_interval: seeds, labels, groups, memory

@pytest.mark.parametrize('measure, kw', [*EXPECTED, (accuracy, {}), (calibration_error, dict(debias=True))], ids=lambda o: getattr(o, '__name__', str(o)))
@pytest.mark.parametrize('slope', [1., 3.])
def test_interval_is_seeded_widens_with_level_and_holds_the_value(measure, kw, slope):
    p, y = sample(80, 4, slope)
    interval = partial(bootstrap_interval, measure, p, y, n_boot=200, **kw)
    value = (p.argmax(1) == y).double().mean() if measure is accuracy else measure(p, y, **{k: v for k, v in kw.items() if k != 'debias'})
    assert interval(seed=3) == interval(seed=3)
    before = value, value
    for level in (.5, .95, .99):
        low, high = interval(level=level)
        assert isinstance(low, float) and isinstance(high, float) and low <= before[0]+1e-12 and high >= before[1]-1e-12
        before = low, high
    assert low < high and (interval(seed=4, level=.99) != before or low == 0 or measure is accuracy)   # whose interval has a formula

def test_accuracy_has_wilsons_interval():
    p, y = sample(40, 3)
    near(bootstrap_interval(accuracy, p, y), wilson((p.argmax(1) == y).sum().item(), 40), 1e-12)
    p, y = tensor([[.9, .9]]*4), tensor([[1, 0], [1, 0], [1, 1], [1, 0]])
    near(bootstrap_interval(accuracy_multi, p, y, average='worst'), wilson(1, 4), 1e-12)   # the smallest

def test_binomial_interval_is_wilsons():
    for k, n in (0, 1), (1, 1), (0, 20), (3, 7), (500, 1000), (20, 20): near(binomial_interval(k, n), wilson(k, n), 1e-12)
    near(binomial_interval(3, 7, .9), wilson(3, 7, 1.6448536269514722), 1e-12)

@each_measure
def test_interval_of_each_label_is_its_own(measure):
    p, y = sample(60, 3, labels=True)
    each = [bootstrap_interval(measure, p[:, k], y[:, k], n_boot=50) for k in range(3)]
    assert bootstrap_interval(measure, p, y, average=None, n_boot=50) == each
    assert bootstrap_interval(measure, p, y, average='worst', n_boot=50) == each[measure(p, y, average=None).argmax()]
    assert bootstrap_interval(measure, p[:, 0], y[:, 0], average=None, n_boot=50) == each[0]

@each_measure
@pytest.mark.parametrize('average', ['macro', 'worst'])
def test_rows_seen_thrice_tell_nothing_more(measure, average):
    "Grouped, copies of the rows give the interval of the rows, and their value if perfectly calibrated; ungrouped, a narrower one"
    p, y = sample(40, 3, 2., labels=True)
    thrice, groups, kw = (p.repeat(3, 1), y.repeat(3, 1)), torch.arange(40).repeat(3), dict(average=average, n_boot=200)
    once = bootstrap_interval(measure, p, y, **kw)
    near(bootstrap_interval(measure, *thrice, groups=groups, **kw), once, 1e-3)
    low, high = bootstrap_interval(measure, *thrice, **kw)
    assert high-low < .85*(once[1]-once[0])
    kw = dict(average=average, n_draws=20)
    near(if_calibrated(measure, *thrice, groups=groups, **kw), if_calibrated(measure, p, y, **kw), 1e-3)

class Largest(TorchDispatchMode):
    "Numbers in the largest tensor that an operation gives"
    most = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if isinstance(res, torch.Tensor): self.most = max(self.most, res.untyped_storage().nbytes()//8)
        return res

def test_interval_of_many_classes_bounds_its_memory():
    with Largest() as largest: low, high = bootstrap_interval(classwise_calibration_error, torch.randn(60, 8000).softmax(1), torch.randint(8000, (60,)), n_boot=20)
    assert 0 <= low < high and largest.most <= 2**24

def test_labels_in_parts_have_the_interval_of_all():
    "600 labels are taken in parts, 40 at once: alike in all, the mean is that of each"
    p, y = sample(60, 4, 2., labels=True)
    near(*(bootstrap_interval(calibration_error, p.repeat(1, k), y.repeat(1, k), n_boot=300) for k in (10, 150)), .015)

# ---------------------------------------------------------------- reliability

@given(cases(), st.sampled_from([1, 4, 10, 16]), st.sampled_from(['width', 'mass']), st.integers(0, 30))
@some
def test_reliability_is_a_row_a_bin(case, n_bins, binning, min_n):
    "In order; merged from below until a bin has `min_n`, what is left over with the bin before"
    if task_of(*case) == 'labels': case = [o[0] for o in case[0]], [o[0] for o in case[1]]
    col, = columns(*case)
    merged, left = [], []
    for rows in binned(col, n_bins, binning):
        left = left + rows
        if len(left) >= min_n: merged, left = merged + [left], []
    if left: merged = [*merged[:-1], merged[-1] + left] if merged else [left]
    df = reliability(*as_tensors(*case), n_bins, binning, min_n)
    assert list(df.columns) == ['confidence', 'accuracy', 'low', 'high', 'n'] and list(df.n) == [len(o) for o in merged]
    near(df.confidence, [np.mean([p for p, _ in o]) for o in merged])
    near(df[['accuracy', 'low', 'high']], [(np.mean([y for _, y in o]), *wilson(sum(y for _, y in o), len(o))) for o in merged])

def test_band_of_rows_seen_thrice_is_that_of_the_rows():
    p, y = sample(300, 4)
    once, thrice = reliability(p, y, min_n=20), reliability(p.repeat(3, 1), y.repeat(3), min_n=60, groups=torch.arange(300).repeat(3))
    near(thrice[['confidence', 'accuracy']], once[['confidence', 'accuracy']])
    wider = (thrice.high-thrice.low) / (once.high-once.low)
    assert (wider >= 1-1e-9).all() and (wider < 1.1).all()
    near(reliability(p, y, min_n=20, groups=torch.randperm(300)), once, 1e-12)

def shared_runs():
    "300 images, as 3 models see them"
    z = torch.randn(300, 1) + .1*torch.randn(300, 3) + 1
    return z.sigmoid(), (torch.rand(300, 1) < z.mean(1, keepdim=True).sigmoid()).expand(300, 3)

def pixels():
    "20 images of 200 pixels, all of which are right or wrong together"
    z = torch.randn(20, 1) + .7*torch.randn(20, 200) + 1
    return z.sigmoid(), torch.rand(20, 1) < z.sigmoid()

@pytest.mark.parametrize('data, alone', [(shared_runs, .82), (pixels, .35)], ids=lambda o: getattr(o, '__name__', ''))
def test_band_of_dependent_rows_holds_the_truth(data, alone):
    "Of calibrated models, in 93% of the bins or more; taken for independent, the rows hold it in fewer than `alone`"
    held = [], []
    for _ in range(100):
        p, y = data()
        for groups, o in zip((torch.arange(len(p)).repeat_interleave(p.shape[1]), None), held):
            df = reliability(p.flatten(), y.flatten().long(), min_n=20, groups=groups)
            o += [*((df.low <= df.confidence) & (df.confidence <= df.high))]
    grouped, independent = map(np.mean, held)
    assert grouped >= .93 and independent < alone

def test_band_of_one_image_says_nothing_of_others():
    near(reliability(torch.full((50,), .9), torch.ones(50, dtype=torch.long), groups=torch.zeros(50))[['low', 'high']], [[0, 1]], 1e-6)

def test_reliability_leaves_out_nan():
    near(reliability(*as_tensors([[.2, .8], [NAN, NAN], [.4, .6]], [1, 0, 0]))[['confidence', 'accuracy', 'n']], [[.6, 0, 1], [.8, 1, 1]])
    for binning in ('width', 'mass'):
        assert reliability(tensor([.3, NAN, .9]), tensor([0, 1, 1]), binning=binning).n.sum() == 2
        assert len(reliability(tensor([NAN, NAN]), tensor([0, 1]), binning=binning)) == 0

# ---------------------------------------------------------------- what comes in

@pytest.mark.parametrize('f', [partial(bootstrap_interval, nll), partial(if_calibrated, brier_score), reliability], ids=['bootstrap_interval', 'if_calibrated', 'reliability'])
def test_what_is_wrong_is_named(f):
    for probs, targs, message in MESSAGES:
        with pytest.raises(ValueError, match=message): f(probs, targs)

BAD_GROUPS = [lambda a: torch.zeros(len(a['probs'])+1), lambda a: torch.zeros(2*len(a['probs']), 2), lambda a: torch.zeros(len(a['probs'])).to('meta'), torch.zeros(0), 3, 'ab', object()]
BAD = BAD_PROBS | dict(level=fuzz.BAD_LEVEL, groups=BAD_GROUPS)
OF = BAD | dict(measure=[None, 'nll', lambda a: F.cross_entropy, lambda a: error_rate, 3, [nll]], seed=fuzz.BAD_SEED, average=fuzz.BAD_AVERAGE, n_bin=[3]) # no measure has that option
dtypes = dict(probs=fuzz.FLOATS, targs=fuzz.INTEGERS, groups=fuzz.INTEGERS + fuzz.FLOATS)
level = st.floats(.05, .95)

@st.composite
def grouped(draw, tasks=('event', 'classes', 'labels'), **options):
    a = draw(drawn(tasks, level=level, **options))
    return a | dict(groups=fuzz.randint(draw, 3, len(a['probs'])))

TABLE = dict(if_calibrated=fuzz.Row(if_calibrated, grouped(measure=st.sampled_from(MEASURES), average=averages, seed=st.sampled_from([0, -1, 2**63-1]), n_draws=st.sampled_from([1, 5])),
                                 OF | dict(n_draws=fuzz.BAD_COUNT), dtypes, tol=1e-4),
             bootstrap_interval=fuzz.Row(bootstrap_interval, grouped(measure=st.sampled_from(MEASURES), average=averages, seed=st.sampled_from([0, -1, 2**63-1]), n_boot=st.sampled_from([1, 5])),
                                         OF | dict(n_boot=fuzz.BAD_COUNT), dtypes, tol=1e-4),
             reliability=fuzz.Row(reliability, grouped(('event', 'classes'), n_bins=st.integers(1, 20), min_n=st.integers(0, 5)),
                                  BAD | {o: BAD_BINS[o] for o in ('n_bins', 'binning')} | dict(min_n=['x', None, [1], NAN], probs=[lambda a: dict(probs=torch.rand(5, 3), targs=torch.ones(5, 3))]), dtypes),
             binomial_interval=fuzz.Row(binomial_interval, st.integers(1, 99).flatmap(lambda n: st.fixed_dictionaries(dict(k=st.integers(0, n), n=st.just(n), level=level))),
                                        dict(k=[-1, NAN, math.inf, 'x', None, lambda a: a['n'] + 1], n=[0, -1, NAN, math.inf, 'x', None], level=fuzz.BAD_LEVEL)))
test_refuses, test_takes = fuzz.both_tests(TABLE, subclasses=(TensorBase, TensorCategory))
