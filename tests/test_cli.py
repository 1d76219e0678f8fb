"""The program around its commands: options are a function's parameters; bad input, Ctrl-C and output that fails are one line and an exit code.
Where a process is needed, it runs a command that takes no seconds to import."""
import os, re, signal, subprocess, sys
from pathlib import Path

import pytest, torch

from fastai_smooth.cli import *

STUB = '''
import sys, time
from typing import Literal
from fastai_smooth.cli import *

def compare(
    how:Literal['well', 'badly', 'slowly', 'forever', 'without']='well', # It goes
    # Shares,
    # one or more
    eps:list[share]=(0., .1),
    n:count=None, # A number (default: many)
    fast_one:bool=False, # Hurry?
    lr:positive=3e-3, # A rate
):
    """Does something.

    examples: none"""
    print(f'кошка ± {how} {eps} {n} {fast_one} {lr}', flush=True)
    if how == 'badly': raise BadInput('no\\n good: кошка')
    if how == 'slowly': time.sleep(600)
    while how == 'forever': print('on', flush=True)
    if how == 'without': open('no_such_file')

sys.modules['fastai_smooth.compare'] = sys.modules[__name__]
'''

@pytest.fixture
def stub(tmp_path, monkeypatch):
    "The module with the command"
    (tmp_path/'stub.py').write_text(STUB, encoding='utf-8')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, 'fastai_smooth.compare', None) # to be put back
    sys.modules.pop('stub', None)
    import stub
    return stub

def start(tmp_path, *args, code='import stub; ', path='', encoding='utf-8', **kwargs):
    "A process that runs the program with the stub"
    (tmp_path/'stub.py').write_text(STUB, encoding='utf-8')
    code += f'import sys; sys.argv[1:] = {list(args)}; from fastai_smooth.cli import main; sys.exit(main())'
    path = os.pathsep.join(filter(None, [str(path or tmp_path), str(Path(__file__).parent.parent), os.environ.get('PYTHONPATH')]))
    return subprocess.Popen([sys.executable, '-c', code], **{**dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding=encoding), **kwargs},
                            env={**os.environ, 'PYTHONIOENCODING': encoding, 'PYTHONPATH': path},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) # ignored in the background

def refused(capsys, *args):
    "The one line on stderr"
    assert run_command([str(o) for o in args]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch('fastai_smooth: [^\n]+\n', err), err
    return err

# --- options

@pytest.mark.parametrize('args, said', [([], 'well (0.0, 0.1) None False 0.003'), ('--eps .5 0 --n 3 --fast-one --lr 1e-300'.split(), 'well [0.5, 0.0] 3 True 1e-300'),
                                        (['compare', '--how', 'well'], 'well (0.0, 0.1) None False 0.003')])
def test_options_are_parameters(stub, args, said, capsys):
    assert run_command(args) == 0 and capsys.readouterr().out == f'кошка ± {said}\n'

def test_help_is_docstring_and_docments(stub, capsys):
    with pytest.raises(SystemExit) as e: run_command(['--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith('usage: fastai_smooth [compare] [options]\n\nDoes something.\n') and out.endswith('\nexamples: none\n')
    for o in (r'--how \{well,.*\}\s+It goes \(default: well\)', r'--eps EPS \[EPS ...\] +Shares, one or more \(default: 0 0.1\)', r'--n N +A number \(default: many\)\n',
              r'--fast-one +Hurry\?\n', r'--lr LR +A rate \(default: 0.003\)'): assert re.search(o, out, re.S), o

@pytest.mark.parametrize('args, words', [('--how so', 'so well'), ('--ep .1', '--ep'), ('--eps', '--eps'), ('--eps 0 1', '1 [0, 1)'), ('--fast-one 1', '1'), ('--fast_one', '--fast_one --help'), ('banana', 'banana'),
                                         ('--n', '--n'), ('--nonsense', '--nonsense --help')])
def test_wrong_options(stub, capsys, args, words):
    err = refused(capsys, *args.split())
    assert all(w in err for w in words.split()) and '--help lists what there is' in err

NO_COUNT, NO_SHARE = ['0', '-1', '1.5', 'x', '', 'nan', '1e3', '9'*5000], ['x', '', '-1', '-1e-3', 'nan', 'inf', '1.5', '0,1', 'a\nb']
BAD = {'compare': {'--eps': [*NO_SHARE, 'Online', 'online:', 'online:0', 'online:1.5', 'online:nan', 'online:x', 'auto:.1', 'uniform', 'none'], '--noise': [*NO_SHARE, '1'], '--lr': ['0', '-1', 'nan', 'inf', 'x'], '--workers': ['-1', 'x', '1.5'],
                   **{o: NO_COUNT for o in ('--seeds', '--epochs', '--size', '--bs')}, '--out': ['a\0b', 'x'*5000], '--data': ['a\0b', 'x'*5000, 'nowhere']},
       'bench': {'--seconds': ['0', 'x', 'nan', '-1', 'inf', ''], '--dtypes': ['float64', 'x'], '--backend': ['cuda', 'triton'], '--device': ['meta', 'tpu'], '--rounds': ['3'],
                 '--shapes': ['x', '0x5', '5x0', '-1x3', '3', 'softmax:3', 'cat:3x3', '3x1', '', '3\nx', '1.5x2'], '--json': ['no/such/file', 'no\nfolder/x', 'a\0b', 'x'*5000, '.']}}

@pytest.mark.parametrize('command, option', [(c, o) for c in BAD for o in BAD[c]])
def test_bad_values(command, option, tmp_path, monkeypatch, capsys):
    "Each is named in one line, before anything is measured or trained; and leaves nothing behind"
    import fastai_smooth.bench, fastai_smooth.compare
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastai_smooth.bench, 'measure', lambda *args: pytest.fail('it measured'))
    monkeypatch.setattr(fastai_smooth.compare, '_run_all', lambda *args: pytest.fail('it trained'))
    for v in BAD[command][option]: assert option in refused(capsys, command, option, v) and not [*tmp_path.iterdir()]

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu(capsys): assert 'no GPU' in refused(capsys, 'bench', '--device', 'cuda')

@pytest.mark.parametrize('command', ['compare', 'bench'])
def test_help_of_each(command, capsys):
    with pytest.raises(SystemExit): run_command([command, '--help'])
    assert ('exit codes: 0 done, 2 bad input, 130 interrupted' if command == 'compare' else 'columns:') in capsys.readouterr().out

# --- the process

@pytest.mark.parametrize('how, code, said', [('badly', 2, 'no good: кошка'), ('without', 2, "[Errno 2] No such file or directory: 'no_such_file'")])
def test_bad_input_is_one_line(tmp_path, how, code, said):
    out, err = (p := start(tmp_path, '--how', how)).communicate()
    assert (p.returncode, err) == (code, f'fastai_smooth: {said}\n')

def test_output_never_fails_on_encoding(tmp_path):
    "Names in every script, and the ± of the tables, on a terminal that knows ASCII alone"
    out, err = (p := start(tmp_path, '--how', 'badly', encoding='ascii')).communicate()
    assert p.returncode == 2 and r'\u043a' in out and r'\xb1' in out and r'\u043a' in err

needs_posix = pytest.mark.skipif(os.name == 'nt', reason='has other signals and pipes')

@needs_posix
def test_ctrl_c(tmp_path):
    p = start(tmp_path, '--how', 'slowly')
    p.stdout.readline()
    p.send_signal(signal.SIGINT)
    assert p.communicate() == ('', '\nfastai_smooth: interrupted\n') and p.returncode == 130

@needs_posix
@pytest.mark.parametrize('args', [[], ['bench']], ids=str)
def test_ctrl_c_while_fastai_is_imported(tmp_path, args):
    "A module that says when it is imported, and takes long, in place of the first that is"
    for name in 'fastai', 'torch', 'matplotlib', 'numpy':
        (tmp_path/name).mkdir()
        (tmp_path/name/'__init__.py').write_text("import time\nprint('importing', flush=True)\ntry: time.sleep(600)\nexcept BaseException: raise ImportError")
    p = start(tmp_path, *args, code='')
    assert p.stdout.readline() == 'importing\n'
    p.send_signal(signal.SIGINT)
    assert p.communicate() == ('', '\nfastai_smooth: interrupted\n') and p.returncode == 130

@needs_posix
def test_a_reader_that_has_enough(tmp_path):
    "`| head -3`: no traceback"
    p = start(tmp_path, '--how', 'forever')
    for _ in range(3): p.stdout.readline()
    p.stdout.close()
    assert p.stderr.read() == '' and p.wait() == 141

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a device that is always full')
def test_output_to_a_full_disk(tmp_path):
    with open('/dev/full', 'w') as full: p = start(tmp_path, stdout=full)
    assert p.communicate()[1] == "fastai_smooth: can't write to standard output (No space left on device)\n" and p.returncode == 2
