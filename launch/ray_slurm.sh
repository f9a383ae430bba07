#!/usr/bin/env bash
#SBATCH --job-name=cloc-label
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --requeue
# A Ray cluster of the job's nodes, and `cloc label` on it. A requeued job goes on where it stopped:
#   sbatch --nodes=4 --time=24:00:00 launch/ray_slurm.sh --input DATA --out LABELS --config configs/vesl_owlv2.py \
#     --config.pools.captioner.size=30 --config.pools.captioner.num_gpus=1 \
#     --config.pools.detector.size=2 --config.pools.detector.num_gpus=1
# DATA, LABELS and the repository lie where all nodes see them. Arguments go to `cloc label`.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
export EXTRAS="${EXTRAS:-label}"
source launch/setup_env.sh
# Every user's clusters, and those of several jobs on one node, need ports and folders of their own.
port=$((20000 + SLURM_JOB_ID % 20000))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
address="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | cut -d' ' -f1):$port"
export RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
# Other users share the network.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
common=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --block)

srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
  .venv/bin/ray start --head --node-ip-address="${address%:*}" --port="$port" --include-dashboard=false "${common[@]}" &
sleep 20  # workers that come before the head would give up
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --overlap --exclude="$head" \
    .venv/bin/ray start --address="$address" "${common[@]}" &
fi
status=0
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
  .venv/bin/cloc label --runner ray --ray-address "$address" "$@" || status=$?
kill $(jobs -p) 2>/dev/null || true
exit "$status"
