#!/usr/bin/env bash
# Speaker-aware targets on VoxCeleb: ReDimNet's frames, their clusters, a student that predicts them, and the trials O, E and H (and SITW).
#
#   VOX1=DIR VOX2=DIR LISTS=DIR [SITW=DIR] [MUSAN=DIR] [META="vox1_meta.csv vox2_meta.csv"] ./run.sh
#
# README.md says how these folders look. ReDimNet's weights and code: data/redimnet/, see README.md.

set -euo pipefail
cd "$(dirname "$0")"

VOX1=${VOX1:-downloads/voxceleb1}
VOX2=${VOX2:-downloads/voxceleb2/dev}
LISTS=${LISTS:-downloads/lists}
stage=-2
stop_stage=7
recipe=conf/delulu_base.yaml
corpora=conf/corpora.yaml
if [ -n "${MUSAN:-}" ]; then corpora=conf/corpora_musan.yaml; fi
data=data
exp=exp/delulu_base
usage="Stages: -2 manifests of the corpora and lists of trials, 0 manifests, 1 features, 2 quantizers, 3 tokens, 4 shards, 5 pretrain, 6 export,
7 evaluate. Relative paths start from the folder of this script. The environment variables VOX1, VOX2, LISTS, SITW, MUSAN and META say where things lie."
. ../shared/log.sh
. ../shared/parse_options.sh
. ../shared/stages.sh

corpus=data/corpus
options=(--recipe "$recipe" --corpora "$corpora" --data "$data" --exp "$exp" "${overrides[@]}")
prepare=(--vox1 "$VOX1" --vox2 "$VOX2" --lists "$LISTS" --out "$corpus")
if [ -n "${SITW:-}" ]; then prepare+=(--sitw "$SITW"); else options+=(--set evaluation.tasks.sitw=null); fi
[ -f "$LISTS/list_test_all2.txt" ] || options+=(--set evaluation.tasks.vox1_e=null)
[ -f "$LISTS/list_test_hard2.txt" ] || options+=(--set evaluation.tasks.vox1_h=null)
if [ -n "${META:-}" ]; then
  read -r -a meta <<<"$META"
  prepare+=(--meta "${meta[@]}")
else
  options+=(--set evaluation.tasks.gender=null)
fi

run_stage -2 "manifests and trials of VoxCeleb" python local/prepare.py "${prepare[@]}"
run_stage 0 manifests spear manifests "${options[@]}"
run_stage 1 features spear features "${options[@]}"
run_stage 2 quantizers spear quantizers "${options[@]}"
run_stage 3 tokens spear tokens "${options[@]}"
run_stage 4 shards spear shards "${options[@]}"
run_stage 5 pretrain spear pretrain "${options[@]}"
run_stage 6 export spear export "${options[@]}"
run_stage 7 evaluate spear evaluate "${options[@]}"
log "Finished stages $stage to $stop_stage; results are in $exp"
if [ "$stop_stage" -ge 7 ]; then echo "$(cd "$exp" && pwd)/evaluate/report.html"; fi
