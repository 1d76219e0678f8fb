"""The command line: what it measures, worked by hand; that runs of one seed are pairs; that bad input is one line and
exit code 2 before any training; that Ctrl-C keeps what is finished."""
import math, os, re, shutil, signal, struct, subprocess, sys, time, warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from urllib.error import URLError

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import tensor
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from fastai_smooth import compare as cmp
from fastai_smooth.calibration import calibration_error, reliability
from fastai_smooth.images import *
from fastai_smooth.compare import *
from fastai_smooth.compare import load_images
from fastai_smooth.tune import EpsSuggestion

DIGITS = digits()
TINY = dict(arch='squeezenet1_1', epochs=1, bs=8, progress=False)
ARCH = '--arch squeezenet1_1 --size 32'.split()
TINY_ARGS = ARCH + '--bs 8 --epochs 1 --seeds 1'.split()


def few(n=40, **kwargs):
    "The first `n` digits"
    return ImageSet(DIGITS.images[:n], DIGITS.classes[:n], DIGITS.vocab, **kwargs)

def save(folder, name, i=0):
    "Digit number `i` as folder/name"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(DIGITS.images[i]).save(folder/name)

@pytest.fixture
def photos(tmp_path):
    "Two classes of ten images, one subfolder each"
    for i in range(20): save(tmp_path/'photos'/f'class {i%2}', f'{i}.png', i)
    return tmp_path/'photos'

@pytest.fixture
def no_training(monkeypatch):
    "Fails the test that trains"
    def one_run(*args, **kwargs): raise AssertionError('it trained')
    monkeypatch.setattr(cmp, 'one_run', one_run)

def fake_run(data, eps, seed, **kwargs):
    "What `one_run` gives, without training"
    g = torch.Generator().manual_seed(seed)
    logits,targs = torch.randn(30, 10, generator=g),torch.randint(10, (30,), generator=g)
    return dict(eps=eps, seed=seed, **score(logits*(3-2*eps), targs))

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Images this small gain nothing from more, and lose much on a busy machine"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def run_main(*args):
    "Exit code of `main`, argparse's own exits included"
    try: return main([str(o) for o in args])
    except SystemExit as e: return e.code


# ---------------------------------------------------------------- images, split, noise

def test_digits_are_the_real_ones():
    assert (len(DIGITS.images), DIGITS.images[0].shape, DIGITS.vocab) == (1797, (8,8,3), list('0123456789'))
    assert np.bincount(DIGITS.classes).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert max(o.max() for o in DIGITS.images) == 255

def test_folder_of_classes(photos):
    save(photos/'class 1'/'deeper', 'x.png')
    (photos/'class 1'/'notes.txt').write_text('no image')
    data = image_folder(photos)
    assert data.vocab == ['class 0', 'class 1'] and data.is_valid is None
    assert Counter(data.classes.tolist()) == {0: 10, 1: 11}
    assert all(data.vocab[c] in f.parts for f,c in zip(data.images, data.classes))
    assert data.images == sorted(data.images)

def test_folder_with_train_and_valid(tmp_path):
    for i in range(6): save(tmp_path/('train' if i < 4 else 'valid')/'ab'[i%2], f'{i}.png')
    save(tmp_path/'test'/'other', 'ignored.png')
    data = image_folder(tmp_path)
    assert data.vocab == ['a', 'b'] and data.is_valid.sum() == 2
    assert all((f.parts[-3] == 'valid') == v and data.vocab[c] == f.parts[-2]
               for f,c,v in zip(data.images, data.classes, data.is_valid))

@pytest.mark.parametrize('sizes', [(10, 20, 5), (2, 2), (1797,), (3, 100)])
def test_split_takes_a_fifth_of_every_class(sizes):
    classes = np.repeat(np.arange(len(sizes)), sizes)
    valid = split_valid(classes, seed=0)
    for c,n in enumerate(sizes): assert valid[classes == c].sum() == max(1, round(n/5)) < n
    assert (valid == split_valid(classes, seed=0)).all()

def test_split_depends_on_the_seed():
    assert (split_valid(DIGITS.classes, 0) != split_valid(DIGITS.classes, 1)).any()

def test_noise_is_symmetric():
    "40,000 labels: a count's standard deviation is below 100, so 500 is far out"
    classes = np.repeat([0, 1, 2, 3], 10000)
    noisy = flip_labels(classes, .3, n_classes=4, seed=0)
    for c in range(4):
        counts = np.bincount(noisy[classes == c], minlength=4)
        assert abs(counts[c] - 7000) < 500
        assert all(abs(o - 1000) < 250 for i,o in enumerate(counts) if i != c)

def test_noise_is_seeded():
    a,b,c = (flip_labels(DIGITS.classes, .5, 10, seed=o) for o in (0, 0, 1))
    assert (a == b).all() and (a != c).any()

def test_no_noise_no_flips(): assert (flip_labels(DIGITS.classes, 0., 10, seed=0) == DIGITS.classes).all()

@pytest.mark.parametrize('is_valid', [None, np.arange(1797) >= 1500])
def test_noise_is_for_training_labels_only(is_valid):
    data = ImageSet(DIGITS.images, DIGITS.classes, DIGITS.vocab, is_valid)
    clean,noisy = (get_dls(data, seed=3, noise=o) for o in (0., .4))
    def labels(dl): return [int(o[1]) for o in dl.items]
    assert labels(clean.valid) == labels(noisy.valid) # images stay at their side, and in their order
    wrong = np.mean([a != b for a,b in zip(labels(clean.train), labels(noisy.train))])
    assert abs(wrong - .4) < .06
    expected = split_valid(DIGITS.classes, 3) if is_valid is None else is_valid
    assert labels(clean.valid) == DIGITS.classes[expected].tolist()

def test_batches_have_the_size_asked_for_and_the_right_images(photos):
    dls = get_dls(image_folder(photos), seed=0, size=20, bs=4)
    x,y = dls.one_batch()
    assert x.shape == (4,3,20,20) and dls.vocab == ['class 0', 'class 1'] and dls.train.fake_l.num_workers == 0
    img,cls = dls.valid_ds[0]
    assert dls.vocab[cls] in dls.valid.items[0][0].parts
    flat = get_dls(few(), seed=0, size=8)
    img,cls = flat.valid_ds[0]
    first = np.flatnonzero(split_valid(few().classes, 0))[0]
    assert (np.array(img) == DIGITS.images[first]).all() and int(cls) == DIGITS.classes[first]


# ---------------------------------------------------------------- what is measured

def test_score_by_hand():
    "Probabilities 3/4, 1/4 of which the first is right in one row of two; then 9/10 and right"
    logits = tensor([[math.log(3.), 0.], [math.log(3.), 0.], [0., math.log(9.)]])
    res = score(logits, tensor([0, 1, 1]))
    assert res['accuracy'] == pytest.approx(2/3)
    assert res['nll'] == pytest.approx(-(math.log(.75) + math.log(.25) + math.log(.9))/3)
    assert res['confidence_gap'] == pytest.approx((.75+.75+.9)/3 - 2/3)
    assert res['probs'].max(1)[0].tolist() == pytest.approx([.75, .75, .9])
    assert res['brier'] == pytest.approx((2*.25**2 + 2*.75**2 + 2*.1**2)/3)
    assert res['ece'] == pytest.approx((2*abs(.75 - .5) + .1)/3) # .75 and .9 lie in two bins
    assert res['brier_low'] < res['brier'] < res['brier_high']

def test_temperature_of_a_run_by_hand():
    "The best T for z of 1 and -1, three right of four, has 1/(1+exp(-2/T)) = 3/4; cross-fitted on the others of each fifth"
    logits,targs = tensor([[1., -1.]]).repeat(400, 1),tensor([0, 0, 0, 1]*100)
    res = score(logits, targs)
    assert res['temperature'] == pytest.approx(2/math.log(3))
    assert res['nll_after_t'] == pytest.approx(-(3*math.log(.75) + math.log(.25))/4, abs=5e-3) and res['nll_after_t'] < res['nll']
    assert res['after'][:,0].mean() == pytest.approx(.75, abs=.01)

def test_nll_of_a_sure_and_wrong_model_is_finite():
    assert score(tensor([[200., 0.]]), tensor([1]))['nll'] == pytest.approx(200)

def results(*rows): return pd.DataFrame(rows, columns=['eps', 'seed', *METRICS])

hand = results((0., 0, .8, .5, .1), (.1, 0, .9, .7, .0), (0., 1, .6, .9, .3), (.1, 1, .9, .5, .0))

def test_summary_by_hand():
    """accuracy at eps 0: .8, .6, so mean .7 and std .1*sqrt(2); at .1 no spread. Its change, by seed: .1, .3.
    nll: .7 and .6; the change .2, -.4 has mean -.1 and std .3*sqrt(2). gap: .2, 0; change -.1, -.3"""
    s,r2 = summarise(hand),math.sqrt(2)
    assert s.index.tolist() == [0., .1]
    def row(eps, what): return [(s.loc[eps,(what,'mean',m)], s.loc[eps,(what,'std',m)]) for m in METRICS]
    assert np.allclose(row(0., 'itself'), [(.7,.1*r2), (.7,.2*r2), (.2,.1*r2)])
    assert np.allclose(row(.1, 'itself'), [(.9,0), (.6,.1*r2), (0,0)])
    assert np.allclose(row(.1, 'change'), [(.2,.1*r2), (-.1,.3*r2), (-.2,.1*r2)])
    assert np.allclose(row(0., 'change'), 0)

def test_pairs_are_matched_by_seed_not_by_order():
    shuffled = hand.iloc[[3,0,1,2]].reset_index(drop=True)
    a,b = summarise(hand),summarise(shuffled).loc[[0., .1]]
    assert np.allclose(a.values, b.values)

def test_unfinished_pairs_are_left_out_of_the_change():
    "As after Ctrl-C: the last seed has an eps .1, but no eps 0"
    more = pd.concat([hand, results((.1, 2, .3, 9., .5))], ignore_index=True)
    assert np.allclose(summarise(more).loc[.1,'change'], summarise(hand).loc[.1,'change'])
    assert summarise(more).loc[.1,('itself','mean','accuracy')] == pytest.approx(.7)

def test_a_diverged_run_shows():
    bad = hand.copy()
    bad.loc[1, 'nll'] = math.nan
    assert math.isnan(summarise(bad).loc[.1,('itself','mean','nll')])

def test_table_by_hand():
    assert table(hand).values.tolist() == [
        [0., 2, '0.7000 ± 0.1414', '0.7000 ± 0.2828', '+0.2000 ± 0.1414', '', '', ''],
        [.1, 2, '0.9000 ± 0.0000', '0.6000 ± 0.1414', '+0.0000 ± 0.0000',
         '+0.2000 ± 0.1414', '-0.1000 ± 0.4243', '-0.2000 ± 0.1414']]
    assert list(table(hand)) == ['eps', 'seeds', 'accuracy', 'nll', 'confidence gap',
                                 'accuracy vs 0', 'nll vs 0', 'gap vs 0']

def test_table_of_one_seed_has_no_spread():
    assert table(hand[:2]).values.tolist() == [[0., 1, '0.8000', '0.5000', '+0.1000', '', '', ''],
                                               [.1, 1, '0.9000', '0.7000', '+0.0000', '+0.1000', '+0.2000', '-0.1000']]

def test_table_without_eps_0_has_no_change():
    assert list(table(hand[hand.eps > 0])) == ['eps', 'seeds', 'accuracy', 'nll', 'confidence gap']

def test_calibration_table_pools_seeds():
    runs = [fake_run(None, eps, seed) for seed in range(2) for eps in (0., .1)]
    rows = calibration_table(runs)
    assert list(rows) == ['eps', 'brier', 'ece', 'nll after T', 'ece if perfectly calibrated', 'T'] and rows.eps.tolist() == [0., .1]
    for i,eps in enumerate((0., .1)):
        some = [r for r in runs if r['eps'] == eps]
        assert rows.brier[i].startswith(f"{np.mean([r['brier'] for r in some]):.4f} [") # a mean of as many images each
        assert rows['nll after T'][i].startswith(f"{np.mean([r['nll_after_t'] for r in some]):.4f} [")
        probs,targs = (torch.cat([r[o] for r in some]) for o in ('probs', 'targs'))
        assert rows.ece[i].startswith(f'{calibration_error(probs, targs):.4f} [')

def test_one_seed_with_an_absurd_temperature_does_not_stand_for_all():
    "As 1/T can be anything where nearly every image is right: a mean would say 1034.34"
    runs = [{**fake_run(None, 0., seed), 'temperature': T} for seed, T in enumerate((1.02, 3100., 1.))]
    assert calibration_table(runs)['T'].tolist() == ['1.02']

def test_an_image_that_runs_share_counts_once():
    "The same run three times is no more than one, unless its images are others"
    run = fake_run(None, 0., 0)
    others = [{**run, 'images': run['images'] + 100*i} for i in range(3)]
    once,thrice,more = measures([run]),measures([run]*3),measures(others)
    for name in ('brier', 'ece', 'nll_after_t'):
        assert thrice[name] == pytest.approx(once[name], abs=2e-3)
        assert more[name][2] - more[name][1] < .8*(once[name][2] - once[name][1])
    def luck(runs): return float(calibration_table(runs)['ece if perfectly calibrated'][0])
    assert luck([run]*3) == luck([run]) > luck(others)

def test_images_have_their_numbers():
    run = one_run(few(), 0., 3, **TINY)
    assert run['images'].tolist() == np.flatnonzero(split_valid(few().classes, 3)).tolist()
    assert run['targs'].tolist() == few().classes[run['images']].tolist()

def test_plot_pools_seeds_into_one_curve_an_eps():
    runs = [fake_run(None, eps, seed) for seed in range(2) for eps in (0., .1)]
    axes = plot_reliability(runs).axes
    for (top,low),key in zip((axes[::2], axes[1::2]), ('probs', 'after')):
        diagonal,*curves = top.lines
        assert [o.get_label() for o in curves] == ['eps 0', 'eps 0.1']
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0,1]
        bins = reliability(*(torch.cat([r[o] for r in runs if r['eps'] == 0]) for o in (key, 'targs')), min_n=20,
                           groups=torch.cat([r['images'] for r in runs if r['eps'] == 0]))
        band = top.collections[0].get_paths()[0].vertices[:,1]
        assert np.isclose(band[:,None], bins.low.to_numpy()).any(0).all() and np.isclose(band[:,None], bins.high.to_numpy()).any(0).all()
        assert np.allclose(curves[0].get_xdata(), bins.confidence) and np.allclose(curves[0].get_ydata(), bins.accuracy)
        assert sum(o.get_height() for o in low.patches) == pytest.approx(2) # each eps's shares add up to one

def test_colours_of_curves_mean_eps_alone():
    "C0 to C3 are for under- and overconfident, right and wrong; an eps has one colour in all four plots, light for a large one"
    runs = [fake_run(None, eps, 0) for eps in (.1, 0., .4)]
    axes = plot_reliability(runs).axes
    for top,low in (axes[::2], axes[1::2]):
        curves = {o.get_label(): to_rgb(o.get_color()) for o in top.lines[1:]}
        assert list(curves) == ['eps 0', 'eps 0.1', 'eps 0.4'] and not {*curves.values()} & {to_rgb(f'C{i}') for i in range(10)}
        assert sorted(curves.values(), key=sum) == list(curves.values())
        assert [to_rgb(low.patches[i].get_facecolor()) for i in (0, 10, 20)] == list(curves.values())
        assert {o.get_text(): o.get_color() for o in top.texts} == dict(underconfident='C0', overconfident='C1')

def test_a_diverged_run_has_nan_and_no_curve():
    bad = dict(eps=0., seed=0, **score(torch.full((5, 3), math.nan), tensor([0, 1, 2, 0, 1])))
    assert tidy([bad])[['nll', 'brier', 'ece', 'ece_low', 'nll_after_t']].isna().all(axis=None)
    assert 'nan' in calibration_table([bad]).ece[0]
    plot_reliability([bad, fake_run(None, .1, 0)])


# ---------------------------------------------------------------- runs

def test_eps_smooths_training_and_0_leaves_the_hard_loss():
    dls = get_dls(few(), seed=0, bs=8)
    assert type(get_learner(dls, 0., 'squeezenet1_1').loss_func) is CrossEntropyLossFlat
    loss = get_learner(dls, .3, 'squeezenet1_1').loss_func
    logits,targs = torch.randn(5, 10, requires_grad=True),tensor([0, 1, 2, 3, 4])
    assert loss.eps == .3
    assert torch.allclose(loss(logits, targs), torch.nn.functional.cross_entropy(logits, targs, label_smoothing=.3))
    with torch.no_grad(): assert torch.allclose(loss(logits, targs), torch.nn.functional.cross_entropy(logits, targs))

class Witness(Callback):
    "Writes down all of a run that a seed decides"
    def __init__(self, seen): self.seen = seen
    def before_fit(self):
        self.run = not hasattr(self, 'gather_preds') # a trained model may differ
        if self.run: self.seen += [o.clone() for o in self.model.state_dict().values()]
    def before_batch(self): self.seen += [o.clone() for o in (*self.xb, *self.yb, torch.get_rng_state())]

@pytest.mark.parametrize('options', [{}, dict(noise=.3, augment=True), dict(augment=True, workers=2)], ids=str)
def test_runs_of_one_seed_are_pairs(monkeypatch, options):
    """Weights, split, noise, order, augmentation and the state that dropout draws from: the same for two eps, not for
    two seeds"""
    make,witnessed = cmp.get_learner,[]
    def get_learner(*args, **kwargs):
        witnessed.append([])
        return make(*args, **kwargs).add_cb(Witness(witnessed[-1]))
    monkeypatch.setattr(cmp, 'get_learner', get_learner)
    for eps,seed in ((0., 0), (.4, 0), (0., 1)): one_run(few(), eps, seed, **TINY, **options)
    a,b,c = witnessed
    def same(x, y): return [torch.equal(i, j) for i,j in zip(x, y)]
    assert len(a) == len(b) == len(c) > 60
    assert all(same(a, b)) and not all(same(a, c))
    assert not torch.equal(a[0], c[0]) # not only split and noise have the seed, the first weights do

def test_a_run_repeats_bit_by_bit():
    a,b,c = (one_run(few(), eps, 0, noise=.2, augment=True, **TINY) for eps in (0., 0., .4))
    assert (a['probs'] == b['probs']).all() and all(a[o] == b[o] for o in METRICS)
    assert a['nll'] != c['nll'] # and eps does something

def test_a_run_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    one_run(few(), 0., 0, **TINY)
    assert torch.equal(before, torch.get_rng_state())

def test_pretrained_fine_tunes(monkeypatch):
    "Without a download: what is asked of fastai"
    calls = []
    make = cmp.vision_learner
    def vision_learner(*args, pretrained, **kwargs):
        calls.append(pretrained)
        return make(*args, pretrained=False, **kwargs)
    monkeypatch.setattr(cmp, 'vision_learner', vision_learner)
    monkeypatch.setattr(Learner, 'fine_tune', lambda self, *args, **kwargs: calls.append(args))
    one_run(few(), 0., 0, pretrained=True, **TINY)
    one_run(few(), 0., 0, **TINY)
    assert calls == [True, (1, 3e-3), False]

@pytest.mark.parametrize('arch', ['resnet18', 'xresnet18', 'mobilenet_v3_small'])
def test_archs_of_torchvision_and_fastai(arch):
    assert arch in archs()
    check_training(few(), arch, False, 32, 8)


# ---------------------------------------------------------------- --eps auto

def test_eps_is_chosen_on_training_images_alone(monkeypatch):
    "With their noisy labels, a fifth of them held out; validation images are not seen"
    seen = []
    make = cmp.get_dls
    def get_dls(data, seed, **kwargs):
        seen.append(data)
        return make(data, seed, **kwargs)
    monkeypatch.setattr(cmp, 'get_dls', get_dls)
    data = few(200)
    found = choose_eps(data, noise=.3, size=32, **{k:v for k,v in TINY.items() if k != 'progress'})
    train = np.flatnonzero(~split_valid(data.classes, 0))
    assert len(seen) == 1 and all((a == data.images[i]).all() for a,i in zip(seen[0].images, train)) and len(seen[0].images) == len(train)
    assert seen[0].classes.tolist() == flip_labels(data.classes, .3, 10, 0)[train].tolist()
    assert .15 < seen[0].is_valid.mean() < .3
    assert found.eps == .1 and not found.learnt # in an epoch on 128 images

def test_auto_is_compared_with_0(monkeypatch, tmp_path, capsys):
    found = EpsSuggestion(.1234, (.1, .2), .01, (0., .05), .111, (.1, .15), 'closed form')
    monkeypatch.setattr(cmp, 'choose_eps', lambda *args, **kwargs: found)
    monkeypatch.setattr(cmp, 'one_run', fake_run)
    for i,(eps,expected) in enumerate(((['auto'], [0, .123]), ([.3, 'auto'], [.3, .123]), ([.123, 0, 'auto'], [.123, 0]))):
        assert run_main('--eps', *eps, '--seeds', 1, *ARCH, '--out', tmp_path/str(i)) == 0
        assert pd.read_csv(tmp_path/str(i)/'results.csv').eps.tolist() == expected
        out = capsys.readouterr().out
        assert 'eps auto: 0.123 [0.100, 0.200]' in out and 'as far as the pilot tells: 0.010 [0.000, 0.050]\n' in out and 'cut to' not in out

def test_auto_has_seen_no_image_that_scores_any_seed(monkeypatch, tmp_path):
    "All seeds validate on the images that the pilot's seed holds out"
    seen = []
    def choose_eps(data, **kwargs):
        seen.append({i.tobytes() for i,v in zip(data.images, data.validation(0)) if not v})
        return EpsSuggestion(.1, (.1, .2), .01, (0., .05), .111, (.1, .15), 'closed form')
    def one_run(data, eps, seed, **kwargs):
        seen.append({i.tobytes() for i,v in zip(data.images, data.validation(seed)) if v})
        return fake_run(data, eps, seed)
    monkeypatch.setattr(cmp, 'choose_eps', choose_eps)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    monkeypatch.setattr(cmp, 'digits', lambda: few(200))
    assert run_main('--eps', 'auto', *ARCH, '--out', tmp_path) == 0
    pilot,*scored = seen
    assert len(scored) == 6 and all(len(o) > 20 and not o & pilot for o in scored)

def test_auto_says_what_the_pilot_cannot_tell(monkeypatch, tmp_path, capsys):
    "the words of `eps_find`'s warning are for whoever calls it; the command has other options"
    def choose_eps(*args, **kwargs):
        warnings.warn('the validation error of the pilot is 0.90, so the suggestion is cut to 0.4: ... n_epoch ...')
        return EpsSuggestion(.4, (.4, .4), 0., (0., .9), .9, (.8, .95), 'closed form, cut to 0.4')
    monkeypatch.setattr(cmp, 'choose_eps', choose_eps)
    monkeypatch.setattr(cmp, 'one_run', fake_run)
    assert run_main('--eps', 'auto', '--seeds', 1, *ARCH, '--out', tmp_path) == 0
    out = capsys.readouterr().out
    assert 'as far as the pilot tells: it does not\n' in out and re.search('^cut to 0.4: .*; try more --epochs$', out, re.M) and 'n_epoch' not in out

def test_auto_of_a_pilot_that_has_not_learnt(monkeypatch, tmp_path, capsys):
    "The default and why; no nan is shown"
    nan = math.nan
    found = EpsSuggestion(.1, (nan, nan), nan, (nan, nan), .67, (.6, .7), 'the default, as the pilot has not learnt')
    monkeypatch.setattr(cmp, 'choose_eps', lambda *args, **kwargs: found)
    monkeypatch.setattr(cmp, 'one_run', fake_run)
    assert run_main('--eps', 'auto', '--seeds', 1, *ARCH, '--out', tmp_path) == 0
    out = capsys.readouterr().out
    assert 'eps auto: 0.100, the default, as the pilot has not learnt\n' in out and 'nan' not in out

def test_auto_with_too_large_batches(photos, tmp_path, capsys, no_training):
    assert run_main('--data', photos, '--eps', 'auto', *ARCH, '--bs', 16, '--epochs', 1, '--out', tmp_path/'o') == 2
    assert re.fullmatch(r'fastai_smooth: --eps auto: .*; give --bs 12 or less\n', capsys.readouterr().err)

def test_auto_for_real(photos, tmp_path, capsys):
    assert run_main('--data', photos, '--eps', 'auto', *ARCH, '--bs', 4, '--epochs', 1, '--seeds', 1, '--out', tmp_path/'o') == 0
    out = capsys.readouterr().out
    eps = float(re.search(r'eps auto: ([\d.]+)', out)[1]) # the default, where the pilot has not learnt
    assert not {'\r', '█'} & set(out) and 'Epoch' not in out # nor does the pilot draw progress bars
    assert pd.read_csv(tmp_path/'o'/'results.csv').eps.tolist() == list(dict.fromkeys([0., eps]))


# ---------------------------------------------------------------- the command

def command(out, *args, encoding='utf-8', path='', stdout=subprocess.PIPE, **kwargs):
    cmd = [sys.executable, '-m', 'fastai_smooth', *map(str, args), '--out', str(out)]
    path = os.pathsep.join(filter(None, [str(path), os.environ.get('PYTHONPATH')]))
    return subprocess.Popen(cmd, stdout=stdout, stderr=subprocess.PIPE, text=True, encoding=encoding,
                            env={**os.environ, 'PYTHONIOENCODING': encoding, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path},
                            # a job in the background has Ctrl-C ignored, and so would its children
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **kwargs)

def test_from_end_to_end(photos, tmp_path, capsys):
    "Through the shell, then again in this process: the same results to the bit"
    args = ['--data', photos, '--eps', 0, .2, '--noise', .1, *TINY_ARGS]
    p = command(tmp_path/'a', *args)
    out,err = p.communicate()
    assert p.returncode == 0 and err == '', err
    assert re.search(r'^\d+ training and \d+ validation images of 2 classes$', out, re.M)
    assert re.search(r'^Run 2 of 2: eps 0.2, seed 0\naccuracy \d\.\d{4}, nll \d+\.\d{4}$', out, re.M)
    assert not {'\r', '█'} & set(out) and 'Epoch' not in out # no progress bars in a file
    res = pd.read_csv(tmp_path/'a'/'results.csv')
    assert list(res) == ['eps', 'seed', *METRICS, 'brier', 'brier_low', 'brier_high', 'ece', 'ece_low', 'ece_high',
                         'nll_after_t', 'nll_after_t_low', 'nll_after_t_high', 'temperature'] and res.eps.tolist() == [0, .2] and res.seed.tolist() == [0, 0]
    assert table(res).to_string(index=False) in out
    img = Image.open(tmp_path/'a'/'reliability.png')
    assert min(img.size) > 500 and len(img.convert('RGB').getcolors(1 << 24)) > 20
    with mock.patch.object(sys.stdout, 'isatty', return_value=True): assert run_main('compare', *args, '--out', tmp_path/'b') == 0
    out = capsys.readouterr().out
    assert 'Epoch 1/1' in out and 'train_loss' in out # fastai's progress
    assert (tmp_path/'a'/'results.csv').read_bytes() == (tmp_path/'b'/'results.csv').read_bytes()

@pytest.mark.skipif(os.name == 'nt', reason='sends SIGINT')
def test_ctrl_c_on_the_real_thing(photos, tmp_path):
    p = command(tmp_path/'o', '--data', photos, *TINY_ARGS, '--seeds', 5000)
    csv = tmp_path/'o'/'results.csv'
    while not csv.exists() and p.poll() is None: time.sleep(.1)
    p.send_signal(signal.SIGINT)
    out,err = p.communicate()
    assert p.returncode == 130 and 'Traceback' not in err
    assert re.search(r'interrupted, [1-9]\d* of 10000 runs are finished\n$', err)
    assert len(pd.read_csv(csv)) >= 1 and table(pd.read_csv(csv)).to_string(index=False) in out
    assert (tmp_path/'o'/'reliability.png').exists()

def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    def one_run(data, eps, seed, **kwargs):
        if seed: raise KeyboardInterrupt
        return fake_run(data, eps, seed)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    assert run_main(*ARCH, '--out', tmp_path) == 130
    out,err = capsys.readouterr()
    assert err.strip() == 'fastai_smooth: interrupted, 2 of 6 runs are finished'
    res = pd.read_csv(tmp_path/'results.csv')
    assert res.eps.tolist() == [0, .1] and res.seed.tolist() == [0, 0] # a pair
    assert table(res).to_string(index=False) in out and (tmp_path/'reliability.png').exists()

@pytest.mark.parametrize('at', ['calibration_table', 'plot_reliability'])
def test_ctrl_c_while_reporting_keeps_what_is_finished(tmp_path, monkeypatch, capsys, at):
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cmp, 'one_run', fake_run)
    monkeypatch.setattr(cmp, at, interrupt)
    assert run_main(*ARCH, '--out', tmp_path) == 130
    res = pd.read_csv(tmp_path/'results.csv')
    assert len(res) == 6 and table(res).to_string(index=False) in capsys.readouterr().out
    assert not list(tmp_path.glob('*.part')) and (tmp_path/'reliability.png').exists() == (at != 'plot_reliability')

def test_an_error_in_training_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    def one_run(data, eps, seed, **kwargs):
        if seed == 2: raise RuntimeError('CUDA out of memory')
        return fake_run(data, eps, seed)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    with pytest.raises(RuntimeError, match='out of memory'): run_main(*ARCH, '--out', tmp_path)
    assert table(pd.read_csv(tmp_path/'results.csv')).to_string(index=False) in capsys.readouterr().out

def test_results_are_on_disk_after_each_run(tmp_path, monkeypatch):
    "So that not even a power cut loses them"
    lines = []
    def one_run(data, eps, seed, **kwargs):
        f = tmp_path/'results.csv'
        lines.append(len(f.read_text().splitlines()) if f.exists() else 0)
        return fake_run(data, eps, seed)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    assert run_main(*ARCH, '--out', tmp_path, '--seeds', 2) == 0
    assert lines == [0, 2, 3, 4]

@pytest.mark.parametrize('where', ['one_run', 'load_images'])
def test_ctrl_c_with_nothing_finished(tmp_path, monkeypatch, capsys, where):
    "No folder stays but one that was there before"
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cmp, where, interrupt)
    (tmp_path/'mine'/'too').mkdir(parents=True)
    for out in 'new', 'new/deeper', 'mine/new', 'mine/too':
        assert run_main(*ARCH, '--out', tmp_path/out) == 130
        assert 'interrupted' in capsys.readouterr().err
    assert sorted(tmp_path.rglob('*')) == [tmp_path/'mine', tmp_path/'mine'/'too']

def test_options_arrive(tmp_path, monkeypatch):
    seen = []
    def one_run(data, eps, seed, **kwargs):
        seen.append((eps, seed, kwargs))
        return fake_run(data, eps, seed)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: False)
    args = '--eps 0 .3 --seeds 2 --noise .25 --epochs 7 --arch xresnet18 --bs 16 --size 24 --lr .01 --workers 1'
    assert run_main(*args.split(), '--augment', '--out', tmp_path/'not'/'there'/'yet') == 0
    assert [o[:2] for o in seen] == [(0, 0), (.3, 0), (0, 1), (.3, 1)]
    assert all(o[2] == dict(noise=.25, epochs=7, arch='xresnet18', pretrained=False, bs=16, size=24, lr=.01,
                            augment=True, workers=1, progress=False) for o in seen)

def test_without_eps_0_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cmp, 'one_run', fake_run)
    assert run_main('--eps', .1, .2, '--seeds', 2, *ARCH, '--out', tmp_path) == 0
    out = capsys.readouterr().out
    assert 'Add 0 to --eps' in out and 'vs 0' not in out

@pytest.mark.parametrize('args', [['--help'], ['compare', '--help']], ids=' '.join)
def test_help(args, capsys):
    assert run_main(*args) == 0
    out,err = capsys.readouterr()
    assert 'exit codes: 0 done, 2 bad input, 130 interrupted' in out and err == ''


# ---------------------------------------------------------------- the last act, and other places where output goes wrong

def no_space(*args, **kwargs): raise OSError(28, 'No space left on device')

@pytest.mark.parametrize('what', ['csv', 'png'])
def test_a_full_disk_is_one_line_below_the_tables(tmp_path, monkeypatch, capsys, what):
    monkeypatch.setattr(cmp, 'one_run', fake_run)
    monkeypatch.setattr(*((pd.DataFrame, 'to_csv') if what == 'csv' else (Figure, 'savefig')), no_space)
    err = refused(capsys, *ARCH, '--out', tmp_path, out := [])
    assert '--out' in err and 'No space left' in err and str(tmp_path) in err
    assert table(tidy([fake_run(None, eps, seed) for seed in range(3) for eps in (0., .1)])).to_string(index=False) in out[0]
    assert 'nll after T' in out[0] and [o.name for o in tmp_path.iterdir()] == ['results.csv']*(what == 'png') # no empty file

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a device that is always full')
def test_a_disk_that_is_full_already(tmp_path, monkeypatch, capsys, no_training):
    monkeypatch.setattr('tempfile.TemporaryFile', lambda dir: open('/dev/full', 'wb'))
    assert 'No space left' in refused(capsys, *ARCH, '--out', tmp_path)

def test_a_full_disk_leaves_what_was_written_before(tmp_path, monkeypatch, capsys):
    def one_run(data, eps, seed, **kwargs):
        if seed: monkeypatch.setattr(pd.DataFrame, 'to_csv', no_space)
        return fake_run(data, eps, seed)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    assert run_main(*ARCH, '--out', tmp_path) == 2
    assert pd.read_csv(tmp_path/'results.csv').seed.tolist() == [0, 0]
    assert capsys.readouterr().out.count("can't write results now") == 4

def test_a_folder_that_is_removed_meanwhile(tmp_path, monkeypatch, capsys):
    def one_run(data, eps, seed, **kwargs):
        shutil.rmtree(tmp_path/'o')
        return fake_run(data, eps, seed)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    assert run_main(*ARCH, '--out', tmp_path/'o') == 0
    assert len(pd.read_csv(tmp_path/'o'/'results.csv')) == 6 and (tmp_path/'o'/'reliability.png').exists()

@pytest.mark.parametrize('text', ['name,score\nme,1\n', 'eps,accuracy\n.1,.9\n', '\xff\xfe\0'])
def test_results_of_the_users_own_are_refused_before_training(text, tmp_path, capsys, no_training):
    (tmp_path/'results.csv').write_text(text, encoding='latin1')
    assert str(tmp_path) in (err := refused(capsys, *ARCH, '--out', tmp_path)) and 'results.csv' in err
    assert (tmp_path/'results.csv').read_text(encoding='latin1') == text

def test_earlier_results_stay(tmp_path, monkeypatch, capsys):
    "Those of another setting, and a picture of the user's own"
    monkeypatch.setattr(cmp, 'one_run', fake_run)
    (tmp_path/'reliability-2.png').write_text('a picture')
    for eps in (.1, .2, .3): assert run_main('--eps', eps, '--seeds', 1, *ARCH, '--out', tmp_path) == 0
    assert {f.name: pd.read_csv(f).eps.tolist() for f in tmp_path.glob('*.csv')} == {'results.csv': [.1], 'results-3.csv': [.2], 'results-4.csv': [.3]}
    assert (tmp_path/'reliability-2.png').read_text() == 'a picture' and (tmp_path/'reliability-3.png').stat().st_size > 1000
    assert f'In {tmp_path}: results-4.csv, reliability-4.png\n' in capsys.readouterr().out

def test_two_commands_at_the_same_time(tmp_path, monkeypatch):
    "The other one starts, and ends, in each run of the first"
    def one_run(data, eps, seed, **kwargs):
        with monkeypatch.context() as m:
            m.setattr(cmp, 'one_run', fake_run)
            run_main('--eps', .5, '--seeds', 1, *ARCH, '--out', tmp_path)
        return fake_run(data, eps, seed)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    assert run_main('--eps', .1, '--seeds', 2, *ARCH, '--out', tmp_path) == 0
    assert sorted(pd.read_csv(f).eps.tolist() for f in tmp_path.glob('*.csv')) == [[.1, .1], [.5], [.5]]
    assert len(list(tmp_path.glob('*.png'))) == 3

NAMES = 'кошка', '犬', 'naïve ±'

@pytest.mark.skipif(os.name == 'nt', reason='its file names are of another kind')
def test_output_never_fails_on_encoding(tmp_path):
    "Names in every script, one that is no text at all, and the ± of the tables, on a terminal that knows ASCII alone"
    for i,name in enumerate([*NAMES, os.fsdecode(b'caf\xe9')]):
        for j in range(5): save(tmp_path/'фото'/name, f'{j}.png', i)
    args = ['--data', tmp_path/'фото', *ARCH, *'--bs 4 --epochs 1 --seeds 2 --eps 0'.split()]
    p = command(tmp_path/'o', *args, encoding='ascii')
    out,err = p.communicate()
    assert (p.returncode, err) == (0, '') and r'\xb1' in out and r'\u043a' in out and r'\udce9' in out, err
    (tmp_path/'фото'/'кошка'/'0.png').write_text('no image')
    p = command(tmp_path/'o', *args, encoding='ascii')
    err = p.communicate()[1]
    assert p.returncode == 2 and err.count('\n') == 1 and r'\u043a' in err, err

@pytest.mark.skipif(os.name == 'nt', reason='has other pipes')
def test_a_reader_that_has_enough(photos, tmp_path):
    "`| head -3`: no traceback, and what is finished is kept"
    p = command(tmp_path/'o', '--data', photos, *TINY_ARGS, '--seeds', 5000)
    while p.stdout.readline() and not (tmp_path/'o'/'results.csv').exists(): pass
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait() == 141 and err == '', err
    assert len(pd.read_csv(tmp_path/'o'/'results.csv')) >= 1 and (tmp_path/'o'/'reliability.png').exists()

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a device that is always full')
def test_output_to_a_full_disk(photos, tmp_path):
    with open('/dev/full', 'w') as full: p = command(tmp_path/'o', '--data', photos, *TINY_ARGS, stdout=full)
    err = p.communicate()[1]
    assert p.returncode == 2 and err == "fastai_smooth: can't write to standard output (No space left on device)\n"

@pytest.mark.skipif(os.name == 'nt', reason='sends SIGINT')
@pytest.mark.parametrize('args', [[], ['bench']], ids=str)
def test_ctrl_c_while_fastai_is_imported(tmp_path, args):
    "A module that says when it is imported, and takes long, in place of the first that is"
    for name in 'fastai', 'torch', 'matplotlib':
        (tmp_path/'slow'/name).mkdir(parents=True)
        (tmp_path/'slow'/name/'__init__.py').write_text("import time\nprint('importing', flush=True)\ntry: time.sleep(600)\nexcept BaseException: raise ImportError")
    p = command(tmp_path/'o', *args, path=tmp_path/'slow')
    assert p.stdout.readline() == 'importing\n'
    p.send_signal(signal.SIGINT)
    out,err = p.communicate()
    assert p.returncode == 130 and out == '' and err == '\nfastai_smooth: interrupted\n'

@pytest.mark.parametrize('name', ['digits', 'fashion'])
def test_a_folder_of_that_name_is_told(name, fashion_root, tmp_path, monkeypatch, capsys):
    "Two classes in ./digits, ten in scikit-learn's"
    for i in range(20): save(tmp_path/name/f'class {i%2}', f'{i}.png', i)
    monkeypatch.chdir(tmp_path)
    seen = []
    def one_run(data, eps, seed, **kwargs):
        seen.append(len(data.vocab))
        return fake_run(data, eps, seed)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    root = ['--root', fashion_root] if name == 'fashion' else []
    for i,(data,*more) in enumerate(([name, *root], [f'./{name}'])):
        assert run_main('--data', data, *more, *TINY_ARGS, '--eps', 0, '--out', tmp_path/str(i)) == 0
        assert (f'give ./{name}\n' in capsys.readouterr().out) == (i == 0)
    assert seen == [10, 2]


# ---------------------------------------------------------------- bad input

def refused(capsys, *args):
    "The one line on stderr; a list at the end gets what was printed"
    printed = args[-1] if isinstance(args[-1], list) else []
    assert run_main(*(o for o in args if o is not printed)) == 2
    out,err = capsys.readouterr()
    printed.append(out)
    assert err.startswith('fastai_smooth: ') and err.endswith('\n') and err.count('\n') == 1, err
    return err

@pytest.mark.parametrize('args,words', [
    ('--eps 1.5', 'eps 1.5'), ('--eps nan', 'nan'), ('--eps -0.1', '-0.1'), ('--eps 0 x', 'x'), ('--eps inf', 'inf'),
    ('--eps', 'eps'), ('--eps 0 .1 0', 'twice'), ('--noise 1', 'noise 1'), ('--noise -0.1', '-0.1'),
    ('--noise nan', 'nan'), ('--epochs 0', 'epochs 0'), ('--epochs 1.5', '1.5'), ('--seeds 0', 'seeds 0'),
    ('--size 0', 'size 0'), ('--bs 0', 'bs 0'), ('--bs 1', 'bs 1'), ('--bs 100000', '1438'), ('--workers -1', '-1'),
    ('--lr 0', 'lr 0'), ('--lr nan', 'nan'), ('--arch resnet19', 'resnet19 resnet18'),
    ('--arch zzz', 'zzz resnet18 xresnet18'), ('--arch vit_b_32', 'vit_b_32'),
    ('--arch alexnet --size 16', 'alexnet 16'), ('--arch xresnet18 --pretrained', 'pretrained xresnet18'),
    ('--data nowhere', 'nowhere'), ('--data', 'data'), ('--data fashion', '--root'),
    ('--data fashion --root nowhere', 'nowhere --download'), ('--root here', '--root'), ('--download', '--download'),
    ('--nonsense', 'nonsense'), ('bench2', 'bench2')])
def test_bad_options(args, words, tmp_path, monkeypatch, capsys, no_training):
    monkeypatch.chdir(tmp_path)
    err = refused(capsys, *args.split())
    assert all(re.sub(r'^-*', '', w) in err.replace('argument ', '').replace(':', '') for w in words.split()), err
    assert not list(tmp_path.iterdir()) # nor does it leave anything

def folder_one_class(p): save(p/'a', '1.png'); save(p/'a', '2.png'); return 'one class a'
def folder_empty(p): p.mkdir(); return 'no images'
def folder_no_images(p): (p/'a').mkdir(parents=True); (p/'a'/'notes.txt').write_text('hm'); return 'no images'
def folder_is_a_file(p): p.write_text('hm'); return 'photos'
def folder_flat(p): save(p, '1.png'); save(p, '2.png'); return '1.png no class'
def folder_broken_image(p):
    for o in 'ab': save(p/o, '1.png'); save(p/o, '2.png')
    (p/'b'/'2.png').write_bytes((p/'b'/'1.png').read_bytes()[:-40])
    return '2.png'
def folder_text_as_image(p):
    for o in 'ab': save(p/o, '1.png'); save(p/o, '2.png')
    (p/'a'/'3.jpg').write_text('no image at all')
    return '3.jpg'
def folder_lone_image(p): save(p/'a', '1.png'); save(p/'a', '2.png'); save(p/'b', '1.png'); return 'image b'
def folder_empty_valid(p):
    for o in ('train/a', 'train/b'): save(p/o, '1.png')
    (p/'valid'/'a').mkdir(parents=True)
    return 'no images valid'
def folder_empty_train(p):
    for o in ('valid/a', 'valid/b'): save(p/o, '1.png')
    (p/'train').mkdir()
    return 'no images train'
def folder_unseen_class(p):
    for o in ('train/a', 'train/b', 'valid/a', 'valid/c'): save(p/o, '1.png')
    return 'valid c train'
bad_folders = [v for k,v in list(globals().items()) if k.startswith('folder_')]

@pytest.mark.parametrize('make', bad_folders, ids=lambda f: f.__name__)
def test_bad_folders(make, tmp_path, capsys, no_training):
    words = make(tmp_path/'photos')
    err = refused(capsys, '--data', tmp_path/'photos', '--out', tmp_path/'o')
    assert all(w in err for w in words.split()), err
    assert not (tmp_path/'o').exists()

@pytest.mark.parametrize('out', ['file', 'file/deeper'])
def test_out_that_cannot_be_written(out, tmp_path, capsys, no_training):
    (tmp_path/'file').write_text('here first')
    assert str(tmp_path/out) in refused(capsys, *ARCH, '--out', tmp_path/out)

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write anywhere')
def test_out_without_permission(tmp_path, capsys, no_training):
    tmp_path.chmod(0o500)
    assert str(tmp_path) in refused(capsys, *ARCH, '--out', tmp_path)

def test_a_batch_size_that_was_not_asked_for_fits(photos, tmp_path, monkeypatch, capsys):
    "Ten images in each class: 16 to train on, 12 for a pilot; what was asked for is not changed"
    seen = []
    def one_run(data, eps, seed, **kwargs):
        seen.append(kwargs['bs'])
        return fake_run(data, eps, seed)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    monkeypatch.setattr(cmp, '_with_auto', lambda epss, data, options: [choose_eps(data, **options).eps])
    args = ['--data', photos, *ARCH, '--seeds', 1, '--epochs', 1, '--out', tmp_path/'o']
    for eps,bs in (0, 16), ('auto', 12):
        assert run_main(*args, '--eps', eps) == 0
        assert f'Batches of {bs} images: there are no more to train on\n' in capsys.readouterr().out
    assert run_main('--eps', 0, '--seeds', 1, *ARCH, '--out', tmp_path/'digits') == 0
    assert 'Batches' not in capsys.readouterr().out
    assert seen == [16, 12, 64]
    assert '--bs 64: there are 16 training images only; give --bs 16 or less' in refused(capsys, *args, '--bs', 64)

def test_auto_with_nothing_left_for_a_pilot(tmp_path, capsys, no_training):
    for o in 'ab': save(tmp_path/'photos'/o, '1.png'); save(tmp_path/'photos'/o, '2.png')
    err = refused(capsys, '--data', tmp_path/'photos', *ARCH, '--eps', 'auto', '--out', tmp_path/'o')
    assert '0 are left; give eps as a number' in err

def test_out_among_the_images_by_default(photos, tmp_path, monkeypatch, capsys):
    "What is given instead works"
    monkeypatch.chdir(photos)
    out = str(Path('..', 'fastai_smooth_out'))
    assert refused(capsys, '--data', '.').endswith(f'such as --out {out}\n')
    monkeypatch.setattr(cmp, 'one_run', fake_run)
    assert run_main('--data', '.', *TINY_ARGS, '--out', out) == 0 and (tmp_path/'fastai_smooth_out'/'results.csv').exists()

def test_out_among_the_images(photos, capsys, no_training):
    "The second time, the plot of the first would be an image of a class named as --out is"
    assert 'lies in' in refused(capsys, '--data', photos, '--out', photos/'o')

def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch, capsys, no_training):
    def offline(*args, **kwargs): raise URLError('no route\nto host')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', offline)
    assert '--pretrained' in refused(capsys, '--pretrained', '--out', tmp_path)

@pytest.mark.skipif(os.name == 'nt', reason='takes its seconds once')
def test_bad_input_through_the_shell(tmp_path):
    "No warning of a library, no traceback beside the one line"
    p = command(tmp_path/'o', '--data', tmp_path/'nowhere')
    out,err = p.communicate()
    assert p.returncode == 2 and out == '' and err.count('\n') == 1 and 'nowhere' in err


# ---------------------------------------------------------------- FashionMNIST

def write_idx(path, array):
    "The format of MNIST's files: two zeros, type, number of dimensions, the dimensions, the bytes"
    header = struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())

@pytest.fixture
def fashion_root(tmp_path):
    raw,rng = tmp_path/'FashionMNIST'/'raw',np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part,n in (('train', 40), ('t10k', 12)):
        write_idx(raw/f'{part}-images-idx3-ubyte', rng.integers(0, 256, (n,28,28)))
        write_idx(raw/f'{part}-labels-idx1-ubyte', np.arange(n) % 10)
    return tmp_path

def test_fashion_keeps_its_own_split(fashion_root):
    data = fashion(fashion_root)
    assert data.is_valid.tolist() == [False]*40 + [True]*12 and len(data.images) == 52
    assert data.images[0].shape == (28,28,3) and data.vocab[9] == 'Ankle boot'
    assert data.classes.tolist() == [i%10 for i in range(40)] + [i%10 for i in range(12)]

def test_fashion_runs(fashion_root, tmp_path, monkeypatch):
    monkeypatch.setattr(cmp, 'one_run', fake_run)
    assert run_main('--data', 'fashion', '--root', fashion_root, '--out', tmp_path/'o', *TINY_ARGS) == 0

def test_broken_fashion_is_one_line(fashion_root, tmp_path, capsys, no_training):
    (fashion_root/'FashionMNIST'/'raw'/'t10k-images-idx3-ubyte').write_bytes(b'\0\0\x08\x03')
    assert str(fashion_root) in refused(capsys, '--data', 'fashion', '--root', fashion_root, '--out', tmp_path/'o')

def test_fashion_that_cannot_be_downloaded(tmp_path, monkeypatch, capsys, no_training):
    def offline(*args, **kwargs): raise URLError('no route to host')
    monkeypatch.setattr('torchvision.datasets.mnist.download_and_extract_archive', offline)
    args = '--data', 'fashion', '--download', '--root', tmp_path/'f', '--out', tmp_path/'o'
    assert 'download failed' in refused(capsys, *args)


def test_out_that_holds_a_folder_of_the_same_name(tmp_path, capsys, no_training):
    (tmp_path/'results.csv').mkdir()
    assert cmp.main(['--out', str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(tmp_path) in err


def test_out_that_no_folder_can_have_is_named_beside_data_too(tmp_path):
    with pytest.raises(BadInput, match='^--out'): load_images(SimpleNamespace(data=str(tmp_path), out=Path('a\0b'), root=None, download=False))
