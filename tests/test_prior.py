"train_prior counts what training sees: as often as items are drawn, after the transforms of targets, without a look at an input."
import pytest
from helpers import *
from fastai.callback.data import PartialDL, WeightedDL
from fastai.distributed import DistributedDL
from fastai.tabular.all import TabWeightedDL
from fastai.vision.all import aug_transforms
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

import fuzz
from fastai_smooth.prior import train_prior

ANIMALS, WGTS = ['cat']*6 + ['dog']*3 + ['eel'], [1.]*6 + [4.]*3 + [32.]
CATS, DRAWN, FLAGS = [.6, .3, .1], [.12, .24, .64], torch.tensor([[1., 0.], [1., 1.], [0., float('nan')], [0., 1.]])   # nan is unknown

def close(a, b, atol=1e-6): torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float32), atol=atol, rtol=0)

opened = []
def image(i):
    opened.append(i)
    return TensorImage(torch.zeros(3, 4, 4))

def prior_of(dls, **kwargs):
    opened.clear()
    try: return train_prior(dls, **kwargs)
    finally: assert not opened

def refused(dls, name):
    with pytest.raises(TypeError, match=f'(?s)({name}).*prior=tensor'): prior_of(dls)

def datasets(n, *y): return Datasets(range(n), [[image], [*y]], splits=[range(n), range(n)])

def animals(**kwargs):
    "10 items, all to train on, in their order unless `shuffle`"
    return datasets(10, At(ANIMALS), Categorize()).dataloaders(**{'bs': 2, 'shuffle': False, 'num_workers': 0, 'device': CPU, **kwargs})

def masks(values, item_tfms=None, batch_tfms=None, **kwargs):
    "An item for each mask of `values`"
    kwargs |= dict(bs=2, shuffle=False, num_workers=0, device=CPU, after_item=item_tfms, after_batch=batch_tfms)
    dls = datasets(len(values), At([TensorMask(o) for o in values])).dataloaders(**kwargs)
    dls.c = 2
    return dls

COLUMNS = torch.tensor([1, 0, 0, 0]).expand(4, 4, 4)   # masks of one class a column

def seen(dls, k=2):
    "Frequencies in an epoch of the loader itself"
    counts = torch.bincount(torch.cat([y.as_subclass(torch.Tensor).flatten() for _, y in dls.train]), minlength=k)
    return counts/counts.sum()

def test_weights_count_where_the_loader_draws_by_them():
    "dsets.weighted_dataloaders(wgts), as documented in fastai; a WeightedDL that does not shuffle goes through the items"
    dls = datasets(10, At(ANIMALS), Categorize()).weighted_dataloaders(WGTS, bs=5, num_workers=0, device=CPU)
    close(prior_of(dls), DRAWN)
    drawn = tensor([i for _ in range(400) for i in dls.train.get_idxs()])
    close(torch.bincount(tensor(dls.train.dataset.tls[-1])[drawn], minlength=3)/4000, DRAWN, atol=.03)
    close(prior_of(animals(dl_type=WeightedDL, dl_kwargs=[dict(wgts=WGTS), {}])), CATS)
    close(prior_of(datasets(4, At(FLAGS)).weighted_dataloaders([1., 2., 3., 4.], bs=2, num_workers=0, device=CPU), multi=True), [.3, 6/7])

def test_weights_of_a_table():
    dls, wgts = tabular_dls(tabular_frame(40), n_valid=10), np.arange(1., 31)
    dls.loaders[0] = TabWeightedDL(dls.train.dataset, bs=4, wgts=wgts, shuffle=True)
    close(prior_of(dls), np.bincount(dls.train.dataset.ys.kind, wgts, minlength=3)/wgts.sum())

def test_parts_of_the_items():
    "The first, a random part, and what each of several processes gets"
    first = animals(n=7)
    close(prior_of(first), tensor([6, 1, 0])/7)
    first.loaders[0] = DistributedDL(first.train, 0, 2)
    close(prior_of(first), tensor([6, 1, 0])/7)
    close(prior_of(animals(dl_type=PartialDL, dl_kwargs=[dict(partial_n=4), {}])), CATS)

def torch_loaders(**kwargs):
    res = DataLoaders(*[torch.utils.data.DataLoader(dl.dataset, **kwargs) for dl in animals().loaders])
    res.c = 3
    return res

@pytest.mark.parametrize('kwargs,expected', [
    ({}, CATS), (dict(shuffle=True, batch_size=4), CATS), (dict(sampler=WeightedRandomSampler(WGTS, 10)), DRAWN),
    (dict(sampler=SubsetRandomSampler([0, 6, 6, 9])), [.25, .5, .25]), (dict(batch_sampler=BatchSampler(WeightedRandomSampler(WGTS, 10), 2, False)), DRAWN)])
def test_loaders_of_torch_count_by_their_sampler(kwargs, expected): close(prior_of(torch_loaders(**kwargs)), expected)

class Often(RandomSampler): pass
class Batches(BatchSampler): pass
def pad(samples): return samples
@pytest.mark.parametrize('kwargs,name', [
    (dict(sampler=Often(range(10))), 'Often'), (dict(batch_sampler=Batches(RandomSampler(range(10)), 2, False)), 'Batches|Sampler'),
    (dict(sampler=WeightedRandomSampler(WGTS, 5, replacement=False)), 'WeightedRandomSampler'), (dict(collate_fn=pad), 'collate_fn')])
def test_a_loader_of_torch_that_draws_in_its_own_way_is_refused(kwargs, name): refused(torch_loaders(**kwargs), name)

class Oversampled(TfmdDL):
    def get_idxs(self): return [0, 9, 9, 9, 9, 9]
class Halved(TfmdDL):
    def do_batch(self, b): return super().do_batch(b)[:1]
class Wrapped(TfmdDL):
    def __iter__(self): return super().__iter__()
class Relabelled(Datasets):
    def __getitem__(self, i): return super().__getitem__(i)

def every_second(idxs=None): return list(range(0, 10, 2))

def test_batches_without_a_data_set_are_refused():
    for cls in (list, tuple, L): refused(DataLoaders(cls(), cls()), f'labels of a {cls.__name__}')

def test_code_of_the_user_s_own_is_refused():
    "What it draws or yields can't be known without running it"
    for dl_type, name in ((Oversampled, 'get_idxs'), (Halved, 'do_batch'), (Wrapped, '__iter__')): refused(animals(dl_type=dl_type), name)
    for kwargs in (dict(get_idxs=every_second), dict(shuffle_fn=every_second)): refused(animals(**kwargs), *kwargs)
    relabelled = Relabelled(range(10), [[image], [At(ANIMALS), Categorize()]], splits=[range(10), range(10)])
    refused(relabelled.dataloaders(bs=2, num_workers=0, device=CPU), 'Relabelled')
    dls = animals()
    dls.train.get_idxs = every_second   # as callbacks that oversample do
    refused(dls, 'get_idxs')
    dls = animals()
    dls.train.get_idxs = dls.train.get_idxs   # what show_batch(unique=True) leaves
    close(prior_of(dls), CATS)

class Swapped(Transform):
    "Renumbers masks"
    def encodes(self, o: TensorMask): return 1-o
class Brighter(Transform):
    def encodes(self, o: TensorImage): return o+1
class Ones(Transform):
    def encodes(self, o: TensorCategory): return o*0
class CropMiddle(RandTransform):
    def before_call(self, b, split_idx): self.at = random.randint(6, 10)
    def encodes(self, o: TensorMask): return o[:, self.at:self.at+16, 8:24]
class Both(ItemTransform):
    def encodes(self, xy): return xy[0], 1-xy[1]
def shifted(o): return (o+1) % 3   # it has no types, so that it takes inputs and targets alike

@pytest.mark.parametrize('dls,expected', [
    (masks(COLUMNS), [.75, .25]), (masks(COLUMNS, item_tfms=[Swapped(), Brighter()]), [.25, .75]),
    (masks(COLUMNS, batch_tfms=[Swapped(), Brighter()]), [.25, .75]),
    (masks(COLUMNS*255, batch_tfms=IntToFloatTensor(div_mask=255)), [.75, .25]), (animals(after_batch=shifted), [.1, .6, .3]),
    (animals(after_batch=Ones(split_idx=0)), [1, 0, 0]), (animals(after_batch=Ones(split_idx=1)), CATS),
    (animals(after_item=[RandomResizedCrop(8), ToTensor()], after_batch=[IntToFloatTensor(), *aug_transforms(max_warp=0)]), CATS)],
    ids=['none', 'of items', 'of batches', 'masks of 0 and 255', 'a function', 'for training', 'for validation', 'of images alone'])
def test_targets_are_counted_after_their_transforms(dls, expected):
    close(prior_of(dls), expected)
    close(seen(dls, len(expected)), expected)

def test_random_crops_of_masks_are_counted_as_they_come_and_leave_random_numbers_alone():
    "The middle of a mask, its borders being cropped away"
    y = torch.ones(6, 32, 32).long()
    y[:, 8:24, 8:24] = 0
    dls, before = masks(y, batch_tfms=CropMiddle()), (random.getstate(), torch.get_rng_state())
    prior = prior_of(dls)
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())
    assert (1-prior[0]) < .5 < 1-prior_of(masks(y))[0]

def test_images_and_masks_as_users_load_them():
    "Blocks, resized and augmented: what augments is drawn from the images, which are not opened for it"
    imgs, arrays = segment_arrays(40)[0], np.full((40, 32, 32), 2, dtype=np.uint8)
    arrays[:, 6:-6, 6:-6] = np.arange(40)[:, None, None] % 2
    def get_x(i): return image(i) is not None and imgs[i]
    block = DataBlock((ImageBlock, MaskBlock(codes=MASK_CODES)), get_x=get_x, get_y=At(arrays), splitter=IndexSplitter(range(36, 40)),
                      item_tfms=CropPad(20), batch_tfms=[*aug_transforms(p_affine=1., max_rotate=20.), Normalize.from_stats(*imagenet_stats)])
    dls = block.dataloaders(list(range(40)), bs=6, num_workers=0, device=CPU)
    dls.c = 3
    raw, found = torch.bincount(tensor(arrays[:36]).long().flatten(), minlength=3)/arrays[:36].size, prior_of(dls)
    close(found, torch.stack([seen(dls, 3) for _ in range(10)]).mean(0), atol=.01)
    assert (found-raw).abs().max() > .1

def test_transforms_of_inputs_and_targets_together_are_refused():
    for kwargs in (dict(batch_tfms=Both()), dict(item_tfms=Both()), dict(before_batch=pad)): refused(masks(COLUMNS, **kwargs), 'Both|pad')
    plain = DataLoaders(*[DataLoader(dl.dataset, bs=2, after_batch=pad) for dl in masks(COLUMNS).loaders])   # no pipeline
    plain.c = 2
    refused(plain, 'pad')
    table = tabular_dls(tabular_frame(40), n_valid=10)
    close(prior_of(table).sum(), 1.)
    table.train.after_batch.add(Both())
    refused(table, 'Both')

def test_a_transform_that_fails_on_targets_alone():
    class Failing(Transform):
        def encodes(self, o: TensorMask): raise RuntimeError('too small')
    dls = masks(COLUMNS)
    dls.train.after_batch.add(Failing())
    refused(dls, 'too small')

@pytest.mark.parametrize('shape,axis,k', [((6, 3), None, 3), ((6, 3, 4, 5), None, 3), ((6, 3, 2, 4, 5), None, 3), ((6, 4, 5), None, 1), ((6,), None, 1),
                                          ((6, 4, 5), 2, 5), ((6, 4, 5), -1, 5), ((6, 4, 5, 2), 3, 2)])
def test_labels_are_where_the_sigmoid_losses_have_them(shape, axis, k):
    y, at = (torch.rand(shape) < .4).float(), axis if axis is not None else 1 if len(shape) in (2, 4, 5) else None
    close(prior_of(masks(y), multi=True, axis=axis), y.mean().reshape(1) if at is None else y.movedim(at, -1).reshape(-1, k).mean(0))
    close(prior_of(masks(L(torch.ones(1, 2, 2), torch.zeros(1, 4, 3))), multi=True), [.25])   # masks of several sizes, by pixel

def of(labels, c=3, **kwargs): return dict(dls=SimpleNamespace(train=SimpleNamespace(dataset=SimpleNamespace(tls=[None, labels])), c=c), **kwargs)

MULTI, INDICES = torch.tensor([[1., 0., 1.], [0., 0., 1.]]), torch.tensor([[0, 2], [1, 2]])
BAD_MULTI = [[], ['cat'], [MULTI[0], torch.ones(2)], [torch.tensor(2)], [-MULTI], [MULTI*1j], [object()]]
BAD_INDICES = [[], ['cat']*3, [.5], [fuzz.NAN], [1j], [torch.tensor(1j)], [3], [-1], [torch.tensor([0, 7])], [object()]]
TABLE = dict(
    indices=fuzz.Row(lambda labels, c=3, **kw: train_prior(of(list(labels), c)['dls'], **kw), st.just(dict(labels=INDICES, ignore_index=1)), {
        'label': [lambda a, o=o: dict(labels=o) for o in BAD_INDICES], 'ignore_index': ['x', None, [1], fuzz.NAN, 1.5, torch.tensor([1, 2])],
        'dls.c': [lambda a, c=c: dict(c=c) for c in (0, None)]}, dict(labels=fuzz.INTEGERS), skip=('sparse', 'nested')),
    multi=fuzz.Row(lambda labels, axis=None: train_prior(of(list(labels))['dls'], multi=True, axis=axis), st.just(dict(labels=MULTI)), {
        'label or target': [lambda a, o=o: dict(labels=o) for o in BAD_MULTI], 'axis': ['last', 1.5, [1], fuzz.NAN, 3]},
        dict(labels=fuzz.LABELS + fuzz.HALF), skip=('sparse', 'nested')),
    dls=fuzz.Row(train_prior, st.just(of(list(INDICES))), {'prior': [lambda a: dict(dls=SimpleNamespace(train=SimpleNamespace(dataset=[1, 2]), c=2))]}))
test_refuses, test_takes = fuzz.both_tests(TABLE, (TensorCategory, TensorMultiCategory))
