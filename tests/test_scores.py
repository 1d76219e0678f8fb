"Estimates against loops and McNemar's test, scores and a table worked by hand; of several labels scikit-learn's average precision."
import math
from itertools import product

import numpy as np, pandas as pd, pytest, torch
from fastai.torch_core import tensor
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss

from fastai_smooth.ranking import aurc, risk_at, risk_coverage
from fastai_smooth.scaling import best_temperature, cross_fitted
from fastai_smooth.scores import *
from fastai_smooth.scores import average_precision, precision_values, rare_errors

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

# --- scores and table

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


# --- several labels

def labels(n=60, k=4, share=.3, seed=0, step=.1):
    "Probabilities, many of them alike, and 0/1 labels that they have to do with"
    g = torch.Generator().manual_seed(seed)
    targs = torch.bernoulli(torch.full((n, k), share), generator=g)
    return ((torch.randn(n, k, generator=g) + targs - .5).sigmoid().double()/step).round().mul(step).clamp(.01, .99), targs

def label_run(method, seed, n=60, k=4, share=.3):
    "What `one_run` gives, without training"
    probs, targs = labels(n, k, share, seed)
    return dict(method=method, seed=seed, vocab=[f'label {i}' for i in range(k)], **score(probs.logit()*(1.5-np.mean(method.eps)), targs))

def test_a_pair_of_eps_in_words():
    pair, none = Method((.1, 0.)), Method((0., 0.))
    assert [str(pair), pair.kind, pair.amount, pair.smooths] == ['one-sided 0.1,0', 'one-sided', '0.1,0', True] and [str(none), none.kind, none.smooths] == ['none', 'none', False]
    assert [str(o) for o in (Method(.05), Method(.25, 'online'))] == ['uniform 0.05', 'online 0.25'] and not Method().smooths

@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([.5, .1, 1e-9]), st.booleans())
def test_average_precision_is_that_of_scikit_learn(n, k, seed, step, weighted):
    "Also where many are equally sure, and with weights"
    probs, targs = labels(n, k, .4, seed, step)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.double) + .01 if weighted else torch.ones(n, dtype=torch.double)
    found = average_precision(probs, targs, weights)
    for i in range(k):
        if targs[:, i].any(): assert found[i].item() == pytest.approx(average_precision_score(targs[:, i], probs[:, i], sample_weight=weights))
        else: assert found[i].isnan()
    if not weighted: assert torch.equal(found.nan_to_num(-1), average_precision(probs, targs).nan_to_num(-1))

def mean_precision(probs, targs, weights=None):
    "By scikit-learn, of the labels that there are"
    there = targs.bool().any(0)
    return average_precision_score(targs[:, there], probs[:, there], sample_weight=weights)

def test_rows_of_mean_average_precision_are_its_derivatives():
    probs, targs = labels()
    targs[:, 2] = 0 # a label that no image has
    n, rows, h = len(probs), precision_values(dict(probs=probs, targs=targs)), 1e-5
    assert rows.mean().item() == pytest.approx(mean_precision(probs, targs))
    for i in range(n):
        more, less = (mean_precision(probs, targs, 1 + s*h*np.eye(n)[i]) for s in (1, -1))
        assert rows[i].item() == pytest.approx(mean_precision(probs, targs) + n*(more-less)/2/h, abs=1e-5)

def paired(n, seed):
    "Runs of two models of the same images, of which the second sees less noise"
    g = torch.Generator().manual_seed(100+seed)
    targs = torch.bernoulli(torch.full((n, 5), .25), generator=torch.Generator().manual_seed(0))
    seen = targs + .6*torch.randn(n, 5, generator=torch.Generator().manual_seed(1))
    return [dict(probs=(seen + s*torch.randn(n, 5, generator=g)).sigmoid().double(), targs=targs, images=torch.arange(n)) for s in (.6, .2)]

@pytest.mark.parametrize('seeds', [1, 2])
def test_the_margin_is_what_a_bootstrap_of_images_shows(seeds):
    "One weight an image, for all models and seeds; two images that were not seen make it a little larger. Seeds as one, or their spread would count"
    n, pairs, rng = 300, [paired(300, seed) for seed in range(seeds)], np.random.default_rng(0)
    rows, images = ([torch.cat([f(o[i]) for o in pairs]) for i in range(2)] for f in (precision_values, lambda r: r['images']))
    one, change = estimate([rows[1]], images[1:], (0, 1)), estimate([rows[1]-rows[0]], images[1:], (-1, 1))
    worse, better = np.mean([[[mean_precision(o['probs'], o['targs'], w) for o in pair] for pair in pairs] for w in rng.exponential(size=(100, n))], 1).T
    assert .95 < one.margin/1.96/better.std() < 1.2 and .95 < change.margin/1.96/(better-worse).std() < 1.3
    assert change.mean == pytest.approx(np.mean([mean_precision(b['probs'], b['targs']) - mean_precision(a['probs'], a['targs']) for a, b in pairs])) and change.clear

def test_few_images_with_a_label_leave_something_open():
    "Ranked first and third, so its precision is (1+2/3)/2; and 10 of 10 in front. In two runs that share images no more of them are known than in one; a label without images does not count"
    probs, targs = torch.linspace(.9, .1, 20, dtype=torch.double)[:, None].repeat(1, 3), torch.zeros(20, 3)
    targs[[0, 2], 0] = targs[:10, 1] = 1
    run = dict(probs=probs, targs=targs, images=torch.arange(20))
    expected, p = 1/2/2, 5/6
    for runs in [run], [run, run]: assert rare_errors(runs).tolist() == pytest.approx([math.sqrt(p*(1-p))*expected])
    assert rare_errors([run, run | dict(images=torch.arange(20)+20)]).tolist() == pytest.approx([math.sqrt(p*(1-p))*expected/2])
    assert estimate([torch.zeros(50)]*1, [torch.arange(50)], (0, 0), torch.tensor([.3, .4])).margin == pytest.approx(1.96*.5)

def test_scores_of_labels_against_scikit_learn_and_loops():
    probs, targs = labels(80, 3)
    res = score(probs.logit(), targs, torch.arange(80)+7)
    assert torch.allclose(res['probs'], probs) and res['images'][0] == 7
    assert torch.allclose(res['after'], cross_fitted(probs.logit(), targs).sigmoid()) and res['temperature'] == best_temperature(probs.logit(), targs)
    def ece(p, y):
        cell = np.minimum((p*15).astype(int), 14)
        return sum(abs((y-p)[cell == i].sum()) for i in range(15))/len(p)
    y, p, after = targs.numpy(), res['probs'].numpy(), res['after'].numpy()
    by_hand = dict(positives=lambda k: y[:, k].mean(), average_precision=lambda k: average_precision_score(y[:, k], p[:, k]), accuracy=lambda k: ((p[:, k] > .5) == y[:, k]).mean(),
                   nll=lambda k: log_loss(y[:, k], p[:, k]), brier=lambda k: brier_score_loss(y[:, k], p[:, k]), ece=lambda k: ece(p[:, k], y[:, k]), nll_after_t=lambda k: log_loss(y[:, k], after[:, k]))
    assert list(res['by_label']) == [*by_hand]
    for name, f in by_hand.items():
        assert res['by_label'][name].tolist() == pytest.approx([f(k) for k in range(3)]), name
        assert res[name] == pytest.approx(np.mean([f(k) for k in range(3)])), name
        assert name == 'positives' or res[f'{name}_low'] < res[name] < res[f'{name}_high'] or name == 'ece', name
    sure = np.maximum(p, 1-p)
    assert res['confidence_gap'] == pytest.approx(sure.mean() - res['accuracy'])
    rows, mean = (sure - ((p > .5) == y)).mean(1), sure.mean()
    assert res['confidence_gap_high'] - res['confidence_gap'] == pytest.approx(reference([rows], [range(80)], (mean-1, mean))[1]) # an image counts once
    assert (res['aurc'], res['aurc_low'], res['aurc_high']) == aurc(res['probs'], targs)[:3] and res['error_surest_half'] == risk_at(risk_coverage(res['probs'], targs), .5)

def test_a_label_that_no_validation_image_has():
    "Its average precision is unknown, and the mean is of the others; all else is known of it"
    probs, targs = labels(60, 3)
    targs[:, 1] = 0
    res = score(probs.logit(), targs)
    assert res['average_precision'] == pytest.approx(average_precision_score(targs[:, [0, 2]], probs[:, [0, 2]])) and res['by_label'].average_precision.isna().tolist() == [False, True, False]
    assert res['by_label'].drop(columns='average_precision').notna().all(axis=None) and res['by_label'].positives[1] == 0
    assert table(tidy([dict(method=NONE, seed=0, vocab=list('abc'), **res)]))['mean average precision'][0] == f"{res['average_precision']:.1%}"

MEASURED = 'average_precision', 'accuracy', 'nll', 'brier', 'ece', 'nll_after_t', 'confidence_gap', 'aurc'

def test_a_row_a_run_and_label():
    runs = [label_run(m, seed) for m in (NONE, Method((.1, 0.)), Method(.05)) for seed in range(2)]
    res = tidy(runs)
    assert list(res) == ['method', 'eps', 'seed', 'label', 'positives', *(f'{o}{end}' for o in MEASURED for end in ('', '_low', '_high')), 'error_surest_half', 'temperature']
    assert res.label.tolist() == ['(all)', *(f'label {i}' for i in range(4))]*6 and res.eps.tolist() == [0.]*10 + ['0.1,0']*10 + [.05]*10
    for i, run in enumerate(runs):
        whole, parts = res.iloc[5*i], res.iloc[5*i+1:5*i+5]
        assert all(o.method == str(run['method']) and o.seed == run['seed'] for _, o in res.iloc[5*i:5*i+5].iterrows()) and all(run[c] == whole[c] for c in res.columns[4:])
        for c in run['by_label']: assert parts[c].tolist() == run['by_label'][c].tolist() and whole[c] == pytest.approx(parts[c].mean())
        assert parts[['nll_low', 'aurc', 'confidence_gap', 'temperature']].isna().all(axis=None)

def test_table_of_labels(tmp_path):
    "Means over seeds of the rows that are of all labels; also of what was read from a file"
    runs = [label_run(m, seed) for seed in range(2) for m in (NONE, Method((.1, 0.)))]
    tidy(runs).to_csv(tmp_path/'results.csv')
    for res in tidy(runs), pd.read_csv(tmp_path/'results.csv'):
        assert list(table(res)) == ['method', 'mean average precision', 'accuracy over labels', 'NLL', 'NLL after temperature', 'ECE']
        for i in range(2):
            mean = {o: (runs[i][o]+runs[i+2][o])/2 for o in MEASURED}
            assert table(res).values.tolist()[i] == [str(runs[i]['method']), f"{mean['average_precision']:.1%}", f"{mean['accuracy']:.1%}", f"{mean['nll']:.3f}", f"{mean['nll_after_t']:.3f}", f"{mean['ece']:.1%}"]

def test_a_diverged_run_of_labels_shows():
    bad = dict(method=NONE, seed=0, vocab=list('abc'), **score(torch.full((5, 3), math.nan), torch.eye(5)[:, :3]))
    assert tidy([bad])[['average_precision', 'nll', 'brier', 'ece', 'nll_after_t']].isna().all(axis=None) and bad['positives'] == pytest.approx(.2)
    shown = table(tidy([bad, label_run(UNIFORM, 1)]))
    assert shown['mean average precision'][0] == shown.NLL[0] == shown.ECE[0] == 'nan' != shown.NLL[1]
