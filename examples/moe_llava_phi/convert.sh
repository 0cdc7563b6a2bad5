#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Upcycles a dense LLaVA with Phi-2: the feed-forward network of every second layer is copied to 4 experts, of which a
# new router chooses 2 (the start of MoE-LLaVA's third stage, to which the paper's Table 3 refers).
#
#   LLAVA=LLaVA-Phi2-2.7B VISION=clip-vit-large-patch14-336 examples/moe_llava_phi/convert.sh
#   examples/moe_llava_phi/convert.sh --tiny
#
# LLAVA is the folder of MoE-LLaVA's second stage, VISION the folder of its vision encoder in transformers' format.
# examples/common.sh lists the options of all scripts.
set -euo pipefail
RECIPE=moe_llava_phi
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
runs_here

DTYPE=bfloat16
if [[ $LAYOUT == tiny ]]; then
  "$PYTHON" "$ROOT/examples/tiny.py" "$RECIPE" --output "$INPUT"
  LLAVA=$INPUT/llava VISION=$INPUT/vision DTYPE=float32
fi
need_folder LLAVA "the folder of MoE-LLaVA's second stage"
need_folder VISION "the Hugging Face folder of CLIP ViT-L/14-336, or of the encoder that LLAVA was trained with"

# Converts to transformers' names, adds the vision encoder's weights, and gives the image tokens the ids after the last.
"$PYTHON" "$ROOT/examples/moe_llava_phi/from_llava.py" --llava "$LLAVA" --vision "$VISION" --output "$OUTPUT/dense"
"${CONVERT[@]}" upcycle --hf "$OUTPUT/dense" --num-experts 4 --moe-router-topk 2 --every 2 \
  --dtype "$DTYPE" --output "$START" ${MORE[@]+"${MORE[@]}"}
# Before training, the mixture computes the same as the dense model. On the CPU: GPUs may compute float32 as TF32.
MEGATRON_SMAR_DEVICE=cpu "${CONVERT[@]}" verify --hf "$OUTPUT/dense" --load "$START"
