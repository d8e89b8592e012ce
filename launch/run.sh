#!/usr/bin/env bash
# Starts a training run here or hands it to a cluster; launch/README.md has a guide for each target.
#   ./launch/run.sh --target=local --config=experiments/quickstart.py --workdir=runs/two --processes=2 --devices_per_process=2
#   ./launch/run.sh --target=slurm --config=experiments/pretrain_scout.py --workdir=runs/scout --nodes=16 --gpus_per_node=8 --dry_run
# ACCELERATOR=cuda makes the environment for GPUs on a login node that has none.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
enter_environment
exec python -m llama4_jax.launch "$@"
