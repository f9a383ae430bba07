#!/usr/bin/env bash
# Trains on a TPU VM or pod slice: runs the same command on every worker, from your own machine.
#   TPU=my-v5p ZONE=us-east5-a REPO=https://… launch/tpu_vm.sh --config configs/cloc_b16.py:/mnt/bucket/data --workdir /mnt/bucket/run
# REPO: what the workers clone (default: this checkout's origin); BRANCH: default the current one. Needs gcloud, signed in.
# Further arguments go to `cloc train`. Run it again to resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${TPU:?set TPU to the name of the TPU VM or slice}" "${ZONE:?set ZONE, e.g. us-east5-a}"
REPO="${REPO:-$(git remote get-url origin)}"
BRANCH="${BRANCH:-$(git rev-parse --abbrev-ref HEAD)}"
arguments="$(printf '%q ' "$@")"
remote="set -e; [ -d cloc_jax ] || git clone $(printf '%q' "$REPO") cloc_jax; cd cloc_jax; git fetch -q origin
git checkout -q $(printf '%q' "$BRANCH"); git pull -q --ff-only; EXTRAS=tpu source launch/setup_env.sh
exec .venv/bin/cloc train --coordinator=auto $arguments"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "bash -c $(printf '%q' "$remote")"
