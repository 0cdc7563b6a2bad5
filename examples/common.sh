# SPDX-License-Identifier: Apache-2.0
# Functions shared by the recipes' scripts. Each script sets RECIPE, sources this file and calls read_options "$@".
#
#   SCRIPT [--gpus 8|64|256|1024] [--tiny] [--slurm] [options of tools/launch.py] [-- further flags of the program]
#
#   --gpus N         number of GPUs, which selects the parallel layout in the stages' files (default: 8)
#   --tiny           the same on the CPU: a small random model of the same architecture, 2 processes, a few steps
#   --slurm          submits the script's program to SLURM (`tools/launch.py slurm`) instead of starting it here
# Every other option before the -- is the launcher's (tools/launch.py local|slurm --help): --time 24:00:00, --dry-run,
# --container IMAGE, --sbatch=--account=NAME. Flags after the -- override the recipe's.
# Environment variables:
#   OUTPUT           folder of the recipe's checkpoints and logs (default: runs/RECIPE, with --tiny runs/tiny/RECIPE)
#   GPUS_PER_NODE    GPUs per node (default: 8)
#   CPUS_PER_GPU     cores of each process on SLURM (default: 12): its data workers, and an optimizer on the host
#   NODE_RANK, MASTER_ADDR, MASTER_PORT    as for torchrun, for several nodes without SLURM
#   PYTHON           the interpreter (default: python)

PYTHON=${PYTHON:-python}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CONVERT=("$PYTHON" "$ROOT/tools/checkpoint/convert.py")
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

die() {
  echo "${0##*/}: error: $*" >&2
  exit 1
}

# Sets LAYOUT (a number of GPUs or tiny), the folders OUTPUT, START and INPUT, LAUNCHER (local or slurm), LAUNCH, the launcher's
# options, and MORE, the options of the program.
read_options() {
  LAYOUT=8 LAUNCHER=local LAUNCH=() MORE=()
  while (($#)); do
    case $1 in
      --tiny) LAYOUT=tiny ;;
      --slurm) LAUNCHER=slurm ;;
      --gpus)
        [[ ${2:-} =~ ^(8|64|256|1024)$ ]] || die "--gpus is ${2:-missing}; there are layouts for 8, 64, 256 and 1024."
        LAYOUT=$2
        shift
        ;;
      --)
        MORE=("${@:2}")
        break
        ;;
      *) LAUNCH+=("$1") ;;
    esac
    shift
  done
  GPUS=$LAYOUT
  OUTPUT=${OUTPUT:-$ROOT/runs/$RECIPE}
  if [[ $LAYOUT == tiny ]]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    GPUS=2 GPUS_PER_NODE=2
    [[ $OUTPUT != "$ROOT/runs/$RECIPE" ]] || OUTPUT=$ROOT/runs/tiny/$RECIPE
  fi
  GPUS_PER_NODE=${GPUS_PER_NODE:-8}
  CPUS_PER_GPU=${CPUS_PER_GPU:-12}
  ((GPUS % GPUS_PER_NODE == 0)) || die "GPUS_PER_NODE is $GPUS_PER_NODE; it must divide --gpus $GPUS."
  mkdir -p "$OUTPUT"
  OUTPUT=$(cd "$OUTPUT" && pwd)
  START=$OUTPUT/start # the converted model
  INPUT=$OUTPUT/input # with --tiny: what examples/tiny.py made
}

# runs_here: refuses options of the launcher in a script that only runs on this machine, without GPUs.
runs_here() {
  [[ $LAUNCHER == local ]] || die "--slurm is not for this script, which runs where it is started; start it by srun."
  ((${#LAUNCH[@]} == 0)) || die "${LAUNCH[0]} is no option of this script; flags of the program come after --."
}

# need NAME WHAT: requires an environment variable. A path gets absolute: a container may start in another folder.
need() {
  [[ -n ${!1:-} ]] || die "$1 is not set; set it to $2."
  [[ ! -e ${!1} ]] || printf -v "$1" %s "$(cd "$(dirname "${!1}")" && pwd)/$(basename "${!1}")"
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
  # A job that waits for the one before it (--sbatch=--dependency=afterok:JOB) finds that one's checkpoint later.
  [[ -f $save/$tracker || -f $1/$tracker || ${LAUNCH[*]-} == *--dependency=* ]] ||
    die "$1 holds no checkpoint; run the script before this one first."
  RUN=(--load "$1" --finetune --save "$save" --tensorboard-dir "$save/tensorboard" --rejects-dir "$save/rejects")
}

# launch NAME PROGRAM FLAGS...: starts a program of the project on all GPUs, here (its output also goes to
# logs/NAME.log) or by SLURM (sbatch file and logs are in jobs/NAME).
launch() {
  local options=(--nodes $((GPUS / GPUS_PER_NODE)) --processes-per-node "$GPUS_PER_NODE")
  [[ $LAYOUT != tiny ]] || options+=(--cpu)
  case $LAUNCHER in
    local) options+=(--log "$OUTPUT/logs/$1.log") ;;
    slurm) # The warning leaves ten minutes for the last step and a checkpoint; --mem=0 is all of a node's memory.
      options+=(--name "$1" --logs "$OUTPUT/jobs/$1" --warning-seconds 600)
      [[ $LAYOUT == tiny ]] || options+=(--cpus-per-process "$CPUS_PER_GPU" --sbatch=--exclusive --sbatch=--mem=0)
      ;;
  esac
  "$PYTHON" "$ROOT/tools/launch.py" "$LAUNCHER" "${options[@]}" ${LAUNCH[@]+"${LAUNCH[@]}"} -- "$ROOT/$2" "${@:3}"
}

# launch_and_wait NAME PROGRAM FLAGS...: the same for a program that saves no checkpoint, until it has ended.
launch_and_wait() {
  [[ $LAUNCHER == local ]] || LAUNCH=(--no-requeue --wait ${LAUNCH[@]+"${LAUNCH[@]}"})
  launch "$@"
}
