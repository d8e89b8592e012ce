#!/bin/bash
set -uo pipefail

# The shared file system.
if ! mountpoint --quiet /storage; then
  apt-get install --yes --quiet nfs-common || (apt-get update --quiet && apt-get install --yes --quiet nfs-common)
  mkdir -p /storage
  until mount -t nfs 10.0.0.2:/runs /storage; do sleep 10; done
fi

gcloud auth configure-docker us-docker.pkg.dev --quiet
until docker pull --quiet us-docker.pkg.dev/project/images/llama4@sha256:0000000000000000000000000000000000000000000000000000000000000000; do sleep 10; done

failures=0
while true; do
  docker rm --force train 2>/dev/null
  # A machine that shuts down stops docker, and docker sends the program SIGTERM.
  docker run --name train --privileged --user 0 --network host --stop-timeout 300 \
    --volume /storage:/storage us-docker.pkg.dev/project/images/llama4@sha256:0000000000000000000000000000000000000000000000000000000000000000 \
    -m llama4_jax.train --config=experiments/pretrain_scout.py --workdir=/storage/scout --config.mesh.dcn_data=2
  status=$?
  case $status in
    0 | 2) break ;;
    42) ;;
    *) failures=$((failures + 1)) ;;
  esac
  if [ "$failures" -gt 3 ]; then break; fi
  echo "ended with status $status; starting again"
  sleep 10
done
echo "ended with status $status"
# To be read by:
#   gcloud compute tpus queued-resources create scout --zone=us-east5-a --project=mine --accelerator-type=v6e-128 --runtime-version=v2-alpha-tpuv6e --node-count=2 --node-prefix=scout --spot --metadata-from-file=startup-script=/dev/stdin
