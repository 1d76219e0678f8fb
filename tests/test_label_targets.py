"""Every target that fastai makes for a sigmoid loss, beside a float64 loop over its elements: `smooth_targets`, both losses, and what
`MultiLabelSmoothingCallback` trains with are one smoothing, which fastai's own loss of the smoothed target agrees with."""
import pytest

from helpers import *
from fastai_smooth.all import *
from reference import distance

gen = torch.Generator().manual_seed(0)
def hot(*shape): return (torch.rand(shape, generator=gen) < .4).float()
def soft(*shape): return torch.rand(shape, generator=gen)
def unknown(*shape): return torch.where(torch.rand(shape, generator=gen) < .2, math.nan, hot(*shape))

# name: (target, shape of the logits, number of labels)
CASES = {
    'multi-hot': (hot(6, 3), (6, 3), 3), 'bool': (hot(6, 3).bool(), (6, 3), 3), 'uint8': (hot(6, 3).byte(), (6, 3), 3), 'int64': (hot(6, 3).long(), (6, 3), 3),
    'float16': (hot(6, 3).half(), (6, 3), 3), 'float64': (hot(6, 3).double(), (6, 3), 3), 'one row': (hot(1, 3), (1, 3), 3),
    'TensorMultiCategory': (TensorMultiCategory(hot(6, 3)), (6, 3), 3), 'mixed by MixUp': (TensorMultiCategory(soft(6, 3)), (6, 3), 3),
    'unknown labels': (unknown(6, 3), (6, 3), 3), 'unknown TensorMultiCategory': (TensorMultiCategory(unknown(6, 3)), (6, 3), 3),
    'events (N,)': (hot(6), (6,), 1), 'events (N,), (N,1) logits': (hot(6), (6, 1), 1), 'events of int64, (N,1) logits': (hot(6).long(), (6, 1), 1),
    'tabular (N,1)': (hot(6, 1), (6, 1), 1), 'tabular (N,1), (N,) logits': (hot(6, 1), (6,), 1), 'unknown events, (N,1) logits': (unknown(6), (6, 1), 1),
    'TensorCategory (N,), (N,1) logits': (TensorCategory(hot(6).long()), (6, 1), 1), 'TensorCategory (N,1)': (TensorCategory(hot(6, 1).long()), (6, 1), 1),
    'mask': (hot(2, 3, 4), (2, 3, 4), 1), 'TensorMask, (N,1,H,W) logits': (TensorMask(hot(2, 3, 4).byte()), (2, 1, 3, 4), 1),
    'TensorMask of int64': (TensorMask(hot(2, 3, 4).long()), (2, 3, 4), 1), 'mask of bool, (N,1,H,W) logits': (hot(2, 3, 4).bool(), (2, 1, 3, 4), 1),
    'mask with a channel, (N,H,W) logits': (hot(2, 1, 3, 4), (2, 3, 4), 1), 'unknown pixels, (N,1,H,W) logits': (unknown(2, 3, 4), (2, 1, 3, 4), 1),
    'masks (N,K,H,W)': (TensorMask(hot(2, 3, 4, 5)), (2, 3, 4, 5), 3), 'masks of uint8': (hot(2, 3, 4, 5).byte(), (2, 3, 4, 5), 3), 'unknown masks': (unknown(2, 3, 4, 5), (2, 3, 4, 5), 3)}
PRIOR, BOTH = tensor([.4, .1, .02]), tensor([[.1, .3, .02], [.2, .9, 1.]])
SMOOTHINGS = {'number': dict(eps=.1), 'none': dict(eps=0.), 'one side': dict(eps=(.1, 0.)), 'pair': dict(eps=(.2, .05)), 'prior': dict(eps=.1, prior=PRIOR), 'both priors': dict(eps=.3, prior=BOTH)}
every_case, every_smoothing = pytest.mark.parametrize('case', CASES), pytest.mark.parametrize('smoothing', SMOOTHINGS)

def by_loop(case, smoothing):
    "q and the loss of each element, in the order that the target lies in; the logits; the options for so many labels"
    target, shape, k = CASES[case]
    options = {n: v[..., :k] if isinstance(v, Tensor) else v for n, v in SMOOTHINGS[smoothing].items()}
    x = 3*torch.randn(shape, generator=torch.Generator().manual_seed(1))
    which = torch.arange(k).view(k, *[1]*max(0, len(shape)-2)).expand(shape).flatten().tolist() if k > 1 else [0]*x.numel()
    q, losses = [], []
    for y, z, label in zip(target.as_subclass(Tensor).double().flatten().tolist(), x.double().flatten().tolist(), which):
        e0, e1 = options['eps'] if isinstance(options['eps'], tuple) else (options['eps'],)*2
        if 'prior' in options:
            u0, u1 = options['prior'].double().expand(2, k)[:, label].tolist()
            e0, e1 = 2*options['eps']*u0, 2*options['eps']*(1-u1)
        q.append((1-y)*e0 + y*(1-e1))
        losses.append(q[-1]*math.log1p(math.exp(-z)) + (1-q[-1])*math.log1p(math.exp(z)))
    return tensor(q, dtype=torch.float64), tensor(losses, dtype=torch.float64), x, options

def plain(t): return t.detach().as_subclass(Tensor)

@every_case
@every_smoothing
def test_smooth_targets(case, smoothing):
    "has the shape of the target, nan where a label is unknown, and the dtype and class of a target that is floating"
    target, (q, _, _, options) = CASES[case][0], by_loop(case, smoothing)
    res = smooth_targets(target, sigmoid=True, **options)
    assert res.shape == target.shape and res.dtype == (target.dtype if target.is_floating_point() else torch.float32)
    if target.is_floating_point(): assert type(res) is type(target)
    assert distance(plain(res).flatten(), q) < (1e-3 if target.dtype == torch.float16 else 1e-6)

@every_case
@every_smoothing
def test_losses(case, smoothing):
    "Both, in each reduction; the Flat one takes a target of another shape with as many elements, and gives losses in its order. An unknown label is nan alone"
    target, (_, losses, x, options) = CASES[case][0], by_loop(case, smoothing)
    def expected(reduction): return losses if reduction == 'none' else getattr(losses, reduction)()
    for reduction in ('none', 'sum', 'mean'):
        flat = LabelSmoothingBCEWithLogitsFlat(reduction=reduction, **options)
        assert distance(flat(x, target), expected(reduction)) < 1e-6 and distance(flat(TensorBase(x), target), expected(reduction)) < 1e-6
        module = LabelSmoothingBCEWithLogits(reduction=reduction, **options)
        res = module(x, target.reshape(x.shape))
        assert res.shape == (x.shape if reduction == 'none' else ()) and distance(res.flatten() if reduction == 'none' else res, expected(reduction)) < 1e-6
        if target.shape != x.shape:
            with pytest.raises(ValueError, match='target'): module(x, target)

@every_case
@every_smoothing
def test_fastais_loss_of_the_smoothed_target(case, smoothing):
    "BCEWithLogitsLossFlat of q is the loss of the target: the number, and its gradient"
    target, (_, losses, x, options) = CASES[case][0], by_loop(case, smoothing)
    q = smooth_targets(target.float() if target.dtype == torch.float16 else target, sigmoid=True, **options)
    found = []
    for loss, y in ((BCEWithLogitsLossFlat(), q), (LabelSmoothingBCEWithLogitsFlat(**options), target)):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, y)
        found.append((plain(value), *torch.autograd.grad(value.as_subclass(Tensor), leaf)))
    for a, b in zip(*found): assert distance(plain(b), plain(a)) < 1e-6

class GivenLogits(nn.Module):
    "Predicts these, whatever it is given"
    def __init__(self, x):
        super().__init__()
        self.logits = nn.Parameter(x)
    def forward(self, _): return self.logits

class OneStep(Callback):
    "Keeps the target that is backpropagated, the loss and the gradient of the logits; and ends the fit"
    order = 1000
    def before_backward(self): self.target = self.yb[0]
    def before_step(self):
        self.found = self.loss.detach(), self.model.logits.grad
        raise CancelFitException()

@every_case
@every_smoothing
def test_callback(case, smoothing):
    "trains with the same target, in the shape that it came in, and so with the same gradient"
    target, (q, losses, x, options) = CASES[case][0], by_loop(case, smoothing)
    dl = DataLoader([0], bs=1, num_workers=0, create_batch=lambda _: (torch.zeros(1), target))
    step = OneStep()
    tensor_learner(DataLoaders(dl, dl, device=CPU), GivenLogits(x), BCEWithLogitsLossFlat(), cbs=[MultiLabelSmoothingCallback(**options), step]).fit(1)
    tol = 1e-3 if target.dtype == torch.float16 else 1e-6
    assert step.target.shape == target.shape and distance(plain(step.target).flatten(), q) < tol
    loss, grad = map(plain, step.found)
    assert distance(loss, losses.mean()) < tol and distance(grad.flatten(), (x.double().sigmoid().flatten() - q)/x.numel()) < tol
