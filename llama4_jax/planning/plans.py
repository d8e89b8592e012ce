"""From a job to a plan: compile and measure where there is a compiler, estimate where there is none."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from llama4_jax import app
from llama4_jax.config import Experiment
from llama4_jax.errors import UserError
from llama4_jax.parallel.mesh import axis_sizes, resolved
from llama4_jax.planning.analytic import estimate, tile_padding
from llama4_jax.planning.chips import Topology, parse_topology
from llama4_jax.planning.compiler import Bounds, Job, Tick, compile_program
from llama4_jax.planning.measure import Measurement
from llama4_jax.planning.report import TOKENS, Plan, make_plan
from llama4_jax.planning.search import compiled_text, rank, ranking_text


def make(job: Job, *, estimated: bool = False, total_tokens: float = TOKENS, bounds: Bounds | None = None) -> Plan:
    """Compiles for a TPU, unless `estimated`; estimates for a GPU, and where the program needs more HBM than there is.

    Raises:
        UserError: the experiment does not fit the topology, or the compiler failed.
    """
    topology, experiment = _of(job)
    experiment = dataclasses.replace(experiment, mesh=resolved(experiment.mesh, topology.devices))
    if estimated or not topology.chip.is_tpu:
        return _estimated(job, experiment, topology, total_tokens)
    with _progress(f"compiling for {topology}") as tick:
        outcome = compile_program(job, bounds or Bounds(), tick)
    if outcome.needed_bytes is not None:
        return _estimated(job, experiment, topology, total_tokens, needed=outcome.needed_bytes)
    if outcome.error is not None:
        raise UserError(f"{topology}: {outcome.error}")
    return _plan(
        job,
        experiment,
        topology,
        Measurement.from_json(outcome.measurement),
        method=f"compiled by {outcome.versions}",
        total_tokens=total_tokens,
        compile_seconds=outcome.seconds,
        compiler_bytes=outcome.compiler_bytes,
    )


def search(job: Job, compiled: int, *, say: Callable[[str], None], **options) -> Plan:
    """The best of all meshes and remat policies: ranked by the estimate, then the best `compiled` of them by the compiler.

    Args:
        say: gets the tables of both rankings.
        options: of `make`.

    Raises:
        UserError: no mesh divides the model and the batch, or none that was tried compiles.
    """
    topology, experiment = _of(job)
    with _progress(f"estimating meshes over {topology}"):
        ranking = rank(experiment, topology, job.program)
    say(ranking_text(ranking))
    best = (ranking.candidates or ranking.too_large)[: max(1, compiled)]
    if compiled == 0 or options.get("estimated") or not topology.chip.is_tpu:
        return make(dataclasses.replace(job, settings=job.settings | best[0].settings), **options | {"estimated": True})
    plans, failures = [], []
    for candidate in best:
        try:
            plans.append(make(dataclasses.replace(job, settings=job.settings | candidate.settings), **options))
        except UserError as error:
            failures.append(f"{candidate}: {error}")
    say(compiled_text(plans, failures, ranking))
    if not plans:
        raise UserError(f"none of {len(best)} candidates compiled; the last: {failures[-1]}")
    return min(plans, key=lambda plan: (not plan.fits, plan.step_seconds))


def _of(job: Job) -> tuple[Topology, Experiment]:
    return parse_topology(job.topology, job.slices, job.hbm_bytes), app.load_experiment(job.config, job.settings)


def _estimated(job: Job, experiment: Experiment, topology: Topology, total_tokens: float, needed: float | None = None) -> Plan:
    measurement = estimate(experiment, topology, job.program)
    method = "ESTIMATED from shapes, not compiled"
    return _plan(job, experiment, topology, measurement, method=method, total_tokens=total_tokens, needed_bytes=needed)


def _plan(job: Job, experiment: Experiment, topology: Topology, measurement: Measurement, **found) -> Plan:
    mesh = axis_sizes(experiment.mesh, topology.devices)
    if job.program == "train":
        found["padding_flops"] = tile_padding(experiment, topology)
    return make_plan(job.config, experiment, job.program, topology, mesh, measurement, **found)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Tick]:
    """A line that runs while the compiler does: it knows no end, so there is no bar."""
    interval = 0.5 if sys.stderr.isatty() else 30
    with tqdm(desc=what, bar_format="{desc}: {elapsed}{postfix}", mininterval=interval, miniters=1, leave=False) as line:

        def tick(seconds: float, size: float) -> None:
            line.set_postfix_str(f"{size / 1e9:.1f} GB", refresh=False)
            line.update()

        yield tick
