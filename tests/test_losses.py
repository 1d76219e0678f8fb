"The modules and fastai losses, against PyTorch's, fastai's and formulas worked here (SPEC sections 1 to 3)."
import copy, io, math, pickle, warnings
from types import SimpleNamespace

import cloudpickle, fastai.losses as fastai_losses, pytest, torch, torch.nn.functional as F
from fastai.basics import TensorBase, TensorCategory, TensorImage, TensorMultiCategory
from fastai.callback.mixup import CutMix, MixUp
from fastai.layers import NoneReduce
from torch import nn, tensor
from torch._subclasses import FakeTensorMode

from fastai_smooth import losses
from fastai_smooth.kernels import checks, smooth_binary_cross_entropy_with_logits
from fastai_smooth.all import (LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat,
                               LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat)

REDUCTIONS = ['mean', 'sum', 'none']
INTS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
SEED_LOGITS = tensor([[0, .2, .7, .1, 0], [0, .9, .2, .2, 1], [1, .2, .7, .9, 1]])
SEED_TARGET = tensor([2, 1, 0])


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randint(k, *shape, seed=1): return torch.randint(k, shape, generator=torch.Generator().manual_seed(seed))


def plain(t): return t.as_subclass(torch.Tensor) if isinstance(t, torch.Tensor) else torch.as_tensor(t)


def close(a, b, **kwargs): torch.testing.assert_close(plain(a), plain(b), **kwargs)


def value_and_grad(f, x, y):
    "The loss of `f` and the gradient of its (randomly weighted, so that 'none' counts item by item) sum."
    x = x.detach().clone().requires_grad_()
    loss = plain(f(x, y))
    (g,) = torch.autograd.grad((loss*torch.arange(1, loss.numel()+1, dtype=x.dtype).view(loss.shape)).sum(), x)
    return loss.detach(), g


def softmax_loss(x, q, w=None):
    "Per item, from the definition: `x` and `q` (N,K), `w` (K,)."
    q = q if w is None else q*w
    return -(q*x.log_softmax(-1)).sum(-1)


# ---------------------------------------------------------------- values worked by hand

@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
def test_seed_example(cls):
    close(cls(eps=.5)(SEED_LOGITS, SEED_TARGET), tensor(1.4670), atol=5e-5, rtol=0)


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
def test_default_eps_is_a_tenth(cls):
    close(cls()(SEED_LOGITS, SEED_TARGET), F.cross_entropy(SEED_LOGITS, SEED_TARGET, label_smoothing=.1))


# K=4, logits [2,1,0,-1]: lse = 2 + ln(1 + e^-1 + e^-2 + e^-3) = 2.440190, so that
# -log p = [.440190, 1.440190, 2.440190, 3.440190]; y = [1,1,0,0] has n=2 positives, eps=.1.
MULTI_LOGITS, MULTI_TARGET = tensor([[2., 1., 0., -1.]]), tensor([[1., 1., 0., 0.]])


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
def test_multi_label_softmax_of_the_forum_thread(cls):
    """(1-eps)/n on the positives and eps/K everywhere, of
    https://forums.fast.ai/t/can-label-smoothing-be-used-for-multi-label-images/46673:
    q = [.9/2 + .1/4, same, .1/4, same] = [.475, .475, .025, .025], which sums to one;
    loss = .475*(.440190+1.440190) + .025*(2.440190+3.440190) = .893180 + .147010 = 1.040190"""
    close(cls(eps=.1, multi_hot=True)(MULTI_LOGITS, MULTI_TARGET), tensor(1.040190), atol=2e-6, rtol=0)


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
def test_multi_label_softmax_of_the_forum_thread_spread_over_the_others(cls):
    """(1-eps)/n on the n positives and eps/(K-n) on the rest, of the same thread: q = [.45, .45, .05, .05];
    loss = .45*(.440190+1.440190) + .05*(2.440190+3.440190) = .846171 + .294019 = 1.140190"""
    loss = cls(eps=.1, multi_hot=True, spread='others')
    close(loss(MULTI_LOGITS, MULTI_TARGET), tensor(1.140190), atol=2e-6, rtol=0)


@pytest.mark.parametrize('spread', ['all', 'others'])
@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_multi_hot_rows_with_no_positive_or_all_positive(spread, dtype):
    "Both have the uniform target: loss = mean of -log p = lse - (2+1+0-1)/4 = 2.440190 - .5 = 1.940190"
    loss = LabelSmoothingCrossEntropyFlat(eps=.1, multi_hot=True, spread=spread, reduction='none')
    y = tensor([[0, 0, 0, 0], [1, 1, 1, 1]]).to(dtype)
    close(loss(MULTI_LOGITS.expand(2, 4), y).view(-1), tensor([1.940190]*2), atol=2e-6, rtol=0)


@pytest.mark.parametrize('cls', [LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat])
def test_positive_becomes_one_minus_eps_and_negative_eps(cls):
    """The forum callback's formula. logits [2,-1], y [1,0], eps .1: q = [.9, .1];
    softplus(2) - .9*2 = 2.126928 - 1.8 = .326928; softplus(-1) + .1*1 = .313262 + .1 = .413262; mean .370095.
    Gradient: (sigmoid(2) - .9)/2 = (.880797-.9)/2 = -.009601; (sigmoid(-1) - .1)/2 = (.268941-.1)/2 = .084471."""
    x, y = tensor([[2., -1.]], requires_grad=True), tensor([[1., 0.]])
    loss = cls(eps=.1)(x, y)
    close(loss.detach(), tensor(.370095), atol=1e-6, rtol=0)
    loss.backward()
    close(x.grad, tensor([[-.009601, .084471]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize('cls', [LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat])
def test_default_eps_of_the_sigmoid_loss(cls):
    x, y = rand(4, 3), randint(2, 4, 3).double()
    close(cls()(x, y), F.binary_cross_entropy_with_logits(x, y*.9+.05))


def test_soft_multi_label_target_lies_in_between():
    "MixUp's .7 becomes .7*(1-2*.1)+.1 = .66, where the forum's loop makes it eps"
    x = rand(1, 1)
    close(LabelSmoothingBCEWithLogitsFlat(eps=.1)(x, tensor([[.7]]).double()),
          F.binary_cross_entropy_with_logits(x, tensor([[.66]]).double()))


def test_spread_others_is_all_with_a_larger_eps():
    "K=5: eps on the others = 'all' with eps*5/4; and 1-eps, eps/4 from the definition"
    x, y = rand(6, 5), randint(5, 6)
    loss = LabelSmoothingCrossEntropyFlat(eps=.2, spread='others')(x, y)
    close(loss, LabelSmoothingCrossEntropyFlat(eps=.25)(x, y))
    q = torch.where(F.one_hot(y, 5).bool(), .8, .05).double()
    close(loss, softmax_loss(x, q).mean())


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
def test_class_prior(cls):
    x, y, prior = rand(6, 3), randint(3, 6), tensor([.5, .3, .2], dtype=torch.float64)
    q = .8*F.one_hot(y, 3) + .2*prior
    close(cls(eps=.2, prior=prior)(x, y), softmax_loss(x, q).mean())


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
def test_class_conditional_prior(cls):
    x, y = rand(6, 3), randint(3, 6)
    prior = tensor([[.6, .3, .1], [.2, .5, .3], [.1, .1, .8]], dtype=torch.float64)
    q = .8*F.one_hot(y, 3) + .2*prior[y]
    close(cls(eps=.2, prior=prior)(x, y), softmax_loss(x, q).mean())


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
def test_eps_of_each_class(cls):
    x, y, eps = rand(8, 3), randint(3, 8), tensor([.1, .2, .4], dtype=torch.float64)
    e = eps[y][:, None]
    close(cls(eps=eps)(x, y), softmax_loss(x, (1-e)*F.one_hot(y, 3) + e/3).mean())


@pytest.mark.parametrize('cls', [LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat])
def test_prior_of_the_sigmoid_loss(cls):
    x, y, prior = rand(6, 3), randint(2, 6, 3), tensor([.9, .3, .2], dtype=torch.float64)
    close(cls(eps=.1, prior=prior)(x, y.double()), F.binary_cross_entropy_with_logits(x, .8*y + .2*prior))


@pytest.mark.parametrize('cls', [LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat])
def test_label_axis_of_the_sigmoid_loss(cls):
    "a prior lies along the channels of images, or along `axis`, which can be read and set; masks have one label"
    x, y, prior = rand(6, 3, 4, 5), randint(2, 6, 3, 4, 5).double(), tensor([.9, .3, .2], dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(x, .8*y + .2*prior[:, None, None])
    loss = cls(eps=.1, prior=prior)
    assert loss.axis is None
    close(loss(x, y), expected)
    last = cls(eps=.1, prior=prior, axis=-1)
    assert last.axis == -1
    close(last(x.movedim(1, -1), y.movedim(1, -1)), expected)
    close(pickle.loads(pickle.dumps(last))(x.movedim(1, -1), y.movedim(1, -1)), expected)
    loss.axis = 2
    close(loss(x.transpose(1, 2), y.transpose(1, 2)), expected)
    loss.axis = 9
    with pytest.raises(IndexError, match='axis 9 is out of range'): loss(x, y)
    one = cls(eps=.1, prior=prior[:1])
    close(one(x[:, 0], y[:, 0]), F.binary_cross_entropy_with_logits(x[:, 0], .8*y[:, 0] + .18))
    with pytest.raises(ValueError, match=r'one label; axis= says where'): cls(eps=.1, prior=prior)(x[:, 0], y[:, 0])


def test_optimum_has_the_logit_gap_of_the_formula():
    "ln(K(1-eps)/eps + 1) is where the gradient vanishes"
    for k, gap in ((2, 2.944), (3, 3.3322), (10, 4.511), (1000, 9.105)):
        x = torch.zeros(1, k, dtype=torch.float64)
        x[0, 0] = math.log(k*.9/.1 + 1)
        close(x[0, 0].item(), gap, atol=5e-4, rtol=0)
        _, g = value_and_grad(LabelSmoothingCrossEntropyFlat(.1), x, tensor([0]))
        assert g.abs().max() < 1e-12


# ---------------------------------------------------------------- parity with fastai

@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('axis,shape', [(-1, (6, 5)), (-1, (3, 4, 7)), (1, (2, 5, 3, 4)), (1, (2, 5, 3))],
                         ids=['2d', 'language model', 'segmentation', 'sequence'])
@pytest.mark.parametrize('eps', [0., .1, .7])
def test_fastai_parity(eps, axis, shape, reduction):
    """Value and gradient. fastai transposes the class axis with the last one, so that its unreduced (2,5,3,4) losses
    come in (2,4,3) order; ours follow the target's."""
    k = shape[axis]
    spatial = tuple(s for i, s in enumerate(shape) if i != axis % len(shape))
    # float32: fastai's own cuts doubles to it
    x, y = rand(*shape, dtype=torch.float32), randint(k, *spatial)
    ours = LabelSmoothingCrossEntropyFlat(eps, axis=axis, reduction=reduction)
    theirs = fastai_losses.LabelSmoothingCrossEntropyFlat(eps=eps, axis=axis, reduction=reduction)
    if reduction != 'none':
        (l1, g1), (l2, g2) = value_and_grad(ours, x, y), value_and_grad(theirs, x, y)
        close(l1, l2); close(g1, g2)
        return
    l1, l2 = plain(ours(x, y)).view(spatial), plain(theirs(x, y))
    if axis == 1: l2 = l2.view(y.transpose(1, -1).shape).transpose(1, -1)
    close(l1, l2.reshape(spatial))


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('pos_weight', [None, tensor([1., 2., .5])])
def test_fastai_parity_of_the_sigmoid_loss_at_eps_0(pos_weight, reduction):
    x, y = rand(4, 3, dtype=torch.float32), randint(2, 4, 3).float()
    ours = LabelSmoothingBCEWithLogitsFlat(0., pos_weight=pos_weight, reduction=reduction)
    theirs = fastai_losses.BCEWithLogitsLossFlat(pos_weight=pos_weight, reduction=reduction)
    (l1, g1), (l2, g2) = value_and_grad(ours, x, y), value_and_grad(theirs, x, y)
    close(l1.reshape(-1), l2.reshape(-1)); close(g1, g2)


# ---------------------------------------------------------------- parity with PyTorch

@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('axis,shape', [(-1, (9, 4)), (-1, (2, 6, 4)), (1, (2, 4, 3, 5))])
@pytest.mark.parametrize('flatten', [True, False])
def test_pytorch_parity_with_weight_and_ignore_index(flatten, axis, shape, weighted, reduction):
    k, spatial = 4, tuple(s for i, s in enumerate(shape) if i != axis % len(shape))
    x, y = rand(*shape), randint(k, *spatial)
    y.view(-1)[::3] = 99
    w = tensor([1., 2., .3, .7], dtype=torch.float64) if weighted else None
    ours = LabelSmoothingCrossEntropyFlat(.2, axis=axis, weight=w, ignore_index=99, reduction=reduction,
                                          flatten=flatten)
    theirs = lambda x, y: F.cross_entropy(x.movedim(axis, 1), y, w, ignore_index=99, label_smoothing=.2,
                                          reduction=reduction)
    (l1, g1), (l2, g2) = value_and_grad(ours, x, y), value_and_grad(theirs, x, y)
    close(l1.reshape(l2.shape), l2); close(g1, g2)


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('weighted', [False, True])
def test_module_parity_with_pytorch(weighted, reduction):
    x, y = rand(2, 4, 3, 5), randint(4, 2, 3, 5)
    y[0, 0, 0] = -100
    w = tensor([1., 2., .3, .7], dtype=torch.float64) if weighted else None
    ours = LabelSmoothingCrossEntropy(.2, weight=w, reduction=reduction)
    theirs = nn.CrossEntropyLoss(weight=w, label_smoothing=.2, reduction=reduction)
    (l1, g1), (l2, g2) = value_and_grad(ours, x, y), value_and_grad(theirs, x, y)
    close(l1, l2); close(g1, g2)


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_soft_targets(reduction, cls):
    "Mixed labels, shaped like the logits"
    x, y = rand(5, 4), rand(5, 4, seed=3).softmax(-1)
    ours, theirs = cls(.2, reduction=reduction), nn.CrossEntropyLoss(label_smoothing=.2, reduction=reduction)
    (l1, g1), (l2, g2) = value_and_grad(ours, x, y), value_and_grad(theirs, x, y)
    close(l1.reshape(l2.shape), l2); close(g1, g2)


def test_soft_targets_of_segmentation():
    x, y = rand(2, 4, 3, 5), rand(2, 4, 3, 5, seed=3).softmax(1)
    close(LabelSmoothingCrossEntropyFlat(.2, axis=1)(x, y), F.cross_entropy(x, y, label_smoothing=.2))


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('cls', [LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat])
def test_sigmoid_parity_with_pytorch(cls, reduction):
    x, y = rand(4, 3), randint(2, 4, 3).double()
    w, pw = tensor([1., .5, 2.], dtype=torch.float64), tensor([3., 1., .2], dtype=torch.float64)
    ours = cls(.1, weight=w, pos_weight=pw, reduction=reduction)
    theirs = lambda x, y: F.binary_cross_entropy_with_logits(x, y*.8+.1, w, pos_weight=pw, reduction=reduction)
    (l1, g1), (l2, g2) = value_and_grad(ours, x, y), value_and_grad(theirs, x, y)
    close(l1.reshape(l2.shape), l2); close(g1, g2)


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_an_ignored_row_is_as_if_not_there(reduction):
    "EVIDENCE row 1: neither in the uniform term nor in the denominator, whatever the weights"
    x, w = rand(2, 3), tensor([.2, 5., 1.], dtype=torch.float64)
    loss = LabelSmoothingCrossEntropyFlat(.1, weight=w, reduction=reduction)
    both, alone = plain(loss(x, tensor([1, -100]))), plain(loss(x[:1], tensor([1])))
    if reduction == 'none':
        close(both[:1], alone)
        assert both[1] == 0
    else: close(both, alone)


@pytest.mark.parametrize('y', [tensor([-100, -100]), tensor([], dtype=torch.long)], ids=['all ignored', 'empty'])
def test_nothing_left(y):
    x = rand(len(y), 3).requires_grad_()
    loss = LabelSmoothingCrossEntropyFlat(.1)(x, y)
    loss.backward()
    assert loss.item() == 0. and (x.grad == 0).all() and x.grad.shape == x.shape


def test_half_precision_accumulates_in_float32():
    "EVIDENCE row 11: `F.cross_entropy` gives inf here"
    x, y = rand(4, 5000, dtype=torch.float32).half(), randint(5000, 4)
    loss = LabelSmoothingCrossEntropyFlat(.1)(x, y)
    assert loss.dtype == torch.float32
    close(loss, F.cross_entropy(x.float(), y, label_smoothing=.1))
    s = LabelSmoothingBCEWithLogitsFlat(.1)(x, torch.zeros(4, 5000, dtype=torch.float16))
    assert s.dtype == torch.float32
    close(s, F.binary_cross_entropy_with_logits(x.float(), torch.full((4, 5000), .1)), rtol=1e-4, atol=1e-5)


def test_masked_classes_get_no_smoothing_mass():
    "EVIDENCE row 12: -inf logits; the loss is that of the classes left"
    x, y = rand(3, 5), tensor([0, 1, 2])
    masked = torch.cat([x, torch.full((3, 1), -math.inf, dtype=x.dtype)], 1)
    l1, g1 = value_and_grad(LabelSmoothingCrossEntropyFlat(.2), masked, y)
    l2, g2 = value_and_grad(LabelSmoothingCrossEntropyFlat(.2), x, y)
    close(l1, l2); close(g1[:, :5], g2)
    assert (g1[:, 5] == 0).all()


def test_class_index_out_of_range():
    with pytest.raises(IndexError, match=r'(?s)7.*4|4.*7'):
        LabelSmoothingCrossEntropyFlat(.1)(rand(3, 4), tensor([0, 7, 1]))
    with pytest.raises(IndexError): LabelSmoothingCrossEntropyFlat(.1)(rand(3, 4), tensor([0, -1, 1]))


def test_weights_past_the_flip_warn_once():
    "K(1-eps)/eps + 1 = 3*.5/.5 + 1 = 4: a ratio of 5 flips the optimum's argmax, one of 3 does not"
    checks._warn_flip.cache_clear()
    x, y = rand(4, 3), tensor([0, 1, 2, 0])
    with pytest.warns(UserWarning):
        LabelSmoothingCrossEntropyFlat(.5, weight=tensor([1., 1., 5.], dtype=x.dtype))(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        LabelSmoothingCrossEntropyFlat(.5, weight=tensor([1., 1., 3.], dtype=x.dtype))(x, y)


@pytest.mark.parametrize('cls', [LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat])
def test_class_indices_to_the_sigmoid_loss(cls):
    with pytest.raises(ValueError, match='(?i)cross.?entropy'): cls()(rand(4, 3), tensor([0, 1, 2, 0]))


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
def test_multi_hot_integers_to_the_softmax_loss(cls):
    with pytest.raises(ValueError, match='(?i)multi_hot|bce|binary'): cls()(rand(4, 3), randint(2, 4, 3))


# ---------------------------------------------------------------- as fastai uses them

def test_eps_is_settable_and_takes_effect():
    "EVIDENCE: `loss.eps = x` on fastai's Flat does nothing"
    theirs = fastai_losses.LabelSmoothingCrossEntropyFlat(eps=.1)
    theirs.eps = .5
    close(plain(theirs(SEED_LOGITS, SEED_TARGET)), F.cross_entropy(SEED_LOGITS, SEED_TARGET, label_smoothing=.1))
    ours = LabelSmoothingCrossEntropyFlat(.1)
    assert ours.eps == .1
    ours.eps = .5
    assert ours.eps == .5
    close(ours(SEED_LOGITS, SEED_TARGET), F.cross_entropy(SEED_LOGITS, SEED_TARGET, label_smoothing=.5))
    sig = LabelSmoothingBCEWithLogitsFlat(.1)
    assert sig.eps == .1
    sig.eps = .2
    x, y = rand(2, 3), tensor([[1., 0, 0], [0, 1, 1]], dtype=torch.float64)
    assert sig.eps == .2
    close(sig(x, y), F.binary_cross_entropy_with_logits(x, y*.6+.2))


@pytest.mark.parametrize('loss,bad', [(LabelSmoothingCrossEntropyFlat(), 1.5), (LabelSmoothingCrossEntropyFlat(), -.1),
                                      (LabelSmoothingBCEWithLogitsFlat(), .6)])
def test_bad_eps_set_later(loss, bad):
    x = rand(2, 3)
    y = tensor([0, 1]) if isinstance(loss, LabelSmoothingCrossEntropyFlat) else torch.zeros(2, 3, dtype=x.dtype)
    with pytest.raises(ValueError, match=str(bad)):
        loss.eps = bad
        loss(x, y)


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropyFlat, LabelSmoothingBCEWithLogitsFlat])
def test_reduction_is_settable(cls):
    loss, x = cls(), rand(4, 3)
    y = randint(3, 4) if cls is LabelSmoothingCrossEntropyFlat else randint(2, 4, 3).double()
    assert loss.reduction == 'mean'
    mean = loss(x, y)
    loss.reduction = 'none'
    assert loss.reduction == 'none'
    items = loss(x, y)
    assert items.numel() == y.numel()
    close(items.mean(), mean)
    loss.reduction = 'sum'
    close(loss(x, y), items.sum())
    loss.reduction = 'mean'
    with NoneReduce(loss) as unreduced: close(unreduced(x, y), items)
    close(loss(x, y), mean)


def test_y_int_is_for_the_softmax_loss_only():
    "MixUp mixes two losses where there is `y_int`, and mixes the targets where there is not"
    for cls in (LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat): assert cls().y_int is True
    for cls in (LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat): assert not hasattr(cls(), 'y_int')


def test_they_are_fastai_losses_and_torch_modules():
    for cls in (LabelSmoothingCrossEntropyFlat, LabelSmoothingBCEWithLogitsFlat):
        assert isinstance(cls(), fastai_losses.BaseLoss)
    for cls in (LabelSmoothingCrossEntropy, LabelSmoothingBCEWithLogits): assert isinstance(cls(), nn.Module)
    assert LabelSmoothingCrossEntropyFlat is not fastai_losses.LabelSmoothingCrossEntropyFlat


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropyFlat, LabelSmoothingCrossEntropy])
@pytest.mark.parametrize('axis,shape', [(-1, (2, 5)), (-1, (2, 3, 5)), (1, (2, 5, 4, 4))])
def test_activation_and_decodes_follow_the_axis(axis, shape, cls):
    "EVIDENCE row 7: fastai's axis=1 decodes (2,5,4,4) to (2,5,4)"
    loss, x = cls(axis=axis), rand(*shape)
    close(loss.activation(x), x.softmax(axis))
    assert torch.equal(loss.decodes(x), x.argmax(axis))
    assert torch.equal(loss.decodes(loss.activation(x)), x.argmax(axis))
    if axis == 1: assert loss.decodes(x).shape == (2, 4, 4)


@pytest.mark.parametrize('thresh', [.5, .8])
def test_sigmoid_activation_and_thresh(thresh):
    loss, x = LabelSmoothingBCEWithLogitsFlat(thresh=thresh), tensor([[-1., .5, 3.]])
    p = loss.activation(x)
    close(p, x.sigmoid())
    assert loss.thresh == thresh
    assert torch.equal(loss.decodes(p), x.sigmoid() > thresh)
    loss.thresh = .1
    assert loss.decodes(p).all()


def test_sigmoid_module_has_activation_and_decodes():
    loss, x = LabelSmoothingBCEWithLogits(), tensor([[-1., .5, 3.]])
    close(loss.activation(x), x.sigmoid())
    assert loss.decodes(loss.activation(x)).tolist() == [[False, True, True]]


@pytest.mark.parametrize('dtype', INTS)
@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropyFlat, LabelSmoothingCrossEntropy])
def test_every_integer_dtype(dtype, cls):
    x, y = rand(5, 4), tensor([0, 1, 2, 3, 1])
    close(cls(.2)(x, y.to(dtype)), F.cross_entropy(x, y, label_smoothing=.2))


@pytest.mark.parametrize('dtype', INTS + [torch.bool])
@pytest.mark.parametrize('cls', [LabelSmoothingBCEWithLogitsFlat, LabelSmoothingBCEWithLogits])
def test_every_integer_dtype_of_the_sigmoid_loss(dtype, cls):
    x, y = rand(5, 4), randint(2, 5, 4)
    close(cls(.2)(x, y.to(dtype)), F.binary_cross_entropy_with_logits(x, y.double()*.6+.2))


@pytest.mark.parametrize('dtype', [torch.int8, torch.int64])
@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_tabular_targets_have_a_column(reduction, dtype):
    "fastai's TabularPandas gives (N,1) int8"
    x, y = rand(5, 4), tensor([0, 1, 2, 3, 1])
    loss = LabelSmoothingCrossEntropyFlat(.2, reduction=reduction)(x, y[:, None].to(dtype))
    close(loss.reshape(-1), F.cross_entropy(x, y, label_smoothing=.2, reduction=reduction).reshape(-1))


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_masks_may_have_a_channel(reduction):
    "(N,1,H,W), which fastai takes too"
    x, y = rand(2, 3, 4, 5), randint(3, 2, 4, 5)
    loss = LabelSmoothingCrossEntropyFlat(.2, axis=1, reduction=reduction)(x, y[:, None])
    close(loss.reshape(-1), F.cross_entropy(x, y, label_smoothing=.2, reduction=reduction).reshape(-1))


def test_one_row_with_a_column():
    "(1,1): a last batch of one tabular row is no multi-hot row"
    x = rand(1, 4)
    close(LabelSmoothingCrossEntropyFlat(.2)(x, tensor([[3]])), F.cross_entropy(x, tensor([3]), label_smoothing=.2))


@pytest.mark.parametrize('loss,x,y', [
    (LabelSmoothingCrossEntropyFlat(), TensorImage(rand(4, 3)), TensorCategory(tensor([0, 1, 2, 0]))),
    (LabelSmoothingCrossEntropyFlat(axis=1), TensorBase(rand(2, 3, 4, 4)), TensorBase(randint(3, 2, 4, 4))),
    (LabelSmoothingCrossEntropy(), TensorImage(rand(4, 3)), TensorCategory(tensor([0, 1, 2, 0]))),
    (LabelSmoothingBCEWithLogitsFlat(), TensorImage(rand(4, 3)), TensorMultiCategory(randint(2, 4, 3).double())),
    (LabelSmoothingBCEWithLogits(), TensorBase(rand(4, 3)), TensorMultiCategory(randint(2, 4, 3).double()))],
    ids=['flat', 'flat axis 1', 'module', 'sigmoid flat', 'sigmoid module'])
@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_tensorbase_in_plain_tensor_out(loss, x, y, reduction):
    loss = copy.deepcopy(loss)
    loss.reduction = reduction
    x = x.clone().requires_grad_()
    res = loss(x, y)
    assert type(res) is torch.Tensor
    close(res, loss(plain(x), plain(y)))
    res.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_inputs_are_never_modified():
    x, y, w = rand(4, 3), tensor([0, -100, 2, 1]), tensor([1., 2., 3.], dtype=torch.float64)
    before = x.clone(), y.clone(), w.clone()
    value_and_grad(LabelSmoothingCrossEntropyFlat(.1, weight=w), x, y)
    for a, b in zip((x, y, w), before): assert torch.equal(a, b)
    t = randint(2, 4, 3).double()
    kept = t.clone()
    value_and_grad(LabelSmoothingBCEWithLogitsFlat(.1), x, t)
    assert torch.equal(t, kept)


def test_no_gradient_under_no_grad():
    x = rand(4, 3).requires_grad_()
    with torch.no_grad(): loss = LabelSmoothingCrossEntropyFlat(.1)(x, randint(3, 4))
    assert not loss.requires_grad


def test_torch_compile_without_a_graph_break():
    x, y = rand(4, 3, dtype=torch.float32), randint(3, 4)
    for loss, target in ((LabelSmoothingCrossEntropy(.1), y),
                         (LabelSmoothingBCEWithLogits(.1), F.one_hot(y, 3).float())):
        compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
        (l1, g1), (l2, g2) = value_and_grad(compiled, x, target), value_and_grad(loss, x, target)
        close(l1, l2); close(g1, g2)


# ---------------------------------------------------------------- buffers

W, PRIOR = tensor([1., 2., 3.]), tensor([.5, .25, .25])


def modules():
    return [(LabelSmoothingCrossEntropy(.1, weight=W, prior=PRIOR), ['weight', 'prior']),
            (LabelSmoothingBCEWithLogits(.1, weight=W, prior=PRIOR, pos_weight=W), ['weight', 'prior', 'pos_weight'])]


@pytest.mark.parametrize('i', [0, 1])
def test_weights_are_buffers(i):
    m, names = modules()[i]
    assert set(names) <= set(m.state_dict())
    assert [type(p) for p in m.parameters()] == []
    m.to(torch.float64)
    for n in names: assert getattr(m, n).dtype == torch.float64
    m.to('meta')
    for n in names: assert getattr(m, n).device.type == 'meta'
    other = modules()[i][0]
    state = {n: t*0 + 1/3 for n, t in modules()[i][0].state_dict().items()}
    other.load_state_dict(state)
    for n in names: close(getattr(other, n), torch.full((3,), 1/3))


@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropyFlat(weight=W), LabelSmoothingBCEWithLogitsFlat(weight=W)])
def test_to_moves_the_weights(loss):
    "EVIDENCE row 15: fastai calls `loss_func.to(device)` in before_fit"
    loss = copy.deepcopy(loss)
    loss.to(torch.device('meta'))
    assert loss.func.weight.device.type == 'meta'


def test_weights_follow_the_logits_dtype():
    "float32 weights, float64 or half logits: no dtype error, and double precision is kept"
    y = tensor([0, 1, 2, 1])
    loss = LabelSmoothingCrossEntropyFlat(.1, weight=W)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        x = rand(4, 3).to(dtype)
        assert torch.isfinite(loss(x, y))
    x = rand(4, 3)
    close(loss(x, y), F.cross_entropy(x, y, W.double(), label_smoothing=.1))


@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat,
                                 LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat])
def test_backend_can_be_asked_for(cls):
    x = rand(4, 3)
    y = randint(3, 4) if 'Cross' in cls.__name__ else randint(2, 4, 3).double()
    close(cls(backend='torch')(x, y), cls(backend='auto')(x, y))
    with pytest.raises(ValueError): cls(backend='abacus')(x, y)


# ---------------------------------------------------------------- pickling

def public_losses():
    return [LabelSmoothingCrossEntropyFlat(.3, weight=W, reduction='sum'),
            LabelSmoothingCrossEntropyFlat(.3, prior=PRIOR, ignore_index=1, axis=1),
            LabelSmoothingCrossEntropyFlat(.3, spread='others', flatten=False),
            LabelSmoothingCrossEntropy(.3, weight=W, prior=PRIOR),
            LabelSmoothingBCEWithLogitsFlat(.2, weight=W, pos_weight=W, prior=PRIOR, thresh=.7),
            LabelSmoothingBCEWithLogits(.2, pos_weight=W, reduction='none')]


def torch_saved(o):
    f = io.BytesIO()
    torch.save(o, f)
    f.seek(0)
    return torch.load(f, weights_only=False)


WAYS = dict(pickle=lambda o: pickle.loads(pickle.dumps(o)), protocol2=lambda o: pickle.loads(pickle.dumps(o, 2)),
            cloudpickle=lambda o: pickle.loads(cloudpickle.dumps(o)), deepcopy=copy.deepcopy, torch_save=torch_saved)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('i', range(6))
def test_pickling_before_and_after_a_call(i, way):
    "EVIDENCE row 6"
    loss = public_losses()[i]
    x, sigmoid = rand(4, 3, dtype=torch.float32), 'BCE' in type(loss).__name__
    y = randint(2, 4, 3).float() if sigmoid else tensor([0, 1, 2, 0])
    fresh = WAYS[way](loss)
    expected, grad = value_and_grad(loss, x, y)
    for o in (fresh, WAYS[way](loss), WAYS[way](fresh)):
        assert type(o) is type(loss) and o is not loss
        assert o.reduction == loss.reduction
        if hasattr(loss, 'eps'): assert o.eps == loss.eps
        l, g = value_and_grad(o, x, y)
        close(l, expected); close(g, grad)
        close(o.activation(x), loss.activation(x))
        assert torch.equal(o.decodes(x), loss.decodes(x))


def test_a_deep_copy_is_its_own():
    a = LabelSmoothingCrossEntropyFlat(.1)
    b = copy.deepcopy(a)
    b.eps, b.reduction = .5, 'sum'
    assert (a.eps, a.reduction) == (.1, 'mean')
    close(a(SEED_LOGITS, SEED_TARGET), F.cross_entropy(SEED_LOGITS, SEED_TARGET, label_smoothing=.1))


# ---------------------------------------------------------------- bad input, told when built

SOFTMAX = [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat]
SIGMOID = [LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat]


@pytest.mark.parametrize('cls', SOFTMAX)
@pytest.mark.parametrize('kwargs,match', [
    (dict(eps=1.5), '1.5'), (dict(eps=-.1), '-0?.1'), (dict(eps=float('nan')), 'nan'),
    (dict(eps=tensor([.1, 1.5, .2])), '1.5'),
    (dict(prior=tensor([.5, .4, .3])), '(?i)sum|1.2'), (dict(prior=tensor([1.5, -.5, 0.])), '(?i)negative|-0?.5'),
    (dict(prior=tensor([[.5, .5], [.5, .6]])), '(?i)sum|1.1'), (dict(prior=tensor([[.3, .3, .4]])), None),
    (dict(prior=tensor([float('nan'), .5, .5])), None),
    (dict(weight=tensor([1., -2., 1.])), '(?i)negative|-2'), (dict(weight=torch.ones(2, 2)), None),
    (dict(spread='some'), 'some'), (dict(reduction='average'), 'average'),
    (dict(spread='others', prior=PRIOR), '(?i)prior|spread'), (dict(multi_hot=True, prior=PRIOR), '(?i)prior|multi')])
def test_bad_arguments_of_the_softmax_losses(cls, kwargs, match):
    with pytest.raises(ValueError, match=match): cls(**kwargs)


@pytest.mark.parametrize('cls', SIGMOID)
@pytest.mark.parametrize('kwargs,match', [
    (dict(eps=.6), '.6'), (dict(eps=-.1), '-0?.1'), (dict(eps=float('nan')), 'nan'),
    (dict(prior=tensor([.5, 1.2, .3])), '(?i)1.2|prior'), (dict(prior=tensor([.5, -.2, .3])), '(?i)-0?.2|prior'),
    (dict(pos_weight=tensor([1., -2., 1.])), '(?i)negative|-2'), (dict(weight=tensor([1., -2., 1.])), None),
    (dict(reduction='average'), 'average')])
def test_bad_arguments_of_the_sigmoid_losses(cls, kwargs, match):
    with pytest.raises(ValueError, match=match): cls(**kwargs)


@pytest.mark.parametrize('cls', SIGMOID)
@pytest.mark.parametrize('kwargs', [dict(spread='others'), dict(multi_hot=True)])
def test_no_flag_of_the_softmax_head_is_accepted_and_ignored(cls, kwargs):
    with pytest.raises((ValueError, TypeError)): cls(**kwargs)


def test_a_sigmoid_prior_need_not_sum_to_one():
    LabelSmoothingBCEWithLogitsFlat(prior=tensor([.9, .9, .1]))


@pytest.mark.parametrize('kwargs', [dict(weight=torch.ones(4)), dict(prior=torch.full((4,), .25)),
                                    dict(prior=torch.full((4, 4), .25)), dict(eps=torch.full((4,), .1))])
def test_a_wrong_number_of_classes_names_both(kwargs):
    with pytest.raises(ValueError, match=r'(?s)4.*3|3.*4'):
        LabelSmoothingCrossEntropyFlat(**kwargs)(rand(2, 3), tensor([0, 1]))


@pytest.mark.parametrize('kwargs', [dict(prior=torch.full((4,), .25)), dict(pos_weight=torch.ones(4)),
                                    dict(weight=torch.ones(4))])
def test_a_wrong_number_of_labels(kwargs):
    with pytest.raises(ValueError): LabelSmoothingBCEWithLogitsFlat(**kwargs)(rand(2, 3), randint(2, 2, 3).double())


def test_eps_of_each_class_needs_class_indices():
    with pytest.raises(ValueError):
        LabelSmoothingCrossEntropyFlat(eps=tensor([.1, .2, .3]))(rand(2, 3), rand(2, 3).softmax(-1))


def test_shapes_that_do_not_match():
    with pytest.raises(ValueError): LabelSmoothingBCEWithLogitsFlat()(rand(4, 3), randint(2, 4, 2).double())
    with pytest.raises(ValueError): LabelSmoothingCrossEntropyFlat()(rand(4, 3), tensor([0, 1, 2]))


@pytest.mark.parametrize('name,value', [('axis', 1), ('ignore_index', 1), ('spread', 'others'), ('multi_hot', True)])
def test_what_is_set_on_a_flat_loss_takes_effect(name, value):
    "As if it had been built so (fastai's BaseLoss copies the module's attributes, where setting them does nothing)"
    loss, built = LabelSmoothingCrossEntropyFlat(), LabelSmoothingCrossEntropyFlat(**{name: value})
    setattr(loss, name, value)
    x = torch.randn(6, 3, 3)
    y = (torch.rand(6, 3, 3) > .5).float() if name == 'multi_hot' else torch.randint(0, 3, (6, 3))
    assert getattr(loss, name) == value and torch.equal(loss(x, y), built(x, y))


@pytest.mark.parametrize('eps', [True, '0.1', None, [.1]])
def test_eps_that_is_no_number(eps):
    "True would be 1.0"
    with pytest.raises(TypeError, match='eps'): LabelSmoothingCrossEntropyFlat(eps)


def test_flip_is_warned_of_when_eps_is_set_later():
    checks._warn_flip.cache_clear()
    loss = LabelSmoothingCrossEntropyFlat(.01, weight=tensor([1., 50, 1]))
    with pytest.warns(UserWarning, match='outweigh'): loss.eps = .9


def test_a_single_class_in_a_column():
    assert LabelSmoothingCrossEntropyFlat()(torch.randn(4, 1), torch.zeros(4, 1).long()) == 0


def test_eps_of_one_call_is_checked():
    x, y = torch.randn(2, 3), tensor([0, 1])
    for eps in (5., tensor([2., .1, .1])):
        with pytest.raises(ValueError, match='eps'): LabelSmoothingCrossEntropy()(x, y, eps=eps)


@pytest.mark.parametrize('name', ['weight', 'pos_weight', 'prior'])
def test_a_list_where_a_tensor_belongs(name):
    from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as f
    with pytest.raises(TypeError, match=name): f(torch.randn(2, 3), torch.ones(2, 3), **{name: [.5, .5, .5]})


@pytest.mark.parametrize('option', ['weight', 'pos_weight'])
def test_complex_weights_are_refused_where_nothing_has_values(option):
    with FakeTensorMode(), pytest.raises(TypeError, match=f'^{option} must be of real numbers'):
        LabelSmoothingBCEWithLogits(**{option: torch.ones(3, dtype=torch.complex64)})
    with FakeTensorMode(), pytest.raises(TypeError, match=f'^{option} must be of real numbers'):
        smooth_binary_cross_entropy_with_logits(torch.randn(2, 3), torch.rand(2, 3), **{option: torch.ones(3, dtype=torch.complex64)})


# ---------------------------------------------------------------- messages that say what to do

@pytest.mark.parametrize('axis,fits', [(-1, 1), (2, 1)])
def test_message_names_the_axis_that_fits(axis, fits):
    "masks under a loss whose classes are along another axis"
    x, y = rand(2, 3, 4, 5), randint(3, 2, 4, 5)
    with pytest.raises(ValueError, match=f'axis={fits} fits'): LabelSmoothingCrossEntropyFlat(axis=axis, flatten=False)(x, y)
    with pytest.raises(ValueError) as e: LabelSmoothingCrossEntropyFlat(axis=axis, flatten=False)(x, y[:, :2])
    assert 'fits' not in str(e.value)
    with pytest.raises(ValueError) as e: LabelSmoothingCrossEntropyFlat()(rand(4, 3), randint(3, 3))   # as many rows as there are classes
    assert 'fits' not in str(e.value)


def test_message_names_the_ignore_index_that_helps():
    x, y = rand(2, 3), tensor([0, 255])
    with pytest.raises(IndexError, match='class index 255 at row 1 .*; ignore_index=255 leaves such rows out'): LabelSmoothingCrossEntropyFlat()(x, y)
    assert LabelSmoothingCrossEntropyFlat(ignore_index=255)(x, y).isfinite()
    with pytest.raises(IndexError) as e: LabelSmoothingCrossEntropyFlat()(x, tensor([1, 3]))   # labels numbered from 1: no rows to leave out
    assert str(e.value) == 'class index 3 at row 1 is out of range for 3 classes'


def test_message_says_why_labels_stop_at_half():
    with pytest.raises(ValueError, match=r'eps must be in \[0, 0.5\], got 0.6 .*at .5 they are the same'): LabelSmoothingBCEWithLogits(.6)
    with pytest.raises(ValueError) as e: LabelSmoothingCrossEntropy(1.1)
    assert str(e.value) == 'eps must be in [0, 1], got 1.1'


# ---------------------------------------------------------------- soft targets on a GPU

@pytest.mark.parametrize('cls', [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat])
def test_soft_targets_on_a_gpu_are_looked_at_once(monkeypatch, cls):
    "As if the CPU were a GPU: in the first batch, for each look makes a GPU wait; and again after an error, which is not an answer"
    looks = []
    def check(target, axis):
        looks.append(axis)
        if len(looks) == 1: raise ValueError('rows sum to 2')
    monkeypatch.setattr(losses, 'check_soft_rows', check)
    soft = rand(6, 4).softmax(1)
    cls()(rand(6, 4), soft)
    assert not looks   # a CPU looks each time, elsewhere
    monkeypatch.setattr(losses, '_is_soft_on_gpu', lambda t: t.is_floating_point())
    loss = cls()
    loss(rand(6, 4), randint(4, 6))
    with pytest.raises(ValueError, match='rows sum to 2'): loss(rand(6, 4), soft)
    for _ in range(3): loss(rand(6, 4), soft)
    cls(multi_hot=True)(rand(6, 4), soft)
    assert looks == [1, 1]
    pickle.loads(pickle.dumps(loss))(rand(6, 4), soft)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_multi_hot_floats_on_a_gpu():
    loss, x, y = LabelSmoothingCrossEntropyFlat(), rand(6, 4).cuda(), (rand(6, 4) > 0).double().cuda()
    for _ in range(2):
        with pytest.raises(ValueError, match='multi_hot=True'): loss(x, y)


# ---------------------------------------------------------------- an eps at its end, and what a loss shows

TOP = [(LabelSmoothingCrossEntropy, 1.), (LabelSmoothingCrossEntropyFlat, 1.), (LabelSmoothingBCEWithLogits, .5), (LabelSmoothingBCEWithLogitsFlat, .5)]


@pytest.mark.parametrize('cls,top', TOP)
def test_targets_that_teach_nothing_are_warned_of_once(cls, top):
    "Where eps is set: when built, or later; not at each call, nor for the same eps again"
    with pytest.warns(UserWarning, match=rf'eps=(1|\.5) .*nothing to learn') as said: loss = cls(top)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        loss.eps = top
        loss(rand(3, 4), randint(4, 3) if top == 1. else randint(2, 3, 4))
        copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
        loss.eps = top/2
        cls(top - .01)
    with pytest.warns(UserWarning, match='nothing to learn') as said: loss.eps = top
    assert len(said) == 1


@pytest.mark.parametrize('loss,text', [
    (lambda: LabelSmoothingCrossEntropy(), "LabelSmoothingCrossEntropy(eps=0.1, reduction='mean')"),
    (lambda: LabelSmoothingCrossEntropy(tensor([.1, .2]), weight=tensor([1., 1/3]), axis=-1),
     "LabelSmoothingCrossEntropy(eps=[0.1, 0.2], reduction='mean', weight=[1.0, 0.333], axis=-1)"),
    (lambda: LabelSmoothingCrossEntropy(prior=torch.full((20,), .05), ignore_index=255),
     "LabelSmoothingCrossEntropy(eps=0.1, reduction='mean', prior=Tensor[20], ignore_index=255)"),
    (lambda: LabelSmoothingCrossEntropyFlat(multi_hot=True, spread='others', backend='torch'),
     "FlattenedLoss of LabelSmoothingCrossEntropy(eps=0.1, reduction='mean', backend='torch', spread='others', multi_hot=True)"),
    (lambda: LabelSmoothingCrossEntropyFlat(axis=1, flatten=False, reduction='none'),
     "FlattenedLoss of LabelSmoothingCrossEntropy(eps=0.1, reduction='none', axis=1), flatten=False"),
    (lambda: LabelSmoothingBCEWithLogitsFlat(pos_weight=tensor([2.]), thresh=.3),
     "FlattenedLoss of LabelSmoothingBCEWithLogits(eps=0.05, reduction='mean', pos_weight=[2.0], thresh=0.3)")])
def test_a_loss_shows_its_options_but_for_the_default_ones(loss, text): assert repr(loss()) == text


def test_a_subclass_shows_them_too():
    class Mine(LabelSmoothingCrossEntropy):
        def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs)
    assert repr(Mine(.2, ignore_index=3)) == "Mine(eps=0.2, reduction='mean', ignore_index=3)"


# ---------------------------------------------------------------- the loss of a Learner

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_base_loss_finds_the_loss_under_mixup(mix):
    "for as long as theirs stands in its place, which is what `MixHandler.before_train` and `after_train` do"
    learn, loss = SimpleNamespace(loss_func=LabelSmoothingCrossEntropyFlat()), nn.Linear(2, 2)
    cb, ours = mix(), learn.loss_func
    cb.learn = learn
    assert losses.base_loss(ours) is ours and losses.base_loss(loss.forward) == loss.forward
    cb.before_train()
    assert learn.loss_func == cb.lf and losses.base_loss(learn.loss_func) is ours
    cb.after_train()
    assert losses.base_loss(learn.loss_func) is learn.loss_func is ours


@pytest.mark.parametrize('loss,name', [
    (F.cross_entropy, 'cross_entropy'), (nn.BCEWithLogitsLoss(), 'BCEWithLogitsLoss'), (fastai_losses.CrossEntropyLossFlat(), 'CrossEntropyLossFlat'),
    (LabelSmoothingCrossEntropyFlat(), 'LabelSmoothingCrossEntropyFlat'), (fastai_losses.MSELossFlat(), 'BaseLoss of MSELoss')])
def test_loss_name(loss, name): assert losses.loss_name(loss) == name


@pytest.mark.parametrize('loss_cls,top,eps', [(LabelSmoothingCrossEntropy, 1, 2.5), (LabelSmoothingBCEWithLogits, .5, .75)])
def test_eps_out_of_range_names_the_range(loss_cls, top, eps):
    with pytest.raises(ValueError, match=rf'in \[0, {top}\], got {eps}'): loss_cls(eps)
