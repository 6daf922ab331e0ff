#!/usr/bin/env bash
# Send the whole road to SLURM, each part after the one before: ./slurm/submit.sh [--shards N]
# Corpora must be prepared (./run.sh --stage -2 --stop-stage -1), best checked by `spear preflight`. The environment variables
# RECIPE, DATA, EXP and CORPORA take the place of the defaults.
set -euo pipefail
cd "$(dirname "$0")/.."

shards=16
if [ "${1:-}" = --shards ]; then shards=$2; fi
recipe=${RECIPE:-../../recipes/spear_base.yaml}
data=${DATA:-data}
exp=${EXP:-exp/spear_base}
corpora=${CORPORA:-conf/corpora.yaml}
options=(--recipe "$recipe" --corpora "$corpora" --data "$data" --exp "$exp" --set sampling.weights=hours)
road=(--recipe "$recipe" --data "$data" --exp "$exp")

first=$(sbatch --parsable slurm/stages.sbatch "${road[@]}" --stage 0 --stop-stage 2)
tokens=$(sbatch --parsable --dependency="afterok:$first" --array="0-$((shards - 1))" ../shared/tokens.sbatch "${options[@]}")
packed=$(sbatch --parsable --dependency="afterok:$tokens" slurm/stages.sbatch "${road[@]}" --stage 4 --stop-stage 4)
trained=$(sbatch --parsable --dependency="afterok:$packed" slurm/pretrain.sbatch "${options[@]}")
last=$(sbatch --parsable --dependency="afterok:$trained" slurm/stages.sbatch "${road[@]}" --stage 6 --stop-stage 7)
echo "manifests to quantizers $first, tokens $tokens, shards $packed, pretrain $trained, export and evaluate $last"
