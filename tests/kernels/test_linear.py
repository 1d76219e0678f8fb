"The losses of a linear layer's logits, some rows at a time: those of `F.linear`, with its gradients, and in memory for a few rows."
from functools import partial
from itertools import product
import copy, math

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_smooth.kernels import (smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy, smooth_linear_cross_entropy,
                                   smooth_linear_binary_cross_entropy_with_logits as smooth_linear_bce, sigmoid, softmax)
from fastai_smooth.kernels.functional import linear_logits
from fastai_smooth.kernels.linear import LinearLogits
from .cases import HOT, IGNORED, INDEX, ON_TRITON, SETTINGS, SOFT, W, by_reduction, every_option, gradients_check, some_options
from .test_memory import MB, allocations
from reference import REDUCTIONS, distance, sigmoid_reference, softmax_reference

pytestmark = pytest.mark.filterwarnings('ignore:.*weight')   # past the flip: test_checks.py has it
BOTH = pytest.mark.parametrize('loss_func,target', [(smooth_cross_entropy, INDEX), (smooth_bce, HOT)])
SOME = some_options('softmax weight, ignored', 'softmax weight, matrix', 'softmax soft, weight', 'softmax multi-hot, others', 'softmax per-class eps', 'sigmoid everything', 'sigmoid one side')
HALF = torch.bfloat16, torch.float16
EXACT = 1e-10 if ON_TRITON else 1e-12

def layer(N=4, F=3, K=4, dtype=torch.float64):
    "What a linear layer takes, its weight and its bias."
    return [(scale * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_() for scale, shape in ((2, (N, F)), (1, (K, F)), (1, (K,)))]

def by_chunks(loss_func, x, w, b, target, chunk_rows=3, **options):
    linear = smooth_linear_bce if loss_func is smooth_bce else smooth_linear_cross_entropy
    return linear(x, w, target, linear_bias=b, chunk_rows=chunk_rows, **options)

def at_once(loss_func, x, w, b, target, **options): return loss_func(F.linear(x, w, b), target, **options)

def step(loss, parts, grad_output=None):
    "The loss and the gradients of those parts that need one."
    grad_output = torch.ones_like(loss) if grad_output is None else grad_output.to(loss.dtype).expand(loss.shape)
    return loss.detach(), *grad(loss, [v for v in parts if v is not None and v.requires_grad], grad_output)

def furthest(actual, expected): return max(distance(a, e) for a, e in zip(actual, expected, strict=True))

# ---------------------------------------------------------------- equal to the loss of all logits

@every_option
@by_reduction
def test_every_option(loss_func, target, options, reduction):
    for chunk_rows, bias, g in product((None, 1, 3, 9) if not ON_TRITON else (3,), (True, False), (None, torch.rand(4, 4) - .5)):
        parts = layer()
        if not bias: parts[2] = None
        if g is not None: g = g if reduction == 'none' and loss_func is smooth_bce else g[0] if reduction == 'none' else g[0, 0]
        actual, expected = (step(f(loss_func, *parts, target, reduction=reduction, **options, **kw), parts, g) for f, kw in ((by_chunks, dict(chunk_rows=chunk_rows)), (at_once, {})))
        with torch.no_grad(): quiet = by_chunks(loss_func, *parts, target, chunk_rows, reduction=reduction, **options)
        assert furthest(actual, expected) < EXACT and distance(quiet, expected[0]) < EXACT, (chunk_rows, bias)

@settings(max_examples=SETTINGS // 4, deadline=None, derandomize=True, database=None)
@given(N=st.integers(0, 7), K=st.integers(1, 5), n_features=st.integers(1, 4), chunk_rows=st.integers(1, 8), seed=st.integers(0, 2**20), eps=st.sampled_from([0., .3, .5]),
       reduction=st.sampled_from(REDUCTIONS), kind=st.sampled_from(['index', 'ignored', 'soft', 'multi-hot', 'labels']), weighted=st.booleans(), prior=st.booleans())
def test_beside_the_reference(N, K, n_features, chunk_rows, seed, eps, reduction, kind, weighted, prior):
    "G = d loss / d logits by the closed formula; then G W, G^T x and the sum of G over the rows. Of any shape."
    torch.manual_seed(seed)
    x, weight, bias = parts = layer(N, n_features, K)
    options, labels = dict(eps=eps, reduction=reduction), kind == 'labels'
    if weighted: options['weight'] = torch.rand(K).double() + .1
    if prior and kind != 'multi-hot': options['prior'] = torch.rand(K).double().softmax(0)
    if kind == 'multi-hot': options['multi_hot'] = True
    y = torch.rand(N, K) < .4 if kind in ('multi-hot', 'labels') else torch.rand(N, K).double().softmax(1) if kind == 'soft' else torch.randint(K, (N,))
    if kind == 'ignored': y[::2] = -100
    g = torch.rand((N, K) if labels else (N,)).double() if reduction == 'none' else torch.tensor(-.7).double()
    loss, G = (sigmoid_reference if labels else softmax_reference)(F.linear(*parts), y, grad_output=g, **options)
    actual = step(by_chunks(smooth_bce if labels else smooth_cross_entropy, *parts, y, chunk_rows, **options), parts, g)
    for a, e in zip(actual, (loss, G @ weight, G.T @ x, G.sum(0)), strict=True): assert a.shape == e.shape and torch.allclose(a, e.detach(), rtol=EXACT, atol=EXACT)

@pytest.mark.parametrize('name', ['index', 'ignored', 'weight', 'soft'])
@by_reduction
def test_beside_pytorch(name, reduction):
    target, weight = {'ignored': IGNORED, 'soft': SOFT}.get(name, INDEX), W if name == 'weight' else None
    parts, options = layer(), dict(weight=weight, reduction=reduction)
    actual = step(by_chunks(smooth_cross_entropy, *parts, target, eps=.2, **options), parts)
    assert furthest(actual, step(F.cross_entropy(F.linear(*parts), target, label_smoothing=.2, **options), parts)) < EXACT
    if hasattr(F, 'linear_cross_entropy'):
        x, w, b = parts
        assert furthest(actual, step(F.linear_cross_entropy(x, w, target, linear_bias=b, label_smoothing=.2, **options), parts)) < EXACT

@SOME
def test_chunks_of_a_chunk(loss_func, target, options, monkeypatch):
    "Rows of many classes are cut once more; more than the default of rows, too."
    monkeypatch.setattr(softmax, 'CHUNK_MB', 0)
    for reduction, times in product(REDUCTIONS, (1, 200)):
        if times > 1 and options.get('weight') is not None and options['weight'].dim() == 2: continue
        parts, y = layer(4 * times), target.repeat(times, *[1] * (target.dim() - 1))
        results = [step(f(loss_func, *parts, y, reduction=reduction, **options), parts) for f in (partial(by_chunks, chunk_rows=None if times > 1 else 3), at_once)]
        assert furthest(*results) < EXACT

@BOTH
def test_masked_classes_and_junk(loss_func, target):
    "A bias of -inf masks a class; a row that is not finite makes its own loss nan and leaves the others."
    x, weight, bias = parts = layer()
    if loss_func is smooth_cross_entropy:
        with torch.no_grad(): bias[3] = -math.inf
        y = torch.tensor([0, 1, 2, 0])
        results = [step(f(loss_func, *parts, y), parts) for f in (partial(by_chunks, chunk_rows=2), at_once)]
        assert furthest(*results) < EXACT and not results[0][2][3].any() and results[0][0].isfinite()
        each = by_chunks(loss_func, *(others := layer()), torch.tensor([0, -100, 2, 0]), reduction='none')
        for g in grad(each.sqrt().sum(), others): assert g.isfinite().all() and g.any()   # inf comes in for a loss of 0
    with torch.no_grad(): x[1] = math.nan
    losses = by_chunks(loss_func, x, weight, None, target, reduction='none')
    assert losses[1].isnan().all() and distance(losses[[0, 2, 3]], at_once(loss_func, x, weight, None, target, reduction='none')[[0, 2, 3]]) < EXACT

# ---------------------------------------------------------------- half precision

def errors(f, loss_func, parts, y, grad_output=None, **options):
    "Of loss and gradients beside float64."
    exact = [v.detach().double().requires_grad_() for v in parts]
    expected = step(at_once(loss_func, *exact, y, **options), exact, grad_output)
    actual = step(f(loss_func, *parts, y, **options), parts, grad_output)
    assert actual[0].dtype == torch.float32 and all(g.dtype == v.dtype for g, v in zip(actual[1:], parts))
    return [distance(a.double(), e) for a, e in zip(actual, expected)]

@BOTH
@pytest.mark.parametrize('dtype', [torch.float32, *HALF], ids=str)
@by_reduction
def test_precision(loss_func, target, dtype, reduction):
    "The errors are those of the loss of all logits, in one chunk and in many."
    parts, own = layer(300, 32, 50, dtype), torch.finfo(dtype).eps
    y = torch.randint(50, (300,)) if loss_func is smooth_cross_entropy else torch.rand(300, 50) < .1
    g = torch.tensor(2.5) if reduction != 'none' else torch.rand(y.shape)
    plain = errors(at_once, loss_func, parts, y, g, reduction=reduction)
    for chunk_rows in (7, 100, 300)[ON_TRITON:]:
        found = errors(partial(by_chunks, chunk_rows=chunk_rows), loss_func, parts, y, g, reduction=reduction)
        assert all(a <= p + (4e-7 if i == 0 or dtype == torch.float32 else own) for i, (a, p) in enumerate(zip(found, plain))), (chunk_rows, found, plain)

@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('autocast', [False, True])
def test_gradients_are_accumulated_in_float32(dtype, autocast):
    "A thousand summands of one sign: in bfloat16 a sum stops growing at 256 of them."
    parts = [torch.ones(1000, 2, dtype=dtype), torch.zeros(3, 2, dtype=dtype).requires_grad_(), torch.zeros(3, dtype=dtype).requires_grad_()]
    for chunk_rows in (1, 10, 100, 1000)[2*ON_TRITON:]:
        with torch.autocast('cpu', dtype, autocast): loss = by_chunks(smooth_cross_entropy, *parts, torch.zeros(1000).long(), chunk_rows, eps=0., reduction='sum')
        for g in step(loss, parts)[1:]:
            assert distance(g.movedim(0, -1).double(), torch.tensor([-2., 1, 1]).double().mul(1000 / 3).expand(g.movedim(0, -1).shape)) < 2 * torch.finfo(dtype).eps

@BOTH
@pytest.mark.parametrize('dtype', HALF, ids=str)
def test_autocast(loss_func, target, dtype):
    "float32 parts, products in half precision: loss and gradients in float32, no worse than those of `F.linear`, where ever the two calls are."
    parts = layer(300, 32, 50, torch.float32)
    y = torch.randint(50, (300,)) if loss_func is smooth_cross_entropy else torch.rand(300, 50) < .1
    def under(f, **kw):
        def g(*args, **options):
            with torch.autocast('cpu', dtype): return f(*args, **kw, **options)
        return g
    plain = errors(under(at_once), loss_func, parts, y)
    for f in (under(by_chunks, chunk_rows=70), lambda f, x, w, b, y: f(under(linear_logits, chunk_rows=70)(x, w, b), y)):
        assert 1e-5 < max(plain) and all(a <= 1.5 * p + 1e-6 for a, p in zip(errors(f, loss_func, parts, y), plain))
    for options in ({}, dict(prior=torch.full((50,), .02, requires_grad=True))):   # made where there is no autocast: in float32
        logits = linear_logits(*parts, chunk_rows=70)
        with torch.autocast('cpu', dtype): loss = loss_func(logits, y, **options)
        assert furthest(step(loss, parts), step(at_once(loss_func, *parts, y, **options), parts)) < 2e-6

@BOTH
def test_float16_with_a_loss_scale(loss_func, target):
    "The scale goes in before the gradient is rounded: what would be less than 6e-8 is not lost, and what fits does not overflow."
    N, K, scale = 500, 300, torch.tensor(2.**16)
    x, *rest = layer(N, 8, K, torch.float16)
    parts = [(x / 50).detach().requires_grad_(), *rest]   # small logits, so that all of the gradient is small
    with torch.no_grad(): rest[1].zero_()
    y = torch.rand(N, K).softmax(1) if loss_func is smooth_cross_entropy else torch.full((N, K), .5)
    plain, found, unscaled = (errors(f, loss_func, parts, y, g) for f, g in ((at_once, scale), (partial(by_chunks, chunk_rows=64), scale), (partial(by_chunks, chunk_rows=64), None)))
    assert max(found) < 2e-3 and all(a <= 1.5 * p + 1e-3 for a, p in zip(found, plain)), (found, plain)
    assert max(unscaled) > 5 * max(found)   # the test can tell

# ---------------------------------------------------------------- parts that are frozen

class Products(TorchDispatchMode):
    "Counts products of matrices, but for those of no rows."
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **kwargs or {})
        self.n += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_) and res.numel() > 0
        return res

@BOTH
@pytest.mark.parametrize('reduction,dtype', [('mean', torch.float32), ('none', torch.float32), ('mean', torch.bfloat16), ('mean', torch.float16)], ids=str)
def test_frozen_parts(loss_func, target, reduction, dtype, monkeypatch):
    "Get no gradient, and no product is made for one: a chunk has one for its logits, one for the input, one for the weight."
    chunks, late = 2, reduction == 'none' or dtype == torch.float16   # then the backward makes the logits anew
    seen = []   # was there memory for a gradient of the logits?
    for head in (softmax, sigmoid):
        monkeypatch.setattr(head, 'loss_and_grad', lambda *args, f=head.loss_and_grad: seen.append(args[4] is not None) or f(*args))
    for needs in product((True, False), repeat=3):
        parts = [v.requires_grad_(need) for v, need in zip(layer(dtype=dtype), needs)]
        with Products() as forward: loss = by_chunks(loss_func, *parts, target, reduction=reduction)
        assert loss.requires_grad == any(needs)
        with Products() as backward:
            if any(needs): loss.sum().backward()
        of_grads = chunks * (needs[0] + needs[1])
        assert (forward.n, backward.n) == ((chunks, chunks + of_grads if any(needs) else 0) if late else (chunks + of_grads, 0)), needs
        for v, need in zip(parts, needs): assert (v.grad is not None) == need
        assert ON_TRITON or any(seen) == any(needs)
        seen.clear()
        with torch.no_grad(), Products() as quiet: assert not by_chunks(loss_func, *parts, target, reduction=reduction).requires_grad
        with torch.inference_mode(), Products() as inferred: assert not by_chunks(loss_func, *parts, target, reduction=reduction).requires_grad
        assert quiet.n == inferred.n == chunks and not any(seen)
        seen.clear()

# ---------------------------------------------------------------- several backwards, other kinds of them

@SOME
@by_reduction
def test_backwards_of_linear(loss_func, target, options, reduction):
    "The first, another with another grad_output, one with create_graph, its gradient, and one after that: those of the plain formula."
    parts, results = layer(), []
    for f in (by_chunks, at_once):
        loss = f(loss_func, *parts, target, reduction=reduction, **options)
        one, g = torch.ones_like(loss), torch.linspace(-1, 2, loss.numel()).double().view_as(loss) + .1
        first = grad(loss, parts, one, retain_graph=True)
        kept = [v.clone() for v in first]
        second = grad(loss, parts, -3 * one, retain_graph=True)
        graphed = grad(loss, parts, g, create_graph=True)
        penalty = grad(sum((v ** 2).sum() for v in graphed) + loss.sum(), parts, retain_graph=True)
        some = grad(loss, parts[1:2], g, retain_graph=True)
        again = grad(loss, parts, g)
        assert all(map(torch.equal, first, kept)), 'a gradient handed out was overwritten by the next backward'
        with pytest.raises(RuntimeError, match='second time'): grad(loss, parts, g)
        results.append([*first, *second, *graphed, *penalty, *some, *again])
    assert furthest(*results) < 1e-10

@SOME
def test_gradgradcheck_of_linear(loss_func, target, options):
    for reduction in ('mean', 'none'):
        f = lambda *parts: by_chunks(loss_func, *parts, target, reduction=reduction, **options)
        assert gradients_check(f, layer())

@BOTH
def test_accumulates(loss_func, target):
    "Into .grad: of a second backward, of another loss of the same layer, of a part that is used elsewhere, too; and where activations are made anew."
    results = []
    for f in (by_chunks, at_once, lambda *args: torch.utils.checkpoint.checkpoint(by_chunks, *args, use_reentrant=False)):
        torch.manual_seed(1)
        parts = layer()
        loss = f(loss_func, *parts, target)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        (f(loss_func, *parts, target.flip(0)) / 3 + 0 * f(loss_func, *parts, target) + parts[1].square().sum()).backward()
        results.append([v.grad for v in parts])
    for actual in results[::2]: assert furthest(actual, results[1]) < EXACT

@BOTH
def test_traced_and_transformed(loss_func, target):
    "torch.func, a batch of batches, many gradients at once, forward mode, make_fx, torch.compile without a graph break: as of the plain formula."
    parts, g = [v.detach() for v in layer()], torch.randn(5).double()
    ours, plain = (partial(lambda f, *parts: f(loss_func, *parts, target), f) for f in (by_chunks, at_once))
    leaves = [v.clone().requires_grad_() for v in parts]
    expected = step(plain(*leaves), leaves)
    grads, loss = torch.func.grad_and_value(ours, (0, 1, 2))(*parts)
    assert furthest((loss, *grads), expected) < EXACT
    batch = [torch.stack([v, 2 * v, -v]) for v in parts]
    for transform in (torch.func.vmap, lambda f: torch.func.vmap(torch.func.grad(f, 1), in_dims=(0, None, None)), torch.func.hessian):
        args = batch if transform is torch.func.vmap else parts if transform is torch.func.hessian else [batch[0], *parts[1:]]
        assert distance(transform(ours)(*args), transform(plain)(*args)) < 1e-10
    assert furthest(torch.func.jvp(ours, tuple(parts), tuple(parts)), torch.func.jvp(plain, tuple(parts), tuple(parts))) < EXACT
    assert furthest(*(grad(f(*leaves), leaves, g, is_grads_batched=True) for f in (ours, plain))) < EXACT
    traced = make_fx(lambda *v: step(ours(*v), v))(*leaves)
    other = layer()
    assert furthest(traced(*other), step(plain(*other), other)) < EXACT
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend='aot_eager')
    assert furthest(step(compiled(*leaves), leaves), expected) < EXACT
    with torch.no_grad(): assert distance(compiled(*leaves), expected[0]) < EXACT

@BOTH
def test_fake_and_meta_parts(loss_func, target):
    "Shapes and dtypes without data."
    for reduction in ('mean', 'none'):
        shape = () if reduction == 'mean' else (4,) if loss_func is smooth_cross_entropy else (4, 4)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode: fake, y = [mode.from_tensor(v) for v in layer()], mode.from_tensor(target)
        for parts, y, context in ((fake, y, mode), ([v.detach().to('meta').requires_grad_() for v in layer()], target.to('meta'), torch.enable_grad())):
            with context:
                loss = by_chunks(loss_func, *parts, y, reduction=reduction)
                assert loss.shape == shape and loss.dtype == torch.float64 and [v.shape for v in grad(loss.sum(), parts)] == [v.shape for v in parts]

@pytest.mark.parametrize('changed', ['input', 'linear_weight', 'target'])
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_parts_changed_in_place_before_backward(changed, reduction):
    "As in PyTorch: an error."
    for loss_func, y in ((smooth_cross_entropy, SOFT.clone()), (smooth_bce, SOFT.clone())):
        linear = torch.nn.Linear(3, 4).double()
        x = layer()[0] * 1
        loss = by_chunks(loss_func, x, linear.weight, linear.bias, y, reduction=reduction).sum()
        with torch.no_grad(): {'input': x, 'linear_weight': linear.weight, 'target': y}[changed].mul_(1.1)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()

@BOTH
def test_kinds_of_input(loss_func, target):
    "Other strides, a bit for the sign, a subclass, from inference mode, a Parameter: the same numbers, and none is changed."
    parts = layer()
    x, weight, bias = (v.detach() for v in parts)
    expected = step(at_once(loss_func, *parts, target), parts)
    class Sub(torch.Tensor): pass
    forms = dict(transposed=lambda v: v.movedim(0, -1).contiguous().movedim(0, -1), sliced=lambda v: torch.stack([v, v], -1)[..., 0], negated=lambda v: torch._neg_view(-v),
                 subclass=lambda v: v.as_subclass(Sub), parameter=torch.nn.Parameter)
    for name, form in forms.items():
        leaves = [form(v).detach().requires_grad_() for v in (x, weight, bias)]
        assert furthest(step(by_chunks(loss_func, *leaves, target), leaves), expected) < EXACT, name
        for v, leaf in zip((x, weight, bias), leaves): assert torch.equal(leaf.as_subclass(torch.Tensor), v)
        assert type(by_chunks(loss_func, *leaves, target)) is torch.Tensor
    with torch.inference_mode(): inferred = x.clone()
    assert furthest(step(by_chunks(loss_func, inferred, *parts[1:], target), parts[1:]), [expected[0], *expected[2:]]) < EXACT
    with torch.autograd.graph.save_on_cpu(): loss = by_chunks(loss_func, *parts, target, reduction='sum')
    assert furthest(step(loss, parts), step(at_once(loss_func, *parts, target, reduction='sum'), parts)) < EXACT

# ---------------------------------------------------------------- what needs a gradient besides

@pytest.mark.parametrize('learned', ['weight', 'prior', 'prior of both', 'eps', 'target', 'pos_weight'])
@BOTH
def test_what_is_learned_besides(loss_func, target, learned):
    "Gets its gradient, and so do the parts of the layer: as of all logits."
    sigmoid = loss_func is smooth_bce
    if learned == 'eps' and sigmoid or learned in ('prior of both', 'pos_weight') and not sigmoid: return
    v, parts = (SOFT if learned == 'target' else W).clone().requires_grad_(), layer()
    make = {'prior': lambda: v.softmax(0), 'prior of both': lambda: torch.stack([v / 4, v / 2]), 'eps': lambda: v / 2}.get(learned, lambda: v)
    results = []
    for f in (by_chunks, at_once):
        options = {} if learned == 'target' else {learned.split()[0]: make()}
        results.append(step(f(loss_func, *parts, v if learned == 'target' else target, **options), [*parts, v], torch.tensor(-1.7)))
    assert furthest(*results) < EXACT

# ---------------------------------------------------------------- memory

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('kind', ['index', 'ignored', 'labels', 'none'])
def test_memory_of_chunks(kind, dtype):
    "Of the gradients, and of a few chunks: it does not grow with the rows, and nothing of the logits' size is there."
    K, n_features, chunk_rows, peaks = 2000, 16, 64, {}
    for N in (1024, 4096):
        x, weight, bias = parts = layer(N, n_features, K, dtype)
        y = torch.rand(N, K) < .01 if kind == 'labels' else torch.randint(K, (N,))
        if kind == 'ignored': y[::3] = -100
        f = partial(by_chunks, smooth_bce if kind == 'labels' else smooth_cross_entropy, *parts, y, chunk_rows, reduction='none' if kind == 'none' else 'mean')
        rows = 16 * N   # of class indices, losses, and what is ignored
        grads = 4 * sum(v.numel() for v in parts) * (1 if dtype == torch.float32 else 2)   # and their sums in float32
        chunk = 4 * chunk_rows * K
        with torch.no_grad(): sizes, peak = allocations(f)
        assert max(sizes) <= max(chunk, rows) and peak <= 6 * chunk + rows, f'{max(sizes):,} bytes at once, {peak:,} live'
        sizes, peak = allocations(lambda: step(f(), parts))
        assert max(sizes) <= max(chunk, 4 * max(v.numel() for v in parts)) and peak <= grads + 6 * chunk + rows, f'{max(sizes):,} bytes at once, {peak:,} live'
        peaks[N] = peak - rows - grads
    assert peaks[4096] < peaks[1024] + MB / 4 and peak < .5 * N * K * x.itemsize

# ---------------------------------------------------------------- what stands for the logits

def test_linear_logits_have_a_shape():
    "What can be known without them; all else raises an error that says what to do."
    x, weight, bias = layer(dtype=torch.float32)
    logits = linear_logits(x, weight, bias)
    assert logits.shape == (4, 4) == logits.size() and logits.size(1) == 4 and logits.ndim == logits.dim() == 2 and logits.numel() == 16
    assert logits.dtype == torch.float32 and logits.device == x.device and logits.requires_grad and logits.is_floating_point() and not logits.is_cuda
    assert logits.float() is logits and isinstance(logits, torch.Tensor) and str(logits) == repr(logits) == 'LinearLogits(shape=(4, 4), dtype=torch.float32)'
    assert not linear_logits(x.detach(), weight.detach()).requires_grad and linear_logits(x.detach(), weight.detach(), bias).requires_grad
    with torch.autocast('cpu', torch.bfloat16): assert linear_logits(x, weight, bias).dtype == torch.bfloat16
    rows = list(linear_logits(x, weight, bias, 3).by_rows(torch.arange(4), INDEX))
    assert [len(v) for row in rows for v in row] == [3, 3, 3, 1, 1, 1] and not rows[0][0].requires_grad and torch.equal(torch.cat([r[2] for r in rows]), INDEX)
    assert distance(torch.cat([r[0] for r in rows]), F.linear(x, weight, bias)) < 1e-6

@pytest.mark.parametrize('op', [
    lambda v: v + 1, lambda v: v.view(-1), lambda v: v.argmax(1), lambda v: v.detach(), lambda v: v.item(), bool, iter, lambda v: v[0], lambda v: torch.stack([v, v]),
    lambda v: v.half(), lambda v: v.data, lambda v: v.T, copy.deepcopy, lambda v: v.numpy(), lambda v: v.backward(), lambda v: F.cross_entropy(v, INDEX),
    lambda v: linear_logits(v, torch.zeros(2, 4)), lambda v: smooth_cross_entropy(torch.zeros(4, 4), v), lambda v: v.add_(1), lambda v: v.__setitem__(0, 1.)])
def test_linear_logits_refuse(op):
    with pytest.raises(RuntimeError, match='needs logits that are not there: in training the loss makes them'): op(linear_logits(*layer()))
    with pytest.raises(RuntimeError, match='^T needs logits'): linear_logits(*layer()).T

def test_compiled_with_the_parameters_of_a_layer():
    "As parameters are no plain tensors: all logits are made"
    head, x, y = torch.nn.Linear(3, 4).double(), torch.randn(6, 3).double(), torch.arange(6) % 4
    def f(x, y): return smooth_linear_cross_entropy(x, head.weight, y, linear_bias=head.bias)
    assert distance(torch.compile(f, fullgraph=True, backend='aot_eager')(x, y), smooth_cross_entropy(head(x), y)) < EXACT

@pytest.mark.parametrize('device,k,rows', [('cpu', 1000, 4194), ('cpu', 60000, 256), ('meta', 1000, 4194), ('meta', 60000, 1024)])
def test_default_chunk_rows(device, k, rows):
    "16 MB of logits, and at least 256 rows; on any other device 1024"
    assert LinearLogits(torch.empty(8, 1, device=device), torch.empty(k, 1, device=device)).chunk_rows == rows

def test_modules_take_linear_logits():
    "Those of PyTorch's kind and of fastai's, which lets hidden states and targets have another shape."
    losses = pytest.importorskip('fastai_smooth.losses')
    x, weight, bias = layer(12)
    hidden, y, labels = x.detach().view(3, 4, 3).requires_grad_(), torch.randint(4, (3, 4)), torch.rand(3, 4, 4) < .4
    y[0, 1] = -100
    for reduction, chunk_rows in product(REDUCTIONS, (None, 5)):
        options = dict(reduction=reduction)
        for loss, target in ((losses.LabelSmoothingCrossEntropyFlat(.2, axis=-1, **options), y), (losses.LabelSmoothingCrossEntropyFlat(weight=W, **options), y),
                             (losses.LabelSmoothingBCEWithLogitsFlat(.1, pos_weight=W, **options), labels),
                             (losses.LabelSmoothingCrossEntropy(.2, **options), y.flatten()), (losses.LabelSmoothingBCEWithLogits(.2, **options), labels.view(12, 4))):
            actual = loss(linear_logits(hidden.flatten(0, 1), weight, bias, chunk_rows), target)
            expected = loss(F.linear(hidden if type(loss).__name__.endswith('Flat') else x, weight, bias), target)
            parts = weight, bias
            assert furthest(step(actual, parts), step(expected, parts)) < EXACT
    loss = losses.LabelSmoothingCrossEntropyFlat(ignore_index=2)
    assert distance(loss(linear_logits(hidden.flatten(0, 1), weight, bias, 5), y.abs() % 4), loss(F.linear(hidden, weight, bias), y.abs() % 4)) < EXACT
    assert grad(loss(linear_logits(hidden.flatten(0, 1), weight, bias), y.abs() % 4), hidden)[0].shape == hidden.shape

X, WEIGHT = torch.zeros(6, 3), torch.zeros(5, 3)
OF = dict(input=X, linear_weight=WEIGHT, target=torch.arange(6) % 5)

@pytest.mark.parametrize('args,error,match', [
    (dict(input=X.long()), TypeError, 'input must be floating point logits, got torch.int64'), (dict(input=torch.tensor(1.)), ValueError, r'input must have shape \(N, F\) and linear_weight \(K, F\), got \(\) and \(5, 3\)'),
    (dict(linear_weight=WEIGHT[:, :2]), ValueError, r'linear_weight \(K, F\), got \(6, 3\) and \(5, 2\)'),
    (dict(linear_weight=WEIGHT[0]), ValueError, r'linear_weight \(K, F\), got'), (dict(linear_weight=WEIGHT[None]), ValueError, r'got \(6, 3\) and \(1, 5, 3\)'),
    (dict(linear_weight=WEIGHT.tolist()), TypeError, 'linear_weight must be a tensor, got list'), (dict(linear_weight=WEIGHT.to_sparse()), TypeError, 'linear_weight must be a dense'),
    (dict(linear_weight=WEIGHT.double()), RuntimeError, 'same dtype.* float != double'),
    (dict(linear_weight=WEIGHT.to('meta')), ValueError, 'the layer is on meta, input on cpu'), (dict(linear_bias=torch.zeros(5, device='meta')), ValueError, 'the layer is on meta'),
    (dict(linear_bias=torch.zeros(5).double()), RuntimeError, 'same dtype'), *[(dict(linear_bias=torch.zeros(shape)), ValueError, r'linear_bias must have shape \(5,\), a value a class, got') for shape in ((), (1,), (3,), (1, 5))],
    *[(dict(chunk_rows=v), ValueError, f'chunk_rows must be a whole number of 1 or more, got {v}') for v in (0, -1, True, 2.5)], (dict(chunk_rows='a'), TypeError, "1 or more, got 'a'"),
    (dict(axis=0), TypeError, 'axis'), (dict(target=torch.full((6,), 5)), IndexError, 'class index 5 at row 0 is out of range for 5 classes'),
    (dict(target=torch.zeros(4).long()), ValueError, r'class indices must have shape \(6,\)'), (dict(target=torch.rand(6, 4)), ValueError, r'shaped like input, \(6, 5\)'),
    (dict(reduction='all'), ValueError, 'reduction'), (dict(eps=1.5), ValueError, 'eps must be in'), (dict(weight=torch.ones(4)), ValueError, r'weight must have shape \(5,\)'),
    (dict(backend='cuda'), ValueError, 'backend')])
def test_says_what_is_wrong(args, error, match):
    with pytest.raises(error, match=match): smooth_linear_cross_entropy(**OF | args)
    if not {'target', 'eps', 'weight'} & args.keys():
        with pytest.raises(error, match=match): smooth_linear_bce(**OF | dict(target=torch.ones(6, 5)) | args)

def test_classes_lie_along_axis_1():
    "Axis 0 has the rows, of which no more than some are there at a time."
    for axis in (0, -2):
        with pytest.raises(ValueError, match=f'classes along axis 1, got axis={axis}'): smooth_cross_entropy(linear_logits(*layer()), INDEX, axis=axis)
    for axis in (1, -1): assert distance(smooth_cross_entropy(linear_logits(*(parts := layer())), INDEX, axis=axis), at_once(smooth_cross_entropy, *parts, INDEX)) < EXACT
    prior = W / 2   # of rows, where a sigmoid loss is told that labels lie along axis 0
    parts = layer()
    assert distance(smooth_bce(linear_logits(*parts, 3), HOT, prior=prior, axis=0), smooth_bce(F.linear(*parts), HOT, prior=prior, axis=0)) < EXACT
