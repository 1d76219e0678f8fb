"Predictions and targets in any layout as rows, and the logits of a Learner with the items that they belong to."
import threading

import pytest
from fastai.callback.mixup import MixUp
from fastai.text.all import language_model_learner, text_classifier_learner

import fuzz
from helpers import *
from test_pilot import LEARNERS, LOADERS, check_leaves_no_trace, fitted, torch_loader
from fastai_smooth.losses import LabelSmoothingBCEWithLogitsFlat
from fastai_smooth.predictions import *

def same(a, b): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

# ---------------------------------------------------------------- prediction_rows

def test_classes_of_torch_s_losses_lie_along_axis_1():
    pred, targ = torch.randn(2, 4, 3, 4), torch.randint(4, (2, 3, 4))
    for loss in nn.CrossEntropyLoss(), F.cross_entropy:
        rows, y, keep = prediction_rows(pred, targ, loss)
        same(F.cross_entropy(rows, y), F.cross_entropy(pred, targ))
        soft = F.one_hot(targ, 4).movedim(-1, 1).float()
        same(F.cross_entropy(*prediction_rows(pred, soft, loss)[:2]), F.cross_entropy(pred, targ))

def test_classes_of_a_function_lie_where_its_targets_have_none():
    for shape, axis in ((5, 7, 4), -1), ((5, 4, 7), 1), ((6, 4), 1):
        pred = torch.randn(shape)
        rows, y, _ = prediction_rows(pred, pred.argmax(axis), lambda x, y: 0)
        assert rows.shape == (pred.numel()//4, 4) and torch.equal(rows.argmax(1), y)

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(ignore_index=2), nn.CrossEntropyLoss(ignore_index=2), F.cross_entropy], ids=lambda o: getattr(o, '__name__', type(o).__name__))
def test_what_the_loss_ignores_is_not_to_be_kept(loss):
    ignored = -100 if loss is F.cross_entropy else 2
    y, keep = prediction_rows(torch.randn(4, 3), tensor([0, ignored, 1, 1]), loss)[1:]
    assert y.tolist() == [0, 0, 1, 1] and keep.tolist() == [True, False, True, True]

def with_axis(axis):
    loss = LabelSmoothingBCEWithLogitsFlat()
    loss.axis = axis
    return loss

@pytest.mark.parametrize('shape, loss, axis', [
    ((5, 3), BCEWithLogitsLossFlat(), 1), ((5, 3, 2, 2), BCEWithLogitsLossFlat(), 1), ((5, 3, 2, 2, 2), F.binary_cross_entropy_with_logits, 1),
    ((5, 3, 2), BCEWithLogitsLossFlat(), None), ((5, 3, 2), nn.BCEWithLogitsLoss(), None), ((5, 3, 2, 2), BCEWithLogitsLossFlat(axis=2), 2),
    ((5, 3, 2), with_axis(-1), 2), ((5, 3, 2), with_axis(None), None), ((5, 3, 2, 2), with_axis(None), 1)], ids=lambda o: getattr(o, '__name__', str(o)))
def test_where_labels_are(shape, loss, axis):
    "axis 1 of (N,K) and of images and volumes, one label in masks, and otherwise where a loss was told so; -1 is fastai's default"
    pred = torch.randn(shape)
    targ = (torch.rand(shape) < .5).long()
    x, y, keep = prediction_rows(pred, targ, loss)
    k = 1 if axis is None else shape[axis]
    for rows, o in (x, pred), (y, targ):
        assert torch.equal(rows, o.reshape(-1, 1) if axis is None else o.movedim(axis, -1).reshape(-1, k))
    assert keep.all() and keep.shape == x.shape[:1]

@pytest.mark.parametrize('x_shape, y_shape', [((4, 1, 3, 2), (4, 3, 2)), ((4, 3, 2), (4, 1, 3, 2)), ((4, 1), (4,)), ((4,), (4, 1))], ids=str)
def test_as_many_targets_as_predictions_are_labels(x_shape, y_shape):
    pred, targ = torch.randn(x_shape), (torch.rand(y_shape) < .5).long()
    x, y, _ = prediction_rows(pred, targ, BCEWithLogitsLossFlat())
    assert x.shape == y.shape == ((4,) if x_shape == (4,) else (pred.numel(), 1))
    assert torch.equal(x.flatten(), pred.flatten()) and torch.equal(y.flatten(), targ.flatten())

def test_one_class_a_row_is_an_index_or_a_soft_target():
    x, loss = torch.randn(4, 1), CrossEntropyLossFlat()
    assert prediction_rows(x, torch.zeros(4, 1).long(), loss)[1].shape == (4,)
    assert prediction_rows(x, torch.ones(4, 1), loss)[1].shape == (4, 1)

@pytest.mark.parametrize('pred, targ, error, message', [((torch.zeros(2, 3),), tensor([0, 1]), TypeError, 'one tensor .* got a tuple'), (torch.zeros(2, 3), [0, 1], TypeError, 'got a list'),
    (torch.zeros(2, 3), tensor([0, 1, 2]), ValueError, r'predictions \(2, 3\) and targets \(3,\) do not go together')])
def test_what_does_not_go_together_is_named(pred, targ, error, message):
    with pytest.raises(error, match=message): prediction_rows(pred, targ, CrossEntropyLossFlat())

# ---------------------------------------------------------------- raw_preds

def single(x=None, y=None, bs=16, n_valid=None, loss=None, model=None):
    x, y = ifnone(x, torch.randn(80, 6)), ifnone(y, torch.randint(4, (80,)))
    return tensor_learner(tensor_dls(x, y, bs, n_valid), ifnone(model, mlp(k=4)), ifnone(loss, CrossEntropyLossFlat()))

def logits(learn, x):
    with torch.no_grad(): return learn.model.eval()(x)

def test_shuffled_and_dropped_rows_are_all_given_in_order():
    x, y = torch.randn(170, 6), torch.randint(4, (170,))
    train = DataLoader(list(zip(x, y)), bs=32, shuffle=True, drop_last=True, num_workers=0)
    learn = tensor_learner(DataLoaders(train, train, device=CPU), mlp(k=4), CrossEntropyLossFlat())
    preds = raw_preds(learn, 0)
    assert preds.total == 170 and torch.equal(preds.targs, y) and torch.equal(preds.rows, torch.arange(170))
    same(preds.logits, logits(learn, x))
    assert torch.equal(raw_preds(learn, dl=train).logits, preds.logits)

def test_texts_sorted_by_length_are_given_in_order():
    learn = quiet(text_classifier_learner(text_dls(), AWD_LSTM, config=small_clas_config(), pretrained=False))
    preds, (expected, y) = raw_preds(learn, 0), learn.get_preds(0, act=noop)
    assert torch.equal(preds.rows, torch.arange(len(y))) and torch.equal(preds.targs, y.as_subclass(Tensor))
    same(preds.logits, expected.as_subclass(Tensor))

def test_a_language_model_has_a_row_a_token():
    learn = quiet(language_model_learner(lm_dls(), AWD_LSTM, config=small_lm_config(), pretrained=False))
    preds = raw_preds(learn)
    assert preds.logits.shape == (preds.total, len(VOCAB)) and preds.targs.shape == (preds.total,)

def test_pixels_belong_to_images_and_ignored_ones_are_left_out():
    y = torch.randint(3, (20, 4, 5))
    y[:, 0, :2] = VOID
    learn = single(torch.randn(20, 2, 4, 5), y, 3, 8, CrossEntropyLossFlat(axis=1, ignore_index=VOID), nn.Conv2d(2, 3, 1))
    preds = raw_preds(learn)
    assert preds.total == 160 and torch.equal(preds.targs, y[12:][y[12:] != VOID]) and torch.equal(preds.rows, (y[12:] != VOID).flatten().nonzero()[:, 0])
    assert torch.equal(preds.items(learn.dls.valid), torch.arange(8).repeat_interleave(18))

def test_outputs_of_many_rows_are_sampled():
    "seeded, a row once, with its own target"
    x = torch.randn(6000, 6)
    learn = single(x, torch.arange(6000), 500, 5000, model=nn.Linear(6, 6000))
    a, b, other = (raw_preds(learn, max_numel=1, seed=s) for s in (0, 0, 1))
    assert a.total == 5000 and 850 < len(a.logits) < 1150   # 1000 at least, up to chance
    assert torch.equal(a.rows, b.rows) and torch.equal(a.logits, b.logits) and not torch.equal(a.rows[:50], other.rows[:50])
    assert len(a.rows.unique()) == len(a.rows) and torch.equal(a.targs, 1000 + a.rows)
    same(a.logits, logits(learn, x[1000:][a.rows]))
    assert len(raw_preds(single(), max_numel=1).logits) == 20   # few are not

@pytest.mark.parametrize('dtype, kept', [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_logits_are_kept_in_float32_at_least(dtype, kept):
    class To(nn.Module):
        def forward(self, x): return x.to(dtype)
    preds = raw_preds(single(model=nn.Sequential(mlp(k=4), To()), loss=lambda p, y: F.cross_entropy(p.float(), y)))
    assert preds.logits.dtype == kept and preds.logits.device == CPU

@pytest.mark.parametrize('name', ['never_fitted', *LOADERS])
def test_no_trace(name): check_leaves_no_trace(LEARNERS[name], lambda o: [raw_preds(o), raw_preds(o, 0)])

def test_mixup_left_holding_the_loss_is_no_matter():
    learn = single()
    expected = raw_preds(learn)
    with pytest.raises(RuntimeError): learn.fit(1, lr=0., cbs=[MixUp(), RaiseAt(RuntimeError('power cut'))])
    same(raw_preds(learn).logits, expected.logits)

def test_a_sampler_that_cannot_be_copied_is_shared_and_its_generator_put_back():
    g, learn = torch.Generator().manual_seed(3), fitted()
    sampler = torch.utils.data.RandomSampler(learn.dls.valid.dataset, generator=g)
    sampler.lock, before = threading.Lock(), g.get_state()
    preds = raw_preds(learn, dl=torch_loader(learn.dls.valid.dataset, sampler=sampler))
    same(preds.logits.sort(0)[0], raw_preds(learn).logits.sort(0)[0])
    assert torch.equal(g.get_state(), before)

def test_data_without_targets_are_named():
    dl = DataLoader([(o,) for o in torch.randn(20, 6)], bs=8, num_workers=0)
    dl.n_inp = 1
    for learn, dl in (single(), dl), (single(), DataLoader([], bs=8, num_workers=0)), (single(y=torch.full((80,), -100)), None):
        with pytest.raises(ValueError, match='no targets|no predictions with a target'): raw_preds(learn, dl=dl)

@pytest.mark.parametrize('kw', [dict(ds_idx=o) for o in (7, -7, 'x', None, 1.5, fuzz.NAN, [1])] + [dict(max_numel=o) for o in ('x', None, fuzz.NAN)] + [dict(seed=o) for o in fuzz.BAD_SEED], ids=str)
def test_bad_numbers_are_named(kw):
    with pytest.raises((TypeError, ValueError), match=f'{[*kw][0]} must be a whole number'): raw_preds(single(), **kw)
