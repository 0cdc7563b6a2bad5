#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Exports the trained model to Hugging Face's format, verifies the export against the checkpoint, evaluates, and writes
# the run's report.
#
#   TEXT=texts.jsonl QUESTIONS=vqa.json IMAGES=images examples/mixtral_8x7b_internvit/evaluate.sh [--slurm]
#   examples/mixtral_8x7b_internvit/evaluate.sh --tiny
#
# Run it after stage2.sh. CHECKPOINT selects another checkpoint, such as OUTPUT/stage1 to evaluate before stage 2.
# tools/evaluate.py describes the files; examples/common.sh lists the options of all scripts.
set -euo pipefail
RECIPE=mixtral_8x7b_internvit
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
CHECKPOINT=${CHECKPOINT:-$OUTPUT/stage2}
[[ -f $CHECKPOINT/latest_checkpointed_iteration.txt ]] || die "$CHECKPOINT holds no checkpoint; run stage2.sh first."

VERIFY=()
case $LAYOUT in
  tiny)
    TEXT=$INPUT/text.jsonl QUESTIONS=$INPUT/vqa.json IMAGES=$INPUT
    PLACE=(--expert-model-parallel-size 2 --seq-length 256 --float32)
    ;;
  *)
    PLACE=(--expert-model-parallel-size 8 --batch-size 2)
    # A larger tolerance, since rounding errors accumulate over the layers of a deep model.
    VERIFY=(--tolerance 1e-2)
    ;;
esac
# The layout for 8 GPUs trains without biases, that for 64 with them; either can be evaluated on 8.
! grep -qs 'no-modality-router-bias: true' "$CHECKPOINT/run.yaml" || VERIFY+=(--no-modality-router-bias)
need TEXT "held-out texts (JSON lines with text)"
need QUESTIONS "questions with answers (a JSON list of image, question, answer)"
need_folder IMAGES "the folder that their images' paths start from"

EXPORT=$OUTPUT/export/${CHECKPOINT##*/}_$(cat "$CHECKPOINT/latest_checkpointed_iteration.txt")
if [[ ${NODE_RANK:-0} == 0 ]]; then
  [[ -d $EXPORT ]] || "${CONVERT[@]}" export --load "$CHECKPOINT" --hf "$START/hf" --output "$EXPORT"
  # On the CPU: both complete models in float32 do not fit on a GPU.
  MEGATRON_SMAR_DEVICE=cpu "${CONVERT[@]}" verify --hf "$EXPORT" --load "$CHECKPOINT" ${VERIFY[@]+"${VERIFY[@]}"}
fi
# The model's flags are in the checkpoint; these are stage 2's, whichever checkpoint is evaluated.
launch_and_wait evaluate tools/evaluate.py --load "$CHECKPOINT" --conversation-template mistral \
  --max-tiles 12 --use-thumbnail --seq-length 4096 \
  --text "$TEXT" --vqa "$QUESTIONS" --image-root "$IMAGES" --output "$OUTPUT/results.json" \
  "${PLACE[@]}" ${MORE[@]+"${MORE[@]}"}

if [[ ${NODE_RANK:-0} == 0 ]]; then
  "$PYTHON" "$ROOT/tools/report.py" "$CHECKPOINT" --results "$OUTPUT/results.json" --image-root "$IMAGES"
fi
