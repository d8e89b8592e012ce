"""Doing a step of a run again, to find hardware that computes wrongly.

The same program on the same state and batch gives the same bits, every time. Where it does not, a device is at fault, and the
checksums of what each device holds say which.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.config import Experiment, validated
from llama4_jax.errors import UserError
from llama4_jax.parallel import processes
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import use_mesh
from llama4_jax.training.replicas import Replicas
from llama4_jax.training.trainer import Trainer
from llama4_jax.training.work_directory import WorkDirectory


@dataclass
class Replay:
    """A step, done twice from one checkpoint.

    Attributes:
        start: the checkpoint's step; 0: the state before the first.
        step: the one in question.
        loss: at `step`, of each time.
        first_difference: the first step after `start` whose loss or gradient norm differed; None: none did.
        differing: arrays of the state after `step` whose bits differ, and the devices that hold such.
        logged: the loss that metrics.jsonl has for the step; None where it was not logged.
    """

    start: int
    step: int
    loss: tuple[float, float]
    first_difference: int | None
    differing: dict[str, list[str]]
    logged: float | None

    @property
    def agrees(self) -> bool:
        """Whether all bits were the same, the logged loss included."""
        return not self.differing and self.first_difference is None and self.logged in (None, self.loss[0])

    def __str__(self) -> str:
        lines = [f"steps {self.start + 1} to {self.step} were done twice, from the state of step {self.start}"]
        if self.first_difference is not None:
            lines.append(f"loss or gradient norm differ from step {self.first_difference} on")
        if self.differing:
            lines += [f"{path} differs on {', '.join(devices)}" for path, devices in self.differing.items()]
        else:
            lines.append("all bits of the state after them agree")
        logged = "it was not logged" if self.logged is None else f"{self.logged!r} was logged"
        lines.append(f"loss of step {self.step}: {self.loss[0]!r} and {self.loss[1]!r}; {logged}")
        if self.logged is not None and self.logged != self.loss[0] == self.loss[1]:
            lines.append(
                "another mesh, machine or version of jax gives other last digits; on the same ones, a device was wrong"
            )
        return "\n".join(lines)


def replay_step(experiment: Experiment, workdir: str | Path, step: int, *, progress: bool = True) -> Replay:
    """Does the steps after the newest checkpoint below `step`, up to it, twice. Leaves the run as it is.

    Raises:
        UserError: no run in `workdir`, one of another experiment, or a step that it does not have; or the run goes on, and has
            deleted the checkpoint between the two times.
    """
    experiment = validated(experiment)
    if not (Path(workdir) / "experiment.json").exists():
        raise UserError(f"--replay_step: {workdir} holds no run; give its --workdir")
    if not 1 <= step <= experiment.steps:
        raise UserError(f"--replay_step={step} must lie between 1 and the run's {experiment.steps} steps")
    mesh = make_mesh(experiment.mesh)
    run = WorkDirectory(workdir, experiment, read_only=True)
    opened = RunCheckpoints(run.checkpoints, experiment.checkpoint, read_only=True)  # the run may be going on meanwhile
    with contextlib.closing(opened) as checkpoints, use_mesh(mesh):
        trainer = Trainer(experiment, run, mesh, show=progress and processes.is_first())
        replicas = Replicas(mesh, trainer.state_shape)
        train_step, values, sums, start = None, [], [], None
        for _ in range(2):
            state = trainer.restore(checkpoints, below=step)
            if start not in (None, int(state.step)):
                raise UserError(
                    f"--replay_step={step}: the run went on and deleted its checkpoint of step {start} meanwhile; try again"
                )
            start = int(state.step)
            values.append([])
            for done in range(start, step):
                batch = trainer.next_batch(done)
                train_step = train_step or trainer.compile(state, batch)
                state, metrics = train_step(state, batch)
                values[-1].append([float(x) for x in jax.device_get((metrics["loss"], metrics["grad_norm"]))])
            sums.append(replicas.checksums(state))
            del state  # for its memory
    one, two = values
    unequal = (i for i in range(step - start) if not np.array_equal(one[i], two[i], equal_nan=True))
    first = next(unequal, None)
    return Replay(
        start=start,
        step=step,
        loss=(one[-1][0], two[-1][0]),
        first_difference=None if first is None else start + first + 1,
        differing=replicas.differences(*sums),
        logged=next((r["loss"] for r in run.read_metrics() if r["step"] == step and "loss" in r), None),
    )
