"A pilot leaves no trace: the Learner is as before to the last bit, and trains on as if there had been none."
import threading, warnings
from contextlib import nullcontext

import pytest
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.hook import HookCallback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.text.all import language_model_learner, text_classifier_learner
from fastai.vision.all import unet_learner

import fuzz
from helpers import *
from fastai_smooth.learner import *
from fastai_smooth.pilot import pilot

# ---------------------------------------------------------------- Learners, and all there is of one

class Notes(Callback):
    "A user's callback with a list, a number and random numbers of its own"
    def __init__(self): self.losses, self.n, self.rng = [], 0, random.Random(5)
    def after_batch(self):
        self.n += 1
        self.losses.append(float(self.learn.loss.detach()) + self.rng.random())

def torch_loader(items, **kwargs): return torch.utils.data.DataLoader(items, batch_size=16, **kwargs)
def fastai_loader(items, cls=DataLoader, **kwargs): return cls(items, bs=16, **{'num_workers': 0, 'shuffle': True, **kwargs})

def plain(loader=fastai_loader, **kwargs):
    "Its training batches are those of `loader(items)`"
    g = torch.Generator().manual_seed(0)
    items = list(zip(torch.randn(160, 6, generator=g), torch.randint(4, (160,), generator=g)))
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(.3), nn.Linear(12, 4))
    kwargs = {'opt_func': partial(SGD, mom=.9), 'metrics': [accuracy, Perplexity()], 'cbs': Notes(), **kwargs}
    dls = DataLoaders(loader(items[:80]), DataLoader(items[80:], bs=16, num_workers=0), device=CPU)
    return quiet(Learner(dls, net, loss_func=CrossEntropyLossFlat(), lr=.05, path=Path('/tmp'), **kwargs))

def fitted(*args, **kwargs):
    learn = plain(*args, **kwargs)
    learn.fit_one_cycle(2)
    return learn

def frozen():
    "Adam with two groups of parameters, one of them frozen again, after a search for lr"
    learn = plain(splitter=lambda m: [params(m[:2]), params(m[2:])], opt_func=Adam)
    learn.lr_find(num_it=8, show_plot=False)
    learn.fit_one_cycle(1, slice(1e-3, 1e-2))
    learn.freeze()
    return learn

def trained(learn):
    quiet(learn).path = Path('/tmp')
    learn.fit(1)
    return learn

def images(): return trained(unet_learner(segment_dls(*segment_arrays(12), bs=4, n_valid=4), tiny_arch, n_out=3, pretrained=False, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=VOID)))
def words(): return trained(language_model_learner(lm_dls(), AWD_LSTM, config=small_lm_config(), pretrained=False))
def texts(): return trained(text_classifier_learner(text_dls(), AWD_LSTM, config=small_clas_config(), pretrained=False))

def searched(make):
    "After a search for lr, which ends in a training batch: its RNNCallback holds tensors with a graph"
    learn = make()
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    assert learn.rnn.out.grad_fn is not None
    return learn

class OwnSampler(torch.utils.data.Sampler):
    "An order of a generator of its own, and of the epoch, which it counts"
    def __init__(self, items): self.n, self.gen, self.epoch = len(items), np.random.default_rng(3), 0
    def __len__(self): return self.n
    def __iter__(self):
        self.epoch += 1
        return iter(((self.gen.permutation(self.n) + self.epoch) % self.n).tolist())

class RandomDL(DataLoader):
    "fastai's, with a generator of its own"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gen = np.random.default_rng(3)
    def get_idxs(self): return self.gen.permutation(self.n).tolist()

class Batches:
    "A user's own loader, without a data set, which counts its epochs"
    def __init__(self, items): self.batches, self.epoch = batches(items), 0
    def __len__(self): return len(self.batches)
    def __iter__(self):
        self.epoch += 1
        return iter(self.batches[self.epoch % 3:] + self.batches[:self.epoch % 3])

def batches(items, cls=list): return cls(tuple(map(torch.stack, zip(*o))) for o in chunked(items, 16))

def seeded(): return torch.Generator().manual_seed(3)
LOADERS = dict(torch=lambda o: torch_loader(o, shuffle=True, generator=seeded()), sampler=lambda o: torch_loader(o, sampler=torch.utils.data.WeightedRandomSampler([1.]*80, 80, generator=seeded())),
               own=lambda o: torch_loader(o, sampler=OwnSampler(o)),
               batches=lambda o: torch.utils.data.DataLoader(o, batch_sampler=torch.utils.data.BatchSampler(OwnSampler(o), 16, False)),
               persistent=lambda o: torch_loader(o, shuffle=True, num_workers=1, persistent_workers=True),
               fastai_persistent=lambda o: fastai_loader(o, num_workers=1, persistent_workers=True), fastai_numpy=lambda o: fastai_loader(o, RandomDL),
               list=batches, tuple=partial(batches, cls=tuple), L=partial(batches, cls=L), batches_own=Batches)
LEARNERS = dict(never_fitted=plain, frozen=frozen, smoothed=lambda: fitted().to_smooth(.2), unet=images, language_model=words,
                words_searched=partial(searched, words), texts_searched=partial(searched, texts), **{k: partial(fitted, v) for k, v in LOADERS.items()})

def comparable(o):
    "Plain data of anything there is in a Learner, to compare by =="
    if isinstance(o, (Tensor, np.ndarray)): return o.tolist()
    if isinstance(o, random.Random): return o.getstate()
    if isinstance(o, torch.Generator): return o.get_state().tolist()
    if isinstance(o, dict): return {str(k): comparable(v) for k, v in o.items()}
    if isinstance(o, (list, tuple, L)): return [comparable(v) for v in o]
    return o if isinstance(o, (int, float, str, bool, type(None))) else type(o).__name__

def fields(cb): return comparable({k: v for k, v in vars(cb).items() if k not in ('learn', 'start_epoch', 'log')})  # two hold times

def state(learn):
    opt, ps, loaders = learn.opt, list(learn.model.parameters()), learn.dls.loaders
    return dict(weights=comparable(dict(learn.model.state_dict())), modes=[m.training for m in learn.model.modules()], grads=comparable([p.grad for p in ps]), frozen=[p.requires_grad for p in ps],
                opt=opt and [comparable(opt.state_dict()), opt.frozen_idx], recorder=fields(learn.recorder), random=comparable(get_random_states()),
                rngs=[comparable([getattr(dl, 'rng', None), getattr(dl, 'epoch', None), getattr(dl, 'generator', None), getattr(getattr(dl, 'sampler', None), 'generator', None)]) for dl in loaders],
                hooks=[len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules()],
                cbs=[(type(cb).__name__, fields(cb), cb.learn is learn) for cb in learn.cbs], metrics=[comparable(vars(m)) for m in learn.metrics], names=sorted(learn.__dict__))

def parts(learn): return [getattr(learn, k, None) for k in 'dls model loss_func opt opt_func splitter recorder path model_dir wd moms'.split()] + [
    *learn.cbs, *learn.dls.loaders, *learn.metrics, *learn.model.parameters()]

def same_state(a, b):
    for k in a: assert a[k] == b[k], k

def train_on(learn):
    learn.fit_one_cycle(1, 1e-2)
    learn.fit(1)
    return state(learn)

def reseeded(make):
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    return make()

def check_leaves_no_trace(make, f):
    "What `f` does to the Learner of `make` changes nothing, and training goes on bitwise as that of a twin"
    learn = reseeded(make)
    before, ids = state(learn), parts(learn)
    f(learn)
    same_state(state(learn), before)
    assert all(a is b for a, b in zip(parts(learn), ids, strict=True))
    rng = get_random_states()
    after = train_on(learn)
    twin = reseeded(make)
    same_state(before, state(twin))
    set_random_states(**rng)
    same_state(train_on(twin), after)

def in_pilot(learn):
    with pilot(learn) as trial:
        train_on(trial)
        assert not torch.equal(weights(trial), weights(learn))

# ---------------------------------------------------------------- no trace

@pytest.mark.parametrize('name', LEARNERS)
def test_a_learner_goes_on_as_if_there_had_been_no_pilot(name): check_leaves_no_trace(LEARNERS[name], in_pilot)

@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt, CancelFitException, CancelBatchException])
@pytest.mark.parametrize('name', ['never_fitted', 'torch'])
def test_no_trace_after_an_exception(name, ex):
    "in a batch of a pilot, perhaps with MixUp left holding the loss"
    def f(learn):
        with (nullcontext if ex.__name__.startswith('Cancel') else partial(pytest.raises, ex))(), pilot(learn) as trial:
            trial.fit(2, cbs=[RaiseAt(ex('power cut')), *[MixUp()]*(name == 'never_fitted')])
    check_leaves_no_trace(LEARNERS[name], f)

def test_no_trace_of_predictions():
    def f(learn):
        with pilot(learn, train=False) as trial:
            assert trial.model is learn.model
            trial.get_preds()
    for make in fitted, plain: check_leaves_no_trace(make, f)

def test_nested_pilots():
    def f(learn):
        with pilot(learn) as outer:
            outer.fit(1)
            before = state(outer)
            with pilot(outer, seed=3) as inner: inner.fit(1)
            same_state(state(outer), before)
            outer.fit(1)
    check_leaves_no_trace(fitted, f)

# ---------------------------------------------------------------- what a pilot is

def test_a_pilot_is_seeded():
    learn, found = fitted(), []
    for seed in 1, 1, 2:
        with pilot(learn, seed) as trial:
            trial.fit(1)
            found.append(weights(trial))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])

def test_a_pilot_starts_where_the_learner_is_and_shares_nothing():
    learn = frozen()
    with pilot(learn) as trial, torch.no_grad():
        assert torch.equal(weights(trial), weights(learn)) and trial.opt.frozen_idx == learn.opt.frozen_idx
        assert comparable(trial.opt.state_dict()) == comparable(learn.opt.state_dict())
        mine, theirs = [{id(p) for p in o.model.parameters()} for o in (learn, trial)]
        assert not mine & theirs and {id(p) for p in trial.opt.all_params().itemgot(0)} <= theirs
        assert trial.loss_func is not learn.loss_func and trial.dls.train is not learn.dls.train and trial.notes is not learn.notes
        assert trial.dls.train.dataset is learn.dls.train.dataset

def test_a_pilot_trains_where_fastai_has_turned_gradients_off():
    learn = fitted()
    with torch.no_grad(): in_pilot(learn)

def test_savers_stoppers_and_loggers_are_left_out(tmp_path):
    "and a text encoder is not saved"
    learn = words()
    learn.path = tmp_path
    learn.add_cbs([SaveModelCallback(), EarlyStoppingCallback(patience=0), CSVLogger()])
    with pilot(learn) as trial:
        assert not trial.cbs.filter(risinstance((SaveModelCallback, EarlyStoppingCallback, CSVLogger)))
        trial.fit(3), trial.save_encoder('enc')
    assert not list(tmp_path.rglob('*'))

class Locked(Notes):
    "Has a lock, which no copy can have; predictions depend on it"
    def __init__(self):
        super().__init__()
        self.lock, self.seen = threading.Lock(), {'batches': []}
    def after_pred(self):
        self.learn.pred = self.pred/2
        self.seen['batches'].append(self.iter)

def test_a_callback_that_cannot_be_copied_is_left_out_of_trainings_and_named():
    "each time, where the user's code is, with the reason and a remedy: it would share its list with the pilot"
    learn = fitted(cbs=[Locked(), GradientAccumulation(16)])
    before = fields(learn.locked)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"without the callbacks locked \(TypeError: cannot pickle '_thread.lock' object\):.*`__deepcopy__`") as said, pilot(learn) as trial: trial.fit(1)
        assert len(said) == 1 and said[0].filename == __file__
    assert not hasattr(trial, 'locked') and trial.gradient_accumulation is not learn.gradient_accumulation
    assert fields(learn.locked) == before and learn.locked.learn is learn

def test_a_callback_that_cannot_be_copied_has_its_part_in_predictions():
    "without a word, and without a trace in it"
    learn = fitted(cbs=Locked())
    expected, before = learn.get_preds()[0], fields(learn.locked)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        with pilot(learn, train=False) as trial: assert torch.equal(trial.get_preds()[0], expected)
    assert fields(learn.locked) == before and learn.locked.learn is learn

class Keeps(Callback):
    "Keeps tensors with a graph: the last one, all of them, and their sum"
    run_valid = False
    def __init__(self): self.seen, self.total = {'preds': []}, 0.
    def after_loss(self):
        self.last = self.pred
        self.seen['preds'].append(self.pred)
        self.total = self.total + self.learn.loss

@pytest.mark.parametrize('train', [True, False])
def test_tensors_of_callbacks_are_copied_without_their_graph(train):
    "and nothing is left out, said, or shared; fastai's hooks may keep such tensors, too"
    learn = fitted(cbs=[Keeps(), HookCallback(hook=lambda m, i, o: o, every=1, detach=False)])
    before = fields(learn.keeps)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'trial trainings')
        with pilot(learn, train=train) as trial:
            assert {**fields(trial.keeps), **before} == fields(trial.keeps) and trial.keeps.last is trial.keeps.seen['preds'][-1]
            assert not any(o.requires_grad for o in (trial.keeps.total, *trial.keeps.seen['preds'], *trial.hook.hooks.stored))
            trial.fit(1) if train else trial.get_preds()
    assert fields(learn.keeps) == before and learn.keeps.total.requires_grad and learn.hook.hooks.stored[0].requires_grad

@pytest.mark.parametrize('make', [words, texts])
def test_a_pilot_with_an_rnn_trains_as_the_learner_itself(make):
    learn = searched(make)
    learn.dls.loaders = [dl.new(shuffle=False) for dl in learn.dls.loaders]
    with pilot(learn, seed=3) as trial: trial.fit(1, 1e-2)
    with no_random(3): learn.fit(1, 1e-2)
    assert torch.equal(weights(trial), weights(learn))

@pytest.mark.parametrize('make', [lambda o: WeightedDL(o, bs=8, shuffle=True, wgts=[1., *[0.]*(len(o)-1)]), lambda o: PartialDL(o, bs=8, partial_n=16)], ids=['weighted', 'partial'])
def test_pilots_train_on_what_the_learner_trains_on(make):
    "fastai's weighted and partial loaders lose what they are in `new`"
    learn = plain(make)
    with pilot(learn) as trial:
        assert type(trial.dls[0]) is type(learn.dls[0]) and len(trial.dls[0]) == len(learn.dls[0])
        seen = torch.cat([b[0] for b in trial.dls[0]])
    assert len(seen) == 16 or (seen == seen[0]).all()

class OnlyPickles(nn.Sequential):
    def __deepcopy__(self, memo): raise RuntimeError('no copies')

class Watches(Callback):
    "Refers to a layer, optimizer and loss, and has a weight of its own that could be trained"
    def before_fit(self):
        self.layer, self.own = self.model[0], torch.ones(2, requires_grad=True)
        self.others = [self.learn.opt, self.learn.loss_func]

def test_a_model_that_only_pickles():
    "Is trained as any other: optimizer and callbacks of the pilot refer to its copy"
    def make():
        learn = plain(cbs=[Notes(), Watches()])
        learn.model = OnlyPickles(*learn.model)
        learn.fit(1)
        return learn
    check_leaves_no_trace(make, in_pilot)
    learn = reseeded(make)
    with pilot(learn) as trial:
        assert {id(p) for p in trial.opt.all_params(with_grad=False).itemgot(0)} == {id(p) for p in trial.model.parameters()}
        assert trial.watches.others[0] is trial.opt and trial.watches.others[1] is trial.loss_func
        assert trial.watches.layer is trial.model[0] and trial.watches.own.requires_grad and trial.watches.own is not learn.watches.own
        before = weights(trial)
        trial.fit(1)
        assert not torch.equal(weights(trial), before)

@pytest.mark.parametrize('cls', [list, tuple, L])
def test_a_list_of_batches_is_shared_as_a_data_set_is(cls):
    learn = plain(partial(batches, cls=cls))
    with pilot(learn) as trial: assert trial.dls.train is learn.dls.train
    learn = plain(partial(batches, cls=type('Own', (cls,), {})))   # which may have a state of its own
    with pilot(learn) as trial: assert trial.dls.train is not learn.dls.train

# ---------------------------------------------------------------- what it saves

class Saves(Callback):
    "Keeps the last epoch, here and far away, and goes back to it"
    def __init__(self, far): self.far = far
    def after_epoch(self): self.learn.save('ckpt'), self.learn.save(self.far)
    def after_fit(self): self.learn.load('ckpt'), self.learn.load(self.far)

def test_what_a_pilot_saves_is_kept_apart(tmp_path):
    "the user's files stay as they are, and a pilot finds what it saved, and what was there before it"
    learn = plain(cbs=Saves(tmp_path/'far'))
    learn.path = tmp_path
    learn.fit(1), learn.save('before')
    files = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} | {tmp_path/'open.pth': b''}
    assert {p.name for p in files} == {'ckpt.pth', 'far.pth', 'before.pth', 'open.pth'}
    with pilot(learn) as trial:
        trial.fit(1)
        after = weights(trial)
        with pilot(trial) as inner: inner.fit(1), inner.export('ckpt.pkl')
        assert torch.equal(weights(trial.load('before')), weights(learn)) and torch.equal(weights(trial.load('ckpt')), after) and not torch.equal(after, weights(learn))
        with open(tmp_path/'open.pth', 'wb') as f: trial.save(f)
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == files
    assert learn.save('ckpt') == tmp_path/'models/ckpt.pth' and learn.load('ckpt') is learn

# ---------------------------------------------------------------- what cannot be

class Stubborn(nn.Sequential):
    "Can be neither deepcopied nor pickled"
    def __deepcopy__(self, memo): raise RuntimeError('no copies')
    def __reduce_ex__(self, protocol): raise RuntimeError('no pickles')

@pytest.mark.parametrize('spoil, error, message', [
    (lambda o: setattr(o, 'model', Stubborn(o.model)), TypeError, 'no copies.*no pickles'), (lambda o: setattr(o, 'distributed_trainer', None), RuntimeError, 'inside distrib_ctx'),
    (lambda o: setattr(o.dls.train.sampler, 'lock', threading.Lock()), TypeError, 'and sampler of this DataLoader cannot be copied.*lock')], ids=['model', 'distributed', 'sampler'])
def test_what_cannot_be_copied_is_named(spoil, error, message):
    learn = reseeded(LEARNERS['own'])
    spoil(learn)
    before = state(learn)
    with pytest.raises(error, match=message), pilot(learn): pass
    same_state(state(learn), before)
    if error is TypeError:
        with pilot(learn, train=False) as trial: trial.get_preds()

@pytest.mark.parametrize('seed', [*fuzz.BAD_SEED, -2**63 - 1], ids=str)
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises((TypeError, ValueError), match='seed must be a whole number'), pilot(plain(), seed): pass

def test_a_copy_of_a_pilot_saves_its_own_model():
    with pilot(tensor_learner(single_dls(), mlp(k=4), CrossEntropyLossFlat())) as trial:
        other = deepcopy(trial)
        def fill(v): [nn.init.constant_(p, v) for p in other.model.parameters()]
        fill(7.)
        other.save('mine')
        fill(0.)
        assert (weights(other.load('mine')) == 7).all()
