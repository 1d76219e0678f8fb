"benchmarks/grid.py: what it times computes what it says, and its table tells what was measured. No test looks at how long anything took."
import importlib.util, json, sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parent.parent/'benchmarks/grid.py'
pytestmark = pytest.mark.skipif(not PATH.exists(), reason='needs the checkout')


@pytest.fixture(scope='module')
def grid():
    spec = importlib.util.spec_from_file_location('grid', PATH)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture
def run(grid, monkeypatch, capsys):
    "A run of the script: what it prints"
    def run_(*args):
        monkeypatch.setattr(sys, 'argv', ['grid.py', *map(str, args)])
        grid.main()
        return capsys.readouterr().out
    return run_


def small(cell): return cell._replace(shape=(6, 10, *[2]*(len(cell.shape) - 2)))


def test_each_option_is_measured_beside_its_peer(grid, run, tmp_path, monkeypatch):
    cells = list(dict.fromkeys(small(c) for c in grid.CELLS))
    assert len(cells) == len({(str(c), c.peer) for c in cells}) > 20
    monkeypatch.setattr(grid, 'CELLS', cells)
    out, f = run('--seconds', 0, '--out', tmp_path/'grid-small.json'), tmp_path/'grid-small.json'
    res = json.loads(f.read_text())
    assert [(r['name'], r['peer'], r['shape']) for r in res['rows']] == [(str(c), c.peer, list(c.shape)) for c in cells]
    for r in res['rows']:
        assert r['name'] in out and r['pairs'] == grid.LEAST
        for median, low, high in (r['ratio'], r['ms']): assert 0 < low <= median <= high
    assert res['dtype'] == 'float32' and res['machine']['torch'] == torch.__version__.split('+')[0]
    assert {'date', 'cpu', 'threads', 'malloc', 'python'} <= res['machine'].keys()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision(run, tmp_path, dtype):
    run('--seconds', 0, '--only', '64x10 weight', '--dtype', dtype, '--out', tmp_path/'half.json')
    res = json.loads((tmp_path/'half.json').read_text())
    assert res['dtype'] == dtype and [r['name'] for r in res['rows']] == ['64x10 weight', "64x10 weight, reduction='none'"]


@pytest.mark.parametrize('option', ['plain', 'weight', 'soft labels', 'prior [K,K]', 'prior [K]', 'masked classes', 'no_grad'])
def test_a_wrong_loss_is_not_timed(grid, option, monkeypatch):
    "such as one that forgets to smooth"
    right = grid.smooth_cross_entropy
    monkeypatch.setattr(grid, 'smooth_cross_entropy', lambda x, target, eps, **options: right(x, target, 0., **options))
    cell = grid.Cell('softmax', option, (6, 10), 'ours without')
    with pytest.raises(ValueError, match='6x10.*our loss is off'): grid.measure(cell, torch.float32, 0)


def test_a_wrong_gradient_is_not_timed(grid, monkeypatch):
    right = grid.smooth_binary_cross_entropy_with_logits
    monkeypatch.setattr(grid, 'smooth_binary_cross_entropy_with_logits', lambda x, **options: right(2*x - x.detach(), **options))
    with pytest.raises(ValueError, match='sigmoid:6x10 plain: our gradient is off'):
        grid.measure(grid.Cell('sigmoid', 'plain', (6, 10)), torch.float32, 0)


def test_the_table_has_a_column_for_each_file(run, tmp_path):
    def row(name, ratio, ms, peer='PyTorch'): return dict(name=name, peer=peer, ratio=[ratio, ratio, ratio], ms=[ms, ms, ms])
    def write(name, *rows):
        machine = dict(date='2026-01-02', cpu='a CPU', threads=2, torch='2.9', malloc=f'of {name}')
        (tmp_path/f'grid-{name}.json').write_text(json.dumps(dict(machine=machine, dtype='float32', rows=rows)))
        return tmp_path/f'grid-{name}.json'
    out = run('--table', write('before', row('8x5 plain', .5, 2.), row('8x5 prior [K]', .25, 4., 'ours without')),
              write('after', row('8x5 plain', 1.254, .0123), row('8x5 weight', .9, 10.)))
    assert '- before: 1 of 1 cells are slower than PyTorch (below .95), the median is 0.50. float32, ' in out and 'malloc of before' in out
    assert '- after: 1 of 2 cells are slower than PyTorch (below .95), the median is 1.08. ' in out and 'malloc of after' in out
    assert out.splitlines()[-5:] == ['| logits | beside | before | after |', '|---|---|---|---|', '| 8x5 plain | PyTorch | 0.50 (2 ms) | 1.25 (0.0123 ms) |',
                                     '| 8x5 prior [K] | ours without | 0.25 (4 ms) |  |', '| 8x5 weight | PyTorch |  | 0.90 (10 ms) |']
