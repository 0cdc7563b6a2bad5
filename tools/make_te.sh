#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: tools/make_te.sh VENV
# Builds Transformer Engine, in the version that pyproject.toml names, into VENV (made by `make env VENV=...`), once. It
# is compiled against the torch in VENV and needs a C++ compiler but no GPU; the CUDA headers are installed as packages.
# MAX_JOBS= sets the number of files compiled at a time.
set -euo pipefail

venv=$1
here=$(cd "$(dirname "$0")/.." && pwd)

die() {
    echo "make test-te: $*" >&2
    exit 1
}

[[ -x $venv/bin/python ]] || die "VENV=$venv holds no Python: run \`make env VENV=$venv\` first."
venv=$(cd "$venv" && pwd)
python=$venv/bin/python
wanted=$("$python" -c "
import tomllib
print(*tomllib.load(open('$here/pyproject.toml', 'rb'))['project']['optional-dependencies']['te'])")
versions=$("$python" -c 'import torch; print(torch.version.cuda, torch.__version__)' 2>/dev/null) ||
    die "VENV=$1 has no torch: run \`make env VENV=$1\` first."
read -r cuda torch <<<"$versions"

stamp=$venv/.transformer-engine-built
built="$wanted for torch $torch"
[[ ! -f $stamp || $(<"$stamp") != "$built" ]] || exit 0
rm -f "$stamp"

[[ $cuda == 13.* ]] || die "torch $torch in VENV=$1 is built for CUDA $cuda, but $wanted needs a build for CUDA 13: install one."
command -v "${CXX:-c++}" >/dev/null || die "no C++ compiler was found: install one (on Debian and Ubuntu: apt install g++), or name it by CXX=."
[[ -f $("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] ||
    die "Python's headers are missing: install them (on Debian and Ubuntu: apt install python3-dev)."

echo "make test-te: building $wanted against torch $torch, about 15 minutes on two cores"
pip=("$python" -m pip install --disable-pip-version-check)
"${pip[@]}" ninja wheel pybind11 'cuda-toolkit[crt,cccl]'
export PATH=$venv/bin:$PATH
export NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE
"${pip[@]}" --no-build-isolation "$wanted" || die "Transformer Engine could not be built, see above."
"$python" -c 'import torch, transformer_engine.pytorch' || die "Transformer Engine was built but cannot be imported, see above."
echo "$built" >"$stamp"
