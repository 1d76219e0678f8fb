"Both losses where torch traces or transforms: torch.compile, torch.func, make_fx, fake and meta tensors."
from functools import partial

import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from .cases import HOT, IGNORED, INDEX, SOFT, W, every_option, logits, plain_loss, some_options
from reference import distance, loss_and_grad

pytestmark = pytest.mark.filterwarnings('ignore:.*weight')  # past the flip: test_checks.py has it

def compiled(f, backend='aot_eager', **options):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend, **options)

def masked():
    "Logits of which a class is masked, and class indices that are not that one."
    x = logits()
    x[:, 2] = -torch.inf
    return x, torch.tensor([0, 3, 1, 0])

@some_options('softmax weight, ignored', 'softmax weight, matrix', 'softmax soft, weight', 'softmax multi-hot, others', 'softmax per-class eps', 'softmax nothing left',
              'sigmoid everything', 'sigmoid one side', 'sigmoid prior of both')
def test_compile_fullgraph(loss_func, target, options):
    "No graph break; forward and one backward with eager's numbers."
    x, reduction = logits(), 'none' if 'eps' in options else 'mean'
    step = lambda x, y: loss_func(x, y, reduction=reduction, **options)
    assert max(map(distance, loss_and_grad(compiled(step), x, target), loss_and_grad(step, x, target))) < 1e-6

def test_compile_inductor():
    "A whole training step's loss, compiled for real, with its check of class indices."
    model, x, y = torch.nn.Linear(6, 4), torch.randn(8, 6), torch.tensor([0, 1, 2, 3, -100, 1, 0, 2])
    def step(x, y): return smooth_cross_entropy(model(x), y, .2, weight=W.float())
    f = compiled(step, 'inductor')
    results = [(loss, *torch.autograd.grad(loss, list(model.parameters()))) for loss in (f(x, y), step(x, y))]
    assert max(map(distance, *results)) < 1e-5
    with pytest.raises((IndexError, RuntimeError), match='44'): f(x, y.index_fill(0, torch.tensor(3), 44))

def test_compile_masked_logits_and_half_precision():
    x, y = masked()
    for x, tolerance in ((x, 1e-6), (x.half(), 2e-3)):
        (loss, grad), expected = loss_and_grad(compiled(smooth_cross_entropy), x, y), loss_and_grad(smooth_cross_entropy, x, y)
        assert loss.dtype == expected[0].dtype and grad.dtype == x.dtype and not grad[:, 2].any()
        assert distance(loss, expected[0]) < 1e-6 and distance(grad, expected[1]) < tolerance

def test_compile_dynamic_batch():
    "The last, smaller batch; and a class index that is not there."
    f = compiled(smooth_cross_entropy, dynamic=True)
    for n in (4, 3, 2): assert max(map(distance, loss_and_grad(f, SOFT[:n], INDEX[:n]), loss_and_grad(smooth_cross_entropy, SOFT[:n], INDEX[:n]))) < 1e-6
    with pytest.raises((IndexError, RuntimeError), match='44'): f(logits(), torch.tensor([0, 44, 1, 2]))

@pytest.mark.parametrize('pair', [False, True])
def test_compile_any_eps(pair):
    "A schedule compiles twice: when eps first changes, it becomes a number that may, or both of a pair do."
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    counter, x = CompileCounterWithBackend('aot_eager'), logits()
    f = torch.compile(smooth_bce, fullgraph=True, backend=counter)
    for eps in torch.linspace(0, .4, 5).tolist():
        if pair: eps = eps, eps / 2
        assert max(map(distance, loss_and_grad(f, x, HOT, eps), loss_and_grad(smooth_bce, x, HOT, eps))) < 1e-6
    assert counter.frame_count == 2

def test_opcheck():
    for y in (INDEX, IGNORED): torch.library.opcheck(torch.ops.fastai_smooth.checked_indices, (y, 4, -100))

# ---------------------------------------------------------------- torch.func, make_fx, fake and meta tensors

@every_option
def test_torch_func_grad_and_make_fx(loss_func, target, options):
    "The same numbers; and a step becomes a graph of plain ops, which gives the same for other logits."
    x, z = logits().requires_grad_(), logits().requires_grad_()
    if not (target == -100).all():   # torch.func can't know that the mean is 0
        grad, loss = torch.func.grad_and_value(lambda x: loss_func(x, target, **options))(x.detach())
        assert max(map(distance, (loss, grad), loss_and_grad(loss_func, x, target, **options))) < 1e-6
    def step(x):
        loss = loss_func(x, target, **options)
        return loss, torch.autograd.grad(loss, x, torch.full_like(loss, .3))[0]
    assert max(map(distance, make_fx(step)(x)(z), step(z))) < 1e-6

@some_options('softmax index', 'softmax soft', 'softmax ignored', 'sigmoid bool', 'sigmoid one side', 'sigmoid prior of both')
def test_torch_func_vmap(loss_func, target, options):
    "Over a batch of batches; per-sample gradients; a Hessian."
    f, x, targets = partial(loss_func, **options), logits(3, 4, 4), torch.stack([target, target.flip(0), target])
    losses, grads = zip(*(loss_and_grad(f, a, b) for a, b in zip(x, targets)))
    assert distance(torch.func.vmap(f)(x, targets), torch.stack(losses)) < 1e-6
    assert distance(torch.func.vmap(torch.func.grad(f))(x, targets), torch.stack(grads)) < 1e-6
    expected = torch.autograd.functional.hessian(lambda x: plain_loss(loss_func, x, target, **options), x[0])
    assert distance(torch.func.hessian(f)(x[0], target), expected) < 1e-6

@pytest.mark.parametrize('index', [-1, 3, 4])
def test_class_index_out_of_range_is_nan(index):
    "Where values can't be looked at; the least and the first that are out of range, too."
    x, y = torch.randn(2, 3), torch.tensor([[0], [index]])
    loss = torch.func.vmap(smooth_cross_entropy)(x[:, None], y)
    assert distance(loss[0], smooth_cross_entropy(x[:1], y[0])) < 1e-6 and loss[1].isnan()

def test_torch_func_one_class():
    "Ignored rows look up a class that is there."
    x, y = torch.randn(2, 1, 1), torch.tensor([[0], [-100]])
    assert torch.func.vmap(partial(smooth_cross_entropy, weight=torch.tensor([2.])))(x, y).tolist() == [0, 0]

@every_option
def test_fake_and_meta(loss_func, target, options):
    "Shapes and dtypes without data: the checks of values are skipped."
    for reduction in ('mean', 'none'):
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

# ---------------------------------------------------------------- the same rules on every path

def grads_of_all_paths(x, y, **kwargs):
    "The gradient by hand, and those of the plain formula: torch.func, create_graph, compiled."
    f = lambda x: smooth_cross_entropy(x, y, reduction='sum', **kwargs)
    leaf = x.clone().requires_grad_()
    yield torch.autograd.grad(f(leaf), leaf)[0]
    yield torch.autograd.grad(f(leaf), leaf, create_graph=True)[0].detach()
    yield torch.func.grad(f)(x)
    yield torch.autograd.grad(compiled(f)(leaf), leaf)[0]

@pytest.mark.parametrize('junk', [-torch.inf, torch.nan, torch.inf])
def test_ignored_rows_of_junk_on_every_path(junk):
    x = torch.randn(3, 4)
    x[1] = junk
    for g in grads_of_all_paths(x, torch.tensor([0, -100, 2])): assert (g[1] == 0).all() and g.isfinite().all() and (g[0] != 0).all()

@pytest.mark.parametrize('spread', ['all', 'others'])
def test_true_class_masked_on_every_path(spread):
    "A p - t on the classes that are left, 0 on the masked one."
    p = torch.tensor([1., 2.]).softmax(0)
    for g in grads_of_all_paths(torch.tensor([[-torch.inf, 1., 2.]]), torch.tensor([0]), eps=.3, spread=spread):
        torch.testing.assert_close(g, torch.cat([torch.zeros(1), p - .15])[None])
