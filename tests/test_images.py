"""A folder of images, however people made it: opened as people see it, each file once, in the class or part of the data it belongs to; or
refused in one line that names the file or folder."""
import os
from pathlib import Path

import numpy as np, pytest
from fastai.vision.core import PILImage
from PIL import Image

from fastai_smooth.images import *

links = pytest.mark.skipif(os.name == 'nt', reason='needs links')


def save(f, colour=(200, 100, 50), size=(6, 4), **kwargs):
    "An image of one colour"
    f.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, tuple(colour)).save(f, **kwargs)

def folders(path, *names, n=2):
    "`n` images in each of the folders `names`"
    for i, name in enumerate(names):
        for j in range(n): save(path/name/f'{j}.png', (20*i, 20*j, 0))
    return path

def labels(path):
    "What `image_folder` finds: (file, class, is it for validation?) of each image"
    data = image_folder(path)
    valid = [None]*len(data.images) if data.is_valid is None else data.is_valid.tolist()
    return [(f.relative_to(path).as_posix(), data.vocab[c], v) for f, c, v in zip(data.images, data.classes, valid)]

def counts(path):
    "How many images there are of each class, and how many for validation"
    found = labels(path)
    return {c: sum(o[1] == c for o in found) for _, c, _ in found}, sum(o[2] is True for o in found)

def refused(path, *words):
    with pytest.raises(BadInput) as e: image_folder(path)
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value

def pixel(f, at=(0, 0)):
    "Of what training reads"
    return open_image(f).getpixel(at)

def trained_on(path, f):
    "The middle pixel of `f` in a training batch of the folder `path`, from 0 to 255"
    data = image_folder(path)
    data.is_valid = np.array([o != f for o in data.images])
    x, _ = get_dls(data, 0, size=4, bs=1).train.one_batch()
    return (x[0, :, 2, 2]*255).round().int().tolist()


# ---------------------------------------------------------------- opening an image

@pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
def test_16_bits_are_scaled(tmp_path, suffix):
    "/257, so that 65535 is white; Pillow's own conversion makes 6000 and 40000 the same white"
    for v, expected in ((0, 0), (6000, 23), (40000, 156), (65535, 255)):
        f = tmp_path/f'{v}.{suffix}'
        Image.fromarray(np.full((4, 6), v, np.uint16)).save(f)
        assert pixel(f) == (expected,)*3

def test_16_bits_train_as_they_were_checked(tmp_path):
    for name, v in (('dark', 6000), ('light', 40000)):
        (tmp_path/'photos'/name).mkdir(parents=True)
        for i in range(2): Image.fromarray(np.full((4, 6), v, np.uint16)).save(tmp_path/'photos'/name/f'{i}.png')
    assert trained_on(tmp_path/'photos', tmp_path/'photos'/'dark'/'0.png') == [23]*3
    assert trained_on(tmp_path/'photos', tmp_path/'photos'/'light'/'1.png') == [156]*3

@pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
def test_12_bits_in_16_are_told(tmp_path, capsys, suffix):
    "Values of 300 to 2300 become 1 to 9 of 255: one line, with the first such file; bright ones, and dark ones of 8 bits, are no news"
    def save_16(name, i, low, high):
        (tmp_path/name).mkdir(exist_ok=True)
        Image.fromarray(np.linspace(low, high, 24).reshape(4, 6).astype(np.uint16)).save(tmp_path/name/f'{i}.{suffix}')
    for i in range(3): save_16('a', i, 0, 40000)
    folders(tmp_path, 'black')
    image_folder(tmp_path)
    assert 'black:' not in capsys.readouterr().out
    for i in range(1, 3): save_16('b', i, 300, 2300)
    image_folder(tmp_path)
    lines = [o for o in capsys.readouterr().out.splitlines() if 'black:' in o]
    assert len(lines) == 1 and '2 of 7 images' in lines[0] and f"{tmp_path/'b'/f'1.{suffix}'} the first" in lines[0] and '16 bits first' in lines[0]
    assert open_image(tmp_path/'b'/f'1.{suffix}').getextrema() == ((1, 9),)*3

def test_12_bits_in_16_are_told_of_colours_too(tmp_path, capsys):
    import struct, zlib
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
    assert pixel(tmp_path/'a.pgm') == (255,)*3
    Image.fromarray(np.full((2, 2), 40000, '>u2')).save(tmp_path/'b.tif')
    assert pixel(tmp_path/'b.tif') == (156,)*3

@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_32_bits_are_refused(tmp_path, dtype):
    "Nothing says which value is white: 0..1, 0..255, degrees?"
    folders(tmp_path, 'a', 'b')
    Image.fromarray(np.full((4, 6), 40, dtype)).save(tmp_path/'b'/'x.tif')
    refused(tmp_path, 'x.tif', '32 bits', '8 or 16 bits')

def test_palette_with_and_without_transparency(tmp_path):
    im = Image.new('P', (6, 4), 1)
    im.putpalette([0, 0, 0, 10, 20, 30])
    im.save(tmp_path/'plain.png')
    im.save(tmp_path/'seen.png', transparency=0)
    im.save(tmp_path/'unseen.png', transparency=1)
    im.save(tmp_path/'unseen.gif', transparency=1)
    assert pixel(tmp_path/'plain.png') == pixel(tmp_path/'seen.png') == (10, 20, 30)
    assert pixel(tmp_path/'unseen.png') == pixel(tmp_path/'unseen.gif') == (255,)*3

@pytest.mark.parametrize('mode,colour,expected', [
    ('RGBA', (10, 20, 30, 255), (10, 20, 30)), ('RGBA', (0, 0, 0, 0), (255,)*3), ('RGBA', (100, 0, 0, 51), (224, 204, 204)),
    ('LA', (40, 255), (40,)*3), ('LA', (0, 0), (255,)*3), ('L', 40, (40,)*3), ('1', 1, (255,)*3), ('1', 0, (0,)*3)])
def test_what_is_transparent_is_on_white(tmp_path, mode, colour, expected):
    "A drawing whose shape is in alpha alone would be black on black"
    Image.new(mode, (6, 4), colour).save(tmp_path/'x.png')
    assert pixel(tmp_path/'x.png') == expected

def test_cmyk(tmp_path):
    Image.new('CMYK', (8, 8), (0, 255, 255, 0)).save(tmp_path/'x.jpg', quality=100)
    r, g, b = pixel(tmp_path/'x.jpg', (4, 4))
    assert r > 240 and g < 15 and b < 15

@pytest.mark.parametrize('orientation,size,corner', [(1, (16, 8), 'left top'), (3, (16, 8), 'right bottom'), (6, (8, 16), 'right top'), (8, (8, 16), 'left bottom')])
def test_photos_stand_as_people_see_them(tmp_path, orientation, size, corner):
    "The pixels have their bright corner at the left top; EXIF says how to turn them. fastai's `PILImage.create` does not"
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:4, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path/'x.png', exif=exif)
    im = open_image(tmp_path/'x.png')
    x, y = (0 if o in ('left', 'top') else n-1 for o, n in zip(corner.split(), size))
    assert im.size == size and im.getpixel((x, y)) == (255,)*3 and np.asarray(im).mean() == pytest.approx(255/8)

def test_the_first_of_several_frames(tmp_path):
    frames = [Image.new('RGB', (6, 4), c) for c in ('red', 'blue')]
    for o in 'x.gif', 'x.png', 'x.tif': frames[0].save(tmp_path/o, save_all=True, append_images=frames[1:])
    assert {pixel(tmp_path/o) for o in ('x.gif', 'x.png', 'x.tif')} == {(255, 0, 0)}

def test_odd_metadata_are_no_reason_not_to_train(tmp_path, recwarn):
    Image.new('RGB', (6, 4)).save(tmp_path/'x.jpg', exif=b'Exif\0\0II*\0\xff\xff\xff\xff')
    assert open_image(tmp_path/'x.jpg').size == (6, 4) and not len(recwarn)

def test_arrays_and_files_are_the_same_type(tmp_path):
    save(tmp_path/'x.png')
    for o in (tmp_path/'x.png', str(tmp_path/'x.png'), np.zeros((4, 6, 3), np.uint8)): assert type(open_image(o)) is PILImage

def test_a_draft_is_smaller_and_a_truncated_one_fails(tmp_path):
    save(tmp_path/'x.jpg', size=(640, 480))
    assert open_image(tmp_path/'x.jpg', draft=(32, 32)).size == (80, 60)
    (tmp_path/'y.jpg').write_bytes((tmp_path/'x.jpg').read_bytes()[:-60])
    with pytest.raises(OSError): open_image(tmp_path/'y.jpg', draft=(32, 32))


# ---------------------------------------------------------------- splits

@pytest.mark.parametrize('train,valid', [('train', 'valid'), ('Train', 'Valid'), ('Training', 'Testing'), ('TRAIN', 'TEST'), ('training', 'validation'),
                                         ('train', 'val'), ('training_set', 'test_set'), ('seg_train', 'seg_test'), ('train-images', 'val-images')])
def test_parts_in_every_spelling(tmp_path, train, valid):
    folders(tmp_path, f'{train}/cat', f'{train}/dog', f'{valid}/cat', f'{valid}/dog')
    assert counts(tmp_path) == (dict(cat=4, dog=4), 4)
    assert all((f.split('/')[0] == valid) == v for f, _, v in labels(tmp_path))

def test_test_is_left_out_where_there_is_valid(tmp_path, capsys):
    folders(tmp_path, *(f'{o}/{c}' for o in ('Train', 'val', 'Test', 'more') for c in ('cat', 'dog')))
    assert counts(tmp_path) == (dict(cat=4, dog=4), 4)
    assert 'Training on' in (out := capsys.readouterr().out) and 'left out: Test, more\n' in out

@pytest.mark.parametrize('names,words', [
    (('train/cat', 'train/dog'), 'train'), (('train/cat', 'train/dog', 'holdout/cat'), 'train'), (('valid/cat', 'valid/dog'), 'valid'),
    (('train/cat', 'train/dog', 'training/cat', 'test/cat'), 'train, training'), (('train/cat', 'val/cat', 'valid/cat'), 'val, valid'),
    (('train', 'test'), 'train'), (('Train', 'valid'), 'Train'), (('cat', 'dog', 'test/cat'), 'test'), (('cat', 'dog', 'Test'), 'Test'), (('train/cat', 'train/dog', 'test'), 'test')])
def test_parts_that_do_not_go_together_are_named(tmp_path, names, words): refused(folders(tmp_path, *names), words, 'one train and one valid')

def test_an_image_beside_the_classes_of_a_part_is_named(tmp_path):
    save(folders(tmp_path, 'train/cat', 'train/dog', 'valid/cat', 'valid/dog')/'train'/'stray.png')
    refused(tmp_path, str(Path('train', 'stray.png')), 'in no class')

@pytest.mark.parametrize('names,words', [
    (('A/cat', 'A/dog', 'B/cat', 'B/dog'), 'A, B'), (('A/cat', 'A/dog', 'B/dog', 'other'), 'A, B'), (('cat/day', 'cat/night', 'dog/day'), 'cat, dog')])
def test_subfolders_of_the_same_names_are_no_classes(tmp_path, names, words): refused(folders(tmp_path, *names), words, 'same names')

@pytest.mark.parametrize('names', [('images', 'masks'), ('Images', 'Annotations'), ('JPEGImages', 'SegmentationClass'), ('img', 'labels')])
def test_images_and_masks_are_no_classes(tmp_path, names):
    "Nor are they in parts, nor where what belongs to the images is no image"
    refused(folders(tmp_path/'a', *names), ', '.join(names), 'masks, not classes')
    refused(folders(tmp_path/'b', *(f'{part}/{o}' for part in ('train', 'val') for o in names)), ', '.join(names), 'masks, not classes')
    folders(tmp_path/'c', *(f'{part}/{names[0]}' for part in ('train', 'val')))
    for part in 'train', 'val': (tmp_path/'c'/part/names[1]).mkdir()
    refused(tmp_path/'c', ', '.join(names), 'masks, not classes')

@pytest.mark.parametrize('names,classes', [
    (('bus', 'car', 'train'), ['bus', 'car', 'train']), (('blood test', 'x-ray'), ['blood test', 'x-ray']), (('cat/siamese', 'dog/poodle', 'dog'), ['cat', 'dog']), (('images', 'drawings'), ['drawings', 'images'])])
def test_classes_that_look_like_parts(tmp_path, names, classes):
    "The vehicle, breeds of cats and dogs, kinds of pictures"
    assert image_folder(folders(tmp_path, *names)).vocab == classes

def test_classes_without_images_are_named(tmp_path, capsys):
    folders(tmp_path/'a', 'cat', 'dog')
    for o in 'bird', 'test', 'train': (tmp_path/'a'/o).mkdir()
    (tmp_path/'a'/'bird'/'1.npy').write_text('')
    assert image_folder(tmp_path/'a').vocab == ['cat', 'dog'] and 'No images in bird, test, train\n' in capsys.readouterr().out
    folders(tmp_path/'b', 'train/cat', 'train/dog', 'valid/cat')
    (tmp_path/'b'/'valid'/'dog').mkdir()
    assert image_folder(tmp_path/'b').vocab == ['cat', 'dog'] and f"No images in {Path('valid', 'dog')}\n" in capsys.readouterr().out
    (tmp_path/'c'/'bird').mkdir(parents=True)
    refused(folders(tmp_path/'c', 'cat'), 'one class only (cat)', 'No images in bird')

def test_a_folder_around_the_classes_is_told(tmp_path):
    "As unzipping makes it; one of parts, too; nothing is told of a folder that has images and no classes"
    for i,names in enumerate([('photos/cat', 'photos/dog'), ('photos/train/cat', 'photos/train/dog', 'photos/valid/cat', 'photos/valid/dog')]):
        folders(tmp_path/f'{i}', *names)
        refused(tmp_path/f'{i}', f"(photos); two are needed. photos holds {('cat, dog', 'train, valid')[i]}: give {tmp_path/f'{i}'/'photos'}")
        assert image_folder(tmp_path/f'{i}'/'photos').vocab == ['cat', 'dog']
    folders(tmp_path/'deep', 'photos/photos/cat', 'photos/photos/dog')
    refused(tmp_path/'deep', f"photos holds cat, dog: give {tmp_path/'deep'/'photos'/'photos'}")
    for names in ('photos',), ('cat', 'cat/siamese'):
        with pytest.raises(BadInput, match='two are needed$'): image_folder(folders(tmp_path/names[0], *names))

def test_hidden_folders_are_no_classes(tmp_path): assert image_folder(folders(tmp_path, 'cat', 'dog', '.thumbs', 'dog/.cache')).vocab == ['cat', 'dog']


# ---------------------------------------------------------------- links

@links
def test_a_link_that_leads_back_is_not_followed(tmp_path):
    folders(tmp_path, 'photos/cat', 'photos/dog', 'beside', n=20)
    (tmp_path/'photos'/'cat'/'loop').symlink_to('..')
    (tmp_path/'photos'/'dog'/'up').symlink_to('../..')
    (tmp_path/'photos'/'dog'/'self').symlink_to('.')
    assert counts(tmp_path/'photos') == (dict(cat=20, dog=20), 0)

@links
def test_each_real_file_counts_once_where_it_is(tmp_path):
    folders(tmp_path, 'cat', 'dog', n=3)
    (tmp_path/'cat'/'all dogs').symlink_to('../dog')
    (tmp_path/'cat'/'a dog.png').symlink_to('../dog/0.png')
    (tmp_path/'dog'/'a cat.png').symlink_to('../cat/0.png')
    (tmp_path/'kitten').symlink_to('cat')
    assert labels(tmp_path) == [(f'{c}/{i}.png', c, None) for c in ('cat', 'dog') for i in range(3)]

@links
def test_links_to_images_elsewhere_are_followed(tmp_path):
    folders(tmp_path/'there', 'cats', 'dogs', n=3)
    (tmp_path/'here'/'dog').mkdir(parents=True)
    (tmp_path/'here'/'cat').symlink_to(tmp_path/'there'/'cats')
    for i in range(3): (tmp_path/'here'/'dog'/f'{i}.png').symlink_to(tmp_path/'there'/'dogs'/f'{i}.png')
    assert counts(tmp_path/'here') == (dict(cat=3, dog=3), 0)
    (tmp_path/'alias').symlink_to('here')
    assert counts(tmp_path/'alias') == (dict(cat=3, dog=3), 0)

@links
def test_validation_images_that_are_training_images(tmp_path):
    folders(tmp_path, 'train/cat', 'train/dog')
    (tmp_path/'valid').symlink_to('train')
    refused(tmp_path, 'no images in', 'valid')

@links
def test_one_file_in_two_classes(tmp_path):
    save(tmp_path/'x.png')
    folders(tmp_path/'photos', 'cat', 'dog')
    for o in 'cat', 'dog': (tmp_path/'photos'/o/'x.png').symlink_to(tmp_path/'x.png')
    refused(tmp_path/'photos', str(Path('cat', 'x.png')), str(Path('dog', 'x.png')), 'one file')

@links
@pytest.mark.parametrize('to', ['nowhere.png', 'x.png'])
def test_links_to_nothing_are_named(tmp_path, to):
    (folders(tmp_path, 'a', 'b')/'b'/'x.png').symlink_to(to)
    refused(tmp_path, str(Path('b', 'x.png')), 'link')

@links
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(folders(tmp_path, 'a', 'b')/'b'/'x.png')
    refused(tmp_path, str(Path('b', 'x.png')))

def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folders(tmp_path, 'a', 'b')
    scandir = os.scandir
    def denied(folder):
        if Path(folder).name == 'b': raise PermissionError(13, 'Permission denied', str(folder))
        return scandir(folder)
    monkeypatch.setattr(os, 'scandir', denied)
    refused(tmp_path, str(tmp_path/'b'), 'Permission denied')
