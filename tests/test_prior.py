"train_prior counts what training sees: as often as items are drawn, after the transforms of targets."
import pytest
from helpers import *
from fastai.callback.data import PartialDL, WeightedDL
from fastai.distributed import DistributedDL
from fastai.tabular.all import TabWeightedDL
from fastai.vision.all import aug_transforms
from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from fastai_smooth.all import train_prior

ANIMALS = ['cat']*6 + ['dog']*3 + ['eel']


def close(a, b, atol=1e-6): torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float32), atol=atol, rtol=0)


opened = []
def image(i):
    opened.append(i)
    return TensorImage(torch.zeros(3, 4, 4))


def prior_of(dls, **kwargs):
    "What is counted, without a look at an input"
    opened.clear()
    try: return train_prior(dls, **kwargs)
    finally: assert not opened


class At:
    def __init__(self, rows): self.rows = rows
    def __call__(self, i): return self.rows[i]


def animals(**kwargs):
    "10 items, all to train on, in their order unless `shuffle`"
    dsets = Datasets(range(10), [[image], [At(ANIMALS), Categorize()]], splits=[range(10), range(10)])
    return dsets.dataloaders(**{'bs': 2, 'shuffle': False, 'num_workers': 0, 'device': CPU, **kwargs})


def masks(values, item_tfms=None, batch_tfms=None, n_codes=2, **kwargs):
    "An item for each mask of `values`"
    dsets = Datasets(range(len(values)), [[image], [At([TensorMask(o) for o in values])]], splits=[range(len(values)), range(len(values))])
    dls = dsets.dataloaders(bs=2, shuffle=False, num_workers=0, device=CPU, after_item=item_tfms, after_batch=batch_tfms, **kwargs)
    dls.c = n_codes
    return dls


def columns(n=4, seed=0):
    "Masks of one class a column, which is 1 in the first of four: (n,4,4)"
    res = torch.zeros(n, 4, 4).long()
    res[:, :, 0] = 1
    return res


def seen(dls, k=2):
    "Frequencies in an epoch of the loader itself"
    counts = torch.bincount(torch.cat([y.as_subclass(torch.Tensor).flatten() for _, y in dls.train]), minlength=k)
    return counts/counts.sum()


# ---------------------------------------------------------------- how often items are drawn

WGTS = [1.]*6 + [4.]*3 + [32.]


def test_a_weighted_loader_counts_by_its_weights():
    "As documented in fastai: dsets.weighted_dataloaders(wgts)"
    dsets = Datasets(range(10), [[image], [At(ANIMALS), Categorize()]], splits=[range(10), range(10)])
    dls = dsets.weighted_dataloaders(WGTS, bs=5, num_workers=0, device=CPU)
    close(prior_of(dls), tensor([6., 12., 32.])/50)
    drawn = tensor([i for _ in range(400) for i in dls.train.get_idxs()])
    close(torch.bincount(tensor(dls.train.dataset.tls[-1])[drawn], minlength=3)/4000, prior_of(dls), atol=.03)


def test_weights_count_only_where_the_loader_uses_them():
    "A WeightedDL that does not shuffle goes through the items"
    close(prior_of(animals(dl_type=WeightedDL, dl_kwargs=[dict(wgts=WGTS), {}])), [.6, .3, .1])


def test_weights_of_multi_label_items():
    y = torch.tensor([[1., 0.], [1., 1.], [0., float('nan')], [0., 1.]])
    dsets = Datasets(range(4), [[image], [At(y)]], splits=[range(4), range(4)])
    close(prior_of(dsets.weighted_dataloaders([1., 2., 3., 4.], bs=2, num_workers=0, device=CPU), multi=True), [.3, 6/7])


def test_weights_of_a_table():
    df = tabular_frame(40)
    to = TabularPandas(df, procs=[Categorify], cat_names=['colour'], cont_names=['a'], y_names='kind', y_block=CategoryBlock(),
                       splits=[list(range(30)), list(range(30, 40))])
    wgts = np.where(df.kind[:30] == 'high', 20., 1.)
    dls = DataLoaders(TabWeightedDL(to.train, bs=4, wgts=wgts, shuffle=True), TabWeightedDL(to.valid))
    expected = tensor([wgts[df.kind[:30] == v].sum() for v in dls.vocab])
    close(prior_of(dls), expected/expected.sum())
    assert (expected/expected.sum() - tensor([(df.kind[:30] == v).mean() for v in dls.vocab])).abs().max() > .1


def test_a_loader_of_the_first_items():
    close(prior_of(animals(n=7)), tensor([6, 1, 0])/7)

def test_a_random_part_of_the_items():
    close(prior_of(animals(dl_type=PartialDL, dl_kwargs=[dict(partial_n=4), {}])), [.6, .3, .1])


def test_a_loader_of_several_processes():
    "Each gets a part of what the loader underneath draws"
    dls = animals(n=7)
    dls.loaders[0] = DistributedDL(dls.train, 0, 2)
    close(prior_of(dls), tensor([6, 1, 0])/7)


def torch_loaders(**kwargs):
    dls = animals()
    res = DataLoaders(*[torch.utils.data.DataLoader(dl.dataset, **kwargs) for dl in dls.loaders])
    res.c = 3
    return res


@pytest.mark.parametrize('kwargs,expected', [
    ({}, [.6, .3, .1]), (dict(shuffle=True, batch_size=4), [.6, .3, .1]), (dict(sampler=WeightedRandomSampler(WGTS, 10)), [.12, .24, .64]),
    (dict(sampler=SubsetRandomSampler([0, 6, 6, 9])), [.25, .5, .25]),
    (dict(batch_sampler=BatchSampler(WeightedRandomSampler(WGTS, 10), 2, False)), [.12, .24, .64])])
def test_loaders_of_torch_count_by_their_sampler(kwargs, expected): close(prior_of(torch_loaders(**kwargs)), expected)


class Often(RandomSampler): pass
class Batches(BatchSampler): pass
def my_collate(samples): return torch.utils.data.default_collate(samples)


@pytest.mark.parametrize('kwargs,name', [
    (dict(sampler=Often(range(10))), 'Often'), (dict(batch_sampler=Batches(RandomSampler(range(10)), 2, False)), 'Batches|Sampler'),
    (dict(sampler=WeightedRandomSampler(WGTS, 5, replacement=False)), 'WeightedRandomSampler'), (dict(collate_fn=my_collate), 'collate_fn')])
def test_a_loader_of_torch_that_draws_in_its_own_way_is_refused(kwargs, name):
    with pytest.raises(TypeError, match=f'({name}).*prior=tensor'): prior_of(torch_loaders(**kwargs))


class Oversampled(TfmdDL):
    def get_idxs(self): return [0, 9, 9, 9, 9, 9]


class Halved(TfmdDL):
    def do_batch(self, b): return super().do_batch(b)[:1]


class Wrapped(TfmdDL):
    def __iter__(self): return super().__iter__()


@pytest.mark.parametrize('dl_type,name', [(Oversampled, 'get_idxs'), (Halved, 'do_batch'), (Wrapped, '__iter__')])
def test_a_loader_class_of_the_user_s_own_is_refused(dl_type, name):
    "What it draws or yields can't be known without running it"
    with pytest.raises(TypeError, match=f'{name}.*prior=tensor'): prior_of(animals(dl_type=dl_type))


def every_second(idxs=None): return list(range(0, 10, 2))


def test_a_function_that_draws_items_is_refused():
    for kwargs in (dict(get_idxs=every_second), dict(shuffle_fn=every_second)):
        with pytest.raises(TypeError, match='(get_idxs|shuffle_fn).*prior=tensor'): prior_of(animals(**kwargs))
    dls = animals()
    dls.train.get_idxs = every_second  # as callbacks that oversample do
    with pytest.raises(TypeError, match='get_idxs.*prior=tensor'): prior_of(dls)
    dls = animals()
    dls.train.get_idxs = dls.train.get_idxs  # what show_batch(unique=True) leaves
    close(prior_of(dls), [.6, .3, .1])


# ---------------------------------------------------------------- transforms of targets

class Swapped(Transform):
    "Renumbers masks"
    def encodes(self, o: TensorMask): return 1-o


class Brighter(Transform):
    def encodes(self, o: TensorImage): return o+1


@pytest.mark.parametrize('where', ['item_tfms', 'batch_tfms'])
def test_masks_that_are_renumbered_on_their_way(where):
    dls = masks(columns(), **{where: [Swapped(), Brighter()]})
    close(prior_of(dls), [.25, .75])
    close(prior_of(dls), seen(dls))
    close(prior_of(masks(columns())), [.75, .25])


def test_masks_of_0_and_255():
    "IntToFloatTensor(div_mask=255) makes them 0 and 1"
    dls = masks(columns()*255, batch_tfms=IntToFloatTensor(div_mask=255))
    close(prior_of(dls), [.75, .25])
    close(prior_of(dls), seen(dls))


def test_labels_that_a_function_renumbers():
    "It has no types, so that it takes inputs and targets alike"
    def shifted(o): return (o+1) % 3
    dls = animals(after_batch=shifted)
    close(prior_of(dls), [.1, .6, .3])
    close(prior_of(dls), seen(dls, 3))


class Ones(Transform):
    def encodes(self, o: TensorCategory): return o*0


def test_a_transform_for_validation_only_is_left_out():
    close(prior_of(animals(after_batch=Ones(split_idx=1))), [.6, .3, .1])
    close(prior_of(animals(after_batch=Ones(split_idx=0))), [1, 0, 0])


def test_what_augments_images_leaves_categories_alone():
    tfms = [*aug_transforms(max_warp=0), Normalize.from_stats(*imagenet_stats, cuda=False)]
    close(prior_of(animals(after_item=[RandomResizedCrop(8), ToTensor()], after_batch=[IntToFloatTensor(), *tfms])), [.6, .3, .1])


def test_random_crops_of_masks_are_counted_as_they_come_and_leave_random_numbers_alone():
    "The middle of a mask, its borders being cropped away"
    y = torch.ones(6, 32, 32).long()
    y[:, 8:24, 8:24] = 0
    dls = masks(y, batch_tfms=CropMiddle())
    before = random.getstate(), torch.get_rng_state()
    prior = prior_of(dls)
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())
    assert (1-prior[0]) < .5 < 1-prior_of(masks(y))[0]


class CropMiddle(RandTransform):
    def before_call(self, b, split_idx): self.at = random.randint(6, 10)
    def encodes(self, o: TensorMask): return o[:, self.at:self.at+16, 8:24]


def test_images_and_masks_as_users_load_them():
    "Blocks, resized and augmented: what augments is drawn from the images, which are not opened for it"
    imgs = segment_arrays(40)[0]
    arrays = np.full((40, 32, 32), 2, dtype=np.uint8)
    arrays[:, 6:-6, 6:-6] = np.arange(40)[:, None, None] % 2
    def get_x(i):
        opened.append(i)
        return imgs[i]
    block = DataBlock((ImageBlock, MaskBlock(codes=MASK_CODES)), get_x=get_x, get_y=At(arrays), splitter=IndexSplitter(range(36, 40)),
                      item_tfms=CropPad(20), batch_tfms=[*aug_transforms(p_affine=1., max_rotate=20.), Normalize.from_stats(*imagenet_stats)])
    dls = block.dataloaders(list(range(40)), bs=6, num_workers=0, device=CPU)
    dls.c = 3
    raw = torch.bincount(tensor(arrays[:36]).long().flatten(), minlength=3)/arrays[:36].size
    found = prior_of(dls)
    close(found, torch.stack([seen(dls, 3) for _ in range(10)]).mean(0), atol=.01)
    assert (found-raw).abs().max() > .1


class Both(ItemTransform):
    def encodes(self, xy): return xy[0], 1-xy[1]


def pad(samples): return samples


@pytest.mark.parametrize('kwargs,name', [(dict(batch_tfms=Both()), 'Both'), (dict(item_tfms=Both()), 'Both'), (dict(before_batch=pad), 'pad')])
def test_a_transform_of_inputs_and_targets_together_is_refused(kwargs, name):
    with pytest.raises(TypeError, match=f'{name}.*prior=tensor'): prior_of(masks(columns(), **kwargs))


def test_a_function_of_batches_is_refused():
    "A plain DataLoader's after_batch is no pipeline"
    dls = masks(columns())
    def swapped(b): return b[0], 1-b[1]
    loaders = DataLoaders(*[DataLoader(dl.dataset, bs=2, after_batch=swapped) for dl in dls.loaders])
    loaders.c = 2
    with pytest.raises(TypeError, match='after_batch|swapped'): prior_of(loaders)


class Failing(Transform):
    def encodes(self, o: TensorMask): raise RuntimeError('too small')


def test_a_transform_that_fails_on_targets_alone():
    dls = masks(columns())
    dls.train.after_batch.add(Failing())
    with pytest.raises(TypeError, match='too small.*prior=tensor'): prior_of(dls)


class Relabelled(Datasets):
    def __getitem__(self, i): return super().__getitem__(i)


def test_a_dataset_of_the_user_s_own_is_refused():
    dsets = Relabelled(range(10), [[image], [At(ANIMALS), Categorize()]], splits=[range(10), range(10)])
    with pytest.raises(TypeError, match='Relabelled.*prior=tensor'): prior_of(dsets.dataloaders(bs=2, num_workers=0, device=CPU))


def test_a_table_with_a_transform_of_the_user_s_own_is_refused():
    class Doubled(ItemTransform):
        def encodes(self, o): return o
    dls = tabular_dls(tabular_frame(40), n_valid=10)
    close(prior_of(dls).sum(), 1.)
    dls.train.after_batch.add(Doubled())
    with pytest.raises(TypeError, match='Doubled.*prior=tensor'): prior_of(dls)


# ---------------------------------------------------------------- one frequency a label

def label_dls(y): return masks(y)


@pytest.mark.parametrize('shape,axis,k', [((6, 3), None, 3), ((6, 3, 4, 5), None, 3), ((6, 3, 2, 4, 5), None, 3), ((6, 4, 5), None, 1), ((6,), None, 1),
                                          ((6, 4, 5), 2, 5), ((6, 4, 5), -1, 5), ((6, 4, 5, 2), 3, 2)])
def test_labels_are_where_the_sigmoid_losses_have_them(shape, axis, k):
    y = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < .4).float()
    at = axis if axis is not None else 1 if len(shape) in (2, 4, 5) else None
    expected = y.mean().reshape(1) if at is None else y.movedim(at, -1).reshape(-1, k).mean(0)
    close(prior_of(label_dls(y), multi=True, axis=axis), expected)


def test_masks_of_several_sizes_are_counted_by_pixel():
    y = [torch.ones(1, 2, 2), torch.zeros(1, 4, 3)]
    close(prior_of(label_dls(L(y)), multi=True), [.25])


def test_an_axis_that_targets_lack():
    with pytest.raises(ValueError, match='no axis 3'): prior_of(label_dls(torch.ones(4, 2)), multi=True, axis=3)
    with pytest.raises(TypeError, match='axis'): prior_of(label_dls(torch.ones(4, 2)), multi=True, axis='last')
