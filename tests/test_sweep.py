"""A sweep: declared as an object, trained run by run, resumed, shown as a table and a picture."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from llama4_jax import sweep
from llama4_jax.app import load_experiment
from llama4_jax.errors import UserError
from llama4_jax.sweep import Results, Run, Sweep

FIXTURE = Path(__file__).parent / "fixtures/tiny_experiment.py"
CONFIG = f"""
import dataclasses, importlib.util
from llama4_jax.sweep import Run, Sweep
spec = importlib.util.spec_from_file_location("tiny", {str(FIXTURE)!r})
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

def get_sweep():
    def experiment(rate):
        made = tiny.get_config()
        made.optimizer.learning_rate, made.steps = rate, 2
        return made
    return Sweep("learning rate", [Run("two layers", rate, experiment(rate)) for rate in (0.01, 0.04)])
"""


def experiment(**changes):
    return dataclasses.replace(load_experiment(str(FIXTURE), {}), **changes)


def run_app(*arguments):
    command = [sys.executable, "-m", "llama4_jax.sweep", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two runs by the app."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "config.py").write_text(CONFIG)
    return folder, run_app(f"--config={folder}/config.py", f"--workdir={folder}/runs", "--config.log_every=2")


def test_the_app_trains_all_runs_and_shows_them(swept):
    folder, process = swept
    assert process.returncode == 0, process.stderr
    table = (folder / "runs/table.md").read_text()
    assert table.startswith("| bits_per_byte by learning rate | 0.01 | 0.04 |\n| --- | --- | --- |\n| two layers | ")
    assert table.count("**") == 2 and table in process.stdout
    assert (folder / "runs/sweep.png").stat().st_size > 1000
    for value in ("0.01", "0.04"):
        run = folder / "runs/two_layers" / value
        assert (run / "checkpoints/2").is_dir() and f'"optimizer.learning_rate": {value}' in (
            run / "experiment.json"
        ).read_text()
    assert '"log_every": 2' in (run / "experiment.json").read_text()  # an override reaches every run


def test_runs_of_the_same_data_share_one_corpus(swept):
    runs = swept[0] / "runs/two_layers"
    assert (runs / "0.04/corpus").resolve() == (runs / "0.01/corpus") and not (runs / "0.01/corpus").is_symlink()


def test_finished_runs_are_skipped(swept, monkeypatch):
    """The same results come back when nothing can be trained any more."""
    folder, _ = swept
    loaded = sweep.load_sweep(str(folder / "config.py"), {"log_every": "2"})
    monkeypatch.setattr("llama4_jax.training.loop.Sitting", None)
    results = sweep.run_sweep(loaded, folder / "runs")
    assert sweep.table(results) + "\n" == (folder / "runs/table.md").read_text()


def test_a_measure_that_the_evaluation_lacks_is_told(swept):
    loaded = sweep.load_sweep(str(swept[0] / "config.py"), {"log_every": "2"})
    with pytest.raises(UserError, match=r"Sweep.measure='loss': evaluation heldout has bits_per_byte"):
        sweep.run_sweep(dataclasses.replace(loaded, measure="loss"), swept[0] / "runs")


def test_a_signal_stops_the_sweep_without_results(monkeypatch, tmp_path):
    from llama4_jax.training.loop import TrainResult

    monkeypatch.setattr("llama4_jax.training.loop.train", lambda *_: TrainResult("stopped", 1, {}))
    assert sweep.run_sweep(Sweep("seed", [Run("all", 0, experiment())]), tmp_path) is None


def test_bad_input_of_a_run_names_the_run(tmp_path):
    bad = experiment(data=dataclasses.replace(experiment().data, sources=("/nowhere",)))
    with pytest.raises(UserError, match=r"^run all/3: .*/nowhere"):
        sweep.run_sweep(Sweep("seed", [Run("all", 3, bad)]), tmp_path)


@pytest.mark.parametrize(
    "runs, message",
    [
        ([], "Sweep.runs is empty"),
        ([("a", 1, {}), ("a", 1.0, {})], "Sweep.runs has a/1 twice"),
        ([("a", 1, {"evaluations": {}})], "run a/1 has no evaluation 'heldout'; it has none"),
    ],
)
def test_a_sweep_that_cannot_be_compared_is_refused(runs, message):
    with pytest.raises(UserError, match=message):
        Sweep("seed", [Run(series, value, experiment(**changes)) for series, value, changes in runs])


def test_a_table_has_a_column_for_every_value_and_the_best_in_bold():
    """Series need not have the same values; columns are in the order of numbers, not of words."""
    results = Results("rate", "loss", {"narrow": {16: 2.0, 2: 1.0}, "wide": {4: 3.0}})
    assert sweep.table(results).splitlines() == [
        "| loss by rate | 2 | 4 | 16 |",
        "| --- | --- | --- | --- |",
        "| narrow | **1.000** |  | 2.000 |",
        "| wide |  | **3.000** |  |",
    ]


def test_a_figure_draws_each_series_and_names_its_best():
    axes = sweep.figure(Results("rate", "loss", {"narrow": {0.5: 2.0, 0.125: 1.0, 2.0: 3.0}, "wide": {0.5: 1.5}})).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["narrow: 0.125", "wide: 0.5"]
    assert list(axes.lines[0].get_xdata()) == [0.125, 0.5, 2.0] and axes.get_xscale() == "log"
    assert sweep.figure(Results("seed", "loss", {"one": {0: 2.0}})).axes[0].get_xscale() == "linear"


@pytest.mark.parametrize(
    "arguments, line",
    [
        ("--workdir={new}", "error: --config=FILE and --workdir=DIR are both needed"),
        ("--config={fixture} --workdir={new}", "error: --config={fixture} has no get_sweep()"),
        ("--config={config} --workdir={new} --config.stepz=3", "error: unknown field --config.stepz; did you mean steps?"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(tmp_path, arguments, line):
    (tmp_path / "config.py").write_text(CONFIG)
    names = {"fixture": FIXTURE, "config": tmp_path / "config.py", "new": tmp_path / "run"}
    process = run_app(*arguments.format(**names).split())
    assert process.returncode == 2
    assert process.stderr == line.format(**names) + "\n" and process.stdout == ""
