#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# MoE-LLaVA's third stage with SMAR: trains only experts and router, on LLaVA-mix-665k (the paper's Table 3).
#
#   DATA=shards/llava_mix_665k examples/moe_llava_phi/stage3.sh [--gpus 8|64|256|1024] [--slurm] [-- flags]
#   examples/moe_llava_phi/stage3.sh --tiny
#
# Run it after convert.sh; examples/common.sh lists the options of all scripts. For MoE-LLaVA itself add
# `-- --modality-routing none`.
set -euo pipefail
RECIPE=moe_llava_phi
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
use_model
start_from "$START" stage3

[[ $LAYOUT != tiny ]] || DATA=$INPUT/stage2
need DATA "shards of LLaVA-mix-665k: a folder made by tools/data/prepare.py"

launch stage3 pretrain_vlm.py --config "$ROOT/examples/$RECIPE/stage3.yaml" --layout "$LAYOUT" \
  "${MODEL[@]}" "${RUN[@]}" --data-path "$DATA" ${MORE[@]+"${MORE[@]}"}
