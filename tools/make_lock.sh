#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: tools/make_lock.sh [UV_OPTION...]
# Writes requirements.lock: one version, with hashes, of everything that the project, its build and the extras dev and
# demo need, on every platform from Python 3.12 on. Versions that pyproject.toml still allows stay as they are; uv's
# options raise them (--upgrade all, --upgrade-package NAME one). PYTHON= picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tools/make_venv.sh "$work/venv" "${PYTHON:-}"
python=$work/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check 'uv>=0.13,<0.14'

# uv does not read pip's configuration. Only the main index is passed on: an additional one may hold other files of the
# same releases, or one platform's only, and the lock has to fit every machine.
pip_setting() {
    local variable=PIP_${1^^} name
    variable=${variable//-/_}
    if [[ -n ${!variable:-} ]]; then
        echo "${!variable}"
        return
    fi
    for name in "install.$1" "global.$1"; do
        "$python" -m pip config get "$name" 2>/dev/null && return
    done
    true
}
index=${UV_DEFAULT_INDEX:-$(pip_setting index-url)}
certificates=${SSL_CERT_FILE:-$(pip_setting cert)}
[[ -z $index ]] || export UV_DEFAULT_INDEX=$index
[[ -z $certificates ]] || export SSL_CERT_FILE=$certificates

"$python" -c "
import tomllib
print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" >"$work/build.in"

# uv takes the versions to keep from the file it writes. --no-config: a user's own uv.toml may name indexes.
[[ ! -f requirements.lock ]] || cp requirements.lock "$work/requirements.lock"
"$work/venv/bin/uv" pip compile --quiet --no-config --python "$python" \
    --universal --python-version 3.12 --generate-hashes --no-header --extra dev --extra demo \
    "$@" --output-file "$work/requirements.lock" - pyproject.toml <"$work/build.in" >/dev/null

{
    echo "# Written by \`make lock\` from pyproject.toml: what \`make env\` installs, with the hashes of its files."
    cat "$work/requirements.lock"
} >"$work/complete"
if grep -nE '://| @ |^[[:space:]]*-(-(index|extra-index|find-links|trusted)|[if] )' "$work/complete"; then
    echo "make lock: the lines above name a place that packages come from; requirements.lock was not written." >&2
    exit 1
fi
cp "$work/complete" requirements.lock
echo "make lock: requirements.lock has $(grep -c '==' requirements.lock) packages."
