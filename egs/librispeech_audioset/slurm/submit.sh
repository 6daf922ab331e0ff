#!/usr/bin/env bash
# Send the whole road to SLURM, each part after the one before. Corpora must be prepared (./run.sh --stage -2 --stop-stage -1), best
# checked by `spear preflight`. SBATCH_PARTITION, SBATCH_ACCOUNT and their like in the environment hold for every job.
set -euo pipefail
cd "$(dirname "$0")/.."

shards=16
nodes=1
recipe=${RECIPE:-../../recipes/spear_base.yaml}
corpora=${CORPORA:-conf/corpora.yaml}
data=${DATA:-data}
exp=${EXP:-exp/spear_base}
overrides=()

usage() {
  cat <<USAGE
usage: $0 [--shards N] [--nodes N] [--recipe FILE] [--corpora FILE] [--data DIR] [--exp DIR] [--set a.b=c ...]

  --shards N       jobs that make tokens side by side (default: $shards)
  --nodes N        machines of 8 GPUs for pre-training (default: $nodes)
  --recipe FILE    what is trained (default: RECIPE of the environment; $recipe)
  --corpora FILE   on what (default: CORPORA of the environment; $corpora)
  --data DIR       teachers, manifests, ..., shards (default: DATA of the environment; $data)
  --exp DIR        checkpoints, export, evaluation (default: EXP of the environment; $exp)
  --set a.b=c      override one key of the recipe in every job; repeatable
Paths start from the folder of run.sh.
USAGE
}

wrong() {
  echo "$0: error: $1 (see $0 --help)" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h)
      usage
      exit 0
      ;;
    --*=*)
      option=${1%%=*}
      value=${1#*=}
      shift
      ;;
    *)
      [ $# -ge 2 ] || wrong "$1 is unknown or lacks its value"
      option=$1
      value=$2
      shift 2
      ;;
  esac
  case $option in
    --shards | --nodes) [[ $value =~ ^[1-9][0-9]*$ ]] || wrong "$option must be a number of at least 1, but is '$value'" ;;
    --set) [[ $value == *?=* ]] || wrong "--set must look like a.b=c, but is '$value'" ;;
    *) [ -n "$value" ] || wrong "$option must not be empty" ;;
  esac
  case $option in
    --shards) shards=$value ;;
    --nodes) nodes=$value ;;
    --recipe) recipe=$value ;;
    --corpora) corpora=$value ;;
    --data) data=$value ;;
    --exp) exp=$value ;;
    --set) overrides+=(--set "$value") ;;
    *) wrong "unknown option $option" ;;
  esac
done
options=(--recipe "$recipe" --corpora "$corpora" --data "$data" --exp "$exp" "${overrides[@]}")

first=$(sbatch --parsable slurm/stages.sbatch "${options[@]}" --stage 0 --stop-stage 2)
tokens=$(sbatch --parsable --dependency="afterok:$first" --array="0-$((shards - 1))" ../shared/tokens.sbatch "${options[@]}")
packed=$(sbatch --parsable --dependency="afterok:$tokens" slurm/stages.sbatch "${options[@]}" --stage 4 --stop-stage 4)
trained=$(sbatch --parsable --dependency="afterok:$packed" --nodes="$nodes" ../shared/pretrain.sbatch "${options[@]}")
last=$(sbatch --parsable --dependency="afterok:$trained" slurm/stages.sbatch "${options[@]}" --stage 6 --stop-stage 7)
echo "manifests to quantizers $first, tokens $tokens, shards $packed, pretrain $trained, export and evaluate $last"
