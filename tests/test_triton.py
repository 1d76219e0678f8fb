"""The Triton kernels where there is no GPU: run by Triton's interpreter, and compiled for GPUs that are elsewhere.

The interpreter has to be asked for before Triton is imported, so the torch implementation's tests run again in processes of
their own (on_triton.py). In this process kernels are compiled, but never launched."""
from itertools import product
import json, os, re, subprocess, sys
from pathlib import Path

import pytest, torch

triton = pytest.importorskip('triton', minversion='3.6')
from fastai_smooth.kernels import fused, fused_sigmoid, fused_softmax, smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from fastai_smooth.kernels.formula import Job
from fastai_smooth.kernels.sigmoid import Labels
from fastai_smooth.kernels.targets import Smoothing
from offline import code, recorded

HERE = Path(__file__).parent
needs_ptxas = pytest.mark.skipif(sys.platform != 'linux', reason='Triton compiles on Linux')


# ---------------------------------------------------------------- the torch implementation's tests, interpreted

PARITY = 'test_torch_features.py test_triton_kernels.py', 'test_parity.py', 'test_softmax.py', 'test_sigmoid.py', 'test_paths.py', 'test_losses.py'


@pytest.mark.slow
@pytest.mark.parametrize('files', PARITY)
def test_parity_suite_interpreted(files):
    "every test of the torch implementation that says something about a kernel, on the Triton one; hardly anything falls back"
    env = os.environ | dict(TRITON_INTERPRET='1', SMOOTH_TEST_BACKEND='triton', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    ended = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-W', 'ignore::RuntimeWarning', *files.split()], cwd=HERE, env=env,
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    by_triton, by_torch = map(int, re.search(r'losses computed by Triton: (\d+), by torch: (\d+)', ended.stdout).groups())
    assert by_triton > 300 and by_torch < .15 * by_triton, ended.stdout[-500:]


# ---------------------------------------------------------------- compiled for GPUs that are not here

RECORD = HERE/'compiled.json'
VERSION = '.'.join(triton.__version__.split('.')[:2])
WIDE = {'classes next to each other': 128256, 'rows next to each other': 300}   # for the last entries, which have no most


def softmax_launches(shape, dtype=torch.float32, early=False, soft=False, eps=.1, reduction='mean', weight=None, ignore_index=-100, index=torch.int64, **smoothing):
    "The launches of a loss and its backward; `early`: as of so many logits that the gradient is made in the forward"
    x, rows = torch.zeros(shape, dtype=dtype), shape[:1] + shape[2:]
    dense = soft or smoothing.get('multi_hot')
    y = torch.zeros(shape, dtype=torch.uint8 if smoothing.get('multi_hot') else dtype) if dense else torch.zeros(rows, dtype=index)
    job = Job(y, not dense, Smoothing(eps, **smoothing), 1, weight, ignore_index)
    with recorded() as launches:
        grad = torch.empty_like(x) if early else None
        loss, inverse, stats = fused_softmax.forward(x, job, reduction, grad, keep=fused_softmax.long(x, 1))
        fused_softmax.backward(torch.ones_like(loss), x, job, reduction, inverse, stats, grad)
    return launches


def sigmoid_launches(shape, dtype=torch.float32, target=torch.uint8, reduction='mean', early=True, **factors):
    x = torch.zeros(shape, dtype=dtype)
    labels = Labels(x.to(target), .05, **{k: v.expand(shape) for k, v in factors.items()})
    with recorded() as launches:
        grad = torch.empty_like(x) if early else None
        loss = fused_sigmoid.forward(x, labels, reduction, grad)
        fused_sigmoid.backward(torch.ones_like(loss), x, labels, reduction, grad)
    return launches


def forwards(launches): return launches[:-1]


def entries():
    "name -> compute capability, launches: each entry of the table, with the gradient early and late, in two dtypes, and for two GPUs"
    for layout, table in fused_softmax.TILES.items():
        for most, _ in table:
            for k in dict.fromkeys((most or WIDE[layout], (most or WIDE[layout]) - 3)):   # and an odd number of classes
                shape = (4, k) if layout.startswith('classes') else (2, k, 32, 32)
                name, odd = f'softmax, {layout}, {k}', k % 2 == 1
                early = forwards(softmax_launches(shape, early=True))[1:]   # the first one counts rows
                yield f'{name}, float32 early, sm_90', 90, early
                if odd: continue
                yield f'{name}, bfloat16 late, sm_90', 90, softmax_launches(shape, torch.bfloat16)
                yield f'{name}, float32 early, sm_80', 80, early
    for k in (1000, 20000): yield f'softmax, before and after, {k}, sm_90', 90, [l for l in softmax_launches((4, k), early=True, weight=torch.ones(k)) if l.args.get('loss') is None]
    v = torch.ones(1000)
    for name, options in dict(soft=dict(soft=True), prior=dict(prior=v, weight=v), weight=dict(weight=v), others=dict(spread='others'), each=dict(reduction='none'),
                              hot=dict(multi_hot=True, spread='others', weight=v), eps=dict(eps=v), float16=dict(dtype=torch.float16)).items():
        yield f'softmax, {name}, sm_90', 90, softmax_launches((4, 1000), **options)
    yield 'softmax, one class, int32, sm_90', 90, softmax_launches((64, 1), index=torch.int32)
    yield 'softmax, float64, sm_90', 90, softmax_launches((4, 40), torch.float64)
    yield 'softmax, long rows, soft, prior, weight, sm_90', 90, softmax_launches((4, 20000), soft=True, prior=torch.ones(20000), weight=torch.ones(20000))
    for dtype, target in product((torch.float32, torch.bfloat16), (torch.uint8, torch.bool, torch.float32)):
        yield f'sigmoid, {dtype}, {target}, sm_90'.replace('torch.', ''), 90, forwards(sigmoid_launches((64, 1000), dtype, target))
    yield 'sigmoid, float16, sm_90', 90, sigmoid_launches((64, 1000), torch.float16, early=False)
    yield 'sigmoid, each, sm_90', 90, sigmoid_launches((64, 1000), reduction='none', early=False)
    w = torch.ones(1000)
    yield 'sigmoid, factors, sm_90', 90, forwards(sigmoid_launches((64, 1000), prior=w, weight=w, pos_weight=w))
    yield 'sigmoid, sm_80', 80, forwards(sigmoid_launches((64, 1000)))
    yield 'sigmoid, after, sm_90', 90, sigmoid_launches((64, 1000))[-1:]


def compiled(capability, launches):
    "Of each kernel: spills, and how many loads and stores of 128 bits"
    res = {}
    for launch in launches:
        c = code(launch.compile(capability))
        res[launch.kernel.__name__] = [c.spills, c.loads.get(128, 0), c.stores.get(128, 0)]
    return res


RECORDED = json.loads(RECORD.read_text()) if RECORD.exists() else {}
ENTRIES = {name: (capability, launches) for name, capability, launches in entries()} if not fused.INTERPRETED else {}


@needs_ptxas
@pytest.mark.parametrize('name', ENTRIES)
def test_compiles_without_a_gpu(name):
    "every entry of the dispatch table: no spill, and no 128-bit access less, than recorded (python tests/test_triton.py records)"
    now, before = compiled(*ENTRIES[name]), RECORDED.get(VERSION, {}).get(name)
    if before is None: pytest.skip(f'compiles; nothing is recorded for Triton {VERSION}')
    assert now.keys() == before.keys()
    for kernel, (spills, loads, stores) in now.items():
        most, least_loads, least_stores = before[kernel]
        assert spills <= most, f'{kernel} spills {spills}, recorded {most}'
        assert (loads, stores) >= (least_loads, least_stores), f'{kernel} has {loads} and {stores} wide loads and stores, recorded {least_loads} and {least_stores}'


def test_everything_is_recorded():
    for version, entries in RECORDED.items(): assert entries.keys() == ENTRIES.keys(), f'recorded for Triton {version} is not what is compiled'


# ---------------------------------------------------------------- launches

def kernels(launches): return [launch.kernel.__name__ for launch in launches]


def test_launches():
    "two for few logits; for many, whose gradient is made with the loss, a look at the targets before, and after it one at the scale"
    for shape in ((64, 10), (512, 1000)): assert kernels(softmax_launches(shape)) == ['softmax_kernel'] * 2
    assert kernels(softmax_launches((4, 20000))) == ['softmax_kernel', 'gradient_kernel']
    assert kernels(softmax_launches((512, 1000), early=True)) == ['count_kernel', 'softmax_kernel', 'softmax_kernel']
    assert kernels(softmax_launches((512, 1000), early=True, reduction='sum')) == ['softmax_kernel'] * 2
    assert kernels(softmax_launches((512, 1000), early=True, soft=True)) == ['softmax_kernel'] * 2
    assert kernels(softmax_launches((4, 20000), early=True)) == ['count_kernel', 'softmax_kernel', 'gradient_kernel']
    for early in (True, False): assert kernels(sigmoid_launches((64, 20), early=early)) == ['sigmoid_kernel'] * 2


@pytest.mark.parametrize('shape', [(64, 10), (64, 20000), (8, 21, 16, 16)])
@pytest.mark.parametrize('early', [False, True])
def test_nothing_recompiles(shape, early):
    "for another batch size, eps or ignore_index"
    usual = {launch.key() for launch in softmax_launches(shape, early=early)}
    for n, eps, ignore_index in ((1, .1, -100), (17, .1, -100), (shape[0], 0., -100), (shape[0], 1., 1), (48, .25, 16)):
        assert {launch.key() for launch in softmax_launches((n, *shape[1:]), early=early, eps=eps, ignore_index=ignore_index)} <= usual
    assert {launch.key() for launch in sigmoid_launches((64, 20))} >= {launch.key() for n in (1, 3, 4096) for launch in sigmoid_launches((n, 20))}


def test_work_is_bounded():
    "however many logits: so many programs at most, and the sums of their sums as long"
    args = sigmoid_launches((fused.MAX_PROGRAMS * 4096 + 1,))[0].args
    assert args['tiles'] == fused.MAX_PROGRAMS and args['tail'] == 1 and len(args['sums']) == 3 * fused.MAX_PROGRAMS


# ---------------------------------------------------------------- how tensors are walked over

@pytest.mark.parametrize('shape,strides,outer,sizes', [
    ((64,), [(10,)], 64, (1, 1)), ((8, 4, 5), [(420, 5, 1)], 8, (1, 20)),                                       # (N,C) and (N,C,H,W)
    ((8, 4, 5), [(420, 105, 21)], 160, (1, 1)), ((8, 4, 5), [(840, 10, 1)], 8, (4, 5)),                         # channels_last; cut
    ((2, 3, 4), [(12, 4, 1), (12, 4, 1)], 24, (1, 1)), ((2, 3, 4), [(12, 4, 1), (0, 0, 1)], 6, (1, 4)),         # with a vector
    ((1, 3, 1), [(3, 1, 1)], 3, (1, 1)), ((), [()], 1, (1, 1))])
def test_walk(shape, strides, outer, sizes):
    walk = fused.walk(shape, *strides)
    assert (walk.outer, walk.sizes) == (outer, sizes)
    at = [sum(i * s for i, s in zip(index, strides[0])) for index in product(*map(range, (walk.outer, *walk.sizes)))]
    places = [sum(i * s for i, s in zip(index, walk.strides[0])) for index in product(*map(range, (walk.outer, *walk.sizes)))]
    truth = sorted(sum(i * s for i, s in zip(index, strides[0])) for index in product(*map(range, shape)))
    assert sorted(places) == truth and len(at) == len(truth)


def test_walk_too_many_axes():
    assert fused.walk((2, 2, 2, 2), (81, 27, 9, 3)) is None


# ---------------------------------------------------------------- asked for by name

def test_on_a_cpu_by_name():
    for f, y in ((smooth_cross_entropy, torch.tensor([0, 1])), (smooth_bce, torch.ones(2, 3))):
        with pytest.raises(ValueError, match="backend='triton' is for logits on a GPU, these are on cpu"): f(torch.zeros(2, 3), y, backend='triton')


@pytest.mark.parametrize('how', ['import', 'loss', 'module'])
def test_without_triton(how):
    "everything works; asked for by name, it is said what is missing"
    use = dict(loss="smooth_cross_entropy(x, y, backend='triton')", module="__import__('fastai_smooth.losses').losses.LabelSmoothingCrossEntropyFlat(backend='triton')").get(how, 'None')
    run = ("import sys; sys.modules['triton'] = None\nimport torch\nfrom fastai_smooth.kernels import smooth_cross_entropy\n"
           "x, y = torch.zeros(2, 3), torch.tensor([0, 1])\nsmooth_cross_entropy(x, y)\n"
           f"try: {use}\nexcept ImportError as e: print(e)")
    ended = subprocess.run([sys.executable, '-W', 'ignore', '-c', run], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if how != 'import': assert "backend='triton' needs the package triton" in ended.stdout and "backend='auto'" in ended.stdout


if __name__ == '__main__':
    RECORDED[VERSION] = {name: compiled(*of) for name, of in ENTRIES.items()}
    RECORD.write_text('{\n' + ',\n'.join(f'"{version}": {{\n' + ',\n'.join(f'  {json.dumps(k)}: {json.dumps(v)}' for k, v in of.items()) + '\n}'
                                         for version, of in sorted(RECORDED.items())) + '\n}\n')
