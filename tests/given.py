"Learners that predict given logits, which labels are drawn from: what is right for them is known without a training."
from helpers import *
import tempfile, warnings
from scipy.optimize import minimize_scalar

def near(a, b, atol=1e-6): np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=0, atol=atol)

def drawn(n, k, t=1., scale=3., seed=0, multi=False, eta=0.):
    "Logits (n,k), or (n,) for k=0, and labels of softmax(z/t), or of sigmoid(z/t) if `multi`; a share `eta` of them replaced by any. In float64"
    g = torch.Generator().manual_seed(seed)
    z = scale*torch.randn(*((n, k) if k else (n,)), generator=g, dtype=torch.float64)
    if multi: y, other = torch.bernoulli((z/t).sigmoid(), generator=g), torch.randint(2, z.shape, generator=g).double()
    else: y, other = torch.multinomial((z/t).softmax(1), 1, generator=g)[:, 0], torch.randint(k, (n,), generator=g)
    return z, torch.where(torch.rand(y.shape, generator=g) < eta, other, y)

def drawn_pixels(n, m, seed):
    "m pixels of each of n images, alike, with the luck of the image: labels of softmax(z/2)"
    g = torch.Generator().manual_seed(seed)
    z = 3*torch.randn(n, 1, 4, generator=g, dtype=torch.float64) + torch.randn(n, m, 4, generator=g, dtype=torch.float64)
    y = torch.searchsorted((z/2).softmax(2).cumsum(2), torch.rand(n, 1, 1, generator=g, dtype=torch.float64).expand(n, m, 1)).clamp(max=3)
    return z.reshape(-1, 4), y.flatten(), torch.arange(n).repeat_interleave(m)

def drawn_by_shape(n, k, spread=1., seed=0):
    "Logits (n,k) whose size, of each row another by `spread`, says nothing: labels of softmax(6*u), u with a norm of 1"
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(n, k, generator=g, dtype=torch.float64)
    u = (u - u.mean(1, keepdim=True)) / (u - u.mean(1, keepdim=True)).norm(dim=1, keepdim=True)
    y = torch.multinomial((6*u).softmax(1), 1, generator=g)[:, 0]
    return 5*u*(spread*torch.randn(n, 1, generator=g, dtype=torch.float64)).exp() + torch.randn(n, 1, generator=g, dtype=torch.float64), y

def normalized(z, p):
    "(x - mean x) / |x - mean x|_p of each row x of (n,k), in numpy; what is -inf stays and counts for nothing"
    rows = np.array(z, dtype=np.float64)
    for row in rows:
        x = row[row > -np.inf]
        size = (np.abs(x - x.mean())**p).sum()**(1/p)
        row[row > -np.inf] = (x - x.mean())/size if size else 0.
    return torch.tensor(rows)

def mean_nll(z, y):
    "In numpy: of classes, labels or events"
    z, y = np.asarray(z, dtype=np.float64), np.asarray(y)
    if z.shape == y.shape: return np.mean(np.logaddexp(0, -np.where(y == 1, z, -z)))
    top = z.max(1, keepdims=True)
    return np.mean(top[:, 0] + np.log(np.exp(z-top).sum(1)) - z[np.arange(len(y)), y])

def best_by_search(z, y):
    "T with the least `mean_nll`: of a dense grid, polished"
    def f(log_t): return mean_nll(np.asarray(z, dtype=np.float64)/math.exp(log_t), y)
    grid = np.linspace(math.log(1e-3), math.log(1e3), 200)
    i = int(np.argmin([f(o) for o in grid]))
    return math.exp(minimize_scalar(f, bounds=(grid[max(0, i-1)], grid[min(199, i+1)]), method='bounded', options=dict(xatol=1e-10)).x)

class Given(nn.Module):
    "Gives logits as they are, times a parameter of 1"
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
    def forward(self, x): return x*self.one

def given(z, y, loss=None, model=None, **kwargs):
    "A Learner that predicts the logits `z` of its validation data; it would train with the first 40 of them"
    z, y = z.float(), y.float() if y.is_floating_point() else y
    loss = ifnone(loss, BCEWithLogitsLossFlat() if y.is_floating_point() else CrossEntropyLossFlat())
    dls = tensor_dls(torch.cat([z[:40], z]), torch.cat([y[:40], y]), bs=64, n_valid=len(z))
    return tensor_learner(dls, ifnone(model, Given()), loss, path=Path(tempfile.gettempdir()), **kwargs)

def image_learner(path):
    "A linear model of real digits, too sure of itself"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10))
    learn = fit_seeded(quiet(Learner(digits_dls(write_digits(path, 160)), model, CrossEntropyLossFlat(), lr=.003, path=path)), 2)
    with torch.no_grad(): learn.model[-1].weight *= 4
    return learn

def said_by(f, *args, **kwargs):
    "Its warnings of ours"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [str(o.message) for o in seen if o.category is UserWarning]

def quietly(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)

def snapshot(learn):
    "What trials and predictions must leave as it is: (as text, the very objects)"
    rec, opt = learn.recorder, learn.opt
    return ([str(o) for o in (weights(learn).tolist(), [getattr(rec, k, None) for k in ('values', 'losses')], [m.training for m in learn.model.modules()], sorted(learn.__dict__),
                              random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), [dl.rng.getstate() for dl in learn.dls.loaders],
                              opt and opt.state_dict(), [p.grad is None for p in learn.model.parameters()])],
            [learn.loss_func, rec, learn.dls, *learn.dls.loaders, opt, learn.model, *learn.cbs])

def check_untouched(learn, before):
    now = snapshot(learn)
    assert now[0] == before[0] and len(now[1]) == len(before[1]) and all(a is b for a, b in zip(now[1], before[1]))

__all__ = [n for n in globals() if not n.startswith(('_', 'test'))]
