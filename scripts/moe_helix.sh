#!/usr/bin/env bash
# The 8-expert MoE model of the source experiment on 16 GPUs, helix 4 x 4: scripts/moe_helix.sh [--dry-run] ...
# Two nodes: the same call on both, with --nnodes 2 --rdzv-endpoint HOST:29500.
set -euo pipefail
[[ " $* " != *" --help "* ]] || exec sed -n '2,/^[^#]/s/^# //p' "$0"
config=$(dirname "${BASH_SOURCE[0]}")/../configs/experiments/seed_16gpu.yaml
exec helix launch "$config" moe helix_4x4 "$@"
