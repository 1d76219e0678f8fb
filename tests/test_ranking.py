"Risk-coverage curves and the area under them, beside loops over rows, orders and samples in which the truth is known."
import itertools, math, statistics
from fractions import Fraction

import matplotlib.figure, pytest
from hypothesis import given, strategies as st
from scipy.stats import norm

import fuzz
from helpers import *
from test_measures import BAD_PROBS, MESSAGES, WITH_NAN, as_tensors, averaged, averages, cases, columns, drawn, near, sample, some
from test_intervals import BAD_GROUPS
from fastai_smooth.intervals import *
from fastai_smooth.measures import *
from fastai_smooth.pictures import *
from fastai_smooth.ranking import *

# ---------------------------------------------------------------- the formulas, row by row

def decided(probs, targs):
    "[(confidence, is it wrong?)] of each label; of classes and events, of one"
    def of(p, y): return (max(p, 1-p), int((p > .5) != y))
    if isinstance(probs[0], list) and not isinstance(targs[0], list): return [[(p, 1-y) for p, y in columns(probs, targs)[0]]]
    return [[of(p, y) for p, y in col] for col in columns(probs, targs)]

def area_reference(col):
    "The mean of the error among the k surest, where of `group` equally sure ones, `wrong` of them wrong, one more is wrong/group of an error"
    errors, risks = Fraction(0), []
    for confidence in sorted({c for c, _ in col}, reverse=True):
        group = [w for c, w in col if c == confidence]
        for _ in group:
            errors += Fraction(sum(group), len(group))
            risks.append(errors/(len(risks) + 1))
    return float(sum(risks)/len(risks))

def area_in_order(wrong): return statistics.mean(sum(wrong[:k])/k for k in range(1, len(wrong) + 1))
def perfect_reference(col): return area_in_order(sorted(w for _, w in col))

def curve_reference(col):
    return [(len(o)/len(col), sum(w for _, w in o)/len(o), c) for c in sorted({c for c, _ in col}, reverse=True) if (o := [(p, w) for p, w in col if p >= c])]

@given(cases(), averages)
@some
def test_area_and_the_perfect_one_are_the_formulas(case, average):
    cols, res = decided(*case), aurc(*as_tensors(*case), average=average, n_boot=2)
    areas, perfect = [area_reference(o) for o in cols], [perfect_reference(o) for o in cols]
    near(res.aurc, averaged(areas, average))
    near(RiskCoverageArea()(*as_tensors(*case), average=average), res.aurc, 1e-15)
    near(res.perfect, perfect[areas.index(max(areas))] if average == 'worst' else averaged(perfect, average))
    assert np.all(np.array(res.perfect) <= np.array(res.aurc) + 1e-12) and np.all(np.array(res.low) <= res.aurc) and np.all(np.array(res.high) >= res.aurc)

@given(st.lists(st.tuples(st.sampled_from([.6, .7, .9]), st.integers(0, 1)), min_size=1, max_size=6))
@some
def test_equally_sure_rows_count_as_the_mean_of_their_orders(rows):
    orders = [[w for _, w in o] for o in itertools.permutations(rows) if all(a[0] >= b[0] for a, b in zip(o, o[1:]))]
    near(RiskCoverageArea()(*as_tensors([c for c, _ in rows], [1-w for _, w in rows])), statistics.mean(map(area_in_order, orders)))

@given(cases())
@some
def test_curve_is_the_formula(case):
    "Of labels all decisions are in one"
    near(risk_coverage(*as_tensors(*case))[['coverage', 'risk', 'confidence']], curve_reference(sum(decided(*case), [])))

@given(cases(), st.randoms(use_true_random=False))
@some
def test_order_of_rows_plays_no_part(case, random):
    rows = list(zip(*case))
    random.shuffle(rows)
    (p, y), (q, z) = as_tensors(*case), as_tensors(*map(list, zip(*rows)))
    assert RiskCoverageArea()(p, y) == RiskCoverageArea()(q, z)
    assert risk_coverage(p, y).equals(risk_coverage(q, z))

@pytest.mark.parametrize('n, wrong', [(1, 0), (1, 1), (7, 0), (7, 3), (7, 7), (300, 45)])
def test_perfect_ranking_is_reached_and_no_other_is_better(n, wrong):
    sure, y = torch.linspace(.99, .51, n, dtype=torch.double), (torch.arange(n) < n-wrong).long()
    res = aurc(sure, y, n_boot=2)
    near(res.aurc, res.perfect, 1e-15)
    for seed in range(20): assert aurc(sure, y[torch.randperm(n, generator=torch.Generator().manual_seed(seed))], n_boot=2).aurc >= res.perfect - 1e-15
    near(aurc(sure, y.flip(0), n_boot=2).perfect, res.perfect, 1e-15)   # errors first
    near(aurc(torch.full((n,), .9), y, n_boot=2).aurc, wrong/n)   # all equally sure

def test_known_values():
    "Two errors in five, in the second place and the last: 0, 1/2, 1/3, 1/4, 2/5"
    p, y = as_tensors([.99, .9, .8, .7, .6], [1, 0, 1, 1, 0])
    near(aurc(p, y)[:1], (1/2 + 1/3 + 1/4 + 2/5)/5), near(aurc(p, y).perfect, (1/4 + 2/5)/5)
    near(aurc(1-p, 1-y).aurc, aurc(p, y).aurc)   # sure of no
    near(aurc(torch.stack([p, 1-p], 1), 1-y).aurc, aurc(p, y).aurc)   # as two classes

# ---------------------------------------------------------------- the two questions to a curve

@given(cases(), st.floats(.001, 1), st.floats(0, 1))
@some
def test_questions_to_a_curve(case, coverage, risk):
    curve, col = risk_coverage(*as_tensors(*case)), sum(decided(*case), [])
    points = curve_reference(col)
    near(coverage_at(curve, risk), max([c for c, r, _ in points if r <= risk], default=0))
    for c, r, _ in points: near(risk_at(curve, c), r)
    (a, ra), (b, rb) = next(o for o in itertools.pairwise([(0, 0), *((c, r) for c, r, _ in points)]) if o[0][0] < coverage <= o[1][0] + 1e-12)
    near(risk_at(curve, coverage), (a*ra + (coverage-a)/(b-a)*(b*rb - a*ra))/coverage)   # of equally sure ones a part
    near(risk_at(curve, 0), points[0][1])

def test_an_empty_curve_has_no_risk():
    curve = risk_coverage(*WITH_NAN['one_row'])
    assert not len(curve) and math.isnan(risk_at(curve, .5)) and coverage_at(curve, .5) == 0

def test_nan():
    "of the area gives nan, also where a label is; of the curve it is left out"
    for p, y in WITH_NAN.values(): assert all(map(math.isnan, aurc(p, y, average='worst'))) and RiskCoverageArea()(p, y).isnan()
    p, y = WITH_NAN['labels']
    assert [math.isnan(o) for o in aurc(p, y, average=None).high] == [False, True]
    near(risk_coverage(p, y), [[1/3, 0, .9], [2/3, 0, .9], [1, 1/3, .7]], 1e-6)

# ---------------------------------------------------------------- how often the interval holds the truth

def ranked(n, slope, intercept, seed):
    "Rows that are right with a probability of sigmoid(intercept + slope*z), z standard normal, as sure as z is large"
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    return torch.tensor(.5 + .5/(1 + np.exp(-z))), torch.tensor((rng.random(n) < 1/(1 + np.exp(-intercept - slope*z))).astype(int))

# (error, slope) -> intercept, and the area: the mean over u of log(1/u) times the error at rank u, integrated
RANKED = {(.03, 0): (3.4761, .03), (.03, 1): (3.9301, .01137), (.03, 2): (5.0918, .00422), (.2, 0): (1.3863, .2), (.2, 1): (1.6497, .0945), (.2, 2): (2.2285, .05332)}

@pytest.mark.parametrize('error, slope', RANKED)
def test_the_true_areas_are_true(error, slope):
    intercept, area = RANKED[error, slope]
    u = (np.arange(200_000) + .5)/200_000
    wrong = 1/(1 + np.exp(intercept + slope*norm.ppf(1-u)))
    near([wrong.mean(), (wrong*-np.log(u)).mean()], [error, area], 2e-4)

def held(n, error, slope, draws, n_boot=200):
    intercept, area = RANKED[error, slope]
    found = [aurc(*ranked(n, slope, intercept, i), n_boot=n_boot, seed=i) for i in range(draws)]
    return np.mean([o.low <= area <= o.high for o in found])

@pytest.mark.parametrize('error, slope', RANKED)
def test_interval_holds_the_truth(error, slope):
    "in 95% of draws: 49 or fewer of 60 has a probability below .001"
    assert held(200, error, slope, 60) >= 50/60

@pytest.mark.long
@pytest.mark.parametrize('error, slope', RANKED)
@pytest.mark.parametrize('n', [200, 2500])
def test_interval_holds_the_truth_as_often_as_it_says(error, slope, n):
    """Where errors are few or ranked well it is wider than it need be, as an unseen one might rank first. Of 1000 draws 920 or fewer have a
    probability below .0001 where it is 95%"""
    assert held(n, error, slope, 1000, 500) > .92

@pytest.mark.parametrize('groups, least', [(None, .031), (torch.arange(100)//5, .1)])
def test_no_errors_seen_rule_none_out(groups, least):
    "Clopper and Pearson's bound for 0 of 100 is .036, for 0 of 20 .168; an unseen error may rank first"
    low, high = aurc(torch.linspace(.51, 1, 100), torch.ones(100).long(), groups=groups)[1:3]
    assert low == 0 and least < high < 3*least
    low, high = aurc(torch.linspace(.51, 1, 100), torch.zeros(100).long(), groups=groups)[1:3]
    assert 1 - 3*least < low < 1 - least/3 and high == 1

def grouped(groups, seed):
    "20 rows a group, which are right or wrong together"
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(groups, 1)) + .7*rng.normal(size=(groups, 20))
    return torch.tensor(.5 + .5/(1 + np.exp(-z))).flatten(), torch.tensor((rng.random((groups, 1)) < 1/(1 + np.exp(-2 - z))).astype(int)).flatten()

def test_interval_of_dependent_rows_holds_the_truth():
    "Taken for independent they hold it in fewer than half"
    area, which = aurc(*grouped(100_000, 10**6), n_boot=1).aurc, torch.arange(60).repeat_interleave(20)
    def share(groups): return np.mean([low <= area <= high for low, high in (aurc(*grouped(60, i), n_boot=200, groups=groups)[1:3] for i in range(60))])
    assert share(which) >= 50/60 and share(None) < .6

# ---------------------------------------------------------------- seeds, labels, groups, many rows

@pytest.mark.parametrize('labels', [False, True])
def test_interval_is_seeded_and_widens_with_level(labels):
    p, y = sample(150, 3, labels=labels)
    assert aurc(p, y, seed=3) == aurc(p, y, seed=3) != aurc(p, y, seed=4)
    before = aurc(p, y).aurc, aurc(p, y).aurc
    for level in (.5, .95, .99):
        low, high = aurc(p, y, level=level)[1:3]
        assert low <= before[0] and high >= before[1] and low < high
        before = low, high

def test_each_label_has_its_own():
    p, y = sample(80, 3, labels=True)
    each = [aurc(p[:, k], y[:, k], n_boot=50) for k in range(3)]
    assert list(zip(*aurc(p, y, average=None, n_boot=50))) == each and aurc(p, y, average='worst', n_boot=50) == max(each)
    assert aurc(p[:, :1], y[:, :1], average=None, n_boot=50) == each[0]
    macro = aurc(p, y)
    near([macro.aurc, macro.perfect], [np.mean([o.aurc for o in each]), np.mean([o.perfect for o in each])])
    assert macro.high - macro.low < np.mean([o.high - o.low for o in each])

def test_labels_that_are_alike_have_the_interval_of_one():
    "They are right or wrong as their row, but for the row that is added"
    p, y = sample(3000)
    one, three = aurc(p, y), aurc(p[:, None].repeat(1, 3), y[:, None].repeat(1, 3))
    near(three, one, .1*(one.high - one.low))

def test_rows_seen_thrice_tell_nothing_more():
    p, y = sample(300, 4)
    thrice, groups, once = (p.repeat(3, 1), y.repeat(3)), torch.arange(300).repeat(3), aurc(p, y)
    near(aurc(*thrice, groups=groups), once, .1*(once.high - once.low))
    low, high = aurc(*thrice)[1:3]
    assert high - low < .7*(once.high - once.low)

def test_many_rows_in_batches_and_cells_have_the_interval_of_their_bootstrap():
    "20,000 rows, beside weights for each row and ranks of their own"
    p, y = ranked(20_000, 1, 1.6497, 0)
    wrong, g = (y[p.argsort(descending=True)] == 0).double(), torch.Generator().manual_seed(0)
    areas = []
    for _ in range(300):
        w = torch.empty(20_000, dtype=torch.double).exponential_(generator=g)
        areas.append(((w*wrong).cumsum(0)/w.cumsum(0)*w).sum()/w.sum())
    low, high = np.quantile(areas, [.025, .975])
    near(aurc(p, y)[1:3], (low, high), .15*(high-low))

def test_if_calibrated_takes_it():
    "and a calibrated model has it"
    p, y = sample(2000, slope=1.)
    mean, upper = if_calibrated(RiskCoverageArea(), p, y, n_draws=100)
    assert aurc(p, y).low < mean < aurc(p, y).high and mean < upper and RiskCoverageArea()(p, y) < upper*1.1
    with pytest.raises(TypeError, match='RiskCoverageArea is no sum'): bootstrap_interval(RiskCoverageArea(), p, y)
    with pytest.raises(TypeError, match='not known'): if_calibrated(RiskCoverageArea(), p, y, n_bins=3)

# ---------------------------------------------------------------- the picture

def test_picture():
    "The share that can be decided is in the legend, and a dot on the curve; the best ranking is dotted"
    curves = {k: risk_coverage(*ranked(800, slope, 1.6497, 0)) for k, slope in (('good', 2), ('poor', .2))}
    ax = matplotlib.figure.Figure().subplots()
    draw_risk_coverage(ax, curves)
    for line, dots, style, (label, curve) in zip(ax.lines, ax.collections, method_styles(list(curves)).values(), curves.items()):
        x, y = line.get_data()
        near(y, [risk_at(curve, o) for o in x])
        shares = [coverage_at(curve, o) for o in (.01, .05)]
        near(dots.get_offsets(), [(shares[0], .01), (shares[1], .05)])
        assert line.get_label() == f'{label}: {shares[0]:.1%} can be decided at 1% error, {shares[1]:.1%} at 5%'
        assert (line.get_color(), line.get_linestyle(), line.get_marker()) == tuple(style.values())
    x, y = ax.lines[-1].get_data()
    wrong = round(800*curves['good'].risk.iloc[-1])
    near(y, [max(0, 800*o - 800 + wrong)/(800*o) for o in x])
    assert ax.lines[-1].get_linestyle() == ':' and len(ax.lines) == 3 and ax.get_ylim()[1] < .5

def test_all_dots_are_whole():
    "That of 5%, too, where the error is smaller at any coverage"
    ax = matplotlib.figure.Figure().subplots()
    draw_risk_coverage(ax, {'good': risk_coverage(torch.full((200,), .9), (torch.arange(200) > 1).long())})
    dots = ax.collections[0]
    assert dots.get_offsets()[1].tolist() == [1, .05] and ax.get_ylim()[1] > .05 and not dots.get_clip_on()

# ---------------------------------------------------------------- what comes in

@pytest.mark.parametrize('f', [risk_coverage, aurc])
def test_what_is_wrong_is_named(f):
    for probs, targs, message in MESSAGES:
        with pytest.raises(ValueError, match=message): f(probs, targs)

CURVE, BAD_SHARE = risk_coverage(*sample(20)), [-.1, 1.1, fuzz.NAN, '.5', None, [.5], True]

@st.composite
def arguments(draw):
    a = draw(drawn(average=averages, level=st.floats(.05, .95), seed=st.sampled_from([0, -1, 2**63-1]), n_boot=st.sampled_from([1, 5])))
    return a | dict(groups=fuzz.randint(draw, 3, len(a['probs'])))

dtypes = dict(probs=fuzz.FLOATS, targs=fuzz.INTEGERS)
TABLE = dict(aurc=fuzz.Row(aurc, arguments(), BAD_PROBS | dict(average=fuzz.BAD_AVERAGE, level=fuzz.BAD_LEVEL, seed=fuzz.BAD_SEED, n_boot=fuzz.BAD_COUNT, groups=BAD_GROUPS),
                           dtypes | dict(groups=fuzz.INTEGERS + fuzz.FLOATS)),
             risk_coverage=fuzz.Row(risk_coverage, drawn(), BAD_PROBS, dtypes),
             risk_at=fuzz.Row(risk_at, st.just(dict(curve=CURVE, coverage=.5)), dict(coverage=BAD_SHARE)),
             coverage_at=fuzz.Row(coverage_at, st.just(dict(curve=CURVE, risk=.1)), dict(risk=BAD_SHARE)))
test_refuses, test_takes = fuzz.both_tests(TABLE, subclasses=(TensorBase, TensorCategory))
