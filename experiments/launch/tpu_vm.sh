#!/usr/bin/env bash
# Train on the TPU VM that this is started on, alone or as one worker of a slice:
#
#   RUN_DIR=gs://BUCKET/RUN experiments/launch/tpu_vm.sh [--dry-run] TASK [FLAG...]
#
# It sets the checkout up, starts or continues the run, restarts it when it dies, and asks it to save and stop when the
# metadata server announces maintenance or preemption. On a slice, tpu_slice.sh runs this on every worker.
#
# RUN_DIR          the run: an address that all workers reach
# PYTHON           a Python 3.11 to 3.14 (python3)
# NOTICE_SECONDS   seconds between two checks for a notice (5)
# MAX_RESTARTS, RESTART_SECONDS   as for until_done.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. experiments/launch/common.sh
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
need RUN_DIR "the run's address, such as gs://BUCKET/RUN"
(($#)) || complain "no task was given: tpu_vm.sh [--dry-run] TASK [FLAG...]"

# The metadata server of Google Compute Engine announces maintenance a minute ahead, and preemption half a minute.
watch_for_notices() {
  local key value
  # Wait, but only as long as the run holds its lock.
  until flock --timeout "${NOTICE_SECONDS:-5}" runs/launch.lock true; do
    for key in maintenance-event preempted; do
      value=$(curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/$key") || continue
      if [[ $value == TERMINATE* || $value == TRUE ]]; then
        echo "the metadata server says $key = $value: saving and stopping" >&2
        kill -TERM "$1"
        return
      fi
    done
  done
}

# Only one run at a time can use the chips. An older one, left over from a broken connection, saves and stops first.
take_over() {
  exec 9>>runs/launch.lock
  if ! flock --nonblock 9; then
    echo "a run is still active here: asking it to save and stop" >&2
    kill -TERM "$(<runs/launch.pid)" || true
    flock --timeout 600 9 || complain "the run that is still active here does not stop: end it, then start again"
  fi
  echo $$ >runs/launch.pid
}

if [[ ${DRY_RUN:-0} != 1 ]]; then
  mkdir -p runs
  take_over
fi
run make setup PYTHON="${PYTHON:-python3}"
run .venv/bin/python -m uv pip install --quiet --python .venv/bin/python --constraints requirements-dev.txt \
  'jax[tpu]' gcsfs
if [[ ${DRY_RUN:-0} != 1 ]]; then
  watch_for_notices $$ 9>&- & # without the lock, which is released when the run ends
fi
run exec experiments/launch/until_done.sh \
  .venv/bin/python -m experiments.train "$@" --run-dir "$RUN_DIR" --resume-or-start
