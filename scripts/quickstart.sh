#!/usr/bin/env bash
# Dense and MoE on 16 CPU ranks, stock TP=8/PP=2 against helix 4 x 4: scripts/quickstart.sh [--out DIR]
set -euo pipefail
[[ " $* " != *" --help "* ]] || exec sed -n '2,/^[^#]/s/^# //p' "$0"
for ((i = 1; i <= $#; i++)); do # before the environment, which takes minutes
    case ${!i} in
    --out=?* | --hardware=?* | --json) ;;
    --out | --hardware)
        ((++i <= $#)) || {
            echo "error: scripts/quickstart.sh: ${!#} must have a value; add it" >&2
            exit 2
        }
        ;;
    *)
        echo "error: scripts/quickstart.sh: must be called with --out DIR or without a word, got ${!i}; correct that" >&2
        exit 2
        ;;
    esac
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/env.sh"
exec "$root/.venv/bin/helix" run "$root/configs/experiments/quickstart.yaml" --out runs/quickstart "$@"
