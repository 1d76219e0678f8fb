"""The Triton kernels where there is no GPU: run by Triton's interpreter, and compiled for GPUs that are elsewhere.

The interpreter has to be asked for before Triton is imported, so the torch implementation's tests run again in processes of
their own (on_triton.py), two at a time. In this process kernels are compiled, but never launched."""
from itertools import product
import json, os, re, subprocess, sys
from pathlib import Path

import pytest, torch

triton = pytest.importorskip('triton')
from fastai_smooth.kernels import fused, fused_sigmoid, fused_softmax, smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy
from fastai_smooth.kernels.formula import Job
from fastai_smooth.kernels.sigmoid import Labels
from fastai_smooth.kernels.targets import Smoothing
from offline import code, recorded

HERE = Path(__file__).parent
needs_ptxas = pytest.mark.skipif(sys.platform != 'linux', reason='Triton compiles on Linux')


# ---------------------------------------------------------------- the torch implementation's tests, interpreted

PARITY = {'features': ['test_torch_features.py'], 'numbers': ['test_parity.py', 'test_softmax.py', 'test_sigmoid.py', 'test_paths.py']}


@pytest.fixture(scope='module')
def interpreted():
    "The processes, started together; each has one thread, since more threads than cores crawl"
    env = os.environ | dict(TRITON_INTERPRET='1', SMOOTH_TEST_BACKEND='triton', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    started = {name: subprocess.Popen([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'ignore::RuntimeWarning', *files],
                                      cwd=HERE, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for name, files in PARITY.items()}
    yield started
    for p in started.values(): p.kill()


@pytest.mark.slow
@pytest.mark.parametrize('name', PARITY)
def test_parity_suite_interpreted(interpreted, name):
    "every test of the torch implementation that says something about a kernel, on the Triton one; hardly anything falls back"
    out, _ = interpreted[name].communicate(timeout=540)
    assert interpreted[name].returncode == 0, out[-8000:]
    by_triton, by_torch = map(int, re.search(r'losses computed by Triton: (\d+), by torch: (\d+)', out).groups())
    assert by_triton > 2000 and by_torch < .15 * by_triton, out[-500:]
