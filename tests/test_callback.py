"MultiLabelSmoothingCallback: SPEC section 4, point by point."
import pickle, warnings
from copy import deepcopy

import cloudpickle, pytest
from helpers import *
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.rnn import RNNCallback, RNNRegularizer
from torch.amp import GradScaler, autocast

from fastai_smooth.all import (LabelSmoothingBCEWithLogitsFlat, LabelSmoothingCrossEntropyFlat,
                               MultiLabelSmoothingCallback, smooth_binary_cross_entropy_with_logits)

EPS = .125  # a power of two: 1-eps and eps are exact in every dtype, however the formula is grouped


class SelfSmoothing:
    """The reference: a loss that smooths its own targets while the model trains, straight from the formula
    q = (1-2 eps) y + 2 eps u. It is all that a user would write if fastai had no callbacks."""
    def __init__(self, model, base=None, eps=EPS, u=.5):
        self.model, self.base, self.eps, self.u = model, ifnone(base, BCEWithLogitsLossFlat()), eps, u

    def smooth(self, y, pred):
        y = y if y.is_floating_point() else y.to(pred.dtype)
        return (1-2*self.eps)*y + 2*self.eps*self.u

    def __call__(self, pred, y, **kwargs):
        return self.base(pred, self.smooth(y, pred) if self.model.training else y, **kwargs)


def close(a, b, atol=1e-6, rtol=1e-6):
    torch.testing.assert_close(torch.as_tensor(a).detach(), torch.as_tensor(b).detach(), atol=atol, rtol=rtol)


def multi_learner(base=None, cbs=(), dls=None, model=None, **kwargs):
    "A Learner on a hard loss, `cbs` added one by one, so in that order."
    learn = tensor_learner(dls or multi_dls(), model or mlp(), ifnone(base, BCEWithLogitsLossFlat()), **kwargs)
    for cb in cbs: learn.add_cb(cb)
    return learn


def reference_learner(base=None, cbs=(), eps=EPS, u=.5, **kwargs):
    learn = multi_learner(base, cbs, **kwargs)
    learn.loss_func = SelfSmoothing(learn.model, learn.loss_func, eps, u)
    return learn


def same_training(ours, ref, n_epoch=2):
    "Fits both on the same random numbers; every gradient, weight and loss of the one is the other's."
    for learn in (ours, ref):
        learn.add_cb(Grads())
        learn.recorder.smooth_loss.beta = 0.  # record each batch's own loss
        fit_seeded(learn, n_epoch)
    assert len(ours.grads.seen) == len(ref.grads.seen) > 0
    for a, b in zip(ours.grads.seen, ref.grads.seen):
        assert b.abs().max() > 0
        close(a, b, atol=1e-6*b.abs().max().item())
    close(weights(ours), weights(ref))
    close(torch.stack(ours.recorder.losses), torch.stack(ref.recorder.losses))
    for a, b in zip(ours.recorder.values, ref.recorder.values): close(tensor(a), tensor(b))


# ---------------------------------------------------------------- the forum's callback does nothing

class ForumCallback(Callback):
    "As posted in https://forums.fast.ai/t/can-label-smoothing-be-used-for-multi-label-images/46673 (for fastai v1)."
    def __init__(self, eps=0.05): self.eps = eps
    def before_backward(self, **kwargs):
        labels = self.yb[0].detach().clone()
        for i, x in enumerate(labels): labels[i] = torch.where(x == 1.0, 1.0-self.eps, self.eps)
        smoothed = nn.BCEWithLogitsLoss()(self.pred, labels)
        return {'last_loss': smoothed}


def test_forum_callback_leaves_the_gradients_untouched_in_fastai_v2():
    "Bit for bit the weights of training without it; ours gives those of the smoothed loss, which are others."
    without, forum = multi_learner(cbs=[Grads()]), multi_learner(cbs=[ForumCallback(EPS), Grads()])
    ours, ref = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS), Grads()]), reference_learner(cbs=[Grads()])
    for learn in (without, forum, ours, ref): fit_seeded(learn)
    assert torch.equal(weights(forum), weights(without))
    for a, b in zip(forum.grads.seen, without.grads.seen): assert torch.equal(a, b)
    assert (weights(ours)-weights(without)).abs().max() > 1e-3
    close(weights(ours), weights(ref))
    for a, b in zip(ours.grads.seen, ref.grads.seen): close(a, b)


# ---------------------------------------------------------------- point 1: what is trained on and logged

class Logits(nn.Module):
    "Its weights ARE the logits, whatever comes in: the gradient of a weight is the gradient of a logit."
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)
    def forward(self, x): return self.w + 0*x.sum()


def test_point_1_gradient_and_loss_by_hand():
    """logits [2,-1], y [1,0], eps .1: q = [.9, .1]; loss (.326928+.413262)/2 = .370095;
    gradient (sigmoid(2)-.9)/2 = -.009601 and (sigmoid(-1)-.1)/2 = .084471 (both worked out in test_losses.py)."""
    dls = tensor_dls(torch.zeros(2, 1), tensor([[1., 0.]]*2), bs=1, n_valid=1)
    learn = multi_learner(dls=dls, model=Logits(tensor([[2., -1.]])), cbs=[MultiLabelSmoothingCallback(.1), Grads()])
    loss = Spy(lambda l: l.loss.item(), 'after_batch')
    learn.add_cb(loss).fit(1, 0.)
    close(learn.grads.seen[0], tensor([-.009601, .084471]), atol=2e-6)
    close(loss.train()[0], .370095, atol=2e-6)


def test_point_1_default_eps_is_a_twentieth():
    assert MultiLabelSmoothingCallback().eps == .05
    same_training(multi_learner(cbs=[MultiLabelSmoothingCallback]), reference_learner(eps=.05))


def test_point_1_yb_is_smoothed_in_before_backward():
    hard = Spy(lambda l: l.yb[0].clone(), 'before_batch', order=99)
    soft = Spy(lambda l: l.yb[0].clone(), 'before_backward', order=99)
    fit_seeded(multi_learner(cbs=[MultiLabelSmoothingCallback(.1), hard, soft]), 1)
    assert len(soft.seen) == len(hard.train()) > 1
    for y, q in zip(hard.train(), soft.train()): close(q, y*.8+.1)


def test_point_1_a_soft_target_lies_in_between():
    "MixUp's .7 becomes .7*.8+.1 = .66, where the forum's loop makes it eps"
    q = Spy(lambda l: l.yb[0].clone(), 'before_backward', order=99)
    dls = tensor_dls(torch.zeros(4, 6), torch.full((4, 5), .7), bs=2, n_valid=2)
    multi_learner(dls=dls, cbs=[MultiLabelSmoothingCallback(.1), q]).fit(1)
    close(q.train()[0], torch.full((2, 5), .66))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
def test_point_1_a_floating_target_keeps_type_and_dtype(dtype):
    class CastLoss:
        "A user's own loss that does its own casting"
        def __call__(self, pred, y): return F.binary_cross_entropy_with_logits(pred, y.as_subclass(Tensor).float())
    x, y = torch.randn(8, 6), (torch.rand(8, 5) < .5).to(dtype)
    q = Spy(lambda l: l.yb[0], 'before_backward', order=99)
    dls = tensor_dls(x, y.as_subclass(TensorMultiCategory), bs=4)
    learn = multi_learner(CastLoss(), dls=dls, cbs=[MultiLabelSmoothingCallback(EPS), q])
    learn.remove_cb(CastToTensor)
    before = Spy(lambda l: l.yb[0], 'before_batch', order=99)
    learn.add_cb(before).fit(1)
    for a, b in zip(before.train(), q.train()):
        assert type(b) is type(a) is TensorMultiCategory and b.dtype == a.dtype == dtype and b.device == a.device
        close(plain(b), plain(a)*.75+.125, atol=1e-3)


def plain(t): return t.as_subclass(torch.Tensor)


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64])
def test_point_1_bool_and_integer_targets_take_the_dtype_of_pred(dtype):
    q = Spy(lambda l: l.yb[0], 'before_backward', order=99)
    ours = multi_learner(dls=multi_dls(dtype=dtype), cbs=[MultiLabelSmoothingCallback(EPS), q])
    same_training(ours, reference_learner(dls=multi_dls(dtype=dtype)))
    for t in q.train(): assert t.dtype == torch.float32 and set(t.unique().tolist()) == {.125, .875}


def test_point_1_recorder_logs_the_smoothed_training_and_the_hard_validation_loss():
    learn = multi_learner(cbs=[MultiLabelSmoothingCallback(.1)])
    learn.recorder.smooth_loss.beta = 0.
    pair = Spy(lambda l: (l.pred.detach().clone(), l.yb[0].clone(), l.loss.item()), 'after_batch', order=99)
    fit_seeded(learn.add_cb(pair), 1)
    bce = F.binary_cross_entropy_with_logits
    assert len(learn.recorder.losses) == len(pair.train()) > 1
    for logged, (pred, y, loss) in zip(learn.recorder.losses, pair.train()):
        close(logged.item(), bce(pred, y*.8+.1).item())
        close(loss, bce(pred, y*.8+.1).item())
    assert max(abs(loss-bce(pred, y).item()) for pred, y, loss in pair.train()) > 1e-4
    pred, y = (torch.cat([o[i] for o in pair.valid()]) for i in (0, 1))
    close(learn.recorder.values[-1][1], bce(pred, y).item())


# ---------------------------------------------------------------- point 2: hard labels come back

class Identity(Callback):
    "Is `yb` the tuple that it was before the batch? Asked at `events`."
    def __init__(self, *events, order=0):
        self.order, self.answers = order, []
        self.before_batch = self._keep
        for e in events: setattr(self, e, partial(self._ask, e))
    def _keep(self): self.hard, self.copy = self.learn.yb, self.learn.yb[0].clone()
    def _ask(self, event):
        same = self.learn.yb is self.hard and self.learn.yb[0] is self.hard[0]
        self.answers.append((event, same and torch.equal(self.learn.yb[0], self.copy)))
    def events(self): return {e for e, _ in self.answers}
    def all_hard(self): return all(ok for _, ok in self.answers)


@pytest.mark.parametrize('order', [-5, 9.5, 99])
def test_point_2_yb_is_the_very_hard_object_again(order):
    "A clone would do for the numbers, but a callback that keeps a reference would see the wrong tensor"
    asked = ['after_backward', 'before_step', 'after_step', 'after_batch']
    # CastToTensor (order 9) makes a new tuple in before_batch, so what comes before it is asked without it
    who = Identity(*asked, order=order)
    learn = multi_learner(cbs=[MultiLabelSmoothingCallback(.1), who])
    if order < 9: learn.remove_cb(CastToTensor)
    learn.fit(1)
    assert who.events() == set(asked) and who.all_hard()


@pytest.mark.parametrize('ex,events', [
    (CancelBatchException, ['after_cancel_batch', 'after_batch']),
    (CancelBackwardException, ['after_backward', 'after_batch']),
    (CancelTrainException, ['after_cancel_train', 'after_train', 'before_validate']),
    (CancelEpochException, ['after_cancel_epoch', 'after_epoch']),
    (CancelFitException, ['after_cancel_fit', 'after_fit'])])
@pytest.mark.parametrize('order', [-5, 99])
def test_point_2_restored_after_a_cancel_in_before_backward(ex, events, order):
    who = Identity(*events, order=order)
    learn = multi_learner(cbs=[MultiLabelSmoothingCallback(.1), RaiseAt(ex, nth=1), who])
    learn.remove_cb(CastToTensor)
    learn.fit(1)
    assert who.events() == set(events) and who.all_hard()


@pytest.mark.parametrize('ex', [CancelBatchException, CancelBackwardException, CancelTrainException,
                                CancelEpochException, CancelFitException])
def test_point_2_training_goes_on_rightly_after_a_cancel(ex):
    ours = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS), RaiseAt(ex)])
    ref = reference_learner(cbs=[RaiseAt(ex)])
    for learn in (ours, ref): fit_seeded(learn, 2)
    same_training(ours, ref, 1)


def test_point_2_after_an_uncaught_exception():
    "The fit is over, nothing tells the callback; the next batch must not get the old one's labels"
    ours, ref = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS)]), reference_learner()
    for learn in (ours, ref):
        with pytest.raises(RuntimeError, match='power cut'):
            fit_seeded(learn, 1, cbs=RaiseAt(RuntimeError('power cut'), nth=2))
        learn.opt.zero_grad()
    hard = Spy(lambda l: l.yb[0].clone(), 'before_batch', 'after_batch', order=99)
    close(ours.validate()[0], ref.validate()[0])
    same_training(ours.add_cb(hard), ref, 1)
    expected = [b[1] for b in ours.dls.train for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(hard.train(), expected))


def test_point_2_training_metrics_see_hard_labels():
    seen = []
    def metric(pred, y):
        seen.append(y.clone())
        return accuracy_multi(pred, y)
    big = torch.eye(5).repeat(4, 1)
    learn = multi_learner(dls=tensor_dls(big, big, bs=5, n_valid=5), model=nn.Linear(5, 5), metrics=metric,
                          cbs=[MultiLabelSmoothingCallback(.3)])
    with torch.no_grad(): learn.model.weight.copy_(40*torch.eye(5)); learn.model.bias.fill_(-20.)
    learn.recorder.train_metrics = True
    learn.fit(1, 1e-6)
    assert len(seen) == 4 and all(set(y.unique().tolist()) == {0., 1.} for y in seen)
    names, values = learn.recorder.metric_names, learn.recorder.values[-1]
    assert values[list(names).index('train_metric')-1] == 1.


def test_point_2_no_tensor_of_a_batch_is_stored():
    "What has another shape than the prior, which is configuration: nothing that a validation in between could lose, or a pickle carry"
    def has(v): return v.shape != (5,) if isinstance(v, Tensor) else isinstance(v, tuple) and any(map(has, v))
    cb = MultiLabelSmoothingCallback(.1, prior=torch.full((5,), .3))
    during = Spy(lambda l: {k for k, v in vars(cb).items() if has(v)}, 'after_loss', 'before_backward', 'after_backward', order=99)
    multi_learner(cbs=[cb, during]).fit(1)
    assert len(during.seen) > 3 and not set().union(*(o for _, o in during.seen))


# ---------------------------------------------------------------- point 3: validation is untouched

def test_point_3_validation_is_hard():
    ours, plain_ = multi_learner(cbs=[MultiLabelSmoothingCallback(.3)]), multi_learner()
    close(ours.validate()[0], plain_.validate()[0], atol=0, rtol=0)
    a, b = ours.get_preds(with_loss=True), plain_.get_preds(with_loss=True)
    for s, t in zip(a, b): assert torch.equal(s, t)
    y = Spy(lambda l: l.yb[0].clone(), 'after_loss', 'after_batch', order=99)
    ours.add_cb(y).fit(1)
    assert len(y.valid()) > 0 and all(set(t.unique().tolist()) <= {0., 1.} for t in y.valid())


# ---------------------------------------------------------------- point 4: it composes

class CPUMixedPrecision(MixedPrecision):
    "fastai's, which asks for autocast('cuda') and so does nothing here, on the CPU"
    def before_fit(self):
        dtype = torch.bfloat16 if self.amp_mode == AMPMode.BF16 else torch.float16
        self.autocast = autocast('cpu', dtype=dtype)
        self.learn.scaler = GradScaler('cpu', init_scale=2.**10, enabled=dtype == torch.float16)
        self.scales = L()


class HalfSeen(Callback):
    "Did the model run in half precision?"
    order = 9.5  # before MixedPrecision (10) turns pred to float
    def after_pred(self): self.dtypes = getattr(self, 'dtypes', set()) | {self.pred.dtype}


class ScaleOut(Callback):
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.learn.loss_grad*3


class ScaleIn(Callback):
    def after_loss(self):
        if self.training: self.learn.loss_grad *= 3


class AddOut(Callback):
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.learn.loss_grad + .05*self.learn.pred.pow(2).mean()


class AddIn(Callback):
    def after_loss(self):
        if self.training: self.learn.loss_grad += .05*self.learn.pred.pow(2).mean()


class Replace(Callback):
    "Trains on something else altogether"
    def after_loss(self):
        if self.training: self.learn.loss_grad = F.mse_loss(self.learn.pred, self.learn.y)


class AddWeights(Callback):
    "A penalty that does not go through the predictions"
    def after_loss(self):
        penalty = sum(p.pow(2).sum() for p in self.model.parameters())
        if self.training: self.learn.loss_grad = self.learn.loss_grad + .01*penalty


class ScaleLate(Callback):
    "In before_backward, as MixedPrecision does it: after ours"
    order = 20
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*2


OTHERS = dict(
    nothing=lambda: [],
    fp16=lambda: [CPUMixedPrecision(), HalfSeen()],
    bf16=lambda: [CPUMixedPrecision(amp_mode=AMPMode.BF16), HalfSeen()],
    fastai_fp16=lambda: [MixedPrecision()],  # does nothing on a CPU, and must go on doing so
    accumulation=lambda: [GradientAccumulation(32)],
    uneven_accumulation=lambda: [GradientAccumulation(24)],
    clip=lambda: [GradientClip(.05)],
    mixup=lambda: [MixUp()],
    cast=lambda: [CastToTensor()],
    scale_out=lambda: [ScaleOut()], scale_in=lambda: [ScaleIn()], add_out=lambda: [AddOut()], add_in=lambda: [AddIn()],
    scale_late=lambda: [ScaleLate()],
    weight_penalty=lambda: [AddWeights()],
    scale_then_add=lambda: [ScaleOut(), AddIn()], add_then_scale=lambda: [AddOut(), ScaleIn()],
    all_scalars=lambda: [ScaleIn(), AddOut(), GradientAccumulation(32), GradientClip(.05)],
    fp16_accumulation_clip=lambda: [CPUMixedPrecision(), GradientAccumulation(32), GradientClip(.05), ScaleIn()])


@pytest.mark.parametrize('first', [True, False], ids=['added first', 'added last'])
@pytest.mark.parametrize('name', OTHERS)
def test_point_4_gradient_equals_the_reference(name, first):
    ours, others = [MultiLabelSmoothingCallback(EPS)], OTHERS[name]()
    a = multi_learner(cbs=ours+others if first else others+ours)
    b = reference_learner(cbs=OTHERS[name]())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch: autocast('cuda') without CUDA; scheduler order
        same_training(a, b)
    for learn in (a, b):
        if hasattr(learn, 'half_seen'): assert learn.half_seen.dtypes <= {torch.float16, torch.bfloat16}


def test_point_4_the_callbacks_above_do_something():
    "So that the equalities are not those of callbacks that were never run"
    def w(name):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return weights(fit_seeded(multi_learner(cbs=[MultiLabelSmoothingCallback(EPS)]+OTHERS[name]())))
    base = w('nothing')
    for name in OTHERS:
        if name not in ('nothing', 'fastai_fp16', 'cast'): assert (w(name)-base).abs().max() > 1e-6, name


@pytest.mark.parametrize('first', [True, False], ids=['added first', 'added last'])
@pytest.mark.parametrize('name', ['mixup', 'cutmix'])
def test_point_4_mixup_and_cutmix_on_images(name, first):
    "Mixed labels are soft; the reference smooths the mixed ones"
    other = dict(mixup=MixUp, cutmix=CutMix)[name]
    # CutMix writes into the batch: each Learner needs tensors of its own
    make = lambda: dict(dls=multi_image_dls(), model=flat_mlp())
    ours = MultiLabelSmoothingCallback(EPS)
    a = multi_learner(cbs=[ours, other()] if first else [other(), ours], **make())
    same_training(a, reference_learner(cbs=[other()], **make()))


@pytest.mark.parametrize('first', [True, False], ids=['added first', 'added last'])
@pytest.mark.parametrize('extra', [lambda: [], lambda: [GradientAccumulation(32), GradientClip(.1)]],
                         ids=['alone', 'accumulation and clip'])
def test_point_4_rnn_regularizer(extra, first):
    ours, make = [MultiLabelSmoothingCallback(EPS)], lambda: [RNNCallback(), RNNRegularizer(alpha=2., beta=1.)]
    others = make()+extra()
    a = multi_learner(model=rnn_net(), cbs=ours+others if first else others+ours)
    same_training(a, reference_learner(model=rnn_net(), cbs=make()+extra()))
    unregularised = multi_learner(model=rnn_net(), cbs=[RNNCallback()]+ours)
    assert (weights(fit_seeded(unregularised)) - weights(a)).abs().max() > 1e-4


@pytest.mark.parametrize('first', [True, False], ids=['added first', 'added last'])
def test_point_4_one_cycle_with_adam(first):
    ours, others = [MultiLabelSmoothingCallback(EPS)], [GradientClip(.5)]
    a = multi_learner(cbs=ours+others if first else others+ours, opt_func=Adam)
    b = reference_learner(cbs=others, opt_func=Adam)
    for learn in (a, b):
        torch.manual_seed(0)
        learn.fit_one_cycle(2, 1e-2)
    close(weights(a), weights(b), atol=1e-5)


def test_point_4_a_loss_put_in_the_place_of_loss_grad():
    "Nothing of the hard loss is left to smooth: told, rather than accepted and ignored"
    with pytest.raises(RuntimeError, match='loss_grad'):
        multi_learner(cbs=[MultiLabelSmoothingCallback(), Replace()]).fit(1)


class Early(Callback):
    "A term and a factor from before all of fastai's callbacks, as distillation adds them"
    order = -100
    def __init__(self, f): self.f = f
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.f(self.learn.loss_grad, self.model[0].weight)


@pytest.mark.parametrize('order', [-1e9, -100, 0])
@pytest.mark.parametrize('f', [lambda l, w: l + 10*w.pow(2).sum(), lambda l, w: .5*l + .5*w.abs().sum(), lambda l, w: (l-.5).abs() + .5],
                         ids=['term', 'factor', 'flooding'])
def test_point_4_what_came_earlier_is_kept(f, order):
    "Whatever its order, and also where it is not affine in the loss"
    a, b = multi_learner(cbs=[Early(f), MultiLabelSmoothingCallback(EPS)]), reference_learner(cbs=[Early(f)])
    for learn in (a, b): learn.early.order = order
    same_training(a, b)


def test_point_4_a_cancelled_backward_has_no_gradient_to_ask_about():
    class Skip(Callback):
        order = 99
        def before_backward(self):
            if self.iter == 1: raise CancelBackwardException
    ours, ref = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS), Skip()]), reference_learner(cbs=[Skip()])
    close(weights(fit_seeded(ours)), weights(fit_seeded(ref)))


def test_point_4_the_hard_loss_is_not_run_backward():
    "Its graph is never needed: one backward a batch through the model, one through the loss, and that the smoothed one"
    class Count(torch.autograd.Function):
        n = 0
        @staticmethod
        def forward(ctx, x, tag): ctx.tag = tag; return x.clone()
        @staticmethod
        def backward(ctx, g): Count.n += 1; return g, None
    class Loss:
        def __call__(self, pred, y): return F.binary_cross_entropy_with_logits(Count.apply(pred, None), y)
    learn = multi_learner(Loss(), cbs=[MultiLabelSmoothingCallback(EPS), ScaleIn(), AddOut()])
    learn.fit(1)
    assert Count.n == len(learn.dls.train)


# ---------------------------------------------------------------- point 5: which losses and targets

class FocalBCE:
    "A user's own loss that takes float targets"
    def __call__(self, pred, y):
        p = pred.sigmoid()
        return (F.binary_cross_entropy_with_logits(pred, y, reduction='none')*(y-p).pow(2)).mean()


LOSSES = dict(
    pos_weight=lambda: BCEWithLogitsLossFlat(pos_weight=tensor([1., 2., 3., .5, 1.]), thresh=.3),
    module=nn.BCEWithLogitsLoss, own=FocalBCE, function=lambda: F.binary_cross_entropy_with_logits,
    mse=MSELossFlat, summed=lambda: BCEWithLogitsLossFlat(reduction='sum'))


@pytest.mark.parametrize('name', LOSSES)
def test_point_5_any_loss_of_float_targets(name):
    kwargs = dict(lr=.01) if name == 'summed' else {}
    ours, ref = multi_learner(LOSSES[name](), [MultiLabelSmoothingCallback(EPS)]), reference_learner(LOSSES[name]())
    for learn in (ours, ref):
        if kwargs: learn.lr = kwargs['lr']
    loss_func = ours.loss_func
    same_training(ours, ref)
    assert ours.loss_func is loss_func


def test_point_5_thresh_and_pos_weight_stay_the_loss_own():
    learn = multi_learner(LOSSES['pos_weight'](), [MultiLabelSmoothingCallback(EPS)])
    learn.fit(1)
    probs, _, decoded = learn.get_preds(with_decoded=True)
    assert learn.loss_func.thresh == .3 and torch.equal(decoded, probs > .3)


def test_point_5_a_prior_for_each_label():
    "q = (1-2 eps) y + 2 eps prior"
    prior = tensor([.9, .25, .5, .125, 0.])
    q, y = (Spy(lambda l: l.yb[0].clone(), e, order=99) for e in ('before_backward', 'before_batch'))
    ours = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS, prior=prior), q, y])
    same_training(ours, reference_learner(u=prior))
    for a, b in zip(q.train(), y.train()): close(a, b*.75 + .25*prior)


class Validates(Callback):
    "Of a user: validates after each step, and goes on training"
    def after_step(self):
        self.learn.validate()
        self.learn.training = True
        self.model.train()


def test_a_prior_outlives_a_validation():
    "0.2 of the negatives' mass goes by the prior in every batch"
    prior = tensor([.05, .1, .2, .3, .4])
    q = Spy(lambda l: l.yb[0].clone(), 'before_backward', order=99)
    learn = tensor_learner(multi_dls(), mlp(), BCEWithLogitsLossFlat(), cbs=[q, Validates()]).to_smooth(.2, prior=prior)
    learn.fit(1)
    negatives = torch.cat(q.train()).amin(0)
    assert len(q.train()) == 3
    close(negatives, tensor([.02, .04, .08, .12, .16]))


@pytest.mark.parametrize('shape,prior', [((3, 4, 4), tensor([.1, .2, .3])), ((1, 4, 4), tensor([.1])), ((4, 4), tensor([.1]))])
def test_a_prior_of_images(shape, prior):
    "It lies along the channels; masks (N,H,W) are of one label"
    x, y = torch.randn(16, *shape), (torch.rand(16, *shape) < .5).float()
    q = Spy(lambda l: (l.yb[0].clone(), l._hard[0]), 'before_backward', order=99)
    keep = Spy(lambda l: setattr(l, '_hard', l.yb), 'before_batch')
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), x[0].numel()), nn.Unflatten(1, shape))
    multi_learner(dls=tensor_dls(x, y, 8), model=model, cbs=[MultiLabelSmoothingCallback(EPS, prior), keep, q]).fit(1)
    for soft, hard in q.train(): close(soft, .75*hard + .25*(prior.view(-1, 1, 1) if len(shape) == 3 else prior))
    with pytest.raises(ValueError, match=r'prior must have shape \((1|3),\).*got \(4,\)'):
        multi_learner(dls=tensor_dls(x, y, 8), model=model, cbs=[MultiLabelSmoothingCallback(EPS, torch.rand(4))]).fit(1)


def test_one_logit_and_flat_targets():
    "(N,1) logits with (N,) targets, which fastai's BCEWithLogitsLossFlat flattens"
    dls = tensor_dls(torch.randn(32, 6), (torch.rand(32) < .5).float(), 8)
    q = Spy(lambda l: l.yb[0].clone(), 'before_backward', order=99)
    ours = multi_learner(dls=dls, model=mlp(k=1), cbs=[MultiLabelSmoothingCallback(EPS, tensor([.5])), q])
    same_training(ours, reference_learner(dls=dls, model=mlp(k=1)))
    assert {o.shape for o in q.train()} == {(8,)}


def test_frequencies_are_counted_once_a_fit(monkeypatch):
    "Not again for the validations in it"
    import fastai_smooth.callback as module
    counted = []
    monkeypatch.setattr(module, 'train_prior', lambda dls, multi, axis: counted.append(dls) or torch.full((5,), .25))
    learn = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS, 'train'), Validates()])
    for n in (1, 2):
        learn.fit(2)
        assert len(counted) == n


def test_a_prior_that_is_set_is_checked():
    cb = MultiLabelSmoothingCallback(EPS)
    for bad, ex in ((tensor([.5, 1.5]), ValueError), ('trian', ValueError), ([.1]*5, TypeError)):
        with pytest.raises(ex, match='prior'): cb.prior = bad
    cb.prior = tensor([.25]*5)
    same_training(multi_learner(cbs=[cb]), reference_learner(u=.25))


def test_it_shows_eps_and_prior():
    assert repr(MultiLabelSmoothingCallback()) == 'MultiLabelSmoothingCallback(eps=0.05)'
    assert repr(MultiLabelSmoothingCallback(.1, 'train')) == "MultiLabelSmoothingCallback(eps=0.1, prior='train')"
    assert 'prior=tensor([0.2500, 0.5000])' in repr(MultiLabelSmoothingCallback(.1, tensor([.25, .5])))


def test_eps_of_a_half_leaves_nothing_to_learn():
    with pytest.warns(UserWarning, match='positives and negatives the same') as said: cb = MultiLabelSmoothingCallback(.5)
    with pytest.warns(UserWarning, match='positives and negatives the same'): cb.eps = .5
    assert len(said) == 1


def test_point_5_unknown_labels_stay_nan():
    class KnownOnly:
        "A user's own: nan labels do not count"
        def __call__(self, pred, y):
            known = ~y.isnan()
            return F.binary_cross_entropy_with_logits(pred[known], y[known])
    def dls():
        g = torch.Generator().manual_seed(3)
        y = (torch.rand(64, 5, generator=g) < .5).float()
        y[torch.rand(64, 5, generator=g) < .3] = float('nan')
        return tensor_dls(torch.randn(64, 6, generator=g), y)
    q, y = (Spy(lambda l: l.yb[0].clone(), e, order=99) for e in ('before_backward', 'before_batch'))
    ours = multi_learner(KnownOnly(), [MultiLabelSmoothingCallback(EPS), q, y], dls=dls())
    same_training(ours, reference_learner(KnownOnly(), dls=dls()))
    for a, b in zip(q.train(), y.train()):
        assert a.isnan().any() and torch.equal(a.isnan(), b.isnan())
        close(a[~a.isnan()], b[~b.isnan()]*.75+.125)


def test_point_5_class_indices_name_the_loss_to_use():
    learn = tensor_learner(single_dls(), mlp(k=4), CrossEntropyLossFlat(), cbs=MultiLabelSmoothingCallback())
    with pytest.raises(TypeError, match='LabelSmoothingCrossEntropyFlat'): learn.fit(1)


def test_point_5_a_shape_other_than_pred_is_a_type_error():
    class Broadcasts:
        def __call__(self, pred, y): return F.binary_cross_entropy_with_logits(pred, y.expand_as(pred))
    dls = tensor_dls(torch.randn(16, 6), (torch.rand(16, 1) < .5).float(), bs=4)
    with pytest.raises(TypeError, match='shape'):
        multi_learner(Broadcasts(), [MultiLabelSmoothingCallback()], dls=dls).fit(1)


def test_point_5_exactly_one_target():
    class TwoTargets:
        def __call__(self, pred, y, z): return F.binary_cross_entropy_with_logits(pred, y) + z.mean()*0
    y = (torch.rand(16, 5) < .5).float()
    dls = tensor_dls(torch.randn(16, 6), [y, y], bs=4)
    with pytest.raises(TypeError, match='(?i)one target|2'):
        multi_learner(TwoTargets(), [MultiLabelSmoothingCallback()], dls=dls).fit(1)


@pytest.mark.parametrize('loss', [LabelSmoothingBCEWithLogitsFlat(.1), LabelSmoothingCrossEntropyFlat(multi_hot=True),
                                  nn.CrossEntropyLoss(label_smoothing=.1)], ids=['sigmoid', 'softmax', 'torch'])
def test_point_5_a_loss_that_already_smooths(loss):
    learn = multi_learner(loss, [MultiLabelSmoothingCallback()])
    with pytest.raises(ValueError, match='(?i)smooth'): learn.fit(1)
    learn.remove_cb(MultiLabelSmoothingCallback).fit(1)


@pytest.mark.parametrize('kwargs', [dict(eps=.6), dict(eps=-.1), dict(eps=float('nan')),
                                    dict(prior=tensor([.5, 1.5])), dict(prior=tensor([-.1, .5]))])
def test_bad_values_raise_when_built(kwargs):
    with pytest.raises(ValueError): MultiLabelSmoothingCallback(**kwargs)


def test_a_prior_of_the_wrong_length():
    with pytest.raises(ValueError, match=r'(?s)3.*5|5.*3'):
        multi_learner(cbs=[MultiLabelSmoothingCallback(prior=torch.full((3,), .5))]).fit(1)


# ---------------------------------------------------------------- point 6: adding, removing, exporting

def test_point_6_a_second_one_raises_at_before_fit():
    learn = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS), MultiLabelSmoothingCallback(.3)])
    reached = Spy(lambda l: 1, 'before_batch')
    with pytest.raises(Exception, match='MultiLabelSmoothingCallback'): learn.add_cb(reached).fit(1)
    assert reached.seen == []
    learn.remove_cb(learn.cbs.filter(risinstance(MultiLabelSmoothingCallback))[1])
    same_training(learn, reference_learner())


def test_point_6_a_second_one_in_fit():
    "Nothing of it is left: not the second callback, nor another one passed with it"
    learn = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS)])
    n = len(learn.cbs)
    with pytest.raises(Exception, match='MultiLabelSmoothingCallback'):
        learn.fit(1, cbs=[Spy(lambda l: 1, 'before_batch'), MultiLabelSmoothingCallback(.3)])
    assert len(learn.cbs) == n
    same_training(learn, reference_learner())


def test_point_6_fit_cbs_and_remove_cb():
    learn, ref, hard = multi_learner(), reference_learner(), multi_learner()
    fit_seeded(learn, 1, cbs=MultiLabelSmoothingCallback(EPS)); fit_seeded(ref, 1)
    close(weights(learn), weights(ref))
    assert not any(isinstance(cb, MultiLabelSmoothingCallback) for cb in learn.cbs)
    learn, added = multi_learner(), MultiLabelSmoothingCallback(EPS)
    learn.add_cb(added).remove_cb(added)
    same_training(learn, hard)
    again = multi_learner(cbs=[added])
    same_training(again.remove_cb(MultiLabelSmoothingCallback), multi_learner())


@pytest.mark.parametrize('trained', [False, True])
def test_point_6_export_and_load(tmp_path, trained):
    prior = torch.full((5,), .25)
    learn = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS, prior=prior)], path=tmp_path, dls=exportable_dls())
    if trained: fit_seeded(learn, 1)
    x = torch.randn(3, 6)
    before = learn.model.eval()(x)
    learn.export('multi.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'multi.pkl')
    assert loaded.multi_label_smoothing.eps == EPS
    close(loaded.multi_label_smoothing.prior, prior)
    close(loaded.model.eval()(x), before)
    loaded.dls = exportable_dls()
    ref = reference_learner(u=.25, dls=exportable_dls(), model=deepcopy(loaded.model))
    same_training(quiet(loaded), ref, 1)


def exportable_dls():
    "fastai's own TfmdDLs, which `export` can empty"
    y = {i: tensor([float(i % 2), float(i % 3 == 0), 1., 0., float(i > 10)]) for i in range(32)}
    dsets = Datasets(list(range(32)), [[Row(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)))],
                                       [Row(torch.stack(list(y.values())))]], splits=(range(24), range(24, 32)))
    return dsets.dataloaders(bs=8, shuffle=False, device=CPU, num_workers=0)


class Row:
    def __init__(self, rows): self.rows = rows
    def __call__(self, i): return self.rows[i]


def pickled(o): return pickle.loads(pickle.dumps(o))
def cloudpickled(o): return pickle.loads(cloudpickle.dumps(o))


@pytest.mark.parametrize('way', [pickled, cloudpickled, deepcopy])
def test_point_6_the_callback_pickles(way):
    cb = way(MultiLabelSmoothingCallback(EPS, prior=torch.full((5,), .25)))
    same_training(multi_learner(cbs=[cb]), reference_learner(u=.25))


def test_point_6_learner_pickles_after_a_fit():
    learn = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS)])
    fit_seeded(learn, 1)
    loaded = pickle.loads(pickle.dumps(learn))
    ref = reference_learner(model=deepcopy(learn.model))
    same_training(loaded, ref, 1)


def test_lr_find_then_fit(tmp_path):
    learn = multi_learner(cbs=[MultiLabelSmoothingCallback(EPS)], path=tmp_path)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    same_training(learn, reference_learner(), 1)


@pytest.mark.parametrize('target', [torch.zeros(64).long(), torch.zeros(64, 1).long(), torch.zeros(64, 4)], ids=['index', 'column', 'float'])
def test_point_5_a_target_that_the_stock_loss_would_choke_on(target):
    ds = list(zip(torch.randn(64, 8), target))
    dls = DataLoaders(DataLoader(ds, bs=16), DataLoader(ds, bs=16))
    learn = Learner(dls, nn.Linear(8, 3), loss_func=BCEWithLogitsLossFlat(), cbs=MultiLabelSmoothingCallback())
    with learn.no_logging(), pytest.raises(TypeError, match='target') as e: learn.fit(1)
    assert target.is_floating_point() or 'LabelSmoothingCrossEntropyFlat' in str(e.value)


def test_callbacks_after_it_see_the_smoothed_loss_in_loss_grad():
    "its value, too: what is backpropagated, and is reported to be"
    seen = Spy(lambda l: (l.loss_grad.item(), l.loss.item(), smooth_binary_cross_entropy_with_logits(l.pred, l.y.round(), .2).item()), 'before_backward')
    learn = tensor_learner(multi_dls(), mlp(), BCEWithLogitsLossFlat(), cbs=[MultiLabelSmoothingCallback(.2), seen])
    learn.fit(1)
    assert len(seen.seen) == 3
    for _, (grad, loss, expected) in seen.seen: assert grad == pytest.approx(loss) == pytest.approx(expected)
