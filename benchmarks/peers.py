"""What `fastai_smooth bench` measures, beside more peers: losses compiled by torch.compile, timm's, and whole steps of a Learner.

    OMP_NUM_THREADS=2 python benchmarks/peers.py --json benchmarks/cpu.json [--seconds 3] [--shapes 64x10 ...]

nbs/measured.ipynb shows `summary` of that file. Liger-Kernel needs a GPU: gpu_table.py has it."""
import argparse, json, random, statistics, time, warnings
from functools import partial
from pathlib import Path

import torch, torch.nn.functional as F
from torch import nn
warnings.filterwarnings('ignore', category=FutureWarning) # fastai's own use of torch.jit.script
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.torch_core import TensorBase
from fastai.vision.all import Callback, DataLoader, DataLoaders, Learner, TensorCategory, TensorImage, TensorMultiCategory, xresnet18

from fastai_smooth import losses
from fastai_smooth.bench import EPS, SHAPES, SIGMOID_EPS, in_rounds, measure, ratio, table, told
from fastai_smooth.callback import MultiLabelSmoothingCallback
from fastai_smooth.online import OnlineLabelSmoothing

from machine import machine

HALF = ['64x10', '512x1000', '256x21843', 'sigmoid:256x1000'] # also in bfloat16 and float16

def smoothed_bce(x, y): return F.binary_cross_entropy_with_logits(x, y.to(x.dtype)*(1-2*SIGMOID_EPS) + SIGMOID_EPS)

def peers(shape):
    "By name, functions of logits and targets"
    res = {'torch compiled': partial(F.cross_entropy, label_smoothing=EPS), 'hard compiled': F.cross_entropy}
    if 'sigmoid' in shape: res = {'eager compiled': smoothed_bce}
    res = {k: torch.compile(f, dynamic=False) for k, f in res.items()}
    try: from timm.loss import LabelSmoothingCrossEntropy
    except ImportError: return res
    return res | ({} if 'sigmoid' in shape or shape.count('x') > 1 else {'timm': LabelSmoothingCrossEntropy(EPS)})


# --- whole training steps of an xresnet18 on 64 images of 32 x 32 pixels

def learner(loss_func, multi=False, cbs=(), batches=2, device='cpu'):
    torch.manual_seed(0)
    xs, ys = torch.randn(64*batches, 3, 32, 32), torch.randint(10, (64*batches,))
    ys = [TensorMultiCategory(F.one_hot(y, 10).float()) for y in ys] if multi else [TensorCategory(y) for y in ys]
    items = list(zip(map(TensorImage, xs), ys))
    dls = DataLoaders(DataLoader(items, bs=64), DataLoader(items[:64], bs=64), device=torch.device(device))
    return Learner(dls, xresnet18(n_out=10), loss_func=loss_func, cbs=list(cbs))

class Start(Callback):
    order = -10**6 # before all others
    def before_batch(self): self.learn.step_start = time.perf_counter()

class Stop(Callback):
    order = 10**6 # after all others
    def __init__(self): self.times = []
    def after_batch(self):
        if next(self.model.parameters()).is_cuda: torch.cuda.synchronize()
        if self.training: self.times.append(time.perf_counter() - self.learn.step_start)

def learner_steps(rounds=50, **kwargs):
    "Rows as of `measure`, of one batch from before_batch to after_batch; a round is an epoch of each Learner"
    learners = {'ours Flat': learner(losses.LabelSmoothingCrossEntropyFlat(EPS), **kwargs), 'fastai Flat': learner(LabelSmoothingCrossEntropyFlat(EPS), **kwargs),
                'online': learner(CrossEntropyLossFlat(), cbs=[OnlineLabelSmoothing()], **kwargs),
                'multi-label, no callback': learner(BCEWithLogitsLossFlat(), True, **kwargs),
                'multi-label, callback': learner(BCEWithLogitsLossFlat(), True, [MultiLabelSmoothingCallback(SIGMOID_EPS)], **kwargs)}
    return steps_of(learners, rounds, {k: 'multi-label, no callback' if k.startswith('multi') else 'ours Flat' for k in learners})

def tabular_steps(rounds=50, batches=200):
    "The same of a small network on ready-made batches of 64 rows, where all the time is Python's: 20 numbers, two layers of 100, 10 labels"
    def learner(loss_func, *cbs):
        torch.manual_seed(0)
        x, y = torch.randn(64*batches, 20), (torch.rand(64*batches, 10) < .3).float()
        ready, layers = list(zip(x.split(64), y.split(64))), [nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]
        return Learner(DataLoaders(ready, ready[:1]), nn.Sequential(*layers), loss_func=loss_func, cbs=list(cbs))
    learners = {'tabular, no callback': learner(BCEWithLogitsLossFlat()),
                'tabular, callback': learner(BCEWithLogitsLossFlat(), MultiLabelSmoothingCallback(SIGMOID_EPS)),
                'tabular, online': learner(BCEWithLogitsLossFlat(), MultiLabelSmoothingCallback(prior='online')),
                'tabular, smoothed loss': learner(losses.LabelSmoothingBCEWithLogitsFlat(SIGMOID_EPS))}
    return steps_of(learners, rounds, dict.fromkeys(learners, 'tabular, no callback'))

def steps_of(learners, rounds, vs):
    stops, names, shuffle = {k: Stop() for k in learners}, [*learners], random.Random(0).shuffle
    for k, learn in learners.items(): learn.add_cbs([Start(), stops[k]])
    for i in range(rounds+1):
        shuffle(names)
        for k in names:
            with learners[k].no_bar(), learners[k].no_logging(): learners[k].fit(1, 1e-3)
        if i == 0: [o.times.clear() for o in stops.values()] # the warm-up
    def row(k):
        times, other = stops[k].times, stops[vs[k]].times
        added = 1000*statistics.median(a - b for a, b in zip(times, other))
        return dict(case='step', name=k, rounds=rounds, ms=1000*statistics.median(times), added=added, vs_ours=ratio(times, other), vs=vs[k])
    return [row(k) for k in learners]

def step_table(rows):
    "Medians, of the step, of what it takes more than the one it is compared to, and of how many times as long"
    form = '{:<26}{:>9}{:>9}{:>8}  {:<15}  {}'
    lines = [form.format('step of a Learner', 'ms', 'more', 'ratio', '[quartiles]', 'to')]
    for r in rows:
        v = r['vs_ours']
        lines.append(form.format(r['name'], f"{r['ms']:.2f}", f"{r['added']:.2f}", told(v, '.3f'), f'[{v[1]:.3f}, {v[2]:.3f}]', r['vs']))
    return '\n'.join(lines)


# --- what nbs/measured.ipynb shows

def host_ratio(seconds, n=64, k=10, calls=50):
    "Where there is hardly any arithmetic: how many times as long as ours fastai's Flat loss takes, each fifty times back to back"
    x, y = torch.randn(n, k, requires_grad=True), TensorBase(torch.randint(k, (n,)))
    def turn(loss_func):
        def f():
            for _ in range(calls):
                x.grad = None
                loss_func(x.as_subclass(TensorBase), y).backward()
        return f
    times = in_rounds({o.__module__: turn(o(EPS)) for o in (losses.LabelSmoothingCrossEntropyFlat, LabelSmoothingCrossEntropyFlat)}, seconds)
    return ratio(times['fastai.losses'], times['fastai_smooth.losses'])

def summary(*files):
    """How many times as long as ours the others take, in float32, as text; one number a file, with / between. fastai's is of Flat
    beside Flat. `memory` is ours, in units of the logits, and `host` fastai's Flat beside ours."""
    runs = [{(r['case'], r['name']): r for r in json.loads(Path(f).read_text())['rows']} for f in files]
    cases = [c for c in dict.fromkeys(c for c, _ in runs[0]) if c.endswith('float32')]
    columns = {'fastai': ('fastai Flat',), 'torch': ('torch', 'eager'), 'hard': ('hard',), 'torch compiled': ('torch compiled', 'eager compiled')}
    def cell(case, names):
        vs = [next((told(run[case, n]['vs_ours']) for n in names if (case, n) in run), None) for run in runs]
        return '' if None in vs else ' / '.join(vs)
    form = '{:<18}' + '{:>16}'*len(columns) + '{:>10}'
    lines = [form.format('logits', *columns, 'memory')]
    lines += [form.format(c.split()[0], *(cell(c, names) for names in columns.values()), f"{runs[0][c, 'ours']['memory']:.2f}") for c in cases]
    lines.append('')
    host = [told(run[cases[0], 'fastai Flat']['host_vs_ours']) for run in runs if 'host_vs_ours' in run.get((cases[0], 'fastai Flat'), {})]
    if host: lines.append(f"Host time of a Flat loss, {cases[0].split()[0]}, fastai's / ours: {' / '.join(host)}")
    for name, what in (('fastai Flat', "with fastai's loss / ours"), ('online', 'with online label smoothing / ours'), ('multi-label, callback', 'multi-label with the callback / without'),
                       ('tabular, callback', 'the same of a small tabular network')):
        vs = [told(run['step', name]['vs_ours'], '.3f') for run in runs if ('step', name) in run]
        if vs: lines.append(f"A training step, {what}: " + ' / '.join(vs))
    return '\n'.join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', required=True)
    p.add_argument('--seconds', type=float, default=3.)
    p.add_argument('--shapes', nargs='+', default=SHAPES)
    p.add_argument('--rounds', type=int, default=50, help='of the Learners')
    args = p.parse_args()
    res = dict(machine=machine('cpu'), rows=[], left_out={})
    def keep(rows, text):
        print(f'\n{text}', flush=True)
        res['rows'] += rows
        Path(args.json).write_text(json.dumps(res, indent=1))
    for s, dtype in [(s, 'float32') for s in args.shapes] + [(s, d) for d in ('bfloat16', 'float16') for s in HALF if s in args.shapes]:
        torch._dynamo.reset()
        rows, out = measure(s, dtype, seconds=args.seconds, peers=peers(s))
        if (s, dtype) == ('64x10', 'float32'): next(r for r in rows if r['name'] == 'fastai Flat')['host_vs_ours'] = host_ratio(args.seconds)
        res['left_out'] |= {f'{s} {dtype}: {k}': v for k, v in out.items()}
        keep(rows, f'{s} {dtype}\n{table(rows)}')
    for rows in (learner_steps(args.rounds), tabular_steps(args.rounds)): keep(rows, step_table(rows))


if __name__ == '__main__': main()
