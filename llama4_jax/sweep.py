r"""Trains the runs of a sweep one after another, then prints and draws what came of them.

    python -m llama4_jax.sweep --config=experiments/width_transfer.py --workdir=runs/width_transfer

`--config=FILE` names a Python file whose `get_sweep()` returns a Sweep; `--config.FIELD=VALUE` overrides one field of all its
experiments. Each run has a folder of its own in --workdir, as llama4_jax.train makes it; runs of the same data share one
corpus. Started again, it skips finished runs and goes on with the one that was interrupted. --workdir receives table.md and
sweep.png. Exit status: 0 finished, 42 stopped by SIGTERM or Ctrl-C (start again to go on), 2 bad input.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from llama4_jax import app, exit_codes
from llama4_jax.config import Experiment, validated
from llama4_jax.errors import UserError
from llama4_jax.parallel import processes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass
class Run:
    """One experiment of a sweep.

    Attributes:
        series: what it belongs to: a row of the table, a line of the picture.
        value: of what is swept: a column of the table, a place on the horizontal axis.
        experiment: what is trained.
    """

    series: str
    value: float
    experiment: Experiment

    @property
    def folder(self) -> str:
        """Its name within the sweep's work directory."""
        return f"{self.series.replace(' ', '_')}/{self.value:g}"


@dataclasses.dataclass
class Sweep:
    """Experiments that are compared; lower is better.

    Attributes:
        swept: what `Run.value` is, in words.
        runs: in the order in which they are trained.
        evaluation, measure: what is compared: an evaluation that every experiment has, and one of its numbers.
    """

    swept: str
    runs: list[Run]
    evaluation: str = "heldout"
    measure: str = "bits_per_byte"

    def __post_init__(self):
        if not self.runs:
            raise UserError("Sweep.runs is empty")
        folders = set()
        for run in self.runs:
            if run.folder in folders:
                raise UserError(f"Sweep.runs has {run.folder} twice; give each series its values once")
            folders.add(run.folder)
            if self.evaluation not in run.experiment.evaluations:
                known = ", ".join(run.experiment.evaluations) or "none"
                raise UserError(f"Sweep: run {run.folder} has no evaluation {self.evaluation!r}; it has {known}")


@dataclasses.dataclass
class Results:
    """Attributes:
    swept, measure: as of the Sweep.
    series: by the series' name, what was measured at each value.
    """

    swept: str
    measure: str
    series: dict[str, dict[float, float]]


def load_sweep(path: str, overrides: dict[str, str]) -> Sweep:
    """The Sweep of a config file, with fields of all experiments overridden, checked.

    Raises:
        UserError: no such file, no get_sweep in it, an unknown field, or a bad value.
    """
    sweep = app.load_object(path, "get_sweep", Sweep)
    for run in sweep.runs:
        for name, text in overrides.items():
            app.override(run.experiment, name, text)
        run.experiment = validated(run.experiment)
    return sweep


def run_sweep(sweep: Sweep, workdir: str | Path) -> Results | None:
    """Trains what is not finished yet; None when a signal stopped it.

    Raises:
        UserError: what `llama4_jax.train` raises, preceded by the run's name, or a measure that the evaluation lacks.
    """
    from llama4_jax.training.loop import train

    results = Results(sweep.swept, sweep.measure, {run.series: {} for run in sweep.runs})
    corpora: dict[str, Path] = {}
    for number, run in enumerate(sweep.runs, 1):
        folder = Path(workdir) / run.folder
        if processes.is_first():
            print(f"--- run {number} of {len(sweep.runs)}: {run.series}, {sweep.swept} {run.value:g}", flush=True)
        processes.from_first("the link to the corpus", functools.partial(_share_corpus, corpora, run.experiment, folder))
        try:
            result = train(run.experiment, folder)
        except UserError as error:
            raise UserError(f"run {run.folder}: {error}") from error
        if result.status == "stopped":
            return None
        measured = result.evaluations[sweep.evaluation]
        if sweep.measure not in measured:
            raise UserError(f"Sweep.measure={sweep.measure!r}: evaluation {sweep.evaluation} has {', '.join(measured)}")
        results.series[run.series][run.value] = measured[sweep.measure]
    return results


def _share_corpus(corpora: dict[str, Path], experiment: Experiment, folder: Path) -> None:
    """Links the corpus of the first run with the same data: preparing it takes longer than a small run."""
    data, model = dataclasses.asdict(experiment.data), experiment.model
    corpus = corpora.setdefault(json.dumps([data, model.vocab_size, model.attention_chunk_size]), folder / "corpus")
    if not (folder / "corpus").exists() and corpus.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "corpus").symlink_to(os.path.relpath(corpus, folder))


def table(results: Results) -> str:
    """A Markdown table: a row for each series, a column for each value, the best of each row in bold."""
    values = sorted({value for series in results.series.values() for value in series})
    lines = [[f"{results.measure} by {results.swept}", *(f"{value:g}" for value in values)], ["---"] * (len(values) + 1)]
    for name, series in results.series.items():
        best = min(series.values())
        cells = {value: f"**{number:.3f}**" if number == best else f"{number:.3f}" for value, number in series.items()}
        lines.append([name, *(cells.get(value, "") for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(results: Results) -> Figure:
    """A line for each series, its best value marked."""
    from matplotlib.figure import Figure  # here, since it takes a second

    drawing = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = drawing.subplots()
    for name, series in results.series.items():
        values = sorted(series)
        best = min(series, key=series.get)
        (line,) = axes.plot(values, [series[value] for value in values], marker="o", markersize=3, label=f"{name}: {best:g}")
        axes.plot(best, series[best], marker="o", markersize=9, color=line.get_color())
    axes.set(xlabel=results.swept, ylabel=results.measure)
    if _grows_by_factors([value for series in results.series.values() for value in series]):
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(title="best", frameon=False)
    return drawing


def _grows_by_factors(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 4


def main(overrides: dict[str, str]) -> int:
    if flags.FLAGS.config is None or flags.FLAGS.workdir is None:
        raise UserError("--config=FILE and --workdir=DIR are both needed")
    sweep = load_sweep(flags.FLAGS.config, overrides)
    processes.start()
    results = run_sweep(sweep, flags.FLAGS.workdir)
    if results is None:
        return exit_codes.PREEMPTED
    if processes.is_first():
        write_results(results, flags.FLAGS.workdir)
    return exit_codes.DONE


def write_results(results: Results, workdir: str) -> None:
    """table.md and sweep.png, and the table on the terminal."""
    (Path(workdir) / "table.md").write_text(table(results) + "\n")
    figure(results).savefig(Path(workdir) / "sweep.png")
    print(f"\n{table(results)}\n\ntable.md, sweep.png and the runs are in {workdir}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "config", None, "Python file whose get_sweep() returns a Sweep; override fields by --config.FIELD=VALUE"
    )
    flags.DEFINE_string("workdir", None, "folder of the runs; an interrupted sweep resumes from it")
    from llama4_jax import sweep  # config files get their classes from there, and not from __main__

    app.run(sweep.main)
