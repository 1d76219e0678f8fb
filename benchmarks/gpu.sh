#!/usr/bin/env bash
# Everything that needs a GPU, with torch, Triton, pytest and hypothesis, but no fastai. Stages, by number or name (default: all):
#
#   bash benchmarks/gpu.sh 3 4
#
#   1 check        every kernel beside float64, on a few rows; where one is wrong nothing else runs    50 s
#   2 tests        those that need a GPU, and the torch implementation's on the Triton one             225 s
#   3 table        times beside eager, torch.compile and Liger-Kernel, then every option               2 to 3 min
#   4 choose       what decides the dispatch table                                                     2 min
#   5 train        the head of a language model, and trainings                                         45 s
#   6 sanitizers   memcheck and racecheck of compute-sanitizer                                         1 to 2 min
#   7 linear       the loss of a linear layer's logits some rows at a time, in float32                 1 min
#
# Leaves a JSON file and a log of each in $OUT (default: benchmarks/gpu-results), row by row. A step that fails or takes too long is
# said to at the end, and keeps no other from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-benchmarks/gpu-results}
mkdir -p "$out" && out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET
[ $# = 0 ] && set -- 1 2 3 4 5 6 7
for stage in "$@"; do
    case $stage in
        [1-7] | check | tests | table | choose | train | sanitizers | linear) ;;
        *) echo "gpu.sh: there is no stage $stage" >&2; exit 2 ;;
    esac
done
results=() failed=0
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo 'gpu.sh: torch finds no GPU here' >&2; exit 2; }

step() { # name, seconds, lines to print at most, command...
    local name=$1 most=$2 lines=$3 start=$SECONDS; shift 3
    printf '\n== %s\n' "$name"
    timeout -k 5 "$most" "$@" > "$out/$name.log" 2>&1
    local rc=$?
    grep -v -e Warning -e ' PASSED ' -e '^tests/.*::.* $' "$out/$name.log" | tail -n "$lines" | cut -c 1-200
    results+=("$(printf '%-24s %4d s  %s' "$name" $((SECONDS - start)) "$([ "$rc" = 0 ] && echo passed || echo "FAILED ($rc)")")")
    [ "$rc" = 0 ] || failed=1
    return "$rc"
}

bench() { step "$1" "$2" "$3" python3 "benchmarks/gpu_$1.py" "$out/$1.json" "${@:4}"; }
finish() { printf '%s\n' '' "== gpu.sh: $SECONDS s" "${results[@]}" | tee -a "$out/steps.txt"; exit "$failed"; }

pytests() { # name, seconds, files...: what a run that is cut short has done, and why a test failed, is in the log as each test ends
    local name=$1 most=$2 parallel; shift 2
    parallel=$(python3 -c 'import importlib.util as u, os; print(f"-n {min(14, os.cpu_count())}" if u.find_spec("xdist") else "")')
    cat > "$out/tell_at_once.py" <<'EOF'
def pytest_configure(config): global plugins; plugins = config.pluginmanager
def pytest_runtest_logreport(report):
    terminal = plugins.get_plugin('terminalreporter')
    if report.failed and terminal: terminal.write_line('\n' + report.longreprtext[-1500:])
EOF
    # $parallel is to be split
    PYTHONPATH="$out:$PYTHONPATH" step "$name" "$most" 40 \
        python3 -m pytest -v --tb=short -p no:cacheprovider -p tell_at_once $parallel -W ignore "$@"
    echo "$name: $(grep -c ' PASSED ' "$out/$name.log") passed, $(grep -c ' FAILED ' "$out/$name.log") failed"
}

tests() { # fewer settings than on a CPU: each is compiled
    pytests gpu-tests 75 tests/kernels/triton/test_{gpu,launch,softmax,sigmoid}.py
    SMOOTH_TEST_BACKEND=triton SMOOTH_TEST_SETTINGS=40 pytests kernel-tests 150 \
        tests/kernels/test_{softmax,sigmoid,autograd,compile,functional,linear}.py
}

sanitizers() {
    local sanitizer tool
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
    [ -n "$sanitizer" ] || { results+=('sanitizers               not installed'); return; }
    step tiny 40 5 python3 benchmarks/gpu_check.py - tiny   # compiles, so that the sanitizer looks at kernels alone
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer-$tool" 45 15 \
            "$sanitizer" --tool $tool --error-exitcode 9 python3 benchmarks/gpu_check.py - tiny
    done
}

for stage in "$@"; do
    case $stage in
        1 | check) bench check 60 60 || { echo 'the kernels are wrong, or were not checked: nothing else is run'; finish; } ;;
        2 | tests) tests ;;
        3 | table) bench table 180 90 ;;
        4 | choose) bench choose 120 115 ;;
        5 | train) bench train 60 20 ;;
        6 | sanitizers) sanitizers ;;
        7 | linear) step linear 90 30 python3 benchmarks/linear.py "$out/linear.json" --seconds .5 ;;
    esac
done
finish
