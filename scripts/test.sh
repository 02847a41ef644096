#!/usr/bin/env bash
# The tests; arguments go to pytest: scripts/test.sh [-k NAME] [tests/FILE] ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/env.sh dev
# Two files at a time: the ranks of a test wait for each other a good part of theirs.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
