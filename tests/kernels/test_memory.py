"What the losses allocate: under no_grad nothing of the logits' size, with a gradient one tensor of it, whatever their layout."
import pytest, torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from fastai_smooth.kernels.softmax import CHUNK_MB
from .cases import as_on_a_gpu

MB = 2**20
SHAPES = dict(tall=(10000, 512), image=(4, 21, 256, 256), channels_last=(4, 21, 256, 256), volume=(2, 40, 8, 64, 128))

def case(kind, option='index', dtype=torch.float32):
    "(logits of about 20 MB, target, options)."
    shape = SHAPES.get(kind, (256, 20000))
    K = shape[1]
    x = torch.randn(shape[0], 2 * K)[:, ::2].to(dtype) if kind == 'sliced' else torch.randn(shape).to(dtype)
    if kind == 'channels_last': x = x.to(memory_format=torch.channels_last)
    if kind == 'transposed': x = x.T.contiguous().T
    y, options = torch.randint(0, K, (shape[0], *shape[2:])), {}
    if 'ignored' in option: y[torch.rand(y.shape) < .3] = -100
    if 'soft' in option: y = torch.rand(shape).softmax(1)
    if 'multi-hot' in option: y, options = torch.rand(shape) < 2 / K, dict(multi_hot=True)
    if 'weight' in option: options['weight'] = torch.rand(K) + .5
    if 'prior' in option: options['prior'] = torch.full((K,), 1 / K)
    if option == 'matrix': options['prior'] = torch.rand(K, K).softmax(1)
    if option == 'masked': x[:, 1:3], y = -torch.inf, y.masked_fill((y == 1) | (y == 2), 0)
    if kind == 'channels_last' and y.dim() == 4: y = y.to(memory_format=torch.channels_last)
    return x, y, options

def allocations(f):
    "(sizes of all allocations in bytes, the most that was live at once) while f() runs; the result is kept to the end."
    f()                                                            # caches, lazy imports
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: kept = f()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]')
    live = peak = 0
    for _, size in events: live += size; peak = max(peak, live)
    del kept
    return [size for _, size in events if size > 0], peak

def test_allocations_are_seen():
    "The measure itself: F.cross_entropy keeps a tensor of the logits' size, and copies strided ones."
    x, y = torch.randn(256, 10000), torch.zeros(256).long()
    sizes, peak = allocations(lambda: F.cross_entropy(x, y, label_smoothing=.1))
    assert max(sizes) == x.nbytes and peak >= x.nbytes
    assert allocations(lambda: x.T.contiguous().T.softmax(1))[0].count(x.nbytes) >= 2

# What of a chunk is live at most, in chunks: its log softmax, and what its targets are made of
CHUNKS = {'soft': 3, 'soft, weight': 4, 'multi-hot': 4, 'matrix': 3, 'masked': 7}

@pytest.mark.parametrize('kind,option,dtype', [
    *((k, o, torch.float32) for k, o in (('wide', 'index'), ('wide', 'weight, ignored'), ('wide', 'weight, prior'), ('wide', 'soft, weight'), ('wide', 'multi-hot'),
                                         ('wide', 'masked'), ('tall', 'index'), ('tall', 'matrix'), ('tall', 'soft'), ('image', 'index'), ('image', 'soft'),
                                         ('image', 'ignored'), ('channels_last', 'index'), ('channels_last', 'soft'), ('transposed', 'index'), ('sliced', 'index'),
                                         ('volume', 'index'))), ('wide', 'index', torch.float16), ('image', 'index', torch.bfloat16)])
def test_softmax_memory(kind, option, dtype):
    "A few chunks at a time, and values a row and a class. With grad one tensor of the logits' size: kept by the forward, and handed over."
    x, y, options = case(kind, option, dtype)
    row_values, prior = 8 * x.numel() // x.shape[1], 8 * options['prior'].numel() if 'prior' in options else 0
    chunks = CHUNKS.get(option, 2) + (kind in ('channels_last', 'transposed'))   # torch copies a chunk whose classes lie apart
    most = chunks * CHUNK_MB * MB + 2 * row_values + 16 * x.shape[1] + prior
    x.requires_grad_()
    for reduction in ('mean', 'none'):
        with torch.no_grad(): sizes, peak = allocations(lambda: smooth_cross_entropy(x, y, reduction=reduction, **options))
        assert max(sizes) <= max(CHUNK_MB * MB, row_values, prior) and peak <= most, f'{max(sizes):,} bytes at once, {peak:,} live'
    step = lambda: (loss := smooth_cross_entropy(x, y, **options), torch.autograd.grad(loss, x))
    sizes, peak = allocations(step)
    assert sum(s > max(x.nbytes / 2, prior) for s in sizes) <= 1 and peak <= x.nbytes + most, f'{peak:,} bytes live'

@pytest.mark.parametrize('option,dtype,most', [
    ('index', torch.float32, 2.5), ('weight, ignored', torch.float32, 3.5), ('soft, weight', torch.float32, 3.5),
    ('multi-hot', torch.float32, 4.5), ('matrix', torch.float32, 4.5), ('index', torch.bfloat16, 5), ('index', torch.float16, 5)])
def test_softmax_memory_on_a_gpu(option, dtype, most, monkeypatch):
    "As tensors of the logits' size. PyTorch's loss of class indices makes 3, of half precision under autocast 6."
    as_on_a_gpu(monkeypatch)
    x, y, options = case('tall', option, dtype)
    x.requires_grad_()
    step = lambda: (loss := smooth_cross_entropy(x, y, **options), torch.autograd.grad(loss, x))
    assert allocations(step)[1] <= (most + .1) * x.nbytes   # and values a row
    if option != 'index': return
    plain = lambda: (loss := F.cross_entropy(x.float(), y, label_smoothing=.1), torch.autograd.grad(loss, x))
    assert allocations(plain)[1] >= (3 if dtype == torch.float32 else 6) * x.nbytes

class Operands(TorchDispatchMode):
    "Bytes of the operands and of the results of all ops, but views: what a GPU reads and writes. Gathers and scatters count in full."
    total = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and 'empty' not in func.__name__:
            for side in (args, result):
                tensors = {v.data_ptr(): v for v in tree_leaves(side) if isinstance(v, torch.Tensor)}
                self.total += sum(v.untyped_storage().nbytes() for v in tensors.values())
        return result

def test_passes_on_a_gpu(monkeypatch):
    "Over the logits, of class indices: twice as many as of PyTorch's loss, which has no masked classes, and nan for a nan in an ignored row."
    as_on_a_gpu(monkeypatch)
    x, y, _ = case('tall')
    def passes(loss_func, **options):
        with Operands() as seen: torch.autograd.grad(loss_func(x.requires_grad_(), y, **options), x)
        return seen.total / x.nbytes
    assert 10 < passes(F.cross_entropy, label_smoothing=.1) < 12 and passes(smooth_cross_entropy) < 21

@pytest.mark.parametrize('dtype,target_dtype', [(torch.float32, torch.bool), (torch.float32, torch.float32), (torch.float16, torch.uint8)])
def test_sigmoid_memory(dtype, target_dtype):
    "The mean of 5 million losses with no tensor of them, in chunks of 1 MB; reduction='none' allocates its result, a gradient itself."
    x, y = torch.randn(256, 20000).to(dtype).requires_grad_(), (torch.rand(256, 20000) < .1).to(target_dtype)
    for options in ({}, dict(weight=torch.rand(20000), pos_weight=torch.rand(20000) + .5)):
        with torch.no_grad(): sizes, peak = allocations(lambda: smooth_bce(x, y, **options))  # Python 3.10 holds what a call was given till it returns
        assert max(sizes) <= MB and peak <= 8 * MB, f'{max(sizes):,} bytes at once, {peak:,} live'
    with torch.no_grad(): sizes, peak = allocations(lambda: smooth_bce(x, y, reduction='none'))
    assert sum(s > MB for s in sizes) <= 1 and peak <= x.numel() * 4 + 6 * MB
    sizes, peak = allocations(lambda: smooth_bce(x, y))
    assert sum(s > x.nbytes / 4 for s in sizes) <= 1 and peak <= x.nbytes + 6 * MB
