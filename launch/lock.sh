#!/usr/bin/env bash
# Writes launch/locks/*.txt anew from setup.py's ranges (needs uv): one for each accelerator, for every Python from 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
for accelerator in cpu cuda tpu; do
  extras=(--extra test)
  [ "$accelerator" = cpu ] || extras+=(--extra "$accelerator")
  uv pip compile setup.py "${extras[@]}" --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --upgrade \
    --quiet --output-file "launch/locks/$accelerator.txt"
done
