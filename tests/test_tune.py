"Pilots that leave no trace, and what they say about eps: SPEC section 6."
import math, threading, warnings

import matplotlib, pytest
from scipy.stats import binomtest
from helpers import *
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.training import GradientAccumulation
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.tabular.all import tabular_learner
from fastai.text.all import language_model_learner, text_classifier_learner
from fastai.vision.all import unet_learner
from torch.amp import autocast

import fastai_smooth.tune as tune
from fastai_smooth.all import (LabelSmoothingBCEWithLogitsFlat, LabelSmoothingCrossEntropyFlat, LabelSmoothingScheduler,
                               MultiLabelSmoothingCallback)
from fastai_smooth.learner import *
from fastai_smooth.pilot import pilot, raw_preds
from fastai_smooth.temperature import *
from fastai_smooth.tune import *

D = torch.float64


def near(a, b, atol=1e-6): np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=0, atol=atol)


# ---------------------------------------------------------------- Learners, and all there is of one

def noisy(n=240, k=4, noise=.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, 6, generator=g), torch.randn(6, k, generator=g)
    flip = torch.rand(n, generator=g) < noise
    return x, torch.where(flip, torch.randint(k, (n,), generator=g), (x@w).argmax(1))


def noisy_multi(n=240, k=3, noise=.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, 6, generator=g), torch.randn(6, k, generator=g)
    y = (x@w > 0).float()
    return x, torch.where(torch.rand(n, k, generator=g) < noise, 1-y, y)


def shuffled_dls(x, y, bs=16):
    n, items = len(x)//2, list(zip(x, y))
    return DataLoaders(DataLoader(items[:n], bs=bs, shuffle=True, num_workers=0), DataLoader(items[n:], bs=bs, num_workers=0), device=CPU)


def torch_dls(x, y, bs=16):
    "torch's own, with a generator"
    n, items = len(x)//2, list(zip(x, y))
    loader = torch.utils.data.DataLoader
    return DataLoaders(loader(items[:n], batch_size=bs, shuffle=True, generator=torch.Generator().manual_seed(3)), loader(items[n:], batch_size=bs), device=CPU)


def sampler_dls(x, y, bs=16):
    "torch's own, with a sampler that has a generator"
    n, items = len(x)//2, list(zip(x, y))
    loader, g = torch.utils.data.DataLoader, torch.Generator().manual_seed(3)
    sampler = torch.utils.data.WeightedRandomSampler([1.]*n, n, generator=g)
    return DataLoaders(loader(items[:n], batch_size=bs, sampler=sampler), loader(items[n:], batch_size=bs), device=CPU)


def net(k=4): return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(.3), nn.Linear(12, k))


class Notes(Callback):
    "A user's callback with a list, a number and random numbers of its own"
    def __init__(self): self.losses, self.n, self.rng = [], 0, random.Random(5)
    def after_batch(self):
        self.n += 1
        self.losses.append(float(self.learn.loss.detach()) + self.rng.random())


def reseeded(f, *args, **kwargs):
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    return f(*args, **kwargs)


def plain(dls=shuffled_dls, **kwargs):
    kwargs = {'opt_func': partial(SGD, mom=.9), 'loss_func': CrossEntropyLossFlat(), 'metrics': [accuracy, Perplexity()], 'cbs': Notes(), **kwargs}
    return quiet(Learner(dls(*noisy()), net(), lr=.05, path=Path('/tmp'), **kwargs))


def fitted(**kwargs):
    learn = plain(**kwargs)
    learn.fit_one_cycle(2)
    return learn


def lr_found():
    learn = plain(opt_func=Adam)
    learn.lr_find(num_it=8, show_plot=False)
    return learn


def groups():
    learn = plain(splitter=lambda m: [params(m[:2]), params(m[2:])], opt_func=Adam)
    learn.freeze()
    learn.fit(1)
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-3, 1e-2))
    learn.freeze()
    return learn


class OnCPU(MixedPrecision):
    "bf16 where fastai's own does nothing"
    def before_fit(self):
        super().before_fit()
        self.autocast = autocast('cpu', dtype=torch.bfloat16)


def half():
    learn = plain(cbs=[Notes(), OnCPU(amp_mode='bf16')])
    learn.fit(1)
    return learn


def mixed_up():
    "MixUp left holding the loss"
    learn = plain()
    learn.add_cb(MixUp())
    with pytest.raises(RuntimeError): learn.fit(1, cbs=RaiseAt(RuntimeError('power cut')))
    return learn


def images():
    learn = quiet(unet_learner(segment_dls(*segment_arrays(12), bs=4, n_valid=4), tiny_arch, n_out=3, pretrained=False, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=VOID), path=Path('/tmp')))
    learn.fit(1)
    return learn


def tabular():
    learn = quiet(tabular_learner(tabular_dls(tabular_frame()), layers=[8], metrics=accuracy, path=Path('/tmp')))
    learn.fit(1)
    return learn


def text():
    learn = quiet(text_classifier_learner(text_dls(), AWD_LSTM, config=small_clas_config(), pretrained=False, metrics=accuracy, path=Path('/tmp')))
    learn.fit(1)
    return learn


def words():
    learn = quiet(language_model_learner(lm_dls(), AWD_LSTM, config=small_lm_config(), pretrained=False, metrics=accuracy, path=Path('/tmp')))
    learn.fit(1)
    return learn


LEARNERS = dict(never_fitted=plain, fitted=fitted, adam=lambda: fitted(opt_func=Adam), lr_found=lr_found, groups=groups, torch_loaders=lambda: fitted(dls=torch_dls),
                half=half, smoothed=lambda: fitted().to_smooth(.2), unet=images, tabular=tabular, text=text, language_model=words)
IDENTICAL = 'dls model loss_func opt opt_func splitter recorder path model_dir wd moms'.split()


def comparable(o, seen=None):
    "Plain data of anything there is in a Learner, to compare by =="
    if isinstance(o, Tensor): return o.detach().as_subclass(Tensor).double().tolist()
    if isinstance(o, np.ndarray): return o.tolist()
    if isinstance(o, random.Random): return o.getstate()
    if isinstance(o, torch.Generator): return o.get_state().tolist()
    if isinstance(o, dict): return {str(k): comparable(v) for k, v in o.items()}
    if isinstance(o, (list, tuple, L)): return [comparable(v) for v in o]
    return o if isinstance(o, (int, float, str, bool, type(None))) else type(o).__name__


def fields(cb): return comparable({k: v for k, v in vars(cb).items() if k not in ('learn', 'start_epoch', 'log')})  # two hold times


def state(learn):
    opt = learn.opt
    return dict(
        weights=comparable(dict(learn.model.state_dict())), modes=[m.training for m in learn.model.modules()],
        grads=[None if p.grad is None else comparable(p.grad) for p in learn.model.parameters()], frozen=[p.requires_grad for p in learn.model.parameters()],
        opt=None if opt is None else [comparable(opt.state_dict()), opt.frozen_idx], recorder=fields(learn.recorder),
        random=comparable(get_random_states()), rngs=[comparable(getattr(dl, 'rng', None)) for dl in learn.dls.loaders],
        generators=[comparable([getattr(dl, 'generator', None), getattr(getattr(dl, 'sampler', None), 'generator', None)]) for dl in learn.dls.loaders],
        hooks=[len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules()],
        cbs=[(type(cb).__name__, fields(cb), cb.learn is learn) for cb in learn.cbs],
        metrics=[comparable(vars(m)) for m in learn.metrics], names=sorted(learn.__dict__))


def same_state(a, b):
    for k in a: assert a[k] == b[k], k


def identities(learn):
    return {**{k: getattr(learn, k, None) for k in IDENTICAL}, **{f'cb{i}': cb for i, cb in enumerate(learn.cbs)}, **{f'dl{i}': dl for i, dl in enumerate(learn.dls.loaders)},
            **{f'metric{i}': m for i, m in enumerate(learn.metrics)}, **{f'p{i}': p for i, p in enumerate(learn.model.parameters())}}


def train_on(learn):
    learn.fit_one_cycle(1, 1e-2)
    learn.fit(1)
    return state(learn)


def check_leaves_no_trace(make, f, go_on=True):
    "What `f` does to the Learner of `make` changes nothing, and training goes on bitwise as that of a twin"
    learn = reseeded(make)
    before, ids = state(learn), identities(learn)
    f(learn)
    same_state(state(learn), before)
    for k, v in identities(learn).items(): assert v is ids[k], k
    if not go_on: return
    rng = get_random_states()
    after = train_on(learn)
    twin = reseeded(make)
    same_state(before, state(twin))
    set_random_states(**rng)
    same_state(train_on(twin), after)


def in_pilot(learn):
    with pilot(learn) as trial:
        trial.fit_one_cycle(1, 1e-2)
        trial.fit(1)
        assert not torch.equal(weights(trial), weights(learn))


@pytest.mark.parametrize('name', LEARNERS)
def test_a_learner_goes_on_as_if_there_had_been_no_pilot(name): check_leaves_no_trace(LEARNERS[name], in_pilot)


def test_a_sampler_with_a_generator_goes_on_as_if_there_had_been_no_pilot():
    check_leaves_no_trace(lambda: fitted(dls=sampler_dls), in_pilot)


class NumpySampler(torch.utils.data.Sampler):
    "An order of a generator of its own"
    def __init__(self, n): self.n, self.gen = n, np.random.default_rng(3)
    def __len__(self): return self.n
    def __iter__(self): return iter(self.gen.permutation(self.n).tolist())


class EpochSampler(NumpySampler):
    "An order that goes with the epoch, which it counts"
    epoch = 0
    def __iter__(self):
        self.epoch += 1
        return iter(np.random.default_rng(self.epoch).permutation(self.n).tolist())


class RandomDL(DataLoader):
    "fastai's, with a generator of its own"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gen = np.random.default_rng(3)
    def get_idxs(self): return self.gen.permutation(self.n).tolist()


def first_loader(make):
    "fitted() whose training batches `make(items)` gives"
    def f():
        learn = plain()
        learn.dls.loaders[0] = make(learn.dls.train.dataset)
        learn.fit_one_cycle(2)
        return learn
    return f


def torch_loader(items, **kwargs): return torch.utils.data.DataLoader(items, batch_size=16, **kwargs)

LOADERS = dict(numpy_sampler=lambda o: torch_loader(o, sampler=NumpySampler(len(o))), epoch_sampler=lambda o: torch_loader(o, sampler=EpochSampler(len(o))),
               batch_sampler=lambda o: torch.utils.data.DataLoader(o, batch_sampler=torch.utils.data.BatchSampler(EpochSampler(len(o)), 16, False)),
               persistent=lambda o: torch_loader(o, shuffle=True, num_workers=1, persistent_workers=True),
               fastai_persistent=lambda o: DataLoader(o, bs=16, shuffle=True, num_workers=1, persistent_workers=True),
               fastai_numpy=lambda o: RandomDL(o, bs=16, num_workers=0))


@pytest.mark.parametrize('name', LOADERS)
def test_a_loader_goes_on_as_if_there_had_been_no_pilot(name):
    "nor temperature"
    check_leaves_no_trace(first_loader(LOADERS[name]), in_pilot)
    check_leaves_no_trace(first_loader(LOADERS[name]), lambda o: raw_preds(o, 0))


def test_a_loader_that_cannot_be_copied_is_a_type_error():
    learn = first_loader(LOADERS['numpy_sampler'])()
    learn.dls.train.sampler.lock = threading.Lock()
    before = state(learn)
    with pytest.raises(TypeError, match='and sampler of this DataLoader cannot be copied.*lock'):
        with pilot(learn): pass
    with pytest.raises(TypeError, match='sampler'): learn.eps_find(3)
    same_state(state(learn), before)
    assert learn.fit_temperature() is learn # the other loader has no part in it


def test_what_cannot_be_copied_of_a_loader_is_named():
    learn = first_loader(lambda o: torch_loader(o, shuffle=True, collate_fn=Collate()))()
    with pytest.raises(TypeError, match='and collate_fn of this DataLoader cannot be copied.*lock'), pilot(learn): pass


class Collate:
    def __init__(self): self.lock = threading.Lock()
    def __call__(self, items): return torch.utils.data.default_collate(items)


def test_predictions_need_no_loader_of_their_own():
    "a sampler with a lock and a generator: it is shared, and its generator put back"
    g, learn = torch.Generator().manual_seed(3), fitted()
    data = learn.dls.valid.dataset
    sampler = torch.utils.data.RandomSampler(data, generator=g)
    sampler.lock = threading.Lock()
    before = g.get_state()
    t = best_temperature(*raw_preds(learn)[:2])
    near(best_temperature(*raw_preds(learn, dl=torch_loader(data, sampler=sampler))[:2]), t, 1e-5)
    assert torch.equal(g.get_state(), before)
    learn.fit_temperature(dl=torch_loader(data, sampler=sampler))
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('name', ['fitted', 'torch_loaders', 'language_model'])
def test_no_trace_after_an_exception(name, ex):
    "in a batch of a pilot"
    def f(learn):
        with pytest.raises(ex), pilot(learn) as trial: trial.fit(2, cbs=[MixUp(), RaiseAt(ex('power cut'))] if name == 'fitted' else RaiseAt(ex('power cut')))
    check_leaves_no_trace(LEARNERS[name], f)


@pytest.mark.parametrize('ex', [CancelFitException, CancelEpochException, CancelBatchException])
def test_no_trace_after_a_cancelled_fit(ex):
    def f(learn):
        with pilot(learn) as trial: trial.fit(2, cbs=RaiseAt(ex()))
    check_leaves_no_trace(fitted, f)


def test_no_trace_of_predictions():
    def f(learn):
        if hasattr(learn.dls.valid, 'new'):
            with pilot(learn, train=False) as trial: trial.get_preds()
        raw_preds(learn)
        raw_preds(learn, 0)
    for name in 'fitted', 'never_fitted', 'torch_loaders': check_leaves_no_trace(LEARNERS[name], f)


def test_nested_pilots():
    def f(learn):
        with pilot(learn) as outer:
            outer.fit(1)
            check = state(outer)
            with pilot(outer, seed=3) as inner: inner.fit(1)
            same_state(state(outer), check)
            outer.fit(1)
    check_leaves_no_trace(fitted, f)


def test_a_pilot_is_seeded():
    learn = fitted()
    found = []
    for seed in 1, 1, 2:
        with pilot(learn, seed) as trial:
            trial.fit(1)
            found.append(weights(trial))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_pilot_starts_where_the_learner_is():
    "weights, optimizer state, hyper-parameters; but nothing is shared"
    learn = groups()
    with pilot(learn) as trial:
        assert torch.equal(weights(trial), weights(learn))
        assert comparable(trial.opt.state_dict()) == comparable(learn.opt.state_dict()) and trial.opt.frozen_idx == learn.opt.frozen_idx
        mine, theirs = [{id(p) for p in o.model.parameters()} for o in (learn, trial)]
        assert not mine & theirs and {id(p) for p in trial.opt.all_params().itemgot(0)} <= theirs
        assert trial.loss_func is not learn.loss_func and trial.dls.train is not learn.dls.train and trial.notes is not learn.notes


def test_savers_stoppers_and_loggers_are_left_out(tmp_path):
    learn = fitted()
    learn.path = tmp_path
    learn.add_cbs([SaveModelCallback(), EarlyStoppingCallback(patience=0), CSVLogger()])
    with pilot(learn) as trial:
        assert not trial.cbs.filter(risinstance((SaveModelCallback, EarlyStoppingCallback, CSVLogger)))
        trial.fit(3)
    assert not list(tmp_path.rglob('*'))
    learn.eps_find(3, show_plot=False)
    assert not list(tmp_path.rglob('*'))


class Locked(Notes):
    "Has a lock, which no copy can have"
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_a_callback_that_cannot_be_copied_is_left_out_of_trainings_and_named():
    "each time: it would share its list with the pilot"
    learn = fitted(cbs=[Locked(), GradientAccumulation(16), OnCPU(amp_mode='bf16')])
    losses = list(learn.locked.losses)
    for call in (lambda: in_pilot(learn), lambda: find(learn, 10)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            call()
        assert len([o for o in said if 'without the callbacks locked:' in str(o.message)]) == 1
    with pilot(learn) as trial:
        assert not hasattr(trial, 'locked') and hasattr(trial, 'gradient_accumulation') and trial.on_cpu is not learn.on_cpu
        trial.fit(1)
    assert len(losses) == 32 and learn.locked.losses == losses and learn.locked.learn is learn


class Scales(Locked):
    "of which predictions depend"
    def __init__(self): super().__init__(); self.seen, self.n = {'batches': []}, 0
    def before_batch(self): self.learn.xb = tuple(3*o for o in self.xb)
    def after_pred(self): self.learn.pred = self.pred/2; self.seen['batches'].append(self.iter)
    def before_validate(self): self.n += 1


def test_a_callback_that_cannot_be_copied_has_its_part_in_predictions():
    "without a word, and without a trace in it"
    learn = fitted(cbs=Scales())
    logits = learn.get_preds(act=noop)[0]
    seen, losses, n = deepcopy(learn.scales.seen), list(learn.scales.losses), learn.scales.n
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        preds = raw_preds(learn)
    near(preds.logits, logits)
    assert learn.scales.learn is learn and (learn.scales.seen, learn.scales.losses, learn.scales.n) == (seen, losses, n)
    t = learn.fit_temperature().temperature
    lo, hi = learn.temperature_interval
    near(t, 1. if lo <= 1 <= hi else best_temperature(logits, preds.targs), 1e-4)


class Exports(Callback):
    def after_epoch(self): self.learn.export('ckpt.pkl')


class Saves(Callback):
    "Keeps the last epoch, and goes back to it"
    def after_epoch(self): self.learn.save('ckpt'), self.learn.save(self.where/'far')
    def after_fit(self): self.learn.load('ckpt'); self.learn.load(self.where/'far')


def test_what_a_pilot_saves_is_kept_apart(tmp_path):
    "the user's files stay as they are, and a pilot finds what it saved"
    learn = plain()
    learn.path = tmp_path
    learn.add_cb(Saves()).saves.where = tmp_path
    learn.fit(1)
    learn.add_cb(Exports())
    files = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    assert {p.name for p in files} == {'ckpt.pth', 'far.pth'}
    with pilot(learn) as trial:
        trial.fit(1)
        after = weights(trial)
        with pilot(trial) as inner: inner.fit(1)
        with torch.no_grad(): params(trial.model)[0].zero_()
        assert torch.equal(weights(trial.load('ckpt')), after) and not torch.equal(after, weights(learn))
        with open(tmp_path/'open.pth', 'wb') as f: trial.save(f)
    learn.eps_find(3, show_plot=False)
    files[tmp_path/'open.pth'] = b''
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == files
    assert learn.save('ckpt') == tmp_path/'models/ckpt.pth' and learn.load('ckpt') is learn


def test_a_pilot_loads_what_was_saved_before_it(tmp_path):
    learn = fitted()
    learn.path = tmp_path
    learn.save('before')
    learn.fit(1)
    with pilot(learn) as trial:
        trial.load('before')
        assert not torch.equal(weights(trial), weights(learn))
        trial.save('before')
    learn.load('before')


def test_a_text_encoder_is_not_saved(tmp_path):
    learn = words()
    learn.path = tmp_path
    with pilot(learn) as trial: trial.save_encoder('enc')
    assert not list(tmp_path.rglob('*'))


class Stubborn(nn.Sequential):
    "Can be neither deepcopied nor pickled"
    def __deepcopy__(self, memo): raise RuntimeError('no copies')
    def __reduce_ex__(self, protocol): raise RuntimeError('no pickles')


def test_a_model_that_cannot_be_copied_is_a_type_error():
    learn = reseeded(fitted)
    learn.model = Stubborn(learn.model)
    learn.create_opt()
    before = state(learn)
    with pytest.raises(TypeError, match='no copies.*no pickles'):
        with pilot(learn): pass
    same_state(state(learn), before)
    with pytest.raises(TypeError, match='no copies'): learn.eps_find(3)
    same_state(state(learn), before)
    with pilot(learn, train=False) as trial: trial.get_preds()


# ---------------------------------------------------------------- noise_estimate

def drawn(n, k, eta, seed=0, t=1., scale=3., multi=False):
    "Logits, and labels of softmax(z/t), a share eta of them replaced by any"
    g = torch.Generator().manual_seed(seed)
    z = scale*torch.randn(n, k, generator=g, dtype=D)
    if multi:
        y, any_ = torch.bernoulli((z/t).sigmoid(), generator=g), torch.randint(2, (n, k), generator=g).double()
        return z, torch.where(torch.rand(n, k, generator=g) < eta, any_, y)
    y = torch.multinomial((z/t).softmax(1), 1, generator=g)[:, 0]
    return z, torch.where(torch.rand(n, generator=g) < eta, torch.randint(k, (n,), generator=g), y)


def grid_likelihood(z, y, etas, betas):
    "Sum of the NLL over a grid, in numpy: (etas,betas)"
    z, y = np.asarray(z), np.asarray(y)
    res = np.empty((len(etas), len(betas)))
    for j, b in enumerate(betas):
        if z.shape == y.shape: p, k = 1/(1+np.exp(np.clip(-np.where(y == 1, z, -z)*b, -700, 700))), 2
        else:
            e = np.exp((z - z.max(1, keepdims=True))*b)
            p, k = (e/e.sum(1, keepdims=True))[np.arange(len(y)), y], z.shape[1]
        for i, eta in enumerate(etas): res[i, j] = -np.log((1-eta)*p + eta/k).sum()
    return res


@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('eta', [0., .22, .44])
def test_noise_is_the_peak_of_the_likelihood(eta, multi):
    "and its interval is where the profile is within 1.92 of it"
    z, y = drawn(300, 4, eta, seed=2, multi=multi)
    etas, betas = np.linspace(0, .9, 181), np.exp(np.linspace(-2, 2, 201))
    profile = grid_likelihood(z, y, etas, betas).min(1)
    found = noise_estimate(z, y)
    near(found.noise, etas[profile.argmin()], .006)
    inside = etas[profile - profile.min() < 3.841/2] if not multi else None
    if not multi: near(found[1:], (inside.min(), inside.max()), .012)


def test_interval_of_labels():
    "each label is an observation: by the likelihood of all of them"
    z, y = drawn(300, 4, .22, seed=2, multi=True)
    etas, betas = np.linspace(0, .9, 181), np.exp(np.linspace(-2, 2, 201))
    profile = grid_likelihood(z, y, etas, betas).min(1)
    inside = etas[profile - profile.min() < 3.841/2]
    low, high = noise_estimate(z, y)[1:]
    assert low <= inside.min() + .012 and high >= inside.max() - .012   # may be wider: labels of a row go together


@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('eta', [0., .22, .44])
def test_noise_is_recovered(eta, multi):
    found = noise_estimate(*drawn(2000, 3 if multi else 10, eta, t=2., multi=multi))
    assert found.low <= eta <= found.high and found.low <= found.noise <= found.high
    near(found.noise, eta, .06 if multi else .04)


def test_its_interval_holds_the_truth():
    "in 95% of draws: fewer than 56 of 64 has probability .006"
    hits = sum(low <= .2 <= high for _, low, high in (noise_estimate(*drawn(250, 3, .2, seed=i)) for i in range(64)))
    assert hits >= 56


def test_many_logits_are_sampled():
    z, y = drawn(3000, 5, .3)
    found = noise_estimate(z, y, max_numel=5*500)
    idx = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    assert found == noise_estimate(z, y, max_numel=5*500) != noise_estimate(z, y)
    assert found.high - found.low > 1.5*(noise_estimate(z, y).high - noise_estimate(z, y).low)
    rng = torch.get_rng_state()
    noise_estimate(z, y, max_numel=100)
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize('c', [1e-2, 100., 1e4])
def test_noise_does_not_depend_on_the_size_of_logits(c):
    "the fit has a temperature"
    z, y = drawn(400, 4, .22, seed=1)
    near(noise_estimate(z*c, y), noise_estimate(z, y), 5e-3)


def test_noise_of_useless_logits():
    "says nothing, and does not crash"
    y = torch.arange(300) % 3
    for z in (torch.zeros(300, 3), torch.randn(300, 3)):
        _, low, high = noise_estimate(z, y)
        assert 0 <= low <= high <= 1 and high > .9


# ---------------------------------------------------------------- eps_find

def single(loss=None, x_y=None, **kwargs): return quiet(Learner(shuffled_dls(*ifnone(x_y, noisy())), reseeded(net), loss_func=ifnone(loss, CrossEntropyLossFlat()), lr=.05, path=Path('/tmp'), **kwargs))
def multi(loss=None, **kwargs): return quiet(Learner(shuffled_dls(*noisy_multi()), reseeded(net, 3), loss_func=ifnone(loss, BCEWithLogitsLossFlat()), lr=.05, path=Path('/tmp'), **kwargs))


def find(learn, n_epoch=20, *args, **kwargs): return learn.eps_find(n_epoch, *args, show_plot=kwargs.pop('show_plot', False), **kwargs)


def by_hand(learn, n, eps=0., lr=None, seed=42, ds_idx=1, **options):
    "A pilot without the package's: logits and targets"
    model, opt = deepcopy((learn.model, learn.opt))
    with no_random(seed):
        trial = quiet(Learner(DataLoaders(*[dl.new() for dl in learn.dls.loaders], device=CPU), model, loss_func=deepcopy(learn.loss_func), lr=learn.lr, path=Path('/tmp')))
        trial.opt = opt
        if hasattr(trial.loss_func, 'eps') and isinstance(trial.loss_func, LabelSmoothingBCEWithLogitsFlat): trial.loss_func.eps = eps
        else: trial.to_smooth(eps, **options)
        trial.fit_one_cycle(n, lr)
        x, y = zip(*trial.dls[ds_idx].dataset)
        with torch.no_grad(): return trial.model.eval()(torch.stack(x)), torch.stack(y)


def test_closed_form_is_the_validation_error_of_a_pilot():
    "times K/(K-1)"
    learn = single()
    z, y = by_hand(learn, 42)
    found = find(learn, 140, cap=1.)
    wrong = int((z.argmax(1) != y).sum())
    assert 0 < wrong < 60
    near(found.valid_error, wrong/120)
    near(found.eps, wrong/120*4/3)
    ci = binomtest(wrong, 120).proportion_ci(.95, 'wilson')
    near(found.valid_error_interval, ci)
    near(found.eps_interval, [o*4/3 for o in ci])
    near((found.noise, *found.noise_interval), noise_estimate(z, y), 1e-4)
    assert found[0] == found.eps and found.scores is None and 'closed form' in found.verdict


def test_closed_form_of_labels_is_the_share_of_wrong_ones():
    "the eps of 1-eps and eps"
    learn = multi()
    z, y = by_hand(learn, 42)
    found = find(learn, 140, cap=1.)
    error = ((z > 0) != (y == 1)).double().mean().item()
    assert 0 < error < .5
    near(found.eps, error), near(found.valid_error, error)
    low, high = found.valid_error_interval
    assert low < error < high and high - low < .15
    near(found.eps_interval, (low, high))


@pytest.mark.parametrize('make, cap, expected', [(single, .05, .05), (multi, .05, .025)])
def test_the_cap_warns(make, cap, expected):
    "half of it for labels"
    with pytest.warns(UserWarning, match='cut'): found = find(make(), 140, cap=cap)
    near(found.eps, expected)
    assert 'cut' in found.verdict and found.eps_interval[1] <= expected + 1e-12


def test_no_warning_below_the_cap():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        find(single(), 140, cap=1.)


@pytest.mark.parametrize('n_epoch, share, n', [(10, .3, 3), (1, .3, 1), (5, .3, 2), (3, 1., 3), (10, .06, 1)])
def test_a_pilot_trains_a_share_of_the_epochs(n_epoch, share, n):
    counts = []
    class Count(Callback):
        def before_train(self): counts.append(self.n_epoch)
    learn = single(cbs=Count())
    find(learn, n_epoch, share=share, cap=1.)
    assert counts == [n]*n


def test_lr_of_the_training():
    learn = single()
    z, y = by_hand(learn, 1, lr=.3)
    near(find(learn, 1, .3, cap=1.).valid_error, (z.argmax(1) != y).double().mean())


def test_other_data_and_seeds():
    learn = single()
    learn.dls.loaders.append(learn.dls[0].new())
    z, y = by_hand(learn, 3, ds_idx=2, seed=7)
    near(find(learn, 10, ds_idx=2, seed=7, cap=1.).valid_error, (z.argmax(1) != y).double().mean())


@pytest.mark.parametrize('ds_idx', [0, 2, -1])
def test_training_data_are_not_for_judging(ds_idx):
    with pytest.raises(ValueError, match=f'ds_idx .* got {ds_idx}'): find(single(), 10, ds_idx=ds_idx)


def test_full_and_misspelt_names():
    with pytest.raises(TypeError, match='full=True is given by name'): find(single(), True)
    with pytest.raises(TypeError, match='no argument n_epochs'): find(single(), n_epochs=3)


@pytest.mark.parametrize('make', [lambda dls: WeightedDL(dls.train.dataset, bs=8, shuffle=True, wgts=[1., *[0.]*(len(dls.train.dataset)-1)]),
                                  lambda dls: PartialDL(dls.train.dataset, bs=8, partial_n=16)], ids=['weighted', 'partial'])
def test_pilots_train_on_what_the_learner_trains_on(make):
    "fastai's weighted and partial loaders lose what they are in `new`"
    learn = single()
    learn.dls.loaders[0] = make(learn.dls)
    before = learn.dls[0].rng.getstate()
    with pilot(learn) as trial:
        assert len(trial.dls[0]) == len(learn.dls[0]) and type(trial.dls[0]) is type(learn.dls[0])
        seen = torch.cat([b[0] for b in trial.dls[0]])
    assert learn.dls[0].rng.getstate() == before
    if type(learn.dls[0]) is WeightedDL: assert (seen == seen[0]).all()


def test_labels_that_are_no_labels():
    "nan is an unknown label elsewhere; here it can't be judged"
    learn = multi()
    for y in (.5, math.nan):
        def fit(trial):
            trial.dls[1].dataset[0][1][0] = y
            trial.fit(1)
        with pytest.raises(ValueError, match='labels of 0 and 1'): find(learn, fit=fit)


def test_a_learner_that_was_trained():
    learn = single()
    reseeded(learn.fit_one_cycle, 2)
    z, y = by_hand(learn, 3)
    near(find(learn, 10, cap=1.).valid_error, (z.argmax(1) != y).double().mean())


def test_own_training():
    "fit= trains the pilot, unsmoothed"
    seen = []
    def fit(trial):
        assert trial.loss_func.eps == 0.
        seen.append(trial)
        trial.fit(4, .1)
    learn = single()
    found = find(learn, fit=fit, cap=1.)
    assert len(seen) == 1 and seen[0] is not learn
    seen.clear()
    learn.eps_find(full=True, epss=[.2], fit=lambda o: seen.append((o.loss_func.eps, o.fit(1))), show_plot=False)
    assert [o[0] for o in seen] == [0., .2]


def row_nll(z, y):
    z = cross_fitted(z.double(), y)
    if z.shape == y.shape: return F.binary_cross_entropy_with_logits(z, y.double(), reduction='none').mean(1)
    return F.cross_entropy(z, y, reduction='none')


@pytest.mark.parametrize('make', [single, multi])
def test_scores_of_the_grid(make):
    "NLL after a cross-fitted temperature, of pilots with the same seed"
    learn, epss = make(), [0., .1, .3]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = find(learn, 140, full=True, epss=[.3, .1])
    scores = found.scores
    assert list(scores.eps) == epss
    preds = [by_hand(learn, 42, eps) for eps in epss]
    rows = torch.stack([row_nll(*o) for o in preds])
    near(scores.nll, rows.mean(1), 1e-5)
    behind = rows - rows[rows.mean(1).argmin()]
    near(scores.behind, behind.mean(1), 1e-5)
    near(scores.se, behind.std(1)/math.sqrt(120), 1e-5)
    near(scores.temperature, [best_temperature(*o) or 1. for o in preds], 1e-3)
    if make is single: near(scores.error, [(z.argmax(1) != y).double().mean() for z, y in preds])
    good = [e for e, b, se in zip(epss, scores.behind, scores.se) if b <= se]
    assert ('no evidence' in found.verdict) == (len(good) == 3)
    if len(good) < 3: assert found.eps == min(good) and found.eps_interval == (min(good), max(good))
    near(found.valid_error, scores.error[0])


def frame(behind, se): return pd.DataFrame(dict(eps=[0., .1, .2, .4], nll=np.add(behind, 1.), behind=behind, se=se, temperature=1., error=.1))
FIRST = EpsSuggestion(.3, (.2, .4), .1, (0., .2), .2, (.1, .3), 'closed form')


def test_the_smallest_within_one_standard_error():
    found = tune._of_grid(FIRST, frame([.1, .01, 0., .05], [.02, .02, 0., .02]))
    assert found.eps == .1 and found.eps_interval == (.1, .2) and 'smallest' in found.verdict


def test_no_evidence():
    "all are within one standard error: the first pilot's word stands"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = tune._of_grid(FIRST, frame([.01, .01, 0., .01], [.02, .02, 0., .02]))
    assert 'no evidence' in found.verdict and found[:6] == FIRST[:6] and len(found.scores) == 4


def test_an_edge_of_the_grid_warns():
    with pytest.warns(UserWarning, match='edge'): assert tune._of_grid(FIRST, frame([.1, .1, .1, 0.], [.02, .02, .02, 0.])).eps == .4


def test_default_grids():
    for make, grid in ((single, [0., .05, .1, .2, .4]), (multi, [0., .025, .05, .1, .2])):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert list(find(make(), 1, full=True).scores.eps) == grid


# ---------------------------------------------------------------- pilots that have not learnt

def digits(noise=0., n=1500, n_valid=None, multi=False, seed=0):
    "A Learner on real digits, a share `noise` of the labels any of the ten; `multi`: is it above 4, odd, 0 or 1, a multiple of 3?"
    g = torch.Generator().manual_seed(seed)
    idx, y = torch.randperm(len(DIGITS.target), generator=g)[:n], tensor(DIGITS.target)
    y = torch.where(torch.rand(len(y), generator=g) < noise, torch.randint(10, (len(y),), generator=g), y)
    if multi: y = torch.stack([y > 4, y % 2 == 1, y < 2, y % 3 == 0], 1).float()
    x = tensor(DIGITS.data/16).float()[idx]
    model = reseeded(lambda: nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 4 if multi else 10)))
    return quiet(Learner(shuffled(x, y[idx], ifnone(n_valid, n//3)), model, BCEWithLogitsLossFlat() if multi else CrossEntropyLossFlat(), lr=.01, path=Path('/tmp')))


def shuffled(x, y, n_valid):
    items = list(zip(x, y))
    return DataLoaders(DataLoader(items[n_valid:], bs=64, shuffle=True, num_workers=0), DataLoader(items[:n_valid], bs=64, num_workers=0), device=CPU)


def is_default(found, eps):
    return (found.eps == eps and not found.learnt and found.verdict.startswith('the default, as the pilot has not learnt') and math.isnan(found.noise)
            and all(map(math.isnan, (*found.noise_interval, *found.eps_interval))) and 0 < found.valid_error < 1)


@pytest.mark.parametrize('noise', [0., .2, .4])
def test_a_pilot_that_has_learnt_noisy_labels(noise):
    "its error is large, and says how many of them are random"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'the validation error of the pilot is')
        warnings.filterwarnings('error', 'eps=')
        found = find(digits(noise), 10)
    near(found.eps, min(.4, found.valid_error*10/9))
    assert found.learnt and found.verdict.startswith('closed form')
    near(found.noise, noise, .06)


UNLEARNT = dict(untrained=dict(fit=noop), few_epochs=dict(n_epoch=3, lr=1e-3), small_lr=dict(n_epoch=10, lr=1e-3), tiny_lr=dict(n_epoch=10, lr=1e-5))


@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('name', ['untrained', 'few_epochs', 'small_lr', 'tiny_lr'])
def test_a_pilot_that_has_not_learnt(name, multi):
    "900 clean images: the default, with the reason, and no word on noise"
    with pytest.warns(UserWarning, match='the default, as the pilot has not learnt.*longer'): found = find(digits(n=900, multi=multi), **UNLEARNT[name])
    assert is_default(found, .05 if multi else .1)
    if name != 'few_epochs': assert ('last third' in found.verdict) == (name == 'small_lr')


def test_the_cap_holds_for_the_default():
    with pytest.warns(UserWarning, match='not learnt'): assert is_default(find(digits(n=300), fit=noop, cap=.04), .04)


def test_a_grid_of_pilots_that_have_not_learnt():
    "is no evidence, whatever its scores"
    with pytest.warns(UserWarning, match='not learnt'): found = find(digits(n=900), 3, 1e-3, full=True, epss=[.2, .9])
    assert is_default(found, .1) and found.scores.eps.tolist() == [0., .2, .9]
    assert is_default(tune._of_grid(found, frame([.1, .01, 0., .05], [.02, .02, 0., .02])), .1)


@pytest.mark.parametrize('full', [False, True])
@pytest.mark.parametrize('n_valid', [1, 2])
def test_hardly_any_validation_data(full, n_valid):
    with pytest.warns(UserWarning, match='not learnt'): found = find(digits(n=300, n_valid=n_valid), 10, full=full)
    assert found.eps == .1 and not found.learnt


def errors_of(train, valid):
    "`_Errors` of a training with these errors in its thirds, and validations: (after which third, error); each of 1,000 decisions"
    res = tune._Errors()
    res.train = [(tensor(round(1000*e)), 1000) for e in train]
    res.valid = [(at, [(tensor(round(1000*e)), 1000)]) for at, e in valid]
    return res


def why(error, errors, k=10):
    "For a validation error of 1,000 rows of `k` equal classes"
    found = FIRST._replace(eps=error*k/(k-1), valid_error=error, valid_error_interval=(error - .03, error + .03))
    return tune._why_not_learnt(found, .1, errors, torch.arange(1000) % k, k)


def why_of(error, targs, k): return tune._why_not_learnt(FIRST._replace(valid_error=error, valid_error_interval=(error, error)), .1, errors_of([], []), targs, k)


@pytest.mark.parametrize('full', [False, True])
@pytest.mark.parametrize('multi', [False, True])
def test_an_error_that_no_noise_explains_is_that_of_the_pilot(multi, full):
    "clean labels that a weak model is rightly unsure of: no noise, and an error of a third"
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 3 if multi else 10, generator=g)*(2. if multi else 3.)
    p = torch.sigmoid(logits) if multi else logits.softmax(1)
    targs = torch.bernoulli(p, generator=g) if multi else torch.multinomial(p, 1, generator=g)[:, 0]
    found = tune._closed_form(logits, targs, .4, errors_of([.5, .31, .3], [(3, .3)]))
    assert is_default(found, .05 if multi else .1) and 'is its own and not that of the labels' in found.verdict and .2 < found.valid_error < .35
    if full:
        with pytest.warns(UserWarning, match='its own.*longer'): assert is_default(tune._of_grid(found, frame([.1, .01, 0., .05], [.02, .02, 0., .02])), found.eps)


@pytest.mark.parametrize('full', [False, True])
def test_rows_that_are_known_by_heart_tell_nothing_about_labels(full):
    "50 images, 30 times"
    learn = digits(n=1050, n_valid=1000)
    learn.dls.train.bs = 16
    with pytest.warns(UserWarning, match='by heart.*shorter'): found = find(learn, 30, share=1., full=full, epss=[.1] if full else None)
    assert is_default(found, .1)


@pytest.mark.parametrize('noise', [0., .2, .4])
def test_a_good_pilot_keeps_the_closed_form(noise):
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'the validation error of the pilot is')
        warnings.filterwarnings('error', 'eps=')
        found = find(digits(noise, n=1700, n_valid=700), 10, share=1.)
    near(found.eps, min(.4, found.valid_error*10/9))
    near(found.noise, noise, .06)


def test_when_a_pilot_has_not_learnt():
    flat = errors_of([.5, .31, .3], [(1, .4), (2, .31), (3, .3)])
    assert why(.3, flat) is None
    assert 'near 0.90' in why(.7, flat)                                                   # above 3/4 of .9
    assert 'near 0.50' in why(.48, flat, k=2)                                             # its interval reaches .5
    assert 'training error still fell from 0.45 to 0.30' in why(.3, errors_of([.6, .45, .3], [(3, .3)]))
    assert 'validation error still fell from 0.45 to 0.30' in why(.3, errors_of([.5, .31, .3], [(1, .6), (2, .45), (3, .3)]))
    assert 'by heart: their error 0.10 is less' in why(.3, errors_of([.4, .25, .1], [(2, .31), (3, .3)]))
    assert why(.3, errors_of([.4, .25, .16], [(2, .31), (3, .3)])) is None                # half of it, and no longer falling
    assert why(.09, errors_of([.4, .25, .01], [(2, .1), (3, .09)])) is None               # below the default
    assert 'its validation error 0.39 is no better than 0.20' in why_of(.39, torch.tensor([0]*800 + [1]*200), k=2)
    assert why(.3, errors_of([.6, .45, .3], [(2, .3), (3, .3)])) is None                  # validation has come to rest
    assert why(.09, errors_of([.6, .3, .1], [(3, .1)])) is None                           # what is too large is less than the default
    assert why(.3, errors_of([], [])) is None                                             # trained before
    found = FIRST._replace(valid_error=.3, valid_error_interval=(.2, .45))
    few = errors_of([.5, .31, .3], [(2, .44)])
    assert tune._why_not_learnt(found, .1, few, torch.arange(8) % 10, 10) is None         # of 8 rows: within a standard error
    assert tune._why_not_learnt(found, .1, few, torch.arange(50) % 10, 10)


def test_a_suggestion_prints_as_a_sentence():
    assert isinstance(FIRST, tuple) and FIRST[0] == FIRST.eps == .3 and FIRST._fields[:2] == ('eps', 'eps_interval')
    assert repr(FIRST) == str(FIRST) == ('eps=0.300 [0.200, 0.400] (closed form). The validation error of the pilot is 0.200 [0.100, 0.300]; '
                                         '0.100 [0.000, 0.200] of the labels are random.')
    assert repr(tune._of_grid(FIRST, frame([.1, .01, 0., .05], [.02, .02, 0., .02]))).endswith(' 4 pilots: see scores.')
    nan = FIRST._replace(noise=math.nan, eps_interval=(math.nan, math.nan), verdict='the default')
    assert repr(nan) == 'eps=0.300 (the default). The validation error of the pilot is 0.200 [0.100, 0.300]; it cannot tell how many labels are random.'


# ---------------------------------------------------------------- what pilots smooth with

def options_seen(learn, **kwargs):
    "(eps, prior, spread) of each pilot"
    seen = []
    def fit(trial):
        cbs = trial.cbs.filter(risinstance(MultiLabelSmoothingCallback))
        o = cbs[0] if cbs else getattr(trial.loss_func, 'func', trial.loss_func)
        seen.append((o.eps, None if getattr(o, 'prior', None) is None or isinstance(o.prior, str) else comparable(o.prior), getattr(o, 'spread', None)))
        trial.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        find(learn, full=True, epss=[.2], fit=fit, **kwargs)
    return seen


U = tensor([.4, .3, .2, .1])


def test_prior_and_spread_are_handed_on():
    assert options_seen(single()) == [(0., None, 'all'), (.2, None, 'all')]
    assert options_seen(single(), spread='others')[1] == (.2, None, 'others')
    (eps, prior, _), = options_seen(single(), prior=U)[1:]
    assert eps == .2; near(prior, U)


def test_prior_and_spread_of_the_learner_are_carried_over():
    near(options_seen(single().to_smooth(.3, prior=U))[1][1], U)
    assert options_seen(single().to_smooth(.3, spread='others'))[1] == (.2, None, 'others')
    near(options_seen(multi().to_smooth(.1, prior=tensor([.2, .3, .4])))[1][1], [.2, .3, .4])
    near(options_seen(single(LabelSmoothingCrossEntropyFlat(.3, prior=U)))[1][1], U)
    assert options_seen(single().to_smooth(.3, spread='others').fit_temperature(), spread='all')[1][2] == 'all'


def test_smoothing_of_the_learner_does_not_change_the_first_pilot():
    a = find(single(), cap=1.)
    for learn in (single().to_smooth(.4), single(LabelSmoothingCrossEntropyFlat(.4)), single(CrossEntropyLossFlat(label_smoothing=.4))):
        near(find(learn, cap=1.)[0], a[0])
    b = find(multi())
    for learn in (multi().to_smooth(.2), multi(LabelSmoothingBCEWithLogitsFlat(.2))): near(find(learn)[0], b[0])


def test_a_scheduler_of_eps_is_ignored():
    learn = single().to_smooth(.3)
    expected = find(learn, cap=1.)
    learn.add_cb(LabelSmoothingScheduler(SchedCos(.4, .3)))
    assert find(learn, cap=1.)[:6] == expected[:6] and learn.cbs.filter(risinstance(LabelSmoothingScheduler))
    assert learn.loss_func.eps == .3


def test_the_package_s_own_loss_of_labels():
    loss = LabelSmoothingBCEWithLogitsFlat(.2, prior=tensor([.2, .3, .4]))
    learn = multi(loss)
    assert options_seen(learn)[1][0] == .2 and options_seen(learn)[0][0] == 0.
    assert learn.loss_func is loss and loss.eps == .2
    with pytest.raises(ValueError, match='prior'): find(learn, full=True, epss=[.1], prior=tensor([.1, .1, .1]))


def test_a_temperature_of_the_learner_is_no_matter():
    "and a pilot is no training that it would warn of"
    expected = find(single(), 140, cap=1.)
    learn = single()
    learn.loss_func = tune.tempered(learn.loss_func, 3.)
    learn.add_cb(TemperatureReminder())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert find(learn, 140, cap=1.)[:6] == expected[:6]
    assert learn.temperature == 3.


# ---------------------------------------------------------------- what cannot be

class Trained(Callback):
    def before_fit(self): raise AssertionError('a pilot was trained')


class Own(CrossEntropyLossFlat): pass


@pytest.mark.parametrize('loss', [Own(), MSELossFlat(), nn.NLLLoss(), lambda x, y: x.sum()], ids=['subclass', 'mse', 'nll', 'function'])
def test_an_unsupported_loss_is_a_type_error_before_any_training(loss):
    learn = single(loss, cbs=Trained())
    before = state(learn)
    with pytest.raises(TypeError): find(learn)
    same_state(state(learn), before)


BAD = dict(share=dict(share=0), share_above=dict(share=1.5), cap=dict(cap=0), cap_above=dict(cap=2), n_epoch=dict(n_epoch=0), epss=dict(epss=[.1]), prior=dict(prior=U),
           negative=dict(full=True, epss=[-.1]), above=dict(full=True, epss=[2.]), alone=dict(full=True, epss=[0.]), empty=dict(full=True, epss=[]), nan=dict(full=True, epss=[math.nan]),
           nan_share=dict(share=math.nan))


@pytest.mark.parametrize('name', BAD)
def test_bad_arguments_are_value_errors_before_any_training(name):
    with pytest.raises(ValueError): find(single(cbs=Trained()), **BAD[name])


def test_eps_of_labels_out_of_range():
    "1/2 at most, before any training"
    with pytest.raises(ValueError): find(multi(cbs=Trained()), full=True, epss=[.7])


def test_a_bad_option_is_an_error_before_any_training():
    with pytest.raises(TypeError): find(single(cbs=Trained()), full=True, epss=[.1], temperature=2)
    with pytest.raises(ValueError): find(single(cbs=Trained()), full=True, epss=[.1], spread='none')


def test_targets_that_share_one_softmax_are_not_taken_for_labels():
    "multi_hot: sigmoid's decisions say nothing"
    learn = multi(LabelSmoothingCrossEntropyFlat(.1, multi_hot=True))
    with pytest.raises((TypeError, ValueError)): find(learn)


@pytest.mark.parametrize('make', [single, multi])
def test_a_pilot_that_diverges_is_a_value_error(make):
    "lr=1e6, or weights that become nan"
    learn = make()
    learn.opt_func = SGD
    before = state(learn)
    with pytest.raises(ValueError, match='diverged'): find(learn, 10, 1e30)
    def fit(trial):
        with torch.no_grad(): params(trial.model)[0].fill_(math.nan)
    with pytest.raises(ValueError, match='diverged'): find(learn, fit=fit)
    same_state(state(learn), before)


def test_a_pilot_that_diverges_in_part_is_a_value_error():
    "one class is nan: the other logits may be finite, and the likelihood is not"
    def fit(trial):
        with torch.no_grad(): trial.model[-1].bias[1] = math.nan
    with pytest.raises(ValueError, match='diverged'): find(single(), fit=fit)


def test_a_row_that_is_nan_does_not_give_a_strange_eps():
    "nan in the data: an error, or a number"
    x, y = noisy()
    x[-5] = math.nan
    for full in False, True:
        try: found = quietly(lambda o: find(o, 10, full=full, cap=1.), lambda: single(x_y=(x, y)))
        except ValueError: continue
        assert math.isfinite(found.eps)


def test_targets_that_share_one_softmax_given_as_shares():
    "soft labels: sigmoid's decisions say nothing"
    x, y = noisy()
    with pytest.raises((TypeError, ValueError)): find(single(x_y=(x, F.one_hot(y, 4).float())))


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)
    def forward(self, x): return self.layer(x)[:, 0]


def test_one_event_a_row():
    "(N,) outputs and targets, as (N,1) ones"
    x, y = noisy_multi(k=1)
    learns = [quiet(Learner(shuffled_dls(x, targs), reseeded(model), loss_func=BCEWithLogitsLossFlat(), lr=.05, path=Path('/tmp')))
              for targs, model in ((y, lambda: nn.Sequential(nn.Linear(6, 1))), (y[:, 0], Squeezed))]
    a, b = (find(o, cap=1.) for o in learns)
    near(b.eps, a.eps)


def test_masked_classes_have_no_share_in_the_noise():
    "-inf logits: as a grid search has it, over the K classes"
    z, y = drawn(300, 4, .2, seed=3)
    z[:, 3] = -1e4
    y = y.clamp(max=2)
    near(noise_estimate(z.masked_fill(z == -1e4, -math.inf), y), noise_estimate(z, y), 1e-3)


def test_a_pilot_of_the_grid_that_diverges():
    def fit(trial):
        trial.fit_one_cycle(42)
        if trial.loss_func.eps: params(trial.model)[-1].data.fill_(math.nan)
    with pytest.warns(UserWarning, match='eps=0.2 diverged'): found = find(single(), full=True, epss=[.2], fit=fit)
    assert found.scores.eps.tolist() == [0.] and found.verdict.startswith('no evidence')
    assert found.eps == find(single(), fit=fit).eps


# ---------------------------------------------------------------- plots, and no trace

@pytest.mark.parametrize('kind', ['one', 'full', 'not_learnt', 'untrained'])
@pytest.mark.parametrize('make', [single, multi])
def test_a_figure_is_made(make, kind):
    "that says what was found"
    plt.close('all')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        found = find(make(), show_plot=True, **dict(one=dict(n_epoch=140), full=dict(n_epoch=140, full=True, epss=[.1]), not_learnt=dict(n_epoch=1), untrained=dict(fit=noop))[kind])
    assert len(plt.get_fignums()) == 1 and found.learnt == (kind in ('one', 'full'))
    ax, = plt.gcf().axes
    labels = ' '.join(o.get_text() for o in ax.get_legend().get_texts())
    assert ax.get_xlabel() and ax.get_ylabel() and f'eps={found.eps:.3g}' in ax.get_title()
    assert (f'suggested eps {found.eps:.3f}' if found.learnt else 'validation error') in labels
    colors = {matplotlib.colors.to_hex(o.get_color()) for o in ax.lines}
    assert not colors & {matplotlib.colors.to_hex(f'C{i}') for i in range(4)}   # they have meanings of their own
    plt.gcf().canvas.draw()
    plt.close('all')
    find(single(), 1, cap=1.)
    assert not plt.get_fignums()


def test_the_same_twice():
    learn = single()
    random.random(); torch.rand(1); np.random.rand()
    a = find(learn, cap=1.)
    random.random(); torch.rand(3); np.random.rand()
    assert find(learn, cap=1.) == a


def interrupted(learn):
    def fit(trial):
        trial.fit(1)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): find(learn, fit=fit)


def interrupted_inside(learn):
    with pytest.raises(KeyboardInterrupt): find(learn, fit=lambda o: o.fit(2, cbs=RaiseAt(KeyboardInterrupt('c'))))


def diverging(learn):
    with pytest.raises(ValueError): find(learn, 10, 1e30)


def quietly(f, make=None):
    def g(learn):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            res = f(learn)
            plt.close('all')
            return res
    return g(make()) if make else g


CALLS = dict(one=lambda o: find(o, 3, show_plot=True), full=lambda o: find(o, 3, full=True, epss=[.1], show_plot=True), fine_tune=lambda o: find(o, fit=lambda t: t.fine_tune(1)),
             interrupted=interrupted, interrupted_inside=interrupted_inside)


@pytest.mark.parametrize('call', CALLS)
@pytest.mark.parametrize('name', ['never_fitted', 'adam', 'torch_loaders', 'smoothed'])
def test_eps_find_leaves_no_trace(name, call): check_leaves_no_trace(LEARNERS[name], quietly(CALLS[call]))


@pytest.mark.parametrize('call', CALLS)
def test_eps_find_with_mixup_left_holding_the_loss(call):
    "works, and leaves no trace; fastai itself can't train such a Learner on"
    check_leaves_no_trace(mixed_up, quietly(CALLS[call]), go_on=False)


@pytest.mark.parametrize('name', ['unet', 'tabular', 'language_model'])
def test_eps_find_leaves_no_trace_of_applications(name): check_leaves_no_trace(LEARNERS[name], quietly(lambda o: find(o, 1)))
