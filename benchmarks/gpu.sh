#!/usr/bin/env bash
# Everything that needs a GPU, in one command under nine minutes, with torch, Triton, pytest and hypothesis, but no fastai:
#
#   bash benchmarks/gpu.sh [FOLDER]
#
# The torch implementation's tests on the Triton one; those that need a GPU; compute-sanitizer; the benchmark beside eager, torch.compile and Liger-Kernel
# (where it is installed); and what decides the dispatch table. Leaves gpu.json, with all numbers, and the logs
# in FOLDER (default: benchmarks/). A step that fails or takes too long is said to at the end, and keeps no other from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(mkdir -p "${1:-benchmarks}" && cd "${1:-benchmarks}" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET
results=()
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo 'gpu.sh: torch finds no GPU here' >&2; exit 2; }

step() { # name, seconds, command...
    local name=$1 most=$2 start=$SECONDS; shift 2
    printf '\n== %s\n' "$name"
    timeout "$most" "$@" 2>&1 | tee "$out/gpu-${name// /-}.log" | tail -n 40
    local rc=${PIPESTATUS[0]}
    results+=("$(printf '%-24s %4d s  %s' "$name" $((SECONDS - start)) "$([ "$rc" = 0 ] && echo passed || echo "FAILED ($rc)")")")
}

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
parallel=$(python3 -c 'import importlib.util as u, os; print(f"-n {min(12, os.cpu_count())}" if u.find_spec("xdist") else "")')

# fewer settings than on a CPU: each is compiled. $parallel is to be split.
SMOOTH_TEST_BACKEND=triton SMOOTH_TEST_SETTINGS=40 step "kernel tests" 150 python3 -m pytest -q -p no:cacheprovider $parallel -W ignore \
    tests/kernels/test_softmax.py tests/kernels/test_sigmoid.py tests/kernels/test_parity.py tests/kernels/test_autograd.py tests/kernels/test_compile.py tests/kernels/test_functional.py
step "gpu tests" 80 python3 -m pytest -q -p no:cacheprovider ${parallel:+-n 6} -W ignore tests/kernels/triton/test_gpu.py tests/kernels/triton/test_kernels.py
if [ -n "$sanitizer" ]; then
    timeout 30 python3 benchmarks/gpu.py check > /dev/null 2>&1 # compiles, so that the sanitizer looks at kernels alone
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer $tool" 35 "$sanitizer" --tool $tool --error-exitcode 9 python3 benchmarks/gpu.py check
    done
else results+=("sanitizer                       not installed"); fi
bench() { step "$1" "$2" python3 -m fastai_smooth bench --device cuda --backend triton --seconds .5 --json "$out/${1// /-}.json" "${@:3}"; }
bench "gpu float32" 80 --dtypes float32 --shapes 64x10 512x1000 32768x1000 4096x16384 256x21843 4096x32000 2048x128256 8x21x512x512 sigmoid:4096x10000
bench "gpu bfloat16" 30 --dtypes bfloat16 --shapes 8192x4096 4096x32000 sigmoid:4096x10000
step "questions" 95 python3 benchmarks/gpu.py measure "$out/gpu-questions.json"

printf '\n%s\n' "== gpu.sh: $SECONDS s" "${results[@]}"
python3 - "$out" "${results[@]}" << 'EOF'
import json, sys
from pathlib import Path
out, *steps = sys.argv[1:]
parts = {name: Path(out)/f'gpu-{name}.json' for name in ('float32', 'bfloat16', 'questions')}
read = {k: json.loads(f.read_text() or 'null') for k, f in parts.items() if f.exists()}
(Path(out)/'gpu.json').write_text(json.dumps(dict(steps=steps, **read), indent=1))
for f in parts.values(): f.unlink(missing_ok=True)
EOF
[[ ${results[*]} != *FAILED* ]]
