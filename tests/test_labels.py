"""Labels from a CSV file, however people write one: read as text, one image each, split and checked before anything is trained; or refused in
one line that says what to mend. Then pairs of digits, and the options that go together."""
import csv, os, random
from pathlib import Path

import numpy as np, pandas as pd, pytest
from fastai.vision.data import ImageDataLoaders
from fastai.vision.augment import Resize
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from fastai_smooth.cli import BadInput
from fastai_smooth.images import *
from fastai_smooth.labels import *

def folder(path, names='a.jpg b.jpg c.png d.png'):
    "Tiny images, each of its own colour"
    for i, o in enumerate(names.split()):
        (path/o).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (6, 4), (20*i, 100, 0)).save(path/o)
    return path

def write(path, text, encoding='utf-8'):
    path.mkdir(parents=True, exist_ok=True)
    (path/'labels.csv').write_bytes(text if isinstance(text, bytes) else text.encode(encoding))

def of(data, path):
    "{file: its labels}, and {file: is it for validation?}"
    names = [Path(os.path.relpath(f, path)).as_posix() for f in data.images]
    labels = [[o for o, yes in zip(data.vocab, row) if yes] for row in data.classes] if data.multi else [data.vocab[o] for o in data.classes]
    return dict(zip(names, labels)), None if data.is_valid is None else dict(zip(names, data.is_valid.tolist()))

def refused(path, *words, labels='labels.csv', **kwargs):
    with pytest.raises(BadInput) as e: labelled_folder(path, labels, **kwargs)
    assert all(w in str(e.value) for w in words), e.value

ROWS = [('a.jpg', 'cat dog'), ('b.jpg', 'dog cat'), ('c.png', 'dog'), ('d.png', 'dog')]
FOUND = {'a.jpg': ['cat', 'dog'], 'b.jpg': ['cat', 'dog'], 'c.png': ['dog'], 'd.png': ['dog']}
PLAIN = 'file,labels\na.jpg,cat dog\nb.jpg,dog cat\nc.png,dog\nd.png,dog\n'

# --- files that say the same

@pytest.mark.parametrize('text, options', [
    (PLAIN, {}), (PLAIN.encode('utf-8-sig'), dict(fn_col='file')), (PLAIN[12:].encode('utf-8-sig'), {}), (PLAIN.replace('\n', '\r\n'), {}), (PLAIN.strip(), {}), ('\n \n' + PLAIN + '\n,\n', {}),
    (PLAIN.replace(',', ';'), {}), (PLAIN.replace(',', '\t'), {}), (PLAIN.replace(',', ' , '), {}), (PLAIN, dict(label_delim=' ')),
    (PLAIN.replace(',', ';').replace(' ', ','), {}), (PLAIN.replace(' ', ';'), {}), (PLAIN.replace(' ', '|'), {}), (PLAIN.replace(' ', '\t'), {}),
    (PLAIN.replace(' ', ' and '), dict(label_delim='and')), (PLAIN.replace(' ', '|').replace('dog|cat', ' | dog |cat||dog |'), {}),
    ('"file","labels"\n"a.jpg","cat,dog"\n"b.jpg", "dog, cat"\n"c.png","dog"\nd.png,dog\n', {}), ('"the\nfile",labels' + PLAIN[11:], {}),
    (PLAIN.replace('.jpg', '').replace('.png', ''), {}), (PLAIN.replace('a.jpg', './a.jpg').replace('b.', 'sub/../b.'), {}), (PLAIN.replace('c.png', '{path}/c.png'), {}),
    (PLAIN[12:], {}), (PLAIN[12:].replace('.jpg', ''), {}), (PLAIN.replace('cat dog', 'cat').replace('d.png', 'a.jpg,dog\nd.png'), {}),
    (PLAIN.replace('c.png', 'c.png,dog\nc'), {}), (PLAIN.replace('\n', ',more\n'), {}),
    (',file,labels\n' + '\n'.join(f'{i},{f},{o}' for i, (f, o) in enumerate(ROWS)), dict(fn_col='file')), (',file,labels\n' + '\n'.join(f'{i},{f},{o}' for i, (f, o) in enumerate(ROWS)), {}),
    ('\n'.join(f'{i},{o},{f}' for i, (f, o) in enumerate(ROWS)), dict(fn_col=2, label_col=1)),
    ('id,tags,1\n' + '\n'.join(f'{i},{o},{f}' for i, (f, o) in enumerate(ROWS)), dict(fn_col='1', label_col='tags')),
    ('a.jpg,labels\n' + '\n'.join(f'{f},{o}' for f, o in ROWS), dict(label_col='labels'))])
def test_one_content_in_many_spellings(tmp_path, capsys, text, options):
    (folder(tmp_path)/'sub').mkdir()
    write(tmp_path, text if isinstance(text, bytes) else text.replace('{path}', str(tmp_path)))
    data = labelled_folder(tmp_path, 'labels.csv', **options)
    assert of(data, tmp_path) == (FOUND, None) and data.classes.dtype == np.uint8 and data.validation(0).sum() == 2
    out = capsys.readouterr().out
    assert f'Checking 4 images with 2 labels in {tmp_path}: cat, dog\n' in out and 'which gives 2: cat, dog' in out or 'joined: 1 of 4' in out
    assert 'On all images, so nothing is to be learnt of it: dog\n' in out and f"{tmp_path/'labels.csv'}: files in column " in out

def test_labels_stay_text(tmp_path, capsys):
    "pandas would make numbers of some and nothing of others; only an empty cell is no label"
    words = ['007', 'NA', 'None', 'nan', '1e3', 'True', 'ключ', '#1']
    names = [f'{i}.png' for i in range(2*len(words) + 3)]
    write(folder(tmp_path, ' '.join(names)), 'f,l\n' + ''.join(f'{f},{o}\n' for f, o in zip(names, [f'{o} x' for o in words]*2 + ['x', '', ' '])) + '')
    found, _ = of(labelled_folder(tmp_path, 'labels.csv'), tmp_path)
    assert [found[f] for f in names] == [sorted([o, 'x']) for o in words]*2 + [['x'], [], []]
    assert 'Images without a label: 2\n' in capsys.readouterr().out
    write(tmp_path, 'f,l\n' + ''.join(f'{f},{o}\n' for f, o in zip(names, words*2 + ['007'])) + names[-1]) # a row that ends early
    assert list(of(labelled_folder(tmp_path, 'labels.csv'), tmp_path)[0].values())[-2:] == [['007'], []]
    assert 'Images without a label: 1 (with one label each, labels would be classes)\n' in capsys.readouterr().out

@pytest.mark.parametrize('no, yes', [('False', 'True'), ('0', '1'), ('0.0', '1.0'), ('train', 'valid'), ('Training', 'val'), ('FALSE', ' TRUE ')])
def test_the_split_of_a_column(tmp_path, capsys, no, yes):
    split = [no, yes, no, yes]
    for head, options in ('file,labels,is_valid', {}), ('file,labels,part', dict(valid_col='part')), ('file,labels,part', dict(valid_col=2)):
        write(folder(tmp_path), f'{head}\n' + ''.join(f'{f},{o},{v}\n' for (f, o), v in zip(ROWS, split)))
        assert of(labelled_folder(tmp_path, 'labels.csv', **options), tmp_path) == (FOUND, dict(zip(FOUND, [False, True, False, True])))
        assert f', the split in {head[12:]}\n' in capsys.readouterr().out
    write(tmp_path, 'file,is_valid,labels\n' + ''.join(f'{f},{v},{o}\n' for (f, o), v in zip(ROWS, split)))
    assert of(labelled_folder(tmp_path, 'labels.csv'), tmp_path)[0] == FOUND

def test_one_label_each_is_a_class(tmp_path, capsys):
    "As in a folder of classes: the same classes, split and checks"
    names = 'cat/0.png cat/1.png dog/0.png dog/1.png dog/2.png'
    write(folder(tmp_path, names), 'f,l\n' + ''.join(f'{o},{o[:3]}\n' for o in names.split()))
    data, expected = labelled_folder(tmp_path, 'labels.csv'), image_folder(tmp_path)
    assert not data.multi and data.classes.tolist() == expected.classes.tolist() and data.vocab == expected.vocab and data.images == expected.images
    out = capsys.readouterr().out
    assert 'Each image has one label, so labels are classes\n' in out and out.count('Checking 5 images of 2 classes') == 2 and 'split at' not in out
    write(tmp_path, 'f,l\n' + ''.join(f'{o},a {o[:3]}\n' for o in names.split()))
    assert labelled_folder(tmp_path, 'labels.csv', label_delim='').vocab == ['a cat', 'a dog'] and labelled_folder(tmp_path, 'labels.csv').vocab == ['a', 'cat', 'dog']
    for text, word in (('cat/0.png,x\ncat/1.png,x\n', 'one class only (x)'), ('cat/0.png,x\ncat/1.png,x\ndog/0.png,y\n', 'one image only of y')):
        write(tmp_path, 'f,l\n' + text)
        refused(tmp_path, word, '--labels')
    for parts, word in ((('1', '1', '1'), 'no images in training'), (('0', '0', '0'), 'no images in validation'), (('0', '0', '1'), 'validation has images of y, training has none')):
        write(tmp_path, 'f,l,is_valid\n' + ''.join(f'{f},{c},{v}\n' for f, c, v in zip(names.split(), 'xxy', parts)))
        refused(tmp_path, word)

def test_the_file_is_found_as_given_or_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(folder(Path('photos')), PLAIN)
    assert of(labelled_folder('photos', 'labels.csv'), 'photos')[0] == FOUND == of(labelled_folder('photos', tmp_path/'photos'/'labels.csv'), 'photos')[0]
    write(Path(), PLAIN.replace('cat', 'cow'))
    assert labelled_folder('photos', 'labels.csv').vocab == ['cow', 'dog'] and labelled_folder('photos', 'photos/labels.csv').vocab == ['cat', 'dog']

# --- what can't be used

@pytest.mark.parametrize('text, options, words', [
    (b'\xff\xfe' + PLAIN.encode('utf-16-le'), {}, 'UTF-8|UnicodeDecodeError'), (PLAIN.replace('cat', 'Vögel').encode('latin-1'), {}, 'UTF-8'), ('', {}, 'two columns'),
    ('file\na.jpg\n', {}, 'two columns'), ('file,labels\n', {}, 'one row only'), (PLAIN.replace(' ', ','), {}, "no table|quotes|','|line 2, saw 3"), (PLAIN + '"', {}, 'no table'),
    (PLAIN, dict(fn_col='name'), '--fn-col name|file, labels'), (PLAIN, dict(label_col='2'), '--label-col 2|file, labels'), (PLAIN, dict(valid_col=-1), '--valid-col -1'),
    (PLAIN[12:], dict(label_col='labels'), '--label-col labels|has 0, 1'), (PLAIN, dict(fn_col=1), 'no column of labels after labels|--label-col'), (PLAIN, dict(label_col=0), 'one column'),
    (PLAIN, dict(valid_col='labels', label_col='labels'), 'one column'), (PLAIN + ',dog\n', {}, 'no file in row 6'), (PLAIN.replace('\n', ',maybe\n'), dict(valid_col=2), "'maybe'|True|remove its row"),
    ('file,labels,is_valid\na.jpg,cat,True\nb.jpg,dog,\n', {}, "''|is_valid"), ('file,labels,is_valid\na.jpg,x,1\nb.jpg,y z,0\na,y,0\nc,x,0\nd,z,1\n', {}, 'a.jpg|training in one'),
    (PLAIN + 'e.jpg,dog\n', {}, '1 of 5|e.jpg'), (PLAIN.replace('a.jpg', 'sub\\\\a.jpg'), {}, 'missing'), (PLAIN.replace('a.jpg', 'x'*5000), {}, 'missing'), (PLAIN.replace('a.jpg', 'x\0'), {}, 'missing'),
    (PLAIN.replace('a.jpg', 'no/a.jpg'), {}, 'no/a.jpg'), ('file,labels\na,x\nb,x\nc,\nd,\n', {}, 'labels: x; two'), ('file,labels\na,\nb,\nc,\nd,\n', {}, 'labels: none; two'),
    ('file,labels\na,x y\nb,y x\nc,x y\nd,y x\n', {}, 'labels: x, y; two'), ('file,labels\na,x y\nb,z\n', {}, 'images for validation: 0; two'),
    ('file,labels\na,x y\nb,x y\nc,z\n', {}, 'images for validation: 1; two'), ('file,labels,is_valid\na,x y,1\nb,x,1\nc,y,1\nd,x y,0\n', {}, 'images for training: 1; two'),
    ('file,labels,is_valid\na,x y,1\nb,x,1\nc,x,0\nd,x z,0\n', {}, 'no training image has y')])
def test_files_that_cannot_be_used(tmp_path, text, options, words):
    write(folder(tmp_path), text)
    refused(tmp_path, *words.split('|'), **options)

def test_what_is_no_file_or_folder(tmp_path):
    for o in 'nowhere.csv', '', 'x'*5000, 'a\0b', str(tmp_path): refused(folder(tmp_path), '--labels', 'no such file', labels=o)
    for o in 'nowhere', 'x'*5000, 'a\0b', tmp_path/'a.jpg': refused(o, '--data', 'no such folder')

def test_every_missing_file_is_named(tmp_path, capsys):
    names = [f'{i:02}.jpg' for i in range(20)]
    write(folder(tmp_path), PLAIN + ''.join(f'{o},cat\n' for o in names))
    refused(tmp_path, '20 of 24 files are missing', '00.jpg, 01.jpg, 02.jpg, 03.jpg, 04.jpg, ...')
    assert [o[len('Missing: '):] for o in capsys.readouterr().out.splitlines() if 'Missing' in o] == [str(tmp_path/o) for o in names]

@pytest.mark.skipif(os.name == 'nt', reason='there \\ is what separates folders')
@pytest.mark.parametrize('suffix', ['.jpg', ''])
def test_what_to_do_about_missing_files(tmp_path, suffix):
    names = 'sub/a.jpg sub/b.jpg'
    write(folder(tmp_path, names), f'f,l\nsub\\a{suffix},x y\nsub\\b{suffix},x\n')
    refused(tmp_path, 'write / between folders, not \\')
    write(tmp_path, 'f,l\nsub/a,x y\nsub/c,x\n')
    refused(tmp_path, '1 of 2', 'add them, or remove their rows')
    write(tmp_path, 'f,l\nc,x y\nd,x\n')
    refused(tmp_path, '2 of 2', 'give the folder they are in as --data, or their column as --fn-col')

@pytest.mark.parametrize('no, yes', [('0', '1'), ('False', 'True'), ('0.0', '1.0')])
def test_a_column_a_label_is_not_read(tmp_path, capsys, no, yes):
    "Nor is one of the columns taken for all; a number of stars beside the label is no such thing"
    rows = [('a', yes, no), ('b', no, yes), ('c', yes, yes), ('d', no, no)]
    write(folder(tmp_path), 'file,cat,dog\n' + ''.join(f'{",".join(o)}\n' for o in rows))
    refused(tmp_path, 'columns of 0 and 1: cat, dog', 'one column', '--label-col cat')
    assert labelled_folder(tmp_path, 'labels.csv', label_col='cat').vocab == sorted([no, yes])
    write(tmp_path, 'file,dog,is_valid\n' + ''.join(f'{",".join(o)}\n' for o in [('a', yes, no), ('b', no, no), ('c', yes, yes), ('d', no, yes)]))
    assert labelled_folder(tmp_path, 'labels.csv').vocab == sorted([no, yes])
    write(tmp_path, 'file,dog,stars\n' + ''.join(f'{f},{o},{i}\n' for i, (f, o, _) in enumerate(rows)))
    assert labelled_folder(tmp_path, 'labels.csv').vocab == sorted([no, yes])
    write(tmp_path, 'file,tags,seen\n' + ''.join(f'{f},x{o},{o}\n' for f, o, _ in rows))
    assert labelled_folder(tmp_path, 'labels.csv').vocab == sorted([f'x{no}', f'x{yes}'])

@pytest.mark.parametrize('suffix', ['.jpg', ''])
def test_the_folder_with_the_images_is_told(tmp_path, monkeypatch, suffix):
    "As planet and PASCAL have it. What is given instead works"
    monkeypatch.chdir(tmp_path)
    write(Path('planet'), PLAIN.replace('.jpg', suffix).replace('.png', suffix))
    folder(Path('planet/train'), 'a.jpg b.jpg c.jpg d.jpg')
    data, labels = Path('planet', 'train'), Path('planet', 'labels.csv')
    refused('planet', f'4 of 4 files are missing in --data planet: a{suffix}', f'give --data {data} --labels {labels}')
    assert len(labelled_folder(data, labels).images) == 4

def test_files_that_are_not_clear_or_not_images(tmp_path):
    write(folder(tmp_path, 'a.jpg a.png b.jpg c.png d.png'), PLAIN.replace('a.jpg', 'a'))
    refused(tmp_path, 'a may be a.jpg or a.png', 'suffix')
    write(tmp_path, PLAIN)
    (tmp_path/'d.png').write_bytes((tmp_path/'d.png').read_bytes()[:40])
    refused(tmp_path, f"{tmp_path/'d.png'} can't be read")

@pytest.mark.skipif(os.name == 'nt', reason='needs links')
def test_a_file_of_two_names_is_one_image(tmp_path, capsys):
    (folder(tmp_path)/'link.jpg').symlink_to('a.jpg')
    write(tmp_path, PLAIN.replace('cat dog', 'cat') + 'link.jpg,dog\n')
    assert of(labelled_folder(tmp_path, 'labels.csv'), tmp_path)[0] == FOUND and 'joined: 1 of 4\n' in capsys.readouterr().out

def test_labels_that_are_in_one_part_only(tmp_path, capsys):
    write(folder(tmp_path), 'file,labels,is_valid\na,x y z,0\nb,x,1\nc,y x,1\nd,x w,0\n')
    labelled_folder(tmp_path, 'labels.csv')
    out = capsys.readouterr().out
    assert 'On no validation image, so left out of mean average precision: w, z\n' in out and 'nothing is to be learnt of it: x\n' in out

# --- against fastai, and any labels

@pytest.mark.parametrize('label_delim', [' ', None])
def test_as_fastai_reads_it(tmp_path, label_delim):
    "`from_csv`, with several labels and with one each"
    names, rng = [f'{i}.png' for i in range(12)], random.Random(0)
    labels = [' '.join(rng.sample(['cat', 'dog', 'owl'], rng.randint(1, 3)) if label_delim else [rng.choice(['cat', 'dog'])]) for _ in names]
    pd.DataFrame(dict(f=names, l=labels, is_valid=[i > 8 for i in range(12)])).to_csv(folder(tmp_path, ' '.join(names))/'labels.csv', index=False)
    theirs = ImageDataLoaders.from_csv(tmp_path, 'labels.csv', delimiter=',', label_delim=label_delim, valid_col='is_valid', item_tfms=Resize(4), bs=2, num_workers=0)
    data = labelled_folder(tmp_path, 'labels.csv', label_delim)
    ours = get_dls(data, 0, size=4, bs=2)
    assert ours.vocab == theirs.vocab and data.multi == (label_delim is not None) and type(ours.loss_func) is type(theirs.loss_func)
    for a, b in (ours.train_ds, theirs.train_ds), (ours.valid_ds, theirs.valid_ds):
        assert len(a) == len(b)
        for (x, y), (x2, y2) in zip(a, b): assert (np.array(x) == np.array(x2)).all() and y.tolist() == y2.tolist() and type(y) is type(y2)

@pytest.fixture(scope='module')
def twelve(tmp_path_factory): return folder(tmp_path_factory.mktemp('twelve'), ' '.join(f'{i}.png' for i in range(12)))

texts = st.text(st.characters(codec='utf-8', exclude_categories=['C', 'Z'], exclude_characters=';|,'), min_size=1, max_size=6)

@given(st.lists(st.sets(texts, max_size=4), max_size=8), st.sampled_from(';|,\t '), st.sampled_from(',;\t'), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_labels_are_read_as_written(twelve, sets, delim, sep, say, by_pandas):
    "By pandas or the csv module, which quote what needs it; the separator is given, or seen"
    sets = [*sets, {'x', 'y'}, {'x'}, {'x', 'y'}, {'y'}]
    rows = [(f'{i}.png', delim.join(o), i >= len(sets)-2) for i, o in enumerate(sets)]
    if by_pandas: pd.DataFrame(rows, columns=['f', 'l', 'is_valid']).to_csv(twelve/'labels.csv', index=False, sep=sep)
    else:
        with open(twelve/'labels.csv', 'w', newline='', encoding='utf-8') as f: csv.writer(f, delimiter=sep).writerows([('f', 'l', 'is_valid'), *rows])
    found, valid = of(labelled_folder(twelve, 'labels.csv', delim if say else None), twelve)
    assert found == {f'{i}.png': sorted(o) for i, o in enumerate(sets)} and [*valid.values()] == [o for *_, o in rows]

# --- pairs

def test_pairs_are_two_digits_each():
    data = pairs()
    assert (len(data.images), data.images[0].shape, data.images[0].dtype, data.vocab) == (1800, (14, 14, 3), np.uint8, list('0123456789'))
    assert (data.classes.sum(1) == 2).all() and data.is_valid.tolist() == [False]*1400 + [True]*400 and data.multi
    share = data.classes.mean(0)
    assert .2 < share[:7].min() and share[7:].max() < .13 and data.classes[data.is_valid].any(0).all()
    same, other = pairs(30, 10), pairs(30, 10, seed=1)
    assert (same.classes == pairs(30, 10).classes).all() and (np.array(same.images) == pairs(30, 10).images).all() and (same.classes != other.classes).any() and same.is_valid.sum() == 10

def test_pairs_for_validation_are_of_other_scans(monkeypatch):
    "The two on an image are of the digits that it has"
    d, taken = load_digits(), []
    class Images:
        def __getitem__(self, i): return taken.append(i) or d.images[i]
    monkeypatch.setattr('fastai_smooth.labels.load_digits', lambda: Bunch(images=Images(), target=d.target, target_names=d.target_names))
    data = pairs(300, 100)
    assert not {*taken[:600]} & {*taken[600:]} and (np.sort(d.target[taken].reshape(-1, 2)) == [np.flatnonzero(o) for o in data.classes]).all()

# --- options

def test_what_is_loaded(tmp_path, monkeypatch, capsys):
    def load(data, out=Path('out'), **kwargs): return load_images(data, None, False, out, **kwargs)
    monkeypatch.chdir(tmp_path)
    write(folder(tmp_path/'pairs'), PLAIN.replace('labels', 'tags'))
    assert len(load('digits').images) == 1797 and load('pairs').vocab[9] == '9' and 'give ./pairs\n' in capsys.readouterr().out
    for options in {}, dict(label_delim=' ', fn_col='file', label_col='tags'), dict(out=tmp_path/'pairs'/'out'): # which holds no images that are listed
        assert of(load('./pairs', labels='labels.csv', **options), 'pairs')[0] == FOUND

@pytest.mark.parametrize('options, words', [
    (dict(data='digits', labels='x.csv'), '--labels|not with --data digits'), (dict(data='pairs', labels='x.csv'), '--labels|not with --data pairs'), (dict(data='pairs', root='x'), '--root|not with --data pairs'),
    (dict(data='fashion', root='x', labels='x.csv'), '--labels|not with --data fashion'), (dict(data='photos', download=True), '--download|fashion'), (dict(data='photos', label_delim=''), '--label-delim|--labels FILE'),
    *((dict(data=data, **{o: 'x'}), f"--{o.replace('_', '-')}|--labels FILE") for o in ('fn_col', 'label_col', 'valid_col', 'label_delim') for data in ('photos', 'digits')),
    (dict(data='photos', labels='x.csv'), 'x.csv|no such file'), (dict(data='fotos', labels='x.csv'), 'fotos|no such folder'), (dict(data='fotos'), 'digits, fashion or pairs')])
def test_options_that_do_not_go_together(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    write(folder(Path('photos')), PLAIN)
    with pytest.raises(BadInput) as e: load_images(**{**dict(root=None, download=False, out=Path('out')), **options})
    assert all(w in str(e.value) for w in words.split('|')), e.value
