# Sourced by the other scripts: makes .venv with the locked versions for this machine, once, and enters it.
# PYTHON=... chooses the interpreter; ACCELERATOR=cpu|cuda|tpu overrides what was found.

fail() { echo "error: $*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer found${PYTHON:+ at PYTHON=$PYTHON}; install one, or name it: PYTHON=/path/to/python3 $0"
}

find_accelerator() {
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo cuda
  elif compgen -G '/dev/accel*' >/dev/null || { [ -e /dev/vfio/0 ] && [ -n "${TPU_WORKER_ID:-${TPU_NAME:-}}" ]; }; then
    echo tpu
  else
    echo cpu
  fi
}

enter_environment() {
  local python accelerator lock installed
  python=$(find_python) || exit 1
  accelerator=${ACCELERATOR:-$(find_accelerator)}
  lock=launch/locks/$accelerator.txt
  [ -f "$lock" ] || fail "ACCELERATOR=$accelerator is none of cpu, cuda, tpu"
  installed=.venv/installed.txt
  if ! cmp -s "$lock" "$installed"; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv ||
      fail "$python cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"
    echo "Installing into .venv: $("$python" --version), $accelerator, locked versions (a few minutes, once)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement "$lock" ||
      fail "the installation failed (see above); with a stale .venv, remove it and start again"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . 2>/dev/null ||
      .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . || fail "installing llama4-jax itself failed"
    cp "$lock" "$installed"
  fi
  # shellcheck disable=SC1091
  . .venv/bin/activate
}
