"What the losses allocate."

import pytest, torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from fastai_smooth.kernels import softmax
from fastai_smooth.kernels.softmax import CHUNK_MB
from .cases import big_case
from reference import distance, loss_and_grad

MB = 2**20


def allocations(f):
    "(sizes of all allocations in bytes, the most that was live at once) while f() runs; the result is kept to the end"
    f()                                                            # warm-up: caches, lazy imports
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: kept = f()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]')
    live = peak = 0
    for _, size in events: live += size; peak = max(peak, live)
    del kept
    return [size for _, size in events if size > 0], peak


def test_allocations_are_seen():
    "the measure itself: F.cross_entropy keeps a tensor of the logits' size, and copies strided ones"
    x, y = torch.randn(256, 10000), torch.zeros(256).long()
    with torch.no_grad(): sizes, peak = allocations(lambda: F.cross_entropy(x, y, label_smoothing=.1))
    assert max(sizes) == x.nbytes and peak >= x.nbytes
    sizes, _ = allocations(lambda: x.T.contiguous().T.softmax(1))
    assert sizes.count(x.nbytes) >= 2


BIG = ([('wide', o) for o in ('index', 'ignored', 'soft', 'multi-hot', 'multi-hot, others', 'weight', 'prior', 'weight, prior', 'weight, ignored',
                              'per-class eps', 'masked', 'soft, weight')] +
       [('tall', o) for o in ('index', 'matrix', 'soft')] +
       [('image', o) for o in ('index', 'weight', 'soft', 'multi-hot', 'masked', 'ignored')] +
       [(k, o) for k in ('channels_last', 'transposed') for o in ('index', 'soft')] +
       [('sliced', 'index'), ('volume', 'index')])


# What of a chunk is live at most, in chunks: its log softmax, and what its targets are made of
CHUNKS = {'soft': 3, 'soft, weight': 4, 'multi-hot': 4, 'multi-hot, others': 4, 'matrix': 3, 'masked': 7}
every_big_case = pytest.mark.parametrize('kind,option,dtype', [(*b, torch.float32) for b in BIG] + [(k, 'index', d) for k in ('wide', 'image') for d in (torch.float16, torch.bfloat16)])


def most(kind, option, x):
    "The bytes of the chunks that are live at most, and of the values a row and a class. Torch copies a chunk whose classes lie apart"
    return (CHUNKS.get(option, 2) + (kind in ('channels_last', 'transposed'))) * CHUNK_MB * MB + 16 * (x.numel() // x.shape[1] + x.shape[1])


@every_big_case
def test_no_grad_memory(kind, option, dtype):
    "under no_grad only chunks are allocated, few at a time, whatever the logits' size; one value a row, and the prior's own size, aside"
    x, y, options = big_case(kind, option, dtype)
    row_values, prior = 8 * x.numel() // x.shape[1], 8 * options['prior'].numel() if 'prior' in options else 0
    x.requires_grad_()
    for reduction in ('mean', 'none'):
        with torch.no_grad():
            sizes, peak = allocations(lambda: smooth_cross_entropy(x, y, reduction=reduction, **options))
        assert max(sizes) <= max(CHUNK_MB * MB, row_values, prior), f'{max(sizes):,} bytes at once'
        assert peak <= most(kind, option, x), f'{peak:,} bytes live'


def test_chunks_say_what_is_allocated(monkeypatch):
    "smaller ones, less memory: also where a class is masked, which takes most"
    monkeypatch.setattr(softmax, 'CHUNK_MB', 1)
    for option in ('index', 'soft', 'masked'):
        x, y, _ = big_case('wide', option)
        with torch.no_grad(): sizes, peak = allocations(lambda: smooth_cross_entropy(x, y))
        assert max(sizes) <= MB and peak <= CHUNKS.get(option, 2) * MB + 16 * sum(x.shape) < x.nbytes / 2, f'{option}: {peak:,} bytes live'


@every_big_case
def test_forward_memory(kind, option, dtype):
    "with grad the forward allocates at most one tensor of the logits' size: what backward turns into the gradient"
    x, y, options = big_case(kind, option, dtype)
    x.requires_grad_()
    sizes, peak = allocations(lambda: smooth_cross_entropy(x, y, **options))
    full = x.numel() * 4
    assert sum(size > full / 4 for size in sizes) <= 1, [f'{s:,}' for s in sizes if s > full / 4]
    assert peak <= full + most(kind, option, x), f'{peak:,} bytes live'


@pytest.mark.parametrize('kind', ['image', 'channels_last', 'transposed', 'sliced'])
def test_layout_no_transpose_copy(kind):
    "class axis 1 or strided: forward and backward hold one tensor of the logits' size, and the numbers are PyTorch's"
    x, y, _ = big_case(kind)
    x.requires_grad_()
    sizes, peak = allocations(lambda: torch.autograd.grad(smooth_cross_entropy(x, y), x))
    assert sum(size > x.numel() for size in sizes) <= 1 and peak <= x.numel() * 4 + most(kind, 'index', x)
    actual = loss_and_grad(smooth_cross_entropy, x, y)
    assert max(map(distance, actual, loss_and_grad(F.cross_entropy, x.double(), y, label_smoothing=.1))) < 1e-5


def test_gradient_memory_is_released():
    "after backward nothing of the logits' size hangs on the loss but the gradient"
    x, y, _ = big_case('wide')
    x.requires_grad_()
    def step():
        loss = smooth_cross_entropy(x, y)
        return loss, torch.autograd.grad(loss, x)
    sizes, peak = allocations(step)
    assert sum(size > x.numel() for size in sizes) <= 1 and peak <= x.nbytes + MB


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('target_dtype', [torch.bool, torch.uint8, torch.float32])
def test_sigmoid_no_grad_memory(dtype, target_dtype):
    "the mean of 5 million losses with no tensor of them, in chunks of 1 MB; reduction='none' allocates its result"
    x, y = torch.randn(256, 20000).to(dtype).requires_grad_(), (torch.rand(256, 20000) < .1).to(target_dtype)
    for options in ({}, dict(weight=torch.rand(20000), pos_weight=torch.rand(20000) + .5)):
        with torch.no_grad(): sizes, peak = allocations(lambda: smooth_bce(x, y, **options))  # Python 3.10 holds what a call was given till it returns
        assert max(sizes) <= MB and peak <= 8 * MB, f'{max(sizes):,} bytes at once, {peak:,} live'
    with torch.no_grad():
        sizes, peak = allocations(lambda: smooth_bce(x, y, reduction='none'))
    assert sum(s > MB for s in sizes) <= 1 and peak <= x.numel() * 4 + 6 * MB


@pytest.mark.parametrize('target_dtype', [torch.bool, torch.float32])
def test_sigmoid_forward_memory(target_dtype):
    x, y = torch.randn(256, 20000).requires_grad_(), (torch.rand(256, 20000) < .1).to(target_dtype)
    sizes, peak = allocations(lambda: smooth_bce(x, y))
    assert sum(s > x.nbytes / 4 for s in sizes) <= 1 and peak <= x.nbytes + 6 * MB
