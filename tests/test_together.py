"""Callbacks together: ours beside each of fastai's, and after a fault at every event of the loop (SPEC sections 2, 4 and 5).

Every Learner of ours is compared with one that has fastai's own parts and a loss that smooths its own targets, on the same
random numbers, and with the same fault. Rules that hold for one callback alone are in test_callback, test_scheduler, test_learner."""
import functools

import pytest
from helpers import *
from reference import distance
from fastai.callback.core import _events, _inner_loop
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.rnn import RNNCallback, RNNRegularizer
from torch.amp import GradScaler, autocast

from fastai_smooth.all import LabelSmoothingScheduler, MultiLabelSmoothingCallback

EPS, SCHED, K, N_TRAIN = .125, SchedLin(.3, .05), 4, 2  # configured eps, scheduled eps, classes, training batches an epoch

# Ours: is the task multi-label, and is eps scheduled?
OURS = {'callback': (True, None), 'flag': (False, None),
        'scheduled callback': (True, SCHED), 'scheduled flag': (False, SCHED)}


class OwnSmoothing:
    "The reference: smooths its own targets while the model trains, in float64, straight from the table of SPEC section 1."
    reduction = 'mean'  # MixUp sets it
    def __init__(self, multi, sched): self.y_int, self.sched = not multi, sched

    def eps(self):
        if not self.learn.model.training: return 0.
        return float(self.sched(self.learn.pct_train)) if self.sched else EPS

    def __call__(self, pred, y):
        x, eps = pred.double(), self.eps()
        if self.y_int: losses = -(((1-eps)*F.one_hot(y, K) + eps/K)*x.log_softmax(-1)).sum(-1)
        else: losses = F.softplus(x) - ((1-2*eps)*y + eps)*x
        return losses.float() if self.reduction == 'none' else losses.mean().float()


# ---------------------------------------------------------------- fastai's

class CPUMixedPrecision(MixedPrecision):
    "fastai's asks for autocast('cuda'), which does nothing on a CPU"
    def before_fit(self):
        dtype = torch.bfloat16 if self.amp_mode == AMPMode.BF16 else torch.float16
        self.autocast, self.scales = autocast('cpu', dtype=dtype), L()
        self.learn.scaler = GradScaler('cpu', init_scale=2.**10, enabled=dtype == torch.float16)


class NaNAt(Callback):
    "The predictions of the second batch are nan"
    order = -20
    def after_pred(self):
        if self.training and self.learn.train_iter == 1: self.learn.pred = self.learn.pred*float('nan')


THEIRS = dict(
    fp16=lambda: [CPUMixedPrecision()], bf16=lambda: [CPUMixedPrecision(amp_mode=AMPMode.BF16)],
    accumulation=lambda: [GradientAccumulation(12)], clip=lambda: [GradientClip(.05)],
    mixup=lambda: [MixUp()], cutmix=lambda: [CutMix()], rnn=lambda: [RNNCallback(), RNNRegularizer(alpha=2., beta=1.)],
    param_scheduler=lambda: [ParamScheduler({'lr': SchedLin(.05, .5)})],
    early_stopping=lambda: [EarlyStoppingCallback(min_delta=10.)],  # nothing is that much better: stops after two epochs
    save_model=lambda: [SaveModelCallback(min_delta=10.)],          # so the first model is the best, and comes back
    terminate_on_nan=lambda: [NaNAt(), TerminateOnNaNCallback()])

TRIPLES = [  # two of fastai's that meet ours at the same events
    ('callback', 'fp16', 'accumulation'),  # a scaled loss_grad, scaled again, and batches cancelled before the step
    ('callback', 'fp16', 'clip'),
    ('callback', 'accumulation', 'rnn'),   # an addition to loss_grad and a scale
    ('callback', 'bf16', 'mixup'),
    ('callback', 'mixup', 'cutmix'),       # mixed twice
    ('flag', 'mixup', 'fp16'),             # the loss is swapped, and runs under autocast
    ('flag', 'cutmix', 'accumulation'),
    ('flag', 'mixup', 'terminate_on_nan'),  # the fit is cancelled while the loss is swapped
    ('scheduled callback', 'save_model', 'early_stopping'),
    ('scheduled flag', 'mixup', 'param_scheduler')]


# ---------------------------------------------------------------- Learners

class Watch(Callback):
    "Notes the events at which `yb` is not the very tuple that it was before the batch's backward, or has another value."
    order, hard = 98, None
    def __init__(self):
        self.wrong = set()
        for e in _events:
            if e not in ('after_create', 'before_fit', 'before_batch', 'before_backward', 'after_cancel_backward'):
                setattr(self, e, partial(self._ask, e))
        # CastToTensor and MixUp put a `yb` of their own in before_batch: keeps what a fault before them leaves
        self.early = Spy(self._keep, 'before_batch', order=-100)
    def before_fit(self): self.hard = None
    def before_batch(self): self._keep(self.learn)
    def _keep(self, learn): self.hard, self.value = learn.yb, learn.yb[0].clone()
    def _ask(self, event):
        if self.hard is None: return
        if self.learn.yb is not self.hard or not torch.equal(self.hard[0], self.value): self.wrong.add(event)


class LogitGrad(Callback):
    "The gradient of the first batch's logits, which half precision has not rounded"
    order = 60
    def before_backward(self):
        if self.learn.train_iter == 0: self.pred_ = self.learn.pred; self.pred_.retain_grad()


def data(multi, rows):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=g) if rows else torch.randn(24, 1, 8, 8, generator=g)
    y = (torch.rand(24, K, generator=g) < .4).float() if multi else torch.randint(K, (24,), generator=g)
    return tensor_dls(x, y, bs=8, n_valid=8)


def make(kind, names=(), ours=True, first=True, path=None, extra=()):
    "A Learner with what `kind` and `names` say, ours added first or last; with `ours=False` the reference for it."
    multi, sched = OURS[kind]
    theirs, watch, grads = [cb for n in names for cb in THEIRS[n]()], Watch(), Grads()
    model = rnn_net(K) if 'rnn' in names else flat_mlp(K)
    mine = [MultiLabelSmoothingCallback(EPS)]*multi + [LabelSmoothingScheduler(SCHED)]*bool(sched) if ours else []
    loss = (BCEWithLogitsLossFlat() if multi else CrossEntropyLossFlat()) if ours else OwnSmoothing(multi, sched)
    learn = tensor_learner(data(multi, 'rnn' in names), model, loss, path=path, cbs=[] if first else theirs,
                           label_smoothing=EPS if ours and first and not multi else None)
    if ours and not first and not multi: learn.to_smooth(EPS)
    learn.add_cbs(mine + (theirs if first else []) + [grads, watch, watch.early, *extra])
    if not ours: loss.learn = learn
    learn.recorder.smooth_loss.beta = 0.  # record each batch's own loss
    grads.seen, learn.recorder.losses, learn.recorder.values = [], [], []  # for a fit that ends before their before_fit
    learn.found, learn.mine, learn.kind = learn.loss_func, mine, kind
    learn.owner = mine[0] if multi and ours else learn.loss_func  # of eps
    return learn


def record(learn):
    "What a fit did: a list of tensors of each kind."
    return dict(gradients=learn.grads.seen, weights=[weights(learn).clone()], losses=learn.recorder.losses,
                validation=[tensor([ifnone(v, np.nan) for v in o]) for o in learn.recorder.values])


def differences(ours, ref, names=('gradients', 'weights', 'losses', 'validation'), slack=1e-6):
    "Which parts of the record `ours` are not those of `ref`."
    return [k for k in names if len(ours[k]) != len(ref[k]) or any(distance(a, b) > slack for a, b in zip(ours[k], ref[k]))]


def leftovers(learn):
    "What a fit of ours must not leave behind."
    def has_tensors(o): return isinstance(o, Tensor) or isinstance(o, tuple) and any(map(has_tensors, o))
    res = [f'{cb}.{k}' for cb in learn.mine for k, v in vars(cb).items() if has_tensors(v)]
    res += [f'{e} (seen)' for e in learn.watch.wrong] + [f'eps {learn.owner.eps}']*(learn.owner.eps != EPS)
    return res + ['loss_func']*(learn.loss_func is not learn.found)


def schedule_differs(learn, n_epoch, names):
    "Is the record of eps not the schedule's, batch by batch?"
    n = len(learn.recorder.losses)
    if not OURS[learn.kind][1] or n == 0: return []
    hps, expected = learn.recorder.hps, [SCHED(i/(N_TRAIN*n_epoch)) for i in range(n)]
    right = set(hps) == {'eps', *['lr']*('param_scheduler' in names)} and distance(hps['eps'], expected) < 1e-6
    return [] if right else [f'hps {hps}']


# ---------------------------------------------------------------- ours with theirs

def check(kind, names, first, path, n_epoch=3):
    "Ours and the reference train alike; where half precision may round the last bit otherwise, the first logits' gradients do."
    slack = max({'fp16': 2**-9, 'bf16': 2**-6}.get(n, 1e-6) for n in names)
    ours, ref = (make(kind, names, o, first, path/f'{o}', [LogitGrad()]) for o in (True, False))
    for learn in (ours, ref): fit_seeded(learn, n_epoch)
    assert len(ref.grads.seen) > 1 and ref.grads.seen[0].abs().max() > 0
    assert distance(ours.logit_grad.pred_.grad, ref.logit_grad.pred_.grad) < 1e-6
    assert differences(record(ours), record(ref), slack=slack) + leftovers(ours) + schedule_differs(ours, n_epoch, names) == []
    return ours


@pytest.mark.parametrize('first', [True, False], ids=['added first', 'added last'])
@pytest.mark.parametrize('name', THEIRS)
@pytest.mark.parametrize('kind', OURS)
def test_pair(kind, name, first, tmp_path):
    ours = check(kind, [name], first, tmp_path)
    assert distance(weights(ours), trained_alone(kind, name == 'rnn')) > 1e-5  # so theirs did something


@functools.cache
def trained_alone(kind, rnn): return weights(fit_seeded(make(kind, ['rnn']*rnn).remove_cb(RNNRegularizer), 3))


@pytest.mark.parametrize('first', [True, False], ids=['added first', 'added last'])
@pytest.mark.parametrize('names', TRIPLES, ids=' '.join)
def test_triple(names, first, tmp_path): check(names[0], names[1:], first, tmp_path)


# ---------------------------------------------------------------- a fault at every event

FAULTS = [CancelBatchException, CancelStepException, CancelBackwardException, CancelEpochException, CancelTrainException,
          CancelValidException, CancelFitException, RuntimeError, KeyboardInterrupt]
TRIGGERS = dict(  # what leads to the events that come after a cancel: in before_backward, where it can, when yb is smoothed
    after_cancel_backward=('before_backward', CancelBackwardException), after_cancel_step=('before_step', CancelStepException),
    after_cancel_batch=('before_backward', CancelBatchException), after_cancel_train=('before_backward', CancelTrainException),
    after_cancel_epoch=('before_backward', CancelEpochException), after_cancel_fit=('before_backward', CancelFitException),
    after_cancel_validate=('after_pred', CancelValidException))
IN_VALIDATION = ['before_batch', 'after_pred', 'after_loss', 'after_batch', 'after_cancel_validate']
PLACES = [(e, True) for e in _events if e not in ('after_create', 'after_cancel_validate')] + [(e, False) for e in IN_VALIDATION]


class Fault(Callback):
    "Raises `ex` once: at `event`, and if that is a batch's, then the second batch's of training, or the first's of validation."
    def __init__(self, event, ex, in_training=True, order=0):
        self.event, self.ex, self.in_training, self.order, self.raised = event, ex, in_training, order, False
        setattr(self, event, self._raise)
    def _raise(self):
        at = self.event not in _inner_loop or (self.training, self.iter) == (self.in_training, int(self.in_training))
        if at and not self.raised:
            self.raised = True
            raise self.ex('fault')


def outcome(learn, *args, **kwargs):
    "The type of what a fit raises"
    try: fit_seeded(learn, *args, **kwargs)
    except (Exception, KeyboardInterrupt) as e: return type(e)


def run(learn, event, ex, in_training, order, detached=False):
    """Records of a fit with the fault, and of the next; and what is wrong with the Learner after each.
    `detached`: the fit with the fault takes our callbacks with it, and takes them off again."""
    faults = [Fault(event, ex, in_training, order)]
    if event in TRIGGERS: faults.append(Fault(*TRIGGERS[event], in_training, order=50))
    if detached: learn.remove_cbs(learn.mine)
    cbs = list(learn.cbs)
    first = dict(raised=outcome(learn, 2, cbs=faults + learn.mine*detached), **record(learn))
    assert all(f.raised for f in faults) and list(learn.cbs) == cbs
    if detached: learn.add_cbs(learn.mine)
    # after an uncaught exception nothing is called before the next batch, but for taking off what fit was given
    wrong = [p for p in leftovers(learn) if not first['raised'] or p.endswith('(seen)') or detached and p.startswith('eps')]
    first['swapped'] = learn.loss_func is not learn.found
    learn.loss_func = learn.found  # where MixUp left its own, the user puts theirs back
    second = dict(raised=outcome(learn, 1), **record(learn), attributes=set(vars(learn)))
    return first, second, wrong


def after_fault(kind, names, detached, fault, path=None):
    "What is wrong with ours, in the fit with the fault and in the next, that is not with the reference."
    ref, ref_next, _ = run(make(kind, names, False, path=path and path/'ref'), *fault)
    assert ref_next['raised'] is None
    problems = []
    for d in detached:
        learn = make(kind, names, first=fault[-1] < 0, path=path and path/f'ours {d}')
        ours, ours_next, wrong = run(learn, *fault, d)
        if ours['raised'] is not ref['raised']: wrong.append(f"raised {ours['raised']}, not {ref['raised']}")
        if ours['swapped'] and not ref['swapped']: wrong.append('loss_func')
        if ours_next['raised']: wrong.append(f"the next fit raised {ours_next['raised']}")
        if ours_next['attributes'] != ref_next['attributes'] | {cb.name for cb in learn.mine}: wrong.append('attributes')
        # the loss of a batch that was cancelled before its backward is the hard one
        wrong += differences(ours, ref, ('gradients', 'weights')) + differences(ours_next, ref_next)
        wrong += leftovers(learn) + schedule_differs(learn, 1, names)
        if wrong: problems.append((kind, *names, *fault, 'detached'*d, wrong))
    return problems


@pytest.mark.parametrize('ex', FAULTS, ids=lambda o: o.__name__)
@pytest.mark.parametrize('kind,names,cls', [('scheduled callback', [], MultiLabelSmoothingCallback),
                                            ('scheduled flag', ['mixup'], MixUp)], ids=['callback', 'flag and mixup'])
def test_fault(kind, names, cls, ex):
    "As test_callback and test_scheduler show for some: here at every event, two of ours at once, and beside MixUp's swapped loss"
    problems = []
    for event, in_training in PLACES:
        heard = hasattr(cls, event) or hasattr(LabelSmoothingScheduler, event)
        for order in (-99, 99) if heard else (99,):  # before them and after
            detached = [False, True] if order > 0 and not names else [False]
            problems += after_fault(kind, names, detached, (event, ex, in_training, order))
    assert not problems, '\n'.join(map(str, problems))


@pytest.mark.parametrize('name', THEIRS)
def test_fault_beside(name, tmp_path):
    "While `yb` is smoothed and loss_grad is theirs, too"
    problems = [p for i, ex in enumerate(FAULTS[::2])  # CancelBatch, CancelBackward, CancelTrain, CancelFit, KeyboardInterrupt
                for p in after_fault('scheduled callback', [name], [False], ('before_backward', ex, True, 99), tmp_path/f'{i}')]
    assert not problems, '\n'.join(map(str, problems))


@pytest.mark.parametrize('order', [-99, 99], ids=['before ours', 'after ours'])
@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'before_train'])
def test_a_fit_cancelled_before_its_first_batch_leaves_the_record_of_eps_alone(event, order):
    "The values of an earlier fit are not merged into it"
    learn = make('scheduled flag')
    learn.fit_one_cycle(1, .1)
    before = dict(learn.recorder.hps)
    learn.fit(1, cbs=Fault(event, CancelFitException, order=order))
    assert set(before) == {'lr', 'mom', 'eps'} and learn.recorder.hps == before


@pytest.mark.parametrize('kind', ['callback', 'flag'])
def test_a_fault_while_the_learner_is_made(kind):
    "after_create is the one event before there is a Learner: nothing is left in what was to be its parts"
    multi, _ = OURS[kind]
    for ex in FAULTS:
        loss, cbs = BCEWithLogitsLossFlat() if multi else CrossEntropyLossFlat(), [MultiLabelSmoothingCallback(EPS)]*multi
        def learner(*faults): return tensor_learner(data(multi, False), flat_mlp(K), loss, cbs=cbs+[*faults],
                                                    label_smoothing=None if multi else EPS)
        with pytest.raises(ex): learner(Fault('after_create', ex))
        ours, ref = learner(), make(kind, ours=False)
        for learn in (ours, ref): fit_seeded(learn, 1)
        assert distance(weights(ours), weights(ref)) < 1e-6, ex
