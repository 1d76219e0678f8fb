"The metrics of a Learner are what the functions give for all rows at once, whatever the batches, the loss and the layout."
import itertools, math, pickle
from types import SimpleNamespace

import pytest
from fastai import losses as fastai_losses
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.learner import load_learner
from fastai.tabular.all import tabular_learner
from hypothesis import strategies as st

import fuzz
from helpers import *
from processes import fastai_on_cpu, in_processes, needs_distributed
from test_measures import BAD_BINS, MEASURES, NAN, near
from fastai_smooth.losses import LabelSmoothingCrossEntropyFlat
from fastai_smooth.measures import *
from fastai_smooth.metrics import *
from fastai_smooth.ranking import *
from fastai_smooth.scaling import *

def nll_after_t(p, y, average='macro'):
    "The mean NLL of rows that are divided by a temperature of others, from logits that are made of probabilities"
    if y.ndim < p.ndim: return nll(cross_fitted(p.double().log(), y).softmax(1), y)
    return nll(cross_fitted(p.double().logit(), y).sigmoid(), y, average)

SUMS = dict(zip([NLL, Brier, ECE, ClasswiseECE, SmoothECE], MEASURES))
METRICS = SUMS | {AURC: RiskCoverageArea(), NLLAfterT: nll_after_t}
each_metric = pytest.mark.parametrize('cls', METRICS)

def metrics(**kw):
    "Each metric with the function that it is"
    return [*((cls(**kw), f) for cls, f in METRICS.items()), (ECE(10, norm='l2', **kw), partial(calibration_error, n_bins=10, norm='l2')),
            (ECE(7, binning='mass', debias=True, **kw), partial(calibration_error, n_bins=7, binning='mass', debias=True)),
            (ClasswiseECE(5, norm='max', binning='mass', **kw), partial(classwise_calibration_error, n_bins=5, norm='max', binning='mass'))]

def is_what_the_functions_give(learn, rows=lambda p, y: (p, y), average='macro', act=None, inside=None):
    "`learn.validate()` and the functions on `get_preds`, brought into (N,K) and (N,) by `rows`"
    ms = metrics(average=average, act=act)
    learn.metrics = [m for m, _ in ms]
    got = learn.validate()[1:]
    p, y = rows(*learn.get_preds(act=inside))
    near(got, [f(p, y, average=average) for _, f in ms], 2e-6)
    assert all(type(o) is float for o in got)
    near(learn.validate()[1:], got, 1e-12)   # what was seen is forgotten
    return got

def rows_of(n, *shape, seed=0): return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
def labels_of(*shape): return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < .4).float()

def single(loss=None, model=None, bs=8):
    "Several batches, the last one of 7"
    x, w = rows_of(60, 6), rows_of(6, 4, seed=1)
    return tensor_learner(tensor_dls(x, (x@w + rows_of(60, 4, seed=2)).argmax(1), bs, 23), ifnone(model, mlp(k=4)), ifnone(loss, CrossEntropyLossFlat()))

def multi(k=5): return tensor_learner(tensor_dls(rows_of(60, 6), labels_of(60, k), 8, 23), mlp(k=k), BCEWithLogitsLossFlat())

class OneParameter(nn.Module):
    "Gives its input"
    def __init__(self): super().__init__(); self.one = nn.Parameter(torch.ones(()))
    def forward(self, x): return x*self.one

def as_is(x, y, loss, n_valid=None): return tensor_learner(tensor_dls(x, y, 10, n_valid), OneParameter(), loss)

@pytest.mark.parametrize('average', ['macro', 'worst'])
@pytest.mark.parametrize('make', [single, multi, partial(multi, 1)], ids=['classes', 'labels', 'one label'])
def test_metrics_are_what_the_functions_give(make, average): is_what_the_functions_give(make(), average=average)

@pytest.mark.parametrize('loss', [fastai_losses.LabelSmoothingCrossEntropyFlat(eps=.3), LabelSmoothingCrossEntropyFlat(.3), CrossEntropyLossFlat(label_smoothing=.3)],
                         ids=['fastai', 'ours', 'torch'])
def test_smoothing_losses_are_measured_on_hard_labels(loss):
    near(is_what_the_functions_give(single(loss)), is_what_the_functions_give(single()), 1e-12)

@pytest.mark.parametrize('y_shape', [(60,), (60, 1)], ids=str)
def test_metrics_of_one_logit(y_shape):
    "A sigmoid over one logit a row: the event, whatever the shape of the targets"
    for model in mlp(k=1), nn.Sequential(mlp(k=1), nn.Flatten(0)):
        learn = tensor_learner(tensor_dls(rows_of(60, 6), labels_of(60).reshape(y_shape), 8, 23), model, BCEWithLogitsLossFlat())
        is_what_the_functions_give(learn, lambda p, y: (p.reshape(-1), y.reshape(-1)))

def pixels(y, loss): return tensor_learner(tensor_dls(rows_of(20, 2, 4, 5), y, 3, 8), nn.Conv2d(2, 3, 1), loss)

@pytest.mark.parametrize('ignore', [-100, 255])
def test_metrics_of_pixels(ignore):
    "(N,K,H,W): a row a pixel, without those that the loss ignores"
    y = torch.randint(3, (20, 4, 5))
    y[:, 0, :2] = ignore
    def rows(p, y): return p.movedim(1, -1)[y != ignore], y[y != ignore]
    is_what_the_functions_give(pixels(y, CrossEntropyLossFlat(axis=1, ignore_index=ignore)), rows)

def test_metrics_of_pixels_with_labels():
    is_what_the_functions_give(pixels(labels_of(20, 3, 4, 5), BCEWithLogitsLossFlat(axis=1)), lambda *o: [t.movedim(1, -1).reshape(-1, 3) for t in o])

@pytest.mark.parametrize('y_shape', [(30, 1, 16, 16), (30, 16, 16)], ids=str)
def test_columns_of_an_image_are_no_labels(y_shape):
    "Perfectly calibrated masks of one label: the error is that of all pixels, not the mean of 16 columns'"
    x = torch.randn(30, 1, 16, 16)*2
    y = torch.bernoulli(x.sigmoid())
    learn = as_is(torch.cat([x, x]), torch.cat([y, y]).reshape(60, *y_shape[1:]), BCEWithLogitsLossFlat(), 30)
    learn.metrics = [NLL(), ECE()]
    loss, value, error = learn.validate()
    near([value, error], [loss, calibration_error(x.sigmoid().flatten(), y.flatten())], 1e-6)
    assert error < .02

def test_metrics_of_a_language_model():
    "(bs,seq,V): a row a token"
    learn = tensor_learner(tensor_dls(rows_of(40, 5, 3), torch.randint(7, (40, 5)), 4, 14), nn.Linear(3, 7), CrossEntropyLossFlat())
    is_what_the_functions_give(learn, lambda p, y: (p.reshape(-1, 7), y.reshape(-1)))

def test_large_batches_are_taken_in_parts(monkeypatch):
    "A language model's logits in float64 fill memories"
    sizes, m, x = [], NLL(), torch.ones(1).expand(9, 2**12, 2**10)
    monkeypatch.setattr(NLL, '_rows', lambda self, pred, targ, loss: sizes.append(pred.numel()) or torch.ones(len(pred), 1, 1, 2).double())
    m.reset(), m.accumulate(SimpleNamespace(pred=x, y=x[..., 0], loss_func=None))
    assert m.n == 9 and len(sizes) > 1 and max(sizes) <= 2**25 and sum(sizes) == x.numel()

def test_mass_bins_keep_ties_together():
    "Rows with one probability are in one bin, whatever their outcome, and in whichever batch"
    x, y = torch.linspace(-3, 3, 10).repeat(40)[:, None], (torch.arange(400)[:, None] % 3 == 0).float()
    learn = as_is(x, y, BCEWithLogitsLossFlat(), 200)
    learn.metrics = ECE(7, binning='mass')
    near(learn.validate()[1], calibration_error(x[200:].double().sigmoid(), y[200:], 7, 'mass'))

class To(nn.Module):
    def __init__(self, dtype): super().__init__(); self.dtype = dtype
    def forward(self, x): return x.to(self.dtype)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_logits_have_their_softmax_in_float64(dtype):
    learn = single(lambda p, y: F.cross_entropy(p.float(), y), model=nn.Sequential(mlp(k=4), To(dtype)))
    learn.loss_func.activation = partial(F.softmax, dim=-1)
    is_what_the_functions_give(learn, lambda p, y: (p.double().softmax(-1), y), inside=noop)

def test_act_makes_the_probabilities():
    softmax = partial(F.softmax, dim=-1)
    near(is_what_the_functions_give(single(F.cross_entropy), act=softmax, inside=softmax), is_what_the_functions_give(single()), 1e-12)

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), fastai_losses.FocalLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy], ids=lambda o: getattr(o, '__name__', str(o)))
def test_a_softmax_over_one_class_is_always_right(loss):
    learn = as_is(rows_of(20, 1), torch.zeros(20, *[1]*isinstance(loss, fastai_losses.BaseLoss), dtype=torch.long), loss, 10)
    learn.metrics = [cls(act=partial(F.softmax, dim=-1)) for cls in METRICS]
    near(learn.validate(), [0]*8)

# ---------------------------------------------------------------- ignored rows, nothing, nan

@pytest.mark.parametrize('bad', [NAN, math.inf, -math.inf])
def test_ignored_rows_may_hold_anything(bad):
    "In p=randn(4,3), p[1]=nan, t=[0,-100,1,2] the others count"
    x, y, others = rows_of(4, 3), tensor([0, -100, 1, 2]), [0, 2, 3]
    x[1] = bad
    learn = as_is(torch.cat([x, x]), torch.cat([y, y]), CrossEntropyLossFlat(), 4)
    learn.metrics = [m for m, _ in metrics()]
    loss, *values = learn.validate()
    near(values, [f(x[others].double().softmax(1), y[others]) for _, f in metrics()])
    near(values[0], loss, 1e-6)

def test_nothing_seen_is_None():
    learn = pixels(torch.full((20, 4, 5), 255), CrossEntropyLossFlat(axis=1, ignore_index=255))
    learn.metrics = [m for m, _ in metrics()]
    assert list(learn.validate()[1:]) == [None]*len(learn.metrics)
    for m in learn.metrics:
        m.reset(), m.accumulate(SimpleNamespace(pred=torch.zeros(0, 3), y=torch.zeros(0).long(), loss_func=CrossEntropyLossFlat()))
        assert m.value is None

def test_a_diverged_model_gives_nan():
    for learn in single(), multi():
        for p in learn.model.parameters(): p.data.fill_(NAN)
        learn.metrics = [m for m, _ in metrics()]
        assert all(map(math.isnan, learn.validate()[1:]))

# ---------------------------------------------------------------- names and messages

def test_names():
    "fastai's trackers minimise those with 'loss' or 'error' in them"
    assert [cls().name for cls in METRICS] == ['nll_loss', 'brier_loss', 'calibration_error', 'classwise_calibration_error', 'smooth_calibration_error',
                                                   'aurc_error', 'nll_after_t_loss']
    assert [o.name for o in (ECE(30), ECE(average='worst'), ClasswiseECE(10))] == ['calibration_error30', 'calibration_error_worst', 'classwise_calibration_error10']

@each_metric
def test_trackers_keep_the_lowest_value(cls, tmp_path):
    "The first epoch, after which the model says the opposite, ever more; early stopping and the learning rate go by it too"
    def worse(learn):
        if learn.epoch:
            with torch.no_grad(): learn.model[-1].weight.mul_(-3 if learn.epoch == 1 else 3)
    learn, name = single(), cls().name
    learn.fit(10, .1)
    learn.metrics, learn.path = cls(), tmp_path
    cbs = SaveModelCallback(monitor=name), EarlyStoppingCallback(monitor=name, patience=3), ReduceLROnPlateau(monitor=name, patience=2)
    learn.fit(5, 1e-9, cbs=[Spy(worse, 'before_epoch'), *cbs])
    values = [o[2] for o in learn.recorder.values]
    assert len(values) == 4 and values[0] == min(values) < values[-1] and learn.opt.hypers[-1]['lr'] == 1e-10
    near(learn.validate()[1], values[0])

@each_metric
def test_a_metric_without_parentheses(cls):
    learn, named = single(), single()
    learn.metrics, named.metrics = [accuracy, cls], [accuracy, cls()]
    near(learn.validate(), named.validate())
    assert learn.metrics[1].name == cls().name

@pytest.mark.parametrize('loss, y, act', [(nn.BCEWithLogitsLoss(), (rows_of(60, 4) > 0).float(), 'torch.sigmoid'), (F.cross_entropy, torch.arange(60) % 4, r'partial(F.softmax, dim=1)'),
                                          (lambda x, y: CrossEntropyLossFlat()(x, y), torch.arange(120).reshape(60, 2) % 4, 'partial(F.softmax, dim=-1)')], ids=['labels', 'classes', 'tokens'])
def test_the_advice_for_logits_is_of_their_task(loss, y, act):
    learn = as_is(3*rows_of(60, *([2] if y.shape == (60, 2) else []), 4), y, loss, 20)
    learn.metrics = NLL()
    with pytest.raises(ValueError, match=rf'metric nll_loss: .*apply {"sigmoid" if "sigmoid" in act else "softmax"} to logits first .* has no activation: pass act={re.escape(act)}\)'), learn.no_bar(): learn.validate()
    learn.metrics = NLL(act=eval(act))
    near(*learn.validate(), 1e-6)

# ---------------------------------------------------------------- what comes in

def accumulated(cls, logits, targs, task, **kw):
    m, loss = cls(**kw), CrossEntropyLossFlat() if task == 'classes' else BCEWithLogitsLossFlat()
    m.reset()
    for at in slice(0, 1), slice(1, None): m.accumulate(SimpleNamespace(pred=logits[at], y=targs[at], loss_func=loss))
    return m.value

@st.composite
def drawn(draw, **kw):
    task, n, k = draw(st.sampled_from(['classes', 'labels'])), draw(st.integers(2, 8)), draw(st.integers(2, 4))
    targs = fuzz.randint(draw, k if task == 'classes' else 2, *((n,) if task == 'classes' else (n, k)))
    return dict(logits=fuzz.rand(draw, n, k)*8 - 4, targs=targs, task=task, average=draw(st.sampled_from(['macro', 'worst'])), cls=draw(st.sampled_from([ECE, ClasswiseECE])))

BAD = BAD_BINS | dict(average=['mean', None, 0, 'Macro', ['macro']], act=['softmax', 3, [F.softmax]], bins=[3]) | {
    'targs or targets': [lambda a: a['targs'] + 4, lambda a: a['targs'] - 5, lambda a: torch.cat([a['targs']]*3), lambda a: a['targs'].to(torch.complex64)]}
TABLE = dict(metrics=fuzz.Row(accumulated, drawn(), BAD, dict(logits=fuzz.FLOATS, targs=fuzz.INTEGERS), skip=('sparse', 'nested')))
test_refuses, test_takes = fuzz.both_tests(TABLE, subclasses=(TensorBase, TensorCategory))

# ---------------------------------------------------------------- state

@pytest.mark.parametrize('cls', SUMS)
def test_state_does_not_grow(cls):
    "With the number of batches or rows: sums alone are kept"
    m, sizes = cls(), []
    for n in (8, 200):
        m.reset()
        for _ in range(n): m.accumulate(SimpleNamespace(pred=rows_of(5, 4), y=torch.arange(5) % 4, loss_func=CrossEntropyLossFlat()))
        sizes.append(len(pickle.dumps(m)))
    assert abs(sizes[0]-sizes[1]) < 100

@pytest.mark.parametrize('cls, numbers', [(AURC, 2), (NLLAfterT, 5), (partial(ECE, binning='mass'), 2)])
def test_of_many_rows_an_even_sample_is_kept(cls, numbers):
    "each second, fourth or eighth one, and in memory not more than that"
    z, y = 3*rows_of(1000, 4), torch.multinomial((1.5*rows_of(1000, 4)).softmax(1), 1)[:, 0]
    def accumulated(rows, max_numel=2**26, sizes=(7, 1, 64, 3)):
        m, at = cls(), 0
        m.max_numel = max_numel
        m.reset()
        for n in itertools.cycle(sizes):
            if at >= len(rows): return m
            m.accumulate(SimpleNamespace(pred=z[rows[at:at+n]], y=y[rows[at:at+n]], loss_func=CrossEntropyLossFlat()))
            at += n
    all_rows = torch.arange(1000)
    for step in 1, 2, 8:
        m = accumulated(all_rows, -(-1000//step)*numbers)
        assert m.step == step and m.n == 1000 and sum(o.untyped_storage().nbytes() for o in m.kept) < 9*numbers*1000/step
        near(m.value, accumulated(all_rows[::step]).value, 1e-12)

def test_train_metrics_under_mixup():
    "The hard labels of the batch are measured, as they are"
    learn = single(bs=10)
    learn.metrics, learn.recorder.train_metrics = [NLL(), ECE(binning='mass'), AURC(), NLLAfterT()], True
    learn.fit(2, cbs=MixUp())
    for o in learn.recorder.values: assert len(o) == 10 and all(map(math.isfinite, o))

def test_metrics_pickle(tmp_path):
    learn = quiet(tabular_learner(tabular_dls(tabular_frame()), layers=[4], metrics=[m for m, _ in metrics()], path=tmp_path))
    learn.fit(1)
    learn.export('m.pkl')
    loaded = load_learner(tmp_path/'m.pkl')
    assert [m.name for m in loaded.metrics] == [m.name for m in learn.metrics]
    near(quiet(loaded).validate(dl=learn.dls.valid)[1:], learn.validate()[1:], 1e-6)

def shared_learner():
    "157 validation rows: the ranks get 79 and 78 of them, and one twice; some are ignored, and nan"
    x, w = rows_of(189, 6), rows_of(6, 4, seed=1)
    y = (x@w + 2*rows_of(189, 4, seed=2)).argmax(1)
    x[40::7], y[40::7] = NAN, -100
    model = nn.Linear(6, 4, bias=False)
    model.weight.data = w.T
    return quiet(Learner(tensor_dls(x, y, 16, 157), model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, metrics=[m for m, _ in metrics()]))

def ranked():
    fastai_on_cpu()
    learn = shared_learner()
    with learn.distrib_ctx(sync_bn=False): learn.fit(1, lr=0.)
    return [*learn.recorder.values[-1][2:]]

@needs_distributed
def test_two_processes_measure_what_one_does():
    "Exactly, with rows that do not come out even; but for the temperature, which is that of other rows"
    pytest.importorskip('accelerate')
    from fastai import distributed   # noqa: F401  before the fork
    one = shared_learner().validate()[1:]
    assert all(map(math.isfinite, one))
    after_t = list(METRICS).index(NLLAfterT)
    for values in in_processes(2, ranked):
        near(values[after_t], one[after_t], .01)
        near([o for i, o in enumerate(values) if i != after_t], [o for i, o in enumerate(one) if i != after_t], 1e-6)
