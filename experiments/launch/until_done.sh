#!/usr/bin/env bash
# Runs a command until it is done, and again after it has failed: until_done.sh COMMAND [ARGUMENT...]
#
# Exit code 0 means done and 2 a mistake that another try would only repeat; both end it. So does SIGTERM or SIGINT,
# which is passed on as SIGTERM, so that the command can save first. After any other code the command is started again:
# RESTART_SECONDS later (15), at most MAX_RESTARTS times (1000).
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($#)) || complain "no command was given: until_done.sh COMMAND [ARGUMENT...]"

child='' asked='' interrupted=''
pass_on() {
  asked=1 interrupted=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}
trap pass_on TERM INT

# Runs a command to its end, also across signals, which end `wait` before it; its exit code is in `code`.
run_to_the_end() {
  "$@" &
  child=$!
  [[ -z $asked ]] || kill -TERM "$child" # a signal that came just before
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
