"""What only a GPU can show of the Triton kernels: that nothing waits for it, streams, graphs, memory, sizes, and every entry of the
dispatch table against float64. Needs CUDA, torch and Triton, and nothing else; benchmarks/gpu.sh runs this."""

import pytest, torch
import torch.nn.functional as F

pytest.importorskip('triton', minversion='3.6')
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits, smooth_cross_entropy
from fastai_smooth.kernels.triton import launch, softmax
from reference import distance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or launch.INTERPRETED, reason='needs CUDA')
RUNS = [(dict(), 'index'), (dict(weight=True), 'index'), (dict(prior=True), 'index'), (dict(spread='others'), 'index'), (dict(), 'soft'),
        (dict(multi_hot=True), 'hot'), (dict(reduction='none'), 'index'), (dict(), 'sigmoid'), (dict(pos_weight=True), 'sigmoid')]


@pytest.fixture(autouse=True)
def room():
    yield
    torch.cuda.empty_cache()


def run(x, target, options, y=None):
    "loss and gradient of one of `RUNS`"
    k = x.shape[1]
    vector = torch.linspace(.5, 1.5, k, device=x.device)
    options = {o: vector / vector.sum() if o == 'prior' else vector if v is True and o != 'multi_hot' else v for o, v in options.items()}
    f = smooth_binary_cross_entropy_with_logits if target == 'sigmoid' else smooth_cross_entropy
    loss = f(x, y, .1, backend='triton', **options)
    return loss, torch.autograd.grad(loss, x, torch.ones_like(loss))[0]


def inputs(target, n=64, k=100, dtype=torch.float32):
    x = torch.randn(n, k, device='cuda').to(dtype).requires_grad_()
    if target == 'index': return x, torch.randint(k, (n,), device='cuda')
    if target == 'soft': return x, torch.rand(n, k, device='cuda').softmax(1).to(dtype)
    return x, (torch.rand(n, k, device='cuda') < .1).to(torch.uint8)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('early', [False, True])
@pytest.mark.parametrize('entry', [*range(len(softmax.TILES)), 'images'])
def test_every_entry(entry, early, dtype, monkeypatch):
    "of the dispatch table, with as many classes as it takes and an odd number of them; and images of few and of many"
    monkeypatch.setattr(launch, 'EARLY_MB', 0 if early else 10**6)
    most = 0 if entry == 'images' else softmax.TILES[entry][0] or 50000
    for shape in [(2, 3, 9, 16), (2, 150, 9, 16)] if entry == 'images' else [(70, most), (70, most - 3)]:
        k = shape[1]
        x = (3 * torch.randn(shape, device='cuda')).to(dtype).requires_grad_()
        y = torch.randint(k, shape[:1] + shape[2:], device='cuda')
        y.view(-1)[3] = -100
        d = x.detach().double().requires_grad_()
        loss, expected = smooth_cross_entropy(x, y, backend='triton'), F.cross_entropy(d, y, label_smoothing=.1)
        assert abs(loss.item() / expected.item() - 1) < 2e-6
        scale = 1024.   # as a gradient scaler's
        grad, truth = torch.autograd.grad(loss, x, torch.tensor(scale, device='cuda'))[0].double(), torch.autograd.grad(expected, d)[0] * scale
        assert (grad - truth).norm() <= {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype] * truth.norm()


@pytest.mark.parametrize('options,target', RUNS)
@pytest.mark.parametrize('early', [False, True])
def test_no_host_sync(options, target, early, monkeypatch):
    monkeypatch.setattr(launch, 'EARLY_MB', 0 if early else 10**6)
    x, y = inputs(target)
    run(x, target, options, y)   # compiles
    torch.cuda.set_sync_debug_mode('error')
    try: run(x, target, options, y)
    finally: torch.cuda.set_sync_debug_mode('default')


def test_class_index_out_of_range_is_nan():
    x, y = inputs('index', 4, 5)
    y[:] = torch.tensor([0, 44, -100, 2])
    assert smooth_cross_entropy(x, y, reduction='none', backend='triton').isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize('options,target', RUNS)
@pytest.mark.parametrize('early', [False, True])
def test_deterministic(options, target, early, monkeypatch):
    "bit by bit, also where many programs add up"
    monkeypatch.setattr(launch, 'EARLY_MB', 0 if early else 10**6)
    x, y = inputs(target, 30000, 20)
    first = run(x, target, options, y)
    for _ in range(20): assert all(map(torch.equal, run(x, target, options, y), first))


@pytest.mark.parametrize('options,target', RUNS)
def test_cuda_graph(options, target):
    "a captured step runs again on new numbers"
    x, y = inputs(target)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3): run(x, target, options, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): loss, grad = run(x, target, options, y)
    for _ in range(3):
        with torch.no_grad(): x.normal_()
        graph.replay()
        assert all(map(torch.equal, (loss, grad), run(x, target, options, y)))


def test_graphs_at_once():
    "two captured steps on two streams, which must not share a ticket"
    steps = []
    for _ in range(2):
        x, y = inputs('index', 20000, 50)
        run(x, 'index', {}, y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): loss, _ = run(x, 'index', {}, y)
        steps.append((torch.cuda.Stream(), graph, loss, run(x, 'index', {}, y)[0]))
    torch.cuda.synchronize()
    for _ in range(200):
        for stream, graph, _, _ in steps:
            with torch.cuda.stream(stream): graph.replay()
    torch.cuda.synchronize()
    for _, _, loss, expected in steps: assert torch.equal(loss, expected)


def test_several_streams():
    sets = [inputs('index', 20000, 50) for _ in range(4)]
    expected = [run(x, 'index', {}, y) for x, y in sets]
    streams, got = [torch.cuda.Stream() for _ in sets], [[] for _ in sets]
    torch.cuda.synchronize()
    for _ in range(50):
        for (x, y), stream, out in zip(sets, streams, got):
            with torch.cuda.stream(stream): out.append(run(x, 'index', {}, y))
    torch.cuda.synchronize()
    for out, e in zip(got, expected):
        for o in out: assert all(map(torch.equal, o, e))


@pytest.mark.parametrize('early', [False, True])
def test_memory(early, monkeypatch):
    "the gradient and nothing else of the logits' size; none without grad"
    monkeypatch.setattr(launch, 'EARLY_MB', 0 if early else 10**6)
    x, y = inputs('index', 2048, 8192)
    def peak(f):
        f()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / x.nbytes
    assert peak(lambda: run(x, 'index', {}, y)) < 1.02
    with torch.no_grad(): assert peak(lambda: smooth_cross_entropy(x, y, backend='triton')) < .02


@pytest.mark.parametrize('shape', [(20000, 131072), (3, 21, 6000, 6000), (70000000, 40)])
def test_more_than_2_to_the_31_logits(shape):
    "the last rows, beside the same rows alone"
    if torch.cuda.mem_get_info()[0] < 5 * torch.Size(shape).numel(): pytest.skip('not enough memory')
    x = torch.empty(shape, device='cuda', dtype=torch.bfloat16).normal_().requires_grad_()
    y = torch.randint(shape[1], shape[:1] + shape[2:], device='cuda')
    for backward in (True, False):
        loss = smooth_cross_entropy(x, y, reduction='sum' if backward else 'none', backend='triton')
        tail = x.detach()[-1:].clone().requires_grad_()
        alone = smooth_cross_entropy(tail, y[-1:], reduction='sum' if backward else 'none', backend='torch')
        if not backward: assert distance(loss[-1:], alone) < 1e-5
        else: assert distance(torch.autograd.grad(loss, x)[0][-1:], torch.autograd.grad(alone, tail)[0]) < 1e-2


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_grad_scaler(dtype):
    "steps as without scaling; a scale that overflows is found"
    for scale, steps in ((2.**10, True), (2.**40, dtype == torch.float32)):
        w = torch.randn(32, 50, device='cuda', requires_grad=True)
        before, scaler, opt = w.detach().clone(), torch.amp.GradScaler('cuda', init_scale=scale), torch.optim.SGD([w], .1)
        x, y = torch.randn(16, 32, device='cuda'), torch.randint(50, (16,), device='cuda')
        with torch.autocast('cuda', torch.float16, enabled=dtype == torch.float16): loss = smooth_cross_entropy(x @ w, y, backend='triton')
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        assert torch.equal(before, w) != steps


@pytest.mark.parametrize('options,target', RUNS)
def test_compiled(options, target):
    x, y = inputs(target)
    f = smooth_binary_cross_entropy_with_logits if target == 'sigmoid' else smooth_cross_entropy
    if 'prior' in options or 'weight' in options or 'pos_weight' in options: options = {k: torch.full((100,), .01, device='cuda') for k in options}
    compiled = torch.compile(lambda x, y: f(x, y, .1, backend='triton', **options), fullgraph=True)
    results = [(loss := h(x, y), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]) for h in (compiled, lambda x, y: f(x, y, .1, backend='triton', **options))]
    assert max(map(distance, *results)) < 1e-5


@pytest.mark.parametrize('target', ['index', 'sigmoid'])
def test_compiled_with_cuda_graphs(target):
    "mode='reduce-overhead': nothing that an op allocates outlives the graph's pool"
    x, y = inputs(target)
    f = smooth_binary_cross_entropy_with_logits if target == 'sigmoid' else smooth_cross_entropy
    compiled = torch.compile(lambda x, y: f(x, y, .1, backend='triton'), fullgraph=True, mode='reduce-overhead')
    for _ in range(6):
        with torch.no_grad(): x.normal_()
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(x, y)
        grad, = torch.autograd.grad(loss, x)
        assert max(map(distance, (loss, grad), run(x, target, {}, y))) < 1e-5
