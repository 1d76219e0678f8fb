"What numbers were measured on, and with; it needs torch alone."
import os, platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import torch


def _version(name):
    try: return version(name)
    except PackageNotFoundError: return None

def _cpu():
    if not os.path.exists('/proc/cpuinfo'): return platform.processor() or platform.machine()
    with open('/proc/cpuinfo') as f: return next((l.split(':')[1].strip() for l in f if l.startswith('model name')), platform.machine())

def machine(device):
    "`device` is 'cpu' or 'cuda'"
    kept = [f'{k}={os.environ[k]}' for k in ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'LD_PRELOAD') if os.environ.get(k)]
    return dict(date=str(date.today()), cpu=_cpu(), cores=os.cpu_count(), threads=torch.get_num_threads(), simd=torch.backends.cpu.get_cpu_capability(),
                malloc=' '.join(kept) or "the system's own", gpu=torch.cuda.get_device_name() if device == 'cuda' else None,
                python=platform.python_version(), **{k: _version(k) for k in ('torch', 'triton', 'fastai', 'timm', 'liger_kernel', 'fastai_smooth')})
