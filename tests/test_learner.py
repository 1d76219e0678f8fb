"to_smooth, to_hard and `label_smoothing=`: SPEC section 5."
import importlib, inspect, pickle, warnings
from copy import deepcopy

import fastai.losses as fastai_losses, pytest
from helpers import *
from fastai.callback.fp16 import MixedPrecision
from fastai.tabular.all import tabular_learner
from fastai.text.all import language_model_learner, text_classifier_learner
from torch.amp import GradScaler, autocast

import fastai_smooth.learner
from fastai_smooth.all import (LabelSmoothingCrossEntropyFlat, MultiLabelSmoothingCallback, unet_learner,
                               vision_learner)

ce, bce = F.cross_entropy, F.binary_cross_entropy_with_logits


def close(a, b, atol=1e-6, rtol=1e-5):
    a, b = (torch.as_tensor(o).detach().as_subclass(torch.Tensor) for o in (a, b))
    torch.testing.assert_close(a, b.to(a.dtype), atol=atol, rtol=rtol)


def single(loss=None, **kwargs):
    return tensor_learner(single_dls(k=4), mlp(k=4), ifnone(loss, CrossEntropyLossFlat()), **kwargs)


def multi(loss=None, **kwargs):
    return tensor_learner(multi_dls(), mlp(), ifnone(loss, BCEWithLogitsLossFlat()), **kwargs)


def train_loss(learn, x, y):
    "What `learn` trains on: its loss on logits that need a gradient."
    return learn.loss_func(x.detach().clone().requires_grad_(), y)


def callbacks_of(learn): return learn.cbs.filter(risinstance(MultiLabelSmoothingCallback))


def power_cut(): return RaiseAt(RuntimeError('power cut'), 'after_loss')


def logits(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = logits(6, 4), tensor([0, 3, 1, 2, 2, 0])


@pytest.fixture(scope='module')
def digits(tmp_path_factory): return digits_dls(write_digits(tmp_path_factory.mktemp('digits'), 120), bs=16)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp('pairs')
    return pairs_dls(path, write_pairs(path, 60), bs=16)


@pytest.fixture(scope='module')
def segment_data(): return segment_arrays(12)


@pytest.fixture(scope='module')
def segmentation(segment_data): return segment_dls(*segment_data, bs=4, n_valid=4)


# ---------------------------------------------------------------- what each loss becomes

SOFTMAX = dict(
    flat=CrossEntropyLossFlat, flat_smoothing=lambda: CrossEntropyLossFlat(label_smoothing=.4),
    fastai_smoothing=lambda: fastai_losses.LabelSmoothingCrossEntropyFlat(eps=.4),
    ours=lambda: LabelSmoothingCrossEntropyFlat(.4),
    torch_=nn.CrossEntropyLoss, torch_smoothing=lambda: nn.CrossEntropyLoss(label_smoothing=.4),
    function=lambda: F.cross_entropy)


@pytest.mark.parametrize('name', SOFTMAX)
def test_every_softmax_loss_becomes_ours(name):
    old = SOFTMAX[name]()
    learn = single(old)
    assert learn.to_smooth() is learn
    assert isinstance(learn.loss_func, LabelSmoothingCrossEntropyFlat) and learn.loss_func is not old
    assert learn.loss_func.eps == .1
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.1))
    assert learn.to_smooth(.3) is learn and learn.loss_func.eps == .3
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.3))
    assert learn.to_hard() is learn and learn.loss_func is old


OPTIONS = dict(
    axis=lambda: CrossEntropyLossFlat(axis=1), weight=lambda: CrossEntropyLossFlat(weight=tensor([1., 2., 3., 4.])),
    ignore=lambda: CrossEntropyLossFlat(ignore_index=2), total=lambda: CrossEntropyLossFlat(reduction='sum'),
    everything=lambda: CrossEntropyLossFlat(axis=1, weight=tensor([1., 2., 3., 4.]), ignore_index=2, reduction='sum',
                                            flatten=False),
    ours=lambda: LabelSmoothingCrossEntropyFlat(.4, axis=1, weight=tensor([1., 2., 3., 4.]), ignore_index=2,
                                                reduction='none', flatten=False),
    fastai_smoothing=lambda: fastai_losses.LabelSmoothingCrossEntropyFlat(eps=.4, weight=tensor([1., 2., 3., 4.]),
                                                                          axis=1),
    torch_=lambda: nn.CrossEntropyLoss(tensor([1., 2., 3., 4.]), ignore_index=2, reduction='sum'),
    function=lambda: F.cross_entropy)


@pytest.mark.parametrize('name', OPTIONS)
def test_options_are_carried_over(name):
    old = OPTIONS[name]()
    is_torch = name in ('torch_', 'function')
    func = old if name == 'torch_' else getattr(old, 'func', None)
    axis, red = 1 if is_torch else old.axis, 'mean' if name == 'function' else old.reduction
    w = None if func is None else func.weight
    ignore = getattr(func, 'ignore_index', -100)
    learn = single(old).to_smooth(.2)
    new = learn.loss_func
    assert new.axis == axis and new.reduction == red
    if not is_torch: assert new.flatten == old.flatten
    x, y = logits(3, 4, 2, 5), torch.randint(4, (3, 2, 5), generator=torch.Generator().manual_seed(1))
    if axis != 1: x = x.movedim(1, -1).contiguous()
    expected = ce(x.movedim(axis, 1), y, w, ignore_index=ignore, reduction=red, label_smoothing=.2)
    res = train_loss(learn, x, y)
    close(res.reshape(expected.shape), expected, atol=1e-4)
    if not is_torch and not old.flatten and red == 'none': assert res.shape == y.shape


@pytest.mark.parametrize('old', [BCEWithLogitsLossFlat(), BCEWithLogitsLossFlat(thresh=.3, pos_weight=torch.ones(5)),
                                 nn.BCEWithLogitsLoss()], ids=['flat', 'flat with options', 'torch'])
def test_every_sigmoid_loss_gets_the_callback(old):
    learn = multi(old)
    assert learn.to_smooth() is learn
    assert learn.loss_func is old and [cb.eps for cb in callbacks_of(learn)] == [.05]
    learn.to_smooth(.2)
    assert learn.loss_func is old and [cb.eps for cb in callbacks_of(learn)] == [.2]
    q = Spy(lambda l: l.yb[0].clone(), 'before_backward', order=99)
    learn.fit(1, cbs=q)
    close(torch.stack(q.train()).unique(), tensor([.2, .8]))
    assert learn.to_hard() is learn and learn.loss_func is old and len(callbacks_of(learn)) == 0
    with pytest.raises(ValueError): learn.to_hard()


class MyCrossEntropy(CrossEntropyLossFlat): pass
class MyTorchCrossEntropy(nn.CrossEntropyLoss): pass
class MyBCE(BCEWithLogitsLossFlat): pass
class MyTorchBCE(nn.BCEWithLogitsLoss): pass
class MySmooth(LabelSmoothingCrossEntropyFlat): pass
def my_loss(pred, y): return F.cross_entropy(pred, y)


UNSUPPORTED = [(MyCrossEntropy(), 'MyCrossEntropy'), (MyTorchCrossEntropy(), 'MyTorchCrossEntropy'),
               (MyBCE(), 'MyBCE'), (MyTorchBCE(), 'MyTorchBCE'), (MySmooth(), 'MySmooth'), (my_loss, 'my_loss'),
               (FocalLossFlat(), 'FocalLossFlat'), (nn.NLLLoss(), 'NLLLoss'),
               (BCELossFlat(), 'BCELoss|BaseLoss'), (partial(F.cross_entropy, weight=torch.ones(4)), 'partial')]


@pytest.mark.parametrize('loss,name', UNSUPPORTED, ids=[n for _, n in UNSUPPORTED])
@pytest.mark.parametrize('how', ['to_smooth', 'keyword'])
def test_any_other_loss_is_a_type_error_that_names_it(loss, name, how):
    "A flag is never accepted and ignored; and what is supported is said"
    if how == 'to_smooth':
        learn = single(loss)
        with pytest.raises(TypeError, match=name) as e: learn.to_smooth()
        assert learn.loss_func is loss and len(callbacks_of(learn)) == 0
    else:
        with pytest.raises(TypeError, match=name) as e: single(loss, label_smoothing=.1)
    assert 'CrossEntropyLossFlat' in str(e.value) and 'BCEWithLogitsLossFlat' in str(e.value)


def huber(pred, y, scale=1.): return F.huber_loss(pred, y)


@pytest.mark.parametrize('loss,name', [(MSELossFlat(), 'MSELoss'), (L1LossFlat(), 'L1Loss'), (nn.HuberLoss(), 'HuberLoss'), (F.smooth_l1_loss, 'smooth_l1_loss'),
                                       (partial(F.mse_loss, reduction='sum'), 'mse_loss'), (nn.PoissonNLLLoss(), 'PoissonNLLLoss')],
                         ids=['flat', 'L1', 'torch', 'function', 'partial', 'poisson'])
@pytest.mark.parametrize('how', ['to_smooth', 'keyword'])
def test_a_regression_has_no_labels_to_smooth(loss, name, how):
    "No other loss would help"
    learn = single(loss)
    with pytest.raises(TypeError, match=f'{name} is for regression.*no labels') as e:
        if how == 'to_smooth': learn.to_smooth()
        else: single(loss, label_smoothing=.1)
    assert 'loss_func=' not in str(e.value) and 'supported' not in str(e.value)
    assert learn.loss_func is loss


# ---------------------------------------------------------------- eps

def test_eps_find_s_suggestion_is_taken():
    learn = single()
    suggestion = learn.eps_find(2)
    assert learn.to_smooth(suggestion).loss_func.eps == suggestion.eps
    assert single(label_smoothing=suggestion).loss_func.eps == suggestion.eps


def test_a_word_for_eps_is_told_of_eps_find():
    learn = single()
    loss = learn.loss_func
    with pytest.raises(TypeError, match=r"got 'auto'.*learn\.to_smooth\(learn\.eps_find"): learn.to_smooth('auto')
    assert learn.loss_func is loss
    with pytest.raises(TypeError, match="label_smoothing='auto'.*eps_find"): single(label_smoothing='auto')


def test_an_eps_that_leaves_nothing_to_learn_is_warned_of_once():
    with pytest.warns(UserWarning, match='eps=1 .*nothing to learn') as said: learn = single().to_smooth(1.)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)
        single().to_smooth(.99)


def test_data_of_one_class_are_warned_of():
    dls = single_dls(k=4)
    dls.c = 1
    learn = tensor_learner(dls, mlp(k=1), CrossEntropyLossFlat())
    with pytest.warns(UserWarning, match='one class') as said: learn.to_smooth(.1)
    assert len(said) == 1
    dls.c = 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.to_smooth(.1)
        dls.c = 1   # one label, which is there or not
        tensor_learner(dls, mlp(k=1), BCEWithLogitsLossFlat()).to_smooth(.1)


# ---------------------------------------------------------------- the old loss

def snapshot(loss):
    "Everything that can be seen of a loss, to notice a change"
    f = getattr(loss, 'func', loss)
    return {k: v for k, v in vars(loss).items() if k != 'func'}, dict(vars(f)), type(loss), type(f)


@pytest.mark.parametrize('name', ['flat', 'fastai_smoothing', 'ours', 'torch_'])
def test_the_old_loss_is_never_mutated(name):
    "fastai shares one loss object among all Learners of a process"
    loss = SOFTMAX[name]()
    other, learn, before = single(loss), single(loss), deepcopy(snapshot(loss))
    value = loss(X, Y)
    learn.to_smooth(.3)
    learn.loss_func.reduction = 'sum'
    learn.loss_func.eps = .5
    learn.loss_func.reduction = 'mean'
    learn.fit(1)
    learn.validate()
    assert other.loss_func is loss
    close(loss(X, Y), value, atol=0, rtol=0)
    learn.to_hard()
    after = snapshot(loss)
    assert repr(after) == repr(before) and learn.loss_func is loss


def test_the_datasets_loss_is_shared_and_stays_hard(digits):
    first = quiet(Learner(digits, flat_mlp(10))).to_smooth()
    second = quiet(Learner(digits, flat_mlp(10)))
    assert type(second.loss_func) is CrossEntropyLossFlat
    assert first.to_hard().loss_func is second.loss_func


def test_to_hard_without_to_smooth():
    learn = single()
    with pytest.raises(ValueError, match='to_smooth was not called on it$'): learn.to_hard()
    learn.to_smooth().to_hard()
    with pytest.raises(ValueError): learn.to_hard()
    with pytest.raises(ValueError, match='learn.loss_func.eps = 0'): single(LabelSmoothingCrossEntropyFlat()).to_hard()


def test_a_loss_shows_whether_it_smooths_validation():
    learn = single()
    assert repr(learn.to_smooth(.2).loss_func) == "FlattenedLoss of LabelSmoothingCrossEntropy(eps=0.2, reduction='mean'), smooth_valid=False"
    assert repr(learn.to_smooth(smooth_valid=True).loss_func).endswith(', smooth_valid=True')


def test_a_loss_shows_the_options_that_are_not_default():
    old = CrossEntropyLossFlat(axis=1, ignore_index=255, weight=tensor([1., 2., 1., .5]), flatten=False)
    learn = single(old).to_smooth(.2, prior=tensor([.1, .2, .3, .4]))
    assert repr(learn.loss_func) == ("FlattenedLoss of LabelSmoothingCrossEntropy(eps=0.2, reduction='mean', prior=[0.1, 0.2, 0.3, 0.4], "
                                     "weight=[1.0, 2.0, 1.0, 0.5], ignore_index=255, axis=1), flatten=False, smooth_valid=False")
    assert "eps=[0.1, 0.2, 0.3, 0.4]" in repr(single().to_smooth(tensor([.1, .2, .3, .4])).loss_func)
    assert "spread='others'" in repr(single().to_smooth(spread='others').loss_func)


def test_calling_again_replaces_and_to_hard_goes_all_the_way_back():
    loss = CrossEntropyLossFlat(weight=tensor([1., 2., 3., 4.]))
    learn = single(loss).to_smooth(.1).to_smooth(.3, spread='others').to_smooth(.2)
    close(train_loss(learn, X, Y), ce(X, Y, loss.func.weight, label_smoothing=.2))
    assert learn.to_hard().loss_func is loss
    assert learn.to_smooth(.1).to_hard().loss_func is loss


def test_a_call_that_fails_changes_nothing():
    loss = CrossEntropyLossFlat()
    learn = single(loss)
    for kwargs in (dict(eps=1.5), dict(eps=-.1), dict(eps=float('nan')), dict(prior=tensor([.5, .5, .5, .5])),
                   dict(spread='some'), dict(spread='others', prior=torch.full((4,), .25))):
        with pytest.raises(ValueError): learn.to_smooth(**kwargs)
        assert learn.loss_func is loss
    learn.to_smooth(.2)
    installed = learn.loss_func
    with pytest.raises(ValueError, match='1.5'): learn.to_smooth(1.5)
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.2))
    assert learn.loss_func is installed and learn.to_hard().loss_func is loss


@pytest.mark.parametrize('kwargs', [dict(smooth_valid=True), dict(eps=.6), dict(eps=-.1), dict(spread='others'),
                                    dict(prior=tensor([1.2]*5))])
def test_bad_arguments_for_a_sigmoid_loss(kwargs):
    learn = multi()
    with pytest.raises(ValueError): learn.to_smooth(**kwargs)
    assert len(callbacks_of(learn)) == 0
    with pytest.raises(ValueError): learn.to_hard()


def test_spread_prior_and_eps_of_each_class_reach_the_loss():
    eps = tensor([.1, .2, .3, .4])
    q = (1-eps[Y][:, None])*F.one_hot(Y, 4) + eps[Y][:, None]/4
    learn = single().to_smooth(eps)
    close(train_loss(learn, X, Y), -(q*X.log_softmax(1)).sum(1).mean())
    close(learn.loss_func(X, Y), ce(X, Y))
    close(train_loss(single().to_smooth(.3, spread='others'), X, Y), ce(X, Y, label_smoothing=.4))  # .3*4/3
    prior = tensor([.4, .3, .2, .1])
    q = .7*F.one_hot(Y, 4) + .3*prior
    close(train_loss(single().to_smooth(.3, prior=prior), X, Y), -(q*X.log_softmax(1)).sum(1).mean())


# ---------------------------------------------------------------- training is smooth, validation is hard

def batches_of(learn, n_epoch=1, **kwargs):
    "(pred, target, loss) of each training and each validation batch of a fit"
    spy = Spy(lambda l: (l.pred.detach().clone(), l.yb[0].clone(), l.loss.detach().clone()), 'after_batch', order=99)
    fit_seeded(learn, n_epoch, cbs=spy, **kwargs)
    return spy.train(), spy.valid()


def test_training_is_smoothed_and_validation_is_not():
    learn = single().to_smooth(.3)
    train, valid = batches_of(learn)
    for pred, y, loss in train: close(loss, ce(pred, y, label_smoothing=.3))
    for pred, y, loss in valid: close(loss, ce(pred, y))
    pred, y = (torch.cat([o[i] for o in valid]) for i in (0, 1))
    close(learn.recorder.values[-1][1], ce(pred, y))
    close(learn.validate()[0], ce(pred, y))
    probs, targs, losses = learn.get_preds(with_loss=True)
    close(probs, pred.softmax(1)); close(losses, ce(pred, y, reduction='none'))
    losses_on_train = learn.get_preds(ds_idx=0, with_loss=True)
    close(losses_on_train[2], -losses_on_train[0].log()[range(48), losses_on_train[1]], atol=1e-5)
    assert learn.loss_func.reduction == 'mean'


def test_smooth_valid_smooths_validation_too():
    learn = single().to_smooth(.3, smooth_valid=True)
    train, valid = batches_of(learn)
    for pred, y, loss in train+valid: close(loss, ce(pred, y, label_smoothing=.3))
    pred, y = (torch.cat([o[i] for o in valid]) for i in (0, 1))
    close(learn.get_preds(with_loss=True)[2], ce(pred, y, reduction='none', label_smoothing=.3))


def test_a_loss_passed_as_loss_func_smooths_always():
    "as fastai's does"
    learn = single(LabelSmoothingCrossEntropyFlat(.3))
    _, valid = batches_of(learn)
    for pred, y, loss in valid: close(loss, ce(pred, y, label_smoothing=.3))


def test_the_installed_loss_smooths_only_where_a_gradient_is_wanted():
    learn = single().to_smooth(.3)
    x = X.clone().requires_grad_()
    close(learn.loss_func(x, Y), ce(X, Y, label_smoothing=.3))
    close(learn.loss_func(X, Y), ce(X, Y))
    with torch.no_grad(): close(learn.loss_func(x, Y), ce(X, Y))
    with torch.inference_mode(): close(learn.loss_func(X.clone(), Y), ce(X, Y))


def test_an_exception_leaves_no_state_behind():
    learn = single().to_smooth(.3)
    with pytest.raises(RuntimeError): learn.fit(1, cbs=power_cut())
    close(learn.loss_func(X, Y), ce(X, Y))
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.3))


def test_training_equals_that_with_torch_smoothing():
    ours = fit_seeded(single().to_smooth(.3), 2)
    theirs = fit_seeded(single(nn.CrossEntropyLoss(label_smoothing=.3)), 2)
    hard = fit_seeded(single(), 2)
    close(weights(ours), weights(theirs))
    assert (weights(ours)-weights(hard)).abs().max() > 1e-3
    close(weights(fit_seeded(single().to_smooth(.3).to_hard(), 2)), weights(hard), atol=0, rtol=0)


def test_eps_of_the_installed_loss_can_be_set():
    learn = single().to_smooth(.3)
    learn.loss_func.eps = .2
    train, valid = batches_of(learn)
    for pred, y, loss in train: close(loss, ce(pred, y, label_smoothing=.2))
    for pred, y, loss in valid: close(loss, ce(pred, y))
    assert learn.loss_func.eps == .2


# ---------------------------------------------------------------- label_smoothing=

@pytest.mark.parametrize('value,eps', [(True, .1), (1., 1.), (1, 1.), (.3, .3), (np.float64(.3), .3)],
                         ids=['True', '1.0', '1', '.3', 'numpy'])
def test_the_keyword_on_learner(value, eps):
    "True is the default and 1.0 is an eps of 1"
    loss = CrossEntropyLossFlat()
    learn = single(loss, label_smoothing=value)
    assert isinstance(learn.loss_func, LabelSmoothingCrossEntropyFlat)
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=eps))
    close(learn.loss_func(X, Y), ce(X, Y))
    assert learn.to_hard().loss_func is loss


@pytest.mark.parametrize('kwargs', [dict(label_smoothing=None), dict(label_smoothing=False), {}])
def test_none_and_false_are_off(kwargs):
    loss = CrossEntropyLossFlat()
    learn = single(loss, **kwargs)
    assert learn.loss_func is loss
    with pytest.raises(ValueError): learn.to_hard()


def test_zero_is_an_eps_of_zero():
    close(train_loss(single(label_smoothing=0.), X, Y), ce(X, Y))


@pytest.mark.parametrize('value', [1.5, -.1, float('nan')])
def test_a_bad_value_of_the_keyword(value):
    with pytest.raises(ValueError, match=str(value)): single(label_smoothing=value)


@pytest.mark.parametrize('value', ['much', [.1]])
def test_no_number_at_all(value):
    with pytest.raises((TypeError, ValueError)): single(label_smoothing=value)


@pytest.mark.parametrize('value,eps', [(True, .05), (.2, .2)])
def test_the_keyword_on_a_sigmoid_loss(value, eps):
    learn = multi(label_smoothing=value)
    assert [cb.eps for cb in callbacks_of(learn)] == [eps]
    train, _ = batches_of(learn)
    for pred, y, loss in train: close(loss, bce(pred, y*(1-2*eps)+eps))
    with pytest.raises(ValueError): multi(label_smoothing=1.)


def test_the_keyword_with_positional_arguments_and_callbacks():
    spy = Spy(lambda l: 1, 'before_batch')
    learn = Learner(single_dls(), mlp(k=4), CrossEntropyLossFlat(), SGD, .1, cbs=[spy], metrics=accuracy,
                    label_smoothing=.3)
    quiet(learn).fit(1)
    assert len(spy.seen) == 4 and learn.lr == .1 and learn.recorder.metric_names[3] == 'accuracy'
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.3))


def test_a_subclass_of_learner():
    class MyLearner(Learner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.mine = True
    learn = MyLearner(single_dls(), mlp(k=4), CrossEntropyLossFlat(), label_smoothing=.3)
    assert learn.mine
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.3))


class SetsItsLoss(Learner):
    def __init__(self, *args, own=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_func = ifnone(own, CrossEntropyLossFlat(weight=tensor([1., 2., 3., 4.])))


class SetsItAgain(SetsItsLoss):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_func = nn.CrossEntropyLoss(ignore_index=2)


class SetsNothing(SetsItAgain): pass


class Mixin:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_func = nn.CrossEntropyLoss(ignore_index=2)


class IsMixed(Mixin, Learner): pass


class IsPatched(Learner): pass


def _patched_init(self, *args, **kwargs):
    Learner.__init__(self, *args, **kwargs)
    self.loss_func = nn.CrossEntropyLoss(ignore_index=2)


IsPatched.__init__ = _patched_init


@pytest.mark.parametrize('cls', [SetsItsLoss, SetsItAgain, SetsNothing, IsMixed, IsPatched])
def test_a_subclass_that_sets_its_loss_is_smoothed_too(cls):
    "When it trains; the flag is never accepted and ignored"
    learn = quiet(cls(single_dls(), mlp(k=4), CrossEntropyLossFlat(), SGD, label_smoothing=.3))
    own = learn.loss_func
    kwargs = dict(weight=own.func.weight) if cls is SetsItsLoss else dict(ignore_index=2)
    for pred, y, loss in batches_of(learn)[0]: close(loss, ce(pred, y, label_smoothing=.3, **kwargs))
    assert learn.loss_func.hard is own and learn.to_hard().loss_func is own
    for pred, y, loss in batches_of(learn)[0]: close(loss, ce(pred, y, **kwargs))
    assert type(cls(single_dls(), mlp(k=4), CrossEntropyLossFlat()).loss_func) in (CrossEntropyLossFlat, nn.CrossEntropyLoss)


def test_a_subclass_whose_own_loss_cannot_be_smoothed():
    learn = quiet(SetsItsLoss(single_dls(), mlp(k=4), CrossEntropyLossFlat(), own=FocalLossFlat(), label_smoothing=.3))
    with pytest.raises(TypeError, match='label_smoothing=0.3.*FocalLossFlat'): learn.fit(1)
    learn.to_hard().fit(1)
    learn = quiet(SetsItsLoss(multi_dls(), mlp(), CrossEntropyLossFlat(), own=BCEWithLogitsLossFlat(), label_smoothing=.2))
    learn.fit(1)
    assert [cb.eps for cb in callbacks_of(learn)] == [.2]


class LooksAtItsLoss(Learner):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_func.eps = .2


def test_a_subclass_sees_the_smoothed_loss_in_its_init():
    learn = quiet(LooksAtItsLoss(single_dls(), mlp(k=4), CrossEntropyLossFlat(), label_smoothing=.3))
    learn.fit(1)
    assert learn.loss_func.eps == .2


def test_an_unknown_keyword_is_still_an_error():
    with pytest.raises(TypeError): single(label_smooth=.1)


@pytest.mark.parametrize('kwargs,eps', [(dict(label_smoothing=.3), .3), (dict(label_smoothing=True), .1), ({}, None)])
def test_vision_learner(digits, kwargs, eps):
    learn = vision_learner(digits, tiny_arch, pretrained=False, metrics=accuracy, **kwargs)
    assert learn.n_out == 10 and learn.arch is tiny_arch
    if eps is None: assert type(learn.loss_func) is CrossEntropyLossFlat
    else: close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=eps))


def test_vision_learner_positional():
    "dls, arch, normalize, n_out, pretrained: as fastai's"
    learn = vision_learner(tensor_dls(torch.randn(8, 3, 32, 32), torch.zeros(8).long()), tiny_arch, False, 3, False,
                           loss_func=nn.CrossEntropyLoss(), label_smoothing=.2)
    assert learn.n_out == 3
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.2))


def test_vision_learner_multi_label(pairs):
    learn = vision_learner(pairs, tiny_arch, pretrained=False, label_smoothing=.2)
    assert [cb.eps for cb in callbacks_of(learn)] == [.2]


def test_the_patched_functions_pickle():
    for f in (vision_learner, unet_learner):
        assert pickle.loads(pickle.dumps(f)) is f
    assert vision_learner.__name__ == 'vision_learner' and vision_learner.__doc__


def test_unet_learner(segmentation):
    learn = quiet(unet_learner(segmentation, tiny_arch, pretrained=False, label_smoothing=.2,
                               loss_func=CrossEntropyLossFlat(axis=1, ignore_index=VOID)))
    train, valid = batches_of(learn)
    for pred, y, loss in train: close(loss, ce(pred, y.long(), ignore_index=VOID, label_smoothing=.2))
    for pred, y, loss in valid: close(loss, ce(pred, y.long(), ignore_index=VOID))
    assert learn.predict(segmentation.valid_ds.items[0])[0].shape == (32, 32)
    # get_preds(with_loss=True) under fastai's own loss: a mean over each image's pixels
    losses = learn.get_preds(with_loss=True)[2]
    pred, y = (torch.cat([o[i] for o in valid]) for i in (0, 1))
    learn.show_results(); plt.close('all')
    assert losses.shape == (4,) and torch.isfinite(losses).all()


def test_tabular_learner():
    df = tabular_frame()
    learn = quiet(tabular_learner(tabular_dls(df), layers=[8], metrics=accuracy, label_smoothing=.2))
    train, valid = batches_of(learn)
    for pred, y, loss in train: close(loss, ce(pred, y.view(-1).long(), label_smoothing=.2))
    for pred, y, loss in valid: close(loss, ce(pred, y.view(-1).long()))
    row, decoded, probs = learn.predict(df.iloc[0])
    assert probs.shape == (3,) and decoded.item() == probs.argmax().item()
    learn.show_results()


def test_tabular_learner_multi_label():
    dls = tabular_multi_dls(tabular_frame())
    learn = quiet(tabular_learner(dls, layers=[8], metrics=accuracy_multi, label_smoothing=.2))
    train, valid = batches_of(learn)
    for pred, y, loss in train: close(loss, bce(pred, y.float()*.6+.2))
    for pred, y, loss in valid: close(loss, bce(pred, y.float()))


def test_text_classifier_learner():
    learn = quiet(text_classifier_learner(text_dls(), AWD_LSTM, config=small_clas_config(), pretrained=False,
                                          label_smoothing=.2))
    train, valid = batches_of(learn)
    for pred, y, loss in train: close(loss, ce(pred, y, label_smoothing=.2))
    for pred, y, loss in valid: close(loss, ce(pred, y))


def test_language_model_learner():
    "(bs,seq,V) logits, and the RNN's regularisers beside"
    learn = quiet(language_model_learner(lm_dls(), AWD_LSTM, config=small_lm_config(), pretrained=False,
                                         label_smoothing=.2))
    train, valid = batches_of(learn)
    for pred, y, loss in train: close(loss, ce(pred.flatten(0, 1), y.flatten(), label_smoothing=.2))
    for pred, y, loss in valid: close(loss, ce(pred.flatten(0, 1), y.flatten()))
    losses = learn.get_preds(with_loss=True, reorder=False)[-1]
    assert torch.isfinite(losses).all()


# ---------------------------------------------------------------- multi-hot floats under a loss of one class

@pytest.mark.parametrize('make', [
    lambda: LabelSmoothingCrossEntropyFlat(.1), lambda: CrossEntropyLossFlat(), lambda: nn.CrossEntropyLoss()], ids=['ours', 'flat', 'torch'])
def test_multi_hot_floats_under_a_loss_of_one_class(make):
    "What fastai's MultiCategoryBlock gives: the first batch says what to use, and nothing is trained"
    learn = multi(make())
    if not isinstance(learn.loss_func, LabelSmoothingCrossEntropyFlat): learn.to_smooth()
    before = weights(learn).clone()
    for _ in range(2):
        with pytest.raises(ValueError, match='sum to 1.*multi_hot=True.*LabelSmoothingBCEWithLogitsFlat'): learn.fit(1)
    assert torch.equal(weights(learn), before)


def test_soft_targets_that_sum_to_one_train():
    y = logits(64, 4).softmax(1)
    learn = tensor_learner(tensor_dls(logits(64, 6, seed=1), y, bs=16), mlp(k=4), CrossEntropyLossFlat()).to_smooth(.2)
    for pred, y, loss in batches_of(learn)[0]: close(loss, ce(pred, y, label_smoothing=.2))


# ---------------------------------------------------------------- prior='train'

def smooth_with(prior, x, y, eps):
    q = (1-eps)*F.one_hot(y, len(prior)) + eps*prior
    return -(q*x.log_softmax(1)).sum(1).mean()


def frequencies(labels, k):
    return torch.bincount(torch.as_tensor(labels).reshape(-1).long(), minlength=k).double()/len(labels)


def test_prior_of_images_counts_labels_and_opens_no_image(digits, monkeypatch):
    folders = [p.parent for p in digits.train_ds.items]
    prior = frequencies([int(f.name) for f in folders], 10).float()
    assert {f.parent.name for f in folders} == {'train'} and prior.unique().numel() > 1
    def opened(*args, **kwargs): raise AssertionError('an image was opened')
    with monkeypatch.context() as m:
        m.setattr(PILImage, 'create', opened)
        m.setattr(Image, 'open', opened)
        learn = quiet(Learner(digits, flat_mlp(10))).to_smooth(.2, prior='train')
    x, y = logits(5, 10), tensor([0, 3, 9, 4, 4])
    close(train_loss(learn, x, y), smooth_with(prior, x, y, .2))
    close(learn.loss_func(x, y), ce(x, y))


def test_prior_of_multi_label_images(pairs):
    "One frequency a label; they need not sum to one"
    vocab = list(pairs.vocab)
    labels = [str(o).split() for o in pairs.train_ds.items['labels']]
    prior = tensor([sum(v in o for o in labels)/len(labels) for v in vocab])
    assert 1.5 < prior.sum() <= 2
    q, y = (Spy(lambda l: l.yb[0].clone(), e, order=99) for e in ('before_backward', 'before_batch'))
    learn = quiet(Learner(pairs, nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))))
    learn.to_smooth(.2, prior='train').fit(1, cbs=[q, y])
    for a, b in zip(q.train(), y.train()): close(a, .6*b + .4*prior)


def test_prior_of_segmentation_counts_pixels_that_are_not_void(segmentation, segment_data):
    _, masks = segment_data
    known = masks[:-4][masks[:-4] != VOID]
    prior = frequencies(known, 3).float()
    learn = tensor_learner(segmentation, nn.Conv2d(3, 3, 1), CrossEntropyLossFlat(axis=1, ignore_index=VOID))
    learn.to_smooth(.2, prior='train')
    x, y = logits(2, 3, 4, 4), torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    y[0, 0] = VOID
    keep = (y != VOID).reshape(-1)
    xs, ys = x.movedim(1, -1).reshape(-1, 3)[keep], y.reshape(-1)[keep]
    close(train_loss(learn, x, y), smooth_with(prior, xs, ys, .2))


def test_prior_of_tabular():
    df = tabular_frame()
    dls = tabular_dls(df)
    learn = quiet(tabular_learner(dls, layers=[4])).to_smooth(.2, prior='train')
    prior = tensor([(df.kind[:60] == v).mean() for v in dls.vocab]).float()
    x, y = logits(5, 3), tensor([0, 1, 2, 1, 1])
    close(train_loss(learn, x, y[:, None].to(torch.int8)), smooth_with(prior, x, y, .2))


def test_prior_of_tabular_multi_label():
    df = tabular_frame()
    prior = tensor([df[c][:60].mean() for c in MULTI_COLS]).float()
    q, y = (Spy(lambda l: l.yb[0].clone(), e, order=99) for e in ('before_backward', 'before_batch'))
    learn = quiet(tabular_learner(tabular_multi_dls(df), layers=[4])).to_smooth(.2, prior='train')
    learn.fit(1, cbs=[q, y])
    for a, b in zip(q.train(), y.train()): close(a, .6*b + .4*prior)


def test_prior_of_text_classes():
    learn = quiet(text_classifier_learner(text_dls(), AWD_LSTM, config=small_clas_config(), pretrained=False))
    learn.to_smooth(.2, prior='train')
    prior = tensor([sum('cat' in t for t in TEXTS[:-4]), sum('cat' not in t for t in TEXTS[:-4])])/len(TEXTS[:-4])
    x, y = logits(4, 2), tensor([0, 1, 1, 0])
    close(train_loss(learn, x, y), smooth_with(prior, x, y, .2))


def test_prior_of_a_language_model_counts_tokens():
    dls = lm_dls()
    learn = quiet(language_model_learner(dls, AWD_LSTM, config=small_lm_config(), pretrained=False))
    learn.to_smooth(.2, prior='train')
    words = [w for t in TEXTS[:-4] for w in t.split()]
    prior = tensor([words.count(v) for v in dls.vocab])/len(words)
    assert prior[VOCAB.index('never')] == 0
    # the gradient at equal logits is p - q = 1/V - (.8*y + .2*prior)
    n = len(dls.vocab)
    x = torch.zeros(1, 1, n, requires_grad=True)
    learn.loss_func(x, tensor([[0]])).backward()
    counted = (1/n - x.grad[0, 0] - .8*F.one_hot(tensor(0), n))/.2
    # whether the two ends of the stream count as targets is a matter of a token or two in 200
    close(counted, prior, atol=.01)
    assert (counted-1/n).abs().max() > .1 and abs(counted.sum()-1) < 1e-4


@pytest.mark.parametrize('channels,logit_shape', [(2, (2, 4, 3)), (None, (4, 3)), (None, (1, 4, 3))])
def test_prior_of_masks_for_a_sigmoid_loss(channels, logit_shape):
    "One frequency a channel of (N,C,H,W), and one of (N,H,W) masks, whose logits may be (N,1,H,W)"
    shape = (4, 3) if channels is None else (channels, 4, 3)
    y = (torch.rand(16, *shape, generator=torch.Generator().manual_seed(0)) < tensor([.2, .6, .9])).float()
    prior = y.mean() if channels is None else y.mean((0, 2, 3)).reshape(2, 1, 1)
    dsets = Datasets(range(16), [[lambda i: torch.full(logit_shape, float(i))], [y.__getitem__]], splits=[range(16), range(4)])
    learn = tensor_learner(dsets.dataloaders(bs=4, num_workers=0, device=CPU), Scaled(), BCEWithLogitsLossFlat()).to_smooth(.2, prior='train')
    q = Spy(lambda l: (l.yb[0].clone(), l.pred.shape), 'before_backward', order=99)
    hard = Spy(lambda l: l.yb[0].clone(), 'before_batch')
    learn.fit(1, cbs=[q, hard])
    for (smoothed, pred), y in zip(q.train(), hard.train()):
        close(smoothed, .6*y + .4*prior)
        assert pred[1:] == logit_shape


@pytest.mark.parametrize('how', ['to_smooth', 'callback'])
def test_prior_of_labels_along_an_axis_that_the_loss_was_given(how):
    y = (torch.rand(16, 4, 3, generator=torch.Generator().manual_seed(0)) < tensor([.2, .6, .9])).float()
    dsets = Datasets(range(16), [[lambda i: torch.full((4, 3), float(i))], [y.__getitem__]], splits=[range(16), range(4)])
    learn = tensor_learner(dsets.dataloaders(bs=4, num_workers=0, device=CPU), Scaled(), BCEWithLogitsLossFlat(axis=2))
    if how == 'to_smooth': learn.to_smooth(.2, prior='train')
    else: learn.add_cb(MultiLabelSmoothingCallback(.2, 'train'))
    q, hard = Spy(lambda l: l.yb[0].clone(), 'before_backward', order=99), Spy(lambda l: l.yb[0].clone(), 'before_batch')
    learn.fit(1, cbs=[q, hard])
    for smoothed, o in zip(q.train(), hard.train()): close(smoothed, .6*o + .4*y.mean((0, 1)))


class Scaled(nn.Module):
    def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(()))
    def forward(self, x): return x*self.scale


def test_no_labels_to_count():
    learn = single()
    with pytest.raises(TypeError, match='(?i)tensor'): learn.to_smooth(prior='train')
    with pytest.raises((ValueError, TypeError)): learn.to_smooth(prior='test')
    assert type(learn.loss_func) is CrossEntropyLossFlat


# ---------------------------------------------------------------- with fastai's callbacks

class CPUMixedPrecision(MixedPrecision):
    "fastai's asks for autocast('cuda'), which does nothing on a CPU"
    def before_fit(self):
        self.autocast, self.scales = autocast('cpu', dtype=torch.float16), L()
        self.learn.scaler = GradScaler('cpu', init_scale=2.**10)


@pytest.mark.parametrize('first', ['to_smooth', 'to_fp16'])
@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
def test_before_and_after_to_fp16(kind, first):
    learn, eps = (single(), .3) if kind == 'softmax' else (multi(), .25)
    steps = [lambda: learn.to_smooth(eps), lambda: learn.to_fp16()]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # no CUDA here
        for step in steps if first == 'to_smooth' else steps[::-1]: assert step() is learn
        train, valid = batches_of(learn)
    for pred, y, loss in train:
        close(loss, ce(pred, y, label_smoothing=eps) if kind == 'softmax' else bce(pred, y*(1-2*eps)+eps))
    for pred, y, loss in valid: close(loss, ce(pred, y) if kind == 'softmax' else bce(pred, y))
    learn.to_fp32().to_hard()


@pytest.mark.parametrize('smooth_valid', [False, True])
def test_real_half_precision(smooth_valid):
    "The loss is computed in float32, and the training is that of torch's own loss to half precision"
    ours = single(cbs=CPUMixedPrecision()).to_smooth(.3, smooth_valid=smooth_valid)
    theirs = single(nn.CrossEntropyLoss(label_smoothing=.3), cbs=CPUMixedPrecision())
    dtypes = Spy(lambda l: l.loss.dtype, 'after_batch')
    fit_seeded(ours, 2, cbs=dtypes); fit_seeded(theirs, 2)
    assert set(dtypes.train()+dtypes.valid()) == {torch.float32}
    close(weights(ours), weights(theirs), atol=1e-3)


@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('first', ['to_smooth', 'mix'])
def test_with_mixup_and_cutmix(first, mix):
    "EVIDENCE row 4: lam of one smoothed loss and 1-lam of the other, in training; hard in validation"
    y = torch.randint(4, (32,), generator=torch.Generator().manual_seed(0))
    learn = tensor_learner(tensor_dls(logits(32, 1, 8, 8), y, bs=8), flat_mlp(4), CrossEntropyLossFlat())
    if first == 'to_smooth': learn.to_smooth(.3).add_cb(mix())
    else: learn.add_cb(mix()).to_smooth(.3)
    handler = learn.cbs[-1] if isinstance(learn.cbs[-1], mix) else learn.cbs.filter(risinstance(mix))[0]
    mixed = Spy(lambda l: (handler.lam.clone(), handler.yb1[0].clone()), 'after_batch', order=99)
    learn.add_cb(mixed)
    train, valid = batches_of(learn)
    f = partial(ce, label_smoothing=.3, reduction='none')
    for (pred, y, loss), (lam, y1) in zip(train, mixed.train()):
        close(loss, torch.lerp(f(pred, y1), f(pred, y), lam.to(pred.dtype)).mean())
    for pred, y, loss in valid: close(loss, ce(pred, y))
    assert isinstance(learn.loss_func, LabelSmoothingCrossEntropyFlat) and learn.loss_func.reduction == 'mean'
    assert type(learn.to_hard().loss_func) is CrossEntropyLossFlat


def test_to_hard_when_mixup_was_left_holding_the_loss():
    "EVIDENCE row 4: after an exception `learn.loss_func` is a bound method of MixUp"
    loss = CrossEntropyLossFlat()
    learn = single(loss).to_smooth(.3).add_cb(MixUp())
    with pytest.raises(RuntimeError): learn.fit(1, cbs=power_cut())
    assert inspect.ismethod(learn.loss_func)
    learn.to_hard()
    assert learn.loss_func is loss
    learn.fit(1)
    assert learn.loss_func is loss
    close(loss(X, Y), ce(X, Y))


def test_to_smooth_again_when_mixup_was_left_holding_the_loss():
    loss = CrossEntropyLossFlat()
    learn = single(loss).to_smooth(.3).add_cb(MixUp())
    with pytest.raises(RuntimeError): learn.fit(1, cbs=power_cut())
    learn.to_smooth(.2)
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.2))
    learn.fit(1)
    assert learn.to_hard().loss_func is loss


def at_batch(f, nth=1):
    "A callback that calls f(learn) once, after training batch `nth`"
    class Once(Callback):
        def after_batch(self):
            if self.training and self.train_iter == nth+1: f(self.learn)
    return Once()


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_to_smooth_while_mixup_trains(mix):
    "From the next batch on, mixed as before; and the loss is still there afterwards"
    y = torch.randint(4, (32,), generator=torch.Generator().manual_seed(0))
    original = CrossEntropyLossFlat()
    learn = tensor_learner(tensor_dls(logits(32, 1, 8, 8), y, bs=8), flat_mlp(4), original).add_cb(mix())
    handler = learn.cbs[-1]
    mixed = Spy(lambda l: (handler.lam.clone(), handler.yb1[0].clone()), 'after_batch', order=99)
    learn.add_cbs([mixed, at_batch(lambda l: l.to_smooth(.3))])
    train, valid = batches_of(learn)
    for i, ((pred, y, loss), (lam, y1)) in enumerate(zip(train, mixed.train())):
        f = partial(ce, label_smoothing=.3*(i > 1), reduction='none')
        close(loss, torch.lerp(f(pred, y1), f(pred, y), lam.to(pred.dtype)).mean())
    for pred, y, loss in valid: close(loss, ce(pred, y))
    assert learn.loss_func.eps == .3 and learn.to_hard().loss_func is original


def test_to_hard_while_mixup_trains():
    original = CrossEntropyLossFlat()
    learn = single(original).to_smooth(.3)
    learn.fit(1, cbs=[MixUp(), at_batch(lambda l: l.to_hard())])
    assert learn.loss_func is original


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
    close(learn.get_preds()[0], (learn.model(x[-300:])/learn.temperature).softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # that it keeps a temperature
        learn.fit(1, 0., cbs=[MixUp(), at_batch(lambda l: l.reset_temperature(), 0)])
    assert learn.temperature == 1. and learn.loss_func is installed


def test_to_smooth_of_another_learner_while_mixup_trains():
    "One whose own training an exception has ended"
    other = single().add_cb(MixUp())
    with pytest.raises(RuntimeError): other.fit(1, cbs=power_cut())
    single().fit(1, cbs=[MixUp(), at_batch(lambda l: other.to_smooth(.3))])
    assert other.loss_func.eps == .3


def test_mixup_on_a_multi_label_learner_keeps_its_loss():
    learn = multi().to_smooth(.2).add_cb(MixUp())
    train, valid = batches_of(learn)
    for pred, y, loss in train: close(loss, bce(pred, y*.6+.2))
    for pred, y, loss in valid: close(loss, bce(pred, y))


class Squeezed(nn.Module):
    "What fastai's flatten does, for a loss that doesn't"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x)[:, 0]


@pytest.mark.parametrize('dtype', [torch.float32, torch.long, torch.bool])
@pytest.mark.parametrize('prior', [None, tensor([.3])])
def test_a_classifier_with_one_logit(dtype, prior):
    "(N,1) logits, (N,) targets, which fastai's BCE takes: the same training as of (N,) logits by PyTorch's loss"
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=g), (torch.rand(64, generator=g) < .4)
    learn = tensor_learner(tensor_dls(x, y.to(dtype)), mlp(k=1), BCEWithLogitsLossFlat()).to_smooth(.2, prior=prior)
    shapes = Spy(lambda l: (l.pred.shape, l.yb[0].shape), 'before_backward', order=99)
    fit_seeded(learn, 2, cbs=shapes)
    assert set(shapes.train()) == {((16, 1), (16,))}
    q = y.float()*.6 + .4*ifnone(prior, tensor(.5))
    expected = fit_seeded(tensor_learner(tensor_dls(x, q), Squeezed(mlp(k=1)), nn.BCEWithLogitsLoss()), 2)
    close(weights(learn), weights(expected), atol=1e-5)
    hard = fit_seeded(tensor_learner(tensor_dls(x, y.float()), Squeezed(mlp(k=1)), nn.BCEWithLogitsLoss()), 2)
    assert (weights(learn)-weights(hard)).abs().max() > 1e-4


def test_weighted_loss_is_moved_and_trained():
    w = tensor([1., 2., 3., 4.])
    learn = single(CrossEntropyLossFlat(weight=w)).to_smooth(.3)
    train, valid = batches_of(learn)
    for pred, y, loss in train: close(loss, ce(pred, y, w, label_smoothing=.3))
    for pred, y, loss in valid: close(loss, ce(pred, y, w))


def test_lr_find_and_fine_tune(tmp_path):
    learn = single(path=tmp_path, splitter=lambda m: [list(m[0].parameters()), list(m[2].parameters())]).to_smooth(.3)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    learn.fine_tune(1, 1e-2)
    assert learn.loss_func.eps == .3 and learn.loss_func.reduction == 'mean'
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.3))


# ---------------------------------------------------------------- pickling and reloading

def pickled(o): return pickle.loads(pickle.dumps(o))


@pytest.mark.parametrize('kwargs', [{}, dict(smooth_valid=True), dict(prior=tensor([.4, .3, .2, .1])),
                                    dict(spread='others')])
@pytest.mark.parametrize('way', [pickled, deepcopy])
def test_a_smoothing_learner_pickles(way, kwargs):
    learn = single().to_smooth(.3, **kwargs)
    for _ in range(2):
        loaded = way(learn)
        close(train_loss(loaded, X, Y), train_loss(learn, X, Y))
        close(loaded.loss_func(X, Y), learn.loss_func(X, Y))
        assert type(loaded.to_hard().loss_func) is CrossEntropyLossFlat
        learn.fit(1)


def test_export_and_load(digits, tmp_path):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 10))
    learn = quiet(Learner(digits, model, path=tmp_path, metrics=accuracy)).to_smooth(.3)
    learn.fit(1)
    item = digits.valid_ds.items[0]
    before = learn.predict(item)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = quiet(load_learner(tmp_path/'export.pkl'))
    after = loaded.predict(item)
    assert before[0] == after[0]
    close(after[2], before[2])
    assert learn.loss_func.eps == loaded.loss_func.eps == .3
    # a validation loss on the machine that it was loaded on
    dl = learn.dls.valid
    close(loaded.validate(dl=dl)[0], learn.validate()[0])


def depth(f):
    n = 0
    while hasattr(f, '__wrapped__'): f, n = f.__wrapped__, n+1
    return n


@pytest.fixture
def put_back():
    "What reloading the module replaces, for the tests that come after"
    module, patched = dict(vars(fastai_smooth.learner)), ('__init__', 'to_smooth', 'to_hard')
    methods = {n: getattr(Learner, n) for n in patched}
    yield
    vars(fastai_smooth.learner).update(module)
    for n, f in methods.items(): setattr(Learner, n, f)


def test_reloading_the_module_patches_once(put_back):
    "As autoreload does in a notebook"
    original = CrossEntropyLossFlat()
    made_before = single(original, label_smoothing=.3)
    before = depth(Learner.__init__), depth(fastai_smooth.learner.vision_learner)
    signature = inspect.signature(Learner.__init__)
    for _ in range(3): importlib.reload(fastai_smooth.learner)
    assert (depth(Learner.__init__), depth(fastai_smooth.learner.vision_learner)) == before
    assert made_before.to_smooth(.2).to_hard().loss_func is original
    assert inspect.signature(Learner.__init__) == signature
    loss = CrossEntropyLossFlat()
    learn = single(loss, label_smoothing=.3)
    close(train_loss(learn, X, Y), ce(X, Y, label_smoothing=.3))
    assert learn.to_hard().loss_func is loss
    assert len(callbacks_of(multi(label_smoothing=.2))) == 1
    dls = tensor_dls(torch.randn(8, 3, 32, 32), torch.zeros(8).long())
    made = fastai_smooth.learner.vision_learner(dls, tiny_arch, n_out=4, pretrained=False, label_smoothing=.2,
                                                loss_func=nn.CrossEntropyLoss())
    close(train_loss(made, X, Y), ce(X, Y, label_smoothing=.2))
    f = fastai_smooth.learner.vision_learner
    assert pickle.loads(pickle.dumps(f)) is f


def test_multi_label_prior_that_cannot_be_counted_fails_at_once():
    "And leaves the Learner as it was"
    learn = multi()
    loss, cbs = learn.loss_func, list(learn.cbs)
    with pytest.raises(TypeError, match='prior'): learn.to_smooth(prior='train')
    assert learn.loss_func is loss and list(learn.cbs) == cbs
