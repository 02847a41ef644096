#!/usr/bin/env bash
# Gives a Megatron-LM checkout's pretrain_gpt.py the helix flags: patch_megatron.sh CHECKOUT [--check|--reverse]
# Takes the one of patches/ that is for that file. Exit code: 0 done or already so, 1 with --check when it is
# not applied, 2 when it cannot be.
set -euo pipefail
[[ " $* " != *" --help "* ]] || exec sed -n '2,/^[^#]/s/^# //p' "$0"
patches=$(cd "$(dirname "${BASH_SOURCE[0]}")/../patches" && pwd)

fail() {
    echo "error: $*" >&2
    exit 2
}
field() { sed -n "s/^$1: //p" "$2"; } # of a patch's header

usage="usage: patch_megatron.sh CHECKOUT [--check|--reverse]"
(($# == 1 || $# == 2)) || fail "$usage"
checkout=$1 action=${2:-apply}
[[ $action =~ ^(apply|--check|--reverse)$ ]] || fail "$usage; got $action"
file=$checkout/pretrain_gpt.py
[[ -f $file ]] || fail "$checkout: must be the root of a Megatron-LM checkout, and $file does not exist;" \
    "git clone https://github.com/NVIDIA/Megatron-LM and name that folder"
command -v git >/dev/null || fail "git: is needed, and not on PATH; install it (the checkout may be without .git)"

found=$(sha256sum <"$file" | cut -d ' ' -f 1) applied='' bases=''
for patch in "$patches"/*.patch; do
    case $found in
        "$(field Base-SHA256 "$patch")") applied=no && break ;;
        "$(field Patched-SHA256 "$patch")") applied=yes && break ;;
    esac
    bases+=${bases:+ or }$(field Base "$patch")
done
[[ $applied ]] || fail "$file: must be that of $bases, with or without the patch, and is neither;" \
    "git checkout core_v0.19.0 there, or put your changes aside"
apply() { # git must not take a repository around the checkout for the checkout's own
    (cd -P "$checkout" && GIT_CEILING_DIRECTORIES=$(dirname "$PWD") git apply "$@" "$patch")
}

case $action-$applied in
    --check-no) echo "$file: not patched" && exit 1 ;;
    apply-no) apply && echo "$file: patched" ;;
    --reverse-yes) apply --reverse && echo "$file: as upstream" ;;
    --reverse-no) echo "$file: as upstream, nothing to do" ;;
    *) echo "$file: patched, nothing to do" ;;
esac
