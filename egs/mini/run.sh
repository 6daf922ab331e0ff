#!/usr/bin/env bash
# The whole road with no download, no GPU and no account: two synthetic corpora, two small teachers, one student, its report.
# Made for two CPU cores; `./run.sh --help` lists the options. A second run does nothing, a killed one goes on where it was.
# Recipes with other teachers, or none, want data of their own: ./run.sh --recipe ../../recipes/delulu_mini.yaml --data data/delulu_mini --exp exp/delulu_mini

set -euo pipefail
cd "$(dirname "$0")"

stage=-2
stop_stage=7
recipe=../../recipes/mini.yaml
corpora=conf/corpora.yaml
data=data
exp=exp/mini
usage="Stages: -2 corpus, -1 teachers (those that the recipe names), 0 manifests, 1 features, 2 quantizers, 3 tokens, 4 shards, 5 pretrain, 6 export, 7 evaluate.
Relative paths start from the folder of this script. The synthetic corpora are always made in data/corpus, where conf/corpora.yaml looks for them."
. ../shared/log.sh
. ../shared/parse_options.sh
. ../shared/stages.sh

corpus=data/corpus
options=(--recipe "$recipe" --corpora "$corpora" --data "$data" --exp "$exp" "${overrides[@]}")

speech_cuts=(--cuts-train $corpus/speech/cuts_train.jsonl.gz --cuts-valid $corpus/speech/cuts_valid.jsonl.gz --cuts-test $corpus/speech/cuts_test.jsonl.gz)
sounds_cuts=(--cuts-train $corpus/sounds/cuts_train.jsonl.gz --cuts-valid $corpus/sounds/cuts_valid.jsonl.gz --cuts-test $corpus/sounds/cuts_test.jsonl.gz)

run_stage -2 "corpus of speech" python local/make_speech.py --config conf/corpus.yaml --out $corpus/speech
run_stage -2 "corpus of sounds" python local/make_sounds.py --config conf/corpus.yaml --out $corpus/sounds
# on two cores, two trainings of one thread each end sooner than one after the other on two threads
train_teachers() {
  train_teacher speech --model wavlm --tier phone "${speech_cuts[@]}" --steps 600 --batch-size 12 --threads 1 &
  train_teacher audio --model wav2vec2-bert --label label "${sounds_cuts[@]}" --steps 400 --threads 1 &
  train_teacher speaker --model wav2vec2-bert --speaker "${speech_cuts[@]}" --steps 250 --threads 1 &
  together
}
run_stage -1 "the recipe's small teachers" train_teachers
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
