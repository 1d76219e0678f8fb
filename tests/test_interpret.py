"CalibrationInterpretation: a table and pictures of how far probabilities can be believed: SPEC section 6."
import functools, math, warnings

import fuzz, matplotlib.colors, matplotlib.figure, pytest
from fuzz import Row
from hypothesis import strategies as st
from fastai.text.all import text_classifier_learner
from given import *
from given import drawn as drawn_from

from fastai_smooth.all import *
from fastai_smooth.intervals import reliability
from fastai_smooth.interpret import *
from fastai_smooth.pictures import *
from fastai_smooth.predictions import raw_preds
from fastai_smooth.ranking import *
from fastai_smooth.scaling import *
from fastai_smooth.temperature import *

NAN, PERFECT = math.nan, ['if perfectly calibrated', 'at most (95%)']
MEASURES = {'NLL': nll, 'Brier': brier_score, 'ECE': calibration_error, 'classwise ECE': classwise_calibration_error, 'smooth ECE': smooth_calibration_error, 'AURC': RiskCoverageArea()}

@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

# ---------------------------------------------------------------- Learners that predict given logits, three times too large

def drawn(kind, n=100):
    if kind == 'single': return drawn_from(n, 4, t=3., seed=1)
    return drawn_from(n, dict(multi=3, ten=10, binary=1, flat=0)[kind], tensor([1., 2, 4]) if kind == 'multi' else 3., seed=1, multi=True)

def probs_of(z, y): return z.double().sigmoid() if z.shape == y.shape else z.double().softmax(1)
def interpret(learn, **kwargs): return CalibrationInterpretation.from_learner(learn, **kwargs)
def right_of(z, y): return (z > 0) == (y == 1) if z.shape == y.shape else z.argmax(1) == y

@functools.cache
def found(kind):
    "Logits, targets, interpretation and its table: to look at, not to change"
    z, y = drawn(kind)
    interp = interpret(given(z, y))
    return z, y, interp, interp.summary(n_boot=30)

each = pytest.mark.parametrize('kind', ['single', 'multi', 'binary', 'flat'])

# ---------------------------------------------------------------- the table

@each
def test_the_table_has_the_measures_of_predictions(kind):
    "raw, and after a cross-fitted temperature, against hard labels, with the intervals and perfect models of `intervals`"
    z, y, interp, res = found(kind)
    near(interp.raw, probs_of(z, y)), near(interp.temperature, best_temperature(z, y), 1e-4)
    names = ['accuracy', 'NLL', 'Brier', 'ECE', *(['classwise ECE'] if kind == 'single' else []), 'smooth ECE', 'AURC']   # proper scores come first
    assert list(dict.fromkeys(res.index.get_level_values(0))) == names and list(res.index.names) == ['measure', 'probabilities'] and (res.n == 100).all()
    assert list(res.columns) == ['value', 'low', 'high', *PERFECT, 'n', 'T']
    for when, p, t in ('raw', probs_of(z, y), 1.), ('after T', probs_of(cross_fitted(z.double(), y), y), interp.temperature):
        for name in names[1:]:
            row, f = res.loc[(name, when)], MEASURES[name]
            near(row['value'], f(p, y)), near(row['T'], t)
            near((row.low, row.high), aurc(p, y, n_boot=30)[1:3] if name == 'AURC' else bootstrap_interval(f, p, y, n_boot=30), 1e-3)
            near(row[PERFECT], if_calibrated(f, p, y, n_draws=30), 1e-3)
    near(res.loc[('accuracy', 'raw'), 'value'], right_of(z, y).double().mean())
    assert res.loc['accuracy'][PERFECT].isna().all(axis=None) and len(res.loc['accuracy']) == 1
    best = res.loc[('AURC', 'perfect ranking')]
    near(best['value'], aurc(probs_of(z, y), y).perfect)
    assert best.drop(['value', 'n']).isna().all()

@pytest.mark.parametrize('per_label', [False, True])
def test_a_fitted_temperature_is_the_one_shown(per_label):
    "not a cross-fitted one: raw is still raw"
    z, y = drawn('multi' if per_label else 'single')
    learn = given(z, y).fit_temperature(per_label=per_label)
    t, interp = learn.temperature, interpret(learn)
    assert t != 1. and interp.temperature == t and interp.fitted
    near(interp.raw, probs_of(z, y)), near(interp.after, probs_of(z/tensor(t), y)), near(interp.after, learn.get_preds()[0])
    assert all(o == t for o in interp.summary(n_boot=20).xs('after T', level=1)['T'])
    assert ('T per label' if per_label else f'T={t:.2f}') in interp.plot_reliability(return_fig=True).axes[1].get_title('left') + interp.plot_confidences(return_fig=True).axes[1].get_title('left')

def test_options_of_the_table():
    z, y, interp, _ = found('single')
    res = interp.summary(n_bins=5, n_boot=20)
    for name in 'ECE', 'classwise ECE': near(res.loc[(name, 'raw'), 'value'], MEASURES[name](z.softmax(1), y, n_bins=5))
    z, y, interp, _ = found('multi')
    res = interp.summary(average='worst', n_boot=20)
    for name in 'NLL', 'Brier', 'ECE', 'smooth ECE', 'AURC': near(res.loc[(name, 'raw'), 'value'], max(MEASURES[name](z.sigmoid(), y, average=None)))
    near(res.loc[('AURC', 'perfect ranking'), 'value'], aurc(z.sigmoid(), y, average='worst').perfect)
    near(res.loc[('accuracy', 'raw'), 'value'], right_of(z, y).double().mean(0).min())

@pytest.mark.parametrize('vocab', [['mild', 'noisy', 'random'], [['a', 'b'], ['mild', 'noisy', 'random']], ['other']], ids=str)
def test_each_label_the_worst_first(vocab):
    "by name, where the data have as many"
    z, y = drawn('multi')
    learn = given(z, y)
    learn.dls.valid.vocab = vocab
    interp = interpret(learn, dl=learn.dls.valid)
    res, names = interp.summary(by_label=True), ['mild', 'noisy', 'random'] if len(L(vocab)[-1]) == 3 or len(vocab) == 3 else ['0', '1', '2']
    for name in 'NLL', 'Brier', 'ECE':
        for when, p in ('raw', z.sigmoid()), ('after T', cross_fitted(z.double(), y).sigmoid()): near(res[f'{name} {when}'][names], MEASURES[name](p, y, average=None))
    assert list(res['ECE raw']) == sorted(res['ECE raw'], reverse=True)
    near(res['positives'][names], y.mean(0))

@pytest.mark.parametrize('y_shape', [(1, 4, 5), (4, 5)], ids=str)
def test_pixels_are_rows_and_those_of_an_image_belong_together(y_shape):
    "(N,1,H,W) logits with masks (N,1,H,W) or (N,H,W): a row a pixel, of one label"
    z, y = drawn('flat', 600)
    z = z.view(30, 1, 4, 5) + 3*torch.randn(30, 1, 1, 1)
    interp = interpret(given(z, y.view(30, *y_shape)))
    p, items = z.double().sigmoid().flatten(), torch.arange(30).repeat_interleave(20)
    near(interp.raw.flatten(), p), near(interp.targs.flatten(), y), near(interp.items, items)
    row = interp.summary(n_boot=30).loc[('NLL', 'raw')]
    near((row.low, row.high), bootstrap_interval(nll, p, y, n_boot=30, groups=items), 1e-3)
    near(row[PERFECT], if_calibrated(nll, p, y, n_draws=30, groups=items), 1e-3)
    near(interp.summary(n_boot=30).loc[('AURC', 'raw'), ['low', 'high']], aurc(p, y, n_boot=30, groups=items)[1:3], 1e-3)
    bars = interp.plot_reliability(return_fig=True).axes[0].containers[0].lines[2][0].get_segments()
    near([o[:, 1] for o in bars], reliability(p, y, min_n=5, groups=items)[['low', 'high']])
    assert len(interp.summary(by_label=True)) == 1
    with pytest.raises(ValueError, match='one prediction an input'): interp.most_overconfident()

def test_pixels_that_are_ignored_are_left_out():
    z, y = drawn('single', 320)
    y[::7], keep = VOID, torch.arange(320) % 7 > 0
    interp = interpret(given(z.view(20, 4, 4, 4).movedim(-1, 1), y.view(20, 4, 4), CrossEntropyLossFlat(axis=1, ignore_index=VOID)))
    near(interp.raw, z[keep].softmax(1)), near(interp.targs, y[keep])
    images = torch.arange(20).repeat_interleave(16)[keep]   # those of an image get the temperature of other images
    near(interp.after, cross_fitted(z[keep].double(), y[keep], groups=images).softmax(1))
    z[::7] = NAN
    others = interpret(given(z, y, CrossEntropyLossFlat(ignore_index=VOID)))
    near(others.raw, interp.raw), near(others.after, cross_fitted(z[keep].double(), y[keep]).softmax(1))

def test_smoothed_losses_are_measured_on_hard_labels():
    z, y, interp, _ = found('single')
    for learn in given(z, y).to_smooth(.3), given(z, y, LabelSmoothingCrossEntropyFlat(.3)):
        for a in 'raw', 'after', 'temperature', 'losses': near(getattr(interpret(learn), a), getattr(interp, a), 1e-9)
    near(interp.losses, F.cross_entropy(z, y, reduction='none')), near(interp.losses[interp.top_losses(3)[1]], interp.top_losses(3)[0])

def test_other_data():
    z, y = drawn('single')
    learn = given(z, y)
    for kwargs in dict(ds_idx=0), dict(dl=learn.dls.train): near(interpret(learn, **kwargs).raw, z[:40].softmax(1)), near(interpret(learn, **kwargs).targs, y[:40])
    interp = interpret(learn, dl=torch.utils.data.DataLoader(learn.dls.valid.dataset, batch_size=8, shuffle=True))
    assert interp.summary(n_boot=20).n.iloc[0] == 100   # a table is to be had; which item is which is not
    with pytest.raises(ValueError, match='fastai DataLoader'): interp.most_overconfident(show=False)

# ---------------------------------------------------------------- pictures

def test_a_panel_of_one_curve():
    "dots, intervals and gaps to the diagonal, blue above it and orange below; counts in grey"
    z, y = drawn('single', 400)
    p, (top, low) = z.softmax(1), matplotlib.figure.Figure().subplots(2, 1)
    draw_reliability(top, p, y, 8, min_n=7, title='t', counts_ax=low)
    bins = reliability(p, y, 8, min_n=7)
    dots, gaps = top.collections[-1], top.collections[2]
    near(dots.get_offsets(), bins[['confidence', 'accuracy']])
    near(dots.get_sizes(), 15 + 150*bins.n/bins.n.sum())
    near([o[:, 1] for o in gaps.get_segments()], bins[['accuracy', 'confidence']])
    assert [matplotlib.colors.to_hex(o, False) for o in gaps.get_colors()] == [OVER if a < c else UNDER for a, c in zip(bins.accuracy, bins.confidence)]
    near([o.get_height() for o in low.patches], np.histogram(p.amax(1), 8, (0, 1))[0]/400)
    assert (low.get_xlabel(), top.get_ylabel(), top.get_title()) == ('confidence (%)', 'accuracy (%)', 't') and list(top.lines[0].get_xdata()) == list(top.lines[0].get_ydata()) == [0, 1]

def test_a_panel_of_several_curves():
    "each in its style, with a band of intervals, and one diagonal"
    (top, low), curves = matplotlib.figure.Figure().subplots(2, 1), {'a': drawn('single', 400), 'b': drawn('flat', 400)}
    styles = method_styles(list(curves))
    for label, (z, y) in curves.items(): draw_reliability(top, probs_of(z, y), y, counts_ax=low, style=styles[label], label=label)
    assert [o.get_label() for o in top.lines] == top.get_legend_handles_labels()[1] == ['confidence = accuracy', 'a', 'b'] and len(top.texts) == 2
    for line, band, style, (z, y) in zip(top.lines[1:], top.collections[2::2], styles.values(), curves.values()):
        bins = reliability(probs_of(z, y), y, min_n=5)
        near(line.get_xydata(), bins[['confidence', 'accuracy']])
        assert (line.get_color(), line.get_linestyle(), line.get_marker()) == tuple(style.values()) and all(np.isclose(band.get_paths()[0].vertices[:, 1], o).any() for o in (*bins.low, *bins.high))
    assert [o.get_edgecolor()[:3] for o in low.patches] == [o['color'] for o in styles.values()] and len({str(o.get_linestyle()) for o in low.patches}) == 2

@each
@pytest.mark.parametrize('plot', ['plot_reliability', 'plot_confidences', 'plot_risk_coverage'])
def test_plots_make_figures_without_warnings(kind, plot):
    interp = found(kind)[2]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fig = getattr(interp, plot)(return_fig=True)
        fig.canvas.draw()
    assert isinstance(fig, plt.Figure) and getattr(interp, plot)() is None
    if plot != 'plot_reliability': return
    single, axs = kind == 'single', fig.axes
    assert {o.get_xlabel() for o in axs} == {'', f'{"confidence" if single else "probability"} (%)'}
    assert {o.get_ylabel() for o in axs} == {'', f'{"accuracy" if single else "share of positives"} (%)', 'share of\npredictions'}
    assert {o.get_text(): o.get_color() for o in axs[0].texts} == ({'underconfident': UNDER, 'overconfident': OVER} if single else {'too low': UNDER, 'too high': OVER})
    if kind in ('single', 'flat'): assert f'ECE {calibration_error(interp.after, interp.targs):.1%}' in axs[1].get_title('left')

def test_titles_say_what_a_diagram_shows():
    "confidence .8 and .6 of a right and a wrong prediction, or .9 of one of two that happen"
    p = tensor([[.8, .2], [.6, .4]])
    assert reliability_title('raw', p, tensor([0, 1])) == 'raw: ECE 40.0%,\noverconfident by 20.0 points'   # a bin each: off by .2 and .6
    assert reliability_title('T=2', tensor([.9, .9]), tensor([1, 1]), ('too low', 'too high')) == 'T=2: ECE 10.0%,\ntoo low by 10.0 points'
    assert reliability_title('a', tensor([.5, .5]), tensor([1, 0])) == 'a: ECE 0.0%' and reliability_title('a', p*NAN, tensor([0, 1])) == 'a: ECE nan%'

def test_many_labels_are_a_grid():
    "two labels side by side, the odd one alone; ten of them are no column of 31 inches; titles don't touch"
    interp = interpret(given(*drawn('ten', 60)))
    for n, rows in (10, 5), (5, 3), (1, 1):
        fig = interp.plot_reliability(max_n=n, return_fig=True)
        assert len(fig.axes) == 4*n and fig.axes[0].get_gridspec().nrows == 2*rows
        assert fig.get_size_inches()[0] < 12 and fig.get_size_inches()[1] < 18
        worst = [f'{o}\n' for o in interp.summary(by_label=True).index[:n]]
        assert [title[:2] for o in fig.axes if (title := o.get_title('left'))] == [o for o in worst for _ in range(2)]
    assert interp.plot_reliability(label='7', return_fig=True).axes[0].get_title('left').startswith('7\nraw')
    fig = interp.plot_reliability(max_n=3, return_fig=True)
    fig.canvas.draw()
    boxes = [o._left_title.get_window_extent() for o in fig.axes if o.get_title('left')]
    assert all(0 < o.x0 and o.x1 < fig.bbox.x1 for o in boxes) and all(a.x1 < b.x0 or abs(a.y0-b.y0) > 5 for a, b in zip(boxes, boxes[1:]))

@each
def test_right_is_green_and_wrong_is_hatched(kind):
    "each in shares of its own, on a linear axis, not one on top of the other"
    z, y, interp, _ = found(kind)
    fig, right = interp.plot_confidences(return_fig=True), right_of(z, y)
    assert [o.get_text() for o in fig.legends[0].get_texts()] == [f'right ({right.sum():,})', f'wrong ({(~right).sum():,})', 'mean confidence', 'accuracy']
    for ax, p in zip(fig.axes, (interp.raw, interp.after)):
        sure = p.amax(1) if kind == 'single' else torch.maximum(p, 1-p)
        near([o.get_xdata()[0] for o in ax.lines], [sure.mean(), right.double().mean()])
        assert ax.get_yscale() == 'linear' and [matplotlib.colors.to_hex(o.get_edgecolor()) for o in ax.patches] == [RIGHT, WRONG] and [o.get_hatch() for o in ax.patches] == [None, '///']
        assert ax.get_title('left').endswith(f':\nmean confidence {sure.mean():.1%}, accuracy {right.double().mean():.1%}')
        for patch, which in zip(ax.patches, (right, ~right)):
            near(patch.get_xy()[:, 1].max(), np.histogram(sure[which], 20, (.25 if kind == 'single' else .5, 1))[0].max() / int(which.sum()), 1e-9)

@each
def test_risk_coverage_of_both_or_of_one_where_no_order_changes(kind):
    "A temperature for all decisions, yes or no, leaves their order as it is, though a cross-fitted one does so but nearly"
    z, y, interp, _ = found(kind)
    lines, t = interp.plot_risk_coverage(return_fig=True).axes[0].lines, f'after T={interp.temperature:.2f}'
    assert [o.get_label().split(':')[0] for o in lines] == ([f'raw, the same {t}', 'the same errors, ranked perfectly'] if kind != 'single' else ['raw', t, 'the same errors, ranked perfectly'])
    for line, p in zip(lines, [interp.raw, interp.after] if kind == 'single' else [interp.raw]):
        curve = risk_coverage(p, y)
        near(line.get_ydata(), [risk_at(curve, x) for x in line.get_xdata()])
        assert f'{coverage_at(curve, .05):.1%} at 5%' in line.get_label()
    near(risk_at(risk_coverage(interp.raw, y), 1), (~right_of(z, y)).double().mean())

def test_risk_coverage_with_temperatures_that_change_the_order_or_none():
    learn = given(*drawn('multi')).fit_temperature(per_label=True)
    ax = interpret(learn).plot_risk_coverage(return_fig=True).axes[0]
    assert len(ax.lines) == 3 and ax.get_title('left').startswith('Of all decisions, ')
    z, y = drawn('single')
    for k, n in (2, 2), (4, 3): assert len(interpret(given(z[:, :k], y % k)).plot_risk_coverage(return_fig=True).axes[0].lines) == n
    interp = interpret(given(z*NAN, y))
    assert [o.get_label() for o in interp.plot_risk_coverage(return_fig=True).axes[0].lines[:1]] == ['raw, the same after T=1.00: 0.0% can be decided at 1% error, 0.0% at 5%']

# ---------------------------------------------------------------- most_overconfident

@pytest.mark.parametrize('fitted', [False, True])
@pytest.mark.parametrize('kind', ['single', 'multi'])
def test_most_overconfident_are_the_surest_wrong_decisions(kind, fitted):
    "by the probabilities that get_preds gives, the worst label of a row; of those above .5"
    z, y = drawn(kind)
    learn = given(z, y)
    if fitted: learn.fit_temperature(per_label=kind == 'multi')
    p = learn.get_preds()[0]
    sure = torch.where(right_of(z, y), 0., p.amax(1) if kind == 'single' else torch.maximum(p, 1-p)).view(100, -1).amax(1)
    order = sure.argsort(descending=True)
    n = int((sure > .5).sum())
    for k in 0, 5, 10**4:
        probs, idx = interpret(learn).most_overconfident(k, show=False)
        near(probs, sure[order][:min(k, n)]), near(sure[idx], probs)

def test_nothing_wrong_is_nothing(capsys):
    z, _ = drawn('single')
    interp = interpret(given(z, z.argmax(1)))
    assert [len(o) for o in interp.most_overconfident()] == [0, 0] and capsys.readouterr().out == 'no wrong decision has a confidence above .5\n'
    interp.most_overconfident(show=False), interp.plot_reliability(), interp.plot_confidences()
    assert capsys.readouterr().out == '' and interp.temperature == 1. and interp.summary(n_boot=20).loc[('accuracy', 'raw'), 'value'] == 1.

@pytest.fixture(scope='module')
def images(tmp_path_factory): return image_learner(tmp_path_factory.mktemp('digits'))

@pytest.mark.parametrize('which', ['valid', 'ds_idx=0', 'test_dl', 'shuffled', 'equal'])
def test_most_overconfident_shows_the_right_images(images, monkeypatch, which):
    "indices are of dl.items, also of a loader that shuffles, and where several have the same loss"
    learn, valid = images, images.dls.valid
    items = dict(test_dl=list(reversed(valid.items)), equal=[o for o in valid.items for _ in range(3)]).get(which)
    dl = valid.new(shuffle=True) if which == 'shuffled' else learn.dls.test_dl(items, with_labels=True) if items else None
    interp, seen = interpret(learn, ds_idx=0) if which == 'ds_idx=0' else interpret(learn, dl=dl), []
    monkeypatch.setattr(type(interp), '__getitem__', lambda self, idx: seen.append(idx) or Interpretation.__getitem__(self, idx))
    probs, idx = interp.most_overconfident(4)
    near(seen[0], idx)
    p, y = learn.get_preds(dl=learn.dls.test_dl(list(interp.dl.items), with_labels=True))
    wrong = torch.where(p.argmax(1) != y, p.amax(1), 0.)
    near(wrong[idx], probs), near(probs, [o for o in wrong.sort(descending=True)[0][:4].tolist() if o > .5])
    assert len(plt.gcf().axes) >= len(idx) > 1

def test_most_overconfident_of_a_loader_that_sorts():
    "texts by length: indices are of the data"
    learn = quiet(text_classifier_learner(text_dls(), AWD_LSTM, config=small_clas_config(), pretrained=False, path=Path('.')))
    dl = learn.dls.test_dl(TEXTS[:9], with_labels=True)
    p, y = learn.get_preds(dl=dl)
    probs, idx = interpret(learn, dl=dl).most_overconfident(9, show=False)
    near(torch.where(p.argmax(1) != y, p.amax(1), 0.)[idx], probs)

def test_most_overconfident_needs_all_predictions():
    learn = given(*drawn('single', 3000))
    with pytest.raises(ValueError, match='all of them: of 3000'): CalibrationInterpretation(learn, learn.dls.valid, raw_preds(learn, max_numel=1)).most_overconfident()

# ---------------------------------------------------------------- what cannot be, and what must not crash

def draws(interp):
    for f in interp.plot_reliability, interp.plot_confidences, interp.plot_risk_coverage: f(return_fig=True).canvas.draw()
    return interp.summary(n_boot=20), interp.most_overconfident(show=False)

@each
def test_a_diverged_model_does_not_crash(kind):
    "nor one that is nan in some rows"
    z, y = drawn(kind)
    interp = interpret(given(z*NAN, y))
    assert draws(interp)[0].loc['NLL', 'value'].isna().all() and interp.temperature == 1.
    z[3] = NAN
    assert 3 not in draws(interpret(given(z, y)))[1][1].tolist()

def test_one_class_is_always_right():
    res, (probs, _) = draws(interpret(given(torch.randn(50, 1), torch.zeros(50).long())))
    near(res.xs('raw', level=1)['value'], [1, 0, 0, 0, 0, 0, 0])
    assert not len(probs)

def test_it_leaves_the_learner_and_random_states_alone(images):
    learn, others = images, [random.getstate, torch.get_rng_state, lambda: np.random.get_state()[1], lambda: images.dls.train.rng.getstate(),
                             lambda: (images.model.training, images.recorder.values, images.recorder.losses)]
    after = interpret(learn).after
    learn.model.train(), random.random(), torch.rand(2), np.random.rand()
    before = [str(f()) for f in others]
    interp = interpret(learn, dl=learn.dls.train)
    interp[[0, 1]], interp.plot_reliability(), interp.most_overconfident(2, show=False), interp.plot_top_losses(2)
    near(interpret(learn).after, after, 0)
    assert [str(f()) for f in others] == before and learn.recorder.values

def interpreted(kind='single', **kwargs): return interpret(given(*drawn(kind, 30)), **kwargs).raw
def method(name, kind, **kwargs): return getattr(found(kind)[2], name)(**kwargs)

TABLE = dict(
    from_learner=Row(interpreted, st.just(dict(kind='multi', ds_idx=1)), dict(ds_idx=[7, -7, 'x', 1.5, NAN, [1], {}]), examples=1),
    summary=Row(partial(method, 'summary'), st.just(dict(kind='single', n_boot=5)), dict(n_bins=fuzz.BAD_COUNT, n_boot=fuzz.BAD_COUNT, average=[*fuzz.BAD_AVERAGE, None], by_label=[True]), examples=1),
    most_overconfident=Row(partial(method, 'most_overconfident'), st.just(dict(kind='multi', show=False)), dict(k=[-1, 'x', None, NAN, 1.5, [1]]), examples=1),
    plot_reliability=Row(partial(method, 'plot_reliability'), st.just(dict(kind='multi')), dict(n_bins=fuzz.BAD_COUNT, label=['nope', 3, NAN], max_n=[0, -1, 'x', 1.5]), examples=1))
test_refuses, test_takes = fuzz.both_tests(TABLE)
