# How a run.sh runs its stages. Source it after parse_options.sh and log.sh: . ../shared/stages.sh
#
#   run_stage 3 tokens spear tokens "${options[@]}"
#
# runs the command if 3 lies between $stage and $stop_stage, after a log line. A signal that reaches run.sh is passed on to the
# command, which saves its state; run.sh ends when the command has ended, with its exit code.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# PYTHON and SPEAR choose another interpreter or command.
. "$_root/egs/shared/python.sh"

python() {
  exec "$PYTHON" "$@"
}

spear() {
  if [ -n "${SPEAR:-}" ]; then exec "$SPEAR" "$@"; fi
  exec "$PYTHON" -m spear "$@"
}

_child=

_stop() {
  trap '' INT TERM
  if [ -n "$_child" ]; then
    log "Signal: waiting for the stage to stop"
    kill -TERM "$_child" 2>/dev/null || true
    code=0
    wait "$_child" || code=$?
    exit "$code"
  fi
  exit 3
}
trap _stop INT TERM

run_stage() {
  local number=$1 word=$2 code=0
  shift 2
  if [ "$number" -lt "$stage" ] || [ "$number" -gt "$stop_stage" ]; then return 0; fi
  log "Stage $number: $word"
  "$@" &
  _child=$!
  wait "$_child" || code=$?
  _child=
  if [ "$code" -ne 0 ]; then
    log "Stage $number: $word ended with exit code $code; run the same command again to go on"
    exit "$code"
  fi
}

# Wait for all background jobs of a stage that is a function, e.g. two trainings on one thread each; a signal goes to every one.
together() {
  local code=0 pid
  trap 'kill -TERM $(jobs -p) 2>/dev/null' INT TERM
  for pid in $(jobs -p); do wait "$pid" || code=$?; done
  return "$code"
}

# train_teacher NAME OPTIONS...: train the small teacher DATA/teachers/NAME if a teacher of the recipe, with its overrides, is that folder.
train_teacher() {
  local name=$1 code=0 recipe_overrides=() item
  shift
  for item in "${overrides[@]}"; do [ "$item" = --set ] || recipe_overrides+=("$item"); done
  "$PYTHON" "$_root/egs/shared/needs_teacher.py" "$recipe" "teachers/$name" "${recipe_overrides[@]}" || code=$?
  if [ "$code" -eq 1 ]; then return 0; fi
  if [ "$code" -ne 0 ]; then return "$code"; fi
  python "$_root/egs/shared/train_teacher.py" "$@" --out "$data/teachers/$name"
}
