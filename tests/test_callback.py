"""MultiLabelSmoothingCallback and LabelSmoothingScheduler, alone and where a callback of the user's validates or trains in the middle of a fit.

The reference is a loss that smooths its own targets: all that a user would write if fastai had no callbacks. Beside fastai's callbacks, and after
a fault at any event: test_callbacks_compose."""
import pickle, warnings
from copy import deepcopy
from fractions import Fraction

import cloudpickle, fastai.losses, fuzz, pytest
from fuzz import BAD_EPS, FLOATS, INF, NAN, Row, no_values
from hypothesis import strategies as st
from helpers import *

from fastai_smooth.all import (LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat, LabelSmoothingCrossEntropyFlat, LabelSmoothingScheduler,
                               MultiLabelSmoothingCallback)
from fastai_smooth.callback import _eps_owner
from fastai_smooth.smoothed import sigmoid_options

EPS = .125  # a power of two: 1-eps and eps are exact in every dtype, however the formula is grouped
PRIOR = tensor([.05, .1, .2, .3, .4])
PRIORS_OF_BOTH = torch.stack([PRIOR, 1-PRIOR])  # of negatives and of positives
bce = F.binary_cross_entropy_with_logits

class SelfSmoothing:
    "The reference: q = (1-2 eps) y + 2 eps u while the model trains, or of a pair e0 + (1-e0-e1) y, straight from the formula."
    def __init__(self, model, base, eps, u): self.model, self.base, self.eps, self.u = model, base, eps, u
    def smoothed(self, y):
        if isinstance(self.eps, tuple): return self.eps[0] + (1-self.eps[0]-self.eps[1])*y
        u = (1-y)*self.u[0] + y*self.u[1] if isinstance(self.u, Tensor) and self.u.dim() == 2 else self.u  # [2,K]: that of the label
        return (1-2*self.eps)*y + 2*self.eps*u
    def __call__(self, pred, y, **kwargs):
        y = y if y.is_floating_point() else y.to(pred.dtype)
        return self.base(pred, self.smoothed(y) if self.model.training else y, **kwargs)

def close(a, b, atol=1e-6, rtol=1e-6):
    a, b = (torch.as_tensor(o).detach().as_subclass(torch.Tensor) for o in (a, b))
    torch.testing.assert_close(a, b.to(a.dtype), atol=atol, rtol=rtol)

def hard(loss=None, cbs=(), dls=None, model=None, **kwargs):
    "A Learner on a hard loss, `cbs` added one by one, so in that order."
    learn = tensor_learner(dls or multi_dls(), model or mlp(), ifnone(loss, BCEWithLogitsLossFlat()), **kwargs)
    for cb in cbs: learn.add_cb(cb)
    return learn

def ours(loss=None, cbs=(), prior=None, **kwargs): return hard(loss, [MultiLabelSmoothingCallback(EPS, prior), *cbs], **kwargs)

def reference(loss=None, cbs=(), eps=EPS, u=.5, **kwargs):
    learn = hard(loss, cbs, **kwargs)
    learn.loss_func = SelfSmoothing(learn.model, learn.loss_func, eps, u)
    return learn

def same_training(a, b, n_epoch=2):
    "Fits both on the same random numbers; every gradient, weight and loss of the one is the other's."
    for learn in (a, b):
        learn.add_cb(Grads())
        learn.recorder.smooth_loss.beta = 0.  # record each batch's own loss
        fit_seeded(learn, n_epoch)
    assert len(a.grads.seen) == len(b.grads.seen) > 0
    for p, q in zip(a.grads.seen, b.grads.seen): close(p, q, atol=1e-6*q.abs().max().item())
    close(weights(a), weights(b))
    close(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses))
    for p, q in zip(a.recorder.values, b.recorder.values): close(tensor(p), tensor(q))

def at(event, f=lambda l: l.yb[0].clone(), order=99): return Spy(f, event, order=order)

# ---------------------------------------------------------------- what is trained on, logged and shown

class Logits(nn.Module):
    "Its weights are the logits, whatever comes in: the gradient of a weight is the gradient of a logit."
    def __init__(self, w): super().__init__(); self.w = nn.Parameter(w)
    def forward(self, x): return self.w + 0*x.sum()

def test_gradient_and_loss_by_hand():
    """logits [2,-1], y [1,0], eps .1: q = [.9, .1]; loss (.326928+.413262)/2 = .370095;
    gradient (sigmoid(2)-.9)/2 = -.009601 and (sigmoid(-1)-.1)/2 = .084471 (both worked out in test_losses.py)."""
    dls, loss = tensor_dls(torch.zeros(2, 1), tensor([[1., 0.]]*2), bs=1, n_valid=1), at('after_batch', lambda l: l.loss.item())
    learn = hard(dls=dls, model=Logits(tensor([[2., -1.]])), cbs=[MultiLabelSmoothingCallback(.1), Grads(), loss])
    learn.fit(1, 0.)
    close(learn.grads.seen[0], tensor([-.009601, .084471]), atol=2e-6)
    close(loss.train()[0], .370095, atol=2e-6)

def test_default_eps_is_a_twentieth(): same_training(hard(cbs=[MultiLabelSmoothingCallback]), reference(eps=.05))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bool, torch.uint8, torch.int64])
def test_smoothed_targets_keep_their_class_and_a_floating_dtype(dtype):
    "Integers and bools take the dtype of the predictions; a soft label lies in between"
    y = (torch.rand(8, 5) if dtype.is_floating_point else torch.rand(8, 5) < .5).to(dtype)
    dls, before = tensor_dls(torch.randn(8, 6), y.as_subclass(TensorMultiCategory), bs=4), at('before_batch')
    q = at('before_backward', lambda l: l.yb[0])
    ours(lambda pred, y: bce(pred, y.as_subclass(Tensor).float()), [q, before], dls=dls).remove_cb(CastToTensor).fit(1)
    assert len(q.train()) > 0
    for a, b in zip(before.train(), q.train()):
        assert type(b) is TensorMultiCategory and b.dtype == (dtype if dtype.is_floating_point else torch.float32)
        close(b.float(), a.as_subclass(torch.Tensor).float()*.75+.125, atol=1e-3)

def test_recorder_and_others_see_the_smoothed_training_and_the_hard_validation_loss():
    batch = at('after_batch', lambda l: (l.pred.detach().clone(), l.yb[0].clone(), l.loss.item(), l.loss_grad.item()))
    learn = ours(cbs=[batch])
    learn.recorder.smooth_loss.beta = 0.
    fit_seeded(learn, 1)
    assert len(learn.recorder.losses) == len(batch.train()) > 1
    for logged, (pred, y, loss, loss_grad) in zip(learn.recorder.losses, batch.train()):
        for o in (logged, loss, loss_grad): close(o, bce(pred, y*.75+.125))
        assert set(y.unique().tolist()) == {0., 1.} and abs(loss - bce(pred, y)) > 1e-4
    pred, y = (torch.cat([o[i] for o in batch.valid()]) for i in (0, 1))
    close(learn.recorder.values[-1][1], bce(pred, y))

def test_validation_is_untouched():
    a, b = ours(), hard()
    assert a.validate()[0] == b.validate()[0]
    for p, q in zip(a.get_preds(with_loss=True), b.get_preds(with_loss=True)): assert torch.equal(p, q)

# ---------------------------------------------------------------- what others do to the loss

class Changes(Callback):
    "Of a user: changes `loss_grad`"
    def __init__(self, f, event='after_loss', order=0):
        self.f, self.order = f, order
        setattr(self, event, self._change)
    def _change(self):
        if self.training: self.learn.loss_grad = self.f(self.learn.loss_grad, self.learn)

def of_weights(learn): return .01*sum(p.pow(2).sum() for p in learn.model.parameters())
def of_preds(learn): return .05*learn.pred.pow(2).mean()

CHANGES = dict(
    factor=lambda l, learn: l*3, factor_in_place=lambda l, learn: l.mul_(3), term=lambda l, learn: l + of_weights(learn),
    term_in_place=lambda l, learn: l.add_(of_preds(learn)), distillation=lambda l, learn: .5*l + .5*of_preds(learn),
    flooding=lambda l, learn: (l-.9).abs() + .9)

@pytest.mark.parametrize('place', [('after_loss', -1e9), ('after_loss', -100), ('after_loss', 0), ('before_backward', 20)], ids=str)
@pytest.mark.parametrize('name', CHANGES)
def test_what_others_do_to_the_loss_is_done_to_the_smoothed_one(name, place):
    "Whatever their order, before fastai's callbacks, or late as MixedPrecision"
    learn = ours(cbs=[Changes(CHANGES[name], *place)])
    same_training(learn, reference(cbs=[Changes(CHANGES[name], *place)]))
    assert (weights(learn)-weights(fit_seeded(ours()))).abs().max() > 1e-6

def test_a_loss_put_in_the_place_of_loss_grad_is_an_error():
    "Nothing of the smoothed loss is left: told, rather than accepted and ignored"
    learn = ours(cbs=[Changes(lambda l, learn: F.mse_loss(learn.pred, learn.y))])
    before = weights(learn).clone()
    with pytest.raises(RuntimeError, match='loss_grad'): learn.fit(1)
    assert torch.equal(weights(learn), before)

# ---------------------------------------------------------------- losses, targets and priors

class FocalBCE:
    "A user's own loss that takes float targets"
    def __call__(self, pred, y): return (bce(pred, y, reduction='none')*(y-pred.sigmoid()).pow(2)).mean()

LOSSES = dict(
    pos_weight=lambda: BCEWithLogitsLossFlat(pos_weight=tensor([1., 2., 3., .5, 1.]), thresh=.3), module=nn.BCEWithLogitsLoss, own=FocalBCE,
    function=lambda: bce, mse=MSELossFlat, summed=lambda: BCEWithLogitsLossFlat(reduction='sum'))

@pytest.mark.parametrize('name', LOSSES)
def test_any_loss_of_float_targets(name):
    learn = ours(loss := LOSSES[name]())
    same_training(learn, reference(LOSSES[name]()))
    assert learn.loss_func is loss

# ---------------------------------------------------------------- the kernel in the place of the loss

class OwnBCE(nn.BCEWithLogitsLoss): "A user's, which the callback calls, whatever it may do"

class Flattened:
    "As `BCEWithLogitsLossFlat`, which the callback does not know"
    def __init__(self, **kwargs): self.func = OwnBCE(**kwargs)
    def __call__(self, pred, y): return self.func(pred, y.to(pred.dtype).reshape(pred.shape))

W5 = tensor([1., 2., 3., .5, 1.])
FUSED = {   # the loss, and the same one that is called
    'flat': (BCEWithLogitsLossFlat, Flattened), 'torch': (nn.BCEWithLogitsLoss, OwnBCE), 'sum': (lambda: BCEWithLogitsLossFlat(reduction='sum'), lambda: Flattened(reduction='sum')),
    'pos_weight': (lambda: BCEWithLogitsLossFlat(pos_weight=W5, thresh=.3), lambda: Flattened(pos_weight=W5)),
    'torch, sum, pos_weight': (lambda: nn.BCEWithLogitsLoss(pos_weight=W5[None], reduction='sum'), lambda: OwnBCE(pos_weight=W5, reduction='sum')),
    'one pos_weight': (lambda: nn.BCEWithLogitsLoss(pos_weight=tensor(2.)), lambda: OwnBCE(pos_weight=tensor(2.)))}
SMOOTHINGS = {'eps': (EPS, None), 'half': (.5, None), 'pair': ((.25, .0625), None), 'prior': (EPS, PRIOR), 'priors': (EPS, PRIORS_OF_BOTH), 'train': (EPS, 'train'), 'online': (.25, 'online')}

def fused_calls(monkeypatch):
    "The targets that the kernel is given behind the callback"
    import fastai_smooth.callback as module
    seen, kernel = [], module.binary_cross_entropy
    monkeypatch.setattr(module, 'binary_cross_entropy', lambda x, y, *args: seen.append(y) or kernel(x, y, *args))
    return seen

class Doubles(Callback):
    "Inputs in float64"
    def before_batch(self): self.learn.xb = tuple(o.double() for o in self.xb)

def steps_in_float64(learn):
    "Losses, gradients and weights, without fastai's Recorder, which takes no losses in float64"
    learn.remove_cb(Recorder).model.double()
    losses = at('after_batch', lambda l: l.loss.detach().clone())
    fit_seeded(learn.add_cbs([Doubles(), losses, Grads()]), 2)
    return [*losses.train(), *learn.grads.seen, weights(learn)]

ACCUMULATION = partial(GradientAccumulation, 32)
KERNEL_CASES = [(n, o, []) for n in FUSED for o in SMOOTHINGS] + [('flat', o, [cb]) for o in SMOOTHINGS for cb in (MixUp, ACCUMULATION)] + [
    (n, 'pair', [cb]) for n in FUSED for cb in (MixUp, ACCUMULATION)]

@pytest.mark.filterwarnings('ignore:eps=0.5')
@pytest.mark.parametrize('name,smoothing,cbs', KERNEL_CASES)
def test_the_kernel_trains_as_the_loss_does(name, smoothing, cbs, monkeypatch):
    "gradients, weights and losses to 1e-6; in float64 to 1e-12. The one is not called where the other is"
    seen, (fused, called), (eps, prior) = fused_calls(monkeypatch), FUSED[name], SMOOTHINGS[smoothing]
    def make(loss, **kwargs):
        cb = MultiLabelSmoothingCallback(eps, None if prior == 'train' else prior)
        learn = hard(loss, [cb, *(o() for o in cbs)], multi_dls(**kwargs))
        if prior == 'train': cb.prior = PRIOR
        return learn
    a, b = make(fused()), make(called())
    same_training(a, b)
    assert len(seen) == 6
    if MixUp in cbs: return   # which mixes in float32
    a, b = (steps_in_float64(make(o(), dtype=torch.float64)) for o in (fused, called))   # fastai's loss would make these targets float32
    assert len(seen) == 12 and len(a) > 8 and a[0].dtype == torch.float64
    for p, q in zip(a, b, strict=True): close(p, q, 1e-12, 1e-12)

@pytest.mark.parametrize('dtype', [torch.uint8, torch.bool, torch.int64, torch.float64])
def test_the_kernel_takes_labels_as_they_are(dtype, monkeypatch):
    seen = fused_calls(monkeypatch)
    x, y = map(torch.stack, zip(*multi_dls(dtype=dtype).train.dataset, *multi_dls(dtype=dtype).valid.dataset))
    same_training(ours(dls=tensor_dls(x, y.as_subclass(TensorMultiCategory))).remove_cb(CastToTensor), reference(dls=multi_dls(dtype=torch.float32)))
    assert {o.dtype for o in seen} == {dtype} and {type(o) for o in seen} == {Tensor}

@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_the_kernel_under_autocast(dtype, tol, monkeypatch):
    "of predictions in half precision: no further from the right ones than the loss is"
    def half(loss):
        class Cast(Callback):
            def before_batch(self): self.ctx = torch.autocast('cpu', dtype); self.ctx.__enter__()
            def after_loss(self): self.ctx.__exit__(None, None, None)
        return fit_seeded(ours(loss, cbs=[Cast(), Grads()]), 1)
    seen = fused_calls(monkeypatch)
    a, b = half(nn.BCEWithLogitsLoss()), half(OwnBCE())
    assert len(seen) == 3
    for p, q in zip(a.grads.seen, b.grads.seen): close(p, q, atol=tol*q.abs().max().item())
    close(torch.stack(a.recorder.losses).float(), torch.stack(b.recorder.losses).float(), atol=4*tol)

NOT_FUSED = dict(
    weight=lambda: BCEWithLogitsLossFlat(weight=tensor(2.)), subclass=OwnBCE, axis=lambda: BCEWithLogitsLossFlat(axis=0), function=lambda: bce,
    own_func=lambda: setattr(loss := BCEWithLogitsLossFlat(), 'func', OwnBCE()) or loss, focal=FocalBCE, fastai=MSELossFlat,
    none=lambda: type('Meaned', (), dict(loss=nn.BCEWithLogitsLoss(reduction='none'), __call__=lambda self, x, y: self.loss(x, y).mean()))())

@pytest.mark.parametrize('name', NOT_FUSED)
def test_any_other_loss_is_called(name, monkeypatch):
    seen = fused_calls(monkeypatch)
    same_training(ours(NOT_FUSED[name]()), reference(NOT_FUSED[name]()))
    assert not seen

def test_pos_weight_that_does_not_broadcast_to_the_logits_is_left_to_the_loss():
    for w, shape, flat, fused in ((W5, (8, 5), False, True), (W5[None], (8, 5), False, True), (tensor(2.), (8, 5), False, True), (W5[None, None], (8, 5), False, False),
                                  (W5, (8, 1), False, False), (W5[:, None], (5, 5), False, True), (W5, (8, 5), True, False), (tensor([2.]), (8, 5), True, True)):
        loss = BCEWithLogitsLossFlat(pos_weight=w)
        loss.flatten = flat
        for o in (loss, nn.BCEWithLogitsLoss(pos_weight=w)):
            if not (flat and o is not loss): assert (sigmoid_options(o, torch.Size(shape)) is not None) == fused, (w.shape, shape, flat)
        if fused: assert sigmoid_options(loss, torch.Size(shape)) == (w, 'mean')

def test_integer_targets(): same_training(ours(dls=multi_dls(dtype=torch.int64)), reference(dls=multi_dls(dtype=torch.int64)))

def test_a_prior_for_each_label():
    "q = (1-2 eps) y + 2 eps prior; it may be set later"
    same_training(ours(prior=PRIOR), reference(u=PRIOR))
    cb = MultiLabelSmoothingCallback(.4)
    cb.eps, cb.prior = EPS, tensor([.25]*5)
    same_training(hard(cbs=[cb]), reference(u=.25))

def test_a_prior_of_negatives_and_one_of_positives(): same_training(ours(prior=PRIORS_OF_BOTH), reference(u=PRIORS_OF_BOTH))

@pytest.mark.parametrize('eps', [(.25, 0.), (0., .25), (.5, .125), [.25, 0.], np.array([.25, 0.])], ids=str)
def test_a_pair_smooths_negatives_and_positives_by_themselves(eps):
    "q = e0 + (1-e0-e1) y; also of soft labels, and set later"
    pair, later = tuple(eps), MultiLabelSmoothingCallback()
    later.eps = eps
    for cb in (MultiLabelSmoothingCallback(eps), later): same_training(hard(cbs=[cb]), reference(eps=pair))
    mixed = [hard(cbs=[MixUp(), MultiLabelSmoothingCallback(eps)]), reference(eps=pair, cbs=[MixUp()])]
    same_training(*mixed)

def test_a_pair_takes_no_prior():
    "Neither when it is made, nor when either is set; then it is as it was"
    for prior in (PRIOR, PRIORS_OF_BOTH, 'train'):
        with pytest.raises(ValueError, match=r'eps=\(0.1, 0\).*takes no prior'): MultiLabelSmoothingCallback((.1, 0.), prior)
        with_prior, pair = MultiLabelSmoothingCallback(EPS, prior), MultiLabelSmoothingCallback((.1, 0.))
        with pytest.raises(ValueError, match='takes no prior'): with_prior.eps = .1, 0.
        with pytest.raises(ValueError, match='takes no prior'): pair.prior = prior
        assert with_prior.eps == EPS and pair.eps == (.1, 0.) and pair.prior is None
        with_prior.prior, pair.eps = None, EPS
        with_prior.eps, pair.prior = (.1, 0.), prior
    for bad in ((.6, .5), (-.1, 0.), (.1, NAN), (.1,), (.1, 0., 0.), ('a', 0.), 'ab', torch.tensor([.1, 0.])):
        with pytest.raises((TypeError, ValueError), match='eps'): with_prior.eps = bad
    assert with_prior.eps == (.1, 0.)

@pytest.mark.parametrize('shape,prior', [((3, 4, 4), tensor([.1, .2, .3])), ((1, 4, 4), tensor([.1])), ((4, 4), tensor([.1]))])
def test_a_prior_of_images(shape, prior):
    "It lies along the channels; masks (N,H,W) are of one label"
    x, y = torch.randn(16, *shape), (torch.rand(16, *shape) < .5).float()
    def learner(**kwargs):
        model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), x[0].numel()), nn.Unflatten(1, shape))
        return ours(dls=tensor_dls(x, y, 8), model=model, **kwargs)
    q, before = at('before_backward'), at('before_batch')
    learner(prior=prior, cbs=[q, before]).fit(1)
    for a, b in zip(before.train(), q.train()): close(b, .75*a + .25*(prior.view(-1, 1, 1) if len(shape) == 3 else prior))
    with pytest.raises(ValueError, match=r'prior must have shape \((1|3),\).*got \(4,\)'): learner(prior=torch.rand(4)).fit(1)

@pytest.mark.parametrize('target,said', [(torch.zeros(64).long(), 'LabelSmoothingCrossEntropyFlat'), (torch.zeros(64, 1).long(), 'class indices'),
                                         (torch.zeros(64, 4), 'shaped like the predictions')], ids=['index', 'column', 'float'])
def test_a_target_that_does_not_fit_is_told_before_the_loss_chokes_on_it(target, said):
    with pytest.raises(TypeError, match=said): ours(dls=tensor_dls(torch.randn(64, 6), target)).fit(1)

def test_a_target_that_is_no_label_is_named():
    "Also beside unknown labels, which are nan"
    y = torch.zeros(64, 5)
    y[0], y[1] = NAN, 3
    with pytest.raises(ValueError, match=r'takes labels in \[0,1\], got a target of 3 for BCEWithLogitsLossFlat'): ours(dls=tensor_dls(torch.randn(64, 6), y, 64)).fit(1)

def test_unknown_labels_stay_nan():
    def known_only(pred, y): return bce(pred[known := ~y.isnan()], y[known])
    def dls():
        g = torch.Generator().manual_seed(3)
        y = (torch.rand(64, 5, generator=g) < .5).float()
        return tensor_dls(torch.randn(64, 6, generator=g), torch.where(torch.rand(64, 5, generator=g) < .3, NAN, y))
    q, before = at('before_backward'), at('before_batch')
    same_training(ours(known_only, [q, before], dls=dls()), reference(known_only, dls=dls()))
    for a, b in zip(before.train(), q.train()): assert a.isnan().any() and torch.equal(b.isnan(), a.isnan())

class Validates(Callback):
    "Of a user: validates after each step, and goes on training"
    def after_step(self):
        self.learn.validate()
        self.learn.training = True
        self.model.train()

def test_frequencies_are_counted_once_a_fit(monkeypatch):
    "Not again for the validations in it"
    counted = []
    monkeypatch.setattr('fastai_smooth.callback.train_prior', lambda dls, multi, axis: counted.append(dls) or torch.full((5,), .25))
    learn = ours(prior='train', cbs=[Validates()])
    for n in (1, 2):
        learn.fit(2)
        assert len(counted) == n
    same_training(ours(prior='train'), reference(u=.25))

def test_labels_that_cannot_be_counted_are_told_before_anything_is_trained():
    learn = tensor_learner(multi_dls(), nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)), BCEWithLogitsLossFlat(), cbs=MultiLabelSmoothingCallback(prior='train'))
    with pytest.raises(TypeError, match='pass prior=tensor'): learn.fit(1)
    assert learn.model[0].num_batches_tracked == 0

def test_it_shows_eps_and_prior():
    assert repr(MultiLabelSmoothingCallback()) == 'MultiLabelSmoothingCallback(eps=0.05)'
    assert repr(MultiLabelSmoothingCallback(.1, 'train')) == "MultiLabelSmoothingCallback(eps=0.1, prior='train')"
    assert repr(MultiLabelSmoothingCallback((.1, 0.))) == 'MultiLabelSmoothingCallback(eps=(0.1, 0))'
    assert 'prior=tensor([0.2500, 0.5000])' in repr(MultiLabelSmoothingCallback(.1, tensor([.25, .5])))

def test_eps_of_a_half_leaves_nothing_to_learn():
    with pytest.warns(UserWarning, match='positives and negatives the same') as said: cb = MultiLabelSmoothingCallback(.5)
    with pytest.warns(UserWarning, match='positives and negatives the same'): cb.eps = .5
    assert len(said) == 1
    with pytest.warns(UserWarning, match=r'eps=\(0.75, 0.25\) makes positives and negatives the same'): cb.eps = .75, .25
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cb.eps = .75, 0.

# ---------------------------------------------------------------- adding, removing, exporting

def test_a_second_one_raises_before_anything_is_trained():
    "Nothing of what fit was given is left: not the second callback, nor another one passed with it"
    learn, reached = ours(), at('before_batch')
    n = len(learn.cbs)
    with pytest.raises(ValueError, match='two MultiLabelSmoothingCallbacks'): learn.fit(1, cbs=[reached, MultiLabelSmoothingCallback(.3)])
    assert reached.seen == [] and len(learn.cbs) == n
    same_training(learn, reference())

def test_fit_cbs_and_remove_cb():
    learn, ref = hard(), reference()
    fit_seeded(learn, 1, cbs=MultiLabelSmoothingCallback(EPS)); fit_seeded(ref, 1)
    close(weights(learn), weights(ref))
    assert not learn.cbs.filter(risinstance(MultiLabelSmoothingCallback))
    same_training(ours().remove_cb(MultiLabelSmoothingCallback), hard())

def test_taken_off_in_the_middle_of_a_batch_it_leaves_hard_labels():
    class TakesOff(Callback):
        def before_backward(self): self.learn.remove_cb(MultiLabelSmoothingCallback)
    after = at('after_batch')
    learn = ours(cbs=[TakesOff(), after])
    learn.fit(1)
    assert set(after.train()[0].unique().tolist()) == {0., 1.}

def pickled(o): return pickle.loads(pickle.dumps(o))
def cloudpickled(o): return pickle.loads(cloudpickle.dumps(o))

@pytest.mark.parametrize('way', [pickled, cloudpickled, deepcopy])
def test_the_callback_and_a_trained_learner_pickle(way):
    cb, learn = way(MultiLabelSmoothingCallback(EPS, PRIOR)), fit_seeded(ours(prior=PRIOR), 1)
    same_training(hard(cbs=[cb]), reference(u=PRIOR))
    same_training(way(learn), reference(u=PRIOR, model=deepcopy(learn.model)), 1)

def test_events_that_are_added_to_it_are_called():
    "To the object or by a subclass; and it can be turned off for a fit"
    class Mine(MultiLabelSmoothingCallback):
        def after_batch(self): called.append('subclass')
    called, learn = [], hard(cbs=[Mine(EPS)])
    learn.mine.before_step = lambda: called.append('object')
    learn.fit(1)
    assert called[:4] == ['object', 'subclass']*2
    off = ours()
    off.multi_label_smoothing.run = False
    same_training(off, hard())
    assert off.multi_label_smoothing.run

# ---------------------------------------------------------------- a schedule for eps

N_TRAIN, SCHED = 3, SchedLin(.3, .2)  # batches an epoch of single_dls(): 48 training rows, bs 16

def scheduled(loss=None, cbs=(), sched=SCHED, **kwargs):
    learn = tensor_learner(single_dls(), mlp(k=4), ifnone(loss, LabelSmoothingCrossEntropyFlat(.1)), **kwargs)
    for cb in [*cbs, LabelSmoothingScheduler(sched)]: learn.add_cb(cb)
    return learn

def values(sched, n_epoch): return tensor([float(sched(i/(N_TRAIN*n_epoch))) for i in range(N_TRAIN*n_epoch)])

class LossAgrees(Callback):
    "The loss of each training batch is `F.cross_entropy` at the schedule's eps; not asked of the batches of `eps_find`'s pilots"
    order = -500
    def __init__(self, sched=SCHED): self.sched, self.n = sched, 0
    def after_loss(self):
        if not self.training or not self.learn._grab_cbs(LabelSmoothingScheduler): return
        close(self.learn.loss, F.cross_entropy(self.pred, self.y, label_smoothing=float(self.sched(self.pct_train))), atol=1e-5)
        self.n += 1

@pytest.mark.parametrize('sched', [SchedCos(.2, 0.), SchedExp(.01, .2), combine_scheds([.5, .5], [SchedCos(.2, .1), SchedCos(.1, 0.)])],
                         ids=['cos', 'exp', 'combined'])
def test_eps_follows_the_schedule_beside_one_cycle(sched):
    learn, without = scheduled(sched=sched, cbs=[LossAgrees(sched)]), scheduled().remove_cb(LabelSmoothingScheduler)
    for o in (learn, without): o.fit_one_cycle(2, 1e-2)
    hps = learn.recorder.hps
    assert set(hps) == {'lr', 'mom', 'eps'} and learn.loss_agrees.n == 2*N_TRAIN and learn.loss_func.eps == .1
    close(hps['eps'], values(sched, 2))
    for k in ('lr', 'mom'): close(hps[k], without.recorder.hps[k])

PAIRS = SchedCos(np.array([.25, 0.]), np.array([0., .125]))

class PairsAgree(Callback):
    "The loss of each training batch is that of labels smoothed by the pair that `sched` gives"
    order, run_valid = -500, False
    def __init__(self, sched): self.sched, self.n = sched, 0
    def after_loss(self):
        e0, e1 = self.sched(self.pct_train)
        close(self.learn.loss, bce(self.pred, e0 + (1-e0-e1)*self.y))
        self.n += 1

@pytest.mark.parametrize('sched', [PAIRS, lambda pct: (.1*pct, .2), lambda pct: [.1*pct, .2], lambda pct: (.1, 0.) if pct else (.05, .05)], ids=['cos', 'tuple', 'list', 'step'])
@pytest.mark.parametrize('make', [lambda: hard(LabelSmoothingBCEWithLogitsFlat((.125, 0.))), lambda: hard(LabelSmoothingBCEWithLogits((.125, 0.))),
                                  lambda: hard(cbs=[MultiLabelSmoothingCallback((.125, 0.))])], ids=['loss', 'module', 'callback'])
def test_a_schedule_from_pair_to_pair(make, sched):
    learn = make().add_cbs([PairsAgree(sched), LabelSmoothingScheduler(sched)])
    learn.fit_one_cycle(2, 1e-2)
    seen, owner = learn.recorder.hps['eps'], learn._grab_cbs(MultiLabelSmoothingCallback) or [learn.loss_func]
    assert learn.pairs_agree.n == len(seen) > 4 and owner[0].eps == (.125, 0.)
    close(tensor(seen), tensor([[float(v) for v in sched(i/len(seen))] for i in range(len(seen))]))
    learn.recorder.plot_sched()
    plt.close('all')

def test_a_schedule_of_numbers_and_pairs():
    learn = hard(cbs=[MultiLabelSmoothingCallback(.1), LabelSmoothingScheduler(lambda pct: .1 if pct < .5 else (.2, 0.))])
    learn.fit(2)
    assert set(learn.recorder.hps['eps']) == {(.1, .1), (.2, 0.)} and learn.multi_label_smoothing.eps == .1
    learn.recorder.plot_sched()
    plt.close('all')

def test_a_pair_of_a_schedule_that_has_no_use_for_it():
    with pytest.raises(TypeError, match='eps must be a number'): scheduled(sched=PAIRS).fit(1)
    for learn in (ours(prior=PRIOR), hard(LabelSmoothingBCEWithLogitsFlat(EPS, prior=PRIOR))):
        with pytest.raises(ValueError, match='takes no prior'): learn.fit(1, cbs=LabelSmoothingScheduler(PAIRS))
        assert _eps_owner(learn).eps == EPS

@pytest.mark.parametrize('first', [True, False])
def test_either_order_in_cbs_and_plot_sched(first):
    learn, cbs = scheduled().remove_cb(LabelSmoothingScheduler), [LabelSmoothingScheduler(SCHED), ParamScheduler({'lr': SchedLin(.1, .01)})]
    learn.fit(1, cbs=cbs if first else cbs[::-1])
    assert set(learn.recorder.hps) == {'lr', 'eps'} and learn.loss_func.eps == .1
    close(learn.recorder.hps['eps'], values(SCHED, 1))
    learn.recorder.plot_sched()
    plt.close('all')

def test_every_fit_is_scheduled_and_recorded_anew():
    "fit has no scheduler of its own: the 'lr' of fit_one_cycle before it is another fit's"
    learn = scheduled(cbs=[LossAgrees()])
    for n, fit in ((1, learn.fit_one_cycle), (2, learn.fit_one_cycle), (1, learn.fit)):
        fit(n, 1e-2)
        assert {len(v) for v in learn.recorder.hps.values()} == {n*N_TRAIN} and learn.loss_func.eps == .1
        close(learn.recorder.hps['eps'], values(SCHED, n))
    assert set(learn.recorder.hps) == {'eps'}

def test_validating_goes_by_the_configured_eps_and_leaves_the_record_alone():
    "validate and get_preds run before_fit and after_fit too, and train nothing"
    seen = at('after_loss', lambda l: l.loss_func.eps)
    learn = scheduled(cbs=[seen])
    learn.validate()
    assert 'eps' not in getattr(learn.recorder, 'hps', {})
    learn.fit_one_cycle(2, 1e-2)
    before = {k: list(v) for k, v in learn.recorder.hps.items()}
    learn.validate(); learn.get_preds()
    assert {k: list(v) for k, v in learn.recorder.hps.items()} == before
    assert set(seen.valid()) == {.1} and .1 not in seen.train()

@pytest.mark.parametrize('event', ['before_fit', 'before_train'])
def test_a_fit_cancelled_before_its_first_batch_leaves_the_record_alone(event):
    "The values of an earlier fit are not merged into it"
    def stop(self): raise CancelFitException
    learn = scheduled()
    learn.fit_one_cycle(1, .1)
    before = dict(learn.recorder.hps)
    learn.fit(1, cbs=Callback(**{event: stop}))
    assert set(before) == {'lr', 'mom', 'eps'} and learn.recorder.hps == before

def interrupted(**kwargs):
    learn = scheduled(**kwargs)
    with pytest.raises(RuntimeError, match='power cut'): learn.fit(2, cbs=RaiseAt(RuntimeError('power cut'), 'after_loss', nth=2))
    return learn

def test_eps_is_back_when_detached_after_an_exception():
    assert interrupted().remove_cb(LabelSmoothingScheduler).loss_func.eps == .1

@pytest.mark.parametrize('mix', [False, True])
def test_eps_is_back_at_the_next_before_fit_after_an_exception(mix):
    "The configured value, not the one that the exception left: neither validated with, nor taken for configured"
    loss, seen = LabelSmoothingCrossEntropyFlat(.1), at('after_loss', lambda l: loss.eps)
    learn = interrupted(loss=loss, cbs=[MixUp()]*mix)
    learn.loss_func = loss  # MixUp leaves its own there; the user puts theirs back
    if mix: learn.remove_cb(MixUp)
    learn.add_cb(seen).validate()
    assert set(seen.valid()) == {.1}
    learn.fit(1)
    close(seen.train(), values(SCHED, 1))
    assert loss.eps == .1

def test_eps_that_the_user_sets_stays():
    "After an exception, between fits, and in the middle of one"
    learn = interrupted()
    for eps in (.3, .15):
        learn.loss_func.eps = eps
        learn.validate()
        assert learn.loss_func.eps == eps
        learn.fit(1)
        assert learn.loss_func.eps == eps
    class Sets(Callback):
        def after_batch(self):
            if self.training and self.iter == 1: self.loss_func.eps = .05
    learn.fit(1, cbs=Sets())
    close(learn.recorder.hps['eps'], values(SCHED, 1))
    assert learn.loss_func.eps == .05

def test_with_the_loss_of_fastai():
    "Where only the eps of its `func` takes effect, and nothing checks it"
    loss = fastai.losses.LabelSmoothingCrossEntropyFlat(eps=.1)
    learn = scheduled(loss, cbs=[LossAgrees()])
    learn.fit(2)
    assert learn.loss_agrees.n == 2*N_TRAIN and loss.func.eps == .1
    with pytest.raises(ValueError, match='2.0'): scheduled(loss, sched=lambda pct: 2.).fit(1)

@pytest.mark.parametrize('way', [pickled, deepcopy])
def test_the_scheduler_and_its_learner_pickle(way):
    learn = scheduled(sched=SchedCos(.3, 0.))
    learn.fit(1)
    other = scheduled().remove_cb(LabelSmoothingScheduler).add_cb(way(LabelSmoothingScheduler(SchedCos(.3, 0.))))
    for again in (way(learn), other):
        again.fit(1)
        close(again.recorder.hps['eps'], values(SchedCos(.3, 0.), 1))
        assert again.loss_func.eps == .1

# ---------------------------------------------------------------- in the middle of a fit

EVENTS = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward',
          'before_step', 'after_step', 'after_batch', 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit']
ACTIONS = dict(validate=lambda learn: learn.validate(), get_preds=lambda learn: learn.get_preds(),
               lr_find=lambda learn: learn.lr_find(num_it=6, show_plot=False), eps_find=lambda learn: learn.eps_find(1, show_plot=False))
BESIDES = [(e, a, 1000) for e in ('before_epoch', 'after_step', 'after_epoch') for a in ('get_preds', 'lr_find', 'eps_find')]

class Aside(Callback):
    "Does `action` the second time that `event` comes (in the second batch or epoch), and then puts back what it changed in the Learner."
    def __init__(self, action, event, order):
        self.action, self.order, self.left = action, order, 1 if event in ('before_fit', 'after_fit') else 2
        setattr(self, event, self._do)

    def _do(self):
        self.left -= 1
        if self.left: return
        keep, training = [(o, dict(vars(o))) for o in (self.learn, self.learn.recorder)], self.learn.model.training
        self.action(self.learn)
        for o, attributes in keep: vars(o).update(attributes)
        self.learn.model.train(training)

class KeepGrads(Callback):
    "As `Grads`, over all fits: a validation in between fires before_fit, too"
    order = 1001
    def __init__(self): self.kept = []
    def after_step(self): self.kept.append(torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]))

def beside(learn, action, event, order):
    "Gradients and weights after two epochs in which `action` was done"
    aside, step = Aside(ACTIONS[action], event, order), KeepGrads()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # the pilot has not learnt
        fit_seeded(learn.add_cbs([step, aside]), 2)
    assert aside.left <= 0 and len(step.kept) >= 6
    return [*step.kept, weights(learn)]

@pytest.mark.parametrize('event,action,order', [(e, 'validate', o) for e in EVENTS for o in (-1000, 1000)] + BESIDES)
def test_what_is_done_in_the_middle_of_a_fit_changes_no_training(event, action, order, tmp_path):
    "The gradients are those of a loss that smooths by itself, in whose fit the same was done; and eps stays the schedule's, as does its record"
    smooth = tensor_learner(multi_dls(), mlp(), LabelSmoothingBCEWithLogitsFlat(EPS, prior=PRIOR), tmp_path)
    for a, b in zip(beside(ours(prior=PRIOR, path=tmp_path), action, event, order), beside(smooth, action, event, order), strict=True): close(a, b)
    learn = scheduled(LabelSmoothingCrossEntropyFlat(.5), cbs=[LossAgrees()], path=tmp_path)
    beside(learn, action, event, order)
    assert learn.loss_agrees.n >= 6 and learn.loss_func.eps == .5
    if action in ('validate', 'get_preds'): assert len(learn.recorder.hps['eps']) == 6

# ---------------------------------------------------------------- bad and odd arguments

@st.composite
def multi(draw):
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    loss = draw(st.sampled_from([BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss(), bce]))
    return dict(pred=fuzz.rand(draw, n, k)*8-4, target=(fuzz.rand(draw, n, k) < .5).float(), eps=draw(st.floats(1e-6, .5)), prior=fuzz.rand(draw, k),
                loss=loss, cbs=())

def trained(pred, target, eps, prior, loss, cbs):
    "Loss and gradient of the first batch; a fit that is refused trains nothing"
    ys = [o.repeat(2, *[1]*(o.dim()-1)) for o in L(target)]
    dls = tensor_dls(torch.zeros(2*len(pred), 1), ys, len(pred), len(pred))
    learn = hard(loss, [MultiLabelSmoothingCallback(eps, prior), *cbs, Grads()], dls, Logits(pred.clone()))
    try: learn.fit(1, .1)
    except Exception: assert torch.equal(learn.model.w, pred); raise
    return learn.recorder.losses[0], learn.grads.seen[0]

def other(f): return lambda a: f(a['target'], len(a['target']), a['target'].shape[1])

PRIORS = [lambda a: torch.full((len(a['prior'])+1,), .5), lambda a: a['prior'][None, None], lambda a: a['prior'][:0], lambda a: a['prior'][0],
          *[lambda a, v=v: torch.full_like(a['prior'], v) for v in (-.5, NAN, 1.5, INF)], *no_values('prior'),
          'valid', 'train', 3.5, [.5], np.ones(3), object()]
one_class = [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy]
smooth = [LabelSmoothingBCEWithLogitsFlat(), LabelSmoothingBCEWithLogits(), LabelSmoothingCrossEntropyFlat(multi_hot=True),
          nn.CrossEntropyLoss(label_smoothing=.1)]
TARGETS = [other(lambda y, n, k: y+2), other(lambda y, n, k: dict(target=[y, y], loss=lambda p, *ys: bce(p, ys[0]))),
           other(lambda y, n, k: dict(target=torch.zeros(n, k+1), loss=lambda p, y: p.mean()))]
TABLE = dict(
    MultiLabelSmoothingCallback=Row(trained, multi(), tensors=dict(prior=FLOATS), bad={
        'eps': [*[o for o in BAD_EPS[:-1] if o is not None], .6, (.6, .5), np.array([.1, .2, .3])], 'prior': PRIORS, 'target': TARGETS, 'loss or smooths': [lambda a, o=o: dict(loss=o) for o in smooth],
        'loss or CrossEntropyLossFlat': [lambda a, o=o: dict(loss=o) for o in one_class],
        'MultiLabelSmoothingCallback': [lambda a: dict(cbs=[MultiLabelSmoothingCallback()])]}),
    LabelSmoothingScheduler=Row(
        lambda sched, loss: fit_seeded(scheduled(loss, sched=sched), 1).recorder.hps['eps'],
        st.fixed_dictionaries(dict(sched=st.sampled_from([SchedCos(.2, 0.), lambda p: 1, lambda p: torch.tensor(p), lambda p: np.float32(.25)]),
                                   loss=st.just(None))),
        bad={'sched': [None, .1, 'cos', [.1, .2], torch.tensor(.1)], 'loss': one_class[:2],
             'eps or sched': [lambda a, v=v: dict(sched=lambda p: v) for v in (NAN, 2., -1, None, 'x', [.1], True)]}))
test_refuses, test_takes = fuzz.both_tests(TABLE, subclasses=(TensorBase, TensorMultiCategory))

@pytest.mark.parametrize('eps', [0, -0., np.float64(.1), np.float32(.125), Fraction(1, 8), 5e-324, torch.tensor(.125), torch.tensor(0)], ids=repr)
def test_numbers_of_other_types(eps): assert MultiLabelSmoothingCallback(eps).eps == float(eps)
