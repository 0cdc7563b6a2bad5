#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Combines Qwen3-30B-A3B, InternViT-300M and a newly initialized connector into a checkpoint for training.
#
#   LANGUAGE=Qwen3-30B-A3B-Base VISION=InternViT-300M-448px examples/qwen3_30b_a3b_internvl/convert.sh
#   examples/qwen3_30b_a3b_internvl/convert.sh --tiny
#
# LANGUAGE and VISION are Hugging Face folders; VISION may be a model that contains an InternViT (an InternVL in
# transformers' format). examples/common.sh lists the options of all scripts.
set -euo pipefail
RECIPE=qwen3_30b_a3b_internvl
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
runs_here

DTYPE=bfloat16
if [[ $LAYOUT == tiny ]]; then
  "$PYTHON" "$ROOT/examples/tiny.py" "$RECIPE" --output "$INPUT"
  LANGUAGE=$INPUT/language VISION=$INPUT/vision DTYPE=float32
fi
need_folder LANGUAGE "the Hugging Face folder of Qwen3-30B-A3B"
need_folder VISION "the Hugging Face folder of InternViT-300M"

# InternVL's connector, so that the export is a plain InternVL model (as long as the modality biases are zero).
"${CONVERT[@]}" import --language "$LANGUAGE" --vision "$VISION" --connector internvl \
  --dtype "$DTYPE" --output "$START" ${MORE[@]+"${MORE[@]}"}
