"""With SMOOTH_TEST_BACKEND=triton in the environment, the tests of the torch implementation run on the Triton one: 'auto' means it.

On a machine with a GPU they run there: tensors go to it with their strides, and results come back. Else TRITON_INTERPRET=1 must
be set. What the tests are too small for is made to happen: loss by loss, the kernel takes turns in making the gradient in the
forward or in the backward, and in how it cuts up its work: several blocks a row, several programs."""
import importlib.util, itertools, sys
from functools import wraps

import numpy as np, torch, triton

from fastai_smooth import kernels
from fastai_smooth.kernels import functional
from fastai_smooth.kernels.autograd import tracing
from fastai_smooth.kernels.targets import SoftmaxTarget
from fastai_smooth.kernels.triton import launch, sigmoid, softmax
from fastai_smooth.kernels.triton.softmax import Tile

sys.setrecursionlimit(max(sys.getrecursionlimit(), 5000))
CUDA, GPU = torch.cuda.is_available() and not launch.INTERPRETED, 'cuda'
counts = dict(triton=0, torch=0)
tile_for = softmax.tile_for
turns = itertools.cycle(itertools.product((0, 10**6), (1, 2), (1, 2)))   # EARLY_MB, blocks a row, programs

def select_backend(backend, x, original=functional.select_backend):
    return original('triton' if backend == 'auto' and (x.is_cuda or not CUDA) else backend, x)

def cut(n, parts): return 1 << max(0, -(-n // parts) - 1).bit_length()

def take_turn(x, target):
    """Cuts the work so that there are some programs, and blocks a row: few, since the interpreter takes milliseconds for each.
    On a GPU every other turn goes by the table."""
    launch.EARLY_MB, blocks, programs = next(turns)
    if not isinstance(target, SoftmaxTarget):
        sigmoid.BLOCK = max(16, min(cut(x.numel(), programs), 2**20)) if launch.INTERPRETED else 1024
        return
    k = x.shape[target.axis]
    table, rows = tile_for(k, x.stride(target.axis), x.itemsize), cut(x.numel() // k, programs)
    most = 2**20 if launch.INTERPRETED else 4096   # logits of a tile
    block = min(most, table.block if blocks == 1 else cut(k, blocks))
    tile = Tile(min(rows, most // block), block, 4)
    softmax.tile_for = lambda *_: table if CUDA and blocks == 1 else tile

def counted(owner, name, kind):
    "A function of a module, or a method: its logits and its target are the first arguments, after `self`."
    original = getattr(owner, name)
    def f(*args):
        x, target = args[isinstance(owner, type):][:2]
        if torch.compiler.is_compiling(): softmax.tile_for = tile_for
        elif x.numel():
            counts[kind] += 1
            if kind == 'triton': take_turn(x, target)
        return original(*args)
    setattr(owner, name, f)

class Moved(torch.autograd.Function):
    "A tensor on another device with the strides it had; its gradient comes back, and the gradient of that."
    @staticmethod
    def forward(ctx, x, device):
        ctx.device = x.device
        return strided(x, device)
    @staticmethod
    def backward(ctx, g): return g.to(ctx.device), None   # an op that torch can do for many gradients at once

def strided(x, device):
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    flat = torch.as_strided(x.detach(), (size,), (1,), x.storage_offset())
    return flat.to(device).as_strided(x.shape, x.stride())

def on_gpu(f):
    @wraps(f)
    def run(*args, **kwargs):
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        if tracing(*tensors) or any(v.is_cuda for v in tensors): return f(*args, **kwargs)
        def move(v): return v if not isinstance(v, torch.Tensor) else Moved.apply(v, GPU) if v.requires_grad else strided(v, GPU)
        return f(*map(move, args), **{k: move(v) for k, v in kwargs.items()}).cpu()
    return run

functional.select_backend = select_backend
for module in (functional.softmax, functional.sigmoid): module.pytorch_loss = lambda *args: None   # the short way of 'auto', which is not to be taken
counted(functional.softmax, 'softmax_loss', 'torch')
counted(functional.sigmoid, 'sigmoid_loss', 'torch')
counted(softmax, 'softmax_loss', 'triton')
counted(sigmoid, 'sigmoid_loss', 'triton')
counted(launch.Kernels, 'loss_and_grad', 'triton')
if CUDA:
    for name in ('smooth_cross_entropy', 'smooth_binary_cross_entropy_with_logits'):
        for name in (name, name.replace('smooth_', 'smooth_linear_')): setattr(kernels, name, on_gpu(getattr(kernels, name)))

class Patched:
    """Triton's interpreter patches its language anew for each function that a kernel calls, on top of what it has patched: half of
    the time goes there. Once a launch will do."""
    def __init__(self, patch): self.patch, self.scopes = patch, {}
    def __call__(self, fn):
        langs = frozenset(id(v) for v in fn.__globals__.values() if v in (triton.language, triton.language.core))
        if langs not in self.scopes: self.scopes[langs] = self.patch(fn)
        return self
    def restore(self):
        while self.scopes: self.scopes.popitem()[1].restore()   # the last first

if launch.INTERPRETED:
    from triton.runtime import interpreter
    interpreter._patch_lang = Patched(interpreter._patch_lang)

class InBounds:
    "Every address that a kernel reads or writes has to be in one of its arguments: the interpreter itself would read any memory."
    def __init__(self):
        call, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
        def launch(executor, *args, **kwargs):
            self.ranges = [self.extent(v) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.numel()]
            return call(executor, *args, **kwargs)
        interpreter.GridExecutor.__call__ = launch
        for name in ('create_masked_load', 'create_masked_store'): setattr(builder, name, self.checked(getattr(builder, name), name))

    def extent(self, v):
        return v.data_ptr(), v.data_ptr() + (1 + sum((n - 1) * s for n, s in zip(v.shape, v.stride()))) * v.element_size()

    def checked(self, original, name):
        def access(builder, ptrs, *rest):
            mask = rest[0] if name == 'create_masked_load' else rest[1]
            at = np.asarray(ptrs.data).astype(np.int64)
            at = at[np.broadcast_to(np.asarray(mask.data), at.shape).astype(bool)]
            inside = np.zeros(at.shape, bool)
            for start, end in self.ranges: inside |= (at >= start) & (at < end)
            if not inside.all(): raise IndexError(f'{name} out of bounds at {(~inside).sum()} addresses')
            return original(builder, ptrs, *rest)
        return access

if launch.INTERPRETED: InBounds()

# Tests that say nothing about the Triton implementation
TORCH = set("""test_calls_are_few test_what_is_imported test_which_way test_which_way_without_a_gradient test_what_goes_to_pytorch test_scaled_grad
    test_scaled_grad_in_half_precision test_half_precision_gradient_kept_in_float32 test_a_gradient_is_made_once test_the_reference_is_pytorch
    test_fake_and_meta test_memory_of_chunks test_traced_and_transformed""".split())
if launch.INTERPRETED:   # and those that take it long, of what others show
    TORCH |= set("""test_batched_gradients test_autocast_and_backend test_gradgradcheck_of_soft_targets test_no_grad test_gradgradcheck
        test_gradgradcheck_of_linear test_gradgradcheck_of_images test_gradgradcheck_of_masked_logits test_weights_that_pytorch_takes
        test_modules_take_linear_logits test_half_precision_of_many_classes test_half_precision_of_many_rows test_many_classes_that_are_not_next_to_each_other""".split())
if CUDA:   # where values are not looked at, and errors are nan (test_gpu.py has that)
    TORCH |= {'test_changed_in_place_before_backward', 'test_parts_changed_in_place_before_backward', 'test_says_what_is_wrong', 'test_autocast'} | ({'test_tensor_base'} if importlib.util.find_spec('fastai') is None else set())

def leave_out(items): items[:] = [item for item in items if item.originalname not in TORCH]

def report(): return f"losses computed by Triton: {counts['triton']}, by torch: {counts['torch']}"
