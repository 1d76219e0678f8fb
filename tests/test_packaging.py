"""The package as a whole: metadata that agrees with itself, generated files that are up to date, imports that stay in
their room."""
import configparser, fnmatch, importlib.util, inspect, os, pickle, re, shutil, subprocess, sys
from importlib import metadata
from pathlib import Path

import pytest, yaml
from fastcore.docments import docments
try: import tomllib
except ImportError: import tomli as tomllib # Python 3.10: pytest brings it

import fastai_smooth
import fastai_smooth.all as fs_all

root = Path(__file__).resolve().parent.parent
generated = 'fastai_smooth', 'nbs', 'pyproject.toml', 'README.md'
needs_checkout = pytest.mark.skipif(not (root/'nbs').is_dir(), reason='needs the checkout: here the installed package is tested')

# what SPEC's section on public names promises
public = '''smooth_targets smooth_cross_entropy smooth_binary_cross_entropy_with_logits
LabelSmoothingCrossEntropy LabelSmoothingBCEWithLogits LabelSmoothingCrossEntropyFlat LabelSmoothingBCEWithLogitsFlat
MultiLabelSmoothingCallback LabelSmoothingScheduler
Learner vision_learner unet_learner tabular_learner text_classifier_learner language_model_learner'''.split()
exported = sorted(m for p in (root/'nbs').glob('*.ipynb') for m in re.findall(r'#\| *default_exp (\w+)', p.read_text(encoding='utf-8')))

def read(name): return (root/name).read_text(encoding='utf-8')

def run(*args, **kwargs):
    "A subprocess in an environment in which nbdev exports; its output is shown when it fails"
    env = {k:v for k,v in os.environ.items() if k != 'IN_TEST'}
    res = subprocess.run([str(o) for o in args], env=env, capture_output=True, text=True, **kwargs)
    assert res.returncode == 0, f'{args} gave {res.returncode}\n{res.stdout}\n{res.stderr}'
    return res.stdout

def tool(name):
    "A console script of the Python that runs the tests"
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    assert path, f'{name} is not installed beside {Path(sys.executable).name}: pip install -e ".[dev]"'
    return path

@pytest.fixture(scope='module')
def project(): return tomllib.loads(read('pyproject.toml'))['project']

@pytest.fixture(scope='module')
def nbdev_options(): return tomllib.loads(read('pyproject.toml'))['tool']['nbdev']

@pytest.fixture(scope='module')
def settings():
    ini = configparser.ConfigParser()
    ini.read_string(read('settings.ini'))
    return ini['DEFAULT']

# metadata

@needs_checkout
def test_settings_ini_mirrors_pyproject(project, nbdev_options, settings):
    def unspaced(reqs): return [r.replace(' ', '').replace('"', "'") for r in reqs]
    assert settings['lib_name'] == settings['repo'] == settings['lib_path'] == settings['title'] == project['name']
    assert settings['version'] == fastai_smooth.__version__
    assert f">={settings['min_python']}" == project['requires-python']
    assert settings['description'] == project['description']
    assert settings['keywords'].split() == project['keywords']
    assert settings['author'] == project['authors'][0]['name']
    assert settings['requirements'].split() == unspaced(project['dependencies'])
    assert settings['dev_requirements'].split() == unspaced(project['optional-dependencies']['dev'])
    assert settings['tst_flags'].split() == nbdev_options['tst_flags']
    assert settings['console_scripts'] == '='.join(*project['scripts'].items())
    assert (settings['license'], project['license']) == ('apache2', 'Apache-2.0')

@needs_checkout
def test_version_is_that_of_the_init_and_has_release_notes(project):
    assert 'version' in project['dynamic']
    assert metadata.version('fastai_smooth') == fastai_smooth.__version__
    assert f'## {fastai_smooth.__version__}\n' in read('CHANGELOG.md')

def test_only_fastai_and_its_torch_are_required(project):
    assert [re.match(r'[\w-]+', d)[0] for d in project['dependencies']] == ['fastai', 'torch']

def test_no_fastai_is_allowed_that_plum_breaks(project):
    "Up to 2.8.9 fastai takes any plum-dispatch, and with 2.10 its own `Learner.export` fails"
    assert [d for d in project['dependencies'] if d.startswith('fastai')] == ['fastai>=2.8.10']

def test_entry_points_load():
    eps = [e for group in ('console_scripts', 'nbdev') for e in metadata.entry_points(group=group) if e.name == 'fastai_smooth']
    script, index = [e.load() for e in eps]
    assert callable(script)
    modules = {'losses', 'prior', 'callback', 'learner', 'images', 'compare', *exported}
    assert {f'fastai_smooth.{m}' for m in modules} <= set(index['syms'])

@needs_checkout
def test_every_package_is_found_by_setuptools():
    include = tomllib.loads(read('pyproject.toml'))['tool']['setuptools']['packages']['find']['include']
    for folder in {p.parent for p in (root/'fastai_smooth').rglob('*.py')}:
        assert (folder/'__init__.py').exists(), f'{folder.relative_to(root)} has no __init__.py'
        name = '.'.join(folder.relative_to(root).parts)
        assert any(fnmatch.fnmatch(name, pat) for pat in include), f'{name} is left out of the wheel'

@needs_checkout
def test_ci_runs_the_pythons_that_are_promised(project):
    matrix = yaml.safe_load(read('.github/workflows/ci.yaml'))['jobs']['test']['strategy']['matrix']['python']
    promised = [c.split(' :: ')[-1] for c in project['classifiers'] if re.search(r'Python :: 3\.\d+$', c)]
    assert matrix == promised and project['requires-python'] == f'>={promised[0]}'

# generated files

@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the project in which everything that is generated was generated anew"
    pytest.importorskip('nbdev') # the oldest versions are tested without it
    copy = tmp_path_factory.mktemp('fresh')
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'sidebar.yml')
    for name in generated:
        if (root/name).is_dir(): shutil.copytree(root/name, copy/name, ignore=ignore)
        else: shutil.copy(root/name, copy/name)
    for name in exported: (copy/'fastai_smooth'/f'{name}.py').unlink() # nbdev-export must write them itself
    run(tool('nbdev-export'), cwd=copy)
    run(tool('nbdev-clean'), cwd=copy)
    run(sys.executable, '-c', 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()', cwd=copy)
    return copy

def files(folder):
    "Path from `folder` to content of all files in it, caches left out"
    skip = '__pycache__', '.ipynb_checkpoints'
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*')
            if p.is_file() and not set(skip) & set(p.parts) and p.name != 'sidebar.yml'}

@needs_checkout
@pytest.mark.parametrize('folder,remedy', [('fastai_smooth', 'nbdev-export'), ('nbs', 'nbdev-export and nbdev-clean')])
def test_modules_and_notebooks_are_in_sync(fresh, folder, remedy):
    here, there = files(root/folder), files(fresh/folder)
    differ = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
    assert not differ, f'run {remedy}: {differ}'

@needs_checkout
def test_export_rewrites_what_was_edited_by_hand(fresh, tmp_path):
    "The check above can fail: an edit of an exported module does not survive"
    shutil.copytree(fresh, tmp_path/'copy')
    path = tmp_path/'copy/fastai_smooth/losses.py'
    path.write_text(path.read_text(encoding='utf-8') + '\nedited = True\n', encoding='utf-8')
    run(tool('nbdev-export'), cwd=tmp_path/'copy')
    assert path.read_bytes() == (root/'fastai_smooth/losses.py').read_bytes()

@needs_checkout
def test_readme_is_up_to_date(): run(sys.executable, root/'.ci/readme.py', '--check')

@needs_checkout
def test_readme_is_made_from_cells():
    spec = importlib.util.spec_from_file_location('readme', root/'.ci/readme.py')
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    def md(source): return {'cell_type': 'markdown', 'source': source}
    def code(source, *outputs): return {'cell_type': 'code', 'source': source, 'outputs': outputs}
    plain = {'output_type': 'execute_result', 'data': {'text/plain': ['1\n', '2']}}
    shown = {'output_type': 'display_data', 'data': {'text/plain': 'M', 'text/markdown': '*m*'}}
    drawn = {'output_type': 'display_data', 'data': {'text/plain': '<Figure>', 'image/png': 'ZG90\n'}}
    noise = {'output_type': 'stream', 'name': 'stderr', 'text': 'noise'}
    cells = [md(['# T\n', '> sub']), md('[l](01_losses.ipynb#x)'), code('#| hide\nsecret()'),
             code('#| echo: false\nshown()', shown), code('#| echo: false\n#| fig-alt: A dot\ndraw()', drawn), code('a = 1\na', plain, noise)]
    readme, pictures = made.readme({'cells': cells})
    assert pictures == [b'dot'] and readme == f'''# T


{made.warning}

> sub

[l](nbs/01_losses.ipynb#x)

*m*

![A dot](nbs/images/readme-1.png)

``` python
a = 1
a
```

    1
    2
'''

@needs_checkout
def test_readme_has_two_setup_commands_that_ci_runs():
    main_job, tests = re.findall(r'^python3 -m venv .*', read('README.md'), flags=re.M)
    assert main_job.endswith('.venv/bin/fastai_smooth') and tests.endswith('.venv/bin/pytest -n 2')
    assert "grep '^python3 -m venv ' README.md" in read('.ci/run')
    assert os.access(root/'.ci/run', os.X_OK)

@needs_checkout
def test_readme_links_lead_somewhere(project):
    links = re.findall(r'\]\(([^)]+)\)', read('README.md'))
    local = [l.split('#')[0] for l in links if '://' not in l]
    assert local and not [l for l in local if not (root/l).exists()]
    assert not any(url in read('README.md') for url in project['urls'].values()), 'README.md links to a placeholder'

def tracked():
    "The files that git has or would add; without git, those of the source tree"
    try: names = run('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=root).split('\n')
    except (AssertionError, FileNotFoundError): names = [str(p.relative_to(root)) for d in ('fastai_smooth', 'nbs', 'tests') for p in (root/d).rglob('*.*')]
    return [root/n for n in names if n and (root/n).is_file()]

@needs_checkout
def test_no_local_paths_in_files():
    "Neither in sources nor in saved outputs; a notebook run on another machine must give the same file"
    local = re.compile('|'.join(['/' + d + '/' + r'[\w.]' for d in ('root', 'home', 'Users', 'work', 'tmp')] + ['site-' + 'packages']))
    found = {}
    for path in tracked():
        try: hits = local.findall(path.read_text(encoding='utf-8'))
        except UnicodeDecodeError: continue # a picture
        if hits: found[str(path.relative_to(root))] = sorted(set(hits))
    assert not found

# imports

blocker = '''
import sys, torch
class Blocker:
    "Nothing of these may be imported from here on"
    def find_spec(self, name, *args):
        if name.split('.')[0] in {blocked}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocker())
from fastai_smooth.kernels import smooth_targets, smooth_cross_entropy, smooth_binary_cross_entropy_with_logits
x = torch.randn(4, 3, requires_grad=True)
smooth_cross_entropy(x, torch.tensor([0, 1, 2, 0])).backward()
smooth_binary_cross_entropy_with_logits(x, torch.rand(4, 3)).backward()
print(smooth_targets([1., 0.], eps=.2), x.grad.isfinite().all())
'''

def test_kernels_need_torch_alone():
    out = run(sys.executable, '-c', blocker.format(blocked={'fastai', 'fastcore', 'triton', 'matplotlib', 'pandas', 'sklearn'}))
    assert out == 'tensor([0.9000, 0.1000]) tensor(True)\n'

def test_kernels_leave_triton_alone_on_the_cpu():
    code = blocker.format(blocked=set()) + "print([m for m in ('fastai', 'fastcore', 'triton') if m in sys.modules])"
    was_there = run(sys.executable, '-c', "import sys, torch; print([m for m in ('triton',) if m in sys.modules])")
    assert run(sys.executable, '-c', code).splitlines()[-1] == was_there.strip()

def test_all_gives_every_public_name():
    "Star imports in the order that README gives"
    namespace = {}
    exec('from fastai.vision.all import *\nfrom fastai.text.all import *\nfrom fastai.tabular.all import *\n'
         'from fastai_smooth.all import *', namespace)
    assert not [n for n in public if n not in namespace]
    assert all(hasattr(namespace['Learner'], n) for n in ('to_smooth', 'to_hard'))
    assert namespace['LabelSmoothingCrossEntropyFlat'].__module__ == 'fastai_smooth.losses' # fastai has one of that name
    for n in ('vision_learner', 'unet_learner'): assert namespace[n] is getattr(fs_all, n)

ours = sorted(n for n,o in vars(fs_all).items() if not n.startswith('_') and callable(o)
              and (getattr(o, '__module__', None) or '').split('.')[0] == 'fastai_smooth')

def test_own_names_are_found(): assert {n for n in public if n.startswith(('smooth', 'Label', 'Multi'))} <= set(ours)

@pytest.mark.parametrize('name', ours)
def test_public_names_pickle(name):
    o = getattr(fs_all, name)
    assert pickle.loads(pickle.dumps(o)) is o

@pytest.mark.parametrize('name', ours + ['Learner.to_smooth', 'Learner.to_hard'])
def test_public_names_are_documented(name):
    "A docstring for each, and for each parameter of its own a word beside it"
    from fastai.learner import Learner
    o = getattr(Learner, name.split('.')[1]) if '.' in name else getattr(fs_all, name)
    assert inspect.getdoc(o) and vars(o).get('__doc__', o.__doc__), f'{name} has no docstring'
    if hasattr(o, '__wrapped__'): # fastai's own function, and one parameter more
        assert 'label_smoothing' in inspect.signature(o).parameters and 'label_smoothing' in o.__doc__
        return
    docs = {k:v for k,v in docments(o).items() if k not in ('self', 'return', 'args', 'kwargs')}
    assert not [k for k,v in docs.items() if not v], f'parameters of {name} without a comment'

def test_python_dash_m_is_the_command():
    "`python -m fastai_smooth` and `fastai_smooth` are one program"
    by_module = run(sys.executable, '-m', 'fastai_smooth', '--help')
    assert by_module == run(tool('fastai_smooth'), '--help')
    for option in 'data root download eps noise epochs seeds arch pretrained bs size out'.split(): assert f'--{option}' in by_module
