#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Stage 2, visual instruction tuning with SMAR: trains connector and language model, on 1.6 million samples of which
# 2.5% are pure text (the paper's Table 7, which is for Mixtral; the paper has no results for 128 experts, 8 chosen).
#
#   DATA=shards/data_stage2.yaml examples/qwen3_30b_a3b_internvl/stage2.sh [--gpus 8|64|256|1024] [--slurm] [-- flags]
#   examples/qwen3_30b_a3b_internvl/stage2.sh --tiny
#
# Run it after stage1.sh; examples/common.sh lists the options of all scripts. For the paper's baselines add
# `-- --modality-routing none`, or also `--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff`.
set -euo pipefail
RECIPE=qwen3_30b_a3b_internvl
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
use_model
start_from "$OUTPUT/stage1" stage2

[[ $LAYOUT != tiny ]] || DATA=$INPUT/stage2
need DATA "the blend of shards for stage 2: data_stage2.yaml next to the folders that it names"

launch stage2 pretrain_vlm.py --config "$ROOT/examples/$RECIPE/stage2.yaml" --layout "$LAYOUT" \
  "${MODEL[@]}" "${RUN[@]}" --data-path "$DATA" ${MORE[@]+"${MORE[@]}"}
