"""Weak and strong scaling on paper: one experiment over pods from one chip to ten thousand.

    python -m llama4_jax.planning.scaling --config=experiments/pretrain_scout.py --picture=scout.png

Each pod has the best mesh of the estimate (search.py, without `context`: rows are short). Weak: every chip has the rows of the
experiment on its own pod; strong: all chips share the experiment's batch.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Literal

from absl import flags
from tqdm import tqdm

from llama4_jax import app
from llama4_jax.config import Experiment
from llama4_jax.errors import UserError
from llama4_jax.planning.chips import Topology, parse_topology
from llama4_jax.planning.picture import new_figure
from llama4_jax.planning.report import gb, make_plan, ms, table
from llama4_jax.planning.search import rank

# Slices that v5p is rented in, the largest schedulable one, and two of that with the data-centre network between them.
PODS = (
    ("v5p:1x1x1", 1), ("v5p:2x2x1", 1), ("v5p:2x2x2", 1), ("v5p:2x2x4", 1), ("v5p:2x4x4", 1), ("v5p:4x4x4", 1), ("v5p:4x4x8", 1),
    ("v5p:4x8x8", 1), ("v5p:8x8x8", 1), ("v5p:8x8x16", 1), ("v5p:8x16x16", 1), ("v5p:16x16x16", 1), ("v5p:16x16x16", 2),
)  # fmt: skip
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


def scale(experiment: Experiment, kind: Kind, home: Topology, pods=PODS) -> list[Point]:
    """A point for each pod whose batch can be divided.

    Args:
        home: the pod that the experiment's batch is for.
    """
    points = []
    for name, slices in tqdm(pods, desc=f"{kind} scaling", leave=False):
        topology = parse_topology(name, slices)
        rows = experiment.data.batch_size
        if kind == "weak":
            rows = max(1, rows * topology.chips // home.chips)
        tried = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, batch_size=rows))
        try:
            ranking = rank(tried, topology, axes=AXES)
        except UserError:
            continue  # more chips than rows
        best = (ranking.candidates or ranking.too_large)[0]
        plan = make_plan("", tried, "train", topology, best.mesh, best.measurement, method="ESTIMATED")
        points.append(
            Point(
                kind, str(topology), topology.chips, rows, str(best), bool(ranking.candidates), best.measurement.memory.total,
                plan.step_seconds, plan.tokens / plan.step_seconds / plan.chips, plan.mfu, best.measurement.roofline.bound,
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
            p.bound,
            p.mesh,
        )
        for p in points
    ]
    return table(("", "topology", "chips", "rows", "memory", "step", "tokens/s/chip", "MFU", "bound by", "best mesh"), rows)


def scaling_figure(points: list[Point], name: str):
    """MFU at the roofline by chips; hollow where nothing fits, and what bounds each point."""
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    for kind, color in (("weak", "tab:blue"), ("strong", "tab:orange")):
        own = [p for p in points if p.kind == kind]
        axes.plot([p.chips for p in own], [100 * p.mfu for p in own], color=color, linewidth=1, label=f"{kind} scaling")
        for p in own:
            axes.plot([p.chips], [100 * p.mfu], marker="o", color=color, fillstyle="full" if p.fits else "none")
        turns = [p for before, p in itertools.pairwise(own) if p.bound != before.bound]
        for p in turns:
            axes.annotate(p.bound, (p.chips, 100 * p.mfu), xytext=(4, 6), textcoords="offset points", fontsize=8, color=color)
    axes.set(xscale="log", xlabel="v5p chips", ylabel="MFU at the roofline, %", ylim=(0, 100), title=name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main(overrides: dict[str, str]) -> int:
    if _CONFIG.value is None:
        raise UserError("--config=FILE is needed")
    experiment, home = app.load_experiment(_CONFIG.value, overrides), parse_topology(_HOME.value)
    points = [point for kind in ("weak", "strong") for point in scale(experiment, kind, home)]
    print(as_text(points))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps([dataclasses.asdict(p) for p in points], indent=1) + "\n")
    if _PICTURE.value:
        scaling_figure(points, f"{_CONFIG.value}: estimated").savefig(_PICTURE.value)
    return 0


if __name__ == "__main__":
    _CONFIG = flags.DEFINE_string("config", None, "Python file whose get_config() returns an Experiment")
    _HOME = flags.DEFINE_string("home", "v5p:4x4x8", "pod that the experiment's batch is for")
    _JSON = flags.DEFINE_string("json", None, "file for the points as JSON")
    _PICTURE = flags.DEFINE_string("picture", None, "file for the picture")
    app.run(main)
