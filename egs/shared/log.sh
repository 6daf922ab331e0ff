# Log lines with date and time. Source it: . ../shared/log.sh

log() {
  printf '%s %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" >&2
}
