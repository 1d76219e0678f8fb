"""Times of the losses beside their peers on a GPU. `python benchmarks/gpu_table.py OUT.json [table] [grid]`

Forward and backward, medians of CUDA graphs (`ms` in gpu_common.py), and the share of what a copy of the logits takes. `table`: some shapes
beside all peers, the most important first. `grid`: every option in every shape. Each of the two is compiled in parallel before."""
import random, statistics, sys, time
from itertools import product

import torch

from gpu_common import START, Case, Rows, copy_ms, free, make, ms, peak, warm_up

ALL = 'ours', 'torch', 'eager', 'compiled', 'Liger', 'without'
COMPILED = 'ours', 'compiled', 'Liger', 'without'
PLAIN = [('softmax', (32768, 1000), 'float32'), ('softmax', (8, 21, 512, 512), 'float32'), ('softmax', (8192, 128256), 'bfloat16'),
         ('sigmoid', (4096, 10000), 'float32'), ('softmax', (4096, 32000), 'bfloat16'), ('softmax', (8192, 4096), 'float32'),
         ('softmax', (8192, 4096), 'bfloat16'), ('softmax', (4096, 16384), 'float32'), ('softmax', (256, 21843), 'float32'),
         ('sigmoid', (4096, 10000), 'bfloat16'), ('softmax', (4096, 32000), 'float32'), ('softmax', (2048, 128256), 'float32')]
TABLE = [Case(head, 'plain', shape, dtype) for head, shape, dtype in PLAIN]
TABLE.insert(6, Case('softmax', 'prior [K,K]', (32768, 1000)))

SHAPES = [((64, 10), 'float32'), ((512, 1000), 'float32'), ((32768, 1000), 'float32'), ((8192, 32000), 'bfloat16'),
          ((8, 21, 256, 256), 'float32')]
SIGMOID_SHAPES = (64, 20), (4096, 1000), (16, 1, 256, 256)
OPTIONS = 'plain', 'eps=0', 'weight', 'ignore_index', "reduction='none'", 'soft labels', 'channels_last', 'no_grad'
GRID = [Case('softmax', o, *s) for s, o in product(SHAPES, OPTIONS) if o != 'channels_last' or len(s[0]) == 4]
GRID += [Case('sigmoid', o, s) for s, o in product(SIGMOID_SHAPES, ('plain', "reduction='none'", 'pos_weight', 'no_grad'))]
random.Random(161).shuffle(GRID)   # in this order the first 13 cells have every option and every shape

def peers(case):
    "torch.compile takes seconds: where there are options, it is left out."
    return ('ours', 'eager', 'compiled') if case.option == 'plain' else ('ours', 'eager')

def wall_us(step, calls=100):
    "Microseconds until a call has returned; the GPU may go on."
    for _ in range(10): step()
    torch.cuda.synchronize()
    ts = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        ts.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(ts)

def warm(task):
    "What a case compiles, once."
    case, name = task
    _, steps = make(case)
    if name in steps: steps[name]()()

def measured(case, names, enough=20, wall=False, memory=False):
    "A row: milliseconds by name, and what did not work."
    x, steps = make(case)
    row = dict(ms={}, errors={}, copy=copy_ms(x))
    for name in names:
        if name not in steps: continue
        try:
            step = steps[name]()
            step()
            row['ms'][name] = ms(step, enough)
            if wall: row.setdefault('host_us', {})[name] = wall_us(step)
            if memory: row.setdefault('peak', {})[name] = peak(step, x.nbytes)
        except Exception as e: row['errors'][name] = f'{type(e).__name__}: {str(e)[:200]}'
        step = None
        free()
    mine = row['ms'].get('ours')
    if mine: row |= dict(of_copy=row['copy'] / mine, ratio={k: v / mine for k, v in row['ms'].items() if k != 'ours'})
    row['copy_tb_s'] = 2 * x.nbytes / row['copy'] / 1e9
    return row

def say(row):
    if 'ours' not in row['ms']: return f"{row['errors']}"[:150].replace('\n', ' ')
    line = f"{row['ms']['ours']:8.3f} ms {100 * row['of_copy']:4.0f}% " + ' '.join(f'{k} {v:.2f}' for k, v in row['ratio'].items())
    if 'host_us' in row: line += '  host ' + ' '.join(f'{k} {v:.0f}' for k, v in row['host_us'].items())
    if 'peak' in row: line += '  peak ' + ' '.join(f'{k} {v:.2f}' for k, v in row['peak'].items())
    return line + (f"  failed: {', '.join(row['errors'])}" if row['errors'] else '')

def slower(rows):
    "The cells of the grid in which ours is the slower one, by events or until the call returns."
    for row in rows:
        host = row.get('host_us', {})
        low = [f'{peer} {ratio:.2f}' for peer, ratio in row.get('ratio', {}).items() if ratio < 1]
        low += [f"{peer} {us / host['ours']:.2f} on the host" for peer, us in host.items() if us < host.get('ours', 0)]
        if low: yield f"{row['name']:45} ours {row['ms']['ours']:.3f} ms; {', '.join(low)}"

def main(path, parts=('table', 'grid')):
    out, cells = Rows(path), []
    if 'table' in parts:
        warm_up(warm, product(TABLE, COMPILED), 45)
        print('ours, its share of the copy, and how many times as long the others take')
        for case in TABLE: out.run(str(case), measured, case, ALL, say=say)
    if 'grid' in parts:
        warm_up(warm, [(c, name) for c in GRID for name in peers(c) if name in COMPILED], 30)
        for case in GRID:
            few = case.shape[0] * case.shape[1] <= 10**6 and len(case.shape) == 2
            memory = case.option in ('plain', 'no_grad') and not few
            cells.append(out.run(f'grid {case}', measured, case, peers(case), 8, few, memory, say=say))
            out.data['slower'] = list(slower(cells))
        ratios = [r['ratio']['eager'] for r in cells if 'eager' in r.get('ratio', {})]
        print(f"{len(out.data['slower'])} cells with a ratio below 1; eager / ours over {len(ratios)} cells: least "
              f"{min(ratios, default=0):.2f}, median {statistics.median(ratios or [0]):.2f}", *out.data['slower'], sep='\n')
        out.write()
    print(f'{time.time() - START:.0f} s')
    return out.failed()

if __name__ == '__main__': sys.exit(main(sys.argv[1], *([sys.argv[2:]] if sys.argv[2:] else [])))
