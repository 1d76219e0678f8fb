"One palette: no colour has two meanings, each can be told from the others in grey."
import itertools

import matplotlib.pyplot as plt, pytest
from matplotlib.colors import to_rgb

from fastai_smooth.pictures import *
from fastai_smooth.pictures import _KINDS, _OTHERS

def grey(color): return sum(a*b for a, b in zip((.299, .587, .114), to_rgb(color)))
def apart(a, b): return max(abs(x-y) for x, y in zip(to_rgb(a), to_rgb(b)))

def test_no_colour_has_two_meanings():
    colors = [UNDER, OVER, RIGHT, WRONG, *(o[0] for o in [*_KINDS.values(), *_OTHERS])]
    assert all(apart(a, b) > .15 for a, b in itertools.combinations(colors, 2))

def test_what_is_opposed_differs_in_grey():
    assert abs(grey(UNDER) - grey(OVER)) > .2 and abs(grey(RIGHT) - grey(WRONG)) > .2

def test_methods_have_lines_and_markers_of_their_own():
    styles = method_styles(['none', 'uniform 0.1', 'online 0.5', 'one-sided 0.1', 'prior 0.1']).values()
    for key in 'ls', 'marker': assert len({o[key] for o in styles}) == 5

def test_a_method_looks_the_same_in_any_company():
    alone = method_styles(['online 0.5'])['online 0.5']
    assert method_styles(['none', 'uniform 0.1', 'online 0.5'])['online 0.5'] == alone

def test_a_larger_eps_is_lighter():
    greys = [grey(o['color']) for o in method_styles([f'uniform {o}' for o in (.1, .2, .3, .4)]).values()]
    assert greys == sorted(set(greys)) and greys[-1] < .8

@pytest.mark.parametrize('names', [['A', 'B', 'C', 'D', 'E', 'F', 'none', 'uniform 0.1', 'uniform 0.4'], ['none', 'uniform 0.1', 'normalised'], ['uniform 0.1', 'raw'], ['my model', 'none'], ['', ' '], ['online 0.5', 'mine', 'yours']])
def test_no_two_curves_look_alike(names): assert len({(o['color'], o['ls'], o['marker']) for o in method_styles(names).values()}) == len(names)

def test_style_ends():
    before = plt.rcParams['axes.prop_cycle'], plt.rcParams['axes.spines.top']
    with picture_style(): assert not plt.rcParams['axes.spines.top']
    with pytest.raises(ZeroDivisionError), picture_style(): 1/0
    @picture_style()
    def draw(): return plt.rcParams['axes.prop_cycle'].by_key()['color'][0]
    assert draw() == draw() == _OTHERS[0][0] and (plt.rcParams['axes.prop_cycle'], plt.rcParams['axes.spines.top']) == before
