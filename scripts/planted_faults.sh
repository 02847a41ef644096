#!/usr/bin/env bash
# Plants faults in a copy of the code, one by one, and runs the tests that should see each:
# scripts/planted_faults.sh [--clean] [--jobs N] [NAME] ...
# Names are parts of those in planted_faults.yaml; --clean runs the tests without a fault first.
set -euo pipefail
[[ " $* " != *" --help "* ]] || exec sed -n '2,/^[^#]/s/^# //p' "$0"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/env.sh dev
exec .venv/bin/python scripts/planted_faults.py "$@"
