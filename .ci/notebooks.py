#!/usr/bin/env python3
"""Run the notebooks in a copy, and compare what they print with the outputs that are saved: `python .ci/notebooks.py`, or with the
paths of some. `--save` saves those anew that differ.

Text between numbers must be the same, but for spaces; numbers to 5%, or two units of the last digit that is printed (nbval and nbmake know
no tolerance). In a cell with the line `# timings: differ from run to run` the text alone counts, of a figure its size. Warnings and line
numbers in links to the source do not. Rounding moves no number that far, but a training carries it on: a resnet18 on digits comes to an
accuracy of .938 with AVX-512 and of .875 with AVX2. So the notebooks run with one thread, and with instructions that all x86 processors of
today have. Still, two vendors' train differently: where the vendor isn't `SAVED_ON`, what differs in `TRAINED` notebooks is no failure."""
import argparse, base64, io, math, os, re, shutil, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path

from fastcore.nbio import read_nb
from PIL import Image

root, bin = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
SAVED_ON = 'AuthenticAMD'
PROCESSOR = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
TRAINED = re.compile(r'(\d+_)?(interpret|compare|metrics|online|price|multi_label|noisy_labels|overconfidence|segmentation)')
REPRODUCIBLE = dict(OMP_NUM_THREADS='1', ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', MKL_CBWR='COMPATIBLE')
NUMBER = re.compile(r'(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?', re.I)
SOURCE = re.compile(r'\[source\]\(\S*\)(?:\{[^}]*\})?')

def shown(cell):
    "The lines that a cell prints and shows"
    res = [''.join(o.text for o in cell.outputs if o.get('name') == 'stdout')]
    for data in (o.data for o in cell.outputs if 'data' in o):
        res += [SOURCE.sub('', data[kind]) for kind in ('text/plain', 'text/html', 'text/markdown') if kind in data]
        if 'image/png' in data: res.append('a figure of {} x {} pixels'.format(*Image.open(io.BytesIO(base64.b64decode(data['image/png']))).size))
    return [o for o in '\n'.join(res).splitlines() if o.strip()]

def close(a, b):
    "Within 5%, or two units of the last digit of numbers with decimals"
    unit = max((10.**Decimal(o).as_tuple().exponent for o in (a, b) if '.' in o), default=0)
    return math.isclose(float(a), float(b), rel_tol=.05, abs_tol=2.001*unit)

def same(a, b, timings=False):
    "Do two lines of output say the same?"
    return [o.split() for o in NUMBER.split(a)] == [o.split() for o in NUMBER.split(b)] and (timings or all(map(close, NUMBER.findall(a), NUMBER.findall(b))))

def stale(saved, fresh):
    "Of each cell that differs in two versions of a notebook: its number and id, and the first lines that differ"
    for i, (old, new) in enumerate(zip(saved.cells, fresh.cells)):
        if old.cell_type != 'code': continue
        timings = '# timings: differ from run to run' in old.source.splitlines()
        pairs = zip_longest(shown(old), shown(new), fillvalue='(nothing)')
        if pair := next((o for o in pairs if not same(*o, timings)), None): yield f'cell {i} ({old.id}):\n  saved: {pair[0]}\n  now:   {pair[1]}'

def rerun(nb): return subprocess.run([bin/'nbdev-test', '--save', '--timing', '--n-workers', '0', nb], cwd=nb.parent, env=os.environ | REPRODUCIBLE).returncode == 0

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('paths', nargs='*', type=Path, help='notebooks (default: all)')
    p.add_argument('--save', action='store_true', help='save the notebooks that have stale outputs anew')
    args, failed = p.parse_args(argv), []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, 'copy')
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns('.*', '_docs', '_proc', '__pycache__'))
        nbs = [copy/o.resolve().relative_to(root) for o in args.paths] or sorted((copy/'nbs').rglob('*.ipynb'), reverse=True) # tutorials take longest
        with ThreadPoolExecutor(os.cpu_count()) as pool: passed = all([*pool.map(rerun, nbs)])
        subprocess.run([bin/'nbdev-clean'], cwd=copy, check=True)
        for fresh, saved in ((o, root/o.relative_to(copy)) for o in nbs):
            different = [f'{saved.relative_to(root)}, {o}' for o in stale(read_nb(saved), read_nb(fresh))]
            if different and args.save and passed: shutil.copyfile(fresh, saved)
            excused = TRAINED.fullmatch(saved.stem) and SAVED_ON not in PROCESSOR
            if different: print(*different, f'No failure: trained, and saved on {SAVED_ON}' if excused else '', sep='\n')
            if not excused: failed += different
    if failed and not args.save: return 'Outputs are stale: python .ci/notebooks.py --save saves them anew; look at what changed, and commit'
    return int(not passed)

if __name__ == '__main__': sys.exit(main())
