"""Adversarial numerics: whatever the logits and eps, the error against float64 is at most PyTorch's on the same input.

The error of a loss is relative; with reduction='none' it is the worst row's. That of a gradient is its largest, relative to the
larger of the two terms whose difference it is: where these are equal but for their last digits, there is no gradient to be had.
At most PyTorch's means: not more by more than `ULPS` units in the last place of float32, as the two are rounded at other places,
and what torch.softmax, which both are made of, is off on this input, as PyTorch's next error may happen to make up for that.
In half precision PyTorch has two tries, with the logits as they are and the same ones in float32: ours has to match the better."""
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
import math, sys

import numpy as np
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy, softmax
from reference import REDUCTIONS, distance, loss_and_grad, sigmoid_reference, softmax_reference

pytestmark = pytest.mark.filterwarnings('ignore:.*weight')  # past the flip: has a test of its own
HALF = torch.float16, torch.bfloat16
DTYPES = torch.float32, *HALF
EPS = 0., math.nextafter(0, 1), 1e-30, 1e-8, 1e-4, .1, .9, 1 - 2**-24, math.nextafter(1, 0), 1.
HALF_EPS = *(eps / 2 for eps in EPS), math.nextafter(.01, 0), .01  # of the sigmoid head, which sums in another way from .01 on
ULPS = 4
few = settings(max_examples=80, deadline=None, derandomize=True, database=None)
extended = pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason='nothing is wider than float64 here')


# ---------------------------------------------------------------- the truth, from the formulas: all sums are of values of one sign

class Truth(NamedTuple):
    loss: np.ndarray
    grad: np.ndarray
    terms: float  # the largest of the gradient's two terms
    mass: float   # what an error of log softmax is multiplied by in the loss

    @classmethod
    def of(cls, rows, first, second, mass, reduction, n):
        by = 1 / n if reduction == 'mean' else 1
        terms = max(first.max() * by, second.max() * by, np.finfo(np.float32).tiny)
        if reduction != 'none': rows, mass = rows.sum() * by, mass.sum() * by
        return cls(rows, (first - second) * by, terms, mass)

    def errors(self, loss, grad):
        "Of the two."
        loss, grad = wide(loss), wide(grad)
        if not (np.isfinite(loss).all() and np.isfinite(grad).all()): return math.inf, math.inf
        return self.of_loss(abs(loss - self.loss)), abs(grad - self.grad).max() / self.terms

    def of_loss(self, difference): return (difference / np.maximum(self.loss, np.finfo(np.float32).tiny)).max()

    def slack(self, dtype, off):
        "What ours may be off more than PyTorch's."
        own, ulps = torch.finfo(dtype), ULPS * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        rounded = own.eps * (.5 + own.tiny / self.terms) if dtype in HALF else 0  # once, at the end
        return ulps + self.of_loss(off * self.mass), ulps + off + rounded


def wide(v, dtype=np.float64): return v.detach().double().numpy().astype(dtype)


def wider(x): return np.longdouble if x.dtype == torch.float64 else np.float64


class Softmax:
    "The truth by eps and reduction, for classes in axis 1."
    def __init__(self, x, y, weight=None):
        dtype, k, x = wider(x), x.shape[1], wide(x, wider(x))
        sums = lambda v: v.sum(1, keepdims=True)
        best = np.expand_dims(x.argmax(1), 1)
        z = x - np.take_along_axis(x, best, 1)
        self.p = np.exp(z)
        np.put_along_axis(self.p, best, 0, 1)  # and log1p of the rest: the loss of a certain row is as exact as any other's
        rest = sums(self.p)
        np.put_along_axis(self.p, best, 1, 1)
        self.p /= 1 + rest
        self.lse, self.n = np.log1p(rest), x.size // k
        w = np.ones(k, dtype) if weight is None else wide(weight, dtype)
        self.u = w.reshape(k, *[1] * (x.ndim - 2)) / k
        if y.is_floating_point(): self.own = wide(y, dtype) * (self.u * k)
        else:
            own = w[y.numpy()]
            self.own, self.n = np.zeros_like(x), own.sum()
            np.put_along_axis(self.own, np.expand_dims(y.numpy(), 1), np.expand_dims(own, 1), 1)
        self.own_sum, self.own_dot, self.dot = sums(self.own), sums(self.own * z), sums(self.u * z)

    def __call__(self, eps, reduction='mean'):
        eps = self.p.dtype.type(eps)
        mass = (1 - eps) * self.own_sum + eps * self.u.sum()
        rows = mass * self.lse - (1 - eps) * self.own_dot - eps * self.dot
        t = (1 - eps) * self.own + eps * self.u
        return Truth.of(rows.squeeze(1), mass * self.p, t, mass.squeeze(1), reduction, self.n)


class Sigmoid:
    "The truth by eps and reduction."
    def __init__(self, x, y, weight=None, pos_weight=None):
        self.x, self.y, self.w, self.c = (1 if v is None else wide(v, wider(x)) for v in (x, y, weight, pos_weight))
        self.costs = np.logaddexp(0, -self.x), np.logaddexp(0, self.x)
        self.p = [np.exp(-cost) for cost in self.costs]

    def __call__(self, eps, reduction='mean'):
        eps = self.x.dtype.type(eps)
        yes, no = self.w * self.c * ((1 - 2 * eps) * self.y + eps), self.w * ((1 - 2 * eps) * (1 - self.y) + eps)
        rows = yes * self.costs[0] + no * self.costs[1]
        return Truth.of(rows, no * self.p[0], yes * self.p[1], 0 * rows, reduction, rows.size)


# ---------------------------------------------------------------- adversarial rows

KINDS = {
    'normal': lambda o: o.r, 'normal, 100': lambda o: 100 * o.r, 'huge': lambda o: (o.big / 3 * o.r).clamp(-o.big, o.big),
    'equal': lambda o: 0 * o.r, 'equal, big': lambda o: 0 * o.r + o.big, 'equal, -big': lambda o: 0 * o.r - o.big,
    'right': lambda o: torch.where(o.own, o.big, -o.big), 'right, by 17': lambda o: 17 * o.own,
    'right, far': lambda o: torch.where(o.own, o.big, .997 * o.big), 'wrong': lambda o: torch.where(o.next, o.big, -o.big),
    'torn': lambda o: torch.where(o.own | o.next, o.big, o.r), 'far': lambda o: o.big - 10 + o.r,
    'ramp': lambda o: o.ramp.expand(o.r.shape), 'by turns': lambda o: torch.where(o.at % 2 == 0, o.big, -o.big).expand(o.r.shape),
    'mixed': lambda o: torch.stack([KINDS[list(KINDS)[i % (len(KINDS) - 1)]](o)[i] for i in range(len(o.r))])}
SIZES = (5, 1), (5, 2), (7, 10), (30, 101), (50, 1000), (1, 20000), (1, 200000)
MANY = (530, 1000), (3, 200000)  # more than kernels/softmax.py takes at once


def big(dtype): return 6e4 if dtype == torch.float16 else 1e4


def rows(kind, n, k, dtype, seed=0):
    "Logits (n,k), and class indices."
    g = torch.Generator().manual_seed(seed)
    y, r, at = torch.randint(0, k, (n, 1), generator=g), torch.randn(n, k, generator=g).double(), torch.arange(k)
    o = SimpleNamespace(r=r, at=at, big=big(dtype), own=at == y, next=at == (y + 1) % k, ramp=torch.linspace(-1, 1, k) * big(dtype))
    return KINDS[kind](o).to(dtype).clone(), y[:, 0]


def dyadic(*shape, seed=0): return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed)) / 32  # in any dtype


# ---------------------------------------------------------------- the comparison

def excess(ours, theirs, truth, dtype, off=0., **about):
    "Where ours is worse, in words: a list of none to two."
    errors, best = truth.errors(*ours), np.min([truth.errors(*t) for t in theirs], 0)
    return [f'{what} {about}: {error:.3g}, PyTorch {other:.3g}, slack {slack:.3g}'
            for what, error, other, slack in zip(('loss', 'gradient'), errors, best, truth.slack(dtype, off))
            if not error <= min(other + slack, sys.float_info.max)]


def in_dtype(dtype, *values): return [v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def compare(x, y, kind, all_eps=EPS, ours=partial(loss_and_grad, smooth_cross_entropy), weight=None, reduction='mean'):
    "`excess` for each eps. The classes are in axis 1."
    acc, truth, found = torch.promote_types(x.dtype, torch.float32), Softmax(x, y, weight), []
    # Exponentials are added in lanes (one alone for classes that lie apart); one that holds a 1 loses all that is less than 6e-8
    off = (torch.softmax(x.to(acc), 1).double().sum(1) - 1).abs().max().item()
    for eps in all_eps:
        theirs = []
        for dtype in {x.dtype, acc}:
            a, b, w = in_dtype(dtype, x, y, weight)
            theirs.append(loss_and_grad(F.cross_entropy, a, b, weight=w, label_smoothing=eps, reduction=reduction))
        actual = ours(x, y, eps, weight=weight, reduction=reduction)
        found += excess(actual, theirs, truth(eps, reduction), x.dtype, off, kind=kind, eps=eps)
    return found


def compare_binary(x, y, kind, all_eps=HALF_EPS, reduction='mean', **weights):
    """The same of the sigmoid head. PyTorch's try in half precision counts where each row does: it loses whole digits, whose mean
    may come out right by chance."""
    acc, truth, found = torch.promote_types(x.dtype, torch.float32), Sigmoid(x, y, **weights), []
    for eps in all_eps:
        theirs = [loss_and_grad(F.binary_cross_entropy_with_logits, x.to(d), (1 - 2 * eps) * y.to(d) + eps, reduction=reduction, **weights)
                  for d in ({x.dtype, acc} if reduction == 'none' else {acc})]
        actual = loss_and_grad(smooth_bce, x, y, eps, reduction=reduction, **weights)
        found += excess(actual, theirs, truth(eps, reduction), x.dtype, kind=kind, eps=eps)
    return found


# ---------------------------------------------------------------- the softmax head

@pytest.mark.parametrize('size,dtype', [(s, d) for d in DTYPES for s in SIZES] + [(s, torch.float32) for s in MANY], ids=str)
def test_softmax(size, dtype):
    found = []
    for kind in KINDS: found += compare(*rows(kind, *size, dtype), kind)
    assert not found, '\n'.join(found)


@extended
@pytest.mark.parametrize('size', [(5, 2), (20, 101), (3, 7000)], ids=str)
def test_softmax_in_float64(size):
    found = []
    for kind in KINDS: found += compare(*rows(kind, *size, torch.float64), kind)
    assert not found, '\n'.join(found)


def classes_last(x, y, eps, **options):
    if y.is_floating_point(): y = y.movedim(1, -1)
    loss, grad = loss_and_grad(smooth_cross_entropy, x.movedim(1, -1).contiguous(), y, eps, axis=-1, **options)
    return loss, grad.movedim(-1, 1)


def learned_targets(x, y, eps, **options): return loss_and_grad(smooth_cross_entropy, x, y.clone().requires_grad_(), eps, **options)


def uniform_prior(x, y, eps, **options):
    k = x.shape[1]
    return loss_and_grad(smooth_cross_entropy, x, y, eps, prior=torch.full((k,), 1 / k), **options)


def second_grad(x, y, eps, create_graph=False, **options):
    leaf = x.clone().requires_grad_()
    loss = smooth_cross_entropy(leaf, y, eps, **options)
    for _ in range(2): grad, = torch.autograd.grad(loss, leaf, torch.ones_like(loss), retain_graph=True, create_graph=create_graph)
    return loss.detach(), grad.detach()


OTHERWISE = {
    'none': {}, 'sum': {}, 'weight': {}, 'weight none': {}, 'prior': dict(ours=uniform_prior),
    'soft': {}, 'soft none': {}, 'soft weight': {}, 'soft, learned none': dict(ours=learned_targets),
    'images': {}, 'images none': {}, 'images soft': {}, 'channels_last': {}, 'transposed': {}, 'sliced': {}, 'sliced soft': {},
    'images, classes last': dict(ours=classes_last), 'images soft, classes last': dict(ours=classes_last),
    'second': dict(ours=second_grad), 'create_graph': dict(ours=partial(second_grad, create_graph=True))}


@pytest.mark.parametrize('size,dtype', [*((s, torch.float32) for s in ('few', 'some')), ('some', torch.float16)], ids=str)
@pytest.mark.parametrize('how', OTHERWISE)
def test_softmax_otherwise(how, size, dtype, monkeypatch):
    "other reductions, targets, layouts and ways to the gradient, each in the two ways that there are for so many logits"
    if size != 'few': monkeypatch.setattr(softmax, 'FEW', 0)
    n, k, found = 15 if size == 'few' else 60, 700, []
    for kind in KINDS:
        x, y = rows(kind, n, k, dtype)
        options = dict(OTHERWISE[how], reduction=how.split()[-1] if how.split()[-1] in REDUCTIONS else 'mean')
        if 'weight' in how: options['weight'] = dyadic(k)
        if 'soft' in how:  # every other one-hot: a loss may be small
            part = .25 * (torch.arange(n) % 2)[:, None]
            y = ((1 - part) * F.one_hot(y, k) + part * F.one_hot((y + 1) % k, k)).to(dtype)
        if 'images' in how or how == 'channels_last':
            x, y = (v.view(n // 15, 3, 5, *v.shape[1:]) for v in (x, y))
            if 'soft' in how: y = y.movedim(-1, 1)
            x = x.movedim(-1, 1) if how == 'channels_last' else x.movedim(-1, 1).contiguous()
        if how == 'transposed': x = x.T.contiguous().T
        if 'sliced' in how: x = torch.stack([x, x], -1)[..., 0]
        found += compare(x, y, kind, (1e-8, 1e-4, .1), **options)
    assert not found, '\n'.join(found)


@pytest.mark.parametrize('turned', [False, True])
def test_many_classes_apart(turned):
    "classes not next to each other: PyTorch copies them if the logits are not contiguous, else it adds their exponentials one by one"
    found = []
    for kind in KINDS:
        x, y = rows(kind, 3, 20000, torch.float32)
        x = x.T.contiguous()
        found += compare(*(x.T, y) if turned else (x[None], y[None]), kind, (1e-8, .1))
    assert not found, '\n'.join(found)


def test_softmax_in_blocks(monkeypatch):
    monkeypatch.setattr(softmax, 'CHUNK_MB', 1)
    found = []
    for kind in ('normal', 'right, far', 'mixed'): found += compare(*rows(kind, *MANY[0], torch.float32), kind)
    assert not found, '\n'.join(found)


@few
@given(k=st.integers(1, 40) | st.sampled_from([200, 5000]), kinds=st.lists(st.sampled_from(list(KINDS)[:-1]), min_size=1, max_size=6),
       eps=st.sampled_from(EPS) | st.floats(0, 1), dtype=st.sampled_from(DTYPES), reduction=st.sampled_from(REDUCTIONS),
       weighted=st.booleans(), layout=st.sampled_from(['rows', 'image', 'transposed']), seed=st.integers(0, 2**20))
def test_mixtures(k, kinds, eps, dtype, reduction, weighted, layout, seed):
    "rows of several kinds in one batch, or the pixels of one image, and any eps"
    x, y = map(torch.cat, zip(*(rows(kind, 1, k, dtype, seed + i) for i, kind in enumerate(kinds))))
    if layout == 'image': x, y = x.T.contiguous()[None], y[None]
    if layout == 'transposed': x = x.T.contiguous().T
    found = compare(x, y, kinds, [eps], weight=dyadic(k, seed=seed) if weighted else None, reduction=reduction)
    assert not found, '\n'.join(found)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_one_class(reduction, dtype):
    "the loss is 0 and so is the gradient, as PyTorch's are, whatever eps"
    x, y = torch.tensor([[0.], [1e4], [-3.]]).to(dtype), torch.zeros(3).long()
    wrong = [eps for eps in EPS if any(v.count_nonzero() for v in loss_and_grad(smooth_cross_entropy, x, y, eps, reduction=reduction))]
    assert not wrong, wrong


@pytest.mark.parametrize('kind,size,reduction', [('normal', (3, 20000), 'mean'), ('wrong', (5, 2), 'mean'), ('ramp', (30, 101), 'sum'),
                                                 ('huge', (5, 1000), 'none')])
def test_where_pytorch_overflows(kind, size, reduction):
    "float16, where the sum of exponentials, or the loss, is more than it holds: right to float32's digits"
    x, y = rows(kind, *size, torch.float16)
    assert not F.cross_entropy(x, y, label_smoothing=.1, reduction=reduction).isfinite().all()
    errors = Softmax(x, y)(.1, reduction).errors(*loss_and_grad(smooth_cross_entropy, x, y, .1, reduction=reduction))
    assert errors[0] < 4e-7 and errors[1] < 6e-4, errors


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('eps', [0., 1e-30, .1, 1.])
@pytest.mark.parametrize('size', [(5, 10), (40, 600)], ids=str)
def test_infinitely_certain(size, eps, dtype):
    """A row with a logit of inf is nan, as PyTorch has it; one whose other classes are all masked (-inf) has no loss, where PyTorch
    has inf; and the rows beside them are right."""
    x, y = rows('normal', *size, dtype)
    x[0, 3], x[1] = math.inf, -math.inf
    x[1, y[1]] = 5.
    loss, grad = loss_and_grad(smooth_cross_entropy, x, y, eps, reduction='none')
    assert loss[0].isnan() and F.cross_entropy(x[:1].float(), y[:1], label_smoothing=eps).isnan()
    assert loss[1] == 0 and (grad[1] == 0).all()
    expected, expected_grad = softmax_reference(x[1:], y[1:], eps, reduction='none')
    assert distance(loss[1:], expected) < 4e-7 and distance(smooth_cross_entropy(x[1:], y[1:], eps), expected.mean()) < 4e-7
    assert distance(grad[1:], expected_grad) < .6 * torch.finfo(dtype).eps + 4e-7


# ---------------------------------------------------------------- the sigmoid head

BINARY = {
    'normal': lambda o: o.r, 'normal, 100': lambda o: 100 * o.r, 'huge': lambda o: (o.big / 3 * o.r).clamp(-o.big, o.big),
    'zero': lambda o: 0 * o.r, 'tiny': lambda o: 1e-8 * o.r, 'big': lambda o: 0 * o.r + o.big, '-big': lambda o: 0 * o.r - o.big,
    'right': lambda o: o.big * o.sign, 'right, by 17': lambda o: (17 + o.r) * o.sign, 'wrong': lambda o: -o.big * o.sign,
    'ramp': lambda o: torch.linspace(-120, 120, o.r.numel()).view(o.r.shape), 'far': lambda o: o.big - 10 + o.r,
    'mixed': lambda o: torch.stack([BINARY[list(BINARY)[i % (len(BINARY) - 1)]](o)[i] for i in range(len(o.r))])}


def binary_rows(kind, n, k, dtype, seed=0):
    "Logits and labels (n,k)."
    g = torch.Generator().manual_seed(seed)
    y, r = torch.randint(0, 2, (n, k), generator=g), torch.randn(n, k, generator=g).double()
    return BINARY[kind](SimpleNamespace(r=r, sign=2 * y - 1, big=big(dtype))).to(dtype), y


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('size', [(1, 1), (13, 5), (1, 20000), (2, 200000)], ids=str)
def test_sigmoid(size, dtype):
    found = []
    for kind in BINARY: found += compare_binary(*binary_rows(kind, *size, dtype), kind, HALF_EPS if size[1] < 200000 else (5e-9, .01, .5))
    assert not found, '\n'.join(found)


@extended
@pytest.mark.parametrize('size', [(1, 1), (13, 5), (1, 20000)], ids=str)
def test_sigmoid_in_float64(size):
    found = []
    for kind in BINARY: found += compare_binary(*binary_rows(kind, *size, torch.float64), kind)
    assert not found, '\n'.join(found)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('size', [(15, 7), (60, 500)], ids=str)
@pytest.mark.parametrize('how', ['none', 'sum', 'weight', 'pos_weight', 'both weights none', 'soft', 'bool', 'transposed'])
def test_sigmoid_otherwise(how, size, dtype):
    found = []
    for kind in BINARY:
        x, y = binary_rows(kind, *size, dtype)
        options = {name: dyadic(*size[1:]) for name in ('weight', 'pos_weight') if how in (name, 'both weights none')}
        if how == 'soft': y = torch.arange(y.numel()).view(y.shape) % 9 / 8
        if how == 'bool': y = y.bool()
        if how == 'transposed': x = x.T.contiguous().T
        reduction = how.split()[-1] if how.split()[-1] in REDUCTIONS else 'mean'
        found += compare_binary(x, y, kind, (5e-9, 5e-5, .01, .05, .45), reduction, **options)
    assert not found, '\n'.join(found)


@few
@given(n=st.integers(1, 40), k=st.sampled_from([1, 2, 7, 600]), kinds=st.lists(st.sampled_from(list(BINARY)[:-1]), min_size=1, max_size=6),
       eps=st.sampled_from(HALF_EPS) | st.floats(0, .5), dtype=st.sampled_from(DTYPES), reduction=st.sampled_from(REDUCTIONS),
       weighted=st.booleans(), seed=st.integers(0, 2**20))
def test_sigmoid_mixtures(n, k, kinds, eps, dtype, reduction, weighted, seed):
    x, y = map(torch.cat, zip(*(binary_rows(kind, n, k, dtype, seed + i) for i, kind in enumerate(kinds))))
    weights = dict(weight=dyadic(k, seed=seed), pos_weight=dyadic(k, seed=seed + 1)) if weighted else {}
    found = compare_binary(x, y, kinds, [eps], reduction, **weights)
    assert not found, '\n'.join(found)


# ---------------------------------------------------------------- the truth itself

@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_truth(reduction):
    "is that of the slow reference, and by hand where that one has lost all digits"
    soft, weight = torch.randn(12, 6).softmax(1), torch.rand(6)
    for kind, eps in [('normal', .1), ('normal, 100', .9), ('torn', 0.)]:
        x, y = rows(kind, 12, 6, torch.float32)
        image = [v.view(3, 4, 6).movedim(-1, 1) for v in (x, soft)]
        for a, b, w in [(x, y, None), (x, y, weight), (x, soft, weight), (image[0], y.view(3, 4), weight), (*image, weight)]:
            truth, expected = Softmax(a, b, w)(eps, reduction), softmax_reference(a, b, eps, weight=w, reduction=reduction)
            assert max(map(distance, truth[:2], expected)) < 1e-12
        for b in (soft > .2, soft):
            truth = Sigmoid(x, b, weight, weight + 1)(eps / 2, reduction)
            expected = sigmoid_reference(x, b, eps / 2, weight=weight, pos_weight=weight + 1, reduction=reduction)
            assert max(map(distance, truth[:2], expected)) < 1e-12
    truth = Softmax(torch.tensor([[1e4, 1e4 - 40]]), torch.tensor([0]))(0., reduction)
    assert abs(truth.loss / math.log1p(math.exp(-40)) - 1).max() < 1e-12
