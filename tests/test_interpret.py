"CalibrationInterpretation: a table and pictures of how far probabilities can be believed: SPEC section 6."
import functools, math, warnings

import matplotlib.colors, pytest
from fastai.text.all import language_model_learner, text_classifier_learner
from fastai.vision.all import unet_learner
from helpers import *

from fastai_smooth.all import LabelSmoothingCrossEntropyFlat
from fastai_smooth.calibration import *
from fastai_smooth.interpret import *
from fastai_smooth.learner import *
from fastai_smooth.pilot import raw_preds
from fastai_smooth.temperature import *

PERFECT = ['if perfectly calibrated', 'at most (95%)']
MEASURES = {'NLL': nll, 'Brier': brier_score, 'ECE': calibration_error, 'classwise ECE': classwise_calibration_error, 'smooth ECE': smooth_calibration_error}


def near(a, b, atol=1e-6): np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=0, atol=atol)


@pytest.fixture(autouse=True)
def no_figures_left():
    plt.close('all')
    yield
    plt.close('all')


# ---------------------------------------------------------------- Learners

def rows(n=300, seed=0): return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def sharp(model, factor=8.):
    with torch.no_grad(): model[-1].weight *= factor
    return model


def made(k, y, loss, n_valid=100, **kwargs):
    learn = tensor_learner(tensor_dls(rows(len(y)), y, n_valid=n_valid, bs=32), mlp(k=k), loss, **kwargs)
    fit_seeded(learn, 6)
    sharp(learn.model)
    return learn


def labels_of(k, noise, seed=1):
    "(n,k): does a linear score say yes? Some at random"
    g = torch.Generator().manual_seed(seed)
    y = (rows()@torch.randn(6, k, generator=g) > 0).float()
    return torch.where(torch.rand(y.shape, generator=g) < torch.as_tensor(noise), 1-y, y)


def single(loss=None, **kwargs):
    g = torch.Generator().manual_seed(1)
    y = (rows()@torch.randn(6, 4, generator=g)).argmax(1)
    return made(4, torch.where(torch.rand(300, generator=g) < .3, torch.randint(4, (300,), generator=g), y), ifnone(loss, CrossEntropyLossFlat()), **kwargs)


def multi(**kwargs): return made(3, labels_of(3, [.02, .2, .4]), BCEWithLogitsLossFlat(), **kwargs)
def binary(flat=False):
    y = labels_of(1, .2)
    return made(1, y[:, 0] if flat else y, BCEWithLogitsLossFlat())


LEARNERS = dict(single=single, multi=multi, binary=binary, binary_flat=lambda: binary(True))
each = pytest.mark.parametrize('make', LEARNERS.values(), ids=LEARNERS)


def logits_of(learn):
    x, y = zip(*learn.dls.valid.dataset)
    with torch.no_grad(): z = learn.model.eval()(torch.stack(x)).double()
    y = torch.stack(y)
    return z, (y.view_as(z) if y.numel() == z.numel() else y)


def probs_of(z, y): return z.sigmoid() if z.shape == y.shape else z.softmax(1)
def interpret(learn, **kwargs): return CalibrationInterpretation.from_learner(learn, **kwargs)


@functools.cache
def found(make):
    "Learner, logits, targets, interpretation and its table: to look at, not to change"
    learn = make()
    interp = interpret(learn)
    return learn, *logits_of(learn), interp, interp.summary(n_boot=200)


# ---------------------------------------------------------------- the table

@each
def test_values_are_the_measures_of_predictions(make):
    "raw, and after a cross-fitted temperature, against hard labels"
    learn, z, y, interp, res = found(make)
    raw, after = probs_of(z, y), probs_of(cross_fitted(z, y), y)
    near(raw, learn.get_preds()[0], 1e-5)
    for name, f in MEASURES.items():
        if name == 'classwise ECE' and make is not single: continue
        near(res.loc[(name, 'raw'), 'value'], f(raw, y), 1e-5)
        near(res.loc[(name, 'after T'), 'value'], f(after, y), 1e-5)
    right = (z.argmax(1) == y) if make is single else ((z > 0) == (y == 1))
    near(res.loc[('accuracy', 'raw'), 'value'], right.double().mean())


@each
def test_columns_n_and_t(make):
    learn, z, y, interp, res = found(make)
    assert list(res.columns) == ['value', 'low', 'high', 'if perfectly calibrated', 'at most (95%)', 'n', 'T'] and list(res.index.names) == ['measure', 'probabilities']
    assert (res.n == 100).all()
    near(interp.temperature, best_temperature(z, y), 1e-4)
    for (_, when), t in res['T'].items(): near(t, 1. if when == 'raw' else interp.temperature)
    names = list(dict.fromkeys(res.index.get_level_values(0)))
    assert names.index('NLL') < names.index('ECE') and names.index('Brier') < names.index('ECE')


@each
def test_intervals_and_perfect_models_are_those_of_the_calibration_functions(make):
    learn, z, y, interp, res = found(make)
    for when, p in ('raw', probs_of(z, y)), ('after T', probs_of(cross_fitted(z, y), y)):
        for name in 'NLL', 'ECE':
            row = res.loc[(name, when)]
            near((row.low, row.high), bootstrap_interval(MEASURES[name], p, y, n_boot=200), 1e-3)
            near(row[PERFECT], null_floor(MEASURES[name], p, y, n_draws=200), 1e-3)
            assert row.low <= row.value <= row.high
    assert res.loc['accuracy'][PERFECT].isna().all().all()


@each
def test_a_fitted_temperature_is_the_one_shown(make):
    "not a cross-fitted one: raw is still raw"
    learn = make()
    z, y = logits_of(learn)
    learn.fit_temperature(ds_idx=0)
    t = learn.temperature
    assert t != 1.
    interp = interpret(learn)
    res = interp.summary(n_boot=200)
    assert interp.temperature == t and (res.xs('after T', level=1)['T'] == t).all()
    near(res.loc[('NLL', 'raw'), 'value'], nll(probs_of(z, y), y), 1e-5)
    near(res.loc[('NLL', 'after T'), 'value'], nll(probs_of(z/t, y), y), 1e-5)
    near(res.loc[('ECE', 'after T'), 'value'], calibration_error(learn.get_preds()[0].double(), y), 1e-4)


def test_temperatures_of_labels():
    learn = multi()
    z, y = logits_of(learn)
    learn.fit_temperature(per_label=True)
    interp = interpret(learn)
    res = interp.summary(n_boot=200)
    near(res.loc[('NLL', 'after T'), 'value'], nll((z/tensor(learn.temperature)).sigmoid(), y), 1e-5)
    assert res.loc[('NLL', 'after T'), 'T'] == learn.temperature
    interp.plot_reliability(), interp.plot_confidences()


def test_n_bins():
    learn = single()
    z, y = logits_of(learn)
    res = interpret(learn).summary(n_bins=5, n_boot=200)
    near(res.loc[('ECE', 'raw'), 'value'], calibration_error(z.softmax(1), y, n_bins=5))
    near(res.loc[('classwise ECE', 'raw'), 'value'], classwise_calibration_error(z.softmax(1), y, n_bins=5))


def test_worst_label():
    learn, z, y, interp, _ = found(multi)
    res = interp.summary(average='worst', n_boot=200)
    for name in 'NLL', 'Brier', 'ECE', 'smooth ECE': near(res.loc[(name, 'raw'), 'value'], max(MEASURES[name](z.sigmoid(), y, average=None)), 1e-6)


def test_each_label_the_worst_first():
    learn = multi()
    learn.dls.valid.vocab = learn.dls.vocab = ['mild', 'noisy', 'random']
    z, y = logits_of(learn)
    res = interpret(learn).summary(by_label=True)
    for name in 'NLL', 'Brier', 'ECE':
        for when, p in ('raw', z.sigmoid()), ('after T', cross_fitted(z, y).sigmoid()):
            near(res[f'{name} {when}'].sort_index(), MEASURES[name](p, y, average=None), 1e-5)
    assert list(res['ECE raw']) == sorted(res['ECE raw'], reverse=True) and set(res.index) <= {'mild', 'noisy', 'random', '0', '1', '2'}
    near(res['positives'].sort_index(), y.mean(0))
    with pytest.raises(ValueError, match='by_label'): interpret(single()).summary(by_label=True)


@pytest.mark.parametrize('y_shape', [(1, 6, 8), (6, 8)], ids=str)
def test_masks_have_one_label(y_shape):
    "(N,1,H,W) logits with masks (N,1,H,W) or (N,H,W): a row a pixel, of one label; pixels of an image belong together"
    g = torch.Generator().manual_seed(0)
    x = 3*torch.randn(40, 1, 6, 8, generator=g)
    y = torch.bernoulli((x/3).sigmoid(), generator=g).reshape(40, *y_shape)
    learn = tensor_learner(tensor_dls(x, y, n_valid=20), nn.Conv2d(1, 1, 1), BCEWithLogitsLossFlat())
    with torch.no_grad(): learn.model.weight.fill_(1), learn.model.bias.zero_()
    interp = interpret(learn)
    p, t = x[20:].double().sigmoid().flatten(), y[20:].flatten()
    near(interp.raw.flatten(), p), near(interp.targs.flatten(), t)
    res = interp.summary(n_boot=100)
    near(res.loc[('ECE', 'raw'), 'value'], calibration_error(p, t))
    near(res.loc[('NLL', 'after T'), 'T'], best_temperature(torch.logit(p), t), 1e-4)
    assert interp.items.tolist() == [i for i in range(20) for _ in range(48)]
    assert len(interp.summary(by_label=True)) == 1
    assert len(interp.plot_reliability(return_fig=True).axes) == 4


def test_smoothed_losses_are_measured_on_hard_labels():
    _, _, _, interp, res = found(single)
    learn = single()
    for loss in learn.to_smooth(.3).loss_func, LabelSmoothingCrossEntropyFlat(.3):
        learn.loss_func = loss
        other = interpret(learn)
        for a in 'raw', 'after', 'temperature', 'losses': near(getattr(other, a), getattr(interp, a), 1e-9)


def test_other_data():
    learn = single()
    x, y = zip(*learn.dls.train.dataset)
    with torch.no_grad(): p = learn.model.eval()(torch.stack(x)).double().softmax(1)
    for kwargs in dict(ds_idx=0), dict(dl=learn.dls.train):
        interp = interpret(learn, **kwargs)
        near(interp.raw, p, 1e-5)
        near(interp.targs, torch.stack(y))


# ---------------------------------------------------------------- pictures

@each
@pytest.mark.parametrize('plot', ['plot_reliability', 'plot_confidences'])
def test_plots_make_figures_without_warnings(make, plot):
    interp = found(make)[3]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fig = getattr(interp, plot)(return_fig=True)
        fig.canvas.draw()
    assert isinstance(fig, plt.Figure) and len(fig.axes) >= 2
    assert getattr(interp, plot)() is None


def test_reliability_draws_accuracy_by_confidence():
    learn, z, y, interp, _ = found(single)
    fig = interp.plot_reliability(n_bins=10, return_fig=True)
    bins = reliability(z.softmax(1), y, 10, min_n=5)
    dots = fig.axes[0].collections[-1].get_offsets()
    near(dots, bins[['confidence', 'accuracy']], 1e-6)
    assert f'{calibration_error(z.softmax(1), y):.3f}' in fig.axes[0].get_title()


def test_reliability_of_one_label():
    interp = found(multi)[3]
    assert len(interp.plot_reliability(label='1', return_fig=True).axes) == 4
    assert len(interp.plot_reliability(max_n=2, return_fig=True).axes) == 8
    with pytest.raises(ValueError, match='nothing'): interp.plot_reliability(label='nothing')


def test_confidences_of_right_and_wrong_decisions():
    learn, z, y, interp, _ = found(single)
    fig = interp.plot_confidences(return_fig=True)
    raw = fig.axes[0]
    sure = z.softmax(1).max(1)[0]
    xs = sorted(o.get_xdata()[0] for o in raw.lines)
    near(xs, sorted([sure.mean(), (z.argmax(1) == y).double().mean()]), 1e-5)


def ten_labels(): return made(10, labels_of(10, [.02*i for i in range(10)]), BCEWithLogitsLossFlat())


def test_many_labels_are_a_grid():
    "two labels side by side, the odd one alone; ten of them are no column of 31 inches"
    interp = found(ten_labels)[3]
    for n, rows in (10, 5), (5, 3), (1, 1):
        fig = interp.plot_reliability(max_n=n, return_fig=True)
        assert len(fig.axes) == 4*n and fig.axes[0].get_gridspec().nrows == 2*rows
    width, height = interp.plot_reliability(max_n=10, return_fig=True).get_size_inches()
    assert width < 12 and height < 18


@pytest.mark.parametrize('k', [3, 6])
def test_titles_of_labels_are_in_the_picture(k):
    learn = made(k, labels_of(k, [.02*i for i in range(k)]), BCEWithLogitsLossFlat())
    learn.fit_temperature(per_label=True)
    fig = interpret(learn).plot_reliability(return_fig=True)
    fig.canvas.draw()
    boxes = [o.title.get_window_extent() for o in fig.axes if o.get_title()]
    assert len(boxes) == 2*k and 'T per label' in fig.axes[1].get_title()
    for o in boxes: assert 0 < o.x0 and o.x1 < fig.bbox.x1
    for a, b in zip(boxes, boxes[1:]): assert a.x1 < b.x0 or abs(a.y0-b.y0) > 5


@each
def test_what_a_picture_calls_a_probability(make):
    interp = found(make)[3]
    axs = interp.plot_reliability(return_fig=True).axes
    assert {o.get_xlabel() for o in axs} == {'', 'confidence' if make is single else 'probability'}
    assert {o.get_ylabel() for o in axs} >= {'accuracy' if make is single else 'share of positives'}
    words = {o.get_text(): o.get_color() for o in axs[0].texts}
    assert words == ({'underconfident': 'C0', 'overconfident': 'C1'} if make is single else {'too low': 'C0', 'too high': 'C1'})


@each
def test_right_is_green_and_wrong_is_red(make):
    "each in shares of its own, on a linear axis, not one on top of the other"
    learn, z, y, interp, _ = found(make)
    fig = interp.plot_confidences(return_fig=True)
    right = (z.argmax(1) == y) if make is single else ((z > 0) == (y == 1))
    assert [o.get_text() for o in fig.legends[0].get_texts()] == [f'right ({right.sum():,})', f'wrong ({(~right).sum():,})', 'mean confidence', 'accuracy']
    for ax, p in zip(fig.axes, (probs_of(z, y), probs_of(cross_fitted(z, y), y))):
        assert ax.get_yscale() == 'linear'
        assert [matplotlib.colors.to_hex(o.get_edgecolor()) for o in ax.patches] == [matplotlib.colors.to_hex(o) for o in ('C2', 'C3')]
        sure = p.amax(1) if make is single else torch.maximum(p, 1-p)
        low = .25 if make is single else .5
        for patch, which in zip(ax.patches, (right, ~right)):
            heights = np.histogram(sure[which], 20, (low, 1))[0] / int(which.sum())
            near(patch.get_xy()[:, 1].max(), heights.max(), 1e-9)


# ---------------------------------------------------------------- most_overconfident

def test_most_overconfident_are_the_surest_wrong_ones():
    learn = single()
    z, y = logits_of(learn)
    sure, pred = z.softmax(1).max(1)
    expected = sorted((i for i in range(100) if pred[i] != y[i]), key=lambda i: -sure[i])
    probs, idx = interpret(learn).most_overconfident(5, show=False)
    assert idx.tolist() == expected[:5]
    near(probs, sure[idx])
    more = [i for i in expected if sure[i] > .5] # what it calls more likely wrong than right is no overconfidence
    assert len(more) < len(expected)
    assert interpret(learn).most_overconfident(10**4, show=False)[1].tolist() == more


@pytest.mark.parametrize('make', [single, multi])
def test_most_overconfident_goes_by_the_fitted_temperature(make):
    "by the probabilities that get_preds gives"
    learn = make()
    if make is multi: learn.fit_temperature(per_label=True)
    else: learn.fit_temperature()
    p, y = learn.get_preds()
    if make is single: sure, wrong = p.amax(1), p.argmax(1) != y
    else: sure, wrong = torch.maximum(p, 1-p), (p > .5) != (y == 1)
    sure = torch.where(wrong, sure, 0.).view(len(y), -1).amax(1)
    probs, idx = interpret(learn).most_overconfident(10**4, show=False)
    near(probs, sure[idx], 1e-5)
    near(probs, sorted(sure[sure > .5].tolist(), reverse=True), 1e-5)
    raw = learn.reset_temperature() and interpret(learn).most_overconfident(10**4, show=False)
    assert len(raw[0]) > len(probs) if make is single else raw[1].tolist() != idx.tolist()


def test_most_overconfident_of_labels():
    "by the surest wrong label of a row"
    learn = multi()
    z, y = logits_of(learn)
    p = z.sigmoid()
    wrong = torch.where((p > .5) == (y == 1), 0., torch.maximum(p, 1-p)).amax(1)
    probs, idx = interpret(learn).most_overconfident(5, show=False)
    near(probs, wrong.sort(descending=True)[0][:5])
    near(wrong[idx], probs)


def test_nothing_wrong_is_nothing(capsys):
    learn = single()
    z, _ = logits_of(learn)
    learn.dls.valid.dataset[:] = [(x, t) for (x, _), t in zip(learn.dls.valid.dataset, z.argmax(1))]
    interp = interpret(learn)
    probs, idx = interp.most_overconfident()
    assert len(probs) == len(idx) == 0
    assert capsys.readouterr().out.splitlines()[-1] == 'no wrong decision has a confidence above .5'
    interp.most_overconfident(show=False)
    assert capsys.readouterr().out == ''
    interp.plot_reliability(), interp.plot_confidences()
    assert interp.temperature == 1. and interp.summary(n_boot=200).loc[('accuracy', 'raw'), 'value'] == 1.


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp('digits')
    learn = quiet(Learner(digits_dls(write_digits(path, 160)), nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10)), loss_func=CrossEntropyLossFlat(), lr=.003, path=path))
    torch.manual_seed(0)
    learn.fit(1)
    return learn


@pytest.mark.parametrize('which', ['valid', 'ds_idx=0', 'train', 'test_dl', 'shuffled'])
def test_most_overconfident_shows_the_right_images(images, monkeypatch, which):
    "indices are of dl.items, also of a loader that shuffles"
    learn, valid = images, images.dls.valid
    dl = dict(valid=None, train=learn.dls.train, shuffled=valid.new(shuffle=True)).get(which)
    if which == 'test_dl': dl = learn.dls.test_dl(list(reversed(valid.items)), with_labels=True)
    interp = interpret(learn, ds_idx=0) if which == 'ds_idx=0' else interpret(learn, dl=dl)
    seen = []
    monkeypatch.setattr(type(interp), '__getitem__', lambda self, idx: seen.append(idx) or Interpretation.__getitem__(self, idx))
    probs, idx = interp.most_overconfident(4)
    near(seen[0], idx)
    p, y = learn.get_preds(dl=learn.dls.test_dl(list(interp.dl.items), with_labels=True))
    sure, pred = p.max(1)
    wrong = torch.where(pred != y, sure, 0.)
    near(wrong[idx], probs, 1e-5)
    surest = wrong.sort(descending=True)[0][:4]
    near(probs, surest[surest > .5], 1e-5)
    assert len(plt.gcf().axes) >= len(idx) > 1


def test_most_overconfident_leaves_the_loader_alone(images):
    interp = interpret(images, dl=images.dls.train)
    state = images.dls.train.rng.getstate()
    interp.most_overconfident(2, show=False)
    assert images.dls.train.rng.getstate() == state


def test_most_overconfident_of_equal_losses(images):
    "the very images, also where several have the same loss"
    items = list(images.dls.valid.items)
    interp = interpret(images, dl=images.dls.test_dl([o for o in items[:6] for _ in range(3)], with_labels=True))
    seen = []
    interp.plot_top_losses = lambda ranks, **kwargs: seen.extend(interp.top_losses(None)[1][ranks].tolist())
    _, idx = interp.most_overconfident(9)
    assert seen == idx.tolist()


def test_most_overconfident_of_a_loader_that_sorts():
    "texts by length: indices are of the data"
    learn = quiet(text_classifier_learner(text_dls(), AWD_LSTM, config=small_clas_config(), pretrained=False, path=Path('.')))
    dl = learn.dls.test_dl(TEXTS[:9], with_labels=True)
    p, y = learn.get_preds(dl=dl)
    sure, pred = p.max(1)
    wrong = torch.where(pred != y, sure, 0.)
    probs, idx = interpret(learn, dl=dl).most_overconfident(9, show=False)
    near(wrong[idx], probs, 1e-5)


def test_most_overconfident_needs_one_prediction_an_input():
    learn = quiet(unet_learner(segment_dls(*segment_arrays(12), bs=4, n_valid=4), tiny_arch, n_out=3, pretrained=False, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=VOID), path=Path('.')))
    interp = interpret(learn)
    with pytest.raises(ValueError, match='one prediction an input'): interp.most_overconfident()
    z, y = (o.as_subclass(Tensor) for o in learn.get_preds(act=noop))
    keep = y.reshape(-1) != VOID
    z, y = z.movedim(1, -1).reshape(-1, 3)[keep].double(), y.reshape(-1)[keep]
    near(interp.raw, z.softmax(1), 1e-5)
    near(interp.targs, y)
    interp.plot_reliability(), interp.plot_confidences()


def test_most_overconfident_needs_all_predictions():
    x = rows(4000)
    learn = tensor_learner(tensor_dls(x, torch.arange(4000) % 4, n_valid=3000, bs=500), mlp(k=4), CrossEntropyLossFlat())
    learn.fit(0)
    interp = CalibrationInterpretation(learn, learn.dls.valid, raw_preds(learn, max_numel=1))
    with pytest.raises(ValueError, match='all of them'): interp.most_overconfident()


def test_language_models():
    learn = quiet(language_model_learner(lm_dls(), AWD_LSTM, config=small_lm_config(), pretrained=False, path=Path('.')))
    interp = interpret(learn)
    interp.summary(n_boot=200), interp.plot_reliability(), interp.plot_confidences()
    with pytest.raises(ValueError): interp.most_overconfident()


# ---------------------------------------------------------------- what cannot be, and what must not crash

class OtherActivation(CrossEntropyLossFlat):
    def activation(self, x): return F.softmax(2*x, dim=-1)


@pytest.mark.parametrize('loss', [OtherActivation(), F.cross_entropy, nn.CrossEntropyLoss()], ids=['other', 'function', 'module'])
def test_a_loss_without_softmax_or_sigmoid_is_a_type_error(loss):
    with pytest.raises(TypeError, match=getattr(loss, '__name__', type(loss).__name__)): interpret(single(loss))


def test_data_without_targets_is_a_value_error():
    dl = DataLoader([(o,) for o in rows(20)], bs=8, num_workers=0)
    dl.n_inp = 1
    with pytest.raises(ValueError, match='target'): interpret(single(), dl=dl)


@each
def test_a_diverged_model_does_not_crash(make):
    learn = make()
    with torch.no_grad(): params(learn.model)[-1].fill_(math.nan)
    interp = interpret(learn)
    res = interp.summary(n_boot=200)
    assert res.loc['NLL', 'value'].isna().all() and interp.temperature == 1.
    for f in interp.plot_reliability, interp.plot_confidences: f(return_fig=True).canvas.draw()
    interp.most_overconfident(show=False)


def test_a_model_that_is_nan_on_some_rows_does_not_crash():
    learn = single()
    learn.dls.valid.dataset[3] = (torch.full((6,), math.nan), learn.dls.valid.dataset[3][1])
    interp = interpret(learn)
    interp.summary(n_boot=200)
    for f in interp.plot_reliability, interp.plot_confidences: f(return_fig=True).canvas.draw()
    probs, idx = interp.most_overconfident(5, show=False)
    z, y = logits_of(learn)
    assert len(idx) == 5 and 3 not in idx.tolist() and (z.argmax(1) != y)[idx].all()


def test_interpretation_s_own_methods_work(images):
    interp = interpret(images)
    z, y = images.get_preds(act=noop)
    near(interp.losses, F.cross_entropy(z, y, reduction='none'), 1e-4)
    losses, idx = interp.top_losses(3)
    near(interp.losses[idx], losses)
    interp.plot_top_losses(2)


def test_from_learner_is_seeded_and_leaves_random_states_alone(images):
    a = interpret(images).after
    random.random(); torch.rand(2); np.random.rand()
    state = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    interp = interpret(images)
    assert (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == state
    near(interp.after, a, 0)
    interp.plot_reliability()
    assert (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == state


def test_showing_images_leaves_the_learner_alone(images):
    learn = images
    modes = [m.training for m in learn.model.modules()]
    learn.model.train()
    values, losses, state = list(learn.recorder.values), list(learn.recorder.losses), random.getstate()
    interpret(learn)[[0, 1]]
    training = learn.model.training
    for m, mode in zip(learn.model.modules(), modes): m.training = mode
    assert training and values and learn.recorder.values == values and learn.recorder.losses == losses and random.getstate() == state


def test_plain_torch_loaders():
    "A table is to be had; which item is which is not"
    learn = single()
    ds = [learn.dls.valid.dataset[i] for i in range(20)]
    loader = torch.utils.data.DataLoader(ds, batch_size=8, shuffle=True)
    interp = CalibrationInterpretation.from_learner(learn, dl=loader)
    assert interp.summary(n_boot=50).n.iloc[0] == 20
    with pytest.raises(ValueError, match='fastai DataLoader'): interp.most_overconfident(show=False)


def test_pixels_of_an_image_belong_together():
    learn = quiet(unet_learner(segment_dls(*segment_arrays(8), bs=4, n_valid=4), tiny_arch, n_out=3, pretrained=False, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=VOID), path=Path('.')))
    interp = interpret(learn)
    n = len(interp.dl.dataset)
    assert interp.total > n and interp.items.unique().tolist() == list(range(n))
    bars = interp.plot_reliability(return_fig=True).axes[0].containers[0].lines[2][0].get_segments()
    bins = reliability(interp.raw, interp.targs, min_n=5, groups=interp.items)
    near([o[:, 1] for o in bars], bins[['low', 'high']])
    assert ((bins.high-bins.low) > 1.2*(reliability(interp.raw, interp.targs, min_n=5).eval('high-low'))).any()
    low, high = interp.summary(n_boot=200).loc[('NLL', 'raw'), ['low', 'high']]
    alone = bootstrap_interval(nll, interp.raw, interp.targs, n_boot=200)
    assert high - low > alone[1] - alone[0]


def test_ignored_rows_may_be_nan():
    learn = single()
    x, y = zip(*learn.dls.valid.dataset)
    learn.dls.valid.dataset[:] = [(x_, y_) for x_, y_ in zip(x, y)] + [(torch.full((6,), math.nan), tensor(-100))]*5
    interp, others = interpret(learn), found(single)[3]
    near(interp.raw, others.raw), near(interp.targs, others.targs)
    assert math.isclose(learn.fit_temperature().temperature, others.temperature, rel_tol=1e-6)


def test_one_class_is_always_right():
    learn = tensor_learner(tensor_dls(rows(), torch.zeros(300, dtype=torch.long)), mlp(k=1), CrossEntropyLossFlat())
    interp = interpret(learn)
    near(interp.summary(n_boot=50).xs('raw', level=1)['value'], [1, 0, 0, 0, 0, 0])
    for f in interp.plot_reliability, interp.plot_confidences: f(return_fig=True).canvas.draw()
    assert not len(interp.most_overconfident(show=False)[0])


def test_average_none_is_by_label():
    with pytest.raises(ValueError, match='by_label'): CalibrationInterpretation.from_learner(multi()).summary(average=None)
