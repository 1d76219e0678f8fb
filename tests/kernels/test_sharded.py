"Logits whose classes are sharded over processes: the loss and the gradient of the unsharded ones, and 3 N numbers moved."
from itertools import product
import warnings

import pytest, torch
import torch.distributed as dist
from torch import nn

from fastai.basics import DataLoader, DataLoaders, Learner, SGD, noop   # before the processes are forked
from fastai_smooth.kernels import smooth_cross_entropy
from fastai_smooth.losses import LabelSmoothingCrossEntropyFlat
from processes import in_processes, needs_distributed
from reference import distance, loss_and_grad, softmax_reference

if not hasattr(pytest.importorskip('torch.distributed.tensor'), 'DTensor'): pytest.skip('torch 2.4 has it elsewhere', allow_module_level=True)
pytestmark = needs_distributed
N = 6


def masked(x, kind):
    "Classes masked in all rows (padding), here and there, and all of one row's"
    if kind == 'padding' and x.shape[1] > 1: x[:, -1] = -torch.inf
    if kind == 'some': x[torch.rand(x.shape) < .4] = -torch.inf
    if kind == 'all of a row': x[2] = -torch.inf
    return x


def settings():
    "(logits, target, eps, options), for K that come out even, that don't, and that leave shards empty: an eleventh of all there are"
    for i, (K, dtype, reduction, weighted, ignored, prior, spread, each, mask) in enumerate(product(
            (1, 3, 8, 13), (torch.float64, torch.float32), ('mean', 'sum', 'none'), (False, True), (False, True), (0, 1, 2), ('all', 'others'), (False, True),
            ('', 'padding', 'some', 'all of a row'))):
        if i % 11 or prior and spread == 'others' or mask and (each or dtype == torch.float32): continue
        torch.manual_seed(0)
        x, y = masked(torch.randn(N, K, dtype=dtype) * 3, mask), torch.randint(max(1, K - 1), (N,))
        if ignored: x[1], y[1] = torch.nan, -100   # junk
        p = [None, torch.rand(K, dtype=dtype).softmax(0), torch.rand(K, K, dtype=dtype).softmax(1)][prior]
        if prior == 1 and mask == 'some': p = torch.eye(K, dtype=dtype)[0]   # may lie on masked classes alone
        yield x, y, torch.rand(K, dtype=dtype) if each else .3, dict(prior=p, spread=spread, weight=torch.rand(K, dtype=dtype) + .1 if weighted else None, reduction=reduction)


def off(actual, expected): return distance(1 + actual, 1 + expected)   # a loss that should be 0 has no relative error


class Moved:
    "How many numbers each collective has moved"
    def __init__(self):
        self.sizes, original = [], dist.all_reduce
        def counted(t, *args, **kwargs):
            self.sizes.append(t.numel())
            return original(t, *args, **kwargs)
        dist.all_reduce = counted
    def __call__(self):
        res, self.sizes = self.sizes, []
        return res


def each_setting():
    "Of all settings: the worst distances of loss and gradient by dtype, and all that the collectives have moved"
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    warnings.simplefilter('ignore')   # past the flip
    mesh, moved, worst, sizes = init_device_mesh('cpu', (dist.get_world_size(),)), Moved(), {}, dict(forward=set(), masked=set(), backward=set())
    for x, y, eps, options in settings():
        g = torch.rand(() if options['reduction'] != 'none' else (N,), dtype=x.dtype)
        expected = loss_and_grad(smooth_cross_entropy, x, y, eps, grad_output=g, **options)
        logits = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
        moved()
        loss = smooth_cross_entropy(logits, y, eps, **options)
        sizes['masked' if x[y >= 0].isinf().any() else 'forward'].add(tuple(moved()))
        loss.backward(g)
        sizes['backward'].add(tuple(moved()))
        assert type(loss) is torch.Tensor and logits.grad.placements == (Shard(1),)
        d = max(map(off, (loss, logits.grad.full_tensor()), expected))
        worst[x.dtype] = max(worst.get(x.dtype, (0., None)), (d, f'K={x.shape[1]} {y=} {eps=} {options} {x=}'), key=lambda o: o[0])
    return worst, sizes


@pytest.mark.parametrize('n', [2, 4])
def test_sharded_is_unsharded(n):
    "for every option that class indices have; even, uneven and empty shards; masked classes; 3 N numbers forward, none backward"
    for worst, sizes in in_processes(n, each_setting):
        assert worst[torch.float64][0] < 1e-12, worst[torch.float64]
        assert worst[torch.float32][0] < 2e-6, worst[torch.float32]
        assert sizes['forward'] == {(N, 2 * N)} and sizes['backward'] == {()}
        assert (N, 2 * N, 8 * N) in sizes['masked']


def test_unsharded_is_the_reference():
    "what the sharded loss is compared with, where the row by row reference is quick"
    for i, (x, y, eps, options) in enumerate(settings()):
        if i % 4: continue
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            actual = loss_and_grad(smooth_cross_entropy, x, y, eps, **options)
        K = x.shape[1]
        if options['prior'] is not None and x.isinf().any(): continue   # the reference has no rule for a prior that is all masked
        assert max(map(off, actual, softmax_reference(x, y, eps, **options))) < (1e-10 if x.dtype == torch.float64 else 3e-6), (i, K)


def meshes():
    "2 x 2 processes, rows times classes: targets whole or sharded, rows that don't come out even, 4-d logits, replicas"
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    mesh, worst = init_device_mesh('cpu', (2, 2)), 0.
    for shape, axis, rows in (((5, 7), 1, 0), ((1, 3), 1, 0), ((3, 2, 5), -1, 1), ((3, 5, 2, 3), 1, 2)):
        torch.manual_seed(0)
        x, y = torch.randn(shape).double(), torch.randint(shape[axis], [s for d, s in enumerate(shape) if d != axis % len(shape)])
        for ignored, weighted, reduction, first in product((None, 'one', 'all of a rank'), (False, True), ('mean', 'sum', 'none'), (Shard(rows), Replicate())):
            target = y.clone()
            if ignored == 'one': target.view(-1)[0] = -100
            elif ignored: target.view(-1)[:target.numel() // 2 + 1] = -100   # one rank may have nothing left, the other something
            weight = torch.rand(shape[axis]).double() + .1 if weighted else None
            options = dict(weight=weight, reduction=reduction, axis=axis)
            expected = loss_and_grad(smooth_cross_entropy, x, target, .2, **options)
            at = rows - (rows > axis % len(shape))
            for t in (target, distribute_tensor(target, mesh, [Shard(at) if first.is_shard() else first, Replicate()])):
                logits = distribute_tensor(x, mesh, [first, Shard(axis)]).requires_grad_()
                loss = smooth_cross_entropy(logits, t, .2, **options)
                loss.sum().backward()
                worst = max(worst, *map(off, (loss, logits.grad.full_tensor()), expected))
    return worst


def test_rows_and_classes_sharded():
    "a 2 x 2 mesh: the mean is over all rows, as of any DTensor"
    assert max(in_processes(4, meshes)) < 1e-12


def half():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    mesh, res = init_device_mesh('cpu', (2,)), []
    for dtype in (torch.float16, torch.bfloat16):
        x, y = (torch.randn(4, 5000) * 4).to(dtype), torch.arange(4)
        logits = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
        loss = smooth_cross_entropy(logits, y)
        loss.backward()
        expected = loss_and_grad(smooth_cross_entropy, x.float(), y)
        res.append((loss.dtype, logits.grad.dtype, distance(loss, expected[0]), distance(logits.grad.full_tensor(), expected[1])))
    return res


def test_half_precision():
    "accumulated and returned in float32; the gradient in the logits' dtype, rounded once"
    for ranks in in_processes(2, half):
        for (loss, grad, d_loss, d_grad), dtype in zip(ranks, (torch.float16, torch.bfloat16)):
            assert (loss, grad) == (torch.float32, dtype) and d_loss < 1e-6 and d_grad < torch.finfo(dtype).eps


def refused():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
    mesh, square = init_device_mesh('cpu', (2,)), init_device_mesh('cpu', (2, 1))
    x, y, seen = torch.randn(4, 6), torch.tensor([0, 1, 2, 3]), {}
    logits = distribute_tensor(x, mesh, [Shard(1)])
    def refuse(what, *args, **kwargs):
        try: smooth_cross_entropy(*args, **kwargs)
        except Exception as e: seen[what] = (type(e), str(e))
    refuse('rows only', distribute_tensor(x, mesh, [Shard(0)]), y)
    refuse('replicated', distribute_tensor(x, mesh, [Replicate()]), y)
    refuse('partial', DTensor.from_local(x, mesh, [Partial()]), y)
    refuse('twice', distribute_tensor(x, square, [Shard(1), Shard(1)]), y)
    refuse('soft', logits, x.softmax(1))
    refuse('target lies otherwise', logits, distribute_tensor(y, mesh, [Shard(0)]))
    refuse('target on another mesh', logits, distribute_tensor(y, square, [Replicate()] * 2))
    refuse('learned prior', logits, y, prior=torch.full((6,), 1 / 6).requires_grad_())
    refuse('local weight', logits, y, weight=torch.ones(3))
    refuse('sharded weight', logits, y, weight=distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
    refuse('eps', logits, y, 1.5)
    refuse('class index', logits, torch.tensor([0, 1, 6, 3]))
    refuse('triton', logits, y, backend='triton')
    return seen


def test_sharded_bad_input():
    "errors that say what is wrong and what to do, before anything is sent"
    named = {'rows only': 'input', 'replicated': 'input', 'partial': 'input', 'twice': 'input', 'soft': 'target', 'target lies otherwise': 'target',
             'target on another mesh': 'target', 'learned prior': 'prior', 'local weight': 'weight', 'sharded weight': 'weight',
             'eps': 'eps', 'class index': 'class index 6 at row 2', 'triton': 'backend'}
    for seen in in_processes(2, refused):
        assert seen.keys() == named.keys(), named.keys() - seen.keys()
        for what, (kind, message) in seen.items():
            assert kind is (IndexError if what == 'class index' else ValueError) and named[what] in message, (what, kind, message)


def compiled():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    line, square, worst = init_device_mesh('cpu', (2,)), init_device_mesh('cpu', (1, 2)), 0.
    x, y, weight, prior = torch.randn(6, 7), torch.tensor([0, 6, -100, 3, 2, 1]), torch.rand(7) + .1, torch.rand(7).softmax(0)
    x[0, 3] = -torch.inf
    def step(x, y): return smooth_cross_entropy(x, y, .2, weight=weight, prior=prior)
    for mesh, placements in ((line, [Shard(1)]), (square, [Shard(0), Shard(1)])):
        logits = distribute_tensor(x, mesh, placements).requires_grad_()
        loss = torch.compile(step, fullgraph=True)(logits, y)
        loss.backward()
        worst = max(worst, *map(distance, (loss, logits.grad.full_tensor()), loss_and_grad(step, x, y)))
    return worst


def test_compiled_without_a_graph_break():
    "masked classes, which take another sum, included"
    pytest.importorskip('torch._inductor')
    assert max(in_processes(2, compiled)) < 2e-6


def with_a_learner():
    from torch.distributed.tensor import Shard, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    mesh, res = init_device_mesh('cpu', (2,)), []
    for sharded in (False, True):
        torch.manual_seed(0)
        rows, head = [(torch.randn(5), torch.tensor(i % 7)) for i in range(24)], nn.Linear(8, 7)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), head)
        if sharded: parallelize_module(head, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
        dls = DataLoaders(*[DataLoader(o, bs=8) for o in (rows[:16], rows[16:])])
        learn = Learner(dls, model, loss_func=LabelSmoothingCrossEntropyFlat(.1), opt_func=SGD, lr=.1)
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
        learn.logger = noop
        learn.fit(2)
        whole = [p.full_tensor() if hasattr(p, 'full_tensor') else p for p in model.parameters()]
        res.append((torch.tensor(learn.recorder.values), torch.cat([p.detach().flatten() for p in whole])))
    return res


def test_a_learner_with_a_sharded_head():
    "ColwiseParallel; the Recorder gets a plain loss"
    for (values, weights), (sharded_values, sharded_weights) in in_processes(2, with_a_learner):
        assert distance(sharded_values, values) < 1e-6 and distance(sharded_weights, weights) < 1e-6
