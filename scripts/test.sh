#!/usr/bin/env bash
# The tests; arguments go to pytest: scripts/test.sh [-k NAME] [tests/FILE] ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/env.sh dev
exec .venv/bin/python -m pytest "$@"
