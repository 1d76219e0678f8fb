"""What decides the dispatch of the Triton kernels. `python benchmarks/gpu_choose.py OUT.json [tiles] [early] [sigmoid]`

Tiles by number of classes, the table's own first and a few others; early or late gradients; block and warps of the sigmoid kernel. Each as
share of what a copy of the logits takes. After each number of classes the file has the `best` table so far; `TILES=OUT.json` takes it."""
import sys, time
from itertools import product

import torch

from fastai_smooth.kernels.triton import sigmoid, softmax
from fastai_smooth.kernels.triton.softmax import Tile
from gpu_common import (DEVICE, START, Rows, copy_ms, dtype_of, early, free, ms, name_of, ours, ours_sigmoid, setting, sized, step_of,
                        usage, warm_up)

def tiles(*of): return [Tile(*t) for t in of]

CANDIDATES = {   # classes -> tiles beside the table's: (rows, block, warps, prefetch, programs)
    1000: tiles((1, 1024, 2), (1, 1024, 1, False, 32)),
    10: tiles((16, 16, 1), (32, 16, 4), (32, 16, 1)),
    64: tiles((4, 64, 1), (16, 64, 4, False, 32)),
    256: tiles((2, 256, 2), (1, 256, 1, False, 32)),
    4096: tiles((1, 2048, 4), (1, 2048, 4, True), (1, 1024, 4, True)),
    32: tiles((8, 32, 2), (16, 32, 1, False, 32)),
    21843: tiles((1, 2048, 8), (1, 4096, 16)),
    16384: tiles((1, 2048, 8, True), (1, 2048, 4, True)),
    8192: tiles((1, 4096, 8), (1, 4096, 8, True)),
    32000: tiles((1, 4096, 8), (1, 2048, 8, True)),
    2048: tiles((1, 2048, 2), (1, 2048, 4)),
    128: tiles((4, 128, 2), (8, 128, 2)),
    512: tiles((2, 512, 2), (1, 512, 1, False, 32)),
    128256: tiles((1, 16384, 32, True), (1, 2048, 8, True)),
}
def image_candidates(itemsize):
    "Beside the rule's: fewer warps, and twice as many logits a thread."
    at_once = 16 // itemsize
    return tiles((32 * at_once, 32 // at_once, 1), (64 * at_once, 32 // at_once, 2), (32 * at_once, 64 // at_once, 1))
IMAGE = (8, 21, 512, 512)
MB = 200      # of logits

def inputs(k, dtype, mb=MB, shape=None):
    "Logits that require a gradient, and their targets."
    dtype = dtype_of(dtype)
    shape = sized(shape or (max(1, (mb << 20) // (k * dtype.itemsize)), k))
    x = torch.randn(shape, device=DEVICE, dtype=dtype).mul_(3).requires_grad_()
    return x, torch.randint(shape[1], shape[:1] + shape[2:], device=DEVICE)

def with_tile(tile): return setting(softmax, tile_for=lambda *_: tile)

def tile_tasks():
    "(classes, dtype, shape of an image or None, tile), the table's own tile first. Images come second."
    cases = [(k, None) for k in CANDIDATES]
    cases.insert(1, (IMAGE[1], IMAGE))
    for (k, shape), dtype in product(cases, ('bfloat16', 'float32')):
        itemsize = dtype_of(dtype).itemsize
        own = softmax.tile_for(k, 1 if shape is None else shape[2] * shape[3], itemsize)
        yield from ((k, dtype, shape, tile) for tile in dict.fromkeys([own, *(image_candidates(itemsize) if shape else CANDIDATES[k])]))

def compile_tile(task):
    "Rows don't matter to what is compiled."
    k, dtype, shape, tile = task
    x, y = inputs(k, dtype, 0, shape and (1, *shape[1:]))
    with with_tile(tile), early(True): step_of(ours, x, y)()

def tile_row(task, x, y, copy):
    k, dtype, shape, tile = task
    with with_tile(tile):
        step = step_of(ours, x, y)
        used = usage(step)
        t = ms(step, 8)
    return dict(classes=k, dtype=dtype, images=shape is not None, tile=list(tile), ms=t, of_copy=copy / t, kernels=used)

def say(row):
    kernels = ' '.join(f'{n.removesuffix("_kernel")} {r}/{s}' for n, r, s in row.get('kernels', ()))
    return f"{100 * row['of_copy']:5.1f}% {row['ms']:8.4f} ms  {kernels}"

def measure_tiles(out, tasks):
    "All tiles of one number of classes after another."
    for key in dict.fromkeys(t[:3] for t in tasks):
        x, y = inputs(*key[:2], shape=key[2])
        copy = copy_ms(x)
        rows = []
        for task in (t for t in tasks if t[:3] == key):
            rows.append(out.run(f'{name_of(x.shape)} {key[1]} {tuple(task[3])}', tile_row, task, x, y, copy))
        good = {r['name']: r for r in rows if 'ms' in r}
        for name in dict.fromkeys([*list(good)[:1], *sorted(good, key=lambda n: good[n]['ms'])[:2]]):
            r = good[name]
            print(f"{r['name']:44}{'*' if r is rows[0] else ' '} {say(r)}", flush=True)
        del x, y
        free()
        out.data['best'] = best(out.data['rows'])
        out.write()

def best(rows):
    "The table with the tiles that took the least time, over both dtypes and all numbers of classes of an entry."
    table, least = [], 0
    for most, tile in softmax.TILES:
        of = [r for r in rows if 'ms' in r and not r['images'] and least < r['classes'] <= (most or 10**9)]
        times = {}
        for r in of: times.setdefault(tuple(r['tile']), {})[r['classes'], r['dtype']] = r['ms']
        fastest = {k: min(t[k] for t in times.values() if k in t) for t in times.values() for k in t}
        whole = {t: sum(ms / fastest[k] for k, ms in of.items()) for t, of in times.items() if of.keys() == fastest.keys()}
        table.append((most, min(whole, key=whole.get) if whole else tuple(tile)))
        least = most
    return table

def ask_early(out):
    "Late / early, by megabytes of logits."
    def row(k, mb):
        x, y = inputs(k, 'float32', mb)
        times = {}
        for on in (True, False):
            with early(on): times[on] = ms(step_of(ours, x, y))
        return dict(classes=k, mb=mb, early=times[True], late=times[False], ratio=times[False] / times[True])
    for mb, k in product((32, 16, 64), (1000, 8192, 32000)):
        out.run(f'{mb} MB, {k} classes: late / early', row, k, mb, say=lambda r: f"{r['ratio']:.2f}  early {r['early']:.4f} ms")

SIGMOID = (1024, 4), (2048, 8), (512, 2)
def sigmoid_tasks(): return [(dtype, *o) for dtype, o in product(('float32', 'bfloat16'), SIGMOID)]

def compile_sigmoid(task):
    dtype, block, warps = task
    x = torch.randn(sized((64, 10000)), device=DEVICE).to(dtype_of(dtype)).requires_grad_()
    with setting(sigmoid, BLOCK=block, WARPS=warps): step_of(ours_sigmoid, x, (x > 1).to(torch.uint8))()

def ask_sigmoid(out):
    for dtype in ('float32', 'bfloat16'):
        x = torch.randn(sized((8192 if dtype == 'bfloat16' else 4096, 10000)), device=DEVICE).to(dtype_of(dtype)).requires_grad_()
        y, copy = (x > 1).to(torch.uint8), copy_ms(x)
        def row(block, warps):
            with setting(sigmoid, BLOCK=block, WARPS=warps):
                step = step_of(ours_sigmoid, x, y)
                return dict(kernels=usage(step), ms=(t := ms(step, 8)), of_copy=copy / t)
        for block, warps in SIGMOID: out.run(f'sigmoid {dtype} BLOCK={block} WARPS={warps}', row, block, warps, say=say)

def compile_both(task):
    "Early and late, with the table's tile."
    x, y = inputs(*task, 0)
    for on in (True, False):
        with early(on): step_of(ours, x, y)()

def compile_any(task): return task[0](task[1])

def main(path, parts=('tiles', 'early', 'sigmoid')):
    out, tasks = Rows(path), list(tile_tasks()) * ('tiles' in parts)
    some = [(compile_tile, t) for t in tasks] + [(compile_sigmoid, t) for t in sigmoid_tasks()] * ('sigmoid' in parts)
    some += [(compile_both, (k, 'float32')) for k in (1000, 8192, 32000)] * ('early' in parts)
    warm_up(compile_any, some, 45)
    print('share of a copy, ms, registers/spills of each kernel; * is the table\'s tile')
    measure_tiles(out, tasks)
    print(*out.data.get('best', ()), sep='\n')
    for part, ask in (('early', ask_early), ('sigmoid', ask_sigmoid)):
        if part in parts: ask(out)
    print(f'{time.time() - START:.0f} s')
    return out.failed()

if __name__ == '__main__': sys.exit(main(sys.argv[1], *([sys.argv[2:]] if sys.argv[2:] else [])))
