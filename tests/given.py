"Learners that predict given logits, which labels are drawn from: what is right for them is known without a training."
from helpers import *
import tempfile, warnings

def near(a, b, atol=1e-6): np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=0, atol=atol)

def drawn(n, k, t=1., scale=3., seed=0, multi=False, eta=0.):
    "Logits (n,k), or (n,) for k=0, and labels of softmax(z/t), or of sigmoid(z/t) if `multi`; a share `eta` of them replaced by any. In float64"
    g = torch.Generator().manual_seed(seed)
    z = scale*torch.randn(*((n, k) if k else (n,)), generator=g, dtype=torch.float64)
    if multi: y, other = torch.bernoulli((z/t).sigmoid(), generator=g), torch.randint(2, z.shape, generator=g).double()
    else: y, other = torch.multinomial((z/t).softmax(1), 1, generator=g)[:, 0], torch.randint(k, (n,), generator=g)
    return z, torch.where(torch.rand(y.shape, generator=g) < eta, other, y)

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
