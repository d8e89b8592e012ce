"""Weak and strong scaling on paper: one experiment over pods from one chip to ten thousand.

    python -m llama4_jax.plan --report=scaling --config=experiments/pretrain_scout.py --topology=v5p:4x4x8 --picture=scout.png

Each pod has the best mesh of the estimate (search.py, without `context`: rows are short). Weak: every chip has the rows of the
experiment on its own pod; strong: all chips share the experiment's batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from llama4_jax.config import Experiment
from llama4_jax.errors import UserError
from llama4_jax.planning.chips import Chip, Topology, parse_topology
from llama4_jax.planning.picture import new_figure
from llama4_jax.planning.report import gb, make_plan, ms, table
from llama4_jax.planning.search import rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Slices as they are rented, by what joins their chips, and last 8,192 chips as several of them.
_SHAPES = {
    3: "1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x16*2 4x4x4*128",
    2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16 16x16*2 16x16*4 16x16*8 16x16*16 16x16*32",
    0: "1x1 1x2 1x4 1x8 2x8 4x8 8x8 16x8 32x8 64x8 128x8 256x8 512x8 1024x8",
}
AXES = ("data", "fsdp", "expert", "tensor")
Kind = Literal["weak", "strong"]


@dataclasses.dataclass(frozen=True)
class Point:
    """Attributes:
    chips: of the pod.
    rows: of the batch.
    fits: whether any mesh does; if none, the numbers are of the one that needs least memory.
    speed: tokens a second and chip at the roofline.
    """

    kind: Kind
    topology: str
    chips: int
    rows: int
    mesh: str
    fits: bool
    memory: float
    step: float
    speed: float
    mfu: float
    bound: str
    waiting: float
    ici: float
    dcn: float


def pods(chip: Chip) -> list[Topology]:
    """From one chip to 8,192."""
    shapes = (shape.split("*") for shape in _SHAPES[chip.links // 2].split())
    return [parse_topology(f"{chip.name}:{shape[0]}", int(shape[1]) if shape[1:] else 1) for shape in shapes]


def scale(experiment: Experiment, kind: Kind, home: Topology, topologies: list[Topology] | None = None) -> list[Point]:
    """A point for each pod whose batch can be divided.

    Args:
        home: the pod that the experiment's batch is for.
        topologies: all `pods` of its chip when None.
    """
    points = []
    for topology in tqdm(topologies or pods(home.chip), desc=f"{kind} scaling", leave=False):
        rows = experiment.data.batch_size
        if kind == "weak":
            rows = max(1, rows * topology.chips // home.chips)
        tried = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, batch_size=rows))
        try:
            ranking = rank(tried, topology, axes=AXES)
        except UserError:
            continue  # more chips than rows
        best = (ranking.candidates or ranking.too_large)[0]
        roofline = best.measurement.roofline
        plan = make_plan("", tried, "train", topology, best.mesh, best.measurement, method="ESTIMATED")
        points.append(
            Point(
                kind, str(topology), topology.chips, rows, str(best), bool(ranking.candidates), best.measurement.memory.total,
                plan.step_seconds, plan.tokens / plan.step_seconds / plan.chips, plan.mfu, roofline.bound,
                roofline.waiting, roofline.ici, roofline.dcn,
            )
        )  # fmt: skip
    return points


def as_text(points: list[Point]) -> str:
    rows = [
        (
            p.kind,
            p.topology,
            f"{p.chips:,}",
            f"{p.rows:,}",
            gb(p.memory) + ("" if p.fits else " TOO LARGE"),
            ms(p.step),
            f"{p.speed:,.0f}",
            f"{p.mfu:.1%}",
            " / ".join(f"{seconds / p.step:.0%}" for seconds in (p.waiting, p.ici, p.dcn)),
            p.bound,
            p.mesh,
        )
        for p in points
    ]
    return table(
        (
            "",
            "topology",
            "chips",
            "rows",
            "memory",
            "step",
            "tokens/s/chip",
            "MFU",
            "waiting / ICI / DCN",
            "bound by",
            "best mesh",
        ),
        rows,
    )


def scaling_figure(points: list[Point], name: str) -> Figure:
    """By chips: MFU at the roofline, hollow where nothing fits, with what bounds; and what exchanges take of the step."""
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2, sharex=True)
    for kind, color in (("weak", "tab:blue"), ("strong", "tab:orange")):
        own = [p for p in points if p.kind == kind]
        chips = [p.chips for p in own]
        left.plot(chips, [100 * p.mfu for p in own], color=color, linewidth=1, label=f"{kind} scaling")
        for p in own:
            left.plot([p.chips], [100 * p.mfu], marker="o", color=color, fillstyle="full" if p.fits else "none")
        for p in (p for before, p in itertools.pairwise(own) if p.bound != before.bound):
            left.annotate(p.bound, (p.chips, 100 * p.mfu), xytext=(4, 6), textcoords="offset points", fontsize=8, color=color)
        for field, style in (("waiting", "-"), ("ici", "--"), ("dcn", ":")):
            shares = [100 * getattr(p, field) / p.step for p in own]
            right.plot(chips, shares, color=color, linestyle=style, label=f"{kind}: {_EXCHANGES[field]}")
    left.set(xscale="log", xlabel="chips", ylabel="MFU at the roofline, %", ylim=(0, 100))
    right.set(xlabel="chips", ylabel="of the step, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(name, fontsize=11)
    return figure


_EXCHANGES = {"waiting": "waiting for exchanges", "ici": "all over ICI", "dcn": "all over DCN"}
