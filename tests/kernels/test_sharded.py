"""Logits whose classes are sharded over processes: the loss and the gradient of the unsharded ones, and 3 N numbers moved.

Starting processes takes longer than all that they do here: three are started, once."""
from itertools import product
import warnings

import pytest, torch
import torch.distributed as dist

from fastai_smooth.kernels import smooth_cross_entropy
from processes import in_processes, needs_distributed
from reference import distance, loss_and_grad

if not hasattr(pytest.importorskip('torch.distributed.tensor'), 'DTensor'): pytest.skip('torch 2.4 has it elsewhere', allow_module_level=True)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
pytestmark = [needs_distributed, pytest.mark.filterwarnings('ignore:.*weight')]
N = 6

def masked(x, kind):
    "Classes masked in all rows (padding), here and there, and all of one row's."
    if kind == 'padding' and x.shape[1] > 1: x[:, -1] = -torch.inf
    if kind == 'some': x[torch.rand(x.shape) < .4] = -torch.inf
    if kind == 'all of a row': x[2] = -torch.inf
    return x

def settings():
    "(logits, target, eps, options), for K that come out even, that don't, and that leave one or two shards empty: a seventeenth of all there are."
    for i, (K, dtype, reduction, weighted, ignored, prior, spread, each, mask) in enumerate(product(
            (1, 4, 9, 13), (torch.float64, torch.float32), ('mean', 'sum', 'none'), (False, True), (False, True), (0, 1, 2), ('all', 'others'), (False, True),
            ('', 'padding', 'some', 'all of a row'))):
        if i % 17 or prior and spread == 'others' or mask and (each or dtype == torch.float32): continue
        torch.manual_seed(0)
        x, y = masked(torch.randn(N, K, dtype=dtype) * 3, mask), torch.randint(max(1, K - 1), (N,))
        if ignored: x[1], y[1] = torch.nan, -100   # junk
        p = [None, torch.rand(K, dtype=dtype).softmax(0), torch.rand(K, K, dtype=dtype).softmax(1)][prior]
        if prior == 1 and mask == 'some': p = torch.eye(K, dtype=dtype)[0]   # may lie on masked classes alone
        weight = torch.rand(K, dtype=dtype) + .1 if weighted else None
        yield x, y, torch.rand(K, dtype=dtype) if each else .3, dict(prior=p, spread=spread, weight=weight, reduction=reduction)

def off(actual, expected): return distance(1 + actual, 1 + expected)   # a loss that should be 0 has no relative error

def each_setting():
    "The worst distances of loss and gradient by dtype; how many numbers each all-reduce has moved: forward, where classes are masked, and backward."
    mesh, worst, moved, all_reduce = init_device_mesh('cpu', (dist.get_world_size(),)), {}, [], dist.all_reduce
    sizes = dict(forward=set(), masked=set(), backward=set())
    def counted(t, *args, **kwargs):
        moved.append(t.numel())
        return all_reduce(t, *args, **kwargs)
    dist.all_reduce = counted
    for x, y, eps, options in settings():
        g = torch.rand(() if options['reduction'] != 'none' else (N,), dtype=x.dtype)
        expected = loss_and_grad(smooth_cross_entropy, x, y, eps, grad_output=g, **options)
        logits = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
        moved.clear()
        loss = smooth_cross_entropy(logits, y, eps, **options)
        sizes['masked' if x[y >= 0].isinf().any() else 'forward'].add(tuple(moved))
        moved.clear()
        loss.backward(g)
        sizes['backward'].add(tuple(moved))
        assert type(loss) is torch.Tensor and logits.grad.placements == (Shard(1),)
        d = max(map(off, (loss, logits.grad.full_tensor()), expected))
        worst[x.dtype] = max(worst.get(x.dtype, (0., None)), (d, f'K={x.shape[1]} {y=} {eps=} {options} {x=}'), key=lambda o: o[0])
    dist.all_reduce = all_reduce
    return worst, sizes

def meshes():
    "Rows sharded, or the classes: targets whole or sharded, rows that don't come out even, 4-d logits, replicas."
    meshes, worst = [init_device_mesh('cpu', (3, 1)), init_device_mesh('cpu', (1, 3))], 0.
    shapes = ((5, 7), 1, 0), ((1, 3), 1, 0), ((3, 2, 5), -1, 1), ((3, 5, 2, 3), 1, 2)   # with the axis of the classes, and the one of the rows that is sharded
    for i, ((shape, axis, rows), mesh, reduction, ignored, weighted, first, whole) in enumerate(product(
            shapes, meshes, ('mean', 'sum', 'none'), (None, 'one', 'all of a rank'), (False, True), (True, False), (True, False))):
        if i % 11: continue
        torch.manual_seed(0)
        x, y = torch.randn(shape).double(), torch.randint(shape[axis], [size for d, size in enumerate(shape) if d != axis % len(shape)])
        if ignored == 'one': y.view(-1)[0] = -100
        elif ignored: y.view(-1)[:y.numel() // 2 + 1] = -100   # one rank may have nothing left, the other something
        options = dict(weight=torch.rand(shape[axis]).double() + .1 if weighted else None, reduction=reduction, axis=axis)
        expected = loss_and_grad(smooth_cross_entropy, x, y, .2, **options)
        at = rows - (rows > axis % len(shape))
        target = y if whole else distribute_tensor(y, mesh, [Shard(at) if first else Replicate(), Replicate()])
        logits = distribute_tensor(x, mesh, [Shard(rows) if first else Replicate(), Shard(axis)]).requires_grad_()
        loss = smooth_cross_entropy(logits, target, .2, **options)
        loss.sum().backward()
        worst = max(worst, *map(off, (loss, logits.grad.full_tensor()), expected))
    return worst

def half():
    mesh, res = init_device_mesh('cpu', (3,)), []
    for dtype in (torch.float16, torch.bfloat16):
        x, y = (torch.randn(4, 5000) * 4).to(dtype), torch.arange(4)
        logits = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
        loss = smooth_cross_entropy(logits, y)
        loss.backward()
        expected = loss_and_grad(smooth_cross_entropy, x.float(), y)
        res.append((loss.dtype, logits.grad.dtype, dtype, distance(loss, expected[0]), distance(logits.grad.full_tensor(), expected[1])))
    return res

def refused():
    "what -> the error that was raised."
    mesh, square, seen = init_device_mesh('cpu', (3,)), init_device_mesh('cpu', (3, 1)), {}
    x, y, uniform = torch.randn(4, 6), torch.tensor([0, 1, 2, 3]), torch.full((6,), 1 / 6)
    logits = distribute_tensor(x, mesh, [Shard(1)])
    for what, input, target, options in [
            ('rows only', distribute_tensor(x, mesh, [Shard(0)]), y, {}), ('replicated', distribute_tensor(x, mesh, [Replicate()]), y, {}),
            ('partial', DTensor.from_local(x, mesh, [Partial()]), y, {}), ('twice', distribute_tensor(x, square, [Shard(1), Shard(1)]), y, {}),
            ('soft', logits, x.softmax(1), {}), ('target lies otherwise', logits, distribute_tensor(y, mesh, [Shard(0)]), {}),
            ('target on another mesh', logits, distribute_tensor(y, square, [Replicate()] * 2), {}), ('learned prior', logits, y, dict(prior=uniform.requires_grad_())),
            ('local weight', logits, y, dict(weight=torch.ones(3))), ('sharded weight', logits, y, dict(weight=distribute_tensor(torch.ones(6), mesh, [Shard(0)]))),
            ('eps', logits, y, dict(eps=1.5)), ('class index', logits, torch.tensor([0, 1, 6, 3]), {}), ('triton', logits, y, dict(backend='triton'))]:
        try: smooth_cross_entropy(input, target, **options)
        except Exception as e: seen[what] = type(e), str(e)
    return seen

def all_of(functions):
    warnings.simplefilter('ignore')   # past the flip
    return {f.__name__: f() for f in functions}

@pytest.fixture(scope='module')
def processes(): return in_processes(3, all_of, [each_setting, meshes, half, refused])

# ---------------------------------------------------------------- what has to come out of it, in each process

def test_sharded_is_unsharded(processes):
    "For every option that class indices have; even, uneven and empty shards; masked classes; 3 N numbers forward, none backward."
    for process in processes:
        worst, sizes = process['each_setting']
        assert worst[torch.float64][0] < 1e-12, worst[torch.float64]
        assert worst[torch.float32][0] < 2e-6, worst[torch.float32]
        assert sizes['forward'] == {(N, 2 * N)} and sizes['backward'] == {()} and (N, 2 * N, 8 * N) in sizes['masked']

def test_rows_and_classes_sharded(processes):
    "The mean is over all rows, as of any DTensor."
    assert max(process['meshes'] for process in processes) < 1e-12

def test_half_precision(processes):
    "Accumulated and returned in float32; the gradient in the logits' dtype, rounded once."
    for loss, grad, dtype, d_loss, d_grad in processes[0]['half'] + processes[1]['half']:
        assert (loss, grad) == (torch.float32, dtype) and d_loss < 1e-6 and d_grad < torch.finfo(dtype).eps

@pytest.mark.parametrize('what,named', [
    *((what, 'input') for what in ('rows only', 'replicated', 'partial', 'twice')), ('soft', 'target'), ('target lies otherwise', 'target'),
    ('target on another mesh', 'target'), ('learned prior', 'prior'), ('local weight', 'weight'), ('sharded weight', 'weight'), ('eps', 'eps'),
    ('class index', 'class index 6 at row 2'), ('triton', 'backend')])
def test_bad_input(processes, what, named):
    "Errors that say what is wrong and what to do, before anything is sent."
    for process in processes:
        kind, message = process['refused'][what]
        assert kind is (IndexError if what == 'class index' else ValueError) and named in message

@pytest.mark.parametrize('shape,placements', [((1,), [Shard(1)]), ((1, 1), [Shard(0), Shard(1)])])
def test_compiles_without_a_graph_break(shape, placements, tmp_path):
    "Masked classes, which take another sum, included. Among several processes, of which this is the only one."
    x, y, weight, prior = torch.randn(6, 7), torch.tensor([0, 6, -100, 3, 2, 1]), torch.rand(7) + .1, torch.rand(7).softmax(0)
    x[0, 3] = -torch.inf
    def step(x, y): return smooth_cross_entropy(x, y, .2, weight=weight, prior=prior)
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    try:
        logits = distribute_tensor(x, init_device_mesh('cpu', shape), placements).requires_grad_()
        loss = torch.compile(step, fullgraph=True, backend='aot_eager')(logits, y)
        loss.backward()
        assert max(map(distance, (loss, logits.grad.full_tensor()), loss_and_grad(step, x, y))) < 2e-6
    finally: dist.destroy_process_group()
