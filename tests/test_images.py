"""Images however people made them: opened as people see them, each file once, in the class or part of the data it belongs to; or refused in one
line that names the file or folder. Then their split, their noise, and batches."""
import os, struct, zlib
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np, pytest, torch
from fastai.losses import BCEWithLogitsLossFlat
from fastai.vision.core import PILImage
from hypothesis import given, settings, strategies as st
from PIL import Image

from fastai_smooth.cli import BadInput
from fastai_smooth.images import *

links = pytest.mark.skipif(os.name == 'nt', reason='needs links')
DIGITS = digits()

def save(f, colour=(200, 100, 50), size=(6, 4), **kwargs):
    "An image of one colour"
    f.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, tuple(colour)).save(f, **kwargs)

def folders(path, *names, n=2):
    "`n` images in each of the folders `names`"
    for i, name in enumerate(names):
        for j in range(n): save(path/name/f'{j}.png', (20*i, 20*j, 0))
    return path

def save_16(f, low, high):
    f.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.linspace(low, high, 24).reshape(4, 6).astype(np.uint16)).save(f)

def labels(path):
    "What `image_folder` finds: (file, class, is it for validation?) of each image"
    data = image_folder(path)
    valid = [None]*len(data.images) if data.is_valid is None else data.is_valid.tolist()
    return [(f.relative_to(path).as_posix(), data.vocab[c], v) for f, c, v in zip(data.images, data.classes, valid)]

def counts(path):
    "How many images there are of each class, and how many for validation"
    found = labels(path)
    return dict(Counter(c for _, c, _ in found)), sum(v is True for *_, v in found)

def refused(path, *words, load=image_folder):
    with pytest.raises(BadInput) as e: load(path)
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value

def pixel(f, at=(0, 0)): return open_image(f).getpixel(at)

# --- opening an image

@pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
def test_16_bits_are_scaled(tmp_path, suffix):
    "/257, so that 65535 is white, in training as in the check; Pillow's own conversion makes 6000 and 40000 the same white"
    for v, expected in ((0, 0), (6000, 23), (40000, 156), (65535, 255)):
        for o in 'a', 'b': save_16(tmp_path/f'{v}'/o/f'0.{suffix}', v, v)
        assert pixel(tmp_path/f'{v}'/'a'/f'0.{suffix}') == (expected,)*3
        x, _ = get_dls(ImageSet([tmp_path/f'{v}'/o/f'0.{suffix}' for o in 'ab'], np.array([0, 1]), ['a', 'b'], np.array([True, False])), 0, size=4, bs=1).train.one_batch()
        assert ((x*255).round() == expected).all()

@pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
def test_12_bits_in_16_are_told(tmp_path, capsys, suffix):
    "Values of 300 to 2300 become 1 to 9 of 255: one line, with the first such file; bright ones, and dark ones of 8 bits, are no news"
    for i in range(3): save_16(tmp_path/'a'/f'{i}.{suffix}', 0, 40000)
    image_folder(folders(tmp_path, 'black'))
    assert 'black:' not in capsys.readouterr().out
    for i in range(1, 3): save_16(tmp_path/'b'/f'{i}.{suffix}', 300, 2300)
    image_folder(tmp_path)
    line, = (o for o in capsys.readouterr().out.splitlines() if 'black:' in o)
    assert '2 of 7 images' in line and f"{tmp_path/'b'/f'1.{suffix}'} the first" in line and '16 bits first' in line
    assert open_image(tmp_path/'b'/f'1.{suffix}').getextrema() == ((1, 9),)*3

def test_12_bits_in_16_are_told_of_colours_too(tmp_path, capsys):
    def chunk(name, data): return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    folders(tmp_path, 'a', 'b')
    rows = (b'\0' + np.full((6, 3), 2300, '>u2').tobytes())*4
    (tmp_path/'a'/'x.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>2I5B', 6, 4, 16, 2, 0, 0, 0))
                                       + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
    image_folder(tmp_path)
    assert f"1 of 5 images use less than an eighth of their 16 bits, {tmp_path/'a'/'x.png'} the first" in capsys.readouterr().out

def test_big_endian_and_12_bits(tmp_path):
    "A PGM says which value is white"
    (tmp_path/'a.pgm').write_bytes(b'P5 2 2 4095\n' + np.full((2, 2), 4095, '>u2').tobytes())
    Image.fromarray(np.full((2, 2), 40000, '>u2')).save(tmp_path/'b.tif')
    assert pixel(tmp_path/'a.pgm') == (255,)*3 and pixel(tmp_path/'b.tif') == (156,)*3

@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_32_bits_are_refused(tmp_path, dtype):
    "Nothing says which value is white: 0..1, 0..255, degrees?"
    Image.fromarray(np.full((4, 6), 40, dtype)).save(folders(tmp_path, 'a', 'b')/'b'/'x.tif')
    refused(tmp_path, 'x.tif', '32 bits', '8 or 16 bits')

@pytest.mark.parametrize('mode, colour, expected', [
    ('RGBA', (10, 20, 30, 255), (10, 20, 30)), ('RGBA', (0, 0, 0, 0), (255,)*3), ('RGBA', (100, 0, 0, 51), (224, 204, 204)),
    ('LA', (40, 255), (40,)*3), ('LA', (0, 0), (255,)*3), ('L', 40, (40,)*3), ('1', 1, (255,)*3), ('1', 0, (0,)*3)])
def test_what_is_transparent_is_on_white(tmp_path, mode, colour, expected):
    "A drawing whose shape is in alpha alone would be black on black"
    Image.new(mode, (6, 4), colour).save(tmp_path/'x.png')
    assert pixel(tmp_path/'x.png') == expected

def test_palettes_cmyk_and_frames(tmp_path):
    im = Image.new('P', (6, 4), 1)
    im.putpalette([0, 0, 0, 10, 20, 30])
    for name, transparent, expected in (('a.png', None, (10, 20, 30)), ('b.png', 0, (10, 20, 30)), ('c.png', 1, (255,)*3), ('c.gif', 1, (255,)*3)):
        im.save(tmp_path/name, **({} if transparent is None else dict(transparency=transparent)))
        assert pixel(tmp_path/name) == expected
    Image.new('CMYK', (8, 8), (0, 255, 255, 0)).save(tmp_path/'x.jpg', quality=100)
    assert np.allclose(pixel(tmp_path/'x.jpg', (4, 4)), (255, 0, 0), atol=15)
    red, blue = (Image.new('RGB', (6, 4), c) for c in ('red', 'blue'))
    for o in 'x.gif', 'x.png', 'x.tif':
        red.save(tmp_path/o, save_all=True, append_images=[blue])
        assert pixel(tmp_path/o) == (255, 0, 0)

@pytest.mark.parametrize('orientation, size, corner', [(1, (16, 8), (0, 0)), (3, (16, 8), (15, 7)), (6, (8, 16), (7, 0)), (8, (8, 16), (0, 15))])
def test_photos_stand_as_people_see_them(tmp_path, orientation, size, corner):
    "The pixels have their bright corner at the left top; EXIF says how to turn them. fastai's `PILImage.create` does not"
    pixels, exif = np.zeros((8, 16, 3), np.uint8), Image.Exif()
    pixels[:4, :4], exif[0x0112] = 255, orientation
    Image.fromarray(pixels).save(tmp_path/'x.png', exif=exif)
    im = open_image(tmp_path/'x.png')
    assert im.size == size and im.getpixel(corner) == (255,)*3 and np.asarray(im).mean() == pytest.approx(255/8)

def test_files_and_arrays_are_opened_alike(tmp_path, recwarn):
    "Odd metadata are no reason not to train; a draft is smaller, and a truncated one fails"
    save(tmp_path/'x.jpg', size=(640, 480), exif=b'Exif\0\0II*\0\xff\xff\xff\xff')
    for o in (tmp_path/'x.jpg', str(tmp_path/'x.jpg'), np.zeros((4, 6, 3), np.uint8)): assert type(open_image(o)) is PILImage
    assert open_image(tmp_path/'x.jpg', draft=(32, 32)).size == (80, 60) and not len(recwarn)
    (tmp_path/'y.jpg').write_bytes((tmp_path/'x.jpg').read_bytes()[:-60])
    with pytest.raises(OSError): open_image(tmp_path/'y.jpg', draft=(32, 32))

# --- folders

def test_a_folder_of_classes(tmp_path):
    save(folders(tmp_path, 'dog', 'cat', '.thumbs', 'dog/.cache')/'dog'/'deeper'/'x.png')
    (tmp_path/'cat'/'notes.txt').write_text('no image')
    assert labels(tmp_path) == [(f, f[:3], None) for f in ('cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png', 'dog/deeper/x.png')]

@pytest.mark.parametrize('train, valid', [('train', 'valid'), ('Train', 'Valid'), ('Training', 'Testing'), ('TRAIN', 'TEST'), ('training', 'validation'),
                                          ('train', 'val'), ('training_set', 'test_set'), ('seg_train', 'seg_test'), ('train-images', 'val-images')])
def test_parts_in_every_spelling(tmp_path, train, valid):
    folders(tmp_path, f'{train}/cat', f'{train}/dog', f'{valid}/cat', f'{valid}/dog')
    assert counts(tmp_path) == (dict(cat=4, dog=4), 4) and all((f.split('/')[0] == valid) == v for f, _, v in labels(tmp_path))

def test_test_is_left_out_where_there_is_valid(tmp_path, capsys):
    folders(tmp_path, *(f'{o}/{c}' for o in ('Train', 'val', 'Test', 'more') for c in ('cat', 'dog')))
    assert counts(tmp_path) == (dict(cat=4, dog=4), 4)
    assert 'Training on' in (out := capsys.readouterr().out) and 'left out: Test, more\n' in out

PARTS, ALIKE = 'one train and one valid', 'same names'
@pytest.mark.parametrize('names, words', [
    ('train/cat train/dog', f'train:|{PARTS}'), ('train/cat train/dog holdout/cat', f'train|{PARTS}'), ('valid/cat valid/dog', f'valid|{PARTS}'),
    ('train/cat train/dog training/cat test/cat', f'train, training|{PARTS}'), ('train/cat val/cat valid/cat', f'val, valid|{PARTS}'), ('train test', f'train|{PARTS}'),
    ('Train valid', f'Train|{PARTS}'), ('cat dog test/cat', f'test|{PARTS}'), ('cat dog Test', f'Test|{PARTS}'), ('train/cat train/dog test', f'test|{PARTS}'),
    ('A/cat A/dog B/cat B/dog', f'A, B|{ALIKE}'), ('A/cat A/dog B/dog other', f'A, B|{ALIKE}'), ('cat/day cat/night dog/day', f'cat, dog|{ALIKE}'),
    ('a', 'one class only (a)'), ('train/a train/b valid/a valid/c', 'valid has images of c, train has none'), ('', 'no images in it')])
def test_folders_that_do_not_go_together_are_named(tmp_path, names, words): refused(folders(tmp_path, *names.split()), *words.split('|'))

@pytest.mark.parametrize('names', [('images', 'masks'), ('Images', 'Annotations'), ('JPEGImages', 'SegmentationClass'), ('img', 'labels')])
def test_images_and_masks_are_no_classes(tmp_path, names):
    "Nor are they in parts, nor where what belongs to the images is no image"
    folders(tmp_path/'a', *names)
    folders(tmp_path/'b', *(f'{part}/{o}' for part in ('train', 'val') for o in names))
    folders(tmp_path/'c', *(f'{part}/{names[0]}' for part in ('train', 'val')))
    for part in 'train', 'val': (tmp_path/'c'/part/names[1]).mkdir()
    for o in 'abc': refused(tmp_path/o, ', '.join(names), 'masks, not classes')

@pytest.mark.parametrize('names, classes', [('bus,car,train', 'bus,car,train'), ('blood test,x-ray', 'blood test,x-ray'), ('cat/siamese,dog/poodle,dog', 'cat,dog'),
                                            ('images,drawings', 'drawings,images')])
def test_classes_that_look_like_parts(tmp_path, names, classes):
    "The vehicle, breeds of cats and dogs, kinds of pictures"
    assert image_folder(folders(tmp_path, *names.split(','))).vocab == classes.split(',')

def test_classes_without_images_are_named(tmp_path, capsys):
    for o in 'bird', 'test', 'train': (folders(tmp_path/'a', 'cat', 'dog')/o).mkdir()
    assert image_folder(tmp_path/'a').vocab == ['cat', 'dog'] and 'No images in bird, test, train\n' in capsys.readouterr().out
    (folders(tmp_path/'b', 'train/cat', 'train/dog', 'valid/cat')/'valid'/'dog').mkdir()
    assert image_folder(tmp_path/'b').vocab == ['cat', 'dog'] and f"No images in {Path('valid', 'dog')}\n" in capsys.readouterr().out
    (folders(tmp_path/'c', 'cat')/'bird').mkdir()
    refused(tmp_path/'c', 'one class only (cat)', 'No images in bird')
    for o, part in (('d', 'train'), ('e', 'valid')):
        other = {'train': 'valid', 'valid': 'train'}[part]
        (folders(tmp_path/o, f'{other}/a', f'{other}/b')/part/'a').mkdir(parents=True)
        refused(tmp_path/o, 'no images in', part)

def test_a_folder_around_the_classes_is_told(tmp_path):
    "As unzipping makes it; one of parts, too; nothing is told of a folder that has images and no classes"
    for i, (names, inside) in enumerate([('photos/cat photos/dog', 'cat, dog'), ('photos/train/cat photos/train/dog photos/valid/cat photos/valid/dog', 'train, valid')]):
        folders(tmp_path/f'{i}', *names.split())
        refused(tmp_path/f'{i}', f"(photos); two are needed. photos holds {inside}: give {tmp_path/f'{i}'/'photos'}")
        assert image_folder(tmp_path/f'{i}'/'photos').vocab == ['cat', 'dog']
    refused(folders(tmp_path/'deep', 'photos/photos/cat', 'photos/photos/dog'), f"photos holds cat, dog: give {tmp_path/'deep'/'photos'/'photos'}")
    for names in ('photos',), ('cat', 'cat/siamese'):
        with pytest.raises(BadInput, match='two are needed$'): image_folder(folders(tmp_path/names[0], *names))

def write(f, content):
    f.write_bytes(content)
    return f

@pytest.mark.parametrize('add', [lambda p: write(p/'stray.png', (p/'a'/'0.png').read_bytes()), lambda p: write(p/'b'/'1.png', (p/'b'/'0.png').read_bytes()[:-40]),
                                 lambda p: write(p/'a'/'3.jpg', b'no image at all')], ids=['in no class', 'truncated', 'no image'])
def test_files_that_cannot_be_used_are_named(tmp_path, add): refused(tmp_path, str(add(folders(tmp_path, 'a', 'b'))))

def test_what_is_no_folder_of_classes_is_named(tmp_path):
    refused(tmp_path/'nowhere', 'nowhere', 'no such folder')
    refused(write(tmp_path/'file', b'hm'), 'file', 'no such folder')
    save(folders(tmp_path/'lone', 'a')/'b'/'1.png')
    refused(tmp_path/'lone', 'one image only of b')
    save(folders(tmp_path/'part', 'train/a', 'train/b', 'valid/a', 'valid/b')/'train'/'stray.png')
    refused(tmp_path/'part', str(Path('train', 'stray.png')), 'in no class')

def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def denied(folder): raise PermissionError(13, 'Permission denied', str(folder))
    listed = Path.iterdir
    monkeypatch.setattr(Path, 'iterdir', lambda self: denied(self) if self.name == 'b' else listed(self))
    refused(folders(tmp_path, 'a', 'b'), str(tmp_path/'b'), 'Permission denied')

# --- links

@links
def test_a_link_that_leads_back_is_not_followed(tmp_path):
    folders(tmp_path, 'photos/cat', 'photos/dog', 'beside', n=20)
    for name, to in (('cat/loop', '..'), ('dog/up', '../..'), ('dog/self', '.')): (tmp_path/'photos'/name).symlink_to(to)
    assert counts(tmp_path/'photos') == (dict(cat=20, dog=20), 0)

@links
def test_each_real_file_counts_once_where_it_is(tmp_path):
    folders(tmp_path, 'cat', 'dog', n=3)
    for name, to in (('cat/all dogs', '../dog'), ('cat/a dog.png', '../dog/0.png'), ('dog/a cat.png', '../cat/0.png'), ('kitten', 'cat')): (tmp_path/name).symlink_to(to)
    assert labels(tmp_path) == [(f'{c}/{i}.png', c, None) for c in ('cat', 'dog') for i in range(3)]

@links
def test_links_to_images_elsewhere_are_followed(tmp_path):
    (folders(tmp_path/'there', 'cats', 'dogs', n=3).parent/'here'/'dog').mkdir(parents=True)
    (tmp_path/'here'/'cat').symlink_to(tmp_path/'there'/'cats')
    for i in range(3): (tmp_path/'here'/'dog'/f'{i}.png').symlink_to(tmp_path/'there'/'dogs'/f'{i}.png')
    (tmp_path/'alias').symlink_to('here')
    assert counts(tmp_path/'here') == counts(tmp_path/'alias') == (dict(cat=3, dog=3), 0)

@links
def test_links_that_make_no_sense_are_named(tmp_path):
    "Validation images that are training images, one file in two classes, links to nothing and to themselves, a pipe that would be waited for"
    (folders(tmp_path/'0', 'train/cat', 'train/dog')/'valid').symlink_to('train')
    refused(tmp_path/'0', 'no images in', 'valid')
    for o in 'cat', 'dog': (folders(tmp_path/'1', 'cat', 'dog')/o/'x.png').symlink_to(tmp_path/'0'/'train'/'cat'/'0.png')
    refused(tmp_path/'1', str(Path('cat', 'x.png')), str(Path('dog', 'x.png')), 'one file')
    for i, to in ((2, 'nowhere.png'), (3, 'x.png')):
        (folders(tmp_path/f'{i}', 'a', 'b')/'b'/'x.png').symlink_to(to)
        refused(tmp_path/f'{i}', str(Path('b', 'x.png')), 'link')
    os.mkfifo(folders(tmp_path/'4', 'a', 'b')/'b'/'x.png')
    refused(tmp_path/'4', str(Path('b', 'x.png')))

# --- digits and FashionMNIST

def test_digits_are_the_real_ones():
    assert (len(DIGITS.images), DIGITS.images[0].shape, DIGITS.vocab, max(o.max() for o in DIGITS.images)) == (1797, (8, 8, 3), list('0123456789'), 255)
    assert np.bincount(DIGITS.classes).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

def test_fashion(tmp_path, monkeypatch):
    "In MNIST's format: two zeros, type, number of dimensions, the dimensions, the bytes. It keeps its own split"
    raw = tmp_path/'FashionMNIST'/'raw'
    raw.mkdir(parents=True)
    for part, n in (('train', 40), ('t10k', 12)):
        for kind, array in (('images-idx3', np.full((n, 28, 28), n)), ('labels-idx1', np.arange(n) % 10)):
            write(raw/f'{part}-{kind}-ubyte', struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes())
    data = fashion(tmp_path)
    assert data.is_valid.tolist() == [False]*40 + [True]*12 and data.images[0].shape == (28, 28, 3) and data.vocab[9] == 'Ankle boot'
    assert data.classes.tolist() == [i % 10 for i in [*range(40), *range(12)]] and [o.max() for o in data.images] == [40]*40 + [12]*12
    write(raw/'t10k-images-idx3-ubyte', b'\0\0\x08\x03')
    refused(tmp_path, str(tmp_path), '--download', load=fashion)
    def offline(*args, **kwargs): raise URLError('no route\nto host')
    monkeypatch.setattr('torchvision.datasets.mnist.download_and_extract_archive', offline)
    with pytest.raises(BadInput, match='download failed'): fashion(tmp_path/'new', download=True)

# --- split, noise, batches

@given(st.lists(st.integers(2, 60), min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_split_takes_a_fifth_of_every_class(sizes, seed):
    classes = np.repeat(np.arange(len(sizes)), sizes)
    valid = split_valid(classes, seed)
    for c, n in enumerate(sizes): assert valid[classes == c].sum() == max(1, round(n/5)) < n
    assert (valid == split_valid(classes, seed)).all() and (split_valid(DIGITS.classes, seed) != split_valid(DIGITS.classes, seed+1)).any()

def test_noise_is_symmetric_and_seeded():
    "40,000 labels: a count's standard deviation is below 100, so 500 is far out"
    classes = np.repeat(np.arange(4), 10000)
    noisy = flip_labels(classes, .3, n_classes=4, seed=0)
    for c in range(4): assert np.allclose(np.bincount(noisy[classes == c], minlength=4), [7000 if o == c else 1000 for o in range(4)], atol=400)
    assert (noisy == flip_labels(classes, .3, 4, seed=0)).all() and (noisy != flip_labels(classes, .3, 4, seed=1)).any()
    assert (flip_labels(classes, 0., 4, seed=0) == classes).all()

label_rows = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=25).map(np.array)

@given(label_rows, st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_split_has_each_label_in_both_parts_where_it_can(classes, seed):
    "In training always; a label that is in no validation image could not get one without another label losing its last training image"
    valid = split_valid(classes, seed)
    train = [*classes[~valid]]
    for k in np.flatnonzero(classes.any(0)):
        assert classes[~valid, k].any()
        for row in classes[classes[:, k]] if not classes[valid, k].any() else []: assert any(sum(o[j] for o in train) == 1 for j in np.flatnonzero(row))
    assert (valid == split_valid(classes.astype(np.uint8), seed)).all()

def test_a_split_takes_a_fifth_of_the_images_by_their_rarest_label():
    "Rows of label 0 alone, with the rarer 1, with the still rarer 2 as well, with 3 that one image has, and without any"
    sizes = [([1, 0, 0, 0], 100), ([1, 1, 0, 0], 40), ([1, 1, 1, 0], 10), ([1, 1, 0, 1], 1), ([0, 0, 0, 0], 25)]
    classes = np.concatenate([np.tile(np.uint8(row), (n, 1)) for row, n in sizes])
    splits = [split_valid(classes, seed) for seed in (0, 0, 1)]
    for valid in splits: assert [o.sum() for o in np.split(valid, np.cumsum([n for _, n in sizes])[:-1])] == [20, 8, 2, 0, 5]
    assert (splits[0] == splits[1]).all() and (splits[0] != splits[2]).any()

def test_no_label_loses_its_training_images():
    "The third label is in two groups of two; whichever goes to validation, one stays. So does a lone image without labels"
    classes = np.uint8([[1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    for seed in range(30):
        valid = split_valid(classes, seed)
        assert classes[~valid].any(0).all() and classes[valid].any(0).sum() >= 1 and not valid[4]

@pytest.mark.parametrize('dtype', [np.uint8, bool, np.int64])
def test_noise_flips_each_of_several_labels(dtype):
    "Of 40,000: a share's standard deviation is below .0025; labels of a row are flipped independently"
    classes = (np.arange(40000)[:, None] % [2, 3, 5] == 0).astype(dtype)
    noisy = flip_labels(classes, .3, n_classes=3, seed=0)
    flipped = noisy != classes
    assert noisy.dtype == dtype and set(np.unique(noisy)) == {0, 1}
    assert np.allclose(flipped.mean(0), .3, atol=.01) and np.allclose(np.corrcoef(flipped.T), np.eye(3), atol=.02)
    for k in range(3): assert np.allclose([flipped[classes[:, k] == o, k].mean() for o in (0, 1)], .3, atol=.02)
    assert (noisy == flip_labels(classes, .3, 3, seed=0)).all() and (noisy != flip_labels(classes, .3, 3, seed=1)).any() and (flip_labels(classes, 0., 3, 0) == classes).all()

@pytest.mark.parametrize('dtype', [np.uint8, bool])
def test_batches_of_several_labels(dtype):
    "As fastai's MultiCategoryBlock gives them; noise is for training alone"
    data = ImageSet(DIGITS.images[:300], (DIGITS.classes[:300, None] % [2, 3, 4] == 0).astype(dtype), ['two', 'three', 'four'])
    assert data.multi and not DIGITS.multi
    valid = data.validation(1)
    dls, clean = (get_dls(data, seed=1, size=8, bs=60, noise=o) for o in (.3, 0.))
    def targets(dl): return torch.stack([dl.dataset[i][1] for i in range(len(dl.dataset))]).numpy()
    assert (targets(clean.train) == data.classes[~valid]).all() and (targets(dls.valid) == data.classes[valid]).all()
    assert abs((targets(dls.train) != data.classes[~valid]).mean() - .3) < .06
    x, y = dls.valid.one_batch()
    assert x.shape == (len(y), 3, 8, 8) and y.dtype == torch.float32 and list(dls.vocab) == data.vocab and dls.c == 3 and type(dls.loss_func) is BCEWithLogitsLossFlat
    assert dls.valid_ds.decode(dls.valid_ds[0])[1] == [v for v, o in zip(data.vocab, data.classes[valid][0]) if o]

@pytest.mark.parametrize('is_valid', [None, np.arange(1797) >= 1500])
def test_noise_is_for_training_labels_only(is_valid):
    data = ImageSet(DIGITS.images, DIGITS.classes, DIGITS.vocab, is_valid)
    expected = split_valid(DIGITS.classes, 3) if is_valid is None else is_valid
    (train, valid), (clean, _) = ([[int(o[1]) for o in dl.items] for dl in get_dls(data, seed=3, noise=o)] for o in (.4, 0.))
    assert valid == DIGITS.classes[expected].tolist() and clean == DIGITS.classes[~expected].tolist() # images stay at their side, in their order
    assert abs(np.mean(np.array(train) != clean) - .4) < .06

def test_batches_have_the_size_asked_for_and_the_right_images(tmp_path):
    dls = get_dls(image_folder(folders(tmp_path, 'a', 'b', n=10)), seed=0, size=20, bs=4)
    assert dls.one_batch()[0].shape == (4, 3, 20, 20) and dls.vocab == ['a', 'b'] and dls.train.fake_l.num_workers == 0
    assert dls.vocab[dls.valid_ds[0][1]] in dls.valid.items[0][0].parts
    img, c = get_dls(DIGITS, seed=0, size=8).valid_ds[0]
    first = np.flatnonzero(split_valid(DIGITS.classes, 0))[0]
    assert (np.array(img) == DIGITS.images[first]).all() and int(c) == DIGITS.classes[first]
