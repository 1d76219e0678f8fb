"Several gloo processes on this machine, as several machines would be: for what is shared among them."
import os, pytest, tempfile, torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_distributed = pytest.mark.skipif(not dist.is_available(), reason='needs torch.distributed')

def _process(rank, n, folder, f, args, rng):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), ACCELERATE_USE_CPU='1', GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    torch.set_rng_state(rng)
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=n)
    torch.save(f(*args), f'{folder}/{rank}.pt')
    dist.destroy_process_group()

def in_processes(n, f, *args):
    """What `f(*args)` gives in each of `n` processes, with torch's random state as it is here.

    They are spawned, and import all anew: threads that torch has started for what other tests compile would be dead in a fork, and
    waited for."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (n, folder, f, args, torch.get_rng_state()), nprocs=n, start_method='spawn')
        return [torch.load(f'{folder}/{i}.pt', weights_only=False) for i in range(n)]

def fastai_on_cpu():
    "fastai's DistributedDL sends its indices by way of the GPU; call it in each process."
    from fastai.distributed import DistributedDL
    def broadcast(self, t, rank):
        dist.broadcast(t := torch.LongTensor(t), rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast
