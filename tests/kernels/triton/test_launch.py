"What the kernels of both heads share: the axes they go over, programs, early gradients; and the interpreter that the other tests rely on."
from itertools import product

import pytest, torch

from .device import DEVICE, ON_TRITON, cut, inputs, off
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from fastai_smooth.kernels.targets import coefficients
from fastai_smooth.kernels.triton import launch, rows, sigmoid, softmax
from fastai_smooth.kernels.triton.softmax import Tile
from reference import REDUCTIONS, distance, loss_and_grad, rounded_once

@pytest.mark.parametrize('shape,strides,outer,sizes', [
    ((64,), [(10,)], 64, (1, 1)), ((8, 4, 5), [(420, 5, 1)], 8, (1, 20)),                                       # (N,C) and (N,C,H,W)
    ((8, 4, 5), [(420, 105, 21)], 160, (1, 1)), ((8, 4, 5), [(840, 10, 1)], 8, (4, 5)),                         # channels_last; cut
    ((2, 3, 4), [(12, 4, 1), (12, 4, 1)], 24, (1, 1)), ((2, 3, 4), [(12, 4, 1), (0, 0, 1)], 6, (1, 4)),         # with a vector
    ((1, 3, 1), [(3, 1, 1)], 3, (1, 1)), ((), [()], 1, (1, 1))])
def test_coalesce(shape, strides, outer, sizes):
    "The fewest axes, by which the same places are gone over."
    axes = launch.coalesce(shape, *strides)
    assert (axes.outer, axes.sizes) == (outer, sizes) and launch.coalesce((2, 2, 2, 2), (81, 27, 9, 3)) is None
    places = lambda shape, strides: sorted(sum(i * s for i, s in zip(index, strides)) for index in product(*map(range, shape)))
    assert places((axes.outer, *axes.sizes), axes.strides[0]) == places(shape, strides[0])

@pytest.mark.parametrize('shape', [(0, 5), (0, 5, 3), (4, 5, 0)])
def test_no_rows(shape):
    x = torch.zeros(shape, device=DEVICE)
    for (f, y), reduction in product(((smooth_cross_entropy, torch.zeros(shape[:1] + shape[2:], dtype=torch.long, device=DEVICE)), (smooth_bce, x > 0)), REDUCTIONS):
        loss, grad = loss_and_grad(f, x, y, reduction=reduction, backend='triton')
        assert loss.shape == (y.shape if reduction == 'none' else ()) and grad.shape == shape and not loss.sum()

@pytest.mark.parametrize('head', ['softmax', 'sigmoid'])
def test_more_tiles_than_programs(head, cut, monkeypatch):
    "And the ticket that programs draw is zero again afterwards."
    cut(Tile(2, 16, 1, programs=1))
    monkeypatch.setattr(launch, 'multiprocessors', lambda device: 3), monkeypatch.setattr(sigmoid, 'PROGRAMS', 1)
    for reduction in REDUCTIONS:
        x, y = inputs(23)
        assert off(x, y if head == 'softmax' else torch.rand(23, 10, device=DEVICE) < .4, .2, head=head, reduction=reduction) < 1e-10
    assert launch._tickets and all(t.item() == 0 for t in launch._tickets.values())

@pytest.mark.parametrize('f,tile', [(smooth_cross_entropy, Tile(2, 16, 1)), (smooth_cross_entropy, Tile(2, 4, 1)), (smooth_bce, None)])
def test_an_early_gradient_is_kept_or_made_anew(f, tile, cut):
    "Kept, untouched, where grad_output is 1; else rounded once, with that in."
    cut(tile, early=True)
    x, y = inputs(6, 10, torch.bfloat16)
    y = y if f is smooth_cross_entropy else x > 0
    x.requires_grad_()
    for by in (1., 3.):
        loss = f(x, y, .1, backend='triton')
        made = loss.grad_fn.grad
        first = made.clone()
        grad, = torch.autograd.grad(loss, x, torch.tensor(by, device=DEVICE))
        assert grad.data_ptr() == made.data_ptr() and torch.equal(grad, first) == (by == 1)
        assert rounded_once(grad, loss_and_grad(f, x.double(), y, .1, grad_output=by, backend='torch')[1])

def test_negated_views():
    "The imaginary part of a conjugate is a view that is to be read with the other sign."
    x, y = torch.randn(6, 4, dtype=torch.complex64, device=DEVICE).conj().imag, torch.randint(4, (6,), device=DEVICE)
    for f, target in ((smooth_cross_entropy, y), (smooth_cross_entropy, torch._neg_view(-x.softmax(1))), (smooth_bce, x > 0), (smooth_bce, x)):
        assert distance(f(x, target, backend='triton'), f(x.resolve_neg(), target.resolve_neg(), backend='torch')) < 1e-6

def test_own_and_each_are_computed_as_on_a_cpu():
    "By the very same function, which the interpreter calls as it is."
    assert getattr(rows.coefficients, 'fn', rows.coefficients) is coefficients

@pytest.mark.skipif(not ON_TRITON or not launch.INTERPRETED, reason='of the interpreter')
def test_out_of_bounds_is_noticed():
    "By the interpreter as on_triton.py sets it up: the other tests rely on it."
    y, denominator, partials, ticket = torch.zeros(8, dtype=torch.long), torch.zeros(()), torch.zeros(3), torch.zeros((), dtype=torch.int32)
    with pytest.raises(Exception, match='out of bounds'):
        softmax.denominator_kernel[(1,)](y[:4], None, denominator, partials, ticket, 8, 1, -100, CLASSES=3, BLOCK=16, ACC=launch.TYPES[torch.float32])
