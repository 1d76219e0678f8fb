"What is wrong is said by name and value, before anything is computed."
from itertools import product
import math, re, subprocess, sys

import pytest, torch
import torch.nn.functional as F

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy, smooth_targets
from fastai_smooth.losses import LabelSmoothingBCEWithLogits, LabelSmoothingCrossEntropy
from reference import REDUCTIONS, distance, loss_and_grad

INF = math.inf


def rows(n, k, dtype=torch.float64): return torch.randn(n, k, dtype=dtype), torch.randint(0, k, (n,))


def torch_bce(input, target, eps=.05, prior=.5, **options):
    q = (1 - 2 * eps) * target.to(input.dtype) + 2 * eps * prior
    return F.binary_cross_entropy_with_logits(input, q, **options)


# ---------------------------------------------------------------- softmax

@pytest.mark.parametrize('eps', [-.25, 1.25, math.nan, INF])
def test_eps_out_of_range(eps):
    x, y = rows(2, 3)
    with pytest.raises(ValueError, match=str(eps)): smooth_cross_entropy(x, y, eps)


@pytest.mark.parametrize('value', [-.25, 1.25, math.nan])
def test_per_class_eps_out_of_range(value):
    x, y = rows(2, 3)
    with pytest.raises(ValueError, match=str(value)): smooth_cross_entropy(x, y, torch.tensor([.1, value, .2]))


def test_per_class_eps_of_a_wrong_shape():
    x, y = rows(2, 3)
    with pytest.raises(ValueError, match='5'): smooth_cross_entropy(x, y, torch.full((5,), .1))


@pytest.mark.parametrize('index,ndim', product([77, -7], [2, 3]))
def test_class_index_out_of_range(index, ndim):
    "IndexError naming the index, the row and K"
    x, y = torch.randn(50, 36), torch.zeros(50).long()
    y[42] = index
    if ndim == 3: x, y = x.view(50, 36, 1), y.view(50, 1)
    with pytest.raises(IndexError) as e: smooth_cross_entropy(x, y, .1)
    numbers = re.findall(r'-?\d+', str(e.value))
    assert {str(index), '42', '36'} <= set(numbers), e.value


def test_class_index_out_of_range_is_not_ignored():
    "the default ignore_index is an index like any other when another one is asked for"
    x = torch.randn(2, 3)
    with pytest.raises(IndexError, match='-100'): smooth_cross_entropy(x, torch.tensor([0, -100]), .1, ignore_index=255)
    with pytest.raises(IndexError, match='255'): smooth_cross_entropy(x, torch.tensor([0, 255]), .1)


@pytest.mark.parametrize('name,value,came', [
    ('prior', torch.full((5,), .2), '5'), ('prior', torch.full((5, 3), 1 / 3), '5'),
    ('prior', torch.full((3, 5), .2), '5'),
    ('weight', torch.ones(5), '5'), ('weight', torch.ones(1, 3, 5), '5')])
def test_prior_weight_shapes(name, value, came):
    "ValueError naming what was expected (K=3) and what came"
    x, y = rows(2, 3)
    with pytest.raises(ValueError) as e: smooth_cross_entropy(x, y, .1, **{name: value})
    assert name in str(e.value) and '3' in str(e.value) and came in str(e.value)


@pytest.mark.parametrize('name,value,came', [
    ('weight', [1., -2.5, 1.], '-2.5'), ('prior', [.5, .75, -.25], '-0.25'), ('prior', [.5, .5, .5], '1.5'),
    ('prior', [[1., 0., 0.], [0., 1., 0.], [.5, .5, .5]], '1.5'),
    ('prior', [[1., 0., 0.], [0., 1., 0.], [.5, .75, -.25]], '-0.25')])
def test_prior_weight_values(name, value, came):
    "negative ones, and priors that don't sum to 1: looked at where a module is built, not in each call"
    with pytest.raises(ValueError) as e: LabelSmoothingCrossEntropy(.1, **{name: torch.tensor(value)})
    assert name in str(e.value) and came in str(e.value)


def test_soft_rows_that_do_not_sum_to_1():
    "multi-hot ones: the error names what is for them. As index targets of images: whatever the axis"
    for shape, axis in (((4, 3), 1), ((2, 3, 5), 1), ((2, 5, 3), -1), ((3,), 1)):
        y = torch.full(shape, .5 if len(shape) == 2 else 1.)
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ValueError, match='soft targets must sum to 1 along axis .* at row .*: use multi_hot=True .*LabelSmoothingBCEWithLogitsFlat'):
                smooth_cross_entropy(torch.randn(shape), y.to(dtype), .1, axis=axis)
        smooth_cross_entropy(torch.randn(shape), y, .1, axis=axis, multi_hot=True)
    half = torch.randn(4, 1000).softmax(1)
    for dtype in (torch.float16, torch.bfloat16): smooth_cross_entropy(torch.randn(4, 1000), half.to(dtype))
    smooth_cross_entropy(torch.randn(0, 3), torch.zeros(0, 3))
    smooth_cross_entropy(torch.randn(2, 3, device='meta'), torch.ones(2, 3, device='meta'))  # no values
    with pytest.raises(ValueError, match='sum to 1'): smooth_cross_entropy(torch.randn(2, 2), torch.ones(2, 2, requires_grad=True))


def test_scalar_eps_that_needs_a_gradient():
    "would get none: refused. A value a class gets one"
    eps, x, y = torch.tensor(.1, requires_grad=True), *rows(6, 3)
    with pytest.raises(ValueError, match=r'no gradient: pass eps.detach\(\), or to learn it eps.expand\(3\)'): smooth_cross_entropy(x, y, eps)
    with pytest.raises(ValueError, match=r'or to learn it eps.expand\(K\)'): LabelSmoothingCrossEntropy(eps)
    with pytest.raises(ValueError, match=r'no gradient'): smooth_bce(x, x > 0, eps)
    with pytest.raises(ValueError, match=r'no gradient'): torch.func.grad(lambda e: smooth_cross_entropy(x, y, e))(eps.detach())
    grad, = torch.autograd.grad(smooth_cross_entropy(x, y, eps.expand(3)), eps)
    step = (smooth_cross_entropy(x.double(), y, .11) - smooth_cross_entropy(x.double(), y, .09)) / .02
    assert abs(grad.item() - step.item()) < 1e-5
    assert distance(smooth_cross_entropy(x, y, eps.detach()), smooth_cross_entropy(x, y, eps.item())) < 1e-12


def test_axis_of_a_single_row():
    "(K,) logits have one axis; 1, the default, is taken for it, and no other"
    x, y = torch.randn(3), torch.tensor(1)
    for axis in (0, 1, -1): assert torch.equal(smooth_cross_entropy(x, y, axis=axis), smooth_cross_entropy(x[None], y[None]))
    for axis in (7, 2, -2):
        with pytest.raises(IndexError, match=f'axis {axis} is out of range'): smooth_cross_entropy(x, y, axis=axis)


def test_integer_targets_shaped_like_the_input():
    "multi-hot labels without multi_hot=True: ValueError that points to the sigmoid loss"
    x = torch.randn(4, 3)
    for dtype in (torch.int64, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match='(?i)bce|binary_cross_entropy'):
            smooth_cross_entropy(x, torch.ones(4, 3).to(dtype), .1)


@pytest.mark.parametrize('target', [torch.zeros(5).long(), torch.zeros(2, 3).long(), torch.rand(4, 2), torch.rand(4),
                                    torch.tensor(0)])
def test_target_of_a_wrong_shape(target):
    with pytest.raises(ValueError, match=r'\d'): smooth_cross_entropy(torch.randn(4, 3), target, .1)


@pytest.mark.parametrize('name,value', [('spread', 'uniform'), ('reduction', 'average'), ('backend', 'fpga')])
def test_unknown_option(name, value):
    x, y = rows(2, 3)
    with pytest.raises(ValueError, match=value): smooth_cross_entropy(x, y, .1, **{name: value})


PRIOR = torch.tensor([.5, .3, .2])


@pytest.mark.parametrize('dense,options', [(False, dict(spread='others', prior=PRIOR)),
                                           (False, dict(spread='others', prior=torch.eye(3))),
                                           (True, dict(multi_hot=True, prior=PRIOR)),
                                           (True, dict(multi_hot=True, prior=torch.eye(3))),
                                           (True, dict(eps=PRIOR))])
def test_combinations_not_in_the_table(dense, options):
    x, y = torch.randn(2, 3), torch.tensor([[1., 0., 0.], [0., 1., 0.]]) if dense else torch.tensor([0, 1])
    with pytest.raises(ValueError): smooth_cross_entropy(x, y, **options)


# ---------------------------------------------------------------- class weights that flip the optimum

FLIP = """
import torch
from fastai_smooth.losses import LabelSmoothingCrossEntropy
for _ in range(3): LabelSmoothingCrossEntropy({eps}, weight=torch.tensor([1., {weight}]))
"""


@pytest.mark.parametrize('eps,weight,times', [(.1, 18.9, 0), (.1, 19.1, 1), (.5, 2.9, 0), (.5, 3.1, 1), (0., 1e6, 0)])
def test_weights_past_the_flip_warn(eps, weight, times):
    "K=2: the ratio is 19 at eps .1, 3 at .5; once however often such a loss is built, nothing below the ratio"
    code = FLIP.format(eps=eps, weight=weight)
    ended = subprocess.run([sys.executable, '-W', 'always', '-c', code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    warned = [line for line in ended.stderr.splitlines() if 'Warning' in line and 'weight' in line]
    assert len(warned) == times, ended.stderr


def test_weights_past_the_flip_move_the_argmax():
    "what the warning is about: just past the ratio the best logits no longer choose the label"
    for ratio, label_wins in ((18., True), (20., False)):
        w, q = torch.tensor([1., ratio]).double(), smooth_targets(torch.tensor([0]), 2, .1).double()[0]
        best = (w * q).log()[None]                              # argmin of the loss: softmax = t / sum(t)
        _, grad = loss_and_grad(smooth_cross_entropy, best, torch.tensor([0]), .1, weight=w)
        assert grad.abs().max() < 1e-6 and (best.argmax() == 0) == label_wins


# ---------------------------------------------------------------- sigmoid

@pytest.mark.parametrize('eps', [-.25, .625, math.nan])
def test_sigmoid_eps_out_of_range(eps):
    with pytest.raises(ValueError, match=str(eps)): smooth_bce(torch.randn(2, 3), torch.ones(2, 3), eps)


def test_sigmoid_integer_targets_shaped_like_indices():
    "class indices: ValueError that points to the softmax loss"
    x, y = torch.randn(2, 3), torch.tensor([0, 2])
    image, mask = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4).long()
    for input, target in ((x, y), (x, y.to(torch.uint8)), (image, mask)):
        with pytest.raises(ValueError, match='smooth_cross_entropy|LabelSmoothingCrossEntropy'):
            smooth_bce(input, target)


def test_sigmoid_target_of_a_wrong_shape():
    for y in (torch.rand(2, 4), torch.rand(3), torch.rand(2, 1)):
        with pytest.raises(ValueError, match=r'\d'): smooth_bce(torch.randn(2, 3), y)


@pytest.mark.parametrize('name', ['prior', 'weight', 'pos_weight'])
def test_sigmoid_prior_weight_shapes(name):
    "ValueError naming what was expected and what came"
    for shape, axis in (((2, 3, 5, 5), None), ((2, 5, 3), -1)):
        with pytest.raises(ValueError, match='3'): smooth_bce(torch.zeros(shape), torch.ones(shape), prior=torch.full((5,), .5), axis=axis)
    with pytest.raises(ValueError, match=r'\(1,\) for \(2, 4, 5\) \(one label; axis= says where there are several\), got \(5,\)'):
        smooth_bce(torch.zeros(2, 4, 5), torch.ones(2, 4, 5), prior=torch.full((5,), .5))
    for axis in (2, -3, 7):
        with pytest.raises(IndexError, match=f'axis {axis} is out of range'): smooth_bce(torch.zeros(2, 3), torch.ones(2, 3), axis=axis)
    with pytest.raises(ValueError) as e: smooth_bce(torch.randn(2, 3), torch.ones(2, 3), **{name: torch.full((5,), .5)})
    assert name in str(e.value) and '3' in str(e.value) and '5' in str(e.value)


@pytest.mark.parametrize('name,value,came', [('prior', [.5, 1.5, .5], '1.5'), ('prior', [.5, -.25, .5], '-0.25'),
                                             ('weight', [1., -2.5, 1.], '-2.5')])
def test_sigmoid_prior_weight_values(name, value, came):
    "are looked at where a module is built; a call does not pay for it, and weighs by what it gets, as PyTorch does"
    with pytest.raises(ValueError) as e: LabelSmoothingBCEWithLogits(**{name: torch.tensor(value)})
    assert name in str(e.value) and came in str(e.value)
    x, y, value = torch.randn(4, 3).double(), (torch.rand(4, 3) < .5).double(), torch.tensor(value).double()
    assert max(map(distance, loss_and_grad(smooth_bce, x, y, .1, **{name: value}), loss_and_grad(torch_bce, x, y, .1, **{name: value}))) < 1e-6


@pytest.mark.parametrize('name,value', [('reduction', 'average'), ('backend', 'fpga')])
def test_sigmoid_unknown_option(name, value):
    with pytest.raises(ValueError, match=value): smooth_bce(torch.randn(2, 3), torch.ones(2, 3), **{name: value})


def test_a_prior_of_integers_sums_to_1():
    assert smooth_targets(torch.tensor([0]), 2, .5, prior=torch.tensor([0, 1])).tolist() == [[.5, .5]]
    with pytest.raises(ValueError, match='sum to 1, got 2'): smooth_targets(torch.tensor([0]), 2, prior=torch.tensor([1, 1]))


def test_a_row_of_a_class_conditional_prior_sums_to_1():
    with pytest.raises(ValueError, match='^every row of prior must sum to 1, got 2'): smooth_targets(torch.tensor([0]), 2, prior=torch.tensor([[.5, .5], [1, 1]]))


# ---------------------------------------------------------------- whatever else comes

@pytest.mark.parametrize('rows', [4, 100_000])
@pytest.mark.parametrize('loss_func', [smooth_cross_entropy, smooth_bce])
def test_what_pytorch_would_refuse_in_other_words(loss_func, rows):
    "few logits may go to PyTorch, but errors are ours, of whatever size"
    x, y = torch.randn(rows, 3), torch.full((rows, 3), 1 / 3)
    for reduction in ('average', None, ['mean'], 1):
        with pytest.raises(ValueError, match=r"reduction must be one of \('mean', 'sum', 'none'\), got "): loss_func(x, y, reduction=reduction)
    with pytest.raises(TypeError, match='target must be a dense tensor, got torch.sparse_coo'): loss_func(x, y.to_sparse())
    with pytest.raises((TypeError, ValueError), match='target must be of real numbers, got torch.complex64|complex64 targets shaped like input'): loss_func(x, y.to(torch.complex64))
    with pytest.raises(ValueError, match='target is on meta, input on cpu'): loss_func(x, y.to('meta'))
    for name in ('weight', 'pos_weight', 'prior') if loss_func is smooth_bce else ('weight', 'prior'):
        with pytest.raises(ValueError, match=f'{name} is on meta, where it has no values'): loss_func(x, y, **{name: torch.ones(3, device='meta')})
        with pytest.raises(TypeError, match=f'{name} must be a dense tensor, got torch.sparse_coo'): loss_func(x, y, **{name: torch.ones(3).to_sparse()})
        with pytest.raises(TypeError, match=f'{name} must be a tensor, got list'): loss_func(x, y, **{name: [1., 1., 1.]})
        with pytest.raises(TypeError, match=f'{name} must be of real numbers'): loss_func(x, y, **{name: torch.ones(3, dtype=torch.complex64)})


@pytest.mark.parametrize('loss_func,name', [(smooth_cross_entropy, 'weight'), (smooth_cross_entropy, 'prior'), (smooth_bce, 'weight'), (smooth_bce, 'pos_weight'), (smooth_bce, 'prior')])
def test_options_of_other_dtypes(loss_func, name):
    "a float64 or integer weight or prior is taken in the logits' own, few or many"
    for rows in (4, 100_000):
        x, y = torch.randn(rows, 3), torch.full((rows, 3), 1 / 3)
        for v in (torch.tensor([1., 0, 0]), torch.tensor([0., 1, 0])):
            expected = loss_func(x, y, **{name: v})
            for dtype in (torch.float64, torch.int64): assert distance(loss_func(x, y, **{name: v.to(dtype)}), expected) < 1e-6
