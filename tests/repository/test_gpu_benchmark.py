"benchmarks/gpu.sh and what its stages share, as far as that needs no GPU: a run there is short, and must say what it did."
import json, os, subprocess, sys
from pathlib import Path
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2]/'benchmarks'
if not BENCHMARKS.exists(): pytest.skip('needs the checkout', allow_module_level=True)

@pytest.mark.parametrize('stages,said', [(('3', '8'), 'there is no stage 8'), (('tests', ''), 'there is no stage'), (('3', 'check'), 'torch finds no GPU here')])
def test_what_cannot_run_is_said_before_anything_does(stages, said, tmp_path):
    env = os.environ | dict(OUT=str(tmp_path), CUDA_VISIBLE_DEVICES='', PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    ended = subprocess.run(['bash', BENCHMARKS/'gpu.sh', *stages], env=env, capture_output=True, text=True)
    assert ended.returncode == 2 and said in ended.stderr and not ended.stdout and not any(tmp_path.iterdir())

def test_rows_are_there_before_the_first_and_tell_what_failed(tmp_path):
    pytest.importorskip('triton', minversion='3.6')
    code = """if True:
        import sys, gpu_common
        gpu_common.machine = lambda device: 'here'
        gpu_common.free = lambda: None
        rows = gpu_common.Rows(sys.argv[1])
        print(rows.path.read_text())
        rows.run('well', lambda: dict(ms=1.))
        assert not rows.failed()
        rows.run('badly', lambda: 1 / 0)
        assert rows.failed()"""
    ended = subprocess.run([sys.executable, '-c', code, tmp_path/'rows.json'], capture_output=True, text=True,
                           env=os.environ | dict(PYTHONPATH=f'{BENCHMARKS}:{BENCHMARKS.parent}'))
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout[:ended.stdout.index('badly')]) == dict(machine='here', rows=[])
    rows = json.loads((tmp_path/'rows.json').read_text())['rows']
    assert [r['name'] for r in rows] == ['well', 'badly'] and rows[1]['error'].startswith('ZeroDivisionError')
