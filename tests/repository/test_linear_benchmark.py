"benchmarks/linear.py: what it times computes what it says, and its tables are those of its record. No test looks at how long anything took."
import json, sys
from pathlib import Path
import pytest, torch

PATH = Path(__file__).resolve().parents[2]/'benchmarks/linear.py'
if not PATH.exists(): pytest.skip('needs the checkout', allow_module_level=True)
sys.path.append(str(PATH.parent)) # it imports others that lie beside it
import linear

@pytest.fixture
def few(monkeypatch):
    "Few rows, classes and features"
    monkeypatch.setattr(linear, 'FEATURES', 8)
    monkeypatch.setattr(linear, 'CHUNK_ROWS', (2, 3))
    monkeypatch.setattr(linear, 'LEAST', 2)
    cases = dict.fromkeys(c._replace(rows=9, classes=10) for c in linear.CASES)
    monkeypatch.setattr(linear, 'CASES', list(cases))

def run(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['linear.py', *map(str, args)])
    return linear.main()

def test_each_case_is_measured_and_has_its_row_in_the_tables(few, tmp_path, monkeypatch, capsys):
    f = tmp_path/'linear.json'
    assert not run(monkeypatch, f, '--seconds', 0)
    capsys.readouterr()
    run(monkeypatch, '--table', f)
    res, out = json.loads(f.read_text()), capsys.readouterr().out
    assert [r['option'] for r in res['rows']] == ['plain', 'frozen weight', 'prior [K]', "reduction='none'", 'bfloat16', 'sigmoid', 'chunk_rows']
    assert not res['failed'] and not any(r['left_out'] for r in res['rows'])
    for r in res['rows']:
        assert r['rounds'] >= 2 and r['by']['ours']['ratio'] == [1, 1, 1] and f"| {r['name']} |" in out
        assert 'ours in chunks' in r['by'] and ('PyTorch' in r['by']) == (r['option'] not in ('prior [K]', 'chunk_rows'))
    assert {'chunks of 2', 'chunks of 3'} < {*res['rows'][-1]['by']}

@pytest.mark.parametrize('name, off', [('ours in chunks', 'smooth_linear_cross_entropy'), ('ours', 'smooth_cross_entropy')])
def test_a_wrong_loss_is_not_timed(few, monkeypatch, tmp_path, name, off):
    "such as one that forgets to smooth; the other cases are still measured"
    right = getattr(linear, off)
    monkeypatch.setattr(linear, off, lambda *args, eps, **options: right(*args, eps=0., **options))
    with pytest.raises(ValueError, match=f'9x10 plain, {name}: wrong by'): linear.measure(linear.CASES[0], 0)
    assert run(monkeypatch, f := tmp_path/'linear.json', '--seconds', 0)
    res = json.loads(f.read_text())
    assert [r['option'] for r in res['rows']] == ['sigmoid'] and len(res['failed']) == len(linear.CASES) - 1
    assert all(k in linear.markdown(res) for k in res['failed'])

def test_a_wrong_peer_is_left_out(few, monkeypatch):
    right = linear.contenders
    def contenders(case): return right(case) | {'PyTorch': lambda h, w, b, y: 2*torch.nn.functional.cross_entropy(h @ w.T + b, y)}
    monkeypatch.setattr(linear, 'contenders', contenders)
    row = linear.measure(linear.CASES[0], 0)
    assert row['left_out']['PyTorch'].startswith('wrong by') and 'PyTorch' not in row['by'] and 'ours' in row['by']

def test_memory_is_what_is_allocated_at_one_time_beside_the_gradients():
    def step():
        a = torch.ones(10**6)      # 4 MB
        b = torch.ones(2*10**6)    # and 8 beside it, which go
        del b
        grad = torch.ones(10**6)
        return a.sum(), grad
    assert linear.peak_mb(step) == pytest.approx(12 - 4, abs=.01)

def test_tables_are_what_the_record_says():
    run = json.loads(PATH.with_suffix('.json').read_text())
    assert PATH.with_suffix('.md').read_text() == linear.markdown(run)
    assert [r['name'] for r in run['rows']] == [str(c) for c in linear.CASES] and not run['failed']
