#!/usr/bin/env bash
# Train on all workers of a TPU slice, started from any machine that has gcloud and stays on:
#
#   experiments/launch/tpu_slice.sh [--dry-run] TASK [FLAG...]
#   experiments/launch/tpu_slice.sh --stop        let the run save and stop
#
# It creates the slice if there is none, copies the commit that is checked out, and runs tpu_vm.sh on every worker. When
# the run dies, it is resumed, on a new slice if the old one was preempted. Ctrl-C saves and stops.
#
# TPU_NAME, PROJECT, ZONE   the slice
# ACCELERATOR_TYPE          such as v5p-128
# RUNTIME_VERSION           its image, such as v2-alpha-tpuv5
# RUN_DIR                   the run: gs://BUCKET/RUN
# SPOT=1                    a slice of spot VMs
# SSH_FLAGS                 more flags for gcloud's ssh and scp, separated by spaces
# PYTHON                    as for tpu_vm.sh;  MAX_RESTARTS, RESTART_SECONDS as for until_done.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"
need TPU_NAME "the name of the slice"
need PROJECT "the Google Cloud project that the slice belongs to"
need ZONE "the zone of the slice"
read -ra ssh_flags <<<"${SSH_FLAGS:-}"

tpu() {
  run gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE"
}

on_all_workers() {
  tpu ssh "$TPU_NAME" --worker=all --command="$1" "${ssh_flags[@]}"
}

stop() {
  # shellcheck disable=SC2016  # for the shell of the worker
  on_all_workers 'kill -TERM "$(cat rspo_jax/runs/launch.pid)"' || true
}

create() {
  local spot=()
  [[ ${SPOT:-0} != 1 ]] || spot=(--spot)
  tpu create "$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" "${spot[@]}"
}

# Print the slice's state; nothing if there is no slice.
state() {
  [[ ${DRY_RUN:-0} == 1 ]] || tpu describe "$TPU_NAME" --format='value(state)' 2>/dev/null || true
}

make_slice() {
  case $(state) in
    READY) ;;
    '') create ;;
    STOPPED) tpu start "$TPU_NAME" ;;
    CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING)
      echo "the slice is not ready yet" >&2
      return 1
      ;;
    *)
      tpu delete "$TPU_NAME" --quiet
      create
      ;;
  esac
}

# Copy the commit that is checked out to every worker.
copy_code() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git -C "$here/../.." diff --quiet HEAD || echo "note: uncommitted changes are not copied to the slice" >&2
  git -C "$here/../.." archive --format=tar.gz --output="$archive" HEAD
  tpu scp "$archive" "$TPU_NAME:rspo_jax.tar.gz" --worker=all "${ssh_flags[@]}"
  rm "$archive"
}

# Create the slice, copy the code and train, once. The workers must not restart by themselves: a worker whose machine
# is gone could not, and the others would wait for it.
once() {
  local command="mkdir -p rspo_jax && tar -xzf rspo_jax.tar.gz -C rspo_jax && cd rspo_jax &&"
  command+=$(printf ' %q' env "RUN_DIR=$RUN_DIR" "PYTHON=${PYTHON:-python3}" MAX_RESTARTS=0 \
    experiments/launch/tpu_vm.sh "$@")
  make_slice
  copy_code
  trap 'trap "" TERM INT; stop; wait; exit "$STOPPED"' TERM INT
  on_all_workers "$command" &
  wait $!
}

case ${1:-} in
  --stop) stop ;;
  --once)
    shift
    once "$@"
    ;;
  *)
    need ACCELERATOR_TYPE "the type and size of the slice, such as v5p-128"
    need RUNTIME_VERSION "the image of the slice's machines, such as v2-alpha-tpuv5"
    need RUN_DIR "the run's address, such as gs://BUCKET/RUN"
    if [[ ${1:-} == --dry-run ]]; then
      shift
      export DRY_RUN=1
    fi
    (($#)) || complain "no task was given: tpu_slice.sh [--dry-run] TASK [FLAG...]"
    exec "$here/until_done.sh" "$here/tpu_slice.sh" --once "$@"
    ;;
esac
