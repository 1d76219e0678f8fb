#!/usr/bin/env bash
# The suite with the oldest versions that pyproject.toml allows, with the newest there are, and against the wheel alone:
#     tests/matrix.sh [oldest] [newest] [wheel]      (all three when none is named)
# Each leg runs in a venv of its own (some 6 GB, in VENVS if that is set), with the oldest or newest Python of pyproject.toml, or PYTHON,
# and writes its line of tests/matrix.md. Run by hand: a leg takes as long as the suite, and downloads torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD tmp=$(mktemp -d) failed=
trap 'rm -rf "$tmp"' EXIT
export MPLBACKEND=Agg OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH PYTEST_ADDOPTS # the line stands for the whole suite
mapfile -t pythons < <(grep -oE 'Python :: 3\.[0-9]+' pyproject.toml | sed 's/.*:: /python/')
# lower bounds of all that is required or is in [dev], but nbdev, whose versions write the modules in different ways
mapfile -t bounds < <(grep -oE '"[a-z-]+>=[0-9.]+"' pyproject.toml | grep -vE 'nbdev|setuptools' | tr -d '"' | sed 's/>=/==/')

record() { # LEG: its line of matrix.md, from what pytest wrote
    "$python" - "$1" "$tmp/$1.xml" "$root/tests/matrix.md" <<'END'
import sys, time, xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path
leg, path = sys.argv[1], Path(sys.argv[3])
xml = ET.parse(sys.argv[2]).getroot()[0].attrib
bad = int(xml['failures']) + int(xml['errors'])
row = [leg, sys.version.split()[0], *map(version, 'torch torchvision fastai numpy hypothesis pytest'.split()), int(xml['tests']) - bad - int(xml['skipped']), bad,
       xml['skipped'], round(float(xml['time'])), time.strftime('%Y-%m-%d')]
head, rows = (lines := path.read_text().splitlines())[:4], [o for o in lines[4:] if not o.startswith(f'| {leg} | {row[1]} |')]
path.write_text('\n'.join([*head, *sorted([*rows, f"| {' | '.join(map(str, row))} |"])]) + '\n')
END
}

[ $# != 0 ] || set -- oldest newest wheel
for leg; do
    case $leg in oldest) python=${pythons[0]};; newest|wheel) python=${pythons[-1]};; *) sed -n '2,5s/^# //p' "$0" >&2; exit 2;; esac
    "${PYTHON:-$python}" -m venv "${VENVS:-$tmp}/$leg"
    python=${VENVS:-$tmp}/$leg/bin/python folder=.
    case $leg in
        oldest) "$python" -m pip install -q "${bounds[@]}" -e .;;
        newest) "$python" -m pip install -q --upgrade --upgrade-strategy eager -e '.[dev]';;
        wheel) # built from a copy, so that nothing is left in the checkout; tested where there are the tests and pytest's options alone
            mkdir "$tmp/source" "$tmp/away"
            cp -r pyproject.toml README.md LICENSE fastai_smooth "$tmp/source" && cp -r pyproject.toml tests "$tmp/away"
            "$python" -m pip wheel -q --no-deps -w "$tmp/dist" "$tmp/source"
            "$python" -m pip install -q --force-reinstall --no-deps "$tmp"/dist/*.whl && "$python" -m pip install -q "$tmp"/dist/*.whl pytest pytest-xdist hypothesis
            folder=$tmp/away;;
    esac
    (cd "$folder" && "$python" -m pytest -q -n 2 -p no:cacheprovider --junitxml="$tmp/$leg.xml") || failed+=" $leg"
    record "$leg"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
