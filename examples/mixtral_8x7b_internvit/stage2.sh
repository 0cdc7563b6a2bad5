#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Stage 2, visual instruction tuning with SMAR: connector and language model learn, on 1.6 million samples of which 2.5%
# are pure text (the paper's Table 7).
#
#   DATA=shards/data_stage2.yaml examples/mixtral_8x7b_internvit/stage2.sh [--gpus 8|64] [further flags]
#   examples/mixtral_8x7b_internvit/stage2.sh --tiny
#
# Comes after stage1.sh; examples/common.sh has the options that all scripts take. The paper's baselines are the same with
# `--modality-routing none`, and with `--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff` besides.
set -euo pipefail
RECIPE=mixtral_8x7b_internvit
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
use_model
start_from "$OUTPUT/stage1" stage2

TRAINING=(
  --freeze vision
  --modality-routing smar --smar-d-min 1.5 --smar-d-max 2.0 --smar-coeff 0.01 --moe-router-load-balancing-type none
  --conversation-template mistral --max-tiles 12 --use-thumbnail --text-only-ratio 0.025
  # One epoch of 1,629,000 samples.
  --global-batch-size 256 --train-iters 6363 --micro-batch-size 1 --seq-length 4096
  --optimizer adam --weight-decay 0 --clip-grad 1.0
  --lr 2e-5 --lr-decay-style cosine --lr-warmup-fraction 0.03
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --num-workers 8 --log-interval 1 --save-interval 500 --eval-iters 0
)

GPU=(--bf16 --moe-router-dtype fp32 --moe-grouped-gemm)
# The optimizer's 12 bytes a parameter do not fit beside the model on 8 GPUs of 80 GB: the host's memory takes them.
# Megatron cannot load float32 parameters into an optimizer on the host, so SMAR goes without its biases there.
OFFLOAD=(--optimizer-cpu-offload --use-precision-aware-optimizer --overlap-cpu-optimizer-d2h-h2d)
case $LAYOUT in
  # The experts of a layer over the 8 GPUs of a node, whose links carry their tokens. Nodes are replicas.
  8) PLACE=("${GPU[@]}" --expert-model-parallel-size 8 "${OFFLOAD[@]}" --no-modality-router-bias) ;;
  64) PLACE=("${GPU[@]}" --expert-model-parallel-size 8) ;;
  tiny)
    DATA=$INPUT/stage2
    PLACE=(--expert-model-parallel-size 2 --global-batch-size 4 --train-iters 5 --seq-length 256 --num-workers 0)
    ;;
esac
need DATA "the blend of shards for stage 2: data_stage2.yaml beside the folders that it names"

launch stage2 pretrain_vlm.py "${MODEL[@]}" "${RUN[@]}" --data-path "$DATA" "${TRAINING[@]}" "${PLACE[@]}" \
  ${MORE[@]+"${MORE[@]}"}
