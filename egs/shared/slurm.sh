# How the SLURM jobs of egs/ wait for their processes and are sent again. Source it from the folder of an example, where jobs are sent
# from: . ../shared/slurm.sh
#
#   COMMAND & pids=($!)
#   on_stop 'kill -TERM "${pids[@]}"'
#   wait_for "${pids[@]}"
#   end_job

. "$(dirname "${BASH_SOURCE[0]}")/python.sh"

stopped=
code=0

# on_stop COMMAND: what hands SIGTERM on to the processes of the job, once: a second signal would end them before they have saved.
on_stop() {
  # shellcheck disable=SC2064
  trap "if [ -z \"\$stopped\" ]; then stopped=1; $1 2> /dev/null || true; fi" TERM
}

# Wait for background processes and set `code`: 0, 3 if one was stopped, or the code of one that failed.
wait_for() {
  local pid one
  for pid in "$@"; do
    # a signal ends `wait` before its process: wait again
    while :; do
      wait "$pid" && one=0 || one=$?
      kill -0 "$pid" 2> /dev/null || break
    done
    # SIGTERM before Python was ready for it
    if [ -n "$stopped" ] && [ "$one" = 143 ]; then one=3; fi
    if [ "$one" != 0 ] && { [ "$one" != 3 ] || [ "$code" = 0 ]; }; then code=$one; fi
  done
}

# Send the job again if it was stopped (code 3: everything is saved), else end it with its code.
end_job() {
  local job=$SLURM_JOB_ID
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  if [ "$code" = 3 ]; then exec scontrol requeue "$job"; fi
  exit "$code"
}
