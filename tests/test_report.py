"What runs say: sentences for runs with known answers; the picture."
import math, re
from io import BytesIO
from itertools import permutations

import numpy as np, pytest, torch
from sklearn.metrics import average_precision_score

from fastai_smooth.intervals import reliability
from fastai_smooth.measures import calibration_error
from fastai_smooth.pictures import OVER, UNDER, method_styles
from fastai_smooth.report import *
from fastai_smooth.report import headline
from fastai_smooth.scores import *

from test_scores import NONE, ONLINE, UNIFORM, fake_run, label_run

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
 'the command': (seeds(NONE, 800, 802, 798, n=1000) + seeds(UNIFORM, 830, 832, 828, n=1000, confidence=.7) + seeds(ONLINE, 835, 836, 834, n=1000, confidence=.83),
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
 'one has hardly learnt': ([made(NONE, 80), made(UNIFORM, 32)], # 68 wrong of 90 by guessing, more than 3/4 of them
    'Uniform smoothing lowered accuracy by 48 ± 10 points in 1 seed and left the probabilities overconfident (by 58.0 ± 9.3 points). '
    'Without smoothing accuracy was 80.0 ± 8.0% and the probabilities were overconfident (by 10.0 ± 8.0 points).',
    'The models with uniform smoothing have hardly learnt, as far as these images tell: always naming the most frequent class would be right for 10.0% of them; try more --epochs. '
    'With 1 seed of 100 images a difference in accuracy has to be about 10 points to show; more --seeds, or images, show smaller ones. ' + ONE_SEED),
 'it has learnt': ([made(UNIFORM, 33, confidence=.33)], # 67 wrong
    'With uniform smoothing accuracy was 33.0 ± 9.3% in 1 seed and the probabilities were calibrated, as far as these images tell (off by +0.0 ± 9.3 points).',
    ONE_SEED + ' What smoothing changes is seen beside no smoothing: add 0 to --eps.'),
 'two classes, few images': ([made(NONE, 7, n=10, k=2)], # better than 5 of 10, but that may be chance
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
    (halves(NONE, (65, .95), (75, .45)), halves(UNIFORM, (93, .95), (47, .45)), 'made the probabilities calibrated, as far as these images tell (off by')]) # an ECE of 2% may be chance
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
    "Off by 8 points in each half: may be chance with 200 images, also if three seeds show the same of them; not with 600"
    def three(**kwargs): return [halves(NONE, (87, .95), (53, .45), seed=i) | kwargs for i in range(3)]
    assert ' calibrated' in answer(three(images=torch.arange(200))) and NEITHER in answer(three())

# --- several labels

LESS, QUARTER, ONE_SIDED = Method(.05), Method(.25, 'online'), Method((.1, 0.))

def labelled(method, found, extra=0, confidence=.9, seed=0, n=100, images=None, k=2, rare=False):
    """A run with k labels, each of which a fifth of `n` images have, others for each label. Of these it calls the first `found` likely, and of the
    others `extra`, all with one confidence: so each of the `found` is ranked as high as found+extra images of which it shares found, and the
    rest as high as all. With `rare`, no image has the last label"""
    targs, high = torch.zeros(n, k), torch.zeros(n, k, dtype=torch.bool)
    for j in range(k):
        have, rest = torch.arange(n).roll(-j*n//5).tensor_split([n//5])
        targs[have, j] = 1
        high[have[:found], j] = high[rest[:extra], j] = True
    if rare: targs[:, -1] = 0
    return dict(method=method, seed=seed, vocab=['cat', 'dog', 'cow'][:k], probs=torch.where(high, confidence, 1-confidence).double(), targs=targs,
                images=torch.arange(n) + (n*seed if images is None else images))

def label_seeds(method, *found, **kwargs): return [labelled(method, o, seed=i, **kwargs) for i, o in enumerate(found)]
def precision(found, extra, n): return found/(n/5)*found/(found+extra) + (1-found/(n/5))/5

GONE = {**labelled(LESS, 10), 'probs': torch.full((100, 2), math.nan)}
LABEL_CASES = {
 'the command': (label_seeds(NONE, 100, 101, 99, n=1000, extra=100) + label_seeds(LESS, 130, 131, 129, n=1000, extra=60, confidence=.7) + label_seeds(QUARTER, 140, 141, 139, n=1000, extra=50, confidence=.89),
    'Uniform smoothing raised mean average precision by 16.5 ± 1.6 points in 3 seeds and made the probabilities underconfident (by 17.00 ± 0.79 points); online smoothing '
    'raised it by 22.6 ± 1.8 points and made them neither over- nor underconfident on the whole, but not calibrated (ECE 5.8%, seeds pooled). Online smoothing had a higher '
    'mean average precision than uniform smoothing by 6.1 ± 1.1 points. Without smoothing mean average precision was 35.0 ± 1.7% and the probabilities were overconfident (by '
    '10.00 ± 0.88 points).',
    'With 3 seeds of 1000 images a difference in mean average precision has to be about 1.8 points to show; more --seeds, or images, show smaller ones.'),
 'one-sided, one seed': ([labelled(NONE, 14, 4, .92), labelled(ONE_SIDED, 15, 4, .92)],
    'One-sided smoothing changed mean average precision by +3.8 ± 5.8 points in 1 seed, too small to tell, and left the probabilities calibrated, as far as these images tell '
    '(off by +1.0 ± 4.2 points). Without smoothing mean average precision was 60 ± 13% and the probabilities were calibrated (off by +2.0 ± 4.3 points).',
    'With 1 seed of 100 images a difference in mean average precision has to be about 5.8 points to show; more --seeds, or images, show smaller ones. One seed says nothing of '
    'others: give --seeds 3 or more.'),
 'two kinds of each': ([labelled(NONE, 8, 2, .97), labelled(LESS, 12, 2, .92), labelled(Method(.2), 19, 0), labelled(ONE_SIDED, 19, 0), labelled(Method((.2, .1)), 20, 0)],
    'Uniform smoothing (eps 0.05) raised mean average precision by 15 ± 10 points in 1 seed and made the probabilities calibrated, as far as these images tell (off by +2.0 ± '
    '4.3 points); uniform smoothing (eps 0.2) raised it by 52 ± 13 points and made them underconfident (by 9.0 ± 2.4 points); one-sided smoothing (eps 0.1,0) raised it by 52 ± '
    '13 points and made them underconfident (by 9.0 ± 2.4 points); one-sided smoothing (eps 0.2,0.1) raised it by 56 ± 13 points and made them underconfident (by 10.0 ± 2.0 '
    "points). One-sided smoothing (eps 0.2,0.1) had a higher mean average precision than uniform smoothing (eps 0.05) by 41 ± 14 points; it can't be told from uniform "
    'smoothing (eps 0.2) and one-sided smoothing (eps 0.1,0). Without smoothing mean average precision was 44 ± 13% and the probabilities were overconfident (by 11.0 ± 4.7 '
    'points).',
    'With 1 seed of 100 images a difference in mean average precision has to be about 13 points to show; more --seeds, or images, show smaller ones. One seed says nothing of '
    'others: give --seeds 3 or more.'),
 'no difference': (label_seeds(NONE, 20, 20) + label_seeds(LESS, 20, 20),
    'Uniform smoothing changed mean average precision by +0.0 ± 1.4 points in 2 seeds, too small to tell, and left the probabilities underconfident (by 10.00 ± 0.98 points). '
    'Without smoothing mean average precision was 100.00 ± 0.98% and the probabilities were underconfident (by 10.00 ± 0.98 points).',
    'With 2 seeds of 100 images a difference in mean average precision has to be about 1.4 points to show; more --seeds, or images, show smaller ones.'),
 'on the same images': (label_seeds(NONE, 14, 15, images=0) + label_seeds(LESS, 15, 15, images=0) + label_seeds(QUARTER, 16, 15, images=0),
    'Uniform smoothing changed mean average precision by +2.0 ± 3.9 points in 2 seeds, too small to tell, and left the probabilities underconfident (by 5.0 ± 3.5 points); '
    'online smoothing changed it by +4.0 ± 7.8 points, too small to tell, and left them underconfident (by 5.5 ± 3.3 points). With 2 seeds on the same 100 images the '
    'difference between them is too small to tell. Without smoothing mean average precision was 78 ± 11% and the probabilities were underconfident (by 4.5 ± 3.5 points).',
    'With 2 seeds on the same 100 images a difference in mean average precision has to be about 7.8 points to show; more --seeds, or images, show smaller ones.'),
 'one method': (label_seeds(ONE_SIDED, 18, 17, extra=4, confidence=.95),
    'With one-sided smoothing mean average precision was 73.7 ± 8.3% in 2 seeds and the probabilities were neither over- nor underconfident on the whole, but not calibrated '
    '(ECE 4.3%, seeds pooled).',
    'What smoothing changes is seen beside no smoothing: add 0 to --eps.'),
 'no label is learnt': (label_seeds(NONE, 4, 5, extra=16) + label_seeds(LESS, 5, 5, extra=17),
    'Uniform smoothing changed mean average precision by +0.2 ± 1.6 points in 2 seeds, too small to tell, and left the probabilities overconfident (by 22.0 ± 4.8 points). '
    'Without smoothing mean average precision was 20.5 ± 3.8% and the probabilities were overconfident (by 21.5 ± 4.8 points).',
    'The models have hardly learnt, as far as these images tell: a random ranking would have a mean average precision of 23.4%; try more --epochs. With 2 seeds of 100 images a '
    'difference in mean average precision has to be about 1.6 points to show; more --seeds, or images, show smaller ones.'),
 'one has not learnt': ([labelled(NONE, 2, 30), labelled(LESS, 16)],
    'Uniform smoothing raised mean average precision by 65 ± 11 points in 1 seed and made the probabilities underconfident (by 6.0 ± 3.3 points). Without smoothing mean '
    'average precision was 18.6 ± 4.8% and the probabilities were overconfident (by 38.0 ± 7.7 points).',
    'The models without smoothing have hardly learnt, as far as these images tell: a random ranking would have a mean average precision of 23.4%; try more --epochs. With 1 '
    'seed of 100 images a difference in mean average precision has to be about 11 points to show; more --seeds, or images, show smaller ones. One seed says nothing of others: '
    'give --seeds 3 or more.'),
 'one diverged': ([*label_seeds(NONE, 15, 16), labelled(LESS, 15), {**GONE, 'seed': 1}, *label_seeds(QUARTER, 16, 16)],
    'Online smoothing changed mean average precision by +2.0 ± 3.9 points in 2 seeds, too small to tell, and left the probabilities underconfident (by 6.0 ± 2.1 points). '
    'Without smoothing mean average precision was 82.0 ± 7.4% and the probabilities were underconfident (by 5.5 ± 2.2 points). With uniform smoothing training diverged in 1 of '
    '2 seeds: try a smaller --lr.',
    'With 2 seeds of 100 images a difference in mean average precision has to be about 3.9 points to show; more --seeds, or images, show smaller ones.'),
 'all diverged': ([{**GONE, 'method': NONE}, GONE],
    'Without smoothing training diverged: try a smaller --lr. With uniform smoothing training diverged: try a smaller --lr.',
    ''),
 'a label that no validation image has': (label_seeds(NONE, 14, 15, k=3, rare=True) + label_seeds(LESS, 17, 18, k=3, rare=True),
    'Uniform smoothing raised mean average precision by 12.0 ± 6.4 points in 2 seeds and made the probabilities underconfident (by 2.5 ± 2.1 points). Without smoothing mean '
    'average precision was 78.0 ± 7.9% and the probabilities were neither over- nor underconfident on the whole, but not calibrated (ECE 10.2%, seeds pooled).',
    'With 2 seeds of 100 images a difference in mean average precision has to be about 6.4 points to show; more --seeds, or images, show smaller ones.'),
}

@pytest.mark.parametrize('case', LABEL_CASES)
def test_labels_in_words(case):
    "To the letter; whatever the order of the seeds"
    runs, said, not_told = LABEL_CASES[case]
    for some in runs, sorted(runs, key=lambda r: ([o['method'] for o in runs].index(r['method']), -r['seed'])):
        assert answer(some) == said and limits(some) == not_told

@pytest.mark.parametrize('found, extra, n', [(100, 100, 1000), (14, 4, 100), (20, 0, 100), (2, 30, 100)])
def test_mean_average_precision_of_these_runs(found, extra, n):
    "By hand, and by what the answer is made of; a label that no image has does not count"
    run = labelled(NONE, found, extra, n=n, k=3, rare=True)
    assert headline([run]).level([run]).mean == pytest.approx(precision(found, extra, n)) == average_precision_score(run['targs'][:, :2], run['probs'][:, :2])

@pytest.mark.parametrize('n, k, share', [(60, 20, .02), (60, 20, .05), (60, 6, .05)])
def test_rare_labels_leave_much_to_chance(n, k, share):
    "Two models that are equally good: of 100 pairs about five are told apart, and margins are as large as the differences"
    def one():
        targs = torch.bernoulli(torch.full((n, k), share), generator=g)
        targs[0, 0] = 1
        return [dict(probs=(targs/.4 + torch.randn(n, k, generator=g)).sigmoid().double(), targs=targs, images=torch.arange(n)) for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    found = [headline(o).change([o]) for o in (one() for _ in range(100))]
    assert sum(o.clear for o in found) <= 11 and .75 < np.mean([o.margin for o in found])/1.96/np.std([o.mean for o in found]) < 1.3

@pytest.mark.parametrize('n, positives', [(5, 1), (5, 3), (6, 2), (1, 1)])
def test_a_random_ranking(n, positives):
    "All orders, by scikit-learn. A label that no image has does not count"
    targs = torch.zeros(n, 2)
    targs[:positives, 0] = 1
    orders = [average_precision_score(targs[:, 0], o) for o in permutations(range(n))]
    assert headline([dict(targs=targs)]).guessing([dict(targs=targs)]*2) == pytest.approx(np.mean(orders))

def test_a_pair_of_zeros_is_no_smoothing():
    runs, zeros = LABEL_CASES['on the same images'][0], Method((0., 0.))
    assert answer([r | dict(method=r['method'] if r['method'].smooths else zeros) for r in runs]) == answer(runs)

def test_one_image_with_labels_that_depend_on_each_other_counts_once():
    "Eight labels that are one and the same are no more than that"
    one, same = (labelled(NONE, 15, 4, .8, k=1) for _ in range(2))
    for o in 'probs', 'targs': same[o] = same[o].expand(-1, 8)
    assert re.sub('ECE.*', '', answer([one])) == re.sub('ECE.*', '', answer([same]))

# --- the picture

def test_a_diverged_run_has_no_curve():
    plot_reliability([dict(method=NONE, seed=0, **score(torch.full((5, 3), math.nan), torch.tensor([0, 1, 2, 0, 1]))), fake_run(UNIFORM, 0)])

def test_plot_pools_seeds_into_one_curve_a_method():
    "Each with the colour, line and marker that the method has in all pictures, and its confidence gap in the legend"
    runs = [fake_run(method, seed) for seed in range(2) for method in (Method(.4), UNIFORM, NONE, ONLINE)]
    fig = plot_reliability(runs)
    for (top, low), of, legend in zip((fig.axes[::2], fig.axes[1::2]), ('probs', 'after'), fig.legends):
        diagonal, *curves = [o for o in top.lines if len(o.get_xdata())]
        names = ['none', 'online 0.5', 'uniform 0.1', 'uniform 0.4']
        assert [o.get_label() for o in curves] == names and list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
        bins = reliability(*(torch.cat([r[o] for r in runs if r['method'] == NONE]) for o in (of, 'targs')), min_n=20,
                           groups=torch.cat([r['images'] for r in runs if r['method'] == NONE]))
        assert np.allclose(curves[0].get_xdata(), bins.confidence) and np.allclose(curves[0].get_ydata(), bins.accuracy)
        for curve, style in zip(curves, method_styles(names).values()): assert curve.get_color() == style['color'] and curve.get_marker() == style['marker']
        gap = 100*torch.cat([r[of].max(1)[0] - (r[of].argmax(1) == r['targs']).double() for r in runs if r['method'] == ONLINE]).mean()
        assert float(re.search(r'online 0.5: (\S+) ±', ''.join(o.get_text() for o in legend.texts))[1]) == pytest.approx(gap, abs=1)
        assert len(low.patches) == 4 and {o.get_text(): o.get_color() for o in top.texts} == dict(underconfident=UNDER, overconfident=OVER)
        assert top.get_xlabel() + low.get_xlabel() == 'confidence (%)'

@pytest.mark.parametrize('case, title', [
    ('the command', 'overconfident without smoothing, underconfident with uniform 0.1'),
    ('one method', 'neither over- nor underconfident, as far as these images tell'),
    ('two eps', 'overconfident without smoothing and with uniform 0.1'),
    ('none is not among them', 'overconfident with uniform 0.1, underconfident with online 0.5')])
def test_the_title_says_which_are_over_and_underconfident(case, title):
    "Those of which the answer says so, too"
    runs = [r | dict(after=r['probs']) for r in CASES[case][0]]
    for o in plot_reliability(runs).axes[:2]: assert ' '.join(o.get_title('left').split()).split(': ', 1)[1] == title

def test_plot_of_labels():
    "The six with the largest ECE, on the average of the methods; a curve a method, whose range of ECE is in the title"
    runs = [label_run(method, seed, n=150, k=8) for seed in range(2) for method in (LESS, NONE, ONE_SIDED)]
    def pooled(method, *names): return (torch.cat([r[o] for r in runs if r['method'] == method]) for o in names)
    eces = {m: calibration_error(*pooled(m, 'probs', 'targs'), average=None) for m in (NONE, ONE_SIDED, LESS)}
    order = np.argsort([-sum(o[k].item() for o in eces.values()) for k in range(8)])[:6]
    fig = plot_reliability(runs)
    axes = fig.axes
    assert len(axes) == 12 and 'the 6 of 8 labels with the largest ECE' in fig.get_suptitle()
    tops = [*axes[:3], *axes[6:9]]
    for k, top in zip(order, tops):
        best, worst = (f((LESS, NONE, ONE_SIDED), key=lambda m: eces[m][k]) for f in (min, max))
        low, high = f'{eces[best][k]:.1%}', f'{eces[worst][k]:.1%}'
        assert top.get_title('left') == f'label {k}\nECE {low}' + ('' if low == high else f' ({best}) to {high}')
        curves = [o for o in top.lines if len(o.get_xdata())][1:]
        assert [o.get_label() for o in curves] == ['none', 'one-sided 0.1,0', 'uniform 0.05']
        for curve, method in zip(curves, eces):
            probs, targs, images = pooled(method, 'probs', 'targs', 'images')
            bins = reliability(probs[:, k], targs[:, k], min_n=20, groups=images)
            assert np.allclose(curve.get_xdata(), bins.confidence) and np.allclose(curve.get_ydata(), bins.accuracy)

def test_one_method_has_one_ece():
    run = label_run(NONE, 0, k=2)
    eces = calibration_error(run['probs'], run['targs'], average=None)
    assert {o.get_title('left') for o in plot_reliability([run]).axes} == {'', *(f'label {k}\nECE {eces[k]:.1%}' for k in range(2))}

@pytest.mark.parametrize('name, shown', [('$x_$', '$x_$'), ('a $5 b_{ $6', 'a $5 b_{ $6'), ('under $5', 'under $5'), ('species '*20, 'species species species\nspecies species ...'), ('x'*99, 'x'*30 + '\n...')])
def test_names_of_labels_are_no_formulas_and_fit(name, shown):
    "A picture can be drawn of any"
    fig = plot_reliability([{**label_run(NONE, 0, k=2), 'vocab': [name, 'b']}])
    fig.savefig(BytesIO())
    titles = [o.get_title('left').replace(r'\$', '$') for o in fig.axes]
    assert any(o.startswith(shown.split('\n')[0]) and max(map(len, o.split('\nECE')[0].split('\n'))) <= 30 for o in titles), titles

@pytest.mark.parametrize('k', [1, 2, 4])
def test_plot_of_few_labels(k):
    "Each has its panel, and no other is left; also where all diverged, or a label is in no image"
    runs = [label_run(NONE, 0, k=k), label_run(LESS, 0, k=k)]
    for bad in [], [1], [0, 1]:
        some = [r | dict(probs=torch.full_like(r['probs'], math.nan)) if i in bad else r for i, r in enumerate(runs)]
        titles = [t for o in plot_reliability(some).axes if (t := o.get_title('left'))]
        assert len(titles) == k and ('nan' in ''.join(titles)) == (bad == [0, 1])
    plot_reliability([labelled(NONE, 15, k=3, rare=True)])
