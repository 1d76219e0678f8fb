"Which share of labels is random: SPEC section 6."
import math

import fuzz, pytest
from fuzz import NAN, Row
from hypothesis import strategies as st
from given import *

from fastai_smooth.noise import *
from fastai_smooth.noise import plot_profile

def profile_of(z, y, etas, betas):
    "Sum of the NLL on a grid, with the best of `betas`, in numpy"
    z, y, res = np.asarray(z), np.asarray(y), np.empty((len(betas), len(etas)))
    for i, b in enumerate(betas):
        if z.shape == y.shape: p, k = 1/(1+np.exp(-np.where(y == 1, z, -z)*b)), 2
        else:
            e = np.exp((z - z.max(1, keepdims=True))*b)
            p, k = (e/e.sum(1, keepdims=True))[np.arange(len(y)), y], z.shape[1]
        res[i] = [-np.log((1-eta)*p + eta/k).sum() for eta in etas]
    return res.min(0)

@pytest.mark.parametrize('multi', [False, True], ids=['single', 'multi'])
@pytest.mark.parametrize('eta', [0., .22, .44])
def test_noise_is_the_peak_of_the_likelihood(eta, multi):
    "and its interval is where the profile is within 1.92 of it; of labels, which go together in a row, it may be wider"
    z, y = drawn(300, 4, eta=eta, seed=2, multi=multi)
    etas = np.linspace(0, .9, 181)
    profile = profile_of(z, y, etas, np.exp(np.linspace(-2, 2, 101)))
    noise, low, high = noise_estimate(z, y)
    inside = etas[profile - profile.min() < 3.841/2]
    near(noise, etas[profile.argmin()], .006)
    if multi: assert low <= inside[0] + .012 and high >= inside[-1] - .012
    else: near((low, high), inside[[0, -1]], .012)

@pytest.mark.parametrize('n, least', [(16, 12), pytest.param(64, 56, marks=pytest.mark.long)])
def test_its_interval_holds_the_truth(n, least):
    "in 95% of draws: fewer than 56 of 64, or 12 of 16, has probability .006 or .0009"
    assert sum(low <= .2 <= high for _, low, high in (noise_estimate(*drawn(250, 3, eta=.2, seed=i)) for i in range(n))) >= least

def test_many_logits_are_sampled():
    "the same ones each time, with random states left alone"
    z, y = drawn(3000, 5, eta=.3)
    rng, found = torch.get_rng_state(), noise_estimate(z, y, max_numel=5*500)
    assert found == noise_estimate(z, y, max_numel=5*500) != noise_estimate(z, y) and torch.equal(rng, torch.get_rng_state())
    assert found.high - found.low > 1.5*(noise_estimate(z, y).high - noise_estimate(z, y).low)

def test_noise_does_not_depend_on_the_size_of_logits_nor_on_masked_classes():
    z, y = drawn(400, 4, eta=.22, seed=1)
    for c in 1e-2, 1e4: near(noise_estimate(z*c, y), noise_estimate(z, y), 5e-3)
    z[:, 3], y = -1e4, y.clamp(max=2)
    near(noise_estimate(z.masked_fill(z == -1e4, -math.inf), y), noise_estimate(z, y), 1e-3)

def test_noise_of_useless_logits():
    for z in (torch.zeros(300, 3), torch.randn(300, 3)):
        _, low, high = noise_estimate(z, torch.arange(300) % 3)
        assert 0 <= low <= high <= 1 and high > .9

# ---------------------------------------------------------------- bad and odd arguments

@st.composite
def scores(draw, multi):
    z = (fuzz.rand(draw, 30, 3) - .5)*8
    return dict(logits=z, targs=(fuzz.rand(draw, 30, 3) < .5).float() if multi else fuzz.randint(draw, 3, 30), max_numel=10**6)

def bad_scores(multi):
    more = [] if multi else [lambda a: a['targs']+.5, lambda a: a['targs']*NAN]
    return {'logits': [*fuzz.NOT_TENSORS, *fuzz.no_values('logits'), lambda a: dict(logits=a['logits'][:, 0], targs=a['targs'].view(30, -1)[:, 0].float() > 0)],
            'logits or targs': [lambda a: a['logits'][1:], lambda a: a['logits'][None]], 'max_numel': ['x', None, NAN, [1]],
            'targs': [*fuzz.NOT_TENSORS, *fuzz.no_values('targs'), lambda a: a['targs']*0-1, lambda a: a['targs']*0+3, lambda a: a['targs'][1:], *more]}

TABLE = {f'{kind} labels': Row(noise_estimate, scores(multi), bad_scores(multi), dict(logits=fuzz.FLOATS, targs=labels), examples=1)
         for kind, multi, labels in (('single', False, fuzz.INTEGERS), ('multi', True, fuzz.LABELS))}
test_refuses, test_takes = fuzz.both_tests(TABLE)

@pytest.mark.parametrize('multi', [False, True], ids=['single', 'multi'])
def test_a_picture_of_the_likelihood(multi):
    "with a dot and its interval at the estimate, and a line from it down to the axis"
    z, y = drawn(300, 4, eta=.3, seed=2, multi=multi)
    found, ax = noise_estimate(z, y), plt.subplots()[1]
    profile = plot_profile(ax, z, y, found, top=.8)
    shares, nlls = ax.lines[0].get_data()
    near(nlls, [profile_nll(z.double(), y, o) for o in shares]), near(ax.containers[0].lines[0].get_xydata(), [(found.noise, min(nlls))])
    assert shares.max() > .8 and profile(found.noise) == min(nlls)
    bar, line = (o.get_segments()[0] for o in ax.collections)
    near(bar[:, 0], found[1:]), near(line, [(found.noise, ax.get_ylim()[0]), (found.noise, min(nlls))])
    assert f'{found.noise:.3f} (95% interval {found.low:.3f} to {found.high:.3f})' in ax.containers[0].get_label()
    plt.close('all')
