"benchmarks/calibration.py: its data are what it says, and its sentences are those of hand-counted rows."
import sys
from pathlib import Path
import numpy as np, pytest

PATH = Path(__file__).resolve().parents[2]/'benchmarks/calibration.py'
if not PATH.exists(): pytest.skip('needs the checkout', allow_module_level=True)
sys.path.append(str(PATH.parent)) # it imports others that lie beside it
import calibration
from calibration_table import cases, choice_regret, chosen, epoch_regret, group_differences, judged, mean_error, short

def row(method, seed, accuracy, valid, noise=0.):
    return dict(data='digits', noise=noise, model='MLP', method=method, seed=seed, long=False, accuracy=accuracy, valid_t_nll=valid)

ROWS = [row('hard', 0, 90., .3), row('hard', 1, 92., .5), row('hard', 2, 91., .5), row('online .5', 0, 93., .4), row('online .5', 1, 95.2, .4),
        row('online .5', 2, 94.1, .4), row('online .5', 3, 0., .4)] # a seed that hard labels have not: it is left out

@pytest.mark.parametrize('x, digits, res', [(.123, 2, '.12'), (-.126, 2, '-.13'), (1.5, 1, '1.5'), (-.001, 2, '.00'), (12., 0, '12')])
def test_numbers_are_short(x, digits, res): assert short(x, digits) == res

def test_interval():
    mean, error = mean_error([1., 2., 3.])
    assert (mean, round(error, 6)) == (2., round(1.96/3**.5, 6)) and mean_error([1.]) == (1., None)

def test_which_method_is_better():
    by = cases(ROWS)
    case, = by
    better, worse, unclear = judged(by, 'online .5', 'hard', 'accuracy') # +3, +3.2, +3.1
    assert list(better) == [case] and not worse and not unclear and better[case][0] == pytest.approx(3.1)
    assert list(judged(by, 'hard', 'online .5', 'accuracy')[1]) == [case]
    assert list(judged(by, 'hard', 'hard', 'accuracy')[2]) == [case]

def test_differences_of_groups():
    "Of each seed the mean over the cases of a group, then the mean and error over seeds"
    noisy = [row('hard', s, 80., .3, noise) for noise in (.2, .4) for s in range(3)] + [row('online .5', s, 80. + 10*noise + s, .4, noise) for noise in (.2, .4) for s in range(3)]
    found = group_differences(cases(ROWS + noisy), 'accuracy', 'online .5', 'hard')
    assert found == {'digits, clean': pytest.approx((3.1, 1.96*.1/3**.5)), 'digits, wrong labels': pytest.approx((4., 1.96/3**.5))}

def test_choice_by_validation():
    by = cases(ROWS)
    of, = by.values()
    assert [chosen(of, s, 'valid_t_nll') for s in (0, 1, 2)] == ['hard', 'online .5', 'online .5']
    assert choice_regret(by, 'valid_t_nll', 'accuracy') == pytest.approx([3., 0., 0.])
    assert choice_regret(by, 'hard', 'accuracy') == pytest.approx([3., 3.2, 3.1])

def test_which_epoch():
    epochs = [dict(valid_loss=v, valid_t_nll=t, accuracy=a, t_nll=n) for v, t, a, n in ((.5, .4, 80, .6), (.6, .3, 85, .5), (.7, .5, 84, .45))]
    run = dict(epochs=epochs)
    assert [epoch_regret(run, o, 'accuracy') for o in ('valid_loss', 'valid_t_nll', 'last')] == [5, 0, 1]
    assert [epoch_regret(run, o, 't_nll') for o in ('valid_loss', 'valid_t_nll', 'last')] == pytest.approx([.15, .05, 0])

def test_data():
    rng = np.random.default_rng(0)
    x, y = rng.random((1500, 1, 4, 4)).astype(np.float32), rng.integers(0, 10, 1500)
    train, valid, test = calibration.parts((x, y, None), (900, 300), .4, seed=1)
    assert [len(o) for o in (train, valid, test)] == [900, 300, 300]
    clean = calibration.parts((x, y, None), (900, 300), 0., seed=1)
    wrong = [(a.tensors[1] != b.tensors[1]).double().mean().item() for a, b in zip((train, valid, test), clean)]
    assert wrong[0] == pytest.approx(.4, abs=.05) and wrong[1] == pytest.approx(.4, abs=.1) and wrong[2] == 0
    assert train.tensors[0].mean().abs() < 1e-3 and train.tensors[0].std() == pytest.approx(1, abs=1e-3)

def test_turned_images():
    x, y = np.arange(3200, dtype=np.float32).reshape(200, 1, 4, 4), np.arange(200) % 10
    turned, classes, _ = calibration.turned((x, y, None), seed=0)
    assert (classes // 4 == y).all() and set(classes % 4) == {0, 1, 2, 3}
    assert all((turned[i, 0] == np.rot90(x[i, 0], classes[i] % 4)).all() for i in range(200))
