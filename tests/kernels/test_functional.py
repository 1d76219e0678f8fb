"The public functions: what is imported and called for them, what goes in, and what comes out."
from collections import Counter
from itertools import product
import os, subprocess, sys

import pytest, torch
import torch.nn.functional as F

from fastai_smooth import kernels
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy, smooth_targets
from .cases import HOT, INDEX, S, SOFT, W, big_case, by_reduction, every_option, logits
from reference import REDUCTIONS, distance, loss_and_grad

pytestmark = pytest.mark.filterwarnings('ignore:.*weight')  # past the flip: test_checks.py has it


def test_kernels_import_torch_alone():
    "no fastai, no triton, nor anything else that torch has not brought along"
    code = ("import sys, torch; before = set(sys.modules); import fastai_smooth.kernels\n"
            "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
            "assert not new & {'fastai', 'fastcore', 'triton', 'torchvision', 'pandas', 'matplotlib', 'sklearn'}, new\n"
            "assert 'fastai' not in sys.modules and 'triton' not in sys.modules")
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_what_few_need_is_imported_when_used():
    "neither the sharded loss, nor Triton's kernels, nor DTensor, by an import or a loss on plain tensors"
    code = ("import sys, torch; from fastai_smooth.kernels import *\n"
            "for n, k in ((4, 3), (512, 1000)):\n"
            "    x = torch.randn(n, k, requires_grad=True)\n"
            "    smooth_cross_entropy(x, torch.zeros(n, dtype=torch.long)).backward()\n"
            "    smooth_binary_cross_entropy_with_logits(x, x > 0).backward()\n"
            "late = {'fastai_smooth.kernels.sharded', 'fastai_smooth.kernels.triton', 'triton', 'torch.distributed.tensor'}\n"
            "assert not late & set(sys.modules), late & set(sys.modules)")
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def calls_of(f):
    "The Python functions of the kernels that are called by `f()`, each as file:name"
    calls, folder = [], os.path.dirname(kernels.__file__)
    def note(frame, event, arg):
        if event == 'call' and frame.f_code.co_filename.startswith(folder): calls.append(f'{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}')
    f()  # what is cached once is not counted
    sys.setprofile(note)
    try: f()
    finally: sys.setprofile(None)
    return calls


@pytest.mark.parametrize('shape,loss_func,files,most', [((64, 10), smooth_cross_entropy, 4, 30), ((64, 10), smooth_bce, 4, 30),
                                                        ((1024, 1000), smooth_cross_entropy, 6, 60), ((1024, 1000), smooth_bce, 6, 120)])
def test_calls_are_few(shape, loss_func, files, most):
    "a loss and its backward: few files to read, and little Python beside the tensor ops, which for small batches would take longer than they do"
    x = torch.randn(shape, requires_grad=True)
    y = torch.randint(shape[1], shape[:1]) if loss_func is smooth_cross_entropy else (torch.rand(shape) < .1).float()
    calls = calls_of(lambda: loss_func(x, y).backward())
    assert 3 < len(calls) < most and len({c.split(':')[0] for c in calls}) <= files, (len(calls), Counter(calls))


def test_backend_torch():
    "backend='torch' by name is what 'auto' means on a CPU"
    x = logits()
    for loss_func, target in ((smooth_cross_entropy, INDEX), (smooth_bce, HOT)):
        assert torch.equal(loss_func(x, target, backend='torch'), loss_func(x, target, backend='auto'))


@every_option
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast(loss_func, target, options, dtype):
    "autocast lowers the model's matrix products, not the loss: the same numbers inside as outside"
    x = logits().to(dtype)
    expected = loss_and_grad(loss_func, x, target, **options)
    with torch.autocast('cpu', torch.bfloat16): actual = loss_and_grad(loss_func, x, target, **options)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    assert distance(actual[0], expected[0]) < 1e-6 and distance(actual[1], expected[1]) < 1e-6


@every_option
@by_reduction
def test_inputs_never_modified(loss_func, target, options, reduction):
    "nor anything of theirs written to, through forward, backward and double backward"
    x = logits().requires_grad_()
    tensors = [x, target, *(v for v in options.values() if isinstance(v, torch.Tensor))]
    before = [(t.detach().clone(), t._version) for t in tensors]
    loss = loss_func(x, target, reduction=reduction, **options)
    grad, = torch.autograd.grad(loss, x, torch.ones_like(loss), create_graph=True)
    torch.autograd.grad(grad.sum(), x, allow_unused=True)
    loss_func(x, target, reduction=reduction, **options).sum().backward()
    for t, (values, version) in zip(tensors, before):
        assert torch.equal(t, values) and t._version == version


def test_target_views_and_mixed_dtypes():
    "soft targets, weights and priors of another float dtype than the logits"
    x, y = torch.randn(4, 4), SOFT
    expected = F.cross_entropy(x.double(), SOFT, W, label_smoothing=.1)
    with_prior = smooth_cross_entropy(x.double(), INDEX, prior=S[0])
    for dtype in (torch.float32, torch.float64):
        assert distance(smooth_cross_entropy(x, y.to(dtype), .1, weight=W.to(dtype)), expected) < 1e-6
        assert distance(smooth_cross_entropy(x, INDEX, prior=S[0].to(dtype)), with_prior) < 1e-6


def test_tensor_base():
    "fastai's subclasses are accepted and unwrapped; the result is a plain Tensor, the gradient reaches the subclass"
    from fastai.torch_core import TensorBase, TensorCategory, TensorImage, TensorMultiCategory
    x = logits()
    cases = [(smooth_cross_entropy, INDEX, TensorCategory), (smooth_cross_entropy, SOFT, TensorBase),
             (smooth_bce, HOT.float(), TensorMultiCategory)]
    for (loss_func, target, kind), wrap in product(cases, (TensorBase, TensorImage)):
        expected = loss_and_grad(loss_func, x, target)
        leaf = x.clone().as_subclass(wrap).requires_grad_()     # wrap(x) would make it float32
        for reduction in REDUCTIONS:
            assert type(loss_func(leaf, target.as_subclass(kind), reduction=reduction)) is torch.Tensor
            assert type(loss_func(x, target.as_subclass(kind), reduction=reduction)) is torch.Tensor
        loss = loss_func(leaf, target.as_subclass(kind))
        loss.backward()
        assert max(map(distance, (loss, leaf.grad.as_subclass(torch.Tensor)), expected)) < 1e-12
    for name, value in (('weight', W), ('prior', S[0]), ('prior', S), ('eps', W / 2)):
        loss = smooth_cross_entropy(x, INDEX, **{name: value.as_subclass(TensorBase)})
        assert type(loss) is torch.Tensor and distance(loss, smooth_cross_entropy(x, INDEX, **{name: value})) < 1e-12
    for name, value in (('weight', W), ('prior', S[0]), ('pos_weight', W)):
        loss = smooth_bce(x, HOT, **{name: value.as_subclass(TensorBase)})
        assert type(loss) is torch.Tensor and distance(loss, smooth_bce(x, HOT, **{name: value})) < 1e-12
    assert distance(smooth_targets(INDEX.as_subclass(TensorCategory), 4), smooth_targets(INDEX, 4)) == 0


@pytest.mark.parametrize('shape', [(8, 4), (300, 1000)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_another_default_device(shape, dtype):
    "what is made here is made where the logits are"
    x, y = torch.randn(shape).to(dtype).requires_grad_(), torch.zeros(shape[0], dtype=torch.long)
    with torch.device('meta'):
        for loss in (smooth_cross_entropy(x, y), smooth_cross_entropy(x, y, weight=torch.ones(shape[1], device='cpu')), smooth_bce(x, (x > 0).to(torch.uint8))):
            assert loss.device.type == torch.autograd.grad(loss, x)[0].device.type == 'cpu'


@pytest.mark.parametrize('shape,axis', [((3, 5, 4, 2), 1), ((3, 5, 4, 2), -1), ((3, 5, 4, 2), 2), ((3, 5, 4, 2, 2), 1)])
def test_layout_numbers(shape, axis):
    "every stride order of the logits gives the same loss and gradient"
    x = logits(*shape)
    y = torch.randint(0, shape[axis], x.movedim(axis, -1).shape[:-1])
    expected = loss_and_grad(smooth_cross_entropy, x, y, axis=axis, reduction='none')
    for order in ([3, 0, 2, 1], [1, 2, 3, 0], [0, 2, 3, 1], [2, 1, 0, 3]):
        order = order + list(range(4, len(shape)))
        inverse = torch.tensor(order).argsort().tolist()
        strided = x.permute(order).contiguous().permute(inverse)
        actual = loss_and_grad(smooth_cross_entropy, strided, y, axis=axis, reduction='none')
        assert max(map(distance, actual, expected)) < 1e-12
    wide = x.expand(2, *shape).reshape(2, *shape)[0, ..., ::1]
    assert distance(smooth_cross_entropy(x[:1].expand(3, *shape[1:]), y[:1].expand(3, *y.shape[1:]), axis=axis),
                    smooth_cross_entropy(wide[:1], y[:1], axis=axis)) < 1e-12


def test_inputs_never_modified_when_masked_or_large():
    "the branches with chunks and masks too"
    for kind, option in (('wide', 'masked'), ('wide', 'index'), ('channels_last', 'index'), ('sliced', 'soft')):
        x, y, _ = big_case(kind, option)
        kept = x.clone(), y.clone()
        loss_and_grad(smooth_cross_entropy, x, y)
        with torch.no_grad(): smooth_cross_entropy(x, y)
        assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
