#!/usr/bin/env bash
# The fast suite, or with --all every case (tests/covering.py says which is which); other arguments go
# to pytest: scripts/test.sh [--all] [-k NAME] [tests/FILE] ...
set -euo pipefail
[[ " $* " != *" --help "* ]] || exec sed -n '2,/^[^#]/s/^# //p' "$0"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
which=(-m "not thorough")
if [[ ${1:-} == --all ]]; then
    which=()
    shift
fi
bash scripts/env.sh dev
# A file more at a time than there are cores: the ranks of a test wait for each other a good part of theirs.
exec .venv/bin/python -m pytest -n 3 --dist loadfile "${which[@]}" "$@"
