"""How much there is to compute decides how it is computed (kernels/softmax.py, sigmoid.py): whichever way, float64 agrees.

Each size takes another way: few logits, some, pieces of a block, several blocks. The inputs are those where a quick way does
not do, in one row, the last: the others have to come out of it right, too."""
import os

import pytest
import torch
import torch.nn.functional as F

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from fastai_smooth.kernels import sigmoid, softmax

SIZES = {'few': (16, 8), 'some': (100, 1000), 'one piece': (500, 1000), 'pieces': (700, 1000), 'blocks': (700, 1000),
         'few images': (2, 5, 8, 8), 'images': (3, 21, 128, 128), 'one image': (1, 21, 190, 190)}
assert torch.Size(SIZES['few']).numel() <= softmax.FEW < torch.Size(SIZES['some']).numel() <= softmax.SOME < torch.Size(SIZES['pieces']).numel()


@pytest.fixture
def small_blocks(request, monkeypatch):
    "blocks of a megabyte, so that a small tensor has several"
    if request.getfixturevalue('size') == 'blocks':
        monkeypatch.setattr(softmax, 'CHUNK_MB', 1)
        monkeypatch.setattr(softmax, 'BLOCK_MB', 1)


def inputs(shape, kind, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(shape, generator=g), torch.randint(3, shape[1], shape[:1] + shape[2:], generator=g)
    row = x[-1, :, -1, -1] if x.dim() == 4 else x[-1]
    if kind == 'sure of another class': row[:] = -300.; row[0] = 0.; y.view(-1)[-1] = 3
    if kind == 'far from 0': x += 1000.
    if kind == 'one row far from 0': row += 3000.
    if kind == 'masked': x[:, 1:3] = -torch.inf
    if kind == 'ignored': y.view(-1)[-1] = -100; y.view(-1)[0] = -100; row[:] = torch.nan
    return x.to(dtype).requires_grad_(), y


def truth(x, y, kind, eps):
    "PyTorch in float64; of masked classes, which get no smoothing, of the others alone; of junk that is ignored, without it"
    d, target = x.detach().double(), y
    kept = torch.arange(x.shape[1]) if kind != 'masked' else torch.tensor([i for i in range(x.shape[1]) if i not in (1, 2)])
    d = d.index_select(1, kept).nan_to_num_(0, neginf=-torch.inf).requires_grad_()
    if kind == 'masked': target = y - 2
    loss = F.cross_entropy(d, target, label_smoothing=eps)
    grad = torch.zeros(x.shape, dtype=torch.double).index_copy_(1, kept, torch.autograd.grad(loss, d)[0])
    return loss.item(), grad


KINDS = ['plain', 'sure of another class', 'far from 0', 'one row far from 0', 'masked', 'ignored']


@pytest.mark.parametrize('eps', [0., .1])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', SIZES)
def test_softmax(size, kind, eps, small_blocks):
    x, y = inputs(SIZES[size], kind)
    loss = smooth_cross_entropy(x, y, eps)
    expected, grad = truth(x, y, kind, eps)
    assert abs(loss.item() - expected) <= 2e-6 * expected
    actual, = torch.autograd.grad(loss, x, retain_graph=True)
    again, = torch.autograd.grad(loss, x, torch.tensor(2.))  # which makes it anew
    assert (actual.double() - grad).norm() <= 1e-5 * grad.norm() and torch.equal(again, actual*2)
    with torch.no_grad(): assert abs(smooth_cross_entropy(x, y, eps).item() - expected) <= 2e-6 * expected


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', ['few', 'pieces', 'images'])
@pytest.mark.parametrize('layout', ['none', 'turned', 'sliced', 'bfloat16', 'float16', 'float16, prior', 'weight', 'prior', 'classes last'])
def test_softmax_otherwise(size, kind, layout):
    "one value a row, other layouts, half precision, a weight of ones: the same loss and gradient"
    if 'float16' in layout[:7] and kind == 'one row far from 0': pytest.skip('1 apart is 2 apart there')
    dtype = getattr(torch, layout[:8].strip(',')) if 'float16' in layout else torch.float32
    x, y = inputs(SIZES[size], kind, dtype)
    expected, grad = truth(x, y, kind, .1)
    options, v, w = {}, x, y
    if layout == 'turned': v = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    if layout == 'sliced': v = torch.stack([x.detach()]*2, -1).requires_grad_()
    if layout == 'classes last': v, options = x.detach().movedim(1, -1).contiguous().requires_grad_(), dict(axis=-1)
    if layout == 'weight': options = dict(weight=torch.ones(x.shape[1]))
    if 'prior' in layout: options = dict(prior=torch.full(x.shape[1:2], 1/x.shape[1]))
    if layout == 'none': options = dict(reduction='none')
    loss = smooth_cross_entropy(v[..., 0] if layout == 'sliced' else v, w, .1, **options)
    if layout == 'none': loss = loss.sum() / (y != -100).sum()
    scale = 1024. if dtype == torch.float16 else 1.
    actual = torch.autograd.grad(loss, v, torch.tensor(scale))[0].double() / scale
    if layout == 'sliced': actual = actual[..., 0]
    if layout == 'classes last': actual = actual.movedim(-1, 1)
    assert abs(loss.item() - expected) <= 2e-6 * expected
    bfloat16 = 8e-3 if os.environ.get('TRITON_INTERPRET') == '1' else 4e-3  # Triton's interpreter cuts digits off, rather than rounding
    assert (actual - grad).norm() <= {torch.float32: 1e-5, torch.bfloat16: bfloat16, torch.float16: 1e-3}[dtype] * grad.norm()
    with torch.no_grad(): again = smooth_cross_entropy(v[..., 0] if layout == 'sliced' else v, w, .1, **options)
    assert abs((again.sum() / (y != -100).sum() if layout == 'none' else again).item() - expected) <= 2e-6 * expected


@pytest.mark.parametrize('layout', ['plain', 'turned', 'bool', 'float', 'bfloat16', 'float16', 'none'])
@pytest.mark.parametrize('eps', [0., .001, .05, .5])
@pytest.mark.parametrize('shape', [(5, 3), (311, 89), (977, 501), (1, 1)])
@pytest.mark.parametrize('scale', [1, 20, 200])
def test_sigmoid(shape, eps, layout, scale):
    "short and long sums of logs, few logits and chunks, up to where float32 has no sigmoid left"
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(shape, generator=g)*scale, (torch.rand(shape, generator=g) < .3).to(torch.uint8)
    if layout in ('bfloat16', 'float16'): x = x.to(getattr(torch, layout))
    if layout == 'turned': x = x.T.contiguous().T
    d = x.double().requires_grad_()
    expected = F.binary_cross_entropy_with_logits(d, y.double()*(1-2*eps) + eps)
    grad, = torch.autograd.grad(expected, d)
    x.requires_grad_()
    loss = smooth_bce(x, y.bool() if layout == 'bool' else y.float() if layout == 'float' else y, eps, reduction='none' if layout == 'none' else 'mean')
    by = 1024. if layout == 'float16' else 1.
    actual = torch.autograd.grad(loss.mean(), x, torch.tensor(by))[0].double() / by
    assert abs(loss.mean().item() - expected.item()) <= 2e-6 * expected.item()
    assert (actual - grad).norm() <= (1e-2 if layout in ('bfloat16', 'float16') else 1e-5) * grad.norm()


@pytest.mark.parametrize('shape', [(4, 3), (300, 1000)])
@pytest.mark.parametrize('value', [torch.inf, -torch.inf])
@pytest.mark.parametrize('label', [0, 1])
def test_sigmoid_of_infinite_logits(shape, value, label):
    "inf as PyTorch has it: never a number, and never nan where PyTorch has none"
    x, y = torch.zeros(shape), torch.zeros(shape)
    x[-1, -1], y[-1, -1] = value, label
    expected = F.binary_cross_entropy_with_logits(x, y*.9 + .05)
    assert torch.equal(smooth_bce(x, y), expected) or expected.isnan()


def test_log_sigmoid():
    "as exact as the op that it stands for, where that has something to lose"
    x = torch.cat([torch.linspace(-120, 120, 100001), torch.tensor([0., 1e-8, -1e-8, 17, 88, 1e4, -1e4, torch.inf, -torch.inf])])
    actual, expected = sigmoid.log_sigmoid(x).double(), F.logsigmoid(x.double())
    both = expected.isfinite() & (expected < -1e-37)
    worst = ((actual - expected)[both] / expected[both]).abs().max()
    assert worst <= max(2.5e-7, 1.5*((F.logsigmoid(x).double() - expected)[both] / expected[both]).abs().max())
    assert torch.equal(actual[~both], expected[~both].float().double()) or (actual[~both] - expected[~both]).abs().nan_to_num(0).max() < 1e-37


@pytest.mark.parametrize('shape', [(40, 30000), (3, 20000, 5)])
def test_many_classes_that_are_not_next_to_each_other(shape):
    "no more error than when they are: exponentials are not added up one by one"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3)
    x = (x.T.contiguous().T if x.dim() == 2 else x).requires_grad_()
    y = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    expected, grad = truth(x, y, 'plain', .1)
    loss = smooth_cross_entropy(x, y)
    assert abs(loss.item() - expected) <= 3e-7 * expected
    assert (torch.autograd.grad(loss, x)[0].double() - grad).norm() <= 1e-6 * grad.norm()


@pytest.mark.parametrize('shape', [(8, 4), (300, 1000)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_another_default_device(shape, dtype):
    "what is made here is made where the logits are"
    x, y = torch.randn(shape).to(dtype).requires_grad_(), torch.zeros(shape[0], dtype=torch.long)
    with torch.device('meta'):
        for loss in (smooth_cross_entropy(x, y), smooth_bce(x, (x > 0).to(torch.uint8))):
            assert loss.device.type == torch.autograd.grad(loss, x)[0].device.type == 'cpu'
