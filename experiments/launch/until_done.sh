#!/usr/bin/env bash
# Run a command until it is done, and restart it when it fails: until_done.sh COMMAND [ARGUMENT...]
#
# Exit code 0 means done, and 2 a mistake that another try would only repeat; both end this script. So does SIGTERM or
# SIGINT, which is passed on as SIGTERM, so that the command can save first. After any other code, such as 74 for a full
# disk, the command is restarted after RESTART_SECONDS (15), at most MAX_RESTARTS times (1000).
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($#)) || complain "no command was given: until_done.sh COMMAND [ARGUMENT...]"

child='' asked='' interrupted=''
pass_on() {
  asked=1 interrupted=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}
trap pass_on TERM INT

# Run a command to its end and leave its exit code in `code`. A signal makes `wait` return early, so it is repeated.
run_to_the_end() {
  "$@" &
  child=$!
  [[ -z $asked ]] || kill -TERM "$child" # the signal came just before the start
  interrupted=1
  while [[ -n $interrupted ]]; do
    interrupted=''
    wait "$child"
    code=$?
  done
  child=''
}

for ((restarts = 0; ; restarts++)); do
  run_to_the_end "$@"
  if ((code == 0 || code == MISTAKE || restarts >= ${MAX_RESTARTS:-1000})); then
    exit "$code"
  fi
  last=$code
  if [[ -z $asked ]]; then
    echo "$1 ended with code $last: starting it again in ${RESTART_SECONDS:-15} s" >&2
    run_to_the_end sleep "${RESTART_SECONDS:-15}"
  fi
  [[ -z $asked ]] || exit "$last"
done
