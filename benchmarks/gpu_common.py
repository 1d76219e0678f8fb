"""What the GPU benchmarks share: cases, steps of them, times, work in parallel, and a JSON file that grows row by row."""
import os
os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '1')   # the workers are many enough

import gc, json, multiprocessing, statistics, sys, time, traceback
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch, torch.nn.functional as F
from triton.runtime.jit import JITFunction
from torch.profiler import ProfilerActivity, profile

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits, smooth_cross_entropy
from fastai_smooth.kernels.triton import launch, softmax
from machine import machine

DEVICE, EPS, SIGMOID_EPS = 'cuda', .1, .05
START = time.time()
WORKERS = min(16, os.cpu_count())

if Path(os.environ.get('TILES', '')).is_file():   # what gpu_choose.py wrote: its best tiles in place of the table
    best = json.loads(Path(os.environ['TILES']).read_text())['best']
    softmax.TILES = [(most, softmax.Tile(*tile)) for most, tile in best]

ours = partial(smooth_cross_entropy, eps=EPS, backend='triton')
ours_sigmoid = partial(smooth_binary_cross_entropy_with_logits, eps=SIGMOID_EPS, backend='triton')

def sized(shape): return tuple(shape)   # replaced where the benchmarks are only tried out
def dtype_of(name): return getattr(torch, name)
def name_of(shape): return 'x'.join(map(str, shape))
def liger():
    "Liger-Kernel's functions, or None where it is not installed."
    try: from liger_kernel.transformers import functional
    except ImportError: return None
    return functional

class Rows:
    "Results, written to a file after each one: whatever ends the process leaves what was known by then."
    def __init__(self, path):
        self.path, self.data = Path(path), dict(machine=machine(DEVICE), rows=[])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def run(self, name, f, *args, say=None):
        "The row that `f` gives, or what it raised. `say` makes a line of it."
        start = time.time()
        try: row = f(*args)
        except Exception as e:
            row = dict(error=f'{type(e).__name__}: {str(e)[:400]}', where=traceback.format_exc()[-600:])
        row = dict(name=name, **row, seconds=round(time.time() - start, 2))
        self.data['rows'].append(row)
        self.write()
        line = row['error'].replace('\n', ' ')[:100] if 'error' in row else say(row) if say else ''
        if line or 'error' in row: print(f'{name:40} {line}', flush=True)
        free()
        return row

    def write(self): self.path.write_text(json.dumps(self.data, indent=1, default=str) + '\n')

    def failed(self): return any('error' in row for row in self.data['rows'])

def free():
    "Gives memory and compiled graphs back."
    if 'torch._dynamo' in sys.modules: torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()

def _guarded(f, task):
    try: return task, f(task), None
    except Exception as e: return task, None, f'{type(e).__name__}: {str(e)[:300]}'
    finally: free()

def in_parallel(f, tasks, seconds):
    """Yields (task, f(task), what it raised or None) as they end, from spawned processes; stops after so many seconds."""
    tasks, end = list(tasks), time.time() + seconds
    with multiprocessing.get_context('spawn').Pool(WORKERS) as pool:
        results = pool.imap_unordered(partial(_guarded, f), tasks)
        for _ in tasks:
            try: yield results.next(max(.01, end - time.time()))
            except multiprocessing.TimeoutError: return

def warm_up(f, tasks, seconds):
    "Compiles in parallel, so that the disk caches have it; says what did not work and how long it took."
    start, done, tasks = time.time(), 0, list(tasks)
    for task, _, error in in_parallel(f, tasks, seconds):
        done += 1
        if error: print(f'warm-up: {task}: {error[:150]}'.replace('\n', ' '))
    print(f'compiled {done} of {len(tasks)} in {time.time() - start:.0f} s (at {time.time() - START:.0f} s)', flush=True)

setting = patch.multiple   # (module, **values): its globals, set for a while

def early(on):
    "With the gradient made in the forward, or in the backward."
    return setting(launch, EARLY_MB=0 if on else 10**6)

def usage(step):
    "[name, registers, spilled bytes] of each Triton kernel that a step launches."
    seen, run = [], JITFunction.run
    def record(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        seen.append([self.__name__, getattr(kernel, 'n_regs', None), getattr(kernel, 'n_spills', None)])
        return kernel
    with patch.object(JITFunction, 'run', record): step()
    return seen

def ms(step, enough=20):
    """Milliseconds of the GPU a step, the median of some replays of a CUDA graph of several steps, which take about `enough` in all.

    Called one by one, steps of less than a millisecond would show how long the CPU takes. Where a step can't be captured, since it
    waits for the GPU, the times of its kernels are added up."""
    step()
    torch.cuda.set_sync_debug_mode('error')   # a graph that failed to be captured would leave random numbers unusable
    try: step()
    except RuntimeError: return kernel_ms(step)
    finally: torch.cuda.set_sync_debug_mode('default')
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            step()
            once = timed(step)
            several = max(1, min(20, round(enough / 5 / once)))
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(several): step()
            graph.replay()
            once = timed(graph.replay)
            return statistics.median(timed(graph.replay) for _ in range(max(3, min(20, round(enough / once))))) / several
    finally: torch.cuda.synchronize()

def timed(f):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)

def kernel_ms(step, times=5):
    "Milliseconds of a step's kernels, without what is between them."
    torch.cuda.set_sync_debug_mode('default')
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(times): step()
        torch.cuda.synchronize()
    return sum(e.device_time for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA) / 1000 / times

@lru_cache(1)
def copy_rate():
    """Bytes a millisecond that are read and written at once, at best: by a copy of 1 GB, or by a change of sign.

    Of some sizes the driver copies a third less."""
    source = torch.ones(sized((2**28,)), device=DEVICE)
    buffer = torch.empty_like(source)
    return max(2 * source.nbytes / ms(step) for step in (lambda: buffer.copy_(source), lambda: torch.neg(source, out=buffer)))

def copy_ms(x): return 2 * x.nbytes / copy_rate()

def peak(step, unit):
    "The most memory that a step takes beyond what was held before, in units of so many bytes."
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / unit

class Case(NamedTuple):
    head: str      # 'softmax' or 'sigmoid'
    option: str    # what is not as in a plain call
    shape: tuple   # of the logits, classes along axis 1
    dtype: str = 'float32'

    def __str__(self):
        head = 'sigmoid:' if self.head == 'sigmoid' else ''
        return f'{head}{name_of(self.shape)} {self.dtype} {self.option}'.removesuffix(' plain')

def step_of(f, x, *args, **kw):
    "A function of nothing: the loss, and its gradient if there is one to be had. As in a model, nothing adds to a leaf's gradient."
    ones = []
    def step():
        loss = f(x, *args, **kw)
        if not x.requires_grad: return loss
        if not ones: ones.append(torch.ones_like(loss))
        return torch.autograd.grad(loss, x, ones[0])
    return step

def eager(x, y, **kw): return F.cross_entropy(x, y, **kw)

def eager_sigmoid(x, y, **kw):
    return F.binary_cross_entropy_with_logits(x, y.to(x.dtype) * (1 - 2*SIGMOID_EPS) + SIGMOID_EPS, **kw)

def cast(options, dtype):
    "PyTorch wants weights in the dtype of the logits."
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}

def make(case):
    "The case's logits and, by name, functions that make a step. Those are made one by one, since some hold memory."
    torch.manual_seed(0)
    shape, dtype = sized(case.shape), dtype_of(case.dtype)
    x = torch.randn(shape, device=DEVICE, dtype=dtype).mul_(3)
    if case.option == 'channels_last': x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_(case.option != 'no_grad')
    return x, (_sigmoid if case.head == 'sigmoid' else _softmax)(case, x, shape, dtype)

def _four(loss, options, eager, peer, x, y):
    return dict(ours=lambda: step_of(partial(loss, backend='triton'), x, y, **options),
                torch=lambda: step_of(partial(loss, backend='torch'), x, y, **options),
                eager=lambda: step_of(eager, x, y, **peer),
                compiled=lambda: step_of(torch.compile(eager, dynamic=False, fullgraph=True), x, y, **peer))

def _softmax(case, x, shape, dtype):
    k, eps, options = shape[1], 0. if case.option == 'eps=0' else EPS, {}
    y = torch.randint(k, shape[:1] + shape[2:], device=DEVICE)
    if case.option == 'soft labels': y = torch.randn(shape, device=DEVICE, dtype=dtype).softmax(1)
    if case.option == 'weight': options['weight'] = torch.rand(k, device=DEVICE) + .5
    if case.option == "reduction='none'": options['reduction'] = 'none'
    if case.option == 'ignore_index': y.view(-1)[::7] = -100
    peer = dict(cast(options, dtype), label_smoothing=eps)
    extra = dict(prior=torch.rand(k, k, device=DEVICE).softmax(1)) if case.option == 'prior [K,K]' else {}
    res = _four(partial(smooth_cross_entropy, eps=eps), options | extra, eager, peer, x, y)
    if len(shape) == 2 and case.option == 'plain' and liger():
        f = partial(liger().liger_cross_entropy, label_smoothing=eps)   # it writes its gradient over the logits: they are its own
        res['Liger'] = lambda: step_of(f, x.detach().clone().requires_grad_(), y)
    if extra: res['without'] = lambda: step_of(partial(smooth_cross_entropy, backend='triton', eps=eps), x, y)
    return res

def _sigmoid(case, x, shape, dtype):
    y, options = (torch.rand(shape, device=DEVICE) < .1).to(torch.uint8), {}
    if case.option == 'pos_weight': options['pos_weight'] = torch.rand(shape[-1], device=DEVICE) + .5
    if case.option == "reduction='none'": options['reduction'] = 'none'
    return _four(partial(smooth_binary_cross_entropy_with_logits, eps=SIGMOID_EPS), options, eager_sigmoid, cast(options, dtype), x, y)
