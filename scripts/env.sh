#!/usr/bin/env bash
# Makes .venv in the repository's root, or leaves it as it is when up to date: scripts/env.sh [dev]
set -euo pipefail
[[ " $* " != *" --help "* ]] || exec sed -n '2,/^[^#]/s/^# //p' "$0"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=$*
[[ $extra =~ ^(dev)?$ ]] || {
    echo "error: scripts/env.sh: must be called with dev or without a word, got $extra; correct that" >&2
    exit 2
}
stamp=.venv/.helix-env # what .venv was made from; "unfinished" while it is being made
constraints=requirements/cpu.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

# megatron-core has wheels for 3.12 and 3.13. Some systems ship a Python without venv or ctypes.
usable() {
    "$1" - <<'PY' >/dev/null 2>&1
import sys, sysconfig, ctypes, ensurepip, ssl, venv
assert sys.version_info[:2] in ((3, 12), (3, 13)) and not sysconfig.get_config_var("Py_GIL_DISABLED")
PY
}

make_venv() {
    local python
    for python in python3.12 python3.13 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3; do
        if usable "$python"; then
            "$python" -m venv .venv
            return
        fi
    done
    echo "environment: no Python 3.12 or 3.13 with venv here, asking uv for one"
    if ! command -v uv >/dev/null; then
        tools=$(mktemp -d)
        trap 'rm -rf "$tools"' EXIT
        python3 -m pip install --quiet --target "$tools" uv || true
        PATH=$tools/bin:$PATH
    fi
    if ! uv venv --quiet --seed --allow-existing --python 3.12 .venv; then
        echo "error: need Python 3.12 or 3.13 with its venv module; none is here and uv did not get one." \
            "Install one and put it on PATH (Debian, Ubuntu: python3.12 and python3.12-venv)" >&2
        exit 1
    fi
}

# uv takes a quarter of pip's time, but reads none of pip's settings: an index of one's own is pip's.
install() {
    local pip=(.venv/bin/python -m pip)
    if ! "${pip[@]}" config list | grep -q '\.index-url=' && "${pip[@]}" install --quiet uv; then
        .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python "$@" && return
        echo "environment: uv could not, asking pip"
    fi
    "${pip[@]}" install --quiet "$@"
}

if command -v flock >/dev/null; then # two calls at once: the second waits for the first
    exec 9>.venv.lock
    flock 9
fi
wanted=$({ pwd; cat setup.py "$constraints"; } | sha256sum | cut -d ' ' -f 1)
found=$(cat "$stamp" 2>/dev/null || true)
if [[ $found == "$wanted $extra" || $found == "$wanted dev" ]] && [[ -x .venv/bin/python ]]; then
    exit 0
fi
if [[ -d .venv ]] && { [[ $found == unfinished ]] || ! usable .venv/bin/python ||
    ! .venv/bin/python -m pip --version >/dev/null; }; then
    echo "environment: .venv is unfinished, or of a Python that cannot be used: making it anew"
    rm -rf .venv/bin .venv # without bin it counts as unusable, should this be interrupted
fi
mkdir -p .venv
echo unfinished >"$stamp"
[[ -x .venv/bin/python ]] || make_venv
echo "environment: installing into .venv (the first time some minutes and 5 GB, most of it torch)"
install --constraint "$constraints" --editable ".${extra:+[$extra]}"
echo "$wanted $extra" >"$stamp"
