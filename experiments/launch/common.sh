# shellcheck shell=bash
# Shared by the scripts in this folder, which source it: required variables, and dry runs.

# Exit codes of experiments.train.
export MISTAKE=2 STOPPED=75

complain() {
  echo "error: $*" >&2
  exit "$MISTAKE"
}

# need NAME WHAT: end the script with a message if the variable NAME is empty.
need() {
  [[ -n ${!1:-} ]] || complain "$1 is not set: $2"
}

# Run a command; with DRY_RUN=1, print it instead, quoted for a shell.
run() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
