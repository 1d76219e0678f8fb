"benchmarks/labels.py: its data are what it says, its record is what its tables say, and the script runs."
import json, sys
from pathlib import Path
import numpy as np, pytest, torch
from sklearn.metrics import f1_score

PATH = Path(__file__).resolve().parents[2]/'benchmarks/labels.py'
if not PATH.exists(): pytest.skip('needs the checkout', allow_module_level=True)
sys.path.append(str(PATH.parent)) # it imports others that lie beside it
import labels, labels_table
from labels_table import best, cases, cell, change

def row(method, seed, mAP, t_nll): return dict(data='pairs', labels='clean', method=method, seed=seed, mAP=mAP, t_nll=t_nll)

ROWS = [row('hard', 0, 90., .3), row('hard', 1, 92., .5), row('hard', 2, 91., .5), row('(.1, 0)', 0, 93., .4), row('(.1, 0)', 1, 95.2, .6),
        row('(.1, 0)', 2, 94.1, .6), row('(.1, 0)', 3, 0., .4)] # a seed that hard labels have not: it is left out

def test_changes_from_hard_labels():
    by = cases(ROWS)
    case, = by
    mean, error = change(by, '(.1, 0)', 'mAP') # +3, +3.2, +3.1
    assert mean == pytest.approx(3.1) and error == pytest.approx(1.96*.1/3**.5)
    assert cell(by, '(.1, 0)', 'mAP') == '+3.1 ± .1 *' and cell(by, 'hard', 'mAP', '(.1, 0)') == '-3.1 ± .1 *'
    assert cell(by, '(.1, 0)', 't_nll') == '+.100 ± .000 *'
    assert best(by[case], 'mAP') == '(.1, 0) *' and best(by[case], 't_nll') == 'hard'

def test_tables_are_what_the_record_says():
    record = json.loads(PATH.with_suffix('.json').read_text())
    assert PATH.with_suffix('.md').read_text() == labels_table.markdown(record)
    names = {(o['data'], o['labels'], o['method'], o['seed']) for o in record['rows']}
    assert len(names) == len(record['rows']) and {o[2] for o in names} == set(labels.METHODS)

@pytest.mark.parametrize('how, missing, added', [('clean', 0, 0), ('.3 missing', .3, 0), ('one positive', .5, 0), ('.1 flipped', .1, .1)])
def test_wrong_labels(how, missing, added):
    y = np.zeros((4000, 10), np.float32)
    y[:,[2, 7]] = 1
    res = labels.corrupted(y, how, np.random.default_rng(0))
    assert set(np.unique(res)) <= {0, 1} and res.dtype == y.dtype
    assert 1 - res[y == 1].mean() == pytest.approx(missing, abs=.02) and res[y == 0].mean() == pytest.approx(added, abs=.02)
    if how == 'one positive': assert (res.sum(1) == 1).all() and (labels.corrupted(y*0, how, np.random.default_rng(0)) == 0).all()

def test_parts():
    rng = np.random.default_rng(0)
    arrays = [(rng.random((n, 5)).astype(np.float32), (rng.random((n, 4)) < .5).astype(np.float32)) for n in (300, 100, 200)]
    train, valid, test = labels.parts(arrays, '.3 missing', seed=1)
    wrong = [(o.tensors[1].numpy() != y).mean() for o, (_, y) in zip((train, valid, test), arrays)]
    assert wrong[0] == pytest.approx(.15, abs=.04) and wrong[1] == pytest.approx(.15, abs=.06) and wrong[2] == 0
    assert train.tensors[0].mean(0).abs().max() < 1e-5 and (train.tensors[0].std(0) - 1).abs().max() < .01

def test_best_threshold():
    "Logits that are too low by 2: at .5 F1 is low, at the best threshold what it is of the right ones; a scale and a shift mend them"
    gen = torch.Generator().manual_seed(0)
    x = 2*torch.randn(4000, 3, generator=gen, dtype=torch.double)
    y = (torch.rand(4000, 3, generator=gen) < x.sigmoid()).double()
    assert labels.f1(x > 0, y) == pytest.approx(f1_score(y, x > 0, average='micro'))
    low = labels.at_best((x-2).sigmoid(), y, labels.f1)
    assert labels.f1(x-2 > 0, y) < low - .05 and low == pytest.approx(labels.at_best(x.sigmoid(), y, labels.f1), abs=.01)
    mended = labels.scaled_and_shifted((x-2)/3, y)
    assert (mended - x).abs().mean() < .15

def test_script_runs(monkeypatch, capsys):
    "With few images and methods; it writes nothing"
    monkeypatch.setitem(labels.SIZES, 'pairs', (200, 50, 300))
    monkeypatch.setattr(labels, 'METHODS', {k: labels.METHODS[k] for k in ('hard', 'prior .1', '(.1, 0)', 'online .25')})
    monkeypatch.setattr(sys, 'argv', ['labels.py', '--yeast', 'none', '--quick'])
    monkeypatch.setattr(labels, 'save', None)
    labels.main()
    text = capsys.readouterr().out
    assert '## pairs, clean' in text and 'Left out: yeast' in text and '| online .25 |' in text
