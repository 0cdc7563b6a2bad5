#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A rehearsal of stage 2 on one node, before many are asked for: 20 steps in the layout for 64 GPUs (modality biases,
# optimizer on the GPUs), packed, with validation, saved after 10 and resumed, exported, and asked a question. Only the
# experts are not trained, since their optimizer needs more than a node.
#
#   DATA=shards/data_stage2.yaml IMAGE=photograph.png examples/mixtral_8x7b_internvit/pilot.sh [--slurm] [-- flags]
#   examples/mixtral_8x7b_internvit/pilot.sh --tiny
#
# Run it after convert.sh; it does not need stage 1. The export is made and asked on the CPU, where this script runs, and
# the answer needs 100 GB of memory; NODE="srun --mem 128G ...", words that start a program on another node, does both
# there. examples/common.sh lists the options of all scripts.
set -euo pipefail
RECIPE=mixtral_8x7b_internvit
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
[[ $LAYOUT == 8 || $LAYOUT == tiny ]] || die "--gpus is $LAYOUT; the pilot runs on the 8 GPUs of one node."
use_model
start_from "$START" pilot

[[ $LAYOUT == tiny ]] || LAYOUT=64
[[ $LAYOUT != tiny ]] || DATA=$INPUT/stage2 IMAGE=$INPUT/images/000.png
need DATA "the blend of shards for stage 2: data_stage2.yaml next to the folders that it names"
need IMAGE "a picture that the exported model is asked about"

[[ $LAUNCHER == local ]] || LAUNCH+=(--wait)
train() {
  launch pilot pretrain_vlm.py --config "$ROOT/examples/$RECIPE"/{stage2,pilot}.yaml --layout "$LAYOUT" \
    "${MODEL[@]}" "${RUN[@]}" --data-path "$DATA" ${MORE[@]+"${MORE[@]}"} "$@"
}
train --exit-interval 10
train # resumes

EXPORT=$OUTPUT/export/pilot_$(cat "$OUTPUT/pilot/latest_checkpointed_iteration.txt")
read -ra node <<<"${NODE:-}"
there() { ${node[@]+"${node[@]}"} "$@"; }
[[ -d $EXPORT ]] || there "${CONVERT[@]}" export --load "$OUTPUT/pilot" --hf "$START/hf" --output "$EXPORT"
there "$PYTHON" "$ROOT/tools/chat.py" "$EXPORT" "Which colors are these?" --image "$IMAGE" --max-new-tokens 8
