"""The torch implementation's tests on the Triton one, run by Triton's interpreter: in processes of their own, since it has to be asked for
before Triton is imported (on_triton.py)."""
import os, re, subprocess, sys
from pathlib import Path

import pytest, torch

pytest.importorskip('triton', minversion='3.6')
from fastai_smooth.kernels import smooth_binary_cross_entropy_with_logits as smooth_bce, smooth_cross_entropy

TESTS = Path(__file__).parents[2]

PARITY = ('kernels/test_autograd.py kernels/test_compile.py kernels/triton/test_kernels.py', 'kernels/test_parity.py', 'kernels/test_softmax.py',
          'kernels/test_sigmoid.py', 'kernels/test_functional.py test_losses.py')


@pytest.mark.slow
@pytest.mark.parametrize('files', PARITY)
def test_parity_suite_interpreted(files):
    "every test of the torch implementation that says something about a kernel, on the Triton one; hardly anything falls back"
    env = os.environ | dict(TRITON_INTERPRET='1', SMOOTH_TEST_BACKEND='triton', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    options = ['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-W', 'ignore::RuntimeWarning']
    ended = subprocess.run([sys.executable, '-m', 'pytest', *options, *files.split()], cwd=TESTS, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    by_triton, by_torch = map(int, re.search(r'losses computed by Triton: (\d+), by torch: (\d+)', ended.stdout).groups())
    assert by_triton > 300 and by_torch < .15 * by_triton, ended.stdout[-500:]


# ---------------------------------------------------------------- asked for by name

def test_on_a_cpu_by_name():
    for f, y in ((smooth_cross_entropy, torch.tensor([0, 1])), (smooth_bce, torch.ones(2, 3))):
        with pytest.raises(ValueError, match="backend='triton' is for logits on a GPU, these are on cpu"): f(torch.zeros(2, 3), y, backend='triton')


@pytest.mark.parametrize('how', ['import', 'loss', 'module'])
def test_without_triton(how):
    "everything works; asked for by name, it is said what is missing"
    use = dict(loss="smooth_cross_entropy(x, y, backend='triton')", module="__import__('fastai_smooth.losses').losses.LabelSmoothingCrossEntropyFlat(backend='triton')").get(how, 'None')
    run = ("import sys; sys.modules['triton'] = None\nimport torch\nfrom fastai_smooth.kernels import smooth_cross_entropy\n"
           "x, y = torch.zeros(2, 3), torch.tensor([0, 1])\nsmooth_cross_entropy(x, y)\n"
           f"try: {use}\nexcept ImportError as e: print(e)")
    ended = subprocess.run([sys.executable, '-W', 'ignore', '-c', run], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if how != 'import': assert "backend='triton' needs the package triton" in ended.stdout and "backend='auto'" in ended.stdout
