"benchmarks/grid.py: what it times computes what it says. No test looks at how long anything took."
import importlib.util, json, sys
from pathlib import Path

import pytest, torch

PATH = Path(__file__).resolve().parents[2]/'benchmarks/grid.py'
pytestmark = pytest.mark.skipif(not PATH.exists(), reason='needs the checkout')

@pytest.fixture
def grid(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)   # it imports others that lie beside it
    spec = importlib.util.spec_from_file_location('grid', PATH)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

def test_each_option_is_measured_beside_its_peer_and_has_its_row_in_the_table(grid, tmp_path, monkeypatch, capsys):
    grid.CELLS = list(dict.fromkeys(c._replace(shape=(6, 10, *[2]*(len(c.shape) - 2))) for c in grid.CELLS))
    for dtype in ('float32', 'bfloat16'):
        f = tmp_path/f'grid-{dtype}.json'
        for args in (('--seconds', '0', '--dtype', dtype, '--out', str(f)), ('--table', str(f))):
            monkeypatch.setattr(sys, 'argv', ['grid.py', *args])
            grid.main()
        res, out = json.loads(f.read_text()), capsys.readouterr().out
        assert [(r['name'], r['peer'], r['shape']) for r in res['rows']] == [(str(c), c.peer, list(c.shape)) for c in grid.CELLS]
        assert len(res['rows']) > 20 and res['dtype'] == dtype and all(f'| {r["name"]} | {r["peer"]} |' in out for r in res['rows'])

@pytest.mark.parametrize('option', ['plain', 'weight', 'soft labels', 'prior [K,K]', 'prior [K]', 'masked classes', 'no_grad'])
def test_a_wrong_loss_is_not_timed(grid, option):
    "such as one that forgets to smooth"
    right = grid.smooth_cross_entropy
    grid.smooth_cross_entropy = lambda x, target, eps, **options: right(x, target, 0., **options)
    with pytest.raises(ValueError, match='6x10.*our loss is off'): grid.measure(grid.Cell('softmax', option, (6, 10), 'ours without'), torch.float32, 0)

def test_a_wrong_gradient_is_not_timed(grid):
    right = grid.smooth_binary_cross_entropy_with_logits
    grid.smooth_binary_cross_entropy_with_logits = lambda x, **options: right(2*x - x.detach(), **options)
    with pytest.raises(ValueError, match='sigmoid:6x10 plain: our gradient is off'): grid.measure(grid.Cell('sigmoid', 'plain', (6, 10)), torch.float32, 0)
