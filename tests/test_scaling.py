"The best temperature of logits, plain or normalised, how sure it is, and what it does to rows it was not fitted to: SPEC section 6."
import math, pickle

import fuzz, pytest
from fuzz import Row
from hypothesis import given as drawing, settings, strategies as st
from given import *

from fastai_smooth.scaling import *
from fastai_smooth.scaling import fitted, fitted_form

examples = partial(settings, deadline=None, derandomize=True)
D, INF = torch.float64, math.inf

def same(a, b):
    a, b = (torch.as_tensor(o).detach().as_subclass(Tensor) for o in (a, b))
    assert a.dtype == b.dtype and torch.equal(a, b)

KINDS = dict(classes=(5, False), labels=(4, True), events=(0, True))
kinds = pytest.mark.parametrize('kind', KINDS)
def of_kind(kind, n=400, **kwargs): return drawn(n, KINDS[kind][0], multi=KINDS[kind][1], **kwargs)

# ---------------------------------------------------------------- best_temperature

@kinds
@drawing(seed=st.integers(0, 10**6), log_t=st.floats(-2, 2), log_scale=st.floats(-2, 3), n=st.integers(30, 120))
@examples(max_examples=8)
def test_best_temperature_is_the_minimum_of_the_nll(kind, seed, log_t, log_scale, n):
    z, y = of_kind(kind, n=n, t=math.exp(log_t), scale=math.exp(log_scale), seed=seed)
    t = best_temperature(z, y)
    if t is None: return
    expected = best_by_search(z, y)
    assert mean_nll(z/t, y) <= mean_nll(z/expected, y) + 1e-9
    if expected < 100: near(math.log(t), math.log(expected), 1e-4)
    for c in 1e-2, 400., 1e4: near(best_temperature(z*c, y)/c/t, 1, 1e-6)

@drawing(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1, max_size=8), st.integers(0, 3**8), st.booleans())
@examples(max_examples=40)
def test_never_worse_than_no_temperature(rows, code, multi):
    "whatever the rows are, ever so few"
    z, y = torch.tensor(rows, dtype=D), torch.tensor([code // 3**i % 3 for i in range(len(rows))])
    if multi: y = F.one_hot(y, 3)
    t = best_temperature(z, y)
    if t is not None: assert 0 < t < INF and mean_nll(z/t, y) <= mean_nll(z, y) + 1e-12

def test_none_where_there_is_no_best_one():
    "every row right; nothing told; worse than chance; not finite"
    z, y = drawn(50, 4)
    for logits, targs in (z, z.argmax(1)), (z, (z > 0).double()), (z[:, 0], (z[:, 0] > 0).double()), (torch.zeros(50, 4), y), (torch.ones(50, 4), y), (z, z.argmin(1)), (-z, (z > 0).double()):
        assert best_temperature(logits, targs) is temperature_interval(logits, targs) is None
    for bad in math.nan, INF:
        z[3, 2] = bad
        assert best_temperature(z, y) is best_temperature(z, F.one_hot(y, 4)) is None

def test_rows_that_tell_nothing_have_no_say():
    "be they most of all"
    z, y = drawn(100, 3, t=2.)
    near(best_temperature(torch.cat([0*z, z, 0*z]), y.repeat(3)), best_temperature(z, y))

def test_masked_classes_are_left_out():
    "-inf, as softmax has it, or so low that they have no rows"
    z, y = drawn(400, 3, t=2.)
    for low in -INF, -300.:
        wide = torch.cat([z, torch.full((400, 2), low, dtype=D)], 1)
        near([best_temperature(wide, y), best_temperature(wide.flip(1), 4-y)], best_temperature(z, y), 1e-9)

def test_masked_labels_are_left_out():
    "at -inf, a label that is not there costs nothing; one that is costs inf at any temperature: there is no best one"
    z, y = drawn(300, 3, t=2.5, multi=True)
    masked, absent = torch.cat([z, torch.full_like(z[:, :1], -INF)], 1), torch.cat([y, torch.zeros(300, 1)], 1)
    near(row_nll(masked, absent), row_nll(z, y)*3/4, 1e-9)
    near(best_temperature(masked, absent), best_temperature(z, y), 1e-6)
    near(temperature_interval(masked, absent), temperature_interval(z, y), 1e-3)
    absent[0, 3] = 1
    assert row_nll(masked, absent)[0] == INF and best_temperature(masked, absent) is temperature_interval(masked, absent) is None
    assert row_nll(z, torch.full_like(y, math.nan)).isnan().all()

# ---------------------------------------------------------------- temperature_interval

@kinds
@pytest.mark.parametrize('n, t', [(12, 1.), (200, 2.)])
def test_interval_of_the_likelihood_ratio(kind, n, t):
    "all T with a NLL less than 1.92/N above the best one's, as a dense grid in numpy has them; of labels, each an interval of its own"
    z, y = of_kind(kind, n=n, t=t)
    for z, y in zip(z.T, y.T) if kind == 'labels' else [(z, y)]:
        grid = np.exp(np.linspace(math.log(.02), math.log(50), 2001))
        values = np.array([mean_nll(z/t, y) for t in grid])
        inside = grid[values < values.min() + 1.9207/n]
        near(np.log(temperature_interval(z, y)), np.log(inside[[0, -1]]), 6e-3)

def test_ends_that_the_data_do_not_limit():
    "two rows, one of them right: any T above some; one image says nothing of others"
    low, high = temperature_interval(tensor([[3., 0.], [2.5, 0.]]), tensor([0, 1]))
    assert 0 < low < 1 and high == INF
    z, y, _ = drawn_pixels(1, 50, 0)
    y[::3] = (y[::3]+1) % 4
    assert temperature_interval(z, y, torch.zeros(50)) == (0., INF)

def drawn_labels(n, k, seed, together):
    "Labels of sigmoid(z/2), those of a row all with the same random number or each with its own"
    g = torch.Generator().manual_seed(seed)
    z, u = 3*torch.randn(n, k, generator=g, dtype=D), torch.rand(n, 1 if together else k, generator=g, dtype=D)
    return z, (u < (z/2).sigmoid()).double()

COVERED = dict(rows=lambda i: drawn(30, 5, t=2., seed=i), labels=lambda i: drawn_labels(100, 5, i, False),
               labels_together=lambda i: drawn_labels(40, 10, i, True), pixels=lambda i: drawn_pixels(50, 20, i))

@pytest.mark.parametrize('n, least', [(25, 20), pytest.param(100, 86, marks=pytest.mark.long)])
@pytest.mark.parametrize('name', COVERED)
def test_intervals_hold_the_truth(name, n, least):
    "2, in 95% of draws: fewer than 86 of 100, or 20 of 25, has probability .0004 or .0012"
    found = [temperature_interval(*COVERED[name](i)) for i in range(n)]
    assert sum(o is None or o[0] <= 2 <= o[1] for o in found) >= least

def test_rows_that_are_copies_count_once():
    "their interval is as wide as that of the rows"
    (z, y), n = drawn(1000, 4, t=2.), 1000
    copies = z.repeat(3, 1), y.repeat(3), torch.arange(n).repeat(3)
    near(np.log(temperature_interval(*copies)), np.log(temperature_interval(z, y)), .01)
    assert temperature_interval(*copies[:2])[0] > temperature_interval(z, y)[0] + .03

@pytest.mark.parametrize('n, before, after', [(5, .3, .1), (20, .1, .11), (200, 0., .01)])
def test_few_rows_do_no_harm(n, before, after):
    "calibrated logits of 10 classes: the share of fits that cost more than .05 nats on new rows, with the best T and with the one that is used"
    (new_z, new_y), cost = drawn(2000, 10, seed=10**6), []
    for seed in range(50):
        fit = fitted(*drawn(n, 10, seed=seed))
        cost.append([mean_nll(new_z/t, new_y) - mean_nll(new_z, new_y) > .05 for t in (fit.best or 1., fit.used)])
    best, used = np.mean(cost, axis=0)
    assert best >= before and used <= after

# ---------------------------------------------------------------- cross_fitted

@kinds
def test_each_row_is_divided_by_a_temperature_of_other_rows(kind):
    "rows with the same T are a fold, the same ones each time, and T is the best of all others; random states are left alone"
    (z, y), rng = of_kind(kind, n=103, t=3.), torch.get_rng_state()
    ts = (z/cross_fitted(z, y)).view(103, -1)[:, 0]
    folds = [((ts-t).abs() < 1e-7).nonzero()[:, 0] for t in {round(t, 7) for t in ts.tolist()}]
    assert len(folds) == 5 and sum(map(len, folds)) == 103 and max(map(len, folds)) <= 21
    for idx in folds:
        others = torch.ones(103, dtype=torch.bool)
        others[idx] = False
        near(ts[idx], best_by_search(z[others], y[others]), 1e-4)
    same(torch.get_rng_state(), rng), same(cross_fitted(z, y), cross_fitted(z, y))
    assert not torch.equal(cross_fitted(z, y), cross_fitted(z, y, seed=1))

@pytest.mark.parametrize('n', [1, 2, 3, 6])
def test_fewer_rows_than_folds(n):
    z, y = drawn(n, 3)
    res = cross_fitted(z, y)
    assert res.shape == z.shape and res.isfinite().all() and (z/res > 0).all()
    same(cross_fitted(z, z.argmax(1)), z)   # nothing can be fitted

@pytest.mark.parametrize('n_groups', [20, 4])
def test_rows_of_a_group_are_in_one_part(n_groups):
    "all of them have a temperature that was fitted to the rows of other groups"
    z, y, image = drawn_pixels(n_groups, 16, 0)
    ts = (z/cross_fitted(z, y, groups=image + 7)).mean(1)
    parts = {round(o, 7) for o in ts.tolist()}
    assert len(parts) == min(5, n_groups)
    for t in parts:
        rows = (ts-t).abs() < 1e-7
        assert not set(image[rows].tolist()) & set(image[~rows].tolist())
        near(t, best_by_search(z[~rows], y[~rows]), 1e-4)

# ---------------------------------------------------------------- normalised logits

NORMS = 1, 2, 3, 4, 6
def log_probs(z, p, s): return (s*normalized(z, p)).log_softmax(1)

def best_of_norms(z, y):
    "T and p with the least NLL, by search"
    found = [(best_by_search(o, y), p, o) for p in NORMS for o in [normalized(z, p)]]
    return min(((t, p) for t, p, o in found), key=lambda o: mean_nll(normalized(z, o[1])/o[0], y))

@st.composite
def rows_of_logits(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)):
    "With ties, close ones, offsets of whole rows, and masked classes, of which each row has one at least that is not"
    k, dtype = draw(st.integers(1, 11)), draw(st.sampled_from(dtypes))
    value = st.one_of(st.floats(-20, 20, width=16), st.sampled_from([0., 1., 1 + 2**-10, 1 + 2**-20, 1e-30, -300., -3e4, -INF]))
    z = tensor(draw(st.lists(st.lists(value, min_size=k, max_size=k), min_size=1, max_size=5)), dtype=D)
    z = z + draw(st.sampled_from([0., 0., 64., -1e4]))
    z[:, draw(st.integers(0, k-1))].clamp_(min=-6e4)
    return z.to(dtype)

temperatures = st.builds(NormalizedTemperature, st.floats(.01, 1e3), st.sampled_from([*NORMS, 2.5]))

@drawing(rows_of_logits((D, torch.float32)), temperatures, st.sampled_from([1, -1, -2]))
@examples(max_examples=150)
def test_apply_temperature_is_the_formula(z, t, axis):
    "along any axis; logits are shifted so that the largest is 0, and close ones kept apart by a few units in the last place"
    x = torch.stack([z, z], 1 if axis == -1 else 2)   # (n,2,k) or (n,k,2)
    res = apply_temperature(x, t, axis)
    assert res.dtype == x.dtype and res.amax(axis).eq(0).all() and torch.equal(res == -INF, x == -INF)
    tol = 1e-3 if z.dtype == torch.float32 else 1e-6
    for o in res.unbind(1 if axis == -1 else 2): near(o.double().softmax(1), log_probs(z, t.p, t.s).exp(), tol)

@drawing(rows_of_logits(), temperatures)
@examples(max_examples=300)
def test_the_largest_stay_the_largest(z, t):
    "be it by one bit; those that were equal stay equal"
    probs = apply_temperature(z, t).softmax(1)
    assert torch.equal(probs == probs.amax(1, keepdim=True), z == z.amax(1, keepdim=True)) and torch.equal(probs.argmax(1), z.argmax(1))
    assert probs.dtype == (D if z.dtype == D else torch.float32) and (probs[z == -INF] == 0).all() and probs.isfinite().all()

def test_rows_that_have_no_shape():
    "all alike: uniform over what is not masked; all masked or nan: nan, as of softmax; of any size, without overflow"
    t = NormalizedTemperature(10, 3)
    near(apply_temperature(tensor([[7., 7, 7, 7], [-INF, 7, 7, -INF], [2., -INF, -INF, -INF]]), t).softmax(1), [[.25]*4, [0, .5, .5, 0], [1, 0, 0, 0]])
    for bad in [-INF]*3, [1., math.nan, 2.], [1., INF, 2.]: assert apply_temperature(tensor([bad, [1., 2., 4.]]), t).softmax(1).isnan().all(1).tolist() == [True, False]
    x = tensor([[1., 2., 4.], [-3., 0., 2.]])
    for scale in 1e-30, 1e30: near(apply_temperature(x*scale, t), apply_temperature(x, t), 1e-4)
    assert apply_temperature(torch.empty(0, 3), t).shape == (0, 3)

def test_a_plain_temperature_divides():
    z = torch.randn(2, 3)
    same(apply_temperature(z, 3.), z/3), same(apply_temperature(z, tensor([1., 2., 3.])), z/tensor([1., 2., 3.]))

def test_normalized_temperature_is_its_formula():
    t = NormalizedTemperature(14.36, 6)
    assert repr(t) == str(t) == f'{t}' == 'softmax(14.36 * (x - mean x) / |x - mean x|_6)' and t == NormalizedTemperature(14.36, 6)
    one = NormalizedTemperature(1, 2)
    assert one != 1. and 1. != one and not one == 1. and one != NormalizedTemperature(1, 3) and one not in (1., 2.) and len({one, NormalizedTemperature(1, 2), 1.}) == 2
    for o in deepcopy(t), copy(t), *(pickle.loads(pickle.dumps(t, i)) for i in range(pickle.HIGHEST_PROTOCOL+1)):
        assert o == t and type(o) is NormalizedTemperature and (o.s, o.p) == (14.36, 6)

def test_normalized_temperature_is_no_number():
    "it would lose its norm, and plain logits, divided by it, would be silently wrong"
    t, z = NormalizedTemperature(10., 3), torch.randn(2, 3)
    assert not isinstance(t, float) and not is_listy(t)
    for f in (lambda: z/t, lambda: z.numpy()/t, lambda: 1/t, lambda: t*1, lambda: round(t), lambda: float(t), lambda: math.log(t), lambda: f'{t:.2f}'):
        with pytest.raises(TypeError): f()
    with pytest.raises(AttributeError): t.s = 2.

def test_cross_fitted_normalises_by_other_rows():
    "T and p of each part are the best of all others; the parts are those of the plain form"
    z, y = drawn_by_shape(203, 5)
    ts, res = (z/cross_fitted(z, y, seed=3)).mean(1), cross_fitted(z, y, seed=3, normalize=True)
    for t in {round(o, 7) for o in ts.tolist()}:
        rows = (ts-t).abs() < 1e-7
        best, p = best_of_norms(z[~rows], y[~rows])
        near(res[rows].log_softmax(1), log_probs(z[rows], p, 1/best), 1e-3)
    assert cross_fitted(z.half(), y, normalize=True).dtype == torch.half

# ---------------------------------------------------------------- which form

def test_the_form_is_chosen_by_what_the_size_of_a_row_says():
    "nothing: normalised, with the best T and p; as much as it seems to: plain"
    z, y = drawn_by_shape(500, 5)
    fit, (t, p) = fitted_form(z, y), best_of_norms(z, y)
    assert isinstance(fit.used, NormalizedTemperature) and fit.used == fit.best and fit.used.p == p
    near(math.log(fit.used.s), -math.log(t), 1e-4), near(np.log(fit.interval), -np.log(temperature_interval(normalized(z, p), y)[::-1]), 1e-3)
    assert fit.interval[0] < fit.used.s < fit.interval[1]   # of s, as it is shown
    near([fit.compared.plain, fit.compared.normalized], [row_nll(cross_fitted(z, y, normalize=o), y).mean() for o in (False, True)])
    plain = fitted(z, y)
    assert vars(fitted_form(z, y, normalize=False)) == vars(plain) | dict(compared=None) and type(plain.used) is float
    y = torch.multinomial(z.softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    fit = fitted_form(z, y)
    assert type(fit.used) is float and fit.compared.plain < fit.compared.normalized
    assert (fit.best, fit.interval, fit.used) == tuple(vars(fitted(z, y)).values())

@pytest.mark.parametrize('n, most', [(4, 0), (20, .05), (60, .05)])
def test_few_rows_stay_plain(n, most):
    "of calibrated logits, whose best form is the plain one"
    assert np.mean([isinstance(fitted_form(*drawn(n, 5, seed=seed)).used, NormalizedTemperature) for seed in range(40)]) <= most

def test_rows_of_a_group_are_no_more_evidence_than_one():
    "copies that are said to be copies change nothing; taken for new rows, they make sure of anything"
    z, y = drawn_by_shape(60, 5, spread=.3)
    many, group = (z.repeat_interleave(20, 0), y.repeat_interleave(20)), torch.arange(60).repeat_interleave(20)
    assert not any(isinstance(o.used, NormalizedTemperature) for o in (fitted_form(z, y), fitted_form(*many, group)))
    assert isinstance(fitted_form(*many).used, NormalizedTemperature)

@drawing(st.integers(0, 10**6), st.integers(3, 6), st.integers(1, 40), st.floats(-3, 3), st.sampled_from([None, True]))
@examples(max_examples=40)
def test_no_form_is_worse_than_no_temperature(seed, k, n, log_t, normalize):
    "on the rows it was fitted to; decisions are the same"
    z, y = drawn(n, k, t=math.exp(log_t), seed=seed)
    t = fitted_form(z, y, normalize=normalize).used
    scaled = apply_temperature(z, t)
    assert mean_nll(scaled, y) <= mean_nll(z, y) + 1e-12 and torch.equal(scaled.argmax(1), z.argmax(1))

def test_normalised_where_that_is_worse():
    "than T=1, at any temperature: plain, even where it was asked for; so where nothing can be fitted"
    z = drawn(300, 5)[0]
    z = z*torch.where(torch.arange(300) % 2 == 0, .01, 3.)[:, None]
    y = torch.multinomial(z.softmax(1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    assert min(mean_nll(normalized(z, p)/best_by_search(normalized(z, p), y), y) for p in NORMS) > mean_nll(z, y)
    assert type(fitted_form(z, y, normalize=True).used) is float
    for targs in z.argmax(1), z.argmin(1): assert fitted_form(z, targs, normalize=True).best is None and fitted_form(z, targs).used == 1.

def test_a_sample_chooses_and_all_rows_are_fitted():
    z, y = drawn_by_shape(70_000, 3)
    t = fitted_form(z, y, normalize=True).used
    near(1/t.s, best_temperature(apply_temperature(z, NormalizedTemperature(1, t.p)), y), 1e-9)

def test_an_interval_without_ends():
    "of few rows: any s is possible"
    z, y = drawn_by_shape(10, 5)
    assert fitted_form(z, y, torch.zeros(10), normalize=True).interval == (0., INF)

@pytest.mark.parametrize('k, why', [(1, 'all rows of 1 are the same'), (2, 'all rows of 2 are the same')])
def test_what_normalises_to_nothing_is_refused(k, why):
    "and taken as it is where nobody insists"
    z, y = drawn(50, k, t=2.)
    for f in cross_fitted, fitted_form:
        with pytest.raises(ValueError, match=why): f(z, y, normalize=True)
    assert fitted_form(z, y).compared is None

@pytest.mark.parametrize('kind', ['labels', 'events'])
def test_labels_are_not_normalised(kind):
    z, y = of_kind(kind)
    for f in cross_fitted, fitted_form:
        with pytest.raises(ValueError, match='labels have a sigmoid each, and there is no row to normalise'): f(z, y, normalize=True)
    assert fitted_form(z, y).compared is None

# ---------------------------------------------------------------- bad and odd arguments

@st.composite
def scores(draw, kind, **options):
    z = (fuzz.rand(draw, *(12, 3)[:1 + (kind != 'events')]) - .5)*8
    return dict(logits=z, targs=fuzz.randint(draw, 3, 12) if kind == 'classes' else (fuzz.rand(draw, *z.shape) < .5).float(), **options)

BAD = {'logits': [*fuzz.NOT_TENSORS, *fuzz.no_values('logits')], 'logits or targs': [lambda a: a['logits'][1:], lambda a: a['logits'][None, None], torch.tensor(1.)],
       'targs': [*fuzz.NOT_TENSORS, *fuzz.no_values('targs'), lambda a: a['targs']*0-1, lambda a: a['targs']*0+3, lambda a: a['targs'][1:]]}
BAD_CLASSES = BAD | {'targs': [*BAD['targs'], lambda a: a['targs']+.5, lambda a: a['targs']*math.nan]}

TABLE = {f'{f.__name__} {kind}': Row(f, scores(kind, **options), (BAD_CLASSES if kind == 'classes' else BAD) | more,
                                     dict(logits=fuzz.FLOATS + fuzz.HALF, targs=fuzz.INTEGERS if kind == 'classes' else fuzz.LABELS), examples=2)
         for f, options, more in ((best_temperature, {}, {}), (temperature_interval, dict(groups=torch.arange(12)//3), dict(groups=[torch.zeros(3)])),
                                  (cross_fitted, dict(folds=3, seed=0, groups=torch.arange(12)//2), dict(folds=fuzz.BAD_COUNT, seed=fuzz.BAD_SEED, groups=[torch.zeros(3)]))) for kind in KINDS}
TABLE['NormalizedTemperature'] = Row(NormalizedTemperature, st.fixed_dictionaries(dict(s=st.floats(1e-9, 1e9), p=st.floats(1, 10))),
                                     dict(s=[0, -1., fuzz.NAN, INF, 'x', None, True, [1.]], p=[.5, -1, fuzz.NAN, 'x', None, True, [2]]))
test_refuses, test_takes = fuzz.both_tests(TABLE, subclasses=(TensorBase, TensorCategory))
