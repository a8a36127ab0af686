#!/usr/bin/env bash
# with_progress.sh LABEL COMMAND...: runs the command with its output in a log, shows that time passes and the log's
# last line, and prints the log only when the command fails. The exit status is the command's.
set -uo pipefail
label=$1
shift
log=$(mktemp -t neo-build.XXXXXX.log)
"$@" >"$log" 2>&1 </dev/null &
command_pid=$!
trap 'kill "$command_pid" 2>/dev/null; exit 130' INT TERM
started=$SECONDS
shown=0
while kill -0 "$command_pid" 2>/dev/null; do
  sleep 0.2
  elapsed=$((SECONDS - started))
  if [[ -t 1 ]]; then
    printf '\r\033[K%s: %d s  %.80s' "$label" "$elapsed" "$(tail -n 1 "$log" | tr -d '\r')"
  elif ((elapsed >= shown + 10)); then
    shown=$elapsed
    printf '%s: %d s\n' "$label" "$elapsed"
  fi
done
wait "$command_pid"
status=$?
[[ -t 1 ]] && printf '\r\033[K'
if ((status != 0)); then
  cat "$log"
  printf '%s: failed with status %d after %d s\n' "$label" "$status" "$((SECONDS - started))"
else
  printf '%s: done in %d s\n' "$label" "$((SECONDS - started))"
fi
rm -f "$log"
exit "$status"
