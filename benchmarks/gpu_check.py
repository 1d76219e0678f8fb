"""Loss and gradient of every kernel beside float64, on a few rows. `python benchmarks/gpu_check.py OUT.json [tiny]`

Early and late gradients, each dtype and option, and accuracy beside eager's. (Each tile of the table: tests/kernels/triton/test_gpu.py.)
`tiny`: a few of them in this process, for compute-sanitizer. Ends with 1 where something is wrong."""
import random, sys
from functools import partial
from itertools import product
from typing import NamedTuple

import torch, torch.nn.functional as F

from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits, smooth_cross_entropy
from gpu_common import DEVICE, Rows, cast, dtype_of, early, in_parallel, name_of, sized

LOSS = dict(float32=2e-6, bfloat16=2e-6, float16=2e-6, float64=1e-12)     # relative, in the norm
GRAD = dict(float32=3e-6, bfloat16=4e-3, float16=6e-4, float64=1e-12)
DTYPES = 'float32', 'bfloat16', 'float16'
SECONDS = 40   # of the pool: what is not done by then is left out
ONLY_RUN = False   # compare nothing

class Check(NamedTuple):
    head: str
    option: str
    shape: tuple
    dtype: str
    early: bool = True

    def __str__(self): return f"{self.head} {name_of(self.shape)} {self.dtype} {self.option} {'early' if self.early else 'late'}"

OPTIONS = ('plain', 'weight', 'prior [K]', 'prior [K,K]', 'eps each', 'others', "reduction='none'", 'soft labels', 'multi_hot',
           'ignore_index', 'masked', 'masked, prior, weight', 'channels_last', 'sliced', 'ignore all', 'sum', 'eps=0', 'int32',
           'weight, soft labels')
EAGER = 'plain', 'weight', 'ignore_index', 'soft labels', "reduction='none'", 'sum', 'eps=0', 'channels_last', 'sliced'   # PyTorch's, too
SIGMOID = 'plain', 'bool', 'float', 'pos_weight', 'weight', 'prior', "reduction='none'", 'sliced', 'sum', 'prior, weight, pos_weight'

def checks():
    "In an order by chance, but always the same: whatever time there is goes to all of them."
    shapes = ((33, 301), True), ((33, 301), False), ((5, 20003), False), ((2, 21, 7, 9), True)
    res = [Check('softmax', o, s, 'float32', on) for o, (s, on) in product(OPTIONS, shapes)
           if (o != 'channels_last' or len(s) == 4) and (s[1] < 9999 or o != 'prior [K,K]')]
    res += [Check('softmax', o, (33, 301), dtype, dtype == 'bfloat16') for dtype, o in product(DTYPES[1:], OPTIONS) if o != 'channels_last']
    res += [Check('softmax', o, (5, 20003), 'float32') for o in ('weight', 'prior [K]', 'weight, soft labels')]
    res += [Check('softmax', 'plain', s, 'float64', on) for s, on in product(((33, 301), (2, 21, 7, 9)), (True, False))]
    res += [Check('sigmoid', o, s, dtype, dtype != 'float16') for o, s, dtype in product(SIGMOID, ((333, 77), (3, 5, 40, 41)), DTYPES)]
    res.append(Check('sigmoid', 'plain', (333, 77), 'float64'))
    random.Random(0).shuffle(res)
    return res

def smoothed(y, k, eps=.1, prior=None, spread='all', multi_hot=False):
    "The smoothed target by the formula, classes along axis 1. Rows of `multi_hot` have a positive, and not all."
    index = y.dtype in (torch.int64, torch.int32)
    hot = F.one_hot(y.long().clamp(0), k).movedim(-1, 1).double() if index else y.double()
    if isinstance(eps, torch.Tensor): eps = eps.double()[y.long().clamp(0)].unsqueeze(1)
    n = hot.sum(1, keepdim=True)
    if spread == 'others': return (1 - eps) * hot / n + eps * (1 - hot) / (k - n)
    if prior is None: u = 1 / k
    elif prior.dim() == 2: u = prior.double()[y.clamp(0)].movedim(-1, 1)
    else: u = along(prior, hot)
    return (1 - eps) * hot / (n if multi_hot else 1) + eps * u

def along(v, x): return v.double().view(-1, *[1] * (x.dim() - 2))

def softmax_truth(x, y, weight=None, reduction='mean', ignore_index=-100, **smoothing):
    "Loss and gradient."
    k = x.shape[1]
    w, index = torch.ones(k, device=x.device) if weight is None else weight, y.dim() < x.dim()
    count = y != ignore_index if index else torch.ones(x.shape[:1] + x.shape[2:], device=x.device)
    losses = -(along(w, x) * smoothed(y, k, **smoothing) * x.log_softmax(1)).sum(1) * count
    if reduction == 'none': return losses
    if reduction == 'sum': return losses.sum()
    return losses.sum() / max((w.double()[y.long().clamp(0)] * count).sum().item(), 1e-300) if index else losses.mean()

def sigmoid_truth(x, y, eps=.05, prior=None, reduction='mean', **options):
    u = .5 if prior is None else along(prior, x)
    q = y.double() * (1 - 2*eps) + 2*eps * u
    return F.binary_cross_entropy_with_logits(x, q, reduction=reduction, **{o: v.double() for o, v in options.items()})

def softmax_inputs(check):
    "Logits, targets and options; and how many classes are not masked."
    option, (n, k, *rest) = check.option, check.shape
    new = lambda *s: torch.randn(s, device=DEVICE)
    x, options, left = (3 * new(*check.shape)).to(dtype_of(check.dtype)), {}, k
    if option == 'channels_last': x = x.contiguous(memory_format=torch.channels_last)
    if option == 'sliced': x = (3 * new(n, k + 5, *rest)).to(x.dtype)[:, 2:k + 2]
    if 'masked' in option:
        left = k - k // 10
        x[:, left:] = -torch.inf
    y = torch.randint(left, (n, *rest), device=DEVICE)
    if option == 'int32': y = y.int()
    if 'soft labels' in option: y = new(*check.shape).softmax(1).to(x.dtype)
    if option == 'multi_hot':
        y, options['multi_hot'] = (torch.rand(check.shape, device=DEVICE) < .2).to(torch.uint8), True
        y[:, 0], y[:, 1] = 1, 0
    if option in ('plain', 'ignore_index', 'weight', 'prior [K,K]'): y.view(-1)[::7] = -100
    if option == 'ignore all': y[:] = -100
    if 'weight' in option: options['weight'] = torch.rand(k, device=DEVICE) + .5
    if 'prior' in option: options['prior'] = new(*([k, k] if 'K,K' in option else [k])).softmax(-1)
    if option == 'eps each': options['eps'] = torch.rand(k, device=DEVICE) * .5
    if option == 'eps=0': options['eps'] = 0.
    if option == 'others': options['spread'] = 'others'
    if option == 'sum' or 'none' in option: options['reduction'] = option if option == 'sum' else 'none'
    return x, y, options, left

def softmax_check(check):
    x, y, options, left = softmax_inputs(check)
    d = x.detach()[:, :left].double().requires_grad_()
    cut = {o: v[:left] if isinstance(v, torch.Tensor) and left < x.shape[1] else v for o, v in options.items()}
    if 'prior' in cut and left < x.shape[1]: cut['prior'] = cut['prior'].double() / cut['prior'].double().sum()
    right = partial(softmax_truth, d, y, **cut)
    same = cast(options, x.dtype)
    smoothing = same.pop('eps', .1)
    peer = (lambda x: F.cross_entropy(x, y, label_smoothing=smoothing, **same)) if check.option in EAGER else None
    return compared(x, lambda x: smooth_cross_entropy(x, y, backend='triton', **options), d, right, check.dtype, peer)

def sigmoid_check(check):
    option, shape = check.option, check.shape
    x = (3 * torch.randn(shape, device=DEVICE)).to(dtype_of(check.dtype))
    if option == 'sliced': x = x[..., 3:-2]
    k = x.shape[1]
    factor = lambda: (torch.rand(k, device=DEVICE) + .5).view(-1, *[1] * (x.dim() - 2))
    y = torch.rand(x.shape, device=DEVICE) < .2
    y = y if option == 'bool' else torch.rand(x.shape, device=DEVICE).to(x.dtype) if option == 'float' else y.to(torch.uint8)
    options = {o: factor() for o in ('pos_weight', 'weight') if o in option.split(', ')}
    if 'none' in option or option == 'sum': options['reduction'] = option if option == 'sum' else 'none'
    prior = dict(prior=torch.rand(k, device=DEVICE)) if 'prior' in option else {}
    d = x.detach().double().requires_grad_()
    right = partial(sigmoid_truth, d, y, **options, **prior)
    same = cast(options, x.dtype)
    peer = None if prior else lambda x: F.binary_cross_entropy_with_logits(x, y.to(x.dtype) * .9 + .05, **same)
    loss = lambda x: smooth_binary_cross_entropy_with_logits(x, y, backend='triton', **options, **prior)
    return compared(x, loss, d, right, check.dtype, peer)

def distance(a, b):
    "Relative, in the norm. Where all should be 0 it is the norm."
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / (b.norm() if b.norm() > 0 else 1)).item()

def compared(x, f, d, right, dtype, peer=None):
    "Errors of loss and gradient, for a `grad_output` of 1 and others; and those of PyTorch's own loss."
    right = None if ONLY_RUN else right()
    def errors(f, factors):
        leaf, res = x.detach().requires_grad_(), []
        for factor in factors:
            loss = f(leaf)
            out = torch.ones_like(loss) * factor
            if loss.dim() and factor > 1: out = out * torch.rand(loss.shape, device=DEVICE)
            grad, = torch.autograd.grad(loss, leaf, out)
            if ONLY_RUN: continue
            expected, = torch.autograd.grad(right, d, out.double(), retain_graph=True)
            if grad.shape != expected.shape:
                if grad[:, d.shape[1]:].count_nonzero(): return [torch.inf, torch.inf]
                grad = grad[:, :d.shape[1]]
            res.append([distance(loss, right), distance(grad, expected)])
        return [max(v) if all(e == e for e in v) else torch.nan for v in zip(*res)]
    some, large = (1024., 4096.) if dtype == 'float16' else (1., 64.)   # of a mean, float16's would be subnormal
    if ONLY_RUN: return dict(wrong=bool(errors(f, (some, large))))
    res = dict(zip(('loss', 'grad'), errors(f, (some, large))))
    res['wrong'] = not (res['loss'] <= LOSS[dtype] and res['grad'] <= GRAD[dtype])
    if peer: res['eager'] = errors(peer, (some,))
    return res

def one(task):
    torch.manual_seed(0)
    if isinstance(task, Accuracy): return accuracy(*task)
    with early(task.early): return (softmax_check if task.head == 'softmax' else sigmoid_check)(task)

class Accuracy(NamedTuple):
    classes: int
    offset: int      # added to all logits
    dtype: str

ACCURACY = [Accuracy(*o) for o in product((128256, 1000), (0, 1000), DTYPES) if o[0] == 1000 or not o[1] or o[2] == 'float32']

def accuracy(k, offset, dtype):
    "Errors for some rows, and of the true class' gradient where it has p = .999: ours and eager's."
    x = (torch.randn(sized((64, k)), device=DEVICE) + offset).to(dtype_of(dtype))
    y = torch.randint(x.shape[1], x.shape[:1], device=DEVICE)
    d = x.double().requires_grad_()
    right = partial(softmax_truth, d, y)
    fs = dict(ours=lambda x: smooth_cross_entropy(x, y, backend='triton'), eager=lambda x: F.cross_entropy(x, y, label_smoothing=.1))
    res = {}
    for name, f in fs.items():
        e = compared(x, f, d, right, dtype)
        res[name] = [e['loss'], e['grad']]
    x = x.double() - offset
    x.scatter_(1, y[:, None], 0.)
    rest = (x.exp().sum(1) - 1)
    x.scatter_(1, y[:, None], (rest * 999).log()[:, None])
    x = (x + offset).to(dtype_of(dtype))
    d = x.double().requires_grad_()
    expected = torch.autograd.grad(softmax_truth(d, y), d)[0].gather(1, y[:, None])
    for name, f in fs.items():
        leaf = x.clone().requires_grad_()
        res[name].append(distance(torch.autograd.grad(f(leaf), leaf)[0].gather(1, y[:, None]), expected))
    return res

def tiny():
    "Runs every kind of kernel, and little else."
    global ONLY_RUN
    ONLY_RUN = True
    shapes, options = ((33, 10), (5, 20003), (2, 21, 7, 9)), ('plain', 'weight, soft labels', "reduction='none'")
    for shape, on, option in product(shapes, (True, False), options): one(Check('softmax', option, shape, 'float32', on))
    for option in 'prior [K]', 'prior [K,K]': one(Check('softmax', option, (33, 301), 'float32'))
    for dtype, option in product(('float32', 'float16'), ('plain', "reduction='none'", 'prior, weight, pos_weight')):
        one(Check('sigmoid', option, (33, 301), dtype))
    torch.cuda.synchronize()
    print('checked')

def summary(rows):
    "The largest errors by head and dtype, ours and eager's where both were looked at."
    most = lambda errors: ' '.join(f'{max(e, default=0):.1e}' for e in zip(*errors)) or 'none'
    for head, dtype in product(('softmax', 'sigmoid'), LOSS):
        some = [r for r in rows if 'loss' in r and r['check'].startswith(head) and dtype in r['check'].split()]
        both = [r for r in some if 'eager' in r]
        ours, beside = (most((r['loss'], r['grad']) for r in rs) for rs in (some, both))
        if some: yield (f'{head} {dtype}: {len(some)} checks, {sum(r["wrong"] for r in some)} wrong; largest error of loss and gradient '
                        f'{ours}; beside eager, ours {beside}, eager {most(r["eager"] for r in both)}')

def main(path):
    out, tasks = Rows(path), [*ACCURACY, *checks()]
    done, exact = [], []
    out.data |= dict(checks=done, accuracy=exact)
    for task, res, error in in_parallel(one, tasks, SECONDS):
        if isinstance(task, Accuracy): exact.append(task._asdict() | (res or dict(error=error)))
        else: done.append(dict(check=str(task)) | (res or dict(wrong=True, error=error)))
        if error or res.get('wrong'): print(f"WRONG {task}: {error or [res['loss'], res['grad']]}"[:200].replace('\n', ' '), flush=True)
        if len(done) % 20 == 0: out.write()
    wrong = sum(r['wrong'] for r in done)
    lines = [*summary(done), f'{len(done)} of {len(tasks) - len(ACCURACY)} checks, {wrong} wrong',
             'errors of loss, gradient, gradient of a true class with p = .999:']
    for r in sorted(exact, key=lambda r: (r['classes'], r['offset'])):
        errors = '; '.join(f'{o} ' + ' '.join(f'{e:.1e}' for e in r[o]) for o in ('ours', 'eager') if o in r)
        lines.append(f"{r['classes']} classes + {r['offset']} {r['dtype']}: {r.get('error', errors)}")
    out.data['summary'] = lines
    out.write()
    print('\n'.join(lines), flush=True)
    return wrong > 0 or not done

if __name__ == '__main__':
    if sys.argv[2:] == ['tiny']: tiny()
    else: sys.exit(main(sys.argv[1]))
