"Both losses in autograd: gradients of every order, several backwards, half precision, what is kept and what was changed."
from functools import partial
from itertools import product
import os

import pytest, torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from fastai_smooth.kernels import sigmoid, softmax
from fastai_smooth.kernels.autograd import accumulator, room_for_grad, scaled_grad
from .cases import HOT, INDEX, S, SOFT, SOFTMAX, W, by_reduction, every_option, logits, plain_loss, rand
from reference import REDUCTIONS, distance, loss_and_grad

pytestmark = pytest.mark.filterwarnings('ignore:.*weight')  # past the flip: test_checks.py has it


@every_option
@by_reduction
def test_gradcheck(loss_func, target, options, reduction):
    f = lambda x: loss_func(x, target, reduction=reduction, **options)
    assert torch.autograd.gradcheck(f, logits().requires_grad_())


@every_option
@by_reduction
def test_gradgradcheck(loss_func, target, options, reduction):
    f = lambda x: loss_func(x, target, reduction=reduction, **options)
    assert torch.autograd.gradgradcheck(f, logits().requires_grad_())


@pytest.mark.parametrize('shape,axis', [((2, 3, 2), 1), ((2, 3, 2), -1), ((2, 3, 2, 2), 1), ((1, 2, 2, 2, 2), 1)])
def test_gradcheck_and_gradgradcheck_of_images(shape, axis):
    x = logits(*shape).requires_grad_()
    rows = x.movedim(axis, -1).shape[:-1]
    y = torch.randint(0, x.shape[axis], rows)
    y.view(-1)[0] = -100
    for f in (lambda x: smooth_cross_entropy(x, y, axis=axis, reduction='none'),
              lambda x: smooth_cross_entropy(x, torch.ones(shape) / shape[axis], axis=axis),
              lambda x: smooth_bce(x, torch.ones(shape))):
        assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize('name', ['index', 'prior', 'matrix', 'weight', 'others', 'soft', 'multi-hot',
                                  'multi-hot, others'])
def test_gradcheck_and_gradgradcheck_of_masked_logits(name):
    "class 4 of 5 is masked and has no mass"
    target, options = SOFTMAX[name]
    if target.dim() == 2: target = F.pad(target, (0, 1))
    grow = dict(weight=lambda w: F.pad(w, (0, 1), value=1.), prior=lambda p: F.pad(p, (0, 1) * p.dim()))
    options = {k: grow[k](v) if k in grow else v for k, v in options.items()}
    if name == 'matrix': options['prior'][4, 4] = 1.
    mask = torch.full((4, 1), -torch.inf, dtype=torch.float64)
    f = lambda x: smooth_cross_entropy(torch.cat([x, mask], 1), target, **options)
    x = logits().requires_grad_()
    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize('loss_func,options', [(smooth_cross_entropy, {}), (smooth_cross_entropy, dict(weight=W)),
                                               (smooth_bce, dict(pos_weight=W))])
def test_gradcheck_and_gradgradcheck_of_soft_targets(loss_func, options):
    "w.r.t. logits and targets together, as F.cross_entropy allows"
    f = lambda x, y: loss_func(x, y, **options)
    inputs = logits().requires_grad_(), SOFT.clone().requires_grad_()
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


@every_option
@by_reduction
def test_several_backwards(loss_func, target, options, reduction):
    "retain_graph: the first, second and third backward give the same gradient, with any grad_output"
    x = logits().requires_grad_()
    loss = loss_func(x, target, reduction=reduction, **options)
    expected = plain_loss(loss_func, x, target, reduction=reduction, **options)
    for scale in (1., 1., -3.):
        g = torch.full_like(loss, scale)
        grad, = torch.autograd.grad(loss, x, g, retain_graph=True)
        assert distance(grad, torch.autograd.grad(expected, x, g, retain_graph=True)[0]) < 1e-6
    kept = grad.clone()
    torch.autograd.grad(loss, x, torch.ones_like(loss), retain_graph=True)
    assert torch.equal(grad, kept), 'a gradient handed out was overwritten by the next backward'


def test_retain_graph_accumulates():
    "backward twice: twice the gradient; a third without retain_graph ends it"
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        x = logits().requires_grad_()
        once, = torch.autograd.grad(loss_func(x, target), x)
        loss = loss_func(x, target)
        loss.backward(retain_graph=True)
        assert distance(x.grad, once) < 1e-12
        loss.backward()
        assert distance(x.grad, 2 * once) < 1e-12
        try: loss.backward()
        except RuntimeError: continue                             # "a second time", as PyTorch has it
        assert distance(x.grad, 3 * once) < 1e-12


def test_several_losses_of_the_same_logits():
    x = logits().requires_grad_()
    a, b = smooth_cross_entropy(x, INDEX), smooth_cross_entropy(x, SOFT, .3)
    c = smooth_bce(x, HOT)
    apart = [torch.autograd.grad(l, x, retain_graph=True)[0] for l in (a, b, c)]
    together, = torch.autograd.grad(a + 2 * b + 3 * c, x)
    assert distance(together, apart[0] + 2 * apart[1] + 3 * apart[2]) < 1e-12


@every_option
@by_reduction
def test_create_graph(loss_func, target, options, reduction):
    "a gradient penalty: its own gradient, and afterwards the first one again"
    x = logits().requires_grad_()
    results = []
    for f in (loss_func, lambda *args, **kw: plain_loss(loss_func, *args, **kw)):
        loss = f(x, target, reduction=reduction, **options)
        g = torch.linspace(-1, 2, loss.numel()).double().view_as(loss) + .1
        grad, = torch.autograd.grad(loss, x, g, create_graph=True)
        penalty, = torch.autograd.grad((grad ** 2).sum() + loss.sum(), x, retain_graph=True)
        again, = torch.autograd.grad(loss, x, g)
        results.append([grad, penalty, again])
    assert max(map(distance, *results)) < 1e-6


def test_create_graph_after_a_backward():
    "the first backward drops what it kept; the second, with create_graph, starts from the logits"
    x = logits().requires_grad_()
    loss, plain = smooth_cross_entropy(x, INDEX), plain_loss(smooth_cross_entropy, x, INDEX)
    torch.autograd.grad(loss, x, retain_graph=True)
    grads = [torch.autograd.grad(l, x, create_graph=True)[0] for l in (loss, plain)]
    assert distance(*grads) < 1e-6
    assert distance(*(torch.autograd.grad(g.pow(3).sum(), x)[0] for g in grads)) < 1e-6


def test_hessian():
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        hessians = [torch.autograd.functional.hessian(lambda x: f(x, target), logits().mul(0).add(SOFT))
                    for f in (loss_func, lambda x, y: plain_loss(loss_func, x, y))]
        assert distance(*hessians) < 1e-6


def test_grad_output_of_any_strides():
    "expanded (a sum's), transposed, and zero for some rows"
    x, y = logits(4, 4, 3), torch.randint(0, 4, (4, 3))
    for g in (torch.full((1, 1), 2.).double().expand(4, 3), rand(3, 4).T, torch.eye(4, 1).double().expand(4, 3)):
        ours = loss_and_grad(smooth_cross_entropy, x, y, .1, reduction='none', grad_output=g)
        theirs = loss_and_grad(F.cross_entropy, x, y, label_smoothing=.1, reduction='none', grad_output=g)
        assert max(map(distance, ours, theirs)) < 1e-10


def test_logits_changed_in_place_after_the_loss():
    "an error from autograd, or the gradient of the loss that was computed; never another number"
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        leaf = logits().requires_grad_()
        expected, = torch.autograd.grad(loss_func(leaf * 1, target), leaf)
        x = leaf * 1
        loss = loss_func(x, target)
        x.detach().mul_(0)
        try: grad, = torch.autograd.grad(loss, leaf)
        except RuntimeError as e: assert 'inplace' in str(e)
        else: assert distance(grad, expected) < 1e-12


def test_checkpoint():
    "activation checkpointing runs the loss again inside backward"
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        x = logits().requires_grad_()
        grads = [torch.autograd.grad(loss, x)[0] for loss in
                 (loss_func(x * 2, target), checkpoint(lambda x: loss_func(x * 2, target), x, use_reentrant=False))]
        assert distance(*grads) < 1e-12


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_several_backwards_in_half_precision(dtype):
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        x = logits().to(dtype).requires_grad_()
        loss = loss_func(x, target)
        first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        graphed, = torch.autograd.grad(loss, x, create_graph=True)
        assert first.dtype == second.dtype == graphed.dtype == dtype
        assert max(distance(second, first), distance(graphed, first)) < 2 * torch.finfo(dtype).eps


def rounded(v, dtype):
    "as numbers are when they are stored; Triton's interpreter cuts the digits of a bfloat16 off"
    cut = dtype == torch.bfloat16 and os.environ.get('TRITON_INTERPRET') == '1' and os.environ.get('SMOOTH_TEST_BACKEND') == 'triton'
    return (v.float().view(torch.int32) >> 16 << 16).view(torch.float32).to(dtype) if cut else v.to(dtype)


def off_by_rounding(loss_func, x, target, by, **options):
    "The share of a half-precision gradient that is not the float64 one, rounded"
    exact = loss_and_grad(loss_func, x.double(), target, .1, grad_output=by, **options)[1]
    return (loss_and_grad(loss_func, x, target, .1, grad_output=by, **options)[1] != rounded(exact, x.dtype)).double().mean().item()


@pytest.mark.parametrize('by', [1., .25, 1 / 3, 3., 'a row'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('head', ['index', 'soft', 'sigmoid'])
def test_half_precision_gradient_is_rounded_once(head, dtype, by):
    "whatever it is multiplied by: weights of rows, a share of accumulated batches. Rounded before that and after, a quarter is an ulp off"
    x, options = torch.randn(64, 1000).to(dtype), dict(reduction='none') if by == 'a row' else {}
    target = {'index': torch.randint(1000, (64,)), 'soft': torch.rand(64, 1000).softmax(1), 'sigmoid': torch.rand(64, 1000) < .1}[head]
    if by == 'a row': by = torch.rand(64, 1000) if head == 'sigmoid' else torch.rand(64)
    assert off_by_rounding(smooth_bce if head == 'sigmoid' else smooth_cross_entropy, x, target, by, **options) < .005


def test_half_precision_gradient_kept_in_float32(monkeypatch):
    "as on a GPU, where it is not made twice"
    for module in (softmax, sigmoid): monkeypatch.setattr(module, 'room_for_grad', lambda x: torch.empty_like(x, dtype=torch.float32))
    for dtype in (torch.bfloat16, torch.float16): test_half_precision_gradient_is_rounded_once('soft', dtype, 3.)
    for head in ('index', 'soft', 'sigmoid'): test_half_precision_gradient_is_rounded_once(head, torch.bfloat16, 'a row')


@every_option
def test_no_grad(loss_func, target, options):
    "the same number, and nothing to backpropagate"
    x = logits().requires_grad_()
    expected = loss_func(x, target, **options)
    assert expected.requires_grad and expected.dim() == 0
    with torch.no_grad(): quiet = loss_func(x, target, **options)
    with torch.inference_mode(): inferred = loss_func(x.detach(), target, **options)
    constant = loss_func(x.detach(), target, **options)
    for loss in (quiet, inferred, constant):
        assert not loss.requires_grad and distance(loss, expected) < 1e-12


@pytest.mark.parametrize('changed', ['target', 'weight', 'prior'])
@pytest.mark.parametrize('rows', [4, 100_000])
def test_changed_in_place_before_backward(rows, changed):
    "as in PyTorch: an error; or, where what was made of it is kept, the gradient of the loss that was computed. Never that of another loss"
    for f in (smooth_cross_entropy, smooth_bce):
        x, y = torch.randn(rows, 3, requires_grad=True), torch.rand(rows, 3).softmax(1)
        options = {} if changed == 'target' else {changed: torch.rand(3).softmax(0)}
        expected, = torch.autograd.grad(f(x, y, **options), x)
        loss = f(x, y, **options)
        (y if changed == 'target' else options[changed]).mul_(2)
        try: grad, = torch.autograd.grad(loss, x)
        except RuntimeError as e: assert 'modified by an inplace operation' in str(e)
        else: assert torch.equal(grad, expected)


def batched_grads(f, x):
    "with five grad_outputs at once"
    loss = f(x)
    return torch.autograd.grad(loss, x, torch.linspace(-1, 2, 5 * loss.numel(), dtype=loss.dtype).view(5, *loss.shape), is_grads_batched=True)[0]


def batched_grads_of_grads(f, x):
    loss = f(x)
    grads, = torch.autograd.grad(loss, x, torch.linspace(-1, 2, 5 * loss.numel(), dtype=loss.dtype).view(5, *loss.shape), is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(grads.pow(2).sum(), x)[0]


BATCHED = dict(grads=batched_grads, grads_of_grads=batched_grads_of_grads, jacobian=partial(torch.autograd.functional.jacobian, vectorize=True),
               jacobian_forward=partial(torch.autograd.functional.jacobian, vectorize=True, strategy='forward-mode'),
               hessian=lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x, vectorize=True))


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')
@every_option
@pytest.mark.parametrize('how,reduction', [('grads', 'mean'), *product(BATCHED, ['none'])])
def test_batched_gradients(how, reduction, loss_func, target, options):
    "several gradients at once: as of plain ops"
    x = logits().requires_grad_()
    actual, expected = (BATCHED[how](lambda x: f(x, target, reduction=reduction, **options), x) for f in (loss_func, partial(plain_loss, loss_func)))
    assert distance(actual, expected) < 1e-6


@pytest.mark.parametrize('loss_func,target', [(smooth_cross_entropy, torch.tensor([0, 2, 1, 1])), (smooth_bce, torch.eye(4, 3))])
def test_forward_mode_without_torch_func(loss_func, target):
    x, along = torch.randn(4, 3), torch.randn(4, 3)
    loss, grad = loss_and_grad(loss_func, x, target)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(loss_func(forward_ad.make_dual(x, along), target))
        assert distance(out.primal, loss) < 1e-6 and distance(out.tangent, (grad * along).sum()) < 1e-6


# ---------------------------------------------------------------- how a gradient meets its factor

def made(x, grad, grad_output):
    "What `scaled_grad` gives for a gradient that is 2 where it is made, and the factors that it was made with"
    factors = []
    def make(factor, out):
        factors.append(factor)
        out.copy_(torch.full_like(x, 2.) * factor)
    return scaled_grad(x, grad, grad_output, make), factors


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_scaled_grad(dtype):
    "what the forward made is handed over, multiplied where it is not by 1; a later backward makes it as it was, and multiplies then"
    x = torch.zeros(3, 4, dtype=dtype)
    assert accumulator(x) == dtype and room_for_grad(x).shape == x.shape and room_for_grad(x).dtype == dtype
    grad = torch.full_like(x, 2.)
    assert made(x, grad, torch.tensor(1., dtype=dtype)) == (grad, [])
    for g in (torch.tensor(3.), torch.tensor(3.).expand(3, 1)):   # one number, of loss.mean() and of losses.sum()
        res, factors = made(x, torch.full_like(x, 2.), g.to(dtype))
        assert (res == 6).all() and factors == []
    rows = torch.tensor([[1.], [2.], [0.]], dtype=dtype)
    res, factors = made(x, torch.full_like(x, 2.), rows)
    assert torch.equal(res, (2 * rows).expand(3, 4)) and factors == []
    for g in (torch.tensor(1., dtype=dtype), torch.tensor(3., dtype=dtype), rows):
        res, factors = made(x, None, g)
        assert torch.equal(res, (2 * g).expand(3, 4)) and factors == [1.] and res.dtype == dtype


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_scaled_grad_in_half_precision(dtype):
    "is made with its factor, so that it is rounded once; or it was kept in float32 till now"
    x, rows = torch.zeros(3, 4, dtype=dtype), torch.tensor([[1.], [2.], [0.]])
    for g, factor in ((torch.tensor(3.), 3.), (torch.tensor(1.), 1.), (rows, rows)):
        res, factors = made(x, None, g)
        assert res.dtype == dtype and len(factors) == 1 and (factors[0] is rows if g is rows else factors[0] == factor)
        assert torch.equal(res, (2 * g).expand(3, 4).to(dtype))
        kept, factors = made(x, torch.full((3, 4), 2.), g)
        assert torch.equal(kept, res) and kept.dtype == dtype and factors == []
    if (room := room_for_grad(x)) is not None:   # made in the forward, for a factor of 1
        assert room.dtype == dtype
        grad = torch.full_like(x, 2.)
        assert made(x, grad, torch.tensor(1.)) == (grad, [])
        res, factors = made(x, grad, torch.tensor(3.))
        assert (res == 6).all() and factors == [3.]


def test_room_for_grad_on_a_gpu():
    "where launches cost more than memory: in float32, so that it is rounded once"
    for dtype in (torch.float16, torch.bfloat16, torch.float32): assert room_for_grad(torch.zeros(2, 3, dtype=dtype, device='meta')).dtype == torch.float32


def test_a_gradient_is_made_once(monkeypatch):
    "in the forward; the first backward takes it; those after it make it anew, and get the same"
    calls = []
    for module in (softmax, sigmoid):
        monkeypatch.setattr(module, 'loss_and_grad', lambda *args, f=module.loss_and_grad, **kwargs: calls.append(1) or f(*args, **kwargs))
        monkeypatch.setattr(module, 'FEW', 0)
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        x = logits().float().requires_grad_()
        calls.clear()
        loss = loss_func(x, target, .3)
        first, = torch.autograd.grad(loss, x, retain_graph=True)
        assert len(calls) == 1
        second, = torch.autograd.grad(loss, x, retain_graph=True)
        assert len(calls) == 2 and torch.equal(first, second) and first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize('learned', ['weight', 'prior', 'eps', 'target'])
@pytest.mark.parametrize('few', [True, False])
def test_what_is_learned_gets_its_gradient(few, learned, monkeypatch):
    "weights, priors, an eps a class, soft targets: by plain ops, or by PyTorch where that has one, never a part of it"
    for module in (softmax, sigmoid): monkeypatch.setattr(module, 'FEW', 10**4 if few else 0)
    x = logits()
    def weighed(loss_func, x, target, weight=None, **options):   # PyTorch's sigmoid loss gives a weight no gradient
        if loss_func is smooth_cross_entropy or weight is None: return plain_loss(loss_func, x, target, weight=weight, **options)
        return (plain_loss(loss_func, x, target, reduction='none', **options) * weight).mean()
    for loss_func, eps in product((smooth_cross_entropy, smooth_bce), (0., .2)):
        if learned == 'eps' and loss_func is smooth_bce: continue
        v = (SOFT if learned == 'target' else W).clone().requires_grad_()
        def loss(f):
            options = {'eps': eps, 'weight': v} if learned == 'weight' else {'eps': eps, 'prior': v.softmax(0)} if learned == 'prior' else {'eps': v / 2 if learned == 'eps' else eps}
            return f(x, v if learned == 'target' else INDEX if loss_func is smooth_cross_entropy else SOFT, **options)
        grads = [torch.autograd.grad(loss(f), v)[0] for f in (loss_func, partial(weighed, loss_func))]
        assert distance(*(g + 1 for g in grads)) < 1e-6   # eps 0 has none for a prior
