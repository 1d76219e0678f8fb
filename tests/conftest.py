import os, sys

if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')   # as many processes as cores: more threads crawl
import pytest, torch

ON_TRITON = os.environ.get('SMOOTH_TEST_BACKEND') == 'triton'
if ON_TRITON:
    sys.path.insert(0, os.path.dirname(__file__))
    from kernels.triton import on_triton   # before any test module takes the functions by name


@pytest.fixture(autouse=True)
def seeded():
    "The same random numbers for a test wherever it runs in the order"
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)   # pytest-xdist may be missing
def pytest_xdist_make_scheduler(config, log):
    "A process with nothing left to do takes tests from the other, not all of whose are short: --dist worksteal in place of load, the default of -n"
    from xdist.scheduler import WorkStealingScheduling
    return WorkStealingScheduling(config, log) if config.getoption('dist') == 'load' else None


def pytest_collection_modifyitems(items):
    if ON_TRITON: on_triton.leave_out(items)
    items.sort(key=lambda o: o.get_closest_marker('slow') is None)   # those first: in the end there are short ones to share out


if ON_TRITON:
    def pytest_terminal_summary(terminalreporter): terminalreporter.write_line(on_triton.report())
