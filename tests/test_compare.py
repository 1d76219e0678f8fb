"""The command `fastai_smooth`: runs of one seed share all but the smoothing; bad input is told before any training; what is finished is kept."""
import os, re, shutil, signal, subprocess, sys, threading, time
from functools import wraps
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastcore.foundation import first
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import accuracy_multi
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from fastai_smooth import compare as cmp
from fastai_smooth.callback import MultiLabelSmoothingCallback
from fastai_smooth.cli import main, run_command
from fastai_smooth.compare import *
from fastai_smooth.images import *
from fastai_smooth.report import *
from fastai_smooth.scores import *
from fastai_smooth.tune import EpsSuggestion

from test_scores import fake_run, label_run

DIGITS = digits()
TINY = dict(arch='squeezenet1_1', epochs=1, bs=8, progress=False)
TINY_ARGS = '--arch squeezenet1_1 --size 32 --bs 8 --epochs 1 --seeds 1'.split()

def few(n=40, **kwargs): return ImageSet(DIGITS.images[:n], DIGITS.classes[:n], DIGITS.vocab, **kwargs)

def two_on_each(n=40, **kwargs):
    "Images with the labels of two digits, of which the second is beside the first"
    images = [np.concatenate([DIGITS.images[i], DIGITS.images[i+n]], 1) for i in range(n)]
    return ImageSet(images, np.array([[k in DIGITS.classes[[i, i+n]] for k in range(10)] for i in range(n)], np.uint8), DIGITS.vocab, **kwargs)

def labelled_photos(path, n=40):
    "Images, and a CSV file of their labels"
    data, path = two_on_each(n), Path(path)
    path.mkdir(parents=True)
    for i, o in enumerate(data.images): Image.fromarray(o).save(path/f'{i}.png')
    rows = [f'{i}.png,' + ' '.join(f'digit{data.vocab[k]}' for k in np.flatnonzero(o)) for i, o in enumerate(data.classes)]
    (path/'labels.csv').write_text('\n'.join(['file,tags', *rows]))
    return path

def photo_folder(path, n=20):
    for i in range(n):
        (f := path/f'class {i % 2}'/f'{i}.png').parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(DIGITS.images[i]).save(f)
    return path

@pytest.fixture
def photos(tmp_path): return photo_folder(tmp_path/'photos')

@pytest.fixture
def fake(monkeypatch):
    "The command without training, models or pictures: a list of the runs that were asked for. `fake.before` is called at each, with (method, seed)"
    class Runs(list): before = staticmethod(lambda method, seed: None)
    runs = Runs()
    @wraps(cmp.one_run)
    def one_run(data, eps, seed, prior=None, **kwargs):
        runs.append((data, Method(eps, prior), seed, kwargs))
        runs.before(Method(eps, prior), seed)
        return (label_run if data.multi else fake_run)(Method(eps, prior), seed)
    monkeypatch.setattr(cmp, 'one_run', one_run)
    monkeypatch.setattr(cmp, '_learner', lambda dls, *args: Learner(dls, nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), loss_func=CrossEntropyLossFlat()))
    monkeypatch.setattr('fastai_smooth.labels.digits', lambda: few(400))
    monkeypatch.setattr('fastai_smooth.labels.pairs', lambda: two_on_each(160))
    monkeypatch.setattr(Figure, 'savefig', lambda self, f, **kwargs: Path(f).write_bytes(b'a picture'))
    return runs

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Images this small gain nothing from more; and the command sets it"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def run(*args): return run_command([str(o) for o in args])

def refused(capsys, *args):
    "The one line on stderr"
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert re.fullmatch('fastai_smooth: [^\n]+\n', err), err
    return err

def csvs(path): return {f.name: pd.read_csv(f).eps.tolist() for f in path.glob('*.csv')}

def said(results, out):
    "Is their table there, below an answer?"
    text = table(results).to_string(index=False)
    return text in out and re.search(r'(ith|ithout)\s+smoothing|smoothing\s+(raised|lowered|changed)', out[:out.index(text)])

# --- runs

class Witness(Callback):
    "Writes down all of a run that a seed decides"
    def __init__(self, seen): self.seen = seen
    def before_fit(self):
        if not hasattr(self, 'gather_preds'): self.seen += [o.clone() for o in self.model.state_dict().values()] # a trained model may differ
    def before_batch(self): self.seen += [o.clone() for o in (*self.xb, *self.yb, torch.get_rng_state())]

@pytest.mark.parametrize('options', [{}, dict(noise=.3, augment=True, workers=2)], ids=str)
def test_runs_of_one_seed_share_all_that_is_random(monkeypatch, options):
    "Weights, split, noise, order, augmentation and the state that dropout draws from: the same for all methods, not for two seeds; which leave ours alone"
    make, witnessed, before = cmp._learner, [], torch.get_rng_state()
    def learner(*args):
        witnessed.append([])
        return make(*args).add_cb(Witness(witnessed[-1]))
    monkeypatch.setattr(cmp, '_learner', learner)
    runs = [one_run(few(), eps, seed, prior=prior, **TINY, **options) for eps, seed, prior in ((0., 0, None), (.4, 0, None), (0., 0, None), (0., 1, None), (.7, 0, 'online'))]
    assert [r['method'] for r in runs[::2]] == [Method(), Method(), Method(.7, 'online')]
    a, b, _, c, online = witnessed
    assert len(a) == len(b) == len(c) > 60 and all(map(torch.equal, a, b)) and all(map(torch.equal, a, online)) and not all(map(torch.equal, a, c)) and not torch.equal(a[0], c[0])
    assert (runs[0]['probs'] == runs[2]['probs']).all() and runs[0]['nll'] != runs[1]['nll'] and torch.equal(before, torch.get_rng_state())
    assert runs[3]['images'].tolist() == np.flatnonzero(split_valid(few().classes, 1)).tolist()
    assert runs[3]['targs'].tolist() == few().classes[runs[3]['images']].tolist()

def test_eps_smooths_training_and_0_leaves_the_hard_loss():
    dls = get_dls(few(), seed=0, bs=8)
    assert type(cmp._learner(dls, Method(), 'squeezenet1_1', False).loss_func) is CrossEntropyLossFlat
    assert cmp._learner(dls, Method(.7, 'online'), 'squeezenet1_1', False).online_label_smoothing.eps == .7
    loss, x, y = cmp._learner(dls, Method(.3), 'squeezenet1_1', False).loss_func, torch.randn(5, 10, requires_grad=True), torch.tensor([0, 1, 2, 3, 4])
    assert torch.allclose(loss(x, y), nn.functional.cross_entropy(x, y, label_smoothing=.3))
    with torch.no_grad(): assert torch.allclose(loss(x, y), nn.functional.cross_entropy(x, y))

def test_pretrained_fine_tunes(monkeypatch):
    "Without a download: what is asked of fastai"
    calls, make = [], cmp.vision_learner
    monkeypatch.setattr(cmp, 'vision_learner', lambda *args, pretrained, **kwargs: calls.append(pretrained) or make(*args, pretrained=False, **kwargs))
    monkeypatch.setattr(Learner, 'fine_tune', lambda self, *args, **kwargs: calls.append(args))
    monkeypatch.setattr(Learner, 'fit_one_cycle', lambda self, *args, **kwargs: calls.append(args))
    for pretrained in True, False: one_run(few(), 0., 0, pretrained=pretrained, **TINY)
    assert calls == [True, (1, 3e-3), False, (1, 3e-3)]

@pytest.mark.parametrize('arch', ['xresnet18', 'mobilenet_v3_small'])
def test_archs_of_torchvision_and_fastai(arch):
    assert arch in archs()
    cmp._check_training(few(), 32, 8, arch, False)

# --- --eps auto

FOUND = EpsSuggestion(.1234, (.1, .2), .01, (0., .05), .111, (.1, .15), 'closed form')

def test_eps_is_chosen_on_training_images_alone(monkeypatch, recwarn):
    "With their noisy labels, a fifth of them held out; validation images are not seen"
    seen, make, data = [], cmp.get_dls, few(200)
    monkeypatch.setattr(cmp, 'get_dls', lambda data, seed, **kwargs: seen.append(data) or make(data, seed, **kwargs))
    found = cmp._choose_eps(data, noise=.3, size=32, pretrained=False, lr=3e-3, **TINY)
    train, (pilot,) = np.flatnonzero(~split_valid(data.classes, 0)), seen
    assert all((a == data.images[i]).all() for a, i in zip(pilot.images, train, strict=True)) and .15 < pilot.is_valid.mean() < .3
    assert pilot.classes.tolist() == flip_labels(data.classes, .3, 10, 0)[train].tolist()
    assert found.eps == .1 and not found.learnt # in an epoch on 128 images
    assert not [w for w in recwarn if 'pilot' in str(w.message)] # its words are for who calls it: the command prints the verdict

@pytest.mark.parametrize('eps, expected', [(['auto'], [0, .123]), ([.3, 'auto'], [.3, .123]), ([.123, 0, 'auto'], [.123, 0]), (['online', 'auto'], [.5, .123])])
def test_auto_is_compared_with_none(fake, monkeypatch, tmp_path, capsys, eps, expected):
    "And it has seen no image that scores any seed: all validate on those that the pilot's seed holds out"
    def choose_eps(data, **kwargs):
        trained.update(i.tobytes() for i, v in zip(data.images, data.validation(0)) if not v)
        return FOUND._replace(verdict='closed form, cut to 0.4')
    trained = set()
    monkeypatch.setattr(cmp, '_choose_eps', choose_eps)
    assert run('--eps', *eps, '--seeds', 2, '--out', tmp_path/'o') == 0
    out = capsys.readouterr().out
    assert csvs(tmp_path/'o') == {'results.csv': expected*2} and f'eps auto: {choose_eps(few(0))}\n' in out and 'try more --epochs\n' in out
    assert len(fake) == 4 and not any(i.tobytes() in trained for data, _, seed, _ in fake for i, v in zip(data.images, data.validation(seed)) if v)

def test_auto_with_too_few_images(photos, fake, tmp_path, capsys):
    assert re.fullmatch(r'fastai_smooth: --eps auto: .*; give --bs 12 or less\n', refused(capsys, '--data', photos, '--eps', 'auto', '--bs', 16, '--out', tmp_path/'o'))
    tiny = photo_folder(tmp_path/'tiny', 4)
    assert '0 are left; give eps as a number' in refused(capsys, '--data', tiny, '--eps', 'auto', '--out', tmp_path/'o') and not fake

def test_auto_for_real(photos, tmp_path, capsys):
    assert run('--data', photos, '--eps', 'auto', *TINY_ARGS, '--bs', 4, '--out', tmp_path/'o') == 0
    out = capsys.readouterr().out
    eps = float(re.search(r'eps auto: eps=([\d.]+)', out)[1]) # the default, where the pilot has not learnt
    assert not {'\r', '█'} & set(out) and 'Epoch' not in out and 'nan' not in out # nor does the pilot draw progress bars
    assert csvs(tmp_path/'o') == {'results.csv': list(dict.fromkeys([0., eps]))}

# --- the command

def test_options_arrive(fake, tmp_path):
    "From the shell, and from Python. Digits are trained with one thread"
    torch.set_num_threads(2)
    args = '--eps 0 .3 online:.7 --seeds 2 --noise .25 --epochs 7 --arch xresnet18 --bs 16 --size 24 --lr .01 --workers 1 --augment'
    assert run(*args.split(), '--out', tmp_path/'not'/'there'/'yet') == 0
    assert [o[1:3] for o in fake] == [(m, seed) for seed in range(2) for m in (Method(), Method(.3), Method(.7, 'online'))] and torch.get_num_threads() == 1
    assert all(o[3] == dict(noise=.25, epochs=7, arch='xresnet18', pretrained=False, bs=16, size=24, lr=.01, augment=True, workers=1, progress=False) for o in fake)
    compare(eps=[.2, 'online'], seeds=1, epochs=2, out=tmp_path/'python')
    assert fake[-2][1] == Method(.2) and fake[-1][1:] == (Method(.5, 'online'), 0, dict(noise=0., epochs=2, arch='resnet18', pretrained=False, bs=64, size=24, lr=3e-3, augment=False, workers=0, progress=False))

@pytest.mark.parametrize('data, eps', [(few, .5), (two_on_each, .25)])
def test_online_smoothing_is_uniform_in_its_first_epoch(data, eps):
    uniform, online = (one_run(data(), eps, 0, prior=prior, size=32, **TINY)['probs'] for prior in (None, 'online'))
    assert torch.allclose(uniform, online, atol=1e-5)

@pytest.mark.parametrize('args, told', [('--epochs 1', 1), ('--epochs 2', 0), ('--epochs 1 --eps 0 .1', 0), ('--epochs 1 --eps online:.7', 1)])
def test_one_epoch_of_online_smoothing_is_told_before_the_runs(fake, tmp_path, capsys, args, told):
    assert run(*args.split(), '--seeds', 1, '--out', tmp_path/'o') == 0
    before, after = capsys.readouterr().out.split('Run 1 of')
    assert before.count('Online smoothing is uniform smoothing with the same eps in its first epoch') == told and 'is uniform' not in after

def test_a_frozen_epoch_teaches_online_smoothing(fake, tmp_path, capsys):
    compare(eps=['online'], seeds=1, epochs=1, pretrained=True, out=tmp_path/'o')
    assert 'is uniform' not in capsys.readouterr().out

def test_the_legend_says_what_the_temperature_is_fitted_to(fake, tmp_path, capsys):
    assert run('--seeds', 1, '--out', tmp_path/'o') == 0
    assert 'divided by a temperature that was fitted to other validation images (cross-fitted)' in ' '.join(capsys.readouterr().out.split())

def test_a_batch_size_that_was_not_asked_for_fits(photos, fake, monkeypatch, tmp_path, capsys):
    "Ten images in each class: 16 to train on, 12 for a pilot; what was asked for is not changed"
    monkeypatch.setattr(cmp, '_choose_eps', lambda *args, **kwargs: FOUND)
    for eps, bs in (0, 16), ('auto', 12):
        assert run('--data', photos, '--seeds', 1, '--out', tmp_path/'o', '--eps', eps) == 0 and fake[-1][3]['bs'] == bs
        assert f'Batches of {bs} images: there are no more to train on\n' in capsys.readouterr().out
    assert run('--eps', 0, '--seeds', 1, '--out', tmp_path/'digits') == 0 and fake[-1][3]['bs'] == 64 and 'Batches' not in capsys.readouterr().out
    assert '--bs 64: there are 16 training images only; give --bs 16 or less' in refused(capsys, '--data', photos, '--bs', 64, '--out', tmp_path/'o')

def test_a_folder_of_that_name_is_told(fake, tmp_path, monkeypatch, capsys):
    "Two classes in ./digits, ten in scikit-learn's"
    monkeypatch.chdir(photo_folder(tmp_path/'fashion').parent)
    monkeypatch.setattr('fastai_smooth.labels.fashion', lambda root, download: few(400))
    for data, more, n in ('fashion', ['--root', '.'], 10), ('./fashion', [], 2):
        assert run('--data', data, *more, '--bs', 8, '--eps', 0, '--seeds', 1, '--out', tmp_path/str(n)) == 0
        assert ('give ./fashion\n' in capsys.readouterr().out) == (n == 10) and len(fake[-1][0].vocab) == n

@pytest.mark.parametrize('args, words', [
    ('--eps 0 .1 0', 'eps twice'), ('--eps online .1 online:0.5', 'eps twice'), ('--bs 100000', '--bs 1438'), ('--bs 1', '--bs'), ('--arch resnet19', '--arch resnet19 resnet18'), ('--arch zzz', 'zzz resnet18 xresnet18'),
    ('--arch vit_b_32', 'vit_b_32'), ('--arch alexnet --size 16', 'alexnet 16'), ('--arch xresnet18 --pretrained', '--pretrained xresnet18'), ('--arch ResNet18', 'ResNet18'),
    ('--pretrained', '--pretrained weights'), ('--data fashion', '--root'), ('--data fashion --root nowhere', 'nowhere --download'), ('--root here', '--root'),
    ('--download', '--download'), ('--data nowhere', 'nowhere'), ('--out file', '--out file'), ('--out file/deeper', '--out file/deeper')])
def test_what_does_not_go_together(args, words, tmp_path, monkeypatch, capsys):
    "Told before any training, and nothing is left behind"
    def offline(*args, **kwargs): raise URLError('no route\nto host')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', offline)
    monkeypatch.setattr(cmp, '_run_all', lambda *args: pytest.fail('it trained'))
    monkeypatch.chdir(tmp_path)
    Path('file').write_text('here first')
    err = refused(capsys, *args.split())
    assert all(w in err for w in words.split()) and [*tmp_path.iterdir()] == [tmp_path/'file'], err

def test_out_among_the_images(photos, fake, monkeypatch, capsys):
    "The second time, the plot of the first would be an image of a class named as --out is. What is given instead works"
    monkeypatch.chdir(photos)
    out = str(Path('..', 'fastai_smooth_out'))
    assert refused(capsys, '--data', '.').endswith(f'such as --out {out}\n') and 'lies in' in refused(capsys, '--data', photos, '--out', photos/'o')
    assert run('--data', '.', '--out', out) == 0 and Path(out, 'results.csv').exists()

# --- several labels

def test_a_learner_of_several_labels():
    "fastai finds the loss; smoothing is what `to_smooth` does to it"
    dls = get_dls(two_on_each(), seed=0, bs=8)
    hard, smoothed = (cmp._learner(dls, o, 'squeezenet1_1', False) for o in (Method((0., 0.)), Method(.1)))
    assert type(hard.loss_func) is BCEWithLogitsLossFlat and hard.metrics[0].func is accuracy_multi and not hard._grab_cbs(MultiLabelSmoothingCallback)
    assert first(smoothed._grab_cbs(MultiLabelSmoothingCallback)).eps == .1

def test_a_run_of_several_labels():
    "Validated on the clean labels of the split, with the names of all"
    data = two_on_each()
    res = one_run(data, .05, 3, noise=.2, size=32, **TINY)
    assert res['vocab'] == data.vocab and res['images'].tolist() == np.flatnonzero(split_valid(data.classes, 3)).tolist()
    assert res['targs'].tolist() == data.classes[res['images']].tolist() and res['probs'].shape == res['targs'].shape and 0 < res['average_precision'] < 1
    hard = one_run(data, (0., 0.), 3, noise=.2, size=32, **TINY)
    assert hard['method'] == Method((0., 0.)) and (hard['probs'] == one_run(data, 0., 3, noise=.2, size=32, **TINY)['probs']).all() and hard['nll'] != res['nll']

@pytest.mark.parametrize('eps, methods', [
    ([], [Method(), Method(.05), Method(.25, 'online')]), (['0', '0.1,0', 'online:.4'], [Method(), Method((.1, 0.)), Method(.4, 'online')]),
    (['0,0', '.2,.2', '0,1', '.5'], [Method(), Method(.2), Method((0., 1.)), Method(.5)])])
def test_eps_of_several_labels(fake, tmp_path, eps, methods):
    assert run('--data', 'pairs', *(['--eps', *eps] if eps else []), '--seeds', 2, '--out', tmp_path) == 0
    assert [o[1:3] for o in fake] == [(m, seed) for seed in range(2) for m in methods] and torch.get_num_threads() == 1
    assert fake[0][3]['size'] == 24 and fake[0][0].multi

def test_eps_from_python(fake, tmp_path):
    compare('pairs', eps=[0, (.1, 0.), 'online', Method(.2)], seeds=1, out=tmp_path/'a')
    assert [o[1] for o in fake] == [Method(), Method((.1, 0.)), Method(.25, 'online'), Method(.2)]
    compare(eps=None, seeds=1, out=tmp_path/'b')
    assert [o[1] for o in fake[4:]] == [Method(), Method(.1), Method(.5, 'online')]

@pytest.mark.parametrize('args, words', [
    ('--eps 0 0.1,0', '--eps 0.1,0: several labels one class'), ('--data pairs --eps 0.51', '--eps 0.51: 0.5'), ('--data pairs --eps online:0.7', '--eps online:0.7: 0.5'),
    ('--data pairs --eps .1,0 0.1,0.0', 'eps twice'), ('--data pairs --eps 0 0,0', 'eps twice'), ('--data pairs --eps online online:.25', 'eps twice'),
    *((f'--data pairs --eps {o}', f'{o} is not a number in [0, 1], two such as 0.1,0') for o in ('0.6,0.5', '0.1,0,0', '0.1,', '1.5', '.2,-0.1', 'nan', '0,nan', 'inf', 'online:0', 'online:.1,0', 'uniform', ','))])
def test_eps_that_is_no_good(args, words, tmp_path, fake, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    err = refused(capsys, *args.split())
    assert all(w in err for w in words.split()) and not fake and not [*tmp_path.iterdir()], err

def test_what_is_said_of_several_labels(fake, tmp_path, capsys):
    "A line a run, the answer, the table and what its columns are; a row a label in results.csv, which is known as this program's"
    for file in 'results.csv', 'results-2.csv':
        assert run('--data', 'pairs', '--eps', 0, '0.1,0', '--seeds', 2, '--out', tmp_path) == 0
        out = capsys.readouterr().out
        res = pd.read_csv(tmp_path/file)
        assert re.search(r'^\d+ training and \d+ validation images with 10 labels$', out, re.M) and len(res) == 4*5 and res.eps.astype(str).unique().tolist() == ['0.0', '0.1,0']
        for seed in range(2):
            row = res[(res.seed == seed) & (res.label == '(all)')].iloc[1]
            assert f'Run {2*seed+2} of 4: one-sided 0.1,0, seed {seed}\nmean average precision {row.average_precision:.4f}, nll {row.nll:.4f}\n' in out
        assert said(res, out) and 'mean average precision' in out[:out.index(table(res).to_string(index=False))]
        text = ' '.join(out.split())
        assert 'Accuracy over labels: the share' in text and 'results.csv has each label' in text and 'surest half' not in text

def test_no_validation_image_with_a_label(fake, monkeypatch, tmp_path, capsys):
    data = two_on_each(160, is_valid=np.arange(160) >= 120)
    data.classes[120:] = 0
    monkeypatch.setattr('fastai_smooth.labels.pairs', lambda: data)
    assert 'no validation image has a label; give another split by --valid-col' in refused(capsys, '--data', 'pairs', '--out', tmp_path/'o') and not fake and not [*tmp_path.iterdir()]

def test_options_of_a_table_arrive(fake, tmp_path, monkeypatch, capsys):
    "With one class each, labels are classes: eps is as for these"
    photos = labelled_photos(tmp_path/'photos')
    (photos/'l.csv').write_text('\n'.join(['set;what;image', *(f'{"valid" if i > 25 else "train"};{"a|b" if i % 3 else "b|c c"};{i}' for i in range(40))]))
    table = '--label-delim | --fn-col image --label-col what --valid-col set'.split()
    assert run('--data', photos, '--labels', 'l.csv', *table, '--seeds', 1, '--out', tmp_path/'o') == 0 and fake[0][0].vocab == ['a', 'b', 'c c']
    assert fake[0][0].is_valid.sum() == 14 and fake[1][1] == Method(.05) and fake[0][3]['size'] == 128 and fake[0][3]['bs'] == 26
    assert run('--data', photos, '--labels', 'l.csv', '--label-delim', '', *table[2:], '--seeds', 1, '--out', tmp_path/'o') == 0 and fake[3][0].vocab == ['a|b', 'b|c c']
    assert fake[4][1] == Method(.1) and not fake[3][0].multi
    for option in table[::2]: assert f'{option}: goes with --labels' in refused(capsys, option, 'x', '--out', tmp_path/'o')

def test_eps_of_several_labels_is_chosen_on_training_images(monkeypatch, fake, tmp_path, capsys):
    "With a fifth of them held out; then it is compared with none"
    monkeypatch.undo()
    seen, make, data = [], cmp.get_dls, two_on_each(100)
    monkeypatch.setattr(cmp, 'get_dls', lambda data, seed, **kwargs: seen.append(data) or make(data, seed, **kwargs))
    found = cmp._choose_eps(data, noise=.1, size=32, pretrained=False, lr=3e-3, **TINY)
    train, (pilot,) = np.flatnonzero(~split_valid(data.classes, 0)), seen
    assert len(pilot.images) == len(train) and pilot.classes.tolist() == flip_labels(data.classes, .1, 10, 0)[train].tolist() and 0 < found.eps <= .2
    assert cmp._with_auto(['auto'], data, dict(noise=.1, size=32, pretrained=False, lr=3e-3, **TINY)) == [Method(), Method(round(found.eps, 3))]

def test_several_labels_from_end_to_end(tmp_path, capsys):
    "The same again, to the bit"
    photos = labelled_photos(tmp_path/'photos')
    args = ['--data', photos, '--labels', 'labels.csv', *TINY_ARGS, '--eps', 0, '0.1,0', 'online', '--epochs', 2, '--seeds', 2]
    for out in 'a', 'b': assert run(*args, '--out', tmp_path/out) == 0
    out, res = capsys.readouterr().out, pd.read_csv(tmp_path/'a'/'results.csv')
    assert (tmp_path/'a'/'results.csv').read_text() == (tmp_path/'b'/'results.csv').read_text() and min(Image.open(tmp_path/'a'/'reliability.png').size) > 500
    labels = res.label[1:].tolist()[:res.label[1:].tolist().index('(all)')]
    assert labels == [f'digit{i}' for i in range(10)] and len(res) == 6*11 and res.groupby('method', sort=False).ngroups == 3 and res[res.label == '(all)'].notna().all(axis=None)
    assert said(res, out) and 'nan' not in out and not {'\r', '█'} & set(out) and res[res.label == '(all)'].nll.nunique() == 6

# --- what is finished is kept, and nothing else is touched

def stop_at(runs, seed, error):
    def before(method, s):
        if s == seed: raise error
    runs.before = before

def test_ctrl_c_and_errors_keep_what_is_finished(fake, tmp_path, capsys):
    stop_at(fake, 1, KeyboardInterrupt())
    assert run('--out', tmp_path/'a') == 130
    out, err = capsys.readouterr()
    assert err == '\nfastai_smooth: interrupted, 3 of 9 runs are finished\n' and csvs(tmp_path/'a') == {'results.csv': [0, .1, .5]} # one of each
    assert said(pd.read_csv(tmp_path/'a'/'results.csv'), out) and (tmp_path/'a'/'reliability.png').exists()
    stop_at(fake, 2, RuntimeError('CUDA out of memory'))
    with pytest.raises(RuntimeError, match='out of memory'): run('--out', tmp_path/'b')
    assert said(pd.read_csv(tmp_path/'b'/'results.csv'), capsys.readouterr().out)

@pytest.mark.parametrize('at', ['answer', 'table', 'plot_reliability'])
def test_ctrl_c_while_reporting(fake, tmp_path, monkeypatch, capsys, at):
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cmp, at, interrupt)
    assert run('--out', tmp_path) == 130
    res = pd.read_csv(tmp_path/'results.csv')
    out = capsys.readouterr().out
    assert len(res) == 9 and ('mall to tell' in out.replace('\n', ' ')) == (at != 'answer') and (table(res).to_string(index=False) in out) == (at == 'plot_reliability')
    assert not list(tmp_path.glob('*.part')) and (tmp_path/'reliability.png').exists() == (at != 'plot_reliability')

@pytest.mark.parametrize('where', ['one_run', 'load_images'])
def test_ctrl_c_with_nothing_finished(fake, tmp_path, monkeypatch, where):
    "No folder stays but one that was there before"
    @wraps(getattr(cmp, where))
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cmp, where, interrupt)
    (tmp_path/'mine'/'too').mkdir(parents=True)
    for out in 'new', 'new/deeper', 'mine/new', 'mine/too': assert run('--out', tmp_path/out) == 130
    assert sorted(tmp_path.rglob('*')) == [tmp_path/'mine', tmp_path/'mine'/'too']

class Lost:
    "A Ctrl-C whose KeyboardInterrupt Python ignores"
    def __del__(self): signal.raise_signal(signal.SIGINT)

@pytest.fixture
def ctrl_c(monkeypatch):
    "As in a process of its own"
    before = signal.signal(signal.SIGINT, signal.default_int_handler) # ignored in the background
    monkeypatch.setattr('fastai_smooth.cli._interrupted', False)
    yield
    signal.signal(signal.SIGINT, before)

@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('lost_in, batches, finished', [('batch', 6, '1 of 4'), ('score', 8, '1 of 4'), ('pilot', 2, None)])
def test_ctrl_c_that_is_lost_ends_training(photos, tmp_path, monkeypatch, capsys, ctrl_c, lost_in, batches, finished):
    "Before the next batch; a run after whose last batch it was lost does not count"
    seen, learner, score = [], cmp._learner, cmp.score
    def after_batch(cb):
        seen.append(cb.iter)
        if lost_in != 'score' and len(seen) == batches: Lost()
    def with_lost(*args):
        learn = learner(*args)
        learn.add_cb(Callback(after_batch=after_batch))
        return learn
    def lost_score(*args):
        if lost_in == 'score' and len(seen) == batches: Lost()
        return score(*args)
    monkeypatch.setattr(cmp, '_learner', with_lost)
    monkeypatch.setattr(cmp, 'score', lost_score)
    eps = 'auto' if lost_in == 'pilot' else '.2'
    monkeypatch.setattr(sys, 'argv', ['', '--data', str(photos), '--eps', '0', eps, *TINY_ARGS, '--seeds', '2', '--out', str(tmp_path/'o')])
    assert main() == 130 and len(seen) == batches
    assert capsys.readouterr().err == f'\nfastai_smooth: interrupted{f", {finished} runs are finished" if finished else ""}\n'
    if finished: assert csvs(tmp_path/'o') == {'results.csv': [0]}
    else: assert not (tmp_path/'o').exists()

def test_results_are_on_disk_after_each_run(fake, tmp_path):
    "So that not even a power cut loses them; or a folder that is removed meanwhile"
    lines = []
    fake.before = lambda method, seed: lines.append(len((tmp_path/'results.csv').read_text().splitlines()))
    assert run('--out', tmp_path, '--eps', 0, .1, '--seeds', 2) == 0 and lines == [0, 2, 3, 4]
    fake.before = lambda method, seed: shutil.rmtree(tmp_path/'o')
    assert run('--out', tmp_path/'o') == 0 and csvs(tmp_path/'o') == {'results.csv': [0, .1, .5]*3} and (tmp_path/'o'/'reliability.png').exists()

def no_space(self, file, **kwargs):
    Path(file).write_text('half of it')
    raise OSError(28, 'No space left on device')

@pytest.mark.parametrize('what', ['csv', 'png', 'later'])
def test_a_full_disk_is_one_line_below_the_answer(fake, tmp_path, monkeypatch, capsys, what):
    "What was written before stays, and no empty file does"
    if what == 'later': fake.before = lambda method, seed: seed and monkeypatch.setattr(pd.DataFrame, 'to_csv', no_space)
    else: monkeypatch.setattr(*((pd.DataFrame, 'to_csv') if what == 'csv' else (Figure, 'savefig')), no_space)
    assert run('--eps', 0, .1, '--out', tmp_path/'o') == 2
    out, err = capsys.readouterr()
    assert re.fullmatch('fastai_smooth: --out [^\n]*No space left[^\n]*\n', err) and str(tmp_path/'o') in err and out.count("can't write results now") == dict(csv=6, png=0, later=4)[what]
    assert said(tidy([fake_run(Method(eps), seed) for seed in range(3) for eps in (0., .1)]), out)
    if what == 'csv': assert not (tmp_path/'o').exists()
    else: assert csvs(tmp_path/'o') == {'results.csv': [0, .1]*(1 if what == 'later' else 3)} and len([*(tmp_path/'o').iterdir()]) == 1

def test_out_that_is_no_good_is_told_before_training(fake, tmp_path, monkeypatch, capsys):
    "A results.csv of the user's own, a folder of that name, a disk that is full already"
    for i, text in enumerate(['name,score\nme,1\n', 'eps,accuracy\n.1,.9\n', 'method,accuracy\nours,.9\n', '\xff\xfe\0']):
        (tmp_path/str(i)).mkdir()
        (tmp_path/str(i)/'results.csv').write_text(text, encoding='latin1')
        assert str(tmp_path/str(i)) in (err := refused(capsys, '--out', tmp_path/str(i))) and 'results.csv' in err
        assert (tmp_path/str(i)/'results.csv').read_text(encoding='latin1') == text
    (tmp_path/'dir'/'results.csv').mkdir(parents=True)
    assert str(tmp_path/'dir') in refused(capsys, '--out', tmp_path/'dir')
    if Path('/dev/full').exists():
        monkeypatch.setattr('tempfile.TemporaryFile', lambda dir: open('/dev/full', 'wb'))
        assert 'No space left' in refused(capsys, '--out', tmp_path/'full') and not (tmp_path/'full').exists()
    assert not fake

def test_earlier_results_stay(fake, tmp_path, capsys):
    "Those of another setting, of a command that runs at the same time, and a picture of the user's own"
    (tmp_path/'reliability-2.png').write_text('a picture')
    old = 'eps,seed,accuracy,nll,confidence_gap,brier\n'
    (tmp_path/'old').mkdir()
    (tmp_path/'old'/'results.csv').write_text(old) # of an earlier version
    assert run('--eps', 0, '--seeds', 1, '--out', tmp_path/'old') == 0 and (tmp_path/'old'/'results.csv').read_text() == old and (tmp_path/'old'/'results-2.csv').exists()
    capsys.readouterr()
    for eps in .1, .2: assert run('--eps', eps, '--seeds', 1, '--out', tmp_path) == 0
    fake.before = lambda method, seed: (method.eps, seed) == (.3, 0) and run('--eps', .5, '--seeds', 1, '--out', tmp_path)
    assert run('--eps', .3, '--seeds', 2, '--out', tmp_path) == 0
    assert csvs(tmp_path) == {'results.csv': [.1], 'results-3.csv': [.2], 'results-4.csv': [.3, .3], 'results-5.csv': [.5]}
    assert (tmp_path/'reliability-2.png').read_text() == 'a picture' and (tmp_path/'reliability-3.png').exists()
    out = capsys.readouterr().out
    assert out.endswith(f'In {tmp_path}: results-4.csv, reliability-4.png\n') and 'add 0 to --eps' in out.replace('\n', ' ')

# --- the real thing

@pytest.mark.skipif(os.name == 'nt', reason='sends SIGINT')
def test_from_end_to_end(photos, tmp_path, capsys):
    "Through the shell until Ctrl-C, then its first three runs again in this process: the same to the bit"
    args = ['--data', photos, '--eps', 0, .2, 'online', '--noise', .1, *TINY_ARGS]
    p = subprocess.Popen([sys.executable, '-m', 'fastai_smooth', *map(str, args), '--seeds', '5000', '--out', str(tmp_path/'a')], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, encoding='utf-8', env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONIOENCODING': 'utf-8'},
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) # ignored in the background, and by its children
    first, limit = tmp_path/'a'/'results.csv', threading.Timer(600, p.kill) # of a program that hangs, so that its output is seen
    limit.start()
    while p.poll() is None and not (first.exists() and len(first.read_text().splitlines()) > 3): time.sleep(.1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate()
    limit.cancel()
    assert p.returncode == 130 and re.fullmatch(r'\nfastai_smooth: interrupted, \d+ of 15000 runs are finished\n', err), f'{out[-2000:]}\n{err}'
    assert re.search(r'^\d+ training and \d+ validation images of 2 classes$', out, re.M)
    assert re.search(r'^Run 3 of 15000: online 0.5, seed 0\naccuracy \d\.\d{4}, nll \d+\.\d{4}$', out, re.M)
    assert not {'\r', '█'} & set(out) and 'Epoch' not in out # no progress bars in a file
    res = pd.read_csv(first)
    measures = 'accuracy', 'nll', 'brier', 'ece', 'nll_after_t', 'confidence_gap', 'aurc'
    assert list(res) == ['method', 'eps', 'seed', *(f'{o}{end}' for o in measures for end in ('', '_low', '_high')), 'error_surest_half', 'temperature']
    assert said(res, out) and min(Image.open(tmp_path/'a'/'reliability.png').size) > 500
    with mock.patch.object(sys.stdout, 'isatty', return_value=True): assert run('compare', *args, '--out', tmp_path/'b') == 0
    assert 'Epoch 1/1' in (out := capsys.readouterr().out) and 'train_loss' in out # fastai's progress
    assert (tmp_path/'b'/'results.csv').read_text().splitlines() == first.read_text().splitlines()[:4]
