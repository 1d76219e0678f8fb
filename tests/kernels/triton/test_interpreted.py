"""The torch implementation's tests on the Triton one, run by Triton's interpreter: in processes of their own, since it has to be asked for
before Triton is imported (on_triton.py)."""
import os, re, subprocess, sys
from pathlib import Path

import pytest, torch

pytest.importorskip('triton', minversion='3.6')
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy

TESTS = Path(__file__).parents[2]

@pytest.mark.slow
@pytest.mark.parametrize('files', ['kernels/test_softmax.py kernels/test_sigmoid.py', pytest.param('kernels/test_autograd.py kernels/test_functional.py', marks=pytest.mark.long),
                                   pytest.param('kernels/test_linear.py', marks=pytest.mark.long),
                                   'kernels/triton/test_launch.py kernels/triton/test_softmax.py kernels/triton/test_sigmoid.py'])
def test_on_triton(files):
    "Every test of the torch implementation that says something about a kernel, on the Triton one; hardly anything falls back."
    env = os.environ | dict(TRITON_INTERPRET='1', SMOOTH_TEST_BACKEND='triton', SMOOTH_TEST_SETTINGS='40', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    options = ['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-W', 'ignore::RuntimeWarning']
    ended = subprocess.run([sys.executable, '-m', 'pytest', *options, *files.split()], cwd=TESTS, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    by_triton, by_torch = map(int, re.search(r'losses computed by Triton: (\d+), by torch: (\d+)', ended.stdout).groups())
    assert by_triton > 100 and (by_torch < .15 * by_triton or 'test_softmax.py kernels/test_sigmoid' not in files), ended.stdout[-500:]   # the others ask for torch, too

# ---------------------------------------------------------------- asked for by name

def test_on_a_cpu_by_name():
    for f, y in ((smooth_cross_entropy, torch.tensor([0, 1])), (smooth_bce, torch.ones(2, 3))):
        with pytest.raises(ValueError, match="backend='triton' is for logits on a GPU, these are on cpu"): f(torch.zeros(2, 3), y, backend='triton')

def test_without_triton():
    "Everything works; asked for by name, it is said what is missing."
    code = """if True:
        import sys
        sys.modules['triton'] = None
        import torch
        from fastai_smooth.kernels import smooth_cross_entropy
        from fastai_smooth.losses import LabelSmoothingCrossEntropyFlat
        x, y = torch.zeros(2, 3), torch.tensor([0, 1])
        smooth_cross_entropy(x, y), LabelSmoothingCrossEntropyFlat()(x, y)
        for f in (lambda: smooth_cross_entropy(x, y, backend='triton'), lambda: LabelSmoothingCrossEntropyFlat(backend='triton')):
            try: f()
            except ImportError as e: print(e)"""
    ended = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("backend='triton' needs the package triton") == ended.stdout.count("backend='auto'") == 2
