# SPDX-License-Identifier: Apache-2.0
# Functions shared by the recipes' scripts. Each script sets RECIPE, sources this file and calls read_options "$@".
#
# Options of every script; all others are passed to the program after the recipe's flags, so that they override them:
#   --gpus 8|64      number of GPUs, which selects the parallel layout (default: 8)
#   --tiny           the same on the CPU: a small random model of the same architecture, 2 processes, a few steps
# Environment variables:
#   OUTPUT           folder of the recipe's checkpoints and logs (default: runs/RECIPE, with --tiny runs/tiny/RECIPE)
#   GPUS_PER_NODE    GPUs per node (default: 8)
#   OMP_NUM_THREADS  host threads of each process (default on GPUs: cores / GPUS_PER_NODE, for an optimizer on the host)
#   NODE_RANK, MASTER_ADDR, MASTER_PORT    as for torchrun, for several nodes without SLURM
#   PYTHON           the interpreter (default: python)
# Within a SLURM allocation of several nodes (sbatch, salloc) srun starts one torchrun on each of them.

PYTHON=${PYTHON:-python}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CONVERT=("$PYTHON" "$ROOT/tools/checkpoint/convert.py")
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

die() {
  echo "${0##*/}: error: $*" >&2
  exit 1
}

# Sets LAYOUT (8, 64 or tiny), the folders OUTPUT, START and INPUT, and MORE, the options to pass to the program.
read_options() {
  LAYOUT=8 MORE=()
  while (($#)); do
    case $1 in
      --tiny) LAYOUT=tiny ;;
      --gpus)
        [[ ${2:-} == 8 || ${2:-} == 64 ]] || die "--gpus is ${2:-missing}; there are layouts for 8 and for 64."
        LAYOUT=$2
        shift
        ;;
      *) MORE+=("$1") ;;
    esac
    shift
  done
  GPUS=$LAYOUT
  OUTPUT=${OUTPUT:-$ROOT/runs/$RECIPE}
  if [[ $LAYOUT == tiny ]]; then
    export MEGATRON_SMAR_DEVICE=${MEGATRON_SMAR_DEVICE:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    GPUS=2 GPUS_PER_NODE=2
    [[ $OUTPUT != "$ROOT/runs/$RECIPE" ]] || OUTPUT=$ROOT/runs/tiny/$RECIPE
  fi
  GPUS_PER_NODE=${GPUS_PER_NODE:-8}
  ((GPUS % GPUS_PER_NODE == 0)) || die "GPUS_PER_NODE is $GPUS_PER_NODE; it must divide --gpus $GPUS."
  NNODES=$((GPUS / GPUS_PER_NODE))
  START=$OUTPUT/start # the converted model
  INPUT=$OUTPUT/input # with --tiny: what examples/tiny.py made
  mkdir -p "$OUTPUT/logs"
}

# need NAME WHAT: requires an environment variable.
need() {
  [[ -n ${!1:-} ]] || die "$1 is not set; set it to $2."
}

# need_folder NAME WHAT: requires an environment variable that names a folder.
need_folder() {
  need "$1" "$2"
  [[ -d ${!1} ]] || die "$1 is ${!1}, which is not a folder; set it to $2."
}

# Sets MODEL, the flags of the converted model with its vision tower and tokenizer.
use_model() {
  [[ -f $START/flags.txt ]] || die "$START holds no converted model; run convert.sh first, with the same OUTPUT."
  read -r -d '' -a MODEL <"$START/flags.txt" || true
  MODEL+=(--vision-model "$START/hf" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$START/hf")
}

# start_from BEFORE STAGE: sets RUN, the flags of a stage's files. An interrupted stage resumes with the same flags.
start_from() {
  local save=$OUTPUT/$2 tracker=latest_checkpointed_iteration.txt
  [[ -f $save/$tracker || -f $1/$tracker ]] || die "$1 holds no checkpoint; run the script before this one first."
  RUN=(--load "$1" --finetune --save "$save" --tensorboard-dir "$save/tensorboard" --rejects-dir "$save/rejects")
}

# launch NAME PROGRAM FLAGS...: runs a program of the project on all GPUs; its output is also written to logs/NAME.log.
launch() {
  if [[ $LAYOUT != tiny ]]; then
    # With cuda, unusable GPUs end the run with a sentence. By default torchrun gives each process one host thread.
    export MEGATRON_SMAR_DEVICE=${MEGATRON_SMAR_DEVICE:-cuda}
    local threads=$(($(nproc) / GPUS_PER_NODE))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  fi
  local log=$OUTPUT/logs/$1.log program=$ROOT/$2
  local torchrun=("$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE")
  if ((NNODES == 1)); then
    torchrun+=(--standalone)
  elif [[ -n ${SLURM_JOB_ID:-} ]]; then
    ((SLURM_NNODES == NNODES)) || die "--gpus $GPUS needs $NNODES nodes; this allocation has $SLURM_NNODES."
    local head
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    torchrun=(srun --ntasks "$NNODES" --ntasks-per-node 1 "${torchrun[@]}" --nnodes "$NNODES"
      --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:${MASTER_PORT:-29500}")
  else
    [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] ||
      die "--gpus $GPUS needs $NNODES nodes; start this within SLURM, or on each with NODE_RANK and MASTER_ADDR set."
    torchrun+=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
      --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
  fi
  "${torchrun[@]}" "$program" "${@:3}" 2>&1 | tee -a "$log"
}
