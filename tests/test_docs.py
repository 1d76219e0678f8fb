"""Docstrings: every public name says what a user needs, by a rule that a machine can check.

Public are: what `fastai_smooth.all`, `fastai_smooth.kernels` and each module list in `__all__`, what is patched onto fastai's
classes, and the public methods of public classes. Of each is asked, and every failure is named:

- doc: a docstring of its own, not one that is inherited.
- comment: a comment beside each parameter and each field (fastcore's docments); of the return value an annotation, if there is one.
- shape: of what is a tensor or an array by its annotation, or by its name where it has none.
- unit: of each number. A float says its range or its unit, an int what it counts; a log loss says nats, a time seconds or the
  like, memory bytes.
- error: each exception that it raises is named, whether itself or through functions of this package (as far as names tell).
  "Raises what `name` raises" names those of another.
- source: where a module is about a published method, a paper, a thread, or a name in backticks that has one.

And the saved outputs of notebooks: `.ci/notebooks.py`, which CI runs, finds those that are stale."""
import ast, base64, builtins, dataclasses, functools, importlib, inspect, json, pkgutil, re, shutil, struct, sys, textwrap, types
from pathlib import Path

import pytest
from fastai.callback.core import event
from fastai.learner import Learner
from fastcore.docments import docments
from torch import Tensor  # an annotation below

import fastai_smooth, fastai_smooth.all as fs_all, fastai_smooth.kernels as kernels

PACKAGE = 'fastai_smooth'
EVENTS = {o for o in vars(event) if not o.startswith('_')}  # a method of that name is called by fastai; its class says what happens

# methods that another library calls, by a name and signature of its own: the class says what they do, and what they raise
PROTOCOL = {'forward': 'nn.Module', 'extra_repr': 'nn.Module', 'reset': "fastai's Metric", 'accumulate': "fastai's Metric",
            'name': "fastai's Metric", 'value': "fastai's Metric", 'error': 'argparse'}

# modules about a published method: their functions, classes and patches name a source
PUBLISHED = {'kernels.functional', 'losses', 'callback', 'learner', 'calibration', 'temperature', 'interpret', 'tune'}

# (name, what it lacks: a kind, or an exception) -> why it may
EXEMPT = {
    ('calibration.check_probs', 'source'): 'a check of arguments',
    ('calibration.events', 'source'): 'puts the shapes of all tasks into one',
    ('calibration.prediction_rows', 'source'): "puts a loss' layout into rows",
    ('temperature.check_logits', 'source'): 'a check of arguments',
    ('losses.loss_name', 'source'): 'a name for messages',
    ('callback.LabelSmoothingScheduler', 'source'): 'any schedule: fastai has no paper for its own',
    ('compare.choose_eps', 'TypeError'): 'its `get_learner` gets eps 0',
    ('compare.choose_eps', 'ValueError'): 'its `get_learner` gets eps 0',
    ('learner.Learner.to_hard', 'TypeError'): 'of `tempered`, for a loss with no activation, which is asked first',
    ('learner.SmoothedCrossEntropyFlat', 'comment'): 'its parameters are those of `LabelSmoothingCrossEntropyFlat`',
}

SHAPE = re.compile(r'\((?:[NnKMC1]\b|\.\.\.|groups)[^()]*\)|\[K(?:, ?K)?\]|Tensor\[|shaped like|shape of|shape as|same shape|[Aa]ny shape|0-d'
                   r'|\b[Ss]calar|[Bb]roadcasts? to|as many elements|a (?:value|number) a (?:row|logit|label)')
RANGE = re.compile(r'[\[(]0, ?|[Aa]bove 0|0 or more')
UNIT = re.compile(r'\b(?:share|probabilit\w+|fraction|seconds?|ms|milliseconds?|microseconds?|nanoseconds?|bytes|MB|nats|pixels|inches|learning rate|'
                  r'times|factor|[rR]atio|natural log\w*|weight|temperature)\b', re.I)
COUNT = re.compile(r'\b(?:bins?|rows?|classe?s?|labels?|logits|draws?|samples?|pixels|epochs?|batch(?:es)?|images?|parts|folds|rounds|processes|models|'
                   r'trials|successes|bytes|MB|index|axis|decides|random|how many|predictions?|K|exit code|number of|in all|top)\b', re.I)
SOURCE = re.compile(r'arXiv:\d{4}\.\d{4,5}|https?://\S|[A-Z]\w+(?: et al\.| & [A-Z]\w+)? (?:18|19|20)\d\d')
LOG_LOSS = re.compile(r'nll|cross_?entropy|bce', re.I)
TENSORS = {'input', 'target', 'inp', 'targ', 'targs', 'probs', 'logits', 'pred', 'x', 'y', 'prior', 'weight', 'pos_weight', 'grad'}

# --- what is public ----------------------------------------------------------------------------------------------------------------

def own(o): return (getattr(o, '__module__', None) or '').split('.')[0] == PACKAGE

def key(o):
    "Where it lives: `calibration.nll`."
    return f"{o.__module__.removeprefix(PACKAGE + '.')}.{o.__qualname__}"

def modules(): return [importlib.import_module(m.name) for m in pkgutil.walk_packages(fastai_smooth.__path__, f'{PACKAGE}.')
                       if m.name != f'{PACKAGE}.__main__' and not m.name.startswith(f'{PACKAGE}.kernels.triton')]

def patched():
    "What this package adds to fastai's classes: `{'Learner.to_smooth': function}`, the function of a property."
    res, seen = {}, {o for m in modules() for o in vars(m).values() if isinstance(o, type) and not own(o)}
    for cls in seen:
        for n, o in vars(cls).items():
            f = o.fget if isinstance(o, property) else o
            if not n.startswith('_') and inspect.isfunction(f) and own(f): res[f'{cls.__name__}.{n}'] = f
    return res

def methods(cls):
    "Its own public methods and properties, but for what fastai or torch calls."
    for n, o in vars(cls).items():
        if n.startswith('_') or n in EVENTS or n in PROTOCOL: continue
        f = getattr(o, '__func__', o)
        if isinstance(o, property) or inspect.isfunction(f) and own(f): yield f'{cls.__name__}.{n}', f

def public():
    "By key: all that is asked to be documented."
    listed = [getattr(m, n) for m in modules() for n in getattr(m, '__all__', ()) if hasattr(m, n)]
    listed += [o for n, o in vars(fs_all).items() if not n.startswith('_')] + [getattr(kernels, n) for n in kernels.__all__]
    res = {key(o): o for o in listed if own(o) and (isinstance(o, type) or inspect.isfunction(o))}
    for cls in [o for o in res.values() if isinstance(o, type)]: res |= {f'{key(cls).rpartition(".")[0]}.{n}': f for n, f in methods(cls)}
    return res | {f"{f.__module__.removeprefix(PACKAGE + '.')}.{n}": f for n, f in patched().items()}

# --- what a name raises ------------------------------------------------------------------------------------------------------------

@functools.cache
def tree(f):
    "The syntax tree of a function, None where there is no source."
    try: return ast.parse(textwrap.dedent(inspect.getsource(f))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError): return None

class Raised:
    "The exceptions that a function raises, by name, as far as the names in it tell who is called."
    def __init__(self): self.known, self.patches = {}, {n.split('.')[1]: f for n, f in patched().items()}

    def of(self, f, cls=None):
        "Of a function, or method of `cls`; of a class, of what makes it and of what others call."
        if isinstance(f, type): return self.of_class(f)
        f = inspect.unwrap(getattr(f, '__func__', f))
        if (f, cls) not in self.known:
            self.known[f, cls] = set()  # of a function that calls itself
            if (t := tree(f)) is not None: self.known[f, cls] = self.of_body(t.body if isinstance(t.body, list) else [t.body], f, cls)
        return self.known[f, cls]

    def of_class(self, cls):
        res = set()
        for n, o in {n: o for c in reversed(cls.__mro__) if own(c) for n, o in vars(c).items()}.items():
            called = n.startswith('__') or n in EVENTS or n in PROTOCOL
            for f in [o.fset, called and o.fget] if isinstance(o, property) else [called and o]:
                if inspect.isfunction(f) and own(f): res |= self.of(f, cls)
        return res

    def of_body(self, body, f, cls): return set().union(*(self.of_node(o, f, cls) for o in body)) if body else set()

    def of_node(self, node, f, cls):
        if isinstance(node, ast.Try): return self.of_try(node, f, cls)
        if isinstance(node, ast.With) and (manager := next(filter(None, (self.catching(o.context_expr, f, cls) for o in node.items)), None)):
            return self.of(manager)  # it makes its own exception of all that comes from inside
        res = self.of_body(list(ast.iter_child_nodes(node)), f, cls)
        if isinstance(node, ast.Raise) and node.exc is not None:
            e = self.resolve(node.exc.func if isinstance(node.exc, ast.Call) else node.exc, f, cls)
            if isinstance(e, type) and issubclass(e, Exception) and e is not AssertionError and (own(e) or e.__module__ == 'builtins'): res.add(e.__name__)
        if isinstance(node, ast.Call) and self.depends(node, f):
            called = self.resolve(node.func, f, cls)
            if called not in (isinstance, issubclass, hasattr, getattr, type, dict, list, set, tuple):
                for o in [called, *(self.resolve(a, f, cls) for a in node.args if isinstance(a, ast.Name))]: res |= self.called(o, cls)
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            for t in (x for t in getattr(node, 'targets', None) or [node.target] for x in (t.elts if isinstance(t, ast.Tuple) else [t])):
                if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == 'self':
                    p = inspect.getattr_static(cls, t.attr, None) if cls else None
                    if isinstance(p, property) and p.fset and own(p.fset): res |= self.of(p.fset, cls)
        return res

    @staticmethod
    def depends(node, f):
        "Does anything go into the call that is not the same each time, such as a parameter, or nothing at all?"
        known = {**vars(builtins), **f.__globals__}
        if not node.args and not node.keywords: return True
        return any(isinstance(n, ast.Name) and n.id not in known for n in ast.walk(node)) or any(a.arg == 'self' for a in tree(f).args.args)

    def called(self, o, cls):
        if isinstance(o, functools.partial): o = o.func
        if isinstance(o, type):
            if not own(o) or issubclass(o, Exception): return set()
            return set().union(*(self.of(m, o) for n in ('__init__', '__new__', '__post_init__')
                                 if inspect.isfunction(m := inspect.getattr_static(o, n, None)) and own(m)))
        f = inspect.unwrap(getattr(o, '__func__', o)) if callable(o) else None
        return self.of(f, cls if cls and getattr(cls, getattr(f, '__name__', ''), None) is f else None) if inspect.isfunction(f) and own(f) else set()

    def of_try(self, node, f, cls):
        body, rest = self.of_body(node.body, f, cls), self.of_body(node.orelse + node.finalbody, f, cls)
        for h in node.handlers:
            again = any(isinstance(o, ast.Raise) and (o.exc is None or 'type(' in ast.unparse(o.exc)) for o in ast.walk(h))
            types_ = h.type.elts if isinstance(h.type, ast.Tuple) else [h.type]
            caught = tuple(c for c in ((self.resolve(o, f, cls) if o is not None else BaseException) for o in types_) if isinstance(c, type))
            if not again: body = {n for n in body if not issubclass(self.exception(n), caught)}
            rest |= self.of_body(h.body, f, cls)
        return body | rest

    def catching(self, node, f, cls):
        "The context manager of this package that is called, where all exceptions inside end up in its own; else None."
        m = inspect.unwrap(self.resolve(node.func, f, cls)) if isinstance(node, ast.Call) and callable(self.resolve(node.func, f, cls)) else None
        if not (inspect.isfunction(m) and own(m)): return None
        for t in ast.walk(tree(m)):
            if isinstance(t, ast.Try) and any(isinstance(o, ast.Yield) for b in t.body for o in ast.walk(b)):
                if any(isinstance(h.type, ast.Name) and h.type.id == 'Exception' for h in t.handlers): return m

    def exception(self, name):
        return getattr(builtins, name, None) or next(o for m in modules() if isinstance(o := getattr(m, name, None), type))

    def resolve(self, node, f, cls):
        "The object that a name or attribute stands for, None where that can't be told."
        if isinstance(node, ast.Name): return f.__globals__.get(node.id, getattr(builtins, node.id, None))
        if isinstance(node, ast.Call) and ast.unparse(node) == 'super()': return super(next((c for c in cls.__mro__ if f in self.functions(c)), cls), cls) if cls else None
        if not isinstance(node, ast.Attribute): return None
        if isinstance(node.value, ast.Name) and node.value.id in ('self', 'cls') and cls:
            o = inspect.getattr_static(cls, node.attr, None)
            return getattr(o, '__func__', o)
        base = self.resolve(node.value, f, cls)
        if isinstance(base, (types.ModuleType, type, super)): return getattr(base, node.attr, None)
        return self.patches.get(node.attr)

    @staticmethod
    def functions(cls): return [getattr(o, '__func__', o) for o in vars(cls).values()]

# --- the rule ----------------------------------------------------------------------------------------------------------------------

def doc_of(o): return inspect.cleandoc(vars(o).get('__doc__') or '') if isinstance(o, type) else inspect.cleandoc(o.__doc__ or '')

def fields(cls):
    "Of a NamedTuple or dataclass: (name, annotation, comment) of each field, from its source."
    lines = inspect.getsource(cls).splitlines()
    for o in tree(cls).body:
        if isinstance(o, ast.AnnAssign): yield o.target.id, ast.unparse(o.annotation), (lines[o.end_lineno - 1].split('#', 1) + [''])[1].strip()

def is_record(o): return isinstance(o, type) and (dataclasses.is_dataclass(o) or issubclass(o, tuple) and hasattr(o, '_fields'))

def parameters(o):
    "(name, annotation, comment) of each parameter of a function, or of what makes a class."
    if is_record(o): return list(fields(o))
    f = vars(o).get('__init__') if isinstance(o, type) else inspect.unwrap(o)
    if not inspect.isfunction(f): return []
    comments, args = docments(f), tree(f).args
    named = [p for p in [*args.posonlyargs, *args.args, *args.kwonlyargs] if p.arg not in ('self', 'cls')]
    lines = inspect.getsource(f).splitlines()
    rest = [(p.arg, '', (lines[p.end_lineno - 1].split('#', 1) + [''])[1].strip()) for p in (args.vararg, args.kwarg) if p]  # docments leaves them out
    return [(p.arg, ast.unparse(p.annotation) if p.annotation else '', comments.get(p.arg) or '') for p in named] + rest

def returned(o):
    "(annotation, comment) of the return value; (None, '') where nothing is returned, ('', '') where no annotation says what."
    if isinstance(o, type) or (t := tree(o)) is None: return None, ''
    def mine(node):
        for c in ast.iter_child_nodes(node):
            if not isinstance(c, (ast.FunctionDef, ast.Lambda, ast.ClassDef)): yield c; yield from mine(c)
    if t.returns is None and not any(isinstance(n, ast.Return) and n.value is not None for n in mine(t)): return None, ''
    return ast.unparse(t.returns) if t.returns else '', docments(o).get('return') or ''

def names_of(doc, known):
    "Public objects that the docstring has in backticks."
    for n in re.findall(r'`([\w.]+)', doc): yield from (o for k, o in known.items() if k.endswith('.' + n))

def has_source(o, known, seen=()):
    if SOURCE.search(doc := doc_of(o)): return True
    return any(p not in seen and has_source(p, known, (*seen, o)) for p in names_of(doc, known))

def numbers(annotation): return {p.strip().removeprefix('tuple[').rstrip(']') for p in annotation.split('|')} & {'float', 'int'}

def lacks(k, o, known, raised):
    "What the docstring of `o`, public under the name `k`, does not say: (kind, words) of each."
    doc, res = doc_of(o), []
    if len(doc.split()) < 3: return [('doc', 'no docstring of its own')]
    if isinstance(o, property): return []
    if not isinstance(o, type) and hasattr(o, '__wrapped__'): params = []  # another library's function, with a parameter more that the docstring explains
    else: params = parameters(o)
    shown, comment_ret = returned(o) if not hasattr(o, '__wrapped__') else (None, '')
    for n, ann, comment in params:
        if len(comment) < 2: res.append(('comment', f'no comment beside {n}')); continue
        said = comment + ' ' + ' '.join(s for s in re.split(r'(?<=[.;:])\s', doc) if f'`{n}`' in s)
        if re.search('Tensor|ndarray', ann) or not ann and n in TENSORS:
            if not SHAPE.search(said): res.append(('shape', f'no shape of {n}: {comment!r}'))
        for kind in numbers(ann):
            if not ((RANGE.search(said) or UNIT.search(said)) if kind == 'float' else (COUNT.search(said) or RANGE.search(said) or UNIT.search(said))):
                res.append(('unit', f'{n} is of type {kind}, with neither unit nor range: {comment!r}'))
    if shown == '': res.append(('comment', 'no annotation says what is returned'))
    elif shown is not None:
        said = comment_ret + ' ' + doc
        if re.search('Tensor|ndarray', shown) and not SHAPE.search(said): res.append(('shape', f'no shape of what is returned: {comment_ret!r}'))
        if 'float' in numbers(shown) and not (RANGE.search(said) or UNIT.search(said)): res.append(('unit', 'no unit of what is returned'))
    everything = ' '.join([doc, comment_ret, *(c for *_, c in params)])
    if LOG_LOSS.search(k.rpartition('.')[2]) and not re.search('nats|natural log', everything): res.append(('unit', 'a log loss that does not say nats'))
    source = inspect.getsource(o) if not isinstance(o, type) else ''
    if re.search('perf_counter|elapsed_time', source) and not re.search(r'seconds|\bms\b', everything): res.append(('unit', 'a time without its unit'))
    if re.search('memory_allocated|nbytes', source) and not re.search('bytes|units of', everything): res.append(('unit', 'memory without its unit'))
    named = set(re.findall(r'\b[A-Z]\w*(?:Error|Input)\b', doc))
    for others in re.findall(r'[Rr]aises what ((?:`[\w.]+`(?:, | and )?)+)', ' '.join(doc.split())):
        named |= set().union(*(raised.of(p) for p in names_of(others, known)))
    if not any(n == 'backend' for n, *_ in params): named.add('ImportError')  # of who asks for triton where there is none
    res += [('error', f'does not say when a {e} comes') for e in sorted(raised.of(o, class_of(k, known)) - named)]
    top = k.rpartition('.')[2] == getattr(o, '__name__', '') and class_of(k, known) is None
    if top and '.'.join(o.__module__.split('.')[1:]) in PUBLISHED and not has_source(o, known): res.append(('source', 'no source, nor a name in backticks that has one'))
    return res

def class_of(k, known):
    "The public class whose method it is."
    o = known.get(k.rpartition('.')[0])
    return o if isinstance(o, type) else None

KNOWN = public()

RAISED = Raised()

def failures(k, o): return [f'{kind}: {words}' for kind, words in lacks(k, o, KNOWN, RAISED) if not {(k, w) for w in (kind, *words.split())} & EXEMPT.keys()]

# --- the tests ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', sorted(KNOWN))
def test_docstring(name):
    o = KNOWN[name]
    missing = failures(name, o)
    assert not missing, '\n'.join([f'{name} ({o.__module__.replace(".", "/")}.py) lacks', *missing])

def test_exemptions_are_needed():
    "Of a name that lacks nothing there is nothing to excuse"
    lacking = {k: {w for kind, words in lacks(k, KNOWN[k], KNOWN, RAISED) for w in (kind, *words.split())} for k, _ in EXEMPT}
    assert not [(k, w) for k, w in EXEMPT if w not in lacking[k]]

def test_public_names_are_found():
    found = {k.split('.')[0] for k in KNOWN}
    assert found >= {'kernels', 'losses', 'prior', 'callback', 'learner', 'calibration', 'temperature', 'interpret', 'tune', 'pilot', 'compare', 'bench', 'images', 'distributed'}
    assert {'learner.Learner.to_smooth', 'temperature.Learner.temperature', 'tune.Learner.eps_find', 'kernels.functional.smooth_targets',
            'losses.LabelSmoothingCrossEntropy.decodes', 'interpret.CalibrationInterpretation.from_learner'} <= KNOWN.keys()

# what the rule says of functions that break it, each in one way

def good(
    probs: 'Tensor',  # (N,K) probabilities
    level: float = .95,  # Share of samples
    n: int = 3,  # Draws
) -> 'Tensor':  # (N,)
    "The nll in nats. Raises a ValueError for other shapes. Somebody et al. 2017 (arXiv:1706.04599)."
    if probs is None: raise ValueError('none')
    return probs

def no_doc(probs): return probs

def no_comment(level: float = .95) -> float:  # In [0,1]
    "Gives back what it gets."
    return level

def no_shape(
    probs: 'Tensor',  # Probabilities
) -> 'Tensor':  # The same
    "Gives back what it gets."
    return probs

def no_unit(
    seconds: float,  # To go on for
    n: int = 3,  # This many
) -> float:  # As long
    "Gives back what it gets."
    return seconds * n

def no_error(
    n: int,  # Draws
) -> int:  # The same
    "Gives back what it gets."
    return _checked(n) if n < 3 else RAISED.exception(n)

def _checked(n):
    try:
        if n: raise TypeError('caught here')
        if n is None: raise IndexError('none')
    except TypeError: pass
    return _again(n)

def _again(n):
    if n < 0: raise ValueError('negative')
    return _checked(n - 1)

def somebody_else(
    n: int,  # Draws
) -> int:  # The same
    "Raises what `no_error` raises, it says."
    return no_error(n)

def mean_nll(
    of: 'Tensor',  # (N,)
) -> 'Tensor':  # 0-d
    "The mean of what it gets."
    return of.mean()

def no_annotation(
    n: int,  # Draws
):
    "Gives back what it gets."
    return n

@pytest.mark.parametrize('f, found', [
    (good, []), (no_doc, ['doc: no docstring of its own']), (no_comment, ['comment: no comment beside level']),
    (no_shape, ["shape: no shape of probs: 'Probabilities'", "shape: no shape of what is returned: 'The same'"]),
    (no_unit, ["unit: seconds is of type float, with neither unit nor range: 'To go on for'", "unit: n is of type int, with neither unit nor range: 'This many'",
               'unit: no unit of what is returned']),
    (no_error, ['error: does not say when a IndexError comes', 'error: does not say when a ValueError comes']),
    (somebody_else, []), (mean_nll, ['unit: a log loss that does not say nats']), (no_annotation, ['comment: no annotation says what is returned'])],
    ids=lambda o: getattr(o, '__name__', ''))
def test_rule(f, found, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], 'own', lambda o: getattr(o, '__module__', None) == __name__)
    known = {f'docs.{o.__name__}': o for o in (good, no_error)}
    assert [f'{kind}: {words}' for kind, words in lacks(f'docs.{f.__name__}', f, known, Raised())] == found

def test_rule_wants_a_source(monkeypatch):
    monkeypatch.setattr(good, '__module__', f'{PACKAGE}.losses')
    known = {'losses.good': good}
    assert not lacks('losses.good', good, known, Raised())
    monkeypatch.setattr(good, '__doc__', good.__doc__.split('Somebody')[0])
    assert lacks('losses.good', good, known, Raised()) == [('source', 'no source, nor a name in backticks that has one')]
    monkeypatch.setattr(good, '__doc__', good.__doc__ + 'As `somebody_else`.')
    monkeypatch.setattr(somebody_else, '__doc__', 'Szegedy et al. 2016 say so.')
    assert not lacks('losses.good', good, known | {'losses.somebody_else': somebody_else}, Raised())

# --- stale outputs -----------------------------------------------------------------------------------------------------------------

root = Path(__file__).resolve().parent.parent
needs_checkout = pytest.mark.skipif(not (root/'.ci').is_dir(), reason='needs the checkout')

@pytest.fixture(scope='module')
def notebooks():
    spec = importlib.util.spec_from_file_location('ci_notebooks', root/'.ci/notebooks.py')
    spec.loader.exec_module(res := importlib.util.module_from_spec(spec))
    return res

def plain(s): return {'output_type': 'execute_result', 'data': {'text/plain': s}}
def stdout(s): return {'output_type': 'stream', 'name': 'stdout', 'text': s}
def png(*size): return {'output_type': 'display_data', 'data': {'image/png': base64.b64encode(bytes(16) + struct.pack('>II', *size)).decode()}}
def notebook(*outputs, source='run()'): return {'cells': [{'cell_type': 'code', 'id': 'c', 'source': source, 'outputs': list(outputs)}]}

@needs_checkout
@pytest.mark.parametrize('saved, now, is_same', [
    ('NLL 0.4213', 'NLL 0.4213', True), ('NLL 0.4213', 'NLL 0.4100', True), ('NLL 0.4213', 'NLL 0.3900', False),
    ('T 0.42', 'T 0.4213', True), ('gap +0.0002', 'gap -0.0000', True), ('gap +0.0042', 'gap -0.0042', False), ('0.00', '0.02', True),
    ('0.00', '0.03', False), ('1e-7', '1.02e-7', True), ('1e-7', '3e-7', False), ('2 of 10', '3 of 10', False), ('1,797 rows', '1,790 rows', True),
    ('T  0.421', 'T 0.421', True), ('T 0.421', 'S 0.421', False), ('0.1 0.2', '0.1', False), ('nan', '0.1', False), ('float32', 'float64', False),
    ('<td>0.14</td>', '<td>0.09</td>', False), ('x\n1.0', 'x\n 1.0 ', True), ('3 0.1', '3 0.1', True)])
def test_numbers_agree_within_a_tolerance(notebooks, saved, now, is_same):
    found = list(notebooks.stale(notebook(plain(saved)), notebook(plain(now))))
    assert bool(found) != is_same
    if found: assert found == [(0, 'c', saved, now)]

@needs_checkout
def test_what_is_stale(notebooks):
    def found(a, b): return [o[2:] for o in notebooks.stale(a, b)]
    timed = '# timings: differ from run to run\nrun()'
    assert not found(notebook(stdout('ms 1.0'), source=timed), notebook(stdout('ms 9.0'), source=timed))
    assert found(notebook(stdout('ms 1.0'), source=timed), notebook(stdout('s 9.0'), source=timed)) == [('ms 1.0', 's 9.0')]
    assert found(notebook(stdout('a\nb 1.0\nc')), notebook(stdout('a\nb 2.0\nc'))) == [('b 1.0', 'b 2.0')]   # the line that differs
    assert not found(notebook(png(600, 400)), notebook(png(604, 398)))
    assert found(notebook(png(600, 400)), notebook(png(700, 400))) == [('600 x 400 pixels', '700 x 400 pixels')]
    assert found(notebook(png(600, 400)), notebook()) and found(notebook(), notebook(stdout('new')))
    assert not found(notebook(stdout('a'), stdout('b')), notebook(stdout('ab')))   # how a stream is cut up does not count
    link = '[source](https://example.org/x.py#L{}){{target="_blank"}} f'
    assert not found(notebook(plain(link.format(10))), notebook(plain(link.format(20))))
    noise = {'output_type': 'stream', 'name': 'stderr', 'text': 'a warning'}
    assert not found(notebook(noise, plain('1')), notebook(plain('1')))

@pytest.mark.slow
@needs_checkout
def test_a_stale_number_fails_and_is_saved_anew(notebooks, tmp_path, monkeypatch, capsys):
    pytest.importorskip('nbdev') # which cannot be installed beside the oldest fastai
    for name in ('benchmarks', 'tests', 'nbs'): (tmp_path/name).mkdir()
    for name in ('pyproject.toml', 'settings.ini'): shutil.copy(root/name, tmp_path)
    def write(number): path.write_text(json.dumps({'cells': [
        {'cell_type': 'markdown', 'id': 'a', 'metadata': {}, 'source': '# T'},
        {'cell_type': 'code', 'id': 'b', 'metadata': {}, 'execution_count': None, 'source': 'print(f"accuracy {1/8}")', 'outputs': [stdout(f'accuracy {number}\n')]}],
        'metadata': {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}, 'nbformat': 4, 'nbformat_minor': 5}))
    path = tmp_path/'nbs/00_t.ipynb'
    monkeypatch.setattr(notebooks, 'root', tmp_path)
    monkeypatch.setattr(notebooks, 'SAVED_ON', notebooks.vendor())
    write(.125)
    assert notebooks.main([]) == 0
    write(.25)
    assert notebooks.main([]) == 1
    with monkeypatch.context() as m:
        m.setattr(notebooks, 'SAVED_ON', 'another')
        assert notebooks.main([]) == 1   # it trains nothing
        m.setattr(notebooks, 'TRAINED', {'00_t'})
        assert notebooks.main([]) == 0
    assert 'nbs/00_t.ipynb, cell 1 (b):\n  saved: accuracy 0.25\n  now:   accuracy 0.125' in capsys.readouterr().out
    assert notebooks.main(['--save']) == 0 and 'accuracy 0.125' in path.read_text()
    path.write_text(path.read_text().replace('1/8', '1/0'))
    assert notebooks.main([]) == 1   # one that fails
