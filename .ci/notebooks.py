#!/usr/bin/env python3
"""Run the notebooks in a copy as a reader of their pages would, and compare what they print with the outputs that are saved:
`python .ci/notebooks.py`, or with the paths of some. `--save` saves those anew that differ.

A reader pastes the code that a page shows, from top to bottom, with the package installed. So just those cells run, without the ones that
are hidden or exported; after them what shows no code: entries of the API, and tables that are made of records.

Text between numbers must be the same, but for spaces; numbers to 5%, or two units of the last digit that is printed (nbval and nbmake know
no tolerance). In a cell with the line `# timings: differ from run to run` the text alone counts, of a figure its size. Warnings and line
numbers in links to the source do not. Rounding moves no number that far, but a training carries it on: a resnet18 on digits comes to an
accuracy of .938 with AVX-512 and of .875 with AVX2. So the notebooks run with one thread, and with instructions that all x86 processors of
today have. Still, two vendors' train differently, and one page trains on the help texts of Python, which change with it: where these are not
those of `SAVED_ON`, a page is compared up to its first training."""
import argparse, base64, io, math, os, platform, re, shutil, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path

from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb
from PIL import Image

root, bin = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
SAVED_ON = dict(vendor='AuthenticAMD', python='3.11.7')
CPUINFO = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
HERE = dict(vendor=''.join(re.findall('vendor_id.*: (.*)', CPUINFO)[:1]), python=platform.python_version())
TRAINS = re.compile(r'\.(fit|fine_tune|eps_find|step)\w*\(|\b(trained|compare|one_run)\(')
REPRODUCIBLE = dict(MATPLOTLIBRC=str(root/'.ci/matplotlibrc'), OMP_NUM_THREADS='1', ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2', MKL_CBWR='COMPATIBLE')
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

def stale(saved, fresh, until=None):
    "Of each cell that differs in two versions of a notebook, before that of number `until`: its number and id, and the first lines that differ"
    for i, (old, new) in enumerate(zip(saved.cells[:until], fresh.cells)):
        if old.cell_type != 'code': continue
        timings = '# timings: differ from run to run' in old.source.splitlines()
        pairs = zip_longest(shown(old), shown(new), fillvalue='(nothing)')
        if pair := next((o for o in pairs if not same(*o, timings)), None): yield f'cell {i} ({old.id}):\n  saved: {pair[0]}\n  now:   {pair[1]}'

def is_code(cell): return cell.cell_type == 'code' and not any(map(cell.has_directive, ('hide', 'export', 'exporti', 'default_exp')))
def has_no_code(cell): return cell.directives.get('echo') == 'false' or cell.source.startswith('show_doc(')

def page(nb):
    "The cells whose code a page shows, in order, and then those of which it shows the output alone"
    cells = [o for o in nb.cells if is_code(o)]
    doc = mk_cell('from nbdev.showdoc import show_doc')
    return new_nb([o for o in cells if not has_no_code(o)] + [doc] + [o for o in cells if has_no_code(o)], nb.metadata)

def without_bars(out):
    "What is left of it in a terminal when its progress bars are gone; of a training, whose table has times, nothing"
    text = out.get('text', '')
    if '\r' not in text: return out
    # a bar goes back to the start of its line for each step, and in the end to clear the line
    left = [] if re.search('epoch +train_loss', text) else [line.split('\r')[-1].strip() for line in text.split('\n')]
    out.text = ''.join(f'{line}\n' for line in left if line)
    return out

def rerun(saved):
    """The notebook `saved` after its page ran in a copy of the project, without warnings, which have paths of the machine; None if it failed.
    A copy for each, since pages write files."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, 'copy')
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns('.*', '_docs', '_proc', '__pycache__'))
        nb, path = read_nb(saved), copy/saved.relative_to(root)
        write_nb(page(nb), path)
        run = subprocess.run([bin/'nbdev-test', '--save', '--timing', '--n-workers', '0', path], cwd=path.parent, env=os.environ | REPRODUCIBLE)
        if run.returncode: return
        outputs = {o.id: o.outputs for o in read_nb(path).cells}
        for cell in filter(is_code, nb.cells):
            shorter = [without_bars(o) for o in outputs[cell.id] if o.get('name') != 'stderr']
            cell.outputs = [o for o in shorter if o.get('text') != '']
        write_nb(nb, path)
        subprocess.run([bin/'nbdev-clean', '--fname', path], cwd=copy, check=True)
        return read_nb(path)

def first_foreign(nb):
    "The number of the first cell that trains, where what it trains on or with is not as when it was saved; None if all is"
    of_python = any('pydoc_data' in o.source for o in nb.cells if is_code(o))
    if all(HERE[o] == SAVED_ON[o] for o in (['vendor', 'python'] if of_python else ['vendor'])): return
    return next((i for i, o in enumerate(nb.cells) if is_code(o) and TRAINS.search(o.source)), None)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('paths', nargs='*', type=Path, help='notebooks (default: all)')
    p.add_argument('--save', action='store_true', help='save the notebooks that have stale outputs anew')
    args = p.parse_args(argv)
    paths = [o.resolve() for o in args.paths] or sorted((root/'nbs').rglob('*.ipynb'), reverse=True) # tutorials take longest
    with ThreadPoolExecutor(os.cpu_count()) as pool: pages = dict(zip(paths, pool.map(rerun, paths)))
    failed = []
    for path, fresh in pages.items():
        if not fresh: continue
        saved = read_nb(path)
        until = None if args.save else first_foreign(saved)
        different = [f'{path.relative_to(root)}, {o}' for o in stale(saved, fresh, until)]
        print(*different, sep='\n', end='\n' if different else '')
        if different and args.save: write_nb(fresh, path)
        failed += different
    if failed and not args.save: return 'Outputs are stale: python .ci/notebooks.py --save saves them anew; look at what changed, and commit'
    return int(not all(pages.values()))

if __name__ == '__main__': sys.exit(main())
