"Both losses where torch traces or transforms: torch.compile, torch.func, make_fx, fake and meta tensors; and on a GPU."
from functools import partial

import pytest, torch
import torch.nn.functional as F

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from .cases import HOT, IGNORED, INDEX, LOSSES, SOFT, W, by_reduction, every_option, logits, plain_loss
from reference import distance, loss_and_grad

pytestmark = pytest.mark.filterwarnings('ignore:.*weight')  # past the flip: test_checks.py has it


# ---------------------------------------------------------------- torch.compile

COMPILED = [p for p in LOSSES if p.id in ('softmax weight, ignored', 'softmax matrix', 'softmax soft, weight',
                                          'softmax multi-hot, others', 'softmax per-class eps', 'softmax nothing left',
                                          'sigmoid everything', 'sigmoid bool')]


def compiled_loss_and_grad(loss_func, x, target, backend, **options):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: loss_func(x, y, **options), fullgraph=True, backend=backend)
    return loss_and_grad(compiled, x, target)


@pytest.mark.parametrize('loss_func,target,options', COMPILED)
def test_compile_fullgraph(loss_func, target, options):
    "no graph break; forward and one backward with eager's numbers"
    x = logits()
    for reduction in ('mean', 'none'):
        actual = compiled_loss_and_grad(loss_func, x, target, 'aot_eager', reduction=reduction, **options)
        assert max(map(distance, actual, loss_and_grad(loss_func, x, target, reduction=reduction, **options))) < 1e-6


def test_compile_fullgraph_inductor():
    "a whole training step's loss, compiled for real"
    model, x, y = torch.nn.Linear(6, 4), torch.randn(8, 6), torch.tensor([0, 1, 2, 3, -100, 1, 0, 2])
    def step(x, y): return smooth_cross_entropy(model(x), y, .2, weight=W.float())
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    results = [(loss, *torch.autograd.grad(loss, list(model.parameters()))) for loss in (compiled(x, y), step(x, y))]
    assert max(map(distance, *results)) < 1e-5
    wrong = y.clone()
    wrong[3] = 44
    with pytest.raises((IndexError, RuntimeError), match='44'): compiled(x, wrong)      # its check survives inductor


def test_compile_masked_logits():
    x, y = logits(), INDEX.clone()
    x[:, 2], y[3] = -torch.inf, 0
    actual = compiled_loss_and_grad(smooth_cross_entropy, x, y, 'aot_eager')
    assert max(map(distance, actual, loss_and_grad(smooth_cross_entropy, x, y))) < 1e-6 and (actual[1][:, 2] == 0).all()


def test_compile_index_error():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: smooth_cross_entropy(x, y), fullgraph=True, backend='aot_eager')
    compiled(logits(), INDEX)
    with pytest.raises((IndexError, RuntimeError), match='44'): compiled(logits(), torch.tensor([0, 44, 1, 2]))


def test_compile_dynamic_batch():
    "the last, smaller batch"
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: smooth_cross_entropy(x, y), fullgraph=True, backend='aot_eager', dynamic=True)
    for n in (4, 3, 2):
        assert max(map(distance, loss_and_grad(compiled, logits()[:n] * 0 + SOFT[:n], INDEX[:n]),
                       loss_and_grad(smooth_cross_entropy, SOFT[:n], INDEX[:n]))) < 1e-6


def test_compile_half_precision():
    x = logits().half()
    loss, grad = compiled_loss_and_grad(smooth_cross_entropy, x, INDEX, 'aot_eager')
    expected = loss_and_grad(smooth_cross_entropy, x, INDEX)
    assert loss.dtype == torch.float32 and grad.dtype == torch.half
    assert distance(loss, expected[0]) < 1e-6 and distance(grad, expected[1]) < 2e-3


def test_compile_opcheck():
    "whatever custom ops stand in the graph are well-behaved ones"
    calls = []
    class Record(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if str(target).startswith('fastai_smooth'): calls.append((target, args, kwargs))
            return super().call_function(target, args, kwargs)
    def backend(gm, example_inputs): return lambda *inputs: Record(gm).run(*inputs)
    torch._dynamo.reset()
    torch.compile(lambda x, y: smooth_cross_entropy(x, y), fullgraph=True, backend=backend)(logits(), INDEX)
    for op, args, kwargs in calls: torch.library.opcheck(op, args, kwargs)


# ---------------------------------------------------------------- torch.func, fake and meta tensors

@pytest.mark.parametrize('loss_func,target,options', [p for p in LOSSES if p.id != 'softmax nothing left'])
def test_torch_func_grad(loss_func, target, options):
    x = logits()
    grad, loss = torch.func.grad_and_value(lambda x: loss_func(x, target, **options))(x)
    assert max(map(distance, (loss, grad), loss_and_grad(loss_func, x, target, **options))) < 1e-6


def test_torch_func_vmap():
    "over a batch of batches; per-sample gradients; a Hessian; forward mode"
    x = logits(3, 4, 4)
    cases = [(smooth_cross_entropy, y) for y in (INDEX, SOFT, IGNORED)] + [(smooth_bce, HOT)]
    for loss_func, target in cases:
        targets = torch.stack([target, target.flip(0), target])
        one_by_one = [loss_and_grad(loss_func, a, b) for a, b in zip(x, targets)]
        assert distance(torch.func.vmap(loss_func)(x, targets), torch.stack([l for l, _ in one_by_one])) < 1e-6
        grads = torch.func.vmap(torch.func.grad(loss_func))(x, targets)
        assert distance(grads, torch.stack([g for _, g in one_by_one])) < 1e-6
        hessian = torch.func.hessian(loss_func)(x[0], target)
        expected = torch.autograd.functional.hessian(lambda x: plain_loss(loss_func, x, target), x[0])
        assert distance(hessian, expected) < 1e-6


def test_torch_func_masked_logits():
    x, y = logits(), INDEX.clone()
    x[:, 2], y[3] = -torch.inf, 0
    grad, loss = torch.func.grad_and_value(smooth_cross_entropy)(x, y)
    assert max(map(distance, (loss, grad), loss_and_grad(smooth_cross_entropy, x, y))) < 1e-6


@pytest.mark.parametrize('index', [-1, 3, 4])
def test_torch_func_class_index_out_of_range_is_nan(index):
    "where values can't be looked at; the least and the first that are out of range, too"
    x, y = torch.randn(2, 3), torch.tensor([[0], [index]])
    loss = torch.func.vmap(smooth_cross_entropy)(x[:, None], y)
    assert distance(loss[0], smooth_cross_entropy(x[:1], y[0])) < 1e-6 and loss[1].isnan()


def test_torch_func_one_class():
    "ignored rows look up a class that is there"
    x, y = torch.randn(2, 1, 1), torch.tensor([[0], [-100]])
    assert torch.func.vmap(partial(smooth_cross_entropy, weight=torch.tensor([2.])))(x, y).tolist() == [0, 0]


@every_option
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_make_fx(reduction, loss_func, target, options):
    "a step becomes a graph of plain ops, which gives the same for other logits"
    from torch.fx.experimental.proxy_tensor import make_fx
    def step(x):
        loss = loss_func(x, target, reduction=reduction, **options)
        return loss, torch.autograd.grad(loss, x, torch.full_like(loss, .3))[0]
    x, z = logits().requires_grad_(), logits().requires_grad_()
    assert max(map(distance, make_fx(step)(x)(z), step(z))) < 1e-6


@every_option
@by_reduction
def test_fake_and_meta(loss_func, target, options, reduction):
    "shapes and dtypes without data: the checks of values are skipped"
    from torch._subclasses.fake_tensor import FakeTensorMode
    expected = loss_func(logits(), target, reduction=reduction, **options)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
        x = fake(logits()).requires_grad_()
        loss = loss_func(x, fake(target), reduction=reduction, **{k: fake(v) for k, v in options.items()})
        assert loss.shape == expected.shape and loss.dtype == expected.dtype
        loss.sum().backward()
        assert x.grad.shape == (4, 4)
    meta = lambda t: t.to('meta') if isinstance(t, torch.Tensor) else t
    loss = loss_func(meta(logits()), meta(target), reduction=reduction, **{k: meta(v) for k, v in options.items()})
    assert loss.device.type == 'meta' and loss.shape == expected.shape


def grads_of_all_paths(x, y, **kwargs):
    "The gradient by hand, and those of the plain formula: torch.func, create_graph, compiled"
    f = lambda x: smooth_cross_entropy(x, y, reduction='sum', **kwargs)
    leaf = x.clone().requires_grad_()
    yield torch.autograd.grad(f(leaf), leaf)[0]
    yield torch.autograd.grad(f(leaf), leaf, create_graph=True)[0].detach()
    yield torch.func.grad(f)(x)
    yield torch.autograd.grad(torch.compile(f, fullgraph=True, backend='aot_eager')(leaf), leaf)[0]


@pytest.mark.parametrize('junk', [-torch.inf, torch.nan, torch.inf])
def test_ignored_rows_of_junk_on_every_path(junk):
    x = torch.randn(3, 4)
    x[1] = junk
    for g in grads_of_all_paths(x, torch.tensor([0, -100, 2])):
        assert (g[1] == 0).all() and g.isfinite().all() and (g[0] != 0).all()


@pytest.mark.parametrize('spread', ['all', 'others'])
def test_masked_logits_true_class_masked_on_every_path(spread):
    "A p - t on the classes that are left, 0 on the masked one"
    x = torch.tensor([[-torch.inf, 1., 2.]])
    by_hand, *others = grads_of_all_paths(x, torch.tensor([0]), eps=.3, spread=spread)
    p = torch.tensor([1., 2.]).softmax(0)
    torch.testing.assert_close(by_hand, torch.cat([torch.zeros(1), p-.15])[None])
    for g in others: torch.testing.assert_close(g, by_hand)


# ---------------------------------------------------------------- CUDA

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_class_index_out_of_range_on_cuda():
    "a nan loss for that row, no error, and no wait for the GPU: not for any option"
    x = logits().float().cuda().requires_grad_()
    bad = torch.tensor([0, 44, -100, 2]).cuda()
    moved = [(loss_func, target.cuda(), {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()})
             for loss_func, target, options in (p.values for p in LOSSES)]
    torch.cuda.set_sync_debug_mode('error')
    try:
        each, mean = smooth_cross_entropy(x, bad, reduction='none'), smooth_cross_entropy(x, bad)
        for loss_func, target, options in moved: loss_func(x, target, **options).backward()
    finally: torch.cuda.set_sync_debug_mode('default')
    assert each.isnan().tolist() == [False, True, False, False] and mean.isnan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@every_option
def test_cuda_has_the_numbers_of_the_cpu(loss_func, target, options):
    x, move = logits(), lambda v: v.cuda() if isinstance(v, torch.Tensor) else v
    actual = loss_and_grad(loss_func, x.cuda(), target.cuda(), **{k: move(v) for k, v in options.items()})
    expected = loss_and_grad(loss_func, x, target, **options)
    assert max(distance(a.cpu(), e) for a, e in zip(actual, expected)) < 1e-10
