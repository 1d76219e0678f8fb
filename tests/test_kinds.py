"""Learners of every kind, trained for real: what fastai's own loss can do, each way of smoothing can.

A Learner with fastai's own loss makes every call first; those it passes are asked of the loss, the flag and the callback,
with the same kind of result. Expected numbers come from PyTorch, in float64."""
import io, pickle, subprocess, sys, textwrap
from contextlib import redirect_stdout
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import pytest
from helpers import *
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import tabular_learner
from fastai.text.all import BaseTokenizer, TextBlock, language_model_learner, text_classifier_learner
from fastai_smooth.all import *

for name in [n for n in globals() if n.startswith('test')]: del globals()[name]  # fastcore's test_eq and friends

pytestmark = pytest.mark.filterwarnings('ignore:.*is ill-defined', 'ignore:.*NumPy array is not writable')   # of few rows
SEQ_LEN = 8


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "On a busy machine the threads of a small net mostly wait for each other"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def close(a, b, atol=1e-5, rtol=1e-5):
    a, b = (torch.as_tensor(o).detach().as_subclass(torch.Tensor).double() for o in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


# ---------------------------------------------------------------- the kinds

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
        digits=digits_dls(write_digits(folder/'digits', 40), bs=16), pairs=pairs_dls(folder/'pairs', write_pairs(folder/'pairs', 40), bs=8),
        masks=segment_dls(*segment_arrays(12), bs=4, n_valid=4), table=tabular_dls(df, bs=8, n_valid=16),
        multi_table=tabular_multi_dls(df, bs=8, n_valid=16), row=df[['colour', 'a', 'b']].iloc[0],
        texts=words_dls(False), words=words_dls(True))


def unet(d, **kwargs):
    return unet_learner(d.masks, tiny_arch, pretrained=False, **{'loss_func': CrossEntropyLossFlat(axis=1, ignore_index=VOID), **kwargs})


def text_classifier(d, **kwargs):
    return text_classifier_learner(d.texts, AWD_LSTM, config=small_clas_config(), pretrained=False, **kwargs)


def language_model(d, loss_func=None, **kwargs):
    "fastai passes the loss itself: another one is set afterwards"
    learn = language_model_learner(d.words, AWD_LSTM, config=small_lm_config(), pretrained=False, **kwargs)
    if loss_func is not None: learn.loss_func = loss_func
    return learn


class Kind(NamedTuple):
    make: Callable        # (data, **keywords of a Learner) -> Learner, with fastai's own loss unless another is passed
    item: Callable        # data -> what `predict` takes
    fails: set = set()    # the calls that fastai's own loss does not pass
    options: dict = {}    # of the loss that smooths


KINDS = dict(
    vision=Kind(lambda d, **k: vision_learner(d.digits, resnet18, pretrained=False, **k), lambda d: d.digits.valid_ds.items[0]),
    timm=Kind(lambda d, **k: vision_learner(d.digits, 'resnet10t', pretrained=False, **k), lambda d: d.digits.valid_ds.items[0]),
    unet=Kind(unet, lambda d: d.masks.valid_ds.items[0], {'ClassificationInterpretation'}, dict(axis=1, ignore_index=VOID)),
    tabular=Kind(lambda d, **k: tabular_learner(d.table, layers=[8], **k), lambda d: d.row),
    text_classifier=Kind(text_classifier, lambda d: TEXTS[0], {'show_results', 'Interpretation.show_results'}),
    language_model=Kind(language_model, lambda d: 'the cat sat', {'get_preds', 'ClassificationInterpretation', 'plot_top_losses'}),
    multi_vision=Kind(lambda d, **k: vision_learner(d.pairs, tiny_arch, pretrained=False, **k), lambda d: d.pairs.path/'3.png'),
    multi_tabular=Kind(lambda d, **k: tabular_learner(d.multi_table, layers=[8], **k), lambda d: d.row))


def is_multi(kind): return kind.startswith('multi')


def uses(kind):
    "What each way of smoothing is given, and what it does to the Learner"
    loss = LabelSmoothingBCEWithLogitsFlat if is_multi(kind) else partial(LabelSmoothingCrossEntropyFlat, **KINDS[kind].options)
    res = dict(loss=lambda f: f(loss_func=loss()), flag=lambda f: f(label_smoothing=True), to_smooth=lambda f: f().to_smooth())
    if is_multi(kind): res['callback'] = lambda f: f(cbs=MultiLabelSmoothingCallback())
    return res


def without(kind): return pytest.mark.skipif(kind == 'timm' and find_spec('timm') is None, reason='timm is not installed')


every_kind = pytest.mark.parametrize('kind', [pytest.param(k, marks=without(k)) for k in KINDS])
every_use = pytest.mark.parametrize('kind,use', [pytest.param(k, u, marks=without(k)) for k in KINDS for u in uses(k)])


def reference(kind, x, y, eps, reduction='mean'):
    x, y = x.as_subclass(torch.Tensor).double(), y.as_subclass(torch.Tensor)
    if is_multi(kind): return F.binary_cross_entropy_with_logits(x, y.double()*(1-2*eps)+eps, reduction=reduction)
    x = x.movedim(1 if kind == 'unet' else -1, 1)
    return F.cross_entropy(x, y.reshape(x[:, 0].shape).long(), ignore_index=VOID, label_smoothing=eps, reduction=reduction)


def item_losses(kind, x, y, eps):
    "A mean over each item's pixels, labels or words; `get_preds` puts the batches of a language model side by side"
    batches = zip(x.split(SEQ_LEN, 1), y.split(SEQ_LEN, 1)) if kind == 'language_model' else [(x, y)]
    return torch.cat([reference(kind, x, y, eps, 'none').reshape(len(y), -1).mean(1) for x, y in batches])


# ---------------------------------------------------------------- the calls

def fit_one_cycle(learn, job):
    batches = Spy(lambda l: tuple(o.detach().clone() for o in (l.pred, l.yb[0], l.loss, l.loss_grad)), 'after_batch', order=99)
    learn.fit_one_cycle(1, 1e-2, cbs=batches)
    return tuple(batches.train()), tuple(batches.valid())


def fine_tune(learn, job):
    learn.fine_tune(1)
    return len(learn.recorder.losses)


def get_preds(learn, job, **kwargs):
    "(probabilities, targets, losses, logits)"
    return *learn.get_preds(with_loss=True, **kwargs), learn.get_preds(act=noop, **kwargs)[0]


def interpretation(learn, job):
    interp = Interpretation.from_learner(learn)
    return interp.losses, interp.top_losses(2)


def classification_interpretation(learn, job):
    interp = ClassificationInterpretation.from_learner(learn)
    interp.plot_confusion_matrix()
    interp.print_classification_report()
    return interp.losses, interp.confusion_matrix()


def predict(learn, job):
    return learn.predict(job.item, **(dict(n_words=5, no_bar=True) if isinstance(learn.dls.train, LMDataLoader) else {}))


CALLS = dict(   # name -> of a Learner and its job (an item to predict, a file to export to)
    lr_find=lambda learn, job: learn.lr_find(num_it=8, stop_div=False), fine_tune=fine_tune, fit_one_cycle=fit_one_cycle,
    validate=lambda learn, job: tuple(learn.validate()), get_preds=get_preds, get_preds_as_they_come=partial(get_preds, reorder=False),
    Interpretation=interpretation, ClassificationInterpretation=classification_interpretation,
    plot_top_losses=lambda learn, job: Interpretation.from_learner(learn).plot_top_losses(2),
    **{'Interpretation.show_results': lambda learn, job: Interpretation.from_learner(learn).show_results([0, 1])},
    show_results=lambda learn, job: learn.show_results(max_n=4), predict=predict, export=lambda learn, job: learn.export(job.file))


def outline(o):
    "What kind of thing a call gave"
    if isinstance(o, (torch.Tensor, np.ndarray)): return tuple(o.shape), str(o.dtype)
    return [outline(p) for p in o] if isinstance(o, tuple) else type(o).__name__


def drawn(): return [[(len(ax.images), len(ax.lines), len(ax.texts)) for ax in plt.figure(i).axes] for i in plt.get_fignums()]


class Done(NamedTuple):
    kind: Any           # outlines of what it gave and drew, and how many lines it printed
    value: Any = None


def do(call, learn, job):
    plt.close('all')
    torch.manual_seed(0)
    try:
        with redirect_stdout(io.StringIO()) as out: value = call(learn, job)
        return Done((outline(value), drawn(), len(out.getvalue().splitlines())), value)
    except Exception as e: return Done(f'{type(e).__name__}: {e}')
    finally: plt.close('all')


def passed(done): return {name for name, o in done.items() if not isinstance(o.kind, str)}


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    "ran(kind, use) makes a Learner and all calls, once: what became of them, and how much of its weights moved. 'own' is fastai's loss."
    folder = tmp_path_factory.mktemp('kinds')
    data = make_data(folder)

    @cache
    def f(kind, use):
        torch.manual_seed(0); np.random.seed(0); random.seed(0)
        make = partial(KINDS[kind].make, data, path=folder)
        learn = quiet(make() if use == 'own' else uses(kind)[use](make))
        before, job = weights(learn).clone(), SimpleNamespace(item=KINDS[kind].item(data), file=folder/f'{kind} {use}.pkl')
        done = {name: do(call, learn, job) for name, call in CALLS.items()}
        return SimpleNamespace(done=done, job=job, moved=(weights(learn) != before).float().mean())
    return f


def value(run, call): return run.done[call].value


# ---------------------------------------------------------------- what has to hold

@every_kind
def test_what_fastai_s_own_loss_can_do(ran, kind):
    "So that it is noticed if less is compared some day; and the reference is that loss"
    own = ran(kind, 'own')
    assert passed(own.done) == CALLS.keys() - KINDS[kind].fails, {n: o.kind for n, o in own.done.items() if n not in passed(own.done)}
    for pred, y, loss, _ in sum(value(own, 'fit_one_cycle'), ()): close(loss, reference(kind, pred, y, 0))
    _, y, losses, logits = value(own, 'get_preds_as_they_come')
    close(losses, item_losses(kind, logits, y, 0))


@every_use
def test_what_it_can_do_smoothing_can(ran, kind, use):
    own, ours = ran(kind, 'own').done, ran(kind, use).done
    assert {name: ours[name].kind for name in passed(own)} == {name: own[name].kind for name in passed(own)}


@every_use
def test_training_is_smoothed_and_real(ran, kind, use):
    """Validation is smoothed only by a loss that was passed as loss_func, as by fastai's. The RNN's regularisers add to what is
    backpropagated, not to the loss that is shown."""
    run, eps = ran(kind, use), .05 if is_multi(kind) else .1
    train, valid = value(run, 'fit_one_cycle')
    assert len(train) >= 2 and len(valid) >= 1 and run.moved > .5
    for pred, y, loss, loss_grad in train:
        close(loss, reference(kind, pred, y, eps))
        if kind in ('text_classifier', 'language_model'): assert loss_grad > loss
        else: close(loss_grad, loss)
    for pred, y, loss, _ in valid: close(loss, reference(kind, pred, y, eps if use == 'loss' else 0))
    assert max((loss-reference(kind, pred, y, 0)).abs() for pred, y, loss, _ in train) > 5e-4   # smoothing makes a difference here


@every_use
def test_losses_of_items(ran, kind, use):
    "Hard for the flag and the callback, smoothed for a loss that was passed; Interpretation has the same ones"
    run, eps = ran(kind, use), (.05 if is_multi(kind) else .1) if use == 'loss' else 0
    for call in {'get_preds', 'get_preds_as_they_come'} - KINDS[kind].fails:
        probs, y, losses, logits = value(run, call)
        close(probs, logits.sigmoid() if is_multi(kind) else logits.softmax(1 if kind == 'unet' else -1))
        close(losses, item_losses(kind, logits, y, eps))
        if call != 'get_preds': continue
        found, (top, idx) = value(run, 'Interpretation')
        close(found, losses)
        close(top, losses.sort(descending=True)[0][:2])
        close(losses[idx], top)


@pytest.fixture(scope='module')
def loaded(ran, tmp_path_factory):
    "What every exported Learner predicts in another process, which knows fastai and this package, and cannot import triton."
    jobs = {(k, u): ran(k, u).job for k in KINDS for u in uses(k) if k != 'timm' or find_spec('timm')}
    code = textwrap.dedent('''
        import pickle, sys, warnings
        warnings.simplefilter('ignore')
        class NoTriton:
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] == 'triton': raise ModuleNotFoundError(f"No module named '{name}'")
        sys.meta_path.insert(0, NoTriton())
        import torch
        from fastai.learner import load_learner
        torch.set_num_threads(1)
        res, jobs = {}, pickle.load(open(sys.argv[1], 'rb'))
        for name, (file, item) in jobs.items():
            learn = load_learner(file)
            if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
            torch.manual_seed(0)
            said = learn.predict(item, **(dict(n_words=5, no_bar=True) if name[0] == 'language_model' else {}))
            res[name] = said if isinstance(said, str) else said[2].tolist()
        assert 'triton' not in sys.modules
        pickle.dump(res, open(sys.argv[2], 'wb'))''')
    folder = tmp_path_factory.mktemp('loaded')
    (folder/'jobs').write_bytes(pickle.dumps({name: (job.file, job.item) for name, job in jobs.items()}))
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': os.pathsep.join(sys.path)}
    env.pop('TRITON_INTERPRET', None)
    done = subprocess.run([sys.executable, '-c', code, folder/'jobs', folder/'res'], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return pickle.loads((folder/'res').read_bytes())


@every_use
def test_it_loads_where_there_is_no_triton(ran, loaded, kind, use):
    said = value(ran(kind, use), 'predict')
    if isinstance(said, str): assert loaded[kind, use] == said and len(said) > len('the cat sat')
    else: close(loaded[kind, use], said[2], rtol=1e-4)


# ---------------------------------------------------------------- what cannot be smoothed

@pytest.fixture(scope='module')
def regressions(tmp_path_factory):
    rng, df, path = np.random.RandomState(0), tabular_frame(40), tmp_path_factory.mktemp('regressions')
    ratings = pd.DataFrame(dict(user=rng.randint(5, size=40), film=rng.randint(6, size=40), rating=rng.rand(40)*4+1))
    images = write_pairs(path, 16).assign(size=rng.rand(16)*9)
    collab = CollabDataLoaders.from_df(ratings, bs=16, seed=0, num_workers=0, device=CPU)
    table = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['colour'], cont_names=['a'], y_names='b',
                                       y_block=RegressionBlock(), bs=16, num_workers=0, device=CPU, valid_idx=list(range(24, 40)))
    sizes = ImageDataLoaders.from_df(images, path, label_col='size', y_block=RegressionBlock(), valid_col='valid', bs=8, num_workers=0,
                                     device=CPU)
    return dict(
        collab=partial(collab_learner, collab, n_factors=4, y_range=(0, 5.5)),
        collab_nn=partial(collab_learner, collab, use_nn=True, layers=[8]),
        tabular=partial(tabular_learner, table, layers=[8]),
        vision=partial(vision_learner, sizes, tiny_arch, pretrained=False, n_out=1),
        MSELossFlat=partial(Learner, tensor_dls(torch.randn(32, 3), torch.randn(32, 2)), nn.Linear(3, 2), loss_func=MSELossFlat()))


def by_flag(make): make(label_smoothing=True)
def by_to_smooth(make): make().to_smooth()


def by_callback(make):
    "Before anything is trained"
    learn = quiet(make(cbs=MultiLabelSmoothingCallback()))
    before = weights(learn).clone()
    try: learn.fit(1)
    except Exception:
        assert torch.equal(weights(learn), before)
        raise


@pytest.mark.parametrize('way,names', [(by_flag, 'MSELoss'), (by_to_smooth, 'MSELoss'), (by_callback, 'MSELoss|target')])
@pytest.mark.parametrize('kind', ['collab', 'collab_nn', 'tabular', 'vision', 'MSELossFlat'])
def test_regressions_are_rejected(regressions, kind, way, names):
    "A number is not a label: smoothing would move it towards 1/2"
    with pytest.raises((TypeError, ValueError), match=names): way(regressions[kind])


@pytest.mark.parametrize('kind', ['collab', 'collab_nn', 'tabular', 'vision', 'MSELossFlat'])
def test_regressions_train_as_ever_without_smoothing(regressions, kind):
    learn = quiet(regressions[kind]())
    before = weights(learn).clone()
    learn.fit(1)
    assert (weights(learn) != before).any() and np.isfinite(learn.recorder.losses).all()
