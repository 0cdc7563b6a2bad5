#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A dense LLaVA with Phi-2 is upcycled: the feed-forward network of every second layer becomes 4 experts, each a copy of it,
# of which a new router chooses 2 (MoE-LLaVA's third stage, where the paper's Table 3 begins).
#
#   LLAVA=LLaVA-Phi2-2.7B VISION=clip-vit-large-patch14-336 examples/moe_llava_phi/convert.sh
#   examples/moe_llava_phi/convert.sh --tiny
#
# LLAVA is the folder of MoE-LLaVA's second stage, VISION that of its vision encoder in transformers' format.
# examples/common.sh has the options that all scripts take.
set -euo pipefail
RECIPE=moe_llava_phi
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"

DTYPE=bfloat16
if [[ $LAYOUT == tiny ]]; then
  "$PYTHON" "$ROOT/examples/tiny.py" "$RECIPE" --output "$INPUT"
  LLAVA=$INPUT/llava VISION=$INPUT/vision DTYPE=float32
fi
need_folder LLAVA "the folder of MoE-LLaVA's second stage"
need_folder VISION "the Hugging Face folder of CLIP ViT-L/14-336, or of what LLAVA was trained with"

# The names of transformers, the vision encoder's weights, and the image tokens behind the last id.
"$PYTHON" "$ROOT/examples/moe_llava_phi/from_llava.py" --llava "$LLAVA" --vision "$VISION" --output "$OUTPUT/dense"
"${CONVERT[@]}" upcycle --hf "$OUTPUT/dense" --num-experts 4 --moe-router-topk 2 --every 2 \
  --dtype "$DTYPE" --output "$START" ${MORE[@]+"${MORE[@]}"}
# As it starts, the mixture computes what the dense model does. On the CPU: on GPUs, float32 may be computed as TF32.
MEGATRON_SMAR_DEVICE=cpu "${CONVERT[@]}" verify --hf "$OUTPUT/dense" --load "$START"
