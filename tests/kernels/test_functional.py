"The public functions: what is imported and called for them, what goes in, and what comes out."
from collections import Counter
from functools import partial
from itertools import product
import os, subprocess, sys

import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastai_smooth import kernels
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy, smooth_targets
from fastai_smooth.kernels import smooth_linear_binary_cross_entropy_with_logits, smooth_linear_cross_entropy
from .cases import HOT, INDEX, ON_TRITON, S, SOFT, W, as_on_a_gpu, by_reduction, every_option, logits, way
from reference import REDUCTIONS, distance, loss_and_grad

pytestmark = pytest.mark.filterwarnings('ignore:.*weight')  # past the flip: test_checks.py has it

def test_what_is_imported():
    "Torch alone; and by a loss on plain tensors neither the sharded loss, nor Triton's kernels, nor DTensor."
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        from fastai_smooth.kernels import *
        assert not (set(sys.modules) - before) & {'fastai', 'fastcore', 'torchvision', 'pandas', 'matplotlib', 'sklearn', 'triton'}
        for n, k in ((4, 3), (512, 1000)):
            x = torch.randn(n, k, requires_grad=True)
            smooth_cross_entropy(x, torch.zeros(n, dtype=torch.long)).backward()
            smooth_binary_cross_entropy_with_logits(x, x > 0).backward()
        assert not set(sys.modules) & {'fastai_smooth.kernels.sharded', 'fastai_smooth.kernels.triton', 'triton', 'torch.distributed.tensor'}"""
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr

@pytest.mark.parametrize('loss_func,shape,most', [(smooth_cross_entropy, (64, 10), 30), (smooth_bce, (64, 10), 30),
                                                  (smooth_cross_entropy, (1024, 1000), 70), (smooth_bce, (1024, 1000), 130)])
def test_calls_are_few(loss_func, shape, most):
    "A loss and its backward call little Python beside the tensor ops, which for small batches would take longer than they do."
    x, calls = torch.randn(shape, requires_grad=True), Counter()
    y = torch.randint(shape[1], shape[:1]) if loss_func is smooth_cross_entropy else (torch.rand(shape) < .1).float()
    def note(frame, event, arg): calls.update([frame.f_code.co_name] * (event == 'call' and frame.f_code.co_filename.startswith(os.path.dirname(kernels.__file__))))
    for profile in (None, note):   # what is cached once is not counted
        sys.setprofile(profile)
        try: loss_func(x, y).backward()
        finally: sys.setprofile(None)
    assert 3 < calls.total() < most, calls

@every_option
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_and_backend(loss_func, target, options, dtype):
    "Autocast lowers the model's matrix products, not the loss: the same numbers inside as outside; as for backend='torch', which is 'auto'."
    x = logits().to(dtype)
    expected = loss_and_grad(loss_func, x, target, **options)
    with torch.autocast('cpu', torch.bfloat16): actual = loss_and_grad(loss_func, x, target, **options)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype and max(map(distance, actual, expected)) < 1e-6
    assert ON_TRITON or torch.equal(loss_func(x, target, backend='torch', **options), loss_func(x, target, backend='auto', **options))

of_torch = pytest.mark.skipif(ON_TRITON, reason='of the torch implementation')

@of_torch
@pytest.mark.parametrize('options', [{}, dict(weight=W, prior=S), dict(eps=W / 2), dict(spread='others')])
def test_an_index_out_of_range_is_nan_on_a_gpu(options, monkeypatch):
    "Where an error would have to wait for the values: loss and gradient of its row, and no other, whatever is ignored."
    as_on_a_gpu(monkeypatch)
    x, y, fine = logits(8, 4), torch.tensor([0, 4, 1, -1, -100, 2, 300, -99]), [0, 2, 4, 5]
    x[6:, ::3] = -torch.inf   # the first class, and the last: an index out of range is taken for neither
    loss, grad = loss_and_grad(smooth_cross_entropy, x, y, reduction='none', **options)
    assert loss.isnan().tolist() == grad.isnan().any(1).tolist() == [i not in fine for i in range(8)] and smooth_cross_entropy(x, y, **options).isnan()
    expected, truth = loss_and_grad(smooth_cross_entropy, x[fine], y[fine], reduction='none', **options)
    assert distance(loss[fine], expected) < 1e-12 and distance(grad[fine], truth) < 1e-12

LINEAR = {smooth_cross_entropy: smooth_linear_cross_entropy, smooth_bce: smooth_linear_binary_cross_entropy_with_logits}

class NoLooks(TorchDispatchMode):
    "Raises where the value of a tensor is read, for which a GPU would be waited for."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split('.')[0]
        assert name not in ('_local_scalar_dense', 'nonzero', 'equal', 'unique', 'masked_select'), func
        if name.startswith('index'): assert not any(isinstance(v, torch.Tensor) and v.dtype == torch.bool for v in tree_leaves(args[1:])), func
        return func(*args, **kwargs or {})

@of_torch
@every_option
@by_reduction
@pytest.mark.parametrize('linear', [False, True])
def test_no_value_is_looked_at_on_a_gpu(loss_func, target, options, reduction, linear, monkeypatch):
    "In the forward, and in the backward with any factor; of a linear layer's logits, too."
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda v: pytest.fail('tolist'), raising=False)   # of a CPU tensor it is no op that could be seen
    losses = target.shape if loss_func is smooth_bce else target.shape[:1]
    factor = torch.rand(losses if reduction == 'none' else (), dtype=torch.float64)
    if linear: loss_func = partial(LINEAR[loss_func], logits().requires_grad_())
    x = logits().requires_grad_()
    with NoLooks(): loss_func(x, target, reduction=reduction, **options).backward(factor)
    for look in (lambda: x.sum().item(), lambda: x[x > 0]):
        with pytest.raises(AssertionError, match='aten'), NoLooks(): look()

@every_option
@by_reduction
def test_inputs_never_modified(way, loss_func, target, options, reduction):
    "Nor anything of theirs written to, through forward, backward and double backward; with masked classes, too."
    x = logits()
    if loss_func is smooth_cross_entropy and way != 'few': x[1, :2] = -torch.inf
    x.requires_grad_()
    tensors = [x, target, *(v for v in options.values() if isinstance(v, torch.Tensor))]
    before = [(t.detach().clone(), t._version) for t in tensors]
    loss = loss_func(x, target, reduction=reduction, **options)
    grad, = torch.autograd.grad(loss, x, torch.ones_like(loss), create_graph=True)
    torch.autograd.grad(grad.sum(), x, allow_unused=True)
    loss_func(x, target, reduction=reduction, **options).sum().backward()
    for t, (values, version) in zip(tensors, before): assert torch.equal(t, values) and t._version == version

def test_tensor_base():
    "fastai's subclasses are accepted and unwrapped; the result is a plain Tensor, the gradient reaches the subclass."
    from fastai.torch_core import TensorBase, TensorCategory, TensorImage, TensorMultiCategory
    x = logits()
    cases = (smooth_cross_entropy, INDEX, TensorCategory), (smooth_cross_entropy, SOFT, TensorBase), (smooth_bce, HOT.float(), TensorMultiCategory)
    for (loss_func, target, kind), wrap in product(cases, (TensorBase, TensorImage)):
        expected = loss_and_grad(loss_func, x, target)
        leaf = x.clone().as_subclass(wrap).requires_grad_()     # wrap(x) would make it float32
        for logits_, reduction in product((leaf, x), REDUCTIONS): assert type(loss_func(logits_, target.as_subclass(kind), reduction=reduction)) is torch.Tensor
        loss = loss_func(leaf, target.as_subclass(kind))
        loss.backward()
        assert max(map(distance, (loss, leaf.grad.as_subclass(torch.Tensor)), expected)) < 1e-12
    options = [(smooth_cross_entropy, INDEX, n, v) for n, v in (('weight', W), ('prior', S[0]), ('prior', S), ('eps', W / 2))]
    for loss_func, target, name, value in options + [(smooth_bce, HOT, n, W) for n in ('weight', 'prior', 'pos_weight')]:
        loss = loss_func(x, target, **{name: value.as_subclass(TensorBase)})
        assert type(loss) is torch.Tensor and distance(loss, loss_func(x, target, **{name: value})) < 1e-12
    assert distance(smooth_targets(INDEX.as_subclass(TensorCategory), 4), smooth_targets(INDEX, 4)) == 0

@pytest.mark.parametrize('shape', [(8, 4), (300, 1000)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_another_default_device(shape, dtype):
    "What is made here is made where the logits are."
    x, y = torch.randn(shape).to(dtype).requires_grad_(), torch.zeros(shape[0], dtype=torch.long)
    with torch.device('meta'):
        for loss in (smooth_cross_entropy(x, y), smooth_cross_entropy(x, y, weight=torch.ones(shape[1], device='cpu')), smooth_bce(x, (x > 0).to(torch.uint8))):
            assert loss.device.type == torch.autograd.grad(loss, x)[0].device.type == 'cpu'
