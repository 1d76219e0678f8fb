"""Bad and odd arguments: two tests of a table of functions. A row has a function, a strategy of valid arguments, what it refuses, its tensors:

    @st.composite
    def probs(draw): return dict(probs=fuzz.rand(draw, 8, 3).softmax(1), targs=fuzz.randint(draw, 3, 8), n_bins=draw(st.integers(1, 20)))

    TABLE = dict(calibration_error=Row(calibration_error, probs(),
        bad={'n_bins': BAD_COUNT, 'average': BAD_AVERAGE,
             'probs': [*NOT_TENSORS, *no_values('probs'), lambda a: a['probs']*100],  # a function makes the value of the valid arguments
             'targs or probs': [lambda a: a['targs'][1:]],                            # targs is changed; the message may name either
             'prior or spread': [lambda a: dict(prior=uniform, spread='others')]},    # a dict changes several arguments
        tensors=dict(probs=FLOATS, targs=INTEGERS)))                                  # the dtypes that each may have as well
    test_refuses, test_takes = fuzz.both_tests(TABLE, subclasses=(TensorBase, TensorCategory))

`test_refuses`: each bad value, in a call that is valid otherwise, gives one of the row's errors with the argument's name in its message.
`test_takes`: valid calls go through, with the same result when a tensor has another layout, dtype or class. Results may be numbers, tensors,
arrays, DataFrames, and lists, tuples and dicts of them. A function among the values calls `need(condition)` where it may not be able to make one."""
from types import FunctionType
from typing import Callable, NamedTuple
import math, re

import hypothesis, numpy as np, pytest, torch
from hypothesis import assume as need, strategies as st
from torch import Tensor, nn

NAN, INF = math.nan, math.inf
NOT_TENSORS = [None, 'abc', 3.5, [[.5], [.2, .8]], object()]
BAD_EPS = [-.1, 1.1, NAN, -INF, -5e-324, 'x', '', None, True, 1j, [.1], {}, torch.tensor(NAN), torch.tensor(2.), torch.tensor(True), np.float64(-1), np.array([.1, .2])]
PAIRS = [(.1, 1.1), (-.1, .1), (.6, .5), (NAN, .1), (.1, INF), (.1, None), ('x', .1), (.1, True), (.1, 1j), (), (.1, .2, .3), {.1: 0, .2: 0},
         torch.tensor([.1, .2]), (torch.tensor([.1, .2]), .1), (.1, (.2, .3)), np.array([.6, .5]), np.array([[.1], [.2]])]
BAD_LABEL_EPS = [o for o in BAD_EPS if not isinstance(o, np.ndarray)] + [.50001, 1., np.float32(.6), torch.tensor([.1, .2, .3])] + PAIRS
BAD_REDUCTION = BAD_SPREAD = BAD_BACKEND = ['MEAN', 'other', 'cuda', '', None, 0, True, b'mean', ['all'], object()]
BAD_COUNT = [0, -1, 1.5, NAN, INF, '5', None, [5]]
BAD_SEED = ['1', None, 1.5, NAN, [1], 2**70]
BAD_LEVEL = [0, 1, -.5, 1.5, NAN, INF, '.9', None, [.9]]
BAD_AVERAGE = ['mean', 'Macro', '', 0, True, ['macro']]
FLOATS, HALF = (torch.float64, torch.float32), (torch.float16, torch.bfloat16)   # HALF where rounded values are valid, as probabilities are not
INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
LABELS = *INTEGERS, torch.bool, torch.float32   # of 0 and 1
FORMS = dict(   # a form that can't be made of a tensor is left out
    strided=lambda t: torch.stack([t, t], -1)[..., 0],
    shifted=lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    transposed=lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    expanded=lambda t: (t[:1] if t.dim() > t.is_floating_point() else t).expand(t.shape),   # not a prior: its sum would change
    negated=lambda t: torch._neg_view(-t),
    channels_last=lambda t: t.contiguous(memory_format=torch.channels_last),
    gradient=lambda t: nn.Parameter(t.detach()),
    inference=torch.inference_mode()(lambda t: t.clone()),
    subclass=lambda t: t.as_subclass(type('Plain', (Tensor,), {})),
    sparse=lambda t: t.to_sparse(), nested=lambda t: torch.nested.nested_tensor([*t]))   # these two may also be refused, by name

class Row(NamedTuple):
    f: Callable                # Function under test
    valid: st.SearchStrategy   # Of dicts of its arguments
    bad: dict = {}             # Argument -> values that it refuses, or functions that make them of valid arguments
    tensors: dict = {}         # Argument -> dtypes that this tensor may have as well
    errors: tuple = (TypeError, ValueError, IndexError)
    skip: tuple = ()           # Names of FORMS that it does not take
    tol: float = 1e-5          # Absolute and relative, of results; half precision has its own
    examples: int = 5          # Valid calls that are drawn

def no_values(name): return [lambda a: a[name].detach().to(torch.complex64), lambda a: a[name].detach().to('meta')]
def rand(draw, *shape): return torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32-1))))
def randint(draw, high, *shape): return (rand(draw, *shape)*high).long()
def names(message, argument): return any(re.search(rf'(?<![\w-]){re.escape(o)}s?(?!\w)', message, re.I) for o in argument.split(' or '))

def same(actual, expected, tol):
    if hasattr(expected, 'to_dict'): actual, expected = actual.to_dict('list'), expected.to_dict('list')
    if isinstance(expected, dict): same([actual[k] for k in expected], [*expected.values()], tol)
    elif isinstance(expected, (list, tuple)): [same(a, e, tol) for a, e in zip(actual, expected, strict=True)]
    elif isinstance(expected, (Tensor, np.ndarray, np.generic, float)):
        torch.testing.assert_close(*(torch.as_tensor(o).detach().as_subclass(Tensor).double() for o in (actual, expected)), rtol=tol, atol=tol, equal_nan=True)
    else: assert actual == expected

def each_valid(row):
    "Runs the decorated function on valid arguments, the same ones each time"
    settings = hypothesis.settings(max_examples=row.examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    return lambda check: settings(hypothesis.given(row.valid)(check))()

def refuses(row, argument):
    tried, values = set(), row.bad[argument]
    @each_valid(row)
    def check(valid):
        for i, bad in enumerate(values):
            try: value = bad(valid) if isinstance(bad, FunctionType) else bad
            except hypothesis.errors.UnsatisfiedAssumption: continue
            tried.add(i)
            change = value if isinstance(bad, FunctionType) and isinstance(value, dict) else {argument.split(' or ')[0]: value}
            with pytest.raises(row.errors) as e: pytest.fail(f'took {change!r}: {row.f(**valid | change)!r}')
            assert names(str(e.value), argument), f'{change!r}: no name of {argument} in: {e.value}'
    assert len(tried) == len(values), f'never tried: {[o for i, o in enumerate(values) if i not in tried]}'

def takes(row, subclasses):
    forms = {k: v for k, v in FORMS.items() if k not in row.skip} | {c.__name__: lambda t, c=c: t.as_subclass(c) for c in subclasses}
    @each_valid(row)
    def check(valid):
        row.f(**valid)
        for name in (o for o in row.tensors if isinstance(valid.get(o), Tensor)):
            for form, make in (forms | {str(d): lambda t, d=d: t.to(d) for d in row.tensors[name]}).items(): takes_form(row, valid, name, form, make)

def takes_form(row, valid, name, form, make):
    t = valid[name]
    try: odd = make(t)
    except (RuntimeError, IndexError): return
    may_refuse = form in ('sparse', 'nested')
    plain = t if may_refuse else torch.tensor(odd.tolist(), dtype=t.dtype, device=t.device).view(t.shape)
    if odd.dtype != t.dtype and not t.is_floating_point() and not plain.equal(t): return   # -100 as uint8
    hypothesis.note(f'{name}, {form}')
    try: result = row.f(**valid | {name: odd})
    except row.errors as e: assert may_refuse and names(str(e), name), f'{name}, {form}: {type(e).__name__}: {e}'
    else: same(result, row.f(**valid | {name: plain}), max(row.tol, 8*torch.finfo(odd.dtype).eps if odd.dtype in HALF else 0))

def both_tests(table, subclasses=()):
    @pytest.mark.filterwarnings('ignore')
    @pytest.mark.parametrize('name, argument', [(k, o) for k, row in table.items() for o in row.bad])
    def test_refuses(name, argument): refuses(table[name], argument)
    @pytest.mark.filterwarnings('ignore')
    @pytest.mark.parametrize('name', table)
    def test_takes(name): takes(table[name], subclasses)
    return test_refuses, test_takes
