# shellcheck shell=bash
# What the scripts beside it share: variables that must be set, and dry runs. To be sourced; knows no cloud.

# Exit codes of experiments.train.
export MISTAKE=2 STOPPED=75

complain() {
  echo "error: $*" >&2
  exit "$MISTAKE"
}

# need NAME WHAT: ends the script with a sentence if the variable NAME is empty.
need() {
  [[ -n ${!1:-} ]] || complain "$1 is not set: $2"
}

# Runs a command; with DRY_RUN=1 prints it, quoted for a shell, instead.
run() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
