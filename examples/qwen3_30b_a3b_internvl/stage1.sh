#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Stage 1, visual alignment: the connector alone learns, on LLaVA-1.5-558k (the paper's Table 7, which is Mixtral's).
#
#   DATA=shards/data_stage1.yaml examples/qwen3_30b_a3b_internvl/stage1.sh [--gpus 8|64] [further flags]
#   examples/qwen3_30b_a3b_internvl/stage1.sh --tiny
#
# Comes after convert.sh; examples/common.sh has the options that all scripts take.
set -euo pipefail
RECIPE=qwen3_30b_a3b_internvl
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
use_model
start_from "$START" stage1

TRAINING=(
  --freeze vision language --modality-routing none --moe-router-load-balancing-type none
  --conversation-template plain --max-tiles 12 --use-thumbnail
  # One epoch of 558,000 samples. A sample of 13 tiles has 3,328 vision tokens.
  --global-batch-size 128 --train-iters 4360 --micro-batch-size 1 --seq-length 4096
  --optimizer adam --weight-decay 0 --clip-grad 1.0
  --lr 5e-4 --lr-decay-style cosine --lr-warmup-fraction 0.03
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --num-workers 8 --log-interval 1 --save-interval 500 --eval-iters 0
)

GPU=(--bf16 --moe-router-dtype fp32 --moe-grouped-gemm)
case $LAYOUT in
  # The experts of a layer over the 8 GPUs of a node, whose links carry their tokens. Nodes are replicas.
  8 | 64) PLACE=("${GPU[@]}" --expert-model-parallel-size 8) ;;
  tiny)
    DATA=$INPUT/stage1
    PLACE=(--expert-model-parallel-size 2 --global-batch-size 4 --train-iters 5 --seq-length 256 --num-workers 0)
    ;;
esac
need DATA "shards of LLaVA-1.5-558k: a folder made by tools/data/prepare.py, or data_stage1.yaml beside it"

launch stage1 pretrain_vlm.py "${MODEL[@]}" "${RUN[@]}" --data-path "$DATA" "${TRAINING[@]}" "${PLACE[@]}" \
  ${MORE[@]+"${MORE[@]}"}
