"""Online label smoothing: S against a loop over rows in float64, where it is kept, and what it leaves behind.

It trains beside fastai's callbacks in test_callbacks_compose.py, in Learners of every type in test_learner_types.py, and in two processes in
test_distributed.py."""
import pytest
from helpers import *
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastai_smooth.all import *
from fastai_smooth import callback, online
from fastai_smooth.smoothed import found_loss

for name in [n for n in globals() if n.startswith('test')]: del globals()[name]  # fastcore's test_eq and friends

K = 4

def learner(loss=None, k=K, seed=0, dls=None, **kwargs):
    return tensor_learner(dls or single_dls(k=k, seed=seed), mlp(k=k, seed=seed), ifnone(loss, CrossEntropyLossFlat()), **kwargs)

def soft_of(seen, k=K, ignore_index=-100):
    "S, from predictions (..., K) and class indices (...) of an epoch, row after row"
    right = [[] for _ in range(k)]
    for pred, y in seen:
        for x, i in zip(pred.double().reshape(-1, k).tolist(), y.flatten().tolist()):
            if i == ignore_index or max(range(k), key=x.__getitem__) != i: continue
            e = [math.exp(v-max(x)) for v in x]
            right[i].append([v/sum(e) for v in e])
    return torch.tensor([[sum(col)/len(rows) for col in zip(*rows)] if rows else [1/k]*k for rows in right])

def spy(): return Spy(lambda l: (l.pred.detach().clone(), l.y.clone(), l.loss.detach().clone()), 'after_batch')
def close(a, b, tol=1e-5): torch.testing.assert_close(a, b, atol=tol, rtol=0)

def masks_dls(ignore_index):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 5, 6, generator=g)
    y = (x.sum(1) > 0).long() + 2*(x[:, 0] > .5)
    y[:, 0] = ignore_index
    return tensor_dls(x, y, bs=6, n_valid=6)

def conv(): return torch.manual_seed(0) and nn.Conv2d(3, K, 1)

LOSSES = {
    'fastai': lambda: learner(), 'torch': lambda: learner(nn.CrossEntropyLoss()), 'function': lambda: learner(F.cross_entropy),
    'smoothed already': lambda: learner(LabelSmoothingCrossEntropyFlat(.1)),
    'weights': lambda: learner(CrossEntropyLossFlat(weight=torch.tensor([.5, 1., 2., 1.5]))),
    'ignored': lambda: learner(CrossEntropyLossFlat(ignore_index=1)),
    'masks': lambda: tensor_learner(masks_dls(255), conv(), CrossEntropyLossFlat(axis=1, ignore_index=255)),
    'masks, torch': lambda: tensor_learner(masks_dls(-100), conv(), nn.CrossEntropyLoss())}

@pytest.mark.parametrize('eps', [None, .9])
@pytest.mark.parametrize('name', LOSSES)
def test_the_epoch_before_teaches_the_next(name, eps):
    "S, and the loss of each batch, by the formula; validation is that of the hard loss"
    learn, batches = LOSSES[name](), spy()
    hard = learn.loss_func
    learn.to_smooth(eps, prior='online').fit(3, cbs=batches)
    loss, cb = learn.loss_func.func, learn.online_label_smoothing
    axis, train = 1 if 'masks' in name else -1, [(p.movedim(1, -1) if 'masks' in name else p, y, l) for p, y, l in batches.train()]
    n, soft = len(train)//3, torch.full((K, K), 1/K)
    for epoch in range(3):
        now = train[epoch*n:(epoch+1)*n]
        for p, y, l in now:
            keep = y != loss.ignore_index
            w = torch.ones(K) if loss.weight is None else loss.weight
            q = ((1-cb.eps)*F.one_hot(y[keep], K) + cb.eps*soft[y[keep]])*w
            close(l, (-(q*p[keep].log_softmax(-1)).sum()/w[y[keep]].sum()).to(l.dtype))
        soft = soft_of([o[:2] for o in now], ignore_index=loss.ignore_index).float()
    close(cb.prior, soft)
    assert cb.eps == ifnone(eps, .5) and (soft.diagonal() > .3).any() and axis in (1, -1)
    for p, y, l in batches.valid(): close(l, hard(p, y) if 'already' not in name else F.cross_entropy(p, y))

@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), k=st.integers(1, 7), seed=st.integers(0, 99), chunk=st.sampled_from([1, 5, 2**22]), junk=st.booleans(),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_sums_of_any_rows(n, k, seed, chunk, junk, dtype):
    "In chunks of any size; rows of nan, and ignored ones, are not right; masked classes have nothing"
    g = torch.Generator().manual_seed(seed)
    x, y = (3*torch.randn(n, k, generator=g)).to(dtype), torch.randint(k, (n,), generator=g)
    if k > 2: x[::3, 1] = -math.inf
    if junk: x[n//2], y[n//3] = math.nan, -100
    cb = OnlineLabelSmoothing()
    keep = y != -100
    with pytest.MonkeyPatch.context() as m:
        m.setattr(callback, '_chunk', chunk)
        cb._add(x, y.where(keep, 0), keep)
    finite = [(a, b) for a, b in zip(x, y) if not a.isnan().any()]
    expected, counts = soft_of(finite, k), cb._counts[:, None]
    close(torch.where(counts > 0, cb._sums/counts, 1/k), expected.double(), 1e-6)

def test_millions_of_rows_are_not_lost():
    "A float32 sum stays where it is from 2**24 on"
    cb = OnlineLabelSmoothing()
    cb._add(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool))
    cb._sums += 2**25; cb._counts += 2**25
    for _ in range(3): cb._add(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool))
    assert cb._sums.item() == cb._counts.item() == 2**25 + 4

def test_nothing_is_looked_at_in_a_step():
    "So that a GPU need not wait: a fake tensor has no values, and to ask it for one is an error"
    with FakeTensorMode():
        cb = OnlineLabelSmoothing()
        for _ in range(2): cb._add(torch.zeros(6, 5), torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.bool))
        assert cb._sums.shape == (5, 5)

# ---------------------------------------------------------------- where it is kept, and how it goes

def test_fits_go_on_where_the_last_one_was():
    "One fit of three epochs, three of one; `fine_tune`'s frozen epoch teaches the next; another eps; to_hard forgets"
    whole, parts = (fit_seeded(learner().to_smooth(prior='online'), n) for n in (3, 1))
    for _ in range(2): parts.fit(1)
    assert torch.equal(weights(whole), weights(parts)) and torch.equal(whole.online_label_smoothing.prior, parts.online_label_smoothing.prior)
    kept = parts.online_label_smoothing.prior
    assert parts.to_smooth(.7, prior='online').online_label_smoothing.prior is kept and parts.online_label_smoothing.eps == parts.loss_func.eps == .7
    batches = spy()
    parts.fit(1, cbs=batches)
    p, y, l = batches.train()[0]
    close(l, -((.3*F.one_hot(y, K) + .7*kept[y])*p.log_softmax(1)).sum(1).mean())
    assert parts.to_hard().to_smooth(prior='online').online_label_smoothing.prior is None

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy], ids=['fastai', 'torch', 'function'])
def test_the_callback_alone_and_taken_off(loss):
    "Added to a Learner, for one fit, and as to_smooth adds it: the same training; the loss is back, the very object"
    alone, once, word = learner(loss, cbs=OnlineLabelSmoothing(.3)), learner(loss), learner(loss).to_smooth(.3, prior='online')
    alone.validate()
    assert alone.loss_func is loss  # as nothing was trained
    for learn, cbs in ((alone, []), (once, [OnlineLabelSmoothing(.3)]), (word, [])): fit_seeded(learn, 3, cbs=cbs)
    assert torch.equal(weights(alone), weights(word)) and torch.equal(weights(once), weights(word))
    assert once.loss_func is loss and not hasattr(once, 'online_label_smoothing')
    assert alone.loss_func is not loss and alone.remove_cb(OnlineLabelSmoothing).loss_func is loss
    assert word.to_hard().loss_func is loss and not hasattr(word, 'online_label_smoothing')
    assert not torch.equal(weights(word), weights(fit_seeded(learner(loss).to_smooth(.3), 3)))

def test_smoothing_that_was_there_before_comes_back():
    "After one fit with the callback, and when it is taken off; to_hard goes all the way back"
    learn = learner(label_smoothing=.1)
    before, hard = learn.loss_func, learn.loss_func.hard
    learn.fit(1, cbs=OnlineLabelSmoothing(.6))
    assert learn.loss_func is before and learn.loss_func.eps == .1
    cb = OnlineLabelSmoothing(.6)
    learn.add_cb(cb).fit(1)
    learn.loss_func.eps = .8
    assert learn.remove_cb(cb).loss_func is before
    learn.add_cb(cb).fit(1)
    assert learn.loss_func.eps == cb.eps == .8 and learn.to_hard().loss_func is hard

def test_two_callbacks_are_refused():
    learn = learner().to_smooth(.1, prior='online')
    learn.fit(1)
    loss = learn.loss_func
    with pytest.raises(ValueError, match='two OnlineLabelSmoothings'): learn.fit(1, cbs=OnlineLabelSmoothing(.6))
    assert learn.loss_func is loss and loss.eps == .1
    learn.fit(1)

def test_flag():
    learn = learner(label_smoothing='online')
    assert learn.online_label_smoothing.eps == learn.loss_func.eps == .5 and 'online' in repr(learn.loss_func)
    with pytest.raises(TypeError, match="label_smoothing='onlin': eps must be a number"): learner(label_smoothing='onlin')
    class Own(Learner):
        "Sets its loss when the flag has been carried out"
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss_func = CrossEntropyLossFlat()
    learn = quiet(Own(single_dls(), mlp(k=K), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1, label_smoothing='online'))
    assert torch.equal(weights(fit_seeded(learn)), weights(fit_seeded(learner(label_smoothing='online'))))

def test_eps_is_that_of_the_loss():
    cb = OnlineLabelSmoothing(.3)
    cb.eps = .4
    learn = learner(cbs=cb)
    learn.fit(1)
    assert cb.eps == learn.loss_func.eps == .4
    cb.eps = .6
    assert learn.loss_func.eps == .6 and repr(cb) == 'OnlineLabelSmoothing(eps=0.6)'
    learn.loss_func.eps = .2
    assert cb.eps == .2
    with pytest.raises(ValueError, match='eps must be in'): cb.eps = 1.5
    assert cb.eps == .2
    by_class = learner().to_smooth(torch.linspace(0, .9, K), prior='online')
    fit_seeded(by_class, 2)
    assert not torch.equal(weights(by_class), weights(fit_seeded(learner().to_smooth(.45, prior='online'))))

@pytest.mark.parametrize('share', [.8, .2])
@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_of_two_mixed_inputs_the_larger_part_is_the_label(mix, share):
    class Mixed(mix):
        "Always with the same share of the first one, and the rows in reverse"
        def before_batch(self):
            self.lam, self.yb1 = torch.full((len(self.y) if mix is MixUp else 1,), share), (self.y.flip(0),)
    learn, batches = learner(cbs=Mixed()).to_smooth(prior='online'), spy()
    learn.fit(1, cbs=batches)
    of_larger = [(p, y if share > .5 else y.flip(0)) for p, y, _ in batches.train()]
    close(learn.online_label_smoothing.prior, soft_of(of_larger).float())

def test_beside_global_mean():
    learn = learner(F.cross_entropy, cbs=[GlobalMean(), OnlineLabelSmoothing()])
    assert torch.equal(weights(fit_seeded(learn)), weights(fit_seeded(learner().to_smooth(prior='online'))))

def test_another_loss_in_between_is_smoothed_too():
    learn = learner().to_smooth(prior='online')
    learn.fit(1)
    soft, mine = learn.online_label_smoothing.prior, CrossEntropyLossFlat(weight=torch.arange(1., K+1))
    learn.loss_func = mine
    seen = Spy(lambda l: l.loss_func.func.prior, 'after_batch')
    learn.fit(1, cbs=seen)
    assert seen.train()[0] is soft and torch.equal(learn.loss_func.func.weight, mine.func.weight) and learn.to_hard().loss_func is mine

def test_temperature_goes_along():
    learn = learner().to_smooth(prior='online')
    learn.fit(2)
    learn.loss_func = tempered(learn.loss_func, 2.)
    learn.fit(1)
    assert learn.temperature == 2 and learn.loss_func.func.prior is learn.online_label_smoothing.prior
    assert learn.to_hard().temperature == 2

# ---------------------------------------------------------------- interrupts, and others that look or train in between

class ValidateInTraining(Callback):
    "Looks at the validation data in the middle of an epoch, and after it; fastai leaves it to such a callback to put back what trains"
    order, run_valid = -99, False
    def validate(self):
        kept = {k: getattr(self.learn, k) for k in ('dl', 'iter', 'n_iter', 'xb', 'yb', 'training', 'pct_train', 'train_iter')}
        self.learn.validate(), self.learn.get_preds()
        for k, v in kept.items(): setattr(self.learn, k, v)
        self.model.train()
    def after_batch(self):
        if self.learn.train_iter == 2: self.validate()
    def after_train(self): self.validate()

def test_validation_in_the_middle_of_an_epoch():
    a, b = learner().to_smooth(prior='online'), learner(cbs=ValidateInTraining()).to_smooth(prior='online')
    fit_seeded(a, 3), fit_seeded(b, 3)
    assert torch.equal(weights(a), weights(b)) and torch.equal(a.online_label_smoothing.prior, b.online_label_smoothing.prior)

def test_after_ctrl_c_S_is_that_of_the_last_whole_epoch():
    learn = learner().to_smooth(prior='online')
    learn.fit(1)
    soft = learn.online_label_smoothing.prior
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=RaiseAt(KeyboardInterrupt()))
    assert learn.online_label_smoothing.prior is soft
    batches = spy()
    learn.fit(1, cbs=batches)
    close(learn.online_label_smoothing.prior, soft_of([o[:2] for o in batches.train()]).float())

def test_lr_find_and_eps_find_leave_no_trace():
    learn = learner().to_smooth(.6, prior='online')
    learn.fit(1)
    loss, cb, soft = learn.loss_func, learn.online_label_smoothing, learn.online_label_smoothing.prior.clone()
    before = weights(learn).clone()
    learn.lr_find(num_it=12, stop_div=False, show_plot=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.eps_find(4, full=True, epss=[.5], show_plot=False)
    with pytest.raises(ValueError, match='compare pilots, by full=True'): learn.eps_find(4, show_plot=False)
    assert learn.loss_func is loss and learn.online_label_smoothing is cb and torch.equal(cb.prior, soft) and cb.eps == .6
    assert torch.equal(weights(learn), before) and cb._sums is None

@pytest.mark.parametrize('way', ['export', 'deepcopy'])
def test_a_copy_goes_on_by_itself(way, tmp_path):
    learn = learner(path=tmp_path).to_smooth(.4, prior='online')
    fit_seeded(learn, 2)
    if way == 'export':
        learn.dls.new_empty = partial(copy, learn.dls) # loaders of lists have none
        learn.export('l.pkl')
        other = load_learner(tmp_path/'l.pkl')
        other.dls = learn.dls
    else: other = deepcopy(learn)
    assert torch.equal(other.online_label_smoothing.prior, learn.online_label_smoothing.prior) and other.loss_func is not learn.loss_func
    before = learn.online_label_smoothing.prior.clone()
    other.fit(1)
    assert torch.equal(learn.online_label_smoothing.prior, before) and not torch.equal(other.online_label_smoothing.prior, before)
    assert other.online_label_smoothing.soft_labels.shape == (K, K) and type(other.to_hard().loss_func) is CrossEntropyLossFlat

def test_what_was_learnt_of_other_classes_is_forgotten():
    cb = OnlineLabelSmoothing()
    learner(dls=single_dls(k=K), cbs=cb).fit(1)
    dls = single_dls(k=6)
    dls.c = 6
    with pytest.warns(UserWarning, match='learnt of 4 classes is forgotten: now there are 6'): learner(k=6, dls=dls, cbs=cb).fit(1)
    assert cb.prior.shape == (6, 6)

@pytest.mark.parametrize('ex', [CancelEpochException, CancelFitException])
def test_a_cancelled_epoch_leaves_no_sums(ex):
    learn = learner().to_smooth(prior='online')
    learn.fit(1, cbs=RaiseAt(ex()))
    assert learn.online_label_smoothing._sums is None and learn.online_label_smoothing.prior is None

# ---------------------------------------------------------------- what is refused

def refused(make, error, match):
    "It says so, and the Learner is as it was"
    learn = make()
    loss, cbs, before = learn.loss_func, list(learn.cbs), weights(learn).clone()
    with pytest.raises(error, match=match): learn.to_smooth(prior='online').fit(1)
    assert torch.equal(weights(learn), before)
    if learn.loss_func is not loss: learn.to_hard()  # it was the targets that were refused
    assert learn.loss_func is loss and list(learn.cbs) == cbs

def test_what_is_not_one_class_a_row_is_refused():
    labels = learner(BCEWithLogitsLossFlat(), dls=multi_dls(k=K), cbs=OnlineLabelSmoothing())
    with pytest.raises(TypeError, match=r"MultiLabelSmoothingCallback\(prior='online'\), which smooths such labels"): labels.fit(1)
    refused(lambda: learner(MSELossFlat()), TypeError, 'regression')
    refused(lambda: learner(dls=tensor_dls(torch.randn(32, 6), torch.full((32, K), 1/K))), ValueError, 'needs class indices as targets, got soft')
    refused(lambda: learner(LabelSmoothingCrossEntropyFlat(.1, multi_hot=True)), ValueError, 'multi_hot=True')
    with pytest.raises(ValueError, match="spread='others'"): learner().to_smooth(prior='online', spread='others')
    with pytest.raises(ValueError, match='smooth_valid=True'): learner().to_smooth(prior='online', smooth_valid=True)
    with pytest.raises(ValueError, match="'train' or 'online', got 'onlin'"): learner().to_smooth(prior='onlin')
    with pytest.raises(ValueError, match='eps must be in'): OnlineLabelSmoothing(2)

def test_too_many_classes(monkeypatch):
    "Said before anything is trained, where the data know how many there are, else at the first batch"
    monkeypatch.setattr(online, 'max_classes', K-1)
    refused(learner, ValueError, rf"for K={K} classes.* K={K-1}: use to_smooth\(prior='train'\)")
    dls = single_dls(k=K)
    dls.c = K
    learn = learner(dls=dls)
    with pytest.raises(ValueError, match="prior='train'"): learn.to_smooth(prior='online')
    assert type(learn.loss_func) is CrossEntropyLossFlat and not hasattr(learn, 'online_label_smoothing')

# ---------------------------------------------------------------- shown

def test_soft_labels_by_name_and_their_picture():
    learn = learner().to_smooth(prior='online')
    cb = learn.online_label_smoothing
    assert cb.soft_labels is None
    with pytest.raises(ValueError, match='after the first epoch'): cb.plot_soft_labels()
    with pytest.raises(ValueError, match='max_n'): cb.plot_soft_labels(max_n=0)
    learn.fit(1)
    assert list(cb.soft_labels.index) == list(cb.soft_labels.columns) == list('0123')
    learn.dls.vocab = ['ant', 'bee', 'cat', 'dog']
    table = cb.soft_labels
    assert list(table.index) == list(table.columns) == ['ant', 'bee', 'cat', 'dog'] and np.allclose(table.sum(1), 1)
    np.testing.assert_array_equal(table, cb.prior)
    ax = cb.plot_soft_labels(return_fig=True).axes[0]
    shown = ax.images[0].get_array()
    assert [o.get_text() for o in ax.get_yticklabels()] == ['ant', 'bee', 'cat', 'dog'] and np.ma.getmaskarray(shown).diagonal().all()
    np.testing.assert_allclose(shown.compressed(), table.to_numpy()[~np.eye(K, dtype=bool)])
    shared = table.mask(np.eye(K, dtype=bool)).stack()
    row, other = shared.idxmax()
    assert ax.get_title(loc='left') == f'{row} looks most like {other}: {shared.max():.1%}' and '%' in ax.figure.axes[1].get_ylabel()
    assert ax.get_xlabel() == 'other class' and ax.get_ylabel() == 'true class'
    assert cb.plot_soft_labels(max_n=1, return_fig=True).axes[0].get_title(loc='left') == ''
    plt.close('all')

@pytest.mark.parametrize('make', [learner, lambda: labelled()])
def test_soft_labels_of_a_callback_that_was_taken_off(make):
    "By number, as names are those of a Learner's data"
    learn = make().to_smooth(prior='online')
    learn.fit(1)
    cb = first(o for o in learn.cbs if hasattr(type(o), 'soft_labels'))
    before = cb.soft_labels.to_numpy()
    learn.to_hard()
    assert list(cb.soft_labels.index) == list(map(str, range(K))) and (cb.soft_labels.to_numpy() == before).all()

def test_of_many_classes_those_that_share_most_are_shown():
    learn = learner().to_smooth(prior='online')
    soft = torch.eye(6)
    soft[1, 4] = soft[4, 1] = .3
    soft[2, 5] = .2
    learn.online_label_smoothing.prior = soft/soft.sum(1, keepdim=True)
    ax = learn.online_label_smoothing.plot_soft_labels(max_n=2, return_fig=True).axes[0]
    assert [o.get_text() for o in ax.get_yticklabels()] == [o.get_text() for o in ax.get_xticklabels()] == ['1', '4']
    assert len(learn.online_label_smoothing.plot_soft_labels(return_fig=True).axes[0].get_yticklabels()) == 6

# ---------------------------------------------------------------- several labels: each to what the model gives it, where it is there and where not

def labelled(loss=None, k=K, seed=0, dls=None, model=None, **kwargs):
    return tensor_learner(dls or multi_dls(k=k, seed=seed), model or mlp(k=k, seed=seed), ifnone(loss, BCEWithLogitsLossFlat()), **kwargs)

def labels_soft(seen, axis=-1):
    "S [2,K], from predictions and labels of an epoch, number after number; `axis` is that of the labels, None where there is one"
    right = defaultdict(list)
    for pred, y in seen:
        pred, y = (o.double().reshape(pred.shape) for o in (pred, y))
        pred, y = (o.unsqueeze(-1) if axis is None else o.movedim(axis, -1) for o in (pred, y))
        k = pred.shape[-1]
        for xs, ys in zip(pred.reshape(-1, k).tolist(), y.reshape(-1, k).tolist()):
            for j, (x, t) in enumerate(zip(xs, ys)):
                if t > .5 and x > 0 or t <= .5 and x < 0: right[int(t > .5), j].append(1/(1+math.exp(-x)))
    return torch.tensor([[sum(o)/len(o) if (o := right[there, j]) else .5 for j in range(k)] for there in (0, 1)]).double()

def smoothed_labels(y, soft, eps, axis=-1):
    "q = (1-2 eps) y + 2 eps S of the label; of a soft label S is in between"
    s = [o if axis is None else o.view([-1 if d == axis % y.ndim else 1 for d in range(y.ndim)]) for o in soft]
    return (1-2*eps)*y + 2*eps*(y*s[1] + (1-y)*s[0])

def label_spy(): return Spy(lambda l: (l.pred.detach().clone(), l.yb[0].clone(), l.loss.detach().clone()), 'after_batch', order=99)

def mask_labels(*shape, axis=1):
    "Images (24,3,5,6) whose channels tell the labels"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 5, 6, generator=g)
    y = (x + .5*torch.randn(x.shape, generator=g) > .3).float()
    return tensor_dls(x, y.movedim(1, axis) if shape != (24, 5, 6) else y[:, 0], bs=6, n_valid=6)

class Last(nn.Module):
    "Of images: labels last, or one label"
    def __init__(self, of): super().__init__(); self.conv, self.of = nn.Conv2d(3, 3, 1), of
    def forward(self, x): return self.of(self.conv(x))

def seeded(make): return torch.manual_seed(0) and make()
def unflattened(pred, y): return F.binary_cross_entropy_with_logits(pred, y)
def one_label(dim, **kwargs):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=g)
    y = (x[:, :1] + .5*torch.randn(64, 1, generator=g) > 0).float()
    return labelled(dls=tensor_dls(x, y if dim == 2 else y[:, 0]), **kwargs)

LABELLED = {   # name -> learner, axis of the labels
    'fastai': (lambda: labelled(), -1), 'torch': (lambda: labelled(nn.BCEWithLogitsLoss()), -1), 'own': (lambda: labelled(unflattened), -1),
    'pos_weight': (lambda: labelled(BCEWithLogitsLossFlat(pos_weight=torch.tensor([.5, 1., 2., 3.]))), -1),
    'integers': (lambda: labelled(dls=multi_dls(k=K, dtype=torch.int64)), -1),
    'masks': (lambda: labelled(dls=mask_labels(), model=seeded(lambda: nn.Conv2d(3, 3, 1))), 1),
    'labels last': (lambda: labelled(BCEWithLogitsLossFlat(axis=3), dls=mask_labels(axis=3), model=seeded(lambda: Last(lambda o: o.movedim(1, 3)))), 3),
    'one mask': (lambda: labelled(dls=mask_labels(24, 5, 6), model=seeded(lambda: Last(lambda o: o[:, 0]))), None),
    'one label': (lambda: one_label(2, k=1), -1), 'one label, flat targets': (lambda: one_label(1, k=1), -1),
    'one event': (lambda: one_label(1, model=seeded(lambda: nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)))), None)}

@pytest.mark.parametrize('eps', [None, .4])
@pytest.mark.parametrize('name', LABELLED)
def test_the_epoch_before_teaches_labels_of_the_next(name, eps):
    "S, and the loss of each batch, by the formula; validation is that of the hard loss"
    (make, axis), batches = LABELLED[name], label_spy()
    learn, cb = make(), MultiLabelSmoothingCallback(eps, 'online')
    hard = learn.add_cb(cb).loss_func
    learn.fit(3, cbs=batches)
    weight = torch.tensor([.5, 1., 2., 3.]).double() if name == 'pos_weight' else None
    train, soft = batches.train(), torch.full((2, 99), .5).double()
    n, k = len(train)//3, cb.learnt.shape[1]
    soft = soft[:, :k]
    for epoch in range(3):
        now = train[epoch*n:(epoch+1)*n]
        for p, y, l in now:
            x = p.double()
            q = smoothed_labels(y.double().reshape(x.shape), soft, cb.eps, axis)
            close(l, F.binary_cross_entropy_with_logits(x, q, pos_weight=weight).to(l.dtype))
        soft = labels_soft([o[:2] for o in now], axis)
    close(cb.learnt, soft.float())
    assert cb.eps == ifnone(eps, .25) and (soft[0] < .49).any() and (soft[1] > .51).any() and cb.learnt.dtype == torch.float32
    for p, y, l in batches.valid(): close(l, hard(p, y) if name != 'own' else unflattened(p, y))
    assert list(cb.soft_labels.columns) == ['not there', 'there'] and list(cb.soft_labels.index) == list(map(str, range(k)))
    np.testing.assert_array_equal(cb.soft_labels, cb.learnt.T)

@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), k=st.integers(0, 7), seed=st.integers(0, 99), chunk=st.sampled_from([1, 5, 2**22]), junk=st.booleans(),
       labels=st.sampled_from([torch.float32, torch.float64, torch.uint8, torch.bool, torch.int64]),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_sums_of_any_labels(n, k, seed, chunk, junk, labels, dtype):
    "In chunks of any size; predictions of nan and unknown labels count nowhere, of soft labels the larger part; (N,) where k is 0"
    g, shape = torch.Generator().manual_seed(seed), (n, k) if k else (n,)
    x, y = (3*torch.randn(shape, generator=g)).to(dtype), torch.rand(shape, generator=g)
    y = y.to(labels) if labels.is_floating_point else (y < .5).to(labels)
    if junk:
        x[n//2] = math.nan
        x.flatten()[0], x.flatten()[-1] = math.inf, -math.inf
        if labels.is_floating_point: y[n//3] = math.nan
    cb = MultiLabelSmoothingCallback(prior='online')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(callback, '_chunk', chunk)
        cb._add(x, y)
    expected = labels_soft([(x.clamp(-700, 700), y)], -1 if k else None)
    close(torch.where(cb._counts > 0, cb._sums/cb._counts, .5), expected, 1e-6)
    counts = [((y <= .5) & (x < 0)).reshape(n, -1).sum(0), ((y > .5) & (x > 0)).reshape(n, -1).sum(0)]
    assert cb._counts.tolist() == torch.stack(counts).tolist() and cb._sums.dtype == torch.float64

@pytest.mark.parametrize('make', [labelled, lambda: one_label(1, model=seeded(lambda: nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))))], ids=['labels', 'event'])
def test_a_batch_without_rows_teaches_nothing(make):
    class Empties(Callback):
        def before_batch(self):
            if self.training and self.iter == 1: self.learn.xb, self.learn.yb = (self.xb[0][:0],), (self.yb[0][:0],)
    learn, batches = make().add_cb(Empties()).to_smooth(prior='online'), label_spy()
    learn.fit(1, cbs=batches)
    close(learn.multi_label_smoothing.learnt, labels_soft([o[:2] for o in batches.train()], -1 if make is labelled else None).float())

def test_millions_of_labels_are_not_lost():
    cb, one = MultiLabelSmoothingCallback(prior='online'), torch.ones(1, 1)
    cb._add(one*99, one)
    cb._sums += 2**25; cb._counts += 2**25
    for _ in range(3): cb._add(one*99, one)
    assert cb._sums.tolist() == cb._counts.tolist() == [[2**25], [2**25 + 4]]

def test_no_label_is_looked_at_in_a_step():
    with FakeTensorMode():
        cb = MultiLabelSmoothingCallback(prior='online')
        for _ in range(2): cb._add(torch.zeros(6, 5), torch.zeros(6, 5))
        assert cb._sums.shape == (2, 5)

def test_unknown_labels_are_not_learnt_from():
    "nan, of a loss that leaves them out"
    def known_only(pred, y): return F.binary_cross_entropy_with_logits(pred[known := ~y.isnan()], y[known])
    y = next(iter(multi_dls(k=K, bs=64).train))[1]
    x = torch.randn(len(y), 6, generator=torch.Generator().manual_seed(0))
    y = torch.where(torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < .3, math.nan, y)
    learn, batches = labelled(known_only, dls=tensor_dls(x, y)), label_spy()
    learn.add_cb(MultiLabelSmoothingCallback(prior='online')).fit(2, cbs=batches)
    train = [o[:2] for o in batches.train()]
    close(learn.multi_label_smoothing.learnt, labels_soft(train[len(train)//2:]).float())

def test_labels_go_on_where_the_last_fit_was():
    "One fit of three epochs, three of one; another eps; a prior of another kind, and to_hard, forget"
    whole, parts = (fit_seeded(labelled().to_smooth(prior='online'), n) for n in (3, 1))
    assert parts.multi_label_smoothing.soft_labels is not None
    for _ in range(2): parts.fit(1)
    kept = parts.multi_label_smoothing.learnt
    assert torch.equal(weights(whole), weights(parts)) and torch.equal(whole.multi_label_smoothing.learnt, kept)
    cb = parts.to_smooth(.4, prior='online').multi_label_smoothing
    assert cb.learnt is kept and cb.eps == .4
    batches = label_spy()
    parts.fit(1, cbs=batches)
    p, y, l = batches.train()[0]
    close(l, F.binary_cross_entropy_with_logits(p, smoothed_labels(y, kept, .4)))
    cb.prior = torch.full((K,), .5)
    assert cb.learnt is None and cb.soft_labels is None
    for undone in (lambda l: l.to_hard(), lambda l: l.to_smooth(.1)):
        assert undone(parts.to_smooth(prior='online')).to_smooth(prior='online').multi_label_smoothing.learnt is None
        parts.fit(1)

@pytest.mark.parametrize('loss', [BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss()], ids=['fastai', 'torch'])
def test_labels_the_callback_alone_flag_and_word(loss):
    "The same training; without it there is none"
    makes = [lambda: labelled(loss, cbs=MultiLabelSmoothingCallback(prior='online')), lambda: labelled(loss, label_smoothing='online'),
             lambda: labelled(loss).to_smooth(prior='online'), lambda: labelled(loss).to_smooth(SimpleNamespace(eps=.25, prior='online'))]
    alone, flag, word, found = (fit_seeded(make(), 3) for make in makes)
    for other in (flag, word, found): assert torch.equal(weights(alone), weights(other))
    once = fit_seeded(labelled(loss), 3, cbs=MultiLabelSmoothingCallback(prior='online'))
    assert torch.equal(weights(once), weights(alone)) and not hasattr(once, 'multi_label_smoothing')
    assert repr(alone.multi_label_smoothing) == "MultiLabelSmoothingCallback(eps=0.25, prior='online')"
    alone.remove_cb(MultiLabelSmoothingCallback)
    assert not torch.equal(weights(word), weights(fit_seeded(labelled(loss).to_smooth(.25), 3)))
    assert torch.equal(weights(fit_seeded(labelled(loss).to_smooth(prior='online').to_hard(), 3)), weights(fit_seeded(labelled(loss), 3)))

@pytest.mark.parametrize('share', [.8, .2])
def test_of_two_mixed_inputs_the_larger_part_of_a_label_counts(share):
    class Mixed(MixUp):
        "Always with the same share of the first one, and the rows in reverse"
        def before_batch(self):
            self.lam, self.yb1 = torch.full((len(self.y), 1), share), (self.y.flip(0),)
            if self.training: self.learn.yb = (share*self.y + (1-share)*self.y.flip(0),)
    learn, batches = labelled(cbs=Mixed()).to_smooth(prior='online'), label_spy()
    learn.fit(1, cbs=batches)
    seen = batches.train()
    assert set(round(v, 1) for v in seen[0][1].flatten().tolist()) == {0., .2, .8, 1.}
    close(learn.multi_label_smoothing.learnt, labels_soft([o[:2] for o in seen]).float())

def test_labels_validation_in_the_middle_of_an_epoch():
    a, b = labelled().to_smooth(prior='online'), labelled(cbs=ValidateInTraining()).to_smooth(prior='online')
    fit_seeded(a, 3), fit_seeded(b, 3)
    assert torch.equal(weights(a), weights(b)) and torch.equal(a.multi_label_smoothing.learnt, b.multi_label_smoothing.learnt)

@pytest.mark.parametrize('ex', [KeyboardInterrupt, CancelEpochException, CancelFitException])
def test_an_unfinished_epoch_teaches_no_labels(ex):
    "S is that of the last whole epoch, and the next one begins anew"
    learn, batches = labelled().to_smooth(prior='online'), label_spy()
    learn.fit(1)
    soft = learn.multi_label_smoothing.learnt
    try: learn.fit(1, cbs=RaiseAt(ex()))
    except KeyboardInterrupt: pass
    assert learn.multi_label_smoothing.learnt is soft
    learn.fit(1, cbs=batches)
    close(learn.multi_label_smoothing.learnt, labels_soft([o[:2] for o in batches.train()]).float())

def test_labels_lr_find_and_eps_find_leave_no_trace():
    learn = labelled().to_smooth(.3, prior='online')
    learn.fit(1)
    cb, soft, before = learn.multi_label_smoothing, learn.multi_label_smoothing.learnt.clone(), weights(learn).clone()
    learn.lr_find(num_it=12, stop_div=False, show_plot=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = learn.eps_find(4, full=True, epss=[.25], show_plot=False)
    with pytest.raises(ValueError, match='compare pilots, by full=True'): learn.eps_find(4, show_plot=False)
    assert learn.multi_label_smoothing is cb and torch.equal(cb.learnt, soft) and cb.eps == .3 and found.prior == 'online'
    assert torch.equal(weights(learn), before) and cb._sums is None

@pytest.mark.parametrize('way', ['export', 'deepcopy'])
def test_a_copy_of_labels_goes_on_by_itself(way, tmp_path):
    learn = fit_seeded(labelled(path=tmp_path).to_smooth(.4, prior='online'), 2)
    if way == 'export':
        learn.dls.new_empty = partial(copy, learn.dls) # loaders of lists have none
        learn.export('l.pkl')
        other = load_learner(tmp_path/'l.pkl')
        other.dls = learn.dls
    else: other = deepcopy(learn)
    cb, copied = learn.multi_label_smoothing, other.multi_label_smoothing
    before = cb.learnt.clone()
    assert torch.equal(copied.learnt, before) and copied.eps == .4 and copied.prior == 'online'
    other.fit(1)
    assert torch.equal(cb.learnt, before) and not torch.equal(copied.learnt, before)

def test_what_was_learnt_of_other_labels_is_forgotten():
    cb = MultiLabelSmoothingCallback(prior='online')
    labelled(cbs=cb).fit(1)
    with pytest.warns(UserWarning, match='learnt of 4 labels is forgotten: now there are 6'): labelled(k=6, cbs=cb).fit(1)
    assert cb.learnt.shape == (2, 6)

def test_options_of_online_labels():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cb = MultiLabelSmoothingCallback(.5, 'online')   # smooths all the way to S, which says no and yes
        cb.eps = .25
    assert MultiLabelSmoothingCallback(prior='online').eps == .25 and MultiLabelSmoothingCallback().eps == .05
    with pytest.raises(ValueError, match="'train' or 'online', got 'onlin'"): cb.prior = 'onlin'
    with pytest.raises(ValueError, match='takes no prior'): cb.eps = .1, 0.
    with pytest.raises(ValueError, match='takes no prior'): labelled().to_smooth((.1, 0.), prior='online')
    with pytest.raises(ValueError, match='spread'): labelled().to_smooth(prior='online', spread='others')
    with pytest.raises(ValueError, match='smooth_valid'): labelled().to_smooth(prior='online', smooth_valid=True)
    assert cb.eps == .25 and cb.online

def test_labels_by_name():
    learn = labelled().to_smooth(prior='online')
    learn.dls.vocab = ['ant', 'bee', 'cat', 'dog']
    assert learn.multi_label_smoothing.soft_labels is None
    learn.fit(1)
    table = learn.multi_label_smoothing.soft_labels
    assert list(table.index) == ['ant', 'bee', 'cat', 'dog'] and table.index.name == 'label' and (table['not there'] <= .5).all() and (table['there'] >= .5).all()
