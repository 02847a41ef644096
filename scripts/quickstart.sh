#!/usr/bin/env bash
# Dense and MoE on 16 CPU ranks, stock TP=8/PP=2 against helix 4 x 4: scripts/quickstart.sh [--out DIR]
set -euo pipefail
[[ " $* " != *" --help "* ]] || exec sed -n '2,/^[^#]/s/^# //p' "$0"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/env.sh"
exec "$root/.venv/bin/helix" run "$root/configs/experiments/quickstart.yaml" --out runs/quickstart "$@"
