"""What the suites of others test, in their own shapes and options: PyTorch's samples for both losses, and settings of Liger-Kernel,
flash-attention and QuACK, with fewer rows where theirs are for a GPU. All against PyTorch in float64, values and gradients."""
import importlib, pytest, torch
from typing import NamedTuple
import torch.nn.functional as F
from torch import nn

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from fastai_smooth.losses import LabelSmoothingBCEWithLogits, LabelSmoothingCrossEntropy
from reference import distance, loss_and_grad, rounded_once

TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-6}
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

def agree(ours, theirs, x, y, by=1.):
    "Loss and gradient of logits `x` in their dtype, against those of `theirs` in float64; half precision is rounded once"
    loss, grad = loss_and_grad(ours, x, y, grad_output=by)
    expected, expected_grad = loss_and_grad(theirs, x.double(), y.double() if y.is_floating_point() else y, grad_output=by)
    assert loss.dtype == (F64 if x.dtype == F64 else F32) and grad.dtype == x.dtype
    assert distance(loss, expected) < TOLERANCE.get(x.dtype, 3e-6)
    assert distance(grad, expected_grad) < TOLERANCE[x.dtype] if x.dtype in TOLERANCE else rounded_once(grad, expected_grad, slack=1e-6)

def doubled(options): return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}

# ---------------------------------------------------------------- PyTorch's own samples

def of_pytorch(name):
    "A module of PyTorch's own tests. Importing one freezes the flags of backends for the process; fastai's `set_seed` sets them"
    pytest.importorskip('expecttest')   # which PyTorch's testing package asks for
    res = importlib.import_module(f'torch.testing._internal.{name}')
    torch.backends.flags_frozen.__globals__['__allow_nonbracketed_mutation_flag'] = True
    return res

def distribution(y, x):
    "Their soft targets are any numbers in [0,1]; rows of ours sum to 1"
    return y / y.sum(1 if x.dim() > 1 else 0, keepdim=True) if y.is_floating_point() else y

@pytest.mark.parametrize('eps', [0., .1])
@pytest.mark.parametrize('name', ['cross_entropy', 'binary_cross_entropy_with_logits'])
def test_pytorch_samples_of(name, eps):
    op = next(o for o in of_pytorch('common_methods_invocations').op_db if o.name == f'nn.functional.{name}')
    taken = list(op.sample_inputs('cpu', F64, requires_grad=True))
    assert len(taken) > 10
    for o in taken:
        x, y, options = o.input.detach(), o.args[0].detach(), {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in o.kwargs.items()}
        if name == 'cross_entropy':
            smoothing, y = options.pop('label_smoothing', eps), distribution(y, x)
            def ours(x, y): return smooth_cross_entropy(x, y, smoothing, **options)
            def theirs(x, y): return F.cross_entropy(x, y, label_smoothing=smoothing, **doubled(options))
        else:
            def ours(x, y): return smooth_bce(x, y, eps, **options)
            def theirs(x, y): return F.binary_cross_entropy_with_logits(x, y * (1 - 2 * eps) + eps, **doubled(options))
        for dtype in (F64, F32, BF16): agree(ours, theirs, x.to(dtype), y)

@pytest.mark.parametrize('theirs,ours', [(nn.CrossEntropyLoss, LabelSmoothingCrossEntropy), (nn.BCEWithLogitsLoss, LabelSmoothingBCEWithLogits)])
def test_pytorch_samples_of_modules(theirs, ours):
    info = next(m for m in of_pytorch('common_modules').module_db if m.module_cls is theirs)
    taken = info.module_inputs_func(info, 'cpu', F64, requires_grad=True, training=True)
    assert len(taken) > 5
    for o in taken:
        x, y = (v.detach() for v in o.forward_input.args)
        options = {k: v.abs() + .1 if isinstance(v, torch.Tensor) else v for k, v in o.constructor_input.kwargs.items()}
        if ours is LabelSmoothingCrossEntropy: y = distribution(y, x)
        if not y.is_floating_point() and (y == options.get('ignore_index', -100)).all(): continue   # a mean of nothing: nan there, 0 here
        given = {k: v for k, v in options.items() if k != 'label_smoothing'}
        for dtype in (F64, F32, BF16): agree(ours(options.get('label_smoothing', 0.), **given), theirs(**doubled(options)), x.to(dtype), y)

# ---------------------------------------------------------------- Liger-Kernel, flash-attention, QuACK

class Case(NamedTuple):
    rows: int
    classes: int
    dtype: torch.dtype
    smoothing: float = 0.
    ignore_index: int = -100     # the class of some rows
    reduction: str = 'mean'
    by: float = 1.               # what the loss is multiplied by; 'random' for one or a row
    logit_scale: float = 1.
    lse_square_scale: float = 0.  # of a term that their kernels add, and ours leaves to the user
    scale: float = 1.            # of the logits
    weighted: bool = False

LIGER = [Case(32, 32000, BF16, reduction='sum'), Case(21, 32000, F32), Case(32, 32000, F32, ignore_index=2),
         Case(21, 32000, BF16, ignore_index=-123, reduction='sum'), Case(32, 32000, F32, .1), Case(21, 32000, BF16, .2, ignore_index=-300),
         Case(32, 32000, F32, .2, ignore_index=-42, reduction='sum', lse_square_scale=1e-5),
         Case(21, 32000, BF16, by=3.)]   # 'not the last layer'
FLASH = [Case(16, 50257, F16), Case(16, 50257, BF16, .9), Case(16, 50257, F32, .9, logit_scale=.7), Case(16, 50257, F32, lse_square_scale=1e-2),
         Case(12, 131072, F16, .9), Case(12, 131072, BF16), Case(12, 131072, F32), Case(12, 131072, F32, .9, logit_scale=.7, lse_square_scale=1e-2)]
QUACK = [Case(289, 192, BF16), Case(77, 760, F16), Case(289, 1128, F32), Case(1, 16384, BF16, weighted=True), Case(77, 1024, F32, weighted=True, ignore_index=1023),
         Case(16, 32768, F16, weighted=True), Case(4, 128256, BF16, .1, weighted=True), Case(2, 262144, F32)]
SUITES = dict(Liger=LIGER, flash=[c._replace(by='random') for c in FLASH], QuACK=[c._replace(reduction='none', by='random', scale=.1) for c in QUACK])

@pytest.mark.parametrize('suite,case', [pytest.param(s, c, id=f'{s} {i}') for s, cases in SUITES.items() for i, c in enumerate(cases)])
def test_settings_of(suite, case):
    x, y = (case.scale * torch.randn(case.rows, case.classes)).to(case.dtype), torch.randint(case.classes, (case.rows,))
    if suite != 'QuACK' or case.ignore_index != -100: y[torch.rand(case.rows) < .3] = case.ignore_index
    options = dict(reduction=case.reduction, ignore_index=case.ignore_index, weight=torch.rand(case.classes) + .1 if case.weighted else None)
    kept = y != case.ignore_index

    def complete(loss, x):
        "with the term that their kernels add for large sums of exponentials"
        square = case.lse_square_scale * (case.logit_scale * x).logsumexp(1)[kept] ** 2
        return loss + (square.sum() if case.reduction == 'sum' else square.mean()) if case.lse_square_scale else loss
    def ours(x, y): return complete(smooth_cross_entropy(x if case.logit_scale == 1 else x * case.logit_scale, y, case.smoothing, **options), x)
    def theirs(x, y): return complete(F.cross_entropy(x * case.logit_scale, y, label_smoothing=case.smoothing, **doubled(options)), x)
    by = case.by if case.by != 'random' else torch.randn(case.rows if case.reduction == 'none' else ())
    agree(ours, theirs, x, y, by)

@pytest.mark.parametrize('dtype', [F16, F32])
def test_logits_that_are_all_alike_or_sure(dtype):
    "QuACK's: the loss of equal logits is the log of their number, whatever they are; that of the surest next to nothing"
    y = torch.randint(1024, (16,))
    for v in (10., -10.):
        alike = torch.full((16, 1024), v, dtype=dtype)
        assert distance(smooth_cross_entropy(alike, y, 0., reduction='none'), torch.full((16,), 1024.).log()) < 1e-6
    sure = torch.full((16, 1024), -10., dtype=dtype).scatter_(1, y[:, None], 10.)
    assert (smooth_cross_entropy(sure, y, 0., reduction='none') < 1e-5).all()
    x = torch.randn(8, 512)
    assert distance(smooth_cross_entropy(x + 100., y[:8] % 512, 0., reduction='none'), F.cross_entropy((x + 100.).double(), y[:8] % 512, reduction='none')) < 1e-6
