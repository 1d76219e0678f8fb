"""The loss of a linear layer's logits, made some rows at a time, beside all logits at once.

    python benchmarks/linear.py benchmarks/linear.json [--seconds 5] [--only TEXT] [--cpu-time]
    python benchmarks/linear.py --table benchmarks/linear.json > benchmarks/linear.md

Needs torch and fastai_smooth.kernels alone; it takes a GPU where torch finds one, and then Triton for ours. A step is forward and
backward of the mean loss, from the input of the layer to the gradients of input, weight and bias. The layer has 400 features and the
input 2304 rows (32 texts of 72 tokens, as fastai's language models have) where nothing else is said. Contenders:

    PyTorch                F.cross_entropy(F.linear(...), label_smoothing=.1); of several labels, smoothed ones are made in the step
    PyTorch in chunks      F.linear_cross_entropy with options for chunks; where it smooths, it makes all logits
    hard in its chunks     the same without smoothing: chunks of as many rows as PyTorch chooses
    hard in our chunks     the same: of as many rows as ours have
    ours                   smooth_cross_entropy(F.linear(...))
    ours in chunks         smooth_linear_cross_entropy; 'chunks of N' with chunk_rows=N
    Liger                  its fused linear cross entropy, on a GPU where it is installed

Before it is timed, each one's loss and gradients are compared with the formula in float64, on as many rows as have 10 million logits.
Then rounds run all contenders of a case in a random order, and ratios are taken within a round, to 'ours'. On a machine that has other
work, take --cpu-time and OMP_NUM_THREADS=1 in the environment: then it is the time that the process had on a core.

Memory is the most bytes that a step has allocated at any one time, less the gradients it leaves: weights, input and targets were there
before. It is what torch's allocator gives out: on a CPU, what BLAS takes for itself isn't seen."""
import argparse, gc, json, os, random, statistics, sys, time, warnings
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('KINETO_LOG_LEVEL', '99')   # the profiler, which measures memory, would chat on stderr
import torch, torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fastai_smooth.kernels import (smooth_binary_cross_entropy_with_logits, smooth_cross_entropy,
                                   smooth_linear_binary_cross_entropy_with_logits, smooth_linear_cross_entropy)
from fastai_smooth.kernels.linear import LinearLogits
from machine import machine

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BACKEND = 'triton' if DEVICE == 'cuda' else 'torch'
FEATURES, ROWS, EPS, SIGMOID_EPS = 400, 2304, .1, .05
TOLERANCE = {'float32': 1e-5, 'bfloat16': 2e-2}   # relative, of loss and gradients
CHECKED = 10**7   # logits
LEAST = 3   # rounds, however long they take
CHUNK_ROWS = 64, 128, 256, 512, 1024


class Case(NamedTuple):
    classes: int
    rows: int = ROWS
    option: str = 'plain'   # what is not as in a plain call

    def __str__(self): return f'{self.rows}x{self.classes} {self.option}'


MIDDLE = 16000
CASES = [Case(k) for k in (1000, 4000, MIDDLE, 60000, 128000)]
CASES += [Case(MIDDLE, n) for n in (512, 4096, 8192)]
CASES += [Case(MIDDLE, option=o) for o in ('frozen weight', 'prior [K]', "reduction='none'", 'bfloat16', 'sigmoid')]
CASES += [Case(k, n, 'chunk_rows') for k, n in ((1000, ROWS), (MIDDLE, ROWS), (128000, 512))]


# --- what is timed

def dtype_of(case): return 'bfloat16' if case.option == 'bfloat16' else 'float32'

def data(case):
    "Input, weight and bias of the layer, which want gradients unless they are frozen; targets; options of the loss; weights of the losses."
    torch.manual_seed(0)
    k, n = case.classes, case.rows
    parts = [torch.randn(n, FEATURES), torch.randn(k, FEATURES) / FEATURES**.5, torch.randn(k)]
    y, options = torch.randint(k, (n,)), {}
    if case.option == 'sigmoid': y = (torch.rand(n, k) < .01).byte()
    if case.option == 'prior [K]': options['prior'] = torch.rand(k).softmax(0).to(DEVICE)
    if 'none' in case.option: options['reduction'] = 'none'
    parts = [v.to(DEVICE).requires_grad_(i == 0 or case.option != 'frozen weight') for i, v in enumerate(parts)]
    return parts, y.to(DEVICE), options, torch.rand(n, device=DEVICE)

def of_smoothed(x, y, **_):
    return F.binary_cross_entropy_with_logits(x, y.to(x.dtype)*(1 - 2*SIGMOID_EPS) + SIGMOID_EPS)

def contenders(case):
    "By name, functions of input, weight, bias and targets, with the options of the loss."
    whole = lambda loss: lambda h, w, b, y, **options: loss(F.linear(h, w, b), y, **options)
    if case.option == 'sigmoid':
        loss = partial(smooth_binary_cross_entropy_with_logits, eps=SIGMOID_EPS, backend=BACKEND)
        res = {'PyTorch': whole(of_smoothed), 'ours': whole(loss)}
        chunks = partial(smooth_linear_binary_cross_entropy_with_logits, eps=SIGMOID_EPS, backend=BACKEND)
    else:
        res = {'PyTorch': whole(partial(F.cross_entropy, label_smoothing=EPS)), **pytorch_chunks(case), **liger(),
               'ours': whole(partial(smooth_cross_entropy, eps=EPS, backend=BACKEND))}
        chunks = partial(smooth_linear_cross_entropy, eps=EPS, backend=BACKEND)
    def in_chunks(h, w, b, y, **options): return chunks(h, w, y, linear_bias=b, **options)
    res['ours in chunks'] = in_chunks
    if case.option == 'prior [K]': res = {k: f for k, f in res.items() if k.startswith('ours')}   # others have none
    if case.option == 'chunk_rows': res = {k: res[k] for k in ('ours', 'ours in chunks')} | {
        f'chunks of {n}': partial(in_chunks, chunk_rows=n) for n in CHUNK_ROWS}
    return res

def pytorch_chunks(case):
    "PyTorch's own, where it has them."
    if not hasattr(torch.nn, 'LinearCrossEntropyOptions') or case.option not in ('plain', "reduction='none'"): return {}
    def f(h, w, b, y, label_smoothing=0., **options):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')   # with smoothing it says that it has no chunks
            return F.linear_cross_entropy(h, w, y, linear_bias=b, label_smoothing=label_smoothing, **options)
    Options = torch.nn.LinearCrossEntropyOptions
    its, our = Options(), Options(batch_chunk_size=default_rows(case), chunking_method=None)
    res = {'hard in our chunks': partial(f, options=our)} if case.rows == ROWS and case.classes <= 60000 else {}
    if case == Case(MIDDLE): res['hard in its chunks'] = partial(f, options=its)   # of few rows, which takes long
    if case == Case(MIDDLE): res['PyTorch in chunks'] = partial(f, options=its, label_smoothing=EPS)
    return res

def default_rows(case):
    like = torch.empty(1, 1, device=DEVICE)
    return min(case.rows, LinearLogits(like, like.expand(case.classes, 1)).chunk_rows)

def liger():
    if DEVICE == 'cpu': return {}
    try: from liger_kernel.transformers import functional
    except ImportError: return {}
    def f(h, w, b, y, **options): return functional.liger_fused_linear_cross_entropy(h, w, y, bias=b, label_smoothing=EPS, **options)
    return {'Liger': f}

def step_of(f, case, parts, y, options, factors):
    "A function of nothing that gives loss and gradients. As in a model, nothing adds to a leaf's gradient."
    leaves = [v for v in parts if v.requires_grad]
    cast = partial(torch.autocast, DEVICE, torch.bfloat16) if case.option == 'bfloat16' else nullcontext
    def step():
        with cast():
            loss = f(*parts, y, **options)
            if loss.dim(): loss = (loss * factors).mean()
        return loss.detach(), *torch.autograd.grad(loss, leaves)
    return step


# --- measuring

def expected(case, parts, y, options, factors, eps):
    "Loss and gradients in float64, by the formula."
    parts = [v.detach().double().requires_grad_(v.requires_grad) for v in parts]
    x = F.linear(*parts)
    if case.option == 'sigmoid': loss = of_smoothed(x, y)
    else:
        q = smooth_q(y, case.classes, eps, options.get('prior'))
        loss = -(q * x.log_softmax(1)).sum(1)
        loss = (loss * factors).mean() if 'reduction' in options else loss.mean()
    return loss.detach(), *torch.autograd.grad(loss, [v for v in parts if v.requires_grad])

def smooth_q(y, k, eps, prior):
    "(1 - eps) * onehot(y) + eps * u"
    u = torch.full((k,), 1/k, dtype=torch.double, device=y.device) if prior is None else prior.double()
    return (eps * u).repeat(len(y), 1).scatter_add_(1, y[:, None], torch.full((len(y), 1), 1 - eps, dtype=torch.double, device=y.device))

def checked(case):
    "The contenders whose loss and gradients are right, and why the others are left out; where ours are wrong, a ValueError."
    some = case._replace(rows=max(1, min(case.rows, CHECKED // case.classes)))
    args, right, res, out = data(some), {}, {}, {}
    for name, f in contenders(case).items():
        eps = 0. if name.startswith('hard') else EPS
        if eps not in right: right[eps] = expected(some, *args, eps)
        try:
            pairs = zip(step_of(f, some, *args)(), right[eps])
            error = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
            wrong = '' if error <= TOLERANCE[dtype_of(case)] else f'wrong by {error:.1e}'
        except Exception as e: wrong = f'{type(e).__name__}: {str(e)[:200]}'
        if not wrong: res[name] = f
        elif 'hard' in name or name.startswith(('PyTorch', 'Liger')): out[name] = wrong
        else: raise ValueError(f'{case}, {name}: {wrong}')
    return res, out

def seconds_of(step, clock):
    if DEVICE == 'cuda': torch.cuda.synchronize()
    start = clock()
    step()
    if DEVICE == 'cuda': torch.cuda.synchronize()
    return clock() - start

def in_rounds(steps, seconds, clock):
    "By name, seconds of each, one a round."
    times, names, shuffle = {k: [] for k in steps}, [*steps], random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[names[0]]) < LEAST:
        shuffle(names)
        for k in names: times[k].append(seconds_of(steps[k], clock))
    return times

def peak_mb(step):
    "The most that a step has allocated at any one time, less its gradients, in MB (10**6 bytes)."
    gc.collect()
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _, *grads = step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: _, *grads = step()
        events = sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns())
        peak = max(accumulate((e.nbytes() for e in events), initial=0))
    return (peak - sum(g.nbytes for g in grads)) / 1e6

def quartiles(xs):
    q1, q2, q3 = statistics.quantiles(xs, n=4, method='inclusive')
    return [float(f'{o:.4g}') for o in (q2, q1, q3)]

def measure(case, seconds, clock=time.perf_counter):
    fs, out = checked(case)
    args = data(case)
    steps = {name: step_of(f, case, *args) for name, f in fs.items()}
    peaks = {name: round(peak_mb(step), 2) for name, step in steps.items()}   # which warms up, too
    times = in_rounds(steps, seconds, clock)
    def row(name):
        ratios = [a/b for a, b in zip(times[name], times['ours'])]
        return dict(ms=quartiles([1e3*t for t in times[name]]), ratio=quartiles(ratios), peak_mb=peaks[name])
    return dict(name=str(case), **case._asdict(), rounds=len(times['ours']), chunk_rows=default_rows(case),
                logits_mb=case.rows * case.classes * (2 if case.option == 'bfloat16' else 4) / 1e6, by={k: row(k) for k in steps}, left_out=out)


# --- what is written

def line(row):
    return f"{row['name']:28}" + '  '.join(f"{k} {r['ms'][0]:.0f} ms {r['ratio'][0]:.2f} {r['peak_mb']:.0f} MB" for k, r in row['by'].items())

def number(v): return f'{v:,.0f}' if v >= 10 else f'{v:.1f}'

def markdown_table(head, rows): return [f'| {" | ".join(o)} |' for o in (head, ['---']*len(head), *rows)]

def wide(rows, first, cell):
    "A table with a column for each contender."
    names = list(dict.fromkeys(k for r in rows for k in r['by']))
    return markdown_table([*first, *names], ([r['name'], *(f(r) for f in first.values() if f), *(cell(r['by'][k]) if k in r['by'] else '' for k in names)]
                                             for r in rows))

def told(r): return '{:.2f} [{:.2f}, {:.2f}]'.format(*r['ratio'])

def markdown(run):
    "The tables of a run."
    m, rows = run['machine'], run['rows']
    cases, chunks = ([r for r in rows if (r['option'] == 'chunk_rows') == is_chunks] for is_chunks in (False, True))
    on = m['gpu'] or f"{m['cpu']}, {m['threads']} thread(s), malloc {m['malloc']}"
    of = "Time of the process on a core" if run['cpu_time'] else 'Time by the clock'
    lines = ['# The loss of a linear layer, some rows of its logits at a time', '',
             'Forward and backward, with the gradients of input, weight and bias. What the contenders are, and how it is measured: the docstring of',
             f"[linear.py](linear.py). {on}, torch {m['torch']}, {m['date']}; load of the machine before {run['load']}.", '',
             "All but 'chunks' make all logits; PyTorch's own chunks do, too, where it smooths, so that its 'hard' ones are shown beside",
             "them: with as many rows as its own rule takes, and with as many as ours. What is empty was not measured.", '',
             f'Logits are of rows x classes, in float32, from {FEATURES} features. ' + summary(cases), '',
             '## Time', '', f"{of}: how many times as long as 'ours', which has all logits; median and quartiles over rounds. Hard: without smoothing.", '',
             *wide(cases, {'logits': None, 'ours, ms': lambda r: number(r['by']['ours']['ms'][0])}, told), '',
             '## Memory', '', 'The most MB that are allocated at any one time, beyond weights, input and their gradients.', '',
             *wide(cases, {'logits': None, 'their MB': lambda r: number(r['logits_mb']), 'rows in a chunk': lambda r: str(r['chunk_rows'])},
                   lambda r: number(r['peak_mb']))]
    if chunks: lines += ['', '## How many rows in a chunk?', '', "How many times as long as 'ours', and MB.", '', *wide(
        chunks, {'logits': None, 'rows in a chunk': lambda r: str(r['chunk_rows'])}, lambda r: f"{told(r)}, {number(r['peak_mb'])} MB")]
    out = [f"- {r['name']}, {k}: {v}" for r in rows for k, v in r['left_out'].items()] + [f'- {k}: {v}' for k, v in run['failed'].items()]
    return '\n'.join(lines + (['', '## Left out', '', *out] if out else [])) + '\n'

def summary(rows):
    "The goal, in a sentence."
    both = [r for r in rows if 'ours in chunks' in r['by']]
    if not both: return ''
    slow = [f"{r['name']} ({r['by']['ours in chunks']['ratio'][0]:.2f})" for r in both if r['by']['ours in chunks']['ratio'][0] > 1.15]
    return (f"In {len(both) - len(slow)} of {len(both)} cases 'ours in chunks' takes at most 1.15 times as long as 'ours'"
            + (f"; it takes longer in {', '.join(slow)}." if slow else '.'))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument('out', nargs='?', help='JSON file to write to, after each case')
    p.add_argument('--seconds', type=float, default=5., help=f'for each case; at least {LEAST} rounds (default: 5)')
    p.add_argument('--only', default='', metavar='TEXT', help='the cases with this in their name, such as sigmoid or 512x16000')
    p.add_argument('--cpu-time', action='store_true', help='time on a core, rather than by the clock')
    p.add_argument('--table', metavar='FILE', help='measure nothing, print this file as tables')
    args = p.parse_args()
    if args.table: return print(markdown(json.loads(Path(args.table).read_text())), end='')
    run = dict(machine=machine(DEVICE), cpu_time=args.cpu_time, load=round(os.getloadavg()[0], 1), rows=[], failed={})
    def write():
        if args.out: Path(args.out).write_text(json.dumps(run, indent=1) + '\n')
    for case in (c for c in CASES if args.only in str(c)):
        try:
            run['rows'].append(measure(case, args.seconds, time.process_time if args.cpu_time else time.perf_counter))
            print(line(run['rows'][-1]), flush=True)
        except Exception as e:   # such as too little memory: the others are still worth their time
            run['failed'][str(case)] = f'{type(e).__name__}: {str(e)[:200]}'
            print(f"{case!s:28}{run['failed'][str(case)]}", flush=True)
        write()
        if DEVICE == 'cuda': torch.cuda.empty_cache()
    return len(run['failed']) > 0


if __name__ == '__main__': sys.exit(main())
