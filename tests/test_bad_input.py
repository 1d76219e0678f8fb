"""Bad input: whatever comes in, a function gives the float64 reference's value, or an error whose message names the argument.

A call that SPEC.md allows is drawn; then nothing, one or two things about it are changed. After an odd one (strides, subclasses,
dtypes, huge values, ...) the call is as valid as before, and its value is that of the reference. After a bad one it has to raise one
of ERRORS, and say which argument is wrong. Where SPEC.md is silent, either will do; any other exception, and a nan where the
reference is finite, will not. No line here looks at the package to know which of these a call is.

CI runs some 600 examples, always the same ones. `pytest tests/test_bad_input.py -m long` runs twenty times as many, random ones, and
writes their number and what came out to bad_input.json; SMOOTH_TEST_SEED=... repeats such a run."""
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from fractions import Fraction
from functools import cache
from types import SimpleNamespace
from typing import Callable, NamedTuple
from unittest import mock
import importlib.metadata, io, json, math, os, platform, random, re, signal, tempfile, time, warnings

import hypothesis, pytest, torch
from hypothesis import given, settings, strategies as st
from torch._subclasses import FakeTensorMode

from helpers import *
from reference import REDUCTIONS, sigmoid_reference, smoothed_targets, softmax_reference
from test_calibration import averaged, brier_reference, columns, error_reference, nll_reference, smooth_reference
import fastai_smooth.bench as bench_module, fastai_smooth.compare as compare_module
from fastai_smooth import kernels
from fastai_smooth.all import *
from fastai_smooth.calibration import binomial_interval, reliability
from fastai_smooth.images import ImageSet, digits
from fastai_smooth.kernels.targets import along, label_axis
from fastai_smooth.pilot import pilot, raw_preds
from fastai_smooth.temperature import cross_fitted
from fastai_smooth.tune import noise_estimate

NAN, INF = math.nan, math.inf
ERRORS = TypeError, ValueError, IndexError, NotImplementedError, ImportError   # the last for a Triton that is too old
RECORD = Path(__file__).with_name('bad_input.json')
TIMES = 20   # as many examples in the long run
pytestmark = pytest.mark.filterwarnings('ignore')


# ---------------------------------------------------------------- how a call is drawn, changed and judged

class Call(dict):
    "The arguments of a call, by name; as attributes, what else there is to know about it."
    either = frozenset()   # arguments that may also be refused, since SPEC.md says nothing of what was done to them
    abstract = None        # 'meta' or 'fake': tensors without values, of which nothing but shape and dtype can be compared
    loose = False          # has labels or logits that no finite value comes out of: nan will do for inf
    any_value = False      # has options that only a module refuses: something comes out
    colossal = False       # is so near the end of the range that a sum may be inf
    how = None             # it is called
    masked = one_hot_prior = negative_labels = False   # what does not go together: smoothing mass for masked classes alone, or less than none

    def tensor(self, name):
        t = self.get(name)
        need(isinstance(t, Tensor) and t.layout == torch.strided and not t.is_nested)
        return t

class Skip(Exception): "What was to be changed is not there"

def need(condition):
    if not condition: raise Skip

class Subject(NamedTuple):
    call: Callable    # What is tested, with a Call
    draw: Callable    # Draws a valid Call
    check: Callable   # Compares a Call and what came out
    odd: dict         # name -> what changes a Call and leaves it valid
    bad: dict         # name -> what makes it invalid, and gives the names one of which the message must have
    values: dict      # argument -> values it can't have
    examples: int     # in CI

    def change(self, kind, pick, a):
        "Makes one change of that kind; its name, and the names of arguments that are wrong now"
        values = {f'{k} value': one_of(k, v) for k, v in self.values.items()}
        changes = {'odd': self.odd, 'bad': self.bad | values, 'value': values}[kind]
        need(changes)
        name = pick(list(changes))
        return name, changes[name](pick, a) or ()

PLANS = [(), ('odd',), ('odd',), ('odd', 'odd'), ('odd', 'odd'), ('bad',), ('bad',), ('odd', 'bad'), ('odd', 'bad'), ('bad', 'value')]
SUBJECTS, COUNTS, REACHED = {}, {}, {}   # by name; how often what came out, and which changes were made

def subject(name, draw, check, odd=(), bad=(), values=(), examples=10):
    def add(call):
        SUBJECTS[name] = Subject(call, draw, check, dict(odd), dict(bad), dict(values), examples)
        return call
    return add

def names_one_of(message, names):
    return any(re.search(rf'(?<![\w-]){re.escape(n)}s?(?!\w)', message, re.IGNORECASE) for n in names)

def shown(v):
    if not isinstance(v, Tensor) or v.layout == torch.strided and not v.is_nested and v.numel() <= 12: return repr(v)
    return f'<{type(v).__name__} {"nested" if v.is_nested else tuple(v.shape)} {v.dtype} {v.device} {v.layout}>'

@contextmanager
def seconds_at_most(n):
    "Of CPU time: nothing hangs"
    def stop(*_): raise TimeoutError(f'took more than {n} s')
    if not hasattr(signal, 'SIGPROF'): yield; return
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, n)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)

def example(name, draw):
    s = SUBJECTS[name]
    a, done, wrong = s.draw(draw), [], set()
    pick = draw(st.randoms(use_true_random=True)).choice   # all changes alike: hypothesis itself likes some much better than others
    for kind in draw(st.sampled_from(PLANS)):
        for _ in range(4):   # until one can be made here
            before = copy(a)
            try: change, names = s.change(kind, pick, a)
            except Skip: a = before; continue
            done.append(change)
            wrong |= set(names)
            break
    what = f'{name}, {" and ".join(done) or "as drawn"}: ' + ', '.join(f'{k}={shown(v)}' for k, v in a.items())
    hypothesis.note(what)
    try:
        with warnings.catch_warnings(), seconds_at_most(10):
            warnings.simplefilter('ignore')
            result = s.call(a)
    except ERRORS as e:
        message = f'{type(e).__name__}: {e}'
        assert wrong or a.either, f'a valid call was refused: {message}'
        assert names_one_of(message, wrong | a.either), f'names none of {sorted(wrong | a.either)}: {message}'
        outcome = 'named errors'
    else:
        assert not wrong, f'was taken, though {sorted(wrong)} is wrong'
        s.check(a, result)
        outcome = 'values'
    COUNTS.setdefault(name, Counter())[outcome] += 1
    REACHED.setdefault(name, Counter()).update(done)


# ---------------------------------------------------------------- tensors

FLOATS = torch.float32, torch.float64, torch.float16, torch.bfloat16
INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
SUBCLASSES = TensorBase, TensorImage, TensorMask, TensorCategory, TensorMultiCategory

def generator(draw): return torch.Generator().manual_seed(draw(st.integers(0, 2**32-1)))
def picked(pick): return torch.Generator().manual_seed(pick(range(2**32)))
def rand(g, *shape): return torch.rand(shape, generator=g, dtype=torch.float64)
def one_in(n): return st.integers(1, n).map(lambda i: i == n)
def plain(t): return t.detach().as_subclass(Tensor).clone() if isinstance(t, Tensor) else torch.as_tensor(t)
def number(v): return v.item() if isinstance(v, Tensor) else v
def doubled(v): return plain(v).double() if isinstance(v, Tensor) and v.dim() else v if v is None else float(number(v))

def strided(t): return torch.stack([t, t], -1)[..., 0]
def shifted(t): return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
def negated_view(t): return torch._neg_view(-t)
def transposed(t): return t.transpose(0, -1).contiguous().transpose(0, -1)
def channels_last(t): return t.contiguous(memory_format=torch.channels_last)
def expanded(t): return t[:1].expand(t.shape)
def repeated(t): return t[..., :1].expand(t.shape)
def overlapping(t): return t.contiguous().as_strided(t.shape, (1,)*t.dim())

def laid_out(name, unsigned=()):
    "An odd change: argument `name` lies in memory in another way; with a stride of 0 its values are others, and as valid"
    def change(pick, a):
        t = a.tensor(name)
        need(t.numel() and t.dim())
        if t.dtype in unsigned: t = t.long()   # torch can't stack them
        ways = [strided, shifted, transposed]
        if name in ('input', 'target', 'logits', 'targs'): ways += [expanded, overlapping] + [repeated]*(t.dim() > 1)
        if t.is_floating_point(): ways.append(negated_view)
        if t.dim() == 4: ways.append(channels_last)
        way = pick(ways)
        if name == 'target' and a.kind == 'soft' and way in (expanded, overlapping, repeated): a.either |= {name}   # rows may no longer sum to 1
        a[name] = way(t)
    return change

def of_subclass(*names):
    def change(pick, a):
        name = pick(names)
        a[name] = a.tensor(name).as_subclass(pick(SUBCLASSES))
    return change

def with_gradient(*names):
    def change(pick, a):
        name = pick(names)
        t = a.tensor(name)
        need(t.is_floating_point() and not t.is_inference())
        a[name] = nn.Parameter(t.detach()) if pick([True, False]) else t.detach().requires_grad_()
    return change

def from_inference_mode(*names):
    def change(pick, a):
        name = pick(names)
        with torch.inference_mode(): a[name] = a.tensor(name).clone()
    return change

def not_dense(*names):
    "Layouts that the package need not know: a value, or an error that names the argument"
    def change(pick, a):
        name = pick(names)
        t = a.tensor(name)
        need(not a.abstract and t.dim() and t.numel() and not t.is_inference() and t.dtype in (torch.float32, torch.int64))
        t = plain(t)
        make = [lambda: t.to_sparse(), lambda: torch.nested.nested_tensor([*t]) if t.dim() > 1 else torch.nested.nested_tensor([t])]
        if t.dim() == 2: make.append(lambda: t.to_sparse_csr())
        if t.dtype == torch.float32: make.append(lambda: t.to_mkldnn())
        a[name] = pick(make)()
        a.either |= {name}
    return change

def without_values(pick, a):
    "All tensors are on the meta device, or fake"
    need(not a.either and isinstance(a['target'], Tensor))
    a.abstract = pick(['meta', 'fake'])

def abstracted(a):
    "The arguments as a.abstract wants them, and what to run under"
    mode = FakeTensorMode() if a.abstract == 'fake' else nullcontext()
    turn = dict(meta=lambda t: t.detach().to('meta'), fake=lambda t: mode.from_tensor(plain(t))).get(a.abstract, noop)
    return {k: v if not isinstance(v, Tensor) else turn(v) if v.dim() or k != 'eps' else v.item() for k, v in a.items()}, mode


# ---------------------------------------------------------------- faults that losses, targets and calibration share

NOT_TENSORS = [None, 'abc', 3.5, [[.5, .5]], object()]
BAD_EPS = [-.1, 1.1, NAN, INF, -INF, 1e300, -5e-324, 'x', '', None, True, False, 1j, [.1], {}, torch.tensor(NAN), torch.tensor(2.), torch.tensor(True),
           np.float64(-1), np.array([.1, .2])]
BAD_REDUCTION = ['MEAN', 'avg', '', None, 0, True, b'mean', ['mean'], object()]
BAD_SPREAD = ['ALL', 'other', '', None, 0, True, ['all']]
BAD_BACKEND = ['cuda', 'Torch', 'triton', '', None, 0, ['torch']]
BAD_COUNT = [0, -1, 1.5, NAN, INF, '5', None, [5]]
BAD_SEED = ['1', None, 1.5, NAN, [1], 2**70]
BAD_LEVEL = [0, 1, -.5, 1.5, NAN, INF, '.9', None, [.9]]
BAD_AVERAGE = ['mean', 'Macro', '', 0, True, ['macro']]

def one_of(name, values):
    "A bad change: argument `name` is one of `values`"
    def change(pick, a):
        a[name] = pick(values)
        return name,
    return change

def complex_numbers(name):
    def change(pick, a):
        a[name] = plain(a.tensor(name)).to(torch.complex64)
        return name,
    return change

def elsewhere(name):
    "This one is on the meta device, the others are not"
    def change(pick, a):
        need(not a.abstract)
        a[name] = a.tensor(name).detach().to('meta')
        return name,
    return change

def a_class_each(a):
    "The options that have a value a class: which of them has the wrong number?"
    return [o for o in ('eps', 'prior', 'weight') if isinstance(a.get(o), Tensor) and a[o].dim()] or ['eps', 'prior', 'weight']

def vector_faults(name, high=INF, sums=False):
    "What can be wrong with an optional tensor of one value a class, whose values are looked at in eager on the CPU"
    def shape(pick, a):
        k, v = a.k, torch.full((a.k,), 1/a.k)
        a[name] = pick([torch.full((k+1,), 1/(k+1)), torch.cat([v, v])[:k+2], v[None, None], torch.full((k+1, k+1), 1/(k+1)), v[:0], torch.tensor(1.)])
        return name, *a_class_each(a)

    def values(pick, a):
        need(not a.abstract)
        v, at = torch.full((a.k,), 1/a.k), pick(range(a.k))
        wrong = [-.5, NAN, -INF, -1e30] + ([INF] if high < INF or name != 'prior' else []) + ([1.5] if high == 1 else [])
        if sums and pick(range(3)) == 0: a[name] = v*pick([0., .9, 2., 100., INF])
        else:
            v[at] = pick(wrong)
            a[name] = v
        return name,
    return {f'{name} shape': shape, f'{name} values': values, f'{name} no tensor': one_of(name, ['abc', 3.5, [.5, .5], np.ones(3), object()]),
            f'{name} complex': optional(name, complex_numbers(name)), f'{name} on meta': optional(name, elsewhere(name))}

def optional(name, change):
    def change_it(pick, a):
        if a.get(name) is None: a[name] = torch.full((a.k,), 1/a.k)
        return change(pick, a)
    return change_it

def bad_input_tensor(pick, a):
    "The logits are no floating point"
    t = plain(a.tensor('input'))
    a['input'] = t.to(pick([torch.int64, torch.uint8, torch.bool, torch.complex64]))
    return 'input',

def odd_logits(pick, a):
    "nan, infinities, masks, huge, tiny and equal ones"
    x = a.tensor('input')
    need(x.numel() and not x.is_inference())
    x, top = plain(x), torch.finfo(x.dtype).max
    g = picked(pick)
    where = rand(g, *x.shape) < .3
    kind = pick(['nan', 'inf', 'masked', 'masked', 'huge', 'colossal', 'tiny', 'equal', 'mixed'])
    if kind in ('nan', 'inf'):
        need(a.get('weight') is None or (a.tensor('weight') > 0).all())
        x[where] = NAN if kind == 'nan' else INF
    if kind == 'masked':
        need(not a.negative_labels and not a.one_hot_prior and (a.get('spread') != 'others' or a.kind != 'soft'))
        x[where] = -INF
        a.masked = True
    if kind == 'huge': x = x*(top**.8)
    if kind == 'colossal': x = x.sign()*top
    if kind == 'tiny': x = x*torch.finfo(x.dtype).tiny*.1
    if kind == 'equal': x = torch.full_like(x, pick([0., 3., -top**.8]))
    if kind == 'mixed': x[where] = x[where].sign()*top**.8
    a.loose = a.loose or kind in ('nan', 'inf') or kind == 'masked' and a.top == .5   # labels have no masks
    a.colossal = a.colossal or kind == 'colossal'
    a['input'] = x

def odd_eps(pick, a):
    "Numbers of other types, and at the ends of the range"
    need(not isinstance(a['eps'], Tensor))
    top = a.top
    a['eps'] = pick([0, 0., -0., top, np.float64(top/3), np.float32(.125), Fraction(1, 8), 5e-324, 1e-30, math.nextafter(top, 0),
                                     torch.tensor(.125), torch.tensor(top, dtype=torch.float64), torch.tensor(0), TensorBase(.25),
                                     torch.tensor(.25, requires_grad=True).detach()])


# ---------------------------------------------------------------- losses

def tolerance(dtype): return 1e-9 if dtype == torch.float64 else 1e-5

def same(actual, expected, a, scale=1., slack=0., what='loss'):
    "Equal but for rounding: relative to the largest expected value, and to `scale`"
    assert isinstance(actual, Tensor) and tuple(actual.shape) == tuple(expected.shape), f'{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}'
    tol, top, tiny = tolerance(actual.dtype) + slack, torch.finfo(actual.dtype).max, torch.finfo(actual.dtype).smallest_normal
    actual, expected = actual.detach().double(), expected.double()
    finite = expected.isfinite() & (expected.abs() < top*(1e-3 if a.colossal else 1))
    assert actual[finite].isfinite().all(), f'{what} is {actual}, expected {expected}'
    error = (actual - expected)[finite].abs()
    assert (error <= tol*((expected[finite].abs().max() if len(error) else 0) + scale) + tiny).all(), f'{what} is {actual}, expected {expected}'
    odd_a, odd_e = actual[~expected.isfinite()], expected[~expected.isfinite()]
    assert not odd_a.isfinite().any(), f'{what} is {actual}, expected {expected}'
    if not (a.loose or a.colossal): assert odd_a.isnan().equal(odd_e.isnan()) and (odd_a == odd_e)[~odd_e.isnan()].all(), f'{what} is {actual}, expected {expected}'

def off_one(prior):
    "The reference divides a prior by its sum"
    return 0. if prior is None else (prior.sum(-1) - 1).abs().max().item()

def check_loss(a, result, expected, expected_grad, scale, slack=0.):
    loss, grad = result
    x = a['input']
    assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    if a.flat and expected.dim(): expected = expected.flatten()
    if a.abstract or a.any_value:
        assert loss.shape == expected.shape and loss.is_meta == (a.abstract == 'meta')
        return
    assert type(loss) is Tensor, f'is a {type(loss)}'
    same(loss, expected, a, scale, slack)
    if grad is None or a.loose or a.colossal: return
    assert grad.dtype == x.dtype and grad.shape == x.shape
    if expected.isinf().any():   # a masked class is the true one: of the others' gradient nothing is said
        assert not grad[x == -INF].nan_to_num().any()
        return
    same(grad, expected_grad, a, scale, slack + torch.finfo(x.dtype).eps, 'gradient')

def loss_and_gradient(a, loss_func):
    "Of `loss_func(input, target, arguments)`; the gradient where one is asked for"
    args, mode = abstracted(a)
    x, target = args.pop('input'), args.pop('target')
    with mode:
        if a.grad and isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad and not x.is_inference(): x = x.detach().requires_grad_()
        loss = loss_func(x, target, args)
        if not (a.grad and isinstance(loss, Tensor) and isinstance(x, Tensor) and x.requires_grad and loss.requires_grad) or a.abstract: return loss, None
        return loss, torch.autograd.grad(loss, x, torch.ones_like(loss))[0]

def draw_call(draw, top):
    a = Call(eps=draw(st.sampled_from([top/10, .5*top]) | st.floats(1e-6, top)), reduction=draw(st.sampled_from(REDUCTIONS)),
             backend=draw(st.sampled_from(['auto', 'auto', 'torch'])))
    a.top, a.grad, a.how, a.flat = top, draw(st.booleans()), draw(st.sampled_from(['built', 'built', 'set', 'call'])), False
    return a

sizes = st.lists(st.sampled_from([1, 2, 2, 3, 3, 3, 4, 2, 2, 2, 3, 0]), max_size=3)

def softmax_call(draw):
    a, g = draw_call(draw, 1.), generator(draw)
    a.k, rows = draw(st.sampled_from([1, 2, 3, 3, 4, 5])), draw(sizes)
    a.axis, a.rows = draw(st.integers(0, len(rows))), rows
    shape = rows[:a.axis] + [a.k] + rows[a.axis:]
    dtype, a.kind = draw(st.sampled_from([torch.float32]*3 + [*FLOATS])), draw(st.sampled_from(['index', 'index', 'soft', 'multi_hot']))
    a['input'] = ((rand(g, *shape)-.5)*draw(st.sampled_from([1., 6., 40.]))).to(dtype)
    if a.kind == 'index': a['target'] = torch.randint(a.k, rows, generator=g)
    elif a.kind == 'soft': a['target'] = (rand(g, *shape)*3).softmax(a.axis).to(draw(st.sampled_from(FLOATS)))
    else: a['target'] = (rand(g, *shape) < .5).to(draw(st.sampled_from([torch.bool, dtype, *INTEGERS[:5]])))
    spread = draw(st.sampled_from(['all', 'all', 'others']))
    a |= dict(prior=None, spread=spread, multi_hot=a.kind == 'multi_hot', weight=rand(g, a.k).add(.1).float() if draw(one_in(3)) else None,
              ignore_index=draw(st.sampled_from([-100, 0, a.k-1, -1, 255])) if a.kind == 'index' else draw(st.sampled_from([-100, -1])),
              axis=draw(st.sampled_from([a.axis, a.axis-len(shape)])))
    if a.kind == 'index' and draw(one_in(4)): a['eps'] = rand(g, a.k).to(draw(st.sampled_from(FLOATS[:2])))
    if a.kind != 'multi_hot' and spread == 'all' and draw(one_in(2)): a['prior'] = random_prior(g, a.k, a.kind == 'index' and draw(st.booleans()))
    return a

def random_prior(g, k, square=False):
    v = rand(g, *([k, k] if square else [k])).add(.05)
    return (v/v.sum(-1, keepdim=True)).float()

def check_softmax(a, result):
    if a.any_value: a['prior'] = a['weight'] = None
    x, target, axis = plain(a['input']), plain(a['target']), a['axis'] if a['input'].dim() > 1 else 0
    options = dict(prior=doubled(a['prior']), spread=a['spread'], multi_hot=a['multi_hot'], weight=doubled(a['weight']), ignore_index=a['ignore_index'],
                   reduction=a['reduction'], axis=axis)
    top = x.double().amax(axis, keepdim=True) if x.numel() else x.double()   # huge logits leave no room for the log of a sum
    expected = softmax_reference(x.double() - torch.where(top.isfinite(), top, 0), target.long() if a.kind == 'index' else target.double(), doubled(a['eps']), **options)
    w = 1. if a['weight'] is None else doubled(a['weight']).max().item()
    n, labels = max(1, x.numel()//a.k), 1. if a.kind == 'index' else target.double().nan_to_num(0, 0, 0).abs().sum(axis).max().item() if x.numel() else 1.
    scale = max(1., labels)*dict(mean=1. if a.kind == 'index' else w, sum=n*w, none=w)[a['reduction']]
    check_loss(a, result, *expected, scale, off_one(options['prior']))

def odd_target(pick, a):
    "Class indices of any integer dtype; soft labels that are no distribution"
    t = a.tensor('target')
    need(t.numel() and not t.is_inference())
    if a.kind == 'index':
        a['target'] = plain(t).to(pick(INTEGERS))
        need(a['target'].long().equal(plain(t).long()))   # an ignore_index may be below 0
        return
    need(a.kind == 'soft' and a.k > 1 and not a.masked and t.is_floating_point())
    t, g = plain(t), picked(pick)
    where = rand(g, *t.shape) < .3
    kind = pick(['one-hot', 'unnormalised', 'negative', 'nan', 'inf', 'huge', 'zero'])
    a.negative_labels = kind in ('negative', 'inf', 'nan')
    if kind == 'one-hot': t = (t == t.amax(a.axis, keepdim=True)).to(t.dtype)
    if kind == 'unnormalised': t = t*3
    if kind == 'negative': t = t*3 - 2/a.k
    if kind == 'nan': t[where] = NAN
    if kind == 'inf': t[where] = INF
    if kind == 'huge': t, a.colossal = t*1e15, True
    if kind == 'zero': t = t*0
    if kind not in ('one-hot', 'negative'): a.either |= {'target'}   # where values are looked at
    a.loose = a.loose or kind in ('nan', 'inf')
    a['target'] = t

def all_ignored(pick, a):
    t = a.tensor('target')
    need(a.kind == 'index' and not t.is_inference() and t.dtype == torch.int64)
    a['ignore_index'] = pick([-100, 0, 7, -2**62, 2**40])
    a['target'] = torch.full_like(plain(t), a['ignore_index'])

def odd_weight(pick, a):
    v, g = torch.arange(a.k) + 1., picked(pick)
    # the reference takes nan for a mask, and then a weight of 0 takes it away
    kind = pick(['int', 'half', 'double', 'huge', 'small', 'tiny', 'colossal', 'double huge'] + ['zeros', 'some zero']*(not a.loose))
    if kind == 'some zero': v[pick(range(a.k))] = 0
    a['weight'] = {'int': v.long(), 'half': v.half(), 'double': rand(g, a.k), 'zeros': v*0, 'huge': v*1e28, 'small': v*1e-28, 'tiny': v*1e-42, 'colossal': v/a.k*3e38,
                   'double huge': v.double()*1e300}.get(kind, v)
    if kind in ('colossal', 'double huge', 'tiny'): a.either, a.any_value = a.either | {'weight'}, True   # their sums leave the range of float32

def odd_prior(pick, a):
    need(a.kind != 'multi_hot' and a['spread'] == 'all')
    p = random_prior(picked(pick), a.k)
    kind = pick(['double', 'half', 'int', 'bool', 'requires grad', 'nearly'] if not a.masked else ['double', 'half'])
    first = torch.arange(a.k) == 0
    a.one_hot_prior = kind in ('int', 'bool')
    a['prior'] = {'double': p.double(), 'half': p.half(), 'int': first.long(), 'bool': first, 'requires grad': p.requires_grad_(), 'nearly': p*(1+5e-5)}[kind]

def no_classes(pick, a):
    x = a.tensor('input')
    need(x.dim())
    a['input'] = plain(x).narrow(a.axis, 0, 0)
    return 'input',

def scalar_input(pick, a):
    a['input'] = torch.tensor(pick([1., NAN]))
    return 'input',

def bad_target_dtype(pick, a):
    t = plain(a.tensor('target'))
    if a.kind == 'index': a['target'] = t.to(pick([torch.float32, torch.bool, torch.complex64]))
    else:
        need(a.kind == 'soft' and a.k > 1)   # a row of one label of one class may be an index
        a['target'] = t.to(pick([torch.int64, torch.bool, torch.complex64]))
    return 'target', 'input'

def bad_target_shape(pick, a):
    t = plain(a.tensor('target'))
    need(t.numel())
    a['target'] = torch.stack([t, t], pick(range(t.dim()+1)))
    return 'target', 'input'

def out_of_range(pick, a):
    "A class index that there is not"
    t = a.tensor('target')
    need(a.kind == 'index' and t.numel() and not a.abstract and t.dtype == torch.int64)
    t = plain(t).clone(memory_format=torch.contiguous_format)
    t.view(-1)[pick(range(t.numel()))] = pick([v for v in (a.k, a.k+7, -1, -2**62, 2**40, 2**62) if v != a.get('ignore_index')])
    a['target'] = t
    return 'class index',

def bad_eps_tensor(pick, a):
    v = torch.full((a.k,), .1)
    kind = pick(['shape', 'shape', 'above', 'below', 'nan', 'complex', 'meta', 'bool'])
    if kind in ('above', 'below', 'nan'):
        need(not a.abstract and a.kind == 'index')
        v[pick(range(a.k))] = dict(above=1.5, below=-.1, nan=NAN)[kind]
    if kind == 'shape': v = pick([torch.full((a.k+1,), .1), v[:0], v[None]])
    if kind == 'complex': v = v.to(torch.complex64)
    if kind == 'meta':
        need(not a.abstract and a.kind == 'index')
        v = v.to('meta')
    if kind == 'bool': a.either, v = a.either | {'eps'}, v > 0
    a['eps'] = v
    return () if kind == 'bool' and a.kind == 'index' else ('target', *a_class_each(a))

def bad_together(pick, a):
    "Options that do not go together, or not with these targets"
    v = torch.full((a.k,), 1/a.k)
    kind = pick(['prior and others', 'prior and multi_hot', 'eps a class', 'prior a class', 'ignore_index'])
    if kind == 'prior and others':
        a |= dict(prior=v, spread='others')
        return 'prior', 'spread'
    if kind == 'prior and multi_hot':
        need(a.kind == 'multi_hot')
        a['prior'] = v
        return 'prior', 'multi_hot'
    need(a.kind != 'index')
    if kind == 'eps a class':
        a['eps'] = torch.full((a.k,), .1)
        return 'eps', 'target'
    if kind == 'prior a class':
        a['prior'] = v.expand(a.k, a.k)
        return 'prior', 'target'
    a['ignore_index'] = 0
    return 'ignore_index', 'target'

def bad_axis(pick, a):
    need(a.tensor('input').dim())
    a['axis'] = pick([9, -9, 2**70, 1.5, NAN, '1', None, [1]])
    return 'axis',

def bad_ignored_class(pick, a):
    need(a.kind == 'index')
    a['ignore_index'] = pick([1.5, NAN, '-100', None, [-100], 2**70, torch.tensor([1, 2])])
    return 'ignore_index', 'class index'

ODD_LOSS = {f'{name} layout': laid_out(name) for name in ('input', 'target', 'weight', 'prior')} | {
    'subclass of input': of_subclass('input'), 'subclass of target': of_subclass('target'), 'subclass of an option': of_subclass('weight', 'prior', 'eps'),
    'gradient of input': with_gradient('input'), 'gradient of target': with_gradient('target'), 'gradient of an option': with_gradient('weight', 'prior'),
    'inference input': from_inference_mode('input'), 'inference target': from_inference_mode('target'),
    'inference option': from_inference_mode('weight', 'prior'),
    'logits': odd_logits, 'eps': odd_eps, 'no values': without_values, 'not dense': not_dense('input', 'target', 'weight', 'prior')}
def bad_backend(pick, a):
    a['backend'] = pick(BAD_BACKEND)
    need(a['backend'] != 'triton' or not a.abstract)   # is for GPUs, and for what is nowhere
    return 'backend',

def bad_eps(pick, a):
    a['eps'] = pick(BAD_EPS + [.50001, 1., np.float32(.6), torch.tensor([.1, .2, .3])]*(a.top == .5))
    need(a['eps'] is not None or a.how != 'call')   # that of the module
    return 'eps',

BAD_LOSS = {'input no tensor': one_of('input', NOT_TENSORS), 'target no tensor': one_of('target', NOT_TENSORS), 'input dtype': bad_input_tensor, 'target shape': bad_target_shape,
            'input on meta': elsewhere('input'), 'target on meta': elsewhere('target'), 'backend value': bad_backend, 'eps value': bad_eps}
ODD_SOFTMAX = ODD_LOSS | {'target': odd_target, 'all ignored': all_ignored, 'weight': odd_weight, 'prior': odd_prior}
BAD_SOFTMAX = BAD_LOSS | vector_faults('prior', sums=True) | vector_faults('weight') | {
    'no classes': no_classes, 'scalar input': scalar_input, 'target dtype': bad_target_dtype, 'class index': out_of_range, 'eps tensor': bad_eps_tensor,
    'together': bad_together, 'axis': bad_axis, 'ignore_index': bad_ignored_class}
SOFTMAX_VALUES = dict(reduction=BAD_REDUCTION, spread=BAD_SPREAD)

def for_functions(odd, bad, *names):
    "A function takes whatever values prior and weights have, as PyTorch does; a module refuses them when it is built"
    def taken(name):
        def f(pick, a):
            bad[f'{name} values'](pick, a)
            if a.top == .5 and name != 'prior': a[name] = a[name].view([-1 if d == a.at else 1 for d in range(a.tensor('input').dim())])
            a.any_value = True
        return f
    values = {f'{name} values': taken(name) for name in names}
    return odd | values, {k: v for k, v in bad.items() if k not in values}

@subject('smooth_cross_entropy', softmax_call, check_softmax, *for_functions(ODD_SOFTMAX, BAD_SOFTMAX, 'prior', 'weight'), SOFTMAX_VALUES, 60)
def smooth_cross_entropy_of(a): return loss_and_gradient(a, lambda x, y, args: kernels.smooth_cross_entropy(x, y, **args))

def built(cls, a, late):
    "A loss whose options are given when it is built, set later, or for eps with the call"
    def loss(x, y, args):
        args, call = dict(args), {}
        if a.how == 'call': call['eps'] = args.pop('eps')
        later = {k: args.pop(k) for k in late} if a.how == 'set' else {}
        f = cls(**args)
        for k, v in later.items(): setattr(f, k, v)
        return f(x, y, **call)
    return loss

LATE = 'axis', 'ignore_index', 'reduction', 'backend', 'eps'

@subject('LabelSmoothingCrossEntropy', softmax_call, check_softmax, ODD_SOFTMAX, BAD_SOFTMAX, SOFTMAX_VALUES, 30)
def module_of(a): return loss_and_gradient(a, built(LabelSmoothingCrossEntropy, a, LATE))

def flat_call(draw):
    a = softmax_call(draw)
    a.flat = True
    if a.kind == 'index' and draw(one_in(3)): a['target'] = a['target'][..., None] if a.rows else a['target'].reshape(1)
    return a

@subject('LabelSmoothingCrossEntropyFlat', flat_call, check_softmax, ODD_SOFTMAX, BAD_SOFTMAX, SOFTMAX_VALUES, 40)
def flat_of(a): return loss_and_gradient(a, built(LabelSmoothingCrossEntropyFlat, a, LATE))

# sigmoid

def sigmoid_call(draw):
    a, g = draw_call(draw, .5), generator(draw)
    shape = draw(sizes) + draw(st.sampled_from([[1], [3], [4], []]))
    axis = draw(st.sampled_from([None, None, -1])) if shape else None
    a.at = label_axis(len(shape), axis) if len(shape) != 1 else 0   # (K,) is a row
    a.k, a.kind, dtype = 1 if a.at is None else shape[a.at], draw(st.sampled_from(['hard', 'soft'])), draw(st.sampled_from([torch.float32]*3 + [*FLOATS]))
    need_k = bool(shape) and a.k > 0
    a['input'] = ((rand(g, *shape)-.5)*draw(st.sampled_from([1., 6., 40.]))).to(dtype)
    y = rand(g, *shape)
    a['target'] = y.to(draw(st.sampled_from(FLOATS))) if a.kind == 'soft' else (y < .4).to(draw(st.sampled_from([torch.bool, dtype, *INTEGERS[:5]])))
    shapes = [shape, shape[-1:], [1]*len(shape), shape[:-1] + [1] if shape else [], []]
    def factor(): return rand(g, *draw(st.sampled_from(shapes))).add(.1).float() if draw(one_in(3)) else None
    a |= dict(prior=rand(g, a.k).float() if need_k and draw(one_in(3)) else None, weight=factor(), pos_weight=factor(), axis=axis)
    a.k = max(1, a.k)
    return a

def check_sigmoid(a, result):
    if a.any_value: a['prior'] = a['weight'] = a['pos_weight'] = None
    x, target = plain(a['input']), plain(a['target']).double()
    w, c = (torch.ones(()) if a[o] is None else doubled_tensor(a[o]) for o in ('weight', 'pos_weight'))
    prior = doubled(a['prior'])
    if prior is not None and a.at is not None: prior = along(prior, a.at, x.dim())
    expected = sigmoid_reference(x.double(), target, doubled(a['eps']), prior=prior, weight=w, pos_weight=c, reduction=a['reduction'])
    size = 1. if not x.numel() else max(1., (w.max()*c.clamp(min=1).max()*(1 + target.nan_to_num(0, 0, 0).abs().max())).item())
    check_loss(a, result, *expected, size*(max(1, x.numel()) if a['reduction'] == 'sum' else 1))

def doubled_tensor(v): return plain(v).double()

def odd_labels(pick, a):
    t = a.tensor('target')
    need(t.numel() and t.is_floating_point() and not t.is_inference())
    t, where = plain(t), rand(picked(pick), *t.shape) < .3
    kind = pick(['nan', 'negative', 'above', 'huge'])
    if kind == 'nan': t[where] = NAN
    if kind == 'negative': t = t - 2
    if kind == 'above': t = t*3
    if kind == 'huge': t, a.colossal = t*1e15, True
    a.loose = a.loose or kind == 'nan'
    a['target'] = t

def odd_factor(pick, a):
    name, x = pick(['weight', 'pos_weight']), a.tensor('input')
    v = torch.ones(x.shape[-1:])*3
    kind = pick(['int', 'half', 'double', 'zeros', 'huge', 'small', 'tiny'])
    if kind == 'tiny': a.either |= {name}
    a[name] = {'int': v.long(), 'half': v.half(), 'double': v.double()/3, 'zeros': v*0, 'huge': v*1e28, 'small': v*1e-28, 'tiny': v*1e-42}[kind]

def bad_factor_shape(pick, a):
    x, name = a.tensor('input'), pick(['weight', 'pos_weight'])
    need(x.dim())
    a[name] = torch.ones(pick([(2, *x.shape), (*x.shape[:-1], x.shape[-1]+2)]))
    need(x.shape[-1] or a[name].shape[-1] != 1)
    return name,

def indices_for_labels(pick, a):
    "Class indices, for the loss of labels"
    x = a.tensor('input')
    need(x.dim() and x.shape[-1] > 1 and x.numel() and not a.abstract)
    a['target'] = torch.zeros(x.shape[:-1], dtype=torch.int64)
    return 'target',

def factor_faults(name): return {k: v for k, v in vector_faults(name).items() if k != f'{name} shape'}   # it may have any that broadcasts

ODD_SIGMOID = ODD_LOSS | {'pos_weight layout': laid_out('pos_weight'), 'labels': odd_labels, 'factor': odd_factor}
BAD_SIGMOID = BAD_LOSS | vector_faults('prior', high=1) | factor_faults('weight') | factor_faults('pos_weight') | {
    'factor shape': bad_factor_shape, 'class indices': indices_for_labels, 'target dtype': complex_numbers('target')}
SIGMOID_VALUES = dict(reduction=BAD_REDUCTION)

@subject('smooth_binary_cross_entropy_with_logits', sigmoid_call, check_sigmoid, *for_functions(ODD_SIGMOID, BAD_SIGMOID, 'prior', 'weight', 'pos_weight'), SIGMOID_VALUES, 50)
def bce_of(a): return loss_and_gradient(a, lambda x, y, args: kernels.smooth_binary_cross_entropy_with_logits(x, y, **args))

@subject('LabelSmoothingBCEWithLogits', sigmoid_call, check_sigmoid, ODD_SIGMOID, BAD_SIGMOID, SIGMOID_VALUES, 25)
def bce_module_of(a): return loss_and_gradient(a, built(LabelSmoothingBCEWithLogits, a, ('reduction', 'backend', 'eps')))

def flat_sigmoid_call(draw):
    a = sigmoid_call(draw)
    a.flat = True
    return a

@subject('LabelSmoothingBCEWithLogitsFlat', flat_sigmoid_call, check_sigmoid, ODD_SIGMOID, BAD_SIGMOID, SIGMOID_VALUES, 30)
def bce_flat_of(a): return loss_and_gradient(a, built(LabelSmoothingBCEWithLogitsFlat, a, ('reduction', 'backend', 'eps')))

def decodes_call(draw):
    a = Call(thresh=draw(st.floats(-1, 2)))
    a.cls = draw(st.sampled_from([LabelSmoothingBCEWithLogits, LabelSmoothingBCEWithLogitsFlat]))
    return a

@subject('thresh', decodes_call, lambda a, result: compared(result, torch.linspace(0, 1, 7) > float(number(a['thresh']))),
         {'thresh of another type': lambda pick, a: a.update(thresh=pick([0, 1, np.float32(.25), torch.tensor(.25)]))},
         values=dict(thresh=[NAN, 'x', None, [.5], torch.tensor([.5, .6])]), examples=6)
def decodes(a): return a.cls(thresh=a['thresh']).decodes(torch.linspace(0, 1, 7))

def as_floats(v): return np.asarray(v.detach().double() if isinstance(v, Tensor) else v, dtype=float)

def compared(actual, expected, atol=1e-6): np.testing.assert_allclose(as_floats(actual), as_floats(expected), rtol=0, atol=atol)


# ---------------------------------------------------------------- smoothed targets

def targets_call(draw):
    a, g = softmax_call(draw), generator(draw)
    sigmoid = draw(one_in(3))
    if a.kind != 'index': a['target'] = a['target'].movedim(a.axis, -1)
    if sigmoid: a = Call(target=(rand(g, *draw(sizes), a.k) < .4).to(draw(st.sampled_from([torch.bool, *FLOATS, *INTEGERS]))), eps=draw(st.floats(0, .5)),
                         prior=rand(g, a.k) if draw(st.booleans()) else None, spread='all', multi_hot=False)
    a.k = a['target'].shape[-1] if sigmoid else a.k
    a.kind, a.top, a.axis = 'sigmoid' if sigmoid else a.kind, .5 if sigmoid else 1., -1
    a |= dict(sigmoid=sigmoid, num_classes=a.k if a.kind == 'index' else draw(st.sampled_from([None, a.k])))
    if not isinstance(a['eps'], Tensor) and draw(one_in(5)): a['eps'] = None
    for k in ('input', 'weight', 'ignore_index', 'reduction', 'axis', 'backend'): a.pop(k, None)
    if sigmoid: a['axis'] = -1
    return a

def check_targets(a, q):
    y, eps, prior = plain(a['target']), doubled(a['eps']), doubled(a['prior'])
    if a.kind == 'sigmoid': expected = (1 - 2*(eps := .05 if eps is None else eps))*y.double() + 2*eps*(.5 if prior is None else prior)
    elif a.kind == 'multi_hot' or y.is_floating_point():
        expected = smoothed_targets(y.double(), a.k, .1 if eps is None else eps, prior=prior, spread=a['spread'], multi_hot=a['multi_hot'])
    else: expected = smoothed_targets(y.long(), a.k, .1 if eps is None else eps, prior=prior, spread=a['spread'])
    assert q.dtype == (y.dtype if y.is_floating_point() else torch.float32)
    if a.abstract: assert q.shape == expected.shape and q.is_meta == (a.abstract == 'meta')
    else:
        scale = y.double().nan_to_num(0, 0, 0).abs().max().item() if a.kind in ('soft', 'sigmoid') and y.numel() else 0.
        same(q.as_subclass(Tensor), expected, a, 1. + scale, torch.finfo(q.dtype).eps*2 + (off_one(prior) if a.kind != 'sigmoid' else 0.), 'q')

def as_array(name, *others):
    "A list, an array, an array that is gone through backwards"
    def change(pick, a):
        t = a.tensor(name)
        need(t.dim() and t.numel() and not a.abstract and t.dtype not in (torch.bfloat16, *others) and not t.is_inference())
        t = plain(t)
        kind = pick(['list', 'array', 'backwards', 'every other'])
        if kind == 'list': need(t.dtype in (torch.float32, torch.int64))   # others come back as one of these
        if kind == 'backwards': a.either |= {name}
        v = t.numpy()
        a[name] = {'list': t.tolist(), 'array': v, 'backwards': v[::-1].copy()[::-1], 'every other': np.stack([v, v], -1)[..., 0]}[kind]
    return change

def classes_given(pick, a):
    need(a.kind == 'index')
    a['num_classes'] = pick([None, 'x', -1, 1.5, NAN, [3], True if a.k > 1 else 'x'])
    return 'num_classes',

def classes_that_differ(pick, a):
    need(a.kind != 'index')
    a['num_classes'] = pick([a.k+1, -1, 0, 'x', 1.5])
    return 'num_classes',

def scalar_target(pick, a):
    need(a.kind in ('soft', 'multi_hot', 'sigmoid'))
    a['target'] = torch.tensor(1.) if a.kind == 'soft' else torch.tensor(1)
    return 'target', 'num_classes'

def with_sigmoid(pick, a):
    need(a.kind == 'sigmoid')
    a |= pick([dict(multi_hot=True), dict(spread='others'), dict(eps=.6), dict(eps=torch.full((a.k,), .1))])
    return 'multi_hot', 'spread', 'eps'

def not_for_sigmoid(change):
    def f(pick, a):
        need(a.kind != 'sigmoid')
        return change(pick, a)
    return f

ODD_TARGETS = {k: v for k, v in ODD_LOSS.items() if not k.startswith(('weight', 'logits', 'input', 'inference input', 'not', 'subclass of input', 'gradient of input'))} | {
    'array': as_array('target'), 'not dense': not_dense('target', 'prior'), 'target': not_for_sigmoid(odd_target), 'prior': not_for_sigmoid(odd_prior)}
BAD_TARGETS = {k: not_for_sigmoid(v) for k, v in vector_faults('prior', sums=True).items()} | {
    'target no data': one_of('target', [None, 'abc', object(), [[1, 2], [3]], {}]), 'class index': out_of_range, 'num_classes': classes_given,
    'num_classes of labels': classes_that_differ, 'scalar target': scalar_target, 'sigmoid': with_sigmoid, 'together': not_for_sigmoid(bad_together),
    'eps tensor': not_for_sigmoid(bad_eps_tensor), 'target complex': complex_numbers('target')}

@subject('smooth_targets', targets_call, check_targets, ODD_TARGETS, BAD_TARGETS, dict(eps=[o for o in BAD_EPS if o is not None], spread=BAD_SPREAD), 50)
def smooth_targets_of(a):
    args, mode = abstracted(a)
    with mode: return kernels.smooth_targets(**args)


# ---------------------------------------------------------------- temperature of a loss

def tempered_call(draw):
    a, g = Call(temperature=draw(st.floats(.01, 100))), generator(draw)
    a.cls = draw(st.sampled_from([LabelSmoothingCrossEntropyFlat, LabelSmoothingBCEWithLogitsFlat, LabelSmoothingCrossEntropy, LabelSmoothingBCEWithLogits]))
    a |= dict(loss=a.cls(), x=((rand(g, 3, 4)-.5)*20).float())
    if draw(one_in(3)): a['temperature'] = (rand(g, 4)+.1).tolist()
    return a

def check_tempered(a, probs):
    t = a['temperature']
    z = plain(a['x']).double()/(doubled_tensor(torch.as_tensor(t)) if not isinstance(t, float) else t)
    compared(probs, torch.sigmoid(z) if 'BCE' in a.cls.__name__ else z.softmax(-1))

def of_no_loss(pick, a):
    need(not isinstance(a['temperature'], Tensor) and a['temperature'] != 1)   # of 1 there is nothing to do
    a['loss'] = pick([nn.MSELoss(), F.cross_entropy])
    return 'loss', 'activation'

@subject('tempered', tempered_call, check_tempered,
         {'temperature of another type': lambda pick, a: a.update(temperature=pick([1, 2, np.float32(.5), torch.tensor(3.)])),
          'temperatures in a tensor': lambda pick, a: a.update(temperature=torch.full((4,), 2.)) or setattr(a, 'either', {'temperature'}),
          'layout': laid_out('x'), 'subclass': of_subclass('x'), 'gradient': with_gradient('x')},
         {'loss': of_no_loss}, dict(temperature=[0, 0., -1., NAN, INF, 'x', None, [], [1., 0., 1., 1.], [1., NAN, 1., 1.], [1., 2.], ['x']*4, {}, 1j]), 15)
def tempered_probs(a): return tempered(a['loss'], a['temperature']).activation(a['x'])


# ---------------------------------------------------------------- calibration

def probs_call(draw, tasks=('event', 'classes', 'labels'), **options):
    "Probabilities and targets of a task, and options: a strategy each"
    a, g = Call(), generator(draw)
    a.task, a.n, a.k = draw(st.sampled_from(tasks)), draw(st.sampled_from([1, 2, 3, 5, 8, 12])), draw(st.sampled_from([1, 2, 3, 4]))
    shape = [a.n] if a.task == 'event' else [a.n, a.k]
    logits = (rand(g, *shape)-.5)*draw(st.sampled_from([1., 8., 60.]))
    probs = logits.softmax(-1) if a.task == 'classes' else torch.sigmoid(logits)
    targs = torch.randint(a.k, (a.n,), generator=g) if a.task == 'classes' else (rand(g, *shape) < .5).long()
    a |= dict(probs=probs.to(draw(st.sampled_from([torch.float64, torch.float32, torch.float32]))), targs=targs)
    a |= {k: draw(v) for k, v in options.items()}
    return a

def lists(a): return plain(a['probs']).double().tolist(), plain(a['targs']).long().tolist()

def odd_probs(pick, a):
    "Certain, half and nan ones; half precision"
    p = plain(a.tensor('probs')).clone()
    need(p.is_floating_point() and not a.loose)
    kind = pick(['certain', 'half precision', 'even', 'nan', 'integers'])
    if kind == 'certain': p = F.one_hot(p.argmax(-1), a.k).to(p.dtype) if a.task == 'classes' else p.round()
    if kind == 'half precision': p = p.to(pick([torch.float16, torch.bfloat16]))
    if kind == 'even': p = torch.full_like(p, 1/a.k if a.task == 'classes' else .5)
    if kind == 'nan':
        p[0] = NAN
        a.loose = True
    if kind == 'integers':
        p, a.either = (p.argmax(-1, keepdim=True) == torch.arange(a.k) if a.task == 'classes' else p.round()).long(), a.either | {'probs'}
    a['probs'] = p

def odd_targs(pick, a):
    a['targs'] = plain(a.tensor('targs')).to(pick([*INTEGERS, *FLOATS] + [torch.bool]*(a.task != 'classes')))

def bad_probs(pick, a):
    p = plain(a.tensor('probs')).double()
    kind = pick(['logits', 'percent', 'negative', 'inf', 'no rows', 'shape', 'shape', 'scalar', 'integers', 'sum', 'complex', 'meta', 'fake'])
    at = (pick(range(a.n)),)
    if kind == 'logits': p = p*6 - 8
    if kind == 'percent': p = p*100 + 3
    if kind == 'negative': p[at] = -.25
    if kind == 'inf': p[at] = INF
    if kind == 'no rows': p, a['targs'] = p[:0], a.tensor('targs')[:0]
    if kind == 'shape': p = pick([torch.cat([p, p]), p[None, ..., None], torch.stack([p]*(a.n+1))])
    if kind == 'scalar': p = torch.tensor(.5)
    if kind == 'integers': p = torch.full(p.shape, 3)
    if kind == 'sum':
        need(a.task == 'classes' and a.k > 1)
        p = p*.9
    if kind == 'complex': p = p.to(torch.complex64)
    if kind == 'meta': p = p.to('meta')
    if kind == 'fake': p = FakeTensorMode().from_tensor(p)
    a['probs'] = p
    return 'probs', *(['targs'] if kind in ('shape', 'scalar', 'no rows') else [])

def bad_targs(pick, a):
    t = plain(a.tensor('targs')).double()
    top = a.k-1 if a.task == 'classes' else 1
    kind = pick(['above', 'below', 'fraction', 'nan', 'inf', 'complex', 'meta', 'shape', 'shape', 'huge', 'fake'])
    at = (pick(range(a.n)),)
    if kind in ('above', 'below', 'fraction', 'nan', 'inf', 'huge'): t[at] = dict(above=top+1., below=-1., fraction=.5, nan=NAN, inf=INF, huge=1e18)[kind]
    if kind in ('above', 'below', 'huge') and pick([True, False]): t = t.long()
    if kind == 'complex': t = t.to(torch.complex64)
    if kind == 'meta': t = t.to('meta')
    if kind == 'fake': t = FakeTensorMode().from_tensor(t)
    if kind == 'shape': t = pick([torch.cat([t, t]), t[None, ..., None], torch.stack([t]*(a.n+1))])
    a['targs'] = t
    return 'targs', *(['probs'] if kind == 'shape' else [])

ODD_PROBS = {'probs layout': laid_out('probs'), 'targs layout': laid_out('targs', INTEGERS[5:]), 'subclass': of_subclass('probs', 'targs'), 'gradient': with_gradient('probs'),
             'inference': from_inference_mode('probs', 'targs'), 'probs': odd_probs, 'targs': odd_targs, 'array': as_array('probs'),
             'array of targets': as_array('targs', *INTEGERS[5:]), 'not dense': not_dense('probs', 'targs')}
BAD_PROBS = {'probs': bad_probs, 'targs': bad_targs, 'probs no data': one_of('probs', [None, 'abc', 3.5, object(), [[.5], [.2, .8]]]),
             'targs no data': one_of('targs', [None, 'abc', 3.5, object(), [[1], [1, 0]]])}
averages = st.sampled_from(['macro', 'worst', None])

def check_measure(a, value, of_columns, atol):
    "`of_columns` gives the value of each label, from lists"
    assert type(value) is Tensor and value.dtype == torch.float64
    probs, targs = lists(a)
    if a.loose and plain(a['probs']).isnan().any():
        assert value.isnan().any()
        return
    expected = averaged(of_columns(probs, targs), a['average'])
    compared(value, expected, atol)

def measure_subject(measure, of_columns, examples, values=(), atol=2e-6, **options):
    def draw(draw): return probs_call(draw, average=averages, **options)
    @subject(measure.__name__, draw, lambda a, value: check_measure(a, value, partial(of_columns, a), atol), ODD_PROBS, BAD_PROBS,
             dict(average=BAD_AVERAGE) | dict(values), examples)
    def call(a): return measure(**a)

def binned(a, probs, targs, classwise=False):
    kw = {k: a[k] for k in ('n_bins', 'binning', 'norm', 'debias')}
    return [error_reference(o, **kw) for o in columns(probs, targs, classwise)]

bins = dict(n_bins=st.sampled_from([1, 2, 5, 10, 15, 100]), binning=st.sampled_from(['width', 'mass']), norm=st.sampled_from(['l1', 'l2', 'max']), debias=st.just(False))
BAD_BINS = dict(n_bins=BAD_COUNT, binning=['Width', '', None, 0, ['mass']], norm=['L1', 'inf', '', None, 1, ['l1']])
measure_subject(nll, lambda a, p, t: nll_reference(p, t), 15)
measure_subject(brier_score, lambda a, p, t: brier_reference(p, t), 10)
measure_subject(calibration_error, binned, 25, BAD_BINS, **bins)
measure_subject(classwise_calibration_error, partial(binned, classwise=True), 15, BAD_BINS, **bins)
measure_subject(smooth_calibration_error, lambda a, p, t: [smooth_reference(o) for o in columns(p, t)], 10, atol=3e-3)

MEASURES = nll, brier_score, calibration_error, classwise_calibration_error, smooth_calibration_error
levels = st.floats(.05, .95)

def of_no_measure(pick, a):
    a['measure'] = pick([None, 'nll', F.cross_entropy, 3, [nll]])
    return 'measure',

def groups_given(pick, a):
    g = torch.randint(3, (a.n,), generator=picked(pick))
    a['groups'] = pick([g, g.float(), g.tolist(), g.numpy(), TensorBase(g), g.expand(2, a.n)[0]])

def bad_groups(pick, a):
    a['groups'] = pick([torch.zeros(a.n+1), torch.zeros(0), 3, 'ab'*a.n, torch.zeros(2*a.n, 2), object(), torch.zeros(a.n).to('meta')])
    return 'groups',

def no_such_option(pick, a):
    a['n_bin'] = 3
    return 'n_bin',

def check_interval(a, result):
    low, high = (torch.as_tensor(o, dtype=torch.double) for o in (zip(*result) if isinstance(result, list) else result))
    if a.loose: return
    assert low.isfinite().all() and high.isfinite().all() and (low <= high + 1e-9).all() and (low >= -1e-9).all()

def interval_subject(f, count, examples):
    def draw(draw):
        return probs_call(draw, measure=st.sampled_from(MEASURES), average=averages, level=levels, seed=st.sampled_from([0, 7, -1, 2**63-1]), **{count: st.sampled_from([1, 3, 20])})
    @subject(f.__name__, draw, check_interval, ODD_PROBS | {'groups': groups_given},
             BAD_PROBS | {'measure': of_no_measure, 'groups': bad_groups, 'option': no_such_option},
             {'average': BAD_AVERAGE, 'level': BAD_LEVEL, 'seed': BAD_SEED, count: BAD_COUNT}, examples)
    def call(a): return f(**a)

def check_floor(a, result):
    mean, upper = result
    if not a.loose: assert mean.isfinite().all() and upper.isfinite().all() and (mean >= 0).all()

interval_subject(bootstrap_interval, 'n_boot', 12)
interval_subject(null_floor, 'n_draws', 12)
SUBJECTS['null_floor'] = SUBJECTS['null_floor']._replace(check=check_floor)

def binomial_call(draw):
    n = draw(st.integers(1, 1000))
    return Call(k=draw(st.integers(0, n)), n=n, level=draw(levels))

def check_wilson(a, result):
    k, n, level = (float(a[o]) for o in ('k', 'n', 'level'))
    z, p = math.sqrt(2)*torch.erfinv(torch.tensor(level, dtype=torch.double)).item(), k/n
    middle, half = (p + z*z/2/n)/(1 + z*z/n), z/(1 + z*z/n)*math.sqrt(p*(1-p)/n + z*z/4/n/n)
    compared(result, (middle-half, middle+half), 1e-6)

@subject('binomial_interval', binomial_call, check_wilson,
         {'types': lambda pick, a: a.update(pick([{o: kind(a[o]) for o in ('k', 'n')} for kind in (float, np.int64, torch.tensor)]))},
         {'k above n': lambda pick, a: a.update(k=a['n']+1) or ('k',)}, dict(k=[-1, NAN, INF, 'x', None], n=[0, -1, NAN, INF, 'x', None], level=BAD_LEVEL), 6)
def interval_of(a): return binomial_interval(**a)

def reliability_call(draw):
    return probs_call(draw, ('event', 'classes'), n_bins=bins['n_bins'], binning=bins['binning'], min_n=st.sampled_from([0, 1, 3, 50]), level=levels)

def check_reliability(a, df):
    "The bins in all have as many rows, and those that are right, as there are"
    probs, targs = lists(a)
    col = [o for o in columns(probs, targs)[0] if o[0] == o[0]]
    assert df.n.sum() == len(col)
    compared([(df.accuracy*df.n).sum(), (df.confidence*df.n).sum()], [sum(y for _, y in col), sum(p for p, _ in col)], 1e-6*max(1, len(col)))
    assert ((df.low <= df.accuracy + 1e-9) & (df.accuracy <= df.high + 1e-9)).all()

def several_labels(pick, a):
    a |= dict(probs=torch.rand(5, 3), targs=torch.ones(5, 3))
    return 'probs',

@subject('reliability', reliability_call, check_reliability, ODD_PROBS, BAD_PROBS | {'several labels': several_labels},
         dict(n_bins=BAD_COUNT, binning=BAD_BINS['binning'], level=BAD_LEVEL, min_n=['x', None, [1], NAN]), 12)
def reliability_of(a): return reliability(**a)

METRICS = {NLL: nll, Brier: brier_score, ECE: calibration_error, ClasswiseECE: classwise_calibration_error, SmoothECE: smooth_calibration_error}

def metric_call(draw):
    "A metric, logits and targets as a Learner has them, in two batches"
    a, g = Call(average=draw(st.sampled_from(['macro', 'worst']))), generator(draw)
    a.make, a.task, a.n, a.k = draw(st.sampled_from([*METRICS])), draw(st.sampled_from(['classes', 'labels'])), draw(st.integers(2, 8)), draw(st.integers(2, 4))
    a.loss = CrossEntropyLossFlat() if a.task == 'classes' else BCEWithLogitsLossFlat()
    x = (rand(g, a.n, a.k)*8 - 4).float()
    a |= dict(logits=x, targs=torch.randint(a.k, (a.n,), generator=g) if a.task == 'classes' else (rand(g, a.n, a.k) < .5).float(), act=None)
    if a.make in (ECE, ClasswiseECE): a['n_bins'] = draw(st.sampled_from([1, 3, 15]))
    return a

def check_metric(a, value):
    x, y = doubled_tensor(a['logits']), plain(a['targs'])
    probs = x.softmax(1) if a.task == 'classes' else x.sigmoid()
    kw = {k: a[k] for k in ('n_bins', 'average') if k in a}
    if x.isnan().any(): assert math.isnan(value)
    else: compared(value, METRICS[a.make](probs, y, **kw), 1e-4 if x.dtype != torch.float64 else 1e-6)

def odd_logits_of_metric(pick, a):
    x = plain(a.tensor('logits'))
    need(not x.is_inference())
    a['logits'] = pick([x*1e30, x*0, x.double(), torch.where(x < -2, -INF, x) if a.task == 'labels' else x, torch.where(x > 2, NAN, x), -x])

def bad_metric_targets(pick, a):
    t = plain(a.tensor('targs'))
    a['targs'] = pick([t + a.k, t - a.k - 1, torch.cat([t, t, t]), t.to(torch.complex64), t[..., None, None].expand(*t.shape, 2, 5)])
    return 'targs', 'target'

@subject('metrics', metric_call, check_metric, {'layout': laid_out('logits'), 'targets layout': laid_out('targs'), 'subclass': of_subclass('logits', 'targs'),
         'gradient': with_gradient('logits'), 'inference': from_inference_mode('logits', 'targs'), 'logits': odd_logits_of_metric}, {'targets': bad_metric_targets},
         dict(average=['mean', None, 0, 'Macro', ['macro']], act=['softmax', 3, [F.softmax]]), 15)
def metric_value(a):
    kw = {k: v for k, v in a.items() if k not in ('logits', 'targs')}
    m = a.make(**kw)
    m.reset()
    x, y = a['logits'], a['targs']
    for at in (slice(0, 1), slice(1, None)): m.accumulate(SimpleNamespace(pred=x[at], y=y[at], yb=(y[at],), loss_func=a.loss, to_detach=lambda o: o))
    return m.value


# ---------------------------------------------------------------- temperature

def logits_call(draw, tasks=('event', 'classes', 'labels'), **options):
    a, g = Call(), generator(draw)
    a.task, a.n, a.k = draw(st.sampled_from(tasks)), draw(st.sampled_from([1, 2, 8, 20])), draw(st.sampled_from([1, 2, 3, 4]))
    shape = [a.n] if a.task == 'event' else [a.n, a.k]
    a |= dict(logits=((rand(g, *shape)-.5)*draw(st.sampled_from([1e-3, 1., 8., 1e3]))).to(draw(st.sampled_from([torch.float32, torch.float64]))),
              targs=torch.randint(a.k, (a.n,), generator=g) if a.task == 'classes' else (rand(g, *shape) < .5).to(draw(st.sampled_from([torch.int64, torch.float32, torch.bool]))))
    a |= {k: draw(v) for k, v in options.items()}
    return a

def odd_scores(pick, a):
    x, g = plain(a.tensor('logits')), picked(pick)
    need(x.is_floating_point())
    where, kind = rand(g, *x.shape) < .2, pick(['nan', 'equal', 'huge', 'tiny', 'masked', 'half', 'inf', 'integers'])
    if kind == 'nan': x[where] = NAN
    if kind == 'inf': x[where] = INF
    if kind == 'masked':
        need(a.task == 'classes' and not a.loose)
        targs = plain(a.tensor('targs')).long()
        x[where & (torch.arange(a.k) != targs[:, None])] = -INF
    if kind == 'equal': x = torch.full_like(x, .5)
    if kind == 'huge': x = x*1e30
    if kind == 'tiny': x = x*1e-30
    if kind == 'half': x = x.half()
    if kind == 'integers': x, a.either = x.round().long(), a.either | {'logits'}
    a.loose = a.loose or kind in ('nan', 'inf')
    a['logits'] = x

def odd_truths(pick, a): a['targs'] = plain(a.tensor('targs')).to(pick([*INTEGERS[:5], *FLOATS][:5 if a.task == 'classes' else None]))

def bad_scores(pick, a):
    x = plain(a.tensor('logits'))
    kind = pick(['shape', 'complex', 'dims', 'scalar', 'meta', 'no tensor'])
    a['logits'] = {'shape': torch.cat([x, x]), 'complex': x.to(torch.complex64), 'dims': x[None, None], 'scalar': torch.tensor(1.), 'meta': x.to('meta'),
                   'no tensor': pick([None, 'abc', 3.5, x.tolist(), x.double().numpy()])}[kind]
    return 'logits', *(['targs'] if kind in ('shape', 'dims', 'scalar') else [])

def bad_truths(pick, a):
    t = plain(a.tensor('targs'))
    kind = pick(['above', 'below', 'fraction', 'nan', 'shape', 'meta', 'complex', 'no tensor'])
    if kind in ('above', 'below'): t[(0,)*t.dim()] = (a.k if a.task == 'classes' else 2) if kind == 'above' and t.dtype != torch.bool else -1
    if kind == 'below': need(t.dtype != torch.bool)
    if kind == 'above' and t.dtype == torch.bool: t = t.long()+1
    if kind in ('fraction', 'nan'):
        need(a.task == 'classes')   # the share of a label is as good as the label
        t = t + (.5 if kind == 'fraction' else NAN)
    if kind == 'shape': t = torch.cat([t, t])
    if kind == 'meta': t = t.to('meta')
    if kind == 'complex': t = t.to(torch.complex64)
    if kind == 'no tensor': t = pick([None, 'abc', 3.5, t.tolist(), t.double().numpy()])
    a['targs'] = t
    return 'targs', *(['logits'] if kind == 'shape' else [])

ODD_SCORES = {'layout': laid_out('logits'), 'targets layout': laid_out('targs'), 'subclass': of_subclass('logits', 'targs'), 'gradient': with_gradient('logits'),
              'inference': from_inference_mode('logits', 'targs'), 'logits': odd_scores, 'targets': odd_truths}
BAD_SCORES = {'logits': bad_scores, 'targets': bad_truths}

def mean_nll(x, t, task):
    return (F.cross_entropy(x, t.long()) if task == 'classes' else F.binary_cross_entropy_with_logits(x, t.double())).item()

def check_temperature(a, T):
    "No T of a wide grid is better by more than a little; where there is none, the best of the grid is at its end, or T says nothing"
    x, t = doubled_tensor(a['logits']), plain(a['targs'])
    if a.loose: return
    size = x[x.isfinite()].abs().max().item() if x.numel() else 0.
    if T is None or size == 0: return
    assert 0 < T < INF
    best = mean_nll(x/T, t, a.task)
    for s in np.geomspace(1e-3, 1e3, 61)*size: assert best <= mean_nll(x/s, t, a.task) + 1e-6
    assert best <= mean_nll(x, t, a.task) + 1e-9

@subject('best_temperature', logits_call, check_temperature, ODD_SCORES, BAD_SCORES, examples=15)
def temperature_of(a): return best_temperature(**a)

def check_cross_fitted(a, result):
    "Each row is divided by one positive number, and there are as many as folds at most"
    x = doubled_tensor(a['logits'])
    assert result.shape == x.shape and isinstance(result, Tensor)
    if a.loose or not x.isfinite().all() or not (x.abs() > 1e-20).all(): return
    T = (x/result.double()).reshape(a.n, -1)
    compared(T/T[:, :1], torch.ones_like(T), 1e-2)
    assert (T > 0).all()

@subject('cross_fitted', partial(logits_call, folds=st.sampled_from([2, 5, 100]), seed=st.sampled_from([0, 3, -1])), check_cross_fitted, ODD_SCORES, BAD_SCORES,
         dict(folds=BAD_COUNT, seed=BAD_SEED), 10)
def fitted_of(a): return cross_fitted(**a)

@subject('noise_estimate', partial(logits_call, tasks=('classes', 'labels'), max_numel=st.sampled_from([1, 50, 10**6])), lambda a, o: a.loose or in_order(o), {k: v for k, v in ODD_SCORES.items() if k != 'logits'},
         BAD_SCORES, dict(max_numel=['x', None, NAN, [1]]), 4)
def noise_of(a): return noise_estimate(**a)

def in_order(o):
    assert 0 <= o.low <= o.noise + 1e-3 and o.noise <= o.high + 1e-3 and o.high <= 1


# ---------------------------------------------------------------- Learners

class Given(nn.Module):
    "Its weights are the logits, whatever comes in"
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
    def forward(self, x): return self.logits + 0*x.sum()

def given_learner(x, y, loss_func, **kwargs):
    "Predicts the logits `x`, of one batch with targets `y` (several: a list), in training and validation"
    ys = [torch.cat([o, o]) for o in (y if isinstance(y, list) else [y])]
    dls = tensor_dls(torch.zeros(len(ys[0]), 1), ys if len(ys) > 1 else ys[0], bs=len(x), n_valid=len(x))
    return tensor_learner(dls, Given(x), loss_func=loss_func, **kwargs)

def trained(learn):
    "Loss and gradient of a fit of one batch"
    loss, grads = Spy(lambda l: l.loss.detach().clone(), 'after_step', order=1001), Grads()
    learn.fit(1, 0., cbs=[loss, grads])
    return loss.train()[0].as_subclass(Tensor), grads.seen[0]

# train_prior

def train_data(labels, c):
    "What is read of DataLoaders whose datasets are fastai's"
    return SimpleNamespace(train=SimpleNamespace(dataset=SimpleNamespace(tls=[None, labels])), c=c)

def prior_call(draw):
    a, g = Call(ignore_index=-100), generator(draw)
    a.k, a.n, a.task = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.sampled_from(['classes', 'masks', 'labels']))
    a.labels = list(torch.randint(a.k, (a.n,), generator=g) if a.task == 'classes' else torch.randint(a.k, (a.n, 2, 3), generator=g) if a.task == 'masks'
                    else (rand(g, a.n, a.k) < .5).float())
    if a.task == 'masks' and a.k > 1 and draw(st.booleans()):
        a['ignore_index'] = 0
        a.labels[0][0, 0] = 1
    a |= dict(multi=a.task == 'labels', dls=train_data(a.labels, a.k))
    return a

def with_labels(change):
    def f(pick, a):
        need(isinstance(a['dls'], SimpleNamespace))
        names = change(pick, a)
        a['dls'] = train_data(a.labels, a.k)
        return names
    return f

def odd_train_labels(pick, a):
    need(all(isinstance(o, Tensor) for o in a.labels))
    kind = pick(['ints', 'lists', 'subclass', 'small', 'double', 'unknown', 'bool'])
    if kind == 'ints': a.labels = [o.tolist() for o in a.labels]
    if kind == 'lists': a.labels = [np.array(o) for o in a.labels]
    if kind == 'subclass': a.labels = [TensorCategory(o) for o in a.labels]
    if kind == 'small': a.labels = [o.to(torch.uint8) for o in a.labels]
    if kind == 'double': need(a.task == 'labels'); a.labels = [o.double() for o in a.labels]
    if kind == 'unknown': need(a.task == 'labels'); a.labels = [*a.labels, torch.full((a.k,), NAN)]
    if kind == 'bool': need(a.task == 'labels'); a.labels = [o > .5 for o in a.labels]

def bad_train_labels(pick, a):
    one = torch.as_tensor(a.labels[0])
    kind = pick(['above', 'below', 'none', 'text', 'fraction', 'nan', 'ragged', 'other task', 'complex'])
    if kind in ('above', 'below', 'nan', 'fraction', 'complex'):
        need(a.task != 'labels' or kind not in ('nan', 'fraction'))
        wrong = {'above': a.k+1, 'below': -1, 'nan': NAN, 'fraction': .5, 'complex': 1j}[kind]
        a.labels = [*a.labels, torch.full(one.shape, wrong, dtype=None if isinstance(wrong, (float, complex)) else torch.int64)]
    if kind == 'none': a.labels = []
    if kind == 'text': a.labels = ['cat']*3
    if kind == 'ragged':
        need(a.task == 'labels')
        a.labels = [*a.labels, torch.zeros(a.k+1)]
    if kind == 'other task':
        need(a.task == 'classes')   # of which 0 and 1 could be the two values of one label
        a['multi'], a.labels = True, [*a.labels, torch.tensor(2)]
    return 'label', 'target'

def other_dls(pick, a):
    need(not a['multi'])
    a['dls'] = pick([SimpleNamespace(train=SimpleNamespace(dataset=[1, 2]), c=2), train_data(a.labels, None)])
    return 'dls', 'prior'

def bad_ignore(pick, a):
    need(not a['multi'])   # has no use for it
    a['ignore_index'] = pick(['x', None, [1], NAN, 1.5, torch.tensor([1, 2])])
    return 'ignore_index',

def check_prior(a, p):
    assert type(p) is Tensor and p.dtype == torch.float32
    if a['multi']: expected = torch.stack([torch.as_tensor(o).double() for o in a.labels]).nanmean(0)
    else:
        flat = [i for o in a.labels for i in torch.as_tensor(o).flatten().tolist() if i != a['ignore_index']]
        expected = torch.tensor([flat.count(i)/len(flat) for i in range(a.k)])
    compared(p, expected)

@subject('train_prior', prior_call, check_prior, {'labels': with_labels(odd_train_labels)}, {'labels': with_labels(bad_train_labels), 'dls': other_dls, 'ignore_index': bad_ignore}, examples=15)
def prior_of(a): return train_prior(**a)

# MultiLabelSmoothingCallback

def multi_call(draw):
    a, g = Call(eps=draw(st.floats(1e-6, .5)), prior=None), generator(draw)
    a.k, a.top, a.kind, a.n = draw(st.integers(1, 4)), .5, 'hard', draw(st.integers(1, 4))
    a |= dict(input=(rand(g, a.n, a.k)*8 - 4).float(), target=(rand(g, a.n, a.k) < .5).float(), prior=rand(g, a.k).float() if draw(st.booleans()) else None)
    a.loss = draw(st.sampled_from([BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss(), lambda p, y: F.binary_cross_entropy_with_logits(p, y)]))
    a.cbs = []
    return a

def check_multi(a, result):
    loss, grad = result
    expected = sigmoid_reference(a['input'], a['target'], doubled(a['eps']), prior=doubled(a['prior']))
    same(loss, expected[0], a, a['input'].abs().max().item())   # the loss is torch's: it takes the difference of two as large
    if not a.loose: same(grad, expected[1].flatten(), a, what='gradient')

def odd_multi(pick, a):
    y = a.tensor('target')
    need(not a.loose)
    kind = pick(['soft', 'nan', 'bool', 'int', 'uint8', 'double', 'huge logits'])
    if kind == 'soft': a['target'] = rand(picked(pick), *y.shape).float()
    if kind == 'nan': a['target'], a.loose = torch.where(y == 1, NAN, y), True
    if kind in ('bool', 'int', 'uint8'): a['target'] = y.to(dict(bool=torch.bool, int=torch.int64, uint8=torch.uint8)[kind])
    if kind == 'double':
        need(isinstance(a.loss, BaseLoss))
        a['target'] = y.double()
    if kind == 'huge logits':
        need(a['input'].abs().max() < 1e5)   # once
        a['input'] = a['input']*1e30

def bad_multi(pick, a):
    y = a.tensor('target')
    kind = pick(['indices', 'shape', 'two', 'loss', 'one class', 'callback', 'train', 'valid'])
    if kind == 'indices': a['target'] = torch.zeros(a.n, dtype=torch.int64); return 'target', 'class ind'
    if kind == 'shape': a['target'] = torch.zeros(a.n, a.k+1); return 'target',
    if kind == 'two': a['target'] = [y, y]; a.loss = lambda p, *ys: F.binary_cross_entropy_with_logits(p, ys[0]); return 'target',
    if kind == 'loss': a.loss = pick([LabelSmoothingBCEWithLogitsFlat(), LabelSmoothingBCEWithLogits()]); return type(a.loss).__name__,
    if kind == 'one class': a.loss = pick([CrossEntropyLossFlat(), nn.CrossEntropyLoss()]); return 'CrossEntropyLossFlat', 'CrossEntropyLoss'
    if kind == 'callback': a.cbs = [MultiLabelSmoothingCallback()]; return 'MultiLabelSmoothingCallback',
    a['prior'] = kind
    return 'prior',

@subject('MultiLabelSmoothingCallback', multi_call, check_multi, {'eps': odd_eps, 'prior layout': laid_out('prior'), 'subclass of prior': of_subclass('prior'),
         'gradient of prior': with_gradient('prior'), 'inference prior': from_inference_mode('prior'), 'targets': odd_multi},
         vector_faults('prior', high=1) | {'use': bad_multi, 'eps value': bad_eps}, {}, 15)
def trained_with_callback(a):
    args = dict(a)
    x, y = args.pop('input'), args.pop('target')
    if not isinstance(a.loss, BaseLoss) and isinstance(y, Tensor) and not y.is_floating_point(): y = y.float()   # torch's own want that
    return trained(given_learner(x, y, a.loss, cbs=[MultiLabelSmoothingCallback(**args), *a.cbs]))

# LabelSmoothingScheduler

def schedule_call(draw):
    a = Call(sched=draw(st.sampled_from([SchedCos(.2, 0.), SchedLin(0., 1.), lambda p: .1, lambda p: p, lambda p: 1, lambda p: torch.tensor(p), lambda p: np.float32(.25)])))
    a.loss = draw(st.sampled_from([lambda: LabelSmoothingCrossEntropyFlat(), lambda: LabelSmoothingCrossEntropy(axis=-1)]))
    return a

def other_loss(pick, a):
    a.loss = pick([CrossEntropyLossFlat, nn.CrossEntropyLoss])
    return 'loss',

def beyond_half(pick, a):
    a.loss, a['sched'] = lambda: LabelSmoothingBCEWithLogitsFlat(), lambda p: .5 + p
    return 'eps',

def bad_values_of_sched(pick, a):
    v = pick([NAN, 2., -1, None, 'x', [.1], True])
    a['sched'] = lambda p: v
    return 'eps', 'sched'

@cache
def rows(multi=False): return (multi_dls if multi else single_dls)(n=24, k=3, bs=6)

@subject('LabelSmoothingScheduler', schedule_call, lambda a, seen: compared(seen, [float(a['sched'](i/3)) for i in range(3)]), {},
         {'loss': other_loss, 'beyond a half': beyond_half, 'values': bad_values_of_sched}, dict(sched=[None, .1, 'cos', [.1, .2], torch.tensor(.1)]), 10)
def scheduled(a):
    loss = a.loss()
    learn = tensor_learner(rows(isinstance(loss, LabelSmoothingBCEWithLogitsFlat)), mlp(k=3), loss)
    learn.fit(1, cbs=LabelSmoothingScheduler(**a))
    assert not hasattr(loss, 'eps') or loss.eps in (.1, .05)
    return learn.recorder.hps['eps']

# to_smooth, to_hard, label_smoothing=

SMOOTHABLE = dict(classes=[CrossEntropyLossFlat, nn.CrossEntropyLoss, lambda: F.cross_entropy, lambda: LabelSmoothingCrossEntropyFlat(.3)],
                  labels=[BCEWithLogitsLossFlat, nn.BCEWithLogitsLoss])

def smooth_call(draw):
    a, g = Call(), generator(draw)
    a.task, a.k, a.n = draw(st.sampled_from(['classes', 'classes', 'labels'])), draw(st.integers(2, 4)), draw(st.integers(1, 4))
    a.kind, a.top = ('index', 1.) if a.task == 'classes' else ('hard', .5)
    a.loss = draw(st.sampled_from(SMOOTHABLE[a.task]))()
    a.x = (rand(g, a.n, a.k)*8 - 4).float()
    a.y = torch.randint(a.k, (a.n,), generator=g) if a.task == 'classes' else (rand(g, a.n, a.k) < .5).float()
    spread = draw(st.sampled_from(['all', 'others'])) if a.task == 'classes' else 'all'
    prior = spread == 'all' and draw(st.booleans())
    a |= dict(eps=draw(st.floats(1e-6, a.top)), prior=(random_prior(g, a.k, draw(st.booleans())) if a.task == 'classes' else rand(g, a.k).float()) if prior else None,
              spread=spread, smooth_valid=a.task == 'classes' and draw(st.booleans()))
    if draw(one_in(5)): a['eps'] = None
    elif a.task == 'classes' and draw(one_in(5)): a['eps'] = rand(g, a.k)
    return a

def check_smoothed(a, result):
    (loss, grad), valid = result
    prior, eps = doubled(a['prior']), doubled(a['eps'])
    if a.task == 'labels': of = lambda e: sigmoid_reference(a.x, a.y, e, prior=prior)
    else: of = lambda e: softmax_reference(a.x, a.y, e, prior=prior, spread=a['spread'])
    eps, hard = (.1 if a.task == 'classes' else .05) if eps is None else eps, 0.
    same(loss, of(eps)[0], a)
    same(grad, of(eps)[1].flatten(), a, what='gradient')
    compared(valid, of(eps if a['smooth_valid'] else hard)[0], 1e-4)

def bad_smooth(pick, a):
    kind = pick(['loss', 'to_hard', 'smooth_valid', 'spread', 'prior and others', 'train', 'valid'])
    if kind == 'loss':
        class Own(CrossEntropyLossFlat): pass
        def own(pred, y): return pred.sum()
        a.loss, name = pick([(MSELossFlat(), 'MSELoss'), (Own(), 'Own'), (nn.NLLLoss(), 'NLLLoss'), (own, 'own')])
        return name,
    if kind == 'to_hard': a.how = 'hard'; return 'to_smooth',
    if kind in ('smooth_valid', 'spread'):
        need(a.task == 'labels')
        a[kind] = dict(smooth_valid=True, spread='others')[kind]
        return kind,
    if kind == 'prior and others':
        need(a.task == 'classes')
        a |= dict(prior=torch.full((a.k,), 1/a.k), spread='others')
        return 'prior', 'spread'
    a['prior'] = kind
    return 'prior',

def eps_of_task(pick, a):
    "Beyond what this head has"
    a['eps'] = pick([.6, 1.] if a.task == 'labels' else [1.1, torch.full((a.k+1,), .1), torch.full((a.k,), -.1)])
    return 'eps', *a_class_each(a)

ODD_OPTIONS = {f'{o} layout': laid_out(o) for o in ('prior', 'eps')} | {'subclass': of_subclass('prior', 'eps'), 'gradient': with_gradient('prior'),
                                                                         'inference': from_inference_mode('prior', 'eps')}

@subject('to_smooth', smooth_call, check_smoothed, ODD_OPTIONS | {'eps': odd_eps},
         {'use': bad_smooth, 'eps of the task': eps_of_task} | vector_faults('prior', high=1),
         dict(eps=[o for o in BAD_EPS if o is not None], spread=BAD_SPREAD), 20)
def smoothed(a):
    learn = given_learner(a.x, a.y, a.loss)
    if a.how == 'hard': return learn.to_hard()
    learn.to_smooth(**a)
    result = trained(learn), learn.validate()[0]
    assert learn.to_hard().loss_func is a.loss and not learn._grab_cbs(MultiLabelSmoothingCallback)
    return result

def flag_call(draw):
    a = Call(label_smoothing=draw(st.sampled_from([None, False, True, 0, 0., .2, .5, np.float32(.25), torch.tensor(.25), Fraction(1, 4)])))
    a.multi = draw(st.booleans())
    return a

def check_flag(a, learn):
    v = a['label_smoothing']
    cbs, expected = learn._grab_cbs(MultiLabelSmoothingCallback), (.05 if a.multi else .1) if v is True else v if v is None or v is False else float(v)
    eps = (cbs[0].eps if cbs else None) if a.multi else getattr(learn.loss_func, 'eps', None)
    assert eps == (None if expected in (None, False) and not isinstance(expected, float) else pytest.approx(expected))

@subject('label_smoothing=', flag_call, check_flag, {}, {}, dict(label_smoothing=[-.1, 1.5, NAN, INF, 'x', '', [.1], {}, 1j, np.array([.1, .2]), object()]), 8)
def flagged(a): return tensor_learner(rows(a.multi), mlp(k=3), BCEWithLogitsLossFlat() if a.multi else CrossEntropyLossFlat(), **a)

# predictions, temperature, eps_find and pictures of a Learner

@cache
def model(): return mlp(k=3)

def some_learner(multi=False, loss=None): return tensor_learner(rows(multi), model(), loss or (BCEWithLogitsLossFlat() if multi else CrossEntropyLossFlat()))

def predicted(multi):
    "Logits and targets of the validation data"
    x, y = (torch.cat([plain(b[i]) for b in rows(multi).valid]) for i in (0, 1))
    with torch.no_grad(): return model()(x), y

BAD_DS = [7, -7, 'x', None, 1.5, NAN, [1], {}]

def learner_call(draw, **options):
    a = Call({k: draw(v) for k, v in options.items()})
    a.multi = draw(st.booleans())
    a['learn'] = some_learner(a.multi)
    return a

def check_raw(a, preds):
    logits, targs = predicted(a.multi)
    compared(preds.logits, logits)
    compared(preds.targs, targs, 0)

@subject('raw_preds', partial(learner_call, ds_idx=st.just(1), max_numel=st.sampled_from([1, 10**6]), seed=st.sampled_from([0, -1])), check_raw, {}, {},
         dict(ds_idx=BAD_DS, max_numel=['x', None, NAN, [1]], seed=BAD_SEED), 6)
def raw_preds_of(a): return raw_preds(**a)

@subject('pilot', partial(learner_call, seed=st.sampled_from([0, 42, 2**32-1]), train=st.booleans()), lambda a, same_weights: same_weights or fail('another model'), {}, {},
         dict(seed=BAD_SEED), 6)
def pilot_of(a):
    with pilot(**a) as trial: return torch.equal(weights(trial), weights(a['learn']))

def fail(message): raise AssertionError(message)

def activation_missing(pick, a):
    a['learn'] = some_learner(a.multi, nn.BCEWithLogitsLoss() if a.multi else nn.CrossEntropyLoss())
    return 'activation',

def one_label_only(pick, a):
    need(not a.multi)
    a['per_label'] = True
    return 'per_label',

def check_fitted(a, learn):
    logits, targs = predicted(a.multi)
    pairs = zip(logits.T, targs.T) if a['per_label'] else [(logits, targs)]
    for T, (x, t) in zip(L(learn.temperature), pairs):
        assert 0 < T < INF and mean_nll(x/T, t, 'labels' if a.multi else 'classes') <= mean_nll(x, t, 'labels' if a.multi else 'classes') + 1e-6
    assert learn.reset_temperature().temperature == 1.

def fitted_call(draw):
    a = learner_call(draw, ds_idx=st.just(1))
    a['per_label'] = a.multi and draw(st.booleans())
    return a

@subject('fit_temperature', fitted_call, check_fitted, {}, {'loss': activation_missing, 'per_label': one_label_only}, dict(ds_idx=BAD_DS), 8)
def temperature_fitted(a):
    args = dict(a)
    return args.pop('learn').fit_temperature(**args)

def find_call(draw):
    a = learner_call(draw, n_epoch=st.sampled_from([1, 3]), share=st.floats(.1, 1), cap=st.floats(.1, 1), ds_idx=st.just(1), seed=st.sampled_from([0, 42]))
    if draw(one_in(3)): a |= dict(full=True, epss=draw(st.sampled_from([[.1], [0, .05], (.5,), np.array([.1, .2]), [.1, .1]])))
    a |= dict(fit=lambda o: None, show_plot=False)
    return a

def bad_grid(pick, a):
    a |= dict(full=True, epss=pick([[], [0.], [NAN], [-.1], [1.5], ['x'], 'abc', .1, [None], 3]))
    return 'epss',

def bad_find(pick, a):
    kind = pick(['lr', 'epss', 'prior', 'spread', 'unknown', 'loss', 'full'])
    if kind == 'lr': a |= dict(fit=None, lr=pick(['x', [1, 'a'], {}]), full=False); a.pop('epss', None); return 'lr',
    if kind in ('epss', 'prior', 'spread'):
        a |= {'full': False, kind: dict(epss=[.1], prior=torch.full((3,), 1/3), spread='others')[kind]}
        if kind != 'epss': a.pop('epss', None)
        return kind, 'full'
    if kind == 'unknown': a['temperatur'] = 2; return 'temperatur',
    if kind == 'loss': a['learn'] = some_learner(loss=MSELossFlat()); return 'MSELoss',
    need(not a.multi)
    a |= dict(full=True, epss=[.1], spread='none')
    return 'spread',

def check_found(a, found):
    logits, targs = predicted(a.multi)
    error = ((logits > 0) != (targs > .5)).double().mean().item() if a.multi else (logits.argmax(1) != targs).double().mean().item()
    compared(found.valid_error, error)
    cap, default, factor = (a['cap']/2, .05, 1) if a.multi else (a['cap'], .1, 3/2)
    if not found.learnt or not a.get('full'): compared(found.eps, min(cap, error*factor if found.learnt else default))

@subject('eps_find', find_call, check_found, {}, {'grid': bad_grid, 'use': bad_find},
         dict(n_epoch=[0, -1, NAN, INF, 'x', None, True, [3]], share=[0, -.1, 1.5, NAN, 'x', None], cap=[0, -.1, 1.5, NAN, 'x', None], ds_idx=[0, 2, -1, 'x', 1.5, None, NAN],
              seed=BAD_SEED, fit=[3, 'x', [1]]), 12)
def found(a):
    args = dict(a)
    return args.pop('learn').eps_find(**args)

@cache
def interpretation(multi): return CalibrationInterpretation.from_learner(some_learner(multi))

def judged_call(draw):
    a = Call()
    a.multi, a.how = draw(st.booleans()), draw(st.sampled_from(['from_learner', 'summary', 'summary', 'most_overconfident', 'plot_reliability']))
    if a.how == 'from_learner': a |= dict(learn=some_learner(a.multi), ds_idx=1)
    if a.how == 'summary': a |= dict(n_bins=draw(st.sampled_from([1, 5, 15])), n_boot=draw(st.sampled_from([1, 5])), average=draw(st.sampled_from(['macro', 'worst'])))
    if a.how == 'most_overconfident': a |= dict(k=draw(st.sampled_from([0, 1, 3, 100])), show=False)
    return a

def check_judged(a, result):
    logits, targs = predicted(a.multi)
    probs = logits.sigmoid() if a.multi else logits.softmax(1)
    if a.how == 'from_learner': compared(result.raw, probs)
    if a.how == 'summary': compared(result.loc[('ECE', 'raw')]['value'], calibration_error(probs, targs, n_bins=a['n_bins'], average=a['average']), 1e-4)
    if a.how == 'most_overconfident': assert len(result[0]) == len(result[1]) <= a['k']

def bad_judgement(pick, a):
    bad = dict(from_learner=dict(ds_idx=BAD_DS), summary=dict(n_bins=BAD_COUNT, n_boot=BAD_COUNT, average=BAD_AVERAGE + [None]),
               most_overconfident=dict(k=[-1, 'x', None, NAN, 1.5, [1]]),
               plot_reliability=dict(n_bins=BAD_COUNT, **(dict(label=['nope', 3, NAN], max_n=[0, -1, 'x', 1.5]) if a.multi else {})))[a.how]
    name = pick([*bad])
    a[name] = pick(bad[name])
    return name,

def labels_of_one(pick, a):
    need(a.how == 'summary' and not a.multi)
    a['by_label'] = True
    return 'by_label',

@subject('CalibrationInterpretation', judged_call, check_judged, {}, {'value': bad_judgement, 'by_label': labels_of_one}, examples=12)
def judged(a):
    if a.how == 'from_learner': return CalibrationInterpretation.from_learner(**a)
    f = getattr(interpretation(a.multi), a.how)
    if a.how != 'plot_reliability': return f(**a)
    return plt.close(f(**a, return_fig=True))


# ---------------------------------------------------------------- the command line

@cache
def scratch():
    "A folder with two classes of fifty images each, an empty one, and a file"
    scratch.kept = tempfile.TemporaryDirectory(prefix='bad_input')   # until the tests end
    folder = Path(scratch.kept.name)
    for i in range(100):
        f = folder/'photos'/f'class {i%2}'/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        PILImageBW.create((DIGITS.images[i]*15.9).astype(np.uint8)).save(f)
    (folder/'empty').mkdir()
    (folder/'file').write_text('no folder')
    return folder

NO_COUNT, PATHS = ['0', '-1', '1.5', 'x', '', 'nan', '1e3', '9'*5000], ['a\0b', 'x'*5000]
GOOD_COMPARE = {'--eps': [['0', '.1'], ['0'], ['1', '0.'], ['1e-320'], ['.3', '.2', '.1']], '--seeds': [['1'], ['2']], '--epochs': [['1'], ['10']], '--size': [['8'], ['32']],
                '--noise': [['0'], ['.2'], ['.999']], '--augment': [[]], '--workers': [['0'], ['2']], '--arch': [['resnet18'], ['xresnet18'], ['squeezenet1_1']],
                '--lr': [['1e-3'], ['1e-300'], ['10']], '--bs': [['1'], ['16'], ['80']], '--data': [['digits'], ['PHOTOS']]}
NO_SHARE = [['x'], [''], ['-1'], ['-1e-3'], ['nan'], ['inf'], ['1.5'], ['0,1'], []]
BAD_COMPARE = {'--eps': NO_SHARE + [['.1', '.1'], ['0', '.1', '2'], ['auto', 'auto'], ['.1', 'a\nb']], **{o: [[v] for v in NO_COUNT] + [[]] for o in ('--seeds', '--epochs', '--size')},
               '--noise': NO_SHARE + [['1']], '--workers': [['-1'], ['x'], ['1.5'], []], '--arch': [['nope'], [''], ['ResNet18'], ['a\nb'], ['x\0'], ['\udc80'], []],
               '--lr': [['0'], ['-1'], ['nan'], ['inf'], ['x'], []], '--bs': [[v] for v in NO_COUNT] + [['100000'], []],
               '--data': [['nowhere'], [''], ['EMPTY'], ['FILE'], ['\udc80'], []] + [[o] for o in PATHS], '--root': [['x'], []], '--download': [[]],
               '--out': [['FILE'], ['FILE/x'], []] + [[o] for o in PATHS], '--nonsense': [[], ['3']], '--ep': [['.1']]}
GOOD_BENCH = {'--quick': [[]], '--seconds': [['.1'], ['3']], '--shapes': [['64x10'], ['sigmoid:4x3', 'softmax:2x3x4'], ['step'], ['3x2']], '--dtypes': [['float16'], ['float32', 'bfloat16']],
              '--backend': [['torch'], ['auto']], '--device': [['cpu']], '--json': [['NEW']]}
BAD_BENCH = {'--seconds': [['x'], ['nan'], ['-1'], ['inf'], ['']] + [[]], '--shapes': [['x'], ['0x5'], ['5x0'], ['-1x3'], ['3'], ['softmax:3'], ['cat:3x3'], ['3x1'], [''], ['64x10', '5'], ['3\nx'], ['1.5x2'], []],
             '--dtypes': [['float64'], ['x'], []], '--backend': [['cuda'], ['triton'], []], '--device': [['meta'], ['tpu'], []], '--json': [['EMPTY'], ['EMPTY/no/x'], ['no\nfolder/x'], []] + [[o] for o in PATHS],
             '--nonsense': [[], ['3']]}
if not torch.cuda.is_available(): BAD_BENCH['--device'].append(['cuda'])

def command_call(good, draw):
    return Call({o: draw(st.sampled_from(good[o])) for o in draw(st.lists(st.sampled_from([*good]), unique=True, max_size=4))})

def positional(pick, a):
    a[''] = [pick(['banana', 'train', ''])]
    return 'unrecognized argument', 'argument'

def run_command(main, a):
    "A ValueError with the line on stderr where the exit code is 2"
    places = dict(PHOTOS=scratch()/'photos', EMPTY=scratch()/'empty', FILE=scratch()/'file', NEW=scratch()/'new.json')
    def placed(v): return re.sub('^(PHOTOS|EMPTY|FILE|NEW)', lambda m: str(places[m[0]]), v)
    argv = [*a.get('', []), *(s for k, vs in a.items() if k for s in (k, *map(placed, vs)))]
    out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', errors) for errors in ('strict', 'backslashreplace'))
    with redirect_stdout(out), redirect_stderr(err):
        try: code = main(argv)
        except SystemExit as e: code = e.code
        out.flush(), err.flush()
    text = err.buffer.getvalue().decode()
    if code == 0:
        assert not text
        return code
    assert code == 2 and re.fullmatch('fastai_smooth: [^\n]+\n', text), f'exit code {code}, stderr {text!r}'
    raise ValueError(text)

@cache
def few_digits():
    d = digits()
    return ImageSet(d.images[:100], d.classes[:100], d.vocab)

def compare_main(argv):
    "The command with all that trains left out, and with a hundred digits"
    def no_learner(dls, eps, arch, pretrained): return SimpleNamespace(model=nn.Flatten(), dls=dls)
    out = ['--out', str(scratch()/'out')] if '--out' not in argv else []
    with mock.patch.multiple(compare_module, digits=few_digits, get_learner=no_learner, one_run=lambda *args, **kwargs: dict(accuracy=1., nll=0.), write_results=lambda *args: None, report=lambda *args: None,
                        choose_eps=lambda *args, **kwargs: fail('it trained')):
        return compare_module.main([*argv, *out])

@subject('fastai_smooth compare', partial(command_call, GOOD_COMPARE), lambda a, code: None, {}, {'positional': positional}, BAD_COMPARE, 40)
def compare_of(a): return run_command(compare_main, a)

def bench_main(argv):
    "The command with nothing measured"
    with mock.patch.multiple(bench_module, measure=lambda *args: ([], {}), table=lambda rows: '', learner_steps=lambda *args, **kwargs: [], step_table=lambda rows: ''):
        return compare_module.main(['bench', *argv])

@subject('fastai_smooth bench', partial(command_call, GOOD_BENCH), lambda a, code: None, {}, {'positional': positional}, BAD_BENCH, 25)
def bench_of(a): return run_command(bench_main, a)


# ---------------------------------------------------------------- the runs

def run(name, examples, seed):
    @hypothesis.seed(f'{name} {seed}')
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @given(st.data())
    def examples_of(data): example(name, data.draw)
    examples_of()

@pytest.mark.parametrize('name', SUBJECTS)
def test_value_or_named_error(name): run(name, SUBJECTS[name].examples, 'CI')

def test_ci_runs_500(): assert sum(s.examples for s in SUBJECTS.values()) >= 500

def made(name):
    "How often each of the changes was made"
    s = SUBJECTS[name]
    return {o: REACHED[name][o] for o in [*s.odd, *s.bad, *(f'{k} value' for k in s.values)]}

@pytest.mark.long
def test_long_run():
    "Each function gives values and errors, each change is made, and nothing fails: then it is written down"
    seed, failures = int(os.environ.get('SMOOTH_TEST_SEED', random.SystemRandom().randrange(10**9))), []
    print(f'SMOOTH_TEST_SEED={seed}')
    COUNTS.clear(), REACHED.clear()
    for name, s in SUBJECTS.items():
        try:
            for i in range(s.examples*TIMES//10): run(name, 10, f'{seed} {i}')   # hypothesis varies what it has, and draws little anew: begin again
            while min(made(name).values()) < 3 and i < 5000: run(name, 10, f'{seed} {(i := i+1)}')
            assert min(made(name).values()) > 2, made(name)
        except Exception as e: failures.append('\n'.join(map(str, [e, *getattr(e, '__notes__', [])])))
    assert not failures, f'SMOOTH_TEST_SEED={seed}\n' + '\n\n'.join(failures)
    versions = {o: importlib.metadata.version(o) for o in ('torch', 'fastai', 'fastai_smooth', 'hypothesis', 'numpy')}
    RECORD.write_text(json.dumps(dict(date=time.strftime('%Y-%m-%d'), versions=versions | {'python': platform.python_version()}, seed=seed,
                                      examples=sum(map(Counter.total, COUNTS.values())), failures=0,
                                      functions={k: COUNTS[k] | {'changes': made(k)} for k in SUBJECTS}), indent=1) + '\n')

def test_a_long_run_is_recorded():
    "At least 10,000 examples, of every function and every change that there is here"
    record = json.loads(RECORD.read_text())
    counts = record['functions']
    assert record['failures'] == 0 and record['examples'] == sum(c['values'] + c['named errors'] for c in counts.values()) >= 10_000
    assert {k: set(c['changes']) for k, c in counts.items()} == {k: {*s.odd, *s.bad, *(f'{o} value' for o in s.values)} for k, s in SUBJECTS.items()}
    assert all(c['values'] and c['named errors'] for c in counts.values())
