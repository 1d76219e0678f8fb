"""Does a test notice when one token of the product is wrong? cosmic-ray (pip install cosmic-ray) changes one, in a copy of the checkout, and
the test files of its module run there until one fails. By hand, as it takes most of an hour; needs fork. Modules may be named, as in mutate.toml:

    python tests/mutate.py [kernels/softmax ...]

Each mutation has its row in tests/mutants.md. A survivor has to be killed by a new test, or argued: with `survives: ` and why nothing is wrong in
place of **survives**. That stays as long as it is made and survives; without, the exit code is 1. Not mutated are annotations and what is raised."""
import ast, hashlib, multiprocessing, os, re, shutil, signal, sys, tempfile, time, tomllib
os.environ |= dict(OMP_NUM_THREADS='1', TORCHINDUCTOR_COMPILE_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
sys.dont_write_bytecode = True   # two mutations may be made within a second, by which Python would tell them apart
from datetime import date
from pathlib import Path
import cosmic_ray.ast, cosmic_ray.mutating, cosmic_ray.plugins, pytest
import fastai.tabular.all, fastai.text.all, fastai.vision.all, hypothesis, sklearn.datasets, torch._dynamo  # noqa: F401  here once, not in each process

HERE = Path(__file__).resolve().parent
CONFIG, RECORD = tomllib.loads((HERE/'mutate.toml').read_text()), HERE/'mutants.md'
OPERATORS = {name: cosmic_ray.plugins.get_operator(f'core/{name}')() for name in CONFIG['operators']}

def mutants(module, source):
    "(line, what is changed in it, the mutated source), at most one a line. Which ones, a hash of each line says: other lines' changes alter little."
    out = [n for m in ast.walk(ast.parse(source)) for n in (getattr(m, 'annotation', 0), getattr(m, 'returns', 0), isinstance(m, (ast.Raise, ast.JoinedStr)) and m) if n]
    lines, nodes, found = source.split('\n'), [*cosmic_ray.ast.ast_nodes(cosmic_ray.ast.get_ast(source))], []
    for name, op in OPERATORS.items():
        for i, (at, end) in enumerate(p for n in nodes for p in op.mutation_positions(n)):
            if any((n.lineno, n.col_offset) <= at < (n.end_lineno, n.end_col_offset) for n in out): continue
            found.append((hashlib.sha1(f'{module} {name} {i % 2} {at[1]} {lines[at[0]-1]}'.encode()).digest(), *at, end[1], i, op))
    found.sort(key=lambda f: f[0])
    first = {f[1]: f for f in reversed(found)}   # of each line
    for line in sorted([*dict.fromkeys(f[1] for f in found)][:max(CONFIG['least'], len(found) // CONFIG['share'])]):
        _, _, at, end, i, op = first[line]
        new, old = cosmic_ray.mutating.mutate_code(source, op, i), lines[line-1]
        now = new.split('\n')[line-1][at:len(new)-len(source)+end].strip()
        if now.startswith('not ') and not old[at:].startswith('not '): now, end = 'not', at   # one more token
        yield line, f'{old[:at].lstrip()[-40:]}⟦{old[at:end]} → {now}⟧{old[end:][:40]}', new

def child(copy, test):
    "In a new process: runs a test file in the copy."
    os.setsid(), os.chdir(copy)
    for fd in 1, 2: os.dup2(os.open('log', os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.environ |= {'PYTHONPATH': str(copy)} | ({'SMOOTH_TEST_SETTINGS': '150'} if test == 'kernels/parity' else {})
    sys.path[0] = str(copy)
    import fastai_smooth
    assert Path(fastai_smooth.__file__).is_relative_to(copy), 'this is not the copy'
    os._exit(pytest.main(['-xqrfE', '-p', 'no:cacheprovider', str(Path('tests', test).with_name(f'test_{Path(test).name}.py'))]))

def failure(copy, test, limit):
    "The first test of a file that fails; None where all pass."
    (copy/'log').write_text('')
    p = multiprocessing.get_context('fork').Process(target=child, args=(copy, test))
    p.start(), p.join(limit)
    if p.exitcode:
        return f"{(re.findall(r'^(?:FAILED|ERROR) .*?::(.*?)(?: - .*)?$', (copy/'log').read_text(), re.M) + ['import'])[0]} ({test})"
    if p.is_alive():
        os.killpg(p.pid, signal.SIGKILL)
        return f'no end in {limit:.0f} s ({test})'

def main(modules):
    rows = [re.split(r' (?<!\\)\| ', l[2:-2]) for l in (RECORD.read_text() if RECORD.exists() else '').split('\n') if l.startswith('| `')]
    argued, limits = {(module, what): end for module, _, what, end in rows if end.startswith('survives: ')}, {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for o in 'fastai_smooth', 'tests': shutil.copytree(HERE.parent/o, copy/o, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(HERE.parent/'pyproject.toml', copy)
        for test in dict.fromkeys(t for m in modules for t in CONFIG['tests'][m].split()):
            start = time.monotonic()
            if bad := failure(copy, test, 3600): sys.exit(f'fails without any mutation: {bad}')
            limits[test] = 60 + 4*(time.monotonic() - start)
        for module in modules:
            file, rows = copy/f'fastai_smooth/{module}.py', [r for r in rows if r[0] != f'`{module}`']
            source = file.read_text()
            for line, what, new in mutants(module, source):
                file.write_text(new)
                key = f'`{module}`', '`' + what.replace('|', r'\|') + '`'
                killers = filter(None, (failure(copy, t, limits[t]) for t in CONFIG['tests'][module].split()))
                rows.append([key[0], str(line), key[1], next(killers, argued.get(key, '**survives**'))])
                print(*rows[-1], sep=' | ', flush=True)
            file.write_text(source)
            survive = sum('survives' in r[3] for r in rows)
            RECORD.write_text('\n'.join([f'Written by `python tests/mutate.py`, {date.today()}: {len(rows)} mutations, {len(rows) - survive} killed, {survive} survive.', '',
                                         '| module | line | mutation | killed by |', '|---|---|---|---|', *(f"| {' | '.join(r)} |" for r in rows), '']))
    return any('**survives**' in r[3] for r in rows)

if __name__ == '__main__': sys.exit(main(sys.argv[1:] or [*CONFIG['tests']]))
