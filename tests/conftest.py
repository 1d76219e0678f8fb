import os, sys

if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')   # as many processes as cores: more threads crawl
import pytest, torch

FUSED = os.environ.get('SMOOTH_TEST_BACKEND') == 'triton'
if FUSED:
    sys.path.insert(0, os.path.dirname(__file__))
    import on_triton   # before any test module takes the functions by name


@pytest.fixture(autouse=True)
def seeded():
    "The same random numbers for a test wherever it runs in the order"
    torch.manual_seed(0)


if FUSED:
    def pytest_collection_modifyitems(items): on_triton.leave_out(items)
    def pytest_terminal_summary(terminalreporter): terminalreporter.write_line(on_triton.report())
