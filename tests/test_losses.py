"The modules and fastai losses: against the float64 reference in random settings, fastai's and PyTorch's own losses, and numbers worked by hand."
import copy, pickle, warnings
from functools import partial
from fractions import Fraction
from types import SimpleNamespace

import cloudpickle, fastai.losses as theirs, hypothesis, numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import TensorBase, TensorCategory, TensorImage, TensorMultiCategory
from fastai.callback.mixup import CutMix, MixUp
from hypothesis import strategies as st
from torch import nn, tensor
from torch._subclasses import FakeTensorMode

import fuzz
from fastai_smooth import losses
from fastai_smooth.kernels import checks
from fastai_smooth.losses import *
from fastai_smooth.losses import given_axis, label_axis_of
from fastai_smooth.scaling import NormalizedTemperature, apply_temperature
from reference import REDUCTIONS, distance, loss_and_grad, sigmoid_reference, softmax_reference

SOFTMAX = [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat]
SIGMOID = [LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat]
softmax, sigmoid, both = (pytest.mark.parametrize('cls', o) for o in (SOFTMAX, SIGMOID, SOFTMAX + SIGMOID))
W, PRIOR = tensor([1., 2., 3.]), tensor([.5, .25, .25])
X, INDEX, HOT = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), tensor([0, 1, 2, 0]), tensor([[1., 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]])

def is_flat(cls): return 'Flat' in cls.__name__
def target_of(cls): return HOT if 'BCE' in cls.__name__ else INDEX
def close(a, b, atol=1e-6): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=atol, rtol=1e-5, check_dtype=False)

def examples(n, strategy):
    settings = hypothesis.settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    return lambda f: pytest.mark.filterwarnings('ignore')(settings(hypothesis.given(strategy)(f)))

# ---------------------------------------------------------------- values

SEED = tensor([[0, .2, .7, .1, 0], [0, .9, .2, .2, 1], [1, .2, .7, .9, 1]]), tensor([2, 1, 0])
FORUM = tensor([[2., 1., 0., -1.]]), tensor([[1., 1., 0., 0.]])   # -log p = [.440190, 1.440190, 2.440190, 3.440190]

@softmax
@pytest.mark.parametrize('options,xy,value', [
    (dict(eps=.5), SEED, 1.4670),
    # https://forums.fast.ai/t/can-label-smoothing-be-used-for-multi-label-images/46673: q = [.475, .475, .025, .025]
    (dict(multi_hot=True), FORUM, .475*(.440190+1.440190) + .025*(2.440190+3.440190)),
    # and of the same thread, (1-eps)/n and eps/(K-n): q = [.45, .45, .05, .05]
    (dict(multi_hot=True, spread='others'), FORUM, .45*(.440190+1.440190) + .05*(2.440190+3.440190))])
def test_softmax_values_worked_by_hand(cls, options, xy, value): close(cls(**options)(*xy), value, atol=5e-5)

@sigmoid
def test_a_positive_becomes_one_minus_eps_and_a_negative_eps(cls):
    "softplus(2) - .9*2 = .326928, softplus(-1) + .1 = .413262; the gradient is (sigmoid - q)/2; MixUp's .7 becomes .66"
    loss, grad = loss_and_grad(cls(.1), tensor([[2., -1.]]), tensor([[1., 0.]]))
    close(loss, (.326928 + .413262)/2)
    close(grad, [[(.880797-.9)/2, (.268941-.1)/2]])
    close(cls(.1)(X[:1, :1], tensor([[.7]])), F.binary_cross_entropy_with_logits(X[:1, :1], tensor([[.66]])))

@st.composite
def softmax_calls(draw):
    "Options, logits and targets"
    k, rows = draw(st.integers(1, 4)), draw(st.lists(st.integers(1, 3), max_size=3))
    def rand(*shape): return fuzz.rand(draw, *shape).double() + .01
    axis, kind = draw(st.integers(0, len(rows))), draw(st.sampled_from(['index', 'soft', 'multi_hot']))
    shape = [*rows[:axis], k, *rows[axis:]]
    y = fuzz.randint(draw, k, *rows) if kind == 'index' else rand(*shape) < .5 if kind == 'multi_hot' else (3*rand(*shape)).softmax(axis)
    options = dict(eps=draw(st.floats(0, 1)), axis=draw(st.sampled_from([axis, axis - len(shape)])), reduction=draw(st.sampled_from(REDUCTIONS)),
                   multi_hot=kind == 'multi_hot', weight=rand(k) if draw(st.booleans()) else None)
    if kind == 'index': options |= draw(st.sampled_from([{}, dict(eps=rand(k).clamp(max=1)), dict(ignore_index=0)]))
    priors = ([] if kind == 'multi_hot' else [rand(k)]) + ([rand(k, k)] if kind == 'index' else [])
    options |= draw(st.sampled_from([{}, dict(spread='others'), *(dict(prior=p/p.sum(-1, keepdim=True)) for p in priors)]))
    return options, 6*(rand(*shape) - .5), y

@st.composite
def sigmoid_calls(draw):
    def rand(*shape): return fuzz.rand(draw, *shape).double() + .01
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axis = draw(st.sampled_from([None, -1, 0]))
    at = axis if axis is not None or len(shape) == 3 else 0 if len(shape) == 1 else 1   # where the labels are
    k = 1 if at is None else shape[at]
    def some(*shape): return rand(*shape) if draw(st.booleans()) else None
    y = draw(st.sampled_from([rand(*shape).clamp(max=1), rand(*shape) < .5, (rand(*shape) < .5).to(torch.int8)]))
    e0, e1 = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    eps = draw(st.floats(0, .5))
    smoothing = draw(st.sampled_from([dict(eps=eps), dict(eps=(e0, (1-e0)*e1)), dict(eps=(e0, 0.)), dict(eps=eps, prior=rand(k)/2),
                                      dict(eps=eps, prior=torch.stack([rand(k)/3, (1+rand(k))/3]))]))
    options = dict(prior=None) | smoothing | dict(weight=some(*shape), pos_weight=some(shape[-1]), reduction=draw(st.sampled_from(REDUCTIONS)))
    return options, axis, at, 6*(rand(*shape) - .5), y

def agrees(cls, options, x, y, expected):
    loss, grad = loss_and_grad(cls(**options), x, y)
    value = expected[0].flatten() if is_flat(cls) and expected[0].dim() else expected[0]
    assert distance(loss, value) < 1e-9 and distance(grad, expected[1]) < 1e-9

@softmax
@examples(150, softmax_calls())
def test_every_option_of_the_softmax_losses_is_in_the_formula(cls, call): agrees(cls, *call, softmax_reference(*call[1:], **call[0]))

@sigmoid
@examples(100, sigmoid_calls())
def test_every_option_of_the_sigmoid_losses_is_in_the_formula(cls, call):
    "A prior, or each of the two of negatives and positives, lies along the channels of images, the last axis of a matrix, or `axis`; masks have one label"
    options, axis, at, x, y = call
    def along(row): return row if at is None else row.view([-1 if d == at % x.dim() else 1 for d in range(x.dim())])
    prior = options['prior']
    if prior is not None: prior = along(prior) if prior.dim() == 1 else tuple(map(along, prior))
    agrees(cls, options | dict(axis=axis), x, y, sigmoid_reference(x, y, **options | dict(prior=prior)))

@pytest.mark.parametrize('axis,shape', [(-1, (6, 5)), (-1, (3, 4, 7)), (1, (2, 5, 3, 4))], ids=['rows', 'tokens', 'pixels'])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_they_equal_fastai_s(axis, shape, reduction):
    x, y = torch.randn(shape), torch.randint(shape[axis], [s for d, s in enumerate(shape) if d != axis % len(shape)])
    ours, fastai_s = LabelSmoothingCrossEntropyFlat(axis=axis, reduction=reduction), theirs.LabelSmoothingCrossEntropyFlat(axis=axis, reduction=reduction)
    for a, b in zip(loss_and_grad(ours, x, y), loss_and_grad(fastai_s, x, y)): close(a, b.as_subclass(torch.Tensor))

@both
def test_defaults(cls):
    y = F.binary_cross_entropy_with_logits(X, HOT*.9 + .05) if cls in SIGMOID else F.cross_entropy(X, INDEX, label_smoothing=.1)
    close(cls()(X, target_of(cls)), y)
    assert getattr(cls(), 'y_int', None) is (None if cls in SIGMOID else True)   # MixUp mixes the losses where there is a y_int, else the targets
    assert isinstance(cls(), theirs.BaseLoss if is_flat(cls) else nn.Module)
    ignored = cls()(X, torch.full((4,), -100)) if cls in SOFTMAX else cls()(X[:0], HOT[:0])
    assert ignored == 0   # the mean of nothing

# ---------------------------------------------------------------- targets and logits as fastai has them

@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_targets_may_have_a_column(reduction):
    "(N,1) of tabular data, with one row or one class too, and masks (N,1,H,W); losses are in the order of the targets"
    loss, x, y = LabelSmoothingCrossEntropyFlat(axis=1, reduction=reduction), torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    close(loss(x, y[:, None]), F.cross_entropy(x, y, label_smoothing=.1, reduction=reduction).reshape(loss(x, y).shape))
    for n in (4, 1): close(loss(X[:n], INDEX[:n, None].to(torch.int8)), loss(X[:n], INDEX[:n]))
    assert (loss(X[:, :1], torch.zeros(4, 1).long()) == 0).all()
    bce = LabelSmoothingBCEWithLogitsFlat(reduction=reduction)
    close(bce(X[:, :1], HOT[:, 0]), bce(X[:, :1], HOT[:, :1]))
    assert LabelSmoothingCrossEntropyFlat(flatten=False, axis=1, reduction='none')(x, y).shape == y.shape
    with pytest.raises(ValueError): LabelSmoothingCrossEntropyFlat(flatten=False)(X, INDEX[:, None])

@both
def test_subclasses_in_plain_tensors_out(cls):
    x, y = TensorImage(X.clone()).requires_grad_(), (TensorMultiCategory if cls in SIGMOID else TensorCategory)(target_of(cls))
    res = cls(reduction='none')(x, y)
    assert type(res) is torch.Tensor
    close(res.detach(), cls(reduction='none')(X, target_of(cls)))
    res.sum().backward()
    assert x.grad.abs().sum() > 0 and torch.equal(x.detach().as_subclass(torch.Tensor), X)

@softmax
@pytest.mark.parametrize('axis,shape', [(-1, (2, 5)), (1, (2, 5, 4, 4))])
def test_softmax_activation_and_decodes_follow_the_axis(cls, axis, shape):
    loss, x = cls(axis=axis), torch.randn(shape)
    assert torch.equal(loss.activation(x), x.softmax(axis)) and torch.equal(loss.decodes(x), x.argmax(axis))

@sigmoid
def test_sigmoid_activation_and_decodes(cls):
    assert torch.equal(cls().activation(X), X.sigmoid()) and torch.equal(cls(thresh=.8).decodes(X.sigmoid()), X.sigmoid() > .8)

def test_torch_compile_without_a_graph_break():
    for loss, y in ((LabelSmoothingCrossEntropy(.1, weight=W), INDEX), (LabelSmoothingBCEWithLogits(.1, pos_weight=W), HOT),
                    (LabelSmoothingBCEWithLogits((.1, 0.)), HOT), (LabelSmoothingBCEWithLogits(.1, prior=torch.stack([PRIOR/2, PRIOR])), HOT)):
        compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
        for a, b in zip(loss_and_grad(compiled, X, y), loss_and_grad(loss, X, y)): close(a, b)

@both
def test_where_no_tensor_has_values(cls):
    "shapes are checked all the same"
    k = dict(weight=W) | (dict(pos_weight=W) if cls in SIGMOID else dict(eps=W/10, prior=PRIOR))
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) for n, v in k.items()}
        assert cls(reduction='none', **fake)(mode.from_tensor(X), mode.from_tensor(target_of(cls))).numel() == target_of(cls).numel()
        with pytest.raises(TypeError, match='^weight must be of real numbers'): cls(weight=torch.ones(3, dtype=torch.complex64))
    assert cls(reduction='none')(X.to('meta'), target_of(cls).to('meta')).numel() == target_of(cls).numel()

# ---------------------------------------------------------------- options that are set later

LATE = dict(eps=.3, reduction='sum', axis=1, backend='torch', thresh=.3, spread='others', multi_hot=True, ignore_index=1)

@pytest.mark.parametrize('cls,name', [(c, n) for c in SOFTMAX + SIGMOID for n in LATE if hasattr(c(), n)])
def test_what_is_set_takes_effect(cls, name):
    "as if the loss had been built so; fastai's BaseLoss copies the attributes of the module, where setting them does nothing"
    setattr(loss := cls(), name, LATE[name])
    built = cls(**{name: LATE[name]})
    assert getattr(loss, name) == LATE[name] and repr(loss) == repr(built)
    x, y = torch.randn(6, 3, 3), torch.randint(3, (6, 3))
    if cls in SIGMOID or name == 'multi_hot': y = F.one_hot(y, 3).float()
    assert torch.equal(loss(x, y), built(x, y)) and torch.equal(loss.decodes(x), built.decodes(x))

@both
def test_eps_of_one_call_and_one_set_later(cls):
    close(cls(.1)(X, target_of(cls), eps=.3), cls(.3)(X, target_of(cls)))
    for eps in (5., tensor([2., .1, .1])):
        with pytest.raises(ValueError, match='eps'): cls()(X, target_of(cls), eps=eps)
        with pytest.raises(ValueError, match='eps'): cls().eps = eps

@both
@pytest.mark.parametrize('eps', [0, np.float32(.125), Fraction(1, 8), tensor(.125), tensor(0), TensorBase(.25)])
def test_eps_is_any_number(cls, eps): assert torch.equal(cls(eps)(X, target_of(cls)), cls(float(eps))(X, target_of(cls)))

@sigmoid
def test_eps_may_be_a_pair(cls):
    "of negatives and of positives, when built, set later, or of one call; kept as a tuple of floats, and with all that a loss is asked"
    expected = F.binary_cross_entropy_with_logits(X, HOT*.7 + .1)
    for eps in ((.1, .2), [.1, .2], np.array([.1, .2]), (tensor(.1, dtype=torch.float64), Fraction(1, 5))):
        loss = cls(eps)
        assert loss.eps == (.1, .2) and type(loss.eps) is tuple and 'eps=(0.1, 0.2)' in repr(loss)
        for o in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss, 2))): close(o(X, HOT), expected)
        loss.eps = .3
        close(loss(X, HOT, eps=eps), expected)
        loss.eps = eps
        close(loss(X, HOT), expected)
    close(cls((.1, .1))(X, HOT), cls(.1)(X, HOT)), close(cls((0., 0.))(X, HOT), cls(0.)(X, HOT))
    for bad in ((.7, .5), (.1, 2.), (.1,)):
        with pytest.raises(ValueError, match='eps'): loss.eps = bad
        with pytest.raises(ValueError, match='eps'): loss(X, HOT, eps=bad)
    assert loss.eps == (.1, .2)

@sigmoid
def test_a_prior_of_negatives_and_of_positives(cls):
    "A buffer as any other; a pair of eps, which says that already, takes none"
    both = tensor([[.1, .2, .3], [.5, .9, 1.]])
    loss = cls(.25, prior=both)
    close(loss(X, HOT), F.binary_cross_entropy_with_logits(X, .5*HOT + .5*torch.where(HOT == 1, both[1], both[0])))
    assert 'prior=[[0.1, 0.2, 0.3], [0.5, 0.9, 1.0]]' in repr(loss)
    m = loss.func if is_flat(cls) else loss
    m2 = cls(.25, prior=torch.ones(2, 3))
    (m2.func if is_flat(cls) else m2).load_state_dict(m.state_dict())
    for o in (m2, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss, 2))): close(o(X, HOT), loss(X, HOT))
    for f in (lambda: setattr(loss, 'eps', (.1, 0.)), lambda: cls((.1, 0.), prior=both), lambda: loss(X, HOT, eps=(.1, 0.))):
        with pytest.raises(ValueError, match=r'eps=\(0.1, 0\) takes no prior'): f()
    with pytest.raises(ValueError, match=r'negatives in its first row.* got 0.5 and 0.1 for label 0'): cls(prior=both.flip(0))

def test_eps_may_become_a_tensor_and_a_number_again():
    loss = LabelSmoothingCrossEntropyFlat(.1)
    for loss.eps in (tensor([.1, .2, .3]), .2, tensor([.3, .2, .1])): close(loss(X, INDEX), LabelSmoothingCrossEntropy(loss.eps)(X, INDEX))

TOP = [(cls, 1. if cls in SOFTMAX else .5) for cls in SOFTMAX + SIGMOID] + [(cls, (.25, .75)) for cls in SIGMOID]

@pytest.mark.parametrize('cls,top', TOP)
def test_targets_that_teach_nothing_are_warned_of_once(cls, top):
    "where eps is set: when built, or later; not at each call, nor for the same eps again"
    with pytest.warns(UserWarning, match=rf'eps=(1|\.5) .*nothing to learn') as said: loss = cls(top)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        loss.eps = top
        loss(X, target_of(cls))
        copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), cls(less := (.25, .74) if isinstance(top, tuple) else top - .01)
        loss.eps = less
    with pytest.warns(UserWarning, match='nothing to learn') as again: loss.eps = top
    assert len(said) == len(again) == 1

@sigmoid
def test_targets_that_go_to_a_prior_altogether(cls):
    "eps=.5 makes a label that of the prior: the same for negatives and positives if it is one [K], and another if it is one [2,K]"
    with pytest.warns(UserWarning, match='nothing to learn'): cls(.5, prior=PRIOR)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        loss = cls(.5, prior=torch.stack([PRIOR/2, PRIOR]))
    close(loss(X, HOT), F.binary_cross_entropy_with_logits(X, (1+HOT)*PRIOR/2))

@softmax
def test_class_weights_past_the_flip_are_warned_of(cls):
    "K(1-eps)/eps + 1 = 4 for K=3 and eps .5"
    checks._warn_flip.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loss = cls(.5, weight=tensor([1., 1, 3.9]))
    with pytest.warns(UserWarning, match='outweigh'): loss.eps = .6

# ---------------------------------------------------------------- buffers, copies, what is shown

@both
def test_tensors_are_buffers(cls):
    options = dict(weight=W, prior=PRIOR) | (dict(pos_weight=W) if cls in SIGMOID else {})
    loss = cls(**options)
    m = loss.func if is_flat(cls) else loss
    assert set(m.state_dict()) == set(options) and not list(m.parameters())
    m.load_state_dict({n: torch.full((3,), 1/3) for n in options})
    close(m.prior, torch.full((3,), 1/3))
    m.to(torch.float64)
    loss.to(torch.device('meta'))   # as fastai does in before_fit
    assert all(getattr(m, n).dtype == torch.float64 and getattr(m, n).is_meta for n in options)

# torch.save, and with it `Learner.export`, pickles by protocol 2
WAYS = dict(pickle=lambda o: pickle.loads(pickle.dumps(o, 2)), cloudpickle=lambda o: pickle.loads(cloudpickle.dumps(o)), deepcopy=copy.deepcopy)
KEPT = [LabelSmoothingCrossEntropyFlat(.3, prior=PRIOR, ignore_index=1, axis=1), LabelSmoothingCrossEntropyFlat(W/10, spread='others', flatten=False),
        LabelSmoothingCrossEntropy(.3, weight=W), LabelSmoothingBCEWithLogitsFlat(.2, weight=W, pos_weight=W, thresh=.7, axis=-1),
        LabelSmoothingBCEWithLogitsFlat((.1, 0.), pos_weight=W), LabelSmoothingBCEWithLogits(.2, prior=torch.stack([PRIOR/2, PRIOR]))]

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('loss', KEPT, ids=[repr(o) for o in KEPT])
def test_copies_before_and_after_a_call(loss, way):
    x, y = X.clone(), target_of(type(loss))
    fresh = WAYS[way](loss)
    expected = loss(x, y)
    for o in (fresh, WAYS[way](loss), WAYS[way](fresh)):
        assert type(o) is type(loss) and repr(o) == repr(loss) and torch.equal(o(x, y), expected) and torch.equal(o.decodes(x), loss.decodes(x))
        o.eps, o.reduction = .5/2, 'sum'
        assert torch.equal(loss(x, y), expected)   # a copy is its own

class Mine(LabelSmoothingCrossEntropy):
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs)

@pytest.mark.parametrize('loss,text', [
    (Mine(.2, ignore_index=3), "Mine(eps=0.2, reduction='mean', ignore_index=3)"),
    (LabelSmoothingCrossEntropy(tensor([.1, .2]), weight=tensor([1., 1/3]), axis=-1),
     "LabelSmoothingCrossEntropy(eps=[0.1, 0.2], reduction='mean', weight=[1.0, 0.333], axis=-1)"),
    (LabelSmoothingCrossEntropy(prior=torch.full((20,), .05)), "LabelSmoothingCrossEntropy(eps=0.1, reduction='mean', prior=Tensor[20])"),
    (LabelSmoothingCrossEntropyFlat(multi_hot=True, spread='others', backend='torch'),
     "FlattenedLoss of LabelSmoothingCrossEntropy(eps=0.1, reduction='mean', backend='torch', spread='others', multi_hot=True)"),
    (LabelSmoothingCrossEntropyFlat(axis=1, flatten=False, reduction='none'),
     "FlattenedLoss of LabelSmoothingCrossEntropy(eps=0.1, reduction='none', axis=1), flatten=False"),
    (LabelSmoothingBCEWithLogitsFlat(pos_weight=tensor([2.]), thresh=.3),
     "FlattenedLoss of LabelSmoothingBCEWithLogits(eps=0.05, reduction='mean', pos_weight=[2.0], thresh=0.3)"),
    (LabelSmoothingBCEWithLogits((.1, 0)), "LabelSmoothingBCEWithLogits(eps=(0.1, 0.0), reduction='mean')")])
def test_a_loss_shows_the_options_that_are_not_the_default(loss, text): assert repr(loss) == text

# ---------------------------------------------------------------- what goes wrong

PIXELS = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))

@pytest.mark.parametrize('loss,xy,error,said', [
    (LabelSmoothingCrossEntropyFlat(axis=-1, flatten=False), PIXELS, ValueError, 'axis=1 fits'),
    (LabelSmoothingCrossEntropyFlat(axis=2, flatten=False), PIXELS, ValueError, 'axis=1 fits'),
    (LabelSmoothingCrossEntropyFlat(), (X, INDEX[:3]), ValueError, '^(?!.*fits)'),
    (LabelSmoothingCrossEntropyFlat(), (X, tensor([0, 1, 0, 255])), IndexError, 'class index 255 at row 3 .*; ignore_index=255 leaves such rows out'),
    (LabelSmoothingCrossEntropyFlat(), (X, tensor([0, 3, 0, 1])), IndexError, '^class index 3 at row 1 is out of range for 3 classes$'),
    (LabelSmoothingCrossEntropyFlat(), (X, HOT), ValueError, 'multi_hot=True.*BCE'), (LabelSmoothingCrossEntropy(), (X, HOT.long()), ValueError, 'multi_hot'),
    (LabelSmoothingBCEWithLogitsFlat(), (X, INDEX), ValueError, '(?i)cross_?entropy'),
    (LabelSmoothingBCEWithLogits(prior=PRIOR), (X[:, :2], HOT[:, :2]), ValueError, 'prior must have shape'),
    (LabelSmoothingBCEWithLogits(prior=PRIOR), (PIXELS[0][:, 0],)*2, ValueError, 'one label; axis= says where'),
    (LabelSmoothingBCEWithLogits(axis=9, prior=PRIOR), (X, HOT), IndexError, 'axis 9 is out of range')])
def test_messages_say_what_to_do(loss, xy, error, said):
    with pytest.raises(error, match=f'(?s){said}' if said[0] != '^' else said): loss(*xy)

def test_soft_targets_on_a_gpu_are_looked_at_once(monkeypatch):
    "in the first batch, as each look makes a GPU wait; and again after an error, which is no answer"
    looks, gpu = [], SimpleNamespace(device=SimpleNamespace(type='mps'), is_floating_point=lambda: True, is_cuda=False)
    def check(target, axis):
        looks.append(axis)
        if len(looks) == 1: raise ValueError('rows sum to 2')
    monkeypatch.setattr(losses, 'check_soft_rows', check)
    for cls in SOFTMAX: cls()(X, HOT.softmax(1))
    assert not looks   # a CPU looks each time, elsewhere
    for f in ('cross_entropy', 'tracing'): monkeypatch.setattr(losses.K, f, lambda *args, **kwargs: False)
    loss = LabelSmoothingCrossEntropy()
    with pytest.raises(ValueError, match='rows sum to 2'): loss(X, gpu)
    for o in (loss, loss, LabelSmoothingCrossEntropy(multi_hot=True)): o(X, gpu)
    assert looks == [1, 1] and loss(X, INDEX) is False

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_multi_hot_floats_on_a_gpu():
    for loss in [cls() for cls in SOFTMAX for _ in range(2)]:
        with pytest.raises(ValueError, match='multi_hot=True'): loss(X.cuda(), HOT.cuda())

# ---------------------------------------------------------------- bad input

K = 3

@st.composite
def softmax_args(draw):
    weight, prior = fuzz.rand(draw, K) + .1, fuzz.rand(draw, K) + .1
    return dict(input=6*fuzz.rand(draw, 5, K) - 3, target=fuzz.randint(draw, K, 5), eps=draw(st.floats(.01, .9)), weight=weight, prior=prior/prior.sum())

@st.composite
def sigmoid_args(draw):
    smoothing = draw(st.sampled_from([dict(eps=.05, prior=fuzz.rand(draw, K)), dict(eps=.3, prior=torch.stack([fuzz.rand(draw, K)/2, 1 - fuzz.rand(draw, K)/2]))]))
    return smoothing | dict(input=6*fuzz.rand(draw, 5, K) - 3, target=fuzz.randint(draw, 2, 5, K), weight=fuzz.rand(draw, K) + .1, pos_weight=fuzz.rand(draw, K) + .1)

def vectors(name, *values):
    "What can't be a tensor of a value a class: another thing, or one wrong value"
    return ['abc', 3.5, [.5]*K, np.ones(K), object(), *fuzz.no_values(name), *(tensor([1/K, v, 1/K]) for v in (-.5, fuzz.NAN, -fuzz.INF, *values))]

SHAPES = [torch.full((K+1,), 1/(K+1)), torch.full((1, 1, K), 1/K), torch.full((K+1, K+1), 1/(K+1)), torch.ones(0), tensor(1.)]
NO_INPUT = [*fuzz.NOT_TENSORS, lambda a: a['input'].long(), lambda a: a['input'] > 0, *fuzz.no_values('input')]
BAD = dict(reduction=fuzz.BAD_REDUCTION, backend=[*fuzz.BAD_BACKEND, 'triton'], input=NO_INPUT, target=[*fuzz.NOT_TENSORS, *fuzz.no_values('target')])
BAD_AXIS = [9, -9, 2**70, 1.5, fuzz.NAN, '1', None, [1]]
BAD_SOFTMAX = BAD | {
    'eps': [*fuzz.BAD_EPS, *(tensor([.1, v, .1]) for v in (1.5, -.1, fuzz.NAN)), torch.full((K,), .1+0j)],
    'spread': fuzz.BAD_SPREAD, 'weight': vectors('weight', fuzz.INF), 'axis': BAD_AXIS, 'ignore_index': [1.5, fuzz.NAN, '-100', None, [-100], 2**70],
    'prior': [*vectors('prior', fuzz.INF), tensor([.5, .5, .5]), torch.zeros(K), torch.eye(K)*.9], 'weight or prior': SHAPES,
    'prior or weight': SHAPES, 'eps or prior or weight': [torch.full((K+1,), .1), torch.full((1, K), .1)],
    'prior or spread': [lambda a: dict(spread='others')], 'prior or multi_hot': [lambda a: dict(multi_hot=True)],
    'target or input': [lambda a: a['target'][:-1], lambda a: a['target'].float(), lambda a: a['target'].repeat(2)],
    'target or eps': [lambda a: dict(target=a['input'].softmax(1), eps=torch.full((K,), .1))],
    'target or prior': [lambda a: dict(target=a['input'].softmax(1), prior=torch.eye(K))],
    'target or ignore_index': [lambda a: dict(target=a['input'].softmax(1), ignore_index=0)],
    'class index': [lambda a, v=v: dict(target=tensor([0, 1, 2, v, 0])) for v in (K, -1, 2**40, -2**62)]}
BAD_SIGMOID = BAD | {
    'eps': fuzz.BAD_LABEL_EPS, 'prior': [*vectors('prior', 1.5), *SHAPES, torch.full((2, K+1), .5), torch.full((3, K), .5), tensor([[.5]*K, [.25]*K])],
    'eps or prior': [lambda a: dict(eps=(.1, 0.), prior=torch.full((K,), .5))],
    'weight': vectors('weight', fuzz.INF, 1e31), 'pos_weight': vectors('pos_weight', fuzz.INF), 'thresh': [fuzz.NAN, 'x', None, [.5], tensor([.5, .6])],
    'axis': BAD_AXIS[:-2] + [[1]], 'target or input': [lambda a: a['target'][:, 0], lambda a: a['target'][:-1]],
    'weight or input': [torch.ones(2, 5, K), torch.ones(K+2)], 'pos_weight or input': [torch.ones(2, 5, K), torch.ones(K+2)]}

def built(cls): return lambda input, target, **options: cls(**options)(input, target)
ERRORS = TypeError, ValueError, IndexError, ImportError   # the last for a triton that is not there
DTYPES = dict(input=fuzz.FLOATS + fuzz.HALF, weight=fuzz.FLOATS + fuzz.HALF, prior=fuzz.FLOATS)
TABLE = {cls.__name__: fuzz.Row(built(cls), softmax_args(), BAD_SOFTMAX, DTYPES | dict(target=fuzz.INTEGERS), ERRORS) for cls in SOFTMAX}
TABLE |= {cls.__name__: fuzz.Row(built(cls), sigmoid_args(), BAD_SIGMOID, DTYPES | dict(target=fuzz.LABELS, pos_weight=fuzz.FLOATS), ERRORS) for cls in SIGMOID}
TABLE['tempered'] = fuzz.Row(
    lambda loss, temperature, x: tempered(loss, temperature).activation(x),
    st.fixed_dictionaries(dict(loss=st.sampled_from([c() for c in SOFTMAX + SIGMOID]), temperature=st.floats(1.5, 100), x=st.just(X))),
    dict(temperature=[0, 0., -1., fuzz.NAN, fuzz.INF, 'x', None, [], [1., 0., 1.], [1., fuzz.NAN, 1.], [1., 2.], ['x']*3, {}, 1j, tensor([1., 2.])],
         activation=[lambda a, o=o: dict(loss=o) for o in (nn.MSELoss(), F.cross_entropy)]),
    dict(x=fuzz.FLOATS), skip=('sparse', 'nested'))

test_refuses, test_takes = fuzz.both_tests(TABLE, (TensorBase, TensorImage))

# ---------------------------------------------------------------- the loss of a Learner, and its temperature

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_base_loss_finds_the_loss_under_mixup(mix):
    "for as long as theirs stands in its place, which is what `MixHandler.before_train` and `after_train` do"
    ours, cb = LabelSmoothingCrossEntropyFlat(), mix()
    cb.learn = SimpleNamespace(loss_func=ours)
    assert base_loss(ours) is ours and base_loss(X.sum) == X.sum   # another's method
    cb.before_train()
    assert cb.learn.loss_func == cb.lf and base_loss(cb.learn.loss_func) is ours
    cb.after_train()
    assert base_loss(cb.learn.loss_func) is cb.learn.loss_func is ours

@pytest.mark.parametrize('loss,name', [
    (F.cross_entropy, 'cross_entropy'), (nn.BCEWithLogitsLoss(), 'BCEWithLogitsLoss'), (theirs.CrossEntropyLossFlat(), 'CrossEntropyLossFlat'),
    (LabelSmoothingCrossEntropyFlat(), 'LabelSmoothingCrossEntropyFlat'), (theirs.MSELossFlat(), 'BaseLoss of MSELoss')])
def test_loss_name(loss, name): assert loss_name(loss) == name

def test_label_axis():
    "-1 is what fastai's losses have by default"
    for loss, axis in ((theirs.BCEWithLogitsLossFlat(), None), (theirs.BCEWithLogitsLossFlat(axis=2), 2), (nn.BCEWithLogitsLoss(), None),
                       *((cls(axis=axis), axis) for cls in SIGMOID for axis in (None, 1, -1))): assert given_axis(loss) == axis
    assert [label_axis_of(theirs.BCEWithLogitsLossFlat(), n) for n in (2, 3, 4)] == [1, None, 1] and label_axis_of(SIGMOID[0](axis=-1), 3) == 2

@pytest.mark.parametrize('make', [*SOFTMAX, *SIGMOID, theirs.CrossEntropyLossFlat, theirs.BCEWithLogitsLossFlat])
def test_tempered_changes_a_copy(make):
    loss, activation = make(), nn.Softmax(1) if make is LabelSmoothingCrossEntropy else None
    if activation: loss.activation = activation   # a module among the module's own
    warm = tempered(loss, 2., interval=(1.5, 2.5))
    close(warm.activation(X), loss.activation(X/2)), close(tempered(warm, tensor(4.)).activation(X), loss.activation(X/4))
    assert 'temperature' not in vars(loss.activation) if activation else 'activation' not in vars(loss)
    assert untempered(warm) is loss and untempered(loss) is loss and (warm.activation.temperature, warm.activation.interval) == (2., (1.5, 2.5))
    close(warm(X, HOT if 'BCE' in type(loss).__name__ else INDEX), loss(X, HOT if 'BCE' in type(loss).__name__ else INDEX))
    close(pickle.loads(pickle.dumps(warm)).activation(X), warm.activation(X))
    assert tempered(warm, 1.) is loss and tempered(loss, 1., (.9, 1.1)) is not loss

@pytest.mark.parametrize('make, axis', [(LabelSmoothingCrossEntropy, 1), (LabelSmoothingCrossEntropyFlat, -1), (theirs.CrossEntropyLossFlat, -1),
                                        (partial(theirs.CrossEntropyLossFlat, axis=1), 1), (partial(LabelSmoothingCrossEntropyFlat, axis=1), 1)])
def test_a_temperature_of_normalised_logits(make, axis):
    "along the class axis of the loss; T=1 is one, too"
    x, t = torch.randn(2, 4, 3, 5), NormalizedTemperature(1, 3)
    warm = tempered(loss := make(), t)
    assert untempered(warm) is loss and warm.activation.temperature is t
    close(warm.activation(x), loss.activation(apply_temperature(x, t, axis)))
    close(pickle.loads(pickle.dumps(warm)).activation(x), warm.activation(x))

@pytest.mark.parametrize('shape,axis,at', [((4, 3), None, 1), ((2, 3, 4, 5), None, 1), ((2, 5, 3), -1, 2)])
def test_a_temperature_of_each_label(shape, axis, at):
    x, t = torch.randn(shape), [1., 2., 4.]
    expected = torch.stack([(o/v).sigmoid() for o, v in zip(x.unbind(at), t)], at)
    for given in (t, tensor(t)): close(tempered(LabelSmoothingBCEWithLogitsFlat(axis=axis), given).activation(x), expected)
    with pytest.raises(ValueError, match='2 values, the logits have 3 labels'): tempered(LabelSmoothingBCEWithLogits(axis=axis), t[:2]).activation(x)
    with pytest.raises(ValueError, match='the logits have 1 labels'): tempered(LabelSmoothingBCEWithLogits(), t).activation(torch.randn(2, 5, 3))
