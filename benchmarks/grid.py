"""PyTorch's time over ours for many shapes and options: where it is below 1, ours is the slower one.

    OMP_NUM_THREADS=2 python benchmarks/grid.py --out benchmarks/grid-after.json [--dtype bfloat16] [--seconds 1] [--only TEXT]
    python benchmarks/grid.py --table BEFORE.json AFTER.json ... > benchmarks/grid.md

A cell is a loss with one option, of logits of one shape. Timed are forward and backward; under `no_grad`, the forward alone. Ours and
its peer run in pairs, one after the other in a random order, and ratios are taken within a pair. Before that, loss and gradient are
compared with PyTorch's in float64. The table has a column for each file, of which it takes any number.

The peer is PyTorch's loss with the same option; for sigmoids, labels are smoothed in the call. PyTorch has no prior, and no smoothing
where classes are masked. These are measured beside our own loss without them, which says what they cost; and the prior with a row for
each class beside PyTorch's cross entropy of soft labels that are made in the call, too.

On Linux, MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 in the environment keeps freed memory, as caching
allocators do; without, getting fresh pages weighs most for large logits. With another checkout in PYTHONPATH its losses are timed."""
import argparse, json, random, statistics, time
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch, torch.nn.functional as F

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits, smooth_cross_entropy
from machine import machine

EPS, SIGMOID_EPS = .1, .05
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative, of loss and gradient
LEAST = 7  # pairs, however long they take


class Cell(NamedTuple):
    head: str           # 'softmax' or 'sigmoid'
    option: str         # what is not as in a plain call
    shape: tuple        # of the logits, classes along axis 1
    peer: str = 'PyTorch'

    def __str__(self): return f"{'sigmoid:' if self.head == 'sigmoid' else ''}{'x'.join(map(str, self.shape))} {self.option}"


SHAPES = (64, 10), (64, 1000), (512, 1000), (256, 21843), (8, 21, 128, 128), (2, 10, 256, 256), (16, 3, 64, 64)
OPTIONS = ('plain', 'eps=0', 'weight', 'ignore_index', "reduction='none'", "weight, reduction='none'", 'soft labels',
           'channels_last', 'no_grad')
SIGMOID_SHAPES = (64, 20), (256, 1000), (4096, 1000), (8, 1, 256, 256)
SIGMOID_OPTIONS = 'plain', "reduction='none'", 'pos_weight', 'no_grad'

CELLS = [Cell('softmax', option, shape) for option, shape in product(OPTIONS, SHAPES) if option != 'channels_last' or len(shape) == 4]
CELLS += [Cell('softmax', 'plain', (1024, 60000))]
CELLS += [Cell('softmax', 'prior [K,K]', shape, peer) for shape in ((512, 1000), (4096, 1000))
          for peer in ('ours without', 'PyTorch, soft labels')]
CELLS += [Cell('softmax', option, (512, 1000), 'ours without') for option in ('prior [K]', 'masked classes')]
CELLS += [Cell('sigmoid', *o) for o in product(SIGMOID_OPTIONS, SIGMOID_SHAPES)]


# --- what is timed: each function gives ours and the peer, both as (logits, loss of them), and what our loss should be of float64 logits

def softmax(cell, dtype):
    (n, k, *rest), options = cell.shape, {}
    eps = 0. if cell.option == 'eps=0' else EPS
    x = (torch.randn(cell.shape) * 3).to(dtype)
    if cell.option == 'channels_last': x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_(cell.option != 'no_grad')
    y = torch.randn(cell.shape).softmax(1) if cell.option == 'soft labels' else torch.randint(k, (n, *rest))
    if 'weight' in cell.option: options['weight'] = torch.rand(k) + .5
    if 'none' in cell.option: options['reduction'] = 'none'
    if cell.option == 'ignore_index': y.view(-1)[::7] = -100
    def pytorch(dtype): return partial(F.cross_entropy, label_smoothing=eps, **cast(dict(target=y, **options), dtype))
    return (x, partial(smooth_cross_entropy, target=y, eps=eps, **options)), (x, pytorch(dtype)), pytorch(torch.float64)


def with_prior(cell, dtype):
    n, k = cell.shape
    x, y = (torch.randn(n, k) * 3).to(dtype).requires_grad_(), torch.randint(k, (n,))
    prior = torch.randn(k, k).softmax(1) if cell.option == 'prior [K,K]' else torch.randn(k).softmax(0)
    def of_soft_labels(x, prior):
        q = EPS * (prior[y] if prior.dim() == 2 else prior.expand(n, k))
        q[torch.arange(n), y] += 1 - EPS
        return F.cross_entropy(x, q)
    without = partial(smooth_cross_entropy, target=y, eps=EPS)
    peer = without if cell.peer == 'ours without' else partial(of_soft_labels, prior=prior.to(dtype))
    return (x, partial(without, prior=prior)), (x, peer), partial(of_soft_labels, prior=prior.double())


def masked(cell, dtype):
    n, k = cell.shape
    left = k - k//10
    x, y = (torch.randn(n, k) * 3).to(dtype), torch.randint(left, (n,))
    ours, some = partial(smooth_cross_entropy, target=y, eps=EPS), x.clone()
    some[:, left:] = -torch.inf
    return (some.requires_grad_(), ours), (x.requires_grad_(), ours), lambda x: F.cross_entropy(x[:, :left], y, label_smoothing=EPS)


def sigmoid(cell, dtype):
    x = (torch.randn(cell.shape) * 3).to(dtype).requires_grad_(cell.option != 'no_grad')
    y, options = torch.rand(cell.shape) < .1, {}
    if cell.option == 'pos_weight': options['pos_weight'] = torch.rand(cell.shape[-1]) + .5
    if 'none' in cell.option: options['reduction'] = 'none'
    def of_smoothed(x, **options):
        q = y.to(x.dtype)*(1 - 2*SIGMOID_EPS) + SIGMOID_EPS
        return F.binary_cross_entropy_with_logits(x, q, **options)
    def pytorch(dtype): return partial(of_smoothed, **cast(options, dtype))
    ours = partial(smooth_binary_cross_entropy_with_logits, target=y, eps=SIGMOID_EPS, **options)
    return (x, ours), (x, pytorch(dtype)), pytorch(torch.float64)


def cast(options, dtype):
    "PyTorch wants weights and soft labels in the dtype of the logits."
    return {n: o.to(dtype) if isinstance(o, torch.Tensor) and o.is_floating_point() else o for n, o in options.items()}


# --- measuring

def check(cell, x, ours, expected):
    "Loss and gradient are those of PyTorch in float64, or this raises a ValueError."
    d = x.detach().double().requires_grad_(x.requires_grad)
    loss, right = ours(x), expected(d)
    pairs = [('loss', loss, right)]
    if x.requires_grad: pairs.append(('gradient', *torch.autograd.grad(loss.sum(), x), *torch.autograd.grad(right.sum(), d)))
    for name, a, b in pairs:
        error = ((a.double() - b).norm() / b.norm()).item()
        if not error <= TOLERANCE[x.dtype]: raise ValueError(f'{cell}: our {name} is off by {error:.1e}')


def seconds_of(x, loss_func):
    x.grad = None
    start = time.perf_counter()
    loss = loss_func(x)
    if x.requires_grad: loss.sum().backward()
    return time.perf_counter() - start


def in_pairs(ours, peer, seconds):
    "Seconds of ours and of the peer, pair by pair, after a warm-up."
    for _ in range(3): seconds_of(*ours), seconds_of(*peer)
    pairs, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < LEAST:
        if random.random() < .5: a, b = seconds_of(*ours), seconds_of(*peer)
        else: b, a = seconds_of(*peer), seconds_of(*ours)
        pairs.append((a, b))
    return pairs


def quartiles(xs):
    q1, q2, q3 = statistics.quantiles(xs, n=4, method='inclusive')
    return [round(o, 4) for o in (q2, q1, q3)]


def measure(cell, dtype, seconds):
    torch.manual_seed(0)
    make = sigmoid if cell.head == 'sigmoid' else with_prior if 'prior' in cell.option else masked if 'masked' in cell.option else softmax
    with torch.set_grad_enabled(cell.option != 'no_grad'):
        ours, peer, expected = make(cell, dtype)
        check(cell, *ours, expected)
        pairs = in_pairs(ours, peer, seconds)
    ratio, ms = quartiles([b/a for a, b in pairs]), quartiles([1e3*a for a, _ in pairs])
    return dict(name=str(cell), **cell._asdict(), ratio=ratio, ms=ms, pairs=len(pairs))


def slower(rows):
    "How many cells are slower than PyTorch, in words."
    rs = [r['ratio'][0] for r in rows if r['peer'] == 'PyTorch']
    if not rs: return 'no cell beside PyTorch'
    return f'{sum(r < .95 for r in rs)} of {len(rs)} cells are slower than PyTorch (below .95), the median is {statistics.median(rs):.2f}'


def table(files):
    "All cells of the files as Markdown: the ratio, and milliseconds of ours."
    runs = {Path(f).stem.removeprefix('grid-'): json.loads(Path(f).read_text()) for f in files}
    lines = ['# Our losses beside PyTorch, with many shapes and options', '',
             'How many times as long as ours the peer takes, so below 1 ours is the slower one; and our milliseconds. How it is measured:',
             'the docstring of [grid.py](grid.py). Quartiles are in the JSON files; single cells move by a tenth from run to run.', '']
    for name, run in runs.items():
        about = ', '.join(f'{k} {run["machine"][k]}' for k in ('date', 'cpu', 'threads', 'torch', 'malloc'))
        lines.append(f"- {name}: {slower(run['rows'])}. {run['dtype']}, {about}")
    columns = [{(r['name'], r['peer']): f"{r['ratio'][0]:.2f} ({r['ms'][0]:.3g} ms)" for r in run['rows']} for run in runs.values()]
    lines += ['', f"| {' | '.join(['logits', 'beside', *runs])} |", '|---'*(2 + len(runs)) + '|']
    lines += [f"| {' | '.join([*key, *(c.get(key, '') for c in columns)])} |" for key in dict.fromkeys(k for c in columns for k in c)]
    return '\n'.join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument('--out', help='JSON file to write to')
    p.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32', help='of the logits (default: float32)')
    p.add_argument('--seconds', type=float, default=1., help=f'for each cell; at least {LEAST} pairs (default: 1)')
    p.add_argument('--only', default='', metavar='TEXT', help='the cells with this in their name, such as weight or 512x1000')
    p.add_argument('--table', nargs='+', metavar='FILE', help='measure nothing, print these files as a table')
    args = p.parse_args()
    if args.table: return print(table(args.table))
    rows = []
    for cell in (c for c in CELLS if args.only in str(c)):
        rows.append(r := measure(cell, getattr(torch, args.dtype), args.seconds))
        print(f"{r['ratio'][0]:5.2f}  {cell!s:41} {cell.peer:20}  ours {r['ms'][0]:.3f} ms", flush=True)
    print(slower(rows))
    if args.out: Path(args.out).write_text(json.dumps(dict(machine=machine('cpu'), dtype=args.dtype, rows=rows), indent=1) + '\n')


if __name__ == '__main__': main()
