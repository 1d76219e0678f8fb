"What pilots say about eps: SPEC section 6."
import math, warnings

import fuzz, matplotlib, pytest
from fastai.text.all import language_model_learner, text_classifier_learner
from fuzz import Row
from hypothesis import strategies as st
from scipy.stats import binomtest
from given import *

import fastai_smooth.tune as tune
from fastai_smooth.all import *
from fastai_smooth.noise import noise_estimate
from fastai_smooth.scaling import *
from fastai_smooth.temperature import TemperatureReminder
from fastai_smooth.tune import *

NAN = math.nan
kinds = pytest.mark.parametrize('multi', [False, True], ids=['single', 'multi'])

# ---------------------------------------------------------------- Learners

def noisy(multi=False, n=240, noise=.3):
    g = torch.Generator().manual_seed(0)
    x, k = torch.randn(n, 6, generator=g), 3 if multi else 4
    y = x@torch.randn(6, k, generator=g)
    y, other = ((y > 0).float(), torch.randint(2, (n, k), generator=g).float()) if multi else (y.argmax(1), torch.randint(k, (n,), generator=g))
    return x, torch.where(torch.rand(y.shape, generator=g) < noise, other, y)

def trainable(multi=False, loss=None, **kwargs):
    "A Learner whose training depends on the order of batches and on dropout"
    items, k = list(zip(*noisy(multi))), 3 if multi else 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(.3), nn.Linear(12, k))
    dls = DataLoaders(DataLoader(items[:120], bs=16, shuffle=True, num_workers=0), DataLoader(items[120:], bs=16, num_workers=0), device=CPU)
    return quiet(Learner(dls, model, loss_func=ifnone(loss, BCEWithLogitsLossFlat() if multi else CrossEntropyLossFlat()), lr=.05, path=Path('/tmp'), **kwargs))

def digits(noise=0., n=1500, n_valid=None, multi=False):
    "A Learner on real digits, a share `noise` of the labels any of the ten; `multi`: is it above 4, odd, 0 or 1, a multiple of 3?"
    g = torch.Generator().manual_seed(0)
    idx, y = torch.randperm(len(DIGITS.target), generator=g)[:n], tensor(DIGITS.target)
    y = torch.where(torch.rand(len(y), generator=g) < noise, torch.randint(10, (len(y),), generator=g), y)
    if multi: y = torch.stack([y > 4, y % 2 == 1, y < 2, y % 3 == 0], 1).float()
    items, n_valid = list(zip(tensor(DIGITS.data/16).float()[idx], y[idx])), ifnone(n_valid, n//3)
    dls = DataLoaders(DataLoader(items[n_valid:], bs=64, shuffle=True, num_workers=0), DataLoader(items[:n_valid], bs=64, num_workers=0), device=CPU)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 4 if multi else 10))
    return quiet(Learner(dls, model, BCEWithLogitsLossFlat() if multi else CrossEntropyLossFlat(), lr=.01, path=Path('/tmp')))

def find(learn, n_epoch=3, *args, **kwargs): return learn.eps_find(n_epoch, *args, show_plot=kwargs.pop('show_plot', False), **kwargs)

# ---------------------------------------------------------------- the closed form

def test_closed_form_is_the_validation_error_of_a_pilot():
    "times K/(K-1), without a warning"
    z, y = drawn(120, 4, eta=.2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = find(given(z, y), fit=noop, cap=1.)
    wrong = int((z.argmax(1) != y).sum())
    ci = binomtest(wrong, 120).proportion_ci(.95, 'wilson')
    near((found.valid_error, *found.valid_error_interval), (wrong/120, *ci)), near((found.eps, *found.eps_interval), [o*4/3 for o in (wrong/120, *ci)])
    near((found.noise, *found.noise_interval), noise_estimate(z.float(), y), 1e-4)
    assert found[0] == found.eps and found.scores is None and found.learnt and found.verdict == 'closed form: validation error * K/(K-1)'

@pytest.mark.parametrize('k, shape', [(3, (120, 3)), (1, (120, 1)), (0, (120,))], ids=str)
def test_closed_form_of_labels_is_the_share_of_wrong_ones(k, shape):
    "the eps of 1-eps and eps; (N,) outputs and targets are as (N,1) ones"
    z, y = drawn(120, k, scale=20., eta=.3, multi=True)
    found, error = find(given(z, y), fit=noop, cap=1.), ((z > 0) != (y == 1)).double().mean().item()
    near(found.eps, error), near(found.valid_error, error), near(found.valid_error_interval, found.eps_interval)
    low, high = bootstrap_interval(accuracy_multi, z.float().double().sigmoid().view(120, -1), y.long().view(120, -1))
    near(found.eps_interval, (1-high, 1-low))
    assert found.learnt and found.verdict == 'closed form: share of wrong labels'

@kinds
def test_the_cap_warns(multi):
    "half of it for labels"
    with pytest.warns(UserWarning, match='so the suggestion is cut to .*longer'): found = find(given(*drawn(120, 4, eta=.2, multi=multi)), fit=noop, cap=.08)
    near(found.eps, .04 if multi else .08)
    assert ', cut to' in found.verdict and found.eps_interval[1] == found.eps

# ---------------------------------------------------------------- the pilot, and the grid

def by_hand(learn, n, eps=0., lr=None, seed=42, ds_idx=1):
    "A pilot without the package's: logits and targets"
    model, opt = deepcopy((learn.model, learn.opt))
    with no_random(seed):
        dls = DataLoaders(*[dl.new() for dl in learn.dls.loaders], device=CPU)
        trial = quiet(Learner(dls, model, loss_func=deepcopy(learn.loss_func), lr=learn.lr, path=Path('/tmp')))
        trial.opt = opt
        trial.to_smooth(eps).fit_one_cycle(n, lr)
        x, y = zip(*dls[ds_idx].dataset)
        with torch.no_grad(): return trial.model.eval()(torch.stack(x)), torch.stack(y)

@pytest.mark.parametrize('args, kwargs, n', [((10,), {}, 3), ((1,), {}, 1), ((5,), {}, 2), ((3,), dict(share=1.), 3), ((10, .3), dict(share=.06), 1), ((10,), dict(ds_idx=2, seed=7), 3)])
def test_a_pilot_trains_a_share_of_the_epochs(args, kwargs, n):
    "from where the Learner is, with its learning rate or `lr`, and `seed`"
    learn = trainable()
    fit_seeded(learn, 2)
    learn.dls.loaders.append(learn.dls[0].new())
    z, y = by_hand(learn, n, lr=args[1] if len(args) > 1 else None, **{k: v for k, v in kwargs.items() if k != 'share'})
    near(quietly(find, learn, *args, **kwargs).valid_error, (z.argmax(1) != y).double().mean())

@kinds
def test_scores_of_the_grid(multi):
    "NLL after a cross-fitted temperature, of pilots with the same seed"
    learn, epss = trainable(multi), [0., .1, .3]
    found = quietly(find, learn, 5, share=1., full=True, epss=[.3, .1])
    preds, scores = [by_hand(learn, 5, eps) for eps in epss], found.scores
    scaled = [(cross_fitted(z.double(), y), y) for z, y in preds]
    rows = torch.stack([F.binary_cross_entropy_with_logits(z, y.double(), reduction='none').mean(1) if multi else F.cross_entropy(z, y, reduction='none') for z, y in scaled])
    behind = rows - rows[rows.mean(1).argmin()]
    near(scores.eps, epss), near(scores.nll, rows.mean(1), 1e-5), near(scores.behind, behind.mean(1), 1e-5), near(scores.se, behind.std(1)/math.sqrt(120), 1e-5)
    near(scores.temperature, [best_temperature(*o) or 1. for o in preds], 1e-3)
    near(scores.error, [((z > 0) != (y == 1) if multi else z.argmax(1) != y).double().mean() for z, y in preds])
    near(found.valid_error, scores.error[0])

def frame(behind, se): return pd.DataFrame(dict(eps=[0., .1, .2, .4], nll=np.add(behind, 1.), behind=behind, se=se, temperature=1., error=.1))
FIRST, GOOD = EpsSuggestion(.3, (.2, .4), .1, (0., .2), .2, (.1, .3), 'closed form'), frame([.1, .01, 0., .05], [.02, .02, 0., .02])

def test_the_smallest_within_one_standard_error():
    found = tune._of_grid(FIRST, GOOD)
    assert found.eps == .1 and found.eps_interval == (.1, .2) and 'smallest' in found.verdict and found.noise == FIRST.noise
    with pytest.warns(UserWarning, match='best eps is 0.4, the edge'): assert tune._of_grid(FIRST, frame([.1, .1, .1, 0.], [.02, .02, .02, 0.])).eps == .4

PAIR = .1, 0.

def test_pairs_are_compared_too():
    "by the NLL of pilots that were trained with them"
    learn = trainable(True)
    found = quietly(find, learn, 5, share=1., full=True, epss=[PAIR, .3, (.025, .025), .05, np.array([0., .3]), 0])
    assert found.scores.eps.tolist() == [0., .025, .05, PAIR, (0., .3), .3]
    preds = [by_hand(learn, 5, eps) for eps in found.scores.eps]
    near(found.scores.nll, [F.binary_cross_entropy_with_logits(cross_fitted(z.double(), y), y.double()) for z, y in preds], 1e-5)
    own = quietly(find, trainable(True, LabelSmoothingBCEWithLogitsFlat(.2)), 5, share=1., full=True, epss=[PAIR, (0., .3), .3, .025, .05])
    near(own.scores.nll, found.scores.nll, 1e-5)

def test_the_smallest_pair():
    "is that of the smallest sum; it is printed, and carried to to_smooth"
    grid = frame([.1, .01, 0., .05], [.02, .02, 0., .02]).assign(eps=[0., .05, PAIR, (.2, .1)])
    found = tune._of_grid(FIRST, grid)
    assert found.eps == .05 and found.eps_interval == (.05, PAIR) and 'eps=0.050 [0.050, (0.100, 0.000)] (the smallest' in f'{found}'
    found = tune._of_grid(FIRST, grid.assign(behind=[.1, .1, 0., .01]))
    assert found.eps == PAIR and found.eps_interval == (PAIR, (.2, .1)) and 'eps=(0.100, 0.000) [(0.100, 0.000), (0.200, 0.100)]' in f'{found}'
    assert trainable(True).to_smooth(found).multi_label_smoothing.eps == PAIR
    with pytest.warns(UserWarning, match=r'best eps is \(0.2, 0.1\), the edge'): assert tune._of_grid(FIRST, grid.assign(behind=[.1, .1, .1, 0.])).eps == (.2, .1)
    tune._plot(found, *drawn(60, 3, multi=True), None)
    ax = plt.gca()
    assert [o.get_text() for o in ax.texts] == ['(0.1, 0)', '(0.2, 0.1)'] and 'of a pair the mean' in ax.get_xlabel() and 'eps=(0.100, 0.000)' in ax.get_title(loc='left')
    pilots, dot = (o.lines[0].get_xydata() for o in ax.containers)
    near(pilots[:, 0], [0., .05, .05, .15]), near(dot, pilots[2:3])
    plt.close('all')

@pytest.mark.parametrize('make', [lambda: trainable(True).to_smooth(.1, prior=V), lambda: trainable(True, LabelSmoothingBCEWithLogitsFlat(.1, prior=V))])
def test_a_pair_beside_a_prior_is_refused_before_a_pilot_is_trained(make):
    with pytest.raises(ValueError, match='takes no prior'): find(make().add_cb(Trained()), full=True, epss=[.05, PAIR])

def test_no_evidence():
    "all are within one standard error: the first pilot's word stands"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = tune._of_grid(FIRST, frame([.01, .01, 0., .01], [.02, .02, 0., .02]))
    assert found.verdict.startswith('no evidence') and found.verdict.endswith(FIRST.verdict) and found[:6] == FIRST[:6] and len(found.scores) == 4

@pytest.mark.parametrize('multi, grid', [(False, [0., .05, .1, .2, .4]), (True, [0., .025, .05, .1, .2])])
def test_default_grids(multi, grid): assert list(quietly(find, given(*drawn(60, 3, eta=.1, multi=multi)), fit=noop, full=True).scores.eps) == grid

def test_a_pilot_of_the_grid_that_diverges():
    def fit(trial):
        if trial.loss_func.eps: trial.model.one.data.fill_(NAN)
    learn = given(*drawn(120, 4, eta=.2))
    with pytest.warns(UserWarning, match='eps=0.2 diverged'): found = find(learn, full=True, epss=[.2], fit=fit)
    assert found.scores.eps.tolist() == [0.] and found.verdict.startswith('no evidence') and found.eps == find(learn, fit=noop).eps

def test_a_suggestion_prints_as_a_sentence():
    assert repr(FIRST) == str(FIRST) == ('eps=0.300 [0.200, 0.400] (closed form). The validation error of the pilot is 0.200 [0.100, 0.300]; '
                                         '0.100 [0.000, 0.200] of the labels are random.')
    assert repr(tune._of_grid(FIRST, GOOD)).endswith(' 4 pilots: see scores.')
    nan = FIRST._replace(noise=NAN, eps_interval=(NAN, NAN), verdict='the default')
    assert repr(nan) == 'eps=0.300 (the default). The validation error of the pilot is 0.200 [0.100, 0.300]; it cannot tell how many labels are random.'

# ---------------------------------------------------------------- pilots that have not learnt

def is_default(found, eps):
    return (found.eps == eps and not found.learnt and found.verdict.startswith('the default, as the pilot has not learnt') and math.isnan(found.noise)
            and all(map(math.isnan, (*found.noise_interval, *found.eps_interval))) and 0 < found.valid_error < 1)

@pytest.mark.parametrize('share', [.3, pytest.param(1., marks=pytest.mark.long)])
@pytest.mark.parametrize('noise', [0., .4])
def test_a_pilot_that_has_learnt_noisy_labels(noise, share):
    "its error is large, and says how many of them are random"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'the validation error of the pilot is')
        warnings.filterwarnings('error', 'eps=')
        found = find(digits(noise, *((1700, 700) if share == 1. else ())), 10, share=share)
    near(found.eps, min(.4, found.valid_error*10/9)), near(found.noise, noise, .06)
    assert found.learnt and found.verdict.startswith('closed form')

UNLEARNT = dict(untrained=dict(fit=noop), few_epochs=dict(n_epoch=3, lr=1e-3), small_lr=dict(n_epoch=10, lr=1e-3), tiny_lr=dict(n_epoch=10, lr=1e-5))

@kinds
@pytest.mark.parametrize('name', UNLEARNT)
def test_a_pilot_that_has_not_learnt(name, multi):
    "900 clean images: the default, with the reason, and no word on noise"
    with pytest.warns(UserWarning, match='the default, as the pilot has not learnt.*longer'): found = find(digits(n=900, multi=multi), **UNLEARNT[name])
    assert is_default(found, .05 if multi else .1)
    if name != 'few_epochs': assert ('last third' in found.verdict) == (name == 'small_lr')

def test_a_grid_of_pilots_that_have_not_learnt():
    "is no evidence, whatever its scores; nor is the cap passed by the default"
    with pytest.warns(UserWarning, match='not learnt'): found = find(digits(n=600), fit=noop, full=True, epss=[.2, .9])
    assert is_default(found, .1) and found.scores.eps.tolist() == [0., .2, .9]
    assert is_default(quietly(tune._of_grid, found, GOOD), .1) and is_default(quietly(find, digits(n=300), fit=noop, cap=.04), .04)

@pytest.mark.parametrize('full', [False, True])
@pytest.mark.parametrize('n_valid', [1, 2])
def test_hardly_any_validation_data(full, n_valid):
    with pytest.warns(UserWarning, match='not learnt'): found = find(digits(n=300, n_valid=n_valid), full=full)
    assert found.eps == .1 and not found.learnt

@kinds
def test_an_error_that_no_noise_explains_is_that_of_the_pilot(multi):
    "clean labels that a weak model is rightly unsure of: no noise, and an error of a third"
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 3 if multi else 10, generator=g)*(2. if multi else 3.)
    y = torch.bernoulli(torch.sigmoid(z), generator=g) if multi else torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]
    with pytest.warns(UserWarning, match='its own and not that of the labels.*longer'): found = find(given(z, y), fit=noop)
    assert is_default(found, .05 if multi else .1) and .2 < found.valid_error < .35

def test_items_that_are_known_by_heart_tell_nothing_about_labels():
    "50 images, 30 times"
    learn = digits(n=1050, n_valid=1000)
    learn.dls.train.bs = 16
    with pytest.warns(UserWarning, match='by heart.*shorter'): assert is_default(find(learn, 30, share=1.), .1)

def errors_of(train, valid):
    "`CountErrors` of a training with these errors in its thirds, and validations: (after which third, error); each of 1,000 decisions"
    res = tune.CountErrors()
    res.train = [(tensor(round(1000*e)), 1000) for e in train]
    res.valid = [(at, [(tensor(round(1000*e)), 1000)]) for at, e in valid]
    return res

def why(error, errors, k=10, targs=None, width=.03):
    "For a validation error of 1,000 rows of `k` equal classes"
    found = FIRST._replace(eps=error*k/(k-1), valid_error=error, valid_error_interval=(error - width, error + width))
    return tune._why_not_learnt(found, .1, errors, ifnone(targs, torch.arange(1000) % k), k)

@pytest.mark.parametrize('error, train, valid, kwargs, reason', [
    (.7, [.5, .31, .3], [], {}, 'near 0.90, that of always naming the most frequent class'),            # above 3/4 of .9
    (.48, [.5, .31, .3], [], dict(k=2), 'near 0.50'),                                                   # its interval reaches .5
    (.39, [], [], dict(k=2, targs=torch.tensor([0]*800 + [1]*200)), 'its validation error 0.39 is no better than 0.20'),
    (.3, [.6, .45, .3], [(3, .3)], {}, 'training error still fell from 0.45 to 0.30'),
    (.3, [.5, .31, .3], [(1, .6), (2, .45), (3, .3)], {}, 'validation error still fell from 0.45 to 0.30'),
    (.3, [.4, .25, .1], [(2, .31), (3, .3)], {}, 'by heart: their error 0.10 is less'),
    (.3, [.5, .31, .3], [(2, .44)], dict(targs=torch.arange(50) % 10), 'validation error still fell'),
    (.3, [.5, .31, .3], [(2, .44)], dict(targs=torch.arange(8) % 10, width=.1), None),                  # of 8 rows: within a standard error
    (.3, [.5, .31, .3], [(1, .4), (2, .31), (3, .3)], {}, None),                                        # falls no longer
    (.3, [.4, .25, .16], [(2, .31), (3, .3)], {}, None),                                                # half of it, and no longer falling
    (.3, [.6, .45, .3], [(2, .3), (3, .3)], {}, None),                                                  # validation has come to rest
    (.09, [.4, .25, .01], [(2, .1), (3, .09)], {}, None),                                               # below the default
    (.09, [.6, .3, .1], [(3, .1)], {}, None), (.3, [], [], {}, None)])                                  # trained before
def test_when_a_pilot_has_not_learnt(error, train, valid, kwargs, reason):
    said = why(error, errors_of(train, valid), **kwargs)
    assert said is None if reason is None else reason in said

# ---------------------------------------------------------------- what pilots smooth with

U, V = tensor([.4, .3, .2, .1]), tensor([.2, .3, .4])

def options_seen(learn, **kwargs):
    "(eps, prior, spread) of each pilot"
    seen = []
    def fit(trial):
        cbs = trial.cbs.filter(risinstance(MultiLabelSmoothingCallback))
        o = cbs[0] if cbs else getattr(trial.loss_func, 'func', trial.loss_func)
        seen.append((o.eps, None if getattr(o, 'prior', None) is None or isinstance(o.prior, str) else o.prior.tolist(), getattr(o, 'spread', None)))
    quietly(find, learn, full=True, epss=[.2], fit=fit, **kwargs)
    return seen

def test_prior_and_spread_are_handed_on_or_carried_over():
    assert options_seen(trainable()) == [(0., None, 'all'), (.2, None, 'all')]
    assert options_seen(trainable(), spread='others')[1] == (.2, None, 'others') == options_seen(trainable().to_smooth(.3, spread='others'))[1]
    for learn, options, prior in ((trainable(), dict(prior=U), U), (trainable().to_smooth(.3, prior=U), {}, U), (trainable(True).to_smooth(.1, prior=V), {}, V),
                                  (trainable(loss=LabelSmoothingCrossEntropyFlat(.3, prior=U)), {}, U)): near(options_seen(learn, **options)[1][1], prior)
    assert options_seen(trainable().to_smooth(.3, spread='others').fit_temperature(), spread='all')[1][2] == 'all'

def tempered_learner():
    learn = trainable().add_cb(TemperatureReminder())
    learn.loss_func = tune.tempered(learn.loss_func, 3.)
    return learn

@pytest.mark.parametrize('multi, make', [(False, lambda: trainable().to_smooth(.4)), (False, lambda: trainable(loss=LabelSmoothingCrossEntropyFlat(.4))),
    (False, lambda: trainable(loss=CrossEntropyLossFlat(label_smoothing=.4))), (True, lambda: trainable(True).to_smooth(.2)), (True, lambda: trainable(True, LabelSmoothingBCEWithLogitsFlat(.2))),
    (False, lambda: trainable().to_smooth(.3).add_cb(LabelSmoothingScheduler(SchedCos(.4, .3)))), (False, tempered_learner)])
def test_the_first_pilot_is_not_smoothed_nor_scheduled_nor_tempered(multi, make):
    "whatever the Learner does, which goes on doing it"
    learn = make()
    loss, eps = learn.loss_func, getattr(learn.loss_func, 'eps', None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        near(find(learn, cap=1.)[0], quietly(find, trainable(multi), cap=1.)[0])
    assert learn.loss_func is loss and getattr(loss, 'eps', None) == eps and not [o for o in said if 'fit_temperature' in str(o.message)]

def test_the_package_s_own_loss_of_labels():
    learn = trainable(True, LabelSmoothingBCEWithLogitsFlat(.2, prior=V))
    assert [o[0] for o in options_seen(learn)] == [0., .2]
    with pytest.raises(ValueError, match='prior: LabelSmoothingBCEWithLogitsFlat has its own'): find(learn, full=True, epss=[.1], prior=V)

# ---------------------------------------------------------------- what cannot be

class Trained(Callback):
    def before_fit(self): raise AssertionError('a pilot was trained')

class Own(CrossEntropyLossFlat): pass

def soft(): return given(*[torch.rand(60, 3).softmax(1)]*2, CrossEntropyLossFlat())
def half(trial): trial.dls[1].dataset[0][1][0] = .5
def unknown(trial): trial.dls[1].dataset[0][1][0] = NAN
def zero_nan(trial): trial.model[-1].bias.data[1] = NAN   # the other logits may be finite, and the likelihood is not
def first_nan(trial): params(trial.model)[0].data.fill_(NAN)

@pytest.mark.parametrize('make, kwargs, error, message', [
    *[(partial(trainable, loss=o, cbs=Trained()), {}, TypeError, 'labels') for o in (Own(), MSELossFlat(), nn.NLLLoss(), lambda x, y: x.sum())],
    (partial(trainable, True, cbs=Trained()), dict(full=True, epss=[.7]), ValueError, r"epss must be numbers in \[0,0.5\], or pairs, got \[0.7\]: .*got 0.7"),
    (partial(trainable, cbs=Trained()), dict(full=True, epss=[.1], spread='none'), ValueError, 'spread'),
    (partial(trainable, True, LabelSmoothingCrossEntropyFlat(.1, multi_hot=True)), {}, TypeError, 'needs class indices as targets of LabelSmoothingCrossEntropyFlat'),
    (partial(trainable, True, cbs=Trained()), dict(full=True, epss=[(.6, .5)]), ValueError, r'epss must be numbers in \[0,0.5\], or pairs, got'),
    (partial(trainable, cbs=Trained()), dict(full=True, epss=[PAIR]), TypeError, r'epss must be numbers in \[0,1\], got'),
    (soft, dict(fit=noop), TypeError, 'class indices'),
    *[(partial(trainable, True), dict(fit=o), ValueError, 'labels of 0 and 1') for o in (half, unknown)],
    *[(partial(trainable, multi, opt_func=SGD), dict(lr=1e30, n_epoch=10), ValueError, 'eps=0 diverged') for multi in (False, True)],
    *[(trainable, dict(fit=o), ValueError, 'eps=0 diverged: it predicts nan; try a smaller lr') for o in (first_nan, zero_nan)]])
def test_what_cannot_be_found_is_refused_without_a_trace(make, kwargs, error, message):
    "before any training where that can be"
    learn = make()
    before = snapshot(learn)
    with pytest.raises(error, match=message): quietly(find, learn, **kwargs)
    check_untouched(learn, before)

def test_a_row_that_is_nan_is_left_out():
    z, y = drawn(120, 4, eta=.2)
    other = torch.cat([torch.full_like(z[:1], NAN), z])
    with pytest.warns(UserWarning, match='1 of 121 predictions are nan or inf'): found = find(given(other, torch.cat([y[:1], y])), fit=noop)
    assert found == quietly(find, given(z, y), fit=noop)

# ---------------------------------------------------------------- plots, and no trace

@pytest.mark.parametrize('kind', ['one', 'full', 'not_learnt', 'untrained'])
@kinds
def test_a_figure_is_made(multi, kind):
    "that says what was found"
    plt.close('all')
    learn = given(*drawn(200, 4, eta=.1, multi=multi)) if kind in ('one', 'full') else trainable(multi)
    found = quietly(find, learn, show_plot=True, **dict(one=dict(fit=noop), full=dict(fit=noop, full=True, epss=[.1]), not_learnt=dict(n_epoch=1), untrained=dict(fit=noop))[kind])
    assert len(plt.get_fignums()) == 1 and found.learnt == (kind in ('one', 'full'))
    ax, = plt.gcf().axes
    dots = [o for o in ax.containers if o.lines[0].get_markersize() == 8]
    assert ax.get_xlabel() and ax.get_ylabel() and f'Suggested: eps={found.eps:.3f}, ' in ax.get_title(loc='left')
    assert (f'suggested eps: {found.eps:.3f} (' if found.learnt else f'at the end: {found.valid_error:.3f} (95% interval') in dots[-1].get_label()
    assert dots[-1].get_label() in [o.get_text() for o in ax.get_legend().get_texts()]
    if found.learnt: near(dots[-1].lines[0].get_xdata(), found.eps)
    bottom, top = ax.collections[-1].get_segments()[0]   # from the dot down to the axis
    near(top, dots[-1].lines[0].get_xydata()[0])
    near(bottom, (top[0], ax.get_ylim()[0]))
    colors = {matplotlib.colors.to_hex(o.get_color()) for o in ax.lines}
    assert colors <= {'#000000', '#808080', '#5e3c99'} and plt.rcParams['axes.spines.top']   # of the palette; the user's style is as it was
    plt.gcf().canvas.draw()
    plt.close('all')
    quietly(find, learn, fit=noop)
    assert not plt.get_fignums()

def interrupted(learn, **kwargs):
    with pytest.raises(KeyboardInterrupt): find(learn, **kwargs)
def then_interrupt(trial):
    trial.fit(1)
    raise KeyboardInterrupt

CALLS = dict(one=partial(find, show_plot=True), full=partial(find, full=True, epss=[.1], show_plot=True), fine_tune=partial(find, fit=lambda t: t.fine_tune(1)),
             interrupted=partial(interrupted, fit=then_interrupt), interrupted_inside=partial(interrupted, fit=lambda o: o.fit(2, cbs=RaiseAt(KeyboardInterrupt('c')))))

@pytest.mark.parametrize('call', CALLS)
@pytest.mark.parametrize('trained', [False, True])
def test_eps_find_leaves_no_trace(trained, call):
    learn = trainable(metrics=accuracy)
    if trained: fit_seeded(learn.to_smooth(.2), 1)
    before = snapshot(learn)
    a = quietly(CALLS[call], learn)
    check_untouched(learn, before)
    if call == 'one': assert str(quietly(find, learn)) == str(a)   # the same twice
    plt.close('all')

@pytest.mark.parametrize('make', [lambda: language_model_learner(lm_dls(), AWD_LSTM, config=small_lm_config(), pretrained=False),
                                  lambda: text_classifier_learner(text_dls(), AWD_LSTM, config=small_clas_config(), pretrained=False)], ids=['language_model', 'texts'])
def test_texts_after_lr_find(make, tmp_path):
    "which leaves the last training batch in a callback"
    learn = quiet(make())
    learn.path = tmp_path
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    before = snapshot(learn)
    found = quietly(find, learn, full=True, epss=[.1])
    check_untouched(learn, before)
    assert 0 < found.valid_error <= 1 and list(found.scores.eps) == [0, .1]

def test_lists_of_batches():
    "which fastai trains with"
    learn = given(*drawn(200, 4, eta=.1))
    expected = find(learn, fit=noop)
    learn.dls = DataLoaders(*map(list, learn.dls.loaders))
    assert str(find(learn, fit=noop)) == str(expected)
    quietly(find, learn, full=True, epss=[.1])

# ---------------------------------------------------------------- bad and odd arguments

def found(**kwargs): return quietly(find, given(*drawn(40, 3, eta=.1)), **kwargs)
def grid(value): return lambda a: dict(epss=value, full=True)
def needs_full(**kwargs): return lambda a: kwargs

BAD_SHARE = [0, -.1, 1.5, NAN, 'x', None]
TABLE = dict(eps_find=Row(found, st.just(dict(n_epoch=3, fit=noop)), dict(
    n_epoch=[0, -1, NAN, math.inf, 'x', None, True, [3]], share=BAD_SHARE, cap=BAD_SHARE, ds_idx=[0, 2, -1, 'x', 1.5, None, NAN], seed=fuzz.BAD_SEED, fit=[3, 'x', [1]],
    lr=['x', [1, 'a'], {}], n_epochs=[3], temperature=[2], spread=['others', lambda a: dict(spread='none', full=True, epss=[.1])], prior=[torch.full((3,), 1/3)],
    epss=[[.1], *map(grid, ([], [0.], [NAN], [-.1], [1.5], ['x'], 'abc', .1, [None], 3))]), examples=1))
test_refuses, test_takes = fuzz.both_tests(TABLE, subclasses=(TensorBase, TensorCategory))

@pytest.mark.parametrize('way', ['of the Learner', 'asked for'])
def test_pilots_smooth_online_where_that_is_meant(way, monkeypatch):
    "with the eps that online label smoothing wants, and what the Learner has learnt by then"
    learn, kwargs, seen = trainable(), {}, []
    if way == 'asked for': kwargs = dict(prior='online')
    else:
        learn.to_smooth(prior='online')
        learn.online_label_smoothing.prior = torch.full((4, 4), 1/4)
    class Look(Callback):
        run_valid = False
        def before_batch(self): seen.append((self.learn.loss_func.eps, self.learn.loss_func.online, self.learn.loss_func.func.prior is not None))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = learn.eps_find(1, full=True, show_plot=False, fit=lambda o: o.fit(1, cbs=Look()), **kwargs)
    assert list(found.scores.eps) == [0., .3, .5, .7, .9] and list(dict.fromkeys(seen)) == [(e, True, way != 'asked for') for e in found.scores.eps]
    assert ('online_label_smoothing' in vars(learn)) == (way != 'asked for') and found.prior == 'online' and f'{found.eps:.3f}' in f'{found}'
    assert learn.to_smooth(found).online_label_smoothing.eps == found.eps

def test_pilots_smooth_labels_online():
    "with half of the values, and what the Learner has learnt by then"
    learn, seen = trainable(True).to_smooth(prior='online'), []
    learn.fit(1)
    soft, cb = learn.multi_label_smoothing.learnt.clone(), learn.multi_label_smoothing
    class Look(Callback):
        run_valid = False
        def before_batch(self): seen.append((cb := self.learn.multi_label_smoothing).eps); assert cb.online and (self.train_iter or torch.equal(cb.learnt, soft))
    found = quietly(find, learn, 1, full=True, fit=lambda o: o.fit(1, cbs=Look()))
    assert list(found.scores.eps) == [0., .15, .25, .35, .45] == list(dict.fromkeys(seen)) and found.prior == 'online'
    assert learn.multi_label_smoothing is cb and torch.equal(cb.learnt, soft) and cb.eps == .25
    other = quietly(find, trainable(True), 1, full=True, epss=[.2], prior='online')
    assert trainable(True).to_smooth(other).multi_label_smoothing.online and other.scores.eps.tolist() == [0., .2]
