"The softmax kernels: several blocks a row, what they leave to torch, and their custom ops."
import pytest, torch
import torch.nn.functional as F

from .device import DEVICE, cut, inputs, launched, off, off_torch
from fastai_smooth.kernels import smooth_cross_entropy
from fastai_smooth.kernels.targets import Smoothing, SoftmaxTarget
from fastai_smooth.kernels.triton import launch, softmax
from fastai_smooth.kernels.triton.softmax import Tile
from reference import distance, loss_and_grad

ROW = Tile(4, 16, 1), Tile(2, 4, 1), Tile(2, 2, 1, prefetch=True)   # a row in one block, in some, and in many
every_cut = pytest.mark.parametrize('tile,early', [(ROW[0], True), (ROW[1], False), (ROW[1], True), (ROW[2], False)])

# ---------------------------------------------------------------- several blocks a row

@every_cut
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_whole_blocks_masked(tile, early, reduction, cut):
    "The first, the last, and all but the true class: nothing is known yet when the first block has gone by."
    cut(tile, early)
    x, y = inputs()[0], torch.tensor([9, 8, 0, 1, 4, 5], device=DEVICE)
    x[:2, :8], x[2:4, 4:], x[4:, :4], x[4:, 6:] = (-torch.inf,) * 4
    prior, weight = (torch.rand(2, 10, device=DEVICE) + .5).double()
    for options in ({}, dict(spread='others'), dict(weight=weight, prior=prior / prior.sum())): assert off(x, y, .2, reduction=reduction, **options) < 1e-10

@every_cut
def test_rows_that_are_odd(tile, early, cut):
    "A maximum that moves from block to block; a prior all of whose mass is masked; a weight of 0 or less, and one that is masked."
    cut(tile, early)
    x, y = inputs()
    assert off(x + torch.linspace(-900, 900, 10, device=DEVICE) * torch.tensor([1, -1] * 3, device=DEVICE)[:, None], y, .2) < 1e-10
    x[::2, 0], x[::2, 2], y[:] = -torch.inf, -torch.inf, torch.tensor([1, 1, 3, 3, 9, 4])
    prior, weight = torch.tensor([.5, 0, .5] + [0] * 7, dtype=torch.float64, device=DEVICE), torch.rand(10, dtype=torch.float64, device=DEVICE) + .5
    for w in (None, weight): assert off_torch(smooth_cross_entropy, x, y, .2, prior=prior, weight=w) < 1e-10
    for w in (0., -1.): assert off(x, y, .2, weight=weight.index_fill(0, torch.tensor(2, device=DEVICE), w)) < 1e-10

@every_cut
def test_rows_that_are_lost(tile, early, cut):
    "By a logit of inf, or since the rows that count weigh nothing, when the mean is nan: masked classes and ignored rows get no gradient."
    cut(tile, early)
    x, y = inputs()
    x[:, 3], y[:] = -torch.inf, 1
    lost, zero = x.clone(), torch.zeros(10, dtype=torch.float64, device=DEVICE)
    lost[2, 5], y[1] = torch.inf, -100
    assert not loss_and_grad(smooth_cross_entropy, lost, y, backend='triton', reduction='sum')[1][:, 3].any()
    grad = loss_and_grad(smooth_cross_entropy, x, y, weight=zero, backend='triton')[1]
    assert not grad[1].any() and not grad[:, 3].any() and grad[0, :3].isnan().all()

@pytest.mark.parametrize('early', [False, True])
def test_prefetching_ends_with_the_row(early, cut):
    "The last block has four classes of eight: what is read past the last row is out of bounds."
    cut(Tile(1, 8, 1, prefetch=True), early)
    x, y = inputs(3, 12, torch.float32)
    assert softmax.plan(x, SoftmaxTarget(y, True, Smoothing(), 1))[1].prefetch and off(x, y, .2) < 1e-6

@pytest.mark.parametrize('tile,early', [(None, False), (Tile(2, 2, 1), True)])
def test_masked_by_the_least_number(tile, early, cut):
    "As Hugging Face does: their sum is -inf, which must not meet a smoothing of 0."
    cut(tile, early)
    least, v = torch.finfo(torch.float32).min, torch.tensor([0, .5, 0, 0, .5], device=DEVICE)
    x, y = torch.tensor([[1., 2., least, least, .5], [least, least, 3., least, 0.]], device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    hot = F.one_hot(y, 5)
    for target, eps, options in ((y, 0., {}), (y, 0 * v, {}), (hot.float(), 0., {}), (hot, 0., dict(multi_hot=True))):
        assert off_torch(smooth_cross_entropy, x, target, eps, **options) < 1e-6
    assert off_torch(smooth_cross_entropy, x[:1], y[:1], .1, prior=v) < 1e-6

# ---------------------------------------------------------------- who computes, and in which layout

def test_what_it_takes_and_what_it_leaves(launched):
    x, y = inputs(6, 4)
    soft, matrix = torch.rand(6, 4, dtype=torch.float64, device=DEVICE).softmax(1), torch.rand(4, 4, dtype=torch.float64, device=DEVICE).softmax(1)
    strange = torch.randn(3, 4, 3, 3, 3, device=DEVICE).double()[..., ::2][:, :, :2, :2]
    for taken, args, options in ((True, (x, y), {}), (True, (x, soft), {}), (True, (x, y), dict(eps=soft[0])), (True, (x, y), dict(prior=matrix)),
                                 (False, (x, soft.clone().requires_grad_()), {}), (False, (strange, torch.zeros(3, 2, 2, 2, dtype=torch.long, device=DEVICE)), {}),
                                 (True, (x[0], y[0]), {}), (True, (x.T.contiguous(), y), dict(axis=0))):
        launched.clear()
        assert off_torch(smooth_cross_entropy, *args, **options) < 1e-10 and bool(launched) == taken

def test_layout_that_the_gradient_does_not_share():
    "Axes that overlap: the gradient, which is dense, has one more to go over, and torch does it."
    x, y = torch.randn(48, device=DEVICE).as_strided((2, 2, 2, 3, 2), (1, 0, 4, 8, 24)), torch.zeros(2, 2, 3, 2, dtype=torch.long, device=DEVICE)
    assert off_torch(smooth_cross_entropy, x, y, axis=2) < 1e-6

@pytest.mark.parametrize('reduction,early', [('mean', True), ('none', False)])
def test_hooks_that_give_other_strides(reduction, early, cut):
    "Activation offloading may: what was kept of the rows is in the old order."
    cut(Tile(2, 4, 1), early)
    x, y = torch.randn(2, 6, 3, 2, device=DEVICE).transpose(2, 3), torch.randint(6, (2, 2, 3), device=DEVICE)
    grad = lambda: loss_and_grad(smooth_cross_entropy, x, y, reduction=reduction, backend='triton')[1]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t): hooked = grad()
    assert distance(hooked, grad()) < 1e-6

@pytest.mark.skipif(not launch.INTERPRETED, reason='no value is looked at on a GPU')
def test_class_index_out_of_range():
    with pytest.raises(IndexError, match='156'): smooth_cross_entropy(inputs()[0], torch.full((6,), 156, dtype=torch.uint8), backend='triton')

# ---------------------------------------------------------------- custom ops

@pytest.mark.parametrize('reduction', ['mean', 'none'])
@pytest.mark.parametrize('case', ['weight', 'soft', 'hot', 'prior', 'class eps', 'channels_last', 'long rows', 'float16', 'nothing'])
def test_opcheck(case, reduction, cut):
    cut(Tile(4, 4, 1) if case == 'long rows' else Tile(8, 16, 1))
    x, y = inputs(0 if case == 'nothing' else 6, 10, torch.float16 if case == 'float16' else torch.float32)
    v = torch.rand(10, device=DEVICE).softmax(0)
    if case == 'channels_last': x, y = torch.randn(2, 10, 2, 3, device=DEVICE).to(memory_format=torch.channels_last), torch.randint(10, (2, 2, 3), device=DEVICE)
    if case == 'soft': y = torch.rand_like(x).softmax(1)
    if case == 'hot': y = torch.rand_like(x) < .4
    s = Smoothing(v if case == 'class eps' else .1, v if case == 'prior' else None, multi_hot=case == 'hot')
    args = softmax.op_args(x, SoftmaxTarget(y, case not in ('soft', 'hot'), s, 1, v if case == 'weight' else None))
    tests = 'test_schema', 'test_autograd_registration', 'test_faketensor'
    torch.library.opcheck(softmax.softmax_forward, (x.requires_grad_(), *args, reduction, case == 'long rows'), test_utils=tests)
    loss, *rest = softmax.softmax_forward(x, *args, reduction, case == 'long rows')
    torch.library.opcheck(softmax.softmax_backward, (torch.ones_like(loss), *rest, x.detach(), *args, reduction), test_utils=tests)

@pytest.mark.parametrize('backend', ['eager', 'inductor'])
def test_compiled_step(backend, launched, monkeypatch):
    "The kernels stand in the graph, with eager's numbers; and what an op allocates, which may lie in the memory of a CUDA graph, is not kept."
    monkeypatch.setattr(launch, '_tickets', {})
    x, y = inputs(6, 10, torch.float32)
    f = lambda x, y: smooth_cross_entropy(x, y, backend='triton')
    torch._dynamo.reset()
    actual = loss_and_grad(torch.compile(f, fullgraph=True, backend=backend), x, y)
    assert launched == ['forward', 'backward'] and not launch._tickets
    assert max(map(distance, actual, loss_and_grad(f, x, y))) < 1e-6

def test_compiled_with_another_table(cut, tmp_path, monkeypatch):
    "Inductor keeps its graphs on disk: one made when the table was another still computes the same."
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    x, y = inputs(6, 10, torch.float32)
    f = lambda x, y: smooth_cross_entropy(x, y, backend='triton')
    for tile in (ROW[0], ROW[1], ROW[0]):
        cut(tile)
        torch._dynamo.reset()
        assert max(map(distance, loss_and_grad(torch.compile(f, fullgraph=True), x, y), loss_and_grad(f, x, y))) < 1e-6
