#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them. Arguments go to pytest:
#   ./launch/test.sh                          the suite
#   ./launch/test.sh tests/model -k decode    part of it
#   ./launch/test.sh --run-slow               and the slow matrix
#   ./launch/test.sh --numprocesses=0         in one process
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
enter_environment
if ! cmp -s launch/locks/without_dependencies.txt .venv/without_dependencies.txt; then
  python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement launch/locks/without_dependencies.txt ||
    fail "the installation failed (see above)"
  cp launch/locks/without_dependencies.txt .venv/
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec python -m pytest --numprocesses=2 --dist=loadfile "$@"  # two cores; a file's fixtures stay together
