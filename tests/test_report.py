"What runs say: scores and tables, worked by hand; seeds in one pool; the picture."
import math, re

import numpy as np, pandas as pd, pytest, torch
from fastai.torch_core import tensor
from matplotlib.colors import to_rgb

from fastai_smooth.intervals import reliability
from fastai_smooth.measures import calibration_error
from fastai_smooth.report import *

def fake_run(eps, seed):
    "What `one_run` gives, without training"
    g = torch.Generator().manual_seed(seed)
    logits, targs = torch.randn(30, 10, generator=g), torch.randint(10, (30,), generator=g)
    return dict(eps=eps, seed=seed, **score(logits*(3-2*eps), targs))

def test_score_by_hand():
    "Probabilities 3/4, 1/4 of which the first is right in one row of two; then 9/10 and right"
    res = score(tensor([[math.log(3.), 0.], [math.log(3.), 0.], [0., math.log(9.)]]), tensor([0, 1, 1]))
    assert res['accuracy'] == pytest.approx(2/3) and res['probs'].max(1)[0].tolist() == pytest.approx([.75, .75, .9])
    assert res['nll'] == pytest.approx(-(math.log(.75) + math.log(.25) + math.log(.9))/3)
    assert res['confidence_gap'] == pytest.approx((.75+.75+.9)/3 - 2/3)
    assert res['brier'] == pytest.approx((2*.25**2 + 2*.75**2 + 2*.1**2)/3) and res['brier_low'] < res['brier'] < res['brier_high']
    assert res['ece'] == pytest.approx((2*abs(.75 - .5) + .1)/3) # .75 and .9 lie in two bins
    assert score(tensor([[200., 0.]]), tensor([1]))['nll'] == pytest.approx(200)

def test_temperature_of_a_run_by_hand():
    "The best T for z of 1 and -1, three right of four, has 1/(1+exp(-2/T)) = 3/4; cross-fitted on the others of each fifth"
    res = score(tensor([[1., -1.]]).repeat(400, 1), tensor([0, 0, 0, 1]*100))
    assert res['temperature'] == pytest.approx(2/math.log(3)) and res['after'][:, 0].mean() == pytest.approx(.75, abs=.01)
    assert res['nll_after_t'] == pytest.approx(-(3*math.log(.75) + math.log(.25))/4, abs=5e-3) and res['nll_after_t'] < res['nll']

def results(*rows): return pd.DataFrame(rows, columns=['eps', 'seed', *METRICS])

hand = results((0., 0, .8, .5, .1), (.1, 0, .9, .7, .0), (0., 1, .6, .9, .3), (.1, 1, .9, .5, .0))
told = [[0., 2, '0.7000 ± 0.1414', '0.7000 ± 0.2828', '+0.2000 ± 0.1414', '', '', ''],
        [.1, 2, '0.9000 ± 0.0000', '0.6000 ± 0.1414', '+0.0000 ± 0.0000', '+0.2000 ± 0.1414', '-0.1000 ± 0.4243', '-0.2000 ± 0.1414']]

def test_table_by_hand():
    """accuracy at eps 0: .8, .6, so mean .7 and std .1*sqrt(2); at .1 no spread. Its change, by seed: .1, .3. nll: .7 and .6; the change .2, -.4
    has mean -.1 and std .3*sqrt(2). gap: .2, 0; change -.1, -.3. Pairs are those of a seed, in any order"""
    assert table(hand).values.tolist() == told and table(hand.iloc[[2, 1, 0, 3]]).values.tolist() == told
    assert list(table(hand)) == ['eps', 'seeds', 'accuracy', 'nll', 'confidence gap', 'accuracy vs 0', 'nll vs 0', 'gap vs 0']
    assert list(table(hand[hand.eps > 0])) == ['eps', 'seeds', 'accuracy', 'nll', 'confidence gap']
    assert table(hand[:2]).values.tolist() == [[0., 1, '0.8000', '0.5000', '+0.1000', '', '', ''], # one seed has no spread
                                               [.1, 1, '0.9000', '0.7000', '+0.0000', '+0.1000', '+0.2000', '-0.1000']]
    unfinished = table(pd.concat([hand, results((.1, 2, .3, 9., .5))], ignore_index=True)).values.tolist()[1] # as after Ctrl-C, without its pair
    assert unfinished[5:] == told[1][5:] and unfinished[2].startswith('0.7000')

def test_changes_stand_beside_their_eps():
    "also where runs are in another order, and where an eps has no pair"
    rows = table(results((.1, 1, .9, .7, .0), (.2, 5, .9, .7, .0), (0., 0, .8, .5, .1), (.1, 0, .9, .7, .0)))
    assert rows[['eps', 'accuracy vs 0']].values.tolist() == [[.1, '+0.1000'], [.2, ''], [0., '']]

def test_a_diverged_run_shows(capsys):
    bad = dict(eps=0., seed=0, **score(torch.full((5, 3), math.nan), tensor([0, 1, 2, 0, 1])))
    assert tidy([bad])[['nll', 'brier', 'ece', 'ece_low', 'nll_after_t']].isna().all(axis=None)
    assert 'nan' in calibration_table([bad]).ece[0] and table(tidy([bad, {**bad, 'seed': 1}])).nll[0] == 'nan'
    plot_reliability([bad, fake_run(.1, 0)])

def test_calibration_table_pools_seeds():
    "T is the median: as 1/T can be anything where nearly every image is right, a mean would say 1034.34"
    runs = [{**fake_run(eps, seed), 'temperature': T} for seed, T in enumerate((1.02, 3100., 1.)) for eps in (0., .1)]
    rows = calibration_table(runs)
    assert list(rows) == ['eps', 'brier', 'ece', 'nll after T', 'ece if perfectly calibrated', 'T'] and rows['T'].tolist() == ['1.02', '1.02']
    for i, eps in enumerate((0., .1)):
        some = [r for r in runs if r['eps'] == eps]
        for name in 'brier', 'nll_after_t': # a mean of as many images each
            assert rows[name.replace('_t', ' T').replace('_', ' ')][i].startswith(f'{np.mean([r[name] for r in some]):.4f} [')
        probs, targs = (torch.cat([r[o] for r in some]) for o in ('probs', 'targs'))
        assert rows.ece[i].startswith(f'{calibration_error(probs, targs):.4f} [')

def test_an_image_that_runs_share_counts_once():
    "The same run three times is no more than one, unless its images are others"
    run = fake_run(0., 0)
    others = [{**run, 'images': run['images'] + 100*i} for i in range(3)]
    def interval(runs, name): return [float(o) for o in re.findall(r'[\d.]+', calibration_table(runs)[name][0])]
    for name in 'brier', 'ece', 'nll after T':
        once, thrice, more = (interval(o, name) for o in ([run], [run]*3, others))
        assert thrice == pytest.approx(once, abs=2e-3) and more[2] - more[1] < .8*(once[2] - once[1])
    luck = [interval(o, 'ece if perfectly calibrated') for o in ([run], [run]*3, others)]
    assert luck[0] == luck[1] > luck[2]

def test_plot_pools_seeds_into_one_curve_an_eps():
    "Each in one colour of its own, light for a large eps: C0 to C3 are for under- and overconfident, right and wrong"
    runs = [fake_run(eps, seed) for seed in range(2) for eps in (.1, 0., .4)]
    axes = plot_reliability(runs).axes
    for (top, low), of in zip((axes[::2], axes[1::2]), ('probs', 'after')):
        diagonal, *curves = [o for o in top.lines if len(o.get_xdata())]
        assert [o.get_label() for o in curves] == ['eps 0', 'eps 0.1', 'eps 0.4'] and list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
        bins = reliability(*(torch.cat([r[o] for r in runs if r['eps'] == 0]) for o in (of, 'targs')), min_n=20,
                           groups=torch.cat([r['images'] for r in runs if r['eps'] == 0]))
        assert np.allclose(curves[0].get_xdata(), bins.confidence) and np.allclose(curves[0].get_ydata(), bins.accuracy)
        colours = [to_rgb(o.get_color()) for o in curves]
        assert sorted(colours, key=sum) == colours and not {*colours} & {to_rgb(f'C{i}') for i in range(10)}
        assert len(low.patches) == 3 and {o.get_text(): o.get_color() for o in top.texts} == dict(underconfident='C0', overconfident='C1')
