"What mutations of single tokens found that no other test noticed."
import pytest
from torch.autograd import forward_ad

from helpers import *
from fastai_smooth.all import *
import fastai_smooth.distributed
from reference import distance, loss_and_grad


def test_one_eps_a_class_may_be_1():
    "and 0: both ends of the range are in it"
    q = smooth_targets(torch.tensor([0, 1]), 2, torch.tensor([1., 0.]))
    assert q.tolist() == [[.5, .5], [0, 1]]


def test_a_prior_of_integers_sums_to_1():
    assert smooth_targets(torch.tensor([0]), 2, .5, prior=torch.tensor([0, 1])).tolist() == [[.5, .5]]
    with pytest.raises(ValueError, match='sum to 1, got 2'): smooth_targets(torch.tensor([0]), 2, prior=torch.tensor([1, 1]))


@pytest.mark.parametrize('index', [-1, 3, 4])
def test_torch_func_class_index_out_of_range_is_nan(index):
    "where values can't be looked at; the least and the first that are out of range, too"
    x, y = torch.randn(2, 3), torch.tensor([[0], [index]])
    loss = torch.func.vmap(smooth_cross_entropy)(x[:, None], y)
    assert distance(loss[0], smooth_cross_entropy(x[:1], y[0])) < 1e-6 and loss[1].isnan()


def test_torch_func_one_class():
    "ignored rows look up a class that is there"
    x, y = torch.randn(2, 1, 1), torch.tensor([[0], [-100]])
    assert torch.func.vmap(partial(smooth_cross_entropy, weight=torch.tensor([2.])))(x, y).tolist() == [0, 0]


@pytest.mark.parametrize('loss_func,target', [(smooth_cross_entropy, torch.tensor([0, 2, 1, 1])), (smooth_binary_cross_entropy_with_logits, torch.eye(4, 3))])
def test_forward_mode_without_torch_func(loss_func, target):
    x, along = torch.randn(4, 3), torch.randn(4, 3)
    loss, grad = loss_and_grad(loss_func, x, target)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(loss_func(forward_ad.make_dual(x, along), target))
        assert distance(out.primal, loss) < 1e-6 and distance(out.tangent, (grad * along).sum()) < 1e-6


def test_callbacks_after_it_see_the_smoothed_loss_in_loss_grad():
    "its value, too: what is backpropagated, and is reported to be"
    seen = Spy(lambda l: (l.loss_grad.item(), l.loss.item(), smooth_binary_cross_entropy_with_logits(l.pred, l.y.round(), .2).item()), 'before_backward')
    learn = tensor_learner(multi_dls(), mlp(), BCEWithLogitsLossFlat(), cbs=[MultiLabelSmoothingCallback(.2), seen])
    learn.fit(1)
    assert len(seen.seen) == 3
    for _, (grad, loss, expected) in seen.seen: assert grad == pytest.approx(loss) == pytest.approx(expected)


@pytest.mark.parametrize('loss_cls,top,eps', [(LabelSmoothingCrossEntropy, 1, 2.5), (LabelSmoothingBCEWithLogits, .5, .75)])
def test_eps_out_of_range_names_the_range(loss_cls, top, eps):
    with pytest.raises(ValueError, match=rf'in \[0, {top}\], got {eps}'): loss_cls(eps)


def test_global_mean_asks_others_in_training_alone(monkeypatch):
    "in validation processes may have unlike numbers of batches: one would wait for ever"
    asked, dls = [], single_dls()
    monkeypatch.setattr(fastai_smooth.distributed, 'global_mean', lambda loss_sum, n, group: asked.append(n.item()) or loss_sum / n)
    tensor_learner(dls, mlp(k=4), CrossEntropyLossFlat(), cbs=GlobalMean()).fit(1)
    assert asked == [16]*len(dls.train) and len(dls.valid)


@pytest.mark.parametrize('first', [True, False], ids=['added first', 'added last'])
def test_global_mean_keeps_what_others_make_of_the_loss(first):
    "One process, whose mean it is: gradient accumulation divides what it puts there"
    def trained(*cbs):
        set_seed(1)
        learn = tensor_learner(single_dls(bs=4), mlp(k=4), LabelSmoothingCrossEntropyFlat(.1, weight=torch.tensor([.2, 1, 3, .5])), cbs=list(cbs), opt_func=SGD)
        learn.fit(1, .1)
        return weights(learn)
    pair = [GlobalMean(), GradientAccumulation(8)]
    assert distance(trained(*(pair if first else pair[::-1])), trained(GradientAccumulation(8))) < 1e-6 < 1e-3 < distance(trained(GradientAccumulation(8)), trained())


def test_a_row_of_a_class_conditional_prior_sums_to_1():
    with pytest.raises(ValueError, match='^every row of prior must sum to 1, got 2'): smooth_targets(torch.tensor([0]), 2, prior=torch.tensor([[.5, .5], [1, 1]]))


def test_one_row_larger_than_a_piece():
    x, y = torch.randn(1, 300_000), torch.tensor([7])
    assert distance(smooth_cross_entropy(x, y), torch.nn.functional.cross_entropy(x.double(), y, label_smoothing=.1)) < 1e-6
    x.requires_grad_()
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(x.double(), y, label_smoothing=.1), x)[0]
    assert distance(torch.autograd.grad(smooth_cross_entropy(x, y), x)[0], expected) < 1e-6
