"""Callbacks together: ours beside each of fastai's, and after a fault at every event of the loop.

Every Learner of ours is compared with one that has fastai's own parts and a loss that smooths its own targets, on the same random numbers, and with
the same fault."""
import functools

import pytest
from helpers import *
from reference import distance
from fastai.callback.core import _events, _inner_loop
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.rnn import RNNCallback, RNNRegularizer
from torch.amp import GradScaler, autocast

from fastai_smooth.all import FusedHead, LabelSmoothingScheduler, MultiLabelSmoothingCallback, OnlineLabelSmoothing

EPS, SCHED, K, N_TRAIN = .125, SchedLin(.3, .05), 4, 2  # configured eps, scheduled eps, classes, training batches an epoch
PAIR, PAIRS = (.25, .0625), SchedLin(np.array([.3, 0.]), np.array([.05, .1]))  # of negatives and of positives
OURS = {'callback': (True, None), 'flag': (False, None), 'online': (False, None), 'pair': (True, None), 'online labels': (True, None)}  # several labels? a schedule?
OURS |= {'fused flag': (False, None), 'fused online': (False, None)}  # with a FusedHead: of no batch are there all logits
OURS |= {f'scheduled {kind}': (multi, PAIRS if kind == 'pair' else SCHED) for kind, (multi, _) in OURS.items()}

class OwnSmoothing:
    "The reference: smooths its own targets while the model trains, in float64, straight from the formula."
    reduction, soft = 'mean', torch.full((K, K), 1/K, dtype=torch.double)  # MixUp sets the first, a teacher the second
    def __init__(self, multi, sched, eps):
        self.y_int, self.sched, self.configured = not multi, sched, eps
        if multi: self.soft = torch.full((2, K), .5, dtype=torch.double)
    def eps(self):
        if not self.learn.model.training: return 0.
        return self.sched(self.learn.pct_train) if self.sched else self.configured
    def smoothed(self, y):
        eps = self.eps()
        if np.ndim(eps): return eps[0] + (1-eps[0]-eps[1])*y
        return (1-2*eps)*y + 2*eps*(y*self.soft[1] + (1-y)*self.soft[0])
    def __call__(self, pred, y):
        x, eps = pred.double(), self.eps()
        if self.y_int: losses = -(((1-eps)*F.one_hot(y, K) + eps*self.soft[y])*x.log_softmax(-1)).sum(-1)
        else: losses = F.softplus(x) - self.smoothed(y.double())*x
        return losses.float() if self.reduction == 'none' else losses.mean().float()

class OwnTeacher(Callback):
    "The reference for online label smoothing: what the rows that are right are given, one after the other, in float64."
    order = -60
    def __init__(self, loss): self.loss = loss
    def before_train(self): self.right = [[] for _ in range(K)]
    def after_loss(self):
        mix = getattr(self.learn.loss_func, '__self__', None)  # MixUp and CutMix have a loss that is a method
        for i, row in enumerate(self.pred.double().softmax(1)):
            second = mix and mix.lam[i if len(mix.lam) > 1 else 0] < .5
            y = (mix.yb1[0] if second else self.y)[i]
            if self.training and row.argmax() == y: self.right[y].append(row.detach())
    def after_train(self): self.loss.soft = torch.stack([torch.stack(o).mean(0) if o else torch.full((K,), 1/K).double() for o in self.right])

class TeacherOfLabels(OwnTeacher):
    "The same for labels: what those that are right are given, label after label"
    order = -1e9  # as ours, before all others
    def before_train(self): self.right = [[[] for _ in range(K)] for _ in range(2)]
    def after_loss(self):
        for p, y in zip(self.pred.double().sigmoid(), self.y):
            for k in range(K):
                there = y[k] > .5
                if self.training and p[k] != .5 and (p[k] > .5) == there: self.right[int(there)][k].append(p[k].detach())
    def after_train(self): self.loss.soft = torch.tensor([[sum(o)/len(o) if o else .5 for o in row] for row in self.right]).double()

class CPUMixedPrecision(MixedPrecision):
    "fastai's asks for autocast('cuda'), which does nothing on a CPU"
    def before_fit(self):
        dtype = torch.bfloat16 if self.amp_mode == AMPMode.BF16 else torch.float16
        self.autocast, self.scales = autocast('cpu', dtype=dtype), L()
        self.learn.scaler = GradScaler('cpu', init_scale=2.**10, enabled=dtype == torch.float16)

class NaNAt(Callback):
    "The second batch is nan, and so are its predictions"
    order = -20
    def before_batch(self):
        if self.training and self.learn.train_iter == 1: self.learn.xb = tuple(x*float('nan') for x in self.xb)

THEIRS = dict(
    fp16=lambda: [CPUMixedPrecision()], bf16=lambda: [CPUMixedPrecision(amp_mode=AMPMode.BF16)],
    accumulation=lambda: [GradientAccumulation(12)], clip=lambda: [GradientClip(.05)],
    mixup=lambda: [MixUp()], cutmix=lambda: [CutMix()], rnn=lambda: [RNNCallback(), RNNRegularizer(alpha=2., beta=1.)],
    param_scheduler=lambda: [ParamScheduler({'lr': SchedLin(.05, .5)})],
    early_stopping=lambda: [EarlyStoppingCallback(min_delta=10.)],  # nothing is that much better: stops after two epochs
    save_model=lambda: [SaveModelCallback(min_delta=10.)],          # so the first model is the best, and comes back
    terminate_on_nan=lambda: [NaNAt(), TerminateOnNaNCallback()])
SETS = [(kind, name) for kind in ('scheduled callback', 'scheduled flag', 'scheduled online', 'scheduled pair', 'scheduled online labels',
                                           'scheduled fused flag', 'scheduled fused online') for name in THEIRS] + [  # and two that meet ours at the same events
    ('callback', 'fp16', 'accumulation'),  # a scaled loss_grad, scaled again, and batches cancelled before the step
    ('callback', 'fp16', 'clip'), ('callback', 'accumulation', 'rnn'),   # an addition to loss_grad and a scale
    ('callback', 'bf16', 'mixup'), ('callback', 'mixup', 'cutmix'),      # mixed twice
    ('flag', 'mixup', 'fp16'),             # the loss is swapped, and runs under autocast
    ('flag', 'cutmix', 'accumulation'), ('flag', 'mixup', 'terminate_on_nan'),  # the fit is cancelled while the loss is swapped
    ('online labels', 'mixup', 'fp16'), ('online labels', 'cutmix', 'accumulation'), ('pair', 'fp16', 'accumulation'),
    ('online', 'mixup', 'fp16'), ('online', 'cutmix', 'accumulation'), ('online', 'mixup', 'terminate_on_nan'),
    ('fused flag', 'mixup', 'fp16'), ('fused flag', 'cutmix', 'accumulation'), ('fused flag', 'fp16', 'clip'),
    ('fused online', 'mixup', 'fp16'), ('fused online', 'accumulation', 'rnn'), ('fused online', 'mixup', 'terminate_on_nan'),
    ('scheduled callback', 'save_model', 'early_stopping'), ('scheduled flag', 'mixup', 'param_scheduler')]

class Watch(Callback):
    "Notes the events at which `yb` is not the very tuple that it was before the batch's backward, or has another value."
    order, hard = 98, None
    def __init__(self):
        self.wrong, told_before = set(), ('after_create', 'before_fit', 'before_batch', 'before_backward', 'after_cancel_backward')
        for e in set(_events) - {*told_before}: setattr(self, e, partial(self._ask, e))
    def before_fit(self): self.hard = None
    def before_batch(self): self.hard, self.value = self.learn.yb, self.learn.yb[0].clone()
    def _ask(self, event):
        if self.hard is not None and (self.learn.yb is not self.hard or not torch.equal(self.hard[0], self.value)): self.wrong.add(event)

def make(kind, names=(), ours=True, first=True, path=None):
    "A Learner with what `kind` (multi-label? scheduled?) and `names` say, ours added first or last; with `ours=False` the reference for it."
    (multi, sched), theirs, grads = OURS[kind], [cb for n in names for cb in THEIRS[n]()], Grads()
    eps, online = PAIR if kind.endswith('pair') else EPS, 'online' in kind
    mine = [MultiLabelSmoothingCallback(eps, 'online' if online else None)]*multi + ([LabelSmoothingScheduler(sched)] if sched else []) if ours else []
    loss, g = (BCEWithLogitsLossFlat() if multi else CrossEntropyLossFlat()) if ours else OwnSmoothing(multi, sched, eps), torch.Generator().manual_seed(0)
    x, y = torch.randn(24, *[6] if 'rnn' in names else [1, 8, 8], generator=g), (torch.rand(24, K, generator=g) < .4).float()
    dls, model = tensor_dls(x, y if multi else y.argmax(1), bs=8, n_valid=8), (rnn_net if 'rnn' in names else flat_mlp)(K)
    flag = EPS if ours and first and not multi and not online else None
    learn = tensor_learner(dls, model, loss, path=path, cbs=[] if first else theirs, label_smoothing=flag)
    if ours and not multi and flag is None: mine += learn.to_smooth(EPS, prior='online' if online else None)._grab_cbs(OnlineLabelSmoothing)
    if online and not ours: learn.add_cb((TeacherOfLabels if multi else OwnTeacher)(loss))
    if ours and 'fused' in kind: mine.append(FusedHead(chunk_rows=3))
    learn.add_cbs([o for o in mine if o not in learn.cbs] + (theirs if first else []) + [grads, Watch()])
    if not ours: loss.learn = learn
    learn.recorder.smooth_loss.beta = 0.  # record each batch's own loss
    grads.seen, learn.recorder.losses, learn.recorder.values = [], [], []  # for a fit that ends before their before_fit
    learn.found, learn.mine, learn.sched = learn.loss_func, mine, sched
    learn.owner, learn.configured = mine[0] if multi and ours else learn.loss_func, eps
    return learn

def record(learn):
    validation = [tensor([ifnone(v, np.nan) for v in o]) for o in learn.recorder.values]
    return dict(gradients=learn.grads.seen, weights=[weights(learn).clone()], losses=learn.recorder.losses, validation=validation)

def differences(ours, ref, names=('gradients', 'weights', 'losses', 'validation'), slack=1e-6):
    return [k for k in names if len(ours[k]) != len(ref[k]) or any(distance(a, b) > slack for a, b in zip(ours[k], ref[k]))]

def leftovers(learn, n_epoch=0, names=()):
    "What a fit of ours must not leave behind; and after one of `n_epoch` without a fault, eps is recorded batch by batch"
    res, n = [f'{e} (seen)' for e in learn.watch.wrong], len(learn.recorder.losses)
    res += ['forward' for m in learn.model.modules() if 'forward' in vars(m)]
    if learn.loss_func is not learn.found: res.append('loss_func')
    if learn.owner.eps != learn.configured: res.append(f'eps {learn.owner.eps}')
    if not (learn.mine and learn.sched and n_epoch and n): return res
    hps, expected = getattr(learn.recorder, 'hps', {}), np.array([learn.sched(i/(N_TRAIN*n_epoch)) for i in range(n)])
    right = set(hps) == {'eps', *['lr']*('param_scheduler' in names)} and distance(hps['eps'], expected) < 1e-6
    return res if right else [*res, f'hps {hps}']

@functools.cache
def trained_alone(kind, rnn): return weights(fit_seeded(make(kind, ['rnn']*rnn).remove_cb(RNNRegularizer), 3))

@pytest.mark.parametrize('first', [True, False], ids=['added first', 'added last'])
@pytest.mark.parametrize('names', SETS, ids=' '.join)
def test_beside_fastai_s_callbacks(names, first, tmp_path):
    "Ours and the reference train alike, but for the last bit of half precision"
    kind, *names = names
    ours, ref = (fit_seeded(make(kind, names, o, first, tmp_path/f'{o}'), 3) for o in (True, False))
    assert len(ref.grads.seen) > 1 and ref.grads.seen[0].abs().max() > 0
    slack = max({'fp16': 2**-9, 'bf16': 2**-6}.get(n, 1e-6) for n in names)
    assert differences(record(ours), record(ref), slack=slack) + leftovers(ours, 3, names) == []
    assert distance(weights(ours), trained_alone(kind, 'rnn' in names)) > 1e-5  # so theirs did something

# ---------------------------------------------------------------- a fault at every event

IN_BATCH = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch']
IN_FIT = ['before_fit', 'before_epoch', 'before_train', *IN_BATCH, 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit']
FAULTS = {CancelBatchException: IN_BATCH, CancelBackwardException: ['before_backward'], CancelStepException: ['before_step'],
          CancelTrainException: ['before_train', *IN_BATCH], CancelEpochException: ['before_epoch', 'after_train', 'before_validate', *IN_BATCH],
          CancelFitException: IN_FIT, RuntimeError: IN_FIT, KeyboardInterrupt: ['before_backward']}  # the events in which each one means something

class Fault(Callback):
    "Raises `ex` once: at `event`, and if that is a batch's, then the second batch's of training, or the first's of validation."
    def __init__(self, event, ex, in_training=True, order=0):
        self.event, self.ex, self.in_training, self.order, self.raised = event, ex, in_training, order, False
        setattr(self, event, self._raise)
    def _raise(self):
        if self.raised or self.event in _inner_loop and (self.training, self.iter) != (self.in_training, int(self.in_training)): return
        self.raised = True
        raise self.ex('fault')

def outcome(learn, *args, **kwargs):
    "The type of what a fit raises"
    try: fit_seeded(learn, *args, **kwargs)
    except (Exception, KeyboardInterrupt) as e: return type(e)

def run(learn, event, *fault):
    "Records of a fit with the fault, and of the next; and what is wrong with the Learner after the first."
    fault, cbs = Fault(event, *fault), list(learn.cbs)
    first = dict(raised=outcome(learn, 2, cbs=fault), **record(learn))
    assert fault.raised and list(learn.cbs) == cbs
    # after an uncaught exception nothing is called before the next batch
    wrong = [p for p in leftovers(learn) if p.endswith('(seen)') or not first['raised']]
    first['swapped'] = learn.loss_func is not learn.found
    learn.loss_func = learn.found  # where MixUp left its own, the user puts theirs back
    return first, dict(raised=outcome(learn, 1), **record(learn), attributes=set(vars(learn))), wrong

def after_fault(kind, names, *fault):
    "What is wrong with ours, in the fit with the fault and in the next, that is not with the reference."
    ref, ref_next, _ = run(make(kind, names, False), *fault)
    learn = make(kind, names, first=fault[-1] < 0)
    ours, ours_next, wrong = run(learn, *fault)
    wrong += [f'{o["raised"]}, not {r["raised"]}' for o, r in ((ours, ref), (ours_next, ref_next)) if o['raised'] is not r['raised']]
    if ours['swapped'] and not ref['swapped']: wrong.append('loss_func')
    if ours_next['attributes'] != ref_next['attributes'] - {'own_teacher', 'teacher_of_labels'} | {cb.name for cb in learn.mine}: wrong.append('attributes')
    # the loss of a batch that was cancelled before its backward is the hard one
    wrong += differences(ours, ref, ('gradients', 'weights')) + differences(ours_next, ref_next) + leftovers(learn, 1, names)
    return wrong and [(kind, *names, *fault, wrong)]

@pytest.mark.parametrize('ex', FAULTS, ids=lambda o: o.__name__)
@pytest.mark.parametrize('kind,names', [('scheduled callback', ['accumulation']), ('scheduled flag', ['mixup']), ('scheduled online', ['mixup']),
                                        ('scheduled online labels', ['accumulation']), ('scheduled fused flag', ['accumulation']),
                                        ('scheduled fused online', ['mixup'])],
                         ids=['callback', 'flag', 'online', 'online labels', 'fused', 'fused online'])
def test_fault(kind, names, ex):
    "At every event, before ours and after; two of ours at once, beside a scaled loss_grad and a swapped loss"
    places = [(e, True) for e in FAULTS[ex]] + [(e, False) for e in ('after_pred', 'after_batch') if FAULTS[ex] is IN_FIT]
    problems = [after_fault(kind, names, event, ex, training, order) for event, training in places
                for order in ([-99, 99] if event in ('after_loss', 'before_backward', 'after_backward') else [99])]
    assert not any(problems), '\n'.join(map(str, filter(None, problems)))
