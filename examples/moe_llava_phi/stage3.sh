#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# MoE-LLaVA's third stage with SMAR: experts and router alone learn, on LLaVA-mix-665k (the paper's Table 3).
#
#   DATA=shards/llava_mix_665k examples/moe_llava_phi/stage3.sh [--gpus 8|64] [further flags]
#   examples/moe_llava_phi/stage3.sh --tiny
#
# Comes after convert.sh; examples/common.sh has the options that all scripts take. MoE-LLaVA itself is the same with
# `--modality-routing none`.
set -euo pipefail
RECIPE=moe_llava_phi
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
use_model
start_from "$START" stage3

TRAINING=(
  --freeze vision connector embeddings attention norms dense
  # The paper's band for MoE-LLaVA, whose load balancing stays as it is.
  --modality-routing smar --smar-d-min 1.0 --smar-d-max 1.5 --smar-coeff 0.01
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
  --conversation-template vicuna_v1
  # One epoch of 665,298 samples.
  --global-batch-size 128 --train-iters 5198 --seq-length 2048
  --optimizer adam --weight-decay 0 --clip-grad 1.0
  --lr 2e-5 --lr-decay-style cosine --lr-warmup-fraction 0.03
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --num-workers 8 --log-interval 1 --save-interval 500 --eval-iters 0
)

# Phi has biases, and Megatron's grouped experts refuse them with this fusion.
GPU=(--bf16 --moe-router-dtype fp32 --moe-grouped-gemm --no-bias-dropout-fusion)
case $LAYOUT in
  # 5.3 billion parameters fit on each GPU, and no token has to leave it.
  8) PLACE=("${GPU[@]}" --micro-batch-size 4) ;;
  64) PLACE=("${GPU[@]}" --micro-batch-size 2) ;;
  tiny)
    DATA=$INPUT/stage2
    PLACE=(--micro-batch-size 1 --global-batch-size 4 --train-iters 5 --seq-length 256 --num-workers 0)
    # The first layers' stage holds experts and dense layers, and so does the last ones'.
    PLACE+=(--pipeline-model-parallel-size 2)
    ;;
esac
need DATA "shards of LLaVA-mix-665k: a folder made by tools/data/prepare.py"

launch stage3 pretrain_vlm.py "${MODEL[@]}" "${RUN[@]}" --data-path "$DATA" "${TRAINING[@]}" "${PLACE[@]}" \
  ${MORE[@]+"${MORE[@]}"}
