"""Adversarial numerics: whatever the logits and eps, the error against float64 is at most PyTorch's on the same input.

The error of a loss is relative; with reduction='none' it is the worst row's. That of a gradient is its largest, relative to the
larger of the two terms whose difference it is: where these are equal but for their last digits, there is no gradient to be had.
At most PyTorch's means: not more by more than `ULPS` units in the last place of float32, as the two are rounded at other places,
and what torch.softmax, which both are made of, is off on this input, as PyTorch's next error may happen to make up for that.
In half precision PyTorch has two tries, with the logits as they are and the same ones in float32: ours has to match the better."""
from functools import partial
from types import SimpleNamespace
import math, sys

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy, softmax
from .cases import cast
from reference import REDUCTIONS, loss_and_grad

HALF = torch.float16, torch.bfloat16
DTYPES = torch.float32, *HALF
EPS = 0., math.nextafter(0, 1), 1e-8, 1e-4, .1, .9, 1 - 2**-24, math.nextafter(1, 0), 1.
HALF_EPS = *(eps / 2 for eps in EPS), math.nextafter(.01, 0), .01   # of the sigmoid loss, which sums in another way from .01 on
ULPS, TINY = 4, torch.finfo(torch.float32).tiny
pytestmark = pytest.mark.filterwarnings('ignore:.*weight')  # past the flip

# ---------------------------------------------------------------- the truth, in float64: all sums are of values of one sign

def softmax_truth(x, y, eps, reduction, weight=None):
    "Loss, gradient, the largest of the gradient's two terms, and what an error of log softmax is multiplied by in the loss. Classes in axis 1."
    log_p, k = x.double().log_softmax(1), x.shape[1]
    w = torch.ones(k) if weight is None else weight
    w = w.double().view(-1, *[1] * (x.dim() - 2))
    onehot = y.double() if y.is_floating_point() else F.one_hot(y, k).movedim(-1, 1).double()
    t = w * ((1 - eps) * onehot + eps / k)
    mass = t.sum(1, keepdim=True)
    n = y.numel() // k if y.is_floating_point() else (w * onehot).sum()
    return reduced(-(t * log_p).sum(1), mass * log_p.exp(), t, mass.squeeze(1), reduction, n)

def sigmoid_truth(x, y, eps, reduction, weight=torch.tensor(1.), pos_weight=torch.tensor(1.)):
    x, y, w, c = (v.double() for v in (x, y, weight, pos_weight))
    yes, no = w * c * ((1 - 2 * eps) * y + eps), w * ((1 - 2 * eps) * (1 - y) + eps)
    rows = yes * torch.logaddexp(-x, x.new_zeros(())) + no * torch.logaddexp(x, x.new_zeros(()))
    return reduced(rows, no * x.sigmoid(), yes * (-x).sigmoid(), 0 * rows, reduction, rows.numel())

def reduced(rows, first, second, mass, reduction, n):
    by = 1 / n if reduction == 'mean' else 1.
    if reduction != 'none': rows, mass = rows.sum() * by, mass.sum() * by
    return SimpleNamespace(loss=rows, grad=(first - second) * by, mass=mass, terms=max((first.max() * by).item(), (second.max() * by).item(), TINY))

def worse(ours, theirs, truth, dtype, off=0., **about):
    "Where ours is worse than the best of theirs, in words: a list of none to two. `off`: an error of the softmax that both are made of."
    of_loss = lambda error: (error / truth.loss.clamp(min=TINY)).max().item()
    def errors(loss, grad):
        if not (loss.isfinite().all() and grad.isfinite().all()): return math.inf, math.inf
        return of_loss((loss.double() - truth.loss).abs()), ((grad.double() - truth.grad).abs().max() / truth.terms).item()
    own, ulps = torch.finfo(dtype), ULPS * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounded = own.eps * (.5 + own.tiny / truth.terms) if dtype in HALF else 0   # once, at the end
    slacks, best = (ulps + of_loss(off * truth.mass), ulps + off + rounded), map(min, zip(*(errors(*t) for t in theirs)))
    return [f'{what} {about}: {error:.3g}, PyTorch {other:.3g}, slack {slack:.3g}' for what, error, other, slack
            in zip(('loss', 'gradient'), errors(*ours), best, slacks) if not error <= min(other + slack, sys.float_info.max)]

def compare(x, y, kind, all_eps=EPS, ours=partial(loss_and_grad, smooth_cross_entropy), weight=None, reduction='mean'):
    "`worse` for each eps. The classes are in axis 1."
    acc, found = torch.promote_types(x.dtype, torch.float32), []
    # Exponentials are added in lanes (one alone for classes that lie apart); one that holds a 1 loses all that is less than 6e-8
    off = (torch.softmax(x.to(acc), 1).double().sum(1) - 1).abs().max().item()
    for eps in all_eps:
        theirs = [loss_and_grad(F.cross_entropy, x.to(d), cast(y, d), weight=cast(weight, d), label_smoothing=eps, reduction=reduction) for d in {x.dtype, acc}]
        found += worse(ours(x, y, eps, weight=weight, reduction=reduction), theirs, softmax_truth(x, y, eps, reduction, weight), x.dtype, off, kind=kind, eps=eps)
    return found

def compare_binary(x, y, kind, all_eps=HALF_EPS, reduction='mean', **weights):
    """The same of the sigmoid loss. PyTorch's try in half precision counts where each row does: it loses whole digits, whose mean
    may come out right by chance."""
    acc, found = torch.promote_types(x.dtype, torch.float32), []
    for eps in all_eps:
        theirs = [loss_and_grad(F.binary_cross_entropy_with_logits, x.to(d), (1 - 2 * eps) * y.to(d) + eps, reduction=reduction, **weights)
                  for d in ({x.dtype, acc} if reduction == 'none' else {acc})]
        found += worse(loss_and_grad(smooth_bce, x, y, eps, reduction=reduction, **weights), theirs, sigmoid_truth(x, y, eps, reduction, **weights),
                       x.dtype, kind=kind, eps=eps)
    return found

# ---------------------------------------------------------------- adversarial rows

KINDS = {
    'normal': lambda o: o.r, 'normal, 100': lambda o: 100 * o.r, 'huge': lambda o: (o.big / 3 * o.r).clamp(-o.big, o.big),
    'equal': lambda o: 0 * o.r, 'equal, big': lambda o: 0 * o.r + o.big, 'equal, -big': lambda o: 0 * o.r - o.big,
    'right': lambda o: torch.where(o.own, o.big, -o.big), 'right, by 17': lambda o: 17 * o.own,
    'right, far': lambda o: torch.where(o.own, o.big, .997 * o.big), 'wrong': lambda o: torch.where(o.next, o.big, -o.big),
    'torn': lambda o: torch.where(o.own | o.next, o.big, o.r), 'far': lambda o: o.big - 10 + o.r,
    'ramp': lambda o: (torch.linspace(-1, 1, o.r.shape[1]) * o.big).expand(o.r.shape),
    'by turns': lambda o: torch.where(o.at % 2 == 0, o.big, -o.big).expand(o.r.shape),
    'mixed': lambda o: torch.stack([KINDS[list(KINDS)[i % (len(KINDS) - 1)]](o)[i] for i in range(len(o.r))])}
BINARY = {name: KINDS[name] for name in ('normal', 'normal, 100', 'huge', 'equal', 'equal, big', 'equal, -big', 'far')} | {
    'tiny': lambda o: 1e-8 * o.r, 'right': lambda o: o.big * o.sign, 'right, by 17': lambda o: (17 + o.r) * o.sign, 'wrong': lambda o: -o.big * o.sign,
    'ramp': lambda o: torch.linspace(-120, 120, o.r.numel()).view(o.r.shape)}

def rows(kind, n, k, dtype, seed=0, binary=False):
    "Logits (n,k), and class indices or labels."
    g = torch.Generator().manual_seed(seed)
    y, r, at = torch.randint(0, 2 if binary else k, (n, k if binary else 1), generator=g), torch.randn(n, k, generator=g).double(), torch.arange(k)
    o = SimpleNamespace(r=r, at=at, big=6e4 if dtype == torch.float16 else 1e4, own=at == y, next=at == (y + 1) % k, sign=2 * y - 1)
    return (BINARY if binary else KINDS)[kind](o).to(dtype).clone(), y if binary else y[:, 0]

def dyadic(*shape, seed=0): return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed)) / 32  # in any dtype

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('size', [(5, 1), (5, 2), (7, 10), (30, 101), (1, 20000), (530, 1000)], ids=str)
def test_softmax(size, dtype):
    large = size[0] * size[1] > 10**5   # more than goes to PyTorch
    found = [f for kind in KINDS for f in compare(*rows(kind, *size, dtype), kind, (1e-8, .1) if large else EPS)]
    assert not found, '\n'.join(found)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('how', ['none', 'weight', 'soft', 'soft weight none', 'images', 'images soft', 'channels_last', 'transposed', 'sliced', 'prior'])
def test_softmax_otherwise(how, dtype, monkeypatch):
    "Other reductions, targets and layouts, all by the loop."
    monkeypatch.setattr(softmax, 'pytorch_loss', lambda *args: None)
    n, k, found, ours = 30, 500, [], partial(loss_and_grad, smooth_cross_entropy)
    for kind in KINDS:
        x, y = rows(kind, n, k, dtype)
        if 'soft' in how:  # every other one-hot: a loss may be small
            part = .25 * (torch.arange(n) % 2)[:, None]
            y = ((1 - part) * F.one_hot(y, k) + part * F.one_hot((y + 1) % k, k)).to(dtype)
        if 'images' in how or how == 'channels_last':
            x, y = (v.view(n // 15, 3, 5, *v.shape[1:]) for v in (x, y))
            if 'soft' in how: y = y.movedim(-1, 1)
            x = x.movedim(-1, 1) if how == 'channels_last' else x.movedim(-1, 1).contiguous()
        if how == 'transposed': x = x.T.contiguous().T
        if how == 'sliced': x = torch.stack([x, x], -1)[..., 0]
        if how == 'prior': ours = partial(loss_and_grad, smooth_cross_entropy, prior=torch.full((k,), 1 / k))
        found += compare(x, y, kind, (1e-8, .1), ours, dyadic(k) if 'weight' in how else None, 'none' if 'none' in how else 'mean')
    assert not found, '\n'.join(found)

@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(k=st.integers(1, 40) | st.sampled_from([200, 5000]), kinds=st.lists(st.sampled_from(list(KINDS)[:-1]), min_size=1, max_size=6),
       eps=st.sampled_from(EPS) | st.floats(0, 1), dtype=st.sampled_from(DTYPES), reduction=st.sampled_from(REDUCTIONS),
       weighted=st.booleans(), layout=st.sampled_from(['rows', 'image', 'transposed']), seed=st.integers(0, 2**20))
def test_mixtures(k, kinds, eps, dtype, reduction, weighted, layout, seed):
    "Rows of several kinds in one batch, or the pixels of one image, and any eps."
    x, y = map(torch.cat, zip(*(rows(kind, 1, k, dtype, seed + i) for i, kind in enumerate(kinds))))
    if layout == 'image': x, y = x.T.contiguous()[None], y[None]
    if layout == 'transposed': x = x.T.contiguous().T
    found = compare(x, y, kinds, [eps], weight=dyadic(k, seed=seed) if weighted else None, reduction=reduction)
    assert not found, '\n'.join(found)

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('size', [(1, 1), (13, 5), (1, 20000), (2, 50000)], ids=str)
def test_sigmoid(size, dtype):
    found = [f for kind in BINARY for f in compare_binary(*rows(kind, *size, dtype, binary=True), kind, HALF_EPS if size[1] < 50000 else (5e-9, .01, .5))]
    assert not found, '\n'.join(found)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('size', [(15, 7), (150, 500)], ids=str)
@pytest.mark.parametrize('how', ['none', 'weight', 'pos_weight', 'both weights none', 'soft'])
def test_sigmoid_otherwise(how, size, dtype):
    found = []
    for kind in BINARY:
        x, y = rows(kind, *size, dtype, binary=True)
        options = {name: dyadic(size[1]) for name in ('weight', 'pos_weight') if how in (name, 'both weights none')}
        if how == 'soft': y = torch.arange(y.numel()).view(y.shape) % 9 / 8
        found += compare_binary(x, y, kind, (5e-9, .01, .45), 'none' if 'none' in how else 'mean', **options)
    assert not found, '\n'.join(found)
