#!/usr/bin/env python3
"""Run the notebooks in a copy, and compare what they print with the outputs that are saved: `python .ci/notebooks.py`, or with the
paths of some. It fails where a notebook fails, and where an output is stale, and names notebook, cell and both texts; with `--save` it
saves those notebooks anew.

Text between numbers must be the same, but for spaces. Numbers must agree within 5%, or two units of the last digit that is printed;
whole ones within 2%. Where a number is a time, a cell has the line `# timings: differ from run to run`: of it the text alone counts. A
figure counts by its size. Not compared are warnings, and line numbers in links to the source.

Rounding alone moves no number that far, but a training carries it on: a resnet18 on digits comes to an accuracy of .938 with AVX-512
and of .875 with AVX2. So the notebooks run with one thread, and with instructions that all x86 processors of today have. Still, processors
of two vendors train differently. So where the vendor isn't `SAVED_ON`, what differs in the notebooks that are `TRAINED` is shown, but is no
failure. Another torch may ask for saving anew; on a processor of another vendor save all, and change `SAVED_ON`."""
import argparse, base64, json, os, platform, re, shutil, struct, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

root = Path(__file__).resolve().parent.parent
RELATIVE, UNITS, WHOLE, PIXELS = .05, 2, .02, 12
SAVED_ON = 'GenuineIntel'
TRAINED = {'08_interpret', '11_compare', 'multi_label', 'noisy_labels', 'overconfidence', 'segmentation'}
REPRODUCIBLE = dict(OMP_NUM_THREADS='1', ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', MKL_CBWR='COMPATIBLE')
TIMINGS = re.compile(r'^# timings: differ from run to run$', re.M)
NUMBER = re.compile(r'(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?', re.I)
SOURCE = re.compile(r'\[source\]\(\S*\)(?:\{[^}]*\})?')

def text(s): return s if isinstance(s, str) else ''.join(s)

def size(png):
    "Width and height of a PNG in base64, in pixels"
    return struct.unpack('>II', base64.b64decode(text(png))[16:24])

def outputs(cell):
    "(kind, content) of each output of a cell: what is printed, in one, and what is displayed"
    printed = ''.join(text(o['text']) for o in cell.get('outputs', []) if o['output_type'] == 'stream' and o['name'] == 'stdout')
    if printed: yield 'stdout', printed
    for data in (o['data'] for o in cell.get('outputs', []) if 'data' in o):
        for kind in ('text/plain', 'text/html', 'text/markdown'):
            if kind in data: yield kind, SOURCE.sub('', text(data[kind]))
        if 'image/png' in data: yield 'image/png', data['image/png']

def unit(s):
    "One in the last digit that is printed, of a number with decimals; else 0"
    digits, _, power = s.lower().partition('e')
    return 10.**(int(power or 0) - len(digits.partition('.')[2])) if '.' in digits else 0.

def close(a, b):
    "Are two numbers, as text, the same but for rounding?"
    x, y = float(a), float(b)
    relative = RELATIVE if unit(a) or unit(b) or 'e' in (a + b).lower() else WHOLE
    return abs(x-y) <= max(relative*max(abs(x), abs(y)), (UNITS + 1e-6)*max(unit(a), unit(b)))

def same(kind, a, b, timings=False):
    if kind == 'image/png': return all(abs(p-q) <= PIXELS for p, q in zip(size(a), size(b)))
    if [s.split() for s in NUMBER.split(a)] != [s.split() for s in NUMBER.split(b)]: return False
    return timings or all(map(close, NUMBER.findall(a), NUMBER.findall(b)))

def difference(kind, a, b):
    "Both outputs as text: the first lines that are not the same"
    if kind == 'image/png': return ['{} x {} pixels'.format(*size(o)) for o in (a, b)]
    lines = list(zip_longest(a.splitlines(), b.splitlines(), fillvalue='(nothing)'))
    return next((pair for pair in lines if not same(kind, *pair)), (a, b))

def stale(saved, fresh):
    "What is not the same in two versions of a notebook: (number of cell, its id, saved, now)"
    for i, (old, new) in enumerate(zip(saved['cells'], fresh['cells'])):
        if old['cell_type'] != 'code': continue
        timings = bool(TIMINGS.search(text(old['source'])))
        for a, b in zip_longest(outputs(old), outputs(new), fillvalue=('nothing', '')):
            if a[0] != b[0]: yield i, old.get('id'), f'{a[0]} {a[1][:200]}', f'{b[0]} {b[1][:200]}'
            elif not same(a[0], a[1], b[1], timings): yield i, old.get('id'), *difference(a[0], a[1], b[1])

def rerun(paths, folder, workers=2):
    "Run copies of notebooks in `folder`, each in a process of its own, with one thread: more threads than cores crawl. True if all went well"
    for name in ('nbs', 'benchmarks', 'tests'): shutil.copytree(root/name, folder/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('pyproject.toml', 'settings.ini'): shutil.copy(root/name, folder)
    chosen = {p.resolve().relative_to(root) for p in paths}
    for p in (folder/'nbs').rglob('*.ipynb'):
        if chosen and p.relative_to(folder) not in chosen: p.unlink()
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | REPRODUCIBLE
    bin = Path(sys.executable).parent
    def run(nb): return subprocess.run([bin/'nbdev-test', '--save', '--timing', '--n-workers', '0', nb.relative_to(folder)], cwd=folder, env=env).returncode
    with ThreadPoolExecutor(workers) as pool: codes = list(pool.map(run, sorted((folder/'nbs').rglob('*.ipynb'), reverse=True))) # tutorials take longest
    subprocess.run([bin/'nbdev-clean'], cwd=folder, env=env, check=True)
    return not any(codes)

def vendor():
    "Of the processor, as Linux names it."
    found = re.search(r'^vendor_id\s*:\s*(\S+)', Path('/proc/cpuinfo').read_text(), re.M) if Path('/proc/cpuinfo').exists() else None
    return found[1] if found else platform.processor()

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('paths', nargs='*', type=Path, help='notebooks (default: all)')
    p.add_argument('--save', action='store_true', help='save the notebooks that have stale outputs anew')
    p.add_argument('--workers', type=int, default=2, help='notebooks at a time (default: 2)')
    args, found, counted, elsewhere = p.parse_args(argv), 0, 0, vendor() != SAVED_ON
    with tempfile.TemporaryDirectory() as folder:
        passed = rerun(args.paths, Path(folder), args.workers)
        for fresh in sorted(Path(folder, 'nbs').rglob('*.ipynb')):
            saved = root/fresh.relative_to(folder)
            different = list(stale(*(json.loads(o.read_text(encoding='utf-8')) for o in (saved, fresh))))
            for i, id, a, b in different: print(f'{saved.relative_to(root)}, cell {i} ({id}):\n  saved: {a}\n  now:   {b}')
            if different and args.save and passed: shutil.copyfile(fresh, saved)
            found += len(different)
            counted += len(different) * (not elsewhere or saved.stem not in TRAINED)
    if found: print(f'{found} outputs {"were" if args.save and passed else "are"} stale' + ('' if args.save else ': python .ci/notebooks.py --save saves them anew; look at what changed, and commit'))
    if found > counted: print(f'{found - counted} of them are no failure: they are trained, on {SAVED_ON}, and this processor is {vendor()}')
    return 1 if not passed or counted and not args.save else 0

if __name__ == '__main__': sys.exit(main())
