"The sigmoid kernel: smoothing by tensors, what it is exact in, and its custom ops."
from itertools import product

import pytest, torch

from .device import DEVICE, cut, inputs, launched
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce
from fastai_smooth.kernels.targets import SigmoidTarget
from fastai_smooth.kernels.triton import sigmoid
from reference import distance, loss_and_grad

@pytest.mark.parametrize('kinds', product(['number', 'scalar', 'classes', 'full'], repeat=2))
def test_smoothing_of_negatives_and_of_positives(kinds, cut):
    "e0 and e1 are numbers, or tensors of any strides."
    cut()
    x, _ = inputs(7, 5)
    def smoothing(kind, by):
        if kind == 'number': return by
        v = by * torch.rand(dict(scalar=(), classes=(5,), full=(5, 7))[kind], dtype=x.dtype, device=DEVICE)
        return v.T if kind == 'full' else v.expand(x.shape)
    target = SigmoidTarget((x > .3), smoothing(kinds[0], .1), smoothing(kinds[1], .4), torch.tensor(3., dtype=x.dtype, device=DEVICE).expand(x.shape))
    for reduction in ('mean', 'none'): assert max(map(distance, *(loss_and_grad(f, x, target, reduction) for f in (sigmoid.sigmoid_loss, sigmoid.plain_loss)))) < 1e-10

def test_losses_of_labels_that_are_sure():
    "Without smoothing they are exp(-|x|): 1 + that, in float32, has lost all of its digits."
    x = torch.linspace(10, 40, 31, device=DEVICE)
    for sign in (1, -1):
        loss = smooth_bce(sign * x, (sign * x > 0), 0., reduction='none', backend='triton')
        assert ((loss.double() / torch.log1p(torch.exp(-x.double())) - 1).abs() < 1e-5).all()

@pytest.mark.parametrize('reduction', ['mean', 'none'])
@pytest.mark.parametrize('case', ['uint8', 'factors', 'transposed', 'nothing'])
def test_opcheck(case, reduction):
    x = torch.randn(0 if case == 'nothing' else 6, 5, device=DEVICE)
    if case == 'transposed': x = x.T
    v = torch.rand(x.shape[-1:], device=DEVICE).expand(x.shape) if case == 'factors' else None
    args = (x.requires_grad_(), *sigmoid.op_args(x, SigmoidTarget((x > 0).to(torch.uint8), .05 if v is None else v, .05, v, v)), reduction)
    tests = 'test_schema', 'test_autograd_registration', 'test_faketensor'
    torch.library.opcheck(sigmoid.sigmoid_forward, args, test_utils=tests)
    torch.library.opcheck(sigmoid.sigmoid_backward, (torch.ones_like(sigmoid.sigmoid_forward(*args)), x.detach(), *args[1:]), test_utils=tests)

@pytest.mark.parametrize('pair', [False, True])
def test_compiled_for_any_eps(launched, pair):
    "The kernel stands in the graph, with eager's numbers. A schedule of eps compiles twice: when it first changes, it becomes a number that may."
    from torch._dynamo.testing import CompileCounterWithBackend
    x, _ = inputs(6, 10, torch.float32)
    def f(x, y, eps, backend='triton'): return smooth_bce(x, y, eps, backend=backend)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for eps in torch.linspace(0, .4, 5).tolist():
        launched.clear()
        if pair: eps = eps, eps / 2
        actual = loss_and_grad(compiled, x, x > 0, eps)
        assert launched == ['forward', 'backward'] and max(map(distance, actual, loss_and_grad(f, x, x > 0, eps, 'torch'))) < 1e-6
    assert counter.frame_count == 2
