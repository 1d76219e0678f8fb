"The benchmark: what it reports is what happened. No test looks at how long anything took."
import json, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastai_smooth import bench as B
from fastai_smooth.compare import main

ROOT = Path(__file__).parent.parent
FEW = ['--dtypes', 'float32', '--quick']


def run_main(*args):
    "Exit code of `main`, argparse's own exits included"
    try: return main([str(o) for o in args])
    except SystemExit as e: return e.code


@pytest.mark.parametrize('s,head,shape', [('64x10', 'softmax', (64, 10)), ('sigmoid:4x5', 'sigmoid', (4, 5)), ('8x21x2x3', 'softmax', (8, 21, 2, 3))])
def test_case_is_written_as_it_is_parsed(s, head, shape):
    case = B.Case.parse(s, torch.bfloat16)
    assert case == (head, shape, torch.bfloat16) and str(case) == f'{s} bfloat16'


@pytest.mark.parametrize('s', B.SHAPES + B.HALF + B.QUICK)
def test_every_shape_of_the_issue_is_there(s): assert str(B.Case.parse(s)).split()[0] == s


@pytest.mark.parametrize('bad', ['64', '0x3', 'tanh:3x4', '3xx4', '3x-1', '', '64x1'])
def test_a_bad_shape_is_named(bad, capsys):
    assert run_main('bench', '--shapes', bad) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and repr(bad)[1:-1] in err and ('512x1000' in err or 'one class' in err)


@pytest.mark.parametrize('args', [['--device', 'tpu'], ['--dtypes', 'int8'], ['--rounds', '3']])
def test_bad_options(args, capsys):
    assert run_main('bench', *args) == 2
    assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu(capsys):
    assert run_main('bench', '--device', 'cuda') == 2
    assert 'no GPU' in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_first(tmp_path, capsys):
    assert run_main('bench', '--json', tmp_path/'no'/'such'/'folder.json') == 2
    assert 'folder.json' in capsys.readouterr().err


def test_report(tmp_path, capsys):
    "all numbers in the file, machine, versions and threads named, every contender beside the others"
    f = tmp_path/'b.json'
    f.write_text('old')
    assert run_main('bench', *FEW, '--shapes', '8x10', 'sigmoid:8x10', '--json', f) == 0
    out, res = capsys.readouterr().out, json.loads(f.read_text())
    for k in ('cpu', 'threads', 'torch', 'fastai', 'malloc', 'date'): assert str(res['machine'][k]) in out
    assert res['machine']['threads'] == torch.get_num_threads() and res['machine']['torch'] == torch.__version__.split('+')[0]
    names = {case: [r['name'] for r in res['rows'] if r['case'] == case] for case in ('8x10 float32', 'sigmoid:8x10 float32')}
    assert set(names['8x10 float32']) >= {'ours', 'torch', 'hard', 'ours Flat', 'fastai Flat', 'copy'}
    assert set(names['sigmoid:8x10 float32']) >= {'ours', 'eager', 'ours Flat', 'fastai Flat', 'copy'}
    for r in res['rows']:
        assert r['name'] in out and r['ms'][1] <= r['ms'][0] <= r['ms'][2] and r['rounds'] >= 7
        if r['name'] == 'ours': assert r['vs_ours'] == [1, 1, 1]
        if r['name'] != 'copy': assert r['memory'] >= 1 and r['memory_no_grad'] >= 0 and r['host_us'] > 0


@pytest.mark.parametrize('s', ['6x5', '3x4x2x2', 'sigmoid:6x5'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_all_contenders_compute_the_same(s, dtype):
    "loss and gradient of each, from what `steps` runs, against float64 worked out here"
    case = B.Case.parse(s, dtype)
    x, fs, out = B.steps(case, 'cpu', compiled=False)
    y = B.make_input(case)[1]
    assert len(fs) >= 4 and not any('wrong' in v or 'Error' in v for v in out.values())
    for name, (step, forward) in fs.items():
        if case.head == 'sigmoid': f = lambda d: F.binary_cross_entropy_with_logits(d, y.double()*.9 + .05)
        else: f = lambda d: F.cross_entropy(d, y, label_smoothing=0. if name == 'hard' else .1)
        d = x.detach().double().requires_grad_()
        expected = torch.autograd.grad(f(d), d)[0]
        step()
        assert (x.grad.double() - expected).norm() <= B.TOLERANCE[dtype] * expected.norm(), name
        assert abs(forward().item() - f(d).item()) <= B.TOLERANCE[dtype] * f(d).item(), name


def test_what_computes_something_else_is_not_measured(monkeypatch):
    "a peer is left out and said to be; ours is an error"
    monkeypatch.setattr(B, '_eager', lambda x, y: F.binary_cross_entropy_with_logits(x, y.to(x.dtype)) if x.dtype == torch.float32
                        else F.binary_cross_entropy_with_logits(x, y*.9 + .05))
    _, fs, out = B.steps(B.Case.parse('sigmoid:9x5'), 'cpu', compiled=False)
    assert 'eager' not in fs and out['eager'].startswith('wrong by')
    monkeypatch.setattr(B, 'smooth_cross_entropy', lambda x, y, eps, backend: F.cross_entropy(x, y, label_smoothing=eps + .01))
    with pytest.raises(AssertionError, match='ours is wrong'): B.steps(B.Case.parse('9x5'), 'cpu', compiled=False)


def test_nan_is_an_error():
    g = torch.ones(3)
    assert B.error(torch.tensor(1.), g, (torch.tensor(1.), g)) == 0
    assert not B.error(torch.tensor(1.), g*torch.nan, (torch.tensor(1.), g)) <= 1
    assert not B.error(torch.tensor(torch.nan), g, (torch.tensor(1.), g)) <= 1


def test_summary_of_part_of_the_rows(tmp_path):
    f = tmp_path/'b.json'
    assert run_main('bench', *FEW, '--shapes', '8x10', '--json', f) == 0
    assert '8x10' in B.summary(f) and 'step' not in B.summary(f, f)


def test_rounds_run_all_in_changing_order():
    seen = []
    fs = {k: (lambda k=k: seen.append(k)) for k in 'abc'}
    res = B.in_rounds(fs, 0, least=50)
    rounds = [tuple(seen[9+3*i:12+3*i]) for i in range(50)]  # after the warm-up, three of each
    assert all(sorted(r) == ['a', 'b', 'c'] for r in rounds) and len(set(rounds)) == 6
    assert all(len(ts) == 50 for ts in res.values())


def test_ratio_is_paired():
    "round by round: a machine that is slow in the second half changes no ratio"
    a, b = [(t, t) for t in (2, 2, 20, 20)], [(t, t) for t in (1, 1, 10, 10)]
    assert B.ratio(a, b) == (2, 2, 2)
    assert B.quartiles([1, 2, 3, 4, 5]) == (3, 2, 4)


def row(name, *vs): return dict(case='8x10 float32', name=name, ms=[1., 1., 1.], vs_ours=vs, vs='ours', memory=1.)


@pytest.mark.parametrize('vs,said', [((.2, .66, 53.), 'noisy'), ((1., .5, 1.501), 'noisy'), ((1., .5, 1.5), '1.00'), ((3., 3., 3.), '3.00'), ((1., .2, 5.), 'noisy')])
def test_a_ratio_that_is_too_noisy_is_not_told(vs, said, tmp_path):
    "quartiles more than three times apart, as on a busy machine: in both tables, and in what README shows"
    ours = row('ours', 1., 1., 1.)
    for text in (B.table([ours, row('torch', *vs)]), B.step_table([ours, row('torch', *vs)])):
        line = next(o for o in text.splitlines() if o.startswith('torch'))
        assert float(line.split()[2]) == float(said) if said != 'noisy' else line.split()[2] == said
        assert ('too noisy to tell' in text) == (said == 'noisy')
    (tmp_path/'b.json').write_text(json.dumps(dict(rows=[ours, row('torch', *vs)])))
    assert B.summary(tmp_path/'b.json').splitlines()[1].split()[1] == said


def test_peak_memory():
    x = torch.randn(256, 1024)
    def f():
        a = x + 1
        b = a + 1
        del a
        return b + 1
    assert 2*x.nbytes <= B.peak_memory(f, 'cpu') <= 2*x.nbytes + 99  # scalars, and b and the result, or a and b


def test_fits():
    case = B.Case.parse('64x10')
    assert B.fits(case, 'cpu')
    case = B.Case.parse('1000000x10000000')
    assert not B.fits(case, 'cpu')
    assert list(B.run([case], False, SimpleNamespace(device='cpu', quick=True))) == [([], {str(case): 'not enough memory'})]


def test_memory_of_ours():
    "one tensor of the logits' size with a gradient, none without: what README says, measured as the benchmark does"
    for s in ('1024x10000', 'sigmoid:4096x1000'):
        x, fs, _ = B.steps(B.Case.parse(s), 'cpu', compiled=False)
        step, forward = fs['ours']
        assert x.nbytes <= B.peak_memory(step, 'cpu', x) <= 1.3*x.nbytes
        x.grad = None
        with torch.no_grad(): assert B.peak_memory(forward, 'cpu') <= .3*x.nbytes


def test_interrupted(monkeypatch, tmp_path, capsys):
    "what is measured is kept"
    real, calls = B.measure, []
    def measure(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(B, 'measure', measure)
    assert run_main('bench', *FEW, '--shapes', '8x10', '9x10', '--json', tmp_path/'b.json') == 130
    assert {r['case'] for r in json.loads((tmp_path/'b.json').read_text())['rows']} == {'8x10 float32'}


def test_what_is_measured_is_kept_whatever_goes_wrong(monkeypatch, tmp_path):
    real = B.measure
    def measure(case, *args, **kwargs):
        if case.shape[0] == 9: raise AssertionError('ours is wrong')
        return real(case, *args, **kwargs)
    monkeypatch.setattr(B, 'measure', measure)
    with pytest.raises(AssertionError): run_main('bench', *FEW, '--shapes', '8x10', '9x10', '--json', tmp_path/'b.json')
    assert {r['case'] for r in json.loads((tmp_path/'b.json').read_text())['rows']} == {'8x10 float32'}


def test_learner_steps():
    rows = B.learner_steps(rounds=2, batches=1)
    assert [r['name'] for r in rows] == ['ours Flat', 'fastai Flat', 'multi-label, no callback', 'multi-label, callback']
    assert all(r['rounds'] == 2 for r in rows) and rows[0]['vs_ours'] == (1, 1, 1)
    assert 'callback' in B.step_table(rows)


def test_growth_shares_out_the_logits():
    res = B.growth((10, 20), logits=200, seconds=0)
    assert set(res) >= {'ours', 'torch', 'copy'} and all(len(v) == 2 for v in res.values())


def test_torch_alone():
    "with fastai not importable `python -m fastai_smooth bench` runs, and says what is left out"
    code = ("import sys; sys.modules['fastai'] = sys.modules['fastcore'] = None; import importlib.util as u; find = u.find_spec; "
            "u.find_spec = lambda n, *a: None if n == 'fastai' else find(n, *a); import runpy; "
            "sys.argv = ['x', 'bench', '--quick', '--shapes', '8x10', 'step']; runpy.run_module('fastai_smooth', run_name='__main__')")
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert 'ours' in p.stdout and 'fastai Flat' in p.stdout.split('Left out')[1] and 'step of a Learner: fastai is not installed' in p.stdout
    assert not p.stderr.strip()
