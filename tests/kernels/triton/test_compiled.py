"""The Triton kernels compiled for GPUs that are elsewhere, and how they are launched: nothing runs here.

To record what compiles with the Triton that is installed: `python -m kernels.triton.test_compiled`, in tests/."""
from itertools import product
import json, sys
from pathlib import Path
from unittest.mock import patch

import pytest, torch

triton = pytest.importorskip('triton', minversion='3.6')
from fastai_smooth.kernels.targets import SigmoidTarget, Smoothing, SoftmaxTarget
from fastai_smooth.kernels.triton import launch, sigmoid, softmax
from .offline import code, compiled_only, recorded

RECORD = Path(__file__).with_name('compiled.json')
needs_ptxas = pytest.mark.skipif(sys.platform != 'linux', reason='Triton compiles on Linux')

VERSION = '.'.join(triton.__version__.split('.')[:2])

def softmax_launches(shape, dtype=torch.float32, early=False, soft=False, eps=.1, reduction='mean', weight=None, ignore_index=-100, index=torch.int64,
                     record=recorded, **smoothing):
    "The launches of a loss and its backward; `early`: as of so many logits that the gradient is made in the forward."
    x, rows = torch.zeros(shape, dtype=dtype), shape[:1] + shape[2:]
    dense = soft or smoothing.get('multi_hot')
    y = torch.zeros(shape, dtype=torch.uint8 if smoothing.get('multi_hot') else dtype) if dense else torch.zeros(rows, dtype=index)
    target = SoftmaxTarget(y, not dense, Smoothing(eps, **smoothing), 1, weight, ignore_index)
    with record() as launches:
        grad = torch.empty_like(x) if early else None
        loss, *kept = softmax.forward(x, target, reduction, grad, keep_stats=softmax.spans_blocks(x, 1))
        softmax.backward(torch.ones_like(loss), x, target, reduction, *kept, grad)
    return launches

def sigmoid_launches(shape, dtype=torch.float32, target=torch.uint8, reduction='mean', early=True, e0=.05, e1=.05, record=recorded, few=False, **factors):
    "`few`: as of so few logits that torch multiplies their gradient"
    x, expand = torch.zeros(shape, dtype=dtype), lambda v: v.expand(shape) if isinstance(v, torch.Tensor) else v
    target = SigmoidTarget(x.to(target), expand(e0), expand(e1), **{k: expand(v) for k, v in factors.items()})
    with record() as launches, patch.object(launch, 'EARLY_MB', 10**6 if few else 0):
        grad = torch.empty_like(x) if early else None
        loss, = sigmoid.forward(x, target, reduction, grad)
        sigmoid.backward(torch.ones_like(loss), x, target, reduction, grad)
    return launches

def forwards(launches): return launches[:-1]

def entries():
    "name -> compute capability, launches: each entry of the table, with the gradient early and late, in two dtypes, and for two GPUs"
    wide = [most or 128256 for most, _ in softmax.TILES]
    for shape in [(4, k) for n in wide for k in (n, n - 3)] + [(2, k, 32, 32) for k in (2, 21, 150)]:   # also with odd numbers of classes
        name, odd = f"softmax, {'x'.join(map(str, shape))}", shape[1] % 2 == 1 and len(shape) == 2
        early = forwards(softmax_launches(shape, early=True))[1:]   # the first one counts rows
        yield f'{name}, float32 early, sm_90', 90, early
        if odd: continue
        yield f'{name}, bfloat16 late, sm_90', 90, softmax_launches(shape, torch.bfloat16)
        yield f'{name}, float32 early, sm_80', 80, early
    for k in (1000, 20000):
        yield f'softmax, before and after, {k}, sm_90', 90, [l for l in softmax_launches((4, k), early=True, weight=torch.ones(k)) if l.args.get('loss') is None]
    v = torch.ones(1000)
    for name, options in dict(soft=dict(soft=True), prior=dict(prior=v, weight=v), matrix=dict(prior=torch.ones(1000, 1000)), weight=dict(weight=v), others=dict(spread='others'),
                              each=dict(reduction='none'),                              hot=dict(multi_hot=True, spread='others', weight=v), eps=dict(eps=v), float16=dict(dtype=torch.float16)).items():
        yield f'softmax, {name}, sm_90', 90, softmax_launches((4, 1000), **options)
    yield 'softmax, one class, int32, sm_90', 90, softmax_launches((64, 1), index=torch.int32)
    yield 'softmax, float64, sm_90', 90, softmax_launches((4, 40), torch.float64)
    yield 'softmax, long rows, soft, prior, weight, sm_90', 90, softmax_launches((4, 20000), soft=True, prior=torch.ones(20000), weight=torch.ones(20000))
    for dtype, target in product((torch.float32, torch.bfloat16), (torch.uint8, torch.bool, torch.float32)):
        yield f'sigmoid, {dtype}, {target}, sm_90'.replace('torch.', ''), 90, forwards(sigmoid_launches((64, 1000), dtype, target))
    yield 'sigmoid, float16, sm_90', 90, sigmoid_launches((64, 1000), torch.float16, early=False)
    yield 'sigmoid, each, sm_90', 90, sigmoid_launches((64, 1000), reduction='none', early=False)
    w = torch.ones(1000)
    yield 'sigmoid, factors, sm_90', 90, forwards(sigmoid_launches((64, 1000), e0=w, e1=w, weight=w, pos_weight=w))
    yield 'sigmoid, sm_80', 80, forwards(sigmoid_launches((64, 1000)))
    yield 'sigmoid, after, sm_90', 90, sigmoid_launches((64, 1000))[-1:]

def compiled(capability, launches): return {launch.kernel.__name__: code(launch.compile(capability)) for launch in launches}

RECORDED = json.loads(RECORD.read_text()) if RECORD.exists() else {}
ENTRIES = {name: (capability, launches) for name, capability, launches in entries()} if not launch.INTERPRETED else {}

@needs_ptxas
@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.long] * (i % 9 > 0)) for i, name in enumerate(ENTRIES)])
def test_compiles_without_a_gpu(name):
    "Every entry of the dispatch table (a ninth, where there is no time for all): no spill, and no 128-bit access less, than recorded."
    now, before = compiled(*ENTRIES[name]), RECORDED.get(VERSION, {}).get(name)
    if before is None: return   # it compiles; nothing is recorded for this version of Triton
    assert now.keys() == before.keys()
    for kernel, (spills, loads, stores) in now.items():
        most, *least = before[kernel]
        assert spills <= most and (loads, stores) >= (*least,), f'{kernel} has {spills} spills, {loads} wide loads, {stores} wide stores, recorded {before[kernel]}'

def test_everything_is_recorded():
    for version, entries in RECORDED.items(): assert entries.keys() == ENTRIES.keys(), f'recorded for Triton {version} is not what is compiled'

# ---------------------------------------------------------------- launches

def kernels(launches): return [launch.kernel.__name__ for launch in launches]

def test_launches():
    "Two for few logits; for many, whose gradient is made with the loss, a look at the targets before, and after it one at the scale"
    for shape in ((64, 10), (512, 1000)): assert kernels(softmax_launches(shape)) == ['softmax_kernel'] * 2
    assert kernels(softmax_launches((4, 20000))) == ['softmax_kernel', 'gradient_kernel']
    assert kernels(softmax_launches((512, 1000), early=True)) == ['denominator_kernel', 'softmax_kernel', 'softmax_kernel']
    assert kernels(softmax_launches((512, 1000), early=True, reduction='sum')) == ['softmax_kernel'] * 2
    assert kernels(softmax_launches((512, 1000), early=True, soft=True)) == ['softmax_kernel'] * 2
    assert kernels(softmax_launches((4, 20000), early=True)) == ['denominator_kernel', 'softmax_kernel', 'gradient_kernel']
    for early in (True, False): assert kernels(sigmoid_launches((64, 20), early=early)) == ['sigmoid_kernel'] * 2
    for dtype, most in ((torch.float32, 1), (torch.bfloat16, 2)): assert kernels(sigmoid_launches((64, 20), dtype, few=True)) == ['sigmoid_kernel'] * most

@pytest.mark.parametrize('shape,early', [((64, 10), True), ((64, 20000), False), ((8, 21, 16, 16), True)])
def test_nothing_recompiles(shape, early):
    "For another batch size, eps or ignore_index."
    usual = {launch.key() for launch in softmax_launches(shape, early=early)}
    for n, eps, ignore_index in ((1, .1, -100), (17, .1, -100), (shape[0], 0., -100), (shape[0], 1., 1), (48, .25, 16)):
        assert {launch.key() for launch in softmax_launches((n, *shape[1:]), early=early, eps=eps, ignore_index=ignore_index)} <= usual
    assert {launch.key() for launch in sigmoid_launches((64, 20))} >= {launch.key() for n in (1, 3, 4096) for launch in sigmoid_launches((n, 20))}

@needs_ptxas
def test_launched_again():
    "What was compiled is found, and Triton's checks of a launch pass, such as that globals have not changed"
    for launches, kernels in ((lambda: softmax_launches((4, 20000), early=True, soft=False, record=compiled_only), 3),
                              (lambda: softmax_launches((8, 10), soft=True, prior=torch.ones(10), record=compiled_only), 2),
                              (lambda: sigmoid_launches((64, 20), e1=torch.ones(20), record=compiled_only), 2)):
        first, second = launches(), launches()
        assert len(first) == kernels and list(map(id, first)) == list(map(id, second))

def test_work_is_bounded():
    "However many logits: so many programs at most, and the sums of their sums as long"
    most = sigmoid.PROGRAMS * launch.multiprocessors(torch.device('cpu'))
    args = sigmoid_launches((most * sigmoid.BLOCK + 1,))[0].args
    assert args['tiles'] == most and args['tail'] == 1 and len(args['partials']) == 3 * most

if __name__ == '__main__':
    RECORDED[VERSION] = {name: compiled(*of) for name, of in ENTRIES.items()}
    RECORD.write_text('{\n' + ',\n'.join(f'"{version}": {{\n' + ',\n'.join(f'  {json.dumps(k)}: {json.dumps(v)}' for k, v in of.items()) + '\n}'
                                         for version, of in sorted(RECORDED.items())) + '\n}\n')
