"Means over the rows of all processes, whose gradients DDP averages."
import pytest, torch
import torch.distributed as dist

from fastai_smooth.kernels import global_mean, mean_denominator, smooth_cross_entropy
from processes import in_processes, needs_distributed

W = torch.tensor([.2, 1., 3., .5])
X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, -100, 3, 2, 2])

def mean_of(x, y, weight=W): return global_mean(smooth_cross_entropy(x, y, .2, weight=weight, reduction='sum'), mean_denominator(y, weight))

def global_means():
    "(what each process has, its share of the mean, its gradient) for weights, ignored rows, and nothing left."
    res = []
    for ignored in ((), (0, 1, 2), range(8)):
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(8, 4, generator=g), torch.randint(4, (8,), generator=g)
        y[list(ignored)] = -100
        x, y = (o[:3] if dist.get_rank() == 0 else o[3:] for o in (x, y))   # the first has nothing left in the second case
        loss = mean_of(x.requires_grad_(), y)
        loss.backward()
        res.append((x.detach(), y, loss.detach(), x.grad))
    return res

@needs_distributed
def test_global_mean():
    "Averaged over processes, the loss and its gradient are those of the mean over all rows."
    for (x0, y0, loss0, grad0), (x1, y1, loss1, grad1) in zip(*in_processes(2, global_means)):
        x = torch.cat([x0, x1]).requires_grad_()
        loss = smooth_cross_entropy(x, torch.cat([y0, y1]), .2, weight=W)
        loss.backward()
        torch.testing.assert_close((loss0 + loss1)/2, loss.detach())
        torch.testing.assert_close(torch.cat([grad0, grad1])/2, x.grad)

def test_global_mean_of_one_process():
    "Is the mean, compiled too; 0 where nothing is left."
    for weight in (None, W): torch.testing.assert_close(mean_of(X, Y, weight), smooth_cross_entropy(X, Y, .2, weight=weight))
    torch.testing.assert_close(torch.compile(mean_of, fullgraph=True, backend='aot_eager')(X, Y), mean_of(X, Y))
    assert global_mean(torch.tensor(0.), mean_denominator(torch.tensor([-100]))) == 0
    assert mean_denominator(torch.tensor([[1, 255], [2, 255]], dtype=torch.uint8), W, ignore_index=255) == 4

def test_global_mean_of_half_precision():
    "The denominator is added up in float32, where float16 has no such number and bfloat16 a rounded one."
    torch.testing.assert_close(global_mean(torch.tensor(6e4).half(), torch.tensor(1e5)), torch.tensor(.6), atol=1e-3, rtol=0)
    torch.testing.assert_close(global_mean(torch.tensor(1000.).bfloat16(), 257), torch.tensor(1000 / 257))

@pytest.mark.parametrize('what,call', [
    ('loss_sum', lambda: global_mean(3., 1)), ('loss_sum', lambda: global_mean(torch.ones(2), 1)), ('denominator', lambda: global_mean(X[0, 0], 'a')),
    ('denominator', lambda: global_mean(X[0, 0], torch.ones(2))), ('target', lambda: mean_denominator([1, 2])),
    ('target must be class indices', lambda: mean_denominator(torch.rand(3, 2))), ('weight', lambda: mean_denominator(Y, torch.ones(2, 2))),
    ('ignore_index', lambda: mean_denominator(Y, None, 'a')), ('class index -1', lambda: mean_denominator(torch.tensor([-1]), W)),
    ('class index 4', lambda: mean_denominator(torch.tensor([4]), W))])
def test_bad_input(what, call):
    with pytest.raises((TypeError, ValueError, IndexError), match=what): call()
