#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Evaluates the trained model. It is not exported: transformers has no class for a Phi with experts.
#
#   TEXT=texts.jsonl QUESTIONS=vqa.json IMAGES=images examples/moe_llava_phi/evaluate.sh [--gpus 8|64] [--slurm]
#   examples/moe_llava_phi/evaluate.sh --tiny
#
# Run it after stage3.sh. CHECKPOINT selects another checkpoint, such as OUTPUT/start to evaluate the upcycled model.
# tools/evaluate.py describes the files; examples/common.sh lists the options of all scripts.
set -euo pipefail
RECIPE=moe_llava_phi
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
CHECKPOINT=${CHECKPOINT:-$OUTPUT/stage3}
[[ -f $CHECKPOINT/latest_checkpointed_iteration.txt ]] || die "$CHECKPOINT holds no checkpoint; run stage3.sh first."

case $LAYOUT in
  tiny)
    TEXT=$INPUT/text.jsonl QUESTIONS=$INPUT/vqa.json IMAGES=$INPUT
    PLACE=(--seq-length 256 --float32)
    ;;
  *) PLACE=(--bf16 --moe-router-dtype fp32 --moe-grouped-gemm --no-bias-dropout-fusion --batch-size 4) ;;
esac
need TEXT "held-out texts (JSON lines with text)"
need QUESTIONS "questions with answers (a JSON list of image, question, answer)"
need_folder IMAGES "the folder that their images' paths start from"

# The model's flags are in the checkpoint. Template and length are stage 3's; the upcycled model has none of its own.
launch_and_wait evaluate tools/evaluate.py --load "$CHECKPOINT" --conversation-template vicuna_v1 --seq-length 2048 \
  --text "$TEXT" --vqa "$QUESTIONS" --image-root "$IMAGES" --output "$OUTPUT/results.json" \
  "${PLACE[@]}" ${MORE[@]+"${MORE[@]}"}

if [[ ${NODE_RANK:-0} == 0 ]]; then
  "$PYTHON" "$ROOT/tools/report.py" "$CHECKPOINT" --results "$OUTPUT/results.json" --image-root "$IMAGES"
fi
