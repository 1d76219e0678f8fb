"""What only a GPU can show: that nothing waits for it, streams, graphs, memory, sizes, every entry of the dispatch table against float64, and
both implementations with the numbers of the CPU. Needs CUDA, torch and Triton, and nothing else; benchmarks/gpu.sh runs this."""
import pytest, torch
import torch.nn.functional as F

pytest.importorskip('triton', minversion='3.6')
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits, smooth_cross_entropy
from fastai_smooth.kernels.triton import launch, softmax
from ..cases import every_option, logits
from reference import distance, loss_and_grad

if not torch.cuda.is_available() or launch.INTERPRETED: pytest.skip('no GPU here: benchmarks/gpu.sh runs these', allow_module_level=True)
pytestmark = pytest.mark.filterwarnings('ignore:.*weight')
RUNS = [({}, 'index'), (dict(weight=True), 'index'), (dict(prior=True), 'index'), (dict(spread='others'), 'index'), ({}, 'soft'),
        (dict(multi_hot=True), 'hot'), (dict(reduction='none'), 'index'), ({}, 'sigmoid'), (dict(pos_weight=True), 'sigmoid')]
every_run = pytest.mark.parametrize('options,target', RUNS)

@pytest.fixture(autouse=True)
def free_memory():
    yield
    torch.cuda.empty_cache()

@pytest.fixture(params=[False, True], ids=['late', 'early'])
def early(request, monkeypatch):
    "Is the gradient made in the forward?"
    monkeypatch.setattr(launch, 'EARLY_MB', 0 if request.param else 10**6)

def loss_of(x, target, options, y):
    "Of one of `RUNS`."
    vector = torch.linspace(.5, 1.5, x.shape[1], device=x.device)
    options = {o: vector / vector.sum() if o == 'prior' else vector if v is True and o != 'multi_hot' else v for o, v in options.items()}
    f = smooth_binary_cross_entropy_with_logits if target == 'sigmoid' else smooth_cross_entropy
    return f(x, y, .1, backend='triton', **options)

def with_grad(loss, x): return loss, torch.autograd.grad(loss, x, torch.ones_like(loss))[0]
def run(x, target, options, y): return with_grad(loss_of(x, target, options, y), x)

def inputs(target, n=64, k=100):
    x = torch.randn(n, k, device='cuda').requires_grad_()
    if target == 'index': return x, torch.randint(k, (n,), device='cuda')
    return x, torch.rand(n, k, device='cuda').softmax(1) if target == 'soft' else (torch.rand(n, k, device='cuda') < .1).to(torch.uint8)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('entry', [*range(len(softmax.TILES)), 'images'])
def test_every_entry(entry, early, dtype):
    "Of the dispatch table, with as many classes as it takes and an odd number of them; and images of few and of many."
    most = 0 if entry == 'images' else softmax.TILES[entry][0] or 50000
    for shape in [(2, 3, 9, 16), (2, 150, 9, 16)] if entry == 'images' else [(70, most), (70, most - 3)]:
        x, y = (3 * torch.randn(shape, device='cuda')).to(dtype), torch.randint(shape[1], shape[:1] + shape[2:], device='cuda')
        y.view(-1)[3] = -100
        scale = torch.tensor(1024., device='cuda')   # as a gradient scaler's
        loss, grad = loss_and_grad(smooth_cross_entropy, x, y, grad_output=scale, backend='triton')
        expected, truth = loss_and_grad(F.cross_entropy, x.double(), y, label_smoothing=.1, grad_output=scale)
        assert abs(loss.item() / expected.item() - 1) < 2e-6
        assert (grad.double() - truth).norm() <= {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype] * truth.norm()

@every_option
@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_numbers_of_the_cpu_without_a_wait(early, loss_func, target, options, backend):
    move = lambda v, to: v.to(to) if isinstance(v, torch.Tensor) else v
    x, on_gpu = logits(), {k: move(v, 'cuda') for k, v in options.items()}
    leaf, y = x.cuda().requires_grad_(), target.cuda()
    loss_func(leaf, y, backend=backend, **on_gpu).backward()   # compiles
    torch.cuda.set_sync_debug_mode('error')
    try: loss, grad = with_grad(loss_func(leaf, y, backend=backend, **on_gpu), leaf)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert max(distance(a.cpu(), e) for a, e in zip((loss, grad), loss_and_grad(loss_func, x, target, **options))) < 1e-10

@pytest.mark.parametrize('backend', ['torch', 'triton'])
def test_class_index_out_of_range_is_nan(backend):
    x, y = inputs('index', 4, 5)
    y[:] = torch.tensor([0, 44, -100, 2])
    assert smooth_cross_entropy(x, y, reduction='none', backend=backend).isnan().tolist() == [False, True, False, False]
    assert smooth_cross_entropy(x, y, backend=backend).isnan()

@every_run
def test_deterministic(options, target, early):
    "Bit by bit, also where many programs add up."
    x, y = inputs(target, 30000, 20)
    first = run(x, target, options, y)
    for _ in range(20): assert all(map(torch.equal, run(x, target, options, y), first))

def captured(x, target, options, y):
    "A CUDA graph of a step, with its loss and gradient."
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3): run(x, target, options, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): return graph, *run(x, target, options, y)

@every_run
def test_cuda_graph(options, target):
    "A captured step runs again on new numbers."
    x, y = inputs(target)
    graph, loss, grad = captured(x, target, options, y)
    for _ in range(3):
        with torch.no_grad(): x.normal_()
        graph.replay()
        assert all(map(torch.equal, (loss, grad), run(x, target, options, y)))

@pytest.mark.parametrize('graphs', [False, True])
def test_several_streams(graphs):
    "At once, which must not share a ticket: of steps, or of captured ones."
    sets, streams = [inputs('index', 20000, 50) for _ in range(4)], [torch.cuda.Stream() for _ in range(4)]
    expected, got = [run(x, 'index', {}, y) for x, y in sets], [[] for _ in sets]
    steps = [captured(x, 'index', {}, y) for x, y in sets] if graphs else sets
    torch.cuda.synchronize()
    for _ in range(100):
        for step, stream, out in zip(steps, streams, got):
            with torch.cuda.stream(stream):
                if graphs: step[0].replay()
                else: out.append(run(step[0], 'index', {}, step[1]))
    torch.cuda.synchronize()
    if graphs: got = [[step[1:]] for step in steps]
    for out, e in zip(got, expected):
        for o in out: assert all(map(torch.equal, o, e))

def test_memory(early):
    "The gradient and nothing else of the logits' size; none without grad."
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
    "The last rows, beside the same rows alone."
    if torch.cuda.mem_get_info()[0] < 5 * torch.Size(shape).numel(): pytest.skip('not enough memory')
    x = torch.empty(shape, device='cuda', dtype=torch.bfloat16).normal_().requires_grad_()
    y, tail = torch.randint(shape[1], shape[:1] + shape[2:], device='cuda'), x.detach()[-1:].clone().requires_grad_()
    f = lambda x, y, reduction, backend: smooth_cross_entropy(x, y, reduction=reduction, backend=backend)
    assert distance(f(x, y, 'none', 'triton')[-1:], f(tail, y[-1:], 'none', 'torch')) < 1e-5
    grads = [torch.autograd.grad(loss, leaf)[0][-1:] for loss, leaf in ((f(x, y, 'sum', 'triton'), x), (f(tail, y[-1:], 'sum', 'torch'), tail))]
    assert distance(*grads) < 1e-2

@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_grad_scaler(dtype):
    "Steps as without scaling; a scale that overflows is found."
    for scale, steps in ((2.**10, True), (2.**40, dtype == torch.float32)):
        w = torch.randn(32, 50, device='cuda', requires_grad=True)
        before, scaler, opt = w.detach().clone(), torch.amp.GradScaler('cuda', init_scale=scale), torch.optim.SGD([w], .1)
        x, y = torch.randn(16, 32, device='cuda'), torch.randint(50, (16,), device='cuda')
        with torch.autocast('cuda', torch.float16, enabled=dtype == torch.float16): loss = smooth_cross_entropy(x @ w, y, backend='triton')
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        assert torch.equal(before, w) != steps

@every_run
@pytest.mark.parametrize('mode', [None, 'reduce-overhead'])
def test_compiled(options, target, mode):
    "With CUDA graphs, too: nothing that an op allocates outlives the graph's pool."
    x, y = inputs(target)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: loss_of(x, target, options, y), fullgraph=True, mode=mode)
    for _ in range(4):
        with torch.no_grad(): x.normal_()
        torch.compiler.cudagraph_mark_step_begin()
        assert max(map(distance, with_grad(compiled(x, y), x), run(x, target, options, y))) < 1e-5
