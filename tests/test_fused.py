"""A Learner with FusedHead beside the same Learner without: what it learns, what is left behind, and what is refused.

It trains beside fastai's callbacks in test_callbacks_compose.py, and in two processes in test_distributed.py."""
import fastai.losses, pickle, pytest
from helpers import *
from kernels.test_memory import allocations
from reference import distance
from test_callbacks_compose import FAULTS, IN_BATCH, Fault
from fastai.tabular.all import tabular_learner
from fastai.text.all import language_model_learner, text_classifier_learner

from fastai_smooth.all import *
from fastai_smooth.kernels.linear import LinearLogits

for name in [n for n in globals() if n.startswith('test')]: del globals()[name]  # fastcore's test_eq and friends

K, PRIOR = 4, torch.tensor([.1, .2, .3, .4])

def smooth(eps=.2, **kwargs): return LabelSmoothingCrossEntropyFlat(eps, **kwargs)

def learner(loss=None, y=noop, model=None, **kwargs):
    "`y` makes the targets, of class indices"
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 6, generator=g), torch.randn(6, K, generator=g)
    return tensor_learner(tensor_dls(x, y((x@w).argmax(1))), ifnone(model, mlp(k=K)), ifnone(loss, smooth()), **kwargs)

def flagged(loss=None, y=noop, **kwargs): return learner(ifnone(loss, CrossEntropyLossFlat()), y).to_smooth(**kwargs)

# ---------------------------------------------------------------- models

class HeadFirst(nn.Module):
    "Its head is the first of its layers"
    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(12, K), nn.Sequential(nn.Linear(6, 12), nn.Tanh())
    def forward(self, x): return self.head(self.body(x))

class Checkpointed(nn.Module):
    "Makes its hidden layer, and perhaps its logits, a second time in the backward"
    def __init__(self, head=False, **kwargs):
        super().__init__()
        self.body, self.head, self.with_head, self.kwargs = mlp(k=K), nn.Linear(K, K), head, kwargs
    def forward(self, x):
        x.requires_grad_()
        if self.with_head: return torch.utils.checkpoint.checkpoint(lambda x: self.head(self.body(x)), x, **self.kwargs)
        return self.head(input=torch.utils.checkpoint.checkpoint(self.body, x, **self.kwargs))

class Words(nn.Module):
    "A small transformer: logits (bs,sl,n), by a decoder that is tied to the embedding"
    def __init__(self, n=11):
        super().__init__()
        self.emb, self.body = nn.Embedding(n, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.decoder = nn.Linear(8, n, bias=False)
        self.decoder.weight = self.emb.weight
    def forward(self, x): return self.decoder(self.body(self.emb(x)))

def words(loss=None, y=noop):
    x = torch.randint(11, (32, 7), generator=torch.Generator().manual_seed(0))
    return tensor_learner(tensor_dls(x, y(x.roll(-1, 1)), bs=8), Words(), ifnone(loss, smooth()))

def images():
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return tensor_learner(tensor_dls(x, x.mean((2, 3)).argmax(1)), nn.Sequential(tiny_arch(), create_head(16, K)), smooth())

def frozen(*names):
    "Without a gradient for these parameters"
    learn = learner()
    for name in names: learn.model.get_parameter(name).requires_grad_(False)
    return learn

def unfrozen_head():
    learn = learner(splitter=lambda m: [params(m[:2]), params(m[2])])
    learn.freeze()
    return learn

def junk(y): return y.where(torch.arange(len(y)) % 3 > 0, 1)
def soft(y): return (F.one_hot(y, K) + .5) / 3
def labels(y): return torch.stack([y < 2, y > 0, y == 3], 1)
SGDS = dict(pretrained=False, opt_func=SGD, lr=.1)

def of(loss=None, y=noop, k=K): return lambda: learner(deepcopy(loss), y, mlp(k=k))   # a small MLP with this loss
def by(*args, **kwargs): return lambda: flagged(*args, **kwargs)                        # and one with the flag
def module(m): return lambda: learner(model=m())

CASES = dict(
    MLP=lambda: learner(metrics=accuracy), images=images, transformer=words,
    tabular=lambda: tabular_learner(tabular_dls(tabular_frame()), layers=[8], opt_func=SGD, lr=.1, loss_func=smooth()),
    texts=lambda: text_classifier_learner(text_dls(10), AWD_LSTM, config=small_clas_config(), **{**SGDS, 'lr': 1e-3}).to_smooth(),
    language_model=lambda: language_model_learner(lm_dls(), AWD_LSTM, config=small_lm_config(), **SGDS).to_smooth(prior='train'),
    head_first=module(HeadFirst), linear=module(lambda: nn.Linear(6, K)), data_parallel=module(lambda: nn.DataParallel(mlp(k=K))),
    checkpoint=module(lambda: Checkpointed(use_reentrant=False)), checkpoint_reentrant=module(lambda: Checkpointed(use_reentrant=True)),
    checkpoint_head=module(lambda: Checkpointed(True, use_reentrant=False)),
    soft_words=lambda: words(y=lambda y: (F.one_hot(y, 11) + .5) / 6.5), several_words=lambda: words(LabelSmoothingBCEWithLogitsFlat(), lambda y: F.one_hot(y, 11)),
    no_bias=module(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, K, bias=False))),
    compiled_body=module(lambda: nn.Sequential(torch.compile(mlp(k=K)[:2], backend='eager'), nn.Linear(12, K))),
    frozen_head=lambda: frozen('2.weight', '2.bias'), frozen_weight=lambda: frozen('2.weight'), frozen_bias=lambda: frozen('2.bias'),
    frozen_body=lambda: frozen('0.weight', '0.bias'), freeze=unfrozen_head,
    uint8=of(y=lambda y: y.to(torch.uint8)), int16=of(y=lambda y: y.short()), int32=of(y=lambda y: y.int()), column=of(y=lambda y: y[:, None]),
    ignored=of(smooth(ignore_index=1), junk), weights=of(smooth(weight=PRIOR)), ignored_words=lambda: words(smooth(ignore_index=3, weight=torch.rand(11))),
    prior=of(smooth(prior=PRIOR)), prior_by_class=of(smooth(prior=torch.stack([PRIOR.roll(i) for i in range(K)]))), others=of(smooth(spread='others')),
    eps_by_class=of(smooth(PRIOR)), sum=of(smooth(reduction='sum')), soft=of(y=soft), soft_weights=of(smooth(weight=PRIOR), soft), hard=of(smooth(0.)),
    multi_hot=of(smooth(multi_hot=True), lambda y: F.one_hot(y, K) | F.one_hot((y+1) % K, K)), module=of(LabelSmoothingCrossEntropy(.2)),
    labels=of(LabelSmoothingBCEWithLogitsFlat(.1, pos_weight=torch.tensor([1., 2., 3.])), labels, 3),
    pair=of(LabelSmoothingBCEWithLogitsFlat((.2, .1)), lambda y: labels(y).float(), 3),
    labels_prior=of(LabelSmoothingBCEWithLogits(.1, prior=torch.tensor([.5, .7, .2])), labels, 3), one_label=of(LabelSmoothingBCEWithLogitsFlat(), lambda y: y > 1, 1),
    flag=by(), flag_valid=by(smooth_valid=True), flag_prior=by(prior=PRIOR, eps=.3), flag_torch=by(nn.CrossEntropyLoss(weight=PRIOR)), flag_function=by(F.cross_entropy),
    online=by(prior='online'), online_ignored=by(CrossEntropyLossFlat(ignore_index=1), junk, prior='online'),
    global_mean=lambda: learner(smooth(weight=PRIOR, ignore_index=1), junk, cbs=GlobalMean()), schedule=lambda: learner(cbs=LabelSmoothingScheduler(SchedLin(.5, 0.))))
HEADS = dict(head_first=lambda m: m.head, MLP=lambda m: m[2])   # of the others the last nn.Linear

def made(name, fused):
    torch.manual_seed(0)
    learn = quiet(CASES[name]())
    return learn.add_cb(FusedHead(HEADS.get(name, noop)(learn.model) if name in HEADS else None, chunk_rows=3)) if fused else learn

def record(learn, n_epoch=2):
    grads = Spy(lambda l: torch.cat([p.grad.flatten() for p in l.model.parameters() if p.grad is not None]), 'before_step')
    batches = Spy(lambda l: (type(l.pred), l.loss.detach().clone()), 'after_batch', order=99)
    fit_seeded(learn, n_epoch, cbs=[grads, batches])
    res = dict(gradients=[g for _, g in grads.seen], losses=[o[1] for _, o in batches.seen], weights=[weights(learn)],
               validation=[tensor(o, dtype=float) for o in learn.recorder.values])
    if not isinstance(learn.dls.train, LMDataLoader): res['predictions'] = learn.get_preds()[:1]
    for cb in learn._grab_cbs(OnlineLabelSmoothing): res['S'] = [cb.prior]
    return res, {t for t, _ in batches.train()}, {t for t, _ in batches.valid()}

@pytest.mark.parametrize('name', CASES)
def test_trains_as_without(name):
    "Gradients of every batch, losses, weights, validation and predictions; logits are there in validation alone"
    ours, in_training, in_validation = record(made(name, True))
    ref, *_ = record(made(name, False))
    assert ours.keys() == ref.keys()
    for name in ref: assert len(ours[name]) == len(ref[name]) and max(map(distance, ours[name], ref[name])) < 1e-5, name
    assert in_training == {LinearLogits} and LinearLogits not in in_validation
    assert len(ref['gradients']) >= 2 and ref['gradients'][0].abs().max() > 1e-4

def test_nothing_of_the_logits_size_is_allocated():
    "In a training: its validation is of one row"
    n, k = 64, 2000
    def sizes(fused): return max(allocations(lambda: learner(n=n+1, k=k, cbs=[FusedHead(chunk_rows=4)]*fused).fit(1))[0])
    def learner(n, k, cbs): return tensor_learner(tensor_dls(torch.randn(n, 6), torch.arange(n), bs=n, n_valid=1), nn.Linear(6, k), smooth(), cbs=cbs)
    assert sizes(False) >= 4*n*k and sizes(True) <= 4*6*k

def test_chunk_rows_are_those_of_the_loss():
    seen = Spy(lambda l: getattr(l.pred, 'chunk_rows', None), 'after_loss')
    for rows in (5, None): learner(cbs=[FusedHead(chunk_rows=rows), seen]).fit(1)
    assert set(seen.train()) == {5, 2**22//K}

# ---------------------------------------------------------------- what is left behind

@pytest.fixture(scope='module')
def digits(tmp_path_factory): return digits_dls(write_digits(tmp_path_factory.mktemp('fused'), 60), bs=16)

def hooks(m): return [len(o) for k, o in vars(m).items() if k.endswith(('hooks', 'hooks_with_kwargs', 'always_called'))]

def check_untouched(model, as_before):
    "Gives logits, in training too, and has what it had"
    assert [(set(vars(m)), hooks(m)) for m in model.modules()] == as_before
    x = torch.randn(5, 6)
    for mode in (True, False): assert type(model.train(mode)(x)) is torch.Tensor
    for copied in (pickle.loads(pickle.dumps(model)), deepcopy(model)): assert torch.equal(copied(x), model(x))

def state(model): return [(set(vars(m)), hooks(m)) for m in model.modules()]

def outcome(learn, **kwargs):
    "The type of what a fit raises, and the weights after it"
    try: fit_seeded(learn, 1, **kwargs)
    except (Exception, KeyboardInterrupt) as e: return type(e), weights(learn).clone()
    return None, weights(learn).clone()

@pytest.mark.parametrize('ex', FAULTS, ids=lambda o: o.__name__)
@pytest.mark.parametrize('order', [-99, math.inf])
def test_fault_of_another_callback(ex, order):
    "At every event, before FusedHead's own and after. One that is after it in before_batch is refused"
    for event in {*FAULTS[ex], *IN_BATCH} if ex in (RuntimeError, KeyboardInterrupt) else FAULTS[ex]:
        learn, ref = (learner(cbs=[FusedHead(chunk_rows=3)]*fused) for fused in (True, False))
        as_before = state(learn.model)
        (raised, w), (expected, v) = (outcome(o, cbs=Fault(event, ex, True, order)) for o in (learn, ref))
        check_untouched(learn.model, as_before)
        pickle.loads(pickle.dumps(learn)).validate()   # the last predictions, which are no logits, are pickled too
        if (event, order) == ('before_batch', math.inf): assert raised is ValueError
        else: assert raised is expected and distance(w, v) < 1e-5 and distance(outcome(learn)[1], outcome(ref)[1]) < 1e-5

class Once:
    "Raises `ex` in the second call in training"
    def __init__(self, ex): self.ex, self.calls = ex, 0
    def __call__(self, *args):
        self.calls += 1
        if self.calls == 2: raise self.ex('fault')

def in_backward(f, output):
    if output.requires_grad: output.register_hook(f)

class Loss(LabelSmoothingCrossEntropyFlat):
    "Raises before it looks at its arguments"
    def __call__(self, *args, **kwargs):
        if hasattr(self, 'fault'): self.fault()
        return super().__call__(*args, **kwargs)

PLACES = {'before the model': lambda l, f: l.model.register_forward_pre_hook(f), 'before the head': lambda l, f: l.model[0].register_forward_hook(f),
          'in the head': lambda l, f: l.model[2].register_forward_pre_hook(f), 'after the head': lambda l, f: l.model[2].register_forward_hook(f),
          'after the model': lambda l, f: l.model.register_forward_hook(f), 'in the loss': lambda l, f: setattr(l.loss_func, 'fault', f),
          'in backward': lambda l, f: l.model[1].register_forward_hook(lambda m, args, out: in_backward(f, out))}

CANCELS = [CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException]

@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt, *CANCELS], ids=lambda o: o.__name__)
@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('once', [False, True], ids=['added', 'for one fit'])
def test_fault_inside_the_model_and_the_loss(place, ex, once):
    "An error in a hook that comes before the model's forward leaves that till the next training or validation"
    found = []
    for fused in (True, False):
        learn, cbs = learner(Loss(.2)), [FusedHead(chunk_rows=3)]*fused
        if not once: learn.add_cbs(cbs)
        hook, as_before = PLACES[place](learn, Once(ex)), state(learn.model)
        found.append(outcome(learn, cbs=cbs*once))
        if place == 'before the model' and found[-1][0] and not once: learn.get_preds()
        if hook: hook.remove()
        check_untouched(learn.model, [(o, [0]*len(h)) for o, h in as_before])
        found[-1] += outcome(learn)
    (a, wa, b, vb), (c, wc, d, vd) = found
    assert (a, b) == (c, d) and distance(wa, wc) < 1e-5 and distance(vb, vd) < 1e-5

@pytest.mark.parametrize('place', ['no fault', 'after_pred', 'after_loss', 'before_backward'])
def test_all_that_a_Learner_is_for(place, digits, tmp_path):
    "After a training, and after Ctrl-C in one"
    learn = quiet(vision_learner(digits, tiny_arch, pretrained=False, metrics=accuracy, path=tmp_path)).to_smooth(fused_head=True)
    as_before = state(learn.model)
    if place != 'no fault': assert outcome(learn, cbs=Fault(place, KeyboardInterrupt))[0] is KeyboardInterrupt
    else: learn.fine_tune(1)
    assert state(learn.model) == as_before
    probs, y = learn.get_preds()
    assert learn.validate()[1] == pytest.approx((probs.argmax(1) == y).float().mean().item())
    item = digits.valid_ds.items[0]
    said = learn.predict(item)
    if place == 'no fault': deepcopy(learn).fit(1)   # else it has a tensor with a graph, the loss, which torch won't copy
    learn.lr_find(num_it=3, show_plot=False), learn.fit_temperature(), learn.eps_find(1, show_plot=False)
    learn.export('fused.pkl')
    loaded = quiet(load_learner(tmp_path/'fused.pkl'))
    assert distance(loaded.predict(item)[2], learn.predict(item)[2]) < 1e-6 and said[0] == loaded.predict(item)[0]
    loaded.dls = digits
    loaded.fit(1)

class Asks(Callback):
    "Something of the Learner, at `event` of the second batch; and puts back what is fastai's for the callback to put back"
    def __init__(self, event, ask, order):
        self.ask, self.order, self.asked = ask, order, False
        setattr(self, event, self._ask)
    def _ask(self):
        if self.asked or not self.training or self.learn.train_iter != 1: return
        self.asked, kept = True, dict(vars(self.learn))
        with no_random(): self.ask(self.learn)
        vars(self.learn).update(kept)
        self.learn.model.train()

ASKS = dict(validate=lambda l: l.validate(), get_preds=lambda l: l.get_preds(), of_training=lambda l: l.get_preds(0), temperature=lambda l: l.fit_temperature(),
            eps_find=lambda l: l.eps_find(1, show_plot=False), lr_find=lambda l: l.lr_find(num_it=3, show_plot=False, stop_div=False))

@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('ask', ASKS)
def test_asked_in_the_middle_of_a_batch(ask, tmp_path):
    "The training goes on as if nobody had asked"
    for event in IN_BATCH if ask != 'lr_find' else ['after_batch']:   # which trains, and the weights would have another version
        for order in [-99, 99]:
            learn, ref = (learner(path=tmp_path, cbs=[FusedHead(chunk_rows=3)]*fused) for fused in (True, False))
            as_before = state(learn.model)
            assert outcome(learn, cbs=Asks(event, ASKS[ask], order))[0] is None
            assert distance(weights(learn), weights(fit_seeded(ref, 1))) < 1e-5, (event, order)
            check_untouched(learn.model, as_before)

@pytest.mark.parametrize('head', [noop, lambda m: m[2]], ids=['found', 'given'])
@pytest.mark.parametrize('loss', [smooth, CrossEntropyLossFlat, LabelSmoothingBCEWithLogitsFlat])
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_eps_find(loss, head):
    "Trains copies, whose head is their own, and counts errors of each chunk"
    found = []
    for fused in (True, False):
        learn = learner(loss(), labels if 'BCE' in loss.__name__ else noop, mlp(k=3 if 'BCE' in loss.__name__ else K))
        if loss is CrossEntropyLossFlat: learn.to_smooth()
        if fused: learn.add_cb(FusedHead(None if head is noop else head(learn.model), chunk_rows=3))
        before = weights(learn).clone()
        found.append(learn.eps_find(2, show_plot=False))
        assert torch.equal(weights(learn), before)
    a, b = found
    assert str(a) == str(b) and a.eps == pytest.approx(b.eps, rel=1e-4)

def test_a_forward_of_the_model_s_own_stays():
    def forward(x, f): return f(x)
    learn = learner(cbs=FusedHead(chunk_rows=3))
    own = learn.model.forward = partial(forward, f=learn.model.forward)
    assert distance(weights(fit_seeded(learn)), weights(fit_seeded(learner()))) < 1e-5
    assert learn.model.forward is own
    assert outcome(learn, cbs=Fault('before_batch', RuntimeError))[0] is RuntimeError and learn.model.forward is own

def test_on_and_off():
    "For one fit, added and taken off, by to_smooth and to_hard"
    learn, ref, seen = learner(), learner(), Spy(lambda l: type(l.pred), 'after_loss')
    for cbs, there in (([FusedHead(chunk_rows=3)], True), ([], False)):
        for o, more in ((learn, cbs), (ref, [])): fit_seeded(o, 1, cbs=[*more, seen] if o is learn else [])
        assert set(seen.train()) == {LinearLogits if there else torch.Tensor} and not hasattr(learn, 'fused_head')
        seen.seen.clear()
    learn.recorder.train_metrics = True   # where there are none it means nothing
    learn.add_cb(FusedHead(learn.model[2])).fit(1)
    learn.remove_cb(FusedHead).fit(1)
    ref.fit(2)
    assert distance(weights(learn), weights(ref)) < 1e-5
    learn = flagged(fused_head=True)
    assert len(learn._grab_cbs(FusedHead)) == 1
    learn.to_smooth(.3, fused_head=True).to_smooth(prior='online')
    assert len(learn._grab_cbs(FusedHead)) == 1 and learn.online_label_smoothing
    assert not learn.to_hard()._grab_cbs(FusedHead) and type(learn.loss_func) is CrossEntropyLossFlat
    learn.fit(1)

# ---------------------------------------------------------------- what is refused

class Ends(nn.Module):
    "Computes on with the logits"
    def __init__(self, f):
        super().__init__()
        self.body, self.f = mlp(k=K), f
    def forward(self, x): return self.f(self.body(x))

class Beside(nn.Module):
    "Its last layer gives no predictions; `used`, it gives what is fed to the head"
    def __init__(self, used=True):
        super().__init__()
        self.head, self.last, self.used = nn.Linear(6, K), nn.Linear(6, 6), used
    def forward(self, x): return self.head(self.last(x).tanh() if self.used else x)

def conv(): return nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, K, 1), nn.Flatten())

class Own(nn.Linear):
    def forward(self, x): return 3*super().forward(x)

def patched_head():
    model = mlp(k=K)
    model[2].forward = partial(F.linear, weight=model[2].weight)
    return learner(model=model, cbs=[FusedHead(model[2])])

def wrapped(wrap):
    learn = learner(cbs=FusedHead())
    learn.model = wrap(learn.model) or learn.model
    return learn

def attention_matrix():
    "(bs,4,4) logits, whose classes are along axis 1: as many rows as there would be along the last"
    x = torch.randn(32, 4, 6)
    return tensor_learner(tensor_dls(x, x[..., 0].argsort(1)), nn.Linear(6, 4), smooth(axis=1), cbs=FusedHead())

def with_train_metrics():
    learn = learner(cbs=FusedHead(), metrics=[accuracy, NLL()])
    learn.recorder.train_metrics = True
    return learn

REFUSED = dict(   # before anything is trained
    no_linear=(lambda: learner(model=conv(), cbs=FusedHead()), TypeError, 'needs an nn.Linear that gives the logits, this Sequential has none'),
    own_forward=(lambda: learner(model=Own(6, K), cbs=FusedHead()), TypeError, 'this Own has none'),
    patched_head=(patched_head, ValueError, r'head, Linear\(in_features=12, out_features=4, bias=True\), is none of the 1 nn.Linear'),
    another_model_s=(lambda: learner(cbs=FusedHead(mlp(k=K)[2])), ValueError, 'is none of the 2 nn.Linear of this model'),
    fastai_loss=(lambda: learner(CrossEntropyLossFlat(), cbs=FusedHead()), TypeError, r'this CrossEntropyLossFlat is not: call learn.to_smooth\(\)'),
    fastai_smooth_loss=(lambda: learner(fastai.losses.LabelSmoothingCrossEntropyFlat(), cbs=FusedHead()), TypeError, 'which this LabelSmoothingCrossEntropyFlat is not'),
    function=(lambda: learner(F.cross_entropy, cbs=FusedHead()), TypeError, 'this cross_entropy is not'),
    labels=(lambda: learner(BCEWithLogitsLossFlat(), cbs=FusedHead()), TypeError, 'this BCEWithLogitsLossFlat is not'),
    train_metrics=(with_train_metrics, ValueError, r'training \(accuracy, nll_loss\): set learn.recorder.train_metrics = False'),
    two=(lambda: learner(cbs=[FusedHead(), FusedHead(chunk_rows=3)]), ValueError, 'FusedHead has to be the last callback .* and FusedHead is: take it off'),
    compiled=(lambda: wrapped(partial(torch.compile, backend='eager')), TypeError, 'which torch.compile has compiled'),
    compiled_in_place=(lambda: wrapped(lambda m: m.compile(backend='eager')), TypeError, 'which torch.compile has compiled'),
    compiled_head=(lambda: wrapped(lambda m: m[2].compile(backend='eager')), TypeError, 'which torch.compile has compiled'))

@pytest.mark.parametrize('name', REFUSED)
def test_refused_before_training(name):
    make, error, match = REFUSED[name]
    learn = make()
    learn.create_opt()   # as a fit does, before all callbacks
    before = {k: v for k, v in vars(learn).items() if k not in ('loss', 'epoch', 'train_iter', 'pct_train', 'n_epoch')}   # which fastai has set by then
    as_before, w, cbs = state(learn.model), weights(learn).clone(), list(learn.cbs)
    with pytest.raises(error, match=match): learn.fit(1)
    assert all(vars(learn)[k] is v for k, v in before.items()) and list(learn.cbs) == cbs
    assert state(learn.model) == as_before and torch.equal(weights(learn), w)
    learn.remove_cb(FusedHead).recorder.train_metrics = False
    if name not in ('labels', 'data_parallel'): learn.fit(1)

IN_TRAINING = dict(
    softmax=(lambda: Ends(lambda x: x.softmax(-1)), RuntimeError, '^softmax needs logits that are not there'),
    view=(lambda: Ends(lambda x: x.view(-1, K)), RuntimeError, '^view needs logits'),
    add=(lambda: Ends(lambda x: 1 + x), RuntimeError, 'add.*needs logits that are not there.*FusedHead'),
    index=(lambda: Ends(lambda x: x[:, :K]), RuntimeError, '__getitem__ needs logits'),
    not_the_head=(Beside, RuntimeError, 'tanh needs logits'),
    checkpointed=(lambda: Checkpointed(True, use_reentrant=True), TypeError, 'are no logits that .* made with autograd on'),
    unused=(lambda: Beside(False), TypeError,
            r'a Tensor, are no logits that Linear\(in_features=6, out_features=6, bias=True\) made with autograd on: name the layer'))

@pytest.mark.parametrize('name', IN_TRAINING)
def test_refused_in_the_first_batch(name):
    make, error, match = IN_TRAINING[name]
    learn = learner(model=make(), cbs=FusedHead())
    as_before, w = state(learn.model), weights(learn).clone()
    with pytest.raises(error, match=match): learn.fit(1)
    assert state(learn.model) == as_before and torch.equal(weights(learn), w)
    if name in ('not_the_head', 'unused'): assert outcome(learner(model=make(), cbs=FusedHead(learn.model.head)))[0] is ValueError
    learn.remove_cb(FusedHead).fit(1)

def test_classes_along_another_axis_are_refused():
    with pytest.raises(ValueError, match='classes along the last axis of the logits, axis=-1; the loss has axis=1'): attention_matrix().fit(1)
    prior = LabelSmoothingBCEWithLogitsFlat(prior=torch.rand(5))  # of labels along axis 1 of images
    x = torch.randn(8, 5, 4, 6)
    pixels = tensor_learner(tensor_dls(x, (x[..., :5] > 0).float(), bs=4, n_valid=4), nn.Linear(6, 5), prior, cbs=FusedHead())
    raises(ValueError, 'along the last axis .* the loss has axis=1', lambda: pixels.fit(1))
    unflattened = words(LabelSmoothingCrossEntropy(axis=-1)).add_cb(FusedHead())
    raises(ValueError, 'use LabelSmoothingCrossEntropyFlat, with flatten=True', lambda: unflattened.fit(1))

READS = dict(argmax=lambda p: p.argmax(-1), item=lambda p: p.sum().item(), detach=lambda p: p.detach(), data=lambda p: p.data, numpy=np.asarray, rows=lambda p: p[0], lists=list,
             differs=lambda p: p != p, same=lambda p: p == 1, above=lambda p: p > 0, sum=lambda p: p + p)

@pytest.mark.parametrize('event', IN_BATCH[1:])
@pytest.mark.parametrize('read', READS)
def test_a_callback_that_reads_the_predictions(event, read):
    "Is named; their shape may be read"
    learn = learner(cbs=FusedHead())
    learn.fit(1, cbs=Spy(lambda l: (l.pred.shape, len(l.pred), l.pred.dtype, l.pred.device, f'{l.pred!r}'), event))
    as_before = state(learn.model)
    reader = Spy(lambda l: READS[read](l.pred) if l.training else 0, event)
    with pytest.raises(RuntimeError, match=f'`Spy` when calling event `{event}`:\n\t.*needs logits that are not there'): learn.fit(1, cbs=reader)
    check_untouched(learn.model, as_before)

def test_arguments():
    for bad in ('2', nn.Conv1d(1, 1, 1), mlp()): raises(TypeError, 'head must be an nn.Linear', lambda: FusedHead(bad))
    raises(ValueError, 'chunk_rows', lambda: FusedHead(chunk_rows=0))
    learn = learner(BCEWithLogitsLossFlat(), labels, mlp(k=3))
    before, cbs = dict(vars(learn)), list(learn.cbs)
    raises(ValueError, 'fused_head is for losses of one label a row', lambda: learn.to_smooth(fused_head=True))
    other = learner(CrossEntropyLossFlat(), model=conv())
    raises(TypeError, 'has none', lambda: other.to_smooth(fused_head=True))
    assert vars(learn) == before and list(learn.cbs) == cbs and type(other.loss_func) is CrossEntropyLossFlat

    for bad in ('no', 256): raises(TypeError, 'head must be an nn.Linear, got', lambda: learner(CrossEntropyLossFlat()).to_smooth(fused_head=bad))

def test_a_given_layer_and_off_again():
    learn = learner(CrossEntropyLossFlat(), model=mlp(k=K)).to_smooth(.2, fused_head=True)
    learn.to_smooth(.2, fused_head=learn.model[-1])
    assert [cb.head for cb in learn._grab_cbs(FusedHead)] == [learn.model[-1]]
    assert learn.to_smooth(.1)._grab_cbs(FusedHead) and not learn.to_hard()._grab_cbs(FusedHead)
    own = learner(smooth(), cbs=FusedHead())  # smooths by itself: there is nothing that to_hard could turn off
    raises(ValueError, 'no smoothing to turn off', own.to_hard)
    assert own._grab_cbs(FusedHead)

def raises(error, match, f):
    with pytest.raises(error, match=match): f()

