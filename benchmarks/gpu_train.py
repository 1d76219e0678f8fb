"""Whole steps on a GPU, in torch alone. `python benchmarks/gpu_train.py OUT.json [head] [resnet] [lm]`

A language model's head in chunks of rows, with our loss; and trainings of a ResNet and of a small language model with three losses:
milliseconds a step and peak memory."""
import statistics, sys, time
from functools import partial

import torch, torch.nn.functional as F
from torch import nn

from fastai_smooth.kernels import smooth_linear_cross_entropy
from gpu_common import DEVICE, EPS, START, Rows, free, liger, ms, ours, peak, sized

STEPS, FIRST = 20, 8
LOSSES = dict(hard=F.cross_entropy, eager=partial(F.cross_entropy, label_smoothing=EPS), ours=ours)

def in_chunks(h, W, y, rows, backend):
    "Loss and gradients of h @ W.T, without all logits at once."
    loss = smooth_linear_cross_entropy(h, W, y, EPS, chunk_rows=rows, backend=backend)
    return loss, *torch.autograd.grad(loss, (h, W))

def whole(h, W, y, loss_func):
    "The same with all logits."
    loss = loss_func(h @ W.T, y)
    return loss, *torch.autograd.grad(loss, (h, W))

def products(h, W, g):
    "What no loss can do without."
    return h @ W.T, g @ W, g.T @ h

def head(what):
    torch.manual_seed(0)
    n, d, k = sized((8192, 1024, 128256))
    h = torch.randn(n, d, device=DEVICE).bfloat16().requires_grad_()
    W, y = (torch.randn(k, d, device=DEVICE) / d**.5).bfloat16().requires_grad_(), torch.randint(k, (n,), device=DEVICE)
    if what == 'products':
        g = torch.randn(n, k, device=DEVICE).bfloat16()
        step = torch.no_grad()(lambda: products(h, W, g))
    elif what.startswith('chunks'):
        _, rows, backend = what.split()
        step = partial(in_chunks, h, W, y, max(1, n * int(rows) // 8192), backend)
    elif what == 'Liger fused':
        f = partial(liger().liger_fused_linear_cross_entropy, label_smoothing=EPS)
        step = lambda: torch.autograd.grad(f(h, W, y), (h, W))
    else: step = lambda: whole(h, W, y, LOSSES[what.split()[1]])
    row = dict(peak_logits=peak(step, 2 * n * k), ms=ms(step, 80))
    if what.startswith('chunks'):
        expected = whole(h, W, y, ours)
        row['errors'] = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(step(), expected)]
    return row

def resnet():
    from torchvision.models import resnet18
    n, c, h, w = sized((128, 3, 128, 128))
    model = resnet18(num_classes=100).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(n, c, h, w, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return model, x, torch.randint(100, (n,), device=DEVICE)

def lm(width=512):
    n, t, k = sized((32, 256, 32000))
    blocks = (nn.TransformerEncoderLayer(width, 8, 4 * width, 0., batch_first=True, norm_first=True) for _ in range(2))
    model = nn.Sequential(nn.Embedding(k, width), *blocks, nn.LayerNorm(width), nn.Linear(width, k), nn.Flatten(0, 1))
    x = torch.randint(k, (n, t), device=DEVICE)
    return model.to(DEVICE), x, x.roll(-1, 1).flatten()

def train(make, loss_func):
    "Median milliseconds of a step, and the peak of memory."
    torch.manual_seed(0)
    model, x, y = make()
    opt, times = torch.optim.SGD(model.parameters(), .01, momentum=.9), []
    def step():
        with torch.autocast(DEVICE, torch.bfloat16): loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss
    for i in range(FIRST + STEPS):
        if i == FIRST - 1: torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss = step()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    steps = [a.elapsed_time(b) for a, b in times[FIRST:]]
    return dict(ms=statistics.median(steps), quartiles=statistics.quantiles(steps), loss=loss.item(),
                peak_gb=torch.cuda.max_memory_allocated() / 2**30)

def together(make):
    "With each loss; then with the first again, which says how much times move."
    res = {}
    for name in (*LOSSES, 'hard again'):
        res[name] = train(make, LOSSES[name.split()[0]])
        free()
    return dict(by=res)

def main(path, parts=('head', 'resnet', 'lm')):
    out = Rows(path)
    if 'head' in parts:
        for what in ('products', 'chunks 2048 triton', 'chunks 1024 triton', 'chunks 512 triton', 'chunks 2048 torch', 'whole ours',
                     'whole eager', *['Liger fused'] * bool(liger())):
            out.run(f'head: {what}', head, what, say=lambda r: f"{r['ms']:8.2f} ms, peak {r['peak_logits']:.2f} of the logits "
                    + ' '.join(f'{e:.1e}' for e in r.get('errors', ())))
    for name, make in (('resnet', resnet), ('lm', lm)):
        if name in parts: out.run(name, together, make, say=lambda r: '  '.join(
            f"{k} {v['ms']:.2f} ms {v['peak_gb']:.2f} GiB" for k, v in r['by'].items()))
    print(f'{time.time() - START:.0f} s')
    return out.failed()

if __name__ == '__main__': sys.exit(main(sys.argv[1], *([sys.argv[2:]] if sys.argv[2:] else [])))
