"What the benchmark reports is what happened. No test looks at how long anything took."
import contextlib, json, sys
from pathlib import Path

import pytest, torch, torch.nn.functional as F

from fastai_smooth import bench as B
from fastai_smooth.bench import *
from fastai_smooth.cli import run_command

sys.path.append(str(Path(__file__).parent.parent/'benchmarks'))


def run(*args): return run_command(['bench', '--quick', '--seconds', '1e-9', *map(str, args)])

def test_report(tmp_path, capsys):
    "Every contender beside the others, in the file as in the table"
    f = tmp_path/'b.json'
    assert run('--shapes', '8x10', 'sigmoid:8x10', '1000000x10000000', '--json', f) == 0
    out, res = capsys.readouterr().out, json.loads(f.read_text())
    for o in (f'{torch.get_num_threads()} CPU threads', torch.__version__): assert o in out
    names = {case: {r['name'] for r in res['rows'] if r['case'] == case} for case in ('8x10 float32', 'sigmoid:8x10 float32')}
    assert [*names.values()] == [{'ours', 'torch', 'hard', 'ours Flat', 'fastai Flat'}, {'ours', 'eager', 'ours Flat', 'fastai Flat'}]
    for r in res['rows']:
        assert r['name'] in out and r['vs_ours'][1] <= r['vs_ours'][0] <= r['vs_ours'][2] and r['rounds'] >= 7 and r['memory'] >= 1
        if r['name'] == 'ours': assert r['vs_ours'] == [1, 1, 1]
    assert res['left_out'] == {'1000000x10000000 float32: all': 'not enough memory'} and 'not enough memory' in out

@pytest.mark.parametrize('error', [KeyboardInterrupt(), AssertionError('ours is wrong')])
def test_what_is_measured_is_kept_whatever_goes_wrong(error, monkeypatch, tmp_path):
    def measure_one(shape, *args):
        if shape == '9x10': raise error
        return measure(shape, *args)
    monkeypatch.setattr(B, 'measure', measure_one)
    try: assert run('--shapes', '8x10', '9x10', '--json', tmp_path/'b.json') == 130
    except AssertionError as e: assert e is error
    assert {r['case'] for r in json.loads((tmp_path/'b.json').read_text())['rows']} == {'8x10 float32'}

def test_shapes_and_dtypes_arrive(monkeypatch):
    seen = []
    monkeypatch.setattr(B, 'measure', lambda *args: (seen.append(args), ([], {}))[1])
    assert run('--shapes', '8x10', 'sigmoid:3x4', '--dtypes', 'float16', 'float32', '--backend', 'torch') == 0
    assert seen == [(s, d, 'cpu', 1e-9, 'torch') for d in ('float16', 'float32') for s in ('8x10', 'sigmoid:3x4')]
    seen.clear()
    assert run() == 0 and [o[0] for o in seen] == QUICK and {*QUICK} < {*SHAPES}

@pytest.mark.parametrize('s', ['6x5', '3x4x2x2', 'sigmoid:6x5'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_all_contenders_compute_the_same(s, dtype):
    "Loss and gradient of what is timed, against float64 worked out here"
    x, fs, out = B._steps(s, dtype, 'cpu', 'auto', {})
    assert len(fs) >= 4 and not out
    for name, step in fs.items():
        f, _, y = step.args
        d = x.detach().double().requires_grad_()
        right = (F.binary_cross_entropy_with_logits(d, y.double()*.9 + .05) if 'sigmoid' in s else
                 F.cross_entropy(d, y, label_smoothing=0. if name == 'hard' else .1))
        right.backward()
        step()
        assert (x.grad.double() - d.grad).norm() <= TOLERANCE[x.dtype] * d.grad.norm(), name
        assert abs(f(x, y).item() - right.item()) <= TOLERANCE[x.dtype] * right.item(), name

def test_what_computes_something_else_is_not_measured(monkeypatch):
    "A peer is left out and said to be, with nan too; ours is an error"
    peers = {'unsmoothed': F.cross_entropy, 'nan': lambda x, y: F.cross_entropy(x, y)*torch.nan, 'fails': lambda x, y: 1/0, 'hard, too': F.cross_entropy}
    _, fs, out = B._steps('9x5', 'float32', 'cpu', 'auto', peers)
    assert 'hard, too' in fs and out.keys() == {'unsmoothed', 'nan', 'fails'} and out['unsmoothed'].startswith('wrong by') and 'zero' in out['fails']
    monkeypatch.setattr(B, 'smooth_cross_entropy', lambda x, y, eps, backend: F.cross_entropy(x, y, label_smoothing=eps + .01))
    with pytest.raises(AssertionError, match='ours is wrong at 9x5'): measure('9x5')

def test_rounds_run_all_in_changing_order():
    seen = []
    res = in_rounds({k: (lambda k=k: seen.append(k)) for k in 'abc'}, 0, least=50)
    rounds = [tuple(seen[9+3*i:12+3*i]) for i in range(50)]  # after the warm-up, three of each
    assert all(sorted(r) == ['a', 'b', 'c'] for r in rounds) and len(set(rounds)) == 6
    assert all(len(ts) == 50 for ts in res.values())

def test_flat_is_compared_to_flat(monkeypatch):
    monkeypatch.setattr(B, 'in_rounds', lambda fs, *args: {k: [{'ours': 1., 'ours Flat': 2.}.get(k, 8.)]*3 for k in fs})
    assert {r['name']: r['vs_ours'][0] for r in measure('8x10')[0]} == {'ours': 1, 'torch': 8, 'hard': 8, 'ours Flat': 2, 'fastai Flat': 4}

def test_ratio_is_paired():
    "Round by round: a machine that is slow in the second half changes no ratio"
    assert ratio([2, 2, 20, 20], [1, 1, 10, 10]) == [2, 2, 2] and ratio([1, 2, 3, 4, 5], [1]*5) == [3, 2, 4]

@pytest.mark.parametrize('vs, said', [((.2, .66, 53.), 'noisy'), ((1., .5, 1.501), 'noisy'), ((1., .5, 1.5), '1.00'), ((1., .2, 5.), 'noisy')])
def test_a_ratio_that_is_too_noisy_is_not_told(vs, said, tmp_path):
    "Quartiles more than three times apart, as on a busy machine: in the table, and in what README shows"
    from peers import summary
    rows = [dict(case='8x10 float32', name=name, ms=1., vs_ours=v, memory=1.) for name, v in (('ours', (1., 1., 1.)), ('torch', vs))]
    text = table(rows)
    assert text.splitlines()[2].split()[2] == said and ('too noisy to tell' in text) == (said == 'noisy')
    (tmp_path/'b.json').write_text(json.dumps(dict(rows=rows)))
    assert summary(tmp_path/'b.json').splitlines()[1].split()[1] == said and 'step' not in summary(tmp_path/'b.json')

def test_peak_memory():
    "That of two tensors, whatever is freed before the third"
    x = torch.randn(256, 1024)
    def f(): return (x + 1).mul(2).exp()
    assert 2*x.nbytes <= peak_memory(f) <= 2*x.nbytes + 99  # and scalars

@pytest.mark.parametrize('s', ['512x10000', 'sigmoid:4096x1000'])
def test_ours_takes_the_memory_of_the_gradient(s):
    "As README says, measured as the benchmark does"
    x, fs, _ = B._steps(s, 'float32', 'cpu', 'auto', {})
    assert x.nbytes <= peak_memory(fs['ours'], 'cpu', x) <= 1.3*x.nbytes
    x.grad = None
    with torch.no_grad(): assert peak_memory(lambda: fs['ours'].args[0](*fs['ours'].args[1:])) <= .3*x.nbytes

def test_steps_of_a_learner(monkeypatch):
    import peers
    monkeypatch.setattr(peers, 'xresnet18', lambda n_out: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*32*32, n_out)))
    rows = peers.learner_steps(rounds=1, batches=1)
    assert [r['name'] for r in rows] == ['ours Flat', 'fastai Flat', 'online', 'multi-label, no callback', 'multi-label, callback']
    assert rows[0]['vs_ours'] == rows[3]['vs_ours'] == [1, 1, 1] and 'multi-label, callback' in peers.step_table(rows)
    rows = peers.tabular_steps(rounds=1, batches=2)
    assert [r['name'] for r in rows] == [f'tabular, {o}' for o in ('no callback', 'callback', 'online', 'smoothed loss')]
    assert rows[0]['vs_ours'] == [1, 1, 1] and rows[0]['added'] == 0 and {r['vs'] for r in rows} == {'tabular, no callback'} and rows[1]['ms'] > 0

def test_steps_are_compared_in_pairs(monkeypatch):
    "what is added is the median difference of steps that were made one after the other"
    import peers
    class Fake:
        def __init__(self, times): self.times = times
        def add_cbs(self, cbs): self.stop = cbs[1]
        def no_bar(self): return contextlib.nullcontext()
        no_logging = no_bar
        def fit(self, n, lr): self.stop.times += self.times
    a, b = peers.steps_of({'a': Fake([.001, .010, .1]), 'b': Fake([.003, .011, .100])}, 1, dict(a='a', b='a'))
    assert a['added'] == 0 and abs(b['added'] - 1) < 1e-9 and abs(b['ms'] - 11) < 1e-9 and abs(b['vs_ours'][0] - 1.1) < 1e-9
