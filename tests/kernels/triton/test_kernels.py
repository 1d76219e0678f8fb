"""What the tests of the torch implementation do not reach in the Triton one: its custom ops, its ways to cut up the work, and what
it leaves to torch. In the interpreter's process (test_interpreted.py), or on a GPU."""
from itertools import product
import sys

import pytest, torch
import torch.nn.functional as F

triton = pytest.importorskip('triton', minversion='3.6')
import triton.language as tl
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from fastai_smooth.kernels.targets import SigmoidTarget, Smoothing, SoftmaxTarget
from fastai_smooth.kernels import targets
from fastai_smooth.kernels.triton import launch, rows, sigmoid, softmax
from fastai_smooth.kernels.triton.softmax import Tile
from reference import REDUCTIONS, distance, loss_and_grad, rounded_once, sigmoid_reference, softmax_reference

ON_TRITON = sys.modules.get('kernels.triton.on_triton')
TABLE = ON_TRITON.tile_for if ON_TRITON else softmax.tile_for
DEVICE = 'cpu' if launch.INTERPRETED else 'cuda'
pytestmark = pytest.mark.skipif(not launch.INTERPRETED and not torch.cuda.is_available(), reason="needs Triton's interpreter, or a GPU")


@pytest.fixture
def cut(monkeypatch):
    "cuts the work otherwise than the table does, and makes the gradient early or late"
    if ON_TRITON: monkeypatch.setattr(ON_TRITON, 'take_turn', lambda *_: None)
    monkeypatch.setattr(softmax, 'tile_for', TABLE)
    def cut(tile=None, early=False):
        if tile: monkeypatch.setattr(softmax, 'tile_for', lambda *_: tile)
        monkeypatch.setattr(launch, 'EARLY_MB', 0 if early else 10**6)
    return cut


def inputs(n=6, k=10, dtype=torch.float64):
    return torch.randn(n, k, dtype=dtype, device=DEVICE), torch.randint(k, (n,), device=DEVICE)


def launched(monkeypatch):
    "notes what is computed by a kernel"
    seen = []
    for module in (softmax, sigmoid):
        for name in ('forward', 'backward'):
            original = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, name=name, original=original, **k: (seen.append(name), original(*a, **k))[1])
    return seen


def same_as_reference(x, y, eps=.2, tolerance=1e-10, **options):
    scale = torch.rand(y.shape, dtype=torch.float64) - .5 if options.get('reduction') == 'none' else 2.5
    actual = loss_and_grad(smooth_cross_entropy, x, y, eps, grad_output=scale.to(DEVICE) if options.get('reduction') == 'none' else scale, backend='triton', **options)
    cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = softmax_reference(x.cpu(), y.cpu(), eps, grad_output=scale, **cpu)
    assert max(distance(a.cpu(), e) for a, e in zip(actual, expected)) < tolerance


# ---------------------------------------------------------------- the formula of the target

@triton.jit
def coefficients_kernel(args, out, n, PRIOR: tl.constexpr, OTHERS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mass = None
    if PRIOR: mass = tl.load(args + 4 * n + i, mask=i < n)
    res = rows.coefficients(tl.load(args + i, mask=i < n), tl.load(args + n + i, mask=i < n), tl.load(args + 2 * n + i, mask=i < n),
                                       tl.load(args + 3 * n + i, mask=i < n), mass, OTHERS)
    tl.store(out + i, res.own, mask=i < n)
    tl.store(out + n + i, res.each, mask=i < n)
    tl.store(out + 2 * n + i, res.own_masked, mask=i < n)
    if PRIOR: tl.store(out + 3 * n + i, tl.where(res.uniform, 1., 0.), mask=i < n)


@pytest.mark.parametrize('others', [False, True])
@pytest.mark.parametrize('prior', [False, True])
def test_coefficients_of_the_target(prior, others):
    "by Triton as by torch and by Python's numbers"
    rows = [(eps, left, positives, present, mass) for eps, left, positives, present, mass in
            product((0., .1, 1.), range(4), range(3), range(3), (0., .3, 1.) if prior else (0.,)) if present <= min(left, positives)]
    args = torch.tensor(rows, dtype=torch.float64, device=DEVICE).T.contiguous()
    n, out = len(rows), args.new_zeros(4, len(rows))
    coefficients_kernel[(1,)](args, out, n, PRIOR=prior, OTHERS=others, BLOCK=triton.next_power_of_2(n))
    one_by_one = [targets.coefficients(*row[:4], row[4] if prior else None, others) for row in rows]
    for expected in (targets.coefficients(*args[:4], args[4] if prior else None, others), targets.Coefficients(*zip(*one_by_one))):
        for actual, e in zip(out, expected): assert torch.allclose(actual, torch.as_tensor(e, dtype=torch.float64, device=DEVICE), rtol=1e-15, atol=0)


# ---------------------------------------------------------------- several blocks a row, several programs

TILES = [Tile(2, 4, 1), Tile(4, 16, 1), Tile(1, 2, 1), Tile(8, 8, 1), Tile(2, 2, 1, prefetch=True)]


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('early', [False, True])
@pytest.mark.parametrize('tile', TILES)
def test_whole_blocks_masked(tile, early, reduction, cut):
    "the first, the last, and all but the true class: nothing is known yet when the first block has gone by"
    cut(tile, early)
    x, y = inputs()
    y[:] = torch.tensor([9, 8, 0, 1, 4, 5])
    x[:2, :8], x[2:4, 4:], x[4:, :4], x[4:, 6:] = (-torch.inf,) * 4
    for options in (dict(), dict(spread='others'), dict(weight=torch.rand(10, device=DEVICE) + .5, prior=torch.rand(10, device=DEVICE).softmax(0))):
        same_as_reference(x, y, reduction=reduction, tolerance=1e-6 if 'prior' in options else 1e-10, **options)


@pytest.mark.parametrize('early', [False, True])
@pytest.mark.parametrize('tile', TILES)
def test_a_maximum_that_moves(tile, early, cut):
    "rising from block to block by hundreds, and falling"
    cut(tile, early)
    x, y = inputs()
    x += torch.linspace(-900, 900, 10, device=DEVICE) * torch.tensor([1, -1] * 3, device=DEVICE)[:, None]
    same_as_reference(x, y)


@pytest.mark.parametrize('early', [False, True])
@pytest.mark.parametrize('tile', TILES)
def test_all_mass_of_the_prior_masked(tile, early, cut):
    "uniform is what is left, in rows where that is so, with and without weights"
    cut(tile, early)
    x, y = inputs()
    prior, weight = torch.tensor([.5, 0, .5] + [0] * 7, dtype=torch.float64, device=DEVICE), torch.rand(10, dtype=torch.float64, device=DEVICE) + .5
    x[::2, 0], x[::2, 2] = -torch.inf, -torch.inf
    y[:] = torch.tensor([1, 1, 3, 3, 9, 2])
    for w in (None, weight):
        loss, grad = loss_and_grad(smooth_cross_entropy, x, y, .2, prior=prior, weight=w, backend='triton')
        expected, expected_grad = loss_and_grad(smooth_cross_entropy, x, y, .2, prior=prior, weight=w, backend='torch')
        assert distance(loss, expected) < 1e-10 and distance(grad, expected_grad) < 1e-10


@pytest.mark.parametrize('early', [False, True])
@pytest.mark.parametrize('tile', TILES)
def test_masked_classes_get_no_gradient_in_rows_that_are_lost(tile, early, cut):
    "by a logit of inf, or since there is nothing to take the mean over; nor is a mask missed for a weight of 0 or less"
    cut(tile, early)
    x, y = inputs()
    x[:, 3], y[:] = -torch.inf, 1
    lost = x.clone()
    lost[2, 5] = torch.inf
    weight = torch.rand(10, dtype=torch.float64, device=DEVICE) + .5
    for logits, options in ((lost, dict(reduction='sum')), (x, dict(weight=torch.zeros_like(weight)))):
        assert not loss_and_grad(smooth_cross_entropy, logits, y, backend='triton', **options)[1][:, 3].any()
    for w in (0., -1.):
        weight[3] = w
        same_as_reference(x, y, weight=weight)


@pytest.mark.parametrize('early', [False, True])
@pytest.mark.parametrize('tile', TILES)
def test_ignored_rows_get_no_gradient_where_the_mean_is_lost(tile, early, cut):
    "since the weights of all rows that count are 0: of these it is nan"
    cut(tile, early)
    x, y = inputs()
    y[1] = -100
    grad = loss_and_grad(smooth_cross_entropy, x, y, weight=torch.zeros(10, dtype=torch.float64, device=DEVICE), backend='triton')[1]
    assert not grad[1].any() and grad[0].isnan().all()


@pytest.mark.parametrize('early', [False, True])
def test_prefetching_ends_with_the_row(early, cut):
    "the last block has four classes of eight: what is read past the last row is out of bounds"
    cut(Tile(1, 8, 1, prefetch=True), early)
    x, y = inputs(3, 12, torch.float32)
    assert softmax.plan(x, SoftmaxTarget(y, True, Smoothing(), 1))[1].prefetch
    same_as_reference(x, y, tolerance=1e-6)


@pytest.mark.parametrize('tile', TILES[:2])
def test_ticket_is_zero_again(tile, cut):
    cut(tile)
    for _ in range(3):
        x, y = inputs(50)
        same_as_reference(x, y)
        assert all(t.item() == 0 for t in launch._tickets.values()) and launch._tickets


def test_more_tiles_than_programs(cut, monkeypatch):
    cut(Tile(2, 16, 1, programs=1))
    monkeypatch.setattr(launch, 'multiprocessors', lambda device: 3)
    monkeypatch.setattr(sigmoid, 'PROGRAMS', 1)
    monkeypatch.setattr(sigmoid, 'BLOCK', 16)
    x, y = inputs(23)
    for reduction in REDUCTIONS: same_as_reference(x, y, reduction=reduction)
    hot = (torch.rand(23, 10, device=DEVICE) < .4)
    for reduction in REDUCTIONS:
        actual, expected = loss_and_grad(smooth_bce, x, hot, reduction=reduction, backend='triton'), sigmoid_reference(x.cpu(), hot.cpu(), reduction=reduction)
        assert max(distance(a.cpu(), e) for a, e in zip(actual, expected)) < 1e-10


@pytest.mark.parametrize('tile', [Tile(2, 16, 1), Tile(2, 4, 1)])
def test_an_early_gradient_is_kept_or_made_anew(tile, cut, monkeypatch):
    "kept, untouched, where grad_output is 1; else rounded once, with that in"
    cut(tile, early=True)
    monkeypatch.setattr(sigmoid, 'BLOCK', 16)
    x, y = inputs(6, 10, torch.bfloat16)
    x.requires_grad_()
    for f, target in ((smooth_cross_entropy, y), (smooth_bce, x.detach() > 0)):
        for by in (1., 3.):
            loss = f(x, target, .1, backend='triton')
            made = loss.grad_fn.grad
            first = made.clone()
            grad, = torch.autograd.grad(loss, x, torch.tensor(by, device=DEVICE))
            assert grad.data_ptr() == made.data_ptr() and torch.equal(grad, first) == (by == 1)
            d = x.detach().double().requires_grad_()
            truth, = torch.autograd.grad(f(d, target, .1, backend='torch'), d, torch.tensor(by, dtype=d.dtype, device=DEVICE))
            assert rounded_once(grad, truth)


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('kinds', product(['number', 'scalar', 'classes', 'full'], repeat=2))
def test_smoothing_of_negatives_and_of_positives(kinds, reduction, monkeypatch):
    "e0 and e1 are numbers, or tensors of any strides"
    monkeypatch.setattr(sigmoid, 'BLOCK', 16)
    x, _ = inputs(7, 5)
    def smoothing(kind, by):
        if kind == 'number': return by
        shape = dict(scalar=(), classes=(5,), full=(5, 7))[kind]
        v = by * torch.rand(shape, dtype=x.dtype, device=DEVICE)
        return v.T if kind == 'full' else v.expand(x.shape)
    weight = torch.tensor(3., dtype=x.dtype, device=DEVICE).expand(x.shape)
    target = SigmoidTarget((x > .3), smoothing(kinds[0], .1), smoothing(kinds[1], .4), weight)
    actual, expected = (loss_and_grad(f, x, target, reduction) for f in (sigmoid.sigmoid_loss, sigmoid.plain_loss))
    assert max(map(distance, actual, expected)) < 1e-10


# ---------------------------------------------------------------- who computes

def test_what_it_takes_and_what_it_leaves(monkeypatch):
    seen = launched(monkeypatch)
    x, y = inputs(6, 4)
    soft, matrix = torch.rand(6, 4, dtype=torch.float64, device=DEVICE).softmax(1), torch.rand(4, 4, dtype=torch.float64, device=DEVICE).softmax(1)
    strange = torch.randn(3, 4, 3, 3, 3, device=DEVICE).double()[..., ::2][:, :, :2, :2]
    for taken, args, options in ((True, (x, y), {}), (True, (x, soft), {}), (True, (x, y), dict(eps=soft[0])), (True, (x, y), dict(prior=matrix)),
                                 (False, (x, soft.clone().requires_grad_()), {}), (False, (strange, torch.zeros(3, 2, 2, 2, dtype=torch.long, device=DEVICE)), {}),
                                 (True, (x[0], y[0]), {}), (True, (x.T.contiguous(), y), dict(axis=0))):
        seen.clear()
        actual = loss_and_grad(smooth_cross_entropy, *args, backend='triton', **options)
        assert bool(seen) == taken
        assert max(map(distance, actual, loss_and_grad(smooth_cross_entropy, *args, backend='torch', **options))) < 1e-10


@pytest.mark.parametrize('shape', [(0, 5), (0, 5, 3), (4, 5, 0)])
@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_no_rows(shape, reduction):
    x = torch.zeros(shape, device=DEVICE)
    for f, y in ((smooth_cross_entropy, torch.zeros(shape[:1] + shape[2:], dtype=torch.long, device=DEVICE)), (smooth_bce, x > 0)):
        loss, grad = loss_and_grad(f, x, y, reduction=reduction, backend='triton')
        assert loss.shape == (y.shape if reduction == 'none' else ()) and grad.shape == shape and not loss.sum()


@pytest.mark.parametrize('early', [False, True])
@pytest.mark.parametrize('tile', [None, Tile(2, 2, 1)])
@pytest.mark.parametrize('case', ['index', 'class eps', 'soft', 'hot', 'prior'])
def test_masked_by_the_least_number(case, tile, early, cut):
    "as Hugging Face does: their sum is -inf, which must not meet a smoothing of 0"
    cut(tile, early)
    least, eps, options = torch.finfo(torch.float32).min, 0., {}
    x = torch.tensor([[1., 2., least, least, .5], [least, least, 3., least, 0.]], device=DEVICE)
    y = torch.tensor([1, 2], device=DEVICE)
    if case == 'class eps': eps = torch.zeros(5, device=DEVICE)
    if case in ('soft', 'hot'): y = F.one_hot(y, 5)
    if case == 'soft': y = y.float()
    if case == 'hot': options = dict(multi_hot=True)
    if case == 'prior': eps, options = .1, dict(prior=torch.tensor([0, .5, 0, 0, .5], device=DEVICE))
    actual, expected = (loss_and_grad(smooth_cross_entropy, x, y, eps, backend=b, **options) for b in ('triton', 'torch'))
    if case == 'prior': actual, expected = ([v[:1] for v in loss_and_grad(smooth_cross_entropy, x, y, eps, reduction='none', backend=b, **options)] for b in ('triton', 'torch'))
    assert max(map(distance, actual, expected)) < 1e-6


def test_losses_of_labels_that_are_sure():
    "without smoothing they are exp(-|x|): 1 + that, in float32, has lost all of its digits"
    x = torch.linspace(10, 40, 31, device=DEVICE)
    for sign in (1, -1):
        loss = smooth_bce(sign * x, (sign * x > 0), 0., reduction='none', backend='triton')
        assert ((loss.double() / torch.log1p(torch.exp(-x.double())) - 1).abs() < 1e-5).all()


def test_layout_that_the_gradient_does_not_share():
    "axes that overlap: the gradient, which is dense, has one more to go over, and torch does it"
    x, y = torch.randn(48, device=DEVICE).as_strided((2, 2, 2, 3, 2), (1, 0, 4, 8, 24)), torch.zeros(2, 2, 3, 2, dtype=torch.long, device=DEVICE)
    actual, expected = (loss_and_grad(smooth_cross_entropy, x, y, axis=2, backend=b) for b in ('triton', 'torch'))
    assert max(map(distance, actual, expected)) < 1e-6


@pytest.mark.parametrize('reduction,early', [('mean', False), ('mean', True), ('none', False)])
def test_hooks_that_give_other_strides(reduction, early, cut):
    "activation offloading may: what was kept of the rows is in the old order"
    cut(Tile(2, 4, 1), early)
    x, y = torch.randn(3, 12, 5, 4, device=DEVICE).transpose(2, 3).requires_grad_(), torch.randint(12, (3, 4, 5), device=DEVICE)
    def grad():
        loss = smooth_cross_entropy(x, y, reduction=reduction, backend='triton')
        return torch.autograd.grad(loss, x, torch.ones_like(loss))[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(memory_format=torch.contiguous_format), lambda t: t): hooked = grad()
    assert distance(hooked, grad()) < 1e-6


def test_negated_views():
    "the imaginary part of a conjugate is a view that is to be read with the other sign"
    c, y = torch.randn(6, 4, dtype=torch.complex64, device=DEVICE), torch.randint(4, (6,), device=DEVICE)
    x = c.conj().imag
    assert x.is_neg()
    for f, target in ((smooth_cross_entropy, y), (smooth_cross_entropy, c.imag.abs() / c.imag.abs().sum(1, keepdim=True)), (smooth_bce, (c.imag > 0).float()), (smooth_bce, x)):
        assert distance(f(x, target, backend='triton'), f(-c.imag, target.resolve_neg(), backend='torch')) < 1e-6


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(dtype):
    x, y = inputs(6, 5)
    same_as_reference(x, y.to(dtype))
    same_as_reference(x[:, :1], y.to(dtype) * 0)
    if dtype == torch.uint8 and launch.INTERPRETED:
        with pytest.raises(IndexError, match='156'): smooth_cross_entropy(x, torch.full((6,), 156, dtype=dtype), backend='triton')


# ---------------------------------------------------------------- custom ops

@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('case', ['index', 'weight', 'soft', 'hot', 'prior', 'class eps', 'images', 'channels_last', 'long rows', 'float16', 'nothing'])
def test_opcheck_softmax(case, reduction, cut):
    cut(Tile(4, 4, 1) if case == 'long rows' else Tile(8, 16, 1))
    x, y = inputs(0 if case == 'nothing' else 6, 10, torch.float16 if case == 'float16' else torch.float32)
    v = torch.rand(10, device=DEVICE).softmax(0)
    if case in ('images', 'channels_last'): x, y = torch.randn(2, 10, 2, 3, device=DEVICE), torch.randint(10, (2, 2, 3), device=DEVICE)
    if case == 'channels_last': x = x.to(memory_format=torch.channels_last)
    if case == 'soft': y = torch.rand_like(x).softmax(1)
    if case == 'hot': y = torch.rand_like(x) < .4
    target = SoftmaxTarget(y, case not in ('soft', 'hot'), Smoothing(v if case == 'class eps' else .1, v if case == 'prior' else None, multi_hot=case == 'hot'), 1,
              v if case == 'weight' else None)
    args = (x.requires_grad_(), *softmax.op_args(x, target), reduction)
    assert set(torch.library.opcheck(softmax.softmax_forward, (*args, case == 'long rows')).values()) == {'SUCCESS'}
    loss, *rest = softmax.softmax_forward(*args, case == 'long rows')
    args = (torch.ones_like(loss), *rest, x.detach(), *args[1:])
    assert set(torch.library.opcheck(softmax.softmax_backward, args).values()) == {'SUCCESS'}


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('case', ['uint8', 'factors', 'transposed', 'nothing'])
def test_opcheck_sigmoid(case, reduction):
    x = torch.randn(0 if case == 'nothing' else 6, 5, device=DEVICE)
    if case == 'transposed': x = x.T
    v = torch.rand(x.shape[-1:], device=DEVICE).expand(x.shape) if case == 'factors' else None
    args = (x.requires_grad_(), *sigmoid.op_args(x, SigmoidTarget((x > 0).to(torch.uint8), .05 if v is None else v, .05, v, v)), reduction)
    assert set(torch.library.opcheck(sigmoid.sigmoid_forward, args).values()) == {'SUCCESS'}
    args = (torch.ones_like(sigmoid.sigmoid_forward(*args)), x.detach(), *args[1:])
    assert set(torch.library.opcheck(sigmoid.sigmoid_backward, args).values()) == {'SUCCESS'}


@pytest.mark.parametrize('head,backend', product(['softmax', 'sigmoid'], ['eager', 'aot_eager', 'inductor']))
def test_compiled_step(head, backend, monkeypatch):
    "the kernels stand in the graph, with eager's numbers"
    seen = launched(monkeypatch)
    x, y = inputs(6, 10, torch.float32)
    f = (lambda x, y: smooth_cross_entropy(x, y, backend='triton')) if head == 'softmax' else (lambda x, y: smooth_bce(x, F.one_hot(y, 10), backend='triton'))
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    actual = loss_and_grad(compiled, x, y)
    assert seen == ['forward', 'backward']
    assert max(map(distance, actual, loss_and_grad(f, x, y))) < 1e-6


@pytest.mark.parametrize('now,before', [(Tile(4, 16, 1), Tile(2, 4, 1)), (Tile(2, 4, 1), Tile(4, 16, 1))])
def test_compiled_with_another_table(cut, now, before, tmp_path, monkeypatch):
    "inductor keeps its graphs on disk: one made when the table was another still computes the same"
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    x, y = inputs(6, 10, torch.float32)
    f = lambda x, y: smooth_cross_entropy(x, y, backend='triton')
    for tile in (before, now):
        cut(tile)
        torch._dynamo.reset()
        assert max(map(distance, loss_and_grad(torch.compile(f, fullgraph=True), x, y), loss_and_grad(f, x, y))) < 1e-6


@pytest.mark.parametrize('head', ['softmax', 'sigmoid'])
def test_compiled_for_any_eps(head):
    "a schedule of eps compiles twice, on either backend: when it first changes, it becomes a number that may"
    from torch._dynamo.testing import CompileCounterWithBackend
    x, y = inputs(6, 10, torch.float32)
    def f(x, y, eps, backend): return smooth_cross_entropy(x, y, eps, backend=backend) if head == 'softmax' else smooth_bce(x, F.one_hot(y, 10), eps, backend=backend)
    for backend in ('torch', 'triton'):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend('aot_eager')
        compiled = torch.compile(f, fullgraph=True, backend=counter)
        for eps in torch.linspace(0, .4, 12).tolist():
            assert max(map(distance, loss_and_grad(compiled, x, y, eps, backend=backend), loss_and_grad(f, x, y, eps, 'torch'))) < 1e-6
        assert counter.frame_count == 2, backend


def test_ops_leave_no_ticket_behind(monkeypatch):
    "what an op allocates may lie in the memory of a CUDA graph"
    monkeypatch.setattr(launch, '_tickets', {})
    x, y = inputs(6, 10, torch.float32)
    torch._dynamo.reset()
    torch.compile(lambda x, y: smooth_cross_entropy(x, y, backend='triton'), fullgraph=True, backend='eager')(x, y)
    torch.compile(lambda x, y: smooth_bce(x, x > 0, backend='triton'), fullgraph=True, backend='eager')(x, y)
    assert not launch._tickets


def test_out_of_bounds_is_noticed():
    "by the interpreter as on_triton.py sets it up: the other tests rely on it"
    import os
    if os.environ.get('SMOOTH_TEST_BACKEND') != 'triton' or not launch.INTERPRETED: pytest.skip('only in the process of test_interpreted.py')
    y, denominator, partials, ticket = torch.zeros(8, dtype=torch.long), torch.zeros(()), torch.zeros(3), torch.zeros((), dtype=torch.int32)
    with pytest.raises(Exception, match='out of bounds'):
        softmax.denominator_kernel[(1,)](y[:4], None, denominator, partials, ticket, 8, 1, -100, CLASSES=3, BLOCK=16, ACC=launch.TYPES[torch.float32])
