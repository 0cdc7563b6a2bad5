#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Combines Mixtral 8x7B, InternViT-300M and a newly initialized connector into a checkpoint for training.
#
#   LANGUAGE=Mixtral-8x7B-v0.1 VISION=InternViT-300M-448px examples/mixtral_8x7b_internvit/convert.sh
#   examples/mixtral_8x7b_internvit/convert.sh --tiny
#
# LANGUAGE and VISION are Hugging Face folders; VISION may be a model that contains an InternViT (an InternVL in
# transformers' format). examples/common.sh lists the options of all scripts.
set -euo pipefail
RECIPE=mixtral_8x7b_internvit
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
runs_here

DTYPE=bfloat16
if [[ $LAYOUT == tiny ]]; then
  "$PYTHON" "$ROOT/examples/tiny.py" "$RECIPE" --output "$INPUT"
  LANGUAGE=$INPUT/language VISION=$INPUT/vision DTYPE=float32
fi
need_folder LANGUAGE "the Hugging Face folder of Mixtral 8x7B"
need_folder VISION "the Hugging Face folder of InternViT-300M"

# VITA's connector; InternVL's begins with a LayerNorm.
"${CONVERT[@]}" import --language "$LANGUAGE" --vision "$VISION" --connector mlp2x_gelu \
  --dtype "$DTYPE" --output "$START" ${MORE[@]+"${MORE[@]}"}
