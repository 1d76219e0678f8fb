"""Where Triton's kernels run: in its interpreter, which test_interpreted.py starts, or on a GPU (benchmarks/gpu.sh). Tests that need one are
skipped elsewhere, for the reason that is here."""
import sys

import pytest, torch

triton = pytest.importorskip('triton', minversion='3.6')
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits, smooth_cross_entropy
from fastai_smooth.kernels.triton import launch, sigmoid, softmax
from reference import distance, loss_and_grad, sigmoid_reference, softmax_reference

if not launch.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU here; test_interpreted.py runs what Triton's interpreter can", allow_module_level=True)
DEVICE = 'cpu' if launch.INTERPRETED else 'cuda'
ON_TRITON = sys.modules.get('kernels.triton.on_triton')
TABLE = ON_TRITON.tile_for if ON_TRITON else softmax.tile_for

@pytest.fixture
def cut(monkeypatch):
    "Cuts the work otherwise than the table does, and makes the gradient early or late."
    if ON_TRITON: monkeypatch.setattr(ON_TRITON, 'take_turn', lambda *_: None)
    monkeypatch.setattr(softmax, 'tile_for', TABLE)
    monkeypatch.setattr(sigmoid, 'BLOCK', 16)
    def cut(tile=None, early=False):
        if tile: monkeypatch.setattr(softmax, 'tile_for', lambda *_: tile)
        monkeypatch.setattr(launch, 'EARLY_MB', 0 if early else 10**6)
    return cut

@pytest.fixture
def launched(monkeypatch):
    "Notes what is computed by a kernel."
    seen = []
    for module in (softmax, sigmoid):
        for name in ('forward', 'backward'):
            original = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, name=name, original=original, **k: (seen.append(name), original(*a, **k))[1])
        monkeypatch.setattr(module, 'GRAD_LATE', module.GRAD_LATE._replace(forward=module.forward, backward=module.backward))
    return seen

def inputs(n=6, k=10, dtype=torch.float64): return torch.randn(n, k, dtype=dtype, device=DEVICE), torch.randint(k, (n,), device=DEVICE)

def off(x, y, *args, head='softmax', **options):
    "How far the loss and its gradient are from the reference."
    scale = torch.rand(x.shape if head == 'sigmoid' else y.shape, dtype=torch.float64) - .5 if options.get('reduction') == 'none' else torch.tensor(2.5)
    f, reference = (smooth_cross_entropy, softmax_reference) if head == 'softmax' else (smooth_binary_cross_entropy_with_logits, sigmoid_reference)
    actual = loss_and_grad(f, x, y, *args, grad_output=scale.to(DEVICE), backend='triton', **options)
    cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return max(distance(a.cpu(), e) for a, e in zip(actual, reference(x.cpu(), y.cpu(), *args, grad_output=scale, **cpu)))

def off_torch(f, x, y, *args, **options):
    "How far they are from those of the torch implementation."
    return max(map(distance, *(loss_and_grad(f, x, y, *args, backend=backend, **options) for backend in ('triton', 'torch'))))
