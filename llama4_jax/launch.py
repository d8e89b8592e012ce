r"""Starts a training run here or hands it to a cluster.

    python -m llama4_jax.launch --target=local --config=experiments/quickstart.py --workdir=runs/a --processes=2 --devices_per_process=2
    python -m llama4_jax.launch --target=gke-tpu --config=experiments/pretrain_scout.py --workdir=/storage/scout \
        --topology=v5p:4x4x8 --image=REGISTRY/llama4:1 --storage=CLAIM --dry_run

`./launch/run.sh` does the same in an environment that it makes; launch/README.md has a guide for each target. --config.FIELD=VALUE goes
to the trainer. --dry_run shows what would be run or submitted. The exit status is the run's with --target=local
(exit_codes.py); elsewhere 0 says that the job was handed over.
"""

import dataclasses
import os
import shutil
import subprocess
import sys

from absl import flags

from llama4_jax import app, exit_codes
from llama4_jax.errors import UserError
from llama4_jax.launching import gke_gpu, gke_tpu, local, slurm, tpu_vm
from llama4_jax.launching.job import Job, Submission

_TARGETS = {
    "local": local.LocalJob,
    "slurm": slurm.SlurmJob,
    "gke-tpu": gke_tpu.GkeTpuJob,
    "gke-gpu": gke_gpu.GkeGpuJob,
    "tpu-vm": tpu_vm.TpuVmJob,
}
_SUBMISSIONS = {
    slurm.SlurmJob: slurm.submission,
    gke_tpu.GkeTpuJob: gke_tpu.submission,
    gke_gpu.GkeGpuJob: gke_gpu.submission,
    tpu_vm.TpuVmJob: tpu_vm.submission,
}

_TARGET = flags.DEFINE_enum("target", None, list(_TARGETS), "where")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "show what would be run or submitted, and do nothing")

# A flag for each field of the jobs; the defaults are the fields' own.
flags.DEFINE_string("config", None, "the trainer's config file; override fields by --config.FIELD=VALUE")
flags.DEFINE_string("workdir", None, "folder of the run, on a file system that all its machines share")
flags.DEFINE_integer("processes", None, "local: processes")
flags.DEFINE_integer("devices_per_process", None, "local: virtual CPU devices of each")
flags.DEFINE_integer("max_restarts", None, "after failures worth another try; preemptions do not count")
flags.DEFINE_integer("grace_seconds", None, "from SIGTERM to SIGKILL: twice what a checkpoint takes, or more")
flags.DEFINE_string("name", None, "clusters: the job's name; the work directory's by default")
flags.DEFINE_integer("nodes", None, "slurm, gke-gpu: machines")
flags.DEFINE_integer("gpus_per_node", None, "slurm: GPUs of a machine; 0: CPUs")
flags.DEFINE_integer("processes_per_node", None, "slurm: one for each GPU (default), or 1")
flags.DEFINE_string("time", None, "slurm: limit of one turn, such as 12:00:00; the job takes another one after it")
flags.DEFINE_list("sbatch", None, "slurm: further options of sbatch, such as --partition=gpu,--account=mine")
flags.DEFINE_string("topology", None, "gke-tpu, tpu-vm: of each slice, such as v5p:4x4x8")
flags.DEFINE_integer("slices", None, "gke-tpu, tpu-vm: slices, joined by the data-centre network")
flags.DEFINE_string("gpu", None, "gke-gpu: type, such as h100")
flags.DEFINE_string("image", None, "gke-tpu, gke-gpu, tpu-vm: container image (launch/Containerfile)")
flags.DEFINE_string("storage", None, "mounted at /storage. gke-*: a PersistentVolumeClaim; tpu-vm: an NFS export SERVER:/PATH")
flags.DEFINE_string("namespace", None, "gke-*: of the cluster")
flags.DEFINE_string("queue", None, "gke-*: a Kueue LocalQueue")
flags.DEFINE_string("zone", None, "tpu-vm: such as us-east5-a")
flags.DEFINE_string("project", None, "tpu-vm: Google Cloud project; gcloud's own setting by default")
flags.DEFINE_bool("spot", None, "tpu-vm: cheaper machines that may be taken back")


def main(overrides: dict[str, str]) -> int:
    if _TARGET.value is None:
        raise UserError(f"--target is needed: one of {', '.join(_TARGETS)}")
    job = make_job(_TARGET.value, overrides)
    experiment = app.load_experiment(job.config, overrides)
    from llama4_jax.launching.check import check_mesh  # after the flags: a misspelt one answers at once

    check_mesh(job, experiment)
    if isinstance(job, local.LocalJob):
        return run_here(job)
    return submit(_SUBMISSIONS[type(job)](job))


def make_job(target: str, overrides: dict[str, str]) -> Job:
    """The target's job from the flags that were given.

    Raises:
        UserError: a flag that the target does not know or that it needs, or a value that cannot be.
    """
    kind = _TARGETS[target]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = {name: flags.FLAGS[name].value for name in _flag_names() if flags.FLAGS[name].value is not None}
    for name in given:
        if name not in fields:
            owners = [other for other, job in _TARGETS.items() if name in {field.name for field in dataclasses.fields(job)}]
            raise UserError(f"--{name} means nothing to --target={target}; it belongs to {', '.join(owners)}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in given:
            raise UserError(f"--{name} is needed with --target={target}: {flags.FLAGS[name].help}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if kind is slurm.SlurmJob:
        values["python"] = sys.executable
    return kind(**values, overrides=tuple(f"--config.{name}={text}" for name, text in overrides.items()))


def _flag_names() -> list[str]:
    return [flag.name for flag in flags.FLAGS.get_key_flags_for_module(__name__) if flag.name not in ("target", "dry_run")]


def run_here(job: local.LocalJob) -> int:
    command = (sys.executable, *job.program)
    if not _DRY_RUN.value:
        return local.run(job, command)
    for told in local.environments(job, port="PORT"):
        print(" ".join(f"{name}={value}" for name, value in told.items()), *command)
    return exit_codes.DONE


def submit(submission: Submission) -> int:
    if _DRY_RUN.value:
        print(submission, end="")
        return exit_codes.DONE
    program = submission.command[0]
    if shutil.which(program) is None:
        raise UserError(f"{program} is not on this machine; install it, go where it is, or look at what --dry_run shows")
    if submission.folder is not None:
        os.makedirs(submission.folder, exist_ok=True)
    if subprocess.run(submission.command, input=submission.document, text=True).returncode:
        raise UserError(f"{program} refused the job (see above)")
    for command, purpose in submission.afterwards:
        print(f"{command}  # {purpose}")
    return exit_codes.DONE


if __name__ == "__main__":
    app.run(main)
