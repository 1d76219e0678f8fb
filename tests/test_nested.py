"""What a callback of the user's does in the middle of a fit (validate, predict, look for a learning rate or an eps) changes no training:
the gradients are those of a loss that smooths its own targets, in whose fit the same was done."""
import pytest
from helpers import *
from fastai.callback.schedule import LRFinder

from fastai_smooth.all import (CalibrationInterpretation, LabelSmoothingBCEWithLogitsFlat, LabelSmoothingCrossEntropyFlat,
                               LabelSmoothingScheduler, MultiLabelSmoothingCallback)

EVENTS = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward',
          'before_step', 'after_step', 'after_batch', 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit']
ACTIONS = dict(
    validate=lambda learn: learn.validate(), get_preds=lambda learn: learn.get_preds(),
    lr_find=lambda learn: learn.lr_find(num_it=6, show_plot=False),
    eps_find=lambda learn: learn.eps_find(1, show_plot=False),
    interpretation=lambda learn: CalibrationInterpretation.from_learner(learn))
# fastai's own training can't go on either: lr_find loads weights that the graph of the batch needs, and can't train without gradients
IMPOSSIBLE = {(event, 'lr_find') for event in ('after_pred', 'after_loss', 'before_backward', 'before_validate', 'after_validate')}
PRIOR = tensor([.05, .1, .2, .3, .4])


class Aside(Callback):
    "Does `action` the second time that `event` comes (in the second batch or epoch), and then puts back what it changed in the Learner."
    def __init__(self, action, event, order):
        self.action, self.order, self.left = action, order, 1 if event in ('before_fit', 'after_fit') else 2
        setattr(self, event, self._do)

    def _do(self):
        self.left -= 1
        if self.left: return
        keep = [(o, dict(vars(o))) for o in (self.learn, self.learn.recorder)]
        training = self.learn.model.training
        self.action(self.learn)
        for o, attributes in keep: vars(o).update(attributes)
        self.learn.model.train(training)


class KeepGrads(Callback):
    "As `Grads`, over all fits: a validation in between fires before_fit, too"
    order = 1001
    def __init__(self): self.kept = []
    def after_step(self): self.kept.append(torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]))


def run(learn, action, event, order):
    "Gradients and weights after two epochs in which `action` was done; or the exception that it led to"
    aside, step = Aside(ACTIONS[action], event, order), KeepGrads()
    learn.add_cbs([step, aside])
    try: fit_seeded(learn, 2)
    except RuntimeError as e: return None, e
    assert aside.left <= 0 and len(step.kept) >= 6
    return torch.stack(step.kept), weights(learn)


def possible(action, event): return (event, action) not in IMPOSSIBLE


@pytest.mark.parametrize('action', ACTIONS)
@pytest.mark.parametrize('event', EVENTS)
def test_the_callback(action, event, tmp_path):
    for order in (-1000, 1000):
        ours = tensor_learner(multi_dls(), mlp(), BCEWithLogitsLossFlat(), tmp_path, cbs=MultiLabelSmoothingCallback(.1, PRIOR))
        ref = tensor_learner(multi_dls(), mlp(), LabelSmoothingBCEWithLogitsFlat(.1, prior=PRIOR), tmp_path)
        ours, ref = run(ours, action, event, order), run(ref, action, event, order)
        assert possible(action, event) == (ref[0] is not None) == (ours[0] is not None), (ref[1], ours[1])
        if possible(action, event):
            for a, b in zip(ours, ref): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


class Agrees(Callback):
    "Each training loss is that of the eps that `sched` has at the time, but for the batches of `eps_find`'s pilots"
    order = -500
    def __init__(self, sched): self.sched, self.seen = sched, 0
    def after_loss(self):
        if not self.training or not self.learn._grab_cbs(LabelSmoothingScheduler): return
        expected = F.cross_entropy(self.pred, self.y, label_smoothing=float(self.sched(self.pct_train)))
        torch.testing.assert_close(self.learn.loss.detach(), expected.detach(), atol=1e-6, rtol=1e-6)
        self.seen += 1


@pytest.mark.parametrize('action', ACTIONS)
@pytest.mark.parametrize('event', EVENTS)
def test_the_scheduler(action, event, tmp_path):
    sched = SchedLin(.3, .1)
    for order in (-1000, 1000):
        cbs = [LabelSmoothingScheduler(sched), check := Agrees(sched)]
        learn = tensor_learner(single_dls(), mlp(k=4), LabelSmoothingCrossEntropyFlat(.5), tmp_path, cbs=cbs)
        gradients, exception = run(learn, action, event, order)
        assert possible(action, event) == (gradients is not None), exception
        if possible(action, event): assert check.seen >= 6 and learn.loss_func.eps == .5
