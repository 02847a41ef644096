#!/usr/bin/env bash
# Gives a Megatron-LM checkout's pretrain_gpt.py the helix flags: patch_megatron.sh CHECKOUT [--check|--reverse]
# Exit code: 0 done or already so, 1 with --check when it is not applied, 2 when it cannot be.
set -euo pipefail
patch=$(cd "$(dirname "${BASH_SOURCE[0]}")/../patches" && pwd)/megatron_lm_core_v0.19.0.patch

fail() {
    echo "error: $*" >&2
    exit 2
}
of_patch() { sed -n "s/^$1: //p" "$patch"; }

usage="usage: patch_megatron.sh CHECKOUT [--check|--reverse]"
(($# == 1 || $# == 2)) || fail "$usage"
checkout=$1 action=${2:-apply}
[[ $action =~ ^(apply|--check|--reverse)$ ]] || fail "$usage; got $action"
file=$checkout/$(of_patch File)
[[ -f $file ]] || fail "$checkout: must be the root of a Megatron-LM checkout, and $file does not exist"
command -v git >/dev/null || fail "needs git, whose 'git apply' also works on a checkout without .git"

case $(sha256sum <"$file" | cut -d ' ' -f 1) in
    "$(of_patch Base-SHA256)") applied=no ;;
    "$(of_patch Patched-SHA256)") applied=yes ;;
    *) fail "$file: must be that of $(of_patch Base), with or without the patch, and is neither;" \
        "git checkout core_v0.19.0 there, or put your changes aside" ;;
esac
apply() { (cd "$checkout" && git apply "$@" "$patch"); }

case $action-$applied in
    --check-no) echo "$file: not patched" && exit 1 ;;
    apply-no) apply && echo "$file: patched" ;;
    --reverse-yes) apply --reverse && echo "$file: as upstream" ;;
    --reverse-no) echo "$file: as upstream, nothing to do" ;;
    *) echo "$file: patched, nothing to do" ;;
esac
