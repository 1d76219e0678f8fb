"One number that mends confidence, fitted after training: SPEC section 6."
import math, pickle, re, subprocess, sys, warnings

import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize_scalar
from helpers import *
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.learner import load_learner
from fastai.text.all import language_model_learner
from fastai.vision.all import unet_learner
from torch.amp import autocast

from fastai_smooth.all import (LabelSmoothingBCEWithLogitsFlat, LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat,
                               MultiLabelSmoothingCallback)
from fastai_smooth.interpret import CalibrationInterpretation
from fastai_smooth.pilot import raw_preds
from fastai_smooth.temperature import *
from fastai_smooth.temperature import _fitted as fitted

some = settings(max_examples=40, deadline=None, derandomize=True)
D = torch.float64


def near(a, b, atol=1e-6): np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=0, atol=atol)


def same(a, b):
    a, b = (torch.as_tensor(o).detach().as_subclass(Tensor) for o in (a, b))
    assert a.dtype == b.dtype and torch.equal(a, b)


def mean_nll(z, y):
    "In numpy: of classes, labels or events"
    z, y = np.asarray(z, dtype=np.float64), np.asarray(y)
    if z.shape == y.shape: return np.mean(np.logaddexp(0, -np.where(y == 1, z, -z)))
    top = z.max(1, keepdims=True)
    return np.mean(top[:, 0] + np.log(np.exp(z-top).sum(1)) - z[np.arange(len(y)), y])


def best_by_search(z, y):
    "T of a dense grid, polished"
    f = lambda log_t: mean_nll(np.asarray(z, dtype=np.float64)/math.exp(log_t), y)
    grid = np.linspace(math.log(1e-3), math.log(1e3), 400)
    i = int(np.argmin([f(o) for o in grid]))
    return math.exp(minimize_scalar(f, bounds=(grid[max(0, i-1)], grid[min(399, i+1)]), method='bounded', options=dict(xatol=1e-10)).x)


def drawn(n, k, t0=1., scale=3., seed=0, kind='classes'):
    "Logits, and labels that softmax (or sigmoid) of logits/t0 draws"
    g = torch.Generator().manual_seed(seed)
    z = scale*torch.randn(*((n, k) if k else (n,)), generator=g, dtype=D)
    if kind == 'classes': return z, torch.multinomial((z/t0).softmax(1), 1, generator=g)[:, 0]
    return z, torch.bernoulli((z/t0).sigmoid(), generator=g)


KINDS = dict(classes=(5, 'classes'), labels=(4, 'labels'), events=(0, 'events'))
kinds = pytest.mark.parametrize('kind', KINDS)
def of_kind(kind, n=400, **kwargs): return drawn(n, KINDS[kind][0], kind=kind, **kwargs)


# ---------------------------------------------------------------- best_temperature

@kinds
@given(seed=st.integers(0, 10**6), log_t=st.floats(-2, 2), log_scale=st.floats(-2, 3), n=st.integers(30, 120))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_best_temperature_is_the_minimum_of_the_nll(kind, seed, log_t, log_scale, n):
    "as a dense grid in numpy finds it"
    z, y = of_kind(kind, n=n, t0=math.exp(log_t), scale=math.exp(log_scale), seed=seed)
    t = best_temperature(z, y)
    if t is None: return
    expected = best_by_search(z, y)
    assert mean_nll(z/t, y) <= mean_nll(z/expected, y) + 1e-9
    if expected < 100: near(math.log(t), math.log(expected), 1e-4)


@kinds
@given(seed=st.integers(0, 10**6), log_c=st.floats(-3, 3))
@some
def test_logits_times_c_have_a_temperature_times_c(kind, seed, log_c):
    z, y = of_kind(kind, n=60, seed=seed)
    t, c = best_temperature(z, y), math.exp(log_c)
    if t is None or not 2e-2 < t < 50: return
    near(best_temperature(z*c, y)/c, t, 1e-6*t)


@given(st.data())
@some
def test_never_worse_than_no_temperature(data):
    "whatever the rows are, ever so few"
    n, k = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 4))
    z = torch.tensor(data.draw(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=k, max_size=k), min_size=n, max_size=n)), dtype=D)
    y = torch.tensor(data.draw(st.lists(st.integers(0, k-1), min_size=n, max_size=n)))
    multi = data.draw(st.booleans())
    if multi: y = F.one_hot(y, k)
    t = best_temperature(z, y)
    if t is not None: assert t > 0 and math.isfinite(t) and mean_nll(z/t, y) <= mean_nll(z, y) + 1e-12


@kinds
@pytest.mark.parametrize('t0', [.4, 1., 2.5])
def test_known_truth_is_found(kind, t0):
    "labels drawn from softmax(z/t0) give t0"
    t = best_temperature(*of_kind(kind, n=20_000, t0=t0))
    assert abs(math.log(t/t0)) < .06


def test_none_where_every_row_is_right():
    z, y = drawn(50, 4)
    assert best_temperature(z, z.argmax(1)) is None
    assert best_temperature(z, (z > 0).double()) is None
    assert best_temperature(z[:, 0], (z[:, 0] > 0).double()) is None


def test_none_where_logits_carry_nothing():
    z, y = drawn(50, 4)
    assert best_temperature(torch.zeros(50, 4), y) is None
    assert best_temperature(torch.ones(50, 1).expand(50, 4), y) is None
    assert best_temperature(z, z.argmin(1)) is None          # worse than chance
    assert best_temperature(-z, (z > 0).double()) is None


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_none_where_logits_are_not_finite(bad):
    z, y = drawn(50, 4)
    z[3, 2] = bad
    assert best_temperature(z, y) is None
    assert best_temperature(z, F.one_hot(y, 4)) is None


def test_classes_without_rows_are_no_matter():
    z, y = drawn(400, 3, t0=2.)
    wide = torch.cat([z, torch.full((400, 4), -30., dtype=D)], 1)
    near(best_temperature(wide, y), best_temperature(z, y), 1e-4)


def test_masked_classes_are_left_out():
    "-inf, as softmax has it"
    z, y = drawn(400, 3, t0=2.)
    wide = torch.cat([z, torch.full((400, 2), -math.inf, dtype=D)], 1)
    near(best_temperature(wide, y), best_temperature(z, y), 1e-9)
    near(best_temperature(wide.flip(1), 4-y), best_temperature(z, y), 1e-9)


def test_masked_labels_are_left_out():
    "at -inf, a label that is not there costs nothing; one that is costs inf at any temperature: there is no best one"
    z, y = drawn(300, 3, 2.5, kind='labels')
    masked, absent = torch.cat([z, z[:, :1]], 1), torch.cat([y, torch.zeros(300, 1)], 1)
    masked[:, 3] = -math.inf
    near(row_nll(masked, absent), row_nll(z, y)*3/4, 1e-9)
    near(best_temperature(masked, absent), best_temperature(z, y), 1e-6)
    near(temperature_interval(masked, absent), temperature_interval(z, y), 1e-3)
    masked[5:, 3] = -1.
    assert 0 < temperature_interval(masked, absent)[0] < temperature_interval(masked, absent)[1] < 100
    there = absent.clone()
    there[0, 3] = 1
    assert row_nll(masked, there)[0] == math.inf and best_temperature(masked, there) is None and temperature_interval(masked, there) is None
    assert row_nll(z, torch.full_like(y, math.nan)).isnan().all()


@pytest.mark.parametrize('c', [1e-2, 1., 400.])
def test_logits_of_any_size(c):
    z, y = drawn(400, 3, t0=2.)
    near(best_temperature((z*c).float(), y)/c, best_temperature(z, y), 1e-4)


@pytest.mark.parametrize('top', [10., 1e3, 3e3])
def test_huge_logits(top):
    "with a few rows wrong; they overflow exp"
    z = torch.eye(4)[torch.arange(40) % 4]*top
    y = torch.arange(40) % 4
    y[:4] = (y[:4] + 1) % 4
    near(F.softmax(z[:1].double()/best_temperature(z, y), 1).max(), .9, 1e-6)  # 36 of 40 are right


def test_logits_of_ten_thousand_do_not_crash():
    "the best T grows with them; or huge rows are right"
    z, y = drawn(60, 3)
    assert best_temperature(z*1e4, y) == pytest.approx(1e4*best_temperature(z, y), rel=1e-6)
    z[:20] *= 1e4
    y[:20] = z[:20].argmax(1)
    t = best_temperature(z, y)
    assert t is None or mean_nll(z/t, y) <= mean_nll(z, y)


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_tiny_sets_never_give_a_strange_number(n):
    "autogluon#4396 had T=-1242"
    for seed in range(20):
        z, y = drawn(n, 3, seed=seed, t0=5.)
        t = best_temperature(z, y)
        assert t is None or 1e-3 <= t <= 1e3


def test_inputs_are_left_alone():
    z, y = drawn(40, 3)
    z.requires_grad_()
    a, b = z.detach().clone(), y.clone()
    assert isinstance(best_temperature(z, y), float)
    same(z, a), same(y, b)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits(dtype):
    z, y = drawn(400, 3, t0=2.)
    near(best_temperature(z.to(dtype), y), best_temperature(z.to(dtype).double(), y), 1e-12)


def test_integer_and_bool_labels():
    z, y = drawn(100, 3, kind='labels', t0=2.)
    assert best_temperature(z, y.bool()) == best_temperature(z, y.int()) == best_temperature(z, y)


# ---------------------------------------------------------------- temperature_interval

@kinds
@pytest.mark.parametrize('n, t0', [(12, 1.), (200, 2.)])
def test_interval_of_the_likelihood_ratio(kind, n, t0):
    "all T with a NLL less than 1.92/N above the best one's, as a dense grid in numpy has them; of labels, each an interval of its own"
    z, y = of_kind(kind, n=n, t0=t0)
    for z, y in zip(z.T, y.T) if kind == 'labels' else [(z, y)]:
        grid = np.exp(np.linspace(math.log(.02), math.log(50), 4001))
        values = np.array([mean_nll(z/t, y) for t in grid])
        inside = grid[values < values.min() + 1.9207/n]
        low, high = temperature_interval(z, y)
        near(math.log(low), math.log(inside[0]), 3e-3)
        near(math.log(high), math.log(inside[-1]), 3e-3)
        assert low < best_temperature(z, y) < high


def test_no_interval_without_a_best_temperature():
    z, y = drawn(50, 4)
    assert temperature_interval(z, z.argmax(1)) is None and temperature_interval(torch.zeros(50, 4), y) is None


def test_ends_that_the_data_do_not_limit():
    "two rows, one of them right: any T above some"
    low, high = temperature_interval(tensor([[3., 0.], [2.5, 0.]]), tensor([0, 1]))
    assert 0 < low < 1 and high == math.inf


def drawn_labels(n, k, seed, together):
    "Labels of sigmoid(z/2), those of a row all with the same luck or each with its own"
    g = torch.Generator().manual_seed(seed)
    z, luck = 3*torch.randn(n, k, generator=g, dtype=D), torch.rand(n, 1 if together else k, generator=g, dtype=D)
    return z, (luck < (z/2).sigmoid()).double()


def drawn_pixels(n, m, seed):
    "m pixels of each of n images, alike, with the luck of the image: labels of softmax(z/2)"
    g = torch.Generator().manual_seed(seed)
    z = 3*torch.randn(n, 1, 4, generator=g, dtype=D) + torch.randn(n, m, 4, generator=g, dtype=D)
    y = torch.searchsorted((z/2).softmax(2).cumsum(2), torch.rand(n, 1, 1, generator=g, dtype=D).expand(n, m, 1)).clamp(max=3)
    return z.reshape(-1, 4), y.flatten(), torch.arange(n).repeat_interleave(m)


COVERED = dict(rows=lambda i: drawn(30, 5, t0=2., seed=i), labels=lambda i: drawn_labels(100, 5, i, False), labels_together=lambda i: drawn_labels(40, 10, i, True),
               pixels=lambda i: drawn_pixels(50, 20, i))


@pytest.mark.parametrize('name', COVERED)
def test_intervals_hold_the_truth(name):
    "2, in 95% of draws: fewer than 86 of 100 has probability .0004"
    found = [temperature_interval(*COVERED[name](i)) for i in range(100)]
    assert sum(o is None or o[0] <= 2 <= o[1] for o in found) >= 86


def test_pixels_are_not_independent():
    "as if they were, the interval would miss the truth more often than not"
    found = [(temperature_interval(*o), temperature_interval(*o[:2])) for o in map(COVERED['pixels'], range(60))]
    assert sum(low <= 2 <= high for _, (low, high) in found) < 40
    assert all(low < a and b < high for (low, high), (a, b) in found)


def test_one_image_says_nothing_of_others():
    z, y, _ = drawn_pixels(1, 50, 0)
    y[::3] = (y[::3]+1) % 4
    assert temperature_interval(z, y, torch.zeros(50)) == (0., math.inf)
    with pytest.raises(ValueError, match='groups'): temperature_interval(z, y, torch.zeros(3))


@pytest.mark.parametrize('n, before, after', [(5, .3, .08), (10, .2, .09), (20, .1, .11), (200, 0., .01)])
def test_few_rows_do_no_harm(n, before, after):
    "calibrated logits of 10 classes: the share of fits that cost more than .05 nats on new rows, with the best T and with the one that is used"
    (new_z, new_y), cost = drawn(2000, 10, seed=10**6), []
    for seed in range(100):
        fit = fitted(*drawn(n, 10, seed=seed))
        cost.append([mean_nll(new_z/t, new_y) - mean_nll(new_z, new_y) > .05 for t in (fit.best or 1., fit.used)])
    best, used = np.mean(cost, axis=0)
    assert best >= before and used <= after


# ---------------------------------------------------------------- cross_fitted

def rows_of_t(z, scaled): return (z/scaled).flatten(1)[:, 0] if z.ndim > 1 else z/scaled


@kinds
def test_each_row_is_divided_by_a_temperature_of_other_rows(kind):
    "rows with the same T are a fold, and T is the best of all others"
    z, y = of_kind(kind, n=103, t0=3.)
    ts = rows_of_t(z, cross_fitted(z, y))
    folds = [((ts-t).abs() < 1e-7).nonzero()[:, 0] for t in {round(t, 7) for t in ts.tolist()}]
    assert len(folds) == 5 and sum(map(len, folds)) == 103 and max(map(len, folds)) <= 21
    for idx in folds:
        others = torch.ones(103, dtype=torch.bool)
        others[idx] = False
        near(ts[idx], best_by_search(z[others], y[others]), 1e-4)


def test_a_row_does_not_change_its_own_temperature():
    z, y = drawn(40, 3, t0=3.)
    before = rows_of_t(z, cross_fitted(z, y))
    for i in (0, 17):
        other = y.clone()
        other[i] = (y[i]+1) % 3
        near(rows_of_t(z, cross_fitted(z, other))[i], before[i], 1e-9)


def test_cross_fitted_is_seeded():
    z, y = drawn(40, 3, t0=3.)
    states = get_random_states()
    torch.manual_seed(5); a = cross_fitted(z, y)
    torch.manual_seed(6); before = torch.get_rng_state(); b = cross_fitted(z, y)
    same(torch.get_rng_state(), before)
    same(a, b)
    assert not torch.equal(a, cross_fitted(z, y, seed=1))
    set_random_states(**states)


@pytest.mark.parametrize('n', [1, 2, 3, 6])
def test_fewer_rows_than_folds(n):
    z, y = drawn(n, 3)
    res = cross_fitted(z, y)
    assert res.shape == z.shape and res.isfinite().all() and (z/res > 0).all()
    if n == 1: same(res, z)


def test_one_where_nothing_can_be_fitted():
    z, _ = drawn(20, 3)
    same(cross_fitted(z, z.argmax(1)), z)


def test_cross_fitted_leaves_its_input():
    z, y = drawn(20, 3)
    a = z.clone()
    cross_fitted(z, y)
    same(z, a)


# ---------------------------------------------------------------- Learners

def noisy_single(n=320, k=4, noise=.3, seed=0):
    "Classes that a linear model can tell, some labels random"
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, 6, generator=g), torch.randn(6, k, generator=g)
    y = (x@w).argmax(1)
    flip = torch.rand(n, generator=g) < noise
    return x, torch.where(flip, torch.randint(k, (n,), generator=g), y)


def noisy_multi(n=320, k=3, noise=.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, 6, generator=g), torch.randn(6, k, generator=g)
    y = (x@w > 0).float()
    return x, torch.where(torch.rand(n, k, generator=g) < noise, 1-y, y)


def sharp(model, factor=6.):
    "Overconfident"
    with torch.no_grad(): model[-1].weight *= factor
    return model


def single(loss=None, n=320, **kwargs):
    learn = tensor_learner(tensor_dls(*noisy_single(n), bs=32, n_valid=n//2), mlp(k=4), ifnone(loss, CrossEntropyLossFlat()), **kwargs)
    fit_seeded(learn, 8)
    sharp(learn.model)
    return learn


def multi(loss=None, **kwargs):
    learn = tensor_learner(tensor_dls(*noisy_multi(), bs=32, n_valid=160), mlp(k=3), ifnone(loss, BCEWithLogitsLossFlat()), **kwargs)
    fit_seeded(learn, 20)
    sharp(learn.model)
    return learn


def valid_logits(learn):
    x, y = zip(*learn.dls.valid.dataset)
    with torch.no_grad(): return learn.model.eval()(torch.stack(x)), torch.stack(y)


def expected_probs(learn, t):
    z, y = valid_logits(learn)
    t = torch.as_tensor(t)
    return torch.sigmoid(z/t) if y.ndim == 2 else (z/t).softmax(1)


def check_calibrated(learn, t): near(learn.get_preds()[0], expected_probs(learn, t), 1e-6)


LEARNERS = dict(single=single, multi=multi)
both = pytest.mark.parametrize('make', LEARNERS.values(), ids=LEARNERS)


@both
def test_fit_temperature_gives_the_best_temperature_of_validation_data(make):
    learn = make()
    assert learn.temperature == 1.
    assert learn.fit_temperature() is learn
    z, y = valid_logits(learn)
    near(learn.temperature, best_by_search(z, y), 1e-4)
    assert isinstance(learn.temperature, float) and learn.temperature > 1.5


@both
def test_get_preds_and_predict_give_probabilities_of_logits_over_t(make):
    learn = make().fit_temperature()
    check_calibrated(learn, learn.temperature)
    near(learn.get_preds(ds_idx=0)[0][:3], expected_probs_of_train(learn)[:3], 1e-6)


def expected_probs_of_train(learn):
    x, y = zip(*learn.dls.train.dataset)
    with torch.no_grad(): z = learn.model.eval()(torch.stack(x))/learn.temperature
    return z.sigmoid() if y[0].ndim else z.softmax(1)


@both
def test_decisions_do_not_change(make):
    learn = make()
    probs, _, decoded = learn.get_preds(with_decoded=True)
    learn.fit_temperature()
    after, _, decoded2 = learn.get_preds(with_decoded=True)
    same(decoded, decoded2)
    assert not torch.allclose(probs, after)


def test_another_threshold_applies_to_the_calibrated_probability():
    learn = multi(BCEWithLogitsLossFlat(thresh=.8)).fit_temperature()
    _, _, decoded = learn.get_preds(with_decoded=True)
    same(decoded, expected_probs(learn, learn.temperature) > .8)


@both
def test_losses_are_bitwise_the_same(make):
    learn, twin = make(), make()
    before = learn.validate()
    _, _, losses = learn.get_preds(with_loss=True)
    learn.fit_temperature()
    assert learn.validate() == before
    same(learn.get_preds(with_loss=True)[2], losses)


@both
def test_training_is_bitwise_the_same(make):
    learn, twin = make(), make()
    learn.fit_temperature()
    spies = Grads(), Grads()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for o, spy in zip((learn, twin), spies): fit_seeded(o, 2, cbs=spy)
    for a, b in zip(spies[0].seen, spies[1].seen): same(a, b)
    assert len(spies[0].seen) and learn.recorder.values == twin.recorder.values and learn.recorder.losses == twin.recorder.losses


@both
def test_the_loss_that_others_share_is_left_alone(make):
    learn, other = make(), make()
    other.loss_func = shared = learn.loss_func
    before, state = other.get_preds()[0], pickle.dumps(shared.__dict__)
    learn.fit_temperature()
    assert learn.loss_func is not shared and other.loss_func is shared and other.temperature == 1.
    same(other.get_preds()[0], before)
    assert pickle.dumps(shared.__dict__) == state


@both
def test_reset_puts_the_very_object_back(make):
    learn = make()
    loss, probs, cbs = learn.loss_func, learn.get_preds()[0], list(learn.cbs)
    assert learn.fit_temperature().reset_temperature() is learn
    assert learn.loss_func is loss and learn.temperature == 1. and list(learn.cbs) == cbs
    same(learn.get_preds()[0], probs)
    assert learn.reset_temperature().loss_func is loss  # nothing to undo


@both
def test_fitting_again_starts_from_raw_logits(make):
    learn = make()
    loss, t = learn.loss_func, learn.fit_temperature().temperature
    learn.fit_temperature()
    near(learn.temperature, t, 1e-9)
    assert len(learn.cbs.filter(risinstance(TemperatureReminder))) == 1
    assert learn.reset_temperature().loss_func is loss


def test_other_data():
    "by ds_idx, or dl"
    learn = single()
    x, y = zip(*learn.dls.train.dataset)
    with torch.no_grad(): z = learn.model.eval()(torch.stack(x))
    expected = best_by_search(z, torch.stack(y))
    near(learn.fit_temperature(ds_idx=0).temperature, expected, 1e-4)
    near(learn.fit_temperature(dl=learn.dls.train).temperature, expected, 1e-4)
    valid = best_by_search(*valid_logits(learn))
    near(learn.fit_temperature(dl=learn.dls.valid).temperature, valid, 1e-4)


def test_shuffled_and_dropped_rows_are_all_used():
    "ds_idx=0 of a loader that shuffles and drops the last batch"
    x, y = noisy_single(170)
    train = DataLoader(list(zip(x, y)), bs=32, shuffle=True, drop_last=True, num_workers=0)
    learn = tensor_learner(DataLoaders(train, train, device=CPU), sharp(mlp(k=4), 3), CrossEntropyLossFlat())
    preds = raw_preds(learn, 0)
    assert len(preds.logits) == preds.total == 170
    same(preds.targs, y)
    same(preds.rows, torch.arange(170))
    with torch.no_grad(): near(preds.logits, learn.model.eval()(x), 1e-5)


# ---------------------------------------------------------------- one T a label

def test_per_label():
    learn = multi().fit_temperature(per_label=True)
    z, y = valid_logits(learn)
    near(learn.temperature, [best_by_search(z[:, k], y[:, k]) for k in range(3)], 1e-4)
    assert isinstance(learn.temperature, list) and len(set(learn.temperature)) == 3
    check_calibrated(learn, learn.temperature)
    pickle.loads(pickle.dumps(learn.loss_func))
    learn.fit_temperature()
    assert isinstance(learn.temperature, float)


def test_a_label_without_a_best_temperature_keeps_one():
    learn = multi()
    learn.dls.valid.dataset[:] = [(x, torch.cat([y[:2], (learn.model(x[None])[0, 2:] > 0).float()])) for x, y in learn.dls.valid.dataset]
    with pytest.warns(UserWarning, match='2'): learn.fit_temperature(per_label=True)
    assert learn.temperature[2] == 1. and learn.temperature[0] > 1


def test_per_label_of_one_class_a_row():
    learn = single()
    before = learn.loss_func
    with pytest.raises(ValueError, match='per_label'): learn.fit_temperature(per_label=True)
    assert learn.loss_func is before and not learn.cbs.filter(risinstance(TemperatureReminder))


# ---------------------------------------------------------------- how sure it is

class Given(nn.Module):
    "Gives logits as they are, times a parameter of 1"
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
    def forward(self, x): return x*self.one


def given(z, y, loss=None, **kwargs):
    "A Learner that predicts the logits `z` of its validation data"
    z = z.float()
    return Learner(tensor_dls(torch.cat([z[:4], z]), torch.cat([y[:4], y]), bs=64, n_valid=len(z)), Given(), ifnone(loss, CrossEntropyLossFlat()), **kwargs)


def printed(capsys, learn, **kwargs):
    with learn.no_bar(): learn.fit_temperature(**kwargs)
    return capsys.readouterr().out


def test_it_says_how_sure_it_is(capsys):
    z, y = drawn(300, 4, t0=2.)
    learn = given(z, y)
    assert learn.temperature_interval is None
    assert re.fullmatch(r'T=1.9\d, with a 95% interval from 1.[67]\d* to 2.[23]\d*, from 300 predictions\n', printed(capsys, learn))
    near(learn.temperature_interval, temperature_interval(z, y), 1e-4)
    assert learn.reset_temperature().temperature_interval is None
    with learn.no_logging(): assert not printed(capsys, learn)


def test_it_stays_1_where_the_interval_holds_1(capsys):
    "probabilities, decisions and losses are bitwise those of before; nothing reminds of a temperature"
    z, y = drawn(20, 4)
    assert abs(best_temperature(z, y) - 1) > .1
    learn = given(z, y)
    with learn.no_bar(): probs, loss = learn.get_preds()[0], learn.loss_func
    assert re.fullmatch(r'T stays 1: the best for 20 predictions is T=\S+, with a 95% interval from \S+ to \S+, which holds 1\n', printed(capsys, learn))
    assert learn.temperature == 1. and not learn.cbs.filter(risinstance(TemperatureReminder))
    near(learn.temperature_interval, temperature_interval(z, y), 1e-4)
    with learn.no_bar(): same(learn.get_preds()[0], probs)
    assert learn.reset_temperature().loss_func is loss


def test_each_label_stays_1_by_its_own_interval(capsys):
    z, y = drawn(40, 3, kind='labels')
    z[:, 1] *= 6
    learn = given(z, y, BCEWithLogitsLossFlat())
    assert printed(capsys, learn, per_label=True).startswith('T stays 1 for 2 of 3 labels, where its 95% interval holds 1; the others have T from ')
    assert learn.temperature[::2] == [1., 1.] and learn.temperature[1] > 2
    assert [low <= 1 <= high for low, high in learn.temperature_interval] == [True, False, True]
    near(learn.temperature_interval[1], temperature_interval(z[:, 1], y[:, 1]), 1e-4)
    same(learn.get_preds()[0][:, 0], z[:, 0].float().sigmoid())


def test_labels_that_all_stay_1_are_no_temperature():
    learn = given(*drawn(40, 3, kind='labels'), BCEWithLogitsLossFlat())
    with learn.no_bar(): learn.fit_temperature(per_label=True)
    assert learn.temperature == [1., 1., 1.] and not learn.cbs.filter(risinstance(TemperatureReminder))


def test_pixels_of_an_image_count_together():
    "20 images: the temperature stays 1, though as many rows by themselves would move it"
    z, y, image = drawn_pixels(20, 64, 1)
    images = [o.view(20, 8, 8, *o.shape[1:]) for o in (z, y)]
    learn = given(images[0].movedim(-1, 1), images[1], CrossEntropyLossFlat(axis=1))
    with learn.no_bar(): learn.fit_temperature()
    near(learn.temperature_interval, temperature_interval(z, y, image), 1e-3)
    low, high = learn.temperature_interval
    alone = temperature_interval(z, y)
    assert low < alone[0] and alone[1] < high


@pytest.mark.parametrize('step', ['to_smooth', 'pickle'])
def test_the_interval_goes_where_the_temperature_goes(step):
    learn = given(*drawn(300, 4, t0=2.))
    with learn.no_bar(): learn.fit_temperature()
    expected = learn.temperature, learn.temperature_interval
    if step == 'to_smooth': learn.to_smooth(.1)
    if step == 'pickle': learn.loss_func = pickle.loads(pickle.dumps(learn.loss_func))
    assert (learn.temperature, learn.temperature_interval) == expected


def test_what_was_pickled_without_an_interval():
    learn = given(*drawn(300, 4, t0=2.))
    with learn.no_bar(): learn.fit_temperature()
    del learn.loss_func.activation.interval
    assert learn.temperature > 1.5 and learn.temperature_interval is None
    assert learn.to_smooth().temperature > 1.5


# ---------------------------------------------------------------- labels of images

def test_images_of_one_label_have_one_temperature():
    "calibrated (N,1,H,W) logits, and (N,H,W) ones: columns are no labels"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 1, 16, 16, generator=g)*2
    y = torch.bernoulli(x.sigmoid(), generator=g)
    for z, targs in ((x, y), (x, y[:, 0]), (x[:, 0], y[:, 0])):
        learn = given(z*3, targs, BCEWithLogitsLossFlat())
        with learn.no_bar():
            learn.fit_temperature(per_label=True)
            assert len(learn.temperature) == 1 and abs(learn.temperature[0] - 3) < .15
            near(learn.get_preds()[0], (z*3/learn.temperature[0]).sigmoid(), 1e-6)


@pytest.mark.parametrize('axis, loss', [(1, BCEWithLogitsLossFlat()), (2, BCEWithLogitsLossFlat(axis=2)), (1, LabelSmoothingBCEWithLogitsFlat(0.))],
                         ids=['fastai', 'given', 'ours'])
def test_channels_have_a_temperature_each(axis, loss):
    "along the axis of the labels: that of channels, or the one that the loss was given"
    g, factor = torch.Generator().manual_seed(0), tensor([2., .5])
    x = torch.randn(40, 2, 8, 8, generator=g)*2
    y = torch.bernoulli(x.sigmoid(), generator=g)
    z, y = ((o.movedim(1, axis)) for o in (x*factor[:, None, None], y))
    learn = given(z, y, loss)
    with learn.no_bar():
        learn.fit_temperature(per_label=True)
        near(learn.temperature, factor, .2)
        near(learn.get_preds()[0].movedim(axis, -1), (z.movedim(axis, -1)/tensor(learn.temperature)).sigmoid(), 1e-6)


# ---------------------------------------------------------------- names that others have taken

class Distilled(Learner):
    "Has a temperature of its own, as many have, set before fastai's __init__ or after it"
    def __init__(self, *args, before, temperature=4., **kwargs):
        if before: self.temperature = temperature
        super().__init__(*args, **kwargs)
        self.temperature,self.temperature_interval = temperature,'mine'


@pytest.mark.parametrize('before', [True, False])
def test_a_learner_with_a_temperature_of_its_own(before):
    z, y = drawn(300, 4, t0=2.)
    learn = quiet(Distilled(tensor_dls(z.float(), y, n_valid=299), Given(), CrossEntropyLossFlat(), before=before, label_smoothing=.1))
    fit_seeded(learn, 1)
    learn.fit_temperature()
    assert learn.temperature == 4. and learn.temperature_interval == 'mine' and 1.6 < temperature_of(learn) < 2.4
    assert CalibrationInterpretation.from_learner(learn).temperature == temperature_of(learn)
    assert len(reminders(lambda: learn.fit(1, lr=0.))) == 1
    learn.to_hard().reset_temperature()
    del learn.temperature
    assert learn.temperature == 1.


class Temperature(Callback):
    "fastai sets it as learn.temperature"


def test_a_callback_of_that_name():
    learn = given(*drawn(300, 4, t0=2.))
    learn.add_cb(Temperature())
    with learn.no_bar(): learn.fit_temperature()
    assert isinstance(learn.temperature, Temperature) and temperature_of(learn) > 1.5
    learn.remove_cb(Temperature)
    assert learn.temperature == temperature_of(learn)


# ---------------------------------------------------------------- data that it should not be fitted to

def said_by(f):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in seen if o.category is UserWarning]


@pytest.mark.parametrize('how', ['ds_idx', 'dl', 'new'])
def test_training_data_warn(how):
    learn = single()
    kwargs = dict(ds_idx=dict(ds_idx=0), dl=dict(dl=learn.dls.train), new=dict(dl=learn.dls.train.new(shuffle=False)))[how]
    message, = said_by(lambda: learn.fit_temperature(**kwargs))
    assert 'training data' in message and not said_by(learn.fit_temperature)


@both
@pytest.mark.parametrize('per_label', [False, True])
def test_a_model_that_was_not_trained_warns(make, per_label):
    "once, whatever its random weights are"
    trained = make()
    for seed in range(5):
        learn = tensor_learner(trained.dls, mlp(k=trained.model[-1].out_features, seed=seed), trained.loss_func)
        message, = said_by(partial(learn.fit_temperature, per_label=per_label and make is multi))
        assert 'trained?' in message or 'no better than chance' in message


# ---------------------------------------------------------------- with smoothing

STEPS = dict(
    fit_smooth_hard_reset='fit smooth hard reset', smooth_fit_hard_reset='smooth fit hard reset', fit_smooth_reset_hard='fit smooth reset hard',
    smooth_fit_reset_hard='smooth fit reset hard', twice='fit smooth fit smooth hard fit reset', fit_smooth_smooth='smooth smooth fit smooth hard reset')


@both
@pytest.mark.parametrize('steps', STEPS.values(), ids=STEPS)
def test_smoothing_carries_the_temperature(make, steps):
    "in every order; at the end the original object is back"
    learn = make()
    loss, t = learn.loss_func, best_by_search(*valid_logits(learn))
    fitted = False
    for step in steps.split():
        getattr(learn, dict(fit='fit_temperature', smooth='to_smooth', hard='to_hard', reset='reset_temperature')[step])()
        fitted = step == 'fit' or fitted and step != 'reset'
        near(learn.temperature, t if fitted else 1., 1e-4)
        check_calibrated(learn, learn.temperature)
    assert learn.loss_func is loss and not learn.cbs.filter(risinstance((MultiLabelSmoothingCallback, TemperatureReminder)))


def test_to_smooth_of_a_tempered_learner_smooths():
    learn = single().fit_temperature().to_smooth(.3)
    z, y = torch.randn(6, 4).requires_grad_(), tensor([0, 3, 1, 2, 2, 0])
    near(learn.loss_func(z, y).item(), F.cross_entropy(z, y, label_smoothing=.3).item())
    near(learn.loss_func(z.detach(), y), F.cross_entropy(z, y).item())


def test_to_hard_needs_smoothing_of_a_tempered_learner_too():
    with pytest.raises(ValueError, match='to_smooth'): single().fit_temperature().to_hard()


@pytest.mark.parametrize('loss', [F.cross_entropy, nn.CrossEntropyLoss()], ids=['function', 'module'])
def test_to_hard_with_a_loss_that_cannot_hold_a_temperature(loss):
    "to_smooth, fit_temperature, to_hard: the loss is the very object, unchanged, and predictions work"
    learn = single(loss)
    plain = learn.get_preds()[0]
    learn.to_smooth().fit_temperature()
    try:
        learn.to_hard()
        assert learn.loss_func is loss and not hasattr(loss, 'activation')
        same(learn.get_preds()[0], plain)
    finally:
        if hasattr(F.cross_entropy, 'activation'): del F.cross_entropy.activation


def test_own_smoothing_losses():
    "T is of the hard labels"
    for loss in (LabelSmoothingCrossEntropyFlat(.2), LabelSmoothingCrossEntropy(.2)):
        learn = single(loss).fit_temperature()
        near(learn.temperature, best_by_search(*valid_logits(learn)), 1e-4)
        check_calibrated(learn, learn.temperature)
        assert learn.reset_temperature().loss_func is loss
    learn = multi(LabelSmoothingBCEWithLogitsFlat(.1)).fit_temperature()
    near(learn.temperature, best_by_search(*valid_logits(learn)), 1e-4)
    check_calibrated(learn, learn.temperature)


# ---------------------------------------------------------------- shapes of output

def test_binary_with_one_output():
    x, y = noisy_multi(k=1)
    for targs in (y, y[:, 0]):
        learn = tensor_learner(tensor_dls(x, targs, n_valid=160), sharp(mlp(k=1), 10), BCEWithLogitsLossFlat())
        fit_seeded(learn, 2)
        sharp(learn.model)
        z, _ = valid_logits(learn)
        learn.fit_temperature()
        near(learn.temperature, best_by_search(z, y[-160:]), 1e-4)
        near(learn.get_preds()[0], (z/learn.temperature).sigmoid())


def segmented(loss):
    learn = quiet(unet_learner(segment_dls(*segment_arrays(12), bs=4, n_valid=4), tiny_arch, n_out=3, pretrained=False, loss_func=loss, opt_func=SGD, lr=.1, path=Path('.')))
    learn.fit(1)
    return learn


@pytest.fixture(scope='module')
def segment_model():
    torch.manual_seed(0)
    return segmented(CrossEntropyLossFlat(axis=1, ignore_index=VOID))


@pytest.mark.parametrize('axis', [1, -3])
def test_segmentation_with_void_pixels(segment_model, axis):
    "classes along axis 1, pixels of ignore_index left out"
    learn = segment_model
    loss, learn.loss_func = learn.loss_func, CrossEntropyLossFlat(axis=axis, ignore_index=VOID)
    try:
        z, y = learn.get_preds(act=noop)
        z, y = (o.as_subclass(Tensor) for o in (z, y))
        rows, targs = z.movedim(1, -1).reshape(-1, 3), y.reshape(-1)
        keep = targs != VOID
        learn.fit_temperature()
        near(learn.temperature, best_by_search(rows[keep], targs[keep]), 1e-4)
        near(learn.get_preds()[0], (z/learn.temperature).softmax(1), 1e-6)
        assert raw_preds(learn).logits.shape == (int(keep.sum()), 3)
    finally: learn.loss_func = loss; learn.remove_cb(TemperatureReminder)


def lm(): return quiet(language_model_learner(lm_dls(), AWD_LSTM, config=small_lm_config(), pretrained=False, opt_func=SGD, lr=.1, path=Path('.')))


@pytest.fixture(scope='module')
def language_model():
    torch.manual_seed(0)
    return fit_seeded(lm(), 2)


def test_language_model(language_model):
    learn = language_model
    preds = raw_preds(learn)
    assert preds.logits.shape == (preds.total, len(VOCAB)) and preds.targs.shape == (preds.total,)
    with torch.no_grad(): learn.model[1].decoder.weight *= 120 # T is far from 1, as four texts have a wide interval
    preds = raw_preds(learn)
    learn.fit_temperature()
    near(learn.temperature, best_by_search(preds.logits, preds.targs), 1e-4)
    probs, y = learn.get_preds(reorder=False)
    probs = torch.cat([probs[:, :8].reshape(-1, len(VOCAB)), probs[:, 8:].reshape(-1, len(VOCAB))])  # get_preds joins the batches in time
    near(probs, (preds.logits/learn.temperature).softmax(1), 1e-5)
    learn.reset_temperature()


def test_outputs_of_many_rows_are_sampled():
    "seeded, a row once, with its own target"
    x = torch.randn(6000, 6)
    learn = tensor_learner(tensor_dls(x, torch.arange(6000), bs=500, n_valid=5000), nn.Linear(6, 6000), CrossEntropyLossFlat())
    a, b = (raw_preds(learn, max_numel=1) for _ in range(2))
    assert a.total == 5000 and 850 < len(a.logits) < 1150  # 1000 at least, up to chance
    same(a.rows, b.rows), same(a.logits, b.logits)
    assert len(a.rows.unique()) == len(a.rows)
    same(a.targs, 1000 + a.rows)
    with torch.no_grad(): near(a.logits, learn.model.eval()(x[1000:][a.rows]), 1e-4)
    assert not torch.equal(raw_preds(learn, max_numel=1, seed=1).rows[:50], a.rows[:50])


def test_a_small_set_is_not_sampled():
    learn = single()
    assert len(raw_preds(learn, max_numel=1).logits) == 160


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    class Cast(MixedPrecision):
        def before_fit(self):
            super().before_fit()
            self.autocast = autocast('cpu', dtype=dtype)
        def after_pred(self): pass  # stays half
    learn = single()
    learn.add_cb(Cast())
    learn.fit_temperature()
    near(math.log(learn.temperature), math.log(best_by_search(*valid_logits(learn))), .03)
    learn.get_preds()


# ---------------------------------------------------------------- what cannot be

def snapshot(learn):
    "All that fit_temperature must leave when it fails"
    rec = learn.recorder
    return dict(loss=learn.loss_func, cbs=list(learn.cbs), weights=weights(learn).clone(), values=list(rec.values), losses=list(rec.losses), rec=rec,
                training=[m.training for m in learn.model.modules()], py=random.getstate(), np=np.random.get_state()[1].tolist(), torch=torch.get_rng_state(),
                rngs=[dl.rng.getstate() for dl in learn.dls.loaders], dls=learn.dls, opt=learn.opt, dict={k for k in learn.__dict__}, model=learn.model)


def check_untouched(learn, before, but=()):
    now = snapshot(learn)
    for k, v in before.items():
        if k in but: continue
        if isinstance(v, Tensor): same(v, now[k])
        elif k in ('loss', 'rec', 'dls', 'opt', 'model'): assert now[k] is v, k
        else: assert now[k] == v, k


BAD_LOSSES = dict(function=F.cross_entropy, module=nn.CrossEntropyLoss())


@pytest.mark.parametrize('name', BAD_LOSSES)
def test_a_loss_without_activation_is_a_type_error_that_names_it(name):
    learn = single(BAD_LOSSES[name])
    before = snapshot(learn)
    with pytest.raises(TypeError, match='cross_entropy' if name == 'function' else 'CrossEntropyLoss'): learn.fit_temperature()
    check_untouched(learn, before)
    assert learn.temperature == 1.


def test_a_loss_without_activation_for_labels_is_named():
    learn = multi(nn.BCEWithLogitsLoss())
    before = snapshot(learn)
    with pytest.raises(TypeError, match='BCEWithLogitsLoss'): learn.fit_temperature()
    check_untouched(learn, before)


def test_a_loss_without_activation_is_a_type_error_for_images_too(segment_model):
    "classes along axis 1"
    learn = segment_model
    old, learn.loss_func = learn.loss_func, nn.CrossEntropyLoss(ignore_index=VOID)
    try:
        with pytest.raises(TypeError, match='CrossEntropyLoss'): learn.fit_temperature()
    finally: learn.loss_func = old


def test_regression_is_a_type_error():
    x = torch.randn(80, 6)
    learn = tensor_learner(tensor_dls(x, x[:, :1]), mlp(k=1), MSELossFlat())
    learn.fit(1)
    before = snapshot(learn)
    for call in (Learner.fit_temperature, CalibrationInterpretation.from_learner):
        with pytest.raises(TypeError, match='MSELoss is for regression, where targets are numbers: there are no labels'): call(learn)
    check_untouched(learn, before)


class OtherActivation(CrossEntropyLossFlat):
    def activation(self, x): return F.softmax(2*x, dim=-1)


def test_an_unusual_activation_is_a_type_error():
    learn = single(OtherActivation())
    before = snapshot(learn)
    with pytest.raises(TypeError, match='OtherActivation'): learn.fit_temperature()
    check_untouched(learn, before)


def test_data_without_targets_is_a_value_error():
    learn = single()
    x, _ = valid_logits(learn)
    dl = DataLoader([(o,) for o in torch.randn(20, 6)], bs=8, num_workers=0)
    dl.n_inp = 1
    before = snapshot(learn)
    with pytest.raises(ValueError, match='target'): learn.fit_temperature(dl=dl)
    check_untouched(learn, before, but=('torch', 'py'))


def test_empty_data_is_a_value_error():
    learn = single()
    dl = DataLoader([], bs=8, num_workers=0)
    with pytest.raises(ValueError): learn.fit_temperature(dl=dl)
    assert learn.temperature == 1.


def test_all_ignored_is_a_value_error():
    x, y = noisy_single()
    learn = tensor_learner(tensor_dls(x, torch.full_like(y, -100), n_valid=160), mlp(k=4), CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='target'): learn.fit_temperature()


@both
def test_where_there_is_none_it_warns_and_keeps_one(make):
    learn = make()
    z, y = valid_logits(learn)
    right = (z > 0).float() if y.ndim == 2 else z.argmax(1)
    learn.dls.valid.dataset[:] = [(x, t) for (x, _), t in zip(learn.dls.valid.dataset, right)]
    loss = learn.loss_func
    with pytest.warns(UserWarning, match='T=1'): assert learn.fit_temperature() is learn
    assert learn.temperature == 1. and learn.loss_func is loss


# ---------------------------------------------------------------- afterwards

def reminders(f):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f()
    return [o for o in seen if 'fit_temperature' in str(o.message)]


@both
def test_training_again_keeps_the_temperature_and_warns_once(make):
    learn = make().fit_temperature()
    t = learn.temperature
    assert len(reminders(lambda: learn.fit(3))) == 1 and learn.temperature == t
    assert len(reminders(lambda: learn.fit_one_cycle(2))) == 1 and learn.temperature == t
    check_calibrated(learn, t)


@pytest.mark.parametrize('call', ['lr_find', 'get_preds', 'validate'])
def test_no_warning_where_nothing_is_trained(call):
    learn = single(path=Path('/tmp')).fit_temperature()
    f = dict(lr_find=lambda: learn.lr_find(num_it=5, show_plot=False), get_preds=learn.get_preds, validate=learn.validate)[call]
    assert not reminders(f) and learn.temperature > 1


def test_training_on_from_a_later_epoch_warns():
    learn = single().fit_temperature()
    assert len(reminders(lambda: learn.fit(3, start_epoch=1))) == 1


def test_no_warning_after_reset_or_without_a_temperature():
    learn = single()
    assert not reminders(lambda: learn.fit(1))
    learn.fit_temperature().reset_temperature()
    assert not reminders(lambda: learn.fit(1))


@pytest.mark.parametrize('stays', [True, False])
def test_mixup_left_holding_the_loss(stays):
    "after an exception, whether the callback is still there or was for one fit"
    learn = single()
    loss, cbs = learn.loss_func, [MixUp(), RaiseAt(RuntimeError('power cut'))]
    if stays: learn.add_cbs(cbs)
    with pytest.raises(RuntimeError): learn.fit(1, cbs=[] if stays else cbs)
    assert learn.loss_func is not loss
    learn.fit_temperature()
    near(learn.temperature, best_by_search(*valid_logits(learn)), 1e-4)
    check_calibrated(learn, learn.temperature)
    assert learn.reset_temperature().loss_func is loss


def test_mixup_keeps_the_temperature():
    learn = single()
    loss = learn.loss_func
    learn.fit_temperature()
    t = learn.temperature
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1, cbs=MixUp())
        assert learn.temperature == t
        with pytest.raises(RuntimeError): learn.fit(1, cbs=[MixUp(), RaiseAt(RuntimeError('power cut'))])
    assert learn.temperature == t and learn.reset_temperature().loss_func is loss


def shuffled_single():
    x, y = noisy_single()
    items = list(zip(x, y))
    dls = DataLoaders(DataLoader(items[:160], bs=32, shuffle=True, num_workers=0), DataLoader(items[160:], bs=32, num_workers=0), device=CPU)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(.3), nn.Linear(12, 4))
    return fit_seeded(tensor_learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy), 2)


@pytest.mark.parametrize('mode', [True, False])
@pytest.mark.parametrize('what', ['fit_temperature', 'CalibrationInterpretation'])
def test_nothing_else_changes(what, mode):
    "recorder, training flags, weights, random states, loaders"
    learn = shuffled_single()
    learn.model.train(mode)
    learn.model[2].eval()
    before = snapshot(learn)
    learn.fit_temperature() if what == 'fit_temperature' else CalibrationInterpretation.from_learner(learn)
    check_untouched(learn, before, but=('loss', 'cbs', 'dict') if what == 'fit_temperature' else ())
    learn.reset_temperature()
    check_untouched(learn, before)


def test_a_loader_of_ones_own_keeps_its_random_state():
    "of fastai's, and of torch's with a generator"
    learn = shuffled_single()
    sharp(learn.model)
    dl = DataLoader(learn.dls.valid.dataset, bs=32, shuffle=True, num_workers=0)
    state = dl.rng.getstate()
    learn.fit_temperature(dl=dl)
    assert dl.rng.getstate() == state
    g = torch.Generator().manual_seed(3)
    dl = torch.utils.data.DataLoader(learn.dls.valid.dataset, batch_size=32, shuffle=True, generator=g)
    state = g.get_state()
    t = learn.fit_temperature(dl=dl).temperature
    same(g.get_state(), state)
    near(t, best_by_search(*valid_logits(learn)), 1e-3)


# ---------------------------------------------------------------- images: everything that goes through the activation

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp('digits')
    learn = quiet(Learner(digits_dls(write_digits(path, 160)), nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10)), loss_func=CrossEntropyLossFlat(), opt_func=Adam, lr=.003, path=path))
    torch.manual_seed(0)
    learn.fit(2)
    with torch.no_grad(): learn.model[-1].weight *= 4
    z, y = learn.get_preds(act=noop)
    learn.fit_temperature()
    return learn, z.as_subclass(Tensor), y.as_subclass(Tensor), learn.temperature


def test_images_have_the_best_temperature(images):
    learn, z, y, t = images
    assert t > 1.2
    near(t, best_by_search(z, y), 1e-4)
    near(learn.get_preds()[0], (z/t).softmax(1))


def test_predict_of_one_item(images):
    learn, z, y, t = images
    label, i, probs = learn.predict(learn.dls.valid.items[3])
    near(probs, (z[3]/t).softmax(0), 1e-5)
    assert i == z[3].argmax() and label == learn.dls.vocab[i]


def test_tta(images):
    learn, z, y, t = images
    probs, targs = learn.tta(n=1, beta=None)[0], y   # beta=None: (plain, augmented), no augmentation here
    near(probs[0] if isinstance(probs, tuple) else probs, (z/t).softmax(1), 1e-5)


def test_show_results_and_interpretations(images):
    learn, z, y, t = images
    learn.show_results(max_n=2)
    interp = ClassificationInterpretation.from_learner(learn)
    near(interp.losses, F.cross_entropy(z, y, reduction='none'), 1e-4)   # hard losses, without T
    assert interp.confusion_matrix().trace() == (z.argmax(1) == y).sum()
    idx = [0, 5]
    near(Interpretation.from_learner(learn)[idx][1], (z[idx]/t).softmax(1), 1e-5)
    interp.plot_top_losses(2)
    plt.close('all')


def test_reset_after_pickling_and_export(images, tmp_path):
    learn, z, y, t = images
    loss = learn.loss_func.activation.loss
    learn.export(tmp_path/'m.pkl')
    assert pickle.loads(pickle.dumps(learn.loss_func)).activation.temperature == t
    try: assert learn.reset_temperature().loss_func is loss
    finally: learn.fit_temperature()


LOADER = """
import sys, torch, warnings
warnings.simplefilter('ignore')
from fastai.vision.all import *
def look(name):
    learn = load_learner(name)
    dl = learn.dls.test_dl(torch.load('items', weights_only=False))
    t, probs = learn.temperature, learn.get_preds(dl=dl)[0]
    learn.reset_temperature()
    return t, probs.as_subclass(torch.Tensor), learn.temperature, learn.get_preds(dl=dl)[0].as_subclass(torch.Tensor), type(learn.loss_func).__name__
torch.save([look('plain.pkl'), look('smooth.pkl')], 'out')
"""


def test_export_and_load_in_a_new_process(images, tmp_path):
    "the same calibrated probabilities, and it can be reset there; smoothed or not"
    learn, z, y, t = images
    learn.export(tmp_path/'plain.pkl')
    learn.to_smooth().export(tmp_path/'smooth.pkl')
    learn.to_hard()
    torch.save(list(learn.dls.valid.items), tmp_path/'items')
    subprocess.run([sys.executable, '-c', LOADER], cwd=tmp_path, check=True)
    found = torch.load(tmp_path/'out', weights_only=False)
    for (t2, probs, one, raw, name), expected in zip(found, ('CrossEntropyLossFlat', 'SmoothedCrossEntropyFlat')):
        assert t2 == t and one == 1. and name == expected
        near(probs, (z/t).softmax(1), 1e-5)
        near(raw, z.softmax(1), 1e-5)
    assert learn.temperature == t


WITHOUT = """
import sys, torch, warnings
warnings.simplefilter('ignore')
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'fastai_smooth': raise ModuleNotFoundError(f"No module named '{name}'")
sys.meta_path.insert(0, NotInstalled())
from fastai.vision.all import *
learn = load_learner('hard.pkl')
torch.save(learn.get_preds(dl=learn.dls.test_dl(torch.load('items', weights_only=False)))[0].as_subclass(torch.Tensor), 'out')
"""


def test_export_for_where_the_package_is_not_installed(images, tmp_path):
    "what README says: no smoothing, no temperature, fastai's own metrics"
    learn, z, y, t = images
    metrics = learn.metrics
    learn.to_smooth().to_hard()
    learn.reset_temperature().metrics = accuracy
    try: learn.export(tmp_path/'hard.pkl')
    finally:
        learn.fit_temperature().metrics = metrics
    torch.save(list(learn.dls.valid.items), tmp_path/'items')
    subprocess.run([sys.executable, '-c', WITHOUT], cwd=tmp_path, check=True)
    near(torch.load(tmp_path/'out', weights_only=False), z.softmax(1), 1e-5)
    assert learn.temperature == t


def test_loaded_learner_turns_smoothing_off(images, tmp_path):
    learn, z, y, t = images
    learn.to_smooth()
    learn.export(tmp_path/'m.pkl')
    learn.to_hard()
    loaded = load_learner(tmp_path/'m.pkl')
    assert loaded.temperature_interval == learn.temperature_interval and loaded.temperature_interval[0] > 1
    assert loaded.to_hard().temperature == t
    assert type(loaded.reset_temperature().loss_func) is CrossEntropyLossFlat
