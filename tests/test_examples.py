"Digits to try things on: a folder, DataLoaders and a Learner, each beside scikit-learn's own digits."
import numpy as np, pytest, torch
from fastai.vision.all import ImageDataLoaders, PILImage, Resize, accuracy
from sklearn.datasets import load_digits

from fastai_smooth.examples import *

DIGITS = load_digits()

def rows(dl): return [torch.stack([torch.as_tensor(v) for v in o]) for o in zip(*dl.dataset)]

def test_folder_has_every_digit_in_the_subfolder_of_its_class(tmp_path):
    path = digits_folder(tmp_path/'some'/'digits')
    files = sorted(path.rglob('*.png'), key=lambda o: o.name)
    assert [int(o.parent.name) for o in files] == DIGITS.target.tolist() and path == tmp_path/'some'/'digits'
    for i in 0, 1000, 1796: assert np.abs(np.asarray(PILImage.create(files[i]))[..., 0] - DIGITS.images[i]*255/16).max() <= .5
    assert ImageDataLoaders.from_folder(path, valid_pct=.2, item_tfms=Resize(16), num_workers=0).vocab == [str(o) for o in range(10)]

def test_folder_keeps_what_is_there(tmp_path):
    kept = digits_folder(tmp_path)/'0'/'0000.png'
    kept.write_bytes(b'mine')
    (tmp_path/'1'/'0001.png').unlink()
    assert len([*digits_folder(tmp_path).rglob('*.png')]) == 1797 and kept.read_bytes() == b'mine'

def test_parts_share_no_image_and_have_all():
    parts = [rows(dl) for dl in digits_dls(1000, 300, seed=3).loaders]
    assert [len(y) for _, y in parts] == [1000, 300, 497]
    x, y = (torch.cat(o) for o in zip(*parts))
    drawn = sorted([*(16*x[i]).tolist(), int(y[i])] for i in range(1797))
    assert drawn == sorted([*o, int(c)] for o, c in zip(DIGITS.data.tolist(), DIGITS.target)) and len(digits_dls(1000).loaders) == 2

def test_noise_replaces_labels_but_those_of_tests():
    clean, noisy = digits_dls(1000, 400), digits_dls(1000, 400, noise=.3)
    changed = [(rows(a)[1] != rows(b)[1]).float().mean().item() for a, b in zip(clean.loaders, noisy.loaders)]
    assert changed[:2] == pytest.approx([.27, .27], abs=.06) and changed[2] == 0

@pytest.mark.parametrize('args, named', [((0,), 'n_train'), ((1797,), 'n_train'), ((1000, 798), 'n_valid'), ((1000, 0), 'n_valid'), ((9.5,), 'n_train')])
def test_sizes_that_do_not_fit_are_named(args, named):
    with pytest.raises((TypeError, ValueError), match=f'{named}.*{args[-1]}'): digits_dls(*args)

def test_noise_is_a_share():
    with pytest.raises(ValueError, match='noise.*1.5'): digits_dls(noise=1.5)

def test_attributes():
    assert digit_attributes(torch.arange(10)).T.tolist() == [[1, 0, 1, 0, 1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1, 0, 1, 1]]
    assert torch.equal(rows(digits_dls(attributes=True)[1])[1], digit_attributes(rows(digits_dls()[1])[1]))

@pytest.mark.parametrize('attributes', [False, True])
def test_learner_learns_and_is_the_same_each_time(attributes):
    a, b = (trained(digits_learner(digits_dls(attributes=attributes), label_smoothing=.1), 2) for _ in range(2))
    assert a.recorder.values == b.recorder.values and a.recorder.values[-1][1] < a.recorder.values[0][1]

def test_trained_prints_nothing(capsys):
    learn = digits_learner(metrics=accuracy)
    assert trained(learn, 1) is learn and not capsys.readouterr().out and learn.logger is print
