"""Learners of every type, trained for real: what fastai's own loss can do, each way of smoothing can.

A Learner with fastai's own loss makes every call first; those it passes are asked of the loss, the flag and the callback, with the same kind of
result. Expected numbers come from PyTorch, in float64."""
import io, pickle, subprocess, sys
from contextlib import redirect_stdout
from functools import cache
from typing import NamedTuple

import pytest
from helpers import *
from fastai.tabular.all import tabular_learner
from fastai.text.all import BaseTokenizer, TextBlock, language_model_learner, text_classifier_learner
from fastai_smooth.all import *

for name in [n for n in globals() if n.startswith('test')]: del globals()[name]  # fastcore's test_eq and friends

pytestmark = pytest.mark.filterwarnings('ignore:.*is ill-defined', 'ignore:.*NumPy array is not writable')   # of few rows
SEQ_LEN = 8

def close(a, b, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(*(torch.as_tensor(o).detach().as_subclass(torch.Tensor).double() for o in (a, b)), atol=atol, rtol=rtol)

# ---------------------------------------------------------------- the types

def words_dls(is_lm):
    "Made as users do, tokenizer and all, which `predict` and `show_results` need"
    df = pd.DataFrame(dict(text=TEXTS, label=['cat' if 'cat' in t else 'dog' for t in TEXTS], valid=[i >= 16 for i in range(len(TEXTS))]))
    text = TextBlock.from_df('text', is_lm=is_lm, seq_len=SEQ_LEN, min_freq=1, tok=BaseTokenizer(), n_workers=0)
    block = DataBlock(text if is_lm else (text, CategoryBlock), get_x=ColReader('text'), get_y=None if is_lm else ColReader('label'),
                      splitter=ColSplitter('valid'))
    return block.dataloaders(df, bs=4, num_workers=0, device=CPU, **(dict(seq_len=SEQ_LEN) if is_lm else {}))

def make_data(folder):
    df = tabular_frame(40)
    return SimpleNamespace(
        digits=digits_dls(write_digits(folder/'digits', 40), bs=16), pairs=pairs_dls(folder/'pairs', write_pairs(folder/'pairs', 40), bs=16),
        masks=segment_dls(*segment_arrays(12), bs=4, n_valid=4), table=tabular_dls(df, bs=8, n_valid=16),
        multi_table=tabular_multi_dls(df, bs=8, n_valid=16), row=df[['colour', 'a', 'b']].iloc[0], texts=words_dls(False), words=words_dls(True))

def language_model(d, loss_func=None, **kwargs):
    "fastai passes the loss itself: another one is set afterwards"
    learn = language_model_learner(d.words, AWD_LSTM, config=small_lm_config(), pretrained=False, **kwargs)
    if loss_func is not None: learn.loss_func = loss_func
    return learn

class Type(NamedTuple):
    make: Callable        # (data, **keywords of a Learner) -> Learner, with fastai's own loss unless another is passed
    item: Callable        # data -> what `predict` takes
    fails: set = set()    # the calls that fastai's own loss does not pass
    options: dict = {}    # of the loss that smooths
    names: Callable = lambda d: list(d.digits.vocab)   # data -> those of the classes, of one class a row

VOIDS = dict(axis=1, ignore_index=VOID)
TYPES = dict(
    vision=Type(lambda d, **k: vision_learner(d.digits, tiny_arch, pretrained=False, **k), lambda d: d.digits.valid_ds.items[0]),
    unet=Type(lambda d, **k: unet_learner(d.masks, tiny_arch, pretrained=False, **{'loss_func': CrossEntropyLossFlat(**VOIDS), **k}),
              lambda d: d.masks.valid_ds.items[0], {'ClassificationInterpretation'}, VOIDS, lambda d: list(MASK_CODES)),
    tabular=Type(lambda d, **k: tabular_learner(d.table, layers=[8], **k), lambda d: d.row, names=lambda d: list(d.table.vocab)),
    text_classifier=Type(lambda d, **k: text_classifier_learner(d.texts, AWD_LSTM, config=small_clas_config(), pretrained=False, **k),
                         lambda d: TEXTS[0], {'show_results'}, names=lambda d: ['cat', 'dog']),
    language_model=Type(language_model, lambda d: 'the cat sat', {'get_preds', 'ClassificationInterpretation', 'plot_top_losses'}, names=lambda d: list(d.words.vocab)),
    multi_vision=Type(lambda d, **k: vision_learner(d.pairs, tiny_arch, pretrained=False, **k), lambda d: d.pairs.path/'3.png',
                      names=lambda d: list(d.pairs.vocab)),
    multi_tabular=Type(lambda d, **k: tabular_learner(d.multi_table, layers=[8], **k), lambda d: d.row, names=lambda d: MULTI_COLS))

def is_multi(kind): return kind.startswith('multi')

def uses(kind):
    "What each way of smoothing is given, and what it does to the Learner"
    loss = LabelSmoothingBCEWithLogitsFlat if is_multi(kind) else partial(LabelSmoothingCrossEntropyFlat, **TYPES[kind].options)
    res = dict(loss=lambda f: f(loss_func=loss()), flag=lambda f: f(label_smoothing=True))
    if is_multi(kind): res |= dict(callback=lambda f: f(cbs=MultiLabelSmoothingCallback()), pair=lambda f: f(label_smoothing=(.2, .1)))
    return res | dict(online=lambda f: f(label_smoothing='online'))

USES = [(k, u) for k in TYPES for u in uses(k)]
every_use = pytest.mark.parametrize('kind,use', USES)

def reference(kind, x, y, eps, reduction='mean', soft=None):
    "`soft` (K,K): smoothed to the row of the true class, instead of to all classes alike; of labels (2,K), to that of the value"
    x, y = x.as_subclass(torch.Tensor).double(), y.as_subclass(torch.Tensor)
    if is_multi(kind):
        e0, e1 = eps if isinstance(eps, tuple) else (eps, eps) if soft is None else (2*eps*soft[0].double(), 2*eps*(1-soft[1].double()))
        return F.binary_cross_entropy_with_logits(x, e0 + (1-e0-e1)*y.double(), reduction=reduction)
    x = x.movedim(1 if kind == 'unet' else -1, 1)
    if soft is not None:
        y = y.reshape(x[:, 0].shape).long()
        q = (1-eps)*F.one_hot(y.clamp(max=len(soft)-1), len(soft)) + eps*soft.double()[y.clamp(max=len(soft)-1)]
        return -(q*x.movedim(1, -1).log_softmax(-1)).sum(-1)[y != VOID].mean()
    return F.cross_entropy(x, y.reshape(x[:, 0].shape).long(), ignore_index=VOID, label_smoothing=eps, reduction=reduction)

def item_losses(kind, x, y, eps):
    "A mean over each item's pixels, labels or words; `get_preds` puts the batches of a language model side by side"
    batches = zip(x.split(SEQ_LEN, 1), y.split(SEQ_LEN, 1)) if kind == 'language_model' else [(x, y)]
    return torch.cat([reference(kind, x, y, eps, 'none').reshape(len(y), -1).mean(1) for x, y in batches])

# ---------------------------------------------------------------- the calls

def fit_one_cycle(learn, job):
    batches = Spy(lambda l: tuple(o.detach().clone() for o in (l.pred, l.yb[0], l.loss, l.loss_grad)), 'after_batch', order=99)
    cb = first(learn._grab_cbs((OnlineLabelSmoothing, MultiLabelSmoothingCallback)))
    job.soft = cb and (cb.learnt if is_multi(job.kind) else cb.prior) # of the epoch before
    learn.fit_one_cycle(1, 1e-2, cbs=batches)
    if job.soft is not None: job.names = list(cb.soft_labels.index)
    return tuple(batches.train()), tuple(batches.valid())

def get_preds(learn, job, **kwargs):
    "(probabilities, targets, losses, logits)"
    return *learn.get_preds(with_loss=True, **kwargs), learn.get_preds(act=noop, **kwargs)[0]

def interpretation(learn, job): return (interp := Interpretation.from_learner(learn)).losses, interp.top_losses(2)

def classification_interpretation(learn, job):
    interp = ClassificationInterpretation.from_learner(learn)
    interp.plot_confusion_matrix()
    interp.print_classification_report()
    return interp.losses, interp.confusion_matrix()

def predict(learn, job): return learn.predict(job.item, **(dict(n_words=5, no_bar=True) if isinstance(learn.dls.train, LMDataLoader) else {}))

CALLS = dict(   # name -> of a Learner and its job (an item to predict, a file to export to)
    lr_find=lambda learn, job: learn.lr_find(num_it=8, stop_div=False), fine_tune=lambda learn, job: learn.fine_tune(1), fit_one_cycle=fit_one_cycle,
    validate=lambda learn, job: tuple(learn.validate()), get_preds=get_preds, get_preds_as_they_come=partial(get_preds, reorder=False),
    Interpretation=interpretation, ClassificationInterpretation=classification_interpretation,
    plot_top_losses=lambda learn, job: Interpretation.from_learner(learn).plot_top_losses(2),
    show_results=lambda learn, job: learn.show_results(max_n=4), predict=predict, export=lambda learn, job: learn.export(job.file))

def outline(o):
    "What kind of thing a call gave"
    if isinstance(o, (torch.Tensor, np.ndarray)): return tuple(o.shape), str(o.dtype)
    return [outline(p) for p in o] if isinstance(o, tuple) else type(o).__name__

def drawn(): return [[(len(ax.images), len(ax.lines), len(ax.texts)) for ax in plt.figure(i).axes] for i in plt.get_fignums()]

def do(call, learn, job):
    "Outlines of what it gave and drew, and how many lines it printed, or what it raised; and what it gave"
    plt.close('all')
    torch.manual_seed(0)
    try:
        with redirect_stdout(io.StringIO()) as out: value = call(learn, job)
        return (outline(value), drawn(), len(out.getvalue().splitlines())), value
    except Exception as e: return f'{type(e).__name__}: {e}', None
    finally: plt.close('all')

@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    "ran(kind, use) makes a Learner and all calls, once: what became of them, and how much of its weights moved. 'own' is fastai's loss."
    folder = tmp_path_factory.mktemp('types')
    data = make_data(folder)
    @cache
    def f(kind, use):
        torch.manual_seed(0); np.random.seed(0); random.seed(0)
        make = partial(TYPES[kind].make, data, path=folder)
        learn = quiet(make() if use == 'own' else uses(kind)[use](make))
        before, job = weights(learn).clone(), SimpleNamespace(kind=kind, data=data, item=TYPES[kind].item(data), file=folder/f'{kind} {use}.pkl')
        done = {name: do(call, learn, job) for name, call in CALLS.items()}
        return SimpleNamespace(done=done, job=job, moved=(weights(learn) != before).float().mean(), value=lambda name: done[name][1])
    return f

# ---------------------------------------------------------------- what has to hold

@every_use
def test_what_fastai_s_own_loss_can_do_smoothing_can(ran, kind, use):
    own, ours = ({name: o[0] for name, o in ran(kind, u).done.items()} for u in ('own', use))
    passed = {name for name, o in own.items() if not isinstance(o, str)}
    assert passed == CALLS.keys() - TYPES[kind].fails, own   # so that it is noticed if less is compared some day
    assert {name: ours[name] for name in passed} == {name: own[name] for name in passed}

@pytest.mark.parametrize('kind,use', [*USES, *[(k, 'own') for k in TYPES]])
def test_training_is_smoothed_and_real(ran, kind, use):
    """Validation is smoothed only by a loss that was passed as loss_func, as by fastai's. The RNN's regularisers add to what is
    backpropagated, not to the loss that is shown."""
    run, eps = ran(kind, use), dict(own=0, pair=(.2, .1), online=.25 if is_multi(kind) else .5).get(use, .05 if is_multi(kind) else .1)
    if use == 'online':
        assert (run.job.soft.std(0) > 0).any()   # learnt by then: not each class gives the same
        assert run.job.names == TYPES[kind].names(run.job.data)   # of the classes
    train, valid = run.value('fit_one_cycle')
    assert len(train) >= 2 and len(valid) >= 1 and run.moved > .5
    for pred, y, loss, loss_grad in train:
        close(loss, reference(kind, pred, y, eps, soft=run.job.soft))
        if kind in ('text_classifier', 'language_model'): assert loss_grad > loss
        else: close(loss_grad, loss)
        if eps: assert (loss-reference(kind, pred, y, 0)).abs() > 1e-5   # smoothing makes a difference here
    for pred, y, loss, _ in valid: close(loss, reference(kind, pred, y, eps if use == 'loss' else 0))

@every_use
def test_losses_of_items(ran, kind, use):
    "Hard for the flag and the callback, smoothed for a loss that was passed; Interpretation has the same ones"
    run, eps = ran(kind, use), (.05 if is_multi(kind) else .1) if use == 'loss' else 0
    for call in {'get_preds', 'get_preds_as_they_come'} - TYPES[kind].fails:
        probs, y, losses, logits = run.value(call)
        close(probs, logits.sigmoid() if is_multi(kind) else logits.softmax(1 if kind == 'unet' else -1))
        close(losses, item_losses(kind, logits, y, eps))
        if call != 'get_preds': continue
        found, (top, idx) = run.value('Interpretation')
        close(found, losses)
        close(losses[idx], losses.sort(descending=True)[0][:2])

LOAD = '''
import pickle, sys
sys.modules['triton'] = None  # to import it is an ImportError
import torch
from fastai.learner import load_learner
res = {}
for name, (file, item) in pickle.load(open('jobs', 'rb')).items():
    learn = load_learner(file)
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    torch.manual_seed(0)
    said = learn.predict(item, **(dict(n_words=5, no_bar=True) if name[0] == 'language_model' else {}))
    res[name] = said if isinstance(said, str) else said[2].tolist()
pickle.dump(res, open('res', 'wb'))'''

def test_exported_learners_load_where_there_is_no_triton_and_no_gpu(ran, tmp_path):
    "In another process, which knows fastai and this package: they predict what they did"
    (tmp_path/'jobs').write_bytes(pickle.dumps({name: (ran(*name).job.file, ran(*name).job.item) for name in USES}))
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': os.pathsep.join(sys.path)}
    env.pop('TRITON_INTERPRET', None)
    done = subprocess.run([sys.executable, '-c', LOAD], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, loaded in pickle.loads((tmp_path/'res').read_bytes()).items():
        said = ran(*name).value('predict')
        if isinstance(said, str): assert loaded == said and len(said) > len('the cat sat')
        else: close(loaded, said[2], rtol=1e-4)
