"What runs say: estimates against loops and McNemar's test, sentences for runs with known answers, scores and a table worked by hand; the picture."
import math
from itertools import product

import numpy as np, pandas as pd, pytest, torch
from fastai.torch_core import tensor
from hypothesis import given, settings, strategies as st
from matplotlib.colors import to_rgb
from scipy.stats import binomtest

from fastai_smooth.intervals import reliability
from fastai_smooth.ranking import aurc
from fastai_smooth.report import *

NONE, UNIFORM, ONLINE = Method(), Method(.1), Method(.5, 'online')

def fake_run(method, seed):
    "What `one_run` gives, without training"
    g = torch.Generator().manual_seed(seed)
    logits, targs = torch.randn(30, 10, generator=g), torch.randint(10, (30,), generator=g)
    return dict(method=method, seed=seed, **score(logits*(3-2*method.eps), targs))

def test_a_method_in_words():
    assert [str(o) for o in (NONE, UNIFORM, ONLINE, Method(1.), Method(.123, 'train'))] == ['none', 'uniform 0.1', 'online 0.5', 'uniform 1', 'train 0.123']

# --- how sure is a mean?

def reference(rows, images, unseen):
    "The mean and its margin by loops over seeds and images"
    flat = [(i, x) for xs, idxs in zip(rows, images) for x, i in zip(xs, idxs)]
    n, mean, by_image = len(flat), sum(x for _, x in flat)/len(flat), {}
    for i, x in flat: by_image[i] = by_image.get(i, 0.) + x - mean
    more = [(u-mean)*n/len(by_image) for u in unseen]
    images_error = math.sqrt(sum(o*o for o in [*by_image.values(), *more]))/n
    means = [sum(xs)/len(xs) for xs in rows]
    of_means = sum(means)/len(means)
    seeds_error = math.sqrt(sum((o-of_means)**2 for o in means)/(len(means)-1)/len(means)) if len(means) > 1 else 0.
    return mean, 1.96*max(images_error, seeds_error)

@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 5)), min_size=1, max_size=8, unique_by=lambda o: o[1]), min_size=1, max_size=4),
       st.tuples(st.floats(-1, 1), st.floats(-1, 1)))
def test_estimate(seeds, unseen):
    rows, images = ([[o[k] for o in s] for s in seeds] for k in (0, 1))
    found = estimate([torch.tensor(o, dtype=torch.double) for o in rows], [torch.tensor(o) for o in images], unseen)
    assert found == pytest.approx(reference(rows, images, unseen), abs=1e-12) and found.clear == (abs(found.mean) > found.margin)

def gained(n, lost, of=359): return torch.tensor([1.]*n + [-1.]*lost + [0.]*(of-n-lost), dtype=torch.double)

@pytest.mark.parametrize('n, lost', product(range(0, 13, 2), range(0, 13, 3)))
def test_one_seed_is_mcnemars_test(n, lost):
    "Which takes what changed only: is it a fair coin's? Where its p is not between .03 and .07 both agree"
    p = binomtest(n, n+lost).pvalue if n+lost else 1.
    assert estimate([gained(n, lost)], [torch.arange(359)], (-1, 1)).clear == (p < .05) or .03 < p < .07

def test_few_images_leave_something_open():
    "Three gained of three; none gained of 359, whose interval by the rule of three is up to 3/359"
    assert not estimate([gained(3, 0, 3)], [torch.arange(3)], (-1, 1)).clear and .7 < 359*estimate([gained(0, 0)], [torch.arange(359)], (-1, 1)).margin/3 < 1.1

def test_an_image_that_seeds_share_counts_once():
    once, shared = (estimate([gained(6, 3)]*k, [torch.arange(359)]*k, (-1, 1)) for k in (1, 3))
    others = estimate([gained(6, 3)]*3, [torch.arange(359) + 359*i for i in range(3)], (-1, 1))
    assert shared == pytest.approx(once) and others.margin < .6*once.margin

def test_seeds_that_differ_count():
    "As large as the error of the mean of .1 and .3: .1"
    x = [torch.tensor([1.]*k + [0.]*(1000-k), dtype=torch.double) for k in (100, 300)]
    assert estimate(x, [torch.arange(1000), torch.arange(1000, 2000)], (0, 1)) == pytest.approx((.2, 1.96*.1))

@pytest.mark.parametrize('mean, margin, sign, text', [(.0123, .0057, '', '1.23 ± 0.57'), (.0123, .0157, '+', '+1.2 ± 1.6'), (-.5, .25, '+', '-50 ± 25'), (.8, 2., '', '80 ± 200'),
                                                      (.123456, .00098, '', '12.346 ± 0.098'), (.38, .0996, '', '38 ± 10')])
def test_percent_has_two_digits_of_the_margin(mean, margin, sign, text): assert Estimate(mean, margin).percent(sign) == text

# --- words

def made(method, right, confidence=.9, seed=0, n=100, images=None, k=10):
    "A run that is right about the first `right` of `n` images, a tenth of them of each class, all with one confidence"
    targs, probs = torch.arange(n) % k, torch.full((n, k), (1-confidence)/(k-1), dtype=torch.double)
    probs[torch.arange(n), torch.where(torch.arange(n) < right, targs, (targs+1) % k)] = confidence
    return dict(method=method, seed=seed, probs=probs, targs=targs, images=torch.arange(n) + (n*seed if images is None else images))

def seeds(method, *rights, **kwargs): return [made(method, o, seed=i, **kwargs) for i, o in enumerate(rights)]

LOST = {**made(UNIFORM, 80), 'probs': torch.full((100, 10), math.nan)}
ONE_SEED = 'One seed says nothing of others: give --seeds 3 or more.'
CASES = {
 'the main job': (seeds(NONE, 800, 802, 798, n=1000) + seeds(UNIFORM, 830, 832, 828, n=1000, confidence=.7) + seeds(ONLINE, 835, 836, 834, n=1000, confidence=.83),
    'Uniform smoothing raised accuracy by 3.00 ± 0.62 points in 3 seeds and made the probabilities underconfident (by 13.0 ± 1.3 points); online smoothing raised it by '
    '3.50 ± 0.66 points and made them calibrated, as far as these images tell (off by -0.5 ± 1.3 points). Online smoothing was more accurate than uniform smoothing by 0.50 ± 0.27 points. '
    'Without smoothing accuracy was 80.0 ± 1.4% and the probabilities were overconfident (by 10.0 ± 1.4 points).',
    'With 3 seeds of 1000 images a difference in accuracy has to be about 0.66 points to show; more --seeds, or images, show smaller ones.'),
 'one seed': ([made(NONE, 80), made(UNIFORM, 83, .82)],
    'Uniform smoothing changed accuracy by +3.0 ± 4.3 points in 1 seed, too small to tell, and made the probabilities calibrated, as far as these images tell (off by -1.0 ± 7.5 points). '
    'Without smoothing accuracy was 80.0 ± 8.0% and the probabilities were overconfident (by 10.0 ± 8.0 points).',
    'With 1 seed of 100 images a difference in accuracy has to be about 4.3 points to show; more --seeds, or images, show smaller ones. ' + ONE_SEED),
 'it lowered accuracy': ([made(ONLINE, 70, .3), made(NONE, 90)],
    'Online smoothing lowered accuracy by 20.0 ± 8.3 points in 1 seed and made the probabilities underconfident (by 40.0 ± 9.1 points). '
    'Without smoothing accuracy was 90.0 ± 6.1% and the probabilities were calibrated, as far as these images tell (off by +0.0 ± 6.1 points).',
    'With 1 seed of 100 images a difference in accuracy has to be about 8.3 points to show; more --seeds, or images, show smaller ones. ' + ONE_SEED),
 'all the same': (seeds(NONE, 80, 80) + seeds(UNIFORM, 80, 80),
    'Uniform smoothing changed accuracy by +0.0 ± 1.4 points in 2 seeds, too small to tell, and left the probabilities overconfident (by 10.0 ± 5.6 points). '
    'Without smoothing accuracy was 80.0 ± 5.6% and the probabilities were overconfident (by 10.0 ± 5.6 points).',
    'With 2 seeds of 100 images a difference in accuracy has to be about 1.4 points to show; more --seeds, or images, show smaller ones.'),
 'one method': (seeds(ONLINE, 80, 81, confidence=.8),
    'With online smoothing accuracy was 80.5 ± 5.6% in 2 seeds and the probabilities were calibrated, as far as these images tell (off by -0.5 ± 5.6 points).',
    'What smoothing changes is seen beside no smoothing: add 0 to --eps.'),
 'no smoothing alone': (seeds(NONE, 80, 81, confidence=.8),
    'Without smoothing accuracy was 80.5 ± 5.6% in 2 seeds and the probabilities were calibrated, as far as these images tell (off by -0.5 ± 5.6 points).', ''),
 'none is not among them': (seeds(UNIFORM, 80, 81) + seeds(ONLINE, 95, 96),
    'With uniform smoothing accuracy was 80.5 ± 5.6% in 2 seeds and the probabilities were overconfident (by 9.5 ± 5.6 points); with online smoothing it was 95.5 ± 3.0% '
    'and they were underconfident (by 5.5 ± 3.0 points). Online smoothing was more accurate than uniform smoothing by 15.0 ± 5.1 points.',
    'With 2 seeds of 100 images a difference in accuracy has to be about 5.1 points to show; more --seeds, or images, show smaller ones. '
    'What smoothing changes is seen beside no smoothing: add 0 to --eps.'),
 'two eps': ([made(NONE, 50), made(Method(.1), 70), made(Method(.4), 88), made(ONLINE, 90)],
    'Uniform smoothing (eps 0.1) raised accuracy by 20.0 ± 8.3 points in 1 seed and left the probabilities overconfident (by 20.0 ± 9.1 points); uniform smoothing (eps 0.4) '
    'raised it by 38 ± 10 points and made them calibrated, as far as these images tell (off by +2.0 ± 6.6 points); online smoothing raised it by 40 ± 10 points and made them calibrated (off by +0.0 ± 6.1 points). '
    "Online smoothing was more accurate than uniform smoothing (eps 0.1) by 20.0 ± 8.3 points; it can't be told from uniform smoothing (eps 0.4). "
    'Without smoothing accuracy was 50.0 ± 9.9% and the probabilities were overconfident (by 40.0 ± 9.9 points).',
    'With 1 seed of 100 images a difference in accuracy has to be about 10 points to show; more --seeds, or images, show smaller ones. ' + ONE_SEED),
 'two are behind': (seeds(NONE, 50) + seeds(UNIFORM, 60) + seeds(Method(.4), 90) + seeds(ONLINE, 40),
    'Uniform smoothing (eps 0.1) raised accuracy by 10.0 ± 6.5 points in 1 seed and left the probabilities overconfident (by 30.0 ± 9.7 points); uniform smoothing (eps 0.4) '
    'raised it by 40 ± 10 points and made them calibrated, as far as these images tell (off by +0.0 ± 6.1 points); online smoothing lowered it by 10.0 ± 6.5 points and left them overconfident '
    '(by 50.0 ± 9.7 points). Uniform smoothing (eps 0.4) was more accurate than uniform smoothing (eps 0.1) by 30.0 ± 9.4 points and than online smoothing by 50 ± 10 points. '
    'Without smoothing accuracy was 50.0 ± 9.9% and the probabilities were overconfident (by 40.0 ± 9.9 points).',
    'With 1 seed of 100 images a difference in accuracy has to be about 10 points to show; more --seeds, or images, show smaller ones. ' + ONE_SEED),
 'a folder with images for validation': (seeds(NONE, 80, 81, images=0) + seeds(UNIFORM, 82, 82, images=0) + seeds(ONLINE, 82, 82, images=0) + seeds(Method(.2), 82, 82, images=0),
    'Uniform smoothing (eps 0.1) changed accuracy by +1.5 ± 3.5 points in 2 seeds, too small to tell, and left the probabilities overconfident (by 8.0 ± 7.7 points); '
    'online smoothing changed it by +1.5 ± 3.5 points, too small to tell, and left them overconfident (by 8.0 ± 7.7 points); '
    'uniform smoothing (eps 0.2) changed it by +1.5 ± 3.5 points, too small to tell, and left them overconfident (by 8.0 ± 7.7 points). '
    'With 2 seeds on the same 100 images the differences between them are too small to tell. '
    'Without smoothing accuracy was 80.5 ± 7.9% and the probabilities were overconfident (by 9.5 ± 7.9 points).',
    'With 2 seeds on the same 100 images a difference in accuracy has to be about 3.5 points to show; more --seeds, or images, show smaller ones.'),
 'interrupted': (seeds(NONE, 80, 81) + seeds(UNIFORM, 82),
    'Uniform smoothing changed accuracy by +2.0 ± 3.9 points in 1 seed, too small to tell, and left the probabilities overconfident (by 8.0 ± 7.7 points). '
    'Without smoothing accuracy was 80.5 ± 5.6% in 2 seeds and the probabilities were overconfident (by 9.5 ± 5.6 points).',
    'With 2 seeds of 100 images a difference in accuracy has to be about 3.9 points to show; more --seeds, or images, show smaller ones.'),
 'interrupted, none last': (seeds(UNIFORM, 82, 70) + seeds(NONE, 80),
    'Uniform smoothing changed accuracy by +2.0 ± 3.9 points in 1 seed, too small to tell, and left the probabilities overconfident (by 14 ± 12 points). '
    'Without smoothing accuracy was 80.0 ± 8.0% in 1 seed and the probabilities were overconfident (by 10.0 ± 8.0 points).'.replace(' in 1 seed and', ' and'),
    'With 2 seeds of 100 images a difference in accuracy has to be about 3.9 points to show; more --seeds, or images, show smaller ones.'),
 'one diverged': ([*seeds(NONE, 80, 81), made(UNIFORM, 80), {**LOST, 'seed': 1}, *seeds(ONLINE, 80, 81)],
    'Online smoothing changed accuracy by +0.0 ± 1.4 points in 2 seeds, too small to tell, and left the probabilities overconfident (by 9.5 ± 5.6 points). '
    'Without smoothing accuracy was 80.5 ± 5.6% and the probabilities were overconfident (by 9.5 ± 5.6 points). '
    'With uniform smoothing training diverged in 1 of 2 seeds: try a smaller --lr.',
    'With 2 seeds of 100 images a difference in accuracy has to be about 1.4 points to show; more --seeds, or images, show smaller ones.'),
 'none diverged': ([{**LOST, 'method': NONE}, made(UNIFORM, 80), made(ONLINE, 85)],
    'With uniform smoothing accuracy was 80.0 ± 8.0% in 1 seed and the probabilities were overconfident (by 10.0 ± 8.0 points); with online smoothing it was 85.0 ± 7.2% '
    'and they were calibrated, as far as these images tell (off by +5.0 ± 7.2 points). With 1 seed of 100 images the difference between them is too small to tell. '
    'Without smoothing training diverged: try a smaller --lr.',
    'With 1 seed of 100 images a difference in accuracy has to be about 5.1 points to show; more --seeds, or images, show smaller ones. ' + ONE_SEED),
 'all diverged': ([{**LOST, 'method': NONE}, LOST],
    'Without smoothing training diverged: try a smaller --lr. With uniform smoothing training diverged: try a smaller --lr.', ''),
 'not learnt': (seeds(NONE, 12, 13) + seeds(UNIFORM, 11, 12),
    'Uniform smoothing changed accuracy by -1.0 ± 2.0 points in 2 seeds, too small to tell, and left the probabilities overconfident (by 78.5 ± 4.5 points). '
    'Without smoothing accuracy was 12.5 ± 4.7% and the probabilities were overconfident (by 77.5 ± 4.7 points).',
    'The models have hardly learnt, as far as these images tell: always naming the most frequent class would be right for 10.0% of them; try more --epochs. '
    'With 2 seeds of 100 images a difference in accuracy has to be about 2.0 points to show; more --seeds, or images, show smaller ones.'),
 'one has hardly learnt': ([made(NONE, 80), made(UNIFORM, 32)], # 68 wrong of 90 by chance, more than 3/4 of them
    'Uniform smoothing lowered accuracy by 48 ± 10 points in 1 seed and left the probabilities overconfident (by 58.0 ± 9.3 points). '
    'Without smoothing accuracy was 80.0 ± 8.0% and the probabilities were overconfident (by 10.0 ± 8.0 points).',
    'The models with uniform smoothing have hardly learnt, as far as these images tell: always naming the most frequent class would be right for 10.0% of them; try more --epochs. '
    'With 1 seed of 100 images a difference in accuracy has to be about 10 points to show; more --seeds, or images, show smaller ones. ' + ONE_SEED),
 'it has learnt': ([made(UNIFORM, 33, confidence=.33)], # 67 wrong
    'With uniform smoothing accuracy was 33.0 ± 9.3% in 1 seed and the probabilities were calibrated, as far as these images tell (off by +0.0 ± 9.3 points).',
    ONE_SEED + ' What smoothing changes is seen beside no smoothing: add 0 to --eps.'),
 'two classes, few images': ([made(NONE, 7, n=10, k=2)], # better than 5 of 10, but not by more than luck
    'Without smoothing accuracy was 70 ± 32% in 1 seed and the probabilities were calibrated, as far as these images tell (off by +20 ± 32 points).',
    'The models have hardly learnt, as far as these images tell: always naming the most frequent class would be right for 50.0% of them; try more --epochs. ' + ONE_SEED),
}

@pytest.mark.parametrize('case', CASES)
def test_in_words(case):
    "To the letter; whatever the order of the seeds"
    runs, said, not_told = CASES[case]
    for some in runs, sorted(runs, key=lambda r: ([o['method'] for o in runs].index(r['method']), -r['seed'])):
        assert answer(some) == said and limits(some) == not_told

def halves(method, a, b, seed=0, **kwargs):
    "A run of two halves, each a pair of how many of 100 are right, and its confidence"
    of = [made(method, right, confidence, seed, **kwargs) for right, confidence in (a, b)]
    return dict(method=method, seed=seed, probs=torch.cat([o['probs'] for o in of]), targs=torch.cat([o['targs'] for o in of]), images=torch.arange(200) + 200*seed)

NEITHER = 'neither over- nor underconfident on the whole, but not calibrated'

@pytest.mark.parametrize('before, after, words', [
    (made(NONE, 160, n=200), halves(UNIFORM, (65, .95), (75, .45)), f'made the probabilities {NEITHER} (ECE 30.0%)'),
    (halves(NONE, (60, .9), (80, .5)), halves(UNIFORM, (65, .95), (75, .45)), f'left the probabilities {NEITHER} (ECE 30.0%)'),
    (halves(NONE, (65, .95), (75, .45)), halves(UNIFORM, (95, .95), (45, .45)), 'made the probabilities calibrated, as far as these images tell (off by'),
    (halves(NONE, (65, .95), (75, .45)), halves(UNIFORM, (93, .95), (47, .45)), 'made the probabilities calibrated, as far as these images tell (off by')]) # an ECE of 2% is luck
def test_a_gap_of_0_is_not_enough(before, after, words): assert words in answer([before, after])

def test_a_level_that_is_not_calibrated():
    "Seeds pooled: a half is off by 25 points in one seed, by 35 in the other"
    runs = [halves(NONE, (70, .95), (70, .45)), halves(NONE, (60, .95), (80, .45), seed=1)]
    assert answer(runs).endswith(f'in 2 seeds and the probabilities were {NEITHER} (ECE 30.0%, seeds pooled).')

def test_calibrated_models_are_called_so():
    "Targets drawn from the probabilities, 40 times; 5% may be off by their gap, 5% by their ECE"
    calibrated = 0
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        probs = (2*torch.randn(300, 4, generator=g, dtype=torch.double)).softmax(1)
        calibrated += ' calibrated' in answer([dict(method=NONE, seed=0, probs=probs, targs=probs.multinomial(1, generator=g)[:, 0], images=torch.arange(300))])
    assert 33 <= calibrated < 40

def test_images_that_seeds_share_are_no_more_of_them():
    "Off by 8 points in each half: luck with 200 images, also if three seeds show the same of them; not with 600"
    def three(**kwargs): return [halves(NONE, (87, .95), (53, .45), seed=i) | kwargs for i in range(3)]
    assert ' calibrated' in answer(three(images=torch.arange(200))) and NEITHER in answer(three())

# --- scores, table and picture

def test_score_by_hand():
    "Probabilities 3/4, 1/4 of which the first is right in one row of two; then 9/10 and right"
    logits, targs = tensor([[math.log(3.), 0.], [math.log(3.), 0.], [0., math.log(9.)]]), tensor([0, 1, 1])
    res = score(logits, targs)
    assert res['accuracy'] == pytest.approx(2/3) and res['probs'].max(1)[0].tolist() == pytest.approx([.75, .75, .9])
    assert res['nll'] == pytest.approx(-(math.log(.75) + math.log(.25) + math.log(.9))/3)
    assert res['confidence_gap'] == pytest.approx((.75+.75+.9)/3 - 2/3)
    rows, mean = [.75-1, .75, .9-1], (.75+.75+.9)/3 # an image more would be right or wrong with the mean confidence
    assert res['confidence_gap_high'] - res['confidence_gap'] == pytest.approx(reference([rows], [[0, 1, 2]], (mean-1, mean))[1])
    assert res['brier'] == pytest.approx((2*.25**2 + 2*.75**2 + 2*.1**2)/3)
    assert res['ece'] == pytest.approx((2*abs(.75 - .5) + .1)/3) # .75 and .9 lie in two bins
    assert (res['aurc'], res['aurc_low'], res['aurc_high']) == aurc(res['probs'], targs)[:3]
    assert res['error_surest_half'] == pytest.approx(.5*.5/1.5) # the surest is right; of the next two, equally sure, half an image is covered, and one of two wrong
    for o in 'accuracy', 'nll', 'brier', 'ece', 'nll_after_t', 'confidence_gap', 'aurc': assert res[f'{o}_low'] < res[o] < res[f'{o}_high'] or o == 'ece', o

def test_temperature_of_a_run_by_hand():
    "The best T for z of 1 and -1, three right of four, has 1/(1+exp(-2/T)) = 3/4; cross-fitted on the others of each fifth"
    res = score(tensor([[1., -1.]]).repeat(400, 1), tensor([0, 0, 0, 1]*100))
    assert res['temperature'] == pytest.approx(2/math.log(3)) and res['after'][:, 0].mean() == pytest.approx(.75, abs=.01)
    assert res['nll_after_t'] == pytest.approx(-(3*math.log(.75) + math.log(.25))/4, abs=5e-3) and res['nll_after_t'] < res['nll']

def test_table_is_means_over_seeds():
    "In the order of the methods, also of what was read from a file with more columns"
    results = pd.DataFrame([('none', 0, .8, .5, .4, .1, 0.), ('uniform 0.1', 0, .9, .7, .6, .2, .01), ('none', 1, .6, .9, .8, .3, .02), ('uniform 0.1', 1, .9, .5, .4, .1, .03)],
                           columns=['method', 'seed', 'accuracy', 'nll', 'nll_after_t', 'ece', 'error_surest_half'])
    assert list(table(results)) == ['method', 'accuracy', 'NLL', 'NLL after temperature', 'ECE', 'error among the surest half']
    assert table(results).values.tolist() == [['none', '70.0%', '0.700', '0.600', '20.0%', '1.0%'], ['uniform 0.1', '90.0%', '0.600', '0.500', '15.0%', '2.0%']]

def test_a_row_a_run():
    runs = [fake_run(m, seed) for m in (NONE, ONLINE) for seed in range(2)]
    res = tidy(runs)
    assert res.method.tolist() == ['none']*2 + ['online 0.5']*2 and res.eps.tolist() == [0, 0, .5, .5] and res.seed.tolist() == [0, 1]*2
    for i, run in enumerate(runs): assert all(run[c] == res[c][i] for c in res.columns[3:]) and len(res.columns) == 26

def test_a_diverged_run_shows():
    bad = dict(method=NONE, seed=0, **score(torch.full((5, 3), math.nan), tensor([0, 1, 2, 0, 1])))
    assert tidy([bad])[['nll', 'brier', 'ece', 'ece_low', 'nll_after_t', 'confidence_gap', 'error_surest_half', 'aurc', 'aurc_low']].isna().all(axis=None)
    shown = table(tidy([bad, fake_run(NONE, 1), fake_run(UNIFORM, 1)]))
    assert shown.NLL[0] == shown.ECE[0] == 'nan' != shown.NLL[1]
    plot_reliability([bad, fake_run(UNIFORM, 0)])

def test_plot_pools_seeds_into_one_curve_a_method():
    "Each in one colour of its own, light for a large eps: C0 to C3 are for under- and overconfident, right and wrong"
    runs = [fake_run(method, seed) for seed in range(2) for method in (Method(.4), UNIFORM, NONE, ONLINE)]
    axes = plot_reliability(runs).axes
    for (top, low), of in zip((axes[::2], axes[1::2]), ('probs', 'after')):
        diagonal, *curves = [o for o in top.lines if len(o.get_xdata())]
        assert [o.get_label() for o in curves] == ['none', 'online 0.5', 'uniform 0.1', 'uniform 0.4'] and list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
        bins = reliability(*(torch.cat([r[o] for r in runs if r['method'] == NONE]) for o in (of, 'targs')), min_n=20,
                           groups=torch.cat([r['images'] for r in runs if r['method'] == NONE]))
        assert np.allclose(curves[0].get_xdata(), bins.confidence) and np.allclose(curves[0].get_ydata(), bins.accuracy)
        colours = [to_rgb(o.get_color()) for o in curves]
        assert sorted(colours, key=sum) == colours and not {*colours} & {to_rgb(f'C{i}') for i in range(10)}
        assert len(low.patches) == 4 and {o.get_text(): o.get_color() for o in top.texts} == dict(underconfident='C0', overconfident='C1')
