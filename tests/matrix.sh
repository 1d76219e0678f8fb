#!/usr/bin/env bash
# The suite with the oldest versions that pyproject.toml allows, with the newest there are, and against the wheel alone:
#     tests/matrix.sh [oldest] [newest] [wheel]      (all three when none is named)
# Each leg runs in a venv of its own (some 6 GB) and writes its line of tests/matrix.md. Run by hand: a leg takes as long
# as the suite, and downloads torch. The Pythons come from PATH: the oldest and the newest that pyproject.toml promises, or
# PYTHON=python3.12. VENVS=FOLDER keeps the venvs there; else they are removed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
venvs=${VENVS:-$tmp}
export MPLBACKEND=Agg OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH PYTEST_ADDOPTS # the line stands for the whole suite

promised() { grep -oE 'Python :: 3\.[0-9]+' pyproject.toml | sed 's/.*:: /python/'; }
# Of all that is required or is in [dev], but nbdev, whose versions write the modules in different ways
lower_bounds() { grep -oE '"[a-z-]+>=[0-9.]+"' pyproject.toml | grep -vE 'nbdev|setuptools' | tr -d '"' | sed 's/>=/==/'; }

new_venv() { # LEG PYTHON: its python is $python from here on
    "$2" -m venv "$venvs/$1"
    python=$venvs/$1/bin/python
}

suite() { # LEG FOLDER: the tests of the checkout, or of a copy; their line in matrix.md
    echo "== $1: $("$python" --version)"
    (cd "$2" && "$python" -m pytest -q -n 2 -p no:cacheprovider --junitxml="$tmp/$1.xml") || failed+=" $1"
    "$python" - "$1" "$tmp/$1.xml" "$root/tests/matrix.md" <<'END'
import sys, xml.etree.ElementTree as ET
from datetime import date
from importlib.metadata import version
from pathlib import Path

leg, xml, record = sys.argv[1], ET.parse(sys.argv[2]).getroot()[0], Path(sys.argv[3])
packages = 'torch', 'torchvision', 'fastai', 'numpy', 'hypothesis', 'pytest'
tests, bad, skipped = int(xml.get('tests')), int(xml.get('failures')) + int(xml.get('errors')), int(xml.get('skipped'))
start = [leg, '.'.join(map(str, sys.version_info[:3]))]
row = start + [version(p) for p in packages] + [tests - bad - skipped, bad, skipped, round(float(xml.get('time'))), date.today()]
head = ['leg', 'Python', *packages, 'passed', 'failed', 'skipped', 'seconds', 'date']

line = lambda cells: f"| {' | '.join(map(str, cells))} |"
old = [l for l in record.read_text().splitlines()[4:] if not l.startswith(line(start)[:-1])] if record.exists() else []
record.write_text('\n'.join(['Written by `tests/matrix.sh`: what it says there was run, and how it ended.', '', line(head), '|---'*len(head) + '|',
                             *sorted([*old, line(row)])]) + '\n')
print(line(head), line(row), sep='\n')
END
}

oldest() {
    new_venv oldest "${PYTHON:-$(promised | head -1)}"
    mapfile -t bounds < <(lower_bounds)
    "$python" -m pip install -q "${bounds[@]}" -e .
    suite oldest .
}

newest() {
    new_venv newest "${PYTHON:-$(promised | tail -1)}"
    "$python" -m pip install -q --upgrade --upgrade-strategy eager -e '.[dev]'
    suite newest .
}

wheel() { # built from a copy, so that nothing is left in the checkout; away from it there are the tests and pytest's options
    new_venv wheel "${PYTHON:-$(promised | tail -1)}"
    mkdir "$tmp/source" "$tmp/away"
    cp -r pyproject.toml README.md LICENSE fastai_smooth "$tmp/source"
    cp -r pyproject.toml tests "$tmp/away"
    "$python" -m pip wheel -q --no-deps -w "$tmp/dist" "$tmp/source"
    rm -r "$tmp/source"
    "$python" -m pip install -q "$tmp"/dist/*.whl pytest pytest-xdist hypothesis
    "$python" -m pip install -q --force-reinstall --no-deps "$tmp"/dist/*.whl # a kept venv has one of the same version
    (cd "$tmp/away" && "$python" -c "
import fastai_smooth, sysconfig
print('tested is', fastai_smooth.__file__)
assert fastai_smooth.__file__.startswith(sysconfig.get_path('purelib')), 'not the installed one'")
    suite wheel "$tmp/away"
}

failed=
[ $# != 0 ] || set -- oldest newest wheel
for leg; do
    case $leg in
        oldest|newest|wheel) "$leg";;
        *) sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2;;
    esac
done
if [ -n "$failed" ]; then echo "failed:$failed" >&2; exit 1; fi
