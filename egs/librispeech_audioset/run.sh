#!/usr/bin/env bash
# The full-size road: LibriSpeech and Libriheavy, AudioSet, VGGSound and FSD50K, MUSAN as noise; a cluster's work. See README.md.

set -euo pipefail
cd "$(dirname "$0")"

DOWNLOADS=${DOWNLOADS:-downloads}
stage=-2
stop_stage=7
recipe=../../recipes/spear_base.yaml
corpora=conf/corpora.yaml
data=data
exp=exp/spear_base
usage="Stages: -2 downloads (LibriSpeech and MUSAN), -1 corpora, 0 manifests, 1 features, 2 quantizers, 3 tokens, 4 shards, 5 pretrain,
6 export, 7 evaluate. Relative paths start from the folder of this script. The environment variable DOWNLOADS says where the sets lie;
corpora are made in data/corpus from those that are there: keep only these in conf/corpora.yaml, where MUSAN is looked for in downloads,
or in a file of your own (--corpora). The other sets have to be fetched by hand, see README.md. slurm/submit.sh sends the stages to a
cluster instead."
. ../shared/log.sh
. ../shared/parse_options.sh
. ../shared/stages.sh

options=(--recipe "$recipe" --corpora "$corpora" --data "$data" --exp "$exp" "${overrides[@]}")

downloads() {
  "$PYTHON" - "$DOWNLOADS" <<'PY'
import sys

from lhotse.recipes import download_librispeech, download_musan

download_librispeech(sys.argv[1], dataset_parts="librispeech")
download_musan(sys.argv[1])
PY
}

make_corpora() {
  local out=data/corpus name alignments=()
  if [ -d "$DOWNLOADS/LibriSpeech-Alignments" ]; then alignments=(--alignments "$DOWNLOADS/LibriSpeech-Alignments"); fi
  if [ -d "$DOWNLOADS/LibriSpeech" ]; then
    "$PYTHON" local/prepare_speech.py librispeech --root "$DOWNLOADS/LibriSpeech" "${alignments[@]}" --out $out/librispeech
  fi
  if [ -d "$DOWNLOADS/libriheavy" ]; then
    "$PYTHON" local/prepare_speech.py libriheavy --root "$DOWNLOADS/libriheavy" --audio "$DOWNLOADS" --out $out/libriheavy
  fi
  for name in audioset vggsound fsd50k esc50 mtg_jamendo music4all freesound; do
    if [ -d "$DOWNLOADS/$name" ]; then "$PYTHON" local/prepare_tagged.py "$name" --root "$DOWNLOADS/$name" --out "$out/$name"; fi
  done
}

run_stage -2 downloads downloads
run_stage -1 corpora make_corpora
run_stage 0 manifests spear manifests "${options[@]}"
run_stage 1 features spear features "${options[@]}"
run_stage 2 quantizers spear quantizers "${options[@]}"
run_stage 3 tokens spear tokens "${options[@]}"
run_stage 4 shards spear shards "${options[@]}"
run_stage 5 pretrain spear pretrain "${options[@]}"
run_stage 6 export spear export "${options[@]}"
tasks=()
if [ "$stop_stage" -ge 7 ]; then
  keys=()
  for item in "${overrides[@]}"; do [ "$item" = --set ] || keys+=("$item"); done
  found=$("$PYTHON" local/tasks.py "$recipe" "$corpora" "$data" "${keys[@]}")
  if [ -n "$found" ]; then mapfile -t tasks <<<"$found"; fi
fi
run_stage 7 evaluate spear evaluate "${options[@]}" "${tasks[@]}"
log "Finished stages $stage to $stop_stage; results are in $exp"
