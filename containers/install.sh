#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the project into NVIDIA's PyTorch image, next to its own torch: Dockerfile and apptainer.def run it there.
#
#   containers/install.sh FOLDER       the checkout within the image
#
# Not run yet: it was written without an image to run it in (containers/README.md).
set -euo pipefail
cd "${1:?give the checkout within the image}"

# The image pins the versions of all its packages in a file that pip obeys; several are older than this project needs.
export PIP_CONSTRAINT='' PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
kept=$(mktemp)

# What was compiled with the torch of the image stays: a wheel of another build does not fit its CUDA and NCCL.
python - >"$kept" <<'END'
from importlib.metadata import distributions

KEPT = {"torch", "torchvision", "triton", "pytorch-triton"}
print(*sorted({f"{d.name}=={d.version}" for d in distributions() if d.name.lower() in KEPT}), sep="\n")
END
cat "$kept"

python -m pip install -c "$kept" 'setuptools>=77' 'pybind11>=3.1,<4' ninja wheel
python -m pip install -c "$kept" --no-build-isolation -e '.[s3]'

# The image's Transformer Engine is another release than the one that is tested with this Megatron.
python -m pip uninstall --yes transformer-engine transformer-engine-torch transformer-engine-cu13 || true
NVTE_FRAMEWORK=pytorch python -m pip install -c "$kept" --no-build-isolation -e '.[te]'

# No GPU is there while an image is built. `import megatron_smar` refuses versions that do not go together.
MEGATRON_SMAR_DEVICE=cpu python - <<'END'
from importlib.metadata import version
from importlib.util import find_spec

import torch
import transformer_engine.pytorch
import megatron_smar

print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, megatron-core {version('megatron-core')}")
print(f"Transformer Engine {version('transformer-engine')}")
fused = find_spec("fused_weight_gradient_mlp_cuda")
print("apex:", "with fused weight gradients" if fused else "without fused weight gradients, which are off then")
END
