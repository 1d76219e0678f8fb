"LabelSmoothingScheduler: eps annealed during a fit (SPEC section 2)."
import pickle
from copy import deepcopy

import fastai.losses, pytest
from helpers import *

from fastai_smooth.all import LabelSmoothingCrossEntropyFlat, LabelSmoothingScheduler, MultiLabelSmoothingCallback

N_TRAIN = 3  # batches an epoch of single_dls(): 48 training rows, bs 16


def learner(loss=None, cbs=(), **kwargs):
    learn = tensor_learner(single_dls(), mlp(k=4), ifnone(loss, LabelSmoothingCrossEntropyFlat(.1)), **kwargs)
    for cb in cbs: learn.add_cb(cb)
    return learn


def close(a, b, **kwargs):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64),
                               **{**dict(atol=1e-6, rtol=1e-6), **kwargs})


def expected(sched, n_epoch): return [float(sched(i/(N_TRAIN*n_epoch))) for i in range(N_TRAIN*n_epoch)]


class LossAgrees(Callback):
    "The loss of each training batch against `F.cross_entropy` at the schedule's eps."
    order = 99
    def __init__(self, sched): self.sched, self.n = sched, 0
    def after_loss(self):
        if not self.training: return
        smooth = F.cross_entropy(self.pred, self.y, label_smoothing=float(self.sched(self.pct_train)))
        close(self.learn.loss.item(), smooth.item(), atol=1e-5)
        self.n += 1


def test_it_runs_after_fastai_schedulers(): assert LabelSmoothingScheduler(SchedNo(.1, .1)).order > 60


@pytest.mark.parametrize('sched', [SchedCos(.2, 0.), SchedLin(0., .3), SchedNo(.25, .25), SchedExp(.01, .2),
                                   combine_scheds([.5, .5], [SchedCos(.2, .1), SchedCos(.1, 0.)])],
                         ids=['cos', 'lin', 'no', 'exp', 'combined'])
def test_eps_follows_the_schedule_beside_one_cycle(sched):
    check = LossAgrees(sched)
    learn = learner(cbs=[check])
    learn.fit_one_cycle(2, 1e-2, cbs=LabelSmoothingScheduler(sched))
    hps = learn.recorder.hps
    assert set(hps) == {'lr', 'mom', 'eps'}
    assert {len(v) for v in hps.values()} == {2*N_TRAIN} and check.n == 2*N_TRAIN
    close([float(e) for e in hps['eps']], expected(sched, 2))
    assert learn.loss_func.eps == .1


def test_lr_and_mom_are_what_they_are_without_it():
    with_, without = learner(), learner()
    with_.fit_one_cycle(2, 1e-2, cbs=LabelSmoothingScheduler(SchedCos(.2, 0.)))
    without.fit_one_cycle(2, 1e-2)
    for k in ('lr', 'mom'): close(with_.recorder.hps[k], without.recorder.hps[k])


@pytest.mark.parametrize('first', [True, False])
def test_either_order_in_cbs_and_plot_sched(first):
    sched = SchedCos(.2, 0.)
    cbs = [LabelSmoothingScheduler(sched), ParamScheduler({'lr': SchedLin(.1, .01)})]
    learn = learner()
    learn.fit(1, cbs=cbs if first else cbs[::-1])
    assert set(learn.recorder.hps) == {'lr', 'eps'}
    close([float(e) for e in learn.recorder.hps['eps']], expected(sched, 1))
    learn.recorder.plot_sched()
    plt.close('all')


def test_without_another_scheduler():
    learn, sched = learner(), SchedCos(.2, 0.)
    learn.fit(2, cbs=LabelSmoothingScheduler(sched))
    close([float(e) for e in learn.recorder.hps['eps']], expected(sched, 2))
    assert learn.loss_func.eps == .1


def test_added_for_good_it_schedules_every_fit_anew():
    sched = SchedLin(.3, .1)
    learn = learner(cbs=[LabelSmoothingScheduler(sched), LossAgrees(sched)])
    for n in (1, 2, 1):
        learn.fit_one_cycle(n, 1e-2)
        assert {len(v) for v in learn.recorder.hps.values()} == {n*N_TRAIN}
        close([float(e) for e in learn.recorder.hps['eps']], expected(sched, n))
        assert learn.loss_func.eps == .1


def test_it_is_never_merged_into_the_record_of_an_earlier_fit():
    "fit has no scheduler of its own: the 'lr' of fit_one_cycle before it is another fit's"
    learn = learner(cbs=[LabelSmoothingScheduler(SchedLin(.3, .1))])
    learn.fit_one_cycle(2, 1e-2)
    learn.fit(1)
    hps = learn.recorder.hps
    assert len(hps['eps']) == N_TRAIN
    assert {len(v) for v in hps.values()} == {N_TRAIN}


@pytest.mark.parametrize('look', [lambda l: l.validate(), lambda l: l.get_preds()], ids=['validate', 'get_preds'])
def test_validating_leaves_the_record_alone(look):
    "validate and get_preds run before_fit and after_fit too, and train nothing"
    learn = learner(cbs=[LabelSmoothingScheduler(SchedLin(.3, .1))])
    learn.fit_one_cycle(1, 1e-2)
    before = {k: list(v) for k, v in learn.recorder.hps.items()}
    look(learn)
    assert {k: list(v) for k, v in learn.recorder.hps.items()} == before
    assert learn.loss_func.eps == .1


def test_validation_before_any_fit():
    learn = learner(cbs=[LabelSmoothingScheduler(SchedLin(.3, .1))])
    close(float(learn.validate()[0]), float(learner().validate()[0]))
    assert 'eps' not in getattr(learn.recorder, 'hps', {})


# ---------------------------------------------------------------- eps comes back

def power_cut(): return RaiseAt(RuntimeError('power cut'), 'after_loss', nth=2)


@pytest.mark.parametrize('ex', [CancelFitException, CancelTrainException, CancelEpochException, CancelBatchException])
def test_eps_is_back_after_a_cancel(ex):
    learn = learner(cbs=[RaiseAt(ex, 'after_loss', nth=2), LabelSmoothingScheduler(SchedLin(.3, .2))])
    learn.fit(2)
    assert learn.loss_func.eps == .1


def test_eps_is_back_after_an_exception_in_fit_cbs():
    "fit takes its own callbacks off, and that is being detached"
    learn = learner()
    with pytest.raises(RuntimeError, match='power cut'):
        learn.fit(2, cbs=[power_cut(), LabelSmoothingScheduler(SchedLin(.3, .2))])
    assert learn.loss_func.eps == .1


def test_eps_is_back_when_detached_after_an_exception():
    learn = learner(cbs=[LabelSmoothingScheduler(SchedLin(.3, .2))])
    with pytest.raises(RuntimeError, match='power cut'):
        learn.fit(2, cbs=power_cut())
    learn.remove_cb(LabelSmoothingScheduler)
    assert learn.loss_func.eps == .1


@pytest.mark.parametrize('mix', [False, True])
def test_eps_is_back_at_the_next_before_fit_after_an_exception(mix):
    "The configured value, not the one that the exception left: neither validated with, nor taken for configured"
    sched = SchedLin(.3, .2)
    learn = learner(cbs=[LabelSmoothingScheduler(sched)] + ([MixUp()] if mix else []))
    loss = learn.loss_func
    with pytest.raises(RuntimeError, match='power cut'):
        learn.fit(2, cbs=power_cut())
    learn.loss_func = loss  # MixUp leaves its own there; the user puts theirs back
    if mix: learn.remove_cb(MixUp)
    seen = Spy(lambda l: loss.eps, 'after_loss')
    learn.add_cb(seen).validate()
    assert set(seen.valid()) == {.1}
    learn.fit(1)
    close(seen.train(), expected(sched, 1))
    assert loss.eps == .1


def test_the_first_fit_after_an_exception_starts_and_ends_rightly():
    sched = SchedLin(.3, .2)
    learn = learner(cbs=[LabelSmoothingScheduler(sched)])
    with pytest.raises(RuntimeError): learn.fit(2, cbs=power_cut())
    learn.fit(1)
    close([float(e) for e in learn.recorder.hps['eps']], expected(sched, 1))
    assert learn.loss_func.eps == .1


def test_a_new_configured_eps_is_kept():
    learn = learner(cbs=[LabelSmoothingScheduler(SchedLin(.3, .2))])
    learn.fit(1)
    learn.loss_func.eps = .05
    learn.fit(1)
    assert learn.loss_func.eps == .05


def test_eps_that_the_user_sets_stays():
    "After an exception, and in the middle of a fit"
    learn = learner(cbs=[LabelSmoothingScheduler(SchedLin(.3, .2))])
    with pytest.raises(RuntimeError, match='power cut'): learn.fit(2, cbs=power_cut())
    learn.loss_func.eps = .3
    learn.validate()
    assert learn.loss_func.eps == .3
    learn.fit(1)
    assert learn.loss_func.eps == .3
    class Sets(Callback):
        def after_batch(self):
            if self.training and self.iter == 1: self.loss_func.eps = .05
    learn.fit(1, cbs=Sets())
    close([float(e) for e in learn.recorder.hps['eps']], expected(SchedLin(.3, .2), 1))
    assert learn.loss_func.eps == .05


def test_validation_goes_by_the_configured_eps():
    "So that the losses of epochs can be compared"
    learn = learner(cbs=[LabelSmoothingScheduler(SchedLin(.3, .2)), seen := Spy(lambda l: l.loss_func.eps, 'after_loss')])
    learn.fit(2)
    assert set(seen.valid()) == {.1} and .1 not in seen.train()


class Between(Callback):
    "Validates after each epoch, and predicts after its training"
    def after_epoch(self):
        if not self.learn.lock.locked(): self.learn.validate()
    def after_train(self): self.learn.get_preds()


def test_validating_between_epochs():
    learn = learner(cbs=[LabelSmoothingScheduler(SchedNo(.3, .3)), Between(), seen := Spy(lambda l: l.loss_func.eps, 'after_loss')])
    learn.fit(2)
    assert seen.train() == [.3]*2*N_TRAIN and learn.loss_func.eps == .1


# ---------------------------------------------------------------- with others

class MixedLossAgrees(LossAgrees):
    "MixUp's loss: each item lam of its own label's loss and 1-lam of the other's"
    def after_loss(self):
        if not self.training: return
        mix, eps = self.learn.mix_up, float(self.sched(self.pct_train))
        ce = partial(F.cross_entropy, self.pred, label_smoothing=eps, reduction='none')
        close(self.learn.loss.item(), torch.lerp(ce(mix.yb1[0]), ce(self.y), mix.lam).mean().item(), atol=1e-5)
        self.n += 1


@pytest.mark.parametrize('first', [True, False])
def test_with_mixup(first):
    sched, cbs = SchedCos(.3, 0.), [MixUp()]
    check, ours = MixedLossAgrees(sched), LabelSmoothingScheduler(sched)
    learn = learner(cbs=([ours]+cbs if first else cbs+[ours]) + [check])
    loss = learn.loss_func
    fit_seeded(learn, 2)
    assert check.n == 2*N_TRAIN and learn.loss_func is loss and loss.eps == .1
    close([float(e) for e in learn.recorder.hps['eps']], expected(sched, 2))


@pytest.mark.parametrize('smooth_valid', [False, True])
def test_with_to_smooth(smooth_valid):
    sched = SchedCos(.3, .2)
    learn = learner(CrossEntropyLossFlat(), cbs=[LossAgrees(sched)])
    learn.to_smooth(.1, smooth_valid=smooth_valid)
    learn.fit(2, cbs=LabelSmoothingScheduler(sched))
    assert learn.loss_func.eps == .1 and learn.loss_agrees.n == 2*N_TRAIN


def test_with_the_multi_label_callback():
    "It has an eps too"
    sched, cb = SchedLin(.4, .1), MultiLabelSmoothingCallback(.05)
    learn = tensor_learner(multi_dls(), mlp(), BCEWithLogitsLossFlat(), cbs=[cb, LabelSmoothingScheduler(sched)])
    lowest = Spy(lambda l: l.yb[0].min().item(), 'before_backward', order=99)
    learn.fit(2, cbs=lowest)
    close(lowest.train(), expected(sched, 2))
    assert cb.eps == .05


def test_with_the_loss_of_fastai():
    "Where only the eps of its `func` takes effect"
    sched, loss = SchedLin(.4, .1), fastai.losses.LabelSmoothingCrossEntropyFlat(eps=.1)
    learn = learner(loss, cbs=[LossAgrees(sched), LabelSmoothingScheduler(sched)])
    learn.fit(2)
    assert learn.loss_agrees.n == 2*N_TRAIN and loss.func.eps == .1


@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy],
                         ids=['fastai', 'torch', 'function'])
def test_a_loss_without_eps_is_told_so(loss):
    "A schedule is never accepted and ignored"
    with pytest.raises((TypeError, ValueError, AttributeError), match='(?i)eps|smooth'):
        learner(loss, cbs=[LabelSmoothingScheduler(SchedLin(.3, .2))]).fit(1)


def test_a_schedule_that_leaves_the_range():
    learn = learner()
    with pytest.raises(ValueError): learn.fit(1, cbs=LabelSmoothingScheduler(SchedLin(.5, 1.9)))
    assert learn.loss_func.eps == .1


def test_lr_find(tmp_path):
    learn = learner(cbs=[LabelSmoothingScheduler(SchedCos(.3, .2))], path=tmp_path)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert learn.loss_func.eps == .1


def pickled(o): return pickle.loads(pickle.dumps(o))


@pytest.mark.parametrize('way', [pickled, deepcopy])
def test_it_pickles(way):
    sched = SchedCos(.3, 0.)
    learn = learner(cbs=[LabelSmoothingScheduler(sched)])
    learn.fit(1)
    cb = way(LabelSmoothingScheduler(sched))
    other = learner()
    other.fit(1, cbs=cb)
    close([float(e) for e in other.recorder.hps['eps']], expected(sched, 1))
    again = way(learn)
    again.fit(1)
    assert again.loss_func.eps == .1
    close([float(e) for e in again.recorder.hps['eps']], expected(sched, 1))


def test_a_schedule_out_of_range_on_fastais_own_loss():
    "That loss checks nothing itself"
    import fastai.losses as fl
    from fastai.basics import DataLoader, DataLoaders, Learner, nn, torch
    ds = list(zip(torch.randn(32, 4), torch.randint(0, 3, (32,))))
    learn = Learner(DataLoaders(DataLoader(ds, bs=16), DataLoader(ds, bs=16)), nn.Linear(4, 3), loss_func=fl.LabelSmoothingCrossEntropyFlat(eps=.1))
    with learn.no_logging(), pytest.raises(ValueError, match='2'): learn.fit(1, cbs=LabelSmoothingScheduler(lambda pct: 2.))
    assert learn.loss_func.func.eps == .1
