#!/usr/bin/env bash
# The whole road on real recordings: spoken digits and environmental sounds, small enough for two CPU cores.
#
#   git clone https://github.com/Jakobovski/free-spoken-digit-dataset downloads/free-spoken-digit-dataset   # CC BY-SA 4.0
#   git clone https://github.com/karolpiczak/ESC-50 downloads/ESC-50                                        # CC BY-NC 3.0; its ESC-10 part CC BY 3.0
#   ./run.sh
#
# or FSDD=DIR ESC50=DIR ./run.sh where the clones lie elsewhere. The two teachers are trained on the training splits, as in egs/mini.

set -euo pipefail
cd "$(dirname "$0")"

FSDD=${FSDD:-downloads/free-spoken-digit-dataset}
ESC50=${ESC50:-downloads/ESC-50}
stage=-2
stop_stage=7
recipe=../../recipes/fsdd_esc50.yaml
corpora=conf/corpora.yaml
data=data
exp=exp/fsdd_esc50
usage="Stages: -2 corpora, -1 teachers, 0 manifests, 1 features, 2 quantizers, 3 tokens, 4 shards, 5 pretrain, 6 export, 7 evaluate.
Relative paths start from the folder of this script. The environment variables FSDD and ESC50 say where the two clones lie.
The corpora are always made in data/corpus, where conf/corpora.yaml looks for them."
. ../shared/log.sh
. ../shared/parse_options.sh
. ../shared/stages.sh

corpus=data/corpus
options=(--recipe "$recipe" --corpora "$corpora" --data "$data" --exp "$exp" "${overrides[@]}")

digits_cuts=(--cuts-train $corpus/digits/cuts_train.jsonl.gz --cuts-valid $corpus/digits/cuts_valid.jsonl.gz --cuts-test $corpus/digits/cuts_test.jsonl.gz)
sounds_cuts=(--cuts-train $corpus/sounds/cuts_train.jsonl.gz --cuts-valid $corpus/sounds/cuts_valid.jsonl.gz --cuts-test $corpus/sounds/cuts_test.jsonl.gz)

run_stage -2 corpora python local/prepare.py --fsdd "$FSDD" --esc50 "$ESC50" --out $corpus
train_teachers() {
  python ../shared/train_teacher.py --model wavlm --tier word "${digits_cuts[@]}" --steps 800 --batch-size 8 --threads 1 --out "$data/teachers/speech" &
  python ../shared/train_teacher.py --model wav2vec2-bert --label label "${sounds_cuts[@]}" --steps 300 --batch-size 16 --crop-s 3 --threads 1 --out "$data/teachers/audio" &
  together
}
run_stage -1 "two teachers" train_teachers
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
