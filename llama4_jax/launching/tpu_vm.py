"""TPU VMs by a queued resource: a script that runs the container at every start of every machine.

The machines know from their metadata server who they are, also of several slices.
"""

import dataclasses
import shlex

from llama4_jax import exit_codes
from llama4_jax.errors import UserError
from llama4_jax.launching.accelerators import TPUS, default_shape
from llama4_jax.launching.job import STORAGE, ContainerJob, OnSlices, Submission


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVmJob(OnSlices, ContainerJob):
    """Attributes:
    zone, project: of Google Cloud; an empty project is gcloud's own setting.
    spot: cheaper machines that may be taken back.
    storage: an NFS export, SERVER:/PATH.
    """

    zone: str
    project: str = ""
    spot: bool = False

    def __post_init__(self):
        super().__post_init__()
        vm_types = [name for name, tpu in TPUS.items() if tpu.vm_name]
        if self.slice.type_name not in vm_types:
            raise UserError(f"--topology={self.topology}: queued resources have {', '.join(vm_types)}; take --target=gke-tpu")
        default = default_shape(self.slice.type_name, self.slice.chips)
        if self.slice.shape != default:
            shape = "x".join(map(str, default))
            raise UserError(f"--topology={self.topology}: queued resources have {self.slice.chips} chips as {shape} alone")
        if ":/" not in self.storage:
            raise UserError(f"--storage={self.storage}: write an NFS export that the machines reach, as SERVER:/PATH")


def startup_script(job: TpuVmJob) -> str:
    """The text that each machine runs as root."""
    return _SCRIPT.format(
        export=shlex.quote(job.storage),
        storage=STORAGE,
        registry=shlex.quote(job.image.partition("/")[0]),
        image=shlex.quote(job.image),
        program=shlex.join(job.program),
        grace=job.grace_seconds,
        max_restarts=job.max_restarts,
        codes=exit_codes,
    )


def submission(job: TpuVmJob) -> Submission:
    """gcloud, with the script as its input."""
    where = (f"--zone={job.zone}", *([f"--project={job.project}"] if job.project else []))
    tpu = job.slice.type
    nodes = (f"--node-id={job.name}",) if job.slices == 1 else (f"--node-count={job.slices}", f"--node-prefix={job.name}")
    first = job.name if job.slices == 1 else f"{job.name}-0"
    gcloud = ("gcloud", "compute", "tpus")
    logs = shlex.join((*gcloud, "tpu-vm", "ssh", first, *where, "--worker=0", "--command=sudo docker logs --follow train"))
    return Submission(
        command=(
            *gcloud,
            "queued-resources",
            "create",
            job.name,
            *where,
            f"--accelerator-type={tpu.vm_name}-{job.slice.chips * tpu.vm_units_per_chip}",
            f"--runtime-version={tpu.vm_runtime}",
            *nodes,
            *(["--spot"] if job.spot else []),
            "--metadata-from-file=startup-script=/dev/stdin",
        ),
        document=startup_script(job),
        afterwards=(
            (shlex.join((*gcloud, "queued-resources", "describe", job.name, *where)), "its state"),
            (logs, "what it prints"),
            (shlex.join((*gcloud, "queued-resources", "delete", job.name, "--force", *where)), "ends it, and what it costs"),
        ),
    )


_SCRIPT = """#!/bin/bash
set -uo pipefail

# The shared file system.
if ! mountpoint --quiet {storage}; then
  apt-get install --yes --quiet nfs-common || (apt-get update --quiet && apt-get install --yes --quiet nfs-common)
  mkdir -p {storage}
  until mount -t nfs {export} {storage}; do sleep 10; done
fi

gcloud auth configure-docker {registry} --quiet
until docker pull --quiet {image}; do sleep 10; done

failures=0
while true; do
  docker rm --force train 2>/dev/null
  # A machine that shuts down stops docker, and docker sends the program SIGTERM.
  docker run --name train --privileged --user 0 --network host --stop-timeout {grace} \\
    --volume {storage}:{storage} {image} \\
    {program}
  status=$?
  case $status in
    {codes.DONE} | {codes.FAILED}) break ;;
    {codes.PREEMPTED}) ;;
    *) failures=$((failures + 1)) ;;
  esac
  if [ "$failures" -gt {max_restarts} ]; then break; fi
  echo "ended with status $status; starting again"
  sleep 10
done
echo "ended with status $status"
"""
