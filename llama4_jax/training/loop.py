"""A training run, from an Experiment and a folder to a trained model; interrupted at any moment, it goes on where it was."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.config import Experiment, validated
from llama4_jax.evaluation import require_known
from llama4_jax.model.low_precision import check_hardware
from llama4_jax.parallel import processes
from llama4_jax.parallel.fit import check_fit
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import use_mesh
from llama4_jax.training.recorder import FlightRecorder
from llama4_jax.training.sitting import Sitting, TrainResult, last_evaluations
from llama4_jax.training.stopping import StopRequest
from llama4_jax.training.watchdog import Watchdog
from llama4_jax.training.work_directory import WorkDirectory


def train(
    experiment: Experiment,
    workdir: str | Path,
    *,
    progress: bool = True,
    leave: Callable[[str], None] | None = None,
    startup_seconds: float = 0.0,
) -> TrainResult:
    """Trains, or goes on training, in `workdir`.

    The folder receives experiment.json, sharding.txt, metrics.jsonl, events.jsonl, tensorboard/, checkpoints/, loss.png and
    expert_load.png (and profile/, where a trace was asked for). A run that is started
    again goes on from its newest checkpoint, bit for bit as if it had never stopped (on the same mesh and machine).

    Of several processes (see parallel/processes.py) each calls this with the same arguments, on storage that all share.

    Args:
        experiment: what to do.
        workdir: the run's folder.
        progress: whether to tell on the terminal how it goes.
        leave: ends the process; called from another thread with a signal's line when it came before the first step, as in a
            long compilation. None: the signal is answered after it.
        startup_seconds: that the process has spent before this call, for the flight recorder.

    Raises:
        UserError: bad input, a folder of another experiment, no checkpoint that can be read where there should be one, a
            disk that refuses, or a run that diverges also after it went back.
        ReplicasDiffer: devices hold different copies of the state.
    """
    begin = time.monotonic() - startup_seconds
    experiment = validated(experiment)
    for name, config in experiment.evaluations.items():
        require_known(name, config)
    mesh = make_mesh(experiment.mesh)
    check_hardware(experiment.execution.matmul, mesh.devices.flat[0].device_kind)
    check_fit(mesh, experiment.model, experiment.execution, experiment.data)
    run = WorkDirectory(workdir, experiment)
    recorder = FlightRecorder(run.folder)

    def leave_at(signal: str) -> None:
        recorder.record("stop", why=signal)
        leave(f"{signal}: stopped before the first step, with nothing to save; run again to go on")

    with (
        contextlib.closing(recorder),
        StopRequest(leave_at if leave else None) as stop,
        Watchdog(experiment.watch, run.folder, recorder) as watchdog,
        _opened(run, experiment) as checkpoints,
    ):
        opened = time.monotonic()
        watchdog.expect("verifying checkpoints", experiment.watch.checkpoint_seconds)
        newest = checkpoints.newest_step()
        if newest is not None and newest >= experiment.steps:
            return TrainResult("already finished", newest, last_evaluations(run))
        now = time.monotonic()
        recorder.record("start", age=now - begin, processes=processes.count(), devices=mesh.size, steps=experiment.steps)
        recorder.record("restore", age=now - opened)  # it has begun with looking for the newest
        watchdog.expect("start-up", math.inf)  # preparing data may take a day, and has limits of its own
        show = progress and processes.is_first()
        with use_mesh(mesh), recorder.faults():
            return Sitting(experiment, run, mesh, checkpoints, stop, watchdog, recorder, show).train()


@contextlib.contextmanager
def _opened(run: WorkDirectory, experiment: Experiment) -> Iterator[RunCheckpoints]:
    """The run's checkpoints. After an exception of one process of several nothing is waited for: the others shall hear of it."""
    checkpoints = RunCheckpoints(run.checkpoints, experiment.checkpoint, before_counting=run.sync_metrics)
    try:
        yield checkpoints
    except BaseException:
        if processes.count() == 1:
            checkpoints.close()
        raise
    checkpoints.close()
