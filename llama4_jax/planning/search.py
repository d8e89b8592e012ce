"""Meshes and remat policies, ranked: all by the estimate, the best few by compiling them one after another."""

import dataclasses
import itertools
from collections.abc import Iterator

from llama4_jax.config import Experiment, MeshConfig
from llama4_jax.errors import UserError
from llama4_jax.parallel.mesh import AXES
from llama4_jax.planning.analytic import estimate
from llama4_jax.planning.chips import Topology
from llama4_jax.planning.measure import Measurement
from llama4_jax.planning.report import Plan, gb, ms, table

REMAT = ("none", "projections", "layer")
HEADROOM = 0.9  # of HBM that an estimate may take to be worth compiling


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Attributes:
    mesh: sizes of all axes.
    remat: of ExecutionConfig.
    measurement: an estimate.
    """

    mesh: dict[str, int]
    remat: str
    measurement: Measurement

    @property
    def settings(self) -> dict[str, str]:
        """As on the command line."""
        return {f"mesh.{axis}": str(size) for axis, size in self.mesh.items()} | {"execution.remat": self.remat}

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        return f"{sizes} remat={self.remat}"


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Attributes:
    candidates: that should fit, the fastest first.
    too_large: the others that divide the model and the batch.
    refused: meshes that do not.
    """

    candidates: list[Candidate]
    too_large: list[Candidate]
    refused: int


def rank(experiment: Experiment, topology: Topology, program: str = "train", axes: tuple[str, ...] = AXES[1:]) -> Ranking:
    """Every mesh over the devices, with every remat policy in training. `dcn_data` is the number of slices.

    Args:
        axes: that may be above 1 inside a slice.

    Raises:
        UserError: no mesh divides the model and the batch; says why the last one did not.
    """
    fitting, too_large, refused, why = [], [], 0, ""
    policies = REMAT if program == "train" else (experiment.execution.remat,)
    for mesh in meshes(topology, axes):
        for remat in policies:
            execution = dataclasses.replace(experiment.execution, remat=remat)
            tried = dataclasses.replace(experiment, mesh=MeshConfig(**mesh), execution=execution)
            try:
                found = Candidate(mesh, remat, estimate(tried, topology, program))
            except UserError as error:
                refused, why = refused + 1, str(error)
                break
            fits = found.measurement.memory.total <= HEADROOM * topology.chip.hbm_bytes
            (fitting if fits else too_large).append(found)
    if not fitting and not too_large:
        raise UserError(f"no mesh over {topology.devices} devices divides the model and the batch; of the last one: {why}")
    by_time = lambda c: c.measurement.roofline.step  # noqa: E731
    return Ranking(sorted(fitting, key=by_time), sorted(too_large, key=lambda c: c.measurement.memory.total), refused)


def meshes(topology: Topology, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """All ways to write the devices of a slice as a product of these axes."""
    for sizes in products(topology.devices // topology.slices, len(axes)):
        yield dict.fromkeys(AXES, 1) | {"dcn_data": topology.slices} | dict(zip(axes, sizes, strict=True))


def products(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """Every tuple of `factors` whole numbers whose product is `number`."""
    if factors == 1:
        yield (number,)
        return
    for first in (d for d in range(1, number + 1) if number % d == 0):
        yield from ((first, *rest) for rest in products(number // first, factors - 1))


def ranking_text(ranking: Ranking, shown: int = 12) -> str:
    """The best of the estimates."""
    rows = [
        (f"{i + 1}", ms(c.measurement.roofline.step), gb(c.measurement.memory.total), c.measurement.roofline.bound, str(c))
        for i, c in enumerate(itertools.islice(ranking.candidates, shown))
    ]
    counts = (
        f"estimated: {len(ranking.candidates)} should fit, {len(ranking.too_large)} should not, "
        f"{ranking.refused} meshes do not divide the model or the batch"
    )
    if not rows:
        rows = [
            (f"{i + 1}", ms(c.measurement.roofline.step), gb(c.measurement.memory.total), "too large", str(c))
            for i, c in enumerate(ranking.too_large[:shown])
        ]
    return counts + "\n" + table(("", "step", "memory", "bound by", "mesh"), rows)


def compiled_text(plans: list[Plan], failures: list[str], ranking: Ranking) -> str:
    """The compiled candidates, those that fit first, by predicted time."""
    plans = sorted(plans, key=lambda p: (not p.fits, p.step_seconds))
    rows = [
        (
            f"{i + 1}",
            ms(p.step_seconds),
            gb(p.needed_bytes or p.measurement.memory.total),
            f"{p.mfu:.1%}",
            "fits" if p.fits else "does not fit",
            " ".join(f"{axis}={size}" for axis, size in p.mesh.items()) + f" remat={p.remat}",
        )
        for i, p in enumerate(plans)
    ]
    left = len(ranking.candidates) - len(plans) - len(failures)
    lines = ["compiled:", table(("", "step", "memory", "MFU", "", "mesh"), rows), *failures]
    return "\n".join([*lines, f"not compiled: {left} that should fit, and all that should not"])
