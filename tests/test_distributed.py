"Two processes train, and measure, what one does with twice the batch."
import contextlib, io, pickle

import pytest

pytest.importorskip('accelerate')
import fastai.distributed   # noqa: F401  before the processes are forked
from helpers import *
from fastai_smooth.all import *
import fastai_smooth.distributed
from fastai_smooth.kernels.checks import _warn_flip
from processes import fastai_on_cpu, in_processes, needs_distributed
from reference import distance

import torch.distributed as dist

N, BS = 320, 8   # rows, and rows a batch and process: 20 steps of two processes


def interleaved(o):
    "The rows as two processes see them: each has a half of the list, and a batch of one process is one of theirs after the other"
    a, b = o[:N//2].split(BS), o[N//2:].split(BS)
    return torch.cat([t for ab in zip(a, b) for t in ab])


def learner(loss_func, k=4, two=True, multi=False, junk=False, half_muted=False, **kwargs):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(N, 6, generator=g), torch.randn(6, k, generator=g)
    y = ((x @ w) > .5).float() if multi else (x @ w).argmax(1)
    if junk: y[torch.rand(N, generator=g) < torch.linspace(0, .9, N)] = -100   # most of them in the second process
    if half_muted: y[:N//2] = 1   # of weight 0: the mean of the first process is nan
    if not two: x, y = interleaved(x), interleaved(y)
    bs = BS if two else 2*BS
    dls = DataLoaders(*[DataLoader(list(zip(x, y)), bs=bs, num_workers=0) for _ in range(2)], device=CPU)
    return quiet(Learner(dls, mlp(k=k), loss_func=loss_func, opt_func=SGD, lr=.2, **kwargs))


W = torch.tensor([.2, 1., 3., .5])
def weighted(): return LabelSmoothingCrossEntropyFlat(.1, weight=W)
SCHED = lambda: LabelSmoothingScheduler(SchedLin(.3, 0.))

LEARNERS = {
    'the loss': lambda two: learner(LabelSmoothingCrossEntropyFlat(.1), two=two),
    'the flag': lambda two: learner(CrossEntropyLossFlat(), two=two, label_smoothing=.1),
    'the callback': lambda two: learner(BCEWithLogitsLossFlat(), two=two, multi=True, cbs=MultiLabelSmoothingCallback(.1)),
    'a schedule': lambda two: learner(CrossEntropyLossFlat(), two=two, label_smoothing=.1, cbs=SCHED()),
    'weights and ignored rows': lambda two: learner(weighted(), two=two, junk=True, cbs=GlobalMean()),
    'weights and ignored rows, the flag': lambda two: learner(CrossEntropyLossFlat(weight=W), two=two, junk=True, label_smoothing=.2, cbs=[GlobalMean(), GradientClip(.5)]),
    'weights, accumulated': lambda two: learner(weighted(), two=two, cbs=[GradientAccumulation(4*BS if two else 8*BS), GlobalMean()]),
    'muted': lambda two: learner(LabelSmoothingCrossEntropyFlat(.1, weight=torch.tensor([1., 0., 0., 1.])), two=two, half_muted=True, cbs=GlobalMean()),
    'local means': lambda two: learner(weighted(), two=two, junk=True),
}


def trained(learn, ctx=contextlib.nullcontext):
    with ctx(): learn.fit(1)
    assert learn.opt.state_dict()['state'] is not None and learn.train_iter == N // learn.dls.train.bs // (2 if dist.is_initialized() else 1) == 20
    return weights(learn)


def train_all():
    fastai_on_cpu()
    return {name: trained(learn := make(True), partial(learn.distrib_ctx, sync_bn=False)) for name, make in LEARNERS.items()}


@pytest.fixture(scope='module')
def two(): return in_processes(2, train_all)


@needs_distributed
@pytest.mark.parametrize('name', LEARNERS)
def test_two_processes_are_one_with_twice_the_batch(name, two):
    "weights after 20 steps; but for local means of weighted and ignored rows, which are another loss"
    one = trained(LEARNERS[name](False))
    off = [(o[name] - one).abs().max().item() for o in two]
    assert (one - weights(LEARNERS[name](False))).abs().max() > .1   # it has learned
    if name == 'local means': assert min(off) > .01
    else: assert max(off) < 1e-5, off


def test_global_mean_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="reduction='mean'"): learner(CrossEntropyLossFlat(reduction='sum'), cbs=GlobalMean()).fit(1)
    with pytest.raises(ValueError, match='two GlobalMeans'): learner(weighted(), cbs=[GlobalMean(), GlobalMean()]).fit(1)
    for loss in (fastai.losses.LabelSmoothingCrossEntropyFlat(weight=W), FocalLossFlat(weight=W), partial(F.cross_entropy, weight=W), BCEWithLogitsLossFlat()):
        with pytest.raises(TypeError, match='GlobalMean serves CrossEntropyLossFlat'): learner(loss, cbs=GlobalMean()).fit(1)


def test_global_mean_is_exported_without_its_group():
    cb = GlobalMean(group=lambda: None)   # what can't be pickled
    assert pickle.loads(pickle.dumps(cb)).group is None and cb.group is not None


@pytest.mark.parametrize('cbs', [(), (MixUp,), (CutMix,)])
def test_global_mean_changes_nothing_in_one_process(cbs):
    "nor with MixUp, whose mean is over all rows, weighted or not"
    if cbs == (CutMix,): make = lambda o: quiet(Learner(tensor_dls(torch.randn(32, 1, 8, 8), torch.arange(32) % 4), flat_mlp(4), loss_func=o, opt_func=SGD))
    else: make = partial(learner, junk=not cbs)
    seen = []
    for more in ([], [GlobalMean()]):
        torch.manual_seed(1)
        learn = make(weighted())
        learn.add_cbs([o(.4) for o in cbs] + more)
        seen.append(weights(fit_seeded(learn, 1)))
    torch.testing.assert_close(*seen)


def printed():
    "What a process prints and warns of, in a fit with all that is ours"
    fastai_on_cpu()
    _warn_flip.cache_clear()   # it is given once in a process, and this one is a fork
    out = io.StringIO()
    with warnings.catch_warnings(record=True) as seen, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter('always')
        learn = learner(CrossEntropyLossFlat(weight=torch.tensor([1e-4, 1., 1., 1.])), label_smoothing=.3)   # past the flip
        learn.fit(1)
        learn.fit_temperature()
        learn.logger, learn.metrics = print, [ECE(), NLL()]
        with learn.distrib_ctx(sync_bn=False): learn.fit(1)
    return out.getvalue(), ' '.join(str(w.message) for w in seen if 'fastai_smooth' in w.filename or w.category is UserWarning)


@needs_distributed
def test_rank_0_alone_prints():
    (first, warned), second = in_processes(2, printed)
    assert first.startswith('[0, ') and 'outweigh' in warned and 'keeps the temperature' in warned
    assert second == ('', '')


def inside():
    "What can't be told from a part of the data, asked of each process"
    fastai_on_cpu()
    learn, said = learner(CrossEntropyLossFlat()), []
    before = weights(learn), learn.loss_func
    with learn.distrib_ctx(sync_bn=False):
        for f in (learn.fit_temperature, learn.eps_find):
            try: f()
            except RuntimeError as e: said.append(str(e))
    assert learn.loss_func is before[1] and torch.equal(weights(learn), before[0])
    return said


@needs_distributed
def test_no_temperature_and_no_eps_from_a_part_of_the_data():
    "inside distrib_ctx they came out differently in each process"
    for said in in_processes(2, inside): assert len(said) == 2 and all('inside distrib_ctx' in o for o in said)


def test_global_mean_asks_others_in_training_alone(monkeypatch):
    "in validation processes may have unlike numbers of batches: one would wait for ever"
    asked, dls = [], single_dls()
    monkeypatch.setattr(fastai_smooth.distributed, 'global_mean', lambda loss_sum, n, group: asked.append(n.item()) or loss_sum / n)
    tensor_learner(dls, mlp(k=4), CrossEntropyLossFlat(), cbs=GlobalMean()).fit(1)
    assert asked == [16]*len(dls.train) and len(dls.valid)


@pytest.mark.parametrize('first', [True, False], ids=['added first', 'added last'])
def test_global_mean_keeps_what_others_make_of_the_loss(first):
    "One process, whose mean it is: gradient accumulation divides what it puts there"
    def trained(*cbs):
        set_seed(1)
        learn = tensor_learner(single_dls(bs=4), mlp(k=4), LabelSmoothingCrossEntropyFlat(.1, weight=torch.tensor([.2, 1, 3, .5])), cbs=list(cbs), opt_func=SGD)
        learn.fit(1, .1)
        return weights(learn)
    pair = [GlobalMean(), GradientAccumulation(8)]
    assert distance(trained(*(pair if first else pair[::-1])), trained(GradientAccumulation(8))) < 1e-6 < 1e-3 < distance(trained(GradientAccumulation(8)), trained())
