"Two processes train, and measure, what one does with twice the batch."
import contextlib, io, pickle, pytest
pytest.importorskip('accelerate')
import fastai.distributed   # noqa: F401  patches Learner
from helpers import *
from fastai_smooth.all import *
import fastai_smooth.distributed
from fastai_smooth.kernels.checks import _warn_flip
from processes import fastai_on_cpu, in_processes, needs_distributed
from reference import distance

N, BS, W = 320, 8, torch.tensor([.2, 1., 3., .5])   # rows, and rows a batch and process: 20 steps of two processes

def interleaved(o):
    "The rows as two processes see them, each a half of the list: a batch of one process is one of theirs after the other"
    return o.view(2, -1, BS, *o.shape[1:]).transpose(0, 1).reshape(o.shape)

def learner(loss_func, two=True, multi=False, junk=False, half_muted=False, **kwargs):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(N, 6, generator=g), torch.randn(6, 4, generator=g)
    y = ((x @ w) > .5).float() if multi else (x @ w).argmax(1)
    if junk: y[torch.rand(N, generator=g) < torch.linspace(0, .9, N)] = -100   # most of them in the second process
    if half_muted: y[:N//2] = 1   # of weight 0: the mean of the first process is nan
    if not two: x, y = interleaved(x), interleaved(y)
    dls = DataLoaders(*[DataLoader(list(zip(x, y)), bs=BS if two else 2*BS, num_workers=0) for _ in range(2)], device=CPU)
    return quiet(Learner(dls, mlp(k=4), loss_func=loss_func, opt_func=SGD, lr=.2, **kwargs))

def weighted(weight=W): return LabelSmoothingCrossEntropyFlat(.1, weight=weight)
LEARNERS = {
    'the loss': lambda two: learner(LabelSmoothingCrossEntropyFlat(.1), two),
    'the flag': lambda two: learner(CrossEntropyLossFlat(), two, label_smoothing=.1),
    'the callback': lambda two: learner(BCEWithLogitsLossFlat(), two, multi=True, cbs=MultiLabelSmoothingCallback(.1)),
    'online': lambda two: learner(CrossEntropyLossFlat(), two, label_smoothing='online'),
    'online labels': lambda two: learner(BCEWithLogitsLossFlat(), two, multi=True, label_smoothing='online'),
    'a pair': lambda two: learner(BCEWithLogitsLossFlat(), two, multi=True, label_smoothing=(.2, 0.)),
    'a fused head': lambda two: learner(CrossEntropyLossFlat(), two, label_smoothing='online', cbs=FusedHead(chunk_rows=3)),
    'a fused head, weights': lambda two: learner(weighted(), two, junk=True, cbs=[GlobalMean(), FusedHead(chunk_rows=3)]),
    'a schedule': lambda two: learner(CrossEntropyLossFlat(), two, label_smoothing=.1, cbs=LabelSmoothingScheduler(SchedLin(.3, 0.))),
    'weights and ignored rows': lambda two: learner(weighted(), two, junk=True, cbs=GlobalMean()),
    'the same, the flag': lambda two: learner(CrossEntropyLossFlat(weight=W), two, junk=True, label_smoothing=.2, cbs=[GlobalMean(), GradientClip(.5)]),
    'weights, accumulated': lambda two: learner(weighted(), two, cbs=[GradientAccumulation(4*BS if two else 8*BS), GlobalMean()]),
    'muted': lambda two: learner(weighted(torch.tensor([1., 0., 0., 1.])), two, half_muted=True, cbs=GlobalMean()),
    'local means': lambda two: learner(weighted(), two, junk=True)}

def trained(learn, ctx=contextlib.nullcontext):
    n = 1 + bool(learn._grab_cbs(OnlineLabelSmoothing) or [cb for cb in learn._grab_cbs(MultiLabelSmoothingCallback) if cb.online])   # whose first epoch teaches the second
    with ctx(): learn.fit(n)
    assert learn.train_iter == 20*n
    return weights(learn)

def printed():
    "What is printed and warned of, in a fit with all that is ours"
    _warn_flip.cache_clear()   # it is given once in a process
    out = io.StringIO()
    with warnings.catch_warnings(record=True) as seen, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter('always')
        learn = learner(CrossEntropyLossFlat(weight=torch.tensor([1e-4, 1., 1., 1.])), label_smoothing=.3)   # past the flip
        learn.fit(1)
        learn.fit_temperature()
        learn.logger, learn.metrics = print, [ECE(), NLL()]
        with learn.distrib_ctx(sync_bn=False): learn.fit(1)
    return out.getvalue(), ' '.join(str(w.message) for w in seen if 'fastai_smooth' in w.filename or w.category is UserWarning)

def refused():
    "What is said to those who ask each process what can't be told from a part of the data"
    learn, said = learner(CrossEntropyLossFlat()), []
    with learn.distrib_ctx(sync_bn=False):
        for f in (learn.fit_temperature, learn.eps_find):
            try: f()
            except RuntimeError as e: said.append(str(e))
    return said

def everything():
    fastai_on_cpu()
    return {name: trained(learn := make(True), partial(learn.distrib_ctx, sync_bn=False)) for name, make in LEARNERS.items()}, printed(), refused()

@pytest.fixture(scope='module')
def two():
    "What two processes come to: to start them takes longer than all they do"
    return in_processes(2, everything)

@needs_distributed
@pytest.mark.parametrize('name', LEARNERS)
def test_two_processes_are_one_with_twice_the_batch(name, two):
    "weights after 20 steps; but for local means of weighted and ignored rows, which are another loss"
    start, one = weights(LEARNERS[name](False)), trained(LEARNERS[name](False))
    off = [(learned[name] - one).abs().max().item() for learned, *_ in two]
    assert (one - start).abs().max() > .1   # it has learned
    if name == 'local means': assert min(off) > .01
    else: assert max(off) < 1e-5, off

@needs_distributed
def test_rank_0_alone_prints_and_none_finds_a_temperature_or_an_eps(two):
    "from a part of the data these came out differently in each process"
    (_, (first, warned), _), (_, second, _) = two
    assert first.startswith('[0, ') and 'outweigh' in warned and 'keeps the temperature' in warned and second == ('', '')
    for *_, said in two: assert len(said) == 2 and all('inside distrib_ctx' in o for o in said)

def test_global_mean_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="reduction='mean'"): learner(CrossEntropyLossFlat(reduction='sum'), cbs=GlobalMean()).fit(1)
    with pytest.raises(ValueError, match='two GlobalMeans'): learner(weighted(), cbs=[GlobalMean(), GlobalMean()]).fit(1)
    for loss in (fastai.losses.LabelSmoothingCrossEntropyFlat(weight=W), FocalLossFlat(weight=W), partial(F.cross_entropy, weight=W), BCEWithLogitsLossFlat()):
        with pytest.raises(TypeError, match='GlobalMean serves CrossEntropyLossFlat'): learner(loss, cbs=GlobalMean()).fit(1)

def test_global_mean_is_exported_without_its_group():
    cb = GlobalMean(group=lambda: None)   # what can't be pickled
    assert pickle.loads(pickle.dumps(cb)).group is None and cb.group is not None

@pytest.mark.parametrize('cbs', [[], [MixUp], [CutMix], [partial(GradientAccumulation, 16)]])
@pytest.mark.parametrize('first', [True, False], ids=['added first', 'added last'])
def test_global_mean_changes_nothing_in_one_process(cbs, first):
    "nor with MixUp, whose mean is over all rows, weighted or not, or with gradient accumulation, which divides what is put there"
    def fitted(*more):
        set_seed(1)
        if cbs == [CutMix]: learn = tensor_learner(tensor_dls(torch.randn(32, 1, 8, 8), torch.arange(32) % 4), flat_mlp(4), weighted())
        else: learn = learner(weighted(), junk=not cbs)
        learn.add_cbs([*more, *(o() for o in cbs)] if first else [*(o() for o in cbs), *more])
        return weights(fit_seeded(learn, 1))
    assert distance(fitted(GlobalMean()), fitted()) < 1e-5

def test_global_mean_asks_others_in_training_alone(monkeypatch):
    "in validation processes may have unlike numbers of batches: one would wait for ever"
    asked, dls = [], single_dls()
    monkeypatch.setattr(fastai_smooth.distributed, 'global_mean', lambda loss_sum, n, group: asked.append(n.item()) or loss_sum / n)
    tensor_learner(dls, mlp(k=4), CrossEntropyLossFlat(), cbs=GlobalMean()).fit(1)
    assert asked == [16]*len(dls.train) and len(dls.valid)
