"""Compiles Triton kernels for GPUs that are not here, as the launches of this package call them, and reads what comes out.

A launch is recorded with its arguments rather than made: so a test looks at the very code that would run.

How long the Python around launches takes: `python -m kernels.triton.offline`, in tests/."""
import re, subprocess, tempfile, time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction, mangle_type

CUOBJDUMP = Path(triton.__file__).parent/'backends/nvidia/bin/cuobjdump'


class Launch(NamedTuple):
    kernel: JITFunction
    args: dict      # by name
    options: dict   # num_warps

    def source(self):
        "What Triton compiles for these arguments: as in a launch, pointers are known to be aligned if they are; None and constexprs are part of the code."
        signature, constants, attrs = {}, {}, {}
        for i, p in enumerate(self.kernel.params):
            v = self.args[p.name]
            if p.is_constexpr or v is None: signature[p.name], constants[(i,)] = 'constexpr', v
            elif isinstance(v, torch.Tensor):
                signature[p.name] = mangle_type(v)
                if v.data_ptr() % 16 == 0: attrs[(i,)] = [['tt.divisibility', 16]]
            else: signature[p.name] = p.annotation_type or ('i32' if abs(v) < 2**31 else 'i64')
            assert isinstance(v, torch.Tensor) or p.is_constexpr or v is None or p.do_not_specialize, f'{p.name}={v} would be compiled in'
        return ASTSource(self.kernel, signature, constants, attrs)

    def key(self):
        "What a compilation is kept by."
        s = self.source()
        return self.kernel.__name__, tuple(s.signature.items()), tuple(s.constants.items()), str(s.attrs), tuple(self.options.items())

    def compile(self, capability=90): return triton.compile(self.source(), target=GPUTarget('cuda', capability, 32), options=self.options)


@contextmanager
def recorded():
    "The launches that are asked for inside, none of which is made."
    launches = []
    def record(self, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in ('num_warps', 'num_stages') if k in kwargs}
        launches.append(Launch(self, dict(zip(self.arg_names, args)) | kwargs, options))
    with patch.object(JITFunction, 'run', record): yield launches


class NoGPU:
    "What a launch asks of Triton's driver before the code is loaded."
    def get_current_device(self): return -1   # whose kernels no GPU shares
    def get_current_stream(self, device=0): return 0
    def get_current_target(self): return GPUTarget('cuda', 90, 32)


@contextmanager
def compiled_only():
    "Launches do all that they do on a GPU but load and run: arguments are bound, and what was compiled before is looked up and checked."
    compiled, run = [], JITFunction.run
    def compile_only(self, *args, grid, warmup, **kwargs): compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
    with patch.object(triton.runtime.driver, '_active', NoGPU()), patch.object(JITFunction, 'run', compile_only): yield compiled


@contextmanager
def not_made():
    """Launches do all that they do on a GPU up to the call into C, which is left out: nothing is loaded, nothing runs.

    Tensors of the CPU stand for those of a GPU, whose values stay what they happen to be."""
    from fastai_smooth.kernels import triton as heads
    def init(kernel): kernel.module, kernel.function, kernel._run = 0, 0, lambda *args: None
    with patch.object(triton.runtime.driver, '_active', NoGPU()), patch.object(CompiledKernel, '_init_handles', init), \
         patch.object(heads, 'runs_on', lambda x: True): yield


def quickest(f, n=3000):
    "Microseconds of a call: the lower quartile, which others on the machine disturb little."
    ts = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        ts.append(time.perf_counter() - start)
    return 1e6 * sorted(ts)[n // 4]


class Nothing(torch.autograd.Function):
    "What autograd takes by itself."
    @staticmethod
    def forward(ctx, x, loss, grad):
        ctx.save_for_backward(x, grad)
        return loss
    @staticmethod
    def backward(ctx, grad_output): return ctx.saved_tensors[1], None, None


def host_times(shape):
    "head -> microseconds of a forward and backward: all, and of them those of Triton (less C), of autograd and of this package."
    from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits, smooth_cross_entropy
    x, y = torch.randn(shape, requires_grad=True), torch.randint(shape[1], shape[:1])
    loss, grad, labels, res = torch.zeros(()), torch.zeros(shape), torch.zeros(shape), {}
    autograd = quickest(lambda: torch.autograd.grad(Nothing.apply(x, loss, grad), x))
    for name, f in dict(softmax=lambda: smooth_cross_entropy(x, y, backend='triton'),
                        sigmoid=lambda: smooth_binary_cross_entropy_with_logits(x, labels, backend='triton')).items():
        step = lambda: torch.autograd.grad(f(), x)
        with not_made():
            everything = quickest(step)
            with patch.object(JITFunction, 'run', lambda *args, **kwargs: None): python = quickest(step)
        res[name] = dict(all=everything, triton=everything - python, autograd=autograd, ours=python - autograd)
    return res


class Code(NamedTuple):
    "What a compiled kernel is made of."
    registers: int
    spills: int        # instructions that read or write local memory
    loads: dict        # of global memory: bits -> instructions
    stores: dict
    sass: str


def code(compiled) -> Code:
    with tempfile.TemporaryDirectory() as tmp:
        cubin = Path(tmp)/'kernel.cubin'
        cubin.write_bytes(compiled.asm['cubin'])
        run = lambda flag: subprocess.run([CUOBJDUMP, flag, cubin], capture_output=True, text=True, check=True).stdout
        sass, usage = run('-sass'), run('-res-usage')
    def widths(op):
        res = {}
        for mods in re.findall(rf'\b{op}((?:\.\w+)*)', sass):
            bits = next((int(b) for b in re.findall(r'\.[US]?(8|16|64|128)\b', mods)), 32)
            res[bits] = res.get(bits, 0) + 1
        return res
    return Code(int(re.search(r'REG:(\d+)', usage)[1]), len(re.findall(r'\b(?:STL|LDL)\b', sass)), widths('LDG'), widths('STG'), sass)


if __name__ == '__main__':
    torch.set_num_threads(1)
    for shape in ((64, 10), (8, 1000)):  # few, since what torch is asked to do it does on the CPU
        for head, times in host_times(shape).items():
            print(shape, head, ', '.join(f'{name} {us:.1f}' for name, us in times.items()), 'us')
