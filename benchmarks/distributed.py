"""What the loss costs where there are several processes, on this machine's CPU with gloo.

    OMP_NUM_THREADS=1 python benchmarks/distributed.py [--quick]

Writes distributed.json beside this script and prints the two tables.

1. Share of a step. Each process trains the same model with DDP on 64 rows of its own: forward, loss, backward, SGD. The share is the
time in the loss's forward and in its gradient of the logits, measured by itself on the very logits, over the time of the whole step; the
median over rounds in which both are measured one after the other. More processes than cores make steps slower, the loss as well.
2. Logits sharded over classes: forward and backward of `smooth_cross_entropy`, against gathering the logits of all ranks
first (`full_tensor`), which is what a loss that knows of no shards does to them, and PyTorch's loss over them. What is moved is counted."""
import argparse, json, os, statistics, tempfile, time
from pathlib import Path

import torch, torch.distributed as dist, torch.multiprocessing as mp, torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastai_smooth.kernels import global_mean, mean_denominator, smooth_cross_entropy
from machine import machine


def process(rank, n, folder, f, args):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=n)
    res = f(*args)
    if rank == 0: torch.save(res, f'{folder}/res.pt')
    dist.destroy_process_group()


def in_processes(n, f, *args):
    "What `f(*args)` gives in the first of `n` processes"
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(process, (n, folder, f, args), nprocs=n, start_method='fork')
        return torch.load(f'{folder}/res.pt', weights_only=False)


def timed(f):
    dist.barrier()
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def share_of_a_step(rounds, k=1000, bs=64, width=1024):
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, k)))
    opt, x, y, w = torch.optim.SGD(model.parameters(), lr=.01), torch.randn(bs, width), torch.randint(k, (bs,)), torch.rand(k) + .1
    def local(logits): return smooth_cross_entropy(logits, y, .1, weight=w)
    def over_all(logits): return global_mean(smooth_cross_entropy(logits, y, .1, weight=w, reduction='sum'), mean_denominator(y, w))
    res = {}
    for name, loss in (('mean', local), ('global_mean', over_all)):
        def step():
            opt.zero_grad()
            loss(model(x)).backward()
            opt.step()
        def loss_alone():
            logits = last.clone().requires_grad_()
            loss(logits).backward()
        step()
        last = model(x).detach()
        pairs = [(timed(loss_alone), timed(step)) for _ in range(rounds)]
        res[name] = dict(step_ms=1e3 * statistics.median(s for _, s in pairs), loss_ms=1e3 * statistics.median(o for o, _ in pairs),
                         share=statistics.median(o / s for o, s in pairs))
    return res


def sharded(rounds, rows, k):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    mesh, moved = init_device_mesh('cpu', (dist.get_world_size(),)), []
    x, y = torch.randn(rows, k), torch.randint(k, (rows,))
    dist.broadcast(x, 0), dist.broadcast(y, 0)
    logits, original = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_(), dist.all_reduce
    def counted(t, *args, **kwargs):
        moved.append(t.numel() * t.element_size())
        return original(t, *args, **kwargs)
    dist.all_reduce = counted
    def run(f):
        logits.grad = None
        f().backward()
        return logits.grad.to_local()
    ours, gathered = lambda: smooth_cross_entropy(logits, y, .1), lambda: F.cross_entropy(logits.full_tensor(), y, label_smoothing=.1)
    a, moved_ours = run(ours).clone(), sum(moved)
    off = (a - run(gathered)).abs().max().item() / a.abs().max().item()
    pairs = [(timed(lambda: run(ours)), timed(lambda: run(gathered))) for _ in range(rounds)]
    return dict(rows=rows, classes=k, ours_s=statistics.median(o for o, _ in pairs), gathered_s=statistics.median(g for _, g in pairs),
                ratio=statistics.median(g / o for o, g in pairs), ours_bytes=moved_ours, gathered_bytes=x.numel() * 4 // dist.get_world_size(), gradient_off=off)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='few rounds, small logits; writes nothing')
    quick = p.parse_args().quick
    res = dict(machine=machine('cpu'), share={}, sharded={})
    for n in (1, 2, 4):
        res['share'][n] = in_processes(n, share_of_a_step, 3 if quick else 100)
        for name, r in res['share'][n].items(): print(f"{n} process(es), {name}: step {r['step_ms']:.1f} ms, loss {r['loss_ms']:.2f} ms, share {100*r['share']:.1f}%", flush=True)
    for n in (2, 4):
        r = res['sharded'][n] = in_processes(n, sharded, 1 if quick else 7, *((64, 1000) if quick else (2048, 32000)))
        print(f"{n} ranks, {r['rows']} x {r['classes']}: {r['ours_s']:.2f} s, gathered {r['gathered_s']:.2f} s (x{r['ratio']:.1f}); "
              f"a rank gives {r['ours_bytes']:,} bytes, gathered {r['gathered_bytes']:,}; gradients differ by {r['gradient_off']:.0e}", flush=True)
    if not quick: Path(__file__).with_suffix('.json').write_text(json.dumps(res, indent=1) + '\n')


if __name__ == '__main__': main()
