"""Compiles Triton kernels for GPUs that are not here, as the launches of this package call them, and reads what comes out.

A launch is recorded with its arguments rather than made: so a test looks at the very code that would run."""
import re, subprocess, tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
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

def code(compiled):
    "Of compiled code: how many instructions read or write local memory (spills), and how many load and store 128 bits of global memory."
    with tempfile.NamedTemporaryFile(suffix='.cubin') as cubin:
        cubin.write(compiled.asm['cubin']), cubin.flush()
        sass = subprocess.run([CUOBJDUMP, '-sass', cubin.name], capture_output=True, text=True, check=True).stdout
    count = lambda pattern: len(re.findall(pattern, sass))
    return [count(r'\b(?:STL|LDL)\b'), *(count(rf'\b{op}(?:\.\w+)*\.[US]?128\b') for op in ('LDG', 'STG'))]
