"""What is to be known of the Triton kernels on a GPU, as one JSON file and a table. Needs torch and Triton; benchmarks/gpu.sh calls it.

    python benchmarks/gpu.py check              one small run of each kernel, for compute-sanitizer
    python benchmarks/gpu.py measure OUT.json   bandwidth, launches, and the questions that only a measurement answers

`fastai_smooth bench --device cuda --backend triton` measures the losses beside their peers; this is what it does not ask."""
import json, statistics, sys, time
from functools import partial

import torch, torch.nn.functional as F
from triton.testing import do_bench, do_bench_cudagraph

from fastai_smooth import bench
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits, smooth_cross_entropy
from fastai_smooth.kernels.triton import launch, softmax
from fastai_smooth.kernels.triton.softmax import Tile

DEVICE = 'cuda'
ours = partial(smooth_cross_entropy, backend='triton')
torchs = partial(F.cross_entropy, label_smoothing=.1)


def inputs(n, k, dtype=torch.float32):
    return torch.randn(n, k, device=DEVICE).to(dtype).requires_grad_(), torch.randint(k, (n,), device=DEVICE)


def step(f, x, y, factor=None):
    def run():
        x.grad = None
        loss = f(x, y)
        (loss if factor is None else loss * factor).backward()
    return run


def check():
    "Every kernel with every sort of tile, of a few rows: early and late, long rows, images, ignored rows, factors, the sigmoid head"
    for early in (0, 10**6):
        launch.EARLY_MB = early
        for shape in ((33, 10), (33, 1001), (5, 20003), (2, 21, 7, 9)):
            x = torch.randn(shape, device=DEVICE, requires_grad=True)
            y = torch.randint(shape[1], shape[:1] + shape[2:], device=DEVICE)
            y.view(-1)[0] = -100
            w = torch.rand(shape[1], device=DEVICE) + .5
            for options in (dict(), dict(weight=w, prior=w/w.sum()), dict(reduction='none'), dict(spread='others')):
                loss = ours(x, y, .1, **options)
                torch.autograd.grad(loss, x, torch.full_like(loss, 2.))
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(33, 301, device=DEVICE, dtype=dtype, requires_grad=True)
            for reduction in ('mean', 'none'):
                loss = smooth_binary_cross_entropy_with_logits(x, (x > 1).to(torch.uint8), reduction=reduction, backend='triton')
                torch.autograd.grad(loss, x, torch.full_like(loss, 2.))
    torch.cuda.synchronize()
    print('checked')


def of_copy(f, x):
    "Time of a copy of the logits over that of `f()`, which is the share of the copy's bandwidth on a count of one read and one write."
    buffer, source = torch.empty_like(x.detach()), x.detach()
    times = {k: do_bench(g, warmup=10, rep=60, return_mode='median') for k, g in (('copy', lambda: buffer.copy_(source)), ('f', f))}
    return times['copy'] / times['f'], times['f'], 2 * x.nbytes / times['copy'] / 1e9


def tiles(k):
    "What may suit rows of `k` classes beside the table's choice: in a cluster of programs or in other blocks; several rows or one."
    whole = 1 << (k - 1).bit_length()
    if k > 16384: return [Tile(1, whole, 32, whole // 16384), Tile(1, whole, 16, whole // 8192), Tile(1, 16384, 32), Tile(1, 4096, 16)]
    if k > 4096: return [Tile(1, whole, 16), Tile(1, whole, 32, 2), Tile(1, 4096, 8)]
    return [Tile(rows, whole, warps) for rows, warps in ((1024 // whole or 1, 2), (2048 // whole or 1, 4), (2048 // whole or 1, 2), (4096 // whole or 1, 4), (4096 // whole or 1, 8))]


def question(name):
    "Runs a question, and keeps going where a GPU can't answer it."
    def wrap(f):
        def run(out):
            start = time.time()
            try: out[name] = f()
            except Exception as e: out[name] = f'{type(e).__name__}: {str(e)[:300]}'
            print(f'{name} ({time.time() - start:.0f} s)\n{json.dumps(out[name], indent=1)[:3000]}', flush=True)
        return run
    return wrap


@question('which tile: [share of copy, ms]')
def ask_tiles():
    res, table, early, end = {}, softmax.tile_for, launch.EARLY_MB, time.time() + 60
    for n, k, dtype in [(4096, 32000, torch.float32), (1024, 128256, torch.bfloat16), (256, 21843, torch.float32), (8192, 16384, torch.float32), (32768, 1000, torch.float32),
                        (8192, 4096, torch.bfloat16), (1 << 21, 10, torch.float32), (1024, 128256, torch.float32), (1 << 19, 64, torch.bfloat16)]:
        x, y = inputs(n, k, dtype)
        for tile in dict.fromkeys([table(k, 1), *tiles(k)]):
            if time.time() > end: res['not asked'] = 'the others: out of time'; break
            softmax.tile_for = lambda *_: tile
            key = f'{n}x{k} {str(dtype)[6:]} {tuple(tile)}' + (' (table)' if tile == table(k, 1) else '')
            try: res[key] = [round(v, 4) for v in of_copy(step(ours, x, y), x)[:2]]
            except Exception as e: res[key] = f'{type(e).__name__}: {str(e)[:80]}'
        del x, y
    softmax.tile_for, launch.EARLY_MB = table, early
    return res


@question('from how many MB on does the early gradient win: late / early')
def ask_early():
    res, before = {}, launch.EARLY_MB
    for k in (1000, 8192):
        for mb in (1, 4, 16, 32, 64, 128):
            x, y = inputs(mb * 2**18 // k, k)
            times = {}
            for launch.EARLY_MB in (0, 10**6): times[launch.EARLY_MB] = do_bench(step(ours, x, y), warmup=10, rep=50, return_mode='median')
            res[f'{mb} MB, {k} classes'] = round(times[10**6] / times[0], 3)
    launch.EARLY_MB = before
    return res


@question('few logits: device us of a captured step, host us until the call returns; ours, torch, ratio')
def ask_few():
    res = {}
    for n, k in ((64, 10), (512, 1000)):
        x, y = inputs(n, k)
        device, host = {}, {}
        for name, f in (('ours', ours), ('torch', torchs), ('hard', F.cross_entropy)):
            run = lambda: torch.autograd.grad(f(x, y), x)
            device[name] = 1000 * do_bench_cudagraph(run, rep=30)
            torch.cuda.synchronize()
            ts = []
            for _ in range(300):
                start = time.perf_counter()
                run()
                ts.append(1e6 * (time.perf_counter() - start))
            torch.cuda.synchronize()
            host[name] = statistics.median(ts)
        res[f'{n}x{k}'] = dict(device=device, host=host, device_ratio=device['ours'] / device['torch'], host_ratio=host['ours'] / host['torch'])
    return res


@question('scaled gradient, float16: torch / ours, Liger / ours')
def ask_scaled():
    peers = dict(ours=ours, torch=torchs)
    if bench._installed('liger_kernel'):
        from liger_kernel.transformers.functional import liger_cross_entropy
        peers['Liger'] = partial(liger_cross_entropy, label_smoothing=.1)
    res = {}
    for n, k in ((4096, 32000), (2048, 128256)):
        x, y = inputs(n, k, torch.float16)
        factor = torch.tensor(1024., device=DEVICE)
        times = {}
        for name, f in peers.items():
            leaf = x.detach().clone().requires_grad_()
            times[name] = do_bench(step(f, leaf, y, factor), warmup=10, rep=80, return_mode='median')
        res[f'{n}x{k}'] = {k: v / times['ours'] for k, v in times.items()} | dict(ms=times['ours'])
    return res


@question('relative error against float64, loss and gradient: ours, torch in float32')
def ask_accuracy():
    res = {}
    for n, k, offset in ((512, 1000, 0.), (512, 1000, 1000.), (256, 128256, 0.), (64, 200000, 0.)):
        x, y = inputs(n, k)
        with torch.no_grad(): x += offset
        row = {}
        d = x.detach().double().requires_grad_()
        truth = torchs(d, y)
        expected = truth.detach(), torch.autograd.grad(truth, d)[0]
        for name, f in (('ours', ours), ('torch', torchs)):
            loss = f(x, y)
            g, = torch.autograd.grad(loss, x)
            row[name] = [abs(loss.item() / expected[0].item() - 1), ((g.double() - expected[1]).norm() / expected[1].norm()).item()]
        res[f'{n}x{k} + {offset:g}'] = row
    return res


def measure(path):
    out = dict(machine=bench.machine(DEVICE), capability=torch.cuda.get_device_capability(), multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count,
               l2_mb=torch.cuda.get_device_properties(0).L2_cache_size / 2**20)
    x, _ = inputs(32768, 8192)
    out['copy, TB/s'] = of_copy(lambda: None, x)[2] / 1000
    del x
    for ask in (ask_few, ask_accuracy, ask_scaled, ask_early, ask_tiles):
        ask(out)
        with open(path, 'w') as f: json.dump(out, f, indent=1)   # whatever comes next, this is kept


if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] not in ('check', 'measure') or (sys.argv[1] == 'measure') != (len(sys.argv) == 3): sys.exit(__doc__)
    if not torch.cuda.is_available(): sys.exit('gpu.py: torch finds no GPU here')
    check() if sys.argv[1] == 'check' else measure(sys.argv[2])
