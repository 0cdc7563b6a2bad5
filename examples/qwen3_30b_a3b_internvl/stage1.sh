#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Stage 1, visual alignment: trains only the connector, on LLaVA-1.5-558k (the paper's Table 7, which is for Mixtral).
#
#   DATA=shards/data_stage1.yaml examples/qwen3_30b_a3b_internvl/stage1.sh [--gpus 8|64|256|1024] [--slurm] [-- flags]
#   examples/qwen3_30b_a3b_internvl/stage1.sh --tiny
#
# Run it after convert.sh; examples/common.sh lists the options of all scripts.
set -euo pipefail
RECIPE=qwen3_30b_a3b_internvl
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
use_model
start_from "$START" stage1

[[ $LAYOUT != tiny ]] || DATA=$INPUT/stage1
need DATA "shards of LLaVA-1.5-558k: a folder made by tools/data/prepare.py, or data_stage1.yaml next to it"

launch stage1 pretrain_vlm.py --config "$ROOT/examples/$RECIPE/stage1.yaml" --layout "$LAYOUT" \
  "${MODEL[@]}" "${RUN[@]}" --data-path "$DATA" ${MORE[@]+"${MORE[@]}"}
