#!/usr/bin/env bash
# The 8-expert MoE model of the source experiment on 16 GPUs, stock TP=8, PP=2: scripts/moe_baseline.sh [--dry-run] ...
# Two nodes: the same call on both, with --nnodes 2 --rdzv-endpoint HOST:29500.
set -euo pipefail
[[ " $* " != *" --help "* ]] || exec sed -n '2,/^[^#]/s/^# //p' "$0"
config=$(dirname "${BASH_SOURCE[0]}")/../configs/experiments/seed_16gpu.yaml
exec helix launch "$config" moe tp8_pp2 "$@"
