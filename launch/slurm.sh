#!/usr/bin/env bash
#SBATCH --job-name=cloc
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@300
#SBATCH --requeue
# One process a GPU, as JAX expects under SLURM, from which it reads the rest. The TERM five minutes before the end saves, and the
# requeued job goes on from there:
#   EXTRAS=cuda sbatch --nodes=4 --time=24:00:00 launch/slurm.sh --config configs/cloc_b16.py:DATA --workdir RUN
# RUN and DATA lie where all nodes see them. Further arguments go to `cloc train`.
# sbatch copies this script away; the repository is where it was submitted from.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
export EXTRAS="${EXTRAS:-cuda}"
source launch/setup_env.sh
exec srun --kill-on-bad-exit=1 .venv/bin/cloc train --coordinator=auto "$@"
