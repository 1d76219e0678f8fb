"""The package as a whole: metadata that agrees with itself, a README that is up to date, a wheel that is whole, imports that stay in their room."""
import configparser, fnmatch, os, pickle, re, shutil, subprocess, sys, zipfile
from importlib import metadata
from pathlib import Path

import pytest, yaml
try: import tomllib
except ImportError: import tomli as tomllib # Python 3.10: pytest brings it

import fastai_smooth.__main__, fastai_smooth.all as fs_all

root = Path(__file__).resolve().parents[2]
needs_checkout = pytest.mark.skipif(not (root/'nbs').is_dir(), reason='needs the checkout: here the installed package is tested')
public = '''smooth_targets smooth_cross_entropy smooth_binary_cross_entropy_with_logits LabelSmoothingCrossEntropy LabelSmoothingBCEWithLogits
LabelSmoothingCrossEntropyFlat LabelSmoothingBCEWithLogitsFlat MultiLabelSmoothingCallback LabelSmoothingScheduler
Learner vision_learner unet_learner tabular_learner text_classifier_learner language_model_learner'''.split()

def read(name): return (root/name).read_text(encoding='utf-8')

def run(*args, **kwargs):
    res = subprocess.run([str(o) for o in args], capture_output=True, text=True, **kwargs)
    assert res.returncode == 0, f'{args} gave {res.returncode}\n{res.stdout}\n{res.stderr}'
    return res.stdout

pyproject = tomllib.loads(read('pyproject.toml'))
project = pyproject['project']

@needs_checkout
def test_settings_ini_mirrors_pyproject():
    ini = configparser.ConfigParser()
    ini.read_string(read('settings.ini'))
    settings = ini['DEFAULT']
    def unspaced(reqs): return [r.replace(' ', '').replace('"', "'") for r in reqs]
    assert settings['lib_name'] == settings['repo'] == settings['lib_path'] == settings['title'] == project['name']
    assert settings['version'] == fastai_smooth.__version__ and f">={settings['min_python']}" == project['requires-python']
    assert (settings['description'], settings['author']) == (project['description'], project['authors'][0]['name'])
    assert (settings['keywords'].split(), settings['tst_flags'].split()) == (project['keywords'], pyproject['tool']['nbdev']['tst_flags'])
    assert settings['requirements'].split() == unspaced(project['dependencies'])
    assert settings['dev_requirements'].split() == unspaced(project['optional-dependencies']['dev'])
    assert settings['console_scripts'] == '='.join(*project['scripts'].items())
    assert (settings['license'], project['license']) == ('apache2', 'Apache-2.0')

@needs_checkout
def test_site_options_mirror_pyproject():
    site = yaml.safe_load(read('nbs/nbdev.yml'))['website']
    assert (site['title'], site['description'], site['repo-url']) == (project['name'], project['description'], project['urls']['Repository'])

@needs_checkout
def test_version_is_that_of_the_init_and_has_release_notes():
    assert 'version' in project['dynamic'] and metadata.version('fastai_smooth') == fastai_smooth.__version__
    assert f'## {fastai_smooth.__version__}\n' in read('CHANGELOG.md')

@needs_checkout
def test_only_fastai_and_its_torch_are_required():
    "Up to 2.8.9 fastai takes any plum-dispatch, and with 2.10 its own `Learner.export` fails"
    assert [re.match(r'[\w-]+', d)[0] for d in project['dependencies']] == ['fastai', 'torch'] and 'fastai>=2.8.10' in project['dependencies']

def test_entry_points_load_and_names_have_pages():
    script, index = (e.load() for group in ('console_scripts', 'nbdev') for e in metadata.entry_points(group=group) if e.name == 'fastai_smooth')
    assert callable(script)
    assert {o for o in public if o.startswith(('Label', 'Multi'))} <= {o.split('.')[-1] for syms in index['syms'].values() for o in syms}

@needs_checkout
def test_ci_runs_the_pythons_that_are_promised():
    job = yaml.safe_load(read('.github/workflows/ci.yaml'))['jobs']['test']
    promised = [c.split(' :: ')[-1] for c in project['classifiers'] if re.search(r'Python :: 3\.\d+$', c)]
    assert job['strategy']['matrix']['python'] == promised and project['requires-python'] == f'>={promised[0]}'
    assert job['steps'][-1] == {'run': '.ci/run'} and os.access(root/'.ci/run', os.X_OK)

@needs_checkout
def test_every_package_is_found_by_setuptools():
    include = pyproject['tool']['setuptools']['packages']['find']['include']
    for folder in {p.parent for p in (root/'fastai_smooth').rglob('*.py')}:
        assert (folder/'__init__.py').exists() and any(fnmatch.fnmatch('.'.join(folder.relative_to(root).parts), o) for o in include), folder

@needs_checkout
@pytest.mark.long
def test_wheel_has_all_modules_and_imports(tmp_path):
    for name in ('pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(root/name, tmp_path)
    shutil.copytree(root/'fastai_smooth', tmp_path/'fastai_smooth')
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path/'dist', tmp_path)
    with zipfile.ZipFile(*(tmp_path/'dist').glob('*.whl')) as wheel: wheel.extractall(tmp_path/'site')
    assert {p.relative_to(root) for p in (root/'fastai_smooth').rglob('*.py')} == {p.relative_to(tmp_path/'site') for p in (tmp_path/'site').rglob('*.py')}
    code = "import fastai_smooth; from fastai_smooth.all import *; print(fastai_smooth.__file__)"
    assert run(sys.executable, '-c', code, cwd=tmp_path/'site').strip() == str(tmp_path/'site/fastai_smooth/__init__.py')

@needs_checkout
def test_readme_has_two_setup_commands_that_ci_runs():
    main_job, tests = re.findall(r'^python3 -m venv .*', read('README.md'), flags=re.M)
    assert main_job.endswith('.venv/bin/fastai_smooth') and tests.endswith('.venv/bin/pytest -n 2')
    assert "grep '^python3 -m venv ' README.md" in read('.ci/run')

@needs_checkout
def test_readme_is_read_in_two_minutes():
    text = re.sub(r'<!--.*?-->', '', read('README.md'))
    assert len(text.split()) <= 1000 and re.findall(r'!\[[^\]]+\]\((.*?)\)', text) == ['nbs/images/readme-1.png']

@needs_checkout
def test_readme_links_lead_somewhere():
    local = [l.split('#')[0] for l in re.findall(r'\]\(([^)]+)\)', read('README.md')) if '://' not in l]
    assert local and not [l for l in local if not (root/l).exists()]
    assert not any(url in read('README.md') for url in project['urls'].values()), 'README.md links to a placeholder'

@needs_checkout
def test_no_local_paths_in_files():
    local = re.compile('|'.join([f'/{d}/' + r'[\w.]' for d in ('root', 'home', 'Users', 'work', 'tmp')] + ['site-' + 'packages']))
    names = run('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=root).splitlines()
    texts = {n: (root/n).read_text(encoding='utf-8', errors='ignore') for n in names if (root/n).is_file() and not n.endswith('.png')}
    assert not {n: found for n, o in texts.items() if (found := sorted(set(local.findall(o))))}

code = '''
import sys, torch
before = set(sys.modules)
sys.modules.update(dict.fromkeys({blocked})) # None: they can't be imported from here on
from fastai_smooth.kernels import smooth_targets, smooth_cross_entropy, smooth_binary_cross_entropy_with_logits
x = torch.randn(4, 3, requires_grad=True)
smooth_cross_entropy(x, torch.tensor([0, 1, 2, 0])).backward()
smooth_binary_cross_entropy_with_logits(x, torch.rand(4, 3)).backward()
print(smooth_targets([1., 0.], eps=.2), x.grad.isfinite().all(), [o for o in ('fastai', 'fastcore', 'triton') if sys.modules.get(o) and o not in before])
'''

@pytest.mark.parametrize('blocked', [['fastai', 'fastcore', 'triton', 'matplotlib', 'pandas', 'sklearn'], []], ids=['without', 'with'])
def test_kernels_need_torch_alone_and_leave_triton_alone_on_the_cpu(blocked):
    assert run(sys.executable, '-c', code.format(blocked=blocked)) == 'tensor([0.9000, 0.1000]) tensor(True) []\n'

def test_all_gives_every_public_name():
    "Star imports in the order that README gives"
    namespace = {}
    exec('from fastai.vision.all import *\nfrom fastai.text.all import *\nfrom fastai.tabular.all import *\nfrom fastai_smooth.all import *', namespace)
    assert not [n for n in public if n not in namespace] and hasattr(namespace['Learner'], 'to_smooth') and hasattr(namespace['Learner'], 'to_hard')
    assert namespace['LabelSmoothingCrossEntropyFlat'].__module__ == 'fastai_smooth.losses' # fastai has one of that name
    for n in ('vision_learner', 'unet_learner'): assert namespace[n] is getattr(fs_all, n)

def test_public_names_pickle():
    ours = {n: o for n, o in vars(fs_all).items() if not n.startswith('_') and callable(o) and (getattr(o, '__module__', None) or '').startswith('fastai_smooth')}
    assert {n for n in public if n.startswith(('smooth', 'Label', 'Multi'))} <= ours.keys()
    for o in ours.values(): assert pickle.loads(pickle.dumps(o)) is o

def test_python_dash_m_is_the_command():
    script, = (e for e in metadata.entry_points(group='console_scripts') if e.name == 'fastai_smooth')
    assert script.load() is fastai_smooth.__main__.main
    by_module = run(sys.executable, '-m', 'fastai_smooth', '--help')
    for option in 'data root download eps noise epochs seeds arch pretrained bs size out'.split(): assert f'--{option}' in by_module
