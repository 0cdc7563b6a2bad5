#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: tools/make_venv.sh VENV [PYTHON]
# Ensures that VENV is a virtual environment with Python >= 3.12: creates it with PYTHON, or with the first candidate
# that actually runs, since a name on PATH may be a shim that fails.
set -euo pipefail

venv=$1
wanted=${2:-}
minimum="3, 12"

die() {
    echo "make env: $*" >&2
    exit 1
}

# Prints the interpreter's own path. Status 3: older than the minimum; 4: cannot create environments; other: does not run.
probe() {
    local path
    path=$("$1" -c "
import sys
if sys.version_info < ($minimum): sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(4)
print(sys.executable)" 2>/dev/null) || return
    [[ -x $path ]] && echo "$path"
}

no_venv_module() {
    die "$1 has no venv module: install it (on Debian and Ubuntu: apt install python3-venv), or pass PYTHON=/path/to/another/python."
}

find_python() {
    local candidate status without_venv=""
    for candidate in python3.12 python3.13 python3 python "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[2-9]*/bin/python; do
        status=0
        probe "$candidate" || status=$?
        ((status != 0)) || return 0
        ((status != 4)) || without_venv=${without_venv:-$candidate}
    done
    [[ -z $without_venv ]] || no_venv_module "$without_venv"
    die "no Python >= 3.12 was found on PATH or under ~/.pyenv/versions: install one, or pass PYTHON=/path/to/python3.12."
}

check_wanted() {
    local status=0
    probe "$wanted" || status=$?
    case $status in
        0) ;;
        3) die "PYTHON=$wanted is $("$wanted" -V 2>&1), but megatron_smar needs Python >= 3.12: pass PYTHON=/path/to/python3.12." ;;
        4) no_venv_module "PYTHON=$wanted" ;;
        *) die "PYTHON=$wanted does not run as a Python interpreter: pass PYTHON=/path/to/python3.12." ;;
    esac
}

python=""
[[ -z $wanted ]] || python=$(check_wanted)

if [[ ! -e $venv || (-d $venv && -z $(ls -A "$venv")) ]]; then
    python=${python:-$(find_python)}
    echo "make env: creating $venv with $python ($("$python" -V))"
    "$python" -m venv "$venv" || { rm -rf "$venv"; die "$python could not create $venv, see above."; }
    exit
fi

status=0
"$venv/bin/python" -c "import pip, sys; sys.exit(3 if sys.version_info < ($minimum) else 0)" 2>/dev/null || status=$?
((status == 0 || status == 3)) || die "VENV=$venv exists but holds no Python with pip that runs: remove it, or pass another VENV=."
version=$("$venv/bin/python" -V 2>&1)
((status == 0)) || die "VENV=$venv is $version, but megatron_smar needs Python >= 3.12: remove it, or pass another VENV=."
[[ -z $python || $("$python" -V) == "$version" ]] ||
    die "VENV=$venv is $version, but PYTHON=$wanted is $("$python" -V): remove $venv, or pass another VENV=."
