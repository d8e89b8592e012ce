#!/usr/bin/env bash
# Installs locked versions into .venv (once) and pretrains a small Llama 4 on the text that this Python carries.
# Run again, it goes on where it was, or says that it is done. Flags go to the trainer:
#   ./launch/quickstart.sh --workdir=runs/other --config.optimizer.learning_rate=1e-3
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
enter_environment
# XLA:CPU spends a quarter of a small step on page faults; huge pages for malloc save them. glibc reads this at start-up.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec python -m llama4_jax.train --config=experiments/quickstart.py --workdir=runs/quickstart "$@"
