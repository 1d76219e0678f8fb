"""What a reader finds: public names that are documented, modules and cells that fit on a screen, notebooks whose outputs are clean."""
import ast, dataclasses, importlib, inspect, json, pkgutil, re, textwrap
from pathlib import Path

import pytest, yaml
from fastai.callback.core import event
from fastcore.docments import docments

import fastai_smooth, fastai_smooth.all as fs_all, fastai_smooth.kernels as kernels

root = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted(p for p in Path(fastai_smooth.__file__).parent.rglob('*.py') if p.name != '_modidx.py' and p.parent.name + p.name != 'fastai_smooth__init__.py') # nbdev writes these
# methods that fastai, torch or argparse calls, by a name and signature of its own: the class says what they do
PROTOCOL = {o for o in vars(event) if not o.startswith('_')} | {'forward', 'extra_repr', 'reset', 'accumulate', 'name', 'value', 'error'}

def own(o): return (getattr(o, '__module__', None) or '').split('.')[0] == 'fastai_smooth'

def methods(cls, skip=()):
    for n, o in vars(cls).items():
        f = getattr(getattr(o, 'fget', o), '__func__', getattr(o, 'fget', o))   # of a property, of a classmethod
        if not n.startswith('_') and n not in skip and inspect.isfunction(f) and own(f): yield f'{cls.__name__}.{n}', o if isinstance(o, property) else f

def public():
    "What `all`, `kernels` and the modules list, the public methods of the classes that users import, and what is patched onto fastai's classes"
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(fastai_smooth.__path__, 'fastai_smooth.') if not m.name.endswith('__main__')]
    users = [o for n, o in [*vars(fs_all).items(), *vars(kernels).items()] if not n.startswith('_') and own(o)]
    listed = users + [getattr(m, n) for m in modules for n in getattr(m, '__all__', ()) if hasattr(m, n)]
    res = {o.__qualname__: o for o in listed if own(o) and (isinstance(o, type) or inspect.isfunction(o)) and '<' not in o.__qualname__}
    theirs = {o for m in modules for o in vars(m).values() if isinstance(o, type) and not own(o)}
    for cls in [o for o in users if isinstance(o, type)]: res |= methods(cls, PROTOCOL)
    for cls in theirs: res |= methods(cls)
    return res

def uncommented(o):
    "Parameters of a function or class, or fields of a record, without a comment beside them"
    if isinstance(o, type) and (dataclasses.is_dataclass(o) or issubclass(o, tuple)):
        lines = inspect.getsource(o).splitlines()
        return [f.target.id for f in ast.parse(textwrap.dedent('\n'.join(lines))).body[0].body if isinstance(f, ast.AnnAssign) and '#' not in lines[f.end_lineno-1]]
    if isinstance(o, property) or isinstance(o, type) and '__init__' not in vars(o) or hasattr(o, '__wrapped__'): return []   # or described elsewhere
    return [k for k, v in docments(o).items() if not v and k not in ('self', 'cls', 'return', 'args', 'kwargs')]

PUBLIC = public()

@pytest.mark.parametrize('name', sorted(PUBLIC))
def test_public_name_is_documented(name):
    o = PUBLIC[name]
    assert vars(o).get('__doc__') if isinstance(o, type) else o.__doc__, f'{name} has no docstring of its own'
    assert not uncommented(o), f'of {name}: parameters without a comment'

def test_public_names_are_found():
    assert PUBLIC.keys() >= {'Learner.to_smooth', 'Learner.to_hard', 'smooth_targets', 'LabelSmoothingCrossEntropy', 'CalibrationInterpretation.summary', 'vision_learner', 'BinnedError'}

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_module_is_short(path):
    lines = path.read_text(encoding='utf-8').splitlines()
    assert len(lines) < 300
    assert not [i for i, o in enumerate(lines, 1) if len(o) > 140]

def cells(nb): return [''.join(o['source']) for o in json.loads(nb.read_text(encoding='utf-8'))['cells'] if o['cell_type'] == 'code']
def outputs(nb): return [o for cell in json.loads(nb.read_text(encoding='utf-8'))['cells'] for o in cell.get('outputs', [])]
of_notebooks = pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)

@of_notebooks
def test_exported_cells_fit_on_a_screen(nb):
    assert not [o.splitlines()[:3] for o in cells(nb) if re.search(r'(?m)^#\| *exports?\b', o) and len(o.splitlines()) >= 40]

@of_notebooks
def test_options_of_cells_are_yaml(nb):
    "A colon in a caption wants quotes, or none of a cell's options count"
    for option in re.findall(r'(?m)^#\| *([\w-]+: .*)$', '\n'.join(cells(nb))): yaml.safe_load(option)

@of_notebooks
def test_imports_stand_alone_where_the_api_is_shown(nb):
    "To show the API, nbdev runs cells with imports whole at each build: a benchmark, say"
    if not any(re.search(r'(?m)^#\| *exports?\b|^show_doc\(', o) for o in cells(nb)): return
    for o in (o for o in cells(nb) if not re.search(r'(?m)^#\| *(export|eval: *false)|nbdev_export\(\)|^[!%]', o)):
        kinds = {type(n) for n in ast.parse(o).body}
        assert not (kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign}), o

@of_notebooks
def test_a_page_hides_nothing_that_its_code_needs(nb):
    "A reader pastes what is shown; .ci/notebooks.py runs just that"
    hidden = [o for o in cells(nb) if re.search(r'(?m)^#\| *(hide|include: *false|output: *false)', o)]
    assert hidden in ([], ['#| hide\nimport nbdev; nbdev.nbdev_export()'])

@of_notebooks
def test_no_sentence_announces_what_is_not_shown(nb):
    "It would end with a colon, before a cell that the page leaves out"
    both = json.loads(nb.read_text(encoding='utf-8'))['cells']
    texts = [(o['cell_type'], ''.join(o['source']).rstrip()) for o in both]
    assert not [a for (kind, a), (_, b) in zip(texts, texts[1:]) if kind == 'markdown' and a.endswith(':') and re.search(r'(?m)^#\| *(exporti?|hide)\b', b)]

DEBRIS = re.compile('|'.join([r'(?<![\w.:/-])/(?:work|root|home|tmp|Users|mnt|private|var/folders)/[\w.-]', r'\b\w*Warning:', r'[█▏▎▍▌▋▊▉]|\r(?!\n)|<progress\b|progress-bar-interrupted',
                              r'\b(?:it/s|s/it)\]', r'Traceback \(most recent call last\)', r'\b0x[0-9a-fA-F]{8,}\b', '\x1b\\[']))

@of_notebooks
def test_saved_outputs_are_clean(nb):
    "Nothing that is of no use to a reader: paths of the machine, warnings, progress bars, tracebacks, addresses of objects, colours of terminals"
    for out in outputs(nb):
        assert out['output_type'] != 'error' and out.get('name') != 'stderr', out
        texts = [out['text']] if 'text' in out else [o for mime, o in out['data'].items() if not mime.startswith('image/')]
        found = DEBRIS.search('\n'.join(''.join(o) for o in texts))
        assert not found, found

@pytest.mark.skipif(not NOTEBOOKS, reason='needs a checkout')
def test_sidebar_lists_every_notebook():
    def shown(contents):
        for o in contents: yield from [o] if isinstance(o, str) else shown(o['contents']) if 'contents' in o else [o['href']]
    sidebar = yaml.safe_load((root/'nbs/_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    assert sorted(shown(sidebar)) == sorted(p.relative_to(root/'nbs').as_posix() for p in NOTEBOOKS)
