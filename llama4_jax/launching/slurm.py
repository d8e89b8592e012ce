"""SLURM: one sbatch file, whose script starts the processes with srun and asks for another turn where that helps."""

import dataclasses
import shlex

from llama4_jax import exit_codes
from llama4_jax.errors import UserError
from llama4_jax.launching.job import ClusterJob, Submission, require_at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmJob(ClusterJob):
    """Attributes:
    nodes, gpus_per_node: machines.
    processes_per_node: one for each GPU, or one for all; on CPUs as many as are wanted, with a device each. 0: as many as GPUs.
    time: limit of one turn, in SLURM's notation.
    sbatch: further options of sbatch as they are, such as --partition=gpu.
    python: the environment's interpreter. It, the folder of submission and the work directory are where every node sees them.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int = 0
    time: str = "24:00:00"
    sbatch: tuple[str, ...] = ()
    python: str = "python"

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, self, "nodes")
        require_at_least(0, self, "gpus_per_node", "processes_per_node")
        if self.gpus_per_node and self.processes_per_node not in (0, 1, self.gpus_per_node):
            raise UserError(
                f"--processes_per_node={self.processes_per_node}: {self.gpus_per_node} GPUs are given to one process, or to one each"
            )
        for option in self.sbatch:
            if not option.startswith("-") or "\n" in option:
                raise UserError(f"--sbatch={option}: write options of sbatch, separated by commas, such as --partition=gpu")

    @property
    def tasks_per_node(self) -> int:
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def devices(self) -> int:
        return self.nodes * (self.gpus_per_node or self.tasks_per_node)


def sbatch_file(job: SlurmJob) -> str:
    """The text that sbatch reads."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        f"--time={job.time}",
        f"--signal=TERM@{job.grace_seconds}",
        "--requeue",
        "--open-mode=append",
        f'--output="{job.workdir}/slurm-%j.txt"',
        *job.sbatch,
    ]
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in options),
        failures=shlex.quote(job.workdir) + "/slurm-$SLURM_JOB_ID.failures",
        python=shlex.quote(job.python),
        program=shlex.join(job.program),
        grace=job.grace_seconds,
        max_restarts=job.max_restarts,
        codes=exit_codes,
    )


def submission(job: SlurmJob) -> Submission:
    """sbatch, with the file as its input."""
    return Submission(
        command=("sbatch", "--parsable"),
        document=sbatch_file(job),
        folder=job.workdir,
        afterwards=(
            (f"tail -f {shlex.quote(job.workdir)}/slurm-*.txt", "what it prints"),
            (f"scancel --signal=TERM --name={job.name}", "saves, and waits for another turn"),
            (f"scancel --name={job.name}", "ends it"),
        ),
    )


# The processes find one another by what srun tells each (parallel/processes.py). srun's status is the highest of its tasks';
# tasks are not ended at the first that fails, which would hide its status behind their signals: they have --wait seconds.
# SLURM may signal the shell as well: the trap keeps it alive, and as srun runs in the foreground, its status comes first.
_SCRIPT = """#!/bin/bash
{options}
set -uo pipefail
trap : TERM

srun --kill-on-bad-exit=0 --wait={grace} \\
  {python} {program}
status=$?

failures={failures}
case $status in
  {codes.DONE}) exit {codes.DONE} ;;
  {codes.FAILED}) exit {codes.FAILED} ;;
  {codes.PREEMPTED}) ;;
  *)
    echo "$status" >>"$failures"
    if [ "$(wc -l <"$failures")" -gt {max_restarts} ]; then
      echo "ended with status $status after {max_restarts} restarts" >&2
      exit "$status"
    fi
    ;;
esac
echo "ended with status $status; asking for another turn" >&2
scontrol requeue "$SLURM_JOB_ID" || exit "$status"
"""
