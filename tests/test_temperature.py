"The temperature of a Learner, fitted after training: SPEC section 6."
import math, pickle, re, subprocess, sys, warnings

import fuzz, pytest
from fuzz import Row
from hypothesis import strategies as st
from given import *
from fastai.callback.mixup import MixUp

from fastai_smooth.all import (CalibrationInterpretation, LabelSmoothingBCEWithLogitsFlat, LabelSmoothingCrossEntropy,
                               LabelSmoothingCrossEntropyFlat, MultiLabelSmoothingCallback)
from fastai_smooth.temperature import *
from fastai_smooth.temperature import TemperatureReminder
from fastai_smooth.scaling import *
from fastai_smooth.scaling import fitted

def same(a, b):
    a, b = (torch.as_tensor(o).detach().as_subclass(Tensor) for o in (a, b))
    assert a.dtype == b.dtype and torch.equal(a, b)

# ---------------------------------------------------------------- Learners

def single(loss=None, **kwargs): return given(*drawn(300, 4, t=2.), loss, **kwargs)
def multi(loss=None, **kwargs): return given(*drawn(200, 3, t=2., multi=True), loss, **kwargs)

def valid_logits(learn):
    x, y = zip(*learn.dls.valid.dataset)
    with torch.no_grad(): return learn.model.eval()(torch.stack(x)), torch.stack(y)

def check_calibrated(learn, t):
    z, y = valid_logits(learn)
    near(learn.get_preds()[0], (z/tensor(t)).sigmoid() if y.shape == z.shape else (z/tensor(t)).softmax(1))

def has_reminder(learn): return bool(learn.cbs.filter(risinstance(TemperatureReminder)))
both = pytest.mark.parametrize('make', [single, multi])

@pytest.mark.parametrize('make', [single, multi, lambda: single(LabelSmoothingCrossEntropyFlat(.2)), lambda: single(LabelSmoothingCrossEntropy(.2)), lambda: multi(LabelSmoothingBCEWithLogitsFlat(.1))])
def test_fit_temperature_divides_logits_by_the_best_temperature(make):
    "of validation data and hard labels; decisions and losses don't change, and reset puts the very object back"
    learn = make()
    loss, cbs, before, validated = learn.loss_func, list(learn.cbs), learn.get_preds(with_decoded=True, with_loss=True), learn.validate()
    assert learn.temperature == 1. and learn.temperature_interval is None
    pickled = pickle.dumps(loss.__dict__)
    assert learn.fit_temperature() is learn and isinstance(learn.temperature, float) and has_reminder(learn)
    assert learn.loss_func is not loss and pickle.dumps(loss.__dict__) == pickled   # others may share it
    z, y = valid_logits(learn)
    t = best_by_search(z, y)
    near(learn.temperature, t, 1e-4), near(learn.temperature_interval, temperature_interval(z, y), 1e-3)
    check_calibrated(learn, learn.temperature)
    after = learn.get_preds(with_decoded=True, with_loss=True)
    same(after[2], before[2]), same(after[3], before[3])
    assert learn.validate() == validated
    near(learn.fit_temperature().temperature, t, 1e-4)   # again: of raw logits
    assert len(learn.cbs) == len(cbs) + 1 and learn.reset_temperature() is learn.reset_temperature()
    assert learn.loss_func is loss and learn.temperature == 1. and list(learn.cbs) == cbs and learn.temperature_interval is None
    same(learn.get_preds()[0], before[0])

@both
def test_training_is_bitwise_the_same(make):
    learn, twin, spies = make().fit_temperature(), make(), (Grads(), Grads())
    said_by(lambda: [fit_seeded(o, 2, cbs=spy) for o, spy in zip((learn, twin), spies)])
    for a, b in zip(spies[0].seen, spies[1].seen, strict=True): same(a, b)
    assert len(spies[0].seen) and learn.recorder.values == twin.recorder.values

@pytest.mark.parametrize('which', ['ds_idx', 'train', 'new', 'valid', 'torch'])
def test_other_data(which):
    "which says so if they are those of the training"
    (z, y), learn, of_training = drawn(300, 4, t=2.), single(), which not in ('valid', 'torch')
    loader = torch.utils.data.DataLoader(learn.dls.valid.dataset, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(3))
    dl = dict(train=learn.dls.train, new=learn.dls.train.new(shuffle=True), valid=learn.dls.valid, torch=loader).get(which)
    said = said_by(lambda: learn.fit_temperature(ds_idx=0, dl=dl))
    near(learn.temperature, fitted(z[:40], y[:40]).used if of_training else best_by_search(z, y), 1e-3)
    assert ['training data' in o for o in said] == [True]*of_training
    same(loader.generator.get_state(), torch.Generator().manual_seed(3).get_state())

@pytest.mark.parametrize('ds_idx', [0, 1])
def test_lists_of_batches(ds_idx):
    "which fastai trains with; it says so if they are those of the training"
    (z, y), learn = drawn(300, 4, t=2.), single()
    learn.dls = dls = DataLoaders(*map(list, learn.dls.loaders))
    n = len(z) if ds_idx else 40
    said = said_by(learn.fit_temperature, ds_idx)
    near(learn.temperature, fitted(z[:n], y[:n]).used, 1e-3)
    assert ['training data' in o for o in said] == [True]*(not ds_idx) and learn.dls is dls

@both
@pytest.mark.parametrize('per_label', [False, True])
def test_a_model_that_was_not_trained_warns(make, per_label):
    "once, whatever its random weights are"
    dls, n_out = tensor_dls(torch.randn(320, 6), valid_logits(make())[1].repeat(2, *[1]*(make is multi))[:320]), 3 if make is multi else 4
    for seed in range(4):
        learn = tensor_learner(dls, mlp(k=n_out, seed=seed), make().loss_func)
        message, = said_by(partial(learn.fit_temperature, per_label=per_label and make is multi))
        assert 'trained?' in message or 'no better than chance' in message

# ---------------------------------------------------------------- one T a label; how sure it is

def test_per_label():
    z, y = drawn(200, 3, t=2., multi=True)
    learn = given(z*tensor([1., 2, 3]), y).fit_temperature(per_label=True)
    z, y = valid_logits(learn)
    near(learn.temperature, [best_by_search(*o) for o in zip(z.T, y.T)], 1e-4)
    near(learn.temperature_interval, [temperature_interval(*o) for o in zip(z.T, y.T)], 1e-3)
    check_calibrated(learn, learn.temperature)
    pickle.loads(pickle.dumps(learn.loss_func))
    assert isinstance(learn.fit_temperature().temperature, float)

def printed(capsys, learn, **kwargs):
    learn.logger = print
    learn.fit_temperature(**kwargs)
    return capsys.readouterr().out

def test_it_says_how_sure_it_is(capsys):
    learn = single()
    found = re.fullmatch(r'T=1.9\d, with a 95% interval from 1.[67]\d* to 2.[23]\d*, from 300 predictions(; .*)?\n', printed(capsys, learn))
    z, y = valid_logits(learn)
    plain, normalised = (f'{row_nll(cross_fitted(z, y, normalize=o), y).mean():.4f}' for o in (False, True))
    assert float(plain) < float(normalised) and found[1] == f'; cross-fitted NLL {plain}, and {normalised} of normalised logits'
    assert re.fullmatch(r'T=1.9.*, from 300 predictions\n', printed(capsys, learn, normalize=False))   # nothing was compared
    with learn.no_logging(): learn.fit_temperature()
    assert not capsys.readouterr().out

def test_it_stays_1_where_the_interval_holds_1(capsys):
    "probabilities are bitwise those of before; nothing reminds of a temperature"
    z, y = drawn(20, 4)
    assert abs(best_temperature(z, y) - 1) > .1
    learn = given(z, y)
    probs, loss = learn.get_preds()[0], learn.loss_func
    assert re.fullmatch(r'T stays 1: the best for 20 predictions is T=\S+, with a 95% interval from \S+ to \S+, which holds 1; cross-fitted .*\n', printed(capsys, learn))
    assert learn.temperature == 1. and not has_reminder(learn)
    near(learn.temperature_interval, temperature_interval(z, y), 1e-4)
    same(learn.get_preds()[0], probs)
    assert learn.reset_temperature().loss_func is loss

def test_each_label_stays_1_by_its_own_interval(capsys):
    z, y = drawn(40, 3, multi=True)
    learn = given(z, y)
    assert printed(capsys, learn, per_label=True) == 'T stays 1 for 3 of 3 labels, where its 95% interval holds 1\n'
    assert learn.temperature == [1.]*3 and not has_reminder(learn)
    z[:, 1] *= 6
    learn = given(z, y)
    assert printed(capsys, learn, per_label=True).startswith('T stays 1 for 2 of 3 labels, where its 95% interval holds 1; the others have T from ')
    assert learn.temperature[::2] == [1., 1.] and learn.temperature[1] > 2 and has_reminder(learn)

@both
def test_where_there_is_none_it_warns_and_keeps_one(make):
    z, y = valid_logits(make())
    learn = given(z, (z > 0).float() if make is multi else z.argmax(1), make().loss_func)
    loss = learn.loss_func
    with pytest.warns(UserWarning, match='T=1'): assert learn.fit_temperature() is learn
    assert learn.temperature == 1. and learn.loss_func is loss
    if make is single: return
    learn = given(z, torch.cat([y[:, :2], (z[:, 2:] > 0).float()], 1), loss)
    with pytest.warns(UserWarning, match='of label 2: T=1'): learn.fit_temperature(per_label=True)
    assert learn.temperature[2] == 1. and learn.temperature[0] > 1

# ---------------------------------------------------------------- normalised logits

def by_shape(loss=None, n=400, **kwargs): return given(*drawn_by_shape(n, 5), loss, **kwargs)
def normalised_probs(learn, z): return (learn.temperature.s*normalized(z, learn.temperature.p)).softmax(1)
def interval_of_s(*args): return [1/o for o in reversed(temperature_interval(*args))]

@pytest.mark.parametrize('loss', [None, LabelSmoothingCrossEntropyFlat(.2), LabelSmoothingCrossEntropy(.2)], ids=['fastai', 'flat', 'module'])
def test_logits_are_normalised_where_their_size_says_nothing(loss):
    "decisions and losses don't change, and reset puts the very object back"
    learn = by_shape(loss)
    loss, cbs, before, validated = learn.loss_func, list(learn.cbs), learn.get_preds(with_decoded=True, with_loss=True), learn.validate()
    assert learn.fit_temperature() is learn and has_reminder(learn)
    (z, y), t = valid_logits(learn), learn.temperature
    assert isinstance(t, NormalizedTemperature)
    near(math.log(t.s), -math.log(best_by_search(normalized(z, t.p), y)), 1e-4), near(learn.temperature_interval, interval_of_s(normalized(z, t.p), y), 1e-3)
    near(apply_temperature(z, t).softmax(1), learn.get_preds()[0], 1e-5)
    with pytest.raises(TypeError): z/t   # would be silently wrong
    after = learn.get_preds(with_decoded=True, with_loss=True)
    near(after[0], normalised_probs(learn, z), 1e-5), same(after[2], before[2]), same(after[3], before[3])
    assert learn.validate() == validated and learn.fit_temperature().temperature == t   # again: of raw logits
    assert learn.reset_temperature().loss_func is loss and list(learn.cbs) == cbs and learn.temperature == 1.
    same(learn.get_preds()[0], before[0])

def test_the_form_that_was_asked_for():
    learn = by_shape().fit_temperature(normalize=False)
    assert type(learn.temperature) is float
    check_calibrated(learn, learn.temperature)
    learn = single().fit_temperature(normalize=True)
    near(learn.get_preds()[0], normalised_probs(learn, valid_logits(learn)[0]), 1e-5)
    assert type(learn.fit_temperature().temperature) is float

def test_it_says_which_form_and_why(capsys):
    learn = by_shape()
    said, (z, y) = printed(capsys, learn), valid_logits(learn)
    plain, normalised = (row_nll(cross_fitted(z, y, normalize=o), y).mean() for o in (False, True))
    t, (low, high) = learn.temperature, learn.temperature_interval
    assert said == (f'{t}: s={t.s:.3g}, with a 95% interval from {low:.3g} to {high:.3g}, from 400 predictions; cross-fitted NLL {normalised:.4f}, and {plain:.4f} without '
                    'normalising\n')
    assert str(t).startswith('softmax(') and f'keeps the temperature {t} that was' in said_by(lambda: learn.fit(1, lr=0.))[0]
    gain_by_chance = given(*drawn_by_shape(60, 5, spread=.3))
    assert printed(capsys, gain_by_chance).endswith(' of normalised logits, which may be chance\n') and type(gain_by_chance.temperature) is float

def test_normalised_where_that_is_worse_warns():
    "and the plain form takes its place"
    z = drawn(300, 5)[0]*torch.where(torch.arange(300) % 2 == 0, .01, 3.)[:, None]
    learn = given(z, torch.multinomial((z/1.2).softmax(1), 1, generator=torch.Generator().manual_seed(0))[:, 0])
    message, = said_by(lambda: learn.fit_temperature(normalize=True))
    assert 'no better than T=1' in message
    check_calibrated(learn, learn.temperature)

def test_normalised_where_there_is_no_best_warns_once():
    z = drawn(200, 5)[0]
    learn = given(z, z.argmax(1))
    message, = said_by(lambda: learn.fit_temperature(normalize=True))
    assert 'no temperature is best' in message and learn.temperature == 1.

def test_normalised_is_the_best_whatever_its_interval():
    "T of the plain form stays 1 where its interval holds 1; of s none says that it may as well be another"
    learn = given(*drawn_by_shape(60, 5, spread=.3))
    assert learn.fit_temperature().temperature == 1. and learn.temperature_interval[0] < 1 < learn.temperature_interval[1]
    (z, y), t = valid_logits(learn), learn.fit_temperature(normalize=True).temperature
    near(math.log(t.s), -math.log(best_by_search(normalized(z, t.p), y)), 1e-4)
    assert mean_nll(apply_temperature(z, t), y) <= mean_nll(z, y)

def test_masks_are_normalised_along_their_classes():
    "pixels of an image together, those to be ignored left out"
    z, y = drawn_by_shape(40*16, 4)
    y[::7] = VOID
    x = z.view(40, 4, 4, 4).movedim(-1, 1)
    for axis in 1, -3:
        learn = given(x, y.view(40, 4, 4), CrossEntropyLossFlat(axis=axis, ignore_index=VOID)).fit_temperature()
        t, keep = learn.temperature, y != VOID
        near(math.log(t.s), -math.log(best_by_search(normalized(z[keep], t.p), y[keep])), 1e-4)
        near(learn.temperature_interval, interval_of_s(normalized(z, t.p)[keep], y[keep], torch.arange(40).repeat_interleave(16)[keep]), 2e-3)
        near(learn.get_preds()[0].movedim(1, -1).reshape(-1, 4), normalised_probs(learn, z), 1e-5)

def test_smoothing_carries_a_normalised_temperature():
    learn = by_shape()
    loss, t, probs = learn.loss_func, learn.fit_temperature().temperature, learn.get_preds()[0]
    interval = learn.temperature_interval
    for f in learn.to_smooth, learn.to_hard:
        assert f().temperature == t and learn.temperature_interval == interval
        same(learn.get_preds()[0], probs)
    learn.loss_func = pickle.loads(pickle.dumps(learn.loss_func))
    assert learn.temperature == t and isinstance(learn.temperature, NormalizedTemperature)
    assert by_shape().fit_temperature().reset_temperature().temperature == 1.

def test_it_is_interpreted_as_it_predicts():
    interp, t = CalibrationInterpretation.from_learner(learn := by_shape().fit_temperature()), learn.temperature
    near(interp.after, learn.get_preds()[0], 1e-5), near(interp.raw, valid_logits(learn)[0].softmax(1), 1e-6)
    assert interp.temperature == t and interp.plot_confidences(return_fig=True).axes[1].get_title('left').startswith(f'after normalising (s={t.s:.3g}, p={t.p:g})')
    plt.close('all')
    table = interp.summary(n_boot=20).round(4)
    assert all(o == t for o in table.xs('after T', level=1)['T']) and (table.xs('raw', level=1)['T'] == 1.).all() and str(t) in table.to_string()

# ---------------------------------------------------------------- shapes of output

def test_pixels_of_an_image_count_together():
    "as rows of one item; pixels to be ignored are left out"
    z, y, image = drawn_pixels(20, 64, 1)
    keep = torch.arange(20*64) % 64 > 3
    x, t = z.view(20, 8, 8, 4).movedim(-1, 1), torch.where(keep, y, VOID).view(20, 8, 8)
    for axis in 1, -3:
        learn = given(x*3, t, CrossEntropyLossFlat(axis=axis, ignore_index=VOID)).fit_temperature()
        near(learn.temperature, best_by_search(z[keep]*3, y[keep]), 1e-4)
        near(learn.temperature_interval, temperature_interval(z[keep]*3, y[keep], image[keep]), 1e-3)
        near(learn.get_preds()[0], (x*3/learn.temperature).softmax(1))
    low, high = temperature_interval(z[keep]*3, y[keep])
    assert learn.temperature_interval[0] < low and high < learn.temperature_interval[1]

@pytest.mark.parametrize('shapes', [((20, 1, 8, 8), (20, 1, 8, 8)), ((20, 1, 8, 8), (20, 8, 8)), ((20, 8, 8), (20, 8, 8)), ((1280, 1), (1280, 1)), ((1280, 1), (1280,)), ((1280,), (1280,))], ids=str)
def test_one_label(shapes):
    "of an image or a row: columns are no labels"
    z, y = drawn(1280, 0, t=2., multi=True)
    learn = given(z.view(shapes[0]), y.view(shapes[1]))
    near(learn.fit_temperature().temperature, best_by_search(z, y), 1e-4)
    near(learn.get_preds()[0].flatten(), (z/learn.temperature).sigmoid())
    if len(shapes[0]) > 2: assert len(learn.fit_temperature(per_label=True).temperature) == 1

@pytest.mark.parametrize('axis, loss', [(1, BCEWithLogitsLossFlat()), (2, BCEWithLogitsLossFlat(axis=2)), (1, LabelSmoothingBCEWithLogitsFlat(0.))], ids=['fastai', 'given', 'ours'])
def test_channels_have_a_temperature_each(axis, loss):
    "along the axis of the labels: that of channels, or the one that the loss was given"
    z, y = drawn(5120, 0, multi=True)
    factor = tensor([2., .5])
    z, y = (z.view(40, 2, 8, 8)*factor[:, None, None]).movedim(1, axis), y.view(40, 2, 8, 8).movedim(1, axis)
    learn = given(z, y, loss).fit_temperature(per_label=True)
    near(learn.temperature, factor, .2)
    near(learn.get_preds()[0].movedim(axis, -1), (z.movedim(axis, -1)/tensor(learn.temperature)).sigmoid())

# ---------------------------------------------------------------- with smoothing, and with names that others have taken

@both
@pytest.mark.parametrize('steps', ['fit smooth hard reset', 'smooth fit hard reset', 'smooth fit reset hard', 'fit smooth fit smooth hard fit reset'])
def test_smoothing_carries_the_temperature(make, steps):
    "in every order; at the end the original object is back"
    learn = make()
    loss, t, interval, now = learn.loss_func, best_by_search(*valid_logits(learn)), None, 1.
    for step in steps.split():
        getattr(learn, dict(fit='fit_temperature', smooth='to_smooth', hard='to_hard', reset='reset_temperature')[step])()
        now, interval = (t, learn.temperature_interval) if step == 'fit' else (1., None) if step == 'reset' else (now, interval)
        near(learn.temperature, now, 1e-4)
        assert learn.temperature_interval == interval
        check_calibrated(learn, learn.temperature)
    assert learn.loss_func is loss and not learn.cbs.filter(risinstance((MultiLabelSmoothingCallback, TemperatureReminder)))

def test_to_smooth_of_a_tempered_learner_smooths():
    learn = single().fit_temperature()
    with pytest.raises(ValueError, match='to_smooth'): learn.to_hard()
    z, y = torch.randn(6, 4).requires_grad_(), tensor([0, 3, 1, 2, 2, 0])
    near(learn.to_smooth(.3).loss_func(z, y).item(), F.cross_entropy(z, y, label_smoothing=.3).item())
    near(learn.loss_func(z.detach(), y), F.cross_entropy(z, y).item())

@pytest.mark.parametrize('loss', [F.cross_entropy, nn.CrossEntropyLoss()], ids=['function', 'module'])
def test_to_hard_with_a_loss_that_cannot_hold_a_temperature(loss):
    "the loss is the very object, unchanged, and predictions work"
    learn = single(loss)
    plain = learn.get_preds()[0]
    learn.to_smooth().fit_temperature()
    with pytest.warns(UserWarning, match='is dropped'): learn.to_hard()
    assert learn.loss_func is loss and not hasattr(loss, 'activation')
    same(learn.get_preds()[0], plain)

def test_what_was_pickled():
    "keeps the interval, which older versions lacked"
    learn = single().fit_temperature()
    expected = learn.temperature, learn.temperature_interval
    learn.loss_func = pickle.loads(pickle.dumps(learn.loss_func))
    assert (learn.temperature, learn.temperature_interval) == expected
    del learn.loss_func.activation.interval
    assert learn.temperature_interval is None and learn.to_smooth().temperature == expected[0]

class Distilled(Learner):
    "Has a temperature of its own, as many have, set before fastai's __init__ or after it"
    def __init__(self, *args, before, temperature=4., **kwargs):
        if before: self.temperature = temperature
        super().__init__(*args, **kwargs)
        self.temperature, self.temperature_interval = temperature, 'mine'

@pytest.mark.parametrize('before', [True, False])
def test_a_learner_with_a_temperature_of_its_own(before):
    learn = quiet(Distilled(single().dls, Given(), CrossEntropyLossFlat(), before=before, label_smoothing=.1))
    fit_seeded(learn, 1, lr=0.)
    learn.fit_temperature()
    assert learn.temperature == 4. and learn.temperature_interval == 'mine' and 1.6 < temperature_of(learn) < 2.4
    assert CalibrationInterpretation.from_learner(learn).temperature == temperature_of(learn)
    assert len(said_by(lambda: learn.fit(1, lr=0.))) == 1
    learn.to_hard().reset_temperature()
    del learn.temperature
    assert learn.temperature == 1.

def test_a_callback_of_that_name():
    class Temperature(Callback): "fastai sets it as learn.temperature"
    learn = single(cbs=Temperature()).fit_temperature()
    assert isinstance(learn.temperature, Temperature) and temperature_of(learn) > 1.5
    learn.remove_cb(Temperature)
    assert learn.temperature == temperature_of(learn)

# ---------------------------------------------------------------- what cannot be, and what is left alone

class OtherActivation(CrossEntropyLossFlat):
    def activation(self, x): return F.softmax(2*x, dim=-1)

def loader(items, n_inp=1):
    with no_random():
        res = DataLoader(items, bs=8, num_workers=0)
        res.n_inp = n_inp
        return res

def fitted_to(items): return lambda o: o.fit_temperature(dl=loader(items))

REFUSED = dict(
    function=(lambda: single(F.cross_entropy), Learner.fit_temperature, TypeError, 'cross_entropy has no activation'),
    module=(lambda: single(nn.CrossEntropyLoss()), Learner.fit_temperature, TypeError, 'CrossEntropyLoss has no activation'),
    labels=(lambda: multi(nn.BCEWithLogitsLoss()), Learner.fit_temperature, TypeError, 'BCEWithLogitsLoss has no activation'),
    pixels=(lambda: given(torch.randn(8, 3, 4, 4), torch.zeros(8, 4, 4).long(), nn.CrossEntropyLoss()), Learner.fit_temperature, TypeError, 'CrossEntropyLoss'),
    regression=(lambda: given(*[torch.randn(80, 1)]*2, MSELossFlat()), Learner.fit_temperature, TypeError, 'MSELoss is for regression, where targets are numbers: there are no labels'),
    judged=(lambda: given(*[torch.randn(80, 1)]*2, MSELossFlat()), CalibrationInterpretation.from_learner, TypeError, 'MSELoss is for regression'),
    other=(lambda: single(OtherActivation()), Learner.fit_temperature, TypeError, 'the activation of OtherActivation is not softmax'),
    classes=(single, lambda o: o.fit_temperature(per_label=True), ValueError, 'per_label'),
    two=(lambda: given(*drawn(60, 2)), lambda o: o.fit_temperature(normalize=True), ValueError, 'all rows of 2 are the same'),
    normalised_labels=(multi, lambda o: o.fit_temperature(normalize=True), ValueError, 'labels have a sigmoid each'),
    normalised_per_label=(multi, lambda o: o.fit_temperature(per_label=True, normalize=True), ValueError, 'labels have a sigmoid each'),
    normalised_events=(lambda: given(*drawn(60, 0, multi=True)), lambda o: o.fit_temperature(normalize=True), ValueError, 'labels have a sigmoid each'),
    no_targets=(single, fitted_to([(torch.ones(4),)]*9), ValueError, 'target'), ignored=(single, fitted_to([(torch.ones(4), tensor(-100))]*9), ValueError, 'target'),
    empty=(single, fitted_to([]), ValueError, 'no predictions'))

@pytest.mark.parametrize('name', REFUSED)
def test_what_has_no_temperature_is_refused_and_left_alone(name):
    make, call, error, message = REFUSED[name]
    learn = make()
    before = snapshot(learn)
    with pytest.raises(error, match=message): call(learn)
    check_untouched(learn, before)

@pytest.mark.parametrize('mode', [True, False])
@pytest.mark.parametrize('call', [Learner.fit_temperature, CalibrationInterpretation.from_learner])
def test_nothing_but_the_temperature_changes(call, mode):
    "recorder, training flags, weights, random states, loaders"
    items = list(zip(*drawn(300, 4, t=2.)))
    dls = DataLoaders(*[DataLoader([(x.float(), y) for x, y in items], bs=32, shuffle=True, num_workers=0) for _ in range(2)], device=CPU)
    learn = fit_seeded(tensor_learner(dls, nn.Sequential(Given(), nn.BatchNorm1d(4), nn.Dropout(.3)), CrossEntropyLossFlat()), 1)
    learn.model.train(mode)[2].eval()
    before = snapshot(learn)
    said_by(lambda: call(learn))
    learn.reset_temperature()
    check_untouched(learn, before)

# ---------------------------------------------------------------- afterwards

@both
def test_training_again_keeps_the_temperature_and_warns_once(make):
    learn = make().fit_temperature()
    t = learn.temperature
    for f in (lambda: learn.lr_find(num_it=8, show_plot=False, suggest_funcs=()), learn.get_preds, learn.validate): assert not said_by(f)   # nothing is trained
    for f in (lambda: learn.fit(3, lr=0.), lambda: learn.fit_one_cycle(2, 1e-9), lambda: learn.fit(3, lr=0., start_epoch=1)):
        assert ['fit_temperature again' in o for o in said_by(f)] == [True] and learn.temperature == t
    learn.reset_temperature()
    assert not said_by(lambda: learn.fit(1)) and not said_by(lambda: make().fit(1))

@pytest.mark.parametrize('stays', [True, False])
def test_mixup_left_holding_the_loss(stays):
    "after an exception, whether the callback is still there or was for one fit; where it trains to the end the temperature stays"
    learn = single()
    loss, cbs = learn.loss_func, [MixUp(), RaiseAt(RuntimeError('power cut'), nth=0)]
    if stays: learn.add_cbs(cbs)
    with pytest.raises(RuntimeError): learn.fit(1, lr=0., cbs=[] if stays else cbs)
    assert learn.loss_func is not loss
    near(learn.fit_temperature().temperature, best_by_search(*valid_logits(learn)), 1e-4)
    check_calibrated(learn, t := learn.temperature)
    said_by(learn.remove_cbs(learn.cbs.filter(risinstance((MixUp, RaiseAt)))).fit, 1, cbs=MixUp())
    assert learn.temperature == t and learn.reset_temperature().loss_func is loss

# ---------------------------------------------------------------- images: everything that goes through the activation

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    learn = image_learner(tmp_path_factory.mktemp('digits'))
    z, y = learn.get_preds(act=noop)
    return learn, z.as_subclass(Tensor), y.as_subclass(Tensor), learn.fit_temperature().temperature

def test_all_that_predicts_images_is_calibrated(images):
    learn, z, y, t = images
    assert t > 1.2
    near(t, best_by_search(z, y), 1e-4)
    near(learn.get_preds()[0], (z/t).softmax(1))
    label, i, probs = learn.predict(learn.dls.valid.items[3])
    near(probs, (z[3]/t).softmax(0), 1e-5)
    assert i == z[3].argmax() and label == learn.dls.vocab[i]
    near(learn.tta(n=1, beta=None)[0][0], (z/t).softmax(1), 1e-5)
    learn.show_results(max_n=2)
    interp = ClassificationInterpretation.from_learner(learn)
    near(interp.losses, F.cross_entropy(z, y, reduction='none'), 1e-4)   # hard losses, without T
    near(interp[[0, 5]][1], (z[[0, 5]]/t).softmax(1), 1e-5)
    plt.close('all')

ELSEWHERE = """
import sys, torch, warnings
warnings.simplefilter('ignore')
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'fastai_smooth': raise ModuleNotFoundError(f"No module named '{name}'")
sys.meta_path.insert(0, NotInstalled())
from fastai.vision.all import *
items = torch.load('items', weights_only=False)
def probs(learn): return learn.get_preds(dl=learn.dls.test_dl(items))[0].as_subclass(torch.Tensor)
hard = probs(load_learner('hard.pkl'))
sys.meta_path.pop(0)
def look(name):
    learn = load_learner(name)
    t, fitted = (learn.temperature, learn.temperature_interval), probs(learn)
    if name == 'smooth.pkl':
        import fastai_smooth.learner # has the patches
        learn.to_hard()
    learn.reset_temperature()
    return t, fitted, probs(learn), type(learn.loss_func).__name__
torch.save((hard, look('plain.pkl'), look('smooth.pkl'), look('normalised.pkl')), 'out')
"""

@pytest.mark.slow
def test_export_and_load_in_a_new_process(images, tmp_path):
    "the same calibrated probabilities, and reset works there; one without temperature and smoothing needs no package, as README says"
    learn, z, y, t = images
    learn.export(tmp_path/'plain.pkl')
    learn.to_smooth().export(tmp_path/'smooth.pkl')
    learn.to_hard().reset_temperature().export(tmp_path/'hard.pkl')
    learn.fit_temperature(normalize=True).export(tmp_path/'normalised.pkl')
    normalised = learn.temperature, learn.temperature_interval, learn.get_preds()[0]
    assert isinstance(normalised[0], NormalizedTemperature) and learn.fit_temperature(normalize=False).temperature == t
    torch.save(list(learn.dls.valid.items), tmp_path/'items')
    subprocess.run([sys.executable, '-c', ELSEWHERE], cwd=tmp_path, check=True)
    hard, *loaded = torch.load(tmp_path/'out', weights_only=False)
    near(hard, z.softmax(1), 1e-5)
    plain = t, learn.temperature_interval, (z/t).softmax(1)
    for (found, probs, raw, name), expected in zip(loaded, (plain, plain, normalised), strict=True):
        assert found == expected[:2] and name == 'CrossEntropyLossFlat'
        near(probs, expected[2], 1e-5), near(raw, z.softmax(1), 1e-5)

# ---------------------------------------------------------------- bad and odd arguments

def fit(**kwargs): return given(*drawn(60, 3, t=3.)).fit_temperature(**kwargs).temperature

TABLE = dict(fit_temperature=Row(fit, st.just(dict(ds_idx=1)), dict(ds_idx=[7, -7, 'x', 1.5, math.nan, [1], {}], per_label=[True],
                                                                         normalize=['x', 2, .5, [], {}, 'None']), examples=1))
test_refuses, test_takes = fuzz.both_tests(TABLE)
