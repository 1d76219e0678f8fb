"""to_smooth, to_hard and `label_smoothing=`: what each loss becomes, what is smoothed, and how the Learner is left.

Real Learners of every kind: test_learner_types. Beside fastai's callbacks, and after a fault: test_callbacks_compose."""
import importlib, inspect, pickle, warnings
from copy import deepcopy
from fractions import Fraction

import fastai.losses as fastai_losses, fuzz, pytest
from fuzz import BAD_EPS, BAD_SPREAD, FLOATS, INF, NAN, Row, no_values
from hypothesis import strategies as st
from helpers import *
from reference import sigmoid_reference, softmax_reference

import fastai_smooth.learner
from fastai_smooth.all import LabelSmoothingCrossEntropyFlat, MultiLabelSmoothingCallback, unet_learner, vision_learner

ce, bce = F.cross_entropy, F.binary_cross_entropy_with_logits
W = tensor([1., 2., 3., 4.])

def close(a, b, atol=1e-6, rtol=1e-5):
    a, b = (torch.as_tensor(o).detach().as_subclass(torch.Tensor) for o in (a, b))
    torch.testing.assert_close(a, b.to(a.dtype), atol=atol, rtol=rtol)

def single(loss=None, **kwargs): return tensor_learner(single_dls(k=4), mlp(k=4), ifnone(loss, CrossEntropyLossFlat()), **kwargs)
def multi(loss=None, **kwargs): return tensor_learner(multi_dls(), mlp(), ifnone(loss, BCEWithLogitsLossFlat()), **kwargs)

def train_loss(learn, x, y):
    "What `learn` trains on: its loss on logits that need a gradient."
    return learn.loss_func(x.detach().clone().requires_grad_(), y)

def callbacks_of(learn): return learn.cbs.filter(risinstance(MultiLabelSmoothingCallback))
def logits(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def batches_of(learn):
    "(pred, target, loss) of each training and each validation batch of a fit"
    spy = Spy(lambda l: (l.pred.detach().clone(), l.yb[0].clone(), l.loss.detach().clone()), 'after_batch', order=99)
    fit_seeded(learn, 1, cbs=spy)
    assert len(spy.train()) > 1 and len(spy.valid()) > 0
    return spy.train(), spy.valid()

def trains_on(learn, smooth, hard=ce):
    "The loss of each training batch is that of the function `smooth`, that of each validation batch `hard`'s."
    train, valid = batches_of(learn)
    for pred, y, loss in train: close(loss, smooth(pred, y))
    for pred, y, loss in valid: close(loss, hard(pred, y))

X, Y = logits(6, 4), tensor([0, 3, 1, 2, 2, 0])

# ---------------------------------------------------------------- what each loss becomes

OPTIONS = dict(weight=W, ignore_index=2)
LOSSES = dict(
    flat=CrossEntropyLossFlat, flat_smoothing=lambda: CrossEntropyLossFlat(label_smoothing=.4), ignore=lambda: CrossEntropyLossFlat(ignore_index=2),
    everything=lambda: CrossEntropyLossFlat(reduction='sum', flatten=False, axis=1, **OPTIONS),
    ours=lambda: LabelSmoothingCrossEntropyFlat(.4, reduction='none', flatten=False, backend='torch', axis=1, **OPTIONS),
    fastai_smoothing=lambda: fastai_losses.LabelSmoothingCrossEntropyFlat(eps=.4, weight=W),
    torch=lambda: nn.CrossEntropyLoss(reduction='sum', label_smoothing=.4, **OPTIONS), function=lambda: F.cross_entropy)

@pytest.mark.parametrize('name', LOSSES)
def test_every_softmax_loss_becomes_ours_with_its_options(name):
    "Smooth with a gradient, hard without; called again it replaces what it did, and to_hard goes all the way back"
    old, x, y = LOSSES[name](), logits(3, 4, 2, 5), torch.randint(4, (3, 2, 5), generator=torch.Generator().manual_seed(1))
    learn, func = single(old), getattr(old, 'func', old)
    axis, flatten = (1, False) if func is old else (old.axis, old.flatten)
    options = {o: getattr(func, o) for o in ('weight', 'ignore_index', 'reduction') if hasattr(func, o)}
    for eps in (None, .3, .2):
        assert learn.to_smooth(eps) is learn and isinstance(learn.loss_func, LabelSmoothingCrossEntropyFlat)
        assert (learn.loss_func.axis, learn.loss_func.flatten) == (axis, flatten) and learn.loss_func.func.backend == getattr(func, 'backend', 'auto')
        pred = x.movedim(1, axis).contiguous()
        close(train_loss(learn, pred, y), ce(x, y, label_smoothing=ifnone(eps, .1), **options), atol=1e-4)
        close(learn.loss_func(pred, y), ce(x, y, **options), atol=1e-4)
    assert learn.to_hard() is learn and learn.loss_func is old and learn.to_smooth(.1).to_hard().loss_func is old

@pytest.mark.parametrize('old', [BCEWithLogitsLossFlat(), BCEWithLogitsLossFlat(thresh=.3, pos_weight=torch.ones(5)), nn.BCEWithLogitsLoss()],
                         ids=['flat', 'flat with options', 'torch'])
def test_every_sigmoid_loss_gets_the_callback(old):
    learn = multi(old)
    for eps in (None, .2):
        assert learn.to_smooth(eps) is learn and learn.loss_func is old
        assert [cb.eps for cb in callbacks_of(learn)] == [ifnone(eps, .05)]
    trains_on(learn, lambda pred, y: old(pred, y*.6+.2), old)
    assert learn.to_hard() is learn and learn.loss_func is old and len(callbacks_of(learn)) == 0
    with pytest.raises(ValueError): learn.to_hard()

def subclass_of(cls): return type(f'My{cls.__name__}', (cls,), {})(), f'My{cls.__name__}'
def my_loss(pred, y): return F.cross_entropy(pred, y)

OWN = CrossEntropyLossFlat, nn.CrossEntropyLoss, BCEWithLogitsLossFlat, nn.BCEWithLogitsLoss, LabelSmoothingCrossEntropyFlat
UNSUPPORTED = [*map(subclass_of, OWN), (my_loss, 'my_loss'), (FocalLossFlat(), 'FocalLossFlat'), (nn.NLLLoss(), 'NLLLoss'),
               (BCELossFlat(), 'BCELoss|BaseLoss'), (partial(F.cross_entropy, weight=W), 'partial')]
REGRESSIONS = [(MSELossFlat(), 'MSELoss'), (L1LossFlat(), 'L1Loss'), (nn.HuberLoss(), 'HuberLoss'), (F.smooth_l1_loss, 'smooth_l1_loss'),
               (partial(F.mse_loss, reduction='sum'), 'mse_loss'), (nn.PoissonNLLLoss(), 'PoissonNLLLoss')]

@pytest.mark.parametrize('loss,name', UNSUPPORTED + REGRESSIONS, ids=[n for _, n in UNSUPPORTED + REGRESSIONS])
def test_any_other_loss_is_a_type_error_that_names_it(loss, name):
    "A flag is never accepted and ignored. What is supported is said; for a regression no other loss would help"
    learn, regression = single(loss), (loss, name) in REGRESSIONS
    for how in (learn.to_smooth, lambda: single(loss, label_smoothing=.1)):
        with pytest.raises(TypeError, match=f'{name} is for regression.*no labels' if regression else name) as e: how()
        for said in ('CrossEntropyLossFlat', 'BCEWithLogitsLossFlat', 'loss_func=', 'supported'): assert (said in str(e.value)) != regression
    assert learn.loss_func is loss and len(callbacks_of(learn)) == 0

# ---------------------------------------------------------------- eps, spread and prior

def test_what_eps_find_suggests_is_taken():
    found = SimpleNamespace(eps=.2)
    assert single().to_smooth(found).loss_func.eps == single(label_smoothing=found).loss_func.eps == .2

@pytest.mark.parametrize('pair', [(.25, 0.), (0., .25), [.25, .125]], ids=str)
def test_a_pair_for_multi_label(pair):
    "as eps and as the flag; alone"
    e0, e1 = pair
    for learn in (multi().to_smooth(pair), multi(label_smoothing=pair), multi().to_smooth(SimpleNamespace(eps=pair))):
        assert callbacks_of(learn)[0].eps == (e0, e1)
        trains_on(learn, lambda pred, y: bce(pred, e0 + (1-e0-e1)*y), bce)
    with pytest.raises(ValueError, match='takes no prior'): multi().to_smooth(pair, prior=torch.full((5,), .5))

@pytest.mark.parametrize('kwargs', [{}, dict(prior='online'), dict(prior=torch.full((4,), .25))])
def test_a_pair_for_one_class_is_a_type_error(kwargs):
    learn = single(loss := CrossEntropyLossFlat())
    with pytest.raises(TypeError, match=r'a pair is for multi-label losses\), got \(0.1, 0.0\)'): learn.to_smooth((.1, 0.), **kwargs)
    with pytest.raises(TypeError, match=r'label_smoothing=\(0.1, 0.0\): .*multi-label'): single(label_smoothing=(.1, 0.))
    assert learn.loss_func is loss

def test_a_word_for_eps_is_told_of_eps_find():
    with pytest.raises(TypeError, match=r"got 'auto'.*learn\.to_smooth\(learn\.eps_find"): single().to_smooth('auto')
    with pytest.raises(TypeError, match="label_smoothing='auto'.*eps_find"): single(label_smoothing='auto')

def test_an_eps_that_leaves_nothing_to_learn_is_warned_of_once():
    with pytest.warns(UserWarning, match='eps=1 .*nothing to learn') as said: learn = single().to_smooth(1.)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)
        single().to_smooth(.99)

def test_data_of_one_class_are_warned_of():
    one_class, one_label = single(), single(BCEWithLogitsLossFlat())   # a label is there or not
    one_class.dls.c = one_label.dls.c = 1
    with pytest.warns(UserWarning, match='one class') as said: one_class.to_smooth(.1)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        one_label.to_smooth(.1)

def test_spread_prior_and_eps_of_each_class_reach_the_loss():
    eps, prior = tensor([.1, .2, .3, .4]), tensor([.4, .3, .2, .1])
    for asked in (dict(eps=eps), dict(eps=.3, spread='others'), dict(eps=.3, prior=prior), dict(eps=.3, prior=torch.eye(4).flip(0)*.5+.125)):
        close(train_loss(single().to_smooth(**asked), X, Y), softmax_reference(X, Y, **asked)[0])

def test_multi_hot_floats_under_a_loss_of_one_class():
    "What fastai's MultiCategoryBlock gives: the first batch says what to use, and nothing is trained"
    learn = multi(CrossEntropyLossFlat()).to_smooth()
    before = weights(learn).clone()
    with pytest.raises(ValueError, match='sum to 1.*multi_hot=True.*LabelSmoothingBCEWithLogitsFlat'): learn.fit(1)
    assert torch.equal(weights(learn), before)

@pytest.mark.parametrize('dtype', [torch.float32, torch.long, torch.bool])
@pytest.mark.parametrize('prior', [None, tensor([.3])])
def test_a_classifier_with_one_logit(dtype, prior):
    "(N,1) logits, (N,) targets, which fastai's BCE takes"
    y = torch.rand(64, generator=torch.Generator().manual_seed(0)) < .4
    learn = tensor_learner(tensor_dls(logits(64, 6), y.to(dtype)), mlp(k=1), BCEWithLogitsLossFlat()).to_smooth(.2, prior=prior)
    trains_on(learn, lambda pred, y: bce(pred[:, 0], y.float()*.6 + .4*ifnone(prior, .5)), lambda pred, y: bce(pred[:, 0], y.float()))

# ---------------------------------------------------------------- prior='train'

class Scaled(nn.Module):
    def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(()))
    def forward(self, x): return x*self.scale

def shares(labels, k): return torch.bincount(torch.as_tensor(labels).flatten().long(), minlength=k)/torch.as_tensor(labels).numel()

def images(path):
    dls = digits_dls(write_digits(path, 60), bs=16)
    return dls, shares([int(p.parent.name) for p in dls.train_ds.items], 10)

def masks(path):
    arrays, masks = segment_arrays(12)
    return segment_dls(arrays, masks, bs=4, n_valid=4), shares(masks[:-4][masks[:-4] != VOID], 3)

def table(path):
    df = tabular_frame()
    return tabular_dls(df), tensor([(df.kind[:60] == v).mean() for v in ('high', 'low', 'mid')])

def multi_table(path):
    df = tabular_frame()
    return tabular_multi_dls(df), tensor([df[c][:60].mean() for c in MULTI_COLS])

def texts(path): return text_dls(), tensor([cat := sum('cat' in t for t in TEXTS[:-4])/len(TEXTS[:-4]), 1-cat])

def words(path):
    tokens = [w for t in TEXTS[:-4] for w in t.split()]
    return lm_dls(), tensor([tokens.count(v)/len(tokens) for v in VOCAB])

@pytest.mark.parametrize('data', [images, masks, table, multi_table, texts, words])
def test_prior_of_training_data(data, tmp_path, monkeypatch):
    "The labels are counted, and no image is opened; a multi-label prior has one frequency a label"
    dls, expected = data(tmp_path)
    if data is images: monkeypatch.setattr(PILImage, 'create', lambda *a, **k: pytest.fail('an image was opened'))
    loss = BCEWithLogitsLossFlat() if data is multi_table else CrossEntropyLossFlat(axis=1 if data is masks else -1, ignore_index=VOID)
    learn = Learner(dls, Scaled(), loss_func=loss).to_smooth(.2, prior='train')
    prior = callbacks_of(learn)[0].prior if data is multi_table else learn.loss_func.func.prior
    close(prior, expected, atol=.01 if data is words else 1e-6)   # whether the two ends of a stream count is a matter of a token or two in 200

@pytest.mark.parametrize('how', ['to_smooth', 'callback'])
def test_prior_of_labels_along_an_axis_that_a_sigmoid_loss_was_given(how):
    y = (torch.rand(16, 4, 3, generator=torch.Generator().manual_seed(0)) < tensor([.2, .6, .9])).float()
    dsets = Datasets(range(16), [[lambda i: torch.full((4, 3), float(i))], [y.__getitem__]], splits=[range(16), range(4)])
    learn = tensor_learner(dsets.dataloaders(bs=4, num_workers=0, device=CPU), Scaled(), BCEWithLogitsLossFlat(axis=2))
    if how == 'to_smooth': learn.to_smooth(.2, prior='train')
    else: learn.add_cb(MultiLabelSmoothingCallback(.2, 'train'))
    trains_on(learn, lambda pred, o: bce(pred, .6*o + .4*y.mean((0, 1))), bce)

@pytest.mark.parametrize('make', [single, multi])
def test_a_prior_that_cannot_be_counted_leaves_the_learner_as_it_was(make):
    learn = make()
    loss, cbs = learn.loss_func, list(learn.cbs)
    with pytest.raises(TypeError, match='prior'): learn.to_smooth(prior='train')
    assert learn.loss_func is loss and list(learn.cbs) == cbs

# ---------------------------------------------------------------- the old loss and the Learner

def snapshot(loss): return repr((*[{k: v for k, v in vars(o).items() if k != 'func'} for o in (loss, getattr(loss, 'func', loss))], type(loss)))

@pytest.mark.parametrize('name', ['flat', 'fastai_smoothing', 'ours', 'torch'])
def test_the_old_loss_is_never_mutated(name):
    "fastai shares one loss object among all Learners of a process"
    loss = LOSSES[name]()
    learn, before, value = single(loss).to_smooth(.3), snapshot(loss), loss(X, Y)
    learn.loss_func.reduction, learn.loss_func.eps = 'sum', .5
    learn.loss_func.reduction = 'mean'
    learn.fit(1)
    learn.validate()
    assert snapshot(loss) == before and torch.equal(loss(X, Y), value)
    assert learn.to_hard().loss_func is loss

def test_to_hard_without_to_smooth():
    for learn in (single(), single().to_smooth().to_hard()):
        with pytest.raises(ValueError, match='to_smooth was not called on it$'): learn.to_hard()
    with pytest.raises(ValueError, match='learn.loss_func.eps = 0'): single(LabelSmoothingCrossEntropyFlat()).to_hard()

def test_a_loss_shows_the_options_that_are_not_default():
    assert repr(single().to_smooth(.2).loss_func) == "FlattenedLoss of LabelSmoothingCrossEntropy(eps=0.2, reduction='mean'), smooth_valid=False"
    learn = single(CrossEntropyLossFlat(axis=1, ignore_index=255, weight=W, flatten=False)).to_smooth(.2, prior=W/10, smooth_valid=True)
    assert repr(learn.loss_func) == ("FlattenedLoss of LabelSmoothingCrossEntropy(eps=0.2, reduction='mean', prior=[0.1, 0.2, 0.3, 0.4], "
                                     "weight=[1.0, 2.0, 3.0, 4.0], ignore_index=255, axis=1), flatten=False, smooth_valid=True")

def test_a_call_that_fails_leaves_what_an_earlier_one_did():
    for learn, bad in ((single().to_smooth(.2), 1.5), (multi().to_smooth(.2), .6)):
        loss, cbs = learn.loss_func, [*learn.cbs]
        with pytest.raises(ValueError, match=str(bad)): learn.to_smooth(bad)
        assert learn.loss_func is loss and [*learn.cbs] == cbs

# ---------------------------------------------------------------- training is smooth, validation is hard

def test_training_is_smoothed_and_validation_is_not():
    "Nor are losses of training data that are looked at afterwards"
    learn = single().to_smooth(.3)
    trains_on(learn, partial(ce, label_smoothing=.3))
    for i in (1, 0):
        probs, y, losses = learn.get_preds(ds_idx=i, with_loss=True)
        close(losses, F.nll_loss(probs.log(), y, reduction='none'), atol=1e-5)
        close(learn.validate(i)[0], losses.mean())
    assert learn.loss_func.reduction == 'mean'

def test_smooth_valid_smooths_validation_too():
    learn, smooth = single().to_smooth(.3, smooth_valid=True), partial(ce, label_smoothing=.3)
    trains_on(learn, smooth, smooth)
    trains_on(single(LabelSmoothingCrossEntropyFlat(.3)), smooth, smooth)   # as does a loss that is passed as loss_func
    x, y = learn.dls.valid.one_batch()
    close(learn.get_preds(with_loss=True)[2], smooth(learn.model(x), y, reduction='none'))

def test_the_installed_loss_smooths_only_where_a_gradient_is_wanted():
    "No state: an exception leaves none behind"
    learn, x = single().to_smooth(.3), X.clone().requires_grad_()
    with pytest.raises(RuntimeError): learn.fit(1, cbs=RaiseAt(RuntimeError('power cut'), 'after_loss'))
    close(learn.loss_func(x, Y), ce(X, Y, label_smoothing=.3))
    with torch.no_grad(): close(learn.loss_func(x, Y), ce(X, Y))
    with torch.inference_mode(): close(learn.loss_func(X.clone(), Y), ce(X, Y))

def test_eps_of_the_installed_loss_can_be_set():
    learn = single(CrossEntropyLossFlat(weight=W)).to_smooth(.3)
    learn.loss_func.eps = .2
    trains_on(learn, partial(ce, weight=W, label_smoothing=.2), partial(ce, weight=W))

# ---------------------------------------------------------------- label_smoothing=

VALUES = [(True, .1), (1., 1.), (1, 1.), (0., 0.), (.3, .3), (np.float64(.3), .3), (Fraction(1, 4), .25), (torch.tensor(.25), .25)]

@pytest.mark.parametrize('value,eps', VALUES, ids=repr)
def test_the_keyword_on_learner(value, eps):
    "True is the default, 1.0 an eps of 1 and 0.0 one of 0"
    learn = single(loss := CrossEntropyLossFlat(), label_smoothing=value)
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=eps))
    close(learn.loss_func(X, Y), ce(X, Y))
    assert learn.to_hard().loss_func is loss

@pytest.mark.parametrize('kwargs', [dict(label_smoothing=None), dict(label_smoothing=False), {}])
def test_none_and_false_are_off(kwargs):
    assert single(loss := CrossEntropyLossFlat(), **kwargs).loss_func is loss and not callbacks_of(multi(**kwargs))

@pytest.mark.parametrize('value,eps', [(True, .05), (.2, .2)])
def test_the_keyword_on_a_sigmoid_loss(value, eps):
    trains_on(multi(label_smoothing=value), lambda pred, y: bce(pred, y*(1-2*eps)+eps), bce)
    with pytest.raises(ValueError, match='label_smoothing=1'): multi(label_smoothing=1.)

def test_the_keyword_beside_positional_arguments_and_callbacks():
    learn = Learner(single_dls(), mlp(k=4), CrossEntropyLossFlat(), SGD, .1, cbs=[CastToTensor()], metrics=accuracy, label_smoothing=.3)
    assert learn.lr == .1 and learn.opt_func is SGD and learn.metrics[0].name == 'accuracy' and len(learn.cbs.filter(risinstance(CastToTensor))) == 2
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.3))
    with pytest.raises(TypeError): single(label_smooth=.1)

class SetsItsLoss(Learner):
    def __init__(self, *args, own=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_func = ifnone(own, CrossEntropyLossFlat(weight=W))

class Mixin:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_func = nn.CrossEntropyLoss(ignore_index=2)

class SetsItAgain(Mixin, SetsItsLoss): pass
class IsMixed(Mixin, Learner): pass

@pytest.mark.parametrize('cls', [SetsItsLoss, SetsItAgain, IsMixed])
def test_a_subclass_that_sets_its_loss_is_smoothed_too(cls):
    "When it trains; the flag is never accepted and ignored"
    learn = quiet(cls(single_dls(), mlp(k=4), CrossEntropyLossFlat(), SGD, label_smoothing=.3))
    own, options = learn.loss_func, dict(weight=W) if cls is SetsItsLoss else dict(ignore_index=2)
    trains_on(learn, partial(ce, label_smoothing=.3, **options), partial(ce, **options))
    assert learn.to_hard().loss_func is own
    trains_on(learn, partial(ce, **options), partial(ce, **options))
    assert not hasattr(cls(single_dls(), mlp(k=4), CrossEntropyLossFlat()), 'label_smoothing_flag')

def test_a_subclass_whose_own_loss_cannot_be_smoothed():
    learn = quiet(SetsItsLoss(single_dls(), mlp(k=4), CrossEntropyLossFlat(), own=FocalLossFlat(), label_smoothing=.3))
    with pytest.raises(TypeError, match='label_smoothing=0.3.*FocalLossFlat'): learn.fit(1)
    learn.validate()
    learn.to_hard().fit(1)
    learn = quiet(SetsItsLoss(multi_dls(), mlp(), CrossEntropyLossFlat(), own=BCEWithLogitsLossFlat(), label_smoothing=.2))
    for _ in range(2): learn.fit(1)
    assert [cb.eps for cb in callbacks_of(learn)] == [.2]

def test_a_subclass_sees_the_smoothed_loss_in_its_init():
    class Looks(Learner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss_func.eps = .2
    learn = quiet(Looks(single_dls(), mlp(k=4), CrossEntropyLossFlat(), label_smoothing=.3))
    learn.fit(1)
    assert learn.loss_func.eps == .2

@pytest.mark.parametrize('kwargs,eps', [(dict(label_smoothing=.3), .3), (dict(label_smoothing=True), .1), ({}, 0.)])
def test_vision_learner(kwargs, eps):
    "Positional arguments are fastai's: dls, arch, normalize, n_out, pretrained"
    dls = tensor_dls(torch.randn(8, 3, 32, 32), torch.zeros(8).long())
    learn = fastai_smooth.learner.vision_learner(dls, tiny_arch, False, 4, False, loss_func=nn.CrossEntropyLoss(), metrics=accuracy, **kwargs)
    assert learn.n_out == 4 and learn.arch is tiny_arch
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=eps))

def test_the_patched_functions_pickle_and_have_documentation():
    for f in (vision_learner, unet_learner):
        assert pickle.loads(pickle.dumps(f)) is f and f.__name__ in f.__doc__
        assert 'label_smoothing' in inspect.signature(f).parameters

# ---------------------------------------------------------------- with MixUp, temperature and others

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('when', ['before', 'after', 'training'])
def test_with_mixup_and_cutmix(when, mix):
    """lam of one smoothed loss and 1-lam of the other in training, hard in validation; and the loss is still there afterwards.
    Whether to_smooth comes before MixUp, after it or while it trains."""
    original, y, handler = CrossEntropyLossFlat(), torch.randint(4, (32,), generator=torch.Generator().manual_seed(0)), mix()
    learn = tensor_learner(tensor_dls(logits(32, 1, 8, 8), y, bs=8), flat_mlp(4), original)
    if when == 'before': learn.to_smooth(.3)
    learn.add_cb(handler)
    if when == 'after': learn.to_smooth(.3)
    mixed = Spy(lambda l: (handler.lam.clone(), handler.yb1[0].clone()), 'after_batch', order=99)
    learn.add_cbs([mixed, at_batch(lambda l: l.to_smooth(.3))] if when == 'training' else mixed)
    train, valid = batches_of(learn)
    for i, ((pred, y, loss), (lam, y1)) in enumerate(zip(train, mixed.train())):
        f = partial(ce, label_smoothing=.3*(when != 'training' or i > 1), reduction='none')
        close(loss, torch.lerp(f(pred, y1), f(pred, y), lam.to(pred.dtype)).mean())
    for pred, y, loss in valid: close(loss, ce(pred, y))
    assert learn.loss_func.eps == .3 and learn.loss_func.reduction == 'mean' and learn.to_hard().loss_func is original

def at_batch(f, nth=1):
    "A callback that calls f(learn) once, after training batch `nth`"
    class Once(Callback):
        def after_batch(self):
            if self.training and self.train_iter == nth+1: f(self.learn)
    return Once()

def left_by_mixup(loss):
    learn = single(loss).to_smooth(.3).add_cb(MixUp())
    with pytest.raises(RuntimeError): learn.fit(1, cbs=RaiseAt(RuntimeError('power cut'), 'after_loss'))
    assert inspect.ismethod(learn.loss_func)
    return learn

def test_when_mixup_was_left_holding_the_loss():
    "After an exception `learn.loss_func` is a bound method of MixUp"
    learn = left_by_mixup(loss := CrossEntropyLossFlat()).to_hard()
    assert learn.loss_func is loss
    learn.fit(1)
    assert learn.loss_func is loss
    learn = left_by_mixup(loss).to_smooth(.2)
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.2))
    learn.fit(1)
    assert learn.to_hard().loss_func is loss

def test_to_hard_while_mixup_trains_and_to_smooth_of_another_learner():
    other, learn = left_by_mixup(CrossEntropyLossFlat()), single(original := CrossEntropyLossFlat()).to_smooth(.3)
    def both(learn): learn.to_hard(), other.to_smooth(.25)
    learn.fit(1, cbs=[MixUp(), at_batch(both)])
    assert learn.loss_func is original and other.loss_func.eps == .25

@pytest.mark.parametrize('smooth', [False, True])
def test_temperature_while_mixup_trains(smooth):
    "Logits five times too large; lr=0 leaves them so"
    x, w = logits(400, 4), logits(4, 4, seed=1)
    y = torch.multinomial((x@w).softmax(1), 1, generator=torch.Generator().manual_seed(2))[:, 0]
    learn = tensor_learner(tensor_dls(x, y, bs=50, n_valid=300), nn.Linear(4, 4, bias=False), CrossEntropyLossFlat())
    with torch.no_grad(): learn.model.weight.copy_(5*w.T)
    if smooth: learn.to_smooth(.3)
    installed = learn.loss_func
    learn.fit(1, 0., cbs=[MixUp(), at_batch(lambda l: l.fit_temperature(), 0)])
    assert 3 < learn.temperature < 8
    with pytest.warns(UserWarning, match='temperature'): learn.fit(1, 0., cbs=[MixUp(), at_batch(lambda l: l.reset_temperature(), 0)])
    assert learn.temperature == 1. and learn.loss_func is installed

# ---------------------------------------------------------------- pickling and reloading

@pytest.mark.parametrize('kwargs', [{}, dict(smooth_valid=True), dict(prior=tensor([.4, .3, .2, .1])), dict(spread='others')])
@pytest.mark.parametrize('way', [lambda o: pickle.loads(pickle.dumps(o)), deepcopy], ids=['pickle', 'deepcopy'])
def test_a_smoothing_learner_pickles(way, kwargs):
    learn = single().to_smooth(.3, **kwargs)
    for _ in range(2):
        loaded = way(learn)
        close(train_loss(loaded, X, Y), train_loss(learn, X, Y))
        close(loaded.loss_func(X, Y), learn.loss_func(X, Y))
        assert type(loaded.to_hard().loss_func) is CrossEntropyLossFlat
        learn.fit(1)

def depth(f): return 1 + depth(f.__wrapped__) if hasattr(f, '__wrapped__') else 0

@pytest.fixture
def put_back():
    "What reloading the module replaces, for the tests that come after"
    module, methods = dict(vars(fastai_smooth.learner)), {n: getattr(Learner, n) for n in ('__init__', 'to_smooth', 'to_hard')}
    yield
    vars(fastai_smooth.learner).update(module)
    for n, f in methods.items(): setattr(Learner, n, f)

def test_reloading_the_module_patches_once(put_back):
    "As autoreload does in a notebook"
    made_before, module = single(original := CrossEntropyLossFlat(), label_smoothing=.3), fastai_smooth.learner
    before = depth(Learner.__init__), depth(module.vision_learner), inspect.signature(Learner.__init__)
    for _ in range(3): importlib.reload(module)
    assert (depth(Learner.__init__), depth(module.vision_learner), inspect.signature(Learner.__init__)) == before
    assert made_before.to_smooth(.2).to_hard().loss_func is original
    learn = single(original, label_smoothing=.3)
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.3))
    assert learn.to_hard().loss_func is original and len(callbacks_of(multi(label_smoothing=.2))) == 1
    test_vision_learner(dict(label_smoothing=.2), .2)
    assert pickle.loads(pickle.dumps(module.vision_learner)) is module.vision_learner

# ---------------------------------------------------------------- bad and odd arguments

@st.composite
def asked(draw):
    n, k, one_class = draw(st.integers(1, 4)), draw(st.integers(2, 4)), draw(st.booleans())
    losses = CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat(.4), nn.CrossEntropyLoss(), F.cross_entropy
    prior = fuzz.rand(draw, k) + .01
    return dict(x=fuzz.rand(draw, n, k)*8-4, y=fuzz.randint(draw, k, n) if one_class else (fuzz.rand(draw, n, k) < .5).float(),
                loss=draw(st.sampled_from(losses if one_class else (BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss()))), eps=draw(st.floats(1e-6, .5)),
                prior=prior/prior.sum() if one_class else prior/1.01, spread='all', smooth_valid=False)

def smoothed(x, y, loss, **asked):
    "The first training loss and the validation loss; a call that is refused leaves the Learner as it was"
    learn = tensor_learner(tensor_dls(x.repeat(2, 1), y.repeat(2, *[1]*(y.dim()-1)), len(x), len(x)), Scaled(), loss)
    before, cbs = learn.loss_func, [*learn.cbs]
    try: learn.to_smooth(**asked)
    except Exception: assert learn.loss_func is before and [*learn.cbs] == cbs; raise
    learn.fit(1, 0.)
    result, valid = learn.recorder.losses[0], learn.validate()[0]
    assert learn.to_hard().loss_func is loss and not callbacks_of(learn)
    f = softmax_reference if y.dtype == torch.long else sigmoid_reference
    close(result, f(x, y, asked['eps'], prior=asked['prior'].detach().as_subclass(torch.Tensor).double())[0], atol=1e-5)
    close(valid, f(x, y, 0.)[0], atol=1e-5)
    return result, valid

def of(task, **change): return lambda a: fuzz.need((a['y'].dtype == torch.long) == (task == 'classes')) and change
PRIORS = [lambda a: torch.full((len(a['prior'])+1,), .2), lambda a: a['prior'][None, None], lambda a: a['prior'][:0], lambda a: a['prior'][0],
          *[lambda a, v=v: torch.full_like(a['prior'], v) for v in (-.5, NAN, 1.5, INF)], *no_values('prior'),
          'valid', 'train', 3.5, [.5], np.ones(3), object()]
TABLE = dict(
    to_smooth=Row(smoothed, asked(), tensors=dict(prior=FLOATS), tol=1e-4, bad={
        'eps': [*[o for o in BAD_EPS[:-1] if o is not None], of('classes', eps=BAD_EPS[-1]), of('classes', eps=(.1, 0.)), of('labels', eps=.6), of('labels', eps=(.6, .5)), of('classes', eps=torch.full((1, 9), .1)),
                of('classes', eps=tensor([.1, -.1]), prior=None)],
        'prior': PRIORS, 'spread': [*BAD_SPREAD, of('labels', spread='others')], 'smooth_valid': [of('labels', smooth_valid=True)],
        'prior or spread': [of('classes', spread='others')]}),
    keyword=Row(lambda label_smoothing: single(label_smoothing=label_smoothing).loss_func.eps, st.just(dict(label_smoothing=.1)),
                bad={'label_smoothing': [-.1, 1.5, NAN, INF, 'x', '', [.1], {}, 1j, np.array([.1, .2]), object()]}))
test_refuses, test_takes = fuzz.both_tests(TABLE, subclasses=(TensorBase, TensorCategory))
